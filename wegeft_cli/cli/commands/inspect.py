"""`wegeft inspect`: analyze the weight changes of an adapter."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from wegeft_cli.cli.arguments import (
    AdapterArgument,
    BaseOption,
    DataDirOption,
    JsonOption,
    LimitOption,
)
from wegeft_cli.cli.console import RichReporter, print_json, show
from wegeft_cli.cli.tables import show_table
from wegeft_cli.errors import UserError

_MIN_COLUMNS = 4


@dataclass(frozen=True)
class _Extent:
    """How much is printed; None is everything.

    Args:
        rows: Rows of a table of modules, groups or parts.
        modules: Modules whose tokens are shown, of those that write and of those that read.
        directions: Directions of each of these.
        tokens: Tokens at each end of a direction.
    """

    rows: int | None
    modules: int
    directions: int | None
    tokens: int | None


_SUMMARY = _Extent(rows=5, modules=2, directions=1, tokens=4)  # with its titles, one screen
_ALL = _Extent(rows=None, modules=4, directions=None, tokens=None)


def inspect(
    context: typer.Context,
    adapter: AdapterArgument = None,
    against: Annotated[
        str | None,
        typer.Option(
            "--against", metavar="OTHER", help="Also compare with this adapter, module by module."
        ),
    ] = None,
    top_k: Annotated[
        int | None,
        typer.Option(
            "--top-k",
            metavar="K",
            min=1,
            help="Leading singular directions of W that count as familiar. Default: the rank.",
        ),
    ] = None,
    directions: Annotated[
        str,
        typer.Option(
            "--directions",
            metavar="KIND",
            help="Directions to show as tokens: columns of C = W phi, or principal directions of "
            "the change.",
        ),
    ] = "columns",
    num_directions: Annotated[
        int,
        typer.Option(
            "--num-directions",
            metavar="N",
            min=0,
            help="Number of directions per module to show as tokens, strongest first.",
        ),
    ] = 3,
    tokens: Annotated[
        int,
        typer.Option(
            "--tokens", metavar="N", min=1, help="Tokens to show at each end of a direction."
        ),
    ] = 8,
    image: Annotated[
        list[Path] | None,
        typer.Option(
            "--image",
            metavar="FILE",
            help="Draw token-clustering maps of this image (vision adapters). Repeatable.",
        ),
    ] = None,
    ablate: Annotated[
        str | None,
        typer.Option(
            "--ablate",
            metavar="KIND",
            help="Score a benchmark with one part of this kind off at a time: group, layer, "
            "module, direction or saved.",
        ),
    ] = None,
    task: Annotated[
        str | None,
        typer.Option(
            "--task", metavar="NAME", help="Benchmark for --ablate. Default: the recipe's first."
        ),
    ] = None,
    protocol: Annotated[
        str | None,
        typer.Option(
            "--protocol", metavar="NAME", help="Protocol for --ablate. Default: the recipe's."
        ),
    ] = None,
    data_dir: DataDirOption = None,
    limit: LimitOption = None,
    batch_size: Annotated[
        int | None,
        typer.Option(
            "--batch-size", metavar="N", min=1, help="Prompts per batch. Default: eval.batch_size."
        ),
    ] = None,
    top: Annotated[
        int | None,
        typer.Option(
            "--top",
            metavar="N",
            min=1,
            help="With --ablate direction: the N largest directions. Default: 16.",
        ),
    ] = None,
    base: BaseOption = None,
    plots: Annotated[
        Path | None,
        typer.Option(
            "--plots", metavar="DIR", help="Draw plots into this folder (PNG). Default: no plots."
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", metavar="FILE", help="Also write the JSON object to this file."
        ),
    ] = None,
    show_all: Annotated[
        bool,
        typer.Option("--all", help="Print every row and direction. Default: a summary."),
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Show what an adapter changes: size, novelty, rank, tokens; or rank its parts."""
    extent = _ALL if show_all else _find_summary(context)
    if ablate is not None:
        if against is not None or image:
            message = "excludes --against and --image"
            raise UserError(message, key="--ablate", hint="remove them")
        from wegeft_cli.analysis.ablate import ablate as run_ablation

        ranking = run_ablation(
            adapter,
            by=ablate,
            task=task,
            protocol=protocol,
            data_dir=data_dir,
            limit=limit,
            batch_size=batch_size,
            top=top,
            base=base,
            plots=plots,
            output=output,
            reporter=RichReporter(),
        )
        print_json(ranking) if as_json else _print_ablation(ranking, extent)
        return
    given = {"--task": task, "--protocol": protocol, "--data-dir": data_dir, "--limit": limit}
    _refuse_without_ablate({**given, "--batch-size": batch_size, "--top": top})
    from wegeft_cli.analysis.inspect import inspect as run

    result = run(
        adapter,
        base=base,
        top_k=top_k,
        directions=directions,
        num_directions=num_directions,
        num_tokens=tokens,
        against=against,
        images=image or [],
        plots=plots,
        output=output,
        reporter=RichReporter(),
    )
    if as_json:
        print_json(result)
    else:
        _print_inspection(result, extent)


def _find_summary(context: typer.Context) -> _Extent:
    """Return the summary, with as many directions and tokens as the user asked for."""
    options = {"directions": "num_directions", "tokens": "tokens"}
    sources = {field: context.get_parameter_source(name) for field, name in options.items()}
    asked: dict[str, Any] = {
        field: None for field, source in sources.items() if source and source.name != "DEFAULT"
    }
    return replace(_SUMMARY, **asked)


def _refuse_without_ablate(given: Mapping[str, Any]) -> None:
    for key, value in given.items():
        if value is not None:
            raise UserError("requires --ablate", key=key, hint="add --ablate group")


