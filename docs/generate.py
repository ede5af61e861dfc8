"""Writes docs/api.md, the reference of the three kinds, from the definitions that the types give, and docs/python.md,
that of `import feddiff`, from signatures, docstrings and the comments beside fields.

`python docs/generate.py`, which `make crds` runs.
"""

import inspect
import json
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import feddiff
from feddiff_protocol.api import DECIMAL_PATTERN, NAME_PATTERN
from feddiff_protocol.crd import definitions
from feddiff_protocol.errors import FeddiffError
from feddiff_protocol.plan import CONDITIONS, Reason
from feddiff_trainer.evaluation import ARMS, GROUPS, MEASURES, REAL

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs/api.md"
PYTHON_PAGE = ROOT / "docs/python.md"
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


# ---- docs/python.md --------------------------------------------------------------------------------------------

PYTHON_INTRODUCTION = """\
# Python

What a notebook needs of the `feddiff` command, with types: plan a job, run it, draw samples, read reports and ledgers.
Written by `make crds` from signatures, docstrings and the comments beside fields; do not edit.
[examples/notebook/digits.ipynb](../examples/notebook/digits.ipynb) is a whole run of two owners, which a test executes.

```python
import feddiff

job = feddiff.load("owners.yaml", "job.yaml")
feddiff.plan(job)  # what it promises and costs; starts nothing
run = feddiff.run(job, "runs/first")  # this spends; the same call goes on after a stop
samples = run.sample("a", images_per_class=4)
run.report()
feddiff.ledger(job.datasets["a"])
```

Every function calls what the [command](cli.md) of its name calls, and one run may go on with either. What the command
refuses is an exception here, a `feddiff.FeddiffError` with the command's words (`--client` in them is the argument
`client`) and its exit code, `exit_code`. [exit-codes.md](exit-codes.md) names the classes of `feddiff_protocol.errors`;
`feddiff.StageFailed` is any other end of a stage. Values are immutable, each a read of one moment. Stages run in
processes of their own; `import feddiff` loads neither torch nor numpy.
"""
FIGURES = """\
## Figures of an owner

`run.report().owners[client].figures[arm][group][measure]`, for the owner alone. Arms: `{arms}`, and `{real}`: the
owner's own records, measured like samples. Groups of classes: `{groups}`.

{table}
"""


def python_page() -> str:
    """The whole of docs/python.md."""
    public = [getattr(feddiff, name) for name in feddiff.__all__]
    functions = sorted(filter(inspect.isfunction, public), key=lambda each: each.__code__.co_firstlineno)
    classes = [each for each in public if inspect.isclass(each) and not issubclass(each, FeddiffError)]
    rows = (f"| `{each.key}` | {each.direction} | {_cell(each.explanation)} |" for each in MEASURES)
    figures = FIGURES.format(
        arms="`, `".join(ARMS),
        real=REAL,
        groups="`, `".join(GROUPS),
        table=_table("| measure | | |", rows),
    )
    parts = ["## Functions", *map(_function, functions), "## Types", *map(_class, classes), figures]
    return "\n\n".join([PYTHON_INTRODUCTION.rstrip("\n"), *parts])


def _function(function: Any) -> str:
    return f"### `feddiff.{function.__name__}`\n\n```python\n{_signature(function)}\n```\n\n{inspect.getdoc(function)}"


def _signature(function: Any) -> str:
    """As it is written, decorators left out."""
    source = textwrap.dedent(inspect.getsource(function))
    (found,) = re.findall(r"^(def .*?):\n(?=    \"\"\"|    return)", source, re.MULTILINE | re.DOTALL)
    return str(found).replace('"Run"', "Run").replace('"Samples"', "Samples")


def _class(kind: type) -> str:
    """Its fields and properties as a table, then its methods."""
    rows = [*_fields(kind), *_properties(kind)]
    parts = [f"### `feddiff.{kind.__name__}`", str(inspect.getdoc(kind))]
    parts += [_table("| field | type | |", iter(rows))] if rows else []
    for name, each in vars(kind).items():
        if inspect.isfunction(each) and not name.startswith("_"):
            parts.append(f"```python\n{_signature(each)}\n```\n\n{inspect.getdoc(each)}")
    return "\n\n".join(parts)


def _fields(kind: type) -> Iterator[str]:
    """A row for every field of a dataclass, with the comment beside it."""
    for line in inspect.getsource(kind).splitlines():
        if found := re.fullmatch(r"    ([a-z]\w*): (.+?)(?: = .+?)?(?:  # (.+))?", line):
            name, written, comment = found.groups("")
            yield _row(name, written, comment)


def _properties(kind: type) -> Iterator[str]:
    for name, each in vars(kind).items():
        if isinstance(each, property):
            assert each.fget is not None
            yield _row(name, _signature(each.fget).split(" -> ")[1], str(inspect.getdoc(each)))


def _row(name: str, written: str, said: str) -> str:
    return f"| `{name}` | `{_cell(written.strip(chr(34)))}` | {_cell(' '.join(said.split()))} |"


if __name__ == "__main__":
    PAGE.write_text(page())
    PYTHON_PAGE.write_text(python_page())
