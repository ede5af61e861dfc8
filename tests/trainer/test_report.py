"""The job report says the promise exactly, and holds no image but the shared denoiser's."""

import ast
import base64
import hashlib
import io
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from PIL import Image

from feddiff_protocol import accountant, layout
from feddiff_protocol.api import ClassesSpec, DiffusionSpec, ImageSpec, PrivacySpec, SharedSpec, parse
from feddiff_protocol.errors import DataInvalid, SpecInvalid
from feddiff_protocol.privunit import best_cap
from feddiff_protocol.promise import NOT_COVERED, promise_of
from feddiff_protocol.stages import BudgetLine, Duration, JobReference, ReleaseReference, ReportSpec
from feddiff_trainer import report
from feddiff_trainer.stores import open_store

DENOISER = b"weights"
SUMMARY = {"mechanism": "summary", "epsilon": "10", "delta": "1e-5", "clipNorm": "4.25", "momentClipNorm": "2.5"}
GAUSSIAN = {"mechanism": "gaussian", "epsilon": "10", "delta": "1e-5", "clipNorm": "4.25"}


def spec_of(folder: Path, privacy: dict[str, Any] = SUMMARY, **changes: Any) -> ReportSpec:
    splits = privacy["mechanism"] != "gaussian"
    fields = {
        "job": JobReference(uid="0123abcd", name="digits", namespace="research"),
        "attempt": 1,
        "releases": tuple(ReleaseReference(client=name, manifest_sha256=name * 64) for name in ("a", "b")),
        "image": ImageSpec(channels=1, height=8, width=8),
        "classes": ClassesSpec(count=2, records=(40, 5), names=("zero", "one")),
        "privacy": parse(PrivacySpec, privacy, "privacy"),
        "diffusion": parse(DiffusionSpec, {"splitSigma": "0.25"} if splits else {}, "diffusion"),
        "shared": parse(SharedSpec, {}, "shared"),
        "budgets": (budget_of("a"), budget_of("b")),
        "durations": (Duration(stage="train-shared", attempts=1, milliseconds=61_000),),
        "command": "feddiff run job.yaml",
        "shared_denoiser_sha256": hashlib.sha256(DENOISER).hexdigest(),
        "federation_store": folder.as_uri(),
    }
    return ReportSpec(**(fields | changes))


def budget_of(client: str) -> BudgetLine:
    return BudgetLine(
        client=client,
        budget_epsilon="20",
        spent_epsilon="15.46",
        remaining_epsilon="9.87",
        delta="1e-5",
        num_releases=2,
    )


def shared_images() -> np.ndarray[Any, np.dtype[np.uint8]]:
    return np.random.default_rng(0).integers(0, 256, (6, 1, 8, 8), dtype=np.uint8)


def written_page(folder: Path, spec: ReportSpec, denoiser: bytes = DENOISER) -> str:
    store = open_store(folder.as_uri())
    tensors = {"images": shared_images(), "labels": np.array([0, 0, 0, 0, 1, 1])}
    store.put(layout.shared_samples(spec.job.uid), safetensors.numpy.save(tensors))
    store.put(layout.shared_denoiser(spec.job.uid), denoiser)
    outputs = report.body(spec)
    page = store.get(layout.job_report(spec.job.uid))
    assert outputs == {"report": hashlib.sha256(page).hexdigest()}
    return page.decode()


def text_of(page: str) -> str:
    return re.sub(r"\s+", " ", re.sub(r"<style>.*?</style>|<[^>]+>", " ", page, flags=re.DOTALL))


@pytest.mark.parametrize("privacy", [SUMMARY, GAUSSIAN], ids=["summary", "gaussian"])
def test_the_page_states_the_promise_in_every_number(tmp_path: Path, privacy: dict[str, Any]) -> None:
    spec = spec_of(tmp_path, privacy)
    text, promise = text_of(written_page(tmp_path, spec)), promise_of(spec.privacy, spec.diffusion)
    for number in (
        "ε = 10 per image, δ = 1e-5, k = 1 release per owner",
        f"{promise.mu:.4f}",
        f"{accountant.epsilon_of(promise.mu, 1e-5):.4f}",
        f"{accountant.paper_epsilon(promise.mu, 1e-5):.4f}",
        f"{accountant.attack_auc(promise.mu):.3f}",
        f"{accountant.attack_tpr(promise.mu, 0.01):.1%} found at 1% false alarms",
        f"step {promise.split_step} of 1000",
        "4.25",
        f"{promise.mean_std or promise.split_sigma:.4g}",
    ):
        assert number in text
    for exception in NOT_COVERED:
        assert exception in text.replace("&#x27;", "'")


