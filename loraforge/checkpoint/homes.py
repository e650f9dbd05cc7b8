"""Which tensor of a checkpoint an adapter's target adapts: one rule, written down, and injective.

A target is a module's path as the training program saw it, and checkpoints of one model differ in what stands in
front: ``model.layers.0...`` or ``layers.0...``, ``transformer.h.0...`` or ``h.0...``. One spelling is chosen for the
whole adapter, the first of these with which every key finds a tensor:

1. as it is;
2. without ``base_model.model.``, ``model.`` or ``transformer.`` in front, where that stands there;
3. with ``model.``, ``transformer.`` or ``base_model.model.`` in front.

Two keys that come to mean one tensor are an error, and so is a key without a tensor.
"""

from collections.abc import Collection, Mapping, Sequence

from loraforge.errors import CompositionError

# What stands beside or in place of a weight that a quantiser has packed.
PACKED = (".qweight", ".weight_packed", ".qzeros", ".weight.absmax", ".weight_scale", ".weight_scale_inv")
PREFIXES = ("base_model.model.", "model.", "transformer.")
_LISTED = 3


def find_homes(keys: Sequence[str], tensors: Collection[str], label: str) -> Mapping[str, str]:
    """Return the tensor of each key (``<module>.weight``).

    Raises:
        CompositionError: no spelling gives every key a tensor, or two keys would share one.
    """
    attempts = [_spelt(keys, take=None, put="")]
    attempts += [_spelt(keys, take=prefix, put="") for prefix in PREFIXES]
    attempts += [_spelt(keys, take=None, put=prefix) for prefix in PREFIXES]
    found = max(attempts, key=lambda spelling: sum(name in tensors for name in spelling.values()))
    missing = [key for key, name in found.items() if name not in tensors]
    if missing:
        _check_packed([found[key] for key in missing], tensors)
        raise CompositionError(
            f"{label}: {len(missing)} of {len(keys)} keys have no tensor in the base, {_listing(missing)} the first"
            f"{_near(missing[0], tensors)}; is this the base it was trained on?"
        )
    homes: dict[str, str] = {}
    for key, name in found.items():
        if homes.setdefault(name, key) != key:
            raise CompositionError(f"{label}: {homes[name]!r} and {key!r} both mean the base's tensor {name!r}")
    return found


def _check_packed(names: Sequence[str], tensors: Collection[str]) -> None:
    for name in names:
        packed = [name.removesuffix(".weight") + end for end in PACKED if name.removesuffix(".weight") + end in tensors]
        if packed:
            raise CompositionError(
                f"{name!r} is quantised (the base has {packed[0]!r} for it) and cannot be merged into; merge into the "
                "original weights, then quantise"
            )


def _spelt(keys: Sequence[str], *, take: str | None, put: str) -> dict[str, str]:
    return {key: put + (key if take is None else key.removeprefix(take)) for key in keys}


def _listing(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names[:_LISTED]))


def _near(key: str, tensors: Collection[str]) -> str:
    """Say what the base has with the same last components."""
    for parts in (3, 2):
        end = "." + ".".join(key.split(".")[-parts:])
        near = sorted(name for name in tensors if name.endswith(end))
        if near:
            return f" (the base has {near[0]!r})"
    return ""
