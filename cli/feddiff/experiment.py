"""An experiment carried out on one machine: every unit that has no row yet is run, and gets one.

Rows are all that remains to be said about a unit: table and figure are made of them. Whatever happens, a unit is
either in rows.jsonl, whole, or it goes on where it was.
"""

import json
import os
import platform
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from decimal import ROUND_UP, Decimal
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from feddiff_protocol import layout, ledger
from feddiff_protocol.accountant import Charge, admits, budget_mu_squared, spent_epsilon, total_charge
from feddiff_protocol.api import Name, Wire, parse
from feddiff_protocol.baselines import Baseline
from feddiff_protocol.errors import InputMissing, OutputFailed, PrivacyRefusal, SpecInvalid, StoreUnavailable
from feddiff_protocol.ledger import Phase
from feddiff_protocol.plan import StageKey
from feddiff_protocol.stages import Receipt, Seed, Sha256, Stage

from .baseline_runs import Groups, run_baseline
from .documents import LocalDataset, LocalJob
from .engine import Setting, run_job
from .experiment_file import Experiment, Unit, unit_key
from .local_ledger import read_ledger
from .owner_stages import StageFailed
from .plan_report import decimal_text
from .run_folder import RunFolder, replace_file
from .views import OwnerReport

ROWS = "rows.jsonl"
HELD = (Phase.RESERVED, Phase.CHARGED)
ARM = "both"  # of an evaluation: the shared denoiser down to the split, the personal one from there


class PromiseMade(Wire):
    """What was promised to every owner of one unit's release; ε is never said without the rest."""

    mechanism: str
    epsilon: str
    delta: str
    unit: str
    releases: int  # of each owner, in this unit
    attack_auc: float | None = None  # None: not known more closely than by ε


class Row(Wire):
    """One unit's figures. They depend on every owner's records."""

    format: Literal["feddiff.experiment-row/1"] = "feddiff.experiment-row/1"
    experiment: str
    arm: Name
    baseline: Baseline | None = None
    of: Name | None = None  # the arm whose run it takes
    cell: Mapping[str, Any]
    seed: Seed
    promise: PromiseMade | None = None  # None: nothing is promised to anybody
    owners: Annotated[Mapping[str, Groups], Field(min_length=1)]  # by client
    image_steps: Mapping[str, int]  # by network
    seconds: float  # of the last attempt of each stage, added up
    versions: Mapping[str, str]
    commit: str
    cpu: str
    cores: int
    finished_at: str
    asked: Sha256

    @property
    def key(self) -> tuple[str, str, int]:
        return unit_key(self.arm, self.cell, self.seed)


def run_experiment(
    experiment: Experiment, out: Path, setting: Setting, told: Callable[[Unit, int, int], None]
) -> list[Row]:
    """Every unit's row, those that were there before first. `told` hears of each unit that is begun: how many are done,
    of how many.

    Raises PrivacyRefusal before anything starts where a budget does not hold all that is left to do, SpecInvalid where
    `out` holds rows of another experiment, Interrupted when stopped, StageFailed with the words of a unit that failed.
    """
    folder = RunFolder(out)
    with folder.locked():
        rows = read_rows(out)
        left = units_left(experiment, rows, out)
        check_budgets(left, out)
        for unit in left:
            told(unit, len(experiment.units) - len(left) + left.index(unit), len(experiment.units))
            rows.append(_row(experiment, unit, _run(unit, out, setting)))
            write_rows(out, rows)
    return rows


def units_left(experiment: Experiment, rows: Sequence[Row], out: Path) -> list[Unit]:
    """The units without a row. Raises SpecInvalid where one's row says that something else was asked for."""
    asked = {row.key: row.asked for row in rows}
    for unit in experiment.units:
        if asked.get(unit.key, unit.asked) != unit.asked:
            raise SpecInvalid(
                f"{out / ROWS}: expected rows of this experiment, found one for {unit.label} of another job, network or"
                " data; use another --out, or give the arm another name"
            )
    return [unit for unit in experiment.units if unit.key not in asked]


@dataclass(frozen=True)
class Found:
    """What a unit that is through left behind."""

    owners: Mapping[str, Groups]
    image_steps: Mapping[str, int]
    receipts: Sequence[Receipt]


