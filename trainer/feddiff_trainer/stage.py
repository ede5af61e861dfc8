"""The frame around every stage: a spec comes in, a receipt goes out, an error becomes one line and a code.

    if __name__ == "__main__":
        sys.exit(run_stage(ReleaseSpec, body))

stdout carries the receipt alone; stderr carries one JSON line per event, and the message of a failure.
"""

import errno
import json
import os
import secrets
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib import metadata
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

import structlog

from feddiff_protocol.api import parse
from feddiff_protocol.errors import (
    OUR_BUG,
    FeddiffError,
    InputMissing,
    Interrupted,
    OutputFailed,
    SpecInvalid,
    StorageFailed,
    UsageInvalid,
)
from feddiff_protocol.stages import Receipt, Stage, StageSpec

from .stores import FULL, UNWRITABLE
from .telemetry import progressed, telling

S = TypeVar("S", bound=StageSpec)

SPEC_BYTES = 16 << 20
PROGRESS_SECONDS = 0.5
TERMINATION_LOG = "/dev/termination-log"


def run_stage(spec_type: type[S], body: Callable[[S], Mapping[str, str]]) -> int:
    """The exit code of one stage: its spec read from the file that argv names, `body(spec)` run, its outputs
    (name → SHA-256) written into the receipt. Of several ranks only the first writes one.

    SIGTERM and SIGINT reach `body` as Interrupted, unless it installs handlers of its own.
    """
    code = _run(spec_type, body)
    _leave_exit_code(code)
    return code


def _run(spec_type: type[S], body: Callable[[S], Mapping[str, str]]) -> int:
    _log_as_json()
    try:
        with _stopped_by_signals():
            started = time.monotonic()
            spec = read_spec(spec_type, sys.argv)
            _progress.begin(_stage_of(spec))
            with telling(spec):
                outputs = body(spec)
            if _is_first_rank():
                _hand_over(_receipt(spec, outputs, round(1000 * (time.monotonic() - started))))
            return 0
    except FeddiffError as error:
        print(f"feddiff: {error}", file=sys.stderr)
        return error.exit_code
    except OSError as error:
        return _exit_code_of(error)
    except Exception:
        traceback.print_exc()
        return OUR_BUG
    finally:
        _progress.begin(None)


def read_spec(spec_type: type[S], argv: list[str]) -> S:
    """The spec that `argv` names. Raises UsageInvalid, InputMissing or SpecInvalid."""
    if len(argv) != 2:
        raise UsageInvalid(f"expected one argument, the stage's SPEC.json, found {len(argv) - 1}; name one file")
    path = Path(argv[1])
    try:
        with path.open("rb") as file:
            text = file.read(SPEC_BYTES + 1)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise InputMissing(f"{argv[1]}: expected a stage spec that can be read, found: {reason}") from None
    if len(text) > SPEC_BYTES:
        raise SpecInvalid(f"{path}: expected at most {SPEC_BYTES} bytes, found more; is this a stage spec?")
    try:
        document = json.loads(text)
    except (ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())[:200]
        raise SpecInvalid(f"{path}: expected JSON, found: {reason}; write it anew") from None
    return parse(spec_type, document, str(path))


def _stage_of(spec: StageSpec) -> Stage:
    stage = getattr(spec, "stage", None)
    assert isinstance(stage, Stage)  # every spec of a stage names it
    return stage


def _is_first_rank() -> bool:
    return os.environ.get("RANK", "0") == "0"  # torchrun sets it


def _exit_code_of(error: OSError) -> int:
    """One line for a full disk and its like, a traceback for what should not have happened."""
    where = error.filename or "output"
    if error.errno in UNWRITABLE:
        print(f"feddiff: {where}: cannot be written: {error.strerror}; give permission", file=sys.stderr)
        return OutputFailed.exit_code
    if error.errno in FULL:
        print(f"feddiff: {where}: cannot be written: {error.strerror}; make room, then try again", file=sys.stderr)
        return StorageFailed.exit_code
    if error.errno in (errno.EIO, errno.ESTALE, errno.ETIMEDOUT):
        print(f"feddiff: {where}: input/output failed: {error.strerror}; try again", file=sys.stderr)
        return StorageFailed.exit_code
    traceback.print_exc()
    return OUR_BUG


def _leave_exit_code(code: int) -> None:
    """torchrun ends with 1 whatever its ranks end with, so each rank leaves its own code in FEDDIFF_EXIT_FOLDER."""
    if folder := os.environ.get("FEDDIFF_EXIT_FOLDER"):
        with suppress(OSError):
            (Path(folder) / os.environ.get("RANK", "0")).write_text(str(code))


@contextmanager
def _stopped_by_signals() -> Iterator[None]:
    def stop(number: int, _: FrameType | None) -> None:
        raise Interrupted(f"stopped by {signal.Signals(number).name}; run it again to go on")

    handlers = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


# ---- The receipt ---------------------------------------------------------------------------------------------


def _receipt(spec: StageSpec, outputs: Mapping[str, str], milliseconds: int) -> Receipt:
    return Receipt(
        stage=_stage_of(spec),
        job_uid=spec.job.uid,
        client=getattr(spec, "client", ""),
        attempt=spec.attempt,
        outputs=dict(outputs),
        milliseconds=milliseconds,
        versions=installed_versions(),
    )


def installed_versions() -> dict[str, str]:
    """Versions of Python and of the packages that a result depends on."""
    # Read from the installed packages, so that a release need not load torch to name its version.
    versions = {"python": ".".join(str(part) for part in sys.version_info[:3])}
    for package in ("feddiff", "torch", "numpy"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return versions


def _hand_over(receipt: Receipt) -> None:
    """The receipt is in the termination log and on stdout, where it is the last line."""
    line = receipt.to_line()
    if path := os.environ.get("FEDDIFF_TERMINATION_LOG"):
        _replace(Path(path), line)
    elif os.access(TERMINATION_LOG, os.W_OK):
        # Kubernetes mounts this file alone, so there is no folder in which to make a new one.
        Path(TERMINATION_LOG).write_text(line)
    print(line, flush=True)


def _replace(path: Path, text: str) -> None:
    unfinished = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        unfinished.write_text(text)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


# ---- Events on stderr ----------------------------------------------------------------------------------------


def report_progress(done: int, total: int, unit: str, **public: Any) -> None:
    """A line {"event": "progress", "stage", "done", "total", "unit", …} on stderr, at most two a second; the first
    and the last one always; outside of run_stage nothing is written. Nothing in it may depend on the records.
    The same number, without `public`, is what the stage's pod tells of its progress."""
    progressed(done, total)
    _progress.report(done, total, unit, public)


class _Progress:
    """When the last line of which stage was written."""

    def __init__(self) -> None:
        self.begin(None)

    def begin(self, stage: Stage | None) -> None:
        self._stage = stage
        self._written_at = -float("inf")

    def report(self, done: int, total: int, unit: str, public: Mapping[str, Any]) -> None:
        now = time.monotonic()
        if self._stage is None or not _is_first_rank() or (done < total and now - self._written_at < PROGRESS_SECONDS):
            return
        self._written_at = now
        structlog.get_logger().info("progress", stage=self._stage, done=done, total=total, unit=unit, **public)


_progress = _Progress()


def _log_as_json() -> None:
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.JSONRenderer(),
        ],
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=False,
    )
