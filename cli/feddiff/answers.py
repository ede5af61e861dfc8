"""How every command answers: text that ends with the command that usually follows, or one JSON document."""

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console

AsJson = Annotated[bool, typer.Option("--json", help="JSON on standard output instead of text.")]


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
