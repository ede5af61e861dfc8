"""What an engine adds to each stage: whole runs of 3, 10 and 32 clients whose stages only write their receipts.

    python benchmarks/ray_overhead.py [--clients 3 10 32] [--runs 3]

Two processes at a time. The local engine starts each stage itself; the Ray engine does it in a task of a Ray that was
started before, whose start is timed apart. One JSON row per engine and number of clients: seconds of a run over its
stages, min / median / max.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from measuring import spread

from feddiff.engine import Setting, run_job
from feddiff.experiment import commit, cpu_model
from feddiff.processes import StartProcess
from feddiff.ray_stages import StartOnRay, ray_cluster
from feddiff.run_folder import RunFolder

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "cli"))
from conftest import FakeStages, Silent, World

PROCESSES = 2


def seconds_per_stage(clients: int, start_attempt: Any) -> float:
    with tempfile.TemporaryDirectory() as name:
        world = World(Path(name), owners=[f"c{number}" for number in range(clients)])  # type: ignore[arg-type]
        job, stages = world.job(), FakeStages()
        setting = Setting(Silent(), num_processes=PROCESSES, start_attempt=start_attempt(stages))
        began = time.perf_counter()
        outcome = run_job(job, RunFolder(Path(name) / "run"), setting)
        seconds = time.perf_counter() - began
        assert outcome.exit_code == 0, outcome.message
        assert len(stages.started) == 4 * clients + 2
        return seconds / len(stages.started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, nargs="+", default=[3, 10, 32])
    parser.add_argument("--runs", type=int, default=3)
    arguments = parser.parse_args()
    began = time.perf_counter()
    with ray_cluster(None, PROCESSES, None):
        ray_start = time.perf_counter() - began
        engines = {"local": StartProcess, "ray": lambda stages: StartOnRay(gpus=0, gpu_share=0.0, command=stages)}
        seconds_per_stage(3, engines["ray"])  # Ray's workers start with their first tasks
        for clients in arguments.clients:
            for engine, start_attempt in engines.items():
                row = {
                    "benchmark": "ray_overhead",
                    "engine": engine,
                    "clients": clients,
                    "stages": 4 * clients + 2,
                    "processes": PROCESSES,
                    "seconds_per_stage": spread(
                        [seconds_per_stage(clients, start_attempt) for _ in range(arguments.runs)]
                    ),
                    "ray_start_seconds": round(ray_start, 1),
                    "runs": arguments.runs,
                    "cpu": cpu_model(),
                    "cores": os.cpu_count(),
                    "load_average": round(os.getloadavg()[0], 2),
                    "versions": {"ray": version("ray")},
                    "commit": commit(),
                    "command": f"python {' '.join(sys.argv)}",
                }
                print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
