"""The benchmark of collectives without ranks: sizes, floors, turns, buffers and their check, malloc, rows, tables."""

import io
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pneumo.comm.bench import buffers, memory, options, report
from pneumo.comm.bench.cases import (
    ITEM_BYTES,
    OPS,
    Case,
    buffers_for,
    buffers_that_fit,
    calls_a_sample,
    cases,
    parse_size,
    size_text,
)
from pneumo.comm.bench.measure import Samples, is_enough, turns
from pneumo.errors import Refused
from pneumo.study.tables import make_console

MIB = 1 << 20


@pytest.mark.parametrize(
    ("text", "size"), [("4", 4), ("64K", 65536), ("1m", MIB), ("2GiB", 2 << 30), (" 16 kb ", 16384)]
)
def test_sizes_are_read(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "0", "-4", "1.5K", "4T", "K"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(Refused, match="--bytes"):
        parse_size(text)


@given(st.integers(1, 1 << 40))
def test_a_size_is_written_as_it_is_read(size: int) -> None:
    assert parse_size(size_text(size)) == size


@given(
    st.sampled_from([op for op in OPS if op != "barrier"]),
    st.sampled_from(sorted(ITEM_BYTES)),
    st.lists(st.integers(1, 10**6), min_size=1, max_size=6),
    st.integers(2, 9),
)
def test_cases_are_whole_elements_and_equal_shards_and_no_smaller(
    op: str, dtype: str, sizes: list[int], ranks: int
) -> None:
    found = cases(op, dtype, sizes, ranks)
    assert [case.bytes for case in found] == sorted({case.bytes for case in found})
    unit = ITEM_BYTES[dtype] * (1 if OPS[op].in_place else ranks)
    for case in found:
        assert case.bytes % unit == 0
        assert any(0 <= case.bytes - size < unit for size in sizes)
        assert case.count * ITEM_BYTES[dtype] == case.bytes


def test_a_barrier_has_one_case() -> None:
    assert [case.bytes for case in cases("barrier", "float32", [4, 1024], 2)] == [0]


def test_floors_of_an_allreduce() -> None:
    moved = {formula: f(100.0, 4) for formula, f in OPS["allreduce"].floors.items()}
    assert moved == {"2n": 200, "3n-n/p": 275, "5n+n/p": 525}


@pytest.mark.parametrize("op", [op for op in OPS.values() if op.floors])
def test_the_first_floor_is_the_lowest(op: Any) -> None:
    for ranks in (2, 3, 8):
        found = [f(1.0, ranks) for f in op.floors.values()]
        assert found == sorted(found)


@pytest.mark.parametrize("count", [1, 2, 5, 6])
def test_turns_give_every_library_every_place_equally_often(count: int) -> None:
    places = np.zeros((count, count), int)
    for number in range(2 * count):
        order = turns(count, number)
        assert sorted(order) == list(range(count))
        for place, library in enumerate(order):
            places[library, place] += 1
    assert (places == 2).all()


def test_a_case_ends_when_it_has_enough() -> None:
    assert is_enough(25, 0.1, 10, most=25)
    assert not is_enough(24, 9.9, 10, most=25)
    assert is_enough(6, 10, 10, most=25)
    assert not is_enough(5, 10, 10, most=25)
    assert is_enough(3, 30, 10, most=25)
    assert not is_enough(2, 1000, 10, most=25)


def test_buffers_exceed_the_cache_and_fit_into_memory() -> None:
    assert buffers_for(MIB, 32 * MIB) == 64
    assert buffers_for(16 * MIB, 32 * MIB) == 4
    assert buffers_for(256 * MIB, 32 * MIB) == 3
    assert buffers_that_fit(MIB, 5, 2, 1000 * MIB) == 5
    assert buffers_that_fit(100 * MIB, 5, 2, 1000 * MIB) == 2
    assert buffers_that_fit(200 * MIB, 5, 2, 1000 * MIB) == 0
    assert buffers_that_fit(0, 64, 2, 0) == 64


def test_samples_of_small_tensors_are_many_calls() -> None:
    assert [calls_a_sample(1024, s) for s in (1e-6, 1e-4, 1)] == [100, 40, 20]
    assert [calls_a_sample(MIB, s) for s in (1e-6, 1e-3, 1)] == [20, 4, 1]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--op", "alreduce"], "did you mean allreduce"),
        (["--dtype", "float23"], "did you mean float32"),
        (["--libraries", "glo"], "did you mean gloo"),
        (["--bites", "4"], "did you mean --bytes"),
        (["--bytes", "4,x"], "--bytes x"),
        (["--repeats", "2"], "--repeats 2"),
        (["--repeats", "many"], "repeats"),
        (["--seconds", "0"], "--seconds 0"),
        (["--seconds", "nan"], "--seconds nan"),
        (["--op", ","], "--op needs"),
    ],
)
def test_flags_are_refused_in_a_sentence(flags: list[str], words: str) -> None:
    with pytest.raises(Refused) as caught:
        options.parse(flags)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_flags_are_understood() -> None:
    flags = ["--op", "all", "--dtype", "float32,bfloat16", "--bytes", "4,64K", "--libraries", "mpi,gloo"]
    found = options.parse([*flags, "--repeats", "3"])
    assert found is not None
    assert found.op == tuple(OPS)
    assert found.dtype == ("float32", "bfloat16")
    assert found.bytes == (4, 65536)
    assert found.libraries == ("gloo", "mpi")  # in the order of the tables
    assert found.repeats == 3


