"""One line about an adapter, the same wherever one is printed."""

from loraforge_cli.describe import Described
from loraforge_cli.output import count, size, spread


def line(described: Described) -> str:
    """Say name, digest, ranks, targets and size."""
    name = f"{described.ref}  " if described.ref else ""
    digest = described.digest
    short = f"sha256:{digest.short}  " if digest else ""
    ranks, targets = spread(described.ranks), len(described.layout.targets)
    manifest = described.manifest
    return (
        f"{name}{short}rank {ranks}, {targets} target{'s' * (targets != 1)}, "
        f"{count(manifest.parameters)} parameters, {size(manifest.size)}"
    )
