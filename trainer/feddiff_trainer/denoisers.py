"""Denoisers as bytes: safetensors whose header says what they are. No pickle, nothing executable.

Whoever wrote them may be hostile: what is built, and what may be fetched for it, follows from the job's own network.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, Literal

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from feddiff_protocol.errors import DataInvalid

from .denoising import ClassGaussian
from .network import Denoiser, NetworkConfig

FORMAT = "feddiff.denoiser/1"
KEY = "denoiser"
VALUE_BYTES = 8  # of a weight, at most
ENTRY_BYTES = 512  # of a tensor's entry in the header, several times what one takes

Kind = Literal["unet", "gaussian"]


def denoiser_bytes(denoiser: nn.Module) -> bytes:
    """The weights of a Denoiser, or means and covariances of a ClassGaussian, with what builds them again: equal
    denoisers, equal bytes."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in denoiser.state_dict().items()}
    config = asdict(denoiser.config) if isinstance(denoiser, Denoiser) else {}
    kind = "unet" if isinstance(denoiser, Denoiser) else "gaussian"
    description = json.dumps({"format": FORMAT, "kind": kind, "config": config}, sort_keys=True)
    return safetensors.torch.save(tensors, {KEY: description})  # one key: safetensors writes several in any order


def denoiser_from_bytes(
    data: bytes, where: str, config: NetworkConfig, block_side: int = 1
) -> Denoiser | ClassGaussian:
    """The denoiser in evaluation mode: the network of `config`, or a ClassGaussian of its images and classes, or of
    these images' squares.

    Raises DataInvalid, naming `where`, if the bytes hold neither, before anything is built that they ask for.
    """
    try:
        kind = _kind(_description(data), config)
        tensors = safetensors.torch.load(data)
        _check_shapes(tensors, _shapes(kind, config, block_side))
        denoiser = _built(kind, config, tensors, block_side)
    except (safetensors.SafetensorError, KeyError, TypeError, ValueError, RuntimeError, RecursionError) as error:
        raise DataInvalid(f"{where}: expected a denoiser of format {FORMAT}, found: {error}; train it again") from None
    return denoiser.eval().requires_grad_(False)


def most_bytes(kind: Kind, config: NetworkConfig, block_side: int = 1) -> int:
    """No denoiser of this kind and for `config` has more: known before one is fetched."""
    shapes = _shapes(kind, config, block_side)
    return VALUE_BYTES * sum(map(math.prod, shapes.values())) + ENTRY_BYTES * (len(shapes) + 2)


def _description(data: bytes) -> Mapping[str, Any]:
    length = int.from_bytes(data[:8], "little")
    description = json.loads(json.loads(data[8 : 8 + length])["__metadata__"][KEY])
    if description["format"] != FORMAT:
        raise ValueError(f"format {description['format']!r}")
    return dict(description)


def _kind(description: Mapping[str, Any], config: NetworkConfig) -> Kind:
    if description["kind"] == "gaussian":
        return "gaussian"
    if description["kind"] != "unet":
        raise ValueError(f"kind {_short(description['kind'])}")
    found, wanted = dict(description["config"]), asdict(config)
    if found.keys() != wanted.keys():
        raise ValueError(f"a network of {_short(sorted(found))}")
    for name, value in wanted.items():
        # sigma_data is computed, and another machine's last digit may differ.
        same = math.isclose(found[name], value) if name == "sigma_data" else found[name] == value
        if not same:
            raise ValueError(f"{name} {_short(found[name])} where the job says {value}")
    return "unet"


def _short(value: object) -> str:
    return ascii(value)[:80]


def _shapes(kind: Kind, config: NetworkConfig, block_side: int) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor, without a value of any."""
    if kind == "unet":
        with torch.device("meta"):
            return {name: tuple(tensor.shape) for name, tensor in Denoiser(config).state_dict().items()}
    K, squares = config.num_classes, config.image_height * config.image_width // block_side**2
    D = config.image_channels * squares
    return {"means_KD": (K, D), "eigenvalues_KD": (K, D), "eigenvectors_KDD": (K, D, D)}


def _check_shapes(tensors: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Small tensors can ask for large ones: a row times a column."""
    if tensors.keys() != shapes.keys():
        missing = sorted(shapes.keys() - tensors.keys()) or sorted(tensors.keys() - shapes.keys())
        raise ValueError(f"tensors that do not fit, {_short(missing[0])} the first")
    for name, shape in shapes.items():
        if tensors[name].shape != shape:
            raise ValueError(f"{name} of shape {_short(tuple(tensors[name].shape))} where the job needs {shape}")


def _built(
    kind: Kind, config: NetworkConfig, tensors: Mapping[str, Tensor], block_side: int
) -> Denoiser | ClassGaussian:
    if kind == "unet":
        network = Denoiser(config)
        network.load_state_dict(dict(tensors))
        return network
    vectors_KDD = tensors["eigenvectors_KDD"]
    covariances_KDD = (vectors_KDD * tensors["eigenvalues_KD"][:, None, :]) @ vectors_KDD.transpose(1, 2)
    return ClassGaussian(tensors["means_KD"], covariances_KDD, block_side)
