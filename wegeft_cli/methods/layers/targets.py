"""Which linears of a model are adapted, and which rows of a fused one."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wegeft_cli.errors import UserError, raise_all
from wegeft_cli.models.module_names import ends_with
from wegeft_cli.recipe.schema import Side

Rows = tuple[tuple[int, int], ...]

# The name under which a model owns its generators; modules below it are not the base's.
ROOT_NAME = "wegeft"

# The weights of experts as transformers calls them where it stacks them.
_EXPERT_WEIGHTS = frozenset({"gate_up_proj", "gate_proj", "up_proj", "down_proj"})

# Heads that classify instead of predicting tokens; `all-linear` leaves them alone, as it does the
# output embedding: they are trained whole or not at all.
_HEAD_NAMES = frozenset({"lm_head", "score", "classifier", "qa_outputs", "cls", "fc_norm"})


_FUSED = {
    "gpt2.GPT2Attention.c_attn": "thirds",
    "openai.Attention.c_attn": "thirds",
    "imagegpt.ImageGPTAttention.c_attn": "thirds",
    "mpt.MptAttention.Wqkv": "thirds",
    "modernbert.ModernBertAttention.Wqkv": "thirds",
    "hiera.HieraMaskUnitAttention.qkv": "thirds",
    "phi3.Phi3Attention.qkv_proj": "grouped",
    "phi4_multimodal.Phi4MultimodalAttention.qkv_proj": "grouped",
    "gpt_neox.GPTNeoXAttention.query_key_value": "by head",
    "gpt_neox_japanese.GPTNeoXJapaneseAttention.query_key_value": "by head",
    "bloom.BloomAttention.query_key_value": "by head",
    "persimmon.PersimmonAttention.query_key_value": "by head",
    "minimax.MiniMaxLightningAttention.qkv_proj": "by head",
    "deberta.DisentangledSelfAttention.in_proj": "by head",
    "codegen.CodeGenAttention.qkv_proj": "CodeGen",
    "gpt_bigcode.GPTBigCodeAttention.c_attn": "GPTBigCode",
    "falcon.FalconAttention.query_key_value": "Falcon",
    "phi3.Phi3MLP.gate_up_proj": "gate, up",
    "phi4_multimodal.Phi4MultimodalMLP.gate_up_proj": "gate, up",
    "glm.GlmMLP.gate_up_proj": "gate, up",
    "glm4.Glm4MLP.gate_up_proj": "gate, up",
    "zamba2.Zamba2MLP.gate_up_proj": "gate, up",
}
"""Rows of fused projections, by family, class of the module around them, and kind.

