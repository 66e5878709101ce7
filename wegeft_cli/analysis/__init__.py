"""Inspection, ablation, editing and reports."""
