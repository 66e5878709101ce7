"""`wegeft bench`: several methods on the same data, batches, steps and evaluation."""
