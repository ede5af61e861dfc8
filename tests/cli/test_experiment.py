"""An experiment on one machine: a row for every run, once; budgets that hold all of it, or nothing starts."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest

from feddiff.baseline_runs import measuring_specs, training_specs
from feddiff.engine import Setting
from feddiff.experiment import ROWS, Row, read_rows, run_experiment
from feddiff.experiment_file import load_experiment
from feddiff.experiment_table import table
from feddiff.local_ledger import read_ledger
from feddiff.owner_stages import StageFailed
from feddiff.processes import StartProcess, stage_command
from feddiff.run_folder import RunFolder
from feddiff_protocol import layout
from feddiff_protocol.baselines import Baseline, MeasureBaselineSpec, TrainBaselineSpec
from feddiff_protocol.errors import Interrupted, PrivacyRefusal, SpecInvalid
from feddiff_protocol.stages import EvaluateSpec, ReleaseSpec, SampleSpec, Stage, TrainPersonalSpec, TrainSharedSpec


class Quiet:
    """A reporter to whom nothing is news."""

    def __getattr__(self, name: str) -> Any:
        return lambda *told: None


def evaluation(spec: EvaluateSpec) -> dict[str, Any]:
    """An evaluation whose figures say of which run it is."""
    value = {
        "recall": spec.seed_or_zero / 10 + (0.05 if spec.client == "b" else 0),
        "frechet": float(spec.privacy.epsilon),
    }
    groups = dict.fromkeys(("pooled", "all", "majority", "minority"), value)
    worst = {group: {"recall": 0.0} for group in groups}
    return {"arms": {"both": {"groups": groups}, "shared": {"groups": worst}, "personal": {"groups": worst}}}


@dataclass
class Study:
    """One experiment in the world's folder, with stages that do next to nothing."""

    world: Any
    fields: dict[str, Any]
    stages: Any = None
    instead: Callable[[Any], str | None] = lambda spec: None  # what a stage does in place of success
    stop: Callable[[], int] = lambda: 0
    told: list[tuple[str, int, int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.stages = self.world.stages(self.behaviour)

    @property
    def out(self) -> Path:
        return Path(self.world.path / "out")

    @property
    def file(self) -> Path:
        return Path(self.world.experiment_file(**self.fields))

    def behaviour(self, spec: Any) -> str | None:
        """A stage `evaluate` leaves an evaluation; the others only write their receipts."""
        if (script := self.instead(spec)) is not None:
            return script
        if isinstance(spec, EvaluateSpec):
            path = Path(spec.owner_store.removeprefix("file://")) / layout.evaluation(spec.job.uid, spec.client)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(evaluation(spec)))
        if isinstance(spec, MeasureBaselineSpec):
            path = Path(unquote(spec.store.removeprefix("file://"))) / layout.measured_baseline(
                spec.job.uid, spec.client
            )
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps({"quality": {"groups": {"minority": {"recall": 0.5}}}}))
        return None

    def run(self) -> list[Row]:
        start = StartProcess(self.stages)
        setting = Setting(Quiet(), num_processes=4, start_attempt=start, stop_requested=lambda: self.stop())
        experiment = load_experiment(self.file)
        return run_experiment(experiment, self.out, setting, lambda unit, *of: self.told.append((unit.label, *of)))


@pytest.fixture
def study(world: Any) -> Study:
    return Study(world, {"seeds": [1, 2]})


def releases(study: Study) -> list[str]:
    return [name for name in study.stages.started if name.startswith("release")]


def spent(study: Study) -> int:
    experiment = load_experiment(study.file)
    return max(read_ledger(dataset).num_releases for dataset in experiment.datasets)


# ---- Rows -------------------------------------------------------------------------------------------------------


def test_every_run_leaves_a_row_with_its_promise_figures_and_origin(study: Study) -> None:
    study.fields["grid"] = {"privacy.epsilon": ["1", "2"]}
    rows = study.run()
    assert [(row.arm, row.cell, row.seed) for row in rows] == [
        ("ours", {"privacy.epsilon": epsilon}, seed) for seed in (1, 2) for epsilon in ("1", "2")
    ]
    row = rows[-1]
    assert row.owners["a"]["minority"] == {"recall": 0.2, "frechet": 2.0}
    assert row.owners["b"]["minority"] == {"recall": 0.25, "frechet": 2.0}
    made = row.promise
    assert (made.epsilon, made.delta, made.unit, made.releases) == ("2", "1e-5", "image", 1)
    assert 0.5 < made.attack_auc < 1
    assert row.image_steps == {"shared": 2_000_000, "personal": 1_000_000}
    assert row.seconds == pytest.approx(0.1)  # two receipts of the job and four of each owner, 12 ms each
    assert row.cores >= 1 and row.experiment == "study"
    assert study.told[0] == ("ours, privacy.epsilon=1 (per image, δ = 1e-5, k = 1), seed 1", 0, 4)
    assert [done for _, done, _ in study.told] == [0, 1, 2, 3]


