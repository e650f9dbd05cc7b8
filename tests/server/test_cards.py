"""Cards of strangers: huge ones, hostile ones, and what becomes of them."""

import re
import time
from html import unescape

import pytest

from loraforge_registry.server.cards import MAX_CARD, markdown
from tests.bad_files import write_adapter
from tests.hub import Server
from tests.server import raw
from tests.server.test_pages import see

N = MAX_CARD
# what Markdown parsers have been slow at, nested or repeated as often as a card allows
HOSTILE = {
    "brackets": "[" * N,
    "pictures": "![" * (N // 2),
    "open and close": "[" * (N // 2) + "]" * (N // 2),
    "links in links": "[a](b" * (N // 5),
    "unclosed links": "[a](" * (N // 4),
    "emphasis": "**a_" * (N // 4),
    "odd emphasis": "***a** b* " * (N // 10),
    "backticks": "".join("`" * count + " " for count in range(1, 440)),
    "quotes": (">" * 50 + "a\n") * (N // 52),
    "deepening lists": "".join("  " * depth + "- a\n" for depth in range(300)),
    "numbered": "".join(f"{number}. a\n" for number in range(N // 8)),
    "references": "".join(f"[a{number}]: x\n" for number in range(N // 10)),
    "references used": "[a]: b\n" + "[a]" * (N // 3),
    "a long reference, used often": f"[a]: https://x.org/{'x' * (N // 2)} '{'t' * 1000}'\n\n" + "[a]" * (N // 8),
    "empty cells": "|" + "a|" * 500 + "\n|" + "-|" * 500 + "\n" + "|x\n" * (N // 3 - 2000),
    "tables": "a|b\n-|-\n1|2\n\n" * (N // 14),
    "lines": "a\n" * (N // 2),
    "headings": "# a\n" * (N // 4),
    "tags": "<a " * (N // 3),
    "entities": "&#x41;" * (N // 6),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_card_is_done_soon_and_stays_small(kind):
    words, begin = HOSTILE[kind][:N], time.process_time()
    html = markdown(words)
    assert time.process_time() - begin < 15  # about a second here; what is quadratic takes minutes
    assert len(html) < 12 * N
    assert "style" not in set(see(html).handlers)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with Server(tmp_path_factory.mktemp("cards") / "store") as server:
        yield server


@pytest.fixture
def shown(server, run, tmp_path):
    """The page of an adapter with a card."""

    def show(card):
        write_adapter(tmp_path / "a")
        (tmp_path / "a" / "README.md").write_bytes(card)
        assert run("--store", server.store, "push", tmp_path / "a", "me--carded:v1", "--force").code == 0
        answer = raw.request(server, "GET", "/me/carded")
        assert answer.status == 200
        return answer.body.decode()

    return show


def test_a_huge_card_is_cut_at_a_line_and_says_so(server, shown):
    line = "words \u00e9 and more words\n\n"
    card = f"---\nlicense: mit\n---\n# Title\n\n{line * 100_000}".encode()
    html = shown(card)
    assert "license" not in html
    assert "The card is cut here: the first 100 kB of 2.5 MB are shown." in see(html).text
    assert "\ufffd" not in html
    assert html.count("<p>words \u00e9 and more words</p>") == pytest.approx(N / len(line.encode()), rel=0.01)
    whole = re.search("<a href='([^']*)'>The whole file", html)[1]
    assert raw.request(server, "GET", unescape(whole)).body == card


def test_a_card_that_fits_is_whole(shown):
    html = shown(b"x" * N)
    assert "x" * N in html
    assert "is cut here" not in html


@pytest.mark.parametrize(
    ("card", "said"),
    [
        (b"---\nbase_model: x\n---\n# Said", "Said"),
        (b"---\r\nbase_model: x\r\n---\r\n# Said", "Said"),
        (b"\xef\xbb\xbf---\nbase_model: x\n---\n# Said", "Said"),
        (b"---\n---\n# Said", "Said"),
        (b"---\nbase_model: x\n---", ""),
        (b"---\n" + b"a: b\n" * N + b"---\n# Said", ""),
        (b"", ""),
        (b"a rule\n\n---\n\n# Said", "Said"),
        (b"\xff\xfe# Said", "Said"),
    ],
)
def test_front_matter_is_for_machines(shown, card, said):
    html = shown(card)
    assert said in see(html).text
    assert "base_model" not in html
    assert ("class=card" in html) == bool(said)


def test_columns_keep_their_side_without_a_style():
    html = markdown("| a | b | c |\n|---|--:|:-:|\n| 1 | 2 | 3 |\n")
    assert 'td class="n">2<' in html
    assert 'td class="c">3<' in html
    assert "style" not in html


def test_links_lead_to_the_web_or_nowhere():
    html = markdown("[a](https://a.org 'title') [b](javascript:x) [c](//d.org) [e](/-/at/x) [f](#g) <https://h.org>")
    assert re.findall('href="([^"]*)"', html) == [
        "https://a.org",
        "#",
        "#",
        "#g",
        "https://h.org",
    ]  # javascript is no link at all
    assert html.count('rel="noopener nofollow"') == 5
