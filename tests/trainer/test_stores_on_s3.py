"""Buckets of a real S3 server, SeaweedFS, and what its answers become."""

import hashlib
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from botocore.exceptions import ClientError

from cluster.weed import Weed
from feddiff_protocol.errors import DataInvalid, FeddiffError, InputMissing
from feddiff_trainer.stores import Store, check_creates_once, open_store, read_hashed

URI = "s3://federation/jobs"
CLIENTS = ("client1", "client10")
NUM_WRITERS = 8
# A writer in a process of its own: it waits at the line, creates, and says whether it was the first.
WRITER = """
import sys
from feddiff_trainer.stores import open_store
store = open_store(sys.argv[1])
store.exists("anything")  # connected
print("ready", flush=True)
sys.stdin.readline()
print(store.create("race/seal.json", sys.argv[2].encode() * 10_000))
"""
# A stage as far as its store: what the store answers becomes its exit code.
STAGE = """
import sys
from feddiff_protocol.errors import FeddiffError
from feddiff_trainer import stores
from feddiff_trainer.stores import open_store
stores.BUCKET_PATIENCE_SECONDS = 0
try:
    getattr(open_store(sys.argv[1], "owner"), sys.argv[2])(*sys.argv[3:4], *(each.encode() for each in sys.argv[4:]))
except FeddiffError as error:
    print(error, file=sys.stderr)
    sys.exit(error.exit_code)
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Weed]:
    may = {
        client: [f"Write:federation/jobs/*/clients/{client}/*", "Read:federation", "List:federation"]
        for client in CLIENTS
    }
    with Weed(tmp_path_factory.mktemp("s3"), may, ["federation"]) as server:
        yield server


@pytest.fixture
def store(server: Weed, monkeypatch: pytest.MonkeyPatch) -> Store:
    for name, value in server.environment("administrator").items():
        monkeypatch.setenv(name, value)
    return open_store(URI)


def as_client(server: Weed, client: str, monkeypatch: pytest.MonkeyPatch) -> Store:
    for name, value in server.environment(client).items():
        monkeypatch.setenv(f"FEDERATION_{name}", value)
    return open_store(URI, "federation")


def test_objects_are_put_replaced_listed_and_deleted(store: Store, server: Weed) -> None:
    large = os.urandom(6 << 20)  # more than one part of an upload
    for key, data in {"a/b": b"first", "a/c/d": b"", "ab": large}.items():
        store.put(key, data)
    store.put("a/b", b"second")
    assert (store.get("a/b"), store.get("a/c/d"), store.get("ab")) == (b"second", b"", large)
    assert b"".join(store.stream("ab")) == large and list(store.stream("a/c/d")) == []
    assert read_hashed(store, "ab", len(large)) == (large, hashlib.sha256(large).hexdigest())
    with pytest.raises(DataInvalid, match="ab: expected at most 1000 bytes, found more"):
        read_hashed(store, "ab", 1000)
    with pytest.raises(InputMissing):
        list(store.stream("never/there"))
    assert store.list("a/") == ["a/b", "a/c/d"]
    assert server.client().get_object(Bucket="federation", Key="jobs/a/b")["Body"].read() == b"second"
    for key in ("a/b", "a/c/d", "ab", "never/there"):
        store.delete(key)
    assert store.list("a/") == []
    assert not store.exists("a/b")


def test_a_list_is_whole_beyond_one_page(store: Store) -> None:
    keys = [f"many/{number:04}" for number in range(1001)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda key: store.put(key, b"-"), keys))
    assert store.list("many/") == keys


def test_of_racing_processes_one_creates_and_all_read_what_it_wrote(store: Store) -> None:
    writers = [
        subprocess.Popen([sys.executable, "-c", WRITER, URI, str(n)], stdin=-1, stdout=-1, text=True)
        for n in range(NUM_WRITERS)
    ]
    assert [writer.stdout.readline() for writer in writers if writer.stdout] == ["ready\n"] * NUM_WRITERS
    for writer in writers:
        assert writer.stdin
        writer.stdin.write("\n")
        writer.stdin.flush()
    answers = [writer.communicate()[0].strip() for writer in writers]
    assert sorted(answers) == ["False"] * (NUM_WRITERS - 1) + ["True"]
    assert store.get("race/seal.json") == str(answers.index("True")).encode() * 10_000


def test_a_plain_put_does_not_decide_a_race(store: Store) -> None:
    """What the test above would see if `create` sent no condition."""

    def create(number: int) -> bool:
        store.put("careless/seal.json", b"%d" % number)
        return True

    with ThreadPoolExecutor(NUM_WRITERS) as pool:
        assert sorted(pool.map(create, range(NUM_WRITERS))) != [False] * (NUM_WRITERS - 1) + [True]


def test_the_probe_passes_and_leaves_nothing(store: Store) -> None:
    check_creates_once(store, "probed/")
    assert store.list("probed/") == []


def test_a_client_writes_below_its_own_prefix_alone(server: Weed, monkeypatch: pytest.MonkeyPatch) -> None:
    others = as_client(server, "client10", monkeypatch)
    others.put("uid-1/clients/client10/manifest.json", b"theirs")
    own = as_client(server, "client1", monkeypatch)
    check_creates_once(own, "uid-1/clients/client1/")
    assert own.create("uid-1/clients/client1/manifest.json", b"own")
    assert own.list("uid-1/clients/client1/") == ["uid-1/clients/client1/manifest.json"]
    assert own.get("uid-1/clients/client10/manifest.json") == b"theirs"  # releases are the federation's to read
    for key in ("uid-1/clients/client10/manifest.json", "uid-1/clients/client10/new", "uid-1/shared/denoiser", "new"):
        for forbidden in (lambda key=key: own.put(key, b"-"), lambda key=key: own.create(key, b"-")):
            with pytest.raises(FeddiffError, match="who may use it") as refusal:
                forbidden()
            assert refusal.value.exit_code == 73
        with pytest.raises(FeddiffError, match="who may use it"):
            own.delete(key)
    assert others.get("uid-1/clients/client10/manifest.json") == b"theirs"


@pytest.mark.parametrize(
    ("what", "settings", "uri", "call", "code"),
    [
        ("an object that is not there", {}, URI, ("get", "never/there"), 66),
        ("a bucket that is not there, read", {}, "s3://elsewhere/jobs", ("get", "a"), 66),
        ("a bucket that is not there, written", {}, "s3://elsewhere/jobs", ("put", "a", "data"), 73),
        ("a bucket that is not there, listed", {}, "s3://elsewhere/jobs", ("list", "a/"), 66),
        ("a key that nobody knows, read", {"AWS_ACCESS_KEY_ID": "unknown"}, URI, ("get", "a"), 66),
        ("a key that nobody knows, written", {"AWS_ACCESS_KEY_ID": "unknown"}, URI, ("create", "a", "data"), 73),
        ("a wrong secret, read", {"AWS_SECRET_ACCESS_KEY": "wrong"}, URI, ("list", "a/"), 66),
        ("a wrong secret, written", {"AWS_SECRET_ACCESS_KEY": "wrong"}, URI, ("create", "a", "data"), 73),
        ("http that was not allowed", {"AWS_ALLOW_HTTP": "false"}, URI, ("get", "a"), 69),
        ("no server", {"AWS_ENDPOINT_URL": "http://127.0.0.1:1"}, URI, ("get", "a"), 69),
    ],
)
def test_what_the_server_answers_becomes_an_exit_code(
    server: Weed, what: str, settings: dict[str, str], uri: str, call: tuple[str, ...], code: int
) -> None:
    own = {f"OWNER_{name}": value for name, value in (server.environment("administrator") | settings).items()}
    clean = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
    done = subprocess.run([sys.executable, "-c", STAGE, uri, *call], env=clean | own, capture_output=True, text=True)
    assert done.returncode == code, (what, done.stderr)
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert server.environment("administrator")["AWS_SECRET_ACCESS_KEY"] not in done.stderr


def test_an_identity_that_may_read_alone_is_refused_by_the_server_itself(server: Weed) -> None:
    """The isolation above is the server's, whatever the client program: boto3 meets it as well."""
    with pytest.raises(ClientError, match="AccessDenied"):
        server.client("client1").put_object(Bucket="federation", Key="jobs/uid-1/clients/client10/x", Body=b"-")
