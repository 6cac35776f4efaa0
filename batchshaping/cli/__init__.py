"""The command line: ``batchshaping fit`` shapes values to a prior; the others train and time gated networks.

What cannot be done is said in one line on stderr, with exit code 2, and leaves every file as it was.
"""

from batchshaping.cli.errors import extras

with extras():
    from batchshaping.cli.benchmarks import bench
    from batchshaping.cli.command import app, main
    from batchshaping.cli.demonstration import demo
    from batchshaping.cli.export import export
    from batchshaping.cli.faster import faster
    from batchshaping.cli.runs import evaluate, report
    from batchshaping.cli.shaping import fit

__all__ = ["app", "bench", "demo", "evaluate", "export", "faster", "fit", "main", "report"]
