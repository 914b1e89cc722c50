"""Many clients on one machine, and the demo."""

from pathlib import Path

HEART = Path(__file__).parent / "heart"  # the four hospitals: documents and tables
