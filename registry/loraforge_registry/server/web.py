"""The frame of every page, its style and its script: no build step, nothing from elsewhere, no need of a script.

What strangers wrote reaches a page through ``html.escape``, or as Markdown without HTML and images.
"""

from dataclasses import dataclass
from html import escape
from importlib.resources import files
from urllib.parse import quote

from markdown_it import MarkdownIt
from starlette.responses import Response

from loraforge_registry.server.accounts import User

CSP = (
    "default-src 'none'; style-src 'self'; script-src 'self'; img-src 'self'; form-action 'self'; "
    "frame-ancestors 'none'; base-uri 'none'"
)
MAX_CARD = 100_000
# spaces of French and of Chinese; joiners, without which Persian and Hindi are misspelt and emoji fall apart
_IN_PROSE = "\n\t\u00a0\u2009\u202f\u3000\u200c\u200d"

_KINDS = {"style.css": "text/css", "figures.css": "text/css", "page.js": "text/javascript", "icon.svg": "image/svg+xml"}
STATIC = {name: ((files(__package__) / "static" / name).read_bytes(), kind) for name, kind in _KINDS.items()}


def text(words: str) -> str:
    """Words as HTML that shows them; what does not print, or turns the direction of writing, shows as a mark."""
    return escape(_printable(words, "\n\t"))


@dataclass(frozen=True)
class Visit:
    """Who looks at a page, where, and what for."""

    path: str = "/"
    user: User | None = None
    words: str = ""


def page(title: str, body: str, visit: Visit) -> Response:
    """Put a page around its body, which is HTML."""
    log_in = f"<a href='/-login?to={quote(visit.path, safe='/%')}'>Log in</a>"
    who = log_in if visit.user is None else f"<span class=quiet>{text(visit.user.name)}</span>"
    html = (
        "<!doctype html><html lang=en><head><meta charset=utf-8>"
        "<meta name=viewport content='width=device-width, initial-scale=1'>"
        "<meta name=color-scheme content='light dark'>"
        f"<title>{text(title)}</title><link rel=icon href='/-/icon.svg'><link rel=stylesheet href='/-/style.css'>"
        "<link rel=stylesheet href='/-/figures.css'>"
        "<script src='/-/page.js' defer></script></head><body>"
        "<header><div class=wide><a class=brand href='/'>loraforge</a>"
        f"<form action='/' role=search><input name=search type=search value='{text(visit.words)}' "
        f"placeholder='Search adapters' aria-label='Search adapters'><button>Search</button></form>{who}</div></header>"
        f"<main><div class=wide>{body}</div></main>"
        "<footer><div class=wide><p>Served by loraforge. The Hub's own clients work here: set HF_ENDPOINT.</p></div>"
        "</footer></body></html>"
    )
    return Response(html, media_type="text/html", headers={"Content-Security-Policy": CSP})


def table(columns: list[str], rows: list[list[str]]) -> str:
    """A table; a column whose title ends in ``>`` is of numbers. Cells are HTML."""
    kinds = [" class=n" if column.endswith(">") else " class=name" for column in columns]
    head = "".join(f"<th{k.replace('name', 'h')}>{text(c.rstrip('>'))}" for k, c in zip(kinds, columns, strict=True))
    body = "".join(f"<tr>{''.join(f'<td{k}>{c}' for k, c in zip(kinds, row, strict=True))}" for row in rows)
    return f"<div class=scroll><table><thead><tr>{head}</thead><tbody>{body}</tbody></table></div>"


def copyable(words: str) -> str:
    """Text to copy."""
    return f"<pre data-copy>{text(words)}</pre>"


def bar(share: float) -> str:
    """A small bar for a number from 0 to 1."""
    width = max(1.0, min(share, 1.0) * 80)
    return f"<svg width=80 height=10 aria-hidden=true><rect class=bar width={width:.1f} height=10 rx=3 /></svg>"


def markdown(words: str) -> str:
    """Render a card: no HTML of its own, no images, no links but to the web and within the page."""
    parser = MarkdownIt("commonmark", {"html": False}).enable("table").disable("image")
    parser.add_render_rule("link_open", _link)
    return f"<div class=card>{parser.render(_printable(words[:MAX_CARD], _IN_PROSE))}</div>"


def _link(self, tokens, index, options, env):  # type: ignore[no-untyped-def] # noqa: ANN001, ANN202 - the library's signature
    href = str(tokens[index].attrGet("href") or "")
    if not href.lower().startswith(("https://", "http://", "#", "mailto:")):
        tokens[index].attrSet("href", "#")
    tokens[index].attrSet("rel", "noopener nofollow")
    return self.renderToken(tokens, index, options, env)


def _printable(words: str, besides: str) -> str:
    mark = "\N{REPLACEMENT CHARACTER}"
    return "".join(c if c.isprintable() or c in besides else mark for c in words.replace("\r\n", "\n"))
