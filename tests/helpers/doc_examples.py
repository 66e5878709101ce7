"""The examples in README.md, CONTRIBUTING.md and docs/: fenced blocks, and `wegeft` commands."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FENCE = re.compile(
    r"(?:^<!-- not run: (?P<reason>[^\n]+) -->\n\n?)?^```(?P<language>[\w+-]*)\n(?P<text>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)
SPAN = re.compile(r"(?<!`)`([^`]+)`(?!`)")
# What separates a command from the next one, or from its explanation.
BORDER = re.compile(r"\s{2,}|\s&&\s|\s\|\|\s|\s\|\s|;\s|\s#\s|\s>\s")


@dataclass(frozen=True)
class Block:
    """A fenced block with its page, line, language, and the reason why it cannot run, if any."""

    page: Path
    line: int
    language: str
    text: str
    reason: str | None

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


@dataclass(frozen=True)
class Command:
    """A `wegeft` command of a page; a span in a sentence may omit required arguments."""

    page: Path
    line: int
    text: str
    is_span: bool

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}: {self.text}"

    @property
    def words(self) -> list[str]:
        """The words after `wegeft`."""
        return shlex.split(self.text)[1:]


def find_pages() -> list[Path]:
    """Return the pages that hold examples; decisions and the changelog describe the past."""
    return [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def find_blocks(language: str) -> list[Block]:
    """Return all fenced blocks of a language."""
    return [
        Block(
            page,
            text.count("\n", 0, found.start("language")) + 1,
            language,
            found["text"],
            found["reason"],
        )
        for page in find_pages()
        for text in [page.read_text(encoding="utf-8")]
        for found in FENCE.finditer(text)
        if found["language"] == language
    ]


def split_commands(line: str) -> Iterator[str]:
    """Yield the commands in one line of a block, without explanations."""
    for part in BORDER.split(line.strip()):
        part = re.sub(r"^(\$|srun) ", "", part)
        if re.match(r"wegeft( |$)", part):
            yield part


def find_commands() -> list[Command]:
    """Return all `wegeft` commands: in fenced and indented blocks, and in spans of sentences."""
    commands = []
    for page in find_pages():
        text = page.read_text(encoding="utf-8")
        # A continued command becomes one line; the lines keep their numbers.
        text = re.sub(r" *\\\n *", lambda found: " \x00", text)
        number, in_fence = 0, False
        for line in text.split("\n"):
            number += 1
            if line.startswith("```"):
                in_fence = not in_fence
            elif in_fence or line.startswith("    "):
                joined = line.replace("\x00", "")
                commands += [Command(page, number, c, False) for c in split_commands(joined)]
            number += line.count("\x00")
        prose = FENCE.sub(lambda found: "\n" * found[0].count("\n"), text)
        for found in SPAN.finditer(prose):
            words = " ".join(found[1].split())
            if re.match(r"wegeft( |$)", words):
                number = prose.count("\n", 0, found.start()) + 1
                commands.append(Command(page, number, words, True))
    return commands
