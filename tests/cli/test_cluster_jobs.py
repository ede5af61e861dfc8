"""What is shown of a cluster's jobs: every reason has its words, and nothing leaks."""

import copy
import json
from typing import Any

import pytest

from cluster_books import NOW, Object, books, entry, shown
from feddiff import cluster_jobs
from feddiff.cluster_budgets import Books
from feddiff.cluster_jobs import (
    MEND,
    NEXT,
    NOBODY,
    OWNER,
    PLATFORM,
    RESEARCHER,
    JobReference,
    Scene,
    Unreadable,
    attempt_to_read,
    job_document,
    jobs_document,
    newest_attempts,
    next_steps,
    pods_of,
    print_job,
    print_jobs,
    print_why,
    why_document,
    without_pods,
)
from feddiff_protocol import ledger_objects
from feddiff_protocol.errors import FINAL_EXIT_CODES, RETRIED_EXIT_CODES, InputMissing, UsageInvalid
from feddiff_protocol.ledger import Account, Phase
from feddiff_protocol.plan import Reason
from feddiff_protocol.stages import Stage

SECRET = "label 7 of record 4711"


# ---- builders ----------------------------------------------------------------------------------------------------


def job(status: Object | None = None, **spec: Any) -> Object:
    clients = [{"name": n, "dataset": {"namespace": f"clinic-{n}", "name": "scans"}} for n in "ab"]
    privacy = {"mechanism": "summary", "epsilon": "4", "delta": "1e-5", "clipNorm": "4", "momentClipNorm": "2"}
    return {
        "apiVersion": "feddiff.dev/v1alpha1",
        "kind": "FederatedDiffusionJob",
        "metadata": {
            "namespace": "research",
            "name": "first",
            "uid": "uid-1",
            "generation": 1,
            "creationTimestamp": "2026-01-01T00:00:00Z",
        },
        "spec": {"clients": clients, "privacy": privacy, "diffusion": {"splitSigma": "1"}, **spec},
        **({"status": status} if status else {}),
    }


def status(phase: str, reason: str, message: str, **more: Any) -> Object:
    failed = {"type": "Failed", "status": str(phase == "Failed"), "reason": reason, "message": message}
    return {"phase": phase, "observedGeneration": 1, "message": message, "conditions": [failed], **more}


def attempt(stage: str, client: str = "", number: int = 1, **annotations: str) -> Object:
    namespace = f"clinic-{client}" if client else "research"
    labels = {"feddiff.dev/stage": stage, "feddiff.dev/attempt": str(number), "feddiff.dev/job-uid": "uid-1"}
    labels |= {"feddiff.dev/job": "first", "feddiff.dev/job-namespace": "research"}
    labels |= {"feddiff.dev/client": client} if client else {}
    return {
        "metadata": {
            "namespace": namespace,
            "name": f"fd-{stage}-{client}-{number}",
            "uid": f"{stage}-{client}-{number}",
            "labels": labels,
            "annotations": {f"feddiff.dev/{name.replace('_', '-')}": value for name, value in annotations.items()},
            "creationTimestamp": f"2026-01-01T00:{number:02}:00Z",
        },
        "spec": {},
    }


def pod(of: Object, phase: str = "Pending", index: int = 0, **status: Any) -> Object:
    labels = {
        "batch.kubernetes.io/job-name": of["metadata"]["name"],
        "batch.kubernetes.io/job-completion-index": str(index),
    }
    metadata = {"namespace": of["metadata"]["namespace"], "name": f"{of['metadata']['name']}-{index}", "labels": labels}
    return {"metadata": metadata, "status": {"phase": phase, **status}}


def waiting(reason: str, message: str = "") -> Object:
    return {"containerStatuses": [{"name": "stage", "state": {"waiting": {"reason": reason, "message": message}}}]}


# ---- why: reasons and what to do ---------------------------------------------------------------------------------


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
    after_a_charge = [
        reason for reason in Reason if "DEADLINE" in reason.name or reason.name.endswith(("FAILED", "LOST"))
    ]
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


