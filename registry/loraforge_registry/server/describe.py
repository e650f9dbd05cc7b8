"""Repositories, files and commits in the words of the Hub's JSON."""

import hashlib
import json
import time
from collections.abc import Iterator, Mapping

from loraforge_registry import git
from loraforge_registry.digest import Digest
from loraforge_registry.errors import LoraforgeError
from loraforge_registry.facts import Facts
from loraforge_registry.manifest import Manifest
from loraforge_registry.repositories import CommitRecord, CommittedFile, Outline
from loraforge_registry.server.forest import facts_at
from loraforge_registry.server.hub import Hub
from loraforge_registry.server.repos import MAIN, Repository, Revision
from loraforge_registry.tree_facts import TreeFacts


def iso(seconds: int) -> str:
    """A time as the Hub spells it."""
    return time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime(seconds))


def lfs(file: CommittedFile) -> dict[str, object] | None:
    """What is said of a file in LFS; nothing of any other."""
    if file.blob is not None:
        return None
    return {"sha256": file.digest.hex, "size": file.size, "pointerSize": len(git.pointer(file.digest, file.size))}


def model(hub: Hub, repository: Repository, revision: Revision, *, blobs: bool = False) -> dict[str, object]:
    """A repository at one commit."""
    return {
        **summary(hub, repository, revision.outline),
        "sha": revision.id,
        "siblings": [_sibling(path, file, blobs=blobs) for path, file in sorted(revision.commit.files.items())],
        "usedStorage": sum(revision.commit.blobs.values()),
    }


def summary(hub: Hub, repository: Repository, at: Outline) -> dict[str, object]:
    """A repository at one commit, in a list."""
    facts = facts_at(hub, at)
    return {
        "_id": hashlib.sha256(repository.name.encode()).hexdigest()[:24],
        "id": repository.id,
        "modelId": repository.id,
        "author": repository.id.partition("/")[0] if "/" in repository.id else None,
        "sha": at.id,
        "createdAt": iso(repository.record.created),
        "lastModified": iso(at.time),
        "private": repository.record.private,
        "gated": False,
        "disabled": False,
        "downloads": 0,
        "likes": 0,
        "tags": tags_of(facts),
        **({"library_name": "peft"} if facts is not None else {}),
    }


def base_of(hub: Hub, commit: CommitRecord) -> Manifest | None:
    """The adapter that a commit is, if it is one."""
    return None if commit.adapter is None else adapter_at(hub, commit.adapter)


def adapter_at(hub: Hub, digest: Digest) -> Manifest | None:
    """An adapter; None for what is not there, damaged, or something else."""
    try:
        found = hub.refs.record(digest)
    except (LoraforgeError, OSError):
        return None
    return found if isinstance(found, Manifest) else None


def tags_of(facts: Facts | TreeFacts | None) -> list[str]:
    """What the Hub tags an adapter with, and a tree of them."""
    if facts is None:
        return []
    base = [] if not facts.base else [f"base_model:adapter:{facts.base}"]
    return ["peft", "safetensors", "lora", *base]


def entries(commit: CommitRecord, below: str, *, recursive: bool) -> Iterator[dict[str, object]]:
    """Files and directories of a commit, in order."""
    directories = git.tree_ids({path: file.oid for path, file in commit.files.items()})
    paths = {**dict.fromkeys(directories), **commit.files}
    prefix = f"{below}/" if below else ""
    for path in sorted(paths):
        if path and path.startswith(prefix) and (recursive or "/" not in path[len(prefix) :]):
            file = paths[path]
            yield directory(path, directories[path]) if file is None else entry(path, file)


def entry(path: str, file: CommittedFile) -> dict[str, object]:
    """A file in a list."""
    found = lfs(file)
    said = {} if found is None else {"lfs": {"oid": found["sha256"], **found}}
    return {"type": "file", "oid": file.oid, "size": file.size, "path": path, **said}


def directory(path: str, oid: str) -> dict[str, object]:
    """A directory in a list."""
    return {"type": "directory", "oid": oid, "size": 0, "path": path}


def commit(revision: Revision) -> dict[str, object]:
    """A commit in a list."""
    title, _, message = revision.commit.message.partition("\n\n")
    return {
        "id": revision.id,
        "title": title,
        "message": message,
        "date": iso(revision.commit.author.time),
        "authors": [{"user": revision.commit.author.name}],
    }


def named_revisions(kind: str, table: Mapping[str, str]) -> list[dict[str, str]]:
    """Branches or tags; ``main`` goes first."""
    order = sorted(table, key=lambda name: (name != MAIN, name))
    return [{"name": name, "ref": f"refs/{kind}/{name}", "targetCommit": table[name]} for name in order]


def _sibling(path: str, file: CommittedFile, *, blobs: bool) -> dict[str, object]:
    if not blobs:
        return {"rfilename": path}
    found = lfs(file)
    return {"rfilename": path, "size": file.size, "blobId": file.oid, **({} if found is None else {"lfs": found})}


def dump(value: object) -> bytes:
    """JSON, in few bytes."""
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode()
