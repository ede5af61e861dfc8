"""What passes through the gate is what the S3 server would have answered, and every write is noted."""

import hashlib
import threading
from collections.abc import Iterator

import pytest

from cluster.gate import Gate, Write
from cluster.weed import Weed
from feddiff_protocol.errors import StoreUnavailable
from feddiff_trainer import stores
from feddiff_trainer.stores import Store, open_store

SEAL = "/owner/feddiff/releases/r/seal.json"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Weed]:
    with Weed(tmp_path_factory.mktemp("s3"), {}, ["owner"]) as server:
        yield server


@pytest.fixture
def gate(server: Weed) -> Iterator[Gate]:
    with Gate(server.endpoint, "127.0.0.1") as gate:
        yield gate


@pytest.fixture
def store(server: Weed, gate: Gate, monkeypatch: pytest.MonkeyPatch) -> Store:
    monkeypatch.setattr(stores, "BUCKET_PATIENCE_SECONDS", 0)
    for name, value in (server.environment("administrator") | {"AWS_ENDPOINT_URL": gate.endpoint}).items():
        monkeypatch.setenv(name, value)
    return open_store("s3://owner/feddiff")


def written(data: bytes, status: int | None, path: str = SEAL) -> Write:
    return Write(path, hashlib.sha256(data).hexdigest(), status)


def test_a_store_behind_the_gate_is_a_store(store: Store, gate: Gate) -> None:
    for data in (b"first", b"", bytes(range(256)) * 5000):
        store.put("a/b", data)
        assert store.get("a/b") == b"".join(store.stream("a/b")) == data
    assert (store.exists("a/b"), store.exists("a/c"), store.list("a/")) == (True, False, ["a/b"])
    assert (store.create("a/c", b"one"), store.create("a/c", b"two"), store.get("a/c")) == (True, False, b"one")
    for key in ("a/b", "a/c"):
        store.delete(key)
    assert store.list("a/") == []
    assert gate.writes[-2:] == [written(b"one", 200, "/owner/feddiff/a/c"), written(b"two", 412, "/owner/feddiff/a/c")]


@pytest.mark.parametrize("answered", [False, True])
def test_a_held_request_comes_late_and_others_pass(store: Store, gate: Gate, answered: bool) -> None:
    held, told = gate.hold("PUT .*/seal.json", answered=answered), []
    author = threading.Thread(target=lambda: told.append(store.create("releases/r/seal.json", b"mine")))
    author.start()
    assert held.wait(10) and not held.wait(0, num=2)
    assert store.exists("releases/r/seal.json") == answered
    assert store.create("releases/r/seal.json", b"theirs") == (not answered)
    assert told == []
    held.let_go()
    author.join()
    assert told == [answered]
    assert set(gate.writes) >= {
        written(b"mine", 200 if answered else 412),
        written(b"theirs", 412 if answered else 200),
    }
    store.delete("releases/r/seal.json")


def test_a_write_that_found_no_server_is_noted_too(server: Weed, store: Store, gate: Gate) -> None:
    server.stop()
    with pytest.raises(StoreUnavailable):
        store.put("releases/r/seal.json", b"lost")
    server.start()
    assert gate.writes == [written(b"lost", None)]
