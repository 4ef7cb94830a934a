"""The demo: a tiny model, the script that trained it, and an arithmetic task that it solves only in part."""
