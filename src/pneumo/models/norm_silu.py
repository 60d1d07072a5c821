"""Batch norm and the SiLU after it as one operation, by kernels of our own that pass over the values four times.

PyTorch's separate ones take nine passes over memory, and keep what lies between them. That was a quarter of a step of
the detector on one core. For CPU tensors with their channels innermost; see src/native/layers/norm_silu.cpp.
"""

import ctypes
import os
import warnings
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any, Protocol

import torch
from torch.autograd.function import once_differentiable

from pneumo.errors import PneumoError
from pneumo.installed import layers_library

_ADDRESS, _COUNT = ctypes.c_void_p, ctypes.c_int64


class Statistics(Protocol):
    """What a layer makes of the statistics and sums of this rank's images; over how many ranks is its affair."""

    eps: float

    def together(self) -> Sequence[int]:
        """The images of each part of the batch that has statistics of its own, in order."""

    def take(
        self, mean: torch.Tensor, variance: torch.Tensor, values: Sequence[float]
    ) -> tuple[torch.Tensor, torch.Tensor, Sequence[float]]:
        """Move the running statistics, and return those to normalise by, over all ranks that share them: of each part
        mean and biased variance, float64 of shape (parts, C) like the arguments, and the number of values.
        """

    def sum_over_ranks(self, sums: torch.Tensor) -> torch.Tensor:
        """Return `sums` (parts, 2, C), summed over the ranks that share the statistics; may overwrite them."""


def suits(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> bool:
    """Whether the kernels can take these images of shape (b, C, h, w) and parameters."""
    return (
        x.device.type == "cpu"
        and x.dtype in (torch.float32, torch.float64)
        and x.is_contiguous(memory_format=torch.channels_last)
        and all(one.dtype == x.dtype and one.device == x.device and one.is_contiguous() for one in (weight, bias))
        and _library() is not None
    )


class NormSilu(torch.autograd.Function):
    """y sigmoid(y) of y = (x - mean) invstd weight + bias, for parts of a batch with statistics each. With xhat =
    (x - mean) invstd and sums over a part's n values, on all ranks that share its statistics,

        dx = weight invstd (dy - sum(dy) / n - xhat sum(dy xhat) / n),   dweight = sum(dy xhat),   dbias = sum(dy).

    The gradients of weight and bias are this rank's sums, as those of every other layer are.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, layer: Statistics) -> torch.Tensor:
        """Normalise and activate."""
        parts = list(_parts(x, layer.together()))
        mean, variance = x.new_empty(2, len(parts), x.shape[1], dtype=torch.float64)
        for part, *moments in zip(parts, mean, variance, strict=True):
            _call("pneumo_moments", x, part, moments)
        mean, variance, ctx.counts = layer.take(mean, variance, [rows for _, rows in parts])
        invstd = (variance + layer.eps).rsqrt_()
        z = torch.empty_like(x)
        for part, *statistics in zip(parts, mean, invstd, strict=True):
            _call("pneumo_norm_silu", x, part, (*statistics, weight, bias), z)
        ctx.save_for_backward(x, weight, bias, mean, invstd)
        ctx.parts, ctx.layer = parts, layer
        return z

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, bias, mean, invstd = ctx.saved_tensors
        dz = gradients[0].contiguous(memory_format=torch.channels_last)
        dx = torch.empty_like(x)
        sums = mean.new_empty(len(ctx.parts), 2, x.shape[1])
        for part, *statistics, sum_ in zip(ctx.parts, mean, invstd, sums, strict=True):
            _call("pneumo_norm_silu_backward", x, part, (*statistics, weight, bias, sum_), dz, dx)
        dweight, dbias = sums.sum(0).to(x.dtype)
        if not ctx.needs_input_grad[0]:  # the same on all ranks, since the model is
            return None, dweight, dbias, None
        sums = ctx.layer.sum_over_ranks(sums)
        for part, *statistics, sum_, count in zip(ctx.parts, mean, invstd, sums, ctx.counts, strict=True):
            _call("pneumo_norm_input_gradients", x, part, (*statistics, weight, sum_, count), dx)
        return dx, dweight, dbias, None


def _parts(x: torch.Tensor, lengths: Sequence[int]) -> Iterator[tuple[int, int]]:
    """The first row and the number of rows of each part, a row being the channels of a pixel."""
    pixels, first = x.shape[2] * x.shape[3], 0
    for length in lengths:
        yield first * pixels, length * pixels
        first += length


def _call(
    name: str, x: torch.Tensor, part: tuple[int, int], others: Sequence[torch.Tensor | float], *values: torch.Tensor
) -> None:
    """Call a kernel with a part of the values of x, and of `values` like it, and with `others`, which are whole."""
    first, rows = part
    at = first * x.shape[1] * x.element_size()
    addresses = [whole.data_ptr() + at for whole in (x, *values)]
    rest = [one.data_ptr() if isinstance(one, torch.Tensor) else one for one in others]
    getattr(_library(), name)(x.dtype == torch.float64, *addresses, rows, x.shape[1], *rest, torch.get_num_threads())


@cache
def _library() -> Any:
    """The kernels; None where they are not built, or, with a warning, do not load. Raises PneumoError for a wrong
    PNEUMO_SIMD.
    """
    path = layers_library()
    if path is None:
        return None
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        warnings.warn(f"the detector goes on without its kernels: {error}", RuntimeWarning, stacklevel=2)
        return None
    library.pneumo_layers_simd.restype = ctypes.c_char_p
    if library.pneumo_layers_simd() is None:
        raise PneumoError(f"PNEUMO_SIMD={os.environ.get('PNEUMO_SIMD')} is none of this machine's instructions.")
    for name, values, others in (
        ("pneumo_moments", 1, [_ADDRESS] * 2),
        ("pneumo_norm_silu", 2, [_ADDRESS] * 4),
        ("pneumo_norm_silu_backward", 3, [_ADDRESS] * 5),
        ("pneumo_norm_input_gradients", 2, [*[_ADDRESS] * 4, ctypes.c_double]),
    ):
        function = getattr(library, name)
        function.restype = None
        function.argtypes = [ctypes.c_bool, *[_ADDRESS] * values, _COUNT, _COUNT, *others, ctypes.c_int]
    return library
