"""The three kinds of feddiff.dev/v1alpha1 as types: what a YAML document may say, and every default.

The same document goes to `kubectl apply` and to `feddiff run`. Numbers that carry a promise are decimal
strings, so that no value changes on its way through JSON; every list and string is bounded.
"""

import re
from collections.abc import Mapping, Sequence
from decimal import Decimal
from enum import StrEnum
from typing import Annotated, Any, Final, Literal, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    ValidationError,
    WithJsonSchema,
    model_validator,
)
from pydantic.alias_generators import to_camel

from .errors import SpecInvalid

T = TypeVar("T", bound=BaseModel)

GROUP = "feddiff.dev"
VERSION = "v1alpha1"
API_VERSION: Final = "feddiff.dev/v1alpha1"

DECIMAL_PATTERN = r"^[0-9]{1,12}(\.[0-9]{1,18})?([eE]-?[0-9]{1,2})?$"
NAME_PATTERN = r"^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$"


class Wire(BaseModel):
    """Base of everything that is written as JSON: camelCase names, unknown fields refused, immutable."""

    model_config = ConfigDict(
        alias_generator=to_camel, validate_by_name=True, validate_by_alias=True, extra="forbid", frozen=True
    )

    def to_wire(self) -> dict[str, Any]:
        """The JSON form with field names as users write them; what was left out stays out."""
        return self.model_dump(mode="json", by_alias=True, exclude_none=True)


def _decimal_from_text(value: object) -> Decimal:
    if isinstance(value, Decimal):
        return value
    if not isinstance(value, str):
        raise ValueError(f'expected a decimal number in quotes, like "10" or "1e-5", found {value!r}; quote it')
    if not re.fullmatch(DECIMAL_PATTERN, value):
        raise ValueError(f'expected a decimal number like "10", "0.25" or "1e-5", found "{value}"')
    return Decimal(value)


def _decimal_schema(*rules: str) -> WithJsonSchema:
    """A decimal string for the API server, whose bounds OpenAPI cannot compare: they become CEL rules."""
    schema: dict[str, Any] = {"type": "string", "pattern": DECIMAL_PATTERN, "maxLength": 36}
    if rules:
        validations = [{"rule": f"double(self) {rule}", "message": f"must be {rule}"} for rule in rules]
        schema["x-kubernetes-validations"] = validations
    return WithJsonSchema(schema)


def _decimal_to_text(value: Decimal) -> str:
    return str(value).replace("E+", "E")  # "1E+1" is how Decimal writes 1e1; the pattern knows no plus sign


Quantity = Annotated[
    Decimal, BeforeValidator(_decimal_from_text), PlainSerializer(_decimal_to_text, return_type=str), _decimal_schema()
]
Positive = Annotated[Quantity, Field(gt=0), _decimal_schema("> 0.0")]
NonNegative = Annotated[Quantity, Field(ge=0), _decimal_schema(">= 0.0")]
Share = Annotated[Quantity, Field(gt=0, lt=1), _decimal_schema("> 0.0", "< 1.0")]
Delta = Share
ShareOrNothing = Annotated[Quantity, Field(ge=0, lt=1), _decimal_schema(">= 0.0", "< 1.0")]
PixelValue = Annotated[Quantity, Field(ge=0, le=1), _decimal_schema(">= 0.0", "<= 1.0")]
Name = Annotated[str, Field(pattern=NAME_PATTERN, max_length=63)]
Text = Annotated[str, Field(min_length=1, max_length=1024)]
Overlay = Annotated[dict[str, Any], Field(default_factory=dict)]


class Metadata(Wire):
    """The part of Kubernetes' metadata that feddiff reads; the rest passes through untouched."""

    model_config = ConfigDict(extra="ignore", frozen=True, alias_generator=to_camel, validate_by_name=True)

    name: Name
    namespace: Name = "default"
    uid: Annotated[str, Field(max_length=64)] = ""


