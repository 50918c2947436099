"""The published mathematics once more, written from its specification: plain numpy, slow and literal.

Nothing here is shared with the product: gradients are carried forward as Jacobians or taken as differences, thresholds
are found by sorting, models are loops over heads. ``tests/*/test_own_reference_*.py`` compare the product with it on
drawn numbers, without any file; ``tests/core/test_own_reference_recorded.py`` compares it with what the published code
gave.
"""
