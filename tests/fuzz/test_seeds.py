"""The seeds of the fuzz targets, without a fuzzer: each is judged, and together they reach every function."""

from collections import Counter

import pytest

from tests.fuzz import seeds
from tests.fuzz.reached import lines_of, missed
from tests.fuzz.targets import TARGETS

# What a module holds beside its reader.
NO_READERS = {
    "header": {"read_header", "encode_header", "Header.size", "TensorEntry.elements"},
    "record": {
        "Derivation.parent",
        "Manifest.file",
        "Manifest.parameters",
        "Manifest.parent",
        "Manifest.size",
        "Manifest.blobs",
        "Manifest.needs",
        "Manifest.lineage",
        "TreeRecord.blobs",
        "TreeRecord.needs",
        "TreeRecord.lineage",
        "untruths",
        "untruths.<locals>.<genexpr>",
        "_spell",
        "derivation_as_json",
    },
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
    size = Counter(function for module in target.modules for function in lines_of(module).values())
    left = {
        function
        for functions in unreached.values()
        for function, lines in functions.items()
        if len(lines) == size[function] and function not in NO_READERS.get(name, ())
    }
    assert not left, f"{len(found)} seeds reach nothing of these: add one that does, or say that they read nothing"


def test_seeds_are_few_and_small():
    assert sum(path.stat().st_size for path in seeds.HERE.iterdir()) < 300_000
    assert sorted(path.stem for path in seeds.HERE.iterdir()) == sorted(TARGETS)


@pytest.mark.parametrize("data", [b"", b"\n\\n\xff\x00 a", bytes(range(256))])
def test_seeds_are_spelt_as_they_are(data):
    assert seeds.unspell(seeds.spell(data)) == data
    assert seeds.spell(data).isprintable()
