"""The operator's process: kopf watches, indexes and wakes; the leader's workers reconcile; everything else keeps it
alive and tells about it.

kopf is used for its watches alone: no handler that creates or updates, no finalizer, no annotation, no scanning of
the cluster. A handler here only wakes a key, so any event may be lost, doubled or late.
"""

import asyncio
import contextlib
import logging
import os
import secrets
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator, Callable, Mapping
from datetime import UTC, datetime
from functools import partial
from typing import Any, NamedTuple, Protocol

import aiohttp
import kopf
import structlog
from aiohttp import web
from kubernetes.aio.config import ConfigException
from yarl import URL

from feddiff_protocol.errors import ConfigurationInvalid
from feddiff_protocol.labels import JOB_UID

from . import health
from .children import Children, Seen, Shelf, owner_of
from .cluster import FDJ, JOB, PDS, POD, PRL, Cluster, Conflict, Kind, Object, Observe, Unavailable
from .events import Recorder
from .lease import Election
from .ledger import ClusterLedger
from .metrics import Metrics, dataset_facts, job_facts
from .news import tell
from .progress import Progresses
from .queue import WorkQueue
from .reconcile import Reconciler
from .settings import Settings
from .watch import Patience, Watches, verb_of

log = structlog.get_logger()

WATCHED = (FDJ, PDS, PRL, JOB, POD)
LOOK_SECONDS = 5.0  # how often the streams are looked at, and the loop proves that it turns
RECONCILE_SECONDS = 300.0  # one look at one object; cut off, it goes on where it was at its next turn
DATASET_DELAY_SECONDS = 0.5  # a ledger's own writes come back as several events
SETTLE_SECONDS = 0.5  # a watch that brings nothing for so long has brought what was listed
LISTED_SECONDS = 30.0  # and so has one that is open for so long, whatever else it brings
GRACE_SECONDS = 5.0  # for what is being reconciled when the process is told to stop
LEASE_QPS, LEASE_BURST = 10.0, 20  # a rate of its own: the election must not wait behind a thousand Jobs

API_DOES_NOT_ANSWER = 69


class Key(NamedTuple):
    """What a worker takes: one object."""

    kind: str
    namespace: str
    name: str


class Reconciles(Protocol):
    """One look at one object; answers in how many seconds it wants to look again, None: when something happens."""

    async def job(self, namespace: str, name: str, children: Children) -> float | None: ...
    async def dataset(self, namespace: str, name: str, children: Children | None = None) -> float | None: ...


MakeReconciler = Callable[[Cluster, Settings, Recorder, Metrics, Progresses], Reconciles]


def run(settings: Settings, make_reconciler: MakeReconciler) -> int:
    """The exit code of one operator's whole life: 0 after a signal, 69 when the API server went away for good."""
    log_as_json()
    try:
        return asyncio.run(_operate(settings, make_reconciler))
    except (aiohttp.ClientError, OSError) as error:
        log.error("the API server does not answer", error=str(error))
        return API_DOES_NOT_ANSWER


async def _operate(settings: Settings, make_reconciler: MakeReconciler) -> int:
    metrics, progress = Metrics(), Progress()
    try:
        path = os.environ.get("KUBECONFIG") or None
        work = _observer(metrics, progress)
        cluster = await Cluster.from_kubeconfig(path, settings.api_qps, settings.api_burst, work)
        elections = await Cluster.from_kubeconfig(path, LEASE_QPS, LEASE_BURST, _observer(metrics))
    except (ConfigException, OSError) as error:
        raise ConfigurationInvalid(
            f"expected KUBECONFIG to name a file, or a service account's token in this pod: {error}"
        ) from None
    async with cluster, elections:
        recorder = Recorder(cluster)
        stages = Progresses(utc_now)
        reconciler = make_reconciler(cluster, settings, recorder, metrics, stages)
        return await Operator(settings, elections, reconciler, recorder, metrics, progress, stages).run()


def reconciler(
    cluster: Cluster, settings: Settings, recorder: Recorder, metrics: Metrics, stages: Progresses
) -> Reconciles:
    """What carries jobs out and keeps ledgers."""
    ledger = ClusterLedger(cluster, utc_now, tell=partial(tell, recorder))
    return Reconciler(cluster, ledger, settings, recorder, metrics, utc_now, stages)


def utc_now() -> datetime:
    return datetime.now(UTC)


class Progress:
    """When work last went on: a reconcile ended, or a request of one was answered."""

    def __init__(self) -> None:
        self._at = time.monotonic()

    def made(self) -> None:
        self._at = time.monotonic()

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._at


