"""The flags of the scripts."""
