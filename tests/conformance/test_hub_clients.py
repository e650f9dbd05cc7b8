"""The installed huggingface_hub, in its own process, against a server in another: the whole of hub_client.py."""

import sys
from pathlib import Path

import pytest

from tests.conformance.hub_matrix import run_client, server_for_clients


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with server_for_clients(tmp_path_factory.mktemp("hub")) as server:
        yield server


@pytest.mark.parametrize("xet", ["on", "off"])
def test_all_steps_of_a_client(server, tmp_path, xet):
    ran = run_client(Path(sys.executable), server.url, server.add_user("alice"), tmp_path / "home", xet=xet)
    assert ran.returncode == 0, ran.stdout + ran.stderr + server.log.read_text()[-4000:]
    assert "17 steps" in ran.stdout
    assert b" cut off: OSError" in server.log.read_bytes()
    assert (b"PUT /lfs/part/{oid} 200" in server.log.read_bytes()) or xet == "on"
