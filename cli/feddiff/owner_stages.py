"""Single processes of the trainer that an owner asks for outside a run: checking records, drawing more samples."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from feddiff_protocol.api import FederatedDiffusionJob, parse
from feddiff_protocol.errors import (
    FINAL_EXIT_CODES,
    RETRIED_EXIT_CODES,
    FeddiffError,
    InputMissing,
    OutputFailed,
    UsageInvalid,
)
from feddiff_protocol.plan import StageKey
from feddiff_protocol.stages import Receipt, SampleSpec, Stage

from .documents import LocalDataset
from .processes import RECEIPT_VARIABLE
from .run_folder import RunFolder

CHECK_MODULE = "feddiff_trainer.check"


class StageFailed(FeddiffError):
    """A process of the trainer ended with words and a code of its own."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def check_records(dataset: LocalDataset, job: FederatedDiffusionJob | None) -> dict[str, Any]:
    """What the owner should know about the records before they are offered. Private to the owner."""
    spec: dict[str, Any] = {
        "source": dataset.source.to_wire(),
        "image": dataset.document.spec.image.to_wire(),
        "classes": dataset.document.spec.classes.to_wire(),
    }
    if job is not None:
        spec |= {"privacy": job.spec.privacy.to_wire()}
    with tempfile.TemporaryDirectory(prefix="feddiff-") as folder:
        path = Path(folder) / "spec.json"
        path.write_text(json.dumps(spec))
        answer: dict[str, Any] = json.loads(run_module(CHECK_MODULE, path))
    return answer


def draw_samples(folder: RunFolder, client: str, images_per_class: int, out: Path) -> None:
    """`out` holds further samples, drawn with a finished run's denoisers for one owner. Private to that owner."""
    if out.suffix != ".npz":
        raise UsageInvalid(f"--out: expected a file that ends in .npz, found {out}")
    if out.exists():
        raise OutputFailed(f"--out: {out} exists; name a new file")
    if not out.resolve().parent.is_dir():
        raise OutputFailed(f"--out: {out.resolve().parent} is no folder; make it first")
    known = [each.name for each in folder.record().job.spec.clients]
    if client not in known:
        raise UsageInvalid(f"--client: expected one of {', '.join(known)}, found {client}")
    spec = _finished_sample_spec(folder, client)
    sampling = spec.sampling.to_wire() | {"imagesPerClass": images_per_class}
    changed = spec.to_wire() | {"sampling": sampling, "output": str(out.resolve())}
    checked = parse(SampleSpec, changed, "--images-per-class")
    with tempfile.TemporaryDirectory(prefix="feddiff-") as temporary:
        path = Path(temporary) / "spec.json"
        path.write_text(json.dumps(checked.to_wire()))
        run_module(Stage.SAMPLE.module, path)


def _finished_sample_spec(folder: RunFolder, client: str) -> SampleSpec:
    """The spec with which the run drew its own samples."""
    key: StageKey = (Stage.SAMPLE, client)
    attempt, record = folder.newest_attempt(key), folder.record()
    done: Receipt | None = folder.receipt(key, attempt, record.uid)
    if done is None:
        raise InputMissing(
            f"{folder.path}: client {client} has no samples yet; `feddiff run` with this --dir draws them"
        )
    path = folder.attempt_folder(key, attempt) / "spec.json"
    return parse(SampleSpec, json.loads(path.read_text()), str(path))


def run_module(module: str, spec: Path) -> str:
    """stdout of one process of the trainer. Raises StageFailed with its last words and its code."""
    environment = {**os.environ, RECEIPT_VARIABLE: str(spec.with_name("receipt.json"))}
    command = [sys.executable, "-m", module, str(spec)]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, env=environment)
    if done.returncode == 0:
        return done.stdout
    lines = [line for line in done.stderr.splitlines() if line.strip() and not line.startswith("{")]
    known = done.returncode in FINAL_EXIT_CODES | RETRIED_EXIT_CODES
    words = lines[-1].removeprefix("feddiff: ") if known and lines else "\n".join(lines) or "no message"
    raise StageFailed(words, done.returncode if known else 1)


def check_lines(answer: dict[str, Any]) -> list[str]:
    """The answer of `check_records` in words."""
    low, high = answer["pixelRange"]
    lines = [f"{answer['records']} records, pixels from {low:.4g} to {high:.4g}"]
    for each in answer["classes"]:
        if each["found"] != each["declared"]:
            lines.append(
                f"class {each['class']}: declared {each['declared']} records, found {each['found']}; correct it"
            )
    if all(each["found"] == each["declared"] for each in answer["classes"]):
        lines.append("every class holds as many records as declared")
    quantiles = ", ".join(f"{share} {value:.4g}" for share, value in answer["normQuantiles"].items())
    lines.append(f"Euclidean norms (pixels in [0, 1]), quantiles: {quantiles}")
    for clip in answer["clips"]:
        raised = f" and {clip['raised']} up" if "raised" in clip else ""
        touched = f"{clip['touched']} of {answer['records']} images down{raised}"
        lines.append(f"{clip['field']} {clip['norm']} would scale {touched}")
    if released := answer.get("released"):
        shapes = ", ".join(f"{name} {'×'.join(map(str, shape))}" for name, shape in released["tensors"].items())
        lines.append(f"a release would hold {shapes} ({released['bytes']:,} bytes)")
    return lines
