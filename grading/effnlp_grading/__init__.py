"""The instructor's side: grading submissions in a sandbox, with nbgrader around it.

`from effnlp_grading import grade; grade("flash_attention.ipynb")` grades one notebook and returns a plain result.
"""

from importlib import import_module as _import_module

_HOMES = {"grade": "judging", "Limits": "limits", "Sandbox": "sandbox", "Proctor": "proctor"}
__all__ = sorted(_HOMES)


def __getattr__(name: str):
    """Load what is asked for on first use."""
    if name not in _HOMES:
        raise AttributeError(f"module 'effnlp_grading' has no attribute {name!r}")
    return getattr(_import_module(f"{__name__}.{_HOMES[name]}"), name)
