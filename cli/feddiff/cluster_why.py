"""Why a job waits or failed, and who has to do what: a scene in, the answer for people and as JSON out.

Pure. What the reader may not see is said to be so, with whom to ask; nothing that a stage of an owner printed is ever
repeated.
"""

from collections.abc import Iterable, Mapping, Sequence

from rich.console import Console

from feddiff_protocol import ledger
from feddiff_protocol.accountant import admits, budget_mu_squared, spent_epsilon
from feddiff_protocol.api import FederatedDiffusionJob, PrivateDataset, parse
from feddiff_protocol.errors import Interrupted, SpecInvalid
from feddiff_protocol.labels import (
    CLIENT,
    EXIT_CODE,
    LOST,
    MANAGER,
    MESSAGE,
    RECEIPT,
    STAGE,
    STOPPED,
    STOPPED_BECAUSE,
)
from feddiff_protocol.ledger import Phase
from feddiff_protocol.ledger_objects import account_of
from feddiff_protocol.plan import Reason
from feddiff_protocol.promise import promise_of

from .cluster_budgets import mismatch
from .cluster_scene import JobReference, Object, Scene, label, newest_attempts, number_of, pods_of
from .tables import print_table, say

SHOWN_ATTEMPTS = 20
SHOWN_CLIENTS = 50
SHOWN_NAMESPACES = 5


def why_document(scene: Scene) -> Object:
    """Why a job waits or failed, as JSON: one reason in words, clients, attempts, and who has to do what."""
    phase, reason, message = verdict(scene.job) if scene.job else ("", "", _not_yours(scene.reference))
    attempts = [_attempt_document(scene, each) for each in newest_attempts(scene.attempts)]
    clients = _client_documents(scene)
    return {
        "job": {"namespace": scene.reference.namespace, "name": scene.reference.name},
        "uid": scene.reference.uid,
        "phase": phase,
        "reason": reason,
        "message": message,
        "runbook": f"docs/runbooks/{reason}.md" if reason else "",
        "next": next_steps(reason, attempts),
        "clients": clients,
        "attempts": attempts,
        "unreadable": [{"namespace": each.namespace, "what": each.what, "ask": each.ask} for each in scene.unreadable],
    }


def verdict(job: Object) -> tuple[str, str, str]:
    """Phase, the one reason, and the message, in the operator's words."""
    status = job.get("status") or {}
    if not status.get("phase"):
        return "", "", _unseen(job)
    (failed,) = [each for each in status["conditions"] if each["type"] == "Failed"]  # it carries the current reason
    message = failed.get("message") or status.get("message", "")
    return status["phase"], failed.get("reason", ""), message


def _unseen(job: Object) -> str:
    manager = job["spec"].get("managedBy")
    if manager not in (None, MANAGER):
        return f"spec.managedBy is {manager}: feddiff's operator leaves it to that one"
    namespace = job["metadata"]["namespace"]
    return (
        f"no operator has looked at it: none runs, or it may not act in {namespace} (RoleBinding"
        " feddiff-job-namespace); ask the platform engineer"
    )


def _not_yours(reference: JobReference) -> str:
    return f"the job itself is in {reference.namespace}, where you may not read jobs; this is what your namespace shows"


NOBODY, RESEARCHER, OWNER, PLATFORM = "nobody", "researcher", "owner", "platform"
_GOES_ON = ((NOBODY, "nothing to do: it goes on by itself"),)
_NEW_JOB = "what was charged stays charged, and a new job charges again"

