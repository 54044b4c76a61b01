"""Data sets from files and from torch: what is read, and what is refused."""

from __future__ import annotations

import gzip
import struct
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from hessreg import cli
from hessreg.gan import DEFAULTS, Dataset, Generator, Run, Trainer, load_dataset, make_task
from hessreg.gan.data import ItemSamples, ScaledSamples, split_at_random
from hessreg.gan.file_datasets import load_arrays, load_images, load_mnist
from hessreg.gan.metrics import ImageJudge, PrincipalJudge
from hessreg.gan.networks import Discriminator
from hessreg.gan.pictures import tile
from hessreg.gan.sample_files import SampleFileError, read_array
from tests.image_files import digits, idx_bytes, write_idx, write_images


@pytest.fixture(scope="module")
def mnist(tmp_path_factory):
    return write_idx(tmp_path_factory.mktemp("mnist"), count=400, tests=100)


@pytest.mark.parametrize("packed", [False, True])
def test_idx_files_hold_what_was_written(tmp_path, packed):
    data = load_mnist(str(write_idx(tmp_path, count=200, tests=80, packed=packed)))
    images, labels = digits(count=200)
    wanted = torch.from_numpy(images).unsqueeze(1) / 127.5 - 1
    torch.testing.assert_close(data.tensors()[0], wanted[:120])
    torch.testing.assert_close(data.tensors()[1], wanted[120:])
    assert data.train_labels.tolist() == labels[:120].tolist()
    assert data.test_labels.tolist() == labels[120:].tolist()
    assert data.train_samples.values.dtype == torch.uint8


def test_without_a_test_set_the_same_sixth_is_put_aside(tmp_path):
    folder = write_idx(tmp_path, count=240, tests=0)
    first, again = load_mnist(str(folder)), load_mnist(str(folder))
    assert (len(first.train_samples), len(first.test_samples)) == (200, 40)
    assert all(map(torch.equal, first.tensors(), again.tensors()))
    everything = torch.cat(first.tensors()).flatten(1).sort(0).values
    wanted = torch.from_numpy(digits(count=240)[0]).flatten(1) / 127.5 - 1
    torch.testing.assert_close(everything, wanted.sort(0).values)


def test_a_folder_of_images_is_cropped_and_scaled(tmp_path):
    folder = write_images(tmp_path / "faces")
    Image.new("RGB", (90, 30), (255, 0, 0)).save(folder / "wide.png")
    pixels = load_images(str(folder), size=16).train_samples.values
    assert pixels.shape == (121, 3, 16, 16)
    assert pixels[-1].flatten(1).unique(dim=1).flatten().tolist() == [255, 0, 0]
    grey = load_images(str(folder), size=16, channels=1).train_samples.values
    assert grey.shape == (121, 1, 16, 16)


def test_only_the_middle_of_an_image_is_taken(tmp_path):
    folder = write_images(tmp_path / "faces")
    stripes = np.zeros((30, 90, 3), np.uint8)
    stripes[:, 30:60] = 200
    Image.fromarray(stripes).save(folder / "wide.png")
    assert load_images(str(folder), size=8).train_samples.values[-1].unique().tolist() == [200]


def test_subfolders_are_classes_whatever_is_below(tmp_path):
    folder = write_images(tmp_path / "classes", classes=True)
    (folder / "notes").mkdir()
    deep = folder / "9" / "more" / "deeper"
    deep.mkdir(parents=True)
    Image.new("RGB", (40, 40)).save(deep / "x.PNG")
    data = load_images(str(folder))
    labels = torch.cat([data.train_labels, data.test_labels])
    counts = np.bincount(digits(count=120)[1])
    counts[9] += 1
    assert labels.bincount().tolist() == counts.tolist()


def test_points_are_standardised_by_component(tmp_path):
    values = np.random.default_rng(0).normal(size=(600, 3)) * [1e-4, 1.0, 1e4] + [5, 0, 1e5]
    values[:, 1] = 7
    np.save(tmp_path / "x.npy", values)
    points = torch.cat(load_arrays(str(tmp_path / "x.npy")).tensors())
    torch.testing.assert_close(points.mean(0), torch.zeros(3), atol=2e-2, rtol=0)
    torch.testing.assert_close(points.std(0), torch.tensor([1.0, 0, 1]), atol=1e-2, rtol=0)


