"""The methods of a bench: their names, their own settings, and the runs of each as a sweep."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from wegeft_cli.artifacts.run_results import SEED
from wegeft_cli.errors import Faults, UserError, raise_all, raise_by_name
from wegeft_cli.recipe.keys import find_nearest
from wegeft_cli.recipe.parameter_budget import BUDGET_KEY
from wegeft_cli.recipe.rules import explain_method
from wegeft_cli.recipe.schema import Recipe
from wegeft_cli.recipe.sweep import LoadedSweep, SweepRun, load_sweep
from wegeft_cli.runs.resume_rules import flatten

_LABEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
_PREFIX = re.compile(r"([A-Za-z0-9][A-Za-z0-9_.-]*):([A-Za-z].*)", re.DOTALL)
_MAX_SEED = 2**32 - 1
_RANK_KEYS = {"adapter.r": BUDGET_KEY, BUDGET_KEY: "adapter.r"}
# What a method may have of its own. Everything else makes the data, the steps or the scores.
_OWN = (
    "adapter.", "sweep", "seed", "output_dir", "logging.run_name",
    "train.learning_rate", "train.lr_ratio", "train.lr_scheduler_type", "train.lr_scheduler_kwargs",
    "train.warmup_ratio", "train.warmup_steps", "train.weight_decay", "train.max_grad_norm",
    "train.optim", "train.optim_args", "train.adam_",
)  # fmt: skip


@dataclass(frozen=True)
class Contestant:
    """One method of a bench.

    Args:
        label: Its name in the table and of its folder.
        type: The value of `adapter.type`.
        settings: Its own overrides.
        search: Values to choose from, as overrides `sweep.<key>=[...]`.
    """

    label: str
    type: str
    settings: tuple[str, ...] = ()
    search: tuple[str, ...] = ()


@dataclass(frozen=True)
class Entry:
    """A contestant with its recipes.

    Args:
        contestant: The method.
        searched: The runs of each combination of the search, one for each of its seeds.
    """

    contestant: Contestant
    searched: LoadedSweep

    @property
    def has_search(self) -> bool:
        """Whether there is more than one combination."""
        return len(self.combinations) > 1

    @property
    def combinations(self) -> list[tuple[dict[str, Any], list[SweepRun]]]:
        """The values of each combination, without the seed, and its runs."""
        found: dict[str, tuple[dict[str, Any], list[SweepRun]]] = {}
        for run in self.searched.runs:
            values = {key: value for key, value in run.values.items() if key != SEED}
            found.setdefault(json.dumps(values), (values, []))[1].append(run)
        return list(found.values())

    @property
    def recipe(self) -> Recipe:
        """The recipe of its first run."""
        return self.searched.runs[0].loaded.recipe


def read_contestants(
    methods: Sequence[str], settings: Sequence[str], search: Sequence[str]
) -> list[Contestant]:
    """Read `--methods`, `--set` and `--search`; raise UserError for what is not written so.

    Args:
        methods: `METHOD`, or `LABEL=METHOD` for a second form of one method.
        settings: `LABEL:KEY=VALUE`.
        search: `KEY=VALUE,VALUE,...`, or with `LABEL:` for one method.
    """
    faults = Faults()
    labels: dict[str, str] = {}
    for text in methods:
        with faults.collected():
            name, kind = _read_method(text)
            if name in labels:
                hint = f"name the second one, such as {name}-2={kind}"
                raise UserError(f"contains {name!r} twice", key="--methods", hint=hint)
            labels[name] = kind
    own: dict[str, list[str]] = {label: [] for label in labels}
    tried: dict[str, list[str]] = {label: [] for label in labels}
    for key, texts in (("--set", settings), ("--search", search)):
        for text in texts:
            with faults.collected():
                label, override = _split_label(key, text, labels)
                for each in [label] if label else labels:
                    (own if key == "--set" else tried)[each].append(override)
    if not labels and not faults:
        hint = "such as --methods wegeft,lora"
        faults.extend([UserError("names no method", key="--methods", hint=hint)])
    faults.raise_all()
    return [
        Contestant(label, kind, tuple(own[label]), tuple(tried[label]))
        for label, kind in labels.items()
    ]


def _read_method(text: str) -> tuple[str, str]:
    label, equals, kind = text.strip().partition("=")
    kind = kind if equals else label
    if not _LABEL.fullmatch(label):
        hint = "letters, digits, `_`, `.` and `-`, as in small=lora"
        raise UserError(f"{text!r} has no usable name", key="--methods", hint=hint)
    if (fault := explain_method(kind)) is not None:
        message, hint = fault
        raise UserError(message, key="--methods", hint=hint)
    return label, kind


def _split_label(key: str, text: str, labels: Mapping[str, str]) -> tuple[str | None, str]:
    """Return the label of `LABEL:KEY=VALUE`, if it has one, and the override."""
    match = _PREFIX.match(text)
    label, rest = (match[1], match[2]) if match else (None, text)
    name, equals, value = rest.partition("=")
    if label is None and key == "--set":
        hint = "write LABEL:KEY=VALUE; a setting of all methods is an override, KEY=VALUE"
        raise UserError(f"{text!r} names no method", key=key, hint=hint)
    if label is not None and label not in labels:
        near = find_nearest(label, list(labels))
        hint = f"did you mean `{near}`?" if near else f"one of {', '.join(labels)}"
        raise UserError(f"{label!r} is none of --methods", key=key, hint=hint)
    if not equals or not name or not value:
        hint = "such as train.learning_rate=1e-4,3e-4,1e-3"
        raise UserError(f"{text!r} is not KEY=VALUE", key=key, hint=hint)
    if key == "--set":
        return label, rest
    listed = value if value.startswith("[") else f"[{value}]"
    return label, f"sweep.{name}={listed}"


def read_seeds(text: str, first: int) -> list[int]:
    """Return the seeds of `--seeds`: a number of seeds from the recipe's on, or a list of seeds."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() for part in parts):
        hint = "a number of seeds, such as 3, or the seeds, such as 42,43,44"
        raise UserError(f"got {text!r}", key="--seeds", hint=hint)
    numbers = [int(part) for part in parts]
    if len(numbers) == 1:
        numbers = [first + offset for offset in range(numbers[0])]
    if not numbers or len(set(numbers)) < len(numbers) or max(numbers) > _MAX_SEED:
        hint = f"at least one seed, each once, none above {_MAX_SEED}"
        raise UserError(f"got {text!r}", key="--seeds", hint=hint)
    return numbers


