"""Faults on a real node: pods, operator, API server, store, network and node are broken under a running job.

Five in one job run with all tests; `make chaos` runs each in a job of its own and writes docs/reliability.md.
"""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from cluster.chaos import FAULTS, OWNERS, Fault, Laboratory, Outcome, carry_out, onboard
from cluster.evidence import keys_of, leaks, readable
from cluster.federation import ROOT, federation
from cluster.gate import Gate
from cluster.kubernetes import NODE_ADDRESS
from cluster.reliability import page

pytestmark = [pytest.mark.cluster, pytest.mark.node]

PAGE = os.environ.get("FEDDIFF_CHAOS", "")  # where to write what all faults led to
OUTCOMES: list[Outcome] = []


@pytest.fixture(scope="module")
def laboratory(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Laboratory]:
    folder = tmp_path_factory.mktemp("chaos")
    with (
        federation(folder, OWNERS) as world,
        Gate(world.store.endpoint, NODE_ADDRESS) as gate,
        small_disk(folder / "disk") as disk,
    ):
        world.install("--set", "operator.leaseSeconds=5")
        subprocess.run([sys.executable, ROOT / "examples/digits/make_digits.py", folder / "records"], check=True)
        laboratory = Laboratory(world, gate, disk)
        onboard(laboratory, folder / "records")
        yield laboratory
    if PAGE and {each.fault.name for each in OUTCOMES} == {each.name for each in FAULTS}:
        Path(PAGE).write_text(page(OUTCOMES))


@contextmanager
def small_disk(folder: Path) -> Iterator[Path]:
    """4 MB, for whoever the stages run as."""
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m,uid=65532,gid=65532", "tmpfs", folder], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def in_words(fault: Fault) -> str:
    return fault.name.replace(" ", "-")


@pytest.mark.parametrize(
    "fault",
    [pytest.param(each, id=in_words(each), marks=() if each.in_ci else pytest.mark.chaos) for each in FAULTS],
)
def test_the_job_ends_as_if_nothing_had_happened(laboratory: Laboratory, fault: Fault) -> None:
    outcome = carry_out(laboratory, fault, len(OUTCOMES))
    OUTCOMES.append(outcome)
    print(page([outcome]).splitlines()[-1])
    assert outcome.wrongs == ()


# ---- Secrets


def test_secrets_can_be_read_nowhere(laboratory: Laboratory) -> None:
    """Faults make every part say what it rarely says: the keys of all stores are in nothing of it."""
    world = laboratory.world
    keys = keys_of(world)
    assert len(keys) >= 12
    assert leaks(keys, readable(world, {})) == []
    kubectl = world.node.kubectl
    kubectl("create", "configmap", "careless", "-n", "research", f"--from-literal=key={min(keys)}")
    assert leaks(keys, readable(world, {})) == ["configmaps"]
    kubectl("delete", "configmap", "careless", "-n", "research")
