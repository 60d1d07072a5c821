"""The training loop. There is one, for every model and backend."""

import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from pneumo import backends, models
from pneumo.backends.base import Place, local_bytes
from pneumo.comm.groups import Groups
from pneumo.config import Study
from pneumo.data.loader import Batch, Loader, evaluation
from pneumo.data.split import Split
from pneumo.data.store import Store
from pneumo.errors import PneumoError
from pneumo.inject import Disturbance
from pneumo.plan import Run
from pneumo.process import PeakMemory
from pneumo.timing.breakdown import Interval
from pneumo.timing.steps import Timing
from pneumo.world import World

Row = dict[str, Any]
EVALUATION_BATCH = 50
SHARE_STEPS = 2  # of each size in each block
FIRST_SHARE = 1 << 32  # what the steps of shares are numbered from, beyond all others of their run
FIRST_ALONE = 1 << 33  # the same for what is done alone, before the step of that number less this


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


class Training:
    """One run on this rank, timed by `timing`: its model stays alive from block to block and sleeps between them."""

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
        self._peak_bytes = 0
        self._prepared = False
        if not self.active:
            return
        device = torch.device(f"cuda:{world.local_rank}" if run.device == "cuda" else "cpu")
        if run.device == "cuda":
            torch.cuda.set_device(device)  # FSDP2, NCCL and `synchronize` take the current one
        self._timing = timing(torch.cuda.synchronize if run.device == "cuda" else lambda: None)
        recorder = self._timing.recorder
        place = Place(self.comm, groups.get(run.comm, run.ranks), device)
        self._disturbance = Disturbance(study.inject, self.comm.rank, run.ranks)
        recorder.delay_s = self._disturbance.delay_s("comm")
        self._small_sum = groups.small_sum(self.comm)
        self._task = models.load(run.model)(study.size, study.learning_rate)
        self._backend = backends.load(run.backend)(place, recorder)
        self._loader = self._make_loader(run.global_batch)

    def _make_loader(self, global_batch: int) -> Loader:
        return Loader(
            self._store,
            self._split.train,
            size=self._study.size,
            global_batch=global_batch,
            seed=self._study.seed,
            rank=self.comm.rank,
            world_size=self.run.ranks,
            augment=True,
        )

    @property
    def steps_per_epoch(self) -> int:
        """Global steps an epoch."""
        return -(-len(self._split.train) // self.run.global_batch)

    @contextmanager
    def awake(self) -> Iterator[None]:
        """The ranks of this run work inside; all others sleep at its end until they are done. Collective."""
        if self.active:
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
        self._gradient_bytes = local_bytes(model.parameters())
        self._backend.prepare(model, self._task.optimizer)
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
        backend = self._backend
        self._timing.begin()
        with self._phase("data"):
            batch = self._loader.batch(step)
            images, labels = self._on_device(batch)
        with self._phase("forward"):
            total, weight = self._task.loss(backend.model, images, labels)
        with self._phase("backward"):
            backend.backward(total / batch.total)
        with self._phase("optimizer"):
            backend.step()
        return len(labels), total.item() / weight if weight else None

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

    def _on_device(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        device = self._backend.place.device
        return torch.from_numpy(batch.images).to(device), torch.from_numpy(batch.labels).to(device)

    def evaluate(self, block: int) -> tuple[Block, dict[str, tuple[np.ndarray, np.ndarray]]]:
        """Answer the calibration and the validation images, shared among the ranks of this run.

        Returns the timed rows and, for each part, the positions in the store's index and the probabilities that this
        rank computed. Every image is answered once; all ranks take part in the same number of batches.
        """
        self._backend.model.eval()
        rows = Block()
        answers: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        step = self.next_step
        with torch.no_grad():
            for part in ("calibrate", "validate"):
                found: list[tuple[np.ndarray, np.ndarray]] = []
                batches = evaluation(
                    self._store,
                    getattr(self._split, part),
                    size=self._study.size,
                    rank=self.comm.rank,
                    world_size=self.run.ranks,
                    batch=EVALUATION_BATCH,
                )
                while True:
                    self._timing.begin()
                    with self._timing.phase("data"):
                        batch = next(batches, None)
                        if batch is None:
                            break
                        images, _ = self._on_device(batch)
                    with self._timing.phase("forward"):
                        self._disturbance.lengthen("validate")
                        found.append((batch.samples, self._task.answers(self._backend.model, images)))
                    self._end_step(rows, step, block, kind="validate", images=len(images))
                    step += 1
                self._check_answered(part, sum(len(samples) for samples, _ in found))
                answers[part] = (
                    np.concatenate([samples for samples, _ in found]) if found else np.zeros(0, np.int64),
                    np.concatenate([scores for _, scores in found]) if found else np.zeros(0, np.float32),
                )
        return rows, answers

    def _check_answered(self, part: str, count: int) -> None:
        """Raise PneumoError unless all ranks together have answered every image of a part once; collective."""
        answered = int(self._small_sum(torch.tensor(count)))
        images = len(getattr(self._split, part))
        if answered != images:
            raise PneumoError(f"{self.run} answered {answered} of {images} images to {part}.")

    def sizes(self) -> Sizes:
        """The memory of this training on this rank."""
        state = [
            value for values in self._backend.optimizer.state.values() for value in values.values()
        ]  # a sharded optimizer's values are sharded as well
        held = local_bytes(self._backend.module.parameters())
        buffers = local_bytes(self._backend.module.buffers())
        total = 2 * held + buffers + local_bytes(state)  # parameters and as many bytes of gradients
        return Sizes(self._parameters, self._gradient_bytes, total, self._peak_bytes)

    def full_state(self) -> Mapping[str, torch.Tensor]:
        """The whole model's tensors by a serial model's names; collective over the run's ranks."""
        return self._backend.full_state()

    def close(self) -> None:
        """Free what the training holds."""
        if self.active:
            self._backend.close()
            self._timing.close()


class Shares(Training):
    """Steps of a serial run with as few images as a rank of other runs has, on a model of its own.

    They tell what a share of a step costs where nobody disturbs it: c(B/N) of the account.
    """

    def __init__(self, sizes: Sequence[int], run: Run, study: Study, *where: Any) -> None:
        super().__init__(run, study, *where)
        self._sizes = sizes
        self._loaders = [self._make_loader(size) for size in sizes] if self.active else []

    @property
    def images(self) -> int:
        """The images of a block's steps."""
        return SHARE_STEPS * sum(self._sizes)

    def time(self, block: int, *, warmup: bool) -> Block:
        """Train SHARE_STEPS steps of each size; within the serial run's `awake`, after its own steps of a block."""
        rows = Block()
        self._prepare()
        self._backend.model.train()
        for loader in self._loaders:
            self._loader = loader
            for _ in range(SHARE_STEPS):
                images, loss = self._step(self.next_step)
                label = FIRST_SHARE + self.next_step
                self._end_step(rows, label, block, kind="share", warmup=warmup, images=images, loss=loss)
                self.next_step += 1
        return rows


def order(trainings: list[Training], block: int) -> list[Training]:
    """The order of the trainings within a block: it alternates, so that no run always follows the same one."""
    return trainings if block % 2 == 0 else trainings[::-1]


def step_seconds(block: Block) -> float:
    """The median wall time of a block's steps, in seconds, without the first where there are several."""
    times = [row["wall_ns"] / 1e9 for row in block.steps]
    return float(np.median(times[1:] or times))
