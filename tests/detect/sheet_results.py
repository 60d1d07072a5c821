"""Small results of either model, written as a study writes them, with the store that they are about."""

from pathlib import Path

import msgspec
import numpy as np
import synthetic
from detect_inputs import SIZE, write_weights
from fakes import make_store

from pneumo import answers
from pneumo.data import store as stores
from pneumo.data.geometry import to_fractions
from pneumo.data.store import Store
from pneumo.detect import model as detect_model
from pneumo.models.task import Answers
from pneumo.study.results import ResultFolder
from pneumo.train import Answered

RUNS = (("serial", "none", 1, 1), ("ddp", "gloo", 2, 1), ("ddp", "pneumo", 2, 1))
ROWS = 62
PARTS = {"calibrate": np.arange(20), "validate": np.arange(20, ROWS - 2)}


def write_store(cache: Path) -> Store:
    """Write and open a store in which positive pictures are darker, but not all of them."""
    cache.mkdir()
    made = make_store(cache / "store-0", ROWS, (SIZE,))
    rng = np.random.default_rng(1)
    for image in made.index.itertuples():
        lightest = 170 - 60 * image.label + 90 * rng.random()
        picture = rng.uniform(0, lightest, (1, SIZE, SIZE)).astype(np.uint8)
        stores.write_pictures(made.path, ROWS, SIZE, image.row, picture)
    stores.complete(made.path, "f1", (SIZE,), stores.checksums(made.path, stores.file_names((SIZE,))))
    return Store.open(made.path)


def write_study(folder: Path, model: str) -> Path:
    """Write a result of three runs, of which the first has kept its model, and a cache beside it; the result."""
    store, folders = write_store(folder / "cache"), ResultFolder.create(folder, "tiny")
    run = synthetic.run_file(RUNS, study="tiny", config={"data": "rsna", "cache": str(folder / "cache"), "size": SIZE})
    entries = [
        msgspec.structs.replace(one, model=model, answers="boxes" if model == "yolo" else "probability")
        for one in run.runs
    ]
    folders.write_run(
        msgspec.structs.replace(run, runs=entries, data=msgspec.structs.replace(run.data, fingerprint="f1"))
    )
    (folders.path / "checkpoints").mkdir()
    kept = write_weights(folders.path / "checkpoints", model)
    for number in range(len(RUNS)):
        given = {part: _classified(kept, store, part) if model == "cnn" else _located(store, part) for part in PARTS}
        found = answers.rows(
            number, store.index, {part: Answered(positions, given[part]) for part, positions in PARTS.items()}
        )
        folders.add_predictions(found.predictions)
        folders.add_detections(found.detections)
    if model == "yolo":
        folders.add_truths(answers.truths(store.index, PARTS))
    folders.flush()
    return folders.path


def _classified(kept: Path, store: Store, part: str) -> Answers:
    pictures = store.images(SIZE)[store.index["row"].to_numpy()[PARTS[part]]]
    return detect_model.load(kept, detect_model.about(kept, None)).answer(list(pictures))


def _located(store: Store, part: str) -> Answers:
    """Boxes near the true ones of most positive images, and elsewhere in some."""
    rng, boxes = np.random.default_rng(2), []
    for image in store.index.iloc[PARTS[part]].itertuples():
        near = to_fractions(image.boxes, image.rows, image.columns)[:1] * rng.uniform(0.85, 1.0)
        elsewhere = np.array([[0.5, 0.5, 0.2, 0.3]])[: int(rng.random() < 0.5)]
        scores = [*rng.uniform(0.3, 0.9, len(near)), *rng.uniform(0.1, 0.6, len(elsewhere))]
        both = np.column_stack([np.concatenate([near, elsewhere]), scores]).astype(np.float32).reshape(-1, 5)
        boxes.append(both[np.argsort(-both[:, 4])])
    return Answers(np.array([b[:, 4].max(initial=0.0) for b in boxes], np.float32), tuple(boxes))
