"""The prompt form of a training travels with the adapter and with what is made of it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from wegeft_cli.artifacts.adapter import Adapter, find_prompt_record
from wegeft_cli.data.text.dataset import build_datasets
from wegeft_cli.errors import UserError
from wegeft_cli.evaluation.evaluate import evaluate
from wegeft_cli.exporting.export import ExportOptions, export
from wegeft_cli.inference.chat import open_conversation
from wegeft_cli.inference.generate import generate
from wegeft_cli.inference.prompt_format import build_prompts
from wegeft_cli.merging.merge import _Job, merge
from wegeft_cli.recipe.load import load_recipe
from wegeft_cli.runs.train import train

CHATML = (
    "{% if enable_thinking is defined and not enable_thinking %}[brief]{% endif %}"
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
THINKING = Path(__file__).parents[1] / "data" / "templates" / "strips-earlier-thoughts.jinja"
ROWS = [{"instruction": f"Say {n}", "output": f"{n}"} for n in range(8)]
TALKS = [
    {"messages": [{"role": "user", "content": f"Say {n}"}, {"role": "assistant", "content": "x"}]}
    for n in range(8)
]
ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes "
    "the request.\n\n### Instruction:\nSay 1\n\n### Response:\n"
)


@pytest.fixture(scope="module")
def chat_base(llama_dir: Path, tmp_path_factory) -> Path:
    """A base with a chat template, one with tools too, and its key in tokenizer_config.json."""
    folder = tmp_path_factory.mktemp("bases") / "chat"
    shutil.copytree(llama_dir, folder)
    config = folder / "tokenizer_config.json"
    values = json.loads(config.read_text())
    config.write_text(json.dumps({**values, "chat_template": CHATML}))
    (folder / "chat_template.jinja").write_text(CHATML)
    more = folder / "additional_chat_templates"
    more.mkdir()
    (more / "tool_use.jinja").write_text("tools")
    return folder


@pytest.fixture(scope="module")
def run_dir(write_recipe_in, chat_base, tmp_path_factory) -> Path:
    """A run of instruction rows, so in Alpaca form, on that base."""
    recipe = write_recipe_in(
        tmp_path_factory.mktemp("alpaca"),
        rows=ROWS,
        model={"name_or_path": str(chat_base)},
        data={"max_length": 256},
        train={"max_steps": 1},
    )
    return train(recipe).run_dir


@pytest.fixture
def apart(run_dir: Path, tmp_path: Path) -> Path:
    """The adapter outside of its run, as it is on a hub."""
    return Path(shutil.copytree(run_dir / "adapter", tmp_path / "apart"))


def test_adapter_records_its_form(run_dir, apart):
    config = json.loads((run_dir / "adapter" / "adapter_config.json").read_text())
    assert config["prompt"]["template"] == "alpaca"
    assert Adapter.open(apart).manifest.prompt.template == "alpaca"
    card = (run_dir / "adapter" / "README.md").read_text()
    assert "form `alpaca`" in card
    assert "### Instruction:\n{instruction}" in card
    assert "the base's chat template writes another form" in card


def test_recorded_form_is_used_outside_of_the_run(apart, chat_base):
    """Without the record `generate` and `chat` would take the chat template."""
    found = generate(apart, prompts=["Say 1"], max_new_tokens=1)
    assert found["template"] == "alpaca"
    assert found["results"][0]["text"] == ALPACA
    assert open_conversation(apart).form.name == "alpaca"
    assert generate(chat_base, prompts=["Say 1"], max_new_tokens=1)["template"] == "chat"
    chosen = generate(apart, prompts=["Say 1"], template="chat", max_new_tokens=1)
    assert chosen["results"][0]["text"].startswith("<|user|>")


def test_chat_protocol_asks_in_the_recorded_form(apart, data_dir):
    result = evaluate(
        apart, tasks=["boolq"], limit=2, protocol="chat", data_dir=data_dir, max_new_tokens=1,
        output=apart.parent / "out.json",
    )  # fmt: skip
    samples = Path(result["samples_path"]).read_text().splitlines()
    assert "### Instruction" in json.loads(samples[0])["prompt"]


@pytest.mark.parametrize("kind", ["lora", "bitfit"])
def test_baselines_record_it(kind, write_recipe, build_llama_dir):
    base = build_llama_dir(attention_bias=True)
    adapter = {"type": kind} | ({"r": 4} if kind == "lora" else {})
    recipe = write_recipe(rows=ROWS, model={"name_or_path": str(base)}, train={"max_steps": 1})
    text = recipe.read_text().partition("adapter:")
    rest = text[2][text[2].index("data:") :]
    recipe.write_text(f"{text[0]}adapter: {json.dumps(adapter)}\n{rest}")
    adapter_dir = train(recipe).adapter_dir
    assert find_prompt_record(adapter_dir).template == "alpaca"
    merged = merge(adapter_dir).output_dir
    assert find_prompt_record(merged).template == "alpaca"


def test_merge_says_what_a_server_would_do(run_dir, tmp_path, listener):
    merged = merge(run_dir, output=tmp_path / "base", reporter=listener).output_dir
    assert any("--chat-template trained" in text for text in listener.warnings)
    assert AutoTokenizer.from_pretrained(merged).get_chat_template() == CHATML
    assert generate(merged, prompts=["Say 1"], max_new_tokens=1)["results"][0]["text"] == ALPACA


@pytest.mark.parametrize("in_memory", [False, True])
def test_merge_writes_the_trained_form(in_memory, run_dir, tmp_path, listener, monkeypatch):
    """A server's `apply_chat_template` then gives the training's tokens, also with tools' name."""
    if in_memory:
        changes = _Job.changes
        monkeypatch.setattr(
            _Job,
            "changes",
            lambda job, shapes, model=None: model and changes(job, shapes, model),
        )
    result = merge(run_dir, output=tmp_path / "m", chat_template="trained", reporter=listener)
    assert not listener.warnings
    tokenizer = AutoTokenizer.from_pretrained(result.output_dir)
    assert isinstance(tokenizer.chat_template, str)
    asked = [{"role": "user", "content": "Say 1"}]
    ids = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_dict=False)
    assert ids == tokenizer(ALPACA)["input_ids"]
    assert "chat_template" not in json.loads((tmp_path / "m/tokenizer_config.json").read_text())
    assert "writes this form" in (tmp_path / "m/README.md").read_text()
    # What is made of the folder next keeps it too.
    assert find_prompt_record(tmp_path / "m").template == "alpaca"


