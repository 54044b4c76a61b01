"""Feed-forward style transfer: the networks, their training, the article's three networks."""

from __future__ import annotations

import json
import math
import runpy
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.func import functional_call, hessian
from torch.nn.utils import get_total_norm, parameters_to_vector, vector_to_parameters

from hessreg.cli import main
from hessreg.curvature import HessianOperator, norm, third_order_safe
from hessreg.gan.checkpoint import save_state
from hessreg.gan.trainer import NonFiniteError
from hessreg.optim import HessianPreconditioner
from hessreg.style import RandomFeatures, StyleObjective, WeightsError
from hessreg.style.config import CorrectionConfig
from hessreg.style.images import load_image, save_image
from hessreg.style.networks import (
    ContentNetwork,
    FeedForwardNetwork,
    StyleNetwork,
    SynthesisNetwork,
)
from hessreg.style.synthesis import CropSampler, SynthesisTrainer, load_network, save_network
from hessreg.style.three_networks import ThreeNetworkTransfer

for package in ("PIL", "jsonargparse", "matplotlib", "rich", "safetensors", "sklearn"):
    pytest.importorskip(package)

SIZES = [(8, 8), (9, 9), (11, 17), (32, 48), (33, 31)]


def pictures(count, height, width=None, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, 3, height, width or height, generator=generator)


def small_features(levels=2):
    return RandomFeatures(seed=0, channels=4, levels=levels, kernel_size=3, content_levels=(0,))


def small_network(seed=0, **options):
    torch.manual_seed(seed)
    return FeedForwardNetwork(**{"width": 2, "num_blocks": 1, **options})


def small_trainer(seed=0, correction=None, **options):
    content, style = pictures(1, 24, 32, seed=1), pictures(1, 24, seed=2)
    objective = StyleObjective(small_features(), content, [style], tv_weight=0.1)
    crops = CropSampler([content], size=16, batch_size=2, seed=seed)
    return SynthesisTrainer(small_network(seed), objective, crops, correction=correction, **options)


def histories(trainer, steps):
    """The losses of so many steps."""
    losses = []
    for _ in range(steps):
        losses.append(trainer.measure()["loss"])
        trainer.step()
    return losses


# Networks


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("activation", ["silu", "softplus", "tanh", "leaky_relu"])
def test_pictures_come_back_at_their_own_size_and_in_range(size, activation):
    drawn = small_network(activation=activation)(pictures(2, *size))
    assert drawn.shape == (2, 3, *size)
    assert 0 < drawn.min() < drawn.max() < 1


@pytest.mark.parametrize("size", SIZES)
def test_three_networks_fit_together(size):
    synthesis = SynthesisNetwork(width=2, num_blocks=2)
    content = ContentNetwork(width=2)(pictures(2, *size))
    style = StyleNetwork(synthesis.style_size, width=2)(pictures(2, 19, 8))
    assert content.shape == (2, 8, *(math.ceil(side / 4) for side in size))
    assert style.shape == (2, synthesis.style_size)
    assert synthesis(content, style).shape == (2, 3, *(4 * math.ceil(side / 4) for side in size))
    assert synthesis(content, style, size).shape == (2, 3, *size)


def test_one_style_for_all_pictures_is_that_style_for_each():
    synthesis = SynthesisNetwork(width=2, num_blocks=1)
    content, style = torch.randn(3, 8, 4, 4), torch.randn(synthesis.style_size)
    torch.testing.assert_close(
        synthesis(content, style), synthesis(content, style.repeat(3, 1)), rtol=0, atol=0
    )


def test_each_picture_is_drawn_as_if_alone():
    network, both = small_network(), pictures(2, 16)
    alone = torch.cat([network(both[:1]), network(both[1:])])
    torch.testing.assert_close(network(both), alone)


def test_style_changes_the_picture_and_its_place_does_not():
    network = StyleNetwork(style_size=6, width=2)
    picture = pictures(1, 32)
    mirrored = picture.flip(3)
    assert not torch.allclose(network(picture), network(0.5 * picture))
    # Convolutions are not symmetric, so that only a period of a pattern may be shifted.
    pattern = pictures(1, 4).repeat(1, 1, 8, 8)
    inner = network.layers(2 * pattern - 1)[..., 1:-1, 1:-1]
    shifted = network.layers(2 * pattern.roll(4, 3) - 1)[..., 1:-1, 1:-1]
    torch.testing.assert_close(inner, shifted)
    assert network(mirrored).shape == (1, 6)


