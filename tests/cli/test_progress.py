"""What is shown while a run works: bars for people, lines for machines, and no thread beside either."""

import threading
from typing import Any

import pytest

from feddiff.progress import Bars, Lines
from feddiff_protocol.plan import JobPhase, StageObserved, StagePhase, Status
from feddiff_protocol.stages import Stage

KEY = (Stage.TRAIN_PERSONAL, "a")


def drive(display: Any) -> None:
    with display as shown:
        shown.status(Status(JobPhase.TRAINING, ()))
        shown.stage_started(KEY, 2)
        for done in range(101):
            shown.stage_progress(KEY, done, 100, "images")
        shown.stage_ended(KEY, StageObserved(StagePhase.FAILED, 2, 1, 74, "disk [gone]"))


def test_bars_name_what_runs_and_what_failed(capsys: pytest.CaptureFixture[str]) -> None:
    threads = threading.active_count()
    bars = Bars()
    drive(bars)
    assert threading.active_count() == threads
    err = capsys.readouterr().err
    for words in ("Training", "failed train-personal a", "exit code 74: disk [gone]"):
        assert words in err


class Recorder:
    def __init__(self) -> None:
        self.events: list[tuple[str, dict[str, Any]]] = []

    def info(self, event: str, **fields: Any) -> None:
        self.events.append((event, fields))


def test_lines_say_every_tenth_of_a_stage_and_how_it_ended() -> None:
    recorder = Recorder()
    drive(Lines(recorder))
    names = [event for event, _ in recorder.events]
    assert 10 <= names.count("progress") <= 11
    said = recorder.events[-1][1]
    assert (said["stage"], said["client"], said["attempt"], said["phase"]) == ("train-personal", "a", 2, "Failed")
    assert (said["exitCode"], said["message"]) == (74, "disk [gone]")


def test_an_experiments_runs_are_counted(capsys: pytest.CaptureFixture[str]) -> None:
    recorder = Recorder()
    for display in (Bars(), Lines(recorder)):
        with display as shown:
            for done, name in enumerate(("ours, seed 0", "ours, seed 1")):
                shown.run_begun(name, done, 2)
                shown.status(Status(JobPhase.TRAINING, ()))
    err = capsys.readouterr().err
    assert "[1/2] ours, seed 0" in err and "[2/2] ours, seed 1" in err and err.count("Training") == 2
    begun = [fields for event, fields in recorder.events if event == "run-begun"]
    assert begun == [{"run": "ours, seed 0", "done": 0, "total": 2}, {"run": "ours, seed 1", "done": 1, "total": 2}]
