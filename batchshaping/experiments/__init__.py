"""Experiments that the notebooks and the command line repeat."""
