"""Write docs/recipe.md from the schema: every key, its type, default and meaning.

python scripts/recipe_reference.py           # writes the page
python scripts/recipe_reference.py --check   # exit 1 if the page differs from the schema
"""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path
from typing import Any, Literal, get_origin

from wegeft_cli.recipe import schema
from wegeft_cli.recipe.schema_keys import section_kinds, strip_optional

ROOT = Path(__file__).resolve().parent.parent
SCHEMA = ROOT / "wegeft_cli" / "recipe" / "schema.py"
PAGE = ROOT / "docs" / "recipe.md"

HEAD = """# The recipe

One YAML file serves every command. This page is written from the schema by
`scripts/recipe_reference.py`.

- Unknown keys, wrong types, values out of range and contradictions are errors. All errors of a
  recipe are reported at once, each with `file:line:column`, the dotted key, the value and the
  nearest valid key.
- `extends: NAME_OR_PATH` starts from a shipped recipe or another file. The child's keys win; lists
  are replaced, not merged.
- `wegeft train recipe.yaml train.learning_rate=1e-3 data.train[0].limit=64` overrides keys for one
  run.
- `${key}` repeats another key's value. Environment variables are never read into a recipe.
- Well-known spellings of other tools (`base_model`, `sequence_len`, `cutoff_len`,
  `micro_batch_size`, `lora_r`, `num_epochs`, ...) are accepted with a note.
- `wegeft validate recipe.yaml` checks a recipe, `wegeft plan recipe.yaml` counts parameters, steps
  and memory. Neither needs weights.
- `wegeft recipes list | show NAME | copy NAME FILE` are the shipped recipes. `wegeft recipes import
  FILE` converts those of [other tools](from-other-tools.md).

"""


def read_sections() -> dict[str, tuple[str, list[tuple[str, str, str, str]]]]:
    """Return class name -> (its docstring, [(field, type, default, meaning)])."""
    sections = {}
    for node in ast.parse(SCHEMA.read_text(encoding="utf-8")).body:
        if not isinstance(node, ast.ClassDef):
            continue
        fields = []
        kinds = section_kinds(getattr(schema, node.name)) if node.name != "Range" else {}
        for field, text in zip(node.body, node.body[1:], strict=False):
            if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr):
                meaning = " ".join(ast.literal_eval(text.value).split())
                default = ast.unparse(field.value) if field.value is not None else ""
                name = ast.unparse(field.target)
                fields.append((name, name_type(kinds[name]), default, meaning))
        sections[node.name] = (ast.get_docstring(node) or "", fields)
    return sections


def name_type(declared: Any) -> str:
    """Return a type as the page shows it: a closed choice is a `str`."""
    kind, is_optional = strip_optional(declared)
    if kind is Any:
        return "Any"
    if get_origin(kind) is Literal:
        kind = str
    name = kind.__name__ if get_origin(kind) is None else str(kind).replace("typing.", "")
    name = name.replace("wegeft_cli.recipe.schema.", "")
    return f"{name} | None" if is_optional else name


def escape_html(text: str) -> str:
    """Return a text whose `<` is no tag; a code span shows its characters as they are."""
    return re.sub("`[^`]*`|<", lambda found: "&lt;" if found[0] == "<" else found[0], text)


def write_table(prefix: str, fields: list[tuple[str, str, str, str]], sections: set[str]) -> str:
    """Return one section's keys as a table; nested sections have their own tables."""
    lines = ["| key | type | default | meaning |", "| --- | --- | --- | --- |"]
    for name, kind, default, meaning in fields:
        if kind in sections:
            continue
        if "factory=list" in default or "factory=dict" in default:
            default = "[]" if "list" in default else "{}"
        kind = kind.replace(" | None", " or null").replace("|", r"\|")
        shown = default.replace("None", "null").replace("False", "false").replace("True", "true")
        shown = shown.replace("'", "") or '""'
        text = escape_html(meaning.replace("|", r"\|"))
        lines.append(f"| `{prefix}{name}` | {kind} | `{shown}` | {text} |")
    return "\n".join(lines)


def write_page() -> str:
    """Return the whole page."""
    sections = read_sections()
    names = set(sections)
    root_fields = sections["Recipe"][1]
    parts = [HEAD, "## Top level\n\n", write_table("", root_fields, names), "\n"]
    for field, kind, _, _ in root_fields_with_sections(sections):
        title, fields = sections[kind]
        parts += [f"\n## {field}\n\n{title}\n\n", write_table(f"{field}.", fields, names), "\n"]
        if field == "data":
            title, fields = sections["DataSource"]
            parts += [
                f"\n### An entry of data.train or data.validation\n\n{title}\n\n",
                write_table("data.train[].", fields, names),
                "\n",
            ]
    return "".join(parts)


def root_fields_with_sections(
    sections: dict[str, tuple[str, list[tuple[str, str, str, str]]]],
) -> list[tuple[str, str, str, str]]:
    """Return the recipe's sections in order; they have no text in the schema."""
    tree = ast.parse(SCHEMA.read_text(encoding="utf-8"))
    recipe = next(n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == "Recipe")
    return [
        (ast.unparse(n.target), ast.unparse(n.annotation), "", "")
        for n in recipe.body
        if isinstance(n, ast.AnnAssign) and ast.unparse(n.annotation) in sections
    ]


def main() -> int:
    """Write or check the page."""
    page = write_page()
    if "--check" in sys.argv:
        if not PAGE.is_file() or PAGE.read_text(encoding="utf-8") != page:
            print("docs/recipe.md differs from the schema: run scripts/recipe_reference.py")
            return 1
        return 0
    PAGE.write_text(page, encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
