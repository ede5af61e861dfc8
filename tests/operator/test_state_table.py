"""Every phase × every event: docs/state-table.md is what the code does, and a cluster full of trouble always leads to
an end with a documented reason, or to a wait in words; never to silence."""

import copy
import functools
import random
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batch_objects import (
    NOW,
    SETTING,
    UID,
    batch_job,
    dataset,
    disruption,
    job,
    pod,
    receipt,
    text,
    unscheduled,
    with_condition,
)
from feddiff_operator import endings
from feddiff_operator.clients import client_observed
from feddiff_operator.endings import record_of, stopping
from feddiff_operator.observe import (
    children_of,
    deadlines,
    releasing_since,
    retry_at,
    stages_observed,
    with_recorded_release,
)
from feddiff_operator.status import ended, job_status
from feddiff_operator.waiting import waiting
from feddiff_protocol import plan as planning
from feddiff_protocol.api import FederatedDiffusionJob, PrivateDataset
from feddiff_protocol.plan import (
    CONDITIONS,
    HINDERS_STARTS,
    WAITED_FOR,
    Action,
    ChargeReservation,
    GiveBack,
    Hold,
    JobPhase,
    Observed,
    Plan,
    Reason,
    Reserve,
    StagePhase,
    Start,
    Stop,
    plan,
)
from feddiff_protocol.stages import Stage

Object = dict[str, Any]
PAGE = (Path(__file__).parents[2] / "docs" / "state-table.md").read_text()
SPEC: Object = {
    "deadlines": {"releaseSeconds": 3600, "startSeconds": 600, "stageSeconds": 1800},
    "backoffLimit": 3,
    "shared": {"replicas": 2},
}