@pytest.mark.parametrize("kind", [np.float64, np.int64])
def test_points_far_from_zero_keep_their_digits(tmp_path, kind):
    values = np.random.default_rng(0).normal(size=(600, 2)) * 1e3 + 1e12
    values = values.astype(kind)
    np.save(tmp_path / "x.npy", values)
    data = load_arrays(str(tmp_path / "x.npy"))
    wanted = (values - values.mean(0)) / values.std(0)
    chosen = wanted[data.train_samples.rows.numpy()]
    np.testing.assert_allclose(data.tensors()[0].numpy(), chosen, atol=1e-3)


@pytest.mark.parametrize("kind", ["uint8", "unit", "signed", "channels", "big_endian", "bool"])
def test_images_in_arrays_are_between_minus_one_and_one(tmp_path, kind):
    images, _ = digits(8, 90)
    wanted = images / 127.5 - 1
    stored = {
        "uint8": images,
        "unit": images / np.float32(255),
        "signed": wanted.astype(np.float16),
        "channels": np.stack([images] * 3, 1),
        "big_endian": (images / 255).astype(">f8"),
        "bool": images > 127,
    }[kind]
    wanted = np.where(images > 127, 1, -1) if kind == "bool" else wanted
    np.save(tmp_path / "x.npy", stored)
    data = load_arrays(str(tmp_path / "x.npy"))
    found = torch.empty(90, *data.train_samples.shape[1:])
    order = torch.randperm(90, generator=torch.Generator().manual_seed(0))
    found[order] = torch.cat(data.tensors()[::-1])
    expected = torch.from_numpy(wanted).float().unsqueeze(1).expand_as(found)
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=0)


def test_labels_of_an_archive_may_be_any_integers(tmp_path):
    images, labels = digits(8, 120)
    np.savez(tmp_path / "x.npz", a=images, y=labels.astype(np.int64) * 10 - 50)
    data = load_arrays(str(tmp_path / "x.npz"), labels_key="y")
    assert data.num_classes == 10
    assert (
        torch.cat([data.train_labels, data.test_labels]).bincount().tolist()
        == np.bincount(labels).tolist()
    )


def test_a_large_array_stays_on_the_disk(tmp_path, monkeypatch):
    monkeypatch.setattr("hessreg.gan.sample_files._MAPPED", 0)
    images, _ = digits(8, 120)
    np.save(tmp_path / "x.npy", images)
    assert isinstance(read_array(tmp_path / "x.npy"), np.memmap)
    data = load_arrays(str(tmp_path / "x.npy"))
    with (tmp_path / "x.npy").open("r+b") as file:  # what nobody has looked at yet
        file.seek(-64, 2)
        file.write(bytes([255]) * 64)
    assert data.train_samples.values[-1].unique().tolist() == [255]
    assert len(data.train_samples) == 100


class Items(torch.utils.data.Dataset):
    """Counts what is fetched."""

    def __init__(self, pixels, labels=None):
        self.pixels, self.labels, self.fetched = pixels, labels, 0

    def __len__(self):
        return len(self.pixels)

    def __getitem__(self, index):
        self.fetched += 1
        return (
            self.pixels[index] if self.labels is None else (self.pixels[index], self.labels[index])
        )


def test_a_dataset_of_torch_is_fetched_item_by_item():
    images, labels = digits(8, 120)
    items = Items(torch.from_numpy(images).unsqueeze(1))
    data = Dataset.from_torch(items, labels=labels.tolist())
    assert items.fetched < 5
    trainer = Trainer(Generator(), Discriminator(), data.train_samples, batch_size=10)
    fetched = items.fetched
    trainer.step()
    assert items.fetched == fetched + 10
    assert data.train_samples[torch.arange(50)].abs().max() <= 1
    assert data.num_classes == 10


def test_labels_of_a_dataset_of_torch_come_with_its_items():
    images, labels = digits(8, 120)
    pixels = torch.from_numpy(images).unsqueeze(1) / 255
    test = Items(pixels[:20], labels[:20])
    data = Dataset.from_torch(Items(pixels, labels), test, value_range=(0.0, 1.0))
    assert data.train_labels.tolist() == labels.tolist()
    torch.testing.assert_close(data.tensors()[1], pixels[:20] * 2 - 1)


