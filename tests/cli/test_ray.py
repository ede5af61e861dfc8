"""The same plan on a real Ray: the ranks' meeting, exit codes, lost workers, drivers and heads, budgets that hold."""

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from feddiff import ray_stages
from feddiff.engine import Setting, run_job, usable_cores
from feddiff.ray_stages import OBJECT_STORE_BYTES, StartOnRay, ray_cluster
from feddiff.run_folder import RunFolder
from feddiff_protocol.errors import ConfigurationInvalid, Interrupted, UsageInvalid
from feddiff_protocol.ledger import Phase
from feddiff_protocol.plan import JobPhase, StageKey, StageObserved
from feddiff_protocol.stages import Stage


@pytest.fixture(scope="module")
def cluster() -> Iterator[dict[str, Any]]:
    with ray_cluster(None, 2, None) as setting:
        yield setting


def on_ray(world: Any, job: Any, stages: Any, cluster: dict[str, Any], **setting: Any) -> Any:
    real = {"clock": time.time, "sleep": time.sleep}
    chosen = cluster | {"start_attempt": StartOnRay(gpus=0, gpu_share=0.0, command=stages)} | real
    return world.run(job, stages, **chosen | setting)


def only(stage: Stage, script: str, times: int = 1) -> Callable[[Any], str | None]:
    """The stage's first attempts do this instead."""
    return lambda spec: script if spec.stage is stage and spec.attempt <= times else None


def test_a_cluster_says_how_many_processes_and_takes_no_memory_for_objects(cluster: dict[str, Any]) -> None:
    assert (cluster["num_processes"], cluster["cores"]) == (2, usable_cores())
    assert cluster["start_attempt"].gpu_share == 0
    import ray

    assert ray.cluster_resources()["object_store_memory"] <= OBJECT_STORE_BYTES


def test_nobody_joins_a_ray_of_our_own_without_its_token(cluster: dict[str, Any]) -> None:
    """Its ports are open to the network, and whoever joins runs code."""
    import ray

    address = ray.get_runtime_context().gcs_address
    script = f"import ray; ray.init({address!r}, log_to_driver=False); print('joined', ray.cluster_resources()['CPU'])"
    known = {name: value for name, value in os.environ.items() if name != "RAY_AUTH_TOKEN"}
    for environment, joins in ((os.environ, True), (known | {"RAY_AUTH_MODE": "disabled"}, False)):
        done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
        assert ("joined 2.0" in done.stdout) == joins, done.stderr


def test_a_job_is_carried_out_once_and_in_order(world: Any, cluster: dict[str, Any]) -> None:
    stages = world.stages()
    for _ in range(2):  # the second time there is nothing to do
        assert on_ray(world, world.job(), stages, cluster).status.phase is JobPhase.COMPLETE
    owners = [f"{stage} {o}" for stage in ("release", "train-personal", "sample", "evaluate") for o in "ab"]
    assert sorted(stages.started) == sorted([*owners, "train-shared", "report"])
    assert world.ledger("a").num_releases == 1


def test_what_a_stage_ends_with_and_says_comes_back(world: Any, cluster: dict[str, Any]) -> None:
    stages = world.stages(only(Stage.EVALUATE, "echo 'feddiff: no such column' >&2; exit 65"))
    outcome = on_ray(world, world.job(), stages, cluster)
    assert outcome.exit_code == 65
    assert "evaluate ended with exit code 65: no such column" in outcome.message


def test_ranks_meet_at_the_address_of_the_first(world: Any, cluster: dict[str, Any]) -> None:
    note = 'echo "$RANK $WORLD_SIZE $LOCAL_RANK $MASTER_ADDR:$MASTER_PORT" > "$FEDDIFF_EXIT_FOLDER/../rank-$RANK"'
    stages = world.stages()
    stages.behaviour = lambda spec: f"{note}; {world.receipt_script(spec)}" if _shared(spec) else None
    assert on_ray(world, world.job(shared={"replicas": 2}), stages, cluster).exit_code == 0
    folder = world.path / "run/stages/train-shared/attempt-1"
    first, second = ((folder / f"rank-{rank}").read_text().split() for rank in (0, 1))
    assert (first[:3], second[:3]) == (["0", "2", "0"], ["1", "2", "0"])
    assert first[3] == second[3] == (folder / "meeting-point").read_text()


