"""Floating-point operations of training, from the layers' shapes and the batches' lengths."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from wegeft_cli.generators.equations import cheaper_view
from wegeft_cli.generators.inject import get_generators
from wegeft_cli.generators.module import AdapterGenerators, GeneratorSettings
from wegeft_cli.generators.targets import Target, find_linears
from wegeft_cli.recipe.schema import Recipe
from wegeft_cli.workflows.survey import PassSurvey

_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")


@dataclass(frozen=True)
class FlopRates:
    """What a forward and backward pass costs; a multiply-add is two operations.

    Args:
        per_position: For each position, padding counted.
        per_square: For each sequence, times the square of its length: attention.
        per_label: For each labelled position: the output head.
        per_pass: For each pass, however long: a view that multiplies the weights themselves.
    """

    per_position: float
    per_square: float
    per_label: float
    per_pass: float

    def count(self, sequences: Any, lengths: Any, labels: Any) -> Any:
        """Count passes of so many sequences of such lengths with so many labels; arrays too."""
        return (
            self.per_position * sequences * lengths
            + self.per_square * sequences * lengths * lengths
            + self.per_label * labels
            + self.per_pass
        )


def find_flop_rates(model: nn.Module, recipe: Recipe, positions_per_pass: float) -> FlopRates:
    """Find the rates of a model that is ready to train; the meta device will do.

    A frozen linear costs its forward product and the one for its input's gradient, one that learns
    also that for its weight. Gradient checkpointing adds the layers' forward pass once more. Norms,
    activations, the optimizer and what a PEFT method does outside of linear layers are left out.

    Args:
        model: The model with its adapter.
        recipe: The recipe.
        positions_per_pass: Positions of a usual pass, by which a generator chooses its view.

    Returns:
        The rates.

    Raises:
        LookupError: If they do not follow from the layers' shapes, with the reason.
    """
    config: Any = model.config
    text = config.get_text_config()
    experts = next((name for name in _EXPERTS if (getattr(text, name, None) or 0) > 1), None)
    if experts is not None:
        raise LookupError("a mixture of experts computes other layers for each token")
    again = 1 if recipe.train.gradient_checkpointing else 0
    per_position, per_label = _count_linears(model, again)
    generated, per_pass = _count_generators(model, positions_per_pass, again)
    heads = getattr(text, "num_attention_heads", None)
    if not heads:
        raise LookupError("its layers do not attend, so their cost does not follow from linears")
    width = heads * (getattr(text, "head_dim", None) or text.hidden_size // heads)
    # Forward two products, backward four, and with a fused kernel the scores once more.
    products = 2 + 4 + 2 * again + (recipe.model.attn_implementation != "eager")
    per_square = 2.0 * products * width * text.num_hidden_layers
    return FlopRates(per_position + generated, per_square, per_label, per_pass)


def count_run_flops(rates: FlopRates, survey: PassSurvey) -> tuple[float, float]:
    """Count the operations of a mean optimizer step, over all processes, and of the whole run.

    Args:
        rates: The model's.
        survey: The run's passes.

    Returns:
        Operations per step, and in all.
    """
    counts = rates.count(
        survey.sequences.astype(float), survey.lengths.astype(float), survey.labels.astype(float)
    )
    per_step = float(counts.sum()) / survey.num_steps
    return per_step, per_step * survey.num_steps_in_all


def _count_linears(model: Any, again: int) -> tuple[float, float]:
    """Operations of the base's linears and a PEFT method's: (per position, per label)."""
    generators = get_generators(model)
    saved = generators.saved_of("default") if generators is not None else None
    trained = set(saved.by_name()) if saved is not None else set()
    head = model.get_output_embeddings()
    heads = [name for name, module in model.named_modules() if module is head]
    per_position = per_label = 0.0
    for name, target in find_linears(model).items():
        if ".original_module" in name:
            continue  # PEFT's untouched copy of a module that is trained whole
        learns = name in trained or model.get_submodule(name).weight.requires_grad
        products = 2 + learns
        size = 2.0 * target.d_in * target.d_out
        if any(name == each or name.startswith(f"{each}.") for each in heads):
            per_label += size * products
        else:
            per_position += size * (products + again)
    return per_position, per_label


def _count_generators(
    model: nn.Module, positions_per_pass: float, again: int
) -> tuple[float, float]:
    """Operations of all edited layers: (per position, per pass)."""
    generators = get_generators(model)
    if generators is None:
        return 0.0, 0.0
    adapter: AdapterGenerators = generators["default"]
    per_position = per_pass = 0.0
    for members in adapter.groups.values():
        for target in members:
            rank = adapter.settings.rank
            if _find_view(adapter.settings, target, positions_per_pass) == "activation":
                width = target.width(adapter.settings.side)
                per_position += 2.0 * 2 * width * rank * (3 + again)
            else:
                per_position += 2.0 * (target.d_in + target.d_out) * rank * (3 + again)
                per_pass += 2.0 * target.d_in * target.d_out * rank * (2 + again)
    return per_position, per_pass


def _find_view(settings: GeneratorSettings, target: Target, num_positions: float) -> str:
    """Tell which view a layer takes while training."""
    if settings.dropout > 0:
        return "weight"
    if settings.view != "auto":
        return settings.view
    if target.rows is not None and settings.side == "input":
        return "weight"
    return cheaper_view(target.d_in, target.d_out, max(1, int(num_positions)), settings.side)
