"""The reconcile of one job on a simulated platform: whatever dies, fails or is taken away, it ends, with an exact
ledger and no child twice."""

import asyncio
import contextlib
import itertools
import json
import random
from collections import Counter
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from cluster.kubelet import receipt_of
from fake_cluster import FakeCluster, Killed, Mortal, Platform, SeenChildren, no_sleep
from feddiff_operator import ledger as operator_ledger
from feddiff_operator import reconcile, scene, workloads
from feddiff_operator.cluster import (
    CONFIG_MAP,
    FDJ,
    JOB,
    PDS,
    POD,
    PRL,
    SERVICE,
    Conflict,
    Invalid,
    Refused,
    Unavailable,
)
from feddiff_operator.ledger import ClusterLedger
from feddiff_operator.metrics import Metrics
from feddiff_operator.progress import Progresses
from feddiff_operator.reconcile import Reconciler
from feddiff_operator.scene import Scene
from feddiff_operator.settings import Settings
from feddiff_operator.versions import Versions
from feddiff_protocol.ledger import inconsistency
from feddiff_protocol.ledger_objects import account_of, entry_of
from feddiff_protocol.stages import Stage
from feddiff_protocol.telemetry import StageProgress

Object = dict[str, Any]
START = datetime(2026, 1, 1, tzinfo=UTC)
LONGEST = timedelta(days=2)


class Recorder:
    """Takes note of events in memory."""

    def __init__(self) -> None:
        self.reasons: Counter[str] = Counter()

    def record(self, regarding: Object, reason: str, message: str, warning: bool = False) -> None:
        self.reasons[reason] += 1


class World:
    """One job of two owners, its platform, its clock, and an operator that can be started anew."""

    def __init__(self, outcome: Callable[[Object, Object], Any] | None = None, **spec: Any) -> None:
        self.platform = Platform(outcome or self.good)
        self.now = START
        self.metrics = Metrics()
        self.told: dict[str, StageProgress] = {}  # what pods say of their progress, by address
        self.recorder = Recorder()
        for client in "ab":
            self.platform.put(PDS, dataset(client))
        self.job = self.platform.put(FDJ, job(**spec))

    def spec_of(self, pod: Object) -> Object:
        name = pod["metadata"]["labels"]["batch.kubernetes.io/job-name"]
        return json.loads(self.platform.objects["ConfigMap", pod["metadata"]["namespace"], name]["data"]["spec.json"])

    def good(self, pod: Object, child: Object) -> tuple[int, str]:
        return 0, receipt_of(self.spec_of(pod))

    def operator(self, cluster: Any = None) -> Reconciler:
        cluster = cluster or self.platform
        settings = Settings(trainer_image="trainer:test")
        ledger = ClusterLedger(cluster, self.clock, no_sleep)
        return Reconciler(
            cluster, ledger, settings, self.recorder, self.metrics, self.clock, Progresses(self.clock, self.ask)
        )

    async def ask(self, address: str) -> StageProgress | None:
        return self.told.get(address)

    def clock(self) -> datetime:
        return self.now

    @property
    def found(self) -> Object | None:
        return self.platform.objects.get((FDJ.name, "research", "job"))

    @property
    def status(self) -> Object:
        return (self.found or {}).get("status", {})

    def failed(self) -> Object:
        return next(each for each in self.status["conditions"] if each["type"] == "Failed")

    async def look(self, operator: Reconciler) -> float | None:
        return await operator.job("research", "job", SeenChildren(self.platform))

    async def go_on(self, operator: Reconciler, until: Callable[[], bool]) -> None:
        """Turn by turn until something is so, or nothing would ever happen again."""
        while not until():
            version = self.platform.version
            wake = await self.look(operator)
            await operator.dataset("clinic-a", "scans")
            await operator.dataset("clinic-b", "scans")
            if self.platform.live(self.now) or self.platform.version != version:
                continue
            assert wake is not None, f"nothing is waited for: {self.status}"
            assert self.now - START < LONGEST, f"never ends: {self.status}"
            self.now += timedelta(seconds=max(wake, 1))

    def ended(self) -> bool:
        return self.status.get("phase") in ("Complete", "Failed")

    def entries(self) -> list[Any]:
        return [entry_of(each) for each in self.platform.peek(PRL)]

    def in_order(self) -> None:
        """Every ledger agrees with its account."""
        for found in self.platform.peek(PDS):
            namespace = found["metadata"]["namespace"]
            entries = [entry_of(each) for each in self.platform.peek(PRL) if each["metadata"]["namespace"] == namespace]
            account = account_of(found["status"])
            assert account is not None and not account.pending
            assert inconsistency(account, entries) is None


def dataset(client: str, **spec: Any) -> Object:
    return {
        "apiVersion": "feddiff.dev/v1alpha1",
        "kind": "PrivateDataset",
        "metadata": {"name": "scans", "namespace": f"clinic-{client}"},
        "spec": {
            "source": {"format": "npz", "path": "train.npz", "volumeClaim": "scans"},
            "image": {"channels": 1, "height": 8, "width": 8},
            "classes": {"count": 2, "records": [100, 5]},
            "budget": {"epsilon": "20", "delta": "1e-5"},
            "access": [{"namespace": "research"}],
            "store": {"uri": f"s3://clinic-{client}/feddiff"},
            **spec,
        },
    }


def job(**spec: Any) -> Object:
    privacy = {"mechanism": "summary", "epsilon": "10", "delta": "1e-5", "clipNorm": "4.25", "momentClipNorm": "2"}
    return {
        "apiVersion": "feddiff.dev/v1alpha1",
        "kind": "FederatedDiffusionJob",
        "metadata": {"name": "job", "namespace": "research"},
        "spec": {
            "clients": [{"name": each, "dataset": {"namespace": f"clinic-{each}", "name": "scans"}} for each in "ab"],
            "privacy": privacy,
            "diffusion": {"splitSigma": "1"},
            "store": {"uri": "s3://federation/jobs"},
            **spec,
        },
    }


def one_of_each(world: World) -> None:
    """Complete, by one attempt of every stage, one release and one charge a client."""
    assert world.status["phase"] == "Complete", world.status
    attempts = Counter((stage, client) for stage, client, _ in world.platform.started)
    assert attempts == {
        ("train-shared", ""): 2,
        ("report", ""): 1,
        **{(stage, client): 1 for stage in ("release", "train-personal", "sample", "evaluate") for client in "ab"},
    }
    assert {attempt for _, _, attempt in world.platform.started} == {1}
    entries = sorted(world.entries(), key=lambda entry: entry.client)
    assert [(entry.client, entry.phase) for entry in entries] == [("a", "Charged"), ("b", "Charged")]
    assert all(len(entry.manifest_sha256) == 64 for entry in entries)
    world.in_order()


