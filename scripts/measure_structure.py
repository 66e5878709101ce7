"""Measure the structure of the package: size, folders, imports, functions and switches.

    python scripts/measure_structure.py                     # this checkout
    python scripts/measure_structure.py OLD NEW             # two checkouts, side by side
    python scripts/measure_structure.py --lists             # also print what each limit finds

A folder is a package or a checkout that holds `wegeft_cli`. tests/test_structure.py holds the
same measures to limits. Only the standard library is used, and nothing measured is imported.

The measures:

Code lines
    Lines with at least one token of code. Blank lines, comments and docstrings do not count. A
    docstring is the first statement of a module, class or function. A string below an attribute
    counts as code, and so does every line of a multi-line string that is not blank.
Modules
    Files named `*.py`. The modules per folder leave out `__init__.py`. The median is over the
    folders that hold a module.
Imports
    An edge joins a module to each module of the package that it names in an import, wherever the
    import stands: at module level or inside a function. Imports under `if TYPE_CHECKING` are no
    edges. `from package import name` is an edge to the module `package.name` if there is one,
    otherwise to `package/__init__.py`. Imports by a string (`importlib.import_module`) and the
    implicit import of the packages above a module are no edges.
Cycles
    The strongly connected components with more than one module, or with a module that imports
    itself.
Longest chain
    The number of modules on the longest path of imports. Each strongly connected component counts
    as one link, shown by the module through which the path leaves it.
Functions
    Every `def`, methods and inner functions included. A function's code lines run from `def` to the
    end of its body, inner functions included, decorators excluded. Its parameters are all of
    them except `self` and `cls`; `*args` and `**kwargs` are one each. p90 is the nearest rank.
Exempt functions
    The commands (`cli/commands`, or all of `cli` where that folder does not exist) and the public
    Python API: what the package's own `__init__.py` imports, with the methods of its classes.
Task switches
    Lines outside `tasks/` and `recipe/schema.py` that hold the name of a task as a string; that
    compare `recipe.task` or `head.task`, test its membership or look it up in a table; that read
    or call `is_classifier` or a similar name; or that name a class of one task beside its
    counterpart, in `isinstance` or in a union (`CausalLoss | ClassLoss`).
Method switches
    Lines outside `methods/`, `recipe/schema.py` and `interop/peft_tuner/` (WeGeFT as a class of
    PEFT, which has to name it) that hold `"adalora"`, `"bitfit"`, `"linear_probe"` or `"WEGEFT"`;
    that compare `"wegeft"`, `"full"` or `"LORA"`, or have one as a dictionary key, or as an
    argument or a default called `method`, `type` or `kind` (elsewhere these words also mean the
    command, a protocol, a file format); that use `INPLACE_TYPES`; that compare `adapter.type`
    or `peft_type`, test its membership or look it up in a table; or that compare
    `get_generators(...)`. The line that defines `PEFT_TYPE` or `INPLACE_TYPE`, and comparisons
    with the constant in the module that defines it, belong to the file format and do not count.
Docstring share
    Lines of docstrings, their quotes included, over all lines.

At commit e3d7903 these rules give the figures of the review that preceded the redesign (304 files,
101 modules in one folder, a chain of 22 modules, 17 functions above 60 code lines, 37 above 7
parameters, 24 of them without commands and public API), except for the following:

- Code lines: 31,506 against 31,529. The review counted the blank lines of multi-line strings.
- Import cycles: 2 against 4. The other two (`generators/edit, module, saved` and
  `interop/peft_tuner/combine, model`) close through imports under `TYPE_CHECKING` alone.
- Task switches: 80 lines against about 75 places. The rule counts each line of a table of names;
  the review counted a table once. The review also counted tests of `head is None`, of
  `read_head(...)` and of local variables such as `is_text`, which no rule separates from other
  tests of optional values: a budget of 0 does not prove that they are gone.
- Method switches: 58 lines against about 56 places. The rule also counts the tables of names in
  `recipe/values.py`. The review also counted calls of `is_whole` and the two comparisons in
  `checkpoints/inplace.py`, which check the file format that this module defines.
"""

from __future__ import annotations

import argparse
import ast
import io
import json
import re
import statistics
import sys
import tokenize
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

PACKAGE = "wegeft_cli"
MOST_CODE_LINES = 60
MOST_PARAMETERS = 7

