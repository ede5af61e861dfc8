"""Exports: what no promise covers leaves the owner's store after an audit that it passed, or on record."""

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from audited_run import CLIENT, UID, prepared
from feddiff_protocol import layout
from feddiff_protocol.errors import OutputFailed, PrivacyRefusal
from feddiff_protocol.stages import SampleSpec
from feddiff_trainer import evaluate, export
from feddiff_trainer.export import ExportSpec
from feddiff_trainer.findings import Audit, Estimate, Export, Finding, Target, Verdict
from feddiff_trainer.records import digest_records, read_source
from feddiff_trainer.stores import Store, open_store


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SampleSpec:
    monkeypatch.setattr(evaluate, "read_holdout", lambda *_: None)  # quality is not measured here
    return prepared(tmp_path)


def store_of(run: SampleSpec) -> Store:
    return open_store(run.owner_store)


def put_audit(run: SampleSpec, **changes: Any) -> None:
    """One that the personal denoiser passed, unless `changes` say otherwise."""
    store, area = store_of(run), Estimate(value=0.55, low=0.5, high=0.6)
    finding = {
        "attack": "loss threshold",
        "members": 100,
        "others": 100,
        "auc": area,
        "auc_bound": 0.9,
        "control_auc": 1.0,
    }
    sha256 = {
        at: hashlib.sha256(store.get(at(UID, CLIENT))).hexdigest() for at in (layout.personal_denoiser, layout.samples)
    }
    fields: dict[str, Any] = {
        "job": run.job,
        "client": CLIENT,
        "records_sha256": digest_records(read_source(run.source, run.image, run.classes)),
        "personal_sha256": sha256[layout.personal_denoiser],
        "samples_sha256": sha256[layout.samples],
        "finished_at": "2026-01-02T03:04:05+00:00",
        "findings": tuple(
            Finding(target=target, verdict=Verdict.NO_PROMISE, **finding) for target in (Target.PERSONAL, Target.BOTH)
        ),
    }
    audit = Audit(**(fields | changes))
    store.put(layout.audit(UID, CLIENT), audit.model_dump_json(by_alias=True).encode())


def asked(run: SampleSpec, folder: Path, what: str = "denoiser", override: str = "") -> ExportSpec:
    out = folder / {"denoiser": "p.safetensors", "samples": "s.npz"}[what]
    return ExportSpec(run=run, what=what, out=str(out), override=override)  # type: ignore[arg-type]


def on_record(run: SampleSpec) -> list[Export]:
    return evaluate.read_exports(store_of(run), evaluate_spec(run))


def evaluate_spec(run: SampleSpec) -> Any:
    return export.evaluate_spec_of(run)


def page_of(run: SampleSpec) -> str:
    return store_of(run).get(layout.owner_report(UID, CLIENT)).decode()


def test_what_passed_its_audit_is_copied_and_on_record(run: SampleSpec, tmp_path: Path) -> None:
    put_audit(run)
    denoiser, samples = (export.export(asked(run, tmp_path, what)) for what in ("denoiser", "samples"))
    weights = store_of(run).get(layout.personal_denoiser(UID, CLIENT))
    assert (tmp_path / "p.safetensors").read_bytes() == weights
    with np.load(tmp_path / "s.npz") as archive:
        assert sorted(archive.files) == ["both", "labels", "personal"] and archive["both"].shape[1:] == (1, 8, 8)
    assert on_record(run) == [denoiser, samples] and denoiser.sha256 == hashlib.sha256(weights).hexdigest()
    assert "What was passed on" in page_of(run) and page_of(run).count("its audit passed") == 2


FAILED = Finding(
    target=Target.PERSONAL,
    attack="PIA",
    members=100,
    others=100,
    auc=Estimate(value=0.9, low=0.8, high=0.95),
    auc_bound=0.9,
    control_auc=1.0,
    verdict=Verdict.NO_PROMISE,
)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (None, "the run was not audited"),
        ({"findings": (FAILED,)}, "personal denoiser, PIA: AUC up to 0.950, where 0.900 is the most"),
        ({"findings": ()}, "was not attacked"),
        ({"personal_sha256": "0" * 64}, "the audit was of other denoiser than those in the store"),
        ({"samples_sha256": "0" * 64}, "the audit was of other samples than those in the store"),
        ({"records_sha256": "0" * 64}, "the audit was of other records"),
    ],
)
def test_without_an_audit_that_passed_nothing_leaves(
    run: SampleSpec, tmp_path: Path, changes: dict[str, Any] | None, words: str
) -> None:
    if changes is not None:
        put_audit(run, **changes)
    for what in ("denoiser", "samples"):
        with pytest.raises(PrivacyRefusal) as refused:
            export.export(asked(run, tmp_path, what))
        assert words in str(refused.value) and "nothing was exported" in str(refused.value)
    assert not (tmp_path / "p.safetensors").exists() and not (tmp_path / "s.npz").exists()
    assert on_record(run) == [] and "What was passed on" not in page_of(run)


def test_an_audit_that_cannot_be_read_is_none(run: SampleSpec, tmp_path: Path) -> None:
    store_of(run).put(layout.audit(UID, CLIENT), b'{"format": "feddiff.audit/9"}')
    with pytest.raises(PrivacyRefusal, match="cannot be read; audit again"):
        export.export(asked(run, tmp_path))
    evaluate.body(evaluate_spec(run))
    assert "Not audited" in page_of(run)


def test_the_owners_word_overrides_and_stays_on_record(run: SampleSpec, tmp_path: Path) -> None:
    put_audit(run, findings=(FAILED,))
    export.export(asked(run, tmp_path, override="public <data>"))
    (record,) = on_record(run)
    assert (tmp_path / "p.safetensors").exists() and record.override == "public <data>" and len(record.refusals) == 1
    assert "the owner overrode the audit: public &lt;data&gt; (against it: personal denoiser, PIA: AUC" in page_of(run)
    evaluate.body(evaluate_spec(run))  # evaluated again, it is still there
    assert "What was passed on" in page_of(run)


def test_an_override_that_was_not_needed_is_none(run: SampleSpec, tmp_path: Path) -> None:
    put_audit(run)
    assert export.export(asked(run, tmp_path, override="to be sure")).override == ""


def test_nothing_leaves_that_could_not_be_recorded(
    run: SampleSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_audit(run)

    def full(*_: object) -> None:
        raise OutputFailed("full")

    monkeypatch.setattr(export, "rewrite_report", full)
    with pytest.raises(OutputFailed, match="full"):
        export.export(asked(run, tmp_path))
    assert not (tmp_path / "p.safetensors").exists()


def test_no_file_is_overwritten(run: SampleSpec, tmp_path: Path) -> None:
    put_audit(run)
    (tmp_path / "p.safetensors").write_text("mine")
    with pytest.raises(OutputFailed, match="exists"):
        export.export(asked(run, tmp_path))
    assert (tmp_path / "p.safetensors").read_text() == "mine" and on_record(run) == []


def test_the_process_answers_with_the_record_and_refuses_with_77(
    run: SampleSpec, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["export", str(tmp_path / "spec.json")])
    for override, code in (("", 77), ("because", 0)):
        (tmp_path / "spec.json").write_text(json.dumps(asked(run, tmp_path, override=override).to_wire()))
        assert export.main() == code
    said = capsys.readouterr()
    assert json.loads(said.out)["override"] == "because" and said.err.startswith("feddiff: client a: expected an audit")
