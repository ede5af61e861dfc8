"""Specs that nobody meant, before a running operator: each is refused by the API server, or ends with a documented
reason, or says whom it waits for; the operator lives on, and comes to rest."""

import asyncio
import itertools
import json
import re
import time
import urllib.request
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pytest

from cluster.documents import DATASET, GAUSSIAN, OVERLAYS, PRIVUNIT, SUMMARY, changed, fault, fuzzed, url
from cluster.kubelet import Kubelet
from cluster.warm import Warm
from feddiff_operator.cluster import FDJ, PDS
from feddiff_protocol.plan import Reason

Object = dict[str, Any]
NUM_SPECS = 1000
SETTLE_SECONDS = 400
PATIENCE_SECONDS = 60
WINDOW_SECONDS = 3.0
CALM = ("--api-qps=500", "--api-burst=500", "--lease-seconds=60")  # a new leader would look at everything again
ENDS = {
    *(Reason.INVALID_SPEC, Reason.INVALID_POD_TEMPLATE, Reason.ACCESS_DENIED, Reason.IMAGE_NOT_ALLOWED),
    *(Reason.PRIVACY_BUDGET_EXCEEDED, Reason.CLIENTS_LOST, Reason.STAGE_FAILED),
}


# ---- The specs ---------------------------------------------------------------------------------------------------


def datasets(world: Any) -> list[Object]:
    """What the jobs' clients name: good ones, and such as no job may use."""
    good = {"budget": {"epsilon": "100000", "delta": "1e-3"}, "access": [{"namespace": world.research}]}
    return [
        *(named(world.dataset(clinic, **good), "good") for clinic in world.clinics),
        *(named(world.dataset(clinic, **good | {"access": []}), "closed") for clinic in world.clinics),
        *(named(world.dataset(clinic, **good | {"budget": {"epsilon": "0.1", "delta": "1e-5"}}), "spent")
          for clinic in world.clinics),
    ]  # fmt: skip


def bases(world: Any) -> list[Object]:
    """What the specs are made from: a dataset, and jobs of every mechanism with clients that refuse, mostly."""
    dataset = changed(DATASET, "metadata.namespace", world.clinics[0])
    dataset = changed(dataset, "spec.access", [{"namespace": world.research}])
    dataset = changed(dataset, "spec.images", [])
    jobs = [
        changed(document, "spec.clients", clients(world, name))
        for document, name in itertools.product([SUMMARY, GAUSSIAN, PRIVUNIT], ["missing", "closed", "spent"])
    ]
    return [*(changed(job, "metadata.namespace", world.research) for job in jobs), dataset]


def clients(world: Any, name: str) -> list[Object]:
    return [{"name": n, "dataset": {"namespace": c, "name": name}} for n, c in zip("ab", world.clinics, strict=True)]


def named(document: Object, name: Any) -> Object:
    return changed(document, "metadata.name", name)


def specs(world: Any, count: int) -> Iterator[Object]:
    """The fuzzed documents, each under a name of its own where its name is the one it was made from."""
    for number, document in enumerate(fuzzed(count, bases(world))):
        name = document["metadata"].get("name")
        yield named(document, f"{name}-{number}") if isinstance(name, str) and len(name) < 50 else document


def nonsense(world: Any) -> Iterator[Object]:
    """Jobs that could be carried out, but for an overlay that only the API server sees through, if anybody."""
    for number, overlay in enumerate(OVERLAYS):
        for field in ("podTemplate", "resources"):
            job = world.job(f"overlay-{number}-{field.lower()}", clients=clients(world, "good")[:1])
            yield changed(job, f"spec.shared.{field}", overlay)


def user_of(world: Any, dataset: Object) -> Object:
    """A good job that uses a dataset."""
    metadata = dataset["metadata"]
    where = {"namespace": metadata["namespace"], "name": metadata["name"]}
    return world.job(f"uses-{metadata['name']}"[:63].strip("-"), clients=[{"name": "a", "dataset": where}])


# ---- Offering them -----------------------------------------------------------------------------------------------


