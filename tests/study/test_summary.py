"""summary.json against figures that the synthetic result was made from."""
# mypy: disable-error-code="import-untyped"

import json
import math
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import simulated
import synthetic
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import structs
from simulated import MS, Network

from pneumo.study import breakdown
from pneumo.study.results import load_run, load_table
from pneumo.study.schema import PHASES, Row, Summary
from pneumo.study.summary import derive, summarize

SERIAL, ALL_CORES, DDP2, DDP4 = (
    ("serial", "none", 1, 1),
    ("serial", "none", 1, 2),
    *(("ddp", "gloo", n, 1) for n in (2, 4)),
)


def row_of(summary: Summary, backend: str, ranks: int, threads: int = 1) -> Row:
    (row,) = [r for r in summary.rows if (r.backend, r.ranks, r.threads) == (backend, ranks, threads)]
    return row


def times(*seconds: float) -> dict[int, int]:
    return {i: round(s * 1e9) for i, s in enumerate(seconds)}


@pytest.fixture
def result(tmp_path: Path) -> Path:
    return synthetic.write_result(tmp_path)


def test_a_block_lasts_from_the_first_begin_to_the_last_end(tmp_path: Path) -> None:
    lengths = {0: times(*[1.0] * 6), 1: times(0.5, 0.6, 0.7, 0.8, 0.9, 1.0)}
    row = row_of(summarize(synthetic.write_result(tmp_path, [SERIAL, DDP4], lengths=lengths)), "ddp", 4)
    assert row.total_s == pytest.approx(4.5, abs=1e-8)
    assert (row.time_s.median, row.time_s.low, row.time_s.high) == pytest.approx((0.75, 0.5, 1.0), abs=1e-8)
    assert (row.blocks, row.steps, row.images, row.warmup_steps) == (6, 24, 24 * 32, 3)
    assert row.images_per_s == pytest.approx(24 * 32 / 4.5)


def test_the_time_of_a_block_is_a_median(tmp_path: Path) -> None:
    """One block that somebody else has slowed down does not move it, as it would a mean or a pseudo-median."""
    lengths = {0: times(1.0, 1.1, 1.2, 1.3, 1.4, 9.0, 1.0)}
    time_s = summarize(synthetic.write_result(tmp_path, [SERIAL], lengths=lengths)).rows[0].time_s
    assert (time_s.median, time_s.low, time_s.high) == pytest.approx((1.2, 1.0, 9.0), abs=1e-8)


def test_speedup_is_the_ratio_within_blocks(tmp_path: Path) -> None:
    drift = [1.0, 2.0, 4.0, 8.0, 3.0, 5.0]  # whatever slows a whole block down cancels
    lengths = {0: times(*drift), 1: times(*(d / 1.6 for d in drift))}
    summary = summarize(synthetic.write_result(tmp_path, [SERIAL, DDP2], lengths=lengths, cores=2))
    row, serial = row_of(summary, "ddp", 2), row_of(summary, "serial", 1)
    assert row.speedup is not None
    assert row.efficiency is not None
    assert (row.speedup.median, row.speedup.low, row.speedup.high) == pytest.approx((1.6, 1.6, 1.6), rel=1e-6)
    assert row.efficiency.median == pytest.approx(0.8, rel=1e-6)
    assert row.attainable == pytest.approx(0.8, rel=1e-6)
    assert row.verdict is not None
    assert row.verdict.verdict == "faster"
    assert serial.speedup is not None
    assert serial.speedup.median == 1.0
    assert serial.verdict is None
    assert row.lost_rank_s == pytest.approx(2 * sum(drift) / 1.6 - sum(drift))
    assert math.fsum([*(term or 0 for term in row.loss.values()), row.residual_rank_s or 0]) == pytest.approx(5.75)
    assert row.residual_fraction == pytest.approx((row.residual_rank_s or 0) / (2 * row.total_s))
    assert serial.lost_rank_s == 0


