"""The seeds of the fuzz targets, without a fuzzer: each is judged, and together they reach all of every reader."""

import pytest

from tests.fuzz import seeds
from tests.fuzz.reached import missed
from tests.fuzz.targets import TARGETS

# What of a reader no seed reaches, and how many lines of it. Most are limits on size, which other tests pass.
LIMITS = {
    "header": {"parse_header": 2},  # what begins with { and ends with } and is JSON is an object; 100,000 tensors
    "codec": {"encode": 2, "decode": 1, "_Count.add": 1},
    "manifest": {"_check_inputs": 1},
    "ref": {"read_ref": 1},  # no file
    "strict_json": {"loads": 2},
    "config": {"_few": 1},
    "pattern": {"Matcher.spending": 1, "Matcher._run": 4, "_compile": 2},  # out of time, and too long
    "bundle": {"_manifest": 1, "_small": 1, "_exactly": 1, "_check_closure": 1, "_check_truth": 1},
}
# What a module holds beside its reader.
NO_READERS = {
    "header": {"read_header", "TensorEntry.elements"},
    "manifest": {"Manifest.file", "Manifest.size", "Manifest.parameters", "derivation_as_json"},
    "ref": {"list_refs", "move_ref", "restore_ref", "_publish", "_spell"},
    "names": {"Digest.from_raw", "Digest.of", "Digest.raw", "Digest.short"},
    "config": {"scale_of"},
    "pattern": {"ends_with_path"},
    "bundle": {"Bundle.chunks", "write_bundle", "write_bundle.<locals>.contents", "store_bundle"},
}


@pytest.mark.parametrize("name", TARGETS)
def test_seeds(name):
    target, found = TARGETS[name], seeds.read_seeds(name)
    unreached = missed(target.modules, lambda: [target.check(data) for data in found])
    left = {
        function: lines
        for functions in unreached.values()
        for function, lines in functions.items()
        if function not in NO_READERS.get(name, ()) and len(lines) > LIMITS.get(name, {}).get(function, 0)
    }
    assert not left, f"{len(found)} seeds, and these lines were not reached"


def test_seeds_are_few_and_small():
    assert sum(path.stat().st_size for path in seeds.HERE.iterdir()) < 300_000
    assert sorted(path.stem for path in seeds.HERE.iterdir()) == sorted(TARGETS)


@pytest.mark.parametrize("data", [b"", b"\n\\n\xff\x00 a", bytes(range(256))])
def test_seeds_are_spelt_as_they_are(data):
    assert seeds.unspell(seeds.spell(data)) == data
    assert seeds.spell(data).isprintable()
