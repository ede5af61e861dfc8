"""What a job would cost each owner, before anything starts: the answer of `feddiff plan`. Writes nothing."""

from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from rich.console import Console
from rich.table import Table

from feddiff_protocol import accountant, ledger
from feddiff_protocol.accountant import Charge
from feddiff_protocol.api import Mechanism
from feddiff_protocol.promise import NOT_COVERED, Promise, clips_any, released_image, signal_to_noise_db

from .documents import LocalJob
from .local_ledger import LedgerState, read_ledger
from .tables import html_list, html_table

FALSE_POSITIVE_RATE = 0.01


@dataclass(frozen=True)
class Budget:
    """What counts against one dataset's budget, reservations included, and what is left of it: ε per image at δ, of all
    releases together."""

    spent_epsilon: float  # at least 0
    remaining_epsilon: float  # that one more release could ask for, at least 0
    remaining_pure_epsilon: Decimal  # that one more release of pure ε (δ = 0) could ask for
    limit_epsilon: Decimal  # the owner's limit, ever
    limit_pure_epsilon: Decimal  # the part of it that is set aside for pure ε
    delta: Decimal  # at which all of them are stated


@dataclass(frozen=True)
class OnePixel:
    """What `gaussian` says of one pixel where the rest of the image is known. No promise of an image."""

    mu: float  # of one pixel
    epsilon: float  # per pixel, at the job's δ, of one release
    paper_epsilon: float  # the same by the paper's formula: valid, not tight


@dataclass(frozen=True)
class ClientPlan:
    """One owner's part: what one more release promises, and what it costs the owner's budget."""

    client: str  # as the job names it
    dataset: str  # namespace/name
    mechanism: Mechanism  # gaussian, summary or privunit
    unit: str  # of epsilon: image
    epsilon: Decimal  # per unit, of this one release
    delta: Decimal  # 0 where the promise is pure ε
    mu: float | None  # μ of Gaussian differential privacy; None where the promise is pure ε
    paper_epsilon: float | None  # ε by the paper's formula: valid, not tight; None where the promise is pure ε
    one_pixel: OnePixel | None  # of `gaussian` alone
    attack_auc: float  # of the best possible membership test, 0.5 to 1
    attack_tpr: float  # share of the images that it finds at 1 % false alarms, 0 to 1
    releases: int  # of the dataset, this one included
    split_step: int  # where the shared denoiser hands over to the personal one
    split_sigma: float  # noise-to-signal at that step, pixels in [-1, 1]
    budget_before: Budget  # as the ledger stands
    budget_after: Budget  # this release included, whether or not it is admitted
    signal_to_noise_db: float  # of one image (gaussian), else of the mean of the smallest class
    refusal: str  # why the release is not admitted; empty where it is


@dataclass(frozen=True)
class PlanReport:
    """What a job promises every client, what it costs each, and who does not admit it. A notebook shows tables."""

    job: LocalJob  # that was planned
    clients: tuple[ClientPlan, ...]  # in the order of the job
    not_covered: tuple[str, ...] = NOT_COVERED  # what the promise says nothing about, in words

    @property
    def refusals(self) -> Mapping[str, str]:
        """Why not, by client; empty where all admit the job."""
        return {each.client: each.refusal for each in self.clients if each.refusal}

    def _repr_html_(self) -> str:
        refused = [f"client {client}: {why}" for client, why in self.refusals.items()]
        return "".join(
            [
                html_table(_title(self), (), _promise_rows(self)),
                html_table(_budget_title(self), _budget_columns(self), _budget_rows(self)),
                html_list("Refused:", refused),
                html_list("Not covered by the promise:", self.not_covered),
            ]
        )


def plan_report(job: LocalJob) -> PlanReport:
    """What one more release would cost each owner, as a new run of the job would ask for it."""
    return PlanReport(job, tuple(_plan_client(job, client) for client in job.datasets))


def _plan_client(job: LocalJob, client: str) -> ClientPlan:
    dataset, promise, privacy = job.datasets[client], job.promise, job.document.spec.privacy
    state, delta, mu = read_ledger(dataset), privacy.delta_or_zero, promise.mu
    return ClientPlan(
        client=client,
        dataset=dataset.key,
        mechanism=privacy.mechanism,
        unit=privacy.unit,
        epsilon=privacy.epsilon,
        delta=delta,
        mu=mu,
        paper_epsilon=None if mu is None else accountant.paper_epsilon(mu, float(delta)),
        one_pixel=_one_pixel(promise, delta),
        attack_auc=promise.attack_auc,
        attack_tpr=promise.attack_tpr(FALSE_POSITIVE_RATE),
        releases=state.num_releases + 1,
        split_step=promise.split_step,
        split_sigma=promise.split_sigma,
        budget_before=budget_of(state),
        budget_after=budget_of(state, promise.charge),
        signal_to_noise_db=_signal_to_noise_db(job, client),
        refusal=_refusal(job, client, state),
    )


