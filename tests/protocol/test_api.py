"""What a document may say: faults come back as SpecInvalid with path, expectation and finding, and nothing else."""

import copy
import datetime
import json
import math
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.documents import DATASET, MISSING, PRIVUNIT, SUMMARY, changed
from cluster.kubernetes import ControlPlane
from feddiff_protocol.api import DeadlinesSpec, FederatedDiffusionJob, PrivateDataset, parse_document
from feddiff_protocol.errors import SpecInvalid
from feddiff_protocol.stages import Stage

JOB = SUMMARY


def test_valid_documents_keep_every_number() -> None:
    job = parse_document(JOB, "job.yaml")
    assert isinstance(job, FederatedDiffusionJob)
    assert job.spec.privacy.delta == Decimal("1e-5")
    again = parse_document(json.loads(json.dumps(job.to_wire())), "again")
    assert again == job
    dataset = parse_document(DATASET, "owners.yaml")
    assert isinstance(dataset, PrivateDataset)
    assert parse_document(dataset.to_wire(), "again") == dataset


@pytest.mark.parametrize(
    ("document", "path", "value", "words"),
    [
        (JOB, "spec.privacy.epsilon", 10, "expected a decimal number in quotes"),
        (JOB, "spec.privacy.epsilon", "ten", "expected a decimal number like"),
        (JOB, "spec.privacy.epsilon", "0", "greater than 0"),
        (JOB, "spec.privacy.epsilon", "NaN", "expected a decimal number like"),
        (JOB, "spec.privacy.epsilon", MISSING, "spec.privacy.epsilon: expected a value, found none; add it"),
        (JOB, "spec.privacy.mechanism", MISSING, "spec.privacy.mechanism: expected a value"),
        (JOB, "spec.privacy.epsilom", "10", "spec.privacy.epsilom: unknown field"),
        (JOB, "spec.privacy.delta", "1", "less than 1"),
        (JOB, "spec.privacy.delta", MISSING, 'delta: mechanism summary needs one above 0, found none; "1e-5" is usual'),
        (JOB, "spec.privacy.delta", "0", "delta: mechanism summary needs one above 0, found 0"),
        (PRIVUNIT, "spec.privacy.delta", "1e-5", "delta: mechanism privunit promises pure ε, so δ is 0, found 0.00001"),
        (PRIVUNIT, "spec.privacy.epsilon", "0.0009", "epsilon: expected 0.001 to 100 with mechanism privunit"),
        (PRIVUNIT, "spec.privacy.epsilon", "100.001", "epsilon: expected 0.001 to 100 with mechanism privunit"),
        (PRIVUNIT, "spec.privacy.meanShare", "0.5", "meanShare: belongs to mechanism summary, found privunit"),
        (PRIVUNIT, "spec.privacy.pixels", "zeroToOne", "pixels: belongs to mechanism gaussian, found privunit"),
        (PRIVUNIT, "spec.diffusion.splitSigma", MISSING, "splitSigma: mechanism privunit needs it"),
        (PRIVUNIT, "spec.diffusion.timeline", "continued", "timeline: belongs to mechanism gaussian, found privunit"),
        (JOB, "spec.privacy.momentClipNorm", MISSING, "momentClipNorm: mechanism summary needs it"),
        (JOB, "spec.privacy.pixels", "zeroToOne", "pixels: belongs to mechanism gaussian"),
        (JOB, "spec.diffusion.splitSigma", MISSING, "splitSigma: mechanism summary needs it"),
        (JOB, "spec.personal.releaseSigma", MISSING, "releaseSigma: privacy.blockSide needs it, none was given"),
        (PRIVUNIT, "spec.privacy.blockSide", 2, "blockSide: belongs to mechanism summary, found privunit"),
        (JOB, "spec.clients", [JOB["spec"]["clients"][0]] * 2, "distinct names, found a twice"),
        (JOB, "spec.quorum", 3, "quorum: expected at most the number of clients, 2, found 3"),
        (JOB, "spec.shared.batch", 255, "multiple of replicas × processesPerReplica × accumulation = 2, found 255"),
        (JOB, "spec.shared.accumulation", 3, "replicas × processesPerReplica × accumulation = 6, found 256"),
        (JOB, "spec.personal.accumulation", 3, "batch: expected a multiple of accumulation = 3, found 256"),
        (JOB, "kind", "Job", "expected apiVersion feddiff.dev/v1alpha1 and kind"),
        (JOB, "metadata.name", "Digits!", "metadata.name"),
        (DATASET, "spec.classes.records", [30], "records: expected one number for each of 2 classes, found 1"),
        (DATASET, "spec.classes.names", ["x"], "names: expected one for each of 2 classes"),
        (
            DATASET,
            "spec.classes.names",
            ["x", "x"],
            "names: expected a name of its own for each class, found 'x' twice",
        ),
        (DATASET, "spec.budget.pureEpsilon", "21", "pureEpsilon: expected at most epsilon = 20, found 21"),
        (DATASET, "spec.source.labelsPath", "labels", "labelsPath: belongs to format idx or folder, found format npz"),
        (DATASET, "spec.source.holdoutLabelsPath", "labels", "labelsPath: belongs to format idx or folder"),
        (
            DATASET,
            "spec.source",
            {"format": "folder", "path": "a", "labelsPath": "b", "holdoutPath": "c"},
            "holdoutLabelsPath: expected labels for both or neither, found a file of labels for path alone",
        ),
        (DATASET, "spec.source.format", "idx", "labelsPath: format idx keeps labels"),
        (DATASET, "spec.source.inceptionPath", "a", "inceptionPath: FID compares with the records at holdoutPath"),
        (DATASET, "spec.source.inceptionSha256", "0" * 64, "inceptionSha256: belongs to inceptionPath, none was named"),
        (DATASET, "spec.source.inceptionSha256", "0" * 40, "inceptionSha256: string should match pattern"),
    ],
)
def test_a_fault_is_named_with_what_to_do(document: dict[str, Any], path: str, value: Any, words: str) -> None:
    with pytest.raises(SpecInvalid) as error:
        parse_document(changed(document, path, value), "job.yaml")
    assert "job.yaml" in str(error.value)
    assert words in str(error.value)


