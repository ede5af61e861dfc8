"""The ledger's transitions: state in, new state out; nothing here reads or writes.

Truth for people and for recovery are the entries (PrivacyRelease): one per (job, client, dataset), never
deleted. Truth for concurrency is the account (in the status of the PrivateDataset): it changes by
compare-and-swap only, so two jobs that race for the last of a budget cannot both get it. For one client of
one job: `reserve` puts a pending reservation into the account, the entry is created, `fold` moves it from
pending into the sums, `charge` marks the entry before anything is released. What is charged never comes back.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from decimal import Decimal
from enum import StrEnum

from .accountant import (
    Admission,
    Charge,
    admits,
    budget_mu_squared,
    difference,
    epsilon_of,
    spent_epsilon,
    total_charge,
)
from .api import BudgetSpec, FederatedDiffusionJob, PrivateDataset
from .errors import PrivacyRefusal
from .layout import release_name


class Phase(StrEnum):
    RESERVED = "Reserved"
    CHARGED = "Charged"
    RETURNED = "Returned"
    UNKNOWN = "Unknown"  # what it was is lost (restored without its status): counted for good, it may have been charged


@dataclass(frozen=True)
class Entry:
    """One release of one dataset to one job; everything but `phase` and `manifest_sha256` is fixed at birth."""

    name: str
    dataset_uid: str
    job_namespace: str
    job_name: str
    job_uid: str
    client: str
    mechanism: str
    unit: str
    epsilon: Decimal
    delta: Decimal
    charge: Charge
    reserved_at: str
    phase: Phase = Phase.RESERVED
    manifest_sha256: str = ""

    def same_promise(self, other: "Entry") -> bool:
        """Whether both describe one and the same release, whatever has become of it since."""
        return other == replace(
            self, reserved_at=other.reserved_at, phase=other.phase, manifest_sha256=other.manifest_sha256
        )


@dataclass(frozen=True)
class Account:
    """Sums over all folded entries, and the reservations that have no folded entry yet."""

    num_entries: int = 0
    total: Charge = field(default_factory=Charge)  # of every folded entry, returned ones included
    returned: Charge = field(default_factory=Charge)  # of folded entries that were given back
    pending: tuple[Entry, ...] = ()
    lost: Charge = field(default_factory=Charge)  # of entries that are gone, by the owner's word; counted for good
    num_acknowledged: int = 0  # contradictions that the owner has accepted so far

    @property
    def charges(self) -> tuple[Charge, ...]:
        """What counts against the budget: folded entries less the returned ones, lost and pending ones."""
        return (*self.counted, *(entry.charge for entry in self.pending))

    @property
    def counted(self) -> tuple[Charge, ...]:
        """What counts without the pending reservations."""
        return (difference(self.total, self.returned), self.lost)

    def is_pending(self, name: str) -> bool:
        return any(entry.name == name for entry in self.pending)


@dataclass(frozen=True)
class Refusal:
    """Why a release was not admitted, in words, with the arithmetic."""

    message: str


def access_refusal(dataset: PrivateDataset, job: FederatedDiffusionJob) -> Refusal | None:
    """None when the owner lets jobs of this namespace ask for this much, and for a release to this store; nobody may
    by default."""
    job_namespace, epsilon = job.metadata.namespace, job.spec.privacy.epsilon
    rules = [rule for rule in dataset.spec.access if rule.namespace == job_namespace]
    name = f"{dataset.metadata.namespace}/{dataset.metadata.name}"
    if not rules:
        return Refusal(
            f"dataset {name} lets no job of namespace {job_namespace} use it; its owner can add an entry to spec.access"
        )
    if all(rule.max_epsilon is not None and rule.max_epsilon < epsilon for rule in rules):
        most = max(rule.max_epsilon for rule in rules if rule.max_epsilon is not None)
        return Refusal(
            f"dataset {name} lets jobs of namespace {job_namespace} ask for ε ≤ {most}, this one asks {epsilon}"
        )
    allowed, asked = dataset.spec.federation, job.spec.store
    if allowed and asked and allowed.uri.rstrip("/") != asked.uri.rstrip("/"):
        return Refusal(
            f"dataset {name} releases to spec.federation.uri = {allowed.uri} alone,"
            f" the job's spec.store.uri is {asked.uri}"
        )
    return None


def inconsistency(account: Account, entries: Iterable[Entry]) -> str | None:
    """None when account and entries agree; otherwise what differs. Nothing new may be admitted until the
    owner has looked. A return that is not folded yet is no contradiction: `fold_returns` catches up."""
    entries = tuple(entries)
    reserved = {entry.name: entry for entry in account.pending}
    for entry in entries:
        if entry.name in reserved and not entry.same_promise(reserved[entry.name]):
            return f"entry {entry.name} promises something else than was reserved"
    folded = _folded(account, entries)
    if len(folded) != account.num_entries:
        return f"the account counts {account.num_entries} entries, {len(folded)} exist"
    total = total_charge(entry.charge for entry in folded)
    if total != account.total:
        return f"the account sums to μ² = {_in_words(account.total)}, its entries to {_in_words(total)}"
    given_back = _given_back(folded)
    if account.returned.mu_squared > given_back.mu_squared or account.returned.pure_epsilon > given_back.pure_epsilon:
        return f"the account counts μ² = {_in_words(account.returned)} as returned, entries {_in_words(given_back)}"
    return None


def _in_words(charge: Charge) -> str:
    return f"{charge.mu_squared} and pure ε = {charge.pure_epsilon}" if charge.pure_epsilon else f"{charge.mu_squared}"


def _folded(account: Account, entries: Iterable[Entry]) -> list[Entry]:
    return [entry for entry in entries if not account.is_pending(entry.name)]


def _given_back(entries: Iterable[Entry]) -> Charge:
    return total_charge(entry.charge for entry in entries if entry.phase is Phase.RETURNED)


def adopt(entries: Iterable[Entry]) -> Account:
    """The account of a dataset that has none, recreated or wiped: every entry of its past counts."""
    entries = tuple(entries)
    return Account(len(entries), total_charge(entry.charge for entry in entries), _given_back(entries))


def contradiction(account: Account, entries: Iterable[Entry]) -> str:
    """What the owner has to repeat to accept an inconsistency, empty where there is none.

    Numbered, so that an old acknowledgement never covers a new contradiction.
    """
    problem = inconsistency(account, entries)
    return f"{account.num_acknowledged + 1}: {problem}" if problem else ""


def acknowledge(account: Account, entries: Iterable[Entry]) -> Account:
    """The account rebuilt from the entries after its owner accepted a contradiction: what counts is the larger of
    both sums, never the smaller. What has no entry any more is kept as lost."""
    folded = _folded(account, tuple(entries))
    total, returned = total_charge(entry.charge for entry in folded), _given_back(folded)
    before, now = total_charge(account.counted), difference(total, returned)
    larger = Charge(max(before.mu_squared, now.mu_squared), max(before.pure_epsilon, now.pure_epsilon))
    return replace(
        account,
        num_entries=len(folded),
        total=total,
        returned=returned,
        lost=difference(larger, now),
        num_acknowledged=account.num_acknowledged + 1,
    )


def settled(account: Account, entries: Iterable[Entry]) -> Account:
    """The account caught up with its entries: what was created is folded, what was given back is taken off.

    Unchanged where the two contradict each other, unless the difference is entries that were given back and so count
    for nothing: an operator that lost its reservation may still have created one.
    """
    entries = tuple(entries)
    if inconsistency(account, entries):
        knowing = _knowing_returned(account, entries)
        if knowing is None:
            return account
        account = knowing
    for entry in entries:
        if entry.phase is not Phase.UNKNOWN:
            account = fold(account, entry)
    return fold_returns(account, entries)


def _knowing_returned(account: Account, entries: tuple[Entry, ...]) -> Account | None:
    """The account rebuilt from more entries than it knows, if what counts stays exactly the same."""
    folded = _folded(account, entries)
    total, returned = total_charge(entry.charge for entry in folded), _given_back(folded)
    rebuilt = replace(account, num_entries=len(folded), total=total, returned=returned)
    same = len(folded) > account.num_entries and rebuilt.counted == account.counted
    return rebuilt if same and inconsistency(rebuilt, entries) is None else None


def excess(budget: BudgetSpec, account: Account) -> str:
    """Why nothing more may be charged, in words, where what counts already exceeds the budget; otherwise empty.

    No admission leads there; a past adopted by a dataset with a smaller budget does.
    """
    limit = budget_mu_squared(budget.epsilon, budget.delta, budget.pure_epsilon)
    admission = admits(limit, budget.pure_epsilon, account.charges, Charge())
    if admission.admitted:
        return ""
    spent = spent_epsilon(account.charges, budget.delta)
    return f"the ledger counts ε = {spent:.4f} of {budget.epsilon} (per {budget.unit}, δ = {budget.delta}) already"


def request_of(
    job: FederatedDiffusionJob, job_uid: str, client: str, dataset_uid: str, charge: Charge, reserved_at: str
) -> Entry:
    """The entry that a client of `job` asks for; the same for every retry, but for the time."""
    privacy = job.spec.privacy
    return Entry(
        name=release_name(job_uid, client, dataset_uid),
        dataset_uid=dataset_uid,
        job_namespace=job.metadata.namespace,
        job_name=job.metadata.name,
        job_uid=job_uid,
        client=client,
        mechanism=privacy.mechanism.value,
        unit=privacy.unit,
        epsilon=privacy.epsilon,
        delta=privacy.delta_or_zero,
        charge=charge,
        reserved_at=reserved_at,
    )


def reserve(budget: BudgetSpec, account: Account, entries: Iterable[Entry], request: Entry) -> Account | Refusal:
    """The account with `request` pending, or why not. Asking again for what is held changes nothing."""
    entries = tuple(entries)
    if problem := inconsistency(account, entries):
        return Refusal(f"the ledger contradicts itself: {problem}; nothing is admitted until its owner acknowledges")
    held = [entry for entry in (*account.pending, *entries) if entry.name == request.name]
    if held:
        return _held_again(account, held[0], request)
    if request.delta > budget.delta or request.unit != budget.unit:
        return Refusal(
            f"the budget holds δ = {budget.delta} per {budget.unit}, the job asks for δ = {request.delta}"
            f" per {request.unit}; δ can be at most the budget's, the unit must be equal"
        )
    limit = budget_mu_squared(budget.epsilon, budget.delta, budget.pure_epsilon)
    admission = admits(limit, budget.pure_epsilon, account.charges, request.charge)
    if not admission.admitted:
        return Refusal(_too_much(budget, limit, account, request, admission))
    return replace(account, pending=(*account.pending, request))


def _held_again(account: Account, held: Entry, request: Entry) -> Account | Refusal:
    if not held.same_promise(request):
        return Refusal(f"entry {held.name} exists with another promise; a job's privacy cannot change")
    if held.phase is Phase.RETURNED:
        return Refusal(f"entry {held.name} was given back; its job cannot take it again; start a new job")
    if held.phase is Phase.UNKNOWN:
        return Refusal(f"entry {held.name} lost its phase; it may have been released already; start a new job")
    return account


def _too_much(budget: BudgetSpec, limit: Decimal, account: Account, request: Entry, found: Admission) -> str:
    spent = spent_epsilon(account.charges, budget.delta)
    wanted = spent_epsilon((*account.charges, request.charge), budget.delta)
    used = total_charge(account.charges)
    said = (
        f"spent so far ε = {spent:.4f} of {budget.epsilon} (per {budget.unit}, δ = {budget.delta});"
        f" with this release of ε = {request.epsilon} it would be {wanted:.4f}"
    )
    if request.charge.pure_epsilon:
        pure_left = remaining_pure_epsilon(budget, account.charges)
        return (
            f"{said} (pure ε: {used.pure_epsilon} + {request.charge.pure_epsilon} > {budget.pure_epsilon}, too much by"
            f" {found.excess_pure_epsilon}); the budget's pureEpsilon cannot change:"
            + (f" lower the job's ε to {pure_left}" if pure_left else " nothing is left of it")
        )
    set_aside = f" once pureEpsilon = {budget.pure_epsilon} is set aside" if budget.pure_epsilon else ""
    left = epsilon_left(_epsilon_within(limit, account.charges, request.delta))
    remedy = (
        f"raise the budget or lower the job's ε to {left}" if Decimal(left) else "nothing is left; raise the budget"
    )
    return (
        f"{said} (μ²: {used.mu_squared:.6f} + {request.charge.mu_squared:.6f} > {limit:.6f}{set_aside}, too much by"
        f" {found.excess_mu_squared:.6g}); {remedy}"
    )


def fold(account: Account, entry: Entry) -> Account:
    """The account with the entry, now created, moved from pending into the sums; folding twice changes nothing."""
    if not account.is_pending(entry.name):
        return account
    return replace(
        account,
        num_entries=account.num_entries + 1,
        total=total_charge([account.total, entry.charge]),
        pending=tuple(pending for pending in account.pending if pending.name != entry.name),
    )


def charge(account: Account, entries: Iterable[Entry], entry: Entry) -> Entry:
    """The entry marked Charged: from now on its release may start, and it never comes back.

    Raises PrivacyRefusal when it was given back, or when the account does not count it: its reservation may have
    been lost, and another job may have the budget since.
    """
    if entry.phase is Phase.RETURNED:
        raise PrivacyRefusal(f"entry {entry.name} was given back: its release cannot start; start a new job")
    if entry.phase is Phase.UNKNOWN:
        raise PrivacyRefusal(f"entry {entry.name} lost its phase: its release may have started; start a new job")
    if account.is_pending(entry.name):
        raise PrivacyRefusal(f"entry {entry.name} is not in the account's sums yet; fold it before it is charged")
    if problem := inconsistency(account, entries):
        raise PrivacyRefusal(f"entry {entry.name} cannot be charged, the ledger contradicts itself: {problem}")
    return replace(entry, phase=Phase.CHARGED)


def give_back(entry: Entry) -> Entry:
    """The entry marked Returned, when nothing can have been released yet; a charged one stays charged."""
    return replace(entry, phase=Phase.RETURNED) if entry.phase is Phase.RESERVED else entry


def fold_returns(account: Account, entries: Iterable[Entry]) -> Account:
    """The account with every given-back entry taken off the sums."""
    return replace(account, returned=_given_back(_folded(account, entries)))


def record_manifest(entry: Entry, manifest_sha256: str) -> Entry:
    """The entry with the hash of what left. Raises PrivacyRefusal when something else left before."""
    if entry.phase is not Phase.CHARGED:
        raise PrivacyRefusal(
            f"entry {entry.name} is {entry.phase}: a release without a charge; stop and tell the owner"
        )
    if entry.manifest_sha256 not in ("", manifest_sha256):
        raise PrivacyRefusal(
            f"entry {entry.name}: expected manifest {entry.manifest_sha256}, found {manifest_sha256}; a second release"
        )
    return replace(entry, manifest_sha256=manifest_sha256)


def remaining_epsilon(budget: BudgetSpec, charges: Iterable[Charge]) -> float:
    """ε that one more Gaussian-type release could still ask for under this budget, at the budget's δ."""
    limit = budget_mu_squared(budget.epsilon, budget.delta, budget.pure_epsilon)
    return _epsilon_within(limit, charges, budget.delta)


def _epsilon_within(limit: Decimal, charges: Iterable[Charge], delta: Decimal) -> float:
    left = limit - total_charge(charges).mu_squared
    return epsilon_of(float(left) ** 0.5, float(delta)) if left > 0 else 0.0


def epsilon_left(value: float) -> str:
    """Four decimals, rounded down: who asks for what is shown is admitted. 1e-9 undoes the safe rounding of μ."""
    return str(Decimal(value + 1e-9 if value else 0).quantize(Decimal("0.0001"), rounding="ROUND_DOWN"))


def remaining_pure_epsilon(budget: BudgetSpec, charges: Iterable[Charge]) -> Decimal:
    """ε that one more release of pure ε could still ask for under this budget."""
    spent = min(total_charge(charges).pure_epsilon, budget.pure_epsilon)
    return difference(Charge(pure_epsilon=budget.pure_epsilon), Charge(pure_epsilon=spent)).pure_epsilon
