"""Style transfer: any image file, losses against numpy, curvature, every optimiser, bad input."""

from __future__ import annotations

import json
import os
import pickle
import runpy
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

for package in ("jsonargparse", "matplotlib", "PIL", "rich", "safetensors", "sklearn"):
    pytest.importorskip(package)

from PIL import Image  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

from hessreg.cli import main  # noqa: E402
from hessreg.curvature import HessianOperator  # noqa: E402
from hessreg.gan.progress import PlainProgress  # noqa: E402
from hessreg.gan.trainer import NonFiniteError  # noqa: E402
from hessreg.style import (  # noqa: E402
    Features,
    ImageError,
    RandomFeatures,
    StyleObjective,
    VGG19Features,
    WeightsError,
    content_loss,
    feature_gram,
    keep_colors,
    load_image,
    save_image,
    style_loss,
    total_variation,
)
from hessreg.style.config import StyleConfig, parse_blend  # noqa: E402
from hessreg.style.features import _convolutions  # noqa: E402
from hessreg.style.images import MAX_PIXELS  # noqa: E402
from hessreg.style.transfer import PictureOptimizer, start_picture  # noqa: E402
from tests.test_cli import refused  # noqa: E402

EXAMPLE = Path(__file__).parents[1] / "examples" / "style_optimizers.py"
SAMPLES = ("sample:china", "sample:flower")
TINY = ("--size=32", "--steps=3", "--threads=1", "--plain")


def noise(*shape, seed=0, dtype=torch.float32):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def pixels(height=24, width=40, channels=3, seed=0):
    drawn = np.random.default_rng(seed).integers(0, 256, (height, width, channels), np.uint8)
    return drawn[..., 0] if channels == 1 else drawn


def tiny_objective(dtype=torch.float32, **weights):
    """Of pictures with 16 x 20 pixels."""
    features = RandomFeatures(channels=4, levels=3, kernel_size=3, content_levels=(0, 2)).to(dtype)
    styles = [noise(1, 3, 20, 16, seed=1, dtype=dtype)]
    content = noise(1, 3, 16, 20, dtype=dtype)
    return StyleObjective(features, content, styles, **{"tv_weight": 0.5, **weights})


# Images


def test_the_sample_photographs_are_scaled_to_the_longer_side():
    image = load_image("sample:china", 64)
    assert image.shape == (1, 3, 43, 64)
    assert image.dtype == torch.float32
    assert 0 <= image.min() < image.max() <= 1
    with pytest.raises(ImageError, match="no photograph sample:moon: there are sample:china"):
        load_image("sample:moon")


def test_what_is_saved_is_read_again(tmp_path):
    image = torch.from_numpy(pixels()).permute(2, 0, 1)[None] / 255
    save_image(tmp_path / "a.png", image)
    assert torch.equal(load_image(tmp_path / "a.png", 64), image)  # smaller than 64: not enlarged
    save_image(tmp_path / "a.png", 3 * image - 1)
    assert torch.allclose(load_image(tmp_path / "a.png"), (3 * image - 1).clamp(0, 1), atol=2e-3)
    assert [file.name for file in tmp_path.iterdir()] == ["a.png"]


@pytest.mark.parametrize("ending", ["jpg", "webp", "JPEG"])
def test_other_formats_are_written_by_their_ending(tmp_path, ending):
    smooth = torch.linspace(0, 1, 40).expand(1, 3, 24, 40)
    save_image(tmp_path / f"a.{ending}", smooth)
    assert (load_image(tmp_path / f"a.{ending}") - smooth).abs().max() < 0.03


def test_grey_palette_and_sixteen_bit_files_are_read(tmp_path):
    grey = pixels(channels=1)
    expected = torch.from_numpy(grey).float().expand(1, 3, -1, -1) / 255
    shown = Image.fromarray(grey)
    files = {
        "L": shown,
        "P": shown.convert("P"),
        "I;16": Image.fromarray(grey.astype(np.uint16) * 257),
        "LA": shown.convert("LA"),
    }
    for name, image in files.items():
        image.save(tmp_path / "grey.png")
        with Image.open(tmp_path / "grey.png") as stored:
            assert stored.mode == name
        assert torch.allclose(load_image(tmp_path / "grey.png"), expected, atol=1e-6), name
    Image.fromarray(grey > 127).save(tmp_path / "bits.png")
    assert torch.equal(load_image(tmp_path / "bits.png"), (expected > 0.5).float())
    Image.fromarray(pixels()).convert("CMYK").save(tmp_path / "cmyk.jpg")
    assert load_image(tmp_path / "cmyk.jpg").shape == (1, 3, 24, 40)


def test_transparent_pixels_are_laid_on_white(tmp_path):
    array = np.zeros((20, 20, 4), np.uint8)
    array[:10, :, 3], array[10:, :, 3] = 255, 51
    Image.fromarray(array).save(tmp_path / "a.png")
    image = load_image(tmp_path / "a.png")
    assert (image[:, :, :10] == 0).all()
    assert torch.allclose(image[:, :, 10:], torch.tensor(0.8), atol=3e-3)
    palette = Image.fromarray(array[..., 3]).convert("P")
    palette.save(tmp_path / "p.png", transparency=palette.getpixel((0, 0)))
    assert (load_image(tmp_path / "p.png")[:, :, :10] == 1).all()