@pytest.mark.parametrize("delta", [None, "0", "0.000"])
def test_pure_epsilon_says_nothing_of_delta_or_zero(delta: str | None) -> None:
    document = changed(PRIVUNIT, "spec.privacy.delta", delta) if delta else PRIVUNIT
    job = parse_document(document, "job.yaml")
    assert isinstance(job, FederatedDiffusionJob)
    assert job.spec.privacy.delta_or_zero == 0
    assert parse_document(job.to_wire(), "again") == job


def test_every_fault_is_reported_at_once() -> None:
    broken = changed(changed(JOB, "spec.privacy.epsilon", 10), "spec.shared.images", 0)
    with pytest.raises(SpecInvalid) as error:
        parse_document(broken, "job.yaml")
    assert len(str(error.value).splitlines()) == 2


def test_one_dataset_may_serve_one_client_only() -> None:
    twice = [{"name": name, "dataset": {"namespace": "clinic-a", "name": "scans"}} for name in "ab"]
    with pytest.raises(SpecInvalid, match="each dataset once"):
        parse_document(changed(JOB, "spec.clients", twice), "job.yaml")


def test_a_stages_own_deadlines_come_before_those_of_all_stages() -> None:
    limits = {"startSeconds": 60, "stageSeconds": 600, "trainShared": {"stageSeconds": 86400}}
    job = parse_document(changed(JOB, "spec.deadlines", limits), "job.yaml")
    assert isinstance(job, FederatedDiffusionJob)
    shared, sample = job.spec.deadlines.of("train-shared"), job.spec.deadlines.of("sample")
    assert (shared.start_seconds, shared.stage_seconds) == (60, 86400)
    assert (sample.start_seconds, sample.stage_seconds) == (60, 600)
    assert FederatedDiffusionJob.model_validate(JOB).spec.deadlines.of("report").stage_seconds is None