TASK_HOMES = ("tasks/", "recipe/schema.py")
METHOD_HOMES = ("methods/", "recipe/schema.py", "interop/peft_tuner/")
TASK_NAMES = {"causal_lm", "sequence_classification", "image_classification"}
METHOD_NAMES = {"adalora", "bitfit", "linear_probe", "WEGEFT"}
METHOD_WORDS = {"wegeft", "full", "LORA"}
"""Names of methods that also mean something else: only some uses of them are switches."""

_METHOD_ARGUMENTS = {"method", "type", "type_", "kind", "peft_type"}
_IS_TASK = re.compile(r"_?is_(classifier|classification|causal(_lm)?|language_model)")
_TASK_CLASS = re.compile(r"_?(Class[A-Z]\w*|Classif\w*|Causal\w*|(Sequence|Image)Classif\w*)")
_TYPES = re.compile(r"IN_?PLACE_TYPES")
_FORMAT_CONSTANT = re.compile(r"(PEFT|IN_?PLACE)_TYPE")
_NO_CODE = {
    *(tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT),
    *(tokenize.ENCODING, tokenize.ENDMARKER),
}
_Function = ast.FunctionDef | ast.AsyncFunctionDef
_Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Place:
    """One line of a file, and what was found there."""

    file: str
    line: int
    what: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.what}"


@dataclass(frozen=True)
class Function:
    """One function of the package."""

    file: str
    line: int
    name: str
    code_lines: int
    parameters: int
    is_exempt: bool

    def __str__(self) -> str:
        size = f"{self.code_lines} code lines, {self.parameters} parameters"
        return f"{self.file}:{self.line}: {self.name} ({size})"


@dataclass(frozen=True)
class Module:
    """One file: its path below the package, its dotted name below the package, its contents."""

    file: str
    name: str
    tree: ast.Module
    nodes: tuple[ast.AST, ...]
    lines: tuple[str, ...]
    code: frozenset[int]
    docstrings: frozenset[int]

    @property
    def is_init(self) -> bool:
        """Whether the file is the `__init__.py` of a package."""
        return Path(self.file).name == "__init__.py"


def read_module(package: Path, path: Path) -> Module:
    """Read and parse one file of the package."""
    text = path.read_text(encoding="utf-8")
    tree = ast.parse(text)
    relative = path.relative_to(package)
    parts = relative.with_suffix("").parts
    name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
    nodes = tuple(ast.walk(tree))
    docstrings = frozenset(_docstring_lines(nodes))
    lines = tuple(text.splitlines())
    code = frozenset(_code_lines(text, lines) - docstrings)
    return Module(relative.as_posix(), name, tree, nodes, lines, code, docstrings)


def _code_lines(text: str, lines: Sequence[str]) -> set[int]:
    found: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in _NO_CODE:
            found.update(range(token.start[0], token.end[0] + 1))
    return {number for number in found if lines[number - 1].strip()}


def _docstring_lines(nodes: Iterable[ast.AST]) -> Iterator[int]:
    for node in nodes:
        if isinstance(node, _Documented) and node.body and _is_text(node.body[0]):
            first = node.body[0]
            yield from range(first.lineno, (first.end_lineno or first.lineno) + 1)


def _is_text(node: ast.AST) -> bool:
    """Return whether a statement is only a string: a docstring, or the words below an attribute."""
    value = node.value if isinstance(node, ast.Expr) else None
    return isinstance(value, ast.Constant) and isinstance(value.value, str)


