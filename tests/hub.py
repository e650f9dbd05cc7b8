"""A server of ours in a process of its own, for tests, benchmarks and matrices."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

from loraforge_registry.server.run import accounts_of
from tests import canary  # whose tokens every user of a server here gets

ROOT = Path(__file__).parents[1]


class Server:
    """``loraforge serve`` over a store; its output is kept in ``log``."""

    def __init__(self, store, *options, port=0):
        self.store = Path(store)
        self.log = self.store.with_name(f"{self.store.name}.log")
        self.options = options
        self.port = port
        self.program = ["-m", "loraforge_cli"]
        self.process = None

    def __enter__(self):
        self.start()
        return self

    def __exit__(self, *_):
        self.stop()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.port}"

    def add_user(self, name, *scopes):
        token = accounts_of(self.store).add(name, scopes)
        assert canary.is_in(token)
        return token

    def start(self):
        begin = self.log.stat().st_size if self.log.exists() else 0
        paths = os.pathsep.join(map(str, (ROOT, ROOT / "registry", ROOT / "cli")))
        command = [sys.executable, *self.program, "--store", self.store, "serve", "--port", self.port]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [*map(str, command), *self.options],
                stdout=log,
                stderr=log,
                env={**os.environ, "PYTHONPATH": paths, "PYTHONWARNINGS": "default"},
            )
        while True:
            said = self.log.read_bytes()[begin:]
            found = re.search(rb"http://[^ ]*:(\d+)", said)
            if found:
                self.port = int(found[1])
                return
            if self.process.poll() is not None:
                raise RuntimeError(said.decode())
            time.sleep(0.02)

    def kill(self):
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def stop(self):
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(30)
            except subprocess.TimeoutExpired:
                self.kill()
                raise

    def memory(self):
        """The most memory the process has held, in bytes."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) * 1024
