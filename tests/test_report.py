"""The report of runs, and what a run writes for it: HTML, walks, spectra, FID, logs elsewhere."""

from __future__ import annotations

import importlib
import importlib.machinery
import json
import re
import shutil
import types
from html.parser import HTMLParser

import numpy as np
import pytest
import torch

from hessreg.cli import main
from hessreg.gan import DEFAULTS, Dataset, Generator, Run, TrainConfig
from hessreg.gan.checkpoint import load_state
from hessreg.gan.html import Series, element, line_chart
from hessreg.gan.metrics import density, frechet_distance
from hessreg.gan.report import command_of, write_report
from hessreg.gan.run_folder import RunFolder
from hessreg.gan.walk import interpolate_noise, latent_walk
from tests import browser

for package in ("jsonargparse", "matplotlib", "PIL", "rich", "safetensors", "sklearn", "yaml"):
    pytest.importorskip(package)

SMALL = ["--width=8", "--latent_dim=4", "--batch_size=8", "--tensorboard=false", "--log_every=2"]
HOSTILE = '<script>alert("1")</script>&'


def trained(folder, *options, dataset="digits"):
    args = ["train", dataset, *SMALL, "--regularizer=r1", "--steps=6", "--plain"]
    assert main([*args, f"--out={folder}", *map(str, options)]) == 0
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two seeds of R1 and one run with spectra; one of the folders has a hostile name."""
    folder = tmp_path_factory.mktemp("runs")
    trained(folder / "r1-0")
    trained(folder / "r1-1", "--seed=1")
    trained(folder / HOSTILE.replace("/", "|"), "--spectrum_every=3", "--eval_every=3")
    return folder


@pytest.fixture(scope="module")
def page(runs):
    out = runs / "page.html"
    assert main(["report", str(runs), f"--out={out}"]) == 0
    return out


def refused(capsys, *args) -> str:
    capsys.readouterr()
    assert main(list(map(str, args))) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    return captured.err


# The page


class Outline(HTMLParser):
    """Elements and attributes; fails where they do not nest."""

    VOID = ("meta", "link", "img")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)

    def of(self, tag):
        return [attributes for name, attributes in self.found if name == tag]


def outline(text) -> Outline:
    parser = Outline()
    parser.feed(text)
    parser.close()
    assert parser.open == []
    return parser


def test_the_page_is_one_file_that_escapes_everything(page):
    text = page.read_text()
    parsed = outline(text)
    assert parsed.of("script") == []
    assert not [a for _, attributes in parsed.found for a in attributes if a.startswith("on")]
    assert any(HOSTILE.replace("/", "|") in data for data in parsed.text)
    addresses = [a.get(n) for _, a in parsed.found for n in ("src", "href", "srcset") if n in a]
    assert addresses
    assert all(address.startswith("data:") for address in addresses)
    assert not re.search(r"url\(|@import|https?:", text)
    assert all(image["alt"] for image in parsed.of("img"))
    assert all(cell["scope"] in ("col", "row") for cell in parsed.of("th"))
    assert [len(parsed.of(tag)) for tag in ("main", "h1", "title")] == [1, 1, 1]


def test_the_page_says_what_differs_and_what_came_out(page, runs):
    text = " ".join(outline(page.read_text()).text)
    differ = page.read_text().split("What differs")[1].split("</table>")[0]
    assert set(re.findall(r'scope="col">([^<]+)<', differ)) == {
        *("run", "eval_every", "spectrum_every")
    }
    assert "r1 (seeds 0, 1)" in text
    values = [RunFolder(runs / f"r1-{seed}").read_result()["fdd"] for seed in (0, 1)]
    assert f"{np.mean(values):.1f} ± {np.std(values, ddof=1):.1f}" in text
    assert "one image per class" in text
    for heading in ("FDD", "density", "coverage", "copies", "CPU s", "Spectra of the Hessians"):
        assert heading in text
    for title in ("loss of the generator", "gradient norm of the discriminator"):
        assert title in text
    assert "hessreg train digits --steps=6" in text
    assert torch.__version__ in text


def test_a_chart_has_a_line_for_each_run(page):
    charts = page.read_text().split("<h3>loss of the generator</h3>")[1].split("</figure>")[0]
    plot, legend = charts.split("<figcaption>")
    assert plot.count("<polyline") == 3
    assert legend.count("<li>") == 2


@pytest.mark.parametrize("is_log", [False, True])
def test_points_of_a_chart_are_where_their_values_are(is_log):
    ys = [1.0, 10.0, 1000.0] if is_log else [1.0, 1.5, 2.5]
    points = list(zip([0.0, 1.0, 3.0], ys, strict=True))
    text = line_chart("loss", "seconds", [Series("run", 0, points)])
    drawn = re.search(r'points="([^"]+)" class="s0', text)[1]
    x, y = np.array([pair.split(",") for pair in drawn.split()], dtype=float).T
    assert (x[1] - x[0]) / (x[2] - x[0]) == pytest.approx(1 / 3, abs=1e-3)
    assert (y[1] - y[0]) / (y[2] - y[0]) == pytest.approx(1 / 3, abs=1e-3)
    ticks = re.findall(r'<text x="47.0" y="([\d.]+)" text-anchor="end">([\d.e+]+)<', text)
    for at, value in ticks:
        share = np.log10(float(value)) / 3 if is_log else (float(value) - 1.0) / 1.5
        assert float(at) - 4 == pytest.approx(y[0] + share * (y[2] - y[0]), abs=0.2)
    assert len(ticks) >= 3


@pytest.mark.parametrize("value", [0.0, 1e-300, -3.0, 1e300])
def test_a_chart_of_one_value_is_drawn(value):
    text = line_chart("<b>", "x", [Series("a & b", 11, [(0.0, value), (0.0, value)])])
    outline(text)
    assert "nan" not in text
    assert "&lt;b&gt;" in text
    assert "a &amp; b" in text


def test_elements_escape_text_and_attributes():
    inner = element("i", '"<&')
    assert element("p", [inner, "<"], title='"><') == (
        '<p title="&quot;&gt;&lt;"><i>&quot;&lt;&amp;</i>&lt;</p>'
    )


def test_a_browser_shows_the_page_without_complaints(page, tmp_path):
    with browser.opened(page, tmp_path) as shown:
        assert shown.evaluate("document.querySelectorAll('svg').length") > 10
        assert shown.evaluate("[...document.images].every(i => i.complete && i.naturalWidth > 0)")
        for width in (1280, 400):
            assert shown.width_in(width) <= width
        assert shown.background("light") != shown.background("dark")
        assert shown.requests == []
        assert shown.complaints == []


def test_a_browser_would_have_complained(tmp_path):
    bad = tmp_path / "bad.html"
    bad.write_text(
        "<meta name='viewport' content='width=device-width'><p style='width: 900px'>wide</p><img src='http://127.0.0.1:9/x.png'>"
        "<script>console.error('no')</script>"
    )
    with browser.opened(bad, tmp_path / "profile") as shown:
        assert shown.width_in(400) > 400
        assert shown.requests == ["http://127.0.0.1:9/x.png"]
        assert shown.complaints != []


def test_an_unfinished_run_is_shown_as_far_as_it_is(tmp_path, capsys):
    run = trained(tmp_path / "run", "--eval_every=3")
    (run / "result.json").unlink()
    (run / "samples.png").write_bytes(b"no picture")
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "torn')
    other = TrainConfig(width=8, latent_dim=4, batch_size=8, tensorboard=False)
    Run.create(tmp_path / "new", other).close()
    capsys.readouterr()
    assert main(["report", str(run), str(tmp_path / "new")]) == 0
    assert "2 runs, 2 of them not finished" in capsys.readouterr().out
    text = (run / "report.html").read_text()
    assert "1 not finished" in text
    assert f"{RunFolder(run).read_metrics()[-1]['fdd']:.1f}" in text
    assert "<h2>Samples</h2>" not in text


def test_runs_on_several_data_sets_have_a_table_each(tmp_path):
    trained(tmp_path / "a")
    trained(tmp_path / "b", "--ring.modes=3", dataset="ring")
    trained(tmp_path / "c", dataset="ring")
    assert main(["report", str(tmp_path), f"--out={tmp_path / 'x' / 'page.html'}"]) == 0
    text = (tmp_path / "x" / "page.html").read_text()
    assert text.count("Final metrics") == 3
    assert "all modes but one" in text


def test_what_cannot_be_reported_is_refused_in_one_line(runs, tmp_path, capsys):
    assert "there is no run in" in refused(capsys, "report", tmp_path)
    assert "there is no run in" in refused(capsys, "report", runs, tmp_path / "nothing")
    damages = {
        "config.yaml": "depth: 3",
        "metrics.jsonl": "no row\n",
        "result.json": "{",
        "spectra.jsonl": "{}\n",
    }
    for name, content in damages.items():
        broken = shutil.copytree(runs / "r1-0", tmp_path / name)
        (broken / name).write_text(content)
        if name != "spectra.jsonl":  # of which the page has the picture
            assert f"{name} is damaged" in refused(capsys, "report", broken)
    (tmp_path / "result.json" / "result.json").write_text("[]")
    assert "not a mapping" in refused(capsys, "report", tmp_path / "result.json")
    file = tmp_path / "file"
    file.touch()
    assert str(file) in refused(capsys, "report", runs, f"--out={file / 'page.html'}")
    assert "must be a file, got the folder" in refused(capsys, "report", runs, f"--out={tmp_path}")


@pytest.mark.parametrize(
    "changes",
    [
        {"dataset": "digits", "regularizer": "hsn1r+r1", "steps": 4, "threads": 2},
        {"dataset": "ring", "seconds": 2.5, "tensorboard": False, "r1": {"gamma": 0.25}},
        {"dataset": "grid", "fid": {"features": "my module:f"}, "wandb": "it's"},
        {"dataset": "digits", "projection": {"strength": 0.5}, "orthogonal": "previous"},
    ],
)
def test_the_command_of_a_run_makes_its_configuration(changes, monkeypatch):
    import shlex

    from hessreg._train import _merged
    from hessreg.commands import train as command
    from hessreg.commands._options import train_config

    defaults = DEFAULTS[changes["dataset"]].to_dict() | {"seconds": 0.0}
    config = TrainConfig.from_dict(_merged(defaults, changes))
    made = []
    monkeypatch.setattr(command, "run", lambda options: made.append(train_config(options)))
    assert main(shlex.split(command_of(config))[1:]) == 0
    assert made == [config]


# What a run draws and measures


def test_spherical_interpolation_keeps_lengths_and_angles():
    a, b = torch.randn(2, 5, 16, dtype=torch.float64)
    a, b = (t / t.norm(dim=1, keepdim=True) for t in (a, b))
    way = interpolate_noise(a, b, 7)
    torch.testing.assert_close(way.norm(dim=2), torch.ones(5, 7, dtype=torch.float64))
    angles = torch.acos((way[:, 1:] * way[:, :-1]).sum(2))
    torch.testing.assert_close(angles, angles[:, :1].expand(5, 6))
    torch.testing.assert_close((way[:, 0], way[:, -1]), (a, b))


def test_ways_between_parallel_noise_are_straight():
    a = torch.tensor([[1.0, 2.0], [1.0, 2.0], [0.0, 0.0], [1.0, -1.0]])
    b = torch.tensor([[3.0, 6.0], [-1.0, -2.0], [1.0, 0.0], [1.0, -1.0]])
    way = interpolate_noise(a, b, 5)
    torch.testing.assert_close(
        way[[0, 1, 3]], interpolate_noise(a, b, 5, spherical=False)[[0, 1, 3]]
    )
    assert way.isfinite().all()
    torch.testing.assert_close(interpolate_noise(a, b, 3, spherical=False)[:, 1], (a + b) / 2)


def test_a_walk_leaves_the_mode_alone_and_keeps_to_a_class():
    network = Generator("dcgan", latent_dim=3, width=8, num_classes=2)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    seen = []
    network.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    walk = latent_walk(network, 4, 5, torch.Generator().manual_seed(0))
    assert walk.shape == (4, 5, 1, 8, 8)
    assert network.training
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    classes = seen[0].view(4, 5, -1)[:, :, 3:]
    assert torch.equal(classes, torch.eye(2).repeat(2, 1)[:, None].expand(4, 5, 2))


@pytest.mark.parametrize("dataset", ["digits", "ring"])
def test_a_run_draws_walks_and_spectra(tmp_path, dataset):
    from PIL import Image

    folder = trained(tmp_path / "run", "--spectrum_every=4", dataset=dataset)
    for name in ("interpolation.png", "spectral_density.png"):
        with Image.open(folder / name) as image:
            assert len(set(image.convert("L").tobytes())) > 10
    spectra = RunFolder(folder).read_spectra()
    assert [(row["step"], row["network"][0]) for row in spectra] == [
        *((4, "g"), (4, "d"), (6, "g"), (6, "d"))
    ]
    for row in spectra:
        assert np.trapezoid(row["density"], row["grid"]) == pytest.approx(1.0, abs=0.02)
    last = RunFolder(folder).read_metrics()[-1]
    assert last["hessian_smallest_g"] <= last["hessian_largest_g"]
    seconds = RunFolder(folder).read_result()["spectrum_seconds"]
    assert seconds == pytest.approx(sum(row["cpu_seconds"] for row in spectra), abs=0.01)


def test_spectra_are_those_of_the_command_and_change_nothing(tmp_path):
    options = ["--architecture=dcgan", "--save_every=3"]
    with_spectra = trained(tmp_path / "with", *options, "--spectrum_every=3")
    without = trained(tmp_path / "without", *options)
    first, second = (
        load_state(RunFolder(folder).last_checkpoint())["trainer"]
        for folder in (with_spectra, without)
    )
    for name in ("generator", "discriminator", "ema"):
        assert all(torch.equal(first[name][key], second[name][key]) for key in first[name])
    assert torch.equal(first["global_random"], second["global_random"])


def old_networks(latent_dim, shape, num_classes, outputs):
    """Of the user's own, with weights that are no leaves, which cannot be copied."""
    generator = torch.nn.Linear(latent_dim, 2)
    first, last = torch.nn.Linear(2, 4), torch.nn.Linear(4, 1)
    return generator, torch.nn.Sequential(
        torch.nn.utils.spectral_norm(first), torch.nn.SiLU(), torch.nn.utils.spectral_norm(last)
    )


