"""The parts of the pages: from records to HTML, every text of a stranger escaped."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from urllib.parse import quote

from loraforge_registry.digest import Digest
from loraforge_registry.layout import Layout
from loraforge_registry.manifest import Artifact, Derivation, Manifest
from loraforge_registry.server import describe
from loraforge_registry.server.kinds import kind_of
from loraforge_registry.server.repos import Repository, Revision
from loraforge_registry.server.web import bar, copyable, markdown, table, text

MAX_ROWS = 60
MAX_DEPTH = 8
_FRONT_MATTER = re.compile(r"\A---\r?\n.*?\r?\n---\r?\n", re.DOTALL)
_UNITS = ("B", "kB", "MB", "GB", "TB")


def front(
    shown: Sequence[tuple[Repository, Manifest | None, Revision]], total: int, words: str, following: int | None
) -> str:
    """The list of repositories."""
    if not shown:
        return _nothing(words)
    said = f"{total} {'match' if words else 'adapter' if total == 1 else 'adapters'}"
    more = "" if following is None else f"<p><a href='/?search={quote(words)}&amp;from={following}'>More</a></p>"
    return f"<h1>Adapters</h1><p class=quiet>{said}</p><ul class=list>{''.join(_row(*one) for one in shown)}</ul>{more}"


@dataclass(frozen=True)
class Shown:
    """What is known of a repository at a revision, by whoever asks."""

    repository: Repository
    revision: Revision
    manifest: Manifest | None = None
    layout: Layout | None = None
    card: str | None = None
    names: Mapping[Digest, str] = field(default_factory=dict)
    used_by: Sequence[str] = ()
    spectrum: str = ""
    lineage: str = ""


def repository(shown: Shown, endpoint: str) -> str:
    """The page of one repository."""
    found, revision, manifest, layout = shown.repository, shown.revision, shown.manifest, shown.layout
    left = [_card(shown.card), _targets(manifest, layout), shown.spectrum, _files(found, revision)]
    drawn = f"<h2>Lineage</h2>{shown.lineage}" if shown.lineage else ""
    right = [_loading(found, manifest, endpoint), drawn, _lineage(manifest, shown.names), _used_by(shown.used_by)]
    right.append(_digests(revision, manifest))
    private = " <span class=quiet>private</span>" if found.record.private else ""
    head = f"<h1>{text(found.id)}{private}</h1>{_facts(found, revision, manifest, layout)}"
    return f"{head}<div class=split><div>{''.join(left)}</div><div>{''.join(right)}</div></div>"


def size(count: int) -> str:
    """Bytes, in three digits."""
    number, unit = float(count), 0
    while number >= 999.5 and unit < len(_UNITS) - 1:
        number, unit = number / 1000, unit + 1
    return f"{number:.3g} {_UNITS[unit]}"


def _row(found: Repository, manifest: Manifest | None, revision: Revision) -> str:
    facts = []
    if manifest is not None:
        facts = [f"for {manifest.base_name}" if manifest.base_name else "", f"{manifest.parameters:,} parameters"]
        facts += [size(manifest.size), manifest.derivation.operation if manifest.derivation else ""]
    when = describe.iso(revision.commit.author.time)[:10] if revision.commit.author.time else ""
    said = " · ".join(text(fact) for fact in (*facts, when) if fact)
    private = " <span class=quiet>private</span>" if found.record.private else ""
    return (
        f"<li><a class=title href='/{quote(found.id)}'>{text(found.id)}</a>{private}"
        f"<div class=quiet>{said or 'no adapter at its root'}</div></li>"
    )


def _nothing(words: str) -> str:
    if words:
        return f"<h1>No match</h1><p class=quiet>Nothing that you may see is called {text(words)}.</p>"
    return "<h1>No adapters yet</h1><p class=quiet>Nothing here that you may see. Push the first one:</p>" + copyable(
        "loraforge serve user add me\nHF_ENDPOINT=... HF_TOKEN=... hf upload me/french ./french"
    )


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
    facts += [f"branches {', '.join(found.record.branches)}"]
    facts += [f"tags {', '.join(found.record.tags)}"] if found.record.tags else []
    facts += [f"commit {revision.id[:12]}"]
    return f"<ul class=facts>{''.join(f'<li>{text(fact[:200])}</li>' for fact in facts)}</ul>"


def _card(card: str | None) -> str:
    said = "" if card is None else _FRONT_MATTER.sub("", card, count=1).strip()
    return markdown(said) if said else ""


def _targets(manifest: Manifest | None, layout: Layout | None) -> str:
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


def _files(found: Repository, revision: Revision) -> str:
    files = sorted(revision.commit.files.items())
    rows = [
        [
            f"<a href='/{quote(found.id)}/resolve/{revision.id}/{quote(path)}'>{text(path)}</a>",
            text(size(file.size)),
            f"<code>{file.digest.short}</code>",
        ]
        for path, file in files[:MAX_ROWS]
    ]
    more = f"<p class=quiet>and {len(files) - MAX_ROWS} more</p>" if len(files) > MAX_ROWS else ""
    return f"<h2>Files</h2>{table(['file', 'size>', 'sha256'], rows)}{more}"


def _loading(found: Repository, manifest: Manifest | None, endpoint: str) -> str:
    if manifest is None:
        return ""
    base = json.dumps(manifest.base_name or "BASE", ensure_ascii=False)  # a literal: people paste and run this
    # only the adapter is here: with HF_ENDPOINT the base would be looked for here, too
    peft = (
        "from huggingface_hub import snapshot_download\nfrom peft import PeftModel\n"
        "from transformers import AutoModelForCausalLM\n\n"
        f"base = AutoModelForCausalLM.from_pretrained({base})\n"
        f'folder = snapshot_download("{found.id}", endpoint={json.dumps(endpoint)})\n'
        "model = PeftModel.from_pretrained(base, folder)"
    )
    shell = copyable(f"HF_ENDPOINT={endpoint} loraforge pull hf://{found.id}") if "/" in found.id else ""
    return f"<h2>Load it</h2>{copyable(peft)}{shell}"


def _lineage(manifest: Manifest | None, names: Mapping[Digest, str]) -> str:
    if manifest is None or manifest.derivation is None:
        return ""
    return f"<h2>Made from</h2>{''.join(_derivation(manifest.derivation, names, 0))}"


def _derivation(derivation: Derivation, names: Mapping[Digest, str], depth: int) -> Iterator[str]:
    of = " of" if derivation.inputs else ""
    yield f"<div><code>{text(derivation.operation[:60])}</code>{of}</div><ul class=line>"
    for item in derivation.inputs[:MAX_ROWS]:
        weight = f"{item.weight:g} &times; " if item.weight != 1 else ""
        yield f"<li>{weight}"
        if isinstance(item.source, Derivation):
            yield from _derivation(item.source, names, depth + 1) if depth < MAX_DEPTH else "…"
        else:
            yield _source(item.source, names)
        yield "</li>"
    yield "</ul>"


def _source(source: Artifact | Digest, names: Mapping[Digest, str]) -> str:
    digest = source.digest if isinstance(source, Artifact) else source
    name = names.get(digest)
    if name is not None:
        return f"<a href='/{quote(name)}'>{text(name)}</a>"
    what = "artifact" if isinstance(source, Artifact) else "content"
    return f"<span class=quiet>{what}</span> <code>{digest.short}</code>"


def _used_by(names: Sequence[str]) -> str:
    if not names:
        return ""
    items = "".join(f"<li><a href='/{quote(name)}'>{text(name)}</a></li>" for name in names[:MAX_ROWS])
    return f"<h2>Used by</h2><ul class=line>{items}</ul>"


def _digests(revision: Revision, manifest: Manifest | None) -> str:
    if manifest is None:
        return ""
    said = copyable(f"artifact  {revision.commit.adapter}\ncontent   {manifest.content_id}")
    return f"<h2>Digests</h2>{said}"
