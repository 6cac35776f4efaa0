"""``python -m batchshaping`` does what the command ``batchshaping`` does."""

from batchshaping.cli import main

__all__ = ["main"]

if __name__ == "__main__":
    main()