@dataclass(frozen=True)
class Package:
    """A package's files, parsed."""

    folder: Path
    modules: tuple[Module, ...]

    @classmethod
    def read(cls, folder: Path) -> Package:
        """Read a package, or the `wegeft_cli` of a checkout."""
        if (folder / PACKAGE / "__init__.py").is_file():
            folder = folder / PACKAGE
        paths = sorted(folder.rglob("*.py"))
        if not paths:
            raise FileNotFoundError(f"{str(folder)!r} holds no Python files")
        return cls(folder, tuple(read_module(folder, path) for path in paths))

    @cached_property
    def by_name(self) -> dict[str, Module]:
        """The modules by dotted name below the package; the package itself is the empty name."""
        return {module.name: module for module in self.modules}

    @cached_property
    def public_names(self) -> set[tuple[str, str]]:
        """Pairs of a module and a name in it that the package's own `__init__.py` imports."""
        init = self.by_name.get("")
        nodes = () if init is None else init.nodes
        imports = [node for node in nodes if isinstance(node, ast.ImportFrom)]
        return {
            (target, alias.name)
            for node in imports
            if (target := self._below(_source_of(node, init, self.folder.name))) is not None
            for alias in node.names
        }

    def _below(self, dotted: str | None) -> str | None:
        """Return a dotted name without the package's own name, or None for another package."""
        if dotted is None:
            return None
        top, _, rest = dotted.partition(".")
        return rest if top == self.folder.name else None

    # Folders

    def modules_per_folder(self) -> dict[str, int]:
        """Count the modules of each folder, without `__init__.py`."""
        files = [Path(module.file) for module in self.modules if not module.is_init]
        return dict(Counter(file.parent.as_posix() for file in files))

    # Imports

    @cached_property
    def imports(self) -> dict[str, dict[str, int]]:
        """For each module, the modules of the package that it imports, each with a line."""
        return {module.name: self._imports_of(module) for module in self.modules}

    def _imports_of(self, module: Module) -> dict[str, int]:
        found: dict[str, int] = {}
        for node in _without_type_checking(module.tree):
            for dotted in self._imported_names(node, module):
                found.setdefault(dotted, node.lineno)
        return found

    def _imported_names(self, node: ast.Import | ast.ImportFrom, module: Module) -> Iterator[str]:
        if isinstance(node, ast.Import):
            names = [self._below(alias.name) for alias in node.names]
            yield from (name for name in names if name in self.by_name and name is not None)
            return
        source = self._below(_source_of(node, module, self.folder.name))
        if source is None or source not in self.by_name:
            return
        for alias in node.names:
            inner = f"{source}.{alias.name}" if source else alias.name
            yield inner if inner in self.by_name else source

    @cached_property
    def components(self) -> list[list[str]]:
        """The strongly connected components of the imports, imported modules first."""
        return strong_components({name: list(edges) for name, edges in self.imports.items()})

    def cycles(self) -> list[list[str]]:
        """Return the import cycles, each as the sorted names of its modules."""
        return [
            sorted(names)
            for names in self.components
            if len(names) > 1 or names[0] in self.imports[names[0]]
        ]

    def describe_cycle(self, names: Sequence[str]) -> list[Place]:
        """Return the imports that join the modules of a cycle."""
        return [
            Place(self.by_name[name].file, line, f"imports {target}")
            for name in names
            for target, line in self.imports[name].items()
            if target in names
        ]

    def longest_chain(self) -> list[str]:
        """Return the longest path of imports, from the module that imports to the imported."""
        home = {name: index for index, names in enumerate(self.components) for name in names}
        best: list[list[str]] = []
        for index, names in enumerate(self.components):
            # Components come after all that they import.
            paths = [
                (name, best[home[target]])
                for name in sorted(names)
                for target in self.imports[name]
                if home[target] != index
            ]
            name, rest = max(paths, key=lambda path: len(path[1]), default=(names[0], []))
            best.append([name, *rest])
        return max(best, key=len)

    def describe_chain(self) -> list[Place]:
        """Return the longest chain, one place for each module: the import of the next one."""
        chain = self.longest_chain()
        members = {name: set(names) for names in self.components for name in names}
        places = []
        for name, follower in pairwise(chain):
            lines = [line for to, line in self.imports[name].items() if to in members[follower]]
            places.append(Place(self.by_name[name].file, min(lines), f"imports {follower}"))
        return [*places, Place(self.by_name[chain[-1]].file, 1, "the last one")]

    # Functions

    @cached_property
    def functions(self) -> list[Function]:
        """Every function of the package."""
        return [found for module in self.modules for found in self._functions_of(module)]

    def _functions_of(self, module: Module) -> Iterator[Function]:
        has_commands = any(m.file.startswith("cli/commands/") for m in self.modules)
        is_command = module.file.startswith("cli/commands/" if has_commands else "cli/")
        for name, holder, node in _find_functions(module.tree):
            first = node.lineno
            last = node.end_lineno or first
            lines = sum(number in module.code for number in range(first, last + 1))
            public = (module.name, holder if holder else name) in self.public_names
            yield Function(
                module.file, first, name, lines, _count_parameters(node), is_command or public
            )

    def long_functions(self) -> list[Function]:
        """Return the functions above the limit of code lines, the longest first."""
        found = [f for f in self.functions if f.code_lines > MOST_CODE_LINES]
        return sorted(found, key=lambda f: -f.code_lines)

    def wide_functions(self) -> list[Function]:
        """Return the functions above the limit of parameters, the widest first."""
        found = [f for f in self.functions if f.parameters > MOST_PARAMETERS]
        return sorted(found, key=lambda f: -f.parameters)

    # Switches

    @cached_property
    def task_switches(self) -> list[Place]:
        """The places outside `tasks/` and the schema that ask which task is meant."""
        return self._switches(TASK_HOMES, find_task_switches)

    @cached_property
    def method_switches(self) -> list[Place]:
        """The places outside `methods/` and the schema that ask which method is meant."""
        return self._switches(METHOD_HOMES, find_method_switches)

    def _switches(
        self, homes: tuple[str, ...], find: Callable[[Sequence[ast.AST]], Iterator[int]]
    ) -> list[Place]:
        return [
            Place(module.file, line, module.lines[line - 1].strip())
            for module in self.modules
            if not module.file.startswith(homes)
            for line in sorted(set(find(module.nodes)))
        ]


