"""What a run shows while it works: bars on a terminal, else one structured line per event."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Protocol

from feddiff_protocol.plan import JobPhase, StageKey, StageObserved, StagePhase, Status

LINE_SHARE = 0.1  # a progress line at every tenth


class Display(Protocol):
    """A reporter for as long as a run lasts."""

    def __enter__(self) -> "Display": ...
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...
    def status(self, status: Status) -> None: ...
    def stage_started(self, key: StageKey, attempt: int) -> None: ...
    def stage_progress(self, key: StageKey, done: int, total: int, unit: str) -> None: ...
    def stage_ended(self, key: StageKey, seen: StageObserved) -> None: ...
    def run_begun(self, label: str, done: int, total: int) -> None:
        """Of an experiment: which run begins, how many are done, of how many."""


def display(as_json: bool) -> Display:
    """JSON lines on stdout when asked for; else on stderr bars where it is a terminal, lines where it is not."""
    if as_json:
        return Lines(json_logger())
    return Bars() if sys.stderr.isatty() else Lines(_text_logger())


def silence() -> Display:
    """Shows nothing."""
    import structlog

    return Lines(structlog.wrap_logger(structlog.ReturnLogger(), processors=[]))


def json_logger() -> Any:
    """Writes one JSON object per event on stdout."""
    import structlog

    return structlog.wrap_logger(
        structlog.PrintLogger(sys.stdout),
        processors=[structlog.processors.TimeStamper(fmt="iso", utc=True), structlog.processors.JSONRenderer()],
    )


def _text_logger() -> Any:
    import structlog

    return structlog.wrap_logger(
        structlog.PrintLogger(sys.stderr),
        processors=[
            structlog.processors.TimeStamper(fmt="%H:%M:%S", utc=False),
            structlog.processors.KeyValueRenderer(key_order=["timestamp", "event"], drop_missing=True),
        ],
    )


def label(key: StageKey) -> str:
    """ "release a", "train-shared"."""
    stage, client = key
    return f"{stage.value} {client}".rstrip()


class Lines:
    """One line per event."""

    def __init__(self, logger: Any) -> None:
        self._logger = logger
        self._said: dict[StageKey, float] = {}
        self._phase: JobPhase | None = None

    def __enter__(self) -> "Lines":
        return self

    def __exit__(self, *_: object) -> None: ...

    def status(self, status: Status) -> None:
        if status.phase is not self._phase:
            self._phase = status.phase
            self._logger.info("phase", phase=status.phase.value)

    def stage_started(self, key: StageKey, attempt: int) -> None:
        self._said.pop(key, None)
        self._logger.info("stage-started", **_named(key), attempt=attempt)

    def stage_progress(self, key: StageKey, done: int, total: int, unit: str) -> None:
        share = done / total if total else 1.0
        if share < 1 and share - self._said.get(key, 0.0) < LINE_SHARE:
            return
        self._said[key] = share
        self._logger.info("progress", **_named(key), done=done, total=total, unit=unit)

    def stage_ended(self, key: StageKey, seen: StageObserved) -> None:
        said = {"exitCode": seen.exit_code, "message": seen.message} if seen.phase is StagePhase.FAILED else {}
        self._logger.info("stage-ended", **_named(key), attempt=seen.attempt, phase=seen.phase.value, **said)

    def run_begun(self, label: str, done: int, total: int) -> None:
        self._said, self._phase = {}, None
        self._logger.info("run-begun", run=label, done=done, total=total)


def _named(key: StageKey) -> dict[str, str]:
    stage, client = key
    return {"stage": stage.value, "client": client} if client else {"stage": stage.value}


class Bars:
    """One bar with time left for each running stage; what ended scrolls away above."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

        self._console = Console(stderr=True)
        self._progress = Progress(
            TextColumn("{task.description:<24}"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f} %"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self._console,
            auto_refresh=False,  # its refreshing thread would make starting processes unsafe
        )
        self._tasks: dict[StageKey, TaskID] = {}
        self._runs: TaskID | None = None
        self._phase: JobPhase | None = None

    def __enter__(self) -> "Bars":
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def status(self, status: Status) -> None:
        if status.phase is not self._phase:
            self._phase = status.phase
            self._progress.console.print(f"[bold]{status.phase.value}[/bold]", highlight=False)
        self._progress.refresh()

    def stage_started(self, key: StageKey, attempt: int) -> None:
        again = f" (attempt {attempt})" if attempt > 1 else ""
        self._tasks[key] = self._progress.add_task(label(key) + again, total=None)
        self._progress.refresh()

    def stage_progress(self, key: StageKey, done: int, total: int, unit: str) -> None:
        self._progress.update(self._tasks[key], completed=done, total=total)
        self._progress.refresh()

    def stage_ended(self, key: StageKey, seen: StageObserved) -> None:
        self._progress.remove_task(self._tasks.pop(key))
        marks = {StagePhase.SUCCEEDED: "[green]done[/green]", StagePhase.FAILED: "[red]failed[/red]"}
        mark = marks.get(seen.phase, "[yellow]stopped[/yellow]")
        self._progress.console.print(f"  {mark} {label(key)}", highlight=False)
        if seen.phase is StagePhase.FAILED:
            self._console.print(f"    exit code {seen.exit_code}: {seen.message}", markup=False, highlight=False)

    def run_begun(self, label: str, done: int, total: int) -> None:
        self._phase = None
        if self._runs is None:
            self._runs = self._progress.add_task("runs", total=total)
        self._progress.update(self._runs, completed=done)
        self._progress.console.print(f"[{done + 1}/{total}] {label}", markup=False, highlight=False)
        self._progress.refresh()


@contextmanager
def bar(description: str) -> Iterator[Callable[[int, int], None]]:
    """To be told (done, total) of one process: a bar on a terminal, nothing elsewhere."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as shown:
        task = shown.add_task(description, total=None)
        yield lambda done, total: shown.update(task, completed=done, total=total)
