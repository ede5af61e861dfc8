"""Every owner's privacy ledger, kept in the owner's namespace: PrivacyReleases, and the account in a dataset's status.

All decisions are the protocol's pure transitions; this file reads what they need and writes what they answer. The
account and every entry change by compare-and-swap only, so any number of operators may do this at once, and each may
die between any two calls: whoever comes next finds a pending reservation, an entry without a phase, a reservation of
a job that is gone, and finishes it. A pending reservation is never dropped, since its author may only be slow: its
entry is created and given back, and the late author then meets a returned entry instead of making an uncounted one.
"""

import asyncio
import random
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from functools import lru_cache
from typing import Any, Protocol, TypeVar
from weakref import WeakValueDictionary

from feddiff_protocol import ledger
from feddiff_protocol.accountant import Charge
from feddiff_protocol.api import (
    BudgetSpec,
    DatasetReference,
    DiffusionSpec,
    FederatedDiffusionJob,
    PrivacySpec,
    PrivateDataset,
    parse,
)
from feddiff_protocol.errors import PrivacyRefusal, SpecInvalid
from feddiff_protocol.labels import ACKNOWLEDGE
from feddiff_protocol.layout import release_name
from feddiff_protocol.ledger import Account, Entry, Phase, Refusal
from feddiff_protocol.ledger_objects import Books, account_of, dataset_status, entry_of, release_object, with_status_of
from feddiff_protocol.plan import Hold
from feddiff_protocol.promise import promise_of

from .children import Children, Once
from .cluster import FDJ, PDS, PRL, AlreadyExists, Conflict, Kind, Unavailable

Object = dict[str, Any]
T = TypeVar("T")

ATTEMPTS = 30
FIRST_WAIT_SECONDS, LONGEST_WAIT_SECONDS = 0.01, 1.0
HOLD = {
    Phase.RESERVED: Hold.RESERVED,
    Phase.CHARGED: Hold.CHARGED,
    Phase.RETURNED: Hold.RETURNED,
    Phase.UNKNOWN: Hold.NONE,  # counted for good, and no release may start on it: the refusal says so
}


class Objects(Protocol):
    """What the ledger needs of a Cluster."""

    async def get(self, kind: Kind, namespace: str, name: str) -> Object | None: ...
    async def list(self, kind: Kind, namespace: str | None, labels: str = "") -> list[Object]: ...
    async def create(self, kind: Kind, obj: Object) -> Object: ...
    async def replace_status(self, kind: Kind, obj: Object) -> Object: ...


@dataclass(frozen=True)
class ClientLedger:
    """What a client's ledger says about a job, and would answer to a reservation now."""

    dataset: PrivateDataset | None  # None: there is none, or its spec cannot be understood; the refusal says which
    hold: Hold
    refusal: str = ""
    entry: Entry | None = None


@dataclass(frozen=True)
class State:
    """One consistent read of a dataset and of every entry that bears its name, whatever its uid was then."""

    namespace: str
    name: str
    object: Object | None
    dataset: PrivateDataset | None
    dataset_problem: str  # why there is no dataset, in words
    account: Account | None  # caught up with the entries, or adopted from them; None where it cannot be understood
    entries: tuple[Entry, ...]
    releases: Mapping[str, Object]  # the entries as objects, by name
    contradiction: str
    acknowledgeable: bool = True

    def entry(self, job_uid: str, client: str) -> Entry | None:
        """The job's entry with this very dataset; where there is none any more, with the one that bore its name."""
        found = self.entries_of(job_uid, client)
        return next((entry for entry in found if entry.dataset_uid == self.uid or self.object is None), None)

    def entries_of(self, job_uid: str, client: str) -> list[Entry]:
        """The job's entries with this dataset, first, and with earlier ones of its name."""
        found = [entry for entry in self.entries if (entry.job_uid, entry.client) == (job_uid, client)]
        return sorted(found, key=lambda entry: entry.dataset_uid != self.uid)

    def pending(self, job_uid: str, client: str) -> Entry | None:
        """The job's reservation, where its entry is not folded yet."""
        name = release_name(job_uid, client, self.uid)
        return next((entry for entry in self.account.pending if entry.name == name), None) if self.account else None

    @property
    def uid(self) -> str:
        return str(self.object["metadata"]["uid"]) if self.object else ""

    @property
    def budget(self) -> BudgetSpec:
        assert self.dataset is not None
        return self.dataset.spec.budget

    @property
    def refusal(self) -> str:
        """Why nothing at all can be admitted, or nothing."""
        if self.dataset_problem or not self.contradiction:
            return self.dataset_problem
        return f"the ledger of dataset {self.namespace}/{self.name} contradicts itself: {self.contradiction}"