def test_spectra_of_networks_that_cannot_be_copied(tmp_path):
    options = [f"--architecture={__name__}:old_networks", "--spectrum_every=2"]
    folder = trained(tmp_path / "run", *options, dataset="ring")
    assert len(RunFolder(folder).read_spectra()) == 6


def test_spectra_with_fewer_samples_than_the_batch_of_a_run(tmp_path):
    np.save(tmp_path / "points.npy", np.random.default_rng(0).normal(size=(60, 3)))
    options = ["--batch_size=64", "--g.batch_size=8", "--d.batch_size=8", "--spectrum_every=3"]
    options += [f"--data={tmp_path / 'points.npy'}", "--loss=relativistic"]
    folder = trained(tmp_path / "run", *options, dataset="arrays")
    assert len(RunFolder(folder).read_spectra()) == 4


def test_spectra_after_the_checkpoint_are_measured_again(tmp_path):
    whole = trained(tmp_path / "whole", "--spectrum_every=2", "--save_every=4")
    broken = shutil.copytree(whole, tmp_path / "broken")
    RunFolder(broken).last_checkpoint().unlink()  # of step 6: goes on from step 4
    assert main(["resume", str(broken), "--plain"]) == 0
    rows = [
        [
            {k: v for k, v in row.items() if k != "cpu_seconds"}
            for row in RunFolder(f).read_spectra()
        ]
        for f in (whole, broken)
    ]
    assert rows[0] == rows[1]
    assert [row["step"] for row in rows[0]] == [2, 2, 4, 4, 6, 6]