def test_export_carries_it(run_dir, tmp_path, listener):
    options = ExportOptions(parity=False)
    export(run_dir, format="lora", output=tmp_path / "a", options=options, reporter=listener)
    assert any("--chat-template trained" in text for text in listener.warnings)
    assert find_prompt_record(tmp_path / "a").template == "alpaca"
    assert generate(tmp_path / "a", prompts=["Say 1"], max_new_tokens=1)["template"] == "alpaca"
    options = ExportOptions(parity=False, chat_template="trained")
    export(run_dir, format="lora", output=tmp_path / "b", options=options)
    assert "### Instruction" in (tmp_path / "b" / "chat_template.jinja").read_text()


def test_gguf_of_a_merged_model(run_dir, tmp_path):
    gguf = pytest.importorskip("gguf")
    merged = merge(run_dir, output=tmp_path / "m").output_dir
    options = ExportOptions(chat_template="trained")
    found = export(merged, format="gguf", output=tmp_path / "g", options=options)
    field = gguf.GGUFReader(found.output_dir / "model.gguf").fields["tokenizer.chat_template"]
    assert "### Instruction" in field.contents()


def test_template_options_travel(write_recipe, chat_base, data_dir, tmp_path, listener, read_run):
    """The template's variables and the system prompt: training, generate, chat, eval, merge."""
    folders = {}
    for name, data in {
        "plain": {},
        "options": {"chat_template_kwargs": {"enable_thinking": False}, "system": "Be brief."},
    }.items():
        recipe = write_recipe(
            name,
            rows=TALKS,
            model={"name_or_path": str(chat_base)},
            data=data,
            train={"max_steps": 1, "eval_steps": 1},
            logging={"sample_prompts": ["Say 1"]},
        )
        folders[name] = train(recipe).run_dir
    texts = [f["data"]["num_tokens"] for f in map(read_run, folders.values())]
    assert texts[0] < texts[1]
    apart = Path(shutil.copytree(folders["options"] / "adapter", tmp_path / "apart"))
    expected = "[brief]<|system|>Be brief.\n<|user|>Say 1\n<|assistant|>"
    found = generate(apart, prompts=["Say 1"], max_new_tokens=1)
    assert found["results"][0]["text"] == expected
    own = generate(apart, prompts=["Say 1"], system="Be long.", max_new_tokens=1)
    assert own["results"][0]["text"].startswith("[brief]<|system|>Be long.\n<|user|>")
    conversation = open_conversation(apart, max_new_tokens=1)
    assert conversation._fit("Say 1")[0] == expected
    result = evaluate(
        apart, tasks=["boolq"], protocol="chat", data_dir=data_dir,
        max_new_tokens=1, output=tmp_path / "out.json",
    )  # fmt: skip
    sample = json.loads(Path(result["samples_path"]).read_text().splitlines()[0])
    assert sample["prompt"].startswith("[brief]<|system|>Be brief.\n<|user|>")
    merge(apart, output=tmp_path / "m", reporter=listener)
    assert any("enable_thinking" in text for text in listener.warnings)
    merge(apart, output=tmp_path / "t", chat_template="trained")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "t")
    asked = [{"role": "user", "content": "Say 1"}]
    shown = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
    assert shown == expected


