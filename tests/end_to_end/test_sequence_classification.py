"""Texts become a classifier or a number, through the same commands as images."""

import json
from pathlib import Path

import pytest
import torch
from classifiers import write_bert, write_recipe, write_texts
from transformers import (
    AutoModelForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2Model,
)

from wegeft_cli.errors import UserError
from wegeft_cli.evaluation.evaluate import evaluate
from wegeft_cli.merging.merge import merge
from wegeft_cli.planning.plan import plan
from wegeft_cli.runs.train import train

FLOAT32 = 1e-4


@pytest.fixture
def recipe(tmp_path, build_tokenizer):
    base = write_bert(tmp_path / "bert", build_tokenizer(pad="<pad>"))

    def write(rows, name="tiny", **sections):
        path = write_texts(tmp_path / f"{name}.jsonl", rows)
        data = {part: [{"path": str(path)}] for part in ("train", "validation", "test")}
        sections["data"] = {**data, "max_length": 64, **sections.get("data", {})}
        return write_recipe(
            tmp_path,
            name,
            task="sequence_classification",
            model={"name_or_path": str(base)},
            adapter={"target_modules": ["query", "value"]},
            **sections,
        )

    return write


def pairs(label):
    words = [("true", "false"), ("false", "true")] * 4
    return [
        {"sentence1": f"the answer {one}", "sentence2": two * (n + 1), "label": label(one)}
        for n, (one, two) in enumerate(words)
    ]


def test_pairs_are_learned_scored_and_merged(recipe):
    rows = pairs(lambda word: "yes" if word == "true" else "no")
    result = train(recipe(rows), ["train.num_train_epochs=20"])
    found = evaluate(result.run_dir)
    (score,) = found["results"]
    assert score["score"] == 1.0
    assert set(score["metrics"]) == {"accuracy", "f1", "f1_macro", "matthews_correlation"}
    merged = merge(result.run_dir).output_dir
    model = AutoModelForSequenceClassification.from_pretrained(merged)
    assert model.config.id2label == {0: "no", 1: "yes"}
    (after,) = evaluate(merged)["results"]
    assert after["per_class"] == score["per_class"]
    lines = [json.loads(line) for line in Path(found["samples_path"]).read_text().splitlines()]
    assert lines[0]["input"] == ["the answer true", "false"]


def test_a_number_is_learned(recipe):
    rows = pairs(lambda word: 3.5 if word == "true" else 1.0)
    path = recipe(rows, data={"problem_type": "regression"})
    result = train(path, ["train.num_train_epochs=30"])
    (score,) = evaluate(result.run_dir)["results"]
    assert (score["metric"], score["num_correct"], score["per_class"]) == ("pearson", None, [])
    assert score["score"] > 0.9
    last = json.loads((result.run_dir / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["eval_pearson"] == pytest.approx(score["score"], abs=FLOAT32)


def test_f1_is_of_two_classes_alone(recipe):
    rows = [{"text": "true", "label": n % 3} for n in range(6)]
    with pytest.raises(UserError, match="there are 3") as caught:
        train(recipe(rows, eval={"metric": "f1"}))
    assert caught.value.key == "eval.metric"


def test_a_base_without_its_pooler_is_refused_until_that_learns(recipe, tmp_path, build_tokenizer):
    base = write_bert(tmp_path / "bare", build_tokenizer(pad="<pad>"), pooler=False)
    rows = [{"text": "true", "label": n % 2} for n in range(6)]
    options = [f"model.name_or_path={base}", "train.max_steps=1"]
    with pytest.raises(UserError, match="would stay random") as caught:
        train(recipe(rows), options)
    assert "modules_to_save: [bert.pooler.dense]" in caught.value.hint
    result = train(recipe(rows, "second"), [*options, "adapter.modules_to_save=[pooler]"])
    assert result.status == "finished"


def write_gpt2(folder, tokenizer):
    """A decoder whose configuration names no pad token."""
    tokens = {"vocab_size": len(tokenizer), "bos_token_id": None, "eos_token_id": None}
    config = GPT2Config(n_embd=32, n_layer=2, n_head=2, n_positions=64, **tokens)
    GPT2Model(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_the_plan_knows_the_memory_of_a_decoder_without_pad_token(
    recipe, tmp_path, build_tokenizer
):
    base = write_gpt2(tmp_path / "gpt2", build_tokenizer(pad="<pad>"))
    path = recipe(pairs(str))
    options = [f"model.name_or_path={base}", "adapter.target_modules=[c_attn]"]
    planned = plan(path, options)
    assert planned.unknown == []
    assert planned.memory_gib["total"] > 0
    result = train(path, [*options, "train.max_steps=2"])
    assert result.estimated_memory_gib == pytest.approx(planned.memory_gib["total"], rel=0.2)


def read_lines(run_dir, batch_size, *, model="target"):
    """Lines of the samples file: of the run, or of its base beside it."""
    result = evaluate(
        run_dir,
        tasks=["test"],
        batch_size=batch_size,
        output=run_dir / f"by-{batch_size}.json",
        compare_base=model == "base",
    )
    lines = map(json.loads, Path(result["samples_path"]).read_text().splitlines())
    return [line for line in lines if line["model"] == model]


@pytest.mark.parametrize("pad", [None, "<pad>", "</s>"])
def test_a_decoder_reads_no_padding(recipe, tmp_path, build_tokenizer, pad):
    """The configuration names another token than the tokenizer, or neither names one."""
    tokenizer = build_tokenizer(pad=pad)
    base = write_gpt2(tmp_path / "gpt2", tokenizer)
    if pad is not None:
        path = base / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"pad_token_id": 0}))
        assert tokenizer.pad_token_id != 0
    rows = [{"text": "word " * (1 + n), "label": n % 2} for n in range(8)]
    options = [f"model.name_or_path={base}", "adapter.target_modules=[c_attn]"]
    run_dir = train(recipe(rows), [*options, "train.max_steps=4"]).run_dir
    alone, together = ([line["confidence"] for line in read_lines(run_dir, n)] for n in (1, 8))
    assert len(set(alone)) == len(rows)
    assert alone == pytest.approx(together, abs=1e-5)