def _run(unit: Unit, out: Path, setting: Setting) -> Found:
    """The unit carried on from wherever it stands."""
    folder = RunFolder(unit.folder(out))
    if unit.baseline is Baseline.ALONE:
        return _personal_alone(unit, _run_taken(unit, out))
    if unit.baseline is not None:
        run = _run_taken(unit, out) if unit.of is not None else None
        return Found(*run_baseline(unit, unit.baseline, folder, run, setting))
    _check_same_trainings(unit, folder)
    outcome = run_job(unit.job, folder, replace(setting, seed=unit.seed))
    if outcome.exit_code:
        log = f"; its words are in {outcome.log}" if outcome.log is not None else ""
        raise StageFailed(f"{unit.label}: {outcome.message}{log}", outcome.exit_code)
    if missing := sorted(unit.job.datasets.keys() - set(outcome.status.counted)):
        raise StageFailed(
            f"{unit.label}: expected every owner's release, found none of {', '.join(missing)}: it would be compared"
            f" with arms of other owners; {folder.path} says why",
            StoreUnavailable.exit_code,
        )
    owners = {client: evaluated(unit.job.datasets[client], outcome.uid, client) for client in outcome.status.counted}
    spec = unit.job.document.spec
    shared = spec.shared.images if spec.shared.denoiser == "trained" else 0
    image_steps = {"shared": shared, "personal": spec.personal.images}
    return Found(owners, image_steps, list(_receipts(folder, outcome.uid, unit.job)))


def _check_same_trainings(unit: Unit, folder: RunFolder) -> None:
    """Raises SpecInvalid where the run was begun with other trainings: a run would keep what is through of them."""
    try:
        begun = folder.record().job.spec
    except InputMissing:
        return
    spec = unit.job.document.spec
    for name in ("network", "shared", "personal", "sampling"):
        if getattr(begun, name) != getattr(spec, name):
            raise SpecInvalid(
                f"{unit.label}: {folder.path} holds a run that was begun with another spec.{name}; remove it (its"
                " release stays charged), give the arm another name, or use another --out"
            )


def _run_taken(unit: Unit, out: Path) -> RunFolder:
    """The job's run in the same cell with the same seed."""
    assert unit.of is not None
    return RunFolder(replace(unit, arm=unit.of).folder(out))


def _personal_alone(unit: Unit, run: RunFolder) -> Found:
    """Every run has measured it: its second arm."""
    uid = run.record().uid
    owners = {client: evaluated(dataset, uid, client, "personal") for client, dataset in unit.job.datasets.items()}
    own = (Stage.TRAIN_PERSONAL, Stage.SAMPLE, Stage.EVALUATE)
    receipts = [receipt for receipt in _receipts(run, uid, unit.job) if receipt.stage in own]
    return Found(owners, {"personal": unit.job.document.spec.personal.images}, receipts)


def evaluated(dataset: LocalDataset, uid: str, client: str, arm: str = ARM) -> Groups:
    """What one owner's evaluation measured of `arm`. Raises DataInvalid where it cannot be read."""
    store = dataset.owner_folder / "store"
    report = OwnerReport(store / layout.owner_report(uid, client), store / layout.evaluation(uid, client))
    return report.figures[arm]


def _receipts(folder: RunFolder, uid: str, job: LocalJob) -> Iterator[Receipt]:
    keys: list[StageKey] = [(Stage.TRAIN_SHARED, ""), (Stage.REPORT, "")]
    owners = (Stage.RELEASE, Stage.TRAIN_PERSONAL, Stage.SAMPLE, Stage.EVALUATE)
    keys += [(stage, client) for stage in owners for client in job.datasets]
    for key in keys:
        if receipt := folder.receipt(key, folder.newest_attempt(key), uid):
            yield receipt


# ---- Budgets ----------------------------------------------------------------------------------------------------


def check_budgets(units: Sequence[Unit], out: Path) -> None:
    """Raises PrivacyRefusal unless every owner lets each unit in, and every budget holds the releases that are still to
    come, together. Writes nothing."""
    releasing = [unit for unit in units if unit.baseline is None]
    refusals, further = [], further_charges(releasing, out)
    for unit in releasing:
        for dataset in unit.job.datasets.values():
            if refusal := ledger.access_refusal(dataset.document, unit.job.document):
                refusals.append(f"{unit.label}: {refusal.message}")
    refusals += [words for dataset, charges in further.values() if (words := _shortage(dataset, charges))]
    if refusals:
        raise PrivacyRefusal("\n".join(dict.fromkeys(refusals)))


def further_charges(units: Sequence[Unit], out: Path) -> dict[Path, tuple[LocalDataset, list[Charge]]]:
    """By ledger: what the units would still be charged. A unit whose release is held already costs nothing more."""
    further: dict[Path, tuple[LocalDataset, list[Charge]]] = {}
    for unit in units:
        uid = _uid(unit, out)
        for client, dataset in unit.job.datasets.items():
            _, charges = further.setdefault(dataset.owner_folder, (dataset, []))
            if not _is_held(dataset, uid, client):
                charges.append(unit.job.promise.charge)
    return further


def _uid(unit: Unit, out: Path) -> str:
    """Of the unit's run; empty before it was begun."""
    try:
        return RunFolder(unit.folder(out)).record().uid
    except InputMissing:
        return ""


def _is_held(dataset: LocalDataset, uid: str, client: str) -> bool:
    state = read_ledger(dataset)
    entry = state.entry(layout.release_name(uid, client, state.dataset_uid)) if uid else None
    return entry is not None and entry.phase in HELD