def test_density_is_the_mean_number_of_balls_over_k():
    real = torch.arange(10.0)[:, None]
    # The ball around an inner point reaches to its second neighbour, at distance 1.
    assert density(real, torch.tensor([[4.5]]), 2) == pytest.approx(1.0)
    assert density(real, torch.tensor([[4.5], [100.0]]), 2) == pytest.approx(0.5)
    x = torch.randn(400, 3)
    assert density(x, torch.randn(400, 3)) == pytest.approx(1.0, abs=0.15)
    assert density(x, x + 100) == 0


# The generator of a run


def test_eval_prints_the_metrics_of_fresh_samples(runs, capsys):
    assert main(["eval", str(runs / "r1-0"), "--permutations=99"]) == 0
    text = capsys.readouterr().out
    for heading in ("FDD", "density", "copies", "MMD^2"):
        assert heading in text
    assert float(text.split("p-value")[1]) == 0.01  # 1 in 99 + 1
    assert main(["eval", str(runs / "r1-0"), "--json", "--permutations=0", "--seed=0"]) == 0
    values = json.loads(capsys.readouterr().out)
    result = RunFolder(runs / "r1-0").read_result()
    assert "p_value" not in values
    assert values.keys() <= result.keys()


def test_a_test_of_the_real_data_finds_no_difference(runs, monkeypatch):
    from hessreg.gan.evaluation import TrainedGenerator

    trained_generator = TrainedGenerator.load(runs / "r1-0")
    real = trained_generator.dataset.train_samples
    drawn = lambda self, count, seed, labels: real[:count]  # noqa: E731
    monkeypatch.setattr(TrainedGenerator, "sample", drawn)
    assert trained_generator.evaluate(0, 99, "")["p_value"] > 0.05


