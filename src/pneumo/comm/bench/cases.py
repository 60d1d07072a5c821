"""What is measured: operations, element types, sizes, and the bytes that an operation cannot do without moving."""

import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from pneumo.errors import Refused

KIB, MIB = 1 << 10, 1 << 20
DEFAULT_SIZES = (4, 64, KIB, 4 * KIB, 16 * KIB, 64 * KIB, 256 * KIB, MIB, 4 * MIB, 16 * MIB, 64 * MIB, 256 * MIB)
SMALL_BYTES = 64 * KIB  # below, a sample is many calls back to back, and bytes moved say nothing of the time
# Bytes of an element, by the types' torch names.
ITEM_BYTES = {
    **{"float32": 4, "float64": 8, "float16": 2, "bfloat16": 2, "complex64": 8, "complex128": 16},
    **{"int8": 1, "uint8": 1, "int16": 2, "int32": 4, "int64": 8},
}
MAX_BUFFERS, MIN_BUFFERS = 64, 2
_UNITS = {"": 1, "K": KIB, "M": MIB, "G": 1 << 30}

Moved = Callable[[float, int], float]


@dataclass(frozen=True, slots=True)
class Op:
    """A collective; `input_shard` and `output_shard`: that side has the bytes divided by the ranks.

    `floors`: by formula, the bytes that the busiest rank reads and writes for n bytes on p ranks. The first is the
    lower bound, the others belong to ways to do it in shared memory.
    """

    name: str
    reduces: bool = False
    in_place: bool = False
    rooted: bool = False
    input_shard: bool = False
    output_shard: bool = False
    floors: dict[str, Moved] = field(default_factory=dict)


# Every rank has to read its share of all tensors and write its result; copy-in/copy-out adds a copy of the input into
# shared memory and reads from there. A memcpy of n bytes moves 2n.
OPS = {
    op.name: op
    for op in (
        Op(
            "allreduce",
            reduces=True,
            in_place=True,
            floors={
                "2n": lambda n, p: 2 * n,
                "3n-n/p": lambda n, p: 3 * n - n / p,
                "5n+n/p": lambda n, p: 5 * n + n / p,
            },
        ),
        Op(
            "reduce_scatter",
            reduces=True,
            output_shard=True,
            floors={"n+n/p": lambda n, p: n + n / p, "3n+n/p": lambda n, p: 3 * n + n / p},
        ),
        Op(
            "allgather",
            input_shard=True,
            floors={"2n": lambda n, p: 2 * n, "2n+2n/p": lambda n, p: 2 * n + 2 * n / p},
        ),
        Op(
            "broadcast",
            in_place=True,
            rooted=True,
            floors={"2n": lambda n, p: 2 * n, "4n": lambda n, p: 4 * n},
        ),
        Op(
            "reduce",
            reduces=True,
            in_place=True,
            rooted=True,
            floors={"n+n/p": lambda n, p: n + n / p, "3n+n/p": lambda n, p: 3 * n + n / p},
        ),
        Op("alltoall", floors={"2n": lambda n, p: 2 * n, "4n": lambda n, p: 4 * n}),
        Op("barrier", in_place=True),
    )
}


@dataclass(frozen=True, slots=True)
class Case:
    """One operation on one type at one size: `bytes` of a rank's tensor, `count` elements, on `ranks` ranks."""

    op: Op
    dtype: str
    bytes: int
    ranks: int

    @property
    def count(self) -> int:
        """Elements of the whole tensor."""
        return self.bytes // ITEM_BYTES[self.dtype]

    @property
    def shard(self) -> int:
        """Elements of one rank's part of it."""
        return self.count // self.ranks

    def __str__(self) -> str:
        return f"{self.op.name} of {size_text(self.bytes)} bytes of {self.dtype}"


def cases(op: str, dtype: str, sizes: Iterable[int], ranks: int) -> list[Case]:
    """The cases of an operation, smallest first: sizes are rounded up to whole elements, the same number a rank."""
    if op == "barrier":
        return [Case(OPS[op], dtype, 0, ranks)]
    item = ITEM_BYTES[dtype]
    shared = not OPS[op].in_place
    unit = item * ranks if shared else item
    return [Case(OPS[op], dtype, size, ranks) for size in sorted({unit * math.ceil(size / unit) for size in sizes})]


def parse_size(text: str) -> int:
    """Read 4, 64K, 1M or 2G (powers of 1024) as bytes; raises Refused."""
    match = re.fullmatch(r"(\d+)\s*([KMG]?)(?:I?B)?", text.strip().upper())
    if not match or int(match[1]) < 1:
        raise Refused(f"--bytes {text}: a size is a whole number above 0, with K, M or G if you like, as in 4,64K,16M.")
    return int(match[1]) * _UNITS[match[2]]


def size_text(size: float) -> str:
    """Bytes as they are asked for: 64K, 16M; figures that are no whole number of K as they are."""
    unit = next((u for u in ("G", "M", "K") if size and size % _UNITS[u] == 0), "")
    return f"{size / _UNITS[unit]:.0f}{unit}"


def about(size: float) -> str:
    """Bytes for a sentence, rounded."""
    return f"{size / (1 << 30):.1f} GiB" if size >= 1 << 30 else f"{size / MIB:.1f} MiB"


def buffers_for(size: int, cache_bytes: int) -> int:
    """How many buffers of a size to go round: together twice the last-level cache where 64 of them reach that."""
    return min(MAX_BUFFERS, max(3, math.ceil(2 * cache_bytes / max(size, 1))))


def buffers_that_fit(size: int, wanted: int, ranks_here: int, free_bytes: float) -> int:
    """The number of buffers of a size that the ranks of a node can have each, at most `wanted`; 0 below two.

    The libraries' own temporaries are reckoned as two buffers more, and a tenth of the memory stays free.
    """
    if size == 0:
        return wanted
    each = 0.9 * free_bytes / ranks_here
    fits = min(wanted, int(each / size) - 2)
    return fits if fits >= MIN_BUFFERS else 0


def calls_a_sample(size: int, call_s: float) -> int:
    """Calls back to back in one sample: about 4 ms, within 20 to 100 for small tensors and 1 to 20 for others."""
    low, high = (20, 100) if size < SMALL_BYTES else (1, 20)
    return min(high, max(low, math.ceil(0.004 / max(call_s, 1e-9))))
