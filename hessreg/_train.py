"""Training in one call; what it needs is imported when it is called."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hessreg.gan import Run

__all__ = ["train"]


def train(
    dataset: str = "digits", *, out: str | Path | None = None, quiet: bool = False, **options: Any
) -> Run:
    """Train a GAN as ``hessreg train DATASET`` does, with the same defaults and files.

    Args:
        dataset: What to train on: ``"digits"``, ``"ring"``, ...
        out: New folder; by default one in ``runs/``.
        quiet: Print nothing.
        options: Fields of `hessreg.gan.TrainConfig`: ``regularizer="r1"``, ``seconds=40``. Groups
            are mappings or their dataclasses: ``r1={"gamma": 0.5}`` changes one option of a group,
            ``r1=R1Config()`` all.

    Returns:
        The finished run: ``run.result`` has the metrics, ``run.trainer.ema`` is the averaged
        generator, ``run.sample(64)`` draws with it, and ``run.folder.path`` has the pictures.

    Raises:
        ModuleNotFoundError: Without what ``pip install 'hessreg[gan]'`` brings.
        ValueError: If an option is unknown or has a value that it cannot have, or the folder is not
            empty or cannot be written.
        KeyboardInterrupt: If it was interrupted; the state is saved for ``hessreg resume``.
        hessreg.gan.NonFiniteError: If something was not finite; names the last good checkpoint.

    Example:
        >>> import tempfile
        >>> folder = tempfile.mkdtemp()
        >>> run = train("ring", regularizer="r1", steps=5, batch_size=8, out=folder, quiet=True)
        >>> run.result["steps"], run.sample(3).shape
        (5, torch.Size([3, 2]))
    """
    from hessreg.gan import DEFAULTS, Run, TrainConfig
    from hessreg.gan.progress import SilentProgress, say
    from hessreg.gan.run_folder import new_folder

    if dataset not in list(DEFAULTS):
        raise ValueError(f"dataset must be one of {', '.join(DEFAULTS)}, got {dataset!r:.40}")
    # Its default limit is for those who give none.
    defaults = DEFAULTS[dataset].to_dict() | {"seconds": 0.0}
    config = TrainConfig.from_dict(_merged(defaults, options))
    with nullcontext(Path(out)) if out else new_folder(config.name) as path:
        run = Run.create(path, config)
    summary = run.train(SilentProgress() if quiet else None)
    if not quiet:
        say(summary)
    return run


def _merged(defaults: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """The defaults with what is given in their place; of mappings only the names in them."""
    merged = dict(defaults)
    for name, value in options.items():
        given = asdict(value) if is_dataclass(value) and not isinstance(value, type) else value
        inner = merged.get(name)
        if isinstance(given, Mapping) and isinstance(inner, Mapping):
            given = {**inner, **given}
        merged[name] = given
    return merged
