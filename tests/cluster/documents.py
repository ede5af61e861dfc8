"""Documents of our kinds: good ones, and ones that nobody wrote, made from them by chance and from the schema."""

import copy
import itertools
import random
from collections.abc import Iterator, Sequence
from typing import Any

from feddiff_protocol.api import parse_document
from feddiff_protocol.crd import definitions
from feddiff_protocol.errors import SpecInvalid

MISSING = object()

DATASET: dict[str, Any] = {
    "apiVersion": "feddiff.dev/v1alpha1",
    "kind": "PrivateDataset",
    "metadata": {"name": "scans"},
    "spec": {
        "source": {"format": "npz", "path": "train.npz", "volumeClaim": "scans"},
        "image": {"channels": 1, "height": 8, "width": 8},
        "classes": {"count": 2, "records": [30, 40], "names": ["healthy", "ill"]},
        "budget": {"epsilon": "20", "delta": "1e-5", "unit": "image", "pureEpsilon": "0"},
        "access": [{"namespace": "research", "maxEpsilon": "10"}],
        "images": ["sha256:" + 64 * "0"],
        "store": {"uri": "s3://clinic-a/feddiff", "secretName": "clinic-a-store"},
        "federation": {"uri": "s3://federation/jobs", "secretName": "federation-clinic-a"},
        "podTemplate": {"spec": {"nodeSelector": {"pool": "private"}}},
    },
}
SUMMARY: dict[str, Any] = {
    "apiVersion": "feddiff.dev/v1alpha1",
    "kind": "FederatedDiffusionJob",
    "metadata": {"name": "digits"},
    "spec": {
        "clients": [{"name": name, "dataset": {"namespace": f"clinic-{name}", "name": "scans"}} for name in "ab"],
        "quorum": 1,
        "privacy": {
            "mechanism": "summary",
            "epsilon": "10",
            "delta": "1e-5",
            "clipNorm": "4.25",
            "momentClipNorm": "2.5",
            "meanShare": "0.5",
            "centre": "0.5",
            "blockSide": 2,
            "varianceGuess": "0.05",
        },
        "diffusion": {"steps": 1000, "betaStart": "1e-4", "betaEnd": "0.02", "splitSigma": "0.25"},
        "network": {"baseWidth": 16},
        "shared": {"images": 100000, "batch": 256, "replicas": 2, "resources": {"limits": {"nvidia.com/gpu": 1}}},
        "personal": {"images": 100000, "batch": 256, "releaseSigma": "0.25"},
        "sampling": {"imagesPerClass": 100, "steps": 20},
        "store": {"uri": "s3://federation/jobs", "secretName": "federation-trainer"},
        "deadlines": {"releaseSeconds": 600},
        "backoffLimit": 3,
        "ttlSecondsAfterFinished": 600,
    },
}
GAUSSIAN: dict[str, Any] = copy.deepcopy(SUMMARY)
GAUSSIAN["spec"] |= {
    "privacy": {"mechanism": "gaussian", "epsilon": "10", "delta": "1e-5", "clipNorm": "4.25", "pixels": "zeroToOne"},
    "diffusion": {"timeline": "restarted"},
    "personal": {"images": 100000, "batch": 256},
}
PRIVUNIT: dict[str, Any] = copy.deepcopy(SUMMARY)
PRIVUNIT["spec"]["privacy"] = {"mechanism": "privunit", "epsilon": "2", "clipNorm": "4.25", "varianceGuess": "0.05"}
RELEASE: dict[str, Any] = {
    "apiVersion": "feddiff.dev/v1alpha1",
    "kind": "PrivacyRelease",
    "metadata": {"name": "digits-a"},
    "spec": {
        "dataset": {"name": "scans", "uid": "d-1"},
        "job": {"namespace": "research", "name": "digits", "uid": "j-1"},
        "client": "a",
        "mechanism": "summary",
        "unit": "image",
        "epsilon": "10",
        "delta": "1e-5",
        "charge": {"muSquared": "1.25"},
        "reservedAt": "2026-01-01T00:00:00Z",
    },
}
PLURALS = {
    "PrivateDataset": "privatedatasets",
    "PrivacyRelease": "privacyreleases",
    "FederatedDiffusionJob": "federateddiffusionjobs",
}


