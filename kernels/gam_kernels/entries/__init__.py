"""Merges of updates that look at single entries: formed, thinned out and merged in tiles."""
