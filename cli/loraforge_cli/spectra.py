"""Spectra for a server that must not import torch: ``loraforge show --spectrum`` as a process of its own."""

import json
import math
import os
import subprocess
import sys
import threading
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import NoReturn, cast

from loraforge.errors import NumericalError
from loraforge_registry.digest import Digest
from loraforge_registry.errors import InputOutputError, LoraforgeError
from loraforge_registry.spectrum import Spectrum

SECONDS = 300.0
NICE = 19
MAX_BYTES = 64 * 1024 * 1024
_ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}  # the others are for who asks the server


class ChildSpectra:
    """One child at a time, the last in line for the processor, ended when it takes too long or the server ends."""

    def __init__(self, store: Path) -> None:
        self._store = store
        self._lock = threading.Lock()
        self._child: subprocess.Popen[bytes] | None = None
        self._stopped = False

    def __call__(self, digest: Digest) -> Mapping[str, Spectrum]:
        """Return the spectrum of each target of an adapter in the store.

        Raises:
            LoraforgeError: it has none, took too long, or was stopped.
        """
        child = self._start(digest)
        timer = threading.Timer(SECONDS, child.kill)
        with child:
            timer.start()
            try:
                said = child.stdout.read(MAX_BYTES) if child.stdout else b""
            finally:
                timer.cancel()
                child.kill()  # has ended, or says more than it may
        return _spectra(said)

    def stop(self) -> None:
        """End the child, if there is one; there is none after it."""
        with self._lock:
            self._stopped = True
            if self._child is not None:
                self._child.kill()

    def _start(self, digest: Digest) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "loraforge_cli", "--store", str(self._store), "--json", "show", str(digest)]
        with self._lock:
            if self._stopped:
                raise InputOutputError("the server ends")
            self._child = child = subprocess.Popen(  # noqa: S603 - this very program; a digest is hex digits
                [*command, "--spectrum"],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env={**os.environ, **_ONE_THREAD},
                start_new_session=True,  # Ctrl-C in the terminal is for the server, which ends it
            )
        with suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, child.pid, NICE)
        return child


def _spectra(said: bytes) -> Mapping[str, Spectrum]:
    try:
        found = json.loads(said, parse_constant=float)
    except (ValueError, RecursionError) as error:
        raise InputOutputError("it could not be worked out: that took too long, or too much memory") from error
    if "error" in found:
        _refuse(found["error"])
    rows = {name: row["spectrum"]["values"] for name, row in found["targets"].items() if row["spectrum"] is not None}
    spectra = {
        name: Spectrum(tuple(map(float, values))) for name, values in cast("dict[str, list[float]]", rows).items()
    }
    if not all(math.isfinite(value) for spectrum in spectra.values() for value in spectrum.values):
        raise LoraforgeError("its singular values are beyond the range of float64")
    return spectra


def _refuse(error: Mapping[str, str]) -> NoReturn:
    """Pass on what is about the adapter's numbers; anything else may name places of this machine."""
    if error["kind"] == NumericalError.kind:
        raise LoraforgeError(error["message"])
    raise InputOutputError("it could not be worked out")
