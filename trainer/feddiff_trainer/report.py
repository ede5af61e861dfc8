"""The stage `report`: one shareable page about a finished job.

It holds what was promised, what was spent, what lies outside the promise, and what the shared denoiser makes.
Its spec names the federation store alone, so there is no path from here to a real or a personal image.
"""

import hashlib
import math
import sys
from collections.abc import Mapping, Sequence
from decimal import Decimal, InvalidOperation

from feddiff_protocol import accountant, layout
from feddiff_protocol.api import ClassesSpec, Mechanism
from feddiff_protocol.promise import NOT_COVERED, Promise, cap_of, promise_of
from feddiff_protocol.stages import BudgetLine, Duration, ReportSpec, TrainSharedSpec

from .pages import Banner, Html, Page, bullets, definitions, element, joined, paragraph, render, rows, section, table
from .pictures import LabelledImages, Pixels, bar, grid, image, read_samples, roc_bound
from .stage import installed_versions, run_stage
from .stores import check_verified, open_store

SET = "images"  # its name in the file of the shared denoiser's samples
SHOWN_PER_CLASS = 16
COLUMNS = 4
SHEET_FIT = 180  # CSS pixels
FALSE_POSITIVE_RATE = 0.01

BANNER = Banner(
    "shareable",
    "May be shared.",
    "No owner's image and nothing of a personal denoiser is in here: all of it comes from the releases, "
    "which carry their noise already.",
)
MECHANISMS = {
    Mechanism.GAUSSIAN: "gaussian: every image is clipped, noised once, and released",
    Mechanism.SUMMARY: "summary: per class one noisy sum and one noisy second moment of clipped images are released",
    Mechanism.PRIVUNIT: "privunit: of every image the direction is drawn anew, near the true one or not, and released",
}


def body(spec: ReportSpec) -> dict[str, str]:
    """The job report is in the federation store; its hash comes back. Raises DataInvalid for another denoiser's job."""
    store = open_store(spec.federation_store, "federation")
    check_verified(store, layout.shared_denoiser(spec.job.uid), spec.shared_denoiser_sha256)  # the samples are its
    key = layout.shared_samples(spec.job.uid)
    samples = read_samples(store.get(key), key, [SET], spec.image, spec.classes.count)
    page = job_report(spec, samples, installed_versions())
    store.put(layout.job_report(spec.job.uid), page)
    return {"report": hashlib.sha256(page).hexdigest()}


def job_report(spec: ReportSpec, samples: LabelledImages, versions: Mapping[str, str]) -> bytes:
    """The page as UTF-8 HTML."""
    promise = promise_of(spec.privacy, spec.diffusion)
    page = Page(
        title=spec.job.name,
        eyebrow="feddiff · job report",
        banner=BANNER,
        lead=promise_sentence(spec, promise),
        facts=_facts(spec, promise),
        sections=[
            _promise_section(spec, promise),
            _budget_section(spec.budgets),
            section("What lies outside the promise", bullets(NOT_COVERED)),
            _samples_section(samples, spec.classes),
            _durations_section(spec.durations),
            _provenance_section(spec, versions),
        ],
        footer=f"Job {spec.job.namespace}/{spec.job.name}, uid {spec.job.uid}.",
    )
    return render(page)


def promise_sentence(spec: ReportSpec | TrainSharedSpec, promise: Promise) -> Html:
    privacy = spec.privacy
    return joined(
        f"Whoever sees everything that left the {num(len(spec.releases), 'owner')} learns about any one image at most "
        f"what ε = {tidy(privacy.epsilon)} per {privacy.unit} allows (δ = {tidy(privacy.delta_or_zero)}, one release "
        "from each owner): the best possible test of whether an image was there has an area under its curve of "
        f"{promise.attack_auc:.3f}, where guessing has 0.5."
    )


