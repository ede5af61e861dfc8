"""An audit and an export as documents in the owner's store: what attacks found, and what was passed on in spite of it.

An attack on what left the owner has a bound, from the release's charge; above it, a result is a bug. The personal
denoiser has no promise. A result below a bound means something only if the same attack finds the records of a model
that memorised them: its control.
"""

from enum import StrEnum
from typing import Annotated, Literal

from pydantic import Field

from feddiff_protocol import accountant
from feddiff_protocol.api import Name, Wire
from feddiff_protocol.stages import JobReference, Sha256

CONFIDENCE = 0.999  # of every interval: of fifty together, all hold in 95 audits of a hundred and more
LARGEST_EXPORT_MU = 2.33  # a release's bound at which a personal denoiser may still pass: AUC 0.95, half at 1 % false


class Target(StrEnum):
    UPLOAD = "upload"
    SHARED = "shared"
    PERSONAL = "personal"
    BOTH = "both"


TITLES = {
    Target.UPLOAD: "upload",
    Target.SHARED: "shared denoiser",
    Target.PERSONAL: "personal denoiser",
    Target.BOTH: "shared and personal",
}
PROMISED = frozenset({Target.UPLOAD, Target.SHARED})  # what left the owner, and what was made of that alone


class Verdict(StrEnum):
    WITHIN = "within its bound"
    ABOVE = "above its bound"
    NO_PROMISE = "no promise"
    SILENT = "control silent"
    OUT_OF_REACH = "bound out of reach"  # an attack that is always right would not be above it: it cannot fail


class Estimate(Wire):
    """A value in [0, 1] and the limits of its interval."""

    value: float
    low: float
    high: float


class Finding(Wire):
    """One attack on one target. `members` were released or trained on, `others` were not. The bounds are those of the
    release's charge, also where nothing was promised: for the reader to compare."""

    target: Target
    attack: str
    group: Literal["all", "minority"] = "all"
    members: int
    others: int
    auc: Estimate
    auc_bound: float
    tpr: Estimate | None = None  # at 1 % false positives; None: too few others to tell
    tpr_bound: float | None = None
    control_auc: float
    verdict: Verdict


class Copies(Wire):
    """Of one target's samples: the share nearer to a training record than ⅓, or ½, of the way to any held-out one."""

    target: Target
    third: Estimate
    half: Estimate


class OneRun(Wire):
    """Canaries, each one of two images by a fair coin, in one release: how many of the surest guesses were right, and
    the ε that so many take. `ceiling`: the most that so many guesses could have shown. The shared denoiser is one that
    was trained on such a release alone."""

    target: Literal[Target.UPLOAD, Target.SHARED]
    attack: str
    canaries: int
    guesses: int
    correct: int
    epsilon_low: float
    ceiling: float
    epsilon_bound: float
    delta: float
    control_auc: float
    verdict: Verdict


class Reconstruction(Wire):
    """Images and what is released of each: how often that is nearer to its image than to another one of the class, by
    how many dB an estimate from it beats a guess without the release, and how alike (SSIM) estimate and guess are to
    the image. `control…`: with next to no noise."""

    records: int
    nearer: Estimate
    nearer_bound: float
    gain_db: float
    ssim: float
    guess_ssim: float
    control_nearer: float
    control_gain_db: float
    control_ssim: float
    verdict: Verdict


class Audit(Wire):
    """One owner's audit of one job. Depends on the owner's records: it stays in the owner's store."""

    format: Literal["feddiff.audit/1"] = "feddiff.audit/1"
    job: JobReference
    client: Name
    records_sha256: Sha256
    personal_sha256: Sha256  # of the denoiser that was attacked, as it lies in the store
    samples_sha256: Sha256
    finished_at: str  # UTC, ISO 8601
    confidence: float = CONFIDENCE
    findings: tuple[Finding, ...]
    one_run: tuple[OneRun, ...] = ()
    reconstruction: Reconstruction | None = None  # None: no held-out records, or images too large for it
    copies: tuple[Copies, ...] = ()
    blind: Estimate | None = None  # AUC of a denoiser that was trained on nothing; 0.5 unless the held-out ones differ
    notes: tuple[Annotated[str, Field(max_length=500)], ...] = ()

    @property
    def above(self) -> list[str]:
        """The attacks that did better than the release's charge allows."""
        runs = [
            f"{TITLES[each.target]}, one run, {each.attack}" for each in self.one_run if each.verdict is Verdict.ABOVE
        ]
        if self.reconstruction is not None and self.reconstruction.verdict is Verdict.ABOVE:
            runs.append(f"{TITLES[Target.UPLOAD]}, reconstruction")
        return [named(finding) for finding in self.findings if finding.verdict is Verdict.ABOVE] + runs


class Export(Wire):
    """A copy of a personal denoiser, or of its samples, that left the owner's store."""

    format: Literal["feddiff.export/1"] = "feddiff.export/1"
    what: Literal["denoiser", "samples"]
    sha256: Sha256  # of what was copied, as it lies in the store
    exported_at: str  # UTC, ISO 8601
    refusals: tuple[str, ...] = ()  # what spoke against it
    override: str = ""  # why the owner did it all the same


def export_refusals(audit: Audit) -> list[str]:
    """Why the personal denoiser and its samples should not leave the owner; empty where the audit passed.

    Nothing was promised for them. They pass where every attack on them has been shown to find no more than the best
    attack on the release could: upper limits of the area below its bound, with controls that fire. Where the release
    itself allows nearly everything, the bound is that of LARGEST_EXPORT_MU.
    """
    most_area = accountant.attack_auc(LARGEST_EXPORT_MU)
    most_found = accountant.attack_tpr(LARGEST_EXPORT_MU, 0.01)
    own = [finding for finding in audit.findings if finding.target not in PROMISED]
    reasons = [] if own else ["the personal denoiser was not attacked"]
    reasons += [f"{each}: above its bound" for each in audit.above]
    for finding in own:
        if finding.verdict is Verdict.SILENT:
            reasons.append(f"{named(finding)}: finds nothing in a model that memorised its records, so it says nothing")
        elif finding.auc.high > (area := min(finding.auc_bound, most_area)):
            reasons.append(f"{named(finding)}: AUC up to {finding.auc.high:.3f}, where {area:.3f} is the most")
        elif finding.tpr and finding.tpr.low > (share := min(finding.tpr_bound or 1.0, most_found)):
            reasons.append(
                f"{named(finding)}: finds {finding.tpr.value:.1%} at 1% false alarms, where {share:.1%} is the most"
            )
    for copies in audit.copies:
        if copies.target not in PROMISED and copies.third.value > 0:
            reasons.append(f"{TITLES[copies.target]}: {copies.third.value:.1%} of its samples are copies")
    if audit.blind is not None and not audit.blind.low <= 0.5 <= audit.blind.high:
        reasons.append("training and held-out records differ in themselves, so attacks on models say nothing")
    return reasons


def named(finding: Finding) -> str:
    """ "shared denoiser, loss threshold"."""
    rare = ", minority classes" if finding.group == "minority" else ""
    return f"{TITLES[finding.target]}, {finding.attack}{rare}"
