"""Pulls over TLS: a certificate that is not right is none, and nobody is led from TLS to plain text."""

import ssl
import subprocess
from shutil import which

import pytest

from loraforge_registry.remotes import http
from tests.hostile_hub import TOKEN, running_hub

pytestmark = pytest.mark.skipif(which("openssl") is None, reason="certificates are made by the openssl command")


def certificate(folder, *, names="DNS:localhost,IP:127.0.0.1", days=1):
    """Make one that signs itself; return its file and its key's."""

    def openssl(*arguments):
        subprocess.run(["openssl", *arguments], cwd=folder, check=True, capture_output=True)

    (folder / "names").write_text(f"subjectAltName={names}")
    curve = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1")
    openssl("req", *curve, "-nodes", "-keyout", "key", "-out", "request", "-subj", "/CN=hub")
    openssl(
        "x509", "-req", "-in", "request", "-signkey", "key", "-out", "cert", "-days", str(days), "-extfile", "names"
    )
    return folder / "cert", folder / "key"


@pytest.fixture
def serve(tmp_path, monkeypatch):
    """Serve over TLS with a certificate, which is trusted or not."""
    monkeypatch.setattr(http, "PAUSES", (0.0,) * 3)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    opened = []

    def start(*, trusted=True, **named):
        cert, key = certificate(tmp_path, **named)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(cert, key)
        if trusted:
            monkeypatch.setenv("SSL_CERT_FILE", str(cert))
        hub = running_hub(context)
        opened.append(hub)
        found = hub.__enter__()
        found.add("me/french", {})
        monkeypatch.setenv("HF_ENDPOINT", found.url)
        return found

    http._opener.cache_clear()
    yield start
    for hub in opened:
        hub.__exit__(None, None, None)
    http._opener.cache_clear()


CERTIFICATES = {
    "self-signed": ({"trusted": False}, "self-signed"),
    "of another host": ({"names": "DNS:other.example"}, "not valid for '127.0.0.1'"),
    "expired": ({"days": -1}, "expired"),
}


@pytest.mark.parametrize("case", CERTIFICATES)
def test_a_certificate_that_is_not_right(case, serve, run):
    made, said = CERTIFICATES[case]
    hub = serve(**made)
    ran = run("pull", "hf://me/french", "--as", "x:v1")
    assert (ran.code, said in ran.err, ran.err.count("\n")) == (5, True, 1), ran.err
    assert (hub.requests, hub.tokens) == ([], []), "not even asked, and no token"


def test_no_tls_at_all(run, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    with running_hub() as plain:
        monkeypatch.setenv("HF_ENDPOINT", plain.url.replace("http:", "https:"))
        ran = run("pull", "hf://me/french", "--as", "x:v1")
        assert (ran.code, "does not speak TLS" in ran.err, ran.err.count("\n")) == (5, True, 1), ran.err


def test_a_right_one_and_then_no_way_to_plain_text(serve, run):
    hub = serve()
    with running_hub() as plain:
        assert run("search", "french", "--on", "hf://").code == 0
        assert hub.tokens[-1][1] == f"Bearer {TOKEN}"
        hub.spoil("/api/models", lambda handler: handler.reply(302, headers={"Location": f"{plain.url}/x"}))
        ran = run("search", "french", "--on", "hf://")
        assert (ran.code, "'http', which is not followed" in ran.err) == (5, True), ran.err
        assert plain.requests == []
