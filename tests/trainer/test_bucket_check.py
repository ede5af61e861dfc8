"""A bucket is asked before it carries releases: a real S3 server, and that server behind a proxy that spoils it."""

import http.client
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any
from urllib.parse import urlsplit

import pytest

from cluster.weed import Weed
from feddiff_protocol.access import Role, least_access, seaweedfs_actions
from feddiff_trainer.bucket_check import _harm, clock
from feddiff_trainer.store_check import check_store
from feddiff_trainer.store_probes import Finding, State, StoreCheckSpec

FEDERATION, OWNER = "s3://federation/jobs", "s3://owners/client-1"
Headers = dict[str, str]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Weed]:
    may = {
        "client": seaweedfs_actions(least_access(Role.FEDERATION, "client-1"), FEDERATION),
        "trainer": seaweedfs_actions(least_access(Role.TRAINER), FEDERATION),
        "owner": seaweedfs_actions(least_access(Role.OWNER), OWNER),
        "starred": ["Write:federation/jobs/*/clients/client-1/*", "Read:federation", "List:federation"],
    }
    with Weed(tmp_path_factory.mktemp("s3"), may, ["federation", "owners", "spoiled"]) as server:
        yield server


@pytest.fixture
def findings(server: Weed, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., dict[str, Finding]]]:
    """Asks as an identity of the server; afterwards no bucket holds anything."""

    def ask(identity: str, uri: str, whose: str = "", **fields: Any) -> dict[str, Finding]:
        settings = server.environment(identity) | fields.pop("settings", {})
        prefix = {"owner": "OWNER_", "federation": "FEDERATION_"}.get(whose, "")
        for name, value in settings.items():
            monkeypatch.setenv(f"{prefix}{name}", value)
        named = f"{prefix}AWS_ENDPOINT_URL_S3"  # the check sets it when it is told an endpoint
        monkeypatch.setenv(named, "")
        monkeypatch.delenv(named)
        found = check_store(StoreCheckSpec(uri=uri, whose=whose or None, **fields))
        return {finding.check: finding for finding in found}

    yield ask
    for bucket in server.buckets:
        assert "Contents" not in server.client().list_objects_v2(Bucket=bucket)


def wrong(found: dict[str, Finding]) -> dict[str, int]:
    return {check: finding.exit_code for check, finding in found.items() if finding.state is State.FAILED}


# ---- A server that keeps its promises ----------------------------------------------------------------------------


def test_an_administrator_sees_the_settings_and_that_all_is_well(findings: Any) -> None:
    found = findings("administrator", FEDERATION)
    assert wrong(found) == {}
    assert "administrator" in found["keys"].found and "federation" in found["bucket"].found
    fine = {"put, get, list, delete", "create if absent", "public access", "versioning", "object lock", "lifecycle"}
    assert fine <= {check for check, finding in found.items() if finding.state is State.FINE}
    assert {check for check, finding in found.items() if finding.state is State.WARNING} == {"transport", "encryption"}


@pytest.mark.parametrize(
    ("identity", "uri", "whose", "fields"),
    [
        ("owner", OWNER, "owner", {"role": "owner", "closed": ["s3://owners/client-10", FEDERATION]}),
        ("client", FEDERATION, "federation", {"role": "federation", "client": "client-1", "neighbours": ["client-10"]}),
        ("trainer", FEDERATION, "federation", {"role": "trainer", "neighbours": ["client-1"], "closed": [OWNER]}),
    ],
)
def test_the_least_policy_of_a_role_is_enough_and_reaches_no_further(
    findings: Any, identity: str, uri: str, whose: str, fields: dict[str, Any]
) -> None:
    found = findings(identity, uri, whose, **fields)
    assert wrong(found) == {}
    assert found["reach"].state is State.FINE


def test_keys_that_reach_further_than_their_role_are_refused(findings: Any) -> None:
    """A star for the uid of a job lets client-1 into the prefix of client-10."""
    fields = {"role": "federation", "client": "client-1", "neighbours": ["client-10"]}
    starred = findings("starred", FEDERATION, "federation", **fields)
    assert wrong(starred) == {"reach": 78}
    assert "clients/client-10/clients/client-1/" in starred["reach"].found
    assert "list/read client-10's prefix" in starred["reading reach"].found
    owner = findings("administrator", OWNER, "owner", role="owner", closed=["s3://spoiled/other"])
    assert wrong(owner) == {"reach": 77}
    assert "s3://spoiled/other" in owner["reach"].found and "client-10/" in owner["reach"].found


