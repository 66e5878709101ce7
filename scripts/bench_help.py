"""Time the help pages against the bare import of typer and rich, which is their budget's unit."""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time

BARE = "import typer, rich"
PAGES = ("--help", "train --help", "eval --help")
COMMANDS = {
    BARE: [sys.executable, "-c", BARE],
    **{f"wegeft {page}": [sys.executable, "-m", "wegeft_cli", *page.split()] for page in PAGES},
}


def time_commands(repeats: int) -> dict[str, float]:
    """Return the median seconds of each command over `repeats` rounds, after one unmeasured."""
    seconds: dict[str, list[float]] = {label: [] for label in COMMANDS}
    for turn in range(repeats + 1):
        for label, command in COMMANDS.items():
            start = time.perf_counter()
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            if turn:
                seconds[label].append(time.perf_counter() - start)
    return {label: statistics.median(values) for label, values in seconds.items()}


def main() -> None:
    """Measure and print the medians and their ratios."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=11, help="Measured rounds. Default: 11.")
    parser.add_argument("--json", action="store_true", help="Print one JSON object, not a table.")
    arguments = parser.parse_args()
    medians = time_commands(arguments.repeats)
    ratios = {label: value / medians[BARE] for label, value in medians.items()}
    if arguments.json:
        print(json.dumps({"median_seconds": medians, "ratios": ratios}))
        return
    print("| command | median seconds | ratio |\n|---|---|---|")
    for label, value in medians.items():
        print(f"| {label} | {value:.3f} | {ratios[label]:.2f} |")


if __name__ == "__main__":
    main()
