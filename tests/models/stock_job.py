"""Ultralytics as somebody has it who has no pneumo: loads a model of ours, and makes files for us to load.

Run as `stock_job.py FOLDER`; the folder has picture.npy (s, s, 3) uint8, ours.pt and perhaps ours.onnx, and gets what
it is asked for.
"""

import importlib.util
import json
import sys
from copy import deepcopy
from pathlib import Path

sys.path[:] = [place for place in sys.path if not (Path(place) / "pneumo").exists()]
assert importlib.util.find_spec("pneumo") is None

import numpy as np  # noqa: E402
import torch  # noqa: E402
from lively import enliven  # noqa: E402
from ultralytics import YOLO  # noqa: E402
from ultralytics.nn.tasks import DetectionModel, SegmentationModel  # noqa: E402
from ultralytics.utils import DEFAULT_CFG, DEFAULT_CFG_DICT  # noqa: E402
from ultralytics.utils.loss import v8DetectionLoss  # noqa: E402

FOLDER = Path(sys.argv[1])
PICTURE = np.load(FOLDER / "picture.npy")


def found(file: str, **settings: int) -> dict[str, list[list[float]]]:
    """What `YOLO(file)` finds in the picture."""
    model = YOLO(FOLDER / file)
    (result,) = model.predict(PICTURE, conf=0.02, iou=0.7, max_det=100, verbose=False, save=False, **settings)
    assert result.orig_shape == PICTURE.shape[:2]
    boxes = result.boxes
    return {
        "names": list(result.names.items()),
        "size": model.overrides.get("imgsz"),
        "shape": list(model.predictor.imgsz),
        "type": str(next(model.model.parameters()).dtype) if file.endswith(".pt") else None,
        "corners": boxes.xyxy.tolist(),
        "scores": boxes.conf.tolist(),
    }


def saved(network: torch.nn.Module, file: str) -> None:
    """Save a network by Ultralytics' own `save`, in half precision."""
    model = YOLO("yolov8n.yaml")
    model.model = network
    model.save(FOLDER / file)


def in_training(network: torch.nn.Module, file: str) -> None:
    """Save a network as Ultralytics' trainer does in the midst of a training: only averaged weights, and its state."""
    averaged = deepcopy(network).half()
    averaged.args = DEFAULT_CFG
    averaged.criterion = v8DetectionLoss(network_with_settings(network))
    checkpoint = {
        "epoch": 3,
        "best_fitness": np.float64(0.25),
        "model": None,
        "ema": averaged,
        "updates": 12,
        "optimizer": torch.optim.SGD(network.parameters(), 0.01, momentum=0.9).state_dict(),
        "train_args": {**DEFAULT_CFG_DICT, "save_dir": Path("runs/detect/train")},
        "train_metrics": {"fitness": np.float64(0.25), "metrics/mAP50(B)": np.float32(0.5)},
    }
    torch.save(checkpoint, FOLDER / file)


def network_with_settings(network: torch.nn.Module) -> torch.nn.Module:
    """The network as the loss wants it."""
    network.args = DEFAULT_CFG
    return network


def main() -> None:
    """Make all files, and print what is found as the last line."""
    one = enliven(lambda: DetectionModel("yolov8n.yaml", ch=3, nc=1, verbose=False), seed=5)
    saved(one, "theirs.pt")
    in_training(one, "training.pt")
    YOLO("yolov8n.yaml").save(FOLDER / "coco.pt")
    saved(DetectionModel("yolo11n.yaml", ch=3, nc=1, verbose=False), "v11.pt")
    saved(SegmentationModel("yolov8n-seg.yaml", ch=3, nc=1, verbose=False), "segments.pt")
    saved(DetectionModel("yolov8s.yaml", ch=3, nc=1, verbose=False), "v8s.pt")
    report = {"ours": found("ours.pt"), "theirs": found("theirs.pt", imgsz=PICTURE.shape[0])}
    if (FOLDER / "ours.onnx").exists():
        report["onnx"] = found("ours.onnx")
    print(json.dumps(report))


if __name__ == "__main__":
    main()
