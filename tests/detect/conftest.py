"""What the tests of detection share: files, weights, results, and the shared radiographs."""

import sys
from pathlib import Path

for folder in (Path(__file__).parent, *(Path(__file__).parents[1] / name for name in ("data", "study"))):
    sys.path.insert(0, str(folder))
