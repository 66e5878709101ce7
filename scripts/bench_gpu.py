"""Test and measure on one CUDA device in at most nine minutes: `make gpu`.

    python scripts/bench_gpu.py [--parts tests,steps,...] [--folder runs/gpu] [--small]

Each part is a process of its own with a time limit; a part that fails or is stopped does not stop
the others, and keeps what it had measured:

    tests       the fast tests, those marked `gpu` included: what trains takes the device
    steps       time and peak memory of forward and backward passes beside LoRA, DoRA and VeRA
    quickstart  the quickstart's training, rows per second
    settings    short runs in 16 and 4 bits, compiled, offloaded, ...: loss beside the plain run's
    kernels     kernels compiled ahead of time, with registers and spills

The results are `gpu.json` and `gpu.md` in the folder. Without a CUDA device the shapes are small
(`--small`), so that the command itself can be tested.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
SECONDS = {"steps": 100, "quickstart": 60, "settings": 110, "kernels": 40, "tests": 220}
"""Part -> its time limit, in the order in which they run: 8 minutes 50 seconds in all."""
FOLDERS = (
    *("training", "methods", "tasks", "models", "interop", "peft_suite", "evaluation"),
    *("end_to_end", "artifacts", "data", "distributed", "contracts", "recipe", "cli"),
)
"""The tests' folders in their order: first those that compute on the device."""
SMALL_TESTS = ("tests/training/test_schedules.py",)
PACKAGES = ("torch", "transformers", "peft", "accelerate", "bitsandbytes", "triton", "liger-kernel")
_TEST_LINE = re.compile(r"(PASSED|FAILED|ERROR|SKIPPED) (?:\[[ \d]+%\] )?(tests/\S+.*)")
Report = dict[str, Any]


def describe_machine() -> Report:
    """Return card, driver and versions."""
    import torch

    versions: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    machine: Report = {
        "date": time.strftime("%Y-%m-%d %H:%M", time.gmtime()),
        "python": sys.version.split()[0],
        "cores": len(os.sched_getaffinity(0)),
        "packages": versions,
        "cuda": torch.version.cuda,
        "card": None,
    }
    if torch.cuda.is_available():
        found = torch.cuda.get_device_properties(0)
        machine |= {
            "card": found.name,
            "memory_gib": found.total_memory / 2**30,
            "capability": f"{found.major}.{found.minor}",
        }
        asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        try:
            answer = subprocess.run(asked, capture_output=True, text=True, timeout=20, check=False)
            machine["driver"] = answer.stdout.strip()
        except (OSError, subprocess.TimeoutExpired):
            machine["driver"] = None
    return machine


