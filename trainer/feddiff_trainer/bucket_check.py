"""What a bucket is asked before it carries releases: address, keys, clock, what it does, what it keeps, who gets in.

What a stage does is asked through the stages' own store, the rest with boto3, which knows S3's administration.
"""

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from typing import Any
from uuid import uuid4

from feddiff_protocol import layout
from feddiff_protocol.access import Role
from feddiff_protocol.errors import ConfigurationInvalid, InputMissing, PrivacyRefusal, StoreUnavailable

from .store_probes import Finding, StoreCheckSpec, behaviour, failed, fine, probe, probe_prefix, warning
from .stores import FAILURES, Store, open_store, settings_of

CONNECT_SECONDS, READ_SECONDS = 10, 30
SKEW_NOTICED, SKEW_REFUSED = timedelta(seconds=30), timedelta(minutes=5)  # signatures hold for 5 to 15 minutes
STALE = timedelta(days=1)
KEYS, REGION, ENDPOINT = "AWS_ACCESS_KEY_ID", "AWS_REGION", "AWS_ENDPOINT_URL_S3"  # what obstore reads first
# Codes for keys that a server does not take, and what to do.
BAD_KEYS = {
    "InvalidAccessKeyId": "AWS_ACCESS_KEY_ID is not known there: correct it, or the endpoint",
    "SignatureDoesNotMatch": "AWS_SECRET_ACCESS_KEY does not belong to the key: correct it",
    "ExpiredToken": "the session is over: get new keys",
    "InvalidToken": "AWS_SESSION_TOKEN belongs to other keys: correct or remove it",
    "RequestTimeTooSkewed": "set the clock of this machine (NTP)",
}
WRONG_REGION = frozenset({"PermanentRedirect", "301", "AuthorizationHeaderMalformed"})
EVERYBODY = ("/AllUsers", "/AuthenticatedUsers")


@dataclass(frozen=True)
class Bucket:
    """One bucket, as the spec's identity meets it and, `anonymous`, as everybody does."""

    spec: StoreCheckSpec
    name: str
    prefix: str  # of every key: empty, or ending in a slash
    store: Store
    client: Any  # boto3's
    anonymous: Any
    identity: Callable[[], str]
    probes: str  # below the store's address: where this role may do all that it has to

    @property
    def owners(self) -> bool:
        """Whether a data owner's private objects lie here."""
        return self.spec.whose == "owner" or self.spec.role is Role.OWNER


class Refused(Exception):
    """The server's answer was an error."""

    def __init__(self, code: str, message: str, headers: Mapping[str, str]) -> None:
        super().__init__(f"{code}: {message}")
        self.code, self.headers = code, headers


class NotTold(Exception):
    """These keys may not ask, or the server does not know the question."""


def check_bucket(spec: StoreCheckSpec) -> Iterator[Finding]:
    """Everything there is to find about a bucket; where it cannot be reached, nothing else is asked.

    Raises ConfigurationInvalid without boto3, or for an address that is none.
    """
    bucket = _connect(spec)
    reached = list(_reached(bucket))
    yield from reached
    if any(finding.exit_code for finding in reached):
        return
    yield from behaviour(spec, bucket.store, bucket.probes)
    yield _anybody(bucket)
    _purge(bucket, bucket.name, f"{bucket.prefix}{bucket.probes}")
    yield from _settings(bucket)
    if spec.role is not None:
        yield from _reach(bucket)


# ---- Connecting --------------------------------------------------------------------------------------------------


