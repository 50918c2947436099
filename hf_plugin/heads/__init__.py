"""What transformers v5 took away: pruning, masking and scoring heads of a model."""
