"""A job carried out on one machine: observe, plan, carry out, until the plan has nothing more to ask.

Everything that matters is on the disk before it is acted upon, so the engine may die at any point; started again
it goes on. The plan decides (feddiff_protocol.plan); this file starts processes and keeps the ledgers.
"""

import contextlib
import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from decimal import ROUND_DOWN, Decimal
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from feddiff_protocol.api import PrivateDataset
from feddiff_protocol.errors import (
    FINAL_EXIT_CODES,
    OUR_BUG,
    RETRIED_EXIT_CODES,
    ConfigurationInvalid,
    Interrupted,
    PrivacyRefusal,
    StoreUnavailable,
    UsageInvalid,
)
from feddiff_protocol.layout import release_name, seal
from feddiff_protocol.plan import (
    OWNER_STAGES,
    Action,
    ChargeReservation,
    ClientObserved,
    GiveBack,
    Hold,
    JobPhase,
    Observed,
    Reason,
    Reserve,
    StageKey,
    StageObserved,
    StagePhase,
    Start,
    Status,
    Stop,
    durations_of,
    plan,
    releases_that_count,
)
from feddiff_protocol.stages import (
    AnyStageSpec,
    BudgetLine,
    Places,
    ReleaseReference,
    ReportSpec,
    Stage,
    owner_stage_spec,
    release_spec,
    report_spec,
    train_shared_spec,
)

from .documents import LocalJob
from .local_ledger import LocalLedger
from .processes import Attempt, StartAttempt, StartProcess, num_ranks, stop_orphans
from .run_folder import RunFolder, replace_file, store_uri

TOO_LATE = StoreUnavailable.exit_code  # nothing came in time
LONGEST_WAIT_SECONDS = 60.0
ENDED = (JobPhase.COMPLETE, JobPhase.FAILED, JobPhase.SUSPENDED)


class Reporter(Protocol):
    """Who is told what happens."""

    def status(self, status: Status) -> None: ...
    def stage_started(self, key: StageKey, attempt: int) -> None: ...
    def stage_progress(self, key: StageKey, done: int, total: int, unit: str) -> None: ...
    def stage_ended(self, key: StageKey, seen: StageObserved) -> None: ...


