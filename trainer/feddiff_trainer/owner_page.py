"""The owner report: real images, what left, and what came of it, side by side. Private to its owner.

Shapes: N images, C channels, H height, W width.
"""

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal

from feddiff_protocol import accountant
from feddiff_protocol.api import ClassesSpec
from feddiff_protocol.promise import Promise
from feddiff_protocol.stages import EvaluateSpec

from .audit_section import audit_section, exports_section
from .evaluation import (
    ARMS,
    BASELINE,
    GROUPS,
    MEASURES,
    REAL,
    WITH_INCEPTION,
    ArmQuality,
    Change,
    Evaluation,
    Measure,
    Values,
    compare,
    verdict,
)
from .findings import Audit, Export
from .pages import Banner, Html, Page, bullets, definitions, element, joined, paragraph, render, rows, section, table
from .pictures import Picture, Pixels, bar, grid, image
from .report import attack_sentence, class_name, num, tidy

COMPARED = [measure for measure in MEASURES if measure.key in ("recall", "frechet", "coverage", "copies_half")]
MISSING_ROWS = 6
CARDS = frozenset({"recall", "frechet", "coverage", "density", "copies_half"})
CLASS_ROWS = 20  # classes shown as pictures, rare ones first; the tables have them all
TILE_FIT = 190  # CSS pixels
SHEET_SIDE = 160  # image pixels across one tile

BANNER = Banner(
    "private",
    "Stays with the owner: contains real images.",
    "Neither this page nor the samples of a personal denoiser are covered by the promise. Do not pass them on.",
)
TITLES = {
    "real": "real",
    "released": "released",
    "shared": "shared alone",
    "personal": "personal alone",
    "both": "both",
}
SHORT_TITLES = {"shared": "shared", "personal": "personal", "both": "both"}
GROUP_TITLES = {
    "pooled": "All images together",
    "all": "Mean over classes",
    "majority": "Majority classes",
    "minority": "Minority classes",
}


@dataclass(frozen=True)
class Gallery:
    """The pictures of the report by column (`real`, `released`, `shared`, `personal`, `both`) and class, each N×C×H×W
    uint8, and a sentence about what the column `released` shows."""

    columns: Mapping[str, Sequence[Pixels]]
    released_note: str


@dataclass(frozen=True)
class OwnerReport:
    """All that the page is made of. `others`: evaluations of the same records under other jobs, oldest first."""

    spec: EvaluateSpec
    promise: Promise
    evaluation: Evaluation
    others: Sequence[Evaluation]
    minority: Sequence[int]
    gallery: Gallery
    audit: Audit | None = None
    exports: Sequence[Export] = ()


def owner_page(report: OwnerReport) -> bytes:
    """The page as UTF-8 HTML."""
    job, evaluation = report.spec.job, report.evaluation
    page = Page(
        title=f"{report.spec.client}, {job.name}",
        eyebrow="feddiff · owner report",
        banner=BANNER,
        lead=_lead(report),
        facts=_facts(report),
        sections=[
            _pictures(report),
            *_quality(report),
            *_jobs(report),
            _promise(report),
            audit_section(report.audit),
            *exports_section(report.exports),
            _how(report),
        ],
        footer=f"Client {report.spec.client}, job {job.namespace}/{job.name}, uid {job.uid}; {evaluation.finished_at}",
    )
    return render(page)


def _lead(report: OwnerReport) -> Html:
    privacy = report.spec.privacy
    together = _together(report)
    return joined(
        f"Your dataset made one release for this job: ε = {tidy(privacy.epsilon)} per {privacy.unit}, "
        f"δ = {tidy(privacy.delta_or_zero)}, by the mechanism {privacy.mechanism.value}. {together}"
        "The promise holds for each of your images, against everybody else; nothing but the release has left."
    )


def _together(report: OwnerReport) -> str:
    """The combined ε where these records were released for other jobs too."""
    if not report.others:
        return ""
    count = len(report.others) + 1
    return (
        f"Together with {num(len(report.others), 'other job')} evaluated here that is {count} releases and "
        f"ε = {combined_epsilon(report):.2f} per image at δ = {tidy(combined_delta(report))}. "
    )


def combined_epsilon(report: OwnerReport) -> float:
    """ε per image of this job's release and the others' together: their μ² add up, their ε do not, but pure ε does."""
    charges = [
        accountant.Charge(evaluation.mu_squared, evaluation.pure_epsilon)
        for evaluation in (report.evaluation, *report.others)
    ]
    return accountant.spent_epsilon(charges, combined_delta(report))


