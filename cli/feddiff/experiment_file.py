"""An experiment's file, and the runs that it asks for: every arm, for every cell of the grid, with every seed.

    job: summary.yaml                      # a file, or the FederatedDiffusionJob itself
    datasets: ["data-{seed}/owners.yaml"]  # {seed}, where it stands, makes a split for each seed
    seeds: [0, 1, 2]
    grid: {privacy.epsilon: ["1", "10"]}
    arms:
      - {name: summary}
      - {name: closed, set: {shared.denoiser: closedForm}}
      - {baseline: local}

It is no document of a cluster: no apiVersion, and no command takes it but `feddiff experiment`.
"""

import copy
import hashlib
import itertools
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, model_validator

from feddiff_protocol.api import FederatedDiffusionJob, Mechanism, Name, Text, Wire, parse
from feddiff_protocol.baselines import (
    DEFAULT_NOISE_MULTIPLICITY,
    DEFAULT_ROUNDS,
    EPSILON_FIELDS,
    Baseline,
    NoiseMultiplicity,
    Rounds,
)
from feddiff_protocol.errors import SpecInvalid
from feddiff_protocol.stages import Seed

from .documents import LocalDataset, LocalJob, load_documents, local_job, read_yaml
from .plan_report import decimal_text

SEED_MARK, CLIENTS_MARK = "{seed}", "{clients}"
EPSILON, CLIENTS = "privacy.epsilon", "clients"
SLUG_LENGTH = 80
MOST_UNITS = 10_000

FieldPath = Annotated[str, Field(pattern=r"^[a-z][A-Za-z]*(\.[a-z][A-Za-z]*)*$", max_length=256)]


class ArmSpec(Wire):
    """One way to train: the experiment's job with some fields of its spec set, or removed by null; or a baseline with
    the network, the image-steps and the sampler of such a job."""

    name: Name | None = None  # a baseline's own, unless given
    set: Mapping[FieldPath, Any] = {}
    baseline: Baseline | None = None
    rounds: Rounds | None = None  # of fedavg; 100 unless said
    noise_multiplicity: NoiseMultiplicity | None = None  # of dp-sgd; 32 unless said
    of: Name | None = None  # the arm whose run a baseline takes; the only job's, unless given

    @property
    def called(self) -> str:
        return self.name or (self.baseline.value if self.baseline else "")

    @model_validator(mode="after")
    def _has_a_name(self) -> "ArmSpec":
        if not self.called:
            raise ValueError("expected a name, or a baseline, found neither; add one")
        return self

    @model_validator(mode="after")
    def _rounds_go_with_fedavg(self) -> "ArmSpec":
        if self.rounds is not None and self.baseline is not Baseline.FEDAVG:
            raise ValueError(f"rounds: belongs to baseline fedavg, found {self.baseline or 'none'}; remove it")
        return self

    @model_validator(mode="after")
    def _noise_multiplicity_goes_with_dp_sgd(self) -> "ArmSpec":
        if self.noise_multiplicity is not None and self.baseline is not Baseline.DP_SGD:
            found = self.baseline or "none"
            raise ValueError(f"noiseMultiplicity: belongs to baseline dp-sgd, found {found}; remove it")
        return self

    @model_validator(mode="after")
    def _takes_a_run_as_it_is(self) -> "ArmSpec":
        of_a_run = self.baseline is not None and self.baseline.is_of_a_run
        if self.of is not None and not of_a_run:
            raise ValueError(f"of: belongs to a baseline of a job's run, found {self.baseline or 'none'}; remove it")
        if self.set and of_a_run:
            raise ValueError(f"set: baseline {self.baseline} takes a run as it is; set it in that run's own arm")
        return self


class ExperimentSpec(Wire):
    """The whole file."""

    job: Text | dict[str, Any]
    datasets: Annotated[tuple[Text, ...], Field(min_length=1, max_length=1000)]
    seeds: Annotated[tuple[Seed, ...], Field(min_length=1, max_length=1000)] = (0,)
    grid: Mapping[FieldPath, Annotated[tuple[Any, ...], Field(min_length=1)]] = {}
    arms: Annotated[tuple[ArmSpec, ...], Field(min_length=1, max_length=100)]


Cell = Mapping[str, Any]  # fields of the grid with their values


