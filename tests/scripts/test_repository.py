"""The repository keeps its own rules: make targets, pins, decisions and links between pages."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable
from importlib.metadata import packages_distributions, requires
from pathlib import Path
from types import ModuleType

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

TARGETS = {
    *("setup", "format", "gpu", "lint", "types", "imports", "test", "test-slow", "recipes"),
    *("families", "test-peft-suite", "test-vllm", "main-road-lowest", "test-lowest", "test-triton"),
    *(
        "check",
        "bench",
        "bench-eval",
        "bench-merge",
        "bench-scaling",
        "bench-training",
        "test-peft",
        "fuzz",
        "docs",
        "site",
        "release-check",
        "quickstart",
        "digits",
        "bench-classification",
        "clean",
        "help",
    ),
}


def run_make(repository: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    # MAKEFLAGS of an outer make would reach into this one.
    environment = {key: value for key, value in os.environ.items() if "MAKE" not in key}
    command = ["make", "--no-print-directory", *arguments]
    return subprocess.run(
        command, cwd=repository, capture_output=True, text=True, env=environment, check=False
    )


def test_help_names_every_target(repository: Path) -> None:
    done = run_make(repository, "help")
    assert done.returncode == 0, done.stderr
    assert set(re.findall(r"^  make ([a-z-]+) ", done.stdout, re.MULTILINE)) == TARGETS


def test_a_python_that_is_too_old_is_told_before_anything_is_installed(
    repository: Path, tmp_path: Path
) -> None:
    venv = tmp_path / "venv"
    done = run_make(repository, "test", f"VENV={venv}", "PYTHON=/bin/false")
    assert done.returncode != 0
    assert "Python 3.11 or newer is needed and '/bin/false' is not one" in done.stderr
    assert "make test PYTHON=" in done.stderr
    assert not venv.exists()


def test_the_commands_in_the_contributors_page_exist(repository: Path) -> None:
    text = (repository / "CONTRIBUTING.md").read_text()
    named = set(re.findall(r"`make ([a-z-]+)`", text))
    assert len(named) >= 8
    assert named <= TARGETS


def test_ci_runs_every_check(repository: Path) -> None:
    script = repository / ".ci" / "run"
    assert os.access(script, os.X_OK)
    run = " ".join(re.findall(r"^make ([a-z -]+)", script.read_text(), re.MULTILINE)).split()
    assert {"lint", "types", "imports", "test", "recipes", "docs", "site", "test-slow"} <= set(run)


def test_every_dependency_has_a_pin_inside_its_range(repository: Path) -> None:
    project = tomllib.loads((repository / "pyproject.toml").read_text())["project"]
    lists = [project["dependencies"], *project["optional-dependencies"].values()]
    texts = [text for group in lists for text in group]
    requirements = [Requirement(text) for text in texts if not text.startswith(project["name"])]
    lines = (repository / "constraints.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    pins = {canonicalize_name(name): version for name, version in pins.items()}
    assert len(requirements) >= 15
    for requirement in requirements:
        version = pins[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(version), requirement


def test_every_imported_package_is_declared(repository: Path) -> None:
    project = tomllib.loads((repository / "pyproject.toml").read_text())["project"]
    lists = [project["dependencies"], *project["optional-dependencies"].values()]
    declared = {canonicalize_name(Requirement(text).name) for group in lists for text in group}
    modules: set[str] = set()
    paths = list((repository / "wegeft_cli").rglob("*.py"))
    for path in paths:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                modules |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                modules.add(node.module.partition(".")[0])
    # Triton is part of torch's builds for GPUs, which alone import it.
    modules -= {"wegeft_cli", "triton", *sys.stdlib_module_names}
    distributions = packages_distributions()
    # The base install stays the short list that users know; this one comes with it.
    brought = {"pyarrow": "datasets"}
    assert len(paths) >= 40
    assert {"torch", "yaml", "typer"} <= modules
    for module in modules:
        names = {canonicalize_name(name) for name in distributions.get(module, [module])}
        if module in brought:
            bringer = brought[module]
            brings = {canonicalize_name(Requirement(r).name) for r in requires(bringer) or ()}
            assert bringer in declared
            assert names & brings, f"{bringer} no longer brings {module}"
            continue
        assert names & declared, f"{module} is imported but not declared in pyproject.toml"


def test_every_base_dependency_is_imported(repository: Path) -> None:
    project = tomllib.loads((repository / "pyproject.toml").read_text())["project"]
    words = "\n".join(
        path.read_text(encoding="utf-8") for path in (repository / "wegeft_cli").rglob("*.py")
    )
    modules = {
        canonicalize_name(name): module
        for module, names in packages_distributions().items()
        for name in names
        if re.search(rf"^ *(?:import|from) {module}\b", words, re.MULTILINE)
    }
    declared = {canonicalize_name(Requirement(text).name) for text in project["dependencies"]}
    assert declared - modules.keys() == set()


def test_decisions_are_numbered_and_say_context_choice_and_consequence(repository: Path) -> None:
    pages = sorted((repository / "docs" / "decisions").glob("*.md"))
    assert len(pages) >= 7
    # Pieces of work take numbers of their own beforehand, so some may stay free.
    numbers = [int(page.name[:4]) for page in pages]
    assert numbers[0] == 1
    assert len(set(numbers)) == len(numbers)
    for number, page in zip(numbers, pages, strict=True):
        assert page.name.startswith(f"{number:04d}-")
        assert re.search(rf"^# {number}\. ", page.read_text(), re.MULTILINE), page.name
        headings = re.findall(r"^## (.+)$", page.read_text(), re.MULTILINE)
        assert headings == ["Context", "Choice", "Consequence"], page.name


def test_every_link_leads_somewhere(
    repository: Path, load_script: Callable[[str], ModuleType]
) -> None:
    script = load_script("check_docs")
    pages = script.find_pages(repository)
    assert len(pages) >= 10
    assert [fault for page in pages for fault in script.check_page(page)] == []


def test_a_dead_link_is_found(tmp_path: Path, load_script: Callable[[str], ModuleType]) -> None:
    script = load_script("check_docs")
    page = tmp_path / "page.md"
    page.write_text(
        "# A heading, here\n[one](page.md#a-heading-here) [two](gone.md) [three](#no-heading)\n"
        "[four](https://example.org)\n```\n[five](gone-too.md)\n```\n"
    )
    faults = script.check_page(page)
    assert len(faults) == 2
    assert "gone.md" in faults[0]
    assert "#no-heading" in faults[1]


def test_a_placeholder_is_found(tmp_path: Path, load_script: Callable[[str], ModuleType]) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "# Page\n\nTABLE_HERE\n\n| a | SCORE_HERE |\n\nWEGEFT_DEBUG=1 is no such word.\n"
    )
    faults = load_script("check_docs").check_page(page)
    assert [fault.split(": ")[1] for fault in faults] == ["TABLE_HERE", "SCORE_HERE"]


def test_code_spans_of_the_pages_hold_characters_and_no_entities():
    root = Path(__file__).parents[2]
    for page in sorted(root.glob("docs/**/*.md")):
        spans = re.findall(r"`([^`\n]*)`", page.read_text(encoding="utf-8"))
        assert not [span for span in spans if re.search(r"&(lt|gt|amp|quot);", span)], page
