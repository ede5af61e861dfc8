"""A dataset's ledger on one machine: SQLite beside the records, one transaction for each transition.

The transitions are the protocol's pure functions; this file reads their input and writes their output. Deleting a
run folder leaves the ledger alone (docs/decisions/0001).
"""

import fcntl
import itertools
import os
import sqlite3
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path

from feddiff_protocol import ledger
from feddiff_protocol.accountant import Charge, spent_epsilon
from feddiff_protocol.api import BudgetSpec, FederatedDiffusionJob
from feddiff_protocol.errors import OutputFailed, PrivacyRefusal, SpecInvalid, StoreUnavailable
from feddiff_protocol.layout import release_name
from feddiff_protocol.ledger import Account, Entry, Phase, Refusal
from feddiff_protocol.plan import Hold

from .documents import LocalDataset, overlap

BUSY_SECONDS = 60.0
HOLD = {Phase.RESERVED: Hold.RESERVED, Phase.CHARGED: Hold.CHARGED, Phase.RETURNED: Hold.RETURNED}

ENTRY_COLUMNS = (
    *("name", "dataset_uid", "job_namespace", "job_name", "job_uid", "client", "mechanism", "unit"),
    *("epsilon", "delta", "mu_squared", "pure_epsilon", "reserved_at", "phase", "manifest_sha256"),
)
SCHEMA = (
    """CREATE TABLE account (
        one INTEGER PRIMARY KEY CHECK (one = 1), dataset_uid TEXT NOT NULL, dataset TEXT NOT NULL,
        budget TEXT NOT NULL, num_entries INTEGER NOT NULL,
        total_mu_squared TEXT NOT NULL, total_pure_epsilon TEXT NOT NULL,
        returned_mu_squared TEXT NOT NULL, returned_pure_epsilon TEXT NOT NULL)""",
    "CREATE TABLE records (path TEXT PRIMARY KEY)",
    f"CREATE TABLE entry ({', '.join(f'{name} TEXT NOT NULL' for name in ENTRY_COLUMNS)}, UNIQUE (name))",
    """CREATE TRIGGER entries_stay BEFORE DELETE ON entry
        BEGIN SELECT RAISE(ABORT, 'an entry of the ledger is never deleted'); END""",
    """CREATE TRIGGER charges_stay BEFORE UPDATE OF phase ON entry
        WHEN OLD.phase <> 'Reserved' AND NEW.phase <> OLD.phase
        BEGIN SELECT RAISE(ABORT, 'a charged or returned entry stays what it is'); END""",
)
ACCOUNT_COLUMNS = "num_entries, total_mu_squared, total_pure_epsilon, returned_mu_squared, returned_pure_epsilon"


@dataclass(frozen=True)
class LedgerState:
    """One consistent read of a dataset's ledger."""

    dataset_uid: str
    budget: BudgetSpec
    account: Account
    entries: tuple[Entry, ...]

    def entry(self, name: str) -> Entry | None:
        return next((entry for entry in self.entries if entry.name == name), None)

    @property
    def spent_epsilon(self) -> float:
        """ε per unit of everything that counts, reservations included, at the budget's δ."""
        return spent_epsilon(self.account.charges, self.budget.delta)

    @property
    def remaining_epsilon(self) -> float:
        """ε that one more release could ask for; 0 while the ledger contradicts itself."""
        if ledger.inconsistency(self.account, self.entries):
            return 0.0
        return ledger.remaining_epsilon(self.budget, self.account.charges)

    @property
    def remaining_pure_epsilon(self) -> Decimal:
        """The same of a release of pure ε."""
        if ledger.inconsistency(self.account, self.entries):
            return Decimal(0)
        return ledger.remaining_pure_epsilon(self.budget, self.account.charges)

    @property
    def num_releases(self) -> int:
        return sum(entry.phase is not Phase.RETURNED for entry in self.entries)


def read_ledger(dataset: LocalDataset) -> LedgerState:
    """The dataset's ledger as it stands, an empty one where none was begun. Writes nothing."""
    path, released = ledger_path(dataset), _released(dataset)
    if path.exists():
        with _reading(path) as db:
            if _begun(db):
                state = _read(db)
                _check_nothing_forgotten(dataset, released, state.entries)
                return LedgerState(state.dataset_uid, _grown(dataset, state.budget), state.account, state.entries)
    _check_nothing_forgotten(dataset, released, ())
    return LedgerState("", dataset.document.spec.budget, Account(), ())


