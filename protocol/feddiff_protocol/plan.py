"""The order of a run, stated once: what to do next, and what to say about it, from what is observed.

A job reserves privacy budget with every client and then charges it, each client releases, the shared
denoiser is trained on the releases that count while each owner trains its personal one, each owner samples
and evaluates, and the job's report closes it. `plan` is pure and level-triggered: it may be asked again at
any time, after any crash, and asks for nothing that is already under way. The operator and the engines on one
machine carry out the same actions.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from .api import FederatedDiffusionJob
from .errors import FINAL_EXIT_CODES
from .stages import Duration, Receipt, ReleaseReference, Stage

OWNER_STAGES = (Stage.TRAIN_PERSONAL, Stage.SAMPLE, Stage.EVALUATE)
SHOWN_WORDS = 3  # of what is waited for or tried again; a status is no log
MESSAGE_LENGTH = 1024


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


class Reason(StrEnum):
    """Every reason that a condition can have; docs/state-table.md says which event leads to which."""

    # What has come about.
    ACCEPTED = "Accepted"
    BUDGET_RESERVED = "BudgetReserved"
    RELEASED = "Released"
    SHARED_TRAINED = "SharedTrained"
    PERSONAL_TRAINED = "PersonalTrained"
    EVALUATED = "Evaluated"
    SUSPENDED = "Suspended"
    COMPLETE = "Complete"
    # What is under way.
    RESERVING = "Reserving"
    CHARGING = "Charging"
    RELEASING = "Releasing"
    TRAINING = "Training"
    SAMPLING = "Sampling"
    EVALUATING = "Evaluating"
    WAITING = "Waiting"  # for the platform: the scheduler's, kubelet's or queue's own words are the message
    RETRYING = "Retrying"  # a stage failed and its next attempt follows
    DATASET_MISSING = "DatasetMissing"  # waited for before a reservation, a loss afterwards
    LEDGER_MISMATCH = "LedgerMismatch"  # until the owner acknowledges, nothing new is admitted
    FINISHED = "Finished"
    # Why a client is lost or the job has failed.
    INVALID_SPEC = "InvalidSpec"
    INVALID_POD_TEMPLATE = "InvalidPodTemplate"
    ACCESS_DENIED = "AccessDenied"
    IMAGE_NOT_ALLOWED = "ImageNotAllowed"  # by the dataset; for a charged client waited for, as after an upgrade
    PRIVACY_BUDGET_EXCEEDED = "PrivacyBudgetExceeded"
    RESERVATION_DEADLINE_EXCEEDED = "ReservationDeadlineExceeded"
    RELEASE_DEADLINE_EXCEEDED = "ReleaseDeadlineExceeded"
    START_DEADLINE_EXCEEDED = "StartDeadlineExceeded"
    STAGE_DEADLINE_EXCEEDED = "StageDeadlineExceeded"
    STAGE_FAILED = "StageFailed"
    CLIENTS_LOST = "ClientsLost"


# What an owner can mend, so that nothing need be given up.
WAITED_FOR = (Reason.DATASET_MISSING, Reason.LEDGER_MISMATCH)
# What only keeps stages from being started once the client is charged: giving up would waste what never comes back.
HINDERS_STARTS = (Reason.DATASET_MISSING, Reason.IMAGE_NOT_ALLOWED)


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
    reason: Reason = Reason.STAGE_FAILED  # of a failure


@dataclass(frozen=True)
class ClientObserved:
    hold: Hold = Hold.NONE
    refusal: str = ""  # the ledger's words when it does not admit this job
    reason: Reason = Reason.PRIVACY_BUDGET_EXCEEDED  # of the refusal
    hindrance: str = ""  # the platform's words when it did not let us do what was last tried for this client


StageKey = tuple[Stage, str]  # the client is "" for train-shared and report


@dataclass(frozen=True)
class Observed:
    clients: Mapping[str, ClientObserved]
    stages: Mapping[StageKey, StageObserved] = field(default_factory=dict)
    counted: tuple[str, ...] = ()  # the clients whose releases count, once that was decided; from the status
    left_out: tuple[str, ...] = ()  # those that had not reserved in time, once that was decided; from the status
    reservation_deadline_passed: bool = False
    release_deadline_passed: bool = False
    waiting: tuple[str, ...] = ()  # what the platform says about stages that run by its word and not in fact


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
    reason: Reason
    message: str = ""


@dataclass(frozen=True)
class Status:
    phase: JobPhase
    conditions: tuple[Condition, ...]
    counted: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()
    dropped: Mapping[str, str] = field(default_factory=dict)  # client → why it no longer takes part
    message: str = ""  # what the phase is about, in words

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
        return run.end(JobPhase.COMPLETE, Reason.FINISHED, "every stage is done")
    if failure := run.failure():
        return run.end(JobPhase.FAILED, *failure)
    if job.spec.suspend:
        return run.suspended()
    if not run.counted:
        return run.reserve() or run.charge() or run.release()
    return run.release_again() or run.after_release()


def not_accepted(reason: Reason, message: str) -> Status:
    """The status of a job that cannot be planned, because it cannot be understood: Failed, nothing reached."""
    return Status(JobPhase.FAILED, _conditions({"Failed": True}, reason, message), message=message)


class _Run:
    """One job and what is observed of it, as the questions that `plan` asks."""

    def __init__(self, job: FederatedDiffusionJob, observed: Observed) -> None:
        self.spec = job.spec
        self.observed = observed
        self.names = [client.name for client in job.spec.clients]
        self.left_out = observed.left_out
        self._take_losses()
        if late := self._too_late_to_reserve():
            self.left_out = (*observed.left_out, *late)
            self._take_losses()
        self.counted = observed.counted or self._count_releases()
        self.counting = [name for name in self.counted if name not in self.dropped]

    def _take_losses(self) -> None:
        lost = {name: why for name in self.names if (why := self._why_dropped(name))}
        self.dropped = {name: why for name, (_, why) in lost.items()}
        self.reasons = [reason for reason, _ in lost.values()]
        self.taking_part = [name for name in self.names if name not in self.dropped]

    # -- what is observed

    def stage(self, stage: Stage, client: str = "") -> StageObserved | None:
        return self.observed.stages.get((stage, client))

    def done(self, stage: Stage, client: str = "") -> bool:
        seen = self.stage(stage, client)
        return seen is not None and seen.phase is StagePhase.SUCCEEDED

    def hold(self, client: str) -> Hold:
        return self.observed.clients.get(client, ClientObserved()).hold

    def client(self, client: str) -> ClientObserved:
        return self.observed.clients.get(client, ClientObserved())

    def started(self, client: str) -> bool:
        return any(client == of for _, of in self.observed.stages)

    @property
    def report_done(self) -> bool:
        return self.done(Stage.REPORT)

    def _why_dropped(self, client: str) -> tuple[Reason, str] | None:
        """Reason and words when a client takes part no longer. Not its budget, once that is held; and a ledger that
        needs its owner is waited for. What is through with its part is not asked again."""
        if self.done(Stage.EVALUATE, client):
            return None
        seen = self.client(client)
        if client in self.observed.left_out:
            return Reason.RESERVATION_DEADLINE_EXCEEDED, "its budget was not reserved by deadlines.reservationSeconds"
        if client in self.left_out:
            return Reason.RESERVATION_DEADLINE_EXCEEDED, seen.refusal or seen.hindrance
        if seen.refusal and self._drops(seen, client):
            return self._reason_to_drop(seen), seen.refusal
        gone = (self._gave_up(stage, client) for stage in (Stage.RELEASE, *OWNER_STAGES))
        return next((why for why in gone if why), None)

    @staticmethod
    def _reason_to_drop(seen: ClientObserved) -> Reason:
        """We gave back what the ledger refuses to reserve twice: its budget is not why, whatever else was."""
        given_back = seen.hold is Hold.RETURNED and seen.reason is Reason.PRIVACY_BUDGET_EXCEEDED
        return Reason.CLIENTS_LOST if given_back else seen.reason

    def _too_late_to_reserve(self) -> tuple[str, ...]:
        """Who is left out from now on: those not charged by the deadline that something is said to hinder. Not once a
        release has begun, nor where somebody's charge would be wasted because too few are left."""
        begun = any(stage is Stage.RELEASE for stage, _ in self.observed.stages)
        if not self.observed.reservation_deadline_passed or begun or self.observed.counted:
            return ()
        late = tuple(name for name in self.taking_part if self._held_up(self.client(name)))
        charged = any(self.hold(name) is Hold.CHARGED for name in self.taking_part)
        return late if not charged or len(self.taking_part) - len(late) >= self.spec.quorum_or_all else ()

    @staticmethod
    def _held_up(seen: ClientObserved) -> bool:
        waits_for_owner = bool(seen.refusal) and seen.reason in WAITED_FOR
        return seen.hold is not Hold.CHARGED and (waits_for_owner or bool(seen.hindrance))

    def _drops(self, seen: ClientObserved, client: str) -> bool:
        match seen.reason:
            case Reason.DATASET_MISSING:
                return self.started(client)
            case Reason.LEDGER_MISMATCH:
                return False
            case Reason.IMAGE_NOT_ALLOWED:
                return seen.hold is not Hold.CHARGED
            case Reason.PRIVACY_BUDGET_EXCEEDED:
                return seen.hold not in (Hold.RESERVED, Hold.CHARGED)
        return True

    def _gave_up(self, stage: Stage, client: str) -> tuple[Reason, str] | None:
        """Why no further attempt will be made, or nothing."""
        seen = self.stage(stage, client)
        if seen is None or seen.phase is not StagePhase.FAILED:
            return None
        if seen.exit_code in FINAL_EXIT_CODES or seen.num_failures > self.spec.backoff_limit:
            return seen.reason, _failure_words(stage, seen)
        return None

    def _count_releases(self) -> tuple[str, ...]:
        released = tuple(name for name in self.taking_part if self.done(Stage.RELEASE, name))
        everyone = len(released) == len(self.taking_part)
        late = self.observed.release_deadline_passed
        return released if len(released) >= self.spec.quorum_or_all and (everyone or late) else ()

    # -- what ends the job

    def failure(self) -> tuple[Reason, str] | None:
        for stage in (Stage.TRAIN_SHARED, Stage.REPORT):
            if gone := self._gave_up(stage, ""):
                return gone
        remaining = self.counting if self.counted else self.taking_part
        if len(remaining) < self.spec.quorum_or_all:
            return self._reason_of_losses(), (
                f"{len(remaining)} of {self.spec.quorum_or_all} needed clients remain: {self._losses()}"
            )
        lost = [name for name in self.unreleased() if name in self.dropped or self.hold(name) is not Hold.CHARGED]
        if lost:
            return Reason.CLIENTS_LOST, f"the counted releases of {_listed(lost)} can no longer be had"
        if self.observed.release_deadline_passed and not self.counted:
            return (
                Reason.RELEASE_DEADLINE_EXCEEDED,
                "fewer clients than the quorum had released when the deadline passed",
            )
        return None

    def _reason_of_losses(self) -> Reason:
        """A refusal before everything else; then what all losses have in common, apart from what followed from one."""
        if Reason.PRIVACY_BUDGET_EXCEEDED in self.reasons:
            return Reason.PRIVACY_BUDGET_EXCEEDED
        if Reason.ACCESS_DENIED in self.reasons:
            return Reason.ACCESS_DENIED
        common = set(self.reasons) - {Reason.CLIENTS_LOST}
        return common.pop() if len(common) == 1 and common != {Reason.STAGE_FAILED} else Reason.CLIENTS_LOST

    def _losses(self) -> str:
        causes_first = sorted(self.dropped.items(), key=lambda each: self.hold(each[0]) is Hold.RETURNED)
        shown = [f"client {name}: {why}" for name, why in causes_first[:5]]
        more = len(self.dropped) - len(shown)
        return "; ".join([*shown, f"and {more} more"] if more else shown)

    def end(self, phase: JobPhase, reason: Reason, message: str) -> Plan:
        give_back = [GiveBack(name) for name in self.names if self.hold(name) is Hold.RESERVED]
        return self._plan([*self._stop_all(), *give_back], phase, reason, message)

    def suspended(self) -> Plan:
        return self._plan(self._stop_all(), JobPhase.SUSPENDED, Reason.SUSPENDED, "spec.suspend is true")

    def _stop_all(self) -> list[Action]:
        return [Stop(*key) for key, seen in self.observed.stages.items() if seen.phase is StagePhase.RUNNING]

    def _dismiss(self) -> list[Action]:
        """What was begun for clients that are dropped, or came too late, is stopped and given back."""
        wanted = self.counting if self.counted else self.taking_part
        actions: list[Action] = [
            Stop(stage, client)
            for (stage, client), seen in self.observed.stages.items()
            if seen.phase is StagePhase.RUNNING and client and client not in wanted
        ]
        actions += [GiveBack(name) for name in self.dropped if self.hold(name) is Hold.RESERVED]
        return actions

    # -- the order

    def reserve(self) -> Plan | None:
        missing = [name for name in self.taking_part if self.hold(name) in (Hold.NONE, Hold.RETURNED)]
        if not missing:
            return None
        blocked = {name: self.client(name) for name in missing if self.client(name).refusal}
        actions = [*self._dismiss(), *(Reserve(name) for name in missing if name not in blocked)]
        if not blocked:
            waiting = f"waiting for a reservation with {_listed(missing)}"
            return self._plan(actions, JobPhase.RESERVING, Reason.RESERVING, waiting)
        words = "; ".join(f"client {name}: {seen.refusal}" for name, seen in list(blocked.items())[:SHOWN_WORDS])
        phase = JobPhase.PENDING if len(blocked) == len(missing) else JobPhase.RESERVING
        return self._plan(actions, phase, next(iter(blocked.values())).reason, f"waiting: {words}")

    def charge(self) -> Plan | None:
        """Every client is charged before the first release starts, so nobody releases for a job that others refuse."""
        reserved = [name for name in self.taking_part if self.hold(name) is Hold.RESERVED]
        if not reserved:
            return None
        blocked = {name: self.client(name) for name in reserved if self.client(name).refusal}
        blocked = {name: seen for name, seen in blocked.items() if seen.reason in WAITED_FOR}
        if blocked:
            words = "; ".join(f"client {name}: {seen.refusal}" for name, seen in list(blocked.items())[:SHOWN_WORDS])
            reason = next(iter(blocked.values())).reason
            return self._plan(self._dismiss(), JobPhase.RESERVING, reason, f"waiting: {words}")
        actions = [*self._dismiss(), *(ChargeReservation(name) for name in reserved)]
        return self._plan(actions, JobPhase.RESERVING, Reason.CHARGING, f"charging {_listed(reserved)}")

    def release(self) -> Plan:
        waiting = [name for name in self.taking_part if not self.done(Stage.RELEASE, name)]
        actions = [*self._dismiss(), *self._start(Stage.RELEASE, waiting)]
        message = f"waiting for the releases of {_listed(waiting)}"
        return self._plan(actions, JobPhase.RELEASING, Reason.RELEASING, message)

    def unreleased(self) -> list[str]:
        """Counted clients whose receipts are gone, as when somebody deleted the record of their release."""
        return [name for name in self.counted if not self.done(Stage.RELEASE, name)]

    def release_again(self) -> Plan | None:
        """The sealed bytes are sent again, so that everybody learns their hash; nothing new is drawn."""
        if not (gone := self.unreleased()):
            return None
        actions = [*self._dismiss(), *self._start(Stage.RELEASE, gone)]
        message = f"waiting for the sealed releases of {_listed(gone)} once more: their receipts are gone"
        return self._plan(actions, JobPhase.RELEASING, Reason.RELEASING, message)

    def after_release(self) -> Plan:
        actions = self._dismiss()
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

    def _phase_after_release(self, trained: Sequence[str], evaluated: Sequence[str]) -> tuple[JobPhase, Reason, str]:
        if not self.done(Stage.TRAIN_SHARED) or len(trained) < len(self.counting):
            personal = f"personal denoisers {len(trained)}/{len(self.counting)}"
            shared = "done" if self.done(Stage.TRAIN_SHARED) else "in training"
            return JobPhase.TRAINING, Reason.TRAINING, f"shared denoiser {shared}, {personal}"
        sampled = [name for name in self.counting if self.done(Stage.SAMPLE, name)]
        if len(sampled) < len(self.counting):
            return JobPhase.SAMPLING, Reason.SAMPLING, f"samples {len(sampled)}/{len(self.counting)}"
        message = f"evaluations {len(evaluated)}/{len(self.counting)}, then the report"
        return JobPhase.EVALUATING, Reason.EVALUATING, message

    def _start(self, stage: Stage, clients: Sequence[str]) -> list[Action]:
        """The next attempt of `stage` for every client of which none is running or done."""
        actions: list[Action] = []
        for client in clients:
            if self._hindered(client):
                continue
            seen = self.stage(stage, client)
            if seen is None:
                actions.append(Start(stage, client, 1))
            elif seen.phase in (StagePhase.FAILED, StagePhase.STOPPED) and not self._gave_up(stage, client):
                actions.append(Start(stage, client, seen.attempt + 1))
        return actions

    # -- the status

    def _plan(self, actions: Sequence[Action], phase: JobPhase, reason: Reason, message: str) -> Plan:
        for action in actions:
            if isinstance(action, Start) and action.stage is Stage.RELEASE:
                assert self.hold(action.client) is Hold.CHARGED, "a release may start only after its charge"
        if phase not in (JobPhase.COMPLETE, JobPhase.FAILED, JobPhase.SUSPENDED):
            reason, message = self._with_what_hinders(actions, reason, message)
        message = _shortened(message)
        conditions = _conditions(self._reached(phase), reason, message)
        return Plan(tuple(actions), Status(phase, conditions, self.counted, self.left_out, self.dropped, message))

    def _with_what_hinders(self, actions: Sequence[Action], reason: Reason, message: str) -> tuple[Reason, str]:
        """Reason and message with what owners have to mend, what the platform says, and what is tried again."""
        hindered = [(name, self.client(name)) for name in self.taking_part if self._hindered(name)]
        owners = [f"client {name}: {client.refusal}" for name, client in hindered]
        retries = self._retries(actions)
        if hindered:
            reason = hindered[0][1].reason
        elif self.observed.waiting:
            reason = Reason.WAITING
        elif retries:
            reason = Reason.RETRYING
        said = (words[:SHOWN_WORDS] for words in (owners, self.observed.waiting, retries))
        return reason, "; ".join([message, *itertools.chain.from_iterable(said)])

    def _hindered(self, client: str) -> bool:
        seen = self.client(client)
        return bool(seen.refusal) and seen.hold is Hold.CHARGED and seen.reason in HINDERS_STARTS

    def _retries(self, actions: Sequence[Action]) -> list[str]:
        words = []
        for action in actions:
            seen = self.stage(action.stage, action.client) if isinstance(action, Start) else None
            if isinstance(action, Start) and seen is not None and seen.phase is StagePhase.FAILED:
                named = _named(action.stage, action.client)
                words.append(f"{named}: attempt {action.attempt} follows, the last one failed: {seen.message}")
        return words

    def _reached(self, phase: JobPhase) -> dict[str, bool]:
        holds = [self.hold(name) for name in self.taking_part]
        return {
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

    def _all_counting(self, stage: Stage) -> bool:
        return bool(self.counting) and all(self.done(stage, name) for name in self.counting)


CONDITIONS: Mapping[str, Reason] = {
    "Accepted": Reason.ACCEPTED,
    "BudgetReserved": Reason.BUDGET_RESERVED,
    "Released": Reason.RELEASED,
    "SharedTrained": Reason.SHARED_TRAINED,
    "PersonalTrained": Reason.PERSONAL_TRAINED,
    "Evaluated": Reason.EVALUATED,
    "Suspended": Reason.SUSPENDED,
    "Complete": Reason.COMPLETE,
}  # and Failed, whose reason is what failed


def _conditions(reached: Mapping[str, bool], reason: Reason, message: str) -> tuple[Condition, ...]:
    """All nine. What has come about is its own reason; the others say what the job is at, or what it died of."""
    conditions = [
        Condition(kind, True, own) if reached.get(kind) else Condition(kind, False, reason, message)
        for kind, own in CONDITIONS.items()
    ]
    return (*conditions, Condition("Failed", reached.get("Failed", False), reason, message))


def releases_that_count(observed: Observed, counted: Sequence[str]) -> tuple[ReleaseReference, ...]:
    """The counted clients' manifests, in the order of the job's clients, hashes taken from their receipts."""
    references = []
    for client in counted:
        seen = observed.stages[(Stage.RELEASE, client)]
        assert seen.receipt is not None, "a succeeded release has a receipt"
        references.append(ReleaseReference(client=client, manifest_sha256=seen.receipt.outputs["manifest"]))
    return tuple(references)


def durations_of(stages: Mapping[StageKey, StageObserved]) -> tuple[Duration, ...]:
    """How long every finished stage took by its receipt, for the job report."""
    return tuple(
        Duration(stage=stage, client=client, attempts=seen.attempt, milliseconds=seen.receipt.milliseconds)
        for (stage, client), seen in stages.items()
        if seen.receipt is not None
    )


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(names[:5])
    return shown if len(names) <= 5 else f"{shown} and {len(names) - 5} more"


def _named(stage: Stage, client: str) -> str:
    return f"{stage} of client {client}" if client else str(stage)


def _failure_words(stage: Stage, seen: StageObserved) -> str:
    words = seen.message or "no message"
    return (
        f"{stage} failed: {words}"
        if seen.exit_code is None
        else (f"{stage} ended with exit code {seen.exit_code}: {words}")
    )


def _shortened(message: str) -> str:
    return message if len(message) <= MESSAGE_LENGTH else f"{message[: MESSAGE_LENGTH - 1]}…"
