"""Objects that every rank needs: the store sends each of them once, to one rank, which hands it to the others.

Every rank holds all images afterwards, not a share of them: a step draws its batch from all images on every rank and
keeps a slice (training.py), which is why two ranks take the steps of one. docs/decisions/0010 has the alternatives.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from feddiff_protocol.errors import (
    ConfigurationInvalid,
    DataInvalid,
    FeddiffError,
    InputMissing,
    OutputFailed,
    StorageFailed,
    StoreUnavailable,
)

from .training import World

ALONE = World(0, 1, torch.device("cpu"))
ERRORS: tuple[type[FeddiffError], ...] = (
    ConfigurationInvalid,
    DataInvalid,
    InputMissing,
    OutputFailed,
    StorageFailed,
    StoreUnavailable,
)
FETCHED = len(ERRORS)

Fetch = Callable[[], bytes]


def fetched_once(fetches: Sequence[Fetch], world: World) -> Iterator[bytes]:
    """What each of `fetches` returns, in order, on every rank; number i is called by rank i mod world_size alone.

    In a round every rank calls one, all at the same time. An error of ERRORS that a call raises is raised on every
    rank, so that each says what is wrong, not that another rank is gone.
    """
    for start in range(0, len(fetches), world.world_size):
        turn = fetches[start : start + world.world_size]
        mine = _outcome(turn[world.rank]) if world.rank < len(turn) else None
        for source in range(len(turn)):
            outcome = _handed_out(mine, source, world)
            if outcome.kind != FETCHED:
                raise ERRORS[outcome.kind](outcome.content.decode())
            yield outcome.content


@dataclass(frozen=True)
class _Outcome:
    """What a fetch returned, or the place in ERRORS and the message of what it raised."""

    kind: int
    content: bytes


def _outcome(fetch: Fetch) -> _Outcome:
    try:
        return _Outcome(FETCHED, fetch())
    except ERRORS as error:
        return _Outcome(ERRORS.index(type(error)), str(error).encode())


def _handed_out(mine: _Outcome | None, source: int, world: World) -> _Outcome:
    """The outcome of rank `source`. Two tensors, because gloo wants to know a tensor's size beforehand; on the CPU."""
    if world.world_size == 1:
        assert mine is not None
        return mine
    sent = mine if world.rank == source else None
    head = torch.tensor([sent.kind, len(sent.content)] if sent else [0, 0])
    dist.broadcast(head, src=source)
    kind, length = head.tolist()
    content = bytearray(sent.content) if sent else bytearray(length)
    if length:
        dist.broadcast(torch.frombuffer(content, dtype=torch.uint8), src=source)
    return sent or _Outcome(kind, bytes(content))
