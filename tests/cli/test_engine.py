"""The engine on one machine: the plan's order, retries, crashes, interruptions, and budgets that hold."""

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from feddiff import engine
from feddiff.documents import load_job
from feddiff.local_ledger import LocalLedger
from feddiff.processes import StageProcess, StartProcess
from feddiff.run_folder import RunFolder
from feddiff_protocol import layout
from feddiff_protocol.errors import ConfigurationInvalid, Interrupted, PrivacyRefusal, SpecInvalid
from feddiff_protocol.ledger import Phase
from feddiff_protocol.plan import JobPhase
from feddiff_protocol.stages import ReportSpec, Stage

ORDER = [
    ["release a", "release b"],
    ["train-shared", "train-personal a", "train-personal b"],
    ["sample a", "sample b"],
    ["evaluate a", "evaluate b"],
    ["report"],
]
CRASHES = Path(__file__).with_name("crash_engine.py")


def fails(stage: Stage, exit_code: int, times: int, client: str = "") -> Callable[[Any], str | None]:
    """The first `times` attempts of one stage (of one client, if named) end with `exit_code`."""
    left = {"": times}

    def behaviour(spec: Any) -> str | None:
        if spec.stage is not stage or client not in ("", getattr(spec, "client", "")) or left[""] == 0:
            return None
        left[""] -= 1
        return f"echo 'feddiff: it went wrong' >&2; exit {exit_code}"

    return behaviour


def test_a_run_does_every_stage_once_and_in_order(world: Any) -> None:
    stages = world.stages()
    outcome = world.run(world.job(), stages)
    assert outcome.status.phase is JobPhase.COMPLETE
    assert outcome.exit_code == 0
    assert sorted(stages.started) == sorted(name for names in ORDER for name in names)
    place = {name: number for number, names in enumerate(ORDER) for name in names}
    assert [place[name] for name in stages.started if name.startswith(("release", "train-shared", "report"))] == [
        0, 0, 1, 4,
    ]  # fmt: skip
    for owner in "ab":
        own = [name for name in stages.started if name.endswith(f" {owner}")]
        assert own == [f"{stage} {owner}" for stage in ("release", "train-personal", "sample", "evaluate")]