def test_the_orientation_of_the_camera_is_followed(tmp_path):
    array = np.zeros((20, 40, 3), np.uint8)
    array[:, 20:] = 255
    image = Image.fromarray(array)
    exif = image.getexif()
    exif[0x0112] = 6  # turned by a quarter: what is stored left is shown on top
    image.save(tmp_path / "a.png", exif=exif)
    upright = load_image(tmp_path / "a.png")
    assert upright.shape == (1, 3, 40, 20)
    assert (upright[:, :, :20] == 0).all()
    assert (upright[:, :, 20:] == 1).all()


@pytest.mark.parametrize("ending", ["jpg", "png"])
def test_twenty_megapixels_are_no_obstacle(tmp_path, ending):
    gradient = Image.fromarray(np.arange(256, dtype=np.uint8)[None].repeat(2, 0))
    gradient.resize((5472, 3648)).convert("RGB").save(tmp_path / f"big.{ending}")
    image = load_image(tmp_path / f"big.{ending}", 48)
    assert image.shape == (1, 3, 32, 48)
    expected = (torch.arange(48) + 0.5) / 48
    assert (image - expected).abs().max() < 0.03


def broken_files(folder):
    """Files that cannot be used, with what must be said about them."""
    (folder / "folder").mkdir()
    (folder / "text.png").write_text("no image")
    (folder / "empty.png").touch()
    Image.fromarray(pixels(1, 1)).save(folder / "one.png")
    Image.fromarray(pixels(40, 2000)).save(folder / "wide.png")
    Image.new("1", (10_000, MAX_PIXELS // 10_000 + 1)).save(folder / "bomb.png")
    Image.new("1", (20_000, 10_000)).save(folder / "bomb2.png")
    Image.fromarray(noise(20, 20).numpy()).save(folder / "float.tiff")
    for kind in ("png", "jpg"):
        Image.fromarray(pixels(100, 100)).save(folder / f"cut.{kind}")
        content = (folder / f"cut.{kind}").read_bytes()
        (folder / f"cut.{kind}").write_bytes(content[: len(content) // 2])
    content = (folder / "wide.png").read_bytes()
    (folder / "torn.png").write_bytes(content[:2000] + bytes(2000) + content[4000:])
    return {
        "missing.png": "no image at",
        "folder": "is a folder, not an image",
        "text.png": "is not an image of a format that Pillow knows",
        "empty.png": "is not an image of a format that Pillow knows",
        "one.png": "is 1 x 1 pixels, 1 x 1 at size 64; each side must have at least 16",
        "wide.png": "is 2000 x 40 pixels, 64 x 1 at size 64; each side must have at least 16",
        "bomb.png": f"has 10000 x 8001 = 80,010,000 pixels; the limit is {MAX_PIXELS:,}",
        "bomb2.png": f"more than {MAX_PIXELS:,} pixels",
        "float.tiff": "cannot be read: floating-point pixels have no known range",
        "cut.png": "cannot be read",
        "cut.jpg": "cannot be read",
        "torn.png": "each side",  # refused before it is decoded
    }


def test_files_that_are_no_images_are_refused_in_one_line(tmp_path, capsys):
    for name, message in broken_files(tmp_path).items():
        with pytest.raises(ImageError, match=name):
            load_image(tmp_path / name, 64)
        out = ("-o", tmp_path / "out.png", "--size=64")
        assert message in refused(capsys, "style", tmp_path / name, "sample:china", *out)
        assert message in refused(capsys, "style", "sample:china", tmp_path / name, *out)
    assert not (tmp_path / "out.png").exists()


def test_sizes_out_of_range_are_refused():
    for size in (0, 31, 1025, 10**9):
        with pytest.raises(ValueError, match=r"size must be in \[32, 1024\], got"):
            load_image("sample:china", size)


def test_kept_colours_are_those_of_the_content():
    content, result = noise(1, 3, 8, 8) / 2 + 0.25, noise(1, 3, 8, 8, seed=1) / 5 + 0.4
    kept = keep_colors(result, content)
    weights = np.array([0.299, 0.587, 0.114])
    inside = ((kept > 0) & (kept < 1)).all(1)[0].numpy()
    assert inside.mean() > 0.5

    def luminance_and_chrominance(image):
        red, _, blue = channels = image[0].numpy().astype(np.float64)
        y = np.tensordot(weights, channels, 1)
        return y[inside], np.stack([red - y, blue - y])[:, inside]

    y, chrominance = luminance_and_chrominance(kept)
    assert np.allclose(y, luminance_and_chrominance(result)[0], atol=1e-6)
    assert np.allclose(chrominance, luminance_and_chrominance(content)[1], atol=1e-6)


# Features


def test_random_features_are_the_same_on_every_platform():
    features = RandomFeatures(seed=3, channels=2, levels=2, kernel_size=3, content_levels=(0,))
    drawn = torch.randint(-(2**16), 2**16, (2, 3, 1, 1), generator=torch.Generator().manual_seed(3))
    colors = (drawn.double() + 0.5) / 2**16
    colors = colors / colors.square().sum((1, 2, 3), keepdim=True).sqrt()
    assert torch.allclose(features.colors, colors.float(), atol=1e-7)
    assert features.filters.sum((2, 3, 4)).abs().max() < 1e-6
    assert torch.allclose(features.filters.square().sum((2, 3, 4)), torch.ones(2, 2))


def test_random_features_depend_on_the_seed_and_not_on_the_random_state():
    image = noise(1, 3, 32, 32)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = RandomFeatures(seed=0)(image)
    assert torch.equal(state, torch.get_rng_state())
    torch.manual_seed(2)
    for a, b, c in zip(
        first.style,
        RandomFeatures(seed=0)(image).style,
        RandomFeatures(1)(image).style,
        strict=True,
    ):
        assert torch.equal(a, b)
        assert not torch.allclose(a, c, atol=1e-2)


def test_random_filters_do_not_see_brightness_and_the_pyramid_halves():
    features = RandomFeatures(channels=5)
    dark, bright = (features(torch.full((1, 3, 33, 48), value)) for value in (0.1, 0.9))
    assert not torch.allclose(dark.style[0], bright.style[0], atol=0.1)
    grey = torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1).expand(1, 3, 33, 48)
    for level, found in enumerate(features(grey).style[1:]):
        assert found.shape[2:] == (-(-33 // 2**level) if level < 1 else 33 // 2**level, 48 >> level)
        assert (found - found[..., :1, :1]).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"channels": 0}, "channels must be at least 1, got 0"),
        ({"levels": 9}, r"levels must be in \[1, 8\], got 9"),
        ({"kernel_size": 4}, "kernel_size must be odd, got 4"),
        ({"content_levels": (4,)}, "content_levels must be levels, got"),
        ({"content_levels": ()}, "content_levels must be levels, got"),
    ],
)
def test_options_of_random_features_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        RandomFeatures(**options)


@pytest.fixture(scope="module")
def vgg_state():
    """Small random weights with the names and shapes of torchvision's."""
    generator = torch.Generator().manual_seed(0)
    state = {}
    for convolution in (each for block in _convolutions() for each in block):
        out, before = convolution.shape[:2]
        drawn = torch.randn(convolution.shape, generator=generator)
        state[f"{convolution.key}.weight"] = drawn * (2 / 9 / before) ** 0.5
        state[f"{convolution.key}.bias"] = 0.1 * torch.ones(out)
    return state


@pytest.fixture(scope="module")
def vgg_file(vgg_state, tmp_path_factory):
    path = tmp_path_factory.mktemp("vgg") / "vgg19.pth"
    torch.save({**vgg_state, "classifier.0.bias": torch.zeros(3)}, path)
    return path


def test_names_and_shapes_are_those_of_torchvision(vgg_state):
    weights = [key for key in vgg_state if key.endswith("weight")]
    numbers = [0, 2, 5, 7, 10, 12, 14, 16, 19, 21, 23, 25, 28]
    assert weights == [f"features.{i}.weight" for i in numbers]
    channels = [tuple(vgg_state[key].shape) for key in weights]
    assert channels[0] == (64, 3, 3, 3)
    assert channels[4] == (256, 128, 3, 3)
    assert channels[-1] == (512, 512, 3, 3)


@pytest.mark.parametrize("pooling", ["average", "max"])
def test_vgg_is_the_sequence_of_its_layers(vgg_state, vgg_file, pooling):
    image = noise(1, 3, 16, 24)
    found = VGG19Features(vgg_file, pooling)(image)
    hidden = (image - torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1)) / torch.tensor(
        [0.229, 0.224, 0.225]
    ).view(1, 3, 1, 1)
    kinds = {"average": torch.nn.AvgPool2d(2), "max": torch.nn.MaxPool2d(2)}
    outputs = {}
    for index in range(30):  # as torchvision numbers them
        if f"features.{index}.weight" in vgg_state:
            weight, bias = (vgg_state[f"features.{index}.{part}"] for part in ("weight", "bias"))
            hidden = torch.nn.functional.conv2d(hidden, weight, bias, padding=1)
        elif index in (4, 9, 18, 27):
            hidden = kinds[pooling](hidden)
        else:
            hidden = outputs[index] = hidden.relu()
    assert [f.shape[1] for f in found.style] == [64, 128, 256, 512, 512]
    for a, index in zip(found.style, (1, 6, 11, 20, 29), strict=True):
        assert torch.allclose(a, outputs[index], rtol=1e-4, atol=1e-5)
    assert len(found.content) == 1
    assert torch.allclose(found.content[0], outputs[22], rtol=1e-4, atol=1e-5)