@dataclass(frozen=True)
class Unit:
    """One run: an arm in one cell with one seed."""

    arm: str
    cell: Cell
    seed: int
    job: LocalJob
    baseline: Baseline | None = None  # then `job` is what it is compared with
    rounds: int | None = None  # of fedavg
    noise_multiplicity: int | None = None  # of dp-sgd
    of: str | None = None  # the arm whose run in the same cell with the same seed a baseline takes

    @property
    def key(self) -> tuple[str, str, int]:
        return unit_key(self.arm, self.cell, self.seed)

    @property
    def label(self) -> str:
        """ "summary, network.baseWidth=16, seed 5"; ε is never said without the rest of a promise."""
        privacy = self.job.document.spec.privacy
        promise = f" (per {privacy.unit}, δ = {decimal_text(privacy.delta_or_zero)}, k = 1)"
        cell = [f"{field}={_text(value)}{promise if field == EPSILON else ''}" for field, value in self.cell.items()]
        return ", ".join([self.arm, *cell, f"seed {self.seed}"])

    @property
    def asked(self) -> str:
        """SHA-256 of all that the figures depend on, but for the records themselves."""
        documents = [dataset.document for dataset in self.job.datasets.values()]
        data = [[each.metadata.to_wire(), each.spec.image.to_wire(), each.spec.classes.to_wire()] for each in documents]
        spec = self.job.document.spec.to_wire()
        job: dict[str, Any] = {"spec": spec}
        if self.baseline is not None:
            job = with_fields(job, dict.fromkeys(self.baseline.indifferent_to(self.job.promise.mechanism)))
        said = [self.arm, self.baseline, self.rounds, self.of, self.seed, job, data]
        if self.baseline is not None and self.baseline.keeps_epsilon:
            said += [self.noise_multiplicity, *(spec["privacy"][field] for field in ("epsilon", "delta"))]
        return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()

    def folder(self, out: Path) -> Path:
        return out / "runs" / self.arm / slug(self.cell) / f"seed-{self.seed}"


@dataclass(frozen=True)
class Experiment:
    name: str
    units: tuple[Unit, ...]

    @property
    def datasets(self) -> list[LocalDataset]:
        """Every dataset of every seed, once."""
        found = {each.source.path: each for unit in self.units for each in unit.job.datasets.values()}
        return list(found.values())


def unit_key(arm: str, cell: Cell, seed: int) -> tuple[str, str, int]:
    """What tells a unit from all others."""
    return arm, json.dumps(cell, sort_keys=True), seed


def slug(cell: Cell) -> str:
    """A folder's name for a cell: its values as they are where that is possible."""
    if not cell:
        return "all"
    plain = ",".join(f"{field}={_text(value)}" for field, value in cell.items())
    safe = re.sub(r"[^\w.=,+-]", "_", plain, flags=re.ASCII)[:SLUG_LENGTH]
    return safe if safe == plain else f"{safe}-{hashlib.sha256(plain.encode()).hexdigest()[:8]}"


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True)


# ---- The file ---------------------------------------------------------------------------------------------------


def load_experiment(file: Path) -> Experiment:
    """The experiment of `file` with every document that it names. Raises SpecInvalid or InputMissing, naming file and
    field."""
    values = [value for _, value in read_yaml(file)]
    if len(values) != 1 or not isinstance(values[0], Mapping):
        raise SpecInvalid(f"{file}: expected one mapping with job, datasets and arms, found {len(values)} documents")
    spec = parse(ExperimentSpec, values[0], str(file))
    folder = file.resolve().parent
    job = spec.job if isinstance(spec.job, dict) else _job_document(folder / spec.job)
    units = tuple(expand(spec, job, _datasets(spec, folder, str(file)), str(file)))
    for dataset in Experiment(file.stem, units).datasets:
        if dataset.source.holdout_path is None:
            raise SpecInvalid(
                f"{file}: dataset {dataset.key}: expected source.holdoutPath, found none: without held-out records"
                " nothing can be compared; add it"
            )
    return Experiment(file.stem, units)


def _job_document(path: Path) -> dict[str, Any]:
    """The one job in a file, as it stands there; other documents are passed over."""
    jobs = [
        value
        for _, value in read_yaml(path)
        if isinstance(value, dict) and value.get("kind") == FederatedDiffusionJob.__name__
    ]
    if len(jobs) != 1:
        raise SpecInvalid(f"{path}: expected exactly one FederatedDiffusionJob, found {len(jobs)}; name one file")
    return jobs[0]


