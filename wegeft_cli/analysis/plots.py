"""Plots of `wegeft inspect` and of ablations, drawn by matplotlib."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

_DPI = 110
_MAPS_ACROSS = 8


def draw_inspection(result: Mapping[str, Any]) -> dict[str, bytes]:
    """Draw the result of `inspect`: name -> PNG bytes.

    The plots are changes (size, novelty and rank by layer), spectra, cosines, against if a second
    adapter was given, and the maps of each image.
    """
    pictures = {
        "changes": _draw_changes(result["modules"], result["top_k"]),
        "spectra": _draw_spectra(result["modules"]),
    }
    if result["cosines"]:
        pictures["cosines"] = _draw_cosines(result["cosines"])
    if "against" in result:
        pictures["against"] = _draw_against(result["against"]["modules"])
    for number, maps in enumerate(result.get("maps", ())):
        pictures[f"maps-{number}"] = _draw_maps(maps)
    return pictures


def draw_ablation(result: Mapping[str, Any]) -> bytes:
    """Draw the change of a score without each part as PNG bytes, the largest loss on top."""
    parts = list(reversed(result["parts"]))
    figure = _make_figure(7, 1.2 + 0.26 * len(parts))
    axes = figure.add_subplot()
    changes = [100 * row["change"] for row in parts]
    colours = ["tab:red" if change < 0 else "tab:blue" for change in changes]
    axes.barh(range(len(parts)), changes, color=colours)
    axes.set_yticks(range(len(parts)), [row["part"] for row in parts], fontsize="small")
    axes.axvline(0, color="black", linewidth=0.8)
    whole, base = result["whole"], result["base"]
    axes.axvline(100 * (base["score"] - whole["score"]), color="gray", linestyle="--", label="base")
    axes.set_xlabel(f"change of {whole['task']} without the part, points of 100")
    axes.set_title(f"whole adapter {whole['score']:.1%}, base {base['score']:.1%}, n {whole['n']}")
    axes.legend(fontsize="small")
    return _to_png(figure)


def _draw_changes(modules: Sequence[Mapping[str, Any]], top_k: int) -> bytes:
    figure = _make_figure(12, 3.6)
    panels = (
        ("relative_change", "||dW|| / ||W||"),
        ("novel", f"share outside W's {top_k} leading directions"),
        ("effective_rank", "effective rank"),
    )
    for place, (key, title) in enumerate(panels, start=1):
        axes = figure.add_subplot(1, len(panels), place)
        for kind, rows in _by_kind(modules).items():
            axes.plot(
                [_place(row, number) for number, row in enumerate(rows)],
                [row[key] for row in rows],
                marker=".",
                label=kind,
            )
        axes.set_title(title, fontsize="medium")
        axes.set_xlabel("layer")
        axes.set_ylim(bottom=0)
        if place == 1:
            axes.legend(fontsize="small")
    return _to_png(figure)


def _draw_spectra(modules: Sequence[Mapping[str, Any]]) -> bytes:
    from matplotlib import colormaps

    kinds = _by_kind(modules)
    figure = _make_figure(3.2 * len(kinds), 3.2)
    for place, (kind, rows) in enumerate(kinds.items(), start=1):
        axes = figure.add_subplot(1, len(kinds), place)
        for number, row in enumerate(rows):
            values = [value for value in row["singular_values"] if value > 0]
            colour = colormaps["viridis"](number / max(1, len(rows) - 1))
            axes.semilogy(range(1, len(values) + 1), values, color=colour, linewidth=0.9)
        axes.set_title(kind, fontsize="medium")
        axes.set_xlabel("singular value of dW")
    return _to_png(figure)


def _draw_cosines(cosines: Sequence[Mapping[str, Any]]) -> bytes:
    figure = _make_figure(3.4 * len(cosines), 3.2)
    for place, found in enumerate(cosines, start=1):
        axes = figure.add_subplot(1, len(cosines), place)
        image = axes.imshow(found["matrix"], vmin=-1, vmax=1, cmap="RdBu")
        axes.set_title(f"{found['kind']}: cosine of dW", fontsize="medium")
        axes.set_xlabel("layer")
        figure.colorbar(image, ax=axes, shrink=0.8)
    return _to_png(figure)


def _draw_against(modules: Sequence[Mapping[str, Any]]) -> bytes:
    figure = _make_figure(9, 3.6)
    panels = (
        ("cosine", "cosine of the two changes", (-1.05, 1.05)),
        ("overlap", "overlap of their output spaces", (-0.05, 1.05)),
    )
    for place, (key, title, limits) in enumerate(panels, start=1):
        axes = figure.add_subplot(1, 2, place)
        for kind, rows in _by_kind(modules).items():
            along = [_place(row, number) for number, row in enumerate(rows)]
            axes.plot(along, [row[key] for row in rows], marker=".", label=kind)
        axes.set_title(title, fontsize="medium")
        axes.set_xlabel("layer")
        axes.set_ylim(*limits)
        if place == 1:
            axes.legend(fontsize="small")
    return _to_png(figure)


def _draw_maps(maps: Mapping[str, Any]) -> bytes:
    """Draw an image and the maps of each module's directions over it."""
    from matplotlib.image import imread

    rows = [module for module in maps["modules"] if module["maps"]]
    if not rows:
        return _to_png(_make_figure(1, 1))
    thumbnail = base64.b64decode(maps["thumbnail"].partition(",")[2])
    pixels = imread(io.BytesIO(thumbnail), format="png")
    height, width = pixels.shape[:2]
    grey = pixels if pixels.ndim == 2 else pixels[..., :3].mean(axis=-1)
    place = (-0.5, width - 0.5, height - 0.5, -0.5)  # aligns a map's patches with their pixels
    most = max(len(module["maps"]) for module in rows)
    across = min(_MAPS_ACROSS, most)
    figure = _make_figure(1.3 * (across + 1), 1.45 * len(rows) + 0.25)
    for line, module in enumerate(rows):
        axes = figure.add_subplot(len(rows), across + 1, line * (across + 1) + 1)
        axes.imshow(pixels, cmap="gray", vmin=0, vmax=1)
        axes.set_title(f"{module['label']}", fontsize=5)
        axes.set_axis_off()
        for number, values in enumerate(module["maps"][:across]):
            axes = figure.add_subplot(len(rows), across + 1, line * (across + 1) + number + 2)
            axes.imshow(0.5 * grey, cmap="gray", vmin=0, vmax=1)
            # Values below the cut are transparent.
            heat = [[value or math.nan for value in row] for row in values]
            axes.imshow(heat, vmin=0, vmax=1, cmap="magma", alpha=0.75, extent=place)
            axes.set_title(str(number), fontsize=5)
            axes.set_axis_off()
    figure.suptitle(
        f"directions 0 to {across - 1} of {most}; colored: one half and more of a map's range",
        fontsize=7,
    )
    return _to_png(figure)


def _by_kind(modules: Sequence[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    kinds: dict[str, list[Mapping[str, Any]]] = {}
    for row in modules:
        kinds.setdefault(row["kind"], []).append(row)
    return kinds


def _place(row: Mapping[str, Any], number: int) -> int:
    return number if row["layer"] is None else int(row["layer"])


def _make_figure(width: float, height: float) -> Any:
    # Not pyplot: it would choose a backend for the whole process, and may want a screen.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=_DPI, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _to_png(figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()
