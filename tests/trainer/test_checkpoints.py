import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch
from structlog.testing import capture_logs
from torch import Tensor

from feddiff_protocol.errors import (
    DataInvalid,
    FeddiffError,
    InputMissing,
    OutputFailed,
    StorageFailed,
    StoreUnavailable,
)
from feddiff_trainer import checkpoints, stores
from feddiff_trainer.checkpoints import Checkpoint, Checkpoints, Saver, decode, encode
from feddiff_trainer.stores import FolderStore

RUN = "run/"


class Killed(BaseException):
    """Stands for SIGKILL: no `except Exception` tidies up after it."""


def a_checkpoint(step: int, other: int = 0) -> Checkpoint:
    generator = torch.Generator().manual_seed(step + other)
    tensors = {"model.weight": torch.randn(3, 4, generator=generator), "adam.step.weight": torch.tensor(float(step))}
    return Checkpoint(step, {"batch": "8"}, tensors)


def kept_in(folder: Path) -> Checkpoints:
    return Checkpoints(FolderStore(folder.as_uri()), RUN)


def saved_to(folder: Path, step: int) -> Path:
    """The file of a new checkpoint of a process that did nothing else."""
    return folder / kept_in(folder).save(a_checkpoint(step))


def steps_in(folder: Path) -> list[int]:
    return [int(path.name[:12]) for path in sorted((folder / RUN).iterdir()) if not path.name.startswith(".")]


def newest_step(kept: Checkpoints) -> int | None:
    checkpoint = kept.newest()
    return None if checkpoint is None else checkpoint.step


