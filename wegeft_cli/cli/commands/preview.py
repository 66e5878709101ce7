"""`wegeft preview`: rows as tokens, with what is learned of them, before anything is trained."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from wegeft_cli.cli.arguments import JsonOption, OverridesArgument, RecipeArgument
from wegeft_cli.cli.console import RichReporter, get_console, print_json, show

if TYPE_CHECKING:
    from rich.text import Text

    from wegeft_cli.planning.preview import Preview
    from wegeft_cli.planning.row_viewer import PreviewRow, TokenPiece

_LEARNED = ("green3", "spring_green3")  # in turn, so that tokens can be told apart
_READ = ("default", "dim")  # greys are lost on one ground or the other
_SPECIAL = "bold cyan"
_LEARNED_SPECIAL = "bold black on green3"
_MERGED = "black on yellow"
_BAR_WIDTH = 40
_FATES = {
    "empty": "left out: its completion is empty",
    "unmarked": "left out: its answers are all marked as not learned",
    "cut_away": "left out: its completion begins behind data.max_length",
    "too_long": "left out: too long by its corpus's rule",
}
_SETTINGS = {
    "none": "rows as they are drawn",
    "group_by_length": "train.group_by_length: true",
    "packing": "data.packing: bfd",
}


def preview(
    recipe: RecipeArgument,
    overrides: OverridesArgument = None,
    rows: Annotated[
        int,
        typer.Option(
            "--rows", metavar="N", min=0, help="So many first rows of each source, or class."
        ),
    ] = 2,
    row: Annotated[
        int | None,
        typer.Option(
            "--row",
            metavar="INDEX",
            min=0,
            help="This row of the training set alone, counted from 0 over all sources.",
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Show rows as the model reads them, and statistics of all rows, without weights."""
    from wegeft_cli.planning.class_preview import ClassPreview
    from wegeft_cli.planning.preview import preview as run

    result = run(recipe, overrides or [], num_rows=rows, row=row, reporter=RichReporter())
    if as_json:
        print_json(result.to_json())
        return
    if isinstance(result, ClassPreview):
        from wegeft_cli.cli.class_preview import print_classes

        print_classes(result)
        return
    has_colours = _has_colours()
    if result.rows:
        show(_draw_legend(has_colours))
    for each in result.rows:
        show("")
        show(_title(each), style="bold", highlight=False, soft_wrap=True)
        if each.tokens:
            show(draw_tokens(each.tokens, has_colours), soft_wrap=not has_colours)
    show("")
    _show_sources(result)
    _show_figures(result)


def draw_tokens(tokens: list[TokenPiece], has_colours: bool) -> Text:
    """Draw a row's tokens: by colours, or where there are none by marks.

    Args:
        tokens: The row's tokens.
        has_colours: Whether colours show what is learned; else ⟦ ⟧ stand around it.

    Returns:
        The text, with line ends and control characters made visible.
    """
    from rich.text import Text

    text = Text()
    learned = False
    for number, token in enumerate(tokens):
        if not has_colours and token.learned != learned:
            text.append("⟦" if token.learned else "⟧")
        learned = token.learned
        piece = _make_visible(token.text)
        if has_colours:
            text.append(piece, style=_find_style(token, number))
        else:
            text.append(f"⟪{piece}⟫" if token.merged else piece)
    if learned and not has_colours:
        text.append("⟧")
    return text


def _find_style(token: TokenPiece, number: int) -> str:
    if token.merged:
        return _MERGED
    if token.special:
        return _LEARNED_SPECIAL if token.learned else _SPECIAL
    return (_LEARNED if token.learned else _READ)[number % 2]


def _make_visible(text: str) -> str:
    """Show line ends, and what would steer the terminal, as signs."""
    shown = "".join(
        chr(0x2400 + ord(sign)) if ord(sign) < 32 and sign != "\n" else sign for sign in text
    )
    return shown.replace("\x7f", "\u2421").replace("\x9b", "\u241b").replace("\n", "↵\n")


def _has_colours() -> bool:
    console = get_console()
    return bool(console.is_terminal and console.color_system and not console.no_color)


