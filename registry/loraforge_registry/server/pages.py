"""Pages for people: what is here, and one page for a repository. Plain HTML of escaped text, no script, no image.

They need no JavaScript and load nothing but one style sheet; the browser is told so (Content-Security-Policy).
"""

from html import escape
from urllib.parse import quote

from starlette.responses import Response

from loraforge_registry.manifest import Manifest
from loraforge_registry.server import describe, repos
from loraforge_registry.server.api import head_of
from loraforge_registry.server.call import Call
from loraforge_registry.server.errors import RefusedError
from loraforge_registry.server.hub import Hub
from loraforge_registry.server.repos import Repository, Revision

MAX_SHOWN = 500
CSP = "default-src 'none'; style-src 'self'; form-action 'self'; frame-ancestors 'none'; base-uri 'none'"
STYLE = """
body { font: 1rem/1.55 system-ui, sans-serif; max-width: 60rem; margin: 2.5rem auto; padding: 0 1.25rem; color: #1c2330;
  background: #fcfcfb }
a { color: #0b5cad; text-decoration: none } a:hover { text-decoration: underline }
header { display: flex; gap: 1rem; align-items: baseline; justify-content: space-between; margin-bottom: 2rem }
h1 { font-size: 1.7rem; margin: 0 } h2 { font-size: 1.05rem; margin: 2rem 0 .6rem; color: #55606f }
table { border-collapse: collapse; width: 100% } td, th { padding: .45rem .8rem .45rem 0; text-align: left;
  border-bottom: 1px solid #e6e8ea; vertical-align: top } th { font-weight: 500; color: #55606f; white-space: nowrap }
td.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap }
code, pre { font: .88rem/1.5 ui-monospace, monospace; overflow-wrap: anywhere }
pre { background: #f1f3f4; padding: .9rem 1rem; border-radius: .5rem; white-space: pre-wrap }
input { font: inherit; padding: .35rem .7rem; border: 1px solid #c5cbd1; border-radius: .5rem; background: #fff }
.quiet { color: #6b7682 }
@media (prefers-color-scheme: dark) { body { background: #14181d; color: #dde3ea } a { color: #7ab7f5 }
  pre { background: #1e242b }
  td, th { border-color: #2b333c } input { background: #1e242b; color: inherit; border-color: #3a444f } }
"""


def style(_: Hub, _call: Call) -> Response:
    """GET /-/style.css."""
    return Response(STYLE, media_type="text/css", headers={"Content-Security-Policy": CSP})


def front(hub: Hub, call: Call) -> Response:
    """GET /: every repository that whoever asks may see, or those that a search finds."""
    words = call.query.get("search", "")[:200]
    wanted = words.lower().split()
    found = [r for r in repos.everything(hub, call.user) if all(word in r.id.lower() for word in wanted)]
    rows = [_row(hub, repository) for repository in found[:MAX_SHOWN]]
    table = "<table><tr><th>name<th>base<th>files<th>changed</tr>" + "".join(rows) + "</table>"
    more = f"<p class=quiet>{len(found)} in all; search to see others.</p>" if len(found) > MAX_SHOWN else ""
    nothing = "<p class=quiet>Nothing here that you may see.</p>"
    return _page("loraforge", (table + more) if rows else nothing, words)


def repository(hub: Hub, call: Call) -> Response:
    """GET /{id}, /{id}/tree/{rev}: the facts, the files, how to load it, the card as text."""
    found = repos.find(hub, call.segments["id"], call.user)
    revision = repos.resolve(hub, found, call.segments.get("rev", head_of(found)))
    manifest = describe.base_of(hub, revision.commit)
    parts = [_facts(found, revision, manifest), _loading(call, found, manifest), _files(found, revision)]
    return _page(found.id, "".join(parts) + _card(hub, revision))


def artifact(_: Hub, _call: Call) -> Response:
    """GET /-/at/{hex}: an artifact by its digest has no page yet."""
    raise RefusedError(404, "there is no page for a digest", "NotFound")


script = artifact  # no page needs one


def _row(hub: Hub, repository: Repository) -> str:
    revision = repos.resolve(hub, repository, head_of(repository))
    manifest = describe.base_of(hub, revision.commit)
    base = manifest.base_name if manifest is not None else None
    changed = describe.iso(revision.commit.author.time)[:10] if revision.commit.author.time else ""
    private = " <span class=quiet>private</span>" if repository.record.private else ""
    return (
        f"<tr><td><a href='/{quote(repository.id)}'>{escape(repository.id)}</a>{private}"
        f"<td>{escape(base or '')}<td class=n>{len(revision.commit.files)}<td>{changed}</tr>"
    )


def _facts(found: Repository, revision: Revision, manifest: Manifest | None) -> str:
    said = {"commit": revision.id, "branches": ", ".join(found.record.branches), "tags": ", ".join(found.record.tags)}
    if manifest is not None:
        said |= {
            "base": manifest.base_name or "not said",
            "parameters": f"{manifest.parameters:,}",
            "artifact": str(revision.commit.adapter),
            "content id": str(manifest.content_id),
            "made by": manifest.derivation.operation if manifest.derivation else "training or import",
        }
    rows = [f"<tr><th>{escape(name)}<td><code>{escape(text)}</code></tr>" for name, text in said.items() if text]
    return f"<table>{''.join(rows)}</table>"


def _loading(call: Call, found: Repository, manifest: Manifest | None) -> str:
    if manifest is None:
        return ""
    text = f'export HF_ENDPOINT={call.endpoint}\nmodel = PeftModel.from_pretrained(base, "{found.id}")'
    return f"<h2>How to load it</h2><pre>{escape(text)}</pre>"


def _files(found: Repository, revision: Revision) -> str:
    rows = (
        f"<tr><td><a href='/{quote(found.id)}/resolve/{revision.id}/{quote(path)}'>{escape(path)}</a>"
        f"<td class=n>{file.size:,}<td><code>{file.digest.short}</code></tr>"
        for path, file in sorted(revision.commit.files.items())
    )
    return f"<h2>Files</h2><table><tr><th>path<th>bytes<th>sha256</tr>{''.join(rows)}</table>"


def _card(hub: Hub, revision: Revision) -> str:
    """The model card as its text: what strangers wrote is shown, never interpreted."""
    file = revision.commit.files.get("README.md")
    if file is None:
        return ""
    data = b"".join(bytes(piece) for piece in hub.blobs.read(file.digest, 0, min(file.size, 200_000)))
    return f"<h2>Card</h2><pre>{escape(data.decode(errors='replace'))}</pre>"


def _page(title: str, body: str, words: str = "") -> Response:
    html = (
        "<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>"
        f"<title>{escape(title)}</title><link rel=stylesheet href='/-/style.css'>"
        f"<header><h1><a href='/'>loraforge</a>{'' if title == 'loraforge' else ' / ' + escape(title)}</h1>"
        f"<form action='/'><input name=search value='{escape(words)}' placeholder=Search aria-label=Search>"
        "</form></header>"
        f"<main>{body}</main></html>"
    )
    return Response(html, media_type="text/html", headers={"Content-Security-Policy": CSP})
