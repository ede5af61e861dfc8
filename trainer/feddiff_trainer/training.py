"""The training loop of both denoisers: on one process or on the ranks that torchrun starts, to be stopped at any time.

What a step draws depends on (seed, step) alone: every rank draws the whole batch and keeps its own slice. So two
ranks take the steps of one, up to rounding, and a resumed run takes those of an uninterrupted one, bit for bit.
"""

import contextlib
import copy
import datetime
import hashlib
import math
import os
import signal
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar, cast

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from feddiff_protocol.errors import ConfigurationInvalid, DataInvalid, Interrupted, SpecInvalid, StorageFailed

from .checkpoints import MENDABLE, STOP_SECONDS, Checkpoint, Checkpoints, Saver

WARM_UP, LONGEST_WARM_UP = 0.05, 1000  # of all steps; steps
PROGRESS_SECONDS = 1.0  # also how late a loss that is not finite may be noticed
AGREE_SECONDS, AGREE_STEPS = 0.1, 16  # ranks agree no more often, and no less often
DIVERGED = "lower the learning rate, or check the images"
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)
M = TypeVar("M", bound=nn.Module)

BatchLoss = Callable[[nn.Module, torch.Generator, int, slice], Tensor]
"""batch_loss(model, generator, batch, mine): the mean loss over the images `mine` of a batch.

It draws record indices, σ and noise of all `batch` images from `generator` (on the device of the model), in the
same order each time, and nothing from elsewhere; it reaches the network by calling `model` only.
"""


@dataclass(frozen=True)
class World:
    """Where this process stands: `rank` counts from 0 to world_size - 1."""

    rank: int
    world_size: int
    device: torch.device


@dataclass(frozen=True)
class Progress:
    """Images seen since the run began, their speed and mean loss since the last report.

    The loss depends on the data; who shows what of it is the stage's decision.
    """

    images: int
    num_images: int
    images_per_second: float
    loss: float


