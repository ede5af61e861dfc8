"""An operator that is killed at any one of its calls: the next one carries the job to the same end, and the ledger
holds what it would have held."""

import asyncio
import contextlib
import itertools
import json
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any

import aiohttp
import pytest

from cluster.kubelet import Kubelet, receipt_of
from cluster.kubernetes import ControlPlane
from cluster.proxy import Call, Death, Life, Proxy
from cluster.warm import Warm
from feddiff_operator.cluster import CONFIG_MAP, EVENT, FDJ, JOB, LEASE, PDS, PRL, SERVICE, Cluster
from feddiff_protocol.accountant import total_charge
from feddiff_protocol.layout import release_name
from feddiff_protocol.ledger import inconsistency
from feddiff_protocol.ledger_objects import account_of, entry_of

Object = dict[str, Any]
LANES = 6  # jobs side by side, each with an operator of its own
REST_SECONDS = 1.0  # an operator that asks for nothing so long has nothing to do
PATIENCE_SECONDS = 900
LEAST_WRITES, MOST_WRITES, LEAST_CALLS = 40, 100, 100  # of a job's life
ENTRY_WRITES = 2 * 4  # each client's entry is created, then Reserved, Charged, and has its manifest


def of_lease(call: Call) -> bool:
    return f"/{LEASE.plural}" in call.path


def every(call: Call) -> bool:
    return True


def writing(call: Call) -> bool:
    """Whether it is part of a job's life: Leases and Events come whenever they come."""
    courtesy = of_lease(call) or call.path.endswith(f"/{EVENT.plural}")
    return call.method != "GET" and "dryRun" not in call.query and not courtesy


def changing(call: Call) -> bool:
    """Whether it was such a write, and took place: what is there already, say, is not created again."""
    return writing(call) and call.done


def releasing(call: Call) -> bool:
    """A release begins."""
    return creating_job(call) and call.body["metadata"]["labels"]["feddiff.dev/stage"] == "release"


def reserving(call: Call) -> bool:
    """The account gets its pending reservation; the entry is still to come."""
    status = call.body.get("status", {}) if writing(call) and call.path.endswith("/status") else {}
    return call.method == "PUT" and PDS.plural in call.path and bool(status["account"]["pending"])


@dataclass
class Lab:
    """What the runs share: operators that start at once, connections, and the kubelet of all their pods."""

    warm: Warm
    session: aiohttp.ClientSession
    kubelet: Kubelet

    @property
    def cluster(self) -> Cluster:
        return self.kubelet.cluster


@contextlib.asynccontextmanager
async def laboratory(control_plane: ControlPlane, mutant: str = "") -> AsyncIterator[Lab]:
    connector = aiohttp.TCPConnector(ssl=control_plane.administrator, limit=0)
    timeout, base = aiohttp.ClientTimeout(total=None), f"https://{control_plane.address}:6443"
    async with (
        aiohttp.ClientSession(base, connector=connector, timeout=timeout, auto_decompress=False) as session,
        await Cluster.from_kubeconfig(str(control_plane.kubeconfig), 1000, 1000) as cluster,
    ):
        kubelet = Kubelet(cluster)
        async with asyncio.TaskGroup() as tasks:
            following = tasks.create_task(kubelet.follow(session))
            with Warm(mutant) as warm:
                yield Lab(warm, session, kubelet)
            following.cancel()


async def run(lab: Lab, world: Any, deaths: Iterable[Death] = ()) -> Proxy:
    """One job's whole life, until its operator has nothing more to do. Each life of the operator's ends with the next
    of `deaths`, if that comes at all."""
    objects = [*(world.dataset(clinic) for clinic in world.clinics), world.job()]
    await world.apply(lab.cluster, *objects)
    async with Proxy(lab.session) as proxy, asyncio.TaskGroup() as tasks:
        ended = tasks.create_task(world.until(lab.cluster, has_ended, seconds=PATIENCE_SECONDS))
        for number, death in enumerate(itertools.chain(deaths, itertools.repeat(None))):
            if await live(lab, world, proxy, number, death, ended):
                break
            assert proxy.life.dead, f"it died of itself: {world.log()}"
    return proxy


