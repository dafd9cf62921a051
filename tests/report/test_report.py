"""The HTML page: well-formed, self-contained, escaped, with the numbers of the records; errors of one line."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from torch import nn

from lightning_lcnn.cli import main
from lightning_lcnn.report import write_report
from lightning_lcnn.report.sections import one_of_each_class

VOID = {"meta", "br", "img", "link"}


class Page(HTMLParser):
    """Checks the nesting and collects text, attributes and tables."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text = ""
        self.attributes: list[tuple[str, str, str]] = []
        self.tables: list[list[list[str]]] = []
        self.feed(html)
        self.close()
        assert not self.open

    def handle_starttag(self, name: str, attributes: list) -> None:
        self.attributes += [(name, key, value or "") for key, value in attributes]
        if name == "table":
            self.tables.append([])
        if name == "tr":
            self.tables[-1].append([])
        if name in ("th", "td"):
            self.tables[-1][-1].append("")
        if name not in VOID:
            self.open.append(name)

    def handle_startendtag(self, name: str, attributes: list) -> None:
        self.attributes += [(name, key, value or "") for key, value in attributes]

    def handle_endtag(self, name: str) -> None:
        assert self.open.pop() == name

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text += data
        if {"th", "td"} & set(self.open):
            self.tables[-1][-1][-1] += data

    def ids(self) -> list[str]:
        return [value for _, key, value in self.attributes if key == "id"]

    def row(self, heading: str) -> list[str]:
        return next(row for table in self.tables for row in table if row and row[0].startswith(heading))


def record(name: str, accuracy: float = 0.9, curvature: float | None = 20.0, **more) -> dict:
    both = {"margin": curvature, "loss": 2.0}
    return {
        "schema": 1,
        "name": name,
        "examples": 100,
        "measured_examples": 4,
        "attacked_examples": 100,
        "stand_in_beta": None,
        "accuracy": accuracy,
        **dict.fromkeys(("gradient_norm", "hessian_norm", "curvature", "median_curvature"), both),
        "converged": {"margin": 1.0, "loss": 0.5},
        "gradient_change": {"0.05": 0.1234, "0.1": 0.2},
        "adversarial_accuracy": {"0.05": 0.8, "0.25": 0.5},
        "adversarial_standard_error": {"0.05": 0.01, "0.25": 0.02},
        "certified": {"slope": 12.5, "curvature": None, "reason": "relu: it has a kink"},
        "layers": [
            {"name": "conv", "kind": "Conv2d", "slope": 4.0, "curvature": 0.0, "share": 0.0},
            {"name": "act", "kind": "CenteredSoftplus", "slope": 1.0, "curvature": 3.0, "share": 1.0},
        ],
        "betas": {"act": 7.0},
        "notes": {"curvature.loss": "not finite for 1 of 4 examples"},
        "curvature_values": [1.0, 20.0, 39.0, None],
        **more,
    }


def write_run(folder: Path, content: dict, history: str = "", settings: dict | None = None) -> Path:
    folder.mkdir(parents=True)
    (folder / "evaluation.json").write_text(json.dumps(content))
    if history:
        (folder / "history.csv").write_text(history)
    if settings is not None:
        (folder / "run.json").write_text(json.dumps(settings))
    return folder


def smooth_network() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.Softplus(), nn.Linear(8, 3)).eval()


HISTORY = "epoch,step,lcnn/log_ratio,lcnn_gamma/network.bn,train_loss\n0,9,5.5,,2.0\n1,19,4.5,3.25,1.0\n"


@pytest.fixture(scope="module")
def full(tmp_path_factory) -> Page:
    """Two methods, two seeds of the second, with histories, settings, networks and images."""
    tmp_path, shared = tmp_path_factory.mktemp("report"), {"method": "any", "options": {"lr": 0.1}}
    bounds = {"certified": {"slope": 25.0, "curvature": 123456.0, "reason": ""}}
    sources = [
        write_run(tmp_path / "a", record("standard"), settings={"seed": 0, **shared}),
        write_run(tmp_path / "b" / "0", record("low <b>&", 0.80, 2.0, **bounds), HISTORY, {"seed": 0, **shared}),
        write_run(tmp_path / "b" / "1", record("low <b>&", 0.84, 4.0), HISTORY, {"seed": 1, **shared}),
    ]
    images, labels = torch.rand(10, 3, 2, 2), torch.arange(10) % 3
    networks = {sources[0]: smooth_network(), sources[1]: smooth_network()}
    page = write_report(sources, tmp_path / "page.html", images=images, labels=labels, networks=networks, title="A & B")
    text = page.read_text()
    assert page.stat().st_size < 1_000_000
    parsed = Page(text)
    parsed.html = text
    return parsed


