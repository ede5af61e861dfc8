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
    Charge,
    admits,
    budget_mu_squared,
    difference,
    epsilon_of,
    spent_epsilon,
    total_charge,
)
from .api import BudgetSpec, PrivateDataset
from .errors import PrivacyRefusal


class Phase(StrEnum):
    RESERVED = "Reserved"
    CHARGED = "Charged"
    RETURNED = "Returned"


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
        return replace(self, reserved_at="", phase=Phase.RESERVED, manifest_sha256="") == replace(
            other, reserved_at="", phase=Phase.RESERVED, manifest_sha256=""
        )


@dataclass(frozen=True)
class Account:
    """Sums over all folded entries, and the reservations that have no folded entry yet."""

    num_entries: int = 0
    total: Charge = field(default_factory=Charge)  # of every folded entry, returned ones included
    returned: Charge = field(default_factory=Charge)  # of folded entries that were given back
    pending: tuple[Entry, ...] = ()

    @property
    def charges(self) -> tuple[Charge, ...]:
        """What counts against the budget: folded entries less the returned ones, and every pending one."""
        return (difference(self.total, self.returned), *(entry.charge for entry in self.pending))

    def is_pending(self, name: str) -> bool:
        return any(entry.name == name for entry in self.pending)


@dataclass(frozen=True)
class Refusal:
    """Why a release was not admitted, in words, with the arithmetic."""

    message: str


def access_refusal(dataset: PrivateDataset, job_namespace: str, epsilon: Decimal) -> Refusal | None:
    """None when the owner lets jobs of this namespace ask for this much; nobody may by default."""
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
    return None


def inconsistency(account: Account, entries: Iterable[Entry]) -> str | None:
    """None when account and entries agree; otherwise what differs. Nothing new may be admitted until the
    owner has looked. A return that is not folded yet is no contradiction: `fold_returns` catches up."""
    folded = [entry for entry in entries if not account.is_pending(entry.name)]
    if len(folded) != account.num_entries:
        return f"the account counts {account.num_entries} entries, {len(folded)} exist"
    total = total_charge(entry.charge for entry in folded)
    if total != account.total:
        return f"the account sums to μ² = {account.total.mu_squared}, its entries to {total.mu_squared}"
    given_back = total_charge(entry.charge for entry in folded if entry.phase is Phase.RETURNED)
    if account.returned.mu_squared > given_back.mu_squared or account.returned.pure_epsilon > given_back.pure_epsilon:
        return f"the account counts μ² = {account.returned.mu_squared} as returned, entries {given_back.mu_squared}"
    return None


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
        return Refusal(_too_much(budget, limit, account, request))
    return replace(account, pending=(*account.pending, request))


def _held_again(account: Account, held: Entry, request: Entry) -> Account | Refusal:
    if not held.same_promise(request):
        return Refusal(f"entry {held.name} exists with another promise; a job's privacy cannot change")
    if held.phase is Phase.RETURNED:
        return Refusal(f"entry {held.name} was given back; its job cannot take it again; start a new job")
    return account


def _too_much(budget: BudgetSpec, limit: Decimal, account: Account, request: Entry) -> str:
    spent = spent_epsilon(account.charges, budget.delta)
    wanted = spent_epsilon((*account.charges, request.charge), budget.delta)
    used = total_charge(account.charges).mu_squared
    return (
        f"spent so far ε = {spent:.4f} of {budget.epsilon} (per {budget.unit}, δ = {budget.delta});"
        f" with this release of ε = {request.epsilon} it would be {wanted:.4f}"
        f" (μ²: {used:.6f} + {request.charge.mu_squared:.6f} > {limit:.6f}); raise the budget or lower the job's ε"
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


def drop(account: Account, name: str) -> Account:
    """The account without a pending reservation whose job is gone; it has no entry, so it has started nothing."""
    return replace(account, pending=tuple(entry for entry in account.pending if entry.name != name))


def charge(account: Account, entries: Iterable[Entry], entry: Entry) -> Entry:
    """The entry marked Charged: from now on its release may start, and it never comes back.

    Raises PrivacyRefusal when it was given back, or when the account does not count it: somebody may have dropped
    its reservation and let another job have the budget before the entry was created.
    """
    if entry.phase is Phase.RETURNED:
        raise PrivacyRefusal(f"entry {entry.name} was given back: its release cannot start; start a new job")
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
    folded = (entry for entry in entries if not account.is_pending(entry.name) and entry.phase is Phase.RETURNED)
    return replace(account, returned=total_charge(entry.charge for entry in folded))


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
    left = limit - total_charge(charges).mu_squared
    return epsilon_of(float(left) ** 0.5, float(budget.delta)) if left > 0 else 0.0
