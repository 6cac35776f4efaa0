"""The inverse of the regularized incomplete beta function, the quantile function of the Beta distribution."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from batchshaping.cdfs.beta import CHUNK, EPS, BetaCDF, beta_pdf, fixed_beta_cdf
from batchshaping.cdfs.beta_density import (
    SMALL,
    log_beta,
    valid_concentration,
)
from batchshaping.cdfs.elementwise import as_operands, elementwise_vmap, sum_to
from batchshaping.cdfs.prepared import LogCDFDerivatives

__all__ = ["betaincinv"]
_INVERSE_TILE = 2**15
# Of 60,000 random parameters in [1e-12, 1e12] none took more than 4 steps, where it can be seen that all are
# found; twice as many are made where it cannot.
_INVERSE_STEPS, _UNSEEN_INVERSE_STEPS = 60, 8


def _invert(a: Tensor, b: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
    """The quantile of p and its logit, for any number of parameters and probabilities."""
    p, shape = p.double(), torch.broadcast_shapes(a.shape, b.shape, p.shape)
    if a.numel() == b.numel() == 1 and a.is_cpu and b.is_cpu and p.is_cpu:
        cdf = fixed_beta_cdf(float(a.detach()), float(b.detach()), torch.float64, tails=True)
        parts = [_quantile(cdf, a.reshape(()), b.reshape(()), y) for y in p.reshape(-1).split(_INVERSE_TILE)]
    else:
        operands = torch.broadcast_tensors(*(t.to(p.device, non_blocking=True) for t in (a, b)), p)
        chunks = (t.reshape(-1).split(CHUNK if p.is_cpu else max(t.numel(), 1)) for t in operands)
        parts = [
            _quantile(BetaCDF(c, d, torch.float64, tails=True), c, d, y)
            for c, d, y in zip(*chunks, strict=True)
        ]
    x, logits = (torch.cat(found).reshape(shape) for found in zip(*parts, strict=True))
    return x, logits


def _start(first: Tensor, second: Tensor, tail: Tensor) -> Tensor:
    """A logit near that of the quantile of a lower tail of Beta(first, second), at most 1/2.

    If both parameters are above 1, by the Normal approximation (Abramowitz and Stegun 26.5.22); if the first
    only is, by that of -log x as a Gamma variable; otherwise, and as a bound, by the power laws at the ends.
    """
    log_tail = tail.log()
    log_whole = log_beta(first, second)
    power, log_rest = (log_tail + first.log() + log_whole) / first, torch.log1p(-tail)
    # Log(second B) / second at small second, where the logarithm has no digits left.
    limit = (
        torch.log1p(second / first) / second - torch.digamma(first + 1) + torch.digamma(torch.ones_like(tail))
    )
    far_power = torch.where(
        second < SMALL, log_rest / second + limit, (log_rest + second.log() + log_whole) / second
    ).clamp_max(-math.log(2))
    split = (first + 1).log() - (second + 1).log()
    power = torch.where(power < -1e-3, _logit_of_exp(power), split)
    # Right of the split, 1 - x has a power law if there is no peak.
    beyond = torch.where(first <= 1, torch.maximum(split, -_logit_of_exp(far_power)), split)
    power = torch.where(power < split, power, beyond)
    # The Gamma variable is large, or a power of its own lower tail.
    shape = second.clamp_max(1.0)
    log_gamma = torch.lgamma(shape + 1)
    excess = log_gamma - shape.log() + log_tail
    large = (-excess).clamp_min(1.0)
    large = (large + (shape - 1) * large.log()).clamp_min(1.0)
    log_variable = torch.where(excess < -1, large.log(), (torch.log1p(-tail) + log_gamma) / shape)
    gamma = _logit_of_exp(
        -(log_variable - (first + (second - 1) / 2).log()).exp(), log_variable - first.log()
    )
    # Concentrations less 1/2 are harmonically averaged; where one is below 1, nobody looks at the result.
    inverse_first, inverse_second = (0.5 / (t.clamp_min(1.0) - 0.5) for t in (first, second))
    deviate = -torch.special.ndtri(tail)
    third, mean = (deviate.square() - 3) / 6, 2 / (inverse_first + inverse_second)
    spread = deviate * (third + mean).clamp_min(0.0).sqrt() / mean
    skew = (inverse_second - inverse_first) * (third + 5 / 6 - 2 / (3 * mean))
    normal = torch.maximum(first.log() - second.log() - 2 * (spread - skew), power)
    return torch.where(first <= 1, power, torch.where(second <= 1, gamma, normal))


def _logit_of_exp(log_x: Tensor, log_of_minus: Tensor | None = None) -> Tensor:
    """Logit(x) from log x, and where that underflows from log(-log x)."""
    logit = log_x - torch.log(-torch.expm1(log_x))
    return logit if log_of_minus is None else torch.where(log_x > -1e-300, -log_of_minus, logit)


def _quantile(cdf: BetaCDF, a: Tensor, b: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
    """An iteration of third order on the logarithm of the smaller tail in logit(x), kept in a bracket.

    That logarithm L is negative and concave, with its first two derivatives at hand. A step goes to the root
    of the power of a line that has them too, which is L itself where L is like a power of x, the square of a
    Normal tail or the exponential of an extreme value. The last step, in x itself, takes out the rounding of
    the logit. What has not been found is NaN.
    """
    a, b = a.double(), b.double()
    valid = (p >= 0) & (p <= 1) & valid_concentration(a) & valid_concentration(b)
    is_end = (p == 0) | (p == 1)
    # 0 and 1 have infinite logits; something else is looked for there.
    sought = torch.where(is_end | ~valid, 0.25, p)
    targets = sought.log(), torch.log1p(-sought)
    is_lower = sought <= 0.5
    first, second = torch.where(is_lower, a, b), torch.where(is_lower, b, a)
    start = _start(first, second, torch.where(is_lower, sought, 1 - sought))
    logits = torch.where(is_lower, start, -start)
    least, greatest = torch.full_like(logits, -torch.inf), torch.full_like(logits, torch.inf)
    found = torch.zeros_like(is_end)
    for _ in range(_INVERSE_STEPS if p.is_cpu else _UNSEEN_INVERSE_STEPS):
        on_left, log_tail, slope, target = _smaller_tail(cdf.logs_at_logits(logits), *targets)
        excess = log_tail - target
        too_low = (excess < 0) == on_left
        least = torch.where(too_low, torch.maximum(least, logits), least)
        greatest = torch.where(too_low, greatest, torch.minimum(greatest, logits))
        # The logarithm of the logit's density has the derivative a (1 - x) - b x.
        bend = (a * torch.sigmoid(-logits) - b * torch.sigmoid(logits)) / slope - 1
        # So far out that rounding hides the bend, only a Normal tail is this steep.
        power = torch.where(log_tail < -1e10, 0.5, (1 - log_tail * bend).clamp(1e-6, 1.0))
        step = -log_tail / slope * torch.expm1(power * torch.log(target / log_tail)) / power
        rounding = 4 * EPS * logits.abs().clamp_min(1.0)
        close = (excess.abs() < 1e-4) | (step.abs() <= rounding) | (greatest - least <= rounding)
        moved, middle = logits - step, (least + greatest) / 2
        astray = ~((moved > least) & (moved < greatest)) & ~close & middle.isfinite()
        # One step more triples the digits of what is close; then it is left alone.
        logits = torch.where(found, logits, torch.where(astray, middle, moved))
        found = found | close
        if p.is_cpu and bool((found | ~valid).all()):
            break
    # The sigmoid underflows before its logarithm does.
    x = torch.where(logits < -40, logits.exp(), torch.sigmoid(logits))
    _, log_tail, slope, target = _smaller_tail(cdf.logs(x), *targets)
    step = (log_tail - target) / slope * x * (1 - x)
    x = torch.where((x > 0) & (x < 1) & (step.abs() < 1e-3 * torch.minimum(x, 1 - x)), x - step, x)
    x, logits = (torch.where(found & valid, t, torch.nan) for t in (x, logits))
    return torch.where(is_end & valid, p, x), torch.where(is_end, torch.nan, logits)


def _smaller_tail(at: LogCDFDerivatives, log_p: Tensor, log_q: Tensor) -> tuple[Tensor, ...]:
    """Whether the lower is, its logarithm, the derivative of that, and what the logarithm should be."""
    on_left = at.log_cdf < at.log_sf
    pairs = ((at.log_cdf, at.log_sf), (at.cdf_by_x, at.sf_by_x), (log_p, log_q))
    return on_left, *(torch.where(on_left, lower, upper) for lower, upper in pairs)


class _QuantileSlopes(torch.autograd.Function):
    """The derivatives of a quantile in p, a and b at its logit; themselves differentiable in nothing."""

    @staticmethod
    def forward(a: Tensor, b: Tensor, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return BetaCDF(a, b, torch.float64, gradients=True, tails=True).slopes_of_quantile(logits)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        raise NotImplementedError(
            "betaincinv is differentiable once in a and b, twice in p; received a second derivative in a or b"
        )

    @staticmethod
    def vmap(info: Any, in_dims: Any, *tensors: Tensor) -> Any:
        return elementwise_vmap(_QuantileSlopes.apply, in_dims, *tensors), (0, 0, 0)


class _BetaIncInv(torch.autograd.Function):
    """The quantile and, in double precision, its logit."""

    @staticmethod
    def forward(a: Tensor, b: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
        x, logits = _invert(a, b, p)
        return x.to(p.dtype), logits

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(*inputs, *output)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, _: Tensor) -> Any:
        # The implicit function theorem at I_x(a, b) = p: dx = (dp - I_a da - I_b db) / f.
        a, b, p, x, logits = ctx.saved_tensors
        needs_a, needs_b, needs_p = ctx.needs_input_grad
        largest = torch.finfo(x.dtype).max
        # The quantiles of 0 and 1 move with nothing.
        is_end = (p == 0) | (p == 1)
        by_p, by_a, by_b = (
            torch.where(is_end, 0.0, by.clamp(-largest, largest))
            for by in _QuantileSlopes.apply(a, b, logits)
        )
        if torch.is_grad_enabled():
            # A slope less itself is nothing, but its derivatives are those of the slope.
            pdf = beta_pdf(a, b, x)
            slope = torch.where(pdf > 0, 1 / torch.where(pdf > 0, pdf, 1.0), 0.0)
            by_p = by_p.detach() + (slope - slope.detach())
        return (
            sum_to(gradient * by_a, a) if needs_a else None,
            sum_to(gradient * by_b, b) if needs_b else None,
            sum_to(gradient * by_p, p) if needs_p else None,
        )

    @staticmethod
    def vmap(info: Any, in_dims: Any, *tensors: Tensor) -> Any:
        return elementwise_vmap(_BetaIncInv.apply, in_dims, *tensors), (0, 0)


def betaincinv(a: Tensor | float, b: Tensor | float, p: Tensor | float) -> Tensor:
    r"""The quantile function of Beta(a, b), the inverse of the regularized incomplete beta function in x.

    .. math::
        x = \inf \{ t : I_t(a, b) \ge p \}

    Differentiable in a, b and p by the implicit function theorem.

    Args:
        a: first concentration, positive, of any shape.
        b: second concentration, positive, of a shape that broadcasts with a's.
        p: probability in [0, 1], of a shape that broadcasts with theirs; NaN is returned outside.

    Returns:
        A tensor of the broadcast shape with values in [0, 1], in the widest dtype among the given tensors.

    Raises:
        TypeError: if an operand is an integer tensor.
        ValueError: if the shapes do not broadcast.

    Example:
        >>> betaincinv(2.0, 6.0, torch.tensor([0.1, 0.5, 0.9]))
        tensor([0.0788, 0.2285, 0.4526])
    """
    operands = as_operands(a=a, b=b, p=p)
    result: Tensor = _BetaIncInv.apply(*operands)[0]
    return result