In equal thirds q, k, v; with fewer rows for k and v; q, k, v of each head; gate before up.
"""
_HEAD_WIDTHS = ("head_dim", "head_size", "attention_head_size")


@dataclass(frozen=True)
class Target:
    """One adapted linear, or the named rows of a fused one.

    Args:
        name: Full dotted module name.
        kind: What it is called in its layer (`q_proj`, `c_attn_q`).
        d_in: Input width.
        d_out: Output width of the adapted rows.
        rows: Adapted output rows as [start, stop) ranges; None means all.
        transposed: Whether the weight is stored [d_in, d_out] (transformers' Conv1D).
        experts: How many matrices the weight stacks, which `name` is then the parameter's name of;
            0 for a linear.
    """

    name: str
    kind: str
    d_in: int
    d_out: int
    rows: Rows | None = None
    transposed: bool = False
    experts: int = 0

    @property
    def label(self) -> str:
        """Name for messages and patterns: the module's, with the rows of a fused one."""
        return self.name if self.rows is None else f"{self.name}:{self.kind.rsplit('_', 1)[-1]}"

    def width(self, side: Side) -> int:
        """Width that the pair works on: `d_in` on the input side, `d_out` on the output side."""
        return self.d_in if side == "input" else self.d_out


def find_linears(model: nn.Module) -> dict[str, Target]:
    """List every linear layer of a model, whole; quantized ones too, and on any device (meta).

    Args:
        model: Any module; `torch.nn.Linear` with its subclasses and transformers' Conv1D count.
    """
    # Imported where there is a model: a merge by streaming has none, and starts a second sooner.
    from transformers.pytorch_utils import Conv1D

    linears = {}
    for name, module in model.named_modules():
        if name.startswith(f"{ROOT_NAME}."):
            continue  # a linear that is trained whole
        kind = _kind_of(name)
        if isinstance(module, nn.Linear):
            linears[name] = Target(name, kind, module.in_features, module.out_features)
        elif isinstance(module, Conv1D):
            d_in, d_out = module.weight.shape
            linears[name] = Target(name, kind, d_in, d_out, transposed=True)
    return linears


def find_experts(model: nn.Module) -> dict[str, Target]:
    """List the stacked weights `[experts, ...]` of a mixture of experts by the parameters' names.

    transformers 5 stores the experts of a layer in one parameter for each of their products.
    """
    experts = {}
    for name, module in model.named_modules():
        transposed = _experts_transposed(module)
        if transposed is None or name.startswith(f"{ROOT_NAME}."):
            continue
        for kind, weight in module._parameters.items():
            if kind in _EXPERT_WEIGHTS and weight is not None and weight.ndim == 3:
                number, d_out, d_in = weight.shape
                if transposed:
                    d_out, d_in = d_in, d_out
                full_name = f"{name}.{kind}"
                experts[full_name] = Target(
                    full_name, kind, d_in, d_out, transposed=transposed, experts=number
                )
    return experts


def _experts_transposed(module: nn.Module) -> bool | None:
    """Return whether a module stacks experts as [d_in, d_out]; None if it holds no experts."""
    if type(module).__name__ == "Llama4TextExperts":
        return True
    transposed = getattr(module, "is_transposed", None)
    return transposed if isinstance(transposed, bool) else None


def find_adaptable(model: nn.Module) -> dict[str, Target]:
    """List all that a generator can change: linears, and the stacked weights of experts."""
    return find_linears(model) | find_experts(model)


def weight_of(model: nn.Module, target: Target) -> Any:
    """Return the weight that a target changes."""
    if target.experts:
        return model.get_parameter(target.name)
    return model.get_submodule(target.name).weight


def module_of(model: nn.Module, target: Target) -> nn.Module:
    """Return the module whose forward pass uses a target's weight."""
    return model.get_submodule(target.name.rpartition(".")[0] if target.experts else target.name)


def _kind_of(name: str) -> str:
    """Return a module's last name; a numbered one (`mlp.0`) is named with its list, `mlp_0`."""
    *path, last = name.split(".")
    parents = [part for part in path if not part.isdigit()]
    return f"{parents[-1]}_{last}" if last.isdigit() and parents else last


def find_targets(model: nn.Module, target_modules: str | Sequence[str]) -> list[Target]:
    """Find the linears that a recipe's `target_modules` names.

    Raises:
        UserError: If a name or expression matches nothing, or rows overlap.
        ExceptionGroup: If several names are at fault.
    """
    linears = find_adaptable(model)
    if isinstance(target_modules, str):
        return _match_expression(model, linears, target_modules)
    found: list[Target] = []
    faults: list[UserError] = []
    for entry in target_modules:
        base_name, _, part = entry.partition(":")
        hits = find_hits(linears, base_name)
        if not hits:
            faults.append(_nothing_matches(base_name, linears))
            continue
        if others := [hit for hit in hits if not is_product(module_of(model, hit))]:
            faults.append(_no_product(model, others[0]))
            continue
        try:
            found += [_cut_rows(model, hit, part) for hit in hits] if part else hits
        except UserError as fault:
            faults.append(fault)
    raise_all(faults)
    _check_overlap(found)
    order = {name: place for place, name in enumerate(linears)}
    return sorted(dict.fromkeys(found), key=lambda target: (order[target.name], target.rows or ()))


def find_hits(linears: Mapping[str, Target], name: str) -> list[Target]:
    """Return the layers whose names end with a name; a full name with a dot is that layer alone."""
    if "." in name and name in linears:
        return [linears[name]]
    return [target for full, target in linears.items() if ends_with(full, name)]


def make_target(model: nn.Module, name: str, rows: Rows | None) -> Target:
    """Give the target of a known module name, as an adapter's files state it.

    Args:
        rows: Adapted rows of a fused linear; None means all.

    Raises:
        UserError: If the model has no such linear, or fewer rows.
    """
    whole = find_adaptable(model).get(name)
    if whole is None:
        raise UserError(
            f"the model has no linear layer named {name!r}",
            hint="the adapter belongs to another architecture",
        )
    if rows is None:
        return whole
    if max(stop for _, stop in rows) > whole.d_out:
        raise UserError(f"rows {rows} of {name!r} exceed its {whole.d_out} outputs")
    return _with_rows(whole, rows, "-".join(str(bound) for bound in rows[0]))


def check_untied(model: nn.Module, targets: Sequence[Target]) -> None:
    """Refuse a target whose weight another module uses too: a fold would change both.

    Raises:
        UserError: If a target's weight is tied, as an output head often is to the embedding.
    """
    tied = find_tied(model, targets)
    if tied:
        first, other = next(iter(tied.items()))
        kinds = {target.kind for target in tied}
        free = dict.fromkeys(target.kind for target in targets if target.kind not in kinds)
        raise UserError(
            f"the weight of {first.name!r} is tied to {other!r}: "
            "a change of one would change the other",
            key="adapter.target_modules",
            hint=f"name the layers that are not tied: [{', '.join(free)}]"
            if free
            else "leave it out of the targets",
        )


def find_tied(model: nn.Module, targets: Iterable[Target]) -> dict[Target, str]:
    """Return the targets whose weight another module uses too, with that module's name."""
    users: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            users.setdefault(id(parameter), []).append(name)
    tied: dict[Target, str] = {}
    for target in targets:
        kind = target.kind if target.experts else "weight"
        weight = module_of(model, target)._parameters.get(kind)
        own = target.name.rpartition(".")[0] if target.experts else target.name
        others = [name for name in users.get(id(weight), ()) if name != own]
        if weight is not None and others:
            tied[target] = others[0]
    return tied


def check_dense(model: nn.Module, targets: Sequence[Target], key: str) -> None:
    """Refuse a quantized target where the entries of its weight are needed.

    Raises:
        UserError: If a target's weight is not of a floating type, or a tensor of a type of its own.
    """
    from torch.distributed.tensor import DTensor

    for target in targets:
        weight = weight_of(model, target)
        # A weight that processes share (DTensor) is whole when its layer runs.
        is_dense = type(weight) in (Tensor, nn.Parameter) or isinstance(weight, DTensor)
        if not is_dense or not weight.is_floating_point():
            raise UserError(
                f"the weight of {target.name!r} is quantized: it has no entries to drop or to "
                "multiply with",
                key=key,
                hint="set dropout to 0 and the view to auto, or load the base in 16 bits",
            )


def _match_expression(model: nn.Module, linears: dict[str, Target], text: str) -> list[Target]:
    if text == "all-linear":
        omitted = find_heads(model) | find_routers(model).keys()
        omitted |= {target.name for target in find_tied(model, linears.values())}
        return [
            target
            for name, target in linears.items()
            if name not in omitted and is_product(module_of(model, target))
        ]
    try:
        expression = re.compile(text)
    except re.error as error:
        raise UserError(
            f"{text!r} is no regular expression: {error}", key="adapter.target_modules"
        ) from None
    hits = [target for name, target in linears.items() if expression.fullmatch(name)]
    if not hits:
        fault = _nothing_matches(text, linears)
        fault.hint = (
            "one string is a regular expression over whole module names such as "
            f"{next(iter(linears), 'a.b.q_proj')!r}; for names write a list: [{text}]"
        )
        raise fault
    if others := [hit for hit in hits if not is_product(module_of(model, hit))]:
        raise _no_product(model, others[0])
    return hits


def is_product(module: nn.Module) -> bool:
    """Return whether a linear of a model's own class computes `x W^T + b`, as by its name.

    Routers of some mixtures of experts are such classes: they return the chosen experts, too.
    """
    kind = type(module)
    own = kind.__module__.startswith(("transformers.models.", "transformers_modules."))
    if not own or kind.forward is nn.Linear.forward or not isinstance(module, nn.Linear):
        return True
    random = torch.Generator().manual_seed(0)
    tensors = {
        name: torch.randn(tensor.shape, generator=random)
        for name, tensor in module.named_parameters(recurse=False)
    }
    x = torch.randn(1, 2, module.in_features, generator=random)
    try:
        with torch.no_grad():
            found = torch.func.functional_call(module, tensors, (x,))
            expected = F.linear(x, tensors["weight"], tensors.get("bias"))
    except Exception:  # a model's own code may raise anything for an input of this shape
        return False
    return isinstance(found, Tensor) and torch.allclose(found, expected, rtol=1e-3, atol=1e-3)


def _no_product(model: nn.Module, target: Target) -> UserError:
    kind = type(model.get_submodule(target.name)).__name__
    return UserError(
        f"{target.name!r} is a {kind}, which does not compute W x as a linear layer does",
        key="adapter.target_modules",
        hint="omit it from the targets",
    )


def find_routers(model: nn.Module) -> dict[str, nn.Module]:
    """Return the modules that choose experts: parts of a router beside a module of experts."""
    modules = dict(model.named_modules())
    blocks = [name.removesuffix(".experts") for name in modules if name.endswith(".experts")]
    return {
        name: module
        for name, module in modules.items()
        for block in blocks
        if name == f"{block}.gate" or name.startswith((f"{block}.router", f"{block}.gate."))
    }


def find_heads(model: nn.Module) -> set[str]:
    """Return the modules of the output heads, which `all-linear` omits."""
    get_head = getattr(model, "get_output_embeddings", None)
    head = get_head() if callable(get_head) else None
    return {
        name
        for name, module in model.named_modules()
        if (head is not None and module is head) or name.partition(".")[0] in _HEAD_NAMES
    }


def _nothing_matches(text: str, linears: Mapping[str, Target]) -> UserError:
    kinds = list(dict.fromkeys(target.kind for target in linears.values()))
    near = difflib.get_close_matches(text.rpartition(".")[2], kinds, n=1, cutoff=0.5)
    return UserError(
        f"target {text!r} matches no linear layer of the model",
        key="adapter.target_modules",
        hint=(f"did you mean {near[0]!r}? " if near else "") + f"it has {', '.join(kinds[:20])}",
    )


def _cut_rows(model: nn.Module, whole: Target, part: str) -> Target:
    if whole.experts:
        raise UserError(
            f"the experts' weight {whole.name!r} is adapted whole: it has no rows to choose",
            key="adapter.target_modules",
            hint=f"name it as {whole.kind!r}",
        )
    by_number = re.fullmatch(r"(\d+)-(\d+)", part)
    if by_number:
        start, stop = int(by_number[1]), int(by_number[2])
        if not start < stop <= whole.d_out:
            raise UserError(
                f"rows {part!r} are not within the {whole.d_out} outputs of {whole.name!r}",
                key="adapter.target_modules",
            )
        return _with_rows(whole, ((start, stop),), part)
    parts = _fused_parts(model.get_submodule(whole.name.rpartition(".")[0]), whole)
    if part not in parts:
        known = ", ".join(f"{whole.kind}:{name}" for name in parts) or "none known for this model"
        raise UserError(
            f"{whole.kind!r} has no part {part!r}",
            key="adapter.target_modules",
            hint=f"its parts are {known}; give rows by number: {whole.kind}:0-{whole.d_out}",
        )
    return _with_rows(whole, parts[part], part)


def _with_rows(whole: Target, rows: Rows, part: str) -> Target:
    d_out = sum(stop - start for start, stop in rows)
    return Target(whole.name, f"{whole.kind}_{part}", whole.d_in, d_out, rows, whole.transposed)


def _fused_parts(owner: Any, whole: Target) -> dict[str, Rows]:
    """Name the row ranges inside a fused projection of a module of transformers.

    Its rows are blocks of q, k and v, one after the other: a single block, or one for each head.
    """
    names, sizes = _fused_block(owner, whole) or ((), ())
    block = sum(sizes)
    if not block or whole.d_out % block:
        return {}
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    return {
        name: tuple((b + start, b + start + size) for b in range(0, whole.d_out, block))
        for name, start, size in zip(names, starts, sizes, strict=True)
    }


def _fused_block(owner: Any, whole: Target) -> tuple[Sequence[str], Sequence[int]] | None:
    """Return the parts of one block and their rows; None for a module that is not known."""
    path = type(owner).__module__.split(".")
    family = path[2] if path[:2] == ["transformers", "models"] else None
    layout = _FUSED.get(f"{family}.{type(owner).__name__}.{whole.kind}")
    if layout is None or getattr(owner, "is_cross_attention", False):
        return None
    width = next((getattr(owner, name) for name in _HEAD_WIDTHS if hasattr(owner, name)), 0)
    by_head, kv_rows = ("qkv", (width, width, width)), 0
    if layout == "gate, up":
        return ("gate", "up"), (whole.d_out // 2,) * 2
    if layout == "CodeGen":  # four blocks, for the four cores that it was trained on
        return "qvk", (whole.d_out // 12,) * 3
    if layout == "GPTBigCode":
        if not owner.multi_query:
            return by_head
        kv_rows = owner.kv_dim
    elif layout == "Falcon":
        if owner.new_decoder_architecture:
            return "qkv", (owner.num_heads // owner.num_kv_heads * width, width, width)
        if not owner.multi_query:
            return by_head
        kv_rows = width
    elif layout == "by head":
        return by_head
    elif layout == "grouped":
        kv_rows = owner.num_key_value_heads * width
    kv_rows = kv_rows or whole.d_out // 3
    return "qkv", (whole.d_out - 2 * kv_rows, kv_rows, kv_rows)


def _check_overlap(targets: Sequence[Target]) -> None:
    taken: dict[str, list[Target]] = {}
    for target in dict.fromkeys(targets):
        for other in taken.setdefault(target.name, []):
            if _rows_meet(target, other):
                raise UserError(
                    f"{target.label!r} and {other.label!r} name the same rows",
                    key="adapter.target_modules",
                    hint="name each row of a fused projection once",
                )
        taken[target.name].append(target)


def _rows_meet(one: Target, two: Target) -> bool:
    if one.rows is None or two.rows is None:
        return True
    return any(a < d and c < b for a, b in one.rows for c, d in two.rows)