def _draw_legend(has_colours: bool) -> Text:
    from rich.text import Text

    if not has_colours:
        return Text("⟦learned⟧ read only, ⟪joins both⟫, ↵ end of line")
    return Text.assemble(
        ("learned", _LEARNED[0]),
        " ",
        ("token by token", _LEARNED[1]),
        "  ",
        ("read only", _READ[0]),
        "  ",
        ("special", _SPECIAL),
        " ",
        ("learned", _LEARNED_SPECIAL),
        "  ",
        ("joins prompt and answer", _MERGED),
    )


def _title(row: PreviewRow) -> str:
    if row.fate in _FATES:
        return f"{row.place}  {_FATES[row.fate]}"
    learned = sum(token.learned for token in row.tokens)
    title = f"{row.place}  row {row.number}: {len(row.tokens)} tokens, {learned} learned"
    if row.is_truncated:
        title += f", cut from {row.num_tokens}" if row.num_tokens else ", cut"
    return title + (", prompt and answer joined in a token" if row.is_merged else "")


def _show_sources(result: Preview) -> None:
    from rich.box import SIMPLE
    from rich.table import Table

    fates = {
        "num_truncated": "cut",
        "num_empty": "empty",
        "num_unmarked": "unmarked",
        "num_cut_away": "cut away",
        "num_filtered": "filtered",
        "num_boundary_merged": "joined",
    }
    # A fate that no row had is no column: a narrow terminal has no room for all of them.
    met = {n: title for n, title in fates.items() if any(s[n] for s in result.sources)}
    columns = {"num_rows": "rows", **met}
    table = Table("source", *columns.values(), "template", box=SIMPLE)
    for column in table.columns[1:-1]:
        column.justify = "right"
    for source in result.sources:
        template = f"{source['template']} {source['template_hash']}"
        counts = (f"{source[name]:,}" for name in columns)
        table.add_row(plain(source["path"]), *counts, plain(template))
    show(table)


def plain(text: str) -> Text:
    """Give a text from outside as it is: no markup, control characters made visible."""
    from rich.text import Text

    return Text(_make_visible(text), overflow="fold")


def _show_figures(result: Preview) -> None:
    from rich.box import SIMPLE
    from rich.table import Table

    share = result.num_label_tokens / result.num_tokens
    show(
        f"{result.num_rows:,} rows, {result.num_tokens:,} tokens, {share:.0%} of them learned "
        f"(data.loss_on: {result.loss_on})",
        highlight=False,
    )
    is_cut = result.uncut_lengths != result.lengths
    show_bars(
        ("tokens before the cut" if is_cut else "tokens", "rows"),
        [(tell_span(bar), bar["rows"]) for bar in result.uncut_histogram],
    )
    told = result.uncut_lengths
    show(
        f"{'before the cut ' if is_cut else ''}half have at most {told['p50']} tokens, 95% at most "
        f"{told['p95']}, the longest {told['max']}; data.max_length is {result.max_length}",
        highlight=False,
    )
    if is_cut:
        told = result.lengths
        show(f"as they are learned {told['p50']}, {told['p95']} and {told['max']}", highlight=False)
    padding = Table("batches", "padding", "sequences", box=SIMPLE)
    for column in padding.columns[1:]:
        column.justify = "right"
    for setting, waste in result.waste.items():
        padding.add_row(*_describe_waste(setting, waste, result))
    show(padding)


def tell_span(bar: dict[str, int]) -> str:
    """Give the lengths of a histogram's bar: one number, or from which to which."""
    first, last = bar["start"], bar["stop"] - 1
    return f"{first}" if first == last else f"{first}-{last}"


def show_bars(titles: tuple[str, str], counts: Sequence[tuple[str, int]]) -> None:
    """Show counts as a table of bars.

    Args:
        titles: Of the names, and of the counts.
        counts: Each name with its count.
    """
    from rich.box import SIMPLE
    from rich.table import Table

    bars = Table(*titles, "", box=SIMPLE)
    for column in bars.columns[:2]:
        column.justify = "right"
    most = max(count for _, count in counts)
    for name, count in counts:
        width = round(_BAR_WIDTH * count / most) if count else 0
        bars.add_row(plain(name), f"{count:,}", "█" * max(width, 1) if count else "")
    show(bars)


def _describe_waste(setting: str, waste: dict[str, Any], result: Preview) -> tuple[str, str, str]:
    own = " (the recipe)" if setting == result.setting else ""
    sequences = waste["packed_sequences"] or result.num_rows
    return f"{_SETTINGS[setting]}{own}", f"{waste['padding_share']:.1%}", f"{sequences:,}"
