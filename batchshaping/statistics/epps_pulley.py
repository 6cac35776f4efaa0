"""The Epps-Pulley statistic: the squared distance of two characteristic functions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributions import Distribution

from batchshaping.priors.closed_form import ClosedFormPrior
from batchshaping.priors.families import Normal
from batchshaping.statistics.samples import Batch, Options
from batchshaping.statistics.statistic import ClosedForm, Needs

__all__ = ["EppsPulley"]


class EppsPulley(ClosedForm):
    r"""The squared distance of the empirical characteristic function to that of a Normal prior.

    .. math::
        \int_{-T}^{T} \left| \frac{1}{N} \sum_j e^{i t z_j} - e^{-t^2 / 2} \right|^2 e^{-t^2 / 2} \, dt,
        \qquad z_j = \frac{x_j - \mu}{\sigma}

    by the trapezoidal rule on [0, T], since both halves of the integral are equal. It does not depend on the
    order of the samples, so ``ties`` changes nothing, and samples from a history count like the current ones.
    Times N it is the statistic of SIGReg in LeJEPA.

    Args:
        limit: T.
        points: number of points in [0, T].

    References:
        Epps and Pulley, A test for normality based on the empirical characteristic function, 1983.
        Balestriero and LeCun, LeJEPA, 2025, https://arxiv.org/abs/2511.08544.
    """

    def __init__(self, limit: float = 3.0, points: int = 17) -> None:
        self.t = torch.linspace(0.0, limit, int(points), dtype=torch.float64, device="cpu")
        self.target = torch.exp(-self.t.square() / 2)
        step = limit / (points - 1)
        self.weights = self.target * 2 * step
        self.weights[[0, -1]] /= 2

    def loss(self, batch: Batch, prior: Distribution, options: Options) -> Tensor:
        if not isinstance(prior, torch.distributions.Normal):
            raise ValueError(f"epps_pulley needs a Normal prior, received {prior}")
        x, count, _ = batch
        left_out = (
            torch.zeros((), dtype=torch.bool, device=x.device) if count is None else _left_out(x, count)
        )
        x = x.masked_fill(left_out, 0.0)
        values = torch.sigmoid(x) if options.logits else x
        z = (values - prior.loc.unsqueeze(-1)) / prior.scale.unsqueeze(-1)
        n = x.shape[-1] if count is None else count
        total = torch.zeros_like(z[..., 0])
        for t, target, weight in zip(
            self.t.tolist(), self.target.tolist(), self.weights.tolist(), strict=True
        ):
            cosine, sine = (
                f(t * z).masked_fill(left_out, 0.0).sum(dim=-1) / n for f in (torch.cos, torch.sin)
            )
            total = total + weight * ((cosine - target).square() + sine.square())
        return total

    def loss_and_gradients(
        self,
        batch: Batch,
        prior: type[ClosedFormPrior],
        parameters: Sequence[Tensor],
        options: Options,
        needs: Needs,
    ) -> list[Tensor]:
        if not issubclass(prior, Normal):
            raise ValueError(f"epps_pulley needs a Normal prior, received {prior.__name__}")
        x, count = batch.values.contiguous(), batch.counts
        loc, scale = (p.unsqueeze(-1).to(x.dtype) if p.ndim else p.to(x.dtype) for p in parameters)
        values = torch.sigmoid(x) if options.logits else x
        z = (values - loc) / scale
        n: Tensor | int = x.shape[-1]
        left_out: Tensor | None = None
        if count is not None:
            # A value that is left out is set to 0, where it adds 1 to every sum.
            n, left_out = count.unsqueeze(-1), _left_out(x, count)
            z.masked_fill_(left_out, 0.0)
        # The points are multiples of the first, so that one sine and one cosine of each value are enough: the
        # terms at the other points are powers of that rotation.
        rotation = torch.polar(torch.ones_like(z), z * float(self.t[1]))
        power = torch.ones_like(rotation)
        means = [torch.ones_like(rotation[..., :1])]
        for _ in self.t[1:]:
            power.mul_(rotation)
            means.append((power.sum(dim=-1, keepdim=True) - (x.shape[-1] - n)) / n)
        difference = torch.cat(means, dim=-1) - self.target.to(x)
        weights = self.weights.to(x)
        loss = (difference.abs().square() * weights).sum(dim=-1)
        # The derivative in z is 2 / N Re sum_k w_k conj(d_k) i t_k e^(i t_k z): a polynomial in the rotation.
        # A compiled operation does not resolve a lazy conjugate, so the values are conjugated here.
        coefficients = torch.conj_physical(difference) * (weights * self.t.to(x) * 1j)
        polynomial = power.copy_(coefficients[..., -1:].expand_as(power))
        for k in range(len(self.t) - 2, -1, -1):
            polynomial.mul_(rotation).add_(coefficients[..., k : k + 1])
        gradient = polynomial.real / scale
        if left_out is not None:
            gradient.masked_fill_(left_out, 0.0)
        in_parameters = [-gradient.sum(dim=-1), -(gradient * z).sum(dim=-1)]
        if options.logits:
            gradient.mul_(torch.sigmoid(-x)).mul_(values)
        number = torch.as_tensor(n, dtype=x.dtype, device=x.device).squeeze(-1)
        return [
            loss,
            gradient if needs.values else x.new_empty(0),
            2 / number.expand(loss.shape).contiguous(),
            *(in_parameters if needs.parameters else ()),
        ]


def _left_out(x: Tensor, count: Tensor) -> Tensor:
    """Which values of x are no samples: as many of an array's last infinite values as exceed its count."""
    is_infinite = x == torch.inf
    seen = is_infinite.cumsum(dim=-1)
    samples = seen[..., -1:] - (x.shape[-1] - count.unsqueeze(-1))
    return is_infinite & (seen > samples)
