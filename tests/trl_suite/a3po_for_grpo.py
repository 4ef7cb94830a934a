"""Plugin of pytest: what a test imports from `trl` as GRPOTrainer and GRPOConfig is A3POTrainer and A3POConfig."""

import pytest
import trl

# Before the names are replaced: A3POTrainer is a subclass of what they stand for until then.
from trl_a3po import A3POConfig, A3POTrainer


REPLACEMENTS = {"GRPOConfig": A3POConfig, "GRPOTrainer": A3POTrainer}

for name, replacement in REPLACEMENTS.items():
    setattr(trl, name, replacement)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Refuses to pass off a run with the originals as one with the replacements."""
    for module in {item.getparent(pytest.Module).obj for item in items}:
        for name, replacement in REPLACEMENTS.items():
            if getattr(module, name, None) is not replacement:
                raise pytest.UsageError(f"{module.__name__} does not import `{name}` from `trl`")