class StoreReference(Wire):
    """Where objects live: s3://bucket/prefix, or file:///folder; credentials come from the named Secret."""

    uri: Annotated[str, Field(pattern=r"^(s3|file)://.+$", max_length=512)]
    secret_name: Name | None = None


def _rules(*rules: tuple[str, str]) -> ConfigDict:
    """Rules the API server checks itself (CEL), beside the validator that says the same to a local run."""
    validations: list[Any] = [{"rule": rule, "message": message} for rule, message in rules]
    return ConfigDict(json_schema_extra={"x-kubernetes-validations": validations})


def _fixed(what: str) -> dict[str, Any]:
    return {"x-kubernetes-validations": [{"rule": "self == oldSelf", "message": f"{what} cannot change"}]}


# ---- PrivateDataset ------------------------------------------------------------------------------------


class SourceFormat(StrEnum):
    IDX = "idx"
    NPZ = "npz"
    FOLDER = "folder"


class SourceSpec(Wire):
    """Where the owner's records are. Paths are relative to the volume, or to the YAML file in a local run."""

    model_config = _rules(
        ("(self.format == 'idx') == has(self.labelsPath)", "labelsPath goes with format idx, alone"),
        ("self.format == 'idx' || !has(self.holdoutLabelsPath)", "holdoutLabelsPath goes with format idx, alone"),
        (
            "self.format != 'idx' || !has(self.holdoutPath) || has(self.holdoutLabelsPath)",
            "format idx needs holdoutLabelsPath beside holdoutPath",
        ),
    )

    format: SourceFormat
    path: Text
    labels_path: Text | None = Field(None, description="idx only: the file of labels")
    holdout_path: Text | None = Field(
        None, description="records kept out of training, for evaluation; without them quality is not measured"
    )
    holdout_labels_path: Text | None = Field(None, description="idx only: the labels of the hold-out records")
    volume_claim: Name | None = None

    @model_validator(mode="after")
    def _labels_belong_to_idx(self) -> "SourceSpec":
        idx = self.format is SourceFormat.IDX
        if idx and self.labels_path is None:
            raise ValueError("labelsPath: format idx keeps labels in a file of their own, none was named; add it")
        if idx and self.holdout_path is not None and self.holdout_labels_path is None:
            raise ValueError("holdoutLabelsPath: format idx needs the hold-out's labels file, none was named; add it")
        if not idx and (self.labels_path is not None or self.holdout_labels_path is not None):
            raise ValueError(f"labelsPath: only format idx has one, found format {self.format.value}; remove it")
        return self


class ImageSpec(Wire):
    """Shape of every image, a public fact."""

    channels: Annotated[int, Field(ge=1, le=4)]
    height: Annotated[int, Field(ge=4, le=512)]
    width: Annotated[int, Field(ge=4, le=512)]

    @property
    def dimensions(self) -> int:
        return self.channels * self.height * self.width


class ClassesSpec(Wire):
    """Public facts about the classes. The number of records per class is part of every noisy average, so it
    is declared, published, and checked against the records before anything is released."""

    model_config = _rules(
        ("size(self.records) == self.count", "records needs one number for each class"),
        ("size(self.names) == 0 || size(self.names) == self.count", "names needs one name for each class"),
        ("self.records.sum() >= 2", "records needs at least 2 records in all"),
    )

    count: Annotated[int, Field(ge=1, le=1000)]
    records: Annotated[tuple[Annotated[int, Field(ge=0, le=10**8)], ...], Field(min_length=1, max_length=1000)]
    names: Annotated[tuple[Annotated[str, Field(min_length=1, max_length=63)], ...], Field(max_length=1000)] = ()

    @model_validator(mode="after")
    def _one_entry_per_class(self) -> "ClassesSpec":
        if len(self.records) != self.count:
            raise ValueError(
                f"records: expected one number for each of {self.count} classes, found {len(self.records)}"
            )
        if self.names and len(self.names) != self.count:
            raise ValueError(f"names: expected one for each of {self.count} classes, found {len(self.names)}")
        if sum(self.records) < 2:
            raise ValueError(f"records: expected at least 2 records in all, found {sum(self.records)}")
        return self


