"""An experiment's file: what it asks for, and what is wrong with it, without a run."""

import copy
from typing import Any

import pytest
import yaml

from feddiff.experiment_file import Experiment, load_experiment, slug, with_fields
from feddiff_protocol.errors import InputMissing, SpecInvalid

GAUSSIAN = {"privacy.mechanism": "gaussian", "privacy.momentClipNorm": None, "diffusion.splitSigma": None}
PRIVUNIT = {"privacy.mechanism": "privunit", "privacy.momentClipNorm": None, "privacy.delta": None}
SMALL = {"personal.batch": 5}


def loaded(world: Any, **fields: Any) -> Experiment:
    return load_experiment(world.experiment_file(**fields))


def test_every_arm_is_run_in_every_cell_with_every_seed_seed_by_seed(world: Any) -> None:
    arms = [{"name": "ours"}, {"name": "closed", "set": {"shared.denoiser": "closedForm"}}]
    grid = {"privacy.epsilon": ["1", "10"], "sampling.steps": [5, 10]}
    units = loaded(world, arms=arms, grid=grid, seeds=[3, 4]).units
    assert len({unit.key for unit in units}) == len(units) == 2 * 2 * 2 * 2
    assert [unit.seed for unit in units] == 8 * [3] + 8 * [4]
    for unit in units:
        spec = unit.job.document.spec
        assert (str(spec.privacy.epsilon), spec.sampling.steps) == tuple(unit.cell.values())
        assert spec.shared.denoiser == ("closedForm" if unit.arm == "closed" else "trained")
    assert units[1].label == "closed, privacy.epsilon=1 (per image, δ = 1e-5, k = 1), sampling.steps=5, seed 3"
    assert units[1].job.document.metadata.name == "digits-closed"  # by which a ledger knows it


def test_folders_of_runs_are_distinct_and_can_be_read(world: Any) -> None:
    grid = {"privacy.epsilon": ["1", "10"], "network": [{"baseWidth": 8}, {"baseWidth": 16}]}
    experiment = loaded(world, grid=grid, seeds=[0, 1])
    folders = [unit.folder(world.path) for unit in experiment.units]
    assert len(set(folders)) == len(folders) == 8
    assert slug({"privacy.epsilon": "10"}) == "privacy.epsilon=10" and slug({}) == "all"
    assert slug({"a": "x/../y"}) != slug({"a": "x_.._y"}) and "/" not in slug({"a": "x/../y"})


def test_an_arm_can_change_the_mechanism(world: Any) -> None:
    (unit,) = loaded(world, arms=[{"name": "paper", "set": GAUSSIAN}]).units
    assert unit.job.document.spec.privacy.mechanism == "gaussian"


def test_a_job_may_stand_in_the_file_itself(world: Any) -> None:
    world.experiment_file()
    assert loaded(world, job=yaml.safe_load((world.path / "job.yaml").read_text())).units == loaded(world).units


def test_the_rounds_of_federated_averaging_are_part_of_what_is_asked(world: Any) -> None:
    arms = [{"baseline": "fedavg"}, {"baseline": "fedavg", "rounds": 7, "name": "fedavg-7"}, {"baseline": "local"}]
    units = loaded(world, arms=arms).units
    assert [unit.rounds for unit in units] == [100, 7, None]
    again = loaded(world, arms=[{"baseline": "fedavg", "rounds": 8, "name": "fedavg-7"}]).units
    assert units[1].asked != again[0].asked


def test_a_seed_may_have_a_split_of_its_own(world: Any) -> None:
    file = world.experiment_file(datasets=["split-{seed}/owners.yaml"], seeds=[1, 2])
    for seed in (1, 2):
        (world.path / f"split-{seed}").mkdir()
        (world.path / f"split-{seed}" / "owners.yaml").write_bytes((world.path / "owners.yaml").read_bytes())
    units = load_experiment(file).units
    paths = [unit.job.datasets["a"].source.path for unit in units]
    assert paths == [str(world.path / f"split-{seed}" / "a" / "train.npz") for seed in (1, 2)]
    assert len(load_experiment(file).datasets) == 4


