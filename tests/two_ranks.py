"""Two ranks of one training: a test's own file, run as a script by two processes that meet."""

import os
import subprocess
import sys
from pathlib import Path

import torch.distributed as dist


def run_two_ranks(script: str, folder: Path) -> list[tuple[int, str]]:
    """Exit code and stderr of both, by rank, of `script folder`; warnings are errors there as they are here."""
    # As torchrun does it: the parent keeps the store, so no port can be taken by somebody else in between.
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port)}
    shared |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "OMP_NUM_THREADS": "1"}
    shared |= {"PYTHONPATH": os.pathsep.join(sys.path)}  # the tests' own modules
    command = [sys.executable, "-W", "error", script, str(folder)]
    ranks = [
        subprocess.Popen(
            command, env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}, stderr=subprocess.PIPE
        )
        for rank in range(2)
    ]
    try:
        logs = [rank.communicate(timeout=300)[1].decode() for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    return [(rank.returncode, log) for rank, log in zip(ranks, logs, strict=True)]
