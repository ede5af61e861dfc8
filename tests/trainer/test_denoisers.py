"""A denoiser written and read back denoises the same; anything else is refused in words."""

import json
import math
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

import pytest
import safetensors.torch
import torch

from feddiff_protocol.errors import DataInvalid
from feddiff_trainer import denoisers
from feddiff_trainer.denoisers import denoiser_bytes, denoiser_from_bytes, most_bytes
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
    again = denoiser_from_bytes(denoiser_bytes(network), "here", CONFIG)
    assert isinstance(again, Denoiser) and again.config == CONFIG
    with torch.no_grad():
        assert torch.equal(network(*inputs()), again(*inputs()))


def test_a_pooled_gaussian_read_back_is_the_same_function() -> None:
    root = torch.randn(3, 64, 64, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    pool = ClassGaussian(torch.zeros(3, 64, dtype=torch.float64), root @ root.transpose(1, 2) / 64)
    again = denoiser_from_bytes(denoiser_bytes(pool), "here", CONFIG)
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


def nested_header() -> bytes:
    header = b"[" * 100_000
    return len(header).to_bytes(8, "little") + header


@pytest.mark.parametrize(
    "data",
    [b"", b"\x80\x04pickle", denoiser_bytes(trained_network())[:1000], other_safetensors(), weights_missing(),
     wrong_config(), nested_header()],
    ids=["empty", "pickle", "truncated", "another format", "weights missing", "unknown setting", "nested header"],
)  # fmt: skip
def test_bytes_that_hold_no_denoiser_are_refused_with_their_place(data: bytes) -> None:
    with pytest.raises(DataInvalid, match=r"shared/denoiser\.safetensors: expected a denoiser"):
        denoiser_from_bytes(data, "shared/denoiser.safetensors", CONFIG)


# ---- A hostile author: what is built follows from the job's network, not from the file --------------------------

HUGE: dict[str, Any] = {"base_width": 512, "num_blocks": 8, "image_height": 512, "image_width": 512}


def asking_for(**changes: Any) -> bytes:
    """The weights of a small network under a header that says otherwise."""
    description = {"format": "feddiff.denoiser/1", "kind": "unet", "config": asdict(CONFIG) | changes}
    return safetensors.torch.save(trained_network().state_dict(), {"denoiser": json.dumps(description)})


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> list[NetworkConfig]:
    """What networks were built to hold weights."""
    configs: list[NetworkConfig] = []

    def spy(config: NetworkConfig) -> Denoiser:
        if torch.get_default_device().type != "meta":
            configs.append(config)
        return Denoiser(config)

    monkeypatch.setattr(denoisers, "Denoiser", spy)
    return configs


@pytest.mark.parametrize(("field", "value"), [*HUGE.items(), ("sigma_data", 0.5), ("attention_cells", 4)])
def test_another_network_than_the_jobs_is_refused_in_words_and_never_built(
    built: list[NetworkConfig], field: str, value: Any
) -> None:
    with pytest.raises(DataInvalid, match=f"{field} {value} where the job says {getattr(CONFIG, field)}"):
        denoiser_from_bytes(asking_for(**{field: value}), "shared", CONFIG)
    assert built == []


def test_the_jobs_network_is_built_whatever_the_last_digit_of_another_machine(built: list[NetworkConfig]) -> None:
    data = asking_for(sigma_data=math.nextafter(CONFIG.sigma_data, 1))
    assert denoiser_from_bytes(data, "shared", CONFIG) is not None
    assert built == [CONFIG]


def test_a_network_built_from_its_header_would_be_noticed(built: list[NetworkConfig]) -> None:
    """The mutant: as large as its author likes, here only a little larger."""
    description = denoisers._description(asking_for(base_width=16))
    denoisers.Denoiser(NetworkConfig(**description["config"]))
    assert built != [CONFIG]


@pytest.mark.parametrize("config", [None, [], "large", asdict(CONFIG) | {"sigma_data": "0.5"}])
def test_a_config_that_is_none_is_refused(config: Any) -> None:
    description = {"format": "feddiff.denoiser/1", "kind": "unet", "config": config}
    data = safetensors.torch.save({"x": torch.zeros(1)}, {"denoiser": json.dumps(description)})
    with pytest.raises(DataInvalid, match="shared: expected a denoiser"):
        denoiser_from_bytes(data, "shared", CONFIG)


def row_times_column(length: int) -> bytes:
    """A pooled Gaussian of small tensors whose product is a large one."""
    tensors = {
        "means_KD": torch.zeros(1, length),
        "eigenvalues_KD": torch.zeros(1, 1),
        "eigenvectors_KDD": torch.zeros(1, length, 1),
    }
    description = {"format": "feddiff.denoiser/1", "kind": "gaussian", "config": {}}
    return safetensors.torch.save(tensors, {"denoiser": json.dumps(description)})


def test_small_tensors_that_ask_for_a_large_one_are_refused() -> None:
    with pytest.raises(DataInvalid, match=r"means_KD of shape \(1, 1000000\) where the job needs \(3, 64\)"):
        denoiser_from_bytes(row_times_column(1_000_000), "shared", CONFIG)


def test_a_reader_that_checks_no_shapes_would_multiply_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """The mutant: 300 values a side, not a million."""
    monkeypatch.setattr(denoisers, "_check_shapes", lambda *_: None)
    products: list[torch.Size] = []

    def spy(means_KD: torch.Tensor, covariances_KDD: torch.Tensor, block_side: int) -> ClassGaussian:
        products.append(covariances_KDD.shape)
        raise ValueError("stop here")

    monkeypatch.setattr(denoisers, "ClassGaussian", spy)
    with pytest.raises(DataInvalid, match="stop here"):
        denoiser_from_bytes(row_times_column(300), "shared", CONFIG)
    assert products == [(1, 300, 300)]


@pytest.mark.parametrize("attention_cells", [0, 4])
def test_a_denoisers_size_is_known_before_it_is_fetched_and_not_much_overestimated(attention_cells: int) -> None:
    config = replace(CONFIG, attention_cells=attention_cells, num_blocks=2)
    network = denoiser_bytes(Denoiser(config))
    assert len(network) <= most_bytes("unet", config) < 2.5 * len(network)
    for dtype in (torch.float32, torch.float64):
        pool = ClassGaussian(torch.zeros(3, 64, dtype=dtype), torch.eye(64, dtype=dtype).expand(3, 64, 64))
        assert len(denoiser_bytes(pool)) <= most_bytes("gaussian", config) < 2.5 * len(denoiser_bytes(pool))


def test_a_gaussian_of_squares_comes_back_as_one_and_is_known_to_be_small() -> None:
    squares = ClassGaussian(torch.zeros(3, 16).double(), torch.eye(16).double().expand(3, 16, 16), block_side=2)
    data = denoiser_bytes(squares)
    assert len(data) <= most_bytes("gaussian", CONFIG, 2) < most_bytes("gaussian", CONFIG) / 8
    read = denoiser_from_bytes(data, "shared", CONFIG, 2)
    assert isinstance(read, ClassGaussian) and read.block_side == 2
    with pytest.raises(DataInvalid, match="means_KD of shape"):
        denoiser_from_bytes(data, "shared", CONFIG)


def allocated(work: Callable[[], object]) -> int:
    """Bytes of all tensors that `work` makes."""
    with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profiled:
        work()
    return sum(max(0, event.cpu_memory_usage) for event in profiled.key_averages())


def test_the_size_of_the_largest_network_is_found_without_allocating_it() -> None:
    """Some 10 GB of weights, if it were."""
    largest = NetworkConfig(4, 512, 512, num_classes=1000, base_width=512, num_blocks=8, attention_cells=4)
    assert most_bytes("unet", largest) > 4 << 30
    assert allocated(lambda: most_bytes("unet", largest)) < 1 << 20
    assert allocated(lambda: Denoiser(replace(CONFIG, base_width=64))) > 1 << 20, "which this would notice"
