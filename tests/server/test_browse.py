"""The front page: search, base, order and pages are in the address, and go together; and it stays quick."""

import threading
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from html.parser import HTMLParser
from urllib.parse import urlencode

import pytest
from huggingface_hub import HfApi

import loraforge as lf
from loraforge_registry.names import RefName
from loraforge_registry.server import repos
from loraforge_registry.server.around import Around
from loraforge_registry.server.hub import Settings
from loraforge_registry.server.local import LocalRefs
from loraforge_registry.server.run import open_hub
from tests.bad_files import config, pair, tensors, write_adapter
from tests.hub import Server
from tests.server import raw
from tests.server.test_pages import see


class Forms(HTMLParser):
    """The forms of a page, as a browser without JavaScript would send them."""

    def __init__(self):
        super().__init__()
        self.forms, self.choices, self._select = [], {}, None

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        if tag == "form":
            self.forms.append({})
        elif tag == "input":
            self.forms[-1][given["name"]] = given.get("value", "")
        elif tag == "select":
            self._select = given["name"]
            self.choices[self._select] = []
        elif tag == "option":
            self.choices[self._select].append(given["value"])
            if "selected" in given:
                self.forms[-1][self._select] = given["value"]


def forms(html):
    found = Forms()
    found.feed(html)
    return found


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """70 for acme/base, one for another, one for none, one that a client pushed, and a private one."""
    home = tmp_path_factory.mktemp("browse")
    with Server(home / "store") as server:
        registry = lf.Registry(server.store)
        folder = write_adapter(home / "a", settings=config(base_model_name_or_path="acme/base"))
        digest = registry.push(folder, "me--n000:v1")
        for number in range(1, 70):
            registry.store.tag(digest, RefName(f"me--n{number:03}", "v1"))
        larger = pair("model.layers.0.q", rank=5, rows=64) | pair("model.layers.0.v", rank=3, rows=64)
        settings = config(base_model_name_or_path="O'Neil & Co/b#1", rank_pattern={"q": 5}, r=3)
        registry.push(write_adapter(home / "b", weights=larger, settings=settings), "me--other:v1")
        registry.push(write_adapter(home / "c", weights=tensors(0.25)), "me--plain:v1")
        server.token = server.add_user("me")
        api = HfApi(server.url, token=server.token)
        for name, private in (("fresh", False), ("secret", True)):
            api.create_repo(f"me/{name}", private=private)
            base = "acme/base" if name == "fresh" else "acme/hidden"
            folder = write_adapter(home / name, settings=config(base_model_name_or_path=base))
            api.upload_folder(repo_id=f"me/{name}", folder_path=folder)
        yield server


def get(server, token=None, **query):
    answer = raw.request(server, "GET", f"/?{urlencode(query)}" if query else "/", token=token)
    assert answer.status == 200
    html = answer.body.decode()
    seen = see(html)
    listed = [link for link in seen.links if link.startswith("/me/")]
    return html, seen, listed


def test_a_base_is_a_link_to_what_is_for_it(server):
    _, seen, listed = get(server, search="other")
    assert listed == ["/me/other"]
    (link,) = [link for link in seen.links if "base=" in link]
    found = see(raw.request(server, "GET", link).body.decode())
    assert [link for link in found.links if link.startswith("/me/")] == ["/me/other"]
    assert "1 match for O'Neil & Co/b#1" in found.text
    page = see(raw.request(server, "GET", "/me/other").body.decode())
    back = next(link for link in page.links if "base=" in link)
    assert "/me/other" in see(raw.request(server, "GET", back).body.decode()).links
    assert "rank 3 to 5" in found.text


def test_search_base_order_and_pages_go_together(server):
    _, seen, first = get(server, base="acme/base", search="me/ n", sort="newest")
    assert len(first) == 50
    assert "70 matches for acme/base" in seen.text
    assert "1 to 50 of 70" in seen.text
    pages, link = [first], next(link for link in seen.links if "from=50" in link)
    while link:
        seen = see(raw.request(server, "GET", link).body.decode())
        pages.append([link for link in seen.links if link.startswith("/me/")])
        link = next((link for link in seen.links if f"from={50 * len(pages)}" in link), None)
    assert [len(page) for page in pages] == [50, 20]
    assert [*pages[0], *pages[1]] == [f"/me/n{number:03}" for number in range(70)]
    assert not any("from=100" in link for link in seen.links)
    assert any(link.endswith("sort=newest") and "from" not in link for link in seen.links)  # back


def test_without_javascript_each_form_keeps_what_the_others_say(server):
    for words in ("n0", "no such"):
        found = forms(get(server, base="acme/base", search=words, sort="newest")[0])
        assert found.forms == [
            {"base": "acme/base", "sort": "newest", "search": words},
            {"search": words, "base": "acme/base", "sort": "newest"},
        ]
    assert found.choices["base"] == ["", "O'Neil & Co/b#1", "acme/base"]
    assert found.choices["sort"] == ["name", "newest", "smallest"]


