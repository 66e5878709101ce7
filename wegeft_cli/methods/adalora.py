"""AdaLoRA: a rank budget that shrinks while the model trains (Zhang et al., arXiv 2303.10512)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from wegeft_cli.methods.peft.method import PeftMethod
from wegeft_cli.recipe.rules import Fault
from wegeft_cli.recipe.schema import AdapterSection, Recipe

if TYPE_CHECKING:
    from torch import Tensor, nn

_STEPS = ("tinit", "tfinal")
_OWN = {
    "target_r": "is set by `adapter.r`: the average rank that remains of a layer",
    "total_step": "is the run's number of steps",
    "rank_pattern": "is a result of the run",
}


class AdaLoraMethod(PeftMethod):
    """PEFT's AdaLoRA with its allocator called after each step."""

    names = ("adalora",)
    peft_types = ("ADALORA",)
    takes_any_name = False

    def check(self, recipe: Recipe) -> Iterator[Fault]:
        """Yield rules of the rank budget, and keys that contradict it."""
        yield from super().check(recipe)
        adapter = recipe.adapter
        for name, reason in _OWN.items():
            if name in adapter.peft:
                yield f"adapter.peft.{name}", reason, "remove it"
        if adapter.match_params is not None and "init_r" in adapter.peft:
            message = "fixes the number of parameters, which `adapter.match_params` chooses"
            yield "adapter.peft.init_r", message, "remove one of the two"
            return
        for name, least in {"init_r": adapter.r + 1, "deltaT": 1, "tinit": 0, "tfinal": 0}.items():
            value = adapter.peft.get(name, least)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                message = f"must be a whole number of at least {least}; got {value!r}"
                hint = None
                if name == "init_r":
                    hint = "the budget shrinks from `init_r` to `adapter.r` on average"
                yield f"adapter.peft.{name}", message, hint
        for name in ("beta1", "beta2"):
            value = adapter.peft.get(name, 0.85)
            if not isinstance(value, int | float) or not 0 < value < 1:
                yield f"adapter.peft.{name}", f"must be above 0 and below 1; got {value!r}", None
        if adapter.init_from is not None:
            message = (
                "starts from ranks that are already chosen, and 'adalora' begins by choosing them"
            )
            yield "adapter.init_from", message, "remove it, or merge that adapter into the base"
        if recipe.train.ema_decay is not None:
            message = "averages over ranks that 'adalora' removes in between"
            yield "train.ema_decay", message, "remove it, or use another `adapter.type`"

    def check_schedule(self, section: AdapterSection, num_steps: int) -> Fault | None:
        """Return a fault where the phases `tinit` and `tfinal` leave no step for the budget."""
        options = section.peft
        first, last = (options.get(name, 0) for name in _STEPS)
        if first + last < num_steps:
            return None
        named = [name for name in _STEPS if options.get(name)] or ["tinit"]
        message = f"tinit {first} and tfinal {last} leave no step of {num_steps} to reduce ranks"
        return f"adapter.peft.{named[-1]}", message, "lower them, or train longer"

    def stepper(
        self, model: nn.Module, loss: Callable[[nn.Module, Any], Tensor], num_steps: int
    ) -> tuple[Any, Callable[[nn.Module, Any], Tensor]]:
        """Return the rank budget, and the loss with the orthogonality term."""
        from wegeft_cli.methods.peft.rank_budget import OrthogonalLoss, RankBudget

        return RankBudget(model, num_steps), OrthogonalLoss(loss)

    def restore(self, model: nn.Module, state: Mapping[str, Any]) -> None:
        """Save the adapter with the ranks of an earlier step."""
        from wegeft_cli.methods.peft.rank_budget import keep_ranks

        keep_ranks(model, dict(state))


METHOD = AdaLoraMethod()