def test_the_number_of_clients_may_be_an_axis(world: Any) -> None:
    """Every dataset of a split is a client then, whatever clients the job names."""
    file = world.experiment_file(datasets=["of-{clients}/owners.yaml"], grid={"clients": [1, 2]}, seeds=[0, 1])
    documents = list(yaml.safe_load_all((world.path / "owners.yaml").read_text()))
    for count in (1, 2):
        (world.path / f"of-{count}").mkdir()
        (world.path / f"of-{count}" / "owners.yaml").write_text(yaml.safe_dump_all(documents[:count]))
    experiment = load_experiment(file)
    assert [unit.cell for unit in experiment.units] == [{"clients": 1}, {"clients": 2}] * 2
    assert [[each.name for each in unit.job.document.spec.clients] for unit in experiment.units[:2]] == [
        [document["metadata"]["namespace"] for document in documents[:count]] for count in (1, 2)
    ]
    assert len({unit.asked for unit in experiment.units}) == 4


@pytest.mark.parametrize("counts", [[1], ["2"], [2.0], [True]])
def test_a_number_of_clients_that_is_not_that_of_the_datasets_is_refused(world: Any, counts: list[Any]) -> None:
    with pytest.raises(SpecInvalid, match=r"clients: expected the number of datasets, 2 in owners\.yaml, found"):
        loaded(world, grid={"clients": counts})


def test_what_is_asked_for_differs_with_whatever_changes_a_figure(world: Any) -> None:
    units = loaded(
        world,
        arms=[{"name": "ours"}, {"name": "wide", "set": {"network.baseWidth": 16}}],
        grid={"privacy.epsilon": ["1", "10"]},
        seeds=[0, 1],
    ).units
    assert len({unit.asked for unit in units}) == 8
    assert units[0].asked == loaded(world, grid={"privacy.epsilon": ["1"]}).units[0].asked


def test_dp_sgd_is_run_for_every_promise_and_for_nothing_else_of_a_release(world: Any) -> None:
    grid = {"privacy.epsilon": ["1", "10"], "privacy.clipNorm": ["3", "4"], "shared.images": [1000, 2000]}
    units = loaded(world, arms=[{"name": "ours"}, {"baseline": "dp-sgd", "set": SMALL}], grid=grid).units
    assert [unit.cell for unit in units if unit.baseline] == [{"privacy.epsilon": "1"}, {"privacy.epsilon": "10"}]
    assert len({unit.asked for unit in units}) == 8 + 2


def test_a_grid_of_whole_privacies_is_one_of_promises_too(world: Any) -> None:
    (job,) = [unit.job for unit in loaded(world).units]
    privacy = job.document.spec.privacy.to_wire()
    grid = {"privacy": [privacy, privacy | {"epsilon": "3"}]}
    units = loaded(world, arms=[{"baseline": "dp-sgd", "set": SMALL}, {"baseline": "local"}], grid=grid).units
    assert [unit.arm for unit in units] == ["dp-sgd", "local", "dp-sgd"]


def test_what_dp_sgd_is_asked_for_differs_with_its_promise_and_noise_levels_alone(world: Any) -> None:
    def asked(**fields: Any) -> str:
        changed = {"baseline": "dp-sgd"} | fields
        return loaded(world, arms=[changed | {"set": SMALL | fields.get("set", {})}]).units[0].asked

    different = [{}, {"set": {"privacy.epsilon": "2"}}, {"set": {"privacy.delta": "1e-6"}}, {"noiseMultiplicity": 4}]
    assert len({asked(**fields) for fields in different}) == 4
    assert asked() == asked(noiseMultiplicity=32) == asked(set={"privacy.clipNorm": "3"})