def _shared(spec: Any) -> bool:
    return bool(spec.stage is Stage.TRAIN_SHARED)


def test_a_rank_that_refuses_ends_the_others_and_is_believed(world: Any, cluster: dict[str, Any]) -> None:
    script = 'test "$RANK" = 0 && exec sleep 600; printf 77 > "$FEDDIFF_EXIT_FOLDER/1"; exit 77'
    stages = world.stages(only(Stage.TRAIN_SHARED, script))
    assert on_ray(world, world.job(shared={"replicas": 2}), stages, cluster).exit_code == 77
    assert stages.started.count("train-shared") == 1


def test_a_lost_worker_is_a_failed_attempt_whose_process_is_told_to_stop(world: Any, cluster: dict[str, Any]) -> None:
    note = f"echo $$ > {world.path}/pid; trap 'touch {world.path}/told; exit 75' TERM"
    stages = world.stages(only(Stage.SAMPLE, f"{note}; kill -9 $PPID; while :; do sleep 0.05; done"))
    world.owners = "a"
    assert on_ray(world, world.job(), stages, cluster).exit_code == 0
    ended = json.loads((world.path / "run/stages/sample-a/attempt-1/exit.json").read_text())
    assert (ended["exitCode"], stages.started.count("sample a")) == (137, 2)
    _gone(int((world.path / "pid").read_text()))
    assert (world.path / "told").exists()


def test_a_lost_ranks_process_has_ended_before_the_next_attempt_begins(world: Any, cluster: dict[str, Any]) -> None:
    """However long it takes to save its work: two would write into one store."""
    pid, alone = world.path / "pid", world.path / "alone"
    lost = f"trap 'sleep 6; exit 75' TERM; echo $$ > {pid}; kill -9 $PPID; while :; do sleep 0.05; done"
    stages, world.owners = world.stages(), "a"

    def behaviour(spec: Any) -> str | None:
        if spec.stage is not Stage.SAMPLE:
            return None
        return lost if spec.attempt == 1 else f"kill -0 $(cat {pid}) || touch {alone}; {world.receipt_script(spec)}"

    stages.behaviour = behaviour
    assert on_ray(world, world.job(), stages, cluster).exit_code == 0
    assert alone.exists()


def _gone(pid: int) -> None:
    deadline = time.monotonic() + 60
    while psutil.pid_exists(pid):
        assert time.monotonic() < deadline, f"process {pid} lives on"
        time.sleep(0.05)


def test_a_run_that_is_stopped_lets_stages_save_their_work(world: Any, cluster: dict[str, Any]) -> None:
    saves = f"trap 'touch {world.path}/saved; exit 75' TERM; touch {world.path}/ready; while :; do sleep 0.05; done"
    stages = world.stages(only(Stage.RELEASE, saves))
    world.owners = "a"
    with pytest.raises(Interrupted):
        on_ray(world, world.job(), stages, cluster, stop_requested=lambda: (world.path / "ready").exists())
    assert (world.path / "saved").exists()
    assert on_ray(world, world.job(), stages, cluster).exit_code == 0
    assert world.ledger("a").num_releases == 1


def test_an_attempt_that_ignores_being_told_is_killed_and_late(world: Any, cluster: dict[str, Any]) -> None:
    deaf = world.stages(only(Stage.REPORT, "trap '' TERM; while :; do sleep 0.05; done", times=9))
    world.owners = "a"
    job = world.job(deadlines={"stageSeconds": 60}, backoffLimit=0)
    clock = _LateClock(world.path / "run/stages/report/attempt-1/stderr.log")
    outcome = on_ray(world, job, deaf, cluster, clock=clock, grace_seconds=0.5)
    assert outcome.exit_code == 69
    assert "ran longer than deadlines.stageSeconds = 60" in outcome.message


