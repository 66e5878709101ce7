"""Experiment trackers, through Accelerate's; their errors never end a run."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any, TypeAlias

from wegeft_cli.errors import cut_text
from wegeft_cli.redaction import mask_secrets
from wegeft_cli.training.callbacks import Callback
from wegeft_cli.training.metrics import StepMetrics
from wegeft_cli.training.trainer import Trainer

_MAX_REASON = 160
"""Longest error message of a tracker in a warning, in characters."""

Sample: TypeAlias = tuple[str, str]
"""A prompt, and what the model wrote."""


class Trackers:
    """The trackers of one run, in the main process.

    A tracker that fails is reported once and disabled for the rest of the run. `ids` are the
    trackers' own ids of the run; `status` is finished, interrupted or failed. Secrets are masked in
    both names.

    Args:
        names: The trackers, possibly none.
        project: Project or experiment.
        run_name: The run's name in the project.
        run_dir: The run's folder: tensorboard writes to `logs` in it, wandb its files, and mlflow
            to `mlruns` if no other store is set.
        earlier: Tracker -> its id of the resumed run; empty for a new run.
        step: Optimizer steps done before.
        warn: Called with the message about a tracker that fails.
    """

    def __init__(
        self,
        names: Sequence[str],
        *,
        project: str,
        run_name: str,
        run_dir: Path,
        earlier: Mapping[str, str],
        step: int,
        warn: Callable[[str], None],
    ) -> None:
        self.ids: dict[str, str] = {}
        self.status = "failed"
        self._warn = warn
        self._open: dict[str, _Tracker] = {}
        project, run_name = mask_secrets(project), mask_secrets(run_name)
        for name in names:
            with self._guarded(name):
                tracker = _TRACKERS[name](project, run_name, run_dir, earlier.get(name), step)
                self.ids[name] = tracker.run_id
                self._open[name] = tracker

    def log_config(self, values: Mapping[str, Any]) -> None:
        """Send the recipe, by dotted key."""
        self._call_each(lambda tracker: tracker.log_config(values))

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Send the metrics of a step."""
        self._call_each(lambda tracker: tracker.inner.log(dict(values), step=step))

    def log_samples(self, samples: Sequence[Sample], step: int) -> None:
        """Send the model's answers at a step."""
        self._call_each(lambda tracker: tracker.log_samples(samples, step))

    def finish(self) -> None:
        """Close the trackers with `status`."""
        self._call_each(lambda tracker: tracker.finish(self.status))
        self._open.clear()

    def _call_each(self, action: Callable[[_Tracker], None]) -> None:
        for name, tracker in list(self._open.items()):
            with self._guarded(name):
                action(tracker)

    @contextmanager
    def _guarded(self, name: str) -> Iterator[None]:
        """Call a tracker with its output on stderr, and disable it after an error."""
        try:
            with warnings.catch_warnings(), redirect_stdout(sys.stderr):
                warnings.simplefilter("ignore")
                yield
        except Exception as error:  # any error of a network, a server or a package
            self._open.pop(name, None)
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            reason = f"{type(error).__name__}: {lines[0] if lines else 'no reason given'}"
            self._warn(
                f"the tracker {name} failed and is disabled for the rest of this run; "
                f"metrics.jsonl holds every figure ({cut_text(reason, _MAX_REASON)})"
            )


class _Tracker:
    """One of Accelerate's trackers, started; the methods are what the trackers differ in.

    Args:
        inner: Accelerate's tracker.
        run_id: The id by which the tracker resumes the run.
    """

    def __init__(self, inner: Any, run_id: str) -> None:
        self.inner = inner
        self.run_id = run_id

    def log_config(self, values: Mapping[str, Any]) -> None:
        self.inner.store_init_configuration(dict(values))

    def log_samples(self, samples: Sequence[Sample], step: int) -> None:
        self.inner.log({"samples": _as_markdown(samples)}, step=step)

    def finish(self, status: str) -> None:
        self.inner.finish()


class _TensorBoard(_Tracker):
    def __init__(
        self, project: str, run_name: str, run_dir: Path, run_id: str | None, step: int
    ) -> None:
        from accelerate.tracking import TensorBoardTracker

        # Steps that a resumed run takes a second time replace the first.
        purge = {} if run_id is None else {"purge_step": step + 1}
        inner = TensorBoardTracker("logs", run_dir, **purge)
        inner.start()
        super().__init__(inner, "logs")

    def log_config(self, values: Mapping[str, Any]) -> None:
        # As hyperparameters they would create a second run.
        rows = "".join(f"| {key} | {value} |\n" for key, value in values.items())
        self.inner.log({"recipe": f"| key | value |\n|---|---|\n{rows}"}, step=0)


