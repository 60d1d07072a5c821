"""Steps of a serial run with as few images as a rank of the other runs has: what a share of a step costs by itself."""

from collections.abc import Sequence
from typing import Any

from pneumo.config import Study
from pneumo.plan import Run
from pneumo.train import Block, Training

SHARE_STEPS = 2  # of each size in each block
FIRST_SHARE = 1 << 32  # what the steps of shares are numbered from, beyond all others of their run


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