def train(
    model: M,
    batch_loss: BatchLoss,
    *,
    world: World,
    num_images: int,
    batch: int,
    learning_rate: float,
    ema_width: float,
    seed: int,
    on_progress: Callable[[Progress], None],
    on_checkpoint: Callable[[], None] = lambda: None,
    accumulation: int = 1,
    bfloat16: bool | None = None,
    compiled: bool = False,
    checkpoints: Checkpoints | None = None,
    checkpoint_seconds: float = 60.0,
    clock: Callable[[], float] = time.monotonic,
) -> M:
    """A copy of `model` with the moving average of the weights over training, in evaluation mode, on every rank.

    Trains for num_images images, rounded up to whole batches; `batch` counts the images of all ranks together,
    learning_rate is the peak of the schedule, ema_width ∈ (0, 0.28) the average's width as a share of the run.
    Rank 0 alone calls on_progress, reads and writes checkpoints, and calls on_checkpoint, in another thread, when one
    is stored: every checkpoint_seconds of `clock`, training going on meanwhile, when stopped and at the end. A run
    that finds one goes on from there. Buffers of the model are not trained.

    A rank's share of a batch goes through the network in `accumulation` equal parts, whose gradients add up to those of
    the whole. bfloat16 says whether the network's products are computed so, None that they are on a GPU; compiled,
    whether by torch.compile. Neither is a setting that a resumed run has to share.

    Raises Interrupted (75) on all ranks, after a checkpoint, when any received SIGTERM or SIGINT; DataInvalid if
    loss or weights stop being finite; SpecInvalid if ranks do not divide the batch or a checkpoint belongs to
    another run; StoreUnavailable (69) if the last checkpoint, no earlier one, finds no store that answers.
    """
    parts = parts_of(rank_slice(batch, world), accumulation)
    num_steps = math.ceil(num_images / batch)
    gamma = ema_exponent(ema_width)
    settings = {"num_images": num_images, "batch": batch, "learning_rate": learning_rate}
    settings |= {"ema_width": ema_width, "seed": seed}
    ema = copy.deepcopy(model.to(world.device)).requires_grad_(False).eval()
    run = Run(model.train(), ema, {name: repr(value) for name, value in settings.items()})
    generator = torch.Generator(world.device)
    autocast = world.device.type == "cuda" if bfloat16 is None else bfloat16
    mine_to_keep = checkpoints if world.rank == 0 else None
    with caught_signals() as signals, Saver(mine_to_keep, on_checkpoint) as saver:
        run.resume(checkpoints, world)
        saver.saved_step = run.step
        averaged, meter = _averaged(model, world), _Meter(world, clock)
        network = cast(nn.Module, torch.compile(averaged)) if compiled else averaged
        saving, reporting = _Every(checkpoint_seconds, clock), _Every(PROGRESS_SECONDS, clock)
        agreement = _Agreement(run.step, world, clock)
        stop = False
        while run.step < num_steps and not stop:
            loss = torch.zeros((), device=world.device)
            for part in parts:
                generator.manual_seed(step_seed(seed, run.step))  # every part draws the whole batch
                with _gradients_kept(averaged, unless=part is parts[-1]):
                    with torch.autocast(world.device.type, torch.bfloat16, enabled=autocast):
                        part_loss = batch_loss(network, generator, batch, part) / accumulation
                    torch.autograd.backward(part_loss)
                loss += part_loss.detach()
            run.advance(learning_rate * schedule(run.step, num_steps), gamma)
            meter.add(loss)
            if run.step < min(agreement.step, num_steps):
                continue
            stop, save, report = agreement.on(bool(signals), saver.idle and saving.due(), reporting.due())
            last = stop or run.step == num_steps
            if last or save or report:
                progress = meter.read(min(run.step * batch, num_images), num_images, batch)
                if world.rank == 0:
                    on_progress(progress)
            if last:
                _save_last(saver, run.checkpoint(), stop)
            elif save:
                saver.begin(run.checkpoint())
        # Nobody leaves before the last checkpoint is stored: whoever started the ranks ends those that are left.
        saved_step = _first_ranks(saver.saved_step, world)
        if stop or signals:  # the latter: noticed by nobody in the loop, because it came after the last step
            raise Interrupted(_farewell(run.step, saved_step, batch, num_images))
    return ema


@contextlib.contextmanager
def distributed(*, threads: int | None = None, timeout_seconds: float = 600.0) -> Iterator[World]:
    """This process among the ranks that the environment names (WORLD_SIZE etc., as torchrun sets them), else alone.

    Uses the CUDA device LOCAL_RANK where there is one, else the CPU, with `threads` threads if given. Leaves the
    group at the end, also after an error, so the others notice at once. Raises StorageFailed (74) when another rank
    is lost or silent for timeout_seconds, ConfigurationInvalid (78) if the environment names the ranks incompletely.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    rank, world_size, local_rank = _environment()
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if world_size == 1:
        yield World(0, 1, device)
        return
    # Gloo beside NCCL lets the ranks agree on CPU tensors, without waiting for the GPU.
    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    try:
        dist.init_process_group(backend, timeout=datetime.timedelta(seconds=timeout_seconds))
        yield World(rank, world_size, device)
    except RuntimeError as error:
        if not _is_lost_rank(error):
            raise
        raise StorageFailed(
            f"rank {rank}: expected {world_size} ranks, found one gone or silent for {timeout_seconds:g} s; "
            f"its own log says why, run all ranks again ({error})"
        ) from error
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def rank_slice(batch: int, world: World) -> slice:
    """The images of a batch that belong to this rank. Equal shares, or the average over ranks would not be the mean."""
    if batch < 1 or batch % world.world_size:
        raise SpecInvalid(
            f"batch: expected a positive multiple of the number of processes, {world.world_size}, found {batch}; "
            f"{max(1, round(batch / world.world_size)) * world.world_size} would fit"
        )
    share = batch // world.world_size
    return slice(world.rank * share, (world.rank + 1) * share)


def parts_of(share: slice, accumulation: int) -> list[slice]:
    """A rank's images in equal parts. Raises SpecInvalid where they do not divide."""
    count, left = divmod(share.stop - share.start, accumulation)
    if left or not count:
        raise SpecInvalid(
            f"accumulation: expected a divisor of {share.stop - share.start} images a process, found {accumulation};"
            " change it or the batch"
        )
    return [slice(start, start + count) for start in range(share.start, share.stop, count)]


