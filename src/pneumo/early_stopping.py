"""Early stopping in a study: between blocks the calibration patients are answered, until patience is exhausted."""

from typing import TYPE_CHECKING

from pneumo import answers
from pneumo.config import Study
from pneumo.models import MODELS
from pneumo.patience import FIGURES, Patience
from pneumo.study import schema
from pneumo.world import World

if TYPE_CHECKING:
    from pneumo.data.split import Split
    from pneumo.data.store import Store
    from pneumo.train import Block, Training


class EarlyStopping:
    """Ends all trainings of a study after the same of its planned `blocks`; rank 0 decides.

    Without --patience it watches nothing, and nothing stops early.
    """

    def __init__(self, study: Study, blocks: int, world: World, store: "Store", split: "Split") -> None:
        self._study, self._blocks, self._world = study, blocks, world
        self._store, self._split = store, split
        self._answers = MODELS[study.model].answers
        self._patience = Patience(study.patience)
        self._latest: dict[int, float] = {}  # each run's figure after the block that is under way
        self._stopped_after: int | None = None

    def watches(self, block: int) -> bool:
        """Whether the calibration patients are answered after a block: whether it can be the last one before its time.

        Block 0 is the warm-up.
        """
        return bool(self._study.patience) and 0 < block < self._blocks

    def watch(self, training: "Training", block: int) -> "Block":
        """Have a training answer the calibration patients after a block that it watches; returns the timed rows.

        Collective over the ranks of the training, which are awake.
        """
        rows, answered = training.calibrate(block)
        found = training.comm.gather(answers.rows(training.run.run, self._store.index, {"calibrate": answered}))
        if found is not None:
            self._latest[training.run.run] = self._figure(found)
        return rows

    def _figure(self, found: list[answers.Found]) -> float:
        if self._answers == "probability":
            return answers.auc(found)
        return answers.map50(found, answers.truths(self._store.index, {"calibrate": self._split.calibrate}))

    def reason(self, block: int) -> str | None:
        """Why all trainings stop after this block, which all have made, or None; collective over the world."""
        if not self.watches(block):
            return None
        why: str | None = self._world.run_on_first(lambda: self._decide(block))
        return why

    def _decide(self, block: int) -> str | None:
        if self._patience.stops(self._latest):
            self._stopped_after = block
        self._latest = {}
        record = self.record()
        return record.sentence if record is not None else None

    def record(self) -> schema.EarlyStopping | None:
        """What was watched and decided, for run.json; None without --patience. On rank 0."""
        if not self._study.patience:
            return None
        return schema.EarlyStopping(
            patience=self._study.patience,
            blocks=self._blocks,
            figure=FIGURES[self._answers],
            figures={run: list(figures) for run, figures in self._patience.figures.items()},
            stopped_after=self._stopped_after,
            unimproved=self._patience.unimproved,
        )
