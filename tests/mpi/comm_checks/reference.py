"""Tensors to send, and what NumPy says of their reductions."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from comm_checks.world import Ranks, rng

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
COMPLEX = (torch.complex64, torch.complex128)
INTEGERS = (torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8)
DTYPES = (*FLOATS, *COMPLEX, *INTEGERS, torch.bool)
BITWISE = ("BAND", "BOR", "BXOR")
UFUNCS = {
    "SUM": np.add,
    "AVG": np.add,
    "PRODUCT": np.multiply,
    "MIN": np.minimum,
    "MAX": np.maximum,
    "BAND": np.bitwise_and,
    "BOR": np.bitwise_or,
    "BXOR": np.bitwise_xor,
}
OPS = tuple(UFUNCS)
OF_BOOLEANS = {**UFUNCS, "SUM": np.logical_or, "PRODUCT": np.logical_and}


def op_of(name: str) -> Any:
    """c10d's ReduceOp of this name."""
    return getattr(dist.ReduceOp, name)


def allows(op: str, dtype: torch.dtype) -> bool:
    """Whether a reduction has a meaning for a type."""
    if dtype.is_complex:
        return op in ("SUM", "AVG")
    if dtype.is_floating_point:
        return op not in BITWISE
    return op != "AVG" or dtype != torch.bool


def draw(shape: Sequence[int], dtype: torch.dtype, *key: object) -> torch.Tensor:
    """Random values, the same on every rank for the same key: all that integers can be, floats that do not overflow."""
    random = rng(*key)
    if dtype == torch.bool:
        return torch.from_numpy(random.integers(0, 2, shape).astype(bool))
    if dtype in INTEGERS:
        limits = torch.iinfo(dtype)
        values = random.integers(limits.min, limits.max, shape, dtype=np.int64, endpoint=True)
        return torch.from_numpy(np.asarray(values)).to(dtype)
    values = random.uniform(0.5, 2, shape) * random.choice([-1.0, 1.0], shape)
    if dtype.is_complex:
        values = values + 1j * random.standard_normal(shape)
    return torch.from_numpy(np.asarray(values)).to(dtype)


def drawn(ranks: Ranks, shape: tuple[int, ...], dtype: torch.dtype, *key: object) -> list[torch.Tensor]:
    """Random tensors of all ranks, which every rank knows."""
    return [draw(shape, dtype, *key, rank) for rank in ranks.everybody]


def exact(tensor: torch.Tensor) -> Any:
    """The values as NumPy has them, floats in double precision (NumPy has no bfloat16)."""
    tensor = tensor.detach()
    if tensor.dtype.is_complex:
        return tensor.to(torch.complex128).numpy()
    return (tensor.double() if tensor.dtype.is_floating_point else tensor).numpy()


def reduced(parts: Sequence[torch.Tensor], op: str) -> Any:
    """The reduction of the ranks' tensors in NumPy: integers wrap, but for averages of those below 64 bits, whose sum
    is taken in 64; an average is cut off towards zero.
    """
    dtype = parts[0].dtype
    stacked = np.stack([exact(part) for part in parts])
    if op == "AVG" and dtype in INTEGERS:
        total = np.asarray(stacked.astype(np.int64 if dtype.itemsize < 8 else stacked.dtype).sum(axis=0))
        return cut_off(total, len(parts)).astype(stacked.dtype)
    table = OF_BOOLEANS if dtype == torch.bool else UFUNCS
    result = table[op].reduce(stacked, axis=0)
    result = np.asarray(result).astype(stacked.dtype)
    if op == "AVG":
        result = result / len(parts)
    return result


def cut_off(values: Any, divisor: int) -> Any:
    """Integers divided, without the fraction."""
    wide = values.astype(object)
    quotients = np.sign(wide) * (abs(wide) // divisor) if wide.size else wide
    return np.asarray(quotients).astype(values.dtype)


def error_allowed(parts: Sequence[torch.Tensor], op: str, result: Any) -> Any:
    """How far a reduction may be from the true one, None: not at all.

    16-bit floats accumulate in 32 bits and are rounded once.
    """
    dtype = parts[0].dtype
    if not (dtype.is_floating_point or dtype.is_complex) or op in ("MIN", "MAX"):
        return None
    unit = torch.finfo(dtype).eps / 2
    inner = min(unit, torch.finfo(torch.float32).eps / 2)
    sizes = np.stack([abs(exact(part)) for part in parts])
    scale = sizes.prod(axis=0) if op == "PRODUCT" else sizes.sum(axis=0) / (len(parts) if op == "AVG" else 1)
    return 1.01 * unit * abs(result) + (len(parts) + 1) * inner * scale + torch.finfo(dtype).tiny


def assert_reduced(got: torch.Tensor, parts: Sequence[torch.Tensor], op: str, what: object = "") -> None:
    """The tensor is the reduction of the parts."""
    expected = reduced(parts, op)
    assert got.dtype == parts[0].dtype, f"{what}: {got.dtype}"
    values = exact(got)
    assert values.shape == expected.shape, f"{what}: shape {values.shape}, not {expected.shape}"
    allowed = error_allowed(parts, op, expected)
    wrong = values != expected if allowed is None else ~(abs(values - expected) <= allowed)
    if np.any(wrong):
        where = tuple(np.argwhere(wrong)[0])
        first = f"at {[int(k) for k in where]} {values[where]} != {expected[where]}"
        raise AssertionError(f"{what}: {np.count_nonzero(wrong)} of {wrong.size} are wrong, {first}")


def assert_same(got: Any, expected: Any, what: object = "") -> None:
    """Two tensors, or lists, tuples and dicts of them, have the same bits, types and shapes."""
    if isinstance(expected, torch.Tensor):
        assert isinstance(got, torch.Tensor), f"{what}: {type(got)} instead of a tensor"
        assert got.dtype == expected.dtype, f"{what}: {got.dtype} != {expected.dtype}"
        assert got.shape == expected.shape, f"{what}: {tuple(got.shape)} != {tuple(expected.shape)}"
        same = raw(got) == raw(expected)
        assert same, f"{what}: {got.flatten()[:8]} != {expected.flatten()[:8]}"
    elif isinstance(expected, (list, tuple)):
        assert len(got) == len(expected), f"{what}: {len(got)} items instead of {len(expected)}"
        for index, (one, other) in enumerate(zip(got, expected, strict=True)):
            assert_same(one, other, f"{what}[{index}]")
    else:
        assert got == expected, f"{what}: {got!r} != {expected!r}"


def told(call: Callable[[], Any]) -> str:
    """What the error says that a call raises."""
    try:
        call()
    except (RuntimeError, ValueError, TypeError) as error:
        return str(error)
    raise AssertionError("the call raises nothing")


def raw(tensor: torch.Tensor) -> bytes:
    """The bytes of a tensor's values, in the order of its indices."""
    dense = tensor.detach().resolve_conj().resolve_neg().contiguous()
    return dense.reshape(-1).view(torch.uint8).numpy().tobytes() if dense.numel() else b""
