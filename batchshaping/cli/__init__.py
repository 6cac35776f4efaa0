"""The command line: ``batchshaping fit`` shapes values to a prior; the other commands train gated networks.

What cannot be done is said in one line on stderr, with exit code 2, and leaves every file as it was.
"""

from batchshaping.cli.errors import extras

with extras():
    from batchshaping.cli.command import app, main
    from batchshaping.cli.demonstration import demo
    from batchshaping.cli.export import export
    from batchshaping.cli.runs import evaluate, report
    from batchshaping.cli.shaping import fit

__all__ = ["app", "demo", "evaluate", "export", "fit", "main", "report"]