def test_a_job_completes_with_one_attempt_of_every_stage() -> None:
    world = World()
    asyncio.run(world.go_on(world.operator(), world.ended))
    one_of_each(world)


@pytest.mark.parametrize("after", [False, True], ids=["before the call", "after it took effect"])
def test_an_operator_may_die_at_any_call_of_a_job(after: bool) -> None:
    num_deaths = 0
    for dies_at in range(1, 1000):
        world = World()
        mortal = Mortal(world.platform, dies_at, after)
        try:
            asyncio.run(world.go_on(world.operator(mortal), world.ended))
        except Killed:
            num_deaths += 1
        else:
            break
        asyncio.run(world.go_on(world.operator(), world.ended))
        one_of_each(world)
    assert num_deaths > 100, "every call of a whole job was a place to die"


@pytest.mark.parametrize("after", [False, True], ids=["before the call", "after it took effect"])
@pytest.mark.parametrize(
    ("withdrawn", "reason"),
    [({"access": []}, "AccessDenied"), ({"podTemplate": {"spec": {"hostNetwork": True}}}, "InvalidPodTemplate")],
)
def test_a_job_that_fails_says_why_wherever_its_operator_dies(withdrawn: Object, reason: str, after: bool) -> None:
    """What it gave back on the way is not the reason."""
    for dies_at in itertools.count(1):
        world = World()
        ready_to_charge(world)
        found = world.platform.objects[PDS.name, "clinic-b", "scans"]
        world.platform.put(PDS, {**found, "spec": {**found["spec"], **withdrawn}})
        try:
            asyncio.run(world.go_on(world.operator(Mortal(world.platform, dies_at, after)), world.ended))
        except Killed:
            asyncio.run(world.go_on(world.operator(), world.ended))
        else:
            break
        assert world.failed()["reason"] == reason, (dies_at, world.failed())
        assert {entry.phase for entry in world.entries()} == {"Returned"}
    assert dies_at > 5, "every call was a place to die"


def test_children_with_other_names_after_a_crash_are_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """The mutant: names that do not follow from what a child is."""
    draws = random.Random(0)
    named = workloads.child_name
    monkeypatch.setattr(workloads, "child_name", lambda *key: f"{named(*key)}-{draws.getrandbits(32):08x}")

    async def twice() -> None:
        world = World()
        children = SeenChildren(world.platform)
        while not world.platform.peek(JOB):
            await world.look(world.operator())
        late = SeenChildren(Platform(world.good))  # a watch that has not shown the Jobs yet
        late.releases_of, late.dataset = children.releases_of, children.dataset  # type: ignore[method-assign]
        await world.operator().job("research", "job", late)
        labels = [each["metadata"]["labels"]["feddiff.dev/client"] for each in world.platform.peek(JOB)]
        assert Counter(labels) == {"a": 2, "b": 2}

    asyncio.run(twice())


def test_a_late_watch_makes_no_child_twice() -> None:
    async def story() -> None:
        world = World()
        children = SeenChildren(world.platform)
        while not world.platform.peek(JOB):
            await world.look(world.operator())
        late = SeenChildren(Platform(world.good))
        late.releases_of, late.dataset = children.releases_of, children.dataset  # type: ignore[method-assign]
        await world.operator().job("research", "job", late)
        labels = [each["metadata"]["labels"]["feddiff.dev/client"] for each in world.platform.peek(JOB)]
        assert Counter(labels) == {"a": 1, "b": 1}

    asyncio.run(story())


CODES = (1, 64, 65, 66, 69, 73, 74, 75, 77, 78, 137)


@pytest.mark.parametrize("seed", range(60))
def test_whatever_pods_do_the_job_ends_with_a_reason_and_exact_books(seed: int) -> None:
    """Exit codes, lost receipts, foreign receipts and vanished pods, at random, with a quorum of one."""
    draws = random.Random(seed)

    def outcome(pod: Object, child: Object) -> tuple[int, str] | None:
        draw = draws.random()
        if draw < 0.6:
            return world.good(pod, child)
        if draw < 0.7:
            return 0, draws.choice(["", "{}", "receipt", receipt_of({**world.spec_of(pod), "attempt": 99})])
        if draw < 0.8:
            world.platform.remove(POD, pod["metadata"]["namespace"], pod["metadata"]["name"])
            return None
        return draws.choice(CODES), ""

    world = World(outcome, quorum=1, backoffLimit=2, deadlines={"stageSeconds": 600})
    asyncio.run(world.go_on(world.operator(), world.ended))
    assert world.status["phase"] in ("Complete", "Failed")
    if world.status["phase"] == "Failed":
        assert world.failed()["reason"] in ("StageFailed", "ClientsLost", "StageDeadlineExceeded"), world.failed()
        assert world.failed()["message"]
    world.in_order()
    assert {entry.phase for entry in world.entries()} <= {"Charged", "Returned"}
    releases = [key for key in world.platform.started if key[0] == "release"]
    assert len({client for _, client, _ in releases}) <= sum(entry.phase == "Charged" for entry in world.entries())


def test_a_job_that_was_never_understood_fails_with_the_words_and_can_be_deleted() -> None:
    world = World()
    broken = json.loads(json.dumps(world.job))
    broken["spec"]["diffusion"]["betaEnd"] = "1e-5"
    world.platform.put(FDJ, broken)

    async def story() -> None:
        operator = world.operator()
        await world.go_on(operator, world.ended)
        assert world.failed()["reason"] == "InvalidSpec"
        await world.platform.delete(FDJ, "research", "job")
        await world.look(operator)
        assert world.found is None

    asyncio.run(story())
    assert world.platform.peek(PRL) == []


@pytest.mark.parametrize("stop_at", ["Reserving", "Releasing", "Training", "Sampling", "Evaluating"])
def test_a_job_deleted_in_any_phase_leaves_its_ledger_alone(stop_at: str) -> None:
    world = World()

    async def story() -> None:
        operator = world.operator()
        await world.go_on(operator, lambda: world.status.get("phase") == stop_at)
        await world.platform.delete(FDJ, "research", "job")
        await world.go_on(operator, lambda: world.found is None)
        for clinic in ("clinic-a", "clinic-b"):
            await operator.dataset(clinic, "scans")

    asyncio.run(story())
    assert [world.platform.peek(kind) for kind in (JOB, POD, CONFIG_MAP, SERVICE)] == [[], [], [], []]
    world.in_order()
    assert {entry.phase for entry in world.entries()} <= {"Charged", "Returned"}


