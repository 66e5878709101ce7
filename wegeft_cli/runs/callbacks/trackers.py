"""Experiment trackers: figures and answers go there too, and no fault of theirs ends a run."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any, TypeAlias

from wegeft_cli.redaction import mask_secrets

_MAX_TOLD = 160
"""Characters of a tracker's own words that a warning repeats."""

Sample: TypeAlias = tuple[str, str]
"""A prompt, and what the model wrote."""


class Trackers:
    """The trackers of one run, in the process that writes.

    A tracker that fails is told once and then left out: the run goes on without it. `ids` are the
    trackers' own ids of the run; `status` is finished, interrupted or failed. Secrets are taken out
    of both names.

    Args:
        names: Which ones; none is no tracker.
        project: Project or experiment.
        run_name: The run's name there.
        run_dir: The run's folder: tensorboard writes to `logs` in it, wandb its files, and mlflow
            to `mlruns` where no other store is set.
        earlier: Tracker -> its own id of the run that goes on; empty for a new run.
        step: Optimizer steps done before.
        warn: Told of a tracker that fails.
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
        self._tell_each(lambda tracker: tracker.log_config(values))

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Send the figures of a step."""
        self._tell_each(lambda tracker: tracker.inner.log(dict(values), step=step))

    def log_samples(self, samples: Sequence[Sample], step: int) -> None:
        """Send what the model answered at a step."""
        self._tell_each(lambda tracker: tracker.log_samples(samples, step))

    def finish(self) -> None:
        """Close the trackers; `status` tells them how the run ended."""
        self._tell_each(lambda tracker: tracker.finish(self.status))
        self._open.clear()

    def _tell_each(self, action: Callable[[_Tracker], None]) -> None:
        for name, tracker in list(self._open.items()):
            with self._guarded(name):
                action(tracker)

    @contextmanager
    def _guarded(self, name: str) -> Iterator[None]:
        """Call a tracker with its words off standard output; drop it at its first fault."""
        try:
            with warnings.catch_warnings(), redirect_stdout(sys.stderr):
                warnings.simplefilter("ignore")
                yield
        except Exception as error:  # whatever a network, a server or a package comes up with
            self._open.pop(name, None)
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            reason = f"{type(error).__name__}: {lines[0] if lines else 'no reason given'}"
            self._warn(
                f"the tracker {name} failed and gets nothing more of this run; "
                f"metrics.jsonl holds every figure ({reason[:_MAX_TOLD]})"
            )


class _Tracker:
    """One of Accelerate's trackers, started; what follows is where they differ.

    Args:
        inner: Accelerate's.
        run_id: What finds the run again.
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
        # As hyperparameters they would make a second run beside this one.
        rows = "".join(f"| {key} | {value} |\n" for key, value in values.items())
        self.inner.log({"recipe": f"| key | value |\n|---|---|\n{rows}"}, step=0)


class _Wandb(_Tracker):
    def __init__(
        self, project: str, run_name: str, run_dir: Path, run_id: str | None, step: int
    ) -> None:
        import wandb
        from accelerate.tracking import WandBTracker

        # By itself it would send the command line, overrides with their secrets included, the
        # repository's address, and what the terminal shows.
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
        # MLflow's small package writes to folders and servers alone; to folders only if told so.
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
    """Show a text as it stands: four blanks before each line are Markdown's code."""
    return "\n".join(f"    {line}" for line in text.splitlines() or [""])
