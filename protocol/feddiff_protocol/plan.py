"""The order of a run, stated once: what to do next, and what to say about it, from what is observed.

A job reserves privacy budget with every client and then charges it, each client releases, the shared
denoiser is trained on the releases that count while each owner trains its personal one, each owner samples
and evaluates, and the job's report closes it. `plan` is pure and level-triggered: it may be asked again at
any time, after any crash, and asks for nothing that is already under way. The operator and the engines on one
machine carry out the same actions.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from .api import FederatedDiffusionJob
from .errors import FINAL_EXIT_CODES
from .stages import Receipt, ReleaseReference, Stage

OWNER_STAGES = (Stage.TRAIN_PERSONAL, Stage.SAMPLE, Stage.EVALUATE)


class JobPhase(StrEnum):
    PENDING = "Pending"
    RESERVING = "Reserving"
    RELEASING = "Releasing"
    TRAINING = "Training"
    SAMPLING = "Sampling"
    EVALUATING = "Evaluating"
    SUSPENDED = "Suspended"
    COMPLETE = "Complete"
    FAILED = "Failed"


class Hold(StrEnum):
    """What a client's ledger says about this job."""

    NONE = "None"
    RESERVED = "Reserved"  # pending or with an entry: nothing has started, it may still be given back
    CHARGED = "Charged"
    RETURNED = "Returned"


class StagePhase(StrEnum):
    RUNNING = "Running"
    SUCCEEDED = "Succeeded"
    FAILED = "Failed"
    STOPPED = "Stopped"  # interrupted or lost with its platform: continued, and not held against the stage


@dataclass(frozen=True)
class StageObserved:
    """The newest attempt of one stage, and how many attempts before and including it count as failures."""

    phase: StagePhase
    attempt: int
    num_failures: int = 0
    exit_code: int | None = None
    message: str = ""
    receipt: Receipt | None = None


@dataclass(frozen=True)
class ClientObserved:
    hold: Hold = Hold.NONE
    refusal: str = ""  # the ledger's words when it does not admit this job


StageKey = tuple[Stage, str]  # the client is "" for train-shared and report


@dataclass(frozen=True)
class Observed:
    clients: Mapping[str, ClientObserved]
    stages: Mapping[StageKey, StageObserved] = field(default_factory=dict)
    counted: tuple[str, ...] = ()  # the clients whose releases count, once that was decided; from the status
    release_deadline_passed: bool = False


@dataclass(frozen=True)
class Reserve:
    client: str


@dataclass(frozen=True)
class ChargeReservation:
    client: str


@dataclass(frozen=True)
class GiveBack:
    client: str


@dataclass(frozen=True)
class Start:
    stage: Stage
    client: str
    attempt: int


@dataclass(frozen=True)
class Stop:
    stage: Stage
    client: str


Action = Reserve | ChargeReservation | GiveBack | Start | Stop


@dataclass(frozen=True)
class Condition:
    type: str
    status: bool
    reason: str
    message: str = ""


@dataclass(frozen=True)
class Status:
    phase: JobPhase
    conditions: tuple[Condition, ...]
    counted: tuple[str, ...] = ()
    dropped: Mapping[str, str] = field(default_factory=dict)  # client → why it no longer takes part

    def condition(self, kind: str) -> Condition:
        return next(condition for condition in self.conditions if condition.type == kind)


@dataclass(frozen=True)
class Plan:
    actions: tuple[Action, ...]
    status: Status


def plan(job: FederatedDiffusionJob, observed: Observed) -> Plan:
    """What to do next for `job`, and its status. Never asks for a release that is not charged."""
    run = _Run(job, observed)
    if run.report_done:
        return run.rest(JobPhase.COMPLETE, "Finished", "every stage is done")
    if failure := run.failure():
        return run.end(*failure)
    if job.spec.suspend:
        return run.suspended()
    if not run.counted:
        return run.reserve() or run.charge() or run.release()
    return run.after_release()