def test_sample_writes_pictures_and_arrays(runs, tmp_path, capsys):
    from PIL import Image

    array, again = tmp_path / "deep" / "x.npy", tmp_path / "y.npy"
    for file, count in ((array, 600), (again, 10), (tmp_path / "z.png", 10)):
        assert main(["sample", str(runs / "r1-0"), "-n", str(count), f"--out={file}"]) == 0
    assert np.load(array).shape == (600, 1, 8, 8)
    assert np.load(again).shape == (10, 1, 8, 8)
    with Image.open(tmp_path / "z.png") as image:
        assert image.size == (8 * 52, 2 * 52)
    message = refused(capsys, "sample", runs / "r1-0", f"--out={tmp_path / 'x.gif'}")
    assert "out must end in .png or .npy" in message
    assert "n must be at least 1" in refused(capsys, "sample", runs / "r1-0", "-n0")
    assert "there is no run at" in refused(capsys, "sample", tmp_path / "nothing")
    assert "seed must be" in refused(capsys, "eval", runs / "r1-0", "--seed=-1")
    assert "permutations must be" in refused(capsys, "eval", runs / "r1-0", "--permutations=-1")


# FID and KID by torchmetrics


def torchmetrics():
    try:
        importlib.import_module("torchmetrics.image")
    except ModuleNotFoundError:
        pytest.skip("torchmetrics is not installed: pip install 'hessreg[metrics]'")
    except RuntimeError as error:  # a torchvision of another build of torch
        pytest.skip(f"torchmetrics does not import here: {error}")


