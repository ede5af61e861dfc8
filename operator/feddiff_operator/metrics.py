"""What Prometheus reads. Counters never carry a job's name; states are computed from the indexes at every scrape, so
that what was deleted leaves no series behind.
"""

import platform
from collections import Counter as Tally
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from feddiff_protocol.labels import ACKNOWLEDGE
from feddiff_protocol.plan import Reason

from .watch import resource_of

RECONCILE_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)
API_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
STAGE_BUCKETS = (1, 5, 10, 30, 60, 120, 300, 600, 1200, 1800, 3600, 7200, 14_400, 28_800, 57_600, 86_400)  # to a day


@dataclass(frozen=True, slots=True)
class JobFacts:
    """What a FederatedDiffusionJob is counted by."""

    namespace: str
    name: str
    phase: str
    datasets: frozenset[tuple[str, str]]  # namespace and name of every client's
    uid: str = ""
    mechanism: str = ""
    clients: tuple[tuple[str, int], ...] = ()  # how many have released, are dropped, or are waited for
    progress: tuple[tuple[str, int], ...] = ()  # percent done, by stage

    @property
    def ended(self) -> bool:
        return self.phase in ("Complete", "Failed")


@dataclass(frozen=True, slots=True)
class DatasetFacts:
    """A dataset's budget as its status tells it."""

    namespace: str
    name: str
    unit: str
    delta: str
    limit: str
    reserved: str
    spent: str
    remaining: str
    remaining_pure: str
    consistent: bool
    generation: int
    acknowledged: str

    @property
    def largest_remaining(self) -> float:
        """Largest ε that one more release of whatever mechanism may have; 0 is an exhausted budget."""
        return max(_number(self.remaining), _number(self.remaining_pure))  # NaN stays: nothing is larger

    def may_admit_more_than(self, before: "DatasetFacts") -> bool:
        """Whether a job that waits for budget might get it now and did not before; a mere reservation is no reason,
        or every job would look again for every other's."""
        changed = (self.generation, self.consistent, self.acknowledged)
        more = _number(self.remaining) > _number(before.remaining)
        more_pure = _number(self.remaining_pure) > _number(before.remaining_pure)
        return more or more_pure or changed != (before.generation, before.consistent, before.acknowledged)


def job_facts(body: Mapping[str, Any]) -> JobFacts:
    """The facts of one FederatedDiffusionJob, whatever its spec says; a job without status is Pending."""
    metadata, spec, status = body["metadata"], body.get("spec") or {}, body.get("status") or {}
    datasets = [client.get("dataset") or {} for client in spec.get("clients") or []]
    return JobFacts(
        namespace=metadata.get("namespace", ""),
        name=metadata.get("name", ""),
        phase=str(status.get("phase") or "Pending"),
        datasets=frozenset((dataset.get("namespace", "default"), dataset.get("name", "")) for dataset in datasets),
        uid=str(metadata.get("uid", "")),
        mechanism=str((spec.get("privacy") or {}).get("mechanism", "")),
        clients=_client_states(len(datasets), status),
        progress=tuple((each["stage"], each["percent"]) for each in status.get("stages") or [] if "percent" in each),
    )


def _client_states(num_clients: int, status: Mapping[str, Any]) -> tuple[tuple[str, int], ...]:
    released = str(status.get("clientsSummary", "")).partition("/")[0]
    num_released, num_dropped = int(released) if released.isdecimal() else 0, int(status.get("numDropped", 0))
    waiting = max(0, num_clients - num_released - num_dropped)
    return ("released", num_released), ("dropped", num_dropped), ("waiting", waiting)


def dataset_facts(body: Mapping[str, Any]) -> DatasetFacts:
    """The facts of one PrivateDataset, whatever its status holds so far."""
    metadata, status = body["metadata"], body.get("status") or {}
    promised, held = (body.get("spec") or {}).get("budget") or {}, status.get("budget") or {}
    contradicted = [c for c in status.get("conditions") or [] if c.get("type") == "LedgerConsistent"]
    return DatasetFacts(
        namespace=metadata.get("namespace", ""),
        name=metadata["name"],
        unit=str(promised.get("unit", "image")),
        delta=str(promised.get("delta", "")),
        limit=str(promised.get("epsilon", "")),
        reserved=str(held.get("reserved", "0")),
        spent=str(held.get("spent", "0")),
        remaining=str(held.get("remaining", "")),
        remaining_pure=str(held.get("remainingPure", "")),
        consistent=not any(c.get("status") == "False" for c in contradicted),
        generation=int(metadata.get("generation", 0)),
        acknowledged=str((metadata.get("annotations") or {}).get(ACKNOWLEDGE, "")),
    )


