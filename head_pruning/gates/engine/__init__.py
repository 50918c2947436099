"""How gates sit on a model; methods see only what the session does with them."""