def choose_search_seeds(first: int, seeds: Sequence[int], number: int) -> list[int]:
    """Return the seeds of the search: those before the recipe's that are no seeds of the table."""
    if number < 1:
        raise UserError(f"must be at least 1, got {number}", key="--search-seeds")
    found: list[int] = []
    seed = first
    while len(found) < number:
        seed = (seed - 1) % (_MAX_SEED + 1)
        if seed not in seeds:
            found.append(seed)
    return found


def load_entries(
    path: Any, overrides: Sequence[str], contestants: Sequence[Contestant], seeds: Sequence[int]
) -> list[Entry]:
    """Load the search's runs of each method, or raise every fault."""
    found, entries = {}, []
    for contestant in contestants:
        faults = Faults()
        with faults.collected():
            words = [*contestant.search, f"sweep.seed={json.dumps(list(seeds))}"]
            entries.append(Entry(contestant, _load(path, overrides, contestant, words)))
        found[contestant.label] = faults.found
    raise_by_name(found)
    check_same_data(entries)
    return entries


def load_seeds(
    path: Any, overrides: Sequence[str], entry: Entry, best: Mapping[str, Any], seeds: Sequence[int]
) -> list[SweepRun]:
    """Load a method's runs of the table, at the values that its search has chosen."""
    words = [f"sweep.{key}={json.dumps([value])}" for key, value in best.items()]
    seeded = [*words, f"sweep.seed={json.dumps(list(seeds))}"]
    return list(_load(path, overrides, entry.contestant, seeded).runs)


def _load(
    path: Any, overrides: Sequence[str], contestant: Contestant, words: Sequence[str]
) -> LoadedSweep:
    """Load a method's recipe as a sweep in a folder of its own."""
    own = [f"adapter.type={contestant.type}", *contestant.settings]
    loaded = load_sweep(path, [*_without_replaced(overrides, contestant), *own, *words])
    runs = []
    for run in loaded.runs:
        name = f"{contestant.label}/{run.name}"
        root, _, folder = run.loaded.recipe.output_dir.rpartition("/")
        output_dir = f"{root}/{contestant.label}/{folder}"
        recipe = replace(run.loaded.recipe, output_dir=output_dir)
        runs.append(replace(run, name=name, loaded=replace(run.loaded, recipe=recipe)))
    return replace(loaded, runs=tuple(runs))


def _without_replaced(overrides: Sequence[str], contestant: Contestant) -> list[str]:
    """Return the overrides without the way to choose the rank that a method's own replaces."""
    own = {_key_of(text) for text in (*contestant.settings, *contestant.search)}
    replaced = {other for key, other in _RANK_KEYS.items() if key in own}
    return [text for text in overrides if _key_of(text) not in replaced]


def _key_of(override: str) -> str:
    return override.partition("=")[0].strip().removeprefix("sweep.")


def check_same_data(entries: Sequence[Entry]) -> None:
    """Raise UserError for each key of data, model, steps or evaluation that methods differ in."""
    tables = [
        {
            key: value
            for key, value in flatten(asdict(run.loaded.recipe))
            if not key.startswith(_OWN)
        }
        for entry in entries
        for run in entry.searched.runs
    ]
    names = [entry.contestant.label for entry in entries for _ in entry.searched.runs]
    found = []
    for key in dict.fromkeys(key for table in tables for key in table):
        values = [table.get(key) for table in tables]
        other = next((n for n, value in enumerate(values) if value != values[0]), None)
        if other is not None:
            found.append(
                UserError(
                    f"is {values[0]!r} for {names[0]} and {values[other]!r} for {names[other]}",
                    key=key,
                    hint="all methods share data, batches, steps and evaluation: set it for all, "
                    f"{key}=VALUE",
                )
            )
    raise_all(found)
