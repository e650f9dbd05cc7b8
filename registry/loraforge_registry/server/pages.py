"""Pages for people."""

from starlette.responses import Response

from loraforge_registry.server.call import Call
from loraforge_registry.server.hub import Hub


def front(hub: Hub, call: Call) -> Response:
    """GET /."""
    return Response(f"{hub.settings.anonymous} {call.method}")


style = script = artifact = repository = front