def test_the_page_states_a_pure_promise_in_every_number(tmp_path: Path) -> None:
    privacy = {"mechanism": "privunit", "epsilon": "2", "clipNorm": "4.25"}
    text, cap = text_of(written_page(tmp_path, spec_of(tmp_path, privacy))), best_cap(2.0, 64)
    for number in (
        "ε = 2 per image, δ = 0, k = 1 release per owner",
        "what ε = 2 per image allows (δ = 0, one release from each owner)",
        "pure ε: δ = 0",
        "area under the curve 0.881; 7.4% found at 1% false alarms",
        "4.25: every image is scaled to it",
        f"standard deviation {cap.noise_std(4.25):.4g} per pixel of an image",
        f"with probability {cap.probability:.4f}",
    ):
        assert number in text
    assert "μ (Gaussian" not in text and "paper" not in text


def test_the_page_shows_budgets_durations_command_and_hashes(tmp_path: Path) -> None:
    spec = spec_of(tmp_path)
    text = text_of(written_page(tmp_path, spec))
    for found in ("15.46", "9.87", "1 min 01 s", "feddiff run job.yaml", "a" * 64, spec.shared_denoiser_sha256):
        assert found in text


def test_what_is_left_of_pure_epsilon_is_said_where_some_was_set_aside(tmp_path: Path) -> None:
    budgets = (budget_of("a"), budget_of("b").model_copy(update={"remaining_pure_epsilon": "3"}))
    text = text_of(written_page(tmp_path, spec_of(tmp_path, budgets=budgets)))
    assert text.count("9.87") == 2 and text.count("9.87, pure 3") == 1


def test_the_pages_only_pictures_are_the_shared_denoisers_samples(tmp_path: Path) -> None:
    page = written_page(tmp_path, spec_of(tmp_path))
    sheets = [Image.open(io.BytesIO(base64.b64decode(data))) for data in re.findall(r"base64,([^\"]+)\"", page)]
    assert len(sheets) == 2 == page.count("<img")
    shown = {tile for sheet in sheets for tile in tiles_of(sheet)}
    assert shown == {image.tobytes() for image in shared_images()}


def tiles_of(sheet: Image.Image) -> list[bytes]:
    """The 8×8 images of a grid, as bytes."""
    corners = [(left, top) for top in range(0, sheet.height, 9) for left in range(0, sheet.width, 9)]
    tiles = [np.asarray(sheet.crop((left, top, left + 8, top + 8))) for left, top in corners]
    return [tile[..., 0].tobytes() for tile in tiles if tile[..., 3].all()]


def test_a_report_spec_has_no_way_to_an_owners_store() -> None:
    assert not [name for name in ReportSpec.model_fields if "owner" in name or "source" in name]
    with pytest.raises(SpecInvalid):
        parse(ReportSpec, spec_of(Path("/x")).to_wire() | {"ownerStore": "file:///owner"}, "spec")


def test_the_stage_reads_only_the_shared_objects_of_the_federation_store() -> None:
    keys = called_of_layout(Path(report.__file__).read_text())
    assert keys == {"shared_samples", "shared_denoiser", "job_report"}


def test_the_same_reading_finds_an_owners_object() -> None:
    assert "samples" in called_of_layout("store.get(layout.samples(uid, client))")


def called_of_layout(source: str) -> set[str]:
    """Names of the functions of `layout` that a module calls."""
    calls = [node.func for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    attributes = [call for call in calls if isinstance(call, ast.Attribute) and isinstance(call.value, ast.Name)]
    return {call.attr for call in attributes if isinstance(call.value, ast.Name) and call.value.id == "layout"}


def test_another_denoiser_than_the_jobs_own_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataInvalid, match="somebody replaced it"):
        written_page(tmp_path, spec_of(tmp_path), denoiser=b"other weights")


def test_names_cannot_become_markup(tmp_path: Path) -> None:
    attack = "<img src=x onerror=alert(1)>"
    classes = ClassesSpec(count=2, records=(40, 5), names=(attack, "</style><script>"))
    page = written_page(tmp_path, spec_of(tmp_path, classes=classes, command=attack))
    assert page.count("<img") == 2 and "<script" not in page and page.count("</style>") == 1


@pytest.mark.parametrize(
    ("milliseconds", "words"),
    [(0, "0.0 s"), (59_949, "59.9 s"), (59_960, "1 min 00 s"), (125_000, "2 min 05 s"), (7_620_000, "2 h 07 min")],
)
def test_durations_read_as_people_say_them(milliseconds: int, words: str) -> None:
    assert report.duration(milliseconds) == words


@pytest.mark.parametrize(
    ("given", "words"), [("10", "10"), ("1e-5", "1e-5"), ("0.00001", "1e-5"), ("0.25", "0.25"), ("1000", "1000")]
)
def test_decimal_numbers_are_written_the_short_way(given: str, words: str) -> None:
    assert report.tidy(report.Decimal(given)) == words