def test_vgg_is_read_from_safetensors_and_from_the_features_alone(vgg_state, vgg_file, tmp_path):
    image = noise(1, 3, 16, 16)
    expected = VGG19Features(vgg_file)(image).style[-1]
    save_file(vgg_state, tmp_path / "a.safetensors")
    assert torch.equal(VGG19Features(tmp_path / "a.safetensors")(image).style[-1], expected)
    alone = {key.removeprefix("features."): value for key, value in vgg_state.items()}
    torch.save(alone, tmp_path / "b.pth")
    assert torch.equal(VGG19Features(tmp_path / "b.pth")(image).style[-1], expected)


class Malicious:
    """Unpickling would run code."""

    def __reduce__(self):
        return os.mkdir, ("malicious",)


def broken_weights(state, folder):
    """Files that are not weights of VGG-19, with what must be said about them."""
    (folder / "text.pth").write_text("no weights")
    (folder / "text.safetensors").write_text("no weights")
    torch.save([1, 2], folder / "list.pth")
    torch.save(Malicious(), folder / "code.pth")
    torch.save({"fc.weight": torch.ones(3)}, folder / "other.pth")
    first = "features.0.weight"
    small = {first: state[first]}
    torch.save({first: torch.ones(32, 3, 3, 3)}, folder / "shape.pth")
    torch.save({first: state[first] * float("nan")}, folder / "nan.pth")
    torch.save({first: "text"}, folder / "kind.pth")
    (folder / "empty.pth").touch()
    (folder / "plain.pth").write_bytes(pickle.dumps({first: os.mkdir}))
    save_file(small, folder / "half.safetensors")
    content = (folder / "half.safetensors").read_bytes()
    (folder / "cut.safetensors").write_bytes(content[:-100])
    torch.save(small, folder / "cut.pth")
    (folder / "cut.pth").write_bytes((folder / "cut.pth").read_bytes()[:-3000])
    return {
        "missing.pth": "no file of weights at",
        "text.pth": "is not a readable file of weights",
        "text.safetensors": "is not a readable file of weights",
        "empty.pth": "empty.pth is not a readable file of weights\n",
        "plain.pth": "plain.pth is not a readable file of weights\n",  # and no advice to run it
        "cut.pth": "is not a readable file of weights",
        "cut.safetensors": "is not a readable file of weights",
        "list.pth": "must hold a state dict, found list",
        "code.pth": "is not a readable file of weights",
        "other.pth": "has no features.0.weight: not the weights of VGG-19",
        "kind.pth": "has no features.0.weight: not the weights of VGG-19",
        "half.safetensors": "has no features.0.bias: not the weights of VGG-19",
        "shape.pth": "features.0.weight must have shape [64, 3, 3, 3], found [32, 3, 3, 3]",
        "nan.pth": "features.0.weight is not finite",
    }


