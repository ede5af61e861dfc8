"""The CustomResourceDefinitions say what the types say, in the dialect that an API server accepts."""

import copy
import re
from collections.abc import Iterator
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


# ---- descriptions ----------------------------------------------------------------------------------------------

PLURALS = ["privatedatasets", "privacyreleases", "federateddiffusionjobs"]


def undescribed(schema: dict[str, Any]) -> list[str]:
    """Properties without a description, or with one that only repeats their name; `metadata` is the server's own."""
    return [
        path
        for path, name, part in _properties(schema)
        if path != ".metadata" and not set(_words(part.get("description", ""))) - {*_words(name), "the", "a", "of"}
    ]


def _properties(schema: dict[str, Any], path: str = "") -> Iterator[tuple[str, str, dict[str, Any]]]:
    for name, part in schema.get("properties", {}).items():
        yield f"{path}.{name}", name, part
        yield from _properties(part, f"{path}.{name}")
    if "items" in schema:
        yield from _properties(schema["items"], f"{path}[]")


def _words(text: str) -> list[str]:
    """ "secretName of it" → secret, name, of, it."""
    return re.findall(r"\w+", re.sub(r"([a-z])([A-Z])", r"\1 \2", text).lower())


@pytest.mark.parametrize("plural", PLURALS)
def test_every_field_at_every_depth_says_what_it_is(plural: str) -> None:
    schema = _schema(plural)
    assert len(schema["description"]) > 40 and len(list(_properties(schema))) > 20
    assert undescribed(schema) == []


@pytest.mark.parametrize("words", ["", "secretName", "The secret name.", "Name of the secret"])
def test_a_field_that_says_nothing_is_noticed(words: str) -> None:
    schema = copy.deepcopy(_schema("privatedatasets"))
    schema["properties"]["spec"]["properties"]["store"]["properties"]["secretName"]["description"] = words
    assert undescribed(schema) == [".spec.store.secretName"]


@pytest.mark.parametrize("plural", PLURALS)
def test_what_cannot_change_says_so(plural: str) -> None:
    fixed = [node for _, node in _nodes(_schema(plural)) if "self == oldSelf" in str(node.get(RULES))]
    assert [node["description"] for node in fixed if not re.search("cannot change|can change|never", _said(node))] == []


RULES = "x-kubernetes-validations"


def _said(node: dict[str, Any]) -> str:
    return str(node["description"]).lower()


def test_clients_are_a_list_of_distinct_names_in_a_fixed_order() -> None:
    clients = dict(_nodes(_schema("federateddiffusionjobs")))[".spec.clients"]
    assert (clients["x-kubernetes-list-type"], clients["x-kubernetes-list-map-keys"]) == ("map", ["name"])
    rules = _rules("federateddiffusionjobs", ".spec.clients")
    assert rules == ["self == oldSelf", "self.map(each, each.name) == oldSelf.map(each, each.name)"]


@pytest.mark.parametrize("plural", PLURALS)
def test_a_status_is_described_and_not_checked(plural: str) -> None:
    """What a newer operator writes, or what somebody broke, has to be stored as it is."""
    for path, node in _nodes(_schema(plural)["properties"]["status"]):
        assert not node.keys() & {"required", "enum", "pattern", "maximum", "minimum", "maxItems", RULES}, path
        assert node["type"] != "object" or node["x-kubernetes-preserve-unknown-fields"], path
