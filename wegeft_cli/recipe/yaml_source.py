"""Parse a YAML text into values and into nodes that know their positions."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from wegeft_cli.errors import UserError
from wegeft_cli.recipe.keys import KeyPath, format_key

_MISSING_MARK = "???"  # OmegaConf's mark for a missing value
_UNESCAPED = re.compile(r"(?<!\\)(?:\\\\)*\$\{")
_OWN_KEY = re.compile(r"\$\{\.*[A-Za-z_]\w*(?:\.\w+|\[\d+\])*\}")
NO_SPACE = re.compile(r"([A-Za-z_]\w*):([^\s:/]\S*)$")
"""A key and its value without a space between them, such as `r:4`."""
_LINE_WITHOUT_SPACE = re.compile(r"\s*(?:- )?([A-Za-z_]\w*):([^\s:/#]\S*)\s*(?:#.*)?$")
_TAG = "tag:yaml.org,2002:"
_SHAPES = ("map", "seq", "merge")
_SCALARS = ("str", "int", "float", "bool", "null", "timestamp")
_TAGS = {_TAG + name for name in _SHAPES + _SCALARS}


@dataclass(frozen=True)
class Document:
    """A YAML text: its values and their positions."""

    label: str
    """The file or the override, as messages name it."""
    values: Any
    """Plain dicts, lists and scalars; `${...}` is not resolved."""
    node: yaml.Node
    """The same as composed nodes, which know their lines."""
    has_lines: bool = True
    """False for an override, which has no lines."""
    failed_nodes: set[int] = field(default_factory=set)
    """Ids of the nodes with an error; their values are null."""

    def place(self, node: yaml.Node) -> str:
        """Return a node's position: `file:line:column`, or the override."""
        return _place(self.label, node.start_mark) if self.has_lines else self.label

    def has_error(self, node: yaml.Node) -> bool:
        """Return whether a node or a node inside it has an error."""
        failed = self.failed_nodes
        return bool(failed) and any(id(inner) in failed for inner in _walk(node, set()))


def read_document(
    text: str, label: str, faults: list[UserError], *, at: KeyPath = ()
) -> Document | None:
    """Parse one YAML document without its duplicate keys and unusable scalars, which are faults.

    An override passes the key that it sets as `at`; its text is a list of its one value, and its
    lines and columns mean nothing to the user. Return None if the text is not YAML, or neither a
    map nor an override's value.
    """
    has_lines = not at
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except (yaml.YAMLError, RecursionError) as error:
        faults.append(
            _find_typo(text, label, error)
            if has_lines and isinstance(error, yaml.MarkedYAMLError)
            else _translate(error, label, has_lines=has_lines)
        )
        return None
    if node is None or not (at or isinstance(node, yaml.MappingNode)):
        got = "nothing" if node is None else f"{node.value!r:.60}"
        got = "a list" if isinstance(node, yaml.SequenceNode) else got
        hint = "`wegeft recipes show quickstart` prints a recipe to start from"
        faults.append(UserError(f"expected a map of keys, got {got}", file=label, hint=hint))
        return None
    document = Document(label=label, values=None, node=node, has_lines=has_lines)
    before = len(faults)
    visited: set[int] = set()
    for root in node.value if at else [node]:
        _clean(document, root, at, faults, visited)
    # OmegaConf stops at its first error, so it gets the text without the faults found here.
    sound = text if len(faults) == before else yaml.serialize(node, Dumper=yaml.SafeDumper)
    try:
        values = OmegaConf.to_container(OmegaConf.create(sound))
    except (yaml.YAMLError, OmegaConfBaseException, ValueError, RecursionError) as error:
        faults.append(_translate(error, label, has_lines=has_lines))
        return None
    return Document(label, values, node, has_lines, document.failed_nodes)


def iterate_entries(node: yaml.Node) -> Iterator[tuple[yaml.Node, yaml.Node]]:
    """Yield the keys and values of a mapping node, those of `<<` merges last."""
    if not isinstance(node, yaml.MappingNode):
        return
    seen = set()
    for key, value in node.value:
        if key.tag != _TAG + "merge":
            seen.add(key.value)
            yield key, value
    for key, value in node.value:
        if key.tag == _TAG + "merge":
            merged = value.value if isinstance(value, yaml.SequenceNode) else [value]
            for source in merged:
                for entry in iterate_entries(source):
                    if entry[0].value not in seen:
                        seen.add(entry[0].value)
                        yield entry


