"""Pages for people: what is here, and one page for a repository, with where its adapter came from and where it went."""

import re
from collections.abc import Mapping
from urllib.parse import quote

from starlette.responses import RedirectResponse, Response

from loraforge_registry.config import MAX_BYTES, parse_config
from loraforge_registry.errors import LoraforgeError
from loraforge_registry.layout import Layout, read_layout
from loraforge_registry.manifest import CONFIG_FILE, README_FILE, Manifest
from loraforge_registry.server import describe, lineage_figure, repos, sections, spectrum_figure
from loraforge_registry.server.api import head_of
from loraforge_registry.server.call import Call
from loraforge_registry.server.errors import RefusedError, unauthorised
from loraforge_registry.server.hub import Hub
from loraforge_registry.server.relations import Relations, relations
from loraforge_registry.server.repos import Repository, Revision
from loraforge_registry.server.web import CSP, MAX_CARD, STATIC, Visit, page, text

SHOWN = 50
_PLACE = re.compile(
    r"/(?:[\w.-]+(?:/[\w.-]+)*)?", re.ASCII
)  # on this server: no browser takes it for another's address


def static(_: Hub, call: Call) -> Response:
    """GET /-/style.css, /-/page.js, /-/icon.svg; and /favicon.ico, which browsers ask for by themselves."""
    found = STATIC.get(call.segments.get("file", "icon.svg"))
    if found is None:
        raise RefusedError(404, "there is nothing at this path", "NotFound")
    data, kind = found
    return Response(data, media_type=kind, headers={"Content-Security-Policy": CSP, "Cache-Control": "max-age=300"})


def log_in(_: Hub, call: Call) -> Response:
    """GET /-login: a browser asks for a token, sends it from then on, and goes to where its user was."""
    if call.user is None:
        raise unauthorised()
    to = call.query.get("to", "")
    return RedirectResponse(to if _PLACE.fullmatch(to) else "/", 302)


def front(hub: Hub, call: Call) -> Response:
    """GET /: every repository that whoever asks may see, or those that a search finds, a page at a time."""
    words, start = call.query.get("search", "")[:200], _number(call.query.get("from", ""))
    wanted = words.lower().split()
    found = [r for r in repos.everything(hub, call.user) if all(word in _searched(hub, r) for word in wanted)]
    start = start if start < len(found) else 0
    shown = [(r, describe.base_of(hub, _head(hub, r).commit), _head(hub, r)) for r in found[start : start + SHOWN]]
    following = start + SHOWN if len(found) > start + SHOWN else None
    body = sections.front(shown, len(found), words, following)
    return page("loraforge", body, Visit(call.path, call.user, words))


def repository(hub: Hub, call: Call) -> Response:
    """GET /{id}, /{id}/tree/{rev}: the facts, the files, how to load it, the card, where it came from."""
    found = repos.find(hub, call.segments["id"], call.user)
    revision = repos.resolve(hub, found, call.segments.get("rev", head_of(found)))
    manifest = describe.base_of(hub, revision.commit)
    layout = None if manifest is None else _layout(hub, manifest)
    adapter = revision.commit.adapter
    others = Relations({}) if manifest is None else relations(hub, call.user, found.namespace)
    made = [] if adapter is None else others.made_from(adapter)
    used_by = sorted({place.repository for place in made})
    drawn = lineage_figure.figure(found.id, None if manifest is None else manifest.derivation, others, made)
    spectrum = _spectrum(hub, revision, manifest, layout)
    shown = sections.Shown(
        found, revision, manifest, layout, _card(hub, revision), others.names, used_by, spectrum, drawn
    )
    return page(found.id, sections.repository(shown, call.endpoint), Visit(call.path, call.user))


def artifact(hub: Hub, call: Call) -> Response:
    """GET /-/at/{hex}: the page of the repository that has an adapter, if whoever asks may see one that does."""
    hexed = call.segments["hex"]
    names = relations(hub, call.user).names
    found = next((name for digest, name in names.items() if digest.hex == hexed), None)
    if found is None:
        raise RefusedError(404, "no repository that you may see has this adapter", "NotFound")
    return RedirectResponse(f"/{quote(found)}", 302)


def _searched(hub: Hub, repository: Repository) -> str:
    """What a search looks in: the name, and the base."""
    manifest = describe.base_of(hub, _head(hub, repository).commit)
    return f"{repository.id} {manifest.base_name or '' if manifest else ''}".lower()


def _head(hub: Hub, repository: Repository) -> Revision:
    return repos.resolve(hub, repository, head_of(repository))


def _layout(hub: Hub, manifest: Manifest) -> Layout | None:
    file = manifest.file(CONFIG_FILE)
    if file.size > MAX_BYTES:
        return None
    data = b"".join(bytes(piece) for piece in hub.blobs.read(file.digest, 0, file.size))
    try:
        return read_layout(parse_config(data), [tensor.entry for tensor in manifest.tensors])
    except LoraforgeError:
        return None


def _spectrum(hub: Hub, revision: Revision, manifest: Manifest | None, layout: Layout | None) -> str:
    digest = revision.commit.adapter
    if hub.spectra is None or manifest is None or layout is None or digest is None:
        return ""
    return spectrum_figure.section(hub.spectra.ask(digest, manifest, layout))


def _card(hub: Hub, revision: Revision) -> str | None:
    file = revision.commit.files.get(README_FILE)
    if file is None:
        return None
    data = b"".join(bytes(piece) for piece in hub.blobs.read(file.digest, 0, min(file.size, 2 * MAX_CARD)))
    return data.decode(errors="replace")


def _number(text: str) -> int:
    return int(text) if text.isascii() and text.isdigit() and len(text) < 9 else 0


def refused(error: RefusedError, headers: Mapping[str, str], path: str, *, anonymous: bool) -> Response:
    """A page instead of the one that cannot be shown.

    Where people may look without a token, nobody is asked for one but by a link: most of what is missing is not
    private.
    """
    status, title, said = error.status, "This did not work", [f"{error.message}."]
    if status == 401 and not (anonymous and error.code == "RepoNotFound"):
        headers = {**headers, "WWW-Authenticate": 'Basic realm="loraforge", charset="UTF-8"'}
        title, said = (
            "Who are you?",
            ["Any name, and a token as the password: loraforge serve user add NAME makes one."],
        )
    elif status in (401, 404):
        said += ["If it is private, log in first."] if status == 401 else []
        headers = {name: value for name, value in headers.items() if name != "WWW-Authenticate"}
        status, title = 404, "Not here"
    body = f"<h1>{title}</h1><p class=quiet>{text(' '.join(said))}</p><p><a href='/'>All adapters</a></p>"
    found = page(title, body, Visit(path))
    found.status_code = status
    found.headers.update(headers)
    return found
