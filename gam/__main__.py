"""`python -m gam` is `gam-merge`."""

from gam.commands.merge import main

if __name__ == "__main__":
    main.start("gam-merge")
