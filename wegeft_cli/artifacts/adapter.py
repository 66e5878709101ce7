"""An adapter on disk: `adapter_config.json`, `adapter_model.safetensors` and a model card."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from wegeft_cli.artifacts.adapter_files import (
    BASE_NAME,
    CONFIG_NAME,
    SAVED_PREFIX,
    WEIGHTS_NAME,
    AdapterFiles,
    load_adapter_files,
)
from wegeft_cli.artifacts.head_file import read_head
from wegeft_cli.artifacts.manifest import AdapterManifest
from wegeft_cli.artifacts.prompt_record import PROMPT_KEY, PromptRecord
from wegeft_cli.artifacts.run_directory import RunDirectory, find_recipe_of, find_run
from wegeft_cli.errors import UserError
from wegeft_cli.recipe.schema import Recipe
from wegeft_cli.storage.containment import check_links
from wegeft_cli.storage.json_files import (
    parse_json,
    read_json,
    read_object,
    read_text_bytes,
    shorten,
)
from wegeft_cli.storage.safetensors_reader import read_shard

PROVENANCE_NAME = "wegeft_merge.json"  # in a merged model's folder

_QUANTIZATION = "base_quantization"


def is_checkpoint(path: Path) -> bool:
    """Return whether a folder is a checkpoint for resuming a run."""
    return (path / "state.json").is_file() and (path / "manifest.json").is_file()


def resolve_adapter_dir(path: Path) -> Path:
    """Find the adapter that a user means by an adapter folder or a run folder.

    Raises:
        UserError: If there is none; the message says what is there instead.
    """
    if (path / CONFIG_NAME).is_file():
        return path
    run = RunDirectory(path)
    if (run.adapter_dir / CONFIG_NAME).is_file():
        return run.adapter_dir
    if not path.is_dir():
        what = "this is a file, not an adapter folder" if path.exists() else "there is no such path"
        raise UserError(what, file=str(path), hint="give an adapter folder or a run folder")
    if is_checkpoint(path):
        raise UserError(
            "this is a checkpoint for resuming a run, not an adapter",
            file=str(path),
            hint=f"`wegeft merge {path}` makes its adapter and merges it; the run's own adapter is "
            f"that of {path.parent.parent}",
        )
    if run.adapter_dir.is_dir():
        raise UserError(
            f"this adapter folder lacks its {CONFIG_NAME}",
            file=str(run.adapter_dir),
            hint="an adapter has both files: copy it again",
        )
    if run.record():
        raise UserError(
            f"this run has no adapter yet (its status is {shorten(run.status())})",
            file=str(path),
            hint=_next_step(run),
        )
    if (path / WEIGHTS_NAME).is_file():
        message = f"this adapter folder lacks its {CONFIG_NAME}"
        raise UserError(message, file=str(path), hint="copy both files")
    raise UserError(
        f"this folder holds neither {CONFIG_NAME} nor adapter/{CONFIG_NAME}",
        file=str(path),
        hint="give an adapter folder or a run folder",
    )


def _next_step(run: RunDirectory) -> str:
    """Return how to get an adapter of a run that has none."""
    finish = f"finish it: `wegeft train {run.recipe_path} --resume auto`"
    newest = next(filter(is_checkpoint, reversed(run.checkpoint_dirs())), None)
    if newest is None:
        return finish
    return f"{finish}, or merge its newest checkpoint: `wegeft merge {newest}`"


@dataclass(frozen=True)
class Adapter:
    """An adapter of any method on disk; its `adapter_config.json` is read once.

    Args:
        folder: The folder that holds `adapter_config.json`.
        peft_type: WEGEFT, LORA, ...
        base: The base's name or path.
        revision: The base's hub revision.
        config: All that `adapter_config.json` holds.
        text: The file's bytes.
    """

    folder: Path
    peft_type: str
    base: str
    revision: str | None
    config: Mapping[str, Any] = field(repr=False)
    text: bytes = field(repr=False)

    @classmethod
    def open(cls, path: str | Path | None = None) -> Adapter:
        """Open an adapter folder, or the adapter of a run folder.

        Args:
            path: The folder. Default: the newest finished run under runs/.

        Raises:
            UserError: If there is no adapter, or its config is damaged or names no method or base.
        """
        folder = resolve_adapter_dir(find_run(path))
        check_links(folder)
        config_path = folder / CONFIG_NAME
        text = read_text_bytes(config_path)
        values = parse_json(text, file=str(config_path), allow_nan=True)
        if not isinstance(values, dict):
            raise UserError(f"must be a JSON object, got {shorten(values)}", file=str(config_path))
        if "peft_type" not in values:
            message = "is missing: this is no adapter's config"
            raise UserError(message, file=str(config_path), key="peft_type")
        for key in ("peft_type", "base_model_name_or_path"):
            if not isinstance(values.get(key), str):
                message = f"must be a text, got {shorten(values.get(key))}"
                raise UserError(message, file=str(config_path), key=key)
        revision = values.get("revision")
        if revision is not None and not isinstance(revision, str):
            message = f"must be a text or null, got {shorten(revision)}"
            raise UserError(message, file=str(config_path), key="revision")
        base = values["base_model_name_or_path"]
        return cls(folder, values["peft_type"], base, revision, values, text)

    @property
    def config_path(self) -> Path:
        """Path of `adapter_config.json`."""
        return self.folder / CONFIG_NAME

    @property
    def weights_path(self) -> Path:
        """Path of `adapter_model.safetensors`."""
        return self.folder / WEIGHTS_NAME

    @property
    def base_fingerprint(self) -> str | None:
        """The base's fingerprint; None where the config, which a method checks, holds none."""
        found = self.config.get("base_fingerprint")
        return found if isinstance(found, str) else None

    @cached_property
    def manifest(self) -> AdapterManifest:
        """The config of a WeGeFT adapter, strictly checked."""
        return AdapterManifest.from_json(self.text, file=str(self.config_path))

    @cached_property
    def recipe(self) -> Recipe | None:
        """Recipe of the run that the adapter belongs to; None outside a run."""
        return find_recipe_of(self.folder)

    @property
    def trusts_remote_code(self) -> bool:
        """Whether the run allowed the code that comes with its base."""
        return self.recipe is not None and self.recipe.model.trust_remote_code

    @cached_property
    def head(self) -> dict[str, Any] | None:
        """What `head.json` holds; None for a language model's adapter."""
        return read_head(self.folder)

    @cached_property
    def files(self) -> AdapterFiles:
        """The checked tensors and manifest of a WeGeFT adapter; they stay in memory."""
        return self.read_files()

    def read_files(self) -> AdapterFiles:
        """Read and check the tensors of a WeGeFT adapter, see `load_adapter_files`."""
        return load_adapter_files(self.folder, self.text)

    def list_whole_tensors(self) -> set[str]:
        """Return the base's parameters that the adapter replaces, by their names in its file."""
        if not self.weights_path.is_file():
            return set()
        names = read_shard(self.weights_path).tensors
        return {name.removeprefix(SAVED_PREFIX) for name in names if name.startswith(SAVED_PREFIX)}

    @cached_property
    def quantization(self) -> str | None:
        """How the base was quantized in training (`bitsandbytes_4bit`); None where it was not.

        It is a key of WeGeFT's config. PEFT warns of keys that it does not know, so a PEFT adapter
        has it in `wegeft_base.json`.
        """
        path, found = self._find_recorded(_QUANTIZATION)
        if found is not None and not isinstance(found, str):
            message = f"must be a text, got {shorten(found)}"
            raise UserError(message, file=str(path), key=_QUANTIZATION)
        return found

    @cached_property
    def prompt(self) -> PromptRecord | None:
        """The prompt form of the training; None for older adapters and those of other programs."""
        path, found = self._find_recorded(PROMPT_KEY)
        return None if found is None else PromptRecord.from_json(found, file=str(path))

    @property
    def special_tokens(self) -> dict[str, str]:
        """The special tokens of the training that replaced the tokenizer's own."""
        return {} if self.prompt is None else dict(self.prompt.special_tokens)

    def _find_recorded(self, key: str) -> tuple[Path, Any]:
        """Return a value of the config, else of `wegeft_base.json`, and its file."""
        record = self.folder / BASE_NAME
        if self.config.get(key) is not None or not record.is_file():
            return self.config_path, self.config.get(key)
        values = read_json(record)
        if not isinstance(values, dict):
            raise UserError(f"must be a JSON object, got {shorten(values)}", file=str(record))
        return record, values.get(key)


