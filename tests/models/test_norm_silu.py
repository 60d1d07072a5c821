"""Batch norm and SiLU as one operation, against PyTorch's two in float64."""

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from pneumo.installed import layers_library
from pneumo.models import norm_silu
from pneumo.models.norm_silu import NormSilu, suits

EPS = 1e-3
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6}


@dataclass
class Whole:
    """A layer on one rank, whose batch has these parts; it keeps what it was told."""

    lengths: list[int]
    eps: float = EPS
    seen: list[torch.Tensor] = field(default_factory=list)

    def together(self) -> list[int]:
        """The images of each part."""
        return self.lengths

    def take(
        self, mean: torch.Tensor, variance: torch.Tensor, values: list[float]
    ) -> tuple[torch.Tensor, torch.Tensor, list[float]]:
        """What this rank has is what there is."""
        self.seen = [mean, variance, torch.tensor(values)]
        return mean, variance, values

    def sum_over_ranks(self, sums: torch.Tensor) -> torch.Tensor:
        """What this rank has is what there is."""
        return sums


def images(shape: tuple[int, ...], seed: int, dtype: torch.dtype) -> torch.Tensor:
    """Numbers of a normal distribution about 0.5, channels innermost."""
    found = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 0.5
    return found.to(dtype).contiguous(memory_format=torch.channels_last)


def ours(layer: Whole, x: torch.Tensor, dz: torch.Tensor, *affine: torch.Tensor) -> list[torch.Tensor]:
    """Output, and gradients of input, weight and bias."""
    inputs = [tensor.detach().clone().requires_grad_() for tensor in (x, *affine)]
    z = NormSilu.apply(*inputs, layer)
    z.backward(dz)
    return [z.detach(), *(tensor.grad for tensor in inputs if tensor.grad is not None)]


def theirs(lengths: list[int], x: torch.Tensor, dz: torch.Tensor, *affine: torch.Tensor) -> list[torch.Tensor]:
    """The same by PyTorch in float64, part by part."""
    inputs = [tensor.detach().double().requires_grad_() for tensor in (x, *affine)]
    parts = [
        functional.silu(functional.batch_norm(part, None, None, *inputs[1:], True, 0.0, EPS))
        for part in inputs[0].split(lengths)
    ]
    z = torch.cat(parts)
    z.backward(dz.double())
    return [z.detach(), *(tensor.grad for tensor in inputs if tensor.grad is not None)]