@pytest.mark.parametrize(
    ("settings", "uri", "expected"),
    [
        ({"AWS_ENDPOINT_URL": "http://127.0.0.1:1"}, FEDERATION, {"endpoint": 69}),
        ({"AWS_ALLOW_HTTP": "false"}, FEDERATION, {"transport": 78}),
        ({"AWS_ACCESS_KEY_ID": "unknown"}, FEDERATION, {"keys": 66}),
        ({"AWS_SECRET_ACCESS_KEY": "wrong"}, FEDERATION, {"keys": 66}),
        ({}, "s3://elsewhere/jobs", {"bucket": 66}),
    ],
)
def test_what_cannot_be_reached_is_said_and_ends_the_questions(
    findings: Any, server: Weed, settings: Headers, uri: str, expected: dict[str, int]
) -> None:
    found = findings("administrator", uri, "owner", settings=settings)
    assert wrong(found) == expected
    assert "create if absent" not in found
    secret = server.environment("administrator")["AWS_SECRET_ACCESS_KEY"]
    assert not any(secret in str(finding) for finding in found.values())


def test_the_endpoint_that_was_named_comes_before_the_environments(findings: Any, server: Weed) -> None:
    settings = {"AWS_ENDPOINT_URL": "http://127.0.0.1:1"}
    found = findings("administrator", FEDERATION, "owner", settings=settings, endpoint=server.endpoint)
    assert wrong(found) == {} and found["endpoint"].found == server.endpoint


def test_a_public_bucket_is_refused_whatever_opens_it(findings: Any, server: Weed) -> None:
    statement = {"Effect": "Allow", "Principal": "*", "Action": ["s3:GetObject"], "Resource": "arn:aws:s3:::spoiled/*"}
    policy = json.dumps({"Version": "2012-10-17", "Statement": [statement]})
    server.client().put_bucket_policy(Bucket="spoiled", Policy=policy)
    try:
        found = findings("administrator", "s3://spoiled/x")
    finally:
        server.client().delete_bucket_policy(Bucket="spoiled")
    assert wrong(found)["public access"] == 77
    assert "read" in found["public access"].found and "write" not in found["public access"].found


def test_settings_that_would_lose_or_keep_too_much_are_named(findings: Any, server: Weed) -> None:
    client = server.client()
    rule = {"ID": "tidy", "Status": "Enabled", "Filter": {"Prefix": "x/"}, "Expiration": {"Days": 30}}
    client.put_bucket_lifecycle_configuration(Bucket="spoiled", LifecycleConfiguration={"Rules": [rule]})
    client.put_bucket_versioning(Bucket="spoiled", VersioningConfiguration={"Status": "Enabled"})
    try:
        owners, federations = (
            findings("administrator", "s3://spoiled/x", "owner"),
            findings("administrator", "s3://spoiled/x"),
        )
        kept = client.list_object_versions(Bucket="spoiled")
    finally:
        client.delete_bucket_lifecycle(Bucket="spoiled")
        client.put_bucket_versioning(Bucket="spoiled", VersioningConfiguration={"Status": "Suspended"})
    assert wrong(owners) == {"lifecycle": 78} and "tidy" in owners["lifecycle"].found
    assert owners["versioning"].state is State.WARNING and "live on" in owners["versioning"].advice
    assert federations["versioning"].state is State.FINE
    assert "Versions" not in kept and "DeleteMarkers" not in kept  # probes leave no versions either


# ---- A server that is spoiled ------------------------------------------------------------------------------------


class Spoiled(BaseHTTPRequestHandler):
    """Passes everything on to a server, but for what `instead` carries out itself and `response` changes."""

    protocol_version = "HTTP/1.1"
    upstream: str
    instead: Callable[[str, str, Headers, bytes], bool]
    response: Callable[[str, Headers, bytes], bytes]

    def do_GET(self) -> None:
        headers = dict(self.headers.items())
        body = self.rfile.read(int(headers.get("Content-Length") or headers.get("content-length") or 0))
        if type(self).instead(self.command, self.path, headers, body):
            self._answer(200, {"ETag": '"-"'}, b"")
            return
        connection = http.client.HTTPConnection(self.upstream)
        connection.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
        for name, value in headers.items():
            connection.putheader(name, value)
        connection.endheaders(body)
        answer = connection.getresponse()
        theirs, data = dict(answer.getheaders()), answer.read()
        connection.close()
        data = type(self).response(self.command, theirs, data)
        self._answer(answer.status, theirs, data)

    do_PUT = do_POST = do_DELETE = do_HEAD = do_GET

    def _answer(self, status: int, headers: Headers, data: bytes) -> None:
        self.send_response_only(status)
        for name, value in headers.items():
            if name.lower() not in {"content-length", "connection", "transfer-encoding"}:
                self.send_header(name, value)
        self.send_header(
            "Content-Length", headers.get("Content-Length", "0") if self.command == "HEAD" else str(len(data))
        )
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, *_: object) -> None: ...


def _nothing(*_: object) -> bool:
    return False


def _unchanged(_: str, __: Headers, data: bytes) -> bytes:
    return data


