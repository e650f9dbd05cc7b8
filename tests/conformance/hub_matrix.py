"""Every version of the Hub's client that we claim, with Xet and without, against a server of ours: ``make hub-matrix``.

Nothing is set but HF_ENDPOINT and HF_TOKEN (and HF_HUB_DISABLE_XET where Xet is off). The server takes what is larger
than 2 MB in parts, and breaks off one long file, so that every client has to go on where it was. Each version gets a
virtual environment in .hub-venvs, made once; where the package index is out of reach that one is skipped, and said.
"""

import os
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).parents[2]
VERSIONS = ("0.36.2", "1.0.1", "1.33.0", "2.4.0")
OF_ITS_TIME = {"1.0.1": ("click", "typer-slim<0.20")}  # its command line cannot start with a newer one
XET = ("on", "off")
BROKEN_OFF = 23_000_000  # bytes, as hub_client says too
SERVE = f"""
import functools
from loraforge_registry.server import local, run
run.Settings = functools.partial(run.Settings, multipart_above=2_000_000, part_size=1_500_000)
read, seen = local.LocalBlobs.read, set()
def broken_off(self, digest, begin, end):
    for piece in read(self, digest, begin, end):
        yield piece
        begin += len(piece)
        if end == {BROKEN_OFF} and 2 * begin > end and digest not in seen:
            seen.add(digest)
            raise OSError
local.LocalBlobs.read = broken_off
from loraforge_cli.main import main
main()
"""
ADAPTER = ROOT / "tests" / "vectors" / "peft" / "0.21.2" / "linear"


def main() -> int:
    failed = skipped = 0
    with tempfile.TemporaryDirectory() as folder, server_for_clients(Path(folder)) as server:
        token = server.add_user("alice")
        for version in VERSIONS:
            python = environment(version)
            if python is None:
                print(f"huggingface_hub {version}: SKIPPED, the package index is out of reach")
                skipped += 1
                continue
            for xet in XET:
                ran = run_client(python, server.url, token, Path(folder) / f"home-{version}-{xet}", xet=xet)
                said = ran.stdout.strip().splitlines()[-1:] if ran.returncode == 0 else [ran.stdout + ran.stderr]
                print(f"huggingface_hub {version}, Xet {xet}: {'ok' if ran.returncode == 0 else 'FAILED'}: {said[0]}")
                failed += ran.returncode != 0
    print(
        f"{len(VERSIONS) * len(XET) - failed - skipped * len(XET)} passed, {failed} failed, {skipped} versions skipped"
    )
    return 1 if failed else 0


def server_for_clients(folder: Path):
    """A server with a low limit to what is sent whole, which breaks off a long file the first time."""
    from tests.hub import Server

    server = Server(folder / "store")
    server.program = ["-c", SERVE]
    return server


def environment(version: str) -> Path | None:
    """The Python of a virtual environment with that client, made where it is missing; None if it cannot be."""
    directory = ROOT / ".hub-venvs" / version
    python = directory / "bin" / "python"
    marker = directory / "ready"
    if not marker.exists():
        venv.create(directory, clear=True, with_pip=True)
        packages = [f"huggingface_hub=={version}", "hf_xet", *OF_ITS_TIME.get(version, ())]
        pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *packages]
        if subprocess.run(pip, check=False).returncode != 0:
            return None
        marker.touch()
    return python


def run_client(
    python: Path, url: str, token: str, home: Path, *, xet: str, adapter: Path = ADAPTER
) -> "subprocess.CompletedProcess[str]":
    """Run hub_client.py with a Python, in an environment that knows nothing else."""
    environment = {
        "PATH": os.environ["PATH"],
        "HF_HOME": str(home),
        "HOME": str(home),
        "HF_ENDPOINT": url,
        "HF_TOKEN": token,
        **({"HF_HUB_DISABLE_XET": "1"} if xet == "off" else {}),
    }
    home.mkdir(parents=True, exist_ok=True)
    hf = python.parent / "hf"
    client = Path(__file__).with_name("hub_client.py")
    command = [python, "-W", "default", client, "alice", adapter, *([hf] if hf.exists() else [])]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False, cwd=home)


if __name__ == "__main__":
    sys.path[:0] = [str(ROOT), str(ROOT / "registry"), str(ROOT / "cli")]
    sys.exit(main())
