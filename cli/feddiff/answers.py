"""What every command asks and how it answers: text that ends with the command that usually follows, or one JSON
document."""

import shlex
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from .documents import Documents

AsJson = Annotated[bool, typer.Option("--json", help="JSON on standard output instead of text.")]
RunDir = Annotated[Path, typer.Argument(metavar="DIR", help="The folder of a run.")]


def read_documents(files: Sequence[Path]) -> "Documents":
    """What the files hold; what of it is for a cluster alone is named, in one line."""
    from .documents import load_documents

    documents = load_documents(files)
    if documents.passed_over:
        kinds = ", ".join(f"{count} {kind}" for kind, count in Counter(documents.passed_over).items())
        print(f"feddiff: passed over, since only a cluster needs it: {kinds}", file=sys.stderr)
    return documents


def print_json(document: Any) -> None:
    """The document on one line."""
    import json

    print(json.dumps(document, ensure_ascii=False))


def console() -> "Console":
    """Standard output, wide enough for tables where it is no terminal."""
    from rich.console import Console

    found = Console()
    return found if found.is_terminal else Console(width=160)


def say_next(command: str) -> None:
    print(f"\nnext: {command}")


def quoted(path: Path) -> str:
    return shlex.quote(str(path))
