"""``make torture``: every harness at full length, with a seed, and its figures.

    python -m tests.crash.store_torture [--seed N] [--short] [faults pairs calls power mutants storm bits index ...]

The short form is what ``make test`` runs. Exits with 1 where anything was wrong, and says what.
"""

import argparse
import gc
import json
import os
import random
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context

from loraforge_registry.names import RefName
from loraforge_registry.store import Store
from tests.bad_files import tensors, write_adapter
from tests.crash import store_bits, store_index, store_mutants, store_power
from tests.crash.store_scenarios import (
    NEW_STORE,
    SCENARIOS,
    Figures,
    Scenario,
    count_by_strace,
    enumerate_faults,
    enumerate_pairs,
)
from tests.crash.store_storm import storm
from tests.crash.store_world import World, in_memory, put, restore

Found = dict[str, object]
GC_NOW = store_mutants.by_name("gc --now")
NAMES = {scenario.name for scenario in SCENARIOS}
SHORT_FAULTS = 50  # one call in so many has each fault in the short form


@contextmanager
def world() -> Iterator[World]:
    """A world of one's own."""
    with in_memory() as root:
        yield World(root)


def faults(seed: int, *, short: bool) -> Found:
    """Every call of every command times every fault."""
    jobs = [(scenario.name, seed, short) for scenario in (NEW_STORE, *SCENARIOS)]
    total = sum(_in_processes(_faults_of, jobs), Figures())
    # behind the others: forks of a process with torch in it are slow
    parts = os.cpu_count() or 1
    total = sum(_in_processes(_faults_of_making, [(part, parts, seed, short) for part in range(parts)]), total)
    return {"injections": total.injections, "commands": total.commands, "slowest next command": round(total.slowest, 3),
            "wrong": total.wrong}  # fmt: skip


def _faults_of_making(part: int, parts: int, seed: int, short: bool) -> Figures:  # noqa: FBT001 - to another process
    from tests.crash.store_derivations import MAKING

    return sum((_strike(scenario, seed, short=short) for scenario in MAKING[part::parts]), Figures())


def _faults_of(name: str, seed: int, short: bool) -> Figures:  # noqa: FBT001 - as above
    return _strike(store_mutants.by_name(name), seed, short=short)


def _strike(scenario: Scenario, seed: int, *, short: bool) -> Figures:
    generator = random.Random(f"{seed} {scenario.name}")
    few = scenario.name not in NAMES  # a new store has many calls, and what needs torch is slow
    rare = 6 * SHORT_FAULTS if few else SHORT_FAULTS
    choose = (lambda _at: generator.randrange(rare) == 0) if short else (lambda _at: True)
    with world() as made:
        return enumerate_faults(made, scenario, choose=choose)


def pairs(seed: int, *, short: bool) -> Found:
    """A command killed at each call, and what comes behind it killed at each call."""
    chosen = ("push latest", "gc after a crash") if short else (
        "put derived", "push new", "push latest", "push after a crash", "push after gc", "import", "import --force",
        "fsck --repair --from", "push --force", "push known files", "push again", "push by reference", "tag new",
        "tag latest", "tag --force", "tag undo a move", "tag undo a removal", "tag after a crash", "rm", "rm two",
        "rm after a crash", "gc --now", "gc after a crash",
    )  # fmt: skip
    step = 80 if short else 1
    jobs = [(name, recovery, step) for name in chosen for recovery in dict.fromkeys((name, GC_NOW.name))]
    # what these begin with has no name: a collection in between takes it, rightly, and there is nothing to do again
    unnamed = ("put derived", "push by reference", "tag undo a move")
    jobs = [job for job in jobs if job[0] not in unnamed or job[0] == job[1]]
    total = sum(_in_processes(_pairs_of, jobs), Figures())
    return {"pairs": total.injections, "commands": len(chosen), "wrong": total.wrong}


def _pairs_of(name: str, recovery: str, step: int) -> Figures:
    with world() as made:
        return enumerate_pairs(made, store_mutants.by_name(name), store_mutants.by_name(recovery), step=step)


def calls(seed: int, *, short: bool) -> Found:
    """Do the calls that the harness sees agree with those that the kernel sees?"""
    with world() as made:
        chosen = [s for s in SCENARIOS if s.name in ("push new", "pull", "gc --now", "rm")] if short else SCENARIOS
        counted = {scenario.name: count_by_strace(made, scenario) for scenario in chosen}
    wrong = [f"{name}: strace saw {both}" for name, both in counted.items() if both is not None and both[0] != both[1]]
    compared = [both[0] for both in counted.values() if both is not None]
    return {"commands compared": len(compared), "calls": sum(compared), "wrong": wrong}


