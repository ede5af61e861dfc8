"""Stages on a Ray cluster: every rank is a task, which starts the stage's process on a node that has room for it.

Engine and tasks meet in the attempt's folder, so all nodes see the run's folder and the owners' at the same paths: one
machine, or a file system that they share. Nothing goes through Ray's object store but exit codes. A task that Ray loses
is an attempt that was killed; its process is told to stop by the kernel, saves its work where it still can, and is
waited for as long as its node is there.
"""

import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from feddiff_protocol.errors import ConfigurationInvalid, Interrupted, UsageInvalid
from feddiff_protocol.plan import StageKey
from feddiff_protocol.stages import Stage

from .engine import usable_cores
from .processes import (
    AnySpec,
    Attempt,
    StageCommand,
    dying_with_its_parent,
    num_processes,
    orphans_below,
    stage_environment,
    stop_orphans,
)
from .run_folder import replace_file

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # read when ray is imported

try:
    import ray
    from ray.exceptions import RayError, RayTaskError, TaskCancelledError
    from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy
except ImportError:
    raise ConfigurationInvalid("--engine ray needs one more package: pip install 'feddiff[ray]'") from None

ON_GPU = (Stage.TRAIN_SHARED, Stage.TRAIN_PERSONAL)  # the others compute on the CPU, whatever is there
LOST = 128 + signal.SIGKILL
LOOK_SECONDS, FOLLOWING_SECONDS = 0.1, 0.5
GRACE_SECONDS = 30.0  # for the other ranks to end once one has failed
HEAD_LOOK_SECONDS, HEAD_GONE_SECONDS = 2.0, 30.0  # after 60 without it Ray would end this process, with 1 and no word
OBJECT_STORE_BYTES = 80 << 20  # about the least that Ray starts with


# ---- A cluster ---------------------------------------------------------------------------------------------------


@contextmanager
def ray_cluster(address: str | None, processes: int | None, gpu_share: float | None) -> Iterator[dict[str, Any]]:
    """What of an engine's Setting a Ray cluster decides, for as long as it is joined; one of this machine's
    `processes` cores is started where neither `address` nor RAY_ADDRESS names another.

    Raises ConfigurationInvalid when there is none, or none with a CPU, or no GPU to share, UsageInvalid for a share
    that is none, Interrupted when it is stopped while it joins.
    """
    if gpu_share is not None and not 0 < gpu_share <= 1:
        raise UsageInvalid(f"--gpu-share: expected a number above 0 and at most 1, found {gpu_share}")
    place = address or os.environ.get("RAY_ADDRESS") or "local"
    try:
        _join(place, processes)
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        cpus_of_nodes = [int(node["CPU"]) for node in nodes if node.get("CPU", 0) >= 1]
        cpus, gpus = sum(cpus_of_nodes), int(sum(node.get("GPU", 0) for node in nodes))
        if not cpus:
            raise ConfigurationInvalid(
                f"expected a CPU at least in the Ray cluster at {place}, found none; wait for its workers, or add one"
            )
        if gpu_share and not gpus:
            raise ConfigurationInvalid("--gpu-share: the Ray cluster has no GPU; leave the option out")
        yield {
            "num_processes": min(processes or cpus, cpus),
            "cores": usable_cores() if place == "local" else min(cpus_of_nodes),
            "start_attempt": StartOnRay(gpus=gpus, gpu_share=(gpu_share or 1.0) if gpus else 0.0),
        }
    except SystemExit:  # what Ray makes of SIGTERM, until a run counts it itself
        raise Interrupted("stopped; run the same command again to go on") from None
    finally:
        ray.shutdown()