def test_every_parameter_gets_a_gradient():
    network = small_network().double()
    network(pictures(1, 12).double()).square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in network.parameters())


def test_first_and_second_derivative_agree_with_finite_differences():
    network, picture = small_network().double(), pictures(1, 9, 13).double()
    parameters = list(network.parameters())
    start = parameters_to_vector(parameters).detach()
    direction = torch.randn(len(start), dtype=torch.float64)

    def loss():
        return network(picture).square().mean()

    def at(step):
        vector_to_parameters(start + step * direction, parameters)
        gradient = torch.autograd.grad(loss(), parameters)
        return loss().detach(), parameters_to_vector(gradient)

    (value, gradient), h = at(0.0), 1e-6
    product = HessianOperator(loss, parameters).matvec(direction)
    (above, after), (below, before) = at(h), at(-h)
    assert value > 0
    torch.testing.assert_close(gradient @ direction, (above - below) / (2 * h), rtol=1e-6, atol=0)
    error = product - (after - before) / (2 * h)
    assert error.norm() < 1e-5 * product.norm()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ContentNetwork(width=0), "width must be at least 1, got 0"),
        (lambda: ContentNetwork(activation="swish"), "unknown activation 'swish'"),
        (lambda: StyleNetwork(style_size=0), "style_size must be at least 1, got 0"),
        (lambda: SynthesisNetwork(num_blocks=-1), "num_blocks must be at least 0, got -1"),
        (lambda: small_network()(torch.rand(3, 8, 8)), r"\[n, 3, h, w\], got \[3, 8, 8\]"),
        (lambda: small_network()(torch.rand(1, 1, 8, 8)), r"got \[1, 1, 8, 8\]"),
        (lambda: small_network()(torch.rand(1, 3, 8, 7)), "at least 8 x 8 pixels, got 8 x 7"),
        (
            lambda: SynthesisNetwork(width=2)(torch.rand(1, 4, 2, 2), torch.zeros(1)),
            r"content must have shape \[n, 8, h, w\], got \[1, 4, 2, 2\]",
        ),
        (
            lambda: SynthesisNetwork(width=2, num_blocks=0)(torch.rand(2, 8, 2, 2), torch.zeros(3)),
            r"style must have shape \[2, 12\] or \[12\], got \[3\]",
        ),
    ],
)
def test_bad_input_is_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# Crops


def test_crops_are_parts_of_the_pictures():
    picture = pictures(1, 16, 40)
    crops = CropSampler([picture], size=16, batch_size=3, seed=0)
    windows = picture[0].unfold(2, 16, 1).permute(2, 0, 1, 3)
    known = torch.cat([windows, windows.flip(3)]).flatten(1)
    batch = torch.cat([next(crops) for _ in range(10)])
    distances = torch.cdist(batch.flatten(1).double(), known.double())
    assert distances.min(1).values.max() < 1e-3  # each is one of the windows, maybe mirrored
    found = distances.argmin(1)
    assert 0 < (found < len(windows)).sum() < len(batch)
    assert len(found.unique()) > 10


def test_crops_come_from_all_pictures_and_are_scaled():
    dark, bright = torch.zeros(1, 3, 20, 30), torch.ones(1, 3, 50, 20)
    batch = next(CropSampler([dark, bright], size=12, batch_size=20, seed=0))
    assert batch.shape == (20, 3, 12, 12)
    assert set(batch.flatten(1).mean(1).round(decimals=3).tolist()) == {0.0, 1.0}