class ClusterLedger:
    """The ledgers of all datasets of a cluster. Safe against any number of operators at once."""

    def __init__(
        self,
        cluster: Objects,
        clock: Callable[[], datetime],
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        tell: Callable[[Object, Object], None] = lambda before, after: None,
    ) -> None:
        self._cluster, self._clock, self._sleep = cluster, clock, sleep
        self._tell = tell  # of every dataset whose status was written, as it was read and as it is
        self.parsed = Once(_parsed, most=10_000)  # a dataset, or why it cannot be understood
        self.entry_of = Once(_entry, most=100_000)  # an entry, or why it cannot be understood
        # Spares this process conflicts with itself; nothing is safe because of it.
        self._turns: WeakValueDictionary[tuple[str, str], asyncio.Lock] = WeakValueDictionary()

    # ---- What a job asks

    async def look(self, job: FederatedDiffusionJob, uid: str, client: str) -> ClientLedger:
        """What the client's ledger holds for the job, and why it would refuse a reservation now. Writes nothing."""
        reference = _reference(job, client)
        state = await self._again(reference, lambda: self._read(reference))
        entry, pending = state.entry(uid, client), state.pending(uid, client)
        hold = Hold.RESERVED if pending and (entry is None or entry.phase is Phase.UNKNOWN) else _hold(entry)
        return ClientLedger(state.dataset, hold, self._refusal(state, job, uid, client, hold), entry or pending)

    def _refusal(self, state: State, job: FederatedDiffusionJob, uid: str, client: str, hold: Hold) -> str:
        if state.dataset is None or (state.refusal and hold is not Hold.CHARGED):
            return state.refusal
        if hold is Hold.CHARGED:  # spent: to refuse now would protect nobody
            return ""
        answer = self._answer(state, job, uid, client)
        return answer.message if isinstance(answer, Refusal) else ""

    async def reserve(self, job: FederatedDiffusionJob, uid: str, client: str) -> Refusal | None:
        """None when the release is reserved, now or before; otherwise why it is not admitted."""
        reference = _reference(job, client)
        return await self._alone(reference, lambda: self._reserve(reference, job, uid, client))

    async def charge(self, job: FederatedDiffusionJob, uid: str, client: str) -> Entry:
        """The entry, charged for good. Raises PrivacyRefusal when that would not be safe."""
        reference = _reference(job, client)
        return await self._alone(reference, lambda: self._charge(reference, job, uid, client))

    async def give_back(self, job: FederatedDiffusionJob, uid: str, client: str) -> None:
        """What the job had reserved and not charged is returned; a charged entry stays charged."""
        reference = _reference(job, client)
        await self._alone(reference, lambda: self._give_back(reference, uid, client))

    async def record_manifest(
        self, job: FederatedDiffusionJob, uid: str, client: str, sha256: str, entry: Entry | None = None
    ) -> None:
        """The entry says what left; `entry` is as a watch has shown it, only its name is believed. Raises
        PrivacyRefusal when something else left before, or nothing was charged."""
        reference = _reference(job, client)
        await self._alone(reference, lambda: self._record_manifest(reference, uid, client, sha256, entry))

    async def tend(self, namespace: str, name: str, seen: Children | None = None) -> None:
        """The dataset's ledger is in order, and its status says so: a past is adopted, what others left half done is
        finished, what belongs to jobs that are gone is given back. Nothing happens if all this is so already, and
        nothing is read where the watches show it so: what they have yet to bring wakes the dataset again."""
        reference = DatasetReference(namespace=namespace, name=name)
        if seen is None or not self._in_order(reference, seen):
            await self._alone(reference, lambda: self._tend(reference))

    # ---- Reserve: ask the filter, write the reservation, create the entry, fold it

    async def _reserve(
        self, reference: DatasetReference, job: FederatedDiffusionJob, uid: str, client: str
    ) -> Refusal | None:
        state = await self._read(reference)
        answer = self._answer(state, job, uid, client)
        if isinstance(answer, Refusal):
            return answer
        state = await self._write(replace(state, account=answer))
        pending = state.pending(uid, client)
        if pending is not None:
            await self._fold(await self._finish(state, pending))
        return None

    def _answer(self, state: State, job: FederatedDiffusionJob, uid: str, client: str) -> Account | Refusal:
        """The account with the job's reservation in it, or why not."""
        if state.refusal or state.dataset is None or state.account is None:
            return Refusal(state.refusal)
        if refusal := ledger.access_refusal(state.dataset, job):
            return refusal
        try:
            request = self._request(job, uid, client, state.uid)
            release_object(state.namespace, state.name, request)
        except SpecInvalid as error:
            return Refusal(str(error))
        return ledger.reserve(state.budget, state.account, state.entries, request)

    def _request(self, job: FederatedDiffusionJob, uid: str, client: str, dataset_uid: str) -> Entry:
        charge, now = charge_of(job.spec.privacy, job.spec.diffusion), self._clock().isoformat(timespec="seconds")
        return ledger.request_of(job, uid, client, dataset_uid, charge, now)

    async def _finish(self, state: State, pending: Entry) -> State:
        """The state with the entry of a pending reservation, created by whoever came first, marked Reserved."""
        release = state.releases.get(pending.name) or await self._create(state, pending)
        entry = entry_of(release)
        if not entry.same_promise(pending):
            raise PrivacyRefusal(f"entry {entry.name} promises something else than was reserved; tell its owner")
        if entry.phase is Phase.UNKNOWN:  # still pending, so this is a birth and no restored backup
            entry = replace(entry, phase=Phase.RESERVED)
            release = await self._cluster.replace_status(PRL, with_status_of(release, entry))
        return _with_release(state, release)

    async def _create(self, state: State, pending: Entry) -> Object:
        try:
            return await self._cluster.create(PRL, release_object(state.namespace, state.name, pending))
        except AlreadyExists:
            release = await self._cluster.get(PRL, state.namespace, pending.name)
            if release is None:
                raise Conflict(f"entry {pending.name} came and went") from None
            return release

    async def _fold(self, state: State) -> State:
        """The state with everything that exists in the sums, and everything returned taken off them."""
        return state if state.account is None or state.contradiction else await self._write(state)

    # ---- Charge, give back, manifest

    async def _charge(self, reference: DatasetReference, job: FederatedDiffusionJob, uid: str, client: str) -> Entry:
        state = await self._read(reference)
        entry, pending = state.entry(uid, client), state.pending(uid, client)
        if entry is not None and entry.phase is Phase.CHARGED:
            return entry
        if state.refusal or state.dataset is None:
            raise PrivacyRefusal(f"client {client} cannot be charged: {state.refusal}")
        if refusal := ledger.access_refusal(state.dataset, job):
            raise PrivacyRefusal(f"client {client} cannot be charged: {refusal.message}")
        if pending is not None:
            state = await self._finish(state, pending)
        state = await self._write(state)  # counted before it is charged
        entry = state.entry(uid, client)
        if entry is None or state.account is None:
            raise PrivacyRefusal(f"client {client} cannot be charged: nothing is reserved with its dataset; start anew")
        if words := ledger.excess(state.budget, state.account):
            raise PrivacyRefusal(f"client {client} cannot be charged: {words}")
        charged = ledger.charge(state.account, state.entries, entry)
        await self._update(state, charged)
        return charged

    async def _give_back(self, reference: DatasetReference, uid: str, client: str) -> None:
        state = await self._read(reference)
        pending = state.pending(uid, client)
        if pending is not None:
            state = await self._finish(state, pending)
        for entry in state.entries_of(uid, client):
            state = await self._update(state, ledger.give_back(entry))
        await self._fold(state)

    async def _record_manifest(
        self, reference: DatasetReference, uid: str, client: str, sha256: str, known: Entry | None
    ) -> None:
        release = await self._cluster.get(PRL, reference.namespace, known.name) if known else None
        if release is None:
            state = await self._read(reference)
            if not (entries := state.entries_of(uid, client)):
                raise PrivacyRefusal(f"client {client} has no entry in the ledger: a release without a charge; stop")
            release = state.releases[entries[0].name]
        entry = entry_of(release)
        if (named := ledger.record_manifest(entry, sha256)) != entry:
            await self._cluster.replace_status(PRL, with_status_of(release, named))

    # ---- Tend

    def _in_order(self, reference: DatasetReference, seen: Children) -> bool:
        """Whether the watches show a ledger about which nothing is to be done."""
        found = seen.dataset(reference.namespace, reference.name)
        if found is None:
            return False
        state = self._state(reference, found, seen.entries(reference.namespace, reference.name))
        if state.account is None or state.account.pending or state.contradiction:
            return False
        reserved = [entry for entry in state.entries if entry.phase is Phase.RESERVED]
        if not all(_goes_on(entry, seen.job(entry.job_namespace, entry.job_name)) for entry in reserved):
            return False
        return bool(dataset_status(found, _books(state), self._clock()) == found.get("status"))

    async def _tend(self, reference: DatasetReference) -> None:
        state = await self._read(reference)
        for pending in state.account.pending if state.account and not state.contradiction else ():
            state = await self._finish(state, pending)
        state = await self._return_what_jobs_left(state)
        if state.object is None:
            return
        if _acknowledged(state):
            state = _judged(state, ledger.acknowledge(state.account or Account(), state.entries))
        await self._write(state)

    async def _return_what_jobs_left(self, state: State) -> State:
        """Reserved entries of jobs that are gone or have ended count for nothing any more."""
        reserved = [entry for entry in state.entries if entry.phase is Phase.RESERVED]
        one_of_each_job = {entry.job_uid: entry for entry in reserved}
        over = {uid for uid, entry in one_of_each_job.items() if await self._is_over(entry)}
        for entry in reserved:
            if entry.job_uid in over:
                state = await self._update(state, ledger.give_back(entry))
        return state

    async def _is_over(self, entry: Entry) -> bool:
        return not _goes_on(entry, await self._cluster.get(FDJ, entry.job_namespace, entry.job_name))

    # ---- Read and write

    async def _read(self, reference: DatasetReference) -> State:
        """Dataset first, entries second. Raises Conflict when somebody wrote in between and it shows."""
        found = await self._cluster.get(PDS, reference.namespace, reference.name)
        listed = await self._cluster.list(PRL, reference.namespace)
        releases = [each for each in listed if each["spec"]["dataset"]["name"] == reference.name]
        state = self._state(reference, found, releases)
        if state.contradiction and found is not None:
            now = await self._cluster.get(PDS, reference.namespace, reference.name)
            if now is None or now["metadata"]["resourceVersion"] != found["metadata"]["resourceVersion"]:
                raise Conflict(f"dataset {reference.namespace}/{reference.name} changed while it was read")
        return state

    def _state(self, reference: DatasetReference, found: Object | None, releases: list[Object]) -> State:
        """What a dataset and the entries of its name say together."""
        missing = f"dataset {reference.namespace}/{reference.name} does not exist"
        dataset, problem = (None, missing) if found is None else self.parsed(found)
        ordered = sorted(releases, key=lambda each: str(each["metadata"]["name"]))
        read = [self.entry_of(each) for each in ordered]
        unreadable = [each for each in read if isinstance(each, str)]
        state = State(
            namespace=reference.namespace,
            name=reference.name,
            object=found,
            dataset=dataset,
            dataset_problem=problem,
            account=None,
            entries=tuple(each for each in read if isinstance(each, Entry)),
            releases={each["metadata"]["name"]: each for each in releases},
            contradiction=unreadable[-1] if unreadable else "",
            acknowledgeable=not unreadable,
        )
        return state if found is None else _with_account(state, found)

    async def _write(self, state: State) -> State:
        """The state after its dataset's status was replaced, if that changes anything. Raises Conflict."""
        assert state.object is not None
        status = dataset_status(state.object, _books(state), self._clock())
        if status == state.object.get("status"):
            return state
        written = await self._cluster.replace_status(PDS, {**state.object, "status": status})
        self._tell(state.object, written)
        return replace(state, object=written)

    async def _update(self, state: State, entry: Entry) -> State:
        """The state after one entry's status was replaced, if it changes at all. Raises Conflict."""
        release = state.releases[entry.name]
        if entry == entry_of(release):
            return state
        return _with_release(state, await self._cluster.replace_status(PRL, with_status_of(release, entry)))

    async def _alone(self, reference: DatasetReference, step: Callable[[], Awaitable[T]]) -> T:
        async with self._turns.setdefault((reference.namespace, reference.name), asyncio.Lock()):
            return await self._again(reference, step)

    async def _again(self, reference: DatasetReference, step: Callable[[], Awaitable[T]]) -> T:
        """What `step` returns once nobody interferes. Raises Unavailable when somebody always does."""
        for attempt in range(ATTEMPTS):
            try:
                return await step()
            except Conflict:
                longest = min(LONGEST_WAIT_SECONDS, FIRST_WAIT_SECONDS * 2**attempt)
                await self._sleep(longest * random.random())
        raise Unavailable(f"ledger {reference.namespace}/{reference.name}: others wrote first {ATTEMPTS} times; later")