def _observer(metrics: Metrics, progress: Progress | None = None) -> Observe:
    """Every request is counted and timed; an answer is progress."""

    def observe(method: str, path: str, status: int | None, seconds: float) -> None:
        metrics.api_request(verb_of(URL(path), method), path, str(status or "none"), seconds)
        if progress is not None and status is not None:
            progress.made()

    return observe


class Operator:
    """One replica: it watches from the start, and works while it leads."""

    def __init__(
        self,
        settings: Settings,
        elections: Cluster,
        reconciler: Reconciles,
        recorder: Recorder,
        metrics: Metrics,
        progress: Progress,
        stages: Progresses,
    ) -> None:
        self._settings, self._reconciler, self._recorder = settings, reconciler, recorder
        self._metrics, self._progress, self._stages = metrics, progress, stages
        self._queue = WorkQueue[Key](self._reconcile, settings.workers, self._reconciled)
        identity = f"{socket.gethostname()}-{secrets.token_hex(4)}"  # another one after every restart
        lease = (settings.lease_namespace, settings.lease_name)
        self._election = Election(elections, *lease, identity, settings.lease_seconds)
        self._watches = Watches(time.monotonic, metrics.api_request)
        self._began = self._ticked_at = time.monotonic()
        self._namespaces: tuple[str | None, ...] = settings.namespaces or (None,)
        self._heard: dict[str, float] = {}  # when a watch last brought something, by its path
        self._swept: dict[str, int] = {}  # the listing after which what is gone was taken away, by path
        self._seen = seen = Seen()
        self._kinds: dict[Kind, tuple[Shelf[Any], Callable[[Any, Any], None]]] = {
            FDJ: (seen.jobs, self._job_changed),
            PDS: (seen.datasets, self._dataset_changed),
            PRL: (seen.releases, self._release_changed),
            JOB: (seen.child_jobs, self._child_changed),
            POD: (seen.child_pods, self._child_changed),
        }
        metrics.queue(lambda: self._queue.depth, lambda: self._queue.oldest_seconds)
        metrics.resync(settings.resync_seconds)
        jobs, datasets = lambda: map(job_facts, seen.jobs), lambda: map(dataset_facts, seen.datasets)
        metrics.states(jobs, datasets, self._watches.silent_seconds, self._watches.reopened)

    async def run(self) -> int:
        """Until a signal (0), or until a part of it fails."""
        existing = asyncio.all_tasks()
        stopped = asyncio.Event()
        watching = await kopf.spawn_tasks(
            registry=self._registry(),
            settings=_kopf_settings(Patience(self._watches)),
            clusterwide=not self._settings.namespaces,
            namespaces=self._settings.namespaces,
            stop_flag=stopped,
        )
        for number in (signal.SIGTERM, signal.SIGINT):  # in place of kopf's, which would cancel ours with its own
            asyncio.get_running_loop().add_signal_handler(number, stopped.set)
        try:
            async with self._pages():
                parts = (self._elect(), self._resync(), self._tick(), self._recorder.run(), stopped.wait())
                own: list[asyncio.Task[Any]] = [asyncio.create_task(part) for part in parts]
                if self._settings.progress_seconds:
                    own.append(asyncio.create_task(self._ask_stages()))
                await asyncio.wait([*own, *watching], return_when=asyncio.FIRST_COMPLETED)
                failed = [task for task in own if task.done() and task.exception()]
                await self._stop(own)
            for task in failed:
                task.result()
        finally:
            stopped.set()
            await kopf.run_tasks(watching, ignored=existing)  # ends at once, and raises what its tasks have raised
        return 0

    async def _stop(self, own: list[asyncio.Task[Any]]) -> None:
        """What runs may end while we still lead; then another replica may."""
        await self._queue.stop(min(GRACE_SECONDS, self._settings.lease_seconds / 2))
        for task in own:
            task.cancel()
        await asyncio.gather(*own, return_exceptions=True)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(1):
                await self._recorder.flush()

    # -- leading

    async def _elect(self) -> None:
        """A candidate has seen everything that there is. Where events never pause it has after a while: what was listed
        comes first."""
        while not all(map(self._listed, self._paths - self._watches.forbidden)):
            await asyncio.sleep(0.1)
        await self._election.run(self._begin, self._end)

    def _begin(self) -> None:
        self._metrics.led(True)
        self._progress.made()
        self._queue.start()
        for key in self._keys():
            self._queue.wake(key)

    async def _end(self) -> None:
        self._metrics.led(False)
        await self._queue.stop(grace_seconds=0)
        self._stages.clear()

    async def _ask_stages(self) -> None:
        """How far stages are is asked in every period; a job is woken where that is news."""
        while True:
            await asyncio.sleep(self._settings.progress_seconds)
            for place in await self._stages.round():
                self._queue.wake(Key(FDJ.name, *place))

    async def _resync(self) -> None:
        """Everything is looked at once in every period, spread evenly over it."""
        while True:
            await asyncio.sleep(self._settings.resync_seconds)
            keys = self._keys()
            for turn, key in enumerate(keys):
                self._queue.wake(key, self._settings.resync_seconds * turn / len(keys))

    def _keys(self) -> list[Key]:
        jobs = [Key(FDJ.name, job.namespace, job.name) for job in map(job_facts, self._seen.jobs)]
        datasets = map(dataset_facts, self._seen.datasets)
        return jobs + [Key(PDS.name, dataset.namespace, dataset.name) for dataset in datasets]

    async def _reconcile(self, key: Key) -> float | None:
        async with asyncio.timeout(RECONCILE_SECONDS):
            if key.kind == PDS.name:
                return await self._reconciler.dataset(key.namespace, key.name, self._seen)
            return await self._reconciler.job(key.namespace, key.name, self._seen)

    def _reconciled(self, key: Key, seconds: float, error: Exception | None) -> None:
        self._progress.made()
        self._metrics.reconciled(key.kind, _result(error), seconds, time.time())
        where = {"kind": key.kind, "namespace": key.namespace, "name": key.name}
        if isinstance(error, Conflict | Unavailable | TimeoutError):
            log.info("reconcile again", **where, result=_result(error), error=str(error))
        elif error is not None:
            log.error("reconcile failed", **where, exc_info=error)

    # -- watching

    def _registry(self) -> kopf.OperatorRegistry:
        """kopf's handlers: one for each kind, which keeps what it brings and wakes whom it concerns."""
        registry = kopf.OperatorRegistry()
        kopf.on.login(registry=registry)(self._login)
        for kind in WATCHED:
            kopf.on.event(*_resource(kind), id=kind.plural, registry=registry)(self._handler(kind))
        return registry

    async def _login(self, **more: Any) -> kopf.AiohttpSession | None:
        """A session of our own, so that the bytes of every watch are seen; made anew when a token was refused."""
        info = kopf.login_with_kubeconfig(**more) if os.environ.get("KUBECONFIG") else None
        info = info or kopf.login_with_service_account(**more)
        if info is None:
            raise kopf.LoginError("neither KUBECONFIG nor a service account's token is there")
        session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, ssl=info.as_ssl_context()),
            headers={**info.as_http_headers(), "User-Agent": "feddiff-operator"},
            trace_configs=[self._watches.trace],
        )
        return kopf.AiohttpSession(server=info.server, aiohttp_session=session)

    def _handler(self, kind: Kind) -> Callable[..., Any]:
        async def handler(event: Mapping[str, Any], **_: Any) -> None:
            body = event["object"]
            path = self._path(kind, body["metadata"]["namespace"])
            self._heard[path] = time.monotonic()
            self._metrics.watch_event(kind.name, time.time())
            shelf, wake = self._kinds[kind]
            if event["type"] == "DELETED":
                now, before = None, shelf.take(body)
            else:
                now, before = shelf.put(body, self._watches.listings(path))
            if now is not None or before is not None:
                wake(now, before)

        return handler

    def _sweep(self) -> None:
        """What a watch could not tell while it was down: the objects that its new listing did not bring are gone."""
        for kind in WATCHED:
            for namespace in self._namespaces:
                path = kind.path(namespace)
                listings = self._watches.listings(path)
                if listings > self._swept.get(path, 1) and self._settled(path):
                    self._swept[path] = listings
                    shelf, wake = self._kinds[kind]
                    for gone in shelf.take_unlisted(namespace, listings):
                        wake(None, gone)

    def _settled(self, path: str) -> bool:
        """Whether what was listed there has arrived: the watch is open, and for a moment nothing has come."""
        opened = self._watches.opened_at(path)
        return opened is not None and time.monotonic() - max(opened, self._heard.get(path, 0.0)) > SETTLE_SECONDS

    def _listed(self, path: str) -> bool:
        opened = self._watches.opened_at(path)
        return self._settled(path) or (opened is not None and time.monotonic() - opened > LISTED_SECONDS)

    def _path(self, kind: Kind, namespace: str) -> str:
        return kind.path(namespace if self._settings.namespaces else None)

    def _job_changed(self, now: Object | None, before: Object | None) -> None:
        facts = job_facts(now or before or {})
        self._queue.wake(Key(FDJ.name, facts.namespace, facts.name))
        if now is None:  # whatever it has reserved and not begun can be given back
            for where in facts.datasets:
                self._queue.wake(Key(PDS.name, *where), DATASET_DELAY_SECONDS)

    def _dataset_changed(self, now: Object | None, before: Object | None) -> None:
        facts = dataset_facts(now or before or {})
        where = (facts.namespace, facts.name)
        self._queue.wake(Key(PDS.name, *where), DATASET_DELAY_SECONDS)
        if now is None or before is None or facts.may_admit_more_than(dataset_facts(before)):
            for job in map(job_facts, self._seen.jobs.of(where)):
                if not job.ended:
                    self._queue.wake(Key(FDJ.name, job.namespace, job.name))

    def _release_changed(self, now: Object | None, before: Object | None) -> None:
        release = now or before or {}
        name = ((release.get("spec") or {}).get("dataset") or {}).get("name", "")
        self._queue.wake(Key(PDS.name, release["metadata"]["namespace"], name), DATASET_DELAY_SECONDS)

    def _child_changed(self, now: Object | None, before: Object | None) -> None:
        if owner := owner_of(now or before or {}):
            self._queue.wake(Key(FDJ.name, *owner))

    # -- living

    async def _tick(self) -> None:
        while True:
            self._watches.look()
            self._sweep()
            self._ticked_at = time.monotonic()
            await asyncio.sleep(LOOK_SECONDS)

    @contextlib.asynccontextmanager
    async def _pages(self) -> AsyncIterator[None]:
        """The health and metrics pages answer."""
        pages = health.application(self._faults, self._missing, self._metrics.exposition)
        runner = web.AppRunner(pages, access_log=None)
        await runner.setup()
        try:
            await web.SockSite(runner, _listener(self._settings.port)).start()
            log.info("pages", port=runner.addresses[0][1])
            yield
        finally:
            await runner.cleanup()

    def _faults(self) -> list[str]:
        return health.faults(self._pulse(), self._settings.liveness_seconds)

    def _pulse(self) -> health.Pulse:
        now = time.monotonic()
        never = {path: now - self._began for path in self._missing()}  # a kind that is not there yet: look again
        return health.Pulse(
            silent_seconds={**never, **self._watches.silent_seconds()},
            stalled_seconds=self._progress.seconds if self._queue.busy else 0.0,
            tick_seconds=now - self._ticked_at,
        )

    def _missing(self) -> list[str]:
        return health.missing(self._paths - self._watches.forbidden, self._watches.opened)

    @property
    def _paths(self) -> frozenset[str]:
        """What is watched: each kind in each namespace, or in all of them at once."""
        return frozenset(kind.path(namespace) for kind in WATCHED for namespace in self._namespaces)