def test_crops_depend_on_the_seed_only():
    first, again, other = (
        next(CropSampler([pictures(1, 20)], size=8, batch_size=2, seed=seed)) for seed in (3, 3, 4)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_bad_crops_are_refused():
    with pytest.raises(ValueError, match=r"size must be in \[1, 16\] for these pictures, got 17"):
        CropSampler([pictures(1, 16, 20)], size=17, batch_size=1, seed=0)
    with pytest.raises(ValueError, match="pictures must be one or more"):
        CropSampler([], size=8, batch_size=1, seed=0)
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        CropSampler([pictures(1, 16)], size=8, batch_size=0, seed=0)


# One network for one style

HSC = CorrectionConfig(eps=0.1, num_steps=8, every=2)


@pytest.mark.parametrize("correction", [None, HSC])
def test_training_lowers_the_loss(correction):
    trainer = small_trainer(correction=correction, learning_rate=2e-2)
    losses = histories(trainer, 25)
    assert sum(losses[-3:]) < 0.9 * sum(losses[:3])


@pytest.mark.parametrize("correction", [None, HSC])
def test_training_is_determined_by_its_seed(correction):
    trainers = [small_trainer(seed, correction) for seed in (0, 0, 1)]
    one, same, other = (histories(trainer, 3) for trainer in trainers)
    assert one == same
    assert one != other
    pairs = zip(trainers[0].parameters, trainers[1].parameters, strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_measuring_changes_nothing():
    one, other = small_trainer(), small_trainer()
    for _ in range(3):
        assert one.measure() == one.measure()
        one.step()
        other.step()
    assert one.measure() == other.measure()


def test_correction_is_that_of_the_batch():
    options = CorrectionConfig(num_steps=4, every=1, saddle_free=False)
    trainer, plain = small_trainer(correction=options), small_trainer()
    hessian = HessianOperator(plain._loss(), plain.parameters)
    with torch.no_grad():
        eps = options.eps * norm(hessian, "spectral", num_steps=5).item()
    reference = HessianPreconditioner(eps=eps, mu=1 / eps, num_steps=4, max_residual=math.inf)
    wanted = reference.correct(hessian.gradient, lambda: hessian)
    trainer.step()
    torch.testing.assert_close(parameters_to_vector([p.grad for p in trainer.parameters]), wanted)
    assert trainer.metrics() == pytest.approx(reference.metrics(), rel=1e-3)


def test_loss_of_a_batch_is_the_mean_of_those_of_its_pictures():
    trainer, batch = small_trainer(), pictures(2, 16)
    both = trainer.parts(batch)
    single = [trainer.parts(each) for each in batch.split(1)]
    for name in ("style", "tv"):
        mean = (single[0][name] + single[1][name]) / 2
        torch.testing.assert_close(both[name], mean)


def test_loss_is_that_of_the_objective():
    trainer, picture = small_trainer(), pictures(1, 16)
    objective = trainer.objective
    mine = StyleObjective(objective.features, picture, [pictures(1, 24, seed=2)], tv_weight=0.1)
    wanted = mine(trainer.network(picture))  # in range, so that its fourth part is 0
    torch.testing.assert_close(objective.total(trainer.parts(picture)), wanted)


def test_nonfinite_loss_stops_and_changes_nothing():
    trainer = small_trainer()
    trainer.step()
    before = [p.detach().clone() for p in trainer.parameters]
    trainer.crops = iter([torch.full((1, 3, 16, 16), torch.nan)])
    with pytest.raises(NonFiniteError, match="step 1: the loss is nan"):
        trainer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.parameters, strict=True))


# The file


def test_network_comes_back_from_its_file(tmp_path):
    network = small_network(activation="tanh")
    save_network(tmp_path / "network.safetensors", network)
    again, picture = load_network(tmp_path / "network.safetensors"), pictures(1, 11, 14)
    assert again.options == network.options
    assert torch.equal(again(picture), network(picture))
    assert [path.name for path in tmp_path.iterdir()] == ["network.safetensors"]


def test_bad_files_are_one_clear_line(tmp_path):
    from safetensors.torch import save_file

    path = tmp_path / "file.safetensors"
    with pytest.raises(WeightsError, match="no network at"):
        load_network(path)
    with pytest.raises(WeightsError, match="no network at"):
        load_network(tmp_path)
    other = {"kind": "hessreg.style.FeedForwardNetwork", "options": {"width": 3}, "weights": {}}
    foreign = [
        lambda: path.write_bytes(b"no weights"),
        lambda: path.write_bytes(b""),
        lambda: save_file({"weight": torch.zeros(3)}, path),
        lambda: save_state(path, {"trainer": {}}),
        lambda: save_state(path, other),
        lambda: save_state(path, other | {"options": {"depth": 3}}),
        lambda: save_state(path, other | {"options": [3]}),
    ]
    for write in foreign:
        write()
        with pytest.raises(WeightsError, match=r"damaged, or is no network of hessreg style$"):
            load_network(path)
    network = small_network()
    save_network(path, network)
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(WeightsError, match="damaged"):
        load_network(path)


def test_file_with_nan_is_refused(tmp_path):
    network = small_network()
    with torch.no_grad():
        network.style[0] = torch.nan
    save_network(tmp_path / "nan.safetensors", network)
    with pytest.raises(WeightsError, match="style is not finite"):
        load_network(tmp_path / "nan.safetensors")


