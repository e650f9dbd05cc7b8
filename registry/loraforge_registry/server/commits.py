"""Commits: asked for line by line, built on what the branch is at that moment, moved there by compare-and-swap."""

import binascii
import json
import time
from base64 import b64decode
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from starlette.responses import JSONResponse, Response

from loraforge_registry.digest import Digest
from loraforge_registry.errors import ManifestError
from loraforge_registry.git import Signature, blob_id
from loraforge_registry.repositories import CommitRecord, CommittedFile, check_path, check_paths, encode_commit
from loraforge_registry.server import gate, quota, repos
from loraforge_registry.server.accounts import User
from loraforge_registry.server.api import TRIES, known
from loraforge_registry.server.call import Call, is_hex, list_field, size_field, text_field
from loraforge_registry.server.errors import RefusedError, bad_request, no_entry, no_revision, too_large
from loraforge_registry.server.holdings import Nameable
from loraforge_registry.server.hub import Hub
from loraforge_registry.server.repos import Repository, Revision, revision_of

MAX_LINE = 1024 * 1024  # beside the contents of a file
MAX_MESSAGE = 64 * 1024


@dataclass
class Wanted:
    """What a commit asks for, read and stored, but for the tree."""

    message: str = ""
    parent: str | None = None
    files: dict[str, CommittedFile] = field(default_factory=dict)
    deleted: list[str] = field(default_factory=list)
    deleted_below: list[str] = field(default_factory=list)


def preupload(hub: Hub, call: Call) -> Response:
    """POST /api/models/{id}/preupload/{rev}: which files go into the commit itself, and which apart."""
    repository = repos.find_to_write(hub, call.segments["id"], call.user)
    revision = repos.resolve(hub, repository, call.segments["rev"])
    listed = [_preupload(hub, revision.commit, entry) for entry in list_field(call.json(), "files", 1000)]
    return JSONResponse({"files": listed, "commitOid": revision.id})


def commit(hub: Hub, call: Call) -> Response:
    """POST /api/models/{id}/commit/{rev}: lines of JSON, as the Hub's clients write them."""
    user = known(call)
    repository = repos.find_to_write(hub, call.segments["id"], user)
    if call.query.get("create_pr", "").lower() in ("1", "true"):
        raise bad_request("this server has no pull requests: commit to a branch (revision=...)")
    branch = call.segments["rev"].removeprefix("refs/heads/")
    if branch not in repository.record.branches:
        raise no_revision(branch[:200])
    wanted = _read(hub, call, user, repository)
    found = _commit(hub, user, repository.id, branch, wanted)
    return JSONResponse(
        {
            "success": True,
            "commitOid": found.id,
            "commitUrl": f"{call.endpoint}/{repository.id}/commit/{found.id}",
            "hookOutput": "",
        }
    )


def _preupload(hub: Hub, now: CommitRecord, entry: object) -> dict[str, object]:
    if not isinstance(entry, dict):
        raise bad_request("an entry of files is no object")
    path, size = _path(entry), size_field(entry, "size")
    if gate.is_left_out(path):
        return {"path": path, "uploadMode": "regular", "shouldIgnore": True}
    gate.check_path(path)
    if size > hub.settings.max_file:
        raise too_large(f"{path} has {size} bytes; the limit of this server is {hub.settings.max_file}")
    try:
        sample = b64decode(text_field(entry, "sample", ""), validate=True)
    except binascii.Error as error:
        raise bad_request(f"the sample of {path} is not base64") from error
    inline = size <= hub.settings.inline_below and b"\0" not in sample and not path.endswith(".safetensors")
    said: dict[str, object] = {"path": path, "uploadMode": "regular" if inline else "lfs", "shouldIgnore": False}
    there = now.files.get(path)
    if there is not None and (not inline or there.blob is not None):
        said["oid"] = there.blob if inline else there.digest.hex
    return said


def _read(hub: Hub, call: Call, user: User, repository: Repository) -> Wanted:
    """Read the lines, and store the files that lie in them as they come."""
    wanted, nameable = Wanted(), Nameable(hub, user, repository)
    for key, value in _lines(hub, call):
        if key == "header":
            summary = text_field(value, "summary", "")
            description = text_field(value, "description", "") if value.get("description") else ""
            wanted.message = f"{summary}\n\n{description}".strip("\n")[:MAX_MESSAGE].replace("\0", "")
            wanted.parent = value.get("parentCommit") or None
        elif key == "file":
            _take(wanted, _path(value), _inline(hub, value))
        elif key == "lfsFile":
            _take(wanted, _path(value), _uploaded(nameable, value))
        elif key == "deletedFile":
            wanted.deleted.append(_path(value))
        elif key == "deletedFolder":
            wanted.deleted_below.append(text_field(value, "path").rstrip("/"))
        else:
            raise bad_request(f"a commit has no operation {str(key)[:40]!r}")
    for path, file in wanted.files.items():
        gate.check_path(path)
        gate.check_file(hub, path, file)
    quota.check(hub, repository.namespace, {file.digest: file.size for file in wanted.files.values()})
    return wanted


def _take(wanted: Wanted, path: str, file: CommittedFile) -> None:
    if wanted.files.setdefault(path, file) != file:
        raise bad_request(f"{path} is twice in one commit")