def changed(document: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    """A copy with `value` at a dotted path, which is made where it is missing; MISSING removes what is there."""
    result = copy.deepcopy(document)
    *parents, last = path.split(".")
    place: Any = result
    for name in parents:
        place = place[int(name)] if isinstance(place, list) else place.setdefault(name, {})
    if value is MISSING:
        del place[last]
    else:
        place[int(last) if isinstance(place, list) else last] = value
    return result


def url(document: dict[str, Any], namespace: str, name: str = "", query: str = "") -> str:
    group, version = document["apiVersion"].split("/")
    place = f"/apis/{group}/{version}/namespaces/{namespace}/{PLURALS[document['kind']]}"
    return place + (f"/{name}" if name else "") + (f"?{query}" if query else "")


# ---- documents that nobody wrote -------------------------------------------------------------------------------

DECIMALS = ["0", "1", "0.5", "1e-5", "20", "1e2", "1E9", "1e99", "1e-99", "999999999999", "0e0", "+1", "-1", ".5", "1.",
            "", " 1", "1 ", "NaN", "inf", "0x1", "１０", "1_000", "1,5"]  # fmt: skip
TEXTS = [
    "",
    "a",
    "-a",
    "a-",
    "A",
    "a.b",
    "ä",
    "a" * 63,
    "a" * 64,
    "x" * 5000,
    "../x",
    "a\nb",
    "s3://b",
    "file:///x",
    "null",
    "💥" * 16,
    "a\u202eb",
    "a\u0000b",
    "s3://b/💥\u202e\u0000",
]
OVERLAYS: list[Any] = [
    {"spec": {"containers": "x"}},
    {"spec": {"containers": [{"name": "stage"}, {"name": "another"}]}},
    {"spec": {"containers": [{"image": "busybox"}]}},
    {"spec": {"containers": [{"resources": {"limits": {"cpu": "lots"}}}]}},
    {"spec": {"containers": [{"resources": {"limits": {"cpu": "1"}, "requests": {"cpu": "2"}}}]}},
    {"spec": {"containers": [{"env": [{"name": "=", "value": "x"}]}]}},
    {"spec": {"containers": [{"volumeMounts": [{"name": "nowhere", "mountPath": "/x"}]}]}},
    {"spec": {"nodeSelector": {"a b": "c"}}},
    {"spec": {"nodeSelector": "x"}},
    {"spec": {"tolerations": [{"operator": "Nope"}]}},
    {"spec": {"volumes": [{"name": "x", "hostPath": {"path": "/"}}]}},
    {"spec": {"volumes": [{"name": "x"}] * 2}},
    {"spec": {"serviceAccountName": "../x"}},
    {"spec": {"hostNetwork": True}},
    {"spec": {"terminationGracePeriodSeconds": -5}},
    {"spec": {"securityContext": {"runAsUser": "root"}}},
    {"spec": {"affinity": {"nodeAffinity": []}}},
    {"metadata": {"labels": {"feddiff.dev/job-uid": "forged"}}},
    {"metadata": {"labels": {"💥": "x"}}},
    {"metadata": {"annotations": {"a": "x" * 300_000}}},
    {"metadata": {"name": "mine"}},
    {"limits": {"cpu": "lots"}},
    {"limits": {"nvidia.com/gpu": -1}},
    {"limits": {"cpu": "1"}, "requests": {"cpu": "2"}},
    {"limits": [[[[[[]]]]]], "claims": "x"},
]
ANYTHING: list[Any] = [None, True, 0, -1, 1.5, 2**31, 2**63 - 1, "1", "", [], [1], {}, {"a": 1}]


def values_for(schema: dict[str, Any], random: random.Random) -> Any:
    """A value that `schema` may or may not allow: mostly near its bounds, sometimes of another type."""
    if random.random() < 0.15:
        return random.choice(ANYTHING)
    if "enum" in schema:
        return random.choice([*schema["enum"], *TEXTS])
    if "x-kubernetes-preserve-unknown-fields" in schema:
        return random.choice(OVERLAYS)
    if schema["type"] == "integer":
        bounds = [schema.get("minimum", 0), schema.get("maximum", 2**31)]
        return random.choice([bound + step for bound in bounds for step in (-1, 0, 1)] + [7, 12])
    if schema["type"] == "string":
        return random.choice(DECIMALS if schema.get("maxLength") == 36 else TEXTS)
    return random.choice(ANYTHING)


def nodes(schema: dict[str, Any], value: Any, path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each place below `path` that the schema knows, whether `value` has something there or not."""
    for name, part in schema.get("properties", {}).items():
        yield f"{path}.{name}", part
        yield from nodes(part, value.get(name, {}) if isinstance(value, dict) else {}, f"{path}.{name}")
    if "items" in schema and isinstance(value, list):
        for index, part in enumerate(value[:2]):
            yield f"{path}.{index}", schema["items"]
            yield from nodes(schema["items"], part, f"{path}.{index}")


def mutated(document: dict[str, Any], places: list[tuple[str, dict[str, Any]]], random: random.Random) -> Any:
    for path, schema in random.choices(places, k=random.choice([1, 1, 2, 3])):
        kind = random.random()
        try:
            if kind < 0.1:
                document = changed(document, path, MISSING)
            elif kind < 0.15:
                document = changed(document, f"{path}.madeUp", 1)
            elif kind < 0.2 and schema["type"] == "array":
                document = changed(document, path, 2 * copy.deepcopy(SUMMARY["spec"]["clients"]))
            else:
                document = changed(document, path, values_for(schema, random))
        except (KeyError, TypeError, ValueError, AttributeError, IndexError):
            continue  # an earlier mutation took the place away
    return document


def fuzzed(
    count: int, documents: Sequence[dict[str, Any]] = (DATASET, SUMMARY, GAUSSIAN, PRIVUNIT)
) -> Iterator[dict[str, Any]]:
    """So many documents, made from these by one to three changes each; always the same."""
    random_numbers = random.Random(20260101)
    places = {}
    for document in documents:
        schema = definitions()[PLURALS[document["kind"]]]["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
        found = list(nodes(schema["properties"]["spec"], document["spec"], "spec"))
        places[id(document)] = [*found, ("metadata.name", {"type": "string"}), ("spec", {"type": "object"})]
    for document in itertools.islice(itertools.cycle(documents), count):
        yield mutated(document, places[id(document)], random_numbers)


def fault(document: Any) -> str:
    """Why our own types refuse `document`: the first line, empty if they take it."""
    try:
        parse_document(document, "x")
    except SpecInvalid as error:
        return str(error).splitlines()[0]
    return ""
