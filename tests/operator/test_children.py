"""What the watches have brought is found again by job, and what is gone is gone."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from feddiff_operator.children import Once, Seen, Shelf, kept, kept_job, kept_pod, owner_of
from feddiff_operator.workloads import TOO_LARGE, InvalidPodTemplate, check_overlay

Object = dict[str, Any]


def child(name: str, job_uid: str = "uid-1", job: str = "digits", namespace: str = "clinic-a") -> Object:
    labels = {"feddiff.dev/job-uid": job_uid, "feddiff.dev/job": job, "feddiff.dev/job-namespace": "research"}
    metadata = {"namespace": namespace, "name": name, "uid": f"of-{name}", "labels": labels, "managedFields": [{}]}
    spec = {"suspend": False, "template": {"spec": {}}, "nodeName": "n", "containers": [{}]}
    return {"apiVersion": "v1", "kind": "X", "metadata": metadata, "spec": spec, "status": {"succeeded": 1}}


def names(children: list[Object]) -> list[str]:
    return sorted(each["metadata"]["name"] for each in children)


def test_children_are_found_by_their_jobs_uid_in_every_namespace() -> None:
    seen = Seen()
    for name, uid, namespace in (("a", "uid-1", "clinic-a"), ("b", "uid-1", "clinic-b"), ("c", "uid-2", "clinic-a")):
        seen.child_jobs.put(child(name, uid, namespace=namespace), 1)
    seen.child_pods.put(child("p"), 1)
    assert names(seen.jobs_of("uid-1")) == ["a", "b"]
    assert names(seen.jobs_of("uid-2")) == ["c"]
    assert names(seen.pods_of("uid-1")) == ["p"]
    assert seen.jobs_of("uid-3") == []


def test_strangers_are_the_children_of_an_earlier_job_of_the_same_name() -> None:
    seen = Seen()
    seen.child_jobs.put(child("old", "uid-1"), 1)
    seen.child_jobs.put(child("new", "uid-2"), 1)
    seen.child_jobs.put(child("other", "uid-3", job="mnist"), 1)
    assert names(seen.strangers("research", "digits", "uid-2")) == ["old"]
    assert names(seen.strangers("research", "digits", "")) == ["new", "old"]
    assert seen.strangers("elsewhere", "digits", "") == []


def test_a_change_replaces_and_a_deletion_removes() -> None:
    seen = Seen()
    now, before = seen.child_jobs.put(child("a"), 1)
    assert before is None and now["status"] == {"succeeded": 1}
    changed = {**child("a", "uid-2"), "status": {"failed": 1}}
    _, before = seen.child_jobs.put(changed, 1)
    assert before == now
    assert seen.jobs_of("uid-1") == []
    assert [each["status"] for each in seen.jobs_of("uid-2")] == [{"failed": 1}]
    assert seen.child_jobs.take(changed) is not None
    assert seen.child_jobs.take(changed) is None
    assert seen.jobs_of("uid-2") == [] and list(seen.child_jobs) == []


def test_what_a_new_listing_did_not_bring_is_gone_in_its_namespace_only() -> None:
    seen = Seen()
    for name, namespace in (("a", "clinic-a"), ("b", "clinic-a"), ("c", "clinic-b")):
        seen.child_jobs.put(child(name, namespace=namespace), 1)
    seen.child_jobs.put(child("b"), 2)  # the second listing of clinic-a
    assert names(seen.child_jobs.take_unlisted("clinic-a", 2)) == ["a"]
    assert names(seen.jobs_of("uid-1")) == ["b", "c"]
    assert names(seen.child_jobs.take_unlisted(None, 2)) == ["c"]


def test_only_what_is_read_later_is_kept() -> None:
    job, pod = kept_job(child("a")), kept_pod(child("a"))
    assert "template" not in job["spec"] and job["spec"]["suspend"] is False
    assert pod["spec"] == {"nodeName": "n"}
    assert kept(child("a"))["spec"] == child("a")["spec"] and kept(child("a"))["status"] == child("a")["status"]
    assert all("managedFields" not in each["metadata"] for each in (job, pod, kept(child("a"))))


@pytest.mark.parametrize("within", [[], ["shared"]])
def test_an_overlay_too_large_to_be_used_is_not_kept(within: list[str]) -> None:
    """Many of them would fill the operator's memory: a megabyte of `{}` is forty of Python objects."""
    for count, stays in ((100, True), (500_000, False)):
        overlay: Object = {"spec": {"volumes": [{}] * count}}
        spec: Object = {"podTemplate": overlay, "images": 7}
        for name in within:
            spec = {name: spec}
        found = kept({**child("a"), "spec": spec})["spec"]
        for name in within:
            found = found[name]
        assert found == {"podTemplate": overlay if stays else TOO_LARGE, "images": 7}
        if stays:
            check_overlay(overlay, "spec.podTemplate")
            continue
        for large in (found["podTemplate"], overlay):
            with pytest.raises(InvalidPodTemplate, match="at most 64 KiB as JSON"):
                check_overlay(large, "spec.podTemplate")


