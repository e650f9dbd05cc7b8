"""What is here is found with one look at the names, however many there are."""

from concurrent.futures import ThreadPoolExecutor

import pytest

import loraforge as lf
from loraforge_registry.files import Files
from loraforge_registry.names import RefName
from loraforge_registry.server import repos
from loraforge_registry.server.hub import Settings
from loraforge_registry.server.run import open_hub
from tests.bad_files import write_adapter


@pytest.fixture
def hub(tmp_path):
    registry = lf.Registry(tmp_path / "store")
    digest = registry.push(write_adapter(tmp_path / "adapter"), "acme--first:v1")
    for number in range(20):
        registry.store.tag(digest, RefName(f"acme--n{number}", "v2"))
    (tmp_path / "store" / "refs" / "no ref@at all").write_text("not ours")
    hub, pins = open_hub(tmp_path / "store", Settings())
    yield hub
    pins.close()


def test_one_look_for_all(hub, monkeypatch):
    looks, names = [], Files.names
    monkeypatch.setattr(Files, "names", lambda files, folder: looks.append(folder) or names(files, folder))
    found = [repository.id for repository in repos.everything(hub, None)]
    assert found == sorted(["acme/first", *(f"acme/n{number}" for number in range(20))])
    assert looks.count("refs") == 1


def test_names_come_with_their_tags(hub):
    assert hub.refs.names()["acme--first"] == ["v1"]
    assert hub.refs.tags("acme--n3") == hub.refs.tags("acme--n3", ["v2"])


def test_several_look_at_once_and_each_sees_all(hub):
    expected = list(hub.refs.names())

    def look(_):
        return all(list(hub.refs.names()) == expected for _ in range(100))

    with ThreadPoolExecutor(8) as threads:
        assert all(threads.map(look, range(8)))
