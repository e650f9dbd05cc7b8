"""The pages for people: what is on them, that strangers' text stays text, and that they need nothing from elsewhere."""

import ast
import json
import os
import re
import subprocess
import sys
import urllib.error
import urllib.request
from html import unescape
from html.parser import HTMLParser
from pathlib import Path

import pytest

from loraforge_registry.digest import Digest
from loraforge_registry.git import Signature
from loraforge_registry.repositories import CommitRecord, RepositoryRecord
from loraforge_registry.server import sections
from loraforge_registry.server.repos import Repository, Revision
from tests.bad_files import config, write_adapter
from tests.hub import Server

EVIL = "<script>alert(1)</script>'\"><img src=x onerror=alert(1)>\u202e"
CARD = f"""---
base_model: acme/base
---
# A card

Some *words*, [a page](https://example.org/x), [a trap](javascript:alert(1)), [another](data:text/html,x).

![a picture](https://example.org/track.png)

{EVIL}

| a | b |
|---|---|
| 1 | 2 |

```python
print("<b>")
```
"""


class Seen(HTMLParser):
    """What a browser would act on."""

    def __init__(self):
        super().__init__(convert_charrefs=True)
        self.tags, self.links, self.handlers, self.open = [], [], [], []
        self.text = ""

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.links += [value for name, value in attributes if name in ("href", "src", "action")]
        self.handlers += [name for name, _ in attributes if name.startswith("on") or name == "style"]

    def handle_data(self, data):
        self.text += data


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    home = tmp_path_factory.mktemp("pages")
    with Server(home / "store") as server:
        yield server


@pytest.fixture
def filled(server, run, tmp_path):
    """french, law, what was made of both, and one with a card full of traps."""
    settings = config(base_model_name_or_path="acme/base")
    for name, value in (("french", 0.5), ("law", -0.25)):
        from tests.bad_files import tensors

        write_adapter(tmp_path / name, weights=tensors(value), settings=settings)
        run("--store", server.store, "push", tmp_path / name, f"{name}:v1")
    run("--store", server.store, "compose", "french:v1=0.7", "law:v1=0.3", "--rank", "1", "--as", "blend:v1")
    write_adapter(tmp_path / "evil", settings=config(base_model_name_or_path=EVIL[:60]))
    (tmp_path / "evil" / "README.md").write_text(CARD)
    run("--store", server.store, "push", tmp_path / "evil", "evil:v1")
    return server


def get(server, path):
    with urllib.request.urlopen(server.url + path, timeout=30) as answer:  # noqa: S310 - our own server
        return answer, answer.read().decode()


def see(html):
    seen = Seen()
    seen.feed(html)
    return seen


def test_the_front_lists_and_searches(filled):
    answer, html = get(filled, "/")
    seen = see(html)
    assert {"/french", "/law", "/blend", "/evil"} <= set(seen.links)
    assert "acme/base" in seen.text
    found = see(get(filled, "/?search=fre")[1])
    assert "/french" in found.links
    assert "/law" not in found.links
    assert "/blend" in see(get(filled, "/?search=acme+ble")[1]).links
    assert "No match" in see(get(filled, "/?search=%3Cnothing%3E")[1]).text
    policy = answer.headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy


def test_a_page_says_what_an_adapter_is_and_what_it_has_to_do_with_others(filled):
    seen = see(get(filled, "/blend")[1])
    for fragment in ("base acme/base", "rank 1", "Made from", "rerank", "linear", "0.7", "Targets", "largest error"):
        assert fragment in seen.text, fragment
    assert {"/french", "/law"} <= set(seen.links)
    back = see(get(filled, "/french")[1])
    assert "Used by" in back.text
    assert "/blend" in back.links
    assert f'snapshot_download("french", endpoint="{filled.url}")' in back.text
    answer, _ = get(filled, next(link for link in back.links if "/resolve/" in link and link.endswith(".json")))
    assert answer.status == 200
    digest = next(word for word in back.text.split() if word.startswith("sha256:"))
    assert get(filled, f"/-/at/{digest.removeprefix('sha256:')}")[0].url.endswith("/french")
    with pytest.raises(urllib.error.HTTPError) as missing:
        get(filled, f"/-/at/{'0' * 64}")
    assert missing.value.code == 404
    missing.value.close()


