"""What a run or a ledger looks like afterwards: the answers of `feddiff ledger`, `status` and `report`."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError
from rich.console import Console
from rich.table import Table

from feddiff_protocol import layout, ledger
from feddiff_protocol.errors import DataInvalid, InputMissing
from feddiff_protocol.ledger import Entry
from feddiff_protocol.plan import OWNER_STAGES, JobPhase, StageKey, StagePhase
from feddiff_protocol.stages import Stage

from .documents import LocalDataset
from .local_ledger import ledger_path, read_ledger
from .plan_report import Budget, budget_document, budget_of, decimal_text
from .run_folder import RunFolder
from .tables import html_list, html_table

# ---- ledger ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ledger:
    """Every release of one dataset, what they add up to, and what is left. A notebook shows it as a table."""

    dataset: str  # namespace/name
    path: Path  # where it lies, beside the records; the file is begun by the first run
    uid: str  # of the dataset; empty before the first run
    unit: str  # of every ε here: image
    budget: Budget  # spent and left; nothing is left while there is a contradiction
    releases: int  # that count, reservations included
    entries: tuple[Entry, ...]  # of feddiff_protocol.ledger, oldest first, returned ones included
    contradiction: str  # empty, or how account and entries differ: then nothing is admitted

    def _repr_html_(self) -> str:
        entries = html_table(self.dataset, ENTRY_COLUMNS, map(_entry_row, self.entries)) if self.entries else ""
        return entries + html_list(self.dataset, _ledger_lines(self))


def ledger_of(dataset: LocalDataset) -> Ledger:
    """The dataset's ledger as it stands, an empty one where none was begun. Writes nothing."""
    state = read_ledger(dataset)
    return Ledger(
        dataset=dataset.key,
        path=ledger_path(dataset),
        uid=state.dataset_uid,
        unit=state.budget.unit,
        budget=budget_of(state),
        releases=state.num_releases,
        entries=state.entries,
        contradiction=ledger.inconsistency(state.account, state.entries) or "",
    )


def ledger_document(found: Ledger) -> dict[str, Any]:
    """One dataset's ledger as JSON."""
    return {
        "dataset": found.dataset,
        "uid": found.uid,
        "unit": found.unit,
        "budget": budget_document(found.budget),
        "releases": found.releases,
        "contradiction": found.contradiction,
        "entries": [entry_document(entry) for entry in found.entries],
    }


def entry_document(entry: Entry) -> dict[str, Any]:
    """One entry of a ledger as `--json` prints it, wherever the ledger lies."""
    return {
        "name": entry.name,
        "job": {"namespace": entry.job_namespace, "name": entry.job_name, "uid": entry.job_uid},
        "client": entry.client,
        "mechanism": entry.mechanism,
        "unit": entry.unit,
        "epsilon": str(entry.epsilon),
        "delta": decimal_text(entry.delta),
        "muSquared": str(entry.charge.mu_squared),
        "pureEpsilon": str(entry.charge.pure_epsilon),
        "reservedAt": entry.reserved_at,
        "phase": entry.phase.value,
        "manifestSha256": entry.manifest_sha256,
    }


def print_ledgers(ledgers: Sequence[Ledger], console: Console) -> None:
    for each in ledgers:
        _print_ledger(each, console)


def _print_ledger(found: Ledger, console: Console) -> None:
    console.print(f"{found.dataset}  ({found.path})", highlight=False, markup=False, soft_wrap=True)
    *contradiction, spent = _ledger_lines(found)
    for line in contradiction:
        console.print(f"  {line}", markup=False, highlight=False)
    if found.entries:
        table = Table(*ENTRY_COLUMNS)
        for entry in found.entries:
            table.add_row(*_entry_row(entry))
        console.print(table)
    console.print(f"  {spent}\n", highlight=False, soft_wrap=True)


def _ledger_lines(found: Ledger) -> list[str]:
    """What contradicts itself, if anything does, and what is spent and left."""
    budget, plural = found.budget, "release" if found.releases == 1 else "releases"
    lines = [f"contradicts itself, admits nothing: {found.contradiction}"] if found.contradiction else []
    terms = f"δ = {decimal_text(budget.delta)}, {found.releases} {plural}"
    limit = budget.limit_pure_epsilon
    pure = f", of pure ε {budget.remaining_pure_epsilon} of {limit}" if limit else ""
    lines.append(
        f"spent ε = {budget.spent_epsilon:.4f} of {budget.limit_epsilon} per {found.unit} ({terms}),"
        f" remaining ε = {ledger.epsilon_left(budget.remaining_epsilon)}{pure}"
    )
    return lines