def worst(found: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    """The largest difference, as a fraction of the largest value of its tensor (or of 1)."""
    pairs = zip(found, expected, strict=True)
    return max(float((one.double() - other).abs().max() / other.abs().max().clamp(min=1)) for one, other in pairs)


@pytest.fixture(autouse=True)
def as_many_threads_as_before() -> Iterator[None]:
    """The number of threads is the process's."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@settings(deadline=None, max_examples=80)
@given(
    lengths=st.lists(st.integers(1, 4), min_size=1, max_size=3),
    channels=st.one_of(st.integers(1, 9), st.sampled_from([16, 33, 64, 80, 300])),
    height=st.integers(1, 6),
    width=st.sampled_from([2, 3, 7, 40]),
    dtype=st.sampled_from(list(TOLERANCE)),
    threads=st.integers(1, 3),
    seed=st.integers(0, 99),
)
def test_outputs_statistics_and_gradients_are_pytorchs(
    lengths: list[int], channels: int, height: int, width: int, dtype: torch.dtype, threads: int, seed: int
) -> None:
    torch.set_num_threads(threads)
    shape = sum(lengths), channels, height, width
    x, dz = images(shape, seed, dtype), images(shape, seed + 1, dtype)
    weight, bias = images((2, channels, 1, 1), seed + 2, dtype).view(2, -1)
    assert suits(x, weight, bias)
    layer = Whole(lengths)
    found = ours(layer, x, dz, weight, bias)
    values = max(lengths) * height * width
    slope = max(float((part.var((0, 2, 3), correction=0) + EPS).rsqrt().max()) for part in x.double().split(lengths))
    magnitude = (1 + slope) ** 2 * max(1, values**0.5)  # of the terms that add up to the gradients
    assert worst(found, theirs(lengths, x, dz, weight, bias)) < TOLERANCE[dtype] * magnitude
    mean, variance, counts = layer.seen
    for part, *statistics in zip(x.double().split(lengths), mean, variance, strict=True):
        expected = part.mean((0, 2, 3)), part.var((0, 2, 3), correction=0)
        assert worst(statistics, list(expected)) < 2 * TOLERANCE[dtype]
    assert counts.tolist() == [length * height * width for length in lengths]


@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_a_small_variance_far_from_zero_is_kept(dtype: torch.dtype) -> None:
    x = images((4, 5, 30, 30), 0, dtype) + 1e4
    layer = Whole([4])
    ours(layer, x, x, *torch.ones(2, 5, dtype=dtype))
    assert worst([layer.seen[1][0]], [x.double().var((0, 2, 3), correction=0)]) < 1e-6


def test_the_statistics_of_a_constant_are_exact() -> None:
    layer = Whole([3])
    x = torch.full((3, 5, 20, 20), 0.1).contiguous(memory_format=torch.channels_last)
    ours(layer, x, x, *torch.ones(2, 5))
    assert worst([layer.seen[0][0]], [torch.full((5,), float(x[0, 0, 0, 0]), dtype=torch.float64)]) < 1e-8
    assert float(layer.seen[1].abs().max()) < 1e-15


@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_large_values_saturate(dtype: torch.dtype) -> None:
    """Far beyond where e^y overflows: a value or a gradient that is off would be NaN or infinite."""
    x, dz = images((2, 3, 5, 5), 0, dtype), images((2, 3, 5, 5), 1, dtype)
    affine = torch.full((2, 3), 3e4, dtype=dtype)
    found, expected = ours(Whole([2]), x, dz, *affine), theirs([2], x, dz, *affine)
    assert all(torch.isfinite(tensor).all() for tensor in found)
    assert worst(found, expected) < 100 * TOLERANCE[dtype]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_no_number_stays_none(value: float) -> None:
    """In its own channel and nowhere else."""
    x = images((2, 3, 5, 5), 0, torch.float32)
    x[1, 2, 3, 4] = value
    z, dx, dweight, _ = ours(Whole([2]), x, images((2, 3, 5, 5), 1, torch.float32), *torch.ones(2, 3))
    for tensor in (z[:, 2], dx[:, 2], dweight[2]):
        assert tensor.isnan().all()
    for tensor in (z[:, :2], dx[:, :2], dweight[:2]):
        assert tensor.isfinite().all()


def test_the_same_part_has_the_same_bits_wherever_it_is() -> None:
    """In a batch of several parts or alone: on whatever rank it is, the answer is the same."""
    x, dz = images((7, 24, 9, 9), 0, torch.float32), images((7, 24, 9, 9), 1, torch.float32)
    affine = images((2, 24, 1, 1), 2, torch.float32).view(2, -1)
    together = ours(Whole([2, 3, 2]), x, dz, *affine)[:2]
    apart = [
        ours(Whole([len(a)]), a, b, *affine)[:2]
        for a, b in zip(*(whole.split([2, 3, 2]) for whole in (x, dz)), strict=True)
    ]
    for one, parts in zip(together, zip(*apart, strict=True), strict=True):
        assert torch.equal(one, torch.cat(parts))


@pytest.mark.parametrize(
    "other",
    [
        images((2, 3, 4, 4), 0, torch.float32).contiguous(),
        images((2, 3, 4, 4), 0, torch.float16),
        torch.empty(2, 3, 4, 4, device="meta").contiguous(memory_format=torch.channels_last),
    ],
    ids=["channels outermost", "half", "another device"],
)
def test_other_images_do_not_suit(other: torch.Tensor) -> None:
    assert not suits(other, *torch.ones(2, 3, dtype=other.dtype, device=other.device))


@pytest.mark.parametrize("other", [torch.ones(3, dtype=torch.float64), torch.ones(1).expand(3), torch.ones(6)[::2]])
def test_other_parameters_do_not_suit(other: torch.Tensor) -> None:
    x, one = images((2, 3, 4, 4), 0, torch.float32), torch.ones(3)
    assert suits(x, one, one)
    assert not suits(x, other, one)
    assert not suits(x, one, other)


@pytest.fixture
def no_memory() -> Iterator[None]:
    """The library is looked for anew, before and after."""
    norm_silu._library.cache_clear()
    yield
    norm_silu._library.cache_clear()


@pytest.mark.usefixtures("no_memory")
def test_without_the_kernels_nothing_suits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(norm_silu, "layers_library", lambda: None)
    assert not suits(images((2, 3, 4, 4), 0, torch.float32), *torch.ones(2, 3))


@pytest.mark.usefixtures("no_memory")
def test_a_library_that_does_not_load_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Else one host of several would be slower, and nobody would know why."""
    broken = tmp_path / "libpneumo_layers.so"
    broken.write_text("no library")
    monkeypatch.setattr(norm_silu, "layers_library", lambda: broken)
    with pytest.warns(RuntimeWarning, match="goes on without its kernels: .*libpneumo_layers.so"):
        assert not suits(images((2, 3, 4, 4), 0, torch.float32), *torch.ones(2, 3))


def test_the_library_brings_what_it_needs() -> None:
    """In a process without torch: the threads are those of the torch that it was built with."""
    code = "import ctypes, sys; ctypes.CDLL(sys.argv[1]); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code, str(layers_library())], check=True, timeout=100)


def test_second_derivatives_are_refused() -> None:
    """The kernels know none: they would be wrong without a word."""
    x = images((2, 3, 4, 4), 0, torch.float64).requires_grad_()
    z = NormSilu.apply(x, *torch.ones(2, 3, dtype=torch.float64), Whole([2]))
    (dx,) = torch.autograd.grad(z.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


def compared(level: str) -> subprocess.CompletedProcess[str]:
    """`main` with these instructions, in a process of its own: the level is settled at the first use."""
    command, env = [sys.executable, __file__], {**os.environ, "PNEUMO_SIMD": level}
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=100, check=False)


@pytest.mark.parametrize("level", ["scalar", "avx2", "avx512"])
def test_every_level_of_instructions_gives_the_same(level: str) -> None:
    """But for rounding."""
    found = compared(level)
    if "PneumoError" in found.stderr and "is none of this machine's" in found.stderr:
        pytest.skip(f"this machine has no {level}")
    assert found.returncode == 0, found.stderr


def test_instructions_that_are_none_are_refused() -> None:
    found = compared("fast")
    assert found.stderr.endswith("PneumoError: PNEUMO_SIMD=fast is none of this machine's instructions.\n")


def main() -> None:
    """Compare both types with PyTorch's."""
    for dtype, tolerance in TOLERANCE.items():
        x, dz = images((3, 48, 11, 11), 0, dtype), images((3, 48, 11, 11), 1, dtype)
        affine = images((2, 48, 1, 1), 2, dtype).view(2, -1)
        assert worst(ours(Whole([1, 2]), x, dz, *affine), theirs([1, 2], x, dz, *affine)) < 20 * tolerance


if __name__ == "__main__":
    main()