@pytest.mark.parametrize("stop_at", ["Reserving", "Releasing", "Training", "Sampling", "Evaluating"])
def test_a_job_suspended_in_any_phase_completes_after_it(stop_at: str) -> None:
    world = World()

    async def story() -> None:
        operator = world.operator()
        await world.go_on(operator, lambda: world.status.get("phase") == stop_at)
        await world.platform.patch(FDJ, "research", "job", {"spec": {"suspend": True}})
        for _ in range(10):
            await world.look(operator)
            world.platform.live(world.now)
        assert world.status["phase"] == "Suspended"
        assert world.platform.peek(POD) == [] or all(
            each["status"]["phase"] != "Running" for each in world.platform.peek(POD)
        )
        await world.platform.patch(FDJ, "research", "job", {"spec": {"suspend": False}})
        await world.go_on(operator, world.ended)

    asyncio.run(story())
    assert world.status["phase"] == "Complete"
    world.in_order()
    assert len(world.entries()) == 2


async def suspended_under_kueue(world: World) -> None:
    """In training, by a queue that starts every suspended Job again, as Kueue does while its Workload is admitted."""
    operator = world.operator()
    await world.go_on(operator, lambda: {stage for stage, _ in running(world)} == {"train-shared", "train-personal"})
    await world.platform.patch(FDJ, "research", "job", SUSPENDED)
    for _ in range(12):
        await world.look(operator)
        world.platform.live(world.now)
        for child in world.platform.peek(JOB):
            if child["spec"].get("suspend"):
                world.platform.put(JOB, {**child, "spec": {**child["spec"], "suspend": False}})
        world.platform.live(world.now)


def first_trainings_go_on(world: World) -> Callable[[Object, Object], tuple[int, str] | None]:
    def outcome(pod: Object, child: Object) -> tuple[int, str] | None:
        labels = child["metadata"]["labels"]
        goes_on = labels["feddiff.dev/stage"].startswith("train") and labels["feddiff.dev/attempt"] == "1"
        return None if goes_on else world.good(pod, child)

    return outcome


def test_a_queue_cannot_start_again_what_was_stopped_and_the_next_attempt_completes() -> None:
    world = World()
    world.platform.outcome = first_trainings_go_on(world)

    async def story() -> None:
        await suspended_under_kueue(world)
        assert world.status["phase"] == "Suspended" and running(world) == set()
        assert len(world.platform.started) == 2 + 2 + 2, "two releases, two ranks, two owners' trainings"
        await world.platform.patch(FDJ, "research", "job", {"spec": {"suspend": False}})
        await world.go_on(world.operator(), world.ended)

    asyncio.run(story())
    assert world.status["phase"] == "Complete"
    world.in_order()


def test_a_stop_that_only_suspends_would_not_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    """The mutant: pods come and go."""
    stopping = reconcile.stopping
    monkeypatch.setattr(reconcile, "stopping", lambda why: stopping(why) | {"spec": {"suspend": True}})
    world = World()
    world.platform.outcome = first_trainings_go_on(world)
    asyncio.run(suspended_under_kueue(world))
    assert len(world.platform.started) > 2 + 2 + 2


def test_an_ended_job_is_deleted_when_its_time_has_passed() -> None:
    world = World(ttlSecondsAfterFinished=100)

    async def story() -> None:
        operator = world.operator()
        await world.go_on(operator, world.ended)
        ended_at = world.now
        await world.go_on(operator, lambda: world.found is None)
        assert timedelta(seconds=100) <= world.now - ended_at < timedelta(seconds=110)

    asyncio.run(story())
    assert [entry.phase for entry in world.entries()] == ["Charged", "Charged"]
    assert world.platform.peek(JOB) == []


def running(world: World) -> set[tuple[str, str]]:
    """Stage and client of every pod that runs."""
    labels = [each["metadata"]["labels"] for each in world.platform.peek(POD) if each["status"]["phase"] == "Running"]
    return {(each["feddiff.dev/stage"], each.get("feddiff.dev/client", "")) for each in labels}


async def runs_with_a_late_client(world: World) -> Reconciler:
    """The shared denoiser is trained on a's release; b's came too late."""
    operator = world.operator()
    await world.go_on(operator, lambda: ("train-shared", "") in running(world))
    for _ in range(3):
        await world.look(operator)
        world.platform.live(world.now)
    return operator


def late_b(pod: Object, child: Object) -> bool:
    """b never releases, and no training ends."""
    labels = child["metadata"]["labels"]
    return (labels["feddiff.dev/stage"], labels.get("feddiff.dev/client")) != ("release", "a")


LATE: Object = {"quorum": 1, "deadlines": {"releaseSeconds": 60}, "cleanPodPolicy": "None"}


def test_a_late_clients_pods_are_stopped_whatever_the_clean_pod_policy_says() -> None:
    world = World(lambda pod, child: None if late_b(pod, child) else world.good(pod, child), **LATE)
    asyncio.run(runs_with_a_late_client(world))
    assert world.status["counted"] == ["a"]
    assert running(world) == {("train-shared", ""), ("train-personal", "a")}


def test_a_policy_that_spared_late_clients_would_be_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """The mutant: the policy for jobs that have ended, asked of one that goes on."""
    monkeypatch.setattr(Scene, "_left_running", lambda scene, decision, client: bool(scene.counted))
    world = World(lambda pod, child: None if late_b(pod, child) else world.good(pod, child), **LATE)
    asyncio.run(runs_with_a_late_client(world))
    assert ("release", "b") in running(world)


class Queue:
    """A cluster in which a queue lets the releases of some clients wait: their Jobs are made suspended."""

    def __init__(self, platform: Platform, clients: str) -> None:
        self.platform, self.clients = platform, clients

    def __getattr__(self, verb: str) -> Any:
        return getattr(self.platform, verb)

    async def create(self, kind: Any, obj: Object, rehearsal: bool = False) -> Object:
        labels = obj["metadata"]["labels"]
        held = kind == JOB and labels["feddiff.dev/stage"] == "release" and labels["feddiff.dev/client"] in self.clients
        spec = {"spec": {**obj["spec"], "suspend": True}} if held else {}
        return await self.platform.create(kind, {**obj, **spec}, rehearsal)

    async def admit(self) -> None:
        for child in self.platform.peek(JOB):
            metadata = child["metadata"]
            await self.platform.patch(JOB, metadata["namespace"], metadata["name"], {"spec": {"suspend": False}})


