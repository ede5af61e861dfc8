"""The ranks of one pod: `python -m feddiff_trainer.ranks NUM_PROCESSES MODULE SPEC.json`.

torchrun ends with 1 whatever its ranks end with, and so hides a privacy refusal (77), which is never tried again, and
an interruption (75), which always is. Here the ranks are plain processes; SIGTERM is passed on to them, when one fails
the others are stopped, and the exit code is that of the rank which explains the end. The environment names WORLD_SIZE,
MASTER_ADDR, MASTER_PORT and NODE_RANK, the pod's number; none of them where one process is all. Nothing is written to
stdout but what rank 0 writes there.

A single process starts this way, too. As a container's first process it would not get SIGTERM before it has imported
everything and asks for it: the kernel drops it, and a pod that is stopped in its first seconds would go on until it is
killed. As a child it dies of it, which is an interruption.
"""

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType

from feddiff_protocol.errors import FINAL_EXIT_CODES, FeddiffError, Interrupted, UsageInvalid

BY_SIGNAL = (128 + signal.SIGTERM, 128 + signal.SIGKILL)
CPU_LIMIT = Path("/sys/fs/cgroup/cpu.max")  # this container's
GRACE_SECONDS = 30.0  # for the other ranks to end once one has failed; the pod's own grace is longer


def main(argv: Sequence[str]) -> int:
    """The exit code of all ranks of this pod together."""
    try:
        num_processes, module, spec = _arguments(argv)
    except FeddiffError as error:
        print(f"feddiff: {error}", file=sys.stderr)
        return error.exit_code
    ranks: list[subprocess.Popen[bytes]] = []
    told_to_stop: list[int] = []

    def stop(number: int, _: FrameType | None) -> None:
        told_to_stop.append(number)
        _tell(ranks, signal.SIGTERM)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    signal.signal(signal.SIGALRM, lambda number, frame: _tell(ranks, signal.SIGKILL))
    for local_rank in range(num_processes):
        ranks.append(_start(local_rank, num_processes, module, spec))
    if told_to_stop:  # while they were being started
        _tell(ranks, signal.SIGTERM)
    codes = _ended(ranks)
    return telling(own_codes(codes, bool(told_to_stop)))


def own_codes(codes: Sequence[int], stopped: bool) -> list[int]:
    """The codes in the order of their ends, where a death by our own signal is an interruption: the ranks are sent one
    when the pod is (`stopped`), or after the first failure, and may not listen yet, or not any more."""
    own = []
    for code in codes:
        own.append(Interrupted.exit_code if stopped and code in BY_SIGNAL else code)
        stopped = stopped or code != 0
    return own


def telling(codes: Sequence[int]) -> int:
    """The code that explains why the ranks ended, from all codes in the order of their ends.

    One that forbids another try comes before all others. Then the first failure, since the others fail in its wake;
    75 explains nothing where a rank failed, since the others are stopped then.
    """

    def order(code: int) -> int:
        return 0 if code in FINAL_EXIT_CODES else 3 if code == 0 else 2 if code == Interrupted.exit_code else 1

    return min(codes, key=order)


def _arguments(argv: Sequence[str]) -> tuple[int, str, str]:
    if len(argv) != 3 or not argv[0].isdecimal() or int(argv[0]) < 1:
        raise UsageInvalid(f"expected NUM_PROCESSES MODULE SPEC.json, found {' '.join(argv) or 'nothing'}")
    return int(argv[0]), argv[1], argv[2]


def _start(local_rank: int, num_processes: int, module: str, spec: str) -> "subprocess.Popen[bytes]":
    rank = int(os.environ.get("NODE_RANK", "0")) * num_processes + local_rank
    threads = {"OMP_NUM_THREADS": str(num_threads(_cpu_limit(), num_processes))}
    environment = {**threads, **os.environ, "RANK": str(rank), "LOCAL_RANK": str(local_rank)}
    return subprocess.Popen([sys.executable, "-m", module, spec], env=environment)


def num_threads(cpu_limit: str, num_processes: int) -> int:
    """Of each process: as many as the pod's limit has whole CPUs, by the words of cgroup v2's cpu.max ("QUOTA PERIOD",
    "max" for no limit). One where there is no limit: a thread that has to wait for a core keeps all the others waiting
    (docs/decisions/0018-threads-leave-a-core-free.md)."""
    quota, period = cpu_limit.split()
    cpus = 1 if quota == "max" else int(quota) // int(period)
    return max(1, cpus // num_processes)


def _cpu_limit() -> str:
    try:
        return CPU_LIMIT.read_text()
    except OSError:
        return "max 100000"


def _ended(ranks: Sequence["subprocess.Popen[bytes]"]) -> list[int]:
    """The ranks' exit codes in the order of their ends, a signal's as 128 + its number. When one fails the others are
    told to stop, and killed after GRACE_SECONDS."""
    codes: list[int] = []
    left = {rank.pid: rank for rank in ranks}
    while left:
        status = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOWAIT)
        rank = left.pop(status.si_pid, None) if status else None
        if rank is None:  # an orphan that a pod's first process inherits
            os.waitpid(status.si_pid if status else -1, 0)
            continue
        code = rank.wait()
        codes.append(code if code >= 0 else 128 - code)
        if code != 0 and left and not signal.getitimer(signal.ITIMER_REAL)[0]:
            _tell(list(left.values()), signal.SIGTERM)
            signal.setitimer(signal.ITIMER_REAL, GRACE_SECONDS)
    signal.setitimer(signal.ITIMER_REAL, 0)
    return codes


def _tell(ranks: Sequence["subprocess.Popen[bytes]"], number: signal.Signals) -> None:
    for rank in ranks:
        if rank.returncode is None:
            with suppress(ProcessLookupError):
                os.kill(rank.pid, number)  # Popen.send_signal would reap it, and _ended would wait for it for ever


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
