"""A process with torch loaded and no threads. It does the commands that it reads, one a line, on a disk that fails.

Only ``loraforge.checkpoint.output`` changes files in a merge, through its own ``os`` and ``fcntl``: here these are a
``Disk``, which says what is about to happen, and then kills the process, cuts a write off, or raises. Commands that
end in a kill are done in a forked child; ``os._exit`` runs no cleanup, as kill -9 does.
"""

import dataclasses
import errno
import fcntl
import gc
import json
import os
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeAlias
from unittest.mock import patch

import torch

import loraforge
from loraforge.checkpoint import engine, journal, output, staging

KILLED = 137
# elements: several blocks a tensor, whose ends are no ends of pages
BLOCK = 2400
# calls that a full disk refuses
NEED_SPACE = frozenset(
    {"mkdir", "open", "posix_fallocate", "ftruncate", "pwrite", "copy_file_range", "fsync", "rename"}
)
UNHEARD = frozenset(
    [
        "chmod",
        "fchmod",
        "chown",
        "fchown",
        "link",
        "symlink",
        "mkfifo",
        "mknod",
        "makedirs",
        "removedirs",
        "remove",
        "removexattr",
        "rename_at",
        "renames",
        "replace",
        "sendfile",
        "setxattr",
        "splice",
        "symlink",
        "truncate",
        "utime",
        "write",
        "writev",
        "pwritev",
        "fdatasync",
    ]
)
Say: TypeAlias = Callable[[Mapping[str, Any]], object]


@dataclasses.dataclass(frozen=True)
class Fault:
    """What goes wrong at call number ``at``: ``kill``, ``cut`` (a write stops after ``size`` bytes) or ``error``."""

    kind: str
    at: int
    number: int = 0
    lasting: bool = False
    size: int = 0


class Disk:
    """Stands in for ``os`` in ``output``."""

    def __init__(self, fault: Fault | None, say: Say, *, poor: bool, short: bool) -> None:
        self._fault, self._say, self._poor, self._short = fault, say, poor, short
        self._count = 0
        self._lock = threading.RLock()

    def __getattr__(self, name: str) -> Any:
        assert name not in UNHEARD, f"os.{name} changes files, and no crash before it is tested"
        return getattr(os, name)

    def mkdir(self, path: str) -> None:
        self._step("mkdir", lambda: os.mkdir(path), path=path)  # noqa: PTH102 - it stands in for os

    def open(self, path: str, flags: int, mode: int = 0o777) -> int:
        if not flags & (os.O_CREAT | os.O_TRUNC):
            return os.open(path, flags, mode)
        return self._step("open", lambda: os.open(path, flags, mode), path=path)

    def posix_fallocate(self, fd: int, offset: int, size: int) -> None:
        if self._poor:
            raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
        self._step("posix_fallocate", lambda: os.posix_fallocate(fd, offset, size), fd=fd)

    def ftruncate(self, fd: int, size: int) -> None:
        self._step("ftruncate", lambda: os.ftruncate(fd, size), fd=fd)

    def pwrite(self, fd: int, data: bytes, position: int) -> int:
        data = memoryview(data)
        data = data[: 1 + len(data) // 2] if self._short else data

        def cut(size: int) -> None:
            os.pwrite(fd, data[:size], position)

        return self._step(
            "pwrite", lambda: os.pwrite(fd, data, position), cut, fd=fd, position=position, size=len(data)
        )

    def copy_file_range(self, source: int, target: int, count: int, *places: int) -> int:
        if self._poor:
            raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))
        count = 1 + count // 2 if self._short else count
        return self._step("copy_file_range", lambda: os.copy_file_range(source, target, count, *places), fd=target)

    def fsync(self, fd: int) -> None:
        self._step("fsync", lambda: None, fd=fd)  # a killed process's writes are seen without

    def rename(self, source: str, target: str) -> None:
        self._step("rename", lambda: os.rename(source, target), path=source, target=target)  # noqa: PTH104 - as mkdir

    def unlink(self, path: str) -> None:
        if os.path.lexists(path):
            self._step("unlink", lambda: os.unlink(path), path=path)  # noqa: PTH108 - as mkdir
        else:
            os.unlink(path)  # noqa: PTH108 - it changes nothing, and says so

    def rmdir(self, path: str) -> None:
        self._step("rmdir", lambda: os.rmdir(path), path=path)  # noqa: PTH106 - as mkdir

    def ioctl(self, target: int, request: int, source: int) -> int:
        return self._step("ioctl", lambda: fcntl.ioctl(target, request, source), fd=target)

    def _step(
        self, name: str, real: Callable[[], Any], cut: Callable[[int], object] | None = None, **facts: Any
    ) -> Any:
        with self._lock:
            number, self._count = self._count, self._count + 1
            self._say({"call": name, **_described(facts)})
            if self._fault is not None and number >= self._fault.at:
                self._fail(self._fault, name, cut, now=number == self._fault.at)
            return real()

    @staticmethod
    def _fail(fault: Fault, name: str, cut: Callable[[int], object] | None, *, now: bool) -> None:
        if fault.kind == "error":
            if now or (fault.lasting and name in NEED_SPACE):
                raise OSError(fault.number, os.strerror(fault.number))
        elif now:
            if fault.kind == "cut":
                assert cut is not None, "a write"
                cut(fault.size)
            os._exit(KILLED)


class Locks:
    """Stands in for ``fcntl`` in ``output``."""

    def __init__(self, disk: Disk) -> None:
        self.ioctl = disk.ioctl

    def __getattr__(self, name: str) -> Any:
        return getattr(fcntl, name)


