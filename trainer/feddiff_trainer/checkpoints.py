"""Checkpoints of one training run in one folder: written whole or not at all, checked when read, the last two kept.

A file is called STEP-SHA256.safetensors after its own bytes, so one rename publishes content and check together.
Nothing is pickled: a checkpoint is named tensors and strings.
"""

import hashlib
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path

import safetensors
import safetensors.torch
import structlog
from torch import Tensor

from feddiff_protocol.errors import DataInvalid, OutputFailed, StorageFailed

from .stores import sync_folder

NAME = re.compile(r"(?P<step>\d{12})-(?P<sha256>[0-9a-f]{64})\.safetensors")
TEMPORARY = ".writing"
log = structlog.get_logger()


@dataclass(frozen=True)
class Checkpoint:
    """Everything that a run needs to go on after `step` steps; `settings` are the arguments it was started with."""

    step: int
    settings: dict[str, str]
    tensors: dict[str, Tensor]


@dataclass(frozen=True)
class CheckpointFolder:
    """The checkpoints of one run below `path`, which is made when first needed. One process at a time writes."""

    path: Path
    keep: int = 2

    def save(self, checkpoint: Checkpoint) -> Path:
        """Path of the new file, durable by now; all but the newest `keep` are gone.

        Files of later steps go too: who saves step s did not continue from them. Raises OutputFailed (73).
        """
        name, content = encode(checkpoint)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            write_durably(self.path / name, content)
            self._prune(checkpoint.step)
        except OSError as error:
            raise OutputFailed(
                f"checkpoint {self.path / name}: expected to write {len(content):,} bytes, found: {error}; "
                "make room or writable and run again"
            ) from error
        return self.path / name

    def newest(self) -> Checkpoint | None:
        """The newest checkpoint whose bytes are intact, or None; each damaged one is skipped with a warning.

        Raises StorageFailed (74) where the folder or a file in it cannot be read at all.
        """
        for path in sorted(self._files(), reverse=True):
            try:
                return decode(path.name, path.read_bytes())
            except DataInvalid as error:
                log.warning("checkpoint_damaged", path=str(path), reason=str(error), action="using an older one")
            except OSError as error:
                raise StorageFailed(f"checkpoint {path}: expected a readable file, found: {error}") from error
        return None

    def _files(self) -> list[Path]:
        try:
            return [path for path in self.path.iterdir() if NAME.fullmatch(path.name)] if self.path.exists() else []
        except OSError as error:
            raise StorageFailed(f"checkpoints {self.path}: expected a readable folder, found: {error}") from error

    def _prune(self, step: int) -> None:
        kept = sorted(path for path in self._files() if _step(path.name) <= step)[-self.keep :]
        leftovers = [path for path in self.path.iterdir() if path.name.endswith(TEMPORARY)]
        for path in {*self._files(), *leftovers} - {*kept}:
            path.unlink(missing_ok=True)


def encode(checkpoint: Checkpoint) -> tuple[str, bytes]:
    """File name and content of a checkpoint: safetensors with step and settings as JSON in its header."""
    metadata = {"step": str(checkpoint.step), "settings": json.dumps(checkpoint.settings, sort_keys=True)}
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in checkpoint.tensors.items()}
    content = safetensors.torch.save(tensors, metadata)
    return f"{checkpoint.step:012d}-{hashlib.sha256(content).hexdigest()}.safetensors", content


def decode(name: str, content: bytes) -> Checkpoint:
    """The checkpoint that `encode` made, tensors on the CPU. Raises DataInvalid if the content is not what it was."""
    match = NAME.fullmatch(name)
    found = hashlib.sha256(content).hexdigest()
    if match is None or match["sha256"] != found:
        raise DataInvalid(
            f"checkpoint {name}: expected the SHA-256 in its name, found {found} ({len(content):,} bytes)"
        )
    try:
        metadata = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])["__metadata__"]
        settings = json.loads(metadata["settings"])
        return Checkpoint(int(metadata["step"]), settings, safetensors.torch.load(content))
    except (ValueError, KeyError, TypeError, safetensors.SafetensorError) as error:
        raise DataInvalid(f"checkpoint {name}: expected tensors with step and settings, found: {error!r}") from error


def write_durably(path: Path, content: bytes) -> None:
    """`path` holds all of `content`, also after a power cut; a process killed half-way leaves `path` as it was.

    The folder is synced as well because the rename lives in the folder, not in the file.
    """
    temporary = path.with_name(path.name + TEMPORARY)
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    sync_folder(path.parent)


def _step(name: str) -> int:
    return int(name.split("-")[0])
