"""What pages read around an adapter: its config, where it is fetched from, the pages of what it was made from."""

from collections.abc import Iterator, Mapping
from itertools import islice

from loraforge_registry.config import MAX_BYTES, AdapterConfig, parse_config
from loraforge_registry.digest import Digest
from loraforge_registry.errors import LoraforgeError
from loraforge_registry.layout import Layout, read_layout
from loraforge_registry.manifest import CONFIG_FILE, Artifact, Derivation, Manifest
from loraforge_registry.server import sections, spectrum_figure
from loraforge_registry.server.api import head_of
from loraforge_registry.server.around import Around
from loraforge_registry.server.call import Call
from loraforge_registry.server.hub import Hub
from loraforge_registry.server.loading import Source
from loraforge_registry.server.repos import Repository, Revision


def read_config(hub: Hub, manifest: Manifest) -> tuple[AdapterConfig, Layout] | None:
    """Return the config of an adapter and the layout that it makes of its tensors; None where that fails."""
    file = manifest.file(CONFIG_FILE)
    if file.size > MAX_BYTES:
        return None
    try:
        config = parse_config(b"".join(bytes(piece) for piece in hub.blobs.read(file.digest, 0, file.size)))
        return config, read_layout(config, [tensor.entry for tensor in manifest.tensors])
    except LoraforgeError:
        return None


def source_of(hub: Hub, call: Call, found: Repository, revision: Revision) -> Source:
    """Where what a page shows is fetched from: by the name of its revision where that is one, else by the commit."""
    said, needs_token = call.segments.get("rev"), found.record.private or not hub.settings.anonymous
    if said is not None and found.record.named(said) is None:
        said = revision.id
    return Source(found.id, call.endpoint, None if said == head_of(found) else said, needs_token)


def spectrum(hub: Hub, digest: Digest | None, manifest: Manifest | None, layout: Layout | None) -> str:
    """The part of a page with the spectrum; empty where nobody works one out."""
    if hub.spectra is None or manifest is None or layout is None or digest is None:
        return ""
    return spectrum_figure.section(hub.spectra.ask(digest, manifest, layout))


def links_of(around: Around, derivation: Derivation) -> Mapping[Digest, str]:
    """The pages of what something was made from, and no branch or tag means any more."""
    sources = islice(_sources(derivation), sections.MAX_ROWS)
    unnamed = {digest: found for digest, found in sources if digest not in around.names}
    found = {
        digest: _is_somewhere(around, digest) if is_artifact else bool(around.places_of_content(digest))
        for digest, is_artifact in unnamed.items()
    }
    return {digest: f"/-/at/{digest.hex}" for digest, is_there in found.items() if is_there}


def _is_somewhere(around: Around, artifact: Digest) -> bool:
    return bool(around.places(artifact)) or next(around.trees_with(artifact), None) is not None


def _sources(derivation: Derivation) -> Iterator[tuple[Digest, bool]]:
    """Yield what a derivation names: the digests of artifacts, and content ids of what was in no store."""
    for item in derivation.inputs:
        if isinstance(item.source, Derivation):
            yield from _sources(item.source)
        else:
            is_artifact = isinstance(item.source, Artifact)
            yield item.source.digest if isinstance(item.source, Artifact) else item.source, is_artifact
