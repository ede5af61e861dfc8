"""Pages that stand alone: HTML with its style inside, no script, nothing loaded from elsewhere.

Markup is built from elements, and whatever is not already markup is escaped on the way in, so no name of a
client or class can become a tag.
"""

import html
from collections.abc import Collection, Sequence
from dataclasses import dataclass

CONTENT_SECURITY_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
VOID_ELEMENTS = frozenset({"img", "meta", "link", "br"})


class Html(str):
    """Text that is markup. Any other text is escaped when it becomes a child or an attribute."""

    __slots__ = ()


def element(tag: str, *children: str, cls: str = "", **attributes: str | int) -> Html:
    """<tag class=cls …>children</tag>; underscores in attribute names become hyphens."""
    given = ({"class": cls} if cls else {}) | {name.replace("_", "-"): value for name, value in attributes.items()}
    opening = "".join(f' {name}="{html.escape(str(value), quote=True)}"' for name, value in given.items())
    if tag in VOID_ELEMENTS:
        return Html(f"<{tag}{opening}>")
    return Html(f"<{tag}{opening}>{joined(*children)}</{tag}>")


def joined(*children: str) -> Html:
    """The children one after the other, escaped where they are not markup."""
    return Html("".join(child if isinstance(child, Html) else html.escape(child, quote=False) for child in children))


@dataclass(frozen=True)
class Banner:
    """The first thing a reader sees: who may have this page. `kind` is "private" or "shareable"."""

    kind: str
    headline: str
    text: str


@dataclass(frozen=True)
class Page:
    title: str
    eyebrow: str
    banner: Banner
    lead: Html
    facts: Sequence[tuple[str, str]]
    sections: Sequence[Html]
    footer: str


def render(page: Page) -> bytes:
    """The page as UTF-8, from doctype to the last line."""
    body = element("body", _banner(page.banner), element("div", _header(page), _main(page), _footer(page), cls="page"))
    return ("<!doctype html>\n" + element("html", _head(page.title), body, lang="en") + "\n").encode()


def _head(title: str) -> Html:
    policy = {"http-equiv": "Content-Security-Policy"}
    return element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", **policy, content=CONTENT_SECURITY_POLICY),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light dark"),
        element("title", title),
        element("link", rel="icon", href="data:,"),
        element("style", Html(STYLE)),
    )


def _banner(banner: Banner) -> Html:
    text = element("p", element("strong", banner.headline), " ", banner.text)
    return element("aside", text, cls=f"banner {banner.kind}", aria_label="Who may have this page")


def _header(page: Page) -> Html:
    facts = [element("div", element("dt", name), element("dd", value)) for name, value in page.facts]
    return element(
        "header",
        element("p", page.eyebrow, cls="eyebrow"),
        element("h1", page.title),
        element("p", page.lead, cls="lead"),
        element("dl", *facts, cls="facts"),
    )


def _main(page: Page) -> Html:
    return element("main", *page.sections)


def _footer(page: Page) -> Html:
    return element("footer", element("p", page.footer))


def section(heading: str, *children: str) -> Html:
    """A section with its second-level heading."""
    return element("section", element("h2", heading), *children)


def paragraph(*children: str, cls: str = "") -> Html:
    return element("p", *children, cls=cls)


def bullets(items: Sequence[str], cls: str = "") -> Html:
    return element("ul", *(element("li", item) for item in items), cls=cls)


def table(
    caption: str,
    columns: Sequence[str],
    *groups: Html,
    text: Collection[str] = (),
    over: Sequence[tuple[str, int]] = (),
) -> Html:
    """A table that scrolls sideways in its own box where the screen is narrow; the first column stays.

    Columns hold numbers, set to the right, but for those that `text` names. `over`: headings above the columns, each
    with the number of columns it spans.
    """
    above = [element("th", title, colspan=span, scope="colgroup", cls="over") for title, span in over]
    heads = (element("th", column, scope="col", cls="text" if column in text else "") for column in columns)
    head = element("thead", *([element("tr", *above)] if over else []), element("tr", *heads))
    inner = element("table", element("caption", caption), head, *groups, cls="dense" if over else "")
    # A region that scrolls must be reachable by keyboard, hence the tabindex.
    return element("div", inner, cls="scroll", role="region", tabindex=0, aria_label=caption)