NEXT: Mapping[Reason, tuple[tuple[str, str], ...]] = {
    **dict.fromkeys(
        (
            *(Reason.ACCEPTED, Reason.BUDGET_RESERVED, Reason.RELEASED, Reason.SHARED_TRAINED),
            *(Reason.PERSONAL_TRAINED, Reason.EVALUATED, Reason.RESERVING, Reason.CHARGING, Reason.RELEASING),
            *(Reason.TRAINING, Reason.SAMPLING, Reason.EVALUATING, Reason.RETRYING),
        ),
        _GOES_ON,
    ),
    **dict.fromkeys(
        (Reason.COMPLETE, Reason.FINISHED),
        ((NOBODY, "nothing to do: the job report is in the job's store, each owner's report in its own"),),
    ),
    Reason.SUSPENDED: ((RESEARCHER, "set spec.suspend to false; it goes on where it stood"),),
    Reason.WAITING: (
        (PLATFORM, "make room, or mend what the scheduler, the kubelet or the queue says above"),
        (OWNER, "the same for the pods in your namespace: quota, volume, image, node selector of spec.podTemplate"),
    ),
    Reason.DATASET_MISSING: (
        (OWNER, "create the dataset named above (feddiff owner init writes one)"),
        (RESEARCHER, "if the name is wrong, delete the job and make one that names the right dataset"),
    ),
    Reason.LEDGER_MISMATCH: (
        (OWNER, "look at feddiff budget: put the ledger back from a backup, or acknowledge; never delete an entry"),
    ),
    Reason.INVALID_SPEC: (
        (RESEARCHER, "correct what the message names and make a new job"),
        (OWNER, "correct the dataset, where the message names one"),
    ),
    Reason.INVALID_POD_TEMPLATE: (
        (OWNER, "take out of spec.podTemplate of the dataset what the message names"),
        (RESEARCHER, "or out of spec.shared.podTemplate of the job, in a new job"),
    ),
    Reason.ACCESS_DENIED: (
        (OWNER, "add the job's namespace to spec.access of the dataset, or raise its maxEpsilon, if you agree"),
        (RESEARCHER, "ask the owner, or ask for a smaller epsilon in a new job"),
    ),
    Reason.IMAGE_NOT_ALLOWED: (
        (OWNER, "add the image to spec.images of the dataset, if you trust it"),
        (PLATFORM, "or run an image that the owners allow"),
    ),
    Reason.PRIVACY_BUDGET_EXCEEDED: (
        (OWNER, "raise budget.epsilon of the dataset, if you agree; it can never be lowered again"),
        (RESEARCHER, "if the job has failed, make a new one: with a smaller epsilon, or after the owner has raised it"),
    ),
    Reason.RESERVATION_DEADLINE_EXCEEDED: (
        (OWNER, "create the dataset, bind the operator's role or acknowledge the ledger, as the message says"),
        (RESEARCHER, "a new job with a later deadlines.reservationSeconds or a smaller quorum"),
    ),
    Reason.RELEASE_DEADLINE_EXCEEDED: (
        (RESEARCHER, f"a new job with a later deadlines.releaseSeconds or a smaller quorum; {_NEW_JOB}"),
    ),
    Reason.START_DEADLINE_EXCEEDED: (
        (PLATFORM, "make room for the pods named above"),
        (RESEARCHER, f"a new job with a later deadlines.startSeconds; {_NEW_JOB}"),
    ),
    Reason.STAGE_DEADLINE_EXCEEDED: (
        (RESEARCHER, f"a new job with a later deadlines.stageSeconds, or a shorter training; {_NEW_JOB}"),
    ),
    Reason.STAGE_FAILED: (
        (RESEARCHER, f"read the log of the failed attempt, mend its cause, make a new job; {_NEW_JOB}"),
    ),
    Reason.CLIENTS_LOST: (
        (OWNER, "read the log of your failed attempt and mend its cause"),
        (RESEARCHER, f"a new job, with a smaller quorum if some owners stay away; {_NEW_JOB}"),
    ),
}

# What an exit code asks for, and of whom; "" stands for whose stage it is.
MEND: Mapping[str, tuple[str, str]] = {
    "65": ("", "correct the records or the document that the log names"),
    "66": ("", "put in place what the log misses: volume, path, or object"),
    "69": (PLATFORM, "the store did not answer: address, keys, NetworkPolicy"),
    "73": ("", "the store or the disk cannot be written: keys, prefix, quota"),
    "74": (PLATFORM, "input or output failed: disk or network"),
    "77": ("", "privacy refusal: nothing was sent; read the log, change nothing in the store"),
    "78": (PLATFORM, "the installation or its image does not fit; the log says what"),
    "137": ("", "killed: raise the memory limit if it ran out of memory"),
}


def next_steps(reason: str, attempts: Sequence[Object]) -> list[Object]:
    """Who has to do what: for the reason, and for attempts that failed."""
    known = reason in set(Reason)
    waits = any(each["phase"] == "Waiting" for each in attempts)
    general = NEXT[Reason(reason)] if known else NEXT[Reason.WAITING] if waits else ()
    steps = [{"who": who, "what": what} for who, what in general]
    for each in attempts:
        if each["phase"] == "Failed" and each["exitCode"] in MEND:
            who, what = MEND[each["exitCode"]]
            whose = f"{OWNER} of client {each['client']}" if each["client"] else RESEARCHER
            steps.append({"who": who or whose, "what": f"{_attempt_name(each)}: {what}"})
    steps = [step for index, step in enumerate(steps) if step not in steps[:index]]
    return steps or [{"who": NOBODY if attempts else PLATFORM, "what": "see above"}]


