"""Three networks learn to draw what one photograph shows in the style of another.

    python examples/style_networks.py --picture drawn.png
    python examples/style_networks.py --correction hsc --every 10 --steps 100

A content network, a style network and a synthesis network are trained together on pieces of
scikit-learn's two sample photographs, or of your own, with the content loss and the style loss each
corrected by its own Hessian (``--correction hsc``) or as they are (``none``). In every other step
content and style are pieces of the same photograph: then what should be drawn is known, the content
itself, and is the target. The table shows the losses of one photograph in the style of the other,
with the CPU time of training; ``--picture`` draws both photographs in both styles.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from hessreg.optim import HessianPreconditioner
from hessreg.style import (
    CropSampler,
    RandomFeatures,
    ThreeNetworkTransfer,
    load_image,
    save_image,
)


def triples(
    pictures: Sequence[Tensor], size: int, seed: int
) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
    """Pieces of photographs: content, style and, where they are of the same one, the target."""
    first, second = (CropSampler([each], size, 1, seed + i) for i, each in enumerate(pictures))
    while True:
        yield next(first), next(second), None
        content = next(second)
        yield content, next(second), content
        yield next(second), next(first), None
        content = next(first)
        yield content, next(first), content


def make_correction(options: argparse.Namespace) -> Callable[[], HessianPreconditioner] | None:
    """What corrects the gradient of a loss, as the command line has it."""
    if options.correction == "none":
        return None
    return partial(
        HessianPreconditioner,
        eps=options.eps,
        saddle_free=options.saddle_free,
        every=options.every,
        num_steps=options.products,
        max_residual=float("inf"),
    )


@torch.no_grad()
def evaluate(transfer: ThreeNetworkTransfer, pictures: Sequence[Tensor]) -> tuple[float, float]:
    """Content and style loss of each photograph in the style of the other, their means."""
    first, second = pictures
    both = torch.tensor([transfer.losses(first, second), transfer.losses(second, first)])
    content, style = both.mean(0).tolist()
    return content, style


def train(options: argparse.Namespace, pictures: Sequence[Tensor]) -> ThreeNetworkTransfer:
    """Train up to the limit of steps or CPU time, and print the losses on the way."""
    transfer = ThreeNetworkTransfer(
        RandomFeatures(),
        style_weight=options.style_weight,
        learning_rate=options.lr,
        correction=make_correction(options),
        seed=options.seed,
    )
    print("steps  seconds  content loss  style loss")
    seconds, data = 0.0, triples(pictures, options.crop, options.seed)
    while True:
        done = transfer.steps_done >= options.steps or seconds >= options.seconds
        if done or transfer.steps_done % options.print_every == 0:
            content, style = evaluate(transfer, pictures)
            print(f"{transfer.steps_done:5}  {seconds:7.1f}  {content:12.4f}  {style:10.4f}")
        if done:
            return transfer
        start = time.process_time()
        transfer.step(*next(data))
        seconds += time.process_time() - start


def draw(path: Path, transfer: ThreeNetworkTransfer, pictures: Sequence[Tensor]) -> None:
    """Each photograph, a row, in the style of each, a column."""
    height, width = (min(each.shape[i] for each in pictures) for i in (2, 3))
    shown = [each[:, :, :height, :width] for each in pictures]
    rows = [torch.cat([transfer.draw(row, style) for style in shown], 3) for row in shown]
    save_image(path, torch.cat(rows, 2))


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    samples = ["sample:china", "sample:flower"]
    parser.add_argument("--pictures", nargs=2, default=samples, help="two photographs")
    parser.add_argument("--correction", choices=["none", "hsc"], default="hsc")
    parser.add_argument("--eps", type=float, default=1.0, help="H + eps^2 H^-1; 1 is the article's")
    parser.add_argument("--saddle-free", action="store_true", help="|H| in place of H")
    parser.add_argument("--every", type=int, default=10, help="steps from one Hessian to the next")
    parser.add_argument("--products", type=int, default=10, help="with each Hessian")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="of CPU time")
    parser.add_argument("--lr", type=float, default=1e-3, help="the article has 2e-4")
    parser.add_argument("--style-weight", type=float, default=10.0)
    parser.add_argument("--size", type=int, default=160, help="pixels of the longer side")
    parser.add_argument("--crop", type=int, default=64, help="pixels of the pieces trained on")
    parser.add_argument("--print-every", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--picture", type=Path, help="image file to draw")
    options = parser.parse_args(arguments)
    pictures = [load_image(name, options.size) for name in options.pictures]
    transfer = train(options, pictures)
    if options.picture:
        draw(options.picture, transfer, pictures)


if __name__ == "__main__":
    main(sys.argv[1:])
