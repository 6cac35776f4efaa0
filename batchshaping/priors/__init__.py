"""Priors: torch distributions with a prepared CDF, and how a module owns one."""

from batchshaping.priors.closed_form import ClosedFormPrior, Range, check_parameters
from batchshaping.priors.families import Beta, Normal, RelaxedBernoulli, SymBeta

__all__ = ["Beta", "ClosedFormPrior", "Normal", "Range", "RelaxedBernoulli", "SymBeta", "check_parameters"]
