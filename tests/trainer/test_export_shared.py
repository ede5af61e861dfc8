"""The exported shared denoiser: where feddiff cannot be imported it draws, bit for bit, what the stage drew."""

import ast
import hashlib
import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor

from feddiff_protocol import layout
from feddiff_protocol.api import parse
from feddiff_protocol.errors import DataInvalid, OutputFailed
from feddiff_protocol.stages import ReleaseSpec, TrainSharedSpec
from feddiff_trainer import export_shared, pipeline, release, train_shared
from feddiff_trainer.export_shared import MODULE, SharedExportSpec
from feddiff_trainer.standalone import standalone
from feddiff_trainer.stores import open_store

pytestmark = pytest.mark.usefixtures("one_thread")

UID = "uid-00000001"
COUNTS = {"a": (30, 4), "b": (4, 30)}
SUMMARY = {"mechanism": "summary", "epsilon": "10", "delta": "1e-5", "clipNorm": "4", "momentClipNorm": "2"}
GAUSSIAN = {"mechanism": "gaussian", "epsilon": "10", "delta": "1e-5", "clipNorm": "4"}
JOBS: dict[str, dict[str, Any]] = {
    "trained": {"privacy": SUMMARY, "diffusion": {"splitSigma": "0.5"}},
    "closedForm": {"privacy": SUMMARY, "diffusion": {"splitSigma": "0.5"}, "shared": {"denoiser": "closedForm"}},
    "squares": {
        "privacy": SUMMARY | {"blockSide": 2},
        "diffusion": {"splitSigma": "0.5"},
        "shared": {"denoiser": "closedForm"},
    },
    "restarted": {"privacy": GAUSSIAN, "diffusion": {"timeline": "restarted"}, "sampling": {"sampler": "ddpm"}},
    "diffusers": {"privacy": SUMMARY, "diffusion": {"splitSigma": "0.5"}, "network": {"backbone": "diffusers"}},
}
# diffusers loads weights as float32, and the closed form is computed in float64: of 255, after 8 steps.
LEVELS_APART = {"trained": 0, "closedForm": 1, "squares": 1, "restarted": 0, "diffusers": 0}

# No feddiff, and no diffusers unless it is asked for: neither from a path nor as an editable install.
ELSEWHERE = """
import sys
class Guard:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {barred}:
            raise ModuleNotFoundError(name, name=name)
sys.meta_path.insert(0, Guard())
import torch
torch.set_num_threads(1)
"""
BY_TORCH = """
sys.path.insert(0, {folders!r}[0] + "/denoiser")
from pipeline import load
"""
BY_DIFFUSERS = """
from diffusers import DiffusionPipeline
def load(folder):
    return DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
"""
DRAW = """
import numpy
for folder in {folders!r}:
    images = load(folder)([0] * 10 + [1] * 10, generator=torch.Generator().manual_seed(0)).images
    numpy.save(folder + ".npy", numpy.stack([numpy.asarray(image) for image in images]))
assert not any(name.startswith("feddiff") for name in sys.modules)
"""


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, SharedExportSpec]:
    """Of every job's finished training; without diffusers, of those that do not need it."""
    specs = {}
    for job in [each for each in JOBS if each != "diffusers" or find_spec("diffusers")]:
        folder = tmp_path_factory.mktemp(job)
        specs[job] = asked(trained(folder, job), folder / "out")
        export_shared.export_shared(specs[job])
    return specs


def trained(folder: Path, job: str) -> TrainSharedSpec:
    """The spec of a shared denoiser that two owners' releases have just trained."""
    common = {
        "job": {"uid": UID, "name": "digits", "namespace": "research"},
        "attempt": 1,
        "image": {"channels": 1, "height": 6, "width": 4},
        "privacy": JOBS[job]["privacy"],
        "diffusion": JOBS[job]["diffusion"],
        "federationStore": (folder / "federation").as_uri(),
    }
    releases = [released(folder, client, common) for client in COUNTS]
    more = {
        "releases": releases,
        "numClasses": 2,
        "network": {"baseWidth": 8, "attentionCells": 4, **JOBS[job].get("network", {})},
        "shared": {"images": 64, "batch": 32, **JOBS[job].get("shared", {})},
        "sampling": {"steps": 8, **JOBS[job].get("sampling", {})},
    }
    spec = parse(TrainSharedSpec, common | more, "spec")
    train_shared.body(spec)
    return spec


