"""Model cards of adapters, of their LoRA equivalents, and of merged models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from wegeft_cli.artifacts.adapter import Adapter
from wegeft_cli.artifacts.prompt_record import PromptRecord
from wegeft_cli.artifacts.run_directory import RunDirectory
from wegeft_cli.artifacts.served_ranks import served_rank
from wegeft_cli.data.text.templates import TEMPLATES
from wegeft_cli.data.text.trained_form import describe_difference
from wegeft_cli.methods.base import Omission
from wegeft_cli.methods.registry import find_method
from wegeft_cli.models.base_folder import find_base_folder, read_chat_template
from wegeft_cli.recipe.load import recipe_to_yaml
from wegeft_cli.recipe.schema import Recipe
from wegeft_cli.redaction import mask_secrets
from wegeft_cli.tasks.base import Task
from wegeft_cli.tasks.registry import find_task
from wegeft_cli.training.loop_settings import LoopResult
from wegeft_cli.version import VERSION

_TEMPLATES = Path(__file__).parent / "templates"
_LICENSE_FILES = ("LICENSE", "LICENSE.txt", "LICENSE.md", "LICENCE", "COPYING")


@dataclass(frozen=True)
class CardFacts:
    """The facts about an adapter that its cards state.

    Args:
        base: The base's name or path.
        revision: Its hub revision.
        recipe: The resolved recipe of its run.
        run: The run's run.json.
        scores: The results of `wegeft eval` on it, each with `base_score` or None.
        prompt: The prompt form of the training, if it is known.
    """

    base: str
    revision: str | None = None
    recipe: Recipe | None = None
    run: Mapping[str, Any] = field(default_factory=dict)
    scores: Sequence[Mapping[str, Any]] = ()
    prompt: PromptRecord | None = None

    @property
    def is_on_hub(self) -> bool:
        """Whether the base's name is a hub id, which is valid on other machines."""
        return not Path(self.base).expanduser().exists() and self.base.count("/") <= 1

    @property
    def task(self) -> Task:
        """The recipe's task, or the default task without a recipe."""
        return find_task((self.recipe or Recipe()).task)

    def describe_prompt(self) -> dict[str, Any] | None:
        """Return what a card says about the prompt form; None if it is unknown."""
        if self.prompt is None:
            return None
        folder = find_base_folder(self.base, self.revision)
        template = None if folder is None else read_chat_template(folder)
        pair = TEMPLATES.get(self.prompt.template)
        return {
            "name": self.prompt.template,
            "is_chat": self.prompt.is_chat,
            "text": None if pair is None else pair.prompt,
            "options": self.prompt.options,
            "more": self.prompt.more_templates,
            "difference": describe_difference(self.prompt, template),
        }

    def find_license(self) -> tuple[str | None, bool]:
        """Return the license in the base's card, and whether the base has a license file."""
        folder = find_base_folder(self.base, self.revision)
        if folder is None:
            return None, False
        has_file = any((folder / name).is_file() for name in _LICENSE_FILES)
        return _read_license(folder / "README.md"), has_file


def write_card(
    recipe: Recipe,
    result: LoopResult,
    *,
    adapter_step: int,
    prompt: PromptRecord | None = None,
    parameters: tuple[int, int] | None = None,
    omitted: Sequence[Omission] = (),
) -> str:
    """Return the card of a trained adapter, Markdown with the hub's metadata at the top.

    `parameters` counts the learned parameters and those of the base. `prompt` is the form of the
    training rows, and `omitted` is what is not adapted.
    """
    facts = CardFacts(recipe.model.name_or_path, recipe.model.revision, recipe, prompt=prompt)
    method = find_method(recipe.adapter.type)
    needs_package = method.needs_package or facts.task.has_head
    return _render(
        "adapter",
        facts,
        "wegeft-cli" if needs_package else "peft",
        ["wegeft", "peft"],
        title=recipe.output_dir.rstrip("/").rpartition("/")[2],
        method="WeGeFT" if method.has_generators else recipe.adapter.type,
        num_steps=result.num_steps,
        final_loss=result.final_loss,
        adapter_step=adapter_step,
        metric=recipe.train.metric_for_best_model,
        saved_modules=recipe.adapter.modules_to_save,
        parameters=parameters,
        measured=result.validation.get(adapter_step),
        omitted=[str(omission) for omission in omitted],
        is_wegeft=method.has_generators,
        is_own=method.needs_package and not method.has_generators,
    )


