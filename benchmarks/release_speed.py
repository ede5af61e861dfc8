"""How long a release takes on one core: `python benchmarks/release_speed.py [--side 28] [--runs 5]`; JSON rows.

60,000 random images of ten classes, and of each mechanism five ways, one after the other, run after run:

- whole: from reading the IDX file to the SHA-256 of the safetensors file on disk
- feddiff: from pixels in memory to the integers that leave, noise keyed by the operating system
- numpy: the same mathematics on whole arrays, unchecked, with the noise of numpy's own generator
- numpy, secure noise: the same with feddiff's noise
- memcpy: the pixels and those integers, copied once

Before anything is timed, the plain version has to give feddiff's integers for the same noise. Every run is a process
that begins with the pixels in memory; its peak is what it takes on top of them. Before each, memory is touched: where a
virtual machine gives what is unused back to its host, the first run would pay for all.
"""

import argparse
import hashlib
import json
import math
import os
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

# One core is the claim: the libraries read this when they are imported, so it stands before them.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["OPENBLAS_NUM_THREADS"] = "1"
os.environ["MKL_NUM_THREADS"] = "1"

import numpy as np
from measuring import Work, in_a_process, spread
from safetensors.numpy import save_file
from scipy import special

from feddiff.experiment import commit, cpu_model
from feddiff_protocol.privunit import best_cap
from feddiff_trainer.mechanisms import release_gaussian_on_grid, release_summary, shuffled_order
from feddiff_trainer.noise import Normals, grid_step, os_entropy_normals, round_to_grid
from feddiff_trainer.privunit import STEP, Entropy, release_privunit_on_grid
from feddiff_trainer.records import Records, digest_records, read_records

NUM_RECORDS, NUM_CLASSES = 60_000, 10
CLIP_NORM, ALPHA, S = 4.25, 0.15, 0.99
MOMENT_CLIP_NORM, MEAN_STD, MOMENT_STD = 2.5, 4.25, 6.25
EPSILON = 10.0  # of privunit
CHECKED = 80  # records, fewer than are noised at a time
MOST_MEMORY = 2 << 30  # bytes, more than any run takes

Cells = dict[str, np.ndarray]
Release = Callable[[Records, np.ndarray, Normals, Entropy], Cells]  # records, order_N and noise to what leaves


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", type=int, default=28)
    parser.add_argument("--runs", type=int, default=5)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_idx(folder, arguments.side)
        records = read(folder, arguments.side)
        for mechanism, (ours, plain) in MECHANISMS.items():
            check_equal(ours, plain, records)
            ways = ways_of(folder, ours, plain, records)
            runs = [{way: timed(prepare) for way, prepare in ways.items()} for _ in range(arguments.runs)]
            for way in ways:
                print_row(mechanism, way, arguments.side, [run[way] for run in runs])


def write_idx(folder: Path, side: int) -> None:
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (NUM_RECORDS, side, side), dtype=np.uint8)
    labels = generator.integers(0, NUM_CLASSES, NUM_RECORDS, dtype=np.uint8)
    for path, array in ((folder / "images", images), (folder / "labels", labels)):
        sizes = b"".join(n.to_bytes(4, "big") for n in array.shape)
        path.write_bytes(bytes([0, 0, 8, array.ndim]) + sizes + array.tobytes())


def read(folder: Path, side: int) -> Records:
    records = read_records(
        "idx",
        folder / "images",
        labels_path=folder / "labels",
        channels=1,
        height=side,
        width=side,
        num_classes=NUM_CLASSES,
    )
    digest_records(records)
    return records


