"""The trainings of a study in their world: warmed up, advanced in turn, evaluated, and written down."""

import os
import sys
import time
from contextlib import suppress
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from pneumo import process
from pneumo.backends import COMMS
from pneumo.config import Command
from pneumo.models import MODELS
from pneumo.plan import Plan, Run, make_sampling, make_schedule
from pneumo.progress import Progress
from pneumo.world import World

if TYPE_CHECKING:
    from pneumo.data.split import Split
    from pneumo.data.store import Store
    from pneumo.shares import Shares
    from pneumo.study.results import ResultFolder
    from pneumo.study.schema import DataFacts, Effort, RunFile
    from pneumo.timing.offsets import Offsets
    from pneumo.train import Block, Training

DISTURBED = 1.5  # times as long as before: the second look at the same steps was not left in peace
FEW_STEPS = 150  # of a detector: with 75 its mAP@0.5 was below 0.1 on the sample, with 320 above 0.8
SWITCH_S = 0.2  # to put one training to sleep and wake the next, Horovod's start included


class Job:
    """The trainings of a study in their world, and the result that they write; rank 0 holds the result."""

    def __init__(
        self,
        command: Command,
        plan: Plan,
        world: World,
        store: "Store",
        split: "Split",
        results: "ResultFolder",
        efforts: "list[Effort]",
        say: Progress,
    ) -> None:
        from pneumo.early_stopping import EarlyStopping

        self._command, self._study, self._plan, self._world = command, command.study, plan, world
        self._store, self._split, self._results, self._say = store, split, results, say
        self._efforts = efforts
        self._schedule = make_schedule(self._study, plan, len(split.train))
        self._sampling = make_sampling(plan, self._schedule)
        self._stopping = EarlyStopping(self._study, self._schedule.blocks, world, store, split)
        self._sizes: dict[int, Any] = {}
        self._shares: dict[int, Shares] = {}
        self._offsets: Offsets | None = None
        self._started = _utc_now()

    def train(self) -> None:
        """Make the trainings, advance them block by block, and evaluate them."""
        world, study = self._world, self._study
        from pneumo.timing.offsets import Offsets

        self._offsets = offsets = Offsets(world.comm)
        world.run_on_first(lambda: self.write_run("running"))
        self._say("starting torch on all ranks")
        from pneumo.comm.groups import Groups
        from pneumo.train import Training

        if study.save:
            import pneumo.models.weights  # noqa: F401  # or the run that is saved first would pay for it in its account

        wanted = sorted({(r.comm, r.ranks) for r in self._plan.runs if r.comm in COMMS})
        sizes = sorted({r.ranks for r in self._plan.runs})
        for ranks in sizes:
            world.first(ranks)
        groups = Groups(world.comm, address=world.share(world.address), wanted=wanted, small=sizes)
        trainings = [Training(run, study, self._store, self._split, world, groups) for run in self._plan.runs]
        self._shares = self._make_shares(trainings, world, groups)
        begin = time.monotonic()
        self._warm_up(trainings, offsets, begin)
        for training in trainings:
            training.total_steps = self._schedule.total
        self._say(self._describe(len(trainings)))
        last = self._train_blocks(trainings, offsets, begin)
        self._say("evaluating on the validation patients")
        world.run_on_first(self._add_truths)
        for training in trainings:
            self._evaluate(training, last)
            offsets.sample()
        for training in (*trainings, *self._shares.values()):
            training.close()
        groups.close()

    def _warm_up(self, trainings: "list[Training]", offsets: "Offsets", begin: float) -> None:
        """Warm all trainings up, and shorten the schedule to what the budget allows by the steps that this took.

        Where the budget decides there is a second look, with some steps more to warm up, since whatever else the
        machine did for some seconds would otherwise shorten the whole study. It counts, unless it was disturbed itself.
        """
        schedule = self._schedule
        speed = self._look(trainings, schedule.warmup, offsets)
        steps = self._world.share(self._affordable(trainings, speed, begin))
        if steps < schedule.steps:
            more = max(1, steps // 8)
            for run, took in self._look(trainings, more, offsets).items():
                speed[run] = took if took < DISTURBED * speed[run] else speed[run]
            steps = self._world.share(self._affordable(trainings, speed, begin))
            if steps < 1:
                self._say(
                    f"the budget of {self._study.budget_s:.0f} s is too short for {schedule.blocks} blocks: taking one "
                    "step each"
                )
            warmup = schedule.warmup + more
            most = (schedule.asked - warmup) // schedule.blocks
            self._schedule = replace(schedule, warmup=warmup, steps=min(most, max(1, steps)))

    def _look(self, trainings: "list[Training]", count: int, offsets: "Offsets") -> dict[int, float]:
        """Advance all trainings by steps that warm them up; returns the seconds of a step of each run, on rank 0."""
        speed = {}
        for training in trainings:
            self._say.now_and_then(f"warming up {training.run}")
            speed[training.run.run] = self._advance(training, 0, count, warmup=True)
            offsets.sample()
        return speed

    def _train_blocks(self, trainings: "list[Training]", offsets: "Offsets", begin: float) -> int:
        """Advance the trainings in turn, a block each, until the last block; returns the evaluation's block.

        That is the last one. Where all stop before it, it is the one that would have come next: the block that they
        stop after has rows of kind validate already, and those of a block are accounted for from first to last.
        """
        from pneumo.train import order

        blocks, steps = self._schedule.blocks, self._schedule.steps
        for block in range(1, blocks + 1):
            for training in order(trainings, block):
                self._advance(training, block, steps, warmup=False)
                offsets.sample()
                self._say.now_and_then(self._left(block, blocks, begin))
            self._world.run_on_first(self._flush)
            if why := self._stopping.reason(block):
                self._say(why)
                return block + 1
        return blocks

    def _make_shares(self, trainings: "list[Training]", *where: Any) -> "dict[int, Shares]":
        """What times the shares of a step, by the serial runs that others with as many threads are compared with."""
        from pneumo.shares import Shares

        found: dict[int, Shares] = {}
        for run in (t.run for t in trainings if t.run.backend == "serial" and t.run.device == "cpu"):
            others = [t.run for t in trainings if t.run.ranks > 1 and t.run.threads == run.threads]
            sizes = sorted({other.global_batch // other.ranks for other in others} - {run.global_batch})
            if sizes:
                found[run.run] = Shares(sizes, run, self._study, self._store, self._split, *where)
        return found

    def _affordable(self, trainings: "list[Training]", speed: dict[int, float], begin: float) -> int:
        """The steps of each timed block, on rank 0: as scheduled, or as many as the budget allows by measured steps.

        Below 1 it is too short for all blocks.
        """
        budget_s, steps, blocks = self._study.budget_s, self._schedule.steps, self._schedule.blocks
        if self._world.rank != 0 or budget_s is None:
            return steps
        evaluations = 1 + sum(self._stopping.watches(block) for block in range(blocks + 1))
        images = evaluations * len(self._split.calibrate) + len(self._split.validate)
        # A forward pass takes about a third of a step, and ranks beyond the cores gain nothing.
        cores = self._world.total_cores
        evaluate_s = sum(
            0.4 * speed[trainings[0].run.run] / t.run.global_batch * images / min(t.run.ranks, cores) for t in trainings
        )
        shares_s = sum(share.images * speed[number] / share.run.global_batch for number, share in self._shares.items())
        left = budget_s - (time.monotonic() - begin) - evaluate_s
        left -= blocks * (len(trainings) * SWITCH_S + shares_s)
        return min(steps, int(left / (blocks * sum(speed.values()))))

    def _describe(self, runs: int) -> str:
        """What is trained: the same number of steps in every block, and what that leaves of the epochs and blocks."""
        plan, epochs = self._schedule, self._study.most_epochs
        text = f"training: {runs} runs in turns, {plan.warmup} steps to warm up, {plan.blocks} blocks of {plan.steps}"
        if plan.total < plan.asked:
            text += f"; {plan.asked - plan.total} of the {plan.asked} steps of {epochs} epochs are left out"
        if self._study.model == "yolo" and plan.total < FEW_STEPS:
            text += f"; after {plan.total} steps a detector finds little: more --budget or a smaller --size gives more"
        if plan.blocks < self._study.blocks:
            text += f"; {epochs} epoch(s) have too few steps for {self._study.blocks} blocks"
        if self._study.patience:
            text += f"; all stop early when none has got better for {self._study.patience} block(s)"
        return text

    def _advance(self, training: "Training", block: int, count: int, *, warmup: bool) -> float:
        """Advance one training by a block and keep its rows on rank 0; returns the seconds of a step there."""
        from pneumo.train import step_seconds

        took = 0.0
        with training.awake():
            if training.active:
                sampled = range(0) if warmup else self._sampling.of_block(count)
                rows = training.advance(block, count, warmup=warmup, sampled=sampled)
                self._keep(training, rows)
                took = step_seconds(rows)
                if training.run.run in self._shares:
                    self._keep(training, self._shares[training.run.run].time(block, warmup=warmup))
                if self._stopping.watches(block):
                    self._keep(training, self._stopping.watch(training, block))
        return took

    def _keep(self, training: "Training", rows: "Block") -> None:
        for rank, found in enumerate(training.comm.gather(rows) or ()):
            self._results.add_steps(found.steps)
            self._results.add_collectives(found.collectives)
            self._results.add_spans(found.spans(training.run.run, rank))

    def _flush(self) -> None:
        """Write the rows so far, and the offsets without which those of several hosts cannot be read; on rank 0."""
        self._results.flush()
        if self._offsets is not None and self._offsets.several:
            self.write_run("running")

    def _evaluate(self, training: "Training", block: int) -> None:
        from pneumo import answers

        with training.awake():
            if not training.active:
                return
            rows, parts = training.evaluate(block)
            self._keep(training, rows)
            sizes = training.comm.gather(training.sizes())
            gathered = training.comm.gather(
                answers.rows(training.run.run, self._store.index, parts, self._split.person)
            )
            if training.comm.rank == 0:
                largest = max(s.state_bytes for s in sizes)
                peak = max(s.step_peak_bytes for s in sizes)
                self._sizes[training.run.run] = replace(sizes[0], state_bytes=largest, step_peak_bytes=peak)
                for found in gathered:
                    self._results.add_predictions(found.predictions)
                    self._results.add_detections(found.detections)
            if self._study.save:
                self._keep(training, training.checkpoint(block, lambda state: self._save(training, state)))

    def _add_truths(self) -> None:
        """Keep the true boxes of the images that are evaluated, where a model is to find them; on rank 0."""
        from pneumo import answers

        if MODELS[self._study.model].answers == "boxes":
            parts = {part: getattr(self._split, part) for part in ("calibrate", "validate")}
            self._results.add_truths(answers.truths(self._store.index, parts))

    def _save(self, training: "Training", state: Any) -> None:
        from pneumo.models.weights import write_safetensors
        from pneumo.study.results import write_atomic

        run = training.run
        folder = self._results.path / "checkpoints"
        folder.mkdir(exist_ok=True)
        name = f"{run.model}-{run.backend}-{run.comm}-{run.ranks}x{run.threads}"
        tensors = {key: value.detach().cpu().contiguous() for key, value in state.items()}
        study = self._study
        size = study.settings.size
        write_safetensors(tensors, folder / f"{name}.safetensors", model=run.model, size=size)
        training.export(tensors, folder / name)
        about = {**asdict(run), "size": size, "seed": study.seed, "steps": training.next_step}
        write_atomic(folder / f"{name}.json", msgspec.json.encode(about))

    def _left(self, block: int, blocks: int, begin: float) -> str:
        done = (block - 0.5) / blocks
        took = time.monotonic() - begin
        about = "at most about" if self._stopping.watches(block) else "about"
        return f"block {block} of {blocks}, {about} {took / done - took:.0f} s left"

    def write_run(self, state: Any) -> None:
        """Write run.json; on rank 0."""
        self._results.write_run(self._run_file(state))

    def fail(self) -> None:
        """Mark the result as failed; on the rank that says so, which may be any, and may say more than one."""
        from pneumo.study.results import load_run, write_json

        if self._world.rank == 0:
            with suppress(Exception):  # the disk may be full: that it failed still has to be said
                self._results.flush()
        failed = msgspec.structs.replace(load_run(self._results.path), state="failed", ended=_utc_now())
        write_json(self._results.path / "run.json", failed)

    @cached_property
    def _data(self) -> "DataFacts":
        from pneumo import provenance
        from pneumo.data.rsna import read_mapping

        mapping = read_mapping(self._study.mapping) if self._study.mapping else None
        return provenance.data_facts(self._store, self._split, mapping)

    def _run_file(self, state: Any) -> "RunFile":
        from pneumo import provenance
        from pneumo.study.schema import RunEntry, RunFile

        world, study = self._world, self._study
        entries = []
        for run in self._plan.runs:
            sizes = self._sizes.get(run.run)
            entries.append(
                RunEntry(
                    **asdict(run),
                    answers=MODELS[run.model].answers,  # type: ignore[arg-type]  # one of the two words
                    binding=world.binding(run.ranks, run.threads),
                    parameters=sizes.parameters if sizes else 0,
                    gradient_bytes=sizes.gradient_bytes if sizes else 0,
                    state_bytes=sizes.state_bytes if sizes else None,
                    step_peak_bytes=sizes.step_peak_bytes if sizes else None,
                    note=self._note(run),
                )
            )
        return RunFile(
            study=study.study,
            started=self._started,
            ended=None if state == "running" else _utc_now(),
            state=state,
            command=sys.argv,
            config={k: str(v) if isinstance(v, Path) else v for k, v in asdict(study).items()},
            runs=entries,
            absent=list(self._plan.missing),
            cores=world.total_cores,
            hosts=world.hosts,
            warmup_steps=self._schedule.warmup,
            sampling=self._sampling,
            data=self._data,
            preprocessing=self._efforts,
            clock=self._offsets.clock() if self._offsets else None,
            early_stopping=self._stopping.record(),
            provenance=provenance.collect(world.mpi_version(), self._study.weights),
        )

    def _note(self, run: Run) -> str | None:
        """What has to be said of a run beside its figures."""
        if run.backend != "horovod":
            return None
        note = f"cycle time {os.environ.get('HOROVOD_CYCLE_TIME', '1')} ms"
        if os.environ.get(process.YIELD) == "1":
            note += f"; MPI yields its core while it waits ({process.YIELD}=1)"
        if MODELS[run.model].answers == "boxes":
            note += "; normalisers and statistics of batch norm travel by small sums, not by Horovod"
        return note

    def finish(self) -> None:
        """Write what is left, derive the summary and print it; on rank 0."""
        from pneumo.study.results import write_atomic
        from pneumo.study.summary import derive
        from pneumo.study.tables import make_console, show
        from pneumo.study.trace import write_trace

        self._results.flush()
        self.write_run("done")
        derived = derive(self._results.path, write=True)
        show(self._results.path, make_console(), derived)
        with (self._results.path / "log.txt").open("a") as log:
            show(self._results.path, make_console(log), derived)
        if self._study.rank_batch:
            self._say(
                "weak scaling: all runs made the same number of steps, so k ranks trained for k times the epochs of "
                "one: accuracy and AUC compare unequal trainings"
            )
        if self._study.trace:
            self._say(f"open the trace in ui.perfetto.dev: {write_trace(self._results.path)}")
        if self._command.json:
            write_atomic(self._command.json, (self._results.path / "summary.json").read_bytes())


def _utc_now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
