"""Timing costs nothing: a collective's record, a stamp, a step's clock, and whole trainings with timing and without."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch

from pneumo.bench.findings import Findings, per_cent, signed
from pneumo.bench.on_and_off import MARGIN, STEPS, Pair, compare_trainings, stamp_cost, step_cost
from pneumo.bench.records import KINDS, Cost, reading_cost, record_cost
from pneumo.comm import missing
from pneumo.comm.bench.about import facts, header
from pneumo.comm.groups import Groups
from pneumo.config import Study
from pneumo.plan import Run
from pneumo.progress import Progress
from pneumo.study.cells import NOTHING, name_of
from pneumo.study.schema import RunEntry
from pneumo.study.statistics import Comparison, Estimate

if TYPE_CHECKING:
    from pneumo.bench.options import Options
    from pneumo.world import World

RECORDS, PARTS = 0.25, 0.05  # of the time; trainings have the rest
BUSY = 0.02


@dataclass(frozen=True, slots=True)
class Parts:
    """What timing does beside the hooks, in microseconds: of a record, of a stamp, of a step without collectives."""

    take: Estimate
    columns: Estimate
    stamp: Estimate
    step: Estimate


def run(options: Options, world: World) -> Findings:
    """Measure everything; the findings are whole on rank 0. Collective."""
    torch.set_num_threads(1)
    say, comms = Progress(world), ["gloo"] if missing() else ["pneumo", "gloo"]
    sizes = sorted({1, world.size})
    for ranks in sizes:
        world.first(ranks)
    wanted = [(comm, ranks) for ranks in sizes for comm in comms]
    groups = Groups(world.comm, address=world.share(world.address), wanted=wanted)
    share_s = RECORDS * options.seconds / (len(wanted) * len(KINDS))
    costs: list[Cost] = []
    for comm, ranks in wanted:
        say(f"the cost of a record: {comm} on {ranks} rank(s)")
        found = [record_cost(world, groups.get(comm, ranks), comm, ranks, kind, share_s) for kind in KINDS]
        costs += [cost for cost in found if cost is not None]
    parts = _parts(groups.get(comms[0], 1), world, PARTS * options.seconds / 3)
    pairs = _trainings(options, world, comms, groups, say)
    groups.close()
    findings = Findings(facts(world, horovod=False))
    if parts is not None:
        _tell(findings, costs, parts, pairs, options)
    return findings


def _parts(alone: object, world: World, seconds: float) -> Parts | None:
    """Measure the parts on rank 0, whose group of one rank is `alone`, while the others sleep; None there."""
    parts = None
    if world.rank == 0:
        world.bind(1, 1)
        parts = Parts(*reading_cost(alone, seconds), stamp_cost(seconds), step_cost(seconds))
    world.wait()
    return parts


def _trainings(options: Options, world: World, comms: Sequence[str], groups: Groups, say: Progress) -> list[Pair]:
    """Compare serial, and DDP and FSDP on all ranks where there are several."""
    study = Study(size=options.size, global_batch=options.global_batch, threads=1)
    kinds = [("serial", "none", 1)]
    if world.size > 1:
        kinds += [(backend, comm, world.size) for backend in ("ddp", "fsdp") for comm in comms]
    pairs = []
    for number, (backend, comm, ranks) in enumerate(kinds):
        one = Run(number, study.model, backend, comm, ranks, 1, options.global_batch, "cpu")
        say(f"training with timing and without: {one}")
        share_s = (1 - RECORDS - PARTS) * options.seconds / len(kinds)
        pairs.append(compare_trainings(one, study, world, groups, share_s))
    return pairs


def _tell(findings: Findings, costs: Sequence[Cost], parts: Parts, pairs: Sequence[Pair], options: Options) -> None:
    """Add all figures, and the tables that say them; on rank 0."""
    about = dict(header({**findings.about, "shared": False}, "what timing costs"))
    about.pop("Intel MPI")
    findings.explain([*about.items(), ("noise", "whatever else ran on these cores is in all of it")])
    _tell_records(findings, costs)
    _tell_parts(findings, parts)
    _tell_trainings(findings, pairs, costs, parts, options)


def _tell_records(findings: Findings, costs: Sequence[Cost]) -> None:
    lines = []
    for cost in costs:
        name = f"allreduce, {cost.kind}, {cost.comm} {cost.ranks}"
        findings.add(f"{name}: call", cost.call, "us")
        added = {"native": cost.native, "native, CPU": cost.native_cpu, "in Python": cost.in_python}
        for how, value in added.items():
            if value is not None:
                findings.add(f"{name}: record {how}", value, "us")
        figures = (NOTHING if value is None else signed(value) for value in added.values())
        lines.append((f"{cost.comm} {cost.ranks}", cost.kind, f"{cost.call.value:.1f}", *figures))
    headers = ("group<", "call<", "us a\ncall", "native record\n+us low..high", "its CPU\n+us low..high")
    findings.table("A record of an allreduce of 4 bytes", (*headers, "in Python\n+us low..high"), lines)
    findings.explain(
        (
            ("group", "library and ranks"),
            ("call", "blocking, or asynchronous with Work.wait, which is timed too"),
            ("native record", "added by the native layer's hooks, wall time of the slowest rank; CPU: of its thread"),
            ("in Python", "by the hooks that take their place where the native layer is not built"),
            ("low..high", "95 % interval of Hodges and Lehmann's difference, over bursts in turns"),
        )
    )


def _tell_parts(findings: Findings, parts: Parts) -> None:
    named = (
        ("take() of a record", parts.take),
        ("a record's columns", parts.columns),
        ("a stamp", parts.stamp),
        ("clock, phases and columns of a step", parts.step),
    )
    for name, value in named:
        findings.add(name, value, "us")
    lines = [(name, f"{value.value:.2f} {value.low:.2f}-{value.high:.2f}") for name, value in named]
    findings.table("The rest of timing, on one rank", ("part<", "us low-high"), lines)


def _tell_trainings(
    findings: Findings, pairs: Sequence[Pair], costs: Sequence[Cost], parts: Parts, options: Options
) -> None:
    lines = []
    for pair in pairs:
        name, parts_us = name_of(cast(RunEntry, pair.run)), _by_parts_us(pair, costs, parts)
        findings.add(f"step without timing: {name}", pair.off_ms, "ms")
        findings.add(f"timing adds to a step: {name}", pair.more_us, "us")
        findings.add(f"timing of a step by its parts: {name}", parts_us, "us")
        findings.add_ratio(f"step with timing / without: {name}", pair.ratio.ratio)
        findings.add_ratio(f"CPU of a step with timing / without: {name}", pair.cpu_ratio.ratio)
        findings.add_ratio(f"step without timing / without: {name}", pair.control.ratio)
        figures = (str(pair.rounds), f"{pair.off_ms.value:.1f}", per_cent(pair.ratio.ratio), _verdict(pair.ratio))
        alone = (f"{pair.more_us.value:+.0f}", f"{parts_us:.0f}", str(pair.collectives))
        ratios = (per_cent(pair.cpu_ratio.ratio), per_cent(pair.control.ratio))
        lines.append((name, *figures, *ratios, *alone))
    title = f"Steps of {options.global_batch} images of {options.size} x {options.size}, with timing and without"
    left = ("run<", "rounds", "without\nms", "with timing\n+% low..high", "verdict<", "its CPU\n+% low..high")
    right = ("without again\n+% low..high", "timing\n+us", "by parts\nus", "records\na step")
    findings.table(title, (*left, *right), lines)
    findings.explain([*_how_to_read(pairs)])


def _by_parts_us(pair: Pair, costs: Sequence[Cost], parts: Parts) -> float:
    """What timing does in a step, summed from what its parts cost by themselves."""
    mine = [c for c in costs if (c.comm, c.ranks, c.kind) == (pair.run.comm, pair.run.ranks, "async")]
    record_us = sum((c.native_cpu or c.in_python).value for c in mine) + parts.take.value + parts.columns.value
    return parts.step.value + pair.collectives * record_us


def _verdict(found: Comparison) -> str:
    if found.ratio.confidence is not None and found.ratio.high <= 1 + MARGIN:
        return f"at most {100 * MARGIN:.0f} %"
    if found.ratio.confidence is not None and found.ratio.low > 1 + MARGIN:
        return f"above {100 * MARGIN:.0f} %"
    return "undecided" + (f", {found.more_blocks} more" if found.more_blocks else "")


def _how_to_read(pairs: Sequence[Pair]) -> Iterator[tuple[str, str]]:
    yield (
        "rounds",
        f"each trains a block of {STEPS} steps with timing, without, and without again, in turns; a block's figure is "
        "the median of its steps, on the slowest rank",
    )
    yield (
        "with timing",
        "how much longer a step takes with it than without (the geometric mean of both): Hodges and Lehmann's ratio "
        "over the rounds, with its 95 % interval",
    )
    yield "its CPU", "the same of the main thread's CPU time, which other processes disturb less"
    yield "without again", "two trainings without timing against each other: what this machine can tell apart"
    yield "verdict", "at most 1 %: the whole interval is below it; undecided: about so many more rounds would decide"
    yield "by parts", "the costs above, which were measured with warm caches, summed for a step"
    busiest = max((pair.waited for pair in pairs), default=0.0)
    if busiest > BUSY:
        yield "busy", f"a rank was ready to run and had no core for up to {busiest:.0%} of the time: measure again"
