"""What a pruned checkpoint is turned into."""