def _connect(spec: StoreCheckSpec) -> Bucket:
    try:
        import boto3
        from botocore import UNSIGNED
        from botocore.config import Config
    except ImportError as error:
        raise ConfigurationInvalid(f"{error}: a bucket's check needs boto3; pip install 'feddiff[store]'") from None
    name, _, path = spec.uri.removeprefix("s3://").partition("/")
    if spec.endpoint is not None:
        os.environ[f"{spec.whose or ''}_{ENDPOINT}".upper().lstrip("_")] = spec.endpoint
    store = open_store(spec.uri, spec.whose)
    with settings_of(spec.whose), _without_profiles():
        where = {"region_name": _set(REGION, "AWS_DEFAULT_REGION") or "us-east-1", "endpoint_url": _endpoint()}
        session = boto3.session.Session()
        client = session.client("s3", config=Config(**_options()), **where)
        anonymous = session.client("s3", config=Config(**_options(), signature_version=UNSIGNED), **where)
        identity = _identity(session, client, own_server=where["endpoint_url"] is not None)
    prefix = f"{path.strip('/')}/" if path.strip("/") else ""
    return Bucket(spec, name, prefix, store, client, anonymous, identity, probe_prefix(spec))


def _set(*names: str) -> str | None:
    return next((value for name in names if (value := os.environ.get(name))), None)


def _endpoint() -> str | None:
    return _set(ENDPOINT, "AWS_ENDPOINT_URL", "AWS_ENDPOINT")


def _options() -> dict[str, Any]:
    virtual = os.environ.get("AWS_VIRTUAL_HOSTED_STYLE_REQUEST", "").lower() == "true"
    return {
        "retries": {"max_attempts": 1},
        "connect_timeout": CONNECT_SECONDS,
        "read_timeout": READ_SECONDS,
        "s3": {"addressing_style": "virtual" if virtual else "path"},  # as obstore does
        "request_checksum_calculation": "when_required",  # newer ones are not every server's
        "response_checksum_validation": "when_required",
    }


@contextmanager
def _without_profiles() -> Iterator[None]:
    """boto3 finds no keys that the stages, which read no files of profiles, would not find."""
    hidden = {"AWS_SHARED_CREDENTIALS_FILE": os.devnull, "AWS_CONFIG_FILE": os.devnull}
    before = {name: os.environ.pop(name, None) for name in (*hidden, "AWS_PROFILE", "AWS_DEFAULT_PROFILE")}
    os.environ.update(hidden)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def _identity(session: Any, client: Any, *, own_server: bool) -> Callable[[], str]:
    """Whose the keys are, in the server's words where it tells."""
    credentials = session.get_credentials()
    sts = None if own_server else session.client("sts", region_name=client.meta.region_name)

    def whose() -> str:
        with suppress(Refused):
            if sts is not None:
                return str(_ask(sts.get_caller_identity)["Arn"])
            owner = _ask(client.list_buckets).get("Owner", {})
            if name := owner.get("DisplayName") or owner.get("ID"):
                return str(name)
        return f"key {credentials.access_key[:4]}…" if credentials is not None else "nobody"

    return whose


def _ask(call: Callable[..., Any], **arguments: Any) -> Any:
    """boto3's answer. Raises Refused with the server's code, StoreUnavailable where there is no answer."""
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        return call(**arguments)
    except ClientError as error:
        told, headers = error.response.get("Error", {}), error.response.get("ResponseMetadata", {})
        raise Refused(str(told.get("Code")), str(told.get("Message")), headers.get("HTTPHeaders", {})) from None
    except BotoCoreError as error:
        raise StoreUnavailable(str(error)) from None


# ---- Address, keys, clock ----------------------------------------------------------------------------------------


def _reached(bucket: Bucket) -> Iterator[Finding]:
    """Whether the address answers and takes the keys; the last finding is failed where nothing else can be asked."""
    address, below = bucket.client.meta.endpoint_url, f"{bucket.prefix}{bucket.probes}"
    transport = list(_transport(bucket, address))
    yield from transport
    if any(finding.exit_code for finding in transport):
        return
    try:
        answer = _ask(bucket.client.list_objects_v2, Bucket=bucket.name, Prefix=below, MaxKeys=1)
        headers, refusal = answer["ResponseMetadata"]["HTTPHeaders"], None
    except Refused as refused:
        headers, refusal = refused.headers, refused
    except StoreUnavailable as error:
        yield _no_answer(address, str(error))
        return
    yield fine("endpoint", address)
    if "date" in headers:
        yield clock(parsedate_to_datetime(headers["date"]), datetime.now(UTC))
    if refusal is not None:
        yield _refused(bucket, refusal)
        return
    yield fine("keys", f"those of {bucket.identity()}")
    yield fine("bucket", f"{bucket.name} in {headers.get('x-amz-bucket-region', bucket.client.meta.region_name)}")


