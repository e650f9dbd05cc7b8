"""The seeds of the fuzz targets, without a fuzzer: each is judged; together they reach every line of the readers."""

import importlib
from pathlib import Path

import pytest

from tests.fuzz import seeds
from tests.fuzz.reached import lines_of, missed
from tests.fuzz.targets import TARGETS

# The lines of readers that no seed reaches, by what stands in them, and why.
UNREACHED = {
    "header": {
        "not an object": "JSON that begins with { and ends with } is one",
        "the limit is {MAX_TENSORS}": "a seed of megabytes; the header's own tests have it",
    },
    "codec": {
        "cannot be written as": "what was read can be written",
        "the limit is {max_bytes}": "what was read was no longer",
        "the limit is {MAX_BYTES}": "a seed of megabytes",
        "more than {MAX_CONTAINERS}": "a seed of a quarter of a megabyte",
    },
    "record": {"the limit is {MAX_NODES}": "a seed of a hundred thousand bytes; the tests of trees have it"},
    "ref": {"return None": "there is always a file"},
    "pattern": {
        "took too long to match": "its whole time limit; the tests of patterns have it",
        "except TimeoutError": "as above",
        "is too large a regular expression": "how deep it goes is the library's affair",
        "except (RecursionError, MemoryError)": "as above",
    },
    "bundle": {
        "a manifest of {entry.size} bytes": "a seed of megabytes",
        "a file of {entry.size} bytes": "as above",
        'raise FormatError(f"artifact {digest.short}: {error}")': "a file that changes while it is read",
        "bytes too early": "as above",
    },
}
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
        "only_path",
        "steps_to",
        "_spell",
        "derivation_as_json",
        "decode_manifest",
    },
    "ref": {"list_refs", "move_ref", "restore_ref", "_publish", "_spell"},
    "names": {"Digest.from_raw", "Digest.of", "Digest.raw", "Digest.short"},
    "config": {"scale_of"},
    "pattern": {"ends_with_path"},
    "bundle": {"Bundle.chunks", "write_bundle", "write_bundle.<locals>.contents", "store_bundle"},
}


def source_of(module):
    return Path(importlib.import_module(f"loraforge_registry.{module}").__file__).read_text().splitlines()


@pytest.mark.parametrize("name", TARGETS)
def test_seeds(name):
    target, found = TARGETS[name], seeds.read_seeds(name)
    unreached = missed(target.modules, lambda: [target.check(data) for data in found])
    left = [
        f"{module}.py:{line}, {function}: {text}"
        for module, functions in unreached.items()
        for function, lines in functions.items()
        for line, text in ((line, source_of(module)[line - 1].strip()) for line in lines)
        if function not in NO_READERS.get(name, ()) and not any(words in text for words in UNREACHED.get(name, ()))
    ]
    assert not left, f"{len(found)} seeds do not reach these: add one that does, or say why none can"


@pytest.mark.parametrize("name", UNREACHED)
def test_what_no_seed_reaches_is_there(name):
    text = "\n".join(line for module in TARGETS[name].modules for line in source_of(module))
    assert [words for words in UNREACHED[name] if words not in text] == []


@pytest.mark.parametrize("name", NO_READERS)
def test_what_is_no_reader_is_there(name):
    functions = {function for module in TARGETS[name].modules for function in lines_of(module).values()}
    assert NO_READERS[name] - functions == set()


def test_seeds_are_few_and_small():
    assert sum(path.stat().st_size for path in seeds.HERE.iterdir()) < 300_000
    assert sorted(path.stem for path in seeds.HERE.iterdir()) == sorted(TARGETS)


@pytest.mark.parametrize("data", [b"", b"\n\\n\xff\x00 a", bytes(range(256))])
def test_seeds_are_spelt_as_they_are(data):
    assert seeds.unspell(seeds.spell(data)) == data
    assert seeds.spell(data).isprintable()
