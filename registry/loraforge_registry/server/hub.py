"""What every handler is given: the store's two faces, who may do what, the limits, and what waits for a commit."""

from dataclasses import dataclass, field
from pathlib import Path

from loraforge_registry.server.accounts import Accounts
from loraforge_registry.server.interfaces import Blobs, Refs
from loraforge_registry.server.spectra import Spectra
from loraforge_registry.server.staged import Staged
from loraforge_registry.server.tickets import Signer

MEBI = 1024 * 1024


@dataclass(frozen=True, slots=True)
class Settings:
    """The limits of a server, in bytes, and whom it answers."""

    anonymous: bool = True  # whether who has no token may read what is not private
    hosts: frozenset[str] = frozenset()  # names a request may call this server by, beside addresses and localhost
    public_url: str | None = None
    max_file: int = 64 * 1024 * MEBI
    max_inline: int = 10 * MEBI  # of one file that lies in a commit itself
    max_commit: int = 256 * MEBI  # of a commit's body
    quota: int | None = None  # of all files in a namespace
    inline_below: int = MEBI  # a client is asked to send larger files apart
    multipart_above: int = 4096 * MEBI
    part_size: int = 256 * MEBI


@dataclass(frozen=True)
class Hub:
    """The parts of one server."""

    blobs: Blobs
    refs: Refs
    accounts: Accounts
    signer: Signer
    scratch: Path  # parts and xorbs of uploads that are under way
    staged: Staged
    settings: Settings = field(default_factory=Settings)
    spectra: Spectra | None = None  # where somebody can work them out
