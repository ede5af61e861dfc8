"""Baselines of an experiment, what a job is compared with: their names, and the specs of their two stages.

An experiment on one machine alone carries them out. No job names one, so no cluster ever does: most of them see the
clean records of all owners together, and promise nothing to anybody.
"""

from collections.abc import Mapping
from enum import StrEnum
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from .api import WHOLE, ClassesSpec, FederatedDiffusionJobSpec, ImageSpec, Name, SourceSpec, Wire
from .stages import SeededSpec, Stage, Uri


class Baseline(StrEnum):
    LOCAL = "local"  # each owner's own clean records, from pure noise
    CENTRAL = "central"  # everybody's clean records, in one network
    FEDAVG = "fedavg"  # one network, whose weights all owners train on their own records and average

    @property
    def leaves(self) -> str:
        """What leaves an owner, in a few words for a table."""
        return LEAVES[self]

    @property
    def networks(self) -> Literal["own", "common"]:
        """Whether every owner trains a network of its own, or all have one in common."""
        return "own" if self is Baseline.LOCAL else "common"


LEAVES: Mapping[Baseline, str] = {
    Baseline.LOCAL: "nothing",
    Baseline.CENTRAL: "every record as it is: NOT PRIVATE",
    Baseline.FEDAVG: "weights in every round, without noise: NOT PRIVATE",
}

# Fields of a job, or all below them, that no network of these baselines depends on: they know of no release.
RELEASE_FIELDS = (
    *("privacy", "shared", "diffusion.splitSigma", "diffusion.timeline"),
    *("personal.releaseShare", "personal.releaseSigma", "personal.clipMix"),
)


DEFAULT_ROUNDS = 100
Rounds = Annotated[int, Field(ge=1, le=10**6), WHOLE]


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
    store: Uri

    def owner(self, client: str) -> OwnerRecords:
        return next(owner for owner in self.owners if owner.client == client)

    @property
    def classes(self) -> ClassesSpec:
        """Of the owner whose records are measured."""
        return self.owner(self.client).classes

    @property
    def network(self) -> str:
        """Whose network the client's images are from."""
        return self.client if self.baseline.networks == "own" else ""


class TrainBaselineSpec(BaselineSpec):
    """Training of one network. Like train-personal it sees records, and tells percents alone."""

    module: ClassVar = "feddiff_trainer.train_baseline"
    stage: Literal[Stage.TRAIN_PERSONAL] = Stage.TRAIN_PERSONAL


class MeasureBaselineSpec(BaselineSpec):
    """Samples of the arm, measured on one owner's held-out records."""

    module: ClassVar = "feddiff_trainer.measure_baseline"
    stage: Literal[Stage.EVALUATE] = Stage.EVALUATE


AnyBaselineSpec = TrainBaselineSpec | MeasureBaselineSpec
