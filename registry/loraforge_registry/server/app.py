"""The application: who asks, what for, and what goes wrong becomes one sentence of JSON."""

import errno
import ipaddress
import json
import logging
import secrets
import time
from base64 import b64decode
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit

import anyio.to_thread
from starlette.responses import Response

from loraforge_registry.errors import ConflictError, LoraforgeError, NotFoundError
from loraforge_registry.server import api, browse, commits, downloads, lfs, pages, tree_pages, xet
from loraforge_registry.server.accounts import User
from loraforge_registry.server.call import Call, Message, Receive
from loraforge_registry.server.errors import RefusedError, bad_request, unauthorised
from loraforge_registry.server.hub import Hub
from loraforge_registry.server.routing import Route, Router

LOG = logging.getLogger("loraforge.server")
Send = Callable[[Message], Awaitable[None]]
Scope = dict[str, Any]

_MODEL = "/api/models/{id}"
ROUTES: Sequence[Route] = (
    Route("GET", "/api/whoami-v2", api.whoami),
    Route("POST", "/api/repos/create", api.create),
    Route("DELETE", "/api/repos/delete", api.delete),
    Route("POST", "/api/validate-yaml", api.validate_yaml),
    Route("GET", "/api/models", api.models),
    Route("GET", f"{_MODEL}/revision/{{rev}}", api.info),
    Route("GET", f"{_MODEL}/tree/{{rev}}", api.tree),
    Route("GET", f"{_MODEL}/tree/{{rev}}/{{path*}}", api.tree),
    Route("POST", f"{_MODEL}/paths-info/{{rev}}", api.paths_info),
    Route("GET", f"{_MODEL}/refs", api.refs),
    Route("GET", f"{_MODEL}/commits/{{rev}}", api.commits),
    Route("PUT", f"{_MODEL}/settings", api.settings),
    Route("POST", f"{_MODEL}/branch/{{rev}}", api.create_branch),
    Route("DELETE", f"{_MODEL}/branch/{{rev}}", api.delete_branch),
    Route("POST", f"{_MODEL}/tag/{{rev}}", api.create_tag),
    Route("DELETE", f"{_MODEL}/tag/{{rev}}", api.delete_tag),
    Route("POST", f"{_MODEL}/preupload/{{rev}}", commits.preupload),
    Route("POST", f"{_MODEL}/commit/{{rev}}", commits.commit, sends=True),
    Route("GET", f"{_MODEL}/xet-write-token/{{rev}}", xet.write_token),
    Route("GET", _MODEL, api.info),
    Route("POST", "/{id}.git/info/lfs/objects/batch", lfs.batch),
    Route("PUT", "/lfs/put/{oid}", lfs.put, sends=True),
    Route("PUT", "/lfs/part/{oid}", lfs.part, sends=True),
    Route("POST", "/lfs/complete/{oid}", lfs.complete, sends=True),
    Route("POST", "/lfs/verify", lfs.verify),
    Route("POST", "/cas/{place}/v1/xorbs/default/{hash}", xet.xorb, sends=True),
    Route("POST", "/cas/{place}/v1/shards", xet.shard, sends=True),
    Route("GET", "/", browse.front),
    Route("GET", "/favicon.ico", pages.static),
    Route("GET", "/-login", pages.log_in),
    Route("GET", "/-/{file}", pages.static),
    Route("GET", "/-/at/{hex}", pages.artifact),
    Route("GET", "/{id}/resolve/{rev}/{path*}", downloads.resolve),
    Route("GET", "/{id}/lfs/{oid}", downloads.lfs_object),
    Route("GET", "/{id}/tree/{rev}", pages.repository),
    Route("GET", "/{id}/tree/{rev}/{path*}", tree_pages.node),
    Route("GET", "/{id}/commit/{rev}", pages.repository),
    Route("GET", "/{id}", pages.repository),
)
HEADERS: Mapping[str, str] = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "X-Frame-Options": "DENY",
}
_CSP = "default-src 'none'; frame-ancestors 'none'; sandbox"