def test_a_base_that_is_compared_reads_no_padding_either(recipe, tmp_path, build_tokenizer):
    tokenizer = build_tokenizer(pad="<pad>")
    names = {"id2label": {0: "no", 1: "yes"}, "label2id": {"no": 0, "yes": 1}}
    config = GPT2Config(
        n_embd=32, n_layer=2, n_head=2, n_positions=64, vocab_size=len(tokenizer), pad_token_id=0,
        bos_token_id=None, eos_token_id=None, **names,
    )  # fmt: skip
    torch.manual_seed(0)
    GPT2ForSequenceClassification(config).save_pretrained(tmp_path / "gpt2")
    tokenizer.save_pretrained(tmp_path / "gpt2")
    rows = [{"text": "word " * (1 + n), "label": ["no", "yes"][n % 2]} for n in range(8)]
    options = [f"model.name_or_path={tmp_path / 'gpt2'}", "adapter.target_modules=[c_attn]"]
    run_dir = train(recipe(rows), [*options, "train.max_steps=1"]).run_dir
    alone, together = (
        {line["index"]: line["confidence"] for line in read_lines(run_dir, size, model="base")}
        for size in (1, 8)
    )
    assert len(set(alone.values())) == len(rows)
    assert alone == pytest.approx(together, abs=1e-5)


def test_a_decoder_without_anything_to_pad_with_is_refused(recipe, tmp_path, build_tokenizer):
    tokenizer = build_tokenizer(pad=None)
    tokenizer.eos_token = None
    base = write_gpt2(tmp_path / "gpt2", tokenizer)
    options = [f"model.name_or_path={base}", "adapter.target_modules=[c_attn]"]
    with pytest.raises(UserError, match="neither a padding token nor an end of text"):
        train(recipe(pairs(str)), options)


def test_a_validation_larger_than_a_step_counts_in_the_plan(recipe):
    long = [{"text": "word " * 60, "label": n % 2} for n in range(64)]
    path, alone = recipe(long), "train.per_device_train_batch_size=1"
    small = plan(path, ["train.per_device_eval_batch_size=1", alone])
    large = plan(path, ["train.per_device_eval_batch_size=64", alone])
    assert small.memory_gib["validation"] == 0
    assert large.memory_gib["validation"] > 0
    assert large.memory_gib["total"] > small.memory_gib["total"]
