"""The package keeps to its budgets of structure, and the measures find what they look for."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]

# The budgets. `MOST_CODE_LINES` and `MOST_PARAMETERS` of a function are the script's own.
MOST_MODULES_PER_FOLDER = 15
LONGEST_CHAIN = 12
MOST_CYCLES = 0
MOST_LONG_FUNCTIONS = 0
MOST_WIDE_FUNCTIONS = 0
MOST_TASK_SWITCHES = 0
MOST_METHOD_SWITCHES = 0


def load_script() -> ModuleType:
    name = "script_measure_structure"
    path = REPOSITORY / "scripts" / "measure_structure.py"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


SCRIPT = load_script()


@pytest.fixture(scope="module")
def package() -> Any:
    return SCRIPT.Package.read(REPOSITORY)


def check_budget(name: str, measured: int, budget: int, offenders: Sequence[object]) -> None:
    lines = "\n".join(f"  {offender}" for offender in offenders)
    assert measured <= budget, f"{name}: {measured}, at most {budget} allowed:\n{lines}"


def test_no_folder_holds_many_modules(package: Any) -> None:
    folders = package.modules_per_folder()
    offenders = [
        f"{folder}: {number} modules"
        for folder, number in folders.items()
        if number > MOST_MODULES_PER_FOLDER
    ]
    check_budget("modules per folder", max(folders.values()), MOST_MODULES_PER_FOLDER, offenders)


def test_no_chain_of_imports_is_long(package: Any) -> None:
    links = package.describe_chain()
    check_budget("chain", len(links), LONGEST_CHAIN, links)


def test_no_imports_form_a_cycle(package: Any) -> None:
    cycles = package.cycles()
    offenders = [place for names in cycles for place in package.describe_cycle(names)]
    check_budget("cycles", len(cycles), MOST_CYCLES, offenders)


def test_no_function_is_long(package: Any) -> None:
    offenders = [function for function in package.long_functions() if not function.is_exempt]
    check_budget("long functions", len(offenders), MOST_LONG_FUNCTIONS, offenders)


def test_no_function_has_many_parameters(package: Any) -> None:
    offenders = [function for function in package.wide_functions() if not function.is_exempt]
    check_budget("wide functions", len(offenders), MOST_WIDE_FUNCTIONS, offenders)


def test_only_tasks_ask_which_task_is_meant(package: Any) -> None:
    offenders = package.task_switches
    check_budget("task switches", len(offenders), MOST_TASK_SWITCHES, offenders)


def test_only_methods_ask_which_method_is_meant(package: Any) -> None:
    offenders = package.method_switches
    check_budget("method switches", len(offenders), MOST_METHOD_SWITCHES, offenders)


def test_the_budgets_are_of_the_package_that_is_used(package: Any) -> None:
    assert package.folder == REPOSITORY / "wegeft_cli"
    assert len(package.modules) > 150
    assert len(package.functions) > 1000
    # The names in wegeft_cli/__init__.py lead to functions that were found.
    exempt = {function.name for function in package.functions if function.is_exempt}
    assert {"train", "merge", "inject_generators", "save_adapter", "evaluate"} <= exempt


def test_a_failed_budget_names_its_offenders() -> None:
    with pytest.raises(AssertionError, match=r"9, at most 5 allowed:\n +a\.py:3: x"):
        check_budget("another", 9, 5, [SCRIPT.Place("a.py", 3, "x")])


# The measures, on small packages


@pytest.fixture
def make(tmp_path: Path) -> Callable[[dict[str, str]], Any]:
    def write(files: dict[str, str]) -> Any:
        for name, text in {"__init__.py": "", **files}.items():
            path = tmp_path / "pack" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        return SCRIPT.Package.read(tmp_path / "pack")

    return write


Make = Callable[[dict[str, str]], Any]


def lines_of(places: Sequence[Any]) -> list[tuple[str, int]]:
    return [(place.file, place.line) for place in places]


CODE = '''"""Of the module,

