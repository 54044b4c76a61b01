"""Training by several processes that torchrun started, as if it were one.

Process 0 alone reads and writes files. What it decides, and what fails anywhere, is decided and
fails in all.
"""

from __future__ import annotations

import gc
import os
import pickle
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, redirect_stdout
from datetime import timedelta
from typing import Any, TextIO, TypeVar

import torch
import torch.distributed as dist
import torch.distributed.nn  # not later: its functions keep the group that there is by then
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from hessreg.distributed import WHOLE, ProcessShard, Shard
from hessreg.gan.losses import AdversarialLoss

__all__ = [
    "GatheredLoss",
    "LostProcessError",
    "SharedRandomness",
    "SynchronizedBatchNorm",
    "agree",
    "check_device",
    "current_shard",
    "first_decides",
    "gathered",
    "is_shared",
    "joined",
    "mark_shared",
    "noticing_losses",
    "synchronize_layers",
    "together",
]

_TIMEOUT = timedelta(minutes=10)  # more than pictures and metrics take, which the others wait for
_Value = TypeVar("_Value")


@contextmanager
def joined() -> Iterator[Shard]:
    """Join the other processes if torchrun started several, and leave them at the end."""
    if int(os.environ.get("WORLD_SIZE", "1")) < 2 or dist.is_initialized():
        yield current_shard()
        return
    if _local_rank() < torch.cuda.device_count():
        torch.cuda.set_device(_local_rank())
    # NCCL moves what is on GPUs, gloo the small messages beside it without waiting for them.
    has_nccl = torch.cuda.is_available() and dist.is_nccl_available()
    dist.init_process_group("cpu:gloo,cuda:nccl" if has_nccl else "gloo", timeout=_TIMEOUT)
    shard = current_shard()
    with open(os.devnull, "w") as nowhere, _speaking(shard, nowhere):
        yield shard
    dist.barrier()  # torchrun stops the others as soon as one that failed has ended
    dist.destroy_process_group()
    gc.collect()  # gloo's threads end with the last reference; later they may abort the process


def _speaking(shard: Shard, nowhere: TextIO) -> AbstractContextManager[object]:
    """Process 0 speaks for all."""
    return redirect_stdout(nowhere) if shard.rank else nullcontext()


def current_shard() -> Shard:
    """Return this process's share among those of torch's default group; all if there is none."""
    group = dist.group.WORLD if dist.is_initialized() else None
    return WHOLE if group is None or dist.get_world_size() < 2 else ProcessShard(group)


def _local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", "0"))


def check_device(device: torch.device, shard: Shard) -> None:
    """Refuse GPUs if there is not one for every process of this machine.

    Raises:
        ValueError: If there is not.
    """
    count = torch.cuda.device_count()
    if shard.size > 1 and device.type == "cuda" and _local_rank() >= count:
        wanted = f"at most {count} processes on a machine with so many GPUs"
        raise ValueError(f"device cuda: start {wanted}, this is number {_local_rank() + 1}")


@contextmanager
def together(shard: Shard) -> Iterator[None]:
    """Let what fails inside in one process fail in all, with the error of the first of them."""
    if shard.size == 1:
        yield
        return
    error: BaseException | None = None
    try:
        yield
    except (Exception, KeyboardInterrupt) as caught:
        error = caught
    errors: list[BaseException | None] = [None] * shard.size
    dist.all_gather_object(errors, _sendable(error), group=shard.group)
    failed = error or next((other for other in errors if other is not None), None)
    if failed is not None:
        raise mark_shared(failed) from None


def _sendable(error: BaseException | None) -> BaseException | None:
    try:
        pickle.loads(pickle.dumps(error))  # noqa: S301 (made here)
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


class LostProcessError(RuntimeError):
    """Another process has ended, or does not answer."""


@contextmanager
def noticing_losses(shard: Shard, advice: str) -> Iterator[None]:
    """Let a failure to reach other processes say so in one line.

    Raises:
        LostProcessError: If there is such a failure inside.
    """
    try:
        yield
    except RuntimeError as error:
        is_loss = isinstance(error, dist.DistError) or "gloo" in str(error)
        if shard.size == 1 or not is_loss:
            raise
        raise LostProcessError(f"another process has ended or does not answer; {advice}") from None


def mark_shared(error: BaseException) -> BaseException:
    """Note that all processes have this error."""
    error.__dict__["shared"] = True
    return error


def is_shared(error: BaseException | None) -> bool:
    """Return whether all processes have this error, or the one that it was made of."""
    while error is not None and "shared" not in error.__dict__:
        error = error.__context__
    return error is not None


