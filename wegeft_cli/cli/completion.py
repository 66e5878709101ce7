"""What a shell proposes for a word: recipes, keys and their choices, benchmarks, protocols."""

from __future__ import annotations

from pathlib import Path


def complete_recipe(incomplete: str) -> list[str]:
    """Return the shipped recipes, and the folders and YAML files, that start with a word."""
    from wegeft_cli.recipe.catalog import list_recipes

    typed = Path(incomplete)
    folder = typed if incomplete.endswith("/") else typed.parent
    start = incomplete[: len(incomplete) - len("" if incomplete.endswith("/") else typed.name)]
    try:
        entries = sorted(folder.iterdir())
    except OSError:
        entries = []
    found = [recipe.name for recipe in list_recipes()]
    found += [f"{start}{each.name}/" for each in entries if each.is_dir()]
    found += [f"{start}{each.name}" for each in entries if each.suffix in (".yaml", ".yml")]
    return [
        word
        for word in found
        if word.startswith(incomplete)
        and (incomplete.startswith(f"{start}.") or not word[len(start) :].startswith("."))
    ]


def complete_override(incomplete: str) -> list[str]:
    """Return the keys of a recipe that start with a word; after `key=`, the key's choices."""
    from wegeft_cli.recipe.keys import format_key, parse_key
    from wegeft_cli.recipe.rules import list_values
    from wegeft_cli.recipe.schema_keys import list_keys

    key, equals, _ = incomplete.partition("=")
    if equals:
        try:
            words = [f"{key}={value}" for value in list_values(parse_key(key))]
        except ValueError:
            words = []
    else:
        words = [f"{format_key(path)}=" for path in list_keys()]
    return [word for word in words if word.startswith(incomplete)]


def complete_benchmark(incomplete: str) -> list[str]:
    """Return the benchmarks and groups that start with a word."""
    from wegeft_cli.evaluation.benchmarks.registry import list_tasks

    known = list_tasks()
    names = [each["name"] for each in (*known["tasks"], *known["groups"])]
    return [name for name in names if name.startswith(incomplete)]


def complete_protocol(incomplete: str) -> list[str]:
    """Return the protocols that start with a word."""
    from wegeft_cli.evaluation.benchmarks.registry import list_tasks

    names = dict.fromkeys(each["name"] for each in list_tasks()["protocols"])
    return [name for name in names if name.startswith(incomplete)]
