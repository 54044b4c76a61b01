"""Frechet and kernel Inception distance by torchmetrics, in the features of any network.

torchmetrics is needed only where they are asked for: ``pip install 'hessreg[metrics]'``.
"""

from __future__ import annotations

import importlib
import warnings
from typing import Any, cast

import torch
from torch import Tensor, nn

from hessreg.gan.checks import require
from hessreg.gan.data import Dataset, subset
from hessreg.gan.factories import FactoryError, call_safely, find_factory, is_factory
from hessreg.gan.metrics import Judge

__all__ = ["COLUMNS", "FeatureDistances", "feature_network"]

COLUMNS = {"fid": ("FID", ".3f"), "kid": ("KID", ".4g"), "kid_std": ("KID sd", ".2g")}
_BATCH = 256
_REAL = 10_000
_SUBSETS, _SUBSET_SIZE = 50, 1000
_ALONE: dict[str, Any] = {"sync_on_compute": False}  # other processes do not take part


def feature_network(features: str, judge: Judge) -> nn.Module:
    """Return the module that FID and KID compare samples in.

    Args:
        features: ``judge``, or ``module:factory``; the factory takes nothing and returns a module
            that maps samples ``[n, ...]``, as the networks see them, to features ``[n, d]``.
        judge: Of the data set.

    Raises:
        ValueError: If the judge has no network of its own.
        FactoryError: If there is no such factory, or it raises or returns something else.
    """
    if features == "judge":
        network = getattr(judge, "feature_network", None)
        wanted = "module:factory for this data set, whose judge has no network"
        require(isinstance(network, nn.Module), "fid.features", wanted, features)
        return cast(nn.Module, network)
    require(is_factory(features), "fid.features", "judge or module:factory", features)
    factory = find_factory(features)
    # Training draws the same numbers with and without it.
    with torch.random.fork_rng(range(torch.cuda.device_count())):
        torch.manual_seed(0)
        made = call_safely(factory, features)
    if not isinstance(made, nn.Module):
        raise FactoryError(f"{features} must return a torch module, got {type(made).__name__}")
    return made


def _check_torchmetrics() -> None:
    """Fail before anything is trained, not when it is first used."""
    try:
        importlib.import_module("torchmetrics.image")
    except RuntimeError as error:  # a torchvision of another build of torch
        raise FactoryError(f"fid.features: torchmetrics cannot be imported: {error}") from None


class _Identity(nn.Identity):
    """Features are what torchmetrics gets, in place of samples.

    Args:
        num_features: Which torchmetrics would find out with an image that has none.
    """

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features


class FeatureDistances:
    """FID and KID to fixed real samples.

    Args:
        network: Maps samples ``[n, ...]`` to features ``[n, d]``; used in evaluation mode.
        dataset: Its first 10,000 test samples are the real ones.

    Raises:
        FactoryError: If the features of the real samples are not finite ``[n, d]``.
    """

    def __init__(self, network: nn.Module, dataset: Dataset) -> None:
        _check_torchmetrics()
        rows = torch.arange(min(_REAL, len(dataset.test_samples)))
        self._network = network.cpu().eval()
        self._real = self._features(subset(dataset.test_samples, rows))

    @torch.no_grad()
    def _features(self, samples: Tensor) -> Tensor:
        try:
            features = torch.cat([self._network(b) for b in samples.cpu().split(_BATCH)])
        except Exception as error:  # it is the user's
            raise FactoryError(f"fid.features: {type(error).__name__}: {error}") from None
        if features.dim() != 2 or not features.isfinite().all():
            shape = tuple(features.shape)
            raise FactoryError(f"fid.features must be finite [n, d], got shape {shape}")
        return features

    def evaluate(self, samples: Tensor) -> dict[str, float]:
        """Return ``fid``, and ``kid`` with its standard deviation over random subsets.

        The global random state stays as it is, and every call draws the same subsets.

        Args:
            samples: Generated ``[n, ...]``.
        """
        from torchmetrics.image.fid import FrechetInceptionDistance
        from torchmetrics.image.kid import KernelInceptionDistance

        fake = self._features(samples)
        identity = _Identity(fake.shape[1])
        size = max(2, min(_SUBSET_SIZE, len(fake) // 2, len(self._real) // 2))
        with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
            warnings.simplefilter("ignore")  # that KID keeps the features in memory
            torch.manual_seed(0)
            fid = self._compute(FrechetInceptionDistance(identity, **_ALONE), fake)
            kid = self._compute(
                KernelInceptionDistance(identity, subsets=_SUBSETS, subset_size=size, **_ALONE),
                fake,
            )
        return {"fid": float(fid), "kid": float(kid[0]), "kid_std": float(kid[1])}

    def _compute(self, metric: Any, fake: Tensor) -> Any:
        metric.update(self._real, real=True)
        metric.update(fake, real=False)
        return metric.compute()
