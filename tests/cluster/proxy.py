"""What stands between an operator and its API server, counts its calls, and kills it at one of them."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import aiohttp
from aiohttp import web
from yarl import URL

HOP_BY_HOP = {"host", "connection", "content-length", "transfer-encoding", "accept-encoding"}


@dataclass
class Call:
    """One request of the operator that is no watch."""

    method: str
    path: str
    query: dict[str, str]
    body: Any
    status: int | None = None  # None: it never reached the API server
    answered_at: int = 0  # how many calls had come when it was answered

    @property
    def done(self) -> bool:
        return self.status is not None and 200 <= self.status < 300

    def __str__(self) -> str:
        return f"{self.method} {self.path}{' (rehearsal)' if 'dryRun' in self.query else ''}"


@dataclass
class Death:
    """Comes at the `at`-th call of those that count: before it is forwarded, or once it is `answered`, which is then
    told to nobody."""

    at: int
    answered: bool
    counts: Callable[[Call], bool]
    call: Call | None = None  # at which it came
    num_counted: int = 0

    def comes(self, call: Call) -> bool:
        self.num_counted += self.counts(call)
        if self.call is None and self.num_counted == self.at:
            self.call = call
            return True
        return False


@dataclass
class Life:
    """One operator process's. What it still asks for when it is dead was never sent."""

    kill: Callable[[], None]
    death: Death | None = None
    dead: bool = False

    def ends(self, call: Call, answered: bool) -> bool:
        """Whether it dies of this call, now that it is answered or not; then it is killed."""
        if self.death and self.death.answered == answered and self.death.comes(call):
            self.dead = True
            self.kill()
        return self.dead


@dataclass
class Proxy:
    """A plain HTTP server on 127.0.0.1 for one operator. `calls` are those of all its lives, in their order. Writes are
    forwarded one after the other, so that a death lets none slip through beside it."""

    session: aiohttp.ClientSession  # knows the API server and who we are
    calls: list[Call] = field(default_factory=list)
    life: Life = field(default_factory=lambda: Life(lambda: None))
    port: int = 0
    _turn: asyncio.Lock = field(default_factory=asyncio.Lock)

    async def __aenter__(self) -> Self:
        application = web.Application(client_max_size=2**24)
        application.router.add_route("*", "/{any:.*}", self._handle)
        self._runner = web.AppRunner(application, access_log=None, shutdown_timeout=0.1)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0).start()
        self.port = self._runner.addresses[0][1]
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._runner.cleanup()

    def kubeconfig(self, folder: Path) -> Path:
        """A kubeconfig whose API server this is."""
        path = folder / f"proxy-{self.port}.kubeconfig"
        entry = {"name": "proxy", "cluster": {"server": f"http://127.0.0.1:{self.port}"}}
        context = {"name": "proxy", "context": {"cluster": "proxy", "user": "proxy"}}
        users = [{"name": "proxy", "user": {}}]
        content = {"clusters": [entry], "contexts": [context], "users": users, "current-context": "proxy"}
        path.write_text(json.dumps({"apiVersion": "v1", "kind": "Config", **content}))
        return path

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        life, body = self.life, await request.read()
        if request.query.get("watch") == "true":
            return await self._stream(request)
        async with contextlib.nullcontext() if request.method == "GET" else self._turn:
            if life.dead:
                raise web.HTTPServiceUnavailable  # to nobody
            call = Call(request.method, request.path, dict(request.query), json.loads(body) if body else None)
            self.calls.append(call)
            if life.ends(call, answered=False):
                raise web.HTTPServiceUnavailable
            async with self._forwarded(request, body) as answer:
                content = await answer.read()
                call.status, call.answered_at = answer.status, len(self.calls)
            life.ends(call, answered=True)
        return web.Response(body=content, status=answer.status, headers=_kept(answer.headers))

    async def _stream(self, request: web.Request) -> web.StreamResponse:
        async with self._forwarded(request, b"") as answer:
            response = web.StreamResponse(status=answer.status, headers=_kept(answer.headers))
            await response.prepare(request)
            with contextlib.suppress(ConnectionError):
                async for chunk in answer.content.iter_any():
                    await response.write(chunk)
        return response

    @contextlib.asynccontextmanager
    async def _forwarded(self, request: web.Request, body: bytes) -> AsyncIterator[aiohttp.ClientResponse]:
        url, headers = URL(request.raw_path, encoded=True), _kept(request.headers)
        async with self.session.request(request.method, url, data=body or None, headers=headers) as answer:
            yield answer


def _kept(headers: Any) -> dict[str, str]:
    return {name: value for name, value in headers.items() if name.lower() not in HOP_BY_HOP}