def test_a_dataset_is_found_by_its_name_and_releases_by_their_job() -> None:
    seen = Seen()
    seen.datasets.put(child("scans"), 1)
    seen.releases.put({**child("entry"), "spec": {"job": {"uid": "uid-9"}, "dataset": {"name": "scans"}}}, 1)
    found = seen.dataset("clinic-a", "scans")
    assert found is not None and found["metadata"]["name"] == "scans"
    assert seen.dataset("clinic-b", "scans") is None
    assert names(seen.releases_of("uid-9")) == names(seen.entries("clinic-a", "scans")) == ["entry"]
    assert seen.entries("clinic-b", "scans") == []


def test_jobs_are_found_by_every_dataset_that_they_use() -> None:
    seen = Seen()
    clients = [{"dataset": {"namespace": "clinic-a", "name": "scans"}}, {"dataset": {"name": "own"}}]
    metadata = {"namespace": "research", "name": "digits", "uid": "u"}
    seen.jobs.put({"metadata": metadata, "spec": {"clients": clients}}, 1)
    assert names(seen.jobs.of(("clinic-a", "scans"))) == names(seen.jobs.of(("default", "own"))) == ["digits"]
    job = seen.job("research", "digits")
    assert job is not None and job["spec"]["clients"] == clients
    assert seen.job("clinic-a", "scans") is None
    assert seen.jobs.of(("clinic-b", "scans")) == []


@pytest.mark.parametrize("missing", ["feddiff.dev/job", "feddiff.dev/job-namespace"])
def test_what_does_not_say_whose_it_is_is_nobodys(missing: str) -> None:
    body = child("a")
    assert owner_of(body) == ("research", "digits")
    del body["metadata"]["labels"][missing]
    assert owner_of(body) is None


STEPS = st.lists(
    st.tuples(st.sampled_from(["put", "take", "relist"]), st.sampled_from("abcd"), st.sampled_from("xyz")), max_size=40
)


def _disagreements(shelf: Shelf[str], steps: list[tuple[str, str, str]]) -> list[str]:
    """Keys under which the shelf finds something else than a plain dictionary says."""
    plain: dict[str, tuple[str, int]] = {}
    listing = 1
    for step, uid, key in steps:
        body = {"metadata": {"namespace": "n", "uid": uid}, "key": key}
        if step == "put":
            shelf.put(body, listing)
            plain[uid] = (key, listing)
        elif step == "take":
            shelf.take(body)
            plain.pop(uid, None)
        else:
            shelf.take_unlisted("n", listing)
            plain = {uid: (key, listed) for uid, (key, listed) in plain.items() if listed >= listing}
            listing += 1
    expected = {key: sorted(uid + key for uid, (k, _) in plain.items() if k == key) for key in "xyz"}
    return [key for key in "xyz" if sorted(shelf.of(key)) != expected[key]]


def _shelf(make: type[Shelf[str]]) -> Shelf[str]:
    return make(lambda body: body["metadata"]["uid"] + body["key"], lambda body: [body["key"]])


@given(STEPS)
def test_a_shelf_finds_what_a_plain_dictionary_would(steps: list[tuple[str, str, str]]) -> None:
    assert _disagreements(_shelf(Shelf), steps) == []


class _Hoarding(Shelf[str]):
    """A broken shelf, and how kopf's own index behaves: what a listing does not bring stays."""

    def take_unlisted(self, namespace: str | None, listing: int) -> list[str]:
        return []


def test_the_check_above_finds_a_shelf_that_hoards() -> None:
    steps = [("put", "a", "x"), ("relist", "", ""), ("relist", "", "")]
    assert _disagreements(_shelf(_Hoarding), steps) == ["x"]
    assert _disagreements(_shelf(Shelf), steps) == []


def test_what_an_object_means_is_worked_out_once_for_each_of_its_versions() -> None:
    worked: list[str] = []
    meaning = Once(lambda body: worked.append(body["spec"]) or body["spec"], most=2)

    def body(uid: str, version: str, spec: str) -> Object:
        return {"metadata": {"uid": uid, "resourceVersion": version}, "spec": spec}

    assert [meaning(body("a", "1", "one")), meaning(body("a", "1", "one")), meaning(body("a", "2", "two"))] == [
        *("one", "one", "two")
    ]
    assert worked == ["one", "two"]
    assert meaning(body("b", "2", "other")) == "other"
    meaning(body("c", "3", "third"))  # and the least recently asked is forgotten
    meaning(body("a", "2", "two"))
    assert worked == ["one", "two", "other", "third", "two"]
    assert meaning({"metadata": {}, "spec": "unnamed"}) == "unnamed"
