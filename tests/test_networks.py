"""Architectures, their options, the articles' networks and the user's own."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from hessreg import cli
from hessreg.curvature import HessianOperator, norm, third_order_safe
from hessreg.gan import (
    ACTIVATIONS,
    DEFAULTS,
    Dataset,
    Discriminator,
    Generator,
    PlayerConfig,
    TrainConfig,
    train,
)
from hessreg.gan.building import build_trainer
from hessreg.gan.networks import initialize, normalize_spectrally
from hessreg.regularizers import HSN1R, StepContext

SHAPES = [(1, 8, 8), (3, 8, 8), (1, 16, 16), (1, 28, 28), (3, 32, 32), (3, 64, 64), (2, 12, 28)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("architecture", ["mlp", "dcgan", "resnet"])
def test_networks_fit_images_of_many_sizes(architecture, shape):
    generator = Generator(architecture, 5, 8, shape=shape)
    discriminator = Discriminator(architecture, 8, shape=shape)
    samples = generator(torch.randn(3, 5))
    assert samples.shape == (3, *shape)
    assert samples.abs().max() <= 1
    assert discriminator(samples).shape == (3,)
    features = discriminator.eval().features(samples)
    torch.testing.assert_close(
        discriminator.layers[-1](features).squeeze(1), discriminator(samples)
    )


@pytest.mark.parametrize("architecture", ["dcgan", "resnet"])
@pytest.mark.parametrize("shape", [(2,), (1, 9, 9), (1, 30, 30), (1, 22, 8)], ids=str)
def test_images_that_do_not_halve_are_refused(architecture, shape):
    for network in (Generator, Discriminator):
        with pytest.raises(ValueError, match=f"{architecture} is for images whose sides halve"):
            network(architecture, shape=shape)


def test_the_residual_networks_do_not_mix_rows():
    shape = (1, 16, 16)
    for network, inputs in (
        (Generator("resnet", 4, 8, shape=shape), torch.randn(3, 4)),
        (Discriminator("resnet", 8, shape=shape), torch.randn(3, *shape)),
    ):
        alone = torch.cat([network(row.unsqueeze(0)) for row in inputs])
        torch.testing.assert_close(network(inputs), alone)


def layers(network):
    kinds = nn.Linear | nn.Conv2d | nn.ConvTranspose2d | nn.BatchNorm1d | nn.BatchNorm2d
    return [
        (type(layer).__name__, tuple(layer.weight.shape))
        for layer in network.modules()
        if isinstance(layer, kinds)
    ]


def test_the_articles_networks_are_as_printed():
    options = {"shape": (1, 28, 28)}
    first = Generator("orthogonal_mlp", 100, **options), Discriminator("orthogonal_mlp", **options)
    assert [shape for _, shape in layers(first[0])] == [
        (128, 100),
        (128, 128),
        (100, 128),
        (784, 100),
    ]
    assert [shape for _, shape in layers(first[1])] == [(128, 784), (128, 128), (1, 128)]
    second = Generator("gaussian_dcgan", 100, **options), Discriminator("gaussian_dcgan", **options)
    assert layers(second[0]) == [
        ("Linear", (12544, 100)),
        ("BatchNorm1d", (12544,)),
        ("ConvTranspose2d", (256, 128, 5, 5)),
        ("BatchNorm2d", (128,)),
        ("ConvTranspose2d", (128, 64, 5, 5)),
        ("BatchNorm2d", (64,)),
        ("ConvTranspose2d", (64, 1, 7, 7)),
    ]
    assert [shape for _, shape in layers(second[1])] == [
        (1024, 784),
        (512, 1024),
        (256, 512),
        (1, 256),
    ]
    for generator, discriminator in (first, second):
        samples = generator(torch.randn(2, 100))
        assert samples.shape == (2, 1, 28, 28)
        assert -1 <= samples.min() < 0 < samples.max() <= 1
        assert discriminator(samples).shape == (2,)


@pytest.mark.parametrize("architecture", ["orthogonal_mlp", "gaussian_dcgan"])
def test_the_articles_networks_are_for_their_images(architecture):
    with pytest.raises(ValueError, match=r"for images \(1, 28, 28\), got samples \(1, 8, 8\)"):
        Generator(architecture)


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="unknown architecture 'cnn'; choose from mlp, dcgan, res"):
        Generator("cnn")
    with pytest.raises(ValueError, match="unknown activation 'x'; choose from silu"):
        Discriminator(activation="x")
    with pytest.raises(ValueError, match="latent must be normal or uniform, got 'x'"):
        Generator(latent="x")
    with pytest.raises(ValueError, match=r"dropout must be in \[0, 1\), got 1"):
        Generator(dropout=1)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation_is_an_option(activation):
    kinds = {type(layer) for layer in Generator(activation=activation).layers}
    assert type(ACTIVATIONS[activation]()) in kinds
    assert TrainConfig(activation=activation).activation == activation


def test_dropout_acts_in_training_only():
    network = Discriminator("dcgan", 16, dropout=0.5)
    network.layers = nn.Sequential(*(x for x in network.layers if "Norm" not in type(x).__name__))
    images = torch.randn(4, 1, 8, 8)
    assert not torch.equal(network(images), network(images))
    network.eval()
    assert torch.equal(network(images), network(images))


def test_uniform_noise_is_between_minus_one_and_one():
    noise = Generator(latent="uniform").draw_latent(2000, torch.Generator().manual_seed(0))
    assert noise.abs().max() <= 1
    assert noise.std() == pytest.approx(3**-0.5, rel=0.02)
    normal = Generator().draw_latent(2000, torch.Generator().manual_seed(0))
    assert normal.std() == pytest.approx(1, rel=0.02)


def test_initialisations_have_their_spread():
    spreads = {"normal": 0.02, "xavier": (2 / (64 + 256)) ** 0.5}
    for name, spread in spreads.items():
        network = Discriminator(width=256)
        initialize(network, name)
        assert network.layers[1].weight.detach().std() == pytest.approx(spread, rel=0.05)
        assert not network.layers[1].bias.any()
    initialize(network, "orthogonal")
    weight = network.layers[1].weight.detach()
    torch.testing.assert_close(weight.T @ weight, torch.eye(64), atol=1e-5, rtol=0)


@pytest.mark.parametrize("architecture", ["mlp", "dcgan", "resnet"])
def test_spectral_norms_are_one(architecture):
    network = Discriminator(architecture, 8)
    normalize_spectrally(network)
    for _ in range(200):
        network(torch.randn(4, 1, 8, 8))
    network.eval()
    checked = 0
    for layer in network.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            spectrum = torch.linalg.matrix_norm(layer.weight.detach().flatten(1), 2)
            assert spectrum == pytest.approx(1, rel=1e-3)
            checked += 1
    assert checked >= 3


def dense_hessian_norm(loss, parameters):
    """|H|_2 by plain double autograd, with its graph."""
    flat = torch.cat(
        [g.flatten() for g in torch.autograd.grad(loss, parameters, create_graph=True)]
    )
    rows = [torch.autograd.grad(each, parameters, create_graph=True) for each in flat]
    matrix = torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])
    return torch.linalg.eigvalsh(matrix).abs().max()


@pytest.mark.parametrize("options", ["spectral_norm", "dropout", "both"])
def test_hessian_norms_are_right_with_spectral_norm_and_dropout(options):
    """Of the very loss of the step: its masks and its vectors of the power iteration."""
    dropout = 0.0 if options == "spectral_norm" else 0.4
    network = Discriminator("mlp", 3, "tanh", (2,), dropout=dropout).double()
    if options != "dropout":
        normalize_spectrally(network)
    parameters = list(network.parameters())
    points = torch.randn(6, 2, dtype=torch.float64)
    with third_order_safe(network):
        loss = F.softplus(-network(points)).mean() + F.softplus(network(points + 1)).mean()
    wanted = dense_hessian_norm(loss, parameters)
    count = sum(p.numel() for p in parameters)
    method = HSN1R(norm="spectral", weight=1.0, num_steps=count)
    context = StepContext(0, network, network, None, loss)
    found = method.loss_terms(context)[1]
    torch.testing.assert_close(found, wanted, rtol=1e-8, atol=0)
    grads = (torch.autograd.grad(each, parameters, retain_graph=True) for each in (found, wanted))
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-9)


def test_spectral_norm_is_trained_and_saved_exactly():
    images = torch.randn(40, 1, 8, 8).tanh()

    def trainer():
        config = replace(
            DEFAULTS["digits"],
            batch_size=8,
            width=8,
            regularizer="hsn1r+r1",
            g=PlayerConfig(dropout=0.1),
            d=PlayerConfig(spectral_norm=True, dropout=0.2),
        )
        return build_trainer(config, Dataset.from_torch(images))

    whole, first = trainer(), trainer()
    for _ in range(20):
        whole.step()
    torch.manual_seed(0)
    first = trainer()
    for _ in range(9):
        first.step()
    state = first.state_dict()
    again = trainer()
    again.load_state_dict(state)
    for _ in range(11):
        again.step()
    for network in ("generator", "discriminator", "ema"):
        ends = [getattr(each, network).state_dict() for each in (whole, again)]
        assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_the_hessian_norm_of_an_operator_is_that_of_the_normalised_network():
    network = Discriminator("mlp", 4, "tanh", (2,)).double()
    normalize_spectrally(network)
    network.eval()
    points = torch.randn(8, 2, dtype=torch.float64)
    parameters = list(network.parameters())
    op = HessianOperator(lambda: F.softplus(network(points)).mean(), parameters)
    wanted = dense_hessian_norm(F.softplus(network(points)).mean(), parameters)
    found = norm(op, ord="spectral").detach()
    torch.testing.assert_close(found, wanted.detach(), rtol=1e-5, atol=0)


FACTORY = """
import torch
from torch import nn
calls = []
def make(latent_dim, shape, num_classes, outputs):
    calls.append((latent_dim, shape, num_classes, outputs))
    size = shape[0] * shape[1] * shape[2]
    return (nn.Sequential(nn.Linear(latent_dim, size), nn.Unflatten(1, shape)),
            nn.Sequential(nn.Flatten(), nn.Linear(size, outputs)))
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    import sys

    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)

    def write(text):
        name = f"own_{len(list(tmp_path.glob('own_*.py')))}_{tmp_path.name[-8:]}".replace("-", "_")
        (tmp_path / f"{name}.py").write_text(text)
        sys.modules.pop(name, None)
        return name

    return write


