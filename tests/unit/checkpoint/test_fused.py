"""The compiled pass gives the bits of the definition: against rationals, and at length against the loop."""

import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from loraforge.checkpoint import fused
from loraforge.checkpoint.exact import Columns, Left, Product, column_norm, corrected, rounded_sum
from loraforge.checkpoint.floats import bits_of, round_once
from loraforge.checkpoint.workspace import Workspace
from tests.rationals import rounded_once

BF16 = torch.bfloat16


@pytest.fixture(autouse=True)
def numba():
    assert fused.AVAILABLE, "the development environment has numba"


def product_of(b, a):
    b, a = b.double(), a.double()
    return Product(Left.of(b), Columns(a), column_norm(b.T))


def slowly(monkeypatch, p, product, *, back):
    with monkeypatch.context() as patch:
        patch.setattr(fused, "AVAILABLE", False)
        return rounded_sum(p, product, BF16, Workspace(), back=back)


def bases(rows, n, generator):
    """Weights as they are, and weights that are hard to round to or to come back to."""
    normal = torch.randn(rows, n, generator=generator)
    exponents = torch.randint(-130, 127, (rows, n), generator=generator)
    twos = torch.exp2(torch.randint(-8, 3, (rows, n), generator=generator).float()) * normal.sign()
    bits = torch.randint(-(2**15), 2**15, (rows, n), generator=generator).to(torch.int16)
    any_bits = bits.view(BF16).float()
    return {
        "normal": normal * 0.02,
        "pruned": normal * (normal.abs() > 1),
        "powers of two": twos,
        "all exponents": torch.ldexp(normal, exponents).clamp(-3e38, 3e38),
        "subnormal": normal * 2.0**-130,
        "minus zero": -torch.zeros(rows, n),
        "any bits": torch.where(any_bits.isfinite(), any_bits, torch.zeros(())),
    }


@pytest.mark.parametrize("kind", bases(1, 4, torch.Generator()))
@pytest.mark.parametrize("size", [1e-42, 1e-30, 1e-4, 1.0, 1e30])
@pytest.mark.parametrize("rank", [1, 16])
def test_equal_to_the_loop_and_the_way_back_ends_at_the_base(kind, size, rank, monkeypatch):
    generator = torch.Generator().manual_seed(rank)
    p = bases(96, 2048, generator)[kind].to(BF16)
    b = torch.randn(96, rank, generator=generator) * min(size, 1.0)
    b[::7] = 0  # nothing is added to these rows
    a = torch.randn(rank, 2048, generator=generator) * max(size, 1.0) * 0.02
    product = product_of(b, a)
    ours, theirs = rounded_sum(p, product, BF16, Workspace(), back=True), slowly(monkeypatch, p, product, back=True)
    assert (bits_of(ours.values) == bits_of(theirs.values)).all()
    assert ours.finite == (float(torch.linalg.vector_norm(ours.values.double(), math.inf)) < 3e38)
    for mine, other in zip(ours.back, theirs.back, strict=True):
        assert (mine == other).all()
    guess = rounded_sum(ours.values.clone(), product.negated(), BF16, Workspace()).values
    assert (bits_of(corrected(guess, ours.back)) == bits_of(p)).all()


@pytest.mark.parametrize("rows", [1, 3, 4, 9])
@pytest.mark.parametrize("n", [1, 5, 60, 64, 65, 132, 1364, 4096, 4167, 8200])
def test_every_shape_of_rows_columns_and_tiles(rows, n, monkeypatch):
    generator = torch.Generator().manual_seed(n + rows)
    p = bases(rows, n, generator)["normal"].to(BF16)
    # norms that differ from row to row and column to column: an error's bound taken from another one would show
    b = torch.randn(rows, 5, generator=generator) * torch.logspace(-6, -1, rows)[:, None]
    a = torch.randn(5, n, generator=generator) * torch.logspace(-4, 0, n)
    product = product_of(b, a)
    ours, theirs = rounded_sum(p, product, BF16, Workspace(), back=True), slowly(monkeypatch, p, product, back=True)
    assert (bits_of(ours.values) == bits_of(theirs.values)).all()
    assert all((mine == other).all() for mine, other in zip(ours.back, theirs.back, strict=True))
    plain = rounded_sum(p, product, BF16, Workspace())
    assert (bits_of(plain.values) == bits_of(theirs.values)).all()
    assert plain.finite
    assert ours.finite


