"""The command lines. They parse and print; what they do is `gam.api`."""