def released(folder: Path, client: str, common: dict[str, Any]) -> dict[str, str]:
    rng, labels_N = np.random.default_rng(ord(client)), np.repeat([0, 1], COUNTS[client])
    np.savez(folder / f"{client}.npz", images=rng.uniform(0, 1, (len(labels_N), 1, 6, 4)), labels=labels_N)
    document = common | {
        "client": client,
        "release": layout.release_name(UID, client, "dataset"),
        "source": {"format": "npz", "path": str(folder / f"{client}.npz")},
        "classes": {"count": 2, "records": COUNTS[client]},
        "ownerStore": (folder / f"owner-{client}").as_uri(),
    }
    return {"client": client, "manifestSha256": release.body(parse(ReleaseSpec, document, "release"))["manifest"]}


def asked(run: TrainSharedSpec, out: Path, **changes: Any) -> SharedExportSpec:
    data = open_store(run.federation_store).get(layout.shared_denoiser(UID))
    fields: dict[str, Any] = {"run": run, "out": str(out), "class_names": ("zero|0", "<b>one</b>")}
    return SharedExportSpec(**fields | {"shared_denoiser_sha256": hashlib.sha256(data).hexdigest()} | changes)


def samples_of(run: TrainSharedSpec) -> np.ndarray:
    """What the stage itself drew, N×H×W."""
    data = open_store(run.federation_store).get(layout.shared_samples(UID))
    images: Tensor = safetensors.torch.load(data)["images"]
    return images[:, 0].numpy()


def drawn_elsewhere(specs: dict[str, SharedExportSpec], load: str) -> dict[str, np.ndarray]:
    """What a process draws that cannot import feddiff, by job, N×H×W."""
    done = run_elsewhere([spec.out for spec in specs.values()], load)
    assert done.returncode == 0 and "Expected types" not in done.stderr, done.stderr
    return {job: np.load(f"{spec.out}.npy") for job, spec in specs.items()}