def _source_of(node: ast.ImportFrom, module: Module | None, package: str) -> str | None:
    """Return the dotted name that `from ... import` names, relative ones resolved."""
    if not node.level:
        return node.module
    assert module is not None
    parts = [package, *module.name.split(".")] if module.name else [package]
    drop = node.level - (1 if module.is_init else 0)
    kept = parts[: len(parts) - drop]
    return ".".join([*kept, *([node.module] if node.module else [])])


def _without_type_checking(node: ast.AST) -> Iterator[ast.Import | ast.ImportFrom]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in _names_in(child.test):
            for other in child.orelse:
                yield from _without_type_checking(ast.Module([other], []))
        elif isinstance(child, ast.Import | ast.ImportFrom):
            yield child
        else:
            yield from _without_type_checking(child)


def _names_in(node: ast.AST) -> set[str]:
    return {name for part in ast.walk(node) if (name := _last_name(part))}


def _last_name(node: ast.AST) -> str:
    """Return `c` of `a.b.c` and of `c`, and nothing of anything else."""
    if isinstance(node, ast.Attribute):
        return node.attr
    return node.id if isinstance(node, ast.Name) else ""


def strong_components(edges: Mapping[str, Iterable[str]]) -> list[list[str]]:
    """Return the strongly connected components (Tarjan), each after all that it leads to."""
    order: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(name: str) -> None:
        order[name] = low[name] = len(order)
        stack.append(name)
        for target in edges[name]:
            if target not in order:
                visit(target)
                low[name] = min(low[name], low[target])
            elif target in stack:
                low[name] = min(low[name], order[target])
        if low[name] == order[name]:
            cut = stack.index(name)
            found.append(stack[cut:])
            del stack[cut:]

    for name in edges:
        if name not in order:
            visit(name)
    return found


