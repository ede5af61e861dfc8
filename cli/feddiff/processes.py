"""Stages as processes: started in groups of their own, watched without threads, stopped with time to save.

A stage that outlives a killed engine is known by its environment, which names the receipt it writes.
"""

import ctypes
import json
import os
import signal
import subprocess
import sys
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

import psutil

from feddiff_protocol.api import SharedSpec
from feddiff_protocol.baselines import AnyBaselineSpec, BaselineSpec
from feddiff_protocol.errors import FINAL_EXIT_CODES, Interrupted
from feddiff_protocol.plan import StageKey
from feddiff_protocol.stages import AnyStageSpec, TrainSharedSpec

RECEIPT_VARIABLE = "FEDDIFF_TERMINATION_LOG"
EXITS_VARIABLE = "FEDDIFF_EXIT_FOLDER"
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "VECLIB_MAXIMUM_THREADS")
MESSAGE_LENGTH = 500
PR_SET_PDEATHSIG = 1

AnySpec = AnyStageSpec | AnyBaselineSpec
StageCommand = Callable[[AnySpec, Path], list[str]]


def stage_command(spec: AnySpec, spec_path: Path) -> list[str]:
    """The process that carries out `spec`; the shared denoiser's ranks go through torchrun."""
    world_size = num_processes(spec)
    launch: Sequence[str] = ()
    if world_size > 1:
        launch = ("-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world_size}")
    module = spec.module if isinstance(spec, BaselineSpec) else spec.stage.module
    return [sys.executable, *launch, "-m", module, str(spec_path)]


def num_processes(spec: AnySpec) -> int:
    return num_ranks(spec.shared) if isinstance(spec, TrainSharedSpec) else 1


def num_ranks(shared: SharedSpec) -> int:
    """Of train-shared."""
    return shared.world_size if shared.denoiser == "trained" else 1


@dataclass
class Attempt(ABC):
    """One attempt of one stage, under way; what it writes into `folder` can be read here."""

    key: StageKey
    attempt: int
    folder: Path
    slots: int
    started_at: float
    asked_to_stop_at: float | None = field(default=None, init=False)
    stop_reason: str = field(default="", init=False)  # set when the stage itself is at fault, as when it ran too long
    _read_to: int = field(default=0, init=False)

    @abstractmethod
    def ended(self) -> bool: ...

    def begun(self) -> bool:
        """Whether it has had its turn; its time counts from then."""
        return True

    @abstractmethod
    def kill(self) -> None:
        """At once, with nothing saved."""

    @abstractmethod
    def _tell_to_stop(self) -> None: ...

    @abstractmethod
    def _own_code(self) -> int:
        """Of what was started here, which may hide what the ranks said; asked after it ended."""

    def ask_to_stop(self, now: float) -> None:
        """SIGTERM, once: the stage saves a checkpoint and leaves with 75."""
        if self.asked_to_stop_at is None:
            self.asked_to_stop_at = now
            self._tell_to_stop()

    def exit_code(self) -> int:
        """What the stage itself said where it could."""
        own = self._own_code()
        if own in (0, Interrupted.exit_code):
            return own
        said = {int(path.read_text()) for path in (self.folder / "exits").iterdir()}
        # 75 of a rank that was stopped because another one failed explains nothing.
        telling = sorted(said - {0, Interrupted.exit_code}, key=lambda each: each not in FINAL_EXIT_CODES)
        return telling[0] if telling else own

    def progress(self) -> Iterator[dict[str, Any]]:
        """The progress lines written since the last call."""
        try:
            with (self.folder / "stderr.log").open("rb") as file:
                file.seek(self._read_to)
                text = file.read()
        except FileNotFoundError:  # it has been asked for and not begun
            return
        whole = text[: text.rfind(b"\n") + 1]
        self._read_to += len(whole)
        for line in whole.splitlines():
            event = json_object(line)
            if event.get("event") == "progress" and {"done", "total"} <= event.keys():
                yield event

    def message(self) -> str:
        """The last words on stderr that are no event."""
        log = self.folder / "stderr.log"
        text = log.read_bytes()[-20_000:].decode(errors="replace") if log.exists() else ""
        lines = [line.strip() for line in text.splitlines() if line.strip() and not json_object(line.encode())]
        said = [line.removeprefix("feddiff: ") for line in lines if line.startswith("feddiff: ")] or lines
        return said[-1][:MESSAGE_LENGTH] if said else ""


class StartAttempt(Protocol):
    """Starts an attempt: its key and number, its folder with spec.json, the stage's spec, how many of the engine's
    slots it takes, threads for each of its processes, and the time."""

    def __call__(
        self, key: StageKey, attempt: int, folder: Path, spec: AnySpec, slots: int, threads: int, now: float
    ) -> Attempt: ...


