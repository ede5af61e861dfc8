"""What a cluster says about budgets: a dataset and its entries in, answers for people and as JSON out.

Pure: on_cluster.py reads the objects. The operator's numbers are checked against the entries, composed here again.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from decimal import ROUND_CEILING, Decimal
from typing import Any

from rich.console import Console

from feddiff_protocol import ledger
from feddiff_protocol.accountant import Charge, spent_epsilon
from feddiff_protocol.api import BudgetSpec, parse
from feddiff_protocol.errors import SpecInvalid
from feddiff_protocol.ledger import Account, Entry, Phase
from feddiff_protocol.ledger_objects import account_of, entry_of

from .tables import print_table, say
from .views import entry_document

Object = dict[str, Any]


@dataclass(frozen=True)
class Books:
    """A dataset and its entries, read so that nothing changed in between, as far as `steady` says."""

    dataset: Object
    releases: Sequence[Object] | None  # None: not the reader's to see
    steady: bool = True


def budget_document(books: Books) -> Object:
    """One dataset's budget as JSON: the operator's numbers, the accountant's own sum, and whether they agree."""
    metadata, spec = books.dataset["metadata"], books.dataset["spec"]["budget"]
    said = (books.dataset.get("status") or {}).get("budget") or {}
    composed, contradiction, entries = _checked(books)
    return {
        "dataset": f"{metadata['namespace']}/{metadata['name']}",
        "uid": metadata["uid"],
        "unit": spec.get("unit", "image"),
        "delta": spec["delta"],
        "limitEpsilon": spec["epsilon"],
        "spentEpsilon": said.get("spent", ""),
        "reservedEpsilon": said.get("reserved", ""),
        "remainingEpsilon": said.get("remaining", ""),
        "remainingPureEpsilon": said.get("remainingPure", ""),
        "releases": (books.dataset.get("status") or {}).get("numReleases", 0),
        "composedEpsilon": composed,
        "contradiction": contradiction,
        "steady": books.steady,
        "entries": None if entries is None else [entry_document(entry) for entry in entries],
    }


def _checked(books: Books) -> tuple[str, str, list[Entry] | None]:
    """ε of all that counts, composed here from the entries; what contradicts the status; the entries."""
    try:
        budget = parse(BudgetSpec, books.dataset["spec"]["budget"], "spec.budget")
        account = account_of(books.dataset.get("status"))
        entries = None if books.releases is None else _own_entries(books)
    except SpecInvalid as error:
        return "", f"the ledger cannot be understood: {error}", None
    if entries is None:
        charges = account.charges if account else ()
        composed = _up(charges, budget)
        return composed, mismatch(books.dataset) or _differs(books, composed), None
    settled = ledger.settled(account or Account(), entries)
    composed = _up(_charges(settled, entries), budget)
    if account is None:
        return composed, "the status has no account yet" if entries else "", entries
    words = ledger.inconsistency(settled, entries) or ("" if settled != account else _differs(books, composed))
    return composed, mismatch(books.dataset) or words, entries


def _own_entries(books: Books) -> list[Entry]:
    name = books.dataset["metadata"]["name"]
    own = [each for each in books.releases or () if each["spec"]["dataset"]["name"] == name]
    return sorted((entry_of(each) for each in own), key=lambda entry: (entry.reserved_at, entry.name))


def _charges(account: Account, entries: Iterable[Entry]) -> list[Charge]:
    """What counts: entries not given back, reservations without an entry, and what the owner accepted as lost."""
    entries = list(entries)
    names = {entry.name for entry in entries}
    pending = [entry.charge for entry in account.pending if entry.name not in names]
    return [*(entry.charge for entry in entries if entry.phase is not Phase.RETURNED), *pending, account.lost]


def _up(charges: Iterable[Charge], budget: BudgetSpec) -> str:
    composed = Decimal(spent_epsilon(list(charges), budget.delta)).quantize(Decimal("1e-4"), ROUND_CEILING)
    return f"{composed.normalize():f}"


def _differs(books: Books, composed: str) -> str:
    said = (books.dataset.get("status") or {}).get("budget") or {}
    if "spent" not in said or "reserved" not in said:
        return ""
    total = Decimal(said["spent"]) + Decimal(said["reserved"])
    return "" if total == Decimal(composed) else f"the status counts ε = {total.normalize():f}, the ledger {composed}"


def mismatch(dataset: Object) -> str:
    """The operator's own words on a ledger that does not add up; nothing where it does."""
    for each in (dataset.get("status") or {}).get("conditions") or []:
        if each["type"] == "LedgerConsistent" and each["status"] == "False":
            return str(each["message"])
    return ""


def print_budgets(documents: Sequence[Object], console: Console) -> None:
    columns = ("dataset", "ε limit", "ε spent", "ε reserved", "ε remaining", "per", "δ", "releases")
    names = ("limitEpsilon", "spentEpsilon", "reservedEpsilon", "remainingEpsilon", "unit", "delta")
    rows = []
    for each in documents:  # of a ledger that does not add up, nobody may count on what remains
        pure = f", pure {each['remainingPureEpsilon']}" if each["remainingPureEpsilon"] not in ("", "0") else ""
        shown = {**each, "remainingEpsilon": "" if each["contradiction"] else each["remainingEpsilon"] + pure}
        rows.append((each["dataset"], *(shown[name] or "-" for name in names), str(each["releases"])))
    if rows:
        print_table(console, columns, rows)
    else:
        say(console, "no datasets here")
    for each in documents:
        if each["contradiction"]:
            say(console, f"{each['dataset']}: DOES NOT ADD UP: {each['contradiction']}")
        if not each["steady"]:
            say(console, f"{each['dataset']}: it changed while it was read; ask again")


def print_entries(document: Object, console: Console) -> None:
    """The entries of one dataset, and what they compose to."""
    if document["entries"] is None:
        say(console, "its entries are for its owner to see (role feddiff-data-owner)")
    else:
        columns = ("reserved at", "job", "client", "mechanism", "ε", "δ", "phase", "manifest")
        rows = [
            (
                each["reservedAt"][:19],
                f"{each['job']['namespace']}/{each['job']['name']}",
                each["client"],
                each["mechanism"],
                each["epsilon"],
                each["delta"],
                each["phase"],
                each["manifestSha256"][:12],
            )
            for each in document["entries"]
        ]
        print_table(console, columns, rows)
    terms = f"per {document['unit']}, δ = {document['delta']}, reservations included"
    say(console, f"composed by the accountant: ε = {document['composedEpsilon'] or '?'} ({terms})")
