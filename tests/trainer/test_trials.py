"""The release's own code under attack: it keeps what was promised, and each way to break it shows."""

from typing import Any

import numpy as np
import pytest

from audited_run import made_up_release
from feddiff_protocol.privunit import best_cap
from feddiff_protocol.promise import promise_of
from feddiff_protocol.stages import ReleaseSpec
from feddiff_trainer import mechanisms, release, trials
from feddiff_trainer.findings import Finding, Target, Verdict
from feddiff_trainer.mechanisms import clip_l2
from feddiff_trainer.noise import Normals
from feddiff_trainer.verdicts import bound_of, bound_of_part, finding_of

PRIVACY = {
    "gaussian": {"mechanism": "gaussian", "epsilon": "10", "delta": "1e-5", "clipNorm": "4.25"},
    "gaussian, any sign": {
        "mechanism": "gaussian",
        "epsilon": "10",
        "delta": "1e-5",
        "clipNorm": "4.25",
        "pixels": "minusOneToOne",
    },
    "summary": {"mechanism": "summary", "epsilon": "10", "delta": "1e-5", "clipNorm": "2.5", "momentClipNorm": "1.25"},
    "summary, fine detail": {
        "mechanism": "summary",
        "epsilon": "10",
        "delta": "1e-5",
        "clipNorm": "2.5",
        "momentClipNorm": "1.25",
        "frequencyPower": "0.5",
    },
    "summary, squares": {
        "mechanism": "summary",
        "epsilon": "10",
        "delta": "1e-5",
        "clipNorm": "2.5",
        "momentClipNorm": "1.25",
        "blockSide": 2,
    },
    "privunit": {"mechanism": "privunit", "epsilon": "2", "clipNorm": "4"},
}


def spec_of(name: str, **changes: Any) -> ReleaseSpec:
    return made_up_release(8, PRIVACY[name] | changes, {} if name.startswith("gaussian") else {"splitSigma": "2"})


def seeded(scale: float = 1.0) -> Normals:
    rng = np.random.default_rng(0)
    return lambda shape: scale * rng.standard_normal(shape)


def findings(spec: ReleaseSpec, normals: Normals) -> list[Finding]:
    whole = bound_of(promise_of(spec.privacy, spec.diffusion))
    return [
        finding_of(
            Target.UPLOAD,
            part.attack,
            *trials.trials(spec, part, normals),
            whole if part.mu is None else bound_of_part(part.mu),
            1.0,
        )
        for part in trials.parts_of(spec)
    ]


@pytest.mark.parametrize("name", PRIVACY)
def test_every_part_of_a_release_is_within_its_bound_and_noise_reaches_it(name: str) -> None:
    found = findings(spec_of(name), seeded())
    assert [each.verdict for each in found] == [Verdict.WITHIN] * (2 if name.startswith("summary") else 1)
    if name != "privunit":  # whose caps overlap, so that no test reaches the bound of pure ε
        assert all(each.auc.high > each.auc_bound for each in found)


@pytest.mark.parametrize("name", [name for name in PRIVACY if name != "privunit"])
def test_noise_a_tenth_too_small_is_above_the_bound(name: str) -> None:
    assert {each.verdict for each in findings(spec_of(name), seeded(0.9))} == {Verdict.ABOVE}


def test_a_clip_before_the_map_is_above_the_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = mechanisms._moment_sums

    def clipped_first(pixels: Any, labels_N: Any, centres_KD: Any, clip_norm: float, map_DD: Any) -> Any:
        assert map_DD is not None
        monkeypatch.setattr(
            mechanisms, "clip_l2", lambda u_ND, norm: clip_l2(u_ND @ np.linalg.inv(map_DD), norm) @ map_DD
        )
        return whole(pixels, labels_N, centres_KD, clip_norm, map_DD)

    monkeypatch.setattr(mechanisms, "_moment_sums", clipped_first)
    (_, moments) = trials.parts_of(spec := spec_of("summary, fine detail"))
    bound = bound_of_part(moments.mu or 0.0)
    found = finding_of(Target.UPLOAD, moments.attack, *trials.trials(spec, moments, seeded()), bound, 1.0)
    assert found.verdict is Verdict.ABOVE


@pytest.mark.parametrize("name", ["gaussian", "gaussian, any sign", "summary"])
def test_a_clip_that_does_nothing_is_above_the_bound(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mechanisms, "clip_l2", lambda v_ND, clip_norm: v_ND.copy())
    spec = spec_of(name, clipNorm="1")
    assert Verdict.ABOVE in {each.verdict for each in findings(spec, seeded())}


def test_a_cap_for_a_larger_epsilon_is_above_the_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(release, "cap_of", lambda privacy, image: best_cap(8.0, image.dimensions))
    (found,) = findings(spec_of("privunit"), seeded())
    assert found.verdict is Verdict.ABOVE


def test_large_images_are_attacked_in_as_few_pixels_as_the_clip_norm_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes: list[tuple[int, ...]] = []
    monkeypatch.setattr(trials, "TRIALS", 1)

    def normals(shape: tuple[int, ...]) -> np.ndarray:
        shapes.append(shape)
        return np.zeros(shape)

    spec = spec_of("gaussian")
    large = spec.model_copy(update={"image": spec.image.model_copy(update={"height": 512, "width": 512})})
    trials.trials(large, *trials.parts_of(large), normals)
    assert {shape[1] for shape in shapes} == {40}  # 4 × 10, the first with 2·4.25² values


@pytest.mark.parametrize("name", PRIVACY)
def test_every_canary_has_its_own_score_whatever_the_order_of_a_release(name: str) -> None:
    spec = spec_of(name)
    for part in trials.parts_of(spec):
        second_N = np.arange(200) % 3 == 0
        scores_N = trials.canaries(spec, part, second_N, seeded(1e-6 if name != "privunit" else 1.0))
        assert scores_N[second_N].mean() > scores_N[~second_N].mean() + (0.3 if name == "privunit" else 1)
        if name != "privunit":  # next to no noise: the coin is in plain sight
            np.testing.assert_array_equal(scores_N > scores_N.mean(), second_N)
