"""One process that serves a store: sockets, time limits, the log."""

import asyncio
import ipaddress
import logging
import resource
import socket
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import urlsplit

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from loraforge_registry.errors import InputOutputError, StoreError
from loraforge_registry.files import Files
from loraforge_registry.new_store import check_format, make_store
from loraforge_registry.server import places
from loraforge_registry.server.accounts import Accounts
from loraforge_registry.server.app import LOG, App
from loraforge_registry.server.hub import Hub, Settings
from loraforge_registry.server.local import LocalBlobs, LocalRefs, Pins
from loraforge_registry.server.spectra import Compute, Spectra
from loraforge_registry.server.staged import Staged
from loraforge_registry.server.tickets import Signer

HEADER_SECONDS = 10.0
KEEP_ALIVE = 30  # seconds between two requests of a connection
MAX_HEADERS = 64 * 1024
MAX_CONNECTIONS = 2000


def state_of(store: Path) -> Path:
    """Where a server keeps what is not the store's: users, its key, uploads under way. Beside the store, for itself."""
    return store.with_name(f"{store.name}.server")


def accounts_of(store: Path) -> Accounts:
    """The users of the server over a store."""
    return Accounts(state_of(store) / "accounts.json")


def open_hub(store: Path, settings: Settings, compute: Compute | None = None) -> tuple[Hub, Pins]:
    """Join the parts over a store, which is made where there is none; ``compute`` works out spectra."""
    if not check_format(store):
        make_store(store)
    files = Files(store)
    pins = Pins(files)
    accounts = accounts_of(store)
    key = accounts.key()
    scratch = state_of(store) / "uploads"
    scratch.mkdir(mode=0o700, exist_ok=True)
    blobs = LocalBlobs(files, pins)
    staged = Staged(state_of(store) / "staged", blobs.size)
    spectra = None if compute is None else Spectra(store, compute)
    hub = Hub(blobs, LocalRefs(files, pins), accounts, Signer(key), scratch, staged, settings, spectra)
    places.clean(scratch)
    return hub, pins


def listen(host: str, port: int) -> socket.socket:
    """Take an address.

    Raises:
        InputOutputError: somebody has it, or it is not this machine's.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        with ExitStack() as closing:
            found = closing.enter_context(socket.socket(family, socket.SOCK_STREAM))
            found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            found.bind(address)
            found.listen(1024)
            closing.pop_all()
    except OSError as error:
        raise InputOutputError(error.errno or 0, f"{host} port {port}: {error.strerror or error}") from error
    return found


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def names_in(*places: str | None) -> list[str]:
    """The host names in addresses and URLs."""
    parts = [urlsplit(place if "//" in place else f"//{place}") for place in places if place and ":" not in place[:2]]
    return [part.hostname for part in parts if part.hostname]


def check_exposed(host: str, accounts: Accounts) -> None:
    """Refuse to be reached by others while nobody has a token.

    Raises:
        StoreError: with the way out.
    """
    if not is_loopback(host) and not accounts.tokens():
        raise StoreError(
            f"{host} can be reached from other machines, and nobody has a token: loraforge serve user add NAME first, "
            "or --host 127.0.0.1"
        )


def serve(hub: Hub, pins: Pins, bound: socket.socket) -> None:
    """Serve until a signal."""
    _log_to_stderr()
    _Patient.most = _connections()
    config = uvicorn.Config(
        App(hub),
        http=_Patient,
        loop="asyncio",
        lifespan="off",
        ws="none",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        limit_concurrency=MAX_CONNECTIONS + 100,
        timeout_keep_alive=KEEP_ALIVE,
        timeout_graceful_shutdown=10,
    )
    try:
        asyncio.run(uvicorn.Server(config).serve(sockets=[bound]))
    finally:
        if hub.spectra is not None:
            hub.spectra.close()
        pins.close()


class _Patient(HttpToolsProtocol):
    """HTTP as uvicorn speaks it, with limits to how long a client may take, and how much, to say what it wants.

    Where there are too many connections, the one that has said nothing for longest goes: who asks is served.
    """

    most: ClassVar[int] = MAX_CONNECTIONS
    _silent: ClassVar[dict["_Patient", None]] = {}  # in the order in which they fell silent

    def connection_made(self, transport: Any) -> None:  # noqa: ANN401 - uvicorn's signature
        super().connection_made(transport)
        self._head = 0
        self._waiting = self.loop.call_later(HEADER_SECONDS, transport.abort)
        self._silent[self] = None
        if len(self.connections) > self.most:
            next(iter(self._silent)).transport.abort()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._head:
            self._head += len(data)
            if self._head > MAX_HEADERS:
                self.transport.abort()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._head = 1
        self._waiting.cancel()
        self._waiting = self.loop.call_later(HEADER_SECONDS, self.transport.abort)

    def on_headers_complete(self) -> None:
        self._head = 0
        self._waiting.cancel()
        self._silent.pop(self, None)
        super().on_headers_complete()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if not self.transport.is_closing():
            self._silent[self] = None

    def connection_lost(self, exc: Exception | None) -> None:
        self._waiting.cancel()
        self._silent.pop(self, None)
        super().connection_lost(exc)


def _connections() -> int:
    """How many connections there may be; each is an open file, as is what it reads. The limit is raised if it may."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 2 * MAX_CONNECTIONS
    if soft != resource.RLIM_INFINITY and soft < wanted:
        soft = wanted if hard == resource.RLIM_INFINITY else min(hard, wanted)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return MAX_CONNECTIONS if soft == resource.RLIM_INFINITY else min(MAX_CONNECTIONS, soft // 2)


def _log_to_stderr() -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    LOG.handlers[:] = [handler]
    LOG.setLevel(logging.INFO)
    LOG.propagate = False
    logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