@dataclass
class Offer:
    """What became of the specs at the API server."""

    world: Any
    num_refused: int = 0
    num_stored: int = 0

    def all(self, documents: Iterable[Object]) -> None:
        with ThreadPoolExecutor(4) as threads:
            list(threads.map(self._one, documents))

    def _one(self, document: Object) -> None:
        """Stored or refused; a stored dataset gets a job that uses it."""
        answer = self._post(document)
        self.num_refused, self.num_stored = self.num_refused + (not answer), self.num_stored + bool(answer)
        if answer and document["kind"] == "PrivateDataset":
            self._post(user_of(self.world, answer))

    def _post(self, document: Object) -> Object | None:
        namespace = document["metadata"]["namespace"]
        status, answer = self.world.control_plane.request("POST", url(document, namespace), document)
        assert status in (201, 400, 409, 413, 422), answer
        return answer if status == 201 else None


class Pages:
    """What an operator says on its pages; their port is in its log."""

    def __init__(self, world: Any, life: int = 0) -> None:
        log = world.folder / "operator.log"
        lines = log.read_text().splitlines() if log.exists() else []
        ports = [json.loads(line)["port"] for line in lines if '"event": "pages"' in line]
        self.there = life < len(ports)
        self._address = f"http://127.0.0.1:{ports[life]}" if self.there else ""

    def alive(self) -> bool:
        with urllib.request.urlopen(f"{self._address}/healthz", timeout=30) as answer:
            return bool(answer.status == 200)

    def total(self, name: str, **labels: str) -> float:
        """The sum of a metric's series that have these labels, each by a pattern."""
        with urllib.request.urlopen(f"{self._address}/metrics", timeout=30) as answer:
            lines = answer.read().decode().splitlines()
        found = (re.fullmatch(rf"{name}(?:{{(.*)}})? (\S+)", line) for line in lines)
        series = [(dict(re.findall(r'(\w+)="([^"]*)"', match[1] or "")), float(match[2])) for match in found if match]
        return sum(value for has, value in series if all(re.fullmatch(labels[key], has[key]) for key in labels))

    def errors(self) -> float:
        return self.total("feddiff_reconcile_duration_seconds_count", result="error")

    def done(self) -> tuple[float, float]:
        """How many looks at objects there were, and how many requests that may change something, the election's own
        left out."""
        writes = {"verb": "create|update|patch|delete", "resource": "(?!leases).*"}
        looks = self.total("feddiff_reconcile_duration_seconds_count")
        return looks, self.total("feddiff_api_requests_total", **writes)


# ---- What they come to -------------------------------------------------------------------------------------------


def under_way(job: Object) -> bool:
    """Nothing is wrong with it: it goes on, or waits for what is no spec's business."""
    spec, phase = job["spec"], job["status"]["phase"]
    waits = phase == "Releasing" and spec.get("queueName")
    trains = any(each["running"] for each in job["status"]["stages"] if each["stage"] == "train-shared")
    return trains or phase == "Suspended" or bool(waits)


def waits_for_dataset(job: Object) -> bool:
    return job["status"]["phase"] == "Pending" and condition(job, "Failed")["reason"] == Reason.DATASET_MISSING


def condition(job: Object, kind: str) -> Object:
    return next((each for each in job["status"]["conditions"] if each["type"] == kind), {})


def ours(job: Object) -> bool:
    return job["spec"].get("managedBy") in (None, "feddiff.dev/operator")


def settled(job: Object) -> bool:
    if not ours(job):
        return True
    phase = (job.get("status") or {}).get("phase")
    return phase == "Failed" or (phase is not None and (under_way(job) or waits_for_dataset(job)))


def complaints(job: Object) -> Iterator[str]:
    """What is wrong with how the operator took the job."""
    name, bad = job["metadata"]["name"], fault(without_status(job))
    if not ours(job):
        if job.get("status"):
            yield f"{name}: is another's, and has a status"
        return
    if not settled(job):
        yield f"{name}: neither ended nor waiting: {job.get('status')}"
        return
    failed = condition(job, "Failed")
    if failed["status"] == "True" and (failed["reason"] not in ENDS or not failed["message"]):
        yield f"{name}: ended without a reason: {failed}"
    if bad and (failed["status"], failed["reason"]) != ("True", Reason.INVALID_SPEC):
        yield f"{name}: {bad}, and yet {failed}"
    named = (
        f"{each['dataset'].get('namespace', 'default')}/{each['dataset']['name']}" for each in job["spec"]["clients"]
    )
    if waits_for_dataset(job) and not any(each in failed["message"] for each in named):
        yield f"{name}: does not say which dataset it waits for: {failed}"


