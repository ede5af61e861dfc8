"""Our three kinds on a real API server: what it takes, what it refuses in which words, and what may change."""

import json
import re
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.documents import (
    DATASET,
    GAUSSIAN,
    MISSING,
    PLURALS,
    PRIVUNIT,
    RELEASE,
    SUMMARY,
    changed,
    fault,
    fuzzed,
    url,
)
from cluster.kubernetes import PROGRAMS, CommandFailed, ControlPlane
from feddiff_protocol.api import GROUP, parse_document
from feddiff_protocol.crd import definitions

ROOT = Path(__file__).parents[2]
# The files of `feddiff experiment` are for one machine alone.
SAMPLES = sorted(path for path in (ROOT / "examples").rglob("*.yaml") if path.parent.name != "experiments")
LIMIT_BYTES = 262_144  # kubectl apply keeps the whole object in an annotation of at most this size


def listed(*documents: dict[str, Any]) -> str:
    """For kubectl's standard input; JSON, since PyYAML leaves "1e-5" without quotes, to Kubernetes a number."""
    return json.dumps({"apiVersion": "v1", "kind": "List", "items": documents})


def paths(value: Any, path: str = "") -> set[str]:
    """The dotted path of each field."""
    if not isinstance(value, dict):
        return set()
    below = {f"{path}.{name}".lstrip("."): part for name, part in value.items()}
    return below.keys() | {each for name, part in below.items() for each in paths(part, name)}


def refusal(answer: tuple[int, Any]) -> str:
    """The API server's words, empty when it took the object."""
    status, body = answer
    assert status in (200, 201, 400, 422), body
    return "" if status < 300 else body["message"]


@pytest.fixture
def namespace(control_plane: ControlPlane) -> str:
    return control_plane.namespace()


# ---- definitions and samples -----------------------------------------------------------------------------------


@pytest.mark.parametrize("plural", sorted(PLURALS.values()))
def test_each_definition_is_small_taken_without_a_warning_and_established(
    control_plane: ControlPlane, plural: str
) -> None:
    file = ROOT / "crds" / f"{plural}.yaml"
    assert file.stat().st_size < LIMIT_BYTES
    control_plane.kubectl("apply", "--warnings-as-errors", "--dry-run=server", "-f", file)
    _, stored = control_plane.request(
        "GET", f"/apis/apiextensions.k8s.io/v1/customresourcedefinitions/{plural}.feddiff.dev"
    )
    conditions = {each["type"]: each["status"] for each in stored["status"]["conditions"]}
    assert conditions["Established"] == "True" and conditions["NamesAccepted"] == "True"
    assert "NonStructuralSchema" not in conditions


@pytest.mark.parametrize("sample", SAMPLES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_every_sample_is_taken_as_it_stands(control_plane: ControlPlane, sample: Path) -> None:
    documents = list(yaml.safe_load_all(sample.read_text()))
    for namespace in {document["metadata"]["namespace"] for document in documents}:
        creation = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": namespace}}
        control_plane.kubectl("apply", "-f", "-", stdin=yaml.safe_dump(creation))
    control_plane.kubectl("apply", "--warnings-as-errors", "--dry-run=server", "-f", sample)


def test_the_sample_of_a_ray_job_fits_kuberays_definition(control_plane: ControlPlane) -> None:
    """Strictly: a field that the definition does not know is refused."""
    file, asked = ROOT / "manifests/samples/ray/rayjob.yaml", ("apply", "--dry-run=server", "--validate=strict", "-f")
    control_plane.kubectl("apply", "--server-side", "-f", PROGRAMS / "rayjobs.yaml")
    deadline = time.monotonic() + 60
    while "rayjobs" not in control_plane.kubectl("api-resources", "--api-group=ray.io"):  # served before it is listed
        assert time.monotonic() < deadline, "the definition was not established"
        time.sleep(0.1)
    namespace = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "research"}}
    control_plane.kubectl("apply", "-f", "-", stdin=yaml.safe_dump(namespace))
    control_plane.kubectl(*asked, file)
    for right, wrong in (("entrypoint:", "entryPoint:"), ('cpu: "8"', "cpu: eight"), ("mountPath:", "path:")):
        assert right in file.read_text()
        with pytest.raises(CommandFailed):
            control_plane.kubectl(*asked, "-", stdin=file.read_text().replace(right, wrong))


