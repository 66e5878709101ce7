"""`report`: what is in the page is what is in the runs' folders, and no text of theirs is code."""

from __future__ import annotations

import html
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest

from wegeft_cli.analysis.report import report
from wegeft_cli.analysis.report_page.charts import draw_ablation, draw_scores
from wegeft_cli.analysis.report_page.lines import style_series
from wegeft_cli.analysis.report_page.overview import format_duration
from wegeft_cli.analysis.report_page.render import _draw_still
from wegeft_cli.artifacts.run_results import (
    RunOutcome,
    average,
    find_best,
    read_outcome,
    read_run,
)
from wegeft_cli.errors import UserError
from wegeft_cli.runs.sweep import SweepResult


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
        rows = [row for row in rows if row.get("kind") != "validation"]
        assert [(row["step"], row["value"]) for row in rows] == values
        assert len(values) == 6
    # The losses of training and validation share a chart.
    found = [
        row for row in charts["chart-curve-loss"]["data"]["values"] if row["kind"] == "validation"
    ]
    assert [(row["step"], row["value"]) for row in found] == record.validation["eval_loss"]
    assert "chart-curve-eval_loss" not in charts
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
        *("summary", "scores", "curves", "samples", "learned", "recipe", "environment")
    ]


def read_headline(page: str) -> dict[str, str]:
    """Return the headline of a page about one run."""
    listed = re.search(r'<dl class="headline">(.*?)</dl>', page, re.DOTALL)[1]
    pairs = re.findall(r"<dt>(.*?)</dt><dd>(.*?)</dd>", listed)
    return {name: html.unescape(re.sub("<[^>]+>", "", value)) for name, value in pairs}


def test_the_headline_is_what_the_run_reached(run_dir, tmp_path):
    page = report([run_dir], output=tmp_path / "a.html", look_inside=False).output.read_text()
    headline = read_headline(page)
    record = read_run(run_dir, max_samples=0)
    step, best = min(record.validation["eval_loss"], key=lambda point: point[1])
    assert headline == {
        "Status": "finished",
        "Score: boolq": "66.7 % (base 16.7 %)",
        "Best eval_loss": f"{best:.4g} (step {step})",
        "Training loss": f"{record.run['final_loss']:.4g}",
        "Method": "wegeft",
        "Rank": "4",
        "Learning rate": "0.01",
        "Trainable parameters": f"{record.run['trainable_parameters']:,}",
        "Duration": headline["Duration"],
    }
    assert re.fullmatch(r"(\d+ min )?\d+ s", headline["Duration"])


def test_a_method_without_a_rank_shows_none(run_dir, tmp_path):
    copy = tmp_path / "full"
    shutil.copytree(run_dir, copy)
    recipe = copy / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("type: wegeft", "type: full"))
    headline = read_headline(report([copy], look_inside=False).output.read_text())
    assert headline["Method"] == "full"
    assert "Rank" not in headline


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.4, "0 s"),
        (59.6, "1 min 0 s"),
        (3599, "59 min 59 s"),
        (7260, "2 h 1 min"),
        (2e5, "2 d 7 h"),
    ],
)
def test_durations(seconds, text):
    assert format_duration(seconds) == text


def test_series_differ_in_color_or_dashes():
    styles = [
        (each["color"], tuple(each["dash"])) for each in style_series(list(map(str, range(64))))
    ]
    assert len(set(styles)) == 64


def test_every_chart_has_a_picture_without_scripts(pair, hostile, tmp_path):
    copy = tmp_path / f"c{hostile.replace('/', '')}"
    shutil.copytree(pair[0], copy)
    page = report([*pair, copy], output=tmp_path / "a.html", look_inside=False).output.read_text()
    pictures = re.findall(
        r'data-chart="([^"]+)"><div class="still"[^>]*>(<svg.*?</svg>)</div>', page, re.DOTALL
    )
    drawn = [chart["name"] for chart in read_data(page)["charts"]]
    assert sorted(name for name, _ in pictures) == sorted(drawn)
    for _, text in pictures:
        for element in ElementTree.fromstring(text).iter():
            assert element.tag.rpartition("}")[2] in {
                *("svg", "g", "path", "line", "text", "rect", "defs", "clipPath", "title")
            }
            assert not any(name.startswith("on") or "href" in name for name in element.attrib)


def test_scores_of_many_models_are_named_at_their_lines():
    score = {"task": "boolq", "protocol": "p", "score": 0.5, "ci95": [0.4, 0.6]}

    def draw(number: int) -> dict:
        runs = [
            {"name": f"run-{n}", "scores": [{**score, "model": model}]}
            for n in range(number)
            for model in ("base", "tuned")
        ]
        return draw_scores(runs)

    few, many = draw(4), draw(5)
    assert len({each["color"] for each in few["legend"]}) == 8
    assert many["legend"] == []
    lines = [row["line"] for row in many["spec"]["data"]["values"]]
    assert len(set(lines)) == 10
    assert lines[0] == "run-0: base, boolq (p)"


