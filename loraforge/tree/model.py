"""The face of a tree: a name in a store that moves by compare-and-swap, and the nodes that it has."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from loraforge.checkpoint.merge import merge as merge_checkpoint
from loraforge.checkpoint.reader import open_checkpoint
from loraforge.errors import ConflictError, NotFoundError
from loraforge.formats import peft
from loraforge.registry import Registry
from loraforge.training import TrainConfig, train
from loraforge.training.provenance import base_digest, trained
from loraforge.tree.cache import Cache
from loraforge.tree.flatten import flatten
from loraforge.tree.live import Live
from loraforge.tree.nodes import below, check_fits, ingredients, path_of
from loraforge.version import __version__
from loraforge_registry.canonical import Value
from loraforge_registry.digest import Digest
from loraforge_registry.manifest import Artifact, Derivation, Input, Manifest
from loraforge_registry.names import DEFAULT_TAG, Reference, RefName
from loraforge_registry.paths import AnyPath, expand
from loraforge_registry.refs import Move
from loraforge_registry.trees import TreeRecord, check_path, parent_path, steps_to

if TYPE_CHECKING:
    from torch import nn

    from loraforge.adapter import Adapter
    from loraforge.checkpoint.result import MergeResult
    from loraforge.compose import Reranked


@dataclass(frozen=True)
class Node:
    """One node as it was when it was looked at: its tree, its path in it, and the artifact there."""

    tree: "Tree"
    path: str
    digest: Digest

    @property
    def manifest(self) -> Manifest:
        """The artifact's record: files, where it came from, its losses."""
        return self.tree.registry.store.manifest(self.digest)

    @property
    def adapter(self) -> "Adapter":
        """The adapter, opened."""
        return self.tree.cache.open(self.digest)

    @property
    def parent(self) -> "Node | None":
        """The node below it; None where that is the base."""
        above = parent_path(self.path)
        return None if above is None else self.tree.node(above)

    @property
    def children(self) -> list["Node"]:
        """The nodes grown on it."""
        return [node for node in self.tree.nodes if parent_path(node.path) == self.path]

    def grow(self, name: str, model: "nn.Module", data: Any, config: TrainConfig, **options: Any) -> "Node":  # noqa: ANN401 - as ``train``
        """Train a child; see ``Tree.grow``."""
        return self.tree.grow(f"{self.path}/{name}", model, data, config, **options)


