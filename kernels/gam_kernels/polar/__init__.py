"""Polar factors of small matrices."""
