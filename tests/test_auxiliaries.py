"""What a run leaves behind and says: whole files, checkpoints, plots, progress, messages."""

import contextlib
import csv
import errno
import io
import os
import pickle
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from PIL import Image
from torch._utils import ExceptionWrapper

import auxiliaries
import datasets
import evaluate
import images
import main
import results

# ---- files


def test_a_file_appears_once_it_is_complete(tmp_path):
    path = tmp_path / "a.txt"
    for content in (b"first", b"second"):
        before = path.read_bytes() if path.exists() else None
        with auxiliaries.written_whole(path) as file:
            file.write(content)
            file.flush()
            assert (path.read_bytes() if path.exists() else None) == before
        assert path.read_bytes() == content
    assert os.listdir(tmp_path) == ["a.txt"]


def test_text_is_written_as_it_is(tmp_path):
    with auxiliaries.written_whole(tmp_path / "a.txt", "w") as file:
        file.write("größer\n")
    assert (tmp_path / "a.txt").read_bytes() == "größer\n".encode()


@pytest.mark.parametrize("crash", [KeyError("a"), KeyboardInterrupt(), SystemExit(1),
                                   torch.OutOfMemoryError("b"), OSError(5, "Input/output error")])
@pytest.mark.parametrize("existed", [True, False])
def test_a_crash_leaves_the_old_file_and_no_other(crash, existed, tmp_path):
    path = tmp_path / "a.txt"
    if existed:
        path.write_text("old")
    with pytest.raises(BaseException) as caught, auxiliaries.written_whole(path) as file:
        file.write(b"half of the ne")
        raise crash
    assert caught.value is crash or caught.value.__cause__ is crash
    assert os.listdir(tmp_path) == ["a.txt"] * existed
    assert not existed or path.read_text() == "old"


WRITERS = {
    "checkpoint": lambda path: auxiliaries.save_checkpoint(path, {"a": torch.zeros(5000)}),
    "csv": lambda path: auxiliaries.save_csv(path, [{"epoch": 1}]),
    "plot": lambda path: auxiliaries.save_plot(path, ["title"], [("loss", {"a": [(1, 2)]})]),
    "scatter": lambda path: auxiliaries.save_scatter(path, ["title"], [(0, 0), (1, 2)], ["a", "b"]),
    "grid": lambda path: auxiliaries.save_image_grid(path, [[(Image.new("L", (9, 9)), "hit")]]),
    "options": lambda path: results.save_options(os.path.dirname(path), {"a": 1}),
}


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("when", ["written", "flushed", "synced", "renamed"])
def test_a_full_disk_is_an_os_error_with_the_path(writer, when, tmp_path, monkeypatch):
    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    def opened(path, mode, **options):
        file = open(path, mode, **options)
        broken = SimpleNamespace(write=file.write, writelines=file.writelines, flush=file.flush,
                                 fileno=file.fileno)
        for name in ("write", "writelines") if when == "written" else ("flush",):
            setattr(broken, name, full)

        class Opened:
            def __enter__(self):
                return broken

            def __exit__(self, *error):
                file.close()

        return Opened()

    path = tmp_path / "hypa.pkl"  # save_options chooses its own names, this is one of them
    path.write_text("old")
    if when in ("written", "flushed"):
        monkeypatch.setattr(auxiliaries, "open", opened, raising=False)
    else:
        monkeypatch.setattr(auxiliaries.os, "fsync" if when == "synced" else "replace", full)
    with pytest.raises(OSError) as caught:
        WRITERS[writer](str(path))
    assert str(path) in str(caught.value) and "No space left" in str(caught.value)
    assert "--save_path" in str(caught.value)
    assert os.listdir(tmp_path) == ["hypa.pkl"] and path.read_text() == "old"


@pytest.mark.parametrize("writer", [name for name in WRITERS if name != "options"])
def test_a_place_that_cannot_be_written_is_named(writer, tmp_path):
    for path in (tmp_path / "no folder/a", tmp_path / "a folder"):
        (tmp_path / "a folder").mkdir(exist_ok=True)
        with pytest.raises(OSError, match=re.escape(str(path))):
            WRITERS[writer](str(path))
    assert os.listdir(tmp_path) == ["a folder"] and os.listdir(tmp_path / "a folder") == []


def test_a_run_folder_is_made_new(tmp_path):
    folder = results.make_run_folder(str(tmp_path / "deep/results"), "cub200", "trial")
    assert folder == str(tmp_path / "deep/results/cub200/trial") and os.listdir(folder) == []


def test_a_run_without_a_name_is_called_by_its_time(tmp_path):
    folder = results.make_run_folder(str(tmp_path), "glyphs")
    assert re.fullmatch(r"\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d", os.path.basename(folder))
    assert os.path.isdir(folder)


def test_a_run_folder_that_exists_is_refused(tmp_path):
    folder = results.make_run_folder(str(tmp_path), "cub200", "trial")
    with pytest.raises(ValueError, match="--savename") as caught:
        results.make_run_folder(str(tmp_path), "cub200", "trial")
    assert folder in str(caught.value) and "--resume" in str(caught.value)
    (tmp_path / "cub200/a file").write_text("")
    with pytest.raises(ValueError, match="a file"):
        results.make_run_folder(str(tmp_path), "cub200", "a file")