def num(count: int, noun: str) -> str:
    """ "1 owner", "3 owners"."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def tidy(value: Decimal) -> str:
    """A decimal number as people write it: "10", "0.25", "1e-5"."""
    return f"{value.normalize():e}" if 0 < value < Decimal("0.001") else format(value, "f")


def _facts(spec: ReportSpec, promise: Promise) -> list[tuple[str, str]]:
    return [
        (f"ε per {spec.privacy.unit}", tidy(spec.privacy.epsilon)),
        ("δ", tidy(spec.privacy.delta_or_zero)),
        ("Releases per owner, this job", "1"),
        ("Mechanism", spec.privacy.mechanism.value),
        ("Split step, σ", f"{promise.split_step}, {promise.split_sigma:.3g}"),
        ("Owners", str(len(spec.releases))),
    ]


# ---- The promise -----------------------------------------------------------------------------------------------


def _promise_section(spec: ReportSpec, promise: Promise) -> Html:
    chart = element(
        "figure",
        roc_bound(lambda rate: 1.0 if rate >= 1 else promise.attack_tpr(rate), promise.attack_auc, FALSE_POSITIVE_RATE),
        element("figcaption", "No membership test on the release has a point above this curve."),
    )
    return section("The promise", element("div", definitions(promise_terms(spec, promise)), chart, cls="split"))


def promise_terms(spec: ReportSpec | TrainSharedSpec, promise: Promise) -> list[tuple[str, str]]:
    """Every number of the promise with its name and unit, in words that stand alone."""
    privacy = spec.privacy
    return [
        ("Protected", f"each {privacy.unit}, against being replaced by any other of its class"),
        (
            "Promised",
            f"ε = {tidy(privacy.epsilon)} per {privacy.unit}, δ = {tidy(privacy.delta_or_zero)},"
            " k = 1 release per owner",
        ),
        ("Mechanism", MECHANISMS[privacy.mechanism]),
        *_gaussian_terms(promise.mu, float(privacy.delta_or_zero)),
        ("Best attack", attack_sentence(promise)),
        (
            "Split",
            f"step {promise.split_step} of {spec.diffusion.steps}, noise-to-signal σ = {promise.split_sigma:.4g}",
        ),
        ("Clip norm of an image", clip_sentence(spec)),
        ("Noise", noise_sentence(spec, promise)),
    ]


def _gaussian_terms(mu: float | None, delta: float) -> list[tuple[str, str]]:
    if mu is None:
        return [("Kind of promise", "pure ε: δ = 0, however unlucky the draw")]
    return [
        ("μ (Gaussian differential privacy)", f"{mu:.4f}"),
        ("ε of this μ, exact", f"{accountant.epsilon_of(mu, delta):.4f}"),
        ("ε of this μ by the paper's formula", f"{accountant.paper_epsilon(mu, delta):.4f} (valid, not tight)"),
    ]


def attack_sentence(promise: Promise) -> str:
    found = promise.attack_tpr(FALSE_POSITIVE_RATE)
    return f"area under the curve {promise.attack_auc:.3f}; {found:.1%} found at 1% false alarms"


def clip_sentence(spec: ReportSpec | TrainSharedSpec) -> str:
    privacy = spec.privacy
    if privacy.mechanism is Mechanism.SUMMARY:
        power, side = privacy.frequency_power_or_default, privacy.block_side_or_one
        units = "pixels in [0, 1]" if side == 1 else f"means of {side} × {side} pixels in [0, 1]"
        if power:
            units += f"; fine detail counts more, by frequency^{power}"
        return f"{privacy.clip_norm}, minus its class's noisy mean {privacy.moment_clip_norm} ({units})"
    if privacy.mechanism is Mechanism.PRIVUNIT:
        return f"{privacy.clip_norm}: every image is scaled to it (pixels in [0, 1])"
    return f"{privacy.clip_norm} (pixels in {'[0, 1]' if privacy.clips_non_negative_pixels else '[-1, 1]'})"


def noise_sentence(spec: ReportSpec | TrainSharedSpec, promise: Promise) -> str:
    if promise.mechanism is Mechanism.PRIVUNIT:
        cap = cap_of(spec.privacy, spec.image)
        return (
            f"standard deviation {cap.noise_std(float(spec.privacy.clip_norm)):.4g} per pixel of an image, in [0, 1] "
            f"units; drawn within {math.degrees(math.acos(cap.height)):.1f}° of the true direction with probability "
            f"{cap.probability:.4f}"
        )
    if promise.mean_std is None or promise.moment_std is None:
        given = f"; the step itself gives μ = {promise.step_mu:.4f}" if promise.step_mu is not None else ""
        return f"standard deviation {promise.split_sigma:.4g} per pixel, in [-1, 1] units{given}"
    return (
        f"standard deviation {promise.mean_std:.4g} per value of a class's sum and {promise.moment_std:.4g} per entry "
        "of its second moment, in [0, 1] units"
    )


# ---- Budgets ---------------------------------------------------------------------------------------------------


def _budget_section(budgets: Sequence[BudgetLine]) -> Html:
    columns = ["Owner", "Spent of its budget", "Budget ε", "Spent ε", "Remaining ε", "δ", "Releases so far"]
    lines = [_budget_row(line) for line in budgets]
    return section(
        "Privacy budgets",
        paragraph(
            "Each ε is per image and covers all releases of that owner's dataset together, those of other jobs "
            "included. Releases add up in μ², not in ε, so spent and remaining need not sum to the budget; releases of "
            "pure ε add up in ε, from a part of the budget set aside for them."
        ),
        table("ε per image, spent and left, by owner", columns, rows(lines), text=columns[:2]),
    )


def _budget_row(line: BudgetLine) -> list[str]:
    share = bar(_share(line.spent_epsilon, line.budget_epsilon))
    numbers = [
        line.budget_epsilon,
        line.spent_epsilon,
        line.remaining_epsilon + (f", pure {line.remaining_pure_epsilon}" if line.remaining_pure_epsilon else ""),
        _tidied(line.delta),
        str(line.num_releases),
    ]
    return [line.client, element("td", share, cls="text"), *numbers]


def _tidied(text: str) -> str:
    try:
        return tidy(Decimal(text))
    except InvalidOperation:
        return text


def _share(part: str, whole: str) -> float:
    """part/whole of two numbers in text, 0 where they are none: a bar is left empty, the text stands beside it."""
    try:
        ratio = float(part) / float(whole)
    except (ValueError, ZeroDivisionError):
        return 0.0
    return ratio if math.isfinite(ratio) else 0.0


# ---- What the shared denoiser makes ----------------------------------------------------------------------------


def _samples_section(samples: LabelledImages, classes: ClassesSpec) -> Html:
    images_NCHW = samples.images[SET]
    sheets = [
        _sheet(images_NCHW[samples.labels_N == label][:SHOWN_PER_CLASS], class_name(classes, label))
        for label in range(classes.count)
    ]
    return section(
        "What the shared denoiser makes",
        paragraph(
            "Samples of the shared denoiser alone, without any owner's personal one. It was trained on the releases "
            "only. Each owner finishes such images with a personal denoiser of its own, which is not shown "
            "here because it is not private."
        ),
        element("div", *sheets, cls="sheets"),
    )


def _sheet(images_NCHW: Pixels, name: str) -> Html:
    if len(images_NCHW) == 0:
        return element("figure", element("figcaption", f"{name}: no samples"))
    alt = f"{len(images_NCHW)} samples of the shared denoiser, {name}"
    return element("figure", image(grid(images_NCHW, COLUMNS), alt, SHEET_FIT), element("figcaption", name))


def class_name(classes: ClassesSpec, label: int) -> str:
    return classes.names[label] if classes.names else f"class {label}"


# ---- How it was made -------------------------------------------------------------------------------------------


def _durations_section(durations: Sequence[Duration]) -> Html:
    longest = max((line.milliseconds for line in durations), default=0)
    lines = [_duration_row(line, longest) for line in durations]
    columns = ["Stage", "Owner", "Share of the longest", "Duration", "Attempts"]
    return section(
        "How long it took", table("Wall time of each stage's last attempt", columns, rows(lines), text=columns[:3])
    )


def _duration_row(line: Duration, longest: int) -> list[str]:
    share = bar(line.milliseconds / longest if longest else 0.0)
    owner = element("td", line.client or "–", cls="text")
    return [line.stage.value, owner, element("td", share, cls="text"), duration(line.milliseconds), str(line.attempts)]


def duration(milliseconds: int) -> str:
    """ "0.4 s", "12.0 s", "3 min 05 s", "2 h 07 min"."""
    seconds = milliseconds / 1000
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def _provenance_section(spec: ReportSpec, versions: Mapping[str, str]) -> Html:
    digests = [(f"Manifest of {release.client}", release.manifest_sha256) for release in spec.releases]
    digests.append(("Shared denoiser", spec.shared_denoiser_sha256))
    hashes = [[name, element("td", element("code", digest), cls="text")] for name, digest in digests]
    command = [element("code", spec.command, cls="block", tabindex=0)] if spec.command else []
    return section(
        "How it was made",
        *command,
        paragraph(
            f"Images of {spec.image.channels} × {spec.image.height} × {spec.image.width} in "
            f"{spec.classes.count} classes; shared denoiser {_training(spec)}."
        ),
        table(
            "SHA-256 of what was used; a release counts only under its hash",
            ["Object", "SHA-256"],
            rows(hashes),
            text=["SHA-256"],
        ),
        paragraph("Versions: ", ", ".join(f"{name} {version}" for name, version in sorted(versions.items())), "."),
    )


def _training(spec: ReportSpec) -> str:
    if spec.shared.denoiser == "closedForm":
        return "in closed form from the pooled releases, not trained"
    return f"trained on {spec.shared.images:,} images in batches of {spec.shared.batch:,}"


if __name__ == "__main__":
    sys.exit(run_stage(ReportSpec, body))