def _datasets(spec: ExperimentSpec, folder: Path, where: str) -> dict[tuple[int, Any], tuple[LocalDataset, ...]]:
    """By seed and number of clients, None where the grid has no numbers of them. Files are read once, unless their
    paths say {seed} or {clients}. Raises SpecInvalid for a number of clients that is not that of the datasets."""
    read: dict[tuple[str, ...], tuple[LocalDataset, ...]] = {}
    found = {}
    for seed, count in itertools.product(spec.seeds, spec.grid.get(CLIENTS, (None,))):
        marks = {SEED_MARK: str(seed), CLIENTS_MARK: str(count)}
        paths = tuple(_marked(path, marks) for path in spec.datasets)
        if paths not in read:
            read[paths] = load_documents([folder / path for path in paths]).datasets
        if count is not None and (type(count) is not int or len(read[paths]) != count):
            raise SpecInvalid(
                f"{where}: grid: clients: expected the number of datasets, {len(read[paths])} in {', '.join(paths)},"
                f" found {_text(count)}; let paths say {CLIENTS_MARK}"
            )
        found[seed, count] = read[paths]
    return found


def _marked(path: str, marks: Mapping[str, str]) -> str:
    for mark, value in marks.items():
        path = path.replace(mark, value)
    return path


# ---- The grid ---------------------------------------------------------------------------------------------------


def expand(
    spec: ExperimentSpec,
    job: Mapping[str, Any],
    datasets: Mapping[tuple[int, Any], Sequence[LocalDataset]],
    where: str,
) -> Iterator[Unit]:
    """Every unit, seed by seed, so that a first comparison is complete as soon as it can be.

    Raises SpecInvalid for two arms of one name, a field that arm and grid both set, and a job that is none.
    """
    _check_distinct(spec, where)
    _check_arms(spec, where)
    count = math.prod([len(spec.seeds), len(spec.arms), *map(len, spec.grid.values())])
    if count > MOST_UNITS:
        raise SpecInvalid(f"{where}: expected at most {MOST_UNITS} runs, found {count}; leave out cells, seeds or arms")
    cells = [dict(zip(spec.grid, values, strict=True)) for values in itertools.product(*spec.grid.values())]
    arms = sorted(((arm, _arm_taken(arm, spec.arms, where)) for arm in spec.arms), key=lambda pair: pair[1] is not None)
    known = set()
    for seed, cell, (arm, taken) in itertools.product(spec.seeds, cells, arms):
        local = _job_of(taken or arm, cell, job, datasets[seed, cell.get(CLIENTS)], where)
        _check_pooled(arm, local, where)
        _check_dp_sgd(arm, local, where)
        unit = Unit(
            arm.called,
            concerning(cell, arm.baseline, local.promise.mechanism),
            seed,
            local,
            arm.baseline,
            rounds=rounds_of(arm),
            noise_multiplicity=noise_multiplicity_of(arm),
            of=taken.called if taken is not None else None,
        )
        if unit.key not in known:
            known.add(unit.key)
            yield unit


def rounds_of(arm: ArmSpec) -> int | None:
    return (arm.rounds or DEFAULT_ROUNDS) if arm.baseline is Baseline.FEDAVG else None


def noise_multiplicity_of(arm: ArmSpec) -> int | None:
    return (arm.noise_multiplicity or DEFAULT_NOISE_MULTIPLICITY) if arm.baseline is Baseline.DP_SGD else None


def concerning(cell: Cell, baseline: Baseline | None, mechanism: Mechanism) -> Cell:
    """The part of a cell that an arm depends on: a baseline that knows of no release is run once for all of them."""
    if baseline is None:
        return cell
    fields = baseline.indifferent_to(mechanism)
    kept = EPSILON_FIELDS if baseline.keeps_epsilon else ()
    return {
        field: value
        for field, value in cell.items()
        if any(_overlap(field, each) for each in kept) or not any(_is_within(field, of) for of in fields)
    }


def _arm_taken(arm: ArmSpec, arms: Sequence[ArmSpec], where: str) -> ArmSpec | None:
    """The arm whose run a baseline takes; it comes after that run."""
    if arm.baseline is None or not arm.baseline.is_of_a_run:
        return None
    jobs = {each.called: each for each in arms if each.baseline is None}
    if arm.of is None and len(jobs) == 1:
        return next(iter(jobs.values()))
    if arm.of not in jobs:
        raise SpecInvalid(
            f"{where}: arm {arm.called}: of: expected the name of an arm that is a job,"
            f" {', '.join(jobs) or 'there is none'}; found {arm.of or 'none'}"
        )
    return jobs[arm.of]