def _find_functions(
    node: ast.AST, path: str = "", holder: str = ""
) -> Iterator[tuple[str, str, _Function]]:
    """Yield each function's qualified name, the top-level class it is a method of, its node."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef):
            inner = f"{path}{child.name}"
            yield from _find_functions(child, f"{inner}.", child.name if not path else "")
        elif isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            yield f"{path}{child.name}", holder, child
            yield from _find_functions(child, f"{path}{child.name}.")
        else:
            yield from _find_functions(child, path, holder)


def _count_parameters(node: _Function) -> int:
    given = node.args
    names = [part.arg for part in (*given.posonlyargs, *given.args)]
    is_bound = bool(names) and names[0] in ("self", "cls")
    extra = sum(part is not None for part in (given.vararg, given.kwarg))
    return len(names) - is_bound + len(given.kwonlyargs) + extra


def find_task_switches(nodes: Sequence[ast.AST]) -> Iterator[int]:
    """Yield the lines that ask which task is meant."""
    yield from (node.lineno for node in _strings(nodes) if node.value in TASK_NAMES)
    for side in _questions(nodes):
        owner = _last_name(side.value) if isinstance(side, ast.Attribute) else ""
        if _last_name(side) == "task" and re.fullmatch(r"\w*(recipe|head|spec)", owner):
            yield side.lineno
    for node in nodes:
        if isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Load):
            if _IS_TASK.fullmatch(_last_name(node)):
                yield node.lineno
        elif isinstance(node, ast.Call) and _last_name(node.func) == "isinstance":
            if any(_TASK_CLASS.fullmatch(name) for name in _names_in(node.args[1])):
                yield node.lineno
        elif isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
            members = list(_union(node))
            if len(members) > 1 and any(_TASK_CLASS.fullmatch(name) for name in members):
                yield node.lineno


def find_method_switches(nodes: Sequence[ast.AST]) -> Iterator[int]:
    """Yield the lines that ask which method is meant."""
    own = {
        target.id: node.lineno
        for node in nodes
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name) and _FORMAT_CONSTANT.fullmatch(target.id)
    }
    for text in _strings(nodes):
        if text.value in METHOD_NAMES and text.lineno not in own.values():
            yield text.lineno
    for word in _words(nodes):
        if isinstance(word, ast.Constant) and word.value in METHOD_WORDS:
            yield word.lineno
    for node in nodes:
        if isinstance(node, ast.Name | ast.Attribute) and _TYPES.fullmatch(_last_name(node)):
            yield node.lineno
    for side in _questions(nodes, frozenset(own)):
        name = _last_name(side)
        owner = _last_name(side.value) if isinstance(side, ast.Attribute) else ""
        is_type = name == "type" and re.fullmatch(r"\w*(adapter|section)", owner)
        is_wegeft = isinstance(side, ast.Call) and _last_name(side.func) == "get_generators"
        is_kind = name == "peft_type" or _FORMAT_CONSTANT.fullmatch(name)
        if is_type or is_kind or is_wegeft:
            yield side.lineno


def _strings(nodes: Iterable[ast.AST]) -> Iterator[ast.Constant]:
    """Yield the strings of code, without docstrings and the words below attributes."""
    nodes = list(nodes)
    texts = {id(node.value) for node in nodes if isinstance(node, ast.Expr)}
    for node in nodes:
        is_text = isinstance(node, ast.Constant) and isinstance(node.value, str)
        if isinstance(node, ast.Constant) and is_text and id(node) not in texts:
            yield node


def _questions(nodes: Iterable[ast.AST], own: frozenset[str] = frozenset()) -> Iterator[ast.expr]:
    """Yield what is compared, matched, or looked up in a table.

    A comparison with one of the constants `own` is left out.
    """
    for node in nodes:
        if isinstance(node, ast.Compare):
            sides = [part for side in (node.left, *node.comparators) for part in _members(side)]
            if not any(_last_name(side) in own for side in sides):
                yield from sides
        elif isinstance(node, ast.Match):
            yield node.subject
        elif isinstance(node, ast.Subscript):
            yield node.slice
        elif isinstance(node, ast.Call) and _last_name(node.func) == "get":
            yield from node.args[:1]


def _members(node: ast.expr) -> Iterator[ast.expr]:
    if isinstance(node, ast.Tuple | ast.List | ast.Set):
        for element in node.elts:
            yield from _members(element.value if isinstance(element, ast.Starred) else element)
    else:
        yield node


def _words(nodes: Sequence[ast.AST]) -> Iterator[ast.expr]:
    """Yield what is compared, a pattern, a key, or the value of an argument of a method's name."""
    yield from _questions(nodes)
    for node in nodes:
        if isinstance(node, ast.MatchValue):
            yield node.value
        elif isinstance(node, ast.Dict):
            yield from (key for key in node.keys if key is not None)
        elif isinstance(node, ast.keyword) and node.arg in _METHOD_ARGUMENTS:
            yield node.value
        elif isinstance(node, ast.arguments):
            yield from _method_defaults(node)


def _method_defaults(node: ast.arguments) -> Iterator[ast.expr]:
    plain = [*node.posonlyargs, *node.args]
    pairs = [
        *zip(plain[len(plain) - len(node.defaults) :], node.defaults, strict=True),
        *zip(node.kwonlyargs, node.kw_defaults, strict=True),
    ]
    for part, default in pairs:
        if default is not None and part.arg in _METHOD_ARGUMENTS:
            yield default


def _union(node: ast.AST) -> Iterator[str]:
    """Yield the names of a union's members, without None."""
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
        yield from _union(node.left)
        yield from _union(node.right)
    elif not (isinstance(node, ast.Constant) and node.value is None):
        yield _last_name(node.value if isinstance(node, ast.Subscript) else node) or "?"


