"""Residual networks whose channels are switched example by example, and what that saves."""