def ledger_path(dataset: LocalDataset) -> Path:
    return dataset.owner_folder / "ledger.sqlite"


def local_now() -> datetime:
    return datetime.now(UTC)


class LocalLedger:
    """The ledger of one dataset, begun at first use. Safe against any number of processes at once."""

    def __init__(self, dataset: LocalDataset, now: Callable[[], datetime] = local_now) -> None:
        self.dataset = dataset
        self.path = ledger_path(dataset)
        self._now = now
        self.dataset_uid = self._begin()

    def state(self) -> LedgerState:
        with self._transaction() as db:
            return _read(db)

    def hold(self, job_uid: str, client: str) -> Hold:
        """What this ledger holds for a client of a job."""
        state = self.state()
        entry = state.entry(release_name(job_uid, client, state.dataset_uid))
        return HOLD[entry.phase] if entry else Hold.NONE

    def reserve(self, job: FederatedDiffusionJob, job_uid: str, client: str, charge: Charge) -> Refusal | None:
        """None when the release is reserved, now or before; otherwise why it is not admitted."""
        if refusal := ledger.access_refusal(self.dataset.document, job):
            return refusal
        with self._transaction() as db:
            state = _read(db)
            now = self._now().isoformat(timespec="seconds")
            request = ledger.request_of(job, job_uid, client, state.dataset_uid, charge, now)
            answer = ledger.reserve(state.budget, state.account, state.entries, request)
            if isinstance(answer, Refusal):
                return answer
            if answer.is_pending(request.name):
                _insert(db, request)
                _write_account(db, ledger.fold(answer, request))
        return None

    def charge(self, name: str) -> None:
        """The entry is charged, for good. Raises PrivacyRefusal when that would not be safe."""
        with self._transaction() as db:
            state = _read(db)
            _update(db, ledger.charge(state.account, state.entries, _existing(state, name)))

    def give_back(self, name: str) -> None:
        """The entry is returned if it was only reserved; a charged one stays charged."""
        with self._transaction() as db:
            state = _read(db)
            _update(db, ledger.give_back(_existing(state, name)))
            after = _read(db)
            _write_account(db, ledger.fold_returns(after.account, after.entries))

    def record_manifest(self, name: str, manifest_sha256: str) -> None:
        """The entry says what left. Raises PrivacyRefusal when something else left before."""
        with self._transaction() as db:
            state = _read(db)
            _update(db, ledger.record_manifest(_existing(state, name), manifest_sha256))

    def _begin(self) -> str:
        """The dataset's uid, drawn at the first call; the ledger's file is there and holds the records."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputFailed(f"{self.path.parent}: the ledger's folder cannot be made: {error.strerror}") from None
        budget, records = self.dataset.document.spec.budget, (self.dataset.source.path,)
        released = _released(self.dataset)
        with _alone_with(Path(self.dataset.source.path)), self._transaction() as db:
            if not _begun(db):
                for statement in SCHEMA:
                    db.execute(statement)
                values = (uuid.uuid4().hex, self.dataset.key, budget.model_dump_json(by_alias=True))
                db.execute("INSERT INTO account VALUES (1, ?, ?, ?, 0, '0', '0', '0', '0')", values)
            if db.execute("SELECT 1 FROM records WHERE path = ?", records).fetchone() is None:
                _check_sole_holder(self.dataset)
                db.execute("INSERT INTO records VALUES (?)", records)
            state = _read(db)
            _check_nothing_forgotten(self.dataset, released, state.entries)
            grown = _grown(self.dataset, state.budget)
            db.execute("UPDATE account SET budget = ?", (grown.model_dump_json(by_alias=True),))
        return state.dataset_uid

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        """All or nothing, durable, and alone: BEGIN IMMEDIATE keeps every other writer out."""
        with (
            _errors(self.path),
            closing(sqlite3.connect(self.path, timeout=BUSY_SECONDS, isolation_level=None)) as db,
        ):
            db.execute("PRAGMA synchronous = EXTRA")
            db.execute("BEGIN IMMEDIATE")
            try:
                yield db
                db.execute("COMMIT")
            except BaseException:
                if db.in_transaction:
                    db.execute("ROLLBACK")
                raise


def _grown(dataset: LocalDataset, known: BudgetSpec) -> BudgetSpec:
    """The budget as the document has it now. Raises SpecInvalid when that is less than it once was."""
    asked = dataset.document.spec.budget
    if (asked.delta, asked.unit, asked.pure_epsilon) != (known.delta, known.unit, known.pure_epsilon):
        raise SpecInvalid(
            f"dataset {dataset.key}: spec.budget: delta, unit and pureEpsilon cannot change;"
            f" expected {known.delta}, {known.unit} and {known.pure_epsilon}"
        )
    if asked.epsilon < known.epsilon:
        raise SpecInvalid(
            f"dataset {dataset.key}: spec.budget.epsilon may be raised, never lowered;"
            f" expected at least {known.epsilon}, found {asked.epsilon}"
        )
    return asked


def _released(dataset: LocalDataset) -> set[str]:
    """The releases that the owner's store knows of. To be asked before the ledger, which hears of each first."""
    folder = dataset.owner_folder / "store" / "releases"
    return {path.name for path in folder.glob("prl-*")} if folder.is_dir() else set()


