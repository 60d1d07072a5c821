"""Flags, TOML and what is refused, with the words that help."""

from pathlib import Path

import pytest

from pneumo.config import parse, seconds
from pneumo.errors import Refused


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--backends", "ddpp"], ["ddpp", "did you mean ddp?", "fsdp"]),
        (["--bakends", "ddp"], ["--bakends", "did you mean --backends?"]),
        (["--model", "cn"], ["cn", "cnn", "yolo"]),
        (["--comm", "glo"], ["glo", "did you mean gloo?"]),
        (["--epochs", "-1"], ["--epochs", "-1"]),
        (["--epochs", "many"], ["epochs", "many"]),
        (["--ranks", "1,x"], ["1,x"]),
        (["--ranks", "0"], ["0"]),
        (["--budget", "3 weeks"], ["3 weeks", "240s"]),
        (["--size", "130"], ["130", "multiple of 4"]),
        (["--learning-rate", "0"], ["0"]),
        (["--global-batch", "8", "--rank-batch", "4"], ["--global-batch", "--rank-batch"]),
        (["/nonexistent.toml"], ["/nonexistent.toml"]),
        (["foo"], ["foo", "TOML"]),
        (["smoke.tml"], ["smoke.tml", "TOML"]),
        (["--ranks", "1", "2"], ["2:", "1,2"]),
        (["one.toml", "two.toml"], ["two.toml"]),
        (["one.toml", "--strict", "yes"], ["yes"]),
        (["--study", "a/b"], ["--study", "a/b"]),
        (["--study", "latest"], ["--study", "latest"]),
        (["--seed", str(2**63)], ["--seed", str(2**63)]),
        (["--freeze", "3"], ["--freeze", "--model yolo"]),
        (["--batch-norm", "sync"], ["--batch-norm", "--model yolo", "cnn"]),
        (["--model", "yolo", "--freeze", "3"], ["--freeze 3", "--weights FILE"]),
        (["--model", "yolo", "--groups", "0"], ["--groups 0", "at least 1"]),
        (["--model", "yolo", "--groups", "4", "--batch-norm", "sync"], ["--groups", "ghost"]),
        (["--model", "yolo", "--groups", "4", "--rank-batch", "8"], ["--groups", "--global-batch"]),
        (["--patience", "-1"], ["--patience -1", "at least 0"]),
        (["--patience", "3"], ["--patience 3", "at least 7 --blocks"]),
        (["--patience", "8", "--blocks", "8"], ["--patience 8", "at least 10 --blocks"]),
    ],
)
def test_refusals_name_what_is_wrong(argv: list[str], words: list[str]) -> None:
    with pytest.raises(Refused) as caught:
        parse(argv)
    text = str(caught.value)
    assert all(word in text for word in words), text
    assert "\n" not in text


def test_flags_override_the_file_and_the_file_the_defaults(tmp_path: Path) -> None:
    toml = tmp_path / "small.toml"
    toml.write_text('ranks = [1, 2]\nblocks = 3\nstrict = true\nbackends = ["serial", "ddp"]\n')
    command = parse([str(toml), "--blocks", "4", "--no-strict"])
    assert command is not None
    study = command.study
    assert (study.ranks, study.blocks, study.strict, study.study) == ((1, 2), 4, False, "small")
    assert (study.backends, study.seed) == (("serial", "ddp"), 0)
    assert not study.trace


@pytest.mark.parametrize(("argv", "expected"), [([], True), (["--no-trace"], False)])
def test_a_trace_is_asked_for_by_flag_or_file(tmp_path: Path, argv: list[str], expected: bool) -> None:
    toml = tmp_path / "small.toml"
    toml.write_text("trace = true\n")
    command = parse([str(toml), *argv])
    assert command is not None
    assert command.study.trace is expected


def test_the_value_of_a_flag_is_never_the_file(tmp_path: Path) -> None:
    toml = tmp_path / "small.toml"
    toml.write_text("blocks = 3\n")
    for argv in (["--out", "my.toml", str(toml)], [str(toml), "--out=my.toml"], ["--out", "my.toml"]):
        command = parse(argv)
        assert command is not None
        assert command.study.out == Path("my.toml")
        assert (command.study.study, command.study.blocks) == (("small", 3) if str(toml) in argv else ("main", 6))


def test_what_is_named_twice_is_meant_once() -> None:
    command = parse(["--backends", "fsdp,ddp,fsdp", "--comm", "gloo,gloo", "--ranks", "2,1,2"])
    assert command is not None
    assert (command.study.backends, command.study.comm, command.study.ranks) == (("fsdp", "ddp"), ("gloo",), (2, 1))


def test_help_is_shown_by_one_rank_only(capsys: pytest.CaptureFixture[str]) -> None:
    assert parse(["--help"], show_help=False) is None
    assert capsys.readouterr().out == ""
    assert parse(["--help"]) is None
    shown = capsys.readouterr().out
    assert all(flag in shown for flag in ("--ranks", "--global-batch", "--dry-run"))


def test_patience_is_off_unless_it_is_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    toml = tmp_path / "patient.toml"
    toml.write_text("patience = 3\nblocks = 20\n")
    for argv, expected in (([], 0), ([str(toml)], 3), ([str(toml), "--patience", "0"], 0)):
        command = parse(argv)
        assert command is not None
        assert command.study.patience == expected
    parse(["--help"])
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "the weights of the stop, not the best ones" in shown


def test_an_unknown_key_is_refused_with_the_nearest(tmp_path: Path) -> None:
    toml = tmp_path / "typo.toml"
    toml.write_text("globel_batch = 32\n")
    with pytest.raises(Refused, match=r"globel_batch.*did you mean global_batch"):
        parse([str(toml)])


@pytest.mark.parametrize(("text", "value"), [("240s", 240), ("4m", 240), ("1.5h", 5400), ("30", 30)])
def test_durations(text: str, value: float) -> None:
    assert seconds(text) == value


@pytest.mark.parametrize(
    "path", sorted((Path(__file__).parents[1] / "experiments").glob("*.toml")), ids=lambda p: p.stem
)
def test_the_experiments_are_valid(path: Path) -> None:
    command = parse([str(path)])
    assert command is not None
    assert command.study.study == path.stem