def test_older_adapters_load(apart, tmp_path):
    """Without the record the form is not known, and nothing else is missing."""
    config = apart / "adapter_config.json"
    values = json.loads(config.read_text())
    del values["prompt"]
    config.write_text(json.dumps(values))
    assert generate(apart, prompts=["Say 1"], max_new_tokens=1)["template"] == "chat"
    merge(apart, output=tmp_path / "m")
    with pytest.raises(UserError, match="is not recorded"):
        merge(apart, output=tmp_path / "t", chat_template="trained")
    with pytest.raises(UserError, match="got 'mine'"):
        merge(apart, output=tmp_path / "t", chat_template="mine")


def test_unknown_form_of_a_newer_version(apart):
    config = apart / "adapter_config.json"
    values = json.loads(config.read_text())
    config.write_text(json.dumps({**values, "prompt": {"template": "of_tomorrow"}}))
    with pytest.raises(UserError, match="no prompt form 'of_tomorrow'"):
        generate(apart, prompts=["Say 1"], max_new_tokens=1)


@pytest.mark.parametrize("thinks", [None, False])
def test_thinking_mode_reaches_every_prompt(thinks, write_recipe, llama_dir, data_dir, tmp_path):
    """With a template of a reasoning model the empty thought belongs to each prompt, or to none."""
    base = Path(shutil.copytree(llama_dir, tmp_path / "base"))
    shutil.copy(THINKING, base / "chat_template.jinja")
    recipe = write_recipe(
        rows=TALKS,
        model={"name_or_path": str(base)},
        data={
            "max_length": 256,
            **({} if thinks is None else {"chat_template_kwargs": {"enable_thinking": thinks}}),
        },
        train={"max_steps": 1},
        logging={"sample_prompts": ["Say 1"]},
    )
    run_dir = train(recipe).run_dir
    section = load_recipe(recipe).recipe
    tokenizer = AutoTokenizer.from_pretrained(base)
    rows = build_datasets(section.data, tokenizer=tokenizer, recipe_dir=None).train
    ids, learned = rows.row(0)
    samples = build_prompts(section, tokenizer, tmp_path, "chat")
    apart = Path(shutil.copytree(run_dir / "adapter", tmp_path / "apart"))
    asked = generate(apart, prompts=["Say 1"], max_new_tokens=1)["results"][0]["text"]
    scored = evaluate(
        apart, tasks=["boolq"], protocol="chat", data_dir=data_dir, limit=1, max_new_tokens=1,
        output=tmp_path / "out.json",
    )  # fmt: skip
    prompts = {
        "training": tokenizer.decode(ids[~learned][: learned.tolist().index(True)]),
        "samples": samples.texts[0],
        "generate": asked,
        "chat": open_conversation(apart, max_new_tokens=1)._fit("Say 1")[0],
        "eval": json.loads(Path(scored["samples_path"]).read_text().splitlines()[0])["prompt"],
    }
    block = "<think>\n\n</think>\n\n"
    found = {place: prompt.endswith(block) for place, prompt in prompts.items()}
    assert found == dict.fromkeys(prompts, thinks is False)


def test_another_end_token_is_a_property_of_the_base(write_recipe, llama_dir, tmp_path):
    """Training, merge and adapter take it from the copy, whose fingerprint is the original's."""
    base = Path(shutil.copytree(llama_dir, tmp_path / "base"))
    config = base / "tokenizer_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "eos_token": "<pad>"}))
    recipe = write_recipe(model={"name_or_path": str(base)}, train={"max_steps": 1})
    run_dir = train(recipe).run_dir
    tokenizer = AutoTokenizer.from_pretrained(base)
    data = load_recipe(recipe).recipe.data
    ids, learned = build_datasets(data, tokenizer=tokenizer, recipe_dir=None).train.row(0)
    assert (tokenizer.decode(ids[-1]), bool(learned[-1])) == ("<pad>", True)
    merged = merge(run_dir).output_dir
    assert AutoTokenizer.from_pretrained(merged).eos_token == "<pad>"
    merge(run_dir, base=str(llama_dir), output=tmp_path / "of-the-original")
