"""What threads gain on an idle machine, and what they lose beside one other process that wants a core.

    python benchmarks/thread_contention.py [--runs 3]

Training of the 8×8 and the 28×28 network, with one thread and with as many as there are cores, in turn, each run in a
process of its own; alone, then beside a process that does nothing but keep a core busy. One JSON row each.
"""

import argparse
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from measuring import in_a_process, spread

from feddiff.engine import usable_cores
from feddiff.experiment import commit, cpu_model
from feddiff_trainer.batches import loss_of, records
from feddiff_trainer.network import Denoiser, NetworkConfig
from feddiff_trainer.training import World, train

CLASSES, BATCH = 10, 64
NETWORKS = {8: (16, 9600), 28: (32, 640)}  # size: width, images


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=3)
    arguments = parser.parse_args()
    for beside, surroundings in (("nothing", nullcontext), ("one busy process", busy)):
        with surroundings():
            for size, (width, images) in NETWORKS.items():
                counts = (1, usable_cores())
                runs = [
                    {threads: images_per_second(size, width, images, threads) for threads in counts}
                    for _ in range(arguments.runs)
                ]
                for threads in counts:
                    print_row(size, beside, threads, [run[threads] for run in runs])


def images_per_second(size: int, width: int, images: int, threads: int) -> float:
    def training() -> None:
        torch.set_num_threads(threads)
        x0_NCHW, label_N = torch.rand(1000, 1, size, size) * 2 - 1, torch.arange(1000) % CLASSES
        train(
            Denoiser(NetworkConfig(1, size, size, CLASSES, base_width=width)),
            loss_of(records(x0_NCHW, label_N, (0.01, 150.0)), 0.5),
            world=World(0, 1, torch.device("cpu")),
            num_images=images,
            batch=BATCH,
            learning_rate=3e-3,
            ema_width=0.1,
            seed=0,
            on_progress=lambda progress: None,
        )

    wall, _, _ = in_a_process(lambda: training)
    return images / wall


@contextmanager
def busy() -> Iterator[None]:
    process = multiprocessing.get_context("fork").Process(target=keep_busy)
    process.start()
    try:
        yield
    finally:
        process.kill()
        process.join()


def keep_busy() -> None:
    while True:
        time.monotonic()


def print_row(size: int, beside: str, threads: int, speeds: list[float]) -> None:
    row = {
        "benchmark": "thread_contention",
        "size": size,
        "batch": BATCH,
        "beside": beside,
        "threads": threads,
        "images_per_second": {name: round(value) for name, value in spread(tuple(speeds)).items()},
        "runs": len(speeds),
        "cores": usable_cores(),
        "cpu": cpu_model(),
        "load_average": round(os.getloadavg()[0], 2),
        "torch": torch.__version__,
        "commit": commit(),
        "command": f"python {' '.join(sys.argv)}",
    }
    print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
