"""What an evaluation says: the measures and what they mean, one owner's results for one job, and how two arms compare.

An arm is a way to make images: `shared` (the shared denoiser alone), `personal` (the owner's denoiser alone, from pure
noise), `both` (shared above the split, personal below).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from enum import StrEnum
from typing import Annotated, Literal

from pydantic import Field

from feddiff_protocol.api import Mechanism, Name, NonNegative, Positive, ShareOrNothing, Wire
from feddiff_protocol.stages import JobReference, Sha256

ARMS = ("both", "shared", "personal")
BASELINE = "personal"
REAL = "real"  # the owner's own records, measured like samples: for reference
GROUPS = ("pooled", "all", "majority", "minority")  # pooled: labels ignored; the others: means over classes


@dataclass(frozen=True)
class Measure:
    """One way to measure images. `loss` turns a value into how far it is from the best one, so that less is better;
    losses count as about the same within `tolerance`, of the larger one if it `is_relative`, else absolute. Shares lie
    in [0, 1] and are shown in percent."""

    key: str
    title: str
    direction: str
    explanation: str
    loss: Callable[[float], float]
    tolerance: float
    is_share: bool = False
    is_relative: bool = False

    @property
    def heading(self) -> str:
        """The title with its arrow, for a column."""
        return f"{self.title} {self.direction[0]}"

    def text(self, value: float | None) -> str:
        """The value as people read it; a dash where it could not be measured."""
        if value is None:
            return "–"
        return f"{100 * value:.1f}%" if self.is_share else f"{value:.3g}"


HIGHER, LOWER = "↑ higher is better", "↓ lower is better"
MEASURES = (
    Measure(
        "recall",
        "Recall",
        HIGHER,
        "A classifier trained on these images alone finds this share of the held-out real ones.",
        lambda value: 1 - value,
        0.05,  # the seed of that classifier alone moves it by a standard deviation of up to 0.03
        is_share=True,
    ),
    Measure(
        "frechet",
        "Fréchet distance",
        LOWER,
        "How far the features of these images are from those of the held-out real ones, as Gaussians; 0 is equal. From "
        "a small classifier, so never to be compared with a published FID.",
        lambda value: value,
        0.05,
        is_relative=True,
    ),
    Measure(
        "kernel_distance",
        "Kernel distance",
        LOWER,
        "Another distance of the same features, unbiased with few images, so it may come out below 0.",
        lambda value: value,
        0.05,
        is_relative=True,
    ),
    Measure(
        "fid",
        "FID",
        LOWER,
        "The Fréchet distance in the features of the Inception network that the dataset names; all images together.",
        lambda value: value,
        0.05,
        is_relative=True,
    ),
    Measure(
        "kid",
        "KID",
        LOWER,
        "The kernel distance in the features of that network, unbiased with few images, so it may come out below 0.",
        lambda value: value,
        0.05,
        is_relative=True,
    ),
    Measure(
        "coverage",
        "Coverage",
        HIGHER,
        "Share of held-out real images that have one of these images close by: are all kinds made?",
        lambda value: 1 - value,
        0.02,
        is_share=True,
    ),
    Measure(
        "density",
        "Density",
        "↑ higher is better, up to 1",
        "How densely these images lie where real ones are: are they believable? Real images have about 1; more only "
        "means crowding around the typical.",
        lambda value: max(1 - value, 0),
        0.05,
    ),
    Measure(
        "two_sample_accuracy",
        "Told apart",
        "◇ 50% is best",
        "How often an image's nearest neighbour is of its own kind, made or real: 50% when nobody can tell, 100% when "
        "everybody can, below 50% when one kind copies the other.",
        lambda value: abs(value - 0.5),
        0.02,
        is_share=True,
    ),
    Measure(
        "copies_half",
        "Copies ½",
        LOWER,
        "Share of images less than half as far from one of the owner's own training images as from any held-out image "
        "of the class.",
        lambda value: value,
        0.02,
        is_share=True,
    ),
    Measure(
        "copies_third",
        "Copies ⅓",
        LOWER,
        "The same with one third: closer copies.",
        lambda value: value,
        0.02,
        is_share=True,
    ),
)

WITH_INCEPTION = ("fid", "kid")  # of all images together, where the dataset names an Inception network

Values = Mapping[str, float | None]  # by measure; None where it cannot be measured


class ArmQuality(Wire):
    """One arm's figures by group of classes, and class by class."""

    groups: Mapping[str, Values]  # by GROUPS
    per_class: tuple[Values, ...]
    missing: tuple[str, ...] = ()  # why some of them are not there


class Measured(Wire):
    """How the figures came about."""

    num_samples: int  # of every arm
    nearest_neighbours: int  # for coverage and density
    num_train: int
    num_holdout: int
    seed: int
    extractor: str
    resize: Literal["none"] = "none"
    inception: str | None = None  # the file behind FID and KID, by name and hash


class PictureRow(Wire):
    """One sample of each class, the small picture by which a job is recognised beside others."""

    png_base64: Annotated[str, Field(max_length=4 << 20)]
    width: int
    height: int


class Evaluation(Wire):
    """One owner's evaluation of one job. Depends on the owner's records: it stays in the owner's store."""

    format: Literal["feddiff.evaluation/1"] = "feddiff.evaluation/1"
    job: JobReference
    client: Name
    records_sha256: Sha256
    finished_at: str  # UTC, ISO 8601
    mechanism: Mechanism
    epsilon: Positive
    delta: ShareOrNothing
    mu_squared: NonNegative
    pure_epsilon: NonNegative = Decimal(0)
    split_step: int
    split_sigma: float
    timeline: str | None = None
    measured: Measured | None = None  # None: no hold-out was given
    arms: Mapping[str, ArmQuality]
    picture: PictureRow


class Change(StrEnum):
    BETTER = "better"
    WORSE = "worse"
    SAME = "about the same"


def compare(measure: Measure, value: float | None, baseline: float | None) -> Change | None:
    """Whether `value` is better than `baseline`, or about the same; None where one of them is missing."""
    if value is None or baseline is None:
        return None
    loss, other = measure.loss(value), measure.loss(baseline)
    scale = max(abs(loss), abs(other)) if measure.is_relative else 1.0
    if abs(loss - other) <= measure.tolerance * scale:
        return Change.SAME
    return Change.BETTER if loss < other else Change.WORSE


def verdict(arms: Mapping[str, ArmQuality], arm: str, group: str) -> str:
    """One sentence half: what `arm` gains and loses in `group` against the personal denoiser alone, gains and losses
    in the same words."""
    values, baseline = arms[arm].groups[group], arms[BASELINE].groups[group]
    found: dict[Change, list[str]] = {change: [] for change in Change}
    for measure in MEASURES:
        value, base = values.get(measure.key), baseline.get(measure.key)
        change = compare(measure, value, base)
        if change is not None:
            arrow = "" if change is Change.SAME else f" ({measure.text(base)} → {measure.text(value)})"
            found[change].append(f"{_in_a_sentence(measure.title)}{arrow}")
    parts = [f"{change} in {_listed(names)}" for change, names in found.items() if names]
    return "; ".join(parts) or "nothing could be measured"


def _in_a_sentence(title: str) -> str:
    return title if title.startswith("Fréchet") else title[:1].lower() + title[1:]


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
