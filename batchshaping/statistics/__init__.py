r"""The statistics: how far samples in order are from a prior.

With order statistics :math:`x_{(1)} \le \dots \le x_{(N)}` and plotting positions
:math:`p_i = i / (N + 1)`, each is the mean over i of its terms:

- Cramér-von Mises, :math:`(F(x_{(i)}) - p_i)^2`, weighs all parts of the prior alike. Its gradient vanishes
  where the density does;
- Anderson-Darling, twice the relative entropy of :math:`p_i` to :math:`F(x_{(i)})`, is near the fit that over
  :math:`p_i (1 - p_i)`. Its gradient grows with the distance from the prior's mass;
- Wasserstein, :math:`(x_{(i)} - F^{-1}(p_i))^2`, has a gradient that is the distance itself.

Epps-Pulley compares characteristic functions instead, for a Normal prior.

A statistic of one's own is a subclass of :class:`Statistic` with one method.
"""

from __future__ import annotations

from batchshaping.statistics.anderson_darling import AndersonDarling
from batchshaping.statistics.cramer_von_mises import CramerVonMises
from batchshaping.statistics.epps_pulley import EppsPulley
from batchshaping.statistics.line import on_the_line
from batchshaping.statistics.samples import Batch, Options, Samples
from batchshaping.statistics.statistic import (
    ClosedForm,
    ClosedFormStatistic,
    Comparison,
    Discrepancy,
    Needs,
    Statistic,
    Terms,
)
from batchshaping.statistics.wasserstein import Wasserstein

__all__ = [
    "AndersonDarling",
    "Batch",
    "ClosedForm",
    "ClosedFormStatistic",
    "Comparison",
    "CramerVonMises",
    "Discrepancy",
    "EppsPulley",
    "Needs",
    "Options",
    "STATISTICS",
    "Samples",
    "Statistic",
    "Terms",
    "Wasserstein",
    "on_the_line",
]

STATISTICS: dict[str, Discrepancy] = {
    "cramer_von_mises": CramerVonMises(),
    "anderson_darling": AndersonDarling(),
    "wasserstein": Wasserstein(),
    "epps_pulley": EppsPulley(),
}
"""The statistics by the names under which the loss takes them."""
