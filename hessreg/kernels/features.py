"""Feature maps whose inner products are the Gaussian kernel, for very many points."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hessreg.curvature._checks import check_at_least
from hessreg.kernels._random import drawing_device
from hessreg.ops import gaussian_kernel
from hessreg.ops.gaussian import Sigma, _check_alike, _check_points, _compute_dtype, _gamma

__all__ = ["RandomFourierFeatures", "nystrom_features", "random_fourier_features"]


class RandomFourierFeatures(nn.Module):
    """Random Fourier features that several samples share: E <phi(x), phi(y)> = k(x, y).

    Inner products approximate the kernel only between features of one and the same object. They
    are cosines and sines of the same random frequencies, which are kept in the state: with F of
    them <phi(x), phi(y)> has the standard deviation (1 - k^2) / sqrt(2 F), and <phi(x), phi(x)>
    is 1. Differentiable in the points to any order.

    Args:
        dim: dimensions d of a point.
        num_features: features of a point, a multiple of 2 (a cosine and a sine) for each of the
            bandwidths: each has as many.
        sigma: bandwidth or bandwidths, as for :func:`hessreg.gaussian_kernel`; its values are
            taken once.
        generator: draws the frequencies; None: torch's own.

    Raises:
        TypeError: for counts, bandwidths and generators that are none.
        ValueError: for numbers out of range.

    References:
        Rahimi and Recht, "Random Features for Large-Scale Kernel Machines", NeurIPS 2007;
        Sutherland and Schneider, "On the Error of Random Fourier Features", UAI 2015 (why a cosine
        and a sine, and not a cosine with a random phase).

    Example:
        >>> import torch
        >>> features = RandomFourierFeatures(2, 4096, sigma=5.0)
        >>> x, y = torch.tensor([[0.0, 0.0]]), torch.tensor([[3.0, 4.0]])
        >>> error = features(x) @ features(y).mT - 0.6065
        >>> features(x).shape, bool(error.abs() < 0.06)
        (torch.Size([1, 4096]), True)
    """

    frequencies: Tensor

    def __init__(
        self,
        dim: int,
        num_features: int,
        sigma: Sigma = 1.0,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        check_at_least(1, dim=dim)
        detached = sigma.detach() if isinstance(sigma, Tensor) else sigma
        device = sigma.device if isinstance(sigma, Tensor) else torch.get_default_device()
        like = torch.empty(0, dim, device=device)
        frequencies = _frequencies(like, num_features, detached, generator)
        self.register_buffer("frequencies", frequencies)

    def forward(self, x: Tensor) -> Tensor:
        """The features ``[..., n, num_features]`` of points ``[..., n, d]``, in their dtype.

        Raises:
            TypeError: for anything but a floating-point tensor.
            ValueError: for points of another dimension or on another device.
        """
        _check_points(x, "x")
        if x.shape[-1] != len(self.frequencies):
            raise ValueError(
                f"x must have points of {len(self.frequencies)} dimensions, "
                f"got shape {tuple(x.shape)}"
            )
        if x.device != self.frequencies.device:
            raise ValueError(
                f"x must be on the device of the features, {self.frequencies.device}, "
                f"got {x.device}"
            )
        return _waves(x, self.frequencies)

    def extra_repr(self) -> str:
        """The dimensions of a point and the number of its features."""
        dim, count = self.frequencies.shape
        return f"dim={dim}, num_features={2 * count}"


def random_fourier_features(
    x: Tensor,
    num_features: int,
    sigma: Sigma = 1.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""Random Fourier features of one sample: E <phi_i, phi_j> = k(x_i, x_j).

    The frequencies are drawn anew in each call. For two samples join them, use
    :class:`RandomFourierFeatures`, or seed the generator alike. Differentiable in ``x`` and
    ``sigma`` to any order.

    Args:
        x: points ``[..., n, d]`` in float16, bfloat16, float32 or float64.
        num_features: features of a point, a multiple of 2 (a cosine and a sine) for each of the
            bandwidths.
        sigma: bandwidth or bandwidths, as for :func:`hessreg.gaussian_kernel`.
        generator: draws the frequencies; None: torch's own.

    Returns:
        ``[..., n, num_features]`` in the dtype of ``x``.

    Raises:
        TypeError: for anything but floating-point tensors, counts, bandwidths and generators.
        ValueError: for shapes that do not fit and numbers out of range.

    References:
        Rahimi and Recht, "Random Features for Large-Scale Kernel Machines", NeurIPS 2007.

    Example:
        >>> import torch
        >>> phi = random_fourier_features(torch.tensor([[0.0], [1.0]]), 4096)
        >>> error = (phi @ phi.mT)[0, 1] - 0.6065
        >>> phi.shape, bool(error.abs() < 0.06)
        (torch.Size([2, 4096]), True)
    """
    _check_points(x, "x")
    return _waves(x, _frequencies(x, num_features, sigma, generator))


