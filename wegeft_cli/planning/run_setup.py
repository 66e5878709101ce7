"""Everything that a run needs but its weights: the preflight checks and the batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from wegeft_cli.data.batches.base import BatchSource
from wegeft_cli.data.batches.layout import DEFAULT_TOKENS
from wegeft_cli.distributed.processes import Processes
from wegeft_cli.errors import Faults, UserError
from wegeft_cli.evaluation.benchmarks.base import Benchmark
from wegeft_cli.inference.prompt_format import SamplePrompts
from wegeft_cli.methods.base import ParameterGroup
from wegeft_cli.models.heads import HeadSpec
from wegeft_cli.models.loading import name_quantization
from wegeft_cli.models.quantization import check_quantization
from wegeft_cli.planning.memory import measure_available, memory_warnings
from wegeft_cli.planning.preflight import check_run
from wegeft_cli.planning.targets import TargetSetup
from wegeft_cli.recipe.load import LoadedRecipe
from wegeft_cli.reporter import Reporter
from wegeft_cli.tasks.base import DataStatistics


@dataclass(frozen=True)
class RunSetup:
    """Everything that a run needs but the weights.

    Args:
        tokenizer: The base's; of an image model its image processor.
        source: This process's batches.
        report: Statistics of the data.
        groups: The learned parameters by group.
        targets: The layers that are adapted, and what is not.
        estimated_gib: Estimated peak memory of one device.
        checkpoint_bytes: Estimated size of one checkpoint.
        tasks: Benchmarks that each validation scores, by their name in the recipe.
        prompts: Prompts that the model answers at each validation, if any.
        trackers: Names of the experiment trackers.
        digests: Hashes by which a resumed run recognizes its data and tokenizer.
        head: The task's new head, if it has one.
        steps_per_epoch: Optimizer steps of one pass over the rows; of no use for a stream.
    """

    tokenizer: Any
    source: BatchSource
    report: DataStatistics
    groups: list[ParameterGroup]
    targets: TargetSetup
    estimated_gib: float | None
    checkpoint_bytes: float
    tasks: dict[str, Benchmark]
    prompts: SamplePrompts | None
    trackers: tuple[str, ...]
    digests: dict[str, Any]
    head: HeadSpec | None = None
    steps_per_epoch: int = 0

    @property
    def trainable(self) -> int:
        """Number of learned parameters."""
        return sum(group.num_parameters for group in self.groups)

    @property
    def waste(self) -> dict[str, Any]:
        """Shares of an epoch's positions: without a token, and with logits."""
        return self.source.padding_statistics()


def build_setup(
    loaded: LoadedRecipe, processes: Processes, reporter: Reporter, *, resuming: bool
) -> RunSetup:
    """Check a run on this machine and build its batches.

    `resuming` skips the adapter that the run started from.

    Raises:
        UserError: If something is at fault.
        ExceptionGroup: If several things are.
    """
    recipe, is_main = loaded.recipe, processes.is_main
    trackers = list_trackers(recipe.logging.report_to)
    faults = Faults()
    with faults.collected():
        check_trackers(trackers)
    quantization = name_quantization(recipe.model)
    if quantization is not None:
        with faults.collected():
            check_quantization(quantization)
    with faults.collected():
        checked = check_run(
            loaded,
            world_size=processes.count,
            device=processes.device,
            resuming=resuming,
            reporter=reporter,
        )
    faults.raise_all()
    task, data, processor = checked.task, checked.data, checked.processor
    assert data is not None
    assert checked.steps is not None
    source = task.batches(loaded, data, checked.steps, processor, checked.skeleton, processes.rank)
    limit: int | None = processes.broadcast(checked.max_tokens if is_main else None)
    source.use_layout(checked.layout, limit)
    default = DEFAULT_TOKENS[measure_available()[0]]
    if limit is not None and recipe.train.max_tokens_per_pass is None and limit < default:
        reporter.note(
            f"forward passes take at most {limit:,} tokens instead of {default:,}, to fit into the "
            "free memory (train.max_tokens_per_pass)"
        )
    if is_main:
        task.check_rows(data)
    for note in (*checked.targets.notes, *task.describe_data(data)):
        reporter.note(note)
    for warning in (*checked.targets.warnings, *data.report.warnings):
        reporter.warn(warning)
    estimated = None
    if is_main:
        memory, _ = checked.estimate_memory()
        estimated = memory["total"]
        for warning in memory_warnings(recipe, estimated, *measure_available()):
            reporter.warn(warning)
    return RunSetup(
        processor,
        source,
        data.report,
        checked.groups,
        checked.targets,
        estimated,
        checked.checkpoint_bytes,
        checked.eval_tasks,
        checked.prompts,
        trackers,
        task.digest_inputs(recipe, loaded.path.parent, processor),
        head=checked.head,
        steps_per_epoch=checked.steps.steps_per_epoch,
    )


def list_trackers(report_to: Any) -> tuple[str, ...]:
    """Read `logging.report_to`: none, a name, or a list of names."""
    names = [report_to] if isinstance(report_to, str) else list(report_to)
    return tuple(name for name in dict.fromkeys(names) if name != "none")


def check_trackers(names: Sequence[str]) -> None:
    """Refuse trackers whose package is not here, before anything costs time.

    Raises:
        UserError: If one is not installed.
    """
    for name in names:
        if find_spec(name) is None:
            raise UserError(
                f"the tracker {name!r} is not installed",
                key="logging.report_to",
                hint=f"pip install 'wegeft-cli[{name}]'",
            )
