"""What a hundred or a thousand clients cost on one machine: time by client, and memory that does not grow with them.

    python benchmarks/many_clients.py OUT.jsonl [--clients 8 32 128] [--size 8] [--until released]

`feddiff split` deals random images of --size pixels a side to the clients, 20 to each, `feddiff plan` plans their job
by `summary` and `feddiff run` carries it out, two processes at a time, with trainings as short as can be. With --until
the run is asked to stop when all have released, or when the shared denoiser is trained. One row per number of clients:
wall seconds, the largest peak of resident memory of the engine and of one process of any stage in MiB, the largest sum
over all stages at a time, and how many of them ran at most. Rows that OUT holds are not computed again.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from measuring import highest_memory

from feddiff.experiment import commit, cpu_model
from feddiff_protocol.errors import Interrupted

NUM_CLASSES, RECORDS, PROCESSES = 10, 20, 2
SHORTER = {
    "shared: {images: 2000000, batch: 256, replicas: 1}": "shared: {images: 25600, batch: 256, replicas: 1}",
    "personal: {images: 200000, batch: 64}": "personal: {images: 6400, batch: 64}\n  network: {baseWidth: 8}",
    "imagesPerClass: 100, steps: 20": "imagesPerClass: 4, steps: 8",
}
FEDDIFF = [sys.executable, "-m", "feddiff.main"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--clients", type=int, nargs="+", default=[8, 32, 128])
    parser.add_argument("--size", type=int, default=8)
    parser.add_argument("--until", choices=["released", "trained", "complete"], default="complete")
    arguments = parser.parse_args()
    rows = [json.loads(line) for line in arguments.out.open()] if arguments.out.exists() else []
    done = {(row["clients"], row["size"], row["until"]) for row in rows}
    for clients in arguments.clients:
        if (clients, arguments.size, arguments.until) in done:
            continue
        row = {"benchmark": "many_clients", "clients": clients, "size": arguments.size, "until": arguments.until}
        row |= measured(clients, arguments.size, arguments.until)
        row |= {"processes": PROCESSES, "cpu": cpu_model(), "cores": os.cpu_count(), "commit": commit()}
        row |= {"load_average": round(os.getloadavg()[0], 2), "command": f"python {' '.join(sys.argv)}"}
        with arguments.out.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(json.dumps(row), flush=True)


def measured(clients: int, size: int, until: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        images = np.random.default_rng(0).integers(0, 256, (clients * RECORDS, size, size), dtype=np.uint8)
        np.savez(folder / "all.npz", images=images, labels=np.arange(len(images)) % NUM_CLASSES)
        split = ["split", "all.npz", "--out", "federation", "--clients", str(clients), "--holdout", "0"]
        split_seconds = timed([*FEDDIFF, *split, "--json"], folder)
        job = folder / "federation/job.yaml"
        text = job.read_text()
        for long, short in SHORTER.items():
            assert long in text, f"`feddiff split` no longer writes {long}"
            text = text.replace(long, short)
        job.write_text(text)
        files = ["federation/owners.yaml", "federation/job.yaml"]
        plan_seconds = timed([*FEDDIFF, "plan", *files, "--json"], folder)
        return {"split_seconds": split_seconds, "plan_seconds": plan_seconds, **run(folder, files, clients, until)}


def timed(command: list[str], folder: Path) -> float:
    began = time.monotonic()
    subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL)
    return round(time.monotonic() - began, 1)


def run(folder: Path, files: list[str], clients: int, until: str) -> dict[str, Any]:
    command = [*FEDDIFF, "run", *files, "--dir", "run", "--processes", str(PROCESSES), "--json"]
    began, found = time.monotonic(), dict[str, float]()
    # Ctrl-C is what stops a run, and a shell's background jobs ignore it.
    engine = subprocess.Popen(
        command,
        cwd=folder,
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    watcher = Watcher(engine.pid)
    watcher.start()
    said, num_released, expected = list[str](), 0, 0
    assert engine.stdout is not None
    for line in engine.stdout:
        said.append(line)
        event = json.loads(line) if line.startswith("{") else {}
        ended = (event.get("event"), event.get("stage"), event.get("phase"))
        if ended == ("stage-ended", "release", "Succeeded"):
            num_released += 1
            found["released_seconds"] = round(time.monotonic() - began, 1)
        reached = {
            "released": num_released == clients and event.get("event") == "stage-started",
            "trained": ended == ("stage-ended", "train-shared", "Succeeded"),
            "complete": False,
        }
        if reached[until] and not expected:
            engine.send_signal(signal.SIGINT)
            expected = Interrupted.exit_code
    code = engine.wait()
    watcher.join()
    assert (code, num_released) == (expected, clients), "".join(said[-20:])
    return found | {
        "wall_seconds": round(time.monotonic() - began, 1),
        "released_seconds_per_client": round(found["released_seconds"] / clients, 3),
        "engine_peak_mebibytes": watcher.engine,
        "stage_peak_mebibytes": watcher.stage,
        "stages_peak_mebibytes_together": watcher.together,
        "stages_at_a_time": watcher.at_a_time,
    }


class Watcher(threading.Thread):
    """Looks at the engine and its stages until the engine is gone."""

    def __init__(self, engine: int) -> None:
        super().__init__()
        self.process = psutil.Process(engine)
        self.engine = self.stage = self.together = self.at_a_time = 0

    def run(self) -> None:
        with suppress(psutil.NoSuchProcess):  # the engine has ended
            while self.process.status() != psutil.STATUS_ZOMBIE:
                self.look()
                time.sleep(0.1)

    def look(self) -> None:
        self.engine = max(self.engine, highest_memory(self.process.pid))
        memory = []
        for process in self.process.children():  # a stage is one process here, with forks of its own for moments
            with suppress(psutil.NoSuchProcess):  # it ended while it was looked at
                if any(word.startswith("feddiff_trainer.") for word in process.cmdline()):
                    self.stage = max(self.stage, highest_memory(process.pid))
                    memory.append(process.memory_info().rss >> 20)
        self.together = max(self.together, sum(memory))
        self.at_a_time = max(self.at_a_time, len(memory))


if __name__ == "__main__":
    main()