def run_elsewhere(folders: list[str], load: str) -> subprocess.CompletedProcess[str]:
    barred = ("feddiff", "feddiff_protocol", "feddiff_trainer", *(() if load == BY_DIFFUSERS else ("diffusers",)))
    script = ELSEWHERE.format(barred=barred) + (load + DRAW).format(folders=folders)
    environment = os.environ | {"HF_HOME": f"{folders[0]}.hub", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-IB", "-c", script]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def test_without_feddiff_the_same_seed_gives_the_same_images(exports: dict[str, SharedExportSpec]) -> None:
    by_torch = {job: spec for job, spec in exports.items() if job != "diffusers"}
    for job, images in drawn_elsewhere(by_torch, BY_TORCH).items():
        assert np.array_equal(images, samples_of(exports[job].run)), job


def test_another_seed_gives_other_images(exports: dict[str, SharedExportSpec]) -> None:
    """The mutant of the test before."""
    for spec in exports.values():
        drawn = pipeline.load(spec.out)([0] * 10 + [1] * 10, generator=torch.Generator().manual_seed(1)).images
        assert not np.array_equal(np.stack([np.asarray(each) for each in drawn]), samples_of(spec.run))


def test_diffusers_loads_it_without_feddiff(exports: dict[str, SharedExportSpec]) -> None:
    pytest.importorskip("diffusers")
    for job, images in drawn_elsewhere(exports, BY_DIFFUSERS).items():
        apart = np.abs(images.astype(int) - samples_of(exports[job].run))
        assert apart.max() <= LEVELS_APART[job], job


def test_a_module_that_needs_feddiff_would_be_noticed(tmp_path: Path) -> None:
    """The mutant: the pipeline as it stands in trainer/."""
    (tmp_path / "denoiser").mkdir()
    (tmp_path / "denoiser/pipeline.py").write_bytes(Path(pipeline.__file__).read_bytes())
    done = run_elsewhere([str(tmp_path)], BY_TORCH)
    assert done.returncode != 0 and "ModuleNotFoundError: feddiff_protocol" in done.stderr


def test_the_module_imports_nothing_but_what_its_page_says() -> None:
    imported = {
        name.partition(".")[0]
        for node in ast.walk(ast.parse(standalone(MODULE)))
        for name in ([each.name for each in node.names] if isinstance(node, ast.Import) else [])
        + ([str(node.module)] if isinstance(node, ast.ImportFrom) else [])
    }
    assert imported - sys.stdlib_module_names == {"torch", "safetensors", "diffusers", "PIL"}


def test_what_a_pipeline_is_asked_for_is_checked(exports: dict[str, SharedExportSpec]) -> None:
    loaded = pipeline.load(exports["trained"].out)
    with pytest.raises(ValueError, match="class_labels: expected 0 to 1, found"):
        loaded([2])
    with pytest.raises(ValueError, match="output_type: expected pil, pt or latent"):
        loaded([0], output_type="np")
    for kind in ("pt", "latent"):
        assert loaded([0, 1], num_inference_steps=3, output_type=kind).images.shape == (2, 1, 6, 4)


@pytest.mark.parametrize("job", ["trained", "closedForm", "restarted"])
def test_the_card_says_promise_data_limits_and_licence(exports: dict[str, SharedExportSpec], job: str) -> None:
    spec = exports[job]
    card = (Path(spec.out) / "README.md").read_text()
    privacy = spec.run.privacy
    for words in (
        'license: "unknown"',
        "ε = 10 per image, δ = 1e-5, k = 1 release per owner",
        f"| Mechanism | {privacy.mechanism.value}: ",
        f"| Clip norm of an image | {privacy.clip_norm}",
        "| 0 | zero&#124;0 | 34 |",
        "| 1 | &lt;b&gt;one&lt;/b&gt; | 34 |",
        "| a | 34 |",
        "Linear β from 1e-4 to 0.02 over T = 1000 steps; split at step",
        "Nobody has said; ask the data owners.",
        f"| shared denoiser | `{spec.shared_denoiser_sha256}` |",
        {
            "trained": "trained at noise levels above the split alone",
            "closedForm": "the denoiser of the pooled Gaussian, in closed form",
            "restarted": "what it draws has their noise",
        }[job],
    ):
        assert words in card, words


def test_a_folder_that_exists_and_a_denoiser_of_another_hash_are_refused(
    exports: dict[str, SharedExportSpec], tmp_path: Path
) -> None:
    spec = exports["trained"]
    with pytest.raises(OutputFailed, match="exists; name a new folder"):
        export_shared.export_shared(spec)
    with pytest.raises(DataInvalid, match="somebody replaced it"):
        export_shared.export_shared(asked(spec.run, tmp_path / "new", shared_denoiser_sha256="0" * 64))
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_read_but_the_federation_store(exports: dict[str, SharedExportSpec], tmp_path: Path) -> None:
    """Records and owners' stores are gone, and it is the same export."""
    spec = exports["trained"]
    folder = Path(spec.out).parent
    for private in [*folder.glob("*.npz"), *folder.glob("owner-*")]:
        private.rename(tmp_path / private.name)
    try:
        export_shared.export_shared(asked(spec.run, tmp_path / "again"))
    finally:
        for private in [*tmp_path.glob("*.npz"), *tmp_path.glob("owner-*")]:
            private.rename(folder / private.name)
    for file in (each for each in Path(spec.out).rglob("*") if each.is_file()):
        assert (tmp_path / "again" / file.relative_to(spec.out)).read_bytes() == file.read_bytes()


def test_the_process_names_the_files(
    exports: dict[str, SharedExportSpec],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    spec = exports["trained"]
    (tmp_path / "spec.json").write_text(json.dumps(asked(spec.run, tmp_path / "new", licence="cc-by-4.0").to_wire()))
    monkeypatch.setattr(sys, "argv", ["export_shared", str(tmp_path / "spec.json")])
    assert export_shared.main() == 0
    found = sorted(str(each.relative_to(tmp_path / "new")) for each in (tmp_path / "new").rglob("*") if each.is_file())
    assert json.loads(capsys.readouterr().out)["files"] == found
    assert "Weights: cc-by-4.0." in (tmp_path / "new/README.md").read_text()