def _lines(hub: Hub, call: Call) -> Iterator[tuple[str, dict[str, Any]]]:
    kept = bytearray()
    for piece in call.pieces(hub.settings.max_commit):
        kept += piece
        *lines, rest = kept.split(b"\n") if b"\n" in piece else (kept,)
        kept = bytearray(rest)
        if len(kept) > hub.settings.max_inline * 4 // 3 + MAX_LINE:
            raise too_large(f"a file of more than {hub.settings.max_inline} bytes in a commit itself: send it apart")
        yield from (_line(bytes(line)) for line in lines if line.strip())
    if kept.strip():
        yield _line(bytes(kept))


def _line(line: bytes) -> tuple[str, dict[str, Any]]:
    try:
        found = json.loads(line)
        key, value = found["key"], found["value"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise bad_request("a line of the commit is no JSON object with key and value") from error
    if not isinstance(value, dict):
        raise bad_request("the value of a line of the commit is no object")
    return key, value


def _path(value: Mapping[str, object]) -> str:
    path = text_field(value, "path")
    try:
        check_path(path)
    except ManifestError as error:
        raise bad_request(str(error)) from error
    return path


def _inline(hub: Hub, value: Mapping[str, object]) -> CommittedFile:
    content = value.get("content")
    if not isinstance(content, str) or value.get("encoding", "base64") not in ("base64", "utf-8"):
        raise bad_request("a file's content is not a text in base64")
    try:
        data = b64decode(content, validate=True) if value.get("encoding", "base64") == "base64" else content.encode()
    except (binascii.Error, ValueError) as error:
        raise bad_request("a file's content is not base64") from error
    if len(data) > hub.settings.max_inline:
        raise too_large(f"a file of {len(data)} bytes in a commit itself; the limit is {hub.settings.max_inline}")
    digest, size = hub.blobs.put([data])
    return CommittedFile(digest, size, blob_id(data))


def _uploaded(nameable: Nameable, value: Mapping[str, object]) -> CommittedFile:
    """The file that a line names by digest: this user sent it, or may read it somewhere."""
    oid = value.get("oid")
    if not isinstance(oid, str) or not is_hex(oid, 64) or value.get("algo", "sha256") != "sha256":
        raise bad_request("an lfsFile without the sha256 of a file")
    digest = Digest("sha256", oid)
    size = nameable.size(digest)
    if size is None:
        raise bad_request(f"{oid} was not uploaded: send the file first, then commit")
    if value.get("size") not in (None, size):
        raise bad_request(f"{oid} has {size} bytes, the commit says otherwise")
    return CommittedFile(digest, size)


def _commit(hub: Hub, user: User, identity: str, branch: str, wanted: Wanted) -> Revision:
    tried = list[CommitRecord]()  # what weights hold is read once, however often others are first
    for _ in range(TRIES):
        repository = repos.find_to_write(hub, identity, user)
        head = repository.record.branches.get(branch)
        if head is None:
            raise no_revision(branch[:200])
        now = revision_of(hub, head)
        if wanted.parent is not None and wanted.parent != now.id:
            return _replayed(now, wanted)
        files = _apply(now, wanted)
        if files == now.commit.files:
            return now  # nothing changes: the same commit, sent again, or one that does nothing
        made = _record(user, now, files, gate.artifact_of(hub, files, [now.commit, *tried]), wanted.message)
        tried = [made]
        new = hub.refs.put_record(encode_commit(made))
        record = replace(repository.record, branches={**repository.record.branches, branch: new})
        if repos.change(hub, repository, record, user=user, what=f"commit to {branch}"):
            return revision_of(hub, new)
    raise RefusedError(503, f"{identity} changes all the time: try again", headers={"Retry-After": "1"})


def _replayed(now: Revision, wanted: Wanted) -> Revision:
    """Return the head, if it is what this very commit made of the parent that it names: its answer was lost.

    Raises:
        RefusedError: 412, somebody else has committed.
    """
    made_here = now.commit.parent_id == wanted.parent
    if made_here and all(now.commit.files.get(path) == file for path, file in wanted.files.items()):
        gone = all(path not in now.commit.files for path in wanted.deleted)
        if gone and now.commit.message == wanted.message:
            return now
    raise RefusedError(412, "A commit has happened since. Please refresh and try again.", "PreconditionFailed")


def _apply(now: Revision, wanted: Wanted) -> dict[str, CommittedFile]:
    files = dict(now.commit.files)
    for path in wanted.deleted:
        if files.pop(path, None) is None:
            raise no_entry(path, now.id)
    for folder in wanted.deleted_below:
        inside = [path for path in files if path.startswith(f"{folder}/")]
        if not inside:
            raise no_entry(folder[:200], now.id)
        for path in inside:
            del files[path]
    files |= wanted.files
    try:
        check_paths(files)
    except ManifestError as error:
        raise bad_request(str(error)) from error
    return files


def _record(
    user: User, now: Revision, files: Mapping[str, CommittedFile], adapter: Digest | None, message: str
) -> CommitRecord:
    # never before its parent: a list of commits is in the order of their times
    author = Signature(user.name, max(int(time.time()), now.commit.author.time))
    return CommitRecord(files, author, message, parent=now.digest, parent_id=now.id, adapter=adapter)
