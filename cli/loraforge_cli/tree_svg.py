"""A tree as a picture in a file: the drawing, with its colours, on paper."""

from html import escape

from loraforge_cli.output import many
from loraforge_cli.tree_view import Shown, View
from loraforge_registry.tree_figure import Card, figure

_STYLE = """
  text { font-family: Inter, "Segoe UI", "Helvetica Neue", Helvetica, Arial, sans-serif; }
  .t-paper { fill: #fbfaf7; }
  .t-card { fill: #ffffff; stroke: #ddd8cd; }
  .t-name { fill: #23201b; font-weight: 600; font-size: 14px; }
  .t-facts { fill: #6b655b; font-size: 11.5px; }
  .t-digest { fill: #a39c8f; font-size: 10.5px; }
  text.t-digest { font-family: ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; }
  .t-branch { fill: none; stroke: #b9ae9b; stroke-linecap: round; }
  .t-base { fill: #3b352c; }
  .t-base-name { fill: #fbfaf7; font-weight: 600; font-size: 14px; }
  .t-base-facts { fill: #cfc7b8; font-size: 11.5px; }
  .t-mark { fill: #8f8778; }
  .t-train { fill: #4c8b6b; }
  .t-graft { fill: #c98a2b; }
  .t-rebase, .t-squash, .t-move { fill: #4f76b3; }
  .t-damaged { fill: #c0453a; }
  @media (prefers-color-scheme: dark) {
    .t-paper { fill: #1d1b18; }
    .t-card { fill: #292622; stroke: #423d36; }
    .t-name { fill: #f1ece2; }
    .t-facts { fill: #b3ab9d; }
    .t-digest { fill: #7d766a; }
    .t-branch { stroke: #6a6152; }
    .t-base { fill: #e9e2d4; }
    .t-base-name { fill: #23201b; }
    .t-base-facts { fill: #5d564a; }
  }
"""


def svg(tree: View) -> str:
    """Return the picture as an SVG document."""
    drawn = figure(_base(tree), [_card(node) for node in tree.nodes])
    width, height = f"{drawn.width:.0f}", f"{drawn.height:.0f}"
    size = f'width="{width}" height="{height}"'
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} viewBox="0 0 {width} {height}" role="img">',
        f"<title>{escape(str(tree.ref or tree.digest))}</title><style>{_STYLE}</style>",
        f'<rect class="t-paper" {size} rx="14"/>',
        drawn.body,
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def _card(node: Shown) -> Card:
    facts = [fact.removesuffix(" parameters") for number, fact in enumerate(node.facts) if number != 2]
    return Card(
        node.path,
        node.name,
        (" · ".join(facts), f"sha256:{node.digest.short}"),
        mark="damaged" if node.problem else node.made_by,
        tip=f"{node.path}  {node.digest}",
        rank=max(node.ranks, default=0),
    )


def _base(tree: View) -> Card:
    name = tree.record.base_name
    short = name.rstrip("/").rpartition("/")[2] or name
    return Card("", short, (f"the base · {many(len(tree.nodes), 'node')}",), tip=name)
