"""Run every command on a tiny checkpoint of each family of transformers.

PYTHONPATH=scripts python -m families                    # all, or what is missing of them
PYTHONPATH=scripts python -m families --only llama --only image_classification/vit --fresh
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from families.matrix import count_outcomes, list_families, list_faults, read_rows, run_matrix
from families.outcomes import FAILED
from families.page import write_page


def main() -> int:
    """Run, print the faults and the counts; return 1 if a family failed."""
    parser = argparse.ArgumentParser(prog="families", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--only", action="append", default=[], metavar="NAME")
    parser.add_argument("--results", type=Path, default=Path(".cache/families"))
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--limit", type=float, default=600, help="seconds of one family")
    parser.add_argument("--fresh", action="store_true", help="run families again that have a row")
    parser.add_argument("--page", type=Path, help="write this page from the rows of all families")
    parser.add_argument("--json", action="store_true", help="print all rows as one JSON array")
    options = parser.parse_args()
    families = list_families(options.only)
    if options.fresh:
        for task, name in families:
            (options.results / f"{task}.{name}.json").unlink(missing_ok=True)
    run_matrix(families, options.results, jobs=options.jobs, limit=options.limit)
    rows = read_rows(options.results, families)
    if options.page:
        write_page(read_rows(options.results, list_families()), options.page, "make families")
    if options.json:
        print(json.dumps(rows, indent=1))
    else:
        print("\n".join(list_faults(rows)))
        for stage, found in count_outcomes(rows).items():
            print(f"{stage}: {', '.join(f'{n} {outcome}' for outcome, n in found.items())}")
    return int(any(s["outcome"] == FAILED for row in rows for s in row["stages"].values()))


if __name__ == "__main__":
    sys.exit(main())
