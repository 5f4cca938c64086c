"""NMKE for EasyEdit and on its own: neuron-specific masked knowledge editing that lasts thousands of edits.

`LifelongEditor` edits without EasyEdit, `register()` puts NMKE into it, `accelerate_easyedit()` runs its AlphaEdit and MEMIT on
this engine, `apply_nmke_to_model` is the method itself.
"""

import importlib

__version__ = "0.1.0"

_HOMES = {
    "NMKEHyperParams": "methods.nmke",
    "AlphaEditHyperParams": "methods.alphaedit",
    "MEMITHyperParams": "methods.memit",
    "ROMEHyperParams": "methods.rome",
    "FTHyperParams": "methods.ft",
    "LifelongEditor": "editor",
    "LifelongState": "history.state",
    "load_delta": "history.delta",
    "apply_nmke_to_model": "methods",
    "apply_to_model": "methods",
    "open_state": "methods",
    "read": "methods",
    "accelerate_easyedit": "easyedit.register",
    "register": "easyedit.register",
}
__all__ = list(_HOMES)


def __getattr__(name: str):
    """Public names are looked up on first use: importing the package loads neither torch nor transformers."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
