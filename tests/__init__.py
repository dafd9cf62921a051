"""The tests; folders mirror the package, and ``distributed`` holds what runs in several processes."""

from pathlib import Path

ROOT = Path(__file__).parents[1]
