"""`WegeftModel`: the tuner that PEFT puts around a model; it owns the factors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from peft.tuners.tuners_utils import (
    BaseTuner,
    _maybe_include_all_linear_layers,
    check_target_module_exists,
)
from peft.utils import (
    TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING,
    ModulesToSaveWrapper,
)
from torch import Tensor, nn

from wegeft_cli.interop.peft_tuner.combine import sum_configs
from wegeft_cli.interop.peft_tuner.config import WegeftConfig
from wegeft_cli.interop.peft_tuner.factors import FactorPair, Part, draw_zero_factor, is_dense
from wegeft_cli.interop.peft_tuner.layer import WegeftLinear
from wegeft_cli.interop.peft_tuner.plan import Plan, read_plan, search_plan
from wegeft_cli.methods.layers.owner import get_generators
from wegeft_cli.methods.layers.targets import Rows, Target
from wegeft_cli.methods.wegeft.modules import Generator, GeneratorSettings
from wegeft_cli.models.file_names import file_names

_PHI, _PSI = "wegeft_phi_", "wegeft_psi_"


class WegeftModel(BaseTuner):
    """A model with WeGeFT adapters: W' = W (I + s phi psi) in the named linears.

    Each group of layers shares one pair of factors. They are attributes of this object, as
    `wegeft_phi_<group>` and `wegeft_psi_<group>` by adapter, so that each is one parameter, is
    saved once, and has the name that `wegeft train` gives it in the file. The layers refer to them.

    Args:
        model: The base model.
        peft_config: The adapters' settings, by name.
        adapter_name: The first adapter.
        low_cpu_mem_usage: Create the factors without memory, to be loaded next.
        **kwargs: What PEFT's direct injection passes; it is refused.

    Raises:
        ValueError: If the call comes from `inject_adapter_in_model`, or the model has adapters that
            PEFT does not know.
    """

    prefix = "wegeft_"
    tuner_layer_cls = WegeftLinear
    target_module_mapping = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
    # PEFT from 0.21 on refuses direct injection by this: it throws away the tuner and with it the
    # factors.
    uses_shared_state = True

    def __init__(
        self,
        model: nn.Module,
        peft_config: WegeftConfig | dict[str, WegeftConfig],
        adapter_name: str,
        low_cpu_mem_usage: bool = False,
        **kwargs: Any,
    ) -> None:
        if "state_dict" in kwargs:
            raise ValueError(
                "`inject_adapter_in_model` does not support WEGEFT because it uses shared state "
                "stored on the tuner. Please use `get_peft_model` instead."
            )
        if get_generators(model) is not None:
            raise ValueError(
                "the model has WeGeFT adapters of `load_adapter` or `inject_generators`, which "
                "would apply a second time: call `remove_generators`, or load the base anew"
            )
        self._plans: dict[str, Plan] = {}
        super().__init__(model, peft_config, adapter_name, low_cpu_mem_usage)
        self.register_state_dict_post_hook(_state_in_float32)

    def inject_adapter(
        self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any
    ) -> None:
        """Put an adapter into the model, as PEFT does, after all of its layers are known."""
        config = self.peft_config[adapter_name]
        # Made of the first adapter's model, which PEFT has not yet wrapped.
        config.file_layers = file_names(model).layers
        before = [(p, p.requires_grad) for p in self._factors(but=adapter_name)]
        self._plans[adapter_name] = self._make_plan(model, config)
        try:
            super().inject_adapter(model, adapter_name, *args, **kwargs)
            if not self._plans[adapter_name]:
                # PEFT before 0.20 reports this for the first adapter only.
                raise ValueError(
                    f"Target modules {config.target_modules} not found in the base model"
                )
        except Exception:
            self._forget(adapter_name)
            raise
        # PEFT sets the trainability anew for all adapters by the settings of the last one.
        for parameter, requires_grad in before:
            parameter.requires_grad_(requires_grad)
        config.model_prefix = getattr(model, "base_model_prefix", "")
        config.saved_names = [
            name
            for name, module in model.named_modules()
            if isinstance(module, ModulesToSaveWrapper) and adapter_name in module.modules_to_save
        ]

    def _make_plan(self, model: nn.Module, config: WegeftConfig) -> Plan:
        if config.modules is not None and not config.is_searched:
            plan = read_plan(config, model)
        else:
            if config.is_searched:
                config.base_fingerprint = None  # of another model, maybe
            config = self._prepare_adapter_config(config, self.get_model_config(model))
            config = _maybe_include_all_linear_layers(config, model)
            plan = search_plan(config, model, lambda name: check_target_module_exists(config, name))
        weights = [cast(Tensor, model.get_submodule(name).weight) for name in plan]
        trains = config.dropout > 0 and not config.inference_mode
        if trains and not all(is_dense(weight) for weight in weights):
            raise ValueError(
                "`dropout` acts on the entries of the weight, and the base's are quantized: set it "
                "to 0, or load the base in 16 bits"
            )
        return plan

    def _check_target_module_exists(self, peft_config: WegeftConfig, key: str) -> Any:
        if peft_config.is_searched or peft_config.modules is None:
            # PEFT records what it excluded, to warn about rules that excluded nothing.
            return check_target_module_exists(peft_config, key)
        name = next(name for name, config in self.peft_config.items() if config is peft_config)
        return key in self._plans[name]

    def _create_and_replace(
        self,
        peft_config: WegeftConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **optional_kwargs: Any,
    ) -> None:
        parts = self._plans[adapter_name][current_key]
        layer: Any = target
        if not isinstance(target, WegeftLinear):
            layer = WegeftLinear(target, adapter_name, transposed=parts[0][1].transposed)
        settings = GeneratorSettings(
            rank=peft_config.r,
            alpha=peft_config.alpha,  # type: ignore[arg-type]
            side=peft_config.side,
            init=peft_config.init,
            dropout=peft_config.dropout,
            share=peft_config.share,
        )
        base = layer.base_layer
        layer.update_layer(
            adapter_name,
            [
                Part(self._get_pair(adapter_name, group, part, settings, base), part, settings)
                for group, part in parts
            ],
        )
        if layer is not target:
            self._replace_module(parent, target_name, layer, target)

    def _get_pair(
        self,
        adapter_name: str,
        group: str,
        target: Target,
        settings: GeneratorSettings,
        linear: Any,
    ) -> FactorPair:
        """Return a group's pair as one of its layers sees it; the first of them makes it."""
        for prefix in (_PHI, _PSI):
            if prefix + group not in self._modules:
                self.add_module(prefix + group, nn.ParameterDict())
        phi, psi = self._modules[_PHI + group], self._modules[_PSI + group]
        if adapter_name not in phi:
            width = target.width(settings.side)
            device = linear.weight.device
            made = Generator(width, settings.rank, settings.scale, settings.init, device=device)
            if not self.peft_config[adapter_name].init_weights:
                draw_zero_factor(made)
            phi[adapter_name], psi[adapter_name] = made.phi, made.psi
        return FactorPair(phi, psi, adapter_name, settings.scale, linear)

    def _factor_dicts(self) -> dict[str, nn.ParameterDict]:
        return {
            name: module for name, module in self._modules.items() if name.startswith((_PHI, _PSI))
        }

    def _factors(self, *, of: str | None = None, but: str | None = None) -> list[nn.Parameter]:
        """List factors of one adapter, or of all but one."""
        return [
            parameter
            for module in self._factor_dicts().values()
            for name, parameter in module.items()
            if name != but and of in (None, name)
        ]

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Make adapters the active ones.

        Raises:
            ValueError: If several cannot be one pair of factors.
        """
        names = [adapter_name] if isinstance(adapter_name, str) else list(adapter_name)
        configs = [self.peft_config[name] for name in names if name in self.peft_config]
        if len({(config.side, config.dropout) for config in configs}) > 1:
            raise ValueError(
                f"the adapters {names} differ in `side` or `dropout` and cannot be active at once: "
                "merge them one by one instead"
            )
        if len(configs) > 1 and any(self._has_rows(name) for name in names):
            raise ValueError(
                f"an adapter of {names} changes rows of a fused projection and cannot be active "
                "together with another: merge them one by one instead"
            )
        super().set_adapter(adapter_name, inference_mode=inference_mode)

    def groups_of(self, adapter_name: str) -> dict[str, list[tuple[str, Rows | None]]]:
        """Return each module that an adapter changes with its groups and their rows."""
        return {
            name: [(group, part.rows) for group, part in parts]
            for name, parts in self._plans[adapter_name].items()
        }

    def _has_rows(self, adapter_name: str) -> bool:
        return any(
            rows is not None
            for groups in self.groups_of(adapter_name).values()
            for _, rows in groups
        )

    def delete_adapter(self, adapter_name: str) -> None:
        """Take an adapter out of the model."""
        super().delete_adapter(adapter_name)
        self._forget(adapter_name)

    def _forget(self, adapter_name: str) -> None:
        for name, module in self._factor_dicts().items():
            if adapter_name in module:
                del module[adapter_name]
            if not module:
                del self._modules[name]
        self._plans.pop(adapter_name, None)

    def add_weighted_adapter(
        self,
        adapters: Sequence[str],
        weights: Sequence[float],
        adapter_name: str,
        combination_type: str = "cat",
    ) -> None:
        """Make a new adapter whose change is the weighted sum of other adapters' changes, exactly.

        Its rank is the sum of theirs. It is neither active nor trainable until it is set.

        Raises:
            ValueError: If the adapters cannot be added up as pairs of factors.
        """
        made = sum_configs(self, adapters, weights, adapter_name, combination_type)
        self.peft_config[adapter_name] = made
        try:
            self.inject_adapter(self.model, adapter_name)
        except Exception:
            del self.peft_config[adapter_name]
            raise
        scales = [w * self.peft_config[a].scale for w, a in zip(weights, adapters, strict=True)]
        for name, module in self._factor_dicts().items():
            if adapter_name in module:
                factors = [module[source].detach().float() for source in adapters]
                if name.startswith(_PHI):
                    factors = [s * phi for s, phi in zip(scales, factors, strict=True)]
                summed = torch.cat(factors, dim=1 if name.startswith(_PHI) else 0)
                module[adapter_name].data.copy_(summed)
                module[adapter_name].requires_grad_(False)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Refuse one adapter for each row of a batch, which PEFT would silently ignore."""
        if kwargs.get("adapter_names") is not None:
            raise ValueError("WeGeFT has no `adapter_names`: one batch, one adapter")
        yield

    def _check_merge_allowed(self) -> None:
        super()._check_merge_allowed()
        for module in self.model.modules():
            if isinstance(module, WegeftLinear):
                module.check_dense("merging")

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """Keep the factors in float32, or cast them to the base's type if PEFT is asked to."""
        for module in self.model.modules():
            if not isinstance(module, WegeftLinear):
                continue
            dtype = module.base_layer.weight.dtype
            for parameter in module.factors_of(adapter_name):
                if autocast_adapter_dtype:
                    dtype = torch.promote_types(parameter.dtype, torch.float32)
                if dtype.is_floating_point:
                    parameter.data = parameter.data.to(dtype)


def _state_in_float32(
    module: nn.Module, state: dict[str, Any], prefix: str, local_metadata: Any
) -> None:
    """Return the factors for a file in float32, regardless of their type in memory."""
    for key, value in state.items():
        if key.startswith((prefix + _PHI, prefix + _PSI)):
            state[key] = value.to(torch.promote_types(value.dtype, torch.float32))
