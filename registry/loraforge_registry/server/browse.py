"""The front page: what is here, searched, for one base, in some order, a page at a time: all in the address."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from urllib.parse import quote, urlencode

from starlette.responses import Response

from loraforge_registry.facts import Facts
from loraforge_registry.server import describe
from loraforge_registry.server.around import Around, Entry
from loraforge_registry.server.call import Call
from loraforge_registry.server.errors import unauthorised
from loraforge_registry.server.hub import Hub
from loraforge_registry.server.web import Visit, copyable, count, page, size, text
from loraforge_registry.tree_facts import TreeFacts

SHOWN = 50
BASES = 100  # in the list to choose from; any other is a link beside an adapter, or in an address
MAX_WORDS, MAX_BASE = 200, 500

Order = Callable[[Entry], tuple[object, ...]]
ORDERS: Mapping[str, tuple[str, Order]] = {
    "name": ("by name", lambda entry: (entry.repository.id.lower(),)),
    "newest": ("newest first", lambda entry: (-entry.time, entry.repository.id.lower())),
    "smallest": ("smallest first", lambda entry: (_size(entry.facts), entry.repository.id.lower())),
}


KINDS: Mapping[str, tuple[str, str]] = {"adapter": ("adapter", "adapters"), "tree": ("tree", "trees")}


@dataclass(frozen=True, slots=True)
class Wanted:
    """What an address of the front page asks for."""

    words: str = ""
    base: str = ""
    kind: str = ""
    order: str = "name"
    start: int = 0

    @property
    def address(self) -> str:
        """The address that asks for this."""
        fields = {
            "search": self.words,
            "base": self.base,
            "kind": self.kind,
            "sort": "" if self.order == "name" else self.order,
        }
        said = {name: value for name, value in fields.items() if value} | ({"from": self.start} if self.start else {})
        return f"/?{urlencode(said, quote_via=quote)}" if said else "/"

    def includes(self, entry: Entry) -> bool:
        """Whether an entry is of the kind and for the base, and has all the words in its name or its base's."""
        base = entry.facts.base or "" if entry.facts else ""
        if (self.base and base != self.base) or (self.kind and _kind(entry.facts) != self.kind):
            return False
        searched = f"{entry.repository.id} {base[:MAX_BASE]}".lower()
        return all(word in searched for word in self.words.lower().split())


def front(hub: Hub, call: Call) -> Response:
    """GET /: every repository that whoever asks may see, or those that are wanted."""
    if call.user is None and not hub.settings.anonymous:
        raise unauthorised()  # a browser asks: "nothing here" would be no answer
    wanted = _wanted(call.query)
    entries = list(Around(hub, call.user).entries())
    found = sorted(filter(wanted.includes, entries), key=ORDERS[wanted.order][1])
    if wanted.start >= len(found):
        wanted = replace(wanted, start=0)
    body = _found(entries, found, wanted) if found else _nothing(entries, wanted, call.endpoint)
    keep = {"base": wanted.base, "kind": wanted.kind, "sort": wanted.order if wanted.order != "name" else ""}
    return page("loraforge", body, Visit(call.path, call.user, wanted.words, keep))


def for_base(base: str, wanted: Wanted = Wanted()) -> str:
    """The name of a base, as a link to what is here for it."""
    shown = text(base if len(base) <= 80 else f"{base[:79]}…")
    if len(base) > MAX_BASE:
        return shown
    return f"<a href='{text(replace(wanted, base=base, start=0).address)}'>{shown}</a>"


def _wanted(query: Mapping[str, str]) -> Wanted:
    order, start = query.get("sort", ""), query.get("from", "")
    return Wanted(
        words=query.get("search", "")[:MAX_WORDS],
        base=query.get("base", "")[:MAX_BASE],
        kind=kind if (kind := query.get("kind", "")) in KINDS else "",
        order=order if order in ORDERS else "name",
        start=int(start) if start.isascii() and start.isdigit() and len(start) < 9 else 0,
    )


def _kind(facts: Facts | TreeFacts | None) -> str:
    return "" if facts is None else "tree" if isinstance(facts, TreeFacts) else "adapter"


def _size(facts: Facts | TreeFacts | None) -> float:
    return facts.size if isinstance(facts, Facts) else float("inf")


def _found(entries: Sequence[Entry], found: Sequence[Entry], wanted: Wanted) -> str:
    said = _number(found, wanted)
    if wanted.base:
        said += f" for {text(wanted.base)} · <a href='{text(replace(wanted, base='', start=0).address)}'>any base</a>"
    shown = found[wanted.start : wanted.start + SHOWN]
    rows = "".join(_row(entry, wanted) for entry in shown)
    return (
        f"<h1>Adapters</h1>{_choices(entries, wanted)}<p class=quiet>{said}</p>"
        f"<ul class=list>{rows}</ul>{_pages(wanted, len(shown), len(found))}"
    )


