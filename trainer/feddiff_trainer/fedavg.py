"""Federated averaging of a diffusion model (McMahan et al. 2017, algorithm 1): a baseline, without any privacy.

In every round each client takes its share of the steps on its own records, then all have the average of their weights,
each weighing as much as it has records. All clients take part in every round and keep Adam's moments between rounds:
there are few of them, each a site of its own. So one client alone takes the steps of `training.train`, bit for bit.
"""

import copy
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor, nn

from feddiff_protocol.errors import Interrupted, SpecInvalid

from .checkpoints import Checkpoint, Checkpoints
from .training import BatchLoss, Run, caught_signals, ema_exponent, schedule, step_seed

M = TypeVar("M", bound=nn.Module)

SEEDS_APART = 10**6  # of two clients; the first one has the seed itself


def fedavg(
    model: M,
    losses: Sequence[BatchLoss],
    num_records: Sequence[int],
    *,
    rounds: int,
    device: torch.device,
    num_images: int,
    batch: int,
    learning_rate: float,
    ema_width: float,
    seed: int,
    on_progress: Callable[[int, int], None],
    checkpoints: Checkpoints | None = None,
    checkpoint_seconds: float = 60.0,
    clock: Callable[[], float] = time.monotonic,
    bfloat16: bool | None = None,
) -> M:
    """A copy of `model` with the moving average of the clients' averaged weights, in evaluation mode.

    losses, num_records: by client. num_images: what each client sees, all rounds together, rounded up to whole batches;
    the other arguments are those of train. on_progress hears of images seen by all clients together, and of how many
    there will be. Raises SpecInvalid for more rounds than steps, Interrupted after SIGTERM or SIGINT with a checkpoint
    stored, DataInvalid if weights stop being finite.
    """
    num_steps, gamma = math.ceil(num_images / batch), ema_exponent(ema_width)
    if not 1 <= rounds <= num_steps:
        raise SpecInvalid(f"rounds: expected 1 to {num_steps}, the steps of a client, found {rounds}; lower it")
    ema = copy.deepcopy(model.to(device)).requires_grad_(False).eval()
    settings: dict[str, object] = {"num_images": num_images, "batch": batch, "learning_rate": learning_rate}
    settings |= {"ema_width": ema_width, "seed": seed, "rounds": rounds, "num_records": list(num_records)}
    named = {name: repr(value) for name, value in settings.items()}
    runs = [Run(copy.deepcopy(model).train(), copy.deepcopy(ema), named) for _ in losses]
    weights = [count / sum(num_records) for count in num_records]
    generator, saved_at = torch.Generator(device), clock()
    autocast = device.type == "cuda" if bfloat16 is None else bfloat16
    with caught_signals() as signals:
        _resume(runs, checkpoints)
        for end in round_ends(num_steps, rounds):
            while (position := _next_client(runs, end)) is not None:
                run = runs[position]
                generator.manual_seed(step_seed(seed + SEEDS_APART * position, run.step))
                with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
                    loss = losses[position](run.model, generator, batch, slice(0, batch))
                torch.autograd.backward(loss)
                run.advance(learning_rate * schedule(run.step, num_steps), gamma)
                if _next_client(runs, end) is None:
                    average([run.weights for run in runs], weights)
                images = sum(min(run.step * batch, num_images) for run in runs)
                on_progress(images, num_images * len(runs))
                if signals or clock() - saved_at >= checkpoint_seconds:
                    _save(runs, checkpoints)
                    saved_at = clock()
                if signals:
                    raise Interrupted(f"stopped on request after {images} images; run again to go on")
        _save(runs, checkpoints)
    average([run.averages for run in runs], weights)
    trained: M = runs[0].ema  # type: ignore[assignment]  # a copy of the model
    return trained


def round_ends(num_steps: int, rounds: int) -> list[int]:
    """After how many steps of a client each round ends: as equal parts as there can be."""
    return [number * num_steps // rounds for number in range(1, rounds + 1)]


def average(tensors: Sequence[Sequence[Tensor]], weights: Sequence[float]) -> None:
    """Every client's tensors become the weighted mean of all clients'; weights add up to 1."""
    with torch.no_grad():
        for of_clients in zip(*tensors, strict=True):
            mean = sum(
                (weight * tensor for weight, tensor in zip(weights, of_clients, strict=True)), start=torch.zeros(())
            )
            for tensor in of_clients:
                tensor.copy_(mean)


def _next_client(runs: Sequence[Run], end: int) -> int | None:
    """The first client that is not through with its round. None: all are, and have been averaged, or are to be now."""
    return next((position for position, run in enumerate(runs) if run.step < end), None)


def _save(runs: Sequence[Run], checkpoints: Checkpoints | None) -> None:
    """The clients' whole state. It is taken after averaging where a round has just ended, so it need not say more."""
    states = [run.checkpoint() for run in runs]
    if checkpoints is None:
        return
    tensors = {
        f"{position}.{name}": each for position, state in enumerate(states) for name, each in state.tensors.items()
    }
    tensors["steps"] = torch.tensor([state.step for state in states])
    checkpoints.save(Checkpoint(sum(state.step for state in states), states[0].settings, tensors))


def _resume(runs: Sequence[Run], checkpoints: Checkpoints | None) -> None:
    newest = checkpoints.newest() if checkpoints is not None else None
    if checkpoints is None or newest is None:
        return
    for position, (run, step) in enumerate(zip(runs, newest.tensors["steps"].tolist(), strict=True)):
        prefix = f"{position}."
        own = {name.removeprefix(prefix): each for name, each in newest.tensors.items() if name.startswith(prefix)}
        run.load(replace(newest, step=step, tensors=own), checkpoints.place)