def test_page_needs_no_network_and_runs_no_code(full):
    assert "http" not in full.html.replace("http-equiv", "")
    assert not re.search(r"<(script|link|iframe|object|img)\b|@import|\bon\w+=", full.html)
    for _, key, value in full.attributes:
        if key in ("href", "xlink:href", "src"):
            assert value.startswith(("#", "data:image/png;base64,")), value


def test_page_is_accessible_and_its_ids_are_unique(full):
    ids = full.ids()
    assert len(ids) == len(set(ids))
    targets = [v[1:] for _, key, v in full.attributes if key in ("href", "xlink:href") and v.startswith("#")]
    targets += re.findall(r"url\(#([^)]+)\)", full.html)
    assert set(targets) <= set(ids)
    pictures = full.html.count("<svg")
    labels = [value for name, key, value in full.attributes if name == "svg" and key == "aria-label"]
    assert pictures == len(labels) == full.html.count("<figcaption>") >= 9
    assert all(len(label) > 20 for label in labels)
    assert full.html.count("<table") == full.html.count("<caption>") == full.html.count("<thead>")
    assert ("html", "lang", "en") in full.attributes


def test_numbers_are_those_of_the_records(full):
    assert full.row("test accuracy") == ["test accuracy", "90.0 % ★", "82.0 ± 2.8 %−8.0 points"]
    assert full.row("curvature of the margin, mean") == [
        "curvature of the margin, mean",
        "20",
        "3 ± 1.4 ★6.67× lower",
    ]
    assert full.row("gradient change under noise, ℓ₂\u00a00.05")[1:] == ["12.3 %", "12.3 ± 0.0 %equal"]
    assert full.row("certified curvature")[1:] == ["none", "123,0001 of 2 runs"]
    assert full.row("certified slope")[1:] == ["12.5", "18.8 ± 8.81.5× higher"]  # no star: the spread explains it
    assert full.row("conv") == ["conv", "4", "0.0 %", "4", "0.0 %"]
    assert "low <b>&: not finite" not in full.text
    assert "low <b>&: curvature.loss: not finite for 1 of 4 examples" in full.text
    assert "standard: no finite certified bound: relu: it has a kink" in full.text
    alt = next(v for _, key, v in full.attributes if key == "aria-label" and v.startswith("Accuracy against"))
    assert alt == "Accuracy against curvature. standard: accuracy 90.0 %, curvature 20; " + (
        "low <b>&: accuracy 82.0 ± 2.8 %, curvature 3 ± 1.4."
    )


def test_text_is_escaped(full):
    assert "<b>" not in full.html
    assert "low &lt;b&gt;&amp;" in full.html
    assert "<title>A &amp; B</title>" in full.html


def test_sections_of_histories_settings_and_networks(full):
    headings = re.findall(r"<h2[^>]*>([^<]+)", full.html)
    assert headings == [
        "Summary",
        "Under perturbations",
        "Input gradients",
        "Training",
        "Layers",
        "All numbers",
        "Runs and settings",
        "How the numbers are found",
    ]
    labels = [value for _, key, value in full.attributes if key == "aria-label"]
    assert any("low <b>& ends at 4.5" in label for label in labels)
    assert any(label.startswith("γ of each normalisation") and "low <b>&: 3.25 to 3.25" in label for label in labels)
    assert [row for table in full.tables for row in table if row[:1] == ["options.lr"]] == [["options.lr", "0.1"]]
    assert full.row("low <b>&")[0].endswith("2 seeds")
    assert ["low <b>&", "b/1", "1"] in [row for table in full.tables for row in table]


def test_a_hostile_name_changes_no_markup(tmp_path):
    name = '_$x"><script>alert(1)</script>--><svg onload=alert(1)>$'
    source = write_run(tmp_path / "run", record(name, notes={name: name}), settings={name: name})
    text = write_report([source], tmp_path / "page.html", title=name).read_text()
    assert "<script" not in text
    assert not [key for _, key, _ in Page(text).attributes if key.startswith("on")]


