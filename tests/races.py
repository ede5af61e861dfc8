"""Races for one budget on a real API server: a hundred jobs for seven places, and what came of them.

Whoever admits is a process of its own: operators that elect a leader, which is frozen in the middle of its work for
longer than its Lease; operators that all lead, as if there were no Lease at all; or two ledgers alone, which is quick.
"""

import asyncio
import contextlib
import itertools
import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from decimal import Decimal
from math import sqrt
from pathlib import Path
from typing import Any

from cluster.kubernetes import ControlPlane
from feddiff_operator.cluster import FDJ, LEASE, PDS, PRL, Cluster
from feddiff_protocol import ledger
from feddiff_protocol.accountant import charge_mu_squared, epsilon_of
from feddiff_protocol.ledger import Entry, Phase
from feddiff_protocol.ledger_objects import account_of, entry_of

Object = dict[str, Any]
NUM_PLACES, NUM_JOBS = 7, 100
EPSILON, DELTA = "1", Decimal("1e-5")
CHARGE = charge_mu_squared(EPSILON, DELTA)
HOLDS_SEVEN = f"{epsilon_of(sqrt((NUM_PLACES + 0.5) * float(CHARGE)), float(DELTA)):.6f}"
LEASE_SECONDS = 3
LONG_LEASE_SECONDS = 600  # of operators that all lead: nobody contests it, and a busy machine must not end it
PATIENCE_SECONDS = 240
RACER = Path(__file__).parent / "racer.py"


@dataclass(frozen=True)
class Race:
    """A dataset that holds seven jobs, and a hundred jobs that want it."""

    clinic: str  # a namespace
    name: str  # of the dataset
    research: str  # the jobs' namespace

    def dataset(self) -> Object:
        return {
            "apiVersion": "feddiff.dev/v1alpha1",
            "kind": "PrivateDataset",
            "metadata": {"name": self.name, "namespace": self.clinic},
            "spec": {
                "source": {"format": "npz", "path": "train.npz", "volumeClaim": "scans"},
                "image": {"channels": 1, "height": 8, "width": 8},
                "classes": {"count": 1, "records": [9]},
                "budget": {"epsilon": HOLDS_SEVEN, "delta": str(DELTA)},
                "access": [{"namespace": self.research}],
                "store": {"uri": "s3://clinic/feddiff", "secretName": "own-store"},
                "federation": {"uri": "s3://federation/jobs", "secretName": "federation-store"},
            },
        }

    def jobs(self) -> list[Object]:
        return [self._job(number) for number in range(NUM_JOBS)]

    def _job(self, number: int) -> Object:
        clips = {"clipNorm": "4", "momentClipNorm": "2"}
        return {
            "apiVersion": "feddiff.dev/v1alpha1",
            "kind": "FederatedDiffusionJob",
            "metadata": {"name": f"{self.name}-{number}", "namespace": self.research},
            "spec": {
                "clients": [{"name": "c", "dataset": {"namespace": self.clinic, "name": self.name}}],
                "privacy": {"mechanism": "summary", "epsilon": EPSILON, "delta": str(DELTA), **clips},
                "diffusion": {"steps": 50, "betaStart": "0.002", "betaEnd": "0.4", "splitSigma": "1"},
                "store": {"uri": "s3://federation/jobs", "secretName": "federation-trainer"},
            },
        }


@dataclass(frozen=True)
class Books:
    """One read of a race's ledger: the dataset, and its entries."""

    dataset: Object
    entries: tuple[Entry, ...]

    @property
    def fault(self) -> str:
        """What no later write can mend, or nothing."""
        held = [entry for entry in self.entries if entry.phase is not Phase.RETURNED]
        if len(held) > NUM_PLACES:
            return f"{self.dataset['metadata']['name']}: {len(held)} jobs hold a budget for {NUM_PLACES}"
        conditions = (self.dataset.get("status") or {}).get("conditions") or []
        return next((each["message"] for each in conditions if each["reason"] == "LedgerMismatch"), "")

    @property
    def complete(self) -> bool:
        """Seven are charged, nothing else ever was, and the account says exactly that."""
        account = account_of(self.dataset.get("status"))
        if account is None or account.pending or account.num_entries != NUM_PLACES:
            return False
        counted = sum((each.mu_squared for each in account.charges), Decimal(0))
        agree = ledger.inconsistency(account, self.entries) is None
        return agree and counted == NUM_PLACES * CHARGE and self._phases == [Phase.CHARGED] * NUM_PLACES

    @property
    def _phases(self) -> list[Phase]:
        return [entry.phase for entry in self.entries]