# Three networks


def transfer(correction, **options):
    features = small_features(levels=1).double()
    made = ThreeNetworkTransfer(
        features, width=1, num_blocks=0, correction=correction, style_weight=2.0, **options
    )
    for network in made.networks:
        network.double()
    return made


def corrected(H, g, eps, mu):
    """f(H) g with f(l) = (l + mu eps^2) / (l^2 + eps^2), by all eigenvalues."""
    values, vectors = torch.linalg.eigh(H)
    weights = (values + mu * eps**2) / (values.square() + eps**2)
    return vectors @ (weights * (vectors.mT @ g))


def loss_functions(made, *pictures):
    """The content and the style loss as functions of all parameters in one vector."""
    both = nn.ModuleList(made.networks)
    named = dict(both.named_parameters())

    def function(index):
        def loss(vector):
            parts = vector.split([p.numel() for p in named.values()])
            state = {n: v.view(p.shape) for (n, p), v in zip(named.items(), parts, strict=True)}
            return functional_call(
                _Losses(both, made), {f"both.{n}": v for n, v in state.items()}, (index, *pictures)
            )

        return loss

    return [function(0), function(1)], parameters_to_vector(named.values()).detach()


class _Losses(nn.Module):
    """What functional_call needs: a module whose call is the loss."""

    def __init__(self, both, made):
        super().__init__()
        self.both, self.made = both, [made]

    def forward(self, index, *pictures):
        return self.made[0].losses(*pictures)[index]


@pytest.mark.parametrize(("eps", "mu", "with_target"), [(1.0, 1.0, False), (0.5, 0.0, True)])
def test_step_is_that_of_explicit_hessians(eps, mu, with_target):
    make = partial(HessianPreconditioner, eps=eps, mu=mu, num_steps=150)
    made = transfer(make, max_norm=1e-3)
    content, style = pictures(1, 8).double(), pictures(1, 8, seed=1).double()
    target = pictures(1, 8, seed=2).double() if with_target else None
    functions, start = loss_functions(made, content, style, target)
    with third_order_safe():  # under vmap torch's own instance normalisation is wrong by 1e-3
        derivatives = [(hessian(f)(start), torch.func.grad(f)(start)) for f in functions]
    wanted = sum(corrected(H, g, eps, mu) for H, g in derivatives)
    reference = torch.optim.Adam([start.requires_grad_()], 2e-4, betas=(0.5, 0.999))
    size = sum(p.numel() for p in made.synthesis_network.parameters())
    wanted[-size:] *= 1e-3 / wanted[-size:].norm()
    start.grad = wanted

    before = parameters_to_vector(made.parameters).detach()
    values = made.step(content, style, target)
    reference.step()

    gradient = parameters_to_vector([p.grad for p in made.parameters])
    torch.testing.assert_close(gradient, wanted, rtol=1e-6, atol=1e-6 * wanted.abs().max().item())
    moved = parameters_to_vector(made.parameters) - before
    torch.testing.assert_close(moved, start.detach() - before, rtol=1e-3, atol=1e-6)
    expected = [f(before).item() for f in functions]
    assert [values["content_loss"], values["style_loss"]] == pytest.approx(expected, rel=1e-12)


def test_the_style_loss_has_its_weight():
    made, other = transfer(None), transfer(None)
    other.style_weight = 1.0
    both = pictures(1, 8).double(), pictures(1, 8, seed=1).double()
    (content, style), expected = made.losses(*both), other.losses(*both)
    torch.testing.assert_close((content, style), (expected[0], 2 * expected[1]))


def test_each_loss_keeps_a_curvature_of_its_own():
    made = transfer(partial(HessianPreconditioner, every=5, num_steps=5, max_residual=math.inf))
    both = pictures(1, 8).double(), pictures(1, 8, seed=1).double()
    functions, start = loss_functions(made, *both)
    made.step(*both)
    kept = [each.state_dict()["curvature"]["basis"][0] for each in made.corrections]
    for first, loss in zip(kept, functions, strict=True):
        g = torch.func.grad(loss)(start)
        torch.testing.assert_close(first, g / g.norm())  # of which the space is


def test_uncorrected_step_is_along_the_sum_of_the_gradients():
    made = transfer(None, max_norm=math.inf)
    content, style = pictures(1, 8).double(), pictures(1, 8, seed=1).double()
    loss = torch.stack(made.losses(content, style)).sum()
    wanted = parameters_to_vector(torch.autograd.grad(loss, made.parameters))
    made.step(content, style)
    gradient = parameters_to_vector([p.grad for p in made.parameters])
    torch.testing.assert_close(gradient, wanted)