def _transport(bucket: Bucket, address: str) -> Iterator[Finding]:
    if not address.startswith("http://"):
        return
    with settings_of(bucket.spec.whose):
        allowed = os.environ.get("AWS_ALLOW_HTTP", "").lower() in {"true", "1", "yes", "on", "y"}
    if not allowed:
        advice = "use https, or set AWS_ALLOW_HTTP=true beside the keys"
        yield failed("transport", ConfigurationInvalid, expected="https", found=address, advice=advice)
    else:
        advice = "whoever listens on the way reads what is stored: use https outside of a closed network"
        yield warning("transport", expected="https", found=f"{address}, allowed by AWS_ALLOW_HTTP", advice=advice)


def _no_answer(address: str, error: str) -> Finding:
    if "redentials" in error:  # botocore's NoCredentialsError and its kin
        advice = f"set {KEYS} and AWS_SECRET_ACCESS_KEY, with OWNER_ or FEDERATION_ before them where both are needed"
        return failed("keys", ConfigurationInvalid, expected="keys", found=error, advice=advice)
    advice = "check the address, DNS, certificate, NetworkPolicy and proxy on the way"
    return failed("endpoint", StoreUnavailable, expected=f"an answer of {address}", found=error, advice=advice)


def clock(theirs: datetime, ours: datetime) -> Finding:
    """How far this machine's clock is from the server's, whose Date header has whole seconds."""
    apart = max(abs(theirs - ours) - timedelta(seconds=1), timedelta(0))
    found = f"{apart.total_seconds():.0f} s apart"
    if apart < SKEW_NOTICED:
        return fine("clock", f"{found} or less")
    words = {"expected": f"clocks less than {SKEW_NOTICED.seconds} s apart", "found": found}
    if apart < SKEW_REFUSED:
        return warning("clock", **words, advice="set both clocks (NTP): from 5 minutes on signatures are refused")
    return failed("clock", ConfigurationInvalid, **words, advice="set both clocks (NTP): signatures depend on them")


def _refused(bucket: Bucket, refusal: Refused) -> Finding:
    if refusal.code in BAD_KEYS:
        return failed(
            "keys", InputMissing, expected="keys that are valid", found=str(refusal), advice=BAD_KEYS[refusal.code]
        )
    if refusal.code in WRONG_REGION:
        region = refusal.headers.get("x-amz-bucket-region", "another one")
        return failed(
            "bucket",
            ConfigurationInvalid,
            expected=f"{bucket.name} in {bucket.client.meta.region_name}",
            found=f"it is in {region}",
            advice=f"set {REGION} to where it is",
        )
    if refusal.code == "NoSuchBucket":
        advice = "make it, or correct the address"
        return failed("bucket", InputMissing, expected=f"a bucket {bucket.name}", found="none", advice=advice)
    return failed(
        "bucket",
        InputMissing,
        expected=f"that these keys may list below their own prefix of {bucket.name}",
        found=str(refusal),
        advice="check the address, say with --role whose keys these are, or give them the policy that --print-policy"
        " shows",
    )


# ---- Who gets in without keys ------------------------------------------------------------------------------------


def _anybody(bucket: Bucket) -> Finding:
    """Tried without any signature, since a server's settings can open a bucket in more ways than one."""
    key = probe(bucket.probes)
    with suppress(*FAILURES):
        bucket.store.create(key, b"-")
    full, other = f"{bucket.prefix}{key}", f"{bucket.prefix}{probe(bucket.probes)}"
    tried = {
        "list": lambda: _ask(bucket.anonymous.list_objects_v2, Bucket=bucket.name, MaxKeys=1),
        "read": lambda: _ask(bucket.anonymous.get_object, Bucket=bucket.name, Key=full),
        "write": lambda: _ask(bucket.anonymous.put_object, Bucket=bucket.name, Key=other, Body=b"-"),
        "delete": lambda: _ask(bucket.anonymous.delete_object, Bucket=bucket.name, Key=other),
    }
    may = [operation for operation, attempt in tried.items() if _allowed(attempt)]
    for written in (key, other.removeprefix(bucket.prefix)):
        with suppress(*FAILURES):
            bucket.store.delete(written)
    if may:
        return _public("public access", f"that anybody may {', '.join(may)} without keys")
    return fine("public access", "nobody may list, read, write or delete without keys")