class BudgetSpec(Wire):
    """What the owner is ready to spend, ever. epsilon may be raised, never lowered; the rest never changes."""

    model_config = _rules(
        ("double(self.epsilon) >= double(oldSelf.epsilon)", "epsilon may be raised, never lowered"),
        ("self.delta == oldSelf.delta && self.unit == oldSelf.unit", "delta and unit cannot change"),
        ("self.pureEpsilon == oldSelf.pureEpsilon", "pureEpsilon cannot change"),
        ("double(self.pureEpsilon) <= double(self.epsilon)", "pureEpsilon can be at most epsilon"),
    )

    epsilon: Positive
    delta: Delta
    unit: Literal["image"] = "image"
    pure_epsilon: NonNegative = Decimal(0)

    @model_validator(mode="after")
    def _pure_part_fits(self) -> "BudgetSpec":
        if self.pure_epsilon > self.epsilon:
            raise ValueError(f"pureEpsilon: expected at most epsilon = {self.epsilon}, found {self.pure_epsilon}")
        return self


class AccessRule(Wire):
    """Jobs of this namespace may use the dataset, each for at most this epsilon."""

    namespace: Name
    max_epsilon: Positive | None = None


class PrivateDatasetSpec(Wire):
    source: SourceSpec
    image: ImageSpec
    classes: ClassesSpec
    budget: BudgetSpec
    access: Annotated[tuple[AccessRule, ...], Field(max_length=64)] = ()
    images: Annotated[tuple[Text, ...], Field(max_length=64)] = ()
    store: StoreReference | None = None
    federation: StoreReference | None = None
    pod_template: Overlay


class PrivateDataset(Wire):
    api_version: Literal["feddiff.dev/v1alpha1"] = API_VERSION
    kind: Literal["PrivateDataset"] = "PrivateDataset"
    metadata: Metadata
    spec: PrivateDatasetSpec
    status: dict[str, Any] | None = None


# ---- PrivacyRelease ------------------------------------------------------------------------------------


class ReleasedDataset(Wire):
    name: Name
    uid: Annotated[str, Field(max_length=64)]


class ReleasingJob(Wire):
    namespace: Name
    name: Name
    uid: Annotated[str, Field(max_length=64)]


class ChargeSpec(Wire):
    """What a release costs: μ² for Gaussian noise, pure ε for the mechanisms that promise it."""

    mu_squared: NonNegative = Decimal(0)
    pure_epsilon: NonNegative = Decimal(0)


class PrivacyReleaseSpec(Wire):
    """One entry of the ledger; written by the operator alone, never changed, never collected."""

    model_config = _rules(("self == oldSelf", "an entry of the ledger cannot change"))

    dataset: ReleasedDataset
    job: ReleasingJob
    client: Name
    mechanism: Annotated[str, Field(max_length=63)]
    unit: Literal["image"]
    epsilon: Positive
    delta: Delta
    charge: ChargeSpec
    reserved_at: Annotated[str, Field(max_length=40)]


class PrivacyRelease(Wire):
    api_version: Literal["feddiff.dev/v1alpha1"] = API_VERSION
    kind: Literal["PrivacyRelease"] = "PrivacyRelease"
    metadata: Metadata
    spec: PrivacyReleaseSpec
    status: dict[str, Any] | None = None


# ---- FederatedDiffusionJob -----------------------------------------------------------------------------


class DatasetReference(Wire):
    namespace: Name = "default"
    name: Name


class ClientSpec(Wire):
    name: Name
    dataset: DatasetReference


class Mechanism(StrEnum):
    GAUSSIAN = "gaussian"
    SUMMARY = "summary"