def _one_pixel(promise: Promise, delta: Decimal) -> OnePixel | None:
    """What the paper's first version says: of one pixel, the image being the same elsewhere."""
    if promise.pixel_mu is None:
        return None
    return OnePixel(
        mu=promise.pixel_mu,
        epsilon=accountant.epsilon_of(promise.pixel_mu, float(delta)),
        paper_epsilon=accountant.paper_epsilon(promise.pixel_mu, float(delta)),
    )


def budget_of(state: LedgerState, *further: Charge) -> Budget:
    """The account at the budget's δ, of everything that counts and of `further` charges; nothing is left while the
    ledger contradicts itself."""
    budget, charges = state.budget, (*state.account.charges, *further)
    agrees = not ledger.inconsistency(state.account, state.entries)
    return Budget(
        spent_epsilon=accountant.spent_epsilon(charges, budget.delta),
        remaining_epsilon=ledger.remaining_epsilon(budget, charges) if agrees else 0.0,
        remaining_pure_epsilon=ledger.remaining_pure_epsilon(budget, charges) if agrees else Decimal(0),
        limit_epsilon=budget.epsilon,
        limit_pure_epsilon=budget.pure_epsilon,
        delta=budget.delta,
    )


def _signal_to_noise_db(job: LocalJob, client: str) -> float:
    """Of one image, or of the mean of the client's smallest class that has records."""
    spec = job.datasets[client].document.spec
    smallest = min(count for count in spec.classes.records if count)
    return signal_to_noise_db(job.document.spec, job.promise, spec.image, smallest)


def _refusal(job: LocalJob, client: str, state: LedgerState) -> str:
    """The ledger's own words, asked without writing."""
    if refusal := ledger.access_refusal(job.datasets[client].document, job.document):
        return refusal.message
    request = ledger.request_of(job.document, "", client, state.dataset_uid, job.promise.charge, "")
    answer = ledger.reserve(state.budget, state.account, state.entries, request)
    return answer.message if isinstance(answer, ledger.Refusal) else ""


# ---- The same as JSON ------------------------------------------------------------------------------------------


def plan_document(report: PlanReport) -> dict[str, Any]:
    """The JSON form of the whole answer."""
    metadata = report.job.document.metadata
    return {
        "job": {"namespace": metadata.namespace, "name": metadata.name},
        "clients": [_client_document(each) for each in report.clients],
        "refusals": dict(report.refusals),
        "notCovered": list(report.not_covered),
    }


def _client_document(each: ClientPlan) -> dict[str, Any]:
    return {
        "client": each.client,
        "mechanism": each.mechanism.value,
        "unit": each.unit,
        "epsilon": str(each.epsilon),
        "delta": decimal_text(each.delta),
        "mu": each.mu,
        "paperEpsilon": each.paper_epsilon,
        "onePixel": _one_pixel_document(each.one_pixel),
        "attackAuc": each.attack_auc,
        "attackTprAt1PercentFpr": each.attack_tpr,
        "releases": each.releases,
        "split": {"step": each.split_step, "sigma": each.split_sigma},
        "budgetBefore": budget_document(each.budget_before),
        "budgetAfter": budget_document(each.budget_after),
        "signalToNoiseDb": each.signal_to_noise_db,
    }


def _one_pixel_document(pixel: OnePixel | None) -> dict[str, Any] | None:
    if pixel is None:
        return None
    return {"unit": "pixel", "mu": pixel.mu, "epsilon": pixel.epsilon, "paperEpsilon": pixel.paper_epsilon}


def budget_document(budget: Budget) -> dict[str, Any]:
    """The account as JSON."""
    return {
        "spentEpsilon": budget.spent_epsilon,
        "remainingEpsilon": budget.remaining_epsilon,
        "remainingPureEpsilon": str(budget.remaining_pure_epsilon),
        "limitEpsilon": str(budget.limit_epsilon),
        "delta": decimal_text(budget.delta),
    }


# ---- The same for people ---------------------------------------------------------------------------------------