def flip_bit(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


def test_saved_checkpoint_comes_back_bit_for_bit(tmp_path: Path) -> None:
    saved = a_checkpoint(7)
    kept_in(tmp_path / "deep" / "folder").save(saved)
    loaded = kept_in(tmp_path / "deep" / "folder").newest()
    assert loaded is not None and (loaded.step, loaded.settings) == (7, {"batch": "8"})
    assert loaded.tensors.keys() == saved.tensors.keys()
    assert all(torch.equal(loaded.tensors[name], tensor) for name, tensor in saved.tensors.items())


def test_empty_or_absent_place_has_no_newest_checkpoint(tmp_path: Path) -> None:
    assert kept_in(tmp_path).newest() is None
    (tmp_path / RUN).mkdir()
    assert kept_in(tmp_path).newest() is None


def test_only_the_last_two_are_kept(tmp_path: Path) -> None:
    kept = kept_in(tmp_path)
    for step in (9, 10, 100):
        kept.save(a_checkpoint(step))
    assert steps_in(tmp_path) == [10, 100]


def test_what_a_process_goes_on_from_counts_among_the_last_two(tmp_path: Path) -> None:
    first, second = kept_in(tmp_path), kept_in(tmp_path)
    for step in (1, 2):
        first.save(a_checkpoint(step))
    assert newest_step(second) == 2
    second.save(a_checkpoint(3))
    assert steps_in(tmp_path) == [2, 3]


def test_other_objects_of_the_place_are_left_alone(tmp_path: Path) -> None:
    store, kept = FolderStore(tmp_path.as_uri()), kept_in(tmp_path)
    for key in ("run/notes", "run/1/000000000001.safetensors", "other/x"):
        store.put(key, b"-")
    for step in (1, 2, 3):
        kept.save(a_checkpoint(step))
    assert len(store.list(RUN)) == 4 and store.exists("other/x") and newest_step(kept) == 3


# ---- Damage --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", [0, 20, -1], ids=["length of the header", "header", "last tensor"])
def test_damaged_newest_falls_back_to_the_older_with_a_warning(tmp_path: Path, where: int) -> None:
    kept = kept_in(tmp_path)
    kept.save(a_checkpoint(1))
    flip_bit(tmp_path / kept.save(a_checkpoint(2)), where)
    with capture_logs() as logs:
        assert newest_step(kept_in(tmp_path)) == 1
    assert [(line["event"], line["log_level"]) for line in logs] == [("checkpoint_damaged", "warning")]
    assert "expected the SHA-256" in logs[0]["reason"]


def test_without_the_check_a_flipped_bit_would_pass() -> None:
    name, content = encode(a_checkpoint(1))
    flipped = content[:-1] + bytes([content[-1] ^ 1])
    unchecked = safetensors.torch.load(flipped)
    assert any(not torch.equal(unchecked[key], tensor) for key, tensor in a_checkpoint(1).tensors.items())
    with pytest.raises(DataInvalid, match="expected the SHA-256"):
        decode(name, flipped)


@pytest.mark.parametrize("length", [0, 5, 100])
def test_truncated_newest_falls_back_to_the_older(tmp_path: Path, length: int) -> None:
    kept = kept_in(tmp_path)
    kept.save(a_checkpoint(1))
    os.truncate(tmp_path / kept.save(a_checkpoint(2)), length)
    with capture_logs():
        assert newest_step(kept_in(tmp_path)) == 1


def test_nothing_intact_means_starting_anew(tmp_path: Path) -> None:
    kept = kept_in(tmp_path)
    for key in [kept.save(a_checkpoint(step)) for step in (1, 2)]:
        os.truncate(tmp_path / key, 50)
    with capture_logs() as logs:
        assert kept_in(tmp_path).newest() is None
    assert len(logs) == 2


def test_damaged_one_does_not_push_out_the_intact_ones_and_goes_when_passed(tmp_path: Path) -> None:
    os.truncate(saved_to(tmp_path, 9), 50)
    kept = kept_in(tmp_path)
    kept.save(a_checkpoint(7))
    with capture_logs():
        assert newest_step(kept) == 7
    kept.save(a_checkpoint(8))
    assert steps_in(tmp_path) == [7, 8, 9]
    kept.save(a_checkpoint(10))
    assert steps_in(tmp_path) == [8, 10]


def test_foreign_safetensors_file_is_not_a_checkpoint() -> None:
    content = safetensors.torch.save({"weight": torch.zeros(2)})
    name = f"{1:012d}-{checkpoints.hashlib.sha256(content).hexdigest()}.safetensors"
    with pytest.raises(DataInvalid, match="expected tensors with step and settings"):
        decode(name, content)


# Where a kill can fall: the system calls of a save in their order, and whether the new file counts by then.
KILL_POINTS = {"while writing": ("fsync", 0, 2), "before the rename": ("replace", 0, 2), "after it": ("fsync", 1, 3)}


@pytest.mark.parametrize(("call", "after_calls", "expected"), KILL_POINTS.values(), ids=KILL_POINTS.keys())
def test_kill_at_any_point_leaves_an_intact_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, after_calls: int, expected: int
) -> None:
    kept = kept_in(tmp_path)
    for step in (1, 2):
        kept.save(a_checkpoint(step))
    original, calls = getattr(os, call), iter(range(99))

    def killing(*arguments: object) -> object:
        if next(calls) == after_calls:
            raise Killed
        return original(*arguments)

    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(stores.os, call, killing)
        kept.save(a_checkpoint(3))
    with capture_logs() as logs:
        assert newest_step(kept_in(tmp_path)) == expected
    assert logs == []


