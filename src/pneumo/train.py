"""The training loop. There is one, for every model and backend."""

import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pneumo import backends, models
from pneumo.backends.base import Place, local_bytes
from pneumo.comm.groups import Groups
from pneumo.comm.small_sum import TimedSum
from pneumo.config import Study
from pneumo.data.loader import Batch, Loader, evaluation
from pneumo.data.split import Split
from pneumo.data.store import Store
from pneumo.errors import PneumoError
from pneumo.inject import Disturbance
from pneumo.models.task import Answers, Share, Team
from pneumo.plan import Run
from pneumo.process import PeakMemory
from pneumo.timing.breakdown import Interval
from pneumo.timing.steps import Timing
from pneumo.world import World

Row = dict[str, Any]
EVALUATION_BATCH = 50
FIRST_ALONE = 1 << 33  # what is done alone is numbered from, before the step of that number less this
FIRST_BETWEEN = 1 << 34  # what is answered between two blocks is numbered from, beyond all training steps
FIRST_SAVED = 1 << 35  # what a checkpoint is made of is numbered from


@dataclass(frozen=True, slots=True)
class Block:
    """What one rank brings back: rows of steps.parquet and collectives.parquet, and of sampled steps the intervals."""

    steps: list[Row] = field(default_factory=list)
    collectives: list[Row] = field(default_factory=list)
    intervals: dict[int, list[Interval]] = field(default_factory=dict)

    def spans(self, run: int, rank: int) -> list[Row]:
        """Rows of spans.parquet; made here, and not while the ranks are in the midst of a block."""
        found = [(run, rank, step, *interval) for step, intervals in self.intervals.items() for interval in intervals]
        return [dict(zip(("run", "rank", "step", "phase", "begin_ns", "end_ns"), row, strict=True)) for row in found]


@dataclass(frozen=True, slots=True)
class Sizes:
    """The memory of a training on one rank, in bytes; `parameters` counts the whole model's."""

    parameters: int
    gradient_bytes: int
    state_bytes: int
    step_peak_bytes: int


@dataclass(frozen=True, slots=True)
class Answered:
    """What one rank answered of a part: positions in the store's index, int64 (n,), and the answers to these images."""

    positions: np.ndarray
    answers: Answers


