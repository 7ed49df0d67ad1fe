"""`python3 -m effnlp_lab`: the command line, from the source tree too."""

from __future__ import annotations

import sys


def main() -> int:
    try:
        import rich  # noqa: F401
        import typer  # noqa: F401
    except ModuleNotFoundError as error:
        print(
            f"effnlp needs the package {error.name}, which {sys.executable} does not have: run `make env` and use "
            ".venv/bin/python, or `pip install -e .` in this environment.",
            file=sys.stderr,
        )
        return 2
    from effnlp_lab.cli import main as run

    return run()


if __name__ == "__main__":
    sys.exit(main())
