"""`report`: what is in the page is what is in the runs' folders, and no text of theirs is code."""

from __future__ import annotations

import html
import json
import re
import shutil

import pytest

from wegeft_cli.analysis.report import report
from wegeft_cli.artifacts.run_results import read_run
from wegeft_cli.errors import UserError


def read_data(page: str) -> dict:
    """Give the JSON block of a page, as a browser would find it."""
    return json.loads(re.search(r'id="data">(.*?)</script', page, re.DOTALL)[1])


def test_the_page_holds_what_the_folder_holds(run_dir, tmp_path):
    result = report([run_dir], output=tmp_path / "a.html")
    page = (tmp_path / "a.html").read_text(encoding="utf-8")
    assert (result.runs, result.num_scores, result.num_answers) == (["tiny"], 2, 12)
    assert result.inspected == ["tiny"]
    assert result.num_bytes == (tmp_path / "a.html").stat().st_size
    data, record = read_data(page), read_run(run_dir, max_samples=500)
    charts = {chart["name"]: chart["spec"] for chart in data["charts"]}
    metrics = [json.loads(x) for x in (run_dir / "metrics.jsonl").read_text().splitlines()]
    for name in ("loss", "learning_rate", "grad_norm", "tokens_per_second", "peak_memory_gib"):
        values = [(line["step"], line[name]) for line in metrics if "loss" in line]
        rows = charts[f"chart-curve-{name}"]["data"]["values"]
        assert [(row["step"], row["value"]) for row in rows] == values
        assert len(values) == 6
    found = charts["chart-curve-eval_loss"]["data"]["values"]
    assert [(row["step"], row["value"]) for row in found] == record.validation["eval_loss"]
    base, tuned = record.scores
    assert (base["model"], base["num_correct"], base["n_invalid"]) == ("base", 1, 1)
    assert (tuned["model"], tuned["num_correct"], tuned["n"]) == ("tuned", 4, 6)
    assert "+50.0" in page
    assert "4 / 6" in page
    text = html.unescape(page)
    assert (run_dir / "recipe.yaml").read_text() in text
    trainable = json.loads((run_dir / "run.json").read_text())["trainable_parameters"]
    assert f"{trainable:,}" in page
    assert data["answers"][0]["by"]["tiny: tuned"]["correct"] is True
    sections = re.findall(r'<section id="(\w+)"', page)
    assert sections == [
        *("summary", "scores", "samples", "curves", "learned", "recipe", "environment")
    ]


def test_the_inspection_is_kept_and_made_anew_for_a_newer_adapter(run_dir, tmp_path):
    report([run_dir], output=tmp_path / "a.html")
    kept = run_dir / "inspection.json"
    first = kept.stat().st_mtime_ns
    report([run_dir], output=tmp_path / "a.html")
    assert kept.stat().st_mtime_ns == first
    weights = run_dir / "adapter" / "adapter_model.safetensors"
    weights.touch()
    report([run_dir], output=tmp_path / "a.html")
    assert kept.stat().st_mtime_ns > first


def test_no_text_of_a_run_is_markup(pair, hostile, tmp_path):
    page_path = report(pair, output=tmp_path / "pair.html", title=f"T {hostile}").output
    page = page_path.read_text(encoding="utf-8")
    assert hostile not in page
    assert "<img src=x" not in page
    # The block of data, the library and the page's own script: no other was opened.
    assert len(re.findall(r"<script", page)) == 3
    outputs = [each["output"] for row in read_data(page)["answers"] for each in row["by"].values()]
    assert len(outputs) == 24
    assert all(output.startswith(hostile) for output in outputs)
    policy = html.unescape(re.search(r'Content-Security-Policy" content="([^"]+)"', page)[1])
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe-eval" not in policy
    assert "script-src 'unsafe" not in policy