def test_files_that_are_no_weights_are_refused_in_one_line(
    vgg_state, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    for name, message in broken_weights(vgg_state, tmp_path).items():
        with pytest.raises(WeightsError, match=name):
            VGG19Features(tmp_path / name)
        found = refused(capsys, "style", *SAMPLES, "-o", "out.png", f"--features={name}", *TINY)
        assert message in found
        assert name in found
    assert not (tmp_path / "malicious").exists()
    assert not (tmp_path / "out.png").exists()


# Losses


def test_gram_and_losses_agree_with_numpy():
    first, second = (noise(1, 4, 5, 6, seed=s, dtype=torch.float64) for s in (1, 2))
    rows, others = (f.numpy()[0].reshape(4, 30) for f in (first, second))
    gram, other = rows @ rows.T / 30, others @ others.T / 30
    assert np.allclose(feature_gram(first)[0].numpy(), gram, rtol=1e-14)
    apart = ((rows - others) ** 2).sum() / (others**2).sum()
    assert np.isclose(content_loss([first, first], [second, first]).item(), apart / 2, rtol=1e-14)
    grams, targets = [torch.from_numpy(gram)] * 2, [torch.from_numpy(other)] * 2
    apart = ((gram - other) ** 2).sum() / (other**2).sum()
    assert np.isclose(style_loss(grams, targets).item(), apart, rtol=1e-13)
    targets[0] = torch.from_numpy(gram)
    assert np.isclose(style_loss(grams, targets, [1, 3]).item(), 0.75 * apart, rtol=1e-13)
    image = first[:, :3].numpy()
    smooth = (np.diff(image, axis=2) ** 2).mean() + (np.diff(image, axis=3) ** 2).mean()
    assert np.isclose(total_variation(first[:, :3]).item(), smooth, rtol=1e-14)


def test_losses_do_not_depend_on_the_scale_of_the_network():
    first, second = noise(1, 4, 5, 6, seed=1), noise(1, 4, 5, 6, seed=2)
    for scale in (1e-6, 1e6):
        a, b = scale * first, scale * second
        assert torch.isclose(content_loss([a], [b]), content_loss([first], [second]))
        grams = [feature_gram(f) for f in (a, b, first, second)]
        assert torch.isclose(style_loss(grams[:1], grams[1:2]), style_loss(grams[2:3], grams[3:]))
    blank = torch.zeros(1, 4, 5, 6)
    assert content_loss([blank], [blank]) == 0
    assert content_loss([first], [blank]).isfinite()


def test_the_objective_is_the_weighted_sum_and_zero_where_it_should_be():
    features = RandomFeatures(channels=6)
    content, style = noise(1, 3, 32, 40), noise(1, 3, 40, 32, seed=1)
    objective = StyleObjective(
        features, content, [style], content_weight=2, style_weight=3, tv_weight=0.5
    )
    parts = objective.parts(style.mT - 0.3)
    weights = {"content": 2, "style": 3, "tv": 0.5, "range": 10}
    expected = sum(weights[name] * part for name, part in parts.items())
    assert torch.isclose(objective(style.mT - 0.3), expected)
    assert min(part.item() for part in parts.values()) > 0
    assert objective.parts(content)["content"] == 0
    assert objective.parts(style.mT)["range"] == 0
    own = StyleObjective(features, content, [content])
    assert own.parts(content)["style"] < 1e-12


def test_two_styles_blend():
    features, content = RandomFeatures(channels=6), noise(1, 3, 32, 32)
    smooth = noise(1, 3, 4, 4, seed=1).repeat_interleave(8, 2).repeat_interleave(8, 3)
    styles = [noise(1, 3, 32, 48, seed=2), smooth]

    def targets(*chosen, weights=None):
        return StyleObjective(features, content, chosen, style_weights=weights).style_targets

    first, second = targets(styles[0]), targets(styles[1])
    for a, b, c in zip(targets(*styles, weights=[6, 2]), first, second, strict=True):
        assert torch.allclose(a, 0.75 * b + 0.25 * c)
    assert all(map(torch.equal, targets(*styles, weights=[1, 0]), first))
    # Up to a constant it is the weighted mean of the losses.
    both = StyleObjective(features, content, styles)
    a, b = noise(1, 3, 32, 32, seed=3), noise(1, 3, 32, 32, seed=4)

    def squares(image, targets):
        grams = [feature_gram(f) for f in features(image).style]
        pairs = zip(grams, targets, both.style_targets, strict=True)
        return sum(((g - t).square().sum() / s.square().sum()).item() for g, t, s in pairs)

    mean = [(squares(x, first) + squares(x, second)) / 2 / len(first) for x in (a, b)]
    found = [both.parts(x)["style"].item() for x in (a, b)]
    assert found[0] - found[1] == pytest.approx(mean[0] - mean[1], rel=1e-3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"content_weight": -1}, "content_weight must be finite, at least 0, got -1"),
        ({"style_weight": float("inf")}, "style_weight must be finite, at least 0, got inf"),
        ({"tv_weight": float("nan")}, "tv_weight must be finite, at least 0, got nan"),
        ({"style_weights": [1, 2]}, "style_weights must be 1 numbers"),
        ({"style_weights": [0]}, "style_weights must be finite, at least 0 and not all 0"),
        ({"styles": []}, "styles must be one picture or more"),
    ],
)
def test_bad_arguments_of_the_objective_are_refused(options, message):
    arguments = {"styles": [noise(1, 3, 16, 16)], **options}
    with pytest.raises(ValueError, match=message):
        StyleObjective(RandomFeatures(channels=2), noise(1, 3, 16, 16), **arguments)
    with pytest.raises(ValueError, match=r"features must be \[n, channels, height, width\]"):
        feature_gram(noise(3, 4))
    with pytest.raises(ValueError, match="grams must be 2 layers, got 1"):
        style_loss([noise(1, 2, 2)], [noise(1, 2, 2)] * 2)


