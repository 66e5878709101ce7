"""Evaluation protocols, one module per origin; each module has `PROTOCOLS`, a tuple.

A protocol without `_fixed` keeps the faults of its authors' scorer and describes them. A `_fixed`
protocol asks as the authors' training does and reads answers without the known faults. Their scores
are never comparable.
"""