class _LateClock:
    """A minute and more go by once the file is there."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __call__(self) -> float:
        return time.time() + (100 if self.file.exists() else 0)


def test_a_run_is_stopped_although_its_stage_waits_for_its_turn(world: Any, cluster: dict[str, Any]) -> None:
    """Others of the cluster have all its CPUs, for as long as they like."""
    import ray

    other = ray.remote(num_cpus=2)(lambda: time.sleep(600)).remote()
    waits = world.path / "run/stages/release-a/attempt-1/spec.json"
    world.owners, stages = "a", world.stages()
    try:
        with pytest.raises(Interrupted):
            on_ray(world, world.job(), stages, cluster, stop_requested=waits.exists)
    finally:
        ray.cancel(other, force=True)
    assert not (waits.parent / "stderr.log").exists(), "it had begun"
    assert on_ray(world, world.job(), stages, cluster).exit_code == 0
    assert world.ledger("a").num_releases == 1


def test_a_node_that_cannot_start_a_stage_is_a_mistake_in_words(world: Any, cluster: dict[str, Any]) -> None:
    """As one that does not see the run's folder cannot, or, here, one that takes no command of this length."""
    start = StartOnRay(gpus=0, gpu_share=0.0, command=lambda spec, path: ["true", 3_000_000 * "x"])
    with pytest.raises(ConfigurationInvalid) as caught:
        on_ray(world, world.job(), world.stages(), cluster, start_attempt=start)
    words = str(caught.value)
    assert words.startswith("expected the run's folder and this installation at the same path on every node")
    assert "Argument list too long" in words and len(words.splitlines()) == 1


# ---- What dies with everything in it


def command_line(world: Any, sample: str) -> list[str]:
    """`feddiff run --engine ray` with scripted stages; that of sampling is given."""
    script = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from conftest import FakeStages