def _client_documents(scene: Scene) -> list[Object]:
    if scene.job is None:
        return []
    status = scene.job.get("status") or {}
    dropped = {each["client"]: each["reason"] for each in status.get("dropped") or []}
    clients = []
    for each in scene.job["spec"]["clients"]:
        reference = each["dataset"]
        namespace = reference.get("namespace", "default")
        key = f"{namespace}/{reference['name']}"
        hold = _hold(scene, each["name"], namespace, key)
        says = dropped.get(each["name"]) or _refusal(scene, key, hold)
        clients.append(
            {
                "client": each["name"],
                "dataset": key,
                "hold": hold,
                "takesPart": each["name"] not in dropped,
                "says": says,
            }
        )
    return clients


def _hold(scene: Scene, client: str, namespace: str, key: str) -> str:
    """What the owner's ledger holds for this client; "Hidden" where its entries are not the reader's to see."""
    for release in scene.releases:
        own = release["metadata"]["namespace"] == namespace and release["spec"]["client"] == client
        if own and release["spec"]["job"]["uid"] == scene.reference.uid:
            return str((release.get("status") or {}).get("phase", Phase.UNKNOWN.value))
    account = ((scene.datasets.get(key) or {}).get("status") or {}).get("account") or {}
    pending = [each["spec"] for each in account.get("pending") or []]
    if any(each["client"] == client and each["job"]["uid"] == scene.reference.uid for each in pending):
        return Phase.RESERVED.value
    return "Hidden" if scene.may_not_read(namespace, "privacyreleases") else "None"


def _refusal(scene: Scene, key: str, hold: str) -> str:
    """Why the client cannot take part, as far as its dataset can be read; what is held is not asked again."""
    if key not in scene.datasets or hold in (Phase.RESERVED.value, Phase.CHARGED.value):
        return ""
    found = scene.datasets[key]
    if found is None:
        return f"there is no dataset {key}"
    assert scene.job is not None
    try:
        dataset = parse(PrivateDataset, found, f"dataset {key}")
        job = parse(FederatedDiffusionJob, scene.job, "job")
        if denied := ledger.access_refusal(dataset, job):
            return denied.message
        return mismatch(found) or _over_budget(dataset, job, hold)
    except SpecInvalid as error:
        return str(error)


def _over_budget(dataset: PrivateDataset, job: FederatedDiffusionJob, hold: str) -> str:
    """What the filter would answer; nothing where this job's charge may already be in the account."""
    account = account_of(dataset.status)
    if account is None or hold != "None":
        return ""
    budget, charge = dataset.spec.budget, promise_of(job.spec.privacy, job.spec.diffusion).charge
    limit = budget_mu_squared(budget.epsilon, budget.delta, budget.pure_epsilon)
    admission = admits(limit, budget.pure_epsilon, account.charges, charge)
    if admission.admitted:
        return ""
    pure = f"; its pureEpsilon by {admission.excess_pure_epsilon} too much" if admission.excess_pure_epsilon else ""
    spent = spent_epsilon(account.charges, budget.delta)
    wanted = spent_epsilon((*account.charges, charge), budget.delta)
    return (
        f"its budget does not hold it: ε = {spent:.4f} of {budget.epsilon} counted, {wanted:.4f} with this job"
        f" (per {budget.unit}, δ = {budget.delta}){pure}"
    )


# ---- Attempts ----------------------------------------------------------------------------------------------------


def _attempt_document(scene: Scene, attempt: Object) -> Object:
    annotations = attempt["metadata"].get("annotations") or {}
    phase, says = _attempt_state(scene, attempt, pods_of(attempt, scene.pods))
    return {
        "stage": label(attempt, STAGE),
        "client": label(attempt, CLIENT),
        "attempt": number_of(attempt),
        "namespace": attempt["metadata"]["namespace"],
        "phase": phase,
        "exitCode": annotations.get(EXIT_CODE, ""),
        "says": says,
    }


def _attempt_state(scene: Scene, attempt: Object, pods: Sequence[Object]) -> tuple[str, str]:
    """Phase, and the words of whoever hinders it: operator, queue, scheduler, kubelet, quota."""
    written = attempt["metadata"].get("annotations") or {}
    if RECEIPT in written:
        return "Succeeded", ""
    if STOPPED in written:
        return "Stopped", str(written.get(STOPPED_BECAUSE, written[STOPPED]))
    if EXIT_CODE in written:
        stopped = written[EXIT_CODE] in (LOST, str(Interrupted.exit_code))
        return "Stopped" if stopped else "Failed", str(written.get(MESSAGE, ""))
    if words := next((words for pod in pods if (words := _pod_words(pod))), ""):
        return "Waiting", words
    if attempt["spec"].get("suspend"):
        queue = label(attempt, "kueue.x-k8s.io/queue-name")
        return "Waiting", f"queue {queue} has not admitted it" if queue else "something suspended its Job"
    ended = [each for each in (attempt.get("status") or {}).get("conditions") or [] if each.get("status") == "True"]
    if any(each["type"] in ("Failed", "Complete") for each in ended):
        return "Ended", "the operator has not read its end yet"
    return ("Running", "") if pods else ("Waiting", _event_words(scene.events, attempt))


