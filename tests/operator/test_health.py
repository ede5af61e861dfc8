"""Red when a restart would help, green otherwise."""

import asyncio
from collections.abc import Awaitable, Callable

import aiohttp
import pytest
from aiohttp import web
from yarl import URL

from feddiff_operator.health import LONGEST_TICK_SECONDS, Pulse, application, faults, missing
from feddiff_operator.watch import Watches, resource_of, verb_of

WELL = Pulse(silent_seconds={"/api/v1/pods": 59.0, "/apis/batch/v1/jobs": 0.1}, stalled_seconds=0.0, tick_seconds=1.0)


def test_a_quiet_cluster_is_alive() -> None:
    assert faults(WELL, 240) == []


def test_one_silent_watch_is_enough_however_lively_the_others_are() -> None:
    pulse = Pulse({"/api/v1/pods": 241.0, "/apis/batch/v1/jobs": 0.0}, stalled_seconds=0.0, tick_seconds=0.0)
    (fault,) = faults(pulse, 240)
    assert fault.startswith("watch /api/v1/pods: nothing for 241 s")


def test_work_that_does_not_go_on_is_a_fault() -> None:
    (fault,) = faults(Pulse({}, stalled_seconds=300.0, tick_seconds=0.0), 240)
    assert "nothing was done for 300 s" in fault


def test_a_loop_that_does_not_turn_is_a_fault() -> None:
    (fault,) = faults(Pulse({}, 0.0, LONGEST_TICK_SECONDS + 1), 240)
    assert fault.startswith("event loop")


def test_ready_means_that_every_watch_has_listed() -> None:
    assert missing(frozenset({"a", "b"}), frozenset({"b"})) == ["a"]
    assert missing(frozenset({"a", "b"}), frozenset({"a", "b", "c"})) == []


@pytest.mark.parametrize(
    ("path", "resource"),
    [
        ("/api/v1/pods", "pods"),
        ("/api/v1/namespaces/research/pods", "pods"),
        ("/apis/batch/v1/namespaces/research/jobs/fd-1", "jobs"),
        ("/apis/feddiff.dev/v1alpha1/namespaces/a/privatedatasets/scans/status", "privatedatasets/status"),
        ("/apis/feddiff.dev/v1alpha1/privatedatasets", "privatedatasets"),
        ("/apis/coordination.k8s.io/v1/namespaces/x/leases/y", "leases"),
        ("/apis/batch/v1", "discovery"),
        ("/apis", "discovery"),
        ("/api", "discovery"),
        ("/version", "discovery"),
    ],
)
def test_requests_are_counted_by_resource_and_never_by_name(path: str, resource: str) -> None:
    assert resource_of(path) == resource


@pytest.mark.parametrize(
    ("method", "url", "verb"),
    [
        ("GET", "/api/v1/namespaces/a/pods", "list"),
        ("GET", "/api/v1/namespaces/a/pods/x", "get"),
        ("GET", "/api/v1/pods?watch=true", "watch"),
        ("POST", "/api/v1/namespaces/a/pods", "create"),
        ("PUT", "/api/v1/namespaces/a/pods/x/status", "update"),
        ("PATCH", "/api/v1/namespaces/a/pods/x", "patch"),
        ("DELETE", "/api/v1/namespaces/a/pods/x", "delete"),
    ],
)
def test_a_request_has_the_verb_that_a_role_would_name(method: str, url: str, verb: str) -> None:
    assert verb_of(URL(f"https://server{url}"), method) == verb


async def _served(pages: web.Application, visit: Callable[[str], Awaitable[None]]) -> None:
    runner = web.AppRunner(pages)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        await visit(f"http://127.0.0.1:{runner.addresses[0][1]}")
    finally:
        await runner.cleanup()


def test_the_pages_say_what_is_wrong() -> None:
    problems: list[str] = []

    async def visit(root: str) -> None:
        async with aiohttp.ClientSession(root) as session:
            for path, well in (("/healthz", "alive"), ("/readyz", "ready")):
                async with session.get(path) as answer:
                    assert (answer.status, (await answer.text()).strip()) == (200, well)
            problems.append("pods")
            for path in ("/healthz", "/readyz"):
                async with session.get(path) as answer:
                    assert answer.status == 503
                    assert "pods" in await answer.text()
            async with session.get("/metrics") as answer:
                assert (answer.status, await answer.text()) == (200, "feddiff_leader 1.0\n")
                assert answer.headers["Content-Type"].startswith("text/plain; version=")

    pages = application(lambda: problems, lambda: problems, lambda: b"feddiff_leader 1.0\n")
    asyncio.run(_served(pages, visit))


def test_a_watch_whose_objects_are_listed_anew_is_not_open() -> None:
    """What it brought before says nothing of what the new listing will bring."""
    clock, path = [1000.0], "/api/v1/pods"

    async def answer(request: web.Request) -> web.Response:
        clock[0] += 1
        return web.json_response({})

    async def visit(root: str) -> None:
        watches, seen = Watches(lambda: clock[0], lambda *_: None), []
        async with aiohttp.ClientSession(root, trace_configs=[watches.trace]) as session:
            for asked in ({}, {"watch": "true"}, {"watch": "true"}, {}, {"continue": "x"}, {"watch": "true"}):
                async with session.get(path, params=asked):
                    seen.append((watches.listings(path), watches.opened_at(path)))
        assert seen == [(1, None), (1, 1002), (1, 1003), (2, None), (2, None), (2, 1006)]

    pages = web.Application()
    pages.add_routes([web.get(path, answer)])
    asyncio.run(_served(pages, visit))


class ApiServer:
    """A watch endpoint that sends a line whenever it is told to, and cuts the stream when told so."""

    def __init__(self) -> None:
        self.lines: asyncio.Queue[bytes] = asyncio.Queue()

    async def watch(self, request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        while (line := await self.lines.get()) != b"":
            await response.write(line)
        return response


def test_a_watch_is_as_alive_as_its_last_byte_and_opening_it_again_proves_nothing() -> None:
    clock = [1000.0]
    requests: list[tuple[str, str, str]] = []
    server = ApiServer()

    def observe(verb: str, path: str, code: str, seconds: float) -> None:
        requests.append((verb, path, code))

    async def visit(root: str) -> None:
        watches = Watches(lambda: clock[0], observe)
        path = "/api/v1/pods"

        def silent() -> float:
            watches.look()
            return watches.silent_seconds()[path]

        async with aiohttp.ClientSession(root, trace_configs=[watches.trace]) as session:
            assert watches.opened == frozenset()
            async with session.get(path, params={"watch": "true"}) as stream:
                assert watches.opened == {path}
                clock[0] += 50
                assert silent() == 50
                await server.lines.put(b'{"type": "BOOKMARK"}\n')
                assert await stream.content.readline() == b'{"type": "BOOKMARK"}\n'
                assert silent() == 0
                clock[0] += 200
                assert silent() == 200
            await server.lines.put(b"")
            async with session.get(path, params={"watch": "true"}) as stream:
                assert silent() == 200  # a server that accepts and sends nothing is not alive
                await server.lines.put(b'{"type": "BOOKMARK"}\n')
                await stream.content.readline()
                assert silent() == 0
            await server.lines.put(b"")
        assert requests == [("watch", path, "200")] * 2
        assert watches.reopened() == {path: 1}

    pages = web.Application()
    pages.add_routes([web.get("/api/v1/pods", server.watch)])
    asyncio.run(_served(pages, visit))