def test_two_runs_stand_side_by_side(pair, tmp_path):
    result = report(pair, output=tmp_path / "pair.html", look_inside=False)
    assert result.runs == ["tiny", "b<i>&"]
    assert result.inspected == []
    page = result.output.read_text(encoding="utf-8")
    assert re.search(r'<th scope="row">seed</th><td>7</td><td>8</td>', page)
    loss = read_data(page)["charts"][0]
    assert {row["run"] for row in loss["spec"]["data"]["values"]} == {"tiny", "b<i>&"}
    assert set(read_data(page)["answers"][0]["by"]) == {
        *("tiny: base", "tiny: tuned", "b<i>&: base", "b<i>&: tuned")
    }
    assert "--no-inspect" in page


def test_runs_of_one_name_are_told_apart_and_few_samples_kept(pair, tmp_path):
    copy = tmp_path / "tiny"
    shutil.copytree(pair[0], copy)
    result = report([pair[0], copy], output=tmp_path / "a.html", look_inside=False, max_samples=2)
    assert result.runs == [str(pair[0]), str(copy)]
    assert result.num_answers == 8
    assert "4 / 6" in result.output.read_text(encoding="utf-8")


def test_an_evaluation_written_elsewhere_is_given_to_its_run(run_dir, tmp_path, data_dir):
    from wegeft_cli.evaluation.evaluate import evaluate

    plain = tmp_path / "plain"
    shutil.copytree(run_dir, plain, ignore=shutil.ignore_patterns("eval"))
    scores = tmp_path / "scores.json"
    asked = {"tasks": ["boolq"], "data_dir": data_dir, "max_new_tokens": 2}
    (row,) = evaluate(plain / "adapter", output=scores, **asked)["results"]
    assert report([plain], look_inside=False).num_scores == 0
    result = report([plain], evaluations=[scores], look_inside=False)
    assert (result.num_scores, result.num_answers) == (1, 6)
    shown = read_data(result.output.read_text())["charts"][-1]["spec"]["data"]["values"]
    assert [(each["who"], each["value"]) for each in shown] == [("plain: tuned", row["score"])]
    with pytest.raises(UserError, match="none of these runs"):
        report([run_dir], evaluations=[scores])
    with pytest.raises(UserError, match="holds no results"):
        report([plain], evaluations=[plain / "run.json"])


def test_a_run_that_failed_early_still_gives_a_page(tmp_path):
    run = tmp_path / "failed"
    run.mkdir()
    (run / "run.json").write_text('{"status": "failed", "error": "out of memory"}')
    (run / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo')
    result = report([run])
    assert result.output == run / "report.html"
    page = result.output.read_text(encoding="utf-8")
    assert "out of memory" in page
    assert "There is no adapter to look into." in page
    assert len(read_data(page)["charts"]) == 1
    report([run])  # its own page may be replaced


def test_bad_asking_is_refused(run_dir, tmp_path):
    (tmp_path / "mine.html").write_text("<p>mine")
    for arguments, told in (
        (([tmp_path],), "no run.json"),
        (([tmp_path / "nothing"],), "no such folder"),
        (([run_dir, run_dir / "adapter"],), "twice"),
    ):
        with pytest.raises(UserError, match=told):
            report(*arguments)
    with pytest.raises(UserError, match="nothing else is overwritten"):
        report([run_dir], output=tmp_path / "mine.html")
    with pytest.raises(UserError, match="at least 0"):
        report([run_dir], max_samples=-1)
    assert (tmp_path / "mine.html").read_text() == "<p>mine"


def test_an_ablation_in_the_folder_is_shown(run_dir, tmp_path, data_dir):
    from wegeft_cli.analysis.ablate import ablate

    copy = tmp_path / "ablated"
    shutil.copytree(run_dir, copy)
    asked = {"task": "boolq", "data_dir": data_dir, "max_new_tokens": 2}
    found = ablate(copy, by="group", output=copy / "ablation-group.json", **asked)
    page = report([copy], look_inside=False).output.read_text(encoding="utf-8")
    (chart,) = [c for c in read_data(page)["charts"] if c["name"] == "chart-ablation-0-0"]
    rows = chart["spec"]["data"]["values"]
    assert [row["part"] for row in rows] == [row["part"] for row in found["parts"]]
