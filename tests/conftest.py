"""A real API server for the tests that ask for one, and one whole node for those that run pods.

    def test_a_job_is_stored(control_plane: ControlPlane) -> None:
        namespace = control_plane.namespace()
        control_plane.kubectl("apply", "-n", namespace, "-f", "-", stdin=yaml.safe_dump(job))

Types: `from cluster.kubernetes import ControlPlane, Node`.
"""

import fcntl
import os
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest
import structlog
from xdist.scheduler import LoadFileScheduling

from cluster.kubernetes import RUN, CommandFailed, ControlPlane, Node, ProgramsMissing
from feddiff.processes import THREAD_VARIABLES

# Before torch and numpy are loaded, here and in every process that a test starts: threads of processes side by side
# wait for each other in loops, and tests take twice as long (docs/decisions/0018).
for variable in THREAD_VARIABLES:
    os.environ.setdefault(variable, "1")

C = TypeVar("C", bound=ControlPlane)
CRDS = Path(__file__).parents[1] / "crds"
SHORT_NAMES = ("fdj", "pds", "prl")
NODE_SECONDS = 1200  # a node starts, loads images and waits for pods
NODE_FILES = ("test_first_job.py", "test_chaos.py", "test_node.py", "test_e2e.py")


LONGEST = {
    "chaos": "breaks things one after the other for half an hour; left out unless asked for",
    "e2e": "a whole job of three owners with a Prometheus beside it, ten minutes; left out unless asked for, its short"
    " form is cluster/test_first_job.py",
    "sweep": "kills an operator at every call of a job, half an hour; left out unless asked for",
}


def pytest_configure(config: pytest.Config) -> None:
    """Here and not in pyproject.toml, a line of which makes both images anew."""
    for marker, words in LONGEST.items():
        config.addinivalue_line("markers", f"{marker}: {words}")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """What needs a cluster says so (`-m "not cluster"`), what needs a node too (`-m node`), and may take its time. The
    longest are run when they are asked for by name (`-m chaos`) and else left out. The node comes first, then files
    with many tests: what takes long at the end would keep one core waiting."""
    unasked = [marker for marker in LONGEST if marker not in config.getoption("markexpr")]
    longest = [item for item in items if any(map(item.get_closest_marker, unasked))]
    config.hook.pytest_deselected(items=longest)
    items[:] = [item for item in items if item not in longest]
    for item in items:
        fixtures = getattr(item, "fixturenames", ())
        if "control_plane" in fixtures or "node" in fixtures or "charts" in item.path.parts:
            item.add_marker(pytest.mark.cluster)
        if "node" in fixtures:
            item.add_marker(pytest.mark.node)
        if item.get_closest_marker("node"):
            assert item.path.name in NODE_FILES, f"{item.path.name} runs a node and is not in NODE_FILES"
            if item.get_closest_marker("timeout") is None:
                item.add_marker(pytest.mark.timeout(NODE_SECONDS))
    num_tests = Counter(item.path for item in items)
    items.sort(key=lambda item: (item.get_closest_marker("node") is None, -num_tests[item.path]))


class OneNode(LoadFileScheduling):
    """As `--dist loadfile`, but all files that run a node, of which a machine has one, are one process's."""

    def _split_scope(self, nodeid: str) -> str:
        file = str(super()._split_scope(nodeid))
        return "node" if file.endswith(NODE_FILES) else file


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> OneNode | None:
    return OneNode(config, log) if config.getoption("dist") == "loadfile" else None


@pytest.fixture(autouse=True)
def _own_log() -> Iterator[None]:
    """A stage or an operator that a test runs in its own process logs to that test's stderr, which then is closed: the
    next test's log goes elsewhere."""
    yield
    structlog.reset_defaults()


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """torch computes with one thread, whatever the tests of a file ask of it."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def control_plane(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ControlPlane]:
    """etcd, API server and controller-manager with our three kinds; tests share it and take namespaces of their own."""
    yield from _with_kinds(ControlPlane(tmp_path_factory.mktemp("kubernetes")))


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    """A whole Kubernetes with one node and our three kinds. One file of tests after the other gets it."""
    if os.geteuid():
        pytest.fail("tests that run pods need root; `make test-local` leaves them out", pytrace=False)
    with RUN.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield from _with_kinds(Node(tmp_path_factory.mktemp("node")))


def _with_kinds(cluster: C) -> Iterator[C]:
    try:
        cluster.up()
    except ProgramsMissing as error:
        pytest.fail(str(error), pytrace=False)
    try:
        cluster.kubectl("apply", "-f", CRDS)
        cluster.kubectl("wait", "--for=condition=Established", "--timeout=30s", "-f", CRDS)
        _wait_until_described(cluster)
        yield cluster
    finally:
        cluster.down()


def _wait_until_described(cluster: ControlPlane) -> None:
    """An API server takes objects of a new kind before it can tell kubectl what its short name is."""
    deadline = time.monotonic() + 30
    for name in SHORT_NAMES:
        while True:
            try:
                cluster.kubectl("explain", name)
                break
            except CommandFailed:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.2)
