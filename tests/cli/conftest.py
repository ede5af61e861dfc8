"""Jobs of a few owners in a temporary folder, and stages that do in two milliseconds what the planner needs to see.

A stage here is `/bin/sh` writing the receipt that the real one would; what it does instead can be scripted.
"""

import hashlib
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import yaml

from feddiff import engine, notebook
from feddiff import main as command
from feddiff.documents import LocalJob, load_job
from feddiff.engine import Outcome, Setting, run_job
from feddiff.local_ledger import LedgerState, read_ledger
from feddiff.processes import StartProcess
from feddiff.run_folder import RunFolder
from feddiff_protocol.plan import StageKey, StageObserved, Status
from feddiff_protocol.stages import AnyStageSpec, Receipt

OUTPUTS = {"release": "manifest", "train-shared": "denoiser", "report": "report"}
Behaviour = Callable[[AnyStageSpec], str | None]  # shell to run instead, or None for success


def dataset_document(owner: str, **budget: str) -> dict[str, Any]:
    return {
        "apiVersion": "feddiff.dev/v1alpha1",
        "kind": "PrivateDataset",
        "metadata": {"name": "scans", "namespace": f"clinic-{owner}"},
        "spec": {
            "source": {"format": "npz", "path": f"{owner}/train.npz"},
            "image": {"channels": 1, "height": 8, "width": 8},
            "classes": {"count": 2, "records": [30, 40]},
            "budget": {"epsilon": "20", "delta": "1e-5", **budget},
            "access": [{"namespace": "research", "maxEpsilon": "10"}],
        },
    }


def job_document(owners: str = "ab", name: str = "digits", **spec: Any) -> dict[str, Any]:
    return {
        "apiVersion": "feddiff.dev/v1alpha1",
        "kind": "FederatedDiffusionJob",
        "metadata": {"name": name, "namespace": "research"},
        "spec": {
            "clients": [{"name": o, "dataset": {"namespace": f"clinic-{o}", "name": "scans"}} for o in owners],
            "privacy": {
                "mechanism": "summary",
                "epsilon": "10",
                "delta": "1e-5",
                "clipNorm": "4.25",
                "momentClipNorm": "2.5",
            },
            "diffusion": {"splitSigma": "0.25"},
            "shared": {"replicas": 1},
            **spec,
        },
    }


def write_yaml(path: Path, *documents: Any) -> Path:
    path.write_text(yaml.safe_dump_all(documents))
    return path


@dataclass
class World:
    """A folder with owners' YAML and job files."""

    path: Path
    owners: str = "ab"
    budget: dict[str, str] = field(default_factory=dict)

    smallest: ClassVar[dict[str, Any]] = {  # what the trainer's own stages do in a moment
        "network": {"baseWidth": 8},
        "shared": {"images": 512, "batch": 64, "replicas": 1},
        "personal": {"images": 512, "batch": 64},
        "sampling": {"imagesPerClass": 4, "steps": 4},
    }

    def write_records(self) -> None:
        """What the datasets describe: dark images, of which the second class is bright below."""
        for seed, owner in enumerate(self.owners):
            generator, labels_N = np.random.default_rng(seed), np.repeat([0, 1], (30, 40))
            images_NHW = generator.uniform(0, 0.3, (len(labels_N), 8, 8))
            images_NHW[labels_N == 1, 4:] += 0.6
            (self.path / owner).mkdir()
            np.savez(self.path / owner / "train.npz", images=images_NHW, labels=labels_N)

    def stages(self, behaviour: Behaviour | None = None) -> "FakeStages":
        return FakeStages(behaviour or (lambda spec: None))

    def receipt_script(self, spec: AnyStageSpec) -> str:
        return write_receipt(spec)

    def ledger(self, owner: str) -> LedgerState:
        return read_ledger(self.job().datasets[owner])

    def job_file(self, name: str = "digits", **spec: Any) -> Path:
        datasets = [dataset_document(owner, **self.budget) for owner in self.owners]
        return write_yaml(self.path / f"{name}.yaml", *datasets, job_document(self.owners, name, **spec))

    def experiment_file(self, **fields: Any) -> Path:
        """An experiment's file beside the datasets, which have a hold-out, and the job that it names."""
        datasets = [dataset_document(owner, **self.budget) for owner in self.owners]
        for owner, dataset in zip(self.owners, datasets, strict=True):
            dataset["spec"]["source"]["holdoutPath"] = f"{owner}/train.npz"
        write_yaml(self.path / "owners.yaml", *datasets)
        write_yaml(self.path / "job.yaml", job_document(self.owners))
        document = {"job": "job.yaml", "datasets": ["owners.yaml"], "arms": [{"name": "ours"}]} | fields
        return write_yaml(self.path / "study.yaml", document)

    def job(self, name: str = "digits", **spec: Any) -> LocalJob:
        return load_job([self.job_file(name, **spec)])

    def run(self, job: LocalJob, stages: "FakeStages", folder: str = "run", **setting: Any) -> Outcome:
        time = FakeTime()
        usual = {"clock": time.clock, "sleep": time.sleep, "num_processes": 4, "grace_seconds": 1000.0}
        start = {"start_attempt": StartProcess(stages)}
        return run_job(job, RunFolder(self.path / folder), Setting(Silent(), **usual | start | setting))


