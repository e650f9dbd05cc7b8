"""GET the page of a tree, and those of its nodes."""

from itertools import islice

from starlette.responses import Response

from loraforge_registry.errors import LoraforgeError
from loraforge_registry.manifest import README_FILE
from loraforge_registry.names import DEFAULT_TAG
from loraforge_registry.server import forest, repos, tree_page
from loraforge_registry.server.adapter_page import links_of, read_config, source_of, spectrum
from loraforge_registry.server.around import Around
from loraforge_registry.server.call import Call
from loraforge_registry.server.cards import card
from loraforge_registry.server.errors import no_entry
from loraforge_registry.server.forest import Tree
from loraforge_registry.server.hub import Hub
from loraforge_registry.server.nodes import manifest_of, read_node, read_nodes
from loraforge_registry.server.relations import Relations, relations
from loraforge_registry.server.repos import Repository, Revision
from loraforge_registry.server.tree_page import MAX_DRAWN, MAX_ROWS, Planted, Told
from loraforge_registry.server.web import Visit, page
from loraforge_registry.tree_figure import shown_first
from loraforge_registry.trees import steps_to


def whole(hub: Hub, call: Call, found: Repository, revision: Revision, tree: Tree) -> Response:
    """The page of a tree: the nodes nearest to the base are drawn, and read, first."""
    drawn, hidden = shown_first(list(tree.record.nodes), MAX_DRAWN)
    in_picture = set(drawn)
    rest = (path for path in tree.record.nodes if path not in in_picture)
    first = [*drawn, *islice(rest, MAX_ROWS - len(drawn))]
    nodes = {node.path: node for node in read_nodes(hub, revision.commit, tree, first)}
    planted = _planted(hub, call, found, revision, tree, relations(hub, call.user, found.namespace))
    body = tree_page.tree(planted, [nodes[path] for path in sorted(first)], [nodes[path] for path in drawn], hidden)
    return page(found.id, body, Visit(call.path, call.user))


def node(hub: Hub, call: Call) -> Response:
    """GET /{id}/tree/{rev}/{path}: a node of the tree there.

    Raises:
        RefusedError: 404, no such node, or no tree.
    """
    found = repos.find(hub, call.segments["id"], call.user)
    revision = repos.resolve(hub, found, call.segments["rev"])
    tree, path = forest.tree_at(hub, revision.commit), call.segments["path"].strip("/")
    if tree is None or path not in tree.record.nodes:
        raise no_entry(path[:200], revision.id)
    one = read_node(hub, revision.commit, tree, path)
    manifest = None if one.problem else manifest_of(hub, revision.commit, tree, path)
    layout = None if manifest is None else (read_config(hub, manifest) or (None, None))[1]
    below = [other for other in tree.record.nodes if other.startswith(f"{path}/")]
    drawn, hidden = shown_first([*steps_to(path), *below], MAX_DRAWN // 3)
    others, around = relations(hub, call.user, found.namespace), Around(hub, call.user)
    planted = _planted(hub, call, found, revision, tree, others, folder=f"{path}/")
    links = {} if manifest is None or manifest.derivation is None else links_of(around, manifest.derivation)
    sources = set() if manifest is None else set(manifest.lineage)
    nodes = ((other, digest) for other, digest in tree.record.nodes.items() if digest in sources)
    links = {**links, **{digest: planted.href(other) for other, digest in nodes}}
    told = Told(
        one,
        manifest,
        layout,
        around=list(read_nodes(hub, revision.commit, tree, [other for other in drawn if other != path])),
        hidden={above: number for above, number in hidden.items() if above in drawn},
        names={digest: name for digest, name in others.names.items() if digest not in links},
        links=links,
        used_by=sorted({place.repository for place in others.made_from(one.digest)}),
        spectrum=spectrum(hub, one.digest, manifest, layout) if tree.is_here else "",
    )
    return page(f"{found.id} · {path}", tree_page.node(planted, told), Visit(call.path, call.user))


def _planted(
    hub: Hub, call: Call, found: Repository, revision: Revision, tree: Tree, others: Relations, folder: str = ""
) -> Planted:
    try:
        shown = card(hub, found, revision, f"{folder}{README_FILE}")
    except (LoraforgeError, OSError):  # one of a node of a damaged tree
        shown = ""
    local = _called(found, revision) if tree.is_here else ""
    source = source_of(hub, call, found, revision)
    return Planted(found, revision, tree, source, local, shown, others.places)


def _called(found: Repository, revision: Revision) -> str:
    """What a tree of this machine is called here."""
    tags = sorted(tag for tag, digest in found.record.tags.items() if digest == revision.digest)
    return f"{found.name}:{tags[-1]}" if tags else f"{found.name}:{DEFAULT_TAG}"
