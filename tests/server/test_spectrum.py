"""Spectra on pages: what is drawn is what the algebra says; nobody waits, and what is hostile is a sentence."""

import json
import math
import re
import time
import urllib.request

import pytest

import loraforge as lf
from loraforge.adapter import Adapter, LowRank
from loraforge.compose import spectra
from loraforge_cli import spectra as child
from loraforge_registry.config import Settings
from loraforge_registry.digest import Digest
from loraforge_registry.errors import InputOutputError, LoraforgeError
from loraforge_registry.server import kinds, spectrum_figure
from loraforge_registry.server.kinds import Kinds
from loraforge_registry.server.spectra import MAX_WAITING, Spectra
from loraforge_registry.spectrum import Spectrum
from loraforge_registry.store import Store
from tests.bad_files import config, floats, pair, tensors, write_adapter
from tests.hub import Server
from tests.server import raw
from tests.server.test_pages import EVIL, see

KEY = "base_model.model.model.layers.0.q"
UNDER_WAY = "being worked out"


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with Server(tmp_path_factory.mktemp("spectra") / "store") as server:
        yield server


def get(server, path):
    with urllib.request.urlopen(server.url + path, timeout=30) as answer:  # noqa: S310 - our own server
        return answer.read().decode()


def get_known(server, path):
    """The page as it is when nothing is under way any more."""
    while UNDER_WAY in (html := get(server, path)):
        time.sleep(0.05)
    return html


def random_adapter(layers=3, rank=6, names=("self_attn.q_proj", "mlp.up_proj")):
    import torch

    generator = torch.Generator().manual_seed(7)
    targets = {
        f"model.layers.{layer}.{name}": LowRank(
            "linear",
            torch.randn(rank, 12, generator=generator),
            torch.randn(10, rank, generator=generator),
            alpha=float(rank) * (layer + 1),
        )
        for layer in range(layers)
        for name in names
    }
    return Adapter(targets, Settings(base_name="acme/base"))


def test_a_page_says_what_the_algebra_does_and_keeps_it(server):
    registry = lf.Registry(server.store)
    adapter = random_adapter()
    registry.push(adapter, "three:v1")
    assert UNDER_WAY in get(server, "/three"), "nobody waits"
    html = get_known(server, "/three")
    assert html.count("<figure") == 2
    found = spectra(registry.load("three:v1"))
    for name in ("q_proj", "up_proj"):
        of_kind = [s for target, s in found.items() if target.endswith(name)]
        row = re.search(rf">{name}</span>(.*?)<(?:tr|/tbody)>", html)[1]
        shown = [tuple(map(float, cell.split("&ndash;"))) for cell in re.findall(r"<td class=n>([^<]*)", row)]
        numbers = ("norm", "largest", "stable_rank", "effective_rank")
        for (low, high), number in zip(shown, numbers, strict=False):
            values = [getattr(s, number) for s in of_kind]
            assert (low, high) == pytest.approx((min(values), max(values)), rel=5e-3)
    server.stop()
    server.start()
    assert get(server, "/three").count("<figure") == 2, "it is in the index"
    (server.store / "index.sqlite").unlink()
    assert UNDER_WAY in get(server, "/three")
    assert get_known(server, "/three").count("<figure") == 2


@pytest.mark.parametrize(
    ("weights", "said"),
    [
        (tensors() | {f"{KEY}.lora_A.weight": ("F32", (2, 6), floats(*[math.nan] * 12))}, "nan"),
        (tensors(0.0), "dW is zero"),
    ],
    ids=["nan", "zero"],
)  # fmt: skip
def test_numbers_that_are_none_are_a_sentence(server, run, tmp_path, request, weights, said):
    name = f"odd-{request.node.callspec.id}"
    run("--store", server.store, "push", write_adapter(tmp_path / "odd", weights=weights), f"{name}:v1")
    html = get_known(server, f"/{name}")
    assert said in see(html).text
    assert "<figure" not in html
    assert "Traceback" not in server.log.read_text()


def test_a_thousand_targets_and_names_with_markup_stay_a_small_page_of_text(server, run, tmp_path):
    evil = {f"a{i}.<img src=x onerror=alert(1)>'{i}{'long' * 40}" for i in range(1000)}
    weights = {key: row for name in evil for key, row in pair(name).items()}
    source = write_adapter(tmp_path / "evil", weights=weights, settings=config(target_modules=sorted(evil)))
    assert run("--store", server.store, "push", source, "evil:v1").code == 0
    html = get_known(server, "/evil")
    seen = see(html)
    assert html.count("<figure") == spectrum_figure.MAX_PANELS
    assert "kinds more" in seen.text
    assert len(html) < 400_000
    assert "img" not in seen.tags
    assert not seen.handlers
    for label in re.findall(r"<figcaption><b [^>]*>([^<]*)", html):
        assert len(label) < 200


