"""The two build steps that pyproject.toml cannot express.

recipes/ goes into the wheel as package data: a checkout and an editable install read recipes/
itself (wegeft_cli/recipe/catalog.py). The description for a package index is README.md without its
pictures and relative links, which an index cannot show.
"""

import re
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

RECIPES = sorted([*Path("recipes").glob("*.yaml"), Path("recipes/recipe.schema.json")])
RELATIVE_LINK = re.compile(r"(!?)\[([^\]]*)\]\((?!https?:|#)[^)]*\)")


class BuildWithRecipes(build_py):
    """Copies the recipes and their JSON Schema to wegeft_cli/shipped/ in the wheel."""

    def run(self) -> None:
        """Build the packages, then add the recipes."""
        super().run()
        if self.editable_mode:
            return
        folder = Path(self.build_lib, "wegeft_cli", "shipped")
        self.mkpath(str(folder))
        for recipe in RECIPES:
            self.copy_file(str(recipe), str(folder / recipe.name))

    def get_source_files(self) -> list[str]:
        """Name the recipes as sources too, so that an sdist holds them."""
        return [*super().get_source_files(), *map(str, RECIPES)]


def describe() -> str:
    """Return README.md with the text of each relative link in its place, without pictures."""
    text = Path("README.md").read_text(encoding="utf-8")
    return RELATIVE_LINK.sub(lambda found: "" if found[1] else found[2], text)


setup(
    cmdclass={"build_py": BuildWithRecipes},
    long_description=describe(),
    long_description_content_type="text/markdown",
)
