"""A tree's weights are one rounding of the path's sum, on disk and in a live model; every change says what it does."""

import random
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import loraforge as lf
from loraforge.errors import CompositionError, ConflictError, ManifestError, NotFoundError, NumericalError, StoreError
from loraforge.tree import Tree, reshape
from loraforge_registry.errors import ReferenceSyntaxError
from tests.checkpoints import a_base, adapter_for, normal

Q, V = "model.layers.0.q", "model.layers.0.v"


class Model(nn.Module):
    """Parameters and buffers under the names of a checkpoint."""

    def __init__(self, tensors, dtype=None):
        super().__init__()
        for name, tensor in tensors.items():
            *path, last = name.split(".")
            here = self
            for part in path:
                if part not in dict(here.named_children()):
                    here.add_module(part, nn.Module())
                here = getattr(here, part)
            value = tensor.clone() if dtype is None or not tensor.is_floating_point() else tensor.to(dtype)
            here.register_parameter(last, nn.Parameter(value, requires_grad=False))

    def forward(self):
        raise NotImplementedError


@pytest.fixture
def base(tmp_path) -> Path:
    folder = tmp_path / "base"
    folder.mkdir()
    save_file(a_base(), folder / "model.safetensors")
    return folder


@pytest.fixture
def registry(tmp_path) -> lf.Registry:
    return lf.Registry(tmp_path / "store")


@pytest.fixture
def tree(registry, base) -> Tree:
    """french, french/law, french/law/contract, french/medicine, german."""
    tree = lf.Tree.create(registry, "t", base)
    for number, (path, targets) in enumerate(
        {"french": (Q, V), "french/law": (Q,), "french/law/contract": (V,), "french/medicine": (Q, V), "german": (V,)}
        .items()
    ):  # fmt: skip
        plant(tree, path, seed=number + 1, targets=targets, rank=2 + number)
    return tree


def plant(tree, path, *, seed, targets=(Q, V), rank=4, ratio=0.05, alpha=None):
    """Graft a random adapter."""
    store, adapter = tree.registry.store, adapter_for(a_base(), ratio=ratio, rank=rank, seed=seed, targets=targets)
    pairs = {name: replace(pair, alpha=alpha or pair.alpha) for name, pair in adapter.targets.items()}
    digest = tree.registry.push(replace(adapter, targets=pairs))
    return reshape.graft(tree, path, artifact(store, digest))


def artifact(store, digest):
    from loraforge_registry.manifest import Artifact

    return Artifact(digest, store.manifest(digest).content_id)


def merged(tree, path, out):
    if path == "":
        return a_base()
    tree.merge(path, out, receipt=False)
    return load_file(out / "model.safetensors")


def held(model):
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def same(first, second):
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert tensor.dtype == second[name].dtype
        assert torch.equal(tensor.view(torch.uint8), second[name].view(torch.uint8)), name


# --- what a node is -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["french", "french/law", "french/law/contract", "german"])
def test_disk_merge_live_checkout_and_merge_of_the_flattened_have_equal_bits(tree, base, tmp_path, path):
    model = Model(a_base())
    wanted = merged(tree, path, tmp_path / "merged")
    with tree.checkout(model, path):
        same(held(model), wanted)
    same(held(model), a_base())
    lf.merge(base, tree.flatten(path), tmp_path / "flat", receipt=False)
    same(load_file(tmp_path / "flat" / "model.safetensors"), wanted)


def test_the_sum_is_rounded_once(tree, base, tmp_path):
    """Two roundings, as merging one after the other makes, would give other bits."""
    wanted = merged(tree, "french/law", tmp_path / "one")
    lf.merge(base, tree.node("french").adapter, tmp_path / "first", receipt=False)
    lf.merge(tmp_path / "first", tree.node("french/law").adapter, tmp_path / "two", receipt=False)
    assert not torch.equal(wanted[f"{Q}.weight"], load_file(tmp_path / "two" / "model.safetensors")[f"{Q}.weight"])
    exact = a_base()[f"{Q}.weight"].double()
    exact += sum(tree.node(path).adapter.targets[Q].delta() for path in ("french", "french/law"))
    assert torch.equal(wanted[f"{Q}.weight"], exact.to(torch.bfloat16))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_model_in_another_type_holds_what_a_loader_would_make_of_the_merged_checkpoint(tree, tmp_path, dtype):
    model = Model(a_base(), dtype)
    wanted = merged(tree, "french/law", tmp_path / "merged")
    with tree.checkout(model, "french/law"):
        same(held(model), {n: t.to(dtype) if t.is_floating_point() else t for n, t in wanted.items()})