async def books_of(cluster: Cluster, races: Sequence[Race]) -> list[Books]:
    """Every race's ledger: datasets first, entries second."""
    found: list[Books] = []
    for clinic in sorted({race.clinic for race in races}):
        names = {race.name for race in races if race.clinic == clinic}
        datasets = [each for each in await cluster.list(PDS, clinic) if each["metadata"]["name"] in names]
        entries = [(each["spec"]["dataset"]["name"], entry_of(each)) for each in await cluster.list(PRL, clinic)]
        for each in datasets:
            name = each["metadata"]["name"]
            found.append(Books(each, tuple(entry for dataset, entry in entries if dataset == name)))
    return found


# ---- Operators ----------------------------------------------------------------------------------------------------


@dataclass
class Replica:
    """One operator's process."""

    process: subprocess.Popen[bytes]
    lease: str
    log: Path

    @property
    def identities(self) -> set[str]:
        """Under which it has led so far."""
        lines = [json.loads(line) for line in self.log.read_text().splitlines() if line.startswith("{")]
        return {line["identity"] for line in lines if line.get("event") == "leading"}


@contextlib.contextmanager
def replicas(plane: ControlPlane, folder: Path, races: Sequence[Race], all_lead: bool) -> Iterator[list[Replica]]:
    """Two operators with one Lease, or with one each."""
    research = races[0].research
    command = [sys.executable, "-m", "feddiff_operator", "--trainer-image=trainer:test", "--port=0"]
    command += [f"--namespace={research}"]
    command += [f"--namespace={clinic}" for clinic in sorted({race.clinic for race in races})]
    command += [f"--lease-namespace={research}", f"--lease-seconds={LONG_LEASE_SECONDS if all_lead else LEASE_SECONDS}"]
    command += ["--api-qps=5000", "--api-burst=5000"]  # more workers than 8 would keep a busy leader from its Lease
    leases = ["operator-0", "operator-1" if all_lead else "operator-0"]
    with contextlib.ExitStack() as stack:
        yield [
            stack.enter_context(_replica(plane, [*command, f"--lease-name={lease}"], lease, folder / f"{number}.log"))
            for number, lease in enumerate(leases)
        ]


@contextlib.contextmanager
def _replica(plane: ControlPlane, command: list[str], lease: str, path: Path) -> Iterator[Replica]:
    environment = {**os.environ, "KUBECONFIG": str(plane.user(path.stem, ["system:masters"]))}
    with path.open("wb") as log:
        process = subprocess.Popen(command, env=environment, stderr=log)
    try:
        yield Replica(process, lease, path)
    finally:
        process.send_signal(signal.SIGCONT)
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=60)


class OperatorRaces:
    """Races that two operators decide, under way."""

    def __init__(self, cluster: Cluster, races: Sequence[Race], operators: Sequence[Replica]) -> None:
        self.cluster, self.races, self.operators = cluster, races, operators

    async def offer(self) -> None:
        """The datasets are there, and every job, the first ones of all races first."""
        for race in self.races:
            await self.cluster.create(PDS, race.dataset())
        documents = iter([each for some in zip(*(race.jobs() for race in self.races), strict=True) for each in some])

        async def lane() -> None:
            for each in documents:
                await self.cluster.create(FDJ, each)

        await asyncio.gather(*(lane() for _ in range(8)))

    async def all_lead(self) -> bool:
        return await self._leaders() == list(self.operators)

    async def depose(self) -> None:
        """The leader is frozen while it admits, until another one has taken its Lease and gone on; then it wakes."""
        old = await self._admitting_leader()
        old.process.send_signal(signal.SIGSTOP)
        before = await self._ledgers()

        async def taken_over() -> bool:
            return old not in await self._leaders()

        async def gone_on() -> bool:
            return await self._ledgers() != before or all(each.complete for each in await self._books())

        await self.until(taken_over, "another leader")
        await self.until(gone_on, "a change by another leader")
        old.process.send_signal(signal.SIGCONT)

    async def _admitting_leader(self) -> Replica:
        leaders: list[Replica] = []

        async def one_admits() -> bool:
            nonlocal leaders
            leaders = await self._leaders()
            return len(leaders) == 1 and any(entries for _, entries in await self._ledgers())

        await self.until(one_admits, "a leader that admits")
        return leaders[0]

    async def fault(self) -> str:
        """What is wrong with any of the ledgers as soon as something is; nothing once all races have ended well."""
        found = ""

        async def over() -> bool:
            nonlocal found
            books = await self._books()
            found = next((each.fault for each in books if each.fault), "")
            return bool(found) or (all(each.complete for each in books) and await self._as_the_books_say(books))

        await self.until(over, "seven winners and 93 losers in every race", pause=1.0)
        return found

    async def _as_the_books_say(self, books: Sequence[Books]) -> bool:
        """Whether exactly the jobs with an entry hold their budget, and all others have failed for want of it."""
        charged = {entry.job_uid for each in books for entry in each.entries}
        jobs = await self.cluster.list(FDJ, self.races[0].research)
        return all(_ended_as(each, each["metadata"]["uid"] in charged) for each in jobs)

    async def until(self, good: Callable[[], Awaitable[bool]], what: str, pause: float = 0.1) -> None:
        try:
            async with asyncio.timeout(PATIENCE_SECONDS):
                while not await good():
                    for each in self.operators:
                        assert each.process.poll() is None, each.log.read_text()[-3000:]
                    await asyncio.sleep(pause)
        except TimeoutError:
            logs = "\n".join(each.log.read_text()[-2000:] for each in self.operators)
            raise AssertionError(f"never came: {what}\noperators: {logs}") from None

    async def _leaders(self) -> list[Replica]:
        held = [await self.cluster.get(LEASE, self.races[0].research, each.lease) for each in self.operators]
        holders = [((each or {}).get("spec") or {}).get("holderIdentity") for each in held]
        return [each for each, holder in zip(self.operators, holders, strict=True) if holder in each.identities]

    async def _books(self) -> list[Books]:
        return await books_of(self.cluster, self.races)

    async def _ledgers(self) -> list[tuple[Object, tuple[Entry, ...]]]:
        """Every account, and its entries."""
        return [((each.dataset.get("status") or {}).get("account") or {}, each.entries) for each in await self._books()]


