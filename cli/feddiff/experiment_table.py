"""The table and the figure of an experiment, from its rows alone: per arm and cell, mean ± standard deviation over
seeds of the mean over owners, and of the worst owner."""

import importlib.util
import itertools
import json
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from feddiff_protocol.baselines import Baseline
from feddiff_protocol.errors import InputMissing

from .experiment import ROWS, Row
from .experiment_file import EPSILON, Cell
from .owner_stages import run_module
from .run_folder import replace_file

TABLE, FIGURE, FIGURE_MODULE = "table.md", "figure.png", "feddiff_trainer.figure"
LOG_FROM = 10  # times the smallest value: a grid so wide is drawn on a logarithmic axis
NOT_PRIVATE = (
    "**Not private**: measured on every owner's records. For records that may be seen by whoever reads this, such as a"
    " public data set."
)

GAP_CLOSED = (
    "Minority gap closed: (local − arm)/(local − central) in the minority's Fréchet distance, 1 being as good as"
    " `central`; needs one arm of either baseline. A Fréchet distance is one of a small classifier's features, never to"
    " be compared with an FID."
)


@dataclass(frozen=True)
class Column:
    """One measure of one group of classes; `worst` picks the worst owner's value."""

    title: str
    group: str
    measure: str
    worst: Callable[[Iterable[float]], float]


COLUMNS = (
    Column("recall, minority", "minority", "recall", min),
    Column("recall, majority", "majority", "recall", min),
    Column("Fréchet, minority", "minority", "frechet", max),
    Column("Fréchet, majority", "majority", "frechet", max),
    Column("Fréchet, pooled", "pooled", "frechet", max),
    Column("coverage", "pooled", "coverage", min),
    Column("density", "pooled", "density", min),
    Column("told apart", "pooled", "two_sample_accuracy", max),
    Column("copies ½, minority", "minority", "copies_half", max),
)
MINORITY_DISTANCE = next(column for column in COLUMNS if column.title == "Fréchet, minority")
DRAWN = (
    "recall, minority",
    "recall, majority",
    "Fréchet, minority",
    "Fréchet, pooled",
    "Fréchet, majority",
    "coverage",
)
PANELS = 4  # the first of these that were measured: where classes are dealt evenly, there is no minority


@dataclass(frozen=True)
class Line:
    """The rows of one arm in one cell, one for each seed."""

    arm: str
    cell: Cell
    rows: tuple[Row, ...]

    def over_owners(self, column: Column, pick: Callable[[Iterable[float]], float] = mean) -> list[float]:
        """One value for each seed in which the measure could be taken at any owner."""
        by_seed = [
            [value for owner in row.owners.values() if (value := _value(owner, column)) is not None]
            for row in self.rows
        ]
        return [pick(values) for values in by_seed if values]


def lines_of(rows: Sequence[Row]) -> list[Line]:
    """In the order of the rows."""
    found: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        found.setdefault((row.arm, json.dumps(row.cell, sort_keys=True)), []).append(row)
    return [Line(of_line[0].arm, of_line[0].cell, tuple(of_line)) for of_line in found.values()]


def _value(groups: Mapping[str, Mapping[str, float | None]], column: Column) -> float | None:
    return groups.get(column.group, {}).get(column.measure)


def fields_of(rows: Iterable[Row]) -> list[str]:
    """The grid's fields, in the file's order."""
    return list(dict.fromkeys(field for row in rows for field in row.cell))


def write_results(rows: Sequence[Row], out: Path) -> list[Path]:
    """table.md and, where matplotlib is installed, figure.png lie in `out`; their paths and that of the rows."""
    if not rows:
        raise InputMissing(f"{out / ROWS}: expected the rows of an experiment, found none; run it first")
    replace_file(out / TABLE, table(rows))
    written = [out / ROWS, out / TABLE]
    if importlib.util.find_spec("matplotlib") is None:
        print("feddiff: no figure: it needs matplotlib; pip install 'feddiff[experiment]'", file=sys.stderr)
        return written
    with tempfile.TemporaryDirectory(prefix="feddiff-") as folder:
        path = Path(folder) / "spec.json"
        path.write_text(json.dumps(figure_document(rows, out / FIGURE)))
        run_module(FIGURE_MODULE, path)
    return [*written, out / FIGURE]