def step_seed(seed: int, step: int) -> int:
    """A seed of 64 bits for one step, hashed because torch's CPU generator would use the lowest 32 bits of a sum."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{step}".encode()).digest()[:8], "big")


def schedule(step: int, num_steps: int) -> float:
    """Share ∈ (0, 1] of the peak learning rate at a step counted from 0: linear warm-up, then cosine to zero.

    Loshchilov & Hutter 2017, equation 5, without restarts.
    """
    warm_up = max(1, min(LONGEST_WARM_UP, round(WARM_UP * num_steps)))
    return min(1.0, (step + 1) / warm_up) * (1.0 + math.cos(math.pi * step / num_steps)) / 2


def ema_exponent(width: float) -> float:
    """γ of the power-function average whose weights τ^γ have relative standard deviation `width` ∈ (0, 0.28).

    Karras et al. 2024 (EDM2), equation 126 and algorithm 2: the largest root of (γ+2)²(γ+3) = width⁻²(γ+1).
    """
    if not 0 < width < 0.28:
        raise SpecInvalid(f"ema_width: expected between 0 and 0.28, found {width}; 0.1 averages the last fifth or so")
    return float(np.roots([1, 7, 16 - width**-2, 12 - width**-2]).real.max())


def ema_weight(step: int, gamma: float) -> float:
    """1 - β, the share of the newest weights in the average after `step` ≥ 1 steps; 1 after the first.

    Karras et al. 2024 (EDM2), equation 127: β = (1 - 1/t)^(γ+1). Short runs need no ramp.
    """
    return 1.0 - math.pow(1.0 - 1.0 / step, gamma + 1.0)


def adam_step(
    weights: list[Tensor], means: list[Tensor], squares: list[Tensor], step: int, learning_rate: float, *, beta2: float
) -> None:
    """Step number `step` ≥ 1 of Adam (Kingma & Ba 2015, algorithm 1), in place; it uses up the gradients.

    The kernel of torch.optim.Adam(fused=True) without its class, whose first use takes two seconds to import
    torch.compile: as long as some of our runs last.
    """
    gradients = [weight.grad for weight in weights if weight.grad is not None]
    steps = [torch.full((), float(step), device=weights[0].device)] * len(weights)
    with torch.no_grad():
        torch._fused_adam_(
            weights, gradients, means, squares, [], steps,
            lr=learning_rate, beta1=0.9, beta2=beta2, eps=1e-8, weight_decay=0.0, amsgrad=False, maximize=False,
        )  # fmt: skip
    for weight in weights:
        weight.grad = None


@contextlib.contextmanager
def caught_signals() -> Iterator[list[int]]:
    """The list that SIGTERM and SIGINT are noted in while inside; torchrun and terminals send them more than once."""
    received: list[int] = []
    previous = {number: signal.signal(number, lambda number, _: received.append(number)) for number in STOP_SIGNALS}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler or signal.SIG_DFL)


class Run:
    """What changes from step to step, and what a checkpoint therefore holds."""

    def __init__(self, model: nn.Module, ema: nn.Module, settings: dict[str, str]) -> None:
        self.step = 0
        self.settings = settings
        self.model, self.ema = model, ema
        self.weights: list[Tensor] = list(model.parameters())
        self.averages: list[Tensor] = list(ema.parameters())
        self.means = [torch.zeros_like(weight) for weight in self.weights]
        self.squares = [torch.zeros_like(weight) for weight in self.weights]

    def advance(self, learning_rate: float, gamma: float) -> None:
        """One step of Adam and of the average, from the weights' gradients."""
        self.step += 1
        adam_step(self.weights, self.means, self.squares, self.step, learning_rate, beta2=0.99)
        with torch.no_grad():
            torch._foreach_lerp_(self.averages, self.weights, ema_weight(self.step, gamma))

    def tensors(self) -> dict[str, Tensor]:
        """All state by name, as the live tensors: to copy from, or into."""
        named = {f"model.{name}": tensor for name, tensor in self.model.state_dict().items()}
        named |= {f"ema.{name}": tensor for name, tensor in self.ema.state_dict().items()}
        for (name, _), mean, square in zip(self.model.named_parameters(), self.means, self.squares, strict=True):
            named |= {f"adam.mean.{name}": mean, f"adam.square.{name}": square}
        return named

    def load(self, checkpoint: Checkpoint, place: str) -> None:
        """This run stands where the checkpoint was written. Raises SpecInvalid if it was written by another run."""
        tensors = self.tensors()
        _require_same("settings", self.settings, checkpoint.settings, place)
        _require_same("tensors", _forms(tensors), _forms(checkpoint.tensors), place)
        with torch.no_grad():
            for name, tensor in tensors.items():
                tensor.copy_(checkpoint.tensors[name])
        self.step = checkpoint.step

    def checkpoint(self) -> Checkpoint:
        """This very state, the live tensors. Raises DataInvalid, on every rank, if a weight is not finite."""
        if not all(bool(weight.isfinite().all()) for weight in self.weights):
            raise DataInvalid(f"step {self.step}: expected finite weights, found NaN or infinity; {DIVERGED}")
        return Checkpoint(self.step, self.settings, self.tensors())

    def resume(self, checkpoints: Checkpoints | None, world: World) -> None:
        """Every rank stands where rank 0's newest checkpoint was written; without one, where rank 0 starts.

        Rank 0 hands out what it read, not its name: the store sends it once, and no rank can find another one.
        """
        if checkpoints is not None and world.rank == 0 and (checkpoint := checkpoints.newest()) is not None:
            self.load(checkpoint, checkpoints.place)
        if world.world_size > 1:
            self.step = _first_ranks(self.step, world)
            for tensor in self.tensors().values():
                dist.broadcast(tensor, src=0)


