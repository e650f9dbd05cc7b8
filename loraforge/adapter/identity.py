"""Who an adapter is: the artifact it came from, the way it was made, or what it computes."""

from blake3 import blake3

from loraforge.adapter.mapped import discard
from loraforge.adapter.model import Adapter
from loraforge.adapter.tensors import dtype_name, named_tensors, raw_bytes
from loraforge_registry import layout
from loraforge_registry.digest import Digest
from loraforge_registry.header import TensorEntry
from loraforge_registry.manifest import Artifact, Derivation


def content_id(adapter: Adapter) -> Digest:
    """Return the digest of what ``adapter`` computes: that of its manifest, were it stored.

    Cost: reads every tensor once (BLAKE3).
    """
    targets = {
        name: layout.Target(pair.kind, pair.rank, pair.alpha, pair.rslora, pair.shape, pair.groups, {})
        for name, pair in adapter.targets.items()
    }
    tensors = []
    for key, tensor in named_tensors(adapter).items():
        digest = Digest.from_raw("blake3", blake3(raw_bytes(tensor)).digest())
        tensors.append((TensorEntry(key, dtype_name(tensor), tuple(tensor.shape), 0, 0), digest))
        discard(tensor)
    return layout.content_id(layout.Layout(targets, tuple(adapter.extras), adapter.settings), tensors)


def identity(adapter: Adapter) -> Artifact | Derivation | Digest:
    """Return what a derivation records about an input: its artifact, else how it was made, else its content id.

    An artifact is only believed if the adapter still computes what the artifact does: a caller may have replaced a
    field and left the origin.

    Cost: reads every tensor once.
    """
    if adapter.origin is None and adapter.derivation is not None:
        return adapter.derivation
    found = content_id(adapter)
    return adapter.origin if adapter.origin is not None and adapter.origin.content_id == found else found
