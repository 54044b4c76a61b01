"""Hessian Singularity Correction: steps with H + eps^2 H^-1 in place of a Hessian H.

Of an explicit matrix, and matrix-free. Writing l for an eigenvalue of H, the corrected step of a
gradient is p = f(H) g with f(l) = (l + mu eps^2) / (l^2 + eps^2): the inverse of l + eps^2 / l, and
what gives the kernel of H the step mu g. p is finite for every H, as no inverse is ever taken.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from hessreg.curvature._checks import (
    NonFiniteError,
    check_at_least,
    check_not_negative,
    of_operator,
)
from hessreg.curvature._krylov import random_signs
from hessreg.curvature.lanczos import norm_of, report_non_finite
from hessreg.curvature.matrix_function import matrix_function
from hessreg.curvature.operators import LinearOperator
from hessreg.ops import symmetric_eigh
from hessreg.ops._registry import is_tracked
from hessreg.optim._corrected_matrix import (
    Eigenpairs,
    fixed_matrix,
    inverse_of,
    resolvent_product,
    resolvent_values,
)
from hessreg.optim._krylov_curvature import (
    ROUNDING,
    KrylovCurvature,
    check_damping,
    check_vector,
    corrected_inverse,
)
from hessreg.optim._shifted import Solution, damped_least_squares, shifted_minres

__all__ = [
    "CorrectionMethod",
    "CorrectionStep",
    "correct",
    "correction_step",
    "diagonal_preconditioner",
    "solve_corrected",
]

CorrectionMethod = Literal["lanczos", "minres", "cg"]

_BLOCK = 32  # vectors multiplied at once


# ---- explicit matrices ---------------------------------------------------------------------------


def correct(H: Tensor, eps: float = 1.0, *, mu: float = 1.0, saddle_free: bool = False) -> Tensor:
    r"""The corrected matrices H + eps^2 H^-1, of full rank for every H.

    An eigenvalue l becomes l + eps^2 / l, of magnitude at least 2 eps and of the same sign; what is
    zero to rounding, at most n epsilons of the largest, becomes 1 / mu. Computed in float64 through
    :func:`hessreg.symmetric_eigh`; not finite where eps^2 / l or 1 / mu overflows.

    Differentiable in H to every order, also at repeated eigenvalues, as far as what is zero stays
    zero; with ``saddle_free`` once.

    Args:
        H: symmetric matrices [..., n, n] in float32 or float64.
        eps: 1 is H + H^-1.
        mu: see above; with 0 what is zero stays zero.
        saddle_free: |H| + eps^2 |H|^-1, positive definite.

    Returns:
        Matrices [..., n, n], like H and symmetric to the last bit.

    Raises:
        TypeError: H is not a tensor of float32 or float64.
        ValueError: not square, not finite or not symmetric; eps <= 0; mu < 0.

    Example:
        >>> correct(torch.diag(torch.tensor([4.0, -0.5, 0.0])))
        tensor([[ 4.2500,  0.0000,  0.0000],
                [ 0.0000, -2.5000,  0.0000],
                [ 0.0000,  0.0000,  1.0000]])
    """
    check_damping(eps, mu)
    wide, pairs = _decomposed(H)
    values = pairs.values
    sizes = values.abs()
    rounding = values.shape[-1] * torch.finfo(H.dtype).eps
    is_zero = sizes <= rounding * _largest(sizes)
    at_zero = torch.where(is_zero, values.new_tensor(1 / mu if mu else 0.0), 0)
    ratios = torch.where(is_zero, 0, eps / torch.where(is_zero, 1, values))
    if saddle_free:
        weights = torch.where(is_zero, at_zero, sizes + eps * ratios.abs())
        differences = _signs(values) * (1 - _products(ratios.abs(), ratios.abs()))
        return _symmetric(fixed_matrix(wide, pairs, weights, differences)).to(H.dtype)
    inverse = inverse_of(wide, pairs, eps * ratios, eps)
    return _symmetric(wide + inverse + pairs.matrix(at_zero)).to(H.dtype)


def solve_corrected(
    H: Tensor, g: Tensor, eps: float = 1.0, *, mu: float = 1.0, saddle_free: bool = False
) -> Tensor:
    r"""The corrected steps p = f(H) g, with f(l) = (l + mu eps^2) / (l^2 + eps^2).

    With ``mu=0`` it is ``torch.linalg.solve(correct(H, eps), g)`` where H is not singular, and goes
    on to be finite where it is; the kernel gets ``mu * g``. Computed in float64 through
    :func:`hessreg.symmetric_eigh`: for n <= 128 the whole batch in one launch.

    Differentiable in H and g to every order, also at repeated eigenvalues; with ``saddle_free``
    once.

    Args:
        H: symmetric matrices [..., n, n] in float32 or float64.
        g: vectors [..., n], like H in dtype and device; batches broadcast.
        eps: damping: eigenvalues below it in magnitude count as singular.
        mu: step along what is singular.
        saddle_free: |l| in place of l: p is always a descent direction.

    Returns:
        Steps [..., n].

    Raises:
        TypeError: H or g is not a tensor of float32 or float64, or not of the same.
        ValueError: not square, not finite or not symmetric; shapes that do not broadcast; eps <= 0;
            mu < 0.

    Example:
        >>> H = torch.diag(torch.tensor([3.0, 0.0, -3.0]))
        >>> solve_corrected(H, torch.ones(3), mu=0.0)
        tensor([ 0.3000,  0.0000, -0.3000])
        >>> solve_corrected(H, torch.ones(3), saddle_free=True)
        tensor([0.4000, 1.0000, 0.4000])
    """
    check_damping(eps, mu)
    wide, pairs = _decomposed(H)
    _check_vectors(H, g)
    batch = torch.broadcast_shapes(H.shape[:-2], g.shape[:-1])
    vectors = g.double().expand(*batch, g.shape[-1])
    weights = corrected_inverse(pairs.values, eps, mu, saddle_free)
    if not is_tracked([H, g]):
        return pairs.product(weights, vectors).to(g.dtype)
    wide = wide.expand(*batch, *H.shape[-2:])
    if not saddle_free:
        return resolvent_product(wide, pairs, vectors, 1.0, mu * eps, eps).to(g.dtype)
    matrix = fixed_matrix(wide, pairs, weights, _step_differences(pairs.values, eps, mu))
    return (matrix @ vectors[..., None])[..., 0].to(g.dtype)


def _step_differences(values: Tensor, eps: float, mu: float) -> Tensor:
    """Divided differences of (|l| + mu eps^2) / (l^2 + eps^2), [..., n, n].

    (eps^2 - ab - mu eps^2 (a + b)) / ((a^2 + eps^2)(b^2 + eps^2)) at magnitudes a and b.
    """
    real, imaginary = (resolvent_values(values.abs(), *part, eps) for part in ((1, 0), (0, 1)))
    crossed = _products(real, imaginary)
    same = _products(imaginary, imaginary) - _products(real, real)
    return _signs(values) * (same - mu * eps * (crossed + crossed.mT))


def _products(a: Tensor, b: Tensor) -> Tensor:
    return a[..., :, None] * b[..., None, :]


def _signs(values: Tensor) -> Tensor:
    """Divided differences of the modulus, (a + b) / (|a| + |b|), [..., n, n]; 0 at 0."""
    scaled = values / _largest(values.abs()).clamp(min=torch.finfo(values.dtype).tiny)
    sums = scaled[..., :, None] + scaled[..., None, :]
    sizes = scaled.abs()[..., :, None] + scaled.abs()[..., None, :]
    return torch.where(sizes == 0, 0, sums / torch.where(sizes == 0, 1, sizes))


def _largest(sizes: Tensor) -> Tensor:
    """The largest of each row, [..., 1]."""
    return sizes.amax(-1, keepdim=True) if sizes.shape[-1] else sizes.sum(-1, keepdim=True)


def _decomposed(H: Tensor) -> tuple[Tensor, Eigenpairs]:
    """H in float64, exactly symmetric and with its graph, and its eigenpairs without."""
    is_symmetric = _check_matrices(H)
    wide = H.double()
    if not is_symmetric or is_tracked([H]):
        wide = _symmetric(wide)
    with torch.no_grad():
        values, vectors = symmetric_eigh(wide.detach())
    return wide, Eigenpairs(values, vectors)


def _symmetric(A: Tensor) -> Tensor:
    """The symmetric part, to the last bit and without overflow."""
    return A / 2 + A.mT / 2


def _check_matrices(H: Tensor) -> bool:
    """Whether they are symmetric to the last bit."""
    if not isinstance(H, Tensor):
        raise TypeError(f"H must be a Tensor, got {type(H).__name__}")
    if H.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"H must be float32 or float64, got {H.dtype}")
    if H.dim() < 2 or H.shape[-1] != H.shape[-2]:
        raise ValueError(f"H must be matrices [..., n, n], got shape {tuple(H.shape)}")
    if H.numel() == 0:
        return True
    values = H.detach()
    largest = values.abs().amax((-2, -1))
    if not torch.isfinite(largest).all():
        raise NonFiniteError("H must be finite, got NaN or infinity")
    asymmetry = (values - values.mT).abs().amax((-2, -1))
    if (asymmetry > largest * torch.finfo(H.dtype).eps ** 0.5).any():
        worst = asymmetry.max().item()
        raise ValueError(f"H must be symmetric, got max |H - H'| = {worst:.3g}")
    return not asymmetry.any()


def _check_vectors(H: Tensor, g: Tensor) -> None:
    if not isinstance(g, Tensor):
        raise TypeError(f"g must be a Tensor, got {type(g).__name__}")
    if g.dtype != H.dtype:
        raise TypeError(f"g must have the dtype of H, {H.dtype}, got {g.dtype}")
    if g.device != H.device:
        raise ValueError(f"g must be on {H.device} like H, got {g.device}")
    n = H.shape[-1]
    if g.dim() < 1 or g.shape[-1] != n:
        raise ValueError(f"g must be vectors [..., {n}] to H, got shape {tuple(g.shape)}")
    if not torch.isfinite(g.detach()).all():
        raise NonFiniteError("g must be finite, got NaN or infinity")
    try:
        torch.broadcast_shapes(H.shape[:-2], g.shape[:-1])
    except RuntimeError:
        batches = tuple(H.shape[:-2]), tuple(g.shape[:-1])
        raise ValueError(
            f"batches must broadcast, got {batches[0]} of H and {batches[1]} of g"
        ) from None


# ---- matrix-free -----------------------------------------------------------------------------


class CorrectionStep(NamedTuple):
    """A corrected step, and how good it is.

    Attributes:
        step: p, [n].
        residual: |b - (H + i eps) z| / |b| where p = Re z and b = (1 + i mu eps) g.
        error: at least |p - f(H) g|: residual |b| / eps, because H + i eps has no singular value
            below eps. With ``saddle_free`` an estimate, and the residual what would bound it.
        num_products: products with H spent.
        converged: whether the residual is at most ``tol``.
    """

    step: Tensor
    residual: float
    error: float
    num_products: int
    converged: bool


@of_operator
@torch.no_grad()
def correction_step(
    op: LinearOperator,
    g: Tensor,
    eps: float = 1.0,
    *,
    mu: float = 1.0,
    saddle_free: bool = False,
    method: CorrectionMethod = "lanczos",
    num_steps: int = 100,
    tol: float | None = None,
    x0: Tensor | None = None,
    preconditioner: Tensor | None = None,
) -> CorrectionStep:
    r"""The corrected step p = f(H) g from products with H alone.

    p is the damped least squares solution of Newton's equation, the least |H p - g|^2 +
    eps^2 |p - mu g|^2, and the real part of z with (H + i eps) z = (1 + i mu eps) g.

    - ``"lanczos"``: f of the Lanczos matrix, with full reorthogonalisation: the fewest products,
      one a step; keeps a vector for each.
    - ``"minres"``: the least residual of the shifted system by short recurrences: a handful of
      vectors; more steps than Lanczos where rounding costs orthogonality.
    - ``"cg"``: conjugate gradients on H^2 + eps^2 I, positive definite for every H: two products a
      step and more steps, but it can start from the last step and be preconditioned.

    All three need about |H| / eps steps times a logarithm of the accuracy at worst, fewer where
    eigenvalues are clustered. Rounding limits the residual to about |H| / eps epsilons: all stop
    when it does not fall any more.

    Args:
        op: symmetric operator H, (n, n).
        g: the gradient [n], like the operator's vectors.
        eps: damping: eigenvalues below it in magnitude count as singular.
        mu: step along what is singular; 0 is the literal (H + eps^2 H^-1)^-1 g.
        saddle_free: |l| in place of l, always a descent direction; with ``"lanczos"`` only.
        method: see above.
        num_steps: at most; ``"lanczos"`` makes no more than n.
        tol: stop at this residual; by default 1e-4 in float32 and 1e-10 in float64.
        x0: first guess of p [n], such as the last step; with ``"cg"`` only.
        preconditioner: positive [n], about the diagonal of H^2 + eps^2 I, as
            :func:`diagonal_preconditioner` estimates it; with ``"cg"`` only.

    Returns:
        The step, and what is known of its error.

    Raises:
        TypeError: op is no operator, g or x0 or the preconditioner not like its vectors, num_steps
            not an int.
        ValueError: an unknown method or an option that is not for it; num_steps < 1; eps <= 0;
            mu < 0; tol < 0; shapes that do not match; a preconditioner that is not positive; an
            operator that is not symmetric.
        NonFiniteError: NaN or infinity in g, x0, the preconditioner or a product.

    References:
        Paige and Saunders, "Solution of sparse indefinite systems of linear equations", 1975, for
        MINRES; Freund, "On conjugate gradient type methods and polynomial preconditioners for a
        class of complex non-Hermitian matrices", 1990, for shifted systems.

    Example:
        >>> from hessreg.curvature import DenseOperator
        >>> H = DenseOperator(torch.diag(torch.tensor([3.0, 0.0, -3.0])))
        >>> correction_step(H, torch.ones(3), mu=0.0).step.abs().round(decimals=4)
        tensor([0.3000, 0.0000, 0.3000])
    """
    tol = (1e-4 if op.dtype == torch.float32 else 1e-10) if tol is None else tol
    _check_step(op, g, eps, mu, num_steps, tol, x0)
    _check_method(op, method, saddle_free, x0, preconditioner)
    size = g.abs().max().item() if len(g) else 0.0
    if size == 0:
        return CorrectionStep(torch.zeros_like(g), 0.0, 0.0, 0, True)
    unit = g / size
    start = None if x0 is None else x0 / size
    solvers: dict[str, Callable[..., Solution]] = {
        "lanczos": _saddle_free if saddle_free else _lanczos,
        "minres": shifted_minres,
        "cg": functools.partial(damped_least_squares, x0=start, preconditioner=preconditioner),
    }
    found = solvers[method](op, unit, eps, mu, num_steps, tol)
    bound = math.hypot(1, mu * eps) / eps * (size * norm_of(unit).item())
    return CorrectionStep(
        size * found.step,
        found.residual,
        found.residual * bound,
        found.num_products,
        found.residual <= tol,
    )


def _lanczos(
    op: LinearOperator, g: Tensor, eps: float, mu: float, num_steps: int, tol: float
) -> Solution:
    space = KrylovCurvature.build(op, g, num_steps, eps=eps, tol=tol)
    return Solution(space.correct(g, eps, mu), space.residual(eps), space.num_products)


def _saddle_free(
    op: LinearOperator, g: Tensor, eps: float, mu: float, num_steps: int, tol: float
) -> Solution:
    largest = 0.0

    def f(values: Tensor) -> Tensor:
        nonlocal largest
        largest = max(largest, values.abs().max().item())
        return corrected_inverse(values, eps, mu, saddle_free=True)

    found = matrix_function(op, f, g, num_steps=num_steps, tol=tol)
    bound = math.hypot(1, mu * eps) / eps * norm_of(g).item()
    rounding = ROUNDING * torch.finfo(op.dtype).eps * (1 + largest / eps)
    return Solution(found.value, found.error / bound + rounding, found.num_products)


@of_operator
@torch.no_grad()
def diagonal_preconditioner(
    op: LinearOperator,
    eps: float = 1.0,
    *,
    num_products: int = 10,
    generator: torch.Generator | None = None,
) -> Tensor:
    """An estimate of the diagonal of H^2 + eps^2 I, for ``method="cg"``.

    The mean of (H z)^2 over random signs z is that of H^2 (Hutchinson, 1989), and is never
    negative. It helps where the parameters' own scales differ, and does not where H is far from
    diagonal.

    Args:
        op: symmetric operator H, (n, n).
        eps: damping.
        num_products: z to take the mean of.
        generator: source of the random signs; None is one seeded with 0.

    Returns:
        Positive numbers [n].

    Raises:
        TypeError: num_products is not an int.
        ValueError: num_products < 1 or eps <= 0.
        NonFiniteError: NaN or infinity in a product.

    Example:
        >>> from hessreg.curvature import DenseOperator
        >>> diagonal_preconditioner(DenseOperator(torch.diag(torch.tensor([3.0, 0.0]))), eps=0.5)
        tensor([9.2500, 0.2500])
    """
    check_damping(eps, 0.0)
    check_at_least(1, num_products=num_products)
    generator = generator or torch.Generator().manual_seed(0)
    total = torch.zeros(op.shape[0], dtype=op.dtype, device=op.device)
    for signs in random_signs(op, num_products, generator).split(_BLOCK, dim=1):
        products = op.matmat(signs)
        total += products.square().sum(1)
        if not torch.isfinite(total).all():
            report_non_finite(op, products.mT)
    return total / num_products + eps**2


def _check_step(
    op: LinearOperator,
    g: Tensor,
    eps: float,
    mu: float,
    num_steps: int,
    tol: float,
    x0: Tensor | None,
) -> None:
    check_damping(eps, mu)
    check_at_least(1, num_steps=num_steps)
    check_not_negative(tol=tol)
    check_vector(op, **({"g": g} if x0 is None else {"g": g, "x0": x0}))


def _check_method(
    op: LinearOperator,
    method: str,
    saddle_free: bool,
    x0: Tensor | None,
    preconditioner: Tensor | None,
) -> None:
    if method not in get_args(CorrectionMethod):
        raise ValueError(f"method must be one of {get_args(CorrectionMethod)}, got {method!r}")
    if saddle_free and method != "lanczos":
        raise ValueError(f"saddle_free is for method 'lanczos' only, got {method!r}")
    for name, given in {"x0": x0, "preconditioner": preconditioner}.items():
        if given is not None and method != "cg":
            raise ValueError(f"{name} is for method 'cg' only, got {method!r}")
    if preconditioner is not None:
        check_vector(op, preconditioner=preconditioner)
        if not (preconditioner > 0).all():
            least = preconditioner.min().item()
            raise ValueError(f"preconditioner must be positive, got {least:.3g}")