def ways_of(folder: Path, ours: Release, plain: Release, records: Records) -> dict[str, Callable[[], Work]]:
    """By name a function that makes ready and returns what is timed."""
    side = records.pixels_NCHW.shape[-1]

    def secure(release: Release, records: Records) -> Cells:
        return release(records, shuffled_order(len(records)), os_entropy_normals(), os.urandom)

    def numpy_alone() -> Cells:
        generator = np.random.default_rng()
        return plain(records, generator.permutation(len(records)), generator.standard_normal, generator.bytes)

    def copies() -> Work:
        sources = [records.pixels_NCHW, *secure(ours, records).values()]
        targets = [np.ones_like(source) for source in sources]
        return lambda: [np.copyto(*pair) for pair in zip(targets, sources, strict=True)]

    return {
        "whole": lambda: lambda: seal(folder, secure(ours, read(folder, side))),
        "feddiff": lambda: lambda: secure(ours, records),
        "numpy": lambda: numpy_alone,
        "numpy, secure noise": lambda: lambda: secure(plain, records),
        "memcpy": copies,
    }


def seal(folder: Path, cells: Cells) -> str:
    save_file(cells, folder / "shard")
    with (folder / "shard").open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_equal(ours: Release, plain: Release, records: Records) -> None:
    """A cell may differ by one, where a value lies between two of them."""
    few, order_N = Records(records.pixels_NCHW[:CHECKED], records.labels_N[:CHECKED]), np.arange(CHECKED)[::-1]

    def seeded(release: Release) -> Cells:
        return release(few, order_N, np.random.default_rng(1).standard_normal, np.random.default_rng(2).bytes)

    found, expected = seeded(plain), seeded(ours)
    assert found.keys() == expected.keys()
    for name, cells in expected.items():
        apart = np.abs(found[name].astype(np.int64) - cells)
        assert apart.max() <= 1 and (apart > 0).mean() < 1e-3, name


# ---- The mechanisms, as they are and plainly -----------------------------------------------------------------------


def gaussian(records: Records, order_N: np.ndarray, normals: Normals, entropy: Entropy) -> Cells:
    cells_ND = release_gaussian_on_grid(
        records, order_N, clip_norm=CLIP_NORM, non_negative=True, alpha=ALPHA, s=S, normals=normals
    )
    return {"images": cells_ND, "labels": records.labels_N[order_N].astype(np.int32)}


def plain_gaussian(records: Records, order_N: np.ndarray, normals: Normals, entropy: Entropy) -> Cells:
    x_ND = plain_pixels(records)[order_N]
    x_ND = ALPHA * (2 * plain_clip(x_ND, CLIP_NORM) - 1) + S * normals(x_ND.shape)
    return {"images": plain_cells(x_ND, grid_step(S), np.int16), "labels": records.labels_N[order_N].astype(np.int32)}


def summary(records: Records, order_N: np.ndarray, normals: Normals, entropy: Entropy) -> Cells:
    found = release_summary(
        records,
        records.labels_N,
        num_classes=NUM_CLASSES,
        mean_clip_norm=CLIP_NORM,
        moment_clip_norm=MOMENT_CLIP_NORM,
        centre=0.5,
        mean_std=MEAN_STD,
        moment_std=MOMENT_STD,
        normals=normals,
    )
    return {
        "mean_sums": round_to_grid(found.mean_sums_KD, grid_step(MEAN_STD), np.int32),
        "moment_sums": round_to_grid(found.moment_sums_KM, grid_step(MOMENT_STD), np.int32),
    }


def plain_summary(records: Records, order_N: np.ndarray, normals: Normals, entropy: Entropy) -> Cells:
    x_ND, labels_N = plain_pixels(records), records.labels_N
    counts_K = np.bincount(labels_N, minlength=NUM_CLASSES)
    of_class = [x_ND[labels_N == k] for k in range(NUM_CLASSES)]
    sums_KD = np.stack([plain_clip(x_nD, CLIP_NORM).sum(axis=0) for x_nD in of_class])
    mean_cells = plain_cells(sums_KD + MEAN_STD * normals(sums_KD.shape), grid_step(MEAN_STD), np.int32)
    means_KD = np.clip(mean_cells * grid_step(MEAN_STD) / counts_K[:, None], 0, 1)
    centres_KD = np.where(counts_K[:, None] >= 20, means_KD, 0.5)
    rows, columns = np.triu_indices(x_ND.shape[1])
    moments = []
    for x_nD, centre_D in zip(of_class, centres_KD, strict=True):
        u_nD = plain_clip(x_nD - centre_D, MOMENT_CLIP_NORM)
        moments.append((u_nD.T @ u_nD)[rows, columns] * np.where(rows == columns, 1, math.sqrt(2)))
    moments_KM = np.stack(moments)
    moment_cells = plain_cells(moments_KM + MOMENT_STD * normals(moments_KM.shape), grid_step(MOMENT_STD), np.int32)
    return {"mean_sums": mean_cells, "moment_sums": moment_cells}


