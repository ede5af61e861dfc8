"""The shared denoiser as a folder that loads where feddiff is not installed. It is made of releases alone, so whoever
may have them may have it: nothing is asked of an audit.

    python -m feddiff_trainer.export_shared SPEC.json

FOLDER/README.md                              model card
FOLDER/model_index.json                       what diffusers reads first
FOLDER/denoiser/pipeline.py                   network, sampler and pipeline, in one module
FOLDER/denoiser/config.json                   their arguments
FOLDER/denoiser/diffusion_pytorch_model.safetensors
"""

import json
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import safetensors.torch
from pydantic import Field

from feddiff_protocol import layout
from feddiff_protocol.api import Timeline, Wire
from feddiff_protocol.errors import OutputFailed
from feddiff_protocol.promise import promise_of
from feddiff_protocol.stages import Sha256, TrainSharedSpec

from .answering import answered
from .denoisers import Kind, denoiser_from_bytes, most_bytes
from .model_card import model_card
from .released import read_manifests
from .stage import installed_versions
from .standalone import standalone
from .stores import get_verified, open_store
from .train_shared import network_config, sigma_data_of, terms_of

MODULE, MODULE_FILE = "feddiff_trainer.pipeline", "pipeline.py"
WEIGHTS = "diffusion_pytorch_model.safetensors"  # diffusers' own name, as are config.json and model_index.json


class SharedExportSpec(Wire):
    """`run`: the spec with which the run trained its shared denoiser, whose hash its receipt said."""

    run: TrainSharedSpec
    shared_denoiser_sha256: Sha256
    class_names: tuple[str, ...] = ()
    licence: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9.+-]{0,63}$")] = "unknown"
    out: str


def export_shared(spec: SharedExportSpec) -> dict[str, Any]:
    """The files of the folder `spec.out`, which is there with all of them or not at all. Raises DataInvalid unless the
    denoiser and the releases are the run's own; OutputFailed for a folder that exists."""
    run, store = spec.run, open_store(spec.run.federation_store, "federation")
    config = network_config(run.network, run.image, run.num_classes, sigma_data_of(run))
    kind: Kind = "gaussian" if run.shared.denoiser == "closedForm" else "unet"
    key = layout.shared_denoiser(run.job.uid)
    side = run.privacy.block_side_or_one
    data = get_verified(store, key, spec.shared_denoiser_sha256, most_bytes(kind, config, side))
    denoiser_from_bytes(data, key, config, side)  # refuses another network's
    tensors = {f"denoise.{name}": tensor for name, tensor in safetensors.torch.load(data).items()}
    manifests = read_manifests(store, run.releases, terms_of(run, run.num_classes))
    card = model_card(run, manifests, spec.class_names, spec.shared_denoiser_sha256, spec.licence, installed_versions())
    arguments = {"kind": kind, "network": asdict(config), **drawing_arguments(run)}
    files = {
        "README.md": card.encode(),
        "model_index.json": _json(MODEL_INDEX),
        f"denoiser/{MODULE_FILE}": standalone(MODULE).encode(),
        "denoiser/config.json": _json({"_class_name": "SharedDenoiser", **arguments}),
        f"denoiser/{WEIGHTS}": safetensors.torch.save(tensors, {"format": "pt"}),
    }
    _write_folder(Path(spec.out), files)
    return {"files": sorted(files)}


MODEL_INDEX = {
    # diffusers looks for the pipeline's module below the folder, and for a component's below the component's.
    "_class_name": ["denoiser/pipeline", "SharedDenoiserPipeline"],
    "_diffusers_version": "0.42.1",
    "denoiser": ["pipeline", "SharedDenoiser"],
}


def drawing_arguments(run: TrainSharedSpec) -> dict[str, Any]:
    """What pipeline.SharedDenoiser makes its Drawing of: the very numbers of drawing_of."""
    diffusion = run.diffusion
    return {
        "schedule": {
            "steps": diffusion.steps,
            "beta_start": float(diffusion.beta_start),
            "beta_end": float(diffusion.beta_end),
        },
        "split_step": promise_of(run.privacy, diffusion).split_step,
        "block_side": run.privacy.block_side_or_one,
        "sampling": {
            "restarts": diffusion.timeline is Timeline.RESTARTED,
            "steps": run.sampling.steps,
            "sampler": run.sampling.sampler,
        },
    }


def _json(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()


def _write_folder(folder: Path, files: Mapping[str, bytes]) -> None:
    """The whole folder is there, or OutputFailed: never over one that exists."""
    try:
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as beside:
            made = Path(beside) / "made"
            for name, content in files.items():
                (made / name).parent.mkdir(parents=True, exist_ok=True)
                (made / name).write_bytes(content)
            if folder.exists():
                raise OutputFailed(f"{folder} exists; name a new folder")
            made.rename(folder)
    except OSError as error:
        raise OutputFailed(f"{folder}: cannot be written: {error.strerror or error}; give another path") from None


def main() -> int:
    return answered(SharedExportSpec, export_shared)


if __name__ == "__main__":
    sys.exit(main())
