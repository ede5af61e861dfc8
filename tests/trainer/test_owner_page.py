"""The owner report shows what there is, says honestly what each arm gains or loses, and warns whoever opens it."""

import re
from decimal import Decimal
from typing import Any

import numpy as np
import pytest

from feddiff_protocol.api import (
    ClassesSpec,
    DiffusionSpec,
    ImageSpec,
    NetworkSpec,
    PersonalSpec,
    PrivacySpec,
    SamplingSpec,
    SharedSpec,
    SourceSpec,
    parse,
)
from feddiff_protocol.promise import promise_of
from feddiff_protocol.stages import EvaluateSpec, JobReference, ReleaseReference
from feddiff_trainer.evaluation import GROUPS, MEASURES, ArmQuality, Evaluation, Measured, PictureRow
from feddiff_trainer.owner_page import CLASS_ROWS, Gallery, OwnerReport, owner_page, shown_classes
from feddiff_trainer.pictures import grid

SUMMARY = {"mechanism": "summary", "epsilon": "10", "delta": "1e-5", "clipNorm": "4.25", "momentClipNorm": "2.5"}
COLUMNS = ("real", "released", "shared", "personal", "both")


def spec_of(**changes: Any) -> EvaluateSpec:
    fields = {
        "job": JobReference(uid="0123abcd", name="digits", namespace="research"),
        "attempt": 1,
        "client": "clinic-a",
        "source": SourceSpec(format="npz", path="/train.npz", holdout_path="/holdout.npz"),
        "image": ImageSpec(channels=1, height=8, width=8),
        "classes": ClassesSpec(count=2, records=(40, 5), names=("zero", "one")),
        "privacy": parse(PrivacySpec, SUMMARY, "privacy"),
        "diffusion": parse(DiffusionSpec, {"splitSigma": "0.25"}, "diffusion"),
        "network": NetworkSpec(),
        "shared": parse(SharedSpec, {}, "shared"),
        "personal": PersonalSpec(),
        "sampling": SamplingSpec(),
        "releases": (ReleaseReference(client="clinic-a", manifest_sha256="a" * 64),),
        "owner_store": "file:///owner",
        "federation_store": "file:///federation",
    }
    return EvaluateSpec(**(fields | changes))


def quality(recall: float, frechet: float | None = 2.0, num_classes: int = 2) -> ArmQuality:
    values = {measure.key: 0.5 for measure in MEASURES} | {"recall": recall, "frechet": frechet}
    return ArmQuality(groups=dict.fromkeys(GROUPS, values), per_class=(values,) * num_classes)


ARMS = {"both": quality(0.9), "shared": quality(0.7), "personal": quality(0.8), "real": quality(0.95)}
MEASURED = Measured(
    num_samples=200, num_train=45, num_holdout=50, nearest_neighbours=5, seed=0, extractor="small classifier"
)


def evaluation_of(spec: EvaluateSpec, **changes: Any) -> Evaluation:
    promise = promise_of(spec.privacy, spec.diffusion)
    row = grid(np.zeros((2, 1, 8, 8), np.uint8), 2)
    fields = {
        "job": spec.job,
        "client": spec.client,
        "records_sha256": "b" * 64,
        "finished_at": "2026-01-02T03:04:05+00:00",
        "mechanism": spec.privacy.mechanism,
        "epsilon": spec.privacy.epsilon,
        "delta": spec.privacy.delta,
        "mu_squared": promise.charge.mu_squared,
        "split_step": promise.split_step,
        "split_sigma": promise.split_sigma,
        "measured": MEASURED,
        "arms": ARMS,
        "picture": PictureRow(png_base64="", width=row.width, height=row.height),
    }
    return Evaluation(**(fields | changes))


def report_of(
    spec: EvaluateSpec | None = None,
    others: tuple[Evaluation, ...] = (),
    minority: tuple[int, ...] = (1,),
    **changes: Any,
) -> OwnerReport:
    spec = spec or spec_of()
    images = [np.zeros((min(8, n), 1, 8, 8), np.uint8) for n in spec.classes.records]
    return OwnerReport(
        spec=spec,
        promise=promise_of(spec.privacy, spec.diffusion),
        evaluation=evaluation_of(spec, **changes),
        others=others,
        minority=minority,
        gallery=Gallery(dict.fromkeys(COLUMNS, images), "what the released pictures are"),
    )


