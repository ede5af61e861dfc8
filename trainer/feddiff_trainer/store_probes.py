"""What a check of a store asks and answers, and what any store must do: keep bytes, and create once.

Whatever is written is a probe, named so, and deleted again.
"""

import hashlib
import secrets
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from enum import StrEnum
from typing import Annotated, Literal
from uuid import uuid4

from pydantic import Field

from feddiff_protocol import layout
from feddiff_protocol.access import Role
from feddiff_protocol.api import Name, Wire
from feddiff_protocol.errors import FeddiffError, PrivacyRefusal, StorageFailed
from feddiff_protocol.stages import Uri

from .stores import FAILURES, Store, check_creates_once

LARGE_BYTES = 6 << 20  # more than one part of an upload
RACES = 5


class StoreCheckSpec(Wire):
    """A store, and as whom to ask: without a role as its administrator, who may see its settings."""

    uri: Uri
    whose: Literal["owner", "federation"] | None = None
    role: Role | None = None
    client: Name | None = None
    neighbours: Annotated[tuple[Name, ...], Field(max_length=1000)] = ()
    closed: Annotated[tuple[Uri, ...], Field(max_length=1000)] = ()
    endpoint: str | None = None


class State(StrEnum):
    FINE = "fine"
    WARNING = "warning"
    FAILED = "failed"


class Finding(Wire):
    """One answer; a failed one has the exit code that a stage would end with."""

    check: str
    state: State
    found: str
    expected: str = ""
    advice: str = ""
    exit_code: int = 0


def fine(check: str, found: str) -> Finding:
    return Finding(check=check, state=State.FINE, found=found)


def warning(check: str, *, expected: str, found: str, advice: str) -> Finding:
    return Finding(check=check, state=State.WARNING, expected=expected, found=found, advice=advice)


def failed(check: str, error: type[FeddiffError], *, expected: str, found: str, advice: str) -> Finding:
    return Finding(
        check=check, state=State.FAILED, expected=expected, found=found, advice=advice, exit_code=error.exit_code
    )


# ---- What any store must do --------------------------------------------------------------------------------------


def probe_prefix(spec: StoreCheckSpec) -> str:
    """A place below which the role may do all that is asked of it, and nobody has anything."""
    uid = str(uuid4())
    if spec.role is Role.FEDERATION and spec.client is not None:
        return layout.client_prefix(uid, spec.client)
    if spec.role is Role.TRAINER:
        return layout.job_prefixes(uid)[0]
    return layout.release_prefix(f"{layout.PROBE}{uid}")


def behaviour(spec: StoreCheckSpec, store: Store, prefix: str) -> Iterator[Finding]:
    """Bytes come back as they were put, and of all that create a key one is told so."""
    with _probes_deleted(store, prefix) as left:
        yield _round_trip(spec, store, prefix)
        yield creates_once(store, prefix)
    if left:
        yield warning(
            "cleaning up", expected="to delete the probes", found=f"that {left[0]} stays", advice="delete it by hand"
        )


@contextmanager
def _probes_deleted(store: Store, prefix: str) -> Iterator[list[str]]:
    """Afterwards nothing is below `prefix`, or the list that was handed out says what."""
    left: list[str] = []
    try:
        yield left
    finally:
        with suppress(*FAILURES):
            for key in store.list(prefix):
                with suppress(*FAILURES):
                    store.delete(key)
            left += store.list(prefix)


def probe(prefix: str) -> str:
    return f"{prefix}{layout.PROBE}{secrets.token_hex(16)}"


def _round_trip(spec: StoreCheckSpec, store: Store, prefix: str) -> Finding:
    check = "put, get, list, delete"
    try:
        problem = next((each for size in (1, LARGE_BYTES) for each in _trip(spec, store, probe(prefix), size)), None)
    except FAILURES as error:
        expected = "that a stage of this role may put, get, list and delete below its own prefix"
        advice = "give these keys the policy that --print-policy shows"
        return failed(check, type(error), expected=expected, found=str(error), advice=advice)
    if problem is None:
        return fine(check, f"1 byte and {LARGE_BYTES >> 20} MiB came back with the same SHA-256")
    return failed(
        check, StorageFailed, expected="what was put, until it is deleted", found=problem, advice="use another store"
    )


def _trip(spec: StoreCheckSpec, store: Store, key: str, size: int) -> Iterator[str]:
    """Problems met on the way of `size` bytes through the store."""
    data = secrets.token_bytes(size)
    if spec.role is Role.FEDERATION:
        store.create(key, data)  # all that a client's keys ever do there
    else:
        store.put(key, data)
    if hashlib.sha256(store.get(key)).digest() != hashlib.sha256(data).digest():
        yield f"other bytes for an object of {size}"
    if key not in store.list(f"{key.rpartition('/')[0]}/"):
        yield "a list without what was just put"
    store.delete(key)
    if key in store.list(f"{key.rpartition('/')[0]}/"):
        yield "a list with what was just deleted"


def creates_once(store: Store, prefix: str) -> Finding:
    """Refuses a store in which two attempts could both believe that theirs is the release."""
    check = "create if absent"
    expected = "that of all that create one object exactly one is told so"
    try:
        check_creates_once(store, prefix)
        problem = _race_problem(store, prefix) or _deleted_problem(store, prefix)
    except PrivacyRefusal:
        problem = "that a second create went through"
    except FAILURES as error:
        return failed(check, type(error), expected=expected, found=str(error), advice="see the finding above")
    if problem is None:
        return fine(check, f"one of two, {RACES} races of two threads with one winner each, anew after a deletion")
    return failed(
        check,
        PrivacyRefusal,
        expected=expected,
        found=problem,
        advice="a retry could release twice: use a store, or a version of it, that honours If-None-Match",
    )


def _race_problem(store: Store, prefix: str) -> str | None:
    """What is wrong if two threads that start at one moment are not one winner and one loser."""
    with ThreadPoolExecutor(2) as pool:
        for _ in range(RACES):
            key, line = probe(prefix), threading.Barrier(2)

            def create(data: bytes, key: str = key, line: threading.Barrier = line) -> bool:
                line.wait()
                return store.create(key, data)

            told = dict(zip((b"one", b"other"), pool.map(create, (b"one", b"other")), strict=True))
            winners = [data for data, first in told.items() if first]
            if len(winners) != 1:
                return f"{len(winners)} winners of a race of two"
            if store.get(key) != winners[0]:
                return "that the loser of a race was stored"
    return None


def _deleted_problem(store: Store, prefix: str) -> str | None:
    key = probe(prefix)
    store.create(key, b"first")
    store.delete(key)
    return None if store.create(key, b"second") else "that a deleted object could not be created again"