def _ended_as(job: Object, wins: bool) -> bool:
    conditions = {each["type"]: each for each in (job.get("status") or {}).get("conditions", [])}
    if not conditions:
        return False
    held, failed = conditions["BudgetReserved"]["status"] == "True", conditions["Failed"]
    lost = failed["status"] == "True" and failed["reason"] == "PrivacyBudgetExceeded"
    return held and failed["status"] == "False" if wins else lost and not held


async def race_operators(plane: ControlPlane, folder: Path, num_races: int, *, all_lead: bool = False) -> str:
    """What is wrong after so many races side by side, or nothing. Leaders are deposed twice, unless all lead."""
    research, clinic = plane.namespace("research"), plane.namespace("clinic")
    races = [Race(clinic, f"scans-{number}", research) for number in range(num_races)]
    with replicas(plane, folder, races, all_lead) as operators:
        async with await Cluster.from_kubeconfig(str(plane.kubeconfig), 5000, 5000) as cluster:
            under_way = OperatorRaces(cluster, races, operators)
            if all_lead:
                await under_way.until(under_way.all_lead, "two leaders")
            async with asyncio.TaskGroup() as group:
                group.create_task(under_way.offer())
                for _ in range(0 if all_lead else 2):
                    await under_way.depose()
            return await under_way.fault()


# ---- Ledgers alone ------------------------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def racers(plane: ControlPlane, careless: bool) -> AsyncIterator[list[asyncio.subprocess.Process]]:
    """Two processes that each admit what they are told to."""
    pipes = {"stdin": asyncio.subprocess.PIPE, "stdout": asyncio.subprocess.PIPE, "limit": 1 << 20}
    command = [sys.executable, str(RACER), str(plane.kubeconfig), *(["careless"] if careless else [])]
    running = [await asyncio.create_subprocess_exec(*command, **pipes) for _ in range(2)]
    try:
        for each in running:  # each says so once it is ready
            await _answer(each)
        yield running
    finally:
        for each in running:
            assert each.stdin is not None
            each.stdin.close()
            await each.wait()


async def _answer(racer: asyncio.subprocess.Process) -> Any:
    assert racer.stdout is not None
    async with asyncio.timeout(PATIENCE_SECONDS):
        line = await racer.stdout.readline()
    assert line, "a racer has ended"
    return json.loads(line)


async def race_ledgers(plane: ControlPlane, num_races: int, *, careless: bool = False) -> str:
    """What is wrong after so many races one after the other, or nothing; half of the jobs are either process's."""
    async with (
        await Cluster.from_kubeconfig(str(plane.kubeconfig), 5000, 5000) as cluster,
        racers(plane, careless) as running,
    ):
        for number in range(num_races):
            race = Race(plane.namespace("clinic"), "scans", "research")
            await cluster.create(PDS, race.dataset())
            if fault := await _race_of_ledgers(cluster, race, running):
                return f"race {number}: {fault}"
    return ""


async def _race_of_ledgers(cluster: Cluster, race: Race, running: Sequence[asyncio.subprocess.Process]) -> str:
    for index, each in enumerate(running):
        assert each.stdin is not None
        each.stdin.write(json.dumps(race.jobs()[index :: len(running)]).encode() + b"\n")
    admitted = list(itertools.chain.from_iterable([await _answer(each) for each in running]))
    (books,) = await books_of(cluster, [race])
    if books.fault:
        return books.fault
    if len(admitted) != NUM_PLACES or set(admitted) != {entry.job_uid for entry in books.entries}:
        return f"{len(admitted)} were admitted, {len(books.entries)} have entries"
    return "" if books.complete else f"the account is not exact: {books.dataset.get('status')}"
