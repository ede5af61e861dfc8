"""A personal denoiser or its samples as a file to pass on: only after an audit that they passed, or against it by the
owner's word, which stays on record.

    python -m feddiff_trainer.export SPEC.json

Its answer is on stdout; the record of the export is in the owner's store and the owner report before the file is there.
"""

import hashlib
import io
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field, ValidationError

from feddiff_protocol import layout
from feddiff_protocol.api import Wire
from feddiff_protocol.errors import OutputFailed, PrivacyRefusal
from feddiff_protocol.stages import SampleSpec

from .answering import answered
from .audit import evaluate_spec_of
from .evaluate import rewrite_report
from .findings import Audit, Export, export_refusals
from .pictures import read_samples
from .records import digest_records, read_source
from .stores import Store, open_store

PRIVATE_ARMS = ("both", "personal")  # the shared denoiser's own are public


class ExportSpec(Wire):
    """`run`: the spec with which the run drew its samples; `override`: why it may go although something speaks
    against it, "" for no such wish."""

    run: SampleSpec
    what: Literal["denoiser", "samples"]
    out: str
    override: Annotated[str, Field(max_length=500)] = ""


def export(spec: ExportSpec) -> Export:
    """What is on record of the export; `spec.out` holds the copy. Raises PrivacyRefusal where the audit speaks against
    it and the owner does not override; OutputFailed for a file that exists."""
    run, store = spec.run, open_store(spec.run.owner_store, "owner")
    at = layout.personal_denoiser if spec.what == "denoiser" else layout.samples
    data, records = store.get(at(run.job.uid, run.client)), read_source(run.source, run.image, run.classes)
    refusals = reasons_against(store, run, digest_records(records))
    if refusals and not spec.override:
        raise PrivacyRefusal(
            f"client {run.client}: expected an audit that the personal denoiser passed, found: {'; '.join(refusals)};"
            " nothing was exported; keep it, or override with your reason"
        )
    now = datetime.now(UTC)
    record = Export(
        what=spec.what,
        sha256=hashlib.sha256(data).hexdigest(),
        exported_at=now.isoformat(timespec="microseconds"),
        refusals=tuple(refusals),
        override=spec.override if refusals else "",
    )
    copy = data if spec.what == "denoiser" else _as_npz(data, run)
    if Path(spec.out).exists():
        raise OutputFailed(f"{spec.out} exists; name a new file")
    name = f"{layout.exports_prefix(run.job.uid, run.client)}{now:%Y%m%dT%H%M%S%f}Z.json"
    if not store.create(name, record.model_dump_json(by_alias=True).encode()):
        raise OutputFailed(f"{store.uri}/{name} exists: another export of this moment; try again")
    rewrite_report(evaluate_spec_of(run), store, records)
    _write_new(Path(spec.out), copy)
    return record


def reasons_against(store: Store, run: SampleSpec, records_sha256: str) -> list[str]:
    """Why neither denoiser nor samples should leave; empty where the audit of these very bytes found nothing."""
    key = layout.audit(run.job.uid, run.client)
    if not store.exists(key):
        return ["the run was not audited (feddiff audit)"]
    try:
        audit = Audit.model_validate_json(store.get(key))
    except ValidationError:
        return ["the audit in the store cannot be read; audit again"]
    for what, at, audited in (
        ("denoiser", layout.personal_denoiser, audit.personal_sha256),
        ("samples", layout.samples, audit.samples_sha256),
    ):
        if hashlib.sha256(store.get(at(run.job.uid, run.client))).hexdigest() != audited:
            return [f"the audit was of other {what} than those in the store; audit again"]
    if audit.records_sha256 != records_sha256:
        return ["the audit was of other records than those in the dataset; audit again"]
    return export_refusals(audit)


def _as_npz(data: bytes, run: SampleSpec) -> bytes:
    samples = read_samples(data, "samples", PRIVATE_ARMS, run.image, run.classes.count)
    arrays: dict[str, Any] = dict(samples.images)
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays, labels=samples.labels_N)
    return buffer.getvalue()


def _write_new(path: Path, data: bytes) -> None:
    """The whole file is there, or OutputFailed: never over one that exists."""
    try:
        with path.open("xb") as file:
            file.write(data)
    except OSError as error:
        raise OutputFailed(f"{path}: cannot be written: {error.strerror or error}; give another path") from None


def main() -> int:
    return answered(ExportSpec, lambda spec: export(spec).to_wire())


if __name__ == "__main__":
    sys.exit(main())
