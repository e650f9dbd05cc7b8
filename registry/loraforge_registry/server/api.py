"""The Hub's requests about repositories: who am I, make, delete, list, look, name."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TypeVar
from urllib.parse import parse_qs, quote, urlencode

from starlette.responses import JSONResponse, Response

from loraforge_registry.digest import Digest
from loraforge_registry.git import Signature, blob_id
from loraforge_registry.repositories import CommitRecord, CommittedFile, RepositoryRecord, encode_commit
from loraforge_registry.server import describe, forest, repos
from loraforge_registry.server.accounts import User
from loraforge_registry.server.call import Call, list_field, text_field
from loraforge_registry.server.errors import (
    RefusedError,
    bad_request,
    no_entry,
    no_revision,
    unauthorised,
)
from loraforge_registry.server.hub import Hub
from loraforge_registry.server.repos import MAIN, Repository

ATTRIBUTES = b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"
PAGE = 1000  # entries at once, whatever a client asks for
TRIES = 64  # of a compare-and-swap that others win
T = TypeVar("T")


def whoami(_: Hub, call: Call) -> Response:
    """GET /api/whoami-v2."""
    user = known(call)
    role = "write" if any(what == "write" for what, _ in user.scopes) else "read"
    orgs = [{"type": "org", "id": name, "name": name, "fullname": name} for name in user.organisations]
    token = {"type": "access_token", "accessToken": {"displayName": "loraforge", "role": role}}
    return JSONResponse(
        {"type": "user", "id": user.name, "name": user.name, "fullname": user.name, "orgs": orgs, "auth": token}
    )


def create(hub: Hub, call: Call) -> Response:
    """POST /api/repos/create: with a branch ``main`` of one commit, as clients expect."""
    user, fields = known(call), call.json()
    identity = _identity(fields, user)
    url = f"{call.endpoint}/{identity}"
    name = repos.name_of(identity)
    repos.check_writer(user, identity.lower().rpartition("/")[0])
    private = fields.get("visibility") == "private" or fields.get("private") is True
    if repos.load(hub, name) is not None:
        raise RefusedError(409, f"{identity} exists already", body={"url": url})
    now = int(time.time())
    digest, size = hub.blobs.put([ATTRIBUTES])
    files = {".gitattributes": CommittedFile(digest, size, blob_id(ATTRIBUTES))}
    first = hub.refs.put_record(encode_commit(CommitRecord(files, Signature(user.name, now), "initial commit")))
    record = RepositoryRecord(identity, now, private=private, branches={MAIN: first})
    if not repos.change(hub, Repository(name, record, None), record, user=user, what="create"):
        raise RefusedError(409, f"{identity} exists already", body={"url": url})
    return JSONResponse({"url": url, "name": identity, "id": identity})


def delete(hub: Hub, call: Call) -> Response:
    """DELETE /api/repos/delete: the name goes; what it needed goes at a collection."""
    user, fields = known(call), call.json()
    identity = _identity(fields, user)
    for _ in range(TRIES):
        if repos.change(hub, repos.find_to_write(hub, identity, user), None, user=user, what="delete"):
            return Response("OK")
    raise _busy(identity)


def settings(hub: Hub, call: Call) -> Response:
    """PUT /api/models/{id}/settings: private, or not."""
    fields = call.json()
    visibility = fields.get("visibility", "private" if fields.get("private") else "public")
    private = visibility == "private"
    _update(hub, call, lambda record: replace(record, private=private), "settings")
    return JSONResponse({"private": private})


def validate_yaml(_: Hub, call: Call) -> Response:
    """POST /api/validate-yaml: clients ask before they push a model card."""
    call.body()
    return JSONResponse({"errors": [], "warnings": []})


def models(hub: Hub, call: Call) -> Response:
    """GET /api/models: search, author, filter, sort, limit; pages by Link."""
    parsed = parse_qs(call.query_string)
    limit, start = _number(call, "limit", PAGE), _number(call, "cursor", 0)
    found = []
    for repository in repos.everything(hub, call.user):
        if not _matches_id(repository, call):
            continue
        at = repos.outline_of(hub, repository.record.branches[head_of(repository)])
        said = describe.summary(hub, repository, at)
        wanted = [word for text in parsed.get("filter", []) for word in text.split(",")]
        if set(wanted) <= {*describe.tags_of(forest.facts_at(hub, at)), "model"}:
            found.append(said)
    if call.query.get("sort") in ("lastModified", "createdAt", "last_modified", "created_at"):
        key = "createdAt" if "reated" in call.query["sort"] else "lastModified"
        found.sort(key=lambda said: str(said[key]), reverse=True)
    return page(call, found, start, limit, dict)


def info(hub: Hub, call: Call) -> Response:
    """GET /api/models/{id}[/revision/{rev}]."""
    repository = repos.find(hub, call.segments["id"], call.user)
    revision = repos.resolve(hub, repository, call.segments.get("rev", head_of(repository)))
    return JSONResponse(describe.model(hub, repository, revision, blobs="blobs" in call.query))


def tree(hub: Hub, call: Call) -> Response:
    """GET /api/models/{id}/tree/{rev}[/{path}]."""
    repository = repos.find(hub, call.segments["id"], call.user)
    revision = repos.resolve(hub, repository, call.segments["rev"])
    below = call.segments.get("path", "").strip("/")
    recursive = call.query.get("recursive", "").lower() in ("1", "true")
    found = list(describe.entries(revision.commit, below, recursive=recursive))
    if below and not found:
        raise no_entry(below, revision.id)
    return page(call, found, _number(call, "cursor", 0), _number(call, "limit", PAGE), dict)


def paths_info(hub: Hub, call: Call) -> Response:
    """POST /api/models/{id}/paths-info/{rev}: what is not there is not mentioned."""
    repository = repos.find(hub, call.segments["id"], call.user)
    revision = repos.resolve(hub, repository, call.segments["rev"])
    found = {str(said["path"]): said for said in describe.entries(revision.commit, "", recursive=True)}
    return JSONResponse([found[path] for path in _paths(call) if path in found])


def refs(hub: Hub, call: Call) -> Response:
    """GET /api/models/{id}/refs."""
    record = repos.find(hub, call.segments["id"], call.user).record
    tables = {
        kind: {name: repos.revision_of(hub, digest).id for name, digest in table.items()}
        for kind, table in (("heads", record.branches), ("tags", record.tags))
    }
    branches, tags = (describe.named_revisions(kind, table) for kind, table in tables.items())
    return JSONResponse({"branches": branches, "tags": tags, "converts": [], "pullRequests": []})


def commits(hub: Hub, call: Call) -> Response:
    """GET /api/models/{id}/commits/{rev}."""
    repository = repos.find(hub, call.segments["id"], call.user)
    revision = repos.resolve(hub, repository, call.segments["rev"])
    number = _number(call, "p", 0)
    found = [digest for digest, _ in repos.history(hub, revision.digest)]

    def say(digest: Digest) -> dict[str, object]:
        return describe.commit(repos.revision_of(hub, digest))

    return page(call, found, number * 100, 100, say, key="p", following=number + 1)


def create_branch(hub: Hub, call: Call) -> Response:
    """POST /api/models/{id}/branch/{rev}."""
    fields, name = call.json(), call.segments["rev"]
    start = fields.get("startingPoint")
    _make(hub, call, "branches", name, start if isinstance(start, str) else None)
    return Response()


def delete_branch(hub: Hub, call: Call) -> Response:
    """DELETE /api/models/{id}/branch/{rev}: any but ``main``."""
    name = call.segments["rev"]
    if name == MAIN:
        raise RefusedError(403, "main is the branch that clients ask for first: it stays", "Forbidden")
    _unmake(hub, call, "branches", name)
    return Response()


def create_tag(hub: Hub, call: Call) -> Response:
    """POST /api/models/{id}/tag/{rev}: a tag stays where it is; delete it to make it again."""
    _make(hub, call, "tags", text_field(call.json(), "tag"), call.segments["rev"])
    return Response()


def delete_tag(hub: Hub, call: Call) -> Response:
    """DELETE /api/models/{id}/tag/{tag}."""
    _unmake(hub, call, "tags", call.segments["rev"])
    return Response()


def known(call: Call) -> User:
    """Who asks.

    Raises:
        RefusedError: 401, nobody known.
    """
    if call.user is None:
        raise unauthorised()
    return call.user


def head_of(repository: Repository) -> str:
    """The branch that is meant where none is named."""
    return MAIN if MAIN in repository.record.branches else next(iter(sorted(repository.record.branches)), MAIN)


def page(
    call: Call,
    found: Sequence[T],
    start: int,
    limit: int,
    say: Callable[[T], dict[str, object]],
    *,
    key: str = "cursor",
    following: int | None = None,
) -> Response:
    """A part of a list, and where the next is."""
    end = start + max(1, min(limit, PAGE))
    headers = {}
    if end < len(found) and (key == "p" or "limit" not in call.query or limit > PAGE):
        query = {**call.query, key: str(end if following is None else following)}
        path = quote(call.path, safe="/%:@!$&'()*+,;=~-._")
        headers["Link"] = f'<{call.endpoint}{path}?{urlencode(query)}>; rel="next"'
    return Response(
        describe.dump([say(one) for one in found[start:end]]), headers=headers, media_type="application/json"
    )


def _identity(fields: dict[str, object], user: User) -> str:
    kind = fields.get("type") or "model"
    if kind != "model":
        raise bad_request(f"this server keeps adapters, in repositories of type model, not {str(kind)[:40]}")
    name, where = text_field(fields, "name"), fields.get("organization") or user.name
    identity = name if "/" in name else f"{where}/{name}"
    repos.name_of(identity)
    return identity


def _matches_id(repository: Repository, call: Call) -> bool:
    words = call.query.get("search", "").lower().split()
    author = call.query.get("author")
    return all(word in repository.id.lower() for word in words) and author in (None, repository.id.partition("/")[0])


def _number(call: Call, name: str, default: int) -> int:
    text = call.query.get(name, "")
    if not text:
        return default
    if not (text.isdecimal() and text.isascii() and len(text) < 10):
        raise bad_request(f"{name} is not a number that makes sense here")
    return int(text)


def _paths(call: Call) -> list[str]:
    kind = call.headers.get("content-type", "").partition(";")[0]
    if kind == "application/json":
        return [str(path) for path in list_field(call.json(), "paths", 10_000)]
    try:
        return parse_qs(call.body().decode(), max_num_fields=10_001).get("paths", [])
    except ValueError as error:
        raise bad_request("paths are not form fields of UTF-8") from error


def _make(hub: Hub, call: Call, table: str, name: str, start: str | None) -> None:
    repos.check_revision(name)

    def with_name(record: RepositoryRecord, repository: Repository) -> RepositoryRecord:
        there = _table(record, table)
        if name in there:
            raise RefusedError(409, f"{name} exists already: Reference already exists")
        target = repos.resolve(hub, repository, start or head_of(repository))
        return _with_table(record, table, {**there, name: target.digest})

    _update_with(hub, call, with_name, f"{table} + {name}")


def _unmake(hub: Hub, call: Call, table: str, name: str) -> None:
    def without(record: RepositoryRecord) -> RepositoryRecord:
        left = dict(_table(record, table))
        if left.pop(name, None) is None:
            raise no_revision(name[:200])
        return _with_table(record, table, left)

    _update(hub, call, without, f"{table} - {name}")


def _table(record: RepositoryRecord, table: str) -> Mapping[str, Digest]:
    return record.branches if table == "branches" else record.tags


def _with_table(record: RepositoryRecord, table: str, names: Mapping[str, Digest]) -> RepositoryRecord:
    return replace(record, branches=names) if table == "branches" else replace(record, tags=names)


def _update(hub: Hub, call: Call, new: Callable[[RepositoryRecord], RepositoryRecord], what: str) -> None:
    _update_with(hub, call, lambda record, _: new(record), what)


def _update_with(
    hub: Hub, call: Call, new: Callable[[RepositoryRecord, Repository], RepositoryRecord], what: str
) -> None:
    user = known(call)
    identity = call.segments["id"]
    for _ in range(TRIES):
        repository = repos.find_to_write(hub, identity, user)
        if repos.change(hub, repository, new(repository.record, repository), user=user, what=what):
            return
    raise _busy(identity)


def _busy(identity: str) -> RefusedError:
    return RefusedError(503, f"{identity} changes all the time: try again", headers={"Retry-After": "1"})
