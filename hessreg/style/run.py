"""One transfer of style with its files: the picture, the losses, pictures on the way."""

from __future__ import annotations

import itertools
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from hessreg.gan.checkpoint import naming
from hessreg.gan.progress import ProgressReport, make_progress
from hessreg.gan.run import Interrupted, StopSignals
from hessreg.style.config import StyleConfig, parse_blend
from hessreg.style.features import load_features
from hessreg.style.images import (
    ImageError,
    check_picture_path,
    keep_colors,
    load_image,
    load_images,
    save_image,
)
from hessreg.style.losses import StyleObjective
from hessreg.style.pictures import save_losses
from hessreg.style.synthesis import SynthesisTrainer, build_trainer, load_network, save_network
from hessreg.style.transfer import PictureOptimizer, start_picture

__all__ = ["StyleRun", "draw_at_once"]

_PROGRAM = 400 * 2**20  # bytes of memory without a picture


class StyleRun:
    """Paints a photograph in the style of others.

    Beside the picture ``out.png`` it writes ``out.jsonl``, the losses of every step, and
    ``out.losses.png``, their curves; with ``save_every`` also ``out.00050.png`` and so on, and of a
    network ``out.safetensors``, its weights.

    Args:
        content: File of what the picture shows, or the name of a sample; see `load_image`.
        styles: Files of how it is painted, likewise.
        out: The picture to write: PNG, JPEG or WebP.
        config: How.

    Raises:
        ValueError: If a file cannot be read or written, or the memory does not suffice.
    """

    def __init__(self, content: str, styles: Sequence[str], out: Path, config: StyleConfig) -> None:
        check_picture_path(out)
        beside = [
            ".jsonl",
            ".losses.png",
            *([".safetensors"] if config.method == "network" else []),
        ]
        inputs = [content, *styles, config.features, config.training.pictures]
        _check_not_read([out, *map(out.with_suffix, beside)], inputs)
        blend = parse_blend(config.blend, len(styles))
        if config.threads:
            torch.set_num_threads(config.threads)
        self.out, self.config = out, config
        self.names = content, list(styles)
        self.content = load_image(content, config.size)
        pictures = [load_image(style, config.size) for style in styles]
        features = load_features(config.features, config.seed, config.pooling)
        self._check_memory(features.bytes_per_pixel)
        self.objective = StyleObjective(
            features,
            self.content,
            pictures,
            **config.weights,
            style_weights=blend,
        )
        self.optimizer = self._build(pictures[0])
        self.rows: list[dict[str, float]] = []
        self._start = 0.0, 0.0  # wall clock and CPU time

    def _build(self, style: Tensor) -> PictureOptimizer | SynthesisTrainer:
        config = self.config
        if config.method == "network":
            chosen = config.training.pictures
            pictures = load_images(chosen, config.size) if chosen else [self.content]
            return build_trainer(self.objective, pictures, config)
        return PictureOptimizer(self.objective, start_picture(config, self.content, style), config)

    def _check_memory(self, bytes_per_pixel: int) -> None:
        graphs = 1 if self.config.correction == "none" else 3  # derivatives of derivatives
        self._memory = _PROGRAM + graphs * bytes_per_pixel * self.content[0, 0].numel()
        available = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        if self._memory > available:
            has = f"this machine has {available / 2**30:.1f} GB: choose a smaller --size"
            raise ImageError(f"{self.describe()}, and {has}")

    def describe(self) -> str:
        """What will be done: pictures, size, and about the memory it takes."""
        height, width = self.content.shape[2:]
        content, styles = self.names
        return (
            f"{content} in the style of {' and '.join(styles)}: {width} x {height} pixels,"
            f" {self._memory / 2**30:.1f} GB of memory"
        )

    def train(self, progress: ProgressReport | None = None) -> str:
        """Optimise up to the limit and write the files.

        Args:
            progress: What to show meanwhile; by default a bar or plain lines.

        Returns:
            A line that says where the picture is, and what was done.

        Raises:
            Interrupted: If SIGINT or SIGTERM arrived; the picture is written as it is then.
            NonFiniteError: If something was not finite. The picture is not written.
        """
        self._log.unlink(missing_ok=True)
        self._start = time.monotonic(), time.process_time()
        with progress or make_progress(self.config.title) as report, StopSignals() as signals:
            while True:
                row = self._record()
                report.update(row, self._fraction(row))
                if signals.received or self._fraction(row) >= 1:
                    break
                self.optimizer.step()
        if isinstance(self.optimizer, PictureOptimizer) and self.optimizer.settle():
            self._record()
        return self._finish(signals.received)

    @property
    def _log(self) -> Path:
        return self.out.with_suffix(".jsonl")

    def _fraction(self, row: dict[str, float]) -> float:
        limits = (row["step"], self.config.steps), (row["seconds"], self.config.seconds)
        return min(1.0, max(done / limit for done, limit in limits if limit))

    def _record(self) -> dict[str, float]:
        """Measure the picture, and write down what was found."""
        step, every = self.optimizer.steps_done, self.config.save_every
        measured = self.optimizer.measure() | self.optimizer.metrics()
        wall, cpu = time.monotonic() - self._start[0], time.process_time() - self._start[1]
        row = {"step": step, "seconds": round(wall, 3), "cpu_seconds": round(cpu, 3)}
        row |= {"evaluations": self.optimizer.evaluations, **measured}
        self.rows.append(row)
        with naming(self._log), self._log.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        if every and step and step % every == 0:
            save_image(self.out.with_suffix(f".{step:05d}{self.out.suffix}"), self.picture())
        return row

    def picture(self) -> Tensor:
        """The picture as it is, ``[1, 3, height, width]`` in [0, 1]."""
        if isinstance(self.optimizer, SynthesisTrainer):
            image = self.optimizer.draw(self.content)
        else:
            image = self.optimizer.image.detach().clamp(0, 1)
        return keep_colors(image, self.content) if self.config.keep_colors else image

    def _finish(self, interrupted: bool) -> str:
        save_image(self.out, self.picture())
        beside = [self._log, self.out.with_suffix(".losses.png")]
        if isinstance(self.optimizer, SynthesisTrainer):
            beside.append(self.out.with_suffix(".safetensors"))
            save_network(beside[-1], self.optimizer.network)
        save_losses(beside[1], {self.config.title: self.rows})
        last = self.rows[-1]
        steps = f"{last['step']:.0f} steps of {self.config.title}"
        if interrupted:
            raise Interrupted(f"stopped after {steps}; {self.out} is the picture so far")
        return (
            f"{self.out}: after {steps} in {last['seconds']:.0f} s, loss {self.rows[0]['loss']:.3g}"
            f" -> {last['loss']:.3g}; {', '.join(map(str, beside))} beside it"
        )


def _check_not_read(outputs: Sequence[Path], inputs: Sequence[str]) -> None:
    """Refuse to write over what is read: a photograph, weights."""
    for out, name in itertools.product(outputs, inputs):
        if name and out.exists() and Path(name).exists() and out.samefile(name):
            raise ImageError(f"{out} would be written over {name}, which is read")


def draw_at_once(content: str, out: Path, config: StyleConfig) -> str:
    """Draw a photograph with a network that was trained before, and write it.

    Args:
        content: As for `StyleRun`.
        out: Likewise.
        config: Names the network; of the rest, the size and whether to keep colours count.

    Returns:
        A line that says where the picture is.

    Raises:
        ValueError: If the network or the photograph cannot be read, or the picture not written.
    """
    check_picture_path(out)
    _check_not_read([out], [content, config.network])
    if config.threads:
        torch.set_num_threads(config.threads)
    network, picture = load_network(Path(config.network)), load_image(content, config.size)
    start = time.monotonic()
    with torch.no_grad():
        drawn = network(picture)
    seconds = time.monotonic() - start
    save_image(out, keep_colors(drawn, picture) if config.keep_colors else drawn)
    return f"{out}: {content} drawn by {config.network} in {seconds:.2f} s"
