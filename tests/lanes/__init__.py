"""Long lanes beside the tests: kill -9 at random moments, mutants. ``make test-kill`` and ``make test-mutants``."""
