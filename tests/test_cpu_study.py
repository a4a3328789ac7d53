"""benchmarks/cpu_study.py on synthetic features: rows, intervals, parts, files and errors."""

import csv
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

import cpu_study
import datasets
import losses

CLASSES, EACH, FEATURES = 12, 10, 16
SMALL = ["--n_epochs", "2", "--bs", "16", "--embed_dim", "8", "--processes", "1"]


@pytest.fixture(name="file")
def features_file(tmp_path):
    """Float16 features [120, 16] of 12 classes around random centres, the rows in any order."""
    generator = np.random.default_rng(0)
    labels = generator.permutation(np.arange(CLASSES).repeat(EACH))
    rows = generator.normal(size=(CLASSES, FEATURES))[labels]
    rows = rows + 0.8 * generator.normal(size=rows.shape)
    np.savez(tmp_path / "features.npz", embeddings=rows.astype(np.float16), labels=labels)
    return tmp_path / "features.npz"


def study(capsys, *argv):
    """Runs it -> (measurements, the table's rows as lists of cells, its head first)."""
    found = cpu_study.main(list(map(str, [*argv, *SMALL])))
    lines = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines()
             if line.startswith("| ")]
    return found, [[cell.strip(" |") for cell in line] for line in lines]


def test_table_has_each_row_and_is_sorted(file, capsys, tmp_path):
    found, (head, *rows) = study(capsys, "--features", file, "--losses", "proxynca", "npair",
                                 "triplet/semihard", "--seeds", 1, 2, "--lr", 1e-4, 1e-2,
                                 "--csv", tmp_path / "found.csv")
    assert head[:4] == ["loss", "sampling", "lr", "R@1"]
    names = {tuple(row[:2]) for row in rows}
    assert names == {("marginloss", "distance"), ("proxynca", "none"), ("npair", "npair"),
                     ("triplet", "semihard"), *cpu_study.UNTRAINED}
    recalls = [float(row[3].split()[0]) for row in rows]
    assert recalls == sorted(recalls, reverse=True)

    with open(tmp_path / "found.csv") as lines:
        written = list(csv.DictReader(lines))
    assert len(written) == len(found)
    for row in rows:
        runs = [values for values in found if (values["loss"], values["sampling"])
                == tuple(row[:2]) and values["classes"] == "test"]
        last = [values for values in runs if values["epoch"] in (0, 2)]
        assert [values["seed"] for values in last] == [1, 2]
        r = [values["recall@1"] for values in last]
        assert row[3] == f"{np.mean(r):.3f} ± {np.std(r, ddof=1):.3f}"
        assert row[4].split()[0] == f"{np.mean([values['map@r'] for values in last]):.3f}"
        raw = [values["recall@1"] for values in found if values["loss"] == "raw features"]
        if row[0] != "raw features":
            assert row[8].split()[0] == f"{np.mean(np.subtract(r, raw)):+.3f}"


def test_rate_is_the_best_on_held_out_training_classes(file, capsys):
    found, rows = study(capsys, "--features", file, "--losses", "marginloss", "--lr", 1e-6, 1e-2,
                        "--seeds", 1, 2)
    held_out = [values for values in found if values["classes"] == "held out"]
    score = {values["lr"]: values["map@r"] for values in held_out}
    assert [(values["seed"], values["lr"]) for values in held_out] == [(1, 1e-6), (1, 1e-2)]
    used = {values["lr"] for values in found if values["loss"] == "marginloss"
            and values["classes"] == "test"}
    assert used == {max(score, key=score.get)}
    found, _ = study(capsys, "--features", file, "--losses", "marginloss", "--lr", 1e-6)
    assert {values["classes"] for values in found} == {"test"}


def test_all_losses_are_compared_by_default():
    rows = cpu_study.chosen_rows(cpu_study.COMPARED)
    assert {loss for loss, _ in rows} == set(losses.LOSSES)
    for loss in ("marginloss", "triplet"):
        assert {sampling for name, sampling in rows if name == loss} == {
            "distance", "semihard", "softhard", "random"}
    assert cpu_study.chosen_rows(["npair", "npair/npair"]) == [("npair", "npair")]


def test_interval_is_students():
    # Differences 1, 2, 3: mean 2, deviation 1; t of 2 degrees at 0.975 is 4.30265.
    mean, half = cpu_study.interval([1.0, 2.0, 3.0])
    assert mean == 2 and half == pytest.approx(4.302652730 / 3 ** 0.5)
    assert cpu_study.interval([0.5])[0] == 0.5 and math.isnan(cpu_study.interval([0.5])[1])


def test_intervals_pair_the_seeds():
    def row(loss, values):
        return [{"loss": loss, "sampling": "none", "classes": "test", "lr": 1e-4, "seed": seed,
                 "epoch": 1, "recall@1": value, "map@r": 0.5, "nmi": 0.5}
                for seed, value in enumerate(values)]
    found = [*row("a", [0.10, 0.30, 0.50]), *row("b", [0.11, 0.32, 0.53])]
    for name, sampling in cpu_study.UNTRAINED:
        found += [values | {"sampling": sampling} for values in row(name, [0.1, 0.1, 0.1])]
    line = next(line for line in cpu_study.summary(found, ("a", "none")) if "| b " in line)
    assert "| +0.020 [-0.005, +0.045] |" in line  # 4.30265 * 0.01 / sqrt(3) = 0.0248