def features() -> torch.nn.Module:
    """What the tests give as module:factory."""
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 5), torch.nn.Tanh())


def text() -> str:
    return "no module"


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_fid_is_our_frechet_distance():
    torchmetrics()
    from hessreg.gan.fid import FeatureDistances

    network = features()
    real, fake = torch.randn(300, 1, 8, 8), 0.5 + 0.7 * torch.randn(200, 1, 8, 8)
    state = torch.get_rng_state()
    data = Dataset("noise", real, torch.zeros(300).long(), real, torch.zeros(300).long())
    found = FeatureDistances(network, data).evaluate(fake)
    assert torch.equal(torch.get_rng_state(), state)
    ours = frechet_distance(network(real).detach(), network(fake).detach())
    assert found["fid"] == pytest.approx(ours, rel=1e-4)
    same = FeatureDistances(network, data).evaluate(real)
    assert abs(same["fid"]) < 1e-5
    assert abs(same["kid"]) < 4 * same["kid_std"] < found["kid"]


def test_a_feature_network_of_ones_own_is_the_same_each_time_and_draws_nothing_from_training():
    from hessreg.gan.fid import feature_network

    state = torch.get_rng_state()
    first, second = (feature_network(f"{__name__}:features", judge=None) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first[1].weight, second[1].weight)


def test_a_comparison_shows_fid_of_runs_alone():
    from hessreg.gan.compare import format_table
    from hessreg.gan.fid import COLUMNS

    runs = {"r1": [{"fid": 2.0, "kid": 0.5, "kid_std": 0.1, "steps": 3, "cpu_seconds": 1.0}]}
    lines = format_table(runs, {"training images": {}}, COLUMNS).splitlines()
    assert lines[0].split() == ["FID", "KID", "KID", "sd", "steps", "CPU", "s"]
    assert lines[1].split() == ["r1", "2.000", "0.5", "0.1", "3", "1.0"]
    assert lines[3].split() == ["training", "images"]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_run_logs_fid_and_kid(tmp_path, capsys):
    torchmetrics()
    folder = trained(tmp_path / "run", "--fid.features=judge")
    result = RunFolder(folder).read_result()
    assert result["fid"] == pytest.approx(result["fdd"], rel=1e-4)
    assert main(["eval", str(folder), f"--fid.features={__name__}:features"]) == 0
    assert "KID" in capsys.readouterr().out
    ring = ["train", "ring", *SMALL, "--steps=1", f"--out={tmp_path / 'ring'}"]
    error = refused(capsys, *ring, "--fid.features=judge")
    assert "module:factory for this data set, whose judge has no network" in error
    error = refused(capsys, *ring, f"--fid.features={__name__}:text")
    assert "must return a torch module, got str" in error
    error = refused(capsys, *ring, f"--fid.features={__name__}:features")  # of 64, not 2
    assert "fid.features: RuntimeError: mat1 and mat2" in error
    assert not (tmp_path / "ring").exists()