def test_names_in_pictures_are_text(hostile):
    part = {"part": hostile, "change": -0.5, "lost": 1, "gained": 0}
    found = {"parts": [part], "whole": {"task": hostile}, "by": "group"}
    text = _draw_still(draw_ablation(0, 0, found))
    assert "<script" not in text
    assert "<img" not in text
    assert any(hostile[:20] in "".join(each.itertext()) for each in ElementTree.fromstring(text))


@pytest.fixture
def sweep_dir(run_dir, tmp_path):
    """A sweep of three runs, of which one failed and one waits, as `wegeft sweep` writes it."""
    root = tmp_path / "tries"
    outcomes = []
    for name, rate, status in (
        ("learning_rate=0.01", 0.01, "finished"),
        ("learning_rate=0.02", 0.02, "finished"),
        ("learning_rate=0.03", 0.03, "failed"),
        ("learning_rate=0.04", 0.04, "waiting"),
    ):
        outcome = RunOutcome(name, {"train.learning_rate": rate}, Path("runs") / name, status)
        if status == "waiting":
            outcomes.append(outcome)
            continue
        shutil.copytree(run_dir, root / name)
        metrics = root / name / "metrics.jsonl"
        if rate == 0.02:
            better = re.sub(r'("eval_loss": )(\d+)\.', r"\g<1>0.\2", metrics.read_text())
            metrics.write_text(better)
        placed = replace(outcome, run_dir=root / name)
        error = "the loss <b>diverged" if status == "failed" else None
        outcomes.append(replace(read_outcome(placed, "eval_loss", status, error)))
    rows = average(outcomes)
    result = SweepResult(Path("a.yaml"), root, "failed", "eval_loss", rows, outcomes)
    best = find_best(rows, "eval_loss").values
    (root / "sweep.json").write_text(json.dumps(replace(result, best=best).to_json()))
    return root


def test_a_sweep_is_a_table_by_score_and_joint_curves(sweep_dir):
    result = report([sweep_dir])
    assert result.output == sweep_dir / "report.html"
    assert result.runs == [f"learning_rate={rate}" for rate in ("0.02", "0.01", "0.03")]
    assert result.inspected == ["learning_rate=0.02"]
    page = result.output.read_text()
    assert "<title>Report: tries</title>" in page
    table = re.search(r"<caption>Combinations(.*?)</table>", page, re.DOTALL)[1]
    columns = re.findall(r'<th scope="col">(.*?)</th>', table)
    assert columns[:4] == ["learning_rate", "Runs finished", "final loss", "best eval loss"]
    rows = re.findall(r'<th scope="row">(.*?)</th><td>(.*?)</td>', table)
    assert rows == [
        ("0.02 <strong>(best)</strong>", "1 of 1"),
        ("0.01", "1 of 1"),
        ("0.03", "0 of 1"),
        ("0.04", "0 of 1"),
    ]
    assert "failed: the loss &lt;b&gt;diverged" in page
    assert "<strong>learning_rate=0.04</strong>: waiting" in page
    loss = read_data(page)["charts"][0]["spec"]["data"]["values"]
    assert list(dict.fromkeys(row["run"] for row in loss)) == result.runs
    report([sweep_dir])  # its own page may be replaced


def test_a_sweep_stands_beside_a_run(sweep_dir, run_dir):
    result = report([sweep_dir, run_dir], look_inside=False, output=sweep_dir / "both.html")
    assert result.runs[-1] == "tiny"
    assert "<title>Report: tries, tiny</title>" in result.output.read_text()


def test_a_sweep_without_runs_is_refused(tmp_path):
    table = tmp_path / "sweep.json"
    table.write_text("{}")
    with pytest.raises(UserError, match=r"sweep\.json: is damaged"):
        report([tmp_path])
    outcome = RunOutcome("seed=1", {"seed": 1}, tmp_path / "seed=1").to_json()
    table.write_text(json.dumps({"runs": [outcome], "rows": [{"values": {}}]}))
    with pytest.raises(UserError, match="no run of this sweep has started"):
        report([tmp_path])


def test_many_runs_keep_fewer_points(tmp_path):
    (tmp_path / "run.json").write_text("{}")
    lines = [json.dumps({"step": step, "loss": 1.0}) for step in range(1, 2001)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    for num_runs, kept in ((1, 800), (20, 400), (500, 100)):
        points = read_run(tmp_path, max_samples=0, num_runs=num_runs).curves["loss"]
        assert (len(points), points[0][0], points[-1][0]) == (kept, 1, 2000)


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
