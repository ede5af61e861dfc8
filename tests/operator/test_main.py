"""The operator's process on a real API server, with a reconciler that only says what it was given."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cluster.kubernetes import ControlPlane

Object = dict[str, Any]

STUB = """
import dataclasses, json, os, sys
from feddiff_operator.main import run
from feddiff_operator.progress import Target
from feddiff_operator.settings import parse_settings
from feddiff_protocol.stages import Stage
from feddiff_protocol.telemetry import StageProgress

class Stub:
    def __init__(self, stages):
        self.stages, self.done = stages, 0
        stages._ask = self.ask

    async def ask(self, address):
        self.done += 1
        return StageProgress(stage="train-shared", done=min(self.done, 3), total=100)

    async def job(self, namespace, name, children):
        key = (Stage.TRAIN_SHARED, "")
        self.stages.follow(namespace, name, "uid", [Target(key, "pod", "10.0.0.1")])
        known = self.stages.of(namespace, name).get(key)
        uid = os.environ.get("JOB_UID", "no-uid")
        seen = {"jobs": [j["metadata"]["name"] for j in children.jobs_of(uid)], "pods": len(children.pods_of(uid))}
        seen |= {"share": known.share} if known else {}
        print(json.dumps({"job": f"{namespace}/{name}", **seen}), flush=True)
        if name.startswith("broken"):
            raise RuntimeError("as told")

    async def dataset(self, namespace, name, children=None):
        print(json.dumps({"dataset": f"{namespace}/{name}"}), flush=True)