@contextmanager
def spoiled(
    server: Weed,
    instead: Callable[[str, str, Headers, bytes], bool] = _nothing,
    response: Callable[[str, Headers, bytes], bytes] = _unchanged,
) -> Iterator[Headers]:
    """What AWS_… must say to meet the server through the proxy."""
    kind = type("Proxy", (Spoiled,), {"upstream": urlsplit(server.endpoint).netloc})
    kind.instead, kind.response = staticmethod(instead), staticmethod(response)
    with ThreadingHTTPServer(("127.0.0.1", 0), kind) as proxy:
        Thread(target=proxy.serve_forever, daemon=True).start()
        yield {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{proxy.server_port}"}
        proxy.shutdown()


def without_condition(server: Weed) -> Callable[[str, str, Headers, bytes], bool]:
    """Creates become plain puts, with a signature of the administrator's own: obstore signs the condition as well."""
    client = server.client()

    def put(method: str, path: str, headers: Headers, body: bytes) -> bool:
        if method != "PUT" or "if-none-match" not in {name.lower() for name in headers}:
            return False
        bucket, _, key = path.lstrip("/").partition("/")
        client.put_object(Bucket=bucket, Key=key, Body=body)
        return True

    return put


def change_a_byte(method: str, headers: Headers, data: bytes) -> bytes:
    return data[:-1] + bytes([data[-1] ^ 1]) if method == "GET" and len(data) > 1 << 20 else data


def at(distance: timedelta) -> Callable[[str, Headers, bytes], bytes]:
    def date(_: str, headers: Headers, data: bytes) -> bytes:
        headers["Date"] = format_datetime(datetime.now(UTC) + distance, usegmt=True)
        return data

    return date


def test_a_proxy_that_changes_nothing_is_not_noticed(findings: Any, server: Weed) -> None:
    with spoiled(server) as settings:
        assert wrong(findings("administrator", FEDERATION, settings=settings)) == {}


def test_a_store_that_ignores_if_none_match_is_refused(findings: Any, server: Weed) -> None:
    with spoiled(server, instead=without_condition(server)) as settings:
        found = findings("administrator", FEDERATION, settings=settings)
    assert wrong(found) == {"create if absent": 77}
    assert "second create went through" in found["create if absent"].found


def test_a_store_that_gives_other_bytes_back_is_noticed(findings: Any, server: Weed) -> None:
    with spoiled(server, response=change_a_byte) as settings:
        found = findings("administrator", FEDERATION, settings=settings)
    assert wrong(found) == {"put, get, list, delete": 74}


def test_clocks_that_differ_are_noticed(findings: Any, server: Weed) -> None:
    with spoiled(server, response=at(timedelta(minutes=10))) as settings:
        found = findings("administrator", FEDERATION, settings=settings)
    assert wrong(found) == {"clock": 78}


@pytest.mark.parametrize(
    ("seconds", "state"), [(0, "fine"), (30, "fine"), (32, "warning"), (300, "warning"), (302, "failed")]
)
@pytest.mark.parametrize("sign", [-1, 1])
def test_clocks_are_compared_to_the_second_that_a_date_header_has(seconds: int, state: str, sign: int) -> None:
    now = datetime(2026, 1, 1, tzinfo=UTC)
    assert clock(now + timedelta(seconds=sign * seconds), now).state == state


@pytest.mark.parametrize(
    ("what", "rule", "prefix", "harms"),
    [
        ("everything expires", {"Expiration": {"Days": 1}}, "jobs/", True),
        ("our prefix expires", {"Filter": {"Prefix": "jobs/"}, "Expiration": {"Days": 1}}, "jobs/", True),
        ("a part of it expires", {"Filter": {"Prefix": "jobs/x/"}, "Expiration": {"Days": 1}}, "jobs/", True),
        ("what holds it expires", {"Prefix": "j", "Expiration": {"Date": "2030-01-01"}}, "jobs/", True),
        ("large objects of it expire",
         {"Filter": {"And": {"Prefix": "j", "ObjectSizeGreaterThan": 9}}, "Expiration": {"Days": 1}}, "jobs/", True),
        ("it moves to an archive", {"Transitions": [{"Days": 1, "StorageClass": "GLACIER"}]}, "", True),
        ("what lies beside expires", {"Filter": {"Prefix": "logs/"}, "Expiration": {"Days": 1}}, "jobs/", False),
        ("tagged objects expire",
         {"Filter": {"Tag": {"Key": "a", "Value": "b"}}, "Expiration": {"Days": 1}}, "jobs/", False),
        ("old versions expire", {"NoncurrentVersionExpiration": {"NoncurrentDays": 1}}, "jobs/", False),
        ("uploads are ended", {"AbortIncompleteMultipartUpload": {"DaysAfterInitiation": 1}}, "jobs/", False),
        ("markers are tidied", {"Expiration": {"ExpiredObjectDeleteMarker": True}}, "jobs/", False),
    ],
)  # fmt: skip
def test_rules_that_delete_or_move_objects_are_told_from_those_that_tidy(
    what: str, rule: dict[str, Any], prefix: str, harms: bool
) -> None:
    assert (_harm(rule, prefix) is not None) == harms, what
