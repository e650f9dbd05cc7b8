"""Commands on a store, run in forks that die, fail or wait before any call that could change the disk.

Every such call goes through ``os`` or ``fcntl.flock``; a fork of this process has them replaced, so that the code under
test is the real one, down to its signal handlers and exit codes.
"""

import errno
import fcntl
import io
import json
import os
import signal
import sys
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass

CALLS = (
    "write", "pwrite", "fsync", "fdatasync", "fchmod", "chmod", "link", "rename", "replace", "unlink", "mkdir", "rmdir",
    "open", "ftruncate", "posix_fallocate",
)  # fmt: skip
Hook = Callable[[int, str, tuple[object, ...]], None]
FAULTS = (
    "kill", "term", "ENOSPC once", "ENOSPC", "EIO once", "EIO", "EDQUOT once", "EROFS",
    "short write once", "short write",
)  # fmt: skip


@dataclass(frozen=True)
class Ended:
    """How a fork ended: ``code`` is its exit code, or None where it was killed."""

    code: int | None
    out: str = ""
    err: str = ""
    calls: tuple[tuple[str, str], ...] = ()
    reached: bool = False


def mutates(name: str, arguments: tuple[object, ...]) -> bool:
    """Whether a call could change the disk."""
    return name != "open" or bool(int(str(arguments[1])) & os.O_CREAT)


class Shim:
    """Stands in front of the calls; ``hook`` sees each one that could change the disk before it happens."""

    def __init__(self, hook: Hook | None = None, on_blocked: Callable[[], object] | None = None) -> None:
        self.count = 0
        self.calls: list[tuple[str, str]] = []
        self.hook, self.on_blocked = hook, on_blocked
        self.shorten: Callable[[int], bool] = lambda _number: False
        self.real = {name: getattr(os, name) for name in CALLS}
        self._flock = fcntl.flock

    def install(self) -> None:
        """Replace the calls, in this process for good."""
        for name in CALLS:
            setattr(os, name, lambda *a, _name=name, **o: self._call(_name, a, o))
        fcntl.flock = self._lock

    def _call(self, name, arguments, options):
        if not mutates(name, arguments):
            return self.real[name](*arguments, **options)
        number, self.count = self.count, self.count + 1
        self.calls.append((name, _place(name, arguments, options)))
        if self.hook is not None:
            self.hook(number, name, arguments)
        if name == "write" and self.shorten(number):
            return self.real[name](arguments[0], bytes(arguments[1])[:1])
        return self.real[name](*arguments, **options)

    def _lock(self, fd, how):
        number, self.count = self.count, self.count + 1
        self.calls.append(("flock", _descriptor(fd)))
        if self.hook is not None:
            self.hook(number, "flock", (fd, how))
        if how & fcntl.LOCK_NB or self.on_blocked is None:
            return self._flock(fd, how)
        try:
            return self._flock(fd, how | fcntl.LOCK_NB)
        except BlockingIOError:
            self.on_blocked()
            return self._flock(fd, how)


def _place(name, arguments, options) -> str:
    if name in ("write", "pwrite", "fsync", "fdatasync", "fchmod", "ftruncate", "posix_fallocate"):
        return _descriptor(arguments[0])
    directory = options.get("dst_dir_fd", options.get("dir_fd"))
    target = os.fspath(arguments[1] if name in ("link", "rename", "replace") else arguments[0])
    return target if directory is None else f"{_descriptor(directory)}/{target}"


def _descriptor(fd) -> str:
    return os.readlink(f"/proc/self/fd/{fd}")  # noqa: PTH115 - one call, thousands of times


def fault_hook(fault: str, at: int, shim: Shim, reached: Callable[[], object]) -> Hook:
    """Return a hook that makes ``fault`` happen at call ``at`` (and ever after, unless ``once``)."""
    kind, _, once = fault.partition(" ") if not fault.startswith("short") else ("short", "", fault[12:])
    if kind == "short":
        shim.shorten = lambda number: number == at or (not once and number > at)

    def hook(number: int, name: str, arguments: tuple[object, ...]) -> None:
        if number < at or (number > at and (once or kind in ("kill", "term"))):
            return
        reached()
        if kind == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif kind == "term":
            os.kill(os.getpid(), signal.SIGTERM)
        elif kind != "short" and name != "flock":
            what = getattr(errno, kind), os.strerror(getattr(errno, kind))
            raise OSError(*what) if isinstance(arguments[0], int) else OSError(*what, arguments[0])  # as os says it

    return hook