def has_ended(job: Object) -> bool:
    return (job.get("status") or {}).get("phase") in ("Complete", "Failed")


async def live(
    lab: Lab, world: Any, proxy: Proxy, number: int, death: Death | None, ended: "asyncio.Task[Object]"
) -> bool:
    """Whether an operator's life ended with its work. A Lease of its own spares it the wait for its predecessor's."""
    begun = len(proxy.calls)
    flags = [*world.flags, f"--lease-name=life-{number}", "--api-qps=500", "--api-burst=500"]
    process = lab.warm.operator(flags, proxy.kubeconfig(world.folder), world.folder / "operator.log")
    proxy.life = Life(process.kill, death)
    dead = asyncio.create_task(process.ended())
    done = asyncio.create_task(at_rest(proxy, begun, ended))
    try:
        await asyncio.wait([dead, done], return_when=asyncio.FIRST_COMPLETED)
        return not dead.done()
    finally:
        done.cancel()
        process.kill()
        await dead
        process.close()


async def at_rest(proxy: Proxy, begun: int, ended: "asyncio.Task[Object]") -> None:
    """The job has ended, and the operator that began at this call leads and asks for nothing any more."""
    await asyncio.shield(ended)
    while True:
        number = len(proxy.calls)
        await asyncio.sleep(REST_SECONDS)
        leads = any(of_lease(call) and call.method == "POST" and call.done for call in proxy.calls[begun:])
        if leads and all(map(of_lease, proxy.calls[number:])):
            return


# ---- What must be so afterwards ----------------------------------------------------------------------------------


async def faults(lab: Lab, world: Any, proxy: Proxy) -> list[str]:
    """What is wrong with a job that has ended, its children, its ledgers, and the order of what was done."""
    job = await lab.cluster.get(FDJ, world.research, "job")
    assert job is not None
    uid = job["metadata"]["uid"]
    return [
        *of_status(job),
        *of_children(await children(lab, world)),
        *of_pods(lab, uid),
        *[
            fault
            for name, clinic in zip("ab", world.clinics, strict=True)
            for fault in await of_ledger(lab, clinic, uid, name)
        ],
        *of_order(proxy.calls),
    ]


def of_status(job: Object) -> Iterator[str]:
    status = job["status"]
    conditions = {each["type"]: (each["status"], each["reason"]) for each in status["conditions"]}
    wanted = {
        **{name: ("True", name) for name in ("Accepted", "BudgetReserved", "Released", "SharedTrained")},
        **{name: ("True", name) for name in ("PersonalTrained", "Evaluated", "Complete")},
        **{name: ("False", "Finished") for name in ("Suspended", "Failed")},
    }
    if conditions != wanted:
        yield f"conditions: {conditions}"
    said = (status["counted"], status["dropped"], status["clientsSummary"], status["trainer"], status["progress"])
    if said != (["a", "b"], [], "2/2", "2/2", "100 %"):
        yield f"status: {said}"


async def children(lab: Lab, world: Any) -> Counter[tuple[str, ...]]:
    """How many objects there are of each kind, stage, client and attempt."""
    named = [f"feddiff.dev/{name}" for name in ("stage", "client", "attempt")]
    places = [(kind, place) for kind in (JOB, CONFIG_MAP, SERVICE) for place in (world.research, *world.clinics)]
    found = [(kind, each) for kind, place in places for each in await lab.cluster.list(kind, place, JOB_UID)]
    return Counter((kind.name, *(each["metadata"]["labels"].get(name, "") for name in named)) for kind, each in found)


JOB_UID = "feddiff.dev/job-uid"
OWNERS = [(stage, client) for stage in ("release", "train-personal", "sample", "evaluate") for client in "ab"]
STAGES = [*OWNERS, ("train-shared", ""), ("report", "")]
CHILDREN = Counter((kind.name, *stage, "1") for kind in (JOB, CONFIG_MAP) for stage in STAGES)
CHILDREN["Service", "train-shared", "", "1"] = 1


