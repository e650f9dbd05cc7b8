"""The pages in a real browser: with its JavaScript and without, light and dark, wide and as narrow as a telephone."""

import shutil
import time
import urllib.request

import pytest

import loraforge as lf
from loraforge_registry.names import RefName
from tests.bad_files import config, tensors, write_adapter
from tests.browser import CHROMIUM, Browser
from tests.hub import Server
from tests.server import raw
from tests.server.test_tree_pages import plant

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium on this machine")

CARD = f"""---
base_model: acme/base
---
# What it is for

Prose with `code`, [a page](https://example.org/x), and a {"long" * 60} word.

| {" | ".join("column" for _ in range(12))} |
| {" | ".join("---" for _ in range(12))} |
| {" | ".join("12345678" for _ in range(12))} |

```
{"a line of code that is far too long for a telephone " * 4}
```

![a picture](https://example.org/track.png)
"""
LONG = "a-name-as-long-as-a-name-can-be-without-a-single-space-in-it-to-break-a-line-at"

# every text whose contrast with what is behind it is below 4.5 (WCAG 2.1, 1.4.3), and what is asked of a browser
PALE = """
(() => {
  const rgb = text => text.match(/[\\d.]+/g).map(Number);
  const light = ([r, g, b]) => [r, g, b].map(v => (v /= 255) <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = (element, at) => {
    for (const found of document.elementsFromPoint(...at)) {
      const fill = found instanceof SVGElement ? getComputedStyle(found).fill : getComputedStyle(found).backgroundColor;
      const color = fill === "none" || /^(text|tspan|a)$/.test(found.tagName) ? [0, 0, 0, 0] : rgb(fill);
      if (color[3] === undefined || color[3] > 0.99) return color;
    }
    return [255, 255, 255];
  };
  const pale = [], walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  let seen = 0;
  for (let node; node = walker.nextNode();) {
    const element = node.parentElement, style = getComputedStyle(element);
    if (!node.data.trim() || style.visibility === "hidden") continue;
    element.scrollIntoView({block: "center", behavior: "instant"});
    const range = document.createRange(); range.selectNodeContents(node);
    const box = [...range.getClientRects()].find(box => box.width > 1 && box.left >= 0 && box.left < innerWidth);
    if (!box) continue;
    seen++;
    const a = light(rgb(element instanceof SVGElement ? style.fill : style.color));
    const b = light(behind(element, [Math.min(box.left + 1, innerWidth - 1), box.top + box.height / 2]));
    const contrast = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (contrast < 4.5) pale.push(contrast.toFixed(2) + " " + node.data.trim().slice(0, 40));
  }
  scrollTo(0, 0);
  return [seen, pale];
})()
"""


def read(url):
    with urllib.request.urlopen(url, timeout=30) as answer:  # noqa: S310 - our own server
        return answer.read().decode()


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    home = tmp_path_factory.mktemp("browser")
    with Browser(home) as browser:
        yield browser
    shutil.rmtree(home, ignore_errors=True)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """Adapters that were pushed, made of others, carry a card, are private; and a repository without one."""
    home = tmp_path_factory.mktemp("seen")
    with Server(home / "store") as server:
        registry = lf.Registry(server.store)
        settings = config(base_model_name_or_path="acme/base")
        for name, value in (("french", 0.5), ("law", -0.25)):
            registry.push(write_adapter(home / name, weights=tensors(value), settings=settings), f"{name}:v1")
        terms = [(lf.load("french:v1", registry=registry), 0.7), (lf.load("law:v1", registry=registry), 0.3)]
        registry.push(lf.rerank(lf.linear(terms), rank=1), "blend:v1")
        write_adapter(home / "card", weights=tensors(0.125), settings=config(base_model_name_or_path=LONG * 2))
        (home / "card" / "README.md").write_text(CARD)
        registry.push(home / "card", f"{LONG}:v1")
        made = plant(registry.store, home, "grown:v1", EIGHT)
        plant(registry.store, home, "wide:v1", [f"n{number:02}" for number in range(6)] + WIDE, first=16.0)
        registry.store.tag(made["french/law"].digest, RefName("french-law", "v1"))
        for name in ("french", "blend", "french-law"):
            while "being worked out" in read(f"{server.url}/{name}"):
                time.sleep(0.05)
        server.token = server.add_user("me")
        for name, private in (("secret", True), ("empty", False)):
            body = {"name": name, "organization": None, "private": private}
            assert raw.post(server, "/api/repos/create", body, token=server.token).status == 200
        yield server