class Metrics:
    """One operator's metrics, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()

        def named(kind: Callable[..., Any], name: str, text: str, labels: tuple[str, ...] = (), **more: Any) -> Any:
            return kind(name, text, labels, namespace="feddiff", registry=self.registry, **more)

        self._reconciles: Histogram = named(
            Histogram,
            "reconcile_duration_seconds",
            "Duration of one look at a job or dataset, by how it ended",
            ("kind", "result"),
            buckets=RECONCILE_BUCKETS,
        )
        self._last_success: Gauge = named(
            Gauge, "last_successful_reconcile_timestamp_seconds", "When a job or dataset was last looked at", ("kind",)
        )
        self._requests: Counter = named(
            Counter, "api_requests", "Requests to the API server; code none: no answer", ("verb", "resource", "code")
        )
        self._request_seconds: Histogram = named(
            Histogram,
            "api_request_duration_seconds",
            "Duration of a request until its answer began; for reads and writes of objects the wait for the rate limit"
            " is part of it",
            ("verb", "resource"),
            buckets=API_BUCKETS,
        )
        self._watch_events: Counter = named(Counter, "watch_events", "Events that the watches brought", ("kind",))
        self._last_event: Gauge = named(
            Gauge, "watch_last_event_timestamp_seconds", "When a watch last brought an event", ("kind",)
        )
        self._leader: Gauge = named(Gauge, "leader", "1 while this replica leads")
        self._refusals: Counter = named(Counter, "privacy_refusals", "Releases that were not admitted", ("reason",))
        for reason in (Reason.PRIVACY_BUDGET_EXCEEDED, Reason.ACCESS_DENIED):
            self._refusals.labels(reason.value)  # from zero on, or Prometheus would not see the first one as a rise
        self._releases: Counter = named(Counter, "privacy_releases", "Releases that were charged; no charge comes back")
        self._stage_seconds: Histogram = named(
            Histogram,
            "stage_duration_seconds",
            "Duration of one attempt of a stage, from its pods' start to its end: succeeded, failed or stopped",
            ("stage", "result"),
            buckets=STAGE_BUCKETS,
        )
        self._queue_seconds: Histogram = named(
            Histogram,
            "queue_wait_seconds",
            "Time from an attempt's creation until its pods started: the cluster's queue and its scheduler",
            ("stage",),
            buckets=STAGE_BUCKETS,
        )
        build: Gauge = named(Gauge, "build_info", "1; what runs is in the labels", ("version", "python", "kopf"))
        build.labels(version("feddiff"), platform.python_version(), version("kopf")).set(1)

    # -- what the operator tells as it happens

    def reconciled(self, kind: str, result: str, seconds: float, wall_clock: float) -> None:
        """One look at an object of `kind` ended: success, conflict, unavailable, timeout or error."""
        self._reconciles.labels(kind, result).observe(seconds)
        if result == "success":
            self._last_success.labels(kind).set(wall_clock)

    def api_request(self, verb: str, path: str, code: str, seconds: float) -> None:
        """One request to the API server was answered, or (code none) was not."""
        resource = resource_of(path)
        self._requests.labels(verb, resource, code).inc()
        self._request_seconds.labels(verb, resource).observe(seconds)

    def watch_event(self, kind: str, wall_clock: float) -> None:
        """A watch brought an event about an object of `kind`."""
        self._watch_events.labels(kind).inc()
        self._last_event.labels(kind).set(wall_clock)

    def led(self, leading: bool) -> None:
        """Whether this replica leads now."""
        self._leader.set(leading)

    def refused(self, reason: str) -> None:
        """A release was not admitted; `reason` is one of the documented ones, never a name or a message."""
        self._refusals.labels(reason).inc()

    def charged(self) -> None:
        """A client's release was charged."""
        self._releases.inc()

    def stage_ended(self, stage: str, result: str, waited_seconds: float, ran_seconds: float) -> None:
        """One attempt of a stage ended: succeeded, failed or stopped."""
        self._queue_seconds.labels(stage).observe(waited_seconds)
        self._stage_seconds.labels(stage, result).observe(ran_seconds)

    # -- what is computed at a scrape

    def queue(self, depth: Callable[[], float], oldest_seconds: Callable[[], float]) -> None:
        """How much waits for a worker, asked for at every scrape."""
        self._gauge("reconcile_queue_depth", "Objects that wait for a worker", depth)
        self._gauge("reconcile_queue_oldest_seconds", "Longest of these waits", oldest_seconds)

    def resync(self, seconds: float) -> None:
        """How often everything is looked at again; what is late is late by this measure."""
        self._gauge("resync_seconds", "Everything is looked at again this often", lambda: seconds)

    def _gauge(self, name: str, text: str, value: Callable[[], float]) -> None:
        Gauge(name, text, namespace="feddiff", registry=self.registry).set_function(value)

    def states(
        self,
        jobs: Callable[[], Iterable[JobFacts]],
        datasets: Callable[[], Iterable[DatasetFacts]],
        silent_seconds: Callable[[], Mapping[str, float]],
        reopened: Callable[[], Mapping[str, int]] = dict,
    ) -> None:
        """Series about what is in the indexes now, and about the watches that fill them."""
        self.registry.register(_States(jobs, datasets, silent_seconds, reopened))

    def exposition(self) -> bytes:
        """Everything in Prometheus' text format."""
        return generate_latest(self.registry)


