"""`Score`: the result of a benchmark, with its interval, counts and one record per row."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Score:
    """The score of a benchmark and everything that it depends on."""

    task: str
    """The benchmark's name."""
    protocol: str
    score: float | None
    """0 to 1, the share of correct rows where rows are right or wrong; None without a judge."""
    num_correct: int | None
    """None if answers are neither right nor wrong."""
    n: int
    """All rows; one without a readable answer is wrong."""
    n_invalid: int
    """Rows without a readable answer."""
    ci95: tuple[float, float] | None
    """95 % interval of the score, Wilson's for a share of rows; None without a score."""
    data_sha256: str
    origin: str
    samples: list[dict[str, Any]]
    """A record per row: index, prompt, output, prediction, answer, correct, valid."""
    template_hash: str | None = None
    """None if the model reads no prompt."""
    generation: dict[str, Any] | None = None
    """The resolved generation settings; None if the outputs come from a file."""
    template: str | None = None
    """The template's name, as in `data.template`."""
    metric: str | None = None
    """The metric that is the score, if the benchmark has several."""
    metrics: dict[str, Any] = field(default_factory=dict)
    """Further figures of the result, between interval and data."""
    extra: dict[str, Any] = field(default_factory=dict)
    """Further figures of the result, at its end."""
    notes: tuple[str, ...] = ()
    """What the user should know of a score of a file; no part of the result."""
    files: dict[str, str] = field(default_factory=dict)
    """Files in third-party formats beside the samples file: {end of the name: content}."""

    def to_dict(self) -> dict[str, Any]:
        """Return an entry of `results`: the score as a JSON object, without its samples."""
        has_prompt = self.template_hash is not None
        return {
            "task": self.task,
            "protocol": self.protocol,
            **({} if self.metric is None else {"metric": self.metric}),
            "score": self.score,
            "num_correct": self.num_correct,
            "n": self.n,
            "n_invalid": self.n_invalid,
            "ci95": None if self.ci95 is None else list(self.ci95),
            **self.metrics,
            **(
                {"template": self.template, "template_hash": self.template_hash}
                if has_prompt
                else {}
            ),
            "data_sha256": self.data_sha256,
            "origin": self.origin,
            **({"generation": self.generation} if has_prompt else {}),
            **self.extra,
        }
