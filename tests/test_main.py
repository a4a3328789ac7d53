"""The program as a whole: every loss and sampling, every flag, resumption, bad input."""

import argparse
import ast
import csv
import functools
import io
import os
import pickle
import re
import shlex
import shutil
import signal
import subprocess
import sys
import types
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import auxiliaries
import datasets
import evaluate
import losses
import main
import netlib
import results
import samplers
import trainers

ROOT = Path(main.__file__).resolve().parent
# Each loss with its default sampling, and each sampling with a loss of triplets and one of pairs.
PAIRS = [(name, sampling) for name, loss_class in losses.LOSSES.items()
         for sampling in loss_class.samplings[:None if name in ("triplet", "contrastive") else 1]
         or ("none",)]

TWO_VIEWS = [name for name, trainer in trainers.TRAINERS.items() if trainer.views == 2]


def make_tree(folder, classes=8, images=6, size=20, seed=0):
    """A folder of class folders; the images of a class are noise around its own colour."""
    generator = np.random.default_rng(seed)
    for label in range(classes):
        (folder / f"class_{label}").mkdir(parents=True)
        colour = generator.integers(0, 256, 3)
        for i in range(images):
            pixels = (colour + generator.normal(0, 40, (size, size, 3))).clip(0, 255)
            Image.fromarray(pixels.astype(np.uint8)).save(folder / f"class_{label}" / f"{i}.png")
    return folder


@pytest.fixture(scope="session")
def tree(tmp_path_factory):
    return make_tree(tmp_path_factory.mktemp("data") / "tree")


@pytest.fixture
def small(tree, tmp_path):
    """Options of a run that takes a fraction of a second."""
    return ["--dataset", "folder", "--source_path", str(tree), "--arch", "convnet", "--gpu", "-1",
            "--image_size", "16", "--embed_dim", "8", "--bs", "8", "--n_epochs", "1",
            "--kernels", "0", "--k_vals", "1", "2", "--lr", "1e-3",
            "--save_path", str(tmp_path / "runs"), "--savename", "run"]


def rows(folder, name):
    with open(Path(folder) / name) as file:
        return list(csv.DictReader(file))


def state(folder, name="checkpoint.pth.tar"):
    return torch.load(Path(folder) / name, weights_only=True)


def error_of(options, capsys):
    """Runs main on bad input: it must end with a status and one message, which is returned."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main.main(options)
    message = capsys.readouterr().err if isinstance(stop.value.code, int) else stop.value.code
    assert stop.value.code != 0
    assert "Traceback" not in message
    return message


# ---- end to end


FILES = {"checkpoint.pth.tar", "last.pth.tar", "hypa.pkl", "log_train_Base.csv",
         "log_val_Base.csv", "Parameter_Info.txt", "InfoPlot_Base.svg", "sample_recoveries.png",
         ".lock"}


@pytest.mark.parametrize("loss,sampling", PAIRS)
def test_every_loss_and_sampling_leaves_every_file(small, loss, sampling):
    extra = [] if sampling == "none" else ["--sampling", sampling]
    folder = main.main([*small, "--loss", loss, *extra])
    assert set(os.listdir(folder)) == FILES
    validation = rows(folder, "log_val_Base.csv")
    assert [row["epoch"] for row in validation] == ["0", "1"]
    assert list(validation[0]) == ["epoch", "recall@1", "recall@2", "map@r", "nmi", "f1"]
    assert all(0 <= float(row[key]) <= 1 for row in validation for key in row if key != "epoch")
    assert np.isfinite(float(rows(folder, "log_train_Base.csv")[0]["total_loss"]))
    with open(Path(folder) / "hypa.pkl", "rb") as file:
        options = pickle.load(file)
    assert (options["loss"], options["sampling"]) == (loss, sampling)
    assert f"loss: {loss}" in (Path(folder) / "Parameter_Info.txt").read_text().splitlines()
    assert ElementTree.parse(Path(folder) / "InfoPlot_Base.svg").getroot().tag.endswith("svg")
    with Image.open(Path(folder) / "sample_recoveries.png") as picture:
        assert picture.width > 112 and picture.height > 112


def test_runs_with_a_cache(small, capsys):
    """The untrained network is measured alike; training is alike with every cache."""
    runs = {}
    for name, options in (("none", []), ("ram", ["--kernels", "2"]), ("device", [])):
        folder = main.main([*small, "--savename", name, "--cache", name, *options])
        runs[name] = [(Path(folder) / file).read_text() for file in ("log_val_Base.csv",
                                                                     "log_train_Base.csv")]
    assert runs["ram"] == runs["device"] != runs["none"]
    assert runs["ram"][0].splitlines()[:2] == runs["none"][0].splitlines()[:2]
    assert capsys.readouterr().out.count("48 images to decode, shorter side 18") == 2


def test_hypa_and_checkpoint_recreate_the_network_and_its_metrics(small, tree):
    """A reviewer can recompute the logged numbers from the saved files."""
    folder = main.main([*small, "--n_epochs", "2"])
    with open(Path(folder) / "hypa.pkl", "rb") as file:
        opt = argparse.Namespace(**pickle.load(file))
    trunk, embedder = netlib.network_select(opt, losses.LOSSES[opt.loss].unit_norm)
    checkpoint = state(folder)
    trunk.load_state_dict(checkpoint["models"]["trunk"])
    embedder.load_state_dict(checkpoint["models"]["embedder"])
    _, sets, _ = datasets.dataset_select(opt)
    network = torch.nn.Sequential(trunk, embedder).eval()
    metrics, _ = evaluate.evaluate_sets(network, sets, "cpu", opt.k_vals, seed=opt.seed)
    logged = rows(folder, "log_val_Base.csv")[checkpoint["epoch"]]
    assert {key: str(value) for key, value in metrics.items()} == {
        key: value for key, value in logged.items() if key != "epoch"}


def test_the_checkpoint_is_of_the_best_epoch(small):
    folder = main.main([*small, "--n_epochs", "4", "--lr", "0.01"])
    recalls = [float(row["recall@1"]) for row in rows(folder, "log_val_Base.csv")][1:]
    assert state(folder)["epoch"] == 1 + int(np.argmax(recalls))
    assert state(folder, "last.pth.tar")["epoch"] == 4


def test_in_shop_is_scored_query_against_gallery(small, tmp_path):
    root = tmp_path / "in-shop"
    (root / "Eval").mkdir(parents=True)
    lines = []
    for item in range(8):
        status = ["train"] * 4 if item < 4 else ["query", "query", "gallery", "gallery"]
        for i, part in enumerate(status):
            name = f"img/WOMEN/Tees/id_{item:08d}/0{i}_1_front.jpg"
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (20, 20), (30 * item, 20 * i, 90)).save(root / name)
            lines.append(f"{name} id_{item:08d} {part}\n")
    (root / "Eval/list_eval_partition.txt").write_text(
        f"{len(lines)}\nimage_name item_id evaluation_status\n" + "".join(lines))
    folder = main.main([*small, "--dataset", "in-shop", "--source_path", str(tmp_path)])
    columns = list(rows(folder, "log_val_Base.csv")[0])
    assert columns == ["epoch", "recall@1", "recall@2", "map@r", "nmi", "f1"]


def make_vehicle_id(folder):
    """VehicleID's layout: four images of each of a few vehicles in its four lists."""
    root = folder / "vehicle_id"
    (root / "image").mkdir(parents=True)
    (root / "train_test_split").mkdir()
    lists = {"train_list": 4, "test_list_800": 2, "test_list_1600": 3, "test_list_2400": 4}
    number = 0
    for name, vehicles in lists.items():
        lines = []
        for vehicle in range(vehicles):
            for _ in range(4):
                number += 1
                Image.new("RGB", (20, 20), (60 * vehicle, number, 90)).save(
                    root / "image" / f"{number:07d}.jpg")
                lines.append(f"{number:07d} {vehicle + 1}\n")
        (root / "train_test_split" / f"{name}.txt").write_text("".join(lines))
    return ["--dataset", "vehicle_id", "--source_path", str(folder)]


def test_vehicle_id_reports_its_three_sets(small, tmp_path):
    folder = main.main([*small, *make_vehicle_id(tmp_path)])
    columns = list(rows(folder, "log_val_Base.csv")[0])
    assert columns == ["epoch"] + [f"set {i} {key}" for i in (1, 2, 3)
                                   for key in ("recall@1", "recall@2", "map@r", "nmi", "f1")]


def test_saved_embeddings_give_the_same_metrics_to_the_last_digit(small, capsys):
    folder = main.main([*small, "--n_epochs", "3", "--save_embeddings", "--seed", "4",
                        "--metrics", "all"])
    best = rows(folder, "log_val_Base.csv")[state(folder)["epoch"]]
    scores = evaluate.main([f"{folder}/embeddings.npz", "--metrics", "all"])
    assert {key: str(value) for key, value in scores.items()} == {
        key: value for key, value in best.items() if key != "epoch"}
    assert f"\nrecall@1     {scores['recall@1']}\n" in capsys.readouterr().out


