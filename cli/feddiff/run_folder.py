"""A run's folder: which job it is, what was said about it last, and every attempt of every stage.

run.json        uid and documents of the job, written once     status.json  what the plan last said
lock            held by the one engine at work                 federation/  store that all parties read
stages/<stage>[-<client>]/attempt-<n>/
"""

import fcntl
import json
import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

from feddiff_protocol.api import FederatedDiffusionJob, PrivateDataset, Wire, parse
from feddiff_protocol.errors import InputMissing, Interrupted, OutputFailed, SpecInvalid
from feddiff_protocol.plan import StageKey, Status
from feddiff_protocol.stages import Receipt, Seed, Stage

from .documents import LocalDataset, LocalJob, local_job

STORE_URI_BYTES = 512


class RunRecord(Wire):
    """run.json."""

    uid: str
    job: FederatedDiffusionJob
    datasets: tuple[PrivateDataset, ...]  # source paths absolute
    seed: Seed | None = None  # of a run that belongs to an experiment


class RunFolder:
    """One run below `path`."""

    def __init__(self, path: Path) -> None:
        self.path = path.resolve()

    # -- identity

    def begin(self, job: LocalJob, seed: int | None = None) -> str:
        """The job's uid, drawn at the first call. Raises SpecInvalid when the run is of another job or promise."""
        fresh = RunRecord(uid=uuid4().hex, job=job.document, datasets=_documents(job), seed=seed)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            created = create_file(self.path / "run.json", _json(fresh.to_wire()))
        except OSError as error:
            raise OutputFailed(f"{self.path}: the run folder cannot be written: {error.strerror}") from None
        if created:
            return fresh.uid
        known = self.record()
        self._check_unchanged(known, fresh)
        self._replace_record(fresh.model_copy(update={"uid": known.uid}))
        return known.uid

    def begin_anew(self, job: LocalJob, seed: int | None = None) -> str:
        """A new uid for a run that gave back all it had reserved: it starts as a new job."""
        fresh = RunRecord(uid=uuid4().hex, job=job.document, datasets=_documents(job), seed=seed)
        self._replace_record(fresh)
        return fresh.uid

    def record(self) -> RunRecord:
        """Raises InputMissing when this is no run folder."""
        try:
            return parse(RunRecord, json.loads((self.path / "run.json").read_text()), str(self.path / "run.json"))
        except (OSError, ValueError):
            raise InputMissing(
                f"{self.path}: expected a run's folder with run.json; `feddiff run JOB.yaml` makes one"
            ) from None

    def job(self) -> LocalJob:
        """The job as this run knows it."""
        record = self.record()
        return local_job(record.job, [LocalDataset(document) for document in record.datasets])

    def _check_unchanged(self, known: RunRecord, asked: RunRecord) -> None:
        for what, before, now in zip(_FIXED_PARTS, _fixed_parts(known), _fixed_parts(asked), strict=True):
            if before != now:
                raise SpecInvalid(f"{self.path} holds a run with other {what}; these cannot change; use another --dir")

    def _replace_record(self, record: RunRecord) -> None:
        text = _json(record.to_wire())
        if (self.path / "run.json").read_text() != text:
            replace_file(self.path / "run.json", text)

    # -- places

    @property
    def federation_store(self) -> str:
        return store_uri(self.path / "federation")

    # -- status

    def write_status(self, status: Status, releasing_since: float | None) -> None:
        """status.json says `status`; written only when that is news."""
        text = _json(status_document(status, releasing_since))
        path = self.path / "status.json"
        with suppress(FileNotFoundError):
            if path.read_text() == text:
                return
        replace_file(path, text)

    def read_status(self) -> dict[str, Any]:
        """What was written last, {} before the first time."""
        try:
            value = json.loads((self.path / "status.json").read_text())
        except FileNotFoundError:
            return {}
        except ValueError:
            raise InputMissing(f"{self.path / 'status.json'}: not valid JSON; remove it and run again") from None
        return value if isinstance(value, dict) else {}

    # -- attempts

    def stage_folder(self, key: StageKey) -> Path:
        stage, client = key
        return self.path / "stages" / (f"{stage.value}-{client}" if client else stage.value)

    def attempt_folder(self, key: StageKey, attempt: int) -> Path:
        return self.stage_folder(key) / f"attempt-{attempt}"

    def newest_attempt(self, key: StageKey) -> int:
        """0 before the first."""
        folder = self.stage_folder(key)
        names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
        return max((int(match[1]) for name in names if (match := re.fullmatch(r"attempt-(\d+)", name))), default=0)

    def receipt(self, key: StageKey, attempt: int, job_uid: str) -> Receipt | None:
        """The attempt's receipt if it is whole and speaks of this very attempt."""
        try:
            text = (self.attempt_folder(key, attempt) / "receipt.json").read_text()
            receipt = Receipt.model_validate_json(text)
        except (OSError, ValueError):
            return None
        stage, client = key
        says = (receipt.stage, receipt.client, receipt.job_uid, receipt.attempt)
        complete = stage not in OUTPUTS or OUTPUTS[stage] in receipt.outputs
        return receipt if complete and says == (stage, client, job_uid, attempt) else None

    # -- one engine at a time

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Alone at work in this folder; the lock goes with the process. Raises Interrupted (75: try later)."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            file = (self.path / "lock").open("a+")
        except OSError as error:
            raise OutputFailed(f"{self.path}: the run folder cannot be written: {error.strerror}") from None
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                raise Interrupted(
                    f"{self.path}: process {file.read().strip() or '?'} is at work on this run; wait for it or stop it"
                ) from None
            file.truncate(0)
            file.write(f"{os.getpid()}\n")
            file.flush()
            yield

    def is_locked(self) -> bool:
        """Whether an engine is at work here."""
        try:
            with (self.path / "lock").open("r") as file:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except FileNotFoundError:
            return False
        except BlockingIOError:
            return True
        return False


