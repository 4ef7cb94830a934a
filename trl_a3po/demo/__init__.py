"""The demo: a tiny model, and an arithmetic task that it half knows."""
