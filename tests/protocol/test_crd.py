"""The CustomResourceDefinitions say what the types say, in the dialect that an API server accepts."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from feddiff_protocol.crd import definitions

LIMIT_BYTES = 262_144  # kubectl apply keeps the whole object in an annotation of at most this size
CRDS = Path(__file__).parents[2] / "crds"
FORBIDDEN = {"$ref", "anyOf", "oneOf", "allOf", "title", "$defs", "const", "exclusiveMinimum", "exclusiveMaximum"}


def _nodes(schema: Any, path: str = "") -> list[tuple[str, dict[str, Any]]]:
    found = [(path, schema)]
    for name, part in schema.get("properties", {}).items():
        found += _nodes(part, f"{path}.{name}")
    if "items" in schema:
        found += _nodes(schema["items"], f"{path}[]")
    return found


def _schema(plural: str) -> dict[str, Any]:
    return definitions()[plural]["spec"]["versions"][0]["schema"]["openAPIV3Schema"]


def _rules(plural: str, path: str) -> list[str]:
    node = dict(_nodes(_schema(plural)))[path]
    return [rule["rule"] for rule in node.get("x-kubernetes-validations", [])]


@pytest.mark.parametrize("plural", ["privatedatasets", "privacyreleases", "federateddiffusionjobs"])
def test_the_committed_file_is_what_the_types_generate(plural: str) -> None:
    text = (CRDS / f"{plural}.yaml").read_text()
    assert yaml.safe_load(text) == definitions()[plural], "run `make crds`"
    assert len(text.encode()) < LIMIT_BYTES


@pytest.mark.parametrize("plural", ["privatedatasets", "privacyreleases", "federateddiffusionjobs"])
def test_every_schema_is_structural_and_every_string_and_list_is_bounded(plural: str) -> None:
    for path, node in _nodes(_schema(plural)["properties"]["spec"]):
        assert not FORBIDDEN & node.keys(), path
        assert "type" in node, path
        if node["type"] == "string":
            assert "enum" in node or "maxLength" in node, path
        if node["type"] == "array":
            assert "maxItems" in node, path


def test_bounds_of_decimal_strings_become_rules() -> None:
    assert _rules("privatedatasets", ".spec.budget.epsilon") == ["double(self) > 0.0"]
    assert _rules("privatedatasets", ".spec.budget.delta") == ["double(self) > 0.0", "double(self) < 1.0"]


def test_what_carries_the_promise_cannot_change_after_creation() -> None:
    assert "self == oldSelf" in _rules("federateddiffusionjobs", ".spec.privacy")
    assert "self == oldSelf" in _rules("federateddiffusionjobs", ".spec.clients")
    assert "self == oldSelf" in _rules("federateddiffusionjobs", ".spec.diffusion")
    assert "self == oldSelf" in _rules("privacyreleases", ".spec")
    assert "double(self.epsilon) >= double(oldSelf.epsilon)" in _rules("privatedatasets", ".spec.budget")


def test_the_mechanism_has_no_default() -> None:
    privacy = dict(_nodes(_schema("federateddiffusionjobs")))[".spec.privacy"]
    assert "mechanism" in privacy["required"] and "default" not in privacy["properties"]["mechanism"]


@pytest.mark.parametrize("plural", ["privatedatasets", "privacyreleases", "federateddiffusionjobs"])
def test_the_committed_file_has_no_aliases(plural: str) -> None:
    """Not every reader of manifests follows them."""
    assert not [
        event for event in yaml.parse((CRDS / f"{plural}.yaml").read_text()) if isinstance(event, yaml.AliasEvent)
    ]


@pytest.mark.parametrize("plural", ["privatedatasets", "privacyreleases", "federateddiffusionjobs"])
def test_the_default_of_an_object_holds_the_defaults_of_its_fields(plural: str) -> None:
    """The server checks an object's rules on its default as it stands, before the fields' own defaults come in."""
    for path, node in _nodes(_schema(plural)["properties"]["spec"]):
        if "default" in node and node["type"] == "object":
            fields = {name: part["default"] for name, part in node.get("properties", {}).items() if "default" in part}
            assert node["default"] == fields, path


def test_what_may_be_left_out_of_a_type_may_be_left_out_of_a_manifest() -> None:
    spec = dict(_nodes(_schema("federateddiffusionjobs")))[".spec"]
    assert spec["required"] == ["clients", "privacy"]
    assert spec["properties"]["shared"]["default"]["batch"] == 256
    assert "default" not in spec["properties"]["store"]


def test_a_name_fits_into_a_label() -> None:
    name = dict(_nodes(_schema("federateddiffusionjobs")))[".metadata.name"]
    assert name["maxLength"] == 63 and "." not in name["pattern"]
