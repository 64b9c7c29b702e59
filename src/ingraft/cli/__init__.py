"""The command line: one file a verb, each a thin layer over a function that Python users can call too. Nothing imports this package."""
