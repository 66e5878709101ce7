"""The prompt form of a training as a chat template: the same tokens as the training rows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from wegeft_cli.artifacts.prompt_record import PromptRecord
from wegeft_cli.data.text.dataset import build_datasets
from wegeft_cli.data.text.templates import TEMPLATES, fill_turns, template_hash
from wegeft_cli.data.text.trained_form import describe_difference, write_trained_form
from wegeft_cli.errors import UserError
from wegeft_cli.recipe.schema import DataSection, DataSource

NAMED = sorted(name for name, pair in TEMPLATES.items() if pair is not None)
THINKS = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n"
    "{% endif %}{% endif %}"
)


def build_metaspace(scheme: str) -> PreTrainedTokenizerFast:
    """A tokenizer that marks spaces as SentencePiece does, and adds BOS."""
    backend = Tokenizer(models.Unigram())
    backend.normalizer = normalizers.Sequence([])
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    trainer = trainers.UnigramTrainer(
        vocab_size=120,
        special_tokens=["<unk>", "<s>", "</s>"],
        unk_token="<unk>",
        show_progress=False,
    )
    texts = [pair.prompt for pair in TEMPLATES.values() if pair is not None]
    backend.train_from_iterator(texts * 2, trainer)
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")


@pytest.fixture(scope="module", params=["adds BOS", "adds EOS", "always", "first"])
def any_tokenizer(request, tokenizer, eos_adding_tokenizer):
    made = {"adds BOS": tokenizer, "adds EOS": eos_adding_tokenizer}
    return made.get(request.param) or build_metaspace(request.param)


@pytest.mark.parametrize("name", NAMED)
def test_named_form_gives_the_prompts_tokens(name, any_tokenizer, write_rows):
    """`apply_chat_template` continues with the answer where the training row does."""
    question = " What is 'a' {b} \"c\"?\nÄ 7"
    file = write_rows([{"prompt": question, "completion": "42"}])
    section = DataSection(train=[DataSource(path=str(file))], template=name, max_length=2000)
    row, learned = build_datasets(section, tokenizer=any_tokenizer, recipe_dir=None).train.row(0)
    text = write_trained_form(PromptRecord(name), any_tokenizer)
    written = any_tokenizer.apply_chat_template(
        [{"role": "user", "content": question}],
        chat_template=text,
        add_generation_prompt=True,
        return_dict=False,
    )
    first = learned.tolist().index(True)
    # The question alone, as `generate` encodes it: a token can join prompt and answer in a row.
    pair = TEMPLATES[name]
    prompt = any_tokenizer(pair.prompt.format(instruction=question))["input_ids"]
    if prompt[-1] == any_tokenizer.eos_token_id:
        prompt.pop()
    assert written == prompt
    assert row.tolist()[:first] == written[:first]


def test_several_turns_are_pairs(tokenizer):
    text = write_trained_form(PromptRecord("gsm8k_wegeft"), tokenizer)
    turns = [
        {"role": "user", "content": "1 + 1?"},
        {"role": "assistant", "content": "#### 2"},
        {"role": "user", "content": "2 + 2?"},
    ]
    shown = tokenizer.apply_chat_template(turns, chat_template=text, tokenize=False)
    pair = TEMPLATES["gsm8k_wegeft"]
    assert shown == "<s>" + fill_turns(pair, turns, "</s>")
    assert "The answer is: 2</s>" in shown
    with pytest.raises(Exception, match="no place for a turn of the role system"):
        tokenizer.apply_chat_template(
            [{"role": "system", "content": "x"}, *turns], chat_template=text, tokenize=False
        )


def test_options_become_defaults(chat_tokenizer):
    """The arguments, the system prompt and the merge hold unless the caller says otherwise."""
    chat_tokenizer.chat_template = THINKS
    record = PromptRecord(
        "chat", None, {"enable_thinking": False, "more": [1, {"a": None}]}, system='Be ✓ "brief".'
    )
    text = write_trained_form(record, chat_tokenizer)
    asked = [{"role": "user", "content": "Hi"}]

    def show(messages, template, **options):
        return chat_tokenizer.apply_chat_template(
            messages, chat_template=template, tokenize=False, add_generation_prompt=True, **options
        )

    system = [{"role": "system", "content": 'Be ✓ "brief".'}]
    assert show(asked, text) == show(system + asked, THINKS, enable_thinking=False)
    assert show(asked, text, enable_thinking=True) == show(system + asked, THINKS)
    own = [{"role": "system", "content": "Be long."}]
    assert show(own + asked, text) == show(own + asked, THINKS, enable_thinking=False)

    merged = write_trained_form(PromptRecord("chat", system_turn="merge"), chat_tokenizer)
    both = [{"role": "user", "content": "Be long.\n\nHi"}]
    assert show(own + asked, merged) == show(both, THINKS)


def test_file_travels_as_text(chat_tokenizer):
    mine = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}[assistant]"
    record = PromptRecord("mine.jinja", chat_template=mine)
    assert write_trained_form(record, chat_tokenizer) == mine
    assert PromptRecord.from_json(record.to_json(), file="x") == record


def test_form_that_the_tokens_do_not_give(tokenizer, monkeypatch):
    """Nothing is written that a server would render in other tokens."""
    monkeypatch.setattr(
        "wegeft_cli.data.text.trained_form._find_special_start", lambda tokenizer: "no BOS"
    )
    with pytest.raises(UserError, match="cannot be written as a chat template"):
        write_trained_form(PromptRecord("alpaca"), tokenizer)


@pytest.mark.parametrize(
    ("record", "base", "said"),
    [
        (PromptRecord("alpaca"), THINKS, "form `alpaca`, and the base's chat template writes"),
        (PromptRecord("alpaca"), None, "the base has no chat template"),
        (PromptRecord("chat", template_hash(THINKS)), THINKS, None),
        (PromptRecord("chat", template_hash(THINKS)), "x", "is not the one of the training"),
        (PromptRecord("chat", None, {"a": 1}), THINKS, '"chat_template_kwargs": {"a": 1}'),
        (PromptRecord("chat", None, system="x"), THINKS, '"system": "x"'),
    ],
)
def test_difference(record, base, said):
    found = describe_difference(record, base)
    assert (found is None) if said is None else said in found


@pytest.mark.parametrize(
    "values", ["alpaca", {}, {"template": 3}, {"template": "chat", "system": 3},
               {"template": "chat", "chat_template_kwargs": [1]},
               {"template": "chat", "more_templates": [1]}]
)  # fmt: skip
def test_damaged_record(values):
    with pytest.raises(UserError, match="must be a map"):
        PromptRecord.from_json(json.loads(json.dumps(values)), file="adapter_config.json")


def test_system_prompt_of_a_data_set(chat_tokenizer, write_rows, tmp_path: Path):
    """`data.system` is added to conversations without a system turn, and is part of the cache's
    key; a form of single questions has no place for it."""
    rows = [
        {"messages": [*system, {"role": "user", "content": "Hi"},
                      {"role": "assistant", "content": "Ho"}]}
        for system in ([], [{"role": "system", "content": "own"}])
    ]  # fmt: skip
    source = DataSource(path=str(write_rows(rows)))
    texts = {}
    for system in (None, "Be brief.", None):
        section = DataSection(train=[source], system=system, cache_dir=str(tmp_path / "cache"))
        train = build_datasets(section, tokenizer=chat_tokenizer, recipe_dir=None).train
        texts[system] = [chat_tokenizer.decode(train.row(n)[0]) for n in range(2)]
    assert "system" not in texts[None][0]
    assert texts["Be brief."][0].startswith("<|im_start|>system\nBe brief.<|im_end|>")
    assert texts["Be brief."][1] == texts[None][1]
    section = DataSection(train=[source], system="Be brief.", template="alpaca")
    with pytest.raises(UserError, match="no place for a system prompt") as caught:
        build_datasets(section, tokenizer=chat_tokenizer, recipe_dir=None)
    assert caught.value.key == "data.system"


@pytest.mark.parametrize("file", sorted((Path(__file__).parent / "templates").glob("*.jinja")))
def test_options_of_real_templates(chat_tokenizer, file):
    """Templates of several families, one of which refuses a system turn unless it is merged."""
    chat_tokenizer.chat_template = file.read_text()
    for record in (
        PromptRecord("chat", None, {"enable_thinking": False}),
        PromptRecord("chat", None, {"enable_thinking": False}, "merge", "Be brief."),
    ):
        text = write_trained_form(record, chat_tokenizer)
        shown = chat_tokenizer.apply_chat_template(
            [{"role": "user", "content": "Hi"}],
            chat_template=text,
            tokenize=False,
            add_generation_prompt=True,
        )
        assert ("Be brief.\n\nHi" in shown) == (record.system is not None)
        assert ("</think>" in shown) == ("enable_thinking" in file.read_text())
