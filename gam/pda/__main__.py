"""`python -m gam.pda`, for launchers that take a module."""

from gam.pda.cli import main

main(prog_name="gam-pda")
