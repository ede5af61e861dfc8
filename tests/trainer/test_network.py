"""The U-Net and its preconditioning: any size, conditions that matter, nothing before training, the same bits."""

import re
import signal
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from feddiff_protocol.api import NETWORK_SIZES, ImageSpec, NetworkSpec
from feddiff_protocol.errors import ConfigurationInvalid, DataInvalid, Interrupted
from feddiff_trainer.batches import loss_of, records
from feddiff_trainer.checkpoints import Checkpoints
from feddiff_trainer.denoisers import denoiser_bytes, denoiser_from_bytes
from feddiff_trainer.denoising import denoising_loss, log_uniform_sigmas
from feddiff_trainer.network import (
    CLIPPED,
    AttentionBlock,
    Denoiser,
    NetworkConfig,
    diffusers_levels,
    fold,
    levels,
    preconditioning,
    rms_norm,
    unfold,
)
from feddiff_trainer.sampler import heun
from feddiff_trainer.stores import FolderStore
from feddiff_trainer.train_shared import network_config
from feddiff_trainer.training import BatchLoss, World, train

torch.set_num_threads(1)


def denoiser(size: tuple[int, int] = (8, 8), channels: int = 1, attention_cells: int = 0, width: int = 8) -> Denoiser:
    torch.manual_seed(1)
    return Denoiser(NetworkConfig(channels, *size, num_classes=3, base_width=width, attention_cells=attention_cells))


