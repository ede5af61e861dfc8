"""The loop on a small network; run as a script, this file is one of two ranks (see two_ranks)."""

import json
import math
import os
import signal
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from feddiff_protocol.errors import ConfigurationInvalid, DataInvalid, FeddiffError, Interrupted, SpecInvalid
from feddiff_trainer import training
from feddiff_trainer.checkpoints import Checkpoints
from feddiff_trainer.stores import FolderStore
from feddiff_trainer.training import BatchLoss, Progress, World, distributed, train
from two_ranks import run_two_ranks

pytestmark = pytest.mark.usefixtures("one_thread")

ALONE = World(0, 1, torch.device("cpu"))
BATCH, NUM_STEPS = 16, 20
# Two ranks against one, float32, relative to the norm of all weights, after 20 steps. Measured: 4e-8; the mutants 0.1.
TOLERANCE = 1e-5
WEIGHTS = dict[str, Tensor]


class SmallDenoiser(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("frequencies", torch.arange(4.0), persistent=False)
        self.embed = nn.Linear(4, 32)
        self.first, self.second = nn.Linear(10, 32), nn.Linear(32, 10)

    def forward(self, y_BD: Tensor, sigma_B: Tensor) -> Tensor:
        embedded = self.embed((sigma_B.log()[:, None] * self.frequencies).cos())
        return self.second(torch.tanh(self.first(y_BD) + embedded))


def small_denoiser() -> SmallDenoiser:
    with torch.random.fork_rng():
        torch.manual_seed(5)
        return SmallDenoiser()


def records() -> Tensor:
    return torch.randn(50, 10, generator=torch.Generator().manual_seed(3))


def denoising(model: nn.Module, generator: torch.Generator, batch: int, mine: slice) -> Tensor:
    x_BD = records()[torch.randint(50, (batch,), generator=generator)]
    sigma_B = torch.randn(batch, generator=generator).exp()
    noise_BD = torch.randn(batch, 10, generator=generator)
    estimate_BD = model((x_BD + sigma_B[:, None] * noise_BD)[mine], sigma_B[mine])
    return (estimate_BD - x_BD[mine]).square().mean()


def run(loss: BatchLoss = denoising, world: World = ALONE, **changes: Any) -> nn.Module:
    arguments: dict[str, Any] = {
        "num_images": BATCH * NUM_STEPS,
        "batch": BATCH,
        "learning_rate": 0.01,
        "ema_width": 0.1,
        "seed": 11,
        "on_progress": lambda progress: None,
    }
    return train(small_denoiser(), loss, world=world, **{**arguments, **changes})


def kept_in(folder: Path) -> Checkpoints:
    return Checkpoints(FolderStore(folder.as_uri()), "run/")


def steps_in(folder: Path) -> list[int]:
    return [int(path.name[:12]) for path in sorted((folder / "run").iterdir())]


def saved() -> None:
    """What is on its way to the store is there."""
    for thread in threading.enumerate():
        if thread.name == "checkpoint":
            thread.join()


def at_call(number: int, act: Callable[[], None]) -> BatchLoss:
    """The loss that acts at the given call, counted from 0, before it is computed."""
    calls = iter(range(sys.maxsize))

    def loss(model: nn.Module, generator: torch.Generator, batch: int, mine: slice) -> Tensor:
        if next(calls) == number:
            act()
        return denoising(model, generator, batch, mine)

    return loss


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def weights(model: nn.Module) -> WEIGHTS:
    return dict(model.state_dict())


def distance(found: WEIGHTS, expected: WEIGHTS) -> float:
    """‖found - expected‖/‖expected‖ over all weights together."""
    gap = torch.cat([(found[name] - expected[name]).flatten() for name in expected])
    return float(gap.norm() / torch.cat([tensor.flatten() for tensor in expected.values()]).norm())


def same_bits(found: WEIGHTS, expected: WEIGHTS) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


# -- one rank against the textbook ------------------------------------------------------------------------------


def test_loop_is_adam_and_a_power_function_average() -> None:
    model, average, gamma = small_denoiser(), small_denoiser(), training.ema_exponent(0.1)
    adam = torch.optim.Adam(model.parameters(), betas=(0.9, 0.99), foreach=False, fused=False)
    for step in range(NUM_STEPS):
        generator = torch.Generator().manual_seed(training.step_seed(11, step))
        adam.param_groups[0]["lr"] = 0.01 * training.schedule(step, NUM_STEPS)
        adam.zero_grad()
        denoising(model, generator, BATCH, slice(0, BATCH)).backward()
        adam.step()
        beta = (1 - 1 / (step + 1)) ** (gamma + 1)
        with torch.no_grad():
            for mean, weight in zip(average.parameters(), model.parameters(), strict=True):
                mean.copy_(beta * mean + (1 - beta) * weight)
    assert distance(weights(run()), weights(average)) < 1e-6


def test_training_lowers_the_loss() -> None:
    seen: list[Progress] = []
    ticking = iter(range(10**6))
    run(num_images=BATCH * 300, on_progress=seen.append, clock=lambda: float(next(ticking)))
    assert seen[-1].loss < 0.8 * seen[0].loss


@pytest.mark.parametrize(("width", "gamma"), [(0.05, 16.97), (0.10, 6.94)])
def test_ema_exponent_reproduces_the_published_pairs(width: float, gamma: float) -> None:
    assert training.ema_exponent(width) == pytest.approx(gamma, abs=0.005)


def test_ema_weights_have_the_asked_width() -> None:
    share = [1.0]
    for step in range(2, 2001):
        newest = training.ema_weight(step, training.ema_exponent(0.1))
        share = [(1 - newest) * old for old in share] + [newest]
    when = [step / 2000 for step in range(1, 2001)]
    mean = math.fsum(w * t for w, t in zip(share, when, strict=True))
    variance = math.fsum(w * (t - mean) ** 2 for w, t in zip(share, when, strict=True))
    assert math.fsum(share) == pytest.approx(1)
    assert math.sqrt(variance) == pytest.approx(0.1, rel=0.01)


@pytest.mark.parametrize("width", [0.0, 0.3, math.nan])
def test_impossible_ema_width_is_refused(width: float) -> None:
    with pytest.raises(SpecInvalid, match="ema_width: expected between 0 and"):
        run(ema_width=width)


@pytest.mark.parametrize("num_steps", [1, 7, 40, 100_000])
def test_schedule_rises_to_one_and_falls_towards_zero(num_steps: int) -> None:
    shares = [training.schedule(step, num_steps) for step in range(num_steps)]
    peak = shares.index(max(shares))
    assert all(0 < share <= 1 for share in shares) and max(shares) > 0.99
    assert shares[: peak + 1] == sorted(shares[: peak + 1]) and shares[peak:] == sorted(shares[peak:], reverse=True)
    assert peak <= 0.05 * num_steps + 1 and (num_steps < 40 or shares[-1] < 0.01)


def test_steps_and_seeds_do_not_share_their_draws() -> None:
    used = {training.step_seed(seed, step) % 2**32 for seed in range(20) for step in range(20)}
    assert len(used) == 400


def test_last_batch_is_whole_and_images_are_counted() -> None:
    seen: list[Progress] = []
    calls = iter(range(100))
    run(at_call(-1, terminate), num_images=BATCH * 2 + 1, on_progress=seen.append, clock=lambda: next(calls) / 1e3)
    assert (seen[-1].images, seen[-1].num_images) == (33, 33)
    assert seen[-1].images_per_second > 0 and math.isfinite(seen[-1].loss)


def test_returned_average_is_ready_for_sampling() -> None:
    average = run(num_images=1)
    assert isinstance(average, SmallDenoiser) and not average.training
    assert not any(weight.requires_grad for weight in average.parameters())


# -- stop and go on ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def uninterrupted() -> WEIGHTS:
    torch.set_num_threads(1)
    return weights(run())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("call", [0, 7, NUM_STEPS - 1])
def test_run_stopped_by_a_signal_resumes_bit_for_bit(
    tmp_path: Path, uninterrupted: WEIGHTS, call: int, number: signal.Signals
) -> None:
    before = signal.getsignal(number)
    with pytest.raises(Interrupted, match=f"after {BATCH * (call + 1)} of 320 images") as stopped:
        run(at_call(call, lambda: os.kill(os.getpid(), number)), checkpoints=kept_in(tmp_path))
    assert stopped.value.exit_code == 75
    assert signal.getsignal(number) is before
    assert same_bits(weights(run(checkpoints=kept_in(tmp_path))), uninterrupted)


def test_run_killed_between_checkpoints_resumes_bit_for_bit(tmp_path: Path, uninterrupted: WEIGHTS) -> None:
    class Killed(BaseException):
        pass

    def kill() -> None:
        raise Killed

    now = [0.0]

    def minute_per_step(model: nn.Module, generator: torch.Generator, batch: int, mine: slice) -> Tensor:
        saved()
        now[0] += 60
        return killing(model, generator, batch, mine)

    killing = at_call(11, kill)
    folder = kept_in(tmp_path)
    with pytest.raises(Killed):
        run(minute_per_step, checkpoints=folder, checkpoint_seconds=240, clock=lambda: now[0])
    assert steps_in(tmp_path) == [4, 8]
    assert same_bits(weights(run(checkpoints=folder)), uninterrupted)


def test_resume_without_the_optimizer_or_with_new_draws_would_show(tmp_path: Path, uninterrupted: WEIGHTS) -> None:
    folder = kept_in(tmp_path)
    with pytest.raises(Interrupted):
        run(at_call(9, terminate), checkpoints=folder)
    saved = folder.newest()
    assert saved is not None
    forgetful = {name: tensor * (not name.startswith("adam.")) for name, tensor in saved.tensors.items()}
    kept_in(tmp_path / "forgetful").save(replace(saved, tensors=forgetful))
    reseeded = kept_in(tmp_path / "reseeded")
    reseeded.save(replace(saved, settings={**saved.settings, "seed": "12"}))
    assert not same_bits(weights(run(checkpoints=kept_in(tmp_path / "forgetful"))), uninterrupted)
    assert not same_bits(weights(run(checkpoints=reseeded, seed=12)), uninterrupted)


def test_finished_run_trains_no_further(tmp_path: Path, uninterrupted: WEIGHTS) -> None:
    run(checkpoints=kept_in(tmp_path))

    def never(*_: object) -> Tensor:
        raise AssertionError("a finished run takes no step")

    assert same_bits(weights(run(never, checkpoints=kept_in(tmp_path))), uninterrupted)


def test_signal_after_the_last_step_is_not_lost(tmp_path: Path, uninterrupted: WEIGHTS) -> None:
    def late(progress: Progress) -> None:
        if progress.images == progress.num_images:
            terminate()

    with pytest.raises(Interrupted):
        run(on_progress=late, checkpoints=kept_in(tmp_path))
    assert same_bits(weights(run(checkpoints=kept_in(tmp_path))), uninterrupted)


def test_stop_without_checkpoints_says_that_nothing_is_kept() -> None:
    with pytest.raises(Interrupted, match="nothing is kept"):
        run(at_call(0, terminate))


def test_checkpoint_of_another_run_is_refused(tmp_path: Path) -> None:
    run(checkpoints=kept_in(tmp_path))
    with pytest.raises(SpecInvalid, match=r"expected batch = 8, found 16 \(1 differ\); it belongs to another run"):
        run(checkpoints=kept_in(tmp_path), batch=8)
    with pytest.raises(SpecInvalid, match=r"expected adam.mean.0.bias = torch.float32 \(2,\), found None"):
        other = nn.Sequential(nn.Linear(2, 2))
        arguments = {"num_images": 320, "batch": 16, "learning_rate": 0.01, "ema_width": 0.1, "seed": 11}
        folder = kept_in(tmp_path)
        train(other, denoising, world=ALONE, on_progress=lambda _: None, checkpoints=folder, **arguments)


def test_loss_that_is_not_finite_stops_before_a_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(DataInvalid, match="images 0 to 320: expected a finite loss, found nan") as stopped:
        run(nan_at(5), checkpoints=kept_in(tmp_path), clock=lambda: 0.0)
    assert stopped.value.exit_code == 65
    assert kept_in(tmp_path).newest() is None


def test_weights_that_are_not_finite_are_not_kept(tmp_path: Path) -> None:
    def finite_with_infinite_gradient(model: nn.Module, *_: object) -> Tensor:
        return sum((0 * weight).sum() for weight in model.parameters()).sqrt()

    with pytest.raises(DataInvalid, match="step 1: expected finite weights"):
        run(finite_with_infinite_gradient, num_images=1, checkpoints=kept_in(tmp_path))
    assert kept_in(tmp_path).newest() is None


def nan_at(number: int) -> BatchLoss:
    calls = iter(range(sys.maxsize))
    return lambda *arguments: denoising(*arguments) * (math.nan if next(calls) == number else 1.0)


# -- how it is computed ------------------------------------------------------------------------------------------


def losses_of(**changes: Any) -> tuple[WEIGHTS, list[float]]:
    """Weights and the reported losses of a run that reports at every step."""
    seen: list[float] = []
    ticking = iter(range(10**6))
    model = run(on_progress=lambda progress: seen.append(progress.loss), clock=lambda: float(next(ticking)), **changes)
    return weights(model), seen


@pytest.mark.parametrize("accumulation", [2, 16])
def test_gradients_added_up_over_parts_of_a_batch_are_those_of_the_whole(
    uninterrupted: WEIGHTS, accumulation: int
) -> None:
    found, losses = losses_of(accumulation=accumulation)
    assert distance(found, uninterrupted) < TOLERANCE
    assert losses == pytest.approx(losses_of()[1], rel=1e-5)


def test_parts_that_draw_anew_or_are_always_the_first_exceed_the_tolerance(uninterrupted: WEIGHTS) -> None:
    """The mutants: each part draws a batch of its own, and each takes the same images of it."""

    def anew(model: nn.Module, generator: torch.Generator, batch: int, mine: slice) -> Tensor:
        return denoising(model, generator.manual_seed(generator.initial_seed() % 2**32 + mine.start), batch, mine)

    def first(model: nn.Module, generator: torch.Generator, batch: int, mine: slice) -> Tensor:
        return denoising(model, generator, batch, slice(0, mine.stop - mine.start))

    for mutant in (anew, first):
        assert distance(weights(run(mutant, accumulation=2)), uninterrupted) > 100 * TOLERANCE


@pytest.mark.parametrize("accumulation", [3, 32])
def test_parts_that_do_not_divide_a_processs_images_are_refused(accumulation: int) -> None:
    with pytest.raises(SpecInvalid, match=f"expected a divisor of 16 images a process, found {accumulation}"):
        run(accumulation=accumulation)


def test_bfloat16_comes_near_float32_and_is_not_it(uninterrupted: WEIGHTS) -> None:
    found, losses = losses_of(bfloat16=True)
    assert losses == pytest.approx(losses_of(bfloat16=False)[1], rel=0.02)
    assert TOLERANCE < distance(found, uninterrupted) < 0.01
    assert same_bits(losses_of(bfloat16=None)[0], uninterrupted), "on a CPU float32 unless asked for"


def test_a_compiled_network_learns_what_an_eager_one_does(
    uninterrupted: WEIGHTS, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Traced as torch.compile does it, and run without its C++ compiler, which takes its time."""
    compiled, compile_module = [], torch.compile

    def traced(module: nn.Module) -> Any:
        compiled.append(module)
        return compile_module(module, backend="eager")

    monkeypatch.setattr(torch, "compile", traced)
    assert distance(weights(run(compiled=True)), uninterrupted) < TOLERANCE
    assert len(compiled) == 1


# -- two ranks --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_slices_of_all_ranks_are_the_batch(world_size: int) -> None:
    images = list(range(24))
    slices = [training.rank_slice(24, replace(ALONE, rank=rank, world_size=world_size)) for rank in range(world_size)]
    assert [image for mine in slices for image in images[mine]] == images


@pytest.mark.parametrize("batch", [0, 15])
def test_batch_that_ranks_cannot_share_is_refused(batch: int) -> None:
    with pytest.raises(SpecInvalid, match=f"positive multiple of the number of processes, 2, found {batch}"):
        run(world=replace(ALONE, world_size=2), batch=batch)


def test_incomplete_environment_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigurationInvalid, match="found no RANK, MASTER_ADDR, MASTER_PORT"), distributed():
        pass


def test_without_torchrun_a_process_is_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with distributed(threads=1) as world:
        assert (world.rank, world.world_size) == (0, 1)
        assert torch.get_num_threads() == 1 and not dist.is_initialized()


@dataclass(frozen=True)
class Ranks:
    """What the two ranks left behind: weights and outcomes by story, one of each per rank."""

    folder: Path
    exit_codes: list[int]
    log: list[str]

    def weights(self, story: str) -> list[WEIGHTS]:
        return [load_file(self.folder / f"{story}-{rank}.safetensors") for rank in range(2)]

    def outcome(self, story: str) -> list[str]:
        return [json.loads((self.folder / f"{story}-{rank}.json").read_text()) for rank in range(2)]


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Ranks:
    """Two processes run all stories once, starting torch being what takes long."""
    folder = tmp_path_factory.mktemp("ranks")
    codes, logs = zip(*run_two_ranks(__file__, folder), strict=True)
    return Ranks(folder, list(codes), list(logs))


def test_two_ranks_equal_one(two_ranks: Ranks, uninterrupted: WEIGHTS) -> None:
    first, second = two_ranks.weights("honest")
    assert same_bits(first, second)
    assert distance(first, uninterrupted) < TOLERANCE


@pytest.mark.parametrize("mutant", ["own randomness", "gradients not averaged", "same slice"])
def test_ranks_that_do_not_share_the_work_exceed_the_tolerance(
    two_ranks: Ranks, uninterrupted: WEIGHTS, mutant: str
) -> None:
    assert distance(two_ranks.weights(mutant)[0], uninterrupted) > 100 * TOLERANCE


def test_two_ranks_that_add_up_their_gradients_equal_one(two_ranks: Ranks, uninterrupted: WEIGHTS) -> None:
    first, second = two_ranks.weights("added up")
    assert same_bits(first, second)
    assert distance(first, uninterrupted) < TOLERANCE


def test_signal_to_one_rank_stops_both_and_both_resume_bit_for_bit(two_ranks: Ranks) -> None:
    stopped, steps = two_ranks.outcome("stopped"), 1 + 2 + 4 + 8  # the signal comes in the eighth
    expected = f"Interrupted 75: stopped on request after {steps * BATCH} of 320 images; all of it is kept"
    assert stopped == [f"{expected}, run again to go on"] * 2
    assert not (two_ranks.folder / "checkpoints-1").exists(), "rank 0 alone writes"
    honest = two_ranks.weights("honest")[0]
    assert all(same_bits(found, honest) for found in two_ranks.weights("resumed"))


def test_ranks_agree_rarely_while_steps_are_quick_and_at_once_where_they_are_slow(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(dist, "all_reduce", lambda wished, op: None)  # what rank 0 wishes, happens
    now = [0.0]
    agreement = training._Agreement(100, replace(ALONE, world_size=2), lambda: now[0])

    def next_steps(seconds: float, count: int) -> list[int]:
        """Steps between agreements, each after so many seconds."""
        gaps = []
        for _ in range(count):
            now[0] += seconds
            before = agreement.step
            assert agreement.on(True, False, True) == (True, False, True)
            gaps.append(agreement.step - before)
        return gaps

    assert agreement.step == 101
    assert next_steps(0.01, 6) == [2, 4, 8, 16, 16, 16]
    assert next_steps(10.0, 6) == [8, 4, 2, 1, 1, 1]


def test_loss_that_is_not_finite_on_one_rank_stops_both(two_ranks: Ranks) -> None:
    outcome = two_ranks.outcome("not finite")
    assert all(line.startswith("DataInvalid 65: images 0 to 320: expected a finite loss") for line in outcome)


def test_only_the_first_rank_reports_progress_and_its_loss_is_the_mean(two_ranks: Ranks) -> None:
    first, second = two_ranks.outcome("progress")
    seen: list[float] = []
    run(on_progress=lambda progress: seen.append(progress.loss), clock=lambda: 0.0)
    assert first == pytest.approx(seen, rel=1e-5) and second == []


def test_lost_rank_ends_the_other_with_an_error_to_try_again(two_ranks: Ranks) -> None:
    assert two_ranks.exit_codes == [74, 3], two_ranks.log
    assert "rank 0: expected 2 ranks, found one gone" in two_ranks.log[0]
    assert "Warning" not in "".join(two_ranks.log)


def be_a_rank(folder: Path) -> None:
    """All stories of one rank; the last one ends with rank 1 leaving in the middle of training."""
    with distributed(threads=1, timeout_seconds=120) as world:
        seen: list[float] = []
        honest = run(world=world, on_progress=lambda progress: seen.append(progress.loss), clock=lambda: 0.0)
        leave_weights(folder, "honest", world, honest)
        leave_outcome(folder, "progress", world, seen)
        leave_weights(folder, "added up", world, run(world=world, accumulation=4))
        tell_mutants(folder, world)
        checkpoints = kept_in(folder / f"checkpoints-{world.rank}")
        stopping = at_call(7, terminate) if world.rank == 1 else denoising
        tell(folder, "stopped", world, lambda: run(stopping, world, checkpoints=checkpoints, clock=lambda: 0.0))
        leave_weights(folder, "resumed", world, run(world=world, checkpoints=checkpoints))
        tell(
            folder,
            "not finite",
            world,
            lambda: run(nan_at(5) if world.rank == 1 else denoising, world, clock=lambda: 0.0),
        )
        run(at_call(5, lambda: sys.exit(3)) if world.rank == 1 else denoising, world)


def tell_mutants(folder: Path, world: World) -> None:
    def own_randomness(model: nn.Module, generator: torch.Generator, batch: int, mine: slice) -> Tensor:
        return denoising(model, generator.manual_seed(generator.initial_seed() % 2**32 + world.rank), batch, mine)

    def same_slice(model: nn.Module, generator: torch.Generator, batch: int, mine: slice) -> Tensor:
        return denoising(model, generator, batch, slice(0, batch // 2))

    leave_weights(folder, "own randomness", world, run(own_randomness, world))
    leave_weights(folder, "same slice", world, run(same_slice, world))
    averaged, training.DistributedDataParallel = training.DistributedDataParallel, lambda model, **_: model
    leave_weights(folder, "gradients not averaged", world, run(world=world))
    training.DistributedDataParallel = averaged


def leave_weights(folder: Path, story: str, world: World, model: nn.Module) -> None:
    save_file(weights(model), folder / f"{story}-{world.rank}.safetensors")


def leave_outcome(folder: Path, story: str, world: World, outcome: object) -> None:
    (folder / f"{story}-{world.rank}.json").write_text(json.dumps(outcome))


def tell(folder: Path, story: str, world: World, act: Callable[[], object]) -> None:
    try:
        act()
        leave_outcome(folder, story, world, "no error")
    except FeddiffError as error:
        leave_outcome(folder, story, world, f"{type(error).__name__} {error.exit_code}: {error}")


if __name__ == "__main__":
    try:
        be_a_rank(Path(sys.argv[1]))
    except FeddiffError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)