def print_plan(report: PlanReport, console: Console) -> None:
    console.print(f"{_title(report)}\n", highlight=False)
    promise = Table(show_header=False, box=None, pad_edge=False)
    for row in _promise_rows(report):
        promise.add_row(*row)
    console.print(promise)
    console.print(_budget_table(report))
    console.print("\nNot covered by the promise:", highlight=False)
    for each in report.not_covered:
        console.print(f"  - {each}", highlight=False, markup=False)


def _title(report: PlanReport) -> str:
    return f"Job {report.job.document.metadata.name}: one release from each of {len(report.clients)} owners"


def _promise_rows(report: PlanReport) -> list[tuple[str, str]]:
    """What is promised to every client alike, by its name."""
    job, shown = report.job, report.clients[0]
    per = f"per {shown.unit}, δ = {decimal_text(shown.delta)}, 1 release"
    rows = [("mechanism", shown.mechanism.value), ("promise", f"ε = {shown.epsilon} {per} ({_kind(job.promise)})")]
    if shown.paper_epsilon is not None:
        rows.append(("paper's formula", f"ε = {shown.paper_epsilon:.4f} {per} (valid, not tight)"))
    if shown.one_pixel is not None:
        rows += [("clip", _clip_in_words(job)), ("one pixel", _one_pixel_in_words(job, shown, shown.one_pixel))]
    if (side := job.document.spec.privacy.block_side) is not None:
        image = released_image(job.document.spec.privacy, job.first_dataset.document.spec.image)
        rows.append(("released of", f"{image.dimensions} means of {side} × {side} pixels an image, a public map"))
    attack = f"AUC {shown.attack_auc:.4f}; {shown.attack_tpr:.1%} found at 1 % false alarms"
    split = f"step {shown.split_step} of {job.document.spec.diffusion.steps}, σ = {shown.split_sigma:.4g}"
    return [*rows, ("best attack", attack), ("split", split)]


def _clip_in_words(job: LocalJob) -> str:
    privacy, image = job.document.spec.privacy, job.first_dataset.document.spec.image
    units = "[0, 1]" if privacy.clips_non_negative_pixels else "[-1, 1]"
    if clips_any(privacy, image):
        return f"images to norm {privacy.clip_norm}, pixels in {units}"
    return f"none: no image of {image.dimensions} values in {units} is longer than {privacy.clip_norm}"


def _one_pixel_in_words(job: LocalJob, shown: ClientPlan, pixel: OnePixel) -> str:
    """The image's own ε first: one without the other never stands on a line."""
    dimensions = job.first_dataset.document.spec.image.dimensions
    return (
        f"ε = {shown.epsilon} per {shown.unit} is ε = {pixel.epsilon:.4f} per pixel (paper's formula:"
        f" {pixel.paper_epsilon:.4f}), δ = {decimal_text(shown.delta)}, 1 release: one of {dimensions} values, the"
        " others known"
    )


def _kind(promise: Promise) -> str:
    return "pure ε" if promise.mu is None else f"μ = {promise.mu:.4f}"


def _budget_columns(report: PlanReport) -> tuple[str, ...]:
    left = "pure ε left" if report.job.promise.mu is None else "ε left"
    return ("client", "dataset", "ε before", "ε after", "ε budget", left, "δ", "releases", "signal dB")


def _budget_title(report: PlanReport) -> str:
    return f"Budgets: ε per {report.clients[0].unit} of all releases of a dataset, this one included"


def _budget_rows(report: PlanReport) -> list[tuple[str, ...]]:
    """A row per client, under the columns."""
    pure = report.job.promise.mu is None
    return [
        (
            each.client,
            each.dataset,
            f"{each.budget_before.spent_epsilon:.4f}",
            f"{each.budget_after.spent_epsilon:.4f}" + (" (!)" if each.refusal else ""),
            str(each.budget_after.limit_epsilon),
            str(each.budget_after.remaining_pure_epsilon)
            if pure
            else ledger.epsilon_left(each.budget_after.remaining_epsilon),
            decimal_text(each.budget_after.delta),
            str(each.releases),
            f"{each.signal_to_noise_db:.1f}",
        )
        for each in report.clients
    ]


def _budget_table(report: PlanReport) -> Table:
    table = Table(title=_budget_title(report), title_justify="left", title_style="")
    for column in _budget_columns(report):
        table.add_column(column, justify="left" if column in ("client", "dataset") else "right")
    for row in _budget_rows(report):
        table.add_row(*row)
    return table


def decimal_text(value: Decimal) -> str:
    """ "1e-5" rather than "0.00001"."""
    return f"{value:e}" if 0 < value < Decimal("0.001") else str(value)