def test_each_set_is_saved_under_its_name(small, tmp_path):
    folder = main.main([*small, *make_vehicle_id(tmp_path), "--save_embeddings"])
    assert {f"embeddings_set_{i}.npz" for i in (1, 2, 3)} <= set(os.listdir(folder))


def test_cluster_metrics_now_and_then(small):
    folder = main.main([*small, "--n_epochs", "5", "--cluster_every", "3"])
    validation = rows(folder, "log_val_Base.csv")
    assert [row["epoch"] for row in validation if row["nmi"]] == ["0", "3", "5"]
    assert all(row["recall@1"] and row["map@r"] for row in validation)
    assert [row["f1"] == "" for row in validation] == [row["nmi"] == "" for row in validation]


LOSS_COLUMNS = {
    "MetricLossOnly": ["metric_loss"],
    "TrainWithClassifier": ["metric_loss", "classifier_loss"],
    "CascadedEmbeddings": ["metric_loss_0", "metric_loss_1", "metric_loss_2"],
    "DeepAdversarialMetricLearning": ["metric_loss", "g_adv_loss", "synth_loss", "g_hard_loss",
                                      "g_reg_loss"],
    "UnsupervisedEmbeddingsUsingAugmentations": ["metric_loss"],
    "TwoStreamMetricLoss": ["metric_loss"],
}
SEEN = ["active", "d_ap", "d_an", "std", "length"]  # of the training batches
every_trainer = pytest.mark.parametrize("trainer", trainers.TRAINERS)


@every_trainer
@pytest.mark.parametrize("loss", ["marginloss", "triplet"])
def test_every_trainer_leaves_every_file_and_a_column_for_each_loss(small, trainer, loss):
    folder = main.main([*small, "--trainer", trainer, "--loss", loss, "--n_epochs", "2"])
    assert set(os.listdir(folder)) == FILES
    logged = rows(folder, "log_train_Base.csv")
    suffixes = ["_0", "_1", "_2"] if trainer == "CascadedEmbeddings" else [""]
    assert set(logged[0]) == {"epoch", *LOSS_COLUMNS[trainer], "total_loss", "next_lr",
                              *(name + suffix for suffix in suffixes for name in SEEN)}
    assert [row["epoch"] for row in logged] == ["1", "2"]
    for row in logged:
        assert float(row["total_loss"]) == pytest.approx(
            sum(float(row[name]) for name in LOSS_COLUMNS[trainer]), rel=1e-4)
    assert all(float(logged[0][name]) > 0 for name in [*LOSS_COLUMNS[trainer], "total_loss"])
    picture = (Path(folder) / "InfoPlot_Base.svg").read_text()
    shown = LOSS_COLUMNS[trainer] if len(LOSS_COLUMNS[trainer]) > 1 else []
    assert all(name in picture for name in ["total_loss", *shown])
    saved = state(folder, "last.pth.tar")
    learned = set(saved["models"]) | {name for name, part in saved["loss_funcs"].items() if part}
    assert {f"{name}_optimizer" for name in learned} == set(saved["optimizers"])


@pytest.mark.parametrize("trainer", ["TrainWithClassifier", "CascadedEmbeddings",
                                     "DeepAdversarialMetricLearning"])
def test_all_that_a_trainer_adds_learns(small, trainer):
    """Every weight of every part moves, those of a loss's own and the generator's too."""
    main.main([*small, "--trainer", trainer, "--n_epochs", "0"])
    folder = main.main([*small, "--trainer", trainer, "--savename", "on"])
    before, after = (state(Path(folder).parent / name, "last.pth.tar") for name in ("run", "on"))
    for group in ("models", "loss_funcs"):
        for name, values in before[group].items():
            for key, value in values.items():
                assert not torch.equal(value, after[group][name][key]), (name, key)


@pytest.mark.parametrize("trainer", TWO_VIEWS)
def test_trainers_of_two_views_run_on_glyphs(trainer, tmp_path):
    folder = main.main(["--dataset", "glyphs", "--trainer", trainer, "--n_epochs", "1", "--gpu",
                        "-1", "--bs", "80", "--image_size", "8", "--embed_dim", "9", "--k_vals",
                        "1", "--save_path", str(tmp_path)])
    assert len(rows(folder, "log_val_Base.csv")) == 2


@pytest.mark.parametrize("loss", ["npair", "proxynca", "crossentropy", "arcface"])
@pytest.mark.parametrize("trainer", ["TrainWithClassifier", "CascadedEmbeddings",
                                     "DeepAdversarialMetricLearning"])
def test_other_losses_under_the_trainers_of_classes(small, trainer, loss, capsys):
    options = [*small, "--trainer", trainer, "--loss", loss]
    if trainer.startswith("Deep") and loss == "npair":
        assert "unit-norm" in error_of(options, capsys)
        return
    assert np.isfinite(float(rows(main.main(options), "log_train_Base.csv")[0]["total_loss"]))


def test_a_cascade_of_few_dimensions_has_one_section(small):
    folder = main.main([*small, "--trainer", "CascadedEmbeddings", "--embed_dim", "2"])
    assert list(rows(folder, "log_train_Base.csv")[0]) == [
        "epoch", "metric_loss_0", "total_loss", *(f"{name}_0" for name in SEEN), "next_lr"]


def test_each_epoch_says_what_the_batches_were_like(small, capsys):
    """In the csv, the log and the picture; a loss that every tuple moves has no active share."""
    folder = main.main([*small, "--n_epochs", "2"])
    printed = capsys.readouterr().out
    for row in rows(folder, "log_train_Base.csv"):
        assert 0 <= float(row["active"]) <= 1 and 0 < float(row["d_ap"]) < 2
        assert 0 < float(row["std"]) <= float(row["length"]) == pytest.approx(1, abs=1e-5)
        assert (f"loss {float(row['total_loss']):.4f} (active {float(row['active']):.3f}, "
                f"d_ap {float(row['d_ap']):.3f}, d_an {float(row['d_an']):.3f}, "
                f"std {float(row['std']):.3f})") in printed
    picture = (Path(folder) / "InfoPlot_Base.svg").read_text()
    assert "training batches" in picture and "d_an" in picture
    assert float(rows(folder, "log_train_Base.csv")[0]["active"]) > 0
    folder = main.main([*small, "--loss", "npair", "--savename", "npair"])
    row = rows(folder, "log_train_Base.csv")[0]
    assert "active" not in row and float(row["length"]) != pytest.approx(1, abs=1e-3)
    assert "warning" not in capsys.readouterr().out


def test_a_collapse_is_said(small, capsys, monkeypatch):
    monkeypatch.setattr(netlib.Embedder, "forward",
                        lambda self, features: F.normalize(self.linear(0 * features) + 1, dim=1))
    main.main([*small, "--loss", "triplet", "--sampling", "random"])
    assert "warning: the embeddings have collapsed: their spread std is" in capsys.readouterr().out


def test_a_clock_that_stands_still_ends_no_run(small, capsys, monkeypatch):
    still = {**vars(results.time), "monotonic": lambda: 5.0}
    monkeypatch.setattr(results, "time", types.SimpleNamespace(**still))
    main.main(small)
    line = next(line for line in capsys.readouterr().out.splitlines() if "epoch 1/1" in line)
    assert line.endswith("  0s")


def test_the_plot_names_the_best_of_each_metric_as_the_table_does(small):
    folder = main.main([*small, "--n_epochs", "3", "--metrics", "all"])
    title = [text.text for text in ElementTree.parse(Path(folder) / "InfoPlot_Base.svg").iter()
             if text.text and text.text.startswith("best of each metric")][0]
    named = dict(part.rsplit(" ", 1) for part in title.split(": ")[1].split(", "))
    measured = rows(folder, "log_val_Base.csv")[1:]
    assert list(named) == [name for name in measured[0] if name != "epoch"]
    for name, value in named.items():
        best = min if name in ("dist_ratio", "rho", "d_ap") else max
        assert value == f"{best(float(row[name]) for row in measured):.4f}", name


def test_the_phases_of_adversarial_training_in_the_files(small):
    """Each phase logs its own losses: the columns are all of them, an absent one is empty."""
    folder = main.main([*small, "--trainer", "DeepAdversarialMetricLearning", "--n_epochs", "3",
                        "--metric_alone_epochs", "1", "--g_alone_epochs", "1"])
    logged = rows(folder, "log_train_Base.csv")
    present = [{name for name in LOSS_COLUMNS["DeepAdversarialMetricLearning"] if row[name]}
               for row in logged]
    assert present == [{"metric_loss"}, {"g_adv_loss", "g_hard_loss", "g_reg_loss"},
                       set(LOSS_COLUMNS["DeepAdversarialMetricLearning"])]
    picture = (Path(folder) / "InfoPlot_Base.svg").read_text()
    assert all(name in picture for name in LOSS_COLUMNS["DeepAdversarialMetricLearning"])