def test_moving_to_a_neighbour_writes_only_what_differs(tree, tmp_path):
    model, size = Model(a_base()), {t: a_base()[f"{t}.weight"].nbytes for t in (Q, V)}
    with tree.live(model) as live:
        live.checkout("french")
        assert live.written == size[Q] + size[V]
        live.checkout("french/law")
        assert live.written == size[Q]
        live.checkout("french/law/contract")
        assert live.written == size[V]
        live.checkout("french/law/contract")
        assert live.written == 0
        with tree.checkout(model, "german") as inner:
            assert inner is live
            same(held(model), merged(tree, "german", tmp_path / "german"))
        same(held(model), merged(tree, "french/law/contract", tmp_path / "contract"))
    same(held(model), a_base())


def test_an_exception_leaves_the_base(tree):
    model = Model(a_base())
    with pytest.raises(KeyError), tree.checkout(model, "french/law"):
        raise KeyError
    same(held(model), a_base())
    plant(tree, "huge", seed=9, ratio=1e37, alpha=1e7)
    with tree.live(model) as live:
        live.checkout("french")
        with pytest.raises(NumericalError):
            live.checkout("huge")
        same(held(model), a_base())
        live.checkout("french")
    same(held(model), a_base())


def test_a_model_that_is_not_the_base_is_refused_untouched(tree):
    for change in (lambda t: t + 1, lambda t: t[:-1], lambda t: t.to(torch.int32)):
        tensors = {name: change(t) if name == f"{Q}.weight" else t for name, t in a_base().items()}
        model = Model(tensors)
        with pytest.raises(CompositionError), tree.checkout(model, "french"):
            pass
        same(held(model), tensors)


def test_a_cache_of_few_bytes_gives_the_same_weights(tree, tmp_path):
    tree.cache.budget = 1
    model = Model(a_base())
    with tree.live(model) as live:
        for path in ("french/law", "german", "french/law/contract"):
            live.checkout(path)
            same(held(model), merged(tree, path, tmp_path / path.replace("/", "-")))
    assert tree.cache.nbytes < 20_000


def test_children_are_opened_ahead_and_stop_with_the_checkout(tree):
    tree.cache.clear()
    model, nodes = Model(a_base()), tree.record.nodes
    with tree.live(model) as live:
        live.checkout("french")
        tree.cache.settle()
        assert nodes["french/law"] in tree.cache
        assert nodes["french/medicine"] in tree.cache
        assert nodes["french/law/contract"] not in tree.cache
        live.checkout("")
        tree.cache.settle()
        assert nodes["german"] in tree.cache
    assert [thread for thread in threading.enumerate() if thread.name.startswith("loraforge-prefetch")] == []
    tree.cache.clear()
    assert tree.cache.nbytes == 0


def test_what_is_opened_ahead_takes_nobodys_room(tree):
    tree.cache.clear()
    for path in ("german", "french"):
        tree.cache.open(tree.record.nodes[path])
    tree.cache.budget = tree.cache.nbytes
    tree.cache.prefetch(tree.record.nodes[path] for path in ("french/law", "french/medicine"))
    tree.cache.settle()
    assert tree.cache.nbytes <= tree.cache.budget
    assert all(tree.record.nodes[path] in tree.cache for path in ("french", "german"))
    tree.cache.stop()


def test_a_damaged_child_is_said_when_it_is_asked_for(tree):
    tree.cache.clear()
    law = tree.node("french/law").manifest.file("adapter_model.safetensors")
    blob = tree.registry.store.path / "blobs" / "sha256" / law.digest.hex[:2] / law.digest.hex
    data = bytearray(blob.read_bytes())
    data[-1] ^= 1
    blob.chmod(0o600)
    blob.write_bytes(data)
    model = Model(a_base())
    with tree.live(model) as live:
        live.checkout("french")
        tree.cache.settle()
        with pytest.raises(StoreError, match="damaged"):
            live.checkout("french/law")
    same(held(model), a_base())


