"""The few facts about an artifact are what a whole reading says."""

import pytest

import loraforge as lf
from loraforge_registry.digest import Digest
from loraforge_registry.facts import facts_of
from loraforge_registry.index import Summary
from loraforge_registry.listing import list_named
from loraforge_registry.manifest import encode_manifest
from loraforge_registry.repositories import RepositoryRecord, encode_repository
from tests.bad_files import PREFIX, config, floats, pair, tensors, write_adapter


@pytest.fixture
def registry(tmp_path):
    """Plain, of several ranks, on an embedding, and made of others through what was never stored."""
    registry = lf.Registry(tmp_path / "store")
    named = config(base_model_name_or_path="acme/base")
    registry.push(write_adapter(tmp_path / "a", settings=named), "plain:v1")
    mixed = pair("model.layers.0.q", rank=5) | pair("model.layers.0.v", rank=2)
    registry.push(write_adapter(tmp_path / "b", weights=mixed, settings=config(rank_pattern={"q": 5})), "mixed:v1")
    embedding = {
        f"{PREFIX}model.embed.lora_embedding_A": ("F32", (3, 8), floats(*range(24))),
        f"{PREFIX}model.embed.lora_embedding_B": ("F32", (4, 3), floats(*range(12))),
    }
    settings = config(target_modules=["embed"], r=3)
    registry.push(write_adapter(tmp_path / "c", weights=embedding, settings=settings), "embedding:v1")
    registry.push(write_adapter(tmp_path / "d", weights=tensors(0.25), settings=named), "other:v1")
    terms = [(lf.load(name, registry=registry), 0.5) for name in ("plain:v1", "other:v1", "plain:v1")]
    registry.push(lf.rerank(lf.linear(terms), rank=1), "made:v1")
    return registry


def test_facts_are_what_a_whole_reading_says(registry):
    lines = list_named(registry.store._readable())
    assert len(lines) == 5
    for line in lines:
        manifest = registry.store.manifest(line.digest)
        facts = facts_of(encode_manifest(manifest))
        said = Summary(
            content_id=facts.content_id,
            base=facts.base,
            rank=facts.ranks[1],
            targets=line.summary.targets,
            parameters=facts.parameters,
            size=facts.size,
            operation=facts.operation,
        )
        assert said == line.summary
        layout = registry.store.layout(manifest)
        ranks = sorted(target.rank for target in layout.targets.values())
        assert facts.ranks == (ranks[0], ranks[-1])
        assert facts.made_from == manifest.lineage
    assert len(facts_of(encode_manifest(registry.store.manifest(registry.store.resolve("made:v1")))).made_from) == 2


def test_another_record_has_none():
    record = RepositoryRecord("me/x", 0, branches={"main": Digest.of(b"")})
    assert facts_of(encode_repository(record)) is None
