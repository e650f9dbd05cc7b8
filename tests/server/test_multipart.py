"""Large files in parts, by the Hub's own client with Xet off; the limit is lowered so that four megabytes are large."""

import os
import subprocess
import sys

from loraforge_registry.server.run import accounts_of

SERVE = """
import sys
from pathlib import Path
from loraforge_registry.server import run
hub, pins = run.open_hub(Path(sys.argv[1]), run.Settings(multipart_above=2_000_000, part_size=1_500_000))
bound = run.listen("127.0.0.1", 0)
print(bound.getsockname()[1], flush=True)
run.serve(hub, pins, bound)
"""
CLIENT = """
import hashlib, os, sys
from huggingface_hub import HfApi, hf_hub_download
data = os.urandom(4_000_001)
api = HfApi()
api.create_repo("me/parts")
api.upload_file(path_or_fileobj=data, path_in_repo="large.dat", repo_id="me/parts")
assert open(hf_hub_download("me/parts", "large.dat"), "rb").read() == data
"""


def test_a_file_in_parts_is_one_file(tmp_path):
    store = tmp_path / "store"
    token = accounts_of(store).add("me")
    environment = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    command = [sys.executable, "-c", SERVE, store]
    with (
        (tmp_path / "log").open("w") as log,
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=log) as server,
    ):
        try:
            port = int(server.stdout.readline())
            environment |= {"HF_ENDPOINT": f"http://127.0.0.1:{port}", "HF_TOKEN": token}
            environment |= {"HF_HUB_DISABLE_XET": "1", "HF_HOME": str(tmp_path / "home")}
            ran = subprocess.run([sys.executable, "-c", CLIENT], env=environment, capture_output=True, check=False)
        finally:
            server.terminate()
    said = (tmp_path / "log").read_text()
    assert ran.returncode == 0, ran.stderr.decode() + said
    assert said.count("PUT /lfs/part/{oid} 200") == 3
    assert said.count("POST /lfs/complete/{oid} 200") == 1
    assert not list((tmp_path / "store.server" / "uploads").iterdir())
