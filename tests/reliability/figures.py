"""One line of figures from each corpus, also for the page about reliability."""

from __future__ import annotations

import os
from pathlib import Path


def report_figure(text: str) -> None:
    """Print a line, and append it to the file that RELIABILITY_FIGURES names."""
    print(f"\n{text}")
    place = os.environ.get("RELIABILITY_FIGURES")
    if place:
        with Path(place).open("a", encoding="utf-8") as file:
            file.write(text + "\n")
