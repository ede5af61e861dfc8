"""Single processes of the trainer that somebody asks for outside a run: checking records, drawing more samples,
attacking what a run left, passing it on."""

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
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
from feddiff_protocol.stages import Receipt, SampleSpec, Stage, TrainSharedSpec

from .documents import LocalDataset
from .processes import RECEIPT_VARIABLE, json_object
from .run_folder import RunFolder

CHECK_MODULE, AUDIT_MODULE, EXPORT_MODULE = "feddiff_trainer.check", "feddiff_trainer.audit", "feddiff_trainer.export"
SHARED_EXPORT_MODULE = "feddiff_trainer.export_shared"
LICENCE = r"[A-Za-z0-9][A-Za-z0-9.+-]{0,63}"
Told = Callable[[int, int], None]  # done, total


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
    _check_new_file(out, ".npz")
    spec = finished_sample_spec(folder, *clients_of(folder, client))
    sampling = spec.sampling.to_wire() | {"imagesPerClass": images_per_class}
    changed = spec.to_wire() | {"sampling": sampling, "output": str(out.resolve())}
    checked = parse(SampleSpec, changed, "--images-per-class")
    with tempfile.TemporaryDirectory(prefix="feddiff-") as temporary:
        path = Path(temporary) / "spec.json"
        path.write_text(json.dumps(checked.to_wire()))
        run_module(Stage.SAMPLE.module, path)


def audit_run(folder: RunFolder, client: str, told: Told) -> dict[str, Any]:
    """What attacks find in one owner's run. Private to that owner, in whose store and report it now is."""
    spec = finished_sample_spec(folder, client)
    with tempfile.TemporaryDirectory(prefix="feddiff-") as temporary:
        path = Path(temporary) / "spec.json"
        path.write_text(json.dumps(spec.to_wire()))
        answer: dict[str, Any] = json.loads(run_module(AUDIT_MODULE, path, told))
    return answer


def export_result(folder: RunFolder, what: str, client: str, out: Path, override: str) -> dict[str, Any]:
    """`out` holds a copy of the owner's personal denoiser or its samples, and the owner's store says so."""
    suffix = {"denoiser": ".safetensors", "samples": ".npz"}[what]
    _check_new_file(out, suffix)
    spec = finished_sample_spec(folder, *clients_of(folder, client))
    asked = {"run": spec.to_wire(), "what": what, "out": str(out.resolve()), "override": override}
    with tempfile.TemporaryDirectory(prefix="feddiff-") as temporary:
        path = Path(temporary) / "spec.json"
        path.write_text(json.dumps(asked))
        answer: dict[str, Any] = json.loads(run_module(EXPORT_MODULE, path))
    return answer


def export_shared_denoiser(folder: RunFolder, out: Path, licence: str) -> TrainSharedSpec:
    """`out` is a folder with the run's shared denoiser that loads without feddiff; the spec that trained it."""
    if not re.fullmatch(LICENCE, licence):
        raise UsageInvalid(f"--license: expected an identifier like cc-by-4.0, found {licence!r}")
    _check_new(out, "folder")
    key: StageKey = (Stage.TRAIN_SHARED, "")
    spec_path, done = _finished(folder, key, "no shared denoiser yet; `feddiff run` with this --dir trains it")
    spec = parse(TrainSharedSpec, json.loads(spec_path.read_text()), str(spec_path))
    asked = {
        "run": spec.to_wire(),
        "sharedDenoiserSha256": done.outputs["denoiser"],
        "classNames": folder.record().datasets[0].spec.classes.names,
        "licence": licence,
        "out": str(out.resolve()),
    }
    with tempfile.TemporaryDirectory(prefix="feddiff-") as temporary:
        path = Path(temporary) / "spec.json"
        path.write_text(json.dumps(asked))
        run_module(SHARED_EXPORT_MODULE, path)
    return spec


def _check_new_file(out: Path, suffix: str) -> None:
    if out.suffix != suffix:
        raise UsageInvalid(f"--out: expected a file that ends in {suffix}, found {out}")
    _check_new(out, "file")


def _check_new(out: Path, what: str) -> None:
    if out.exists():
        raise OutputFailed(f"--out: {out} exists; name a new {what}")
    if not out.resolve().parent.is_dir():
        raise OutputFailed(f"--out: {out.resolve().parent} is no folder; make it first")


def clients_of(folder: RunFolder, client: str | None) -> list[str]:
    """The client that was asked for, or all of the run's. Raises UsageInvalid for one that it does not have."""
    known = [each.name for each in folder.record().job.spec.clients]
    if client is None:
        return known
    if client not in known:
        raise UsageInvalid(f"--client: expected one of {', '.join(known)}, found {client}")
    return [client]


def finished_sample_spec(folder: RunFolder, client: str) -> SampleSpec:
    """The spec with which the run drew its own samples."""
    missing = f"client {client} has no samples yet; `feddiff run` with this --dir draws them"
    path, _ = _finished(folder, (Stage.SAMPLE, client), missing)
    return parse(SampleSpec, json.loads(path.read_text()), str(path))


