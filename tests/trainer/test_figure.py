"""The figure of an experiment: points, bars and levels where the numbers say, in a PNG."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from feddiff_protocol.api import parse
from feddiff_protocol.errors import ConfigurationInvalid, OutputFailed
from feddiff_trainer.figure import FigureSpec, _draw_panel, draw


def spec_of(folder: Path, **changes: Any) -> FigureSpec:
    series = [{"label": "ours", "x": [1, 10], "mean": [0.5, 0.7], "std": [0.1, 0.2]}]
    panel = {"title": "recall", "series": series, "levels": [{"label": "local", "mean": 0.4, "std": 0.05}]}
    document = {"title": "study", "xLabel": "ε", "logX": True, "panels": [panel] * 3, "out": str(folder / "figure.png")}
    return parse(FigureSpec, document | changes, "spec")


def test_the_figure_is_a_png_of_all_panels(tmp_path: Path) -> None:
    assert draw(spec_of(tmp_path, attackAuc=[[1, 0.6], [10, 0.9]])) == {"panels": 3}
    with Image.open(tmp_path / "figure.png") as picture:
        assert picture.format == "PNG" and picture.width > 1000


def test_bars_reach_one_standard_deviation_to_both_sides(tmp_path: Path) -> None:
    from matplotlib.figure import Figure

    spec, axis = spec_of(tmp_path), Figure().subplots()
    _draw_panel(axis, spec.panels[0], spec)
    line, _, (bars,) = axis.containers[0]
    assert line.get_xydata().tolist() == [[1, 0.5], [10, 0.7]]
    assert [segment[:, 1].tolist() for segment in bars.get_segments()] == [[0.4, 0.6], pytest.approx([0.5, 0.9])]
    assert axis.get_legend_handles_labels()[1] == ["local", "ours"]
    assert axis.get_xscale() == "log"
    assert [tick.get_text() for tick in axis.get_xticklabels()] == ["1", "10"]


def test_of_one_seed_there_is_no_bar_that_could_be_taken_for_a_small_one(tmp_path: Path) -> None:
    from matplotlib.figure import Figure

    series = [{"label": "ours", "x": [1], "mean": [0.5], "std": [None]}]
    panel = {"title": "recall", "series": series, "levels": [{"label": "local", "mean": 0.4}]}
    spec, axis = spec_of(tmp_path, panels=[panel]), Figure().subplots()
    _draw_panel(axis, spec.panels[0], spec)
    (bars,) = axis.containers[0][2]
    assert not [each for each in bars.get_segments() if len(each) > 1 and np.isfinite(each).all()]
    assert not axis.patches


def test_an_arm_has_its_colour_in_every_panel(tmp_path: Path) -> None:
    """Also where another one was not measured."""
    from matplotlib.figure import Figure

    ours, local = ({"label": label, "x": [1], "mean": [0.5], "std": [None]} for label in ("ours", "local"))
    panels = [{"title": "recall", "series": [ours, local]}, {"title": "coverage", "series": [local]}]
    spec, found = spec_of(tmp_path, panels=panels), {}
    for panel in spec.panels:
        axis = Figure().subplots()
        _draw_panel(axis, panel, spec)
        found[panel.title] = {label: bars[0].get_color() for bars, label in _drawn(axis)}
    assert found["coverage"]["local"] == found["recall"]["local"] != found["recall"]["ours"]


def _drawn(axis: Any) -> Any:
    return zip(*axis.get_legend_handles_labels(), strict=True)


def test_without_matplotlib_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ConfigurationInvalid, match=r"install feddiff\[experiment\]"):
        draw(spec_of(tmp_path))


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(OutputFailed, match=r"figure\.png"):
        draw(spec_of(tmp_path, out=str(tmp_path / "gone" / "figure.png")))
