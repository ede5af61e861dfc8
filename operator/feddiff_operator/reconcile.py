"""One job or one dataset, once: observe, plan, carry out.

Level-triggered: every call may be the first after a crash, a repetition, or late. What is observed comes from the
children's own objects and from the ledgers, what to do next from the protocol's `plan`; and whatever is carried out
has a name that follows from what it is, so that doing it twice is doing it once.
"""

import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import datetime, timedelta
from functools import partial
from typing import Any

from feddiff_protocol.api import FederatedDiffusionJob, PrivateDataset, parse
from feddiff_protocol.errors import ConfigurationInvalid, PrivacyRefusal, SpecInvalid
from feddiff_protocol.labels import MANAGER, STOPPED
from feddiff_protocol.ledger import Entry, Phase
from feddiff_protocol.plan import (
    ChargeReservation,
    ClientObserved,
    GiveBack,
    Hold,
    JobPhase,
    Observed,
    Plan,
    Reason,
    Reserve,
    StageKey,
    StageObserved,
    StagePhase,
    Start,
    Status,
    not_accepted,
    plan,
)
from feddiff_protocol.stages import AnyStageSpec, Stage

from .aftermath import Aftermath
from .batch import condition_of, pods_by_job
from .children import Children, Once
from .clients import client_observed, misfit
from .cluster import (
    CONFIG_MAP,
    FDJ,
    JOB,
    PDS,
    SERVICE,
    AlreadyExists,
    Cluster,
    ClusterError,
    Invalid,
    Kind,
    Object,
    Refused,
    few_at_a_time,
)
from .durations import ended_now
from .endings import record_of, stopping
from .events import Recorder
from .ledger import ClientLedger, ClusterLedger, charge_of
from .metrics import Metrics
from .observe import (
    children_of,
    retry_at,
    stages_observed,
    with_recorded_release,
)
from .progress import Progresses, targets
from .scene import Scene
from .settings import Settings
from .specs import release_to_come, spec_of, train_shared_to_come
from .status import ended, job_status
from .versions import Versions
from .waiting import waiting
from .workloads import InvalidPodTemplate, Setting, check_overlay, places, stage_objects

WORDS_LENGTH = 1000  # of what is wrong with a job, which several conditions repeat
ASK_AGAIN_SECONDS = 30.0  # for what no watch tells of: a quota, a missing permission, a dataset that somebody mends
KINDS: Mapping[str, Kind] = {kind.name: kind for kind in (JOB, CONFIG_MAP, SERVICE)}


