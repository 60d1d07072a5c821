"""Small models as a study saves them, and pictures to answer: sound ones in three formats, and a broken one."""

import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file

from pneumo.data.patients import SampleConfig
from pneumo.data.sample import write_patients
from pneumo.models import Settings, load, yolov8

SIZE = 64
SETTINGS = Settings(SIZE, 1e-3)


def write_weights(folder: Path, model: str) -> Path:
    """Write a model with random parameters as a checkpoint, and return its file.

    The detector's last biases are 0, so that its scores are near a half and not near nothing.
    """
    torch.manual_seed(0)
    network = load("cnn")(SETTINGS).build() if model == "cnn" else yolov8.build()
    state = {name: value.detach().contiguous() for name, value in network.state_dict().items()}
    if model == "yolo":
        state |= {name: torch.zeros_like(state[name]) for name in state if ".cv3." in name and name.endswith("2.bias")}
    path = folder / f"{model}-serial-none-1x1.safetensors"
    save_file(state, path)
    about = {"model": model, "size": SIZE, "backend": "serial", "comm": "none", "ranks": 1, "threads": 1, "seed": 0}
    path.with_suffix(".json").write_text(json.dumps(about))
    return path


def write_files(folder: Path, patients: int) -> list[Path]:
    """Write DICOM files of the sample, a wide PNG, a JPEG and a broken DICOM file into a folder; all, sorted."""
    write_patients(folder, SampleConfig(patients=patients, seed=3, size=64), 0, patients)
    noise = np.random.default_rng(0).integers(0, 256, (100, 160)).astype(np.uint8)
    Image.fromarray(noise).save(folder / "wide.png")
    Image.fromarray(noise[:, :100]).save(folder / "square.jpg")
    (folder / "broken.dcm").write_bytes(b"no radiograph")
    (folder / "notes.txt").write_text("no picture either")
    return sorted(path for path in folder.rglob("*") if path.suffix in (".dcm", ".png", ".jpg"))
