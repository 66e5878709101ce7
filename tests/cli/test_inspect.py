"""`wegeft inspect`, `edit` and `report` as a user types them."""

from __future__ import annotations

import json

import pytest

from wegeft_cli.errors import EXIT_DONE, EXIT_USER


def test_inspect_prints_tables_or_one_object(wegeft, place_with_run):
    result = wegeft("inspect", place_with_run.run)
    assert result.exit_code == EXIT_DONE, result.output
    for word in ("change by group", "largest changes", "q_proj", "promoted", "along"):
        assert word in result.stdout
    result = wegeft(
        "inspect", place_with_run.run, "--json", "--top-k", "3", "--num-directions", "0"
    )
    found = json.loads(result.stdout)
    assert found["top_k"] == 3
    assert len(found["modules"]) == 6
    assert found["tokens"]["reason"] == "none were asked for"


def count_lines(text: str) -> int:
    return len(text.splitlines())


def test_inspect_is_a_summary_unless_all_is_asked_for(wegeft, place_with_run):
    summary = wegeft("inspect", place_with_run.run).stdout
    whole = wegeft("inspect", place_with_run.run, "--all").stdout
    assert "largest changes, 5 of 6" in summary
    assert "--all prints every row" in summary
    assert count_lines(summary) <= 40
    assert "of 6" not in whole
    assert "--all" not in whole
    assert count_lines(whole) > count_lines(summary) + 10
    # What the user asks for is shown.
    asked = wegeft("inspect", place_with_run.run, "--num-directions", "2").stdout
    assert count_lines(asked) > count_lines(summary)


def test_inspect_of_many_modules_fits_a_screen(wegeft, place_with_run, monkeypatch):
    from wegeft_cli.analysis import inspect as analysis

    found = analysis.inspect(place_with_run.run)
    found["modules"] = [
        {**row, "label": f"model.layers.{n}.{row['label']}", "relative_change": n / 100}
        for n in range(50)
        for row in found["modules"]
    ]
    found["groups"] = [{**found["groups"][0], "group": f"layer_{n}"} for n in range(50)]
    monkeypatch.setattr(analysis, "inspect", lambda *_, **__: found)
    summary = wegeft("inspect", place_with_run.run).stdout
    assert "singular directions of W), 5 of 50" in " ".join(summary.split())
    assert "largest changes, 5 of 300" in summary
    assert "model.layers.49." in summary
    assert count_lines(summary) <= 45
    assert count_lines(wegeft("inspect", place_with_run.run, "--all").stdout) > 350
    printed = json.loads(wegeft("inspect", place_with_run.run, "--json").stdout)
    assert len(printed["modules"]) == 300


def test_inspect_against_and_ablate(wegeft, place_with_run, data_dir):
    result = wegeft("inspect", place_with_run.run, "--against", place_with_run.run)
    assert "cosine 1.000" in result.stdout
    asked = ["--task", "boolq", "--data-dir", data_dir, "--limit", "2"]
    result = wegeft("inspect", place_with_run.run, "--ablate", "group", *asked)
    assert result.exit_code == EXIT_DONE, result.output
    assert "group:down_proj" in result.stdout
    found = json.loads(
        wegeft("inspect", place_with_run.run, "--ablate", "group", *asked, "--json").stdout
    )
    assert {row["part"] for row in found["parts"]} == {
        *("group:q_proj", "group:v_proj", "group:down_proj")
    }


def test_edit_writes_and_restores(wegeft, place_with_run):
    edited, restored = place_with_run.path / "edited", place_with_run.path / "restored"
    words = ["--drop", "layer:0", "--scale", "group:v_proj=0.5", "--output", edited, "--json"]
    found = json.loads(wegeft("edit", place_with_run.run, *words).stdout)
    assert found["output_dir"] == str(edited)
    assert found["num_modules"] == 3
    assert wegeft("edit", edited, "--restore", "-o", restored).exit_code == EXIT_DONE
    weights = "adapter_model.safetensors"
    original = place_with_run.run / "adapter" / weights
    assert (restored / weights).read_bytes() == original.read_bytes()
    assert wegeft("inspect", edited).exit_code == EXIT_DONE


def test_report_says_where_the_page_is(wegeft, place_with_run):
    page = place_with_run.path / "page.html"
    found = json.loads(wegeft("report", place_with_run.run, "-o", page, "--json").stdout)
    assert found["output"] == str(page)
    assert page.is_file()
    told = wegeft("report", place_with_run.run, "-o", page, "--no-inspect").stdout
    assert "page: " in told
    assert "report: 1 run, 0 scores" in told


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["inspect", "RUN", "--task", "boolq"], "requires --ablate"),
        (["inspect", "RUN", "--ablate", "heads", "--task", "boolq"], "one of group, layer"),
        (["inspect", "RUN", "--ablate", "group", "--against", "RUN"], "excludes"),
        (["inspect", "RUN", "--ablate", "group", "--task", "gsm9k"], "gsm8k"),
        (["inspect", "RUN", "--directions", "rows"], "columns, principal"),
        (["inspect", "RUN", "--image", "no.png"], "cannot read this image"),
        (["inspect", "no/such"], "no such path"),
        (["edit", "RUN"], "--drop"),
        (["edit", "RUN", "--drop", "group:qproj"], "did you mean q_proj?"),
        (["edit", "RUN", "--scale", "layer:1"], "PART=FACTOR"),
        (["report", "no/such"], "no such folder"),
    ],
)
def test_faults_are_told_in_one_message(wegeft, place_with_run, words, told):
    result = wegeft(*(place_with_run.run if word == "RUN" else word for word in words))
    assert result.exit_code == EXIT_USER, result.output
    assert told in " ".join(result.stderr.split())
    assert result.stdout == ""
