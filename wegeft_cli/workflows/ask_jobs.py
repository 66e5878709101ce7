"""One model is asked all jobs of an evaluation; its answers are kept as they come."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from wegeft_cli.evaluation.decoding import Decoding
from wegeft_cli.evaluation.scoring import TaskScore
from wegeft_cli.workflows.answer_log import AnswerLog
from wegeft_cli.workflows.jobs import Asked, EvalJob
from wegeft_cli.workflows.out_of_memory import telling_memory
from wegeft_cli.workflows.reporter import Reporter
from wegeft_cli.workflows.run_folder import describe_environment
from wegeft_cli.workflows.share import Share

_LOGGED_VERSIONS = ("wegeft-cli", "torch", "transformers")


@dataclass(frozen=True)
class Asking:
    """Everything that base and target are asked alike with."""

    jobs: Sequence[EvalJob]
    batch_size: int
    logs: Path
    share: Share
    reporter: Reporter
    _warned: set[str] = field(default_factory=set)

    def score(
        self,
        model: Any,
        tokenizer: Any,
        write: Callable[..., Any] | None,
        title: str,
        prints: Mapping[str, str | None],
    ) -> list[TaskScore]:
        """Score one model in every job."""
        from wegeft_cli.evaluation.ends import find_end_ids

        versions = describe_environment()["versions"]
        depends = {
            **prints,
            "versions": {name: versions.get(name) for name in _LOGGED_VERSIONS},
            "dtype": str(getattr(model, "dtype", None)),
            "engine": None if write is None else write.__module__,
            # Where answers end, and how conversations are written: files beside the weights say it.
            "ends": find_end_ids(model, tokenizer, Decoding(1)),
            "chat_template": getattr(tokenizer, "chat_template", None),
        }
        return [
            self._score(job, model, tokenizer, write, title, {**depends, **job.key()})
            for job in self.jobs
        ]

    def _score(
        self,
        job: EvalJob,
        model: Any,
        tokenizer: Any,
        write: Callable[..., Any] | None,
        title: str,
        key: Mapping[str, Any],
    ) -> TaskScore:
        log = AnswerLog(self.logs, key, self.share.index)
        num_known = self.share.agree(len(log.read()))
        if num_known:
            self.reporter.note(
                f"{job.name}: going on after {num_known} of {job.num_rows} answers ({log.folder})"
            )
        with self.reporter.progress(f"{title}: {job.name}", job.num_rows) as advance:
            asked = Asked(
                self.batch_size,
                on_progress=lambda done, total: advance(done),
                warn=self._warn,
                log=log,
                share=self.share,
                write=write,
                title=title,
            )
            try:
                with telling_memory():
                    return job.run(model, tokenizer, asked)
            except KeyboardInterrupt:
                self.reporter.note(
                    f"{job.name}: the answers so far are kept ({log.folder}): the same command "
                    "goes on with them"
                )
                raise

    def _warn(self, text: str) -> None:
        """Tell the user once what holds for both models, or for several tasks."""
        if text not in self._warned:
            self._warned.add(text)
            self.reporter.warn(text)