def _check_nothing_forgotten(dataset: LocalDataset, released: set[str], entries: Iterable[Entry]) -> None:
    """Releases without a charge: whoever went on from such a ledger would spend the budget twice."""
    unknown = released - {entry.name for entry in entries if entry.phase is Phase.CHARGED}
    if unknown:
        raise PrivacyRefusal(
            f"dataset {dataset.key}: {dataset.owner_folder / 'store'} holds {len(unknown)} releases of which"
            f" {ledger_path(dataset)} knows nothing, the first {min(unknown)}: the ledger is gone, or older than they"
            " are; put a newer one back from a backup"
        )


def _check_sole_holder(dataset: LocalDataset) -> None:
    """Records that another dataset's ledger accounts for would get a second budget."""
    for path in _ledgers_about(dataset):
        with _reading(path) as db:
            held = db.execute("SELECT path FROM records").fetchall() if _begun(db) else []
        for (other,) in held:
            if overlap(dataset.source.path, other):
                raise PrivacyRefusal(
                    f"dataset {dataset.key}: the records {dataset.source.path} already have the ledger {path}, as"
                    f" {other}; use that dataset's name, namespace and path, one set of records has one budget"
                )


def _ledgers_about(dataset: LocalDataset) -> Iterator[Path]:
    """The other datasets' ledgers beside these records, beside each folder that holds them, and among them."""
    path, pattern = Path(dataset.source.path), "feddiff/*/ledger.sqlite"
    found = itertools.chain(*(folder.glob(pattern) for folder in path.parents), path.rglob(pattern))
    yield from (each for each in sorted(found) if each != ledger_path(dataset))


@contextmanager
def _alone_with(records: Path) -> Iterator[None]:
    """Nobody else begins a ledger of these records, of a folder that holds them or of a part of them: two that looked
    at once would each find the records free. Folders alone are locked, as some file systems lock no file that is only
    read."""
    mine = records if records.is_dir() else records.parent
    with ExitStack() as held:
        for folder in reversed((mine, *mine.parents)):
            with suppress(PermissionError):  # may be passed through, not read
                descriptor = os.open(folder, os.O_RDONLY)
                held.callback(os.close, descriptor)
                _lock(descriptor, folder, fcntl.LOCK_EX if folder == mine else fcntl.LOCK_SH)
        yield


def _lock(descriptor: int, folder: Path, kind: int) -> None:
    """Raises StoreUnavailable where another process keeps the folder for BUSY_SECONDS, OutputFailed where it cannot be
    locked."""
    give_up_at = time.monotonic() + BUSY_SECONDS
    while True:
        try:
            return fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > give_up_at:
                raise StoreUnavailable(
                    f"{folder}: another process kept it locked for {BUSY_SECONDS:.0f} s; run again"
                ) from None
            time.sleep(0.01)
        except OSError as error:
            raise OutputFailed(f"{folder}: cannot be locked, so no ledger begins below it: {error.strerror}") from None


