"""What tells one checkpoint from another."""

import hashlib
from pathlib import Path


STATE_FILES = ("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth")


def digests(checkpoint):
    """The hash of each file of its state; None of no checkpoint."""
    return checkpoint and {
        file: hashlib.sha256(Path(checkpoint, file).read_bytes()).hexdigest() for file in STATE_FILES
    }
