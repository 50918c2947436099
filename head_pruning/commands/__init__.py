"""The commands of ``head-pruning``: one file each, with ``add_command(commands)``."""
