"""A tree from one store into another, whole: its record, its nodes, and what these were made from."""

import tempfile
from pathlib import Path

from loraforge_registry.digest import Digest
from loraforge_registry.names import RefName
from loraforge_registry.remotes.offer import Published
from loraforge_registry.store import Store


def copy_tree(source: Store, target: Store, digest: Digest, name: RefName, *, force: bool, where: str) -> Published:
    """Give ``target`` a tree of ``source`` under ``name``; files that it has already are not counted as sent.

    It goes as a bundle, whose every byte is checked on the way in.

    Raises:
        ConflictError: the name means something else there; the tree is stored.
        StoreError: something stored is damaged.
    """
    files = {file.digest: file for node in source.tree(digest).needs for file in source.manifest(node).files}
    missing = [file for file in files.values() if not target.holds(file)]
    if target.exists and target.has(digest):
        target.tag(digest, name, force=force, what="push")
    else:
        with tempfile.TemporaryDirectory(prefix="loraforge-", ignore_cleanup_errors=True) as folder:
            bundle = Path(folder) / "tree.lf"
            source.export_bundle([digest], {}, bundle)
            target.import_bundle(bundle, name=name, force=force)
    sent = sum(file.size for file in missing)
    return Published(where, sent, sum(file.size for file in files.values()) - sent)
