"""A model to use: an adapter, a run, a model folder or a hub id, resolved and then loaded."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from wegeft_cli.artifacts.adapter import Adapter, read_provenance
from wegeft_cli.artifacts.run_directory import find_run
from wegeft_cli.data.text.template_settings import CHAT, TemplateSettings
from wegeft_cli.errors import BaseModelError, UserError
from wegeft_cli.inference.trained_form import find_trained_form
from wegeft_cli.methods.registry import load_onto, method_of
from wegeft_cli.recipe.load import load_recipe
from wegeft_cli.recipe.schema import DataSection, ModelSection, ProblemType, Recipe, TaskName
from wegeft_cli.storage.atomic import hash_bytes
from wegeft_cli.tasks.base import Task
from wegeft_cli.tasks.registry import find_task, task_of_config, task_of_head

if TYPE_CHECKING:
    from wegeft_cli.models.heads import HeadSpec

NO_PRINTS: Mapping[str, str | None] = {
    "base_fingerprint": None,
    "base_quantization": None,
    "adapter_fingerprint": None,
}
"""The fingerprints if no model was used."""


class _Classified:
    """What `LoadedModel` and `ModelTarget` share."""

    head: HeadSpec | None
    recipe: Recipe | None

    def classifier(self) -> tuple[HeadSpec, Recipe]:
        """Return a classifier's head and the recipe that describes its inputs."""
        if self.head is None or self.recipe is None:
            raise ValueError("this is a language model")
        return self.head, self.recipe


@dataclass
class LoadedModel(_Classified):
    """A model in memory, with the way back to its base.

    Args:
        model: The model in evaluation mode. A language model is on the process's device.
        processor: Its tokenizer or image processor.
        section: How the model, or the adapter's base, was loaded.
        adapter: The adapter; None for a model.
        base: Folder or hub id of the base, if the model in memory cannot be switched back to it.
        head: The classification head; None for a language model.
        recipe: The run's recipe. A classifier outside of a run has one that describes its inputs.
        write: Generates texts in another engine. Default: transformers.
        prompt: The prompt form of the training, where it is known.
    """

    model: Any
    processor: Any
    section: ModelSection = field(default_factory=ModelSection)
    adapter: Adapter | None = None
    base: str | None = None
    head: HeadSpec | None = None
    recipe: Recipe | None = None
    write: Callable[..., Any] | None = None
    prompt: TemplateSettings | None = None

    @classmethod
    def open(
        cls,
        path: str | Path,
        recipe: Recipe | None,
        *,
        base: str | None,
        warn: Callable[[str], None] = lambda text: None,
    ) -> LoadedModel:
        """Resolve and load a language model.

        Args:
            base: The base's folder or hub id. Default: as the adapter records.

        Raises:
            UserError: If there is no such model, it is a classifier or damaged, or its base is
                another one.
        """
        return ModelTarget.resolve(path, recipe, base=base).require_text().load(warn)

    @property
    def tokenizer(self) -> Any:
        """The tokenizer of a language model."""
        return self.processor

    @property
    def chat_settings(self) -> TemplateSettings:
        """The prompt form of conversations: that of the training, else the chat template."""
        return self.prompt or TemplateSettings(CHAT)

    @property
    def kind(self) -> str:
        """`adapter` or `model`."""
        return "model" if self.adapter is None else "adapter"

    @property
    def adapter_dir(self) -> Path | None:
        """The adapter's folder; None for a model."""
        return None if self.adapter is None else self.adapter.folder

    @contextmanager
    def base_model(self) -> Iterator[tuple[Any, Any]]:
        """Yield the base and its tokenizer: the adapter is switched off, or the base loaded."""
        if self.adapter is not None and self.base is None:
            with method_of(self.adapter).disabled(self.model):
                yield self.model, self.processor
            return
        if self.base is None:
            raise UserError(
                "the base of this model is not recorded",
                key="--base",
                hint="name it with --base",
            )
        yield _load_language_model(replace(self.section, name_or_path=self.base))