@dataclass
class StageProcess(Attempt):
    """One on this machine."""

    process: "subprocess.Popen[bytes]"

    def ended(self) -> bool:
        return self.process.poll() is not None

    def kill(self) -> None:
        ranks = _descendants(self.process.pid)
        _signal_group(self.process.pid, signal.SIGKILL)
        for rank in ranks:
            with suppress(psutil.Error):
                rank.kill()

    def _tell_to_stop(self) -> None:
        _signal_group(self.process.pid, signal.SIGTERM)

    def _own_code(self) -> int:
        """torchrun says 1 whatever its ranks said."""
        code = self.process.returncode
        assert code is not None, "asked after it ended"
        return code if code >= 0 else 128 - code


@dataclass(frozen=True)
class StartProcess:
    """A StartAttempt on this machine."""

    command: StageCommand = stage_command

    def __call__(
        self, key: StageKey, attempt: int, folder: Path, spec: AnySpec, slots: int, threads: int, now: float
    ) -> Attempt:
        (folder / "exits").mkdir(exist_ok=True)
        with (folder / "stderr.log").open("ab") as stderr, (folder / "stdout.log").open("ab") as stdout:
            command = self.command(spec, folder / "spec.json")
            alone = threading.active_count() == 1
            process = subprocess.Popen(
                command if alone else dying_with_its_parent(command),
                stdin=subprocess.DEVNULL,
                stdout=stdout,
                stderr=stderr,
                env=os.environ | stage_environment(folder, threads),
                process_group=0,  # Ctrl-C in the terminal reaches the engine alone, which then asks its stages
                preexec_fn=_ask_to_stop_when_the_engine_dies if alone else None,
            )
        return StageProcess(key, attempt, folder, slots, now, process)


def stage_environment(folder: Path, threads: int) -> dict[str, str]:
    """What a stage's process is told beside its spec."""
    places = {RECEIPT_VARIABLE: str(folder / "receipt.json"), EXITS_VARIABLE: str(folder / "exits")}
    return places | dict.fromkeys(THREAD_VARIABLES, str(threads))


@contextmanager
def stop_requests() -> Iterator[Callable[[], int]]:
    """Counts Ctrl-C and SIGTERM instead of dying of them: stages save their work first. Only a main thread can."""
    received: list[int] = []

    def receive(number: int, _: FrameType | None) -> None:
        received.append(number)
        if len(received) == 1:
            print("feddiff: stopping; stages save their work (again: at once)", file=sys.stderr)

    main_thread = threading.current_thread() is threading.main_thread()
    numbers = (signal.SIGINT, signal.SIGTERM) if main_thread else ()
    before = {number: signal.signal(number, receive) for number in numbers}
    try:
        yield lambda: len(received)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def stop_orphans(stages: Path, grace_seconds: float, sleep: Callable[[float], None] = time.sleep) -> int:
    """No stage of an earlier engine is left below `stages`; returns how many there were."""
    orphans = list(orphans_below(stages))
    for orphan in orphans:
        with suppress(psutil.Error):
            orphan.terminate()
    deadline = time.monotonic() + grace_seconds
    while (left := [orphan for orphan in orphans if _alive(orphan)]) and time.monotonic() < deadline:
        sleep(0.05)
    for orphan in left:
        with suppress(psutil.Error):
            orphan.kill()
    while any(_alive(orphan) for orphan in left):
        sleep(0.05)
    return len(orphans)


def orphans_below(stages: Path) -> Iterator[psutil.Process]:
    """The processes of stages whose folders are below `stages`, on this machine."""
    mine = os.getpid()
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):
            receipt = process.environ().get(RECEIPT_VARIABLE, "")
            if process.pid != mine and receipt and Path(receipt).is_relative_to(stages):
                yield process


def _alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def _descendants(pid: int) -> list[psutil.Process]:
    with suppress(psutil.Error):
        return psutil.Process(pid).children(recursive=True)
    return []


def _signal_group(pid: int, number: signal.Signals) -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, number)


def _ask_to_stop_when_the_engine_dies() -> None:
    """Runs in the child before it becomes the stage; safe where the engine's process has no other thread."""
    if _LIBC is not None:
        _LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def dying_with_its_parent(command: list[str]) -> list[str]:
    """The same from a process with threads, a notebook's or a Ray task, after whose fork only an exec is safe."""
    return [sys.executable, "-c", DIES_WITH_ITS_PARENT, str(os.getpid()), *command] if _LIBC is not None else command


DIES_WITH_ITS_PARENT = (
    f"import ctypes, os, sys; ctypes.CDLL(None).prctl({PR_SET_PDEATHSIG}, {signal.SIGTERM.value}); "
    "os.getppid() == int(sys.argv[1]) and os.execvp(sys.argv[2], sys.argv[2:])"
)
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None


def json_object(line: bytes) -> dict[str, Any]:
    """A line that is an event; empty for any other."""
    if not line.lstrip().startswith(b"{"):
        return {}
    try:
        value = json.loads(line)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}
