"""Remotes: other places that keep adapters, behind one small interface (``offer.Remote``).

    with open_remote("hf://me/french-lora@v1") as remote:
        offer = remote.offer()
        receive(store, remote, offer, RefName("french", "v1"), force=False, lineage=True, what="pull")

What comes from one is hashed here, always, and passes the gates of a push before it has a name.
``huggingface_hub`` is imported where an ``hf://`` address is used, and nowhere else.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from loraforge_registry.remotes.address import HubAddress, is_url, parse_address
from loraforge_registry.remotes.offer import Listed, Offer, OfferedTree, Published, Remote, RemoteFile
from loraforge_registry.remotes.transfer import Received, receive
from loraforge_registry.remotes.trees import receive_tree
from loraforge_registry.store import Store
from loraforge_registry.strict_json import Json

__all__ = [
    "Listed",
    "Offer",
    "OfferedTree",
    "Published",
    "Received",
    "Remote",
    "RemoteFile",
    "is_url",
    "open_remote",
    "receive",
    "receive_tree",
    "search_hub",
]


@contextmanager
def open_remote(url: str, *, private: bool = False) -> Iterator[Remote]:
    """Open the remote that a URL names; a repository that a push has to make is then ``private``, or not.

    Raises:
        ReferenceSyntaxError: it is no URL of a remote.
        StoreError: a directory is something else than a store.
    """
    address = parse_address(url)
    with ExitStack() as pins:
        if isinstance(address, HubAddress):
            from loraforge_registry.remotes.hub import HubRemote, connect  # noqa: PLC0415 - a store needs none of it

            yield HubRemote(connect(), address, private=private)
        else:
            from loraforge_registry.remotes.directory import StoreRemote  # noqa: PLC0415

            yield StoreRemote(Store(address.path), address, pins)


def search_hub(text: str, *, limit: int = 20) -> list[dict[str, Json]]:
    """Return the adapters that a hub finds by name, as it describes them (see ``hub.search``)."""
    from loraforge_registry.remotes.hub import connect, search  # noqa: PLC0415

    return search(connect(), text, limit)