def _public(check: str, found: str) -> Finding:
    advice = "close it now (public access block, bucket policy, ACL); what lay there counts as known to everybody"
    expected = "a bucket that opens to its parties alone"
    return failed(check, PrivacyRefusal, expected=expected, found=found, advice=advice)


def _allowed(attempt: Callable[[], Any]) -> bool:
    try:
        attempt()
    except (Refused, StoreUnavailable):
        return False
    return True


def _purge(bucket: Bucket, name: str, prefix: str) -> None:
    """Nothing is left below `prefix`, not even as versions, where these keys may see to that."""
    with suppress(Refused, StoreUnavailable):
        kept = _ask(bucket.client.list_object_versions, Bucket=name, Prefix=prefix)
        for each in (*kept.get("Versions", ()), *kept.get("DeleteMarkers", ())):
            _ask(bucket.client.delete_object, Bucket=name, Key=each["Key"], VersionId=each["VersionId"])


# ---- What the bucket is set to -----------------------------------------------------------------------------------


def _settings(bucket: Bucket) -> Iterator[Finding]:
    questions = {
        "versioning": _versioning,
        "encryption": _encryption,
        "policy": _policy,
        "object lock": _object_lock,
        "lifecycle": _lifecycle,
        "unfinished uploads": _uploads,
    }
    untold = []
    for name, question in questions.items():
        try:
            yield question(bucket)
        except NotTold:
            untold.append(name)
    if untold:
        yield _untold(bucket, untold)


def _untold(bucket: Bucket, names: list[str]) -> Finding:
    found = f"not told: {', '.join(names)}"
    if bucket.spec.role is not None:
        return fine("settings", f"{found}; these keys may not ask, as is right: ask once with the administrator's")
    advice = "ask with the keys of the bucket's administrator; what the server does not know, it does not do"
    return warning("settings", expected="an answer to every question", found=found, advice=advice)


def _told(call: Callable[..., Any], bucket: Bucket, *absent: str, **arguments: Any) -> Any:
    """The answer, or {} where the server says that nothing is set. Raises NotTold."""
    try:
        return _ask(call, Bucket=bucket.name, **arguments)
    except Refused as refused:
        if refused.code in absent:
            return {}
        raise NotTold from None
    except StoreUnavailable:
        raise NotTold from None


def _versioning(bucket: Bucket) -> Finding:
    status = _told(bucket.client.get_bucket_versioning, bucket).get("Status")
    if status is None:
        return fine("versioning", "off: what is deleted is gone")
    if not bucket.owners:
        return fine("versioning", f"{status}: checkpoints that are deleted live on as versions; let them expire")
    return warning(
        "versioning",
        expected="off, or old versions that expire (lifecycle: NoncurrentVersionExpiration)",
        found=status,
        advice="deleted attempts live on as versions: noisy copies that were never sent, so nobody but the owner may"
        " ever read versions",
    )


def _encryption(bucket: Bucket) -> Finding:
    absent = "ServerSideEncryptionConfigurationNotFoundError"
    told = _told(bucket.client.get_bucket_encryption, bucket, absent)
    rules = told.get("ServerSideEncryptionConfiguration", {}).get("Rules", [])
    kinds = [each.get("ApplyServerSideEncryptionByDefault", {}).get("SSEAlgorithm", "?") for each in rules]
    if kinds:
        return fine("encryption", f"{', '.join(kinds)} by default")
    advice = "turn default encryption on, or encrypt the server's disks"
    return warning("encryption", expected="encryption at rest by default", found="none", advice=advice)