def _described(facts: dict[str, Any]) -> dict[str, Any]:
    """Name files, and the inodes behind the names, by which they are known whatever they are called later."""
    said = {key: value for key, value in facts.items() if key in ("position", "size")}
    said |= {key: os.fspath(facts[key]) for key in ("path", "target") if key in facts}
    if "fd" in facts:
        said |= {"path": os.readlink(f"/proc/self/fd/{facts['fd']}"), "inodes": [os.fstat(facts["fd"]).st_ino]}  # noqa: PTH115 - a descriptor's name
    elif os.path.isdir(said["path"]):  # noqa: PTH112 - as above
        said["inodes"] = [entry.inode() for entry in os.scandir(said["path"])]
    elif os.path.exists(said["path"]):  # noqa: PTH110 - as above
        said["inodes"] = [os.stat(said["path"]).st_ino]  # noqa: PTH116 - as above
    return said


def merge(request: Mapping[str, Any]) -> None:
    adapters = [(path, weight) for path, weight in request["adapters"]]
    loraforge.merge(request["model"], adapters, request["out"])


def unmerge(request: Mapping[str, Any]) -> None:
    loraforge.unmerge(request["model"], request["out"], adapters=[path for path, _ in request["adapters"]])


def merge_in_place(request: Mapping[str, Any]) -> None:
    loraforge.merge_in_place(request["model"], [(path, weight) for path, weight in request["adapters"]])


def unmerge_in_place(request: Mapping[str, Any]) -> None:
    loraforge.unmerge_in_place(request["model"], adapters=[path for path, _ in request["adapters"]])


COMMANDS = {each.__name__: each for each in (merge, unmerge, merge_in_place, unmerge_in_place)}


def _publish_first(stage: staging.Staging, receipt: object) -> int:
    """Let the directory appear before it is whole."""
    output.rename(stage._directory, stage._out)
    for name in stage._fds:
        output.rename(stage._out / (name + ".part"), stage._out / name)
    return 0


# Mistakes that a change could make, to see that they would be found: (where, what, the mistake).
MUTANTS: dict[str, tuple[object, str, object]] = {
    "shards stay under their names": (journal, "ASIDE", ""),
    "shards are made under their names": (staging, "part_of", lambda shard: shard),
    "the output appears first": (staging.Staging, "publish", _publish_first),
    "nothing is made durable": (output, "sync", lambda *_: None),
    "nothing is put away": (output, "remove", lambda *_: None),
    "written pages are written again": (
        journal,
        "written",
        lambda _, under_way: {name: before != before for name, (before, _) in under_way.sums.items()},  # noqa: PLR0124 - as many times no
    ),
}


@contextmanager
def _prepared(request: Mapping[str, Any], say: Say) -> Iterator[None]:
    """Put the failing disk, the small blocks, the one thread and the mutant in place."""
    fault = None if request["fault"] is None else Fault(**request["fault"])
    disk = Disk(fault, say, poor=request["poor"], short=request["short"])
    changes: list[tuple[object, str, object]] = [
        (output, "os", disk),
        (output, "fcntl", Locks(disk)),
        (engine, "BLOCK", BLOCK),
        (engine, "MAX_WORKERS", 2 if request["threads"] else 1),
    ]
    if not request["threads"]:  # one worker still runs beside the thread that takes its results: no order of calls
        changes.append((engine, "in_threads", map))
    if request["mutant"]:
        changes.append(MUTANTS[request["mutant"]])
    patches = [patch.object(*change) for change in changes]
    for each in patches:
        each.start()
    try:
        yield
    finally:
        for each in patches:
            each.stop()


def perform(request: Mapping[str, Any], say: Say) -> None:
    """Do a command, and say each call, and how it ended."""
    error: dict[str, Any] | None = None
    with _prepared(request, say):
        try:
            COMMANDS[request["command"]](request)
        except Exception as raised:  # noqa: BLE001 - the harness judges
            error = {
                "types": [kind.__name__ for kind in type(raised).__mro__],
                "text": str(raised),
                "trace": traceback.format_exc(),
            }
    say({"error": error})


def _watched(request: Mapping[str, Any], say: Say) -> None:
    """Say also what the interpreter sees of the calls, whoever makes them, so that none goes past the disk."""
    seen: list[str] = []
    changing = {"os.mkdir": "mkdir", "os.rename": "rename", "os.remove": "unlink", "os.rmdir": "rmdir"}
    others = {"os.link", "os.symlink", "os.truncate", "os.chmod", "os.utime", "shutil.copyfile", "shutil.move"}

    def hear(event: str, arguments: tuple[Any, ...]) -> None:
        if event in changing or event in others:
            if event != "os.remove" or os.path.lexists(arguments[0]):
                seen.append(changing.get(event, event))
        elif event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_CREAT | os.O_TRUNC):
            seen.append("open")

    sys.addaudithook(hear)  # it stays: only for a child
    perform(request, say)
    say({"audit": seen})


def in_child(request: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Do a command in a forked child, and return what it said, to its end or to its kill."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            do = _watched if request["watched"] else perform
            do(request, lambda fact: os.write(writing, json.dumps(fact).encode() + b"\n"))
            os._exit(0)
        finally:
            os._exit(1)
    os.close(writing)
    with open(reading, "rb") as pipe:  # noqa: PTH123 - a descriptor
        said = [json.loads(line) for line in pipe]
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return [*said, {"status": status}]


def main() -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    gc.freeze()  # what is loaded stays shared with the children
    for line in sys.stdin:
        request = json.loads(line)
        if request["forked"]:
            said = in_child(request)
        else:
            said = []
            perform(request, said.append)
        sys.stdout.write(json.dumps(said) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
