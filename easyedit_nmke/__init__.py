"""NMKE for EasyEdit and on its own: neuron-specific masked knowledge editing that lasts thousands of edits.

`LifelongEditor` edits without EasyEdit, `register()` puts NMKE into it, `accelerate_easyedit()` runs its AlphaEdit and MEMIT on
this engine, `apply_nmke_to_model` is the method itself.
"""

import importlib

# Eagerly: a function named as its module would be shadowed by the module's first import.
from .easyedit.register import accelerate_easyedit, register

__version__ = "0.1.0"

_HOMES = {
    "NMKEHyperParams": "hparams",
    "AlphaEditHyperParams": "hparams",
    "MEMITHyperParams": "hparams",
    "ROMEHyperParams": "hparams",
    "FTHyperParams": "hparams",
    "LifelongEditor": "editor",
    "LifelongState": "history.state",
    "load_delta": "history.delta",
    "apply_nmke_to_model": "methods.nmke",
    "apply_to_model": "methods.baselines",
    "open_state": "methods.baselines",
}
__all__ = [*_HOMES, "accelerate_easyedit", "register"]


def __getattr__(name: str):
    """Public names are looked up on first use: importing the package loads neither torch nor transformers."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