def test_what_would_take_too_long_is_not_begun(server, tmp_path):
    wide = {f"m.{i}.q": LowRank("linear", *_zeros(rank=1500), alpha=1.0) for i in range(150)}
    registry = lf.Registry(server.store)
    registry.push(Adapter(wide), "wide:v1")
    assert "too large to be worked out here" in get(server, "/wide")


def _zeros(rank):
    import torch

    return torch.zeros(rank, 2, dtype=torch.float16), torch.zeros(2, rank, dtype=torch.float16)


def test_a_spectrum_is_kept_whole_and_drawn_within_its_panel():
    many = {f"m.{i}.q": Spectrum(tuple(10.0**-j for j in range(200))) for i in range(3)}
    many |= {"m.0.k": Spectrum((5e-324,)), "m.0.big": Spectrum((1e300, 0.0)), "m.0.none": Spectrum((0.0, 0.0))}
    found = kinds.summarise(many)
    assert kinds.unpack(kinds.pack(found)) == found
    assert max(len(kind.at) for kind in found.kinds) <= kinds.MAX_POINTS
    html = spectrum_figure.figure(found)
    places = [
        tuple(map(float, place.split())) for d in re.findall(r" d='M([^'VHZ]*)Z?'", html) for place in d.split("L")
    ]
    assert places
    assert all(0 <= x <= spectrum_figure.WIDTH and 0 <= y <= spectrum_figure.HIGH for x, y in places)
    assert "nan" not in html
    assert spectrum_figure.figure(Kinds(()))


class Slow:
    """Answers when it is told to; says how many at once."""

    def __init__(self, gate):
        self.gate, self.at_once, self.most, self.asked = gate, 0, 0, 0

    def __call__(self, _):
        self.asked += 1
        self.at_once += 1
        self.most = max(self.most, self.at_once)
        self.gate.wait()
        self.at_once -= 1
        if self.asked == 2:
            raise ZeroDivisionError
        return {"m.0.q": Spectrum((2.0, 1.0))}

    def stop(self):
        self.gate.set()


def test_one_at_a_time_no_more_than_may_wait_and_a_failure_stops_nothing(tmp_path, run):
    import threading

    run("--store", tmp_path / "s", "push", write_adapter(tmp_path / "a"), "a:v1")
    store = Store(tmp_path / "s")
    manifest = store.manifest(store.resolve("a:v1"))
    layout = store.layout(manifest)
    from dataclasses import replace

    slow = Slow(threading.Event())
    asked = Spectra(store.path, slow)
    copies = [replace(manifest, content_id=Digest.of(bytes([i]))) for i in range(MAX_WAITING + 20)]
    for _ in range(2):
        assert all(asked.ask(Digest.of(b"x"), copy, layout) is None for copy in copies)
    slow.gate.set()
    answers = []
    while not all(answers := [asked.ask(Digest.of(b"x"), copy, layout) for copy in copies]):
        time.sleep(0.01)
    assert slow.most == 1
    assert slow.asked == len(copies)
    assert answers.count("it could not be worked out") == 1
    assert all(isinstance(answer, Kinds | str) for answer in answers)


def test_a_child_is_ended_when_it_takes_too_long_or_the_server_ends(tmp_path, run, monkeypatch):
    run("--store", tmp_path / "s", "push", write_adapter(tmp_path / "a"), "a:v1")
    digest = Store(tmp_path / "s").resolve("a:v1")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    found = child.ChildSpectra(tmp_path / "s")
    assert found(digest) == spectra(lf.load("a:v1", registry=lf.Registry(tmp_path / "s")))
    monkeypatch.setattr(child, "SECONDS", 0.001)
    with pytest.raises(InputOutputError, match="took too long"):
        found(digest)
    with pytest.raises(LoraforgeError, match="could not be worked out"):
        child.ChildSpectra(tmp_path / "none")(digest)
    found.stop()
    with pytest.raises(InputOutputError, match="the server ends"):
        found(digest)


def test_what_the_child_says_is_checked():
    for said in (b"", b"[", b'{"targets": {"a": {"spectrum": {"values": [1e999]}}}}'):
        with pytest.raises(LoraforgeError):
            child._spectra(said)
    assert child._spectra(json.dumps({"targets": {"a": {"spectrum": None}}}).encode()) == {}


def test_markup_in_a_sentence_stays_text():
    assert "<img" not in spectrum_figure.section(EVIL)


def test_a_server_that_is_told_so_works_out_none(tmp_path, run):
    run("--store", tmp_path / "s", "push", write_adapter(tmp_path / "a"), "a:v1")
    with Server(tmp_path / "s", "--no-spectra") as server:
        page = raw.request(server, "GET", "/a").body.decode()
    assert "<h2>Targets" in page
    assert "Spectrum" not in page