class Pixels(StrEnum):
    """The units in which an image is clipped: coordinates ≥ 0 make the sensitivity √2 smaller."""

    ZERO_TO_ONE = "zeroToOne"
    MINUS_ONE_TO_ONE = "minusOneToOne"


_SUMMARY_FIELDS = ("moment_clip_norm", "mean_share", "centre", "variance_guess")


class PrivacySpec(Wire):
    """One promise: (epsilon, delta) per unit, by a mechanism that has to be named. Clip norms, centre and
    variance guess are constants chosen without looking at the data."""

    model_config = _rules(
        ("(self.mechanism == 'summary') == has(self.momentClipNorm)", "momentClipNorm goes with mechanism summary"),
        ("self.mechanism == 'gaussian' || !has(self.pixels)", "pixels goes with mechanism gaussian"),
        (
            "self.mechanism == 'summary' || !(has(self.meanShare) || has(self.centre) || has(self.varianceGuess))",
            "meanShare, centre and varianceGuess go with mechanism summary",
        ),
    )

    mechanism: Mechanism
    epsilon: Positive
    delta: Delta
    unit: Literal["image"] = "image"
    clip_norm: Positive = Field(description="largest Euclidean norm of an image; longer ones are scaled down")
    pixels: Pixels | None = Field(None, description="gaussian: units of the clip, zeroToOne unless said otherwise")
    moment_clip_norm: Positive | None = Field(None, description="summary: largest norm of an image minus the centre")
    mean_share: Share | None = Field(None, description="summary: share of μ² that the mean gets; 0.5 unless said")
    centre: PixelValue | None = Field(
        None, description="summary: pixel value that stands for the mean of a class of fewer than 20 records; 0.5"
    )
    variance_guess: Positive | None = Field(
        None, description="summary: public guess of a pixel's variance in [0, 1] units, weighs owners; 0.05"
    )

    @model_validator(mode="after")
    def _fields_belong_to_the_mechanism(self) -> "PrivacySpec":
        if self.mechanism is Mechanism.SUMMARY:
            if self.moment_clip_norm is None:
                raise ValueError("momentClipNorm: mechanism summary needs it, none was given; add a public constant")
            if self.pixels is not None:
                raise ValueError("pixels: belongs to mechanism gaussian, found mechanism summary; remove it")
        else:
            for name in _SUMMARY_FIELDS:
                if getattr(self, name) is not None:
                    raise ValueError(f"{to_camel(name)}: belongs to mechanism summary, found gaussian; remove it")
        return self

    @property
    def clips_non_negative_pixels(self) -> bool:
        return self.pixels is not Pixels.MINUS_ONE_TO_ONE

    @property
    def mean_share_or_default(self) -> Decimal:
        return self.mean_share if self.mean_share is not None else Decimal("0.5")

    @property
    def centre_or_default(self) -> Decimal:
        return self.centre if self.centre is not None else Decimal("0.5")

    @property
    def variance_guess_or_default(self) -> Decimal:
        return self.variance_guess if self.variance_guess is not None else Decimal("0.05")


class Timeline(StrEnum):
    """How the shared denoiser of noised images treats time: the paper restarts, ours continues (docs/method.md)."""

    RESTARTED = "restarted"
    CONTINUED = "continued"


class DiffusionSpec(Wire):
    """The forward process: variances rise in a line from betaStart to betaEnd over `steps` steps."""

    model_config = _rules(("double(self.betaEnd) >= double(self.betaStart)", "betaEnd must be at least betaStart"))

    steps: Annotated[int, Field(ge=10, le=10_000)] = 1000
    beta_start: Share = Decimal("1e-4")
    beta_end: Share = Decimal("0.02")
    split_sigma: Positive | None = Field(
        None,
        description="summary: noise-to-signal at which the shared denoiser hands over; elsewhere it follows from ε",
    )
    timeline: Timeline | None = Field(None, description="gaussian: continued unless said otherwise")

    @model_validator(mode="after")
    def _betas_rise(self) -> "DiffusionSpec":
        if self.beta_end < self.beta_start:
            raise ValueError(f"betaEnd: expected at least betaStart = {self.beta_start}, found {self.beta_end}")
        return self


