"""What each party has to be allowed in each store, and nothing more: derived from the layout, written for servers.

An owner's keys open its own store. Its keys for the federation's store write below its own prefix, and read what was
released and the shared denoiser. The trainer's keys write what the whole job makes, and read what was released.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from . import layout
from .errors import SpecInvalid

# A star matches slashes as well: of `*/clients/a/*` client a could use b's `<uid>/clients/b/clients/a/`. A uid of fixed
# length pins the place of what follows it.
ANY_UID = "-".join("?" * length for length in (8, 4, 4, 4, 12))
_PLAIN = re.compile(r"s3://(?P<bucket>[a-z0-9][a-z0-9.-]{1,61}[a-z0-9])(?P<prefix>(/[A-Za-z0-9._-]+)*)/?")


class Role(StrEnum):
    OWNER = "owner"  # an owner in its own store
    FEDERATION = "federation"  # an owner, as one client, in the federation's store
    TRAINER = "trainer"  # the job's own stages in the federation's store


@dataclass(frozen=True)
class Access:
    """Patterns of keys below a store's address, by what may be done; `?` is one character, `*` any number."""

    read: tuple[str, ...]
    write: tuple[str, ...]
    delete: tuple[str, ...]
    list: tuple[str, ...]


def least_access(role: Role, client: str = "*") -> Access:
    """What the stages of `role` do in their store; `client` matters to role federation alone."""
    if role is Role.OWNER:
        return Access(("*",), ("*",), ("*",), ("*",))
    released = (layout.manifest(ANY_UID, "*"), layout.released_shard(ANY_UID, "*", "*"))
    if role is Role.TRAINER:
        made = tuple(f"{prefix}*" for prefix in layout.job_prefixes(ANY_UID))
        return Access((*released, *made), made, made, made)
    own = layout.client_prefix(ANY_UID, client)
    # What was sent stays: only probes are deleted.
    return Access(
        (f"{own}*", *released, layout.shared_denoiser(ANY_UID)), (f"{own}*",), (f"{own}{layout.PROBE}*",), (f"{own}*",)
    )


def bucket_and_prefix(uri: str) -> tuple[str, str]:
    """Bucket, and the prefix of every key in it: empty, or ending in a slash.

    Raises SpecInvalid where a policy for the address could mean more than it says.
    """
    plain = _PLAIN.fullmatch(uri)
    if plain is None:
        raise SpecInvalid(
            f"store {uri}: expected s3://bucket/prefix of letters, digits, '.', '_' and '-'; a policy for other names"
            " could reach too far; use another address"
        )
    prefix = plain["prefix"].strip("/")
    return plain["bucket"], f"{prefix}/" if prefix else ""


def aws_policy(access: Access, uri: str) -> dict[str, Any]:
    """An IAM policy for one user or role: also what MinIO and others read."""
    bucket, prefix = bucket_and_prefix(uri)

    def keys(patterns: Iterable[str]) -> list[str]:
        return [f"arn:aws:s3:::{bucket}/{prefix}{pattern}" for pattern in patterns]

    return {
        "Version": "2012-10-17",
        "Statement": [
            {"Sid": "Read", "Effect": "Allow", "Action": ["s3:GetObject"], "Resource": keys(access.read)},
            {
                "Sid": "Write",
                "Effect": "Allow",
                "Action": ["s3:PutObject", "s3:AbortMultipartUpload"],
                "Resource": keys(access.write),
            },
            {"Sid": "Delete", "Effect": "Allow", "Action": ["s3:DeleteObject"], "Resource": keys(access.delete)},
            {
                "Sid": "List",
                "Effect": "Allow",
                "Action": ["s3:ListBucket"],
                "Resource": [f"arn:aws:s3:::{bucket}"],
                "Condition": {"StringLike": {"s3:prefix": [f"{prefix}{pattern}" for pattern in access.list]}},
            },
        ],
    }


def seaweedfs_actions(access: Access, uri: str) -> list[str]:
    """An identity's `actions` in SeaweedFS's -s3.config, which knows no deleting apart from writing."""
    bucket, prefix = bucket_and_prefix(uri)
    writes = dict.fromkeys((*access.write, *access.delete))
    covered = {each for each in writes if each not in access.write and any(_below(each, own) for own in access.write)}
    allowed = {"Read": access.read, "Write": [each for each in writes if each not in covered], "List": access.list}
    return [f"{action}:{bucket}/{prefix}{each}" for action, patterns in allowed.items() for each in patterns]


def _below(pattern: str, wider: str) -> bool:
    return wider.endswith("*") and pattern.startswith(wider[:-1])
