"""The page of a tree: the tree drawn, a row for every node, how to load one; and the page of a node of it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from loraforge_registry.digest import Digest
from loraforge_registry.layout import Layout
from loraforge_registry.manifest import Manifest
from loraforge_registry.server import sections
from loraforge_registry.server.around import node_page
from loraforge_registry.server.browse import for_base
from loraforge_registry.server.forest import Tree
from loraforge_registry.server.loading import Source
from loraforge_registry.server.nodes import Node
from loraforge_registry.server.relations import Place
from loraforge_registry.server.repos import Repository, Revision
from loraforge_registry.server.tree_loading import tree_loading
from loraforge_registry.server.web import copyable, count, printable, size, table, text
from loraforge_registry.tree_figure import Card, figure, fitting, more
from loraforge_registry.trees import parent_path, steps_to

MAX_DRAWN = 120
MAX_ROWS = 400


@dataclass(frozen=True)
class Planted:
    """A tree at a revision of a repository, and what is known around it by whoever asks."""

    repository: Repository
    revision: Revision
    tree: Tree
    source: Source
    local: str  # what the tree is called on this machine, where it is here
    card: str = ""
    places: Mapping[Digest, Place] = field(default_factory=dict)  # where nodes are as adapters

    def href(self, path: str) -> str:
        """The page of a node."""
        return node_page(self.repository, self.source.revision, path)


@dataclass(frozen=True)
class Told:
    """What the page of a node tells beside what that of the tree does."""

    node: Node
    manifest: Manifest | None
    layout: Layout | None
    around: Sequence[Node]  # what it stands on, and what grew on it, without itself
    hidden: Mapping[str, int]
    names: Mapping[Digest, str]
    links: Mapping[Digest, str]
    used_by: Sequence[str]
    spectrum: str = ""


def tree(planted: Planted, nodes: Sequence[Node], drawn: Sequence[Node], hidden: Mapping[str, int]) -> str:
    """The page of a tree. ``drawn`` are its nodes in the picture, ``hidden`` counts children that are not."""
    record = planted.tree.record
    said = [f"a tree of {count(len(record.nodes), 'node', 'nodes')}"]
    said += [f"base {for_base(record.base_name)}"] if record.base_name else []
    facts = [node.facts for node in nodes if node.facts is not None]
    if facts and len(facts) == len(record.nodes):
        said += [count(sum(one.parameters for one in facts), "parameter", "parameters")]
        said += [size(sum(one.size for one in facts))]
    said += sections.revisions(planted.repository, planted.revision)
    head = f"{sections.heading(planted.repository, planted.source.short)}{sections.chips(said)}"
    picture = f"{_problems(planted, nodes)}{_picture(planted, drawn, hidden)}"
    if not record.nodes:
        grow = f"loraforge tree grow {planted.local} NODE --data FILE" if planted.local else ""
        picture = f"<p class=quiet>It has no nodes yet.</p>{copyable(grow) if grow else ''}"
    deepest = max(record.nodes, key=lambda path: (path.count("/"), path), default="")
    loading = _loading(planted, deepest, nodes) if deepest else ""
    body = _split(f"{loading}{planted.card}", f"{_digests(planted.tree)}{_files(planted)}")
    return f"{head}{picture}{_table(planted, nodes)}{body}"


def node(planted: Planted, told: Told) -> str:
    """The page of a node: what it is, what it stands on and what grew on it, how to load it."""
    found, one = planted.repository, told.node
    steps = steps_to(one.path)
    below = "".join(f" / <a class=title href='{planted.href(step)}'>{step.rpartition('/')[2]}</a>" for step in steps)
    title = sections.heading(found, planted.source.short, f"<span class=path>{below}</span>")
    above = parent_path(one.path)
    said = [f"atop <a href='{planted.href(above)}'>{above}</a>" if above else "atop the base"]
    said += [f"base {for_base(planted.tree.record.base_name)}"] if planted.tree.record.base_name else []
    if one.facts is not None and not one.problem:
        said += [f"rank {_span(one.facts.ranks)}", count(one.facts.targets, "target", "targets")]
        said += [count(one.facts.parameters, "parameter", "parameters"), size(one.facts.size)]
        said += [f"loss {one.facts.loss:.4g}"] if one.facts.loss is not None else []
        said += [f"made by {text((one.facts.operation or 'import')[:60])}"]
    said += [f"commit {planted.revision.id[:12]}"]
    place = planted.places.get(one.digest)
    also = f"<p>It is an adapter of its own, too: <a href='{place.path}'>{text(place.label)}</a>.</p>" if place else ""
    shown = sorted([*told.around, one], key=lambda node: node.path)
    picture = _picture(planted, shown, told.hidden, this=one.path)
    left = [_loading(planted, one.path, [one, *told.around]), planted.card]
    left += [sections.targets_table(told.manifest, told.layout), told.spectrum]
    right = [sections.made_from(told.manifest, told.names, told.links), sections.used_by(told.used_by)]
    digests = f"artifact  {one.digest}" + (f"\ncontent   {told.manifest.content_id}" if told.manifest else "")
    right.append(f"<h2>Digests</h2>{copyable(digests)}")
    right.append(sections.files_table(found, planted.revision, only_in=f"{one.path}/"))
    head = f"{title}{sections.chips(said)}{_problems(planted, [one])}{also}{picture}"
    return f"{head}{_split(''.join(left), ''.join(right))}"


def _files(planted: Planted) -> str:
    if not planted.revision.commit.files:
        return "<p class=quiet>A tree of so many nodes is shown without its files.</p>"
    said = "<p class=quiet>Each node's files are on its page.</p>" if planted.tree.record.nodes else ""
    return f"{sections.files_table(planted.repository, planted.revision, only_in='')}{said}"


def _loading(planted: Planted, path: str, nodes: Sequence[Node]) -> str:
    """How to load a node; of a tree that is false nothing, as the lines would be refused."""
    if any(node.problem for node in nodes):
        return ""
    return tree_loading(planted.source, planted.revision.commit, planted.tree, path, planted.local)


def _split(left: str, right: str) -> str:
    return f"<div class=split><div>{left}</div><div>{right}</div></div>"


def _problems(planted: Planted, nodes: Sequence[Node]) -> str:
    """The first few sentences on what is false, above everything that they make doubtful."""
    wrong = [node for node in nodes if node.problem]
    if not wrong:
        return ""
    items = "".join(f"<li><b>{node.path}</b>: {text(node.problem[:300])}</li>" for node in wrong[:8])
    items += f"<li>and {len(wrong) - 8:,} more</li>" if len(wrong) > 8 else ""
    said = (
        "Not all of it is here as its record says"
        if planted.tree.is_here
        else ("This is not the tree that its record describes, and a pull would refuse it")
    )
    return f"<div class=wrong><p>{said}:</p><ul class=line>{items}</ul></div>"


def _picture(planted: Planted, drawn: Sequence[Node], hidden: Mapping[str, int], this: str = "") -> str:
    if not drawn:
        return ""
    cards = [_card(planted, node, this=node.path == this) for node in drawn]
    cards += [more(above, number) for above, number in hidden.items()]
    cards.sort(key=lambda card: card.path.split("/"))
    name = printable(planted.tree.record.base_name, "")
    short, nodes = name.rstrip("/").rpartition("/")[2] or name or "base", len(planted.tree.record.nodes)
    base = Card(
        "", short, (f"the base · {count(nodes, 'node', 'nodes')}",), tip=name[:300], href=_tree_page(planted, this)
    )
    found = figure(base, cards, lines=fitting(cards), edge=2)
    return (
        f"<div class='scroll grown'><svg width={found.width:.0f} height={found.height:.0f} role=group "
        f"aria-label='The tree'>{found.body}</svg></div>"
    )


def _tree_page(planted: Planted, this: str) -> str | None:
    """From a node's page back to that of the tree."""
    return planted.href("").removesuffix("/") if this else None