settings = parse_settings(sys.argv[1:])
liveness = float(os.environ.get("LIVENESS_SECONDS", settings.liveness_seconds))
sys.exit(run(dataclasses.replace(settings, liveness_seconds=liveness), lambda *given: Stub(given[-1])))
"""


class Replica:
    """One operator process, its pages and what its reconciler was given."""

    def __init__(self, folder: Path, kubeconfig: Path, *flags: str, **environment: str) -> None:
        self.out, self.log = folder / "out", folder / "log"
        folder.mkdir()
        quiet = ["--trainer-image=trainer:test", "--port=0", "--progress-seconds=0"]
        # A watch that is left closes its connection once the API server has answered, which kopf does not wait for.
        unclosed = ("unclosed transport", "unclosed <socket.socket")
        strict = ["-W", "error", *(f"-Wignore:{what}:ResourceWarning" for what in unclosed)]
        command = [sys.executable, *strict, "-c", STUB, *quiet, *flags]
        with self.out.open("wb") as out, self.log.open("wb") as log:
            self.process = subprocess.Popen(
                command, stdout=out, stderr=log, env={**os.environ, "KUBECONFIG": str(kubeconfig), **environment}
            )

    def lines(self) -> list[Object]:
        return [json.loads(line) for line in self.out.read_text().splitlines()]

    def logged(self) -> list[Object]:
        return [json.loads(line) for line in self.log.read_text().splitlines() if line.startswith("{")]

    def count(self, kind: str, name: str) -> int:
        return sum(line.get(kind) == name for line in self.lines())

    def until(self, what: str, good: Callable[[], Any], seconds: float = 30.0) -> Any:
        """What `good` answers once it is true; fails with the log when the process ends or the time does."""
        deadline = time.monotonic() + seconds
        while not (answer := good()):
            if time.monotonic() > deadline or self.process.poll() is not None:
                pytest.fail(f"{what}: not within {seconds} s, process {self.process.poll()}: {self.log.read_text()}")
            time.sleep(0.02)
        return answer

    def page(self, path: str) -> tuple[int, str]:
        port = self.until("pages", lambda: [line["port"] for line in self.logged() if line["event"] == "pages"])[0]
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=10) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read().decode()

    def metric(self, name: str) -> float:
        values = [line.split()[-1] for line in self.page("/metrics")[1].splitlines() if line.startswith(name)]
        return sum(map(float, values))

    def ready(self) -> "Replica":
        self.until("ready", lambda: self.page("/readyz")[0] == 200)
        return self

    @property
    def leads(self) -> bool:
        return self.metric("feddiff_leader") == 1


class Scene:
    """Two namespaces on the API server, and the operators that serve them."""

    def __init__(self, control_plane: ControlPlane, folder: Path) -> None:
        self.control_plane, self.folder = control_plane, folder
        self.research, self.clinic = control_plane.namespace("research"), control_plane.namespace("clinic")
        self.replicas: list[Replica] = []

    def operator(self, *flags: str, kubeconfig: Path | None = None, **environment: str) -> Replica:
        folder = self.folder / f"replica-{len(self.replicas)}"
        namespaces = [f"--namespace={self.research}", f"--namespace={self.clinic}"]
        lease = [f"--lease-namespace={self.research}", "--lease-seconds=3"]
        kubeconfig = kubeconfig or self.control_plane.kubeconfig
        self.replicas.append(Replica(folder, kubeconfig, *namespaces, *lease, *flags, **environment))
        return self.replicas[-1]

    def post(self, path: str, obj: Object) -> Object:
        status, answer = self.control_plane.request("POST", path, obj)
        assert status == 201, answer
        return dict(answer)

    def merge(self, path: str, change: Object) -> None:
        status, answer = self.control_plane.request("PATCH", path, change, "application/merge-patch+json")
        assert status == 200, answer

    def path(self, plural: str, namespace: str, name: str = "") -> str:
        root = {"pods": "/api/v1", "jobs": "/apis/batch/v1", "leases": "/apis/coordination.k8s.io/v1"}
        return f"{root.get(plural, '/apis/feddiff.dev/v1alpha1')}/namespaces/{namespace}/{plural}/{name}".rstrip("/")

    def job(self, name: str) -> Object:
        clients = [{"name": "a", "dataset": {"namespace": self.clinic, "name": "scans"}}]
        privacy = {"mechanism": "gaussian", "epsilon": "10", "delta": "1e-5", "clipNorm": "4"}
        body = {"metadata": {"name": name}, "spec": {"clients": clients, "privacy": privacy}}
        return self._custom("federateddiffusionjobs", "FederatedDiffusionJob", self.research, body)

    def dataset(self, name: str = "scans") -> Object:
        spec = {
            "source": {"format": "npz", "path": "train.npz"},
            "image": {"channels": 1, "height": 8, "width": 8},
            "classes": {"count": 1, "records": [100]},
            "budget": {"epsilon": "20", "delta": "1e-5"},
        }
        return self._custom(
            "privatedatasets", "PrivateDataset", self.clinic, {"metadata": {"name": name}, "spec": spec}
        )

    def release(self, name: str) -> Object:
        spec = {
            "dataset": {"name": "scans", "uid": "u"},
            "job": {"namespace": self.research, "name": "j", "uid": "u"},
            "client": "a",
            "mechanism": "gaussian",
            "unit": "image",
            "epsilon": "1",
            "delta": "1e-5",
            "charge": {"muSquared": "0.1"},
            "reservedAt": "2026-01-01T00:00:00Z",
        }
        return self._custom(
            "privacyreleases", "PrivacyRelease", self.clinic, {"metadata": {"name": name}, "spec": spec}
        )

    def _custom(self, plural: str, kind: str, namespace: str, body: Object) -> Object:
        return self.post(self.path(plural, namespace), {"apiVersion": "feddiff.dev/v1alpha1", "kind": kind, **body})

    def child(self, name: str, **labels: str) -> Object:
        pod = {"restartPolicy": "Never", "containers": [{"name": "c", "image": "none"}]}
        metadata = {"name": name, "labels": {key.replace("__", "/").replace("_", "-"): v for key, v in labels.items()}}
        template = {"metadata": {"labels": metadata["labels"]}, "spec": pod}
        return self.post(self.path("jobs", self.clinic), {"metadata": metadata, "spec": {"template": template}})

    def labels(self, job: str) -> dict[str, str]:
        return {
            "feddiff.dev__job": job,
            "feddiff.dev__job_namespace": self.research,
            "feddiff.dev__job_uid": "uid-of-the-job",
        }


@pytest.fixture
def scene(control_plane: ControlPlane, tmp_path: Path) -> Iterator[Scene]:
    scene = Scene(control_plane, tmp_path)
    yield scene
    for replica in scene.replicas:
        replica.process.kill()
        replica.process.wait()


def test_every_change_is_reconciled_once_and_children_wake_their_job(scene: Scene) -> None:
    scene.job("before")
    operator = scene.operator(JOB_UID="uid-of-the-job").ready()
    before, later, dataset = f"{scene.research}/before", f"{scene.research}/later", f"{scene.clinic}/scans"
    operator.until("a job from before the start", lambda: operator.count("job", before) == 1)

    scene.job("later")
    operator.until("a new job", lambda: operator.count("job", later) == 1)
    scene.merge(scene.path("federateddiffusionjobs", scene.research, "later"), {"spec": {"suspend": True}})
    operator.until("a change of a job", lambda: operator.count("job", later) == 2)

    scene.child("nobodys")
    scene.child("fd-release-1", **scene.labels("later"))
    operator.until("a child", lambda: operator.lines()[-1].get("jobs") == ["fd-release-1"])
    operator.until("a child's pod", lambda: operator.lines()[-1].get("pods") == 1)
    assert operator.count("job", before) == 1

    scene.dataset()
    operator.until("a dataset", lambda: operator.count("dataset", dataset) == 1)
    operator.until("jobs that wait for it", lambda: operator.count("job", before) == 2)
    scene.release("entry")
    operator.until("an entry of its ledger", lambda: operator.count("dataset", dataset) == 2)
    scene.control_plane.request("DELETE", scene.path("federateddiffusionjobs", scene.research, "before"))
    operator.until("a deleted job", lambda: operator.count("job", before) == 3)
    operator.until("the datasets that it had reserved", lambda: operator.count("dataset", dataset) == 3)

    assert operator.page("/healthz") == (200, "alive\n")
    assert operator.metric('feddiff_jobs{namespace="' + scene.research) == 1
    assert operator.metric("feddiff_privacy_epsilon_limit") == 20
    assert operator.metric('feddiff_watch_events_total{kind="PrivacyRelease"') == 1
    assert operator.metric('feddiff_api_requests_total{code="200",resource="pods",verb="watch"') == 2


def test_a_job_is_looked_at_when_its_pods_tell_of_another_percent(scene: Scene) -> None:
    scene.job("training")
    operator = scene.operator("--progress-seconds=0.1").ready()
    job = f"{scene.research}/training"
    operator.until("the news", lambda: operator.lines() and operator.lines()[-1].get("share") == 0.03)
    assert operator.count("job", job) <= 4, "once for each percent, and once at first"
    silent = scene.operator()
    assert silent.process.poll() is None and "share" not in operator.lines()[0]


def test_everything_is_looked_at_again_in_every_period(scene: Scene) -> None:
    scene.job("quiet")
    operator = scene.operator("--resync-seconds=1").ready()
    operator.until("three looks", lambda: operator.count("job", f"{scene.research}/quiet") >= 3)


def test_a_reconcile_that_fails_is_logged_counted_and_tried_again_and_others_go_on(scene: Scene) -> None:
    scene.job("broken")
    operator = scene.operator().ready()
    operator.until("a second try", lambda: operator.count("job", f"{scene.research}/broken") >= 2)
    scene.job("fine")
    operator.until("another job", lambda: operator.count("job", f"{scene.research}/fine") == 1)
    assert operator.metric('feddiff_reconcile_duration_seconds_count{kind="FederatedDiffusionJob",result="error"}') >= 2
    (first, *_) = [line for line in operator.logged() if line["event"] == "reconcile failed"]
    assert (first["name"], first["namespace"]) == ("broken", scene.research)
    assert "RuntimeError: as told" in first["exception"]
    assert operator.count("job", f"{scene.research}/broken") < 10


def test_of_two_replicas_one_works_and_the_other_follows_a_killed_one_within_the_lease(scene: Scene) -> None:
    replicas = [scene.operator().ready(), scene.operator().ready()]
    replicas[0].until("a leader", lambda: any(replica.leads for replica in replicas))
    leader, other = sorted(replicas, key=lambda replica: not replica.leads)
    scene.job("one")
    leader.until("work", lambda: leader.count("job", f"{scene.research}/one") == 1)
    assert other.lines() == [] and not other.leads

    leader.process.kill()
    killed = time.monotonic()
    other.until("the other leads and has looked at everything", lambda: other.lines())
    waited = time.monotonic() - killed
    assert 3 * 2 / 3 - 0.5 < waited < 3 * 4 / 3 + 2
    scene.job("two")
    other.until("new work", lambda: other.count("job", f"{scene.research}/two") == 1)


def test_sigterm_frees_the_lease_and_ends_with_zero(scene: Scene) -> None:
    operator = scene.operator().ready()
    operator.until("leading", lambda: operator.leads)
    operator.process.send_signal(signal.SIGTERM)
    assert operator.process.wait(timeout=15) == 0
    _, lease = scene.control_plane.request("GET", scene.path("leases", scene.research, "feddiff-operator"))
    assert lease["spec"]["holderIdentity"] == ""
    assert not [line for line in operator.logged() if line.get("level") in ("warning", "error")]
    assert "Traceback" not in operator.log.read_text()


def test_an_owner_that_takes_its_rights_away_stops_nobody_else(scene: Scene) -> None:
    plane, rights = scene.control_plane, "--clusterrole=cluster-admin"
    limited = plane.user(f"operator-of-{scene.research}")
    plane.kubectl(
        "create", "rolebinding", "operator", "-n", scene.research, rights, f"--user=operator-of-{scene.research}"
    )
    scene.job("one")
    scene.dataset()
    operator = scene.operator(kubeconfig=limited).ready()
    operator.until("work where it may", lambda: operator.count("job", f"{scene.research}/one") == 1)
    operator.until("refusals", lambda: operator.metric('feddiff_api_requests_total{code="403"') >= 5)
    assert operator.page("/healthz")[0] == 200 and operator.count("dataset", f"{scene.clinic}/scans") == 0

    plane.kubectl(
        "create", "rolebinding", "operator", "-n", scene.clinic, rights, f"--user=operator-of-{scene.research}"
    )
    operator.until("work there too", lambda: operator.count("dataset", f"{scene.clinic}/scans") >= 1)


class Proxy:
    """A TCP line to the API server on which established connections can fall silent while new ones work."""

    def __init__(self, address: str) -> None:
        self._address = address
        self._frozen: set[asyncio.StreamReader] = set()
        self._readers: set[asyncio.StreamReader] = set()
        self._loop = asyncio.new_event_loop()
        self._opening: set[asyncio.Task[Any]] = set()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._server = self._call(asyncio.start_server(self._join, "127.0.0.1", 0))
        self.port = self._server.sockets[0].getsockname()[1]

    def freeze(self) -> None:
        """Whatever is connected now stays connected, and nothing comes through any more."""
        self._loop.call_soon_threadsafe(lambda: self._frozen.update(self._readers))

    def close(self) -> None:
        self._call(self._end())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _call(self, coroutine: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(10)

    async def _end(self) -> None:
        self._server.close()
        await asyncio.gather(*self._opening, return_exceptions=True)  # one cut off while it opens is never closed
        await asyncio.sleep(0)  # whoever waited for it has it
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.sleep(0)  # aborted connections are gone

    async def _join(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        opening = asyncio.create_task(asyncio.open_connection(self._address, 6443))
        self._opening.add(opening)
        there, back = await opening
        try:
            await asyncio.gather(self._pump(reader, back), self._pump(there, writer))
        except (OSError, asyncio.CancelledError):
            pass
        finally:
            for end in (writer, back):
                end.transport.abort()

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._readers.add(reader)
        while data := await reader.read(65536):
            if reader in self._frozen:
                await asyncio.Event().wait()
            writer.write(data)
            await writer.drain()
        writer.close()


def _through(proxy: Proxy, kubeconfig: Path, folder: Path) -> Path:
    config = json.loads(kubeconfig.read_text())
    (cluster,) = config["clusters"]
    cluster["cluster"] = {"server": f"https://127.0.0.1:{proxy.port}", "insecure-skip-tls-verify": True}
    path = folder / "proxied.kubeconfig"
    path.write_text(json.dumps(config))
    return path


def test_watches_that_fall_silent_turn_the_process_red_though_all_else_works(scene: Scene, tmp_path: Path) -> None:
    proxy = Proxy(scene.control_plane.address)
    try:
        kubeconfig = _through(proxy, scene.control_plane.kubeconfig, tmp_path)
        operator = scene.operator(kubeconfig=kubeconfig, LIVENESS_SECONDS="15").ready()
        operator.until("leading", lambda: operator.leads)
        assert operator.page("/healthz") == (200, "alive\n")
        proxy.freeze()
        frozen = time.monotonic()
        watches = 2 * 5  # namespaces, kinds
        operator.until("red", lambda: operator.page("/healthz")[1].count(": nothing for 1") == watches, seconds=30)
        assert operator.page("/healthz")[0] == 503
        assert 10 < time.monotonic() - frozen < 25
        assert operator.leads  # the Lease is renewed all the while, over connections that work
    finally:
        proxy.close()


def test_a_restarted_api_server_is_watched_again(control_plane: ControlPlane, scene: Scene) -> None:
    operator = scene.operator().ready()
    operator.until("leading", lambda: operator.leads)
    control_plane.restart("kube-apiserver")
    scene.job("after")
    operator.until("a job", lambda: operator.count("job", f"{scene.research}/after") == 1, seconds=60)
    assert operator.page("/healthz") == (200, "alive\n")


def test_neither_torch_nor_the_synchronous_client_is_imported() -> None:
    code = "import sys, feddiff_operator.main; print(*{name.partition('.')[0] for name in sys.modules})"
    ended = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "numpy", "scipy", "obstore", "boto3", "feddiff_trainer", "feddiff"} & set(ended.stdout.split())
