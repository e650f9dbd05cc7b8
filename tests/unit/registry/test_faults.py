"""Every call of a push that changes the disk fails, or is the last one: what was there stays, and a retry succeeds."""

import errno
import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from loraforge_registry import refs
from loraforge_registry.digest import Digest
from loraforge_registry.errors import InputOutputError
from loraforge_registry.files import Files
from loraforge_registry.ingest import examine, open_adapter
from loraforge_registry.manifest import encode_manifest
from loraforge_registry.names import RefName
from loraforge_registry.store import Store
from tests.bad_files import config, tensors, write_adapter

CALLS = ("write", "fsync", "fdatasync", "fchmod", "link", "rename", "replace", "unlink", "mkdir", "open", "ftruncate")
REF = RefName("a", "v1")


class KilledError(BaseException):
    """What a killed process looks like from inside: it and every later change to the disk does not happen."""


class Disk:
    """Stands in front of ``os``: records the calls that change the disk, and fails them from the Nth on."""

    def __init__(self, fail_at: int | None, error: Callable[[], BaseException], *, once: bool) -> None:
        self.calls: list[tuple[str, str]] = []
        self._fail_at, self._error, self._once = fail_at, error, once
        self._lock = threading.Lock()

    def call(self, name: str, real: Callable[..., object], *arguments: object, **options: object) -> object:
        if name == "open" and not int(str(arguments[1])) & os.O_CREAT:
            return real(*arguments, **options)
        with self._lock:
            number = len(self.calls)
            self.calls.append((name, place(name, *arguments, **options)))
        if self._fail_at is not None and (number == self._fail_at or (number > self._fail_at and not self._once)):
            raise self._error()
        # tests need no durability, and an fsync takes milliseconds
        return None if name in ("fsync", "fdatasync") else real(*arguments, **options)


def place(name: str, *arguments: object, **options: object) -> str:
    """What a call works on: a path in the store."""
    if name in ("write", "fsync", "fdatasync", "fchmod", "ftruncate"):
        return descriptor(arguments[0])
    directory = options.get("dst_dir_fd", options.get("dir_fd"))
    target = str(arguments[1] if name in ("link", "rename", "replace") else arguments[0])
    return target if directory is None else f"{descriptor(directory)}/{target}"


def descriptor(fd: object) -> str:
    return str(Path(f"/proc/self/fd/{fd}").readlink())


@contextmanager
def disk(
    monkeypatch, fail_at: int | None = None, error: Callable[[], BaseException] = KilledError, *, once: bool = False
) -> Iterator[Disk]:
    recorder = Disk(fail_at, error, once=once)
    with monkeypatch.context() as patch:
        for name in CALLS:
            real = getattr(os, name)
            patch.setattr(os, name, lambda *a, _name=name, _real=real, **o: recorder.call(_name, _real, *a, **o))
        yield recorder


def no_space() -> OSError:
    return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def bad_disk() -> OSError:
    return OSError(errno.EIO, os.strerror(errno.EIO))


def put(path: Path, source: Path) -> Digest:
    with open_adapter(source) as incoming:
        return Store(path).put(incoming, name=REF, force=True).digest


def objects(path: Path) -> dict[str, bytes]:
    found = (
        Path(directory, name)
        for area in ("blobs", "manifests")
        for directory, _, names in os.walk(path / area)
        for name in names
    )
    return {str(file.relative_to(path)): file.read_bytes() for file in found}


def check_whole(path: Path, allowed: set[Digest | None], before: dict[str, bytes]) -> None:
    """The ref has an old or new value, all it means is there, and no object is false or lost."""
    now = objects(path)
    assert all(Digest.of(data).hex == Path(name).name for name, data in now.items())
    assert before.items() <= now.items()
    found = refs.read_ref(Files(path), REF)
    assert found in allowed
    if found is not None:
        manifest = Store(path).manifest(found)
        assert all(
            f"blobs/sha256/{file.digest.hex[:2]}/{file.digest.hex}" in now and file.size for file in manifest.files
        )
        assert [line.problem for line in Store(path).ls()] == [None]


@pytest.fixture
def sources(tmp_path) -> Callable[[int], Path]:
    """Any number of small adapters, all different in every file."""

    def source(number: int) -> Path:
        directory = write_adapter(tmp_path / "sources" / str(number), weights=tensors(0.5 + number))
        (directory / "README.md").write_text(f"adapter {number}")
        return directory

    return source


@pytest.fixture
def store(tmp_path, sources, monkeypatch) -> Path:
    with disk(monkeypatch):
        put(tmp_path / "store", sources(0))
    return tmp_path / "store"


MODES = {
    "bad disk, once": (bad_disk, True),
    "no space": (no_space, False),
    "killed": (KilledError, False),
    "interrupted": (KeyboardInterrupt, True),
}


@pytest.mark.parametrize("mode", MODES)
def test_a_push_that_fails_at_any_call(mode, store, sources, monkeypatch):
    error, once = MODES[mode]
    wrong: list[str] = []
    for number in range(1000):
        old, before = refs.read_ref(Files(store), REF), objects(store)
        source = sources(number + 1)
        new = digest_of(source)
        outcome: BaseException | None = None
        with disk(monkeypatch, number, error, once=once) as recorder:
            try:
                put(store, source)
            except (Exception, KilledError, KeyboardInterrupt) as raised:  # noqa: BLE001 - looked at below
                outcome = raised
        if len(recorder.calls) <= number:
            break
        check_whole(store, {old, new}, before)
        if error in (no_space, bad_disk) and not (isinstance(outcome, InputOutputError) and str(store) in str(outcome)):
            wrong.append(f"{recorder.calls[number]}: {outcome!r}")
        if mode != "killed":
            assert leftovers(store) <= (1 if once else 100)  # only what could not be removed
        with disk(monkeypatch):
            assert put(store, source) == new  # what is left over hinders nobody
        check_whole(store, {new}, before)
    assert outcome is None
    assert number > 20
    assert wrong == []


