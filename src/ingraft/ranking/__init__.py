"""A person's order of several answers to a prompt: sampled by a model, asked for on a local page, kept as rows that a reward model learns from.

`answers` samples, `desk` knows what is ranked and writes it, `page` and `server` show it. Nothing below `cli` imports this package.
"""
