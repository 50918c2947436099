"""Multiple choice: which of several endings goes on from a beginning, as in SWAG."""
