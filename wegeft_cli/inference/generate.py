"""`wegeft generate`: answers of an adapter, run or model, and of its base on request."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from wegeft_cli.artifacts.environment import describe_environment
from wegeft_cli.artifacts.run_directory import find_recipe_of
from wegeft_cli.errors import UserError, raise_all
from wegeft_cli.generation.completion import GenerationResult
from wegeft_cli.generation.decoding import Decoding, sample_id
from wegeft_cli.generation.engine import GenerationEvents, Prompts, generate_texts
from wegeft_cli.inference.defaults import GREEDY, default_new_tokens
from wegeft_cli.inference.form_choice import choose_form
from wegeft_cli.inference.loaded_model import LoadedModel, find_target
from wegeft_cli.inference.prompt_files import MAX_FAULTS, Question, read_questions
from wegeft_cli.inference.prompt_format import PromptForm, question_text
from wegeft_cli.inference.row_adapters import load_row_adapters
from wegeft_cli.inference.serving.targets import read_targets
from wegeft_cli.models.device_memory import generation_memory_errors
from wegeft_cli.public_arguments import checked_arguments
from wegeft_cli.recipe.schema import EvalSection
from wegeft_cli.reporter import Reporter, SilentReporter
from wegeft_cli.storage.atomic import check_output_file, write_text_atomic

_OUTPUT_START = '{"index": '


@checked_arguments
def generate(
    target: str | Path | None = None,
    *,
    prompts: Sequence[str] = (),
    file: str | Path | None = None,
    limit: int | None = None,
    template: str | None = None,
    system: str | None = None,
    decoding: Decoding = GREEDY,
    num_samples: int = 1,
    max_new_tokens: int | None = None,
    batch_size: int | None = None,
    compare_base: bool = False,
    base: str | None = None,
    adapters: Sequence[str] = (),
    output: Path | None = None,
    reporter: Reporter | None = None,
    on_text: Callable[[str, str], None] | None = None,
) -> dict[str, Any]:
    """Generate answers to prompts.

    The same question, seed and sample number get the same answer, independent of the batch (up to
    the rounding of a batched matrix product), and the one that `wegeft eval` gets under a protocol
    with the same prompt and decoding.

    Args:
        target: An adapter, run or model folder, or a hub id. Default: the newest finished run.
        prompts: The questions.
        file: Questions from a file instead: rows (JSON, JSONL, CSV, Parquet), or the whole text of
            any other file as one question; `-` is standard input.
        limit: Number of rows of the file. Default: all.
        template: The prompt format. Default: that of the training.
        system: A system message for every conversation without one.
        decoding: Decoding settings and seed.
        num_samples: Answers per question; more than one only with sampling.
        max_new_tokens: Longest answer, instead of the one in `decoding`. Default: 512, or half of a
            smaller context.
        batch_size: Prompts at a time. Default: the recipe's `eval.batch_size`.
        compare_base: Generate the base's answers too.
        base: The base's folder or hub id, if it is not where the adapter records it.
        adapters: `NAME=PATH` of WeGeFT adapters of one base. Each row of the file names one, or
            `base`, in its field `adapter`; a batch can hold rows of several.
        output: Write the answers to this file too, one JSON object per line.
        reporter: Progress and messages. Default: none.
        on_text: Called with (`base`, `tuned` or `model`, piece) of a single answer during
            generation; `model` if no base is known.

    Returns:
        The JSON object of `wegeft generate`.

    Raises:
        UserError: If the target, a question, a setting or the output file is at fault.
        ExceptionGroup: If several are.
        MachineError: If the memory does not suffice.
    """
    reporter = reporter or SilentReporter()
    if num_samples > 1 and not decoding.do_sample:
        raise UserError(
            "several answers to a question are all the same without sampling",
            key="--num-samples",
            hint="add --temperature 1, or ask for one",
        )
    if output is not None:
        check_output_file(output, _OUTPUT_START, "file of earlier answers", "answers.jsonl")
    named = read_targets(target, adapters, base) if adapters else []
    path = named[0].target.path if named else find_target(target)
    recipe = find_recipe_of(path)
    sources = [] if recipe is None else recipe.data.train
    columns = [source.columns for source in sources if source.columns]
    questions = read_questions(prompts, file, limit, columns)
    settings = recipe.eval if recipe is not None else EvalSection()
    loaded = load_row_adapters(named, template, reporter.warn) if named else None
    if loaded is None:
        opened = LoadedModel.open(path, recipe, base=base, warn=reporter.warn)
        form = choose_form(template, path, recipe, opened.tokenizer)
    else:
        opened, form = loaded.opened, loaded.form
    assigned = [] if loaded is None else loaded.assign(questions)
    if loaded is None:
        questions = [replace(one, adapter=None) for one in questions]  # a column of another kind
    of_prompts = [name for name in assigned for _ in range(num_samples)]
    texts = _write_prompts(questions, form, system)
    count = len(texts) * num_samples
    job = _Batch(
        texts=[text for text in texts for _ in range(num_samples)],
        sample_ids=[sample_id(q.index, n) for q in questions for n in range(num_samples)],
        form=form,
        decoding=replace(
            decoding, max_new_tokens=max_new_tokens or default_new_tokens(opened.model)
        ),
        batch_size=min(batch_size or settings.batch_size, count),
    )
    stream = on_text if count == 1 else None
    start = time.monotonic()
    base_written = None
    if compare_base:
        with opened.base_model() as (model, tokenizer):
            base_written = job.run(model, tokenizer, "base", reporter, stream)
    is_tuned = opened.kind == "adapter" or opened.base is not None
    who = "tuned" if is_tuned else "model"
    if loaded is not None:
        job = replace(job, use_rows=loaded.use(of_prompts))
    written = job.run(opened.model, opened.tokenizer, who, reporter, stream)
    seconds = time.monotonic() - start
    if written.settings["num_truncated_prompts"]:
        reporter.warn(
            f"{written.settings['num_truncated_prompts']} of {count} prompts are longer than the "
            "model's context has room for: their beginnings were cut off"
        )
    if written.note is not None:
        reporter.warn(written.note)
    results = _build_results(questions, num_samples, job.texts, written, base_written)
    if output is not None:
        lines = (json.dumps(row, ensure_ascii=False) for row in results)
        write_text_atomic(output, "".join(line + "\n" for line in lines))
    return {
        "target": str(path),
        "kind": opened.kind,
        "template": form.name,
        "template_hash": form.template.digest,
        "system": system,
        "seed": decoding.seed if decoding.do_sample else None,
        "settings": written.settings,
        "results": results,
        "num_new_tokens": written.num_new_tokens,
        "seconds": seconds,
        "output_path": None if output is None else str(output),
        **describe_environment(),
    }


@dataclass(frozen=True)
class _Batch:
    """Prompts, and how to continue them."""

    texts: list[str]
    sample_ids: list[int]
    form: PromptForm
    decoding: Decoding
    batch_size: int
    use_rows: Callable[[Sequence[int]], AbstractContextManager[None]] | None = None

    def run(
        self,
        model: Any,
        tokenizer: Any,
        who: str,
        reporter: Reporter,
        on_text: Callable[[str, str], None] | None,
    ) -> GenerationResult:
        with _shown(reporter, who, len(self.texts), on_text) as advance, generation_memory_errors():
            return generate_texts(
                model,
                tokenizer,
                Prompts(
                    self.texts,
                    sample_ids=self.sample_ids,
                    add_special_tokens=not self.form.holds_turns,
                    end_of_turn_ids=self.form.find_turn_ends(tokenizer),
                    use_rows=self.use_rows,
                ),
                self.decoding,
                events=GenerationEvents(
                    on_progress=lambda done, total: advance(done),
                    on_text=None if on_text is None else lambda piece: on_text(who, piece),
                ),
                batch_size=self.batch_size,
            )


@contextmanager
def _shown(
    reporter: Reporter, who: str, count: int, on_text: Callable[[str, str], None] | None
) -> Iterator[Callable[..., None]]:
    """Show the progress, unless the text is shown."""
    if on_text is not None:
        yield lambda done: None
        return
    with reporter.progress(f"{who}: generating", count) as advance:
        yield advance


def _write_prompts(
    questions: Sequence[Question], form: PromptForm, system: str | None
) -> list[str]:
    texts: list[str] = []
    faults: list[UserError] = []
    for question in questions:
        try:
            texts.append(form.write(question.asked, system))
        except UserError as fault:
            if fault.key is not None:  # of the form as a whole
                raise
            fault.file = f"question {question.index}"
            faults.append(fault)
            if len(faults) == MAX_FAULTS:
                break
    raise_all(faults)
    return texts


def _build_results(
    questions: Sequence[Question],
    num_samples: int,
    texts: Sequence[str],
    written: GenerationResult,
    base_written: GenerationResult | None,
) -> list[dict[str, Any]]:
    results = []
    for position in range(len(texts)):
        question, sample = questions[position // num_samples], position % num_samples
        answer = written.completions[position]
        base = None if base_written is None else base_written.completions[position]
        results.append(
            {
                "index": question.index,
                **({} if question.row_id is None else {"id": question.row_id}),
                **({} if question.adapter is None else {"adapter": question.adapter}),
                **({"sample": sample} if num_samples > 1 else {}),
                "prompt": question_text(question.asked),
                "text": texts[position],
                "output": answer.new_text,
                "finish_reason": answer.finish_reason,
                "num_new_tokens": len(answer.new_ids),
                "truncated": answer.is_truncated,
                **(
                    {}
                    if base is None
                    else {"base_output": base.new_text, "base_finish_reason": base.finish_reason}
                ),
            }
        )
    return results
