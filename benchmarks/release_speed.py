"""How long a release takes on one core: `python benchmarks/release_speed.py [--runs 5]`; one JSON row per line.

`gaussian`: 60,000 random 28×28 images, from reading the IDX file to the SHA-256 of the int16 safetensors file on disk.
`summary`: the same records, and 14×14 ones, as ten classes' noisy sums and second moments in int32.
"""

import argparse
import hashlib
import json
import os
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

# One core is the claim: the libraries read this when they are imported, so it stands before them.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["OPENBLAS_NUM_THREADS"] = "1"
os.environ["MKL_NUM_THREADS"] = "1"

import numpy as np
from safetensors.numpy import save_file

from feddiff.experiment import commit, cpu_model
from feddiff_trainer.mechanisms import release_gaussian_on_grid, release_summary, shuffled_order
from feddiff_trainer.noise import grid_step, os_entropy_normals, round_to_grid
from feddiff_trainer.records import Records, digest_records, read_records

NUM_RECORDS, NUM_CLASSES = 60_000, 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=5)
    num_runs = parser.parse_args().runs
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for side in (28, 14):
            write_idx(folder, side)
            print_row("gaussian", side, num_runs, lambda side=side: gaussian(folder, side))
            print_row("summary", side, num_runs, lambda side=side: summary(folder, side))


def write_idx(folder: Path, side: int) -> None:
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (NUM_RECORDS, side, side), dtype=np.uint8)
    labels = generator.integers(0, NUM_CLASSES, NUM_RECORDS, dtype=np.uint8)
    for path, array in ((folder / f"images-{side}", images), (folder / f"labels-{side}", labels)):
        sizes = b"".join(n.to_bytes(4, "big") for n in array.shape)
        path.write_bytes(bytes([0, 0, 8, array.ndim]) + sizes + array.tobytes())


def read(folder: Path, side: int) -> Records:
    records = read_records(
        "idx",
        folder / f"images-{side}",
        labels_path=folder / f"labels-{side}",
        channels=1,
        height=side,
        width=side,
        num_classes=NUM_CLASSES,
    )
    digest_records(records)
    return records


def gaussian(folder: Path, side: int) -> str:
    records = read(folder, side)
    order_N = shuffled_order(len(records))
    cells_ND = release_gaussian_on_grid(
        records, order_N, clip_norm=4.25, non_negative=True, alpha=0.15, s=0.99, normals=os_entropy_normals()
    )
    return seal(folder, {"images": cells_ND, "labels": records.labels_N[order_N].astype(np.int32)})


def summary(folder: Path, side: int) -> str:
    records, mean_std, moment_std = read(folder, side), 4.25, 6.25
    released = release_summary(
        records,
        records.labels_N,
        num_classes=NUM_CLASSES,
        mean_clip_norm=4.25,
        moment_clip_norm=2.5,
        centre=0.5,
        mean_std=mean_std,
        moment_std=moment_std,
        normals=os_entropy_normals(),
    )
    mean_cells_KD = round_to_grid(released.mean_sums_KD, grid_step(mean_std), np.int32)
    moment_cells_KM = round_to_grid(released.moment_sums_KM, grid_step(moment_std), np.int32)
    return seal(folder, {"mean_sums": mean_cells_KD, "moment_sums": moment_cells_KM})


def seal(folder: Path, tensors: dict[str, np.ndarray]) -> str:
    save_file(tensors, folder / "shard")
    with (folder / "shard").open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def print_row(mechanism: str, side: int, num_runs: int, release: Callable[[], str]) -> None:
    wall, cpu = [], []
    for _ in range(num_runs):
        wall_start, cpu_start = time.perf_counter(), time.process_time()
        release()
        wall.append(time.perf_counter() - wall_start)
        cpu.append(time.process_time() - cpu_start)
    row = {
        "benchmark": "release_speed",
        "mechanism": mechanism,
        "records": NUM_RECORDS,
        "side": side,
        "wall_seconds": spread(wall),
        "cpu_seconds": spread(cpu),
        "runs": num_runs,
        "threads": 1,
        "peak_mebibytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        "cpu": cpu_model(),
        "load_average": round(os.getloadavg()[0], 2),
        "numpy": np.__version__,
        "commit": commit(),
        "command": f"python {' '.join(sys.argv)}",
    }
    print(json.dumps(row), flush=True)


def spread(seconds: list[float]) -> dict[str, float]:
    return {
        "min": round(min(seconds), 3),
        "median": round(statistics.median(seconds), 3),
        "max": round(max(seconds), 3),
    }


if __name__ == "__main__":
    main()
