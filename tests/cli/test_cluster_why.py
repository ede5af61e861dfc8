"""Why a job waits: every reason has its words and whom it asks, and nothing leaks."""

import copy
import json
from typing import Any

import pytest

from cluster_objects import NOW, Object, attempt, books, entry, job, pod, shown, status, waiting
from feddiff.cluster_budgets import Books
from feddiff.cluster_jobs import jobs_document, print_jobs
from feddiff.cluster_scene import JobReference, Scene, Unreadable, without_pods
from feddiff.cluster_why import (
    MEND,
    NEXT,
    NOBODY,
    OWNER,
    PLATFORM,
    RESEARCHER,
    next_steps,
    print_why,
    why_document,
)
from feddiff_protocol import ledger_objects
from feddiff_protocol.errors import FINAL_EXIT_CODES, RETRIED_EXIT_CODES
from feddiff_protocol.ledger import Account, Phase
from feddiff_protocol.plan import Reason

SECRET = "label 7 of record 4711"


def scene(**given: Any) -> Scene:
    found = given.pop("job", job(status("Releasing", "Releasing", "waiting")))
    return Scene(JobReference("research", "first", "uid-1"), found, **given)


# ---- Reasons and what to do --------------------------------------------------------------------------------------


def test_every_reason_says_who_has_to_do_what() -> None:
    assert set(NEXT) == set(Reason)
    for steps in NEXT.values():
        assert steps
        assert {who for who, _ in steps} <= {NOBODY, RESEARCHER, OWNER, PLATFORM}


def test_no_advice_ever_suggests_to_delete_an_entry_or_to_lower_a_budget() -> None:
    words = [what for steps in NEXT.values() for _, what in steps] + [what for _, what in MEND.values()]
    assert not [each for each in words if "delete an entry" in each and "never delete an entry" not in each]
    assert not [each for each in words if "lower" in each and "never be lowered" not in each]


def test_who_makes_a_new_job_after_a_charge_is_told_that_it_charges_again() -> None:
    late = [
        reason for reason in Reason if "DEADLINE" in reason.name and reason is not Reason.RESERVATION_DEADLINE_EXCEEDED
    ]
    after_a_charge = [*late, Reason.STAGE_FAILED, Reason.CLIENTS_LOST]
    assert len(after_a_charge) == 5
    for reason in after_a_charge:
        assert any("charges again" in what for _, what in NEXT[reason])


def test_every_exit_code_of_a_stage_has_its_advice() -> None:
    of_stages = {str(code) for code in FINAL_EXIT_CODES | RETRIED_EXIT_CODES} - {"64", "75"}  # ours; not a failure
    assert of_stages | {"137"} == set(MEND)


def test_an_unknown_reason_of_a_newer_operator_is_shown_and_points_to_the_platform() -> None:
    document = why_document(Scene(JobReference("research", "first", "uid-1"), job(status("Failed", "Novel", "so new"))))
    assert (document["reason"], document["message"]) == ("Novel", "so new")
    assert document["next"] == [{"who": PLATFORM, "what": "see above"}]


def test_a_job_of_another_manager_is_said_to_be_left_alone() -> None:
    scene = Scene(JobReference("research", "first", "uid-1"), job(managedBy="kueue.x-k8s.io/multikueue"))
    assert "leaves it to that one" in why_document(scene)["message"]


# ---- Attempts ----------------------------------------------------------------------------------------------------

