"""The one build step that pyproject.toml cannot tell: recipes/ goes into the wheel as package data.

A checkout and an editable install read recipes/ itself (wegeft_cli/recipe/catalog.py).
"""

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

RECIPES = sorted([*Path("recipes").glob("*.yaml"), Path("recipes/recipe.schema.json")])


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


setup(cmdclass={"build_py": BuildWithRecipes})
