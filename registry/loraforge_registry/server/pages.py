"""Pages for people: what is here, and one page for a repository, with where its adapter came from and where it went."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from urllib.parse import quote

from starlette.responses import RedirectResponse, Response

from loraforge_registry.config import MAX_BYTES, parse_config
from loraforge_registry.digest import Digest
from loraforge_registry.errors import LoraforgeError
from loraforge_registry.layout import Layout, read_layout
from loraforge_registry.manifest import CONFIG_FILE, README_FILE, Manifest
from loraforge_registry.server import describe, repos, sections
from loraforge_registry.server.api import head_of
from loraforge_registry.server.call import Call
from loraforge_registry.server.errors import RefusedError
from loraforge_registry.server.hub import Hub
from loraforge_registry.server.repos import Repository, Revision
from loraforge_registry.server.web import CSP, MAX_CARD, SCRIPT, STYLE, page, text

SHOWN = 50


def style(_: Hub, _call: Call) -> Response:
    """GET /-/style.css."""
    return Response(STYLE, media_type="text/css", headers={"Content-Security-Policy": CSP})


def script(_: Hub, _call: Call) -> Response:
    """GET /-/copy.js."""
    return Response(SCRIPT, media_type="text/javascript", headers={"Content-Security-Policy": CSP})


def front(hub: Hub, call: Call) -> Response:
    """GET /: every repository that whoever asks may see, or those that a search finds, a page at a time."""
    words, start = call.query.get("search", "")[:200], _number(call.query.get("from", ""))
    wanted = words.lower().split()
    found = [r for r in repos.everything(hub, call.user) if all(word in _searched(hub, r) for word in wanted)]
    start = start if start < len(found) else 0
    shown = [(r, describe.base_of(hub, _head(hub, r).commit), _head(hub, r)) for r in found[start : start + SHOWN]]
    following = start + SHOWN if len(found) > start + SHOWN else None
    return page("loraforge", sections.front(shown, len(found), words, following), words)


def repository(hub: Hub, call: Call) -> Response:
    """GET /{id}, /{id}/tree/{rev}: the facts, the files, how to load it, the card, where it came from."""
    found = repos.find(hub, call.segments["id"], call.user)
    revision = repos.resolve(hub, found, call.segments.get("rev", head_of(found)))
    manifest = describe.base_of(hub, revision.commit)
    layout = None if manifest is None else _layout(hub, manifest)
    others = _Others(hub, call) if manifest is not None else None
    used_by = [] if others is None or revision.commit.adapter is None else others.made_from(revision.commit.adapter)
    names = {} if others is None else others.names
    shown = sections.Shown(found, revision, manifest, layout, _card(hub, revision), names, used_by)
    return page(found.id, sections.repository(shown, call.endpoint))


def artifact(hub: Hub, call: Call) -> Response:
    """GET /-/at/{hex}: the page of the repository that has an adapter, if whoever asks may see one that does."""
    hexed = call.segments["hex"]
    names = _Others(hub, call).names
    found = next((name for digest, name in names.items() if digest.hex == hexed), None)
    if found is None:
        raise RefusedError(404, "no repository that you may see has this adapter", "NotFound")
    return RedirectResponse(f"/{quote(found)}", 302)


@dataclass(frozen=True)
class _Others:
    """The adapters at the heads of every repository that whoever asks may see."""

    hub: Hub
    call: Call

    @property
    def names(self) -> Mapping[Digest, str]:
        """Where each adapter is."""
        return {digest: repository.id for digest, repository, _ in self._heads()}

    def made_from(self, digest: Digest) -> list[str]:
        """The repositories whose adapter was made from this one."""
        return sorted({
            repository.id
            for _, repository, manifest in self._heads()
            if manifest.derivation is not None and digest in manifest.derivation.artifacts()
        })  # fmt: skip

    def _heads(self) -> Iterator[tuple[Digest, Repository, Manifest]]:
        for repository in repos.everything(self.hub, self.call.user):
            for head in {*repository.record.branches.values(), *repository.record.tags.values()}:
                commit = repos.revision_of(self.hub, head).commit
                manifest = describe.base_of(self.hub, commit)
                if manifest is not None and commit.adapter is not None:
                    yield commit.adapter, repository, manifest


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


def _card(hub: Hub, revision: Revision) -> str | None:
    file = revision.commit.files.get(README_FILE)
    if file is None:
        return None
    data = b"".join(bytes(piece) for piece in hub.blobs.read(file.digest, 0, min(file.size, 2 * MAX_CARD)))
    return data.decode(errors="replace")


def _number(text: str) -> int:
    return int(text) if text.isascii() and text.isdigit() and len(text) < 9 else 0


def not_found(message: str, status: int, headers: Mapping[str, str]) -> Response:
    """A page where there is none for whoever asks."""
    found = page("not found", f"<h1>Not here</h1><p class=quiet>{text(message)}</p>", status=status)
    found.headers.update(headers)
    return found
