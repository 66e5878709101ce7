"""A run goes on over its own data alone; what an older run did not record is not missed."""

import json
import shutil

import pytest
from transformers import AutoTokenizer

from wegeft_cli.artifacts.run_directory import RunDirectory
from wegeft_cli.data.fingerprint import digest_inputs
from wegeft_cli.errors import UserError
from wegeft_cli.models.loading import load_tokenizer
from wegeft_cli.recipe.schema import DataSection, DataSource
from wegeft_cli.runs.train import train

OTHER = [{"prompt": f"other {n}", "completion": "rows"} for n in range(23)]


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize(
    ("streaming", "told"),
    [(False, ["data.train[0] rows: 10 then, 23 now", "sha256"]), (True, ["data.train[0] digest"])],
)
def test_changed_rows_are_refused(
    write_recipe, stop_after, files_in, tmp_path, unequal_rows, streaming, told, listener
):
    recipe = write_recipe(data={"streaming": streaming}, train={"max_steps": 4})
    run_dir = train(recipe, should_stop=stop_after(2), reporter=listener).run_dir
    is_of_part = any(n.startswith("looked at of the stream: the first 10") for n in listener.notes)
    assert is_of_part is streaming
    before = files_in(run_dir)
    write_rows(tmp_path / "tiny.jsonl", OTHER)
    checkpoint = run_dir / "checkpoints" / "step-00000002"
    elsewhere = [f"output_dir={tmp_path / 'elsewhere'}"]
    for resume, overrides in (("auto", []), (str(checkpoint), []), (str(checkpoint), elsewhere)):
        with pytest.raises(UserError, match="data have changed") as caught:
            train(recipe, overrides, resume=resume)
        assert all(words in caught.value.message for words in told)
        assert caught.value.file == str(run_dir / "run.json")
        assert "another output_dir" in caught.value.hint
    assert files_in(run_dir) == before
    write_rows(tmp_path / "tiny.jsonl", unequal_rows)  # the same bytes in a newer file
    assert train(recipe, resume="auto").status == "finished"


@pytest.mark.parametrize("key", ["template_hash", "tokenizer_sha256"])
def test_another_prompt_form_or_tokenizer_is_refused(write_recipe, stop_after, read_run, key):
    recipe = write_recipe()
    run_dir = train(recipe, should_stop=stop_after(2)).run_dir
    run = read_run(run_dir)
    (run["data"] if key in run["data"] else run)[key] = "another"
    RunDirectory(run_dir).update(run)
    with pytest.raises(UserError, match=f"{key}: another then, [0-9a-f]+ now"):
        train(recipe, resume="auto")


def test_an_older_run_that_recorded_less_goes_on(write_recipe, stop_after, read_run, tmp_path):
    recipe = write_recipe()
    run_dir = train(recipe, should_stop=stop_after(2)).run_dir
    run = read_run(run_dir)
    for key in ("data", "tokenizer_sha256", "stream_digests"):
        del run[key]
    RunDirectory(run_dir).update(run)
    assert train(recipe, resume="auto").status == "finished"
    assert read_run(run_dir)["data"]["num_rows"] == 10


def test_a_tokenizer_is_known_by_what_it_does(llama_dir):
    def digest(tokenizer):
        return digest_inputs(DataSection(), tokenizer, None)["tokenizer_sha256"]

    tokenizer = load_tokenizer(str(llama_dir))
    before = digest(tokenizer)
    tokenizer(["a", "b c"], padding=True, truncation=True, max_length=8)  # leaves settings behind
    assert digest(tokenizer) == before == digest(AutoTokenizer.from_pretrained(llama_dir))
    tokenizer.eos_token = next(token for token in tokenizer.get_vocab() if len(token) > 1)
    of_other_end = digest(tokenizer)
    tokenizer.add_tokens(["<new>"])
    assert len({before, of_other_end, digest(tokenizer)}) == 3


@pytest.mark.parametrize("streaming", [False, True])
def test_changed_validation_rows_are_refused(
    write_recipe, stop_after, files_in, tmp_path, unequal_rows, streaming
):
    validation = tmp_path / "validation.jsonl"
    write_rows(validation, unequal_rows[:4])
    section = {"streaming": streaming, "validation": [{"path": "validation.jsonl"}]}
    recipe = write_recipe(data=section, train={"max_steps": 4, "eval_steps": 1})
    run_dir = train(recipe, should_stop=stop_after(2)).run_dir
    before = files_in(run_dir)
    write_rows(validation, OTHER)
    told = r"data\.validation\[0\] rows: 4 then, 23 now; data\.validation\[0\] sha256"
    with pytest.raises(UserError, match=told):
        train(recipe, resume="auto")
    assert files_in(run_dir) == before
    write_rows(validation, unequal_rows[:4])
    assert train(recipe, resume="auto").status == "finished"


def test_another_end_of_text_is_refused(write_recipe, stop_after, llama_dir, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(llama_dir, base)
    recipe = write_recipe(model={"name_or_path": str(base)})
    train(recipe, should_stop=stop_after(2))
    settings = json.loads((base / "tokenizer_config.json").read_text())
    # A special token already, so that nothing but its office changes.
    settings["eos_token"] = settings["bos_token"]
    (base / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match=r"tokenizer_sha256: [0-9a-f]+ then, [0-9a-f]+ now"):
        train(recipe, resume="auto")


@pytest.mark.parametrize("size", [1000, 3 * 2**20])
def test_a_stream_is_known_by_length_and_pieces(llama_dir, tmp_path, size):
    path = tmp_path / "rows.jsonl"
    section = DataSection(train=[DataSource(path=str(path))], streaming=True)
    tokenizer = load_tokenizer(str(llama_dir))

    def digest(data):
        path.write_bytes(data)
        return digest_inputs(section, tokenizer, None)["stream_digests"]

    data = bytes(range(1, 252)) * (size // 251)  # no piece is like its neighbour
    seen = [digest(data), digest(data + b"a"), digest(data[1:] + data[:1])]
    seen += [digest(b"a" + data[1:]), digest(data[:-1] + b"a")]
    assert len({text for (text,) in seen}) == 5
    assert digest(data) == seen[0]
