"""What a transformers model is made of: its sites, layers and how heads lie in its projections."""