def test_a_lazy_source_trains_as_a_tensor_does():
    torch.manual_seed(0)
    images = torch.from_numpy(digits(8, 120)[0]).unsqueeze(1)
    sources = [images / 127.5 - 1, ScaledSamples(images, 1 / 127.5, -1.0), ItemSamples(images)]
    weights = []
    for source in sources:
        torch.manual_seed(1)
        trainer = Trainer(Generator(), Discriminator(), source, batch_size=16)
        for _ in range(3):
            trainer.step()
        weights.append(torch.cat([p.flatten() for p in trainer.generator.parameters()]))
    torch.testing.assert_close(weights[1], weights[0], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(weights[2], weights[0], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("items", "options", "error", "message"),
    [
        ([torch.zeros(2)], {}, ValueError, "at least 2 samples, got 1"),
        (["a", "b"], {}, TypeError, "item 0 must be a tensor of real numbers"),
        (torch.zeros(4, 2), {"labels": [0, 1]}, ValueError, "labels must be 4 integers"),
        (torch.zeros(4, 2), {"labels": [0, 1, 2, -1]}, ValueError, "at least 0"),
        (torch.zeros(4, 2), {"test": torch.zeros(4, 3)}, ValueError, r"shape \(2,\), got \(3,\)"),
    ],
)
def test_what_is_no_dataset_of_torch_is_refused(items, options, error, message):
    with pytest.raises(error, match=message):
        Dataset.from_torch(items, **options)


def damage(folder, name, change):
    file = folder / name
    file.write_bytes(change(file.read_bytes()))


IDX = "train-images-idx3-ubyte"
DAMAGES = {
    "truncated": (IDX, lambda content: content[:-1], "bytes after its header, got"),
    "too long": (IDX, lambda content: content + b"0", "after its header, got more"),
    "magic": (IDX, lambda content: b"\0\0\x0d" + content[3:], "must begin with 0x000803"),
    "header": (IDX, lambda content: content[:7], "must begin with"),
    "nothing": (IDX, lambda content: b"", "must begin with"),
    "huge": (IDX, lambda content: content[:4] + b"\xff" * 12 + content[16:], "bytes after its"),
    "fewer": (
        "train-labels-idx1-ubyte",
        lambda content: idx_bytes(np.zeros(3, np.uint8)),
        "train has 300 images and 3 labels",
    ),
    "swapped": (
        "train-labels-idx1-ubyte",
        lambda content: idx_bytes(np.zeros((3, 2, 2), np.uint8)),
        "in 1 dimensions",
    ),
    "sizes": (
        "t10k-images-idx3-ubyte",
        lambda content: idx_bytes(np.zeros((100, 9, 9), np.uint8)),
        "test images must have 28 x 28 pixels, got 9 x 9",
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_idx_files_are_one_line(tmp_path, capsys, name):
    file, change, message = DAMAGES[name]
    folder = write_idx(tmp_path / "mnist", count=400, tests=100)
    damage(folder, file, change)
    refused(["mnist", "--data", str(folder)], message, capsys, tmp_path)


def refused(arguments, message, capsys, tmp_path):
    out = tmp_path / "out"
    assert cli.main(["train", *arguments, "--out", str(out)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert not out.exists()


def test_a_damaged_archive_is_one_line(tmp_path, capsys):
    folder = write_idx(tmp_path / "mnist", count=100, tests=0, packed=True)
    damage(folder, f"{IDX}.gz", lambda content: content[: len(content) // 2])
    refused(["mnist", "--data", str(folder)], "is not a readable file", capsys, tmp_path)
    damage(folder, f"{IDX}.gz", lambda content: gzip.compress(b"x")[:5])
    refused(["mnist", "--data", str(folder)], "is not a readable file", capsys, tmp_path)


@pytest.mark.parametrize("missing", [IDX, "train-labels-idx1-ubyte", "t10k-labels-idx1-ubyte"])
def test_a_missing_idx_file_is_named(tmp_path, capsys, missing):
    folder = write_idx(tmp_path / "mnist", count=100, tests=20)
    (folder / missing).unlink()
    refused(["mnist", "--data", str(folder)], f"there is no {missing}", capsys, tmp_path)


@pytest.mark.parametrize("dataset", ["mnist", "images", "arrays"])
def test_data_must_be_named_and_there(tmp_path, capsys, dataset):
    refused([dataset], "data must be", capsys, tmp_path)
    refused([dataset, "--data", str(tmp_path / "none")], "none", capsys, tmp_path)


def test_digits_have_no_files(tmp_path, capsys):
    refused(["digits", "--data", "x"], "data must be empty", capsys, tmp_path)


def image_damages(folder):
    (folder / "0003.jpg").write_bytes((folder / "0003.jpg").read_bytes()[:300])
    yield "0003.jpg is not a readable image"
    (folder / "0003.jpg").write_bytes(b"no image")
    yield "0003.jpg is not a readable image"
    (folder / "0003.jpg").unlink()
    Image.new("I;16", (8, 8)).save(folder / "0003.png")
    yield "0003.png has I;16 pixels, 8 bits wanted"
    (folder / "0003.png").unlink()
    (folder / "a").mkdir()
    Image.new("L", (8, 8)).save(folder / "a" / "x.png")
    yield "either images or folders of images"


def test_damaged_images_are_one_line(tmp_path, capsys):
    folder = write_images(tmp_path / "faces")
    for message in image_damages(folder):
        refused(["images", "--data", str(folder)], message, capsys, tmp_path)
    few = write_images(tmp_path / "few", count=10)
    refused(["images", "--data", str(few)], "at least 60 images", capsys, tmp_path)


@pytest.mark.parametrize("error", [struct.error, ValueError, TypeError])
def test_an_image_that_pillow_fails_on_is_named(tmp_path, monkeypatch, error):
    folder = write_images(tmp_path / "faces")

    def fail(image):
        raise error("damaged")

    monkeypatch.setattr(ImageOps, "exif_transpose", fail)
    with pytest.raises(SampleFileError, match=r"\.png is not a readable image \(damaged\)"):
        load_images(str(folder))


GOOD = np.random.default_rng(0).normal(size=(90, 2))
ARRAYS = {
    "dimension": (GOOD[:, 0], "points [n, d] or images"),
    "five": (np.zeros((90, 1, 1, 2, 2)), "points [n, d] or images"),
    "empty": (np.zeros((0, 2)), "points [n, d] or images"),
    "few": (GOOD[:9], "at least 60 samples, got 9"),
    "infinite": (np.where(np.arange(180).reshape(90, 2) == 7, np.inf, GOOD), "holds inf at (3, 1)"),
    "too large": (GOOD * 1e300, "inf"),
    "equal": (np.ones((90, 2)), "different points"),
    "objects": (np.full((90, 2), None), "is not a readable array"),
    "text": (np.full((90, 2), "a"), "must hold real numbers"),
    "complex": (GOOD * 1j, "must hold real numbers"),
    "channels": (np.zeros((90, 8, 8, 3)), "1 or 3 channels"),
    "range": (np.full((90, 8, 8), 128.0), "between 0 and 1"),
    "integers": (np.zeros((90, 8, 8), np.int32), "uint8 or floating point"),
}


@pytest.mark.parametrize("name", ARRAYS)
def test_arrays_that_are_no_samples_are_one_line(tmp_path, capsys, name):
    values, message = ARRAYS[name]
    np.save(tmp_path / "x.npy", values, allow_pickle=True)
    refused(["arrays", "--data", str(tmp_path / "x.npy")], message, capsys, tmp_path)


def test_archives_that_are_no_samples_are_one_line(tmp_path, capsys):
    file = tmp_path / "x.npz"
    np.savez(file, a=GOOD, b=GOOD, y=np.zeros(5, np.int64), z=np.zeros(90), n=np.float64(3))
    for arguments, message in (
        ([], "choose one with --arrays.key: a, b, y, z, n"),
        (["--arrays.key", "c"], "has no array 'c'"),
        (["--arrays.key", "a", "--arrays.labels_key", "y"], "one integer for each of 90 samples"),
        (["--arrays.key", "a", "--arrays.labels_key", "z"], "one integer for each of 90 samples"),
        (["--arrays.labels_key", "z"], "choose one with --arrays.key"),
        (["--arrays.key", "n", "--arrays.labels_key", "y"], "got a single number"),
    ):
        refused(["arrays", "--data", str(file), *arguments], message, capsys, tmp_path)
    file.write_bytes(file.read_bytes()[:-200])
    refused(["arrays", "--data", str(file)], "is not a readable array", capsys, tmp_path)
    np.save(tmp_path / "x.npy", GOOD)
    wanted = "labels_key is for .npz"
    npy = ["arrays", "--data", str(tmp_path / "x.npy"), "--arrays.labels_key", "y"]
    refused(npy, wanted, capsys, tmp_path)


def test_a_mapped_file_that_was_cut_is_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("hessreg.gan.sample_files._MAPPED", 0)
    np.save(tmp_path / "x.npy", GOOD)
    damage(tmp_path, "x.npy", lambda content: content[:-8])
    refused(["arrays", "--data", str(tmp_path / "x.npy")], "not a readable", capsys, tmp_path)


def test_judges_know_the_data_from_noise(mnist, tmp_path):
    config = replace(DEFAULTS["mnist"], data=str(mnist))
    dataset = load_dataset("mnist", str(mnist))
    judge = make_task(config).judge(dataset)
    assert isinstance(judge, ImageJudge)
    assert judge.accuracy() > 0.8
    rows = judge.reference_rows()
    assert rows["training images"]["fdd"] < rows["one image per class"]["fdd"]
    plain = PrincipalJudge(dataset)
    rows = plain.reference_rows()
    pale = plain.evaluate(0.5 * dataset.tensors()[0])
    assert rows["training images"]["pca_frechet"] < 0.5 * pale["pca_frechet"]
    assert rows["training images"]["copies"] == 1
    assert rows["Gaussian fitted to pixels"]["copies"] == 0
    assert plain.features(dataset.tensors()[1]).shape == (100, 32)


def test_principal_components_are_those_of_the_covariance():
    random = torch.Generator().manual_seed(0)
    points = torch.randn(400, 5, generator=random) * torch.tensor([5.0, 4, 3, 2, 1]) + 7
    judge = PrincipalJudge(split_at_random("x", ScaledSamples(points), torch.zeros(400).long()))
    spread = judge.features(judge._train).var(0)
    train = judge._train.double()
    torch.testing.assert_close(
        spread.double(), torch.linalg.eigvalsh(train.T.cov()).flip(0), rtol=1e-3, atol=0
    )
    centred = judge.evaluate(points)["pca_frechet"]
    assert judge.evaluate(points + 3.0)["pca_frechet"] == pytest.approx(centred + 45, rel=0.2)


@pytest.mark.parametrize(
    ("channels", "size", "scale"), [(1, 8, 6), (3, 8, 6), (3, 32, 3), (1, 200, 1)]
)
def test_pictures_are_tiled_with_borders(channels, size, scale):
    images = torch.linspace(-1, 1, 16).view(16, 1, 1, 1).expand(16, channels, size, size)
    grid = tile(images, columns=8)
    side = scale * size + 4
    assert grid.shape[:2] == (2 * side, 8 * side)
    assert grid.ndim == (2 if channels == 1 else 3)
    assert grid[0, 0].max() == grid[side - 1, 0].max() == 89  # the border
    assert grid[side + side // 2, side // 2].max() == 136  # the ninth: 1 / 15


RUNS = {
    "mnist": ["--width", "8"],
    "images": ["--images.size", "16", "--width", "8"],
    "arrays": [],
}


@pytest.mark.parametrize("dataset", RUNS)
def test_a_run_goes_on_bit_for_bit(tmp_path, mnist, dataset, capsys):
    np.save(tmp_path / "x.npy", np.random.default_rng(0).normal(size=(300, 3)))
    data = {
        "mnist": mnist,
        "images": write_images(tmp_path / "faces", 70),
        "arrays": tmp_path / "x.npy",
    }[dataset]
    common = ["--tensorboard", "false", "--eval_every", "4", "--batch_size", "8", "--plain"]
    command = ["train", dataset, "--data", str(data), *RUNS[dataset], *common]
    assert cli.main([*command, "--steps", "6", "--out", str(tmp_path / "whole")]) == 0
    assert cli.main([*command, "--steps", "3", "--out", str(tmp_path / "parts")]) == 0
    assert cli.main(["resume", str(tmp_path / "parts"), "--steps", "6", "--plain"]) == 0
    states = [Run.resume(tmp_path / name).trainer.state_dict() for name in ("whole", "parts")]
    whole, parts = (state["generator"] for state in states)
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    assert (tmp_path / "whole/samples.png").read_bytes() == (
        tmp_path / "parts/samples.png"
    ).read_bytes()
