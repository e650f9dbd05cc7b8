"""What comes before a commit, against a walk that remembers nothing."""

import sqlite3
from contextlib import closing
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loraforge_registry import index, objects
from loraforge_registry.digest import Digest
from loraforge_registry.errors import NotFoundError
from loraforge_registry.git import Signature
from loraforge_registry.manifest import RECORD_FILE
from loraforge_registry.repositories import (
    CommitRecord,
    CommittedFile,
    Outline,
    RepositoryRecord,
    encode_commit,
    encode_repository,
    outline,
)
from loraforge_registry.server.local import LocalRefs, Pins
from loraforge_registry.server.pasts import Pasts
from loraforge_registry.store import Store

# commit n stands on one of the commits before it, or on nothing
FORESTS = st.lists(st.integers(0, 1000), min_size=1, max_size=30).map(
    lambda picks: [None if pick % (n + 1) == n else pick % (n + 1) for n, pick in enumerate(picks)]
)


def digest_of(number):
    return Digest.of(b"commit %d" % number)


def id_of(number):
    return digest_of(number // 2).hex[:40]  # two records can have one id


class Histories:
    """Commits that can be read, but for those that are away."""

    def __init__(self, forest):
        self.outlines = {
            digest_of(n): Outline(id_of(n), None if parent is None else digest_of(parent), None, n)
            for n, parent in enumerate(forest)
        }
        self.away, self.reads = set(), 0

    def past(self, digest):
        following = digest
        while following is not None:
            if following in self.away:
                raise NotFoundError(str(following))
            self.reads += 1
            yield following, self.outlines[following]
            following = self.outlines[following].parent

    def walk(self, heads):
        found, whole = {}, True
        for head in heads:
            try:
                for digest, outline in self.past(head):
                    if digest in found:
                        break
                    found[digest] = outline
            except NotFoundError:
                whole = False
        return list(found.items()), whole


@given(FORESTS, st.lists(st.tuples(st.lists(st.integers(0, 29), max_size=4), st.sets(st.integers(0, 29), max_size=3))))
@pytest.mark.parametrize("limit", [0, 5, 1000])
def test_it_is_what_a_walk_finds(limit, forest, asked):
    histories, pasts = Histories(forest), Pasts(limit)

    def expected(away, heads):
        pasts._begin()
        known = set(pasts._places)  # that is here, though it be away now
        histories.away = away - known
        found = histories.walk(heads)
        histories.away = away
        return found

    for numbers, missing in asked:
        heads, away = [digest_of(n % len(forest)) for n in numbers], {digest_of(n) for n in missing}
        commits, whole = expected(away, heads)
        found, problem = pasts.walk(histories.past, heads)
        assert (found, problem is None) == (commits, whole)
        for identity in map(id_of, range(len(forest))):
            commits, whole = expected(away, heads)
            these = {digest for digest, outline in commits if outline.id == identity}
            if these or whole:
                assert pasts.find(histories.past, iter(heads), identity) in (these or {None})
            else:
                with pytest.raises(NotFoundError):
                    pasts.find(histories.past, heads, identity)


def test_a_history_is_read_once_and_goes_on():
    histories, pasts = Histories([None, *range(999)]), Pasts(5000)
    for number in (499, 500, 999, 999, 10):
        assert len(pasts.walk(histories.past, [digest_of(number)])[0]) == number + 1
        assert pasts.find(histories.past, [digest_of(number)], id_of(4)) in (digest_of(4), digest_of(5))
    assert histories.reads == 1000
    assert len(pasts._chains) == 1


def test_a_history_that_is_longer_than_the_limit_is_read_once():
    histories, pasts = Histories([None, *range(999)]), Pasts(100)
    for number in (500, *range(500, 1000)):
        assert pasts.find(histories.past, [digest_of(number)], id_of(4)) in (digest_of(4), digest_of(5))
    assert histories.reads == 1000
    assert len(pasts._places) == 1000


def test_what_is_no_more_asked_for_goes():
    histories, pasts = Histories([None if n % 10 == 0 else n - 1 for n in range(1000)]), Pasts(100)
    for number in range(9, 1000, 10):
        assert pasts.find(histories.past, [digest_of(number)], id_of(number - 4)) is not None
        assert len(pasts._places) <= 110


def test_what_is_mended_is_read_on():
    histories, pasts = Histories([None, 0, 1, 2]), Pasts(5000)
    histories.away = {digest_of(1)}
    found, problem = pasts.walk(histories.past, [digest_of(3)])
    assert [digest for digest, _ in found] == [digest_of(3), digest_of(2)]
    assert isinstance(problem, NotFoundError)
    histories.away = set()
    found, problem = pasts.walk(histories.past, [digest_of(3)])
    assert [digest for digest, _ in found] == [digest_of(n) for n in (3, 2, 1, 0)]
    assert problem is None


# --- what the index remembers -------------------------------------------------------------------------------------


@pytest.fixture
def refs(tmp_path):
    store = Store(tmp_path / "store")
    pins = Pins(store._writable())
    yield LocalRefs(store._writable(), pins)
    pins.close()


@pytest.fixture
def history(refs):
    """A hundred commits, newest first, as their records say."""
    record = {RECORD_FILE: CommittedFile(Digest.of(b"record"), 6, "ab" * 20)}
    commit, found = CommitRecord(record, Signature("me", 5), "0"), []
    for number in range(1, 101):
        data = encode_commit(commit)
        found.append((refs.put_record(data), outline(data)))
        held = Digest.of(b"adapter") if number % 3 else None
        commit = replace(commit, message=str(number), parent=found[-1][0], parent_id=commit.id, adapter=held)
    return found[::-1]


def test_the_index_remembers_what_was_read(refs, history, tmp_path, monkeypatch):
    assert list(refs.past(history[0][0])) == history
    assert dict(history[1:]).items() == index.read_outlines(tmp_path / "store", history[1][0]).items()
    read, real = [], objects.read_all
    monkeypatch.setattr(objects, "read_all", lambda *given: read.append(given[2]) or real(*given))
    assert list(refs.past(history[0][0])) == history
    assert read == [digest for digest, _ in history[:8]]


def test_a_history_goes_on_behind_what_the_index_remembers(refs, history, tmp_path):
    for digest, _ in (history[40], history[20], history[0]):
        assert list(refs.past(digest)) == history[[d for d, _ in history].index(digest) :]
    remembered = index.read_outlines(tmp_path / "store", history[0][0])
    assert remembered.items() == dict(history).items()


def damage(what):
    def by(path):
        with closing(sqlite3.connect(path)) as database, database:
            database.execute(what)

    return by


@pytest.mark.parametrize(
    "damaged",
    [
        lambda path: path.unlink(),
        lambda path: path.write_bytes(b"not a database, though as long as one" * 400),
        lambda path: path.write_bytes(path.read_bytes()[:9000]),
        damage("DROP TABLE outline"),
        damage("UPDATE outline SET row = substr(row, 1, 50) WHERE rowid % 7 = 0"),
        damage("UPDATE outline SET row = 'text', check_sum = 5 WHERE rowid % 7 = 0"),
        damage("UPDATE outline SET check_sum = NULL WHERE rowid % 7 = 0"),
        damage("UPDATE outline SET parent = digest WHERE rowid % 7 = 0"),
        damage("UPDATE outline SET parent = (SELECT max(digest) FROM outline)"),
        damage("DELETE FROM outline WHERE rowid % 7 = 0"),
    ],
)
def test_a_damaged_index_changes_no_answer(refs, history, tmp_path, damaged):
    list(refs.past(history[0][0]))
    damaged(tmp_path / "store" / "index.sqlite")
    for _ in range(2):
        assert list(refs.past(history[0][0])) == history
    assert len(index.read_outlines(tmp_path / "store", history[0][0])) > 8, "mended, or begun again"


def forge(store, digest, row):
    with closing(sqlite3.connect(store / "index.sqlite")) as database, database:
        values = row, index._check_sum(digest.raw, row), digest.raw
        database.execute("UPDATE outline SET row = ?, check_sum = ? WHERE digest = ?", values)


@pytest.mark.parametrize("row", [b"\x96\x01", b"\x92\x01\x01", b"\x96\x01" + b"\x01" * 5, b"\x95\x01\xc1"])
def test_a_row_that_says_nothing_changes_no_answer(refs, history, tmp_path, row):
    list(refs.past(history[0][0]))
    forge(tmp_path / "store", history[50][0], row)
    assert list(refs.past(history[0][0])) == history


def test_an_index_that_leads_round_in_a_circle_ends(refs, history, tmp_path):
    list(refs.past(history[0][0]))
    digest, said = history[50]
    forge(tmp_path / "store", digest, index._pack_outline(replace(said, parent=history[20][0])))
    assert [found for found, _ in refs.past(history[0][0])] == [digest for digest, _ in history[:51]]


def test_a_record_that_is_no_commit_has_no_past(refs):
    made = refs.put_record(encode_repository(RepositoryRecord("me/x", 0)))
    assert list(refs.past(made)) == []
