"""Pages for people: what is here, and one page for a repository, with where its adapter came from and where it went."""

import re
from collections.abc import Iterator, Mapping
from itertools import islice

from starlette.responses import RedirectResponse, Response

from loraforge_registry.config import MAX_BYTES, AdapterConfig, parse_config
from loraforge_registry.digest import Digest
from loraforge_registry.errors import LoraforgeError, ReferenceSyntaxError
from loraforge_registry.layout import Layout, read_layout
from loraforge_registry.manifest import CONFIG_FILE, Artifact, Derivation, Manifest
from loraforge_registry.server import describe, lineage_figure, repos, sections, spectrum_figure
from loraforge_registry.server.api import head_of
from loraforge_registry.server.around import Around
from loraforge_registry.server.call import Call
from loraforge_registry.server.cards import card
from loraforge_registry.server.errors import RefusedError, unauthorised
from loraforge_registry.server.hub import Hub
from loraforge_registry.server.loading import Source, loading
from loraforge_registry.server.relations import Relations, relations
from loraforge_registry.server.repos import Repository, Revision
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
    manifest = describe.base_of(hub, revision.commit)
    read = None if manifest is None else _read(hub, manifest)
    around = Around(hub, call.user)
    adapter = revision.commit.adapter
    others = Relations({}) if manifest is None else relations(hub, call.user, found.namespace)
    made = [] if adapter is None else others.made_from(adapter)
    used_by = sorted({place.repository for place in made})
    drawn = lineage_figure.figure(found.id, None if manifest is None else manifest.derivation, others, made)
    source = _source(hub, call, found, revision)
    ways = "" if manifest is None else loading(source, manifest, read)
    layout = None if read is None else read[1]
    links = _links(around, manifest.derivation) if manifest is not None and manifest.derivation is not None else {}
    alike = [] if manifest is None else around.alike(manifest.content_id)
    shown = sections.Shown(
        found,
        revision,
        manifest,
        layout,
        card=card(hub, found, revision),
        names=others.names,
        used_by=used_by,
        loading=ways,
        spectrum=_spectrum(hub, revision, manifest, layout),
        lineage=drawn,
        links=links,
        alike=alike,
        at=source.short,
    )
    return page(found.id, sections.repository(shown), Visit(call.path, call.user))


def artifact(hub: Hub, call: Call) -> Response:
    """GET /-/at/{hex}: where an artifact is, or all that compute what a content id says; of one place, its page."""
    digest = _digest(call.segments["hex"])
    around = Around(hub, call.user)
    found = [] if digest is None else around.places(digest)
    what = "One artifact"
    if digest is not None and not found:
        found, what = around.places_of_content(digest), "The same content"
    if digest is None or not found:
        more = "; if it is private, log in first" if call.user is None else ""
        raise RefusedError(404, f"no repository that you may see has this adapter{more}", "NotFound")
    if len(found) == 1:
        return RedirectResponse(found[0].href, 302)
    return page(f"{digest.short}", sections.places(digest, found, what), Visit(call.path, call.user))


def _links(around: Around, derivation: Derivation) -> Mapping[Digest, str]:
    """The pages of what something was made from, and no branch or tag means any more."""
    sources = islice(_sources(derivation), sections.MAX_ROWS)
    unnamed = {digest: found for digest, found in sources if digest not in around.names}
    found = {
        digest: around.places(digest) if is_artifact else around.places_of_content(digest)
        for digest, is_artifact in unnamed.items()
    }
    return {digest: f"/-/at/{digest.hex}" for digest, places in found.items() if places}


def _sources(derivation: Derivation) -> Iterator[tuple[Digest, bool]]:
    """Yield what a derivation names: the digests of artifacts, and content ids of what was in no store."""
    for item in derivation.inputs:
        if isinstance(item.source, Derivation):
            yield from _sources(item.source)
        else:
            is_artifact = isinstance(item.source, Artifact)
            yield item.source.digest if isinstance(item.source, Artifact) else item.source, is_artifact


def _digest(hexed: str) -> Digest | None:
    try:
        return Digest("sha256", hexed)
    except ReferenceSyntaxError:
        return None


def _read(hub: Hub, manifest: Manifest) -> tuple[AdapterConfig, Layout] | None:
    file = manifest.file(CONFIG_FILE)
    if file.size > MAX_BYTES:
        return None
    try:
        config = parse_config(b"".join(bytes(piece) for piece in hub.blobs.read(file.digest, 0, file.size)))
        return config, read_layout(config, [tensor.entry for tensor in manifest.tensors])
    except LoraforgeError:
        return None


def _source(hub: Hub, call: Call, found: Repository, revision: Revision) -> Source:
    """Where what a page shows is fetched from: by the name of its revision where that is one, else by the commit."""
    said, needs_token = call.segments.get("rev"), found.record.private or not hub.settings.anonymous
    if said is not None and found.record.named(said) is None:
        said = revision.id
    return Source(found.id, call.endpoint, None if said == head_of(found) else said, needs_token)


def _spectrum(hub: Hub, revision: Revision, manifest: Manifest | None, layout: Layout | None) -> str:
    digest = revision.commit.adapter
    if hub.spectra is None or manifest is None or layout is None or digest is None:
        return ""
    return spectrum_figure.section(hub.spectra.ask(digest, manifest, layout))


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
