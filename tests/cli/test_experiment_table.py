"""Table and figure of an experiment: means and spreads by hand, from rows and nothing else."""

import math
from pathlib import Path
from typing import Any

import pytest

from feddiff.experiment import PromiseMade, Row
from feddiff.experiment_table import COLUMNS, figure_document, numeric_field, spread, table
from feddiff_protocol.baselines import Baseline


def row(arm: str = "ours", seed: int = 0, cell: dict[str, Any] | None = None, **recall: float) -> Row:
    """A row with one measure of the minority, by owner."""
    owners = {owner: {"minority": {"recall": value, "frechet": None}} for owner, value in recall.items()}
    made = PromiseMade(mechanism="summary", epsilon="10", delta="1e-5", unit="image", releases=1, attack_auc=0.9214)
    return Row(
        experiment="study",
        arm=arm,
        cell=cell or {},
        seed=seed,
        promise=made,
        owners=owners,
        image_steps={"shared": 500, "personal": 1000},
        seconds=2.5,
        versions={"torch": "2.9"},
        commit="abc",
        cpu="a cpu",
        cores=2,
        finished_at="2026-01-01T00:00:00+00:00",
        asked="0" * 64,
    )


ROWS = [row(seed=0, a=0.5, b=0.7), row(seed=1, a=0.7, b=0.9), row("other", a=0.25, b=0.5)]


def cells_of(text: str, arm: str) -> list[list[str]]:
    """The arm's row in each of the tables."""
    lines = [line for line in text.splitlines() if line.startswith(f"| {arm} |")]
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]


def test_the_table_is_mean_and_spread_over_seeds_of_mean_and_worst_over_owners() -> None:
    mean, worst = cells_of(table(ROWS), "ours")
    assert mean[2:4] == ["2", f"0.700 ± {math.sqrt(0.02):.3f}"]  # 0.6 and 0.8
    assert worst[3] == f"0.600 ± {math.sqrt(0.02):.3f}"  # 0.5 and 0.7


def test_one_seed_has_no_spread_and_what_was_not_measured_is_a_dash() -> None:
    mean, worst = cells_of(table(ROWS), "other")
    assert (mean[3], worst[3]) == ("0.375", "0.250")
    assert set(mean[4:]) == {"–"}
    assert spread([]) == "–" and spread([0.5]) == "0.500"


def distances(arm: str, seed: int, *values: float, **fields: Any) -> Row:
    owners = {str(number): {"minority": {"frechet": value}} for number, value in enumerate(values)}
    return row(arm, seed, a=0.5).model_copy(update={"owners": owners, **fields})


def test_the_minority_gap_is_closed_between_local_and_central_of_the_same_seed() -> None:
    local, central = {"baseline": Baseline.LOCAL, "promise": None}, {"baseline": Baseline.CENTRAL, "promise": None}
    rows = [
        *(distances("ours", seed, value, value, cell={"privacy.epsilon": "1"}) for seed, value in ((0, 4.0), (1, 3.0))),
        *(distances("local", seed, 4.0, 8.0, **local) for seed in (0, 1)),  # means 6
        *(distances("all", seed, 1.0, 3.0, **central) for seed in (0, 1)),  # means 2
        distances("unmatched", 7, 1.0),
    ]
    text = table(rows)
    assert cells_of(text, "ours")[0][-1] == f"0.625 ± {math.sqrt(0.03125):.3f}"  # 0.5 and 0.75
    assert (cells_of(text, "local")[0][-1], cells_of(text, "all")[0][-1]) == ("0.000 ± 0.000", "1.000 ± 0.000")
    assert cells_of(text, "unmatched")[0][-1] == "–"
    assert "NOT PRIVATE" in cells_of(text, "all")[0][2] and cells_of(text, "local")[0][2] == "nothing"


def test_of_two_baselines_of_one_kind_neither_says_how_much_of_the_gap_is_closed() -> None:
    baselines = [(Baseline.LOCAL, "local", 4.0), (Baseline.CENTRAL, "central", 2.0), (Baseline.LOCAL, "wide", 3.0)]
    rows = [distances("ours", 0, 2.5)]
    rows += [distances(name, 0, value, baseline=baseline, promise=None) for baseline, name, value in baselines]
    assert cells_of(table(rows[:3]), "ours")[0][-1] == "0.750"
    assert cells_of(table(rows), "ours")[0][-1] == "–"


