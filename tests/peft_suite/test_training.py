"""Learning through PEFT: checkpointing, transformers' Trainer with a resume, TRL, torch.compile."""

import pytest
import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model
from transformers import Trainer, TrainingArguments

from tests.peft_suite.conftest import PEFT_MARKS, VOCABULARY, draw_factors, factors_of
from wegeft_cli.methods.wegeft.inject import inject_generators

pytestmark = PEFT_MARKS
# A second forward pass sums in the same order.
RECOMPUTED = {"rtol": 1e-5, "atol": 1e-7}
FLOAT32 = {"rtol": 1e-4, "atol": 1e-4}


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_gradient_checkpointing(subject, reentrant, dropout):
    if not subject.is_transformers:
        pytest.skip("a model without checkpointing")
    found = []
    for checkpoints in (False, True):
        model = subject.adapted(dropout=dropout)
        # The base's own dropout draws from the same state as the adapter's seeds: leave it out.
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        if subject.kind.name == "opt":
            model.config.dropout = 0.0
            for layer in model.base_model.model.model.decoder.layers:
                layer.dropout = layer.activation_dropout = 0.0
        model.train()
        if checkpoints:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            if reentrant:
                model.enable_input_require_grads()
        torch.manual_seed(3)
        subject.loss(model).backward()
        found.append(gradients(model))
    plain, checkpointed = found
    assert plain.keys() == checkpointed.keys() >= set(factors_of(model))
    for name, gradient in plain.items():
        torch.testing.assert_close(checkpointed[name], gradient, **RECOMPUTED)


def test_a_step_is_the_step_of_the_generators(subjects):
    """One method: the same factors take the same way, bit for bit, with and without PEFT."""
    subject = subjects("llama")
    model = subject.adapted(dropout=0.1)
    own = subject.base()
    options = {k: v for k, v in subject.kind.options.items() if k != "task_type"}
    inject_generators(own, rank=4, dropout=0.1, **options)
    pairs = []
    with torch.no_grad():
        for group in subject.kind.groups:
            for kind in ("phi", "psi"):
                theirs = factors_of(model)[f"base_model.wegeft_{kind}_{group}.default"]
                ours = getattr(own.wegeft["default"][group], kind)
                ours.copy_(theirs)
                pairs.append((ours, theirs))
    assert len(pairs) == 6
    for network in (own, model):
        network.train()
        torch.manual_seed(3)
        learned = [p for p in network.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(learned, lr=0.01)
        for _ in range(3):
            optimizer.zero_grad()
            subject.loss(network).backward()
            optimizer.step()
    assert all(ours.equal(theirs) for ours, theirs in pairs)


def rows():
    """A count upwards from several numbers: something that can be learned."""
    ids = [[3 + (start + n) % (VOCABULARY - 3) for n in range(8)] for start in range(24)]
    return Dataset.from_dict({"input_ids": ids, "labels": ids})


def build_trainer(subject, folder, **changes):
    torch.manual_seed(0)
    model = get_peft_model(subject.base(), subject.kind.config())
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        max_steps=8,
        learning_rate=0.05,
        lr_scheduler_type="cosine",
        logging_steps=2,
        save_steps=4,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        seed=1,
        **changes,
    )
    return Trainer(model=model, args=arguments, train_dataset=rows())


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_transformers_trainer_with_a_resume(subjects, tmp_path):
    subject = subjects("llama")
    whole = build_trainer(subject, tmp_path / "whole", gradient_checkpointing=True)
    whole.train()
    losses = [line["loss"] for line in whole.state.log_history if "loss" in line]
    assert losses[-1] < losses[0]
    resumed = build_trainer(subject, tmp_path / "resumed", gradient_checkpointing=True)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    ours, theirs = factors_of(whole.model), factors_of(resumed.model)
    assert len(ours) == 6
    assert all(theirs[name].equal(parameter) for name, parameter in ours.items())
    loaded = PeftModel.from_pretrained(subject.base(), tmp_path / "whole" / "checkpoint-8")
    assert subject.run(loaded).equal(subject.run(whole.model.eval()))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_trl_sft_trainer(llama_dir, tmp_path):
    trl = pytest.importorskip("trl", reason="the package trl is not installed")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from wegeft_cli.interop.peft import WegeftConfig

    texts = [{"text": f"the correct answer is solution{n % 2 + 1}"} for n in range(16)]
    trainer = trl.SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(llama_dir),
        processing_class=AutoTokenizer.from_pretrained(llama_dir),
        args=trl.SFTConfig(
            output_dir=str(tmp_path),
            per_device_train_batch_size=4,
            max_steps=4,
            learning_rate=0.01,
            logging_steps=1,
            report_to=[],
            use_cpu=True,
            bf16=False,
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_list(texts),
        peft_config=WegeftConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert losses[-1] < losses[0]
    trainer.save_model(str(tmp_path / "adapter"))
    base = AutoModelForCausalLM.from_pretrained(llama_dir)
    loaded = PeftModel.from_pretrained(base, tmp_path / "adapter")
    ids = torch.arange(4, 12)[None]
    with torch.no_grad():
        expected = trainer.model.eval()(ids).logits
        assert loaded(ids).logits.equal(expected)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["llama", "gpt2", "mlp"])
def test_compiled_models_follow_their_adapters(subjects, name):
    subject = subjects(name)
    model = subject.adapted()
    model.add_adapter("other", subject.kind.config(r=2))
    draw_factors(model, "other", 3)
    expected = {}
    for name in ("default", "other"):
        model.set_adapter(name)
        expected[name] = subject.run(model.eval())
    torch.compiler.reset()
    compiled = torch.compile(model, backend="eager")
    for name in ("default", "other", "default"):
        model.set_adapter(name)
        torch.testing.assert_close(subject.run(compiled), expected[name], **FLOAT32)
    with model.disable_adapter():
        base = subject.run(subject.base())
        torch.testing.assert_close(subject.run(compiled), base, **FLOAT32)
    model.merge_adapter()
    torch.testing.assert_close(subject.run(compiled), expected["default"], **FLOAT32)
