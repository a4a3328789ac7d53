"""benchmarks/throughput.py: it prints its table, and the figures in it fit together."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import main
import results
import trainers

SOURCE = Path(__file__).resolve().parent.parent / "benchmarks" / "throughput.py"
SMALL = ["--arch", "convnet", "--gpu", "-1", "--image_size", "16", "--embed_dim", "8", "--bs", "8",
         "--iterations", "2"]


@pytest.fixture(scope="module")
def throughput():
    spec = importlib.util.spec_from_file_location("throughput", SOURCE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Options of a dataset of 8 classes of 4 images; 4 classes, two batches of 8, train."""
    folder = tmp_path_factory.mktemp("images")
    generator = np.random.default_rng(0)
    for label in range(8):
        (folder / str(label)).mkdir()
        for i in range(4):
            pixels = generator.integers(0, 256, (20, 20, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / str(label) / f"{i}.png")
    return ["--dataset", "folder", "--source_path", str(folder)]


def rows_of(text):
    """The printed table -> {what: the other cells}."""
    lines = [line[2:-2].split(" | ") for line in text.splitlines() if line.startswith("| ")]
    return {cells[0]: [cell.strip() for cell in cells[1:]] for cells in lines[1:]}


def test_figures_fit_together(throughput, images, capsys):
    throughput.benchmark([*SMALL, *images, "--kernels", "1", "--repeats", "2"])
    printed = capsys.readouterr().out
    assert "bs: 8" in printed and "torchvision" in printed and "threads" in printed
    assert "untrained" not in printed  # nothing is evaluated
    rows = rows_of(printed)
    assert list(rows) == ["bare network", "whole epoch", "loader alone", "torchvision's loader"]
    for name, (rate, spread, *_) in rows.items():
        least, greatest = map(float, spread.split(" to "))
        assert 0 < least <= float(rate) <= greatest, name
    for name, peer, target in (("whole epoch", "bare network", 0.93),
                               ("loader alone", "torchvision's loader", 1.5)):
        rate, _, beside, ratio, paired, printed_target = rows[name]
        assert beside == peer and float(printed_target) == target
        assert float(ratio) == pytest.approx(float(rate) / float(rows[peer][0]), rel=2e-3,
                                             abs=1e-3)
        assert float(paired) > 0


def test_images_that_are_no_files_have_no_peer(throughput, capsys):
    throughput.benchmark([*SMALL, "--dataset", "glyphs", "--repeats", "1"])
    rows = rows_of(capsys.readouterr().out)
    assert list(rows) == ["bare network", "whole epoch", "loader alone"]
    assert rows["whole epoch"][2] == "bare network" and rows["loader alone"][2] == ""


def test_bare_is_the_network_without_hooks_and_whole_is_the_run(throughput, images, tmp_path,
                                                                monkeypatch):
    looks, updates = [], []
    monkeypatch.setattr(trainers.Diagnosis, "add", lambda *_: looks.append(1))
    after_iteration = results.Log.after_iteration
    monkeypatch.setattr(results.Log, "after_iteration",
                        lambda run, trainer: updates.append(after_iteration(run, trainer)))
    opt = main.parse_options([*SMALL[:-2], *images, "--kernels", "0", "--save_path",
                              str(tmp_path)])
    trainer = throughput.build(opt)
    batch = trainer.next_batch()
    assert batch[0].dtype == torch.uint8
    weight = trainer.models["trunk"].backbone.layers[0].weight
    before = weight.detach().clone()
    assert throughput.bare(trainer, batch, 3) > 0
    assert not looks and not updates
    assert not torch.equal(weight, before)
    assert throughput.whole(trainer, 5) > 0  # goes on over three passes
    assert len(looks) == len(updates) == 7   # two to warm up


def test_batches_go_on_from_pass_to_pass(throughput):
    sampler = torch.utils.data.BatchSampler(range(6), 3, drop_last=True)
    batches = iter(throughput.Endless(sampler))
    assert [next(batches) for _ in range(5)] == [[0, 1, 2], [3, 4, 5]] * 2 + [[0, 1, 2]]


@pytest.mark.parametrize("options, message", [
    (["--iterations", "0"], "both are 1 or more"),
    (["--dataset", "folder", "--source_path", "nowhere"], "--source_path nowhere"),
])
def test_a_mistake_ends_it_with_a_sentence(throughput, options, message, capsys):
    with pytest.raises(SystemExit) as stop:
        throughput.benchmark([*SMALL, *options])
    assert message in str(stop.value) + capsys.readouterr().err
