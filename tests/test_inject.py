"""--inject: how it is written, what is refused, and whom it disturbs."""

import os
import time
from pathlib import Path

import pytest

from pneumo.config import parse
from pneumo.errors import Refused
from pneumo.inject import Disturbance, Injection


def injections(*flags: str) -> tuple[Injection, ...]:
    command = parse([word for flag in flags for word in ("--inject", flag)])
    assert command is not None
    return command.study.inject


def test_what_can_be_written() -> None:
    assert injections() == ()
    assert injections("rank=1,phase=backward,delay=20ms") == (Injection(1, "backward", 0.02),)
    assert injections("phase=comm,delay=1.5s,rank=all") == (Injection(None, "comm", 1.5),)
    assert injections("rank=0,cause=busy") == (Injection(0, None, 0.0, "busy"),)
    assert injections("rank=2,phase=forward,delay=1ms,cause=compute") == (Injection(2, "forward", 0.001, "compute"),)
    assert injections("rank=0,phase=validate,cause=alone,delay=1s") == (Injection(0, "validate", 1.0, "alone"),)
    for phase in ("validate", "checkpoint"):
        assert injections(f"rank=0,phase={phase},delay=1s") == (Injection(0, phase, 1.0, "alone"),)
    assert injections("rank=0,phase=validate,delay=1s,cause=sleep") == (Injection(0, "validate", 1.0),)
    assert injections("rank=all,phase=validate,delay=1s") == (Injection(None, "validate", 1.0),)
    repeated = injections("rank=all,phase=optimizer,cause=replicated,delay=8ms")
    assert repeated == (Injection(None, "optimizer", 0.008, "replicated"),)


@pytest.mark.parametrize("flags", [("A,B",), ("A;B",), ("A", "B")])
def test_several_causes(flags: tuple[str, ...]) -> None:
    one, two = "rank=0,phase=data,delay=5ms", "rank=1,phase=forward,delay=300us"
    found = injections(*(flag.replace("A", one).replace("B", two) for flag in flags))
    assert found == (Injection(0, "data", 0.005), Injection(1, "forward", 0.0003))


def test_a_file_says_it_as_a_list_or_as_a_text(tmp_path: Path) -> None:
    file = tmp_path / "study.toml"
    one, two = "rank=0,phase=data,delay=5ms", "rank=1,cause=busy"
    for text in (f'["{one}", "{two}"]', f'"{one};{two}"'):
        file.write_text(f"inject = {text}\n")
        command = parse([str(file)])
        assert command is not None
        assert command.study.inject == (Injection(0, "data", 0.005), Injection(1, None, 0.0, "busy"))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("rank=1,phase=bakward,delay=20ms", "did you mean backward"),
        ("rank=1,phase=backward", "delay missing"),
        ("phase=backward,delay=1ms", "rank missing"),
        ("rank=one,phase=backward,delay=1ms", "neither a number nor all"),
        ("rank=1,phase=backward,delay=20", "us, ms or s"),
        ("rank=1,phase=backward,delay=61s", "at most 60 s"),
        ("rank=1,cause=bussy", "did you mean busy"),
        ("rank=1,cause=busy,delay=1ms", "has no delay"),
        ("rank=1,fase=data,delay=1ms", "did you mean phase"),
        ("rank=0,phase=validate,cause=alone", "delay missing"),
        ("rank=0,phase=backward,delay=1s,cause=alone", "acts in validate, checkpoint, not in backward"),
        ("rank=all,phase=validate,delay=1s,cause=alone", "name one rank"),
        ("rank=all,phase=checkpoint,delay=1s", "cause sleep acts in data, .*, not in checkpoint"),
        ("rank=0,phase=comm,delay=1s,cause=compute", "not in comm"),
        ("rank=0,phase=optimizer,delay=1s,cause=replicated", "write rank=all"),
        ("nonsense", "write it as in"),
    ],
)
def test_what_is_refused(text: str, words: str) -> None:
    with pytest.raises(Refused, match=words):
        injections(text)


def test_only_the_named_rank_of_several_is_disturbed() -> None:
    both = (Injection(1, "data", 0.5), Injection(None, "data", 0.25))
    assert Disturbance(both, rank=1, world_size=2).delay_s("data") == 0.75
    assert Disturbance(both, rank=0, world_size=2).delay_s("data") == 0.25
    assert Disturbance(both, rank=0, world_size=1).delay_s("data") == 0
    assert Disturbance(both, rank=1, world_size=2).delay_s("forward") == 0


def test_it_sleeps_as_long_as_it_says() -> None:
    begin = time.monotonic()
    Disturbance([Injection(0, "forward", 0.05)], rank=0, world_size=2).lengthen("forward")
    assert time.monotonic() - begin >= 0.05


@pytest.mark.parametrize("ranks", [1, 2])
def test_it_computes_as_long_as_it_says(ranks: int) -> None:
    begin = time.thread_time()
    Disturbance([Injection(0, "optimizer", 0.05, "compute")], rank=0, world_size=ranks).lengthen("optimizer")
    assert (time.thread_time() - begin >= 0.05) == (ranks > 1)


@pytest.mark.parametrize("ranks", [1, 2])
def test_what_is_replicated_the_reference_does_too(ranks: int) -> None:
    begin = time.thread_time()
    Disturbance([Injection(None, "backward", 0.02, "replicated")], rank=0, world_size=ranks).lengthen("backward")
    assert time.thread_time() - begin >= 0.02


def test_what_one_rank_does_alone() -> None:
    some = [Injection(0, "validate", 0.5, "alone"), Injection(0, "checkpoint", 0.25, "alone")]
    assert Disturbance(some, rank=0, world_size=2).alone_s == {"validate": 0.5, "checkpoint": 0.25}
    assert Disturbance(some, rank=1, world_size=2).alone_s == {}
    assert Disturbance(some, rank=0, world_size=1).alone_s == {}
    assert Disturbance(some, rank=0, world_size=2).delay_s("validate") == 0, "the validation of all is no longer"


def children() -> set[int]:
    path = f"/proc/self/task/{os.getpid()}/children"
    with open(path) as file:
        return {int(word) for word in file.read().split()}


def test_a_busy_neighbour_lives_as_long_as_the_block() -> None:
    before = children()
    with Disturbance([Injection(0, None, 0.0, "busy")], rank=0, world_size=2).neighbour():
        assert len(children() - before) == 1
    assert children() == before
    with Disturbance([Injection(1, None, 0.0, "busy")], rank=0, world_size=2).neighbour():
        assert children() == before