def scene(**given: Any) -> Scene:
    found = given.pop("job", job(status("Releasing", "Releasing", "waiting")))
    return Scene(JobReference("research", "first", "uid-1"), found, **given)


# ---- why: attempts -----------------------------------------------------------------------------------------------

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


def test_only_the_newest_attempt_of_each_stage_counts_and_stages_come_in_their_order() -> None:
    found = [
        attempt("report"),
        attempt("release", "b", 10),
        attempt("release", "b", 9),
        attempt("release", "a"),
        attempt("x"),
    ]
    assert [each["metadata"]["name"] for each in newest_attempts(found)] == [
        "fd-release-a-1",
        "fd-release-b-10",
        "fd-report--1",
    ]


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


# ---- why: clients ------------------------------------------------------------------------------------------------


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


# ---- logs --------------------------------------------------------------------------------------------------------


def test_the_newest_attempt_that_fits_is_read() -> None:
    found = [
        attempt("release", "a", 1),
        attempt("release", "a", 2),
        attempt("train-personal", "a", 3),
        attempt("report"),
    ]
    assert attempt_to_read(found, "a", None, "job")["metadata"]["name"] == "fd-train-personal-a-3"
    assert attempt_to_read(found, "a", "release", "job")["metadata"]["name"] == "fd-release-a-2"
    assert attempt_to_read(found, "", None, "job")["metadata"]["name"] == "fd-report--1"


def test_where_no_attempt_or_too_many_fit_nothing_is_guessed() -> None:
    found = [attempt("release", "a"), attempt("release", "b")]
    with pytest.raises(InputMissing, match="name it with --client"):
        attempt_to_read(found, "", None, "job")
    with pytest.raises(InputMissing, match="no attempt of sample of client a has been started"):
        attempt_to_read(found, "a", "sample", "job")
    with pytest.raises(UsageInvalid, match="stages of a, b fit"):
        attempt_to_read(found, None, "release", "job")


def test_pods_of_an_attempt_come_by_rank_and_not_from_another_namespace() -> None:
    batch = attempt("train-shared")
    pods = [pod(batch, index=each) for each in (10, 2, 0)]
    stranger = pod(batch)
    stranger["metadata"]["namespace"] = "elsewhere"
    assert [each["metadata"]["name"][-2:] for each in pods_of(batch, [*pods, stranger])] == ["-0", "-2", "10"]


# ---- status ------------------------------------------------------------------------------------------------------


def test_lines_are_plain_and_aligned_elsewhere_and_a_table_on_a_terminal() -> None:
    given = job(status("Training", "Training", "", clientsSummary="8/10", progress="37 %", trainer="2/2"))
    document = jobs_document([given, {**given, "metadata": {**given["metadata"], "name": "second-and-longer"}}])
    header, first, second = shown(print_jobs, document, NOW).splitlines()
    assert first.split() == ["research", "first", "Training", "8/10", "37", "%", "4", "2/2", "24h"]
    assert header.index("phase") == first.index("Training") == second.index("Training")
    assert "┃" in shown(print_jobs, document, NOW, terminal=True)
    assert shown(print_jobs, jobs_document([]), NOW) == "no jobs here\n"


def test_a_status_of_an_older_spec_and_dropped_clients_are_said() -> None:
    dropped = [{"client": "b", "reason": "release failed"}]
    given = job(status("Training", "Training", "", dropped=dropped, numDropped=3))
    given["metadata"]["generation"] = 2
    document = job_document(given)
    text = shown(print_job, document, NOW)
    assert document["upToDate"] is False
    assert "the operator has not looked at it yet" in text
    assert "client b no longer takes part: release failed" in text
    assert "and 2 more clients" in text


def test_every_stage_name_is_known() -> None:
    assert {stage.value for stage in cluster_jobs.SHARED_STAGES} < {stage.value for stage in Stage}
