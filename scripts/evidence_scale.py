"""How the best learning rate moves with rank, width, sharing and scale: tiny models, real text.

    python scripts/evidence_scale.py run --pretrain gsm8k.jsonl --finetune openbookqa.json
    python scripts/evidence_scale.py show

`run` pretrains a Llama-shaped model of bytes for each width on the first file's rows, then trains
adapters on the second's: AdamW, no decay, equal batches for every run. The settings of each rule
run at fixed rates. Every other setting tries rates in steps of a factor of two, from a guess
outwards, until the best one has a worse one on each side. Results are appended to runs.jsonl in
.cache/evidence/scale (`--folder`), so that a repeated command resumes. `show` prints the tables and
draws docs/images/evidence-scale.png.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from wegeft_cli import inject_generators

DEPTH, LENGTH, BATCH = 4, 128, 8
PRETRAINING = {32: 800, 64: 800, 128: 800}
"""Width -> steps of pretraining, of 16 x 128 bytes."""
STEPS, WARMUP = 100, 10
NUM_VALIDATION = 48
TARGETS = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]
RANKS, SHARES = (4, 16, 64, 256), ("module_type", "none")
RULES: dict[str, Callable[[int, int], float]] = {
    "s = 2": lambda rank, width: 2.0,
    "s = 32 / r": lambda rank, width: 32 / rank,
    "s = 2048 / (r d)": lambda rank, width: 2048 / (rank * width),
    "s = 32768 / (r d)": lambda rank, width: 32768 / (rank * width),
}
"""Name -> scale from rank and width; the first three are equal at r 16, d 64."""
RULED_RATES = dict.fromkeys(RULES, (2.0**-8, 2.0**-7, 2.0**-6, 2.0**-5))
RULED_RATES["s = 32768 / (r d)"] = (2.0**-11, 2.0**-10, 2.0**-9, 2.0**-8)
LORA: dict[str, Callable[[int], float]] = {
    "LoRA, alpha = 32": lambda rank: 32 / rank,
    "rsLoRA, alpha = 8": lambda rank: 8 / math.sqrt(rank),
}
NUM_COLORS = 32
FIRST_RATE, LARGEST_RATE, SMALLEST_RATE = 2.0**-8, 2.0**-2, 2.0**-16


@dataclass(frozen=True)
class Setting:
    """One adapter: `psi_rate` is the learning rate of psi divided by that of phi."""

    width: int
    rank: int
    scale: float
    method: str = "wegeft"
    share: str = "module_type"
    psi_rate: float = 1.0


def read_bytes(file: Path) -> Tensor:
    """Return the texts of a file's rows as one row of bytes."""
    text = file.read_text(encoding="utf-8")
    rows = [json.loads(line) for line in text.splitlines()] if file.suffix == ".jsonl" else None
    rows = json.loads(text) if rows is None else rows
    keys = ("question", "answer") if "question" in rows[0] else ("instruction", "output")
    joined = "\n\n".join("\n".join(str(row[key]) for key in keys) for row in rows)
    return torch.frombuffer(bytearray(joined.encode()), dtype=torch.uint8).long()


def draw_batches(data: Tensor, size: int, seed: int) -> Iterator[Tensor]:
    """Yield batches of windows of the text."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        starts = torch.randint(len(data) - LENGTH, (size,), generator=generator)
        yield torch.stack([data[start : start + LENGTH] for start in starts.tolist()])


def build_model(width: int) -> LlamaForCausalLM:
    """Build a random model; heads are 32 wide."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=width,
        intermediate_size=width * 8 // 3,
        num_hidden_layers=DEPTH,
        num_attention_heads=width // 32,
        max_position_embeddings=LENGTH,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config)


def schedule(step: int, steps: int) -> float:
    """Return the share of the learning rate: linear, after a warm-up of a tenth."""
    warmup = max(1, steps // 10)
    return min((step + 1) / warmup, (steps - step) / max(1, steps - warmup))


def pretrain(width: int, data: Tensor, folder: Path) -> dict[str, Tensor]:
    """Return the pretrained weights of a width, from a file if there is one."""
    from safetensors.torch import load_file, save_file

    file = folder / f"width-{width}.safetensors"
    if file.is_file():
        stored: dict[str, Tensor] = load_file(file)
        return stored
    model, steps = build_model(width), PRETRAINING[width]
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.1, betas=(0.9, 0.95))
    for step, batch in zip(range(steps), draw_batches(data, 16, seed=1), strict=False):
        optimizer.param_groups[0]["lr"] = 3e-3 * schedule(step, steps)
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    print(f"width {width}: pretrained, last loss {loss.item():.3f}", flush=True)
    tensors = {name: value.detach() for name, value in model.named_parameters()}
    save_file(tensors, file)
    return tensors


