"""A recipe's inputs, opened: what each name means today, held against what the lock says it meant."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from loraforge.adapter import Adapter
from loraforge.errors import ConflictError, FormatError, NotFoundError, RecipeError, ReferenceSyntaxError, StoreError
from loraforge.formats import peft
from loraforge.recipe._lock import Pin
from loraforge.recipe._nodes import Place
from loraforge.recipe._schema import Source
from loraforge.registry import Registry
from loraforge_registry.digest import Digest
from loraforge_registry.ingest import examine, open_adapter
from loraforge_registry.manifest import encode_manifest


@dataclass(frozen=True)
class Opened:
    """An input: what it is, its adapter, where it lies if in a directory, and what is to be said about it."""

    pin: Pin
    adapter: Adapter
    path: Path | None = None
    note: str | None = None


@dataclass(frozen=True)
class Around:
    """Where a recipe lies: its paths begin at ``folder`` and stay below ``root``; ``lock`` is what pins its inputs."""

    folder: Path
    root: Path
    lock: Path


def open_inputs(
    sources: Mapping[str, Source], around: Around, registry: Registry, pins: Mapping[str, Pin]
) -> dict[str, Opened]:
    """Open every input; ``pins`` are the lock's, none where there is none or they shall be renewed.

    A pin counts while the recipe calls the input what it did.

    Raises:
        RecipeError: an input is not what the lock says, or a path leads out of the root.
        NotFoundError, FormatError, StoreError: it is not there, or damaged; each with the input's place in front.
    """
    paths = {name: _path(source, around) for name, source in sources.items() if "/" in source.text}
    found = {}
    for name, source in sources.items():
        pin = pins.get(name)
        pin = pin if pin is not None and pin.source == source.text else None
        with _placed(source.place):
            if name in paths:
                found[name] = _open_path(name, source.text, paths[name], pin, around.lock)
            else:
                found[name] = _open_reference(name, source.text, around.folder, registry, pin, around.lock)
    return found


def _path(source: Source, around: Around) -> Path:
    """Where an input lies. A recipe may be a stranger's, so that it says where to look only below its own directory.

    Raises:
        RecipeError: it begins elsewhere, or leads elsewhere, by ``..`` or a link.
    """
    text = source.text
    if text[0] in "~$":
        source.place.refuse(
            f"{text[:80]!r}: nothing is put in for {text.partition('/')[0][:40]}; write the path itself"
        )
    path = around.folder / text
    if not path.resolve().is_relative_to(around.root.resolve()):
        source.place.refuse(
            f"{text[:80]!r} is outside {around.root}, and a recipe's paths stay below its own directory; name another "
            "one that they may be in (--root DIR), or push the adapter and name it as it is called in the store"
        )
    return path


def _open_path(name: str, text: str, path: Path, pin: Pin | None, lock: Path) -> Opened:
    with open_adapter(path) as incoming:
        manifest, _ = examine(incoming)
    if pin is not None and pin.content_id != manifest.content_id:
        raise RecipeError(
            f"{name} ({text}) holds content {manifest.content_id.short}, and {lock.name} pins {pin.content_id.short}; "
            "put the pinned adapter back, or take what is there now with --update"
        )
    return Opened(Pin(text, Digest.of(encode_manifest(manifest)), manifest.content_id), peft.load(path), path)


def _open_reference(name: str, text: str, folder: Path, registry: Registry, pin: Pin | None, lock: Path) -> Opened:
    store = registry.store
    if pin is None:
        digest = _resolve(text, folder, registry)
        return Opened(Pin(text, digest, store.manifest(digest).content_id), registry.load(str(digest)))
    if not store.has(pin.digest):
        raise NotFoundError(
            f"{name} ({text}) is pinned to {pin.digest} by {lock.name}, which is not in the store; pull it, or pin "
            f"what {text} is now with --update"
        )
    content = store.manifest(pin.digest).content_id
    if content != pin.content_id:
        raise RecipeError(
            f"{name} ({text}): {pin.digest} has content {content.short}, and {lock.name} says {pin.content_id.short}: "
            "somebody changed the lock; renew it with --update"
        )
    return Opened(pin, registry.load(str(pin.digest)), note=_moved(name, text, registry, pin, lock))


def _moved(name: str, text: str, registry: Registry, pin: Pin, lock: Path) -> str | None:
    try:
        now = registry.store.resolve(text)
    except NotFoundError:
        return f"{name}: there is no {text} any more; sha256:{pin.digest.short} is taken, as {lock.name} says"
    if now == pin.digest:
        return None
    return (
        f"{name}: {text} has moved to sha256:{now.short}; sha256:{pin.digest.short} is taken, as {lock.name} says "
        "(--update takes the new one)"
    )


def _resolve(text: str, folder: Path, registry: Registry) -> Digest:
    try:
        return registry.store.resolve(text)
    except (NotFoundError, ReferenceSyntaxError) as error:
        hint = f"; to mean the directory beside the recipe, write ./{text}" if (folder / text).exists() else ""
        raise type(error)(f"{error}{hint}") from error


@contextmanager
def _placed(place: Place) -> Iterator[None]:
    """Put the place in front of what is wrong with an input, whatever its kind."""
    try:
        yield
    except (NotFoundError, FormatError, ReferenceSyntaxError, StoreError, ConflictError) as error:
        raise type(error)(f"{place}: {error}") from error
