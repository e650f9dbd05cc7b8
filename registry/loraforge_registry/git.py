"""Git's ids for blobs, trees and commits: what the Hub's clients know files and revisions by (SPEC.md section 13)."""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from loraforge_registry.digest import Digest


@dataclass(frozen=True, slots=True)
class Signature:
    """Who made a commit, and when (unix seconds); git asks for an address, which nobody here has."""

    name: str
    time: int

    def line(self) -> str:
        """As a commit object spells it."""
        return f"{self.name} <{self.name}@loraforge> {self.time} +0000"


def object_id(kind: str, data: bytes) -> str:
    """The id of an object of git: SHA-1 of its kind, its length and its bytes."""
    return hashlib.sha1(b"%s %d\0" % (kind.encode(), len(data)) + data, usedforsecurity=False).hexdigest()


def blob_id(data: bytes) -> str:
    """The id of a file that lies in git itself."""
    return object_id("blob", data)


def git_id(chunks: Iterable[bytes | bytearray | memoryview], size: int) -> str:
    """The same of a file that comes in pieces, whose length is known."""
    sha1 = hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
    for chunk in chunks:
        sha1.update(chunk)
    return sha1.hexdigest()


def pointer(digest: Digest, size: int) -> bytes:
    """What git holds in place of a file that lies in LFS."""
    return f"version https://git-lfs.github.com/spec/v1\noid sha256:{digest.hex}\nsize {size}\n".encode()


def tree_ids(files: Mapping[str, str]) -> dict[str, str]:
    """The ids of all directories of ``path: blob id``; the root is ``""``."""
    below: dict[str, dict[str, str]] = {"": {}}
    for path, identity in files.items():
        _put(below, path, identity)
    ids: dict[str, str] = {}
    for path in sorted(below, key=lambda p: (p.count("/") + (p != ""), p), reverse=True):
        inside = [(name, identity, f"{path}/{name}".lstrip("/") in below) for name, identity in below[path].items()]
        inside.sort(key=lambda entry: entry[0].encode() + (b"/" if entry[2] else b""))
        ids[path] = object_id("tree", b"".join(map(_tree_entry, inside)))
        if path:
            parent, _, name = path.rpartition("/")
            below[parent][name] = ids[path]
    return ids


def commit_id(tree: str, parents: Iterable[str], author: Signature, message: str) -> str:
    """The id of a commit whose author committed it."""
    lines = [f"tree {tree}", *(f"parent {parent}" for parent in parents)]
    lines += [f"author {author.line()}", f"committer {author.line()}", "", message]
    return object_id("commit", "\n".join(lines).encode())


def _put(below: dict[str, dict[str, str]], path: str, identity: str) -> None:
    directory, _, name = path.rpartition("/")
    if directory not in below:
        below[directory] = {}
        _put(below, directory, "")
    below[directory][name] = identity


def _tree_entry(entry: tuple[str, str, bool]) -> bytes:
    name, identity, is_tree = entry
    return (b"40000 " if is_tree else b"100644 ") + name.encode() + b"\0" + bytes.fromhex(identity)
