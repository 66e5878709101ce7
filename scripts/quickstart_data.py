"""Write the quickstart's data: one-step word problems from a seed, the same bytes everywhere.

It writes `quickstart/train.json` and `quickstart/test.json` in the layout that `wegeft eval
--data-dir` reads. No number pair of a held-out problem occurs in a training problem of the same
operation, so a right answer cannot be one that was merely seen.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from wegeft_cli.storage.atomic import write_text_atomic

DEFAULT_DIR = Path(".cache/quickstart/data")
SEED = 20250713
NUM_TRAIN = 1280
NUM_TEST = 200

Pair = tuple[int, int]
T = TypeVar("T")

NAMES = (
    *("Ada", "Bruno", "Carla", "Deniz", "Elif", "Farah", "Goran", "Hana", "Ivo", "Jonas"),
    *("Kemal", "Lena", "Mirko", "Nadia", "Omar", "Petra", "Quentin", "Rosa", "Samir", "Tilda"),
)
THINGS = (
    *("apples", "pencils", "marbles", "stamps", "books", "shells", "buttons", "cookies"),
    *("tickets", "candles", "postcards", "coins", "beads", "lemons", "badges", "tulips"),
)


@dataclass(frozen=True)
class Operation:
    """One kind of problem: its number pairs, its answer, and the ways to ask."""

    name: str
    pairs: tuple[Pair, ...]
    solve: Callable[[int, int], int]
    commutes: bool
    wordings: tuple[str, ...]


@dataclass(frozen=True)
class Problem:
    """A question with its answer; `pair` is the key that train and test must not share."""

    operation: str
    pair: Pair
    question: str
    answer: int

    def row(self) -> dict[str, str]:
        """Return the problem as a row of the LLM-Adapters layout."""
        answer = str(self.answer)
        return {"instruction": self.question, "input": "", "output": answer, "answer": answer}


OPERATIONS = (
    Operation(
        "sum",
        tuple((a, b) for a in range(10, 100) for b in range(a, 100)),
        lambda a, b: a + b,
        True,
        (
            "{name} has {a} {things} and buys {b} more. How many {things} does {name} have now?",
            "One box holds {a} {things} and another holds {b}. How many {things} is that in all?",
            "{name} found {a} {things} on Monday and {b} on Tuesday. How many {things} did {name}"
            " find?",
            "{name} has {a} {things} and {other} has {b}. How many {things} do they have together?",
            "A shop sold {a} {things} in the morning and {b} in the afternoon. How many {things}"
            " did it sell that day?",
        ),
    ),
    Operation(
        "difference",
        tuple((a, b) for a in range(11, 100) for b in range(10, a)),
        lambda a, b: a - b,
        False,
        (
            "{name} had {a} {things} and gave {b} to {other}. How many {things} does {name} have"
            " left?",
            "There were {a} {things} on a shelf. {name} took {b} of them. How many {things} are"
            " still there?",
            "{name} has {a} {things} and {other} has {b}. How many more {things} does {name} have?",
            "A shop had {a} {things} and sold {b}. How many {things} remain?",
            "{name} needs {a} {things} and already has {b}. How many {things} are missing?",
        ),
    ),
    Operation(
        "product",
        tuple((a, b) for a in range(2, 13) for b in range(a, 13)),
        lambda a, b: a * b,
        True,
        (
            "{name} fills {a} boxes with {b} {things} each. How many {things} does {name} pack?",
            "There are {a} rows with {b} {things} in each row. How many {things} are there?",
            "One bag holds {a} {things}. How many {things} are in {b} bags?",
            "{name} buys {a} {things} a day for {b} days. How many {things} does {name} buy?",
            "Each of {a} children brings {b} {things}. How many {things} do they bring?",
        ),
    ),
    Operation(
        "quotient",
        tuple((b * quotient, b) for b in range(2, 13) for quotient in range(2, 13)),
        lambda a, b: a // b,
        False,
        (
            "{name} shares {a} {things} equally among {b} friends. How many {things} does each"
            " friend get?",
            "{a} {things} are packed into {b} equal boxes. How many {things} are in each box?",
            "{name} puts {a} {things} into bags of {b}. How many bags does {name} fill?",
            "{name} lays out {a} {things} in {b} equal rows. How many {things} are in each row?",
            "{name} uses {b} {things} a day. How many days do {a} {things} last?",
        ),
    ),
)


def make_problems(seed: int = SEED) -> tuple[list[Problem], list[Problem]]:
    """Draw the training and the held-out problems, equally many of each operation.

    Args:
        seed: Seed of every draw.

    Returns:
        Training problems and held-out problems, each in mixed order, no question twice.
    """
    rng = random.Random(seed)
    train: list[Problem] = []
    test: list[Problem] = []
    for operation in OPERATIONS:
        pairs = _shuffled(rng, operation.pairs)
        num_test = NUM_TEST // len(OPERATIONS)
        # Where pairs are few (products, quotients), a fifth is held out and asked several times.
        num_held_out = min(num_test, len(pairs) // 5)
        test += _ask(rng, operation, pairs[:num_held_out], num_test)
        train += _ask(rng, operation, pairs[num_held_out:], NUM_TRAIN // len(OPERATIONS))
    return _shuffled(rng, train), _shuffled(rng, test)


def write_data(data_dir: Path, seed: int = SEED) -> tuple[Path, Path]:
    """Write the two files.

    Args:
        data_dir: Folder that receives `quickstart/train.json` and `quickstart/test.json`.
        seed: Seed of every draw.

    Returns:
        The paths of the training file and of the test file.
    """
    folder = data_dir / "quickstart"
    folder.mkdir(parents=True, exist_ok=True)
    paths = (folder / "train.json", folder / "test.json")
    for path, problems in zip(paths, make_problems(seed), strict=True):
        rows = [problem.row() for problem in problems]
        write_text_atomic(path, json.dumps(rows, indent=1) + "\n")
    return paths


def _ask(
    rng: random.Random, operation: Operation, pairs: Sequence[Pair], count: int
) -> list[Problem]:
    """Return `count` different questions that go round the pairs."""
    problems: dict[str, Problem] = {}
    while len(problems) < count:
        pair = pairs[len(problems) % len(pairs)]
        a, b = pair[::-1] if operation.commutes and rng.random() < 0.5 else pair
        name, other = _shuffled(rng, NAMES)[:2]
        question = _pick(rng, operation.wordings).format(
            a=a, b=b, name=name, other=other, things=_pick(rng, THINGS)
        )
        problems[question] = Problem(operation.name, pair, question, operation.solve(a, b))
    return list(problems.values())


# Of all draws, Python keeps only random() the same between versions: no choice(), no shuffle().


def _pick(rng: random.Random, options: Sequence[T]) -> T:
    return options[int(rng.random() * len(options))]


def _shuffled(rng: random.Random, items: Sequence[T]) -> list[T]:
    return sorted(items, key=lambda _: rng.random())


def main() -> None:
    """Write the data and say where."""
    parser = argparse.ArgumentParser(description="Write the quickstart's word problems.")
    parser.add_argument("--output", type=Path, default=DEFAULT_DIR, help="data folder")
    parser.add_argument("--seed", type=int, default=SEED, help="seed of every draw")
    arguments = parser.parse_args()
    train_path, test_path = write_data(arguments.output, arguments.seed)
    print(f"{NUM_TRAIN} training problems: {train_path}\n{NUM_TEST} held-out problems: {test_path}")


if __name__ == "__main__":
    main()
