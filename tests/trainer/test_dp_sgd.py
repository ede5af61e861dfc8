"""DP-SGD: what it costs by independent oracles, and that clip, noise and batches keep it, mutants included."""

import functools
import math
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.special import logsumexp
from scipy.stats import norm
from torch import Tensor, nn

from feddiff_protocol.accountant import epsilon_of
from feddiff_protocol.errors import ConfigurationInvalid, DataInvalid, Interrupted, SpecInvalid
from feddiff_trainer import dp_sgd as module
from feddiff_trainer.checkpoints import Checkpoints
from feddiff_trainer.denoising import denoising_loss, log_normal_sigmas
from feddiff_trainer.dp_sgd import (
    CLIP_NORM,
    clipped_sum,
    denoiser_gradients,
    dp_sgd,
    epsilon_of_steps,
    noise_multiplier,
    poisson_sample,
    with_noise,
)
from feddiff_trainer.network import Denoiser, NetworkConfig
from feddiff_trainer.stores import open_store
from feddiff_trainer.training import Run

pytestmark = pytest.mark.usefixtures("one_thread", "noise_once")

DELTA = 1e-5
EpsilonOfSteps = Callable[[float, float, int, float], float]


@pytest.fixture
def noise_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its noise is computed once for all tests that take the same steps."""
    monkeypatch.setattr(module, "noise_multiplier", remembered)


remembered = functools.cache(noise_multiplier)


# ---- What it costs ----------------------------------------------------------------------------------------------


def densities(x: Any, noise: float, rate: float) -> tuple[Any, Any]:
    """Of one step's outcome with a record whose clipped gradient is 1, and with one whose is -1; one weight."""
    without = (1 - rate) * norm.pdf(x, 0, noise)
    return without + rate * norm.pdf(x, 1, noise), without + rate * norm.pdf(x, -1, noise)


def check_one_step(cost: EpsilonOfSteps, noise: float, rate: float, delta: float) -> None:
    """δ at that ε, by adding up [p - e^ε·q]₊, is the δ that was asked for."""
    x = np.linspace(-12 * noise - 1, 12 * noise + 1, 400_001)
    p, q = densities(x, noise, rate)
    found = np.maximum(0, p - math.exp(cost(noise, rate, 1, delta)) * q).sum() * (x[1] - x[0])
    assert found == pytest.approx(delta, rel=0.02)
    assert found <= delta * (1 + 1e-6)


def check_many_steps(cost: EpsilonOfSteps, noise: float, rate: float, num_steps: int, delta: float = 0.02) -> None:
    """The same by drawing privacy losses, E[1 - e^(ε - L)]₊."""
    rng, draws = np.random.default_rng(0), 50_000
    loss = np.zeros(draws)
    for _ in range(num_steps):
        x = rng.normal(0, noise, draws) + (rng.random(draws) < rate)
        p, q = densities(x, noise, rate)
        loss += np.log(p / q)
    found = np.maximum(0, 1 - np.exp(cost(noise, rate, num_steps, delta) - loss)).mean()
    assert found == pytest.approx(delta, rel=0.15)


def added_or_removed(noise: float, rate: float, num_steps: int, delta: float) -> float:
    """What accountants of DP-SGD commonly say: ε of a record that is added or removed."""
    from dp_accounting.pld.privacy_loss_distribution import from_gaussian_mechanism

    step = from_gaussian_mechanism(noise, sampling_prob=rate, value_discretization_interval=1e-3)
    return float(step.self_compose(num_steps).get_epsilon_for_delta(delta))


@pytest.mark.parametrize(("noise", "rate", "delta"), [(1.0, 0.1, 1e-3), (2.0, 0.5, 1e-5), (0.5, 0.02, 1e-4)])
def test_one_step_costs_what_its_worst_pair_says(noise: float, rate: float, delta: float) -> None:
    check_one_step(epsilon_of_steps, noise, rate, delta)
    with pytest.raises(AssertionError):
        check_one_step(added_or_removed, noise, rate, delta)


@pytest.mark.parametrize(("noise", "rate", "num_steps"), [(1.5, 0.1, 60), (4.0, 0.5, 40)])
def test_many_steps_cost_what_their_losses_add_up_to(noise: float, rate: float, num_steps: int) -> None:
    check_many_steps(epsilon_of_steps, noise, rate, num_steps)
    with pytest.raises(AssertionError):
        check_many_steps(added_or_removed, noise, rate, num_steps)


