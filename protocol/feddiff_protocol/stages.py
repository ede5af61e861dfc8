"""Stage specs and receipts: all that a stage is told, and all that it may say afterwards.

A stage is `python -m feddiff_trainer.<stage> SPEC.json`. Its spec holds what it needs and, of other owners,
only what they released. Its receipt is one JSON line of public fields on stdout and in the file that
FEDDIFF_TERMINATION_LOG names (default /dev/termination-log).
"""

from collections.abc import Mapping
from enum import StrEnum
from typing import Annotated, Literal

from pydantic import Field

from .api import (
    WHOLE,
    ClassesSpec,
    ComputeSpec,
    DiffusionSpec,
    FederatedDiffusionJob,
    ImageSpec,
    Name,
    NetworkSpec,
    PersonalSpec,
    PrivacySpec,
    PrivateDataset,
    SamplingSpec,
    SharedSpec,
    SourceSpec,
    Wire,
)
from .layout import release_name

RECEIPT_BYTES = 4096  # what /dev/termination-log keeps

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Uri = Annotated[str, Field(pattern=r"^(s3|file)://.+$", max_length=512)]
Seed = Annotated[int, Field(ge=0, lt=2**31), WHOLE]


class Stage(StrEnum):
    RELEASE = "release"
    TRAIN_SHARED = "train-shared"
    TRAIN_PERSONAL = "train-personal"
    SAMPLE = "sample"
    EVALUATE = "evaluate"
    REPORT = "report"

    @property
    def module(self) -> str:
        return f"feddiff_trainer.{self.value.replace('-', '_')}"


class JobReference(Wire):
    uid: Annotated[str, Field(pattern=r"^[a-z0-9-]{8,64}$")]
    name: Name
    namespace: Name


class ReleaseReference(Wire):
    """A release that counts: a manifest is trusted only under the hash the planner handed over."""

    client: Name
    manifest_sha256: Sha256


class StageSpec(Wire):
    job: JobReference
    attempt: Annotated[int, Field(ge=1)]


class SeededSpec(StageSpec):
    """What follows a release draws from a seed: initial weights, batches, samples, the classifier that measures. Only
    experiments give one. A release has none: its noise is the operating system's."""

    seed: Seed | None = None

    @property
    def seed_or_zero(self) -> int:
        return self.seed or 0


class ReleaseSpec(StageSpec):
    stage: Literal[Stage.RELEASE] = Stage.RELEASE
    client: Name
    release: Annotated[str, Field(pattern=r"^prl-[0-9a-f]{40}$")]
    source: SourceSpec
    image: ImageSpec
    classes: ClassesSpec
    privacy: PrivacySpec
    diffusion: DiffusionSpec
    owner_store: Uri
    federation_store: Uri


class TrainSharedSpec(SeededSpec):
    stage: Literal[Stage.TRAIN_SHARED] = Stage.TRAIN_SHARED
    releases: Annotated[tuple[ReleaseReference, ...], Field(min_length=1)]
    image: ImageSpec
    num_classes: int
    privacy: PrivacySpec
    diffusion: DiffusionSpec
    network: NetworkSpec
    compute: ComputeSpec = ComputeSpec()
    shared: SharedSpec
    sampling: SamplingSpec
    federation_store: Uri


class OwnerStageSpec(SeededSpec):
    """What every stage after the release has in common on the owner's side."""

    client: Name
    source: SourceSpec
    image: ImageSpec
    classes: ClassesSpec
    privacy: PrivacySpec
    diffusion: DiffusionSpec
    network: NetworkSpec
    shared: SharedSpec
    releases: Annotated[tuple[ReleaseReference, ...], Field(min_length=1)]
    owner_store: Uri
    federation_store: Uri


class TrainPersonalSpec(OwnerStageSpec):
    stage: Literal[Stage.TRAIN_PERSONAL] = Stage.TRAIN_PERSONAL
    compute: ComputeSpec = ComputeSpec()
    personal: PersonalSpec


class SampleSpec(OwnerStageSpec):
    stage: Literal[Stage.SAMPLE] = Stage.SAMPLE
    personal: PersonalSpec
    sampling: SamplingSpec
    shared_denoiser_sha256: Sha256
    output: str | None = Field(None, description="local .npz for further samples; else the owner store's own key")


class EvaluateSpec(OwnerStageSpec):
    stage: Literal[Stage.EVALUATE] = Stage.EVALUATE
    personal: PersonalSpec
    sampling: SamplingSpec


class BudgetLine(Wire):
    """One owner's account as the job report shows it: ε of the composed charges, two decimals' worth of text."""

    client: Name
    budget_epsilon: str
    spent_epsilon: str
    remaining_epsilon: str
    remaining_pure_epsilon: str = ""  # where the budget sets a part aside for pure ε
    delta: str
    num_releases: int


class Duration(Wire):
    stage: Stage
    client: str = ""
    attempts: int
    milliseconds: int


