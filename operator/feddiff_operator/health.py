"""Whether this process should be restarted (/healthz) and whether it has seen everything (/readyz); and /metrics.

Only what a restart can mend is a reason for one: a watch that brings nothing any more, work that does not go on, a
loop that does not turn. Much to do is none, and neither is a job that fails: metrics and alerts tell of those.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST

LONGEST_TICK_SECONDS = 30.0  # the loop's own pulse beats every few seconds


@dataclass(frozen=True)
class Pulse:
    """What the process knows of its own life, at one moment."""

    silent_seconds: Mapping[str, float]  # by watched path, since a byte came
    stalled_seconds: float  # since a reconcile ended or a request was answered, while there is work; else 0
    tick_seconds: float  # since the loop last turned


def faults(pulse: Pulse, liveness_seconds: float) -> list[str]:
    """Why this process should be restarted; empty while it should not."""
    found = [
        f"watch {path}: nothing for {seconds:.0f} s, expected a bookmark every 60 s"
        for path, seconds in sorted(pulse.silent_seconds.items())
        if seconds > liveness_seconds
    ]
    if pulse.stalled_seconds > liveness_seconds:
        found.append(f"queue: there is work, and nothing was done for {pulse.stalled_seconds:.0f} s")
    if pulse.tick_seconds > LONGEST_TICK_SECONDS:
        found.append(f"event loop: no turn for {pulse.tick_seconds:.0f} s")
    return found


def missing(expected: frozenset[str], opened: frozenset[str]) -> list[str]:
    """The watches that have not listed their objects yet; empty when the indexes are filled."""
    return sorted(expected - opened)


def application(
    faults: Callable[[], list[str]], missing: Callable[[], list[str]], metrics: Callable[[], bytes]
) -> web.Application:
    """The three pages. A loop that is stuck answers nothing at all, which a probe counts as a failure too."""

    def answer(problems: list[str], well: str) -> web.Response:
        return web.Response(text="\n".join(problems or [well]) + "\n", status=503 if problems else 200)

    async def healthz(_: web.Request) -> web.Response:
        return answer(faults(), "alive")

    async def readyz(_: web.Request) -> web.Response:
        return answer([f"not listed yet: {path}" for path in missing()], "ready")

    async def exposed(_: web.Request) -> web.Response:
        return web.Response(body=metrics(), headers={"Content-Type": CONTENT_TYPE_LATEST})

    pages = web.Application()
    pages.add_routes([web.get("/healthz", healthz), web.get("/readyz", readyz), web.get("/metrics", exposed)])
    return pages
