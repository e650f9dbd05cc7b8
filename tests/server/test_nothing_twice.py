"""A second push or pull of the same content: not a byte of it goes over the wire, by our client and by the Hub's."""

import random
import subprocess
import sys

import pytest

from tests.bad_files import PREFIX, config, write_adapter
from tests.hub import Server
from tests.server.wire import share_of, wire_to

WEIGHTS = "adapter_model.safetensors"
PUSH = "import sys; from huggingface_hub import HfApi; a = HfApi(); a.create_repo(sys.argv[1], exist_ok=True); \
a.upload_folder(repo_id=sys.argv[1], folder_path=sys.argv[2])"
PULL = "import sys; import huggingface_hub as h; h.snapshot_download(sys.argv[1])"


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """A small adapter of random numbers: no part of it is like another, or can be guessed."""
    raw = random.Random(1).randbytes
    weights = {
        f"{PREFIX}model.q.lora_A.weight": ("F32", (2, 100_000), raw(800_000)),
        f"{PREFIX}model.q.lora_B.weight": ("F32", (100_000, 2), raw(800_000)),
    }
    return write_adapter(tmp_path_factory.mktemp("a"), weights=weights, settings=config(target_modules=["q"]))


@pytest.fixture
def wire(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)  # which peers' tests set
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    with Server(tmp_path / "served") as server, wire_to(server) as wire:
        monkeypatch.setenv("HF_ENDPOINT", wire.url)
        monkeypatch.setenv("HF_TOKEN", server.add_user("me"))
        monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
        yield wire


def shares(wire, adapter):
    """What went up of the weights, and what came down, since this was asked last."""
    data = (adapter / WEIGHTS).read_bytes()
    found = share_of(data, wire.up), share_of(data, wire.down)
    del wire.up[:], wire.down[:]
    return found


def test_our_client(wire, adapter, run, tmp_path):
    there, elsewhere = "hf://me/french@v1", ("--store", tmp_path / "other", "--json")
    assert run("push", adapter, "french:v1", "--to", there).code == 0
    assert shares(wire, adapter) == (1, 0)
    assert run("push", "french:v1", "--to", there).code == 0
    assert not [line for line in (b"PUT ", b"POST ") if line in wire.up], "no small file either"
    assert shares(wire, adapter) == (0, 0)
    assert run("push", "french:v1", "--to", "hf://me/twin").code == 0, "into another repository"
    assert shares(wire, adapter) == (0, 0)
    assert run(*elsewhere, "pull", there).json["received"] > 1_600_000
    assert shares(wire, adapter) == (0, 1)
    for source in (there, "hf://me/twin"):
        assert run(*elsewhere, "pull", source, "--as", "again:v1").json["received"] == 0
        assert (shares(wire, adapter), b"/resolve/" in wire.up) == ((0, 0), False)


@pytest.mark.parametrize("xet", ["off", "on"])
def test_the_hubs_client(xet, wire, adapter, monkeypatch):
    if xet == "off":
        monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")

    def client(code, *arguments):
        ran = subprocess.run([sys.executable, "-c", code, *map(str, arguments)], capture_output=True, check=False)
        assert ran.returncode == 0, ran.stderr.decode()

    client(PUSH, "me/french", adapter)
    assert (b"/cas/" in wire.up) == (xet == "on")
    sent, came = shares(wire, adapter)
    assert (sent > 0.95, came) == (True, 0), "a sample may lie across two chunks"
    client(PUSH, "me/french", adapter)
    assert b"PUT " not in wire.up
    assert len(wire.up) < 10_000, "it asks, with 512 bytes of each file, and is told that all is there"
    assert shares(wire, adapter) == (0, 0)
    client(PUSH, "me/twin", adapter)
    assert shares(wire, adapter) == (0, 0), "into another repository"
    client(PULL, "me/french")
    assert shares(wire, adapter) == (0, 1)
    client(PULL, "me/french")
    assert shares(wire, adapter) == (0, 0)
