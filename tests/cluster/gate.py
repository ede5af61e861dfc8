"""What stands between stages and the S3 server, notes every object that they send, and keeps a request that a test
names for as long as the test wants: so a fault strikes in the middle of an upload, and not near it.

    with Gate(store.endpoint, NODE_ADDRESS) as gate:
        held = gate.hold(r"PUT /federation/.*/shards/")
        assert held.wait(60)        # the first such request is here, and the server has not seen it
        held.let_go()               # it goes on, even if its author is dead: a packet that comes late
"""

import asyncio
import hashlib
import io
import re
import threading
from dataclasses import dataclass, field
from typing import Any, Self

import aiohttp
from aiohttp import web
from yarl import URL

HOP_BY_HOP = {"connection", "content-length", "transfer-encoding", "expect"}  # not Host: it is signed
LARGEST_BODY = 2**28


@dataclass(frozen=True)
class Write:
    """One object that somebody tried to store; its bytes left the pod, whatever the server answered."""

    path: str  # /bucket/key
    sha256: str
    status: int | None  # None: the server was not there


@dataclass
class Held:
    """The first `most` requests whose "METHOD /bucket/key" matches: kept before the server sees them, or, `answered`,
    after; then it is their author who never hears of it."""

    pattern: re.Pattern[str]
    most: int
    answered: bool
    num_taken: int = 0
    num_here: int = 0  # of the taken ones, those that have come to where they are kept
    _here: threading.Condition = field(default_factory=threading.Condition)
    _gone: threading.Event = field(default_factory=threading.Event)

    def wait(self, seconds: float, num: int = 1) -> bool:
        """Whether `num` of them have come in time."""
        with self._here:
            return self._here.wait_for(lambda: self.num_here >= num, seconds)

    def let_go(self) -> None:
        self._gone.set()

    def takes(self, request: str) -> bool:
        with self._here:
            if self.num_taken >= self.most or self._gone.is_set() or not self.pattern.search(request):
                return False
            self.num_taken += 1
            return True

    async def keep(self) -> None:
        with self._here:
            self.num_here += 1
            self._here.notify_all()
        await asyncio.to_thread(self._gone.wait)


class Gate:
    """A plain HTTP server on a free port of `address`, in a thread of its own. A context manager."""

    def __init__(self, endpoint: str, address: str) -> None:
        self._endpoint, self._address = endpoint, address
        self._loop = asyncio.new_event_loop()
        self._ready, self._stop = threading.Event(), asyncio.Event()
        self._held: list[Held] = []
        self.writes: list[Write] = []
        self.port = 0

    @property
    def endpoint(self) -> str:
        """What a stage takes for the S3 server."""
        return f"http://{self._address}:{self.port}"

    def hold(self, pattern: str, most: int = 1, answered: bool = False) -> Held:
        held = Held(re.compile(pattern), most, answered)
        self._held.append(held)
        return held

    def __enter__(self) -> Self:
        self._thread = threading.Thread(target=self._loop.run_until_complete, args=(self._serve(),), daemon=True)
        self._thread.start()
        self._ready.wait()
        return self

    def __exit__(self, *_: object) -> None:
        for held in self._held:
            held.let_go()
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()
        self._loop.close()

    async def _serve(self) -> None:
        connector = aiohttp.TCPConnector(limit=0, force_close=True)  # the server may be killed at any moment
        async with aiohttp.ClientSession(connector=connector, auto_decompress=False) as self._session:
            application = web.Application(client_max_size=LARGEST_BODY)
            application.router.add_route("*", "/{any:.*}", self._handle)
            runner = web.AppRunner(application, access_log=None, shutdown_timeout=0.1)
            await runner.setup()
            await web.TCPSite(runner, self._address, 0).start()
            self.port = runner.addresses[0][1]
            self._ready.set()
            await self._stop.wait()
            await runner.cleanup()

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        body = await request.read()
        name = f"{request.method} {request.path}"
        taken = next((each for each in self._held if each.takes(name)), None)
        if taken and not taken.answered:
            await taken.keep()
        status, content, headers = await self._forwarded(request, body)
        if request.method == "PUT":
            self.writes.append(Write(request.path, hashlib.sha256(body).hexdigest(), status))
        if taken and taken.answered:
            await taken.keep()
        if status is None:
            if request.transport is not None:
                request.transport.abort()  # as a server that is not there
            raise web.HTTPBadGateway
        if request.method != "HEAD":
            return web.Response(status=status, body=content, headers=_kept(headers))
        answer = web.StreamResponse(status=status, headers=headers)  # with the length of what it does not hold
        await answer.prepare(request)
        return answer

    async def _forwarded(self, request: web.Request, body: bytes) -> tuple[int | None, bytes, dict[str, str]]:
        """What the server answers; no status when it does not."""
        data = io.BytesIO(body) if body else None
        url = URL(f"{self._endpoint}{request.raw_path}", encoded=True)
        try:
            async with self._session.request(
                request.method, url, data=data, headers=_kept(request.headers), allow_redirects=False
            ) as answer:
                return answer.status, await answer.read(), dict(answer.headers)
        except (aiohttp.ClientError, OSError):
            return None, b"", {}


def _kept(headers: Any) -> dict[str, str]:
    return {name: value for name, value in headers.items() if name.lower() not in HOP_BY_HOP}