def adapt(model: nn.Module, setting: Setting) -> tuple[nn.Module, list[list[nn.Parameter]]]:
    """Add the adapter; return the model and its parameters: (phi, psi), or all of LoRA's."""
    if setting.method == "wegeft":
        generators = inject_generators(
            model,
            rank=setting.rank,
            alpha=setting.scale * setting.rank,
            target_modules=TARGETS,
            share=setting.share,  # type: ignore[arg-type]
            seed=3,
        )
        named = dict(generators.named_parameters())
        factors = [
            [value for name, value in named.items() if part in name.split(".")]
            for part in ("phi", "psi")
        ]
        assert sum(map(len, factors)) == len(named)
        return model, factors
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(3)
    config = LoraConfig(
        r=setting.rank, lora_alpha=setting.scale * setting.rank, target_modules=TARGETS
    )
    wrapped = get_peft_model(model, config)
    return wrapped, [[value for value in wrapped.parameters() if value.requires_grad]]


@torch.no_grad()
def validate(model: nn.Module, batches: Sequence[Tensor]) -> float:
    """Return the mean loss of a byte."""
    losses = [float(model(input_ids=each, labels=each).loss) for each in batches]
    return sum(losses) / len(losses)


def finetune(
    base: dict[str, Tensor], setting: Setting, rate: float, data: Tensor
) -> tuple[float, float]:
    """Train one adapter; return the validation loss of the base and of the adapter."""
    model = build_model(setting.width)
    model.load_state_dict(base, strict=False)
    training, held_out = data[: -NUM_VALIDATION * LENGTH], data[-NUM_VALIDATION * LENGTH :]
    rows = held_out.view(-1, 16, LENGTH).unbind(0)
    before = validate(model.eval(), rows)
    adapted, factors = adapt(model, setting)
    shares = [1.0, setting.psi_rate]
    groups = [
        {"params": params, "lr": 0.0, "share": share}
        for params, share in zip(factors, shares, strict=False)
    ]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    for step, batch in zip(range(STEPS), draw_batches(training, BATCH, seed=2), strict=False):
        for group in optimizer.param_groups:
            group["lr"] = rate * group["share"] * schedule(step, STEPS)
        adapted(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return before, validate(adapted.eval(), rows)


class Results:
    """The finished runs, one line of JSON each."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.found: dict[str, dict[str, Any]] = {}
        if file.is_file():
            for line in file.read_text(encoding="utf-8").splitlines():
                row = json.loads(line)
                self.found[self.key(row["setting"], row["rate"])] = row

    @staticmethod
    def key(setting: dict[str, Any], rate: float) -> str:
        """Return what identifies a run."""
        return json.dumps([setting, rate], sort_keys=True)

    def add(self, row: dict[str, Any]) -> None:
        """Keep a run, in the file too."""
        self.found[self.key(row["setting"], row["rate"])] = row
        with self.file.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(row) + "\n")


def measure(
    base: dict[str, Tensor], setting: Setting, rate: float, data: Tensor, results: Results
) -> float:
    """Return the loss after training at a rate; infinity if it diverged."""
    key = Results.key(asdict(setting), rate)
    if key not in results.found:
        start = time.process_time()
        before, after = finetune(base, setting, rate, data)
        row = {"setting": asdict(setting), "rate": rate, "before": before, "after": after}
        results.add({**row, "seconds": time.process_time() - start})
    value = float(results.found[key]["after"])
    return value if math.isfinite(value) else math.inf


def search(
    base: dict[str, Tensor], setting: Setting, data: Tensor, results: Results, guess: float
) -> float:
    """Find the best rate of a setting in steps of two; return it."""

    def loss(rate: float) -> float:
        return measure(base, setting, rate, data, results)

    best = guess
    while best * 2 <= LARGEST_RATE and loss(best * 2) < loss(best):
        best *= 2
    while best / 2 >= SMALLEST_RATE and loss(best / 2) < loss(best):
        best /= 2
    print(f"{setting}: best rate 2^{math.log2(best):.0f}, loss {loss(best):.4f}", flush=True)
    return best


def list_searched() -> Iterator[list[Setting]]:
    """Yield the settings in lists along which the best rate moves slowly."""
    for width in PRETRAINING:
        for share in SHARES:
            yield [Setting(width, rank, 2.0, share=share) for rank in RANKS]
    yield [Setting(64, 16, 2.0, psi_rate=ratio) for ratio in (0.25, 1.0, 4.0)]
    yield [Setting(64, 16, scale) for scale in (0.125, 0.5, 2.0, 8.0, 32.0, 128.0)]
    for scale in LORA.values():
        yield [Setting(64, rank, scale(rank), method="lora") for rank in RANKS]


def list_ruled(rule: str, width: int) -> Iterator[Setting]:
    """Yield the settings that a rule gives for every rank and kind of sharing."""
    for share in SHARES:
        for rank in RANKS:
            yield Setting(width, rank, RULES[rule](rank, width), share=share)


def run(asked: argparse.Namespace) -> None:
    """Pretrain and train everything that is missing."""
    torch.set_num_threads(1)
    asked.folder.mkdir(parents=True, exist_ok=True)
    results = Results(asked.folder / "runs.jsonl")
    first, second = read_bytes(asked.pretrain), read_bytes(asked.finetune)
    for width in asked.widths:
        base = pretrain(width, first, asked.folder)
        for rule in RULES:
            for setting in list_ruled(rule, width):
                for rate in RULED_RATES[rule]:
                    measure(base, setting, rate, second, results)
        for settings in list_searched():
            guess = FIRST_RATE
            for setting in settings:
                if setting.width == width:
                    guess = search(base, setting, second, results, guess)


def read_curves(results: Results) -> dict[Setting, dict[float, float]]:
    """Return rate -> loss of every setting."""
    curves: dict[Setting, dict[float, float]] = {}
    for row in results.found.values():
        value = row["after"] if math.isfinite(row["after"]) else math.inf
        curves.setdefault(Setting(**row["setting"]), {})[row["rate"]] = value
    return curves


def refine(curve: dict[float, float]) -> float | None:
    """Return log2 of the best rate, by a parabola of log loss; None if the best is at an end."""
    best = min(curve, key=lambda rate: curve[rate])
    if best / 2 not in curve or best * 2 not in curve:
        return None
    # A diverged neighbor says where the limit is, not how steep the curve is at its minimum.
    low, middle, high = (
        math.log(min(curve[rate], 2 * curve[best])) for rate in (best / 2, best, best * 2)
    )
    bend = low - 2 * middle + high
    return math.log2(best) + (0.5 * (low - high) / bend if bend > 0 else 0.0)


def fit(points: Sequence[tuple[Setting, float]]) -> str:
    """Fit log2 of the best rate by least squares; return its exponents and standard errors."""
    variables: dict[str, Callable[[Setting], float]] = {
        "rank": lambda setting: math.log2(setting.rank),
        "scale": lambda setting: math.log2(setting.scale),
        "width": lambda setting: math.log2(setting.width),
        "none over module_type": lambda setting: float(setting.share == "none"),
    }
    used = {
        name: [value(setting) for setting, _ in points]
        for name, value in variables.items()
        if len({value(setting) for setting, _ in points}) > 1
    }
    matrix = np.array([[1.0] * len(points), *used.values()]).T
    rates = np.array([rate for _, rate in points])
    found, *_ = np.linalg.lstsq(matrix, rates, rcond=None)
    variance = ((rates - matrix @ found) ** 2).sum() / (len(points) - matrix.shape[1])
    errors = np.sqrt(np.diag(variance * np.linalg.inv(matrix.T @ matrix)))
    terms = [
        f"{name} {value:+.2f} ({error:.2f})"
        for name, value, error in zip(["1", *used], found, errors, strict=True)
    ]
    return f"{', '.join(terms)}; residual {math.sqrt(variance):.2f}, {len(points)} settings"


def print_best(curves: dict[Setting, dict[float, float]]) -> None:
    """Print the best rate of every setting, and its exponents."""
    print("| method | width | sharing | rank | scale | psi's rate | log2 best rate | lowest loss |")
    print("|---|---|---|---|---|---|---|---|")
    points = []
    order = sorted(curves, key=lambda each: (each.method, each.width, each.share, each.rank))
    for setting in order:
        rate = refine(curves[setting])
        if rate is None:
            continue
        if setting.psi_rate == 1:
            points.append((setting, rate))
        print(
            f"| {setting.method} | {setting.width} | {setting.share} | {setting.rank} "
            f"| {setting.scale:g} | {setting.psi_rate:g} | {rate:.2f} "
            f"| {min(curves[setting].values()):.3f} |"
        )
    print("\nlog2 of the best rate over log2 of each variable (standard error):")
    slow = [(each, rate) for each, rate in points if each.method == "wegeft" and rate < -8.5]
    fast = [(each, rate) for each, rate in points if each.method == "wegeft" and rate >= -8.5]
    print(f"best rates from 2^-8.5: {fit(fast)}")
    if len(slow) > 4:
        print(f"best rates below 2^-8.5: {fit(slow)}")
    for name, scale in LORA.items():
        found = [
            (each, rate)
            for each, rate in points
            if each.method == "lora" and each.scale == scale(each.rank)
        ]
        if len(found) > 2:
            print(f"{name}: {fit([(replace(each, scale=1.0), rate) for each, rate in found])}")


def best_losses(curves: dict[Setting, dict[float, float]]) -> dict[tuple[int, int, str], float]:
    """Return the lowest loss of each width, rank and sharing under any scale and rate."""
    best: dict[tuple[int, int, str], float] = {}
    for setting, curve in curves.items():
        if setting.method == "wegeft":
            place = (setting.width, setting.rank, setting.share)
            best[place] = min(best.get(place, math.inf), *curve.values(), math.inf)
    return best


def print_ruled(curves: dict[Setting, dict[float, float]], before: dict[int, float]) -> None:
    """Print how near one rate comes to the lowest loss of every width, rank and sharing.

    The gap at a rate is `(loss - lowest) / (loss before training - lowest)`.
    """
    best = best_losses(curves)
    print("\n| rule | rate | settings | largest loss / lowest | largest gap | mean gap |")
    print("|---|---|---|---|---|---|")
    for rule, rates in RULED_RATES.items():
        for rate in rates:
            found = [
                (curves[each][rate], best[each.width, each.rank, each.share], before[each.width])
                for width in PRETRAINING
                for each in list_ruled(rule, width)
                if rate in curves.get(each, {})
            ]
            if not found:
                continue
            gaps = [(loss - least) / (start - least) for loss, least, start in found]
            ratio = max(loss / least for loss, least, _ in found)
            print(
                f"| {rule} | 2^{math.log2(rate):.0f} | {len(found)} | {ratio:.2f} "
                f"| {max(gaps):.0%} | {sum(gaps) / len(gaps):.0%} |"
            )


def draw(curves: dict[Setting, dict[float, float]], file: Path) -> None:
    """Draw loss over lowest loss against the rate: a panel for each rule, a line for a setting."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    best = best_losses(curves)
    figure = Figure(figsize=(3.0 * len(RULES), 3.0), dpi=90, layout="constrained")
    FigureCanvasAgg(figure)
    colors = dict(zip(RANKS, ("tab:blue", "tab:orange", "tab:green", "tab:red"), strict=True))
    for place, rule in enumerate(RULES, start=1):
        axes = figure.add_subplot(1, len(RULES), place)
        for setting in (each for width in PRETRAINING for each in list_ruled(rule, width)):
            curve = sorted(curves.get(setting, {}).items())
            lowest = best.get((setting.width, setting.rank, setting.share), math.inf)
            is_first = setting.width == 64 and setting.share == "module_type"
            axes.plot(
                [rate for rate, _ in curve],
                [loss / lowest for _, loss in curve],
                color=colors[setting.rank],
                linewidth=0.4 + setting.width / 64,
                linestyle="-" if setting.share == "module_type" else ":",
                label=f"r {setting.rank}" if is_first else None,
            )
        axes.axhline(1.2, color="gray", linewidth=0.7)
        axes.set_xscale("log", base=2)
        axes.set_ylim(0.98, 1.6)
        axes.set_title(rule, fontsize="medium")
        axes.set_xlabel("learning rate")
        if place == 1:
            axes.set_ylabel("loss / lowest loss")
            axes.legend(fontsize="small")
    figure.savefig(file)
    with Image.open(file) as picture:
        picture.convert("RGB").quantize(NUM_COLORS).save(file, optimize=True)


def show(asked: argparse.Namespace) -> None:
    """Print the tables and draw the plot."""
    results = Results(asked.folder / "runs.jsonl")
    curves = read_curves(results)
    before = {row["setting"]["width"]: row["before"] for row in results.found.values()}
    print_best(curves)
    print_ruled(curves, before)
    draw(curves, asked.output)


def main() -> None:
    """Run or show."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("action", choices=("run", "show"))
    parser.add_argument("--pretrain", type=Path)
    parser.add_argument("--widths", type=int, nargs="+", default=list(PRETRAINING))
    parser.add_argument("--finetune", type=Path)
    parser.add_argument("--folder", type=Path, default=Path(".cache/evidence/scale"))
    parser.add_argument("--output", type=Path, default=Path("docs/images/evidence-scale.png"))
    asked = parser.parse_args()
    (run if asked.action == "run" else show)(asked)


if __name__ == "__main__":
    main()