# ---- What was read ------------------------------------------------------------------------------------------------


def _reference(job: FederatedDiffusionJob, client: str) -> DatasetReference:
    return next(each.dataset for each in job.spec.clients if each.name == client)


@lru_cache(maxsize=1024)  # the same for every client of a job, and a thousand steps of a schedule to compute
def charge_of(privacy: PrivacySpec, diffusion: DiffusionSpec) -> Charge:
    """What one release of a job charges. Raises SpecInvalid when no split can keep the promise."""
    return promise_of(privacy, diffusion).charge


def _hold(entry: Entry | None) -> Hold:
    return Hold.NONE if entry is None else HOLD[entry.phase]


def _goes_on(entry: Entry, job: Object | None) -> bool:
    """Whether `job`, found under the name in the entry, is the entry's and has not ended."""
    if job is None or job["metadata"]["uid"] != entry.job_uid:
        return False
    return (job.get("status") or {}).get("phase") not in ("Complete", "Failed")


def _parsed(found: Mapping[str, Any]) -> tuple[PrivateDataset | None, str]:
    metadata = found["metadata"]
    try:
        return parse(PrivateDataset, found, f"dataset {metadata['namespace']}/{metadata['name']}"), ""
    except SpecInvalid as error:
        return None, str(error)


def _entry(release: Mapping[str, Any]) -> Entry | str:
    try:
        return entry_of(release)
    except SpecInvalid as error:
        return str(error)