def test_full_disk_says_so_and_keeps_the_older(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    kept = kept_in(tmp_path)
    kept.save(a_checkpoint(1))
    with monkeypatch.context() as patched, pytest.raises(StorageFailed, match="No space left on device; make room"):
        patched.setattr(stores.os, "fsync", full)
        kept.save(a_checkpoint(2))
    assert newest_step(kept) == 1


def test_checkpoint_that_may_not_be_read_is_an_error_not_a_fresh_start(tmp_path: Path) -> None:
    kept = kept_in(tmp_path)
    path = tmp_path / kept.save(a_checkpoint(1))

    class Refusing(FolderStore):
        def get(self, key: str) -> bytes:
            raise InputMissing(f"{key}: access denied")

    refused = Checkpoints(Refusing(tmp_path.as_uri()), RUN)
    with pytest.raises(InputMissing, match="access denied"):
        refused.newest()
    path.rename(tmp_path / "elsewhere")
    with capture_logs():
        assert refused.newest() is None


def test_checkpoint_deleted_meanwhile_is_passed_over_where_missing_keys_are_forbidden_ones(tmp_path: Path) -> None:
    class Aws(FolderStore):
        """Says 403 of a key that is not there, as AWS does to an identity that may not list the whole bucket."""

        def get(self, key: str) -> bytes:
            if "2-" in key:
                (tmp_path / key).unlink(missing_ok=True)  # by the other attempt, after it was listed
            return super().get(key)

        def exists(self, key: str) -> bool:
            if not super().exists(key):
                raise InputMissing(f"{key}: 403 Forbidden")
            return True

    kept = kept_in(tmp_path)
    for step in (1, 2):
        kept.save(a_checkpoint(step))
    with capture_logs() as logs:
        assert newest_step(Checkpoints(Aws(tmp_path.as_uri()), RUN)) == 1
    assert [line["event"] for line in logs] == ["checkpoint_gone"]


# ---- Two attempts side by side -------------------------------------------------------------------------------


def prune_everything_else(kept: Checkpoints) -> None:
    """The mutant: of all there is, only this process's own stays."""
    for key in set(kept._keys()) - set(kept._own):
        kept.store.delete(key)


def prune_by_listing(kept: Checkpoints) -> None:
    """The mutant: later ones go as well, as if whoever saves step s had to be right about it."""
    keys = kept._keys()
    ours = [key for key in sorted(keys) if kept._step(key) <= kept._step(kept._own[-1])][-kept.keep :]
    for key in set(keys) - set(ours):
        kept.store.delete(key)


def left_by_two_that_prune_at_once(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    steps: tuple[int, int],
    prune: Callable[[Checkpoints], None] = Checkpoints._prune,
) -> list[int]:
    """Both put, both list, then both delete: the worst that two processes can do to each other."""
    store, both = FolderStore(folder.as_uri()), [kept_in(folder), kept_in(folder)]
    with monkeypatch.context() as patched:
        patched.setattr(Checkpoints, "_prune", lambda _: None)
        for other, (kept, step) in enumerate(zip(both, steps, strict=True)):
            kept.save(a_checkpoint(step - 5, other))
            kept.save(a_checkpoint(step, other))
    seen = store.list(RUN)
    monkeypatch.setattr(FolderStore, "list", lambda *_: seen)
    for kept in both:
        prune(kept)
    return steps_in(folder)


@pytest.mark.parametrize("steps", [(50, 100), (100, 100), (50, 55), (95, 100)])
def test_two_attempts_that_prune_at_once_leave_the_latest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps: tuple[int, int]
) -> None:
    assert max(left_by_two_that_prune_at_once(tmp_path, monkeypatch, steps)) == max(steps)


@pytest.mark.parametrize("mutant", [prune_everything_else, prune_by_listing])
def test_another_rule_could_leave_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mutant: Callable[[Checkpoints], None]
) -> None:
    left = left_by_two_that_prune_at_once(tmp_path, monkeypatch, (50, 100), mutant)
    assert left == [], "not even the latest"


def test_new_attempt_goes_on_from_a_later_step_of_a_zombie(tmp_path: Path) -> None:
    zombie, attempt = kept_in(tmp_path), kept_in(tmp_path)
    zombie.save(a_checkpoint(40))
    assert newest_step(attempt) == 40
    zombie.save(a_checkpoint(60))
    attempt.save(a_checkpoint(50))
    assert newest_step(kept_in(tmp_path)) == 60
    zombie.save(a_checkpoint(65))
    assert newest_step(kept_in(tmp_path)) == 65


def test_store_that_deletes_nothing_does_not_end_the_training(tmp_path: Path) -> None:
    class Undeletable(FolderStore):
        def delete(self, key: str) -> None:
            raise OutputFailed(f"{key}: access denied")

    kept = Checkpoints(Undeletable(tmp_path.as_uri()), RUN)
    with capture_logs() as logs:
        for step in (1, 2, 3):
            kept.save(a_checkpoint(step))
    assert [line["event"] for line in logs] == ["old_checkpoints_left"] and steps_in(tmp_path) == [1, 2, 3]


# ---- While training goes on ----------------------------------------------------------------------------------