class ReportSpec(StageSpec):
    stage: Literal[Stage.REPORT] = Stage.REPORT
    releases: Annotated[tuple[ReleaseReference, ...], Field(min_length=1)]
    image: ImageSpec
    classes: ClassesSpec
    privacy: PrivacySpec
    diffusion: DiffusionSpec
    shared: SharedSpec
    budgets: tuple[BudgetLine, ...]
    durations: tuple[Duration, ...]
    command: str = ""
    shared_denoiser_sha256: Sha256
    federation_store: Uri


AnyStageSpec = ReleaseSpec | TrainSharedSpec | TrainPersonalSpec | SampleSpec | EvaluateSpec | ReportSpec


class Receipt(Wire):
    """What a finished stage says in public: which bytes now exist, never what the data was like."""

    stage: Stage
    job_uid: str
    client: str = ""
    attempt: int
    outputs: Mapping[str, Sha256] = {}  # release: manifest; train-shared: denoiser; report: report
    milliseconds: int
    versions: Mapping[str, str] = {}

    def to_line(self) -> str:
        """One line of JSON, at most RECEIPT_BYTES long."""
        line = self.model_dump_json(by_alias=True, exclude_none=True)
        assert len(line.encode()) <= RECEIPT_BYTES
        return line


class Places(Wire):
    """Where one job's stores and records are, as the engine or the operator resolves them."""

    federation_store: Uri
    owner_stores: Mapping[str, Uri]  # by client
    sources: Mapping[str, SourceSpec]  # by client, paths resolved


def release_spec(
    job: FederatedDiffusionJob, uid: str, client: str, dataset: PrivateDataset, places: Places, attempt: int
) -> ReleaseSpec:
    return ReleaseSpec(
        job=job_reference(job, uid),
        attempt=attempt,
        client=client,
        release=release_name(uid, client, dataset.metadata.uid),
        source=places.sources[client],
        image=dataset.spec.image,
        classes=dataset.spec.classes,
        privacy=job.spec.privacy,
        diffusion=job.spec.diffusion,
        owner_store=places.owner_stores[client],
        federation_store=places.federation_store,
    )


def job_reference(job: FederatedDiffusionJob, uid: str) -> JobReference:
    return JobReference(uid=uid, name=job.metadata.name, namespace=job.metadata.namespace)


def train_shared_spec(
    job: FederatedDiffusionJob,
    uid: str,
    dataset: PrivateDataset,
    releases: tuple[ReleaseReference, ...],
    places: Places,
    attempt: int,
    seed: int | None = None,
) -> TrainSharedSpec:
    return TrainSharedSpec(
        job=job_reference(job, uid),
        attempt=attempt,
        seed=seed,
        releases=releases,
        image=dataset.spec.image,
        num_classes=dataset.spec.classes.count,
        privacy=job.spec.privacy,
        diffusion=job.spec.diffusion,
        network=job.spec.network,
        compute=job.spec.compute,
        shared=job.spec.shared,
        sampling=job.spec.sampling,
        federation_store=places.federation_store,
    )


def owner_stage_spec(
    stage: Stage,
    job: FederatedDiffusionJob,
    uid: str,
    client: str,
    dataset: PrivateDataset,
    releases: tuple[ReleaseReference, ...],
    shared_denoiser_sha256: str,
    places: Places,
    attempt: int,
    seed: int | None = None,
) -> TrainPersonalSpec | SampleSpec | EvaluateSpec:
    """The spec of train-personal, sample or evaluate for one client."""
    common = {
        "job": job_reference(job, uid),
        "attempt": attempt,
        "seed": seed,
        "client": client,
        "source": places.sources[client],
        "image": dataset.spec.image,
        "classes": dataset.spec.classes,
        "privacy": job.spec.privacy,
        "diffusion": job.spec.diffusion,
        "network": job.spec.network,
        "shared": job.spec.shared,
        "personal": job.spec.personal,
        "releases": releases,
        "owner_store": places.owner_stores[client],
        "federation_store": places.federation_store,
    }
    if stage is Stage.TRAIN_PERSONAL:
        return TrainPersonalSpec(**common, compute=job.spec.compute)
    if stage is Stage.SAMPLE:
        return SampleSpec(**common, sampling=job.spec.sampling, shared_denoiser_sha256=shared_denoiser_sha256)
    assert stage is Stage.EVALUATE
    return EvaluateSpec(**common, sampling=job.spec.sampling)


def report_spec(
    job: FederatedDiffusionJob,
    uid: str,
    dataset: PrivateDataset,
    releases: tuple[ReleaseReference, ...],
    budgets: tuple[BudgetLine, ...],
    durations: tuple[Duration, ...],
    command: str,
    shared_denoiser_sha256: str,
    places: Places,
    attempt: int,
) -> ReportSpec:
    """The job report's spec; `dataset` is any client's, for what all of them share."""
    return ReportSpec(
        job=job_reference(job, uid),
        attempt=attempt,
        releases=releases,
        image=dataset.spec.image,
        classes=dataset.spec.classes,
        privacy=job.spec.privacy,
        diffusion=job.spec.diffusion,
        shared=job.spec.shared,
        budgets=budgets,
        durations=durations,
        command=command,
        shared_denoiser_sha256=shared_denoiser_sha256,
        federation_store=places.federation_store,
    )
