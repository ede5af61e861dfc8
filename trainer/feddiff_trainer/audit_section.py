"""The audit as a section of the owner report."""

from collections.abc import Sequence

from .pages import Html, bullets, element, paragraph, rows, section, table
from .verdicts import TITLES, Audit, Copies, Estimate, Finding, Target, Verdict, export_refusals

COLUMNS = ["", "Records", "AUC", "bound", "Found at 1% false alarms", "bound", "Control", "Verdict"]
MARKS = {Verdict.ABOVE: "worse", Verdict.WITHIN: "better", Verdict.SILENT: "empty"}


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
            "noise: where it does not reach 0.8, the attack says nothing."
        ),
        table("Attacks, with the limits of their intervals", COLUMNS, *groups, text=["Verdict"]),
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