def _policy(bucket: Bucket) -> Finding:
    status = _told(bucket.client.get_bucket_policy_status, bucket, "NoSuchBucketPolicy").get("PolicyStatus", {})
    if status.get("IsPublic"):
        return _public("policy", "a bucket policy that the server calls public")
    grants = _told(bucket.client.get_bucket_acl, bucket).get("Grants", [])
    if open_to := [each for each in grants if str(each.get("Grantee", {}).get("URI", "")).endswith(EVERYBODY)]:
        return _public("policy", f"an ACL that grants {open_to[0]['Permission']} to everybody")
    try:
        absent = "NoSuchPublicAccessBlockConfiguration"
        block = _told(bucket.client.get_public_access_block, bucket, absent).get("PublicAccessBlockConfiguration", {})
    except NotTold:
        return fine("policy", "neither policy nor ACL is public; the server knows no public access block")
    if len(block) == 4 and all(block.values()):
        return fine("policy", "neither policy nor ACL is public, and the public access block keeps it so")
    advice = "turn all four settings of the public access block on"
    return warning("policy", expected="a public access block", found=f"{sum(block.values())} of 4", advice=advice)


def _object_lock(bucket: Bucket) -> Finding:
    told = _told(bucket.client.get_object_lock_configuration, bucket, "ObjectLockConfigurationNotFoundError")
    lock = told.get("ObjectLockConfiguration", {})
    if lock.get("ObjectLockEnabled") != "Enabled":
        return fine("object lock", "off")
    retention = lock.get("Rule", {}).get("DefaultRetention")
    if retention is None:
        return fine("object lock", "on, without a default retention")
    length = f"{retention.get('Days') or retention.get('Years')} {'days' if retention.get('Days') else 'years'}"
    return warning(
        "object lock",
        expected="no default retention",
        found=f"{retention.get('Mode')} for {length}",
        advice="checkpoints and attempts that lost cannot be deleted before: use a bucket without it",
    )


def _lifecycle(bucket: Bucket) -> Finding:
    told = _told(bucket.client.get_bucket_lifecycle_configuration, bucket, "NoSuchLifecycleConfiguration")
    rules = [each for each in told.get("Rules", []) if each.get("Status") == "Enabled"]
    for rule in rules:
        if what := _harm(rule, bucket.prefix):
            return failed(
                "lifecycle",
                ConfigurationInvalid,
                expected="no rule that deletes or moves objects of this store",
                found=f"rule {rule.get('ID', '?')!r} {what}",
                advice="take it away: a seal that is gone cannot be made again, and a release without its seal is"
                " refused; rules for old versions and unfinished uploads are welcome",
            )
    return fine("lifecycle", f"{len(rules)} rules, none deletes or moves objects of this store")


def _harm(rule: Mapping[str, Any], prefix: str) -> str | None:
    """What `rule` would do to objects below `prefix`; ours bear no tags."""
    chosen = rule.get("Filter", {})
    if "Tag" in chosen or "Tags" in chosen.get("And", {}):
        return None
    where = chosen.get("And", chosen).get("Prefix", rule.get("Prefix", ""))
    if not (where.startswith(prefix) or prefix.startswith(where)):
        return None
    if {"Days", "Date"} & set(rule.get("Expiration", {})):
        return f"deletes objects below {where or 'everything'!r}"
    return f"moves objects below {where!r} to slower storage" if rule.get("Transitions") else None


def _uploads(bucket: Bucket) -> Finding:
    told = _told(bucket.client.list_multipart_uploads, bucket, Prefix=bucket.prefix)
    stale = [each for each in told.get("Uploads", []) if datetime.now(UTC) - each["Initiated"] > STALE]
    if not stale:
        return fine("unfinished uploads", "none older than a day")
    advice = "they cost room and are never read: a lifecycle rule AbortIncompleteMultipartUpload takes them away"
    return warning("unfinished uploads", expected="none older than a day", found=f"{len(stale)}", advice=advice)


# ---- How far the keys of a role reach ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Foreign:
    """Keys that begin with `prefix` in `bucket`, which are another party's; `private` are an owner's own."""

    whose: str
    bucket: str
    prefix: str
    private: bool