def run(action: Callable[[], object], fault: str | None = None, at: int = 0) -> Ended:
    """Run in a fork, with a fault at the call number ``at``."""
    child = Fork(action, fault=fault, at=at)
    child.go_on()
    return child.wait()


class Fork:
    """A child that runs an action; with ``pause`` it waits before that call until ``go_on``."""

    def __init__(
        self, action: Callable[[], object], *, fault: str | None = None, at: int = 0, pause: int | None = None
    ) -> None:
        self._said, say = os.pipe()
        hear, self._tell = os.pipe()
        self._result, give = os.pipe()
        sys.stdout.flush()
        self.pid = os.fork()
        if self.pid == 0:
            for fd in (self._said, self._tell, self._result):
                os.close(fd)
            _child(action, fault, at, pause, say, hear, give)
        for fd in (say, hear, give):
            os.close(fd)

    def event(self) -> str:
        """Wait until it pauses ("P"), has to wait for a lock ("B"), reaches its fault ("F"), or is gone ("")."""
        return os.read(self._said, 1).decode()

    def go_on(self) -> None:
        """Let it go on."""
        try:
            os.write(self._tell, b"g")
        except BrokenPipeError:
            return

    def wait(self) -> Ended:
        """Wait for its end."""
        said = b""
        while piece := os.read(self._result, 1 << 20):
            said += piece
        events = b""
        while piece := os.read(self._said, 4096):
            events += piece
        _, status = os.waitpid(self.pid, 0)
        for fd in (self._said, self._tell, self._result):
            os.close(fd)
        code = os.waitstatus_to_exitcode(status)
        if code in (-signal.SIGKILL, -signal.SIGTERM):
            return Ended(None, reached=True)
        if code != 0 or not said:
            raise AssertionError(f"the fork broke: {code}")
        found = json.loads(said)
        return Ended(found[0], found[1], found[2], tuple(map(tuple, found[3])), b"F" in events)


def _child(action, fault, at, pause, say, hear, give) -> None:
    real_write, real_read = os.write, os.read
    signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def tell(what: bytes) -> None:
        real_write(say, what)

    shim = Shim(on_blocked=lambda: tell(b"B"))
    if fault is not None:
        shim.hook = fault_hook(fault, at, shim, lambda: tell(b"F"))
    elif pause is not None:

        def wait_there(number: int, _name: str, _arguments: tuple[object, ...]) -> None:
            if number == pause:
                tell(b"P")
                real_read(hear, 1)

        shim.hook = wait_there
    shim.install()
    out, err = io.StringIO(), io.StringIO()
    code: object = 0
    try:
        with redirect_stdout(out), redirect_stderr(err):
            action()
    except SystemExit as stop:
        code = stop.code or 0
    except BaseException as error:  # noqa: BLE001 - whatever it is, the parent judges it
        code, text = 99, f"{type(error).__name__}: {error}"
        err.write(text)
    document = json.dumps([code, out.getvalue(), err.getvalue(), shim.calls]).encode()
    while document:
        document = document[real_write(give, document) :]
    os._exit(0)


def interleave(first: Callable[[], object], second: Callable[[], object], at: int) -> tuple[Ended, Ended] | None:
    """Run ``first`` up to its call ``at``, then all of ``second`` (or until it has to wait), then the rest of both.

    Returns None when ``first`` ends before that call.
    """
    one = Fork(first, pause=at)
    while (event := one.event()) == "B":
        pass
    if event != "P":
        one.go_on()
        one.wait()
        return None
    two = Fork(second)
    two.event()  # it has ended, or waits for a lock that the first one holds
    one.go_on()
    return one.wait(), two.wait()
