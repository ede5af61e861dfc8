"""The ledger as Kubernetes objects: entries as PrivacyReleases, the account as a PrivateDataset's status.

Conversions only, in both directions and exact: every number that carries a promise is a decimal string. What cannot
be understood raises SpecInvalid; nobody guesses at a ledger.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from decimal import ROUND_CEILING, ROUND_FLOOR, Context, Decimal
from typing import Any

from .accountant import Charge, difference, spent_epsilon, total_charge
from .api import (
    API_VERSION,
    BudgetSpec,
    ChargeSpec,
    PrivacyRelease,
    PrivacyReleaseSpec,
    ReleasedDataset,
    ReleasingJob,
    parse,
)
from .errors import SpecInvalid
from .labels import ACKNOWLEDGE, CLIENT, DATASET, JOB_NAME, JOB_NAMESPACE, JOB_UID, MANAGED_BY
from .ledger import Account, Entry, Phase, excess, remaining_epsilon, remaining_pure_epsilon

Object = dict[str, Any]

# ---- Entries -----------------------------------------------------------------------------------------------------


def release_object(namespace: str, dataset: str, entry: Entry) -> Object:
    """The PrivacyRelease of an entry of the dataset `namespace`/`dataset`, without its status.

    Raises SpecInvalid when it would not come back as the same entry (a charge with more digits than the API holds).
    """
    labels = {
        MANAGED_BY: "feddiff",
        JOB_UID: entry.job_uid,
        JOB_NAME: entry.job_name,
        JOB_NAMESPACE: entry.job_namespace,
        CLIENT: entry.client,
        DATASET: dataset,
    }
    release = {
        "apiVersion": API_VERSION,
        "kind": "PrivacyRelease",
        "metadata": {"name": entry.name, "namespace": namespace, "labels": labels},
        "spec": _release_spec(dataset, entry),
    }
    if not entry_of(release).same_promise(entry):
        raise SpecInvalid(f"entry {entry.name}: its numbers would change on their way; nothing is reserved")
    return release


def _release_spec(dataset: str, entry: Entry) -> Object:
    return PrivacyReleaseSpec(
        dataset=ReleasedDataset(name=dataset, uid=entry.dataset_uid),
        job=ReleasingJob(namespace=entry.job_namespace, name=entry.job_name, uid=entry.job_uid),
        client=entry.client,
        mechanism=entry.mechanism,
        unit="image",
        epsilon=entry.epsilon,
        delta=entry.delta,
        charge=ChargeSpec(mu_squared=entry.charge.mu_squared, pure_epsilon=entry.charge.pure_epsilon),
        reserved_at=entry.reserved_at,
    ).to_wire()


def entry_of(release: Mapping[str, Any]) -> Entry:
    """The entry that a PrivacyRelease stands for. Raises SpecInvalid when it is not one.

    The API server drops the status of what is created, and so do backups: an entry without a phase is Unknown.
    """
    name = release["metadata"]["name"]
    read = parse(PrivacyRelease, release, f"PrivacyRelease {release['metadata'].get('namespace')}/{name}")
    status = read.status or {}
    known = {phase.value: phase for phase in Phase}
    return _entry(
        name, read.spec, known.get(str(status.get("phase")), Phase.UNKNOWN), str(status.get("manifestSha256", ""))
    )


def _entry(name: str, spec: PrivacyReleaseSpec, phase: Phase, manifest_sha256: str) -> Entry:
    return Entry(
        name=name,
        dataset_uid=spec.dataset.uid,
        job_namespace=spec.job.namespace,
        job_name=spec.job.name,
        job_uid=spec.job.uid,
        client=spec.client,
        mechanism=spec.mechanism,
        unit=spec.unit,
        epsilon=spec.epsilon,
        delta=spec.delta,
        charge=Charge(spec.charge.mu_squared, spec.charge.pure_epsilon),
        reserved_at=spec.reserved_at,
        phase=phase,
        manifest_sha256=manifest_sha256,
    )


def with_status_of(release: Object, entry: Entry) -> Object:
    """The PrivacyRelease, as it was read, with the status of `entry`."""
    manifest = {"manifestSha256": entry.manifest_sha256} if entry.manifest_sha256 else {}
    return {**release, "status": {**(release.get("status") or {}), "phase": entry.phase.value, **manifest}}


# ---- The account --------------------------------------------------------------------------------------------------


def account_object(dataset: str, account: Account) -> Object:
    """The account as it stands in the dataset's status."""
    return {
        "numEntries": account.num_entries,
        "total": _charge_object(account.total),
        "returned": _charge_object(account.returned),
        "lost": _charge_object(account.lost),
        "numAcknowledged": account.num_acknowledged,
        "pending": [{"name": entry.name, "spec": _release_spec(dataset, entry)} for entry in account.pending],
    }


