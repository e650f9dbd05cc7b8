"""The records of a repository that a server keeps, and of its commits (SPEC.md section 13)."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import msgpack

from loraforge_registry import canonical, git
from loraforge_registry.canonical import Value
from loraforge_registry.digest import Digest
from loraforge_registry.errors import ManifestError
from loraforge_registry.fields import check_schema, integer, keys, mapping, raw_digest, typed
from loraforge_registry.manifest import CONFIG_FILE, RECORD_FILE

COMMIT_SCHEMA = "loraforge.commit/1"
SCHEMA = "loraforge.repository/1"
MAX_FILES = 10_000
MAX_PATH = 1024
MAX_REVISIONS = 10_000
_SEPARATORS = ("", ".", "..", ".git")


@dataclass(frozen=True, slots=True)
class CommittedFile:
    """One file of a commit. ``blob`` is its id where git itself holds it, and None where LFS does."""

    digest: Digest
    size: int
    blob: str | None = None

    @property
    def oid(self) -> str:
        """The id by which git's tree knows it: of its bytes, or of the pointer to them."""
        return self.blob or git.blob_id(git.pointer(self.digest, self.size))

    @property
    def etag(self) -> str:
        """What a client compares a download with: SHA-256 of a file in LFS, git's id of any other."""
        return self.blob or self.digest.hex


@dataclass(frozen=True, slots=True)
class CommitRecord:
    """All files of a repository at one moment; ``adapter`` is the artifact that its root is, where it is one."""

    files: Mapping[str, CommittedFile]
    author: git.Signature
    message: str
    parent: Digest | None = None
    parent_id: str | None = None
    adapter: Digest | None = None

    @property
    def id(self) -> str:
        """Git's id, which clients cache for ever."""
        tree = git.tree_ids({path: file.oid for path, file in self.files.items()})[""]
        return git.commit_id(tree, [self.parent_id] if self.parent_id else [], self.author, self.message)

    @property
    def stated(self) -> CommittedFile | None:
        """The record at its root where no adapter is there: it may be that of a tree (SPEC.md section 15)."""
        return None if CONFIG_FILE in self.files else self.files.get(RECORD_FILE)

    @property
    def blobs(self) -> Mapping[Digest, int]:
        """Its files."""
        return {file.digest: file.size for file in self.files.values()}

    @property
    def needs(self) -> tuple[Digest, ...]:
        """The commit before it, and the adapter that it holds."""
        return tuple(digest for digest in (self.parent, self.adapter) if digest is not None)

    @property
    def lineage(self) -> tuple[Digest, ...]:
        """Its adapter has one; it has none."""
        return ()


@dataclass(frozen=True, slots=True)
class Outline:
    """What a walk along a history needs of a commit; ``stated`` is as that of ``CommitRecord``."""

    id: str
    parent: Digest | None
    adapter: Digest | None
    time: int
    stated: CommittedFile | None = None


@dataclass(frozen=True, slots=True)
class RepositoryRecord:
    """What a repository is at one moment: its id as it was spelt, and the commits that its branches and tags mean."""

    id: str
    created: int
    private: bool = False
    branches: Mapping[str, Digest] = field(default_factory=dict)
    tags: Mapping[str, Digest] = field(default_factory=dict)

    @property
    def blobs(self) -> Mapping[Digest, int]:
        """Its commits have them."""
        return {}

    @property
    def needs(self) -> tuple[Digest, ...]:
        """The commits that have names."""
        return tuple(dict.fromkeys((*self.branches.values(), *self.tags.values())))

    @property
    def lineage(self) -> tuple[Digest, ...]:
        """What it was before is in the reflog."""
        return ()

    def named(self, revision: str) -> Digest | None:
        """The commit that a branch or a tag means; a branch goes first."""
        return self.branches.get(revision) or self.tags.get(revision)


def encode_commit(commit: CommitRecord) -> bytes:
    """Return the canonical bytes; ``decode_record(encode_commit(c)) == c``.

    Raises:
        ManifestError: a path that cannot be one, or too many.
    """
    check_paths(commit.files)
    return canonical.encode(
        {
            "schema": COMMIT_SCHEMA,
            "adapter": None if commit.adapter is None else commit.adapter.raw,
            "author": commit.author.name,
            "files": [_file_out(path, file) for path, file in sorted(commit.files.items())],
            "id": bytes.fromhex(commit.id),
            "message": commit.message,
            "parent": None if commit.parent is None else commit.parent.raw,
            "parent_id": None if commit.parent_id is None else bytes.fromhex(commit.parent_id),
            "time": commit.author.time,
        }
    )


def commit_of(fields: dict[str, Value]) -> CommitRecord:
    """Read the record of a commit that was unpacked.

    Raises:
        ManifestError: of another schema, or its id is not that of what it holds.
    """
    check_schema(fields.get("schema"), COMMIT_SCHEMA)
    keys("commit", fields, "schema adapter author files id message parent parent_id time")
    listed = [_file(entry) for entry in typed("files", fields["files"], list)]
    commit = CommitRecord(
        files=dict(listed),
        author=git.Signature(typed("author", fields["author"], str), integer("time", fields["time"])),
        message=typed("message", fields["message"], str),
        parent=_maybe_digest(fields["parent"]),
        parent_id=_maybe_id(fields["parent_id"]),
        adapter=_maybe_digest(fields["adapter"]),
    )
    check_paths(commit.files)
    if [path for path, _ in listed] != sorted(commit.files):
        raise ManifestError("the files of a commit are not in order, or a path is there twice")
    if (commit.parent is None) != (commit.parent_id is None):
        raise ManifestError("a commit with half a parent")
    if commit.id != _maybe_id(fields["id"]):
        raise ManifestError(f"a commit whose id is {commit.id} by its contents, and another by its record")
    return commit