def _print_inspection(result: dict[str, Any], extent: _Extent) -> None:
    _print_groups(result, extent)
    _print_modules(result, extent)
    _print_tokens(result, extent)
    if "against" in result:
        _print_against(result["against"], extent)
    _print_plots(result)


def _print_groups(result: dict[str, Any], extent: _Extent) -> None:
    rows = sorted(result["groups"], key=lambda row: -row["relative_change"])
    if len(rows) <= (extent.rows or len(rows)):
        rows = result["groups"]
    _show_rows(
        f"change by group (familiar: in the {result['top_k']} leading singular directions of W)",
        ["group", "modules", "||dW||/||W||", "familiar", "novel", "eff. rank"],
        [
            [
                row["group"],
                str(row["num_modules"]),
                _percent(row["relative_change"]),
                _percent(row["familiar"]),
                _percent(row["novel"]),
                f"{row['effective_rank']:.1f}",
            ]
            for row in rows
        ],
        extent,
    )


def _print_modules(result: dict[str, Any], extent: _Extent) -> None:
    rows = sorted(result["modules"], key=lambda row: -row["relative_change"])
    _show_rows(
        "largest changes",
        ["module", "||dW||/||W||", "familiar", "eff. rank", "by chance", "least angle"],
        [
            [
                row["label"],
                _percent(row["relative_change"]),
                _percent(row["familiar"]),
                f"{row['effective_rank']:.1f}",
                _percent(row["familiar_by_chance"]),
                f"{row['principal_angles'][0]:.1f}°" if row["principal_angles"] else "-",
            ]
            for row in rows
        ],
        extent,
    )


def _print_tokens(result: dict[str, Any], extent: _Extent) -> None:
    reason = result["tokens"].get("reason")
    if reason is not None:
        show(f"no tokens: {reason}", style="dim", markup=False)
        return
    rows = sorted(result["modules"], key=lambda row: -row["relative_change"])
    writers = [row for row in rows if row.get("role") == "writes"]
    # On the input side all layers of a group read with the same psi: one of them is enough.
    readers = list({row["group"]: row for row in rows[::-1] if row.get("role") == "reads"}.values())
    for title, found, names in (
        ("promoted and suppressed by the output", writers, ("promoted", "suppressed")),
        (
            "input tokens along and against the read direction",
            readers[::-1],
            ("along", "against"),
        ),
    ):
        cells = [
            [
                row["label"],
                str(direction["direction"]),
                *(_join(direction[name][: extent.tokens]) for name in names),
            ]
            for row in found[: extent.modules]
            for direction in row["tokens"][: extent.directions]
        ]
        if cells:
            _show_rows(title, ["module", "direction", *names], cells, _ALL, wrap=True)
    if extent.rows is not None:
        show("--all prints every row and more directions; --json has everything", style="dim")


def _print_against(against: dict[str, Any], extent: _Extent) -> None:
    rows = sorted(against["modules"], key=lambda row: row["cosine"])
    show(
        f"against {against['adapter']}: cosine {against['cosine']:.3f}, size ratio "
        f"{against['size_ratio']:.3f}, {len(rows)} modules in common, "
        f"{len(against['only_here'])} only here, {len(against['only_there'])} only there",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )
    _show_rows(
        "least similar",
        ["module", "cosine", "size ratio", "overlap left", "right"],
        [
            [
                row["label"],
                f"{row['cosine']:.3f}",
                f"{row['size_ratio']:.3f}",
                f"{row['overlap']:.3f}",
                f"{row['overlap_right']:.3f}",
            ]
            for row in rows
        ],
        extent,
    )


def _print_ablation(result: dict[str, Any], extent: _Extent) -> None:
    whole, base = result["whole"], result["base"]
    metric = whole.get("metric", "accuracy")  # text benchmarks have no other
    show(
        f"{whole['task']} ({whole['protocol']}): {metric} {whole['score']:.1%}, base "
        f"{base['score']:.1%}, {whole['n']} rows",
        highlight=False,
        markup=False,
    )
    _show_rows(
        f"without one {result['by']}; rows lost and gained, p of the sign test",
        ["part", metric, "change", "lost", "gained", "p"],
        [
            [
                row["part"],
                f"{row['score']:.1%}",
                f"{100 * row['change']:+.1f}",
                str(row["lost"]),
                str(row["gained"]),
                f"{row['p_value']:.3f}",
            ]
            for row in result["parts"]
        ],
        replace(extent, rows=extent.rows and 2 * extent.rows),
    )
    _print_plots(result)


def _print_plots(result: dict[str, Any]) -> None:
    for path in result.get("plots", []):
        show(f"plot: {path}", highlight=False, soft_wrap=True, markup=False, style="dim")


def _show_rows(
    title: str,
    names: Sequence[str],
    rows: Sequence[Sequence[str]],
    extent: _Extent,
    *,
    wrap: bool = False,
) -> None:
    shown = rows[: extent.rows]
    if len(shown) < len(rows):
        title += f", {len(shown)} of {len(rows)}"
    cells = zip(*shown, strict=True) if shown else ((),) * len(names)
    columns = dict(zip(names, map(list, cells), strict=True))
    if wrap:
        show_table(columns, title=title, text=names)
    else:
        show_table(columns, title=title, drop=reversed(names[_MIN_COLUMNS:]))


def _percent(value: float) -> str:
    return "-" if value != value else f"{100 * value:.2f}%"


def _join(tokens: Sequence[dict[str, Any]]) -> str:
    """Return tokens side by side, with visible spaces and newlines."""
    texts = (json.dumps(each["token"], ensure_ascii=False)[1:-1] for each in tokens)
    return "  ".join(text.replace(" ", "␣") for text in texts)