def test_the_orders(server):
    assert get(server, sort="newest")[2][0] == "/me/fresh"
    smallest = get(server, sort="smallest", search="me/ other")[2] + get(server, sort="smallest", search="plain")[2]
    assert smallest == ["/me/other", "/me/plain"]
    assert get(server, sort="smallest")[2][0] == "/me/plain"
    assert get(server, sort="nonsense")[2] == get(server)[2]


def test_a_base_that_only_private_adapters_have_is_no_choice(server):
    assert "acme/hidden" not in get(server)[0]
    html, _, listed = get(server, base="acme/hidden")
    assert listed == []
    assert "No match" in html
    assert get(server, token=server.token, base="acme/hidden")[2] == ["/me/secret"]
    assert "acme/hidden" in forms(get(server, token=server.token)[0]).choices["base"]


def test_what_nobody_asked_for_is_answered(server):
    for query in ({"from": "99999"}, {"from": "-1"}, {"from": "x"}, {"base": "\u202e" * 600}, {"search": "x" * 5000}):
        get(server, **query)
    assert get(server, **{"from": "70", "base": "acme/base"})[2][-1] == "/me/n069"


def test_the_hubs_filter_by_base_answers_the_same(server):
    api = HfApi(server.url, token=False)
    found = [model.id for model in api.list_models(filter="base_model:adapter:O'Neil & Co/b#1")]
    assert found == ["me/other"]
    assert len(list(api.list_models(filter="base_model:adapter:acme/base"))) == 71


def test_a_second_look_reads_names_and_no_manifest(tmp_path, monkeypatch):
    """However many there are, and whatever they weigh: what never changes is not read again."""
    with Server(tmp_path / "store") as server:
        token = server.add_user("me")
        for number in range(3):
            settings = config(base_model_name_or_path=f"acme/{number}")
            folder = write_adapter(tmp_path / str(number), weights=tensors(0.5 + number), settings=settings)
            api = HfApi(server.url, token=token)
            api.create_repo(f"me/r{number}")
            api.upload_folder(repo_id=f"me/r{number}", folder_path=folder)
    hub, pins = open_hub(tmp_path / "store", Settings())
    assert [entry.facts.base for entry in Around(hub, None).entries()] == ["acme/0", "acme/1", "acme/2"]
    monkeypatch.setattr(LocalRefs, "_read", lambda *_: pytest.fail("a record was read again"))
    found = Around(hub, None)
    assert len(list(found.entries())) == 3
    assert len(found.names) == 3
    pins.close()


def test_caches_hold_no_more_than_they_may():
    recent = repos.Recent(10)
    for key in range(20):
        recent.put(key, str(key), 3)
    assert [key for key in range(20) if recent.get(key) is not None] == [17, 18, 19]
    recent.get(17)
    recent.put(20, "heavy", 4)
    assert [key for key in range(21) if recent.get(key)] == [17, 19, 20]
    recent.put(21, "too heavy", 11)
    recent.put(20, "lighter", 1)
    assert recent.get(21) is None
    recent.put(22, "x", 6)
    assert [key for key in range(23) if recent.get(key)] == [19, 20, 22]


def test_what_all_ask_for_at_once_is_loaded_once_and_what_fails_is_asked_for_again():
    recent, asked, gate = repos.Recent(10), [], threading.Event()

    def load():
        asked.append(1)
        gate.wait(5)
        return "loaded"

    with ThreadPoolExecutor(4) as threads:
        answers = [threads.submit(recent.get_or, "key", load, lambda _: 3) for _ in range(4)]
        gate.set()
        assert [answer.result() for answer in answers] == ["loaded"] * 4
    assert len(asked) == 1
    with pytest.raises(ZeroDivisionError):
        recent.get_or("other", lambda: 1 / 0)
    assert recent.get_or("other", lambda: "now") == "now"


def test_the_page_is_small(server):
    with urllib.request.urlopen(f"{server.url}/", timeout=30) as answer:  # noqa: S310 - our own server
        assert len(answer.read()) < 30_000


def test_where_nobody_may_look_without_a_token_a_browser_asks_for_one(tmp_path):
    server = Server(tmp_path / "store", "--host", "0.0.0.0")  # noqa: S104 - whoever is reached by others asks for tokens
    token = server.add_user("me")
    with server:
        refused = raw.request(server, "GET", "/", headers=[("Accept", "text/html")])
        assert refused.status == 401
        assert refused.headers["www-authenticate"].startswith("Basic ")
        assert "Who are you?" in see(refused.body.decode()).text
        assert "No adapters yet" in see(raw.request(server, "GET", "/", token=token).body.decode()).text