def test_fid_waits_for_no_other_process(monkeypatch):
    class Metric:
        def __init__(self, features, sync_on_compute=True, **options):
            assert not sync_on_compute  # torchmetrics would wait for processes that never come

        def update(self, samples, real):
            pass

        def compute(self):
            return torch.ones(1)

    class Pair(Metric):
        def compute(self):
            return torch.ones(2)

    name = "torchmetrics.image"
    for module in (
        types.ModuleType("torchmetrics"),
        types.ModuleType(name),
        types.SimpleNamespace(__name__=f"{name}.fid", FrechetInceptionDistance=Metric),
        types.SimpleNamespace(__name__=f"{name}.kid", KernelInceptionDistance=Pair),
    ):
        monkeypatch.setitem(importlib.sys.modules, module.__name__, module)
    from hessreg.gan.fid import FeatureDistances

    real, classes = torch.randn(20, 1, 8, 8), torch.zeros(20).long()
    distances = FeatureDistances(features(), Dataset("noise", real, classes, real, classes))
    assert distances.evaluate(real) == {"fid": 1.0, "kid": 1.0, "kid_std": 1.0}


def test_bad_features_are_refused(tmp_path, capsys, monkeypatch):
    new = ["train", "digits", *SMALL, "--steps=1", f"--out={tmp_path / 'run'}"]
    wanted = "features must be judge, module:factory or empty, got 'inception'"
    assert wanted in refused(capsys, *new, "--fid.features=inception")
    monkeypatch.setitem(importlib.sys.modules, "torchmetrics", None)
    monkeypatch.delitem(importlib.sys.modules, "torchmetrics.image", raising=False)
    error = refused(capsys, *new, "--fid.features=judge")
    assert "pip install 'hessreg[metrics]'" in error
    assert not (tmp_path / "run").exists()


# Data sets from files


def test_runs_on_different_files_are_not_compared(tmp_path):
    random = np.random.default_rng(0)
    for name in ("a", "b"):
        np.save(tmp_path / f"{name}.npy", random.normal(size=(60, 3)))
        data = f"--data={tmp_path / name}.npy"
        trained(tmp_path / name, data, dataset="arrays")
    out = tmp_path / "page.html"
    write_report([tmp_path / "a", tmp_path / "b"], out)
    assert out.read_text().count('aria-label="Final metrics"') == 2
    (tmp_path / "a.npy").unlink()
    write_report([tmp_path / "a"], out)
    page = out.read_text()
    assert "nothing is known for scale" in page
    assert "PCA-Frechet" in page


# Weights & Biases


class FakeWandb(types.ModuleType):
    """Remembers what is sent."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.__spec__ = importlib.machinery.ModuleSpec("wandb", None)
        self.started: list[dict] = []
        self.rows: list[tuple[int, dict]] = []
        self.ends: list[int] = []

    def init(self, **options):
        self.started.append(options)
        return types.SimpleNamespace(
            log=lambda row, step: self.rows.append((step, row)),
            finish=lambda exit_code: self.ends.append(exit_code),
        )


def test_rows_go_to_wandb_and_a_resumed_run_to_the_same_place(tmp_path, monkeypatch):
    fake = FakeWandb()
    monkeypatch.setitem(importlib.sys.modules, "wandb", fake)
    folder = trained(tmp_path / "run", "--wandb=mine")
    assert main(["resume", str(folder), "--steps=8", "--plain"]) == 0
    first, second = fake.started
    assert (first["project"], first["name"], first["resume"]) == ("mine", "run", "allow")
    assert first["id"] == second["id"]
    assert first["config"]["regularizer"] == "r1"
    assert [step for step, _ in fake.rows] == [2, 4, 6, 8]
    assert "fdd" in fake.rows[2][1]
    assert fake.ends == [0, 0]


def test_a_missing_wandb_is_named_before_anything_is_made(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(importlib.sys.modules, "wandb", None)
    error = refused(capsys, "train", "digits", *SMALL, "--wandb=mine", f"--out={tmp_path / 'run'}")
    assert "this command needs wandb: pip install wandb" in error
    assert not (tmp_path / "run").exists()