def agree(shard: Shard, seconds: float, stop: bool) -> tuple[float, bool]:
    """Return process 0's seconds, and whether any process is to stop."""
    if shard.size == 1:
        return seconds, stop
    message = torch.tensor([0.0 if shard.rank else seconds, stop], dtype=torch.float64)
    dist.all_reduce(message, group=shard.group)
    agreed, stops = message.tolist()
    return agreed, stops > 0


def first_decides(shard: Shard, decide: Callable[[], _Value]) -> _Value:
    """Return in all processes what process 0 got; if that failed, all fail."""
    found: list[Any] = [None]
    with together(shard):
        if shard.rank == 0:
            found = [decide()]
    if shard.size > 1:
        dist.broadcast_object_list(found, 0, group=shard.group)
    value: _Value = found[0]
    return value


class GatheredLoss(AdversarialLoss):
    """A loss that compares samples with each other, on the outputs of all processes.

    Args:
        loss: The loss.
        shard: Which rows this process has.
    """

    def __init__(self, loss: AdversarialLoss, shard: Shard) -> None:
        self.outputs, self.has_parts, self.compares = loss.outputs, loss.has_parts, loss.compares
        self._loss, self._shard = loss, shard

    def discriminator(self, real: Tensor, fake: Tensor) -> tuple[Tensor, ...]:
        """Those of the whole batch."""
        return self._loss.discriminator(self._shard.gather(real), self._shard.gather(fake))

    def generator(self, fake: Tensor, real: Tensor) -> Tensor:
        """That of the whole batch."""
        return self._loss.generator(self._shard.gather(fake), self._shard.gather(real))


def gathered(loss: AdversarialLoss, shard: Shard) -> AdversarialLoss:
    """Return the loss of a whole batch as a process with some of its rows computes it."""
    return GatheredLoss(loss, shard) if loss.mixes_rows and shard.size > 1 else loss


class SynchronizedBatchNorm(_BatchNorm):
    """Batch normalisation by the statistics of the whole batch, differentiable to every order.

    Args:
        norm: Whose parameters, running statistics and options it takes over.
        shard: Which rows this process has.
    """

    def __init__(self, norm: _BatchNorm, shard: Shard) -> None:
        options = norm.eps, norm.momentum, norm.affine, norm.track_running_stats
        super().__init__(norm.num_features, *options)
        self.weight, self.bias = norm.weight, norm.bias
        self._buffers.update(norm._buffers)
        self.train(norm.training)
        self._shard = shard

    def forward(self, input: Tensor) -> Tensor:
        """Return the normalised rows ``[n, channels, ...]``."""
        if not self.training:
            return super().forward(input)
        dims = 0, *range(2, input.dim())
        x = input.float() if input.dtype.itemsize == 2 else input
        mean = self._shard.mean(x.mean(dims, keepdim=True))
        var = self._shard.mean((x - mean).square().mean(dims, keepdim=True))
        self._update(mean.detach().flatten(), var.detach().flatten(), len(x) * x[0, 0].numel())
        x = (x - mean) * (var + self.eps).rsqrt()
        if self.affine:
            x = x * self.weight.view(mean.shape) + self.bias.view(mean.shape)
        return x.to(input.dtype)

    def _update(self, mean: Tensor, var: Tensor, rows: int) -> None:
        if self.running_mean is None or self.running_var is None:
            return
        batches = self.get_buffer("num_batches_tracked")
        batches.data.add_(1)
        share = 1 / int(batches) if self.momentum is None else self.momentum
        count = rows * self._shard.size
        # As in the native layer, past autograd's check: another graph may hold the old statistics.
        self.running_mean.data.lerp_(mean, share)
        self.running_var.data.lerp_(var * (count / (count - 1)), share)

    def _check_input_dim(self, input: Tensor) -> None:
        """Any number of dimensions will do."""


class SharedRandomness(nn.Module):
    """A layer that draws random numbers, as dropout does: every process draws those of all rows.

    Args:
        layer: It treats every number alike.
        shard: Which rows this process has.
    """

    def __init__(self, layer: nn.Module, shard: Shard) -> None:
        super().__init__()
        self.layer = layer
        self._shard = shard

    def forward(self, input: Tensor) -> Tensor:
        """Return what the layer makes of the rows ``[n, ...]`` among those of all processes."""
        rows: Tensor = self.layer(self._shard.spread(input) if self.training else input)
        return self._shard.take(rows) if self.training else rows


def synchronize_layers(network: nn.Module, shard: Shard) -> None:
    """Replace layers of batch normalisation and random ones if there are several processes."""
    for parent in list(network.modules()) if shard.size > 1 else ():
        for name, child in list(parent._modules.items()):  # also one that is used twice
            if isinstance(child, _BatchNorm):
                setattr(parent, name, SynchronizedBatchNorm(child, shard))
            elif isinstance(child, _DropoutNd | nn.RReLU):
                shared = SharedRandomness(child, shard)
                setattr(parent, name, shared.train(child.training))
