"""Tables and lines, on a console and in a notebook: of words that others wrote, nothing steers terminal or page."""

from collections.abc import Iterable, Sequence
from html import escape

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


# ---- In a notebook ---------------------------------------------------------------------------------------------


def html_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """An HTML table below its title; without columns the first cell of every row is the row's head."""
    head = f"<thead><tr>{''.join(f'<th>{escape(each)}</th>' for each in columns)}</tr></thead>" if columns else ""
    first = "td" if columns else "th"
    body = "".join(
        f"<tr><{first}>{escape(name)}</{first}>{''.join(f'<td>{escape(each)}</td>' for each in cells)}</tr>"
        for name, *cells in rows
    )
    return f"<table><caption>{escape(title)}</caption>{head}<tbody>{body}</tbody></table>"


def html_list(title: str, lines: Sequence[str]) -> str:
    """An HTML list below its title; nothing where there are no lines."""
    items = "".join(f"<li>{escape(each)}</li>" for each in lines)
    return f"<p>{escape(title)}</p><ul>{items}</ul>" if items else ""
