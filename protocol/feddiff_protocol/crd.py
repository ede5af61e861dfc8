"""CustomResourceDefinitions made from the API types: structural schemas with CEL rules, columns and short names."""

import copy
from collections.abc import Mapping
from typing import Any

from .api import API_VERSION, GROUP, NAME_PATTERN, VERSION, FederatedDiffusionJob, PrivacyRelease, PrivateDataset, Wire
from .status_schema import status_schema

Schema = dict[str, Any]

_COLUMNS: Mapping[str, tuple[tuple[str, str, str], ...]] = {
    "PrivateDataset": (
        ("Budget", "string", ".spec.budget.epsilon"),
        ("Spent", "string", ".status.budget.spent"),
        ("Remaining", "string", ".status.budget.remaining"),
        ("Unit", "string", ".spec.budget.unit"),
        ("Delta", "string", ".spec.budget.delta"),
        ("Age", "date", ".metadata.creationTimestamp"),
    ),
    "PrivacyRelease": (
        ("Client", "string", ".spec.client"),
        ("Job", "string", ".spec.job.name"),
        ("Mechanism", "string", ".spec.mechanism"),
        ("Epsilon", "string", ".spec.epsilon"),
        ("Unit", "string", ".spec.unit"),
        ("Phase", "string", ".status.phase"),
        ("Age", "date", ".metadata.creationTimestamp"),
    ),
    "FederatedDiffusionJob": (
        ("Phase", "string", ".status.phase"),
        ("Clients", "string", ".status.clientsSummary"),
        ("Progress", "string", ".status.progress"),
        ("ETA", "string", ".status.eta"),
        ("Epsilon", "string", ".spec.privacy.epsilon"),
        ("Trainer", "string", ".status.trainer"),
        ("Age", "date", ".metadata.creationTimestamp"),
    ),
}
_NAMES = {
    "PrivateDataset": ("privatedatasets", "pds"),
    "PrivacyRelease": ("privacyreleases", "prl"),
    "FederatedDiffusionJob": ("federateddiffusionjobs", "fdj"),
}
_NAME_DESCRIPTION = "at most 63 of a-z, 0-9 and -, a letter or digit first and last, since it becomes a label"
_KINDS: tuple[type[Wire], ...] = (PrivateDataset, PrivacyRelease, FederatedDiffusionJob)


def definitions() -> dict[str, Schema]:
    """Each kind's CustomResourceDefinition by the name of its plural, ready to be written as YAML."""
    return {_NAMES[kind.__name__][0]: _definition(kind) for kind in _KINDS}


def _definition(kind: type[Wire]) -> Schema:
    plural, short = _NAMES[kind.__name__]
    version = {
        "name": VERSION,
        "served": True,
        "storage": True,
        "subresources": {"status": {}},
        "additionalPrinterColumns": [
            {"name": name, "type": kind_of_column, "jsonPath": path}
            for name, kind_of_column, path in _COLUMNS[kind.__name__]
        ],
        "schema": {"openAPIV3Schema": _object_schema(kind)},
    }
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": f"{plural}.{GROUP}"},
        "spec": {
            "group": GROUP,
            "scope": "Namespaced",
            "names": {
                "kind": kind.__name__,
                "plural": plural,
                "singular": kind.__name__.lower(),
                "shortNames": [short],
                "categories": ["feddiff"],
            },
            "versions": [version],
        },
    }


def _object_schema(kind: type[Wire]) -> Schema:
    schema = kind.model_json_schema(by_alias=True, mode="validation")
    # The server's own rule for names is looser than that for labels, into which the name of a job goes.
    name = {"type": "string", "pattern": NAME_PATTERN, "maxLength": 63, "description": _NAME_DESCRIPTION}
    metadata = {"type": "object", "properties": {"name": name}}  # the server describes the rest itself
    return {
        "type": "object",
        "description": _one_line(kind.__doc__ or ""),
        "required": ["spec"],
        "properties": {
            "apiVersion": {"type": "string", "description": f"always {API_VERSION}"},
            "kind": {"type": "string", "description": f"always {kind.__name__}"},
            "metadata": metadata,
            "spec": _structural(schema["properties"]["spec"], schema.get("$defs", {})),
            "status": status_schema(kind.__name__),
        },
    }


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _structural(schema: Schema, definitions: Mapping[str, Schema]) -> Schema:
    """`schema` without references, unions and titles, as Kubernetes' structural schemas demand."""
    schema = _resolved(schema, definitions)
    result: Schema = {key: copy.copy(schema[key]) for key in _KEPT if key in schema}  # YAML names what is shared
    if "description" in result:
        result["description"] = _one_line(result["description"])
    rules = list(schema.get("x-kubernetes-validations", []))
    if "const" in schema:
        result["enum"] = [schema["const"]]
    if "properties" in schema:
        result["properties"] = {
            name: _structural(_with_default(part, name in schema.get("required", [])), definitions)
            for name, part in schema["properties"].items()
        }
    elif result.get("type") == "object":
        result["x-kubernetes-preserve-unknown-fields"] = True
    if isinstance(result.get("default"), dict):  # whole, since the server checks rules on it as it stands
        inner = {
            name: copy.deepcopy(part["default"])
            for name, part in result.get("properties", {}).items()
            if "default" in part
        }
        result["default"] = inner | {key: value for key, value in result["default"].items() if value is not None}
    if "items" in schema:
        result["items"] = _structural(schema["items"], definitions)
    if result.get("type") == "array":
        result.setdefault("x-kubernetes-list-type", "atomic")
    if rules:
        result["x-kubernetes-validations"] = rules
    return result


def _with_default(schema: Schema, required: bool) -> Schema:
    """`schema` of a property; one that may be left out without being null is an object that its own defaults fill."""
    return schema if required or "default" in schema else {**schema, "default": {}}


_KEPT = ("type", "description", "default", "enum", "pattern", "minLength", "maxLength", "minItems", "maxItems",
         "minimum", "maximum", "required", "x-kubernetes-list-type", "x-kubernetes-list-map-keys")  # fmt: skip


def _resolved(schema: Schema, definitions: Mapping[str, Schema]) -> Schema:
    """`schema` with its reference followed and `null` taken out of its union; what stands beside a reference
    (a default, a description, more rules) is kept."""
    if "anyOf" in schema:
        (real,) = [part for part in schema["anyOf"] if part.get("type") != "null"]
        beside = {key: value for key, value in schema.items() if key not in ("anyOf", "default")}
        return _resolved({**real, **beside}, definitions)
    if "$ref" in schema:
        target = definitions[schema["$ref"].rpartition("/")[2]]
        rules = [*target.get("x-kubernetes-validations", []), *schema.get("x-kubernetes-validations", [])]
        beside = {key: value for key, value in schema.items() if key not in ("$ref", "x-kubernetes-validations")}
        merged = {**_resolved(target, definitions), **beside}
        return {**merged, "x-kubernetes-validations": rules} if rules else merged
    return schema