class Reconciler:
    """Everything that is done to the cluster is done here, or by the ledger and the aftermath on its behalf."""

    def __init__(
        self,
        cluster: Cluster,
        ledger: ClusterLedger,
        settings: Settings,
        recorder: Recorder,
        metrics: Metrics,
        clock: Callable[[], datetime],
        progress: Progresses,
    ) -> None:
        self.cluster, self.ledger, self.recorder, self.metrics = cluster, ledger, recorder, metrics
        self.progress = progress
        self.setting = Setting(settings.trainer_image)
        self.clock = clock
        self.understood = Once(_understood, most=500)
        self.versions = Versions(cluster)
        self.aftermath = Aftermath(cluster, ledger, recorder, clock, self.versions, self.understood)
        # What a watch may not have shown yet, by job uid: clients that we have charged, and those whose ledgers refused
        # what they had seemed to allow.
        self.charged: dict[str, dict[str, Entry]] = {}
        self.doubted: dict[str, set[str]] = {}
        # What the API server said to our children, by job uid; after a restart it says so again.
        self.hindrances: dict[str, tuple[tuple[str, str], ...]] = {}  # client ("" for the job), words; not for good
        self.refused: dict[str, dict[str, str]] = {}  # for good, by client ("" for the whole job's stages)

    async def dataset(self, namespace: str, name: str, children: Children | None = None) -> float | None:
        """The dataset's ledger is tended, its status true. Without `children` everything is read anew."""
        await self.ledger.tend(namespace, name, children)
        return None

    async def job(self, namespace: str, name: str, children: Children) -> float | None:
        """The job is one step further. Seconds until it wants to be looked at again; None: when something happens."""
        found = await self.versions.newest(namespace, name, children)
        if strangers := children.strangers(namespace, name, found["metadata"]["uid"] if found else ""):
            if found is not None and not await self.versions.is_current(found):
                return 0.0
            await self.aftermath.remove_orphans(strangers)
        if found is None or found["metadata"].get("deletionTimestamp") or ended(found):
            self.progress.forget(namespace, name)
        if found is None:
            return None
        if found["metadata"].get("deletionTimestamp"):
            self._forget(found["metadata"]["uid"])
            return await self.aftermath.say_farewell(found, children)
        if found["spec"].get("managedBy") not in (None, MANAGER):
            return None
        if ended(found):
            self._forget(found["metadata"]["uid"])
            return await self.aftermath.clean_up(found, children)
        found = await self.aftermath.with_finalizer(found)
        job = self.understood(found)
        if isinstance(job, SpecInvalid):
            reason = Reason.INVALID_POD_TEMPLATE if isinstance(job, InvalidPodTemplate) else Reason.INVALID_SPEC
            words = textwrap.shorten(str(job), WORDS_LENGTH, placeholder="…")
            await self._publish(found, not_accepted(reason, words), Observed({}))
            return 0.0
        return await self._one_step(found, job, children)

    def _forget(self, uid: str) -> None:
        """Nothing is remembered of a job that is over."""
        for remembered in (self.hindrances, self.refused, self.charged, self.doubted):
            remembered.pop(uid, None)

    async def _one_step(self, found: Object, job: FederatedDiffusionJob, children: Children) -> float | None:
        uid = found["metadata"]["uid"]
        pods = pods_by_job(children.pods_of(uid))
        own = children_of(job, uid, children.jobs_of(uid))
        jobs = [await self._recorded(dict(child), pods.get(child["metadata"]["name"], [])) for child in own]
        scene = Scene(found, job, uid, jobs, children.pods_of(uid), self.clock())
        self.progress.follow(job.metadata.namespace, job.metadata.name, uid, targets(jobs, scene.pods))
        if (stopped := await self._stop_what_is_overdue(scene)) is not None:
            return stopped
        ledgers = await self._ledgers(scene, children)
        observed = await self._observe(scene, ledgers)
        decision = plan(job, observed)
        ends = decision.status.phase in (JobPhase.COMPLETE, JobPhase.FAILED)
        if ends and not await self.versions.is_current(found):
            return 0.0
        if ends:  # the last look that has a plan
            await self._carry_out(scene, decision, observed, ledgers)
            await self._publish(found, decision.status, observed, scene)
            return 0.0
        if await self._publish(found, decision.status, observed, scene):
            return 0.0  # what was decided is written before it is acted on; the next look acts
        if decision.actions and not await self.versions.is_current(found):
            return 0.0
        return await self._carry_out(scene, decision, observed, ledgers)

    # -- observe

    async def _recorded(self, child: Object, pods: Sequence[Mapping[str, Any]]) -> Object:
        """The batch Job with what its pods say written onto it: pods vanish."""
        record = record_of(child, pods)
        if record is None:
            return child
        metadata = child["metadata"]
        recorded = {**child, "metadata": {**metadata, "annotations": {**(metadata.get("annotations") or {}), **record}}}
        change = {"metadata": {"annotations": record}}
        try:
            await self.cluster.patch(JOB, metadata["namespace"], metadata["name"], change)
        except Refused:  # by an owner who took our rights away: its pod speaks for itself, while it is there
            return recorded
        if (end := ended_now(child, pods, record)) is not None:
            self.metrics.stage_ended(end.stage, end.result, end.waited_seconds, end.ran_seconds)
        return recorded

    async def _ledgers(self, scene: Scene, children: Children) -> dict[str, ClientLedger]:
        """What every client's ledger says. A charge is never undone, so one that a watch has shown is believed; so is
        a reservation, which the ledger looks for again before it charges. Everything else is read anew."""
        shown = self._entries_shown(scene, children)
        found: dict[str, ClientLedger] = {}
        for client in scene.job.spec.clients:
            where, entry = (client.dataset.namespace, client.dataset.name), shown.get(client.name)
            dataset = children.dataset(*where) if entry else None
            if entry is not None and entry.phase is Phase.CHARGED:
                dataset = dataset or await self.cluster.get(PDS, *where)
                found[client.name] = ClientLedger(self._parsed(dataset), Hold.CHARGED, "", entry)
            elif entry is not None and dataset is not None and self._holds(scene, entry, dataset):
                found[client.name] = ClientLedger(self._parsed(dataset), Hold.RESERVED, "", entry)
        settled = {name: ClientLedger(None, Hold.NONE, "") for name in scene.left_out if name not in shown}
        found |= settled  # nothing more is asked of them
        others = [client.name for client in scene.job.spec.clients if client.name not in found]
        looks = await few_at_a_time(partial(self._look, scene), others)
        found |= dict(zip(others, looks, strict=True))
        return {client.name: found[client.name] for client in scene.job.spec.clients}

    def _entries_shown(self, scene: Scene, children: Children) -> dict[str, Entry]:
        """The entry of each client that a watch has shown, or that we charged before it did; charged ones first."""
        shown = [self._entry(release) for release in children.releases_of(scene.uid)]
        entries = [each for each in shown if isinstance(each, Entry)]
        charged = {each.client: each for each in entries if each.phase is Phase.CHARGED}
        return {each.client: each for each in entries} | self.charged.get(scene.uid, {}) | charged

    def _holds(self, scene: Scene, entry: Entry, dataset: Object) -> bool:
        """Whether a reservation stands, by all that the watches show: then there is no need to ask the ledger."""
        consistent = condition_of(dataset, "LedgerConsistent") is not None
        current = entry.phase is Phase.RESERVED and entry.dataset_uid == dataset["metadata"]["uid"]
        return current and consistent and entry.client not in self.doubted.get(scene.uid, ())

    def _entry(self, release: Object) -> Entry | str:
        return self.ledger.entry_of(release)

    def _parsed(self, dataset: Object | None) -> PrivateDataset | None:
        return self.ledger.parsed(dataset)[0] if dataset is not None else None

    async def _look(self, scene: Scene, client: str) -> ClientLedger:
        """A ledger that we may not read is as good as none, until its owner lets us: the API server says so."""
        try:
            return await self.ledger.look(scene.job, scene.uid, client)
        except Refused as refusal:
            return ClientLedger(None, Hold.NONE, str(refusal))

    async def _observe(self, scene: Scene, ledgers: Mapping[str, ClientLedger]) -> Observed:
        stages: dict[StageKey, StageObserved] = stages_observed(scene.jobs, scene.pods, scene.now)
        clients: dict[str, ClientObserved] = {}
        hindrances = self.hindrances.get(scene.uid, ())
        said = dict(hindrances)
        taking_part = scene.taking_part(ledgers)
        for name, ledger in ledgers.items():
            seen = client_observed(scene.job, name, ledger.dataset, ledger.hold, ledger.refusal, self.setting)
            if name in taking_part:
                seen = self._mistaken(scene, name, taking_part) or seen
            clients[name] = replace(seen, hindrance=said.get(name, ""))
            stages = await self._released(scene, name, ledger, stages)
        if words := self.refused.get(scene.uid, {}).get(""):
            key = (Stage.TRAIN_SHARED, "") if (Stage.TRAIN_SHARED, "") not in stages else (Stage.REPORT, "")
            stages[key] = StageObserved(
                StagePhase.FAILED, 1, 1, ConfigurationInvalid.exit_code, words, reason=Reason.INVALID_POD_TEMPLATE
            )
        return Observed(
            clients=clients,
            stages=stages,
            counted=scene.counted,
            left_out=scene.left_out,
            reservation_deadline_passed=scene.passed(scene.reservation_deadline),
            release_deadline_passed=scene.passed(scene.release_deadline),
            waiting=(*waiting(scene.jobs, scene.pods, scene.now), *(words for _, words in hindrances)),
        )

    def _mistaken(self, scene: Scene, client: str, ledgers: Mapping[str, ClientLedger]) -> ClientObserved | None:
        """The client as one that cannot take part: its pods were refused, or its data do not fit the first client's."""
        if words := self.refused.get(scene.uid, {}).get(client):
            return ClientObserved(ledgers[client].hold, words, Reason.INVALID_POD_TEMPLATE)
        first, own = next(iter(ledgers.values())).dataset, ledgers[client].dataset
        if first is None or own is None:
            return None
        if words := misfit(scene.job, {next(iter(ledgers)): first, client: own}):
            return ClientObserved(ledgers[client].hold, words, Reason.INVALID_SPEC)
        return None

    async def _released(
        self, scene: Scene, client: str, ledger: ClientLedger, stages: dict[StageKey, StageObserved]
    ) -> dict[StageKey, StageObserved]:
        """The stages, a finished release counting only when the ledger has its manifest, and no other one before."""
        key = (Stage.RELEASE, client)
        recorded = ledger.entry.manifest_sha256 if ledger.entry is not None else ""
        seen = stages.get(key)
        if seen is None or seen.receipt is None:
            return with_recorded_release(stages, scene.uid, client, recorded) if recorded else stages
        manifest = seen.receipt.outputs["manifest"]
        if recorded == manifest:
            return stages
        try:
            await self.ledger.record_manifest(scene.job, scene.uid, client, manifest, ledger.entry)
        except PrivacyRefusal as refusal:
            self.recorder.record(scene.found, "SecondRelease", str(refusal), warning=True)
            failures, code = seen.num_failures + 1, refusal.exit_code
            return {**stages, key: StageObserved(StagePhase.FAILED, seen.attempt, failures, code, str(refusal))}
        return stages

    async def _stop_what_is_overdue(self, scene: Scene) -> float | None:
        """When to look again, if attempts had to be stopped; None when all are in time."""
        late = [each for each in scene.deadlines if each.at <= scene.now]
        if late and not await self.versions.is_current(scene.found):
            return 0.0
        for each in late:
            await self._suspend(each.namespace, each.name, each.annotations)
            self.recorder.record(scene.found, each.reason.value, f"{each.name} {each.message}", warning=True)
        return ASK_AGAIN_SECONDS if late else None

    # -- carry out

    async def _publish(self, found: Object, status: Status, observed: Observed, scene: Scene | None = None) -> bool:
        """Whether the job's status had to be written, because it changed in what it says."""
        wanted = job_status(
            found,
            status,
            now=self.clock(),
            stages=observed.stages,
            jobs=scene.jobs if scene else (),
            releasing_since=scene.releasing_since if scene else None,
            progress=self.progress.of(found["metadata"]["namespace"], found["metadata"]["name"]),
        )
        before = found.get("status") or {}
        if wanted == before:
            return False
        self.versions.remember(await self.cluster.replace_status(FDJ, {**found, "status": wanted}))
        if wanted["phase"] != before.get("phase"):
            failed = wanted["phase"] == JobPhase.FAILED
            reason = status.condition("Failed").reason if failed else wanted["phase"]
            self.recorder.record(found, reason, status.message or wanted["phase"], warning=failed)
            if failed and reason in (Reason.PRIVACY_BUDGET_EXCEEDED, Reason.ACCESS_DENIED):
                self.metrics.refused(reason)
        return True

    async def _carry_out(
        self, scene: Scene, decision: Plan, observed: Observed, ledgers: Mapping[str, ClientLedger]
    ) -> float | None:
        """Every action is under way. Seconds until the job wants to be looked at again."""
        known, refused = self.hindrances.pop(scene.uid, ()), dict(self.refused.get(scene.uid, {}))
        charges = [action.client for action in decision.actions if isinstance(action, ChargeReservation)]
        rehearsals = [await self._rehearsed(scene, client, ledgers[client].dataset) for client in charges]
        rehearsals += [await self._shared_rehearsed(scene, ledgers[client].dataset) for client in charges[:1]]
        asked: list[Reserve | ChargeReservation | GiveBack]
        asked = [action for action in decision.actions if isinstance(action, Reserve | GiveBack)]
        asked += [ChargeReservation(client) for client in charges if all(rehearsals)]
        answers = await few_at_a_time(partial(self._ask, scene), asked)
        for child in scene.to_stop(decision):
            reason = "Suspended" if scene.job.spec.suspend else "NotNeeded"
            await self._suspend(child["metadata"]["namespace"], child["metadata"]["name"], {STOPPED: reason})
        if charges or any(isinstance(action, Reserve) for action in asked):
            news = self.hindrances.get(scene.uid, ()) != known or self.refused.get(scene.uid, {}) != refused
            return 0.0 if news or (asked and all(answers)) else ASK_AGAIN_SECONDS
        starts = [action for action in decision.actions if isinstance(action, Start)]
        later = retry_at(scene.jobs, scene.pods, scene.now) if starts else {}
        due = [start for start in starts if later.get((start.stage, start.client), scene.now) <= scene.now]
        for start in due:
            await self._start(scene, start, observed, ledgers)
        if self.hindrances.get(scene.uid, ()) != known or self.refused.get(scene.uid, {}) != refused:
            return 0.0  # so that the status says so
        if asked and all(answers):
            return 0.0
        again = [scene.now + timedelta(seconds=ASK_AGAIN_SECONDS)] if asked else []  # to give back; nobody waits for it
        retries = [later[each.stage, each.client] for each in starts if each not in due]
        return self._next_look(scene, decision, [*retries, *again])

    def _next_look(self, scene: Scene, decision: Plan, retries: Iterable[datetime]) -> float | None:
        limits = (each.at for each in scene.deadlines)
        moments = (*retries, *limits, scene.reservation_deadline, scene.release_deadline)
        seconds = [(moment - scene.now).total_seconds() for moment in moments if moment and moment > scene.now]
        if self.hindrances.get(scene.uid) or decision.status.phase is JobPhase.PENDING:
            seconds.append(ASK_AGAIN_SECONDS)
        return min(seconds, default=None)

    async def _ask(self, scene: Scene, action: Reserve | ChargeReservation | GiveBack) -> bool:
        """Whether the client's ledger did it; a refusal is for the next look to see, and to say."""
        job, uid, client = scene.job, scene.uid, action.client
        try:
            match action:
                case Reserve():
                    await self.ledger.reserve(job, uid, client)
                case ChargeReservation():
                    self.charged.setdefault(uid, {})[client] = await self.ledger.charge(job, uid, client)
                case GiveBack():
                    await self.ledger.give_back(job, uid, client)
        except PrivacyRefusal as refusal:
            self.doubted.setdefault(uid, set()).add(client)
            self.recorder.record(scene.found, "LedgerRefused", str(refusal), warning=True)
            if isinstance(action, ChargeReservation):
                self._hindered(scene, client, f"ledger of {client}: {refusal}")
            return False
        except ClusterError as error:
            if not isinstance(error, Refused) and not isinstance(action, GiveBack):
                raise
            # An owner has not given us its role yet, or has taken it back; to give back can wait, whatever hinders it.
            self._hindered(scene, client, f"ledger of {client}: {error}")
            return False
        self.doubted.get(uid, set()).discard(client)
        if isinstance(action, ChargeReservation):
            self.metrics.charged()
        return True

    async def _suspend(self, namespace: str, name: str, annotations: Mapping[str, str]) -> None:
        """The batch Job is stopped, and says why; where its owner took our rights away it runs on."""
        with suppress(Refused):
            await self.cluster.patch(JOB, namespace, name, stopping(annotations))

    async def _start(self, scene: Scene, start: Start, observed: Observed, ledgers: Mapping[str, ClientLedger]) -> None:
        """The attempt's objects exist, or the job says what hinders them."""
        dataset = ledgers[start.client].dataset if start.client else None
        with self._refusals_noted(scene, start.stage, start.client):
            spec = spec_of(scene, start, observed, ledgers)
            for obj in stage_objects(self.setting, scene.job, scene.uid, dataset, spec):
                with suppress(AlreadyExists):  # by us before a crash, or by another replica
                    await self.cluster.create(KINDS[obj["kind"]], obj)

    async def _rehearsed(self, scene: Scene, client: str, dataset: PrivateDataset | None) -> bool:
        """Whether the API server would take the client's release as it stands: a charge never comes back."""
        if dataset is None:
            return False
        return await self._would_be_taken(scene, client, dataset, release_to_come(scene, client, dataset))

    async def _shared_rehearsed(self, scene: Scene, dataset: PrivateDataset | None) -> bool:
        """The same of train-shared, whose overlay is the job's: no reason to have spent anybody's budget."""
        if dataset is None:
            return False
        return await self._would_be_taken(scene, "", None, train_shared_to_come(scene, dataset))

    async def _would_be_taken(
        self, scene: Scene, client: str, dataset: PrivateDataset | None, spec: AnyStageSpec
    ) -> bool:
        with self._refusals_noted(scene, spec.stage, client):
            for obj in stage_objects(self.setting, scene.job, scene.uid, dataset, spec):
                with suppress(AlreadyExists):
                    await self.cluster.create(KINDS[obj["kind"]], obj, rehearsal=True)
            return True
        return False

    @contextmanager
    def _refusals_noted(self, scene: Scene, stage: Stage, client: str) -> Iterator[None]:
        """What the API server does not take is for the next look to see."""
        try:
            yield
        except (Invalid, SpecInvalid) as error:
            self.refused.setdefault(scene.uid, {})[client] = str(error)
            self.recorder.record(scene.found, Reason.INVALID_POD_TEMPLATE, str(error), warning=True)
        except Refused as error:  # a quota, a missing role: somebody can mend it while we wait
            self._hindered(scene, client, f"{stage} {client}".strip() + f": {error}")

    def _hindered(self, scene: Scene, client: str, words: str) -> None:
        """For the next look to say, and to try again."""
        self.hindrances[scene.uid] = (*self.hindrances.get(scene.uid, ()), (client, words))


def _understood(found: Mapping[str, Any]) -> FederatedDiffusionJob | SpecInvalid:
    """The job, or why it can never be carried out."""
    try:
        job = parse(FederatedDiffusionJob, found, "job")
        charge_of(job.spec.privacy, job.spec.diffusion)
        places(job, {})
        check_overlay(job.spec.shared.pod_template, "spec.shared.podTemplate")
    except SpecInvalid as error:
        return error
    return job
