"""Kills an engine at its n-th step, for many n, and runs it again: python crash_engine.py FOLDER SEED NUM_TRIALS.

With a fourth argument, `forgetful`, the engine forgets its job's uid when it dies: a mutant that must spend twice.

A step is anything that leaves a mark: a ledger's transaction (before and after), a file put in place, a stage
started or taken note of. Prints one JSON line per trial. A script of its own because it forks.
"""

import json
import os
import random
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from conftest import FakeStages, World
from feddiff import engine, local_ledger, processes, run_folder


class Steps:
    """Counts steps and dies by SIGKILL at the fatal one."""

    def __init__(self, fatal: int) -> None:
        self.left = fatal

    def take(self) -> None:
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def around(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def stepping(*args: Any, **kwargs: Any) -> Any:
            self.take()
            result = function(*args, **kwargs)
            self.take()
            return result

        return stepping


def mark_steps(steps: Steps) -> None:
    for owner, name in (
        (local_ledger.LocalLedger, "reserve"),
        (local_ledger.LocalLedger, "charge"),
        (local_ledger.LocalLedger, "record_manifest"),
        (local_ledger, "_insert"),
        (local_ledger, "_update"),
        (local_ledger, "_write_account"),
        (run_folder, "replace_file"),
        (run_folder, "create_file"),
        (engine, "replace_file"),
        (engine._Engine, "_start"),
        (engine._Engine, "_finish"),
        (processes.StageProcess, "exit_code"),
    ):
        setattr(owner, name, steps.around(getattr(owner, name)))


def engine_dies(world: World, fatal: int) -> bool:
    """Whether an engine in a process of its own died at its `fatal` step; otherwise it ended well."""
    child = os.fork()
    if child == 0:
        mark_steps(Steps(fatal))
        outcome = world.run(world.job(), FakeStages())
        os._exit(0 if outcome.exit_code in (0, 77) else 3)
    _, status = os.waitpid(child, 0)
    if not os.WIFSIGNALED(status):
        assert os.WEXITSTATUS(status) == 0, f"the engine ended with {status}"
    return os.WIFSIGNALED(status)


def trial(folder: Path, draw: random.Random) -> dict[str, Any]:
    """Dies again and again at random steps until a run gets through."""
    folder.mkdir()
    world, deaths = World(folder), 0
    while engine_dies(world, draw.randrange(1, 90)):
        deaths += 1
    stages = FakeStages()
    outcome = world.run(world.job(), stages)
    ledgers = {owner: world.ledger(owner) for owner in "ab"}
    return {
        "deaths": deaths,
        "phase": outcome.status.phase,
        "startedAfterwards": stages.started,
        "entries": {owner: [entry.phase for entry in ledger.entries] for owner, ledger in ledgers.items()},
        "manifests": [bool(entry.manifest_sha256) for ledger in ledgers.values() for entry in ledger.entries],
        "spent": [round(ledger.spent_epsilon, 4) for ledger in ledgers.values()],
    }


def forget_uids() -> None:
    def begin(self: run_folder.RunFolder, job: Any, seed: int | None = None) -> str:
        self.path.mkdir(parents=True, exist_ok=True)
        (self.path / "run.json").write_text("{}")
        return self.begin_anew(job)

    run_folder.RunFolder.begin = begin  # type: ignore[method-assign]


if __name__ == "__main__":
    if sys.argv[4:] == ["forgetful"]:
        forget_uids()
    draw = random.Random(int(sys.argv[2]))
    for index in range(int(sys.argv[3])):
        print(json.dumps(trial(Path(sys.argv[1]) / f"trial-{index}", draw)), flush=True)
