"""No token gets out: every one that tests use holds a canary, and the end of a run looks for it in all that came out.

That is what pytest captured of any test, its errors included; what commands printed, where a test read it; each answer
of a server; and every file that a test left: logs, stores, what is beside them, caches of clients. Importing this is
what makes tokens hold it.
"""

import os
import secrets
import subprocess
from base64 import b64encode
from pathlib import Path

import pytest

from loraforge_registry.server import accounts

CANARY = "canary" + "Zq7" * 4
FORMS = (
    CANARY.encode(),
    *(b64encode(b"x" * shift + CANARY.encode())[4:20] for shift in range(3)),  # in Basic, wherever it begins
)
_hits = set()


def new_token():
    return accounts.PREFIX + CANARY + secrets.token_urlsafe(24)


accounts.new_token = new_token


def is_in(data):
    data = data.encode("utf-8", "surrogateescape") if isinstance(data, str) else bytes(data or b"")
    return any(form in data for form in FORMS)


def look(place, *outputs):
    """Remember a place that gives a token away."""
    if any(is_in(data) for data in outputs):
        _hits.add(f"{place} (in {os.environ.get('PYTEST_CURRENT_TEST', '?').partition(' ')[0]})")


def places(folder):
    """Every place that gave a token away: what was looked at, and the files below a folder."""
    found = [*sorted(_hits), *files_with_it(folder)]
    return [place.replace(CANARY, "<token>") for place in found]


def files_with_it(folder):
    """The files below a folder that hold a token, or have it in their names."""
    patterns = [part for form in FORMS for part in ("-e", form.decode())]
    ran = subprocess.run(["grep", "-rlFs", *patterns, folder], capture_output=True, text=True, check=False)
    names = (str(path) for path in Path(folder).rglob(f"*{CANARY}*"))
    return sorted({*ran.stdout.splitlines(), *names})


def pytest_runtest_logreport(report):
    look(f"what pytest captured in {report.nodeid}", report.longreprtext, *(text for _, text in report.sections))


@pytest.fixture(scope="session", autouse=True)
def no_token_gets_out(tmp_path_factory):
    communicate = subprocess.Popen.communicate

    def watched(process, *arguments, **named):
        outputs = communicate(process, *arguments, **named)
        if process.args[0] != "grep":
            look(f"the output of {process.args}", *outputs)
        return outputs

    subprocess.Popen.communicate = watched
    yield
    subprocess.Popen.communicate = communicate
    found = "\n".join(places(tmp_path_factory.getbasetemp()))
    assert not found, f"a token got out:\n{found}"
