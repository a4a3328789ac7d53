"""What a run leaves behind and says: whole files, checkpoints, plots, progress, messages."""

import argparse
import errno
import io
import math
import os
import pickle
import random
import re
import signal
import subprocess
import sys
import time
import unittest.mock
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
from conftest import Malicious

# ---- files


def test_a_file_appears_once_it_is_complete_and_a_crash_leaves_the_old_one(tmp_path):
    path = tmp_path / "a.txt"
    for crash, old, new in ((KeyboardInterrupt(), None, "first"),
                            (OSError(5, "Input/output error"), b"first", "größer\n")):
        def kept():
            return path.read_bytes() if path.exists() else None

        with pytest.raises(BaseException) as caught, auxiliaries.written_whole(path) as file:
            file.write(b"half of the ne")
            raise crash
        assert caught.value is crash or caught.value.__cause__ is crash
        assert kept() == old and len(os.listdir(tmp_path)) == (old is not None)
        with auxiliaries.written_whole(path, "w") as file:
            file.write(new)
            file.flush()
            assert kept() == old
        assert kept() == new.encode() and os.listdir(tmp_path) == ["a.txt"]


WRITERS = {
    "checkpoint": lambda path: auxiliaries.save_checkpoint(path, {"a": torch.zeros(5000)}),
    "csv": lambda path: auxiliaries.save_csv(path, [{"epoch": 1}]),
    "plot": lambda path: auxiliaries.save_plot(path, ["title"], [("loss", {"a": [(1, 2)]})]),
    "scatter": lambda path: auxiliaries.save_scatter(path, ["title"], [(0, 0), (1, 2)], ["a", "b"]),
    "grid": lambda path: auxiliaries.save_image_grid(path, [[(Image.new("L", (9, 9)), "hit")]]),
    "options": lambda path: results.save_options(os.path.dirname(path), {"a": 1}),
}


def test_a_full_disk_is_an_os_error_with_the_path(tmp_path, monkeypatch):
    path = tmp_path / "hypa.pkl"  # save_options chooses its own names, this is one of them
    path.write_text("old")
    for writer, function in (*((writer, "replace") for writer in WRITERS), ("csv", "fsync"),
                             ("checkpoint", "open")):
        with monkeypatch.context() as patch:
            if function == "open":
                patch.setattr(auxiliaries, "open", lambda path, mode: open("/dev/full", mode),
                              raising=False)
            else:
                patch.setattr(auxiliaries.os, function, lambda *_: fail(
                    OSError(errno.ENOSPC, "No space left on device")))
            with pytest.raises(OSError, match="--save_path") as caught:
                WRITERS[writer](str(path))
        assert str(path) in str(caught.value)
        assert function == "open" or "No space left" in str(caught.value)
        assert os.listdir(tmp_path) == ["hypa.pkl"] and path.read_text() == "old"


def test_a_run_folder_is_made_new_or_with_resume_taken_as_it_is(tmp_path):
    def make(*names, **options):
        return results.make_run_folder(str(tmp_path / "deep"), *names, **options)

    folder = make("cub200", "trial")
    assert folder == str(tmp_path / "deep/cub200/trial") and os.listdir(folder) == []
    assert re.fullmatch(r"\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d", os.path.basename(make("glyphs")))
    with pytest.raises(ValueError, match=f"{folder}.*--savename.*--resume"):
        make("cub200", "trial")
    assert make("cub200", "trial", resume=True) == folder
    with pytest.raises(FileNotFoundError, match="other"):
        make("cub200", "other", resume=True)
    for name in ("", ".", "..", "a/b"):
        with pytest.raises(ValueError, match="--savename"):
            make("cub200", name, resume=True)
    assert os.listdir(tmp_path / "deep/cub200") == ["trial"]
    (tmp_path / "deep/file").write_text("")
    for save_path, dataset in ((tmp_path / "deep/file", "cub200"), (tmp_path / "deep", "file")):
        with pytest.raises(OSError, match="--save_path .*file"):
            results.make_run_folder(str(save_path), dataset, "trial")