def _forms(tensors: dict[str, Tensor]) -> dict[str, str]:
    return {name: f"{tensor.dtype} {tuple(tensor.shape)}" for name, tensor in tensors.items()}


def _require_same(what: str, expected: dict[str, str], found: dict[str, str], place: str) -> None:
    """Both are equal; SpecInvalid names what differs."""
    differ = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
    if differ:
        name = differ[0]
        raise SpecInvalid(
            f"checkpoint {what}: expected {name} = {expected.get(name)}, found {found.get(name)} "
            f"({len(differ)} differ); it belongs to another run: to begin anew, delete what is below {place}"
        )


class _Every:
    """Whether `seconds` have passed since it was last due."""

    def __init__(self, seconds: float, clock: Callable[[], float]) -> None:
        self.seconds, self.clock, self.last = seconds, clock, clock()

    def due(self) -> bool:
        now = self.clock()
        if now - self.last < self.seconds:
            return False
        self.last = now
        return True


class _Meter:
    """Sums the loss where it is; only reading it waits for the device and the other ranks."""

    def __init__(self, world: World, clock: Callable[[], float]) -> None:
        self.world, self.clock, self.since = world, clock, clock()
        self.steps, self.loss = 0, torch.zeros((), device=world.device)

    def add(self, loss: Tensor) -> None:
        self.steps += 1
        self.loss += loss.detach()

    def read(self, images: int, num_images: int, batch: int) -> Progress:
        """Progress since the last reading, equal on every rank. Raises DataInvalid if a loss was not finite."""
        if self.world.world_size > 1:
            dist.all_reduce(self.loss)
        loss = float(self.loss) / (self.steps * self.world.world_size)
        if not math.isfinite(loss):
            first = max(0, images - self.steps * batch)
            raise DataInvalid(f"images {first} to {images}: expected a finite loss, found {loss}; {DIVERGED}")
        now = self.clock()
        speed = self.steps * batch / max(now - self.since, 1e-9)
        self.since, self.steps = now, 0
        self.loss.zero_()
        return Progress(images, num_images, speed, loss)


