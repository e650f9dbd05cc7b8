"""From the raw path of a request to its handler: a percent-encoded slash stays inside its part.

Parts are unquoted once, one by one, and become texts that are looked up in records: no path is ever made of them.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from urllib.parse import unquote_to_bytes

from starlette.responses import Response

from loraforge_registry.server.call import Call
from loraforge_registry.server.errors import RefusedError, bad_request
from loraforge_registry.server.hub import Hub

Handler = Callable[[Hub, Call], Response]
MAX_PATH = 8192
_PART = {"id": r"((?:[^/]+/)?[^/]+?)", "path*": r"(.+)"}
_HOLE = re.compile(r"\{([a-z*]+)\}")


@dataclass(frozen=True, slots=True)
class Route:
    """One kind of request. ``sends`` says that its body may be long, so that it waits where it holds up nobody."""

    method: str
    template: str
    handler: Handler
    sends: bool = False


class Router:
    """A table of routes; the first that fits is taken."""

    def __init__(self, routes: Sequence[Route]) -> None:
        self._routes = [(re.compile(_pattern(route.template)), route) for route in routes]

    def find(self, method: str, raw_path: bytes) -> tuple[Route, Mapping[str, str]]:
        """Return the route of a request, and the parts that it names.

        Raises:
            RefusedError: 404, 405, 414, or 400 where a part is no text.
        """
        if len(raw_path) > MAX_PATH:
            raise RefusedError(414, f"a path of {len(raw_path)} bytes; the limit is {MAX_PATH}")
        path = raw_path.decode("latin-1")
        wrong_method = False
        for pattern, route in self._routes:
            match = pattern.fullmatch(path)
            if match is not None:
                if method == route.method or (method == "HEAD" and route.method == "GET"):
                    return route, {name: part(text) for name, text in _named(route, match.groups())}
                wrong_method = True
        if wrong_method:
            raise RefusedError(405, "this path does not take that method")
        raise RefusedError(404, "there is nothing at this path", "NotFound")


def part(text: str) -> str:
    """Unquote one part of a path, once.

    Raises:
        RefusedError: 400, not printable UTF-8.
    """
    try:
        found = unquote_to_bytes(text).decode()
    except UnicodeDecodeError as error:
        raise bad_request("the path is not UTF-8") from error
    if not found.isprintable() or "\\" in found:
        raise bad_request("the path holds what no name here holds")
    return found


def _pattern(template: str) -> str:
    begin, pattern = 0, ""
    for hole in _HOLE.finditer(template):
        pattern += re.escape(template[begin : hole.start()]) + _PART.get(hole[1], r"([^/]+)")
        begin = hole.end()
    return pattern + re.escape(template[begin:])


def _named(route: Route, groups: Sequence[str]) -> list[tuple[str, str]]:
    return [(name.rstrip("*"), text) for name, text in zip(_HOLE.findall(route.template), groups, strict=True)]