def test_a_folder_that_cannot_be_locked_is_named(tmp_path, monkeypatch, capsys):
    import fcntl
    monkeypatch.setattr(fcntl, "lockf", lambda *_: fail(OSError(37, "no locks")))
    results.lock_folder(str(tmp_path)).close()
    said = capsys.readouterr().out
    assert said.startswith(f"note: {tmp_path} could not be locked") and said.count("\n") == 1
    assert (tmp_path / ".lock").read_text().startswith(f"process {os.getpid()} on ")


# ---- checkpoints, options, tables

STATE = {"epoch": 3, "options": {"lr": 1e-5, "tau": [30, 55], "savename": None, "resume": False},
         "models": {"trunk": {"weight": torch.arange(6.).view(2, 3)}},
         "optimizers": {"state": {0: {"step": torch.tensor(4.)}}, "betas": (0.9, 0.999)}}


def test_a_checkpoint_comes_back(tmp_path):
    path = str(tmp_path / "checkpoint.pth.tar")
    auxiliaries.save_checkpoint(path, STATE)
    back = auxiliaries.load_checkpoint(path, list(STATE))
    assert repr(back) == repr(STATE)  # types, order and, of tensors this small, every value
    assert os.listdir(tmp_path) == ["checkpoint.pth.tar"]
    with pytest.raises(FileNotFoundError, match="nothing.pth"):
        auxiliaries.load_checkpoint(str(tmp_path / "nothing.pth"), ["epoch"])


def test_code_in_a_checkpoint_does_not_run(tmp_path):
    path = tmp_path / "last.pth.tar"
    torch.save({"epoch": 1, "other": Malicious(tmp_path / "it_ran")}, path)
    with pytest.raises(ValueError, match="last.pth.tar") as caught:
        auxiliaries.load_checkpoint(str(path), ["epoch"])
    assert os.listdir(tmp_path) == ["last.pth.tar"]
    assert "weights_only" not in str(caught.value)  # torch advises to read it without protection


def test_a_damaged_checkpoint_or_another_file_is_refused(tmp_path):
    path = tmp_path / "last.pth.tar"
    auxiliaries.save_checkpoint(str(path), STATE)
    whole = path.read_bytes()
    where = whole.index(torch.arange(6.).numpy().tobytes())
    damaged = [whole[:int(len(whole) * share)] for share in (0, 0.5, 0.99)]
    damaged += [whole[:where] + b"\1" + whole[where + 1:], b"epoch: 3\n"]
    for content in ({"weight": 1}, torch.zeros(3), [1], torch.nn.Linear(2, 2)):
        torch.save(content, path)
        damaged.append(path.read_bytes())
    for content in damaged:
        path.write_bytes(content)
        with pytest.raises(ValueError, match="^the checkpoint .*last.pth.tar[^\n]*$"):
            auxiliaries.load_checkpoint(str(path), ["epoch"])
    with pytest.raises(ValueError, match=re.escape(str(tmp_path))):
        auxiliaries.load_checkpoint(str(tmp_path), ["epoch"])


def test_a_table_has_the_columns_of_all_rows(tmp_path):
    for rows, text in (
            ([{"epoch": 1, "loss": 0.5}, {"epoch": 2, "nmi": 0.25, "loss": 1}, {"a, \"b\"": "é"}],
             'epoch,loss,nmi,"a, ""b"""\r\n1,0.5,,\r\n2,1,0.25,\r\n,,,é\r\n'),
            ([], "epoch\r\n")):
        auxiliaries.save_csv(str(tmp_path / "log.csv"), rows)
        assert (tmp_path / "log.csv").read_bytes() == text.encode()


# ---- seeds, devices, versions


def test_the_same_seed_and_the_same_state_give_the_same_numbers(tmp_path):
    def numbers():
        return [*torch.rand(2).tolist(), *np.random.rand(2).tolist(), random.random()]

    drawn = []
    for seed in (3, 3, 2 ** 32 - 1):
        auxiliaries.seed_everything(seed)
        drawn.append(numbers())
    assert drawn[0] == drawn[1] and not set(drawn[0]) & set(drawn[2])
    auxiliaries.save_checkpoint(tmp_path / "a.pth", auxiliaries.random_state())
    expected = numbers()
    auxiliaries.restore_random_state(auxiliaries.load_checkpoint(tmp_path / "a.pth", []))
    assert numbers() == expected


