"""Gram matrices of the factors of many adapters."""