def make_command(part: str, folder: Path, small: bool) -> list[str] | None:
    """Return the command of a part, or None where there is nothing to run."""
    if part == "tests":
        paths = SMALL_TESTS if small else [f"tests/{name}" for name in FOLDERS]
        workers = [] if small else ["-n", str(min(12, len(os.sched_getaffinity(0))))]
        return [
            *(sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", *workers),
            *("-m", "not slow", *paths),
        ]
    if part == "kernels":
        script = REPOSITORY / "scripts" / "compile_kernels.py"
        return [sys.executable, str(script)] if importlib.util.find_spec("triton") else None
    command = [sys.executable, str(REPOSITORY / "scripts" / "gpu_parts.py"), part]
    command += ["--output", str(folder / f"{part}.json"), "--work", str(folder / "work")]
    return [*command, "--small"] if small else command


def run_part(part: str, folder: Path, small: bool, seconds: float) -> Report:
    """Run a part and return its status, seconds and results."""
    command = make_command(part, folder, small)
    if command is None:
        return {"status": "nothing to run", "seconds": 0.0, "results": []}
    results = folder / f"{part}.json"
    results.unlink(missing_ok=True)
    log = folder / f"{part}.log"
    paths = [str(REPOSITORY), str(REPOSITORY / "scripts"), os.environ.get("PYTHONPATH", "")]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(path for path in paths if path),
        **({"OMP_NUM_THREADS": "1"} if part == "tests" else {}),
    }
    start = time.perf_counter()
    with log.open("w", encoding="utf-8") as output:
        process = subprocess.Popen(
            command, cwd=REPOSITORY, env=environment, stdout=output, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
        try:
            code: int | None = process.wait(seconds)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            with suppress(ProcessLookupError):  # what the part started, too
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    status = "stopped at its time limit" if code is None else "ok" if code == 0 else f"exit {code}"
    report: Report = {"status": status, "seconds": time.perf_counter() - start, "results": []}
    text = log.read_text(encoding="utf-8", errors="replace")
    if part == "tests":
        report |= count_tests(text)
    elif part == "kernels":
        report["output"] = text[-6000:]
    elif results.is_file():
        report["results"] = json.loads(results.read_text(encoding="utf-8"))
    if status != "ok" and part != "tests":
        report["log_end"] = text[-1500:]
    return report


def count_tests(text: str) -> Report:
    """Count the outcomes in pytest's verbose output, which may end early."""
    outcomes: dict[str, str] = {}
    for line in text.splitlines():
        found = re.match(r"(tests/\S+.*?) (PASSED|FAILED|ERROR|SKIPPED)", line)
        if found is not None:  # one process
            outcomes[found[1]] = found[2]
            continue
        apart = _TEST_LINE.search(line)
        if apart is not None and line.startswith("[gw"):
            outcomes[apart[2].strip()] = apart[1]
    names = ("PASSED", "FAILED", "ERROR", "SKIPPED")
    values = list(outcomes.values())
    return {
        "counts": {name.lower(): values.count(name) for name in names},
        "failed": sorted(k for k, v in outcomes.items() if v in ("FAILED", "ERROR")),
    }


def to_markdown(report: Report) -> str:
    """Return the page."""
    machine = report["machine"]
    versions = ", ".join(f"{k} {v}" for k, v in machine["packages"].items() if v)
    lines = [
        "# One CUDA device",
        "",
        f"{machine['card'] or 'no CUDA device: small shapes on the CPU'},"
        f" driver {machine.get('driver')}, CUDA {machine['cuda']}, {machine['cores']} cores,"
        f" Python {machine['python']}, {versions}; {machine['date']} UTC",
        "",
        "| part | status | seconds |",
        "| --- | --- | ---: |",
    ]
    parts = report["parts"]
    lines += [f"| {name} | {at['status']} | {at['seconds']:.0f} |" for name, at in parts.items()]
    if "tests" in parts and "counts" in parts["tests"]:
        counts = ", ".join(f"{n} {name}" for name, n in parts["tests"]["counts"].items())
        lines += ["", "## Tests", "", counts, ""]
        lines += [f"- `{name}`" for name in parts["tests"]["failed"]]
    for name in ("steps", "quickstart", "settings"):
        lines += _table(name, parts.get(name, {}).get("results", []))
    if parts.get("kernels", {}).get("output"):
        lines += ["", "## Kernels", "", "```text", parts["kernels"]["output"].strip(), "```"]
    return "\n".join(lines) + "\n"


_COLUMNS = {
    "steps": ("tokens", "median_seconds", "least_seconds", "ratio", "peak_gib"),
    "quickstart": ("model", "steps", "rows_per_second", "tokens_per_second", "loss", "peak_gib"),
    "settings": ("loss", "difference", "allowed", "is_close", "rows_per_second", "peak_gib"),
}


def _table(name: str, rows: list[Report]) -> list[str]:
    if not rows:
        return []
    columns = _COLUMNS[name]
    lines = ["", f"## {name.capitalize()}", "", f"| variant | {' | '.join(columns)} |"]
    lines.append(f"| --- |{' ---: |' * len(columns)}")
    for row in rows:
        note = row.get("error") or row.get("skipped")
        cells = [_format(row.get(column)) for column in columns]
        if note:
            cells[-1] = note.replace("|", "/").replace("\n", " ")[:200]
        lines.append(f"| {row['label']} | {' | '.join(cells)} |")
    return lines


def _format(value: object) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def main(argv: list[str] | None = None) -> int:
    """Run the parts and write the two files; return 1 if a part failed."""
    import torch

    parser = argparse.ArgumentParser(description="Test and measure on one CUDA device.")
    parser.add_argument("--parts", default=",".join(SECONDS), help="parts to run, with commas")
    parser.add_argument("--folder", type=Path, default=Path("runs/gpu"))
    parser.add_argument("--small", action="store_true", help="small shapes, as on a CPU")
    asked = parser.parse_args(argv)
    small = asked.small or not torch.cuda.is_available()
    folder: Path = asked.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    report: Report = {"machine": describe_machine(), "small": small, "parts": {}}
    for part in asked.parts.split(","):
        print(f"== {part} (at most {SECONDS[part]} s)", flush=True)
        report["parts"][part] = run_part(part, folder, small, SECONDS[part])
        (folder / "gpu.json").write_text(json.dumps(report, indent=1), encoding="utf-8")
        (folder / "gpu.md").write_text(to_markdown(report), encoding="utf-8")
        print(f"   {report['parts'][part]['status']}", flush=True)
    print(f"{folder / 'gpu.json'}, {folder / 'gpu.md'}")
    allowed = ("ok", "nothing to run")
    return int(any(part["status"] not in allowed for part in report["parts"].values()))


if __name__ == "__main__":
    sys.exit(main())
