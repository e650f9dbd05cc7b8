"""The search for tokens finds one wherever it gets out: a run of tests that let one out fails, and names each."""

import os
import subprocess
import sys

from tests.hub import ROOT

LEAKS = '''
import logging, subprocess
from base64 import b64encode
from tests.canary import look, new_token
from tests.hub import Server
from tests.server.raw import request

TOKEN = new_token()

def test_printed(): print(TOKEN)
def test_logged(): logging.getLogger("x").warning("who: %s", TOKEN)
def test_in_an_error(): raise ValueError(TOKEN)
def test_by_a_command(): subprocess.run(["echo", TOKEN], capture_output=True)
def test_in_a_file(tmp_path): (tmp_path / "a").write_bytes(bytes(99) + TOKEN.encode() + bytes(99))
def test_in_a_name(tmp_path): (tmp_path / TOKEN).touch()
def test_as_a_password(tmp_path): (tmp_path / "basic").write_bytes(b64encode(f"alice:{TOKEN}".encode()))

SPOILT = """
from loraforge_registry.server import app
user = app._user
def told(hub, scope, headers):
    app.LOG.info("it is %s", headers.get("authorization"))
    return user(hub, scope, headers)
app._user = told
from loraforge_cli.main import main
main()
"""

def test_by_a_server(tmp_path):
    server = Server(tmp_path / "store")
    server.program = ["-c", SPOILT]
    with server:
        assert request(server, "GET", "/api/whoami-v2", token=server.add_user("me")).status == 200
'''
TOLD = (
    "test_printed", "test_logged", "test_in_an_error", "test_by_a_command", "test_in_a_file0/a", "test_in_a_name0/",
    "test_as_a_password0/basic", "test_by_a_server0/store.log",
)  # fmt: skip


def test_a_token_that_gets_out_is_found(tmp_path):
    (tmp_path / "test_leaks.py").write_text(LEAKS)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "tests.canary", "-p", "no:cacheprovider", "test_leaks.py"]
    command += ["--basetemp", "run"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "registry", ROOT / "cli")))}
    with subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=-1, stderr=-2, text=True) as process:
        said = process.stdout.read()
    assert process.returncode == 1, said
    told = said.partition("a token got out:")[2].partition("short test summary")[0]
    assert [name for name in TOLD if name not in told] == [], said
    subprocess.run(["rm", "-r", tmp_path / "run"], check=True)  # or the search of this run finds them