def write_lora_card(
    adapter: Adapter, base: str, revision: str | None, *, rank: int, **values: Any
) -> str:
    """Return the card of an adapter's LoRA equivalent."""
    facts = replace(read_facts(adapter.folder, base, revision), prompt=adapter.prompt)
    tags = ["lora", "wegeft"]
    values |= {
        "rank": rank,
        "max_rank": served_rank(rank),
        "scores": facts.scores,
        "is_wegeft": True,
    }
    return _render("lora_equivalent", facts, "peft", tags, **values)


def write_merged_card(
    adapter_dirs: Sequence[Path],
    weights: Sequence[float],
    base: str,
    revision: str | None,
    title: str,
    prompt: PromptRecord | None,
    *,
    holds_form: bool,
) -> str:
    """Return the card of a base with adapters merged into it.

    `holds_form` says whether the folder's chat template is the trained form.
    """
    facts = replace(read_facts(adapter_dirs[0], base, revision), prompt=prompt)
    is_single = len(adapter_dirs) == 1
    count = facts.run.get("trainable_parameters")
    return _render(
        "merged",
        facts,
        "transformers",
        ["wegeft"],
        title=title,
        adapters=list(zip(map(_name_adapter, adapter_dirs), weights, strict=True)),
        num_parameters=count if is_single and isinstance(count, int) else None,
        holds_form=holds_form,
        scores=facts.scores if is_single else (),
        is_wegeft=True,
        recipe=_recipe_text(facts) if is_single else "",
    )


def _render(
    template: str, facts: CardFacts, library: str, tags: Sequence[str], **values: Any
) -> str:
    """Render a card's template, then the part that all cards share."""
    from huggingface_hub import ModelCard, ModelCardData

    license_name, has_license_file = facts.find_license()
    data = ModelCardData(
        base_model=facts.base if facts.is_on_hub else None,  # the hub refuses paths
        license=license_name,
        library_name=library,
        pipeline_tag=facts.task.pipeline_tag,
        tags=list(tags),
    )
    parts = (template, "prompt", "end")
    texts = [(_TEMPLATES / f"{name}.md.jinja").read_text("utf-8") for name in parts]
    shared: dict[str, Any] = {
        "base": facts.base,
        "version": VERSION,
        "auto_class": facts.task.auto_class,
        "has_head": facts.task.has_head,
        "license": license_name,
        "has_license_file": has_license_file,
        "recipe": _recipe_text(facts),
        "prompt": facts.describe_prompt(),
    }
    card = ModelCard.from_template(data, template_str="".join(texts), **(shared | values))
    return str(card).strip() + "\n"


def _name_adapter(adapter_dir: Path) -> str:
    """Return an adapter's name: its folder's, or its run's where that is `adapter`."""
    folder = adapter_dir.resolve()
    return folder.parent.name if folder.name == "adapter" else folder.name


def _recipe_text(facts: CardFacts) -> str:
    """Return the recipe as YAML without secrets, or nothing if there is none."""
    return "" if facts.recipe is None else mask_secrets(recipe_to_yaml(facts.recipe))


def read_facts(adapter_dir: Path, base: str, revision: str | None) -> CardFacts:
    """Read the facts about an adapter from its run's folder; raise UserError for a bad recipe."""
    run = RunDirectory.containing(adapter_dir)
    if run is None or not run.recipe_path.is_file():
        return CardFacts(base, revision)
    scores = [score for values in run.evaluations() for score in _read_scores(values)]
    return CardFacts(base, revision, run.recipe(), run.record(), scores)


def _read_scores(values: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    results, bases = values.get("results"), values.get("base_results")
    if not isinstance(results, list):
        return []
    rows = [row for row in results if isinstance(row, dict) and "task" in row and "score" in row]
    of_base = {row["task"]: row["score"] for row in bases or [] if isinstance(row, dict)}
    return [{**row, "base_score": of_base.get(row["task"])} for row in rows]


def _read_license(card: Path) -> str | None:
    from huggingface_hub import metadata_load

    try:
        values = metadata_load(card) if card.is_file() else None
    except (OSError, ValueError, TypeError):
        return None
    name = values.get("license") if isinstance(values, dict) else None
    return name if isinstance(name, str) else None
