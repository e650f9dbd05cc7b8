"""The commands that make adapters, and those on trees: what they need of torch is done once, not in each fork."""

from pathlib import Path

import torch

import loraforge as lf
from loraforge.compose import linear
from loraforge.formats import peft
from loraforge.tree import Tree, reshape
from loraforge.tree.model import atop
from loraforge_cli import recipes, sources, train_run, tree_view  # noqa: F401 - imported once, not in each fork
from loraforge_cli.commands import compose, rerank, tree  # noqa: F401 - as above
from loraforge_cli.train_parent import Parent
from loraforge_cli.train_run import RunResult, store_trained
from loraforge_registry.manifest import Artifact, Derivation
from loraforge_registry.names import RefName
from loraforge_registry.trees import parent_path
from tests.checkpoints import a_base, adapter_for, write_base
from tests.crash.store_faults import run
from tests.crash.store_scenarios import Action, Scenario, command
from tests.crash.store_world import World, quick_disk, restore, snapshot

Q, V = "model.layers.0.q", "model.layers.0.v"
NODES = ("french", "french/law", "french/law/contract", "german")
TREES = {
    "create": ("tree", "create", "u", "--base", "{root}/base"),
    "graft": ("tree", "graft", "t", "french/loose", "loose:v1"),
    "move": ("tree", "move", "t", "french/law", "french/laws"),
    "move --keep-delta": ("tree", "move", "t", "german", "french/german", "--keep-delta"),
    "rebase": ("tree", "rebase", "t", "german", "--onto", "french"),
    "squash": ("tree", "squash", "t", "french/law"),
    "prune": ("tree", "prune", "t", "german"),
    "flatten": ("tree", "flatten", "t", "french/law", "--as", "flat:v1"),
    "rm": ("rm", "t"),
    "tag": ("tag", "t", "t:v1"),
}
ALREADY = {"create": 4, "graft": 4, "move": 4, "move --keep-delta": 4, "rebase": 3, "squash": 3, "prune": 3, "rm": 3}
RECIPE = """
recipe: 1
inputs: {one: "a:v1", two: ./adapters/5}
steps:
  sum: {from: [{adapter: one, weight: 0.5}, two]}
  small: {method: rerank, from: sum, rank: 2}
result: small
"""

torch.set_num_threads(1)  # threads do not come along into a fork


def plant(root: Path, store: str = "store") -> None:
    """Give a store the tree t, and a loose adapter."""
    registry = lf.Registry(root / store)
    if registry.store.lookup(RefName("t")) is not None:
        return
    with quick_disk():
        if not (root / "base").exists():
            write_base(root / "base", a_base())
        planted = Tree.create(registry, "t", root / "base")
        for number, path in enumerate(NODES):
            reshape.graft(planted, path, _stored(registry, number))
        _stored(registry, 9, "loose:v1")


def _stored(registry: lf.Registry, seed: int, name: str | None = None) -> Artifact:
    digest = registry.push(adapter_for(a_base(), seed=seed, targets=(Q, V)), name)
    return Artifact(digest, registry.store.manifest(digest).content_id)


def grow(root: Path) -> None:
    """What growing does once a node is trained."""
    grown = Tree.open(lf.Registry(root / "store"), "t")
    record, path = grown.record, "german/new"
    derivation = atop(grown.artifact(record, parent_path(path)), Derivation("train", 1, (), {}), 1.0)
    with grown.registry.store.session():
        incoming = peft.encode(adapter_for(a_base(), seed=7, targets=(Q, V)))
        new = grown.registry.store.put(incoming, derivation=derivation).digest
        grown.commit(record, {path: new}, f"tree grow {path}")


def trained(world: World) -> Action:
    """What ``train`` does with what it made, atop a parent that was given as a directory."""
    parent = lf.load(str(world.adapters[5]))

    def action() -> None:
        above = Parent(str(world.adapters[5]), parent, lf.content_id(parent))
        made = linear([(parent, 0.25)])
        store_trained(
            lf.Registry(world.store), above, RunResult(made, made.derivation, {}), RefName("new"), force=False
        )

    return action


def a_recipe(world: World) -> None:
    """A recipe with an adapter of the store and a directory, whose steps the cache knows, as it does in later runs."""
    (world.root / "blend.yaml").write_text(RECIPE)
    before = snapshot(world.store)
    assert run(RECIPE_COMMAND(world)).code == 0
    restore(world.store, before)
    (world.root / "blend.lock").unlink()


RECIPE_COMMAND = command("compose", "{root}/blend.yaml", "--as", "blend:v1")
MAKING = (
    Scenario("compose", command("compose", "a:v1=0.5", "a=0.25", "--as", "blend:v1")),
    Scenario("compose directories", command("compose", 3, 5, "--rank", "1", "--as", "blend:v1")),
    Scenario("compose a recipe", RECIPE_COMMAND, a_recipe),
    Scenario("rerank --force", command("rerank", "a", "--rank", "1", "--as", "a:v1", "--force")),
    Scenario("train", trained),
    *(Scenario(f"tree {name}", command(*words), lambda world: plant(world.root), again=ALREADY.get(name))
      for name, words in TREES.items()),
    Scenario("tree grow", lambda world: lambda: grow(world.root), lambda world: plant(world.root)),
    Scenario("push a tree --to", command("push", "t", "--to", "file://{root}/store", store="backup"),
             lambda world: plant(world.root, "backup"), remote=True),
    Scenario("pull a tree's URL", command("pull", "file://{root}/backup#t", "--with-lineage"),
             lambda world: plant(world.root, "backup"), remote=True),
)  # fmt: skip
