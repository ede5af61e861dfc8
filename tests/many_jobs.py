"""Many jobs of two owners each on a simulated platform, and operators whose watches lag behind it."""

import asyncio
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

import batch_objects
from cluster.kubelet import receipt_of
from fake_cluster import Platform, no_sleep, turn
from feddiff_operator.children import Seen, Shelf
from feddiff_operator.cluster import CONFIG_MAP, FDJ, JOB, PDS, POD, PRL, Conflict, Kind
from feddiff_operator.ledger import ClusterLedger
from feddiff_operator.metrics import Metrics
from feddiff_operator.progress import Progresses
from feddiff_operator.reconcile import Reconciler
from feddiff_operator.settings import Settings
from feddiff_protocol.ledger import Entry, Phase, inconsistency
from feddiff_protocol.ledger_objects import account_of, entry_of

Object = dict[str, Any]
START = datetime(2026, 1, 1, tzinfo=UTC)
WORKERS = 8
STAGES = {"release": 2, "train-shared": 1, "train-personal": 2, "sample": 2, "evaluate": 2, "report": 1}  # in one job
Outcome = Callable[[Object, Object], Any]  # how a pod ends, from its Job and its spec; None: it does not yet


class Hospital(Platform):
    """The platform with every object found by its kind, label selectors without a value, merge patches that hold for
    one version, and watches."""

    def __init__(self, num_jobs: int, num_datasets: int = 3, outcome: Outcome | None = None, **spec: Any) -> None:
        self._by_kind: dict[str, dict[tuple[str, str], Object]] = {}
        self.watches: list[Watch] = []
        self.num_lives = 0  # of operators
        self.now = START
        super().__init__(self._ending)
        self.ends = outcome or (lambda child, spec: 0)
        for number in range(num_datasets):
            for client in "ab":
                self.put(PDS, dataset(client, number))
        for number in range(num_jobs):
            self.put(FDJ, job(number, number % num_datasets, **spec))

    def _ending(self, pod: Object, child: Object) -> tuple[int, str] | None:
        name = pod["metadata"]["labels"]["batch.kubernetes.io/job-name"]
        data = self.objects["ConfigMap", pod["metadata"]["namespace"], name]["data"]
        spec = json.loads(data["spec.json"])
        code = self.ends(child, spec)
        return None if code is None else (code, "" if code else receipt_of(spec))

    def clock(self) -> datetime:
        return self.now

    # -- the API server

    def put(self, kind: Kind, obj: Object) -> Object:
        written = super().put(kind, obj)
        self._by_kind.setdefault(kind.name, {})[_place(written)] = written
        for watch in self.watches:
            watch.late.append((kind, written, True))
        return written

    def remove(self, kind: Kind, namespace: str, name: str) -> None:
        super().remove(kind, namespace, name)
        if (gone := self._by_kind[kind.name].pop((namespace, name), None)) is not None:
            for watch in self.watches:
                watch.late.append((kind, gone, False))

    def peek(self, kind: Kind) -> list[Object]:
        return list(self._by_kind.get(kind.name, {}).values())

    async def list(self, kind: Kind, namespace: str | None, labels: str = "") -> "list[Object]":
        if "=" in labels or not labels:
            return await super().list(kind, namespace, labels)
        return [each for each in await super().list(kind, namespace) if labels in each["metadata"].get("labels", {})]

    async def patch(self, kind: Kind, namespace: str, name: str, body: "Object | list[Object]") -> Object:
        version = body.get("metadata", {}).get("resourceVersion") if isinstance(body, dict) else None
        stands = self.objects.get((kind.name, namespace, name))
        if version and stands and stands["metadata"]["resourceVersion"] != version:
            await turn()
            raise Conflict(name)
        return await super().patch(kind, namespace, name, body)

    def _control(self, job: Object, moment: str) -> None:
        if not {"Complete", "Failed"} & {each["type"] for each in job.get("status", {}).get("conditions", [])}:
            super()._control(job, moment)

    # -- what has become of it

    def entries(self) -> "list[Entry]":
        return [entry_of(each) for each in self.peek(PRL)]

    def phases(self) -> Counter[str]:
        return Counter(each.get("status", {}).get("phase", "") for each in self.peek(FDJ))


class Watch(Seen):
    """The children as one operator sees them: all that there was when it began, and what has been delivered since."""

    def __init__(self, hospital: Hospital) -> None:
        super().__init__()
        self.late: list[tuple[Kind, Object, bool]] = []  # what the watches have not brought yet
        self.shelves: Mapping[Kind, Shelf[Any]]
        self.shelves = {FDJ: self.jobs, PDS: self.datasets, PRL: self.releases, JOB: self.child_jobs}
        self.shelves = {**self.shelves, POD: self.child_pods}
        for kind, shelf in self.shelves.items():
            for each in hospital.peek(kind):
                shelf.put(each, 1)
        hospital.watches = [self]
        hospital.num_lives += 1

    def deliver(self) -> None:
        for kind, obj, there in self.late:
            if shelf := self.shelves.get(kind):
                shelf.put(obj, 1) if there else shelf.take(obj)
        self.late.clear()


