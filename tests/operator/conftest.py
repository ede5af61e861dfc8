"""An operator under test: the process that it is, an API server, two owners, and a kubelet that answers for pods."""

import asyncio
import contextlib
import itertools
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from cluster.kubelet import Kubelet
from cluster.kubernetes import ControlPlane
from feddiff_operator.cluster import FDJ, PDS, PRL, Cluster

Object = dict[str, Any]
PATIENCE_SECONDS = 60


@dataclass
class World:
    """A research namespace, two clinics with a dataset each, and what a test does there."""

    control_plane: ControlPlane
    folder: Path
    research: str
    clinics: tuple[str, str]

    def dataset(self, clinic: str, **spec: Any) -> Object:
        return {
            "apiVersion": "feddiff.dev/v1alpha1",
            "kind": "PrivateDataset",
            "metadata": {"name": "scans", "namespace": clinic},
            "spec": {
                "source": {"format": "npz", "path": "train.npz", "volumeClaim": "scans"},
                "image": {"channels": 1, "height": 8, "width": 8},
                "classes": {"count": 2, "records": [100, 5]},
                "budget": {"epsilon": "20", "delta": "1e-5"},
                "access": [{"namespace": self.research, "maxEpsilon": "10"}],
                "store": {"uri": f"s3://{clinic}/feddiff", "secretName": "own-store"},
                "federation": {"uri": "s3://federation/jobs", "secretName": "federation-store"},
                **spec,
            },
        }

    def job(self, name: str = "job", **spec: Any) -> Object:
        clients = [
            {"name": n, "dataset": {"namespace": c, "name": "scans"}} for n, c in zip("ab", self.clinics, strict=True)
        ]
        privacy = {"mechanism": "summary", "epsilon": "10", "delta": "1e-5", "clipNorm": "4.25", "momentClipNorm": "2"}
        return {
            "apiVersion": "feddiff.dev/v1alpha1",
            "kind": "FederatedDiffusionJob",
            "metadata": {"name": name, "namespace": self.research},
            "spec": {
                "clients": clients,
                "privacy": privacy,
                "diffusion": {"splitSigma": "1"},
                "store": {"uri": "s3://federation/jobs", "secretName": "federation-trainer"},
                **spec,
            },
        }

    @property
    def flags(self) -> list[str]:
        """Of an operator that serves these namespaces and no others."""
        namespaces = [f"--namespace={namespace}" for namespace in (self.research, *self.clinics)]
        return ["--trainer-image=trainer:test", "--port=0", f"--lease-namespace={self.research}", *namespaces]

    @contextlib.contextmanager
    def operator(self, *flags: str, kubeconfig: Path | None = None) -> Iterator[subprocess.Popen[bytes]]:
        """The operator's process, ended at the end; its log lies in `folder`."""
        command = [sys.executable, "-m", "feddiff_operator", *self.flags, "--lease-seconds=3", *flags]
        environment = {**os.environ, "KUBECONFIG": str(kubeconfig or self.control_plane.kubeconfig)}
        with (self.folder / "operator.log").open("ab") as log:
            process = subprocess.Popen(command, env=environment, stderr=log)
        try:
            yield process
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
            process.wait(timeout=30)

    @contextlib.asynccontextmanager
    async def kubelet(self, outcome: Callable[[Object, Object], int | None] | None = None) -> AsyncIterator[Kubelet]:
        """A connection to the API server with a kubelet that answers for every pod."""
        async with self.cluster() as cluster:
            kubelet = Kubelet(cluster, outcome, (self.research, *self.clinics))
            task = asyncio.create_task(kubelet.run())
            try:
                yield kubelet
            finally:
                kubelet.leaving = True
                await task

    @contextlib.asynccontextmanager
    async def cluster(self) -> AsyncIterator[Cluster]:
        async with await Cluster.from_kubeconfig(str(self.control_plane.kubeconfig), 1000, 1000) as cluster:
            yield cluster

    async def apply(self, cluster: Cluster, *objects: Object) -> None:
        kinds = {"PrivateDataset": PDS, "FederatedDiffusionJob": FDJ}
        for obj in objects:
            await cluster.create(kinds[obj["kind"]], obj)

    async def until(
        self, cluster: Cluster, good: Callable[[Object], bool], name: str = "job", seconds: float = PATIENCE_SECONDS
    ) -> Object:
        """The job once it is as wanted. Fails with what it was last, and with the operator's log."""
        last: Object | None = None
        try:
            async with asyncio.timeout(seconds):
                while True:
                    last = await cluster.get(FDJ, self.research, name)
                    if last is not None and good(last):
                        return last
                    await asyncio.sleep(0.1)
        except TimeoutError:
            last = {**last, "metadata": {}} if last else None
            raise AssertionError(f"never as wanted; last: {last}\noperator: {self.log()}") from None

    def log(self) -> str:
        """The end of what the operator has said."""
        return (self.folder / "operator.log").read_text()[-4000:]

    @staticmethod
    def phase(phase: str) -> Callable[[Object], bool]:
        return lambda job: (job.get("status") or {}).get("phase") == phase

    @staticmethod
    def running(job: Object) -> int:
        return sum(each["running"] for each in job["status"]["stages"])

    async def gone(self, cluster: Cluster, name: str = "job") -> None:
        async with asyncio.timeout(PATIENCE_SECONDS):
            while await cluster.get(FDJ, self.research, name) is not None:
                await asyncio.sleep(0.1)

    async def entries(self, cluster: Cluster) -> list[Object]:
        return [entry for clinic in self.clinics for entry in await cluster.list(PRL, clinic)]


@pytest.fixture
def new_world(control_plane: ControlPlane, tmp_path: Path) -> Callable[[], World]:
    """Worlds beside each other, each with namespaces of its own."""
    numbers = itertools.count()

    def create() -> World:
        folder = tmp_path / f"world-{next(numbers)}"
        folder.mkdir()
        clinics = (control_plane.namespace("clinic-a"), control_plane.namespace("clinic-b"))
        return World(control_plane, folder, control_plane.namespace("research"), clinics)

    return create


@pytest.fixture
def world(new_world: Callable[[], World]) -> World:
    return new_world()