def test_rows_are_lines_of_json_that_say_the_same_when_read_again(study: Study) -> None:
    study.fields["grid"] = {"personal.releaseSigma": [None, "0.5"], "privacy.epsilon": ["3"]}  # null is a value, too
    rows = study.run()
    assert read_rows(study.out) == rows
    documents = [json.loads(line) for line in (study.out / ROWS).read_text().splitlines()]
    assert len(documents) == 4
    assert documents[0].keys() == {
        *("format", "experiment", "arm", "cell", "seed", "promise", "owners", "imageSteps", "seconds", "versions"),
        *("commit", "cpu", "cores", "finishedAt", "asked"),
    }
    assert documents[0]["promise"].keys() == {"mechanism", "epsilon", "delta", "unit", "releases", "attackAuc"}


def test_the_seed_reaches_every_stage_but_the_release(study: Study) -> None:
    study.run()
    seeded = TrainSharedSpec | TrainPersonalSpec | SampleSpec | EvaluateSpec
    assert {spec.seed for spec in study.stages.specs if isinstance(spec, seeded)} == {1, 2}
    assert "seed" not in ReleaseSpec.model_fields
    told = [spec.model_dump_json() for spec in study.stages.specs if spec.stage in (Stage.RELEASE, Stage.REPORT)]
    assert told and not [text for text in told if '"seed"' in text]


# ---- Going on ---------------------------------------------------------------------------------------------------


def test_a_finished_experiment_run_again_starts_nothing_and_spends_nothing(study: Study) -> None:
    rows = study.run()
    study.stages.started.clear()
    assert study.run() == rows
    assert study.stages.started == []
    assert spent(study) == 2


def test_a_stopped_experiment_goes_on_with_the_run_it_was_at(study: Study) -> None:
    def stop() -> int:
        return int(study.stages.started.count("train-shared") > 1)

    study.stop = stop
    with pytest.raises(Interrupted):
        study.run()
    assert [row.seed for row in read_rows(study.out)] == [1]
    study.stop = lambda: 0
    assert [row.seed for row in study.run()] == [1, 2]
    assert sorted(releases(study)) == ["release a", "release a", "release b", "release b"]
    assert spent(study) == 2


def test_a_run_that_ended_before_its_row_was_written_is_not_run_again(study: Study) -> None:
    rows = study.run()
    (study.out / ROWS).write_text(json.dumps(rows[0].to_wire()) + "\n")
    study.stages.started.clear()
    again = study.run()
    assert study.stages.started == []
    assert [row.owners for row in again] == [row.owners for row in rows]


def test_an_experiment_that_grows_keeps_what_it_has(study: Study) -> None:
    study.fields["grid"] = {"privacy.epsilon": ["3"]}
    rows = study.run()
    study.fields["seeds"] = [1, 2, 3]
    assert study.run()[:2] == rows
    assert len(releases(study)) == 2 * 3


def test_a_row_of_another_job_is_refused_before_anything_starts(study: Study) -> None:
    study.run()
    study.stages.started.clear()
    study.fields["arms"] = [{"name": "ours", "set": {"network.baseWidth": 64}}]
    with pytest.raises(SpecInvalid, match="found one for ours, seed 1 of another job, network or data"):
        study.run()
    assert study.stages.started == []


@pytest.mark.parametrize(
    "changed", ["personal.images", "shared.images", "sampling.imagesPerClass", "network.baseWidth"]
)
@pytest.mark.parametrize("through", [False, True])
def test_a_run_that_was_begun_with_other_trainings_gets_no_row(study: Study, changed: str, through: bool) -> None:
    """What is through of it would stay, under figures that it does not have."""
    study.fields["arms"] = [{"name": "ours", "set": {changed: 256}}]
    if through:
        study.run()
        (study.out / ROWS).unlink()
    else:
        study.stop = lambda: int("train-personal a" in study.stages.started)
        with pytest.raises(Interrupted):
            study.run()
    study.stop = lambda: 0
    study.stages.started.clear()
    study.fields["arms"] = [{"name": "ours", "set": {changed: 512}}]
    with pytest.raises(SpecInvalid, match=f"begun with another spec.{changed.partition('.')[0]}"):
        study.run()
    assert study.stages.started == [] and not read_rows(study.out)


