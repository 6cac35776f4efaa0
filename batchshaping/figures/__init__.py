"""Figures and animations in one style: a sample beside its prior, and a fit from its first step to its last.

They need the extra ``viz``.
"""

try:
    import matplotlib as _matplotlib  # noqa: F401
    import PIL as _PIL  # noqa: F401
except ImportError as error:
    raise ImportError(
        f"batchshaping.figures needs {error.name}: pip install 'batchshaping[viz]'", name=error.name
    ) from None
