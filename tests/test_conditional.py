"""Networks that are told classes, and codes that samples give away."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from hessreg import cli
from hessreg.gan import (
    DEFAULTS,
    Conditioned,
    Discriminator,
    Generator,
    ImageJudge,
    InfoGAN,
    Procedure,
    Trainer,
    load_dataset,
)
from hessreg.gan.building import build_trainer
from hessreg.gan.options import HSCConfig, HSN1RConfig, InfoGANConfig, IterativeConfig, PlayerConfig
from hessreg.regularizers import R1, StepContext

SHAPES = {"mlp": (2,), "dcgan": (1, 8, 8), "resnet": (3, 16, 16)}


@pytest.fixture(scope="module")
def digits():
    return load_dataset("digits")


@pytest.mark.parametrize("conditional", ["concat", "projection"])
@pytest.mark.parametrize("architecture", SHAPES)
@pytest.mark.parametrize("outputs", [1, 4])
def test_outputs_depend_on_the_class(architecture, conditional, outputs):
    shape = SHAPES[architecture]
    options = {"shape": shape, "conditional": conditional, "num_classes": 3}
    network = Discriminator(architecture, 8, outputs=outputs, **options).eval()
    samples = torch.randn(1, *shape).expand(3, *shape)
    found = network(samples, torch.arange(3))
    assert found.shape == ((3,) if outputs == 1 else (3, outputs))
    assert len(found.view(3, -1)[:, 0].unique()) == 3
    one = Conditioned(network, torch.tensor([1, 2, 0]))(samples[:2])
    torch.testing.assert_close(one, found[[1, 2]])


def test_a_projection_is_linear_in_the_vector_of_the_class():
    network = Discriminator(width=8, conditional="projection", num_classes=3)
    images, labels = torch.randn(5, 1, 8, 8), torch.tensor([0, 2, 1, 1, 0])
    features = network.features(images)
    wanted = network.layers[-1](features).squeeze(1)
    wanted = wanted + torch.einsum("nf,nf->n", network.embedding.weight[labels], features)
    torch.testing.assert_close(network(images, labels), wanted)


def test_classes_are_part_of_the_noise():
    generator = Generator(latent_dim=3, num_classes=4, num_codes=2)
    random = torch.Generator().manual_seed(0)
    noise = generator.draw_latent(6, random, torch.tensor([3, 0, 0, 1, 2, 3]))
    assert noise.shape == (6, 9)
    assert noise[:, 3:7].argmax(1).tolist() == [3, 0, 0, 1, 2, 3]
    assert noise[:, 7:].sum(1).tolist() == [1] * 6
    plain = Generator(latent_dim=3).draw_latent(6, random.manual_seed(0))
    torch.testing.assert_close(noise[:, :3], plain, rtol=0, atol=0)
    turns = generator.draw_latent(6, random)[:, 3:7].argmax(1)
    assert turns.tolist() == [0, 1, 2, 3, 0, 1]


def test_unconditional_networks_and_noise_have_nothing_more():
    assert [name for name, _ in Discriminator().named_children()] == ["layers"]
    trainer = Trainer(Generator(), Discriminator(), torch.randn(70, 1, 8, 8))
    trainer.step()
    assert trainer.judging(torch.zeros(70)) is trainer.discriminator


class Recorded(R1):
    """Keeps what the trainer hands it."""

    def __init__(self):
        super().__init__()
        self.contexts: list[StepContext] = []

    def loss_terms(self, ctx):
        self.contexts.append(ctx)
        return super().loss_terms(ctx)


@pytest.mark.parametrize("parts", [1, 2])
def test_generated_samples_have_the_classes_of_the_real_batch(parts):
    labels = torch.arange(40) % 5
    data = labels.view(-1, 1).float().expand(-1, 2).contiguous()
    recorded = Recorded()
    trainer = Trainer(
        Generator(latent_dim=4, shape=(2,), num_classes=5),
        Discriminator(shape=(2,), conditional="projection", num_classes=5),
        data,
        [recorded],
        batch_size=10,
        labels=labels,
        procedure=Procedure(accumulate=parts),
    )
    for _ in range(3):
        trainer.step()
    assert len(recorded.contexts) == 6 * parts
    for context in recorded.contexts:
        wanted = context.real[:, 0].long()
        assert context.noise[:, 4:].argmax(1).tolist() == wanted.tolist()
        assert context.discriminator.labels.tolist() == wanted.tolist()


METHODS = [
    *("none", "r1", "r2", "wgan_gp", "iterative", "dragan", "hsn1r", "gaussian", "hessian_penalty"),
]


@pytest.mark.parametrize("conditional", ["concat", "projection"])
@pytest.mark.parametrize("method", METHODS)
def test_every_regulariser_works_with_classes(digits, method, conditional):
    config = replace(
        DEFAULTS["digits"],
        regularizer=method,
        conditional=conditional,
        batch_size=6,
        width=8,
        hsn1r=HSN1RConfig(every=1),
        iterative=IterativeConfig(num_points=2),
        correction="hsc",
        hsc=HSCConfig(network="both", every=1, rows=3, num_steps=2),
    )
    trainer = build_trainer(config, digits)
    trainer.step(done=0.5)
    assert all(torch.isfinite(torch.tensor(list(trainer.metrics().values()))))


@pytest.mark.parametrize("loss", ["relativistic", "mmd", "wasserstein"])
@pytest.mark.parametrize("orthogonal", ["none", "previous", "terms"])
def test_every_loss_works_with_classes(digits, loss, orthogonal):
    config = replace(
        DEFAULTS["digits"],
        loss=loss,
        orthogonal=orthogonal,
        regularizer="r1",
        conditional="projection",
        batch_size=6,
        width=8,
    )
    trainer = build_trainer(config, digits)
    before = [p.clone() for p in trainer.discriminator.embedding.parameters()]
    trainer.step(done=0.5)
    trainer.step(done=0.5)
    assert not torch.equal(before[0], trainer.discriminator.embedding.weight)


def test_data_without_classes_have_none_to_tell(capsys, tmp_path):
    import numpy as np

    np.save(tmp_path / "x.npy", np.random.default_rng(0).normal(size=(90, 2)))
    command = ["train", "arrays", "--data", str(tmp_path / "x.npy"), "--conditional", "concat"]
    assert cli.main([*command, "--out", str(tmp_path / "run")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "conditional must be none for data without classes" in line


@pytest.mark.parametrize("conditional", ["concat", "projection"])
@pytest.mark.slow
def test_generated_classes_are_recognised(digits, conditional):
    config = replace(DEFAULTS["digits"], conditional=conditional, regularizer="r1", steps=1500)
    trainer = build_trainer(config, digits)
    for _ in range(config.steps):
        trainer.step(done=0.5)
    labels = torch.arange(500) % 10
    images = trainer.ema.sample(500, torch.Generator().manual_seed(0), labels)
    accuracy = (ImageJudge(digits).classify(images) == labels).double().mean()
    print(f"{conditional}: {accuracy}")
    assert accuracy > 0.8  # by chance 0.1


def test_infogan_adds_the_cross_entropy_to_both_losses():
    generator = Generator(latent_dim=3, width=8, num_codes=4)
    discriminator = Discriminator(width=8, num_codes=4)
    noise = generator.draw_latent(6, torch.Generator().manual_seed(0))
    codes = noise[:, -4:].argmax(1)
    fake = generator(noise)
    logits = discriminator.code_head(discriminator.features(fake))
    wanted = 0.7 * nn.CrossEntropyLoss()(logits, codes)
    method = InfoGAN(4, weight=0.7)
    loss = torch.zeros(())
    for phase, losses in enumerate([(loss, None), (None, loss)]):
        context = StepContext(0, generator, discriminator, *losses, fake, fake, noise)
        terms = method.loss_terms(context)
        torch.testing.assert_close(terms[phase], wanted)
        assert terms[1 - phase] is None
    right = (logits.argmax(1) == codes).double().mean()
    assert method.metrics() == {"code_accuracy": pytest.approx(float(right))}


def test_codes_are_learned():
    """Four Gaussians: a code for each."""
    centres = 2 * torch.tensor([[1.0, 1], [1, -1], [-1, 1], [-1, -1]])
    data = centres.repeat(100, 1) + 0.1 * torch.randn(400, 2)
    networks = (
        Generator(latent_dim=2, width=32, shape=(2,), num_codes=4),
        Discriminator(width=32, shape=(2,), num_codes=4),
    )
    rates = {"g": PlayerConfig(lr=2e-3), "d": PlayerConfig(lr=2e-3)}
    trainer = Trainer(*networks, data, [R1(0.1), InfoGAN(4)], batch_size=64, **rates)
    for _ in range(500):
        trainer.step()
    assert trainer.metrics()["code_accuracy"] > 0.9
    samples = trainer.ema.sample(200, torch.Generator().manual_seed(0)).view(50, 4, 2)
    means = samples.mean(0)
    assert torch.pdist(means).min() > 1


def test_infogan_needs_codes():
    with pytest.raises(ValueError, match="num_codes must be at least 2, got 1"):
        InfoGAN(1)
    context = StepContext(0, Generator(), Discriminator(), torch.zeros(()), None)
    with pytest.raises(ValueError, match=r"InfoGAN needs ctx\.noise"):
        InfoGAN(2).loss_terms(context)


@pytest.mark.parametrize(
    "options",
    [
        [
            "--conditional",
            "projection",
            "--regularizer",
            "gaussian",
            "--gaussian.space",
            "features",
        ],
        ["--conditional", "concat", "--infogan.codes", "3", "--correction", "hsc"],
        ["--infogan.codes", "5", "--infogan.weight", "0.5", "--regularizer", "hsn1r"],
    ],
    ids=["projection", "both", "infogan"],
)
def test_a_conditional_run_goes_on_bit_for_bit(tmp_path, options, capsys):
    from hessreg.gan import Run

    common = ["--tensorboard=false", "--batch_size=8", "--width=8", "--schedule_steps=6", "--plain"]
    command = ["train", "digits", *options, *common]
    assert cli.main([*command, "--steps", "6", "--out", str(tmp_path / "whole")]) == 0
    assert cli.main([*command, "--steps", "3", "--out", str(tmp_path / "parts")]) == 0
    assert cli.main(["resume", str(tmp_path / "parts"), "--steps", "6", "--plain"]) == 0
    states = [Run.resume(tmp_path / name).trainer.state_dict() for name in ("whole", "parts")]
    for network in ("generator", "discriminator", "ema"):
        whole, parts = (state[network] for state in states)
        assert all(torch.equal(whole[name], parts[name]) for name in whole)


@pytest.mark.parametrize(("options", "columns"), [(["--conditional", "concat"], 10), ([], 8)])
def test_a_picture_has_a_column_for_each_class(tmp_path, options, columns, capsys):
    from PIL import Image

    out = str(tmp_path / "run")
    short = ["--steps", "1", "--tensorboard", "false", "--plain", "--out", out]
    assert cli.main(["train", "digits", *options, *short]) == 0
    with Image.open(tmp_path / "run" / "samples.png") as image:
        assert image.width == columns * (6 * 8 + 4)


def test_metrics_draw_classes_in_their_shares_and_pictures_each_in_turn(tmp_path, monkeypatch):
    from hessreg.gan.evaluation import TrainedGenerator

    labels = torch.arange(500).div(400, rounding_mode="floor")  # 80 and 20 %
    points = torch.randn(500, 2, generator=torch.Generator().manual_seed(0))
    np.savez(tmp_path / "data.npz", x=points.numpy(), y=labels.numpy())
    asked = []
    sample = Generator.sample

    def recorded(self, count, generator, labels=None, codes=None):
        asked.append(labels)
        return sample(self, count, generator, labels, codes)

    monkeypatch.setattr(Generator, "sample", recorded)
    out = str(tmp_path / "run")
    options = ["--conditional", "concat", "--steps", "1", "--tensorboard", "false", "--out", out]
    data = str(tmp_path / "data.npz")
    assert (
        cli.main(
            ["train", "arrays", "--data", data, "--arrays.key=x", "--arrays.labels_key=y", *options]
        )
        == 0
    )
    TrainedGenerator.load(tmp_path / "run").evaluate(seed=3, permutations=0, features="")
    *of_run, of_eval = asked
    assert all(labels is None for labels in of_run[::2])  # pictures
    for drawn in [*of_run[1::2], of_eval]:
        assert abs(float((drawn == 1).double().mean()) - 0.2) < 0.08


@pytest.mark.parametrize("options", [["--conditional=concat"], ["--infogan.codes=10"]])
def test_classes_and_codes_are_in_turn_over_all_batches(tmp_path, monkeypatch, options):
    from hessreg.gan.evaluation import TrainedGenerator

    out = tmp_path / "run"
    short = ["--steps=1", "--tensorboard=false", "--width=4", f"--out={out}"]
    assert cli.main(["train", "digits", "--regularizer=none", *options, *short]) == 0
    drawn = []
    draw = Generator.draw_latent

    def recorded(self, *args):
        drawn.append(draw(self, *args))
        return drawn[-1]

    trained = TrainedGenerator.load(out)
    monkeypatch.setattr(Generator, "draw_latent", recorded)
    trained.sample(600, seed=1)
    assert torch.equal(torch.cat(drawn)[:, -10:].argmax(1), torch.arange(600) % 10)


def test_the_spectrum_of_a_conditional_run(tmp_path, capsys):
    out = str(tmp_path / "run")
    short = ["--steps", "1", "--tensorboard", "false", "--plain", "--width", "4", "--out", out]
    assert cli.main(["train", "digits", "--conditional", "projection", *short]) == 0
    few = ["-k", "1", "--steps", "5", "--probes", "1", "--rows", "16", "--tol", "0.1"]
    assert cli.main(["spectrum", out, *few, "--out", str(tmp_path / "s")]) == 0


def test_infogan_with_its_config_is_saved():
    config = replace(DEFAULTS["ring"], infogan=InfoGANConfig(codes=8))
    assert type(config).from_dict(config.to_dict()) == config
