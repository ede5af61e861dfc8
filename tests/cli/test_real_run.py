"""A job and a baseline with the trainer's own stages, from records to what they leave: small, with no stand-ins."""

from typing import Any

from feddiff.engine import Setting, run_job
from feddiff.experiment import run_experiment
from feddiff.experiment_file import load_experiment
from feddiff.run_folder import RunFolder
from feddiff.views import report_of
from feddiff_protocol import layout
from feddiff_protocol.manifest import Manifest

PRIVUNIT = {"mechanism": "privunit", "epsilon": "4", "clipNorm": "4"}


SQUARES = {
    "mechanism": "summary",
    "epsilon": "4",
    "delta": "1e-5",
    "clipNorm": "2",
    "momentClipNorm": "1",
    "blockSide": 2,
}


class Quiet:
    """A reporter to whom nothing is news."""

    def __getattr__(self, name: str) -> Any:
        return lambda *told: None


def test_a_job_of_pure_epsilon_runs_to_its_reports_and_is_charged_once(world: Any) -> None:
    world.budget["pureEpsilon"] = "6"
    world.owners = "a"  # every stage there is, each in a process of its own; more owners are more of the same
    world.write_records()
    job, folder = world.job("pure", privacy=PRIVUNIT, **world.smallest), RunFolder(world.path / "run")
    for _ in range(2):  # the second time there is nothing to do
        outcome = run_job(job, folder, Setting(Quiet(), num_processes=2))
        assert (outcome.exit_code, outcome.message) == (0, "")
    report = report_of(folder)
    assert "ε = 4 per image, δ = 0, k = 1 release per owner" in report.job_report.read_text()
    assert ", pure 2" in report.job_report.read_text()  # of 6
    assert "by the mechanism privunit" in report.owners["a"].page.read_text()
    state = world.ledger("a")
    assert [str(each.charge.pure_epsilon) for each in state.entries] == ["4"]
    assert (state.spent_epsilon, state.entries[0].delta) == (4, 0)
    manifest = (folder.path / "federation" / layout.manifest(outcome.uid, "a")).read_bytes()
    assert Manifest.from_bytes(manifest, "manifest").counts == (30, 40)


def test_a_job_whose_owners_release_squares_runs_to_its_reports(world: Any) -> None:
    world.owners = "a"
    world.write_records()
    parts = world.smallest | {"shared": {"denoiser": "closedForm", "replicas": 1}}
    parts["personal"] = parts["personal"] | {"releaseSigma": "1"}
    job = world.job("squares", privacy=SQUARES, diffusion={"splitSigma": "8"}, **parts)
    folder = RunFolder(world.path / "run")
    outcome = run_job(job, folder, Setting(Quiet(), num_processes=2))
    assert (outcome.exit_code, outcome.message) == (0, "")
    assert "means of 2 × 2 pixels in [0, 1]" in report_of(folder).job_report.read_text()


def test_a_baseline_runs_to_its_row_by_the_trainers_own_stages(world: Any) -> None:
    world.owners = "a"
    world.write_records()
    fields = {f"{part}.{name}": value for part, of in world.smallest.items() for name, value in of.items()}
    arms = [{"baseline": "fedavg", "rounds": 2, "set": fields}]
    experiment = load_experiment(world.experiment_file(arms=arms, seeds=[3]))
    told: list[str] = []
    (row,) = run_experiment(experiment, world.path / "out", Setting(Quiet()), lambda unit, *of: told.append(unit.label))
    assert told == ["fedavg, seed 3"]
    recall = row.owners["a"]["all"]["recall"]
    assert recall is not None and 0 <= recall <= 1
    assert row.promise is None and row.seconds > 0 and row.versions.keys() >= {"torch", "python"}
    assert world.ledger("a").num_releases == 0