def outline(data: bytes) -> Outline | None:
    """Return the outline of a commit, without looking at its files; None for any other record.

    For walking along a history whose records have the digests under which they were checked when they were written.

    Cost: a tenth of ``commit_of``.
    """
    fields = _fields_of_commit(data)
    if fields is None:
        return None
    parent, adapter = (
        None if raw is None else Digest("sha256", raw.hex()) for raw in (fields["parent"], fields["adapter"])
    )
    return Outline(fields["id"].hex(), parent, adapter, fields["time"], None if adapter else _stated(fields["files"]))


def blobs_in(data: bytes) -> dict[Digest, int] | None:
    """Return ``CommitRecord.blobs`` as ``outline`` returns an outline; None for any other record."""
    fields = _fields_of_commit(data)
    if fields is None:
        return None
    return {Digest("sha256", row["digest"].hex()): row["size"] for row in fields["files"]}


def _fields_of_commit(data: bytes) -> dict[str, Any] | None:
    fields: dict[str, Any] = msgpack.unpackb(data)
    return fields if fields.get("schema") == COMMIT_SCHEMA else None


def _stated(files: list[dict[str, Any]]) -> CommittedFile | None:
    """As ``CommitRecord.stated``."""
    found = {row["path"]: row for row in files if row["path"] in (CONFIG_FILE, RECORD_FILE)}
    row = None if CONFIG_FILE in found else found.get(RECORD_FILE)
    if row is None:
        return None
    blob = row["blob"]
    return CommittedFile(Digest("sha256", row["digest"].hex()), row["size"], None if blob is None else blob.hex())


def encode_repository(repository: RepositoryRecord) -> bytes:
    """Return the canonical bytes; ``decode_record(encode_repository(r)) == r``."""
    return canonical.encode(
        {
            "schema": SCHEMA,
            "branches": {name: digest.raw for name, digest in repository.branches.items()},
            "created": repository.created,
            "id": repository.id,
            "private": repository.private,
            "tags": {name: digest.raw for name, digest in repository.tags.items()},
        }
    )


def repository_of(fields: dict[str, Value]) -> RepositoryRecord:
    """Read the record of a repository that was unpacked.

    Raises:
        ManifestError: of another schema, or with a field missing, unknown or of a wrong type.
    """
    check_schema(fields.get("schema"), SCHEMA)
    keys("repository", fields, "schema branches created id private tags")
    return RepositoryRecord(
        id=typed("id", fields["id"], str),
        created=integer("created", fields["created"]),
        private=typed("private", fields["private"], bool),
        branches=_revisions("branches", fields["branches"]),
        tags=_revisions("tags", fields["tags"]),
    )


def check_paths(paths: Mapping[str, object]) -> None:
    """Refuse paths that could lead out of a directory, or that are a file and a directory at once.

    Raises:
        ManifestError: one of them cannot be the path of a file, or there are too many.
    """
    if len(paths) > MAX_FILES:
        raise ManifestError(f"{len(paths)} files in one commit; the limit is {MAX_FILES}")
    for path in paths:
        check_path(path)
        parts = path.split("/")
        for end in range(1, len(parts)):
            if "/".join(parts[:end]) in paths:
                raise ManifestError(f"{path[:200]!r} lies in what is a file already")


def check_path(path: str) -> None:
    """Refuse what cannot be the path of a file in a repository.

    Raises:
        ManifestError: empty or special parts, a backslash, what does not print, or too long.
    """
    parts = path.split("/")
    if any(part.lower() in _SEPARATORS or len(part.encode(errors="replace")) > 255 for part in parts):
        raise ManifestError(f"{path[:200]!r} is no path of a file: a part of it is empty, special or too long")
    if "\\" in path or not path.isprintable() or len(path) > MAX_PATH or path[1:2] == ":":
        raise ManifestError(f"{path[:200]!r} is no path of a file: expected printable text with / between its parts")


def _file_out(path: str, file: CommittedFile) -> Value:
    blob = None if file.blob is None else bytes.fromhex(file.blob)
    return {"path": path, "digest": file.digest.raw, "size": file.size, "blob": blob}


def _file(value: Value) -> tuple[str, CommittedFile]:
    fields = mapping("file", value, "path digest size blob")
    file = CommittedFile(
        raw_digest("sha256", fields["digest"]), integer("size", fields["size"]), _maybe_id(fields["blob"])
    )
    return typed("path", fields["path"], str), file


def _revisions(what: str, value: Value) -> dict[str, Digest]:
    found: dict[str, Value] = typed(what, value, dict)
    if len(found) > MAX_REVISIONS:
        raise ManifestError(f"{len(found)} {what}; the limit is {MAX_REVISIONS}")
    return {name: raw_digest("sha256", digest) for name, digest in found.items()}


def _maybe_digest(value: Value) -> Digest | None:
    return None if value is None else raw_digest("sha256", value)


def _maybe_id(value: Value) -> str | None:
    if value is None:
        return None
    raw = typed("id", value, bytes)
    if len(raw) != 20:
        raise ManifestError(f"an id of {len(raw)} bytes; git's have 20")
    return raw.hex()


def repository_name(identity: str) -> str:
    """The store's name for a repository: ``Me/French-LoRA`` is ``me--french-lora``. No id holds two dashes."""
    return identity.lower().replace("/", "--")