def test_what_the_server_stores_is_what_a_local_run_reads(control_plane: ControlPlane, namespace: str) -> None:
    """Defaults are stated twice, in the types and in the definitions made from them: they have to agree."""
    least = {
        "PrivateDataset": {name: DATASET["spec"][name] for name in ("source", "image", "classes", "budget")},
        "FederatedDiffusionJob": {name: GAUSSIAN["spec"][name] for name in ("clients", "privacy")},
    }
    for kind, spec in least.items():
        document = {"apiVersion": "feddiff.dev/v1alpha1", "kind": kind, "metadata": {"name": "x"}, "spec": spec}
        status, stored = control_plane.request("POST", url(document, namespace), document)
        assert status == 201, stored
        local = parse_document(changed(document, "metadata.namespace", namespace), "local")
        assert parse_document(stored, "stored").spec == local.spec
        assert paths(stored["spec"]) == paths(local.spec.to_wire())


def test_explain_reads_well(control_plane: ControlPlane) -> None:
    text = control_plane.kubectl("explain", "fdj.spec.privacy")
    assert "One promise: (epsilon, delta) per unit, by a mechanism that has to be named." in " ".join(text.split())
    for field in ("mechanism", "epsilon", "clipNorm"):
        assert re.search(rf"^  {field}\t<string> -required-$|^  {field}\t<string>.*-required-", text, re.MULTILINE), (
            text
        )
    assert "largest Euclidean norm of an image" in text
    for path in ("pds.spec.budget", "pds.spec.classes", "prl.spec", "fdj.spec.deadlines"):
        assert "DESCRIPTION" in control_plane.kubectl("explain", path)