from feddiff import main, ray_stages
ray_stages.HEAD_LOOK_SECONDS, ray_stages.HEAD_GONE_SECONDS = 0.2, 1.0
stages = FakeStages(lambda spec: {sample!r} if spec.stage == "sample" else None)
start = ray_stages.StartOnRay
ray_stages.StartOnRay = lambda **given: start(command=stages, **given)
main.main()
"""
    run = ["run", str(world.job_file()), "--dir", str(world.path / "run"), "--engine", "ray", "--processes", "2"]
    return [sys.executable, "-c", script, *run]


@pytest.mark.parametrize("victim", ["driver", "gcs_server"])
def test_a_run_whose_driver_or_head_was_killed_goes_on_and_spends_nothing_twice(
    world: Any, cluster: dict[str, Any], victim: str
) -> None:
    world.owners = "a"
    hangs = command_line(world, f"echo $$ > {world.path}/pid; exec sleep 600")
    with subprocess.Popen(hangs, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as driver:
        while not (world.path / "pid").exists():
            assert driver.poll() is None, driver.stderr and driver.stderr.read()
            time.sleep(0.05)
        family = psutil.Process(driver.pid).children(recursive=True)
        (driver if victim == "driver" else _named(family, victim)).send_signal(signal.SIGKILL)
        _, said = driver.communicate(timeout=120)
    if victim == "gcs_server":
        assert driver.returncode == 75
        assert "feddiff: the head of the Ray cluster is gone: " in said and "Traceback" not in said
    _gone(int((world.path / "pid").read_text()))
    stages = world.stages()
    assert on_ray(world, world.job(), stages, cluster).exit_code == 0
    assert stages.started == ["sample a", "evaluate a", "report"]
    assert [each.phase for each in world.ledger("a").entries] == [Phase.CHARGED]


def _named(processes: list[psutil.Process], name: str) -> psutil.Process:
    return next(each for each in processes if name in each.name())


# ---- Choosing a cluster


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"gpu_share": 1.5}, UsageInvalid, "--gpu-share: expected a number above 0 and at most 1, found 1.5"),
        ({"address": "127.0.0.1:1"}, ConfigurationInvalid, "no Ray cluster at 127.0.0.1:1"),
    ],
)
def test_what_cannot_be_joined_or_shared_is_refused(
    monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], error: type[Exception], says: str
) -> None:
    monkeypatch.setattr(ray_stages.ray, "shutdown", lambda: None)  # these tests' own cluster goes on
    asked: dict[str, Any] = {"address": None, "processes": None, "gpu_share": None} | options
    with pytest.raises(error, match=says), ray_cluster(**asked):
        pass


def joined(monkeypatch: pytest.MonkeyPatch, address: str, *cpus_of_nodes: float) -> dict[str, Any]:
    """What is made of a cluster of these nodes."""
    monkeypatch.setattr(ray_stages, "_join", lambda *asked: None)
    monkeypatch.setattr(ray_stages.ray, "shutdown", lambda: None)
    nodes = [{"Alive": True, "Resources": {"CPU": cpus} if cpus else {}} for cpus in cpus_of_nodes]
    monkeypatch.setattr(ray_stages.ray, "nodes", lambda: nodes)
    with ray_cluster(address, 8, None) as setting:
        return setting


def test_nodes_without_a_cpu_carry_nothing_and_slow_nobody_down(monkeypatch: pytest.MonkeyPatch) -> None:
    """A head has none by its manifest, and without a bound of CPUs all stages would run there at once."""
    setting = joined(monkeypatch, "head:6379", 0, 4, 8)
    assert (setting["num_processes"], setting["cores"]) == (8, 4)
    assert joined(monkeypatch, "local", 8)["cores"] == usable_cores()
    with pytest.raises(ConfigurationInvalid, match="a CPU at least in the Ray cluster at head:6379, found none"):
        joined(monkeypatch, "head:6379", 0, 0)


def test_ranks_that_never_have_room_at_once_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    joined(monkeypatch, "head:6379", 0, 1, 1)
    with pytest.raises(ConfigurationInvalid, match=r"room for 3 ranks of 0\.667 CPUs .* found room for 2"):
        ray_stages._places(3, 2 / 3, 0.0)


@pytest.mark.parametrize("at", ["init", "nodes"])
def test_being_stopped_while_a_cluster_is_joined_is_no_bug(monkeypatch: pytest.MonkeyPatch, at: str) -> None:
    def stopped(*given: Any, **more: Any) -> None:
        raise SystemExit(signal.SIGTERM)

    for name in ("init", "shutdown", at):
        monkeypatch.setattr(ray_stages.ray, name, stopped if name == at else lambda *given, **more: None)
    with pytest.raises(Interrupted, match="stopped; run the same command again"), ray_cluster("a:1", None, None):
        pass


# ---- Beside the local engine


@pytest.mark.timeout(900)
def test_ray_and_local_engine_agree_on_the_same_releases(world: Any, cluster: dict[str, Any], tmp_path: Path) -> None:
    """Both go on from one run that has released, with the stages as they are. What they leave in the stores is the same
    to the byte, but for times, in reports and an evaluation, and the order in a checkpoint's head; so are status and
    ledgers."""
    world.path, world.owners = tmp_path / "world", "a"
    world.path.mkdir()
    world.write_records()
    two_ranks = world.smallest | {"shared": world.smallest["shared"] | {"replicas": 2}}
    job, folder, released = world.job(**two_ranks), RunFolder(world.path / "run"), Released()
    with pytest.raises(Interrupted):
        run_job(job, folder, Setting(released, num_processes=2, stop_requested=released.count))
    shutil.copytree(world.path, tmp_path / "as released")
    found = {}
    for name, carriers in (("local", {"num_processes": 2}), ("ray", cluster)):
        shutil.rmtree(world.path)
        shutil.copytree(tmp_path / "as released", world.path)
        assert run_job(job, folder, Setting(Released(), **carriers)).exit_code == 0
        found[name] = left_by(world, folder)
    local, ray = found["local"], found["ray"]
    assert len([path for path in local if path.endswith("denoiser.safetensors")]) == 2
    assert [path for path in local.keys() | ray.keys() if local.get(path) != ray.get(path)] == []


FINISHED_AT = re.compile(rb'"finishedAt":"[^"]*"')


class Released:
    """A reporter that counts the releases which have ended."""

    num_ended = 0

    def stage_ended(self, key: StageKey, seen: StageObserved) -> None:
        self.num_ended += key[0] is Stage.RELEASE

    def count(self) -> int:
        return self.num_ended

    def __getattr__(self, name: str) -> Any:
        return lambda *told: None


def left_by(world: Any, folder: RunFolder) -> dict[str, Any]:
    """What a run leaves in the stores, by path, and what it says of itself and its budgets."""
    stores = [folder.path / "federation", *world.path.glob("*/feddiff/*/store")]
    files = [path for store in stores for path in store.rglob("*") if path.is_file()]
    results = [path for path in files if "report" not in path.name and path.parent.name != "checkpoints"]
    texts = {str(path): FINISHED_AT.sub(b"", path.read_bytes()) for path in results}
    hashes = {path: hashlib.sha256(text).hexdigest() for path, text in texts.items()}
    ledgers = {owner: world.ledger(owner) for owner in world.owners}
    return hashes | ledgers | {"status": folder.read_status()}