def digest_of(source: Path) -> Digest:
    """The artifact digest of a source, without a store."""
    with open_adapter(source) as incoming:
        return Digest.of(encode_manifest(examine(incoming)[0]))


def leftovers(store: Path) -> int:
    found = [*(store / "tmp").iterdir(), *(store / "sessions").iterdir()]
    for path in found:
        path.unlink()
    return len(found)


def test_a_store_whose_making_fails_is_finished_by_the_next_push(tmp_path, sources, monkeypatch):
    with disk(monkeypatch) as recorder:
        put(tmp_path / "whole", sources(0))
    making = [number for number, (_, path) in enumerate(recorder.calls) if path.endswith("FORMAT")][-1] + 2
    assert making > 512
    wrong: list[str] = []
    for number in [0, 1, 12, *range(100, making, 200), *range(making - 8, making)]:
        for error in (no_space, KilledError):
            path = tmp_path / "store"
            with disk(monkeypatch, number, error) as recorder, pytest.raises((OSError, KilledError)) as raised:
                put(path, sources(0))
            name, where = recorder.calls[number]
            if error is no_space and not (
                isinstance(raised.value, InputOutputError) and str(path) in str(raised.value)
            ):
                wrong.append(f"{name} of {where}: {raised.value!r}")
            with disk(monkeypatch):
                put(path, sources(0))
                check_whole(path, {refs.read_ref(Files(path), REF)}, {})
            shutil.rmtree(path)
    assert wrong == []


def test_short_writes_go_on(store, sources, monkeypatch):
    real = os.write
    source = sources(1)
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", lambda fd, data: real(fd, bytes(data)[:7]))
        try:
            put(store, source)
        except InputOutputError:
            pass  # a record of the reflog is one write, or refused
        else:
            assert refs.read_ref(Files(store), REF) == digest_of(source)
    assert all(Digest.of(data).hex == Path(name).name for name, data in objects(store).items())
    digest = put(store, source)
    assert [move.new for move in Store(store).reflog("a")][-1] == digest


def test_an_fsync_that_failed_is_not_tried_again(store, sources, monkeypatch):
    for number in range(200):
        with disk(monkeypatch, number, bad_disk, once=True) as recorder:
            try:
                put(store, sources(number + 1))
            except OSError:
                pass
            else:
                break
        name, path = recorder.calls[number]
        if name == "fsync":
            assert ("fsync", path) not in recorder.calls[number + 1 :]


def test_the_order_of_writes(store, sources, monkeypatch):
    source = sources(1)
    (source / "adapter_config.json").write_text(json.dumps(config(lora_alpha=8)))
    with disk(monkeypatch) as recorder:
        digest = put(store, source)
    calls = [(name, path.removeprefix(f"{store}/")) for name, path in recorder.calls]
    published = [number for number, (name, _) in enumerate(calls) if name in ("link", "rename")]
    areas = [calls[number][1].partition("/")[0] for number in published]
    assert areas == ["blobs", "blobs", "blobs", "manifests", "refs"]
    assert calls[published[-1]][1] == "refs/a@v1"
    assert calls[published[-2]][1] == f"manifests/sha256/{digest.hex[:2]}/{digest.hex}"
    starts = [number for number, (name, path) in enumerate(calls) if name == "open" and path.startswith("tmp/")]
    assert len(starts) == len(published)
    for start, link in zip(starts, published, strict=True):
        temporary = calls[start][1]
        own = [name for name, path in calls[start:link] if path == temporary]
        assert own[0] == "open"
        assert "write" in own
        assert own[-2:] == ["fchmod", "fsync"]  # nothing is written behind the fsync, and the fsync is before the name
        directory = calls[link][1].rpartition("/")[0]
        assert ("fsync", directory) in calls[link + 1 : link + 3]  # a file that was there already comes in between
    pins = [number for number, (name, path) in enumerate(calls) if name == "write" and path.startswith("sessions/")]
    assert pins[0] < published[0]
    assert sum(number < published[0] for number in pins) == 1
    record = calls.index(("write", "reflog/a"))
    assert ("fsync", "reflog/a") in calls[record : published[-1]]
    assert ("fsync", "reflog") in calls[record : published[-1]]
    assert published[-2] < record < published[-1]


def test_a_publish_takes_twelve_fsyncs(store, sources, monkeypatch):
    with disk(monkeypatch) as recorder:
        put(store, sources(1))  # with a README: three blobs, a manifest, a record, a ref, each with its directory
    assert [name for name, _ in recorder.calls].count("fsync") == 12


def test_a_push_of_what_is_there_makes_it_durable_again(store, sources, monkeypatch):
    with disk(monkeypatch) as recorder:
        put(store, sources(0))
    calls = [(name, path.removeprefix(f"{store}/")) for name, path in recorder.calls]
    for name in objects(store):
        assert ("fsync", name) in calls
        assert ("fsync", name.rpartition("/")[0]) in calls
    assert [path for name, path in calls if name == "rename"] == []


def test_nothing_outside_the_store_is_touched(store, sources, monkeypatch):
    source = sources(1)
    with disk(monkeypatch) as recorder:
        put(store, source)
    assert [call for call in recorder.calls if not call[1].startswith(f"{store}/")] == []