def test_explain_says_what_the_definition_says_at_every_depth(control_plane: ControlPlane) -> None:
    for short, plural in (("pds", "privatedatasets"), ("prl", "privacyreleases"), ("fdj", "federateddiffusionjobs")):
        schema = definitions()[plural]["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
        assert schema["description"] in one_line(control_plane.kubectl("explain", short))
    for path in (
        "fdj.spec.privacy.epsilon",
        "fdj.spec.clients.dataset.namespace",
        "fdj.status",
        "fdj.status.stages.stopped",
        "pds.spec.store.secretName",
        "pds.status.budget.remaining",
        "prl.status.phase",
    ):
        assert explained(path) in one_line(control_plane.kubectl("explain", path))


def one_line(text: str) -> str:
    """kubectl breaks lines, and says twice in a list what it holds."""
    return " ".join(text.split())


def explained(path: str) -> str:
    """The description at a path as kubectl names it, which steps over the items of a list."""
    short, *names = path.split(".")
    plural = {"pds": "privatedatasets", "prl": "privacyreleases", "fdj": "federateddiffusionjobs"}[short]
    node = definitions()[plural]["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
    for name in names:
        node = node.get("items", node)["properties"][name]
    return str(node["description"])


def test_columns_and_short_names(control_plane: ControlPlane, namespace: str) -> None:
    control_plane.kubectl("apply", "-n", namespace, "-f", "-", stdin=listed(DATASET, GAUSSIAN, RELEASE))
    assert re.search(r"NAME +BUDGET .*\nscans +20 ", control_plane.kubectl("get", "pds", "-n", namespace))
    assert re.search(r"NAME +PHASE +CLIENTS .*\ndigits ", control_plane.kubectl("get", "fdj", "-n", namespace))
    assert re.search(
        r"NAME +CLIENT +JOB .*\ndigits-a +a +digits ", control_plane.kubectl("get", "prl", "-n", namespace)
    )
    assert control_plane.kubectl("get", "feddiff", "-n", namespace, "-o", "name").count("\n") == 3


# ---- what is refused -------------------------------------------------------------------------------------------

REFUSED = [
    (SUMMARY, "spec.privacy.epsilon", "0", "must be > 0.0"),
    (SUMMARY, "spec.privacy.epsilon", "0.000", "must be > 0.0"),
    (SUMMARY, "spec.privacy.epsilon", 10, "must be of type string"),
    (SUMMARY, "spec.privacy.epsilon", "-1", "should match"),
    (SUMMARY, "spec.privacy.epsilon", "Infinity", "should match"),
    (SUMMARY, "spec.privacy.epsilon", "NaN", "should match"),
    (SUMMARY, "spec.privacy.epsilon", "10\n", "should match"),
    (SUMMARY, "spec.privacy.epsilon", MISSING, "spec.privacy.epsilon: Required value"),
    (SUMMARY, "spec.privacy.delta", "0", "a delta above 0 goes with mechanism gaussian or summary"),
    (SUMMARY, "spec.privacy.delta", MISSING, "a delta above 0 goes with mechanism gaussian or summary"),
    (GAUSSIAN, "spec.privacy.delta", MISSING, "a delta above 0 goes with mechanism gaussian or summary"),
    (PRIVUNIT, "spec.privacy.delta", "1e-5", "mechanism privunit goes with delta 0, or none"),
    (PRIVUNIT, "spec.privacy.epsilon", "0.0009", "mechanism privunit goes with an epsilon of 0.001 to 100"),
    (PRIVUNIT, "spec.privacy.epsilon", "101", "mechanism privunit goes with an epsilon of 0.001 to 100"),
    (
        PRIVUNIT,
        "spec.privacy.meanShare",
        "0.5",
        "meanShare, centre, frequencyPower and blockSide go with mechanism summary",
    ),
    (PRIVUNIT, "spec.privacy.pixels", "zeroToOne", "pixels goes with mechanism gaussian"),
    (PRIVUNIT, "spec.diffusion.splitSigma", MISSING, "diffusion.splitSigma goes with summary or privunit"),
    (PRIVUNIT, "spec.diffusion.timeline", "continued", "diffusion.timeline goes with mechanism gaussian"),
    (SUMMARY, "spec.privacy.delta", "1", "must be < 1.0"),
    (SUMMARY, "spec.privacy.delta", "0.99999999999999999999", "should match"),
    (SUMMARY, "spec.privacy.unit", "patient", 'supported values: "image"'),
    (SUMMARY, "spec.privacy.mechanism", MISSING, "spec.privacy.mechanism: Required value"),
    (SUMMARY, "spec.privacy.mechanism", "laplace", 'supported values: "gaussian", "summary", "privunit"'),
    (SUMMARY, "spec.privacy.clipNorm", MISSING, "spec.privacy.clipNorm: Required value"),
    (SUMMARY, "spec.privacy.clipNorm", "0", "must be > 0.0"),
    (SUMMARY, "spec.privacy.momentClipNorm", MISSING, "momentClipNorm goes with mechanism summary"),
    (SUMMARY, "spec.privacy.pixels", "zeroToOne", "pixels goes with mechanism gaussian"),
    (SUMMARY, "spec.privacy.meanShare", "1", "must be < 1.0"),
    (SUMMARY, "spec.privacy.centre", "1.01", "must be <= 1.0"),
    (SUMMARY, "spec.privacy.blockSide", 1, "greater than or equal to 2"),
    (SUMMARY, "spec.personal.releaseSigma", MISSING, "privacy.blockSide goes with personal.releaseSigma"),
    (PRIVUNIT, "spec.privacy.blockSide", 2, "frequencyPower and blockSide go with mechanism summary"),
    (GAUSSIAN, "spec.privacy.momentClipNorm", "2.5", "momentClipNorm goes with mechanism summary"),
    (
        GAUSSIAN,
        "spec.privacy.centre",
        "0.5",
        "meanShare, centre, frequencyPower and blockSide go with mechanism summary",
    ),
    (GAUSSIAN, "spec.privacy.varianceGuess", "0.05", "varianceGuess goes with mechanism summary or privunit"),
    (GAUSSIAN, "spec.diffusion.splitSigma", "0.25", "diffusion.splitSigma goes with summary or privunit"),
    (SUMMARY, "spec.diffusion.splitSigma", MISSING, "diffusion.splitSigma goes with summary or privunit"),
    (SUMMARY, "spec.diffusion.steps", 9, "greater than or equal to 10"),
    (SUMMARY, "spec.clients", [], "at least 1 items"),
    (SUMMARY, "spec.clients", 501 * SUMMARY["spec"]["clients"], "must have at most 1000 items"),
    (SUMMARY, "spec.clients.0.name", "Clinic_A", "should match"),
    (SUMMARY, "spec.clients.0.name", "b", "Duplicate value"),
    (SUMMARY, "spec.quorum", 3, "quorum can be at most the number of clients"),
    (SUMMARY, "spec.quorum", 0, "greater than or equal to 1"),
    (SUMMARY, "spec.diffusion.timeline", "continued", "diffusion.timeline goes with mechanism gaussian"),
    (SUMMARY, "spec.diffusion.betaEnd", "0.00009", "betaEnd must be at least betaStart"),
    (SUMMARY, "spec.shared.batch", 255, "batch must be a multiple of replicas × processesPerReplica"),
    (SUMMARY, "spec.shared.accumulation", 3, "batch must be a multiple of replicas × processesPerReplica"),
    (SUMMARY, "spec.personal.accumulation", 3, "batch must be a multiple of accumulation"),
    (GAUSSIAN, "spec.shared.denoiser", "closedForm", "closedForm goes with mechanism summary"),
    (GAUSSIAN, "spec.personal.releaseSigma", "0.25", "personal.releaseSigma goes with mechanism summary"),
    (SUMMARY, "spec.shared.replicas", 1025, "less than or equal to 1024"),
    (SUMMARY, "spec.shared.images", 1.5, "must be of type integer"),
    (SUMMARY, "spec.cleanPodPolicy", "Some", "supported values"),
    (SUMMARY, "spec.backoffLimit", -1, "greater than or equal to 0"),
    (SUMMARY, "spec.store.uri", "http://federation", "should match"),
    (SUMMARY, "spec.deadlines.releaseSeconds", 0, "greater than or equal to 1"),
    (SUMMARY, "spec.deadlines.reservationSeconds", 0, "greater than or equal to 1"),
    (SUMMARY, "spec.seed", 1, 'unknown field "spec.seed"'),
    (SUMMARY, "spec.privacy.Epsilon", "1", 'unknown field "spec.privacy.Epsilon"'),
    (SUMMARY, "metadata.name", "digits.2", "metadata.name"),
    (SUMMARY, "metadata.name", 64 * "a", "metadata.name"),
    (DATASET, "spec.budget.epsilon", "0", "must be > 0.0"),
    (DATASET, "spec.budget.delta", "1e0", "must be < 1.0"),
    (DATASET, "spec.budget.pureEpsilon", "21", "pureEpsilon can be at most epsilon"),
    (DATASET, "spec.budget", MISSING, "spec.budget: Required value"),
    (DATASET, "spec.access.0.maxEpsilon", "0", "must be > 0.0"),
    (DATASET, "spec.access", 65 * DATASET["spec"]["access"], "must have at most 64 items"),
    (DATASET, "spec.classes.records", [30], "records needs one number for each class"),
    (DATASET, "spec.classes.records.0", -1, "greater than or equal to 0"),
    (DATASET, "spec.source.format", "tfrecord", "supported values"),
    (DATASET, "spec.source.labelsPath", "labels", "labelsPath and holdoutLabelsPath go with format idx or folder"),
    (DATASET, "spec.source.format", "idx", "format idx needs labelsPath"),
    (DATASET, "spec.source.holdoutLabelsPath", "a", "labelsPath and holdoutLabelsPath go with format idx or folder"),
    (
        DATASET,
        "spec.source",
        {"format": "idx", "path": "a", "labelsPath": "b", "holdoutPath": "c"},
        "holdoutLabelsPath goes with holdoutPath where labelsPath goes with path",
    ),
    (DATASET, "spec.source.inceptionPath", "a", "inceptionPath goes with holdoutPath"),
    (DATASET, "spec.source.inceptionSha256", "0" * 64, "inceptionSha256 goes with inceptionPath"),
    (DATASET, "spec.classes.names", ["healthy"], "names needs one name for each class"),
    (DATASET, "spec.classes.names", ["healthy", "healthy"], "Duplicate value"),
    (DATASET, "spec.classes.records", [1, 0], "records needs at least 2 records in all"),
    (DATASET, "spec.source.path", "", "at least 1 chars"),
    (DATASET, "spec.image.channels", 5, "less than or equal to 4"),
    (RELEASE, "spec.epsilon", "0", "must be > 0.0"),
    (RELEASE, "spec.delta", "1", "must be < 1.0"),
    (RELEASE, "spec.charge", MISSING, "spec.charge: Required value"),
]
RULE_WORDS = re.compile(r"^must be [<>]|goes? with|can be at most|needs one number")


@pytest.mark.parametrize(
    ("document", "path", "value", "words"),
    REFUSED,
    ids=[f"{document['kind']} {path} {str(value)[:20]!r}" for document, path, value, _ in REFUSED],
)
def test_a_bad_document_is_refused_in_words(
    control_plane: ControlPlane, namespace: str, document: dict[str, Any], path: str, value: Any, words: str
) -> None:
    query = "dryRun=All&fieldValidation=Strict"
    assert refusal(control_plane.request("POST", url(document, namespace, query=query), document)) == ""
    answer = control_plane.request("POST", url(document, namespace, query=query), changed(document, path, value))
    assert words in refusal(answer)


# ---- what may change afterwards --------------------------------------------------------------------------------

UPDATES = [
    (SUMMARY, "spec.privacy.epsilon", "9", "privacy cannot change"),
    (SUMMARY, "spec.privacy.epsilon", "1e1", "privacy cannot change"),
    (SUMMARY, "spec.privacy.meanShare", MISSING, "privacy cannot change"),
    (SUMMARY, "spec.clients.0.dataset.name", "others", "clients cannot change"),
    (SUMMARY, "spec.clients", SUMMARY["spec"]["clients"][:1], "clients cannot change"),
    (SUMMARY, "spec.clients", SUMMARY["spec"]["clients"][::-1], "clients cannot change"),
    (SUMMARY, "spec.diffusion.splitSigma", "0.5", "diffusion cannot change"),
    (SUMMARY, "spec.suspend", True, ""),
    (SUMMARY, "spec.deadlines.releaseSeconds", 60, ""),
    (SUMMARY, "spec.deadlines.reservationSeconds", 60, ""),
    (SUMMARY, "spec.deadlines", MISSING, ""),
    (SUMMARY, "spec.shared.resources.limits", {"cpu": "1"}, "shared.resources can change only while suspend is true"),
    (SUMMARY | {"spec": SUMMARY["spec"] | {"suspend": True}}, "spec.shared.resources.limits", {"cpu": "1"}, ""),
    (SUMMARY, "spec.store.uri", "s3://elsewhere", "store cannot change"),
    (SUMMARY, "spec.store", MISSING, "store cannot change"),
    (SUMMARY, "spec.managedBy", "kueue.x-k8s.io/multikueue", "managedBy cannot change"),
    (SUMMARY, "spec.ttlSecondsAfterFinished", 60, ""),
    (SUMMARY, "spec.backoffLimit", 9, ""),
    (DATASET, "spec.budget.epsilon", "19.999", "epsilon may be raised, never lowered"),
    (DATASET, "spec.budget.epsilon", "20.001", ""),
    (DATASET, "spec.budget.delta", "1e-6", "delta and unit cannot change"),
    (DATASET, "spec.budget.delta", "1e-4", "delta and unit cannot change"),
    (DATASET, "spec.budget.pureEpsilon", "1", "pureEpsilon cannot change"),
    (DATASET, "spec.access", [], ""),
    (RELEASE, "spec.epsilon", "9", "an entry of the ledger cannot change"),
    (RELEASE, "spec.charge.muSquared", "0", "an entry of the ledger cannot change"),
    (RELEASE, "spec.client", "b", "an entry of the ledger cannot change"),
]


@pytest.mark.parametrize(
    ("document", "path", "value", "words"),
    UPDATES,
    ids=[f"{document['kind']} {path} {str(value)[:20]!r}" for document, path, value, _ in UPDATES],
)
def test_what_carries_the_promise_stays_and_the_rest_may_change(
    control_plane: ControlPlane, namespace: str, document: dict[str, Any], path: str, value: Any, words: str
) -> None:
    status, stored = control_plane.request("POST", url(document, namespace), document)
    assert status == 201, stored
    place = url(document, namespace, document["metadata"]["name"])
    assert refusal(control_plane.request("PUT", place, stored)) == ""
    answer = refusal(control_plane.request("PUT", place, changed(stored, path, value)))
    assert words in answer and bool(words) == bool(answer)


@pytest.mark.parametrize("document", [DATASET, SUMMARY, RELEASE], ids=lambda document: document["kind"])
def test_spec_and_status_are_written_apart(
    control_plane: ControlPlane, namespace: str, document: dict[str, Any]
) -> None:
    place = url(document, namespace, document["metadata"]["name"])
    status = {"budget": {"spent": "5"}} if document is DATASET else {"phase": "Failed"}
    answer, stored = control_plane.request("POST", url(document, namespace), document | {"status": status})
    assert answer == 201 and "status" not in stored
    answer, written = control_plane.request("PUT", f"{place}/status", stored | {"status": status, "spec": {}})
    assert answer == 200 and written["status"] == status and written["spec"] == stored["spec"]
    answer, _ = control_plane.request("PUT", f"{place}/status", stored | {"status": {}})
    assert answer == 409  # the compare-and-swap on which a budget rests


def test_clients_cannot_be_added_taken_away_or_put_in_order_by_server_side_apply(
    control_plane: ControlPlane, namespace: str
) -> None:
    """It merges a list with keys, from several managers: what comes out has to be what was there."""

    def applied(manager: str, clients: list[Any]) -> tuple[int, Any]:
        query = f"fieldManager={manager}&force=true"
        body = changed(SUMMARY, "spec.clients", clients)
        return control_plane.request("PATCH", url(SUMMARY, namespace, "digits", query), body, content=APPLY)

    clients = SUMMARY["spec"]["clients"]
    assert applied("one", clients)[0] == 201
    assert refusal(applied("one", clients)) == ""
    for manager, other in (
        ("one", clients[:1]),
        ("one", clients[::-1]),
        ("two", [{"name": "c", "dataset": {"namespace": "clinic-c", "name": "scans"}}]),
        ("two", [{"name": "a", "dataset": {"namespace": "clinic-c", "name": "scans"}}]),
    ):
        assert "clients cannot change" in refusal(applied(manager, other)), other


APPLY = "application/apply-patch+yaml"


# ---- documents that nobody wrote -------------------------------------------------------------------------------

NUM_FUZZED = 1200
# The server stores these; the operator ends the job, or marks the dataset not ready, with our types' own words.
STORED_THOUGH_FAULTY = (
    "clients: expected each dataset once",  # a rule over pairs of 1,000 clients costs more than the server allows
)


def offered(control_plane: ControlPlane, namespace: str, count: int, group: str = GROUP) -> list[tuple[str, str, str]]:
    """Of each fuzzed document: what a local run says, what the server says, what our types say of what it stored."""

    def outcome(document: dict[str, Any]) -> tuple[str, str, str]:
        sent = document | {"apiVersion": f"{group}/v1alpha1"}
        answer = control_plane.request("POST", url(sent, namespace, query="dryRun=All&fieldValidation=Ignore"), sent)
        refused = refusal(answer)
        stored = "" if refused else fault(answer[1] | {"apiVersion": document["apiVersion"]})
        return fault(document), refused, stored

    with ThreadPoolExecutor(4) as threads:
        return list(threads.map(outcome, fuzzed(count)))


def unexpected(outcomes: list[tuple[str, str, str]]) -> list[str]:
    """Faults that only our types find, beyond the listed ones; what only a local run takes; what only the server does,
    but for unknown fields, which it is asked here to leave out."""
    unlisted = [words for _, _, words in outcomes if words and not any(each in words for each in STORED_THOUGH_FAULTY)]
    local_alone = [words for local, words, _ in outcomes if words and not local]
    server_alone = [local for local, words, stored in outcomes if local and not words and not stored]
    return unlisted + local_alone + [words for words in server_alone if "unknown field" not in words]


def test_a_document_that_nobody_wrote_is_refused_or_understood(control_plane: ControlPlane, namespace: str) -> None:
    outcomes = offered(control_plane, namespace, NUM_FUZZED)
    num_refused = sum(1 for _, refused, _ in outcomes if refused)
    faulty = Counter(re.sub(r" = .*|, found .*", "", words) for _, _, words in outcomes if words)
    print(f"{NUM_FUZZED} documents: {num_refused} refused; {faulty.total()} stored though faulty:")
    print("\n".join(f"{count:4} {words}" for words, count in faulty.most_common()))
    assert NUM_FUZZED / 4 < num_refused < NUM_FUZZED * 0.9
    assert unexpected(outcomes) == []


# Of each type one, where no rule reads it: rules cannot read 5.0, which kubectl would have sent as 5.
TYPED = [
    (DATASET, "spec.image.channels"),
    (SUMMARY, "spec.backoffLimit"),
    (SUMMARY, "spec.deadlines.releaseSeconds"),
    (SUMMARY, "spec.suspend"),
    (SUMMARY, "spec.personal.clipMix"),
    (SUMMARY, "spec.privacy.epsilon"),
    (SUMMARY, "spec.clients.0.name"),
    (SUMMARY, "spec.cleanPodPolicy"),
]
WRITTEN: list[Any] = [1, 1.0, 1.5, "1", "1.0", True, "true", "yes", False, 0, None, "", [1], {}, 2**63, 10**30]


def differing(control_plane: ControlPlane, namespace: str, local: Callable[[Any], str]) -> list[tuple[str, Any]]:
    """Where the server takes a value and `local`, which says why not, refuses it, or the other way round."""
    query = "dryRun=All&fieldValidation=Strict"
    found = []
    for document, path in TYPED:
        for value in WRITTEN:
            written = changed(document, path, value)
            refused = refusal(control_plane.request("POST", url(written, namespace, query=query), written))
            if bool(refused) != bool(local(written)):
                found.append((path, value))
    return found


def test_a_value_of_another_type_is_taken_by_both_or_by_neither(control_plane: ControlPlane, namespace: str) -> None:
    assert differing(control_plane, namespace, fault) == []


def test_types_that_read_numbers_in_quotes_would_be_noticed(control_plane: ControlPlane, namespace: str) -> None:
    def lenient(document: Any) -> str:
        return fault(json.loads(re.sub(r'"backoffLimit": "(\d+)"', r'"backoffLimit": \1', json.dumps(document))))

    assert differing(control_plane, namespace, lenient) == [("spec.backoffLimit", "1")]


def without_rules(schema: Any) -> Any:
    if isinstance(schema, dict):
        return {name: without_rules(part) for name, part in schema.items() if name != "x-kubernetes-validations"}
    return [without_rules(part) for part in schema] if isinstance(schema, list) else schema


@pytest.fixture(scope="module")
def lax(control_plane: ControlPlane) -> str:
    """A group with our kinds and none of their rules."""
    group = "lax.feddiff.dev"
    for plural, definition in definitions().items():
        mutant = without_rules(definition) | {"metadata": {"name": f"{plural}.{group}"}}
        mutant["spec"] |= {"group": group}
        control_plane.kubectl("apply", "-f", "-", stdin=json.dumps(mutant))
        established = ("--for=condition=Established", "--timeout=30s")
        control_plane.kubectl("wait", *established, f"crd/{plural}.{group}")
    return group


def test_it_is_the_rules_that_refuse(control_plane: ControlPlane, namespace: str, lax: str) -> None:
    """Both procedures above see when the rules are gone."""
    by_rule = [(document, path, value) for document, path, value, words in REFUSED if RULE_WORDS.search(words)]
    assert len(by_rule) > 15
    for document, path, value in by_rule:
        bad = changed(document, path, value) | {"apiVersion": f"{lax}/v1alpha1"}
        assert refusal(control_plane.request("POST", url(bad, namespace, query="dryRun=All"), bad)) == ""
    assert unexpected(offered(control_plane, namespace, 300, lax))