def test_places_are_refused_before_work_begins(tmp_path: Path) -> None:
    for flags, words in (
        (["--json", "/nowhere/x.json"], "--json"),
        (["--plot", str(tmp_path / "x.pdf")], ".svg or .png"),
    ):
        found = options.parse(flags)
        assert found is not None
        with pytest.raises(Refused, match=words):
            options.check_places(found)
    assert list(tmp_path.iterdir()) == []


def pool_of(op: str, count: int, ranks: int = 3, dtype: str = "float32", slots: int = 4) -> buffers.Pool:
    return buffers.Pool(Case(OPS[op], dtype, count * ITEM_BYTES[dtype], ranks), slots)


@pytest.mark.parametrize("op", [op for op in OPS if op != "barrier"])
def test_slots_have_the_shapes_of_the_operation_and_buffers_do_not_overlap(op: str) -> None:
    for slot in pool_of(op, 12).slots:
        assert slot.input.numel() == (4 if op == "allgather" else 12)
        assert slot.output.numel() == (4 if op == "reduce_scatter" else 12)
        assert (slot.input.data_ptr() == slot.output.data_ptr()) == OPS[op].in_place
        assert abs(slot.whole.data_ptr() - slot.other.data_ptr()) >= 48
        assert slot.input.data_ptr() % 64 == 0


def test_slots_go_round_and_are_refilled() -> None:
    pool = pool_of("allreduce", 6)
    assert [pool.take(3), pool.take(3), pool.take(9)] == [[0, 1, 2], [3, 0, 1], [2, 3, 0, 1, 2, 3, 0, 1, 2]]
    assert {slot.root for slot in pool.slots} == {0, 1, 2}
    before = pool.slots[0].whole.clone()
    pool.refill([0])
    assert not torch.equal(before, pool.slots[0].whole)
    assert torch.equal(pool.slots[0].whole, pool.slots[0].other)