def _finished(folder: RunFolder, key: StageKey, missing: str) -> tuple[Path, Receipt]:
    """Where the spec of a finished stage is, and its receipt. Raises InputMissing, with the words of `missing`."""
    attempt = folder.newest_attempt(key)
    done = folder.receipt(key, attempt, folder.record().uid)
    if done is None:
        raise InputMissing(f"{folder.path}: {missing}")
    return folder.attempt_folder(key, attempt) / "spec.json", done


def run_module(module: str, spec: Path, told: Told = lambda done, total: None) -> str:
    """stdout of one process of the trainer; its progress is `told`. Raises StageFailed with its last words and code."""
    environment = {**os.environ, RECEIPT_VARIABLE: str(spec.with_name("receipt.json"))}
    command = [sys.executable, "-m", module, str(spec)]
    with (
        spec.with_name("stdout").open("w+") as stdout,
        subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=stdout, stderr=subprocess.PIPE, text=True, env=environment
        ) as process,
    ):
        assert process.stderr is not None
        lines = list(_without_progress(process.stderr, told))
        code = process.wait()
        stdout.seek(0)
        answer = stdout.read()
    if code == 0:
        return answer
    known = code in FINAL_EXIT_CODES | RETRIED_EXIT_CODES
    words = lines[-1].removeprefix("feddiff: ") if known and lines else "\n".join(lines) or "no message"
    raise StageFailed(words, code if known else 1)


def _without_progress(stderr: Iterable[str], told: Told) -> Iterator[str]:
    """The lines that are no events; those of progress are told at once."""
    for line in stderr:
        if event := json_object(line.encode()):
            if event.get("event") == "progress":
                told(event["done"], event["total"])
        elif line.strip():
            yield line.rstrip("\n")


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
    if "inception" in answer:
        lines.append(f"FID and KID would be measured by {answer['inception']}")
    return lines


# ---- The answer of an audit in words ---------------------------------------------------------------------------


def audit_rows(answer: dict[str, Any]) -> list[list[str]]:
    """A row per attack, under AUDIT_COLUMNS."""
    return [
        [
            each["target"],
            each["attack"] + (", minority" if each["group"] == "minority" else ""),
            f"{each['members']} + {each['others']}",
            "{value:.3f} ({low:.3f} to {high:.3f})".format(**each["auc"]),
            f"{each['aucBound']:.3f}",
            "{value:.1%} ({low:.1%} to {high:.1%})".format(**each["tpr"]) if "tpr" in each else "",
            f"{each['tprBound']:.1%}" if "tprBound" in each else "",
            f"{each['controlAuc']:.2f}",
            each["verdict"],
        ]
        for each in answer["findings"]
    ]


ABOVE = "above its bound"  # feddiff_trainer.findings.Verdict.ABOVE, as the answer says it
AUDIT_COLUMNS = ("target", "attack", "records", "AUC", "bound", "found at 1 %", "bound", "control", "verdict")


def audit_lines(answer: dict[str, Any]) -> list[str]:
    """What follows the table."""
    lines = [
        "one run on {target}, {attack}: {correct} of {guesses} guesses right, ε ≥ {epsilonLow:.2f} per image at"
        " δ = {delta:g} and k = 1 release; bound {epsilonBound:.2f}, could show {ceiling:.2f}, control"
        " {controlAuc:.2f}: {verdict}".format(**each)
        for each in answer["oneRun"]
    ]
    if rebuilt := answer.get("reconstruction"):
        lines.append(
            "reconstruction: what is released is nearer to its image than to another of its class in {value:.1%}"
            " ({low:.1%} to {high:.1%}), bound {nearerBound:.1%}, control {controlNearer:.1%}; an estimate gains"
            " {gainDb:.2f} dB by the release, control {controlGainDb:.2f} dB; its SSIM is {ssim:.3f}, {guessSsim:.3f}"
            " without the release, control {controlSsim:.3f}: {verdict}".format(**rebuilt, **rebuilt["nearer"])
        )
    lines += [
        "copies among the samples of {}: {third} below ⅓, {half} below ½".format(
            each["target"], **{name: f"{each[name]['value']:.1%}" for name in ("third", "half")}
        )
        for each in answer["copies"]
    ]
    refusals = answer["exportRefusals"]
    lines += answer["notes"]
    lines += [f"do not pass on the personal denoiser: {reason}" for reason in refusals]
    return lines or ["nothing to add"]


def attacks_above(answer: dict[str, Any]) -> list[str]:
    """The attacks that did better than the promise allows, in words."""
    found = [
        f"{each['attack']} on {each['target']}: AUC {each['auc']['value']:.3f}, bound {each['aucBound']:.3f}"
        for each in answer["findings"]
        if each["verdict"] == ABOVE
    ]
    found += [
        f"one run on {each['target']}, {each['attack']}: ε ≥ {each['epsilonLow']:.2f} per image, bound"
        f" {each['epsilonBound']:.2f}"
        for each in answer["oneRun"]
        if each["verdict"] == ABOVE
    ]
    rebuilt = answer.get("reconstruction", {"verdict": ""})
    return found + (["reconstruction from the upload"] if rebuilt["verdict"] == ABOVE else [])
