"""Checkpoints of one training run in a store: written whole or not at all, checked when read, the last two kept.

An object is called STEP-SHA256.safetensors after its own bytes, so one put publishes content and check together.
Nothing is pickled: a checkpoint is named tensors and strings.

Two attempts may save side by side, because a pod that the cluster gave up may live on. They need not be told apart:
training is a function of settings and step, so whoever saved step s, it is a state that this run passes through, and
going on from a later one than one's own skips work and changes nothing. That they do not delete each other's last
one is `_prune`'s doing.
"""

import hashlib
import json
import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Self

import safetensors
import safetensors.torch
import structlog
from torch import Tensor

from feddiff_protocol.errors import DataInvalid, InputMissing, StorageFailed, StoreUnavailable

from .stores import FAILURES, Store

NAME = re.compile(r"(?P<step>\d{12})-(?P<sha256>[0-9a-f]{64})\.safetensors")
MENDABLE = (StorageFailed, StoreUnavailable)  # by trying again with the next checkpoint
STOP_SECONDS = 45.0  # for what is on its way and the last checkpoint, of the minute that a pod has after SIGTERM
log = structlog.get_logger()


@dataclass(frozen=True)
class Checkpoint:
    """Everything that a run needs to go on after `step` steps; `settings` are the arguments it was started with."""

    step: int
    settings: dict[str, str]
    tensors: dict[str, Tensor]


class Checkpoints:
    """The checkpoints of one run below `prefix`, which ends in a slash."""

    def __init__(self, store: Store, prefix: str, keep: int = 2) -> None:
        self.store, self.prefix, self.keep = store, prefix, keep
        self._own: list[str] = []  # keys that this process wrote or goes on from, oldest first

    @property
    def place(self) -> str:
        return f"{self.store.uri}/{self.prefix}"

    def save(self, checkpoint: Checkpoint) -> str:
        """Key of the new object, durable by now; older ones are gone but for the last `keep` of this process.

        Raises OutputFailed, StorageFailed or StoreUnavailable.
        """
        name, content = encode(checkpoint)
        key = f"{self.prefix}{name}"
        self.store.put(key, content)
        self._own = [*(other for other in self._own if other != key), key][-self.keep :]
        self._prune()
        return key

    def newest(self) -> Checkpoint | None:
        """The newest checkpoint whose bytes are intact, or None; each damaged one is skipped with a warning.

        Raises the store's errors where it does not answer or may not be read: that is no reason to begin anew.
        """
        for key in sorted(self._keys(), reverse=True):
            try:
                checkpoint = decode(key.removeprefix(self.prefix), self.store.get(key))
            except DataInvalid as error:
                log.warning("checkpoint_damaged", key=key, reason=str(error), action="using an older one")
            except InputMissing:
                # Listed again, not asked for: without the right to list everything AWS says of a missing key what it
                # says of a forbidden one, 403.
                if key in self._keys():
                    raise
                log.warning("checkpoint_gone", key=key, action="using an older one")
            else:
                self._own = [key]
                return checkpoint
        return None

    def _keys(self) -> list[str]:
        return [key for key in self.store.list(self.prefix) if NAME.fullmatch(key.removeprefix(self.prefix))]

    def _prune(self) -> None:
        """Gone is what comes before this process's newest and is not among its last `keep`, damaged ones included.

        What is as late as its newest, or later, is another attempt's to delete. So the latest of all is deleted by
        nobody, and two attempts that save and prune at the same moment never leave nothing.
        """
        newest = self._step(self._own[-1])
        try:
            for key in self._keys():
                if self._step(key) < newest and key not in self._own:
                    self.store.delete(key)
        except FAILURES as error:  # the checkpoint itself is safe
            log.warning("old_checkpoints_left", place=self.place, reason=str(error), action="deleting them later")

    def _step(self, key: str) -> int:
        return int(key.removeprefix(self.prefix).split("-")[0])


class Saver:
    """Saves a run's checkpoints while the run goes on: from a copy, in a thread, one at a time.

    A store that does not answer is logged, and the next checkpoint is the next try. What no try can mend is raised
    with the next checkpoint. Without `checkpoints` nothing is saved. Leaving it waits for what is on its way.
    on_saved() is called, in that thread, whenever one is in the store.
    """

    def __init__(self, checkpoints: Checkpoints | None, on_saved: Callable[[], None] = lambda: None) -> None:
        self.checkpoints, self.on_saved = checkpoints, on_saved
        self.saved_step = 0
        self._thread: threading.Thread | None = None
        self._failure: Exception | None = None

    @property
    def idle(self) -> bool:
        return self._thread is None or not self._thread.is_alive()

    def begin(self, checkpoint: Checkpoint) -> None:
        """The checkpoint is on its way, from a copy, so that the run may go on; only when idle."""
        if self.checkpoints is None:
            return
        assert self.idle
        if self._failure is not None and not isinstance(self._failure, MENDABLE):
            raise self._failure
        copies = {name: tensor.detach().to("cpu", copy=True) for name, tensor in checkpoint.tensors.items()}
        work = (self.checkpoints, replace(checkpoint, tensors=copies))
        # A daemon: a store that keeps silent must not keep a process that was told to stop.
        self._thread = threading.Thread(target=self._save, args=work, name="checkpoint", daemon=True)
        self._thread.start()

    def finish(self, checkpoint: Checkpoint, seconds: float | None = None) -> None:
        """The checkpoint is in the store, after what was on its way before. Raises StoreUnavailable if that takes
        longer than `seconds`, and whatever ended the last try."""
        deadline = None if seconds is None else time.monotonic() + seconds
        self._wait(deadline)
        self.begin(checkpoint)
        self._wait(deadline)
        if self._failure is not None:
            raise self._failure

    def _wait(self, deadline: float | None) -> None:
        if self._thread is None:
            return
        self._thread.join(None if deadline is None else max(0.0, deadline - time.monotonic()))
        if self._thread.is_alive():
            raise StoreUnavailable("checkpoint: expected it to be stored in time, found it still on its way")

    def _save(self, checkpoints: Checkpoints, checkpoint: Checkpoint) -> None:
        try:
            checkpoints.save(checkpoint)
            self.saved_step, self._failure = checkpoint.step, None
            self.on_saved()
        except MENDABLE as error:
            log.warning("checkpoint_not_saved", step=checkpoint.step, reason=str(error), action="trying with the next")
            self._failure = error
        except Exception as error:
            self._failure = error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._thread is not None:
            self._thread.join(STOP_SECONDS)


def encode(checkpoint: Checkpoint) -> tuple[str, bytes]:
    """Name and content of a checkpoint: safetensors with step and settings as JSON in its header."""
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
