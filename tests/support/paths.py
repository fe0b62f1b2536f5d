"""Where things lie in this checkout."""

from pathlib import Path

REPO = Path(__file__).resolve().parents[2]
