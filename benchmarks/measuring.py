"""What benchmarks measure alike: seconds and memory of a piece of work, and how a few figures are said."""

import multiprocessing
import resource
import statistics
import time
from collections.abc import Callable
from pathlib import Path

Work = Callable[[], object]


def spread(seconds: tuple[float, ...]) -> dict[str, float]:
    return {
        "min": round(min(seconds), 3),
        "median": round(statistics.median(seconds), 3),
        "max": round(max(seconds), 3),
    }


def in_a_process(prepare: Callable[[], Work]) -> tuple[float, float, int]:
    """Wall and processor seconds of the work in a process of its own, and its peak beyond the memory it began with, in
    bytes."""
    context = multiprocessing.get_context("fork")  # which starts with what is in memory here
    here, there = context.Pipe(duplex=False)

    def run() -> None:
        work, began_with = prepare(), own_peak()
        wall, cpu = time.perf_counter(), time.process_time()
        work()
        there.send((time.perf_counter() - wall, time.process_time() - cpu, own_peak() - began_with))

    process = context.Process(target=run)
    process.start()
    there.close()
    taken = here.recv()
    process.join()
    return taken


def own_peak() -> int:
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def highest_memory(process: int | str) -> int:
    """MiB so far, by /proc: what getrusage says begins with the memory of the process that started this one."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        return 0  # it has ended
    return next((int(line.split()[1]) // 1024 for line in lines if line.startswith("VmHWM")), 0)