class Quiet:
    """Takes note of no event."""

    def record(self, regarding: Object, reason: str, message: str, warning: bool = False) -> None:
        pass


class Operator:
    """One operator's life, from what the API server holds when it begins."""

    def __init__(self, hospital: Hospital, cluster: Any = None) -> None:
        self.hospital, self.seen = hospital, Watch(hospital)
        cluster = cluster or hospital
        ledger = ClusterLedger(cluster, hospital.clock, no_sleep)
        settings = Settings(trainer_image="trainer:test")
        stages = Progresses(hospital.clock)
        self.reconciler = Reconciler(cluster, ledger, settings, Quiet(), Metrics(), hospital.clock, stages)  # type: ignore[arg-type]

    async def go_on(self, until: Callable[[], bool]) -> None:
        """Round by round until something is so. Between two of them the platform moves, and the watches catch up."""
        while not until():
            await self.one_round()
            self.seen.deliver()
            self.hospital.live(self.hospital.now)
            self.hospital.now += timedelta(seconds=1)
            assert self.hospital.now - START < timedelta(minutes=5), self.hospital.phases()

    async def one_round(self) -> None:
        """Every job is looked at, eight side by side, until it waits for something; then every dataset."""
        keys = iter([*self._jobs(), *((PDS, *_place(each)) for each in self.hospital.peek(PDS))])
        workers = [asyncio.create_task(self._work(keys)) for _ in range(WORKERS)]
        try:
            await asyncio.gather(*workers)
        finally:  # one of them was killed: the others with it, in the middle of whatever they do
            for worker in workers:
                worker.cancel()
            await asyncio.gather(*workers, return_exceptions=True)

    def _jobs(self) -> Iterator[tuple[Kind, str, str]]:
        for each in self.hospital.peek(FDJ):
            if each.get("status", {}).get("phase") not in ("Complete", "Failed"):
                yield (FDJ, *_place(each))

    async def _work(self, keys: Iterator[tuple[Kind, str, str]]) -> None:
        for kind, namespace, name in keys:
            if kind == PDS:
                await self.reconciler.dataset(namespace, name, self.seen)
            else:
                while await self.reconciler.job(namespace, name, self.seen) == 0.0:
                    pass


def dataset(client: str, number: int) -> Object:
    """An owner's dataset with a budget for everything."""
    spec = batch_objects.dataset(client, budget={"epsilon": "100000", "delta": "1e-3"}).spec
    metadata = {"namespace": f"clinic-{client}-{number}", "name": "scans"}
    return _object("PrivateDataset", metadata, spec)


def job(number: int, dataset_number: int, **spec: Any) -> Object:
    clients = [
        {"name": each, "dataset": {"namespace": f"clinic-{each}-{dataset_number}", "name": "scans"}} for each in "ab"
    ]
    spec = {"diffusion": {"steps": 50, "betaStart": "0.002", "betaEnd": "0.4"}, **spec}  # a short schedule: quick
    metadata = {"namespace": "research", "name": f"job-{number}"}
    return _object("FederatedDiffusionJob", metadata, batch_objects.job(clients, **spec).spec)


def _object(kind: str, metadata: Object, spec: Any) -> Object:
    dumped = spec.model_dump(mode="json", by_alias=True, exclude_none=True)
    return {"apiVersion": "feddiff.dev/v1alpha1", "kind": kind, "metadata": metadata, "spec": dumped}


def _place(obj: Object) -> tuple[str, str]:
    return obj["metadata"]["namespace"], obj["metadata"]["name"]


def made_twice(hospital: Hospital) -> list[tuple[str, ...]]:
    """Attempts, by their labels, that have more than one Job or ConfigMap."""
    named = ("job-uid", "stage", "client", "attempt")
    made = Counter(
        (kind.name, *(each["metadata"]["labels"].get(f"feddiff.dev/{name}", "") for name in named))
        for kind in (JOB, CONFIG_MAP)
        for each in hospital.peek(kind)
    )
    return [key for key, times in made.items() if times > 1]


def books_in_order(hospital: Hospital, num_charged: int) -> None:
    """Every ledger agrees with its account, and this many releases are charged, each with its manifest."""
    entries = hospital.entries()
    charged = [entry for entry in entries if entry.phase is Phase.CHARGED and len(entry.manifest_sha256) == 64]
    assert len(charged) == len(entries) == len({entry.name for entry in entries}) == num_charged
    for found in hospital.peek(PDS):
        namespace = found["metadata"]["namespace"]
        own = [entry_of(each) for each in hospital.peek(PRL) if each["metadata"]["namespace"] == namespace]
        account = account_of(found["status"])
        assert account is not None and not account.pending and inconsistency(account, own) is None
