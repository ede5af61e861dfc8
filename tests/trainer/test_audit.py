"""The audit of one owner's run, from its stores to what it leaves there: on denoisers that know the distribution alone,
and on a personal one that knows its records by heart.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from audited_run import CLIENT, COUNTS, HELD_OUT, UID, dataset, images_of, prepared, put_samples
from feddiff_protocol import layout
from feddiff_protocol.api import Timeline
from feddiff_protocol.errors import DataInvalid
from feddiff_protocol.promise import schedule_of
from feddiff_protocol.stages import SampleSpec
from feddiff_trainer import audit, evaluate, one_run, trials
from feddiff_trainer.denoisers import denoiser_bytes
from feddiff_trainer.findings import PROMISED, Audit, Target, Verdict, export_refusals
from feddiff_trainer.noise import Normals
from feddiff_trainer.records import Records, read_holdout, read_source
from feddiff_trainer.stores import open_store

ATTACKS = {"loss threshold", "PIA", "SecMI", "nearest neighbour"}


@pytest.fixture(scope="module", autouse=True)
def small() -> Iterator[None]:
    """One thread, few trials, and a control that is trained for as long as these images take."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trials, "TRIALS", 1000)
        patch.setattr(audit, "CONTROL_IMAGES", 12_800)
        patch.setattr(one_run, "LARGEST_RELEASE", 201)
        patch.setattr(evaluate, "read_holdout", lambda *_: None)  # quality is not measured here
        yield
    torch.set_num_threads(threads)


def audited(spec: SampleSpec, capsys: pytest.CaptureFixture[str], folder: Path) -> tuple[dict[str, Any], str]:
    """The answer of the process, and what it said on the way."""
    (folder / "spec.json").write_text(json.dumps(spec.to_wire()))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["audit", str(folder / "spec.json")])
        assert audit.main() == 0
    said = capsys.readouterr()
    return json.loads(said.out), said.err


def records_of(spec: SampleSpec) -> tuple[Records, Records]:
    holdout = read_holdout(spec.source, spec.image, spec.classes)
    assert holdout is not None
    return read_source(spec.source, spec.image, spec.classes), holdout


def seeded(scale: float = 1.0) -> Normals:
    rng = np.random.default_rng(0)
    return lambda shape: scale * rng.standard_normal(shape)


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, SampleSpec, Audit]:
    folder = tmp_path_factory.mktemp("fresh")
    spec = prepared(folder)
    return folder, spec, audit.body(spec, lambda share: None)


