"""`python -m gam.pda`, for launchers that take a module."""

from gam.pda.commands import main

main(prog_name="gam-pda")
