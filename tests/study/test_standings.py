"""The printed comparison of backends: complete within 120 columns, and words that are figures of a pair."""

import io
import re
from pathlib import Path

import msgspec
import pytest
import simulated
import synthetic
from rich.console import Console
from simulated import MS, Network
from synthetic import entry
from test_rivals import DDP, FAST, FSDP, HOROVOD, SLOW, comparison, write

from pneumo.study.schema import Difference, Pair, Rivals, Spread, Verdict, VerdictName
from pneumo.study.sentences import Sentence, rivalry
from pneumo.study.tables import show

TITLES = ("Backends side by side", "Each against the first on as many ranks")


def printed(screen: Console, path: Path) -> str:
    show(path, screen)
    assert isinstance(screen.file, io.StringIO)
    return screen.file.getvalue()


def part(text: str, title: str) -> list[str]:
    return text[text.index(title) :].split("\n\n")[0].splitlines()


def test_the_table_says_what_is_known_and_dashes_what_is_not(screen: Console, tmp_path: Path) -> None:
    silent = Network(MS, 3 * MS, tells_start=False, tells_finish=False)
    lines = part(printed(screen, write(tmp_path, (DDP, FAST), (HOROVOD, silent))), TITLES[0])
    ddp, horovod = (next(line.split() for line in lines if line.startswith(name)) for name in ("ddp", "horovod"))
    assert " ".join(ddp) == "ddp gloo 4 29.2 25.25 0.00 4.00 0.00 1.00 3.00 3.00 2 2.10 0.26"
    assert " ".join(horovod) == "horovod mpi 4 29.2 25.25 0.00 4.00 0.00 - 4.00 - 2 2.10 -"
    assert any(line.startswith("queue") and "negotiation" in line for line in lines)


def test_differences_have_marks_and_limits(screen: Console, tmp_path: Path) -> None:
    lines = part(printed(screen, write(tmp_path, (DDP, FAST), (FSDP, SLOW))), TITLES[1])
    i = next(i for i, line in enumerate(lines) if line.startswith("fsdp gloo 4"))
    assert lines[i].split()[3:] == ["0.68", "slower", "0.0=", "0.0=", "+14.0*", "-3.0*", "0.44*"]
    assert lines[i + 1].split()[:5] == ["vs", "ddp", "gloo", "4", "0.68-0.68"]
    assert "+14.0..+14.0" in lines[i + 1]


@pytest.mark.parametrize("blocks", [3, 6])
def test_it_is_printed_after_the_points_in_120_columns(screen: Console, tmp_path: Path, blocks: int) -> None:
    kinds = (DDP, ("ddp", "pneumo"), FSDP, ("fsdp", "pneumo"), HOROVOD)
    runs = [(kind, Network(i * MS, 100 * i * MS)) for i, kind in enumerate(kinds, 1)]
    text = printed(screen, write(tmp_path, *runs, ranks=8, blocks=blocks))
    assert text.index("Where the efficiency went") < text.index(TITLES[0]) < text.index("The same for each rank")
    for title in TITLES:
        lines = part(text, title)
        assert max(map(len, lines)) <= 120, title
        assert sum(line.startswith(("ddp", "fsdp", "horovod")) for line in lines) == (5 if title == TITLES[0] else 4)
    assert ("the range of the blocks" in text) == (blocks == 3)
    assert ("3 blocks more?" in text) == (blocks == 3)
    assert "…" not in text


@pytest.mark.parametrize("runs", [[], [simulated.SERIAL], [simulated.SERIAL, (*DDP, 2, 1)]])
def test_nothing_is_printed_of_one_parallel_run(
    screen: Console, tmp_path: Path, runs: list[tuple[str, str, int, int]]
) -> None:
    text = printed(screen, synthetic.write_result(tmp_path, runs))
    assert not any(title in text for title in TITLES)


def test_runs_that_share_no_block_or_have_no_records(screen: Console, tmp_path: Path) -> None:
    lengths = {0: dict.fromkeys(range(6), 10**9), 1: dict.fromkeys(range(6, 12), 10**9)}
    text = printed(screen, synthetic.write_result(tmp_path, [(*DDP, 2, 1), (*FSDP, 2, 1)], lengths=lengths))
    assert "no block in common" in text
    assert "nan" not in text.lower()


def said(path: Path) -> list[Sentence]:
    return rivalry(comparison(path))


def test_the_fastest_against_the_fastest_of_each_other_backend(tmp_path: Path) -> None:
    path = write(tmp_path, (DDP, SLOW), (("ddp", "pneumo"), FAST), (FSDP, SLOW), (("fsdp", "pneumo"), FAST))
    (one,) = said(path)
    found = re.fullmatch(
        r"On 4 ranks ddp pneumo is 1\.14 \(1\.14 to 1\.14\) times as fast as fsdp pneumo: (.*)\.", one.text
    )
    assert found is not None, one.text
    assert found[1] == "3.0 ms a step less transfer"
    assert one.run == 2
    assert one.figures["transfer_s"] == pytest.approx(-0.003)
    assert one.figures["speed"] == pytest.approx(33.25 / 29.25)