def power(seed: int, *, short: bool) -> Found:
    """Disks that a power cut may leave."""
    target = 1_000 if short else 330_000
    workers = os.cpu_count() or 1
    found = list(_in_processes(_power, [(seed * 1000 + n, target // workers) for n in range(workers)]))
    return {"disks": sum(cut.disks for cut in found), "wrong": [line for cut in found for line in cut.wrong]}


def _power(seed: int, target: int) -> store_power.Cut:
    generator, cut, seen = random.Random(seed), store_power.Cut(), set()
    while cut.disks < target:
        with world() as made:
            _single_cuts(made, generator, seen, cut)
            _cuts_of_two(made, generator, seen, cut, 3 if target < 10_000 else 60)
    return cut


def _single_cuts(made: World, generator: random.Random, seen: set[int], cut: store_power.Cut) -> None:
    for scenario in (*SCENARIOS, NEW_STORE):
        if scenario.heals or scenario.code:
            continue
        made.reset()
        scenario.prepare(made)
        disk, ops = store_power.record(made, scenario.action(made))
        store_power.cut_everywhere(disk, ops, generator, seen, cut)


def _cuts_of_two(made: World, generator: random.Random, seen: set[int], cut: store_power.Cut, most: int) -> None:
    """Cut while one of two commands waits at any of its calls; first with more to collect than usual."""
    made.reset()
    for number in range(3):
        source = write_adapter(made.root / f"more{number}", weights=tensors(generator.random()))
        put(Store(made.store), source)
    start = store_power.snapshot(made.store)
    acts = _acts(made)
    for _ in range(most):
        first, second = generator.sample(sorted(acts), 2)
        restore(made.store, start)
        pair = store_power.record_pair(made, acts[first], acts[second], generator.randrange(50))
        if pair is not None:
            store_power.cut_everywhere(*pair, generator, seen, cut)


def _acts(made: World) -> dict[str, Callable[[], object]]:
    def act(run: Callable[[Store], object]) -> Callable[[], object]:
        return lambda: run(Store(made.store))

    return {
        "push": act(lambda store: put(store, made.adapters[5], RefName("one"))),
        "push the same": act(lambda store: put(store, made.adapters[5], RefName("two"))),
        "push known": act(lambda store: put(store, made.adapters[1], RefName("three"))),
        "tag": act(lambda store: store.tag(made.digests[1], RefName("four"))),
        "tag what is being pushed": act(lambda store: store.tag(made.digests[5], RefName("five"))),
        "gc": act(lambda store: store.gc(dry_run=False, now=True)),
        "gc in two steps": act(lambda store: store.gc(dry_run=False)),
        "rm": act(lambda store: store.remove(RefName("a", "v1"))),
    }


def mutants(seed: int, *, short: bool) -> Found:
    """Each step of the protocol taken out: is it seen?"""
    slow = {"a record behind its move", "a ref written in place", "what crashes left stays", "FORMAT is not synced",
            "errors of a sync are swallowed", "a torn record takes the next one along", "shards are not synced",
            "the store's name is not synced"}  # fmt: skip
    chosen = [name for name in store_mutants.MUTANTS if not (short and name in slow)]
    seen = _in_processes(_caught, [(name,) for name in chosen])
    alive = [name for name, lines in zip(chosen, seen, strict=True) if not lines]
    alarms = [] if short else [line for lines in _in_processes(_false_alarm, [(n,) for n in chosen]) for line in lines]
    return {"mutants": len(chosen), "caught": len(chosen) - len(alive),
            "wrong": [f"not seen: {name}" for name in alive] + [f"false alarm: {line}" for line in alarms]}  # fmt: skip


def _caught(name: str) -> list[str]:
    return store_mutants.judge(name)


def _false_alarm(name: str) -> list[str]:
    return store_mutants.judge(None, store_mutants.MUTANTS[name][1])


def storms(seed: int, *, short: bool) -> Found:
    """Many processes at once, killed at random."""
    with world() as made:
        (made.root / "storm").mkdir()
        found = storm(made.root / "storm", processes=8 if short else 64, seconds=2 if short else 60, seed=seed)
    return vars(found)


def bits(seed: int, *, short: bool) -> Found:
    """Every bit of every small file, and positions in the weights: detected, and never read wrong."""
    parts = os.cpu_count() or 1
    found = sum(_in_processes(_bits, [(seed, short, part, parts) for part in range(parts)]), store_bits.Flips())
    return {"bits of metadata": found.metadata, "bits of weights": found.weights, "answers right": found.right,
            "answers refused": found.refused, "wrong": found.wrong}  # fmt: skip


def _bits(seed: int, short: bool, part: int, parts: int) -> store_bits.Flips:  # noqa: FBT001 - as above
    generator = random.Random(seed)
    with world() as made:
        metadata, weights = store_bits.places(made)
        if short:
            metadata = generator.sample(metadata, 60)
        weights = generator.sample(weights, 30 if short else 10_000)
        return store_bits.flip_all(made, metadata[part::parts], weights[part::parts])


def index(seed: int, *, short: bool) -> Found:
    """Every call that SQLite makes on the cache, in the real command."""
    with world() as made:
        found = store_index.strike_all(made, *((("pwrite64",), ("signal=SIGKILL",)) if short else ()))
    points, wrong = (0, []) if found is None else (found.points, found.wrong)
    return {"calls of the cache": points, "wrong": wrong}


def _in_processes(work: Callable[..., object], jobs: list[tuple[object, ...]]) -> Iterator[object]:
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("fork")) as pool:
        yield from [future.result() for future in [pool.submit(work, *job) for job in jobs]]


SECTIONS: dict[str, Callable[..., Found]] = {
    "faults": faults, "pairs": pairs, "calls": calls, "power": power, "mutants": mutants, "storm": storms, "bits": bits,
    "index": index,
}  # fmt: skip


def main() -> int:
    """Run sections, print a line of JSON for each."""
    parser = argparse.ArgumentParser()
    parser.add_argument("sections", nargs="*", default=[*SECTIONS])
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--short", action="store_true")
    options = parser.parse_args()
    gc.freeze()
    failed = False
    for name in options.sections:
        began = time.monotonic()
        found = SECTIONS[name](options.seed, short=options.short)
        wrong = found.pop("wrong")
        line = {**found, "violations": len(wrong), "seconds": round(time.monotonic() - began, 1), "seed": options.seed}
        sys.stdout.write(json.dumps({"section": name, **line, "wrong": wrong[:5]}) + "\n")
        sys.stdout.flush()
        failed = failed or bool(wrong)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
