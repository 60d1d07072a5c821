"""Pictures in memory, for benchmarks that train: noise, every second one with a bright spot to find."""

from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from pneumo.data.split import Split
from pneumo.data.store import Store

EDGE = 1024  # pixels of the originals, in which boxes are given


@dataclass(frozen=True, slots=True)
class Pictures:
    """`count` pictures with what the loader asks a store for; the same on every rank."""

    count: int

    @property
    def index(self) -> pd.DataFrame:
        """A row for each picture."""
        n = self.count
        table = pd.DataFrame({"row": range(n), "patient": [f"p{i}" for i in range(n)], "label": np.arange(n) % 2})
        table["boxes"] = [[[EDGE / 4] * 4] if label else [] for label in table["label"]]
        return table.assign(rows=EDGE, columns=EDGE)

    def images(self, size: int) -> NDArray[np.uint8]:
        """The pictures, uint8 (count, size, size)."""
        made = np.random.default_rng(5).integers(0, 120, (self.count, size, size), dtype=np.uint8)
        made[1::2, size // 4 : size // 2, size // 4 : size // 2] += 80
        return made


def pictures(count: int) -> tuple[Store, Split]:
    """A store of `count` pictures, and all of them to train on."""
    nothing = np.zeros(0, np.int64)
    return cast(Any, Pictures(count)), Split(np.arange(count), nothing, nothing)
