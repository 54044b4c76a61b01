"""TEMPORARY stand-ins."""

# mypy: ignore-errors
# ruff: noqa
import torch

from hessreg.ops.projection import _SCOPES, gram, linear_combination


def _full(lists):
    models = [next((t for t in pos if t is not None), None) for pos in zip(*lists, strict=True)]
    where = [i for i, m in enumerate(models) if m is not None]
    return where, [
        torch.zeros_like(models[i]) if v[i] is None else v[i].contiguous()
        for v in lists
        for i in where
    ]


def _groups(lists):
    where, tensors = _full(lists)
    return where, tensors


def gram_matrix(gradients, scope="global"):
    where, tensors = _full(gradients)
    k = len(gradients)
    if not where:
        return torch.zeros((k, k) if scope == "global" else (0, k, k), dtype=torch.float64)
    if len({t.dtype for t in tensors}) > 1:
        tensors = [t.float() for t in tensors]
    G = gram(tensors, k, _SCOPES[scope], False)
    return G[0] if scope == "global" else G


def _combine(lists, W, scope):
    where, tensors = _full(lists)
    result = [None] * len(lists[0])
    if not where:
        return result
    dtypes = [t.dtype for t in tensors[: len(where)]]
    if len(set(dtypes)) > 1:
        tensors = [t.float() for t in tensors]
    W = W[None] if scope == "global" else W
    out = linear_combination(tensors, W, _SCOPES[scope], False)
    for i, y, d in zip(where, out, dtypes, strict=True):
        result[i] = y.to(d)
    return result


def pcgrad(gradients, scope="global", reduction="sum", generator=None):
    k = len(gradients)
    G = gram_matrix(gradients, scope)
    W = torch.eye(k, dtype=torch.float64).expand(*G.shape).clone()
    for i in range(k):
        for j in range(k):
            if i == j:
                continue
            ip = (W[..., i, :] * G[..., :, j]).sum(-1)
            vv = G[..., j, j]
            ok = (vv > 0) & vv.isfinite() & (ip < 0)
            W[..., i, j] -= torch.where(ok, ip, 0) / torch.where(ok, vv, 1)
    return _combine(gradients, W.sum(-2, keepdim=True), scope)


def project_orthogonal_(g, against, mode="always", scope="global", strength=1.0, rescale=False):
    against = [None if a is None else b for a, b in zip(g, against, strict=True)]
    G = gram_matrix([g, against], scope)
    gv, gg, vv = G[..., 0, 1], G[..., 0, 0], G[..., 1, 1]
    ok = (vv > 0) & vv.isfinite()
    c = torch.where(ok, gv, 0) / torch.where(ok, vv, 1)
    res = gg - strength * (2 - strength) * c * gv
    factor = torch.ones_like(c)
    dead = (res <= (16 * 1.2e-7) ** 2 * gg) & (c != 0)
    if rescale:
        factor = torch.where(dead, 0, (gg / torch.where(dead, 1, res)).sqrt())
        factor = torch.where(ok, factor, 1)
    if strength == 1:
        factor = torch.where(dead, 0, factor)
    W = torch.stack([factor, -strength * c * factor], -1)[..., None, :]
    with torch.no_grad():
        for t, y in zip(g, _combine([g, against], W, scope), strict=True):
            if t is not None:
                t.copy_(y)
    n = (gg * vv).sqrt()
    return torch.where(n == 0, 0, gv / n)