async def an_hour_later(world: World, operator: Reconciler) -> None:
    world.now += timedelta(hours=1)
    for _ in range(5):
        await world.look(operator)
        world.platform.live(world.now)


def queued_releases(world: World) -> None:
    """Both owners' queues are full for an hour, and then have room."""

    async def story() -> None:
        queue = Queue(world.platform, "ab")
        operator = world.operator(queue)
        await world.go_on(operator, lambda: len(world.platform.peek(JOB)) == 2)
        await an_hour_later(world, operator)
        await queue.admit()
        await world.go_on(operator, world.ended)

    asyncio.run(story())


def test_the_release_deadline_waits_for_the_first_release_to_run() -> None:
    world = World(**LATE)
    queued_releases(world)
    assert (world.status["phase"], world.status["counted"]) == ("Complete", ["a", "b"])
    assert datetime.fromisoformat(world.status["releasingSince"]) >= START + timedelta(hours=1)


def test_a_deadline_that_ran_from_the_jobs_creation_would_lose_what_was_charged(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The mutant."""

    def created(jobs: list[Object], pods: list[Object]) -> datetime | None:
        made = [each["metadata"]["creationTimestamp"] for each in jobs]
        return datetime.fromisoformat(min(made)) if made else None

    monkeypatch.setattr(scene, "releasing_since", created)
    world = World(**LATE)
    queued_releases(world)
    assert world.failed()["reason"] == "ReleaseDeadlineExceeded"


def test_once_one_has_released_an_owner_whose_queue_is_full_holds_the_others_up_no_longer() -> None:
    world = World(**LATE)

    async def story() -> None:
        operator = world.operator(Queue(world.platform, "b"))
        await world.go_on(operator, world.ended)

    asyncio.run(story())
    assert (world.status["phase"], world.status["counted"]) == ("Complete", ["a"])


def suspended_for_an_hour(world: World) -> None:
    """While b releases."""

    async def story() -> None:
        operator = world.operator()
        await world.go_on(operator, lambda: ("release", "b") in running(world))
        await world.platform.patch(FDJ, "research", "job", SUSPENDED)
        for _ in range(3):
            await an_hour_later(world, operator)
        assert world.status["phase"] == "Suspended"
        await world.platform.patch(FDJ, "research", "job", {"spec": {"suspend": False}})
        await world.go_on(operator, world.ended)

    asyncio.run(story())


def b_is_slow(world: World, attempts: int) -> Callable[[Object, Object], tuple[int, str] | None]:
    """b's release goes on and on, in so many attempts."""

    def outcome(pod: Object, child: Object) -> tuple[int, str] | None:
        labels = child["metadata"]["labels"]
        slow = labels["feddiff.dev/stage"] == "release" and labels["feddiff.dev/client"] == "b"
        return None if slow and int(labels["feddiff.dev/attempt"]) <= attempts else world.good(pod, child)

    return outcome


def with_slow_b(attempts: int) -> World:
    world = World(deadlines={"releaseSeconds": 60})
    world.platform.outcome = b_is_slow(world, attempts)
    return world


def test_the_release_deadline_stands_still_while_a_job_is_suspended() -> None:
    world = with_slow_b(attempts=1)
    suspended_for_an_hour(world)
    assert (world.status["phase"], world.status["counted"]) == ("Complete", ["a", "b"])


def test_the_release_deadline_counts_anew_from_when_a_job_goes_on() -> None:
    world = with_slow_b(attempts=9)
    suspended_for_an_hour(world)
    assert world.failed()["reason"] == "ReleaseDeadlineExceeded"
    assert timedelta(seconds=60) <= world.now - START - timedelta(hours=3) < timedelta(seconds=90)


def test_a_deadline_that_ran_on_would_end_a_suspended_job(monkeypatch: pytest.MonkeyPatch) -> None:
    """The mutant."""
    runs_on = property(lambda scene: scene.releasing_since and scene.releasing_since + timedelta(seconds=60))
    monkeypatch.setattr(Scene, "release_deadline", runs_on)
    world = with_slow_b(attempts=1)
    with pytest.raises(AssertionError, match="'Failed' == 'Suspended'"):
        suspended_for_an_hour(world)
    assert world.failed()["reason"] == "ReleaseDeadlineExceeded"


@pytest.mark.parametrize(("policy", "left"), [("None", {("train-personal", "a")}), ("Running", set())])
def test_only_what_took_part_to_the_end_goes_on_after_it_and_only_where_the_policy_says_so(
    policy: str, left: set[tuple[str, str]]
) -> None:
    failing = {"train-shared": False}

    def outcome(pod: Object, child: Object) -> tuple[int, str] | None:
        if child["metadata"]["labels"]["feddiff.dev/stage"] == "train-shared" and failing["train-shared"]:
            return 65, ""
        return None if late_b(pod, child) else world.good(pod, child)

    world = World(outcome, **{**LATE, "cleanPodPolicy": policy})

    async def story() -> None:
        operator = await runs_with_a_late_client(world)
        failing["train-shared"] = True
        await world.go_on(operator, world.ended)
        for _ in range(3):
            await world.look(operator)
            world.platform.live(world.now)

    asyncio.run(story())
    assert world.status["phase"] == "Failed"
    assert running(world) == left


# ---- What is read, and what a late watch cannot do ----------------------------------------------------------------


class Asked:
    """A cluster that notes what it is asked."""

    def __init__(self, platform: Platform) -> None:
        self.platform, self.requests = platform, Counter[str]()

    def __getattr__(self, verb: str) -> Any:
        async def request(kind: Any, *arguments: Any, **more: Any) -> Any:
            self.requests[f"{verb} {kind.name}"] += 1
            return await getattr(self.platform, verb)(kind, *arguments, **more)

        return request


def frozen(world: World) -> SeenChildren:
    """What the watches have shown so far, and show for ever."""
    late = FakeCluster()
    late.objects = dict(world.platform.objects)
    return SeenChildren(late)


def test_a_look_at_what_has_not_changed_asks_nothing_and_reads_no_object_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    world = World(lambda pod, child: world.good(pod, child) if "release" in pod["metadata"]["name"] else None)
    asked = Asked(world.platform)
    operator = world.operator(asked)
    asyncio.run(world.go_on(operator, lambda: len(running(world)) == 3))
    while asked.requests:
        asked.requests.clear()
        asyncio.run(world.look(operator))

    def again(*_: Any) -> None:
        raise AssertionError("read again")

    for module, names in ((reconcile, ["parse", "charge_of"]), (operator_ledger, ["parse", "promise_of", "entry_of"])):
        for name in names:
            monkeypatch.setattr(module, name, again)

    async def everything() -> None:
        assert await world.look(operator) is None
        for clinic in ("clinic-a", "clinic-b"):
            await operator.dataset(clinic, "scans", SeenChildren(world.platform))

    asyncio.run(everything())
    assert asked.requests == {}


def test_a_whole_job_of_two_owners_reads_no_more_than_it_must() -> None:
    world = World()
    asked = Asked(world.platform)

    async def story() -> None:
        operator = world.operator(asked)
        while not world.ended():
            await world.look(operator)
            for clinic in ("clinic-a", "clinic-b"):
                await operator.dataset(clinic, "scans", SeenChildren(world.platform))
            world.platform.live(world.now)

    asyncio.run(story())
    one_of_each(world)
    reads = {what: count for what, count in asked.requests.items() if what.startswith(("get", "list"))}
    # Of each dataset: one look before the first word about it and one before it is asked, then reserve, charge, tend.
    assert reads["get PrivateDataset"] <= 2 * 7 and reads["list PrivacyRelease"] <= 2 * 7
    assert reads["get PrivacyRelease"] == 2  # before each manifest is noted
    assert reads["get FederatedDiffusionJob"] <= 10  # before every look that acts
    assert reads.keys() == {"get PrivateDataset", "list PrivacyRelease", "get PrivacyRelease"} | {
        "get FederatedDiffusionJob"
    }


SUSPENDED: Object = {"spec": {"suspend": True}}


def ready_to_charge(world: World) -> tuple[Reconciler, SeenChildren]:
    """An operator whose next look charges both clients, and what its watches have shown."""
    operator = world.operator()
    asyncio.run(world.go_on(operator, lambda: "charging" in world.status.get("message", "")))
    assert {entry.phase for entry in world.entries()} == {"Reserved"}
    return operator, frozen(world)


async def change(world: World, how: str) -> None:
    if how == "suspended":
        await world.platform.patch(FDJ, "research", "job", SUSPENDED)
    elif how == "deleted":
        await world.platform.delete(FDJ, "research", "job")
    else:
        world.platform.remove(FDJ, "research", "job")


async def look_late(operator: Reconciler, late: SeenChildren) -> None:
    with contextlib.suppress(Conflict):
        await operator.job("research", "job", late)


@pytest.mark.parametrize("how", ["suspended", "deleted", "gone"])
def test_nothing_is_charged_or_started_for_a_job_that_only_a_late_watch_shows_alive(how: str) -> None:
    world = World()
    operator, late = ready_to_charge(world)

    async def story() -> None:
        await change(world, how)
        for _ in range(3):
            await look_late(operator, late)

    asyncio.run(story())
    assert {entry.phase for entry in world.entries()} <= {"Reserved", "Returned"}
    assert world.platform.peek(JOB) == []


@pytest.mark.parametrize("how", ["suspended", "deleted", "gone"])
def test_an_operator_that_believed_its_watch_would_charge_it(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The mutant: nothing is read before the charge."""

    async def believes(self: Versions, found: Object) -> bool:
        return True

    monkeypatch.setattr(Versions, "is_current", believes)
    world = World()
    operator, late = ready_to_charge(world)

    async def story() -> None:
        await change(world, how)
        await look_late(operator, late)

    asyncio.run(story())
    assert {entry.phase for entry in world.entries()} == {"Charged"}


@pytest.mark.parametrize("how", ["suspended", "deleted", "gone"])
def test_no_release_is_started_for_a_charge_whose_job_is_over(how: str) -> None:
    world = World()
    operator = world.operator()
    asyncio.run(world.go_on(operator, lambda: "waiting for the releases" in world.status.get("message", "")))
    late = frozen(world)
    assert world.platform.peek(JOB) == []

    async def story() -> None:
        await change(world, how)
        for _ in range(3):
            await look_late(operator, late)

    asyncio.run(story())
    assert world.platform.peek(JOB) == []


def test_a_reservation_that_only_a_late_watch_shows_is_not_charged_and_the_next_look_says_so() -> None:
    world = World()
    operator, late = ready_to_charge(world)
    entry = next(each for each in world.platform.peek(PRL) if each["spec"]["client"] == "b")
    world.platform.put(PRL, {**entry, "status": {"phase": "Returned"}})

    async def story() -> None:
        for _ in range(3):
            await look_late(operator, late)

    asyncio.run(story())
    assert {entry.client: entry.phase for entry in world.entries()} == {"a": "Charged", "b": "Returned"}
    assert world.recorder.reasons["LedgerRefused"] >= 1
    assert "given back" in world.status["message"], world.status
    assert world.platform.peek(JOB) == []


def test_a_ledger_that_contradicts_itself_is_found_out_although_nothing_is_read_while_all_is_well() -> None:
    world = World()
    operator = world.operator()
    asyncio.run(world.go_on(operator, world.ended))
    entry = next(each for each in world.platform.peek(PRL) if each["spec"]["client"] == "b")
    world.platform.remove(PRL, "clinic-b", entry["metadata"]["name"])
    asyncio.run(operator.dataset("clinic-b", "scans", SeenChildren(world.platform)))
    (consistent,) = [
        each
        for each in world.platform.objects[PDS.name, "clinic-b", "scans"]["status"]["conditions"]
        if each["type"] == "LedgerConsistent"
    ]
    assert consistent["status"] == "False"


class Refusing:
    """A cluster that refuses to create Jobs in one namespace."""

    def __init__(self, platform: Platform, namespace: str, error: Exception) -> None:
        self.platform, self.namespace, self.error = platform, namespace, error

    def __getattr__(self, name: str) -> Any:
        return getattr(self.platform, name)

    async def create(self, kind: Any, obj: Object, rehearsal: bool = False) -> Object:
        if self.error and kind in (JOB, CONFIG_MAP) and obj["metadata"]["namespace"] == self.namespace:
            raise self.error
        return await self.platform.create(kind, obj, rehearsal)


def test_a_missing_permission_is_waited_for_in_its_own_words() -> None:
    world = World()
    refusing = Refusing(world.platform, "clinic-b", Refused("jobs is forbidden: apply the RoleBinding"))

    async def story() -> None:
        operator = world.operator(refusing)
        await world.go_on(operator, lambda: "is forbidden" in world.status.get("message", ""))
        assert world.status["phase"] == "Reserving"
        assert {entry.phase for entry in world.entries()} == {"Reserved"}, "nothing is spent on what cannot start"
        refusing.error = None  # type: ignore[assignment]
        await world.go_on(operator, world.ended)

    asyncio.run(story())
    one_of_each(world)


class ReadOnly:
    """A cluster that lets us change nothing in one namespace."""

    def __init__(self, platform: Platform, namespace: str) -> None:
        self.platform, self.namespace = platform, namespace

    def __getattr__(self, name: str) -> Any:
        method = getattr(self.platform, name)
        if name not in ("create", "patch", "replace", "replace_status", "delete"):
            return method

        async def asked(kind: Any, of: Any, *more: Any, **how: Any) -> Any:
            if self.namespace == (of if isinstance(of, str) else of["metadata"].get("namespace")):
                raise Refused("changes are forbidden: apply the RoleBinding")
            return await method(kind, of, *more, **how)

        return asked


def test_a_ledger_that_we_may_not_write_is_waited_for_in_its_own_words() -> None:
    """Its owner has not applied the RoleBinding yet."""
    world = World()
    cluster = ReadOnly(world.platform, "clinic-b")

    async def story() -> None:
        operator = world.operator(cluster)
        for _ in range(8):
            await world.look(operator)
            await operator.dataset("clinic-a", "scans")
            world.now += timedelta(seconds=30)
        assert world.status["phase"] == "Reserving"
        assert "ledger of b: changes are forbidden: apply the RoleBinding" in world.status["message"]
        cluster.namespace = ""
        await world.go_on(operator, world.ended)

    asyncio.run(story())
    one_of_each(world)


def without_dataset(world: World) -> Any:
    world.platform.objects.pop((PDS.name, "clinic-b", "scans"))
    return world.platform


def without_pods(world: World) -> Any:
    return Refusing(world.platform, "clinic-b", Refused("jobs is forbidden"))


HELD_UP: dict[str, tuple[str, Callable[[World], Any]]] = {
    "a dataset that is not there": ("does not exist", without_dataset),
    "a ledger that we may not write": ("are forbidden", lambda world: ReadOnly(world.platform, "clinic-b")),
    "pods that we may not start": ("is forbidden", without_pods),
}


def held_up(world: World, owner: str, hours: int) -> None:
    """Looks every half minute at most, until the job has ended or so much time is over."""

    async def story() -> None:
        operator = world.operator(HELD_UP[owner][1](world))
        while not world.ended() and world.now - START < timedelta(hours=hours):
            await world.look(operator)
            await operator.dataset("clinic-a", "scans")
            world.platform.live(world.now)
            world.now += timedelta(seconds=15)

    asyncio.run(story())


@pytest.mark.parametrize("owner", HELD_UP)
def test_at_the_reservation_deadline_the_others_go_on_without_an_owner_that_holds_them_up(owner: str) -> None:
    world = World(quorum=1, deadlines={"reservationSeconds": 600})
    held_up(world, owner, hours=1)
    assert (world.status["phase"], world.status["counted"]) == ("Complete", ["a"])
    (dropped,) = world.status["dropped"]
    assert (dropped["client"], HELD_UP[owner][0] in dropped["reason"]) == ("b", True)
    assert {entry.client: entry.phase for entry in world.entries()}.get("b", "Returned") == "Returned"


@pytest.mark.parametrize("owner", HELD_UP)
def test_without_that_deadline_it_is_waited_for_and_without_a_quorum_the_job_ends_by_it(owner: str) -> None:
    patient = World(quorum=1)
    held_up(patient, owner, hours=5)
    assert patient.status["phase"] in ("Pending", "Reserving")
    world = World(deadlines={"reservationSeconds": 600})
    held_up(world, owner, hours=1)
    assert world.failed()["reason"] == "ReservationDeadlineExceeded"
    assert timedelta(seconds=600) <= world.now - START < timedelta(seconds=700)
    assert all(entry.phase == "Returned" for entry in world.entries()), "nobody has paid"


def looked_at(world: World, operator: Reconciler, until: Callable[[], bool], hours: float = 2) -> Any:
    """Every quarter of a minute, until something is so or the time is over."""

    async def story() -> None:
        begun = world.now
        while not until() and world.now - begun < timedelta(hours=hours):
            with contextlib.suppress(Unavailable):
                await world.look(operator)
            world.platform.live(world.now)
            world.now += timedelta(seconds=15)

    return story()


def all_reserved(world: World) -> bool:
    return [entry.phase for entry in world.entries()] == ["Reserved", "Reserved"]


class Unanswered(Refusing):
    """Pods are refused in one namespace, and its entries cannot be written for the moment."""

    async def replace_status(self, kind: Any, obj: Object) -> Object:
        if kind is PRL and obj["metadata"]["namespace"] == self.namespace and obj["status"].get("phase") == "Returned":
            raise Unavailable("503")
        return await self.platform.replace_status(kind, obj)


@pytest.mark.parametrize("kind", ["refused", "not answered"])
def test_a_reservation_that_cannot_be_given_back_holds_nobody_up(kind: str) -> None:
    world = World(quorum=1, deadlines={"reservationSeconds": 600})
    error = Refused("exceeded quota")
    held = {
        "refused": ReadOnly(world.platform, "clinic-b"),
        "not answered": Unanswered(world.platform, "clinic-b", error),
    }
    seen: list[bool] = []

    async def story() -> None:
        await looked_at(world, world.operator(), lambda: all_reserved(world))
        operator = world.operator(held[kind])
        while not world.ended() and world.now - START < timedelta(hours=1):
            await looked_at(world, operator, lambda: False, hours=0.001)
            seen.append(bool(world.status["dropped"]))
        assert world.ended(), world.status

    asyncio.run(story())
    assert (world.status["phase"], world.status["counted"], world.status["leftOut"]) == ("Complete", ["a"], ["b"])
    assert sum(one != other for one, other in itertools.pairwise(seen)) == 1, "it goes back and forth"


def test_an_operator_that_was_away_past_the_deadline_asks_everybody_before_it_leaves_anybody_out() -> None:
    world = World(deadlines={"reservationSeconds": 600})

    async def story() -> None:
        await world.look(world.operator())
        world.now += timedelta(hours=1)
        await world.go_on(world.operator(), world.ended)

    asyncio.run(story())
    one_of_each(world)


def three_owners(**changed: Object | None) -> World:
    """A quorum of two of a, b and c, with datasets as they are given: None is not there."""
    names = [{"name": each, "dataset": {"namespace": f"clinic-{each}", "name": "scans"}} for each in "abc"]
    world = World(lambda pod, child: None, quorum=2, clients=names, deadlines={"reservationSeconds": 600})
    for client, spec in ({"c": {}} | changed).items():
        world.platform.objects.pop((PDS.name, f"clinic-{client}", "scans"), None)
        if spec is not None:
            world.platform.put(PDS, dataset(client, **spec))
    return world


OTHER_SIZE: Object = {"image": {"channels": 1, "height": 16, "width": 16}}


def test_datasets_that_do_not_fit_are_found_out_without_the_first_one() -> None:
    world = three_owners(a=None, c=OTHER_SIZE)
    asyncio.run(looked_at(world, world.operator(), world.ended))
    assert world.failed()["status"] == "True" and "1 of 2 needed clients remain" in world.status["message"]
    assert {entry.phase for entry in world.entries()} == {"Returned"}


def test_an_owner_who_was_left_out_cannot_disturb_the_others_with_a_dataset() -> None:
    """Nor is it asked for any more."""
    world = three_owners(a=None)
    calls: list[str] = []

    class Listening:
        def __getattr__(self, name: str) -> Any:
            return getattr(world.platform, name)

        async def get(self, kind: Any, namespace: str, name: str) -> Any:
            calls.append(namespace)
            return await world.platform.get(kind, namespace, name)

    async def story() -> None:
        operator = world.operator(Listening())
        await looked_at(world, operator, lambda: len(running(world)) == 2)
        world.platform.put(PDS, dataset("a", **OTHER_SIZE))
        await world.platform.patch(FDJ, "research", "job", {"spec": {"deadlines": None}})
        calls.clear()
        await looked_at(world, operator, world.ended, hours=0.1)

    asyncio.run(story())
    assert world.status["phase"] == "Releasing" and running(world) == {("release", "b"), ("release", "c")}
    assert (world.status["leftOut"], "clinic-a" in calls) == (["a"], False)


@pytest.mark.parametrize("back", [True, False])
def test_a_reservation_that_was_not_seen_in_time_is_given_back_when_it_is(back: bool) -> None:
    """The operator was started anew while an owner's namespace could not be read."""
    world = World(lambda pod, child: None, quorum=1, deadlines={"reservationSeconds": 600})

    class Blind(SeenChildren):
        def releases_of(self, uid: str) -> list[Object]:
            return [each for each in super().releases_of(uid) if each["metadata"]["namespace"] != "clinic-b"]

        def dataset(self, namespace: str, name: str) -> Object | None:
            return None if namespace == "clinic-b" else super().dataset(namespace, name)

    class Closed(ReadOnly):
        async def get(self, kind: Any, namespace: str, name: str) -> Any:
            if namespace == self.namespace:
                raise Refused("forbidden")
            return await self.platform.get(kind, namespace, name)

    async def story() -> None:
        await looked_at(world, world.operator(), lambda: all_reserved(world))
        operator = world.operator(Closed(world.platform, "clinic-b"))
        while not running(world) and world.now - START < timedelta(hours=1):
            await operator.job("research", "job", Blind(world.platform))
            world.platform.live(world.now)
            world.now += timedelta(seconds=15)
        if back:
            await looked_at(world, world.operator(), lambda: False, hours=0.1)

    asyncio.run(story())
    assert {entry.client: entry.phase for entry in world.entries()} == {
        "a": "Charged",
        "b": "Returned" if back else "Reserved",
    }
    assert running(world) == {("release", "a")}


def test_what_ends_a_job_later_is_not_blamed_on_who_was_left_out() -> None:
    world = World(lambda pod, child: (65, ""), quorum=1, deadlines={"reservationSeconds": 600})
    asyncio.run(looked_at(world, world.operator(without_pods(world)), world.ended))
    assert world.failed()["reason"] == "ClientsLost"
    assert next(each["reason"] for each in world.status["dropped"] if each["client"] == "b").endswith("is forbidden")


def test_the_reservation_deadline_counts_anew_from_when_a_job_goes_on() -> None:
    world = World(quorum=1, deadlines={"reservationSeconds": 600}, suspend=True)
    world.now += timedelta(hours=3)

    async def story() -> None:
        operator = world.operator(without_dataset(world))
        await world.go_on(operator, lambda: world.status.get("phase") == "Suspended")
        world.now += timedelta(hours=3)
        await world.platform.patch(FDJ, "research", "job", {"spec": {"suspend": False}})
        await world.go_on(operator, lambda: "does not exist" in world.status.get("message", ""))
        world.platform.put(PDS, dataset("b"))
        await world.go_on(operator, world.ended)

    asyncio.run(story())
    one_of_each(world)


def test_an_owner_who_takes_its_rights_back_while_its_pod_runs_holds_the_others_up_no_longer() -> None:
    def outcome(pod: Object, child: Object) -> tuple[int, str] | None:
        spec = world.spec_of(pod)
        return None if spec.get("client") == "b" else (0, receipt_of(spec))

    world = World(outcome, quorum=1, deadlines={"releaseSeconds": 600})
    cluster = ReadOnly(world.platform, "")

    async def story() -> None:
        operator = world.operator(cluster)
        await world.go_on(operator, lambda: {"clinic-a", "clinic-b"} <= pods_in(world))
        cluster.namespace = "clinic-b"
        await world.go_on(operator, lambda: world.status["phase"] in ("Complete", "Failed"))

    def pods_in(world: World) -> set[str]:
        return {pod["metadata"]["namespace"] for pod in world.platform.peek(POD)}

    asyncio.run(story())
    assert world.status["phase"] == "Complete", world.status


@pytest.mark.parametrize("forged", ["this job", "an earlier job"])
@pytest.mark.parametrize("ttl", [None, 60])
def test_a_job_that_a_stranger_labels_as_ours_hinders_nothing(forged: str, ttl: int | None) -> None:
    world = World(**({} if ttl is None else {"ttlSecondsAfterFinished": ttl}))

    async def story() -> None:
        operator = world.operator(ReadOnly(world.platform, "elsewhere"))
        await world.go_on(operator, lambda: world.status.get("phase") == "Training")
        assert world.found is not None
        labels = {"job": "job", "job-namespace": "research"}
        labels["job-uid"] = world.found["metadata"]["uid"] if forged == "this job" else "earlier"
        metadata = {"namespace": "elsewhere", "labels": {f"feddiff.dev/{name}": labels[name] for name in labels}}
        world.platform.put(JOB, {"metadata": {"name": "x", **metadata}, "spec": {}, "status": {}})
        await world.go_on(operator, world.ended if ttl is None else lambda: world.found is None)
        if ttl is None:
            assert world.status["phase"] == "Complete"
            await world.platform.delete(FDJ, "research", "job")
            await world.go_on(operator, lambda: world.found is None)

    control = world.platform._control
    world.platform._control = lambda job, moment: None if job["metadata"]["name"] == "x" else control(job, moment)  # type: ignore[method-assign]
    asyncio.run(story())
    assert [each["metadata"]["namespace"] for each in world.platform.peek(JOB)] == ["elsewhere"]


def test_a_receipt_of_a_pod_elsewhere_is_nobodys() -> None:
    world = World(lambda pod, child: None)

    async def story() -> None:
        operator = world.operator()
        await world.go_on(operator, lambda: bool(world.platform.peek(POD)))
        real = world.platform.peek(POD)[0]
        ended = {"exitCode": 0, "message": receipt_of(world.spec_of(real)), "startedAt": "2026-01-01T00:00:00Z"}
        status = {"phase": "Succeeded", "containerStatuses": [{"name": "stage", "state": {"terminated": ended}}]}
        metadata = {**real["metadata"], "name": "forged", "namespace": "elsewhere"}
        world.platform.put(POD, {**real, "metadata": metadata, "status": status})
        for _ in range(5):
            await world.look(operator)

    asyncio.run(story())
    assert not any(each.get("status", {}).get("manifestSha256") for each in world.platform.peek(PRL))


def test_a_pod_template_that_the_api_server_refuses_ends_the_job_in_its_words() -> None:
    world = World()
    refusing = Refusing(world.platform, "clinic-b", Invalid("spec.template.spec.nodeSelector: Invalid value"))
    asyncio.run(world.go_on(world.operator(refusing), world.ended))
    assert world.failed()["reason"] == "InvalidPodTemplate"
    assert "nodeSelector" in world.failed()["message"]
    assert {entry.phase for entry in world.entries()} == {"Returned"}


def test_a_second_release_of_one_client_stops_the_job() -> None:
    world = World()

    async def story() -> None:
        operator = world.operator()
        await world.go_on(operator, lambda: world.status.get("phase") == "Training")
        entry = next(each for each in world.platform.peek(PRL) if each["spec"]["client"] == "b")
        world.platform.put(PRL, {**entry, "status": {**entry["status"], "manifestSha256": "f" * 64}})
        await world.go_on(operator, world.ended)

    asyncio.run(story())
    assert world.status["phase"] == "Failed"
    assert "second release" in world.failed()["message"]
    assert world.recorder.reasons["SecondRelease"]


def test_jobs_of_an_earlier_job_of_the_same_name_are_removed() -> None:
    world = World(lambda pod, child: None)

    async def story() -> None:
        operator = world.operator()
        await world.go_on(operator, lambda: len(world.platform.peek(POD)) == 2)
        world.platform.remove(FDJ, "research", "job")  # somebody took the finalizer away
        await world.look(operator)

    asyncio.run(story())
    assert world.platform.peek(JOB) == []


# ---- progress and what is counted --------------------------------------------------------------------------------


def test_a_running_trainings_progress_reaches_the_status_and_a_finished_job_is_asked_no_more() -> None:
    async def story() -> None:
        trained = False

        def outcome(pod: Object, child: Object) -> tuple[int, str] | None:
            waits = child["metadata"]["labels"]["feddiff.dev/stage"] == "train-shared" and not trained
            return None if waits else world.good(pod, child)

        world = World(outcome)
        operator = world.operator()

        def training() -> bool:
            """The shared training is all that runs."""
            stages = {each["stage"]: each for each in world.status.get("stages", [])}
            return bool(stages and stages["train-shared"]["running"] and stages["train-personal"]["succeeded"] == 2)

        await world.go_on(operator, training)
        for pod in world.platform.peek(POD):
            rank = pod["metadata"]["labels"]["batch.kubernetes.io/job-completion-index"]
            world.platform.put(POD, {**pod, "status": {**pod["status"], "podIP": f"10.0.0.{int(rank) + 1}"}})
        await world.look(operator)
        before, version = world.status["progress"], world.platform.version
        assert await operator.progress.round() == [] and world.platform.version == version, "nobody answers"

        for images in (500_000, 1_000_000):
            world.told = {"10.0.0.1": StageProgress(stage=Stage.TRAIN_SHARED, done=images, total=2_000_000)}
            assert await operator.progress.round() == [("research", "job")]
            world.now += timedelta(minutes=10)
        await world.look(operator)
        assert {each["stage"]: each["percent"] for each in world.status["stages"]}["train-shared"] == 50
        assert world.status["progress"] > before and "eta" in world.status
        version = world.platform.version
        await world.look(operator)
        assert world.platform.version == version, "the same is not written twice"

        trained = True
        await world.go_on(operator, world.ended)
        await world.look(operator)
        world.told = {"10.0.0.1": StageProgress(stage=Stage.TRAIN_SHARED, done=1, total=2)}
        assert operator.progress.of("research", "job") == {} and await operator.progress.round() == []
        assert (world.status["progress"], "eta" in world.status) == ("100 %", False)

    asyncio.run(story())


def test_charges_and_ended_attempts_are_counted_once() -> None:
    world = World()
    asyncio.run(world.go_on(world.operator(), world.ended))
    families = text_string_to_metric_families(world.metrics.exposition().decode())
    samples = [sample for family in families for sample in family.samples]
    assert [sample.value for sample in samples if sample.name == "feddiff_privacy_releases_total"] == [2]
    ended = {
        (sample.labels["stage"], sample.labels["result"]): sample.value
        for sample in samples
        if sample.name == "feddiff_stage_duration_seconds_count"
    }
    of_clients = {(stage.value, "succeeded"): 2 for stage in Stage}
    assert ended == {**of_clients, ("train-shared", "succeeded"): 1, ("report", "succeeded"): 1}
