"""What a hub's JSON says of a repository: read strictly, since what follows is looked up and compared by it."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from loraforge_registry.digest import Digest
from loraforge_registry.errors import ReferenceSyntaxError, RemoteError
from loraforge_registry.remotes.address import HubAddress
from loraforge_registry.strict_json import Json

MAX_FILES = 10_000
COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True, slots=True)
class HubFile:
    """A file of a repository, as the hub describes it: ``sha256`` where it lies in LFS, else git's id."""

    size: int
    sha256: Digest | None
    git_id: str | None


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A repository at one commit."""

    commit: str
    files: Mapping[str, HubFile]


def read_snapshot(address: HubAddress, answer: Json) -> Snapshot:
    """Read the description of a revision.

    Raises:
        RemoteError: it is none, or says too little to check a file by.
    """
    fields = _mapping(answer)
    listed = rows(fields.get("siblings"))
    if len(listed) > MAX_FILES:
        raise RemoteError(f"{address}: {len(listed)} files; the limit is {MAX_FILES}")
    files: dict[str, HubFile] = {}
    for row in listed:
        name = _text(row, "rfilename")
        if name in files:
            raise RemoteError(f"{address}: {name[:80]!r} stands twice among its files")
        files[name] = _hub_file(row)
    return Snapshot(_commit(fields, "sha"), files)


def read_refs(answer: Json) -> tuple[Mapping[str, str], Mapping[str, str]]:
    """Read the commits of tags, and of branches.

    Raises:
        RemoteError: it says something else.
    """
    fields = _mapping(answer)
    tags, branches = (
        {_text(row, "name"): _commit(row, "targetCommit") for row in rows(fields.get(kind))}
        for kind in ("tags", "branches")
    )
    return tags, branches


def rows(value: Json) -> list[dict[str, Json]]:
    """Read a list of objects.

    Raises:
        RemoteError: it is something else.
    """
    if not isinstance(value, list) or not all(isinstance(row, dict) for row in value):
        raise RemoteError("the hub answered something else than a list")
    return [_mapping(row) for row in value]


def _hub_file(row: Mapping[str, Json]) -> HubFile:
    size, git_id, lfs = row.get("size"), row.get("blobId"), row.get("lfs")
    if not isinstance(size, int) or isinstance(size, bool) or not 0 <= size < 2**53:
        raise RemoteError(f"the hub gives {str(size)[:40]} as a size")
    git_id = git_id if isinstance(git_id, str) and COMMIT.fullmatch(git_id) else None
    digest = None
    if isinstance(lfs, dict):
        try:
            digest = Digest("sha256", _text(lfs, "sha256"))
        except ReferenceSyntaxError as error:
            raise RemoteError(f"the hub gives what is no digest: {error}") from error
    if digest is None and git_id is None:
        raise RemoteError("the hub gives no hash for a file, so that nothing could be checked")
    return HubFile(size, digest, git_id)


def _mapping(value: Json) -> dict[str, Json]:
    if not isinstance(value, dict):
        raise RemoteError("the hub answered something else than was asked for")
    return value


def _text(row: Mapping[str, Json], key: str) -> str:
    value = row.get(key)
    if not isinstance(value, str):
        raise RemoteError(f"the hub gives {str(value)[:40]!r} as {key}")
    return value


def _commit(row: Mapping[str, Json], key: str) -> str:
    commit = _text(row, key)
    if not COMMIT.fullmatch(commit):
        raise RemoteError(f"the hub gives {commit[:60]!r} as a commit")
    return commit
