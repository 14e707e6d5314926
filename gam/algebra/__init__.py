"""The mathematics of updates; knows no file, no place and no command."""
