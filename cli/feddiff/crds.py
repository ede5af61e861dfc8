"""Writes the CustomResourceDefinitions: `python -m feddiff.crds FOLDER`."""

import sys
from pathlib import Path

import yaml

from feddiff_protocol.crd import definitions


def write_definitions(folder: Path) -> None:
    """One YAML file per kind in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    for plural, definition in definitions().items():
        header = "# Generated from protocol/feddiff_protocol/api.py by `make crds`; do not edit.\n"
        (folder / f"{plural}.yaml").write_text(header + yaml.safe_dump(definition, sort_keys=False, allow_unicode=True))


if __name__ == "__main__":
    write_definitions(Path(sys.argv[1]))