def test_gradients_are_measured_in_every_phase(small):
    folder = main.main([*small, "--trainer", "DeepAdversarialMetricLearning", "--n_epochs", "3",
                        "--metric_alone_epochs", "1", "--g_alone_epochs", "1", "--grad_measure"])
    assert [row["epoch"] for row in rows(folder, "log_train_Base.csv")] == ["1", "2", "3"]


def make_tiny_imagenet(folder, classes=4, images=6):
    """The release's tree: the same classes in train and val."""
    make_tree(folder / "made", classes=classes, images=images)
    lines = []
    for label in range(classes):
        wnid = f"n0000000{label}"
        (folder / "tiny-imagenet-200/val/images").mkdir(parents=True, exist_ok=True)
        (folder / f"tiny-imagenet-200/train/{wnid}/images").mkdir(parents=True)
        for i in range(images):
            picture = Image.open(folder / f"made/class_{label}/{i}.png")
            if i < images - 2:
                picture.save(folder / f"tiny-imagenet-200/train/{wnid}/images/{wnid}_{i}.JPEG")
            else:
                picture.save(folder / f"tiny-imagenet-200/val/images/val_{len(lines)}.JPEG")
                lines.append(f"val_{len(lines)}.JPEG\t{wnid}\t0\t0\t19\t19\n")
    (folder / "tiny-imagenet-200/val/val_annotations.txt").write_text("".join(lines))
    return folder


def test_tiny_imagenet_with_arcface_and_multisimilarity(small, tmp_path, capsys):
    source = make_tiny_imagenet(tmp_path / "source")
    capsys.readouterr()
    folder = main.main([*small, "--dataset", "tiny_imagenet", "--source_path", str(source),
                        "--loss", "arcface", "--sampling", "multisimilarity", "--bs", "8",
                        "--samples_per_class", "2", "--n_epochs", "2"])
    assert "train 4 classes/16 images, test 4 classes/8 images" in capsys.readouterr().out
    assert Path(folder).parent.name == "tiny_imagenet"
    assert [row["epoch"] for row in rows(folder, "log_val_Base.csv")] == ["0", "1", "2"]
    assert float(rows(folder, "log_train_Base.csv")[0]["metric_loss"]) > 0
    saved = state(folder, "last.pth.tar")
    assert saved["loss_funcs"]["metric_loss"]["weight"].shape == (4, 8)
    assert saved["options"]["mining_epsilon"] == 0.1
    assert (saved["options"]["arcface_scale"], saved["options"]["arcface_margin"]) == (64, 0.5)


def test_glyphs_learns_unseen_characters(tmp_path):
    """Three epochs with nothing but defaults lift recall@1 on characters never trained."""
    folder = main.main(["--dataset", "glyphs", "--n_epochs", "3", "--gpu", "-1",
                        "--save_path", str(tmp_path)])
    recalls = [float(row["recall@1"]) for row in rows(folder, "log_val_Base.csv")]
    assert max(recalls[1:]) > recalls[0] + 0.2


def test_the_number_of_loading_processes_never_changes_the_numbers(small):
    one = main.main([*small, "--n_epochs", "2", "--savename", "one"])
    two = main.main([*small, "--n_epochs", "2", "--savename", "two", "--kernels", "2"])
    for name in ("log_train_Base.csv", "log_val_Base.csv"):
        assert (Path(one) / name).read_bytes() == (Path(two) / name).read_bytes()


# ---- resumption


# ---- hooks: evaluation now and then, patience, plateau, TensorBoard, plots of the embeddings


def test_evaluation_every_so_many_epochs_and_after_the_last(small):
    folder = main.main([*small, "--n_epochs", "5", "--eval_every", "2"])
    assert [row["epoch"] for row in rows(folder, "log_val_Base.csv")] == ["0", "2", "4", "5"]
    assert [row["epoch"] for row in rows(folder, "log_train_Base.csv")] == list("12345")
    assert state(folder, "last.pth.tar")["epoch"] == 5
    assert state(folder)["epoch"] in (2, 4, 5)


def test_evaluating_less_often_changes_no_weight(small):
    often = state(main.main([*small, "--n_epochs", "3"]), "last.pth.tar")
    rarely = state(main.main([*small, "--n_epochs", "3", "--eval_every", "3", "--savename", "b"]),
                   "last.pth.tar")
    for key, value in often["models"]["trunk"].items():
        assert torch.equal(value, rarely["models"]["trunk"][key])


FLAT = ["--lr", "0", "--beta_lr", "0", "--batchnorm", "frozen"]  # the metric never changes


def test_patience_ends_the_run_and_more_of_it_takes_it_further(small, capsys):
    options = [*small, *FLAT, "--n_epochs", "9"]
    folder = main.main([*options, "--patience", "2"])
    assert [row["epoch"] for row in rows(folder, "log_val_Base.csv")] == ["0", "1", "2", "3"]
    assert "ended after epoch 3, --patience 2" in capsys.readouterr().out
    main.main([*options, "--patience", "2", "--resume"])
    assert "a larger --patience takes it further" in capsys.readouterr().out
    main.main([*options, "--patience", "4", "--resume"])
    assert rows(folder, "log_val_Base.csv")[-1]["epoch"] == "5"
    capsys.readouterr()
    whole = main.main([*options, "--patience", "4", "--savename", "whole"])
    for name in ("log_val_Base.csv", "log_train_Base.csv"):
        assert rows(folder, name) == rows(whole, name)


def test_a_plateau_lowers_every_rate(small):
    folder = main.main([*small, *FLAT, "--n_epochs", "5", "--scheduler", "plateau", "--gamma",
                        "0.5", "--plateau_patience", "2", "--decay", "0", "--classifier_lr", "0",
                        "--lr", "1e-30"])
    rates = [float(row["next_lr"]) for row in rows(folder, "log_train_Base.csv")]
    assert rates == pytest.approx([1e-30, 1e-30, 5e-31, 5e-31, 2.5e-31])
    saved = state(folder, "last.pth.tar")["optimizers"]
    assert saved["embedder_optimizer"]["param_groups"][0]["lr"] == pytest.approx(2.5e-31)


def test_a_plateau_resumes_to_the_same_rates(small, monkeypatch):
    options = [*small, *FLAT, "--n_epochs", "4", "--scheduler", "plateau", "--plateau_patience",
               "1"]
    whole = main.main(options)
    stopped = [*options, "--savename", "stopped"]
    stop_in(3, monkeypatch)
    with pytest.raises(SystemExit):
        main.main(stopped)
    monkeypatch.undo()
    folder = main.main([*stopped, "--resume"])
    assert rows(folder, "log_train_Base.csv") == rows(whole, "log_train_Base.csv")


@pytest.mark.parametrize("extra", [["--scheduler", "plateau", "--plateau_patience", "1"],
                                   ["--patience", "2"]])
def test_going_on_after_a_last_epoch_off_the_schedule_is_the_unbroken_run(small, extra):
    options = [*small, *FLAT, "--lr", "1e-9", "--eval_every", "2", *extra]
    whole = main.main([*options, "--n_epochs", "8"])
    broken = [*options, "--savename", "broken"]
    main.main([*broken, "--n_epochs", "3"])
    folder = main.main([*broken, "--n_epochs", "8", "--resume"])
    assert rows(folder, "log_train_Base.csv") == rows(whole, "log_train_Base.csv")
    assert [row for row in rows(folder, "log_val_Base.csv") if row["epoch"] != "3"] == rows(
        whole, "log_val_Base.csv")


def test_patience_waits_while_only_the_generator_learns(small):
    folder = main.main([*small, "--trainer", "DeepAdversarialMetricLearning", "--n_epochs", "6",
                        "--metric_alone_epochs", "1", "--g_alone_epochs", "3", "--patience", "2"])
    measured = [row["epoch"] for row in rows(folder, "log_val_Base.csv")]
    assert measured[:3] == ["0", "1", "5"]


