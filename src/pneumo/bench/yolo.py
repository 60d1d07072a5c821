"""The detector's training steps: ours and those of Ultralytics' own trainer on one core, and ours on all ranks.

Beside the ranks that train together stand ranks that train apart, each on its part of the images by itself: what is to
be had on these cores without any communication, since cores share caches and memory.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch

from pneumo.bench.findings import Findings
from pneumo.bench.pictures import Pictures, pictures
from pneumo.bench.rival import Rival
from pneumo.bench.turns import NO_TIME, Times, in_turns, no_collection, since, stamp
from pneumo.comm import missing
from pneumo.comm.bench.about import facts, header
from pneumo.comm.groups import Groups
from pneumo.config import Study
from pneumo.data.opencv import cv2
from pneumo.plan import Run, virtual_groups
from pneumo.progress import Progress
from pneumo.study.statistics import compare, median
from pneumo.train import Training

if TYPE_CHECKING:
    from pneumo.bench.options import Options
    from pneumo.world import World

STEPS = 4  # of a block
IMAGES = 320
MARGIN = 0.02
OURS, RIVAL = "pneumo, 1 rank", "Ultralytics, 1 process"


class _Alone:
    """The world as a rank sees it that trains alone while the others do the same: on its own core, with nobody."""

    def __init__(self, world: World) -> None:
        self._world = world

    def __getattr__(self, name: str) -> Any:
        return getattr(self._world, name)

    def first(self, _ranks: int) -> Any:
        """The communicator of this rank alone."""
        from mpi4py.MPI import COMM_SELF

        return COMM_SELF

    def bind(self, _ranks: int, threads: int) -> None:
        """Bind this rank as one of all."""
        self._world.bind(self._world.size, threads)


def run(options: Options, world: World) -> Findings:
    """Measure in turns; the findings are whole on rank 0. Collective."""
    torch.set_num_threads(1)
    runs = {OURS: _run(0, "serial", "none", 1, options, world)}
    if world.size > 1:
        comm = "gloo" if missing() else "pneumo"
        runs[_together(world)] = _run(1, "ddp", comm, world.size, options, world)
    for one in runs.values():
        world.first(one.ranks)
    wanted = [(one.comm, one.ranks) for one in runs.values() if one.comm != "none"]
    groups = Groups(world.comm, address=world.share(world.address), wanted=wanted, small=[world.size])
    with ExitStack() as stack:
        rival = None
        if world.rank == 0:
            world.bind(1, 1)  # which the rival inherits
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="pneumo-")))
            data = write_data_set(folder, options.size)
            rival = stack.enter_context(Rival(data, size=options.size, batch=options.global_batch))
        found = _measure(runs, rival, options, world, groups)
    groups.close()
    findings = Findings({**facts(world, horovod=False), "size": options.size, "global_batch": options.global_batch})
    if world.rank == 0:
        _tell(findings, found, options, world)
    return findings


def _run(number: int, backend: str, comm: str, ranks: int, options: Options, world: World) -> Run:
    """A run of the detector on so many ranks, with as many virtual groups for any number of them."""
    groups = virtual_groups(options.global_batch, world.size)
    return Run(number, "yolo", backend, comm, ranks, 1, options.global_batch, "cpu", groups)


def _part_of(run: Run, world: World) -> Run:
    """The run of a rank that trains apart, on its part of the images."""
    return replace(run, run=2, global_batch=run.global_batch // world.size, groups=max(1, run.groups // world.size))


def _together(world: World) -> str:
    return f"pneumo, {world.size} ranks"


def _apart(world: World) -> str:
    return f"pneumo, {world.size} ranks apart"


def _measure(
    runs: dict[str, Run], rival: Rival | None, options: Options, world: World, groups: Groups
) -> dict[str, Any]:
    """Train a block of each in turns; returns by name (rounds, 2) milliseconds of a step. Collective."""
    say, (store, split) = Progress(world), pictures(IMAGES)
    study = Study(model="yolo", size=options.size, global_batch=options.global_batch, threads=1)
    trainings = {name: Training(one, study, store, split, world, groups) for name, one in runs.items()}
    if world.size > 1:
        part = _part_of(runs[OURS], world)
        trainings[_apart(world)] = Training(part, study, store, split, cast("World", _Alone(world)), groups)
    variants: dict[str, Callable[[], Times]] = {
        name: lambda training=training: _block(training)  # type: ignore[misc]
        for name, training in trainings.items()
    }
    variants[RIVAL] = lambda: _rival_block(rival, world)
    say(f"warming up: {', '.join(variants)}")
    for variant in variants.values():
        variant()
    say(f"in turns: {', '.join(variants)}")
    with no_collection():
        found = in_turns(world.comm, variants, options.seconds)
    for training in trainings.values():
        training.close()
    return found


def _block(training: Training) -> Times:
    """Train a block; returns the milliseconds of a step, 0 on ranks that sleep. Collective."""
    took = NO_TIME
    with training.awake():
        if training.active:
            begin = stamp()
            training.advance(1, STEPS, warmup=False)
            took = since(begin, STEPS)
    return took


def _rival_block(rival: Rival | None, world: World) -> Times:
    """Have the rival train a block, while this world sleeps. Collective."""
    took = rival.block(STEPS) if rival is not None else NO_TIME
    world.wait()
    return took


def write_data_set(folder: Path, size: int, count: int = IMAGES) -> Path:
    """Write the benchmark's pictures as Ultralytics reads them; returns the file that describes them."""
    content = Pictures(count)
    for name in ("images", "labels"):
        (folder / name).mkdir()
    table = content.index
    for row, picture in enumerate(content.images(size)):
        cv2.imwrite(str(folder / "images" / f"{row}.png"), picture)
        lines = [
            f"0 {(x + width / 2) / side} {(y + height / 2) / side} {width / side} {height / side}\n"
            for (x, y, width, height), side in ((box, table["rows"][row]) for box in table["boxes"][row])
        ]
        (folder / "labels" / f"{row}.txt").write_text("".join(lines))
    described = folder / "data.yaml"
    described.write_text(f"path: {folder}\ntrain: images\nval: images\nnames:\n  0: opacity\n")
    return described


