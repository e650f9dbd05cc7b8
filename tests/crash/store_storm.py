"""Many processes on one store: they publish, name, remove, read, collect and check, and are killed."""

import os
import random
import signal
import time
import traceback
from dataclasses import dataclass, field
from pathlib import Path

from loraforge_registry import refs
from loraforge_registry.digest import Digest
from loraforge_registry.errors import LoraforgeError, NotFoundError
from loraforge_registry.files import Files
from loraforge_registry.header import parse_header
from loraforge_registry.ingest import Incoming
from loraforge_registry.names import RefName
from loraforge_registry.store import Store
from tests.bad_files import config, safetensors_bytes, tensors
from tests.crash.store_world import broken_chain, reflogs

NAMES = [RefName(f"n{number}") for number in range(8)]


@dataclass
class Storm:
    """What a storm did, and what was wrong behind it."""

    published: int = 0
    collected: int = 0
    checked: int = 0
    read: int = 0
    removed: int = 0
    kills: int = 0
    wrong: list[str] = field(default_factory=list)


def storm(root: Path, *, processes: int, seconds: float, seed: int) -> Storm:
    """Let processes loose on a store at ``root`` for a while, killing one about every hundredth of a second."""
    store = root / "store"
    acks = root / "acks"
    acks.mkdir()
    _put(Store(store), random.Random(seed), 0)
    generator = random.Random(seed)
    found, running, stop, number = Storm(), set(), time.monotonic() + seconds, 0
    while time.monotonic() < stop:
        while len(running) < processes:
            number += 1
            running.add(_worker(store, acks / str(number), seed * 1_000_003 + number, stop))
        time.sleep(0.01)
        victim = generator.choice(sorted(running))
        os.kill(victim, signal.SIGKILL)
        found.kills += 1
        running -= {_reap(victim, found)}
    for pid in running:
        _reap(pid, found)
    _judge(store, acks, found)
    return found


def _reap(pid: int, found: Storm) -> int:
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if code not in (0, -signal.SIGKILL):
        found.wrong.append(f"a worker ended with {code}")
    return pid


def _worker(store: Path, log: Path, seed: int, stop: float) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        fd = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        generator, own, turn = random.Random(seed), Store(store), 0
        while time.monotonic() < stop:
            turn += 1
            line = _step(own, generator, f"{seed}-{turn}")
            os.write(fd, f"{line}\n".encode())
        code = 0
    except BaseException as error:  # noqa: BLE001 - the parent judges it
        place = " < ".join(f"{f.name}:{f.lineno}" for f in reversed(traceback.extract_tb(error.__traceback__)))
        os.write(fd, f"wrong {type(error).__name__} {error} in {place}\n".encode())
    finally:
        os._exit(code)


def _step(store: Store, generator: random.Random, unique: str) -> str:
    """Do one thing, and say what has been acknowledged."""
    chance, name = generator.random(), generator.choice(NAMES)
    if chance < 0.1:
        store.gc(dry_run=False, now=generator.random() < 0.5)
        return "collected"
    if chance < 0.13:
        report = store.fsck()
        return "checked" if report.holds else f"wrong fsck {report.problems[:2]}"
    if chance < 0.25:
        return _read(store, name)
    if chance < 0.32:
        try:
            store.remove(name)
        except LoraforgeError as error:  # nothing there, or somebody moved it
            return f"refused {type(error).__name__}"
        return "removed"
    return _publish(store, generator, name, unique)


def _publish(store: Store, generator: random.Random, name: RefName, unique: str) -> str:
    with store.session():
        digest = _put(store, generator, generator.randrange(1 << 30))
        if generator.random() < 0.3:
            time.sleep(generator.random() * 0.01)
        store.tag(digest, name, what=unique)
        wrong = _wrong_bytes(store, digest)  # what this process has pinned is all there
    return f"wrong {wrong}" if wrong else f"published {name} {digest} {unique}"


def _read(store: Store, name: RefName) -> str:
    digest = store.lookup(name)
    if digest is None:
        return "read"
    with store.reading(digest):
        if not store.has(digest):
            return "read"  # it went before it was pinned
        try:
            wrong = _wrong_bytes(store, digest)
        except NotFoundError as error:
            wrong = str(error)
    return f"wrong {wrong}" if wrong else "read"


def _wrong_bytes(store: Store, digest: Digest) -> str:
    manifest = store.manifest(digest)
    sizes = [len(store.read_file(file, 1 << 20)) for file in manifest.files]
    return "" if sizes == [file.size for file in manifest.files] else f"{digest} has other sizes"


def _put(store: Store, generator: random.Random, salt: int) -> Digest:
    """Store an adapter whose weights others have, too, with a README of its own."""
    data = safetensors_bytes(tensors(0.5 + generator.randrange(40)))
    length = int.from_bytes(data[:8], "little")
    incoming = Incoming(
        config=repr(config()).replace("'", '"').encode(),
        header=parse_header(data[8 : 8 + length], len(data)),
        chunks=[data],
        readme=f"{salt}\n".encode(),
    )
    return store.put(incoming).digest


def _judge(store: Path, acks: Path, found: Storm) -> None:
    lines = [line for log in acks.iterdir() for line in log.read_text().splitlines()]
    words = [line.split() for line in lines if line]
    for attribute in ("published", "collected", "checked", "read", "removed"):
        setattr(found, attribute, sum(word[0] == attribute for word in words))
    found.wrong += [line for line in lines if line.startswith("wrong")]
    report = Store(store).fsck(deep=True)
    found.wrong += [f"{problem.kind} {problem.place}" for problem in report.problems if problem.is_damage]
    files = Files(store)
    for name in reflogs(store):
        found.wrong += broken_chain(store, name)
    moves = {(name, move.what): move.new for name in reflogs(store) for move in refs.read_reflog(files, name)}
    for word in words:
        if word[0] == "published" and str(moves.get((word[1].partition(":")[0], word[3]))) != word[2]:
            found.wrong.append(f"lost: {' '.join(word)}")
    Store(store).gc(dry_run=False, now=True)
    left = [f"{place}/{name.name}" for place in ("tmp", "sessions", "trash") for name in (store / place).iterdir()]
    found.wrong += [f"left behind: {name}" for name in left]
