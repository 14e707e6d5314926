"""Options of a merge in a file, written by hand or recorded by a merge."""