def inputs(model: Denoiser, batch: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    shape = (batch, model.config.image_channels, model.config.image_height, model.config.image_width)
    generator = torch.Generator().manual_seed(2)
    return torch.randn(shape, generator=generator), torch.full((batch,), 0.7), torch.arange(batch) % 3


def awake(model: Denoiser) -> Denoiser:
    """The model with every parameter off zero, as after training."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


def trained(
    config: NetworkConfig, loss: BatchLoss, *, num_images: int, batch: int, checkpoints: Checkpoints | None = None
) -> Denoiser:
    """A network of `config` after these few images, from the same initial weights at every call."""
    torch.manual_seed(0)
    return train(
        Denoiser(config),
        loss,
        world=World(0, 1, torch.device("cpu")),
        num_images=num_images,
        batch=batch,
        learning_rate=1e-3,
        ema_width=0.1,
        seed=0,
        on_progress=lambda progress: None,
        checkpoints=checkpoints,
    )


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [(4, 4), (5, 7), (8, 8), (14, 14), (28, 28), (32, 32), (64, 64), (4, 33)])
def test_estimate_has_the_shape_of_the_image(size: tuple[int, int], channels: int) -> None:
    model = awake(denoiser(size, channels, attention_cells=4))
    y_BCHW, sigma_B, label_B = inputs(model)
    x0_BCHW = model(y_BCHW, sigma_B, label_B)
    assert x0_BCHW.shape == y_BCHW.shape and torch.isfinite(x0_BCHW).all()


def test_untrained_estimate_is_c_skip_times_the_input() -> None:
    model = denoiser((14, 14), attention_cells=4)
    y_BCHW, sigma_B, label_B = inputs(model)
    torch.testing.assert_close(model(y_BCHW, sigma_B, label_B), 0.25 / (0.25 + 0.49) * y_BCHW)


def test_preconditioning_is_the_published_one() -> None:
    """By hand at σ = σ_data = 0.5: ½, 0.5·0.5/√½, 1/√½, ln(½)/4 (Karras et al. 2022, table 1)."""
    found = [value.item() for value in preconditioning(torch.tensor([0.5]), 0.5)]
    assert found == pytest.approx([0.5, 0.25 / 0.5**0.5, 1 / 0.5**0.5, -0.1732868])


def test_every_condition_changes_the_estimate() -> None:
    model = awake(denoiser(attention_cells=4))
    y_BCHW, sigma_B, label_B = inputs(model)
    plain = model(y_BCHW, sigma_B, label_B)
    assert not torch.allclose(plain, model(y_BCHW, sigma_B, (label_B + 1) % 3))
    assert not torch.allclose(plain, model(y_BCHW, 2 * sigma_B, label_B))
    assert not torch.allclose(plain, model(y_BCHW, sigma_B, label_B, torch.full_like(label_B, CLIPPED)))
    assert torch.equal(plain, model(y_BCHW, sigma_B, label_B, torch.zeros_like(label_B)))


def test_images_of_one_batch_do_not_see_each_other() -> None:
    model = awake(denoiser(attention_cells=4))
    y_BCHW, sigma_B, label_B = inputs(model)
    alone = torch.cat([model(y_BCHW[i : i + 1], sigma_B[i : i + 1], label_B[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(model(y_BCHW, sigma_B, label_B), alone, atol=1e-5, rtol=1e-5)


def test_the_estimate_at_one_corner_depends_on_the_opposite_one() -> None:
    """The coarsest grid is fully connected, so no pixel is out of sight."""
    model = awake(denoiser((28, 28)))
    y_BCHW, sigma_B, label_B = inputs(model)
    changed_BCHW = y_BCHW.clone()
    changed_BCHW[..., -1, -1] += 1
    assert not torch.equal(model(y_BCHW, sigma_B, label_B)[..., 0, 0], model(changed_BCHW, sigma_B, label_B)[..., 0, 0])


def test_one_seed_gives_one_network_and_one_estimate() -> None:
    first, second = awake(denoiser()), awake(denoiser())
    y_BCHW, sigma_B, label_B = inputs(first)
    assert torch.equal(first(y_BCHW, sigma_B, label_B), second(y_BCHW, sigma_B, label_B))


def test_weights_of_one_network_fit_another_of_the_same_config() -> None:
    first = awake(denoiser())
    second = Denoiser(first.config)
    second.load_state_dict(first.state_dict())
    y_BCHW, sigma_B, label_B = inputs(first)
    assert torch.equal(first(y_BCHW, sigma_B, label_B), second(y_BCHW, sigma_B, label_B))


def test_levels_halve_the_grid_to_four_cells_and_stop_widening() -> None:
    grids, widths = levels(NetworkConfig(1, 64, 28, num_classes=2, base_width=16))
    assert grids == [(32, 14), (16, 7), (8, 4), (4, 2)]
    assert widths == [16, 32, 64, 64]


def test_every_grid_of_at_most_so_many_cells_has_attention_and_no_other() -> None:
    model = denoiser((64, 28), attention_cells=16)
    grids, _ = levels(model.config)
    assert grids == [(32, 14), (16, 7), (8, 4), (4, 2)]
    for blocks in (model.unet.encode, model.unet.decode):
        found = [any(isinstance(block, AttentionBlock) for block in level.children()) for level in blocks]
        assert found == [False, True, True, False], "the coarsest grid has it in the middle"
    assert any(isinstance(block, AttentionBlock) for block in model.unet.middle)
    assert not any(isinstance(module, AttentionBlock) for module in denoiser((64, 28), attention_cells=3).modules())


# ---- presets ---------------------------------------------------------------------------------------------------


def documented() -> dict[str, list[str]]:
    """The cells of docs/networks.md's table by preset."""
    text = (Path(__file__).parents[2] / "docs/networks.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \| (\d.*) \|$", text, flags=re.MULTILINE)
    return {preset: cells.split(" | ") for preset, cells in rows}


def of_preset(made_for: str, **network: Any) -> NetworkConfig:
    """The network of a preset for images of "height×width×channels" and ten classes."""
    height, width, channels = map(int, made_for.split("×"))
    image = ImageSpec(channels=channels, height=height, width=width)
    return network_config(NetworkSpec.model_validate(network), image, 10, 0.5)


@pytest.mark.parametrize("preset", NETWORK_SIZES)
def test_a_preset_is_what_its_page_says(preset: str) -> None:
    made_for, base_width, num_blocks, attention_cells, channels, num_parameters = documented()[preset]
    config = of_preset(made_for, preset=preset)
    assert [config.base_width, config.num_blocks, config.attention_cells] == list(
        map(int, (base_width, num_blocks, attention_cells))
    )
    grids, widths = levels(config)
    assert channels == ", ".join(f"{grid[0]}: {width}" for grid, width in zip(grids, widths, strict=True))
    with torch.device("meta"):
        found = sum(parameter.numel() for parameter in Denoiser(config).parameters())
    assert f"{found:,}" == num_parameters
    assert documented().keys() == NETWORK_SIZES.keys()


@pytest.mark.parametrize("preset", NETWORK_SIZES)
def test_a_preset_takes_one_training_step_at_its_resolution(preset: str) -> None:
    config = of_preset(documented()[preset][0], preset=preset)
    generator = torch.Generator().manual_seed(6)
    shape = (2, config.image_channels, config.image_height, config.image_width)
    source = records(torch.rand(shape, generator=generator) * 2 - 1, torch.arange(2), (0.01, 80.0))
    model = trained(config, loss_of(source, 0.5), num_images=2, batch=2)
    x0_BCHW = model(torch.randn(shape, generator=generator), torch.full((2,), 5.0), torch.arange(2))
    assert x0_BCHW.shape == shape and torch.isfinite(x0_BCHW).all()
    assert model.unet.out.weight.count_nonzero() > 0, "zero before the step"


def test_fields_beside_a_preset_overrule_it_and_tiny_is_the_default() -> None:
    assert NetworkSpec() == NetworkSpec(preset="tiny")
    assert NetworkSpec().size == NETWORK_SIZES["tiny"]
    given = NetworkSpec(preset="large", num_blocks=1, attention_cells=0).size
    assert (given.base_width, given.num_blocks, given.attention_cells) == (96, 1, 0)


# ---- gradient checkpointing ------------------------------------------------------------------------------------


def gradients(model: Denoiser) -> dict[str, Tensor]:
    y_BCHW, sigma_B, label_B = inputs(model)
    model(y_BCHW, sigma_B, label_B).square().mean().backward()
    return {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}


@pytest.mark.parametrize(
    ("backbone", "kept"), [("unet", set()), ("diffusers", {"unet.unet.mid_block.resnets.0.conv1"})]
)
def test_checkpointed_gradients_are_the_plain_ones_and_blocks_are_computed_twice(backbone: str, kept: set[str]) -> None:
    if backbone == "diffusers":
        pytest.importorskip("diffusers")
    config = NetworkConfig(1, 9, 8, num_classes=3, base_width=8, attention_cells=5, backbone=backbone)
    found, calls = [], []
    for recomputed in (False, True):
        torch.manual_seed(1)
        model = awake(Denoiser(config))
        if recomputed:
            model.checkpoint_gradients()
        entered: list[str] = []
        for name, module in model.named_modules():
            if name.endswith((".first", ".conv1")):
                module.register_forward_pre_hook(lambda *_, name=name, entered=entered: entered.append(name))
        found.append(gradients(model.train()))
        calls.append(Counter(entered))
    plain, again = found
    assert plain.keys() == again.keys() and len(plain) == len(list(model.parameters()))
    for name, gradient in plain.items():
        torch.testing.assert_close(again[name], gradient, rtol=1e-5, atol=1e-7)
    assert set(calls[0].values()) == {1} and len(calls[0]) > 2
    assert calls[1] == calls[0] + Counter(calls[0].keys() - kept)


# ---- diffusers' U-Net ------------------------------------------------------------------------------------------


@pytest.fixture
def of_diffusers() -> NetworkConfig:
    pytest.importorskip("diffusers")
    return NetworkConfig(1, 9, 8, num_classes=3, base_width=8, attention_cells=4, backbone="diffusers")


def test_diffusers_unet_starts_as_nothing_and_every_condition_matters_to_it(of_diffusers: NetworkConfig) -> None:
    torch.manual_seed(1)
    model = Denoiser(of_diffusers)
    y_BCHW, sigma_B, label_B = inputs(model)
    torch.testing.assert_close(model(y_BCHW, sigma_B, label_B), 0.25 / (0.25 + 0.49) * y_BCHW)
    with torch.no_grad():
        plain = awake(model)(y_BCHW, sigma_B, label_B)
        assert plain.shape == y_BCHW.shape and torch.isfinite(plain).all()
        assert not torch.allclose(plain, model(y_BCHW, sigma_B, (label_B + 1) % 3))
        assert not torch.allclose(plain, model(y_BCHW, 2 * sigma_B, label_B))
        assert not torch.allclose(plain, model(y_BCHW, sigma_B, label_B, torch.full_like(label_B, CLIPPED)))
        assert torch.equal(plain, model(y_BCHW, sigma_B, label_B, torch.zeros_like(label_B)))


def test_diffusers_grids_are_the_image_and_its_halves_to_seven_cells(of_diffusers: NetworkConfig) -> None:
    config = replace(of_diffusers, image_height=28, image_width=28)
    assert diffusers_levels(config) == ([(28, 28), (14, 14), (7, 7)], [8, 16, 32])
    assert attention_in(config) == set()
    places = {"unet.unet.down_blocks.2", "unet.unet.mid_block", "unet.unet.up_blocks.0"}
    assert attention_in(replace(config, attention_cells=7)) == places


def attention_in(config: NetworkConfig) -> set[str]:
    """The blocks of diffusers' U-Net that have attention."""
    with torch.device("meta"):
        names = [name for name, _ in Denoiser(config).named_parameters()]
    return {name.partition(".attentions")[0] for name in names if ".attentions" in name}


def test_diffusers_unet_resumes_bit_for_bit_and_samples(of_diffusers: NetworkConfig, tmp_path: Path) -> None:
    shape = (6, 1, 9, 8)
    images_NCHW = torch.rand(shape, generator=torch.Generator().manual_seed(6)) * 2 - 1
    loss = loss_of(records(images_NCHW, torch.arange(6) % 3, (0.01, 80.0)), 0.5)

    def stopped(model: nn.Module, generator: torch.Generator, batch: int, mine: slice) -> Tensor:
        signal.raise_signal(signal.SIGTERM)
        return loss(model, generator, batch, mine)

    folder = Checkpoints(FolderStore(tmp_path.as_uri()), "run/")
    with pytest.raises(Interrupted, match="after 4 of 16 images"):
        trained(of_diffusers, stopped, num_images=16, batch=4, checkpoints=folder)
    resumed = trained(of_diffusers, loss, num_images=16, batch=4, checkpoints=folder)
    uninterrupted = trained(of_diffusers, loss, num_images=16, batch=4)
    for name, weight in uninterrupted.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], weight), name
    read = denoiser_from_bytes(denoiser_bytes(resumed), "shared", of_diffusers)
    sigmas_N = torch.tensor([80.0, 5.0, 0.5, 0.0])
    noise_BCHW = 80 * torch.randn(shape, generator=torch.Generator().manual_seed(7))
    drawn = [heun(each, noise_BCHW, sigmas_N, torch.arange(6) % 3) for each in (read, resumed)]
    assert torch.equal(*drawn) and torch.isfinite(drawn[0]).all()
    with pytest.raises(DataInvalid, match="backbone 'diffusers' where the job says unet"):
        denoiser_from_bytes(denoiser_bytes(resumed), "shared", replace(of_diffusers, backbone="unet"))