def _join(address: str, processes: int | None) -> None:
    if address == "local":
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))  # its ports are open to the network
    own: dict[str, Any] = {"num_cpus": processes, "object_store_memory": OBJECT_STORE_BYTES, "include_dashboard": False}
    try:
        ray.init(address, log_to_driver=False, logging_level="ERROR", **(own if address == "local" else {}))
    except (ConnectionError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ConfigurationInvalid(f"no Ray cluster at {address}: {reason}; name one that runs by --address") from None


class Head:
    """The head of a cluster, by whether its port is open."""

    def __init__(self, address: str) -> None:
        host, _, port = address.rpartition(":")
        self.place = host, int(port)
        self.looked_at = self.seen_at = time.monotonic()

    def look(self) -> None:
        """Raises Interrupted once it has been gone for a while."""
        if time.monotonic() - self.looked_at < HEAD_LOOK_SECONDS:
            return
        try:
            socket.create_connection(self.place, timeout=HEAD_LOOK_SECONDS).close()
            self.seen_at = time.monotonic()
        except OSError as error:
            if time.monotonic() - self.seen_at > HEAD_GONE_SECONDS:
                raise Interrupted(
                    f"the head of the Ray cluster is gone: {error}; run the same command again to go on"
                ) from None
        self.looked_at = time.monotonic()


_head = lru_cache(maxsize=1)(Head)  # of the cluster that this process has joined


# ---- Attempts ----------------------------------------------------------------------------------------------------


def rank_command(spec: AnySpec, spec_path: Path) -> list[str]:
    """The process of one rank."""
    return [sys.executable, "-m", spec.stage.module, str(spec_path)]


@dataclass(frozen=True)
class StartOnRay:
    """A StartAttempt: one CPU for each slot, and for what trains its share of a GPU; a rank of several has a whole one,
    since two cannot talk through one."""

    gpus: int
    gpu_share: float
    command: StageCommand = rank_command

    def __call__(
        self, key: StageKey, attempt: int, folder: Path, spec: AnySpec, slots: int, threads: int, now: float
    ) -> Attempt:
        """Raises ConfigurationInvalid where the ranks can never have their share of CPUs, or a GPU each."""
        num_ranks = num_processes(spec)
        if num_ranks > 1 and self.gpus and num_ranks > self.gpus:
            raise ConfigurationInvalid(
                f"{spec.stage.value} has {num_ranks} ranks (shared.replicas × processesPerReplica), the Ray cluster "
                f"{self.gpus} GPUs; ask for as many ranks as GPUs"
            )
        share = 0.0 if spec.stage not in ON_GPU else 1.0 if num_ranks > 1 and self.gpus else self.gpu_share
        (folder / "exits").mkdir(exist_ok=True)
        places = _places(num_ranks, slots / num_ranks, share)
        task = ray.remote(max_retries=0)(_rank).options(
            num_cpus=slots / num_ranks,
            num_gpus=share,
            name=f"{' '.join(filter(None, key))} {attempt}",
            scheduling_strategy=PlacementGroupSchedulingStrategy(places) if places else "DEFAULT",
        )
        command, told = self.command(spec, folder / "spec.json"), stage_environment(folder, threads)
        ranks = {task.remote(rank, num_ranks, folder, command, told): rank for rank in range(num_ranks)}
        return RayAttempt(key, attempt, folder, slots, now, ranks, places)


def _places(num_ranks: int, cpus: float, gpus: float) -> PlacementGroup | None:
    """Room for all ranks of an attempt, taken at once or not at all: some of them would wait for the others in vain."""
    if num_ranks == 1:
        return None
    nodes = [node["Resources"].get("CPU", 0.0) for node in ray.nodes() if node["Alive"]]
    room = sum(int(node / cpus + 1e-3) for node in nodes)  # Ray counts in ten-thousandths
    if room < num_ranks:
        raise ConfigurationInvalid(
            f"expected room for {num_ranks} ranks of {cpus:.3g} CPUs in the Ray cluster, each on one node, found room"
            f" for {room}; ask for fewer (shared.replicas × processesPerReplica), or add nodes"
        )
    bundle = {"CPU": cpus} | ({"GPU": gpus} if gpus else {})
    return placement_group([bundle] * num_ranks)


@dataclass
class RayAttempt(Attempt):
    """One as the tasks of its ranks."""

    ranks: dict[Any, int]  # by their tasks
    places: "PlacementGroup | None"
    _codes: list[int] = field(default_factory=list, init=False)  # in the order of their ends
    _followed: set[int] = field(default_factory=set, init=False)  # ranks whose tasks were lost and processes are not
    _failed_at: float | None = field(default=None, init=False)

    def begun(self) -> bool:
        return (self.folder / "stderr.log").exists()

    def ended(self) -> bool:
        for task in _ended(list(self.ranks)):
            rank, code = self.ranks.pop(task), _code(task)
            if code == LOST and rank not in self._followed and (follower := _follower(self.folder, rank)):
                self.ranks[follower] = rank
                self._followed.add(rank)
            else:
                self._codes.append(code)
        if self.ranks and any(self._codes):
            self._stop_the_others()
        if not self.ranks and self.places is not None:
            remove_placement_group(self.places)
            self.places = None
        return not self.ranks

    def kill(self) -> None:
        self._say(signal.SIGKILL)

    def _tell_to_stop(self) -> None:
        self._say(signal.SIGTERM)

    def _say(self, word: signal.Signals) -> None:
        """To the ranks that have begun; one that waits for its turn needs none any more."""
        _leave_word(self.folder, word)
        for task, rank in self.ranks.items():
            if not _sign_of_life(self.folder, rank).exists():
                ray.cancel(task)

    def _own_code(self) -> int:
        failed = [code for code in self._codes if code]
        stopped = Interrupted.exit_code
        return next((code for code in failed if code != stopped), stopped) if failed else 0

    def _stop_the_others(self) -> None:
        if self._failed_at is None:
            self._failed_at = time.monotonic()
            self._say(signal.SIGTERM)
        elif time.monotonic() - self._failed_at > GRACE_SECONDS:
            self._say(signal.SIGKILL)


def _ended(tasks: list[Any]) -> list[Any]:
    """Those that have ended. Raises Interrupted when the cluster is gone."""
    if not tasks:
        return []
    _head(ray.get_runtime_context().gcs_address).look()
    try:
        ended, _ = ray.wait(tasks, num_returns=len(tasks), timeout=0)
        return list(ended)
    except RayError as error:
        raise Interrupted(f"the Ray cluster is gone: {error}; run the same command again to go on") from None


def _code(task: Any) -> int:
    """What a rank's process ended with, a signal's as 128 + its number; a lost one was killed. Raises
    ConfigurationInvalid where it cannot be started on its node."""
    try:
        return int(ray.get(task))
    except TaskCancelledError:
        return Interrupted.exit_code
    except RayTaskError as error:
        if not isinstance(error.cause, OSError | ImportError):
            raise  # our bug
        raise ConfigurationInvalid(
            "expected the run's folder and this installation at the same path on every node of the Ray cluster, found:"
            f" {error.cause}; see docs/ray.md"
        ) from None
    except RayError:
        return LOST


def _follower(folder: Path, rank: int) -> Any:
    """A task that waits on a lost rank's node until its process is gone, if it had begun and the node is there."""
    sign = _sign_of_life(folder, rank)
    node = sign.read_text() if sign.exists() else ""
    if node not in {each["NodeID"] for each in ray.nodes() if each["Alive"]}:
        return None
    there = NodeAffinitySchedulingStrategy(node, soft=False)
    return ray.remote(max_retries=0, num_cpus=0)(_end_what_is_left).options(scheduling_strategy=there).remote(folder)


# ---- In a Ray worker ---------------------------------------------------------------------------------------------


def _rank(rank: int, num_ranks: int, folder: Path, command: list[str], told: Mapping[str, str]) -> int:
    """A rank's process from its start to its end."""
    replace_file(_sign_of_life(folder, rank), ray.get_runtime_context().get_node_id())
    if _word(folder):  # said while this waited for its turn
        return Interrupted.exit_code
    environment = os.environ | told
    if num_ranks > 1:
        place = _meeting_point(rank, folder)
        if not place:
            return Interrupted.exit_code
        environment |= {"RANK": str(rank), "LOCAL_RANK": "0", "WORLD_SIZE": str(num_ranks)} | place
    with (folder / "stderr.log").open("ab") as stderr, (folder / "stdout.log").open("ab") as stdout:
        process = subprocess.Popen(
            dying_with_its_parent(command),
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=stderr,
            env=environment,
            process_group=0,
        )
    told_to = 0
    try:
        while (code := process.poll()) is None:
            if (word := _word(folder)) != told_to:
                told_to = word
                os.killpg(process.pid, word)
            time.sleep(LOOK_SECONDS)
    except BaseException:  # cancelled in the moment in which it began
        os.killpg(process.pid, signal.SIGTERM)
        raise
    return code if code >= 0 else 128 - code


def _end_what_is_left(folder: Path) -> int:
    """The kernel has told it to stop already; told again, it would leave the saving of its work."""
    deadline = time.monotonic() + GRACE_SECONDS
    while any(orphans_below(folder)) and time.monotonic() < deadline:
        time.sleep(FOLLOWING_SECONDS)
    stop_orphans(folder, grace_seconds=FOLLOWING_SECONDS)
    return LOST


def _meeting_point(rank: int, folder: Path) -> dict[str, str]:
    """Where rank 0 waits for the others; nothing if the attempt was stopped before it had said so."""
    file = folder / "meeting-point"
    if rank == 0:
        with socket.create_server(("", 0)) as free:
            host = ray.util.get_node_ip_address()
            replace_file(file, f"{host}:{free.getsockname()[1]}")
    while not file.exists():
        if _word(folder):
            return {}
        time.sleep(LOOK_SECONDS)
    host, _, port = file.read_text().rpartition(":")
    return {"MASTER_ADDR": host, "MASTER_PORT": port}


def _sign_of_life(folder: Path, rank: int) -> Path:
    """Is there once the rank has its turn, and says on which node."""
    return folder / f"rank-{rank}-begun"


def _leave_word(folder: Path, word: signal.Signals) -> None:
    """All ranks of this attempt are to end so; a harder word is not taken back."""
    if _word(folder) not in (word, signal.SIGKILL):
        replace_file(folder / "stop", str(int(word)))


def _word(folder: Path) -> int:
    """0 as long as none was said."""
    try:
        return int((folder / "stop").read_text())
    except FileNotFoundError:
        return 0
