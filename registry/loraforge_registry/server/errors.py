"""What a request is refused with: a status, a sentence, and the code by which the Hub's clients know it."""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass
class RefusedError(Exception):
    """A request that is answered with an error. ``code`` is the Hub's ``X-Error-Code``."""

    status: int
    message: str
    code: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    body: Mapping[str, object] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.message


def unauthorised() -> RefusedError:
    """Nobody known asks."""
    return RefusedError(401, "Invalid username or password.", headers={"WWW-Authenticate": "Bearer"})


def no_repository(name: str, *, known: bool) -> RefusedError:
    """It is not there, or not for whoever asks: the two look the same."""
    return RefusedError(404 if known else 401, f"Repository {name} not found", "RepoNotFound")


def no_revision(revision: str) -> RefusedError:
    """No branch, tag or commit of that name."""
    return RefusedError(404, f"Invalid rev id: {revision}", "RevisionNotFound")


def no_entry(path: str, commit: str) -> RefusedError:
    """No such file in a commit; the client remembers that when it is told the commit."""
    return RefusedError(404, f"Entry not found: {path}", "EntryNotFound", {"X-Repo-Commit": commit})


def forbidden(message: str) -> RefusedError:
    """The token is known, and may not do this."""
    return RefusedError(403, message, "Forbidden")


def bad_request(message: str) -> RefusedError:
    """The request itself cannot be right."""
    return RefusedError(400, message, "BadRequest")


def too_large(message: str) -> RefusedError:
    """More than a limit allows."""
    return RefusedError(413, message, "TooLarge")