def test_a_gpu_is_chosen_by_its_number_and_the_cpu_stands_in_aloud(capsys, monkeypatch):
    chosen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    assert auxiliaries.select_device(1) == torch.device("cuda", 1) and chosen == [1]
    with pytest.raises(ValueError, match="--gpu 2"):
        auxiliaries.select_device(2)
    assert auxiliaries.select_device(-1) == torch.device("cpu")
    assert capsys.readouterr().out == ""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert auxiliaries.select_device(0) == torch.device("cpu")
    output = capsys.readouterr().out
    assert output.count("\n") == 1 and "--gpu 0" in output and "CPU" in output


# ---- progress


class Stream(io.StringIO):
    """A stream that is a terminal, or not."""

    def __init__(self, terminal=True):
        super().__init__()
        self.isatty = lambda: terminal


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


def test_a_terminals_line_is_cut_to_its_width_and_covers_the_one_before(clock, monkeypatch):
    monkeypatch.setenv("COLUMNS", "30")
    progress = results.Progress(2, 10, stream := Stream())
    clock.now += 1
    progress.update(1, 0, 5, 0.5)
    progress.pause("epoch 1: evaluating")
    clock.now += 1
    progress.count(12288, 60502)
    progress.write("")
    assert stream.getvalue().split("\r")[1:-1] == [
        "epoch 1/2  iteration 1/5  los", "epoch 1: evaluating".ljust(29),
        "epoch 1: evaluating 12,288 of", " " * 29]
    assert stream.getvalue().endswith("\r")  # what is printed next starts at the left


def test_progress_says_rate_and_time_left_and_reads_the_loss_twice_a_second_at_most(clock):
    progress = results.Progress(num_epochs=2, images_per_iteration=10, stream=(stream := Stream()))
    for epoch, left in ((1, "3m 14s"), (2, "1m 34s")):  # 97 of 2 s, then 47
        progress.restart()
        for iteration in range(3):
            clock.now += 2
            progress.update(epoch, iteration, 50, torch.tensor(0.25))
        assert stream.getvalue().split("\r")[-1].rstrip() == (
            f"epoch {epoch}/2  iteration 3/50  loss 0.2500  5 images/s  {left} left")
    loss = unittest.mock.MagicMock()
    for iteration in range(400):
        clock.now += 0.01
        progress.update(2, iteration, 400, loss)
    assert 7 <= loss.__float__.call_count <= 8


def test_progress_counts_the_pauses_to_come(clock):
    for epochs, every, epoch, pauses in ((3, 1, 1, 3), (10, 5, 6, 1), (10, 4, 1, 3),
                                         (10, 4, 9, 1), (2, 7, 1, 1), (8, 7, 8, 1)):
        progress = results.Progress(epochs, 10, stream := Stream(), epochs_per_pause=every)
        for seconds, counts in ((1000, True), (7, False)):  # as long as the last one that counts
            progress.pause("evaluating", counts)
            clock.now += seconds
            progress.restart()
        clock.now += 2
        progress.update(epoch, 0, 5, 1.0)
        seconds = 2 * (5 * (epochs - epoch + 1) - 1) + 1000 * pauses
        assert f" {results.duration(seconds)} left" in stream.getvalue()


def test_duration():
    assert [results.duration(seconds) for seconds in (0, 7.4, 59.6, 200, 3599.7, 7500, 36e4)] == [
        "0s", "7s", "1m 00s", "3m 20s", "1h 00m", "2h 05m", "100h 00m"]


# ---- plots

SVG = "{http://www.w3.org/2000/svg}"
MARKUP = "a < b & \"c\" > 'd' ]]> <script/> é"


def parsed(path):
    """The root element of a picture, which has no number that is none."""
    assert not re.search(r"\b(nan|inf)\b", path.read_text())
    return ElementTree.parse(path).getroot()


def plot(tmp_path, panels, title=("title",)):
    auxiliaries.save_plot(str(tmp_path / "plot.svg"), list(title), panels)
    return parsed(tmp_path / "plot.svg")


def texts(root):
    return [element.text for element in root.iter(f"{SVG}text")]