@dataclass
class World:
    """A cluster with one job: the operator's looks, the Job controller's steps, and whatever else may happen."""

    asked: FederatedDiffusionJob = field(default_factory=lambda: job("ab", **SPEC))
    draw: random.Random = field(default_factory=lambda: random.Random(0))
    now: datetime = NOW
    children: dict[str, Object] = field(default_factory=dict)
    pods: dict[str, Object] = field(default_factory=dict)
    stuck: set[str] = field(default_factory=set)  # pods on a node that does not answer
    unseen: set[str] = field(default_factory=set)  # Jobs whose pods vanished before anybody looked

    def __post_init__(self) -> None:
        names = [each.name for each in self.asked.spec.clients]
        self.datasets: dict[str, PrivateDataset | None] = {name: dataset(name) for name in names}
        self.holds = dict.fromkeys(names, Hold.NONE)
        self.refusals: dict[str, str] = {}
        self.manifests: dict[str, str] = {}
        self.releasing_since: datetime | None = None
        self.found: Object = {"metadata": {"name": "digits", "generation": 1}, "spec": self.asked.to_wire()["spec"]}

    # -- the operator

    def observed(self) -> Observed:
        jobs, pods = children_of(self.asked, UID, self.children.values()), list(self.pods.values())
        stages = stages_observed(jobs, pods, self.now)
        clients = {}
        for name in self.holds:
            seen = stages.get((Stage.RELEASE, name))
            if seen is not None and seen.receipt is not None:
                self.manifests[name] = seen.receipt.outputs["manifest"]
            stages = with_recorded_release(stages, UID, name, self.manifests.get(name, ""))
            refusal = self.refusals.get(name, "") if self.holds[name] is not Hold.CHARGED else ""
            clients[name] = client_observed(self.asked, name, self.datasets[name], self.holds[name], refusal, SETTING)
        self.releasing_since = self.releasing_since or releasing_since(jobs, pods)
        since, limit = self.releasing_since, self.asked.spec.deadlines.release_seconds
        late = since is not None and limit is not None and self.now >= since + timedelta(seconds=limit)
        counted = tuple(self.found.get("status", {}).get("counted", ()))
        words = tuple(waiting(jobs, pods, self.now))
        reserving = self.asked.spec.deadlines.reservation_seconds
        too_late = reserving is not None and self.now >= NOW + timedelta(seconds=reserving)
        left_out = tuple(self.found.get("status", {}).get("leftOut", ()))
        return Observed(clients, stages, counted, left_out, too_late, late, words)

    def look(self, crash: float = 0.0) -> Plan | None:
        """One reconcile, which may die between any two of its writes; it keeps nothing in memory."""
        if ended(self.found):
            return None
        for child in self.children.values():
            child["metadata"]["annotations"] |= record_of(child, self.pods.values()) or {}
        for limit in deadlines(self.asked, self.children.values(), self.pods.values()):
            if limit.at <= self.now:
                self.stop(limit.name, limit.annotations)
        observed = self.observed()
        decision = plan(self.asked, observed)
        check_speaks(decision, observed)
        final = decision.status.phase in (JobPhase.COMPLETE, JobPhase.FAILED)
        if not final:
            self.publish(decision, observed)
        for action in decision.actions:
            if self.draw.random() < crash:
                return decision
            self.carry_out(action)
        if final:
            self.publish(decision, observed)
        return decision

    def publish(self, decision: Plan, observed: Observed) -> None:
        jobs, since = self.children.values(), self.releasing_since
        status = job_status(
            self.found, decision.status, now=self.now, stages=observed.stages, jobs=jobs, releasing_since=since
        )
        self.found = {**self.found, "status": status}

    def carry_out(self, action: Action) -> None:
        match action:
            case Reserve(client):
                if self.holds[client] is Hold.NONE and not self.refusals.get(client):
                    self.holds[client] = Hold.RESERVED
            case ChargeReservation(client):
                assert self.holds[client] is Hold.RESERVED
                self.holds[client] = Hold.CHARGED
            case GiveBack(client):
                assert self.holds[client] is Hold.RESERVED
                self.holds[client] = Hold.RETURNED
            case Stop(stage, client):
                for name, child in self.children.items():
                    labels = child["metadata"]["labels"]
                    key = labels["feddiff.dev/stage"], labels.get("feddiff.dev/client", "")
                    if key == (stage, client) and not finished(child):
                        self.stop(name, {"feddiff.dev/stopped": "NotNeeded"})
            case Start(stage, client, attempt):
                later = retry_at(self.children.values(), self.pods.values(), self.now)
                if later.get((stage, client), self.now) <= self.now:
                    self.start(stage, client, attempt)

    def start(self, stage: Stage, client: str, attempt: int) -> None:
        if stage is Stage.RELEASE:
            assert self.holds[client] is Hold.CHARGED, "released without a charge"
        child = batch_job(stage, client, attempt, asked=self.asked, created=self.now)
        beside = [each for each in self.live_pods() if same_stage(each, child) and not self.zombie(each)]
        assert not beside, "a second attempt beside a running one"
        self.children.setdefault(child["metadata"]["name"], child)

    def zombie(self, each: Object) -> bool:
        """On a node that does not answer, and beyond the time that anybody waits for it; releases are safe from it."""
        deleted = each["metadata"].get("deletionTimestamp")
        return bool(deleted) and self.now > datetime.fromisoformat(deleted) + timedelta(seconds=60)

    def stop(self, name: str, annotations: dict[str, str]) -> None:
        change = stopping(annotations)
        self.children[name]["spec"] |= change["spec"]
        self.children[name]["metadata"]["annotations"] |= change["metadata"]["annotations"]

    # -- the Job controller and the kubelet

    def of(self, child: Object) -> list[Object]:
        name = child["metadata"]["name"]
        return [
            each for each in self.pods.values() if each["metadata"]["labels"]["batch.kubernetes.io/job-name"] == name
        ]

    def live_pods(self) -> list[Object]:
        return [each for each in self.pods.values() if each["status"]["phase"] in ("Pending", "Running")]

    def control(self) -> None:
        for child in list(self.children.values()):
            if not finished(child):
                self.control_one(child)
        for each in self.live_pods():  # what was asked to go, goes, unless its node is silent
            if "deletionTimestamp" in each["metadata"] and each["metadata"]["name"] not in self.stuck:
                self.end(each, 75)

    def control_one(self, child: Object) -> None:
        pods = self.of(child)
        live = [each for each in pods if each["status"]["phase"] in ("Pending", "Running")]
        if child["spec"]["suspend"]:
            for each in live:
                self.delete(each)
            if not [each for each in live if each["metadata"]["name"] not in self.stuck]:
                self.set_condition(child, "Suspended")
            return
        if child["spec"].get("activeDeadlineSeconds") == 0:
            for each in live:
                self.delete(each)
            return self.set_condition(child, "FailureTarget" if live else "Failed")
        if child["metadata"]["name"] in self.unseen:
            return self.set_condition(child, "Failed")
        if any(each["type"] == "Suspended" for each in child["status"]["conditions"]):
            child["status"] |= {"conditions": [], "startTime": text(self.now)}
            for each in pods:
                self.pods.pop(each["metadata"]["name"])
            pods = []
        if not pods:
            for index in range(child["spec"]["parallelism"]):
                made = pod(child, "Running", index=index, started=self.now)
                self.pods[made["metadata"]["name"]] = made
            return None
        gone = [each for each in pods if each["status"]["phase"] == "Failed" or "deletionTimestamp" in each["metadata"]]
        if gone:
            for each in live:
                self.delete(each)
            self.set_condition(child, "FailureTarget" if live else "Failed")
        elif not live:
            self.set_condition(child, "Complete")
        return None

    def set_condition(self, child: Object, kind: str) -> None:
        if all(each["type"] != kind for each in child["status"]["conditions"]):
            self.children[child["metadata"]["name"]] = with_condition(child, kind, self.now)

    def delete(self, each: Object) -> None:
        if "deletionTimestamp" not in each["metadata"]:
            grace = timedelta(seconds=60)
            each["metadata"] |= {"deletionTimestamp": text(self.now + grace), "deletionGracePeriodSeconds": 60}

    def end(self, each: Object, code: int, message: str = "", **more: Any) -> None:
        child = self.children.get(each["metadata"]["labels"]["batch.kubernetes.io/job-name"])
        if child is None:
            self.pods.pop(each["metadata"]["name"], None)
            return
        phase = "Succeeded" if code == 0 else "Failed"
        index = int(each["metadata"]["labels"]["batch.kubernetes.io/job-completion-index"])
        over = pod(child, phase, index=index, exit_code=code, message=message, finished=self.now, **more)
        kept = {key: each["metadata"][key] for key in each["metadata"] if key.startswith("deletion")}
        each["metadata"], each["status"] = {**over["metadata"], **kept}, over["status"]

    # -- what else happens

    def succeed(self, each: Object) -> None:
        labels = each["metadata"]["labels"]
        stage, client = Stage(labels["feddiff.dev/stage"]), labels.get("feddiff.dev/client", "")
        self.end(each, 0, receipt(stage, client, int(labels["feddiff.dev/attempt"])))

    def settle(self, looks: int = 4) -> Plan | None:
        """Looks and controller steps, without time passing."""
        decision = None
        for _ in range(looks):
            decision = self.look() or decision
            self.control()
        return self.look() or decision


