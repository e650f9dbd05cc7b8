"""Trees of adapters: every node stands on its parent's weights, ``W_node = round(W_base + sum of the path)``."""

from loraforge.tree.model import Node, Tree

__all__ = ["Node", "Tree"]
