"""The comparison with golden files itself."""

from __future__ import annotations

import pytest
from golden import UPDATE, check_golden, compare, describe, is_updating


def test_each_difference_is_one_readable_line():
    expected = {"same": 1, "gone": "str", "deep": {"kind": "int", "names": ["a", "b"]}}
    found = {"same": 1, "deep": {"kind": "float", "names": ["a", "c"]}, "new": [1]}
    assert list(compare(expected, found)) == [
        'changed: deep / kind: "int" became "float"',
        "removed: deep / names / b",
        "added:   deep / names / c",
        'removed: gone (was "str")',
        "added:   new = [1]",
    ]
    assert list(compare({"a": ["x", "y"]}, {"a": ["y", "x"]})) == [
        "changed: a: the order ['x', 'y'] became ['y', 'x']"
    ]
    assert list(compare({"a": 1}, {"a": True})) == ["changed: a: 1 became true"]
    assert list(compare(expected, expected)) == []


def test_a_description_holds_keys_and_types_without_values():
    assert describe({"a": 1, "b": [{"c": None}, {"c": 0.5, "d": "x"}]}) == {
        "a": "int",
        "b": [{"c": "float|null", "d?": "str"}],
    }
    assert describe([]) == []
    assert describe({"a": 1}, {"a": [True]}) == {"a": {"one of": ["int", ["bool"]]}}


def test_a_mismatch_fails_with_the_command_that_renews(monkeypatch):
    monkeypatch.delenv(UPDATE, raising=False)
    with pytest.raises(pytest.fail.Exception, match=rf"added:   no_key[^$]*{UPDATE}=1"):
        check_golden("errors", {"no_key": 1})


def test_renewing_is_refused_in_ci(monkeypatch):
    monkeypatch.setenv(UPDATE, "1")
    monkeypatch.setenv("CI", "true")
    with pytest.raises(pytest.fail.Exception, match="refused in CI"):
        is_updating()