class NetworkSpec(Wire):
    """The U-Net that shared and personal denoisers have in common."""

    base_width: Annotated[int, Field(ge=8, le=512)] = 32
    num_blocks: Annotated[int, Field(ge=1, le=8)] = 1
    attention: bool = False


TrainingImages = Annotated[int, Field(ge=1, le=10**12)]
Batch = Annotated[int, Field(ge=2, le=65_536)]


class SharedSpec(Wire):
    """Training of the shared denoiser: length in images seen, `replicas × processesPerReplica` ranks."""

    model_config = _rules(
        (
            "self.batch % (self.replicas * self.processesPerReplica) == 0",
            "batch must be a multiple of replicas × processesPerReplica",
        )
    )

    denoiser: Literal["trained", "closedForm"] = Field(
        "trained", description="closedForm: the pooled Gaussian's own denoiser, summary only, needs no training"
    )
    images: TrainingImages = 2_000_000
    batch: Batch = 256
    learning_rate: Positive = Decimal("2e-3")
    replicas: Annotated[int, Field(ge=1, le=1024)] = 2
    processes_per_replica: Annotated[int, Field(ge=1, le=64)] = 1
    own_covariance_weight: Share = Field(
        Decimal("0.5"), description="summary: weight of a class's own covariance against the classes' mean one"
    )
    resources: Overlay
    pod_template: Overlay

    @property
    def world_size(self) -> int:
        return self.replicas * self.processes_per_replica

    @model_validator(mode="after")
    def _batch_divides(self) -> "SharedSpec":
        if self.batch % self.world_size:
            raise ValueError(
                f"batch: expected a multiple of replicas × processesPerReplica = {self.world_size}, found {self.batch}"
            )
        return self


class PersonalSpec(Wire):
    """Training of each owner's personal denoiser, on its own records and, above the split, on what was released."""

    images: TrainingImages = 1_000_000
    batch: Batch = 256
    learning_rate: Positive = Decimal("2e-3")
    release_share: ShareOrNothing = Field(
        Decimal("0.333"), description="share of each batch that comes from the releases instead of own records"
    )
    release_sigma: Positive | None = Field(
        None, description="summary: lowest noise-to-signal at which draws are trained on; splitSigma unless said"
    )
    clip_mix: bool = Field(False, description="also train on clipped images, told apart by a flag (CVPR 2026)")


class SamplingSpec(Wire):
    """How images are drawn once the denoisers are trained."""

    images_per_class: Annotated[int, Field(ge=1, le=100_000)] = 100
    steps: Annotated[int, Field(ge=2, le=10_000)] = 20
    sampler: Literal["heun", "ddpm"] = "heun"


Seconds = Annotated[int, Field(ge=1, le=10**9)]


class StageDeadlinesSpec(Wire):
    """How long one attempt of a stage may wait, and how long it may run."""

    start_seconds: Seconds | None = Field(
        None, description="from when its pods may start until all of them run; time in a queue does not count"
    )
    stage_seconds: Seconds | None = Field(None, description="from when its pods run until they end")


class DeadlinesSpec(StageDeadlinesSpec):
    """Seconds; an attempt that waits or runs longer has failed. What stands here holds for every stage, unless the
    stage's own field says otherwise. Nothing is set, nothing ends."""

    release_seconds: Seconds | None = Field(
        None, description="from the first release's start until the quorum is decided"
    )
    release: StageDeadlinesSpec | None = None
    train_shared: StageDeadlinesSpec | None = None
    train_personal: StageDeadlinesSpec | None = None
    sample: StageDeadlinesSpec | None = None
    evaluate: StageDeadlinesSpec | None = None
    report: StageDeadlinesSpec | None = None

    def of(self, stage: str) -> StageDeadlinesSpec:
        """What holds for `stage`, named as in a receipt ("train-shared")."""
        own = getattr(self, stage.replace("-", "_")) or StageDeadlinesSpec()
        return StageDeadlinesSpec(
            start_seconds=self.start_seconds if own.start_seconds is None else own.start_seconds,
            stage_seconds=self.stage_seconds if own.stage_seconds is None else own.stage_seconds,
        )


