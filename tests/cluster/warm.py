"""Operators that start at once: this process has imported everything, and forks for each of them.

Reads a JSON line for each one, {"argv": [...], "kubeconfig": ..., "log": ...}, and answers with its pid: a process of
its own, which dies of its own SIGKILL. At the end of its input it ends, and all of them with it. Python code in the
first argument runs before any of them starts: that is how a mutant is made.
"""

import asyncio
import json
import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn, Self

from feddiff_operator.__main__ import main

TESTS = Path(__file__).parents[1]


class Warm:
    """That process. A context manager; on leaving it all operators are gone."""

    def __init__(self, mutant: str = "") -> None:
        self._command = [sys.executable, "-W", "error", "-m", "cluster.warm", mutant]

    def __enter__(self) -> Self:
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self._process = subprocess.Popen(self._command, cwd=TESTS, start_new_session=True, **pipes)
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate()

    def operator(self, argv: Iterable[str], kubeconfig: Path, log: Path) -> "Process":
        """An operator's process, started."""
        order = {"argv": list(argv), "kubeconfig": str(kubeconfig), "log": str(log)}
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        return Process(int(self._process.stdout.readline()))


class Process:
    """One operator's process."""

    def __init__(self, pid: int) -> None:
        self.pid, self._descriptor = pid, os.pidfd_open(pid)

    def kill(self) -> None:
        """As by kill -9; nothing happens if it is dead already."""
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._descriptor, signal.SIGKILL)

    async def ended(self) -> None:
        """Returns once it is dead."""
        loop, dead = asyncio.get_running_loop(), asyncio.Event()
        loop.add_reader(self._descriptor, dead.set)
        try:
            await dead.wait()
        finally:
            loop.remove_reader(self._descriptor)

    def close(self) -> None:
        os.close(self._descriptor)


def warm() -> NoReturn:
    import feddiff_operator.main  # noqa: F401  (what the operator imports late)

    exec(sys.argv[1], {})
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the dead are nobody's business
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            become(json.loads(line))
        print(pid, flush=True)
    os.killpg(0, signal.SIGKILL)
    raise AssertionError


def become(order: dict[str, Any]) -> NoReturn:
    """The operator's process, from here on."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    null = os.open(os.devnull, os.O_RDWR)
    log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for number, file in enumerate((null, null, log)):
        os.dup2(file, number)
    os.environ["KUBECONFIG"], sys.argv = order["kubeconfig"], ["feddiff_operator", *order["argv"]]
    code = 1
    try:
        code = main()
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    warm()
