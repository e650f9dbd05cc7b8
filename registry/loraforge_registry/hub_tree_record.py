"""``loraforge.json`` at the root of a repository that holds a tree (SPEC.md section 15).

It is the tree's record without loss: the canonical bytes are made again from it, and their digest must be the one
that it states. Each node's folder has the record of its adapter, which ``record`` reads.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field

from loraforge_registry import strict_json
from loraforge_registry.digest import Digest
from loraforge_registry.errors import FormatError
from loraforge_registry.hub_record import MAX_RECORD, digest_of, fields_of, text_of
from loraforge_registry.manifest import RECORD_FILE
from loraforge_registry.strict_json import Json
from loraforge_registry.trees import TreeRecord, encode_tree

TREE_SCHEMA = "loraforge.hub-tree/1"
_KEYS = {"schema", "digest", "base", "nodes", "git"}


@dataclass(frozen=True, slots=True)
class TreeOnHub:
    """A tree, and the git id of the card that was written with it."""

    digest: Digest
    tree: TreeRecord
    git: Mapping[str, str] = field(default_factory=dict)


def encode_tree_record(found: TreeOnHub) -> bytes:
    """Return the bytes of ``loraforge.json``; equal trees give equal bytes."""
    tree = found.tree
    fields = {
        "schema": TREE_SCHEMA,
        "digest": str(found.digest),
        "base": {"digest": str(tree.base), "name": tree.base_name},
        "nodes": {path: str(digest) for path, digest in tree.nodes.items()},
        "git": dict(found.git),
    }
    return (json.dumps(fields, indent=1, sort_keys=True, ensure_ascii=False) + "\n").encode()


def decode_tree_record(data: bytes) -> TreeOnHub | None:
    """Read ``loraforge.json``; None where its schema is that of something else than a tree.

    Raises:
        FormatError: it is none, or the tree that it describes is not the one that it names.
    """
    try:
        fields = fields_of(strict_json.loads(data, max_bytes=MAX_RECORD, max_depth=48))
        schema = fields.get("schema")
        if not isinstance(schema, str) or not schema.startswith(TREE_SCHEMA.rpartition("/")[0] + "/"):
            return None
        if schema != TREE_SCHEMA:
            raise FormatError(f"its schema is {schema[:40]!r}, this version reads {TREE_SCHEMA!r}: upgrade loraforge")
        return _tree(fields_of(fields, _KEYS))
    except ValueError as error:
        raise FormatError(f"{RECORD_FILE}: {error}") from error


def _tree(fields: Mapping[str, Json]) -> TreeOnHub:
    base, nodes, git = (
        fields_of(fields["base"], {"digest", "name"}),
        fields_of(fields["nodes"]),
        fields_of(fields["git"]),
    )
    tree = TreeRecord(
        base=digest_of(base["digest"]),
        base_name=text_of(base["name"]),
        nodes={path: digest_of(digest) for path, digest in sorted(nodes.items())},
    )
    digest, found = digest_of(fields["digest"]), Digest.of(encode_tree(tree))
    if found != digest:
        raise FormatError(f"it names the tree {digest}, and describes {found}")
    return TreeOnHub(digest, tree, {path: text_of(value) for path, value in git.items()})