def test_a_thousand_checkouts_over_fifty_nodes_end_where_they_began(registry, base, tmp_path):
    tree, draw = lf.Tree.create(registry, "wood", base), random.Random(1)
    paths = [""]
    for number in range(50):
        above = draw.choice([path for path in paths if path.count("/") < 6])
        paths.append(f"{above}/n{number}".removeprefix("/"))
        plant(tree, paths[-1], seed=number, targets=draw.choice([(Q,), (V,), (Q, V)]), rank=draw.choice([1, 2, 4]))
    wanted = {path: merged(tree, path, tmp_path / f"m{number}") for number, path in enumerate(paths)}
    model = Model(a_base())
    tree.cache.budget = 40_000
    with tree.live(model) as live:
        for _ in range(1000):
            path = draw.choice(paths)
            live.checkout(path)
            same(held(model), wanted[path])
        live.checkout("")
        same(held(model), a_base())
    same(held(model), a_base())


# --- how a tree changes -------------------------------------------------------------------------------------------


def weights(tree, path, tmp_path, count=[0]):  # noqa: B006 - a counter
    count[0] += 1
    return merged(tree, path, tmp_path / f"weights{count[0]}")


def test_flattened_with_a_rank_it_says_its_error(tree):
    small = tree.flatten("french/law", rank=3)
    assert 0 < small.report.error < 1
    assert max(pair.rank for pair in small.adapter.targets.values()) == 3
    assert tree.registry.push(small, "small:v1")


def test_squashing_and_rebasing_keep_every_weight_to_the_bit(tree, tmp_path):
    before = {path: weights(tree, path, tmp_path) for path in ("french/law", "french/law/contract", "french/medicine")}
    reshape.rebase(tree, "french/law", "german")
    same(weights(tree, "german/law", tmp_path), before["french/law"])
    same(weights(tree, "german/law/contract", tmp_path), before["french/law/contract"])
    reshape.rebase(tree, "german/law", "")
    same(weights(tree, "law/contract", tmp_path), before["french/law/contract"])
    reshape.squash(tree, "law/contract")
    same(weights(tree, "contract", tmp_path), before["french/law/contract"])
    reshape.squash(tree, "french/medicine")
    same(weights(tree, "medicine", tmp_path), before["french/medicine"])
    assert set(tree.record.nodes) == {"german", "contract", "medicine"}
    assert tree.registry.store.fsck(deep=True).holds


def test_a_squash_leaves_what_another_branch_stands_on(tree, tmp_path):
    before = weights(tree, "french/law/contract", tmp_path)
    reshape.squash(tree, "french/law")
    assert set(tree.record.nodes) == {"german", "french", "french/medicine", "law", "law/contract"}
    same(weights(tree, "law/contract", tmp_path), before)


def test_a_rank_changes_children_and_must_be_said(tree):
    for change in (
        lambda **options: reshape.squash(tree, "french/law", rank=1, **options),
        lambda **options: reshape.rebase(tree, "french/law", "", rank=1, **options),
    ):
        before = tree.digest
        with pytest.raises(ConflictError, match="would change by the error"):
            change()
        assert tree.digest == before
    reshape.rebase(tree, "french/law", "", rank=1, force=True)
    assert tree.node("law").manifest.report["error"] > 0


def test_moving_renames_or_says_that_the_meaning_changes(tree, tmp_path):
    law = tree.node("french/law").digest
    reshape.move(tree, "french/law", "french/droit")
    assert tree.node("french/droit").digest == law
    assert "french/droit/contract" in tree.record.nodes
    with pytest.raises(ConflictError, match="means other weights"):
        reshape.move(tree, "french/droit", "german/law")
    reshape.move(tree, "french/droit", "german/law", keep_delta=True)
    node = tree.node("german/law")
    assert node.digest != law
    assert lf.content_id(node.adapter) == tree.registry.store.manifest(law).content_id
    exact = a_base()[f"{Q}.weight"].double() + node.adapter.targets[Q].delta()
    assert torch.equal(weights(tree, "german/law", tmp_path)[f"{Q}.weight"], exact.to(torch.bfloat16))