def _listener(port: int) -> socket.socket:
    """One socket for IPv4 and IPv6, where the machine has both: two would be two ports when a free one is asked for."""
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", port))


def _result(error: Exception | None) -> str:
    match error:
        case None:
            return "success"
        case Conflict():
            return "conflict"
        case Unavailable():
            return "unavailable"
        case TimeoutError():
            return "timeout"
        case _:
            return "error"


def _resource(kind: Kind) -> tuple[str, str, str]:
    group, _, version = kind.api_version.rpartition("/")
    return group, version, kind.plural


class _NoDiffs(kopf.DiffBaseStorage):
    """kopf compares every object with what it was, by three deep copies, even where no handler asks for it."""

    def build(self, **_: Any) -> kopf.BodyEssence:
        return kopf.BodyEssence()

    def fetch(self, **_: Any) -> kopf.BodyEssence | None:
        return None

    def store(self, **_: Any) -> None:
        """Nothing is kept in the objects."""


def _kopf_settings(patience: Patience) -> kopf.OperatorSettings:
    settings = kopf.OperatorSettings()
    settings.networking.error_backoffs = patience
    settings.persistence.diffbase_storage = _NoDiffs()
    settings.queueing.idle_timeout = 0.2  # for so long an object stays in memory after its event
    settings.scanning.disabled = True
    settings.posting.enabled = False
    settings.peering.standalone = True
    settings.networking.enforce_retry_after = True
    settings.networking.request_timeout = 60
    settings.watching.chunk_size = 500
    for kind in (JOB, POD):
        settings.watching.label_selectors[_resource(kind)] = JOB_UID
    return settings


def log_as_json() -> None:
    """Every line of ours and of the libraries' is one JSON object on standard error."""
    shared: list[structlog.typing.Processor] = [
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    last: list[structlog.typing.Processor] = [structlog.processors.format_exc_info, structlog.processors.JSONRenderer()]
    structlog.configure(processors=[*shared, *last], logger_factory=structlog.PrintLoggerFactory(sys.stderr))
    handler = logging.StreamHandler(sys.stderr)
    remove = structlog.stdlib.ProcessorFormatter.remove_processors_meta
    handler.setFormatter(structlog.stdlib.ProcessorFormatter(foreign_pre_chain=shared, processors=[remove, *last]))
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
