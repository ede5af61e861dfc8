"""Writes docs/api.md, the reference of the three kinds, from the definitions that the types give.

`python docs/generate.py`, which `make crds` runs.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from feddiff_protocol.api import DECIMAL_PATTERN, NAME_PATTERN
from feddiff_protocol.crd import definitions
from feddiff_protocol.plan import CONDITIONS, Reason

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs/api.md"
RULES = "x-kubernetes-validations"

Schema = dict[str, Any]

INTRODUCTION = """\
# API reference

Group `feddiff.dev`, version `v1alpha1`. Written by `make crds` from the types in
[protocol/feddiff_protocol/api.py](../protocol/feddiff_protocol/api.py); do not edit. On a cluster,
`kubectl explain fdj.spec` says the same; `feddiff run` reads the same documents.

Types: a *decimal* is a number in quotes, like "10", "0.25" or "1e-5", so that no digit is lost on its way; a *name* is
at most 63 of a-z, 0-9 and -, with a letter or digit at both ends. Text is at most as long as its number says. A field
that is `null` counts as left out. *May change* is about objects that exist; a value that a rule fixes is refused with
the rule's message.
"""
SAMPLES = {
    "PrivateDataset": "manifests/samples/owner.yaml",
    "FederatedDiffusionJob": "manifests/samples/job.yaml",
}
# What a rule on a whole object, or on its neighbours, says about one field.
CHANGES = {
    "PrivateDataset": {
        "spec.budget.epsilon": "raised only",
        "spec.budget.delta": "no",
        "spec.budget.unit": "no",
        "spec.budget.pureEpsilon": "no",
    },
    "FederatedDiffusionJob": {"spec.shared.resources": "while suspended"},
}


def page() -> str:
    """The whole of docs/api.md."""
    return "\n".join([INTRODUCTION, *(_kind(definition) for definition in definitions().values()), _reasons()])


def _kind(definition: Schema) -> str:
    names, (version,) = definition["spec"]["names"], definition["spec"]["versions"]
    kind, short, schema = names["kind"], names["shortNames"][0], version["schema"]["openAPIV3Schema"]
    columns = ", ".join(f"{each['name']} (`{each['jsonPath'][1:]}`)" for each in version["additionalPrinterColumns"])
    parts = [
        f"## {kind}",
        schema["description"],
        f"`kubectl get {short}` shows {columns}.",
        "### Fields",
        _table("| field | type | default | may change | |", _field_rows(kind, schema["properties"]["spec"])),
        "### Rules",
        "Checked by the API server (CEL), beside the bounds above; a local run refuses the same documents.",
        "\n".join(_rule_lines(schema["properties"]["spec"], "spec")),
        "### Status",
        schema["properties"]["status"]["description"],
        _table("| field | type | |", _status_rows(schema["properties"]["status"], "status")),
    ]
    if kind in SAMPLES:
        sample = SAMPLES[kind]
        parts += ["### Example", f"From [{sample}](../{sample}):", f"```yaml\n{_example(kind)}```"]
    return "\n\n".join(parts) + "\n"


def _table(head: str, rows: Iterator[str]) -> str:
    return "\n".join([head, re.sub(r"[^|]+", "---", head), *rows])


def _field_rows(kind: str, schema: Schema, path: str = "spec", fixed: bool = False) -> Iterator[str]:
    fixed = fixed or _is_fixed(schema)
    for name, part in schema.get("properties", {}).items():
        place = f"{path}.{name}"
        change = "no" if fixed or _is_fixed(part) else CHANGES.get(kind, {}).get(place, "yes")
        default = "**needed**" if name in schema.get("required", ()) else _default(part)
        yield f"| `{place}` | {_type(part)} | {default} | {change} | {_cell(part['description'])} |"
        below = f"{place}[]" if "items" in part else place
        yield from _field_rows(kind, part.get("items", part), below, fixed or _is_fixed(part))


def _is_fixed(schema: Schema) -> bool:
    return any(each["rule"] == "self == oldSelf" for each in schema.get(RULES, ()))


def _default(schema: Schema) -> str:
    if "default" not in schema or schema["type"] == "object":
        return ""
    return f"`{json.dumps(schema['default'])}`"


def _type(schema: Schema) -> str:
    if "enum" in schema:
        return " or ".join(f"`{value}`" for value in schema["enum"])
    if schema["type"] == "array":
        most = f"at most {schema['maxItems']:,}: " if "maxItems" in schema else ""
        return f"list of {most}{_type(schema['items'])}"
    if schema["type"] == "integer":
        bounds = [f"{schema[name]:,}" for name in ("minimum", "maximum") if name in schema]
        return f"integer, {' to '.join(bounds)}" if bounds else "integer"
    return _text_type(schema) if schema["type"] == "string" else str(schema["type"])


def _text_type(schema: Schema) -> str:
    pattern = schema.get("pattern", "")
    if pattern == DECIMAL_PATTERN:
        bounds = [each["message"].removeprefix("must be ") for each in schema.get(RULES, ())]
        return (
            " and ".join(f"decimal {bound}" if not index else bound for index, bound in enumerate(bounds)) or "decimal"
        )
    if pattern == NAME_PATTERN:
        return "name"
    shape = f" like `{_cell(pattern)}`" if pattern else ""
    return f"text{shape}, at most {schema['maxLength']}" if "maxLength" in schema else f"text{shape}"


def _rule_lines(schema: Schema, path: str) -> Iterator[str]:
    """Rules between fields; those on one decimal are its bounds, in the table."""
    for rule in schema.get(RULES, ()) if schema["type"] != "string" else ():
        yield f"- `{path}`: {rule['message']}: `{rule['rule']}`"
    if schema.get("x-kubernetes-list-type") == "map":
        yield f"- `{path}`: no two entries have the same {', '.join(schema['x-kubernetes-list-map-keys'])}"
    for name, part in schema.get("properties", {}).items():
        yield from _rule_lines(part, f"{path}.{name}")
    if "items" in schema:
        yield from _rule_lines(schema["items"], f"{path}[]")


def _status_rows(schema: Schema, path: str) -> Iterator[str]:
    for name, part in schema.get("properties", {}).items():
        place = f"{path}.{name}"
        yield f"| `{place}` | {_type(part)} | {_cell(part['description'])} |"
        yield from _status_rows(part.get("items", part), f"{place}[]" if "items" in part else place)


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _example(kind: str) -> str:
    """The sample's document of this kind, as it is written there."""
    documents = re.split(r"^---\n", (ROOT / SAMPLES[kind]).read_text(), flags=re.MULTILINE)
    (found,) = [each for each in documents if f"\nkind: {kind}\n" in each]
    return found


def _reasons() -> str:
    reasons = ", ".join(f"[{reason}](runbooks/{reason}.md)" for reason in Reason)
    conditions = ", ".join(f"`{each}`" for each in CONDITIONS)
    return f"""\
## Conditions and reasons of a job

Every condition is there from the first look: {conditions} and `Failed`. One that is true has its own name as reason;
one that is false says what the job is at, or what it died of. The reasons are a closed list, each with a page that says
what to do: {reasons}. [state-table.md](state-table.md) says which event leads to which.
"""


if __name__ == "__main__":
    PAGE.write_text(page())