@dataclass(frozen=True)
class Scalar:
    """A value of a YAML file of any schema: a scalar, or a node with a tag of its own."""

    key: str
    """The key of the nearest map entry that contains it."""
    value: str
    """Its text; empty for a map or a list."""
    tag: str | None
    """Its tag if that is not one of YAML's own, such as `!function`."""
    line: int


def list_scalars(content: bytes, label: str) -> Iterator[Scalar]:
    """Yield the scalars and tagged nodes of a YAML file, included under every alias.

    No value is constructed, so that no tag has an effect. Raise UserError if it is not YAML.
    """
    try:
        root = yaml.compose(content, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except (yaml.YAMLError, RecursionError, UnicodeDecodeError) as error:
        raise _translate(error, label, has_lines=True) from error
    visited: set[tuple[int, str]] = set()
    pending = [] if root is None else [("", root)]
    while pending:
        key, node = pending.pop()
        if (id(node), key) in visited:
            continue
        visited.add((id(node), key))
        is_core = node.tag.startswith(_TAG) and "python" not in node.tag
        is_scalar = isinstance(node, yaml.ScalarNode)
        if is_scalar or not is_core:
            tag = None if is_core else node.tag
            yield Scalar(key, node.value if is_scalar else "", tag, node.start_mark.line + 1)
        if isinstance(node, yaml.MappingNode):
            for name, value in node.value:
                pending += [(key, name), (str(name.value), value)]
        elif not is_scalar:
            pending += [(key, item) for item in node.value]


def has_interpolation(value: object) -> bool:
    """Return whether a value is a text with an unescaped `${`."""
    return isinstance(value, str) and _UNESCAPED.search(value) is not None


def _walk(node: yaml.Node, visited: set[int]) -> Iterator[yaml.Node]:
    if id(node) in visited:
        return
    visited.add(id(node))
    yield node
    for child in node.value if isinstance(node, yaml.CollectionNode) else ():
        for inner in child if isinstance(child, tuple) else (child,):
            yield from _walk(inner, visited)


def _clean(
    document: Document,
    node: yaml.Node,
    path: KeyPath,
    faults: list[UserError],
    visited: set[int],
) -> None:
    """Remove duplicate keys and unusable scalars from the tree; each node is visited once."""
    if id(node) in visited:
        return
    visited.add(id(node))
    if node.tag not in _TAGS:
        _blank_out(document, node, path, faults, f"the YAML tag `{node.tag}` is not supported")
    elif isinstance(node, yaml.MappingNode):
        _clean_keys(document, node, path, faults)
        for key, value in node.value:
            inner = path if key.tag == _TAG + "merge" else (*path, key.value)
            _clean(document, value, inner, faults, visited)
    elif isinstance(node, yaml.SequenceNode):
        for position, item in enumerate(node.value):
            _clean(document, item, (*path, position), faults, visited)
    elif node.tag == _TAG + "str":
        _clean_text(document, node, path, faults)


def _clean_keys(
    document: Document, node: yaml.MappingNode, path: KeyPath, faults: list[UserError]
) -> None:
    kept: dict[str, yaml.Node] = {}
    entries = []
    for key, value in node.value:
        text = key.value if isinstance(key, yaml.ScalarNode) else None
        fault = None
        if text is None or key.tag not in (_TAG + "str", _TAG + "merge"):
            shown = text if text is not None else "a list or map"
            fault = UserError(
                f"a key must be text, got {shown}",
                file=document.place(key),
                key=format_key(path) or None,
                hint=f'quote it: "{text}"' if text is not None else "write a plain name",
            )
        elif text in kept:
            first = document.place(kept[text])
            fault = UserError(
                "the key is set twice" + (f", first at {first}" if document.has_lines else ""),
                file=document.place(key),
                key=format_key((*path, text)),
                hint="keep one of the two",
            )
        if fault is not None:
            faults.append(fault)
            continue
        assert text is not None
        kept[text] = key
        entries.append((key, value))
    node.value[:] = entries


def _clean_text(
    document: Document, node: yaml.Node, path: KeyPath, faults: list[UserError]
) -> None:
    if node.value == _MISSING_MARK:
        _blank_out(document, node, path, faults, "`???` stands for a missing value")
    for match in _UNESCAPED.finditer(node.value):
        start = match.end() - 2
        if _OWN_KEY.match(node.value, start):
            continue
        hint = "write ${section.key}, or \\${ for the two characters themselves"
        if re.match(r"\$\{\s*oc\.env\b", node.value[start:]):
            hint = (
                "a run saves its recipe, which must not contain secrets; "
                "libraries read variables such as HF_TOKEN themselves"
            )
        _blank_out(
            document,
            node,
            path,
            faults,
            f"only the recipe's own keys can be referenced, got {node.value!r}",
            hint,
        )
        break


def _blank_out(
    document: Document,
    node: yaml.Node,
    path: KeyPath,
    faults: list[UserError],
    message: str,
    hint: str = "write a plain value",
) -> None:
    faults.append(
        UserError(message, file=document.place(node), key=format_key(path) or None, hint=hint)
    )
    document.failed_nodes.add(id(node))
    if isinstance(node, yaml.ScalarNode):
        node.tag, node.value = _TAG + "null", "null"
    else:
        node.tag = _TAG + ("map" if isinstance(node, yaml.MappingNode) else "seq")
        node.value = []


def _place(label: str, mark: yaml.Mark) -> str:
    return f"{label}:{mark.line + 1}:{mark.column + 1}"


def _find_typo(text: str, label: str, error: yaml.MarkedYAMLError) -> UserError:
    """Return the fault at the typo that a parser's error follows from, or the parser's own.

    The parser stops later: an open quote runs to the next quote or to the end of the file, and a
    key without a space after its colon is a text that continues on the next line.
    """
    if (quote := _find_open_quote(text)) is not None:
        message = "not valid YAML: a quote opens here and is not closed on this line"
        return UserError(message, file=_place(label, quote), hint="close the quote")
    mark = error.problem_mark or error.context_mark
    lines = text.splitlines()
    stop = len(lines) if mark is None else mark.line + 1
    for number in range(min(stop, len(lines)) - 1, max(stop - 4, -1), -1):
        typo = _LINE_WITHOUT_SPACE.match(lines[number])
        if typo is not None:
            place = f"{label}:{number + 1}:{typo.start(1) + 1}"
            message = f"not valid YAML: a space is missing after the colon of `{typo[1]}`"
            return UserError(message, file=place, hint=f"write `{typo[1]}: {typo[2]}`")
    return _translate(error, label, has_lines=True)


def _find_open_quote(text: str) -> yaml.Mark | None:
    """Return where the last quoted text before a syntax error opens, if it spans several lines."""
    opened = None
    try:
        for token in yaml.scan(text, Loader=yaml.SafeLoader):
            is_quoted = isinstance(token, yaml.ScalarToken) and token.style in ("'", '"')
            if is_quoted and token.start_mark.line != token.end_mark.line:
                opened = token.start_mark
    except yaml.MarkedYAMLError as error:
        if error.context == "while scanning a quoted scalar":
            return opened or error.context_mark
    return opened


def _translate(error: Exception, label: str, *, has_lines: bool) -> UserError:
    """Return the fault, with its position, for an exception of the YAML parser."""
    place, what, hint = label, str(error).splitlines()[0] if str(error) else "", None
    if isinstance(error, yaml.MarkedYAMLError):
        what = ": ".join(part for part in (error.context, error.problem) if part)
        mark = error.problem_mark or error.context_mark
        if has_lines and mark is not None:
            place = _place(label, mark)
    if isinstance(error, RecursionError):
        what = "nested too deeply"
    if place.partition(":")[0].endswith((".json", ".jsonl", ".csv")):
        hint = "a recipe is YAML: is this a data file? It belongs under `data.train`"
    elif "\\t" in what:
        hint = "indent with spaces, not tabs"
    elif "mapping values are not allowed" in what or "found character" in what:
        hint = "quote a text that contains `: ` or begins with one of * & ! % @ `"
    return UserError(f"not valid YAML: {what}", file=place, hint=hint)
