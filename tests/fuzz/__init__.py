"""Random damage to everything that is read: files, flags, states. ``make test-fuzz`` runs all of it."""