def base_record_to_json(quantization: str | None, prompt: PromptRecord | None) -> str | None:
    """Return the text of `wegeft_base.json`, or None if there is nothing to record.

    It holds what a PEFT adapter's own config cannot, see `Adapter.quantization`.
    """
    values: dict[str, Any] = {}
    if quantization is not None:
        values[_QUANTIZATION] = quantization
    if prompt is not None:
        values[PROMPT_KEY] = prompt.to_json()
    return json.dumps(values, indent=2) + "\n" if values else None


def find_prompt_record(path: str | Path) -> PromptRecord | None:
    """Return the prompt form that an adapter, a run or a merged model records, if it does.

    Raises:
        UserError: If the record is damaged.
    """
    folder = Path(path)
    provenance = folder / PROVENANCE_NAME
    if (found := read_object(provenance).get(PROMPT_KEY)) is not None:
        return PromptRecord.from_json(found, file=str(provenance))
    is_adapter = any((each / CONFIG_NAME).is_file() for each in (folder, folder / "adapter"))
    return Adapter.open(folder).prompt if is_adapter else None


def read_provenance(folder: Path) -> str | None:
    """Return the base that a merged folder was made from, or None if it does not record one."""
    base = read_object(folder / PROVENANCE_NAME).get("base_model_name_or_path")
    return None if base is None else str(base)