# Curvature


def test_first_and_second_derivatives_are_right():
    objective = tiny_objective(torch.float64)
    image = (1.2 * noise(1, 3, 16, 20, seed=5, dtype=torch.float64) - 0.1).requires_grad_()
    assert torch.autograd.gradcheck(objective, image, fast_mode=True)
    assert torch.autograd.gradgradcheck(objective, image, fast_mode=True)


def test_hessian_products_are_symmetric_and_those_of_differences():
    objective = tiny_objective(torch.float64)
    image = noise(1, 3, 16, 20, seed=5, dtype=torch.float64).requires_grad_()
    operator = HessianOperator(lambda: objective(image), [image])
    v, w = (noise(960, seed=s, dtype=torch.float64) - 0.5 for s in (6, 7))
    assert torch.isclose(w @ operator.matvec(v), v @ operator.matvec(w), rtol=1e-10)

    def gradient(shift):
        moved = (image + shift * v.view_as(image)).detach().requires_grad_()
        return torch.autograd.grad(objective(moved), moved)[0].flatten()

    difference = (gradient(1e-5) - gradient(-1e-5)) / 2e-5
    product = operator.matvec(v)
    assert (difference - product).norm() < 1e-7 * product.norm()


# Optimisation

KINDS = [("lbfgs", "none"), ("adam", "none"), ("lbfgs", "hsc"), ("adam", "hsc")]


@pytest.mark.parametrize(("optimizer", "correction"), KINDS)
def test_every_optimiser_descends_and_repeats_itself_bitwise(optimizer, correction):
    config = StyleConfig(optimizer=optimizer, correction=correction, style_weight=20.0)
    config.hsc.every = 3
    content, style = noise(1, 3, 24, 32), load_image("sample:flower", 32)
    pictures = []
    for _ in range(2):
        objective = StyleObjective(
            RandomFeatures(channels=8), content, [style], style_weight=config.style_weight
        )
        found = PictureOptimizer(objective, content, config)
        losses = [found.measure()["loss"]]
        for _ in range(25):
            found.step()
            losses.append(found.measure()["loss"])
        assert losses[-1] < 0.5 * losses[0]
        pictures.append(found.image.detach())
    assert torch.equal(*pictures)
    assert ("condition" in found.metrics()) == (correction == "hsc")


