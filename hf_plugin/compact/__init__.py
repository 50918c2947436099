"""Models whose heads were removed: their classes, and how ``from_pretrained`` loads them."""
