"""TEMPORARY stand-ins."""

import torch
from torch import Tensor


def _seg(lists, scope):
    """lists of tensors -> list over positions of [k, rows, n] float64, None as zeros."""
    out = []
    for pos in zip(*lists, strict=True):
        model = next((t for t in pos if t is not None), None)
        if model is None:
            out.append(None)
            continue
        rows = model.shape[0] if scope == "row" and model.dim() >= 2 else 1
        out.append(
            torch.stack(
                [
                    (torch.zeros_like(model) if t is None else t).double().reshape(rows, -1)
                    for t in pos
                ]
            )
        )
    return out


def gram_matrix(gradients, scope="global"):
    parts = [torch.einsum("arn,crn->rac", x, x) for x in _seg(gradients, scope) if x is not None]
    if not parts:
        k = len(gradients)
        return torch.zeros((k, k) if scope == "global" else (0, k, k), dtype=torch.float64)
    if scope == "global":
        return torch.cat([p.sum(0, keepdim=True) for p in parts]).sum(0)
    return (
        torch.cat([p.sum(0, keepdim=True) for p in parts])
        if scope == "tensor"
        else torch.cat(parts)
    )


def pcgrad(gradients, scope="global", reduction="sum", generator=None):
    k = len(gradients)
    ys = [_seg([g, *gradients], scope) for g in gradients]
    result = [None] * len(gradients[0])
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
    w = W.sum(-2)
    seg = 0
    for pos, x in enumerate(_seg(gradients, scope)):
        if x is None:
            if scope == "row":
                pass
            continue
        rows = x.shape[1]
        here = w.expand(rows, k) if scope == "global" else w[seg : seg + rows]
        seg += rows
        y = torch.einsum("rk,krn->rn", here, x)
        model = next(g[pos] for g in gradients if g[pos] is not None)
        result[pos] = y.reshape(model.shape).to(model.dtype)
    return result


def project_orthogonal_(g, against, mode="always", scope="global", strength=1.0, rescale=False):
    against = [b if a is not None else None for a, b in zip(g, against, strict=True)]
    kept = [i for i, a in enumerate(g) if a is not None]
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
    seg = 0
    with torch.no_grad():
        for i in kept:
            t, v = g[i], against[i]
            rows = t.shape[0] if scope == "row" and t.dim() >= 2 else 1
            cc = c.expand(rows) if scope == "global" else c[seg : seg + rows]
            ff = factor.expand(rows) if scope == "global" else factor[seg : seg + rows]
            seg += rows
            y = t.double().reshape(rows, -1)
            if v is not None:
                y = y - torch.where(
                    cc[:, None] == 0, 0, strength * cc[:, None] * v.double().reshape(rows, -1)
                )
            t.copy_((ff[:, None] * y).reshape(t.shape))
    n = (gg * vv).sqrt()
    return torch.where(n == 0, 0, gv / n)