def without_status(document: Object) -> Object:
    return {key: value for key, value in document.items() if key != "status"}


def complaint(dataset: Object) -> str:
    """The same of a dataset."""
    conditions = (dataset.get("status") or {}).get("conditions") or []
    ready = next((each for each in conditions if each["type"] == "Ready"), None)
    if ready is None or (fault(without_status(dataset)) and ready["status"] == "True"):
        return f"{dataset['metadata']['name']}: {ready}, {fault(without_status(dataset))}"
    return ""


@pytest.mark.timeout(900)
def test_bad_specs_are_refused_or_end_with_a_reason_and_the_operator_comes_to_rest(world: Any) -> None:
    async def story() -> None:
        offer = Offer(world)
        async with world.kubelet(lambda pod, spec: 0 if spec["stage"] == "release" else None) as kubelet:
            await world.apply(kubelet.cluster, *datasets(world))
            with world.operator(*CALM) as process:
                await asyncio.to_thread(offer.all, itertools.chain(nonsense(world), specs(world, NUM_SPECS)))
                jobs = await all_settled(kubelet)
                assert process.poll() is None, world.log()
                pages = Pages(world)
                assert pages.alive() and pages.errors() == 0, world.log()
            stored = [each for clinic in world.clinics for each in await kubelet.cluster.list(PDS, clinic)]
            counted = Counter(outcome(job) for job in jobs)
            print(f"specs: {offer.num_refused} refused, {offer.num_stored} stored, {dict(counted)}")
            found = [each for job in jobs for each in complaints(job)] + list(filter(None, map(complaint, stored)))
            assert found == []
            taken = [job["metadata"]["name"] for job in jobs if outcome(job) != Reason.INVALID_POD_TEMPLATE]
            assert [name for name in taken if re.fullmatch("overlay-.*-resources", name)] == []  # none of them is one
            spent = {each["spec"]["job"]["name"] for each in await world.entries(kubelet.cluster) if held(each)}
            assert spent & {job["metadata"]["name"] for job in jobs if outcome(job) in ENDS} == set()
            with world.operator(*CALM):
                await rests(world, len(jobs))

    asyncio.run(story())


async def all_settled(kubelet: Kubelet) -> list[Object]:
    """The jobs, when each has ended or waits; as they are, after a while."""
    deadline = time.monotonic() + SETTLE_SECONDS
    while True:
        jobs = await kubelet.cluster.list(FDJ, kubelet.namespaces[0])
        if all(map(settled, jobs)) or time.monotonic() > deadline:
            return jobs
        await asyncio.sleep(0.5)


def outcome(job: Object) -> str:
    if not ours(job):
        return "not ours"
    return str(condition(job, "Failed")["reason"] if settled(job) else "unsettled")


def held(entry: Object) -> bool:
    return bool(entry["status"]["phase"] != "Returned")


async def rests(world: Any, num_jobs: int) -> None:
    """An operator that begins anew looks at everything, without an error, and then at nothing and writes nothing for a
    while: whoever waits for a dataset is looked at twice a minute, and whatever is tried for ever is tried always."""
    deadline = time.monotonic() + SETTLE_SECONDS
    while True:
        pages = Pages(world, life=1)
        before = pages.done() if pages.there else (0.0, 0.0)
        await asyncio.sleep(WINDOW_SECONDS)
        if before[0] >= num_jobs and pages.done() == before:
            break
        assert time.monotonic() < deadline, f"it never rests: {before}, {pages.done()}; {world.log()}"
    assert (pages.errors(), pages.alive()) == (0, True), world.log()


FALLS_OVER = """
from feddiff_operator import reconcile
reconcile.plan = lambda *_: {}["σ"]
"""


def test_an_operator_that_falls_over_a_spec_is_found_out(world: Any) -> None:
    async def story() -> None:
        async with world.cluster() as cluster:
            await world.apply(cluster, world.job())
            with Warm(FALLS_OVER) as warm:
                log = world.folder / "operator.log"
                process = warm.operator(world.flags, world.control_plane.kubeconfig, log)
                async with asyncio.timeout(PATIENCE_SECONDS):
                    while not ((pages := Pages(world)).there and pages.errors()):
                        await asyncio.sleep(0.1)
                process.close()
            (job,) = await cluster.list(FDJ, world.research)
            assert len(list(complaints(job))) == 1

    asyncio.run(story())
