"""Where an adapter came from, drawn as a tree."""

from collections.abc import Iterator, Mapping
from contextlib import suppress

from loraforge_cli.describe import Described
from loraforge_cli.output import one_line
from loraforge_registry.canonical import Value
from loraforge_registry.digest import Digest
from loraforge_registry.errors import LoraforgeError
from loraforge_registry.manifest import Artifact, Derivation, Input
from loraforge_registry.names import DEFAULT_TAG
from loraforge_registry.store import Store

Names = Mapping[Digest, str]
_UNTOLD = frozenset({"batch_size", "loraforge", "mask", "max_length", "pack", "task_type", "torch"})
"""Parameters of a training that would make every line too long to read; ``--json`` has them."""


def names_by_digest(store: Store) -> dict[Digest, str]:
    """Return one name for each artifact that has one: a fixed tag rather than the moving latest."""
    lines = sorted(store.ls(), key=lambda line: (line.ref.tag != DEFAULT_TAG, line.ref))
    return {line.digest: str(line.ref) for line in lines if line.digest is not None}


def tree(store: Store, described: Described, names: Names) -> Iterator[str]:
    """Yield the lines of a lineage, the adapter first; what stands twice in it is drawn once."""
    derivation = described.manifest.derivation
    label = str(described.ref) if described.ref else _label(described.digest, names)
    yield one_line(f"{label}{_operation(derivation)}")
    drawn: set[Digest] = set()
    todo = _branches(derivation, "")
    while todo:  # not recursion: a lineage may be longer than Python's stack
        indent, last, weight, item = todo.pop()
        text, below = _source(store, item, names)
        seen = isinstance(item.source, Artifact) and below is not None and item.source.digest in drawn
        if isinstance(item.source, Artifact):
            drawn.add(item.source.digest)
        above = "  (as above)" if seen else _operation(below)
        yield one_line(f"{indent}{'└─ ' if last else '├─ '}{weight}{text}{above}")
        todo += [] if seen else _branches(below, indent + ("   " if last else "│  "))


def _branches(derivation: Derivation | None, indent: str) -> list[tuple[str, bool, str, Input]]:
    """The inputs of a derivation as (indent, is the last, weight, input), the last first."""
    inputs = derivation.inputs if derivation else ()
    return [
        (indent, item is inputs[-1], f"{item.weight:g} x " if len(inputs) > 1 or item.weight != 1 else "", item)
        for item in reversed(inputs)
    ]


def _source(store: Store, item: Input, names: Names) -> tuple[str, Derivation | None]:
    if isinstance(item.source, Derivation):
        return "(not stored)", item.source
    if not isinstance(item.source, Artifact):
        return f"content {item.source.short}, in no store", None
    try:
        below = store.manifest(item.source.digest).derivation
    except LoraforgeError:
        return f"sha256:{item.source.digest.short} (not here)", None
    return _label(item.source.digest, names), below


def _label(digest: Digest | None, names: Names) -> str:
    if digest is None:
        return "(a directory)"
    name = names.get(digest)
    return f"{name}  sha256:{digest.short}" if name else f"sha256:{digest.short}"


def _operation(derivation: Derivation | None) -> str:
    if derivation is None:
        return ""
    told = {key: value for key, value in sorted(derivation.parameters.items()) if key not in _UNTOLD}
    parameters = ", ".join(f"{key} {_shown(value)}" for key, value in told.items())
    return f"  <- {derivation.operation}{f' ({parameters})' if parameters else ''}"


def _shown(value: Value) -> str:
    """Return a parameter as a line has room for it: digests short."""
    if isinstance(value, str) and value.startswith(("sha256:", "blake3:")):
        with suppress(LoraforgeError):
            digest = Digest.parse(value)
            return f"{digest.algorithm}:{digest.short}"
    return repr(value)
