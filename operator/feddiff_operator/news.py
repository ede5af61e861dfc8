"""What the owner of a dataset wants to know about its ledger when it comes about, as Events of the PrivateDataset.

Worked out from two versions of its status, so it is said when the status is written, and once: what stays as it is is
no news. The conditions are the truth; an Event can be lost.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from .events import Recorder

Object = Mapping[str, Any]


@dataclass(frozen=True)
class News:
    reason: str
    message: str
    warning: bool = False


def tell(recorder: Recorder, before: Object, after: Object) -> None:
    """Everything that is new in the dataset `after` is recorded."""
    for each in news(before, after):
        recorder.record(after, each.reason, each.message, each.warning)


def news(before: Object, after: Object) -> list[News]:
    """What the status of the dataset `after` says and that of `before` did not, the gravest first."""
    old, new = before.get("status") or {}, after.get("status") or {}
    spent = _spent(after)
    return [*_of_conditions(old, new), *_of_account(old.get("account"), new.get("account") or {}, spent)] or [
        *_of_budget(old.get("budget") or {}, new.get("budget") or {}, spent)
    ]


def _of_conditions(old: Object, new: Object) -> Iterator[News]:
    ready, consistent, exhausted = (_condition(new, kind) for kind in ("Ready", "LedgerConsistent", "BudgetExhausted"))
    if consistent["status"] == "False" and consistent["message"] != _condition(old, "LedgerConsistent")["message"]:
        yield News("LedgerMismatch", consistent["message"], warning=True)
    if ready["reason"] == "SpecInvalid" and ready["message"] != _condition(old, "Ready")["message"]:
        yield News("SpecInvalid", ready["message"], warning=True)
    if _turned(old, new, "BudgetExhausted", "True"):
        yield News("BudgetExhausted", exhausted["message"], warning=True)
    if _turned(old, new, "BudgetExhausted", "False") and _condition(old, "BudgetExhausted")["status"] == "True":
        yield News("BudgetLeft", "the budget admits releases again")


def _of_account(old: Object | None, new: Object, spent: str) -> Iterator[News]:
    if not old and new.get("numEntries"):
        yield News("PastAdopted", f"{new['numEntries']} earlier entries of this dataset's name count; {spent}")
    if old and new.get("numAcknowledged", 0) > old.get("numAcknowledged", 0):
        yield News("LedgerAcknowledged", f"the contradiction is accepted, the larger of both sums counts; {spent}")


def _of_budget(old: Object, new: Object, spent: str) -> Iterator[News]:
    if _number(new.get("spent")) > _number(old.get("spent")):
        yield News("Charged", spent)


def _spent(dataset: Object) -> str:
    promised, held = dataset["spec"].get("budget") or {}, (dataset.get("status") or {}).get("budget") or {}
    pure = f", of pure ε {held['remainingPure']}" if held.get("remainingPure", "0") != "0" else ""
    left = f"{held.get('remaining', '?')} remains{pure}"
    return f"ε = {held.get('spent', '?')} of {promised.get('epsilon', '?')} is spent, {left}"


def _turned(old: Object, new: Object, kind: str, status: str) -> bool:
    return bool(_condition(new, kind)["status"] == status != _condition(old, kind)["status"])


def _condition(status: Object, kind: str) -> Object:
    none = {"status": "", "reason": "", "message": ""}
    return next(({**none, **each} for each in status.get("conditions") or () if each.get("type") == kind), none)


def _number(text: object) -> float:
    try:
        return float(str(text))
    except ValueError:
        return 0.0