def text_of(report: OwnerReport) -> str:
    page = owner_page(report).decode()
    return re.sub(r"\s+", " ", re.sub(r"<style>.*?</style>|<[^>]+>", " ", page, flags=re.DOTALL))


def test_the_page_opens_with_who_may_have_it_and_what_was_promised() -> None:
    text = text_of(report_of())
    warning, promise = (
        text.index("Stays with the owner: contains real images."),
        text.index("ε = 10 per image, δ = 1e-5"),
    )
    assert warning < promise < text.index("Side by side")


def test_every_class_has_a_picture_of_every_column() -> None:
    page = owner_page(report_of()).decode()
    alts = re.findall(r'alt="(\d) images, ([a-z ]+), (\w+)"', page)
    titles = ["real", "released", "shared alone", "personal alone", "both"]
    assert alts == [(str(n), title, name) for n, name in ((8, "zero"), (5, "one")) for title in titles]
    assert page.count('class="rare"') == 2  # beside its pictures and in the table of classes


def test_rare_classes_are_pictured_first_when_there_are_many() -> None:
    classes = ClassesSpec(count=50, records=(40,) * 50)
    shown = shown_classes(classes, [30, 49])
    assert len(shown) == CLASS_ROWS and shown[-2:] == [30, 49] and shown == sorted(shown)


def test_gains_and_losses_are_said_in_the_same_words() -> None:
    text = text_of(report_of())
    assert "Minority classes: better in recall (80.0% → 90.0%)" in text
    assert "Minority classes: worse in recall (80.0% → 70.0%)" in text


def test_the_yardstick_says_that_it_saw_the_releases_too() -> None:
    assert "it is more than what you would have without the others" in text_of(report_of())
    alone = spec_of(personal=PersonalSpec(release_share="0"))
    assert "it is what you would have without the others" in text_of(report_of(alone))


def test_without_a_holdout_the_page_says_what_to_add() -> None:
    text = text_of(report_of(measured=None, arms={}))
    assert "Quality was not measured" in text and "spec.source.holdoutPath" in text
    assert "All figures" not in text


def test_what_could_not_be_measured_is_a_dash_and_no_verdict() -> None:
    arms = ARMS | {"both": quality(0.9, frechet=None)}
    page = owner_page(report_of(arms=arms)).decode()
    assert '<td class="empty">–</td>' in page
    assert "Fréchet distance (" not in page


def test_two_jobs_are_two_releases_and_add_up() -> None:
    other = evaluation_of(spec_of(job=JobReference(uid="other-uid", name="paper", namespace="research")))
    text = text_of(report_of(others=(other,)))
    assert "2 releases and ε = 15.46 per image" in text
    assert text.index("paper") < text.index("digits this job")


def test_names_cannot_become_markup() -> None:
    attack = '"><img src=x onerror=alert(1)>'
    spec = spec_of(classes=ClassesSpec(count=2, records=(40, 5), names=(attack, "</style><script>")))
    page = owner_page(report_of(spec)).decode()
    assert page.count("<img") == 10 and "<script" not in page and page.count("</style>") == 1


@pytest.mark.parametrize("minority", [(), (1,)], ids=["balanced", "with a rare class"])
def test_groups_are_shown_only_where_classes_differ(minority: tuple[int, ...]) -> None:
    assert ("Majority classes" in text_of(report_of(minority=minority))) is bool(minority)


def test_the_share_of_releases_is_shown_in_whole_percent() -> None:
    assert "33% of each batch" in text_of(report_of(spec_of(personal=PersonalSpec(release_share=Decimal("0.333")))))


def test_the_page_is_one_file_of_moderate_size() -> None:
    names = tuple(f"class number {k}" for k in range(1000))
    many = spec_of(classes=ClassesSpec(count=1000, records=(40,) * 1000, names=names))
    arms = {arm: quality(0.5, num_classes=1000) for arm in ("both", "shared", "personal")}
    page = owner_page(report_of(many, minority=(), arms=arms))
    assert len(page) < 2_000_000
    assert b"980 more classes are not pictured" in page
    assert not re.search(rb'(src|href)="(?!data:)', page)