class FederatedDiffusionJobSpec(Wire):
    model_config = _rules(
        ("!has(self.quorum) || self.quorum <= size(self.clients)", "quorum can be at most the number of clients"),
        (
            "(self.privacy.mechanism == 'summary') == has(self.diffusion.splitSigma)",
            "diffusion.splitSigma goes with mechanism summary; with gaussian the split follows from epsilon",
        ),
        (
            "self.privacy.mechanism == 'gaussian' || !has(self.diffusion.timeline)",
            "diffusion.timeline goes with mechanism gaussian",
        ),
        (
            "self.privacy.mechanism == 'summary' || !has(self.personal.releaseSigma)",
            "personal.releaseSigma goes with mechanism summary",
        ),
        (
            "self.privacy.mechanism == 'summary' || self.shared.denoiser != 'closedForm'",
            "shared.denoiser closedForm goes with mechanism summary",
        ),
        (
            "self.suspend || oldSelf.suspend || (has(self.shared) && has(self.shared.resources)"
            " ? has(oldSelf.shared) && has(oldSelf.shared.resources)"
            " && self.shared.resources == oldSelf.shared.resources"
            " : !has(oldSelf.shared) || !has(oldSelf.shared.resources))",
            "shared.resources can change only while suspend is true",
        ),
        ("has(self.store) == has(oldSelf.store)", "store cannot change"),
        ("has(self.managedBy) == has(oldSelf.managedBy)", "managedBy cannot change"),
    )

    clients: Annotated[
        tuple[ClientSpec, ...], Field(min_length=1, max_length=1000, json_schema_extra=_fixed("clients"))
    ]
    quorum: Annotated[int, Field(ge=1, le=1000)] | None = None
    privacy: PrivacySpec = Field(json_schema_extra=_fixed("privacy"))
    diffusion: DiffusionSpec = Field(DiffusionSpec(), json_schema_extra=_fixed("diffusion"))
    network: NetworkSpec = NetworkSpec()
    shared: SharedSpec = Field(default_factory=lambda: SharedSpec.model_validate({}))
    personal: PersonalSpec = PersonalSpec()
    sampling: SamplingSpec = SamplingSpec()
    store: StoreReference | None = Field(None, json_schema_extra=_fixed("store"))
    suspend: bool = False
    managed_by: Annotated[str, Field(max_length=63)] | None = Field(None, json_schema_extra=_fixed("managedBy"))
    queue_name: Name | None = None
    priority_class_name: Name | None = None
    deadlines: DeadlinesSpec = DeadlinesSpec()
    backoff_limit: Annotated[int, Field(ge=0, le=100)] = 3
    ttl_seconds_after_finished: Annotated[int, Field(ge=0)] | None = None
    clean_pod_policy: Literal["None", "Running", "All"] = "Running"

    @property
    def quorum_or_all(self) -> int:
        return self.quorum if self.quorum is not None else len(self.clients)

    @model_validator(mode="after")
    def _clients_are_distinct(self) -> "FederatedDiffusionJobSpec":
        names = [client.name for client in self.clients]
        if duplicates := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"clients: expected distinct names, found {', '.join(duplicates)} twice; rename one")
        datasets = [client.dataset for client in self.clients]
        if len(set(datasets)) < len(datasets):
            raise ValueError("clients: expected each dataset once, found one twice; one client per dataset")
        if self.quorum is not None and self.quorum > len(names):
            raise ValueError(f"quorum: expected at most the number of clients, {len(names)}, found {self.quorum}")
        return self

    @model_validator(mode="after")
    def _split_and_timeline_belong_to_the_mechanism(self) -> "FederatedDiffusionJobSpec":
        if self.privacy.mechanism is Mechanism.SUMMARY:
            if self.diffusion.split_sigma is None:
                raise ValueError('diffusion.splitSigma: mechanism summary needs it, none was given; "0.25" is a start')
            if self.diffusion.timeline is not None:
                raise ValueError("diffusion.timeline: belongs to mechanism gaussian, found summary; remove it")
        else:
            if self.diffusion.split_sigma is not None:
                raise ValueError(
                    "diffusion.splitSigma: with mechanism gaussian the split follows from epsilon, delta and clipNorm,"
                    f" found {self.diffusion.split_sigma}; remove it"
                )
            if self.personal.release_sigma is not None:
                raise ValueError("personal.releaseSigma: belongs to mechanism summary, found gaussian; remove it")
            if self.shared.denoiser == "closedForm":
                raise ValueError("shared.denoiser: closedForm needs mechanism summary, found gaussian; use trained")
        return self

    @property
    def timeline(self) -> Timeline:
        return self.diffusion.timeline or Timeline.CONTINUED


