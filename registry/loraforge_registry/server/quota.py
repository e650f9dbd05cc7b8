"""How much a namespace may hold: every file of every commit that a name of it reaches, each counted once."""

from collections.abc import Mapping

from loraforge_registry.digest import Digest
from loraforge_registry.server import repos
from loraforge_registry.server.errors import RefusedError
from loraforge_registry.server.holdings import blobs_of
from loraforge_registry.server.hub import Hub


def check(hub: Hub, namespace: str, new: Mapping[Digest, int]) -> None:
    """Refuse what would take a namespace over its limit.

    Raises:
        RefusedError: 413, with both numbers.
    """
    if hub.settings.quota is None:
        return
    held: dict[Digest, int] = dict(new)
    for name in hub.refs.names():
        if name.startswith(f"{namespace}--"):
            found = repos.load(hub, name)
            held |= blobs_of(hub, found) if found is not None and found.digest is not None else {}
    total = sum(held.values())
    if total > hub.settings.quota:
        raise RefusedError(
            413, f"{namespace} would hold {total} bytes; its limit here is {hub.settings.quota}", "QuotaExceeded"
        )
