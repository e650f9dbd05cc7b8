"""What does 1 GB cost over loopback to our server and back, over copying and hashing the file?

An adapter of 1 GB is pushed and pulled by ``loraforge``, and by the Hub's client without Xet and with it; each
command is whole, with its start. Both sides make it durable, and what we pull is hashed here, too. The peer is
``cp FILE COPY; sha256sum COPY``, which does neither; the second row adds ``sync COPY``. To reach: 2 times the first, by
our client, with a server below 200 MB. All take turns in one run; medians. The server's memory is the most it held.
"""

import hashlib
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "registry"), str(ROOT / "cli")]

from benchmarks.bench_push import PAIRS, RANK, WIDTH, write_adapter  # noqa: E402 - behind the path

ROUNDS = int(os.environ.get("ROUNDS", "3"))
LORAFORGE = [sys.executable, "-m", "loraforge_cli"]
HUB_PUSH = (
    "import sys; from huggingface_hub import HfApi; HfApi().upload_folder(repo_id='me/hub', folder_path=sys.argv[1])"
)
HUB_PULL = "import sys; import huggingface_hub as h; h.snapshot_download('me/hub', local_dir=sys.argv[1])"
HUB = {"the Hub's client": {"HF_HUB_DISABLE_XET": "1"}, "the Hub's client, Xet": {}}


def main() -> None:
    """Print the table."""
    from tests.hub import Server

    seconds: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory(dir=os.environ.get("BENCH_DIR")) as folder:
        root = Path(folder)
        file = write_adapter(root / "large", PAIRS, RANK, WIDTH)
        with Server(root / "served") as server:  # type: ignore[no-untyped-call]  # a tool of the tests
            hub = {"HF_ENDPOINT": server.url, "HF_TOKEN": server.add_user("me")}
            subprocess.run([sys.executable, "-c", "import huggingface_hub as h; h.create_repo('me/hub')"],
                           env=os.environ | hub, check=True)  # fmt: skip
            for number in range(ROUNDS):
                for name, took in [*peer(file, root / "copy"), *ours(root, hub, number), *hubs(root, hub, number)]:
                    seconds.setdefault(name, []).append(took)
            memory = server.memory() / 1e6
        size = file.stat().st_size
    medians = {name: statistics.median(row) for name, row in seconds.items()}
    plain, durable = list(medians.values())[:2]
    print(f"{f'{size / 1e9:.2f} GB':32}{'s':>7}{'of the first':>14}{'of the second':>15}")
    for name, took in medians.items():
        print(f"{name:32}{took:7.2f}{took / plain:14.2f}{took / durable:15.2f}")
    print(f"the server held at most {memory:.0f} MB; all bytes came back")


def peer(file: Path, copy: Path) -> list[tuple[str, float]]:
    """What a person would type, without and with what makes it last."""
    rows = [("cp; sha256sum", ""), ("cp; sync; sha256sum", f"sync {copy};")]
    found = []
    for name, also in rows:
        found.append((name, timed(["sh", "-c", f"cp {file} {copy}; {also} sha256sum {copy}"], {})))
        copy.unlink()
    return found


def ours(root: Path, hub: Mapping[str, str], number: int) -> list[tuple[str, float]]:
    """Our client; the adapter is in its store before."""
    change(root, f"ours {number}")
    name, there = f"r{number}:v1", f"hf://me/ours@r{number}"
    here, elsewhere = ["--store", str(root / "mine")], ["--store", str(root / f"theirs-{number}")]
    timed([*LORAFORGE, *here, "push", str(root / "large"), name], hub)
    push = timed([*LORAFORGE, *here, "push", name, "--to", there], hub)
    pull = timed([*LORAFORGE, *elsewhere, "pull", there, "--as", name], hub)
    timed([*LORAFORGE, *elsewhere, "pull", name, "--to", str(root / "out")], hub)
    check(root)
    shutil.rmtree(root / f"theirs-{number}")
    return [("loraforge push", push), ("loraforge pull", pull)]


def hubs(root: Path, hub: Mapping[str, str], number: int) -> list[tuple[str, float]]:
    """The Hub's client, which has never seen the file."""
    found = []
    for name, extra in HUB.items():
        change(root, f"{name} {number}")
        environment = {**hub, **extra, "HF_HOME": str(root / f"home-{name}-{number}")}
        for what, code, folder in (("push", HUB_PUSH, "large"), ("pull", HUB_PULL, "out")):
            took = timed([sys.executable, "-c", code, str(root / folder)], environment)
            found.append((f"{name}: {what}", took))
        check(root)
    return found


def change(root: Path, text: str) -> None:
    """Make the adapter another, which nobody has."""
    with next((root / "large").glob("*.safetensors")).open("r+b") as file:
        file.seek(-64, os.SEEK_END)
        file.write(hashlib.sha512(text.encode()).digest())


def check(root: Path) -> None:
    """A benchmark of wrong bytes is none."""
    sent, came = (next((root / where).glob("*.safetensors")) for where in ("large", "out"))
    if _digest(sent) != _digest(came):
        raise SystemExit(f"other bytes came back than {sent} has")
    shutil.rmtree(root / "out")


def timed(command: list[str], environment: Mapping[str, str]) -> float:
    """Run a command behind what the disk still had to do, and return its seconds."""
    os.sync()
    begin = time.perf_counter()
    subprocess.run(command, env={**os.environ, **environment}, check=True, capture_output=True)
    return time.perf_counter() - begin


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


if __name__ == "__main__":
    main()
