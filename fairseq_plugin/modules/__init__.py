"""What fairseq's models are made of, and how their heads are gated and cut out."""