ENTRY_COLUMNS = ("reserved", "job", "client", "mechanism", "ε", "δ", "unit", "charge", "phase", "manifest")


def _entry_row(entry: Entry) -> tuple[str, ...]:
    return (
        entry.reserved_at[:19],
        f"{entry.job_namespace}/{entry.job_name}",
        entry.client,
        entry.mechanism,
        str(entry.epsilon),
        decimal_text(entry.delta),
        entry.unit,
        charge_text(entry),
        entry.phase.value,
        entry.manifest_sha256[:12],
    )


def charge_text(entry: Entry) -> str:
    """What the entry adds to its ledger's sums."""
    if entry.charge.pure_epsilon:
        return f"pure ε {entry.charge.pure_epsilon}"
    return f"μ² {entry.charge.mu_squared:.6f}"


# ---- status ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StageStatus:
    """The newest attempt of one stage."""

    stage: Stage  # release, train-shared, train-personal, sample, evaluate or report
    client: str  # empty for train-shared and report
    attempt: int  # 0 before the first
    phase: str  # Pending, Running, Succeeded, Failed or Stopped


@dataclass(frozen=True)
class RunCondition:
    """What has come about, or has not. A cluster says the same: docs/api.md lists types and reasons."""

    type: str  # Accepted, BudgetReserved, …, Complete or Failed
    status: bool  # whether it is so
    reason: str  # one word; docs/runbooks has a page for each
    message: str  # in words


@dataclass(frozen=True)
class RunStatus:
    """Where a run stands. A notebook shows it as a table."""

    folder: Path  # absolute
    uid: str  # of the run
    job: str  # namespace/name
    at_work: bool  # whether an engine is at work on it, here or in another process
    phase: str  # Pending, Reserving, …, Complete or Failed
    conditions: tuple[RunCondition, ...]  # empty before the first look
    counted: tuple[str, ...]  # clients whose releases count, once that is decided
    dropped: Mapping[str, str]  # client → why it takes part no longer
    stages: tuple[StageStatus, ...]  # of every client, in the order of a run

    @property
    def failure(self) -> str:
        """What the run died of, reason and words; empty unless its phase is Failed."""
        failed = (each for each in self.conditions if each.type == "Failed" and each.status)
        return next((f"{each.reason}: {each.message}" for each in failed), "")

    def _repr_html_(self) -> str:
        failed = [f"Failed: {self.failure}"] if self.failure else []
        return html_table(_status_title(self), STAGE_COLUMNS, map(_stage_row, self.stages)) + html_list(
            _at_work(self), failed
        )


def run_status(folder: RunFolder) -> RunStatus:
    """Where the run in a folder stands. Raises InputMissing where there is no run."""
    record, said, at_work = folder.record(), folder.read_status(), folder.is_locked()
    clients = [client.name for client in record.job.spec.clients]
    keys = [(Stage.RELEASE, name) for name in clients] + [(Stage.TRAIN_SHARED, "")]
    keys += [(stage, name) for stage in OWNER_STAGES for name in clients] + [(Stage.REPORT, "")]
    return RunStatus(
        folder=folder.path,
        uid=record.uid,
        job=f"{record.job.metadata.namespace}/{record.job.metadata.name}",
        at_work=at_work,
        phase=said.get("phase", JobPhase.PENDING.value),
        conditions=tuple(RunCondition(**each) for each in said.get("conditions", ())),
        counted=tuple(said.get("counted", ())),
        dropped=said.get("dropped", {}),
        stages=tuple(_stage_status(folder, record.uid, key, at_work) for key in keys),
    )


def _stage_status(folder: RunFolder, uid: str, key: StageKey, at_work: bool) -> StageStatus:
    attempt = folder.newest_attempt(key)
    return StageStatus(*key, attempt, _stage_phase(folder, uid, key, attempt, at_work))


def _stage_phase(folder: RunFolder, uid: str, key: StageKey, attempt: int, at_work: bool) -> str:
    if attempt == 0:
        return "Pending"
    if folder.receipt(key, attempt, uid) is not None:
        return StagePhase.SUCCEEDED.value
    try:
        ended = json.loads((folder.attempt_folder(key, attempt) / "exit.json").read_text())
        return str(ended["phase"])
    except (OSError, ValueError, KeyError):
        return (StagePhase.RUNNING if at_work else StagePhase.STOPPED).value