# What a receipt must hash for the next stage to trust it.
OUTPUTS = {Stage.RELEASE: "manifest", Stage.TRAIN_SHARED: "denoiser"}

_FIXED_PARTS = ("name or namespace", "clients", "privacy", "diffusion", "datasets", "seed")


def _fixed_parts(record: RunRecord) -> tuple[object, ...]:
    job, metadata = record.job.spec, record.job.metadata
    data = [
        (d.metadata.namespace, d.metadata.name, d.spec.source, d.spec.image, d.spec.classes) for d in record.datasets
    ]
    return (metadata.name, metadata.namespace), job.clients, job.privacy, job.diffusion, data, record.seed


def _documents(job: LocalJob) -> tuple[PrivateDataset, ...]:
    return tuple(dataset.document for dataset in job.datasets.values())


def status_document(status: Status, releasing_since: float | None) -> dict[str, Any]:
    return {
        "phase": status.phase.value,
        "conditions": [
            {"type": each.type, "status": each.status, "reason": each.reason, "message": each.message}
            for each in status.conditions
        ],
        "counted": list(status.counted),
        "dropped": dict(status.dropped),
        "releasingSince": releasing_since,
    }


def store_uri(folder: Path) -> str:
    """file:// URI of a folder. Raises SpecInvalid where its path is longer than a spec may hold."""
    uri = folder.as_uri()
    if len(uri) > STORE_URI_BYTES:
        raise SpecInvalid(f"{folder}: expected a path of at most {STORE_URI_BYTES} bytes as a URI; use a shorter one")
    return uri


# ---- Files that are whole or not there ---------------------------------------------------------------------------


def create_file(path: Path, text: str) -> bool:
    """True: `text` is in `path`, whole and durable. False: something was there first."""
    unfinished = _written_beside(path, text)
    try:
        os.link(unfinished, path)
        return True
    except FileExistsError:
        return False
    finally:
        os.unlink(unfinished)
        _sync_folder(path.parent)


def replace_file(path: Path, text: str) -> None:
    os.replace(_written_beside(path, text), path)
    _sync_folder(path.parent)


def _written_beside(path: Path, text: str) -> str:
    descriptor, unfinished = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    return unfinished


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _json(value: Mapping[str, Any]) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"
