"""The sandbox: right programs pass, hostile ones neither pass nor leave anything behind."""

from __future__ import annotations

import os
import runpy
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import wegeft_cli
from wegeft_cli.sandbox.escape_tests import escape_program
from wegeft_cli.sandbox.isolation import Limits
from wegeft_cli.sandbox.run import Program, Sandbox, open_sandbox

PROGRAMS = runpy.run_path(str(Path(__file__).with_name("hostile.py")))
HOSTILE, LINGERING = PROGRAMS["HOSTILE"], PROGRAMS["LINGERING"]
NOBODY = 65534
CHECK = "from wegeft_cli.sandbox.run import *\nwith open_sandbox(timeout=1): print('up')"


def program(source: str, tests: str = PROGRAMS["TESTS"]) -> Program:
    return Program(source, "", tests, "work")


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    with open_sandbox(timeout=1.0) as opened:
        yield opened
    assert not opened.mount_point.exists()


@pytest.fixture
def outside(tmp_path: Path) -> Iterator[str]:
    """Definitions of HOST and PORT; the folder is looked at, the port listened on, afterwards."""
    (tmp_path / "kept").write_text("kept")
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0)
        yield f"HOST, PORT = {str(tmp_path)!r}, {server.getsockname()[1]}\n"
        with pytest.raises(BlockingIOError):
            server.accept()
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]
    assert (tmp_path / "kept").read_text() == "kept"


def left_over(sandbox: Sandbox) -> list[str]:
    """Processes of a sandbox; their command names the folder to mount over."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                command = (entry / "cmdline").read_bytes()
            except OSError:
                continue  # it has just ended
            if str(sandbox.mount_point).encode() in command:
                found.append(entry.name)
    return found


def test_there_are_as_many_hostile_programs_as_written() -> None:
    assert len(HOSTILE) == 41
    assert len(LINGERING) == 2


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_program_never_passes_and_leaves_nothing(
    name: str, sandbox: Sandbox, outside: str
) -> None:
    expected, source = HOSTILE[name]
    outcome = sandbox.run(program(outside + source))
    assert outcome.kind in expected, outcome
    assert outcome.detail
    assert left_over(sandbox) == []


@pytest.mark.parametrize("name", LINGERING)
def test_what_a_right_program_starts_ends_with_it(name: str, sandbox: Sandbox) -> None:
    outcome = sandbox.run(program(LINGERING[name]))
    assert outcome.kind == "passed", outcome
    assert left_over(sandbox) == []


def test_right_programs_pass_with_every_kind_of_value(sandbox: Sandbox) -> None:
    tests = """
from decimal import Decimal
from fractions import Fraction
VALUES = [
    None, True, 0, -7, 10 ** 6000, 1.5, float("inf"), 2 - 3j, "a\\u2028\\ud800", b"\\x00\\xff",
    bytearray(b"x"),
    [], [1, [2, (3,)]], (1, "b"), {1, 2}, frozenset({"a"}), {1: [2], (3, 4): {"x": None}, None: 5},
    {"tag": "int", "value": "ff"}, Fraction(1, 3), Decimal("1.10"),
]
def check(candidate):
    for value in VALUES:
        answer = candidate(value)
        assert answer == value and type(answer) is type(value), value
    answer = candidate(float("nan"))
    assert answer != answer
