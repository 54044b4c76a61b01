"""What tests of exact resuming compare."""

import torch
from torch import Tensor


def equal(a, b) -> bool:
    """Bitwise equality of nested dictionaries and sequences of tensors and plain values."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(equal, a, b))
    if isinstance(a, Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    return a == b
