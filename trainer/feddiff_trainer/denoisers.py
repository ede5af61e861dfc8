"""Denoisers as bytes: safetensors whose header says how to build them again. No pickle, nothing executable."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor, nn

from feddiff_protocol.errors import DataInvalid

from .denoising import ClassGaussian
from .network import Denoiser, NetworkConfig

FORMAT = "feddiff.denoiser/1"
KEY = "denoiser"


def denoiser_bytes(denoiser: nn.Module) -> bytes:
    """The weights of a Denoiser, or means and covariances of a ClassGaussian, with what builds them again: equal
    denoisers, equal bytes."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in denoiser.state_dict().items()}
    config = asdict(denoiser.config) if isinstance(denoiser, Denoiser) else {}
    kind = "unet" if isinstance(denoiser, Denoiser) else "gaussian"
    description = json.dumps({"format": FORMAT, "kind": kind, "config": config}, sort_keys=True)
    return safetensors.torch.save(tensors, {KEY: description})  # one key: safetensors writes several in any order


def denoiser_from_bytes(data: bytes, where: str) -> Denoiser | ClassGaussian:
    """The denoiser in evaluation mode. Raises DataInvalid, naming `where`, if the bytes hold none."""
    try:
        denoiser = _built(_description(data), safetensors.torch.load(data))
    except (safetensors.SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise DataInvalid(f"{where}: expected a denoiser of format {FORMAT}, found: {error}; train it again") from None
    return denoiser.eval().requires_grad_(False)


def _description(data: bytes) -> Mapping[str, Any]:
    length = int.from_bytes(data[:8], "little")
    description = json.loads(json.loads(data[8 : 8 + length])["__metadata__"][KEY])
    if description["format"] != FORMAT:
        raise ValueError(f"format {description['format']!r}")
    return dict(description)


def _built(description: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Denoiser | ClassGaussian:
    if description["kind"] == "unet":
        network = Denoiser(NetworkConfig(**description["config"]))
        network.load_state_dict(dict(tensors))
        return network
    vectors_KDD = tensors["eigenvectors_KDD"]
    covariances_KDD = (vectors_KDD * tensors["eigenvalues_KD"][:, None, :]) @ vectors_KDD.transpose(1, 2)
    return ClassGaussian(tensors["means_KD"], covariances_KDD)