def account_of(status: Mapping[str, Any] | None) -> Account | None:
    """The account in a dataset's status; None where none was begun. Raises SpecInvalid when it makes no sense."""
    if not status:
        return None
    try:
        if status.get("account") is None:
            return None
        return _account(status["account"])
    except (SpecInvalid, KeyError, TypeError, AttributeError, ValueError) as error:
        raise SpecInvalid(f"status.account cannot be understood: {error}") from None


def _account(found: Mapping[str, Any]) -> Account:
    account = Account(
        num_entries=_count(found["numEntries"]),
        total=_charge(found["total"]),
        returned=_charge(found["returned"]),
        pending=tuple(_pending(each) for each in found["pending"]),
        lost=_charge(found["lost"]),
        num_acknowledged=_count(found["numAcknowledged"]),
    )
    total_charge(account.charges)  # raises when more was returned than was ever counted
    return account


def _pending(found: Mapping[str, Any]) -> Entry:
    spec = parse(PrivacyReleaseSpec, found["spec"], "pending")
    return _entry(str(found["name"]), spec, Phase.RESERVED, "")


def _count(found: object) -> int:
    if isinstance(found, bool) or not isinstance(found, int) or found < 0:
        raise ValueError(f"expected a count, found {found!r}")
    return found


def _charge_object(charge: Charge) -> Object:
    return {"muSquared": str(charge.mu_squared), "pureEpsilon": str(charge.pure_epsilon)}


def _charge(found: Mapping[str, Any]) -> Charge:
    return Charge(_sum(found["muSquared"]), _sum(found["pureEpsilon"]))


def _sum(found: object) -> Decimal:
    """A sum of charges: more digits than one of them may have, so its own, wider form."""
    if not isinstance(found, str) or not re.fullmatch(r"[0-9]{1,400}(\.[0-9]{1,400})?(E[+-]?[0-9]{1,3})?", found):
        raise ValueError(f"expected a decimal number in quotes, found {found!r}")
    return Decimal(found)


# ---- The dataset's status ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Books:
    """What is to be said about a dataset's ledger."""

    account: Account | None  # None: the one in the status cannot be understood, and stays as evidence
    entries: tuple[Entry, ...]
    budget: BudgetSpec | None  # None: the spec cannot be understood
    spec_problem: str = ""
    contradiction: str = ""
    acknowledgeable: bool = True


def dataset_status(dataset: Mapping[str, Any], books: Books, now: datetime) -> Object:
    """The status of the PrivateDataset as read in `dataset`: account, budget in ε, conditions, nothing else.

    ε spent and reserved are rounded up, what remains is rounded down.
    """
    before = dataset["status"] if isinstance(dataset.get("status"), dict) else {}
    status: Object = {"observedGeneration": dataset["metadata"].get("generation", 0)}
    if books.account is not None:
        status["account"] = account_object(dataset["metadata"]["name"], books.account)
    elif "account" in before:
        status["account"] = before["account"]
    if books.account is not None and books.budget is not None:
        status["budget"] = _budget(books.budget, books.account, books)
    elif "budget" in before:
        status["budget"] = before["budget"]
    status["numReleases"] = sum(entry.phase is not Phase.RETURNED for entry in books.entries)
    known = {each.get("type"): each for each in before.get("conditions") or () if isinstance(each, dict)}
    status["conditions"] = [
        _since(known.get(each["type"]), {**each, "observedGeneration": status["observedGeneration"]}, now)
        for each in _conditions(dataset, books)
    ]
    return status


