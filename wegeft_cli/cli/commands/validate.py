"""`wegeft validate`: check a recipe without weights, data or network."""

from __future__ import annotations

from wegeft_cli.cli.arguments import JsonOption, OverridesArgument, RecipeArgument
from wegeft_cli.cli.console import count, note, print_json, show


def validate(
    recipe: RecipeArgument, overrides: OverridesArgument = None, as_json: JsonOption = False
) -> None:
    """Check a recipe's keys, types, rules and names, and list which inputs exist."""
    from rich.markup import escape

    from wegeft_cli.planning.validate import validate_recipe

    report = validate_recipe(recipe, overrides or [])
    for text in report.notes:
        note(text)
    if as_json:
        print_json(report.to_json())
        return
    num_missing = sum(not item.found for item in report.inputs)
    missing = f"; {count(num_missing, 'input')} not on this machine" if num_missing else ""
    show(f"[green]valid[/] {escape(report.recipe)}{missing}", highlight=False, soft_wrap=True)
    for text in report.checked:
        show(f"  {escape(text)}", highlight=False, soft_wrap=True)
    for item in report.inputs:
        mark = "[green]here[/]   " if item.found else "[yellow]missing[/]"
        line = f"  {mark} {escape(item.key)}: {escape(item.path)} [dim]({escape(item.note)})[/]"
        show(line, highlight=False, soft_wrap=True)