def same_stage(one: Object, other: Object) -> bool:
    keys = ("feddiff.dev/stage", "feddiff.dev/client")
    return all(one["metadata"]["labels"].get(key) == other["metadata"]["labels"].get(key) for key in keys)


def finished(child: Object) -> bool:
    return any(each["type"] in ("Complete", "Failed") for each in child["status"]["conditions"])


def check_speaks(decision: Plan, observed: Observed) -> None:
    """Something is done, runs, has ended, or is waited for in words; and every condition has a documented reason."""
    status = decision.status
    runs = any(seen.phase is StagePhase.RUNNING for seen in observed.stages.values())
    over = status.phase in (JobPhase.COMPLETE, JobPhase.FAILED, JobPhase.SUSPENDED)
    words = [client.refusal for client in observed.clients.values() if client.refusal]
    waited_for = any(each[:80] in status.message for each in words)
    assert decision.actions or runs or over or waited_for, f"silence: {status}"
    assert [each.type for each in status.conditions] == [*CONDITIONS, "Failed"]
    for condition in status.conditions:
        assert f"`{condition.reason.value}`" in PAGE
        assert condition.message or condition.status


# ---- The table ---------------------------------------------------------------------------------------------------

PHASES = ("Pending", "Reserving", "Releasing", "Training", "Sampling", "Evaluating", "Suspended")
SUBJECTS = {
    "Releasing": (Stage.RELEASE, "a"),
    "Training": (Stage.TRAIN_SHARED, ""),
    "Sampling": (Stage.SAMPLE, "a"),
    "Evaluating": (Stage.EVALUATE, "a"),
}
ORDER = {
    Stage.RELEASE: "Releasing", Stage.TRAIN_SHARED: "Training", Stage.TRAIN_PERSONAL: "Training",
    Stage.SAMPLE: "Sampling", Stage.EVALUATE: "Evaluating", Stage.REPORT: "Evaluating",
}  # fmt: skip


