"""Write docs/recipe.md and recipes/recipe.schema.json from the types of the recipe.

python scripts/recipe_reference.py           # writes both
python scripts/recipe_reference.py --check   # exit 1 if one of them differs
"""

from __future__ import annotations

import ast
import json
import re
import sys
from pathlib import Path
from typing import Any, Literal, get_origin

from wegeft_cli.recipe import schema
from wegeft_cli.recipe.json_schema import build_schema, read_meanings
from wegeft_cli.recipe.schema_keys import section_kinds, strip_optional

ROOT = Path(__file__).resolve().parent.parent
SCHEMA = ROOT / "wegeft_cli" / "recipe" / "schema.py"
PAGE = ROOT / "docs" / "recipe.md"
JSON_SCHEMA = ROOT / "recipes" / "recipe.schema.json"

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
- `wegeft recipes list` lists the shipped recipes, `wegeft recipes show NAME` prints one, and
  `wegeft recipes copy NAME FILE` copies one. `wegeft recipes import FILE` converts those of
  [other tools](from-other-tools.md).
- `wegeft recipes schema` prints the JSON Schema. An editor with a YAML language server completes
  and checks the keys of a file that starts with `# yaml-language-server:
  $schema=recipe.schema.json`, as every shipped recipe does. `wegeft recipes copy` writes the schema
  beside the recipe.

"""


def read_sections() -> dict[str, tuple[str, list[tuple[str, str, str, str]]]]:
    """Return class name -> (its docstring, [(field, type, default, meaning)])."""
    sections = {}
    for node in ast.parse(SCHEMA.read_text(encoding="utf-8")).body:
        if not isinstance(node, ast.ClassDef):
            continue
        fields = []
        kinds = section_kinds(getattr(schema, node.name)) if node.name != "Range" else {}
        meanings = read_meanings(getattr(schema, node.name))
        for field in node.body:
            if isinstance(field, ast.AnnAssign) and ast.unparse(field.target) in meanings:
                default = ast.unparse(field.value) if field.value is not None else ""
                name = ast.unparse(field.target)
                fields.append((name, name_type(kinds[name]), default, meanings[name]))
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
    """Write or check the two files."""
    files = {
        PAGE: write_page(),
        JSON_SCHEMA: json.dumps(build_schema(), indent=1, ensure_ascii=False) + "\n",
    }
    num_differing = 0
    for path, text in files.items():
        if "--check" not in sys.argv:
            path.write_text(text, encoding="utf-8")
        elif not path.is_file() or path.read_text(encoding="utf-8") != text:
            name = path.relative_to(ROOT)
            print(f"{name} differs from the schema: run scripts/recipe_reference.py")
            num_differing += 1
    return min(num_differing, 1)


if __name__ == "__main__":
    raise SystemExit(main())
