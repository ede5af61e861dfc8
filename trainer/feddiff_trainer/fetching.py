"""Objects that every rank needs: the store sends each of them once, to one rank, which hands it to the others.

Every rank holds all images afterwards, not a share of them: a step draws its batch from all images on every rank and
keeps a slice (training.py), which is why two ranks take the steps of one. docs/decisions/0010 has the alternatives.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice

import torch
import torch.distributed as dist

from feddiff_protocol.errors import ConfigurationInvalid, DataInvalid, FeddiffError

from .stores import FAILURES
from .training import World

ALONE = World(0, 1, torch.device("cpu"))
# What a fetch may end in: the store's own failures, and what is wrong with what it sent.
ERRORS: tuple[type[FeddiffError], ...] = (ConfigurationInvalid, DataInvalid, *FAILURES)
FETCHED = len(ERRORS)
AT_ONCE = 4  # by one rank: a single connection waits for the store at the start of every object, and memory holds all

Fetch = Callable[[], bytes]


def fetched_once(fetches: Sequence[Fetch], world: World) -> Iterator[bytes]:
    """What each of `fetches` returns, in order, on every rank; number i is called by rank i mod world_size alone, in
    a thread, up to AT_ONCE of them at the same time.

    An error of ERRORS that a call raises is raised on every rank, so that each says what is wrong, not that another
    rank is gone.
    """
    waiting = iter(fetches[world.rank :: world.world_size])
    with ThreadPoolExecutor(AT_ONCE) as pool:
        under_way = deque(pool.submit(_outcome, fetch) for fetch in islice(waiting, AT_ONCE))
        for number in range(len(fetches)):
            source, mine = number % world.world_size, None
            if source == world.rank:
                mine = under_way.popleft().result()
                under_way.extend(pool.submit(_outcome, fetch) for fetch in islice(waiting, 1))
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