class _Agreement:
    """What the ranks wish, put together: at the same `step` on all of them, but not at each, because for a small
    network on CPUs that costs two thirds of what averaging its gradients does."""

    def __init__(self, step: int, world: World, clock: Callable[[], float]) -> None:
        self.step, self.gap = step + 1, 1
        self.world, self.clock, self.since = world, clock, clock()

    def on(self, stop: bool, save: bool, report: bool) -> tuple[bool, bool, bool]:
        """Whether any rank wishes to stop, and rank 0 to save and to report: equal on every rank."""
        if self.world.world_size > 1:
            leader = self.world.rank == 0
            wished = torch.tensor([stop, save and leader, report and leader, self._next_gap() if leader else 0])
            dist.all_reduce(wished, op=dist.ReduceOp.MAX)
            stop, save, report = (bool(wish) for wish in wished[:3].tolist())
            self.gap, self.since = int(wished[3]), self.clock()
        self.step += self.gap
        return stop, save, report

    def _next_gap(self) -> int:
        # Doubled and halved, not computed: one slow step must not put the next stop off.
        quick = self.clock() - self.since < AGREE_SECONDS
        return min(2 * self.gap, AGREE_STEPS) if quick else max(1, self.gap // 2)


def _averaged(model: nn.Module, world: World) -> nn.Module:
    """The model, its gradients averaged over all ranks in every backward pass."""
    if world.world_size == 1:
        return model
    devices = [world.device] if world.device.type == "cuda" else None
    with warnings.catch_warnings():
        # torch 2.13 renames the argument; its new name does not exist in torch 2.9.
        warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
        return DistributedDataParallel(model, device_ids=devices, broadcast_buffers=False, gradient_as_bucket_view=True)


def _gradients_kept(averaged: nn.Module, unless: bool) -> contextlib.AbstractContextManager[None]:
    """Gradients add up on this rank and are not averaged over all yet, `unless` they are complete."""
    if unless or not isinstance(averaged, DistributedDataParallel):
        return contextlib.nullcontext()
    kept: contextlib.AbstractContextManager[None] = averaged.no_sync()
    return kept


def _save_last(saver: Saver, checkpoint: Checkpoint, stop: bool) -> None:
    """The last checkpoint is in the store; when stopped, an older one has to do if the store does not take it."""
    try:
        saver.finish(checkpoint, STOP_SECONDS if stop else None)
    except MENDABLE:
        if not stop:
            raise


def _first_ranks(number: int, world: World) -> int:
    """Rank 0's number, on every rank."""
    if world.world_size == 1:
        return number
    shared = torch.tensor(number)
    dist.broadcast(shared, src=0)
    return int(shared)


def _farewell(step: int, saved_step: int, batch: int, num_images: int) -> str:
    images, saved = (min(each * batch, num_images) for each in (step, saved_step))
    kept = "nothing" if saved == 0 else "all of it" if saved == images else f"what {saved} of them taught"
    again = ", run again to go on" if saved else ""
    return f"stopped on request after {images} of {num_images} images; {kept} is kept{again}"


def _environment() -> tuple[int, int, int]:
    """Rank, world size and local rank, as torchrun names them; 0, 1, 0 without it."""
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if world_size > 1 and missing:
        raise ConfigurationInvalid(
            f"environment: WORLD_SIZE={world_size} needs RANK, MASTER_ADDR and MASTER_PORT, "
            f"found no {', '.join(missing)}; start with torchrun"
        )
    return int(os.environ.get("RANK", "0")), world_size, int(os.environ.get("LOCAL_RANK", "0"))


def _is_lost_rank(error: RuntimeError) -> bool:
    """Gloo's own errors have no class; they begin with the path of the source file that raised them."""
    return isinstance(error, dist.DistError) or "gloo/" in str(error)