def combined_delta(report: OwnerReport) -> Decimal:
    """δ at which the combined ε holds: this job's, or where that is 0 the largest of the others."""
    return report.evaluation.delta or max((other.delta for other in report.others), default=Decimal(0))


def _facts(report: OwnerReport) -> list[tuple[str, str]]:
    privacy = report.spec.privacy
    return [
        (f"ε per {privacy.unit}, this job", tidy(privacy.epsilon)),
        ("δ", tidy(privacy.delta_or_zero)),
        ("Releases", "1" if not report.others else f"1 of {len(report.others) + 1}"),
        ("Mechanism", privacy.mechanism.value),
        ("Split step, σ", f"{report.promise.split_step}, {report.promise.split_sigma:.3g}"),
        ("Records", f"{sum(report.spec.classes.records):,}"),
    ]


# ---- Pictures --------------------------------------------------------------------------------------------------


def _pictures(report: OwnerReport) -> Html:
    columns = list(report.gallery.columns)
    classes = report.spec.classes
    shown = shown_classes(classes, report.minority)
    heads = [element("span", TITLES[column], cls=column) for column in columns]
    head = element("div", element("span"), *heads, cls="gallery-head", aria_hidden="true")
    lines = [_class_row(report, label) for label in shown]
    left_out = classes.count - len(shown)
    note = [paragraph(f"{num(left_out, 'more class')[:-1]}es are not pictured.", cls="note")] if left_out > 1 else []
    return section(
        "Side by side",
        paragraph(report.gallery.released_note),
        element("div", head, *lines, cls="gallery", style=f"--columns: {len(columns)}"),
        *note,
    )


def shown_classes(classes: ClassesSpec, minority: Sequence[int]) -> list[int]:
    """The classes that are pictured, in order: all of them, or the rarest ones and as many others as there is room."""
    rare_first = sorted(range(classes.count), key=lambda label: (label not in minority, label))
    return sorted(rare_first[:CLASS_ROWS])


def _class_row(report: OwnerReport, label: int) -> Html:
    classes = report.spec.classes
    name, records = class_name(classes, label), num(classes.records[label], "record")
    rare = [" ", element("span", "minority", cls="rare")] if label in report.minority else []
    heading = element("h3", name, element("small", f" {records}"), *rare)
    figures = [_tile(pixels[label], column, name) for column, pixels in report.gallery.columns.items()]
    return element("div", heading, *figures, cls="class-row")


def _tile(pixels_NCHW: Pixels, column: str, name: str) -> Html:
    caption = element("figcaption", TITLES[column])
    if len(pixels_NCHW) == 0:
        return element("figure", element("p", "none", cls="note"), caption)
    alt = f"{num(len(pixels_NCHW), 'image')}, {TITLES[column]}, {name}"
    return element("figure", image(sheet(pixels_NCHW), alt, TILE_FIT), caption)