# ---- The table --------------------------------------------------------------------------------------------------


def table(rows: Sequence[Row]) -> str:
    """Markdown, with how it came about."""
    lines = lines_of(rows)
    means = [[spread(line.over_owners(column)) for column in COLUMNS] for line in lines]
    worst = [[spread(line.over_owners(column, column.worst)) for column in COLUMNS] for line in lines]
    closed = [[spread(gaps_closed(line, rows))] for line in lines]
    titles = [column.title for column in COLUMNS]
    parts = [f"# {rows[0].experiment}", NOT_PRIVATE, _provenance(rows), "## Mean over owners"]
    with_gaps = [figures + gap for figures, gap in zip(means, closed, strict=True)]
    parts.append(_markdown(rows, lines, [*titles, "minority gap closed"], with_gaps))
    parts += [GAP_CLOSED, "## Worst owner", _markdown(rows, lines, titles, worst)]
    return "\n\n".join(parts) + "\n"


def _markdown(rows: Sequence[Row], lines: Sequence[Line], titles: Sequence[str], figures: Sequence[list[str]]) -> str:
    fields = fields_of(rows)
    head = ["arm", *fields, "what leaves an owner", "seeds", *titles]
    body = [
        [
            line.arm,
            *(_shown(line.cell.get(field, "–")) for field in fields),
            promised(line.rows[0]),
            str(len(line.rows)),
            *of_line,
        ]
        for line, of_line in zip(lines, figures, strict=True)
    ]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [head, ["---"] * len(head), *body])


def gaps_closed(line: Line, rows: Sequence[Row]) -> list[float]:
    """(local - arm)/(local - central) in the minority's Fréchet distance, mean over owners: one value for each seed
    that has all three and a gap."""
    found = []
    for row in line.rows:
        local, central = (_distance_beside(row, rows, baseline) for baseline in (Baseline.LOCAL, Baseline.CENTRAL))
        own = _distance(row)
        if own is not None and local is not None and central is not None and local != central:
            found.append((local - own) / (local - central))
    return found


def _distance_beside(row: Row, rows: Sequence[Row], baseline: Baseline) -> float | None:
    """Of the baseline with the same seed, in the cell that it shares with the row; None where several arms are it."""
    found = [
        other
        for other in rows
        if other.baseline is baseline
        and other.seed == row.seed
        and all(row.cell.get(field) == value for field, value in other.cell.items())
    ]
    return _distance(found[0]) if len({other.arm for other in found}) == 1 else None


def _distance(row: Row) -> float | None:
    values = Line(row.arm, row.cell, (row,)).over_owners(MINORITY_DISTANCE)
    return values[0] if values else None


def spread(values: Sequence[float]) -> str:
    """Mean ± sample standard deviation; of one seed there is none, and nobody should think it small."""
    if not values:
        return "–"
    return f"{mean(values):.3f} ± {stdev(values):.3f}" if len(values) > 1 else f"{values[0]:.3f}"


def promised(row: Row) -> str:
    made = row.promise
    if made is None:
        return row.baseline.leaves if row.baseline is not None else "unknown"
    attack = f", best attack's AUC {made.attack_auc:.3f}" if made.attack_auc is not None else ""
    return f"{made.mechanism}: ε = {made.epsilon} per {made.unit}, δ = {made.delta}, k = {made.releases}{attack}"


def _provenance(rows: Sequence[Row]) -> str:
    def each(values: Iterable[object]) -> str:
        return ", ".join(dict.fromkeys(str(value) for value in values if value)) or "unknown"

    versions = (f"{name} {version}" for row in rows for name, version in row.versions.items())
    steps = (f"{name} {count:,}" for row in rows for name, count in row.image_steps.items() if count)
    return (
        f"Mean ± standard deviation over seeds {each(str(row.seed) for row in rows)}. Image-steps: {each(steps)}."
        f" Commit {each(row.commit for row in rows)}; {each(versions)};"
        f" {each(f'{row.cores} cores of {row.cpu}' for row in rows)};"
        f" {sum(row.seconds for row in rows):,.0f} s of stages."
    )


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