def test_first_half_of_the_classes_trains(tmp_path):
    labels = np.array(["b", "a", "d", "c", "e", "d", "a"])
    rows = np.arange(14.0).reshape(7, 2)
    np.savez(tmp_path / "names.npz", embeddings=rows, labels=labels)
    train, test = cpu_study.read_features(tmp_path / "names.npz")
    assert train.rows.tolist() == rows[[0, 1, 6]].tolist() and train.labels.tolist() == [1, 0, 0]
    assert test.rows.tolist() == rows[[2, 3, 4, 5]].tolist()
    assert test.labels.tolist() == [1, 0, 2, 1] and train.rows.dtype == np.float32
    batch, numbers = train.__getitems__([2, 0])
    assert batch.tolist() == rows[[6, 0]].tolist() and numbers.tolist() == [0, 1]
    np.savez(tmp_path / "names.npz", embeddings=rows, labels=labels,
             settings='{"train_classes": 3}')
    assert len(set(cpu_study.read_features(tmp_path / "names.npz")[0].labels)) == 3


def test_same_numbers_in_a_process_of_its_own(file, capsys):
    options = "--features", file, "--losses", "marginloss", "--lr", "1e-3", "--seeds", "1"
    first, _ = study(capsys, *options)
    assert cpu_study.main(list(map(str, [*options, *SMALL, "--processes", "2"]))) == first


def test_flags_of_main_reach_the_loss(file, capsys):
    options = "--features", file, "--losses", "triplet/random", "--lr", "1e-2", "--seeds", "1"
    first, _ = study(capsys, *options)
    changed, _ = study(capsys, *options, "--margin", "1.5")
    assert first != changed


def test_computed_features_are_those_of_the_file(capsys, tmp_path, monkeypatch):
    """glyphs cut to 6 and 8 characters; the file remembers how many trained."""
    splits = datasets.read_glyphs().splits
    for name, number in (("train", 6), ("test", 8)):
        images, labels, names = splits[name]
        splits[name] = datasets.Split(images[:40 * number], labels[:40 * number], names[:number])
    monkeypatch.setitem(datasets.DATASETS, "glyphs", datasets.DATASETS["glyphs"]._replace(
        read=lambda source: datasets.Found("cut", splits, [])))
    file = tmp_path / "glyphs.npz"
    options = "--losses", "marginloss", "--lr", 1e-3, "--seeds", 1
    computed, _ = study(capsys, "--dataset", "glyphs", "--save_features", file, *options)
    assert [len(part) for part in cpu_study.read_features(file)] == [6 * 40, 8 * 40]
    read, _ = study(capsys, "--features", file, *options)
    assert computed == read


def test_errors_say_what_is_wrong(file, tmp_path):
    arrays = {"embeddings": np.ones((6, 2), np.float32), "labels": np.arange(6) // 2}
    np.savez(tmp_path / "three.npz", **arrays)
    np.savez(tmp_path / "nameless.npz", embeddings=arrays["embeddings"])
    np.savez(tmp_path / "short.npz", embeddings=arrays["embeddings"], labels=np.arange(5))
    torch.save({"wrong": torch.ones(1)}, tmp_path / "wrong.pth")
    for argv, message in (
            (["--features", tmp_path / "none.npz"], "there is no file"),
            (["--features", tmp_path / "nameless.npz"], "labels is not a file"),
            (["--features", tmp_path / "three.npz"], "3 classes, of which 1 would train"),
            (["--features", tmp_path / "short.npz"], "6 embeddings and 5 labels"),
            (["--features", file, "--losses", "tripel"], "there is no loss tripel; there are"),
            (["--features", file, "--losses", "npair/hard"], "npair takes the samplings npair"),
            (["--features", file, "--reference", "none"], "there is no loss none"),
            (["--features", file, "--seeds", "1", "1"], "each seed counts once"),
            (["--features", file, "--save_features", "x"], "--save_features keeps"),
            (["--features", file, "--arch", "resnet18"], "--arch resnet18: the study has no use"),
            (["--features", file, "--loss", "npair"], "--loss npair: the study has no use"),
            (["--features", file, "--scheduler", "plateau"], "--scheduler plateau"),
            (["--features", file, "--n_epochs", "0"], "--n_epochs 0"),
            (["--features", file, "--processes", "1"], "--bs 16 or less"),
            (["--dataset", "glyphs", "--weights", tmp_path / "wrong.pth"], "is not of --arch"),
            (["--dataset", "cub200", "--source_path", tmp_path], "holds no cub200"),
            (["--dataset", "glyphs", "--weights", tmp_path / "gone.pth"], "there is no such file"),
            (["--arch", "resnet0"], "--arch resnet0 is neither")):
        with pytest.raises(SystemExit) as error:
            cpu_study.main(list(map(str, argv)))
        assert message in str(error.value), argv