@pytest.mark.parametrize("optimizer", ["adam", "lbfgs"])
def test_corrected_steps_do_not_depend_on_the_scale_of_the_loss(optimizer):
    content, style = 0.2 + 0.6 * noise(1, 3, 24, 24), noise(1, 3, 24, 24, seed=1)
    moved = []
    for scale in (1.0, 1e4):
        weights = {"content_weight": scale, "style_weight": 5 * scale}
        objective = StyleObjective(RandomFeatures(channels=8), content, [style], **weights)
        config = StyleConfig(optimizer=optimizer, correction="hsc", learning_rate=0.02)
        found = PictureOptimizer(objective, content, config)
        for _ in range(3):
            found.step()
        moved.append(found.image.detach() - content)
    assert moved[0].abs().max() > 1e-3
    assert (moved[0] - moved[1]).norm() < 0.02 * moved[0].norm()


def test_the_picture_with_the_lowest_loss_is_kept():
    content, style = noise(1, 3, 24, 24), noise(1, 3, 24, 24, seed=1) / 2
    objective = StyleObjective(RandomFeatures(channels=4), content, [style], style_weight=9.0)
    config = StyleConfig(optimizer="adam", learning_rate=3.0)
    optimizer = PictureOptimizer(objective, content, config)
    losses, images = [], []
    for _ in range(12):
        losses.append(optimizer.measure()["loss"])
        images.append(optimizer.image.detach().clone())
        optimizer.step()
    best = min(range(12), key=losses.__getitem__)
    assert optimizer.measure()["loss"] > losses[best]
    assert optimizer.settle()
    assert torch.equal(optimizer.image, images[best])
    assert optimizer.measure()["loss"] == losses[best]
    assert not optimizer.settle()


def test_the_command_writes_the_best_picture_and_its_loss(tmp_path):
    args = (*SAMPLES, "-o", str(tmp_path / "out.png"), *TINY, "--optimizer=adam")
    assert main(["style", *args, "--learning-rate=3", "--steps=4"]) == 0
    rows = read_rows(tmp_path / "out.jsonl")
    assert rows[-1]["step"] == rows[-2]["step"] == 4
    assert rows[-1]["loss"] == min(row["loss"] for row in rows) < rows[-2]["loss"]
    start = load_image("sample:china", 32)
    assert (load_image(tmp_path / "out.png", 32) - start).abs().max() < 0.003  # nothing was better


def test_pictures_start_as_wanted():
    content, style = noise(1, 3, 24, 32), noise(1, 3, 40, 20, seed=1)

    def start(**options):
        return start_picture(StyleConfig(**options), content, style)

    assert torch.equal(start(), content)
    assert start(init="style").shape == content.shape
    assert torch.allclose(start(init="style").mean(), style.mean(), atol=0.05)
    first = start(init="noise", seed=1)
    assert torch.equal(first, start(init="noise", seed=1))
    assert not torch.equal(first, start(init="noise", seed=2))
    assert first.std().item() == pytest.approx(0.1, rel=0.05)


class Poisoned:
    """Features that are not finite once the picture has moved."""

    bytes_per_pixel = 1

    def __init__(self, part):
        self.part, self.calls = part, 0
        self.features = RandomFeatures(channels=2)

    def __call__(self, image):
        self.calls += 1
        found = self.features(image)._asdict()
        if self.calls > 4:
            found[self.part][0] = found[self.part][0] * float("nan")
        return Features(**found)


@pytest.mark.parametrize("part", ["content", "style"])
def test_what_is_not_finite_is_named(part):
    content = noise(1, 3, 24, 24)
    objective = StyleObjective(Poisoned(part), content, [noise(1, 3, 24, 24, seed=1)])
    optimizer = PictureOptimizer(objective, content, StyleConfig(optimizer="adam"))
    optimizer.step()
    optimizer.step()
    with pytest.raises(NonFiniteError, match=f"step 2: the {part} part of the loss is not finite"):
        optimizer.step()


# The command


def read_rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_command_writes_picture_losses_and_curves(tmp_path, capsys):
    args = (*SAMPLES, "-o", tmp_path / "out.png", "--save-every=2", *TINY)
    assert main(["style", *map(str, args)]) == 0
    printed = capsys.readouterr().out
    assert "sample:china in the style of sample:flower: 32 x 21 pixels" in printed
    assert f"{tmp_path / 'out.png'}: after 3 steps of lbfgs in" in printed
    names = ["out.00002.png", "out.jsonl", "out.losses.png", "out.png"]
    assert sorted(file.name for file in tmp_path.iterdir()) == names
    rows = read_rows(tmp_path / "out.jsonl")
    assert [row["step"] for row in rows] == [0, 1, 2, 3]
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert rows[0].keys() >= {"seconds", "evaluations", "content", "style", "tv", "range"}
    painted = load_image(tmp_path / "out.png", 32)
    assert painted.shape == (1, 3, 21, 32)
    assert not torch.equal(painted, load_image(tmp_path / "out.00002.png", 32))


