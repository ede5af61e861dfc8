"""How much memory an operator needs that has many releases in its charge: one JSON row.

    python benchmarks/operator_memory.py [--jobs 1000] [--clients 10]

A real etcd, API server and controller-manager, and the operator's own process. The state is written by the benchmark
itself, since an operator needs an hour for it at its default rate: every job is in its release stage, so for each
client there is a charged entry, a batch Job that no controller touches (spec.managedBy), and a running pod. The
operator adopts the entries, looks at every job and publishes its status. Resident memory is read when nothing has
waited for a worker and nothing was written for five seconds: then (operator_rss_mb), and its highest so far
(operator_peak_rss_mb).
"""

import argparse
import asyncio
from collections import Counter
from dataclasses import replace
from typing import Any

from control_plane import (
    Object,
    connection,
    control_plane,
    events_of,
    job,
    namespaces,
    operator,
    print_row,
    requests_of,
    side_by_side,
    with_datasets,
)

from cluster.kubernetes import ControlPlane
from feddiff_operator.cluster import FDJ, JOB, PDS, POD, PRL, Cluster
from feddiff_operator.workloads import Setting, places, stage_objects
from feddiff_protocol.api import FederatedDiffusionJob, PrivateDataset
from feddiff_protocol.ledger import Phase, request_of
from feddiff_protocol.ledger_objects import release_object, with_status_of
from feddiff_protocol.promise import promise_of
from feddiff_protocol.stages import release_spec

REST_SECONDS = 5.0
SHORT = {"steps": 50, "betaStart": "0.002", "betaEnd": "0.4"}  # a schedule that is quickly computed


async def measure(plane: ControlPlane, arguments: argparse.Namespace) -> Object:
    async with connection(plane) as cluster:
        (research,), clinics = (
            await namespaces(cluster, "research", 1),
            await namespaces(cluster, "clinic", arguments.clients),
        )
        await with_datasets(cluster, clinics, research)
        datasets = [PrivateDataset.model_validate(await cluster.get(PDS, each, "scans")) for each in clinics]
        jobs = [job(each, research, clinics, diffusion=SHORT) for each in range(arguments.jobs)]
        await side_by_side([lambda each=each: seed(cluster, each, datasets) for each in jobs])
        with operator(plane, research, "--workers=32", "--api-qps=5000", "--api-burst=5000") as process:
            await process.leading()
            await process.at_rest(REST_SECONDS)
            memory = process.rss()
        phases = Counter((each.get("status") or {}).get("phase") for each in await cluster.list(FDJ, research))
    assert phases == {"Releasing": arguments.jobs}, phases
    requests = dict(requests_of(events_of(plane), process.user).most_common())
    return {**memory, "phases": phases, "api_calls": requests}


async def seed(cluster: Cluster, document: Object, datasets: list[PrivateDataset]) -> None:
    """The job, and what it has come to with every client."""
    found = await cluster.create(FDJ, document)
    asked = FederatedDiffusionJob.model_validate(found)
    for client, dataset in zip(asked.spec.clients, datasets, strict=True):
        await _charge(cluster, asked, found["metadata"]["uid"], client.name, dataset)
        await _start(cluster, asked, found["metadata"]["uid"], client.name, dataset)


async def _charge(
    cluster: Cluster, asked: FederatedDiffusionJob, uid: str, client: str, dataset: PrivateDataset
) -> None:
    owner, charge = dataset.metadata, promise_of(asked.spec.privacy, asked.spec.diffusion).charge
    request = request_of(asked, uid, client, str(owner.uid), charge, "2026-01-01T00:00:00+00:00")
    entry = replace(request, phase=Phase.CHARGED)
    release = await cluster.create(PRL, release_object(owner.namespace, owner.name, entry))
    await cluster.replace_status(PRL, with_status_of(release, entry))


async def _start(
    cluster: Cluster, asked: FederatedDiffusionJob, uid: str, client: str, dataset: PrivateDataset
) -> None:
    spec = release_spec(asked, uid, client, dataset, places(asked, {client: dataset}), 1)
    objects = stage_objects(Setting("trainer:load"), asked, uid, dataset, spec)
    child = next(each for each in objects if each["kind"] == JOB.name)
    made = await cluster.create(JOB, {**child, "spec": {**child["spec"], "managedBy": "feddiff.dev/benchmark"}})
    pod = await cluster.create(POD, _pod(made))
    running = {"name": "stage", "image": "x", "imageID": "x", "ready": True, "restartCount": 0}
    running["state"] = {"running": {"startedAt": made["metadata"]["creationTimestamp"]}}
    await cluster.replace_status(POD, {**pod, "status": {"phase": "Running", "containerStatuses": [running]}})


def _pod(child: Object) -> Object:
    metadata, template = child["metadata"], child["spec"]["template"]
    labels: dict[str, Any] = {**template["metadata"]["labels"], "batch.kubernetes.io/job-name": metadata["name"]}
    named = {"name": f"{metadata['name']}-0", "namespace": metadata["namespace"], "labels": labels}
    return {"apiVersion": "v1", "kind": POD.name, "metadata": named, "spec": template["spec"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=1000)
    parser.add_argument("--clients", type=int, default=10)
    arguments = parser.parse_args()
    with control_plane() as plane:
        print_row(plane, benchmark="operator_memory", **vars(arguments), **asyncio.run(measure(plane, arguments)))


if __name__ == "__main__":
    main()
