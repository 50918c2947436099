"""The folders that a pruned model leaves: model, card, programs."""
