"""Fake quantization of linear layers, and the forms that a trained model is stored and exported in."""
