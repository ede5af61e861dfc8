import contextlib
import errno
import hashlib
import itertools
import os
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Literal
from urllib.parse import parse_qs, urlparse

import pytest

from feddiff_protocol.errors import (
    ConfigurationInvalid,
    DataInvalid,
    FeddiffError,
    InputMissing,
    OutputFailed,
    PrivacyRefusal,
    StorageFailed,
    StoreUnavailable,
)
from feddiff_trainer import stores
from feddiff_trainer.stores import FolderStore, Store, check_creates_once, open_store, read_hashed


class S3Handler(BaseHTTPRequestHandler):
    """As much of S3 as the store needs: one bucket in a dictionary."""

    objects: dict[str, bytes]
    honours_conditions: bool
    status: int | None

    def do_PUT(self) -> None:
        data = self.rfile.read(int(self.headers["Content-Length"]))
        key = urlparse(self.path).path
        if self.headers.get("If-None-Match") == "*" and key in self.objects and self.honours_conditions:
            return self.answer(412)
        self.objects[key] = data
        return self.answer(200)

    def do_GET(self) -> None:
        url = urlparse(self.path)
        if "list-type" in parse_qs(url.query):
            return self.answer(200, self.listing(url.path.rstrip("/"), parse_qs(url.query)["prefix"][0]))
        if url.path not in self.objects:
            return self.answer(404)
        return self.answer(200, self.objects[url.path])

    do_HEAD = do_GET

    def do_POST(self) -> None:
        assert "delete" in parse_qs(urlparse(self.path).query, keep_blank_values=True)
        request = self.rfile.read(int(self.headers["Content-Length"])).decode()
        keys = re.findall("<Key>(.*?)</Key>", request)
        for key in keys:
            self.objects.pop(f"{urlparse(self.path).path}/{key}", None)
        deleted = "".join(f"<Deleted><Key>{key}</Key></Deleted>" for key in keys)
        self.answer(200, f"<DeleteResult>{deleted}</DeleteResult>".encode())

    def listing(self, bucket: str, prefix: str) -> bytes:
        keys = [key.removeprefix(f"{bucket}/") for key in self.objects]
        entries = "".join(
            f"<Contents><Key>{key}</Key><LastModified>2026-01-01T00:00:00.000Z</LastModified>"
            f'<ETag>"e"</ETag><Size>1</Size></Contents>'
            for key in keys
            if key.startswith(prefix)
        )
        return f"<ListBucketResult><IsTruncated>false</IsTruncated>{entries}</ListBucketResult>".encode()

    def answer(self, status: int, body: bytes = b"") -> None:
        status = self.status or status
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", '"e"')
        self.send_header("Last-Modified", "Thu, 01 Jan 2026 00:00:00 GMT")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[S3Handler]]:
    handler = type("Handler", (S3Handler,), {"objects": {}, "honours_conditions": True, "status": None})
    with served(handler, monkeypatch):
        yield handler


