"""Write docs/recipe.md from the schema: every key, its type, default and meaning.

python scripts/recipe_reference.py           # writes the page
python scripts/recipe_reference.py --check   # exit 1 if the page is not what the schema says
"""

from __future__ import annotations

import ast
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SCHEMA = ROOT / "wegeft_cli" / "recipe" / "schema.py"
PAGE = ROOT / "docs" / "recipe.md"

HEAD = """# The recipe

One YAML file serves every command. This page is written from the schema by
`scripts/recipe_reference.py`.

- Unknown, mistyped or contradictory keys are faults; all faults of a recipe are told at once, each
  as `file:line:column`, with the dotted key, the value got and the nearest valid key.
- `extends: NAME_OR_PATH` builds on a shipped recipe or another file; the child's keys win, lists
  are replaced whole.
- `wegeft train recipe.yaml train.learning_rate=1e-3 data.train[0].limit=64` overrides keys for one
  run.
- `${key}` repeats another key's value. Values of the environment are never read into a recipe.
- Well-known spellings of other tools (`base_model`, `sequence_len`, `cutoff_len`,
  `micro_batch_size`, `lora_r`, `num_epochs`, ...) are read, and announced.
- `wegeft validate recipe.yaml` checks it, `wegeft plan recipe.yaml` counts parameters, steps and
  memory; neither needs weights.
- `wegeft recipes list | show NAME | copy NAME FILE` are the shipped ones.

"""


def read_sections() -> dict[str, tuple[str, list[tuple[str, str, str, str]]]]:
    """Give class name -> (its docstring, [(field, type, default, meaning)])."""
    sections = {}
    for node in ast.parse(SCHEMA.read_text(encoding="utf-8")).body:
        if not isinstance(node, ast.ClassDef):
            continue
        fields = []
        for field, text in zip(node.body, node.body[1:], strict=False):
            if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr):
                meaning = " ".join(ast.literal_eval(text.value).split())
                default = ast.unparse(field.value) if field.value is not None else ""
                fields.append(
                    (ast.unparse(field.target), ast.unparse(field.annotation), default, meaning)
                )
        sections[node.name] = (ast.get_docstring(node) or "", fields)
    return sections


def write_table(prefix: str, fields: list[tuple[str, str, str, str]], sections: set[str]) -> str:
    """Write one section's keys as a table; nested sections have tables of their own."""
    lines = ["| key | type | default | meaning |", "| --- | --- | --- | --- |"]
    for name, kind, default, meaning in fields:
        if kind in sections:
            continue
        if "factory=list" in default or "factory=dict" in default:
            default = "[]" if "list" in default else "{}"
        kind = kind.replace(" | None", " or null").replace("|", r"\|")
        shown = default.replace("None", "null").replace("False", "false").replace("True", "true")
        shown = shown.replace("'", "") or '""'
        text = meaning.replace("|", r"\|").replace("<", "&lt;")
        lines.append(f"| `{prefix}{name}` | {kind} | `{shown}` | {text} |")
    return "\n".join(lines)


def write_page() -> str:
    """Write the whole page."""
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
    """Give the recipe's sections in order; they carry no text of their own in the schema."""
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
            print("docs/recipe.md is not what the schema says: run scripts/recipe_reference.py")
            return 1
        return 0
    PAGE.write_text(page, encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