class Training:
    """One run on this rank, timed by `timing`: its model stays alive from block to block and sleeps between them.

    `total_steps` is how many steps are going to be made; the schedule of a rate depends on it.
    """

    def __init__(
        self,
        run: Run,
        study: Study,
        store: Store,
        split: Split,
        world: World,
        groups: Groups,
        timing: type[Timing] = Timing,
    ) -> None:
        self.run, self._study, self._store, self._split, self._world = run, study, store, split, world
        self.comm = world.first(run.ranks)
        self.active = self.comm is not None
        self.next_step = 0
        self.total_steps = 1
        self._peak_bytes = self._rows_answered = 0
        self._prepared = False
        if not self.active:
            return
        device = torch.device("cpu")
        if run.device == "cuda":
            device = torch.device("cuda", world.local_rank % torch.cuda.device_count())
            torch.cuda.set_device(device)  # FSDP2, NCCL and `synchronize` take the current one
        self._timing = timing(torch.cuda.synchronize if run.device == "cuda" else lambda: None)
        recorder = self._timing.recorder
        place = Place(self.comm, groups.get(run.comm, run.ranks), device)
        self._disturbance = Disturbance(study.inject, self.comm.rank, run.ranks)
        recorder.delay_s = self._disturbance.delay_s("comm")
        self._sum = TimedSum(groups.small_sum(self.comm), recorder)
        self._groups = run.groups or run.ranks
        team = Team(run.ranks, self._sum, self._sum.begin)
        self._task = models.load(run.model)(study.settings, team)
        self._backend = backends.load(run.backend)(place, recorder)
        self._loader = self._make_loader(run.global_batch)
        self.total_steps = study.most_epochs * self.steps_per_epoch

    def _make_loader(self, global_batch: int) -> Loader:
        return Loader(
            self._store,
            self._split.train,
            size=self._study.settings.size,
            global_batch=global_batch,
            seed=self._study.seed,
            rank=self.comm.rank,
            world_size=self.run.ranks,
            augment=True,
            boxes=self._task.with_boxes,
            groups=max(1, self._groups * global_batch // self.run.global_batch),
        )

    @property
    def steps_per_epoch(self) -> int:
        """Global steps an epoch."""
        return -(-len(self._split.train) // self.run.global_batch)

    @contextmanager
    def awake(self) -> Iterator[None]:
        """The ranks of this run work inside; all others sleep at its end until they are done. Collective."""
        if self.active:
            self._world.watchdog.at("the start of", self.run)
            self._world.bind(self.run.ranks, self.run.threads)
            torch.set_num_threads(self.run.threads)
            self._backend.resume()
            self._prepare()
        yield
        if self.active:
            self._backend.pause()
        self._world.wait()

    def _prepare(self) -> None:
        """Build the model, the first time."""
        if self._prepared:
            return
        torch.manual_seed(self._study.seed)
        model = self._task.build().to(self._backend.place.device)
        self._parameters = sum(p.numel() for p in model.parameters())
        self._gradient_bytes = local_bytes(p for p in model.parameters() if p.requires_grad)
        self._backend.prepare(model, self._task.optimizer, self._task.parts(model))
        self._recipe = self._task.recipe(model, self._backend.optimizer, sharded=self._backend.sharded)
        self._prepared = True

    def advance(self, block: int, count: int, *, warmup: bool, sampled: Collection[int] = ()) -> Block:
        """Train `count` steps, keeping the intervals of those `sampled` (from 0); all ranks begin together."""
        peak, rows = PeakMemory(), Block()
        self._backend.model.train()
        peak.begin()
        self.comm.Barrier()
        self._timing.recorder.drop()
        with self._disturbance.neighbour():
            for step in range(self.next_step, self.next_step + count):
                self._world.watchdog.at("step", step, "of", self.run)
                self._do_alone(rows, step, block, warmup=warmup)
                images, loss = self._step(step)
                keep = step - self.next_step in sampled
                self._end_step(rows, step, block, kind="train", warmup=warmup, images=images, loss=loss, sampled=keep)
        self.next_step += count
        if not warmup:
            self._peak_bytes = max(self._peak_bytes, peak.end())
        return rows

    def _step(self, step: int) -> tuple[int, float | None]:
        """Train one step; returns this rank's images and their mean loss."""
        backend, task = self._backend, self._task
        self._timing.begin()
        with self._phase("data"):
            share = self._on_device(self._loader.batch(step))
        with self._phase("forward"):
            total = task.loss(backend.model, share)
        with self._phase("backward"):
            backend.backward(total / share.total)
        with self._phase("optimizer"):
            backend.synchronize()
            factor = task.factor(share)
            self._recipe.adjust(factor, min(1.0, step / self.total_steps))
            backend.step()
            self._recipe.follow()
        images = len(share.labels)
        return images, total.item() * factor / images if images else None

    def _do_alone(self, rows: Block, step: int, block: int, *, warmup: bool) -> None:
        """Do what this rank is asked to do alone before a step, while the others begin it."""
        for kind, seconds in self._disturbance.alone_s.items():
            self._timing.begin()
            with self._timing.phase("other"):
                time.sleep(seconds)
            self._end_step(rows, FIRST_ALONE + step, block, kind=kind, warmup=warmup, images=0)

    @contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        """A phase of a training step, with what is injected into it."""
        with self._timing.phase(name):
            self._disturbance.lengthen(name)
            yield

    def _end_step(
        self,
        rows: Block,
        step: int,
        block: int,
        *,
        kind: str,
        images: int,
        loss: float | None = None,
        warmup: bool = False,
        sampled: bool = False,
    ) -> None:
        """End the step, and add its row and those of its collectives."""
        timed = self._timing.end()
        where = {"run": self.run.run, "block": block, "rank": self.comm.rank, "step": step}
        row: Row = {**where, "kind": kind, "warmup": warmup, "images": images, "loss": loss}
        rows.steps.append(row | timed.columns)
        rows.collectives.extend({**where, "backend": self.run.comm, **call.columns()} for call in timed.collectives)
        if sampled:
            rows.intervals[step] = timed.intervals

    def _on_device(self, batch: Batch) -> Share:
        device = self._backend.place.device
        images, labels = torch.from_numpy(batch.images).to(device), torch.from_numpy(batch.labels).to(device)
        return Share(images, labels, batch.boxes, batch.lengths, batch.groups, batch.total)

    def evaluate(self, block: int) -> tuple[Block, dict[str, Answered]]:
        """Answer the calibration and the validation images, shared among the ranks of this run.

        Returns the timed rows and the answers of this rank to each part. Every image is answered once; all ranks take
        part in the same number of batches.
        """
        rows = Block()
        with self._evaluated():
            parts = {part: self._answer(rows, part, block, self.next_step) for part in ("calibrate", "validate")}
        return rows, parts

    def calibrate(self, block: int) -> tuple[Block, Answered]:
        """Answer the calibration images after a block of training, which then goes on as if nothing had been asked.

        Returns as `evaluate`.
        """
        rows = Block()
        with self._evaluated():
            answered = self._answer(rows, "calibrate", block, FIRST_BETWEEN)
        return rows, answered

    @contextmanager
    def _evaluated(self) -> Iterator[None]:
        """Inside, the model is the one that is evaluated and kept, alike on all ranks; afterwards all is as before.

        All ranks begin together, so that no row lies within a training step of another rank.
        """
        self._backend.model.eval()
        with torch.no_grad(), self._recipe.averaged(), _kept(self._backend.module.buffers()):
            self._task.settle()
            self.comm.Barrier()
            self._timing.recorder.drop()
            yield
        self._backend.evaluated()

    def _answer(self, rows: Block, part: str, block: int, first: int) -> Answered:
        """Answer the images of one part; a timed row for each batch and for counting them, numbered from `first`."""
        batches = evaluation(
            self._store,
            getattr(self._split, part),
            size=self._study.settings.size,
            rank=self.comm.rank,
            world_size=self.run.ranks,
            batch=EVALUATION_BATCH,
        )
        positions, scores = [np.zeros(0, np.int64)], [np.zeros(0, np.float32)]
        boxes: list[np.ndarray] = []
        while True:
            self._world.watchdog.at("the evaluation of", self.run)
            self._timing.begin()
            with self._timing.phase("data"):
                batch = next(batches, None)
                if batch is None:
                    break
                images = self._on_device(batch).images
            with self._timing.phase("forward"):
                self._disturbance.lengthen("validate")
                found = self._task.answers(self._backend.model, images)
            positions.append(batch.samples)
            scores.append(found.scores)
            boxes += found.boxes
            self._end_answer(rows, first, block, len(images))
        answered = Answered(np.concatenate(positions), Answers(np.concatenate(scores), tuple(boxes)))
        self._timing.begin()
        with self._timing.phase("other"):
            self._check_answered(part, len(answered.positions))
        self._end_answer(rows, first, block, 0)
        return answered

    def _end_answer(self, rows: Block, first: int, block: int, images: int) -> None:
        self._end_step(rows, first + self._rows_answered, block, kind="validate", images=images)
        self._rows_answered += 1

    def _check_answered(self, part: str, count: int) -> None:
        """Raise PneumoError unless all ranks together have answered every image of a part once; collective."""
        answered = int(self._sum(torch.tensor(count)))
        images = len(getattr(self._split, part))
        if answered != images:
            raise PneumoError(f"{self.run} answered {answered} of {images} images to {part}.")

    def sizes(self) -> Sizes:
        """The memory of this training on this rank."""
        state = [
            value for values in self._backend.optimizer.state.values() for value in values.values()
        ]  # a sharded optimizer's values are sharded as well
        module = self._backend.module
        gradients = local_bytes(p for p in module.parameters() if p.requires_grad)
        total = local_bytes([*module.parameters(), *module.buffers()]) + gradients + local_bytes(state)
        return Sizes(self._parameters, self._gradient_bytes, total, self._peak_bytes)

    def full_state(self) -> Mapping[str, torch.Tensor]:
        """The evaluated model's tensors, whole, by a serial model's names; collective over the run's ranks."""
        with torch.no_grad(), self._recipe.averaged():
            self._task.settle()
            return {name: value.clone() for name, value in self._backend.full_state().items()}

    def checkpoint(self, block: int, write: Callable[[Mapping[str, torch.Tensor]], None]) -> Block:
        """Gather the evaluated model on all ranks and have rank 0 write it, for which the others wait.

        Returns the timed rows: one for each of the two. All ranks begin together. Raises what `write` raises.
        """
        rows = Block()
        self._world.watchdog.at("the checkpoint of", self.run)
        self.comm.Barrier()
        self._timing.recorder.drop()
        self._timing.begin()
        with self._timing.phase("other"):
            state = self.full_state()
        self._end_step(rows, FIRST_SAVED, block, kind="checkpoint", images=0)
        self._timing.begin()
        with self._timing.phase("other"):
            if self.comm.rank == 0:
                write(state)
            self._sum(torch.zeros(1))
        self._end_step(rows, FIRST_SAVED + 1, block, kind="checkpoint", images=0)
        return rows

    def export(self, weights: Mapping[str, torch.Tensor], stem: Path) -> None:
        """Write the model of `full_state` for other programs, where it has such a form."""
        self._task.export(weights, stem)

    def close(self) -> None:
        """Free what the training holds."""
        if self.active:
            self._backend.close()
            self._timing.close()


@contextmanager
def _kept(tensors: Iterable[torch.Tensor]) -> Iterator[None]:
    """What happens to the tensors inside is undone."""
    before = [(tensor, tensor.clone()) for tensor in tensors]
    try:
        yield
    finally:
        for tensor, value in before:
            tensor.copy_(value)


def order(trainings: list[Training], block: int) -> list[Training]:
    """The order of the trainings within a block: it alternates, so that no run always follows the same one."""
    return trainings if block % 2 == 0 else trainings[::-1]


def step_seconds(block: Block) -> float:
    """The median wall time of a block's steps, in seconds, without the first where there are several."""
    times = [row["wall_ns"] / 1e9 for row in block.steps]
    return float(np.median(times[1:] or times))