def sheet(pixels_NCHW: Pixels) -> Picture:
    """Two rows of up to four images, fewer where they are large."""
    columns = min(4, max(SHEET_SIDE // pixels_NCHW.shape[3], 1))
    return grid(pixels_NCHW[: 2 * columns], columns)


# ---- Quality ---------------------------------------------------------------------------------------------------


def _quality(report: OwnerReport) -> list[Html]:
    if report.evaluation.measured is None:
        return [_not_measured()]
    return [_gains(report), _figures(report), _per_class(report)]


def _not_measured() -> Html:
    return section(
        "Quality was not measured",
        paragraph(
            "Every measure compares with real images that no denoiser was trained on, and this dataset names none. "
            "Keep some records out of training and name them in the PrivateDataset under ",
            element("code", "spec.source.holdoutPath"),
            " (format idx: ",
            element("code", "holdoutLabelsPath"),
            " too), then run the evaluation again.",
        ),
    )


def _gains(report: OwnerReport) -> Html:
    arms, lines = report.evaluation.arms, []
    group = "minority" if report.minority else "all"
    for arm in ARMS:
        if arm != BASELINE:
            lines.append(element("li", _arm_sentence(arms, arm, group), cls=arm))
    lines.append(element("li", *_baseline_sentence(report, group), cls=BASELINE))
    return section(
        "What each gains and loses",
        paragraph(
            "Against the personal denoiser alone. Distances within 5% of each other, recall within 5 points, other "
            "shares within 2 and densities within 0.05 count as about the same. This is one run with one seed: "
            "differences a little larger can still be chance."
        ),
        element("ul", *lines, cls="verdicts"),
        element("div", *(_card(report, measure, group) for measure in _card_measures(arms)), cls="cards"),
    )


def _arm_sentence(arms: Mapping[str, ArmQuality], arm: str, group: str) -> Html:
    shown = [group, "pooled"]
    parts = [paragraph(f"{GROUP_TITLES[name]}: {verdict(arms, arm, name)}.") for name in shown]
    return joined(element("h3", TITLES[arm].capitalize()), *parts)


def _baseline_sentence(report: OwnerReport, group: str) -> list[str]:
    copies = report.evaluation.arms[BASELINE].groups[group].get("copies_half")
    share = report.spec.personal.release_share
    trained = (
        f"it saw the owners' releases above the split too ({float(share):.0%} of each batch), so it is more than what "
        "you would have without the others; that baseline is not part of a job"
        if share
        else "it saw your records only, so it is what you would have without the others"
    )
    copied = "" if copies is None else f" Copies ½, {GROUP_TITLES[group].lower()}: {100 * copies:.1f}% of its images."
    return [element("h3", "Personal alone"), paragraph(f"The yardstick: {trained}.{copied}")]


def _card_measures(arms: Mapping[str, ArmQuality]) -> list[Measure]:
    """The measures with a card that some arm has a figure for."""
    return [
        measure
        for measure in MEASURES
        if measure.key in CARDS and any(arm.groups["all"].get(measure.key) is not None for arm in arms.values())
    ]


def _card(report: OwnerReport, measure: Measure, group: str) -> Html:
    values = {arm: quality.groups[group].get(measure.key) for arm, quality in _with_real(report)}
    longest = 1.0 if measure.is_share else max((value for value in values.values() if value), default=1.0)
    lines = [
        element(
            "div",
            element("dt", TITLES[arm]),
            element("dd", bar((value or 0.0) / longest, arm)),
            element("dd", measure.text(value), cls="value"),
        )
        for arm, value in values.items()
    ]
    return element(
        "section",
        element("h3", measure.title, element("small", f" {GROUP_TITLES[group].lower()}")),
        paragraph(f"{measure.direction}. {measure.explanation}"),
        element("dl", *lines, cls="bars"),
        cls="card",
    )


def _with_real(report: OwnerReport) -> list[tuple[str, ArmQuality]]:
    arms = report.evaluation.arms
    return [(arm, arms[arm]) for arm in (*ARMS, REAL) if arm in arms]


def _figures(report: OwnerReport) -> Html:
    measures = _measures(report.evaluation.arms)
    columns = ["", *(measure.heading for measure in measures)]
    groups = [
        rows([_arm_row(report, arm, group) for arm, _ in _with_real(report)], GROUP_TITLES[group], len(columns))
        for group in GROUPS
        if group in ("pooled", "all") or report.minority
    ]
    without_a_card = [measure for measure in measures if measure not in _card_measures(report.evaluation.arms)]
    return section(
        "All figures",
        paragraph(
            "Green is better, red is worse than the personal denoiser alone; what is about the same has no colour. "
            "“real” is your own training records measured the same way, for reference; their number is another."
        ),
        table("Measured on the held-out records", columns, *groups),
        *_missing(report),
        definitions([(measure.title, f"{measure.direction}. {measure.explanation}") for measure in without_a_card]),
    )


def _missing(report: OwnerReport) -> list[Html]:
    """Why there are dashes in the tables, each reason once."""
    reasons = dict.fromkeys(reason for _, quality in _with_real(report) for reason in quality.missing)
    if not reasons:
        return []
    shown = [*list(reasons)[:MISSING_ROWS], *(["…"] if len(reasons) > MISSING_ROWS else [])]
    return [paragraph(f"Where there is a dash: {'; '.join(shown)}. Recall and copies go by class.", cls="note")]


def _measures(arms: Mapping[str, ArmQuality]) -> list[Measure]:
    """All of them, without those of a network that the dataset does not name."""
    there = {key for arm in arms.values() for values in arm.groups.values() for key in values}
    return [measure for measure in MEASURES if measure.key in there or measure.key not in WITH_INCEPTION]


def _arm_row(report: OwnerReport, arm: str, group: str) -> list[str]:
    arms = report.evaluation.arms
    values, baseline = arms[arm].groups[group], arms[BASELINE].groups[group]
    figures = (_figure(measure, values, baseline if arm in ARMS else {}) for measure in _measures(arms))
    return [_key(arm), *figures]


def _key(arm: str) -> Html:
    return element("span", element("span", cls=f"key {arm}"), TITLES[arm], cls="arm")


def _figure(measure: Measure, values: Values, baseline: Values) -> Html:
    value = values.get(measure.key)
    change = compare(measure, value, baseline.get(measure.key))
    marks = {Change.BETTER: "better", Change.WORSE: "worse"}
    return element("td", measure.text(value), cls="empty" if value is None else marks.get(change, "") if change else "")


def _per_class(report: OwnerReport) -> Html:
    arms = report.evaluation.arms
    columns = ["Class", "Records", *(SHORT_TITLES[arm] for _ in COMPARED for arm in ARMS)]
    over = [("", 2), *((measure.heading, len(ARMS)) for measure in COMPARED)]
    lines = []
    for label in range(report.spec.classes.count):
        figures = [
            _figure(measure, arms[arm].per_class[label], arms[BASELINE].per_class[label])
            for measure in COMPARED
            for arm in ARMS
        ]
        lines.append([_class_heading(report, label), f"{report.spec.classes.records[label]:,}", *figures])
    return section("Class by class", table("Every class on its own; colours as above", columns, rows(lines), over=over))


def _class_heading(report: OwnerReport, label: int) -> Html:
    rare = [" ", element("span", "minority", cls="rare")] if label in report.minority else []
    return joined(class_name(report.spec.classes, label), *rare)


# ---- Other jobs ------------------------------------------------------------------------------------------------


def _jobs(report: OwnerReport) -> list[Html]:
    if not report.others:
        return []
    group = "minority" if report.minority else "all"
    columns = ["Job", "Mechanism", "Samples of “both”, one per class", "ε per image", "Split σ"]
    columns += [measure.heading for measure in COMPARED]
    lines = [_job_row(report, evaluation, group) for evaluation in (*report.others, report.evaluation)]
    text = (
        "Each job is a release of its own, and each was charged. Together: "
        f"ε = {combined_epsilon(report):.2f} per image at δ = {tidy(combined_delta(report))}, k = {len(lines)} "
        "releases. Figures are of “both”; every job trained a personal denoiser of its own."
    )
    caption = f"Jobs on these records, oldest first; {GROUP_TITLES[group].lower()}"
    return [section("Jobs beside each other", paragraph(text), table(caption, columns, rows(lines), text=columns[1:3]))]


def _job_row(report: OwnerReport, evaluation: Evaluation, group: str) -> list[str]:
    this = evaluation.job.uid == report.evaluation.job.uid
    name = joined(evaluation.job.name, *([" ", element("small", "this job")] if this else []))
    timeline = f", {evaluation.timeline}" if evaluation.timeline else ""
    mechanism = element("td", f"{evaluation.mechanism.value}{timeline}", cls="text")
    values: Values = evaluation.arms["both"].groups[group] if "both" in evaluation.arms else {}
    figures = [_figure(measure, values, {}) for measure in COMPARED]
    promise = [tidy(evaluation.epsilon), f"{evaluation.split_sigma:.3g}"]
    return [name, mechanism, element("td", _picture_row(evaluation), cls="picture"), *promise, *figures]


def _picture_row(evaluation: Evaluation) -> Html:
    row = evaluation.picture
    picture = Picture(base64.b64decode(row.png_base64), row.width, row.height)
    return image(picture, f"One sample of each class, job {evaluation.job.name}", 280)


# ---- The promise and the procedure -----------------------------------------------------------------------------


def _promise(report: OwnerReport) -> Html:
    return section(
        "What the promise means",
        paragraph(
            "Take somebody who knows every image of yours but one and has to tell, from your release, whether that one "
            f"is a given image. The best test there can be has {attack_sentence(report.promise)}; guessing has 0.5 "
            "and 1%. The job report says what lies outside the promise."
        ),
    )


def _how(report: OwnerReport) -> Html:
    measured, sampling = report.evaluation.measured, report.spec.sampling
    lines = [
        f"Samples: {sampling.images_per_class:,} per class and arm, {sampling.steps} steps of {sampling.sampler}, "
        "all arms from the same noise.",
    ]
    if measured is not None:
        lines += [
            f"Compared: {measured.num_samples:,} samples of each arm, {measured.num_train:,} training records, "
            f"{measured.num_holdout:,} held-out records.",
            f"Features: {measured.extractor}, seed {measured.seed}. Resize: {measured.resize}.",
            *([f"FID and KID: {measured.inception}; it resizes images itself."] if measured.inception else []),
            f"Coverage and density: {measured.nearest_neighbours} nearest neighbours. Theirs, those of copies "
            "and of what is told apart are Euclidean distances of pixels.",
            f"Minority classes, by the declared numbers of records: {_minority_names(report)}.",
        ]
    return section("How it was measured", bullets(lines))


def _minority_names(report: OwnerReport) -> str:
    return ", ".join(class_name(report.spec.classes, label) for label in report.minority) or "none"