def test_a_run_without_one_of_its_owners_gets_no_row(study: Study) -> None:
    study.fields["arms"] = [{"name": "ours", "set": {"quorum": 1, "backoffLimit": 0}}, {"baseline": "local"}]
    study.instead = lambda spec: "exit 70" if isinstance(spec, ReleaseSpec) and spec.client == "a" else None
    with pytest.raises(StageFailed, match="found none of a: it would be compared"):
        study.run()
    assert not read_rows(study.out)


@pytest.mark.parametrize("line", ["", "{}", '{"format": ', "[]"])
def test_what_is_no_row_is_named_by_its_line(study: Study, line: str) -> None:
    study.run()
    with (study.out / ROWS).open("a") as file:
        file.write(line + "\n")
    with pytest.raises(SpecInvalid, match=r"rows\.jsonl: line 3"):
        study.run()


def test_a_run_that_fails_ends_the_experiment_with_its_words_and_code(study: Study) -> None:
    def failing(spec: Any) -> str | None:
        bad = isinstance(spec, TrainSharedSpec) and spec.seed == 2
        return "echo 'feddiff: it went wrong' >&2; exit 65" if bad else None

    study.instead = failing
    with pytest.raises(StageFailed, match=r"ours, seed 2: .*it went wrong") as raised:
        study.run()
    assert raised.value.exit_code == 65
    assert [row.seed for row in read_rows(study.out)] == [1]


# ---- Budgets ----------------------------------------------------------------------------------------------------


def test_a_budget_that_does_not_hold_all_runs_is_refused_before_the_first(study: Study) -> None:
    """Three releases at ε = 10 are ε = 20.13, the budget is 20."""
    study.fields["seeds"] = [0, 1, 2]
    with pytest.raises(PrivacyRefusal) as raised:
        study.run()
    assert str(raised.value).splitlines() == [
        f"dataset clinic-{owner}/scans: this experiment needs k = 3 more releases beside 0 so far; expected a budget"
        " for all of them, found ε = 20 (per image, δ = 1e-5); raise spec.budget.epsilon to 20.14, by 0.14, or ask for"
        " fewer seeds, cells or arms"
        for owner in "ab"
    ]
    assert study.stages.started == [] and spent(study) == 0


def test_what_is_left_to_do_counts_and_what_is_done_does_not_count_twice(study: Study) -> None:
    study.run()
    study.fields["grid"] = {"privacy.epsilon": ["1"]}
    study.run()  # two more of ε = 1 fit beside two of ε = 10
    assert spent(study) == 4
    study.fields |= {"grid": {"privacy.epsilon": ["1", "9"]}}
    with pytest.raises(PrivacyRefusal, match="needs k = 2 more releases beside 4 so far"):
        study.run()


def test_a_run_that_was_charged_and_stopped_costs_nothing_more(study: Study) -> None:
    study.stop = lambda: int("train-shared" in study.stages.started)
    with pytest.raises(Interrupted):
        study.run()
    study.stop = lambda: 0
    assert len(study.run()) == 2


def test_an_owner_who_lets_nobody_ask_for_so_much_is_heard_before_anything_starts(study: Study) -> None:
    study.fields |= {"seeds": [0], "grid": {"privacy.epsilon": ["1", "11"]}}
    with pytest.raises(
        PrivacyRefusal, match=r"ours, privacy\.epsilon=11 .*, seed 0: .* ask for ε ≤ 10, this one asks 11"
    ):
        study.run()
    assert study.stages.started == []


# ---- The command ------------------------------------------------------------------------------------------------


@pytest.fixture
def feddiff(feddiff: Any, in_the_trainers_place: Any, study: Study) -> Any:
    """The command, its stages being the study's."""
    in_the_trainers_place(study.stages)
    return feddiff


def test_the_command_leaves_rows_table_and_figure_and_says_where(feddiff: Any, study: Study) -> None:
    code, out, err = feddiff("experiment", study.file)
    folder = study.world.path / "experiments" / "study"
    assert (code, out.splitlines()) == (0, [f"wrote {folder / name}" for name in (ROWS, "table.md", "figure.png")])
    assert "NOT PRIVATE" in err and "run='ours, seed 1' done=0 total=2" in err
    assert (folder / "figure.png").read_bytes().startswith(b"\x89PNG")


