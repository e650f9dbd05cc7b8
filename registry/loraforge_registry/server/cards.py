"""Model cards: strangers' Markdown as HTML, without HTML of its own or images, and of a huge one only a part."""

import re
from collections.abc import Sequence
from urllib.parse import quote

from markdown_it import MarkdownIt
from markdown_it.token import Token

from loraforge_registry.digest import Digest
from loraforge_registry.manifest import README_FILE
from loraforge_registry.server.hub import Hub
from loraforge_registry.server.recent import Recent
from loraforge_registry.server.repos import Repository, Revision
from loraforge_registry.server.web import printable, size, text

MAX_CARD = 100_000  # bytes that are read of a card; what Markdown makes of them takes about a second at worst
MAX_LINK = 2_000
_FRONT_MATTER = re.compile(r"\A---\r?\n(?:.*?\r?\n)?---[ \t]*(?:\r?\n|\Z)", re.DOTALL)
# spaces of French and of Chinese; joiners, without which Persian and Hindi are misspelt and emoji fall apart
_IN_PROSE = "\n\t\u00a0\u2009\u202f\u3000\u200c\u200d"
_RENDERED = Recent[Digest, str](8_000_000)  # characters of HTML


def card(hub: Hub, found: Repository, revision: Revision, path: str = README_FILE) -> str:
    """The part of a page that is a repository's README.md, or that of a folder, as HTML; empty where there is none."""
    file = revision.commit.files.get(path)
    if file is None:
        return ""
    rendered = _RENDERED.get(file.digest)
    if rendered is None:
        data = b"".join(bytes(piece) for piece in hub.blobs.read(file.digest, 0, min(file.size, MAX_CARD)))
        rendered = markdown(_said(data, cut=file.size > len(data)))
        _RENDERED.put(file.digest, rendered, len(rendered))
    if file.size <= MAX_CARD:
        return rendered
    whole = f"/{quote(found.id)}/resolve/{revision.id}/{quote(path)}"
    said = f"The card is cut here: the first {size(MAX_CARD)} of {text(size(file.size))} are shown."
    return f"{rendered}<p class=quiet>{said} <a href='{whole}'>The whole file</a></p>"


def markdown(words: str) -> str:
    """Render Markdown: no HTML of its own, no images, no links but to the web and within the page.

    Nothing of a stranger is repeated: a reference may have a long address, and a short card name it ten thousand times.
    """
    if not words.strip():
        return ""
    return f"<div class=card>{_parser().render(printable(words, _IN_PROSE))}</div>"


def _said(data: bytes, *, cut: bool) -> str:
    """The words of a card, without front matter, and whole ones where it is cut."""
    words = data.decode(errors="replace").removeprefix("\ufeff")
    if cut:
        words = words[: max(words.rfind(" "), words.rfind("\n")) + 1] or words
    said = _FRONT_MATTER.sub("", words, count=1)
    return "" if cut and said == words and words.startswith(("---\n", "---\r\n")) else said


def _link(self, tokens: Sequence[Token], index: int, options, env) -> str:  # type: ignore[no-untyped-def] # noqa: ANN001 - the library's signature
    href = str(tokens[index].attrGet("href") or "")
    allowed = href.lower().startswith(("https://", "http://", "#", "mailto:")) and len(href) <= MAX_LINK
    tokens[index].attrs = {"href": href if allowed else "#", "rel": "noopener nofollow"}
    return str(self.renderToken(tokens, index, options, env))


def _cell(self, tokens: Sequence[Token], index: int, options, env) -> str:  # type: ignore[no-untyped-def] # noqa: ANN001 - as above
    # the parser writes a style, which no page here may have
    style = str(tokens[index].attrs.pop("style", ""))
    if style.endswith(("right", "center")):
        tokens[index].attrs["class"] = "n" if style.endswith("right") else "c"
    return str(self.renderToken(tokens, index, options, env))


def _parser() -> MarkdownIt:
    parser = MarkdownIt("commonmark", {"html": False}).enable("table").disable("image")
    parser.add_render_rule("link_open", _link)
    parser.add_render_rule("th_open", _cell)
    parser.add_render_rule("td_open", _cell)
    return parser