def test_what_strangers_wrote_stays_text(filled):
    for path in ("/", "/evil"):
        html = get(filled, path)[1]
        seen = see(html)
        assert not seen.handlers, path
        assert "img" not in seen.tags
        assert seen.tags.count("script") == 1
        assert not [link for link in seen.links if link.lower().startswith(("javascript:", "data:"))]
        elsewhere = [link for link in seen.links if "example.org" in link]
        # a picture is a link to it: nothing is loaded
        assert elsewhere == ([] if path == "/" else ["https://example.org/x", "https://example.org/track.png"])
        assert len(html) < 100_000
        assert "\u202e" not in html
    assert "alert(1)" in see(get(filled, "/evil")[1]).text
    assert "base_model" not in seen.text
    assert "table" in seen.tags


def test_nothing_comes_from_elsewhere(filled):
    for path in ("/", "/blend", "/evil"):
        seen = see(get(filled, path)[1])
        assert {"/-/style.css", "/-/page.js"} <= set(seen.links)
    assert "url(" not in get(filled, "/-/style.css")[1]
    assert get(filled, "/-/page.js")[0].headers["Content-Type"].startswith("text/javascript")


def test_what_is_private_has_no_page_for_others(filled):
    token = filled.add_user("me")
    body = json.dumps({"name": "secret", "organization": None, "visibility": "private"}).encode()
    headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}
    request = urllib.request.Request(f"{filled.url}/api/repos/create", body, headers)  # noqa: S310 - as above
    with urllib.request.urlopen(request, timeout=30) as made:  # noqa: S310 - as above
        assert made.status == 200
    assert "secret" not in get(filled, "/")[1]
    with pytest.raises(urllib.error.HTTPError) as refused:
        get(filled, "/me/secret")
    with refused.value as answer:
        assert answer.code in (401, 404)
        assert token not in answer.read().decode()


def test_what_is_copied_runs_nothing_of_a_stranger(filled, run, tmp_path):
    base = 'x")\nimport os\nos.abort()\n("'
    write_adapter(tmp_path / "paste", settings=config(base_model_name_or_path=base))
    run("--store", filled.store, "push", tmp_path / "paste", "paste:v1")
    code = re.search("<pre data-copy>(.*?)</pre>", get(filled, "/paste")[1], re.DOTALL)[1]
    calls = [node for node in ast.walk(ast.parse(unescape(code))) if isinstance(node, ast.Call)]
    names = [call.func.attr if isinstance(call.func, ast.Attribute) else call.func.id for call in calls]
    assert names == ["from_pretrained", "snapshot_download", "from_pretrained"]
    assert calls[0].args[0].value == base


def test_what_is_copied_finds_the_adapter_here_and_the_base_where_it_is(filled, tmp_path):
    code = unescape(re.search("<pre data-copy>(.*?)</pre>", get(filled, "/french")[1], re.DOTALL)[1])
    kept = [ast.unparse(line) for line in ast.parse(code).body if "snapshot_download" in ast.unparse(line)]
    environment = {**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0"}
    command = [sys.executable, "-c", "\n".join([*kept, "print(folder)"])]
    said = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    assert (Path(said.split()[-1]) / "adapter_config.json").is_file()


def test_a_card_keeps_the_spaces_and_joiners_of_its_language(filled, run, tmp_path):
    words = "mod\u00e8le\u00a0? \u65e5\u672c\u3000\u8a9e \u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645"
    write_adapter(tmp_path / "spoken")
    (tmp_path / "spoken" / "README.md").write_text(words)
    run("--store", filled.store, "push", tmp_path / "spoken", "spoken:v1")
    assert words in see(get(filled, "/spoken")[1]).text


def test_a_page_beyond_the_last_is_the_first(filled):
    assert "/french" in see(get(filled, "/?from=99999")[1]).links


def test_main_is_first_and_the_highest_version():
    branches = dict.fromkeys(("dev", "main", "a10", "a9"), Digest.of(b"commit"))
    tags = dict.fromkeys((*(f"v1.{n}" for n in range(20)), "first", "2", "v2-rc10", "v2-rc9"), Digest.of(b"commit"))
    repository = Repository("me--r", RepositoryRecord("me/r", 0, branches=branches, tags=tags), Digest.of(b"record"))
    commit = CommitRecord({}, Signature("me", 0), "")
    chips = sections.revisions(repository, Revision(commit.id, Digest.of(b"commit"), commit))
    said = [re.sub("<[^>]*>", "", chip) for chip in chips]
    assert said[:4] == ["branch main", "branch a9", "branch a10", "branch dev"]
    assert said[4:8] == ["tag v2-rc10", "tag v2-rc9", "tag v1.19", "tag v1.18"]
    assert said[16:] == ["and 12 more", f"commit {commit.id[:12]}"]