def outputs(op: str, inputs: list[np.ndarray], root: int) -> list[np.ndarray]:
    """What each rank should get, by NumPy alone."""
    ranks, total = len(inputs), np.sum(inputs, axis=0, dtype=inputs[0].dtype)
    if op == "reduce_scatter":
        return np.split(total, ranks)
    if op == "allgather":
        return [np.concatenate(inputs)] * ranks
    if op == "broadcast":
        return [inputs[root]] * ranks
    if op == "alltoall":
        return [np.concatenate([np.split(given, ranks)[rank] for given in inputs]) for rank in range(ranks)]
    return [total] * ranks


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8", "complex64"])
@pytest.mark.parametrize("op", [op for op in OPS if op != "barrier"])
def test_the_check_knows_right_from_wrong(op: str, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(buffers, "CHUNK", 14)
    ranks, count, root = 3, 99, 1
    pools = [pool_of(op, count, ranks, dtype) for _ in range(ranks)]
    for rank, pool in enumerate(pools):
        buffers.write_pattern(pool.slots[root].input, rank)
    inputs = [pool.slots[root].input.numpy().copy() for pool in pools]
    assert not np.array_equal(inputs[0], inputs[1])
    for rank, (pool, right) in enumerate(zip(pools, outputs(op, inputs, root), strict=True)):
        case, slot = pool.case, pool.slots[root]
        slot.output.copy_(torch.from_numpy(right))
        assert buffers.mistake(case, rank, slot, slot.output) is None
        for place in (0, 14, slot.output.numel() - 1):
            wrong = slot.output.clone()
            wrong[place] += 1
            found = buffers.mistake(case, rank, slot, wrong)
            if op == "reduce" and rank != root:
                assert found is None  # what the others have then is nobody's business
            else:
                assert found is not None
                assert found.endswith(f"element {place}")
        assert "elements instead of" in (buffers.mistake(case, rank, slot, slot.output[:-1]) or "")


def test_sums_that_a_short_type_cannot_count_may_round() -> None:
    case = Case(OPS["allreduce"], "bfloat16", 1400, 200)
    slot = buffers.Pool(case, 3).slots[0]
    exact = torch.zeros(700, dtype=torch.float64)
    given = torch.zeros(700, dtype=torch.bfloat16)
    for rank in range(200):
        buffers.write_pattern(given, rank)
        exact += given
    slot.output.copy_(exact * (1 + 2**-8))
    assert buffers.mistake(case, 0, slot, slot.output) is None
    slot.output.copy_(exact * 1.5)
    assert buffers.mistake(case, 0, slot, slot.output) is not None


FAULTS = """
import ctypes
from pneumo import process
from pneumo.comm.bench import memory
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
def use(size):
    before, block = memory.faults(), libc.malloc(size)
    ctypes.memset(block, 1, size)
    libc.free(block)
    return memory.faults() - before
for _ in range(3):
    for setting in (process.keep_memory, process.return_memory):
        assert setting()
        use(40 << 20)
        print(use(40 << 20), end=" ")
        use(20 << 20)
        print(use(20 << 20), end=" ")
"""


def test_malloc_can_be_told_to_keep_and_to_return_again_and_again() -> None:
    done = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True, check=True)
    large_kept, small_kept, large_returned, small_returned = np.array(done.stdout.split(), int).reshape(3, 4).T
    pages = (40 << 20) // 4096
    assert max(large_kept) < pages / 100
    assert max(small_kept) < pages / 100
    assert min(large_returned) >= pages / 20  # huge pages would make them fewer
    assert max(small_returned) < pages / 100  # below 32 MiB glibc's adaptive threshold keeps what is freed, too


def test_the_last_level_cache_is_found(tmp_path: Path) -> None:
    for i, (level, size) in enumerate(((1, "32K"), (3, "32768K"), (2, "512K"))):
        folder = tmp_path / f"index{i}"
        folder.mkdir()
        (folder / "level").write_text(f"{level}\n")
        (folder / "size").write_text(f"{size}\n")
    assert memory.cache_bytes(tmp_path) == 32 * MIB
    assert memory.cache_bytes(tmp_path / "none") == 32 * MIB
    assert 0 < memory.available_bytes() < 1 << 50


def content(waited: float = 0.0) -> dict[str, Any]:
    """What a run of two sizes might have found: memcpy 10 us, pneumo 15, gloo 60 and 90 at the small size."""
    rng, rows = np.random.default_rng(1), []
    for size in (1024, MIB):
        case = Case(OPS["allreduce"], "float32", size, 2)
        found = []
        for name, us in (("memcpy", 10), ("pneumo", 15), ("gloo", 60 if size == MIB else 90), ("mpi_plain", 1500)):
            us_a_call = us * np.array([1.0, 1, 1, *rng.uniform(0.9, 0.99, 4), *rng.uniform(1.01, 1.1, 4)])
            found.append(Samples(name, tuple(us_a_call), 20, 0.0 if name != "mpi_plain" else 8193.0, waited))
        rows += report.rows(case, found)
    return {
        "ranks": 2,
        "cores": 2,
        "rows": rows,
        "absent": [
            {"library": "deepspeed", "op": None, "dtype": None, "why": "not installed"},
            {"library": "mpi", "op": "allreduce", "dtype": "bfloat16", "why": "MPI has no type for bfloat16"},
        ],
        "skipped": [{"op": "allreduce", "dtype": "float32", "bytes": 1 << 40, "why": "too large"}],
    }


