"""Linear combinations of the factors of many adapters."""