def _pod_words(pod: Object) -> str:
    """Scheduler and kubelet about a pod that does not run; never what the pod itself printed."""
    status = pod.get("status") or {}
    if status.get("phase", "Pending") != "Pending":
        return ""
    for each in status.get("conditions") or []:
        if each.get("type") == "PodScheduled" and each.get("status") == "False":
            return f"{each.get('reason', 'Unschedulable')}: {each.get('message', '')}"
    states = [each.get("state") or {} for each in status.get("containerStatuses") or []]
    held = next((state["waiting"] for state in states if "waiting" in state), None)
    if held is None:
        return "its pod is being prepared"
    return f"{held.get('reason', '')}: {held['message']}" if held.get("message") else str(held.get("reason", ""))


def _event_words(events: Iterable[Object], attempt: Object) -> str:
    uid = attempt["metadata"]["uid"]
    own = [each for each in events if (each.get("involvedObject") or {}).get("uid") == uid]
    newest = max(own, key=lambda each: each.get("lastTimestamp") or each.get("eventTime") or "", default=None)
    return f"{newest.get('reason', '')}: {newest.get('message', '')}" if newest else "it has no pod yet"


# ---- For people --------------------------------------------------------------------------------------------------


def print_why(document: Object, console: Console) -> None:
    job = document["job"]
    say(console, f"Job {job['namespace']}/{job['name']}: {document['phase'] or '-'}")
    say(console, f"  {document['reason']}: {document['message']}" if document["reason"] else f"  {document['message']}")
    _print_clients(document["clients"], console)
    _print_attempts(document["attempts"], console)
    _print_unreadable(document["unreadable"], console)
    say(console, "what to do:")
    for step in document["next"]:
        say(console, f"  {step['who']}: {step['what']}")
    if document["runbook"]:
        say(console, f"  more: {document['runbook']}")


CALLED = {"jobs": "stages", "privacyreleases": "ledger entries", "privatedatasets": "datasets"}


def _print_unreadable(unreadable: Sequence[Object], console: Console) -> None:
    """One line for each kind of object: a job of many owners has many namespaces."""
    for what, ask in dict.fromkeys((each["what"], each["ask"]) for each in unreadable):
        namespaces = [each["namespace"] for each in unreadable if each["what"] == what]
        more = f" and {len(namespaces) - SHOWN_NAMESPACES} more" if len(namespaces) > SHOWN_NAMESPACES else ""
        say(
            console,
            f"not yours to read: {CALLED.get(what, what)} in {', '.join(namespaces[:SHOWN_NAMESPACES])}{more}; {ask}",
        )


def _print_clients(clients: Sequence[Object], console: Console) -> None:
    if not clients:
        return
    first = sorted(clients, key=lambda each: (not each["says"], each["takesPart"]))[:SHOWN_CLIENTS]
    rows = [(each["client"], each["dataset"], each["hold"], "yes" if each["takesPart"] else "no") for each in first]
    print_table(console, ("client", "dataset", "budget", "takes part"), rows)
    if len(clients) > len(first):
        say(console, f"and {len(clients) - len(first)} more clients")
    for each in first:
        if each["says"]:
            say(console, f"client {each['client']}: {each['says']}")


def _print_attempts(attempts: Sequence[Object], console: Console) -> None:
    telling = [each for each in attempts if each["phase"] != "Succeeded"]
    for each in telling[:SHOWN_ATTEMPTS]:
        code = f", exit code {each['exitCode']}" if each["exitCode"].isdigit() else ""
        words = f": {each['says']}" if each["says"] else ""
        say(console, f"{_attempt_name(each)} in {each['namespace']}: {each['phase']}{code}{words}")
    if len(telling) > SHOWN_ATTEMPTS:
        say(console, f"and {len(telling) - SHOWN_ATTEMPTS} more stages")


def _attempt_name(attempt: Object) -> str:
    whose = f" of {attempt['client']}" if attempt["client"] else ""
    return f"{attempt['stage']}{whose}, attempt {attempt['attempt']}"
