"""Errors in one line: what is wrong, or what is to be installed."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

__all__ = ["extras", "fail"]

_EXTRA_OF = {
    "jinja2": "vision",
    "lightning": "vision",
    "matplotlib": "viz",
    "onnx": "onnx",
    "onnxscript": "onnx",
    "PIL": "viz",
    "plotly": "vision",
    "pydantic": "cli",
    "rich": "cli",
    "safetensors": "vision",
    "sklearn": "vision",
    "torchvision": "vision",
    "typer": "cli",
    "yaml": "cli",
}


_debugging = False


def show_tracebacks(wanted: bool) -> None:
    """Whether the traceback of an error is printed before its line."""
    global _debugging
    _debugging = wanted


def fail(message: object) -> NoReturn:
    """End the program with a line on stderr and exit code 2."""
    if _debugging:
        _print_traceback()
    print(f"batchshaping: {message}", file=sys.stderr)
    sys.exit(2)


def _print_traceback() -> None:
    """Print what a line stands for: the error, and those before it that were not to be seen."""
    error = sys.exc_info()[1]
    if error is None:
        traceback.print_stack(sys._getframe(2))
        return
    before: BaseException | None = error
    while before is not None:
        before.__suppress_context__ = False
        before = before.__context__
    traceback.print_exception(error)


@contextmanager
def extras() -> Iterator[None]:
    """Say what to install where an import of an extra fails."""
    try:
        yield
    except ImportError as error:
        module = (error.name or "").partition(".")[0]
        if module not in _EXTRA_OF:
            raise
        fail(f"this needs {module}, please run: pip install 'batchshaping[{_EXTRA_OF[module]}]'")
