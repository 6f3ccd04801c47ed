"""trueup takes a language model from *can talk* to *answers the way people prefer*."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trueup.api import Run, load, train
    from trueup.inference.model import Model
    from trueup.rollout.sampling import Sampling
    from trueup.types import FeedbackLogps, Loss, PairLogps, Rankings, TokenLogps

__version__ = "0.1.0"
__all__ = [
    "FeedbackLogps", "Loss", "Model", "PairLogps", "Rankings", "Run", "Sampling", "TokenLogps", "__version__",
    "load", "train",
]  # fmt: skip

#: name → the module it is in, imported when the name is asked for: `import trueup` is quick and loads no torch.
_PLACES = {
    **dict.fromkeys(("Run", "load", "train"), "trueup.api"),
    "Model": "trueup.inference.model",
    "Sampling": "trueup.rollout.sampling",
    **dict.fromkeys(("FeedbackLogps", "Loss", "PairLogps", "Rankings", "TokenLogps"), "trueup.types"),
}


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module 'trueup' has no attribute {name!r}")
    return getattr(import_module(_PLACES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