def test_every_stage_has_deadlines() -> None:
    for stage in Stage:
        assert stage.replace("-", "_") in DeadlinesSpec.model_fields


# ---- What a real API server lets change --------------------------------------------------------------------------

STORED = changed(changed(JOB, "spec.store", {"uri": "s3://federation/jobs"}), "spec.shared.resources",
                 {"limits": {"cpu": "1"}})  # fmt: skip
MORE = {"limits": {"cpu": "2"}}
JOBS = "/apis/feddiff.dev/v1alpha1/namespaces/{}/federateddiffusionjobs"


def edited(control_plane: ControlPlane, patch: dict[str, Any]) -> tuple[int, str]:
    """Status and words of the API server for a merge patch of a stored job's spec."""
    path = JOBS.format(control_plane.namespace())
    document = {**STORED, "metadata": {"name": "digits"}}
    assert control_plane.request("POST", path, document)[0] == 201
    status, answer = control_plane.request(
        "PATCH", f"{path}/digits", {"spec": patch}, content="application/merge-patch+json"
    )
    return status, answer.get("message", "")


@pytest.mark.parametrize(
    "patch",
    [
        {"suspend": True},
        {"deadlines": {"stageSeconds": 5, "trainShared": {"startSeconds": 3}}},
        {"ttlSecondsAfterFinished": 5},
        {"suspend": True, "shared": {"resources": MORE}},
        {"backoffLimit": 7, "cleanPodPolicy": "All"},
    ],
)
def test_suspend_deadlines_ttl_and_resources_while_suspended_can_change(
    control_plane: ControlPlane, patch: dict[str, Any]
) -> None:
    assert edited(control_plane, patch)[0] == 200


@pytest.mark.parametrize(
    ("patch", "words"),
    [
        ({"shared": {"resources": MORE}}, "shared.resources can change only while suspend is true"),
        ({"shared": {"resources": None}}, "shared.resources can change only while suspend is true"),
        ({"privacy": {"epsilon": "11"}}, "privacy cannot change"),
        ({"clients": []}, "clients"),
        ({"diffusion": {"splitSigma": "0.5"}}, "diffusion cannot change"),
        ({"store": {"uri": "s3://elsewhere"}}, "store cannot change"),
        ({"store": None}, "store cannot change"),
        ({"managedBy": "example.com/other"}, "managedBy cannot change"),
        ({"deadlines": {"trainShared": {"startSeconds": 0}}}, "startSeconds"),
    ],
)
def test_what_others_rely_on_cannot(control_plane: ControlPlane, patch: dict[str, Any], words: str) -> None:
    status, message = edited(control_plane, patch)
    assert (status, words in message) == (422, True), message


# ---- Fuzzing -----------------------------------------------------------------------------------------------------

TEXTS = st.one_of(
    st.text(max_size=12),
    st.sampled_from(
        [
            "",
            "0",
            "-1",
            "1e-99",
            "9e99",
            "NaN",
            "Infinity",
            "1e5",
            "٣",
            "10",
            "summary",
            "gaussian",
            "privunit",
            "x" * 2000,
        ]
    ),
)
SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), TEXTS, st.binary(max_size=4), st.dates(), st.just(10**400)
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.one_of(TEXTS, st.integers(), st.none()), inner, max_size=3)
    ),
    max_leaves=6,
)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    found = [path]
    if isinstance(value, dict):
        for key, inner in value.items():
            found += places(inner, (*path, key))
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            found += places(inner, (*path, index))
    return found


