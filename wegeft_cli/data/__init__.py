"""Examples become batches: sources, row formats, templates, tokens and masks, order, collation."""