def test_stars_need_more_than_noise(tmp_path):
    near = [record("a", 0.90, 5.0), record("b", 0.91, 5.0), record("c", 0.50, 5.0)]
    sources = [write_run(tmp_path / str(i), content) for i, content in enumerate(near)]
    page = Page(write_report(sources, tmp_path / "page.html").read_text())
    # the standard error of the difference of 90 and 91 % of 100 images is 4 %
    assert ["★" in cell for cell in page.row("test accuracy")[1:]] == [True, True, False]
    assert not any("★" in cell for cell in page.row("curvature of the margin, mean")[1:])


def test_unequal_numbers_of_images_are_pointed_out(tmp_path):
    sources = [write_run(tmp_path / str(count), record("a", examples=count)) for count in (50, 2000)]
    page = Page(write_report(sources, tmp_path / "page.html").read_text())
    assert "Not all networks were tested on the same number of images (50, 2,000)" in page.text
    assert page.tables[-1][1][:2] == ["a", "50 or 2,000"]
    assert "Not all" not in write_report(sources[:1], tmp_path / "page.html").read_text()


def test_a_folder_of_runs_begins_with_the_standard_network(tmp_path):
    for name in ("LCNN", "standard"):
        write_run(tmp_path / "all" / name / "seed0", record(name))
    page = Page(write_report([tmp_path / "all"], tmp_path / "page.html").read_text())
    assert [row[0] for row in page.tables[0][1:]] == ["standard", "LCNN"]


def test_an_evaluation_file_alone_and_a_record_with_little_in_it(tmp_path):
    file = tmp_path / "evaluation.json"
    file.write_text(json.dumps({"schema": 1, "name": "", "accuracy": None, "curvature": {"margin": None}}))
    page = Page(write_report([file], tmp_path / "page.html").read_text())
    assert page.tables[0][1][0] == tmp_path.name


def test_values_of_wrong_type_are_left_out(tmp_path):
    odd = record("a", betas={"act": "x"}, gradient_change={"0.1": "y"}, accuracy="z", certified={"reason": 3})
    odd["layers"][0]["slope"] = "steep"
    page = Page(write_report([write_run(tmp_path / "run", odd)], tmp_path / "page.html").read_text())
    assert "steep" not in page.text