def test_the_worst_owner_is_the_largest_distance_and_the_smallest_share() -> None:
    worst = {column.title: column.worst([1.0, 2.0]) for column in COLUMNS}
    assert worst["recall, minority"] == worst["coverage"] == worst["density"] == 1
    assert worst["Fréchet, minority"] == worst["copies ½, minority"] == worst["told apart"] == 2


def test_no_epsilon_stands_without_unit_delta_and_count() -> None:
    text = table(ROWS)
    said = "summary: ε = 10 per image, δ = 1e-5, k = 1, best attack's AUC 0.921"
    assert text.count("ε = ") == text.count(said) == 4
    assert "Not private" in text


def test_the_table_says_how_it_came_about() -> None:
    text = table(ROWS)
    for words in ("seeds 0, 1", "shared 500, personal 1,000", "Commit abc", "torch 2.9", "2 cores of a cpu", "8 s of"):
        assert words in text, words


def test_the_grids_fields_are_columns() -> None:
    text = table([row(cell={"privacy.epsilon": "1", "sampling.steps": 5}, a=0.5)])
    assert "| arm | privacy.epsilon | sampling.steps | what leaves an owner |" in text
    assert cells_of(text, "ours")[0][1:3] == ["1", "5"]


# ---- The figure -------------------------------------------------------------------------------------------------

EPSILONS = [
    row(arm, seed, {"sampling.sampler": "heun", "privacy.epsilon": epsilon}, a=float(epsilon) / 100 + seed / 10)
    for arm in ("ours", "other") for epsilon in ("10", "1") for seed in (0, 1)
]  # fmt: skip
LEVEL = row("local", a=0.25)


def drawn(rows: list[Row]) -> dict[str, Any]:
    return figure_document(rows, Path("figure.png"))


def test_the_figure_draws_quality_against_the_first_numeric_field() -> None:
    document = drawn([*EPSILONS, LEVEL])
    said = "privacy.epsilon (per image, δ = 1e-5, k = 1)"
    assert (document["xLabel"], document["logX"]) == (said, True)
    panel = document["panels"][0]
    assert panel["title"] == "recall, minority"
    first = panel["series"][0]
    assert first["label"] == "ours, sampling.sampler=heun"
    assert first["x"] == [1.0, 10.0]
    assert first["mean"] == pytest.approx([0.06, 0.15])
    assert first["std"] == pytest.approx([math.sqrt(0.005)] * 2)
    assert panel["levels"] == [{"label": "local", "mean": 0.25, "std": None}]


def test_what_was_not_measured_has_no_panel() -> None:
    """As the minority, where classes are dealt evenly."""
    assert [panel["title"] for panel in drawn(EPSILONS)["panels"]] == ["recall, minority"]
    everything = {group: {"recall": 0.5, "frechet": 1.0, "coverage": 0.5} for group in ("majority", "pooled")}
    even = [each.model_copy(update={"owners": {"a": everything}}) for each in EPSILONS]
    titles = [panel["title"] for panel in drawn(even)["panels"]]
    assert titles == ["recall, majority", "Fréchet, pooled", "Fréchet, majority", "coverage"]
    nothing = [each.model_copy(update={"owners": {"a": {"pooled": {}}}}) for each in EPSILONS]
    assert len(drawn(nothing)["panels"]) == 1


def test_without_numbers_in_the_grid_arms_stand_side_by_side() -> None:
    document = drawn([row(a=0.1), row("other", a=0.2)])
    assert document["xLabel"] == ""
    assert [(each["label"], each["x"]) for each in document["panels"][0]["series"]] == [("ours", [0]), ("other", [1])]


@pytest.mark.parametrize(
    ("values", "numeric"),
    [(["1", "10"], True), ([1, 2.5], True), (["a", "1"], False), ([True, False], False), (["1"], False)],
)
def test_a_field_is_numeric_when_all_its_values_are_and_there_are_two(values: list[Any], numeric: bool) -> None:
    rows = [row(cell={"field": value}, a=0.5) for value in values]
    assert (numeric_field(rows) == "field") is numeric


def test_the_attacks_curve_is_drawn_where_it_moves_with_the_field() -> None:
    assert drawn(EPSILONS)["attackAuc"] == []  # here it is the same everywhere
    moved = [
        each.model_copy(update={"promise": each.promise.model_copy(update={"attack_auc": auc})})
        for each in EPSILONS
        for auc in [0.6 if each.cell["privacy.epsilon"] == "1" else 0.92]
    ]
    assert drawn(moved)["attackAuc"] == [[1.0, 0.6], [10.0, 0.92]]
