"""Puts this folder on the path, so that every test, those in sub-folders too, can import the shared helpers."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
