"""Several adapters on one base, for a file whose rows name theirs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

from wegeft_cli.errors import UserError
from wegeft_cli.inference.form_choice import choose_form
from wegeft_cli.inference.loaded_model import LoadedModel
from wegeft_cli.inference.prompt_files import Question
from wegeft_cli.inference.prompt_format import PromptForm
from wegeft_cli.inference.serving.targets import BASE, NamedTarget
from wegeft_cli.methods.registry import require_generators
from wegeft_cli.models.base_folder import find_base_folder

FIELD = "adapter"
"""Field of a row that names its adapter, or `base`."""


@dataclass(frozen=True)
class RowAdapters:
    """A base with its adapters, and the prompt form of all."""

    opened: LoadedModel
    form: PromptForm
    names: tuple[str, ...]

    def assign(self, questions: Sequence[Question]) -> list[str | None]:
        """Return the adapter of each question; None is the base.

        Raises:
            UserError: If a question names no adapter, or an unknown one.
        """
        known = (*self.names, BASE)
        for question in questions:
            if question.adapter not in known:
                raise UserError(
                    f"question {question.index} names {question.adapter!r}",
                    key=FIELD,
                    hint=f"one of {', '.join(known)} in the field `{FIELD}` of each row",
                )
        return [None if one.adapter == BASE else one.adapter for one in questions]

    def use(
        self, assigned: Sequence[str | None]
    ) -> Callable[[Sequence[int]], AbstractContextManager[None]]:
        """Return what lets the prompts of a batch, by position, use their adapters."""
        owner = self.opened.model.wegeft
        return lambda rows: owner.use_rows([assigned[row] for row in rows])


def load_row_adapters(
    targets: Sequence[NamedTarget], template: str | None, warn: Callable[[str], None]
) -> RowAdapters:
    """Load a base and attach the adapters of all targets.

    Raises:
        UserError: If one is no WeGeFT adapter, or their prompt forms differ.
    """
    from wegeft_cli.methods.trained_base import check_base
    from wegeft_cli.methods.wegeft.save_load import attach_files

    for named in targets:
        if named.target.adapter is None:
            raise UserError("this is no adapter", file=str(named.target.path), key="--adapter")
        require_generators(
            named.target.adapter,
            "the rows of a batch can use WeGeFT's adapters alone",
            hint="generate with each alone",
        )
    section = targets[0].target.section
    model, tokenizer = targets[0].target.load_base(warn)
    base_dir = find_base_folder(section.name_or_path, section.revision)
    forms: dict[str, PromptForm] = {}
    for named in targets:
        target, adapter = named.target, named.target.adapter
        assert adapter is not None
        files = adapter.read_files()
        if base_dir is not None:
            check_base(files.manifest, base_dir, adapter.folder, warn=warn)
        attach_files(model, files, adapter.folder, adapter_name=named.name)
        form = choose_form(template, target.path, target.recipe, tokenizer)
        forms[form.template.digest] = form
    if len(forms) > 1:
        raise UserError(
            "the adapters were trained with several prompt forms",
            key="--adapter",
            hint="set one with --template",
        )
    first = targets[0].target
    opened = LoadedModel(model.eval(), tokenizer, section, first.adapter)
    return RowAdapters(opened, next(iter(forms.values())), tuple(one.name for one in targets))