def test_a_plot_shows_titles_panels_curves_and_last_values(tmp_path):
    panels = [("training loss", {"total": [(1, 4.0), (2, 2.5), (3, 1.25)]}),
              (MARKUP, {"recall@1": [(0, 0.1), (3, 0.75)], "nmi": [(0, 0.2), (3, 0.625)]})]
    root = plot(tmp_path, panels, ("run: best 0.75", "second line"))
    assert {"run: best 0.75", "second line", "training loss", MARKUP, "total 1.25",
            "recall@1 0.75", "nmi 0.625", "epoch"} <= set(texts(root))
    assert len(root.findall(f".//{SVG}circle")) == 7
    colours = [line.get("stroke") for line in root.iter(f"{SVG}polyline")]
    assert len(colours) == 3 and len(set(colours)) == 2
    assert "title" in texts(plot(tmp_path, []))


def test_curves_lie_within_the_axes_and_the_right_way_up(tmp_path):
    for points in ([(1, 4.0), (2, -3.0), (5, 1.0)], [], [(1, 0), (2, 0)], [(0, 1e-9), (70, 2e-9)],
                   [(1, 3e38), (2, 1.0)], [(1, 123456.7), (2, 123456.8)], [(0, 0.542987)],
                   [(0, -3.0)], [(0, 1e-9)], [(np.int64(1), np.float32(123456.7))]):
        root = plot(tmp_path, [("loss", {"a": points, "b": [(2, math.inf), (3, math.nan)]})])
        drawn = [(float(circle.get("cx")), float(circle.get("cy")))
                 for circle in root.iter(f"{SVG}circle")]  # what is not finite is left out
        left, top, bottom, right = map(float, re.findall(
            r"[\d.]+", root.find(f".//{SVG}path").get("d")))
        assert right < float(root.get("width")) and bottom < float(root.get("height"))
        assert all(left <= x <= right and top <= y <= bottom for x, y in drawn)
        assert len(drawn) == len(points) and drawn == sorted(drawn)
        heights, values = [-y for _, y in drawn], [value for _, value in points]
        assert np.array_equal(np.argsort(heights), np.argsort(values))  # pixels count downwards
        labels = [text.text for text in root.iter(f"{SVG}text") if text.get("text-anchor") == "end"]
        assert 3 <= len(labels) == len(set(labels)) or len(values) == 0
        if len(set(values)) == 1:  # there is room around them
            assert top + 20 < -heights[0] < bottom - 20
            assert float(labels[0]) < values[0] < float(labels[-1])


def scatter(tmp_path, points, names, title="title", **options):
    """-> the root, {name: (colour, [(x, y) in pixels])}, {name: colour} of the legend."""
    auxiliaries.save_scatter(str(tmp_path / "points.svg"), [title, "second line"], points, names,
                             **options)
    root = parsed(tmp_path / "points.svg")
    named = [group for group in root.iter(f"{SVG}g") if group.find(f"{SVG}title") is not None]
    drawn = {group.find(f"{SVG}title").text: (group.get("fill"), [
        (float(circle.get("cx")), float(circle.get("cy")))
        for circle in group.findall(f"{SVG}circle")]) for group in named}
    assert len(drawn) == len(named)  # one group, so one colour, for each name
    outer = next(group for group in root.iter(f"{SVG}g") if group.get("transform"))
    heights = [float(circle.get("cy")) for circle in outer.findall(f"{SVG}circle")]
    assert heights == sorted(set(heights)) and all(y < float(root.get("height")) for y in heights)
    return root, drawn, dict(zip([text.text for text in outer.findall(f"{SVG}text")],
                                 [circle.get("fill") for circle in outer.findall(f"{SVG}circle")],
                                 strict=True))


def test_points_keep_their_places_on_one_scale(tmp_path):
    for count, scale in ((2, 1), (50, 1e-6), (50, 1e6)):
        points = (np.random.default_rng(0).standard_normal((count, 2)) * (1, 3) + 5) * scale
        names = [f"class {i % 3}" for i in range(count)]
        root, drawn, _ = scatter(tmp_path, points, names)
        places = np.empty((count, 2))
        for name, (_, circles) in drawn.items():
            places[[i for i in range(count) if names[i] == name]] = circles
        # Pixels are an even stretch of the points, turned over since they count downwards.
        pixels = np.ptp(places, 0).max() / np.ptp(points, 0).max()
        np.testing.assert_allclose(places, (points - points[0]) * pixels * (1, -1) + places[0],
                                   atol=0.3)
        frame = next(rect for rect in root.iter(f"{SVG}rect") if rect.get("stroke"))
        left, top, width, height = (float(frame.get(key)) for key in ("x", "y", "width", "height"))
        assert (places > (left, top)).all() and (places < (left + width, top + height)).all()
        assert np.ptp(places, 0).max() > 600  # the picture is filled


