"""`wegeft recipes import` on the command line."""

from __future__ import annotations

import json
from pathlib import Path

FOREIGN = Path(__file__).parents[1] / "recipe" / "foreign"


def test_the_command_writes_a_new_file_and_reports(tmp_path, run_wegeft):
    source, new = FOREIGN / "axolotl_qlora.yaml", tmp_path / "new.yaml"
    done = run_wegeft("recipes", "import", source, "-o", new)
    assert done.returncode == 0, done.stderr
    assert "no counterpart: wandb_entity" in done.stderr
    assert str(new) in done.stdout
    again = run_wegeft("recipes", "import", source, "-o", new)
    assert again.returncode == 2
    assert "not overwritten" in again.stderr
    printed = run_wegeft("recipes", "import", source)
    assert printed.stdout == new.read_text()
    found = json.loads(run_wegeft("recipes", "import", source, "--json").stdout)
    assert found["recipe"] == printed.stdout
    assert found["tool"] == "axolotl"
