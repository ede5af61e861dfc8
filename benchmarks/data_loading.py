"""How fast records are read, per format: `python benchmarks/data_loading.py [--records 10000] [--runs 3]`; JSON rows.

Random images, 28×28 grey and 64×64 in colour, each format in a process of its own: images per second of processor
time, which other work on the machine disturbs least, from the files until all are checked and hashed, then of one more
pass over them as float64. `memmap` is that pass over raw bytes that are mapped into memory, without any check: what no
format can beat.

`--release 100000` instead lets the stage release a folder of so many 28×28 PNG files, by `gaussian` and by `summary`:
processor time, highest memory, and how often it told its progress.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

# One core is the claim: the libraries read this when they are imported, so it stands before them.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["OPENBLAS_NUM_THREADS"] = "1"
os.environ["MKL_NUM_THREADS"] = "1"

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from measuring import highest_memory
from PIL import Image

from feddiff.experiment import commit, cpu_model
from feddiff_protocol import layout
from feddiff_trainer.records import Records, digest_records, read_records

SHAPES = ((1, 28, 28), (3, 64, 64))
FORMATS = ("memmap", "npz", "idx", "folder of PNG", "folder of JPEG", "parquet")
NUM_CLASSES, ROWS = 10, 1024
UID = "uid-00000001"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, default=10_000)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--release", type=int, help="images in the folder to be released")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        folder, kind = arguments.one
        print(json.dumps(loading(Path(folder), kind, arguments.records, arguments.runs)))
        return
    with tempfile.TemporaryDirectory() as name:
        if arguments.release:
            write_folder(Path(name) / "scans", random_images((1, 28, 28), arguments.release), "PNG")
            for mechanism in ("gaussian", "summary"):
                print_row(releasing(Path(name), mechanism, arguments.release))
            return
        for shape_CHW in SHAPES:
            folder = Path(name) / "x".join(map(str, shape_CHW))
            write_all(folder, random_images(shape_CHW, arguments.records))
            for kind in FORMATS:
                sizes = ["--records", str(arguments.records), "--runs", str(arguments.runs)]
                command = [sys.executable, __file__, "--one", folder, kind, *sizes]
                print_row(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))


def print_row(row: dict[str, object]) -> None:
    about = {
        "cpu": cpu_model(),
        "load_average": round(os.getloadavg()[0], 2),
        "commit": commit(),
        "command": f"python {' '.join(sys.argv)}",
    }
    print(json.dumps({"benchmark": "data_loading", **row, **about}), flush=True)


# ---- The files -------------------------------------------------------------------------------------------------------


def random_images(shape_CHW: tuple[int, int, int], num_records: int) -> np.ndarray:
    """images_NHWC: coarse noise, enlarged, so that they compress as pictures do rather than not at all."""
    channels, height, width = shape_CHW
    coarse = np.random.default_rng(0).integers(0, 256, (num_records, height // 4, width // 4, channels), dtype=np.uint8)
    return coarse.repeat(4, axis=1).repeat(4, axis=2)


def labels_of(num_records: int) -> np.ndarray:
    return np.arange(num_records) * NUM_CLASSES // num_records


def write_all(folder: Path, images_NHWC: np.ndarray) -> None:
    folder.mkdir()
    labels_N = labels_of(len(images_NHWC))
    images_NCHW = np.ascontiguousarray(images_NHWC.transpose(0, 3, 1, 2))
    images_NCHW.tofile(folder / "raw")
    np.savez(folder / "records.npz", images=images_NCHW, labels=labels_N)
    for name, array in (("images", images_NCHW.squeeze(1) if images_NCHW.shape[1] == 1 else images_NCHW),
                        ("labels", labels_N.astype(np.uint8))):  # fmt: skip
        sizes = b"".join(n.to_bytes(4, "big") for n in array.shape)
        (folder / name).write_bytes(bytes([0, 0, 8, array.ndim]) + sizes + array.tobytes())
    for kind in ("PNG", "JPEG"):
        write_folder(folder / kind, images_NHWC, kind)
    encoded = [path.read_bytes() for path in sorted((folder / "PNG").rglob("*.png"))]
    table = pa.table({"image": [{"bytes": each} for each in encoded], "label": labels_N})
    pq.write_table(table, folder / "records.parquet", row_group_size=1000)


def write_folder(folder: Path, images_NHWC: np.ndarray, kind: str) -> None:
    for row, (image_HWC, label) in enumerate(zip(images_NHWC, labels_of(len(images_NHWC)), strict=True)):
        path = folder / str(label) / f"{row:06}.{kind.lower()}"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image_HWC[..., 0] if image_HWC.shape[2] == 1 else image_HWC).save(path, kind)


# ---- Loading ---------------------------------------------------------------------------------------------------------


def loading(folder: Path, kind: str, num_records: int, num_runs: int) -> dict[str, object]:
    """Images per second of processor time; run in a process of its own, whose highest memory is told, too."""
    shape_CHW = tuple(map(int, folder.name.split("x")))
    checked, passed = [], []
    for _ in range(num_runs):
        began = time.process_time()
        if kind == "memmap":
            pixels = np.memmap(folder / "raw", np.uint8, "r", shape=(num_records, *shape_CHW))
            records = Records(pixels, labels_of(num_records))
        else:
            records = opened(folder, kind, shape_CHW)
            digest_records(records)
        read = time.process_time()
        for start in range(0, num_records, ROWS):
            records[start : start + ROWS]
        checked.append(num_records / (read - began))
        passed.append(num_records / (time.process_time() - read))
    return {
        "format": kind,
        "shape": folder.name,
        "records": num_records,
        "runs": num_runs,
        "checked_per_second": None if kind == "memmap" else spread(checked),
        "pass_per_second": spread(passed),
        "peak_mebibytes": highest_memory("self"),
    }


def opened(folder: Path, kind: str, shape_CHW: tuple[int, ...]) -> Records:
    name, _, files = kind.partition(" of ")
    paths = {"npz": "records.npz", "idx": "images", "parquet": "records.parquet", "folder": files}
    channels, height, width = shape_CHW
    return read_records(
        name,
        folder / paths[name],
        labels_path=folder / "labels" if name == "idx" else None,
        channels=channels,
        height=height,
        width=width,
        num_classes=NUM_CLASSES,
    )


def spread(values: list[float]) -> dict[str, int]:
    return {"min": round(min(values)), "median": round(statistics.median(values)), "max": round(max(values))}


# ---- A release -------------------------------------------------------------------------------------------------------


def releasing(folder: Path, mechanism: str, num_records: int) -> dict[str, object]:
    moments = {"momentClipNorm": "8"} if mechanism == "summary" else {}
    spec = {
        "job": {"uid": UID, "name": "loading", "namespace": "research"},
        "attempt": 1,
        "client": "a",
        "release": layout.release_name(UID, "a", "dataset"),
        "source": {"format": "folder", "path": str(folder / "scans")},
        "image": {"channels": 1, "height": 28, "width": 28},
        "classes": {"count": NUM_CLASSES, "records": np.bincount(labels_of(num_records)).tolist()},
        "privacy": {"mechanism": mechanism, "epsilon": "10", "delta": "1e-5", "clipNorm": "12", **moments},
        "diffusion": {"splitSigma": "0.25"} if moments else {},
        "ownerStore": f"file://{folder}/{mechanism}/owner",
        "federationStore": f"file://{folder}/{mechanism}/federation",
    }
    (folder / "spec.json").write_text(json.dumps(spec))
    environment = {**os.environ, "FEDDIFF_TERMINATION_LOG": str(folder / "receipt.json")}
    process = subprocess.Popen(
        [sys.executable, "-m", "feddiff_trainer.release", folder / "spec.json"],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    assert process.stderr is not None
    told, highest = [], 0
    for line in process.stderr:
        told.append(json.loads(line))
        highest = max(highest, highest_memory(process.pid))
    _, status, usage = os.wait4(process.pid, 0)
    assert status == 0 and told[-1]["done"] == num_records
    return {
        "format": "folder of PNG",
        "mechanism": mechanism,
        "records": num_records,
        "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 1),
        "peak_mebibytes": highest,
        "progress_lines": len(told),
    }


if __name__ == "__main__":
    main()
