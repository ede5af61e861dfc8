"""Least policies: what they hold, and that no pattern reaches into another party's keys."""

import re
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from feddiff_protocol import layout
from feddiff_protocol.access import (
    ANY_UID,
    Access,
    Role,
    aws_policy,
    bucket_and_prefix,
    least_access,
    seaweedfs_actions,
)
from feddiff_protocol.errors import SpecInvalid

UID = "3f2504e0-4f89-41d3-9a0c-0305e82c3301"
OPERATIONS = ("read", "write", "delete", "list")
names = st.sampled_from(["a", "b", "a0", "clients", "client-1", "client-10", "shared", "report"])


def matches(pattern: str, key: str) -> bool:
    """As servers do: a star matches slashes as well."""
    parts = {"*": ".*", "?": "."}
    return re.fullmatch("".join(parts.get(each, re.escape(each)) for each in pattern), key, re.DOTALL) is not None


def may(access: Access, operation: str, key: str) -> bool:
    return any(matches(pattern, key) for pattern in getattr(access, operation))


def star_for_the_uid(access: Access) -> Access:
    """The mutant: the pattern that comes to mind first."""
    return Access(*(tuple(each.replace(ANY_UID, "*") for each in getattr(access, name)) for name in OPERATIONS))


def trespasses(access: Access, client: str, other: str, below: str) -> list[str]:
    """What the keys of `client` may do below the prefixes of `other` and of the job, releases apart."""
    foreign = (layout.client_prefix(UID, other), *layout.job_prefixes(UID))
    keys = [f"{prefix}{below}" for prefix in foreign] + list(foreign)
    return [
        f"{operation} {key}"
        for operation, key in product(("write", "delete", "list"), keys)
        if may(access, operation, key)
    ]


@pytest.mark.parametrize(("client", "other"), [("client-1", "client-10"), ("client-10", "client-1"), ("a", "b")])
def test_a_client_changes_and_lists_its_own_prefix_alone(client: str, other: str) -> None:
    access = least_access(Role.FEDERATION, client)
    own = layout.client_prefix(UID, client)
    assert may(access, "write", f"{own}manifest.json") and may(access, "list", own)
    assert may(access, "delete", f"{own}{layout.PROBE}1") and not may(access, "delete", f"{own}manifest.json")
    trap = layout.client_prefix("", client).removeprefix("/")
    assert trespasses(access, client, other, f"{trap}manifest.json") == []
    assert trespasses(star_for_the_uid(access), client, other, f"{trap}manifest.json") != []


@given(names, names, st.text(alphabet="abclients/-10?*", max_size=60))
def test_whatever_the_names_and_keys_no_client_reaches_anothers(client: str, other: str, below: str) -> None:
    if client != other:
        assert trespasses(least_access(Role.FEDERATION, client), client, other, below) == []


def test_a_client_reads_what_was_released_and_the_shared_denoiser() -> None:
    access = least_access(Role.FEDERATION, "a")
    released = (layout.manifest(UID, "b"), layout.released_shard(UID, "b", "shard-00000.safetensors"))
    assert all(may(access, "read", key) for key in (*released, layout.shared_denoiser(UID)))
    unreleased = (layout.shared_samples(UID), layout.job_report(UID), f"{layout.client_prefix(UID, 'b')}probe-1")
    assert not any(may(access, "read", key) for key in unreleased)


def test_the_trainer_writes_what_the_job_makes_and_no_release() -> None:
    access = least_access(Role.TRAINER)
    made = (layout.shared_denoiser(UID), layout.shared_samples(UID), layout.job_report(UID))
    assert all(may(access, operation, key) for operation, key in product(OPERATIONS, made))
    released = (layout.manifest(UID, "a"), layout.released_shard(UID, "a", "shard-00000.safetensors"))
    assert all(may(access, "read", key) for key in released)
    assert not any(may(access, operation, key) for operation, key in product(("write", "delete", "list"), released))


def test_everything_of_a_job_in_the_federation_store_is_a_clients_or_the_jobs() -> None:
    """A new object in the layout comes under a prefix that somebody may write."""
    made = {name for name, each in vars(layout).items() if callable(each) and each.__module__ == layout.__name__}
    of_the_job = {name for name in made if name.startswith(("shared_", "job_"))} - {"job_prefixes"}
    assert {"shared_denoiser", "shared_samples", "job_report"} <= of_the_job
    for name in of_the_job:
        assert getattr(layout, name)(UID).startswith(layout.job_prefixes(UID)), name


def test_the_policy_of_a_client_for_aws() -> None:
    policy = aws_policy(least_access(Role.FEDERATION, "a"), "s3://federation/jobs/")
    statements = {each["Sid"]: each for each in policy["Statement"]}
    assert {name: each["Action"] for name, each in statements.items()} == {
        "Read": ["s3:GetObject"],
        "Write": ["s3:PutObject", "s3:AbortMultipartUpload"],
        "Delete": ["s3:DeleteObject"],
        "List": ["s3:ListBucket"],
    }
    assert statements["Write"]["Resource"] == [f"arn:aws:s3:::federation/jobs/{ANY_UID}/clients/a/*"]
    assert statements["Delete"]["Resource"] == [f"arn:aws:s3:::federation/jobs/{ANY_UID}/clients/a/probe-*"]
    assert statements["List"]["Resource"] == ["arn:aws:s3:::federation"]
    assert statements["List"]["Condition"] == {"StringLike": {"s3:prefix": [f"jobs/{ANY_UID}/clients/a/*"]}}


def test_the_owners_own_store_is_the_owners_and_no_more() -> None:
    owner = least_access(Role.OWNER)
    assert seaweedfs_actions(owner, "s3://owners/client-1") == [
        "Read:owners/client-1/*",
        "Write:owners/client-1/*",
        "List:owners/client-1/*",
    ]
    resources = [each["Resource"] for each in aws_policy(owner, "s3://clinic-a")["Statement"]]
    assert resources == [["arn:aws:s3:::clinic-a/*"]] * 3 + [["arn:aws:s3:::clinic-a"]]


@pytest.mark.parametrize("uri", ["s3://b/j*bs", "s3://b*/jobs", "s3://b/${aws:username}", "s3://b/a//b", "file:///a"])
def test_no_policy_is_written_for_an_address_that_could_mean_more(uri: str) -> None:
    with pytest.raises(SpecInvalid, match="use another address"):
        bucket_and_prefix(uri)