@dataclass(frozen=True)
class ModelTarget(_Classified):
    """What a command works on, before any weight is loaded.

    Args:
        path: As typed.
        section: How the model, or the adapter's base, is loaded.
        adapter: The adapter; None for a model.
        head: The classification head; None for a language model.
        recipe: The run's recipe. A classifier outside of a run has one that describes its inputs.
        base: The base as the user named it.
    """

    path: str | Path
    section: ModelSection
    adapter: Adapter | None = None
    head: HeadSpec | None = None
    recipe: Recipe | None = None
    base: str | None = None

    @classmethod
    def resolve(
        cls, path: str | Path, recipe: Recipe | None, *, base: str | None = None
    ) -> ModelTarget:
        """Resolve a target; arguments and errors as in `LoadedModel.open`."""
        if task_of_path(path, recipe).has_head:
            return _resolve_classifier(path, recipe, base)
        return _resolve_language_model(path, recipe, base)

    def require_text(self) -> ModelTarget:
        """Return the target; raise UserError for a classifier."""
        if self.head is not None:
            raise UserError(
                "this is a classifier, which writes no text",
                file=str(self.path),
                hint="score it with `wegeft eval`",
            )
        return self

    def load(self, warn: Callable[[str], None] = lambda text: None) -> LoadedModel:
        """Load the model and its adapter; errors as in `LoadedModel.open`."""
        model, processor = self.load_base(warn)
        if self.adapter is None:
            origin = self.base or read_provenance(Path(self.path))
            return self._loaded(model, processor, None, origin)
        model = load_onto(model, self.adapter, self.section, warn=warn).eval()
        in_place = method_of(self.adapter).trains_in_place
        origin = self.section.name_or_path if in_place else None
        return self._loaded(model, processor, self.adapter, origin)

    def load_base(self, warn: Callable[[str], None] = lambda text: None) -> tuple[Any, Any]:
        """Load the model, or the adapter's base, with its tokenizer or image processor."""
        from wegeft_cli.methods.trained_base import base_errors

        if self.section.trust_remote_code and self.head is None:
            # The run, and its recipe, may come from another person.
            warn(
                "code that comes with the model runs: the run's recipe says model.trust_remote_code"
            )
        load = _load_language_model if self.head is None else self._load_classifier
        own = self.adapter
        with model_errors(self.path) if own is None else base_errors(self.base, own.folder):
            return load(self.section, warn)

    def find_prompt(self) -> TemplateSettings | None:
        """Return the prompt form of the training, where it is known."""
        return None if self.head is not None else find_trained_form(self.path, self.recipe)

    def _loaded(
        self, model: Any, processor: Any, adapter: Adapter | None, origin: str | None
    ) -> LoadedModel:
        return LoadedModel(
            model,
            processor,
            self.section,
            adapter,
            origin,
            self.head,
            self.recipe,
            prompt=self.find_prompt(),
        )

    def _load_classifier(
        self, section: ModelSection, warn: Callable[[str], None]
    ) -> tuple[Any, Any]:
        from wegeft_cli.models.completeness import warn_of_unused
        from wegeft_cli.models.heads import check_provided
        from wegeft_cli.models.loading import load_model

        assert self.head is not None
        model = load_model(
            section.name_or_path,
            revision=section.revision,
            dtype=section.dtype,
            attn_implementation=section.attn_implementation,
            trust_remote_code=section.trust_remote_code,
            head=self.head,
        )
        warn_of_unused(model, warn)
        provided = set() if self.adapter is None else self.adapter.list_whole_tensors()
        check_provided(model, section.name_or_path, provided)
        task = find_task(self.head.task)
        processor = task.load_processor(section)
        task.prepare_base(model, self.head, processor)
        return model, processor


def task_of_path(path: str | Path, recipe: Recipe | None) -> Task:
    """Return the task of an adapter, run or model folder, or of a hub id.

    `recipe` is the run's, if the path belongs to one. A path that cannot be read counts as a
    language model, whose loading reports the fault.
    """
    if recipe is not None:
        return find_task(recipe.task)
    folder = Path(path)
    with contextlib.suppress(UserError):
        if (folder / "config.json").is_file():
            from wegeft_cli.models.loading import load_config

            return task_of_config(load_config(str(folder)))
        if folder.is_dir():
            head = Adapter.open(folder).head
            return task_of_head(None) if head is None else find_task(head["task"])
    return task_of_head(None)


def head_of(adapter: Adapter) -> HeadSpec | None:
    """Return the classification head that `head.json` describes; None for a language model."""
    from wegeft_cli.models.heads import HeadSpec

    values = adapter.head
    if values is None:
        return None
    labels = tuple(str(name) for name in values["labels"])
    return HeadSpec(values["task"], labels, values["problem_type"])


def _resolve_language_model(
    path: str | Path, recipe: Recipe | None, base: str | None
) -> ModelTarget:
    from wegeft_cli.models.loading import quantise_as

    folder = Path(path)
    section = recipe.model if recipe is not None else ModelSection()
    if (folder / "config.json").is_file() or not folder.exists():
        # A merged model is dense, even if its run's base was quantized, and its files have the
        # special tokens.
        section = replace(
            quantise_as(section, None), name_or_path=str(path), revision=None, special_tokens={}
        )
        return ModelTarget(path, section, None, None, recipe, base)
    adapter = Adapter.open(folder)
    section = _section_of_base(section, adapter, base)
    method = method_of(adapter)
    recorded = None if method.trains_in_place else adapter.quantization
    if method.has_generators or recorded is not None:
        # An older PEFT adapter records nothing: the run's recipe decides.
        section = quantise_as(section, recorded)
    return ModelTarget(path, section, adapter, None, recipe, base)


