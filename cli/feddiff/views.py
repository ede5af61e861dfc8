"""What a run or a ledger looks like afterwards: the answers of `feddiff ledger`, `status` and `report`."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from feddiff_protocol import layout, ledger
from feddiff_protocol.errors import InputMissing
from feddiff_protocol.ledger import Entry
from feddiff_protocol.plan import OWNER_STAGES, StageKey, StagePhase
from feddiff_protocol.stages import Stage

from .documents import LocalDataset
from .local_ledger import LedgerState, ledger_path, read_ledger
from .plan_report import budget_document, decimal_text
from .run_folder import RunFolder

# ---- ledger ----------------------------------------------------------------------------------------------------


def ledger_document(dataset: LocalDataset) -> dict[str, Any]:
    """One dataset's ledger as JSON."""
    state = read_ledger(dataset)
    return {
        "dataset": dataset.key,
        "uid": state.dataset_uid,
        "unit": state.budget.unit,
        "budget": budget_document(state, ()),
        "releases": state.num_releases,
        "contradiction": ledger.inconsistency(state.account, state.entries) or "",
        "entries": [entry_document(entry) for entry in state.entries],
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


def print_ledgers(datasets: Sequence[LocalDataset], console: Console) -> None:
    for dataset in datasets:
        _print_ledger(dataset, read_ledger(dataset), console)


def _print_ledger(dataset: LocalDataset, state: LedgerState, console: Console) -> None:
    budget = state.budget
    console.print(f"{dataset.key}  ({ledger_path(dataset)})", highlight=False, markup=False, soft_wrap=True)
    if problem := ledger.inconsistency(state.account, state.entries):
        console.print(f"  contradicts itself, admits nothing: {problem}", markup=False, highlight=False)
    if state.entries:
        console.print(_entries_table(state.entries))
    plural = "release" if state.num_releases == 1 else "releases"
    terms = f"δ = {decimal_text(budget.delta)}, {state.num_releases} {plural}"
    pure = f", of pure ε {state.remaining_pure_epsilon} of {budget.pure_epsilon}" if budget.pure_epsilon else ""
    console.print(
        f"  spent ε = {state.spent_epsilon:.4f} of {budget.epsilon} per {budget.unit} ({terms}),"
        f" remaining ε = {ledger.epsilon_left(state.remaining_epsilon)}{pure}\n",
        highlight=False,
        soft_wrap=True,
    )


def _entries_table(entries: Sequence[Entry]) -> Table:
    table = Table("reserved", "job", "client", "mechanism", "ε", "δ", "unit", "charge", "phase", "manifest")
    for entry in entries:
        table.add_row(
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
    return table


def charge_text(entry: Entry) -> str:
    """What the entry adds to its ledger's sums."""
    if entry.charge.pure_epsilon:
        return f"pure ε {entry.charge.pure_epsilon}"
    return f"μ² {entry.charge.mu_squared:.6f}"


# ---- status ----------------------------------------------------------------------------------------------------


def run_document(folder: RunFolder) -> dict[str, Any]:
    """A run's status as JSON. Raises InputMissing where there is no run."""
    record, said, at_work = folder.record(), folder.read_status(), folder.is_locked()
    clients = [client.name for client in record.job.spec.clients]
    keys = [(Stage.RELEASE, name) for name in clients] + [(Stage.TRAIN_SHARED, "")]
    keys += [(stage, name) for stage in OWNER_STAGES for name in clients] + [(Stage.REPORT, "")]
    return {
        "folder": str(folder.path),
        "uid": record.uid,
        "job": {"namespace": record.job.metadata.namespace, "name": record.job.metadata.name},
        "atWork": at_work,
        "phase": said.get("phase", "Pending"),
        "conditions": said.get("conditions", []),
        "counted": said.get("counted", []),
        "dropped": said.get("dropped", {}),
        "stages": [_stage_document(folder, record.uid, key, at_work) for key in keys],
    }


def _stage_document(folder: RunFolder, uid: str, key: StageKey, at_work: bool) -> dict[str, Any]:
    stage, client = key
    attempt = folder.newest_attempt(key)
    return {
        "stage": stage.value,
        "client": client,
        "attempt": attempt,
        "phase": _stage_phase(folder, uid, key, attempt, at_work),
    }


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


def print_run(document: dict[str, Any], console: Console) -> None:
    job = document["job"]
    console.print(f"Job {job['namespace']}/{job['name']}: {document['phase']}", highlight=False)
    console.print(
        f"  folder {document['folder']}, uid {document['uid']}", highlight=False, soft_wrap=True, markup=False
    )
    console.print("  an engine is at work" if document["atWork"] else "  no engine is at work", highlight=False)
    table = Table("stage", "client", "attempt", "phase")
    for each in document["stages"]:
        table.add_row(each["stage"], each["client"], str(each["attempt"] or ""), each["phase"])
    console.print(table)
    for condition in document["conditions"]:
        if condition["type"] == "Failed" and condition["status"]:
            console.print(f"Failed: {condition['reason']}: {condition['message']}", markup=False, highlight=False)


# ---- report ----------------------------------------------------------------------------------------------------


def report_paths(folder: RunFolder) -> tuple[Path, dict[str, Path]]:
    """The job report, which may be shared, and each owner's report, which may not. Raises InputMissing."""
    record = folder.record()
    job_report = folder.path / "federation" / layout.job_report(record.uid)
    if not job_report.exists():
        raise InputMissing(f"{folder.path}: the run has no report yet; `feddiff run` with this --dir finishes it")
    owners = {
        client: dataset.owner_folder / "store" / layout.owner_report(record.uid, client)
        for client, dataset in folder.job().datasets.items()
    }
    return job_report, {client: path for client, path in owners.items() if path.exists()}


def print_reports(folder: RunFolder, console: Console) -> None:
    job_report, owner_reports = report_paths(folder)
    console.print("May be shared (made from the releases alone):", highlight=False)
    console.print(f"  {job_report}", soft_wrap=True, highlight=False, markup=False)
    console.print("Not private, for its owner only (shows own records or what was trained on them):", highlight=False)
    for client, path in owner_reports.items():
        console.print(f"  {client}: {path}", soft_wrap=True, highlight=False, markup=False)
