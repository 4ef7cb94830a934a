"""The demo: a tiny model, an arithmetic task it half knows, and the command line that trains it."""