def test_three_adams_step_as_the_article_has_them():
    made = transfer(None)
    reference = parameters_to_vector(made.parameters).detach().requires_grad_()
    adam = torch.optim.Adam([reference], 2e-4, betas=(0.5, 0.999))
    for seed in range(3):
        made.step(pictures(1, 8, seed=seed).double(), pictures(1, 8, seed=seed + 5).double())
        reference.grad = parameters_to_vector([p.grad for p in made.parameters])
        adam.step()
    torch.testing.assert_close(parameters_to_vector(made.parameters), reference)


def test_synthesis_network_alone_is_clipped():
    made = transfer(None, max_norm=1e-4)
    made.step(pictures(1, 8).double(), pictures(1, 8, seed=1).double())
    norms = [get_total_norm([p.grad for p in each.parameters()]) for each in made.networks]
    assert norms[2] == pytest.approx(1e-4, rel=1e-3)
    assert min(norms[:2]) > 1e-3


SADDLE_FREE = partial(
    HessianPreconditioner, every=5, num_steps=8, saddle_free=True, max_residual=math.inf
)


@pytest.mark.parametrize("make", [None, SADDLE_FREE])
def test_three_networks_learn(make):
    options = {"width": 2, "num_blocks": 1, "learning_rate": 5e-3, "correction": make}
    runs = []
    for seed in (0, 0):
        made = ThreeNetworkTransfer(small_features(), seed=seed, **options)
        content, style = pictures(1, 16), pictures(1, 20, seed=1) ** 4
        runs.append([made.step(content, style) for _ in range(30)])
    totals = [sum(row.values()) for row in runs[0]]
    assert sum(totals[-5:]) < 0.9 * sum(totals[:5])
    assert runs[0] == runs[1]


def test_initial_weights_depend_on_the_seed_only():
    weights = []
    for seed in (1, 1, 2):
        torch.manual_seed(len(weights))
        made = ThreeNetworkTransfer(small_features(), width=2, num_blocks=1, seed=seed)
        weights.append(parameters_to_vector(made.parameters))
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[1], weights[2])


def test_drawing_depends_on_content_and_style():
    made = ThreeNetworkTransfer(small_features(), width=2, num_blocks=1)
    content, other = pictures(1, 9, 14), pictures(1, 9, 14, seed=1)
    drawn = made.draw(content, other)
    assert drawn.shape == content.shape
    assert not drawn.requires_grad
    assert not torch.allclose(drawn, made.draw(other, other))
    assert not torch.allclose(drawn, made.draw(content, content))


@pytest.mark.filterwarnings("error")
def test_nonfinite_picture_stops_three_networks():
    made = ThreeNetworkTransfer(small_features(), width=2, num_blocks=1)
    before = parameters_to_vector(made.parameters).detach().clone()
    with pytest.raises(NonFiniteError, match="step 1: the gradient of the content loss is not"):
        made.step(torch.full((1, 3, 16, 16), torch.nan), pictures(1, 16))
    assert torch.equal(before, parameters_to_vector(made.parameters))


# The command

TINY = ["--size=32", "--steps=2", "--threads=1", "--training.width=2", "--training.num-blocks=1"]


def style(*args):
    return main(["style", *map(str, args)])


