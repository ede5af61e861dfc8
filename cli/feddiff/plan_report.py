"""What a job would cost each owner, before anything starts: the answer of `feddiff plan`. Writes nothing."""

from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from rich.console import Console
from rich.table import Table

from feddiff_protocol import accountant, ledger
from feddiff_protocol.accountant import Charge
from feddiff_protocol.api import Mechanism
from feddiff_protocol.promise import NOT_COVERED, Promise, clips_any, signal_to_noise_db

from .documents import LocalJob
from .local_ledger import LedgerState, read_ledger

FALSE_POSITIVE_RATE = 0.01


@dataclass(frozen=True)
class ClientPlan:
    """One owner's part. `refusal` is empty where the release would be admitted."""

    client: str
    dataset: str
    document: dict[str, Any]  # the JSON form
    refusal: str


def plan_clients(job: LocalJob) -> list[ClientPlan]:
    """What one more release would cost each owner, as a new run of the job would ask for it."""
    return [_plan_client(job, client) for client in job.datasets]


def _plan_client(job: LocalJob, client: str) -> ClientPlan:
    dataset, promise, privacy = job.datasets[client], job.promise, job.document.spec.privacy
    state, delta, mu = read_ledger(dataset), privacy.delta_or_zero, promise.mu
    document = {
        "client": client,
        "mechanism": privacy.mechanism.value,
        "unit": privacy.unit,
        "epsilon": str(privacy.epsilon),
        "delta": decimal_text(delta),
        "mu": mu,
        "paperEpsilon": None if mu is None else accountant.paper_epsilon(mu, float(delta)),
        "onePixel": _one_pixel(promise, delta),
        "attackAuc": promise.attack_auc,
        "attackTprAt1PercentFpr": promise.attack_tpr(FALSE_POSITIVE_RATE),
        "releases": state.num_releases + 1,
        "split": {"step": promise.split_step, "sigma": promise.split_sigma},
        "budgetBefore": budget_document(state, ()),
        "budgetAfter": budget_document(state, (promise.charge,)),
        "signalToNoiseDb": _signal_to_noise_db(job, client),
    }
    return ClientPlan(client, dataset.key, document, _refusal(job, client, state))


def _one_pixel(promise: Promise, delta: Decimal) -> dict[str, Any] | None:
    """What the paper's first version says: of one pixel, the image being the same elsewhere. No promise of an image."""
    if promise.pixel_mu is None:
        return None
    return {
        "unit": "pixel",
        "mu": promise.pixel_mu,
        "epsilon": accountant.epsilon_of(promise.pixel_mu, float(delta)),
        "paperEpsilon": accountant.paper_epsilon(promise.pixel_mu, float(delta)),
    }


def budget_document(state: LedgerState, further: tuple[Charge, ...]) -> dict[str, Any]:
    """The account as JSON: ε at the budget's δ, of everything that counts and of `further` charges."""
    charges = (*state.account.charges, *further)
    return {
        "spentEpsilon": accountant.spent_epsilon(charges, state.budget.delta),
        "remainingEpsilon": ledger.remaining_epsilon(state.budget, charges),
        "remainingPureEpsilon": str(ledger.remaining_pure_epsilon(state.budget, charges)),
        "limitEpsilon": str(state.budget.epsilon),
        "delta": decimal_text(state.budget.delta),
    }


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


def plan_document(job: LocalJob, clients: Sequence[ClientPlan]) -> dict[str, Any]:
    """The JSON form of the whole answer."""
    return {
        "job": {"namespace": job.document.metadata.namespace, "name": job.document.metadata.name},
        "clients": [each.document for each in clients],
        "refusals": {each.client: each.refusal for each in clients if each.refusal},
        "notCovered": list(NOT_COVERED),
    }


