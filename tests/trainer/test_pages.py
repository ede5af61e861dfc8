"""Pages are one self-contained file, and nothing that is not markup becomes markup."""

import re
from html.parser import HTMLParser
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from feddiff_trainer.pages import (
    CONTENT_SECURITY_POLICY,
    STYLE,
    Banner,
    Html,
    Page,
    element,
    joined,
    paragraph,
    render,
    rows,
    section,
    table,
)

ATTACK = "<script>alert(1)</script>\"'><img src=x onerror=alert(1)>&"


class Tags(HTMLParser):
    """Every tag of a page with its attributes, and the text between them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag not in ("meta", "link", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def page(text: str = "text") -> str:
    return render(
        Page(
            title=text,
            eyebrow=text,
            banner=Banner("private", text, text),
            lead=joined(text),
            facts=[(text, text)],
            sections=[section(text, paragraph(text), table(text, [text, text], rows([[text, text]], text, 2)))],
            footer=text,
        )
    ).decode()


def test_text_cannot_become_markup_wherever_it_stands() -> None:
    harmless, attacked = Tags(page()), Tags(page(ATTACK))
    assert [tag for tag, _ in attacked.found] == [tag for tag, _ in harmless.found]
    assert [set(attributes) for _, attributes in attacked.found] == [set(attrs) for _, attrs in harmless.found]
    assert attacked.text.count(ATTACK) == harmless.text.count("text")


def test_the_same_check_finds_text_that_was_not_escaped() -> None:
    assert "script" in dict(Tags(joined(Html(ATTACK))).found)


@given(st.text(st.characters(exclude_categories=["Cs", "Cc"])))
def test_any_text_is_read_back_as_it_was(text: str) -> None:
    tags = Tags(element("p", text, title=text))
    assert tags.found == [("p", {"title": text})]
    assert "".join(tags.text) == text


def test_every_element_is_closed() -> None:
    assert Tags(page()).open == []


def test_a_page_forbids_scripts_and_everything_from_elsewhere() -> None:
    metas = [attributes for tag, attributes in Tags(page()).found if tag == "meta"]
    policy = next(meta["content"] for meta in metas if meta.get("http-equiv") == "Content-Security-Policy")
    assert policy == CONTENT_SECURITY_POLICY == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def test_a_page_refers_to_nothing_elsewhere() -> None:
    references = [
        value
        for _, attributes in Tags(page()).found
        for name, value in attributes.items()
        if name in ("src", "href", "srcset", "action", "poster")
    ]
    assert all(str(value).startswith("data:") for value in references)
    assert not re.search(r"url\(|@import|@font-face|https?:", STYLE)


def test_headings_descend_one_level_at_a_time() -> None:
    levels = [int(tag[1]) for tag, _ in Tags(page()).found if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(later - earlier <= 1 for earlier, later in pairwise(levels))


def test_a_wide_table_can_be_scrolled_by_keyboard() -> None:
    scroll = next(attributes for _, attributes in Tags(page()).found if attributes.get("class") == "scroll")
    assert scroll["tabindex"] == "0" and scroll["aria-label"] == "text"
