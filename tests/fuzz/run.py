"""Run one fuzz target under atheris; what stands behind the name goes to libFuzzer.

python -m tests.fuzz.run header --counts FILE -atheris_runs=1000000 -seed=1 CORPUS
"""

import atexit
import json
import random
import sys
import time
from collections import Counter
from pathlib import Path

import atheris

# What each target's coverage is counted in: its own reader, not those that it calls and that have targets of their own.
COUNTED = {
    "header": ("header", "strict_json"),
    "codec": ("canonical",),
    "record": ("manifest", "trees", "fields"),
    "hub": ("hub_record",),
    "hub_tree": ("hub_tree_record", "trees"),
    "ref": ("refs", "names", "digest"),
    "names": ("names", "digest"),
    "strict_json": ("strict_json",),
    "config": ("config",),
    "pattern": ("patterns",),
    "bundle": ("bundle", "ingest", "trees"),
}
with atheris.instrument_imports(include=[f"loraforge_registry.{module}" for module in COUNTED[sys.argv[1]]]):
    from tests.fuzz import targets

EVERY = 20_000
SECONDS = 2


def main() -> None:
    """Fuzz until libFuzzer ends; the counts are written as they grow."""
    name, flag, counts = sys.argv[1:4]
    assert flag == "--counts"
    target, seen, began = targets.TARGETS[name], Counter[str](), time.monotonic()
    generator = random.Random(next(word for word in sys.argv if word.startswith("-seed=")))

    def one(data: bytes) -> None:
        start = time.thread_time()  # work, not waiting: a busy machine makes no reader slow
        seen[target.check(data)] += 1
        assert time.thread_time() - start < SECONDS, "it took too long"
        seen["executions"] += 1
        if seen["executions"] % EVERY == 0:
            write()

    def write() -> None:
        found = {"target": name, "seconds": round(time.monotonic() - began, 1), **dict(seen.most_common())}
        Path(counts).write_text(json.dumps(found))

    def mutate(data: bytes, longest: int, _seed: int) -> bytes:
        return target.mutate(data, generator, lambda some: atheris.Mutate(some, longest))[:longest]

    atexit.register(write)
    # a document that is broken stays so: begin anew from a good one soon
    limits = [
        "-mutate_depth=2",
        f"-max_len={target.longest}",
        "-timeout=300",
        "-rss_limit_mb=512",
        "-malloc_limit_mb=128",
    ]
    atheris.Setup([sys.argv[0], *limits, *sys.argv[4:]], one, custom_mutator=mutate, internal_libfuzzer=True)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