def _with_account(state: State, found: Object) -> State:
    try:
        stored = account_of(found.get("status"))
    except SpecInvalid:
        return replace(state, contradiction=state.contradiction or "1: status.account cannot be understood")
    if stored is None and not state.acknowledgeable:
        return state  # a past is adopted whole or not at all
    return _judged(state, ledger.adopt(state.entries) if stored is None else stored)


def _judged(state: State, account: Account) -> State:
    """The state with this account caught up with the entries, and whether the two contradict each other."""
    account = ledger.settled(account, state.entries)
    contradiction = ledger.contradiction(account, state.entries) if state.acknowledgeable else state.contradiction
    return replace(state, account=account, contradiction=contradiction)


def _with_release(state: State, release: Object) -> State:
    """The state after one release was created or changed."""
    entry = entry_of(release)
    entries = (*(each for each in state.entries if each.name != entry.name), entry)
    state = replace(state, releases={**state.releases, entry.name: release}, entries=entries)
    return state if state.account is None else _judged(state, state.account)


def _acknowledged(state: State) -> bool:
    assert state.object is not None
    said = (state.object["metadata"].get("annotations") or {}).get(ACKNOWLEDGE)
    return bool(state.contradiction) and state.acknowledgeable and said == state.contradiction


def _books(state: State) -> Books:
    budget = state.dataset.spec.budget if state.dataset else None
    problem = state.dataset_problem
    return Books(state.account, state.entries, budget, problem, state.contradiction, state.acknowledgeable)