# ---- The figure -------------------------------------------------------------------------------------------------


def figure_document(rows: Sequence[Row], out: Path) -> dict[str, Any]:
    """What feddiff_trainer.figure draws: quality against the grid's first numeric field, with error bars; arms that do
    not depend on it are levels. Without such a field, arms side by side."""
    field = numeric_field(rows)
    xs = sorted({x for row in rows if (x := _number(row.cell.get(field))) is not None}) if field else []
    by_title = {column.title: column for column in COLUMNS}
    drawn = [_panel(rows, by_title[title], field) for title in DRAWN]
    panels = [each for each in drawn if each["series"] or each["levels"]][:PANELS] or drawn[:1]
    return {
        "title": rows[0].experiment,
        "xLabel": _named(rows, field) if field else "",
        "logX": len(xs) > 1 and xs[0] > 0 and xs[-1] >= LOG_FROM * xs[0],
        "panels": panels,
        "attackAuc": _attack_auc(rows, field),
        "out": str(out.resolve()),
    }


def _named(rows: Sequence[Row], field: str) -> str:
    """The field, ε with the rest of what is promised by the rows."""
    promises = dict.fromkeys(
        f"per {row.promise.unit}, δ = {row.promise.delta}, k = {row.promise.releases}" for row in rows if row.promise
    )
    return f"{field} ({'; '.join(promises)})" if field == EPSILON and promises else field


def numeric_field(rows: Sequence[Row]) -> str | None:
    """The first field of the grid that has numbers only, two of them at least."""
    for field in fields_of(rows):
        values = [_number(row.cell[field]) for row in rows if field in row.cell]
        if None not in values and len(set(values)) > 1:
            return field
    return None


def _number(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        return float(value)
    except ValueError:
        return None


def _panel(rows: Sequence[Row], column: Column, field: str | None) -> dict[str, Any]:
    series: dict[str, list[tuple[float, list[float]]]] = {}
    levels = []
    for line, number in zip(lines_of(rows), itertools.count(), strict=False):
        label = ", ".join(
            [line.arm, *(f"{name}={_shown(value)}" for name, value in line.cell.items() if name != field)]
        )
        if not (values := line.over_owners(column)):
            continue
        if field is None:
            series[label] = [(float(number), values)]
        elif field in line.cell:
            x = _number(line.cell[field])
            assert x is not None
            series.setdefault(label, []).append((x, values))
        else:
            levels.append({"label": label, "mean": mean(values), "std": _std(values)})
    return {
        "title": column.title,
        "series": [_series(label, sorted(points)) for label, points in series.items()],
        "levels": levels,
    }


def _series(label: str, points: Sequence[tuple[float, list[float]]]) -> dict[str, Any]:
    return {
        "label": label,
        "x": [x for x, _ in points],
        "mean": [mean(values) for _, values in points],
        "std": [_std(values) for _, values in points],
    }


def _std(values: Sequence[float]) -> float | None:
    return stdev(values) if len(values) > 1 else None


def _attack_auc(rows: Sequence[Row], field: str | None) -> list[list[float]]:
    """(x, area under the curve of the best possible attack), where it is known and the same for all arms, and moves."""
    found: dict[float, set[float | None]] = {}
    for row in rows:
        if field is not None and (x := _number(row.cell.get(field))) is not None:
            found.setdefault(x, set()).add(row.promise.attack_auc if row.promise is not None else 0.5)
    same = all(len(values) == 1 and None not in values for values in found.values())
    points = [[x, auc] for x, values in sorted(found.items()) for auc in values if auc is not None]
    return points if same and len({auc for _, auc in points}) > 1 else []