def world_in(phase: str) -> World:
    """A world whose job is in `phase`, its subject running where the phase has one."""
    return copy.deepcopy(_world_in(phase))


@functools.cache
def _world_in(phase: str) -> World:
    world = World()
    if phase == "Pending":
        world.datasets["a"] = None
    world.look(crash=1.0)  # nothing is reserved yet
    if phase in ("Pending", "Reserving"):
        return world
    goal = "Training" if phase == "Suspended" else phase
    for _ in range(60):
        world.look()
        world.control()
        world.control()
        for each in world.live_pods():
            if PHASES.index(ORDER[Stage(each["metadata"]["labels"]["feddiff.dev/stage"])]) < PHASES.index(goal):
                world.succeed(each)
    if phase == "Suspended":
        suspend(world, True)
        world.settle()
    assert world.found["status"]["phase"] == phase
    return world


def suspend(world: World, value: bool) -> None:
    world.asked = world.asked.model_copy(update={"spec": world.asked.spec.model_copy(update={"suspend": value})})


def subject(world: World) -> Object | None:
    """The newest batch Job of the phase's stage."""
    wanted = SUBJECTS.get(world.found["status"]["phase"])
    for child in reversed(list(world.children.values())):
        labels = child["metadata"]["labels"]
        if wanted == (labels["feddiff.dev/stage"], labels.get("feddiff.dev/client", "")):
            return child
    return None


def on_pods(act: Callable[[World, Object], None]) -> Callable[[World, Object], None]:
    def event(world: World, child: Object) -> None:
        act(world, world.of(child)[0])

    return event


def exits(code: int, **more: Any) -> Callable[[World, Object], None]:
    return on_pods(lambda world, each: world.end(each, code, **more))


def says(message: str) -> Callable[[World, Object], None]:
    def event(world: World, child: Object) -> None:
        for each in world.of(child):
            world.end(each, 0, message)

    return event


def waits(**more: Any) -> Callable[[World, Object], None]:
    def event(world: World, child: Object) -> None:
        for index, each in enumerate(world.of(child)):
            world.pods[each["metadata"]["name"]] = pod(child, "Pending", index=index, **more)

    return event


def waits_too_long(world: World, child: Object) -> None:
    waits(conditions=unscheduled())(world, child)
    world.now += timedelta(seconds=600)


