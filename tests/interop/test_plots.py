"""A sweep is drawn where matplotlib is there, and the rest goes on where it is not."""

from __future__ import annotations

import struct
import sys

import pytest

from wegeft_cli.runs.sweep_plot import draw_sweep

NUMBERS = [{"train.learning_rate": 10.0**-n, "adapter.share": s} for n in (3, 4) for s in "ab"]
WORDS = [
    {"adapter.share": "a", "adapter.peft": {"x": 1}},
    {"adapter.share": "b", "adapter.peft": {}},
]
DOTS = [(1.0, 0.1), (2.0, None), None, (3.0, 0.0)]


def read_size(picture: bytes) -> tuple[int, int]:
    assert picture.startswith(b"\x89PNG\r\n")
    return struct.unpack(">II", picture[16:24])


@pytest.mark.parametrize(
    ("values", "points"),
    [(NUMBERS, DOTS), (WORDS, DOTS[:2]), ([{}], DOTS[:1]), ([{"seed": None}], DOTS[:1])],
)
def test_each_figure_is_a_panel(values, points):
    pytest.importorskip("matplotlib")
    one = draw_sweep(values, {"final_loss": points})
    two = draw_sweep(values, {"final_loss": points, "empty": [None] * len(points), "b": points})
    assert one is not None
    assert two is not None
    assert read_size(two)[0] == 2 * read_size(one)[0]


def test_nothing_to_draw():
    assert draw_sweep(NUMBERS, {"final_loss": [None] * 4}) is None
    assert draw_sweep(NUMBERS, {}) is None


def test_without_matplotlib(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_agg", None)
    assert draw_sweep(NUMBERS, {"final_loss": DOTS}) is None
