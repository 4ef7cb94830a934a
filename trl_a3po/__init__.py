"""A3PO: adaptive and asymmetric token-level advantage shaping for TRL's GRPOTrainer (arXiv 2512.21625)."""

from importlib import import_module
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from .a3po_config import A3POConfig as A3POConfig
    from .a3po_trainer import A3POTrainer as A3POTrainer
    from .shaping import completionwise as completionwise
    from .shaping import shape_advantages as shape_advantages
    from .shaping import weight_polarities as weight_polarities

__version__ = "0.1.0"

# Where each public name lives. `import trl_a3po` loads neither torch nor trl: the first use of a name does.
_HOME = {
    "A3POConfig": "a3po_config",
    "A3POTrainer": "a3po_trainer",
    "completionwise": "shaping",
    "shape_advantages": "shaping",
    "weight_polarities": "shaping",
}

__all__ = ["A3POConfig", "A3POTrainer", "__version__", "completionwise", "shape_advantages", "weight_polarities"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
