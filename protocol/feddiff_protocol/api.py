"""The three kinds of feddiff.dev/v1alpha1 as types: what a YAML document may say, and every default.

The same document goes to `kubectl apply` and to `feddiff run`. Numbers that carry a promise are decimal
strings, so that no value changes on its way through JSON; every list and string is bounded.
"""

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from decimal import Decimal
from enum import StrEnum
from typing import Annotated, Any, Final, Literal, TypeVar

from pydantic import (
    AfterValidator,
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
from .privunit import LARGEST_EPSILON, SMALLEST_EPSILON

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

    @model_validator(mode="before")
    @classmethod
    def _null_is_left_out(cls, value: object) -> object:
        """As the API server reads JSON: a field that is null has its default, or is missing."""
        if not isinstance(value, Mapping) or None not in value.values():
            return value
        known = {name for field, info in cls.model_fields.items() for name in (field, info.alias)}
        return {name: part for name, part in value.items() if part is not None or name not in known}

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


def _whole_number(value: object) -> object:
    """As the API server reads JSON: 5 and 5.0 are whole numbers; "5", 5.5 and true are none."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"expected a whole number, found {_shortened(value)}")
    return value


def _true_or_false(value: object) -> object:
    if not isinstance(value, bool):
        raise ValueError(f"expected true or false, found {_shortened(value)}")
    return value


def _as_json(value: dict[str, Any]) -> dict[str, Any]:
    """YAML can say more than JSON, in which documents reach stages and API server: dates, infinity, numbers as keys."""
    try:
        same = json.loads(json.dumps(value, allow_nan=False)) == value
    except (TypeError, ValueError):
        same = False
    if not same:
        raise ValueError(f"expected what JSON can hold, found {_shortened(value)}; quote keys and dates")
    return value


WHOLE = BeforeValidator(_whole_number)  # after the bounds, which a schema would lose behind it
Flag = Annotated[bool, BeforeValidator(_true_or_false)]
Quantity = Annotated[
    Decimal, BeforeValidator(_decimal_from_text), PlainSerializer(_decimal_to_text, return_type=str), _decimal_schema()
]
Positive = Annotated[Quantity, Field(gt=0), _decimal_schema("> 0.0")]
NonNegative = Annotated[Quantity, Field(ge=0), _decimal_schema(">= 0.0")]
Share = Annotated[Quantity, Field(gt=0, lt=1), _decimal_schema("> 0.0", "< 1.0")]
Delta = Share
ShareOrNothing = Annotated[Quantity, Field(ge=0, lt=1), _decimal_schema(">= 0.0", "< 1.0")]
ZeroToOne = Annotated[Quantity, Field(ge=0, le=1), _decimal_schema(">= 0.0", "<= 1.0")]
Name = Annotated[str, Field(pattern=NAME_PATTERN, max_length=63)]
Text = Annotated[str, Field(min_length=1, max_length=1024)]
Overlay = Annotated[dict[str, Any], AfterValidator(_as_json), Field(default_factory=dict)]


class Metadata(Wire):
    """The part of Kubernetes' metadata that feddiff reads; the rest passes through untouched."""

    model_config = ConfigDict(extra="ignore", frozen=True, alias_generator=to_camel, validate_by_name=True)

    name: Name
    namespace: Name = "default"
    uid: Annotated[str, Field(max_length=64)] = ""


class StoreReference(Wire):
    """Where objects live: s3://bucket/prefix, or file:///folder; credentials come from the named Secret."""

    uri: Annotated[str, Field(pattern=r"^(s3|file)://.+$", max_length=512)] = Field(
        description="s3://bucket/prefix, or file:///folder on a volume that every pod concerned mounts"
    )
    secret_name: Name | None = Field(
        None,
        description="Secret in the namespace of the pods, with AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and, for a"
        " store that is not Amazon's, AWS_ENDPOINT_URL; the operator never reads it",
    )


def _rules(*rules: tuple[str, str]) -> ConfigDict:
    """Rules the API server checks itself (CEL), beside the validator that says the same to a local run."""
    validations: list[Any] = [{"rule": rule, "message": message} for rule, message in rules]
    return ConfigDict(json_schema_extra={"x-kubernetes-validations": validations})


def _fixed(what: str) -> dict[str, Any]:
    return {"x-kubernetes-validations": [{"rule": "self == oldSelf", "message": f"{what} cannot change"}]}


def _fixed_list_of_names(what: str) -> dict[str, Any]:
    """Entries with distinct names, as the API server itself sees to; it compares such lists whatever their order."""
    order = {"rule": "self.map(each, each.name) == oldSelf.map(each, each.name)", "message": f"{what} cannot change"}
    fixed = _fixed(what)["x-kubernetes-validations"]
    return {
        "x-kubernetes-list-type": "map",
        "x-kubernetes-list-map-keys": ["name"],
        "x-kubernetes-validations": [*fixed, order],
    }


# ---- PrivateDataset ------------------------------------------------------------------------------------


class SourceFormat(StrEnum):
    IDX = "idx"
    NPZ = "npz"
    FOLDER = "folder"
    PARQUET = "parquet"


class SourceSpec(Wire):
    """Where the owner's records are. Paths are relative to the volume, or to the YAML file in a local run."""

    model_config = _rules(
        ("self.format != 'idx' || has(self.labelsPath)", "format idx needs labelsPath"),
        (
            "self.format in ['idx', 'folder'] || !(has(self.labelsPath) || has(self.holdoutLabelsPath))",
            "labelsPath and holdoutLabelsPath go with format idx or folder",
        ),
        (
            "!has(self.holdoutPath) || has(self.holdoutLabelsPath) == has(self.labelsPath)",
            "holdoutLabelsPath goes with holdoutPath where labelsPath goes with path",
        ),
        ("!has(self.inceptionPath) || has(self.holdoutPath)", "inceptionPath goes with holdoutPath"),
        ("!has(self.inceptionSha256) || has(self.inceptionPath)", "inceptionSha256 goes with inceptionPath"),
    )

    format: SourceFormat = Field(
        description="idx: MNIST's files of images and labels; npz: one file of numpy with the arrays images and labels;"
        " folder: PNG and JPEG files, in one folder for each class or with a table of labels; parquet: a file, or a"
        " folder of files, with the columns image (PNG or JPEG) and label, which needs feddiff[parquet]"
    )
    path: Text = Field(
        description="the images: a file, or with format folder or parquet the folder that holds all of them"
    )
    labels_path: Text | None = Field(
        None,
        description="idx: the file of labels, needed there; folder: a CSV file with the columns file (relative to path)"
        " and label (a name in classes.names, or without names the class's index), in place of one folder per class",
    )
    holdout_path: Text | None = Field(
        None,
        description="records kept out of training and out of every release, for evaluation; in the same format as path;"
        " without them quality is not measured",
    )
    holdout_labels_path: Text | None = Field(
        None, description="the labels of the records at holdoutPath, where those at path have labelsPath"
    )
    inception_path: Text | None = Field(
        None,
        description="the Inception network as TorchScript, for FID and KID against the records at holdoutPath; it is a"
        " program, which the evaluation runs beside the records. Nothing is downloaded; without it neither is measured",
    )
    inception_sha256: Annotated[str, Field(max_length=64, pattern=r"^[0-9a-f]{64}$")] | None = Field(
        None, description="SHA-256 of the file at inceptionPath; another file is not run. Not verified unless given"
    )
    volume_claim: Name | None = Field(
        None,
        description="PersistentVolumeClaim in the dataset's namespace that holds the records, mounted read-only; a"
        " local run ignores it",
    )

    @model_validator(mode="after")
    def _labels_belong_to_the_format(self) -> "SourceSpec":
        labels, holdout_labels = self.labels_path is not None, self.holdout_labels_path is not None
        if self.format is SourceFormat.IDX and not labels:
            raise ValueError("labelsPath: format idx keeps labels in a file of their own, none was named; add it")
        if self.format not in (SourceFormat.IDX, SourceFormat.FOLDER) and (labels or holdout_labels):
            raise ValueError(
                f"labelsPath: belongs to format idx or folder, found format {self.format.value}; remove it"
            )
        if self.holdout_path is not None and labels != holdout_labels:
            found = "a file of labels for path alone" if labels else "one for holdoutPath alone"
            raise ValueError(f"holdoutLabelsPath: expected labels for both or neither, found {found}; correct it")
        return self

    @model_validator(mode="after")
    def _inception_has_what_it_needs(self) -> "SourceSpec":
        if self.inception_path is not None and self.holdout_path is None:
            raise ValueError("inceptionPath: FID compares with the records at holdoutPath, none were named; add them")
        if self.inception_sha256 is not None and self.inception_path is None:
            raise ValueError("inceptionSha256: belongs to inceptionPath, none was named; remove it")
        return self


class ImageSpec(Wire):
    """Shape of every image, a public fact. Records of another shape are refused; all clients of a job share it."""

    channels: Annotated[int, Field(ge=1, le=4), WHOLE] = Field(description="values per pixel: 1 is grey, 3 is colour")
    height: Annotated[int, Field(ge=4, le=512), WHOLE] = Field(description="rows of pixels")
    width: Annotated[int, Field(ge=4, le=512), WHOLE] = Field(description="pixels in a row")

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

    count: Annotated[int, Field(ge=1, le=1000), WHOLE] = Field(
        description="how many classes; labels are 0 to count - 1"
    )
    records: Annotated[
        tuple[Annotated[int, Field(ge=0, le=10**8), WHOLE], ...], Field(min_length=1, max_length=1000)
    ] = Field(description="records of each class at path, in the order of the labels; at least 2 in all")
    names: Annotated[tuple[Annotated[str, Field(min_length=1, max_length=63)], ...], Field(max_length=1000)] = Field(
        (),
        json_schema_extra={"x-kubernetes-list-type": "set"},
        description="names of the classes, in the order of the labels; with format folder the folders' names,"
        " which are taken in sorted order unless given",
    )

    @model_validator(mode="after")
    def _one_entry_per_class(self) -> "ClassesSpec":
        if len(self.records) != self.count:
            raise ValueError(
                f"records: expected one number for each of {self.count} classes, found {len(self.records)}"
            )
        if self.names and len(self.names) != self.count:
            raise ValueError(f"names: expected one for each of {self.count} classes, found {len(self.names)}")
        if twice := next((name for name, count in Counter(self.names).items() if count > 1), None):
            raise ValueError(f"names: expected a name of its own for each class, found {twice!r} twice")
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

    epsilon: Positive = Field(
        description="ε that all releases of these records may add up to, per unit at this delta; may be raised, never"
        " lowered"
    )
    delta: Delta = Field(description="δ at which epsilon is stated, the same for all releases together; cannot change")
    unit: Literal["image"] = Field(
        "image", description="what is protected: replacing one image by any other of its class; cannot change"
    )
    pure_epsilon: NonNegative = Field(
        Decimal(0),
        description="part of epsilon set aside for mechanisms that promise pure ε (δ = 0); cannot change",
    )

    @model_validator(mode="after")
    def _pure_part_fits(self) -> "BudgetSpec":
        if self.pure_epsilon > self.epsilon:
            raise ValueError(f"pureEpsilon: expected at most epsilon = {self.epsilon}, found {self.pure_epsilon}")
        return self


class AccessRule(Wire):
    """Jobs of this namespace may use the dataset, each for at most this epsilon."""

    namespace: Name = Field(description="whose jobs are let in; in a local run, the namespace in the job's metadata")
    max_epsilon: Positive | None = Field(
        None, description="largest ε that one job may ask for; without it, whatever the budget still holds"
    )


class PrivateDatasetSpec(Wire):
    """What a data owner declares: records that stay, public facts about them, a budget, and who may ask."""

    source: SourceSpec
    image: ImageSpec
    classes: ClassesSpec
    budget: BudgetSpec
    access: Annotated[tuple[AccessRule, ...], Field(max_length=64)] = Field(
        (), description="whose jobs may use the dataset; nobody's unless listed. Charges stay when a rule is taken away"
    )
    images: Annotated[tuple[Text, ...], Field(max_length=64)] = Field(
        (), description="trainer images that may see the records, as the installation names them; any unless listed"
    )
    store: StoreReference | None = Field(
        None,
        description="the owner's own: sealed releases, personal denoiser, samples, owner report. Needed on a cluster; a"
        " local run uses a folder beside the records",
    )
    federation: StoreReference | None = Field(
        None,
        description="the only store to which records are released, which a job has to name as its spec.store.uri,"
        " and how this owner's pods reach it: with a Secret that may write this owner's prefix and read the rest. A"
        " local run uses a folder of the run",
    )
    pod_template: Annotated[
        Overlay,
        Field(
            description="laid over this owner's pods: labels, annotations, service account, volumes, node selector,"
            " tolerations, resources and the like. Another field ends the job with InvalidPodTemplate"
        ),
    ]


class PrivateDataset(Wire):
    """A data owner's records as a job sees them: what they are, who may use them, and the privacy budget that every
    release of them is charged to. The records, the personal denoiser and the samples stay with the owner."""

    api_version: Literal["feddiff.dev/v1alpha1"] = API_VERSION
    kind: Literal["PrivateDataset"] = "PrivateDataset"
    metadata: Metadata
    spec: PrivateDatasetSpec
    status: dict[str, Any] | None = None


# ---- PrivacyRelease ------------------------------------------------------------------------------------


class ReleasedDataset(Wire):
    """The dataset that is charged: the PrivateDataset of this name in the entry's namespace."""

    name: Name = Field(description="a dataset made again under this name adopts the entry")
    uid: Annotated[str, Field(max_length=64)] = Field(description="metadata.uid that the dataset had when it reserved")


class ReleasingJob(Wire):
    """The FederatedDiffusionJob that the release is for; it may be gone, the entry stays."""

    namespace: Name = Field(description="the researcher's namespace")
    name: Name = Field(description="metadata.name of the job; a later job may have it too, so uid tells them apart")
    uid: Annotated[str, Field(max_length=64)] = Field(description="metadata.uid of the job")


class ChargeSpec(Wire):
    """What a release costs: μ² for Gaussian noise, pure ε for the mechanisms that promise it."""

    mu_squared: NonNegative = Field(
        Decimal(0), description="μ² of Gaussian noise, rounded up; these add up over releases, ε does not"
    )
    pure_epsilon: NonNegative = Field(Decimal(0), description="pure ε; adds up over releases")


class PrivacyReleaseSpec(Wire):
    """One entry of the ledger; written by the operator alone, never changed, never collected."""

    model_config = _rules(("self == oldSelf", "an entry of the ledger cannot change"))

    dataset: ReleasedDataset
    job: ReleasingJob
    client: Name = Field(description="the dataset's name within the job, from spec.clients")
    mechanism: Annotated[str, Field(max_length=63)] = Field(description="how the release is noised, as the job says")
    unit: Literal["image"] = Field(description="what is protected, as the budget says")
    epsilon: Positive = Field(description="ε of this release alone, at delta")
    delta: ShareOrNothing = Field(description="δ of this release alone; 0 where it promises pure ε")
    charge: ChargeSpec
    reserved_at: Annotated[str, Field(max_length=40)] = Field(
        description="when the budget was reserved: RFC 3339, in UTC"
    )


class PrivacyRelease(Wire):
    """One entry of a data owner's ledger: what one job's release of one dataset costs. Written by the operator alone;
    deleting one does not give budget back, it makes the ledger contradict itself."""

    api_version: Literal["feddiff.dev/v1alpha1"] = API_VERSION
    kind: Literal["PrivacyRelease"] = "PrivacyRelease"
    metadata: Metadata
    spec: PrivacyReleaseSpec
    status: dict[str, Any] | None = None


# ---- FederatedDiffusionJob -----------------------------------------------------------------------------


class DatasetReference(Wire):
    """A PrivateDataset, wherever it is; its owner decides whose jobs may use it."""

    namespace: Name = Field("default", description="the data owner's namespace")
    name: Name = Field(description="metadata.name of the PrivateDataset")


class ClientSpec(Wire):
    """One data owner's part in the job."""

    name: Name = Field(
        description="distinct within the job; it names the client in status and reports, and its prefix in the store"
    )
    dataset: DatasetReference = Field(description="the records it takes part with; each dataset once in a job")


class Mechanism(StrEnum):
    GAUSSIAN = "gaussian"
    SUMMARY = "summary"
    PRIVUNIT = "privunit"


class Pixels(StrEnum):
    """The units in which an image is clipped: coordinates ≥ 0 make the sensitivity √2 smaller."""

    ZERO_TO_ONE = "zeroToOne"
    MINUS_ONE_TO_ONE = "minusOneToOne"


_FIELDS_OF_ONE = {
    "pixels": (Mechanism.GAUSSIAN,),
    "moment_clip_norm": (Mechanism.SUMMARY,),
    "mean_share": (Mechanism.SUMMARY,),
    "centre": (Mechanism.SUMMARY,),
    "frequency_power": (Mechanism.SUMMARY,),
    "block_side": (Mechanism.SUMMARY,),
    "variance_guess": (Mechanism.SUMMARY, Mechanism.PRIVUNIT),
}


class PrivacySpec(Wire):
    """One promise: (epsilon, delta) per unit, by a mechanism that has to be named. Clip norms, centre, frequency
    power, block side and variance guess are constants chosen without looking at the data. Nothing here can change."""

    model_config = _rules(
        ("(self.mechanism == 'summary') == has(self.momentClipNorm)", "momentClipNorm goes with mechanism summary"),
        ("self.mechanism == 'gaussian' || !has(self.pixels)", "pixels goes with mechanism gaussian"),
        (
            "self.mechanism == 'summary' || !(has(self.meanShare) || has(self.centre) || has(self.frequencyPower)"
            " || has(self.blockSide))",
            "meanShare, centre, frequencyPower and blockSide go with mechanism summary",
        ),
        (
            "self.mechanism != 'gaussian' || !has(self.varianceGuess)",
            "varianceGuess goes with mechanism summary or privunit",
        ),
        (
            "self.mechanism == 'privunit' || has(self.delta) && double(self.delta) > 0.0",
            "a delta above 0 goes with mechanism gaussian or summary",
        ),
        (
            "self.mechanism != 'privunit' || !has(self.delta) || double(self.delta) == 0.0",
            "mechanism privunit goes with delta 0, or none",
        ),
        (
            "self.mechanism != 'privunit' || double(self.epsilon) >= 0.001 && double(self.epsilon) <= 100.0",
            "mechanism privunit goes with an epsilon of 0.001 to 100",
        ),
    )

    mechanism: Mechanism = Field(
        description="gaussian: every image leaves, clipped and noised once; summary: per class, a noisy mean and a"
        " noisy second moment leave; privunit: every image's direction leaves, drawn anew at a pure ε. There is no"
        " default"
    )
    epsilon: Positive = Field(description="ε that each owner's release may lose, per unit at delta; charged once")
    delta: ShareOrNothing | None = Field(
        None,
        description='δ at which epsilon is stated, above 0; privunit promises pure ε: leave it out there, or say "0"',
    )
    unit: Literal["image"] = Field(
        "image", description="what is protected: replacing one image by another of its class"
    )
    clip_norm: Positive = Field(
        description="largest Euclidean norm of an image, in [0, 1] units unless pixels says otherwise; longer ones are"
        " scaled down. privunit: the norm to which every image is scaled"
    )
    pixels: Pixels | None = Field(
        None,
        description="gaussian: units of the clip; zeroToOne, the default, makes the sensitivity √2 smaller",
    )
    moment_clip_norm: Positive | None = Field(
        None,
        description="summary, needed there: largest norm of an image minus its class's noisy mean, in [0, 1] units",
    )
    mean_share: Share | None = Field(None, description="summary: share of μ² that the mean gets; 0.5 unless said")
    centre: ZeroToOne | None = Field(
        None, description="summary: pixel value that stands for the mean of a class of fewer than 20 records; 0.5"
    )
    frequency_power: ZeroToOne | None = Field(
        None,
        description="summary: power of frequency, 0 to 1, by which fine detail counts more in an image minus its"
        " class's noisy mean, before that is clipped; the same for all records. 0 unless said",
    )
    block_side: Annotated[int, Field(ge=2, le=64), WHOLE] | None = Field(
        None,
        description="summary: the side, in pixels, of the squares whose means stand for an image, for images too large"
        " to release; a divisor of height and width. Norms, centre and variance guess are then of these means. Every"
        " pixel counts unless given",
    )
    variance_guess: Positive | None = Field(
        None, description="summary, privunit: public guess of a pixel's variance in [0, 1] units, weighs owners; 0.05"
    )

    @model_validator(mode="after")
    def _fields_belong_to_the_mechanism(self) -> "PrivacySpec":
        for name, mechanisms in _FIELDS_OF_ONE.items():
            if getattr(self, name) is not None and self.mechanism not in mechanisms:
                owners = " or ".join(mechanisms)
                raise ValueError(f"{to_camel(name)}: belongs to mechanism {owners}, found {self.mechanism}; remove it")
        if self.mechanism is Mechanism.SUMMARY and self.moment_clip_norm is None:
            raise ValueError("momentClipNorm: mechanism summary needs it, none was given; add a public constant")
        return self

    @model_validator(mode="after")
    def _delta_is_what_the_mechanism_promises(self) -> "PrivacySpec":
        if self.mechanism is not Mechanism.PRIVUNIT:
            if not self.delta:
                found = "none" if self.delta is None else self.delta
                raise ValueError(f'delta: mechanism {self.mechanism} needs one above 0, found {found}; "1e-5" is usual')
            return self
        if self.delta:
            raise ValueError(
                f'delta: mechanism privunit promises pure ε, so δ is 0, found {self.delta}; remove it, or say "0"'
            )
        if not SMALLEST_EPSILON <= float(self.epsilon) <= LARGEST_EPSILON:
            raise ValueError(
                f"epsilon: expected {SMALLEST_EPSILON:g} to {LARGEST_EPSILON:g} with mechanism privunit,"
                f" found {self.epsilon}; change it"
            )
        return self

    @property
    def delta_or_zero(self) -> Decimal:
        return self.delta if self.delta is not None else Decimal(0)

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
    def frequency_power_or_default(self) -> Decimal:
        return self.frequency_power if self.frequency_power is not None else Decimal(0)

    @property
    def block_side_or_one(self) -> int:
        return self.block_side if self.block_side is not None else 1

    @property
    def variance_guess_or_default(self) -> Decimal:
        return self.variance_guess if self.variance_guess is not None else Decimal("0.05")


class Timeline(StrEnum):
    """How the shared denoiser of noised images treats time: the paper restarts, ours continues (docs/method.md)."""

    RESTARTED = "restarted"
    CONTINUED = "continued"


class DiffusionSpec(Wire):
    """The forward process: variances rise in a line from betaStart to betaEnd over `steps` steps. Nothing here can
    change."""

    model_config = _rules(("double(self.betaEnd) >= double(self.betaStart)", "betaEnd must be at least betaStart"))

    steps: Annotated[int, Field(ge=10, le=10_000), WHOLE] = Field(1000, description="T, counted from 1")
    beta_start: Share = Field(Decimal("1e-4"), description="variance added by the first step")
    beta_end: Share = Field(Decimal("0.02"), description="variance added by the last step; at least betaStart")
    split_sigma: Positive | None = Field(
        None,
        description="summary, privunit, needed there: noise-to-signal, in [-1, 1] units, at which the shared denoiser"
        " hands over to the owner's own; with gaussian it follows from ε",
    )
    timeline: Timeline | None = Field(
        None,
        description="gaussian: how the shared denoiser treats time; continued (one schedule throughout, the default) or"
        " restarted (the paper's: noised images as if they were clean)",
    )

    @model_validator(mode="after")
    def _betas_rise(self) -> "DiffusionSpec":
        if self.beta_end < self.beta_start:
            raise ValueError(f"betaEnd: expected at least betaStart = {self.beta_start}, found {self.beta_end}")
        return self


@dataclass(frozen=True)
class NetworkSize:
    """What a preset stands for; each part under the name of the field that overrules it."""

    base_width: int
    num_blocks: int
    attention_cells: int


NETWORK_SIZES: Mapping[str, NetworkSize] = {
    "tiny": NetworkSize(base_width=32, num_blocks=1, attention_cells=0),
    "small": NetworkSize(base_width=48, num_blocks=1, attention_cells=4),
    "base": NetworkSize(base_width=64, num_blocks=2, attention_cells=8),
    "large": NetworkSize(base_width=96, num_blocks=2, attention_cells=16),
}


class NetworkSpec(Wire):
    """The U-Net that shared and personal denoisers have in common. A checkpoint of another shape cannot be continued:
    change nothing here once training has begun."""

    preset: Literal["tiny", "small", "base", "large"] = Field(
        "tiny",
        description="a size made for images of 8×8 (tiny), 28×28 (small), 32×32 (base) or 64×64 (large), see"
        " docs/networks.md; any of them takes any image, and fields given beside it overrule it",
    )
    base_width: Annotated[int, Field(ge=8, le=512), WHOLE] | None = Field(
        None,
        description="channels at the finest grid; coarser ones up to four times as many; preset's unless given",
    )
    num_blocks: Annotated[int, Field(ge=1, le=8), WHOLE] | None = Field(
        None, description="residual blocks at each grid, before the middle and after it; preset's unless given"
    )
    attention_cells: Annotated[int, Field(ge=0, le=64), WHOLE] | None = Field(
        None,
        description="self-attention at grids of at most so many cells a side, 0 for none; preset's unless given. Grids"
        " are half an image and its halves, until at most 4 cells are left",
    )

    backbone: Literal["unet", "diffusers"] = Field(
        "unet",
        description="unet: feddiff's own; diffusers: that package's UNet2DModel of the same sizes, its finest grid the"
        " whole image. It needs feddiff[diffusers] wherever denoisers are trained and used",
    )

    @property
    def size(self) -> NetworkSize:
        """The preset with every part that the job gives itself."""
        given = {part.name: getattr(self, part.name) for part in fields(NetworkSize)}
        return replace(NETWORK_SIZES[self.preset], **{name: part for name, part in given.items() if part is not None})


TrainingImages = Annotated[int, Field(ge=1, le=10**12), WHOLE]
Batch = Annotated[int, Field(ge=2, le=65_536), WHOLE]
Accumulation = Annotated[int, Field(ge=1, le=1024), WHOLE]


class ComputeSpec(Wire):
    """How both trainings compute. It changes speed and memory, and what is learned by rounding alone."""

    precision: Literal["auto", "float32", "bfloat16"] = Field(
        "auto",
        description="of the network's products in training, weights and optimizer being float32 anyway; auto: bfloat16"
        " on a GPU, else float32",
    )
    gradient_checkpointing: Flag = Field(
        False, description="compute each block's activations again for its gradient: less memory, slower"
    )
    compile: Flag = Field(
        False, description="torch.compile; costs time at each start and needs a C++ compiler or Triton in the image"
    )


class SharedSpec(Wire):
    """Training of the shared denoiser: length in images seen, `replicas × processesPerReplica` ranks."""

    model_config = _rules(
        (
            "self.batch % (self.replicas * self.processesPerReplica * self.accumulation) == 0",
            "batch must be a multiple of replicas × processesPerReplica × accumulation",
        )
    )

    denoiser: Literal["trained", "closedForm"] = Field(
        "trained",
        description="closedForm: the pooled Gaussian's own denoiser, needs no training; with summary or privunit",
    )
    images: TrainingImages = Field(
        2_000_000, description="length of the training, in images seen by all ranks together"
    )
    batch: Batch = Field(
        256, description="images in one step, over all ranks; a multiple of their number times accumulation"
    )
    accumulation: Accumulation = Field(
        1, description="parts of a rank's batch that go through the network one after the other, for less memory"
    )
    learning_rate: Positive = Field(Decimal("2e-3"), description="peak of the schedule")
    replicas: Annotated[int, Field(ge=1, le=1024), WHOLE] = Field(2, description="pods; in a local run, processes")
    processes_per_replica: Annotated[int, Field(ge=1, le=64), WHOLE] = Field(
        1, description="ranks in each pod, one per GPU where there are any"
    )
    own_covariance_weight: Share = Field(
        Decimal("0.5"),
        description="summary, privunit: weight of a class's own covariance against the classes' mean one",
    )
    resources: Annotated[
        Overlay,
        Field(
            description="requests and limits of each training pod, as in a container's resources; a limit of CPUs sets"
            " the threads, one without; can change only while suspend is true"
        ),
    ]
    pod_template: Annotated[
        Overlay,
        Field(
            description="laid over the training and report pods; the same fields as a dataset's podTemplate. Attempts"
            " started after a change have it"
        ),
    ]

    @property
    def world_size(self) -> int:
        return self.replicas * self.processes_per_replica

    @model_validator(mode="after")
    def _batch_divides(self) -> "SharedSpec":
        parts = self.world_size * self.accumulation
        if self.batch % parts:
            raise ValueError(
                f"batch: expected a multiple of replicas × processesPerReplica × accumulation = {parts}, found"
                f" {self.batch}"
            )
        return self


class PersonalSpec(Wire):
    """Training of each owner's personal denoiser, on its own records and, above the split, on what was released."""

    model_config = _rules(("self.batch % self.accumulation == 0", "batch must be a multiple of accumulation"))

    images: TrainingImages = Field(1_000_000, description="length of each owner's training, in images seen")
    batch: Batch = Field(256, description="images in one step; a multiple of accumulation")
    accumulation: Accumulation = Field(
        1, description="parts of a batch that go through the network one after the other, for less memory"
    )
    learning_rate: Positive = Field(Decimal("2e-3"), description="peak of the schedule")
    release_share: ShareOrNothing = Field(
        Decimal("0.333"),
        description="share of each batch that comes from the releases instead of own records; 0 leaves them out",
    )
    release_sigma: Positive | None = Field(
        None,
        description="summary, privunit: lowest noise-to-signal at which draws are trained on; 0.1 unless said",
    )
    clip_mix: Flag = Field(False, description="also train on clipped images, told apart by a flag (CVPR 2026)")

    @property
    def release_sigma_or_default(self) -> Decimal:
        return self.release_sigma if self.release_sigma is not None else Decimal("0.1")

    @model_validator(mode="after")
    def _batch_divides(self) -> "PersonalSpec":
        if self.batch % self.accumulation:
            raise ValueError(f"batch: expected a multiple of accumulation = {self.accumulation}, found {self.batch}")
        return self


class SamplingSpec(Wire):
    """How images are drawn once the denoisers are trained."""

    images_per_class: Annotated[int, Field(ge=1, le=100_000), WHOLE] = Field(
        100, description="how many every owner draws of each class, for its report"
    )
    steps: Annotated[int, Field(ge=2, le=10_000), WHOLE] = Field(20, description="steps from pure noise to an image")
    sampler: Literal["heun", "ddpm", "dpm"] = Field(
        "heun",
        description="heun: deterministic, second order, two calls of the network a step; dpm: DPM-Solver++(2M), the"
        " same with one call; ddpm: ancestral, draws anew at each step; on the digits, with summary, 50 steps of it"
        " beat 20 of heun and 200 of its own (docs/results.md)",
    )


Seconds = Annotated[int, Field(ge=1, le=10**9), WHOLE]


class StageDeadlinesSpec(Wire):
    """How long one attempt of a stage may wait, and how long it may run."""

    start_seconds: Seconds | None = Field(
        None,
        description="on a cluster, from when its pods may start until all of them run; time in a queue does not count",
    )
    stage_seconds: Seconds | None = Field(None, description="from when its pods run until they end")


class DeadlinesSpec(StageDeadlinesSpec):
    """Seconds; an attempt that waits or runs longer has failed. What stands here holds for every stage, unless the
    stage's own field says otherwise. Nothing is set, nothing ends."""

    reservation_seconds: Seconds | None = Field(
        None,
        description="on a cluster, from when the job begins, or goes on after suspend, until owners are left out whose"
        " dataset is missing or whose ledger or pods it may not write; without it they are waited for, whatever the"
        " quorum",
    )
    release_seconds: Seconds | None = Field(
        None, description="from the first release's start until the quorum is decided"
    )
    release: StageDeadlinesSpec | None = Field(None, description="limits of each owner's release")
    train_shared: StageDeadlinesSpec | None = Field(None, description="limits of the shared denoiser's training")
    train_personal: StageDeadlinesSpec | None = Field(None, description="limits of each owner's own training")
    sample: StageDeadlinesSpec | None = Field(None, description="limits of each owner's sampling")
    evaluate: StageDeadlinesSpec | None = Field(None, description="limits of each owner's evaluation")
    report: StageDeadlinesSpec | None = Field(None, description="limits of the job report")

    def of(self, stage: str) -> StageDeadlinesSpec:
        """What holds for `stage`, named as in a receipt ("train-shared")."""
        own = getattr(self, stage.replace("-", "_")) or StageDeadlinesSpec()
        return StageDeadlinesSpec(
            start_seconds=self.start_seconds if own.start_seconds is None else own.start_seconds,
            stage_seconds=self.stage_seconds if own.stage_seconds is None else own.stage_seconds,
        )


class FederatedDiffusionJobSpec(Wire):
    """What is trained, with whom, under which promise. Attempts of a stage that start after a change see it."""

    model_config = _rules(
        ("!has(self.quorum) || self.quorum <= size(self.clients)", "quorum can be at most the number of clients"),
        (
            "(self.privacy.mechanism != 'gaussian') == has(self.diffusion.splitSigma)",
            "diffusion.splitSigma goes with summary or privunit; with gaussian the split follows from epsilon",
        ),
        (
            "self.privacy.mechanism == 'gaussian' || !has(self.diffusion.timeline)",
            "diffusion.timeline goes with mechanism gaussian",
        ),
        (
            "self.privacy.mechanism != 'gaussian' || !has(self.personal.releaseSigma)",
            "personal.releaseSigma goes with mechanism summary or privunit",
        ),
        (
            "!has(self.privacy.blockSide) || has(self.personal.releaseSigma)",
            "privacy.blockSide goes with personal.releaseSigma",
        ),
        (
            "self.privacy.mechanism != 'gaussian' || self.shared.denoiser != 'closedForm'",
            "shared.denoiser closedForm goes with mechanism summary or privunit",
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
        tuple[ClientSpec, ...], Field(min_length=1, max_length=1000, json_schema_extra=_fixed_list_of_names("clients"))
    ] = Field(description="the data owners that take part; cannot change")
    quorum: Annotated[int, Field(ge=1, le=1000), WHOLE] | None = Field(
        None,
        description="how many clients are enough once deadlines.reservationSeconds or deadlines.releaseSeconds has"
        " passed; all of them unless given. Who has not reserved by then is not charged; who has not released stays so",
    )
    privacy: PrivacySpec = Field(json_schema_extra=_fixed("privacy"))
    diffusion: DiffusionSpec = Field(DiffusionSpec(), json_schema_extra=_fixed("diffusion"))
    network: NetworkSpec = NetworkSpec()
    compute: ComputeSpec = ComputeSpec()
    shared: SharedSpec = Field(default_factory=lambda: SharedSpec.model_validate({}))
    personal: PersonalSpec = PersonalSpec()
    sampling: SamplingSpec = SamplingSpec()
    store: StoreReference | None = Field(
        None,
        description="the federation's: releases, shared denoiser, job report. Needed on a cluster, where every owner's"
        " federation Secret has to reach it; a local run uses a folder of the run. Cannot change",
        json_schema_extra=_fixed("store"),
    )
    suspend: Flag = Field(
        False, description="true stops every stage, which saves its work first; false goes on from there"
    )
    managed_by: Annotated[str, Field(max_length=63)] | None = Field(
        None,
        description="feddiff.dev/operator or nothing: this operator carries the job out. Any other value leaves it to"
        " that controller. Cannot change",
        json_schema_extra=_fixed("managedBy"),
    )
    queue_name: Name | None = Field(
        None, description="Kueue's LocalQueue, in the job's namespace, for the shared denoiser's and the report's pods"
    )
    priority_class_name: Name | None = Field(
        None, description="PriorityClass of the job's own pods; those of owners have what owners say"
    )
    deadlines: DeadlinesSpec = DeadlinesSpec()
    backoff_limit: Annotated[int, Field(ge=0, le=100), WHOLE] = Field(
        3, description="failures of one stage, after which no further attempt follows; interruptions do not count"
    )
    ttl_seconds_after_finished: Annotated[int, Field(ge=0, le=10**9), WHOLE] | None = Field(
        None,
        description="seconds after the job has ended, when it is deleted with what is left of its stages; never unless"
        " given. Ledgers and stores stay",
    )
    clean_pod_policy: Literal["None", "Running", "All"] = Field(
        "Running",
        description="what becomes of a stage's Jobs and pods when the job ends: None, all stay; Running, those that"
        " still run are stopped; All, all are deleted",
    )

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
        mechanism = self.privacy.mechanism
        if mechanism is not Mechanism.GAUSSIAN:
            if self.diffusion.split_sigma is None:
                raise ValueError(
                    f'diffusion.splitSigma: mechanism {mechanism} needs it, none was given; "8" is a start'
                )
            if self.diffusion.timeline is not None:
                raise ValueError(f"diffusion.timeline: belongs to mechanism gaussian, found {mechanism}; remove it")
            if self.privacy.block_side is not None and self.personal.release_sigma is None:
                raise ValueError(
                    "personal.releaseSigma: privacy.blockSide needs it, none was given; draws of squares have no"
                    ' detail, and below the noise that would hide it they are no images; "1" is a start'
                )
        else:
            if self.diffusion.split_sigma is not None:
                raise ValueError(
                    "diffusion.splitSigma: with mechanism gaussian the split follows from epsilon, delta and clipNorm,"
                    f" found {self.diffusion.split_sigma}; remove it"
                )
            if self.personal.release_sigma is not None:
                raise ValueError(
                    "personal.releaseSigma: belongs to mechanism summary or privunit, found gaussian; remove it"
                )
            if self.shared.denoiser == "closedForm":
                raise ValueError(
                    "shared.denoiser: closedForm needs mechanism summary or privunit, found gaussian; use trained"
                )
        return self

    @property
    def timeline(self) -> Timeline:
        return self.diffusion.timeline or Timeline.CONTINUED


class FederatedDiffusionJob(Wire):
    """One training across data owners who keep their images: each lets out one noised release, a shared denoiser is
    trained on all of them, and every owner ends with a denoiser of its own. The same document goes to `feddiff run`."""

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