def _tell(findings: Findings, found: dict[str, Any], options: Options, world: World) -> None:
    """Add the figures, and the tables that say them."""
    about = dict(header({**findings.about, "shared": False}, "the detector's training steps"))
    about.pop("Intel MPI")
    images = f"{options.global_batch} images of {options.size} x {options.size}"
    findings.explain([*about.items(), ("a step", f"{images}, in all; 1 thread a rank or process")])
    lines = []
    for name, times in found.items():
        ms, rate = median(times[:, 0]), median(1000 * options.global_batch / times[:, 0])
        findings.add(f"step: {name}", ms, "ms")
        findings.add(f"throughput: {name}", rate, "images/s")
        faster = _faster(times, found[RIVAL]) if name != RIVAL else None
        speedup = _faster(times, found[OURS]) if name not in (RIVAL, OURS) else None
        if faster is not None:
            findings.add_ratio(f"throughput: {name} / {RIVAL}", faster)
        if speedup is not None:
            findings.add_ratio(f"throughput: {name} / {OURS}", speedup)
        if name == _together(world):
            findings.add_ratio(f"throughput: {name} / {_apart(world)}", _faster(times, found[_apart(world)]))
        figures = (f"{ms.value:.0f} {ms.low:.0f}-{ms.high:.0f}", f"{rate.value:.1f}")
        lines.append((name, *figures, *("" if one is None else _times(one) for one in (faster, speedup))))
    headers = ("training<", "ms a step\nlow-high", "images\n/s", "x Ultralytics\nlow-high", "x 1 rank\nlow-high")
    rounds = len(found[OURS])
    findings.table(f"Training steps of yolov8n: {rounds} rounds of {STEPS} steps of each, in turns", headers, lines)
    findings.explain(
        (
            ("Ultralytics", "its DetectionTrainer: no mosaic, no validation, an update a batch, images in memory"),
            ("pneumo", "with its augmentation, batch norm over virtual groups, clipping, averaging and timing"),
            *(
                [
                    (
                        "apart",
                        "each rank on its part of the images by itself: what these cores give without communication",
                    )
                ]
                if world.size > 1
                else []
            ),
            ("x", "times the throughput: the ratio of Hodges and Lehmann over the rounds, with its 95 % interval"),
            *(
                [("crowded", f"{world.size} ranks share {world.total_cores} cores")]
                if world.size > world.total_cores
                else []
            ),
        )
    )


def _faster(ours: Any, theirs: Any) -> Any:
    """How many times the throughput of theirs ours is."""
    found = compare(dict(enumerate(theirs[:, 0])), dict(enumerate(ours[:, 0])), MARGIN)
    assert found is not None, "the rounds are the same"
    return found.ratio


def _times(ratio: Any) -> str:
    return f"{ratio.value:.2f} {ratio.low:.2f}-{ratio.high:.2f}"