class _States(Collector):
    def __init__(
        self,
        jobs: Callable[[], Iterable[JobFacts]],
        datasets: Callable[[], Iterable[DatasetFacts]],
        silent_seconds: Callable[[], Mapping[str, float]],
        reopened: Callable[[], Mapping[str, int]],
    ) -> None:
        self._jobs, self._datasets, self._silent_seconds, self._reopened = jobs, datasets, silent_seconds, reopened

    def collect(self) -> Iterator[Metric]:
        yield self._phases()
        yield from self._each_job()
        yield from self._budgets()
        yield self._silence()
        yield self._restarts()

    def _phases(self) -> Metric:
        family = GaugeMetricFamily("feddiff_jobs", "FederatedDiffusionJobs", labels=("namespace", "phase"))
        for (namespace, phase), count in sorted(Tally((job.namespace, job.phase) for job in self._jobs()).items()):
            family.add_metric((namespace, phase), count)
        return family

    def _each_job(self) -> Iterator[Metric]:
        """Jobs by name; of those that have ended only that they are there."""
        info = GaugeMetricFamily(
            "feddiff_job_info",
            "1; a job's facts are in the labels",
            labels=("namespace", "name", "uid", "mechanism", "phase"),
        )
        clients = GaugeMetricFamily(
            "feddiff_clients",
            "Clients of a job in flight: released, dropped or waiting",
            labels=("namespace", "name", "state"),
        )
        progress = GaugeMetricFamily(
            "feddiff_progress_ratio",
            "Share of a stage that is done, of all clients of a job in flight",
            labels=("namespace", "name", "stage"),
        )
        for job in self._jobs():
            info.add_metric((job.namespace, job.name, job.uid, job.mechanism, job.phase), 1)
            for state, count in () if job.ended else job.clients:
                clients.add_metric((job.namespace, job.name, state), count)
            for stage, percent in () if job.ended else job.progress:
                progress.add_metric((job.namespace, job.name, stage), percent / 100)
        yield from (info, clients, progress)

    def _restarts(self) -> Metric:
        family = CounterMetricFamily(
            "feddiff_watch_restarts", "How often watches of a resource were opened again", labels=("resource",)
        )
        restarts: Tally[str] = Tally()
        for path, count in self._reopened().items():
            restarts[resource_of(path)] += count
        for resource, count in sorted(restarts.items()):
            family.add_metric((resource,), count)
        return family

    def _budgets(self) -> Iterator[Metric]:
        datasets = list(self._datasets())
        for part in ("limit", "reserved", "spent", "remaining"):
            family = GaugeMetricFamily(
                f"feddiff_privacy_epsilon_{part}",
                f"ε of a dataset's budget: {part}",
                labels=("namespace", "dataset", "unit", "delta"),
            )
            for facts in datasets:
                labels = (facts.namespace, facts.name, facts.unit, facts.delta)
                value = facts.largest_remaining if part == "remaining" else _number(getattr(facts, part))
                family.add_metric(labels, value)
            yield family
        mismatch = GaugeMetricFamily(
            "feddiff_ledger_mismatch", "1 while a ledger contradicts its account", labels=("namespace", "dataset")
        )
        for facts in datasets:
            mismatch.add_metric((facts.namespace, facts.name), 0 if facts.consistent else 1)
        yield mismatch

    def _silence(self) -> Metric:
        family = GaugeMetricFamily(
            "feddiff_watch_silent_seconds",
            "Seconds since the quietest watch of a resource brought anything, a bookmark included",
            labels=("resource",),
        )
        silent: dict[str, float] = {}
        for path, seconds in self._silent_seconds().items():
            silent[resource_of(path)] = max(seconds, silent.get(resource_of(path), 0.0))
        for resource, seconds in sorted(silent.items()):
            family.add_metric((resource,), seconds)
        return family


def _number(text: str) -> float:
    """NaN for what is no number: a scrape must not fail because of one odd object."""
    try:
        return float(text)
    except ValueError:
        return float("nan")