def _check_pooled(arm: ArmSpec, job: LocalJob, where: str) -> None:
    if arm.baseline in (Baseline.CLOSED_FORM, Baseline.DRAWS) and job.promise.mechanism is Mechanism.GAUSSIAN:
        raise SpecInvalid(
            f"{where}: arm {arm.called}: expected a run with mechanism summary or privunit, whose classes are pooled,"
            " found gaussian; take another run"
        )


def _check_dp_sgd(arm: ArmSpec, job: LocalJob, where: str) -> None:
    """Raises SpecInvalid, before anything starts, for what its training would refuse."""
    if arm.baseline is not Baseline.DP_SGD:
        return
    spec = job.document.spec
    if spec.privacy.delta_or_zero == 0:
        raise SpecInvalid(
            f"{where}: arm {arm.called}: expected a job with privacy.delta above 0, which Gaussian noise needs, found"
            f" mechanism {spec.privacy.mechanism} with δ = 0; set another mechanism in this arm"
        )
    for client, dataset in job.datasets.items():
        if spec.personal.batch > (records := sum(dataset.document.spec.classes.records)):
            raise SpecInvalid(
                f"{where}: arm {arm.called}: personal.batch: expected at most {records}, the records of client"
                f" {client}, found {spec.personal.batch}; lower it in this arm"
            )


def _check_distinct(spec: ExperimentSpec, where: str) -> None:
    listed = {"arms": [arm.called for arm in spec.arms], "seeds": [str(seed) for seed in spec.seeds]}
    listed |= {f"grid.{field}": [_text(value) for value in values] for field, values in spec.grid.items()}
    for name, values in listed.items():
        if twice := sorted({value for value in values if values.count(value) > 1}):
            raise SpecInvalid(f"{where}: {name}: expected distinct ones, found {', '.join(twice)} twice; leave one out")


def _check_arms(spec: ExperimentSpec, where: str) -> None:
    for arm in spec.arms:
        if both := sorted(path for path in arm.set for field in spec.grid if _overlap(path, field)):
            raise SpecInvalid(
                f"{where}: arm {arm.called}: sets {both[0]}, which the grid varies; leave it out of one of them"
            )


def _is_within(field: str, path: str) -> bool:
    return f"{field}.".startswith(f"{path}.")


def _overlap(field: str, path: str) -> bool:
    return _is_within(field, path) or _is_within(path, field)


def _job_of(arm: ArmSpec, cell: Cell, job: Mapping[str, Any], datasets: Sequence[LocalDataset], where: str) -> LocalJob:
    """The arm's job in a cell; where the grid has numbers of clients, every dataset is one, called by its namespace."""
    named = ", ".join([f"{where}: arm {arm.called}", *(f"{field}={_text(value)}" for field, value in cell.items())])
    fields = {**cell, **arm.set}
    if CLIENTS in cell:
        names = [(each.document.metadata.namespace, each.document.metadata.name) for each in datasets]
        fields[CLIENTS] = [{"name": owner, "dataset": {"namespace": owner, "name": name}} for owner, name in names]
    document = with_fields(job, fields, named)
    metadata = document.get("metadata")
    if isinstance(metadata, Mapping):
        document["metadata"] = {**metadata, "name": f"{metadata.get('name')}-{arm.called}"}
    parsed = parse(FederatedDiffusionJob, document, named)
    try:
        return local_job(parsed, datasets)
    except SpecInvalid as error:
        raise SpecInvalid(f"{named}: {error}") from None


def with_fields(job: Mapping[str, Any], fields: Mapping[str, Any], where: str = "") -> dict[str, Any]:
    """The job's document with fields of its spec set, by dotted paths; null removes one. Raises SpecInvalid for a path
    through something that has no fields."""
    document = copy.deepcopy(dict(job))
    for path, value in fields.items():
        *parents, name = path.split(".")
        place = document.setdefault("spec", {})
        for parent in parents:
            place = place.setdefault(parent, {}) if isinstance(place, dict) else None
        if not isinstance(place, dict):
            raise SpecInvalid(f"{where}: {path}: expected a field of the job's spec, found none; check its spelling")
        if value is None:
            place.pop(name, None)
        else:
            place[name] = copy.deepcopy(value)
    return document
