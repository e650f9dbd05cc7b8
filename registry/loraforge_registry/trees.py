"""The record of a tree of adapters: its base, and a node for every path (SPEC.md section 12)."""

import difflib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace

from loraforge_registry import canonical
from loraforge_registry.canonical import Value
from loraforge_registry.digest import Digest
from loraforge_registry.errors import ManifestError, NotFoundError, ReferenceSyntaxError
from loraforge_registry.fields import check_schema, keys, mapping, raw_digest, typed
from loraforge_registry.manifest import FILES, Manifest
from loraforge_registry.names import RefName

SCHEMA = "loraforge.tree/1"
MAX_NODES = 10_000
MAX_DEPTH = 16
_TAKEN = {name.lower() for name in FILES}


@dataclass(frozen=True, slots=True)
class TreeRecord:
    """What is stored under the digest of a tree: the base by content, where it was found, and artifacts by path."""

    base: Digest
    base_name: str
    nodes: Mapping[str, Digest] = field(default_factory=dict)

    @property
    def blobs(self) -> Mapping[Digest, int]:
        """It has no files of its own."""
        return {}

    @property
    def needs(self) -> tuple[Digest, ...]:
        """Its nodes."""
        return tuple(dict.fromkeys(self.nodes.values()))

    @property
    def lineage(self) -> tuple[Digest, ...]:
        """A tree keeps no tree before it: the reflog says what those were."""
        return ()


def encode_tree(tree: TreeRecord) -> bytes:
    """Return the canonical bytes; ``decode_record(encode_tree(t)) == t``.

    Raises:
        ManifestError: a path that cannot be one, whose parent is not there, or too many.
    """
    _check_paths(tree.nodes)
    return canonical.encode(
        {
            "schema": SCHEMA,
            "base": {"digest": tree.base.raw, "name": tree.base_name},
            "nodes": {path: digest.raw for path, digest in tree.nodes.items()},
        }
    )


def tree_of(fields: dict[str, Value]) -> TreeRecord:
    """Read the record of a tree that was unpacked.

    Raises:
        ManifestError: a field missing, unknown or of a wrong type, a newer schema, or no tree.
    """
    check_schema(fields.get("schema"), SCHEMA)
    keys("tree", fields, "schema base nodes")
    base = mapping("base", fields["base"], "digest name")
    nodes = typed("nodes", fields["nodes"], dict)
    _check_paths(nodes)
    return TreeRecord(
        base=raw_digest("sha256", base["digest"]),
        base_name=typed("base.name", base["name"], str),
        nodes={path: raw_digest("sha256", digest) for path, digest in nodes.items()},
    )


def parent_path(path: str) -> str | None:
    """The path of a node's parent; None is the base."""
    return path.rpartition("/")[0] or None


def steps_to(path: str) -> list[str]:
    """The paths from the base to a node, its own last."""
    parts = path.split("/")
    return ["/".join(parts[: n + 1]) for n in range(len(parts))]


def only_path(tree: TreeRecord, path: str) -> TreeRecord:
    """Return a tree of one node and what is below it.

    Raises:
        NotFoundError: there is no such node.
    """
    if path not in tree.nodes:
        near = difflib.get_close_matches(path, tree.nodes, 1)
        hint = f"; did you mean {near[0]!r}?" if near else f"; it has {', '.join(sorted(tree.nodes)[:8]) or 'none yet'}"
        raise NotFoundError(f"the tree has no node {path[:130]!r}{hint}")
    return replace(tree, nodes={step: tree.nodes[step] for step in steps_to(path)})


def check_path(path: str) -> None:
    """Refuse what cannot be the path of a node.

    Raises:
        ReferenceSyntaxError: a part that is no name, or more than 16.
    """
    parts = path.split("/")
    if len(parts) > MAX_DEPTH:
        raise ReferenceSyntaxError(f"{path[:90]!r} is {len(parts)} names deep; the limit is {MAX_DEPTH}")
    for part in parts:
        try:
            RefName(part)
        except ReferenceSyntaxError as error:
            raise ReferenceSyntaxError(f"{path[:130]!r} is no path of a node: {error}") from error
        if part in _TAKEN:  # a tree that is written out has both in one directory
            raise ReferenceSyntaxError(
                f"{path[:130]!r} is no path of a node: {part} is what an adapter's file is called"
            )


def untruths(tree: TreeRecord, read: Callable[[Digest], object]) -> Iterator[str]:
    """Say which nodes were not made atop the node that their path puts them on, or are no adapters."""
    for path, digest in tree.nodes.items():
        above = parent_path(path)
        expected = None if above is None else tree.nodes[above]
        found = read(digest)
        if not isinstance(found, Manifest):
            yield f"node {path!r} is no adapter"
        elif found.parent != expected:
            yield f"node {path!r} was made atop {_spell(found.parent)}, its place is atop {_spell(expected)}"


def _spell(digest: Digest | None) -> str:
    return "the base" if digest is None else f"sha256:{digest.short}"


def _check_paths(nodes: Mapping[str, object]) -> None:
    if len(nodes) > MAX_NODES:
        raise ManifestError(f"a tree of {len(nodes)} nodes; the limit is {MAX_NODES}")
    for path in nodes:
        try:
            check_path(path)
        except ReferenceSyntaxError as error:
            raise ManifestError(str(error)) from error
        above = parent_path(path)
        if above is not None and above not in nodes:
            raise ManifestError(f"node {path!r} has no parent {above!r} in its tree")