def usable_cores() -> int:
    """Cores this process may run on: fewer than the machine's in a container or under taskset."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def num_threads(cores: int, num_processes: int) -> int:
    """Of each of so many processes. A core is left free: a thread that has to wait for one keeps all the others
    waiting (docs/decisions/0018-threads-leave-a-core-free.md)."""
    return max(1, (cores - 1) // max(1, num_processes))


@dataclass(frozen=True)
class Setting:
    """What surrounds a run and is no part of its job; tests put clocks and stages of their own here."""

    reporter: Reporter
    num_processes: int = field(default_factory=usable_cores)
    cores: int = field(default_factory=usable_cores)
    command_line: str = ""
    seed: int | None = None  # an experiment's, of what follows the releases
    start_attempt: StartAttempt = field(default_factory=StartProcess)
    clock: Callable[[], float] = time.time
    sleep: Callable[[float], None] = time.sleep
    stop_requested: Callable[[], int] = lambda: 0  # how often somebody asked; the second time is impatient
    grace_seconds: float = 60.0


def carriers(
    engine: str, processes: int | None, address: str | None, gpu_share: float | None
) -> contextlib.AbstractContextManager[dict[str, Any]]:
    """What of a Setting says who starts processes, and how many, for as long as it is entered.

    `engine` is "local" or "ray"; the last two go with ray. Raises UsageInvalid for what does not fit, and what
    ray_cluster raises.
    """
    if engine not in ("local", "ray"):
        raise UsageInvalid(f"--engine: expected local or ray, found {engine}")
    if processes is not None and processes < 1:
        raise UsageInvalid(f"--processes: expected at least 1, found {processes}")
    if engine == "ray":
        from .ray_stages import ray_cluster

        return ray_cluster(address, processes, gpu_share)
    for name, given in (("--address", address), ("--gpu-share", gpu_share)):
        if given is not None:
            raise UsageInvalid(f"{name}: expected with --engine ray alone, found {given}; add it or leave this out")
    return contextlib.nullcontext({"num_processes": processes} if processes else {})


@dataclass(frozen=True)
class Outcome:
    """How a run ended: its last status, the exit code, and for a failure the words and the log to read."""

    uid: str
    status: Status
    exit_code: int = 0
    message: str = ""
    log: Path | None = None


def run_job(job: LocalJob, folder: RunFolder, setting: Setting) -> Outcome:
    """The job carried on from wherever it stands. Raises Interrupted when it was stopped on request, and
    ConfigurationInvalid, before anything is charged, where its network cannot be built."""
    if job.document.spec.network.backbone == "diffusers" and find_spec("diffusers") is None:
        raise ConfigurationInvalid(
            "spec.network.backbone: diffusers needs the package diffusers, found none; install it, pip install"
            " 'feddiff[diffusers]', or use unet"
        )
    with folder.locked():
        uid = folder.begin(job, setting.seed)
        ledgers = {client: LocalLedger(dataset) for client, dataset in job.datasets.items()}
        if _gave_everything_back(uid, ledgers):
            uid = folder.begin_anew(job, setting.seed)
        stop_orphans(folder.path / "stages", setting.grace_seconds)
        return _Engine(job, folder, uid, ledgers, setting).run()


def _gave_everything_back(uid: str, ledgers: dict[str, LocalLedger]) -> bool:
    """The run ended before anything was charged, and what it had reserved cannot be taken again under its uid."""
    holds = {ledger.hold(uid, client) for client, ledger in ledgers.items()}
    return Hold.RETURNED in holds and holds <= {Hold.RETURNED, Hold.NONE}


class _Engine:
    def __init__(
        self, job: LocalJob, folder: RunFolder, uid: str, ledgers: dict[str, LocalLedger], setting: Setting
    ) -> None:
        self.job, self.folder, self.uid, self.ledgers, self.setting = job, folder, uid, ledgers, setting
        self.spec = job.document.spec
        self.holds = {client: ledger.hold(uid, client) for client, ledger in ledgers.items()}
        self.refusals: dict[str, str] = {}
        self.running: dict[StageKey, Attempt] = {}
        self.not_before: dict[StageKey, float] = {}
        self.num_starts: dict[StageKey, int] = {}
        self.stages = self._stages_so_far()
        before = folder.read_status()
        self.counted: tuple[str, ...] = tuple(before.get("counted", ()))
        self.releasing_since: float | None = before.get("releasingSince")
        self.places = self._places()

    def run(self) -> Outcome:
        try:
            return self._until_nothing_is_left()
        finally:
            self._abandon_processes()  # when a ledger refused, or something here is broken

    def _until_nothing_is_left(self) -> Outcome:
        while not self.setting.stop_requested():
            now = self.setting.clock()
            observed = self._observe(now)
            decision = plan(self.job.document, observed)
            self._publish(decision.status)  # before acting on what was counted
            if self._carry_out(decision.actions, observed, now):
                continue
            if decision.status.phase in ENDED and not self.running:
                return self._outcome(decision.status)
            self._wait(now)
        self._stop_processes()
        self._publish(plan(self.job.document, self._observe(self.setting.clock())).status)
        raise Interrupted("stopped; run the same command again to go on")

    def _publish(self, status: Status) -> None:
        self.counted = status.counted
        self.folder.write_status(status, self.releasing_since)
        self.setting.reporter.status(status)

    # -- observe

    def _stages_so_far(self) -> dict[StageKey, StageObserved]:
        """Newest attempt of every stage. Failures of earlier engines are forgiven: somebody ran the command again."""
        keys = [(stage, client) for stage in (Stage.RELEASE, *OWNER_STAGES) for client in self.job.datasets]
        seen = {}
        for key in (*keys, (Stage.TRAIN_SHARED, ""), (Stage.REPORT, "")):
            attempt = self.folder.newest_attempt(key)
            if attempt:
                seen[key] = self._succeeded(key, attempt) or StageObserved(StagePhase.STOPPED, attempt)
        return seen

    def _succeeded(self, key: StageKey, attempt: int) -> StageObserved | None:
        """The attempt as a success, if its receipt says so. What left is in the ledger first."""
        receipt = self.folder.receipt(key, attempt, self.uid)
        if receipt is None:
            return None
        stage, client = key
        if stage is Stage.RELEASE:
            self.ledgers[client].record_manifest(self._entry_name(client), receipt.outputs["manifest"])
        return StageObserved(StagePhase.SUCCEEDED, attempt, receipt=receipt)

    def _observe(self, now: float) -> Observed:
        late = self._release_deadline is not None and now >= self._release_deadline
        clients = {name: ClientObserved(hold, self.refusals.get(name, "")) for name, hold in self.holds.items()}
        return Observed(clients, dict(self.stages), self.counted, release_deadline_passed=late)

    @property
    def _release_deadline(self) -> float | None:
        seconds = self.spec.deadlines.release_seconds
        return self.releasing_since + seconds if seconds is not None and self.releasing_since is not None else None

    # -- carry out

    def _carry_out(self, actions: Sequence[Action], observed: Observed, now: float) -> bool:
        """Whether a ledger was asked for something, so that there is more to plan at once."""
        asked = [action for action in actions if isinstance(action, Reserve | ChargeReservation | GiveBack)]
        for request in asked:
            self._ask_ledger(request)
        for action in actions:
            if isinstance(action, Stop):
                self.running[(action.stage, action.client)].ask_to_stop(now)
        self._start_what_fits([action for action in actions if isinstance(action, Start)], observed, now)
        return bool(asked)

    def _ask_ledger(self, action: Reserve | ChargeReservation | GiveBack) -> None:
        ledger = self.ledgers[action.client]
        if isinstance(action, Reserve):
            self._reserve(action.client)
        elif isinstance(action, ChargeReservation):
            ledger.charge(self._entry_name(action.client))
        else:
            ledger.give_back(self._entry_name(action.client))
        self.holds[action.client] = ledger.hold(self.uid, action.client)

    def _reserve(self, client: str) -> None:
        charge = self.job.promise.charge
        if refusal := self.ledgers[client].reserve(self.job.document, self.uid, client, charge):
            self.refusals[client] = refusal.message

    def _start_what_fits(self, starts: Sequence[Start], observed: Observed, now: float) -> None:
        """In the plan's order, so that a stage of many processes is not overtaken for ever."""
        due = [start for start in starts if self.not_before.get((start.stage, start.client), 0.0) <= now]
        wanted = sum(self._slots(start.stage) for start in due) + self._slots_taken()
        threads = num_threads(self.setting.cores, min(wanted, self.setting.num_processes))
        for start in due:
            if self._slots_taken() + self._slots(start.stage) > self.setting.num_processes:
                return
            # Not before it starts: with n clients a spec names n releases, and n of them may be due at every look.
            self._start(start, self._spec(start, observed), threads)

    def _slots(self, stage: Stage) -> int:
        ranks = num_ranks(self.job.document.spec.shared) if stage is Stage.TRAIN_SHARED else 1
        return min(ranks, self.setting.num_processes)

    def _slots_taken(self) -> int:
        return sum(process.slots for process in self.running.values())

    def _start(self, start: Start, spec: AnyStageSpec, threads: int) -> None:
        key = (start.stage, start.client)
        if start.stage is Stage.RELEASE:
            self._check_not_drawn_anew(start.client)
            self.releasing_since = self.setting.clock() if self.releasing_since is None else self.releasing_since
        attempt = self.folder.attempt_folder(key, start.attempt)
        attempt.mkdir(parents=True)
        (attempt / "spec.json").write_text(spec.model_dump_json(by_alias=True, exclude_none=True, indent=2))
        now, slots = self.setting.clock(), self._slots(start.stage)
        self.running[key] = self.setting.start_attempt(key, start.attempt, attempt, spec, slots, threads, now)
        self.num_starts[key] = self.num_starts.get(key, 0) + 1
        failures = self.stages[key].num_failures if key in self.stages else 0
        self.stages[key] = StageObserved(StagePhase.RUNNING, start.attempt, failures)
        self.setting.reporter.stage_started(key, start.attempt)

    def _check_not_drawn_anew(self, client: str) -> None:
        """Raises PrivacyRefusal where the ledger says what left, and the owner's store no longer knows it."""
        entry = self.ledgers[client].state().entry(self._entry_name(client))
        sealed = self.job.datasets[client].owner_folder / "store" / seal(self._entry_name(client))
        if entry is not None and entry.manifest_sha256 and not sealed.exists():
            raise PrivacyRefusal(
                f"client {client}: its release has left, and {sealed} is gone: noise drawn again would be a second"
                " release; put the owner's store back from a backup, or begin another job"
            )

    # -- wait

    def _wait(self, planned_at: float) -> None:
        """Returns when something happened that the plan should see."""
        while not self.setting.stop_requested():
            if self._look_after_processes() or self._something_fell_due(planned_at):
                return
            self.setting.sleep(0.05)

    def _look_after_processes(self) -> bool:
        """Whether a stage ended."""
        ended = [process for process in self.running.values() if process.ended()]
        for process in list(self.running.values()):
            for event in process.progress():
                unit = str(event.get("unit", ""))
                self.setting.reporter.stage_progress(process.key, int(event["done"]), int(event["total"]), unit)
            self._enforce_time(process)
        for process in ended:
            self._finish(process)
        return bool(ended)

    def _enforce_time(self, process: Attempt) -> None:
        now, limit = self.setting.clock(), self.spec.deadlines.of(process.key[0]).stage_seconds
        if not process.begun():
            process.started_at = now
        if limit is not None and process.asked_to_stop_at is None and now - process.started_at > limit:
            process.stop_reason = f"ran longer than deadlines.stageSeconds = {limit}"
            process.ask_to_stop(now)
        impatient = self.setting.stop_requested() > 1
        if process.asked_to_stop_at is not None and (
            impatient or now - process.asked_to_stop_at > self.setting.grace_seconds
        ):
            process.kill()

    def _something_fell_due(self, since: float) -> bool:
        """Whether a retry's wait or the release deadline ended after `since`."""
        moments = [*self.not_before.values(), *([self._release_deadline] if self._release_deadline is not None else [])]
        return any(since < moment <= self.setting.clock() for moment in moments)

    def _finish(self, process: Attempt) -> None:
        seen = self._seen_at_end(process)
        ended = {"exitCode": process.exit_code(), "phase": seen.phase.value, "message": seen.message}
        replace_file(process.folder / "exit.json", json.dumps(ended, ensure_ascii=False) + "\n")
        self.stages[process.key] = seen
        del self.running[process.key]
        if process.asked_to_stop_at is None or process.stop_reason:
            wait = min(2.0 ** self.num_starts[process.key], LONGEST_WAIT_SECONDS)
            self.not_before[process.key] = self.setting.clock() + wait
        self.setting.reporter.stage_ended(process.key, seen)

    def _seen_at_end(self, process: Attempt) -> StageObserved:
        if done := self._succeeded(process.key, process.attempt):
            return done
        failures, code, attempt = self.stages[process.key].num_failures, process.exit_code(), process.attempt
        if process.stop_reason:  # whatever it left with, having saved its work or not: it took too long
            late = Reason.STAGE_DEADLINE_EXCEEDED
            return StageObserved(StagePhase.FAILED, attempt, failures + 1, TOO_LATE, process.stop_reason, reason=late)
        if process.asked_to_stop_at is not None or code == Interrupted.exit_code:
            return StageObserved(StagePhase.STOPPED, attempt, failures, code)
        message = process.message() or "ended without a receipt"
        return StageObserved(StagePhase.FAILED, attempt, failures + 1, code or OUR_BUG, message)

    # -- the end

    def _stop_processes(self) -> None:
        """Every stage has saved its work and left."""
        while self.running:
            for process in self.running.values():
                process.ask_to_stop(self.setting.clock())
            self._look_after_processes()
            if self.running:
                self.setting.sleep(0.05)

    def _abandon_processes(self) -> None:
        """No stage runs any more; what each achieved is for the next engine to see."""
        while left := [process for process in self.running.values() if not process.ended()]:
            for process in left:
                process.ask_to_stop(self.setting.clock())
                self._enforce_time(process)
            self.setting.sleep(0.05)

    def _outcome(self, status: Status) -> Outcome:
        if status.phase is JobPhase.COMPLETE:
            return Outcome(self.uid, status)
        if status.phase is JobPhase.SUSPENDED:
            words = "spec.suspend is true; set it to false and run again"
            return Outcome(self.uid, status, Interrupted.exit_code, words)
        failed = status.condition("Failed")
        key = self._failed_stage(status)
        log = self.folder.attempt_folder(key, self.stages[key].attempt) / "stderr.log" if key else None
        return Outcome(self.uid, status, self._failure_code(failed.reason, key), failed.message, log)

    def _failed_stage(self, status: Status) -> StageKey | None:
        lost = [key for key, seen in self.stages.items() if seen.phase is StagePhase.FAILED]
        whole_job = [key for key in lost if key[1] == ""]
        return next(iter([*whole_job, *(key for key in lost if key[1] in status.dropped)]), None)

    def _failure_code(self, reason: str, key: StageKey | None) -> int:
        if reason == Reason.PRIVACY_BUDGET_EXCEEDED:
            return PrivacyRefusal.exit_code
        if reason in (Reason.RELEASE_DEADLINE_EXCEEDED, Reason.STAGE_DEADLINE_EXCEEDED):
            return TOO_LATE
        code = self.stages[key].exit_code if key else None
        return code if code in FINAL_EXIT_CODES | RETRIED_EXIT_CODES else OUR_BUG

    # -- specs

    def _entry_name(self, client: str) -> str:
        return release_name(self.uid, client, self.ledgers[client].dataset_uid)

    def _places(self) -> Places:
        owners = {client: dataset.owner_folder for client, dataset in self.job.datasets.items()}
        return Places(
            federation_store=self.folder.federation_store,
            owner_stores={client: store_uri(folder / "store") for client, folder in owners.items()},
            sources={client: dataset.source for client, dataset in self.job.datasets.items()},
        )

    def _spec(self, start: Start, observed: Observed) -> AnyStageSpec:
        job, uid, client, attempt = self.job.document, self.uid, start.client, start.attempt
        if start.stage is Stage.RELEASE:
            return release_spec(job, uid, client, self._dataset(client), self.places, attempt)
        releases = releases_that_count(observed, self.counted)
        if start.stage is Stage.TRAIN_SHARED:
            first = self.job.first_dataset.document
            return train_shared_spec(job, uid, first, releases, self.places, attempt, self.setting.seed)
        if start.stage is Stage.REPORT:
            return self._report_spec(releases, attempt)
        shared, dataset, seed = self._shared_denoiser_sha256(), self._dataset(client), self.setting.seed
        return owner_stage_spec(start.stage, job, uid, client, dataset, releases, shared, self.places, attempt, seed)

    def _dataset(self, client: str) -> PrivateDataset:
        """The client's dataset under the uid that its ledger gave it: it names the release."""
        document = self.job.datasets[client].document
        metadata = document.metadata.model_copy(update={"uid": self.ledgers[client].dataset_uid})
        return document.model_copy(update={"metadata": metadata})

    def _shared_denoiser_sha256(self) -> str:
        seen = self.stages.get((Stage.TRAIN_SHARED, ""))
        return seen.receipt.outputs["denoiser"] if seen is not None and seen.receipt is not None else ""

    def _report_spec(self, releases: tuple[ReleaseReference, ...], attempt: int) -> ReportSpec:
        return report_spec(
            self.job.document,
            self.uid,
            self.job.first_dataset.document,
            releases,
            tuple(self._budget_line(client) for client in self.counted),
            durations_of(self.stages),
            self.setting.command_line,
            self._shared_denoiser_sha256(),
            self.places,
            attempt,
        )

    def _budget_line(self, client: str) -> BudgetLine:
        state = self.ledgers[client].state()
        return BudgetLine(
            client=client,
            budget_epsilon=str(state.budget.epsilon),
            spent_epsilon=two_decimals(state.spent_epsilon),
            remaining_epsilon=two_decimals(state.remaining_epsilon, ROUND_DOWN),
            remaining_pure_epsilon=str(state.remaining_pure_epsilon) if state.budget.pure_epsilon else "",
            delta=str(state.budget.delta),
            num_releases=state.num_releases,
        )


def two_decimals(value: float, rounding: str = "ROUND_HALF_EVEN") -> str:
    return str(Decimal(value).quantize(Decimal("0.01"), rounding=rounding))
