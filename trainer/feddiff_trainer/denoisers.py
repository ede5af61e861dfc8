"""Denoisers as bytes: safetensors whose header says how to build them again. No pickle, nothing executable."""

import json
from collections.abc import Mapping
from dataclasses import asdict

import safetensors
import safetensors.torch
from torch import Tensor, nn

from feddiff_protocol.errors import DataInvalid

from .denoising import ClassGaussian
from .network import Denoiser, NetworkConfig

FORMAT = "feddiff.denoiser/1"


def denoiser_bytes(denoiser: nn.Module) -> bytes:
    """The weights of a Denoiser, or means and covariances of a ClassGaussian, with what builds them again."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in denoiser.state_dict().items()}
    config = asdict(denoiser.config) if isinstance(denoiser, Denoiser) else {}
    kind = "unet" if isinstance(denoiser, Denoiser) else "gaussian"
    return safetensors.torch.save(tensors, {"format": FORMAT, "kind": kind, "config": json.dumps(config)})


def denoiser_from_bytes(data: bytes, where: str) -> Denoiser | ClassGaussian:
    """The denoiser in evaluation mode. Raises DataInvalid, naming `where`, if the bytes hold none."""
    try:
        metadata, tensors = _header(data), safetensors.torch.load(data)
        denoiser = _built(metadata, tensors)
    except (safetensors.SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise DataInvalid(f"{where}: expected a denoiser of format {FORMAT}, found: {error}; train it again") from None
    return denoiser.eval().requires_grad_(False)


def _header(data: bytes) -> Mapping[str, str]:
    length = int.from_bytes(data[:8], "little")
    metadata = json.loads(data[8 : 8 + length])["__metadata__"]
    if metadata.get("format") != FORMAT:
        raise ValueError(f"format {metadata.get('format')!r}")
    return dict(metadata)


def _built(metadata: Mapping[str, str], tensors: Mapping[str, Tensor]) -> Denoiser | ClassGaussian:
    if metadata["kind"] == "unet":
        network = Denoiser(NetworkConfig(**json.loads(metadata["config"])))
        network.load_state_dict(dict(tensors))
        return network
    vectors_KDD = tensors["eigenvectors_KDD"]
    covariances_KDD = (vectors_KDD * tensors["eigenvalues_KD"][:, None, :]) @ vectors_KDD.transpose(1, 2)
    return ClassGaussian(tensors["means_KD"], covariances_KDD)
