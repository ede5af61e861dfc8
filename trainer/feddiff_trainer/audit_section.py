"""The audit, and what was passed on, as sections of the owner report."""

from collections.abc import Sequence

from .findings import (
    TITLES,
    Audit,
    Copies,
    Estimate,
    Export,
    Finding,
    OneRun,
    Reconstruction,
    Target,
    Verdict,
    export_refusals,
)
from .pages import Html, bullets, element, paragraph, rows, section, table

COLUMNS = ["", "Records", "AUC", "bound", "Found at 1% false alarms", "bound", "Control", "Verdict"]
MARKS = {Verdict.ABOVE: "worse", Verdict.WITHIN: "better", Verdict.SILENT: "empty", Verdict.OUT_OF_REACH: "empty"}


def audit_section(audit: Audit | None) -> Html:
    """What attacks find in this run, or how to ask."""
    if audit is None:
        return section(
            "Not audited",
            paragraph(
                "Nobody has attacked this run's release and denoisers yet. ",
                element("code", "feddiff audit DIR"),
                " does, and adds what it finds here. Before that, no personal denoiser should be passed on.",
            ),
        )
    groups = [_target_rows(audit.findings, target) for target in Target]
    return section(
        "What attacks find",
        paragraph(
            "Each attack scores records that were released or trained on and others that were not; AUC is how often "
            "one of the former has the higher score, 0.5 for guessing. The bound follows from what the release was "
            "charged: it holds for the upload and the shared denoiser, and a result above it is a bug. Nothing was "
            "promised for the personal denoiser; there the bound is something to compare with. The control is the same "
            "attack where nothing is private, on a model that memorised its records or a release with next to no "
            "noise: where it does not reach 0.8, the attack says nothing. Nor does it where its bound is out of reach: "
            "at so large an ε, or with so few records, an attack that is always right would not be above it."
        ),
        table("Attacks, with the limits of their intervals", COLUMNS, *groups, text=["Verdict"]),
        *([_one_run(audit.one_run)] if audit.one_run else []),
        *([] if audit.reconstruction is None else [_reconstruction(audit.reconstruction)]),
        *([_copies(audit.copies)] if audit.copies else []),
        _passing_on(audit),
        bullets(_notes(audit), cls="note"),
    )


def _target_rows(findings: Sequence[Finding], target: Target) -> Html:
    title = TITLES[target].capitalize()
    return rows([_row(finding) for finding in findings if finding.target is target], title, len(COLUMNS))


def _row(finding: Finding) -> list[str]:
    rare = ", minority classes" if finding.group == "minority" else ""
    mark = MARKS.get(finding.verdict, "")
    return [
        f"{finding.attack}{rare}",
        f"{finding.members:,} + {finding.others:,}",
        _area(finding.auc),
        f"{finding.auc_bound:.3f}",
        "–" if finding.tpr is None else _share(finding.tpr),
        "–" if finding.tpr_bound is None else f"{finding.tpr_bound:.1%}",
        f"{finding.control_auc:.2f}",
        element("td", finding.verdict.value, cls=f"text {mark}".strip()),
    ]


def _area(estimate: Estimate) -> str:
    return f"{estimate.value:.3f} ({estimate.low:.3f} to {estimate.high:.3f})"


def _share(estimate: Estimate) -> str:
    return f"{estimate.value:.1%} ({estimate.low:.1%} to {estimate.high:.1%})"


def _one_run(runs: Sequence[OneRun]) -> Html:
    lines = [
        [
            f"{TITLES[run.target]}: {run.attack}",
            f"{run.correct:,} of {run.guesses:,}",
            f"{run.epsilon_low:.2f}",
            f"{run.epsilon_bound:.2f}",
            f"{run.ceiling:.2f}",
            f"{run.control_auc:.2f}",
            element("td", run.verdict.value, cls=f"text {MARKS.get(run.verdict, '')}".strip()),
        ]
        for run in runs
    ]
    return table(
        f"One release of up to {runs[0].canaries:,} made-up images, each one of two by a fair coin: ε per image at "
        f"δ = {runs[0].delta:g}, k = 1 release, that the surest guesses show",
        ["", "Right guesses", "ε at least", "bound", "most it could show", "Control", "Verdict"],
        rows(lines),
        text=["Verdict"],
    )


def _reconstruction(found: Reconstruction) -> Html:
    lines = [
        [
            f"{found.records:,} of your records",
            _share(found.nearer),
            f"{found.nearer_bound:.1%}",
            f"{found.control_nearer:.1%}",
            f"{found.gain_db:.2f} dB",
            f"{found.control_gain_db:.2f} dB",
            f"{found.ssim:.3f}",
            f"{found.guess_ssim:.3f}",
            f"{found.control_ssim:.3f}",
            element("td", found.verdict.value, cls=f"text {MARKS.get(found.verdict, '')}".strip()),
        ]
    ]
    return table(
        "What is released of one record, to somebody who knows all others and the distribution: how often it is nearer "
        "to that record than to another of its class, what an estimate from it gains over one without, and how alike "
        "(SSIM) either is to the record",
        ["", "Nearer to itself", "bound", "Control", "Gain", "Control", "SSIM", "without", "Control", "Verdict"],
        rows(lines),
        text=["Verdict"],
    )


def _copies(copies: Sequence[Copies]) -> Html:
    lines = [[TITLES[each.target].capitalize(), _share(each.third), _share(each.half)] for each in copies]
    return table(
        "Samples nearer to one of your records than ⅓, or ½, of the way to any held-out one",
        ["", "Copies ⅓", "Copies ½"],
        rows(lines),
    )


def _passing_on(audit: Audit) -> Html:
    refusals = export_refusals(audit)
    if not refusals:
        return paragraph(
            "The personal denoiser and its samples passed: no attack on them does demonstrably better than the release "
            "allows. Nothing is promised for them all the same: better attacks may come."
        )
    return section("The personal denoiser should not be passed on", bullets([f"{each}." for each in refusals]))


def _notes(audit: Audit) -> list[str]:
    lines = [
        f"Intervals are of {audit.confidence:.1%} each: Newcombe's (2006, method 5) of AUC, Clopper and Pearson's of "
        "shares. They take records for independent; the records of one model are so only nearly.",
        "Members are training records, the others are held out, as many of each class. Attacks on the upload are "
        "carried out on made-up images at the worst pair, released anew by the same code with the same noise.",
    ]
    if audit.blind is not None:
        lines.append(f"A denoiser that was trained on nothing has AUC {_area(audit.blind)}; 0.5 is as it should be.")
    return [*lines, *audit.notes, f"Audited {audit.finished_at}."]


def exports_section(exports: Sequence[Export]) -> list[Html]:
    """What left the owner's store to be passed on; nothing where nothing did."""
    if not exports:
        return []
    lines = [
        [
            each.exported_at,
            element("td", each.what, cls="text"),
            element("td", _why(each), cls="text"),
            element("td", element("code", each.sha256, cls="hash"), cls="text"),
        ]
        for each in exports
    ]
    columns = ["When", "What", "Why it could", "SHA-256"]
    return [
        section(
            "What was passed on",
            paragraph(
                "Copies that left your store by ", element("code", "feddiff export"), ". No promise covers them."
            ),
            table("Personal denoisers and samples that were exported", columns, rows(lines), text=columns[1:]),
        )
    ]


def _why(export: Export) -> str:
    if not export.refusals:
        return "its audit passed"
    return f"the owner overrode the audit: {export.override} (against it: {'; '.join(export.refusals)})"
