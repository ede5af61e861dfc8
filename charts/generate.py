"""Writes what follows from the chart: the table of values in its README, and manifests/install.yaml.

`python charts/generate.py [HELM]`; HELM is the program to render with, `helm` unless said otherwise.
"""

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[1]
CHART = ROOT / "charts/feddiff"
README = CHART / "README.md"
INSTALL = ROOT / "manifests/install.yaml"
NAMESPACE = {
    "apiVersion": "v1",
    "kind": "Namespace",
    "metadata": {"name": "feddiff-system", "labels": {"pod-security.kubernetes.io/enforce": "restricted"}},
}
_MARK = "<!-- values: written by charts/generate.py from the comments in values.yaml -->"


def readme(current: str, values: str) -> str:
    """The README `current` with the table of `values` below its mark."""
    head, found, _ = current.partition(_MARK)
    if not found:
        raise ValueError(f"README.md: expected the line {_MARK}")
    return f"{head}{_MARK}\n\n| value | default | |\n|---|---|---|\n" + "".join(_rows(values))


def _rows(values: str) -> Iterator[str]:
    defaults = yaml.safe_load(values)
    for path, comment in _described(values):
        default: Any = defaults
        for key in path:
            default = default[key]
        shown = yaml.safe_dump(default, default_flow_style=True, width=10_000).removesuffix("...\n").strip()
        yield f"| `{'.'.join(path)}` | `{shown}` | {comment} |\n"


def _described(values: str) -> Iterator[tuple[tuple[str, ...], str]]:
    """Path and comment of every key that has one directly above it."""
    path: list[str] = []
    comment = ""
    for line in values.splitlines():
        if match := re.match(r"( *)([A-Za-z]+):", line):
            path[len(match[1]) // 2 :] = [match[2]]
            if comment:
                yield tuple(path), comment
        comment = line.strip().removeprefix("#").strip() if line.strip().startswith("#") else ""


def install_manifest(helm: str) -> str:
    """The chart with its default values as one file for `kubectl apply`, its namespace first; no hooks."""
    command = [helm, "template", "feddiff", str(CHART), "--namespace", "feddiff-system", "--no-hooks"]
    chart = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    header = "# The chart with its default values, rendered by `make manifests`; do not edit.\n"
    return header + yaml.safe_dump(NAMESPACE, sort_keys=False) + chart


if __name__ == "__main__":
    README.write_text(readme(README.read_text(), (CHART / "values.yaml").read_text()))
    INSTALL.write_text(install_manifest(*sys.argv[1:2] or ["helm"]))
