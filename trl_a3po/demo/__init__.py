"""The demo: a tiny model, how it was made, and an arithmetic task that it can half do."""
