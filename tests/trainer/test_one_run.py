"""The audit in one run of a shared denoiser: its guesses work, and show too much where noise is missing."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from audited_run import CLIENT, made_up_release
from feddiff_protocol.api import ImageSpec, Timeline, parse
from feddiff_protocol.stages import ReleaseSpec, SampleSpec
from feddiff_trainer import one_run
from feddiff_trainer.findings import OneRun, Target, Verdict

SUMMARY = {"mechanism": "summary", "delta": "1e-5", "clipNorm": "2", "momentClipNorm": "1"}
GAUSSIAN = {"mechanism": "gaussian", "delta": "1e-5", "clipNorm": "2"}
JOBS: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {  # privacy, diffusion, shared
    "summary": (SUMMARY, {"splitSigma": "2"}, {}),
    "summary, closed form": (SUMMARY, {"splitSigma": "2"}, {"denoiser": "closedForm"}),
    "summary, squares": (SUMMARY | {"blockSide": 2}, {"splitSigma": "2"}, {"denoiser": "closedForm"}),
    "gaussian": (GAUSSIAN, {}, {}),
    "privunit": ({"mechanism": "privunit", "clipNorm": "2"}, {"splitSigma": "2"}, {"denoiser": "closedForm"}),
}


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setattr(one_run, "LARGEST_RELEASE", 201)
    monkeypatch.setattr(one_run, "TRAINED_IMAGES", 9_600)
    yield
    torch.set_num_threads(threads)


def specs_of(name: str, epsilon: str) -> tuple[SampleSpec, ReleaseSpec]:
    privacy, diffusion, shared = JOBS[name]
    released = made_up_release(8, privacy | {"epsilon": epsilon}, diffusion)
    document = released.to_wire() | {
        "network": {"baseWidth": 16},
        "shared": {"learningRate": "6e-3"} | shared,
        "personal": {},
        "sampling": {},
        "releases": [{"client": CLIENT, "manifestSha256": "0" * 64}],
        "sharedDenoiserSha256": "0" * 64,
    }
    del document["stage"], document["release"]
    return parse(SampleSpec, document, "spec"), released


def audited(name: str, epsilon: str, scale: float = 1.0) -> OneRun:
    rng, spec = np.random.default_rng(0), specs_of(name, epsilon)
    (found,) = one_run.one_run_of_shared(*spec, lambda shape: scale * rng.standard_normal(shape), lambda share: None)
    return found


@pytest.mark.parametrize("name", JOBS)
def test_a_shared_denoiser_shows_no_more_than_was_promised_and_without_noise_which_image_was_in(name: str) -> None:
    found = audited(name, "8")
    assert found.target is Target.SHARED and (found.canaries, found.guesses) == (200, 20)
    assert found.control_auc >= 0.8 and found.epsilon_low <= found.ceiling < 8
    assert found.verdict is Verdict.OUT_OF_REACH, "twenty guesses cannot refute so large an ε, and it says so"


@pytest.mark.parametrize("name", ["gaussian", "summary, closed form"])
def test_a_shared_denoiser_of_a_release_without_its_noise_is_above_its_bound(name: str) -> None:
    assert audited(name, "0.5").verdict is Verdict.WITHIN
    found = audited(name, "0.5", 0.01)
    assert found.verdict is Verdict.ABOVE and found.epsilon_low > found.epsilon_bound == 0.5


def test_where_no_denoiser_has_an_images_noise_levels_or_images_are_too_large_there_is_no_run_of_it() -> None:
    spec, released = specs_of("gaussian", "8")
    restarted = spec.model_copy(
        update={"diffusion": spec.diffusion.model_copy(update={"timeline": Timeline.RESTARTED})}
    )
    large = {"image": ImageSpec(channels=3, height=64, width=64)}
    private = [each.model_copy(update=large) for each in specs_of("privunit", "8")]
    for asked in ((restarted, released), private):
        assert one_run.one_run_of_shared(*asked, never, never) == []  # type: ignore[arg-type]


def never(*_: object) -> None:
    raise AssertionError("nothing is drawn and nothing told")
