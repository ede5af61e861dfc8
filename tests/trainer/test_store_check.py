"""What any store must do, asked of folders and of broken stores in memory; each broken one must be noticed."""

import json
import sys
import threading
from pathlib import Path

import pytest

from feddiff_protocol.errors import InputMissing, StorageFailed
from feddiff_trainer import store_check
from feddiff_trainer.store_check import check_store, filesystem_of
from feddiff_trainer.store_probes import Finding, State, StoreCheckSpec, behaviour

PREFIX = "releases/probe-x/"


class MemoryStore:
    """A store that does what it must."""

    uri = "file:///memory"

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}

    def get(self, key: str) -> bytes:
        if key not in self.objects:
            raise InputMissing(f"{key}: none")
        return self.objects[key]

    def put(self, key: str, data: bytes) -> None:
        self.objects[key] = data

    def create(self, key: str, data: bytes) -> bool:
        return self.objects.setdefault(key, data) is data

    def exists(self, key: str) -> bool:
        return key in self.objects

    def list(self, prefix: str) -> list[str]:
        return sorted(key for key in self.objects if key.startswith(prefix))

    def delete(self, key: str) -> None:
        self.objects.pop(key, None)


class IgnoresTheCondition(MemoryStore):
    def create(self, key: str, data: bytes) -> bool:
        self.put(key, data)
        return True


class ReplacesButSaysNo(MemoryStore):
    def create(self, key: str, data: bytes) -> bool:
        first = key not in self.objects
        self.put(key, data)
        return first


class LooksBeforeItWrites(MemoryStore):
    """Right as long as one writes at a time: two that look at one moment both see nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.looked = threading.Barrier(2)

    def create(self, key: str, data: bytes) -> bool:
        if key in self.objects:
            return False
        try:
            self.looked.wait(timeout=0.5)
        except threading.BrokenBarrierError:
            self.looked.reset()
        self.put(key, data)
        return True


class RemembersTheDeleted(MemoryStore):
    def __init__(self) -> None:
        super().__init__()
        self.ever: set[str] = set()

    def create(self, key: str, data: bytes) -> bool:
        if key in self.ever:
            return False
        self.ever.add(key)
        self.put(key, data)
        return True


class ChangesBytes(MemoryStore):
    def get(self, key: str) -> bytes:
        return super().get(key)[::-1]


class ListsLate(MemoryStore):
    def list(self, prefix: str) -> list[str]:
        return []


class ForbidsReading(MemoryStore):
    def get(self, key: str) -> bytes:
        raise InputMissing(f"{key}: AccessDenied")


class KeepsAll(MemoryStore):
    def delete(self, key: str) -> None:
        pass


class CannotDelete(MemoryStore):
    def delete(self, key: str) -> None:
        raise StorageFailed(f"{key}: AccessDenied")


def asked(store: MemoryStore) -> dict[str, Finding]:
    return {each.check: each for each in behaviour(StoreCheckSpec(uri=store.uri), store, PREFIX)}


def test_a_store_that_does_what_it_must_is_fine_and_left_empty() -> None:
    store = MemoryStore()
    assert {each.state for each in asked(store).values()} == {State.FINE}
    assert store.objects == {}


@pytest.mark.parametrize(
    ("broken", "check", "exit_code", "words"),
    [
        (IgnoresTheCondition, "create if absent", 77, "second create went through"),
        (ReplacesButSaysNo, "create if absent", 77, "second create went through"),
        (LooksBeforeItWrites, "create if absent", 77, "2 winners of a race of two"),
        (RemembersTheDeleted, "create if absent", 77, "could not be created again"),
        (ChangesBytes, "put, get, list, delete", 74, "other bytes"),
        (ListsLate, "put, get, list, delete", 74, "without what was just put"),
        (KeepsAll, "put, get, list, delete", 74, "with what was just deleted"),
        (ForbidsReading, "put, get, list, delete", 66, "AccessDenied"),
        (CannotDelete, "put, get, list, delete", 74, "AccessDenied"),
    ],
)
def test_a_store_that_does_not_is_refused(broken: type[MemoryStore], check: str, exit_code: int, words: str) -> None:
    found = asked(broken())[check]
    assert (found.state, found.exit_code) == (State.FAILED, exit_code)
    assert words in found.found


def test_a_probe_that_cannot_be_deleted_is_named() -> None:
    assert PREFIX in asked(CannotDelete())["cleaning up"].found


def test_a_folder_is_checked_and_left_as_it_was(tmp_path: Path) -> None:
    tmp_path.chmod(0o700)
    (tmp_path / "releases").mkdir()
    found = {each.check: each for each in check_store(StoreCheckSpec(uri=tmp_path.as_uri(), whose="owner"))}
    assert {each.exit_code for each in found.values()} == {0}
    assert found["permissions"].state is State.FINE
    assert [str(each.relative_to(tmp_path)) for each in tmp_path.rglob("*")] == ["releases"]


def test_an_owners_folder_that_others_may_enter_is_a_warning(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    found = {each.check: each for each in check_store(StoreCheckSpec(uri=tmp_path.as_uri(), whose="owner"))}
    assert found["permissions"].state is State.WARNING and "chmod 700" in found["permissions"].advice


def test_a_folder_that_is_not_there_is_not_made(tmp_path: Path) -> None:
    (found,) = check_store(StoreCheckSpec(uri=(tmp_path / "none").as_uri()))
    assert found.exit_code == 66 and not (tmp_path / "none").exists()


def test_the_file_system_is_that_of_the_closest_mount() -> None:
    mounts = "/dev/a / ext4 rw 0 0\nserver:/x /srv nfs4 rw 0 0\nnone /srv/quick tmpfs rw 0 0\nx /a\\040b xfs rw 0 0\n"
    kinds = {path: filesystem_of(Path(path), mounts) for path in ("/srv/store", "/srv/quick/x", "/home", "/a b/c")}
    assert kinds == {"/srv/store": "nfs4", "/srv/quick/x": "tmpfs", "/home": "ext4", "/a b/c": "xfs"}
    assert filesystem_of(Path("/srv"), "") == "unknown"


@pytest.mark.parametrize(
    ("kind", "state"), [("ext4", "fine"), ("nfs4", "warning"), ("tmpfs", "warning"), ("fuse.x", "warning")]
)
def test_memory_and_networks_are_warned_of(
    kind: str, state: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mounts").write_text(f"x / {kind} rw 0 0\n")
    monkeypatch.setattr(store_check, "MOUNTS", tmp_path / "mounts")
    found = {each.check: each for each in check_store(StoreCheckSpec(uri=tmp_path.as_uri()))}
    assert found["folder"].state == state


def test_the_process_answers_in_json_and_says_in_one_line_what_is_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "spec.json"
    monkeypatch.setattr(sys, "argv", ["store_check", str(path)])
    path.write_text(json.dumps({"uri": tmp_path.as_uri()}))
    assert store_check.main() == 0
    assert {each["state"] for each in json.loads(capsys.readouterr().out)["findings"]} <= {"fine", "warning"}
    path.write_text(json.dumps({"uri": "ftp://x"}))
    assert store_check.main() == 65
    assert len(capsys.readouterr().err.splitlines()) == 1