def nystrom_features(x: Tensor, landmarks: Tensor, sigma: Sigma = 1.0) -> Tensor:
    r"""Nystroem features: the Gaussian kernel through landmarks, K_xl K_ll^{-1/2}.

    Inner products of features are ``K_xl K_ll^+ K_ly``: the kernel itself where x or y is a
    landmark. Eigenvalues of K_ll below ``l`` epsilons (of float32 for the half-precision types) of
    the largest count as zero. Differentiable in ``x`` to any order; landmarks and bandwidths are
    constants.

    Args:
        x: points ``[..., n, d]`` in float16, bfloat16, float32 or float64.
        landmarks: points ``[..., l, d]``, at least one, like ``x`` in dtype and device; batches
            broadcast. Time grows with ``l^3``.
        sigma: bandwidth or bandwidths, as for :func:`hessreg.gaussian_kernel`.

    Returns:
        ``[..., n, l]`` in the dtype of ``x``.

    Raises:
        TypeError: for anything but floating-point tensors and real bandwidths.
        ValueError: for shapes, dtypes or devices that do not match, bandwidths that are not
            positive, and no landmarks.

    References:
        Williams and Seeger, "Using the Nystroem Method to Speed Up Kernel Machines", NeurIPS 2000.

    Example:
        >>> import torch
        >>> x = torch.tensor([[0.0], [1.0]])
        >>> phi = nystrom_features(x, x)
        >>> phi @ phi.mT
        tensor([[1.0000, 0.6065],
                [0.6065, 1.0000]])
    """
    _check_points(x, "x")
    _check_alike(x, landmarks, "landmarks")
    if landmarks.shape[-2] == 0:
        raise ValueError(
            f"landmarks must hold at least one point, got shape {tuple(landmarks.shape)}"
        )
    dtype, landmarks = _compute_dtype(x), landmarks.detach()
    sigma = sigma.detach() if isinstance(sigma, Tensor) else sigma
    matrix = gaussian_kernel(x.to(dtype), landmarks.to(dtype), sigma)
    cutoff = landmarks.shape[-2] * torch.finfo(dtype).eps
    root = _inverse_root(gaussian_kernel(landmarks.double(), None, sigma), cutoff)
    return (matrix @ root.to(dtype)).to(x.dtype)


def _inverse_root(matrix: Tensor, cutoff: float) -> Tensor:
    """``A^{-1/2}`` on the eigenvectors whose eigenvalues are above the cutoff, else 0."""
    eigenvalues, eigenvectors = torch.linalg.eigh(matrix)
    kept = eigenvalues > cutoff * eigenvalues[..., -1:]
    scales = torch.where(kept, torch.where(kept, eigenvalues, 1).rsqrt(), 0)
    return (eigenvectors * scales[..., None, :]) @ eigenvectors.mT


def _frequencies(
    like: Tensor, num_features: int, sigma: Sigma, generator: torch.Generator | None
) -> Tensor:
    """Draws from the spectral measure, normal with deviation 1 / sigma: ``[d, features / 2]``."""
    dtype, dim = _compute_dtype(like), like.shape[-1]
    gamma = _gamma(sigma, like.new_empty(1, 0))[0]
    check_at_least(1, num_features=num_features)
    if num_features % (2 * len(gamma)):
        raise ValueError(
            f"num_features must be a multiple of {2 * len(gamma)}, a cosine and a sine for each "
            f"bandwidth, got {num_features}"
        )
    count = num_features // 2
    shape, device = (dim, count), drawing_device(generator, like.device)
    directions = torch.randn(shape, generator=generator, device=device, dtype=dtype)
    scales = (2 * gamma).sqrt().repeat_interleave(count // len(gamma))
    return directions.to(like.device) * scales.to(dtype)


def _waves(x: Tensor, frequencies: Tensor) -> Tensor:
    """Cosines and sines, of length 1 together."""
    dtype = _compute_dtype(x)
    phases = x.to(dtype) @ frequencies.to(dtype)
    return (torch.cat([phases.cos(), phases.sin()], -1) / phases.shape[-1] ** 0.5).to(x.dtype)
