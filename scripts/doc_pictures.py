"""Draw the pictures of docs/inspect.md and docs/report.md from the runs of quickstart and digits.

Needs `make quickstart` and `make digits` first, the extras `plot` and `report`, and for the report
Chromium with the Python package playwright (extra `dev`). An ablation is drawn where the run's
folder holds ablation-group.json:

    wegeft inspect runs/quickstart --ablate group --limit 40 -o runs/quickstart/ablation-group.json
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from pathlib import Path

from PIL import Image

from wegeft_cli import edit, inspect, report
from wegeft_cli.analysis.plots import draw_ablation

COLOURS = 256  # of a picture's palette: a chart needs no more, and the repository stays small
SHOTS = {
    "report-light": ((1100, 850), "light", "summary"),
    "report-dark": ((1100, 850), "dark", "learned"),
    "report-phone": ((390, 800), "light", "curves"),
}


def write_png(picture: Image.Image, path: Path) -> None:
    """Write a small PNG."""
    picture.convert("RGB").quantize(COLOURS).save(path, optimize=True)


def draw_inspection(run: Path, output: Path, work: Path) -> None:
    """Inspect the run's adapter, beside one without the first half of q_proj's directions."""
    half = [f"direction:q_proj:{number}" for number in range(32)]
    other = edit(run, drop=half, scale={"layer:15-29": 0.25}, output=work / "edited").output_dir
    inspect(run, against=other, plots=work / "plots", num_directions=0)
    for name in ("changes", "spectra", "cosines", "against"):
        with Image.open(work / "plots" / f"{name}.png") as picture:
            write_png(picture, output / f"inspect-{name}.png")
    kept = run / "ablation-group.json"
    if kept.is_file():
        (work / "ablation.png").write_bytes(draw_ablation(json.loads(kept.read_text())))
        with Image.open(work / "ablation.png") as picture:
            write_png(picture, output / "inspect-ablation.png")


def draw_maps(run: Path, image: Path, output: Path, work: Path) -> None:
    """Draw the maps of the digits' classifier over one image."""
    inspect(run, images=[image], plots=work / "maps", num_directions=0)
    with Image.open(work / "maps" / "maps-0.png") as drawn:
        write_png(drawn, output / "inspect-maps.png")


def draw_report(run: Path, output: Path, work: Path) -> None:
    """Photograph the report's page in Chromium."""
    from playwright.sync_api import sync_playwright

    page_path = report([run], output=work / "report.html").output
    with sync_playwright() as playwright:
        for name, ((width, height), scheme, section) in SHOTS.items():
            browser = playwright.chromium.launch(
                executable_path=shutil.which("chromium"), args=["--no-sandbox", "--disable-gpu"]
            )
            page = browser.new_page(
                viewport={"width": width, "height": height}, color_scheme=scheme
            )
            page.goto(page_path.as_uri())
            page.wait_for_function("document.documentElement.dataset.charts !== undefined")
            page.evaluate(f"document.getElementById('{section}').scrollIntoView()")
            page.wait_for_timeout(1000)
            page.screenshot(path=work / f"{name}.png")
            browser.close()
            with Image.open(work / f"{name}.png") as picture:
                write_png(picture, output / f"{name}.png")


def main() -> None:
    """Draw all of them."""
    parser = argparse.ArgumentParser(description="Draw the pictures of the pages.")
    parser.add_argument("--run", type=Path, default=Path("runs/quickstart"))
    parser.add_argument("--digits", type=Path, default=Path("runs/vit_digits"))
    parser.add_argument("--images", type=Path, default=Path(".cache/digits/images/test"))
    parser.add_argument("--maps-only", action="store_true", help="no run of the quickstart needed")
    parser.add_argument("--output", type=Path, default=Path("docs/images"))
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        (image,) = sorted(arguments.images.glob("8/*.png"))[:1]
        draw_maps(arguments.digits, image, arguments.output, work)
        if arguments.maps_only:
            return
        draw_inspection(arguments.run, arguments.output, work)
        draw_report(arguments.run, arguments.output, work)
    for path in sorted(arguments.output.glob("*.png")):
        print(f"{path}: {path.stat().st_size / 1024:.0f} KiB")


if __name__ == "__main__":
    main()