two lines and a blank one."""

# A comment.
NAME = 1  # another
"""Of an attribute: code."""


class Thing:
    """Of the class."""

    def method(self, a, b=2, *rest, c, **more):
        """Of the method."""
        return """text

        over lines"""
'''


def test_lines_of_code_are_counted(make: Make) -> None:
    module = make({"a.py": CODE}).by_name["a"]
    # NAME, the words below it, class, def, and two of the string's three lines.
    assert sorted(module.code) == [6, 7, 10, 13, 15, 17]
    assert sorted(module.docstrings) == [1, 2, 3, 11, 14]
    assert len(module.lines) == 17


def test_functions_are_measured(make: Make) -> None:
    text = CODE + "\n\ndef outer(cls):\n    # nothing\n    def inner(a):\n        return a\n"
    package = make({"a.py": text})
    found = {f.name: (f.line, f.code_lines, f.parameters) for f in package.functions}
    assert found == {
        "Thing.method": (13, 3, 5),
        "outer": (20, 3, 0),
        "outer.inner": (22, 2, 1),
    }


def test_a_long_and_a_wide_function_are_found(make: Make) -> None:
    def long(name: str, size: int) -> str:
        return f"def {name}():\n" + "    pass\n" * (size - 1)

    def wide(name: str, number: int) -> str:
        return f"def {name}(self, {', '.join(f'p{i}' for i in range(number))}): ...\n"

    package = make(
        {
            "a.py": long("fits", 60) + long("long", 61) + wide("narrow", 7) + wide("wide", 8),
            "__init__.py": "from pack.b import public, Public\n",
            "b.py": long("public", 99)
            + "class Public:\n    "
            + wide("method", 9)
            + "class Private:\n    "
            + wide("method", 10),
            "cli/commands/run.py": long("run", 70),
            "cli/tables.py": long("draw", 80),
        }
    )
    found = [(str(f), f.is_exempt) for f in package.long_functions()]
    assert found == [
        ("b.py:1: public (99 code lines, 0 parameters)", True),
        ("cli/tables.py:1: draw (80 code lines, 0 parameters)", False),
        ("cli/commands/run.py:1: run (70 code lines, 0 parameters)", True),
        ("a.py:61: long (61 code lines, 0 parameters)", False),
    ]
    names = [(f.name, f.is_exempt) for f in package.wide_functions()]
    assert names == [("Private.method", False), ("Public.method", True), ("wide", False)]


def test_all_of_cli_is_exempt_where_commands_have_no_folder(make: Make) -> None:
    package = make({"cli/run.py": "def run(): ...\n", "other.py": "def run(): ...\n"})
    exempt = {function.file: function.is_exempt for function in package.functions}
    assert exempt == {"cli/run.py": True, "other.py": False}


def test_the_modules_of_a_folder_are_counted(make: Make) -> None:
    package = make({"a.py": "", "in/__init__.py": "", "in/b.py": "", "in/c.py": ""})
    assert package.modules_per_folder() == {".": 1, "in": 2}


def test_imports_are_found_wherever_they_stand(make: Make) -> None:
    text = (
        "import os\n"
        "import pack.b\n"
        "from typing import TYPE_CHECKING\n"
        "from pack import c, VERSION\n"
        "if TYPE_CHECKING:\n"
        "    from pack import unseen\n"
        "else:\n"
        "    from pack import seen\n"
        "def f():\n"
        "    from .inner.d import name\n"
        "    try:\n"
        "        import packer\n"
        "    finally:\n"
        "        from .inner import d2\n"
    )
    names = ["b", "c", "unseen", "seen", "inner/d", "inner/d2", "packer"]
    package = make({"a.py": text, "inner/__init__.py": "", **{f"{name}.py": "" for name in names}})
    assert package.imports["a"] == {
        "b": 2,
        "c": 4,
        "": 4,
        "seen": 8,
        "inner.d": 10,
        "inner.d2": 14,
    }


def test_relative_imports_of_a_package_are_resolved(make: Make) -> None:
    package = make(
        {
            "inner/__init__.py": "from . import d\nfrom .. import a\n",
            "inner/d.py": "from ..a import x\n",
            "a.py": "",
        }
    )
    assert package.imports["inner"] == {"inner.d": 1, "a": 2}
    assert package.imports["inner.d"] == {"a": 1}


def test_a_cycle_through_a_function_is_found(make: Make) -> None:
    package = make(
        {
            "a.py": "from pack.b import x\n",
            "b.py": "def f():\n    import pack.c\n",
            "c.py": "from pack import a, d\n",
            "d.py": "",
            "self.py": "import pack.self\n",
        }
    )
    assert sorted(package.cycles()) == [["a", "b", "c"], ["self"]]
    places = package.describe_cycle(["a", "b", "c"])
    assert [str(place) for place in places] == [
        "a.py:1: imports b",
        "b.py:2: imports c",
        "c.py:1: imports a",
    ]


def test_imports_for_types_alone_form_no_cycle(make: Make) -> None:
    text = "import typing\nif typing.TYPE_CHECKING:\n    from pack.a import x\n"
    package = make({"a.py": "from pack.b import y\n", "b.py": text})
    assert package.cycles() == []
    assert package.longest_chain() == ["a", "b"]


def test_the_longest_chain_is_found(make: Make) -> None:
    package = make(
        {
            "a.py": "import pack.b, pack.e\n",
            "b.py": "import pack.c\n",
            "c.py": "def f():\n    import pack.d\n",
            "d.py": "import pack.e\n",
            "e.py": "",
            "short.py": "import pack.e\n",
        }
    )
    assert package.longest_chain() == ["a", "b", "c", "d", "e"]
    found = [("a.py", 1), ("b.py", 1), ("c.py", 2), ("d.py", 1), ("e.py", 1)]
    assert lines_of(package.describe_chain()) == found


def test_a_cycle_is_one_link_of_a_chain(make: Make) -> None:
    package = make(
        {
            "top.py": "import pack.a\n",
            "a.py": "import pack.b\n",
            "b.py": "import pack.a\nimport pack.end\n",
            "end.py": "",
        }
    )
    assert package.longest_chain() == ["top", "b", "end"]
    assert lines_of(package.describe_chain()) == [("top.py", 1), ("b.py", 2), ("end.py", 1)]


TASK_SWITCHES = {
    "a name compared": 'x == "causal_lm"',
    "a key": '{"sequence_classification": 1}',
    "a default": 'def f(task="image_classification"): ...',
    "an alias compared": "recipe.task == CAUSAL",
    "an alias in a tuple": "self.recipe.task in (CAUSAL, IMAGE)",
    "a table": "TABLE[head.task]",
    "a table's get": "TABLE.get(facts.recipe.task)",
    "a match": "match recipe.task:\n    case _: pass",
    "a question": "if is_classifier(path): pass",
    "a question of a target": "target.is_classifier",
    "a twin": "isinstance(loss, ClassLoss)",
    "twins": "isinstance(loss, (Other, losses.ClassificationLoss))",
    "a union": "def f(x: CausalLoss | ClassLoss): ...",
}
TASK_PLAIN = {
    "a docstring": '"""causal_lm"""',
    "a comment": "# causal_lm",
    "a longer text": 'x == "not causal_lm"',
    "a task passed on": "find_task(recipe.task)",
    "a benchmark": "scores[score.task]",
    "an optional": "def f(x: ClassLoss | None): ...",
    "its own definition": "def is_classifier(): ...",
    "another class": "isinstance(x, Classes)",
}


@pytest.mark.parametrize("text", TASK_SWITCHES.values(), ids=TASK_SWITCHES)
def test_a_task_switch_is_found(text: str, make: Make) -> None:
    homes = ["tasks/one.py", "tasks/inner/two.py", "recipe/schema.py"]
    files = ["a.py", "recipe/other.py", "runs/tasks.py", *homes]
    package = make(dict.fromkeys(files, f"'''Module.'''\n{text}\n"))
    assert lines_of(package.task_switches) == [(file, 2) for file in files[:3]]
    assert package.method_switches == []


@pytest.mark.parametrize("text", TASK_PLAIN.values(), ids=TASK_PLAIN)
def test_what_is_no_task_switch_is_not_found(text: str, make: Make) -> None:
    assert make({"a.py": f"{text}\n"}).task_switches == []


METHOD_SWITCHES = {
    "a name": 'f("adalora")',
    "names": 'TYPES = ("bitfit", "linear_probe")',
    "a type on disk": 'kind = "WEGEFT"',
    "a word compared": 'x != "wegeft"',
    "a word in a tuple": 'x in (None, "full")',
    "a word as a key": '{"wegeft": 1}',
    "a word looked up": 'TABLE["full"]',
    "a word as a pattern": 'match x:\n  case 1 | "full": pass',
    "a word as an argument": 'f(method="full")',
    "a word as a default": 'def f(a, *, kind="wegeft"): ...',
    "PEFT's type compared": 'kind == "LORA"',
    "the in-place types": "x in INPLACE_TYPES",
    "all types": "ALL = (*IN_PLACE_TYPES, *PEFT_TYPES)",
    "an alias compared": "recipe.adapter.type == OURS",
    "an alias in a tuple": "section.type in (OURS, THEIRS)",
    "a table": "TABLE[adapter.type]",
    "the type on disk compared": "config.peft_type == OURS",
    "the format's constant": "from x import PEFT_TYPE; kind == PEFT_TYPE",
    "a module that has generators": "get_generators(model) is None",
}
METHOD_PLAIN = {
    "a docstring": '"""wegeft"""',
    "the command": 'App(name="wegeft")',
    "a protocol": 'protocol: str = "wegeft"',
    "a tag": 'tags = ["wegeft", "lora"]',
    "a type passed on": "find_method(recipe.adapter.type)",
    "another type": "device.type == CPU",
    "a format's constant": 'PEFT_TYPE = "WEGEFT"\nvalues.get("peft_type") == PEFT_TYPE',
    "an import": "from recipe.values import INPLACE_TYPE",
    "generators used": "owner = get_generators(model)",
}


@pytest.mark.parametrize("text", METHOD_SWITCHES.values(), ids=METHOD_SWITCHES)
def test_a_method_switch_is_found(text: str, make: Make) -> None:
    homes = ["methods/wegeft/one.py", "recipe/schema.py", "interop/peft_tuner/config.py"]
    files = ["a.py", "recipe/other.py", *homes]
    package = make(dict.fromkeys(files, f"'''Module.'''\n{text}\n"))
    found = lines_of(package.method_switches)
    line = 3 if text.startswith("match") else 2
    assert found == [(file, line) for file in files[:2]]
    assert package.task_switches == []


@pytest.mark.parametrize("text", METHOD_PLAIN.values(), ids=METHOD_PLAIN)
def test_what_is_no_method_switch_is_not_found(text: str, make: Make) -> None:
    assert make({"a.py": f"{text}\n"}).method_switches == []


def test_a_share_of_values_is_a_nearest_rank() -> None:
    assert SCRIPT.nearest_rank(list(range(10, 0, -1)), 0.9) == 9
    assert SCRIPT.nearest_rank([7], 0.9) == 7
    assert SCRIPT.nearest_rank([], 0.9) == 0


def test_two_trees_stand_side_by_side(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    for folder, number in ((old, 3), (new, 1)):
        (folder / "wegeft_cli").mkdir(parents=True)
        (folder / "wegeft_cli" / "__init__.py").write_text("")
        for name in range(number):
            text = '"""Of the module."""\n\nx == "causal_lm"\n'
            (folder / "wegeft_cli" / f"m{name}.py").write_text(text)
    SCRIPT.main([str(old), str(new)])
    table = capsys.readouterr().out.splitlines()
    assert table[0] == f"|  | {old} | {new} |"
    assert "| files | 4 | 2 |" in table
    assert "| code lines | 3 | 1 |" in table
    assert "| task switches outside tasks/ | 3 | 1 |" in table
    assert "| docstring share of lines, % | 33.3 | 33.3 |" in table
    SCRIPT.main([str(old), str(new), "--json"])
    values = json.loads(capsys.readouterr().out)
    assert values[str(new)]["measures"]["modules per folder, max"] == 1
    assert values[str(new)]["task switches"] == ['m0.py:3: x == "causal_lm"']
    SCRIPT.main([str(new), "--lists"])
    assert '  m0.py:3: x == "causal_lm"' in capsys.readouterr().out
    with pytest.raises(SystemExit, match="holds no Python files"):
        SCRIPT.main([str(tmp_path / "none")])
