"""The frame of every page, its style and its script: no build step, nothing from elsewhere, no need of a script.

What strangers wrote reaches a page through ``html.escape``, or as a card (``cards``).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from html import escape
from importlib.resources import files
from urllib.parse import quote

from starlette.responses import Response

from loraforge_registry.server.accounts import User

CSP = (
    "default-src 'none'; style-src 'self'; script-src 'self'; img-src 'self'; form-action 'self'; "
    "frame-ancestors 'none'; base-uri 'none'"
)
_UNITS = ("B", "kB", "MB", "GB", "TB")
_KINDS = {"style.css": "text/css", "figures.css": "text/css", "page.js": "text/javascript", "icon.svg": "image/svg+xml"}
STATIC = {name: ((files(__package__) / "static" / name).read_bytes(), kind) for name, kind in _KINDS.items()}


def text(words: str) -> str:
    """Words as HTML that shows them; what does not print, or turns the direction of writing, shows as a mark."""
    return escape(printable(words, "\n\t"))


@dataclass(frozen=True)
class Visit:
    """Who looks at a page, where, and what for."""

    path: str = "/"
    user: User | None = None
    words: str = ""
    keep: Mapping[str, str] = field(default_factory=dict)  # what a search from this page keeps


def page(title: str, body: str, visit: Visit) -> Response:
    """Put a page around its body, which is HTML."""
    log_in = f"<a href='/-login?to={quote(visit.path, safe='/%')}'>Log in</a>"
    who = log_in if visit.user is None else f"<span class=quiet>{text(visit.user.name)}</span>"
    kept = "".join(f"<input type=hidden name={name} value='{text(to)}'>" for name, to in visit.keep.items() if to)
    html = (
        "<!doctype html><html lang=en><head><meta charset=utf-8>"
        "<meta name=viewport content='width=device-width, initial-scale=1'>"
        "<meta name=color-scheme content='light dark'>"
        f"<title>{text(title)}</title><link rel=icon href='/-/icon.svg'><link rel=stylesheet href='/-/style.css'>"
        "<link rel=stylesheet href='/-/figures.css'>"
        "<script src='/-/page.js' defer></script></head><body>"
        "<header><div class=wide><a class=brand href='/'>loraforge</a>"
        f"<form class=search action='/' role=search>{kept}<input name=search type=search value='{text(visit.words)}' "
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


def size(count: int) -> str:
    """Bytes, in three digits."""
    number, unit = float(count), 0
    while number >= 999.5 and unit < len(_UNITS) - 1:
        number, unit = number / 1000, unit + 1
    return f"{number:.3g} {_UNITS[unit]}"


def count(number: int, one: str, many: str) -> str:
    """A number with what it counts."""
    return f"{number:,} {one if number == 1 else many}"


def bar(share: float) -> str:
    """A small bar for a number from 0 to 1."""
    width = max(1.0, min(share, 1.0) * 80)
    return f"<svg width=80 height=10 aria-hidden=true><rect class=bar width={width:.1f} height=10 rx=3 /></svg>"


def printable(words: str, besides: str) -> str:
    """Words in which whatever does not print, and is not allowed for, is a mark."""
    mark = "\N{REPLACEMENT CHARACTER}"
    return "".join(c if c.isprintable() or c in besides else mark for c in words.replace("\r\n", "\n"))
