"""Whether the watches live: every byte that a watch brings counts, bookmarks too, which no kopf handler ever sees.

kopf opens one stream per kind and namespace, through a session that we give it; here each stream's bytes are counted.
The API server sends a bookmark a minute on a stream without events, so a stream that stays silent is dead, however
well the others do, and however alive everything else looks (kopf #1276, #957, #1145).
"""

import math
from collections.abc import Callable, Iterator, Mapping
from types import SimpleNamespace

import aiohttp
from yarl import URL

FIRST_PAUSES = (1, 1, 2, 3, 5, 8, 13, 21)  # kopf's own
FORBIDDEN_PAUSE_SECONDS = 30.0


class _Stream:
    """The newest response of one watch, and when its bytes last grew."""

    def __init__(self, response: aiohttp.ClientResponse, now: float) -> None:
        self.response, self.bytes, self.active_at, self.opened_at = response, 0, now, now

    def look(self, now: float) -> None:
        if self.response.content.total_bytes != self.bytes:
            self.bytes, self.active_at = self.response.content.total_bytes, now


class Watches:
    """Every watch stream of this process; `trace` goes into the session that opens them."""

    def __init__(self, clock: Callable[[], float], observe: Callable[[str, str, str, float], None]) -> None:
        self._clock, self._observe = clock, observe
        self._streams: dict[str, _Stream] = {}
        self._listings: dict[str, int] = {}
        self._listed_at: dict[str, float] = {}  # when the last listing began
        self._reopened: dict[str, int] = {}
        self.forbidden: set[str] = set()  # paths that their owner does not let us see, now
        self.trace = aiohttp.TraceConfig()
        self.trace.on_request_start.append(self._began)
        self.trace.on_request_end.append(self._ended)
        self.trace.on_request_exception.append(self._failed)

    def look(self) -> None:
        """Notes which streams have brought something since the last look; to be called every few seconds."""
        now = self._clock()
        for stream in self._streams.values():
            stream.look(now)

    @property
    def opened(self) -> frozenset[str]:
        """The paths that were ever watched; a watch opens when its objects have been listed."""
        return frozenset(self._streams)

    def opened_at(self, path: str) -> float | None:
        """When the watch there was last opened; None before the first time, and while the objects are listed anew."""
        stream = self._streams.get(path)
        if stream is None or stream.opened_at <= self._listed_at.get(path, -math.inf):
            return None
        return stream.opened_at

    def listings(self, path: str) -> int:
        """How often the objects there were listed: at the start, and whenever a watch could not go on."""
        return self._listings.get(path, 0)

    def reopened(self) -> Mapping[str, int]:
        """How often the watch of each path was opened after its first time."""
        return dict(self._reopened)

    def silent_seconds(self) -> dict[str, float]:
        """Seconds since a byte was seen to come, by the path that is watched; a forbidden one has nothing to say."""
        self.look()
        now, allowed = self._clock(), self._streams.keys() - self.forbidden
        return {path: now - self._streams[path].active_at for path in allowed}

    async def _began(
        self, _: aiohttp.ClientSession, context: SimpleNamespace, parameters: aiohttp.TraceRequestStartParams
    ) -> None:
        context.began = self._clock()
        url = parameters.url
        if verb_of(url, "GET") == "list" and "continue" not in url.query:
            self._listings[url.path], self._listed_at[url.path] = self.listings(url.path) + 1, context.began

    async def _ended(
        self, _: aiohttp.ClientSession, context: SimpleNamespace, parameters: aiohttp.TraceRequestEndParams
    ) -> None:
        url, response, now = parameters.url, parameters.response, self._clock()
        self._observe(verb_of(url, "GET"), url.path, str(response.status), now - context.began)
        (self.forbidden.add if response.status == 403 else self.forbidden.discard)(url.path)
        if url.query.get("watch") == "true" and response.status == 200:
            self._opened(url.path, response, now)

    def _opened(self, path: str, response: aiohttp.ClientResponse, now: float) -> None:
        """A stream that is opened again is as silent as it was: opening proves nothing, only what it brings does."""
        stream = self._streams.get(path)
        if stream is None:
            self._streams[path], self._reopened[path] = _Stream(response, now), 0
        else:
            self._reopened[path] += 1
            stream.look(now)
            stream.response, stream.bytes, stream.opened_at = response, 0, now

    async def _failed(
        self, _: aiohttp.ClientSession, context: SimpleNamespace, parameters: aiohttp.TraceRequestExceptionParams
    ) -> None:
        self._observe(verb_of(parameters.url, "GET"), parameters.url.path, "none", self._clock() - context.began)


class Patience:
    """Pauses between kopf's tries of one request, in seconds: it gives up on an API server that does not answer, but
    not on a namespace whose owner has taken our rights away: that must not end the service for all others."""

    def __init__(self, watches: Watches) -> None:
        self._watches = watches

    def __iter__(self) -> Iterator[float]:
        yield from FIRST_PAUSES
        while self._watches.forbidden:
            yield FORBIDDEN_PAUSE_SECONDS


def verb_of(url: URL, method: str) -> str:
    """Kubernetes' verb for a request: watch, get, list, create, update, patch, delete."""
    if method != "GET":
        return {"POST": "create", "PUT": "update"}.get(method, method.lower())
    if url.query.get("watch") == "true":
        return "watch"
    return "get" if names_one_object(url.path) else "list"


def names_one_object(path: str) -> bool:
    return len(_after_namespace(path)) > 1


def resource_of(path: str) -> str:
    """The plural that a request's path is about, with its subresource: `jobs`, `privatedatasets/status`."""
    parts = _after_namespace(path)
    return "/".join(parts[0::2]) if parts else "discovery"


def _after_namespace(path: str) -> list[str]:
    """The parts of a path from the plural on; none for discovery and version documents."""
    parts = path.strip("/").split("/")
    rest = parts[2:] if parts[0] == "api" else parts[3:] if parts[0] == "apis" else []
    return rest[2:] if len(rest) > 2 and rest[0] == "namespaces" else rest