def test_rows_have_medians_in_their_intervals_and_paired_ratios() -> None:
    rows = content()["rows"]
    assert json.loads(json.dumps(rows)) == rows
    by = {(row["bytes"], row["library"]): row for row in rows}
    assert by[1024, "memcpy"]["ratio"][0] < 1
    for (size, name), row in by.items():
        assert row["median_us"] == pytest.approx(np.median(row["samples_us"]))
        assert row["low_us"] <= row["median_us"] <= row["high_us"]
        assert row["confidence"] >= 0.95
        if name == "pneumo":
            assert row["ratio"] is None
        else:
            expected = row["median_us"] / by[size, "pneumo"]["median_us"]
            assert row["ratio"][1] <= expected * 1.001
            assert expected <= row["ratio"][2] * 1.001


def test_few_samples_give_a_range() -> None:
    row = report.rows(Case(OPS["allreduce"], "float32", 4, 2), [Samples("mpi", (3.0, 1.0, 2.0), 100, 0.0, 0.0)])[0]
    assert (row["median_us"], row["low_us"], row["high_us"], row["confidence"]) == (2, 1, 3, None)


def printed(verbose: bool) -> list[str]:
    text = io.StringIO()
    report.show(content(), make_console(text), verbose=verbose)
    return [" ".join(line.split()) for line in text.getvalue().splitlines()]


def test_the_table_has_ratios_and_floors() -> None:
    lines = printed(verbose=False)
    assert "allreduce of float32, us a call" in lines
    assert "1K 10.0 15.0 90.0 6.00 1500 100 - - -" in lines
    # 15 us against 10 us for 2n: 1.5; for 2.5n: 1.2; for 5.5n: 0.55
    assert "1M 10.0 15.0 60.0 4.00 1500 100 1.50 1.20 0.55" in lines
    assert any(line.startswith("deepspeed left out: not installed") for line in lines)
    assert any(line.startswith("mpi left out for allreduce of bfloat16: MPI has no type") for line in lines)
    assert any(line.startswith("skipped allreduce of float32, too large") for line in lines)
    assert any("mpi plain 8193" in line for line in lines)
    assert not any("every interval" in line for line in lines)


def test_the_second_table_has_intervals() -> None:
    lines = printed(verbose=True)
    row = next(line for line in lines if line.startswith("1M gloo"))
    _size, _name, median, low, high, samples, calls, faults, waited, ratio, limits = row.split()
    assert float(low) < float(median) < float(high)
    assert (samples, calls, faults, waited) == ("11", "20", "0", "0")
    assert float(ratio) == pytest.approx(4, abs=0.5)
    assert len(limits.split("-")) == 2


@pytest.mark.parametrize("without", ["pneumo", "memcpy"])
def test_tables_do_without(without: str) -> None:
    found = content()
    found["rows"] = [row for row in found["rows"] if row["library"] != without]
    text = io.StringIO()
    report.show(found, make_console(text), verbose=True)
    assert "/2n" not in text.getvalue()


@pytest.mark.parametrize(("waited", "cores", "said"), [(0.4, 2, True), (0.01, 2, False), (0.4, 1, False)])
def test_a_busy_machine_is_told(waited: float, cores: int, said: bool) -> None:
    explained = dict(report.explain({**content(waited), "cores": cores}))
    assert ("busy" in explained) == said
    assert not said or "40%" in explained["busy"]


def test_nothing_measured_is_said() -> None:
    text = io.StringIO()
    report.show({**content(), "rows": []}, make_console(text), verbose=True)
    assert "none" in text.getvalue()


@pytest.mark.parametrize("name", ["x.svg", "x.png"])
def test_the_plot_is_drawn(tmp_path: Path, name: str) -> None:
    pytest.importorskip("matplotlib")
    from pneumo.comm.bench.plot import draw

    draw(content(), tmp_path / name)
    start = (tmp_path / name).read_bytes()[:300]
    assert (b"<svg" in start or b"<?xml" in start) if name.endswith("svg") else start.startswith(b"\x89PNG")


@pytest.mark.parametrize("value", [0.123, 9.99, 10.0, 99.96, 1234.5])
def test_figures_have_three_digits_or_more(value: float) -> None:
    assert math.isclose(float(report.figure(value)), value, rel_tol=0.03)