class Gate(FolderStore):
    """A folder whose puts wait until they are let through, or end as they are told."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder.as_uri())
        self.let_through, self.entered = threading.Event(), threading.Semaphore(0)
        self.inside, self.most_inside, self.error = 0, 0, None  # type: int, int, FeddiffError | None

    def put(self, key: str, data: bytes) -> None:
        self.inside += 1
        self.most_inside = max(self.most_inside, self.inside)
        self.entered.release()
        self.let_through.wait()
        self.inside -= 1
        if self.error is not None:
            raise self.error
        super().put(key, data)


@pytest.fixture
def gate(tmp_path: Path) -> Gate:
    return Gate(tmp_path)


def test_training_does_not_wait_and_what_it_changes_is_not_saved(gate: Gate) -> None:
    checkpoint = a_checkpoint(1)
    weight = checkpoint.tensors["model.weight"]
    before = weight.clone()
    with Saver(Checkpoints(gate, RUN)) as saver:
        saver.begin(checkpoint)
        gate.entered.acquire()
        assert not saver.idle and saver.saved_step == 0
        weight.zero_()  # training goes on
        gate.let_through.set()
    loaded = Checkpoints(gate, RUN).newest()
    assert saver.saved_step == 1 and loaded is not None
    assert torch.equal(loaded.tensors["model.weight"], before)


def test_last_one_waits_for_the_one_on_its_way(gate: Gate) -> None:
    with Saver(Checkpoints(gate, RUN)) as saver:
        saver.begin(a_checkpoint(1))
        gate.entered.acquire()
        threading.Timer(0.05, gate.let_through.set).start()
        saver.finish(a_checkpoint(2))
        assert saver.saved_step == 2
    assert gate.most_inside == 1 and newest_step(Checkpoints(gate, RUN)) == 2


@pytest.mark.parametrize("error", [StoreUnavailable("s3://x: it does not answer"), StorageFailed("file:///x: no room")])
def test_outage_or_full_disk_is_logged_and_the_next_checkpoint_tries_again(gate: Gate, error: FeddiffError) -> None:
    gate.let_through.set()
    gate.error = error
    with capture_logs() as logs, Saver(Checkpoints(gate, RUN)) as saver:
        saver.begin(a_checkpoint(1))
        with pytest.raises(type(error)):
            saver.finish(a_checkpoint(2))
        gate.error = None
        saver.begin(a_checkpoint(3))
    assert [(line["event"], line["step"]) for line in logs] == [
        ("checkpoint_not_saved", 1),
        ("checkpoint_not_saved", 2),
    ]
    assert saver.saved_step == 3 and newest_step(Checkpoints(gate, RUN)) == 3


def test_what_no_try_can_mend_ends_the_training_with_the_next_checkpoint(gate: Gate) -> None:
    gate.let_through.set()
    gate.error = OutputFailed("access denied")
    with Saver(Checkpoints(gate, RUN)) as saver:
        saver.begin(a_checkpoint(1))
        with pytest.raises(OutputFailed, match="access denied"):
            saver.finish(a_checkpoint(2))


def test_store_that_keeps_silent_does_not_hold_a_stop_beyond_its_time(
    gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoints, "STOP_SECONDS", 0.0)
    began = time.monotonic()
    with Saver(Checkpoints(gate, RUN)) as saver:
        saver.begin(a_checkpoint(1))
        with pytest.raises(StoreUnavailable, match="found it still on its way"):
            saver.finish(a_checkpoint(2), seconds=0.0)
    assert time.monotonic() - began < 30
    gate.let_through.set()


def test_whoever_asked_is_told_of_what_is_stored_and_of_nothing_else(gate: Gate) -> None:
    gate.let_through.set()
    told: list[int] = []
    with capture_logs(), Saver(Checkpoints(gate, RUN), lambda: told.append(saver.saved_step)) as saver:
        saver.finish(a_checkpoint(1))
        gate.error = StoreUnavailable("gone")
        with pytest.raises(StoreUnavailable):
            saver.finish(a_checkpoint(2))
    assert told == [1]


def test_without_a_place_nothing_is_saved() -> None:
    def never(_: Tensor) -> Tensor:
        raise AssertionError("no copy is made")

    with Saver(None) as saver:
        saver.begin(a_checkpoint(1))
        saver.finish(a_checkpoint(2))
    assert saver.saved_step == 0 and saver.idle