def test_fields_are_set_by_their_paths_and_the_job_itself_stays_as_it_is() -> None:
    job = {"spec": {"privacy": {"epsilon": "1"}}}
    before = copy.deepcopy(job)
    changed = with_fields(job, {"privacy.epsilon": "2", "shared.images": 5, "privacy.delta": None})
    assert changed == {"spec": {"privacy": {"epsilon": "2"}, "shared": {"images": 5}}}
    assert job == before


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"arms": []}, "arms: "),
        ({"arms": [{"name": "a"}, {"name": "a"}]}, "arms: expected distinct ones, found a twice"),
        ({"seeds": [1, 2, 1]}, "seeds: expected distinct ones, found 1 twice"),
        ({"grid": {"shared.images": [5, 5]}}, "grid.shared.images: expected distinct ones, found 5 twice"),
        ({"arms": [{"name": "A b"}]}, "arms.0.name: "),
        ({"arms": [{}]}, "arms.0: expected a name, or a baseline, found neither"),
        ({"arms": [{"name": "a", "rounds": 5}]}, "rounds: belongs to baseline fedavg, found none"),
        ({"arms": [{"name": "a", "noiseMultiplicity": 5}]}, "belongs to baseline dp-sgd, found none"),
        ({"arms": [{"baseline": "dp-sgd", "set": {"personal.batch": 9999}}]}, "the records of client a, found 9999"),
        ({"arms": [{"baseline": "dp-sgd", "set": PRIVUNIT}]}, "arm dp-sgd: expected a job with privacy.delta above 0"),
        ({"arms": [{"baseline": "locally"}]}, "arms.0.baseline: "),
        ({"arms": [{"name": "a", "of": "b"}]}, "of: belongs to a baseline of a job's run, found none"),
        ({"arms": [{"baseline": "alone"}]}, "arm alone: of: expected the name of an arm that is a job, there is none"),
        ({"arms": [{"name": "a"}, {"name": "b"}, {"baseline": "alone"}]}, "a job, a, b; found none"),
        ({"arms": [{"name": "a"}, {"baseline": "alone", "of": "c"}]}, "a job, a; found c"),
        ({"arms": [{"name": "a"}, {"baseline": "draws", "set": {"network.baseWidth": 8}}]}, "takes a run as it is"),
        ({"arms": [{"name": "a", "set": GAUSSIAN}, {"baseline": "draws"}]}, "arm draws: expected a run with mechanism"),
        ({"seed": [1]}, "seed: unknown field"),
        ({"seeds": [-1]}, "seeds.0: "),
        ({"grid": {"privacy.epsilon": []}}, "grid."),
        ({"grid": {"privacy.epsilom": ["1"]}}, "arm ours, privacy.epsilom=1: spec.privacy.epsilom: unknown field"),
        ({"grid": {"privacy.epsilon": [1]}}, 'spec.privacy.epsilon: expected a decimal number in quotes'),
        ({"grid": {"privacy.epsilon.x": [1]}}, "privacy.epsilon.x: expected a field of the job's spec, found none"),
        (
            {"grid": {"privacy.epsilon": ["1"]}, "arms": [{"name": "a", "set": {"privacy.epsilon": "2"}}]},
            "arm a: sets privacy.epsilon, which the grid varies",
        ),
        ({"grid": {"network": [{}]}, "arms": [{"name": "a", "set": {"network.baseWidth": 8}}]}, "the grid varies"),
        ({"arms": [{"name": "a", "set": {"diffusion.splitSigma": "999"}}]}, "arm a: spec.diffusion.splitSigma"),
        ({"seeds": list(range(1000)), "grid": {"shared.images": list(range(1, 20))}}, "expected at most 10000 runs"),
        ({"job": "owners.yaml"}, "expected exactly one FederatedDiffusionJob, found 0"),
    ],
)  # fmt: skip
def test_a_mistake_is_named_by_file_and_field(world: Any, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecInvalid) as raised:
        loaded(world, **fields)
    assert message in str(raised.value)
    assert str(world.path) in str(raised.value)


def test_datasets_without_held_out_records_are_refused_before_anything_starts(world: Any) -> None:
    file = world.experiment_file()
    datasets = list(yaml.safe_load_all((world.path / "owners.yaml").read_text()))
    del datasets[0]["spec"]["source"]["holdoutPath"]
    (world.path / "owners.yaml").write_text(yaml.safe_dump_all(datasets))
    with pytest.raises(SpecInvalid, match=r"dataset clinic-a/scans: expected source\.holdoutPath, found none"):
        load_experiment(file)


def test_a_file_that_is_not_there_is_named(world: Any) -> None:
    with pytest.raises(InputMissing, match=r"gone\.yaml"):
        loaded(world, datasets=["gone.yaml"])


def test_an_experiment_is_no_document_of_a_cluster(world: Any) -> None:
    (document,) = yaml.safe_load_all(world.experiment_file().read_text())
    assert "apiVersion" not in document and "kind" not in document
