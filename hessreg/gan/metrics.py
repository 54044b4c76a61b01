"""How good are images? A small judge network and several metrics in its feature space.

Each metric can be fooled alone, so they are computed and shown together:

- ``fdd``: Frechet distance of Gaussians fitted to the features of samples and of test images.
- ``classes``: number of classes that get at least a fifth of their fair share of the samples.
- ``precision``, ``recall``: k-nearest-neighbour manifolds (Kynkaanniemi et al., 2019).
- ``density``, ``coverage``: how many test images' neighbourhoods a sample is in, relative to their
  number for a real one, and the share of test images with a sample nearby (Naeem et al., 2020).
- ``copies``: share of samples that reproduce a training image.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from hessreg.gan.data import Dataset

__all__ = [
    "ImageJudge",
    "Judge",
    "PrincipalJudge",
    "classes_covered",
    "copied_share",
    "coverage",
    "density",
    "frechet_distance",
    "precision_recall",
]

_NEIGHBOURS = 3
_COVERAGE_NEIGHBOURS = 5
_JUDGE_EPOCHS, _JUDGE_IMAGES = 80, 115_000  # the first for few images, else as many altogether
_COMPONENTS, _SVD_ROWS = 32, 1000
_MOST_SAMPLES = 2000  # of generated and real ones for metrics, whose cost grows with the square


def frechet_distance(x: Tensor, y: Tensor) -> float:
    """Return the Frechet distance between Gaussians fitted to two sets of features.

    Equivalent to ``|mx - my|^2 + tr(Cx + Cy - 2 (Cx Cy)^(1/2))`` with means m and covariances C.

    Args:
        x: Features ``[n, d]``.
        y: Features ``[m, d]``.

    Returns:
        The distance, computed in float64.

    Example:
        >>> x = torch.tensor([[0.0, 1.0], [2.0, 1.0], [1.0, 0.0], [1.0, 2.0]])
        >>> round(frechet_distance(x, x + 3.0), 6)
        18.0
    """
    x, y = x.double(), y.double()
    cov_x, cov_y = torch.cov(x.T), torch.cov(y.T)
    values, vectors = torch.linalg.eigh(cov_x)
    root_x = (vectors * values.clamp(min=0.0).sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root_x @ cov_y @ root_x).clamp(min=0.0).sqrt().sum()
    mean_term = (x.mean(0) - y.mean(0)).square().sum()
    return float(mean_term + cov_x.trace() + cov_y.trace() - 2.0 * cross)


def _radii(points: Tensor, neighbours: int) -> Tensor:
    """Distance of each point to its k-th nearest other point, ``[n]``."""
    return _distances(points, points).kthvalue(neighbours + 1, dim=1).values  # its first is itself


def _distances(x: Tensor, y: Tensor) -> Tensor:
    return torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist")


def precision_recall(
    real: Tensor, fake: Tensor, neighbours: int = _NEIGHBOURS
) -> tuple[float, float]:
    """Return the improved precision and recall of ``fake`` against ``real``.

    Precision is the share of ``fake`` inside the union of balls around ``real`` that reach to
    each one's k-th nearest neighbour; recall swaps the two sets.

    Args:
        real: Features ``[n, d]``.
        fake: Features ``[m, d]``.
        neighbours: k.

    Returns:
        Precision and recall in [0, 1].
    """
    distances = torch.cdist(real, fake)
    precision = (distances <= _radii(real, neighbours)[:, None]).any(0).double().mean()
    recall = (distances <= _radii(fake, neighbours)[None, :]).any(1).double().mean()
    return float(precision), float(recall)


def coverage(real: Tensor, fake: Tensor, neighbours: int = _COVERAGE_NEIGHBOURS) -> float:
    """Return the share of ``real [n, d]`` whose k-nearest ball holds some of ``fake [m, d]``."""
    nearest = torch.cdist(real, fake).min(dim=1).values
    return float((nearest <= _radii(real, neighbours)).double().mean())


def density(real: Tensor, fake: Tensor, neighbours: int = _COVERAGE_NEIGHBOURS) -> float:
    """Return in how many k-nearest balls around ``real [n, d]`` each of ``fake [m, d]`` is, over k.

    About 1 for samples of the same distribution; above 1 where they crowd in dense regions.
    Unlike precision, one outlier among the real ones with its wide ball hardly changes it.
    """
    inside = torch.cdist(real, fake) <= _radii(real, neighbours)[:, None]
    return float(inside.double().sum(0).mean() / neighbours)


def classes_covered(predictions: Tensor, num_classes: int, total: int | None = None) -> int:
    """Return how many classes get at least a fifth of their fair share of all samples.

    Args:
        predictions: Classes ``[n]``.
        num_classes: Their number.
        total: Number of samples, where some were too bad for a class; by default n.

    Example:
        >>> classes_covered(torch.tensor([3] * 99 + [4]), num_classes=10)
        1
    """
    counts = torch.bincount(predictions, minlength=num_classes)
    fair_share = (len(predictions) if total is None else total) / num_classes
    return int((counts >= 0.2 * fair_share).sum())


def copied_share(images: Tensor, training_images: Tensor) -> float:
    """Return the share of images that reproduce a training image.

    A copy is nearer to a training image than half the way from there to the next training image
    that is another.

    Args:
        images: ``[n, ...]``.
        training_images: ``[m, ...]``.

    Returns:
        A share in [0, 1].
    """
    training = training_images.flatten(1)
    distances, nearest = _distances(images.flatten(1), training).min(dim=1)
    found, place = nearest.unique(return_inverse=True)
    gaps = _distances(training[found], training)
    radii = gaps.where(gaps > 0, torch.inf).min(dim=1).values  # at 0 are itself and its doubles
    return float((distances < 0.5 * radii[place]).double().mean())


class Judge(Protocol):
    """Says how good generated samples of a data set are.

    Attributes:
        columns: For tables: heading and format of each metric.
        headline: The metric to rank by; lower is better.
        num_samples: Number of samples to evaluate.
    """

    columns: Mapping[str, tuple[str, str]]
    headline: str
    num_samples: int

    def classify(self, samples: Tensor) -> Tensor:
        """Return the class that each sample belongs to, ``[n]``."""
        ...

    def evaluate(self, samples: Tensor) -> dict[str, float]:
        """Return every metric of samples ``[n, ...]``."""
        ...

    def reference_rows(self) -> dict[str, dict[str, float]]:
        """Return the metrics of known "generators": they give the numbers of a run a scale."""
        ...

    def describe(self, values: Mapping[str, float]) -> str:
        """Return what `evaluate` found as a phrase for people."""
        ...


class ImageJudge:
    """A small classifier of the training images and the metrics in its last hidden layer.

    Training is deterministic and takes about a second, so nothing is downloaded or cached.

    Args:
        dataset: The data set. Its test images are the "real" side of every metric.
    """

    columns: Mapping[str, tuple[str, str]] = {
        "fdd": ("FDD", ".1f"),
        "classes": ("classes", "d"),
        "precision": ("precision", ".2f"),
        "recall": ("recall", ".2f"),
        "density": ("density", ".2f"),
        "coverage": ("coverage", ".2f"),
        "copies": ("copies", ".1%"),
    }
    headline = "fdd"

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset
        self._train, self._test = dataset.tensors()
        self.num_samples = min(len(self._train), _MOST_SAMPLES)
        self.num_classes = dataset.num_classes
        self._network = _train_classifier(self._train, dataset.train_labels, self.num_classes)
        self._test_features = self.features(self._test)

    @property
    def feature_network(self) -> nn.Module:
        """The judge without its last layer."""
        return self._network[:-1]

    def features(self, images: Tensor) -> Tensor:
        """Return the last hidden layer, ``[n, 32]``, of images ``[n, 1, 8, 8]``."""
        with torch.no_grad():
            return self.feature_network(images.to("cpu", torch.float32))

    def classify(self, samples: Tensor) -> Tensor:
        """Return the predicted class, ``[n]``, of images ``[n, 1, 8, 8]``."""
        with torch.no_grad():
            return self._network(samples.to("cpu", torch.float32)).argmax(1)

    def accuracy(self) -> float:
        """Return the share of test images that the judge classifies correctly."""
        correct = self.classify(self._test) == self.dataset.test_labels
        return float(correct.double().mean())

    def evaluate(self, samples: Tensor) -> dict[str, float]:
        """Return every metric of images ``[n, 1, 8, 8]`` in [-1, 1] (n of 100 or more)."""
        images = samples.to("cpu", torch.float32)
        features = self.features(images)
        precision, recall = precision_recall(self._test_features, features)
        return {
            "fdd": frechet_distance(features, self._test_features),
            "classes": classes_covered(self.classify(images), self.num_classes),
            "precision": precision,
            "recall": recall,
            "density": density(self._test_features, features),
            "coverage": coverage(self._test_features, features),
            "copies": copied_share(images, self._train),
        }

    def reference_rows(self) -> dict[str, dict[str, float]]:
        """Return the metrics of four known "generators", from the ideal to a mode collapse.

        They are ``training images``, ``training images + noise``, ``Gaussian fitted to pixels``
        and ``one image per class``.
        """
        images, labels = self._train[: self.num_samples], self.dataset.train_labels
        first = torch.stack([(labels == c).nonzero()[0, 0] for c in labels.unique()])
        rows = _reference_images(images)
        copies = self._train[first].repeat(len(images) // len(first), 1, 1, 1)
        rows["one image per class"] = copies
        return {name: self.evaluate(row) for name, row in rows.items()}

    def describe(self, values: Mapping[str, float]) -> str:
        """Return distance, classes and copies in words."""
        scale = self.evaluate(self._train[: self.num_samples])["fdd"]
        return (
            f"FDD {values['fdd']:.1f} (real training images {scale:.1f}), {values['classes']} of"
            f" {self.num_classes} classes, copies {100 * values['copies']:.1f} %"
        )


class PrincipalJudge:
    """Metrics in the first 32 principal components of the training data, images or points.

    Nothing is learned but the components, so what they measure is coarser than what `ImageJudge`
    does, and the distance has a name of its own: it is not comparable with that of a network.

    Args:
        dataset: The data set. Its test samples are the "real" side of every metric.
    """

    columns: Mapping[str, tuple[str, str]] = {
        "pca_frechet": ("PCA-Frechet", ".3f"),
        "precision": ("precision", ".2f"),
        "recall": ("recall", ".2f"),
        "coverage": ("coverage", ".2f"),
        "copies": ("copies", ".1%"),
    }
    headline = "pca_frechet"

    def __init__(self, dataset: Dataset) -> None:
        self._train, self._test = dataset.tensors()
        self.num_samples = min(len(self._train), _MOST_SAMPLES)
        flat = self._train.flatten(1)
        self._mean = flat.mean(0)
        _, _, directions = torch.linalg.svd(flat[:_SVD_ROWS] - self._mean, full_matrices=False)
        self._directions = directions[:_COMPONENTS].T
        self._test_features = self.features(self._test)

    def features(self, samples: Tensor) -> Tensor:
        """Return the principal components, ``float32[n, 32]`` or fewer, of samples ``[n, ...]``."""
        flat = samples.to("cpu", torch.float32).flatten(1)
        return (flat - self._mean) @ self._directions

    def classify(self, samples: Tensor) -> Tensor:
        """Return zeros ``[n]``: there is one class."""
        return torch.zeros(len(samples), dtype=torch.int64)

    def evaluate(self, samples: Tensor) -> dict[str, float]:
        """Return every metric of samples ``[n, ...]`` (n of 10 or more)."""
        samples = samples.to("cpu", torch.float32)
        features = self.features(samples)
        precision, recall = precision_recall(self._test_features, features)
        return {
            "pca_frechet": frechet_distance(features, self._test_features),
            "precision": precision,
            "recall": recall,
            "coverage": coverage(self._test_features, features),
            "copies": copied_share(samples, self._train),
        }

    def reference_rows(self) -> dict[str, dict[str, float]]:
        """Return the metrics of training data, of the same with noise, and of a Gaussian."""
        data = self._train[: self.num_samples]
        if data.dim() == 4:
            rows = _reference_images(data)
        else:
            noise = torch.Generator().manual_seed(0)
            blurred = data + 0.35 * torch.randn(data.shape, generator=noise)
            gaussian = _draw_gaussian(data, noise)
            rows = {
                "training points": data,
                "training points + noise": blurred,
                "Gaussian fitted to them": gaussian,
            }
        return {name: self.evaluate(row) for name, row in rows.items()}

    def describe(self, values: Mapping[str, float]) -> str:
        """Return distance, recall and copies in words."""
        scale = self.evaluate(self._train[: self.num_samples])["pca_frechet"]
        return (
            f"Frechet distance of principal components {values['pca_frechet']:.3f} (real training"
            f" data {scale:.3f}), recall {values['recall']:.2f}, copies"
            f" {100 * values['copies']:.1f} %"
        )


def _reference_images(images: Tensor) -> dict[str, Tensor]:
    noise = torch.Generator().manual_seed(0)
    gaussian = _draw_gaussian(images, noise)
    rows = {
        "training images": images,
        "training images + noise": images + 0.35 * torch.randn(images.shape, generator=noise),
        "Gaussian fitted to pixels": gaussian,
    }
    return {name: row.clamp(-1.0, 1.0) for name, row in rows.items()}


def _draw_gaussian(images: Tensor, noise: torch.Generator) -> Tensor:
    """As many images from the Gaussian with the mean and the covariance of the given ones."""
    flat = images.flatten(1).double()
    spread = torch.linalg.qr(flat - flat.mean(0)).R / (len(flat) - 1) ** 0.5
    gaussian = torch.randn(len(flat), len(spread), generator=noise, dtype=torch.float64)
    return (gaussian @ spread + flat.mean(0)).view_as(images)


def _train_classifier(images: Tensor, labels: Tensor, num_classes: int) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = nn.Sequential(
            nn.Flatten(),
            nn.Linear(images[0].numel(), 128),
            nn.ReLU(),
            nn.Linear(128, 32),
            nn.ReLU(),
            nn.Linear(32, num_classes),
        )
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
    order = torch.Generator().manual_seed(0)
    for _ in range(max(1, min(_JUDGE_EPOCHS, _JUDGE_IMAGES // len(images)))):
        for batch in torch.randperm(len(images), generator=order).split(128):
            loss = functional.cross_entropy(network(images[batch]), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return network.requires_grad_(False)
