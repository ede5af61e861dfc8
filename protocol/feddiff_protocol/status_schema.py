"""What the operator writes into `status`, described for `kubectl explain`.

Described, not checked: a newer operator may write more than an older definition knows, and what stands in an account
is judged by ledger_objects.py, which keeps it as evidence where it makes no sense.
"""

from collections.abc import Callable, Mapping
from typing import Any

from .ledger import Phase
from .plan import CONDITIONS, JobPhase
from .stages import Stage

Schema = dict[str, Any]


def status_schema(kind: str) -> Schema:
    """The schema of the status of `kind`: every field with a description, unknown ones kept."""
    return _STATUS[kind]()


def _text(description: str) -> Schema:
    return {"type": "string", "description": description}


def _count(description: str) -> Schema:
    return {"type": "integer", "description": description}


def _object(description: str, **fields: Schema) -> Schema:
    return {
        "type": "object",
        "description": description,
        "x-kubernetes-preserve-unknown-fields": True,
        **({"properties": fields} if fields else {}),
    }


def _list(description: str, items: Schema) -> Schema:
    return {"type": "array", "description": description, "items": items, "x-kubernetes-list-type": "atomic"}


def _conditions(description: str) -> Schema:
    condition = _object(
        "What has come about or not, since when, and why.",
        type=_text("which of them"),
        status=_text("True, False or Unknown"),
        reason=_text("one word; docs/runbooks has a page for each that a job's condition can have"),
        message=_text("the same in words, with what to do where somebody has to do something"),
        lastTransitionTime=_text("when status last changed; RFC 3339, in UTC"),
        observedGeneration=_count("metadata.generation that the condition is about"),
    )
    return _list(description, condition)


def _observed_generation() -> Schema:
    return _count("metadata.generation that the operator has seen; a smaller one than metadata's is out of date")


def _job_status() -> Schema:
    stage = _object(
        "One stage, over all clients: in which phases their newest attempts are.",
        stage=_text(", ".join(Stage)),
        running=_count("attempts that run, or wait for the platform"),
        succeeded=_count("attempts with a receipt"),
        failed=_count("attempts that failed; another follows as long as backoffLimit allows"),
        stopped=_count("attempts that were interrupted and will be continued"),
        percent=_count("how far all of them are, those of later clients included; 100 once every receipt is in"),
    )
    dropped = _object(
        "A client that no longer takes part.", client=_text("its name in spec.clients"), reason=_text("why, in words")
    )
    return _object(
        "Where the job stands, written by the operator alone; feddiff why says what to do about it.",
        observedGeneration=_observed_generation(),
        phase=_text(f"the conditions in one word: {', '.join(JobPhase)}"),
        message=_text("what the phase is about, in words: what is waited for, or why the job failed"),
        conditions=_conditions(f"{', '.join(CONDITIONS)} and Failed, from the first look on"),
        startTime=_text("when the operator first saw the job; RFC 3339, in UTC"),
        completionTime=_text("when it became Complete or Failed; ttlSecondsAfterFinished counts from here"),
        releasingSince=_text("when the first release started; deadlines.releaseSeconds counts from here"),
        counted=_list("clients whose releases count, once that is decided", {"type": "string"}),
        leftOut=_list("clients that had not reserved by deadlines.reservationSeconds", {"type": "string"}),
        dropped=_list("the first twenty clients that no longer take part; what was charged stays charged", dropped),
        numDropped=_count("how many clients no longer take part"),
        clientsSummary=_text("clients whose releases are in, of all: 8/10"),
        trainer=_text("ranks' pods of the shared denoiser that run or are done, of all: 2/2"),
        progress=_text("what is done of all stages that the clients taking part have to do, each weighing alike: 37 %"),
        eta=_text("when training of the shared denoiser ends at its present pace; RFC 3339, in UTC"),
        epsilon=_text("spec.privacy.epsilon"),
        stages=_list("how far each stage is, in the order of the run", stage),
    )


def _dataset_status() -> Schema:
    budget = _object(
        "spec.budget in ε at its delta; what is spent and reserved is rounded up, what remains is rounded down.",
        spent=_text("ε of all that was charged, or may have been"),
        reserved=_text("ε that reservations would add; given back if nothing is released"),
        remaining=_text(
            "largest ε that one more release may have; ε does not add up, so it differs from what the others leave"
        ),
        remainingPure=_text("largest ε that one more release of pure ε may have, from spec.budget.pureEpsilon"),
        chargedMuSquared=_text("μ² of all that was charged: these do add up"),
        chargedPureEpsilon=_text("pure ε of all that was charged: these add up too"),
    )
    return _object(
        "The ledger of the dataset, written by the operator alone.",
        observedGeneration=_observed_generation(),
        budget=budget,
        account=_object(
            "The sums that new releases are admitted by, and reservations without an entry yet. Change nothing."
        ),
        numReleases=_count("entries of the ledger (PrivacyReleases) that count: reserved or charged, not returned"),
        conditions=_conditions(
            "Ready: jobs are admitted; LedgerConsistent: account and entries agree; BudgetExhausted: no release fits"
        ),
    )


def _release_status() -> Schema:
    return _object(
        "How far the release is, written by the operator alone.",
        phase=_text(
            f"{Phase.RESERVED}: nothing has started; {Phase.CHARGED}: it has left or may have, for good;"
            f" {Phase.RETURNED}: it was never started and costs nothing; {Phase.UNKNOWN},"
            " or no phase: what it was is lost, so it counts as charged"
        ),
        manifestSha256=_text("SHA-256 of the release's manifest, which names all that left; empty until it has"),
    )


_STATUS: Mapping[str, Callable[[], Schema]] = {
    "FederatedDiffusionJob": _job_status,
    "PrivateDataset": _dataset_status,
    "PrivacyRelease": _release_status,
}