def test_the_reference_is_the_fastest_serial_run_with_as_many_threads(tmp_path: Path) -> None:
    runs = [SERIAL, SERIAL, ALL_CORES, DDP2, ("ddp", "gloo", 2, 2), ("ddp", "gloo", 2, 4)]
    seconds = (2.0, 1.0, 0.8, 0.5, 0.4, 0.25)
    lengths = {i: times(*[s] * 6) for i, s in enumerate(seconds)}
    rows = summarize(synthetic.write_result(tmp_path, runs, lengths=lengths, cores=4)).rows
    speedups = [row.speedup.median for row in rows if row.speedup]
    assert speedups == pytest.approx([0.5, 1.0, 1.25, 2.0, 2.0, 4.0], rel=1e-6)
    assert [row.reference_threads for row in rows] == [1, 1, 1, 1, 2, 1]
    # Against one core: two cores for DDP 2 x 1; four against two for 2 x 2; four against one for 2 x 4.
    assert [row.attainable for row in rows[3:]] == pytest.approx([1.0, 1.0, 1.0], rel=1e-6)


def test_more_ranks_than_cores_can_attain_no_more_than_the_cores(tmp_path: Path) -> None:
    lengths = {0: times(*[1.0] * 6), 1: times(*[0.5] * 6)}
    summary = summarize(synthetic.write_result(tmp_path, [SERIAL, DDP4], lengths=lengths, cores=2))
    assert row_of(summary, "ddp", 4).attainable == pytest.approx(1.0, rel=1e-6)


def test_without_a_serial_run(tmp_path: Path) -> None:
    summary = summarize(synthetic.write_result(tmp_path, [DDP2, DDP4]))
    for row in summary.rows:
        assert [row.speedup, row.efficiency, row.verdict, row.lost_rank_s, row.attainable] == [None] * 5
        assert (row.interval_kind, row.blocks) == ("interval", 6)
        assert row.mcnemar_p is None
        assert "accuracy" in row.metrics


def test_few_blocks_have_a_range(tmp_path: Path) -> None:
    row = row_of(summarize(synthetic.write_result(tmp_path, [SERIAL, DDP2], blocks=3)), "ddp", 2)
    assert row.interval_kind == "range"
    assert row.verdict is not None
    assert row.verdict.verdict == "undecided"


def test_missing_blocks_are_compared_where_both_have_them(tmp_path: Path) -> None:
    lengths = {0: times(1, 1, 1, 1, 1, 1), 1: times(0.5, 0.5, 0.5), 2: {}}
    path = synthetic.write_result(tmp_path, [SERIAL, DDP2, DDP4], lengths=lengths | {2: {50: 10**9}})
    summary = summarize(path)
    short, apart = row_of(summary, "ddp", 2), row_of(summary, "ddp", 4)
    assert short.speedup is not None
    assert short.speedup.median == pytest.approx(2.0, rel=1e-6)
    assert short.lost_rank_s == pytest.approx(0.0, abs=1e-6)
    assert (short.blocks, short.interval_kind) == (3, "range")
    assert apart.speedup is None
    assert apart.lost_rank_s is None


def test_a_block_that_one_rank_did_not_finish_does_not_count(tmp_path: Path) -> None:
    path = synthetic.write_result(tmp_path, [SERIAL, DDP2])
    whole = summarize(path)
    table = load_table(path, "steps").to_pylist()
    table = [r for r in table if not (r["run"] == 1 and r["block"] == 5 and r["rank"] == 1 and r["step"] > 24)]
    pq.write_table(pa.Table.from_pylist(table, schema=load_table(path, "steps").schema), path / "steps.parquet")
    cut = summarize(path)
    assert [row_of(s, "ddp", 2).blocks for s in (whole, cut)] == [6, 5]
    assert row_of(cut, "serial", 1) == row_of(whole, "serial", 1)


def test_a_run_without_timed_blocks_has_no_row(tmp_path: Path) -> None:
    path = synthetic.write_result(tmp_path, [SERIAL], predictions=False)
    table = load_table(path, "steps")
    pq.write_table(table.filter(table.column("warmup")), path / "steps.parquet")
    assert summarize(path).rows == []


