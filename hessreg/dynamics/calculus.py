"""Gradients of a game and products with their Jacobian: nothing of size n x n."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from hessreg.dynamics.games import Game

__all__ = [
    "HessianProducts",
    "InteractionProducts",
    "JacobianProducts",
    "conjugate_gradients",
    "jacobian",
    "player_gradient",
    "vector_field",
]


def _split(game: Game, z: Tensor) -> tuple[Tensor, Tensor]:
    return z[: game.num_x], z[game.num_x :]


def _gradient(loss: Tensor, by: Tensor, create_graph: bool = False) -> Tensor:
    if torch.is_inference_mode_enabled():
        raise ValueError("a game needs gradients: use no_grad instead of inference_mode")
    if not loss.requires_grad:
        return torch.zeros_like(by)
    (result,) = torch.autograd.grad(loss, by, create_graph=create_graph, materialize_grads=True)
    return result


def _product(outputs: Tensor, by: Tensor, v: Tensor, create_graph: bool = False) -> Tensor:
    """V' (d outputs / d by); zero where the outputs do not depend on it."""
    if not outputs.requires_grad:
        return torch.zeros_like(by)
    (result,) = torch.autograd.grad(
        outputs, by, v, retain_graph=True, create_graph=create_graph, materialize_grads=True
    )
    return result


@torch.enable_grad()
def player_gradient(game: Game, z: Tensor, player: int) -> Tensor:
    """Gradient of one player's loss in its own parameters, zero in the other's: ``[n]``.

    Example:
        >>> from hessreg.dynamics import bilinear_game
        >>> player_gradient(bilinear_game(), torch.tensor([1.0, 3.0]).double(), 1)
        tensor([ 0., -1.], dtype=torch.float64)
    """
    parts = [part.detach() for part in _split(game, z)]
    own = parts[player].requires_grad_()
    gradient = _gradient(game.loss(player, *parts), own)
    rest = torch.zeros_like(parts[1 - player])
    return torch.cat([gradient, rest] if player == 0 else [rest, gradient])


@torch.enable_grad()
def vector_field(game: Game, z: Tensor, create_graph: bool = False) -> Tensor:
    """The gradient of each player's loss in its own parameters: v(z) ``[n]``.

    Args:
        game: The game.
        z: The point, ``[n]``.
        create_graph: Let the result be differentiable in z, which requires a gradient.

    Raises:
        ValueError: In ``torch.inference_mode()``; ``no_grad`` changes nothing.

    Example:
        >>> from hessreg.dynamics import bilinear_game
        >>> vector_field(bilinear_game(), torch.tensor([1.0, 3.0]).double())
        tensor([ 3., -1.], dtype=torch.float64)
    """
    if not create_graph:
        return player_gradient(game, z, 0) + player_gradient(game, z, 1)
    parts = _split(game, z)
    return torch.cat([_gradient(game.loss(i, *parts), parts[i], True) for i in range(2)])


@torch.enable_grad()
def jacobian(game: Game, z: Tensor) -> Tensor:
    """The Jacobian of v at z, ``[n, n]``, in n products: for small games.

    Example:
        >>> from hessreg.dynamics import bilinear_game
        >>> jacobian(bilinear_game(), torch.zeros(2).double()).tolist()
        [[0.0, 1.0], [-1.0, 0.0]]
    """
    z = z.detach().requires_grad_()
    v = vector_field(game, z, create_graph=True)
    return torch.stack(
        [_product(v, z, row) for row in torch.eye(len(z), dtype=z.dtype, device=z.device)]
    )


