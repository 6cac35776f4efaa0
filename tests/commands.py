"""Commands of the package, run within the process of a test."""

from __future__ import annotations

from typing import Any

from typer.testing import CliRunner

from batchshaping.cli import app


def run(*arguments: object) -> Any:
    """The result of a command that works."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return result


def refused(*arguments: object) -> str:
    """The one line on stderr of a command that is refused."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    lines = result.stderr.splitlines()
    assert len(lines) == 1 and lines[0].startswith("batchshaping: "), result.stderr
    return lines[0].removeprefix("batchshaping: ")