@pytest.mark.parametrize(("noise", "num_steps"), [(20.0, 400), (3.0, 1), (50.0, 100)])
def test_with_every_record_in_every_step_it_is_the_gaussian_trade_off(noise: float, num_steps: int) -> None:
    """Pins what the library makes of its sensitivity where a record is replaced."""
    exact = epsilon_of(2 * math.sqrt(num_steps) / noise, DELTA)
    assert exact <= epsilon_of_steps(noise, 1.0, num_steps, DELTA) * (1 + 1e-9) <= exact * 1.005


def renyi_epsilon(noise: float, rate: float, num_steps: int, *, replaced: bool) -> float:
    """ε at δ = 1e-5 by Rényi divergences, added up on a grid (Mironov 2017, proposition 3)."""
    x = np.linspace(-1 - 40 * noise, 64 + 40 * noise, 100_001)

    def log_density(mean: float) -> Any:
        return np.logaddexp(math.log(1 - rate) + norm.logpdf(x, 0, noise), math.log(rate) + norm.logpdf(x, mean, noise))

    log_p, log_q = log_density(1), log_density(-1 if replaced else 0)

    def bound(order: float) -> float:
        moment = logsumexp(order * log_p - (order - 1) * log_q) + math.log(x[1] - x[0])
        return float(num_steps * moment + math.log(1 / DELTA)) / (order - 1)

    return min(bound(order) for order in [*np.arange(1.5, 8, 0.25), *range(8, 33)])


@pytest.mark.parametrize(("noise", "epochs", "published"), [(1.12, 60, 2.92), (0.6, 30, 9.74), (1.2, 10, 1.20)])
def test_the_tensorflow_privacy_tutorials_points_are_met_and_a_replaced_record_costs_more(
    noise: float, epochs: int, published: float
) -> None:
    """MNIST, batches of 256; the tutorial's ε are of a record that is added or removed, by Rényi divergences."""
    rate, num_steps = 256 / 60_000, epochs * 60_000 // 256
    assert renyi_epsilon(noise, rate, num_steps, replaced=False) == pytest.approx(published, rel=0.03)
    assert added_or_removed(noise, rate, num_steps, DELTA) < published
    ours = epsilon_of_steps(noise, rate, num_steps, DELTA)
    assert 1.2 * added_or_removed(noise, rate, num_steps, DELTA) < ours
    assert ours < renyi_epsilon(noise, rate, num_steps, replaced=True)


def test_no_pair_of_gradients_is_worse_than_two_opposite_ones() -> None:
    """Of docs/decisions/0016: two weights, on a grid of outcomes."""
    rng, noise = np.random.default_rng(0), 0.8
    axis = np.linspace(-6, 6, 201)
    x = np.stack(np.meshgrid(axis, axis), axis=-1)

    def density(mean: Any) -> Any:
        return np.exp(-((x - mean) ** 2).sum(-1) / (2 * noise**2))

    def divergences(u: Any, v: Any, rate: float) -> list[float]:
        p, q = ((1 - rate) * density(0) + rate * density(mean) for mean in (u, v))
        return [float(np.maximum(0, p - gamma * q).sum()) for gamma in gammas]

    gammas = [0.2, 0.7, 1.0, 1.5, 4.0]
    for rate in (0.05, 0.6):
        worst = divergences(np.array([1.0, 0.0]), np.array([-1.0, 0.0]), rate)
        for _ in range(40):
            pair = rng.normal(size=(2, 2))
            u, v = pair / np.maximum(1, np.linalg.norm(pair, axis=1, keepdims=True))
            found = divergences(u, v, rate)
            assert all(each <= most * 1.001 for each, most in zip(found, worst, strict=True))


@pytest.mark.parametrize("epsilon", [0.1, 1.0, 10.0, 1000.0])
@pytest.mark.parametrize(("rate", "num_steps"), [(0.5, 200), (0.01, 1000)])
def test_the_noise_keeps_epsilon_and_is_hardly_more_than_needed(epsilon: float, rate: float, num_steps: int) -> None:
    noise = noise_multiplier(epsilon, DELTA, rate, num_steps)
    assert epsilon_of_steps(noise, rate, num_steps, DELTA, 1e-4 * epsilon) <= epsilon
    assert epsilon_of_steps(noise / 1.002, rate, num_steps, DELTA, 1e-4 * epsilon) > epsilon


def test_noise_has_a_floor_whatever_epsilon_is() -> None:
    assert noise_multiplier(1e6, DELTA, 0.5, 10) == module.LEAST_NOISE


def test_without_dp_accounting_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "dp_accounting", None)
    with pytest.raises(ConfigurationInvalid, match=r"pip install 'feddiff\[experiment\]'"):
        epsilon_of_steps(1.0, 0.1, 10, DELTA)


