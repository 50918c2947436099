"""After training: programs of compact models, runtimes that run them, their sizes and times."""