def test_the_command(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "run", record("a"))
    torch.save(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)).eval(), tmp_path / "run" / "network.pt")
    assert main(["report", "run", "--output", "new/page.html", "--data", "digits", "--trust", "--title", "T"]) == 0
    assert "written to new/page.html" in capsys.readouterr().out
    text = (tmp_path / "new" / "page.html").read_text()
    assert "<title>T</title>" in text
    assert "Input gradients" in text
    (tmp_path / "empty").mkdir()
    assert main(["report", "empty"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("lightning-lcnn report: error: empty holds no evaluation.json")
    assert error.count("\n") == 1
    assert not (tmp_path / "report.html").exists()


def test_a_network_without_measures_is_measured_on_the_images(tmp_path):
    (tmp_path / "run").mkdir()
    torch.save(smooth_network(), tmp_path / "run" / "network.pt")
    images, labels = torch.rand(4, 3, 2, 2), torch.tensor([0, 1, 2, 0])
    with pytest.raises(ValueError, match=r"holds no evaluation\.json: run `lightning-lcnn evaluate"):
        write_report([tmp_path / "run"], tmp_path / "page.html")
    with pytest.raises(ValueError, match="trust"):
        write_report([tmp_path / "run"], tmp_path / "page.html", images=images, labels=labels)
    page = write_report([tmp_path / "run"], tmp_path / "page.html", images=images, labels=labels, trust=True)
    assert "Input gradients" in page.read_text()


def test_an_untrusted_network_is_named_and_not_loaded(tmp_path):
    source = write_run(tmp_path / "run", record("a"))
    torch.save(smooth_network(), source / "network.pt")
    images, labels = torch.rand(4, 3, 2, 2), torch.tensor([0, 1, 2, 0])
    page = Page(write_report([source], tmp_path / "page.html", images=images, labels=labels).read_text())
    assert "a: no input gradients" in page.text
    assert "trust" in page.text


def test_images_that_do_not_fit_a_network_are_reported(tmp_path):
    source = write_run(tmp_path / "run", record("a"))
    images, labels = torch.rand(4, 1, 5, 5), torch.tensor([0, 1, 2, 0])
    networks = {source: smooth_network()}
    text = write_report([source], tmp_path / "p.html", images=images, labels=labels, networks=networks).read_text()
    assert "a: no input gradients: " in text


def test_large_pictures_and_many_methods_stay_small(tmp_path):
    layer = {"kind": "Conv2d", "slope": 1.5, "curvature": 0.1, "share": 0.02}
    layers = [{"name": f"layer{i}.conv", **layer} for i in range(50)]
    long = "step,train_loss\n" + "\n".join(f"{i},{1 + i % 7}" for i in range(5_000))
    sources = [write_run(tmp_path / str(i), record(f"method {i}", layers=layers), long) for i in range(8)]
    network = nn.Sequential(nn.Flatten(), nn.Linear(3 * 128 * 128, 4), nn.Softplus(), nn.Linear(4, 3)).eval()
    images, labels = torch.rand(8, 3, 128, 128), torch.arange(8) % 3
    networks = dict.fromkeys(sources, network)
    page = write_report(sources, tmp_path / "page.html", images=images, labels=labels, networks=networks)
    assert page.stat().st_size < 5_000_000


def test_one_of_each_class_first():
    assert one_of_each_class(torch.tensor([1, 1, 1, 0, 2, 0]), 5) == [3, 0, 4, 5, 1]


BAD = [
    ("{", "is no valid JSON"),
    ("[]", "is no evaluation record"),
    ('{"schema": 2}', r"has schema 2, this version reads 1"),
    ('{"schema": 1, "curvature": 3}', "`curvature` must be an object, got int"),
    ('{"schema": 1, "gradient_change": {"far": 1}}', "keys of `gradient_change` must be radii, got far"),
    ('{"schema": 1, "layers": [3]}', "`layers` must be a list of objects"),
    ('{"schema": 1, "layers": [{}]}', "`layers` must have a `name`"),
]


@pytest.mark.parametrize(("content", "message"), BAD, ids=[message for _, message in BAD])
def test_damaged_records(tmp_path, content, message):
    source = write_run(tmp_path / "run", {})
    (source / "evaluation.json").write_text(content)
    with pytest.raises(ValueError, match=message) as caught:
        write_report([source], tmp_path / "page.html")
    assert "\n" not in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


def test_damaged_history_and_settings(tmp_path):
    source = write_run(tmp_path / "run", record("a"))
    (source / "history.csv").write_bytes(b"step,loss\n1,\xff\xfe\n")
    with pytest.raises(ValueError, match=r"history\.csv cannot be read as a table"):
        write_report([source], tmp_path / "page.html")
    (source / "history.csv").write_text("")
    (source / "run.json").write_text("[1]")
    with pytest.raises(ValueError, match=r"run\.json must hold a JSON object, got list"):
        write_report([source], tmp_path / "page.html")
    (source / "run.json").unlink()
    assert write_report([source], tmp_path / "page.html").exists()


def test_outputs_that_cannot_be_written(tmp_path, monkeypatch):
    source = write_run(tmp_path / "run", record("a"))
    with pytest.raises(IsADirectoryError, match=r"must be a file, .* is a folder; try .*report\.html"):
        write_report([source], source)
    with pytest.raises(OSError, match=r"cannot write to .*evaluation\.json"):
        write_report([source], source / "evaluation.json" / "page.html")

    def read_only(**_):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("tempfile.TemporaryFile", read_only)
    with pytest.raises(OSError, match=r"cannot write to .*Read-only file system"):
        write_report([source], tmp_path / "new" / "page.html")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


def test_an_interrupted_write_leaves_the_old_page(tmp_path, monkeypatch):
    source, page = write_run(tmp_path / "run", record("a")), tmp_path / "page.html"
    page.write_text("old")

    def full_disk(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full_disk)
    with pytest.raises(OSError, match="No space left"):
        write_report([source], page)
    assert page.read_text() == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["page.html", "run"]


def test_bad_arguments(tmp_path):
    with pytest.raises(ValueError, match="`sources` must hold at least one"):
        write_report([], tmp_path / "page.html")
    with pytest.raises(TypeError, match="`sources` must be a list of paths"):
        write_report(str(tmp_path), tmp_path / "page.html")
    with pytest.raises(FileNotFoundError, match="there is no file or folder nowhere"):
        write_report(["nowhere"], tmp_path / "page.html")
    source = write_run(tmp_path / "run", record("a"))
    with pytest.raises(ValueError, match="`images` and `labels` must be given together"):
        write_report([source], tmp_path / "page.html", images=torch.rand(1, 1, 2, 2))
    with pytest.raises(ValueError, match=r"`images` must have shape \(N, C, H, W\) with one label each, got \(2, 2\)"):
        write_report([source], tmp_path / "page.html", images=torch.rand(2, 2), labels=torch.zeros(2))
