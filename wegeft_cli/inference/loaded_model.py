"""What a command is asked to work on: an adapter, a run, a model folder or a hub id, loaded."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from wegeft_cli.artifacts.adapter import Adapter, read_provenance
from wegeft_cli.artifacts.run_directory import find_run
from wegeft_cli.errors import UserError
from wegeft_cli.inference.loaded_classifier import task_of_path
from wegeft_cli.methods.registry import method_of
from wegeft_cli.recipe.load import load_recipe
from wegeft_cli.recipe.schema import ModelSection, Recipe
from wegeft_cli.storage.atomic import hash_bytes

NO_PRINTS: Mapping[str, str | None] = {
    "base_fingerprint": None,
    "base_quantization": None,
    "adapter_fingerprint": None,
}
"""The fingerprints where no model was asked."""


@dataclass
class OpenedTarget:
    """A model to ask, with the way back to its base.

    Args:
        kind: adapter or model.
        model: On its device.
        tokenizer: Its tokenizer.
        base: Where the base alone lies, for a model that is no adapter, or whose adapter took the
            place of its own weights; None if unknown, or not needed.
        section: How the model (of an adapter its base) was loaded.
        adapter: The adapter, if it is one.
        write: Writes texts in another engine, as `generate_texts`; None asks the model.
    """

    kind: str
    model: Any
    tokenizer: Any
    base: str | None = None
    section: ModelSection = field(default_factory=ModelSection)
    adapter: Adapter | None = None
    write: Callable[..., Any] | None = None

    @property
    def adapter_dir(self) -> Path | None:
        """The adapter's folder, if it is one."""
        return None if self.adapter is None else self.adapter.folder

    @contextmanager
    def base_alone(self) -> Iterator[tuple[Any, Any]]:
        """Give the base model inside the block: the adapter switched off, or the base loaded."""
        if self.adapter is not None and self.base is None:
            with method_of(self.adapter).disabled(self.model):
                yield self.model, self.tokenizer
            return
        if self.base is None:
            raise UserError(
                "nothing tells which base this model came from",
                key="--base",
                hint="name it with --base",
            )
        model, tokenizer = _load(replace(self.section, name_or_path=self.base))
        yield model, tokenizer


def open_target(
    path: str | Path,
    recipe: Recipe | None,
    *,
    base: str | None,
    warn: Callable[[str], None] = lambda text: None,
) -> OpenedTarget:
    """Load what a command is to work on.

    Args:
        path: An adapter, run or model folder, or a hub id.
        recipe: The run's recipe, where the target belongs to a run.
        base: The base's folder or hub id, where it is not as recorded.
        warn: Told where nothing can tell whether the base is the adapter's.

    Returns:
        The model on its device.

    Raises:
        UserError: If the target is none of these, is damaged, or its base is another one.
    """
    section, adapter = resolve_target(path, recipe, base=base)
    if section.trust_remote_code:
        # The run may have come from somebody else, and its recipe with it.
        warn("code that comes with the model runs: the run's recipe says model.trust_remote_code")
    if adapter is None:
        with telling_target(path):
            model, tokenizer = _load(section)
        before = base or read_provenance(Path(path))
        return OpenedTarget("model", model, tokenizer, before, section)
    from wegeft_cli.methods.registry import put_adapter
    from wegeft_cli.methods.wegeft.save_load import tell_base

    with tell_base(base, adapter.folder):
        model, tokenizer = _load(section)
    model = put_adapter(model, adapter, section, warn=warn).eval()
    own = section.name_or_path if method_of(adapter).trains_in_place else None
    return OpenedTarget("adapter", model, tokenizer, own, section, adapter)


@contextmanager
def telling_target(path: str | Path) -> Iterator[None]:
    """Say of a model that cannot be loaded that the user named it on the command line.

    Args:
        path: As typed.

    Yields:
        Nothing.

    Raises:
        UserError: The fault, told in the user's words.
    """
    try:
        yield
    except UserError as fault:
        if fault.key != "model.name_or_path":
            raise
        gone = not Path(path).exists()
        told = f"no folder {str(path)!r}"
        if not gone:
            told = fault.message
        elif not fault.message.startswith(told):
            told += f", and not to be had as a hub id: {fault.message}"
        raise UserError(
            told,
            file=fault.file,
            key="TARGET",
            hint="give an adapter, run or model folder, or a hub id such as org/name"
            if gone
            else fault.hint,
        ) from fault


def resolve_target(
    path: str | Path, recipe: Recipe | None, *, base: str | None
) -> tuple[ModelSection, Adapter | None]:
    """Find out what a target is, without loading it.

    Args:
        path: An adapter, run or model folder, or a hub id.
        recipe: The run's recipe, where the target belongs to a run.
        base: The base's folder or hub id, where it is not as recorded.

    Returns:
        How the model, or the adapter's base, is loaded; and the adapter, None for a model.

    Raises:
        UserError: If the target is none of these, is a classifier, or is damaged.
    """
    from wegeft_cli.models.loading import quantise_as

    if task_of_path(path, recipe).has_head:
        raise UserError(
            "this is a classifier, which writes no text",
            file=str(path),
            hint="score it with `wegeft eval`",
        )
    folder = Path(path)
    section = recipe.model if recipe is not None else ModelSection()
    if (folder / "config.json").is_file() or not folder.exists():
        # A merged model is dense, whatever its run's base was while it learned.
        dense = quantise_as(section, None)
        return replace(dense, name_or_path=str(path), revision=None), None
    adapter = Adapter.open(folder)
    section = replace(
        section, name_or_path=base or adapter.base, revision=None if base else adapter.revision
    )
    method = method_of(adapter)
    recorded = None if method.trains_in_place else adapter.quantization
    if method.has_generators or recorded is not None:
        # Where a PEFT adapter records nothing, as older ones do, the run's recipe decides.
        section = quantise_as(section, recorded)
    return section, adapter


def fingerprint_target(section: ModelSection, adapter_dir: Path | None) -> dict[str, str | None]:
    """Hash what was scored.

    Args:
        section: The model, or the adapter's base.
        adapter_dir: The adapter's folder; None for a model.

    Returns:
        base_fingerprint (as adapters record it; null where there are no safetensors),
        base_quantization (as it is loaded; null where it is taken as it is) and adapter_fingerprint
        (over the adapter's config and tensors; null for a model).
    """
    from wegeft_cli.artifacts.adapter import CONFIG_NAME
    from wegeft_cli.artifacts.fingerprint import fingerprint_base
    from wegeft_cli.models.loading import find_base_folder, name_quantization

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
    """Resolve what a user names: a path or hub id, a recipe (its run), or the newest finished run.

    Args:
        target: As typed; None is the newest finished run under runs/.

    Returns:
        A folder, or the hub id as it was given.

    Raises:
        UserError: If there is no finished run, or the recipe has none yet.
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


def _load(section: ModelSection) -> tuple[Any, Any]:
    from accelerate import PartialState

    from wegeft_cli.models.loading import load_base, load_tokenizer

    tokenizer = load_tokenizer(
        section.name_or_path,
        revision=section.revision,
        trust_remote_code=section.trust_remote_code,
    )
    return load_base(section).to(PartialState().device), tokenizer