def _card(planted: Planted, node: Node, *, this: bool) -> Card:
    notes: tuple[str, ...] = ()
    facts, rank = node.facts, 0
    if node.problem:
        notes = ("not as the tree says",)
    elif facts is not None:
        rank = facts.ranks[1]
        judged = [] if facts.loss is None else [f"loss {facts.loss:.4g}"]
        made = [] if facts.operation in (None, "train") else [printable(facts.operation or "", "")[:20]]
        notes = (" · ".join([f"rank {_span(facts.ranks)}", *judged, *made]),)
    short = f"r {_span(facts.ranks)}" if facts is not None and not node.problem else ""
    mark = "damaged" if node.problem else "" if facts is None else facts.operation or ""
    return Card(
        node.path,
        node.name,
        (*notes, node.digest.short),
        mark=mark,
        tip=f"{node.path}  {node.digest}",
        href=None if this else planted.href(node.path),
        rank=rank,
        short=short if len(short) < 10 else "",
        this=this,
    )


def _table(planted: Planted, nodes: Sequence[Node]) -> str:
    if not nodes:
        return ""
    losses = any(node.facts and node.facts.loss is not None for node in nodes)
    columns = ["node", "made by", "rank>", "targets>", "parameters>", *(["loss>"] if losses else []), "adapter"]
    rows = [_row(planted, node, losses=losses) for node in nodes[:MAX_ROWS]]
    unread = sum(node.facts is None and not node.problem for node in nodes)
    total = len(planted.tree.record.nodes)
    notes = [f"{count(total - len(rows), 'more node is', 'more nodes are')} not listed"] if total > len(rows) else []
    notes += [f"{count(unread, 'node was', 'nodes were')} not read for this page: see their own"] if unread else []
    said = "".join(f"<p class=quiet>{note}.</p>" for note in notes)
    return f"<h2>Nodes</h2>{table(columns, rows)}{said}"


def _row(planted: Planted, node: Node, *, losses: bool) -> list[str]:
    facts = node.facts if not node.problem else None
    cells = ["", "", "", ""]
    if facts is not None:
        cells = [
            text((facts.operation or "import")[:40]),
            _span(facts.ranks),
            f"{facts.targets:,}",
            f"{facts.parameters:,}",
        ]
    if losses:
        cells.append("" if facts is None or facts.loss is None else f"{facts.loss:.4g}")
    place = planted.places.get(node.digest)
    adapter = f"<code>{node.digest.short}</code>"
    adapter += f" <a href='{place.path}'>{text(place.label)}</a>" if place else ""
    return [f"<a href='{planted.href(node.path)}'>{node.path}</a>", *cells, adapter]


def _span(ranks: tuple[int, int]) -> str:
    low, high = ranks
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def _digests(tree: Tree) -> str:
    said = f"tree  {tree.digest}\nbase  {tree.record.base}"
    what = "The tree's digest is of its base and of all its nodes; the base's is of its tensors."
    return f"<h2>Digests</h2>{copyable(said)}<p class=quiet>{what}</p>"