# ---- What keeps it ----------------------------------------------------------------------------------------------


class Weights(nn.Module):
    """Two tensors of weights, zero."""

    def __init__(self, count: int = 6) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.zeros(2, count // 3))
        self.second = nn.Parameter(torch.zeros(count // 3))


def given(gradient_NP: Tensor, chunk: int = 3) -> module.RecordGradients:
    """Records whose gradients are what they are, whatever the weights."""

    def gradients(model: nn.Module, index_B: Tensor) -> Iterator[Sequence[Tensor]]:
        third = gradient_NP.shape[1] // 3
        for start in range(0, len(index_B), chunk):
            rows = gradient_NP[index_B[start : start + chunk]]
            yield [rows[:, : 2 * third].view(-1, 2, third), rows[:, 2 * third :]]

    return gradients


SETTINGS: dict[str, Any] = {
    "epsilon": 5.0, "delta": DELTA, "device": torch.device("cpu"), "num_images": 60, "batch": 6, "learning_rate": 0.05,
    "ema_width": 0.1,
}  # fmt: skip


def steps_of(gradient_NP: Tensor, **changes: Any) -> list[Tensor]:
    """What every step hands to Adam, times the size of a batch: clipped gradients, added up, with noise."""
    taken: list[Tensor] = []

    def noticed(run: Run, *arguments: Any) -> None:
        run.step += 1
        taken.append(torch.cat([weight.grad.flatten() for weight in run.weights if weight.grad is not None]))

    settings = SETTINGS | {"num_records": len(gradient_NP), "on_progress": lambda done, total: None} | changes
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "advance", noticed)
        dp_sgd(Weights(gradient_NP.shape[1]), given(gradient_NP), **settings)
    return [settings["batch"] * each.double() for each in taken]


def no_noise(shape: tuple[int, ...]) -> np.ndarray:
    return np.zeros(shape)


def check_clip() -> None:
    """Replacing a record moves no sum by more than 2·C, however long its gradient is."""
    torch.manual_seed(0)
    gradient_NP = 1000 * torch.randn(6, 30)
    for row in range(6):
        other_NP = gradient_NP.clone()
        other_NP[row] = -5 * gradient_NP[row]
        (one, *_), (other, *_) = (steps_of(each, normals=no_noise) for each in (gradient_NP, other_NP))
        assert 1.9 < float((one - other).norm()) < 2 * CLIP_NORM * (1 + 1e-2)  # noise's grid is coarse


def unclipped_sum(chunks: Any, weights: Any) -> Tensor:
    return torch.stack([torch.cat([each.flatten(1).double().sum(0) for each in chunk]) for chunk in chunks]).sum(0)


def test_a_replaced_record_moves_a_step_by_at_most_twice_the_clip() -> None:
    check_clip()


def test_without_the_clip_the_check_is_red(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "clipped_sum", unclipped_sum)
    with pytest.raises(AssertionError):
        check_clip()


def test_a_clip_of_the_sum_in_place_of_every_record_is_red(monkeypatch: pytest.MonkeyPatch) -> None:
    def of_the_sum(chunks: Any, weights: Any) -> Tensor:
        total_P = unclipped_sum(chunks, weights)
        return total_P * min(1.0, 6 * CLIP_NORM / float(total_P.norm()))

    monkeypatch.setattr(module, "clipped_sum", of_the_sum)
    with pytest.raises(AssertionError):
        check_clip()


def test_short_gradients_are_added_as_they_are_and_long_ones_keep_their_direction() -> None:
    torch.manual_seed(0)
    short_NP, long_P = 0.1 * torch.rand(4, 6), torch.tensor([3.0, 0, 4, 0, 0, 0])
    total_P = clipped_sum(given(torch.cat([short_NP, long_P[None]]))(Weights(), torch.arange(5)), [torch.zeros(6)])
    torch.testing.assert_close(total_P, (short_NP.sum(0) + long_P / 5).double(), rtol=1e-6, atol=1e-7)
    assert total_P.dtype == torch.float64


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_is_an_error(value: float) -> None:
    with pytest.raises(DataInvalid, match="expected finite gradients"):
        steps_of(torch.full((6, 6), value))


def check_noise() -> None:
    """The noise that is found in the steps keeps ε, its standard deviation being known to half a percent, and no two
    steps have one noise."""
    steps = torch.stack(steps_of(torch.zeros(12, 60_000), batch=3, num_images=30))
    assert len(steps) == 10
    deviation = float(steps.std())
    assert deviation > 0
    assert epsilon_of_steps(1.005 * deviation / CLIP_NORM, 3 / 12, 10, DELTA) <= SETTINGS["epsilon"]
    assert epsilon_of_steps(0.99 * deviation / CLIP_NORM, 3 / 12, 10, DELTA) > SETTINGS["epsilon"]
    alike = torch.corrcoef(steps) - torch.eye(10)
    assert float(alike.abs().max()) < 0.08
    assert bool(((steps.std(dim=1) / deviation - 1).abs() < 0.05).all())


def test_every_step_has_noise_of_its_own_as_large_as_was_charged() -> None:
    check_noise()


NOISE_MUTANTS: dict[str, Callable[..., Any]] = {
    "a tenth less": lambda total, std, normals: with_noise(total, 0.9 * std, normals),
    "none": lambda total, std, normals: total,
    "one for all steps": lambda total, std, normals: with_noise(total, std, np.random.default_rng(0).standard_normal),
}


@pytest.mark.parametrize("mutant", NOISE_MUTANTS)
def test_other_noise_is_red(mutant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "with_noise", NOISE_MUTANTS[mutant])
    with pytest.raises(AssertionError):
        check_noise()


def check_batches(sample: Callable[[int, float], Any]) -> None:
    """Every record by itself, with the chance that is charged: sizes vary as a binomial's do."""
    batches = [sample(40, 0.3) for _ in range(4000)]
    counts_N = np.bincount(np.concatenate(batches), minlength=40) / 4000
    sizes = np.array([len(batch) for batch in batches])
    assert counts_N.min() > 0.26 and counts_N.max() < 0.34
    assert sizes.mean() == pytest.approx(12, rel=0.03)
    assert sizes.var() == pytest.approx(40 * 0.3 * 0.7, rel=0.15)
    assert all(len(set(batch.tolist())) == len(batch) for batch in batches)


def test_batches_are_poisson_samples_and_batches_of_one_size_are_red() -> None:
    check_batches(poisson_sample)
    rng = np.random.default_rng(0)
    with pytest.raises(AssertionError):
        check_batches(lambda count, rate: rng.choice(count, round(rate * count), replace=False))


def test_the_chance_of_a_record_is_met_at_its_ends() -> None:
    ones, zeros = (lambda count: b"\xff" * count), bytes
    assert len(poisson_sample(5, 1.0, ones)) == 5
    assert len(poisson_sample(5, 0.999, ones)) == 0
    assert len(poisson_sample(5, 1e-9, zeros)) == 5


def test_a_batch_without_records_is_a_step_with_noise_like_any_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "poisson_sample", lambda *_: np.empty(0, np.int64))
    steps = steps_of(torch.ones(12, 300))
    assert len(steps) == 10 and all(float(step.std()) > 0.5 for step in steps)


def test_a_batch_larger_than_an_owner_has_records_is_refused() -> None:
    with pytest.raises(SpecInvalid, match="batch: expected 1 to 12, the records of an owner, found 13"):
        steps_of(torch.zeros(12, 6), batch=13)


# ---- Going on ---------------------------------------------------------------------------------------------------


def counted(taken: list[np.ndarray]) -> Callable[[tuple[int, ...]], np.ndarray]:
    """A source of noise that goes on where it was, and keeps what it gave."""
    rng = np.random.default_rng(7)

    def normals(shape: tuple[int, ...]) -> np.ndarray:
        taken.append(rng.standard_normal(shape))
        return taken[-1]

    return normals


def trained(gradient_NP: Tensor, **changes: Any) -> Tensor:
    settings = SETTINGS | {"num_records": len(gradient_NP), "on_progress": lambda done, total: None} | changes
    network = dp_sgd(Weights(gradient_NP.shape[1]), given(gradient_NP), **settings)
    return torch.cat([weight.flatten() for weight in network.parameters()])


def stop_after(steps: int) -> Callable[[int, int], None]:
    def stop(done: int, total: int) -> None:
        if done == steps * SETTINGS["batch"]:
            os.kill(os.getpid(), signal.SIGTERM)

    return stop


@pytest.mark.parametrize("steps", [1, 4, 10])
def test_a_stopped_run_goes_on_and_takes_no_step_and_no_noise_twice(tmp_path: Path, steps: int) -> None:
    """With every record in every batch and a source of noise that goes on, as if it had not been stopped."""
    torch.manual_seed(0)
    gradient_NP = torch.randn(6, 6)
    whole: list[np.ndarray] = []
    parts: list[np.ndarray] = []
    expected = trained(gradient_NP, normals=counted(whole))
    checkpoints = Checkpoints(open_store((tmp_path / "store").as_uri()), "run/checkpoints/")
    noise = counted(parts)
    with pytest.raises(Interrupted, match="run again to go on"):
        trained(gradient_NP, normals=noise, on_progress=stop_after(steps), checkpoints=checkpoints)
    assert torch.equal(trained(gradient_NP, normals=noise, checkpoints=checkpoints), expected)
    assert len(whole) == len(parts) == 10


def test_steps_that_a_crash_undid_are_taken_again_with_other_noise(tmp_path: Path) -> None:
    """Twice from one checkpoint: nothing of the first time comes again."""
    stores = [Checkpoints(open_store((tmp_path / name).as_uri()), "run/") for name in ("first", "again", "and-again")]
    with pytest.raises(Interrupted):
        trained(torch.zeros(12, 300), on_progress=stop_after(1), checkpoints=stores[0])
    newest, steps = stores[0].newest(), []
    assert newest is not None and newest.step == 1
    for checkpoints in stores[1:]:
        checkpoints.save(newest)
        steps += steps_of(torch.zeros(12, 300), checkpoints=checkpoints)
    assert len(steps) == 2 * 9
    assert float((torch.corrcoef(torch.stack(steps)) - torch.eye(18)).abs().max()) < 0.4


def test_a_checkpoint_of_another_promise_is_refused(tmp_path: Path) -> None:
    checkpoints = Checkpoints(open_store((tmp_path / "store").as_uri()), "run/checkpoints/")
    trained(torch.zeros(12, 6), checkpoints=checkpoints)
    with pytest.raises(SpecInvalid, match="noise_multiplier"):
        trained(torch.zeros(12, 6), epsilon=6.0, checkpoints=checkpoints)


def test_noise_is_the_operating_systems_unless_a_test_brings_its_own() -> None:
    one, other = (trained(torch.zeros(12, 6)) for _ in range(2))
    assert not torch.equal(one, other)


# ---- Of a denoiser ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backbone", ["unet", "diffusers"])
@pytest.mark.parametrize("at_once", [1, 6, 1024])
def test_a_records_gradient_is_that_of_its_mean_loss_over_noise_levels(
    backbone: str, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    network = Denoiser(NetworkConfig(1, 8, 8, 3, base_width=8, attention_cells=4, backbone=backbone))
    for weight in network.parameters():
        weight.data += 0.05 * torch.randn_like(weight)
    x0_NCHW, label_N, multiplicity = 2 * torch.rand(5, 1, 8, 8) - 1, torch.tensor([0, 1, 2, 0, 1]), 3
    monkeypatch.setattr(os, "urandom", lambda count: bytes(count))
    monkeypatch.setattr(module, "IMAGES", at_once)
    gradients = denoiser_gradients(x0_NCHW, label_N, sigmas=(0.02, 20.0), multiplicity=multiplicity, sigma_data=0.5)
    index_B, chunk = torch.tensor([4, 0, 3]), max(1, min(3, at_once // multiplicity))
    found = [torch.cat([each.flatten(1) for each in chunk], dim=1) for chunk in gradients(network, index_B)]
    assert len(found) == math.ceil(3 / chunk)
    generator, expected = torch.Generator().manual_seed(0), []
    for start in range(0, 3, chunk):
        rows = index_B[start : start + chunk]
        sigma_BK = log_normal_sigmas(len(rows) * multiplicity, 0.02, 20.0, generator).view(-1, multiplicity)
        noise_BKCHW = torch.randn(len(rows), multiplicity, 1, 8, 8, generator=generator)
        for position, row in enumerate(rows.tolist()):
            label_K = label_N[row].expand(multiplicity)
            x0_KCHW = x0_NCHW[row].expand(multiplicity, 1, 8, 8)
            drawn = (sigma_BK[position], label_K, torch.zeros_like(label_K), noise_BKCHW[position])
            loss = denoising_loss(network, x0_KCHW, *drawn).mean()
            of_weights = torch.autograd.grad(loss, list(network.parameters()))
            expected.append(torch.cat([each.flatten() for each in of_weights]))
    torch.testing.assert_close(torch.cat(found), torch.stack(expected), rtol=1e-3, atol=1e-5)


def test_no_record_in_a_batch_gives_no_gradient() -> None:
    network = Denoiser(NetworkConfig(1, 8, 8, 3, base_width=8))
    gradients = denoiser_gradients(
        torch.zeros(5, 1, 8, 8), torch.zeros(5, dtype=torch.long), sigmas=(0.02, 20.0), multiplicity=2, sigma_data=0.5
    )
    total_P = clipped_sum(gradients(network, torch.empty(0, dtype=torch.long)), list(network.parameters()))
    assert not bool(total_P.any())
