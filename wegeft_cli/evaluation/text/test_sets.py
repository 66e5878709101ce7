"""The published test sets: kind of answer, source and number of rows.

A new entry of `_ALL` adds a set. A set in a new form also needs a builder in
`source_formats.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from wegeft_cli.data.sources.hub import HubSource
from wegeft_cli.evaluation.text import source_formats

Kind = Literal["choice", "number", "letter"]
"""Kind of answer: one of a set's words, a number, or a letter A to E."""


@dataclass(frozen=True)
class HeldOutSplit:
    """The last rows of a training file, held out for the choice of hyperparameters."""

    description: str
    take: Callable[[int], int]
    """Number of rows of the file -> number of rows held out, from the end."""
    file: str = "train"
    """Name of the file without its suffix."""


LAST_TENTH = HeldOutSplit(
    "the last floor(n / 10) rows of train: WeGeFT's tuning split", lambda n: n // 10
)
LAST_300 = HeldOutSplit(
    "the last 300 rows of train: GIFT's and pyreft's tuning split", lambda n: 300
)


@dataclass(frozen=True)
class TestSet:
    """One test set."""

    name: str
    """The benchmark's name."""
    folder: str
    """The folder in the LLM-Adapters layout; also accepted as a name."""
    kind: Kind
    words: tuple[str, ...] = ()
    """The answer words of a choice."""
    hub: HubSource | None = None
    """Default: only a folder."""
    build: Callable[[Mapping[str, Any]], tuple[str, str]] | None = None
    """Converts a row in the published form. Default: only LLM-Adapters' form."""
    own_protocol: str | None = None
    """The only protocol that scores this set. Default: every protocol with a rule for it."""
    default_protocol: str = "wegeft"
    """The default protocol."""
    part: HeldOutSplit | None = None
    """A held-out part of the training file instead of the test file."""
    num_published: int | None = None
    """Rows of the published set."""
    published_sha256: Mapping[str, str] = field(default_factory=dict)
    """File name -> SHA-256 (or its first digits) of the published file."""
    leak: str | None = None
    """Known overlap of this set with the training data of published results."""

    @property
    def file(self) -> str:
        """The path of the rows under --data-dir."""
        return f"{self.folder}/{'test' if self.part is None else self.part.file}.json"


def _numbered(word: str, count: int) -> tuple[str, ...]:
    return tuple(f"{word}{number}" for number in range(1, count + 1))


def _choice(
    name: str, folder: str, words: tuple[str, ...], hub: HubSource, build: Any, n: int, **more: Any
) -> TestSet:
    return TestSet(name, folder, "choice", words, hub, build, num_published=n, **more)


_TRUTH = ("true", "false")
_GSM8K_SHA256 = {
    "train.jsonl": "17f347dc51477c50d4efb83959dbb7c56297aba886e5544ee2aaed3024813465",
    "test.jsonl": "3730d312f6e3",
}
_WITHDRAWN = "LLM-Adapters itself withdraws this set for models tuned on math_10k"