def _budget(budget: BudgetSpec, account: Account, books: Books) -> Object:
    """Spent is what was charged or may have been; reserved is how much more the reservations would make it."""
    open_entries = [entry for entry in books.entries if _is_open(entry, account)]
    reserved = total_charge(entry.charge for entry in (*account.pending, *open_entries))
    everything = total_charge(account.charges)
    counted = Charge(  # of what is reserved; less than all of it only where the ledger contradicts itself
        min(everything.mu_squared, reserved.mu_squared), min(everything.pure_epsilon, reserved.pure_epsilon)
    )
    spent = difference(everything, counted)
    spent_text, all_text = _up(spent_epsilon([spent], budget.delta)), _up(spent_epsilon([everything], budget.delta))
    remaining, pure = (0.0, Decimal(0)) if books.contradiction else _remaining(budget, account)
    return {
        "spent": f"{spent_text:f}",
        "reserved": f"{_shortest(all_text - spent_text):f}",
        "remaining": f"{_down(remaining):f}",
        "remainingPure": f"{_shortest(pure):f}",
        "chargedMuSquared": str(spent.mu_squared),
        "chargedPureEpsilon": str(spent.pure_epsilon),
    }


def _remaining(budget: BudgetSpec, account: Account) -> tuple[float, Decimal]:
    """ε that one more release could ask for: of Gaussian noise, and of pure ε."""
    return remaining_epsilon(budget, account.charges), remaining_pure_epsilon(budget, account.charges)


def _is_open(entry: Entry, account: Account) -> bool:
    return entry.phase is Phase.RESERVED and not account.is_pending(entry.name)


_WIDE = Context(prec=400)


def _up(epsilon: float) -> Decimal:
    return _shortest(Decimal(epsilon).quantize(Decimal("1e-4"), ROUND_CEILING, _WIDE))


def _down(epsilon: float) -> Decimal:
    # A whole budget of 20 is ε = 19.99999999999 after its own rounding, and admits a job of 20: show 20.
    return _shortest(Decimal(epsilon + 1e-9).quantize(Decimal("1e-4"), ROUND_FLOOR, _WIDE))


def _shortest(value: Decimal) -> Decimal:
    return value.normalize(_WIDE)


def _conditions(dataset: Mapping[str, Any], books: Books) -> list[Object]:
    consistent = _consistent(dataset, books)
    if books.spec_problem:
        ready = _condition("Ready", "False", "SpecInvalid", books.spec_problem)
    elif consistent["status"] == "False":
        ready = _condition("Ready", "False", "LedgerMismatch", consistent["message"])
    else:
        ready = _condition("Ready", "True", "Ready", "")
    return [ready, consistent, _exhausted(books)]


def _consistent(dataset: Mapping[str, Any], books: Books) -> Object:
    if not books.contradiction:
        return _condition("LedgerConsistent", "True", "Consistent", "")
    name, namespace = dataset["metadata"]["name"], dataset["metadata"]["namespace"]
    words = f"{books.contradiction}. Nothing is admitted. Put the ledger back from a backup"
    if books.acknowledgeable:
        words += (
            ", or accept the larger of both sums:"
            f" kubectl -n {namespace} annotate --overwrite pds {name} {ACKNOWLEDGE}='{books.contradiction}'"
        )
    return _condition("LedgerConsistent", "False", "LedgerMismatch", words)


def _exhausted(books: Books) -> Object:
    if books.budget is None or books.account is None:
        return _condition("BudgetExhausted", "Unknown", "NotReady", "")
    if words := excess(books.budget, books.account):
        return _condition("BudgetExhausted", "True", "BudgetExceeded", words)
    remaining, pure = _remaining(books.budget, books.account)
    if not (_down(remaining) or pure):
        return _condition("BudgetExhausted", "True", "BudgetSpent", "no further release fits; the owner can raise it")
    return _condition("BudgetExhausted", "False", "BudgetLeft", "")


def _condition(kind: str, status: str, reason: str, message: str) -> Object:
    return {"type": kind, "status": status, "reason": reason, "message": message[:32768]}


def _since(before: Mapping[str, Any] | None, now_is: Object, now: datetime) -> Object:
    """The condition with the time since which it has its status."""
    if before is not None and before.get("status") == now_is["status"] and "lastTransitionTime" in before:
        return {**now_is, "lastTransitionTime": before["lastTransitionTime"]}
    return {**now_is, "lastTransitionTime": now.strftime("%Y-%m-%dT%H:%M:%SZ")}
