"""What several test files use: images, options of a short run, a run's files read again.

Lets tests import the top level's modules; one thread for torch, fastest for tiny tensors. Take from
here by `from conftest import make_tree`; fixtures need no import.
"""

import csv
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
torch.set_num_threads(1)

import auxiliaries
import evaluate
import main


def pytest_configure(config):
    """torchvision says at each JPEG that it will drop its decoder, which datasets is ready for."""
    config.addinivalue_line("filterwarnings", "ignore:The image decoding:DeprecationWarning")


def pytest_runtest_makereport(item, call):
    """Ctrl-C that a run within a test has taken, and ended with, ends pytest too."""
    if call.excinfo and getattr(call.excinfo.value, "code", None) == 130:
        item.session.shouldstop = "stopped by Ctrl-C"


# ---- images


def make_tree(folder, sizes=(6,) * 8, seed=0, spread=100):
    """Class folders with so many images each, noise around the class's colour -> the folder."""
    generator = np.random.default_rng(seed)
    for label, size in enumerate(sizes):
        (folder / f"class_{label:02d}").mkdir(parents=True)
        colour = generator.integers(0, 256, 3)
        for i in range(size):
            pixels = (colour + generator.normal(0, spread, (20, 20, 3))).clip(0, 255)
            Image.fromarray(pixels.astype(np.uint8)).save(folder / f"class_{label:02d}/{i}.png")
    return folder


def make_vehicle_id(folder):
    """VehicleID's layout, four images of each of a few vehicles in its four lists -> options."""
    root, number = folder / "vehicle_id", 0
    for name in ("image", "train_test_split"):
        (root / name).mkdir(parents=True)
    for name, vehicles in (("train_list", 5), ("test_list_800", 2), ("test_list_1600", 3),
                           ("test_list_2400", 4)):
        lines = []
        for vehicle in [vehicle for vehicle in range(vehicles) for _ in range(4)]:
            number += 1
            Image.new("RGB", (20, 20), (40 * vehicle, number, 90)).save(
                root / f"image/{number:07d}.jpg")
            lines.append(f"{number:07d} {vehicle + 1}\n")
        (root / f"train_test_split/{name}.txt").write_text("".join(lines))
    return ["--dataset", "vehicle_id", "--source_path", str(folder)]


def make_in_shop(folder):
    """In-Shop's layout: four training items, two of queries and gallery -> options."""
    root, lines = folder / "in-shop", []
    (root / "Eval").mkdir(parents=True)
    for item in range(6):
        for i in range(4):
            name = f"img/WOMEN/Tees/id_{item:08d}/0{i}_1_front.jpg"
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (20, 20), (40 * item, 60 * i, 90)).save(root / name)
            lines.append(f"{name} id_{item:08d} "
                         f"{'train' if item < 4 else ('query', 'gallery')[i % 2]}\n")
    (root / "Eval/list_eval_partition.txt").write_text(
        f"{len(lines)}\nimage_name item_id evaluation_status\n" + "".join(lines))
    return ["--dataset", "in-shop", "--source_path", str(folder)]


@pytest.fixture(scope="session")
def tree(tmp_path_factory):
    """Eight classes of six images; four train."""
    return make_tree(tmp_path_factory.mktemp("data") / "tree")


# ---- runs


def draw_quickly(path, *_, **__):
    """In place of evaluate.draw_recoveries, whose picture takes as long as the rest of a run."""
    with auxiliaries.written_whole(path) as file:
        Image.new("RGB", (1, 1)).save(file, "png")


def options_of(tree, save_path):
    """Options of a run of three iterations in a fraction of a second, in save_path/folder/run."""
    return ["--dataset", "folder", "--source_path", str(tree), "--arch", "convnet", "--gpu", "-1",
            "--image_size", "16", "--embed_dim", "8", "--bs", "8", "--n_epochs", "1",
            "--kernels", "0", "--k_vals", "1", "2", "--lr", "1e-3",
            "--save_path", str(save_path), "--savename", "run"]


@pytest.fixture
def small(tree, tmp_path, monkeypatch):
    """options_of a run in tmp_path/runs, without its picture of neighbours."""
    monkeypatch.setattr(evaluate, "draw_recoveries", draw_quickly)
    return options_of(tree, tmp_path / "runs")


def rows(folder, name="log_val_Base.csv"):
    """A run's csv as [{column: number, None where it is empty}]."""
    with open(Path(folder) / name) as file:
        return [{key: float(value) if value else None for key, value in row.items()}
                for row in csv.DictReader(file)]


class Malicious:
    """An object whose unpickling makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def state(folder, name="checkpoint.pth.tar"):
    """What a run's checkpoint holds."""
    return torch.load(Path(folder) / name, weights_only=True)


def error_of(options, capsys):
    """Runs main on bad input: it must end with a status and one message, which is returned."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main.main(options)
    message = capsys.readouterr().err if isinstance(stop.value.code, int) else stop.value.code
    assert stop.value.code not in (0, None) and "Traceback" not in message
    return message