def _shortage(dataset: LocalDataset, further: Sequence[Charge]) -> str:
    """Why a budget does not hold so many releases more, and how much more is needed; empty where it does."""
    state = read_ledger(dataset)
    budget, charges, name = state.budget, state.account.charges, f"dataset {dataset.key}"
    if not further:
        return ""
    if problem := ledger.inconsistency(state.account, state.entries):
        return f"{name}: the ledger contradicts itself: {problem}; nothing is admitted until its owner acknowledges"
    limit = budget_mu_squared(budget.epsilon, budget.delta, budget.pure_epsilon)
    if admits(limit, budget.pure_epsilon, charges, total_charge(further)).admitted:
        return ""
    wanted = total_charge((*charges, *further))
    of = f"per {budget.unit}, δ = {decimal_text(budget.delta)}"
    said = (
        f"{name}: this experiment needs k = {len(further)} more releases beside {state.num_releases} so far;"
        f" expected a budget for all of them, found ε = {budget.epsilon} ({of})"
    )
    if wanted.pure_epsilon > budget.pure_epsilon:
        return (
            f"{said} with pureEpsilon = {budget.pure_epsilon}, which cannot change and falls short by"
            f" {wanted.pure_epsilon - budget.pure_epsilon}; ask for fewer seeds, cells or arms"
        )
    # What of E is set aside and not used is lost to Gaussian noise.
    gaussian = Decimal(spent_epsilon((Charge(mu_squared=wanted.mu_squared),), budget.delta))
    needed = (gaussian + budget.pure_epsilon).quantize(Decimal("0.01"), ROUND_UP)
    return (
        f"{said}; raise spec.budget.epsilon to {needed}, by {needed - budget.epsilon}, or ask for fewer seeds, cells or"
        " arms"
    )


# ---- Rows -------------------------------------------------------------------------------------------------------


def _row(experiment: Experiment, unit: Unit, found: Found) -> Row:
    return Row(
        experiment=experiment.name,
        arm=unit.arm,
        baseline=unit.baseline,
        of=unit.of,
        cell=unit.cell,
        seed=unit.seed,
        promise=promise_made(unit),
        owners=found.owners,
        image_steps=found.image_steps,
        seconds=round(sum(receipt.milliseconds for receipt in found.receipts) / 1000, 1),
        versions=found.receipts[-1].versions,
        commit=commit(),
        cpu=cpu_model(),
        cores=os.cpu_count() or 1,
        finished_at=datetime.now(UTC).isoformat(timespec="seconds"),
        asked=unit.asked,
    )


def promise_made(unit: Unit) -> PromiseMade | None:
    """By the release, or by a baseline's own way; most baselines promise nothing."""
    own = unit.baseline is not None and unit.baseline.keeps_epsilon
    if unit.baseline is not None and unit.of is None and not own:
        return None
    privacy = unit.job.document.spec.privacy
    return PromiseMade(
        mechanism=unit.baseline.value if unit.baseline is not None and own else privacy.mechanism.value,
        epsilon=decimal_text(privacy.epsilon),
        delta=decimal_text(privacy.delta_or_zero),
        unit=privacy.unit,
        releases=1,
        attack_auc=None if own else unit.job.promise.attack_auc,
    )


def read_rows(out: Path) -> list[Row]:
    """The rows that `out` holds, none before the first. Raises SpecInvalid for what is no row, or twice there."""
    path = out / ROWS
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return []
    except (OSError, ValueError) as error:
        raise InputMissing(f"{path}: cannot be read: {error}") from None
    rows: dict[tuple[str, str, int], Row] = {}
    for number, line in enumerate(lines, start=1):
        try:
            value = json.loads(line)
        except ValueError:
            raise SpecInvalid(f"{path}: line {number}: expected a row of JSON, found none; remove the line") from None
        row = parse(Row, value, f"{path}: line {number}")
        if rows.setdefault(row.key, row) is not row:
            raise SpecInvalid(f"{path}: line {number}: expected one row of a unit, found another one; remove it")
    return list(rows.values())


def write_rows(out: Path, rows: Sequence[Row]) -> None:
    """rows.jsonl holds `rows`: written beside it and moved, so that a crash leaves the rows of before or these."""
    text = "".join(json.dumps(row.to_wire(), ensure_ascii=False) + "\n" for row in rows)
    try:
        replace_file(out / ROWS, text)
    except OSError as error:
        raise OutputFailed(f"{out / ROWS}: cannot be written: {error.strerror}; make room, and run again") from None


def commit() -> str:
    """Of the checkout that this code is run from, with "-dirty" after changes; empty where it is none."""
    checkout = Path(__file__).resolve().parents[2]
    if not (checkout / ".git").exists():
        return ""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=9", "--exclude=*"]
    try:
        found = subprocess.run(command, cwd=checkout, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return found.stdout.strip()


def cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
