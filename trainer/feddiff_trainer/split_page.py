"""Who holds what after a split, as a page that stands alone: one circle per client and class, its area the records."""

import math
from collections.abc import Sequence

from .pages import Banner, Html, Page, element, joined, paragraph, render, section

CELL = 16.0  # between two circles' centres
LEFT, TOP = 120.0, 20.0
LONGEST_NAME = 16  # characters of a class's name in front of its row
TICKS, MOST_TICKS = (1, 5, 10, 50, 100), 15  # clients from one number to the next

BANNER = Banner(
    "shareable",
    "May be shared.",
    "Shows numbers of records alone, which every dataset declares.",
)


def split_page(
    clients: Sequence[str], names: Sequence[str], counts: Sequence[Sequence[int]], num_holdout: int, num_records: int
) -> bytes:
    """The page as UTF-8 HTML. counts: records of each class, for each client; names: of the classes, or none."""
    sizes = [sum(of_client) for of_client in counts]
    num_classes = len(counts[0])
    page = Page(
        title=f"{len(clients)} clients, {num_classes} classes",
        eyebrow="feddiff · split",
        banner=BANNER,
        lead=joined("Who holds what. No record is with two clients."),
        facts=[
            ("records", f"{num_records:,}"),
            ("with clients", f"{sum(sizes):,}"),
            ("held out for all", f"{num_holdout:,}"),
            ("smallest client", f"{min(sizes):,}"),
            ("largest client", f"{max(sizes):,}"),
        ],
        sections=[
            section(
                "Records of each class",
                paragraph("One column per client, one row per class; a circle's area is the number of records."),
                element(
                    "div", chart(clients, names, counts), cls="scroll", role="region", tabindex=0, aria_label="Chart"
                ),
            )
        ],
        footer="Written by feddiff split.",
    )
    return render(page)


def chart(clients: Sequence[str], names: Sequence[str], counts: Sequence[Sequence[int]]) -> Html:
    """An SVG of circles; each says its number where a pointer rests on it."""
    num_classes, largest = len(counts[0]), max(max(of_client) for of_client in counts)
    titles = [names[k] if names else f"class {k}" for k in range(num_classes)]
    width, height = LEFT + CELL * len(clients), TOP + CELL * num_classes + CELL
    parts = [
        element("text", _shortened(title), x=f"{LEFT - CELL:g}", y=f"{_y(k) + 4:g}", text_anchor="end")
        for k, title in enumerate(titles)
    ]
    step = next(step for step in TICKS if len(clients) <= step * MOST_TICKS)
    parts += [
        element("text", str(i), x=f"{_x(i):g}", y="12", text_anchor="middle") for i in range(0, len(clients), step)
    ]
    for i, (client, of_client) in enumerate(zip(clients, counts, strict=True)):
        for k, count in enumerate(of_client):
            if count:
                radius = f"{CELL / 2 * math.sqrt(count / largest):.2f}"
                label = element("title", f"{client}, {titles[k]}: {count:,} records")
                parts.append(element("circle", label, cx=f"{_x(i):g}", cy=f"{_y(k):g}", r=radius))
    return element(
        "svg",
        element("title", f"Records of {num_classes} classes with {len(clients)} clients"),
        *parts,
        viewBox=f"0 0 {width:g} {height:g}",
        width=f"{width:g}",
        height=f"{height:g}",
        role="img",
        cls="holdings",
    )


def _x(client: int) -> float:
    return LEFT + CELL * client


def _y(label: int) -> float:
    return TOP + CELL * (label + 0.5)


def _shortened(name: str) -> str:
    return name if len(name) <= LONGEST_NAME else f"{name[: LONGEST_NAME - 1]}…"
