"""The release's own code under attack: it keeps what was promised, and each way to break it shows."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from audited_run import made_up_release
from feddiff_protocol.privunit import best_cap
from feddiff_protocol.promise import promise_of
from feddiff_protocol.stages import ReleaseSpec
from feddiff_trainer import mechanisms, privunit, release, trials
from feddiff_trainer.findings import Finding, Target, Verdict
from feddiff_trainer.mechanisms import clip_l2
from feddiff_trainer.noise import Normals
from feddiff_trainer.verdicts import bound_of_part, finding_of

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


NUM_PARTS = {"gaussian": 1, "summary": 4, "privunit": 2}


def spec_of(name: str, **changes: Any) -> ReleaseSpec:
    return made_up_release(8, PRIVACY[name] | changes, {} if name.startswith("gaussian") else {"splitSigma": "2"})


def seeded(scale: float = 1.0) -> Normals:
    rng = np.random.default_rng(0)
    return lambda shape: scale * rng.standard_normal(shape)


def findings(spec: ReleaseSpec, normals: Normals) -> list[Finding]:
    promise = promise_of(spec.privacy, spec.diffusion)
    return [
        finding_of(Target.UPLOAD, part.attack, *trials.trials(spec, part, normals), part.bound(promise), 1.0)
        for part in trials.parts_of(spec)
    ]


@pytest.mark.parametrize("name", PRIVACY)
def test_every_part_of_a_release_is_within_its_bound_and_noise_reaches_it(name: str) -> None:
    found = findings(spec_of(name), seeded())
    assert [each.verdict for each in found] == [Verdict.WITHIN] * NUM_PARTS[name.partition(",")[0]]
    if name != "privunit":  # whose caps overlap, so that no test reaches the bound of pure ε
        assert all(each.auc.high > each.auc_bound for each in found[:3]), "about a centre of its own no pair is so far"


@pytest.mark.parametrize("name", [name for name in PRIVACY if name != "privunit"])
def test_noise_a_tenth_too_small_is_above_the_bound(name: str) -> None:
    assert {each.verdict for each in findings(spec_of(name), seeded(0.9))[:3]} == {Verdict.ABOVE}


def test_a_clip_before_the_map_is_above_the_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = mechanisms._moment_sums

    def clipped_first(pixels: Any, labels_N: Any, centres_KD: Any, clip_norm: float, map_DD: Any) -> Any:
        assert map_DD is not None
        monkeypatch.setattr(
            mechanisms, "clip_l2", lambda u_ND, norm: clip_l2(u_ND @ np.linalg.inv(map_DD), norm) @ map_DD
        )
        return whole(pixels, labels_N, centres_KD, clip_norm, map_DD)

    monkeypatch.setattr(mechanisms, "_moment_sums", clipped_first)
    (_, moments, *_) = trials.parts_of(spec := spec_of("summary, fine detail"))
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
    assert {found.verdict for found in findings(spec_of("privunit"), seeded())} == {Verdict.ABOVE}


@pytest.mark.parametrize("name", ["summary", "summary, fine detail", "summary, squares"])
@pytest.mark.parametrize(("sums", "seen"), [("mean_std", 2), ("moment_std", 3)])
def test_classes_of_many_records_without_noise_are_above_the_bound(
    name: str, sums: str, seen: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where only classes of one record get their noise, the parts that look at such classes see nothing."""
    whole, promise = mechanisms._with_noise, promise_of((spec := spec_of(name)).privacy, spec.diffusion)

    def noisy_alone(exact_K_: Any, std: float, counts_K: Any, normals: Normals) -> Any:
        chosen = (counts_K > 1) & (std == getattr(promise, sums))
        none = whole(exact_K_, std, counts_K, np.zeros)
        return np.where(chosen[:, None], none, whole(exact_K_, std, counts_K, normals))

    monkeypatch.setattr(mechanisms, "_with_noise", noisy_alone)
    above = [index for index, each in enumerate(findings(spec, seeded())) if each.verdict is Verdict.ABOVE]
    assert above == [seen]


@pytest.mark.parametrize("epsilon", ["2", "10"])
def test_directions_without_noise_are_above_their_own_caps_bound_at_any_epsilon(
    epsilon: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At ε = 10 ten thousand trials say nothing of the promise itself, and the audit says so."""
    monkeypatch.setattr(privunit, "draw_heights", lambda num, cap, bits: np.ones(num))
    ratio, own = findings(spec_of("privunit", epsilon=epsilon), seeded())
    assert ratio.verdict is (Verdict.ABOVE if epsilon == "2" else Verdict.OUT_OF_REACH)
    assert own.verdict is Verdict.ABOVE


def test_directions_that_lie_in_their_caps_a_little_too_often_are_above_the_bound(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    spec = spec_of("privunit", epsilon="10")
    assert findings(spec, seeded())[1].verdict is Verdict.WITHIN
    cap = best_cap(10.0, spec.image.dimensions)
    monkeypatch.setattr(release, "cap_of", lambda *_: replace(cap, probability=1 - 0.8 * (1 - cap.probability)))
    assert findings(spec, seeded())[1].verdict is Verdict.ABOVE


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