def _number(found: Sequence[Entry], wanted: Wanted) -> str:
    """How many there are; of both kinds where both are meant."""
    if wanted.words or wanted.kind:
        return count(len(found), *(("match", "matches") if wanted.words else KINDS[wanted.kind]))
    trees = sum(isinstance(entry.facts, TreeFacts) for entry in found)
    said = [count(len(found) - trees, *KINDS["adapter"])] if len(found) > trees or not trees else []
    return " and ".join([*said, *([count(trees, *KINDS["tree"])] if trees else [])])


def _choices(entries: Sequence[Entry], wanted: Wanted) -> str:
    """The form that chooses a base and an order; the search goes along."""
    bases = Counter(entry.facts.base for entry in entries if entry.facts and entry.facts.base)
    names = sorted(name for name, _ in bases.most_common(BASES) if len(name) <= MAX_BASE)
    if wanted.base and wanted.base not in names:
        names = [wanted.base, *names]
    options = [("", "any base"), *((name, f"{name[:60]} ({bases[name]})") for name in names)]
    orders = [(name, said) for name, (said, _) in ORDERS.items()]
    hidden = f"<input type=hidden name=search value='{text(wanted.words)}'>" if wanted.words else ""
    kinds = [("", "adapters and trees"), *((name, f"only {many}") for name, (_, many) in KINDS.items())]
    is_mixed = wanted.kind or any(isinstance(entry.facts, TreeFacts) for entry in entries)
    kind = _select("kind", "Kind", kinds, wanted.kind) if is_mixed else ""
    return (
        f"<form class=choose action='/'>{hidden}{kind}{_select('base', 'Base', options, wanted.base)}"
        f"{_select('sort', 'Order', orders, wanted.order)}<button>Show</button></form>"
    )


def _select(name: str, label: str, options: Sequence[tuple[str, str]], chosen: str) -> str:
    listed = "".join(
        f"<option value='{text(value)}'{' selected' if value == chosen else ''}>{text(said)}" for value, said in options
    )
    return f"<label>{label} <select name={name}>{listed}</select></label>"


def _pages(wanted: Wanted, shown: int, total: int) -> str:
    if shown == total:
        return ""
    end = wanted.start + shown
    before, after = replace(wanted, start=max(wanted.start - SHOWN, 0)), replace(wanted, start=end)
    back = f"<a rel=prev href='{text(before.address)}'>Back</a>" if wanted.start else ""
    more = f"<a rel=next href='{text(after.address)}'>More</a>" if end < total else ""
    said = f"<span class=quiet>{wanted.start + 1:,} to {end:,} of {total:,}</span>"
    return f"<nav class=pages aria-label='Pages'>{back}{said}{more}</nav>"


def _row(entry: Entry, wanted: Wanted) -> str:
    found, facts = entry.repository, entry.facts
    said = [] if facts is None else _facts(facts, wanted)
    said += [text(describe.iso(entry.time)[:10])] if entry.time else []
    private = " <span class=quiet>private</span>" if found.record.private else ""
    return (
        f"<li><a class=title href='/{quote(found.id)}'>{text(found.id)}</a>{private}"
        f"<div class=quiet>{' · '.join(said) if facts else ' · '.join(['no adapter at its root', *said])}</div></li>"
    )


def _facts(facts: Facts | TreeFacts, wanted: Wanted) -> list[str]:
    """What a row says of an adapter or a tree, as HTML."""
    said = [f"for {for_base(facts.base, wanted)}"] if facts.base else []
    if isinstance(facts, TreeFacts):
        return [f"a tree of {count(facts.nodes, 'node', 'nodes')}", *said]
    low, high = facts.ranks
    said += [f"rank {low}" if low == high else f"rank {low} to {high}"]
    said += [count(facts.parameters, "parameter", "parameters"), size(facts.size)]
    return said + ([f"made by {text(facts.operation[:60])}"] if facts.operation else [])


def _nothing(entries: Sequence[Entry], wanted: Wanted, endpoint: str) -> str:
    if entries:
        what = f"is called {text(wanted.words)}" if wanted.words else "is here"
        base = f" for the base {text(wanted.base)}" if wanted.base else ""
        base = f" among {KINDS[wanted.kind][1]}{base}" if wanted.kind else base
        fewer = replace(wanted, base="", kind="") if wanted.base and wanted.words else Wanted(order=wanted.order)
        said = "for any base" if fewer.words else "all adapters"
        return (
            f"<h1>No match</h1>{_choices(entries, wanted)}<p class=quiet>Nothing that you may see {what}{base}.</p>"
            f"<p><a href='{text(fewer.address)}'>Look for {said}</a></p>"
        )
    return "<h1>No adapters yet</h1><p class=quiet>Nothing here that you may see. Push the first one:</p>" + copyable(
        f"loraforge serve user add me\nHF_ENDPOINT={endpoint} HF_TOKEN=lf_... hf upload me/french ./french"
    )