class Tree:
    """A tree in a store. It reads its name anew for every question, so it always says what is so now.

    Use ``Tree.create`` or ``Tree.open``.
    """

    def __init__(self, registry: Registry, ref: RefName | None, digest: Digest | None = None) -> None:
        self.registry, self.ref = registry, ref
        self._fixed = digest
        self.cache = Cache(registry)
        self._base: Path | None = None
        self._live: dict[int, Live] = {}

    @classmethod
    def create(cls, registry: Registry, name: str, base: AnyPath) -> Self:
        """Make a tree without nodes on a base checkpoint.

        Cost: reads the base once, to know it by its content.

        Raises:
            ConflictError: the name is taken.
            NotFoundError, FormatError: no checkpoint is at ``base``.
        """
        ref = RefName.parse(name)
        taken = registry.store.lookup(ref)
        if taken is not None:
            raise ConflictError(f"{ref} is there already (sha256:{taken.short}): choose another name")
        record = TreeRecord(base_digest(base), str(expand(base).absolute()))
        registry.store.put_tree(record, ref, expected=None, what="tree create")
        return cls(registry, ref)

    @classmethod
    def open(cls, registry: Registry, reference: str) -> Self:
        """Open a tree by name, or one as it was by its digest.

        Raises:
            NotFoundError: nothing is called that.
            ManifestError: it is an adapter.
        """
        digest = registry.store.resolve(reference)
        registry.store.tree(digest)
        ref = Reference.parse(reference).ref
        return cls(registry, ref, digest if ref is None else None)

    @property
    def digest(self) -> Digest:
        """What the tree's name means now."""
        found = self._fixed if self.ref is None else self.registry.store.lookup(self.ref)
        if found is None:
            raise NotFoundError(f"there is no {self.ref} any more")
        return found

    @property
    def record(self) -> TreeRecord:
        """The base and the nodes, now."""
        return self.registry.store.tree(self.digest)

    @property
    def nodes(self) -> list[Node]:
        """All nodes, parents before children."""
        return [Node(self, path, digest) for path, digest in sorted(self.record.nodes.items())]

    def node(self, path: str) -> Node:
        """Return one node.

        Raises:
            NotFoundError: there is none.
        """
        return Node(self, path, path_of(self.record, check_named(path))[path])

    def history(self) -> list[Move]:
        """Return the moves of the tree's name, oldest first."""
        moves = [] if self.ref is None else self.registry.store.reflog(self.ref.name)
        return [move for move in moves if self.ref is not None and move.tag == self.ref.tag]

    def base(self, base: AnyPath | None = None) -> Path:
        """Return where the base is, having seen that it is the one that the tree was made for.

        Cost: reads the checkpoint, the first time.

        Raises:
            NotFoundError: it is not where it was; say where it is now.
            ConflictError: what is there is another model.
        """
        if self._base is not None and base is None:
            return self._base
        record = self.record
        path = expand(record.base_name if base is None else base)
        if not path.exists():
            raise NotFoundError(f"{path}: the tree's base is not there; say where it is (base=, --base)")
        found = base_digest(path)
        if found != record.base:
            raise ConflictError(
                f"{path} is another model than the tree's base: its tensors have the digest sha256:{found.short}, the "
                f"tree was made for sha256:{record.base.short}"
            )
        self._base = path
        return path

    # --- what a node is ---------------------------------------------------------------------------------------------

    def adapters(self, path: str) -> "list[Adapter]":
        """Return the adapters from the base to a node, that one last."""
        return [one.adapter for one in ingredients(self.cache, path_of(self.record, path))]

    def flatten(self, path: str, *, rank: int | None = None, energy: float | None = None) -> "Adapter | Reranked":
        """Return a node with all that is below it as one plain adapter on the base (see ``flatten.flatten``)."""
        return flatten(self.adapters(path), base=self.record.base_name, rank=rank, energy=energy)

    def merge(self, path: str, out: AnyPath, *, base: AnyPath | None = None, **options: Any) -> "MergeResult":  # noqa: ANN401 - as ``merge``
        """Write the base with a node's path merged in, rounded once; takes the options of ``lf.merge``.

        Raises:
            LoraforgeError: as ``lf.merge`` and ``Tree.base``.
        """
        labelled = [(f"sha256:{digest.hex}", 1.0) for digest in path_of(self.record, path).values()]
        return merge_checkpoint(self.base(base), labelled, out, registry=self.registry, **options)

    @contextmanager
    def checkout(self, model: "nn.Module", path: str, *, base: AnyPath | None = None) -> Iterator[Live]:
        """Put a node's weights into a live model for the block; behind it the model holds what it held before.

        The weights are to the bit those of the disk merge. Blocks may nest: only what differs is written.

        Raises:
            CompositionError: the model is not the tree's base.
        """
        with self.live(model, base=base) as live:
            before = dict(live.path)
            live.checkout(path)
            try:
                yield live
            finally:
                live.move(before)

    @contextmanager
    def live(self, model: "nn.Module", *, base: AnyPath | None = None) -> Iterator[Live]:
        """Give the handle that moves a model between nodes; behind the outermost block for a model the base is back."""
        if id(model) in self._live:
            yield self._live[id(model)]
            return
        with Live(
            model, self.base(base), self.cache, lambda path: path_of(self.record, path), self._children_of
        ) as live:
            self._live[id(model)] = live
            try:
                yield live
            finally:
                del self._live[id(model)]

    def _children_of(self, path: str) -> list[Digest]:
        return [digest for name, digest in self.record.nodes.items() if (parent_path(name) or "") == path]

    # --- how it changes ---------------------------------------------------------------------------------------------

    def grow(
        self,
        path: str,
        model: "nn.Module",
        data: Any,  # noqa: ANN401 - as ``train``: batches
        config: TrainConfig,
        *,
        facts: Mapping[str, Value] | None = None,
        **options: Any,  # noqa: ANN401 - as ``train``
    ) -> Node:
        """Train a new node atop its parent, in a live model that holds the base; takes the options of ``lf.train``.

        ``facts`` are said of the node beside its configuration: the data's digest, for instance.

        Raises:
            ConflictError: the node is there already.
            NotFoundError: its parent is not.
            TrainingError: as ``lf.train``.
        """
        record = self.check_free(path)
        with self.checkout(model, parent_path(path) or ""):
            adapter = train(model, data, config, **options)
        derivation = self.grown(path, record, trained(config, facts or {}, version=__version__))
        with self.registry.store.session():
            found = self.registry.store.put(peft.encode(adapter), derivation=derivation)
            self.commit(record, {path: found.digest}, f"tree grow {path}")
        return Node(self, path, found.digest)

    def grown(self, path: str, record: TreeRecord, derivation: Derivation) -> Derivation:
        """Return a training's derivation with the node's parent, and its base, in it."""
        parent = self.artifact(record, parent_path(path))
        return atop(parent, replace(derivation, parameters={**derivation.parameters, "base": str(record.base)}), 1.0)

    def artifact(self, record: TreeRecord, path: str | None) -> Artifact | None:
        """Return the artifact of a node; None for the base."""
        if path is None:
            return None
        digest = path_of(record, check_named(path))[path]
        return Artifact(digest, self.registry.store.manifest(digest).content_id)

    def check_free(self, *paths: str) -> TreeRecord:
        """Return the record, where all of these nodes may be made.

        Raises:
            ConflictError: one is there already, or the tree is one that stays as it is.
            NotFoundError: the parent of one is not there.
        """
        record = self.check_moves()
        for path in paths:
            check_path(path)
            path_of(record, parent_path(path) or "")
            if path in record.nodes:
                raise ConflictError(f"{path} is there already: prune or move it first, or choose another name")
        return record

    def check_moves(self) -> TreeRecord:
        """Return the record of a tree that may change.

        Raises:
            ConflictError: a tag other than latest, or a digest: it stays what it is.
        """
        if self.ref is None or self.ref.tag != DEFAULT_TAG:
            name = "NAME" if self.ref is None else self.ref.name
            raise ConflictError(
                f"{self.ref or f'sha256:{self.digest.short}'} stays as it is, only the tag latest grows: "
                f"loraforge tag {self.ref or self.digest} {name} makes it that"
            )
        return self.record

    def commit(
        self, before: TreeRecord, changed: Mapping[str, Digest | None], what: str, *, check: bool = True
    ) -> None:
        """Move the tree's name to a record with these nodes set, or taken away where they are None.

        Somebody else's change to other nodes meanwhile is kept; one that is in the way is a conflict.

        Raises:
            ConflictError: the nodes that this is about, or what they stand on, were changed meanwhile.
            CompositionError: a new node does not fit the base; nothing was changed.
        """
        self.check_moves()
        store, ref = self.registry.store, self.ref
        assert ref is not None  # noqa: S101 - check_moves says so
        now, digest = before, None
        while True:
            after = _applied(now, changed)
            digest = store.lookup(ref)
            current = None if digest is None else store.tree(digest)
            if current != now:
                now = _rebased(before, current, changed)
                continue
            if check:
                self._check_fits(after, changed)
            try:
                store.put_tree(after, ref, expected=digest, what=what)
            except ConflictError:
                continue  # somebody was faster: look again
            return

    def _check_fits(self, after: TreeRecord, changed: Mapping[str, Digest | None]) -> None:
        """Where the base is at hand, see that new nodes can be merged into it."""
        if self._base is None and not Path(after.base_name).exists():
            return
        with open_checkpoint(self._base or after.base_name) as checkpoint:
            check_fits(
                checkpoint, self.cache, [path_of(after, path) for path, new in changed.items() if new is not None]
            )


