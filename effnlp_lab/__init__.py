"""Efficient NLP Lab: Jupyter labs on efficient language models, and the implementations they are graded against.

Importing this package decides which device we run on, and so must come before Triton and the libraries that import
it (transformers, peft, bitsandbytes).
"""

from importlib import import_module as _import_module

from effnlp_lab import device as _device

__version__ = "0.1.0"
__all__ = ["check", "predicted", "ready", "start", "variant", "__version__"]

_device.settle_triton()

_HOMES = {
    "check": "effnlp_lab.notebook.check",
    "predicted": "effnlp_lab.notebook.setting",
    "ready": "effnlp_lab.notebook.setting",
    "start": "effnlp_lab.notebook.setting",
    "variant": "effnlp_lab.notebook.setting",
}


def __getattr__(name: str):
    """Load what a notebook calls on first use, so that `import effnlp_lab` stays quick."""
    if name not in _HOMES:
        raise AttributeError(f"module 'effnlp_lab' has no attribute {name!r}")
    return getattr(_import_module(_HOMES[name]), name)