"""
    assert sandbox.run(program("def work(v): return v", tests)).kind == "passed"


def test_state_and_named_arguments_work_as_within_one_process(sandbox: Sandbox) -> None:
    source = "calls = []\ndef work(a, b=0):\n    calls.append(a)\n    return len(calls) + b"
    tests = "def check(candidate):\n    assert candidate(1) == 1\n    assert candidate(1, b=5) == 7"
    assert sandbox.run(program(source, tests)).kind == "passed"


def test_the_message_of_a_failed_test_is_told(sandbox: Sandbox) -> None:
    tests = "def check(candidate):\n    assert candidate(1) == 2, 'one and one'"
    outcome = sandbox.run(program("def work(n): return n", tests))
    assert outcome.detail == "AssertionError: one and one"
    assert sandbox.run(program("import nowhere")).detail.startswith("ModuleNotFoundError")


def test_programs_see_neither_the_environment_nor_other_packages(
    sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WEGEFT_SECRET", "hidden")
    source = (
        "import os, sys\n"
        "def work(n):\n"
        "    try: import torch\n"
        "    except ImportError: return [dict(os.environ), 'torch' in sys.modules]"
    )
    tests = "def check(candidate):\n    assert candidate(1) == [{}, False], candidate(1)"
    outcome = sandbox.run(program(source, tests))
    assert outcome.kind == "passed", outcome


def test_two_runs_walk_a_set_in_the_same_order(sandbox: Sandbox) -> None:
    source = "def work(n): return list({str(i) for i in range(50)})"
    tests = "def check(candidate): raise ValueError(''.join(candidate(1)))"
    assert sandbox.run(program(source, tests)) == sandbox.run(program(source, tests))


def test_limits_are_those_that_were_given(tmp_path: Path) -> None:
    source = "def work(n): return len(bytearray(n << 20))"
    tests = "def check(candidate):\n    assert candidate(200) == 200 << 20"
    small = Sandbox(tmp_path, timeout=5, limits=Limits(memory_bytes=150 << 20))
    large = Sandbox(tmp_path, timeout=5, limits=Limits(memory_bytes=400 << 20))
    assert small.run(program(source, tests)).kind == "memory"
    assert large.run(program(source, tests)).kind == "passed"


def test_an_isolation_layer_that_does_not_hold_is_named(tmp_path: Path) -> None:
    # Real root may always fork; here the limit is too high for what the attempt tries.
    sandbox = Sandbox(tmp_path, timeout=5, limits=None)
    tried = Program(**escape_program(Limits(processes=2)))
    assert sandbox.run(tried).detail.startswith("AssertionError: processes: it does not hold")


def run_elsewhere(command: list[str], copied: Path) -> subprocess.CompletedProcess[str]:
    """Run the check in another process; the package is copied to where anybody may read it."""
    folder = Path(wegeft_cli.__file__).parent
    for part in ("__init__.py", "errors.py", "version.py", "evaluation/__init__.py"):
        (copied / "wegeft_cli" / part).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(folder / part, copied / "wegeft_cli" / part)
    shutil.copytree(folder / "sandbox", copied / "wegeft_cli/sandbox")
    environment = {"PYTHONPATH": str(copied), "PATH": os.environ["PATH"], "TMPDIR": "/tmp"}
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, cwd="/", timeout=120
    )


@pytest.fixture
def readable(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become an ordinary user")
@pytest.mark.skipif(not Path("/usr/bin/python3").exists(), reason="nobody needs a Python to start")
def test_it_stands_for_an_ordinary_user(readable: Path) -> None:
    become = f"import os; os.setgroups([]); os.setresgid({NOBODY},{NOBODY},{NOBODY}); "
    become += f"os.setresuid({NOBODY},{NOBODY},{NOBODY}); os.execv('/usr/bin/python3', "
    become += f"['python3', '-c', {CHECK!r}])"
    told = run_elsewhere([sys.executable, "-c", become], readable)
    assert told.stdout == "up\n", told.stderr


@pytest.mark.skipif(shutil.which("unshare") is None, reason="needs util-linux's unshare")
def test_where_user_namespaces_are_forbidden_it_refuses_and_names_the_layer(readable: Path) -> None:
    forbid = "echo 0 > /proc/sys/user/max_user_namespaces"
    shell = f'{forbid} && exec "$0" -c "$1"'
    told = run_elsewhere(["unshare", "-rm", "sh", "-c", shell, sys.executable, CHECK], readable)
    assert "up" not in told.stdout
    assert "the isolation layer `user` of the sandbox is not available" in told.stderr
    assert "No space left on device" in told.stderr


def test_it_refuses_where_there_is_no_linux(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    with (
        pytest.raises(wegeft_cli.errors.UserError, match="this is darwin"),
        open_sandbox(timeout=1),
    ):
        pass


def test_the_worker_needs_no_site_packages():
    """The sandbox starts without them; a module that it imports must not need one."""
    root = str(Path(wegeft_cli.__file__).parents[1])
    source = f"import sys; sys.path.append({root!r}); import wegeft_cli.sandbox.worker"
    done = subprocess.run(
        [sys.executable, "-s", "-S", "-P", "-B", "-c", source],
        capture_output=True, text=True, check=False, env={},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
