"""Pages for people: what is here, and one page for a repository, with where its adapter came from and where it went."""

import re
from collections.abc import Mapping
from itertools import islice

from starlette.responses import RedirectResponse, Response

from loraforge_registry.digest import Digest
from loraforge_registry.errors import ReferenceSyntaxError
from loraforge_registry.server import describe, forest, lineage_figure, repos, sections, tree_pages
from loraforge_registry.server.adapter_page import links_of, read_config, source_of, spectrum
from loraforge_registry.server.api import head_of
from loraforge_registry.server.around import Around
from loraforge_registry.server.call import Call
from loraforge_registry.server.cards import card
from loraforge_registry.server.errors import RefusedError, unauthorised
from loraforge_registry.server.hub import Hub
from loraforge_registry.server.loading import loading
from loraforge_registry.server.relations import Relations, relations
from loraforge_registry.server.web import CSP, STATIC, Visit, page, text

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


def repository(hub: Hub, call: Call) -> Response:
    """GET /{id}, /{id}/tree/{rev}: the facts, the files, how to load it, the card, where it came from."""
    found = repos.find(hub, call.segments["id"], call.user)
    revision = repos.resolve(hub, found, call.segments.get("rev", head_of(found)))
    tree = forest.tree_at(hub, revision.commit)
    if tree is not None:
        return tree_pages.whole(hub, call, found, revision, tree)
    manifest = describe.base_of(hub, revision.commit)
    read = None if manifest is None else read_config(hub, manifest)
    around = Around(hub, call.user)
    adapter = revision.commit.adapter
    others = Relations({}) if manifest is None else relations(hub, call.user, found.namespace)
    made = [] if adapter is None else others.made_from(adapter)
    used_by = sorted({place.repository for place in made})
    drawn = lineage_figure.figure(found.id, None if manifest is None else manifest.derivation, others, made)
    source = source_of(hub, call, found, revision)
    ways = "" if manifest is None else loading(source, manifest, read)
    layout = None if read is None else read[1]
    links = links_of(around, manifest.derivation) if manifest is not None and manifest.derivation is not None else {}
    alike = [] if manifest is None else around.alike(manifest.content_id)
    trees = [] if adapter is None else list(islice(around.trees_with(adapter), sections.MAX_ROWS))
    shown = sections.Shown(
        found,
        revision,
        manifest,
        layout,
        card=card(hub, found, revision),
        names=others.names,
        used_by=used_by,
        loading=ways,
        spectrum=spectrum(hub, adapter, manifest, layout),
        lineage=drawn,
        links=links,
        alike=alike,
        at=source.short,
        trees=[(place.node(path), f"{place.repository.id} · {path}") for place, path in trees],
        problem=forest.problem_at(hub, revision.commit),
    )
    return page(found.id, sections.repository(shown), Visit(call.path, call.user))


def artifact(hub: Hub, call: Call) -> Response:
    """GET /-/at/{hex}: where an artifact is, or all that compute what a content id says; of one place, its page."""
    digest = _digest(call.segments["hex"])
    around = Around(hub, call.user)
    found = [] if digest is None else around.places(digest)
    if digest is not None and not found:
        place, path = next(around.trees_with(digest), (None, ""))
        if place is not None:
            return RedirectResponse(place.node(path), 302)
    what = "One artifact"
    if digest is not None and not found:
        found, what = around.places_of_content(digest), "The same content"
    if digest is None or not found:
        more = "; if it is private, log in first" if call.user is None else ""
        raise RefusedError(404, f"no repository that you may see has this adapter{more}", "NotFound")
    if len(found) == 1:
        return RedirectResponse(found[0].href, 302)
    return page(f"{digest.short}", sections.places(digest, found, what), Visit(call.path, call.user))


def _digest(hexed: str) -> Digest | None:
    try:
        return Digest("sha256", hexed)
    except ReferenceSyntaxError:
        return None


def refused(error: RefusedError, headers: Mapping[str, str], path: str, *, anonymous: bool) -> Response:
    """A page instead of the one that cannot be shown.

    Where people may look without a token, nobody is asked for one but by a link: most of what is missing is not
    private.
    """
    status, title, said = error.status, "This did not work", [f"{error.message[:1].upper()}{error.message[1:]}."]
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
