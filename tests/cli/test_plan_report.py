"""The paper's two versions as examples: `feddiff plan` says what the paper says, and what that is for an image."""

import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples" / "paper"
Plan = Callable[..., tuple[int, str]]


@pytest.fixture
def plan(tmp_path: Path, feddiff: Callable[..., tuple[int, str, str]]) -> Plan:
    """`feddiff plan` of an example, with other text in places; returns (exit code, stdout)."""

    def run(name: str, *options: str, **changes: str) -> tuple[int, str]:
        owners, job = (Path(shutil.copy(EXAMPLES / file, tmp_path)) for file in ("owners.yaml", name))
        text = job.read_text()
        for field, value in changes.items():
            text, count = re.subn(rf'{field}: "[^"]*"', f'{field}: "{value}"', text)
            assert count == 1
        job.write_text(text)
        code, out, _ = feddiff("plan", owners, job, *options)
        return code, out

    return run


def first_client(plan: Plan, name: str, **changes: str) -> dict[str, Any]:
    return dict(json.loads(plan(name, "--json", **changes)[1])["clients"][0])


# What the paper's formula says of one pixel at its splits, and what an image of 3,072 pixels is at there: exactly,
# from μ·√3072.
PIXELS = {400: (5.21, "1722"), 300: (9.09, "4418"), 200: (17.21, "12532"), 100: (45.7, "54912")}


@pytest.mark.parametrize("step", PIXELS)
def test_the_first_version_is_the_papers_epsilon_per_pixel_and_another_one_per_image(plan: Plan, step: int) -> None:
    published, asked = PIXELS[step]
    found = first_client(plan, "v1.yaml", epsilon=asked)
    assert found["split"]["step"] == step
    assert found["onePixel"]["unit"] == "pixel" and found["unit"] == "image"
    assert found["onePixel"]["paperEpsilon"] == pytest.approx(published, abs=0.05 if step == 100 else 0.005)
    assert found["mu"] == pytest.approx(found["onePixel"]["mu"] * math.sqrt(3072), rel=1e-3)
    assert float(found["epsilon"]) > 300 * found["onePixel"]["epsilon"]


def test_the_first_versions_example_says_in_words_what_one_pixel_is_for_an_image(plan: Plan) -> None:
    code, out = plan("v1.yaml")
    assert code == 0
    (line,) = (line for line in out.splitlines() if "per pixel" in line)
    assert "ε = 1722 per image is ε = 4.3003 per pixel (paper's formula: 5.2106), δ = 1e-5, 1 release" in line
    assert line.rstrip().endswith("one of 3072 values, the others known")
    assert "none: no image of 3072 values in [-1, 1] is longer than 55.4257" in out
    assert "step 400 of 1000" in out


@pytest.mark.parametrize(
    ("epsilon", "step", "published", "tolerance"), [("8.774", 690, 10.24, 0.005), ("89.67", 400, 95.7, 0.06)]
)
def test_the_second_version_is_the_papers_epsilon_per_image(
    plan: Plan, epsilon: str, step: int, published: float, tolerance: float
) -> None:
    found = first_client(plan, "clipped.yaml", epsilon=epsilon)
    assert found["split"]["step"] == step
    assert found["paperEpsilon"] == pytest.approx(published, abs=tolerance)


def test_the_second_version_at_ten_exactly_needs_step_675(plan: Plan) -> None:
    assert first_client(plan, "clipped.yaml", epsilon="10")["split"]["step"] == 675
    assert "images to norm 10, pixels in [-1, 1]" in plan("clipped.yaml")[1]


@pytest.mark.parametrize("name", ["v1.yaml", "clipped.yaml"])
def test_no_line_of_a_plan_has_an_epsilon_per_pixel_without_the_images(plan: Plan, name: str) -> None:
    lines = [line for line in plan(name)[1].splitlines() if "pixel" in line and "ε" in line]
    assert len(lines) == 1 and all("per pixel" in line and "per image" in line for line in lines)
