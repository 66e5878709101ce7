"""Prompts that the model answers during training: `logging.sample_prompts`."""

from __future__ import annotations

from typing import Any

from wegeft_cli.artifacts.run_directory import RunDirectory
from wegeft_cli.data.batches.lockstep import is_sharded
from wegeft_cli.errors import cut_text
from wegeft_cli.generation.decoding import Decoding
from wegeft_cli.generation.engine import Prompts, generate_texts
from wegeft_cli.inference.prompt_format import SamplePrompts
from wegeft_cli.reporter import Reporter
from wegeft_cli.runs.callbacks.trackers import Trackers
from wegeft_cli.training.callbacks import Callback
from wegeft_cli.training.trainer import Trainer

_SHOWN = 60
"""Characters of a prompt or an answer that the terminal shows."""


class SamplePromptsCallback(Callback):
    """Generates answers at each validation, and writes them to the run's files and trackers.

    The first process generates greedily and the others wait for it. They generate as well where the
    base is sharded, because each forward pass then needs all processes.
    """

    def __init__(
        self,
        prompts: SamplePrompts,
        tokenizer: Any,
        directory: RunDirectory,
        trackers: Trackers,
        reporter: Reporter,
    ) -> None:
        self._prompts = prompts
        self._tokenizer = tokenizer
        self._directory = directory
        self._trackers = trackers
        self._reporter = reporter

    def on_validate(self, trainer: Trainer) -> dict[str, float]:
        """Generate the answers; they are no metrics."""
        answers = self._generate(trainer)
        if trainer.processes.is_main:
            samples = list(zip(self._prompts.prompts, answers, strict=True))
            self._directory.append_samples(trainer.step, samples)
            self._trackers.log_samples(samples, trainer.step)
            for prompt, output in samples:
                self._reporter.note(
                    f"step {trainer.step}: {_shorten(prompt)} -> {_shorten(output)}"
                )
        return {}

    def _generate(self, trainer: Trainer) -> list[str]:
        answers: list[str] = []
        prompts, generates = self._prompts, trainer.processes.is_main or is_sharded(trainer.model)
        for start in range(0, len(prompts.texts), prompts.batch_size):
            if start:
                trainer.check_stop()
            if generates:
                answers += generate_texts(
                    trainer.model,
                    self._tokenizer,
                    Prompts(
                        prompts.texts[start : start + prompts.batch_size],
                        add_special_tokens=prompts.add_special_tokens,
                        end_of_turn_ids=prompts.end_of_turn_ids,
                    ),
                    Decoding(prompts.max_new_tokens),
                    batch_size=prompts.batch_size,
                ).new_texts
        return answers


def _shorten(text: str) -> str:
    flat = " ".join(text.split())
    return cut_text(flat, _SHOWN)
