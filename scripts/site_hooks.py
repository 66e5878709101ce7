"""Hooks of MkDocs: pages that come from the root of the repository, the API page, diagrams.

The Markdown pages stay as GitHub shows them. The site adds what it needs in memory:

- CONTRIBUTING.md and CHANGELOG.md, with their links adjusted;
- an index of the decisions;
- the API page, from the names that `wegeft_cli` exports;
- each Mermaid flowchart as an SVG, because Material loads Mermaid from the network.
"""

from __future__ import annotations

import html
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

import wegeft_cli

ROOT = Path(__file__).resolve().parent.parent
MERMAID = re.compile(r"^```mermaid\n(.*?)^```$", re.MULTILINE | re.DOTALL)
NODE = re.compile(r'(\w+)(?:\["([^"]+)"\])?')
ARROW = re.compile(r' --(?: "([^"]+)" --)?> ')
ROOT_PAGES = {"CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}

API_HEAD = """# API

Every name that `wegeft_cli` exports. [The method in Python](python.md) shows them in use.

"""
# Heading -> names; a name that is in none of them is listed under the last one.
API_GROUPS = {
    "The commands as functions": [
        *("train", "sweep", "merge", "evaluate", "generate", "plan", "preview", "load_recipe"),
        *("inspect", "ablate", "edit", "report"),
    ],
    "Generators on a model": [
        *("inject_generators", "get_generators", "use_generators", "disable_generators"),
        *("remove_generators", "fold_generators", "unfold_generators"),
        *("save_adapter", "load_adapter"),
    ],
    "Errors": ["UserError", "MachineError"],
    "More": [],
}


def write_api_page() -> str:
    """Return the API page: one directive of mkdocstrings for each exported name."""
    grouped = {name for names in API_GROUPS.values() for name in names}
    groups = {heading: list(names) for heading, names in API_GROUPS.items()}
    groups["More"] = [n for n in wegeft_cli.__all__ if n not in grouped and n != "__version__"]
    parts = [API_HEAD]
    for heading, names in groups.items():
        if names:
            parts.append(f"## {heading}\n\n")
            parts += [f"::: {find_home(name)}\n\n" for name in names]
    parts.append("## WeGeFT as a PEFT method\n\n::: wegeft_cli.interop.peft.WegeftConfig\n\n")
    parts.append("## The equations\n\n::: wegeft_cli.methods.wegeft.equations\n")
    return "".join(parts)


def find_home(name: str) -> str:
    """Return the dotted path of an exported name where it is defined."""
    return f"{wegeft_cli._HOMES.get(name, 'wegeft_cli.errors')}.{name}"


def write_decisions_page(folder: Path) -> str:
    """Return the list of the decisions by number."""
    lines = ["# Decisions\n\nEach page records one choice: context, choice, consequence.\n"]
    for page in sorted(folder.glob("0*.md")):
        title = page.read_text(encoding="utf-8").partition("\n")[0].removeprefix("# ")
        number, _, name = title.partition(". ")
        lines.append(f"- {number}: [{name}]({page.name})")
    return "\n".join(lines) + "\n"


def adjust_links(text: str) -> str:
    """Return a page of the repository's root with its links as seen from the docs folder."""
    text = re.sub(r"\]\(docs/decisions/?\)", "](decisions/index.md)", text)
    text = text.replace("](docs/", "](")
    for name, page in ROOT_PAGES.items():
        text = text.replace(f"]({name}", f"]({page}")
    return text


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that are not in the docs folder."""
    docs = Path(config["docs_dir"])
    pages = {
        page: adjust_links((ROOT / name).read_text(encoding="utf-8"))
        for name, page in ROOT_PAGES.items()
    }
    pages["api.md"] = write_api_page()
    pages["decisions/index.md"] = write_decisions_page(docs / "decisions")
    for page, text in pages.items():
        files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Adjust links that leave the docs folder, and draw the flowcharts."""
    for name, page in ROOT_PAGES.items():
        markdown = markdown.replace(f"](../{name}", f"]({page}")
    markdown = markdown.replace("](decisions)", "](decisions/index.md)")
    return MERMAID.sub(lambda found: draw_flowchart(found[1]), markdown)


# --- Flowcharts -----------------------------------------------------------------------------------

BOX_HEIGHT, ROW, GAP, CHARACTER, MARGIN = 30, 62, 24, 7.4, 8


def place_nodes(edges: list[tuple[str, str, str]], nodes: dict[str, str]) -> dict[str, int]:
    """Return each node's row: the longest path that leads to it."""
    rows = dict.fromkeys(nodes, 0)
    for _ in nodes:
        for start, _label, end in edges:
            rows[end] = max(rows[end], rows[start] + 1)
    return rows


def read_flowchart(source: str) -> tuple[dict[str, str], list[tuple[str, str, str]]]:
    """Return the boxes of a flowchart, name -> text, and its arrows: start, label, end."""
    nodes: dict[str, str] = {}
    edges = []
    for line in source.splitlines()[1:]:
        hops = ARROW.split(line.strip())
        groups = [NODE.findall(hop) for hop in hops[::2]]
        for name, text in (node for group in groups for node in group):
            nodes[name] = text or nodes.get(name, name)
        for label, starts, ends in zip(hops[1::2], groups, groups[1:], strict=False):
            edges += [(start, label or "", end) for start, _ in starts for end, _ in ends]
    return nodes, edges


def draw_flowchart(source: str) -> str:
    """Return a Mermaid flowchart (`flowchart TD`, boxes and labeled arrows) as an SVG."""
    nodes, edges = read_flowchart(source)
    rows = place_nodes(edges, nodes)
    widths = {name: len(text) * CHARACTER + 20 for name, text in nodes.items()}
    by_row = [[n for n in nodes if rows[n] == row] for row in range(max(rows.values()) + 1)]
    totals = [sum(widths[n] for n in names) + GAP * (len(names) - 1) for names in by_row]
    width = max(totals) + 2 * MARGIN
    corners = {}
    for row, (names, total) in enumerate(zip(by_row, totals, strict=True)):
        left = (width - total) / 2
        for name in names:
            corners[name] = (left, MARGIN + row * ROW)
            left += widths[name] + GAP
    height = MARGIN * 2 + (len(by_row) - 1) * ROW + BOX_HEIGHT
    parts = [
        f'<svg class="diagram" role="img" width="{width:.0f}" height="{height}"'
        f' viewBox="0 0 {width:.0f} {height}" xmlns="http://www.w3.org/2000/svg"'
        ' font-family="monospace" font-size="12" fill="currentColor" stroke="none">'
    ]
    parts += [draw_arrow(corners, widths, *edge) for edge in edges]
    for name, (left, top) in corners.items():
        parts.append(
            f'<rect x="{left:.0f}" y="{top}" width="{widths[name]:.0f}" height="{BOX_HEIGHT}"'
            ' rx="4" fill="var(--md-code-bg-color)" stroke="currentColor" stroke-opacity="0.5"/>'
            f'<text x="{left + widths[name] / 2:.0f}" y="{top + 19}" text-anchor="middle">'
            f"{html.escape(nodes[name])}</text>"
        )
    return "".join(parts) + "</svg>\n"


def draw_arrow(
    corners: dict[str, tuple[float, int]],
    widths: dict[str, float],
    start: str,
    label: str,
    end: str,
) -> str:
    """Return one arrow from the lower edge of a box to the upper edge of another."""
    x1, y1 = corners[start][0] + widths[start] / 2, corners[start][1] + BOX_HEIGHT
    x2, y2 = corners[end][0] + widths[end] / 2, corners[end][1]
    middle = (y1 + y2) / 2
    line = (
        f'<path d="M{x1:.0f},{y1} C{x1:.0f},{middle:.0f} {x2:.0f},{middle:.0f} {x2:.0f},{y2 - 5}"'
        ' fill="none" stroke="currentColor" stroke-opacity="0.7"/>'
        f'<path d="M{x2 - 4:.0f},{y2 - 6} h8 l-4,6 z"/>'
    )
    if label:
        line += (
            f'<text x="{(x1 + x2) / 2 + 6:.0f}" y="{middle + 4:.0f}" font-size="11"'
            f' font-style="italic">{html.escape(label)}</text>'
        )
    return line
