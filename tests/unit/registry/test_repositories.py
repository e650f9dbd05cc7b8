"""Records of repositories and commits: git's own ids, one spelling, nothing false."""

import subprocess
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loraforge_registry import canonical, git
from loraforge_registry.digest import Digest
from loraforge_registry.errors import ManifestError
from loraforge_registry.records import decode_record
from loraforge_registry.repositories import (
    CommitRecord,
    CommittedFile,
    Outline,
    RepositoryRecord,
    blobs_in,
    encode_commit,
    encode_repository,
    outline,
    repository_name,
)

FILES = {
    "README.md": b"# card\n",
    "a/b/c.txt": b"c",
    "a/b.txt": b"b",
    "a-b": b"before a/ in git's order",
    "a.txt": b"",
    "größe/x": b"x",
}


def commit(**named):
    files = {path: CommittedFile(Digest.of(data), len(data), git.blob_id(data)) for path, data in FILES.items()}
    files["w.safetensors"] = CommittedFile(Digest.of(b"w"), 1)
    first = CommitRecord(files, git.Signature("alice", 1_700_000_000), "title\n\nmessage é")
    return replace(first, **named)


def test_ids_are_those_that_git_gives(tmp_path):
    """The same files, committed by git itself."""
    environment = {"GIT_CONFIG_GLOBAL": "/dev/null", "GIT_CONFIG_NOSYSTEM": "1", "PATH": "/usr/bin:/bin"}
    for role in ("AUTHOR", "COMMITTER"):
        environment |= {f"GIT_{role}_NAME": "alice", f"GIT_{role}_EMAIL": "alice@loraforge"}
        environment[f"GIT_{role}_DATE"] = "1700000000 +0000"

    def run(*arguments, data=None):
        command = ["git", "-C", tmp_path, *arguments]
        return subprocess.run(command, check=True, env=environment, input=data, capture_output=True).stdout.strip()

    run("init", "-q")
    for path, data in (*FILES.items(), ("w.safetensors", git.pointer(Digest.of(b"w"), 1))):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_bytes(data)
    run("add", "-A")
    tree = run("write-tree").decode()
    first = run("commit-tree", tree, data=commit().message.encode()).decode()
    assert commit().id == first
    second = run("commit-tree", tree, "-p", first, data=b"two").decode()
    assert commit(message="two", parent=Digest.of(b"p"), parent_id=first).id == second


def test_a_record_comes_back_and_a_false_id_does_not():
    one = commit(adapter=Digest.of(b"adapter"))
    data = encode_commit(one)
    assert decode_record(data) == one
    fields = canonical.decode(data)
    for key, value in (("message", "other"), ("time", 1), ("author", "bob"), ("parent", bytes(32)), ("id", bytes(20))):
        with pytest.raises(ManifestError):
            decode_record(canonical.encode({**fields, key: value}))
    with pytest.raises(ManifestError):
        decode_record(canonical.encode({**fields, "files": fields["files"][::-1]}))


@given(st.dictionaries(st.text(min_size=1, max_size=8), st.binary(min_size=32, max_size=32), max_size=4), st.booleans())
def test_a_repository_comes_back(names, private):
    table = {name: Digest.from_raw("sha256", raw) for name, raw in names.items()}
    one = RepositoryRecord("Me/It", 5, private=private, branches=table, tags=dict(list(table.items())[:2]))
    assert decode_record(encode_repository(one)) == one
    assert set(one.needs) == set(table.values())


@given(st.binary(max_size=200))
def test_bad_bytes_are_only_refused(data):
    with pytest.raises(ManifestError):
        decode_record(data)


def test_an_outline_is_what_a_whole_reading_says():
    first = commit()
    second = replace(first, parent=Digest.of(encode_commit(first)), parent_id=first.id)
    for made in (first, second):
        assert outline(encode_commit(made)) == Outline(made.id, made.parent, made.adapter, made.author.time)
        assert blobs_in(encode_commit(made)) == made.blobs
    for read in (outline, blobs_in):
        assert read(encode_repository(RepositoryRecord("me/x", 0))) is None


def test_a_file_is_no_directory():
    files = {"a": CommittedFile(Digest.of(b""), 0, git.blob_id(b"")), "a/b": CommittedFile(Digest.of(b""), 0)}
    with pytest.raises(ManifestError, match="a file already"):
        encode_commit(commit(files=files))


def test_an_id_is_one_name():
    assert repository_name("Me/French-LoRA") == "me--french-lora"
