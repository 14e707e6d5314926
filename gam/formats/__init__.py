"""Adapter formats: from bytes to adapters and back."""
