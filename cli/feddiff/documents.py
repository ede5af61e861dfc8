"""YAML files become one job and its datasets, every path resolved against the file that names it.

The files may be those that go to `kubectl apply`: documents of other groups, a Namespace or a NetworkPolicy, are passed
over, and what our own say of stores, Secrets, volumes and pods is read and not used.
"""

import os
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import yaml

from feddiff_protocol.api import (
    GROUP,
    DatasetReference,
    Document,
    FederatedDiffusionJob,
    PrivateDataset,
    SourceSpec,
    parse_document,
)
from feddiff_protocol.errors import InputMissing, SpecInvalid
from feddiff_protocol.promise import Promise, check_datasets, promise_of

LARGEST_FILE_BYTES = 4 * 1024 * 1024
OUR_KINDS = tuple(kind.__name__ for kind in get_args(Document))


@dataclass(frozen=True)
class LocalDataset:
    """A dataset whose source paths are absolute, links followed: one set of records has one ledger."""

    document: PrivateDataset  # docs/api.md lists its fields, in Python with underscores: `spec.image.height`

    @property
    def key(self) -> str:
        """namespace/name."""
        return f"{self.document.metadata.namespace}/{self.document.metadata.name}"

    @property
    def source(self) -> SourceSpec:
        """Where the records are."""
        return self.document.spec.source

    @property
    def owner_folder(self) -> Path:
        """Beside the records: ledger and owner's store outlive every run folder."""
        metadata = self.document.metadata
        return Path(self.source.path).parent / "feddiff" / f"{metadata.namespace}.{metadata.name}"


@dataclass(frozen=True)
class Documents:
    datasets: tuple[LocalDataset, ...]
    jobs: tuple[FederatedDiffusionJob, ...]
    passed_over: tuple[str, ...] = ()  # the kind of each document of another group


@dataclass(frozen=True)
class LocalJob:
    """One job and, for each of its clients, the dataset."""

    document: FederatedDiffusionJob  # docs/api.md lists its fields, in Python with underscores: `spec.privacy.epsilon`
    datasets: Mapping[str, LocalDataset]  # by client
    promise: Promise  # to every client alike

    @property
    def first_dataset(self) -> LocalDataset:
        """Any client's, for the shape of images and the classes, which all share."""
        return next(iter(self.datasets.values()))


def load_job(files: Sequence[Path]) -> LocalJob:
    """The one job of `files` with its datasets. Raises SpecInvalid or InputMissing, naming file and field."""
    return one_job(load_documents(files), files)


def one_job(documents: Documents, files: Sequence[Path]) -> LocalJob:
    """The one job among the documents of `files`, with its datasets. Raises SpecInvalid, naming file and field."""
    if len(documents.jobs) != 1:
        found = ", ".join(job.metadata.name for job in documents.jobs) or "none"
        raise SpecInvalid(f"{_listed(files)}: expected exactly one FederatedDiffusionJob, found {found}; name one file")
    return local_job(documents.jobs[0], documents.datasets)


def local_job(job: FederatedDiffusionJob, datasets: Iterable[LocalDataset]) -> LocalJob:
    """The job with its clients' datasets, which must agree with each other and with the job."""
    by_key = {dataset.key: dataset for dataset in datasets}
    of_client = {client.name: _dataset_of(job, client.name, client.dataset, by_key) for client in job.spec.clients}
    check_datasets(job, {client: dataset.document for client, dataset in of_client.items()})
    return LocalJob(job, of_client, promise_of(job.spec.privacy, job.spec.diffusion))


def load_documents(files: Sequence[Path]) -> Documents:
    """Everything in `files`; a dataset or job that is there twice is refused."""
    datasets: dict[str, LocalDataset] = {}
    jobs: list[FederatedDiffusionJob] = []
    passed_over: list[str] = []
    for file in files:
        for where, value in read_yaml(file):
            if _is_foreign(value):
                passed_over.append(value["kind"])
                continue
            document = parse_document(value, where)
            if isinstance(document, FederatedDiffusionJob):
                jobs.append(document)
                continue
            dataset = resolved(document, file.resolve().parent)
            if dataset.key in datasets:
                raise SpecInvalid(f"{where}: dataset {dataset.key} is described twice; keep one")
            datasets[dataset.key] = dataset
    _check_distinct_records(datasets.values())
    return Documents(tuple(datasets.values()), tuple(jobs), tuple(passed_over))


def _is_foreign(value: Any) -> bool:
    """Whether the document is another group's. A kind of ours in another group is a slip, which is refused."""
    version, kind = (value.get("apiVersion"), value.get("kind")) if isinstance(value, Mapping) else (None, None)
    if not isinstance(version, str) or not isinstance(kind, str) or not version or not kind:
        return False
    return version.partition("/")[0] != GROUP and kind not in OUR_KINDS


