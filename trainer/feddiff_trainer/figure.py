"""The figure of an experiment: `python -m feddiff_trainer.figure SPEC.json` draws it as PNG with matplotlib.

It knows numbers and names alone; what they are of, the command line has worked out.
"""

import math
import sys
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from feddiff_protocol.api import Text, Wire
from feddiff_protocol.errors import ConfigurationInvalid, OutputFailed

from .answering import answered

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WIDTH, HEIGHT, DPI = 5.2, 3.6, 120  # inches of a panel, dots per inch


class Series(Wire):
    """One arm: points with error bars, where there are several seeds."""

    label: str
    x: tuple[float, ...]
    mean: tuple[float, ...]
    std: tuple[float | None, ...]


class Level(Wire):
    """One arm that does not depend on x."""

    label: str
    mean: float
    std: float | None = None


class Panel(Wire):
    title: str
    series: tuple[Series, ...]
    levels: tuple[Level, ...] = ()


class FigureSpec(Wire):
    title: str
    x_label: str  # empty: arms side by side, and x is their place
    log_x: bool
    panels: Annotated[tuple[Panel, ...], Field(min_length=1)]
    attack_auc: tuple[tuple[float, float], ...] = ()  # drawn on a second axis
    out: Text


def draw(spec: FigureSpec) -> dict[str, Any]:
    """The PNG is at spec.out. Raises ConfigurationInvalid without matplotlib, OutputFailed."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        raise ConfigurationInvalid(
            "a figure needs the package matplotlib, found none; install feddiff[experiment]"
        ) from None
    columns = min(2, len(spec.panels))
    rows = -(-len(spec.panels) // columns)
    figure = Figure(figsize=(columns * WIDTH, rows * HEIGHT + 0.6), dpi=DPI, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for axis, panel in zip(axes, spec.panels, strict=False):
        _draw_panel(axis, panel, spec)
    for axis in axes[len(spec.panels) :]:
        axis.set_axis_off()
    figure.suptitle(spec.title)
    handles = {label: handle for axis in axes for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=3, fontsize="small")
    try:
        figure.savefig(spec.out, metadata={"Software": None})
    except OSError as error:
        raise OutputFailed(f"{spec.out}: cannot be written: {error.strerror}; make room, or name another") from None
    return {"panels": len(spec.panels)}


def colours_of(spec: FigureSpec) -> dict[str, str]:
    """One for each arm, the same in every panel."""
    labels = [series.label for panel in spec.panels for series in panel.series]
    labels += [level.label for panel in spec.panels for level in panel.levels]
    return {label: f"C{number}" for number, label in enumerate(dict.fromkeys(labels))}


def _draw_panel(axis: "Axes", panel: Panel, spec: FigureSpec) -> None:
    colours = colours_of(spec)
    for each in panel.series:
        bars = [math.nan if std is None else std for std in each.std]
        colour = colours[each.label]
        axis.errorbar(each.x, each.mean, yerr=bars, label=each.label, color=colour, marker="o", markersize=4, capsize=3)
    for level in panel.levels:
        colour = colours[level.label]
        axis.axhline(level.mean, label=level.label, linestyle="--", color=colour)
        if level.std is not None:
            axis.axhspan(level.mean - level.std, level.mean + level.std, color=colour, alpha=0.12)
    axis.set_title(panel.title, fontsize="medium")
    axis.set_xlabel(spec.x_label)
    axis.grid(alpha=0.3)
    if not spec.x_label:
        axis.set_xticks([])
    if spec.log_x:
        axis.set_xscale("log")
        ticks = sorted({x for each in panel.series for x in each.x})
        axis.set_xticks(ticks, [f"{x:g}" for x in ticks])
        axis.minorticks_off()
    if spec.attack_auc:
        second = axis.twinx()
        second.plot(*zip(*spec.attack_auc, strict=True), color="grey", linestyle=":")
        second.set_ylabel("best attack's AUC (dotted)", fontsize="small")
        second.set_ylim(0.5, 1)


def main() -> int:
    return answered(FigureSpec, draw, "feddiff experiment")


if __name__ == "__main__":
    sys.exit(main())
