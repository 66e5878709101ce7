"""The command line as a user types it: a folder to work in, a finished run, what lies there."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import preloaded
import pytest
from typer.testing import CliRunner, Result

from wegeft_cli.cli.app import app
from wegeft_cli.cli.console import get_console
from wegeft_cli.runs.train import train

TIMEOUT_SECONDS = 120
# One thread: these models are too small to share, and the tests' machine may be busy.
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
# How the tests' own terminal looks is no matter of what they ask.
TERMINAL = ("NO_COLOR", "FORCE_COLOR", "CLICOLOR", "CLICOLOR_FORCE", "COLUMNS", "LINES", "TERM")


@pytest.fixture(autouse=True)
def _fresh_console() -> None:
    """Let each test's console read the terminal anew: the one of another test may be narrower."""
    get_console.cache_clear()


@pytest.fixture
def wegeft() -> Callable[..., Result]:
    """Run the command line in this process."""
    return lambda *words: CliRunner().invoke(app, [str(word) for word in words])


@pytest.fixture
def start_wegeft() -> Callable[..., subprocess.Popen[str]]:
    """Start the command line as a process of its own, with its streams as pipes.

    `fresh` starts Python anew, where the start itself is tested.
    """

    def start(
        *words: object,
        env: Mapping[str, str] | None = None,
        stdout: int = subprocess.PIPE,
        stderr: int = subprocess.PIPE,
        fresh: bool = False,
    ) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "wegeft_cli", *(str(word) for word in words)]
        inherited = {name: value for name, value in os.environ.items() if name not in TERMINAL}
        environment = {**inherited, **ENVIRONMENT, **(env or {})}
        start_process = subprocess.Popen if fresh else preloaded.Popen
        return start_process(
            command, stdout=stdout, stderr=stderr, text=True, env=environment, encoding="utf-8"
        )

    return start


@pytest.fixture
def run_wegeft(start_wegeft) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run the command line as a process of its own, to its end."""

    def run(*words: object, **options: object) -> subprocess.CompletedProcess[str]:
        process = start_wegeft(*words, **options)
        stdout, stderr = process.communicate(timeout=TIMEOUT_SECONDS)
        return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)

    return run


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory, write_recipe_in) -> Path:
    """The folder of a finished run. Only to be copied."""
    folder = tmp_path_factory.mktemp("finished")
    train(write_recipe_in(folder, train={"max_steps": 2}))
    return folder / "runs" / "tiny"


@dataclass(frozen=True)
class Place:
    """A folder that someone works in.

    Args:
        path: The working folder.
        recipe: A sound recipe in it.
        run: Where its run's folder goes.
    """

    path: Path
    recipe: Path
    run: Path

    def read_files(self) -> dict[str, str]:
        """Give every file with the hash of its bytes, and every folder; locks left out."""
        return {
            str(path.relative_to(self.path)): (
                hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
            )
            for path in sorted(self.path.rglob("*"))
            if path.name != ".wegeft.lock"
        }


@pytest.fixture
def place(tmp_path: Path, write_recipe, monkeypatch: pytest.MonkeyPatch) -> Place:
    """A fresh folder with a recipe and its rows, made the working folder."""
    monkeypatch.chdir(tmp_path)
    return Place(tmp_path, write_recipe(), tmp_path / "runs" / "tiny")


@pytest.fixture
def place_with_run(place: Place, finished_run: Path) -> Place:
    """The same, after a finished run."""
    shutil.copytree(finished_run, place.run)
    own = place.run / "recipe.yaml"
    own.write_text(own.read_text().replace(str(finished_run.parents[1]), str(place.path)))
    return place
