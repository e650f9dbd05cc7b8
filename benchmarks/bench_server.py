"""Push and pull 1 GB over loopback by the Hub's client, against ``cp`` and ``sha256sum`` of the same file."""

import hashlib
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "registry"), str(ROOT / "cli")]

SIZE = 1_000_000_000
PUSH = "import sys; from huggingface_hub import HfApi; a = HfApi(); a.create_repo('me/big', exist_ok=True); \
a.upload_file(path_or_fileobj=sys.argv[1], path_in_repo=sys.argv[2], repo_id='me/big')"
PULL = "import sys; import huggingface_hub as h; h.hf_hub_download('me/big', sys.argv[2], local_dir=sys.argv[1])"


def main() -> None:
    """Time each, and print the ratios."""
    from tests.hub import Server

    with tempfile.TemporaryDirectory(dir=os.environ.get("BENCH_DIR")) as folder:
        big = Path(folder) / "big.dat"
        with big.open("wb") as file:
            for _ in range(SIZE // 10_000_000):
                file.write(os.urandom(10_000_000))
        floor = timed(["sh", "-c", f"cp {big} {folder}/copy && sync {folder}/copy && sha256sum {folder}/copy"], {})
        Path(folder, "copy").unlink()
        print(f"cp, sync and sha256sum {floor:.1f} s")
        with Server(Path(folder) / "store") as server:  # type: ignore[no-untyped-call]  # a tool of the tests
            environment = {"HF_ENDPOINT": server.url, "HF_TOKEN": server.add_user("me")}
            for xet in ("off", "on"):
                extra = {"HF_HUB_DISABLE_XET": "1"} if xet == "off" else {}
                with big.open("r+b") as file:
                    file.write(os.urandom(SIZE // 4))
                home = {"HF_HOME": f"{folder}/home-{xet}"}
                name = f"{xet}.dat"
                push = timed([sys.executable, "-c", PUSH, str(big), name], environment | extra | home)
                pull = timed([sys.executable, "-c", PULL, f"{folder}/out", name], environment | extra | home)
                got = Path(folder, "out", name)
                assert digest(got) == digest(big)  # noqa: S101 - a benchmark of wrong bytes is none
                got.unlink()
                memory = server.memory() / 1e6
                print(
                    f"Xet {xet}: push {push:.1f} s ({push / floor:.2f}), pull {pull:.1f} s ({pull / floor:.2f}), ",
                    end="",
                )
                print(f"server at most {memory:.0f} MB")


def timed(command: list[str], environment: dict[str, str]) -> float:
    """Run a command, and return its seconds."""
    begin = time.perf_counter()
    subprocess.run(command, env={**os.environ, **environment}, check=True, capture_output=True)
    return time.perf_counter() - begin


def digest(path: Path) -> str:
    """The SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


if __name__ == "__main__":
    main()