def privunit(records: Records, order_N: np.ndarray, normals: Normals, entropy: Entropy) -> Cells:
    cap = best_cap(EPSILON, records.pixels_NCHW[0].size)
    cells_ND = release_privunit_on_grid(records, order_N, cap=cap, normals=normals, entropy=entropy)
    return {"directions": cells_ND, "labels": records.labels_N[order_N].astype(np.int32)}


def plain_privunit(records: Records, order_N: np.ndarray, normals: Normals, entropy: Entropy) -> Cells:
    cap = best_cap(EPSILON, records.pixels_NCHW[0].size)
    u_ND = plain_pixels(records)[order_N]
    u_ND /= np.linalg.norm(u_ND, axis=1, keepdims=True)
    coin_N, place_N = np.frombuffer(entropy(16 * len(u_ND)), np.uint64).reshape(2, -1) * 2.0**-64
    inside_N, half = coin_N < cap.probability, (cap.dimensions - 1) / 2
    # P(T ≥ t) is uniform up to the cap's share inside, P(T < t) up to the rest outside.
    tail_N = special.betaincinv(half, half, np.where(inside_N, cap.share, 1 - cap.share) * place_N)
    height_N1 = np.where(inside_N, 1 - 2 * tail_N, 2 * tail_N - 1)[:, None]
    across_ND = normals(u_ND.shape)
    across_ND -= (across_ND * u_ND).sum(axis=1, keepdims=True) * u_ND
    across_ND /= np.linalg.norm(across_ND, axis=1, keepdims=True)
    z_ND = height_N1 * u_ND + np.sqrt(1 - height_N1**2) * across_ND
    return {"directions": plain_cells(z_ND, STEP, np.int16), "labels": records.labels_N[order_N].astype(np.int32)}


def plain_pixels(records: Records) -> np.ndarray:
    return records.pixels_NCHW.reshape(len(records), -1) / 255


def plain_clip(v_ND: np.ndarray, clip_norm: float) -> np.ndarray:
    return v_ND * np.minimum(1, clip_norm / np.linalg.norm(v_ND, axis=1, keepdims=True))


def plain_cells(values: np.ndarray, step: float, dtype: type) -> np.ndarray:
    limits = np.iinfo(dtype)
    return np.clip(np.rint(values / step), limits.min, limits.max).astype(dtype)


MECHANISMS: dict[str, tuple[Release, Release]] = {
    "gaussian": (gaussian, plain_gaussian),
    "summary": (summary, plain_summary),
    "privunit": (privunit, plain_privunit),
}


# ---- Time and memory -----------------------------------------------------------------------------------------------


def timed(prepare: Callable[[], Work]) -> tuple[float, float, int]:
    np.ones(MOST_MEMORY, np.uint8)
    return in_a_process(prepare)


def print_row(mechanism: str, way: str, side: int, runs: list[tuple[float, float, int]]) -> None:
    wall, cpu, peaks = zip(*runs, strict=True)
    row = {
        "benchmark": "release_speed",
        "mechanism": mechanism,
        "way": way,
        "records": NUM_RECORDS,
        "side": side,
        "wall_seconds": spread(wall),
        "cpu_seconds": spread(cpu),
        "images_per_cpu_second": round(NUM_RECORDS / statistics.median(cpu)),
        "peak_mebibytes": max(peaks) >> 20,
        "runs": len(runs),
        "threads": 1,
        "cpu": cpu_model(),
        "load_average": round(os.getloadavg()[0], 2),
        "numpy": np.__version__,
        "commit": commit(),
        "command": f"python {' '.join(sys.argv)}",
    }
    print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
