"""`wegeft preview`: show training rows as the model reads them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from wegeft_cli.cli.arguments import JsonOption, OverridesArgument, RecipeArgument
from wegeft_cli.cli.console import RichReporter, escape_control, get_console, print_json, show
from wegeft_cli.cli.start import open_recipe
from wegeft_cli.cli.tables import show_table

if TYPE_CHECKING:
    from rich.text import Text

    from wegeft_cli.tasks.support.label_preview import LabelPreview
    from wegeft_cli.tasks.support.row_viewer import PreviewRow, TokenPiece
    from wegeft_cli.tasks.support.token_preview import TokenPreview

_LEARNED = ("green3", "spring_green3")  # alternating, so that tokens are distinguishable
_READ = ("default", "dim")  # gray is invisible on some backgrounds
_SPECIAL = "bold cyan"
_LEARNED_SPECIAL = "bold black on green3"
_MERGED = "black on yellow"
_BAR_WIDTH = 40
_FATES = {
    "empty": "dropped: its completion is empty",
    "unmarked": "dropped: all of its answers are marked as not learned",
    "cut_away": "dropped: its completion starts after data.max_length",
    "too_long": "dropped: too long by the corpus's rule",
}
_SETTINGS = {
    "none": "rows in sampled order",
    "group_by_length": "train.group_by_length: true",
    "packing": "data.packing: bfd",
}
_MAX_CLASSES = 30


def preview(
    recipe: RecipeArgument,
    overrides: OverridesArgument = None,
    rows: Annotated[
        int,
        typer.Option("--rows", metavar="N", min=0, help="First rows to show per source or class."),
    ] = 2,
    row: Annotated[
        int | None,
        typer.Option(
            "--row",
            metavar="INDEX",
            min=0,
            help="Show only this row of the training set, counted from 0 over all sources.",
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Show rows as the model reads them, and statistics of all rows, without weights."""
    loaded = open_recipe("preview", recipe, overrides)
    from wegeft_cli.planning.preview import preview as run

    result = run(loaded, num_rows=rows, row=row, reporter=RichReporter())
    if as_json:
        print_json(result.to_json())
    else:
        _print_preview(result)


def _print_preview(result: Any) -> None:
    if result.kind == "labels":
        _print_labelled(result)
    else:
        _print_rows(result)


def _print_rows(result: TokenPreview) -> None:
    has_colors = _has_colors()
    if result.rows:
        show(_draw_legend(has_colors))
    for each in result.rows:
        show("")
        show(_title(each), style="bold", highlight=False, soft_wrap=True)
        if each.tokens:
            show(draw_tokens(each.tokens, has_colors), soft_wrap=not has_colors)
    show("")
    _show_sources(result)
    _show_figures(result)


def draw_tokens(tokens: list[TokenPiece], has_colors: bool) -> Text:
    """Return a row's tokens with visible newlines and control characters.

    Colors show the trained tokens; without colors ⟦ ⟧ enclose them.
    """
    from rich.text import Text

    text = Text()
    learned = False
    for number, token in enumerate(tokens):
        if not has_colors and token.learned != learned:
            text.append("⟦" if token.learned else "⟧")
        learned = token.learned
        piece = _escape(token.text)
        if has_colors:
            text.append(piece, style=_find_style(token, number))
        else:
            text.append(f"⟪{piece}⟫" if token.merged else piece)
    if learned and not has_colors:
        text.append("⟧")
    return text


def _find_style(token: TokenPiece, number: int) -> str:
    if token.merged:
        return _MERGED
    if token.special:
        return _LEARNED_SPECIAL if token.learned else _SPECIAL
    return (_LEARNED if token.learned else _READ)[number % 2]


def _escape(text: str) -> str:
    """Return a text with visible newlines and control characters."""
    return escape_control(text, keep="\n").replace("\n", "↵\n")


def _has_colors() -> bool:
    console = get_console()
    return bool(console.is_terminal and console.color_system and not console.no_color)


def _draw_legend(has_colors: bool) -> Text:
    from rich.text import Text

    if not has_colors:
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


def _show_sources(result: TokenPreview) -> None:
    fates = {
        "num_truncated": "cut",
        "num_empty": "empty",
        "num_unmarked": "unmarked",
        "num_cut_away": "cut away",
        "num_filtered": "filtered",
        "num_boundary_merged": "joined",
    }
    # Only reasons that occur have a column: a narrow terminal cannot show all of them.
    met = {n: title for n, title in fates.items() if any(s[n] for s in result.sources)}
    columns = {"num_rows": "rows", **met}
    sources = result.sources
    show_table(
        {
            "source": [s["path"] for s in sources],
            **{title: [f"{s[name]:,}" for s in sources] for name, title in columns.items()},
            "template": [f"{s['template']} {s['template_hash']}" for s in sources],
        },
        text=("source", "template"),
    )