def _resolve_classifier(path: str | Path, recipe: Recipe | None, base: str | None) -> ModelTarget:
    folder = Path(path)
    adapter = None
    if (folder / "config.json").is_file():
        head = _head_of_model(folder)
        recipe = recipe or _recipe_of_head(head, {})
        section = replace(recipe.model, name_or_path=str(folder), revision=None)
    else:
        adapter = Adapter.open(folder)
        found = head_of(adapter)
        if found is None:
            raise UserError(
                "this adapter has no head.json, which lists a classifier's classes",
                file=str(adapter.folder),
                hint="copy the adapter's folder as a whole",
            )
        head = found
        recipe = recipe or _recipe_of_head(head, adapter.head or {})
        section = _section_of_base(recipe.model, adapter, base)
    return ModelTarget(path, section, adapter, head, replace(recipe, model=section), base)


def _section_of_base(section: ModelSection, adapter: Adapter, base: str | None) -> ModelSection:
    method_of(adapter).check_adapter(adapter)
    revision = None if base else adapter.revision
    return replace(
        section,
        name_or_path=base or adapter.base,
        revision=revision,
        special_tokens=adapter.special_tokens,
    )


def _head_of_model(folder: Path) -> HeadSpec:
    from wegeft_cli.models.heads import HeadSpec, read_labels
    from wegeft_cli.models.loading import load_config

    config = load_config(str(folder))
    problem = getattr(config, "problem_type", None) or "single_label_classification"
    labels = () if problem == "regression" else read_labels(config)
    return HeadSpec(task_of_config(config).name, labels, problem, keeps_base_head=True)


def _recipe_of_head(head: HeadSpec, values: Mapping[str, Any]) -> Recipe:
    """Return a recipe with what is known of a classifier outside of its run."""
    data = DataSection(
        problem_type=cast(ProblemType, head.problem_type),
        image_size=values.get("image_size"),
        image_transform=values.get("image_transform", DataSection.image_transform),
        max_length=values.get("max_length", DataSection.max_length),
    )
    return Recipe(task=cast(TaskName, head.task), data=data)


def _load_language_model(
    section: ModelSection, warn: Callable[[str], None] = lambda text: None
) -> tuple[Any, Any]:
    from accelerate import PartialState

    from wegeft_cli.models.loading import load_base, load_tokenizer_of

    tokenizer = load_tokenizer_of(section)
    return load_base(section, warn=warn).to(PartialState().device), tokenizer


@contextmanager
def model_errors(path: str | Path) -> Iterator[None]:
    """Report a model that cannot be loaded as the target that the user typed."""
    try:
        yield
    except BaseModelError as fault:
        gone = not Path(path).exists()
        message = f"no folder {str(path)!r}"
        if not gone:
            message = fault.message
        elif not fault.message.startswith(message):
            message += f", and not available as a hub id: {fault.message}"
        hint = "give an adapter, run or model folder, or a hub id such as org/name"
        raise UserError(
            message, file=fault.file, key="TARGET", hint=hint if gone else fault.hint
        ) from fault


def fingerprint_target(section: ModelSection, adapter_dir: Path | None) -> dict[str, str | None]:
    """Return the fingerprints of a model, or of a base and the adapter in a folder.

    `base_fingerprint` is null if there are no safetensors, `base_quantization` if the base is not
    quantized, and `adapter_fingerprint`, over the adapter's config and tensors, for a model.
    """
    from wegeft_cli.artifacts.adapter_files import CONFIG_NAME
    from wegeft_cli.artifacts.fingerprint import fingerprint_base
    from wegeft_cli.models.base_folder import find_base_folder
    from wegeft_cli.models.loading import name_quantization

    prints = {**NO_PRINTS, "base_quantization": name_quantization(section)}
    if adapter_dir is not None:
        config = (adapter_dir / CONFIG_NAME).read_bytes()
        weights = fingerprint_base(adapter_dir) or _hash_files(adapter_dir.glob("*.bin"))
        digest = hashlib.sha256(config + str(weights).encode())
        prints["adapter_fingerprint"] = f"sha256:{digest.hexdigest()}"
    folder = find_base_folder(section.name_or_path, section.revision)
    file = Path(section.name_or_path).expanduser()
    if folder is not None:
        prints["base_fingerprint"] = fingerprint_base(folder)
    elif file.is_file():
        prints["base_fingerprint"] = _hash_files([file])
    return prints


def _hash_files(paths: Iterable[Path]) -> str:
    digests = "".join(hash_bytes(path) for path in sorted(paths))
    return f"sha256:{hashlib.sha256(digests.encode()).hexdigest()}"


def find_target(target: str | Path | None) -> str | Path:
    """Return the folder or hub id of a target: a path or hub id, or a recipe, which names its run.

    Default: the newest finished run under runs/. Raise UserError if the run does not exist.
    """
    if target is None:
        return find_run(None)
    if Path(target).suffix in (".yaml", ".yml"):
        run_dir = load_recipe(target, need_data=False).recipe.output_dir
        if not Path(run_dir).exists():
            raise UserError(
                f"this recipe has no run yet: there is no {run_dir!r}",
                file=str(target),
                hint=f"train first: wegeft train {target}",
            )
        return run_dir
    return target