@pytest.mark.parametrize("scale", [1.0, 2.0**-126, 2.0**100])
def test_ties_and_what_float64_cannot_see_beside_them(scale):
    generator = torch.Generator().manual_seed(3)
    p = (128 + torch.randint(0, 100, (8, 12), generator=generator)).double()
    b = torch.randint(-2, 3, (8, 3), generator=generator).double()
    a = torch.randint(-2, 3, (3, 12), generator=generator).double() / 2
    for tail in (0.0, 2.0**-60, -(2.0**-60)):
        b_long = torch.cat((b, torch.full((8, 1), tail, dtype=torch.float64)), dim=1)
        a_long = torch.cat((a * scale, torch.full((1, 12), scale, dtype=torch.float64)))
        for base in ((p * scale).to(BF16), (-p * scale).to(BF16)):
            found = rounded_sum(base, product_of(b_long, a_long), BF16, Workspace(), back=True)
            assert (bits_of(found.values) == bits_of(rounded_once(base.double(), b_long, a_long, BF16))).all()


def test_infinity_and_nan_are_seen():
    for bad in (float("inf"), float("-inf"), float("nan")):
        p = torch.ones(4, 8, dtype=BF16)
        p[2, 3] = bad
        found = rounded_sum(p, product_of(torch.ones(4, 1), torch.ones(1, 8)), BF16, Workspace(), back=True)
        assert torch.isnan(found.values[2, 3]) if bad != bad else found.values[2, 3] == bad  # noqa: PLR0124 - a NaN
        assert not found.finite
        assert torch.isfinite(found.values).sum() == 31


def test_what_overflows_becomes_infinity_and_what_does_not_stays(monkeypatch):
    most = torch.finfo(BF16).max
    p = torch.full((1, 4), most, dtype=BF16)
    half = 2.0**119  # half an ulp of it: beyond that it rounds to infinity
    for step, wanted in ((half * 0.999, most), (half * 1.001, float("inf")), (-half * 4, most - 4 * half)):
        product = product_of(torch.tensor([[step / 2**30]]), torch.full((1, 4), 2.0**30))
        found = rounded_sum(p, product, BF16, Workspace())
        assert found.values.tolist() == [[wanted] * 4]
        assert (bits_of(found.values) == bits_of(slowly(monkeypatch, p, product, back=False).values)).all()


@pytest.mark.parametrize("compiled", [True, False])
def test_factors_beyond_float32_whose_product_is_not(compiled, monkeypatch):
    monkeypatch.setattr(fused, "AVAILABLE", compiled)
    generator = torch.Generator().manual_seed(0)
    p = torch.randn(8, 16, generator=generator).to(BF16)
    b, a = torch.randn(8, 3, generator=generator).double() * 1e200, torch.randn(3, 16, generator=generator) * 1e-38
    a = a.double() * 1e-164
    found = rounded_sum(p, product_of(b, a), BF16, Workspace(), back=True)
    assert (bits_of(found.values) == bits_of(rounded_once(p.double(), b, a, BF16))).all()


def test_rounding_of_single_numbers():
    generator = np.random.default_rng(0)
    bits = generator.integers(0, 2**64, 200_000, dtype=np.uint64)
    numbers = np.concatenate((bits.view(np.float64), generator.standard_normal(100_000), [0.0, -0.0, 1e-45, -1e-300]))
    ties = np.ldexp(128 + generator.integers(0, 128, 50_000) + 0.5, generator.integers(-140, 120, 50_000))
    numbers = np.concatenate((numbers, ties, np.nextafter(ties, 0), np.nextafter(ties, np.inf), -ties))
    numbers = numbers[~np.isnan(numbers)]
    ours = np.array([fused._nearest_once(x) for x in numbers], np.uint16)
    assert (ours == bits_of(round_once(numbers, BF16)).view(np.uint16)).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_other_types_take_the_loop(dtype, monkeypatch):
    p, b, a = torch.ones(3, 5, dtype=dtype), torch.ones(3, 1), torch.full((1, 5), 2.0**-30)
    monkeypatch.setattr(fused, "one_pass", lambda *_, **__: pytest.fail("it is for bfloat16"))
    assert rounded_sum(p, product_of(b, a), dtype, Workspace()).values.tolist() == [[1.0] * 5] * 3


NARROW = """
import sys
import pytest
from llvmlite import binding
features = binding.get_host_cpu_features()
features.update(avx512f=False, avx=False, fma=False)
binding.get_host_cpu_features = lambda: features
from loraforge.checkpoint import panels
assert (panels.LANES, panels.SPAN) == (4, 8)
sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", *sys.argv[1:]]))
"""


def test_a_processor_with_narrow_registers(tmp_path):
    shapes = f"{__file__}::test_every_shape_of_rows_columns_and_tiles"
    chosen = [f"{shapes}[{n}-{rows}]" for n in (5, 132, 4167, 8200) for rows in (3, 9)]
    ran = subprocess.run(
        [sys.executable, "-c", NARROW, f"--basetemp={tmp_path}/inner", *chosen],
        env=os.environ | {"NUMBA_CACHE_DIR": f"{tmp_path}/cache"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "8 passed" in ran.stdout
