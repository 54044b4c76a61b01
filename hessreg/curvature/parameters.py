"""A list of parameters as one flat vector."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import accumulate

import torch
from torch import Tensor, nn

from hessreg.curvature._checks import NonFiniteError

__all__ = ["FlatParameters"]


class FlatParameters:
    """The flat concatenation of several tensors, and back.

    Args:
        params: one tensor or several, distinct, of one dtype (float32 or float64) and device, all
            of which require gradients.
        labels: what messages call them; params[0] and so on if None.

    Attributes:
        tensors: the parameters, as a list.
        sizes: their numbers of elements.
        offsets: where each begins in the flat vector.
        size: the length of the flat vector.
        dtype: of all of them.
        device: of all of them.

    Raises:
        TypeError: a module, or something else that is no floating-point tensor.
        ValueError: nothing, a tensor that requires no gradient, a tensor twice, several dtypes or
            devices.

    Example:
        >>> w, b = torch.zeros(2, 3, requires_grad=True), torch.zeros(2, requires_grad=True)
        >>> flat = FlatParameters([w, b])
        >>> flat.size, [tuple(part.shape) for part in flat.split(torch.arange(8.0))]
        (8, [(2, 3), (2,)])
    """

    def __init__(
        self, params: Tensor | Iterable[Tensor], labels: Sequence[str] | None = None
    ) -> None:
        self.tensors = _check_params(params)
        self._labels = labels or [f"params[{i}]" for i in range(len(self.tensors))]
        self.sizes = [p.numel() for p in self.tensors]
        *self.offsets, self.size = accumulate(self.sizes, initial=0)
        self.dtype, self.device = self.tensors[0].dtype, self.tensors[0].device

    def split(self, v: Tensor) -> list[Tensor]:
        """The parts of v [..., size], each [..., *shape of its parameter]."""
        parts = zip(v.split(self.sizes, -1), self.tensors, strict=True)
        return [part.reshape(v.shape[:-1] + p.shape) for part, p in parts]

    def flatten(self, tensors: Sequence[Tensor], batch: int = 0) -> Tensor:
        """Tensors [*batch dimensions, *shape of a parameter] as one [*batch dimensions, size]."""
        return torch.cat([t.reshape(*t.shape[:batch], -1) for t in tensors], -1)

    def check_finite(self, what: str, vector: Tensor) -> None:
        """Reports NaN or infinity in a flat vector [size] or several [k, size].

        Raises:
            NonFiniteError: names the first parameter concerned, its shape, the position and the
                value.
        """
        if torch.isfinite(vector.sum()):  # tells nearly always, at a tenth of the time
            return
        for row in vector.reshape(-1, self.size):
            for label, part in zip(self._labels, self.split(row), strict=True):
                bad = (~torch.isfinite(part)).nonzero()
                if len(bad):
                    place = tuple(bad[0].tolist())
                    raise NonFiniteError(
                        f"{what} of {label}, shape {tuple(part.shape)},"
                        f" is {part[place].item()} at {place}"
                    )


def _check_params(params: Tensor | Iterable[Tensor]) -> list[Tensor]:
    if isinstance(params, nn.Module):
        raise TypeError("params must be tensors, got a Module: pass module.parameters()")
    checked = [params] if isinstance(params, Tensor) else list(params)
    for i, p in enumerate(checked):
        if not isinstance(p, Tensor):
            raise TypeError(f"params[{i}] must be a Tensor, got {type(p).__name__}")
        if not p.requires_grad:
            raise ValueError(f"params[{i}], shape {tuple(p.shape)}, must require a gradient")
        if p.dtype not in (torch.float32, torch.float64):
            raise TypeError(f"params[{i}] must be float32 or float64, got {p.dtype}")
        if (p.dtype, p.device) != (checked[0].dtype, checked[0].device):
            raise ValueError(
                f"params must share one dtype and device: params[0] has {checked[0].dtype} on"
                f" {checked[0].device}, params[{i}] has {p.dtype} on {p.device}"
            )
    _check_distinct(checked)
    return checked


def _check_distinct(params: Sequence[Tensor]) -> None:
    if not any(p.numel() for p in params):
        raise ValueError(f"params must hold at least one number, got {len(params)} tensors")
    first: dict[int, int] = {}
    for i, p in enumerate(params):
        if first.setdefault(id(p), i) != i:
            raise ValueError(f"params must be distinct, params[{i}] is params[{first[id(p)]}]")
