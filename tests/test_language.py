"""Documentation and messages use standard technical English: no banned idiom, American spelling."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "wegeft_cli"

# Pattern -> what to write instead.
BANNED = {
    r"tells?|told|telling": "report, raise, log, return, print, warn",
    r"(hang|hangs|hanging|hung) on": "depend on",
    r"(go|goes|going|went) on": "resume, continue",
    r"stands?(?! for)|stood": "is, is in, is stored in",
    r"lies?|lain": "is, is in, is stored in",
    r"of (one's|ones) own": "your own",
    r"so many": "the number",
    r"whom?ever|somebody|nobody|anybody|everybody": "the user, no user, all users",
    r"whatever": "any, for every",
    r"of the draws?|drawn answers?": "sampling, sampled",
    r"left out": "default, omitted, excluded",
    r"in silence|without a word": "silently",
    r"mend(s|ed|ing)?": "fix",
    r"twins?": "LoRA equivalent, baseline",
    r"both roads|other roads?|one road|twin roads?": "path",
    r"heeded|obey(s|ed)?": "respected, followed",
}

BRITISH = {
    r"colours?|coloured": "color",
    r"behaviours?": "behavior",
    r"neighbours?": "neighbor",
    r"centred?": "center",
    r"licen[c]es?": "license",
    r"labell(ed|ing)": "labeled",
    r"modell(ed|ing)": "modeled",
    r"(de)?quantis\w+": "quantize",
    r"(un)?normalis\w+": "normalize",
    r"initialis\w+": "initialize",
    r"synchronis\w+": "synchronize",
    r"tokenis\w+": "tokenize",
    r"recognis\w+": "recognize",
    r"randomis\w+": "randomize",
    r"optimis\w+": "optimize",
    r"penalis\w+": "penalize",
    r"serialis\w+": "serialize",
    r"greyscale|grey": "gray",
}

RULES = {
    re.compile(rf"\b(?:{pattern})\b", re.IGNORECASE): advice
    for pattern, advice in {**BANNED, **BRITISH}.items()
}

# Glob -> the least number of files that it finds.
PAGES = {
    "README.md": 1,
    "CONTRIBUTING.md": 1,
    "CHANGELOG.md": 1,
    "docs/*.md": 24,
    "docs/decisions/*.md": 30,
    "docs/cluster/*": 2,
    "containers/*": 2,
    "recipes/*.yaml": 17,
}

# Pages that contain a banned word for a reason.
EXEMPT_PAGES: tuple[str, ...] = ()

# Files of the package, relative to it, that contain a banned word for the reason given.
EXEMPT_MODULES = (
    "merging/quantized.py",  # the probe text that recorded differences refer to
    "sandbox/escape_tests.py",  # a program that calls `f.tell()`
)

MODULE_PATH = re.compile(r"\b\w+(?:/\w+)+\.py\b")

# Paths of other projects that the pages name.
FOREIGN_PATHS = {"tests/testing_common.py", "reproduce/run_exp.py"}


def find_faults(text: str) -> list[str]:
    """Return each banned phrase in a text with the advice for it."""
    return [
        f"{match.group()!r}: write {advice}"
        for rule, advice in RULES.items()
        for match in rule.finditer(text)
    ]


def read_prose(path: Path) -> str:
    """Return the prose of a page without inline code and link targets, or a file's comments."""
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".md":
        return "\n".join(line.partition("#")[2] for line in text.splitlines())
    text = re.sub(r"\]\([^)]*\)", "]", text)
    return re.sub(r"(?<!`)`[^`\n]+`(?!`)", "``", text)


def read_code_texts(path: Path) -> Iterator[tuple[int, str]]:
    """Yield line and text of every comment and of every string that contains a space."""
    source = path.read_text(encoding="utf-8")
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and " " in node.value:
            yield node.lineno, re.sub(r"`[^`\n]+`", "``", node.value)
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], re.sub(r"`[^`\n]+`", "``", token.string)


def find_pages() -> list[Path]:
    """Return the pages and recipes under the rules."""
    paths = [path for glob in PAGES for path in sorted(ROOT.glob(glob))]
    return [p for p in paths if p.relative_to(ROOT).as_posix() not in EXEMPT_PAGES]


def find_modules() -> list[Path]:
    """Return the modules of the package that are outside of `EXEMPT_MODULES`."""
    waiting = [PACKAGE / name for name in EXEMPT_MODULES]
    return [
        path
        for path in sorted(PACKAGE.rglob("*.py"))
        if not any(path == entry or entry in path.parents for entry in waiting)
    ]


@pytest.mark.parametrize(("glob", "least"), PAGES.items())
def test_every_place_is_found(glob: str, least: int) -> None:
    assert len(list(ROOT.glob(glob))) >= least


@pytest.mark.parametrize("path", find_pages(), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_pages_contain_no_banned_idiom(path: Path) -> None:
    assert find_faults(read_prose(path)) == []


@pytest.mark.parametrize("path", find_modules(), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_modules_contain_no_banned_idiom(path: Path) -> None:
    faults = [
        f"{path.relative_to(ROOT)}:{line}: {fault}"
        for line, text in read_code_texts(path)
        for fault in find_faults(text)
    ]
    assert faults == []


def test_every_module_is_either_checked_or_listed() -> None:
    modules = list(PACKAGE.rglob("*.py"))
    assert len(modules) >= 200
    first_parts = {path.relative_to(PACKAGE).parts[0] for path in modules}
    checked = {path.relative_to(PACKAGE).parts[0] for path in find_modules()}
    assert first_parts <= checked | set(EXEMPT_MODULES)


def test_modules_that_pages_name_exist() -> None:
    pages = [path for path in find_pages() if path.suffix == ".md"]
    named = {(page, name) for page in pages for name in MODULE_PATH.findall(page.read_text())}
    missing = [
        f"{page.relative_to(ROOT)}: {name}"
        for page, name in sorted(named)
        if name not in FOREIGN_PATHS
        and not (ROOT / name).is_file()
        and not (PACKAGE / name).is_file()
    ]
    assert len(named) >= 60
    assert missing == []


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("The base is told.", 1),
        ("It hangs on the seed; the run goes on.", 2),
        ("A recipe file stands for its run. A row stands in the file.", 1),
        ("The tokeniser's colour", 2),
        ("The layout of its own group belongs to its lifetime.", 0),
    ],
)
def test_idioms_are_found(text: str, count: int) -> None:
    assert len(find_faults(text)) == count
