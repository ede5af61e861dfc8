"""What the pods of an attempt are told: the protocol's stage specs, filled from what is observed."""

from collections.abc import Mapping

from feddiff_protocol.api import PrivateDataset
from feddiff_protocol.plan import Observed, Start, durations_of, releases_that_count
from feddiff_protocol.stages import (
    AnyStageSpec,
    BudgetLine,
    ReleaseReference,
    ReleaseSpec,
    Stage,
    TrainSharedSpec,
    owner_stage_spec,
    release_spec,
    report_spec,
    train_shared_spec,
)

from .ledger import ClientLedger
from .scene import Scene
from .workloads import places


def spec_of(scene: Scene, start: Start, observed: Observed, ledgers: Mapping[str, ClientLedger]) -> AnyStageSpec:
    """The spec of the attempt to start. A release is asked for only once it is charged."""
    job, uid, client, attempt = scene.job, scene.uid, start.client, start.attempt
    present = {name: ledger.dataset for name, ledger in ledgers.items() if ledger.dataset is not None}
    datasets = scene.taking_part(present)
    where = places(job, {client: datasets[client]} if client else {})
    if start.stage is Stage.RELEASE:
        entry = ledgers[client].entry
        assert entry is not None, "a release starts only after its charge"
        return release_spec(job, uid, client, _under_uid(datasets[client], entry.dataset_uid), where, attempt)
    releases = releases_that_count(observed, scene.counted)
    if start.stage is Stage.TRAIN_SHARED:
        return train_shared_spec(job, uid, next(iter(datasets.values())), releases, where, attempt)
    shared = observed.stages.get((Stage.TRAIN_SHARED, ""))
    denoiser = shared.receipt.outputs["denoiser"] if shared is not None and shared.receipt is not None else ""
    if start.stage is Stage.REPORT:
        return report_spec(
            job,
            uid,
            next(iter(datasets.values())),
            releases,
            tuple(_budget_line(client, ledgers[client].dataset) for client in scene.counted),
            durations_of(observed.stages),
            f"kubectl apply -f {job.metadata.name}.yaml",
            denoiser,
            where,
            attempt,
        )
    return owner_stage_spec(start.stage, job, uid, client, datasets[client], releases, denoiser, where, attempt)


def release_to_come(scene: Scene, client: str, dataset: PrivateDataset) -> ReleaseSpec:
    """The spec of the client's first attempt to release, before its charge: to rehearse."""
    return release_spec(scene.job, scene.uid, client, dataset, places(scene.job, {client: dataset}), 1)


def train_shared_to_come(scene: Scene, dataset: PrivateDataset) -> TrainSharedSpec:
    """The spec of the first train-shared, before there is any release: to rehearse."""
    releases = (ReleaseReference(client=scene.job.spec.clients[0].name, manifest_sha256="0" * 64),)
    return train_shared_spec(scene.job, scene.uid, dataset, releases, places(scene.job, {}), 1)


def _under_uid(dataset: PrivateDataset, uid: str) -> PrivateDataset:
    """The dataset under the uid that its entry was made for: that names the release, whatever was recreated since."""
    return dataset.model_copy(update={"metadata": dataset.metadata.model_copy(update={"uid": uid})})


def _budget_line(client: str, dataset: PrivateDataset | None) -> BudgetLine:
    assert dataset is not None, "a job whose dataset is gone has lost the client"
    budget = (dataset.status or {}).get("budget") or {}
    return BudgetLine(
        client=client,
        budget_epsilon=str(dataset.spec.budget.epsilon),
        spent_epsilon=str(budget.get("spent", "")),
        remaining_epsilon=str(budget.get("remaining", "")),
        remaining_pure_epsilon=str(budget.get("remainingPure", "")) if dataset.spec.budget.pure_epsilon else "",
        delta=str(dataset.spec.budget.delta),
        num_releases=int((dataset.status or {}).get("numReleases", 0)),
    )
