"""Write the lists of all keys in docs/from-other-tools.md from the tables of the importer.

python scripts/foreign_keys.py           # writes them
python scripts/foreign_keys.py --check   # exit 1 if the page differs
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from wegeft_cli.recipe.importing import axolotl, llama_factory, torchtune, trainer_keys, trl

PAGE = Path(__file__).resolve().parent.parent / "docs" / "from-other-tools.md"
MARK = "<!-- Below: written by scripts/foreign_keys.py. -->\n"
HEAD = """
## All keys

These lists contain every key that is read under another name, that has a fixed answer, or that
changes no result. The tables above describe the keys whose values are converted.
"""
MODULES: dict[str, ModuleType] = {
    "axolotl": axolotl,
    "LLaMA-Factory": llama_factory,
    "TRL": trl,
    "Trainer's arguments (LLaMA-Factory and TRL)": trainer_keys,
    "torchtune": torchtune,
}


def list_renamed(module: Any) -> dict[str, str]:
    """Return key of the tool -> key of the recipe."""
    same = {name: f"train.{name}" for name in getattr(module, "_SAME", ())}
    return {**module._RENAMED, **same}


def write_tool(title: str, module: Any) -> str:
    """Return the section of one tool."""
    lines = [f"### Keys of {title}\n", "| key | recipe |", "|---|---|"]
    lines += [f"| `{old}` | `{new}` |" for old, new in sorted(list_renamed(module).items())]
    lines += [
        f"| `{key}` | {text} |" for key, text in sorted(getattr(module, "_REASONS", {}).items())
    ]
    unneeded = ", ".join(f"`{name}`" for name in sorted(module._NO_EFFECT))
    return "\n".join(lines) + f"\n\nNo effect on the result: {unneeded}.\n"


def write_lists() -> str:
    """Return all that follows the mark in the page."""
    return HEAD + "".join(f"\n{write_tool(title, m)}" for title, m in MODULES.items())


def main() -> int:
    """Write or check the page."""
    text = PAGE.read_text(encoding="utf-8")
    new = text.partition(MARK)[0] + MARK + write_lists()
    if "--check" not in sys.argv:
        PAGE.write_text(new, encoding="utf-8")
    elif text != new:
        print("docs/from-other-tools.md differs from the importer: run scripts/foreign_keys.py")
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