def test_without_diffusers_its_unet_is_refused_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(ConfigurationInvalid, match="needs the package diffusers, found none; install it") as refused:
        Denoiser(NetworkConfig(1, 8, 8, num_classes=2, backbone="diffusers"))
    assert refused.value.exit_code == 78


def test_rms_norm_has_unit_mean_square_and_its_own_gradient() -> None:
    x_BCHW = torch.randn(2, 5, 3, 2, dtype=torch.float64, requires_grad=True)
    mean_square_BHW = rms_norm(x_BCHW).square().mean(dim=1)
    assert mean_square_BHW.allclose(torch.ones_like(mean_square_BHW), rtol=1e-3)
    assert torch.autograd.gradcheck(rms_norm, (x_BCHW,))


@pytest.mark.parametrize("size", [(8, 8), (7, 5)])
def test_unfold_undoes_fold(size: tuple[int, int]) -> None:
    x_BCHW = torch.randn(2, 3, *size)
    assert torch.equal(unfold(fold(x_BCHW), x_BCHW), x_BCHW)


def test_training_on_two_classes_reduces_the_loss_and_separates_them() -> None:
    """Class 0 is a bright left half, class 1 a bright right half: at high noise only the label can tell."""
    torch.manual_seed(4)
    patterns_KCHW = torch.full((2, 1, 8, 8), -0.5)
    patterns_KCHW[0, :, :, :4] = patterns_KCHW[1, :, :, 4:] = 0.5
    model, generator = denoiser(), torch.Generator().manual_seed(5)
    optimiser = torch.optim.Adam(model.parameters(), lr=5e-3)
    losses = []
    for _ in range(150):
        label_B = torch.randint(2, (32,), generator=generator)
        sigma_B = log_uniform_sigmas(32, 0.1, 20, generator)
        noise_BCHW = torch.randn(32, 1, 8, 8, generator=generator)
        flag_B = torch.zeros_like(label_B)
        loss = denoising_loss(model, patterns_KCHW[label_B], sigma_B, label_B, flag_B, noise_BCHW).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert sum(losses[-20:]) < 0.6 * sum(losses[:20])
    y_BCHW = 10 * torch.randn(2, 1, 8, 8, generator=generator)
    x0_BCHW = model(y_BCHW, torch.full((2,), 10.0), torch.arange(2))
    torch.testing.assert_close(x0_BCHW, patterns_KCHW, atol=0.4, rtol=0)