def test_table_only_needs_nothing_but_the_rows(feddiff: Any, study: Study) -> None:
    study.run()
    (study.world.path / "owners.yaml").unlink()
    code, out, err = feddiff(
        "experiment", study.world.path / "study.yaml", "--dir", study.out, "--table-only", "--json"
    )
    assert (code, err) == (0, "")
    finished = json.loads(out)
    assert (finished["event"], finished["rows"]) == ("finished", 2)
    assert finished["files"] == [str(study.out / name) for name in (ROWS, "table.md", "figure.png")]


def test_table_only_without_rows_says_what_to_do(feddiff: Any, study: Study) -> None:
    code, _, err = feddiff("experiment", study.world.path / "study.yaml", "--table-only")
    assert code == 66
    assert "expected the rows of an experiment, found none; run it first" in err


def test_a_refused_experiment_ends_with_77_and_one_line_for_each_owner(feddiff: Any, study: Study) -> None:
    code, out, err = feddiff("experiment", study.world.experiment_file(seeds=[0, 1, 2]), "--json")
    assert code == 77
    stopped = json.loads(out)
    assert (stopped["event"], stopped["exitCode"]) == ("stopped", 77)
    assert sum("raise spec.budget.epsilon to 20.14" in line for line in err.splitlines()) == 2


# ---- Baselines --------------------------------------------------------------------------------------------------


def test_a_baseline_trains_its_networks_then_measures_every_owner_and_releases_nothing(study: Study) -> None:
    study.fields = {"seeds": [0], "arms": [{"baseline": "local"}, {"baseline": "central", "name": "pooled"}]}
    local, pooled = study.run()
    assert sorted(study.stages.started[:2]) == ["train-personal a", "train-personal b"]
    assert sorted(study.stages.started[2:4]) == ["evaluate a", "evaluate b"]
    assert study.stages.started[4] == "train-personal"
    assert (local.baseline, local.arm, local.promise, local.image_steps) == (
        "local",
        "local",
        None,
        {"local": 1_000_000},
    )
    assert (pooled.baseline, pooled.arm) == ("central", "pooled")
    assert local.owners["b"]["minority"] == {"recall": 0.5}
    assert spent(study) == 0


def test_a_baseline_that_knows_no_release_is_run_once_for_all_epsilons(study: Study) -> None:
    study.fields = {
        "arms": [{"name": "ours"}, {"baseline": "local"}],
        "grid": {"privacy.epsilon": ["1", "2"], "personal.images": [100, 200]},
        "seeds": [0],
    }
    rows = study.run()
    assert [row.cell for row in rows if row.arm == "local"] == [{"personal.images": 100}, {"personal.images": 200}]
    assert len(rows) == 4 + 2


def test_a_baseline_costs_no_budget(study: Study) -> None:
    study.fields |= {"seeds": [0, 1], "arms": [{"name": "ours"}, {"baseline": "local"}, {"baseline": "central"}]}
    assert len(study.run()) == 6  # two releases at ε = 10 are all that the budget holds


def test_dp_sgd_trains_every_owners_network_at_the_jobs_promise_and_says_so_in_its_row(study: Study) -> None:
    arm = {"baseline": "dp-sgd", "noiseMultiplicity": 4, "set": {"personal.batch": 5}}
    study.fields = {"seeds": [0, 1], "arms": [arm, {"baseline": "local"}], "grid": {"privacy.epsilon": ["1", "30"]}}
    rows = study.run()
    assert [row.arm for row in rows] == ["dp-sgd", "local", "dp-sgd"] * 2
    first, local, second = rows[:3]
    assert first.promise is not None and second.promise is not None and local.promise is None
    assert (first.promise.mechanism, first.promise.epsilon, first.promise.delta) == ("dp-sgd", "1", "1e-5")
    assert (second.promise.epsilon, second.promise.releases, second.promise.attack_auc) == ("30", 1, None)
    assert first.image_steps == {"dp-sgd": 1_000_000}
    assert spent(study) == 0  # nothing leaves; an owner who lets nobody ask for ε = 30 need not
    trained = [spec for spec in study.stages.specs if isinstance(spec, TrainBaselineSpec) and spec.baseline == "dp-sgd"]
    asked = {(spec.client, str(spec.like.privacy.epsilon), spec.noise_multiplicity, spec.seed) for spec in trained}
    assert asked == {(client, epsilon, 4, seed) for client in "ab" for epsilon in ("1", "30") for seed in (0, 1)}
    assert "dp-sgd: ε = 1 per image, δ = 1e-5, k = 1 |" in table(rows)