SHORT = ["--steps", "3", "--tensorboard", "false", "--plain", "--batch_size", "8"]


def test_networks_of_the_users_own(module, tmp_path, capsys):
    name = module(FACTORY)
    command = ["train", "digits", "--architecture", f"{name}:make", "--loss", "mmd", *SHORT]
    assert cli.main([*command, "--out", "run"]) == 0, capsys.readouterr().err
    import importlib

    assert importlib.import_module(name).calls == [(32, (1, 8, 8), 0, 16)]
    assert cli.main(["resume", "run", "--steps", "5", "--plain"]) == 0


BAD_FACTORIES = {
    "generator, got": "def make(**options): return 3",
    "got a tuple of 1": "def make(**options): return (3,)",
    "TypeError": "def make(): pass",
    "RuntimeError: no way": "def make(**options): raise RuntimeError('no\\nway')",
    "has no make": "x = 3",
    "must be callable, got int": "make = 3",
    "cannot import": "import nothing_like_this",
    "generator must return a tensor of shape (2, 1, 8, 8), got (2, 9)": (
        "from torch import nn\n"
        "def make(latent_dim, **options): return nn.Linear(latent_dim, 9), nn.Linear(9, 1)"
    ),
    "discriminator must return a tensor of shape (2,), got (2, 1, 8, 3)": (
        "from torch import nn\n"
        "def make(latent_dim, **options):\n"
        "    g = nn.Sequential(nn.Linear(latent_dim, 64), nn.Unflatten(1, (1, 8, 8)))\n"
        "    return g, nn.Linear(8, 3)"
    ),
    "generator must have a parameter that requires a gradient, got none": (
        "from torch import nn\n"
        "def make(latent_dim, **options):\n"
        "    layers = nn.Sequential(nn.Linear(latent_dim, 64), nn.Unflatten(1, (1, 8, 8)))\n"
        "    return layers.requires_grad_(False), nn.Sequential(nn.Flatten(), nn.Linear(64, 1))"
    ),
    "discriminator must have a parameter that requires a gradient, got none": (
        "from torch import nn\n"
        "def make(latent_dim, **options):\n"
        "    g = nn.Sequential(nn.Linear(latent_dim, 64), nn.Unflatten(1, (1, 8, 8)))\n"
        "    return g, nn.Sequential(nn.Flatten(), nn.AdaptiveAvgPool1d(1))"
    ),
    "generator: RuntimeError": (
        "from torch import nn\ndef make(**options): return nn.Linear(3, 9), nn.Linear(9, 1)"
    ),
}