EIGHT = (
    "french",
    "german",
    "italian",
    "french/law",
    "german/law",
    "french/medicine",
    "french/law/eu",
    "french/law/tax",
)
WIDE = [f"n{number:02}/child-with-quite-a-long-name-{below}" for number in range(6) for below in range(9)]
PAGES = {
    "front": "/",
    "trees": "/?kind=tree",
    "tree": "/grown",
    "wide": "/wide",
    "node": "/grown/tree/v1/french/law",
    "noded": "/french-law",
    "found": "/?search=acme+ble",
    "none": "/?search=nothing-of-this-name",
    "plain": "/french",
    "made": "/blend",
    "card": f"/{LONG}",
    "empty": "/me/empty",
    "missing": "/me/nothing",
    "nowhere": "/a/b/c/d",
}
MISSING = {"missing", "nowhere"}


@pytest.fixture(scope="module", params=[True, False], ids=["script", "no-script"])
def page(request, browser):
    with browser.page(script=request.param) as page:
        page.script = request.param
        yield page


@pytest.mark.parametrize("kind", PAGES)
def test_every_page_is_whole_alone_and_legible(page, server, kind):
    page.look(width=1280)
    assert page.open(server.url + PAGES[kind]) == (404 if kind in MISSING else 200)
    assert all(address.startswith(server.url) for address in page.requests), page.requests
    assert f"{server.url}/-/style.css" in page.requests
    missing = ["Failed to load resource: the server responded with a status of 404 (Not Found)"]
    assert page.complaints == (missing if kind in MISSING else [])
    assert len(page.run("document.querySelector('h1').textContent")) > 3
    assert page.run("getComputedStyle(document.querySelector('main')).paddingTop") != "0px"
    buttons, copied = (
        page.run(f"document.querySelectorAll('{one}').length") for one in ("button.copy", "pre[data-copy]")
    )
    assert buttons == (copied if page.script else 0)
    for width, dark in ((1280, False), (1280, True), (360, False), (360, True)):
        page.look(width=width, dark=dark)
        seen, pale = page.run(PALE)
        assert seen > 5
        assert pale == [], (width, dark)
        assert page.run("[innerWidth, document.documentElement.scrollWidth]") == [width, width]


def test_a_button_copies_what_it_stands_beside(browser, server):
    with browser.page() as page:
        page.open(f"{server.url}/french")
        given = ["clipboardReadWrite", "clipboardSanitizedWrite"]
        browser.ask("Browser.grantPermissions", permissions=given, browserContextId=page.profile)
        count = page.run("document.querySelectorAll('button.copy').length")
        for number in range(count):
            button = f"document.querySelectorAll('button.copy')[{number}]"
            page.run(f"{button}.click()")
            while page.run(f"{button}.textContent") == "Copy":
                pass
            assert page.run(f"{button}.textContent") == "Copied"
            said = page.run("navigator.clipboard.readText()")
            assert said == page.run(f"document.querySelectorAll('pre[data-copy]')[{number}].textContent")
            assert len(said) > 20
        assert count > 1


def test_whoever_looks_without_a_token_is_asked_for_one_only_by_a_link(browser, server):
    with browser.page() as page:
        assert page.open(f"{server.url}/me/secret") == 404
        link = page.run("document.querySelector('header a[href^=\"/-login\"]').getAttribute('href')")
        assert link == "/-login?to=/me/secret"
    with browser.page(token=server.token) as page:
        assert page.open(server.url + link) == 200
        assert page.run("location.pathname") == "/me/secret"
        assert "private" in page.run("document.querySelector('h1').textContent")
        assert "me" in page.run("document.querySelector('header').textContent")
    for to in ("//example.org", "/\\example.org", "https://example.org", "/%2f/example.org"):
        with browser.page(token=server.token) as page:
            page.open(f"{server.url}/-login?to={to}")
            assert page.run("location.href") == f"{server.url}/"


@pytest.mark.parametrize("path", ["/grown", "/wide", "/grown/tree/main/french/law"])
def test_a_click_on_a_card_leads_to_its_node(browser, server, path):
    at = """[...document.querySelectorAll('.grown .t-card')].map(card => {
      card.scrollIntoView({block: "center", inline: "center", behavior: "instant"});
      const box = card.getBoundingClientRect();
      const link = document.elementFromPoint(box.left + box.width / 2, box.top + box.height / 2)?.closest("a");
      return link ? link.getAttribute("href") : null;
    })"""
    with browser.page(script=False) as page:
        page.open(server.url + path)
        cards = page.run(at)
        links = [link for link in cards if link]
        assert len(links) == len(set(links)) == len(cards) - ("tree" in path), "but the one that one is at"
        assert page.open(server.url + links[-1]) == 200


@pytest.mark.parametrize("path", ["/favicon.ico", "/-/icon.svg"])
def test_the_icon_asks_nobody_who_they_are(server, path):
    with urllib.request.urlopen(server.url + path, timeout=30) as answer:  # noqa: S310 - our own server
        assert answer.headers["Content-Type"] == "image/svg+xml"