_ALL = (
    # Validation splits if the test labels are hidden: LLM-Adapters' test.json are these.
    _choice(
        "boolq",
        "boolq",
        _TRUTH,
        HubSource("google/boolq", "validation"),
        source_formats.build_boolq,
        3270,
    ),
    _choice(
        "piqa",
        "piqa",
        _numbered("solution", 2),
        HubSource("baber/piqa", "validation"),
        source_formats.build_piqa,
        1838,
    ),
    _choice(
        "siqa",
        "social_i_qa",
        _numbered("answer", 3),
        HubSource("lighteval/siqa", "validation"),
        source_formats.build_siqa,
        1954,
    ),
    _choice(
        "hellaswag",
        "hellaswag",
        _numbered("ending", 4),
        HubSource("Rowan/hellaswag", "validation"),
        source_formats.build_hellaswag,
        10042,
    ),
    _choice(
        "winogrande",
        "winogrande",
        _numbered("option", 2),
        HubSource("allenai/winogrande", "validation", "winogrande_xl"),
        source_formats.build_winogrande,
        1267,
        published_sha256={
            "test.json": "6946f5209e7114c65c6d04f8f644c5a061af20d730b1cfe158fff3dc44076fb9"
        },
    ),
    _choice(
        "arc_easy",
        "ARC-Easy",
        _numbered("answer", 5),
        HubSource("allenai/ai2_arc", "test", "ARC-Easy"),
        source_formats.build_arc,
        2376,
        published_sha256={
            "test.json": "3f32a84716ca6d57d38728bf80cc8117aecd17445c2cf29a68b571b810eb82dc"
        },
    ),
    _choice(
        "arc_challenge",
        "ARC-Challenge",
        _numbered("answer", 5),
        HubSource("allenai/ai2_arc", "test", "ARC-Challenge"),
        source_formats.build_arc,
        1172,
    ),
    _choice(
        "openbookqa",
        "openbookqa",
        _numbered("answer", 4),
        HubSource("allenai/openbookqa", "test", "main"),
        source_formats.build_arc,
        500,
    ),
    TestSet(
        "gsm8k",
        "gsm8k",
        "number",
        hub=HubSource("openai/gsm8k", "test", "main"),
        build=source_formats.build_gsm8k,
        num_published=1319,
        published_sha256=_GSM8K_SHA256,
    ),
    TestSet(
        "svamp",
        "SVAMP",
        "number",
        hub=HubSource("ChilleD/SVAMP", "test"),
        build=source_formats.build_svamp,
        num_published=1000,
    ),
    TestSet(
        "aqua",
        "AQuA",
        "letter",
        hub=HubSource("deepmind/aqua_rat", "test", "raw"),
        build=source_formats.build_aqua,
        num_published=254,
    ),
    # The hub's MAWPS has other rows than LLM-Adapters'.
    TestSet(
        "mawps",
        "mawps",
        "number",
        num_published=238,
        published_sha256={
            "test.json": "c1a708979cbf2b3df9ac4020baacf3e8e73fcf089e1de7dd1b305b810bfaa15f"
        },
    ),
    TestSet(
        "multiarith",
        "MultiArith",
        "number",
        num_published=600,
        published_sha256={
            "test.json": "a40f426807c8a563802c2a5b66bda3bcd1eba9c099038fd1199f0dd57de5fd28"
        },
        leak=f"5 of its 600 questions are in MAWPS' training set; {_WITHDRAWN}",
    ),
    TestSet(
        "addsub",
        "AddSub",
        "number",
        num_published=395,
        leak=f"327 of its 395 questions are in MAWPS' training set; {_WITHDRAWN}",
    ),
    TestSet(
        "singleeq",
        "SingleEq",
        "number",
        num_published=508,
        leak=f"3 of its 508 questions are in MAWPS' training set; {_WITHDRAWN}",
    ),
    # Sets on which the authors choose hyperparameters; their scores are no test scores.
    TestSet(
        "gsm8k_tune",
        "gsm8k",
        "number",
        hub=HubSource("openai/gsm8k", "train", "main"),
        build=source_formats.build_gsm8k,
        default_protocol="wegeft_tune",
        part=LAST_TENTH,
        num_published=747,
        published_sha256=_GSM8K_SHA256,
    ),
    TestSet(
        "gsm8k_tune_gift",
        "gsm8k",
        "number",
        hub=HubSource("openai/gsm8k", "train", "main"),
        build=source_formats.build_gsm8k,
        default_protocol="gift_tune",
        part=LAST_300,
        num_published=300,
        published_sha256=_GSM8K_SHA256,
    ),
    _choice(
        "boolq_tune",
        "boolq",
        _TRUTH,
        HubSource("google/boolq", "train"),
        source_formats.build_boolq,
        942,
        part=LAST_TENTH,
        published_sha256={
            "train.json": "5ccbaceebaddc69765e1c4a363632196b81851d303696672165ab59ec4e48c83"
        },
    ),
    TestSet("quickstart", "quickstart", "number", own_protocol="quickstart"),
)

TEST_SETS: Mapping[str, TestSet] = {test_set.name: test_set for test_set in _ALL}
