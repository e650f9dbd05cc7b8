"""The parts of the pages: from records to HTML, every text of a stranger escaped."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from urllib.parse import quote

from loraforge_registry.digest import Digest
from loraforge_registry.layout import Layout
from loraforge_registry.manifest import Artifact, Derivation, Manifest
from loraforge_registry.server.around import Place
from loraforge_registry.server.browse import for_base
from loraforge_registry.server.kinds import kind_of
from loraforge_registry.server.repos import MAIN, Repository, Revision
from loraforge_registry.server.web import bar, copyable, count, size, table, text

MAX_ROWS = 60
MAX_NAMES = 12
MAX_DEPTH = 8
MAX_PLACES = 500


@dataclass(frozen=True)
class Shown:
    """What is known of a repository at a revision, by whoever asks."""

    repository: Repository
    revision: Revision
    manifest: Manifest | None = None
    layout: Layout | None = None
    card: str = ""
    names: Mapping[Digest, str] = field(default_factory=dict)
    used_by: Sequence[str] = ()
    loading: str = ""
    links: Mapping[Digest, str] = field(default_factory=dict)  # to pages of what no name means
    alike: Sequence[str] = ()
    at: str = ""  # the revision, where it is not the head
    spectrum: str = ""
    lineage: str = ""
    trees: Sequence[tuple[str, str]] = ()  # pages of the trees' nodes that the adapter is, and what they are called
    problem: str = ""  # why a record at the root is no tree


def repository(shown: Shown) -> str:
    """The page of one repository."""
    found, revision, manifest, layout = shown.repository, shown.revision, shown.manifest, shown.layout
    left = [shown.card, targets_table(manifest, layout), shown.spectrum, files_table(found, revision)]
    drawn = f"<h2>Lineage</h2>{shown.lineage}" if shown.lineage else ""
    right = [shown.loading, drawn, made_from(manifest, shown.names, shown.links), used_by(shown.used_by)]
    right.append(in_trees(shown.trees))
    right.append(_digests(revision, manifest, shown.alike))
    title = heading(found, shown.at)
    problem = f"<p>This is shown as no tree of adapters: {text(shown.problem[:400])}.</p>" if shown.problem else ""
    head = f"{title}{_facts(found, revision, manifest, layout)}{problem}"
    return f"{head}<div class=split><div>{''.join(left)}</div><div>{''.join(right)}</div></div>"


def heading(found: Repository, at: str, below: str = "") -> str:
    """The title of a page of a repository; ``below`` is HTML that goes on from its name."""
    private = " <span class=quiet>private</span>" if found.record.private else ""
    said = f" <span class=quiet>at {text(at[:60])}</span>" if at else ""
    return f"<h1><a class=title href='/{quote(found.id)}'>{text(found.id)}</a>{below}{private}{said}</h1>"


def _facts(found: Repository, revision: Revision, manifest: Manifest | None, layout: Layout | None) -> str:
    facts = []
    if manifest is not None:
        facts += [f"base {manifest.base_name}" if manifest.base_name else "base not named"]
        if layout is not None:
            ranks = sorted({target.rank for target in layout.targets.values()})
            facts += [
                f"rank {ranks[0]}{f' to {ranks[-1]}' if len(ranks) > 1 else ''}",
                f"{len(layout.targets)} targets",
            ]
        facts += [f"{manifest.parameters:,} parameters", size(manifest.size)]
    said = [text(fact[:200]) for fact in facts]
    if manifest is not None and manifest.base_name:
        said[0] = f"base {for_base(manifest.base_name)}"
    return chips([*said, *revisions(found, revision)])


def chips(said: Sequence[str]) -> str:
    """Short facts side by side, each HTML."""
    return f"<ul class=facts>{''.join(f'<li>{fact}</li>' for fact in said)}</ul>"


def revisions(found: Repository, revision: Revision) -> list[str]:
    """The branches and tags of a repository, as links, and the commit; ``main`` is first, and the highest version."""
    said = []
    branches = sorted(found.record.branches, key=lambda name: (name != MAIN, _by_number(name)))
    tags = sorted(found.record.tags, key=_by_number, reverse=True)
    for kind, names in (("branch", branches), ("tag", tags)):
        said += [_named(found, kind, name) for name in names[:MAX_NAMES]]
        said += [f"and {len(names) - MAX_NAMES} more"] if len(names) > MAX_NAMES else []
    return [*said, f"commit {revision.id[:12]}"]


def _by_number(name: str) -> list[tuple[bool, int, str]]:
    """A key that puts v2 before v10."""
    parts = re.split(r"([0-9]+)", name)
    return [(not part.isdecimal(), int(part) if part.isdecimal() else 0, part) for part in parts]


def _named(found: Repository, kind: str, name: str) -> str:
    return f"{kind} <a href='/{quote(found.id)}/tree/{quote(name, safe='')}'>{text(name)}</a>"


def targets_table(manifest: Manifest | None, layout: Layout | None) -> str:
    """A row for all layers of a kind, with the error that a re-rank has recorded."""
    if manifest is None or layout is None:
        return ""
    kinds: dict[str, list[str]] = {}
    for name in layout.targets:
        kinds.setdefault(kind_of(name), []).append(name)
    errors = _errors(manifest)
    rows = []
    for kind, names in sorted(kinds.items())[:MAX_ROWS]:
        ranks = sorted({layout.targets[name].rank for name in names})
        lost = [errors[name] for name in names if name in errors]
        shown = f"{bar(max(lost))} {max(lost):.3g}" if lost else ""
        rows.append([text(kind), str(len(names)), _span(ranks), shown])
    more = f"<p class=quiet>and {len(kinds) - MAX_ROWS} kinds more</p>" if len(kinds) > MAX_ROWS else ""
    columns = ["target", "layers>", "rank>", "largest error"]
    if not errors:
        columns, rows = columns[:3], [row[:3] for row in rows]
    return f"<h2>Targets</h2>{table(columns, rows)}{more}"


def _errors(manifest: Manifest) -> dict[str, float]:
    targets = (manifest.report or {}).get("targets")
    found: dict[str, float] = {}
    for name, row in targets.items() if isinstance(targets, dict) else ():
        error = row.get("error") if isinstance(row, dict) else None
        if isinstance(error, float):
            found[name] = error
    return found


def _span(numbers: Sequence[int]) -> str:
    """Sorted numbers, by the first and the last."""
    return f"{numbers[0]} to {numbers[-1]}" if len(numbers) > 1 else f"{numbers[0]}"


def files_table(found: Repository, revision: Revision, only_in: str | None = None) -> str:
    """The files of a commit, or only those right in a folder: ``""`` is the root, any other name ends in a slash."""
    below, paths = only_in or "", sorted(revision.commit.files)
    if only_in is not None:
        paths = [path for path in paths if path.startswith(below) and "/" not in path[len(below) :]]
    files = [(path, revision.commit.files[path]) for path in paths]
    rows = [
        [
            f"<a href='/{quote(found.id)}/resolve/{revision.id}/{quote(path)}'>{text(path[len(below) :])}</a>",
            text(size(file.size)),
            f"<code>{file.digest.short}</code>",
        ]
        for path, file in files[:MAX_ROWS]
    ]
    more = f"<p class=quiet>and {len(files) - MAX_ROWS} more</p>" if len(files) > MAX_ROWS else ""
    return f"<h2>Files</h2>{table(['file', 'size>', 'sha256'], rows)}{more}"


def made_from(manifest: Manifest | None, names: Mapping[Digest, str], links: Mapping[Digest, str]) -> str:
    """What an adapter was made from, as a list."""
    if manifest is None or manifest.derivation is None:
        return ""
    return f"<h2>Made from</h2>{''.join(_derivation(manifest.derivation, names, links, 0))}"


def _derivation(
    derivation: Derivation, names: Mapping[Digest, str], links: Mapping[Digest, str], depth: int
) -> Iterator[str]:
    of = " of" if derivation.inputs else ""
    yield f"<div><code>{text(derivation.operation[:60])}</code>{of}</div><ul class=line>"
    for item in derivation.inputs[:MAX_ROWS]:
        weight = f"{item.weight:g} &times; " if item.weight != 1 else ""
        yield f"<li>{weight}"
        if isinstance(item.source, Derivation):
            yield from _derivation(item.source, names, links, depth + 1) if depth < MAX_DEPTH else "…"
        else:
            yield _source(item.source, names, links)
        yield "</li>"
    yield "</ul>"


def _source(source: Artifact | Digest, names: Mapping[Digest, str], links: Mapping[Digest, str]) -> str:
    digest = source.digest if isinstance(source, Artifact) else source
    name = names.get(digest)
    if name is not None:
        return f"<a href='/{quote(name)}'>{text(name)}</a>"
    what = "artifact" if isinstance(source, Artifact) else "content"
    shown = f"<code>{digest.short}</code>"
    if digest in links:
        shown = f"<a href='{links[digest]}'>{shown}</a>"
    return f"<span class=quiet>{what}</span> {shown}"


def used_by(names: Sequence[str]) -> str:
    """The repositories that have something made from an adapter."""
    if not names:
        return ""
    items = "".join(f"<li><a href='/{quote(name)}'>{text(name)}</a></li>" for name in names[:MAX_ROWS])
    return f"<h2>Used by</h2><ul class=line>{items}</ul>"


def in_trees(trees: Sequence[tuple[str, str]]) -> str:
    """The trees in which an adapter is a node."""
    if not trees:
        return ""
    items = "".join(f"<li><a href='{href}'>{text(label)}</a></li>" for href, label in trees[:MAX_ROWS])
    return f"<h2>A node of</h2><ul class=line>{items}</ul>"


def _digests(revision: Revision, manifest: Manifest | None, alike: Sequence[str]) -> str:
    if manifest is None:
        return ""
    said = copyable(f"artifact  {revision.commit.adapter}\ncontent   {manifest.content_id}")
    if len(alike) < 2:
        return f"<h2>Digests</h2>{said}"
    where = f"<a href='/-/at/{manifest.content_id.hex}'>{len(alike)} repositories</a>"
    return f"<h2>Digests</h2>{said}<p class=quiet>There is the same content in {where}.</p>"


def places(digest: Digest, found: Sequence[Place], what: str) -> str:
    """The page of an artifact, or of a content, that is in several places."""
    rows = "".join(
        f"<li><a class=title href='{place.href}'>{text(place.repository.id)}</a>"
        f"<div class=quiet>{_where(place)} · artifact <code>{place.artifact.short}</code></div></li>"
        for place in found[:MAX_PLACES]
    )
    more = f"<p class=quiet>and {len(found) - MAX_PLACES} more</p>" if len(found) > MAX_PLACES else ""
    title = f"<h1>{what}, in {count(len(found), 'place', 'places')}</h1>"
    return f"{title}<p class=quiet><code>{digest}</code></p><ul class=list>{rows}</ul>{more}"


def _where(place: Place) -> str:
    if place.revision is None:
        return "at its head"
    commit = len(place.revision) == 40 and place.repository.record.named(place.revision) is None
    return f"at the commit {place.revision[:12]}" if commit else f"at {text(place.revision)}"