def of_children(found: Counter[tuple[str, ...]]) -> Iterator[str]:
    yield from (f"too much: {key} × {times}" for key, times in (found - CHILDREN).items())
    yield from (f"missing: {key} × {times}" for key, times in (CHILDREN - found).items())


def of_pods(lab: Lab, uid: str) -> Iterator[str]:
    """Every stage was told once what to do; each of the two ranks of train-shared is one."""
    for stage, client in STAGES:
        told = [spec for spec in lab.kubelet.specs[f"{stage}/{client}"] if spec["job"]["uid"] == uid]
        if [spec["attempt"] for spec in told] != [1] * (1 + (stage == "train-shared")):
            yield f"{stage} of {client or 'the job'} ran {len(told)} times"


async def of_ledger(lab: Lab, clinic: str, uid: str, client: str) -> list[str]:
    """One entry, charged, with the manifest that left; and an account that is the sum of its entries."""
    dataset = await lab.cluster.get(PDS, clinic, "scans")
    assert dataset is not None
    entries = [entry_of(each) for each in await lab.cluster.list(PRL, clinic)]
    told = [spec for spec in lab.kubelet.specs[f"release/{client}"] if spec["job"]["uid"] == uid]
    wanted = [(release_name(uid, client, dataset["metadata"]["uid"]), "Charged", manifest_of(told[0]))] if told else []
    held = [(entry.name, entry.phase.value, entry.manifest_sha256) for entry in entries]
    account = account_of(dataset["status"])
    found = [f"entries of {client}: {held}, expected {wanted}"] if held != wanted else []
    if account is None or account.pending or inconsistency(account, entries):
        return [*found, f"account of {client}: {account}"]
    if total_charge(account.charges) != total_charge(entry.charge for entry in entries):
        found.append(f"sum of {client}: {account.charges}")
    spent, reserved = dataset["status"]["budget"]["spent"], dataset["status"]["budget"]["reserved"]
    if (Decimal(spent), Decimal(reserved)) != (10, 0):
        found.append(f"budget of {client}: spent {spent}, reserved {reserved}")
    return found


def manifest_of(spec: Object) -> str:
    return str(json.loads(receipt_of(spec))["outputs"]["manifest"])


def of_order(calls: list[Call]) -> Iterator[str]:
    """No release began before its charge was written; whatever was asked for, it was under one name."""
    charged = {call.body["spec"]["client"]: call.answered_at for call in reversed(calls) if charging(call)}
    names: dict[tuple[str, str], set[str]] = {}
    for number, call in enumerate(calls):
        if not creating_job(call):
            continue
        labels = call.body["metadata"]["labels"]
        key = labels["feddiff.dev/stage"], labels.get("feddiff.dev/client", "")
        names.setdefault(key, set()).add(call.body["metadata"]["name"])
        if key[0] == "release" and charged.get(key[1], len(calls)) > number:
            yield f"the release of {key[1]} began before its charge"
    yield from (f"{key}: under {len(each)} names" for key, each in names.items() if len(each) > 1)


def charging(call: Call) -> bool:
    return call.method == "PUT" and PRL.plural in call.path and call.done and call.body["status"]["phase"] == "Charged"


def creating_job(call: Call) -> bool:
    return call.method == "POST" and writing(call) and call.path.endswith(f"/{JOB.plural}")


# ---- The sweep ---------------------------------------------------------------------------------------------------


@pytest.mark.timeout(PATIENCE_SECONDS)
def test_killed_after_each_of_its_writes_it_spends_nothing_twice(
    control_plane: ControlPlane, new_world: Callable[[], Any]
) -> None:
    """Between two writes nothing changes but memory, so these are all states in which an operator can find a job."""

    async def story() -> None:
        deaths = [Death(1, True, changing) for _ in range(MOST_WRITES)]
        async with laboratory(control_plane) as lab:
            world = new_world()
            proxy = await run(lab, world, deaths)
            assert await faults(lab, world, proxy) == []
        num_deaths = sum(death.call is not None for death in deaths)
        print(f"{num_deaths} deaths")
        assert LEAST_WRITES < num_deaths == sum(map(changing, proxy.calls)) < MOST_WRITES
        assert sum(PRL.plural in death.call.path for death in deaths if death.call) == ENTRY_WRITES

    asyncio.run(story())


