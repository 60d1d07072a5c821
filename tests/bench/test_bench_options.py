"""The benchmarks' command line and findings, without ranks."""

import io
import json
from pathlib import Path

import pytest

from pneumo.bench.findings import Findings, per_cent, signed
from pneumo.bench.options import BENCHMARKS, Options, load, parse
from pneumo.errors import Refused
from pneumo.study.statistics import Estimate
from pneumo.study.tables import make_console


def test_flags_are_read() -> None:
    flags = ["timing", "--seconds", "5", "--size", "32", "--global-batch", "8", "--json", "x.json"]
    assert parse(flags) == ("timing", Options(seconds=5, size=32, global_batch=8, json=Path("x.json")))


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["timin"], "did you mean timing?"),
        ([], "known: timing"),
        (["timing", "timing"], "one benchmark"),
        (["timing", "--second", "5"], "did you mean --seconds?"),
        (["timing", "--seconds", "0"], "--seconds 0"),
        (["timing", "--seconds", "inf"], "--seconds inf"),
        (["timing", "--size", "30"], "--size 30"),
        (["timing", "--global-batch", "-1"], "--global-batch -1"),
    ],
)
def test_refusals(flags: list[str], words: str) -> None:
    with pytest.raises(Refused) as refused:
        parse(flags)
    assert words in str(refused.value)


def test_help_names_every_benchmark(capsys: pytest.CaptureFixture[str]) -> None:
    assert parse(["--help"]) is None
    text = capsys.readouterr().out
    assert all(name in text for name in BENCHMARKS)


@pytest.mark.parametrize("name", BENCHMARKS)
def test_every_benchmark_of_the_table_is_there(name: str) -> None:
    pytest.importorskip("torch")
    assert callable(load(name))


def test_findings_in_the_file_and_on_the_screen() -> None:
    found = Findings({"ranks": 2, "cores": 2})
    found.add("a stamp", Estimate(3.5, 3.4, 3.6, 0.95), "us")
    found.add("by parts", 61.0, "us")
    found.add_ratio("step with timing / without: serial 1", Estimate(1.002, 0.999, 1.004, 0.96))
    found.table("Parts", ("part<", "us"), [("a stamp", "3.50")])
    found.explain([("us", "microseconds")])
    content = json.loads(found.encode())
    assert content["ranks"] == 2
    assert content["rows"][0] == {
        **{"name": "a stamp", "value": 3.5, "unit": "us"},
        **{"low": 3.4, "high": 3.6, "confidence": 0.95},
    }
    assert content["rows"][1] == {"name": "by parts", "value": 61.0, "unit": "us"}
    assert content["ratios"] == [
        {
            **{"name": "step with timing / without: serial 1", "median": 1.002},
            **{"low": 0.999, "high": 1.004, "confidence": 0.96},
        }
    ]
    text = io.StringIO()
    found.show(make_console(text))
    assert "a stamp" in text.getvalue()
    assert "microseconds" in text.getvalue()


def test_how_intervals_are_written() -> None:
    assert per_cent(Estimate(1.002, 0.999, 1.004, 0.95)) == "+0.20 -0.10..+0.40"
    assert signed(Estimate(0.75, -0.5, 1.0, 0.95)) == "+0.75 -0.50..+1.00"