def test_old_nodes_stay_until_a_collection_and_come_back(tree):
    old, before = tree.digest, tree.record
    reshape.prune(tree, "french", recursive=True)
    assert set(tree.record.nodes) == {"german"}
    tree.registry.store.tag(old, lf_ref("t"), force=True)
    assert tree.record == before
    reshape.prune(tree, "french", recursive=True)
    tree.registry.store.gc(dry_run=False)
    assert not tree.registry.store.has(before.nodes["french/law"])
    assert [move.what for move in tree.history()][-1] == "tree prune french"


def lf_ref(text):
    from loraforge_registry.names import RefName

    return RefName.parse(text)


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        (lambda t: reshape.prune(t, "french"), ConflictError, "grew on french"),
        (lambda t: reshape.prune(t, "spanish"), NotFoundError, "no node"),
        (lambda t: reshape.prune(t, ""), NotFoundError, "base itself"),
        (lambda t: reshape.move(t, "german", "french"), ConflictError, "there already"),
        (lambda t: reshape.move(t, "french", "french/law/french"), ConflictError, "on french itself"),
        (lambda t: reshape.move(t, "german", "a/b"), NotFoundError, "no node 'a'"),
        (lambda t: reshape.move(t, "german", "A"), ReferenceSyntaxError, "no path"),
        (lambda t: reshape.squash(t, "german"), ConflictError, "one node"),
        (lambda t: reshape.squash(t, "french/law", rank=1), ConflictError, "error of the re-rank"),
        (lambda t: reshape.squash(t, "french/law", onto="german"), ConflictError, "does not stand on"),
        (lambda t: reshape.rebase(t, "french", "french/law"), ConflictError, "cannot stand"),
        (lambda t: reshape.rebase(t, "french/law", "french"), ConflictError, "already"),
        (lambda t: t.node("frensh"), NotFoundError, "did you mean 'french'"),
        (lambda t: lf.Tree.create(t.registry, "t", t.base()), ConflictError, "there already"),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_refused_and_changes_nothing(tree, change, error, said):
    before = tree.digest
    with pytest.raises(error, match=said):
        change(tree)
    assert tree.digest == before


def test_only_latest_moves(tree):
    tree.registry.store.tag(tree.digest, lf_ref("t:v1"))
    fixed = lf.Tree.open(tree.registry, "t:v1")
    with pytest.raises(ConflictError, match="only the tag latest grows"):
        reshape.prune(fixed, "german")
    assert lf.Tree.open(tree.registry, str(tree.digest)).record == tree.record


def test_an_adapter_is_no_tree_and_a_tree_no_adapter(tree):
    tree.registry.store.tag(tree.node("german").digest, lf_ref("a"))
    with pytest.raises(ManifestError, match="expected a tree"):
        lf.Tree.open(tree.registry, "a")
    with pytest.raises(ManifestError, match="is a tree"):
        lf.load("t", registry=tree.registry)


def test_what_does_not_fit_the_base_is_not_grafted(tree, registry):
    before = tree.digest
    other = adapter_for({"x.weight": normal(8, 8)}, targets=("x",))
    with pytest.raises(CompositionError):
        reshape.graft(tree, "x", artifact(registry.store, registry.push(other)))
    assert tree.digest == before


def test_somebody_elses_change_beside_ours_is_kept_and_one_in_the_way_is_said(tree):
    before = tree.record
    other = lf.Tree.open(tree.registry, "t")
    reshape.move(other, "german", "deutsch")
    tree.commit(before, {"french/medicine": None}, "prune")
    assert set(tree.record.nodes) == {"deutsch", "french", "french/law", "french/law/contract"}
    reshape.prune(other, "french/law", recursive=True)
    with pytest.raises(ConflictError, match="somebody else"):
        tree.commit(before, {"french/law": before.nodes["french"]}, "graft")


def test_another_base_is_refused(tree, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    save_file(a_base(torch.float16), other / "model.safetensors")
    with pytest.raises(ConflictError, match="another model"):
        lf.Tree.open(tree.registry, "t").base(other)


def test_parameters_that_were_replaced_meanwhile_are_found_again(tree, tmp_path):
    """``model.to`` gives a module other tensors; what is written to the old ones would reach nobody."""
    model = Model(a_base())
    with tree.live(model) as live:
        live.checkout("french")
        for parameter in model.parameters():
            parameter.data = parameter.data.clone()
        live.checkout("french/law")
        same(held(model), merged(tree, "french/law", tmp_path / "merged"))
    same(held(model), a_base())
