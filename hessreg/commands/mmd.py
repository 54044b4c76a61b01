"""``hessreg mmd``: the maximum mean discrepancy of two samples."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hessreg.commands._errors import bad_input
from hessreg.commands._options import check_seed, new_parser
from hessreg.gan.options import parse_sigma
from hessreg.gan.progress import say
from hessreg.gan.sample_files import load_samples
from hessreg.kernels import TwoSampleTest, median_bandwidth, mmd2, mmd2_test
from hessreg.ops.gaussian import _ESTIMATORS

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

__all__ = ["make_parser", "run"]


def make_parser() -> ArgumentParser:
    """Return the parser of the command."""
    files = "a .npy or .npz file [n, ...], or a folder of PNG or JPEG images"
    parser = new_parser("Squared maximum mean discrepancy of two samples.")
    parser.add_argument("real", type=str, help=f"First sample: {files}.")
    parser.add_argument("fake", type=str, help="Second sample, likewise.")
    parser.add_argument(
        "--sigma", type=str, default="median", help="median, or bandwidth(s): 0.5,1"
    )
    parser.add_argument("--estimator", choices=_ESTIMATORS, default="unbiased", help="Of MMD^2.")
    parser.add_argument("--permutations", type=int, default=0, help="For a p-value; 0: none.")
    parser.add_argument("--seed", type=int, default=0, help="Of the permutations.")
    parser.add_argument("--key", type=str, default=None, help="Array to take from .npz files.")
    return parser


def run(options: dict[str, Any]) -> None:
    """Do what the options say."""
    with bad_input():
        real, fake = (
            load_samples(Path(options[name]), options["key"]) for name in ("real", "fake")
        )
        sigma = _sigma(options["sigma"], real, fake)
        value = mmd2(real, fake, sigma, estimator=options["estimator"])
        _check_result(sigma, value)
        test = _test(options, real, fake, sigma)
    say(f"MMD^2: {value.item():.6g} ({options['estimator']})")
    say(f"sigma: {_numbers(sigma)}{' (median)' if options['sigma'] == 'median' else ''}")
    say(f"n: {len(real)}, m: {len(fake)}, d: {real.shape[1]}")
    if test is not None:
        count = options["permutations"]
        say(f"p-value: {test.p_value.item():.4g} ({count} permutations of the unbiased estimate)")


def _numbers(sigma: Tensor | list[float]) -> str:
    values = torch.as_tensor(sigma, dtype=torch.float64).reshape(-1).tolist()
    return ", ".join(f"{value:.4g}" for value in values)


def _sigma(text: str, real: Tensor, fake: Tensor) -> Tensor | list[float]:
    if real.shape[1] != fake.shape[1]:
        raise ValueError(
            f"samples must have equal dimensions: {real.shape[1]} in the first,"
            f" {fake.shape[1]} in the second"
        )
    values = parse_sigma(text, ("median",))
    return median_bandwidth(real, fake) if isinstance(values, str) else values


def _check_result(sigma: Tensor | list[float], value: Tensor) -> None:
    gamma = 0.5 / torch.as_tensor(sigma, dtype=torch.float64).square()
    if not (gamma.isfinite() & (gamma > 0)).all():
        raise ValueError("the median distance, or its square, is not positive and finite")
    if not value.isfinite():
        raise ValueError(f"MMD^2 is {value.item()}: the points are too far apart")


def _test(
    options: dict[str, Any], real: Tensor, fake: Tensor, sigma: Tensor | list[float]
) -> TwoSampleTest | None:
    if options["permutations"] == 0:
        return None
    check_seed(options["seed"])
    generator = torch.Generator().manual_seed(options["seed"])
    return mmd2_test(real, fake, sigma, options["permutations"], generator)