def print_plan(job: LocalJob, clients: Sequence[ClientPlan], console: Console) -> None:
    """The same for people."""
    console.print(
        f"Job {job.document.metadata.name}: one release from each of {len(clients)} owners\n", highlight=False
    )
    console.print(_promise_table(job, clients[0].document))
    console.print(_budget_table(job, clients))
    console.print("\nNot covered by the promise:", highlight=False)
    for each in NOT_COVERED:
        console.print(f"  - {each}", highlight=False, markup=False)


def _promise_table(job: LocalJob, shown: dict[str, Any]) -> Table:
    spec, promise = job.document.spec, job.promise
    per = f"per {shown['unit']}, δ = {shown['delta']}, 1 release"
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_row("mechanism", shown["mechanism"])
    table.add_row("promise", f"ε = {shown['epsilon']} {per} ({_kind(promise)})")
    if promise.mu is not None:
        table.add_row("paper's formula", f"ε = {shown['paperEpsilon']:.4f} {per} (valid, not tight)")
    if promise.mechanism is Mechanism.GAUSSIAN:
        table.add_row("clip", _clip_in_words(job))
        table.add_row("one pixel", _one_pixel_in_words(job, shown))
    found = shown["attackTprAt1PercentFpr"]
    table.add_row("best attack", f"AUC {shown['attackAuc']:.4f}; {found:.1%} found at 1 % false alarms")
    table.add_row("split", f"step {promise.split_step} of {spec.diffusion.steps}, σ = {promise.split_sigma:.4g}")
    return table


def _clip_in_words(job: LocalJob) -> str:
    privacy, image = job.document.spec.privacy, job.first_dataset.document.spec.image
    units = "[0, 1]" if privacy.clips_non_negative_pixels else "[-1, 1]"
    if clips_any(privacy, image):
        return f"images to norm {privacy.clip_norm}, pixels in {units}"
    return f"none: no image of {image.dimensions} values in {units} is longer than {privacy.clip_norm}"


def _one_pixel_in_words(job: LocalJob, shown: dict[str, Any]) -> str:
    """The image's own ε first: one without the other never stands on a line."""
    pixel, dimensions = shown["onePixel"], job.first_dataset.document.spec.image.dimensions
    return (
        f"ε = {shown['epsilon']} per {shown['unit']} is ε = {pixel['epsilon']:.4f} per pixel (paper's formula:"
        f" {pixel['paperEpsilon']:.4f}), δ = {shown['delta']}, 1 release: one of {dimensions} values, the others known"
    )


def _kind(promise: Promise) -> str:
    return "pure ε" if promise.mu is None else f"μ = {promise.mu:.4f}"


def _budget_table(job: LocalJob, clients: Sequence[ClientPlan]) -> Table:
    unit = job.document.spec.privacy.unit
    title = f"Budgets: ε per {unit} of all releases of a dataset, this one included"
    table = Table(title=title, title_justify="left", title_style="")
    left = "ε left" if job.promise.mu is not None else "pure ε left"
    columns = ("client", "dataset", "ε before", "ε after", "ε budget", left, "δ", "releases", "signal dB")
    for column in columns:
        table.add_column(column, justify="left" if column in ("client", "dataset") else "right")
    for each in clients:
        before, after = each.document["budgetBefore"], each.document["budgetAfter"]
        table.add_row(
            each.client,
            each.dataset,
            f"{before['spentEpsilon']:.4f}",
            f"{after['spentEpsilon']:.4f}" + (" (!)" if each.refusal else ""),
            after["limitEpsilon"],
            ledger.epsilon_left(after["remainingEpsilon"])
            if job.promise.mu is not None
            else after["remainingPureEpsilon"],
            after["delta"],
            str(each.document["releases"]),
            f"{each.document['signalToNoiseDb']:.1f}",
        )
    return table


def decimal_text(value: Decimal) -> str:
    """ "1e-5" rather than "0.00001"."""
    return f"{value:e}" if 0 < value < Decimal("0.001") else str(value)