def test_the_same_files_give_the_same_summary_in_any_order_of_rows(result: Path) -> None:
    first = summarize(result)
    content = (result / "summary.json").read_bytes()
    for name in ("steps", "predictions"):
        table = load_table(result, name)
        order = np.random.default_rng(0).permutation(table.num_rows)
        pq.write_table(table.take(pa.array(order)), result / f"{name}.parquet")
    assert summarize(result) == first
    assert (result / "summary.json").read_bytes() == content


@given(st.permutations(range(4)))
@settings(deadline=None, max_examples=6)
def test_ranks_can_be_renamed(order: list[int]) -> None:
    rows = synthetic.step_rows(entry := synthetic.entry(0, "ddp", "gloo", 4, 1), {0: 10**9, 1: 2 * 10**9}, skew_ns=999)
    renamed = [row | {"rank": order[row["rank"]]} for row in rows]
    found = []
    for version in (rows, renamed):
        columns = {name: np.array([0 if r[name] is None else r[name] for r in version]) for name in rows[0]}
        timed = breakdown.timed(columns, entry)
        found.append((breakdown.blocks(timed), breakdown.cpu_seconds(timed)))
    assert found[0] == found[1]


def test_phases_sum_to_the_wall_time_and_cpu_to_its_parts(result: Path) -> None:
    steps, summary = breakdown.training_steps(result), summarize(result, write=False)
    table = load_table(result, "steps").to_pylist()
    for entry, row in zip(load_run(result).runs, summary.rows, strict=True):
        ranks = breakdown.by_rank(breakdown.timed(steps, entry))
        assert [rank.rank for rank in ranks] == list(range(entry.ranks))
        for rank in ranks:
            assert sum(rank.seconds[phase] for phase in PHASES) == pytest.approx(rank.wall_s, rel=1e-12)
            assert (rank.comm > 0) == (entry.ranks > 1)
            assert rank.compute == pytest.approx(0.86 if entry.ranks > 1 else 0.96, abs=1e-6)
        mine = [r for r in table if r["run"] == entry.run and not r["warmup"]]
        cpu = sum(sum(r[f"{p}_cpu_ns"] for p in PHASES) + r["helpers_cpu_ns"] for r in mine) / 1e9
        assert row.cpu_s == pytest.approx(cpu, rel=1e-12)
        mean = breakdown.mean_of(ranks)
        assert mean.wall_s == pytest.approx(math.fsum(r.wall_s for r in ranks) / entry.ranks)


def test_a_large_clock_keeps_its_nanoseconds(result: Path) -> None:
    assert breakdown.training_steps(result)["begin_ns"].min() == synthetic.START_NS


def test_quality_of_equal_trainings_agrees_and_is_tested(result: Path) -> None:
    summary = summarize(result, write=False)
    serial = row_of(summary, "serial", 1)
    assert serial.mcnemar_p is None
    assert serial.metrics["n"] == 400
    for row in summary.rows:
        assert row.metrics["accuracy"] == serial.metrics["accuracy"]
        assert row.metrics["auc"] == pytest.approx(serial.metrics["auc"], abs=1e-4)
        if row.run != serial.run:
            assert row.mcnemar_p == 1.0
            assert row.auc_difference is not None
            assert row.auc_difference.low <= row.auc_difference.estimate <= row.auc_difference.high


@pytest.mark.parametrize(("data", "prevalence"), [(None, 6012 / 26684), ("rsna", 0.31)])
def test_predictive_values_are_also_given_at_a_natural_prevalence(
    tmp_path: Path, data: str | None, prevalence: float
) -> None:
    facts = structs.replace(synthetic.run_file().data, natural_prevalence=0.31 if data else 0.5)
    path = synthetic.write_result(tmp_path, [SERIAL], config={"data": data}, data=facts)
    m = {name: value or 0 for name, value in summarize(path).rows[0].metrics.items()}
    assert m["natural_prevalence"] == prevalence
    true, false = prevalence * m["sensitivity"], (1 - prevalence) * (1 - m["specificity"])
    assert m["ppv_natural"] == pytest.approx(true / (true + false))
    assert m["ppv_natural"] < m["ppv"] - 0.05