@contextlib.contextmanager
def served(handler: type[S3Handler], monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    environment = {"ENDPOINT_URL": f"http://127.0.0.1:{server.server_port}", "ALLOW_HTTP": "true", "REGION": "here"}
    for name, value in (environment | {"SKIP_SIGNATURE": "true"}).items():
        monkeypatch.setenv(f"AWS_{name}", value)
    yield
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(params=["file", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    if request.param == "file":
        return open_store(f"file://{tmp_path}/a folder/below")
    request.getfixturevalue("bucket")
    return open_store("s3://bucket/prefix")


def test_object_comes_back_as_it_went_in(store: Store) -> None:
    store.put("a/b", b"first")
    store.put("a/b", b"second")
    assert store.get("a/b") == b"".join(store.stream("a/b")) == b"second"
    assert store.exists("a/b")
    store.delete("a/b")
    store.delete("a/b")
    assert not store.exists("a/b")


def test_create_is_told_true_once_and_keeps_the_first(store: Store) -> None:
    assert store.create("a/b", b"first") is True
    assert store.create("a/b", b"second") is False
    assert store.get("a/b") == b"first"


def test_object_comes_with_its_hash_and_none_is_read_beyond_what_is_expected(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, pieces = bytes(range(200)) * 20_000, list[int]()  # several pieces
    store.put("a/b", data)
    assert read_hashed(store, "a/b", len(data)) == (data, hashlib.sha256(data).hexdigest())
    stream = store.stream
    monkeypatch.setattr(store, "stream", lambda key: (pieces.append(len(each)) or each for each in stream(key)))
    with pytest.raises(DataInvalid, match="a/b: expected at most 5 bytes, found more"):
        read_hashed(store, "a/b", 5)
    assert len(pieces) == 1


def test_list_stops_at_the_slash(store: Store) -> None:
    for key in ("clients/client1/b", "clients/client1/a/x", "clients/client10/c", "other"):
        store.put(key, b"x")
    assert store.list("clients/client1/") == ["clients/client1/a/x", "clients/client1/b"]
    assert store.list("nothing/") == []


def test_absent_object_is_input_missing(store: Store) -> None:
    with pytest.raises(InputMissing, match="nothing/here"):
        store.get("nothing/here")
    with pytest.raises(InputMissing, match="nothing/here"):
        list(store.stream("nothing/here"))
    assert not store.exists("nothing/here")


@pytest.mark.parametrize(
    "key",
    ["", "/a", "a/", "a//b", "..", "a/../b", "a/./b", "a\\b", ".hidden", "a/.b", "a b", "a\0", "a\n", "ü", "x" * 600],
)
def test_key_that_could_leave_the_store_is_refused(tmp_path: Path, key: str) -> None:
    store = open_store(f"file://{tmp_path}/root")
    operations = (
        store.get,
        store.exists,
        store.delete,
        lambda key: store.put(key, b""),
        lambda k: store.create(k, b""),
    )
    for operation in operations:
        with pytest.raises(StorageFailed, match="object key"):
            operation(key)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("uri", ["gs://bucket", "file://relative", "/folder", "file:///a\0b", ""])
def test_address_of_no_known_store_is_refused(uri: str) -> None:
    with pytest.raises(ConfigurationInvalid, match="expected"):
        open_store(uri)


def test_store_that_creates_once_passes_the_probe_and_keeps_nothing(store: Store) -> None:
    check_creates_once(store, "a/")
    assert store.list("a/") == []


def test_store_that_ignores_create_if_absent_is_refused(bucket: type[S3Handler]) -> None:
    bucket.honours_conditions = False
    with pytest.raises(PrivacyRefusal, match="created once"):
        check_creates_once(open_store("s3://bucket/prefix"), "a/")
    assert bucket.objects == {}


@pytest.mark.parametrize(
    ("status", "reading", "writing"),
    [(403, InputMissing, OutputFailed), (401, InputMissing, OutputFailed), (400, StoreUnavailable, StoreUnavailable)],
)
def test_answer_of_a_bucket_becomes_an_error_of_the_tree(
    bucket: type[S3Handler], status: int, reading: type[FeddiffError], writing: type[FeddiffError]
) -> None:
    bucket.status = status
    store = open_store("s3://bucket/prefix")
    with pytest.raises(reading) as read:
        store.get("a")
    with pytest.raises(writing) as written:
        store.create("a", b"")
    assert "\n" not in f"{read.value}{written.value}"


def test_bucket_that_is_not_there_is_unavailable(monkeypatch: pytest.MonkeyPatch, bucket: type[S3Handler]) -> None:
    monkeypatch.setattr(stores, "BUCKET_PATIENCE_SECONDS", 0)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    with pytest.raises(StoreUnavailable, match="does not answer"):
        open_store("s3://bucket/prefix").get("a")


@pytest.mark.parametrize(("seconds", "is_told"), [(30.0, False), (0.0, True)])
def test_an_outage_is_told_only_when_it_lasts_longer_than_patience(
    monkeypatch: pytest.MonkeyPatch, bucket: type[S3Handler], seconds: float, is_told: bool
) -> None:
    tries = itertools.count(1)

    class Restarting(bucket):  # type: ignore[valid-type, misc]
        def answer(self, status: int, body: bytes = b"") -> None:
            super().answer(503 if next(tries) < 20 else status, body)

    monkeypatch.setattr(stores, "BUCKET_PATIENCE_SECONDS", seconds)
    monkeypatch.setattr(stores, "BUCKET_PAUSE_SECONDS", 0.001)
    with served(Restarting, monkeypatch), pytest.raises(StoreUnavailable) if is_told else contextlib.nullcontext():
        open_store("s3://bucket/prefix").put("a", b"data")
    assert next(tries) == (2 if is_told else 21)


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        (errno.ENOSPC, StorageFailed),  # room comes back, so it is tried again
        (errno.EROFS, OutputFailed),
        (errno.EACCES, OutputFailed),
        (errno.EDQUOT, StorageFailed),
        (errno.EIO, StorageFailed),
    ],
)
def test_failed_write_leaves_nothing_and_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, expected: type[FeddiffError]
) -> None:
    store = open_store(f"file://{tmp_path}")

    def fail(descriptor: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(stores.os, "fsync", fail)
    for write in (store.put, store.create):
        with pytest.raises(expected, match=os.strerror(code)):
            write("a/b", b"data")
    monkeypatch.undo()
    assert store.list("a/") == []
    assert list((tmp_path / "a").iterdir()) == []


def test_file_where_a_folder_should_be_is_output_failed(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("a file")
    store = open_store(f"file://{tmp_path}")
    with pytest.raises(OutputFailed):
        store.create("a/b", b"data")
    with pytest.raises(InputMissing):
        store.get("a/b")


def events_of(write: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is synced and named, in order, while an object is written into a store that is not there yet."""
    events: list[str] = []
    sync, link, replace = os.fsync, os.link, os.replace

    def watched_sync(descriptor: int) -> None:
        target = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        events.append("file" if target.is_file() else str(target.relative_to(folder)))
        sync(descriptor)

    monkeypatch.setattr(stores.os, "fsync", watched_sync)
    monkeypatch.setattr(stores.os, "link", lambda *paths: (events.append("name"), link(*paths)))
    monkeypatch.setattr(stores.os, "replace", lambda *paths: (events.append("name"), replace(*paths)))
    getattr(open_store(f"file://{folder}/root"), write)("a/b", b"data")
    return events


DURABLE = ["file", "name", "root/a", "root", "."]


@pytest.mark.parametrize("write", ["put", "create"])
def test_bytes_are_on_the_disk_before_the_name_and_the_name_before_the_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: str
) -> None:
    assert events_of(write, tmp_path, monkeypatch) == DURABLE


@pytest.mark.parametrize("omitted", ["_write_durably", "sync_folder"])
def test_mutant_that_does_not_sync_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, omitted: str) -> None:
    unsynced = {"_write_durably": Path.write_bytes, "sync_folder": lambda folder: None}
    monkeypatch.setattr(stores, omitted, unsynced[omitted])
    assert events_of("create", tmp_path, monkeypatch) != DURABLE


@pytest.mark.parametrize("write", ["put", "create"])
def test_create_that_lost_has_made_the_winners_object_durable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: str
) -> None:
    getattr(open_store(f"file://{tmp_path}/root"), write)("a/b", b"first")
    assert events_of("create", tmp_path, monkeypatch)[-3:] == ["root/a", "root", "."]


def test_of_many_racing_creates_one_is_told_true(tmp_path: Path) -> None:
    store = open_store(f"file://{tmp_path}")
    start = threading.Barrier(8, timeout=60)
    answers: list[tuple[bool, bytes]] = []

    def race(number: int) -> None:
        start.wait()
        answers.append((store.create("a/b", bytes([number])), bytes([number])))

    threads = [threading.Thread(target=race, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [data for won, data in answers if won] == [store.get("a/b")]
    assert store.list("a/") == ["a/b"]


def test_large_object_is_written_whole(tmp_path: Path) -> None:
    data = os.urandom(1 << 20)
    store = open_store(f"file://{tmp_path}")
    store.put("big", data)
    assert store.get("big") == data


# ---- Whose settings ----------------------------------------------------------------------------------------------


def settings_seen(monkeypatch: pytest.MonkeyPatch, whose: Literal["owner", "federation"] | None) -> dict[str, str]:
    """What of the environment a bucket is opened with."""
    seen: dict[str, str] = {}

    def remember(uri: str) -> Store:
        names = ("AWS_REGION", "AWS_ACCESS_KEY_ID", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL")
        seen.update({name: value for name in names if (value := os.environ.get(name))})
        return FolderStore("file:///nowhere")

    monkeypatch.setattr(stores, "BucketStore", remember)
    open_store("s3://bucket/prefix", whose)
    return seen


def test_each_store_is_opened_with_its_own_settings_before_common_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    common = {"AWS_REGION": "here", "AWS_ACCESS_KEY_ID": "common", "AWS_SESSION_TOKEN": "of the common key"}
    for name, value in (
        common | {"OWNER_AWS_ACCESS_KEY_ID": "owner", "FEDERATION_AWS_ENDPOINT_URL": "http://federation"}
    ).items():
        monkeypatch.setenv(name, value)
    before = dict(os.environ)
    assert settings_seen(monkeypatch, None) == common
    assert settings_seen(monkeypatch, "owner") == {"AWS_REGION": "here", "AWS_ACCESS_KEY_ID": "owner"}
    assert settings_seen(monkeypatch, "federation") == common | {"AWS_ENDPOINT_URL": "http://federation"}
    assert dict(os.environ) == before


def test_a_bucket_is_reached_by_the_owners_settings(monkeypatch: pytest.MonkeyPatch, bucket: type[S3Handler]) -> None:
    monkeypatch.setenv("OWNER_AWS_ENDPOINT_URL", os.environ["AWS_ENDPOINT_URL"])
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    open_store("s3://bucket/prefix", "owner").put("a", b"data")
    assert open_store("s3://bucket/prefix", "owner").get("a") == b"data"
    monkeypatch.setattr(stores, "BUCKET_PATIENCE_SECONDS", 0)
    with pytest.raises(StoreUnavailable):
        open_store("s3://bucket/prefix", "federation").get("a")