@st.composite
def mutated(draw: st.DrawFn) -> Any:
    """A valid document in which up to three places are replaced, removed, or given another field."""
    document = copy.deepcopy(draw(st.sampled_from([DATASET, JOB, PRIVUNIT])))
    for _ in range(draw(st.integers(1, 3))):
        path = draw(st.sampled_from(places(document)))
        if not path:
            return draw(VALUES)
        place = document
        for part in path[:-1]:
            place = place[part]
        match draw(st.sampled_from(["replace", "remove", "add"])):
            case "replace":
                place[path[-1]] = draw(VALUES)
            case "remove":
                del place[path[-1]]
            case "add" if isinstance(place, dict):
                place[draw(st.one_of(TEXTS, st.integers(), st.none()))] = draw(VALUES)
    return document


@settings(max_examples=500, deadline=None)
@given(mutated())
def test_a_mutated_document_is_valid_or_spec_invalid_and_nothing_else(document: Any) -> None:
    try:
        parsed = parse_document(document, "fuzzed")
    except SpecInvalid as error:
        assert str(error).startswith("fuzzed")
        assert len(str(error)) > len("fuzzed: ")
    else:
        assert parse_document(parsed.to_wire(), "again") == parsed


@pytest.mark.parametrize("value", [math.inf, math.nan, {1: 2}, datetime.date(2026, 11, 29)])
def test_an_overlay_holds_what_json_can_hold(value: Any) -> None:
    with pytest.raises(SpecInvalid, match=r"podTemplate: .*expected what JSON can hold, found .*quote keys and dates"):
        parse_document(changed(JOB, "spec.shared.podTemplate", {"spec": value}), "x")


# ---- numbers, flags and null as the API server reads them ------------------------------------------------------


@pytest.mark.parametrize("value", [5, 5.0, 1e1])
def test_a_whole_number_is_a_number_without_a_fraction(value: float) -> None:
    job = parse_document(changed(JOB, "spec.sampling.imagesPerClass", value), "x")
    assert isinstance(job, FederatedDiffusionJob)
    images = job.spec.sampling.images_per_class
    assert images == value and type(images) is int


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        ("spec.quorum", "1", "spec.quorum: expected a whole number, found '1'"),
        ("spec.quorum", True, "spec.quorum: expected a whole number, found True"),
        ("spec.quorum", 1.5, "spec.quorum: expected a whole number, found 1.5"),
        ("spec.quorum", float("nan"), "spec.quorum: expected a whole number, found nan"),
        ("spec.quorum", float("inf"), "spec.quorum: expected a whole number, found inf"),
        ("spec.suspend", "true", "spec.suspend: expected true or false, found 'true'"),
        ("spec.suspend", 1, "spec.suspend: expected true or false, found 1"),
        ("spec.personal", {"clipMix": "no"}, "spec.personal.clipMix: expected true or false, found 'no'"),
        ("spec.clients.0.name", 5, "spec.clients.0.name: input should be a valid string, found 5"),
        ("spec.clients.0", None, "spec.clients"),
    ],
)
def test_what_only_looks_like_a_number_or_a_flag_is_refused(path: str, value: Any, words: str) -> None:
    spec = copy.deepcopy(JOB)
    spec["spec"] |= {"personal": {}, "suspend": False}
    with pytest.raises(SpecInvalid) as caught:
        parse_document(nulled(spec, path) if value is None else changed(spec, path, value), "x")
    assert words in str(caught.value)


def nulled(document: dict[str, Any], path: str) -> dict[str, Any]:
    """A copy with null at a dotted path."""
    result = copy.deepcopy(document)
    *parents, last = path.split(".")
    place: Any = result
    for name in parents:
        place = place[int(name)] if isinstance(place, list) else place[name]
    place[int(last) if isinstance(place, list) else last] = None
    return result


def test_null_is_left_out_and_what_is_needed_is_missing() -> None:
    assert parse_document(nulled(JOB, "spec.sampling"), "x") == parse_document(changed(JOB, "spec.sampling", {}), "x")
    with pytest.raises(SpecInvalid, match=r"spec\.privacy\.epsilon: expected a value, found none"):
        parse_document(nulled(JOB, "spec.privacy.epsilon"), "x")
    with pytest.raises(SpecInvalid, match=r"spec\.seed: unknown field"):
        parse_document(nulled(JOB, "spec.seed"), "x")