def test_a_stopped_baseline_goes_on_and_repeats_no_stage(study: Study) -> None:
    study.fields = {"seeds": [0], "arms": [{"baseline": "local"}]}
    study.stop = lambda: int("evaluate a" in study.stages.started)
    study.instead = lambda spec: "sleep 60" if isinstance(spec, MeasureBaselineSpec) else None  # the stop comes first
    with pytest.raises(Interrupted):
        study.run()
    study.stop, study.instead = lambda: 0, lambda spec: None
    assert len(study.run()) == 1
    assert study.stages.started.count("train-personal a") == study.stages.started.count("train-personal b") == 1


def test_a_baseline_whose_stage_fails_ends_with_its_words_and_goes_on_when_run_again(study: Study) -> None:
    study.fields = {"seeds": [0], "arms": [{"baseline": "central"}]}
    study.instead = lambda spec: "echo 'feddiff: no room' >&2; exit 74" if spec.stage is Stage.TRAIN_PERSONAL else None
    with pytest.raises(StageFailed, match=r"no room; its words are in .*attempt-1/stderr\.log") as raised:
        study.run()
    assert raised.value.exit_code == 74
    study.instead = lambda spec: None
    assert len(study.run()) == 1


def test_a_baseline_runs_the_modules_that_no_job_names(study: Study) -> None:
    experiment = load_experiment(study.world.experiment_file(arms=[{"baseline": "central"}]))
    (unit,) = experiment.units
    folder = RunFolder(unit.folder(study.out))
    (training,) = training_specs(unit, Baseline.CENTRAL, folder)
    measuring, _ = measuring_specs(unit, Baseline.CENTRAL, folder, None)
    names = [stage_command(spec, Path("spec.json"))[2] for spec in (training, measuring)]
    assert names == ["feddiff_trainer.train_baseline", "feddiff_trainer.measure_baseline"]
    assert not {name.rpartition(".")[2] for name in names} & {stage.module.rpartition(".")[2] for stage in Stage}
    assert [owner.client for owner in training.owners] == ["a", "b"]


def test_a_control_takes_the_run_of_its_cell_and_seed_and_costs_nothing(study: Study) -> None:
    controls = [{"baseline": name} for name in ("draws", "alone", "from-noise", "closed-form")]
    study.fields |= {"arms": [*controls, {"name": "ours"}], "grid": {"privacy.epsilon": ["1", "2"]}}
    rows = study.run()
    assert len(rows) == 2 * 2 * 5 and spent(study) == 4
    assert [row.arm for row in rows[:5]] == ["ours", "draws", "alone", "from-noise", "closed-form"]
    runs = [spec.run for spec in study.stages.specs if isinstance(spec, MeasureBaselineSpec)]
    asked = [(run.seed, str(run.privacy.epsilon), run.client) for run in runs]
    assert sorted(asked) == sorted(
        3 * [(seed, epsilon, client) for seed in (1, 2) for epsilon in ("1", "2") for client in "ab"]
    )
    for row in rows:
        assert row.promise is not None and row.promise.epsilon == row.cell["privacy.epsilon"]
        assert row.of == (None if row.arm == "ours" else "ours")


def test_the_personal_denoiser_alone_is_read_from_its_run(study: Study) -> None:
    study.fields = {"seeds": [4], "arms": [{"name": "ours"}, {"baseline": "alone"}]}
    ours, alone = study.run()
    assert (ours.owners["a"]["minority"]["recall"], alone.owners["a"]["minority"]) == (0.4, {"recall": 0.0})
    assert not [spec for spec in study.stages.specs if isinstance(spec, MeasureBaselineSpec)]
    assert alone.image_steps == {"personal": 1_000_000} and alone.versions == ours.versions


def test_an_oracle_trains_a_shared_denoiser_and_one_for_each_owner_in_every_cell(study: Study) -> None:
    grid = {"diffusion.splitSigma": ["1", "2"], "privacy.epsilon": ["1", "2"]}  # of the latter it knows nothing
    study.fields = {"seeds": [0], "arms": [{"baseline": "oracle"}], "grid": grid}
    rows = study.run()
    assert [row.cell for row in rows] == [{"diffusion.splitSigma": "1"}, {"diffusion.splitSigma": "2"}]
    assert [row.promise for row in rows] == [None, None]
    assert rows[0].image_steps == {"shared": 2_000_000, "personal": 1_000_000}
    assert study.stages.started.count("train-personal") == study.stages.started.count("train-personal a") == 2
