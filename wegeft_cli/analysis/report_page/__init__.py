"""The page of `wegeft report`: template, style, script and charts."""