def test_a_stage_is_described_when_it_starts_and_not_while_it_waits(
    world: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Descriptions grow with the square of the number of clients."""
    described: list[Stage] = []
    made = engine.owner_stage_spec

    def counted(stage: Stage, *rest: Any) -> Any:
        described.append(stage)
        return made(stage, *rest)

    monkeypatch.setattr(engine, "owner_stage_spec", counted)
    stages = world.stages()
    assert world.run(world.job(), stages, num_processes=1).status.phase is JobPhase.COMPLETE
    assert len(described) == len(
        [name for name in stages.started if name.startswith(("train-p", "sample", "evaluate"))]
    )


def test_stores_and_overlays_of_a_cluster_are_folders_of_a_local_run(world: Any) -> None:
    """The file of a cluster: no stage hears of a bucket, a Secret or a pod."""
    file = world.job_file(store={"uri": "s3://federation/jobs", "secretName": "federation-trainer"})
    *datasets, job = yaml.safe_load_all(file.read_text())
    for dataset in datasets:
        dataset["spec"]["source"]["volumeClaim"] = "scans"
        dataset["spec"] |= {
            "store": {"uri": f"s3://{dataset['metadata']['namespace']}/feddiff", "secretName": "own-store"},
            "federation": {"uri": "s3://federation/jobs", "secretName": "federation-store"},
            "podTemplate": {"spec": {"nodeSelector": {"gpu": "yes"}}},
        }
    file.write_text(yaml.safe_dump_all([*datasets, job]))
    stages = world.stages()
    outcome = world.run(load_job([file]), stages)
    assert outcome.exit_code == 0
    stores = {value for spec in stages.specs for name, value in spec if name.endswith("_store")}
    assert {"federation", "store"} == {Path(uri.removeprefix("file://")).name for uri in stores}
    assert all(uri.startswith(f"file://{world.path}/") for uri in stores)
    assert not [spec for spec in stages.specs if "s3://" in spec.model_dump_json()]


def test_a_network_that_cannot_be_built_is_refused_before_anything_is_charged(
    world: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, stages = world.job(network={"backbone": "diffusers"}), world.stages()
    monkeypatch.setattr(engine, "find_spec", lambda name: None)
    with pytest.raises(ConfigurationInvalid, match="backbone: diffusers needs the package diffusers, found none"):
        world.run(job, stages)
    assert stages.started == [] and not (world.path / "a").exists()
    monkeypatch.setattr(engine, "find_spec", lambda name: name)
    assert world.run(job, stages).exit_code == 0


def test_a_release_starts_only_when_every_client_is_charged(world: Any) -> None:
    def charged(spec: Any) -> None:
        if spec.stage is Stage.RELEASE:
            assert [world.ledger(owner).entries[0].phase for owner in "ab"] == [Phase.CHARGED, Phase.CHARGED]

    world.run(world.job(), world.stages(charged))


def test_a_finished_run_run_again_starts_nothing_and_spends_nothing(world: Any) -> None:
    world.run(world.job(), world.stages())
    again = world.stages()
    assert world.run(world.job(), again).exit_code == 0
    assert again.started == []
    assert world.ledger("a").num_releases == 1


def test_the_manifest_that_left_is_in_the_ledger(world: Any) -> None:
    stages = world.stages()
    world.run(world.job(), stages)
    shared = next(spec for spec in stages.specs if spec.stage is Stage.TRAIN_SHARED)
    recorded = [world.ledger(owner).entries[0].manifest_sha256 for owner in "ab"]
    assert [release.manifest_sha256 for release in shared.releases] == recorded


def test_the_report_is_told_budgets_durations_and_the_command(world: Any) -> None:
    stages = world.stages()
    world.run(world.job(), stages, command_line="feddiff run job.yaml")
    report = next(spec for spec in stages.specs if isinstance(spec, ReportSpec))
    assert [(line.client, line.spent_epsilon, line.remaining_epsilon) for line in report.budgets] == [
        ("a", "10.00", "15.31"),
        ("b", "10.00", "15.31"),
    ]
    assert {line.remaining_pure_epsilon for line in report.budgets} == {""}
    assert len(report.durations) == 9
    assert report.command == "feddiff run job.yaml"


# ---- Retries ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("exit_code", [69, 74, 1])
def test_a_stage_that_fails_is_tried_again_until_the_backoff_limit(world: Any, exit_code: int) -> None:
    stages = world.stages(fails(Stage.SAMPLE, exit_code, times=2, client="a"))
    assert world.run(world.job(backoffLimit=2), stages).exit_code == 0
    assert stages.started.count("sample a") == 3


def test_a_stage_that_fails_once_more_than_the_limit_ends_the_job_with_its_code(world: Any) -> None:
    outcome = world.run(world.job(backoffLimit=1), world.stages(fails(Stage.TRAIN_SHARED, 74, times=2)))
    assert outcome.status.phase is JobPhase.FAILED
    assert outcome.exit_code == 74
    assert "train-shared ended with exit code 74: it went wrong" in outcome.message
    assert outcome.log is not None and outcome.log.read_text() == "feddiff: it went wrong\n"


@pytest.mark.parametrize("exit_code", [64, 65, 66, 73, 77, 78])
def test_a_final_exit_code_is_never_tried_again(world: Any, exit_code: int) -> None:
    stages = world.stages(fails(Stage.RELEASE, exit_code, times=1, client="b"))
    outcome = world.run(world.job(), stages)
    assert outcome.exit_code == exit_code
    assert stages.started.count("release b") == 1
    assert "client b: release ended with exit code" in outcome.message


def test_an_interrupted_stage_goes_on_and_nothing_is_held_against_it(world: Any) -> None:
    stages = world.stages(fails(Stage.TRAIN_PERSONAL, 75, times=5, client="a"))
    assert world.run(world.job(backoffLimit=0), stages).exit_code == 0
    assert stages.started.count("train-personal a") == 6


def test_retries_wait_twice_as_long_each_time_and_at_most_a_minute(world: Any) -> None:
    clock = [0.0]
    starts: list[float] = []

    def sleep(seconds: float) -> None:
        clock[0] += 0.5
        time.sleep(0.0005)

    def behaviour(spec: Any) -> str | None:
        if spec.stage is not Stage.REPORT:
            return None
        starts.append(clock[0])
        return "exit 75" if len(starts) < 9 else None

    world.run(world.job(), world.stages(behaviour), clock=lambda: clock[0], sleep=sleep)
    waits = [after - before for before, after in itertools.pairwise(starts)]
    for wait, least in zip(waits, [2, 4, 8, 16, 32, 60, 60, 60], strict=True):
        assert wait >= least
    assert max(waits) < 120


def test_a_stage_that_ends_well_without_a_receipt_has_failed(world: Any) -> None:
    outcome = world.run(world.job(backoffLimit=0), world.stages(lambda spec: "exit 0"))
    assert outcome.exit_code == 1
    assert "without a receipt" in outcome.message


def test_a_receipt_of_another_attempt_is_not_believed(world: Any) -> None:
    def stale(spec: Any) -> str | None:
        if spec.stage is not Stage.REPORT:
            return None
        return str(world.receipt_script(spec.model_copy(update={"attempt": 7})))

    assert world.run(world.job(backoffLimit=0), world.stages(stale)).exit_code == 1


def test_a_ranks_own_code_counts_more_than_what_torchrun_makes_of_it(world: Any) -> None:
    def ranks(spec: Any) -> str | None:
        if spec.stage is not Stage.TRAIN_SHARED:
            return None
        return 'printf 77 > "$FEDDIFF_EXIT_FOLDER/1"; printf 75 > "$FEDDIFF_EXIT_FOLDER/0"; exit 1'

    stages = world.stages(ranks)
    assert world.run(world.job(), stages).exit_code == 77
    assert stages.started.count("train-shared") == 1


def test_a_rank_lost_without_a_word_is_held_against_the_stage(world: Any) -> None:
    def lost(spec: Any) -> str | None:
        return 'printf 75 > "$FEDDIFF_EXIT_FOLDER/0"; exit 1' if spec.stage is Stage.TRAIN_SHARED else None

    stages = world.stages(lost)
    assert world.run(world.job(backoffLimit=1), stages).exit_code == 1
    assert stages.started.count("train-shared") == 2


def test_running_again_after_a_failure_tries_again_with_the_same_charge(world: Any) -> None:
    assert world.run(world.job(), world.stages(fails(Stage.RELEASE, 65, times=1, client="a"))).exit_code == 65
    assert world.run(world.job(), world.stages()).exit_code == 0
    assert world.ledger("a").num_releases == 1


# ---- Quorum and deadlines ---------------------------------------------------------------------------------------


def test_a_quorum_goes_on_without_the_client_that_failed(world: Any) -> None:
    stages = world.stages(fails(Stage.RELEASE, 66, times=9, client="b"))
    outcome = world.run(world.job(quorum=1), stages)
    assert outcome.exit_code == 0
    assert outcome.status.counted == ("a",)
    assert "b" in outcome.status.dropped
    assert not [name for name in stages.started if name.endswith(" b") and name != "release b"]
    assert world.ledger("b").num_releases == 1, "a client that released nothing stays charged"


def test_at_the_release_deadline_the_quorum_counts_and_the_late_client_is_stopped(world: Any) -> None:
    def slow(spec: Any) -> str | None:
        return "exec sleep 600" if (spec.stage, getattr(spec, "client", "")) == (Stage.RELEASE, "b") else None

    outcome = world.run(world.job(quorum=1, deadlines={"releaseSeconds": 30}), world.stages(slow))
    assert outcome.status.phase is JobPhase.COMPLETE
    assert outcome.status.counted == ("a",)


@pytest.mark.parametrize("stage", [Stage.TRAIN_SHARED, Stage.EVALUATE])
@pytest.mark.parametrize("end", ["exec sleep 600", "trap 'exit 75' TERM; while :; do sleep 0.01; done"])
def test_a_stage_that_runs_too_long_is_stopped_with_a_reason(world: Any, stage: Stage, end: str) -> None:
    """With 69, whether it saves its work, which would be 75, or not."""

    def slow(spec: Any) -> str | None:
        return end if spec.stage is stage else None

    outcome = world.run(world.job(deadlines={"stageSeconds": 50}, backoffLimit=0), world.stages(slow))
    assert outcome.status.phase is JobPhase.FAILED
    assert "deadlines.stageSeconds = 50" in outcome.message
    assert outcome.status.condition("Failed").reason == "StageDeadlineExceeded"
    assert outcome.exit_code == 69


def test_an_attempt_that_waits_for_its_turn_uses_up_none_of_its_time(world: Any) -> None:
    """As where another scheduler has the last word; it would be late otherwise, see above."""

    class Waits(StageProcess):
        def begun(self) -> bool:
            return False

    def start(*asked: Any, **more: Any) -> StageProcess:
        process = StartProcess(world.stages(lambda spec: f"sleep 0.1; {world.receipt_script(spec)}"))(*asked, **more)
        process.__class__ = Waits
        return process

    clock = FastTime()
    job = world.job(deadlines={"stageSeconds": 50}, backoffLimit=0)
    outcome = world.run(job, world.stages(), start_attempt=start, clock=clock.clock, sleep=clock.sleep)
    assert (outcome.exit_code, outcome.message) == (0, "")
    assert clock.now > 500


class FastTime:
    """A minute goes by at every look."""

    now = 0.0

    def clock(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += 60
        time.sleep(0.002)


def test_a_suspended_job_starts_nothing(world: Any) -> None:
    stages = world.stages()
    assert world.run(world.job(suspend=True), stages).exit_code == 75
    assert stages.started == []


# ---- Budgets ----------------------------------------------------------------------------------------------------


def test_two_jobs_of_epsilon_ten_are_15_4606_and_a_third_is_refused_under_twenty(world: Any) -> None:
    for name in ("first", "second"):
        assert world.run(world.job(name), world.stages(), folder=name).exit_code == 0
    assert world.ledger("a").spent_epsilon == pytest.approx(15.4606, abs=5e-5)
    stages = world.stages()
    outcome = world.run(world.job("third"), stages, folder="third")
    assert outcome.exit_code == 77
    assert stages.started == []
    assert "it would be 20.1309" in outcome.message
    assert world.ledger("a").spent_epsilon == pytest.approx(15.4606, abs=5e-5)


def test_a_second_folder_for_the_same_job_file_is_a_second_release(world: Any) -> None:
    for folder in ("one", "two"):
        world.run(world.job(), world.stages(), folder=folder)
    assert world.ledger("a").num_releases == 2


def test_deleting_the_run_folder_forgets_no_charge(world: Any) -> None:
    import shutil

    world.run(world.job(), world.stages())
    shutil.rmtree(world.path / "run")
    assert world.ledger("a").spent_epsilon == pytest.approx(10)


def test_what_one_owner_refuses_is_given_back_to_the_others_and_a_raised_budget_lets_it_start(world: Any) -> None:
    world.run(world.job("b-alone", clients=[client("b")]), world.stages(), folder="1")
    world.run(world.job("b-again", clients=[client("b")]), world.stages(), folder="2")
    assert world.run(world.job("both"), world.stages(), folder="3").exit_code == 77
    assert [entry.phase for entry in world.ledger("a").entries] == [Phase.RETURNED]
    assert world.ledger("a").spent_epsilon == 0
    world.budget = {"epsilon": "21"}
    assert world.run(world.job("both"), world.stages(), folder="3").exit_code == 0
    assert world.ledger("a").num_releases == 1


def client(owner: str) -> dict[str, Any]:
    return {"name": owner, "dataset": {"namespace": f"clinic-{owner}", "name": "scans"}}


def test_a_release_that_left_is_not_drawn_anew_where_its_seal_is_gone(world: Any) -> None:
    job, stages = world.job(), world.stages()
    world.run(job, stages)
    shutil.rmtree(world.path / "run/stages")
    with pytest.raises(PrivacyRefusal, match="its release has left"):
        world.run(job, again := world.stages())
    assert again.started == []
    (entry,) = world.ledger("a").entries
    seal = job.datasets["a"].owner_folder / "store" / layout.seal(entry.name)
    seal.parent.mkdir(parents=True)
    seal.touch()
    with pytest.raises(PrivacyRefusal, match="client b: its release has left"):
        world.run(job, again)
    assert again.started == ["release a"], "with the seal the stage sends the same bytes, or says that it cannot"


def test_a_manifest_other_than_the_recorded_one_stops_the_run(world: Any) -> None:
    world.run(world.job(), world.stages())
    receipt = next((world.path / "run/stages/release-a").glob("attempt-*/receipt.json"))
    said = json.loads(receipt.read_text())
    receipt.write_text(json.dumps(said | {"outputs": {"manifest": "0" * 64}}))
    with pytest.raises(PrivacyRefusal, match="a second release"):
        world.run(world.job(), world.stages())


# ---- One run folder, one job ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("what", "changed"),
    [
        ("clients", {"clients": [client("a")]}),
        ("diffusion", {"diffusion": {"splitSigma": "0.5"}}),
        ("name or namespace", {"name": "other"}),
    ],
)
def test_a_run_folder_refuses_another_promise(world: Any, what: str, changed: dict[str, Any]) -> None:
    world.run(world.job(), world.stages())
    with pytest.raises(SpecInvalid, match=f"other {what}; these cannot change; use another --dir"):
        world.run(world.job(**changed), world.stages())


def test_a_second_engine_on_one_folder_is_told_who_is_at_work(world: Any) -> None:
    with RunFolder(world.path / "run").locked(), pytest.raises(Interrupted, match=f"process {os.getpid()} is at work"):
        world.run(world.job(), world.stages())


# ---- Crashes and interruptions ----------------------------------------------------------------------------------


def crash_trials(folder: Path, num_trials: int, *mutant: str) -> list[dict[str, Any]]:
    command = [sys.executable, str(CRASHES), str(folder), "7", str(num_trials), *mutant]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_an_engine_killed_at_any_step_ends_complete_with_one_release_and_one_entry(tmp_path: Path) -> None:
    trials = crash_trials(tmp_path, 5)
    assert sum(trial["deaths"] for trial in trials) >= 8
    for trial in trials:
        assert trial["phase"] == "Complete"
        assert trial["startedAfterwards"] == []
        assert trial["entries"] == {"a": ["Charged"], "b": ["Charged"]}
        assert trial["manifests"] == [True, True]
        assert trial["spent"] == [10.0, 10.0]


def test_an_engine_that_forgets_its_uid_is_caught_spending_twice(tmp_path: Path) -> None:
    trials = crash_trials(tmp_path, 1, "forgetful")
    assert any(len(phases) > 1 for trial in trials for phases in trial["entries"].values())


def test_stopping_lets_stages_save_and_the_same_command_goes_on(world: Any) -> None:
    saved = world.path / "saved"
    asked = [0]

    def personal(spec: Any) -> str | None:
        if (spec.stage, getattr(spec, "client", "")) != (Stage.TRAIN_PERSONAL, "a"):
            return None
        return f"trap 'touch {saved}; exit 75' TERM; touch {saved}.ready; while :; do sleep 0.01; done"

    def stop_requested() -> int:
        asked[0] = int(saved.with_name("saved.ready").exists())
        return asked[0]

    with pytest.raises(Interrupted, match="run the same command again to go on"):
        world.run(world.job(), world.stages(personal), stop_requested=stop_requested)
    assert saved.exists()
    assert RunFolder(world.path / "run").read_status()["phase"] == "Training"
    again = world.stages()
    assert world.run(world.job(), again).exit_code == 0
    assert not [name for name in again.started if name.startswith("release")]


def test_a_stage_that_does_not_stop_is_killed_after_the_grace(world: Any) -> None:
    stubborn = "trap '' TERM; while :; do sleep 0.01; done"
    ready = world.path / "ready"

    def behaviour(spec: Any) -> str | None:
        return f"touch {ready}; {stubborn}" if spec.stage is Stage.TRAIN_SHARED else None

    with pytest.raises(Interrupted):
        world.run(world.job(), world.stages(behaviour), stop_requested=lambda: int(ready.exists()), grace_seconds=2.0)


def test_an_orphan_of_a_dead_engine_is_ended_before_anything_is_planned(world: Any) -> None:
    job, folder = world.job(), RunFolder(world.path / "run")
    attempt = folder.attempt_folder((Stage.RELEASE, "a"), 1)
    attempt.mkdir(parents=True)
    environment = {**os.environ, "FEDDIFF_TERMINATION_LOG": str(attempt / "receipt.json")}
    orphan = subprocess.Popen(["/bin/sh", "-c", "sleep 600"], env=environment, start_new_session=True)
    try:
        stages = world.stages()
        assert world.run(job, stages).exit_code == 0
        assert orphan.wait(timeout=5) == -signal.SIGTERM
        assert next(spec for spec in stages.specs if spec.stage is Stage.RELEASE).attempt == 2
    finally:
        orphan.kill()
        orphan.wait()


def test_a_ledger_that_refuses_in_the_middle_leaves_no_stage_behind(
    world: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    pid = world.path / "pid"

    def behaviour(spec: Any) -> str | None:
        if spec.stage is not Stage.RELEASE:
            return None
        if spec.client == "a":
            return f"echo $$ > {pid}; exec sleep 600"
        return f"while [ ! -s {pid} ]; do sleep 0.01; done; {world.receipt_script(spec)}"

    def refuse(*_: object) -> None:
        raise PrivacyRefusal("another manifest")

    monkeypatch.setattr(LocalLedger, "record_manifest", refuse)
    with pytest.raises(PrivacyRefusal, match="another manifest"):
        world.run(world.job(), world.stages(behaviour))
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid.read_text()), 0)


def test_no_more_processes_than_slots_and_wide_stages_are_not_overtaken(world: Any) -> None:
    log = world.path / "log"

    def behaviour(spec: Any) -> str:
        return f"echo + >> {log}; {world.receipt_script(spec)}; echo - >> {log}"

    shared = {"replicas": 4}
    assert world.run(world.job(shared=shared), world.stages(behaviour), num_processes=1).exit_code == 0
    assert log.read_text().replace("\n", "") == "+-" * 10