def _existing(state: LedgerState, name: str) -> Entry:
    entry = state.entry(name)
    if entry is None:
        raise PrivacyRefusal(f"entry {name} is not in the ledger; nothing is released without its reservation")
    return entry


# ---- Rows ------------------------------------------------------------------------------------------------------


@contextmanager
def _reading(path: Path) -> Iterator[sqlite3.Connection]:
    """One consistent view. Not opened read-only, so that what a crash left half-written can be rolled back."""
    with _errors(path), closing(sqlite3.connect(f"{path.as_uri()}?mode=rw", uri=True, timeout=BUSY_SECONDS)) as db:
        db.execute("BEGIN")
        yield db


def _begun(db: sqlite3.Connection) -> bool:
    """Tables and account are made in one transaction; a file without them is a beginning that did not happen."""
    return db.execute("SELECT 1 FROM sqlite_master WHERE name = 'account'").fetchone() is not None


def _read(db: sqlite3.Connection) -> LedgerState:
    try:
        uid, budget = db.execute("SELECT dataset_uid, budget FROM account").fetchone()
        count, *sums = db.execute(f"SELECT {ACCOUNT_COLUMNS} FROM account").fetchone()
        total_mu, total_pure, returned_mu, returned_pure = (Decimal(value) for value in sums)
        account = Account(count, Charge(total_mu, total_pure), Charge(returned_mu, returned_pure))
        rows = db.execute(f"SELECT {', '.join(ENTRY_COLUMNS)} FROM entry ORDER BY reserved_at, rowid").fetchall()
        entries = tuple(_entry(dict(zip(ENTRY_COLUMNS, row, strict=True))) for row in rows)
        return LedgerState(uid, BudgetSpec.model_validate_json(budget), account, entries)
    except (TypeError, ValueError, ArithmeticError) as error:
        raise sqlite3.DatabaseError(f"a row does not make sense: {error}") from None


def _entry(row: dict[str, str]) -> Entry:
    return Entry(
        **{name: row[name] for name in ENTRY_COLUMNS[:8]},
        epsilon=Decimal(row["epsilon"]),
        delta=Decimal(row["delta"]),
        charge=Charge(Decimal(row["mu_squared"]), Decimal(row["pure_epsilon"])),
        reserved_at=row["reserved_at"],
        phase=Phase(row["phase"]),
        manifest_sha256=row["manifest_sha256"],
    )


def _insert(db: sqlite3.Connection, entry: Entry) -> None:
    charge = {"mu_squared": entry.charge.mu_squared, "pure_epsilon": entry.charge.pure_epsilon}
    values = [str(charge[name] if name in charge else getattr(entry, name)) for name in ENTRY_COLUMNS]
    marks = ", ".join("?" * len(values))
    db.execute(f"INSERT INTO entry ({', '.join(ENTRY_COLUMNS)}) VALUES ({marks})", values)


def _update(db: sqlite3.Connection, entry: Entry) -> None:
    """Only these two columns ever change."""
    db.execute(
        "UPDATE entry SET phase = ?, manifest_sha256 = ? WHERE name = ?",
        (entry.phase.value, entry.manifest_sha256, entry.name),
    )


def _write_account(db: sqlite3.Connection, account: Account) -> None:
    assert not account.pending, "reserving, creating and folding are one transaction here"
    db.execute(
        "UPDATE account SET num_entries = ?, total_mu_squared = ?, total_pure_epsilon = ?,"
        " returned_mu_squared = ?, returned_pure_epsilon = ?",
        (
            account.num_entries,
            str(account.total.mu_squared),
            str(account.total.pure_epsilon),
            str(account.returned.mu_squared),
            str(account.returned.pure_epsilon),
        ),
    )


@contextmanager
def _errors(path: Path) -> Iterator[None]:
    """SQLite's words as ours; a ledger that cannot be understood admits nothing."""
    try:
        yield
    except sqlite3.OperationalError as error:
        if "locked" in str(error):
            raise StoreUnavailable(
                f"ledger {path}: other runs kept it busy for {BUSY_SECONDS:.0f} s; run again"
            ) from None
        raise OutputFailed(f"ledger {path}: {error}; check space and permissions of its folder") from None
    except sqlite3.Error as error:
        raise PrivacyRefusal(f"ledger {path}: cannot be understood: {error}; put it back from a backup") from None