class FederatedDiffusionJob(Wire):
    api_version: Literal["feddiff.dev/v1alpha1"] = API_VERSION
    kind: Literal["FederatedDiffusionJob"] = "FederatedDiffusionJob"
    metadata: Metadata
    spec: FederatedDiffusionJobSpec
    status: dict[str, Any] | None = None


# ---- Reading documents ---------------------------------------------------------------------------------

Document = PrivateDataset | FederatedDiffusionJob
_KINDS: Mapping[str, type[PrivateDataset] | type[FederatedDiffusionJob]] = {
    "PrivateDataset": PrivateDataset,
    "FederatedDiffusionJob": FederatedDiffusionJob,
}


def parse_document(document: object, where: str) -> Document:
    """The typed form of one YAML document. Raises SpecInvalid with every fault, each with its path."""
    if not isinstance(document, Mapping):
        raise SpecInvalid(f"{where}: expected a mapping with apiVersion and kind, found {type(document).__name__}")
    kind = document.get("kind")
    if document.get("apiVersion") != API_VERSION or not isinstance(kind, str) or kind not in _KINDS:
        found = f"{document.get('apiVersion')!r}, {kind!r}"
        raise SpecInvalid(f"{where}: expected apiVersion {API_VERSION} and kind {' or '.join(_KINDS)}, found {found}")
    return parse(_KINDS[kind], document, f"{where}: {kind}")


def parse(model: type[T], value: object, where: str) -> T:
    """`value` as a `model`. Raises SpecInvalid naming path, expectation and finding of every fault."""
    try:
        return model.model_validate(value)
    except ValidationError as error:
        raise SpecInvalid("\n".join(f"{where}: {line}" for line in _fault_lines(error))) from None


def _fault_lines(error: ValidationError) -> list[str]:
    return [_fault_line(fault["loc"], fault["type"], fault["msg"], fault["input"]) for fault in error.errors()]


def _fault_line(location: Sequence[int | str], fault: str, message: str, found: object) -> str:
    path = ".".join(to_camel(part) if isinstance(part, str) else str(part) for part in location)
    if fault == "missing":
        return f"{path}: expected a value, found none; add it"
    if fault == "extra_forbidden":
        return f"{path}: unknown field; check its spelling and place"
    message = message.removeprefix("Value error, ")
    if fault == "value_error":
        return f"{path}: {message}" if path else message
    return f"{path}: {message[:1].lower()}{message[1:]}, found {_shortened(found)}"


def _shortened(value: object) -> str:
    text = str(value) if isinstance(value, Decimal) else repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
