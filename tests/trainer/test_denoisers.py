"""A denoiser written and read back denoises the same; anything else is refused in words."""

import json

import pytest
import safetensors.torch
import torch

from feddiff_protocol.errors import DataInvalid
from feddiff_trainer.denoisers import denoiser_bytes, denoiser_from_bytes
from feddiff_trainer.denoising import ClassGaussian
from feddiff_trainer.network import Denoiser, NetworkConfig

CONFIG = NetworkConfig(image_channels=1, image_height=8, image_width=8, num_classes=3, base_width=8, sigma_data=0.9)


def inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(4, 1, 8, 8, generator=generator), torch.tensor([0.1, 1.0, 5.0, 50.0]), torch.tensor([0, 1, 2, 0])


def trained_network() -> Denoiser:
    torch.manual_seed(1)
    network = Denoiser(CONFIG)
    for parameter in network.parameters():  # the last layer starts at zero, which would hide wrong weights
        torch.nn.init.normal_(parameter, std=0.1)
    return network.eval()


def test_a_network_read_back_is_the_same_function() -> None:
    network = trained_network()
    again = denoiser_from_bytes(denoiser_bytes(network), "here")
    assert isinstance(again, Denoiser) and again.config == CONFIG
    with torch.no_grad():
        assert torch.equal(network(*inputs()), again(*inputs()))


def test_a_pooled_gaussian_read_back_is_the_same_function() -> None:
    root = torch.randn(3, 64, 64, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    pool = ClassGaussian(torch.zeros(3, 64, dtype=torch.float64), root @ root.transpose(1, 2) / 64)
    again = denoiser_from_bytes(denoiser_bytes(pool), "here")
    torch.testing.assert_close(pool(*inputs()), again(*inputs()))


def test_equal_denoisers_are_equal_bytes() -> None:
    assert len({denoiser_bytes(trained_network()) for _ in range(20)}) == 1


def other_safetensors() -> bytes:
    return safetensors.torch.save({"x": torch.zeros(1)}, {"format": "something else"})


def weights_missing() -> bytes:
    description = {"format": "feddiff.denoiser/1", "kind": "unet", "config": CONFIG.__dict__}
    return safetensors.torch.save({"x": torch.zeros(1)}, {"denoiser": json.dumps(description)})


def wrong_config() -> bytes:
    description = {"format": "feddiff.denoiser/1", "kind": "unet", "config": {"surprise": 1}}
    return safetensors.torch.save({"x": torch.zeros(1)}, {"denoiser": json.dumps(description)})


@pytest.mark.parametrize(
    "data",
    [b"", b"\x80\x04pickle", denoiser_bytes(trained_network())[:1000], other_safetensors(), weights_missing(),
     wrong_config()],
    ids=["empty", "pickle", "truncated", "another format", "weights missing", "unknown setting"],
)  # fmt: skip
def test_bytes_that_hold_no_denoiser_are_refused_with_their_place(data: bytes) -> None:
    with pytest.raises(DataInvalid, match=r"shared/denoiser\.safetensors: expected a denoiser"):
        denoiser_from_bytes(data, "shared/denoiser.safetensors")
