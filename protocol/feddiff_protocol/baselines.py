"""Baselines of an experiment, what a job is compared with: their names, and the specs of their two stages.

An experiment on one machine alone carries them out. No job names one, so no cluster ever does: most of them see the
clean records of all owners together, and but for dp-sgd they promise nothing to anybody.
"""

from collections.abc import Iterable, Mapping
from enum import StrEnum
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from .api import WHOLE, ClassesSpec, FederatedDiffusionJobSpec, ImageSpec, Mechanism, Name, SourceSpec, Wire
from .stages import SampleSpec, SeededSpec, Stage, Uri


class Baseline(StrEnum):
    LOCAL = "local"  # each owner's own clean records, from pure noise
    CENTRAL = "central"  # everybody's clean records, in one network
    FEDAVG = "fedavg"  # one network, whose weights all owners train on their own records and average
    DP_SGD = "dp-sgd"  # each owner's own clean records by DP-SGD, at the job's ε and δ
    ORACLE = "oracle"  # the job with everybody's records in place of what was released, the split being the same
    # Of a job's own run, whose denoisers and releases they take:
    ALONE = "alone"  # the personal denoiser from pure noise, without any shared one
    FROM_NOISE = "from-noise"  # the personal denoiser from the split, begun with noise that holds no image
    CLOSED_FORM = "closed-form"  # the pooled Gaussian's own denoiser in place of the shared one
    DRAWS = "draws"  # draws of the pooled Gaussian, no denoiser at all

    @property
    def leaves(self) -> str:
        """What leaves an owner, in a few words for a table; of a run it is what that releases."""
        return LEAVES[self]

    @property
    def is_of_a_run(self) -> bool:
        """Whether it takes what a job's run has made, and trains nothing itself."""
        return self in (Baseline.ALONE, Baseline.FROM_NOISE, Baseline.CLOSED_FORM, Baseline.DRAWS)

    def indifferent_to(self, mechanism: Mechanism) -> tuple[str, ...]:
        """Fields of a job, or all below them, that it does not depend on. An oracle knows of no release but of the
        split, which is a field of its own or, with `gaussian`, follows from ε."""
        if self.is_of_a_run:
            return ()
        if self is Baseline.ORACLE:
            return () if mechanism is Mechanism.GAUSSIAN else ("privacy",)
        return RELEASE_FIELDS

    @property
    def keeps_epsilon(self) -> bool:
        """Whether it keeps the job's ε and δ, by a way of its own."""
        return self is Baseline.DP_SGD

    def networks(self, clients: Iterable[str]) -> list[str]:
        """Whose networks it trains; "" is one that all have in common."""
        if self.is_of_a_run:
            return []
        common = [] if self in (Baseline.LOCAL, Baseline.DP_SGD) else [""]
        own = list(clients) if self in (Baseline.LOCAL, Baseline.DP_SGD, Baseline.ORACLE) else []
        return common + own


LEAVES: Mapping[Baseline, str] = {
    Baseline.LOCAL: "nothing",
    Baseline.CENTRAL: "every record as it is: NOT PRIVATE",
    Baseline.ORACLE: "every record as it is: NOT PRIVATE",
    Baseline.FEDAVG: "weights in every round, without noise: NOT PRIVATE",
}

# Fields of a job, or all below them, that say what is released and what is made of it.
RELEASE_FIELDS = (
    *("privacy", "shared", "diffusion.splitSigma", "diffusion.timeline"),
    *("personal.releaseShare", "personal.releaseSigma", "personal.clipMix"),
)
EPSILON_FIELDS = ("privacy.epsilon", "privacy.delta")  # but one that keeps ε depends on these

DEFAULT_ROUNDS = 100
Rounds = Annotated[int, Field(ge=1, le=10**6), WHOLE]
DEFAULT_NOISE_MULTIPLICITY = 32  # DPDM's for MNIST
NoiseMultiplicity = Annotated[int, Field(ge=1, le=1024), WHOLE]


class OwnerRecords(Wire):
    """One owner's records."""

    client: Name
    source: SourceSpec
    classes: ClassesSpec


class BaselineSpec(SeededSpec):
    """What both stages are told: the arm, everybody's records, the job it is compared with, and a folder."""

    baseline: Baseline
    client: Name | Literal[""] = ""  # whose network, or whose records are measured; "" is the network in common
    owners: Annotated[tuple[OwnerRecords, ...], Field(min_length=1)]
    image: ImageSpec
    like: FederatedDiffusionJobSpec  # the job: network, image-steps, batch, rate and sampler are its own
    rounds: Rounds = DEFAULT_ROUNDS  # of fedavg
    noise_multiplicity: NoiseMultiplicity = DEFAULT_NOISE_MULTIPLICITY  # of dp-sgd: noise levels of a record in a step
    run: SampleSpec | None = None  # of the job whose run a baseline takes, for this client
    store: Uri

    def owner(self, client: str) -> OwnerRecords:
        return next(owner for owner in self.owners if owner.client == client)

    @property
    def classes(self) -> ClassesSpec:
        """Of the owner whose records are measured."""
        return self.owner(self.client).classes


class TrainBaselineSpec(BaselineSpec):
    """Training of one network. Like train-personal it sees records, and tells percents alone."""

    module: ClassVar = "feddiff_trainer.train_baseline"
    stage: Literal[Stage.TRAIN_PERSONAL] = Stage.TRAIN_PERSONAL


class MeasureBaselineSpec(BaselineSpec):
    """Samples of the arm, measured on one owner's held-out records."""

    module: ClassVar = "feddiff_trainer.measure_baseline"
    stage: Literal[Stage.EVALUATE] = Stage.EVALUATE


AnyBaselineSpec = TrainBaselineSpec | MeasureBaselineSpec
