"""Time `wegeft --help` against the bare import of what draws it (typer and rich)."""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time

COMMANDS = {
    "wegeft --help": [sys.executable, "-m", "wegeft_cli", "--help"],
    "import typer, rich": [sys.executable, "-c", "import typer, rich"],
}


def time_commands(repeats: int) -> dict[str, float]:
    """Run the commands in turn, after one unmeasured round.

    Args:
        repeats: Measured rounds, at least 1.

    Returns:
        Median seconds by the command's label.
    """
    seconds: dict[str, list[float]] = {label: [] for label in COMMANDS}
    for turn in range(repeats + 1):
        for label, command in COMMANDS.items():
            start = time.perf_counter()
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            if turn:
                seconds[label].append(time.perf_counter() - start)
    return {label: statistics.median(values) for label, values in seconds.items()}


def main() -> None:
    """Measure and print the medians and their ratio."""
    parser = argparse.ArgumentParser(description="Time the help page.")
    parser.add_argument("--repeats", type=int, default=11, help="measured rounds")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    arguments = parser.parse_args()
    medians = time_commands(arguments.repeats)
    help_seconds, import_seconds = medians.values()
    if arguments.json:
        print(json.dumps({"median_seconds": medians, "ratio": help_seconds / import_seconds}))
        return
    print("| command | median seconds |\n|---|---|")
    for label, value in medians.items():
        print(f"| {label} | {value:.3f} |")
    print(f"\nThe help page takes {help_seconds / import_seconds:.2f} times the bare import.")


if __name__ == "__main__":
    main()