class JacobianProducts:
    """Products with J, the Jacobian of v at a point, and with its transpose.

    Args:
        game: The game.
        z: The point, ``[n]``.

    Attributes:
        v: The vector field there, ``[n]``.
    """

    @torch.enable_grad()
    def __init__(self, game: Game, z: Tensor) -> None:
        self._z = z.detach().requires_grad_()
        self._v = vector_field(game, self._z, create_graph=True)
        self.v = self._v.detach()

    def transposed(self, u: Tensor) -> Tensor:
        """J'u ``[n]``: one backward pass."""
        return _product(self._v, self._z, u)

    def forward(self, u: Tensor) -> Tensor:
        """J u ``[n]``: the product of a vector with the derivative of w'J in w."""
        w = torch.zeros_like(u, requires_grad=True)
        return _product(_product(self._v, self._z, w, create_graph=True), w, u)


class HessianProducts:
    """Products with H, the Hessian of each player's loss in its own parameters (block diagonal).

    Args:
        game: The game.
        z: The point, ``[n]``.

    Attributes:
        v: The vector field there, ``[n]``.
    """

    @torch.enable_grad()
    def __init__(self, game: Game, z: Tensor) -> None:
        self._parts = [part.detach().requires_grad_() for part in _split(game, z)]
        losses = [game.loss(i, *self._parts) for i in range(2)]
        pairs = zip(losses, self._parts, strict=True)
        self._gradients = [_gradient(loss, part, create_graph=True) for loss, part in pairs]
        self.v = torch.cat(self._gradients).detach()

    def __call__(self, u: Tensor) -> Tensor:
        """H u ``[n]``."""
        vectors = u.split([len(part) for part in self._parts])
        triples = zip(self._gradients, self._parts, vectors, strict=True)
        return torch.cat([_product(g, part, vector) for g, part, vector in triples])


class InteractionProducts:
    """Products with B, what J has outside the players' own Hessians: how each disturbs the other.

    Args:
        game: The game.
        z: The point, ``[n]``.

    Attributes:
        v: The vector field there, ``[n]``.
    """

    @torch.enable_grad()
    def __init__(self, game: Game, z: Tensor) -> None:
        self._z = z.detach().requires_grad_()
        self._num_x = game.num_x
        parts = _split(game, self._z)
        self._gradients = [_gradient(game.loss(i, *parts), self._z, True) for i in range(2)]
        self._is_x = (torch.arange(len(z), device=z.device) < game.num_x).to(z.dtype)
        self.v = self._mix(*self._gradients).detach()

    def _mix(self, for_x: Tensor, for_y: Tensor) -> Tensor:
        return torch.cat([for_x[: self._num_x], for_y[self._num_x :]])

    def __call__(self, u: Tensor) -> Tensor:
        """B u: d/dx of (d f/dy)'u_y for the first player's loss f, likewise for the second's."""
        f, g = self._gradients
        return self._products(f, g, u)

    def transposed(self, u: Tensor) -> Tensor:
        """B'u: the same with the losses exchanged."""
        f, g = self._gradients
        return self._products(g, f, u)

    def _products(self, f: Tensor, g: Tensor, u: Tensor) -> Tensor:
        y_only, x_only = u * (1 - self._is_x), u * self._is_x
        return self._mix(_product(f, self._z, y_only), _product(g, self._z, x_only))


def conjugate_gradients(product: Callable[[Tensor], Tensor], b: Tensor, num_steps: int) -> Tensor:
    """Solve A x = b for a positive definite A known by its products.

    Args:
        product: Returns A u ``[n]`` of u ``[n]``.
        b: ``[n]``.
        num_steps: Products at most; fewer if the residual is below eps^(3/4) of b before.

    Example:
        >>> conjugate_gradients(lambda u: 4 * u, torch.ones(3), num_steps=1)
        tensor([0.2500, 0.2500, 0.2500])
    """
    x, residual = torch.zeros_like(b), b
    direction, size = b, b @ b
    smallest = size * torch.finfo(b.dtype).eps ** 1.5
    for _ in range(min(num_steps, len(b))):
        if not size > smallest:
            break
        image = product(direction)
        step = size / (direction @ image)
        x, residual = x + step * direction, residual - step * image
        size, last = residual @ residual, size
        direction = residual + (size / last) * direction
    return x