# The table


def nearest_rank(values: Sequence[int], share: float) -> int:
    """Return the smallest value that at least this share of the values does not exceed."""
    if not values:
        return 0
    ordered = sorted(values)
    return ordered[max(0, -int(-share * len(ordered) // 1) - 1)]


def measure(package: Package) -> dict[str, Any]:
    """Return every measure by its label, in the order of the table."""
    folders = list(package.modules_per_folder().values())
    modules = package.modules
    lines = sum(len(module.lines) for module in modules)
    functions = package.functions
    sizes = [function.code_lines for function in functions]
    widths = [function.parameters for function in functions]
    long, wide = package.long_functions(), package.wide_functions()
    task, method = package.task_switches, package.method_switches
    docstrings = sum(len(module.docstrings) for module in modules)
    return {
        "files": len(modules),
        "lines": lines,
        "code lines": sum(len(module.code) for module in modules),
        "folders with modules": len(folders),
        "modules per folder, median": statistics.median(folders) if folders else 0,
        "modules per folder, max": max(folders, default=0),
        "longest chain of imports": len(package.longest_chain()),
        "import cycles": len(package.cycles()),
        "functions": len(functions),
        "function, median code lines": statistics.median(sizes) if sizes else 0,
        "function, p90 code lines": nearest_rank(sizes, 0.9),
        "function, max code lines": max(sizes, default=0),
        f"long functions (above {MOST_CODE_LINES} code lines)": len(long),
        "long functions, without commands and public API": sum(not f.is_exempt for f in long),
        "parameters, p90": nearest_rank(widths, 0.9),
        "parameters, max": max(widths, default=0),
        f"wide functions (above {MOST_PARAMETERS} parameters)": len(wide),
        "wide functions, without commands and public API": sum(not f.is_exempt for f in wide),
        "task switches outside tasks/": len(task),
        "files with task switches": len({place.file for place in task}),
        "method switches outside methods/": len(method),
        "files with method switches": len({place.file for place in method}),
        "docstring share of lines, %": round(100 * docstrings / lines, 1) if lines else 0.0,
    }


def list_findings(package: Package) -> dict[str, list[str]]:
    """Return what each limit finds, as lines with file and line number."""
    folders = package.modules_per_folder()
    cycles = [place for names in package.cycles() for place in package.describe_cycle(names)]
    return {
        "modules per folder": [f"{folder}: {number}" for folder, number in sorted(folders.items())],
        "longest chain of imports": [str(place) for place in package.describe_chain()],
        "import cycles": [str(place) for place in cycles],
        "long functions": [str(function) for function in package.long_functions()],
        "functions with many parameters": [str(f) for f in package.wide_functions()],
        "task switches": [str(place) for place in package.task_switches],
        "method switches": [str(place) for place in package.method_switches],
    }


def write_table(columns: Mapping[str, Mapping[str, Any]]) -> str:
    """Return a Markdown table with one column for each measured package."""
    labels = list(next(iter(columns.values())))
    rows = [["", *columns], ["---", *("---:" for _ in columns)]]
    rows += [[label, *(_number(one[label]) for one in columns.values())] for label in labels]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _number(value: float) -> str:
    return f"{value:,.1f}".removesuffix(".0")


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure the folders named on the command line and print one table, or JSON."""
    parser = argparse.ArgumentParser(description="Measure the structure of the package.")
    default = Path(__file__).resolve().parents[1] / PACKAGE
    parser.add_argument(
        "folders", nargs="*", type=Path, default=[default], help="packages or checkouts"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    parser.add_argument("--lists", action="store_true", help="also print what each limit finds")
    chosen = parser.parse_args(arguments)
    try:
        packages = {str(folder): Package.read(folder) for folder in chosen.folders}
    except FileNotFoundError as error:
        sys.exit(f"measure_structure: {error}")
    measures = {name: measure(package) for name, package in packages.items()}
    findings = {name: list_findings(package) for name, package in packages.items()}
    if chosen.json:
        found = {name: {"measures": measures[name], **findings[name]} for name in packages}
        print(json.dumps(found, indent=2))
        return
    print(write_table(measures))
    for name in packages if chosen.lists else ():
        for title, entries in findings[name].items():
            print(f"\n{name}, {title}:")
            print("\n".join(f"  {entry}" for entry in entries) or "  none")


if __name__ == "__main__":
    main()
