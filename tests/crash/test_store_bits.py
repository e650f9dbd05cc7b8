"""The harness that flips bits sees a reader that does not look at what it reads."""

import random

import pytest

from loraforge_registry import index, objects
from loraforge_registry.digest import Digest
from tests.crash.store_bits import flip_all, places
from tests.crash.store_world import World, in_memory


@pytest.fixture
def world(monkeypatch):
    for name in ("read_summaries", "write_summaries"):  # which flipping replaces
        monkeypatch.setattr(index, name, getattr(index, name))
    with in_memory() as root:
        yield World(root)


def believing(files, area, digest, limit):
    return files.read(objects.shard(area, digest), digest.hex, limit)


def whole(_files, _area, _digest, _size=None):
    return True


def unchecked(files, area, digest, size):
    with objects.opened(files, area, digest, size):
        yield files.read(objects.shard(area, digest), digest.hex, 1 << 20)


@pytest.mark.parametrize(
    ("name", "instead", "path", "said"),
    [
        ("read_all", believing, "manifests/", "gives"),
        ("read_all", believing, "manifests/", "passes over"),
        ("is_whole", whole, "blobs/", "passes over"),
        ("verified", unchecked, "blobs/", "pull a:latest gives"),
    ],
)
def test_a_step_that_is_left_out_is_seen(world, monkeypatch, name, instead, path, said):
    monkeypatch.setattr(objects, name, instead)
    metadata, weights = places(world)
    weights_of = Digest.of((world.adapters[2] / "adapter_model.safetensors").read_bytes()).hex
    chosen = [place for place in metadata if place[0].startswith(path) and path == "manifests/"]
    chosen = chosen or [place for place in weights if place[0].endswith(weights_of)]
    found = flip_all(world, random.Random(1).sample(chosen, 40), [])
    assert any(said in line for line in found.wrong)


def test_every_kind_of_file_is_flipped(world):
    metadata, weights = places(world)
    kinds = {path.partition("/")[0] for path, _ in metadata}
    assert kinds == {"FORMAT", "refs", "reflog", "manifests", "blobs"}
    assert {path.partition("/")[0] for path, _ in weights} == {"blobs"}
