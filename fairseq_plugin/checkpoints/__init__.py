"""The state of pruning in fairseq's checkpoints, and the files beside them."""
