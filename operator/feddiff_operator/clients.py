"""Whether a client can take part: what its owner and its dataset refuse, before any of its budget is charged."""

from collections.abc import Mapping

from feddiff_protocol.api import FederatedDiffusionJob, PrivateDataset
from feddiff_protocol.errors import SpecInvalid
from feddiff_protocol.ledger import access_refusal
from feddiff_protocol.plan import ClientObserved, Hold, Reason
from feddiff_protocol.promise import check_datasets

from .workloads import InvalidPodTemplate, Setting, check_overlay, places

CONTRADICTION = "contradicts itself"  # how every ledger begins to say that it needs its owner


def client_observed(
    job: FederatedDiffusionJob, client: str, dataset: PrivateDataset | None, hold: Hold, refusal: str, setting: Setting
) -> ClientObserved:
    """What the plan is told about one client: its hold, and why it cannot take part, if so.

    `refusal` is what its ledger would answer to a reservation now. All that can be refused is refused before the
    budget is charged: access, image, stores, source, overlay.
    """
    if dataset is None:
        (reference,) = [each.dataset for each in job.spec.clients if each.name == client]
        words = refusal or f"there is no dataset {reference.namespace}/{reference.name}; its owner has to create it"
        return ClientObserved(hold, words, Reason.DATASET_MISSING)
    if denied := access_refusal(dataset, job):
        return ClientObserved(hold, denied.message, Reason.ACCESS_DENIED)
    if words := _image_refusal(dataset, setting):
        return ClientObserved(hold, words, Reason.IMAGE_NOT_ALLOWED)
    try:
        places(job, {client: dataset})
        check_overlay(dataset.spec.pod_template, f"{client}: spec.podTemplate", identities=True)
    except InvalidPodTemplate as error:
        return ClientObserved(hold, str(error), Reason.INVALID_POD_TEMPLATE)
    except SpecInvalid as error:
        return ClientObserved(hold, str(error), Reason.INVALID_SPEC)
    mismatch = CONTRADICTION in refusal
    return ClientObserved(hold, refusal, Reason.LEDGER_MISMATCH if mismatch else Reason.PRIVACY_BUDGET_EXCEEDED)


def _image_refusal(dataset: PrivateDataset, setting: Setting) -> str:
    allowed = dataset.spec.images
    if allowed and setting.trainer_image not in allowed:
        name = f"{dataset.metadata.namespace}/{dataset.metadata.name}"
        return f"dataset {name} allows the images {', '.join(allowed)}, the installation runs {setting.trainer_image}"
    return ""


def misfit(job: FederatedDiffusionJob, datasets: Mapping[str, PrivateDataset]) -> str:
    """Why these clients' datasets cannot be trained on together, or nothing."""
    try:
        check_datasets(job, datasets)
    except SpecInvalid as error:
        return str(error)
    return ""
