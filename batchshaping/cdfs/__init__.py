"""Cumulative distribution functions: value, inverse and every derivative."""