def _reach(bucket: Bucket) -> Iterator[Finding]:
    """What the role's keys may do where they have nothing to do: tried with probes that overwrite nothing."""
    leaks, writes, reads = [], [], []
    for foreign in _foreign(bucket):
        may = _may(bucket, foreign)
        if may and foreign.private:
            leaks.append(f"{'/'.join(may)} {foreign.whose}")
        elif {"write", "delete"} & set(may):
            writes.append(f"{'/'.join(may)} {foreign.whose}")
        elif may and bucket.spec.role is Role.FEDERATION:
            reads.append(f"{'/'.join(may)} {foreign.whose}")
    words = {
        "expected": "keys that reach no further than their role needs",
        "advice": "give them the policy that --print-policy shows",
    }
    if leaks:
        yield failed("reach", PrivacyRefusal, found=f"that they may {', '.join(leaks)}", **words)
    if writes:
        yield failed("reach", ConfigurationInvalid, found=f"that they may {', '.join(writes)}", **words)
    if reads:
        yield warning("reading reach", found=f"that they may {', '.join(reads)}", **words)
    if not leaks and not writes and not reads:
        yield fine("reach", "nothing of another party can be listed, read, written or deleted, apart from releases")


def _foreign(bucket: Bucket) -> Iterator[Foreign]:
    spec, uid = bucket.spec, str(uuid4())
    base = f"{bucket.prefix}{{}}"
    for uri in spec.closed:
        name, _, path = uri.removeprefix("s3://").partition("/")
        if uri.startswith("s3://") and (name, path.strip("/")) != (bucket.name, bucket.prefix.strip("/")):
            yield Foreign(uri, name, f"{path.strip('/')}/" if path.strip("/") else "", private=True)
    if spec.role is Role.OWNER:
        if bucket.prefix:  # the bucket is shared
            yield Foreign(f"the bucket above {bucket.prefix}", bucket.name, "", private=True)
            beside = f"{bucket.prefix[:-1]}0/"
            yield Foreign(beside, bucket.name, beside, private=True)
        return
    for each in spec.neighbours:
        theirs = layout.client_prefix(uid, each)
        yield Foreign(f"{each}'s prefix", bucket.name, base.format(theirs), private=False)
        if spec.client is not None:
            inside = f"{theirs}{layout.client_prefix(uid, spec.client).partition('/')[2]}"
            yield Foreign(f"{inside.partition('/')[2]} of a job", bucket.name, base.format(inside), private=False)
    if spec.role is Role.FEDERATION:
        for made in layout.job_prefixes(uid):
            whose = f"{made.partition('/')[2]} of a job"
            yield Foreign(whose, bucket.name, base.format(made), private=False)
    if bucket.prefix:
        yield Foreign(f"the bucket above {bucket.prefix}", bucket.name, "", private=False)


def _may(bucket: Bucket, foreign: Foreign) -> list[str]:
    """Of list, read, write and delete what these keys may do there."""
    key = probe(foreign.prefix)
    where = {"Bucket": foreign.bucket}
    may = []
    if _allowed(lambda: _ask(bucket.client.list_objects_v2, **where, Prefix=foreign.prefix, MaxKeys=1)):
        may.append("list")
    if _readable(bucket, foreign.bucket, key):
        may.append("read")
    if _allowed(lambda: _ask(bucket.client.put_object, **where, Key=key, Body=b"-", IfNoneMatch="*")):
        may.append("write")
    if _allowed(lambda: _ask(bucket.client.delete_object, **where, Key=key)):
        may.append("delete")
    if "write" in may:
        _purge(bucket, foreign.bucket, key)
    return may


def _readable(bucket: Bucket, name: str, key: str) -> bool:
    """Whether the server says that the object is absent, and so would show it if it were there."""
    try:
        _ask(bucket.client.get_object, Bucket=name, Key=key)
    except Refused as refused:
        return refused.code in {"NoSuchKey", "404"}
    except StoreUnavailable:
        return False
    return True