def runs_too_long(world: World, child: Object) -> None:
    world.now += timedelta(seconds=1800)
    begin_now(world, [each for each in world.live_pods() if each not in world.of(child)])  # only the subject is slow


def begin_now(world: World, pods: list[Object]) -> None:
    for each in pods:
        if each["status"]["phase"] == "Running":
            each["status"]["containerStatuses"][0]["state"]["running"]["startedAt"] = text(world.now)


def loses_its_node(world: World, child: Object) -> None:
    each = world.of(child)[0]
    world.delete(each)
    each["status"]["conditions"] = disruption("DeletionByTaintManager")
    world.stuck.add(each["metadata"]["name"])
    world.control()
    world.control()
    world.now += timedelta(seconds=121)


def vanishes(world: World, child: Object) -> None:
    for each in world.of(child):
        del world.pods[each["metadata"]["name"]]
    world.unseen.add(child["metadata"]["name"])


def is_deleted(world: World, child: Object) -> None:
    for each in world.of(child):
        del world.pods[each["metadata"]["name"]]
    del world.children[child["metadata"]["name"]]


def queue_takes_it_back(world: World, child: Object) -> None:
    child["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] = "gpus"
    child["spec"]["suspend"] = True


def succeeds(world: World, child: Object) -> None:
    for each in world.of(child):
        world.succeed(each)


STAGE_EVENTS: dict[str, Callable[[World, Object], None]] = {
    "ends with its receipt": succeeds,
    **{f"exit {code}": exits(code) for code in (1, 64, 65, 66, 69, 73, 74, 75, 77, 78)},
    "killed (137)": exits(137),
    "out of memory": exits(137, reason="OOMKilled"),
    "no receipt": says(""),
    "malformed receipt": says("{}"),
    "another stage's receipt": says(receipt(Stage.REPORT)),
    "evicted, preempted": exits(137, conditions=disruption()),
    "node lost": loses_its_node,
    "pod deleted": on_pods(lambda world, each: world.delete(each)),
    "pod gone unseen": vanishes,
    "batch Job deleted": is_deleted,
    "unschedulable": waits(conditions=unscheduled()),
    "image cannot be pulled": waits(waits=("ImagePullBackOff", "Back-off pulling image")),
    "Secret missing": waits(waits=("CreateContainerConfigError", 'secret "x" not found')),
    "queue takes it back": queue_takes_it_back,
    "over startSeconds": waits_too_long,
    "over stageSeconds": runs_too_long,
}


def without(**of_dataset: Any) -> Callable[[World], None]:
    def event(world: World) -> None:
        world.datasets["a"] = dataset("a", **of_dataset)

    return event


def loses_dataset(world: World) -> None:
    world.datasets["a"] = None


def refuses(words: str) -> Callable[[World], None]:
    def event(world: World) -> None:
        world.refusals["a"] = words

    return event


def passes_reservation_deadline(world: World) -> None:
    """One that is set now: they can be changed while a job runs."""
    deadlines = {**SPEC["deadlines"], "reservationSeconds": 60}
    world.asked = job("ab", **{**SPEC, "deadlines": deadlines, "suspend": world.asked.spec.suspend})
    world.now += timedelta(seconds=60)


def passes_release_deadline(world: World) -> None:
    world.now += timedelta(seconds=3600)
    begin_now(world, world.live_pods())


JOB_EVENTS: dict[str, Callable[[World], None]] = {
    "spec.suspend: true": lambda world: suspend(world, True),
    "spec.suspend: false": lambda world: suspend(world, False),
    "reservation deadline": passes_reservation_deadline,
    "release deadline": passes_release_deadline,
    "budget spent by others": refuses("spent so far ε = 20"),
    "ledger contradicts itself": refuses("the ledger contradicts itself"),
    "access withdrawn": without(access=[]),
    "image no longer allowed": without(images=["another"]),
    "overlay invalid": without(podTemplate={"spec": {"hostNetwork": True}}),
    "dataset deleted": loses_dataset,
    "dataset created": without(),
    "operator restarted": lambda world: None,
}


def outcome(phase: str, event: str) -> str:
    """What becomes of a job in `phase` when `event` happens, in the table's words."""
    world = world_in(phase)
    before = subject(world)
    if event in STAGE_EVENTS:
        if before is None:
            return "–"
        STAGE_EVENTS[event](world, before)
    else:
        JOB_EVENTS[event](world)
    decision = world.settle()
    assert decision is not None
    status = decision.status
    if status.phase is JobPhase.FAILED:
        return f"Failed: {status.condition('Failed').reason}"
    if status.phase is JobPhase.SUSPENDED:
        return "–" if phase == "Suspended" else "Suspended"
    if before is not None and event in STAGE_EVENTS:
        return of_subject(world, before, decision)
    complete = status.condition("Complete").reason
    if complete in (*WAITED_FOR, *HINDERS_STARTS) and phase != "Pending":
        return f"waits: {complete}"
    return "–" if status.phase is by_itself(phase) else f"→ {status.phase}"


@functools.cache
def by_itself(phase: str) -> JobPhase:
    """Where a job in `phase` gets to without any event."""
    decision = world_in(phase).settle()
    assert decision is not None
    return decision.status.phase


def of_subject(world: World, before: Object, decision: Plan) -> str:
    labels = before["metadata"]["labels"]
    key = Stage(labels["feddiff.dev/stage"]), labels.get("feddiff.dev/client", "")
    seen = world.observed().stages.get(key)
    if seen is not None and seen.phase is StagePhase.SUCCEEDED:
        return "done"
    if seen is not None and seen.phase is StagePhase.RUNNING:
        if seen.attempt == 1 and (decision.status.condition("Complete").reason is Reason.WAITING):
            return "waits in words"
        return "again, not counted" if before["metadata"]["uid"] else "–"
    assert seen is not None and any(isinstance(each, Start) and each.stage is key[0] for each in decision.actions)
    return f"again, {'counted' if seen.num_failures else 'not counted'}"


def table() -> str:
    lines = [f"| event | {' | '.join(PHASES)} |", "|---" * (len(PHASES) + 1) + "|"]
    for event in (*STAGE_EVENTS, *JOB_EVENTS):
        lines.append(f"| {event} | {' | '.join(outcome(phase, event) for phase in PHASES)} |")
    return "\n".join(lines)


def test_the_page_says_what_the_code_does() -> None:
    written = re.findall(r"^\| .* \|$|^\|---.*\|$", PAGE.split("## Every phase and every event")[1], flags=re.MULTILINE)
    assert "\n".join(written[: len(STAGE_EVENTS) + len(JOB_EVENTS) + 2]) == table()


def test_a_platform_loss_that_counted_as_a_failure_would_change_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    assert outcome("Training", "evicted, preempted") == "again, not counted"
    monkeypatch.setattr(endings, "_taken", lambda pod: "")
    assert outcome("Training", "evicted, preempted") == "again, counted"


def test_every_reason_has_its_line_on_the_page() -> None:
    listed = re.findall(r"^\| `(\w+)` \|", PAGE, flags=re.MULTILINE)
    assert listed == [reason.value for reason in Reason]


@pytest.mark.parametrize("end", ["Complete", "Failed"])
@pytest.mark.parametrize("event", list(JOB_EVENTS))
def test_an_ended_job_stays_as_it_is(end: str, event: str) -> None:
    world = world_in("Evaluating")
    if end == "Failed":
        world.datasets["a"] = dataset("a", access=[])
        world.settle()
    for _ in range(40):
        for each in world.live_pods():
            world.succeed(each)
        world.settle(1)
    assert world.found["status"]["phase"] == end
    before = copy.deepcopy(world.found)
    JOB_EVENTS[event](world)
    assert world.settle() is None
    assert world.found == before


# ---- Any trouble, in any order -----------------------------------------------------------------------------------


def trouble(world: World) -> None:
    """One thing that happens to a real cluster."""
    draw = world.draw
    world.now += timedelta(seconds=draw.choice([1, 5, 60, 400]))
    running = [child for child in world.children.values() if not finished(child) and world.of(child)]
    kind = draw.random()
    if running and kind < 0.75:
        child = draw.choice(running)
        if "feddiff.dev/stopped" not in child["metadata"]["annotations"]:
            event = draw.choice(list(STAGE_EVENTS.values()) + [succeeds] * 20)
            event(world, child)
    elif kind < 0.85:
        for child in world.children.values():  # its queue admits it again, and what we have stopped, too
            child["spec"]["suspend"] = False
    elif kind < 0.92:
        suspend(world, draw.random() < 0.3)
    elif kind < 0.97:
        name = draw.choice(list(world.datasets))
        world.datasets[name] = draw.choice([dataset(name)] * 6 + [None, dataset(name, access=[]),
                                            dataset(name, images=["x"])])  # fmt: skip
    else:
        name = draw.choice(list(world.datasets))
        world.refusals[name] = draw.choice(["", "", "spent so far ε = 20", "the ledger contradicts itself"])


def calm(world: World) -> None:
    """From now on everything goes well: pods run and succeed, silent nodes come back, queues admit."""
    world.now += timedelta(seconds=301)
    world.stuck.clear()
    for child in world.children.values():
        child["spec"]["suspend"] = False
    for each in world.live_pods():
        if "deletionTimestamp" not in each["metadata"]:
            world.succeed(each)


def live_through(seed: int, num_troubles: int, names: str, quorum: int, crash: float) -> World:
    draw = random.Random(seed)
    world = World(job(names, quorum=quorum, **SPEC), draw)
    for _ in range(num_troubles):
        world.look(crash)
        world.control()
        trouble(world)
    suspend(world, False)
    for _ in range(120):
        world.look()
        world.control()
        calm(world)
        if ended(world.found) and not world.live_pods():
            break
    return world


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 10**9), st.integers(0, 60), st.integers(1, 3), st.integers(1, 3), st.sampled_from([0.0, 0.2]))
def test_whatever_happens_a_job_ends_with_a_reason_or_waits_for_its_owners_in_words(
    seed: int, num_troubles: int, num_clients: int, quorum: int, crash: float
) -> None:
    names = "abc"[:num_clients]
    world = live_through(seed, num_troubles, names, min(quorum, num_clients), crash)
    status = world.found["status"]
    if not ended(world.found):
        (complete,) = [each for each in status["conditions"] if each["type"] == "Complete"]
        assert complete["reason"] in (*WAITED_FOR, *HINDERS_STARTS), status
        return
    assert not world.live_pods(), "an ended job leaves nothing running"
    assert Hold.RESERVED not in world.holds.values(), "an ended job holds nothing back"
    assert status["completionTime"] and status["message"]


def test_both_ends_and_the_wait_are_common() -> None:
    phases = [live_through(seed, 30, "ab", 1 + seed % 2, 0.1).found["status"]["phase"] for seed in range(80)]
    assert min(phases.count("Complete"), phases.count("Failed")) > 3
    assert set(phases) > {"Complete", "Failed"}


def test_a_planner_that_forgets_a_failed_stage_would_fall_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning._Run, "failure", lambda self: None)
    world = world_in("Training")
    shared = subject(world)
    assert shared is not None
    exits(77)(world, shared)
    with pytest.raises(AssertionError, match="silence"):
        for _ in range(10):
            world.settle()
            calm(world)


def test_a_wait_without_words_would_be_caught() -> None:
    observed = Observed({}, {})
    decision = plan(job("a"), observed)
    check_speaks(decision, observed)
    with pytest.raises(AssertionError, match="silence"):
        check_speaks(replace(decision, actions=()), observed)