UNSCHEDULABLE = {
    "conditions": [{"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "no"}]
}


@pytest.mark.parametrize(
    ("annotations", "pods", "phase", "says"),
    [
        ({"receipt": "{}"}, {}, "Succeeded", ""),
        ({"stopped": "StageDeadlineExceeded", "stopped_because": "ran long"}, {}, "Stopped", "ran long"),
        ({"stopped": "Suspended"}, {}, "Stopped", "Suspended"),
        ({"exit_code": "65", "message": "invalid"}, {}, "Failed", "invalid"),
        ({"exit_code": "75", "message": "interrupted"}, {}, "Stopped", "interrupted"),
        ({"exit_code": "lost", "message": "node gone"}, {}, "Stopped", "node gone"),
        ({}, UNSCHEDULABLE, "Waiting", "Unschedulable: no"),
        ({}, waiting("ImagePullBackOff", "no such image"), "Waiting", "ImagePullBackOff: no such image"),
        ({}, waiting("ContainerCreating"), "Waiting", "ContainerCreating"),
        ({}, {"phase": "Pending"}, "Waiting", "its pod is being prepared"),
        ({}, {"phase": "Running"}, "Running", ""),
    ],
)
def test_an_attempt_is_told_in_the_words_of_operator_scheduler_or_kubelet(
    annotations: dict[str, str], pods: Object, phase: str, says: str
) -> None:
    batch = attempt("release", "a", **annotations)
    document = why_document(scene(attempts=[batch], pods=[pod(batch, **pods)] if pods else []))
    assert [(each["phase"], each["says"]) for each in document["attempts"]] == [(phase, says)]


def test_a_job_without_a_pod_is_told_in_the_newest_words_about_it() -> None:
    batch = attempt("release", "a")
    events = [
        {
            "involvedObject": {"uid": batch["metadata"]["uid"]},
            "reason": "FailedCreate",
            "message": m,
            "lastTimestamp": t,
        }
        for t, m in (("2026-01-01T00:00:09Z", "exceeded quota"), ("2026-01-01T00:00:01Z", "older"))
    ]
    assert without_pods([batch], [])
    document = why_document(scene(attempts=[batch], events=events))
    assert document["attempts"][0]["says"] == "FailedCreate: exceeded quota"
    assert why_document(scene(attempts=[batch]))["attempts"][0]["says"] == "it has no pod yet"


def test_a_queue_that_has_not_admitted_an_attempt_is_named() -> None:
    batch = attempt("train-shared")
    batch["spec"]["suspend"] = True
    assert why_document(scene(attempts=[batch]))["attempts"][0]["says"] == "something suspended its Job"
    batch["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] = "gpus"
    assert why_document(scene(attempts=[batch]))["attempts"][0]["says"] == "queue gpus has not admitted it"


def test_an_owners_part_that_waits_asks_the_owner_though_the_reason_is_not_to_be_read() -> None:
    (first, *_) = next_steps("", [{"phase": "Waiting", "exitCode": "", "client": "a"}])
    assert first["who"] == PLATFORM
    assert next_steps("", [{"phase": "Running", "exitCode": "", "client": "a"}]) == [
        {"who": NOBODY, "what": "see above"}
    ]


def leaks(document: Object) -> bool:
    return SECRET in json.dumps(document, ensure_ascii=False) or SECRET in shown(print_why, document)


def test_nothing_that_a_pod_printed_is_repeated() -> None:
    """A stage of an owner leaves its last words in the termination message; they are the owner's."""
    batch = attempt("release", "a", exit_code="65", message="spec or data invalid")
    ended = {"terminated": {"exitCode": 65, "reason": "Error", "message": SECRET}}
    pods = [pod(batch, "Failed", containerStatuses=[{"name": "stage", "state": ended, "lastState": ended}])]
    document = why_document(scene(attempts=[batch], pods=pods))
    assert not leaks(document)
    document["attempts"][0]["says"] += f"; {SECRET}"  # a view that quotes the pod would be noticed
    assert leaks(document)


def test_a_name_of_somebody_else_cannot_steer_the_terminal() -> None:
    evil = "\x1b]0;owned\x07[red]no"
    text = shown(print_why, why_document(scene(job=job(status("Pending", "Waiting", evil)))))
    assert "\x1b" not in text
    assert "[red]no" in text
    document = jobs_document([job(status("[bold]\x1b[2J", "Waiting", ""))])
    for terminal in (False, True):
        assert "\x1b[2J" not in shown(print_jobs, document, NOW, terminal=terminal)
        assert "[bold]" in shown(print_jobs, document, NOW, terminal=terminal)


# ---- Clients -----------------------------------------------------------------------------------------------------


def dataset(namespace: str, given: Books, **spec: Any) -> Object:
    found = copy.deepcopy(given.dataset)
    found["metadata"]["namespace"] = namespace
    found["spec"] |= {
        "source": {"format": "npz", "path": "train.npz"},
        "image": {"channels": 1, "height": 8, "width": 8},
        "classes": {"count": 1, "records": [9]},
        "access": [{"namespace": "research", "maxEpsilon": "10"}],
        **spec,
    }
    return found


def clients(**given: Any) -> dict[str, tuple[str, str]]:
    return {each["client"]: (each["hold"], each["says"]) for each in why_document(scene(**given))["clients"]}


def test_each_client_says_what_its_owner_would_have_to_change() -> None:
    denied = dataset("clinic-a", books([]), access=[])
    found = clients(datasets={"clinic-a/scans": denied, "clinic-b/scans": None})
    assert found["a"][0] == found["b"][0] == "None"
    assert "lets no job of namespace research use it" in found["a"][1]
    assert found["b"][1] == "there is no dataset clinic-b/scans"


def test_a_budget_that_would_be_exceeded_is_said_and_one_that_holds_is_not() -> None:
    full = dataset("clinic-a", books([entry(1, "3")], limit="4"))
    enough = dataset("clinic-b", books([entry(1, "3")], limit="6"))
    found = clients(datasets={"clinic-a/scans": full, "clinic-b/scans": enough})
    assert "its budget does not hold it: ε = 3.0000 of 4 counted" in found["a"][1]
    assert found["b"] == ("None", "")


def test_pure_epsilon_that_was_not_set_aside_is_said() -> None:
    asking = job(status("Reserving", "Reserving", "waiting"))
    asking["spec"]["privacy"] = {"mechanism": "privunit", "epsilon": "2", "clipNorm": "4"}
    asking["spec"]["diffusion"] = {"splitSigma": "0.25"}
    found = clients(datasets={"clinic-a/scans": dataset("clinic-a", books([]))}, job=asking)
    assert "ε = 0.0000 of 20 counted, 2.0000 with this job" in found["a"][1]
    assert found["a"][1].endswith("; its pureEpsilon by 2 too much")


def test_what_is_held_is_not_asked_again() -> None:
    held = entry(1, "3")
    full = dataset("clinic-a", books([held], limit="3"))
    release = ledger_objects.release_object("clinic-a", "scans", held)
    found = clients(datasets={"clinic-a/scans": full}, releases=[ledger_objects.with_status_of(release, held)])
    assert found["a"] == ("Charged", "")


def test_a_reservation_without_an_entry_yet_is_reserved() -> None:
    account = Account(pending=(entry(1, "3", Phase.RESERVED),))
    assert clients(datasets={"clinic-a/scans": dataset("clinic-a", books([], account))})["a"] == ("Reserved", "")


def test_entries_that_may_not_be_read_are_hidden_and_not_guessed() -> None:
    unreadable = (Unreadable("clinic-a", "privacyreleases", "ask"),)
    found = clients(unreadable=unreadable, datasets={"clinic-a/scans": dataset("clinic-a", books([entry(1, "20")]))})
    assert found["a"] == ("Hidden", ""), "this job's own charge may be what fills the budget"
    assert found["b"][0] == "None"


def test_a_job_of_many_owners_names_a_few_namespaces_and_counts_the_rest() -> None:
    unreadable = tuple(Unreadable(f"clinic-{n:03}", "jobs", "ask") for n in range(1000))
    text = shown(print_why, why_document(scene(unreadable=unreadable)))
    (line,) = [line for line in text.splitlines() if "not yours" in line]
    assert line.endswith("clinic-004 and 995 more; ask")