def test_tensorboard_gets_every_loss_rate_and_metric(small, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard",
                        types.SimpleNamespace(SummaryWriter=EventFolder))
    folder = main.main([*small, "--n_epochs", "2", "--tensorboard"])
    with open(Path(folder) / "tensorboard" / "events.csv") as file:
        events = list(csv.reader(file))
    iterations = len([tag for tag, _, _ in events if tag == "loss/total_loss"])
    means = [float(row["total_loss"]) for row in rows(folder, "log_train_Base.csv")]
    values = [float(value) for tag, value, _ in events if tag == "loss/total_loss"]
    assert iterations % 2 == 0
    assert means == pytest.approx([np.mean(values[:iterations // 2]),
                                   np.mean(values[iterations // 2:])])
    recalls = {step: value for tag, value, step in events if tag == "metric/recall@1"}
    assert recalls == {row["epoch"]: row["recall@1"] for row in rows(folder, "log_val_Base.csv")}
    assert {"learning_rate/trunk", "learning_rate/embedder", "learning_rate/metric_loss"} <= {
        tag for tag, _, _ in events}


def test_without_the_package_tensorboard_the_flag_is_an_error(small, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    assert "pip install tensorboard" in error_of([*small, "--tensorboard"], capsys)
    assert not os.path.exists(small[small.index("--save_path") + 1])


@pytest.mark.parametrize("method", ["pca", "tsne"])
def test_embeddings_are_drawn_after_each_best_evaluation(small, method):
    folder = main.main([*small, "--n_epochs", "3", "--plot_embeddings", method])
    recalls = [float(row["recall@1"]) for row in rows(folder, "log_val_Base.csv")]
    expected = [epoch for epoch in range(4) if recalls[epoch] > max(recalls[:epoch], default=-1)]
    drawn = sorted(name for name in os.listdir(folder) if name.startswith("embeddings_"))
    assert drawn == [f"embeddings_{epoch:04d}.svg" for epoch in expected]
    picture = ElementTree.parse(Path(folder) / drawn[-1]).getroot()
    space = "{http://www.w3.org/2000/svg}"
    title = [text.text for text in picture.findall(f"{space}text")]
    assert title[0] == f"run, epoch {expected[-1]}: recall@1 {recalls[expected[-1]]:.4f}"
    assert {"pca": "PCA", "tsne": "t-SNE"}[method] in title[1]
    groups = [group for group in picture.iter(f"{space}g")
              if group.find(f"{space}title") is not None]
    assert [len(group.findall(f"{space}circle")) for group in groups] == [6] * 4


def test_the_untrained_networks_pictures_stay_where_training_does_not_gain(small, monkeypatch):
    """The checkpoint is of the best epoch of training all the same."""
    evaluate_sets, recalls = evaluate.evaluate_sets, iter([0.5, 0.25, 0.5, 0.75, 0.625])

    def scripted(*args, **kwargs):
        metrics, rows = evaluate_sets(*args, **kwargs)
        return metrics | {"recall@1": next(recalls)}, rows

    drawn = []
    monkeypatch.setattr(evaluate, "evaluate_sets", scripted)
    monkeypatch.setattr(auxiliaries, "save_image_grid",
                        lambda path, grid, title: drawn.append(title))
    folder = main.main([*small, "--n_epochs", "2", "--plot_embeddings", "pca"])
    assert drawn == ["epoch 0"] and state(folder)["epoch"] == 2
    main.main([*small, "--n_epochs", "4", "--plot_embeddings", "pca", "--resume"])
    assert drawn == ["epoch 0", "epoch 3"] and state(folder)["epoch"] == 3
    assert sorted(name for name in os.listdir(folder) if name.startswith("embeddings")) == [
        "embeddings_0000.svg", "embeddings_0003.svg"]


def test_an_evaluation_that_raises_leaves_the_last_checkpoint_whole(small, monkeypatch):
    options = [*small, "--n_epochs", "3"]
    whole = main.main(options)
    evaluate_sets = evaluate.evaluate_sets

    def failing(network, *args, **options):
        if network.__self__.epoch == 2:
            raise RuntimeError("from the evaluation")
        return evaluate_sets(network, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(evaluate, "evaluate_sets", failing)
        with pytest.raises(RuntimeError, match="from the evaluation"):
            main.main([*options, "--savename", "broken"])
    folder = Path(whole).parent / "broken"
    assert state(folder)["epoch"] == state(folder, "last.pth.tar")["epoch"] == 1
    main.main([*options, "--savename", "broken", "--resume"])
    assert rows(folder, "log_val_Base.csv") == rows(whole, "log_val_Base.csv")


def stop_in(epoch, monkeypatch):
    """Makes the next run stop as by Ctrl-C in the middle of an epoch."""
    original = results.Log.after_iteration

    def after_iteration(run, trainer):
        original(run, trainer)
        if trainer.epoch == epoch and trainer.iteration == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(results.Log, "after_iteration", after_iteration)


def unbroken_and_resumed(options, monkeypatch):
    """The folders of a run and of one that was stopped in epoch 3 and resumed: equal logs."""
    whole = main.main([*options, "--savename", "whole"])
    with monkeypatch.context() as patch:
        stop_in(3, patch)
        with pytest.raises(SystemExit) as stopped:
            main.main([*options, "--savename", "broken"])
        assert stopped.value.code == 130
    resumed = main.main([*options, "--savename", "broken", "--resume"])
    for name in ("log_train_Base.csv", "log_val_Base.csv", "InfoPlot_Base.svg"):
        assert (Path(whole) / name).read_bytes() == (Path(resumed) / name).read_bytes()
    return whole, resumed


@pytest.mark.parametrize("loss", ["marginloss", "proxynca", "npair"])
def test_a_run_stopped_inside_an_epoch_resumes_to_the_same_numbers(small, monkeypatch, loss):
    options = [*small, "--n_epochs", "4", "--loss", loss, "--tau", "2"]
    whole, resumed = unbroken_and_resumed(options, monkeypatch)
    for name in ("checkpoint.pth.tar", "last.pth.tar"):
        first, second = state(whole, name), state(resumed, name)
        assert first["epoch"] == second["epoch"]
        for part in ("trunk", "embedder"):
            for key, value in first["models"][part].items():
                assert torch.equal(value, second["models"][part][key])
        for key, value in first["loss_funcs"]["metric_loss"].items():
            assert torch.equal(value, second["loss_funcs"]["metric_loss"][key])


@pytest.mark.parametrize("trainer", ["DeepAdversarialMetricLearning",
                                     "UnsupervisedEmbeddingsUsingAugmentations"])
def test_other_trainers_resume_to_the_same_numbers(small, monkeypatch, trainer):
    """Stopped in the third epoch of four: in adversarial training the last but one phase."""
    options = [*small, "--n_epochs", "4", "--trainer", trainer, "--tau", "2",
               "--metric_alone_epochs", "1", "--g_alone_epochs", "2"]
    whole, resumed = unbroken_and_resumed(options, monkeypatch)
    first, second = state(whole, "last.pth.tar"), state(resumed, "last.pth.tar")
    for group in ("models", "loss_funcs"):
        for name, values in first[group].items():
            for key, value in values.items():
                assert torch.equal(value, second[group][name][key]), (name, key)


def test_resume_takes_a_finished_run_further(small):
    main.main(small)
    folder = main.main([*small, "--resume", "--n_epochs", "2"])
    assert [row["epoch"] for row in rows(folder, "log_val_Base.csv")] == ["0", "1", "2"]


def test_resume_with_other_options_names_them(small, capsys):
    folder = main.main(small)
    before = (Path(folder) / "last.pth.tar").read_bytes()
    message = error_of([*small, "--resume", "--margin", "0.3"], capsys)
    assert "--margin (was 0.2, is 0.3)" in message
    assert (Path(folder) / "last.pth.tar").read_bytes() == before


def test_resume_refuses_a_damaged_checkpoint(small, capsys):
    folder = Path(main.main(small))
    whole = (folder / "last.pth.tar").read_bytes()
    for damaged in (whole[:len(whole) // 2], b"", b"not a checkpoint", pickle.dumps({"epoch": 1})):
        (folder / "last.pth.tar").write_bytes(damaged)
        message = error_of([*small, "--resume"], capsys)
        assert "last.pth.tar" in message
    torch.save({"something": 1}, folder / "last.pth.tar")
    assert "last.pth.tar" in error_of([*small, "--resume"], capsys)


def test_resume_on_other_data_is_refused(small, tmp_path, capsys):
    folder = Path(main.main(small))
    other = make_tree(tmp_path / "other", images=5)
    before = (folder / "last.pth.tar").read_bytes()
    assert "other data" in error_of([*small, "--resume", "--source_path", str(other)], capsys)
    assert (folder / "last.pth.tar").read_bytes() == before


def test_data_may_move_between_a_run_and_its_resumption(small, tree, tmp_path):
    main.main(small)
    shutil.copytree(tree, tmp_path / "moved")
    folder = main.main([*small, "--resume", "--n_epochs", "2", "--source_path",
                        str(tmp_path / "moved")])
    assert len(rows(folder, "log_val_Base.csv")) == 3


def test_a_run_without_a_name_resumes_by_its_start_time(small):
    without_name = small[:small.index("--savename")]
    name = Path(main.main(without_name)).name
    folder = main.main([*without_name, "--savename", name, "--resume", "--n_epochs", "2"])
    assert Path(folder).name == name and len(rows(folder, "log_val_Base.csv")) == 3
    assert "n_epochs: 2" in (Path(folder) / "Parameter_Info.txt").read_text().splitlines()


def test_runs_that_start_in_the_same_second_have_folders_of_their_own(small, monkeypatch):
    clock = {**vars(results.time), "strftime": lambda _: "2026-01-02_03-04-05"}
    for module in (results, main):
        monkeypatch.setattr(module, "time", types.SimpleNamespace(**clock))
    without_name = small[:small.index("--savename")]
    folders = [Path(main.main(without_name)) for _ in range(3)]
    assert [folder.name.removeprefix("2026-01-02_03-04-05") for folder in folders] == [
        "", "_2", "_3"]
    assert folders[0].name in main.parse_options(["--seeds", "1", "2"]).savename
    assert str(os.getpid()) in main.parse_options(["--seeds", "1", "2"]).savename
    for folder in folders:
        assert f"savename: {folder.name}\n" in (folder / "Parameter_Info.txt").read_text()


def test_a_finished_run_keeps_one_state_and_the_best_weights(small):
    """What only going on needs is in last.pth.tar alone."""
    folder = Path(main.main([*small, "--n_epochs", "2"]))
    assert set(os.listdir(folder)) == FILES
    best = state(folder)
    assert set(best) == {"epoch", "models", "loss_funcs", "options", "versions",
                         "val_rows"}
    assert best["val_rows"][-1]["epoch"] == best["epoch"]
    sizes = [(folder / name).stat().st_size for name in ("checkpoint.pth.tar", "last.pth.tar")]
    assert sizes[0] < sizes[1] / 2
    main.main([*small, "--n_epochs", "3", "--resume"])
    assert len(rows(folder, "log_val_Base.csv")) == 4 and set(os.listdir(folder)) == FILES


def test_a_run_that_failed_before_its_first_checkpoint_can_be_resumed(small, tmp_path, capsys):
    """The same command with --resume starts it in its folder; what was half written goes."""
    broken = make_tree(tmp_path / "broken")
    image = broken / "class_7" / "2.png"
    whole = image.read_bytes()
    image.write_bytes(b"")
    options = [*small, "--source_path", str(broken)]
    assert str(image) in error_of(options, capsys)
    image.write_bytes(whole)
    half = tmp_path / "runs" / "folder" / "run" / "last.pth.tar.tmp"
    half.write_bytes(b"half")
    folder = main.main([*options, "--resume"])
    assert len(rows(folder, "log_val_Base.csv")) == 2 and not half.exists()


def test_resume_without_a_run_is_an_error(small, capsys):
    assert "there is no run" in error_of([*small, "--resume"], capsys)
    without_name = [option for option in small if option not in ("--savename", "run")]
    assert "--savename" in error_of([*without_name, "--resume"], capsys)


# ---- every flag does something

# What a flag needs around it to matter (a loss's own flag: that loss), and values where "one more"
# is not a legal one.
CONTEXT = {
    "scheduler": ["--n_epochs", "2", "--tau", "1"],
    "tau": ["--n_epochs", "2"],
    "gamma": ["--n_epochs", "2", "--tau", "1"],
    "not_pretrained": ["--arch", "resnet18", "--image_size", "32"],
    "arch": ["--not_pretrained", "--image_size", "32"],
    "mining_epsilon": ["--sampling", "multisimilarity"],
    "rho_probability": ["--sampling", "rho"],
    "quadruplet_margin2": ["--samples_per_class", "2"],
    "plateau_patience": ["--n_epochs", "4", "--scheduler", "plateau", "--lr", "0"],
    "patience": ["--n_epochs", "3", "--lr", "0"],
    "eval_every": ["--n_epochs", "2"],
    "cluster_every": ["--n_epochs", "3"],
    "classifier_weight": ["--trainer", "TrainWithClassifier"],
    "classifier_lr": ["--trainer", "TrainWithClassifier"],
    "embedding_sizes": ["--trainer", "CascadedEmbeddings"],
    **{flag: ["--trainer", "DeepAdversarialMetricLearning"] for flag in (
        "metric_alone_epochs", "g_alone_epochs", "g_triplets_per_anchor", "g_lr", "g_weights")},
}
VALUES = {"checkpoint_every": "1", "bs": "12", "samples_per_class": "2", "k_vals": "3",
          "tau": "1", "arch": "resnet18", "val_split": "0.5", "seeds": "7",
          "recipe": "glyphs/margin", "distance_cutoff": "0.6", "gamma": "0.5", "loss": "triplet",
          "dataset": "glyphs",
          "eval_memory": "0.5", "metrics": "recall mrr", "vehicle_protocol": "random_gallery",
          "embedding_sizes": "5 3", "g_weights": "1 2 1 1", "patience": "1",
          "plateau_patience": "1", "rho_probability": "1", "multisimilarity_lambda": "0.5",
          "sphereface_lambda": "2000", "angular_alpha": "40", "recallatk_k": "1 2"}


def context_of(flag):
    """Options under which a flag is read: of losses, the first that takes it."""
    for name in losses.LOSSES:
        if flag in losses.flags_of(name):
            return ["--loss", name, "--samples_per_class", "4", *CONTEXT.get(flag, [])]
    return ["--samples_per_class", "4", *CONTEXT.get(flag, [])]


def trace(options, capsys, monkeypatch):
    """What a run builds and does, without its own statement of the options and without times."""
    workers, memory, seen = [], [], []
    original = torch.utils.data.DataLoader.__init__

    def recording(loader, *args, **kwargs):
        workers.append(kwargs.get("num_workers"))
        original(loader, *args, **kwargs)

    def remembering(*args, **kwargs):
        memory.append((kwargs["memory"], kwargs["batch_size"]))
        return evaluated(*args, **kwargs)

    def saving(path, *args, **kwargs):
        seen.append(os.path.basename(path))
        save(path, *args, **kwargs)

    def starting(log, trainer):
        trunk = trainer.models["trunk"]
        seen.append((torch.are_deterministic_algorithms_enabled(), trunk.amp,
                     trunk.memory_format, trunk._compiled_call_impl is not None))
        torch.use_deterministic_algorithms(False)
        resume(log, trainer)

    evaluated, save, resume = (evaluate.evaluate_sets, auxiliaries.save_checkpoint,
                               results.Log.resume)
    with monkeypatch.context() as patch:
        patch.setattr(torch.utils.data.DataLoader, "__init__", recording)
        patch.setattr(evaluate, "evaluate_sets", remembering)
        patch.setattr(auxiliaries, "save_checkpoint", saving)
        patch.setattr(results.Log, "resume", starting)
        capsys.readouterr()
        folder = main.main(options)
        folder = folder[0] if isinstance(folder, list) else folder
    printed = capsys.readouterr().out
    printed = re.sub(r"^(options|network) .*$|\d+(s|m \d+s), \d+ images/s$", "", printed,
                     flags=re.M)
    last = state(folder, "last.pth.tar")
    tensors = [value.double().sum().item() for group in ("models", "loss_funcs")
               for part in last[group].values() for value in part.values()]
    groups = [{key: value for key, value in group.items() if key != "params"}
              for optimizer in last["optimizers"].values() for group in optimizer["param_groups"]]
    return str((printed, workers, memory, seen, sorted(os.listdir(folder)), tensors, groups,
                (Path(folder) / "log_val_Base.csv").read_text()))


def renamed(trace):
    """A trace as it would be under --savename again."""
    trace = trace.replace("folder/run\\n", "folder/again\\n")
    return trace.replace("glyphs/run\\n", "glyphs/again\\n")


class EventFolder:
    """The part of torch.utils.tensorboard.SummaryWriter that a run uses; tags go to a file."""

    def __init__(self, folder):
        os.makedirs(folder)
        self.path = Path(folder) / "events.csv"

    def add_scalar(self, tag, value, step):
        with open(self.path, "a") as file:
            file.write(f"{tag},{value},{step}\n")

    def flush(self):
        """Nothing is held back."""


TRACES = {}  # of runs without the flag, by their options
FLAGS = [action for action in main.build_parser()._actions if action.dest != "help"]


@pytest.mark.parametrize("action", FLAGS, ids=lambda action: action.dest)
def test_every_flag_changes_the_run(action, small, tree, tmp_path, capsys, monkeypatch):
    """Walks the parser itself, so that a flag that nothing reads cannot be added unnoticed."""
    import torchvision
    imagenet = torchvision.models.resnet18().state_dict()
    monkeypatch.setattr("torchvision.models._api.WeightsEnum.get_state_dict",
                        lambda weights, *args, **kwargs: imagenet)
    base = [*small, *context_of(action.dest)]
    if action.dest == "vehicle_protocol":
        base += make_vehicle_id(tmp_path)
    if action.dest == "tensorboard":  # a stand-in for the package, which need not be installed
        monkeypatch.setitem(sys.modules, "torch.utils.tensorboard",
                            types.SimpleNamespace(SummaryWriter=EventFolder))
    if action.dest == "resume":
        capsys.readouterr()
        main.main(base)
        with pytest.raises(SystemExit, match="exists already"):
            main.main(base)
        main.main([*base, "--resume"])
        assert "1 epochs already" in capsys.readouterr().out
        return
    option = action.option_strings[0]
    if action.dest in ("recipes", "dry_run"):  # they print and end
        capsys.readouterr()
        assert main.main([*base, option]) is None and capsys.readouterr().out
        assert not os.path.exists(base[base.index("--save_path") + 1])
        return
    current = getattr(main.parse_options(base), action.dest)
    if action.nargs == 0:
        changed = [option]
    elif action.dest == "source_path":
        changed = [option, str(make_tree(tmp_path / "other", seed=1))]
    elif action.dest == "weights":
        torch.manual_seed(5)
        torch.save(netlib.ConvNet().state_dict(), tmp_path / "weights.pth")
        changed = [option, str(tmp_path / "weights.pth")]
    elif action.dest in VALUES:
        changed = [option, *VALUES[action.dest].split()]
    elif action.choices:
        changed = [option, next(choice for choice in action.choices if choice != current)]
    elif isinstance(current, (int, float)):
        changed = [option, str(current + 1 if isinstance(current, int) else 2 * current + 0.1)]
    else:
        changed = [option, str(tmp_path / "elsewhere") if "path" in action.dest else "elsewhere"]
    unchanged = tuple(option.replace(str(tmp_path), "TMP") for option in base)
    if unchanged not in TRACES:
        TRACES[unchanged] = trace(base, capsys, monkeypatch).replace(str(tmp_path), "TMP")
    first = TRACES[unchanged]
    again = base if action.dest in ("save_path", "savename") else [*base, "--savename", "again"]
    second = trace([*again, *changed], capsys, monkeypatch).replace(str(tmp_path), "TMP")
    assert second != (first if again is base else renamed(first))


def test_two_runs_with_the_same_options_leave_the_same_trace(small, capsys, monkeypatch):
    """The comparison that the flag test rests on: nothing but the options changes a trace."""
    first = trace(small, capsys, monkeypatch)
    second = trace([*small, "--savename", "again"], capsys, monkeypatch)
    assert renamed(first) == second


# ---- options


def test_defaults_are_those_of_the_reference():
    opt = main.parse_options([])
    assert (opt.dataset, opt.loss, opt.sampling, opt.arch) == ("cub200", "marginloss", "distance",
                                                               "resnet50")
    assert (opt.lr, opt.fc_lr_mul, opt.n_epochs, opt.bs, opt.samples_per_class, opt.seed) == (
        1e-5, 0, 70, 112, 4, 1)
    assert (opt.scheduler, opt.gamma, opt.tau, opt.decay) == ("step", 0.3, [30, 55], 4e-4)
    assert (opt.margin, opt.beta, opt.beta_lr, opt.nu, opt.proxy_lr, opt.l2npair) == (
        0.2, 1.2, 5e-4, 0, 1e-5, 0.02)
    assert (opt.embed_dim, opt.image_size, opt.k_vals, opt.gpu) == (128, 224, [1, 2, 4, 8], 0)
    assert (opt.source_path, opt.save_path) == ("./Datasets", "./Training_Results")
    assert opt.batchnorm == "frozen" and not opt.not_pretrained


def test_class_weights_learn_at_a_rate_of_the_literature_by_default():
    """ArcFace's of Roth et al. 2020: fifty times the network's 1e-5, which hardly turns them."""
    assert main.parse_options(["--dataset", "cub200", "--loss", "arcface"]).loss_lr == 5e-4
    assert main.parse_options(["--loss", "crossentropy"]).loss_lr == 1e-5


@pytest.mark.parametrize("options,expected", [
    (["--arch", "googlenet"], dict(embed_dim=512, image_size=227)),
    (["--arch", "googlenet", "--embed_dim", "64"], dict(embed_dim=64)),
    (["--dataset", "online_products"], dict(k_vals=[1, 10, 100, 1000])),
    (["--dataset", "in-shop"], dict(k_vals=[1, 10, 20, 30, 50])),
    (["--dataset", "vehicle_id"], dict(k_vals=[1, 5])),
    (["--dataset", "vehicle_id", "--k_vals", "2"], dict(k_vals=[2])),
    (["--loss", "proxynca"], dict(samples_per_class=1, sampling="none")),
    (["--loss", "proxynca", "--samples_per_class", "2"], dict(samples_per_class=2)),
    (["--loss", "npair"], dict(samples_per_class=4, sampling="npair")),
    (["--not_pretrained"], dict(batchnorm="trained")),
    (["--dataset", "glyphs"], dict(arch="convnet", image_size=32, kernels=0, lr=1e-3)),
    (["--cache", "device"], dict(kernels=0)),
    (["--dataset", "glyphs", "--lr", "1e-5", "--arch", "resnet18"],
     dict(lr=1e-5, arch="resnet18")),
])
def test_dependent_defaults_give_way_to_the_user(options, expected):
    opt = vars(main.parse_options(options))
    assert {name: opt[name] for name in expected} == expected


def header(options, capsys):
    """A run's header -> (its options, {name: value}, the other lines)."""
    capsys.readouterr()
    folder = main.main(options)
    lines = capsys.readouterr().out.split("\nuntrained")[0].splitlines()
    shown = [line for line in lines if line.startswith("options  ")]
    saved = (Path(folder) / "Parameter_Info.txt").read_text().splitlines()
    assert shown.pop() == "options  all others are in Parameter_Info.txt"
    assert {line.split(": ")[0] for line in saved} >= {action.dest for action in FLAGS}
    return dict(line.removeprefix("options  ").split(": ") for line in shown), lines


def test_the_header_has_what_was_given_and_the_losss_and_trainers_own(small, capsys):
    options = ["--loss", "arcface", "--seed", "1", "--trainer", "TrainWithClassifier"]
    shown, lines = header([*small, *options], capsys)
    given = {option.removeprefix("--") for option in small + options if option[:2] == "--"}
    own = {"form", "arcface_scale", "arcface_margin", "loss_lr", "classifier_weight",
           "classifier_lr"}
    follows = {"amp", "batchnorm", "channels_last", "eval_bs", "not_pretrained", "sampling"}
    assert given | own <= set(shown) <= given | own | follows
    assert (shown["seed"], shown["k_vals"], shown["arcface_scale"]) == ("1", "1 2", "64.0")
    assert any("NMI with the arithmetic mean" in line for line in lines)
    shown, lines = header([*small, "--savename", "plain", "--metrics", "recall"], capsys)
    assert (shown["loss"], shown["beta"], shown["trainer"]) == ("marginloss", "1.2",
                                                                "MetricLossOnly")
    assert not {*own, "g_lr", "proxy_lr"} - {"form"} & set(shown)
    assert not any("NMI" in line for line in lines)


def test_a_part_of_a_published_dataset_is_named_in_header_and_table(small, tmp_path, capsys):
    make_tree(tmp_path / "data" / "cub200" / "images")
    options = [*small, "--dataset", "cub200", "--source_path", str(tmp_path / "data")]
    part = ("the train split has 4 classes/24 images, not cub200's 100/5,864: published numbers "
            "do not apply")
    for extra in ([], ["--val_split", "0.5", "--savename", "held", "--bs", "4",
                       "--samples_per_class", "2"]):
        assert f"         note: {part}" in header([*options, *extra], capsys)[1]
    results.main(["table", str(tmp_path / "runs")])
    assert capsys.readouterr().out.startswith(f"cub200, of which {part}: percent, ")
    assert not any("do not apply" in line for line in header(small, capsys)[1])


def test_the_default_k_are_those_that_a_small_test_set_has(small, tmp_path, capsys):
    """A run goes on from where it stopped with the k that it had."""
    make_tree(tmp_path / "few", classes=4, images=3)
    options = [*small, "--source_path", str(tmp_path / "few"), "--bs", "4",
               "--samples_per_class", "2"]
    place = options.index("--k_vals")
    del options[place:place + 3]
    shown, lines = header(options, capsys)
    assert shown["k_vals"] == "1 2 4"
    assert "note: no recall at 8, as each query has 5 images to be compared with" in lines
    main.main([*options, "--n_epochs", "2", "--resume"])
    assert "recall@4" in rows(tmp_path / "runs/folder/run", "log_val_Base.csv")[-1]


def test_help_is_grouped_and_says_where_defaults_come_from():
    parser = main.build_parser()
    titles = [group.title.partition(" (")[0] for group in parser._action_groups
              if group._group_actions]
    assert titles[-11:] == ["data", "batch", "sampling", "network", "loss", "optimisation",
                            "trainer", "trainer", "evaluation", "recipe", "run"]
    for action in FLAGS:
        assert len(action.help) > 20
        if action.nargs != 0 and action.dest not in ("weights", "savename"):
            assert "efault" in action.help, action.dest
    assert "--beta_constant" in parser.format_help()


def test_help_waits_for_nothing_but_torch():
    """--help must not take longer than importing torch: no torchvision, no scikit-learn."""
    code = ("import sys, main\ntry: main.main(['--help'])\nexcept SystemExit: pass\n"
            "print([m for m in ('torchvision', 'sklearn', 'scipy') if m in sys.modules])")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, text=True, capture_output=True)
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == "[]"


def test_progress_line_on_a_terminal_only(small, monkeypatch, capsys):
    main.main(small)
    assert "\r" not in capsys.readouterr().out

    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr(sys, "stdout", Terminal())
    main.main([*small, "--savename", "terminal"])
    assert "\repoch 1: evaluating" in sys.stdout.getvalue()


# ---- bad input


@pytest.mark.parametrize("options,words", [
    (["--loss", "nosuch"], ["nosuch", "marginloss"]),
    (["--dataset", "nosuch"], ["nosuch", "cub200"]),
    (["--sampling", "nosuch"], ["nosuch", "semihard"]),
    (["--arch", "nosuch"], ["nosuch", "resnet50"]),
    (["--arch", "squeezenet1_0", "--not_pretrained"], ["squeezenet1_0"]),
    (["--bs", "10", "--samples_per_class", "4"], ["--bs 10", "--samples_per_class 4"]),
    (["--bs", "0"], ["--bs 0"]),
    (["--bs", "4", "--samples_per_class", "4"], ["--bs 4", "no negatives"]),
    (["--savename", "../elsewhere"], ["../elsewhere", "--save_path"]),
    (["--bs", "40", "--samples_per_class", "4"], ["10 classes", "has 4", "--bs"]),
    (["--loss", "proxynca", "--bs", "400"], ["--bs 400"]),
    (["--loss", "proxynca", "--sampling", "random"], ["--sampling random", "proxynca"]),
    (["--loss", "npair", "--sampling", "distance"], ["--sampling distance", "npair"]),
    (["--loss", "triplet", "--sampling", "npair"], ["--sampling npair", "semihard"]),
    (["--loss", "triplet", "--samples_per_class", "1"], ["--samples_per_class 1", "2 or more"]),
    (["--loss", "contrastive", "--positives", "all"], ["--positives all", "--sampling none"]),
    (["--trainer", "UnsupervisedEmbeddingsUsingAugmentations", "--loss", "triplet",
      "--batch_draw", "replacement"], ["--batch_draw replacement", "its own negative"]),
    (["--source_path", "no_such_folder"], ["no_such_folder", "<class>"]),
    (["--dataset", "cub200", "--source_path", "no_such_folder"], ["no_such_folder", "images.txt"]),
    (["--k_vals", "1", "400"], ["400", "23", "--k_vals"]),
    (["--k_vals", "0"], ["--k_vals 0"]),
    (["--weights", "no_such_file"], ["no_such_file"]),
    (["--weights", "x", "--not_pretrained"], ["--weights", "--not_pretrained"]),
    (["--gamma", "0"], ["--gamma"]),
    (["--margin", "-1"], ["margin", "-1"]),
    (["--seed", "-1"], ["--seed"]),
    (["--lr", "nan"], ["--lr"]),
    (["--nu", "inf"], ["--nu"]),
    (["--nu", "-1"], ["--nu"]),
    (["--loss", "npair", "--l2npair", "-1"], ["--l2npair"]),
    (["--distance_cutoff", "nan"], ["--distance_cutoff"]),
    (["--tau", "-3", "0"], ["--tau -3"]),
    (["--image_size", "100000"], ["--image_size 100000", "2048"]),
    (["--arch", "alexnet", "--not_pretrained", "--image_size", "32"],
     ["alexnet", "--image_size 32"]),
    (["--arch", "vit_b_16", "--not_pretrained", "--image_size", "64"],
     ["vit_b_16", "--image_size 64"]),
    (["--embed_dim", "0"], ["--embed_dim 0"]),
    (["--distance_cutoff", "0.1"], ["--distance_cutoff", "0.1"]),
    (["--loss", "arcface", "--arcface_scale", "0"], ["--arcface_scale 0"]),
    (["--loss", "arcface", "--arcface_margin", "4"], ["--arcface_margin 4", "3.14"]),
    (["--trainer", "nosuch"], ["nosuch", "TwoStreamMetricLoss"]),
    (["--classifier_weight", "-1"], ["--classifier_weight -1"]),
    (["--classifier_lr", "nan"], ["--classifier_lr"]),
    (["--g_lr", "-1"], ["--g_lr -1"]),
    (["--g_triplets_per_anchor", "0"], ["--g_triplets_per_anchor 0"]),
    (["--metric_alone_epochs", "-1"], ["--metric_alone_epochs -1"]),
    (["--g_alone_epochs", "-1"], ["--g_alone_epochs -1"]),
    (["--g_weights", "1", "1"], ["--g_weights"]),
    (["--trainer", "CascadedEmbeddings", "--embedding_sizes", "4", "3"],
     ["--embedding_sizes 4 3", "--embed_dim 8"]),
    (["--trainer", "CascadedEmbeddings", "--embedding_sizes", "8", "0"],
     ["--embedding_sizes 0: it must"]),
    (["--trainer", "DeepAdversarialMetricLearning", "--loss", "arcface", "--samples_per_class",
      "1"], ["--samples_per_class 1"]),
    (["--loss", "arcface", "--sampling", "multisimilarity", "--samples_per_class", "1"],
     ["--samples_per_class 1"]),
    (["--cache", "device", "--kernels", "2"], ["--cache device", "--kernels 2"]),
    (["--cache", "vram"], ["vram", "device"]),
    (["--metrics", "nmi", "f1"], ["--metrics nmi f1", "recall"]),
    (["--metrics", "recal"], ["recal", "map@r"]),
    (["--eval_memory", "0"], ["--eval_memory 0"]),
    (["--cluster_every", "0"], ["--cluster_every 0"]),
    (["--vehicle_protocol", "random_gallery"], ["--vehicle_protocol", "vehicle_id", "folder"]),
    (["--g_weights", "1", "1", "-1", "1"], ["--g_weights -1: it must be a finite number at least 0"]),
    (["--scheduler", "plateau", "--gamma", "1"], ["--gamma 1.0", "plateau"]),
    *[([f"--{name}", "0"], [f"--{name} 0: it must be a whole number at least 1"])
      for name in ("patience", "plateau_patience")],
    *[(["--trainer", "TwoStreamMetricLoss", "--loss", name],
       ["--trainer TwoStreamMetricLoss", f"--loss {name}", "marginloss, triplet, snr"])
      for name in ("npair", "proxynca", "crossentropy", "arcface", "contrastive")],
    *[(["--trainer", "UnsupervisedEmbeddingsUsingAugmentations", "--loss", name],
       ["--trainer Unsupervised", f"--loss {name}"])
      for name in ("proxynca", "crossentropy", "arcface")],
    (["--trainer", "UnsupervisedEmbeddingsUsingAugmentations", "--samples_per_class", "4"],
     ["--trainer Unsupervised", "--samples_per_class 4", "1 only"]),
    (["--trainer", "UnsupervisedEmbeddingsUsingAugmentations", "--bs", "1"], ["--bs 1"]),
    (["--trainer", "UnsupervisedEmbeddingsUsingAugmentations", "--bs", "400"], ["--bs 400"]),
    (["--trainer", "TwoStreamMetricLoss", "--samples_per_class", "1"], ["--samples_per_class 1"]),
    (["--trainer", "TwoStreamMetricLoss", "--sampling", "rho"], ["TwoStream", "--sampling rho"]),
    (["--trainer", "DeepAdversarialMetricLearning", "--loss", "npair"],
     ["--trainer Deep", "unit-norm", "npair"]),
])
def test_bad_options_end_with_one_message_and_no_folder(small, tmp_path, capsys, options, words):
    message = error_of([*small, *options], capsys)
    for word in words:
        assert word in message
    assert not (tmp_path / "runs" / "folder" / "run").exists()


def test_a_run_folder_is_never_written_over(small, capsys):
    folder = Path(main.main(small))
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert "exists already" in error_of(small, capsys)
    assert before == {path.name: path.read_bytes() for path in folder.iterdir()}


def test_test_classes_of_one_image_leave_nothing_to_retrieve(small, tmp_path, capsys):
    data = make_tree(tmp_path / "lone")
    for folder in sorted(data.iterdir())[4:]:
        for image in sorted(folder.iterdir())[1:]:
            image.unlink()
    assert "nothing to retrieve" in error_of([*small, "--source_path", str(data)], capsys)
    assert datasets.main(["--dataset", "folder", "--source_path", str(data)]) == 1
    assert not (tmp_path / "runs").exists()


def test_a_users_own_folder_is_expanded_in_paths(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    flags = ("source_path", "save_path", "weights")
    opt = main.parse_options(["--dataset", "glyphs", *(f"--{name}=~/{name}" for name in flags)])
    assert all(getattr(opt, name) == f"/home/me/{name}" for name in flags)


@pytest.mark.parametrize("name", ["d\udcff\udcfe", "\x1b[31mred\n"])
def test_a_path_that_is_no_text_works_to_the_end(name, small, tree, tmp_path, capsys):
    data = tmp_path / name
    try:
        shutil.copytree(tree, data)
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    (data / "class_0" / f"left{name}.x").touch()
    options = [*small, "--source_path", str(data), "--save_path", str(tmp_path / f"runs{name}"),
               "--plot_embeddings", "pca", "--save_embeddings"]
    folder = main.main(options)
    assert main.main([*options, "--resume", "--n_epochs", "2"]) == folder
    assert len(rows(folder, "log_train_Base.csv")) == 2
    output, shown = capsys.readouterr().out, repr(name)[1:-1]
    lines = [line for line in output.splitlines() if line.startswith(("data ", "         note"))]
    assert len(lines) == 4 and all(shown in line for line in lines)
    assert "\x1b" not in output and f"files in {auxiliaries.printable(folder)}" in output


def test_fewer_than_two_classes(small, tmp_path, capsys):
    one = make_tree(tmp_path / "one", classes=3)
    assert "two or more" in error_of([*small, "--source_path", str(one)], capsys)


@pytest.mark.parametrize("kernels,content", [("0", b""), ("1", b"no image at all")])
def test_a_broken_image_stops_the_run_with_its_path(small, tmp_path, capsys, content, kernels):
    broken = make_tree(tmp_path / "broken")
    (broken / "class_1" / "2.png").write_bytes(content)
    options = [*small, "--source_path", str(broken), "--kernels", kernels, "--n_epochs", "3"]
    message = error_of(options, capsys)
    assert str(broken / "class_1" / "2.png") in message and len(message.splitlines()) == 1


def test_a_loss_that_is_not_finite_stops_and_keeps_the_checkpoint(small, monkeypatch, capsys):
    original = losses.MarginLoss.forward
    calls = []

    def forward(loss, *args):
        calls.append(1)
        return original(loss, *args) * (float("nan") if len(calls) > 4 else 1)

    monkeypatch.setattr(losses.MarginLoss, "forward", forward)  # 3 iterations an epoch
    message = error_of([*small, "--n_epochs", "3"], capsys)
    assert "nan in epoch 2, iteration 2" in message
    folder = Path(small[small.index("--save_path") + 1]) / "folder" / "run"
    last = state(folder, "last.pth.tar")
    assert last["epoch"] == 1
    assert all(torch.isfinite(value).all() for value in last["models"]["trunk"].values())


@pytest.mark.parametrize("text, flag", [
    ("max_pool does not have a deterministic implementation", "--deterministic"),
    ("DataLoader worker (pid 5) is killed by signal: Bus error.", "--kernels")])
def test_what_an_option_makes_torch_refuse_is_one_message_with_the_option(small, monkeypatch, text,
                                                                          flag):
    def refuse(*_):
        raise RuntimeError(f"{text}\nand more")

    monkeypatch.setattr(main, "run", refuse)
    with pytest.raises(SystemExit, match=f"main.py: error: {re.escape(text)} and more: .*{flag}"):
        main.main(small)


def test_a_missing_compiler_is_one_message_with_the_option(small, monkeypatch):
    def without_compiler(trunk, *args, **kwargs):
        trunk.forward = torch.compile(trunk.forward, backend=refuse)

    def refuse(*args):
        raise FileNotFoundError("no compiler")

    monkeypatch.setattr(netlib.Trunk, "compile", without_compiler)
    with pytest.raises(SystemExit, match="main.py: error: .*no compiler.*leave out --compile"):
        main.main([*small, "--compile"])


SLIP = "a, b, c = 1, 2"
SLIPS = {  # what becomes what, and the function that the traceback must name
    "losses.py": ("        valid, *triplets = triplets_for(self.sampler, embeddings, labels, ",
                  f"        {SLIP}\n", "forward"),
    "images.py": ("    fit = T.Compose([",
                  f"    def slip(image):\n        {SLIP}\n\n", "slip"),
    "evaluate.py": ("    clusters, classes, cells = (entropy(sizes)", f"    {SLIP}\n", "nmi"),
}


def test_a_slip_in_ones_own_code_shows_its_file_and_line(tmp_path):
    """In a loss, in a transform that runs in loading processes, and in a metric; takes seconds."""
    started = {}
    for name, (before, slip, function) in SLIPS.items():
        copy = tmp_path / name.removesuffix(".py")
        copy.mkdir()
        for path in (*ROOT.glob("*.py"), ROOT / "recipes.csv"):
            shutil.copy(path, copy)
        text = (copy / name).read_text()
        assert before in text
        place = text.index(before)
        number = text[:place].count("\n") + slip.count("\n", 0, slip.index(SLIP)) + 1
        changed = before.replace("([", "([slip, ")
        (copy / name).write_text(text[:place] + slip + changed + text[place + len(before):])
        started[copy / name, number, function] = subprocess.Popen(
            [sys.executable, "main.py", *"--dataset glyphs --gpu -1 --kernels 2 --image_size 16 "
             "--loss triplet --metrics recall nmi".split()], cwd=copy, text=True,
            stderr=subprocess.PIPE, stdout=subprocess.DEVNULL)
    for (path, number, function), process in started.items():
        said = process.communicate(timeout=120)[1]
        assert process.returncode == 1
        assert f'File "{path}", line {number}, in {function}\n    {SLIP}\n' in said
        assert said.rstrip().endswith("not enough values to unpack (expected 3, got 2)")
        assert "shared memory" not in said


def test_a_constructor_that_slips_shows_it(small, monkeypatch):
    slip = functools.wraps(losses.MarginLoss.__init__)(lambda *_, **__: int("x"))
    monkeypatch.setattr(losses.MarginLoss, "__init__", slip)
    with pytest.raises(ValueError, match="invalid literal"):
        main.main(small)


def test_ctrl_c_in_an_evaluation_ends_the_progress_line_first(small, monkeypatch):
    """The message stands on a line of its own on the terminal."""
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    def stopped(*args, **options):
        raise KeyboardInterrupt

    terminal = Terminal()
    monkeypatch.setattr(evaluate, "evaluate_sets", stopped)
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setattr(sys, "stderr", terminal)
    with pytest.raises(SystemExit):
        main.main(small)
    shown, said = terminal.getvalue().rsplit("\r", 1)
    assert said.startswith("main.py: stopped by SIGINT. The same command with --savename run")
    assert said.count("\n") == 1 and re.search(r"\repoch 0: evaluating *\r *$", shown)


@pytest.mark.parametrize("program", ["main.py", "results.py"])
def test_ctrl_c_while_torch_is_loaded_says_nothing(program, tmp_path):
    for module in ("torch", "numpy"):
        (tmp_path / f"{module}.py").write_text("print('loading', flush=True)\nimport time\n"
                                               "time.sleep(60)")
    process = subprocess.Popen([sys.executable, ROOT / program], text=True, cwd=tmp_path,
                               env={**os.environ, "PYTHONPATH": str(tmp_path)},
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout.readline() == "loading\n"
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=60)[1] == "" and process.returncode == -signal.SIGINT


def test_another_runtime_error_keeps_its_traceback(small, monkeypatch):
    def fail(*_):
        raise RuntimeError("a bug")

    monkeypatch.setattr(main, "run", fail)
    with pytest.raises(RuntimeError, match="a bug"):
        main.main(small)


def test_a_save_path_that_is_a_file(small, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert "--save_path" in error_of([*small, "--save_path", str(tmp_path / "file")], capsys)


def test_a_full_disk_ends_the_run_and_leaves_whole_files(small, monkeypatch, capsys, tmp_path):
    """The second epoch's checkpoint does not fit: the first one's stays, no half file is left."""
    original = torch.save
    calls = []

    def save(value, file):
        calls.append(1)
        if len(calls) > 3:
            file.write(b"half")
            raise OSError(28, "No space left on device")
        original(value, file)

    monkeypatch.setattr(auxiliaries.torch, "save", save)
    message = error_of([*small, "--n_epochs", "5"], capsys)
    assert "No space left" in message and "--save_path" in message
    folder = tmp_path / "runs" / "folder" / "run"
    assert not [name for name in os.listdir(folder) if "tmp" in name]
    assert state(folder, "last.pth.tar")["epoch"] >= 0


# ---- what stands beside the code


def test_the_reference_runs_parse_and_have_folders_of_their_own():
    text = (ROOT / "Standard_Training.sh").read_text()
    lines = [line.split("#")[0] for line in text.splitlines() if line.startswith("python main.py")]
    folders = [(opt.dataset, opt.savename) for opt in
               (main.parse_options(shlex.split(line)[2:]) for line in lines)]
    assert len(folders) > 30 and len(set(folders)) == len(folders)


def test_every_name_of_a_table_stands_in_the_readme():
    text = (ROOT / "README.md").read_text()
    for name in (*losses.LOSSES, *samplers.METHODS, *datasets.DATASETS, *trainers.TRAINERS):
        assert name in text, name


def test_the_readmes_library_script_runs_as_printed(tmp_path):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    scripts = [text for text in blocks if "trainers.MetricLossOnly(" in text]
    assert len(scripts) == 1 and len(scripts[0].splitlines()) <= 25
    done = subprocess.run([sys.executable, "-c", scripts[0]], cwd=tmp_path, text=True, timeout=300,
                          capture_output=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr
    best = ast.literal_eval(done.stdout)
    assert best["recall@1"] > 0.5  # 0.33 untrained
    saved = state(tmp_path, "best.pth.tar")
    assert saved["epoch"] == best["epoch"] and {"trunk", "embedder"} == set(saved["models"])
