"""Which files a repository holds, against a reading of every record of its histories."""

from contextlib import contextmanager
from dataclasses import replace
from itertools import count

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loraforge_registry.digest import Digest
from loraforge_registry.errors import NotFoundError
from loraforge_registry.git import Signature
from loraforge_registry.repositories import (
    CommitRecord,
    CommittedFile,
    RepositoryRecord,
    encode_commit,
    encode_repository,
)
from loraforge_registry.server import holdings, run
from loraforge_registry.server.accounts import User
from loraforge_registry.server.holdings import Nameable, blobs_of
from loraforge_registry.server.hub import Settings
from loraforge_registry.server.recent import Recent
from loraforge_registry.server.repos import Repository

PATHS = st.sampled_from("abcd")
CHANGES = st.dictionaries(PATHS, st.none() | st.integers(0, 9), max_size=3)


@contextmanager
def hub_at(path):
    hub, pins = run.open_hub(path, Settings())
    yield hub
    pins.close()


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    with hub_at(tmp_path_factory.mktemp("hub") / "store") as hub:
        yield hub


def child(parent, changes, number):
    """A commit that changes and deletes files of another."""
    files = dict(parent.files) if parent else {}
    for path, content in changes.items():
        files.pop(path, None)
        if content is not None:
            files[path] = CommittedFile(Digest.of(b"%d" % content), content)
    made = CommitRecord(files, Signature("me", number), str(number))
    return made if parent is None else replace(made, parent=Digest.of(encode_commit(parent)), parent_id=parent.id)


def held(records, heads):
    found = {}
    for head in heads:
        following = head
        while following is not None:
            found |= records[following].blobs
            following = records[following].parent
    return found


NAMES = count()


@given(
    st.lists(st.tuples(st.integers(0, 50), CHANGES), min_size=1, max_size=12),
    st.lists(st.lists(st.integers(0, 50), min_size=1, max_size=3), min_size=1, max_size=4),
)
def test_it_is_what_every_record_says(hub, picks, asked):
    commits, name = [], f"r{next(NAMES)}"
    for number, (pick, changes) in enumerate(picks):
        commits.append(child(None if pick % (number + 1) == number else commits[pick % (number + 1)], changes, number))
    records = {hub.refs.put_record(encode_commit(commit)): commit for commit in commits}
    for numbers in asked:
        heads = [list(records)[n % len(records)] for n in numbers]
        record = RepositoryRecord("me/r", 0, branches={f"b{n}": head for n, head in enumerate(heads)})
        repository = Repository(name, record, Digest.of(encode_repository(record)))
        assert blobs_of(hub, repository) == held(records, heads)


def test_what_cannot_be_read_is_not_passed_over(hub):
    gone = child(None, {"a": 1}, 1000)
    head = hub.refs.put_record(encode_commit(child(gone, {"b": 2}, 1001)))
    record = RepositoryRecord("me/r", 0, branches={"main": head})
    with pytest.raises(NotFoundError):
        blobs_of(hub, Repository("gone", record, Digest.of(encode_repository(record))))
    hub.refs.put_record(encode_commit(gone))
    assert len(blobs_of(hub, Repository("gone", record, Digest.of(encode_repository(record))))) == 2


def test_a_repository_that_is_damaged_is_in_nobodys_way(tmp_path):
    with hub_at(tmp_path / "store") as hub:
        digest, size = hub.blobs.put([b"file"])
        whole = replace(child(None, {}, 2000), files={"a": CommittedFile(digest, size)})
        broken = child(child(None, {"a": 1}, 2001), {"b": 2}, 2002)
        for name, commit in (("me--a", broken), ("me--b", whole), ("me--d", broken)):
            record = RepositoryRecord(name, 0, branches={"main": hub.refs.put_record(encode_commit(commit))})
            assert hub.refs.swap(name, None, hub.refs.put_record(encode_repository(record)), who="me", what="test")
        mine = Repository("me--c", RepositoryRecord("me/c", 0), digest)
        nameable = Nameable(hub, User("me", frozenset()), mine)
        assert nameable.size(digest) == size
        assert nameable.size(hub.blobs.put([b"1"])[0]) is None


@pytest.mark.parametrize("most", [400_000, 10])
def test_each_record_is_read_once(tmp_path, monkeypatch, most):
    monkeypatch.setattr(holdings, "_MOST", most)
    monkeypatch.setattr(holdings, "_HELD", Recent(most))
    with hub_at(tmp_path / "store") as hub:
        commit, digests = None, []
        for number in range(20):
            commit = child(commit, {"a": number, "b": 3}, 5000 + number)
            digests.append(hub.refs.put_record(encode_commit(commit)))
        read, real = [], hub.refs.blobs
        monkeypatch.setattr(hub.refs, "blobs", lambda digest: read.append(digest) or real(digest))
        for end in (10, 20):
            record = RepositoryRecord("me/r", 0, branches={"main": digests[end - 1]})
            # content 3 is both a file that stays and one of those that change
            assert len(blobs_of(hub, Repository("once", record, Digest.of(encode_repository(record))))) == end
        assert sorted(map(str, read)) == sorted(map(str, digests))
