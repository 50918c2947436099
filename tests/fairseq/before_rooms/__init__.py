"""Checkpoints that an earlier version wrote, when the plugin was one folder, and what it made of them."""