def test_every_name_has_a_colour_and_up_to_20_stand_in_a_legend(tmp_path):
    for count in (1, 10, 20, 21, 500):
        names = [f"class {i:04d}" for i in range(count)] * 2
        points = np.random.default_rng(0).random((2 * count, 2))
        root, drawn, legend = scatter(tmp_path, points, names)
        assert list(drawn) == names[:count]
        assert all(len(circles) == 2 for _, circles in drawn.values())
        colours = {name: colour for name, (colour, _) in drawn.items()}
        assert len(set(colours.values())) == count and legend == (colours if count <= 20 else {})
        assert (float(root.get("width")) > float(root.get("height"))) == (count <= 20)
        for colour in colours.values():  # SVG 1.1 knows no hsl(): what it does not know is black
            assert re.fullmatch("#[0-9a-f]{6}", colour) and 0 < int(colour[1:], 16) < 0xffffff


def test_points_in_one_place_stand_in_the_middle_and_those_on_a_line_fill_it(tmp_path):
    for points in ([(3.0, -4.0)], [(0.5, 0.5 + 1e-16)] * 3):
        _, drawn, _ = scatter(tmp_path, points, ["a"] * len(points), size=400)
        assert drawn == {"a": (auxiliaries.COLOURS[0], [(200, 200)] * len(points))}
    for points in ([(0, 0), (4, 0)], [(0, 0), (0, 4)], [(0, 1), (2, 3), (4, 5)]):
        (_, places), = scatter(tmp_path, points, ["a"] * len(points))[1].values()
        assert np.abs(np.subtract(places[0], places[-1])).max() == 720


def test_names_of_points_may_be_any_text(tmp_path):
    names = [MARKUP, "</g></svg>", "\udcff"]
    root, drawn, legend = scatter(tmp_path, np.eye(3)[:, :2], names, "<b>title</b> & more")
    assert texts(root)[:2] == ["<b>title</b> & more", "second line"]
    assert set(drawn) == set(legend) == {*names[:2], r"\udcff"}


def test_ticks_enclose_and_are_evenly_spaced():
    generator = random.Random(0)
    for whole in [False, True] * 500:
        low = generator.uniform(-1, 1) * 10 ** generator.uniform(-9, 9)
        high = low + generator.random() * 10 ** generator.uniform(-9, 9)
        if whole:
            low, high = round(low), round(high)
        marks = auxiliaries.ticks(low, high, whole)
        step = (marks[-1] - marks[0]) / (len(marks) - 1)
        assert 2 <= len(marks) <= 9, (low, high, marks)
        assert step > 0 and np.allclose(np.diff(marks), step, rtol=1e-3), (low, high, marks)
        slack = 1e-6 * step
        assert marks[0] <= low + slack and marks[-1] >= high - slack, (low, high, marks)
        assert not whole or all(mark == int(mark) for mark in marks)
    assert auxiliaries.ticks(0, 1) == [0, 0.2, 0.4, 0.6, 0.8, 1]
    assert auxiliaries.ticks(0, 70) == [0, 20, 40, 60, 80]
    assert all(len(f"{mark:g}") <= 8 for mark in auxiliaries.ticks(0.1, 0.3))


# ---- pictures

COLOURS = {"query": (214, 39, 40), "hit": (44, 160, 44), "miss": (120, 120, 120)}


def grid(tmp_path, rows, **options):
    """The pixels of a picture that was saved."""
    auxiliaries.save_image_grid(str(tmp_path / "grid.png"), rows, **options)
    with Image.open(tmp_path / "grid.png") as image:
        assert image.format == "PNG" and image.mode == "RGB"
        return np.asarray(image).astype(int)


def bounds(pixels, colour):
    """(top, left, bottom, right) of the pixels of a colour."""
    rows, columns = np.nonzero((pixels == colour).all(2))
    return rows.min(), columns.min(), rows.max(), columns.max()


