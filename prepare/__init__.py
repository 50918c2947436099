"""Turning parallel text into the binarised data that fairseq trains on."""