class FakeTime:
    """Waits of minutes pass in a moment; real processes get a moment of real time."""

    def __init__(self) -> None:
        self.now = 1_000_000.0

    def clock(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        import time

        self.now += 20 * seconds
        time.sleep(0.002)


class Silent:
    def status(self, status: Status) -> None: ...
    def stage_started(self, key: StageKey, attempt: int) -> None: ...
    def stage_progress(self, key: StageKey, done: int, total: int, unit: str) -> None: ...
    def stage_ended(self, key: StageKey, seen: StageObserved) -> None: ...


@dataclass
class FakeStages:
    """A StageCommand whose stages succeed at once, unless `behaviour` says what they do instead."""

    behaviour: Behaviour = lambda spec: None
    started: list[str] = field(default_factory=list)
    specs: list[AnyStageSpec] = field(default_factory=list)

    def __call__(self, spec: AnyStageSpec, spec_path: Path) -> list[str]:
        self.specs.append(spec)
        self.started.append(name_of(spec))
        script = self.behaviour(spec)
        return ["/bin/sh", "-c", script if script is not None else write_receipt(spec)]


def name_of(spec: AnyStageSpec) -> str:
    return f"{spec.stage.value} {getattr(spec, 'client', '')}".rstrip()


def write_receipt(spec: AnyStageSpec) -> str:
    line = receipt_of(spec).to_line()
    log = "$FEDDIFF_TERMINATION_LOG"
    return f"""printf '%s' '{line}' > "{log}.new" && mv "{log}.new" "{log}\""""


def receipt_of(spec: AnyStageSpec) -> Receipt:
    stage, client = spec.stage, getattr(spec, "client", "")
    outputs = {}
    if name := OUTPUTS.get(stage.value):
        outputs = {name: hashlib.sha256(f"{spec.job.uid} {stage} {client}".encode()).hexdigest()}
    return Receipt(
        stage=stage, job_uid=spec.job.uid, client=client, attempt=spec.attempt, outputs=outputs, milliseconds=12
    )


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


@pytest.fixture
def in_the_trainers_place(monkeypatch: pytest.MonkeyPatch) -> Callable[[FakeStages], FakeStages]:
    """The command, and `feddiff.run`, start the given stages instead of the trainer."""

    def put(stages: FakeStages) -> FakeStages:
        for module in (engine, notebook):
            monkeypatch.setattr(module, "Setting", lambda **given: Setting(start_attempt=StartProcess(stages), **given))
        return stages

    return put


@pytest.fixture
def feddiff(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, str, str]]:
    """Runs the command in this process; returns (exit code, stdout, stderr)."""

    def run(*arguments: object) -> tuple[int, str, str]:
        texts = [str(argument) for argument in arguments]
        monkeypatch.setattr(sys, "argv", ["feddiff", *texts])
        code = command._exit_code(lambda: command.app(texts))
        said = capsys.readouterr()
        return code, said.out, said.err

    return run