def test_a_worse_training_is_told_apart(tmp_path: Path) -> None:
    path = synthetic.write_result(tmp_path, [SERIAL, DDP2])
    table = load_table(path, "predictions").to_pylist()
    flip = {f"validate-{i:04}" for i in range(60)}
    for row in table:
        if row["run"] == 1 and row["patient"] in flip:
            row["score"] = 1 - row["score"]
    schema = load_table(path, "predictions").schema
    pq.write_table(pa.Table.from_pylist(table, schema=schema), path / "predictions.parquet")
    row = row_of(summarize(path), "ddp", 2)
    assert row.mcnemar_p is not None
    assert row.mcnemar_p < 1e-3
    assert row.auc_difference is not None
    assert row.auc_difference.high < 0


def test_of_a_patient_answered_twice_the_last_answer_counts(tmp_path: Path) -> None:
    path = synthetic.write_result(tmp_path, [SERIAL])
    plain = summarize(path).rows[0].metrics
    table = load_table(path, "predictions").to_pylist()
    early = [row | {"score": 1 - row["score"]} for row in table]
    schema = load_table(path, "predictions").schema
    pq.write_table(pa.Table.from_pylist(early + table, schema=schema), path / "predictions.parquet")
    assert summarize(path).rows[0].metrics == plain


def test_without_predictions_there_are_no_metrics(tmp_path: Path) -> None:
    row = summarize(synthetic.write_result(tmp_path, [SERIAL], predictions=False)).rows[0]
    assert (row.metrics, row.intervals, row.subgroups) == ({}, {}, [])


def test_weak_scaling_is_compared_by_images(tmp_path: Path) -> None:
    """Twice the images in the same time on two ranks: speedup 2, nothing lost."""
    path = synthetic.write_result(tmp_path, [SERIAL, DDP2], lengths={i: times(*[1.0] * 6) for i in (0, 1)})
    table = load_table(path, "steps").to_pylist()
    for row in table:
        row["images"] = 32
    pq.write_table(pa.Table.from_pylist(table, schema=load_table(path, "steps").schema), path / "steps.parquet")
    row = row_of(summarize(path), "ddp", 2)
    assert row.speedup is not None
    assert row.speedup.median == pytest.approx(2.0, rel=1e-6)
    assert row.lost_rank_s == pytest.approx(0.0, abs=1e-6)


def test_what_else_an_account_tells_is_in_the_summary(tmp_path: Path) -> None:
    """Two ranks wait 10 ms for each of two collectives a step, in training and, ten seconds later, in validation."""
    runs = [simulated.SERIAL, ("fsdp", "gloo", 2, 1)]
    serial = simulated.serial_rows(synthetic.entry(0, *runs[0]), {16: simulated.share_ns(2)})
    rows, records = simulated.train(synthetic.entry(1, *runs[1]), simulated.even(2), Network(0, 10 * MS), style="fsdp")
    for found in (serial, rows):
        found += [
            r | {"kind": "validate", "step": 99, "begin_ns": r["begin_ns"] + 10**10} for r in found if r["step"] == 7
        ]
    path = simulated.write(tmp_path, [(serial, []), (rows, records)], runs)
    derived, written = derive(path, write=True), json.loads((path / "summary.json").read_text())
    row, step = written["rows"][1], 101 / 2 + 20
    replayed, pop, validated = row["what_if"], row["pop"], row["accounts"]["validate"]
    assert replayed["recorded_s"] == pytest.approx(8 * step / 1e3)
    assert replayed["scenarios_s"]["no transfer"] == pytest.approx(8 * (step - 20) / 1e3)
    assert pop["transfer_efficiency"] == pytest.approx((step - 20) / step)
    assert (pop["load_balance"], pop["serialisation_efficiency"]) == pytest.approx((1, 1))
    assert pop["global_efficiency"] == pytest.approx(row["efficiency"]["median"])
    assert validated["compared"] == {"blocks": [2], "steps": 1, "whole_rank_s": pytest.approx(2 * step / 1e3)}
    assert validated["lost_rank_s"] == pytest.approx(2 * 20 / 1e3)
    assert validated["lost_rank_s"] == derived.accounts["validate"][1].total("lost")
