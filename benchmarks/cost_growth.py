"""How a job's cost grows with records, clients and steps: whole local runs, one JSON row per run and stage.

    python benchmarks/cost_growth.py OUT.jsonl

Random 14×14 images of ten classes; one of records per client (1,000), clients (2) and image-steps of a network (16,000)
is raised at a time, for `gaussian` the records alone. Twenty minutes on 2 cores. A row has the longest of a stage's
clients in seconds, as receipts say, start of Python and import of torch (about 2 s) included; the largest peak of
resident memory of one process, in MiB; and the whole run's wall seconds. Rows that OUT holds are not computed again.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import yaml

sys.path.insert(0, str(Path(__file__).parent))
from measuring import highest_memory

from feddiff.experiment import commit, cpu_model

SIDE, NUM_CLASSES = 14, 10
BASE = {"records": 1_000, "clients": 2, "images": 16_000}
RAISED = {"records": (8_000, 64_000), "clients": (4, 8), "images": (64_000, 256_000)}
MECHANISMS: dict[str, dict[str, Any]] = {
    "summary": {"privacy": {"momentClipNorm": "2.5"}, "diffusion": {"splitSigma": "2"}},
    "gaussian": {"privacy": {}, "diffusion": {}},
}
COSTS_OF = {"summary": RAISED, "gaussian": {"records": RAISED["records"]}}


def configurations(mechanism: str) -> list[dict[str, int]]:
    return [BASE, *(BASE | {name: value} for name, values in COSTS_OF[mechanism].items() for value in values)]


def documents(folder: Path, mechanism: str, size: dict[str, int]) -> list[dict[str, Any]]:
    """The job and its datasets, whose records are written into `folder`."""
    names = [f"c{number}" for number in range(size["clients"])]
    per_class, own = size["records"] // NUM_CLASSES, MECHANISMS[mechanism]
    generator = np.random.default_rng(0)
    labels_N = np.repeat(np.arange(NUM_CLASSES), per_class)
    for name in names:
        images = generator.integers(0, 256, (len(labels_N), SIDE, SIDE), dtype=np.uint8)
        np.savez(folder / f"{name}.npz", images=images, labels=labels_N)
    kind = {"apiVersion": "feddiff.dev/v1alpha1"}
    datasets = [
        kind
        | {
            "kind": "PrivateDataset",
            "metadata": {"name": name, "namespace": name},
            "spec": {
                "source": {"format": "npz", "path": f"{name}.npz", "holdoutPath": f"{name}.npz"},
                "image": {"channels": 1, "height": SIDE, "width": SIDE},
                "classes": {"count": NUM_CLASSES, "records": [per_class] * NUM_CLASSES},
                "budget": {"epsilon": "10", "delta": "1e-5"},
                "access": [{"namespace": "research"}],
            },
        }
        for name in names
    ]
    length = {"images": size["images"], "batch": 256}
    job = {
        "clients": [{"name": name, "dataset": {"namespace": name, "name": name}} for name in names],
        "privacy": {"mechanism": mechanism, "epsilon": "10", "delta": "1e-5", "clipNorm": "6"} | own["privacy"],
        "diffusion": own["diffusion"],
        "network": {"baseWidth": 16},
        "shared": length | {"replicas": 1},
        "personal": length,
        "sampling": {"imagesPerClass": 20},
    }
    metadata = {"name": "cost", "namespace": "research"}
    return [*datasets, kind | {"kind": "FederatedDiffusionJob", "metadata": metadata, "spec": job}]


def watch(run: subprocess.Popen[str], peaks: dict[str, int]) -> None:
    """Largest peak of every stage's processes, for as long as the run goes on."""
    while run.poll() is None:
        try:
            for process in psutil.Process(run.pid).children(recursive=True):
                words = [word for word in process.cmdline() if word.startswith("feddiff_trainer.")]
                stage = words[0].removeprefix("feddiff_trainer.").replace("_", "-") if words else None
                if stage:
                    peaks[stage] = max(peaks.get(stage, 0), highest_memory(process.pid))
        except psutil.Error:  # it ended while it was looked at
            pass
        time.sleep(0.05)


def measure(mechanism: str, size: dict[str, int]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as name:
        folder, peaks = Path(name), dict[str, int]()
        (folder / "job.yaml").write_text(yaml.safe_dump_all(documents(folder, mechanism, size)))
        command = [sys.executable, "-m", "feddiff.main", "run", "job.yaml", "--dir", "run", "--json"]
        began = time.monotonic()
        run = subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        watcher = threading.Thread(target=watch, args=(run, peaks))
        watcher.start()
        _, said = run.communicate()
        watcher.join()
        if run.returncode:
            sys.exit(f"{mechanism} {size}: {said[-2000:]}")
        seconds: dict[str, float] = {}
        for path in (folder / "run").glob("stages/*/*/receipt.json"):
            receipt = json.loads(path.read_text())
            seconds[receipt["stage"]] = max(seconds.get(receipt["stage"], 0.0), receipt["milliseconds"] / 1000)
        return {"seconds": seconds, "peakMebibytes": peaks, "wallSeconds": round(time.monotonic() - began, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    out = parser.parse_args().out
    rows = [json.loads(line) for line in out.open()] if out.exists() else []
    done = [(row["mechanism"], {name: row[name] for name in BASE}) for row in rows]
    for mechanism in MECHANISMS:
        for size in configurations(mechanism):
            if (mechanism, size) not in done:
                row = {"benchmark": "cost_growth", "mechanism": mechanism, **size, **measure(mechanism, size)}
                row |= {"cpu": cpu_model(), "cores": os.cpu_count(), "commit": commit()}
                with out.open("a") as file:
                    file.write(json.dumps(row) + "\n")
                print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
