"""Stages on a Ray cluster: every rank is a task, which starts the stage's process on a node that has room for it.

Engine and tasks meet in the attempt's folder, so all nodes see the run's folder and the owners' at the same paths: one
machine, or a file system that they share. Nothing goes through Ray's object store but exit codes. A task that Ray loses
is an attempt that was killed; its process is told to stop by the kernel, and saves its work where it still can.
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
from pathlib import Path
from typing import Any

from feddiff_protocol.errors import ConfigurationInvalid, Interrupted, UsageInvalid
from feddiff_protocol.plan import StageKey
from feddiff_protocol.stages import Stage

from .processes import (
    AnySpec,
    Attempt,
    StageCommand,
    dying_with_its_parent,
    num_processes,
    stage_environment,
)
from .run_folder import replace_file

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # read when ray is imported

try:
    import ray
    from ray.exceptions import RayError, RayTaskError
except ImportError:
    raise ConfigurationInvalid("--engine ray needs one more package: pip install 'feddiff[ray]'") from None

ON_GPU = (Stage.TRAIN_SHARED, Stage.TRAIN_PERSONAL)  # the others compute on the CPU, whatever is there
LOST = 128 + signal.SIGKILL
LOOK_SECONDS = 0.1
GRACE_SECONDS = 30.0  # for the other ranks to end once one has failed
OBJECT_STORE_BYTES = 80 << 20  # about the least that Ray starts with


# ---- A cluster ---------------------------------------------------------------------------------------------------


@contextmanager
def ray_cluster(address: str | None, processes: int | None, gpu_share: float | None) -> Iterator[dict[str, Any]]:
    """What of an engine's Setting a Ray cluster decides, for as long as it is joined; one of this machine's
    `processes` cores is started where neither `address` nor RAY_ADDRESS names another.

    Raises ConfigurationInvalid when there is none, or no GPU to share, UsageInvalid for a share that is none.
    """
    if gpu_share is not None and not 0 < gpu_share <= 1:
        raise UsageInvalid(f"--gpu-share: expected a number above 0 and at most 1, found {gpu_share}")
    _join(address or os.environ.get("RAY_ADDRESS") or "local", processes)
    try:
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        cpus, gpus = (int(sum(node.get(kind, 0) for node in nodes)) for kind in ("CPU", "GPU"))
        if gpu_share and not gpus:
            raise ConfigurationInvalid("--gpu-share: the Ray cluster has no GPU; leave the option out")
        slots = min(processes or cpus, cpus)
        yield {
            "num_processes": slots,
            "cores": min(cpus, *(int(node.get("CPU", 0)) for node in nodes)),
            "start_attempt": StartOnRay(gpus=gpus, gpu_share=(gpu_share or 1.0) if gpus else 0.0),
        }
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
        """Raises ConfigurationInvalid where the ranks can never have a GPU each."""
        num_ranks = num_processes(spec)
        if num_ranks > 1 and self.gpus and num_ranks > self.gpus:
            raise ConfigurationInvalid(
                f"{spec.stage.value} has {num_ranks} ranks (shared.replicas × processesPerReplica), the Ray cluster "
                f"{self.gpus} GPUs; ask for as many ranks as GPUs"
            )
        share = 0.0 if spec.stage not in ON_GPU else 1.0 if num_ranks > 1 and self.gpus else self.gpu_share
        (folder / "exits").mkdir(exist_ok=True)
        task = ray.remote(max_retries=0)(_rank).options(
            num_cpus=slots / num_ranks, num_gpus=share, name=f"{' '.join(filter(None, key))} {attempt}"
        )
        command, told = self.command(spec, folder / "spec.json"), stage_environment(folder, threads)
        ranks = [task.remote(rank, num_ranks, folder, command, told) for rank in range(num_ranks)]
        return RayAttempt(key, attempt, folder, slots, now, ranks)


@dataclass
class RayAttempt(Attempt):
    """One as the tasks of its ranks."""

    ranks: list[Any]
    _codes: list[int] = field(default_factory=list, init=False)  # in the order of their ends
    _failed_at: float | None = field(default=None, init=False)

    def begun(self) -> bool:
        return (self.folder / "stderr.log").exists()

    def ended(self) -> bool:
        ready, self.ranks = _wait(self.ranks)
        self._codes += [_code(rank) for rank in ready]
        if self.ranks and any(self._codes):
            self._stop_the_others()
        return not self.ranks

    def kill(self) -> None:
        _say(self.folder, signal.SIGKILL)

    def _tell_to_stop(self) -> None:
        _say(self.folder, signal.SIGTERM)

    def _own_code(self) -> int:
        failed = [code for code in self._codes if code]
        stopped = Interrupted.exit_code
        return next((code for code in failed if code != stopped), stopped) if failed else 0

    def _stop_the_others(self) -> None:
        if self._failed_at is None:
            self._failed_at = time.monotonic()
            _say(self.folder, signal.SIGTERM)
        elif time.monotonic() - self._failed_at > GRACE_SECONDS:
            _say(self.folder, signal.SIGKILL)


def _wait(ranks: list[Any]) -> tuple[list[Any], list[Any]]:
    """Those that have ended, and the others. Raises Interrupted when the cluster is gone."""
    if not ranks:
        return [], []
    try:
        ended, others = ray.wait(ranks, num_returns=len(ranks), timeout=0)
        return ended, others
    except RayError as error:
        raise Interrupted(f"the Ray cluster is gone: {error}; run the same command again to go on") from None


def _code(rank: Any) -> int:
    """What a rank's process ended with, a signal's as 128 + its number; a lost one was killed."""
    try:
        return int(ray.get(rank))
    except RayTaskError:
        raise  # our bug
    except RayError:
        return LOST


# ---- In a Ray worker ---------------------------------------------------------------------------------------------


def _rank(rank: int, num_ranks: int, folder: Path, command: list[str], told: Mapping[str, str]) -> int:
    """A rank's process from its start to its end."""
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
    while (code := process.poll()) is None:
        if (word := _word(folder)) != told_to:
            told_to = word
            os.killpg(process.pid, word)
        time.sleep(LOOK_SECONDS)
    return code if code >= 0 else 128 - code


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


def _say(folder: Path, word: signal.Signals) -> None:
    """All ranks of this attempt are to end so; a harder word is not taken back."""
    if _word(folder) not in (word, signal.SIGKILL):
        replace_file(folder / "stop", str(int(word)))


def _word(folder: Path) -> int:
    """0 as long as none was said."""
    try:
        return int((folder / "stop").read_text())
    except FileNotFoundError:
        return 0
