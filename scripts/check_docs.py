"""Check the Markdown pages: every relative link leads somewhere, and no placeholder was left."""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)")
CODE_BLOCK = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
PLACEHOLDER = re.compile(r"^(?:\|.*\| )?([A-Z]+(?:_[A-Z]+)+)(?: \|)?$", re.MULTILINE)
HEADING = re.compile(r"^#+ +(.+?) *$", re.MULTILINE)


def find_pages(root: Path) -> list[Path]:
    """Return the project's Markdown pages: those at the root and all under docs."""
    return sorted([*root.glob("*.md"), *root.glob("docs/**/*.md")])


def check_page(page: Path) -> list[str]:
    """Return the page's faults.

    Args:
        page: A Markdown file.

    Returns:
        One message per dead link, as `file: link: what is missing`, and per line or last table cell
        that is nothing but a word such as FIGURE_HERE.
    """
    text = page.read_text(encoding="utf-8")
    faults = [f"{page}: {word}: is a placeholder" for word in PLACEHOLDER.findall(text)]
    for link in LINK.findall(CODE_BLOCK.sub("", text)):
        if re.match(r"[a-z]+:", link):
            continue
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        if not target.exists():
            faults.append(f"{page}: {link}: there is no {target}")
        elif anchor and anchor not in _anchors(target):
            faults.append(f"{page}: {link}: {target} has no such heading")
    return faults


def _anchors(page: Path) -> set[str]:
    """Return the headings in the form in which GitHub links to them."""
    headings = HEADING.findall(CODE_BLOCK.sub("", page.read_text(encoding="utf-8")))
    return {re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-") for text in headings}


def main() -> None:
    """Check all pages; exit with 1 and the list of faults if there is any."""
    pages = find_pages(ROOT)
    faults = [fault for page in pages for fault in check_page(page)]
    if faults:
        sys.exit("\n".join(faults))
    print(f"{len(pages)} pages, every link leads somewhere")


if __name__ == "__main__":
    main()