def test_frames_tell_queries_hits_and_misses(tmp_path):
    fills = {"query": (0, 0, 255), "hit": (0, 255, 255), "miss": (255, 255, 0)}
    pixels = grid(tmp_path, [[(Image.new("RGB", (40, 40), fills[role]), role)
                              for role in COLOURS]])
    lefts = []
    for role, colour in COLOURS.items():
        top, left, bottom, right = bounds(pixels, fills[role])
        assert bottom - top == right - left == 111
        y, x = (top + bottom) // 2, (left + right) // 2
        for beside in ((top - 1, x), (bottom + 1, x), (y, left - 1), (y, right + 1)):
            assert tuple(pixels[beside]) == colour
        lefts.append(left)
        inside = pixels[top:bottom + 1, left:right + 1]
        assert (inside == (255, 255, 255)).all(2).any() == (role == "miss")  # the cross
    assert lefts[0] < lefts[1] < lefts[2]


def test_pictures_of_any_shape_keep_their_proportions(tmp_path):
    for mode, shape in (("L", (30, 30)), ("RGB", (500, 20)), ("RGB", (1, 400)),
                        ("RGBA", (64, 112))):
        colour = 200 if mode == "L" else (10, 20, 200, 255)[:len(mode)]
        image = Image.new(mode, shape, colour)
        pixels = grid(tmp_path, [[(image, "query")]])
        top, left, bottom, right = bounds(pixels, COLOURS["query"])
        pixels = pixels[top:bottom + 1, left:right + 1]  # without the legend
        top, left, bottom, right = bounds(pixels, image.convert("RGB").getpixel((0, 0)))
        size = np.array([right - left + 1, bottom - top + 1])
        assert size.max() == 112
        assert np.abs(size - np.array(shape) * 112 / max(shape)).max() <= 1
        assert image.size == shape  # the caller's image is not changed


def test_rows_of_different_lengths_stand_below_each_other(tmp_path):
    blue = Image.new("RGB", (8, 8), (0, 0, 255))
    pixels = grid(tmp_path, [[(blue, role) for role in roles] for roles in (
        ["query", "hit"], ["query"], ["query", "miss", "hit"])], size=16)
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


def test_an_error_on_purpose_or_of_the_machine_is_one_sentence():
    for error in (missing_image, from_loading_process(missing_image)):
        assert ended_by(error) == "main.py: error: birds/a: b.jpg: the image is not there"
    said = ended_by(lambda: images.read_image("a\x1b[2J\n\udcff.jpg"))  # escapes are not passed on
    assert said == r"main.py: error: a\x1b[2J\n\udcff.jpg: the image is not there"
    said = ended_by(OSError(errno.ENOSPC, "No space left", "/a/file"))
    assert said == f"main.py: error: [Errno {errno.ENOSPC}] No space left: '/a/file'"
    said = ended_by(torch.OutOfMemoryError("CUDA out of memory"))
    assert said == "main.py: error: CUDA out of memory: try a smaller --bs"


def test_any_other_error_keeps_its_traceback():
    for slip in (unpack, lambda: open("/nowhere/at all"),
                 lambda: fail(FloatingPointError("of one's own")),
                 lambda: fail(RuntimeError("/data/DataLoader worker (pid 3)/x"))):
        assert not isinstance(ended_by(slip), (str, int))
        said = ended_by(from_loading_process(slip))
        assert said.startswith("main.py: error in another process\nTraceback (most recent call ")
        assert __file__ in said and "Caught" not in said


def test_ctrl_c_is_one_line(capsys):
    assert ended_by(KeyboardInterrupt()) == 130
    assert capsys.readouterr().err == "main.py: stopped by SIGINT\n"
    assert ended_by(auxiliaries.Stopped(signal.SIGTERM)) == 143
    assert capsys.readouterr().err == "main.py: stopped by SIGTERM\n"


