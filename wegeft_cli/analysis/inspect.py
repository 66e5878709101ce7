"""Measure what an adapter changes and how novel it is, from files alone: `wegeft inspect`."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wegeft_cli.analysis.adapter_comparison import compare_changes
from wegeft_cli.analysis.output_files import check_output, check_plots, save_inspection, write_json
from wegeft_cli.analysis.spectrum import (
    Spectrum,
    decompose,
    direction_strengths,
    effective_rank,
    inner_product,
    leading_subspaces,
    principal_angles,
    share_inside,
)
from wegeft_cli.analysis.token_maps import draw_maps
from wegeft_cli.analysis.vocabulary import Vocabulary, open_vocabulary, rank_tokens
from wegeft_cli.analysis.weight_changes import Changes, Part, open_changes
from wegeft_cli.artifacts.run_directory import find_run
from wegeft_cli.errors import UserError
from wegeft_cli.models.image_processor import read_image
from wegeft_cli.public_arguments import checked_arguments
from wegeft_cli.reporter import Reporter, SilentReporter

DIRECTIONS = ("columns", "principal")


@dataclass(frozen=True)
class _Looked:
    """The part of the result for one module that is kept without its weight: O(d r) numbers."""

    part: Part
    factors: tuple[Tensor, Tensor]
    spectrum: Spectrum
    row: dict[str, Any]


@checked_arguments
def inspect(
    adapter: str | Path | None = None,
    *,
    base: str | None = None,
    top_k: int | None = None,
    directions: str = "columns",
    num_directions: int = 3,
    num_tokens: int = 8,
    against: str | Path | None = None,
    images: Sequence[str | Path] = (),
    plots: Path | None = None,
    output: Path | None = None,
    reporter: Reporter | None = None,
) -> dict[str, Any]:
    """Measure what an adapter changes, module by module, streaming the base's weights.

    Of each module's change `delta_W = s (W phi) psi` (arXiv 2312.00700v5): its size `||delta_W||_F
    / ||W||_F`; the share of `||delta_W||_F^2` inside the span of W's k leading left singular
    vectors (what the model is familiar with) and outside it (what is novel), and the same on the
    right; the effective rank; the principal angles to these spans; the cosine with other layers'
    changes; and the tokens that its directions `C = W phi` promote and suppress.
    """
    reporter = reporter or SilentReporter()
    if plots is not None:
        check_plots()
    if output is not None:
        check_output(output)
    for key, value in (("--top-k", top_k), ("--tokens", num_tokens)):
        if value is not None and value < 1:
            raise UserError(f"must be at least 1, got {value}", key=key)
    if directions not in DIRECTIONS:
        message = f"got {directions!r}"
        raise UserError(message, key="--directions", hint=f"one of {', '.join(DIRECTIONS)}")
    pictures = [(Path(path), read_image(Path(path))) for path in images]
    changes = open_changes(find_run(adapter), base=base, warn=reporter.warn)
    other = None
    if against is not None:
        other = open_changes(Path(against), base=base, warn=reporter.warn)
    looked = _look(changes, top_k, reporter)
    result: dict[str, Any] = {
        **_describe(changes),
        "top_k": top_k if top_k is not None else _rank(changes),
        "modules": [each.row for each in looked],
        "groups": _sum_groups(changes, looked),
        "cosines": _compare_layers(looked),
    }
    result["tokens"] = _add_tokens(changes, looked, directions, num_directions, num_tokens)
    if other is not None:
        spectra = [(each.part, each.factors, each.spectrum) for each in looked]
        result["against"] = compare_changes(spectra, changes, other, reporter)
    if pictures:
        result["maps"] = draw_maps(changes, pictures, reporter)
    if plots is not None:
        result["plots"] = [str(path) for path in save_inspection(result, plots)]
    if output is not None:
        write_json(output, result)
    return result


def _describe(changes: Changes) -> dict[str, Any]:
    told: dict[str, Any] = {
        "adapter": str(changes.adapter_dir),
        "base": str(changes.base_dir),
        "peft_type": changes.peft_type,
        "r": _rank(changes),
    }
    if changes.files is not None:
        manifest = changes.files.manifest
        told |= {"scale": manifest.scale, "side": manifest.side, "share": manifest.share}
        if manifest.modules_to_save:
            told["modules_to_save"] = list(manifest.modules_to_save)
    return told


def _rank(changes: Changes) -> int:
    if changes.files is not None:
        return changes.files.manifest.r
    return max(A.shape[0] for _, A in changes.pairs.values())


def _look(changes: Changes, top_k: int | None, reporter: Reporter) -> list[_Looked]:
    k = top_k if top_k is not None else _rank(changes)
    looked = []
    with reporter.progress("inspecting", len(changes.parts)) as advance, torch.no_grad():
        for number, part in enumerate(changes.parts, start=1):
            looked.append(_look_at(changes, part, k))
            advance(number)
    return looked


def _look_at(changes: Changes, part: Part, k: int) -> _Looked:
    weight = changes.load_weight(part)
    d_out, d_in = weight.shape
    B, A = changes.factors(part, weight)
    spectrum = decompose(B, A)
    left, values, right = leading_subspaces(weight, k)
    norm = float(torch.linalg.vector_norm(weight, dtype=torch.float64))
    m = spectrum.num_directions
    familiar = share_inside(left, spectrum.U, spectrum.sigma)
    familiar_right = share_inside(right, spectrum.V, spectrum.sigma)
    row: dict[str, Any] = {
        "module": part.module,
        "label": part.label,
        "kind": part.kind,
        "group": part.group,
        "layer": part.layer,
        "rows": part.rows,
        "shape": [d_out, d_in],
        "weight_norm": norm,
        "change_norm": spectrum.norm,
        "relative_change": spectrum.norm / norm if norm else math.nan,
        "familiar": familiar,
        "novel": 1 - familiar,
        "familiar_right": familiar_right,
        "novel_right": 1 - familiar_right,
        # Baselines: the share of a change in a random direction, and that of W itself.
        "familiar_by_chance": left.shape[1] / d_out,
        "familiar_right_by_chance": right.shape[1] / d_in,
        "weight_share": min(1.0, float(values.square().sum()) / norm**2) if norm else math.nan,
        "effective_rank": effective_rank(spectrum.sigma),
        "num_directions": m,
        "singular_values": spectrum.sigma.tolist(),
        "principal_angles": principal_angles(left, spectrum.U[:, :m]).tolist() if m else [],
        "principal_angles_right": principal_angles(right, spectrum.V[:, :m]).tolist() if m else [],
        "direction_strengths": direction_strengths(B, A).tolist(),
    }
    # Single precision suffices for the cosines.
    return _Looked(part, (B.float(), A.float()), spectrum, row)


def _sum_groups(changes: Changes, looked: Sequence[_Looked]) -> list[dict[str, Any]]:
    """Summarize each group; LoRA has none, so each kind of module is one."""
    by_group: dict[str, list[_Looked]] = {}
    for each in looked:
        name = each.part.group if changes.files is not None else each.part.kind
        by_group.setdefault(name, []).append(each)
    rows = []
    for name, members in by_group.items():
        squares = [each.row["change_norm"] ** 2 for each in members]
        total = math.fsum(squares)
        weights = math.fsum(each.row["weight_norm"] ** 2 for each in members)

        def mean(key: str, members: list[_Looked] = members, total: float = total) -> float:
            if not total:
                return math.nan
            parts = [
                m.row[key] * m.row["change_norm"] ** 2 for m in members if m.row["change_norm"]
            ]
            return math.fsum(parts) / total

        rows.append(
            {
                "group": name,
                "num_modules": len(members),
                "relative_change": math.sqrt(total / weights) if weights else math.nan,
                "familiar": mean("familiar"),
                "novel": 1 - mean("familiar"),
                "familiar_right": mean("familiar_right"),
                "effective_rank": math.fsum(m.row["effective_rank"] for m in members)
                / len(members),
            }
        )
    return rows


def _compare_layers(looked: Sequence[_Looked]) -> list[dict[str, Any]]:
    """Return the cosines between the changes of modules of one kind and shape."""
    kinds: dict[tuple[str, tuple[int, ...]], list[_Looked]] = {}
    for each in looked:
        kinds.setdefault((each.part.kind, tuple(each.row["shape"])), []).append(each)
    found = []
    for (kind, shape), members in kinds.items():
        if len(members) < 2:
            continue
        matrix = [[1.0] * len(members) for _ in members]
        for i, one in enumerate(members):
            for j, two in enumerate(members[:i]):
                norms = one.spectrum.norm * two.spectrum.norm
                product = inner_product(one.factors, two.factors)
                matrix[i][j] = matrix[j][i] = product / norms if norms else math.nan
        names = [each.part.label for each in members]
        found.append({"kind": kind, "shape": list(shape), "modules": names, "matrix": matrix})
    return found


def _add_tokens(
    changes: Changes,
    looked: Sequence[_Looked],
    directions: str,
    num_directions: int,
    num_tokens: int,
) -> dict[str, Any]:
    """Add the tokens to each module's row, and describe how they were found."""
    told: dict[str, Any] = {"directions": directions}
    if num_directions < 1:
        return {**told, "reason": "none were asked for"}
    vocabulary = open_vocabulary(changes.base_dir, changes.stored)
    if isinstance(vocabulary, str):
        return {**told, "reason": vocabulary}
    picked: dict[str, list[tuple[_Looked, int, float]]] = {"writes": [], "reads": []}
    vectors: dict[str, list[Tensor]] = {"writes": [], "reads": []}
    for each in looked:
        row = each.row
        role = vocabulary.role_of(each.part.kind, (row["shape"][0], row["shape"][1]))
        row["role"], row["tokens"] = role, []
        if role is None:
            continue
        for number, strength, vector in _pick(each, role, directions, num_directions):
            picked[role].append((each, number, strength))
            vectors[role].append(vector)
    for role, places in picked.items():
        if not places:
            continue
        stacked = torch.stack(vectors[role])
        table = vocabulary.unembedding if role == "writes" else vocabulary.embedding
        assert table is not None
        if role == "writes":
            stacked = vocabulary.to_logits(stacked)
        found = rank_tokens(table, stacked, num_tokens, cosine=role == "reads")
        for (each, number, strength), (high, low) in zip(places, found, strict=True):
            names = ("promoted", "suppressed") if role == "writes" else ("along", "against")
            each.row["tokens"].append(
                {
                    "direction": number,
                    "strength": strength,
                    names[0]: _name_tokens(vocabulary, high),
                    names[1]: _name_tokens(vocabulary, low),
                }
            )
    return {**told, "reason": None}


def _pick(
    each: _Looked, role: str, directions: str, num_directions: int
) -> Iterable[tuple[int, float, Tensor]]:
    """Return a change's strongest directions: number, strength, vector on the role's side."""
    B, A = each.factors
    if directions == "columns":
        strengths = torch.tensor(each.row["direction_strengths"])
        sides = B.T if role == "writes" else A
    else:
        strengths, spectrum = each.spectrum.sigma, each.spectrum
        sides = ((spectrum.U if role == "writes" else spectrum.V) * spectrum.sigma).T
    order = torch.argsort(strengths, descending=True, stable=True)[:num_directions].tolist()
    for number in order:
        if float(strengths[number]) > 0:
            yield number, float(strengths[number]), sides[number].double()


def _name_tokens(
    vocabulary: Vocabulary, found: Sequence[tuple[int, float]]
) -> list[dict[str, Any]]:
    return [
        {"token": vocabulary.name(token), "id": token, "score": score} for token, score in found
    ]
