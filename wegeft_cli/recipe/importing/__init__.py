"""Conversion of other tools' recipes, one module per tool: `wegeft recipes import`."""
