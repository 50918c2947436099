"""How states are fused without copies of them."""
