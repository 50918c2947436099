"""The commands of ``head-pruning``: their flags in :mod:`~head_pruning.commands.flags`, the work in one file each."""