class App:
    """An ASGI application over a hub."""

    def __init__(self, hub: Hub) -> None:
        self._hub = hub
        self._router = Router(ROUTES)
        self._small = anyio.CapacityLimiter(48)
        self._long = anyio.CapacityLimiter(48)  # whoever sends slowly keeps nobody waiting but others who send

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            return
        begin, request = time.monotonic(), secrets.token_hex(8)
        user, route, status = "-", "-", 0
        try:
            call, found = self._call(scope, receive)
            user, route = call.user.name if call.user else "-", found.template
            waits = found.sends or (scope["method"] not in ("GET", "HEAD") and not await call.begin())
            limiter = self._long if waits else self._small
            response = await anyio.to_thread.run_sync(found.handler, self._hub, call, limiter=limiter)
        except Exception as error:  # noqa: BLE001 - whatever it is, no traceback reaches a client
            response = _refusal(error, request, _page(scope), anonymous=self._hub.settings.anonymous)
        for name, value in HEADERS.items():
            response.headers.setdefault(name, value)
        response.headers.setdefault("Content-Security-Policy", _CSP)
        response.headers.setdefault("Cache-Control", "private, no-cache")
        response.headers["X-Request-Id"] = request
        status = response.status_code
        try:
            await response(scope, receive, send)
        except (LoraforgeError, OSError) as error:  # after the first byte: the client sees a body that is too short
            status = 0
            LOG.warning("%s cut off: %s", request, type(error).__name__)
            raise ConnectionResetError from None
        finally:
            spent = round((time.monotonic() - begin) * 1000)
            LOG.info("%s %s %s %s %s %d ms", request, user, scope["method"], route, status or "cut", spent)

    def _call(self, scope: Scope, receive: Receive) -> tuple[Call, Route]:
        headers = _headers(scope)
        host = _host(self._hub, headers)
        route, segments = self._router.find(scope["method"], scope["raw_path"])
        call = Call(
            method=scope["method"],
            path=scope["raw_path"].decode("latin-1"),
            segments=segments,
            query_string=scope["query_string"].decode("latin-1"),
            headers=headers,
            endpoint=self._hub.settings.public_url or f"{scope.get('scheme', 'http')}://{host}",
            user=None if "/cas/" in route.template else _user(self._hub, scope, headers),
            receive=receive,
            route=route.template,
        )
        return call, route


def _headers(scope: Scope) -> dict[str, str]:
    found: dict[str, str] = {}
    for raw_name, raw_value in scope["headers"]:
        name, value = raw_name.decode("latin-1").lower(), raw_value.decode("latin-1")
        if name in found and name in ("authorization", "content-length", "host", "transfer-encoding"):
            raise bad_request(f"two headers {name}") if name != "authorization" else unauthorised()
        found[name] = value
    if "content-length" in found and "transfer-encoding" in found:
        raise bad_request("a body with two lengths")
    return found


def _host(hub: Hub, headers: Mapping[str, str]) -> str:
    """The host that was asked, if it is one of ours: a name that somebody else can point here is not.

    Raises:
        RefusedError: 421.
    """
    host = headers.get("host", "")
    try:
        parts = urlsplit(f"//{host}")
        name, plain = parts.hostname or "", parts.netloc == host and parts.username is None and parts.path == ""
        _ = parts.port
    except ValueError:
        name, plain = "", False
    if plain and (name == "localhost" or name in hub.settings.hosts or _is_address(name)):
        return host
    raise RefusedError(421, "this server does not go by that name: loraforge serve --allow-host NAME", "BadHost")


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _user(hub: Hub, scope: Scope, headers: Mapping[str, str]) -> User | None:
    """Who asks; None for nobody.

    Raises:
        RefusedError: 401, there is a token, and it is nobody's.
    """
    given = headers.get("authorization")
    if given is None:
        return None
    kind, _, token = given.partition(" ")
    if kind.lower() == "basic" and scope["method"] in ("GET", "HEAD"):
        # for browsers, which send it by themselves: so it reads, and never changes anything
        token = _password(token)
    elif kind.lower() != "bearer":
        raise unauthorised()
    found = hub.accounts.find(token.strip())
    if found is None:
        raise unauthorised()
    return found


def _password(text: str) -> str:
    try:
        return b64decode(text, validate=True).decode().partition(":")[2]
    except ValueError:
        return ""


def _refusal(error: BaseException, request: str, page: str | None, *, anonymous: bool) -> Response:
    if not isinstance(error, RefusedError):
        error = _as_refused(error, request)
    headers = dict(error.headers)
    message = error.message.encode("ascii", "replace").decode()
    headers["X-Error-Message"] = "".join(c if c.isprintable() else "?" for c in message)[:1000]
    if error.code is not None:
        headers["X-Error-Code"] = error.code
    if page is not None:
        return pages.refused(error, headers, page, anonymous=anonymous)
    body = json.dumps({"error": error.message, **error.body}).encode("ascii")
    return Response(body, status_code=error.status, headers=headers, media_type="application/json")


def _page(scope: Scope) -> str | None:
    """The path of a page that a browser asks for, None for anything else: the Hub's clients never want HTML."""
    wants = any(name == b"accept" and b"text/html" in value for name, value in scope["headers"])
    path: str = scope["path"]
    return path if wants and scope["method"] in ("GET", "HEAD") and not path.startswith("/api/") else None


def _as_refused(error: BaseException, request: str) -> RefusedError:
    if isinstance(error, NotFoundError):
        return RefusedError(404, "what this names is not here any more", "EntryNotFound")
    if isinstance(error, ConflictError):
        return RefusedError(409, "it was changed meanwhile: try again")
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        LOG.error("%s no space left", request)
        return RefusedError(507, "the server's disk is full; nothing was stored", "DiskFull")
    if isinstance(error, OSError) and not isinstance(error, LoraforgeError):
        LOG.error("%s %s: %s", request, type(error).__name__, error.errno)
    else:
        LOG.error("%s %s", request, type(error).__name__, exc_info=error)
    return RefusedError(500, f"the server could not do this; its log says more at {request}", "ServerError")