def test_with_one_backend_its_next_comm(tmp_path: Path) -> None:
    (one,) = said(write(tmp_path, (DDP, SLOW), (("ddp", "pneumo"), FAST)))
    assert one.text.startswith("On 4 ranks ddp pneumo is ")
    assert one.text.endswith("as ddp gloo: 6.5 ms a step less transfer.")


def test_equal_ones_are_said_to_be_and_ranges_of_few_blocks_are_not_spoken_of(tmp_path: Path) -> None:
    assert [one.text for one in said(write(tmp_path / "6", (DDP, FAST), (HOROVOD, FAST)))] == [
        "On 4 ranks ddp gloo and horovod mpi are equally fast within 5%."
    ]
    assert said(write(tmp_path / "5", (DDP, FAST), (FSDP, SLOW), blocks=5)) == []


def test_undecided_ones_are_said_to_be(tmp_path: Path) -> None:
    found = comparison(write(tmp_path, (DDP, FAST), (HOROVOD, FAST)))
    speed = Difference(
        estimate=Spread(median=1, low=0.8, high=1.25),
        verdict=Verdict(verdict="undecided", margin=0.05, more_blocks=9),
    )
    pairs = [msgspec.structs.replace(pair, speed=speed) for pair in found.pairs]
    (one,) = rivalry(msgspec.structs.replace(found, pairs=pairs))
    assert one.text == (
        "On 4 ranks ddp gloo and horovod mpi cannot be told apart: 0.80 to 1.25 times as fast; about 9 more blocks "
        "would tell."
    )


def difference(seconds: float, verdict: VerdictName) -> Difference:
    spread = Spread(median=seconds, low=seconds, high=seconds)
    return Difference(estimate=spread, verdict=Verdict(verdict=verdict, margin=0.05))


def test_two_causes_are_told_and_the_largest_against_them(tmp_path: Path) -> None:
    listed = comparison(write(tmp_path, (DDP, FAST), (FSDP, SLOW)))
    seconds: dict[str, Difference | None] = dict.fromkeys(listed.pairs[0].seconds)
    seconds |= {"outside_s": difference(0.0123, "slower"), "peer_wait_s": difference(-0.002, "faster")}
    seconds |= {"off_cpu_s": difference(0.0099, "slower")}
    seconds |= {"queue_and_transfer_s": difference(-0.12, "faster"), "exposed_s": difference(-0.122, "faster")}
    pair = Pair(
        ours=1,
        theirs=2,
        blocks=6,
        interval_kind="interval",
        bandwidth=None,
        seconds=seconds,
        speed=difference(1.5, "faster"),
    )
    (one,) = rivalry(Rivals(ranks=4, threads=2, runs=listed.runs, pairs=[pair]))
    assert one.text == (
        "On 4 ranks of 2 threads ddp gloo is 1.50 (1.50 to 1.50) times as fast as fsdp gloo: 120 ms a step less queue "
        "and transfer, 2.0 ms less peer wait, 12 ms more outside communication (waiting for a core: 9.9)."
    )
    terms = {"queue_and_transfer_s", "peer_wait_s", "outside_s", "off_cpu_s"}
    assert one.figures.keys() == {"speed", "low", "high"} | terms


def test_a_difference_without_a_part_that_explains_it(tmp_path: Path) -> None:
    listed = comparison(write(tmp_path, (DDP, FAST), (FSDP, SLOW)))
    parts: dict[str, Difference | None] = dict.fromkeys(listed.pairs[0].seconds)
    pair = Pair(
        ours=2,
        theirs=1,
        blocks=6,
        interval_kind="interval",
        bandwidth=None,
        seconds=parts,
        speed=difference(0.5, "slower"),
    )
    (one,) = rivalry(Rivals(ranks=4, threads=1, runs=listed.runs, pairs=[pair]))
    assert "2.00 (2.00 to 2.00) times as fast as fsdp gloo: no single part of the step is known" in one.text


def test_the_run_of_an_entry_is_named_as_elsewhere(screen: Console, tmp_path: Path) -> None:
    made = [simulated.train(entry(i, *kind, 2, 2), simulated.even(2), FAST) for i, kind in enumerate((DDP, FSDP))]
    lines = part(printed(screen, simulated.write(tmp_path, made, [(*DDP, 2, 2), (*FSDP, 2, 2)])), TITLES[1])
    assert any(line.startswith("fsdp gloo 2x2") for line in lines)
    assert any(line.startswith("  vs ddp gloo 2x2") for line in lines)