def test_the_same_seed_gives_the_same_file(tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        args = (*SAMPLES, "-o", f"{tmp_path / name}.png", f"--seed={seed}", "--init=noise", *TINY)
        assert main(["style", *args]) == 0
    a, b, c = ((tmp_path / f"{name}.png").read_bytes() for name in "abc")
    assert a == b
    assert a != c


def test_colours_are_kept_if_wanted(tmp_path):
    args = [*SAMPLES, "-o", str(tmp_path / "out.png"), *TINY, "--steps=30"]
    content = load_image("sample:china", 32)

    def hues():
        image = load_image(tmp_path / "out.png", 32)
        return (image - image.mean(1, keepdim=True)).flatten(), image

    assert main(["style", *args]) == 0
    free, _ = hues()
    assert main(["style", *args, "--keep-colors"]) == 0
    kept, image = hues()
    own = (content - content.mean(1, keepdim=True)).flatten()
    assert (kept - own).norm() < 0.5 * (free - own).norm()
    assert (image - content).norm() > 0.1 * content.norm()


def test_options_come_from_a_file_too(tmp_path):
    (tmp_path / "style.yaml").write_text(
        "{size: 32, steps: 2, blend: '0.7,0.3', optimizer: adam, correction: hsc, hsc: {every: 3}}"
    )
    args = ["sample:flower", *SAMPLES, "-o", str(tmp_path / "out.webp"), "--threads=1"]
    assert main(["style", *args, f"--config={tmp_path / 'style.yaml'}"]) == 0
    assert len(read_rows(tmp_path / "out.jsonl")) == 3
    assert load_image(tmp_path / "out.webp").shape == (1, 3, 21, 32)


def test_vgg_paints(vgg_file, tmp_path):
    args = [*SAMPLES, "-o", str(tmp_path / "out.png"), f"--features={vgg_file}", *TINY]
    assert main(["style", *args]) == 0
    rows = read_rows(tmp_path / "out.jsonl")
    assert rows[-1]["loss"] < rows[0]["loss"]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ("sample:china -o out.png", "styles"),
        ("sample:china sample:flower", "out"),
        ("sample:china sample:flower -o out.gif", "out.gif must end in .png, .jpg"),
        ("sample:china sample:flower -o no/out.png", "there is no folder no"),
        ("sample:china sample:flower -o folder.png", "folder.png is a folder"),
        ("sample:china sample:flower -o out.png --size 2000", "size must be in [32, 1024]"),
        ("sample:china sample:flower -o out.png --size x", "--size: Expected int"),
        ("sample:china sample:flower -o out.png --blend 1,2", "blend must be 1 numbers"),
        ("sample:china sample:flower -o out.png --blend x", "blend must be 1 numbers"),
        ("sample:china sample:flower -o out.png --steps 0", "steps must be positive without"),
        ("sample:china sample:flower -o out.png --steps=-1", "steps must be at least 0"),
        ("sample:china sample:flower -o out.png --seconds nan", "--seconds: Expected float"),
        ("sample:china sample:flower -o out.png --style-weight=-1", "style_weight must be at"),
        ("sample:china sample:flower -o out.png --learning-rate 0", "learning_rate must be pos"),
        ("sample:china sample:flower -o out.png --optimizer sgd", "optimizer: Expected one of"),
        ("sample:china sample:flower -o out.png --hsc.eps 0", "eps must be positive, got 0"),
        ("sample:china sample:flower -o out.png --hsc.every 0", "every must be at least 1"),
        ("sample:china sample:flower -o out.png --seed=-1", "seed must be"),
        ("sample:china sample:flower -o out.png --config missing.yaml", "File does not exist"),
    ],
)
def test_bad_options_are_refused_in_one_line(capsys, tmp_path, monkeypatch, args, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.png").mkdir()
    assert message in refused(capsys, "style", *args.split())
    assert [file.name for file in tmp_path.iterdir()] == ["folder.png"]


def test_what_is_read_is_not_written_over(capsys, tmp_path, monkeypatch, vgg_file):
    monkeypatch.chdir(tmp_path)
    for name in ("a.png", "a.losses.png"):
        save_image(tmp_path / name, torch.rand(1, 3, 32, 32))
    shutil.copy(vgg_file, "a.safetensors")
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    read = {
        "a.png": ["sample:china"],
        "sample:china": ["./a.png"],
        "sample:flower": ["a.losses.png"],
    }
    for content, styles in read.items():
        found = refused(capsys, "style", content, *styles, "-o", "a.png", *TINY)
        assert "would be written over" in found
    network = "--method=network", "--features=a.safetensors"
    found = refused(capsys, "style", *SAMPLES, *network, "-o", "a.png", *TINY)
    assert "a.safetensors would be written over a.safetensors, which is read" in found
    found = refused(capsys, "style", "a.png", "-o", "a.png", "--network", "a.safetensors")
    assert "a.png would be written over a.png, which is read" in found
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


@pytest.mark.parametrize("method", ["image", "network"])
def test_a_loss_without_curvature_is_not_corrected(capsys, tmp_path, method):
    weights = "--content-weight=0", "--style-weight=0", "--tv-weight=0"
    options = *weights, "--correction=hsc", f"--method={method}", "-o", str(tmp_path / "out.png")
    found = refused(capsys, "style", *SAMPLES, *options, *TINY)
    assert "the loss has no curvature at the start" in found
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written_is_refused(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # to root, nothing is read-only
    out = tmp_path / "out.png"
    assert "is read-only" in refused(capsys, "style", *SAMPLES, "-o", out, *TINY)


def test_a_picture_too_large_for_the_memory_is_refused(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(os, "sysconf", lambda name: 1000)
    message = refused(capsys, "style", *SAMPLES, "-o", tmp_path / "out.png", *TINY)
    assert "0.4 GB of memory, and this machine has 0.0 GB: choose a smaller --size" in message


def test_divergence_stops_and_writes_no_picture(tmp_path, capsys):
    (tmp_path / "out.png").write_bytes(b"older")
    args = [*SAMPLES, "-o", str(tmp_path / "out.png"), *TINY]
    assert main(["style", *args, "--optimizer=adam", "--learning-rate=1e30"]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "hessreg: step 1: the " in error
    assert "is not finite" in error
    assert (tmp_path / "out.png").read_bytes() == b"older"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interruption_keeps_the_picture(tmp_path, number):
    out = tmp_path / "out.png"
    command = [sys.executable, "-W", "error", "-m", "hessreg", "style", *SAMPLES, "-o", str(out)]
    options = ["--size=32", "--steps=0", "--seconds=100", "--threads=1"]
    process = subprocess.Popen([*command, *options], stderr=subprocess.PIPE, text=True)
    log = out.with_suffix(".jsonl")
    while process.poll() is None and (not log.exists() or log.read_text().count("\n") < 5):
        time.sleep(0.01)
    process.send_signal(number)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130, error
    assert error.count("\n") == 1
    assert f"{out} is the picture so far" in error
    steps = int(error.split("stopped after ")[1].split(" steps")[0])
    assert read_rows(log)[-1]["step"] == steps >= 4
    assert load_image(out, 32).shape == (1, 3, 21, 32)


def test_seconds_limit_the_run(tmp_path):
    args = ["-o", str(tmp_path / "out.png"), "--size=32", "--steps=0", "--seconds=0.5"]
    assert main(["style", *SAMPLES, *args, "--threads=1"]) == 0
    rows = read_rows(tmp_path / "out.jsonl")
    assert rows[-1]["seconds"] >= 0.5 > rows[-2]["seconds"]


def test_blend_is_read():
    assert parse_blend("2,1", 2) == [2.0, 1.0]
    for text in ("1", "1,2,3", "1,-1", "0,0", "1,nan", "1,inf", ",", "a,b"):
        with pytest.raises(ValueError, match="blend must be 2 numbers"):
            parse_blend(text, 2)


def test_samples_are_found_without_importing_scikit_learn():
    code = "import sys; from hessreg.style import load_image as f; f('sample:china', 32);"
    code += "assert 'sklearn' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path.cwd())


def test_options_may_be_written_with_dashes_or_underscores(tmp_path, capsys):
    for name in ("--hsc.num-steps", "--hsc.num_steps"):
        with pytest.raises(SystemExit, match="0"):
            main(["style", *SAMPLES, "-o", "a-b.png", f"{name}=7", "--print_config"])
        printed = capsys.readouterr().out
        assert "num_steps: 7" in printed
        assert "out: a-b.png" in printed


def test_progress_shows_wall_clock_where_a_row_has_it(capsys):
    report = PlainProgress("lbfgs", interval=0.0)
    report.update({"step": 12, "seconds": 4.0, "cpu_seconds": 8.0, "loss": 1.5}, 0.5)
    assert capsys.readouterr().out == "lbfgs   50 %  step 12  4.0 s  3.0 steps/s  loss 1.5\n"
    report.update({"step": 120, "cpu_seconds": 8.0}, 0.5)
    assert "8.0 s  15 steps/s" in capsys.readouterr().out


def test_the_comparison_of_optimisers_runs(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    example = runpy.run_path(str(EXAMPLE))
    kinds = ("L-BFGS", "Adam + HSC")
    picture = tmp_path / "curves.png"
    options = ["--size=32", "--seconds=0.4", "--seeds=2", "--out", str(picture)]
    example["main"]([*options, "--kinds", *kinds])
    captured = capsys.readouterr()
    assert captured.err.count("seed 1: ") == 2
    lines = captured.out.splitlines()
    assert [line.split(" | ")[0] for line in lines[2:]] == [f"| {name}" for name in kinds]
    assert {line.count("|") for line in lines} == {lines[0].count("|")}
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_the_table_shows_medians_ranges_and_what_was_not_reached():
    example = runpy.run_path(str(EXAMPLE))
    runs = [
        [{"step": n, "seconds": float(n), "loss": scale / (n + 1)} for n in range(21)]
        for scale in (1.0, 3.0, 2.0)
    ]
    rows = example["table"]({"Adam": runs}, 20.0).splitlines()
    assert rows[0].startswith("| optimiser | 5 s | 10 s | 20 s | 10 steps |")
    cells = [each.strip() for each in rows[2].strip("|").split("|")]
    assert cells[1] == "0.333 (0.167..0.5)"
    assert cells[4] == "0.182 (0.0909..0.273)"
    assert cells[5:] == ["-", "-", "20"]