def test_all_processes_say_of_the_firsts_error_what_it_says(monkeypatch):
    sent = []

    def broadcast(box, src):
        if auxiliaries.rank() == 0:
            sent[:] = [pickle.dumps(box)]
        else:
            box[:] = pickle.loads(sent[0])

    monkeypatch.setattr(torch.distributed, "broadcast_object_list", broadcast)
    monkeypatch.setattr(auxiliaries, "num_ranks", lambda: 2)
    said = []
    for function in (missing_image, unpack):
        for number in (0, 1):
            monkeypatch.setattr(auxiliaries, "rank", lambda: number)
            said.append(ended_by(lambda: auxiliaries.from_first(function)))
    assert said[0] == said[1] == "main.py: error: birds/a: b.jpg: the image is not there"
    assert isinstance(said[2], ValueError)
    assert said[3].startswith("main.py: error in another process\nTraceback")
    assert "in unpack\n" in said[3] and said[3].endswith("(expected 3, got 2)")


# ---- command lines

PROGRAMS = {"main.py": main.main, "datasets.py": datasets.main, "evaluate.py": evaluate.main,
            "results.py": results.main}


def test_a_mistyped_command_line_is_one_line_with_the_nearest(capsys):
    for line, said in (
            ("main.py --datset=glyphs", "unrecognized arguments: --datset=glyphs; did you mean "
                                        "--dataset?"),
            ("main.py --dataset glyph", "argument --dataset: invalid choice: 'glyph' (choose from "
                                        ".*); did you mean glyphs?"),
            ("main.py --lr fast", "--lr fast: it must be a finite number at least 0 and .*;"),
            ("datasets.py --downlaod", "unrecognized arguments: --downlaod; did you mean "
                                       "--download?"),
            ("evaluate.py a.npz --b", "unrecognized arguments: --b;"),
            ("results.py table --fromat csv", "unrecognized arguments: --fromat; did you mean "
                                              "--format?")):
        program, *arguments = line.split()
        with pytest.raises(SystemExit) as stop:
            PROGRAMS[program](arguments)
        assert stop.value.code == 2
        program += " table" * ("table" in arguments)
        assert re.fullmatch(re.escape(f"{program}: error: {said} --help lists all\n").replace(
            r"\.\*", ".*"), capsys.readouterr().err)


def test_a_number_lies_within_its_bounds():
    for parse, good, bad, words in (
            (auxiliaries.number(float, above=0, most=1), {"1": 1.0, "1e-3": 0.001},
             ("0", "1.1", "nan", "inf", "x"), "a finite number above 0 and at most 1$"),
            (auxiliaries.number(int, least=1, below=3), {"1": 1, "2": 2}, ("0", "3", "1.5"),
             "a whole number at least 1 and below 3$")):
        assert {text: parse(text) for text in good} == good
        for text in bad:
            with pytest.raises(argparse.ArgumentTypeError, match=words):
                parse(text)


def test_a_reader_that_goes_ends_a_program_quietly(monkeypatch, capsys):
    for program in (*PROGRAMS, None):
        reading, writing = os.pipe()
        os.close(reading)
        with os.fdopen(writing, "w") as stream, monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", stream)
            if program:
                with pytest.raises(SystemExit) as stop:
                    PROGRAMS[program](["--help"])
                assert stop.value.code in (None, 0, 141)
            else:
                assert ended_by(lambda: print("x" * 10 ** 5, flush=True)) == 141
        assert capsys.readouterr().err == ""


LOADING = """
import os, sys, time, torch
sys.path.insert(0, sys.argv[1])
import auxiliaries
class Items(torch.utils.data.Dataset):
    def __len__(self):
        return 1
    def __getitem__(self, i):
        for _ in range(600):
            print(os.getpid(), flush=True)
            time.sleep(0.05)
for _ in torch.utils.data.DataLoader(Items(), num_workers=1,
                                     worker_init_fn=auxiliaries.heed_parent_alone):
    pass
"""


@pytest.mark.skipif(not hasattr(signal, "sigtimedwait"), reason="needs sigtimedwait")
def test_a_loading_process_ends_with_its_run_and_heeds_no_other():
    """Its standard output, which it shares with the run, ends when it does."""
    root = os.path.dirname(auxiliaries.__file__)
    with subprocess.Popen([sys.executable, "-c", LOADING, root], stdout=subprocess.PIPE) as run:
        loading = int(run.stdout.readline())
        os.kill(loading, signal.SIGTERM)  # a scheduler's
        assert [int(run.stdout.readline()) for _ in range(4)] == [loading] * 4
        run.kill()
        killed = time.monotonic()
        run.stdout.read()
        assert time.monotonic() - killed < 20  # of the 30 that it would go on by itself