class _Wandb(_Tracker):
    def __init__(
        self, project: str, run_name: str, run_dir: Path, run_id: str | None, step: int
    ) -> None:
        import wandb
        from accelerate.tracking import WandBTracker

        # By default it sends the command line (with secrets in overrides), the repository's
        # address and the terminal's output.
        silent = wandb.Settings(x_disable_meta=True, disable_git=True, console="off")
        place = {} if "WANDB_DIR" in os.environ else {"dir": str(run_dir)}
        again = {} if run_id is None else {"id": run_id, "resume": "allow"}
        inner = WandBTracker(project, name=run_name, settings=silent, **place, **again)
        inner.start()
        super().__init__(inner, str(inner.tracker.id))

    def log_samples(self, samples: Sequence[Sample], step: int) -> None:
        rows = [[step, prompt, output] for prompt, output in samples]
        self.inner.log_table("samples", columns=["step", "prompt", "output"], data=rows, step=step)

    def finish(self, status: str) -> None:
        self.inner.tracker.finish(exit_code=0 if status == "finished" else 1)


class _Mlflow(_Tracker):
    def __init__(
        self, project: str, run_name: str, run_dir: Path, run_id: str | None, step: int
    ) -> None:
        # MLflow's small package writes to servers, and to folders only with this variable.
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        import mlflow
        from accelerate.tracking import MLflowTracker

        self._has_own_store = not mlflow.is_tracking_uri_set()
        if self._has_own_store:
            mlflow.set_tracking_uri((run_dir.absolute() / "mlruns").as_uri())
        inner = MLflowTracker(project, run_name=run_name, run_id=run_id)
        inner.start()
        super().__init__(inner, str(inner.tracker.info.run_id))
        self._is_new = run_id is None

    def log_config(self, values: Mapping[str, Any]) -> None:
        # A parameter that has changed is refused, and max_steps may have.
        if self._is_new:
            # Its names take no brackets: data.train[0].path is data.train.0.path there.
            plain = {key.replace("[", ".").replace("]", ""): v for key, v in values.items()}
            super().log_config(plain)

    def log_samples(self, samples: Sequence[Sample], step: int) -> None:
        import mlflow

        mlflow.log_text(_as_markdown(samples), f"samples/step-{step:08d}.md")

    def finish(self, status: str) -> None:
        import mlflow

        words = {"finished": "FINISHED", "interrupted": "KILLED", "failed": "FAILED"}
        mlflow.end_run(status=words[status])
        if self._has_own_store:
            # The next run of this process has a folder of its own; None unsets, untyped as it is.
            mlflow.set_tracking_uri(None)  # type: ignore[arg-type]


class _Trackio(_Tracker):
    def __init__(
        self, project: str, run_name: str, run_dir: Path, run_id: str | None, step: int
    ) -> None:
        from accelerate.tracking import TrackioTracker

        # Trackio finds a run again by its name alone.
        resume = "never" if run_id is None else "allow"
        inner = TrackioTracker(project, name=run_id or run_name, resume=resume, embed=False)
        inner.start()
        super().__init__(inner, str(inner.tracker.name))

    def log_samples(self, samples: Sequence[Sample], step: int) -> None:
        import trackio

        self.inner.log({"samples": trackio.Markdown(_as_markdown(samples))}, step=step)

    def finish(self, status: str) -> None:
        import trackio

        # The run's own `finish` would be called a second time when Python leaves.
        trackio.finish()


_TRACKERS: dict[str, Callable[[str, str, Path, str | None, int], _Tracker]] = {
    "tensorboard": _TensorBoard,
    "wandb": _Wandb,
    "mlflow": _Mlflow,
    "trackio": _Trackio,
}


def _as_markdown(samples: Sequence[Sample]) -> str:
    return "\n\n".join(
        f"Prompt:\n\n{_as_code(prompt)}\n\nAnswer:\n\n{_as_code(output)}"
        for prompt, output in samples
    )


def _as_code(text: str) -> str:
    """Format a text as a Markdown code block, indented by four spaces."""
    return "\n".join(f"    {line}" for line in text.splitlines() or [""])


class TrackersCallback(Callback):
    """Sends each line of metrics and each validation to the trackers."""

    def __init__(self, trackers: Trackers) -> None:
        self._trackers = trackers

    def on_log(self, trainer: Trainer, metrics: StepMetrics) -> None:
        """Send the metrics."""
        values = metrics.to_json()
        self._trackers.log(values, values.pop("step"))

    def on_validated(self, trainer: Trainer, metrics: dict[str, float]) -> None:
        """Send the metrics of the validation."""
        self._trackers.log(metrics, trainer.step)
