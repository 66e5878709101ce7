"""`wegeft eval`: score a model or given outputs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from wegeft_cli.cli.arguments import (
    AllowCodeOption,
    BaseOption,
    CodeTemperatureOption,
    DataDirOption,
    JsonOption,
    JudgeModelOption,
    JudgeUrlOption,
    JudgmentsOption,
    LimitOption,
    NumSamplesOption,
    TargetsArgument,
    TrustTaskCodeOption,
)
from wegeft_cli.cli.completion import complete_benchmark, complete_protocol
from wegeft_cli.cli.console import RichReporter, print_json
from wegeft_cli.cli.relaunch import relaunch
from wegeft_cli.cli.tables import print_scores, print_tasks
from wegeft_cli.errors import UserError


def evaluate(
    target: TargetsArgument = None,
    task: Annotated[
        list[str] | None,
        typer.Option(
            "--task",
            metavar="NAME",
            help="Benchmark or group (see --list); for a classifier, test or validation. "
            "Repeatable. Default: the recipe's.",
            autocompletion=complete_benchmark,
        ),
    ] = None,
    protocol: Annotated[
        str | None,
        typer.Option(
            "--protocol",
            metavar="NAME",
            help="Rules for prompt, decoding and scoring (see --list). Default: the recipe's.",
            autocompletion=complete_protocol,
        ),
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(
            "--data",
            metavar="FILE",
            help="Test set of your own: rows of a question and an answer (JSON, JSONL, CSV, "
            "Parquet). Repeatable; not together with --protocol.",
        ),
    ] = None,
    metric: Annotated[
        str | None,
        typer.Option(
            "--metric",
            metavar="NAME",
            help="Score of --data: exact_match, contains, number, rouge_l or judge. Default: the "
            "recipe's, else exact_match.",
        ),
    ] = None,
    data_dir: DataDirOption = None,
    limit: LimitOption = None,
    batch_size: Annotated[
        int | None,
        typer.Option(
            "--batch-size", metavar="N", min=1, help="Prompts per batch. Default: eval.batch_size."
        ),
    ] = None,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(
            "--max-new-tokens",
            metavar="N",
            min=1,
            help="Maximum length of an answer in tokens. Default: the protocol's.",
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", metavar="FILE", help="Also write the JSON object to this file."
        ),
    ] = None,
    compare_base: Annotated[
        bool, typer.Option("--compare-base", help="Also score the base without the adapter.")
    ] = False,
    samples: Annotated[
        Path | None,
        typer.Option(
            "--samples",
            metavar="FILE",
            help="Score the outputs in this JSONL file, without a model.",
        ),
    ] = None,
    base: BaseOption = None,
    allow_leaky: Annotated[
        bool,
        typer.Option(
            "--allow-leaky",
            help="Allow benchmarks with known train/test overlap (reported in the result).",
        ),
    ] = False,
    seed: Annotated[
        int | None,
        typer.Option(
            "--seed", metavar="N", min=0, help="Seed of the sampling. Default: the protocol's."
        ),
    ] = None,
    backend: Annotated[
        str,
        typer.Option(
            "--backend", metavar="NAME", help="Engine that generates: transformers or vllm."
        ),
    ] = "transformers",
    num_processes: Annotated[
        int | None,
        typer.Option(
            "--num-processes",
            metavar="N",
            min=1,
            help="Split the rows over N processes, one per GPU. Default: 1.",
        ),
    ] = None,
    allow_code_execution: AllowCodeOption = False,
    num_samples: NumSamplesOption = None,
    temperature: CodeTemperatureOption = None,
    judge_url: JudgeUrlOption = None,
    judge_model: JudgeModelOption = None,
    judgments: JudgmentsOption = None,
    trust_task_code: TrustTaskCodeOption = False,
    list_tasks: Annotated[
        bool, typer.Option("--list", help="List the benchmarks, groups and protocols.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Score a model on test sets by a named protocol and log every sample."""
    from wegeft_cli.evaluation import evaluate as workflow

    if list_tasks:
        print_tasks(workflow.list_tasks(), as_json)
        return
    if judgments is not None and samples is not None:
        raise UserError(
            "--judgments and --samples exclude each other",
            key="--judgments",
            hint="remove one of the two",
        )
    given = samples if judgments is None else judgments
    if num_processes is not None and given is None:
        raise typer.Exit(relaunch(num_processes))
    from wegeft_cli.distributed.launch import join_slurm

    join_slurm()
    options = {
        "allow_leaky": allow_leaky,
        "seed": seed,
        "allow_code_execution": allow_code_execution,
        "num_samples": num_samples,
        "temperature": temperature,
        "judge_url": judge_url,
        "judge_model": judge_model,
        "is_judged": judgments is not None,
        "trust_task_code": trust_task_code,
    }
    result = workflow.evaluate(
        target,
        tasks=task or [],
        protocol=protocol,
        data_dir=data_dir,
        limit=limit,
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
        output=output,
        compare_base=compare_base,
        samples=given,
        base=base,
        backend=backend,
        data=data or (),
        metric=metric,
        options=options,
        reporter=RichReporter(),
    )
    if as_json:
        print_json(result)
        return
    print_scores(result)