def _plain(text: str) -> Text:
    """Return a text without markup and with visible control characters."""
    from rich.text import Text

    return Text(_escape(text), overflow="fold")


def _show_figures(result: TokenPreview) -> None:
    share = result.num_label_tokens / result.num_tokens
    show(
        f"{result.num_rows:,} rows, {result.num_tokens:,} tokens, {share:.0%} of them learned "
        f"(data.loss_on: {result.loss_on})",
        highlight=False,
    )
    is_cut = result.uncut_lengths != result.lengths
    _show_bars(
        ("tokens before the cut" if is_cut else "tokens", "rows"),
        [(_span(bar), bar["rows"]) for bar in result.uncut_histogram],
    )
    _show_lengths("tokens per row" + " before the cut" * is_cut, result.uncut_lengths)
    if is_cut:
        _show_lengths("after the cut", result.lengths)
    show(f"data.max_length is {result.max_length}", highlight=False)
    rows = [_describe_waste(*item, result) for item in result.waste.items()]
    names = ("batches", "padding", "sequences")
    show_table(dict(zip(names, map(list, zip(*rows, strict=True)), strict=True)))


def _span(bar: dict[str, int]) -> str:
    """Return the lengths of a histogram's bar: one number or a range."""
    first, last = bar["start"], bar["stop"] - 1
    return f"{first}" if first == last else f"{first}-{last}"


def _show_bars(titles: tuple[str, str], counts: Sequence[tuple[str, int]]) -> None:
    """Print counts as a table of bars, under the titles of the names and of the counts."""
    most = max(count for _, count in counts)
    columns = {
        titles[0]: [name for name, _ in counts],
        titles[1]: [f"{count:,}" for _, count in counts],
        "": ["█" * max(1, round(_BAR_WIDTH * count / most)) * (count > 0) for _, count in counts],
    }
    show_table(columns, text=("",))


def _describe_waste(
    setting: str, waste: dict[str, Any], result: TokenPreview
) -> tuple[str, str, str]:
    own = " (the recipe)" if setting == result.setting else ""
    sequences = waste["packed_sequences"] or result.num_rows
    return f"{_SETTINGS[setting]}{own}", f"{waste['padding_share']:.1%}", f"{sequences:,}"


def _show_lengths(title: str, lengths: Mapping[str, int]) -> None:
    show(
        f"{title}: median {lengths['p50']}, 95th percentile {lengths['p95']}, maximum "
        f"{lengths['max']}",
        highlight=False,
    )


def _print_labelled(result: LabelPreview) -> None:
    """Print the preview of a classifier's rows."""
    for row in result.rows:
        show(_plain(f"row {row['number']}  {row['label']}  {_describe_size(row)}"), style="bold")
        text = row.get("read")
        show(_plain(str(row["input"]) if text is None else text), soft_wrap=True)
    if result.rows:
        show("")
    others = [
        f"{count:,} {name} rows"
        for name, count in (
            ("validation", result.num_validation_rows),
            ("test", result.num_test_rows),
        )
        if count
    ]
    show(", ".join([f"{result.num_rows:,} training rows", *others]), highlight=False)
    if result.values is not None:
        values = ", ".join(f"{name} {value:g}" for name, value in result.values.items())
        show(f"target values: {values}", highlight=False)
    if result.classes:
        _show_classes(result)
    if result.edge is not None:
        _show_sizes(result)
    else:
        _show_token_lengths(result)


def _describe_size(row: dict[str, Any]) -> str:
    if "read" in row:
        return f"{row['length']} tokens"
    width, height = row["size"]
    return f"{width} x {height} pixels, {row['mode']}"


def _show_classes(result: LabelPreview) -> None:
    shown = result.classes[:_MAX_CLASSES]
    _show_bars(("class", "training rows"), [(each["label"], each["train"]) for each in shown])
    left = len(result.classes) - len(shown)
    if left:
        show(f"and {left} more classes; --json lists all", style="dim", highlight=False)
    counts = [each["train"] for each in result.classes]
    largest = max(counts)
    show(
        f"{len(counts)} classes with {min(counts):,} to {largest:,} training rows; the most common "
        f"class is {largest / sum(counts):.1%} of the rows",
        highlight=False,
    )


def _show_sizes(result: LabelPreview) -> None:
    sizes = ", ".join(
        f"{each['size'][0]} x {each['size'][1]} ({each['images']:,} images)"
        for each in result.sizes
    )
    show(f"most common sizes: {sizes}", highlight=False)
    show(
        f"the model sees {result.edge} x {result.edge} pixels "
        f"(data.image_transform: {result.image_transform}), {result.lengths['max']} patches",
        highlight=False,
    )


def _show_token_lengths(result: LabelPreview) -> None:
    _show_bars(
        ("tokens", "rows"),
        [(_span(bar), bar["rows"]) for bar in result.histogram],
    )
    _show_lengths("tokens per row", result.lengths)
    show(f"data.max_length is {result.max_length}", highlight=False)