def run_document(status: RunStatus) -> dict[str, Any]:
    """A run's status as JSON."""
    namespace, _, name = status.job.partition("/")
    return {
        "folder": str(status.folder),
        "uid": status.uid,
        "job": {"namespace": namespace, "name": name},
        "atWork": status.at_work,
        "phase": status.phase,
        "conditions": [asdict(each) for each in status.conditions],
        "counted": list(status.counted),
        "dropped": dict(status.dropped),
        "stages": [asdict(each) for each in status.stages],
    }


STAGE_COLUMNS = ("stage", "client", "attempt", "phase")


def print_run(status: RunStatus, console: Console) -> None:
    console.print(_status_title(status), highlight=False)
    console.print(f"  folder {status.folder}, uid {status.uid}", highlight=False, soft_wrap=True, markup=False)
    console.print(f"  {_at_work(status)}", highlight=False)
    table = Table(*STAGE_COLUMNS)
    for each in status.stages:
        table.add_row(*_stage_row(each))
    console.print(table)
    if status.failure:
        console.print(f"Failed: {status.failure}", markup=False, highlight=False)


def _status_title(status: RunStatus) -> str:
    return f"Job {status.job}: {status.phase}"


def _at_work(status: RunStatus) -> str:
    return "an engine is at work" if status.at_work else "no engine is at work"


def _stage_row(each: StageStatus) -> tuple[str, ...]:
    return each.stage.value, each.client, str(each.attempt or ""), each.phase


# ---- report ----------------------------------------------------------------------------------------------------

SHAREABLE = "May be shared (made from the releases alone):"
PRIVATE = "Not private, for its owner only (shows own records or what was trained on them):"
Figures = Mapping[str, Mapping[str, Mapping[str, float | None]]]


@dataclass(frozen=True)
class OwnerReport:
    """What one owner's evaluation found. NOT private: it shows the owner's records, and is for the owner alone."""

    page: Path  # the owner report, HTML
    evaluation: Path  # the figures of that page, JSON

    @property
    def figures(self) -> Figures:
        """A value by arm, group of classes and measure, None where it could not be measured; empty where the dataset
        names no hold-out. Raises DataInvalid where the evaluation cannot be read."""
        try:
            found = _Evaluation.model_validate_json(self.evaluation.read_bytes())
        except (OSError, ValidationError):
            raise DataInvalid(
                f"{self.evaluation}: expected an evaluation of this version, found none; its figures are in {self.page}"
            ) from None
        return {name: arm.groups for name, arm in found.arms.items()}


@dataclass(frozen=True)
class Report:
    """What a complete run left to read. A notebook shows where, and the owners' figures."""

    job_report: Path  # HTML; may be shared, being made from the releases alone
    owners: Mapping[str, OwnerReport]  # by client, of those whose releases count

    def _repr_html_(self) -> str:
        figures = [
            (client, arm, group, values)
            for client, owner in self.owners.items()
            for arm, groups in owner.figures.items()
            for group, values in groups.items()
        ]
        measures = tuple(dict.fromkeys(name for *_, values in figures for name in values))
        rows = [(*place, *(_figure(values.get(name)) for name in measures)) for *place, values in figures]
        return "".join(
            [
                html_list(SHAREABLE, [str(self.job_report)]),
                html_list(PRIVATE, [f"{client}: {owner.page}" for client, owner in self.owners.items()]),
                html_table(PRIVATE, ("client", "arm", "group", *measures), rows) if rows else "",
            ]
        )


def _figure(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}"


class _Arm(BaseModel):
    groups: Mapping[str, Mapping[str, float | None]]


class _Evaluation(BaseModel):
    """The part of an evaluation that is read here; the trainer's evaluation.py has the whole."""

    arms: Mapping[str, _Arm]


def report_of(folder: RunFolder) -> Report:
    """The reports of a complete run. Raises InputMissing before there are any."""
    record = folder.record()
    job_report = folder.path / "federation" / layout.job_report(record.uid)
    if not job_report.exists():
        raise InputMissing(f"{folder.path}: the run has no report yet; `feddiff run` with this --dir finishes it")
    owners = {}
    for client, dataset in folder.job().datasets.items():
        store = dataset.owner_folder / "store"
        page = store / layout.owner_report(record.uid, client)
        if page.exists():
            owners[client] = OwnerReport(page, store / layout.evaluation(record.uid, client))
    return Report(job_report, owners)


def print_reports(report: Report, console: Console) -> None:
    console.print(SHAREABLE, highlight=False)
    console.print(f"  {report.job_report}", soft_wrap=True, highlight=False, markup=False)
    console.print(PRIVATE, highlight=False)
    for client, owner in report.owners.items():
        console.print(f"  {client}: {owner.page}", soft_wrap=True, highlight=False, markup=False)
