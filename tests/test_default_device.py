"""Code that names no devices works whatever torch's default device is.

The data are on the CPU and the default is "meta", whose tensors have no numbers: whatever is made
there by mistake cannot be used. It stands for "cuda", the usual default.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

import hessreg
from hessreg import kernels
from hessreg.curvature import (
    HessianOperator,
    InputHessianOperator,
    eigenvalues,
    lanczos,
    norm,
    power_iteration,
    spectral_density,
    trace,
)
from hessreg.dynamics import Extragradient, bilinear_game, jacobian
from hessreg.optim import HessianCorrection, correction_step
from hessreg.regularizers import (
    DRAGAN,
    HSN1R,
    R1,
    R2,
    WGANGP,
    GaussianKernel,
    HessianPenalty,
    IterativeGradientPenalty,
    StepContext,
    hsn1r_loss,
)

_NOISE_TO_X = nn.Linear(2, 4)
_ORIGIN = torch.zeros(2, dtype=torch.float64, device="cpu")
X = torch.linspace(-1.0, 1.0, 24, device="cpu").view(6, 4)


def network(is_fused):
    """A perceptron, or one that is left to autograd."""
    torch.manual_seed(0)
    first = nn.Linear(4, 5) if is_fused else nn.Bilinear(4, 4, 5)
    layers = nn.Sequential(nn.Tanh(), nn.Linear(5, 1))
    return nn.Sequential(first, *layers) if is_fused else _Squared(first, layers)


class _Squared(nn.Module):
    def __init__(self, first, rest):
        super().__init__()
        self.first, self.rest = first, rest

    def forward(self, x):
        return self.rest(self.first(x, x))


def corrected(net):
    def loss():
        return net(X).square().mean()

    sgd = torch.optim.SGD(net.parameters(), lr=0.0)
    loss().backward()
    HessianCorrection(sgd, lambda: hessian(net)).step()


def hessian(net):
    return HessianOperator(lambda: net(X).square().mean(), net.parameters())


def added_twice(regularizer):
    """What it adds to a step, and to the next, for which it may have kept something."""

    def add(net):
        loss = net(X).square().mean()
        context = StepContext(0, net, net, loss, loss, real=X, fake=X.flip(0), noise=X)
        made = regularizer()
        for _ in range(2):
            made.loss_terms(context)

    return add


CURVATURE = {
    "eigenvalues": lambda net: eigenvalues(hessian(net), k=2),
    "trace": lambda net: trace(hessian(net)),
    "spectral density": lambda net: spectral_density(hessian(net)).cumulative([0.0, 1.0]),
    "lanczos": lambda net: lanczos(hessian(net), 4),
    "power iteration": lambda net: power_iteration(hessian(net), 4),
    "correction step": lambda net: correction_step(hessian(net), torch.ones_like(_flat(net))),
    "corrected optimizer": corrected,
    "hsn1r_loss": lambda net: hsn1r_loss(_NOISE_TO_X, net, X, 0.1),
}
CURVATURE |= {
    f"norm {ord}": lambda net, ord=ord: norm(hessian(net), ord)
    for ord in ("spectral", "nuclear", "one", "fro")
}
CURVATURE |= {
    f"input norm {ord}": lambda net, ord=ord: InputHessianOperator(net, X).norm(ord)
    for ord in ("spectral", "nuclear", "one", "fro")
}
CURVATURE |= {
    f"HSN1R {ord}": added_twice(lambda ord=ord: HSN1R(norm=ord, method="krylov"))
    for ord in ("spectral", "nuclear", "one")
}
CURVATURE |= {
    regularizer.__name__: added_twice(regularizer)
    for regularizer in (DRAGAN, R1, R2, WGANGP, HessianPenalty, IterativeGradientPenalty)
}
CURVATURE |= {
    f"GaussianKernel {sigma}": added_twice(lambda sigma=sigma: GaussianKernel(sigma=sigma))
    for sigma in ("ema", "median", "learned", 1.0)
}
OPERATORS = {
    "mmd2": lambda: hessreg.mmd2(X, -X, [1.0, 2.0]),
    "median": lambda: kernels.median_bandwidth(X, -X, 4),
    "projection": lambda: hessreg.project_orthogonal([X, None], [-X.flip(0), None]),
    "projection of nothing": lambda: hessreg.project_orthogonal_([None], [None]),
    "lanczos": lambda: hessreg.lanczos(X.mT @ X, 3),
    "power iteration": lambda: hessreg.power_iteration(X.mT @ X, 3),
    "norm": lambda: hessreg.symmetric_norm(X.mT @ X, "nuclear"),
    "game": lambda: Extragradient(0.1).step(bilinear_game(), X[0, :2].double(), None),
    "factor of a game": lambda: Extragradient(0.1).factor(jacobian(bilinear_game(), _ORIGIN), 1),
}


def _flat(net):
    return nn.utils.parameters_to_vector(net.parameters()).detach()


@pytest.mark.parametrize("is_fused", [True, False])
@pytest.mark.parametrize("call", CURVATURE)
def test_curvature_and_regularisers(call, is_fused):
    net = network(is_fused)
    with torch.device("meta"):
        CURVATURE[call](net)


@pytest.mark.parametrize("call", OPERATORS)
def test_operators(call):
    with torch.device("meta"):
        OPERATORS[call]()