def test_resume_takes_a_folder_that_exists(tmp_path):
    folder = results.make_run_folder(str(tmp_path), "cub200", "trial")
    assert results.make_run_folder(str(tmp_path), "cub200", "trial", resume=True) == folder
    with pytest.raises(FileNotFoundError, match="other"):
        results.make_run_folder(str(tmp_path), "cub200", "other", resume=True)
    for name in ("", ".", "..", "a/b"):
        with pytest.raises(ValueError, match="--savename"):
            results.make_run_folder(str(tmp_path), "cub200", name, resume=True)
    assert os.listdir(tmp_path / "cub200") == ["trial"]


def test_a_save_path_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="--save_path .*file"):
        results.make_run_folder(str(tmp_path / "file"), "cub200", "trial")


def test_a_dataset_folder_that_is_a_file_is_refused_without_speaking_of_a_run(tmp_path):
    (tmp_path / "cub200").write_text("")
    with pytest.raises(OSError, match="--save_path"):
        results.make_run_folder(str(tmp_path), "cub200", "trial")


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_save_path_is_refused(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(OSError, match="--save_path"):
        results.make_run_folder(str(tmp_path), "cub200", "trial")


# ---- checkpoints

STATE = {"epoch": 3, "options": {"lr": 1e-5, "tau": [30, 55], "savename": None, "resume": False},
         "models": {"trunk": {"weight": torch.arange(6.).view(2, 3)}},
         "optimizers": {"state": {0: {"step": torch.tensor(4.)}}, "betas": (0.9, 0.999)},
         "rows": [{"epoch": 1, "recall@1": 0.5}], "random_state": auxiliaries.random_state()}


def same(a, b):
    """Whether two structures of containers, tensors and plain values are equal."""
    if torch.is_tensor(a):
        return torch.is_tensor(b) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


def test_a_checkpoint_comes_back(tmp_path):
    path = str(tmp_path / "checkpoint.pth.tar")
    auxiliaries.save_checkpoint(path, STATE)
    assert same(auxiliaries.load_checkpoint(path, list(STATE)), STATE)
    assert same(torch.load(path, weights_only=True), STATE)
    assert os.listdir(tmp_path) == ["checkpoint.pth.tar"]


def test_a_checkpoint_that_is_not_there_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing.pth"):
        auxiliaries.load_checkpoint(str(tmp_path / "nothing.pth"), ["epoch"])


class Malicious:
    """An object whose unpickling makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("how", ["pickle", "zip", "old"])
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_code_in_a_checkpoint_does_not_run(how, tmp_path):
    path, state = tmp_path / "last.pth.tar", {"epoch": 1, "other": Malicious(tmp_path / "it_ran")}
    if how == "pickle":
        path.write_bytes(pickle.dumps(state))
    else:
        torch.save(state, path, _use_new_zipfile_serialization=how == "zip")
    with pytest.raises(ValueError, match="last.pth.tar"):
        auxiliaries.load_checkpoint(str(path), ["epoch"])
    assert os.listdir(tmp_path) == ["last.pth.tar"]


@pytest.mark.parametrize("share", [0, 0.001, 0.1, 0.5, 0.9, 0.99, 0.999])
def test_a_cut_checkpoint_is_refused(share, tmp_path):
    path = tmp_path / "last.pth.tar"
    auxiliaries.save_checkpoint(str(path), STATE)
    content = path.read_bytes()
    path.write_bytes(content[:int(len(content) * share)])
    with pytest.raises(ValueError, match="last.pth.tar") as caught:
        auxiliaries.load_checkpoint(str(path), ["epoch"])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [
    {"weight": torch.zeros(2)}, torch.zeros(3), [1, 2], "epoch options", 5, None, {},
    torch.nn.Linear(2, 2)], ids=lambda content: type(content).__name__)
def test_a_file_of_something_else_is_no_checkpoint(content, tmp_path):
    path = str(tmp_path / "last.pth.tar")
    torch.save(content, path)
    with pytest.raises(ValueError, match="last.pth.tar"):
        auxiliaries.load_checkpoint(path, ["epoch", "options"])


def test_text_and_folders_are_no_checkpoints(tmp_path):
    (tmp_path / "text").write_text("epoch: 3\n")
    for path in (tmp_path / "text", tmp_path):
        with pytest.raises(ValueError, match=re.escape(str(path))):
            auxiliaries.load_checkpoint(str(path), ["epoch"])


# ---- options and tables


def test_options_are_saved_for_programs_and_for_people(tmp_path):
    options = {"lr": 1e-5, "dataset": "cub200", "tau": [30, 55], "savename": None, "resume": False}
    results.save_options(str(tmp_path), options)
    with open(tmp_path / "hypa.pkl", "rb") as file:
        assert pickle.load(file) == options
    assert (tmp_path / "Parameter_Info.txt").read_text().splitlines() == [
        "dataset: cub200", "lr: 1e-05", "resume: False", "savename: None", "tau: [30, 55]"]
    assert sorted(os.listdir(tmp_path)) == ["Parameter_Info.txt", "hypa.pkl"]


def read_csv(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.reader(file))


def test_a_table_has_the_columns_of_all_rows(tmp_path):
    path = str(tmp_path / "log.csv")
    auxiliaries.save_csv(path, [{"epoch": 1, "loss": 0.5}, {"epoch": 2, "nmi": 0.25, "loss": 1},
                                {"epoch": 3, "a, \"b\"": "é"}])
    assert read_csv(path) == [["epoch", "loss", "nmi", "a, \"b\""], ["1", "0.5", "", ""],
                              ["2", "1", "0.25", ""], ["3", "", "", "é"]]


def test_a_table_without_rows_is_a_file(tmp_path):
    auxiliaries.save_csv(str(tmp_path / "log.csv"), [])
    assert (tmp_path / "log.csv").read_text().split() == ["epoch"]  # readable as a table


# ---- seeds, devices, versions


def test_the_same_seed_gives_the_same_numbers():
    def numbers(seed):
        auxiliaries.seed_everything(seed)
        return torch.rand(4).tolist() + np.random.rand(4).tolist()

    assert numbers(3) == numbers(3) != numbers(4)
    assert numbers(2 ** 32 - 1) == numbers(2 ** 32 - 1)


def test_the_random_state_comes_back(tmp_path):
    torch.manual_seed(4)
    torch.rand(3)
    path = str(tmp_path / "state.pth")
    auxiliaries.save_checkpoint(path, {"random_state": auxiliaries.random_state()})
    expected = torch.rand(5)
    torch.manual_seed(9)
    state = auxiliaries.load_checkpoint(path, ["random_state"])["random_state"]
    auxiliaries.restore_random_state(state)
    assert torch.equal(torch.rand(5), expected)


def test_a_missing_gpu_is_said_in_one_line(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert auxiliaries.select_device(0) == torch.device("cpu")
    output = capsys.readouterr().out
    assert output.count("\n") == 1 and "--gpu 0" in output and "CPU" in output


def test_the_cpu_may_be_asked_for(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert auxiliaries.select_device(-1) == torch.device("cpu")
    assert capsys.readouterr().out == ""


def test_a_gpu_is_chosen_by_its_number(monkeypatch):
    chosen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    assert auxiliaries.select_device(1) == torch.device("cuda", 1) and chosen == [1]
    with pytest.raises(ValueError, match="--gpu 2"):
        auxiliaries.select_device(2)


def test_versions_are_one_line():
    line = auxiliaries.versions(torch.device("cpu"))
    assert f"torch {torch.__version__}" in line and "CPU" in line and "\n" not in line


# ---- progress


class Stream(io.StringIO):
    """A stream that is a terminal or not."""

    def __init__(self, terminal):
        super().__init__()
        self.terminal = terminal

    def isatty(self):
        return self.terminal


@pytest.fixture
def clock(monkeypatch):
    """A clock that the test moves: clock.now, in seconds."""
    clock = SimpleNamespace(now=1000.0)
    monkeypatch.setattr(results, "time", SimpleNamespace(monotonic=lambda: clock.now))
    return clock


def test_progress_is_a_plain_line_a_minute_where_there_is_no_terminal(clock):
    progress = results.Progress(2, 10, stream := Stream(terminal=False))
    for iteration in range(50):
        clock.now += 10
        progress.update(1, iteration, 50, 0.5)
    progress.pause("epoch 1: evaluating")
    for done in range(0, 60502, 4096):
        clock.now += 25
        progress.count(done, 60502)
    progress.write("")
    lines = stream.getvalue().splitlines()
    assert lines[0] == "epoch 1/2  iteration 6/50  loss 0.5000  1 images/s  15m 40s left"
    assert len([line for line in lines if "iteration" in line]) == 8  # in 500 seconds
    assert lines[8:11] == [f"epoch 1: evaluating {done} of 60,502"
                           for done in ("4,096", "16,384", "28,672")]
    assert "\r" not in stream.getvalue()


def test_the_progress_line_is_cut_to_the_width_of_the_terminal(clock, monkeypatch):
    monkeypatch.setenv("COLUMNS", "30")
    progress = results.Progress(2, 10, stream := Stream(terminal=True))
    clock.now += 1
    progress.update(1, 0, 5, 0.5)
    progress.pause("epoch 1: evaluating")
    clock.now += 1
    progress.count(12288, 60502)
    assert stream.getvalue().split("\r")[1:] == [
        "epoch 1/2  iteration 1/5  los", "epoch 1: evaluating".ljust(29),
        "epoch 1: evaluating 12,288 of"]


def test_progress_says_rate_and_time_left(clock):
    stream = Stream(terminal=True)
    progress = results.Progress(num_epochs=2, images_per_iteration=10, stream=stream)
    for iteration in range(3):
        clock.now += 2
        progress.update(1, iteration, 50, torch.tensor(0.25))
    line = stream.getvalue().split("\r")[-1]
    assert "epoch 1/2" in line and "iteration 3/50" in line and "loss 0.2500" in line
    assert "5 images/s" in line and "3m 14s left" in line  # 97 iterations of 2 s
    assert "\n" not in stream.getvalue()


def test_progress_counts_the_epochs_that_were_resumed_as_done(clock):
    stream = Stream(terminal=True)
    progress = results.Progress(num_epochs=10, images_per_iteration=4, stream=stream)
    clock.now += 1
    progress.update(10, 0, 5, 1.0)
    assert "4 images/s" in stream.getvalue() and "4s left" in stream.getvalue()


@pytest.mark.parametrize("epochs, every, epoch", [
    (3, 1, 1), (3, 1, 3), (10, 5, 1), (10, 5, 6), (10, 4, 1), (10, 4, 5), (10, 4, 9), (2, 7, 1),
    (7, 7, 1), (8, 7, 8)])
def test_progress_counts_the_pauses_to_come(clock, epochs, every, epoch):
    progress = results.Progress(epochs, 10, stream := Stream(terminal=True),
                                    epochs_per_pause=every)
    assert progress.pause("evaluating") == 0
    clock.now += 1000
    progress.restart()
    clock.now += 2
    progress.update(epoch, 0, 5, 1.0)
    pauses = sum(later % every == 0 or later == epochs for later in range(epoch, epochs + 1))
    seconds = 2 * (5 * (epochs - epoch + 1) - 1) + 1000 * pauses
    assert f" {results.duration(seconds)} left" in stream.getvalue()


def test_progress_reads_the_loss_twice_a_second_at_most(clock):
    read = []

    class Loss:
        def __float__(self):
            read.append(clock.now)
            return 1.0

    progress = results.Progress(1, 10, Stream(terminal=True))
    for iteration in range(400):
        clock.now += 0.01
        progress.update(1, iteration, 400, Loss())
    assert 7 <= len(read) <= 8


def test_a_shorter_line_leaves_nothing_of_the_longer():
    stream = Stream(terminal=True)
    progress = results.Progress(1, 10, stream)
    progress.write("a long line of text")
    progress.write("short")
    assert stream.getvalue().split("\r")[-1] == "short".ljust(len("a long line of text"))
    progress.write("")
    assert stream.getvalue().endswith("\r")  # what is printed next starts at the left


@pytest.mark.parametrize("seconds, text", [
    (0, "0s"), (7.4, "7s"), (59.4, "59s"), (59.6, "1m 00s"), (200, "3m 20s"), (3599.7, "1h 00m"),
    (7500, "2h 05m"), (100 * 3600, "100h 00m")])
def test_duration(seconds, text):
    assert results.duration(seconds) == text


# ---- plots

SVG = "{http://www.w3.org/2000/svg}"


def plot(tmp_path, panels, title=("title",)):
    """The root element of a plot that was saved."""
    auxiliaries.save_plot(str(tmp_path / "plot.svg"), list(title), panels)
    return ElementTree.parse(tmp_path / "plot.svg").getroot()


def texts(root):
    return [element.text for element in root.iter(f"{SVG}text")]


def test_a_plot_shows_titles_panels_curves_and_last_values(tmp_path):
    panels = [("training loss", {"total": [(1, 4.0), (2, 2.5), (3, 1.25)]}),
              ("metrics", {"recall@1": [(0, 0.1), (3, 0.75)], "nmi": [(0, 0.2), (3, 0.625)]})]
    root = plot(tmp_path, panels, ("run: best 0.75", "second line"))
    shown = texts(root)
    for text in ("run: best 0.75", "second line", "training loss", "metrics", "total 1.25",
                 "recall@1 0.75", "nmi 0.625", "epoch"):
        assert text in shown
    assert len(root.findall(f".//{SVG}polyline")) == 3
    assert len(root.findall(f".//{SVG}circle")) == 7
    assert len({line.get("stroke") for line in root.iter(f"{SVG}polyline")}) == 2


def test_curves_lie_within_the_axes_and_the_right_way_up(tmp_path):
    root = plot(tmp_path, [("loss", {"a": [(1, 4.0), (2, -3.0), (5, 1.0)]})])
    points = [tuple(map(float, point.split(","))) for point in
              root.find(f".//{SVG}polyline").get("points").split()]
    assert points[0][0] < points[1][0] < points[2][0]
    assert points[0][1] < points[2][1] < points[1][1]  # pixels count downwards
    axes = root.find(f".//{SVG}path").get("d")
    left, top, bottom, right = map(float, re.findall(r"[\d.]+", axes))
    for x, y in points:
        assert left <= x <= right and top <= y <= bottom
    assert right < float(root.get("width")) and bottom < float(root.get("height"))


@pytest.mark.parametrize("value", [0.542987, 0.0, -3.0, 1e-9, 123456.7])
def test_one_point_has_an_axis_with_room_around_it(value, tmp_path):
    root = plot(tmp_path, [("metrics", {"recall@1": [(0, value)]})])
    circle = root.find(f".//{SVG}circle")
    left, top, bottom, right = map(float, re.findall(
        r"[\d.]+", root.find(f".//{SVG}path").get("d")))
    assert top + 20 < float(circle.get("cy")) < bottom - 20
    labels = [text.text for text in root.iter(f"{SVG}text") if text.get("text-anchor") == "end"]
    assert 3 <= len(labels) == len(set(labels))
    assert float(labels[0]) < value < float(labels[-1])
    assert texts(root).count("last epoch:") == 1


def test_markup_in_names_is_escaped(tmp_path):
    name = "a < b & \"c\" > 'd' ]]> <script/> é"
    root = plot(tmp_path, [(name, {name: [(1, 2)]})], (name,))
    assert texts(root).count(name) == 2 and f"{name} 2" in texts(root)


@pytest.mark.parametrize("points", [
    [], [(1, 0.5)], [(1, 2.0), (2, 2.0), (3, 2.0)], [(1, 0), (2, 0)], [(0, 1e-9), (70, 2e-9)],
    [(1, -5.0), (2, -5.0)], [(1, 3e38), (2, 1.0)], [(5, 1e6)], [(1, 123456.7), (2, 123456.8)],
    [(i, float(i)) for i in range(1000)], [(np.int64(1), np.float32(0.1)), (2, np.float64(0.3))]],
    ids=lambda points: str(points[:2]).replace(" ", ""))
def test_a_plot_of_few_or_flat_points_is_drawn(points, tmp_path):
    root = plot(tmp_path, [("loss", {"a": points}), ("empty", {})])
    assert len(root.findall(f".//{SVG}circle")) == len(points)
    assert not re.search(r"\b(nan|inf)\b", (tmp_path / "plot.svg").read_text())


@pytest.mark.parametrize("broken", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite_are_left_out(broken, tmp_path):
    root = plot(tmp_path, [("loss", {"a": [(1, 1.0), (2, broken), (3, 2.0)], "b": [(1, broken)]})])
    assert len(root.findall(f".//{SVG}circle")) == 2
    assert "a 2" in texts(root) and "b" in texts(root)
    assert not re.search(r"\b(nan|inf)\b", (tmp_path / "plot.svg").read_text())


def test_a_plot_without_panels_is_a_file(tmp_path):
    assert "title" in texts(plot(tmp_path, []))


# ---- points


def scatter(tmp_path, points, names, title="title", **options):
    """The root element of points that were saved."""
    auxiliaries.save_scatter(str(tmp_path / "points.svg"), [title, "second line"], points, names, **options)
    assert not re.search(r"\b(nan|inf)\b", (tmp_path / "points.svg").read_text())
    return ElementTree.parse(tmp_path / "points.svg").getroot()


def groups(root):
    """{name: (colour, [(x, y), ...])} of the points that are drawn, in pixels."""
    found = {}
    for group in root.iter(f"{SVG}g"):
        if (name := group.find(f"{SVG}title")) is not None:
            assert name.text not in found  # one group, so one colour, for each name
            found[name.text] = group.get("fill"), [
                (float(circle.get("cx")), float(circle.get("cy")))
                for circle in group.findall(f"{SVG}circle")]
    return found


def legend(root):
    """{name: colour} of the legend, top to bottom."""
    outer = next(group for group in root.iter(f"{SVG}g") if group.get("transform"))
    shown = [(float(circle.get("cy")), circle.get("fill")) for circle in
             outer.findall(f"{SVG}circle")]
    assert shown == sorted(shown) and len({y for y, _ in shown}) == len(shown)
    for y, _ in shown:
        assert 0 < y < float(root.get("height"))
    return dict(zip([text.text for text in outer.findall(f"{SVG}text")],
                    [colour for _, colour in shown], strict=True))


@pytest.mark.parametrize("scale", [1e-6, 1, 1e6])
@pytest.mark.parametrize("count", [2, 3, 50])
def test_points_keep_their_places_on_one_scale(tmp_path, count, scale):
    generator = np.random.default_rng(count)
    points = (generator.standard_normal((count, 2)) * (1, 3) + 5) * scale
    names = [f"class {i % 3}" for i in range(count)]
    root = scatter(tmp_path, points, names)
    drawn = groups(root)
    assert list(drawn) == sorted(set(names))
    places = np.empty((count, 2))
    for name, (_, circles) in drawn.items():
        places[[i for i in range(count) if names[i] == name]] = circles
    # Pixels are an even stretch of the points, turned over since they count downwards.
    pixels = np.ptp(places, 0).max() / np.ptp(points, 0).max()
    expected = (points - points[0]) * pixels * (1, -1) + places[0]
    np.testing.assert_allclose(places, expected, atol=0.3)
    frame = next(rect for rect in root.iter(f"{SVG}rect") if rect.get("stroke"))
    left, top, width, height = (float(frame.get(key)) for key in ("x", "y", "width", "height"))
    assert (places > (left, top)).all() and (places < (left + width, top + height)).all()
    assert np.ptp(places, 0).max() > 600  # the picture is filled


@pytest.mark.parametrize("count", [1, 2, 10, 11, 20, 21, 100, 2000])
def test_every_name_has_a_colour_and_up_to_20_stand_in_a_legend(tmp_path, count):
    names = [f"class {i:04d}" for i in range(count)] * 2
    random.Random(0).shuffle(names)
    root = scatter(tmp_path, np.random.default_rng(0).random((2 * count, 2)), names)
    drawn = groups(root)
    assert list(drawn) == sorted(set(names))
    assert all(len(circles) == 2 for _, circles in drawn.values())
    colours = {name: colour for name, (colour, _) in drawn.items()}
    assert len(set(colours.values())) == count and None not in colours.values()
    assert legend(root) == (colours if count <= 20 else {})
    assert (float(root.get("width")) > float(root.get("height"))) == (count <= 20)
    assert texts(root)[:2] == ["title", "second line"]
    for colour in colours.values():  # SVG 1.1 knows no hsl(): what it does not know is black
        assert re.fullmatch("#[0-9a-f]{6}", colour) and 0 < int(colour[1:], 16) < 0xffffff


@pytest.mark.parametrize("points", [
    [(3.0, -4.0)], [(0, 0)], [(1e-3, 7)] * 5, [(1e9, 1e9)] * 2, np.zeros((4, 2), np.float32),
    [(0.5, 0.5 + 1e-16)] * 3], ids=lambda points: str(points[:1]).replace(" ", ""))
def test_one_point_and_points_in_one_place_stand_in_the_middle(tmp_path, points):
    root = scatter(tmp_path, points, ["a"] * len(points), size=400)
    assert groups(root) == {"a": (auxiliaries.COLOURS[0], [(200, 200)] * len(points))}


@pytest.mark.parametrize("points", [[(0, 0), (4, 0)], [(0, 0), (0, 4)], [(0, 1), (2, 3), (4, 5)]])
def test_points_on_a_line_are_drawn(tmp_path, points):
    (_, places), = groups(scatter(tmp_path, points, ["a"] * len(points))).values()
    assert np.abs(np.subtract(places[0], places[-1])).max() == 720
    assert len(set(places)) == len(points)


def test_markup_in_names_of_points_is_escaped(tmp_path):
    names = ["a < b & \"c\" > 'd' ]]> <script/> é", "</g></svg>", "&amp;", ""]
    root = scatter(tmp_path, np.eye(4)[:, :2], names, "<b>title</b> & more")
    assert texts(root)[0] == "<b>title</b> & more"
    assert {name or "" for name in groups(root)} == set(names)
    assert {name or "" for name in legend(root)} == set(names)


# ---- ticks


@pytest.mark.parametrize("whole", [False, True])
def test_ticks_enclose_and_are_evenly_spaced(whole):
    generator = random.Random(0)
    for _ in range(3000):
        low = generator.uniform(-1, 1) * 10 ** generator.uniform(-9, 9)
        high = low + generator.random() * 10 ** generator.uniform(-9, 9)
        if whole:
            low, high = round(low), round(high)
        marks = auxiliaries.ticks(low, high, whole)
        steps = np.diff(marks)
        step = (marks[-1] - marks[0]) / len(steps)
        assert 2 <= len(marks) <= 9, (low, high, marks)
        assert step > 0 and np.allclose(steps, step, rtol=1e-3), (low, high, marks)
        slack = 1e-6 * step
        assert marks[0] <= low + slack and marks[-1] >= high - slack, (low, high, marks)
        assert not whole or all(mark == int(mark) for mark in marks)


@pytest.mark.parametrize("low, high, marks", [
    (0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]), (0, 70, [0, 20, 40, 60, 80]), (0.1, 0.3, None),
    (1, 1, None)])
def test_ticks_are_round(low, high, marks):
    drawn = auxiliaries.ticks(low, high)
    assert marks is None or drawn == marks
    assert all(len(f"{mark:g}") <= 8 for mark in drawn)


# ---- pictures

COLOURS = {"query": (214, 39, 40), "hit": (44, 160, 44), "miss": (120, 120, 120)}


def bounds(pixels, colour):
    """(top, left, bottom, right) of the pixels of a colour."""
    rows, columns = np.nonzero((pixels == colour).all(2))
    return rows.min(), columns.min(), rows.max(), columns.max()


def test_frames_tell_queries_hits_and_misses(tmp_path):
    fills = {"query": (0, 0, 255), "hit": (0, 255, 255), "miss": (255, 255, 0)}
    row = [(Image.new("RGB", (40, 40), fills[role]), role) for role in COLOURS]
    auxiliaries.save_image_grid(str(tmp_path / "grid.png"), [row])
    with Image.open(tmp_path / "grid.png") as image:
        assert image.format == "PNG" and image.mode == "RGB"
        pixels = np.asarray(image).astype(int)
    lefts = []
    for role, colour in COLOURS.items():
        top, left, bottom, right = bounds(pixels, fills[role])
        assert bottom - top == right - left == 111
        y, x = (top + bottom) // 2, (left + right) // 2
        for beside in ((top - 1, x), (bottom + 1, x), (y, left - 1), (y, right + 1),
                       (bottom + 1, right + 1)):
            assert tuple(pixels[beside]) == colour
        lefts.append(left)
        inside = pixels[top:bottom + 1, left:right + 1]
        assert (inside == (255, 255, 255)).all(2).any() == (role == "miss")  # the cross
    assert lefts == sorted(lefts) and lefts[0] < lefts[1]


@pytest.mark.parametrize("mode, shape", [("L", (30, 30)), ("RGB", (500, 20)), ("RGB", (1, 400)),
                                         ("RGB", (1, 1)), ("RGBA", (64, 112)), ("RGB", (113, 1))])
def test_pictures_of_any_shape_keep_their_proportions(mode, shape, tmp_path):
    colour = 200 if mode == "L" else (10, 20, 200, 255)[:len(mode)]
    row = [(Image.new(mode, shape, colour), "query")]
    auxiliaries.save_image_grid(str(tmp_path / "grid.png"), [row])
    with Image.open(tmp_path / "grid.png") as image:
        pixels = np.asarray(image).astype(int)
    top, left, bottom, right = bounds(pixels, COLOURS["query"])
    pixels = pixels[top:bottom + 1, left:right + 1]  # without the legend
    top, left, bottom, right = bounds(pixels, (200,) * 3 if mode == "L" else (10, 20, 200))
    size = np.array([right - left + 1, bottom - top + 1])
    assert size.max() == 112
    assert np.abs(size - np.array(shape) * 112 / max(shape)).max() <= 1
    assert row[0][0].size == shape  # the caller's image is not changed


def test_rows_of_different_lengths_stand_below_each_other(tmp_path):
    blue = Image.new("RGB", (8, 8), (0, 0, 255))
    rows = [[(blue, "query"), (blue, "hit")], [(blue, "query")],
            [(blue, "query"), (blue, "miss"), (blue, "hit")]]
    auxiliaries.save_image_grid(str(tmp_path / "grid.png"), rows, size=16)
    with Image.open(tmp_path / "grid.png") as image:
        pixels = np.asarray(image).astype(int)
    red = np.flatnonzero((pixels == COLOURS["query"]).all(2).any(1))
    assert 1 + (np.diff(red) > 1).sum() == 3
    below = pixels[red.min():]
    assert (below[-1] == 255).all() and (below[:, -1] == 255).all()  # nothing is cut off


# ---- messages


def from_loading_process(function):
    """The error that the program meets where function() raises one in a loading process."""
    try:
        function()
    except Exception:
        wrapped = ExceptionWrapper(where="in DataLoader worker process 0")  # as the process does
    with pytest.raises(Exception) as caught:
        wrapped.reraise()
    return caught.value


def fail(error):
    raise error


def unpack():
    first, second, third = 1, 2


def missing_image():
    images.read_image("birds/a: b.jpg")


def ended_by(error):
    """How one_message ends where an error is raised in it; the error itself where it passes."""
    with pytest.raises(BaseException) as caught, auxiliaries.one_message("main.py"):
        fail(error) if isinstance(error, BaseException) else error()
    return caught.value.code if isinstance(caught.value, SystemExit) else caught.value


@pytest.mark.parametrize("loading", [False, True])
def test_an_error_on_purpose_is_one_sentence(loading):
    error = from_loading_process(missing_image) if loading else missing_image
    assert ended_by(error) == "main.py: error: birds/a: b.jpg: the image is not there"


def test_escapes_of_a_name_never_reach_the_terminal():
    said = ended_by(lambda: images.read_image("a\x1b[2J\n\udcff.jpg"))
    assert said == r"main.py: error: a\x1b[2J\n\udcff.jpg: the image is not there"


@pytest.mark.parametrize("slip", [unpack, lambda: open("/nowhere/at all"),
                                  lambda: fail(FloatingPointError("of one's own")),
                                  lambda: np.zeros(3).reshape(2)])
def test_any_other_error_keeps_its_traceback(slip):
    assert not isinstance(ended_by(slip), (str, int))
    said = ended_by(from_loading_process(slip))
    assert said.startswith("main.py: error in another process\nTraceback (most recent call last):")
    assert __file__ in said and "Caught" not in said


@pytest.mark.parametrize("text", [
    "deterministic_x/a.jpg", "DataLoader worker", "/data/DataLoader worker (pid 3)/x"])
def test_words_in_a_text_choose_no_advice(text):
    assert ended_by(RuntimeError(text)).args == (text,)
    said = ended_by(from_loading_process(lambda: fail(RuntimeError(text))))
    assert said.endswith(f"RuntimeError: {text}")


@pytest.mark.parametrize("number", [errno.EACCES, errno.ENOSPC])
def test_what_the_machine_refuses_is_one_sentence(number):
    said = ended_by(OSError(number, os.strerror(number), "/a/file"))
    assert said == f"main.py: error: [Errno {number}] {os.strerror(number)}: '/a/file'"


def test_ctrl_c_is_one_line(capsys):
    assert ended_by(KeyboardInterrupt()) == 130
    assert capsys.readouterr().err == "main.py: stopped by SIGINT\n"
    assert ended_by(auxiliaries.Stopped(signal.SIGTERM)) == 143
    assert capsys.readouterr().err == "main.py: stopped by SIGTERM\n"


class TwoProcesses:
    """In place of torch.distributed: what the first process sends, the second receives."""

    sent = None

    def __init__(self, number, monkeypatch):
        monkeypatch.setattr(auxiliaries, "num_ranks", lambda: 2)
        monkeypatch.setattr(auxiliaries, "rank", lambda: number)
        monkeypatch.setattr(torch.distributed, "broadcast_object_list", self.broadcast)

    def broadcast(self, box, src):
        if auxiliaries.rank() == 0:
            TwoProcesses.sent = pickle.dumps(box)
        else:
            box[:] = pickle.loads(TwoProcesses.sent)


def test_all_processes_say_of_the_firsts_error_what_it_says(monkeypatch):
    for function in (missing_image, unpack):
        said = []
        for number in (0, 1):
            TwoProcesses(number, monkeypatch)
            said.append(ended_by(lambda: auxiliaries.from_first(function)))
        if function is missing_image:
            assert said[0] == said[1] == "main.py: error: birds/a: b.jpg: the image is not there"
        else:
            assert isinstance(said[0], ValueError)
            assert said[1].startswith("main.py: error in another process\nTraceback")
            assert "in unpack\n" in said[1] and said[1].endswith("(expected 3, got 2)")


# ---- command lines

PROGRAMS = {"main.py": main.main, "datasets.py": datasets.main, "evaluate.py": evaluate.main,
            "results.py": results.main}


def mistyped(program, arguments, capsys):
    """What a program says of a command line that it ends on."""
    with pytest.raises(SystemExit) as stop:
        PROGRAMS[program](arguments)
    assert stop.value.code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize("program, arguments, said", [
    ("main.py", "--datset glyphs", "unrecognized arguments: --datset glyphs; did you mean "
                                   "--dataset?"),
    ("main.py", "--n_epoch 3", "unrecognized arguments: --n_epoch 3; did you mean --n_epochs?"),
    ("main.py", "--dataset=glyph", "argument --dataset: invalid choice: 'glyph' (choose from "
                                   ".*); did you mean glyphs?"),
    ("main.py", "--loss tripelt", "argument --loss: invalid choice: .*; did you mean triplet?"),
    ("main.py", "--lr fast", "--lr fast: it must be a finite number at least 0 and .*;"),
    ("main.py", "glyphs", "unrecognized arguments: glyphs;"),
    ("main.py", "--tau", "argument --tau: expected at least one argument;"),
    ("datasets.py", "--downlaod", "unrecognized arguments: --downlaod; did you mean --download?"),
    ("evaluate.py", "a.npz --galery b.npz", "unrecognized arguments: --galery b.npz; did you mean "
                                            "--gallery?"),
    ("results.py", "tabel", "argument command: invalid choice: 'tabel' .*; did you mean "
                                "table?")])
def test_a_mistyped_command_line_is_one_line_with_the_nearest(program, arguments, said, capsys):
    message = mistyped(program, arguments.split(), capsys)
    assert re.fullmatch(re.escape(f"{program}: error: {said} --help lists all\n").replace(
        r"\.\*", ".*"), message)


def test_the_flags_of_a_subcommand_are_near_too(capsys):
    assert mistyped("results.py", ["table", "--fromat", "csv"], capsys) == (
        "results.py table: error: unrecognized arguments: --fromat; did you mean --format? "
        "--help lists all\n")


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_reader_that_goes_ends_a_program_quietly(program, monkeypatch, capsys):
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as stream, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", stream)
        with pytest.raises(SystemExit) as stop:
            PROGRAMS[program](["--help"])
    assert stop.value.code in (None, 0, 141) and capsys.readouterr().err == ""


def test_a_reader_that_goes_while_a_program_prints(monkeypatch, capsys):
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as stream, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", stream)
        assert ended_by(lambda: print("x" * 10 ** 5, flush=True)) == 141
    assert capsys.readouterr().err == ""


def test_names_that_utf8_does_not_know_are_written(tmp_path):
    names = ["\udcff", "plain"] * 2
    auxiliaries.save_scatter(tmp_path / "plot.svg", ["title"], [(0, 0), (1, 1), (2, 0), (3, 0)], names)
    root = ElementTree.parse(tmp_path / "plot.svg").getroot()
    titles = {title.text for title in root.iter("{http://www.w3.org/2000/svg}title")}
    assert titles == {r"\udcff", "plain"}


def test_a_pause_that_does_not_count_is_not_expected_again(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(results.time, "monotonic", lambda: now[0])
    progress = results.Progress(9, 1, Stream(terminal=True), epochs_per_pause=3)
    for seconds, counts in ((50, True), (2, False)):
        progress.pause("", counts)
        now[0] += seconds
        progress.restart()
    assert progress.pause_seconds == 50


def test_a_folder_that_cannot_be_locked_is_named(tmp_path, monkeypatch, capsys):
    import fcntl
    monkeypatch.setattr(fcntl, "lockf", lambda *_: fail(OSError(37, "no locks")))
    results.lock_folder(str(tmp_path)).close()
    said = capsys.readouterr().out
    assert said.startswith(f"note: {tmp_path} could not be locked") and said.count("\n") == 1
    assert (tmp_path / ".lock").read_text().startswith(f"process {os.getpid()} on ")


LOADING = """
import os, sys, time, torch
sys.path.insert(0, sys.argv[1])
import auxiliaries
class Items(torch.utils.data.Dataset):
    def __len__(self):
        return 2
    def __getitem__(self, i):
        if i:
            print(os.getpid(), flush=True)
            time.sleep(60)
        return 0
for _ in torch.utils.data.DataLoader(Items(), num_workers=1,
                                     worker_init_fn=auxiliaries.heed_parent_alone):
    pass
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("terminate", [False, True])
def test_a_loading_process_ends_with_its_run(terminate):
    """Of itself within seconds of the run's SIGKILL, at once by SIGTERM, which it heeds not before."""
    root = os.path.dirname(auxiliaries.__file__)
    with subprocess.Popen([sys.executable, "-c", LOADING, root], stdout=subprocess.PIPE) as run:
        loading = int(run.stdout.readline())
        os.kill(loading, signal.SIGTERM)  # a scheduler's
        time.sleep(0.2)
        os.kill(loading, 0)
        run.kill()
        run.wait()
        if terminate:
            with contextlib.suppress(ProcessLookupError):
                os.kill(loading, signal.SIGTERM)
        end = time.monotonic() + 20
        while time.monotonic() < end:
            state = Path(f"/proc/{loading}/stat")
            if not state.exists() or state.read_text().split()[2] == "Z":
                return
            time.sleep(0.05)
        os.kill(loading, signal.SIGKILL)
        pytest.fail("it outlives its run")