@pytest.fixture(scope="module")
def memorised(tmp_path_factory: pytest.TempPathFactory) -> Audit:
    """Of a run whose personal denoiser was trained long on what the audit takes for members, and nothing else."""
    folder = tmp_path_factory.mktemp("memorised")
    spec = prepared(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(audit, "MOST_PAIRS", 12)  # more would take longer to learn
        return audit_of_memorised(folder, spec)


def audit_of_memorised(folder: Path, spec: SampleSpec) -> Audit:
    compared, _ = audit.compare(spec, *records_of(spec))
    control = audit.memorised(spec, compared, lambda share: None)
    store = open_store(spec.owner_store)
    store.put(layout.personal_denoiser(UID, CLIENT), denoiser_bytes(control.denoiser))  # type: ignore[arg-type]
    drawn, labels = dataset(HELD_OUT, 2)
    own = np.concatenate([np.resize(images_of(label, count, 0), (40, 1, 8, 8)) for label, count in enumerate(COUNTS)])
    put_samples(folder, {"both": own, "shared": drawn, "personal": own, "labels": labels})
    return audit.body(spec, lambda share: None)


def test_every_attack_meets_every_target_and_every_control_fires(fresh: tuple[Path, SampleSpec, Audit]) -> None:
    *_, found = fresh
    made = {target: {each.attack for each in found.findings if each.target is target} for target in Target}
    assert made[Target.SHARED] == made[Target.PERSONAL] == made[Target.BOTH] == ATTACKS
    assert made[Target.UPLOAD] == {
        f"matched filter, {sums}{of_class}"
        for sums in ("sums", "second moments")
        for of_class in ("", " of a class of 20")
    }
    assert {each.group for each in found.findings if each.target is Target.SHARED} == {"all", "minority"}
    assert {(each.target, each.attack): each.control_auc for each in found.findings if each.control_auc < 0.8} == {}


def test_denoisers_that_know_the_distribution_alone_give_nothing_away(fresh: tuple[Path, SampleSpec, Audit]) -> None:
    *_, found = fresh
    models = [each for each in found.findings if each.target is not Target.UPLOAD]
    assert all(each.auc.low < 0.5 < each.auc.high for each in models)
    verdicts = {(each.target in PROMISED, each.group): each.verdict for each in models}
    assert {verdicts[False, group] for group in ("all", "minority")} == {Verdict.NO_PROMISE}
    assert verdicts[True, "all"] is Verdict.WITHIN
    assert verdicts[True, "minority"] is Verdict.OUT_OF_REACH, "of so few records nothing would be above it"
    assert found.blind is not None and found.blind.low < 0.5 < found.blind.high
    assert all(each.third.value == 0 for each in found.copies)


@pytest.mark.parametrize(("split", "told"), [(0.02, "SecMI"), (8.0, "SecMI, reversed")])
def test_secmi_has_the_sign_that_finds_what_its_control_knows_by_heart(
    fresh: tuple[Path, SampleSpec, Audit], split: float, told: str
) -> None:
    """A denoiser that knows twelve images by their labels, and nothing else, far above and below their distance."""
    _, spec, _ = fresh
    compared = audit.compare(spec, *records_of(spec))[0].few()
    known_ND, labels_N = (torch.from_numpy(each) for each in (compared.members.pixels_ND, compared.members.labels_N))

    def by_heart(y_BCHW: torch.Tensor, sigma_B: torch.Tensor, label_B: torch.Tensor) -> torch.Tensor:
        fit_BN = -torch.cdist(y_BCHW.flatten(1).double(), known_ND.double()).square() / (2 * sigma_B[:, None].square())
        fit_BN[label_B[:, None] != labels_N] = -torch.inf
        return (fit_BN.softmax(dim=1) @ known_ND.double()).view_as(y_BCHW).float()

    control = audit.Control(by_heart, compared.members, compared)
    schedule = schedule_of(spec.diffusion)
    scores = audit.attacks_from(schedule.step_at_least(split) or 0, schedule)[audit.SECMI]
    name, turned, area = audit.turned_by(control, audit.SECMI, scores)
    assert name == told and control.area(turned) > 0.8 and area == pytest.approx(control.area(turned))
    assert control.area(scores) == pytest.approx(control.area(turned) if name == "SecMI" else 1 - control.area(turned))


def test_squares_are_not_reconstructed_and_the_audit_says_so(fresh: tuple[Path, SampleSpec, Audit]) -> None:
    _, spec, found = fresh
    privacy = spec.privacy.model_copy(update={"block_side": 2})
    squares = spec.model_copy(update={"privacy": privacy})
    assert audit.reconstructs(spec) and not audit.reconstructs(squares)
    _, notes = audit.compare(squares, *records_of(spec))
    assert "not reconstructed" in notes[1] and not any("not reconstructed" in note for note in found.notes)


def test_a_release_gives_little_of_an_image_back_and_next_to_no_noise_all_of_it(
    fresh: tuple[Path, SampleSpec, Audit],
) -> None:
    *_, found = fresh
    rebuilt = found.reconstruction
    assert rebuilt is not None and rebuilt.verdict is Verdict.WITHIN and rebuilt.records == 104
    assert rebuilt.nearer.low < rebuilt.nearer_bound and rebuilt.control_nearer > 0.95
    assert -0.2 < rebuilt.gain_db < 1 and rebuilt.control_gain_db > 10
    assert abs(rebuilt.ssim - rebuilt.guess_ssim) < 0.1 and rebuilt.control_ssim > 0.9
    assert [each.target for each in found.one_run] == [Target.UPLOAD, Target.UPLOAD, Target.SHARED]
    assert all(each.control_auc > 0.95 and each.epsilon_low < each.epsilon_bound for each in found.one_run)
    assert {each.verdict for each in found.one_run} == {Verdict.OUT_OF_REACH}, "a hundred guesses show ε = 3.5 at most"


def test_a_personal_denoiser_that_knows_its_records_by_heart_is_found_by_every_attack(memorised: Audit) -> None:
    found = {(each.target, each.attack): each for each in memorised.findings if each.group == "all"}
    for attack in ATTACKS:
        assert found[Target.PERSONAL, attack].auc.value >= 0.8, attack
        assert found[Target.SHARED, attack].auc.low < 0.5, attack
    assert {each.target: each.third.value for each in memorised.copies}[Target.PERSONAL] == 1
    assert any("copies" in reason for reason in export_refusals(memorised))


def test_too_little_noise_turns_the_audit_red(fresh: tuple[Path, SampleSpec, Audit]) -> None:
    """By a third, at a thousand trials; test_trials has a tenth."""
    _, spec, _ = fresh
    released = audit.release_spec_of(spec)
    assert {each.verdict for each in audit.upload_findings(released, seeded())} == {Verdict.WITHIN}
    assert {each.verdict for each in audit.upload_findings(released, seeded(0.67))} == {Verdict.ABOVE}


# ---- Who is compared -------------------------------------------------------------------------------------------


def test_as_many_of_each_class_are_compared_on_both_sides(fresh: tuple[Path, SampleSpec, Audit]) -> None:
    _, spec, _ = fresh
    compared, notes = audit.compare(spec, *records_of(spec))
    assert np.bincount(compared.members.labels_N).tolist() == [40, 40, 12, 12] and len(notes) == 1
    np.testing.assert_array_equal(compared.members.labels_N, compared.others.labels_N)
    np.testing.assert_array_equal(compared.minority_N, compared.members.labels_N >= 2)


def test_held_out_records_that_were_trained_on_are_no_others(fresh: tuple[Path, SampleSpec, Audit]) -> None:
    _, spec, _ = fresh
    records, holdout = records_of(spec)
    mixed = Records(
        np.concatenate([holdout.pixels_NCHW[:10], records.pixels_NCHW]),
        np.concatenate([holdout.labels_N[:10], records.labels_N]),
    )
    compared, (*_, note) = audit.compare(spec, records, mixed)
    assert len(compared) == 10 and note.startswith(f"{len(records)} held-out records are training records too")


def test_on_the_papers_timeline_the_shared_denoiser_is_asked_for_samples_only(
    fresh: tuple[Path, SampleSpec, Audit],
) -> None:
    _, spec, _ = fresh
    restarted = spec.model_copy(
        update={"diffusion": spec.diffusion.model_copy(update={"timeline": Timeline.RESTARTED})}
    )
    assert audit.asked_for_noise(restarted) == (Target.PERSONAL,)
    assert audit.asked_for_noise(spec) == (Target.SHARED, Target.PERSONAL, Target.BOTH)
    assert audit.compare(restarted, *records_of(spec))[1] == [
        "On the timeline restarted the shared denoiser was attacked through its samples only."
    ]


def test_too_few_to_compare_are_refused(fresh: tuple[Path, SampleSpec, Audit]) -> None:
    _, spec, _ = fresh
    records, holdout = records_of(spec)
    few = Records(holdout.pixels_NCHW[:9], holdout.labels_N[:9])
    with pytest.raises(DataInvalid, match=r"expected 10 records or more .* found 9 to compare with"):
        audit.compare(spec, records, few)


# ---- What it leaves --------------------------------------------------------------------------------------------


def test_the_answer_stays_with_the_owner(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(audit, "CONTROL_IMAGES", 640)
    spec = prepared(tmp_path)
    federation = sorted((path, path.stat().st_mtime_ns) for path in (tmp_path / "federation").rglob("*"))
    log = tmp_path / "receipt.json"
    monkeypatch.setenv("FEDDIFF_TERMINATION_LOG", str(log))
    answer, said = audited(spec, capsys, tmp_path)
    assert sorted((path, path.stat().st_mtime_ns) for path in (tmp_path / "federation").rglob("*")) == federation
    assert not log.exists()
    store = open_store(spec.owner_store)
    kept = Audit.model_validate_json(store.get(layout.audit(UID, CLIENT)))
    assert answer == kept.to_wire() | {"exportRefusals": export_refusals(kept)}
    assert [json.loads(line)["event"] for line in said.splitlines()] == ["progress"] * len(said.splitlines())
    page = store.get(layout.owner_report(UID, CLIENT)).decode()
    assert "What attacks find" in page and "Not audited" not in page
    evaluate.body(audit.evaluate_spec_of(spec))  # evaluated again, it is still there
    assert store.get(layout.owner_report(UID, CLIENT)).decode().count("What attacks find") == 1
    put_samples(
        tmp_path,
        {name: np.zeros((4, 1, 8, 8), np.uint8) for name in ("both", "shared", "personal")} | {"labels": np.arange(4)},
    )
    evaluate.body(audit.evaluate_spec_of(spec))  # of other samples, it says nothing any more
    assert "Not audited" in store.get(layout.owner_report(UID, CLIENT)).decode()


def test_without_held_out_records_the_upload_alone_is_attacked(tmp_path: Path) -> None:
    spec = prepared(tmp_path, holdoutPath=None)
    found = audit.body(spec, lambda share: None)
    assert {each.target for each in found.findings} == {Target.UPLOAD}
    assert "names no held-out records" in found.notes[0]
    assert export_refusals(found) == ["the personal denoiser was not attacked"]
