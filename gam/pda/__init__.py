"""Preference Delta Aggregation (arXiv 2606.00357): pairs, adapters, merges, scores."""