def rows(cells: Sequence[Sequence[str]], heading: str = "", num_columns: int = 0) -> Html:
    """A group of table rows, each headed by its first cell, under an optional heading across `num_columns`."""
    top = [element("tr", element("th", heading, colspan=num_columns, scope="rowgroup"), cls="group")] if heading else []
    return element("tbody", *top, *(_row(row) for row in cells))


def _row(cells: Sequence[str]) -> Html:
    return element("tr", element("th", cells[0], scope="row"), *(_cell(cell) for cell in cells[1:]))


def _cell(cell: str) -> Html:
    return cell if isinstance(cell, Html) and cell.startswith("<td") else element("td", cell)


def definitions(pairs: Sequence[tuple[str, str]], cls: str = "terms") -> Html:
    parts = [element("div", element("dt", term), element("dd", meaning)) for term, meaning in pairs]
    return element("dl", *parts, cls=cls)


STYLE = """
:root {
  color-scheme: light dark;
  --paper: #fbfaf7; --raised: #ffffff; --ink: #1d1c1a; --soft: #625f59; --faint: #8a867d; --line: #e4e0d8;
  --accent: #1f5f8b; --accent-soft: #e6eff6;
  --private: #9c2f1c; --private-ink: #ffffff; --shareable: #1d6b4f; --shareable-ink: #ffffff;
  --good: #1d6b4f; --bad: #9c2f1c;
  --real: #77736a; --released: #a28a5b; --shared: #2b6ca3; --personal: #c06a1d; --both: #6a4ca8;
  --track: #ece8e0; --shadow: 0 1px 2px rgb(40 30 10 / .06), 0 6px 20px rgb(40 30 10 / .05);
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #14151a; --raised: #1c1e25; --ink: #e9e7e2; --soft: #b0aca3; --faint: #8b887f; --line: #30333d;
    --accent: #8ec1ea; --accent-soft: #1f2b38;
    --private: #7d2718; --private-ink: #ffeae5; --shareable: #17543e; --shareable-ink: #e4f7ef;
    --good: #6fcaa5; --bad: #f2907c;
    --real: #a39f95; --released: #c9ad77; --shared: #6fb1e8; --personal: #eaa05a; --both: #b197f0;
    --track: #2a2d36; --shadow: none;
  }
}
*, *::before, *::after { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; text-size-adjust: 100%; }
body {
  margin: 0; background: var(--paper); color: var(--ink); overflow-wrap: break-word;
  font: 1rem/1.6 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", "DejaVu Sans", sans-serif;
}
.page { max-width: 72rem; margin: 0 auto; padding: 0 clamp(1rem, 4vw, 3rem) 4rem; }
.banner { padding: .7rem clamp(1rem, 4vw, 3rem); position: sticky; top: 0; z-index: 2; font-size: .9rem; }
.banner p { max-width: 66rem; text-wrap: pretty; margin: 0 auto; line-height: 1.45; }
.banner.private { background: var(--private); color: var(--private-ink); }
.banner.shareable { background: var(--shareable); color: var(--shareable-ink); }
header { padding: 3rem 0 1rem; }
.eyebrow { margin: 0; color: var(--accent); font-size: .82rem; font-weight: 600; letter-spacing: .04em; }
h1 { margin: .15rem 0 .8rem; font-size: clamp(1.8rem, 5vw, 2.7rem); line-height: 1.12; letter-spacing: -.02em;
  text-wrap: balance; }
h2 { margin: 0 0 .5rem; font-size: 1.4rem; line-height: 1.25; letter-spacing: -.01em; }
h3 { margin: 0; font-size: 1rem; line-height: 1.3; }
p, ul, dl { margin: 0 0 1rem; }
p, li { max-width: 46rem; }
.lead { font-size: 1.15rem; line-height: 1.55; max-width: 50rem; text-wrap: pretty; }
.note { color: var(--soft); font-size: .9rem; }
section { margin: 3.2rem 0 0; }
section section { margin: 1.6rem 0 0; }
ul { padding-left: 1.2rem; }
li { margin: .3rem 0; }
code { font: .88em/1.4 ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; }
code.block { display: block; overflow-x: auto; white-space: pre; padding: .8rem 1rem; border: 1px solid var(--line);
  border-radius: .6rem; background: var(--raised); }
code.hash { overflow-wrap: anywhere; }
small { font-size: .8rem; font-weight: 400; color: var(--soft); }
.rare { display: inline-block; padding: 0 .45rem; border-radius: 1rem; background: var(--accent-soft);
  color: var(--accent); font-size: .74rem; font-weight: 600; line-height: 1.5; }
footer { margin-top: 4rem; padding-top: 1rem; border-top: 1px solid var(--line); color: var(--soft);
  font-size: .85rem; }

.facts { display: grid; grid-template-columns: repeat(auto-fit, minmax(8.5rem, 1fr)); gap: 1px; margin: 1.6rem 0 0;
  background: var(--line); border: 1px solid var(--line); border-radius: .8rem; overflow: hidden; }
.facts div { background: var(--raised); padding: .8rem 1rem; }
.facts dt { color: var(--soft); font-size: .8rem; line-height: 1.3; }
.facts dd { margin: .1rem 0 0; font-size: 1.2rem; font-weight: 600; line-height: 1.3;
  font-variant-numeric: tabular-nums; }
.terms div { display: grid; grid-template-columns: minmax(0, 13rem) minmax(0, 1fr); gap: 0 1.2rem; padding: .55rem 0;
  border-top: 1px solid var(--line); align-items: baseline; }
.terms dt { font-weight: 600; font-size: .92rem; }
.terms dd { margin: 0; color: var(--soft); font-size: .92rem; line-height: 1.5; }

.scroll { overflow-x: auto; margin: 1rem 0; border: 1px solid var(--line); border-radius: .8rem;
  background: var(--raised); box-shadow: var(--shadow); }
.scroll:focus-visible { outline: 2px solid var(--accent); outline-offset: 2px; }
table { border-collapse: separate; border-spacing: 0; width: 100%; font-size: .9rem; line-height: 1.4;
  font-variant-numeric: tabular-nums; }
caption { padding: .9rem 1rem .4rem; text-align: left; color: var(--soft); font-size: .88rem; }
th, td { padding: .5rem 1rem; text-align: right; border-top: 1px solid var(--line); }
td { white-space: nowrap; }
thead th { border-top: 0; color: var(--soft); font-weight: 600; font-size: .8rem; vertical-align: bottom; }
th:first-child { text-align: left; position: sticky; left: 0; background: var(--raised); font-weight: 500;
  min-width: 8.5rem; max-width: 16rem; z-index: 1; }
td.text, th.text { text-align: left; white-space: normal; min-width: 12rem; }
th.over { text-align: center; color: var(--ink); padding-bottom: 0; }
.dense th, .dense td { padding-left: .55rem; padding-right: .55rem; }
.dense th:first-child { padding-left: 1rem; }
.dense td:last-child, .dense th:last-child { padding-right: 1rem; }
tr.group th { padding-top: 1.1rem; font-weight: 700; font-size: .86rem; color: var(--accent); }
td.picture { min-width: 19rem; }
.arm { white-space: nowrap; }
td.better { color: var(--good); font-weight: 600; }
td.worse { color: var(--bad); }
td.empty { color: var(--faint); }
.key { display: inline-block; width: .65rem; height: .65rem; margin-right: .5rem; border-radius: .2rem;
  background: var(--tone); }
.real { --tone: var(--real); } .released { --tone: var(--released); } .shared { --tone: var(--shared); }
.personal { --tone: var(--personal); } .both { --tone: var(--both); }

img.pixels { display: block; max-width: 100%; height: auto; image-rendering: pixelated; border-radius: .2rem; }
figure { margin: 0; min-width: 0; }
figcaption { color: var(--soft); font-size: .8rem; line-height: 1.3; padding-top: .3rem; }
.gallery { margin: 1.4rem 0 0; }
.gallery-head, .class-row { display: grid; gap: .9rem 1.2rem; align-items: start;
  grid-template-columns: 7rem repeat(var(--columns), minmax(0, 1fr)); }
.gallery-head { color: var(--soft); font-size: .84rem; font-weight: 600; padding-bottom: .5rem; align-items: end;
  line-height: 1.3; }
.gallery-head span { border-top: 3px solid var(--tone, transparent); padding-top: .35rem; }
.class-row { padding: .9rem 0; border-top: 1px solid var(--line); margin: 0; }
.class-row h3 small { display: block; }
.class-row figcaption { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); }
.sheets { display: grid; gap: 1.4rem 1.2rem; grid-template-columns: repeat(auto-fill, minmax(min(100%, 11.5rem), 1fr));
  margin-top: 1.2rem; }

.cards { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 19rem), 1fr));
  margin: 1.2rem 0; }
.card { margin: 0; padding: 1rem 1.1rem 1.1rem; background: var(--raised); border: 1px solid var(--line);
  border-radius: .8rem; box-shadow: var(--shadow); }
.card p { margin: 0 0 .6rem; color: var(--soft); font-size: .84rem; line-height: 1.4; }
.bars { display: grid; grid-template-columns: max-content minmax(3rem, 1fr) max-content; gap: .35rem .7rem;
  align-items: center; margin: 0; font-size: .85rem; line-height: 1.3; font-variant-numeric: tabular-nums; }
.bars div { display: contents; }
.bars dt { color: var(--soft); }
.bars dd { margin: 0; }
.bars dd.value { text-align: right; }
.bar { display: block; }
.bar svg { display: block; width: 100%; height: .7rem; border-radius: .2rem; }
.track { fill: var(--track); }
.fill { fill: var(--tone, var(--accent)); }
.verdicts { padding: 0; list-style: none; margin: 1rem 0; }
.verdicts p { margin: .2rem 0 0; max-width: 54rem; font-size: .95rem; line-height: 1.5; }
.verdicts li { padding: .1rem 0 .1rem .9rem; border-left: 4px solid var(--tone); margin: 1rem 0; max-width: 55rem; }
.split { display: grid; gap: 1.5rem 3rem; grid-template-columns: minmax(0, 1fr) minmax(0, 20rem); align-items: start; }
.roc { display: block; width: 100%; max-width: 20rem; height: auto; font-size: 11px; }
.roc text { fill: var(--soft); }
.roc-grid { stroke: var(--line); stroke-width: 1; }
.roc-area { fill: var(--accent-soft); }
.roc-curve { fill: none; stroke: var(--accent); stroke-width: 2.5; stroke-linejoin: round; }
.roc-chance { stroke: var(--faint); stroke-width: 1.2; stroke-dasharray: 4 4; }
.roc-label { font-weight: 600; }
.holdings { display: block; font-size: 11px; margin: 1rem; }
.holdings text { fill: var(--soft); }
.holdings circle { fill: var(--accent); }
.roc-mark { fill: var(--accent); stroke: var(--paper); stroke-width: 1.5; }

@media (max-width: 52rem) {
  .banner { position: static; }
  header { padding-top: 2rem; }
  section { margin-top: 2.4rem; }
  .facts { grid-template-columns: 1fr 1fr; }
  .facts div:last-child:nth-child(odd) { grid-column: 1 / -1; }
  .gallery-head { display: none; }
  .class-row { grid-template-columns: 1fr 1fr; }
  .class-row h3 { grid-column: 1 / -1; }
  .class-row h3 small { display: inline; margin-left: .4rem; }
  .class-row figcaption { position: static; width: auto; height: auto; clip-path: none; }
  .class-row img.pixels { width: 100%; }
  .sheets { grid-template-columns: repeat(auto-fill, minmax(8.5rem, 1fr)); }
  .terms div { grid-template-columns: minmax(0, 1fr); }
  .split { grid-template-columns: minmax(0, 1fr); }
  th, td { padding: .45rem .7rem; }
}
@media print {
  :root { --paper: #fff; --raised: #fff; --ink: #000; --soft: #444; --line: #ccc; --shadow: none; }
  body { font-size: 10pt; }
  .banner { position: static; border: 2px solid; background: none; color: #000; }
  .scroll { overflow: visible; }
  .class-row, .card, tr, figure { break-inside: avoid; }
  h2, h3 { break-after: avoid; }
}
"""