MUTANTS = {
    "a child's name is drawn anew in every life": (
        releasing,
        "under 2 names",
        """
import os
from feddiff_operator import observe, workloads
named = workloads.child_name
workloads.child_name = observe.child_name = lambda *key: f"{named(*key)}-{os.getpid()}"
""",
    ),
    "an entry's name is drawn anew in every life": (
        reserving,
        "entries of",
        """
import os
from feddiff_operator import ledger
from feddiff_protocol import ledger as requests
named = ledger.release_name
ledger.release_name = requests.release_name = lambda *key: f"{named(*key)[:-8]}{os.getpid():08x}"
""",
    ),
    "a release begins before its charge": (
        releasing,
        "began before its charge",
        """
from feddiff_operator.reconcile import ChargeReservation, Reconciler, Stage, Start
carry_out = Reconciler._carry_out
async def hastily(self, scene, decision, observed, ledgers):
    for action in decision.actions:
        if isinstance(action, ChargeReservation):
            await self._start(scene, Start(Stage.RELEASE, action.client, 1), observed, ledgers)
    return await carry_out(self, scene, decision, observed, ledgers)
Reconciler._carry_out = hastily
""",
    ),
}


@pytest.mark.timeout(PATIENCE_SECONDS)
@pytest.mark.parametrize(("moment", "words", "mutant"), MUTANTS.values(), ids=MUTANTS)
def test_a_broken_operator_is_found_out(
    control_plane: ControlPlane, new_world: Callable[[], Any], moment: Callable[[Call], bool], words: str, mutant: str
) -> None:
    async def story() -> None:
        async with laboratory(control_plane, mutant) as lab:
            world, death = new_world(), Death(1, True, moment)
            proxy = await run(lab, world, [death])
            assert death.call
            assert words in " ".join(await faults(lab, world, proxy))

    asyncio.run(story())


@dataclass
class Sweep:
    """Single deaths before every call and after every write, one job for each, until jobs are through before their
    deaths come. After a read is as before it: nothing has changed."""

    lab: Lab
    new_world: Callable[[], Any]
    num_points: int = 0
    ended: set[bool] = field(default_factory=set)  # whether there are no more calls before, or after which to die

    async def __call__(self) -> list[str]:
        """What went wrong, each with its crash point."""
        found: list[str] = []
        points = itertools.chain.from_iterable(
            (Death(at, False, every), Death(at, True, changing)) for at in itertools.count(1)
        )

        async def lane() -> None:
            for death in points:
                if death.answered not in self.ended:
                    found.extend(await self._point(death))
                elif len(self.ended) == 2:
                    return

        async with asyncio.TaskGroup() as lanes:
            for _ in range(LANES):
                lanes.create_task(lane())
        return found

    async def _point(self, death: Death) -> list[str]:
        world = await asyncio.to_thread(self.new_world)
        proxy = await run(self.lab, world, [death])
        if death.call is None:
            self.ended.add(death.answered)
        else:
            self.num_points += 1
        found = await faults(self.lab, world, proxy)
        print(f"{'after' if death.answered else 'before'} call {death.at}, {death.call}: {found or 'well'}", flush=True)
        return [f"{'after' if death.answered else 'before'} call {death.at}, {death.call}: {fault}" for fault in found]


@pytest.mark.sweep
@pytest.mark.timeout(7200)
def test_killed_once_at_any_call_it_spends_nothing_twice(
    control_plane: ControlPlane, new_world: Callable[[], Any]
) -> None:
    async def story() -> None:
        async with laboratory(control_plane) as lab:
            began = time.monotonic()
            sweep = Sweep(lab, new_world)
            found = await sweep()
            print(f"{sweep.num_points} crash points, {time.monotonic() - began:.0f} s")
            assert found == []
            assert sweep.num_points > LEAST_CALLS + LEAST_WRITES

    asyncio.run(story())
