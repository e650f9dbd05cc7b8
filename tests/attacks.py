"""An attack: what is made, what is done with it, how that must end, and what it may cost."""

import json
import os
import resource
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loraforge_registry.errors import LoraforgeError

SECONDS, MEGABYTES = 2, 256


@dataclass(frozen=True)
class Attack:
    """What is made in a directory, what is done with it, and how that must end; ``{home}`` is the directory."""

    name: str
    make: Callable[[Path], object]
    act: Callable[[Any], object]
    error: type[LoraforgeError]
    says: str


@dataclass(frozen=True)
class Ended:
    error: str
    says: str
    seconds: float
    megabytes: float


def measured(act: Callable[[], object]) -> Ended:
    """Run in a fork, and say what it raised and what it took."""
    hear, say = os.pipe()
    sys.stdout.flush()
    before = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    child = os.fork()
    if child == 0:
        resource.setrlimit(resource.RLIMIT_CPU, (60, 60))
        try:
            said = ["", f"took it: {act()!r:.200}"]
        except BaseException as error:  # noqa: BLE001 - the parent judges it
            said = [type(error).__name__, str(error)]
        os.write(say, json.dumps(said).encode())
        os._exit(0)
    os.close(say)
    with os.fdopen(hear, "rb") as pipe:
        said = json.loads(pipe.read() or b'["died", "died"]')
    _, _, used = os.wait4(child, 0)
    return Ended(said[0], said[1], used.ru_utime + used.ru_stime, (used.ru_maxrss * 1024 - before) / 2**20)


def judge(attack: Attack, home: Path) -> None:
    """Make it, do it, and hold how it ended against what must be."""
    made = attack.make(home)
    ended = measured(lambda: attack.act(made))
    assert (ended.error, ended.says) == (attack.error.__name__, attack.says.replace("{home}", str(home)))
    assert ended.seconds < SECONDS
    assert ended.megabytes < MEGABYTES