def resolved(document: PrivateDataset, folder: Path) -> LocalDataset:
    """The dataset with its source paths absolute, relative ones taken from `folder`."""
    source = document.spec.source
    paths = {
        name: os.path.realpath(folder / value)
        for name in ("path", "labels_path", "holdout_path", "holdout_labels_path", "inception_path")
        if (value := getattr(source, name)) is not None
    }
    spec = document.spec.model_copy(update={"source": source.model_copy(update=paths)})
    return LocalDataset(document.model_copy(update={"spec": spec}))


def read_yaml(file: Path) -> Iterator[tuple[str, Any]]:
    """Each document of a file with the words that name it in a message."""
    try:
        if file.stat().st_size > LARGEST_FILE_BYTES:
            raise SpecInvalid(f"{file}: expected a file of at most {LARGEST_FILE_BYTES} bytes; is this the right one?")
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise SpecInvalid(f"{file}: expected UTF-8 text, found {error.reason} at byte {error.start}") from None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise InputMissing(f"{file}: cannot be read: {reason}") from None
    found = [(f"{file}: document {index}", value) for index, value in enumerate(parse_yaml(text, str(file)), start=1)]
    yield from ((where, value) for where, value in found if value is not None)


def parse_yaml(text: str, where: str) -> list[Any]:
    """The plain values of all documents in `text`. Raises SpecInvalid for whatever YAML does not allow."""
    try:
        return list(yaml.load_all(text, Loader=_StrictLoader))
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else "?"
        raise SpecInvalid(f"{where}: line {line}: not valid YAML: {error.problem}") from None
    except (yaml.YAMLError, ValueError, ArithmeticError, TypeError, KeyError, IndexError) as error:
        raise SpecInvalid(f"{where}: not valid YAML: {' '.join(str(error).split())}") from None
    except RecursionError:
        raise SpecInvalid(f"{where}: not valid: nested too deeply") from None


class _StrictLoader(yaml.SafeLoader):
    """Safe loading that refuses what would be settled silently: a key given twice, and aliases (they can
    multiply a small file into a huge value)."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.events.AliasEvent):
            event = self.peek_event()  # type: ignore[no-untyped-call]
            raise yaml.composer.ComposerError(
                None, None, "aliases are not supported; repeat the value", event.start_mark
            )
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if key.value in seen if isinstance(key, yaml.ScalarNode) else False:
                raise yaml.constructor.ConstructorError(None, None, f'"{key.value}" is given twice', key.start_mark)
            if isinstance(key, yaml.ScalarNode):
                seen.add(key.value)
        return super().construct_mapping(node, deep=deep)


def _dataset_of(
    job: FederatedDiffusionJob, client: str, reference: DatasetReference, datasets: Mapping[str, LocalDataset]
) -> LocalDataset:
    key = f"{reference.namespace}/{reference.name}"
    if key not in datasets:
        known = ", ".join(sorted(datasets)) or "none"
        raise SpecInvalid(
            f"job {job.metadata.name}: client {client} uses dataset {key}, found {known}; name the file that holds it"
        )
    return datasets[key]


def _check_distinct_records(datasets: Collection[LocalDataset]) -> None:
    """The same records under two names would have two budgets."""
    holder: dict[str | tuple[int, int], LocalDataset] = {}
    for dataset in datasets:
        _check_same(holder.setdefault(dataset.source.path, dataset), dataset)
        for number in _file_number(dataset.source.path):
            _check_same(holder.setdefault(number, dataset), dataset)
    for dataset in datasets:
        for folder in Path(dataset.source.path).parents:
            _check_same(holder.get(str(folder), dataset), dataset)


def _check_same(one: LocalDataset, other: LocalDataset) -> None:
    if one.key != other.key:
        raise SpecInvalid(
            f"datasets {one.key} and {other.key} hold the same records, {one.source.path} and {other.source.path};"
            " one set of records has one dataset and one budget"
        )


def _file_number(path: str) -> list[tuple[int, int]]:
    """What all names of one file have in common."""
    if not os.path.isfile(path):
        return []
    found = os.stat(path)
    return [(found.st_dev, found.st_ino)]


def overlap(path: str, other: str) -> bool:
    """Whether both absolute paths, links followed, lead to the same file, or one to what lies in the other."""
    one, two = Path(path), Path(other)
    if one.is_relative_to(two) or two.is_relative_to(one):
        return True
    number = _file_number(path)
    return bool(number) and number == _file_number(other)


def _listed(files: Sequence[Path]) -> str:
    return ", ".join(str(file) for file in files)
