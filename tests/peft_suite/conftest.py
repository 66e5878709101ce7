"""Six small models of the kinds that PEFT's own tests use, and adapters on them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from packaging.version import Version
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from wegeft_cli.interop.peft import WegeftConfig

# PEFT asks transformers by names that are on their way out.
PEFT_MARKS = [pytest.mark.filterwarnings("ignore:.*will be removed in v6:FutureWarning")]
if Version(peft.__version__) < Version("0.21"):
    # What it warned of without cause: heads that are not tied, models that were unloaded, no name.
    PEFT_MARKS += [
        pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning"),
        pytest.mark.filterwarnings("ignore:Already found a `peft_config`:UserWarning"),
        pytest.mark.filterwarnings("ignore:Could not find a config file in  -:UserWarning"),
    ]

VOCABULARY = 64
# Outputs far from the base's, so that a change which is lost shows.
FACTOR_STD = 0.2


class Mlp(nn.Module):
    """Three linears, no config, no name: what PEFT calls a custom model."""

    def __init__(self) -> None:
        super().__init__()
        self.lin0 = nn.Linear(10, 20)
        self.lin1 = nn.Linear(20, 20)
        self.lin2 = nn.Linear(20, 3)

    def forward(self, X: torch.Tensor) -> torch.Tensor:
        hidden = self.lin0(X.to(self.lin0.weight.dtype)).relu()
        return self.lin2(self.lin1(hidden).relu())


def _llama() -> nn.Module:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
            initializer_range=0.3,
            bos_token_id=1,
            eos_token_id=2,
        )
    )


def _gpt2() -> nn.Module:
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCABULARY,
            n_embd=32,
            n_layer=2,
            n_head=4,
            n_positions=64,
            initializer_range=0.2,
            bos_token_id=1,
            eos_token_id=2,
        )
    )


def _qwen2() -> nn.Module:
    return Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=VOCABULARY,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
            initializer_range=0.3,
            bos_token_id=1,
            eos_token_id=2,
        )
    )


def _opt() -> nn.Module:
    return OPTForCausalLM(
        OPTConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            ffn_dim=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=64,
            word_embed_proj_dim=32,
            init_std=0.2,
            bos_token_id=1,
            eos_token_id=2,
        )
    )


def _bert() -> nn.Module:
    return BertForSequenceClassification(
        BertConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=64,
            initializer_range=0.2,
            num_labels=3,
        )
    )


@dataclass(frozen=True)
class Kind:
    """One kind of model: how it is built and loaded, and how an adapter is asked for."""

    name: str
    build: Callable[[], nn.Module]
    options: dict[str, Any]
    loader: Any = AutoModelForCausalLM
    # Two layers of a list, of which one can be chosen by its index.
    layers: str | None = None
    # What can be trained whole beside the adapter, and what can be left out of it.
    to_save: str = "lm_head"
    excluded: str = ""
    groups: tuple[str, ...] = field(default=())

    def config(self, **changes: Any) -> WegeftConfig:
        """The usual adapter of this kind of model."""
        return WegeftConfig(**{"r": 4, **self.options, **changes})


KINDS = {
    kind.name: kind
    for kind in (
        Kind(
            "llama",
            _llama,
            {"task_type": "CAUSAL_LM", "target_modules": ["q_proj", "v_proj", "down_proj"]},
            layers="layers",
            excluded="down_proj",
            groups=("q_proj", "v_proj", "down_proj"),
        ),
        Kind(
            "gpt2",
            _gpt2,
            {"task_type": "CAUSAL_LM", "target_modules": ["c_attn", "c_fc"]},
            layers="h",
            to_save="ln_f",
            excluded="c_fc",
            groups=("c_attn", "c_fc"),
        ),
        Kind(
            "qwen2",
            _qwen2,
            {"task_type": "CAUSAL_LM", "target_modules": ["q_proj", "k_proj", "up_proj"]},
            layers="layers",
            excluded="up_proj",
            groups=("q_proj", "k_proj", "up_proj"),
        ),
        Kind(
            "opt",
            _opt,
            # All share d_in 32 but fc2: the output side, and with it the biases.
            {
                "task_type": "CAUSAL_LM",
                "target_modules": ["q_proj", "v_proj", "fc2"],
                "side": "output",
                "init": "psi_zero",
            },
            layers="layers",
            to_save="final_layer_norm",
            excluded="fc2",
            groups=("q_proj", "v_proj", "fc2"),
        ),
        Kind(
            "bert",
            _bert,
            {"task_type": "SEQ_CLS", "target_modules": ["query", "value"]},
            loader=AutoModelForSequenceClassification,
            layers="layer",
            to_save="classifier",
            excluded="value",
            groups=("query", "value"),
        ),
        Kind(
            "mlp",
            Mlp,
            {"target_modules": ["lin0", "lin1"], "share": "input_dim"},
            to_save="lin2",
            excluded="lin1",
            groups=("d10", "d20"),
        ),
    )
}


class Subject:
    """A kind of model with its files: gives the same base again and again."""

    def __init__(self, kind: Kind, folder: Path) -> None:
        self.kind = kind
        self.folder = folder
        torch.manual_seed(0)
        model = kind.build()
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                # Zero biases, as in a new model, would hide an edit that forgets them.
                nn.init.normal_(parameter, std=0.2)
        if self.is_transformers:
            model.save_pretrained(folder)
            model = kind.loader.from_pretrained(folder)
        self._base = model.eval()

    @property
    def is_transformers(self) -> bool:
        return self.kind.name != "mlp"

    def base(self, dtype: torch.dtype = torch.float32) -> Any:
        """The base model in evaluation mode."""
        return copy.deepcopy(self._base).to(dtype)

    def adapted(self, *, seed: int | None = 1, dtype: torch.dtype = torch.float32, **changes: Any):
        """The base with an adapter whose factors are drawn; `seed=None` leaves them as begun."""
        model = get_peft_model(self.base(dtype), self.kind.config(**changes))
        if seed is not None:
            draw_factors(model, "default", seed)
        return model.eval()

    def inputs(self) -> dict[str, torch.Tensor]:
        """Two rows of input."""
        random = torch.Generator().manual_seed(5)
        if not self.is_transformers:
            return {"X": torch.randn(6, 10, generator=random)}
        return {"input_ids": torch.randint(3, VOCABULARY, (2, 9), generator=random)}

    @torch.no_grad()
    def run(self, model: Any) -> torch.Tensor:
        """The model's output on `inputs`."""
        output = model(**self.inputs())
        return output.logits if self.is_transformers else output

    def loss(self, model: Any) -> torch.Tensor:
        """A number to learn from."""
        output = model(**self.inputs())
        logits = output.logits if self.is_transformers else output
        return logits.float().square().mean()


