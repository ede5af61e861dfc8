"""Tables and lines on a console: of words that others wrote, nothing steers the terminal."""

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table


def print_table(console: Console, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table on a terminal, aligned plain lines elsewhere; nothing where there are no rows."""
    if not rows:
        return
    cells = [[printable(cell) for cell in row] for row in rows]
    if console.is_terminal:
        table = Table(*columns)
        for row in cells:
            table.add_row(*(cell.replace("[", "\\[") for cell in row))
        console.print(table)
        return
    lines = [list(columns), *cells]
    widths = [max(len(line[index]) for line in lines) for index in range(len(columns))]
    for line in lines:
        say(console, "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def say(console: Console, line: str) -> None:
    console.print(printable(line), markup=False, highlight=False, soft_wrap=True)


def printable(text: str) -> str:
    """Without characters that could steer a terminal: other people wrote some of these words."""
    return "".join(character if character.isprintable() else " " for character in text)