class _Run:
    """One job and what is observed of it, as the questions that `plan` asks."""

    def __init__(self, job: FederatedDiffusionJob, observed: Observed) -> None:
        self.spec = job.spec
        self.observed = observed
        self.names = [client.name for client in job.spec.clients]
        self.dropped = {name: why for name in self.names if (why := self._why_dropped(name))}
        self.taking_part = [name for name in self.names if name not in self.dropped]
        self.counted = observed.counted or self._count_releases()
        self.counting = [name for name in self.counted if name not in self.dropped]

    # -- what is observed

    def stage(self, stage: Stage, client: str = "") -> StageObserved | None:
        return self.observed.stages.get((stage, client))

    def done(self, stage: Stage, client: str = "") -> bool:
        seen = self.stage(stage, client)
        return seen is not None and seen.phase is StagePhase.SUCCEEDED

    def hold(self, client: str) -> Hold:
        return self.observed.clients.get(client, ClientObserved()).hold

    @property
    def report_done(self) -> bool:
        return self.done(Stage.REPORT)

    def _why_dropped(self, client: str) -> str:
        refusal = self.observed.clients.get(client, ClientObserved()).refusal
        if refusal:
            return refusal
        for stage in (Stage.RELEASE, *OWNER_STAGES):
            if gone := self._gave_up(stage, client):
                return gone
        return ""

    def _gave_up(self, stage: Stage, client: str) -> str:
        """Why no further attempt will be made, or nothing."""
        seen = self.stage(stage, client)
        if seen is None or seen.phase is not StagePhase.FAILED:
            return ""
        if seen.exit_code in FINAL_EXIT_CODES or seen.num_failures > self.spec.backoff_limit:
            return f"{stage} ended with exit code {seen.exit_code}: {seen.message or 'no message'}"
        return ""

    def _count_releases(self) -> tuple[str, ...]:
        released = tuple(name for name in self.taking_part if self.done(Stage.RELEASE, name))
        everyone = len(released) == len(self.taking_part)
        late = self.observed.release_deadline_passed
        return released if len(released) >= self.spec.quorum_or_all and (everyone or late) else ()

    # -- what ends the job

    def failure(self) -> tuple[str, str] | None:
        for stage in (Stage.TRAIN_SHARED, Stage.REPORT):
            if gone := self._gave_up(stage, ""):
                return "StageFailed", gone
        remaining = self.counting if self.counted else self.taking_part
        if len(remaining) < self.spec.quorum_or_all:
            refused = any(self.observed.clients.get(name, ClientObserved()).refusal for name in self.dropped)
            reason = "PrivacyBudgetExceeded" if refused else "ClientsLost"
            lost = "; ".join(f"client {name}: {why}" for name, why in self.dropped.items())
            return reason, f"{len(remaining)} of {self.spec.quorum_or_all} needed clients remain: {lost}"
        if self.observed.release_deadline_passed and not self.counted:
            return "ReleaseDeadlineExceeded", "fewer clients than the quorum had released when the deadline passed"
        return None

    def end(self, reason: str, message: str) -> Plan:
        give_back = [GiveBack(name) for name in self.names if self.hold(name) is Hold.RESERVED]
        return self._plan([*self._stop_all(), *give_back], JobPhase.FAILED, reason, message)

    def suspended(self) -> Plan:
        return self._plan(self._stop_all(), JobPhase.SUSPENDED, "Suspended", "spec.suspend is true")

    def rest(self, phase: JobPhase, reason: str, message: str) -> Plan:
        return self._plan([], phase, reason, message)

    def _stop_all(self) -> list[Action]:
        return [Stop(*key) for key, seen in self.observed.stages.items() if seen.phase is StagePhase.RUNNING]

    # -- the order

    def reserve(self) -> Plan | None:
        missing = [name for name in self.taking_part if self.hold(name) in (Hold.NONE, Hold.RETURNED)]
        if not missing:
            return None
        waiting = f"waiting for a reservation with {_listed(missing)}"
        return self._plan([Reserve(name) for name in missing], JobPhase.RESERVING, "Reserving", waiting)

    def charge(self) -> Plan | None:
        """Every client is charged before the first release starts, so nobody releases for a job that others refuse."""
        reserved = [name for name in self.taking_part if self.hold(name) is Hold.RESERVED]
        if not reserved:
            return None
        actions = [ChargeReservation(name) for name in reserved]
        return self._plan(actions, JobPhase.RESERVING, "Charging", f"charging {_listed(reserved)}")

    def release(self) -> Plan:
        waiting = [name for name in self.taking_part if not self.done(Stage.RELEASE, name)]
        actions = self._start(Stage.RELEASE, waiting)
        return self._plan(actions, JobPhase.RELEASING, "Releasing", f"waiting for the releases of {_listed(waiting)}")

    def after_release(self) -> Plan:
        late = [name for name in self.names if name not in self.counted and self._running(Stage.RELEASE, name)]
        actions: list[Action] = [Stop(Stage.RELEASE, name) for name in late]
        actions += self._start(Stage.TRAIN_SHARED, [""])
        actions += self._start(Stage.TRAIN_PERSONAL, self.counting)
        trained = [name for name in self.counting if self.done(Stage.TRAIN_PERSONAL, name)]
        if self.done(Stage.TRAIN_SHARED):
            actions += self._start(Stage.SAMPLE, trained)
            actions += self._start(Stage.EVALUATE, [name for name in trained if self.done(Stage.SAMPLE, name)])
        evaluated = [name for name in self.counting if self.done(Stage.EVALUATE, name)]
        if self.done(Stage.TRAIN_SHARED) and len(evaluated) == len(self.counting):
            actions += self._start(Stage.REPORT, [""])
        return self._plan(actions, *self._phase_after_release(trained, evaluated))

    def _phase_after_release(self, trained: Sequence[str], evaluated: Sequence[str]) -> tuple[JobPhase, str, str]:
        if not self.done(Stage.TRAIN_SHARED) or len(trained) < len(self.counting):
            personal = f"personal denoisers {len(trained)}/{len(self.counting)}"
            shared = "done" if self.done(Stage.TRAIN_SHARED) else "in training"
            return JobPhase.TRAINING, "Training", f"shared denoiser {shared}, {personal}"
        sampled = [name for name in self.counting if self.done(Stage.SAMPLE, name)]
        if len(sampled) < len(self.counting):
            return JobPhase.SAMPLING, "Sampling", f"samples {len(sampled)}/{len(self.counting)}"
        return JobPhase.EVALUATING, "Evaluating", f"evaluations {len(evaluated)}/{len(self.counting)}, then the report"

    def _running(self, stage: Stage, client: str) -> bool:
        seen = self.stage(stage, client)
        return seen is not None and seen.phase is StagePhase.RUNNING

    def _start(self, stage: Stage, clients: Sequence[str]) -> list[Action]:
        """The next attempt of `stage` for every client of which none is running or done."""
        actions: list[Action] = []
        for client in clients:
            seen = self.stage(stage, client)
            if seen is None:
                actions.append(Start(stage, client, 1))
            elif seen.phase in (StagePhase.FAILED, StagePhase.STOPPED) and not self._gave_up(stage, client):
                actions.append(Start(stage, client, seen.attempt + 1))
        return actions

    # -- the status

    def _plan(self, actions: Sequence[Action], phase: JobPhase, reason: str, message: str) -> Plan:
        for action in actions:
            if isinstance(action, Start) and action.stage is Stage.RELEASE:
                assert self.hold(action.client) is Hold.CHARGED, "a release may start only after its charge"
        status = Status(phase, self._conditions(phase, reason, message), self.counted, self.dropped)
        return Plan(tuple(actions), status)

    def _conditions(self, phase: JobPhase, reason: str, message: str) -> tuple[Condition, ...]:
        holds = [self.hold(name) for name in self.taking_part]
        reached = {
            "Accepted": True,
            "BudgetReserved": bool(holds) and all(hold in (Hold.RESERVED, Hold.CHARGED) for hold in holds),
            "Released": bool(self.counted),
            "SharedTrained": self.done(Stage.TRAIN_SHARED),
            "PersonalTrained": self._all_counting(Stage.TRAIN_PERSONAL),
            "Evaluated": self._all_counting(Stage.EVALUATE),
            "Suspended": phase is JobPhase.SUSPENDED,
            "Complete": phase is JobPhase.COMPLETE,
            "Failed": phase is JobPhase.FAILED,
        }
        return tuple(
            Condition(
                kind, true, kind if true and kind != "Failed" else reason, "" if true and kind != "Failed" else message
            )
            for kind, true in reached.items()
        )

    def _all_counting(self, stage: Stage) -> bool:
        return bool(self.counting) and all(self.done(stage, name) for name in self.counting)


def releases_that_count(observed: Observed, counted: Sequence[str]) -> tuple[ReleaseReference, ...]:
    """The counted clients' manifests, in the order of the job's clients, hashes taken from their receipts."""
    references = []
    for client in counted:
        seen = observed.stages[(Stage.RELEASE, client)]
        assert seen.receipt is not None, "a succeeded release has a receipt"
        references.append(ReleaseReference(client=client, manifest_sha256=seen.receipt.outputs["manifest"]))
    return tuple(references)


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(names[:5])
    return shown if len(names) <= 5 else f"{shown} and {len(names) - 5} more"
