"""What the tests of detection share: files and weights made by `detect_inputs`, and the shared radiographs."""

import sys
from pathlib import Path

for folder in (Path(__file__).parent, Path(__file__).parents[1] / "data"):
    sys.path.insert(0, str(folder))