def check_named(path: str) -> str:
    """Refuse the base where a node is asked for.

    Raises:
        NotFoundError: the path is empty.
    """
    if not path:
        raise NotFoundError("the base itself is no node: name one")
    return path


def atop(parent: Artifact | None, derivation: Derivation, weight: float = 0.0) -> Derivation:
    """Return a derivation that names the artifact it is atop, which its inputs begin with where they lack it.

    The input's weight is 0 where the others are a sum that it is not in.
    """
    if parent is None:
        rest = {key: value for key, value in derivation.parameters.items() if key != "parent"}
        return replace(derivation, parameters=rest)
    named = replace(derivation, parameters={**derivation.parameters, "parent": str(parent.content_id)})
    if named.parent == parent:
        return named
    return replace(named, inputs=(Input(parent, weight), *named.inputs))


def _applied(record: TreeRecord, changed: Mapping[str, Digest | None]) -> TreeRecord:
    merged = {**record.nodes, **changed}
    return replace(record, nodes={path: digest for path, digest in sorted(merged.items()) if digest is not None})


def _rebased(before: TreeRecord, current: TreeRecord | None, changed: Mapping[str, Digest | None]) -> TreeRecord:
    """Return the tree as somebody else left it, if what is changed here does not depend on what they changed."""
    if current is None or current.base != before.base:
        raise ConflictError("the tree was removed, or made anew, meanwhile; nothing was changed")
    theirs = {p for p in {*before.nodes, *current.nodes} if before.nodes.get(p) != current.nodes.get(p)}
    ours = {step for path in changed for step in steps_to(path)}
    in_the_way = sorted((theirs & ours) | {p for p in theirs if any(p in below(current, q) for q in changed)})
    if in_the_way:
        raise ConflictError(
            f"{in_the_way[0]} was changed by somebody else meanwhile; look at the tree, and run this again"
        )
    return current