def factors_of(model: nn.Module, adapter: str = "default") -> dict[str, nn.Parameter]:
    """An adapter's factors by their full names."""
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if ".wegeft_" in name and name.endswith(f".{adapter}")
    }


def draw_factors(model: nn.Module, adapter: str, seed: int) -> None:
    """Give an adapter factors as after a training."""
    random = torch.Generator().manual_seed(seed)
    factors = factors_of(model, adapter)
    assert factors
    with torch.no_grad():
        for parameter in factors.values():
            parameter.copy_(torch.randn(parameter.shape, generator=random) * FACTOR_STD)


def load_adapter_onto(base: nn.Module, folder: Path, **options: Any) -> PeftModel:
    """PEFT's own loading."""
    return PeftModel.from_pretrained(base, folder, **options)


@pytest.fixture(scope="session")
def subjects(tmp_path_factory) -> Callable[[str], Subject]:
    """A function that gives a kind's subject by name; only to be read."""
    made: dict[str, Subject] = {}

    def get(name: str) -> Subject:
        if name not in made:
            made[name] = Subject(KINDS[name], tmp_path_factory.mktemp(name))
        return made[name]

    return get


@pytest.fixture(params=list(KINDS))
def subject(request, subjects) -> Subject:
    """Every kind of model in turn."""
    return subjects(request.param)
