"""Logistic regression on features: what a frozen network, or raw pixels, are worth."""

import logging
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

log = logging.getLogger(__name__)


class LinearProbe(NamedTuple):
    """A linear classifier of features, float64 on their device.

    Attributes:
        weight: [L,D].
        bias: [L].
        loss: the minimum found: mean cross-entropy plus penalty.
    """

    weight: Tensor
    bias: Tensor
    loss: float

    def predict(self, features: Tensor) -> Tensor:
        """Scores [n,L] of features [n,D]."""
        return features.to(self.weight) @ self.weight.T + self.bias


@torch.no_grad()
def fit_logistic_regression(
    features: Tensor,
    labels: Tensor,
    *,
    num_classes: int,
    l2: float = 1.0,
    standardize: bool = True,
    max_iter: int = 1000,
    tolerance: float = 1e-10,
    start: LinearProbe | None = None,
) -> LinearProbe:
    """Fit multinomial logistic regression by L-BFGS in float64.

    Minimises the summed cross-entropy plus `l2 / 2` times the squared norm of the weights, so `l2` is the
    `1 / C` of scikit-learn. Biases are free. The search runs along the principal axes of the features, each
    in the unit of its curvature at the start: the same minimum, in about half the iterations.

    Args:
        features: [n,D], any float dtype, any device with float64.
        labels: int64 [n], in [0, num_classes).
        num_classes: L; classes without samples are allowed.
        l2: strength of the penalty, > 0.
        standardize: penalise weights of features brought to mean 0 and deviation 1; the result takes features
            as they are.
        max_iter: iterations at most; a fit that stops there is used, and warned about.
        tolerance: ends when an iteration lowers the loss by a smaller share.
        start: a probe of the same features to begin with, such as that of the next stronger penalty.

    Raises:
        ValueError: if l2 is not above 0.
    """
    from scipy.optimize import minimize

    if l2 <= 0:
        raise ValueError(f"l2 {l2} is not above 0: separable classes have no optimum without a penalty")
    x = features.double()
    n, D = x.shape
    shift = x.mean(0)
    scale = x.std(0, correction=0) if standardize else torch.ones_like(shift)
    scale[scale == 0] = 1.0  # a constant feature says nothing
    x = (x - shift) / scale  # the shift alone changes no minimum, only how fast it is found
    variance, axes = torch.linalg.eigh(x.T @ x)
    # what a weight along each axis adds to the curvature where all classes are equally likely
    curvature = (num_classes - 1) / num_classes**2 * variance.clamp(min=0) + l2
    units = (n / curvature).sqrt()  # [D]
    x = x @ (axes * units)
    truth = F.one_hot(labels, num_classes).to(x)  # [n,L]

    def loss_and_gradient(flat: np.ndarray) -> tuple[float, np.ndarray]:
        parameters = torch.from_numpy(flat).to(x.device).view(num_classes, D + 1)
        weight, bias = parameters[:, :D], parameters[:, D]
        log_p = F.log_softmax(torch.addmm(bias, x, weight.T), dim=1)  # [n,L]
        shrunk = weight * units.square()
        loss = (l2 / 2 * (weight * shrunk).sum() - (log_p * truth).sum()) / n
        error = (log_p.exp() - truth) / n
        gradient = torch.cat([error.T @ x + l2 / n * shrunk, error.sum(0)[:, None]], dim=1)
        return float(loss), gradient.flatten().cpu().numpy()

    first = torch.zeros(num_classes, D + 1, dtype=x.dtype, device=x.device)
    if start is not None:
        first[:, :D] = start.weight * scale @ axes / units
        first[:, D] = start.bias + start.weight @ shift
    found = minimize(
        loss_and_gradient,
        first.flatten().cpu().numpy(),
        jac=True,
        method="L-BFGS-B",
        options={"maxiter": max_iter, "maxfun": 2 * max_iter, "ftol": tolerance, "gtol": 1e-5},
    )
    if not found.success:
        log.warning("logistic regression stopped early after %d iterations: %s", found.nit, found.message)
    parameters = torch.from_numpy(found.x).to(x.device).view(num_classes, D + 1)
    weight = (parameters[:, :D] * units) @ axes.T / scale
    return LinearProbe(weight, parameters[:, D] - weight @ shift, float(found.fun))
