"""Methods that train a model for 8-bit arithmetic, and what is made of the trained one."""
