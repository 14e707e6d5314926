"""What this software is called, and how it computes."""

__version__ = "0.1.0"

NUMERICS = 2
"""Counts the changes of merged bytes: the same inputs and options give the same bytes on one
machine as long as it stays. The changelog says under *Numerics* what each step changed."""