@pytest.mark.parametrize("message", BAD_FACTORIES)
def test_what_are_no_networks_is_one_line(module, message, capsys):
    name = module(BAD_FACTORIES[message])
    assert cli.main(["train", "digits", "--architecture", f"{name}:make", *SHORT]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    message = message.replace("generator, got", "must return (generator, discriminator) modules")
    assert message in line


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--architecture", "cnn"],
            "one of mlp, dcgan, resnet, orthogonal_mlp, gaussian",
        ),
        (["--architecture", "orthogonal_mlp"], "is for images (1, 28, 28)"),
        (["--architecture", "a:b", "--g.dropout", "0.1"], "g.dropout must be 0 with networks from"),
        (["--architecture", "a:b", "--infogan.codes", "4"], "infogan.codes must be 0"),
        (
            ["--architecture=a:b", "--regularizer=gaussian", "--gaussian.space=features"],
            "gaussian.space must be samples with networks from a:b",
        ),
        (["--g.dropout", "1"], "dropout must be in [0, 1)"),
        (["--infogan.codes", "1"], "codes must be 0 or in [2, 1000]"),
        (["--latent", "cauchy"], "latent"),
        (["--initialization", "zero"], "initialization"),
    ],
)
def test_options_that_do_not_fit_are_one_line(options, message, capsys):
    assert cli.main(["train", "digits", *options, *SHORT]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


@pytest.mark.parametrize("flat", [True, False])
def test_the_articles_function_trains_any_modules(flat):
    generator = nn.Sequential(nn.Linear(5, 16), nn.Tanh(), nn.Linear(16, 2))
    discriminator = nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, 1))
    if not flat:
        generator = nn.Sequential(
            nn.ConvTranspose2d(5, 4, 2), nn.Tanh(), nn.Flatten(), nn.Linear(16, 2)
        )
    before = [p.clone() for p in generator.parameters()]
    points = torch.utils.data.TensorDataset(torch.randn(70, 2), torch.zeros(70))
    batches = torch.utils.data.DataLoader(points, batch_size=16)
    history = train(generator, discriminator, batches, 1e-3, epochs=2, norm="fro")
    assert len(history) == 2
    assert history[0]["hessian_norm_g"] > 0
    # Eight steps of Adam at 2e-4 or somewhat more
    pairs = zip(before, generator.parameters(), strict=True)
    moved = max(float((a - b).detach().abs().max()) for a, b in pairs)
    assert 2e-4 < moved < 8 * 3e-4


def test_the_articles_function_needs_batches():
    with pytest.raises(ValueError, match="at least one batch, got none"):
        train(Generator(), Discriminator(), [], 0.1)
