"""Federated averaging: plain training with one client, weighted means with several, and a run that goes on."""

import copy
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from feddiff_protocol.errors import DataInvalid, Interrupted, SpecInvalid
from feddiff_trainer.checkpoints import Checkpoints
from feddiff_trainer.fedavg import SEEDS_APART, average, fedavg, round_ends
from feddiff_trainer.stores import open_store
from feddiff_trainer.training import BatchLoss, World, train

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")
SETTINGS: dict[str, Any] = {"num_images": 120, "batch": 8, "learning_rate": 0.05, "ema_width": 0.1, "seed": 7}


class Point(nn.Module):
    """One weight."""

    def __init__(self) -> None:
        super().__init__()
        self.x = nn.Parameter(torch.zeros(3))


def towards(target: float, noise: float = 0.1) -> BatchLoss:
    """The squared distance to records that lie around `target`."""

    def loss(model: nn.Module, generator: torch.Generator, batch: int, mine: slice) -> Tensor:
        drawn = target + noise * torch.randn(batch, 3, generator=generator)
        (weight,) = model.parameters()
        return (weight - drawn[mine]).square().mean()

    return loss


def averaged(losses: list[BatchLoss], num_records: list[int], rounds: int = 5, **changes: Any) -> Tensor:
    given = SETTINGS | {"on_progress": lambda done, total: None, "rounds": rounds, "device": CPU} | changes
    return fedavg(Point(), losses, num_records, **given).x.detach()


@pytest.mark.parametrize("rounds", [1, 4, 15])
def test_one_client_takes_the_steps_of_plain_training_bit_for_bit(rounds: int) -> None:
    plain = train(Point(), towards(1.0), world=World(0, 1, CPU), on_progress=lambda progress: None, **SETTINGS)
    assert torch.equal(averaged([towards(1.0)], [40], rounds), plain.x)


def test_one_round_is_the_mean_of_what_every_client_learns_alone_by_its_records() -> None:
    alone = [
        train(Point(), loss, world=World(0, 1, CPU), on_progress=lambda progress: None, **SETTINGS | {"seed": seed}).x
        for loss, seed in ((towards(0.0), 7), (towards(1.0), 7 + SEEDS_APART))
    ]
    found = averaged([towards(0.0), towards(1.0)], [30, 10], rounds=1)
    torch.testing.assert_close(found, 0.75 * alone[0] + 0.25 * alone[1])
    assert not torch.allclose(found, 0.5 * alone[0] + 0.5 * alone[1], atol=0.05)


def test_the_average_is_the_weighted_mean_of_every_tensor() -> None:
    clients = [[torch.tensor([1.0, 2.0]), torch.tensor(4.0)], [torch.tensor([3.0, 6.0]), torch.tensor(8.0)]]
    average(clients, [0.75, 0.25])
    for tensors in clients:
        assert tensors[0].tolist() == [1.5, 3.0] and tensors[1].item() == 5.0


def test_clients_start_every_round_from_the_same_weights() -> None:
    starts: list[Tensor] = []

    def noticed(target: float) -> BatchLoss:
        inner = towards(target)

        def loss(model: nn.Module, generator: torch.Generator, batch: int, mine: slice) -> Tensor:
            starts.append(next(model.parameters()).detach().clone())
            return inner(model, generator, batch, mine)

        return loss

    averaged([noticed(0.0), noticed(1.0)], [1, 1], rounds=3)  # 15 steps: rounds of 5, client after client
    for first, second in ((0, 5), (10, 15), (20, 25)):
        assert torch.equal(starts[first], starts[second])
    assert not torch.equal(starts[0], starts[10])


def test_clients_draw_differently() -> None:
    drawn: list[float] = []

    def loss(model: nn.Module, generator: torch.Generator, batch: int, mine: slice) -> Tensor:
        drawn.append(torch.rand((), generator=generator).item())
        return next(model.parameters()).square().mean()

    averaged([loss, loss], [1, 1])
    assert len(set(drawn)) == len(drawn) == 30


@pytest.mark.parametrize(("num_steps", "rounds", "ends"), [(10, 2, [5, 10]), (10, 3, [3, 6, 10]), (3, 3, [1, 2, 3])])
def test_rounds_are_as_equal_as_they_can_be(num_steps: int, rounds: int, ends: list[int]) -> None:
    assert round_ends(num_steps, rounds) == ends


def test_more_rounds_than_steps_are_refused() -> None:
    with pytest.raises(SpecInvalid, match="rounds: expected 1 to 15, the steps of a client, found 16"):
        averaged([towards(0.0)], [1], rounds=16)


# ---- Going on ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [3, 5, 12, 29, 30])  # within a round, at the end of a client's, at the very end
def test_a_stopped_run_goes_on_as_if_it_had_not_been_stopped(tmp_path: Path, steps: int) -> None:
    losses, records, taken = [towards(0.0), towards(1.0)], [3, 1], [0]
    expected = averaged(losses, records, rounds=3)
    checkpoints = Checkpoints(open_store((tmp_path / "store").as_uri()), "run/checkpoints/")

    def stop(done: int, total: int) -> None:
        taken[0] += 1
        if taken[0] == steps:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Interrupted, match="run again to go on"):
        averaged(losses, records, rounds=3, on_progress=stop, checkpoints=checkpoints)
    assert torch.equal(averaged(losses, records, rounds=3, checkpoints=checkpoints), expected)


def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path) -> None:
    checkpoints = Checkpoints(open_store((tmp_path / "store").as_uri()), "run/checkpoints/")
    averaged([towards(0.0), towards(1.0)], [3, 1], checkpoints=checkpoints)
    with pytest.raises(SpecInvalid, match="num_records"):
        averaged([towards(0.0), towards(1.0)], [1, 3], checkpoints=checkpoints)


def test_weights_that_are_not_finite_are_an_error() -> None:
    def loss(model: nn.Module, generator: torch.Generator, batch: int, mine: slice) -> Tensor:
        return next(model.parameters()).sum() * float("nan")

    with pytest.raises(DataInvalid, match="expected finite weights"):
        averaged([loss], [1])


def test_the_model_that_was_given_is_left_as_it_was() -> None:
    model = Point()
    before = copy.deepcopy(model.state_dict())
    fedavg(model, [towards(1.0)], [1], rounds=2, device=CPU, on_progress=lambda done, total: None, **SETTINGS)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
