"""The federation of examples/digits as files that go to `feddiff run` and to `kubectl apply` alike, and how far the
results of two runs may lie apart.

    python tests/digits_federation.py OUT.jsonl [--runs 5] [--images N]

runs them on this machine, each time with records, ledgers and a run's folder of its own, and appends a row per run
with what the owners' evaluations say. All seeds are fixed but one: the noise of the releases is the operating system's,
so it is what the runs differ by. --images cuts the trainings short.
"""

import argparse
import hashlib
import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from scipy.stats import t as students

from cluster.federation import RESEARCH, SYSTEM
from cluster.reliability import hardware
from feddiff.documents import LocalJob, load_job
from feddiff.experiment import commit
from feddiff.owner import owner_documents
from feddiff.run_folder import RunFolder
from feddiff_protocol import layout
from feddiff_trainer.evaluation import Evaluation

ROOT = Path(__file__).parents[1]
EXAMPLE = ROOT / "examples/digits"
ROWS = ROOT / "benchmarks/results/digits_local_runs.jsonl"
OWNERS = ("clinic-a", "clinic-b", "clinic-c")
CLIENTS = {owner: owner[-1] for owner in OWNERS}
NAME = "digits-summary"
END = "---\n"  # of a document
# Arm, group of classes, measure: each a mean over the owners.
FIGURES = (
    ("both", "minority", "recall"),
    *((arm, "all", "recall") for arm in ("both", "shared")),
    *((arm, "pooled", measure) for arm in ("both", "shared") for measure in ("coverage", "frechet")),
)
CHANCE = 0.001  # that a figure of a run like the others is taken for one that is not
Row = dict[str, Any]


# ---- The files -------------------------------------------------------------------------------------------------


def write_files(folder: Path) -> tuple[Path, Path]:
    """What the owners apply and the researcher's job, word for word that of examples/digits, beside the records."""
    subprocess.run([sys.executable, EXAMPLE / "make_digits.py", folder], check=True)
    datasets = (EXAMPLE / "owners.yaml").read_text().split(END)
    owners, job = folder / "owners.yaml", folder / "job.yaml"
    owners.write_text(END.join(applied_by(owner, dataset) for owner, dataset in zip(OWNERS, datasets, strict=True)))
    job.write_text((EXAMPLE / "summary.yaml").read_text())
    return owners, job


def applied_by(owner: str, dataset: str) -> str:
    """What `feddiff owner init` prints, with the owner's own dataset in place of the one to fill in, the last."""
    return END.join([*owner_documents(owner, SYSTEM, [RESEARCH], "scans").split(END)[:-1], dataset])


def cut_short(job: Path, images: int) -> None:
    """Both trainings of the job see so many images."""
    text = job.read_text()
    assert text.count("images: 200000") == 2
    job.write_text(text.replace("images: 200000", f"images: {images}"))


def digest_of(job: LocalJob) -> str:
    """Of all that the files say on which a result depends: rows of another job are not compared."""
    spec = job.document.spec
    shared = spec.shared.model_copy(update={"pod_template": {}})
    counts = [dataset.document.spec.classes for dataset in job.datasets.values()]
    parts = [spec.privacy, spec.diffusion, spec.network, shared, spec.personal, spec.sampling, *counts]
    text = json.dumps([part.model_dump(mode="json", exclude_unset=True) for part in parts], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


# ---- What is compared ------------------------------------------------------------------------------------------


def figures_of(evaluations: Iterable[Evaluation]) -> dict[str, float]:
    """The mean over owners of every figure."""
    evaluations = list(evaluations)
    found = {}
    for arm, group, measure in FIGURES:
        values = [each.arms[arm].groups[group][measure] for each in evaluations]
        found[f"{arm} {group} {measure}"] = mean(value for value in values if value is not None)
    return found


def rows_of(job: LocalJob, file: Path = ROWS) -> list[Row]:
    """The committed runs of this job."""
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    return [row for row in rows if row["job"] == digest_of(job)]


def outside(figures: Mapping[str, float], rows: Sequence[Row]) -> list[str]:
    """The figures that one more run like these n would hardly have: by Student's prediction interval,
    mean ± t(n - 1) · s · √(1 + 1/n), it has a figure outside of it with a probability of CHANCE."""
    found = []
    for name, value in figures.items():
        known = [row["figures"][name] for row in rows]
        middle = mean(known)
        margin = students.ppf(1 - CHANCE / 2, len(known) - 1) * stdev(known) * math.sqrt(1 + 1 / len(known))
        if not abs(value - middle) <= margin:
            found.append(f"{name}: {value:.4g}, {len(known)} local runs have {middle:.4g} ± {margin:.2g}")
    return found


# ---- Runs on this machine --------------------------------------------------------------------------------------


def run(folder: Path, images: int | None) -> Row:
    """One run and what it led to."""
    owners, file = write_files(folder)
    if images is not None:
        cut_short(file, images)
    job = load_job([owners, file])
    command = [sys.executable, "-m", "feddiff.main", "run", owners, file, "--dir", folder / "run"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    uid = RunFolder(folder / "run").record().uid
    evaluations = [
        Evaluation.model_validate_json((dataset.owner_folder / "store" / layout.evaluation(uid, client)).read_bytes())
        for client, dataset in job.datasets.items()
    ]
    spec = job.document.spec
    return {
        "benchmark": "digits_local_runs",
        "job": digest_of(job),
        "images": spec.shared.images,
        "figures": {name: round(value, 5) for name, value in figures_of(evaluations).items()},
        "commit": commit(),
        "hardware": hardware(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--images", type=int, help="of both trainings, instead of the job's")
    arguments = parser.parse_args()
    for _ in range(arguments.runs):
        with tempfile.TemporaryDirectory() as name:
            row = run(Path(name), arguments.images)
        with arguments.out.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
