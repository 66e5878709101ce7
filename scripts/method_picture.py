"""Draw docs/images/method.svg, the picture of the method in README.md and docs/method.md.

python scripts/method_picture.py           # writes it
python scripts/method_picture.py --check   # exit 1 if the file differs

The picture has its own background and follows the reader's color scheme.
"""

from __future__ import annotations

import sys
from pathlib import Path

PICTURE = Path(__file__).resolve().parent.parent / "docs" / "images" / "method.svg"
WIDTH, HEIGHT = 840, 330

STYLE = """
svg { font-family: system-ui, -apple-system, "Segoe UI", Helvetica, Arial, sans-serif; }
.back { fill: #ffffff; stroke: #d5dbe1; }
.text { fill: #1c2530; font-size: 15px; }
.small { fill: #566270; font-size: 13px; }
.math { font-family: Georgia, "Times New Roman", serif; font-style: italic; font-size: 18px; }
.frozen { fill: #e6eaee; stroke: #76838f; }
.trained { fill: #bfe8dd; stroke: #00806a; }
.on-trained { fill: #00382e; }
.line { stroke: #566270; fill: none; stroke-width: 1.6; }
.dash { stroke: #00806a; fill: none; stroke-width: 1.6; stroke-dasharray: 5 4; }
.tip { fill: #566270; }
.tip-trained { fill: #00806a; }
@media (prefers-color-scheme: dark) {
  .back { fill: #161b22; stroke: #343c46; }
  .text { fill: #e6edf3; }
  .small { fill: #a7b1bc; }
  .frozen { fill: #2c343d; stroke: #8b97a3; }
  .trained { fill: #00604f; stroke: #4fd1b3; }
  .on-trained { fill: #dcfff6; }
  .line { stroke: #a7b1bc; }
  .dash { stroke: #4fd1b3; }
  .tip { fill: #a7b1bc; }
  .tip-trained { fill: #4fd1b3; }
}
"""


def draw_box(kind: str, x: int, y: int, width: int, height: int) -> str:
    """Return a rectangle with round corners."""
    return f'<rect class="{kind}" x="{x}" y="{y}" width="{width}" height="{height}" rx="5"/>'


def draw_text(kind: str, x: int, y: int, text: str, anchor: str = "middle") -> str:
    """Return a line of text."""
    return f'<text class="{kind}" x="{x}" y="{y}" text-anchor="{anchor}">{text}</text>'


def draw_arrow(x1: int, y1: int, x2: int, y2: int, kind: str = "line") -> str:
    """Return an arrow that ends horizontally or vertically."""
    tip = "tip" if kind == "line" else "tip-trained"
    if y1 == y2:
        head = f"M{x2},{y2} l-8,-4 v8 z"
        path = f"M{x1},{y1} H{x2 - 7}"
    else:
        head = f"M{x2},{y2} l-8,-4 v8 z"
        path = f"M{x1},{y1} C{x1 + 45},{y1} {x2 - 50},{y2} {x2 - 7},{y2}"
    return f'<path class="{kind}" d="{path}"/><path class="{tip}" d="{head}"/>'


def draw_layer() -> list[str]:
    """Return the left half: the path of an input through one adapted layer."""
    return [
        draw_text("text", 24, 34, "One adapted layer", "start"),
        draw_text("text math", 38, 176, "x"),
        draw_arrow(52, 170, 252, 170),
        '<path class="line" d="M70,170 V100 H85"/><path class="tip" d="M92,100 l-8,-4 v8 z"/>',
        draw_box("trained", 92, 84, 62, 32),
        draw_text("text on-trained math", 123, 106, "ψ"),
        draw_arrow(154, 100, 176, 100),
        draw_box("trained", 176, 84, 62, 32),
        draw_text("text on-trained math", 207, 106, "φ"),
        draw_text("small", 123, 74, "d → r"),
        draw_text("small", 207, 74, "r → d"),
        '<path class="line" d="M238,100 H264 V150"/><path class="tip" d="M264,158 l-4,-8 h8 z"/>',
        draw_text("small", 280, 132, "&#215; s", "start"),
        '<circle class="line" cx="264" cy="170" r="11"/>',
        '<path class="line" d="M258,170 H270 M264,164 V176"/>',
        draw_arrow(275, 170, 306, 170),
        draw_box("frozen", 306, 132, 76, 76),
        draw_text("text math", 344, 170, "W"),
        draw_text("small", 344, 192, "frozen"),
        draw_arrow(382, 170, 412, 170),
        draw_text("text math", 424, 175, "y"),
        draw_text("text math", 214, 256, "W&#8242; = W ( I + s φ ψ )"),
        draw_text("small", 214, 282, "The change s W φ ψ is generated from W itself."),
        draw_text("small", 214, 302, "Only φ and ψ are trained."),
    ]


def draw_sharing() -> list[str]:
    """Return the right half: one pair of factors for all layers of a kind."""
    parts = [
        draw_text("text", 478, 34, "All layers of a kind share one pair", "start"),
        draw_box("trained", 496, 126, 112, 62),
        draw_text("text on-trained math", 552, 153, "φ, ψ"),
        draw_text("small on-trained", 552, 175, "of q_proj"),
    ]
    for y, name in ((62, "layer 0"), (122, "layer 1"), (214, "layer L - 1")):
        parts += [
            draw_arrow(608, 157, 688, y + 22, "dash"),
            draw_box("frozen", 688, y, 128, 44),
            draw_text("text math", 712, y + 28, "W"),
            draw_text("small", 728, y + 27, name, "start"),
        ]
    parts += [
        draw_text("text", 752, 196, "⋮"),
        draw_text("small", 650, 282, "2 r d trained parameters for each kind,"),
        draw_text("small", 650, 302, "independent of depth; each layer's change differs."),
    ]
    return parts


def draw_picture() -> str:
    """Return the whole SVG."""
    label = (
        "An input x passes psi and phi, is scaled by s, added to itself and multiplied by the"
        " frozen weight W. All layers of a kind share one pair of factors."
    )
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}"'
        f' viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">',
        f"<style>{STYLE}</style>",
        f'<rect class="back" x="0.5" y="0.5" width="{WIDTH - 1}" height="{HEIGHT - 1}" rx="8"/>',
        '<path class="line" stroke-opacity="0.35" d="M452,24 V306"/>',
        *draw_layer(),
        *draw_sharing(),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def main() -> int:
    """Write or check the picture."""
    picture = draw_picture()
    if "--check" not in sys.argv:
        PICTURE.write_text(picture, encoding="utf-8")
    elif not PICTURE.is_file() or PICTURE.read_text(encoding="utf-8") != picture:
        print("docs/images/method.svg differs: run scripts/method_picture.py")
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