def test_the_command_trains_a_network_and_draws_with_it(tmp_path, capsys):
    out = tmp_path / "out.png"
    assert style("sample:china", "sample:flower", "-o", out, "--method=network", *TINY) == 0
    assert f"{out}: after 2 steps of network in" in capsys.readouterr().out
    names = ["out.jsonl", "out.losses.png", "out.png", "out.safetensors"]
    assert sorted(file.name for file in tmp_path.iterdir()) == names
    rows = [json.loads(line) for line in out.with_suffix(".jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 1, 2]
    assert rows[0].keys() >= {"loss", "content", "style", "tv", "seconds"}

    again, network = tmp_path / "again.png", out.with_suffix(".safetensors")
    assert style("sample:china", "-o", again, f"--network={network}", "--size=32") == 0
    assert f"{again}: sample:china drawn by {network} in" in capsys.readouterr().out
    assert torch.equal(load_image(again, 32), load_image(out, 32))
    assert style("sample:flower", "-o", again, f"--network={network}", "--size=50") == 0
    assert load_image(again, 64).shape == (1, 3, 33, 50)
    assert style("sample:china", "-o", again, f"--network={network}", "--keep-colors") == 0


def test_the_command_corrects_and_trains_on_a_folder(tmp_path, capsys):
    pictures, out = tmp_path / "pictures", tmp_path / "out.png"
    pictures.mkdir()
    for name in ("a.png", "b.jpg"):
        save_image(pictures / name, torch.rand(1, 3, 20, 28))
    chosen = ["--method=network", f"--training.pictures={pictures}", "--correction=hsc", *TINY]
    assert style("sample:china", "sample:flower", "-o", out, *chosen) == 0
    rows = [json.loads(line) for line in out.with_suffix(".jsonl").read_text().splitlines()]
    assert rows[-1].keys() >= {"condition", "condition_corrected", "turn"}
    assert "after 2 steps of network + hsc" in capsys.readouterr().out


def test_divergence_leaves_older_files_alone(tmp_path, capsys):
    files = [tmp_path / "out.png", tmp_path / "out.safetensors"]
    for file in files:
        file.write_bytes(b"older")
    chosen = ["--method=network", "--learning-rate=1e30", *TINY]
    assert style("sample:china", "sample:flower", "-o", files[0], *chosen) == 1
    assert "hessreg: step 1: the loss is nan" in capsys.readouterr().err
    assert [file.read_bytes() for file in files] == [b"older"] * 2


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ("sample:china", "styles: name one picture or several, or --network FILE"),
        ("sample:china --network none.safetensors", "no network at none.safetensors"),
        ("sample:china --network bad.safetensors", "bad.safetensors is damaged, or is no network"),
        ("sample:china sample:flower --network bad.safetensors", "leave out sample:flower"),
        ("sample:china sample:flower --method network --training.pictures no", "no image at no"),
        ("sample:china sample:flower --method network --training.pictures .", "no .png"),
        ("sample:china sample:flower --training.crop 8", "crop must be in [16, 1024], got 8"),
        ("sample:china sample:flower --training.batch-size 0", "batch_size must be in [1, 256]"),
        ("sample:china sample:flower --training.width 0", "width must be in [1, 256], got 0"),
        ("sample:china sample:flower --training.num-blocks=-1", "num_blocks must be in [0, 64]"),
        ("sample:china sample:flower --method film", "method: Expected one of"),
        ("sample:china sample:flower --steps 1.5", "steps"),
    ],
)
def test_bad_options_are_refused_in_one_line(capsys, tmp_path, monkeypatch, args, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.safetensors").write_bytes(b"no weights")
    assert style(*args.split(), "-o", "out.png") == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("hessreg: ")
    assert error.count("\n") == 1
    assert [file.name for file in tmp_path.iterdir()] == ["bad.safetensors"]


# The examples

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


@pytest.mark.parametrize("correction", ["none", "hsc"])
def test_the_example_of_three_networks_runs(tmp_path, capsys, correction):
    example, picture = runpy.run_path(str(EXAMPLES / "style_networks.py")), tmp_path / "drawn.png"
    options = ["--size=48", "--crop=16", "--steps=5", "--print-every=2", "--products=2"]
    example["main"]([*options, f"--correction={correction}", "--picture", str(picture)])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["steps", "seconds", "content", "loss", "style", "loss"]
    assert [line.split()[0] for line in lines[1:]] == ["0", "2", "4", "5"]
    assert load_image(picture, 128).shape == (1, 3, 64, 96)


def test_pieces_of_one_photograph_have_the_content_as_the_target():
    example = runpy.run_path(str(EXAMPLES / "style_networks.py"))
    photographs = [torch.zeros(1, 3, 16, 16), torch.ones(1, 3, 16, 16)]
    data = example["triples"](photographs, 16, seed=0)
    for known, first, second in ((0, 0, 1), (1, 1, 1), (0, 1, 0), (1, 0, 0)):
        content, painting, target = next(data)
        assert (content.mean(), painting.mean()) == (first, second)
        assert target is (content if known else None)


def test_the_comparison_of_corrections_runs(capsys, monkeypatch):
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    example = runpy.run_path(str(EXAMPLES / "style_network_training.py"))
    example["main"](["--seconds=0.3", "--seeds=2", "--size=32", "--crop=16"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["seed", "0", "1"]
    assert example["mean_of_last"]([(n, float(n)) for n in range(10)]) == 7.0
