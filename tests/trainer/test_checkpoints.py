import os
from pathlib import Path

import pytest
import safetensors.torch
import torch
from structlog.testing import capture_logs

from feddiff_protocol.errors import DataInvalid, OutputFailed, StorageFailed
from feddiff_trainer import checkpoints
from feddiff_trainer.checkpoints import Checkpoint, CheckpointFolder, decode, encode


class Killed(BaseException):
    """Stands for SIGKILL: no `except Exception` tidies up after it."""


def a_checkpoint(step: int) -> Checkpoint:
    generator = torch.Generator().manual_seed(step)
    tensors = {"model.weight": torch.randn(3, 4, generator=generator), "adam.step.weight": torch.tensor(float(step))}
    return Checkpoint(step, {"batch": "8"}, tensors)


def steps_in(folder: Path) -> list[int]:
    return [int(path.name[:12]) for path in sorted(folder.iterdir())]


def newest_step(folder: CheckpointFolder) -> int | None:
    checkpoint = folder.newest()
    return None if checkpoint is None else checkpoint.step


def flip_bit(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


def test_saved_checkpoint_comes_back_bit_for_bit(tmp_path: Path) -> None:
    saved = a_checkpoint(7)
    CheckpointFolder(tmp_path / "deep" / "folder").save(saved)
    loaded = CheckpointFolder(tmp_path / "deep" / "folder").newest()
    assert loaded is not None and (loaded.step, loaded.settings) == (7, {"batch": "8"})
    assert loaded.tensors.keys() == saved.tensors.keys()
    assert all(torch.equal(loaded.tensors[name], tensor) for name, tensor in saved.tensors.items())


def test_empty_or_absent_folder_has_no_newest_checkpoint(tmp_path: Path) -> None:
    assert CheckpointFolder(tmp_path).newest() is None
    assert CheckpointFolder(tmp_path / "absent").newest() is None


def test_only_the_last_two_are_kept(tmp_path: Path) -> None:
    for step in (9, 10, 100):
        CheckpointFolder(tmp_path).save(a_checkpoint(step))
    assert steps_in(tmp_path) == [10, 100]


@pytest.mark.parametrize("where", [0, 20, -1], ids=["length of the header", "header", "last tensor"])
def test_damaged_newest_falls_back_to_the_older_with_a_warning(tmp_path: Path, where: int) -> None:
    folder = CheckpointFolder(tmp_path)
    folder.save(a_checkpoint(1))
    flip_bit(folder.save(a_checkpoint(2)), where)
    with capture_logs() as logs:
        assert newest_step(folder) == 1
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
    folder = CheckpointFolder(tmp_path)
    folder.save(a_checkpoint(1))
    os.truncate(folder.save(a_checkpoint(2)), length)
    with capture_logs():
        assert newest_step(folder) == 1


def test_nothing_intact_means_starting_anew(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path)
    for step in (1, 2):
        os.truncate(folder.save(a_checkpoint(step)), 50)
    with capture_logs() as logs:
        assert folder.newest() is None
    assert len(logs) == 2


def test_damaged_file_does_not_push_out_the_intact_ones(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path)
    folder.save(a_checkpoint(1))
    os.truncate(folder.save(a_checkpoint(9)), 50)
    folder.save(a_checkpoint(2))
    assert steps_in(tmp_path) == [1, 2]


# Where a kill can fall: the system calls of a save in their order, and whether the new file counts by then.
KILL_POINTS = {"while writing": ("fsync", 0, 2), "before the rename": ("replace", 0, 2), "after it": ("fsync", 1, 3)}


@pytest.mark.parametrize(("call", "after_calls", "expected"), KILL_POINTS.values(), ids=KILL_POINTS.keys())
def test_kill_at_any_point_leaves_an_intact_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, after_calls: int, expected: int
) -> None:
    folder = CheckpointFolder(tmp_path)
    for step in (1, 2):
        folder.save(a_checkpoint(step))
    original, calls = getattr(os, call), iter(range(99))

    def killing(*arguments: object) -> object:
        if next(calls) == after_calls:
            raise Killed
        return original(*arguments)

    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(checkpoints.os, call, killing)
        folder.save(a_checkpoint(3))
    with capture_logs() as logs:
        assert newest_step(folder) == expected
    assert logs == []
    folder.save(a_checkpoint(4))
    assert steps_in(tmp_path) == [expected, 4], "what the kill left behind is gone"


def test_full_disk_says_so_and_keeps_the_older(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    folder = CheckpointFolder(tmp_path)
    folder.save(a_checkpoint(1))
    with monkeypatch.context() as patched, pytest.raises(OutputFailed, match="No space left on device; make room"):
        patched.setattr(checkpoints.os, "fsync", full)
        folder.save(a_checkpoint(2))
    assert newest_step(folder) == 1


def test_file_in_place_of_the_folder_is_an_error_not_a_fresh_start(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageFailed, match="expected a readable folder"):
        CheckpointFolder(tmp_path / "file").newest()
    with pytest.raises(OutputFailed, match="expected to write"):
        CheckpointFolder(tmp_path / "file").save(a_checkpoint(1))


def test_foreign_safetensors_file_is_not_a_checkpoint() -> None:
    content = safetensors.torch.save({"weight": torch.zeros(2)})
    name = f"{1:012d}-{checkpoints.hashlib.sha256(content).hexdigest()}.safetensors"
    with pytest.raises(DataInvalid, match="expected tensors with step and settings"):
        decode(name, content)
