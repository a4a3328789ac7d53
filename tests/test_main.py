"""The program as a whole: runs and their files, every flag, options, bad input, the README."""

import argparse
import ast
import contextlib
import csv
import functools
import inspect
import io
import os
import pickle
import re
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
from conftest import (ROOT, error_of, make_in_shop, make_tree, make_vehicle_id, options_of, rows,
                      state)

FILES = {"checkpoint.pth.tar", "last.pth.tar", "hypa.pkl", "log_train_Base.csv",
         "log_val_Base.csv", "Parameter_Info.txt", "InfoPlot_Base.svg", "sample_recoveries.png",
         ".lock"}
FLAT = ["--lr", "0", "--beta_lr", "0", "--batchnorm", "frozen"]  # the metric never changes
SPACE = "{http://www.w3.org/2000/svg}"


def epochs(folder, column="epoch", name="log_val_Base.csv"):
    """The epochs in which a run's csv has a value in a column."""
    return [int(row["epoch"]) for row in rows(folder, name) if row[column] is not None]


def texts(path):
    """The texts of an SVG."""
    return [text.text for text in ElementTree.parse(path).iter(f"{SPACE}text")]


def assert_equal_weights(first, second):
    """Two checkpoints hold the same weights, of networks and losses."""
    for group in ("models", "loss_funcs"):
        for name, values in first[group].items():
            for key, value in values.items():
                assert torch.equal(value, second[group][name][key]), (name, key)


# ---- one run, looked at from many sides


@pytest.fixture(scope="module")
def four_epochs(tree, tmp_path_factory):
    """A run with all metrics, its embeddings saved and drawn -> (folder, what it printed)."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        folder = main.main([
            *options_of(tree, tmp_path_factory.mktemp("four")), "--n_epochs", "4", "--metrics",
            "all", "--seed", "4", "--save_embeddings", "--plot_embeddings", "pca"])
    return Path(folder), printed.getvalue()


def test_the_best_epochs_weights_are_kept_and_the_last_state_alone_goes_on(four_epochs):
    folder, _ = four_epochs
    best, last = state(folder), state(folder, "last.pth.tar")
    recalls = [row["recall@1"] for row in rows(folder)]
    assert best["epoch"] == 1 + int(np.argmax(recalls[1:])) == best["val_rows"][-1]["epoch"]
    assert set(best) == {"epoch", "models", "loss_funcs", "options", "versions", "val_rows"}
    assert last["epoch"] == 4 and {"optimizers", "random_state"} <= set(last)
    with Image.open(folder / "sample_recoveries.png") as picture:
        assert picture.width > 112 and picture.height > 112


def test_hypa_and_checkpoint_recreate_the_network_and_its_metrics(four_epochs):
    """A reviewer can recompute the logged numbers from the saved files."""
    folder, _ = four_epochs
    opt = argparse.Namespace(**pickle.loads((folder / "hypa.pkl").read_bytes()))
    trunk, embedder = netlib.network_select(opt, losses.LOSSES[opt.loss].unit_norm)
    best = state(folder)
    trunk.load_state_dict(best["models"]["trunk"])
    embedder.load_state_dict(best["models"]["embedder"])
    _, sets, _ = datasets.dataset_select(opt)
    network = torch.nn.Sequential(trunk, embedder).eval()
    metrics, _ = evaluate.evaluate_sets(network, sets, "cpu", opt.k_vals, seed=opt.seed,
                                        batch_size=opt.eval_bs, metrics=opt.metrics)
    assert {"epoch": best["epoch"], **metrics} == rows(folder)[best["epoch"]]


def test_saved_embeddings_give_the_same_metrics_to_the_last_digit(four_epochs, capsys):
    folder, _ = four_epochs
    scores = evaluate.main([f"{folder}/embeddings.npz", "--metrics", "all"])
    epoch = state(folder)["epoch"]
    assert {"epoch": epoch, **scores} == rows(folder)[epoch]
    assert f"\nrecall@1     {scores['recall@1']}\n" in capsys.readouterr().out


def test_each_epoch_says_what_the_batches_were_like(four_epochs):
    folder, printed = four_epochs
    for row in rows(folder, "log_train_Base.csv"):
        assert 0 <= row["active"] <= 1 and 0 < row["d_ap"] < 2
        assert 0 < row["std"] <= row["length"] == pytest.approx(1, abs=1e-5)
        assert (f"loss {row['total_loss']:.4f} (active {row['active']:.3f}, d_ap "
                f"{row['d_ap']:.3f}, d_an {row['d_an']:.3f}, std {row['std']:.3f})") in printed
    assert {"training batches", "test classes"} <= set(texts(folder / "InfoPlot_Base.svg"))
    assert rows(folder, "log_train_Base.csv")[0]["active"] > 0 and "warning" not in printed


def test_the_plot_names_the_best_of_each_metric(four_epochs):
    folder, _ = four_epochs
    title = next(text for text in texts(folder / "InfoPlot_Base.svg")
                 if (text or "").startswith("best of each metric"))
    named = dict(part.rsplit(" ", 1) for part in title.split(": ")[1].split(", "))
    measured = rows(folder)[1:]
    assert list(named) == [name for name in measured[0] if name != "epoch"]
    for name, value in named.items():
        best = min if name in ("dist_ratio", "rho", "d_ap") else max
        assert value == f"{best(row[name] for row in measured):.4f}", name


def test_embeddings_are_drawn_after_each_best_evaluation(four_epochs, small):
    folder, _ = four_epochs
    tsne = main.main([*small, "--plot_embeddings", "tsne"])
    for folder, method in ((folder, "PCA"), (tsne, "t-SNE")):
        recalls = [row["recall@1"] for row in rows(folder)]
        expected = [epoch for epoch, recall in enumerate(recalls)
                    if recall > max(recalls[:epoch], default=-1)]
        drawn = sorted(Path(folder).glob("embeddings_*.svg"))
        assert [path.name for path in drawn] == [f"embeddings_{e:04d}.svg" for e in expected]
        title = texts(drawn[-1])
        assert title[0] == f"run, epoch {expected[-1]}: recall@1 {recalls[expected[-1]]:.4f}"
        assert method in title[1]
        groups = [group for group in ElementTree.parse(drawn[-1]).iter(f"{SPACE}g")
                  if group.find(f"{SPACE}title") is not None]
        assert [len(group.findall(f"{SPACE}circle")) for group in groups] == [6] * 4


# ---- losses, trainers, datasets


@pytest.mark.parametrize("loss", ["triplet", "contrastive", "npair", "proxynca", "arcface",
                                  "histogram"])
def test_a_loss_of_each_kind_leaves_every_file(small, loss):
    folder = Path(main.main([*small, "--loss", loss]))
    assert set(os.listdir(folder)) == FILES
    validation, trained = rows(folder), rows(folder, "log_train_Base.csv")
    assert [row.pop("epoch") for row in validation] == [0, 1]
    assert list(validation[0]) == ["recall@1", "recall@2", "map@r", "nmi", "f1"]
    assert all(0 <= value <= 1 for row in validation for value in row.values())
    assert np.isfinite(trained[0]["total_loss"])
    assert ("active" in trained[0]) == (loss in ("triplet", "contrastive"))
    options = pickle.loads((folder / "hypa.pkl").read_bytes())
    assert (options["loss"], options["sampling"]) == (
        loss, next(iter(losses.LOSSES[loss].samplings), "none"))
    assert f"loss: {loss}" in (folder / "Parameter_Info.txt").read_text().splitlines()


LOSS_COLUMNS = {
    "MetricLossOnly": ["metric_loss"],
    "TrainWithClassifier": ["metric_loss", "classifier_loss"],
    "CascadedEmbeddings": ["metric_loss_0", "metric_loss_1", "metric_loss_2"],
    "DeepAdversarialMetricLearning": ["metric_loss", "g_adv_loss", "synth_loss", "g_hard_loss",
                                      "g_reg_loss"],
    "UnsupervisedEmbeddingsUsingAugmentations": ["metric_loss"],
    "TwoStreamMetricLoss": ["metric_loss"],
}


@pytest.mark.parametrize("trainer", trainers.TRAINERS)
def test_every_trainer_logs_each_of_its_losses_and_moves_every_weight(small, trainer):
    options, columns = [*small, "--trainer", trainer], LOSS_COLUMNS[trainer]
    folder = main.main([*options, "--savename", "on"])
    assert set(os.listdir(folder)) == FILES
    (row,) = rows(folder, "log_train_Base.csv")
    suffixes = ["_0", "_1", "_2"] if trainer == "CascadedEmbeddings" else [""]
    assert set(row) == {"epoch", *columns, "total_loss", "next_lr", *(
        name + suffix for suffix in suffixes
        for name in ("active", "d_ap", "d_an", "std", "length"))}
    assert all(row[name] > 0 for name in columns)
    assert row["total_loss"] == pytest.approx(sum(row[name] for name in columns), rel=1e-4)
    picture = (Path(folder) / "InfoPlot_Base.svg").read_text()
    assert all(name in picture for name in (*columns[:len(columns) * (len(columns) > 1)],
                                            "total_loss"))
    after = state(folder, "last.pth.tar")
    before = state(main.main([*options, "--n_epochs", "0"]), "last.pth.tar")
    learned = set(after["models"]) | {name for name, part in after["loss_funcs"].items() if part}
    assert {f"{name}_optimizer" for name in learned} == set(after["optimizers"])
    for group in ("models", "loss_funcs"):
        for name, values in before[group].items():
            for key, value in values.items():
                assert not torch.equal(value, after[group][name][key]), (name, key)


def test_the_phases_of_adversarial_training_log_their_own_losses(small):
    """The columns are those of all phases, an absent one is empty; gradients are in each."""
    folder = main.main([*small, "--trainer", "DeepAdversarialMetricLearning", "--n_epochs", "3",
                        "--metric_alone_epochs", "1", "--g_alone_epochs", "1", "--grad_measure"])
    columns = LOSS_COLUMNS["DeepAdversarialMetricLearning"]
    present = [{name for name in columns if row[name] is not None}
               for row in rows(folder, "log_train_Base.csv")]
    assert present == [{"metric_loss"}, {"g_adv_loss", "g_hard_loss", "g_reg_loss"}, set(columns)]


@pytest.mark.parametrize("loss,trainer", [("arcface", "TrainWithClassifier"),
                                          ("proxynca", "CascadedEmbeddings"),
                                          ("crossentropy", "DeepAdversarialMetricLearning")])
def test_losses_with_weights_under_other_trainers(small, loss, trainer):
    folder = main.main([*small, "--trainer", trainer, "--loss", loss])
    assert np.isfinite(rows(folder, "log_train_Base.csv")[0]["total_loss"])


@pytest.mark.parametrize("make,names,files", [
    (make_in_shop, [""], {"embeddings.npz", "gallery.npz"}),
    (make_vehicle_id, ["set 1 ", "set 2 ", "set 3 "],
     {f"embeddings_set_{i}.npz" for i in (1, 2, 3)})])
def test_each_test_set_has_its_columns_and_embeddings(small, tmp_path, make, names, files):
    folder = main.main([*small, *make(tmp_path), "--samples_per_class", "4", "--save_embeddings"])
    assert list(rows(folder)[0]) == ["epoch"] + [
        name + key for name in names for key in ("recall@1", "recall@2", "map@r", "nmi", "f1")]
    assert set(os.listdir(folder)) == FILES | files


def test_a_cache_changes_crops_alone_and_not_with_its_kind(small, capsys):
    runs = {}
    for name, options in (("none", []), ("ram", ["--kernels", "1"]), ("device", [])):
        folder = main.main([*small, "--savename", name, "--cache", name, *options])
        runs[name] = [rows(folder), rows(folder, "log_train_Base.csv")]
    assert runs["ram"] == runs["device"] != runs["none"]
    assert runs["ram"][0][0] == runs["none"][0][0]  # the untrained network's
    assert capsys.readouterr().out.count("48 images to decode, shorter side 18") == 2


def test_glyphs_learns_unseen_characters(tmp_path):
    """An epoch of small images lifts recall@1 on characters that were never trained."""
    folder = main.main(["--dataset", "glyphs", "--n_epochs", "1", "--gpu", "-1", "--image_size",
                        "16", "--metrics", "recall", "--save_path", str(tmp_path)])
    untrained, trained = (row["recall@1"] for row in rows(folder))
    assert trained > untrained + 0.05


# ---- what is said


def test_a_collapse_is_said(small, capsys, monkeypatch):
    monkeypatch.setattr(netlib.Embedder, "forward",
                        lambda self, features: F.normalize(self.linear(0 * features) + 1, dim=1))
    main.main([*small, "--loss", "triplet", "--sampling", "random"])
    assert "warning: the embeddings have collapsed: their spread std is" in capsys.readouterr().out


class Terminal(io.StringIO):
    """A stream that says that it is a terminal."""

    def isatty(self):
        return True


def test_progress_line_on_a_terminal_only_and_ended_before_a_message(small, monkeypatch, capsys):
    def stopped(*args, **options):
        raise KeyboardInterrupt

    main.main(small)
    assert "\r" not in capsys.readouterr().out
    terminal = Terminal()
    monkeypatch.setattr(evaluate, "evaluate_sets", stopped)
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setattr(sys, "stderr", terminal)
    with pytest.raises(SystemExit):
        main.main([*small, "--savename", "terminal"])
    shown, said = terminal.getvalue().rsplit("\r", 1)
    assert said.startswith("main.py: stopped by SIGINT. The same command with --savename terminal")
    assert said.count("\n") == 1 and re.search(r"\repoch 0: evaluating *\r *$", shown)


def header(options, capsys):
    """A run's header -> (its options, {name: value}, the other lines)."""
    capsys.readouterr()
    folder = main.main(options)
    lines = capsys.readouterr().out.split("\nuntrained")[0].splitlines()
    shown = [line for line in lines if line.startswith("options  ")]
    saved = (Path(folder) / "Parameter_Info.txt").read_text().splitlines()
    assert shown.pop() == "options  the others are in Parameter_Info.txt"
    assert {line.split(": ")[0] for line in saved} >= {action.dest for action in FLAGS}
    return dict(line.removeprefix("options  ").split(": ") for line in shown), lines


def test_the_header_has_what_was_given_and_the_losss_and_trainers_own(small, capsys):
    options = ["--loss", "arcface", "--seed", "1", "--trainer", "TrainWithClassifier"]
    shown, lines = header([*small, *options], capsys)
    given = {option.removeprefix("--") for option in small + options if option[:2] == "--"}
    own = {"form", "arcface_scale", "arcface_margin", "loss_lr", "classifier_weight",
           "classifier_lr", "adam_eps", "tau", "gamma", "crop_scale", "interpolation",
           "eval_resize"}
    follows = {"amp", "batchnorm", "channels_last", "eval_bs", "not_pretrained", "sampling"}
    assert given | own <= set(shown) <= given | own | follows
    assert (shown["seed"], shown["k_vals"], shown["arcface_scale"]) == ("1", "1 2", "64.0")
    assert any("NMI with the arithmetic mean" in line for line in lines)
    shown, lines = header([*small, "--savename", "plain", "--metrics", "recall"], capsys)
    assert (shown["loss"], shown["beta"], shown["trainer"]) == ("marginloss", "1.2",
                                                                "MetricLossOnly")
    assert not {"arcface_scale", "classifier_lr", "g_lr", "proxy_lr", "momentum"} & set(shown)
    assert not any("NMI" in line for line in lines)


# ---- evaluation now and then, patience, plateau, TensorBoard


def test_evaluation_every_so_many_epochs_and_after_the_last_changes_no_weight(small):
    folder = main.main([*small, "--n_epochs", "5", "--eval_every", "2", "--cluster_every", "2"])
    assert epochs(folder) == [0, 2, 4, 5] and epochs(folder, "nmi") == [0, 4, 5]
    assert epochs(folder, name="log_train_Base.csv") == [1, 2, 3, 4, 5]
    assert state(folder)["epoch"] in (2, 4, 5)
    often = main.main([*small, "--n_epochs", "5", "--savename", "often"])
    assert_equal_weights(*(state(run, "last.pth.tar") for run in (folder, often)))


def test_patience_ends_the_run_and_more_of_it_takes_it_further(small, capsys):
    options = [*small, *FLAT, "--n_epochs", "9"]
    folder = main.main([*options, "--patience", "2"])
    assert epochs(folder) == [0, 1, 2, 3]
    assert "ended after epoch 3, --patience 2" in capsys.readouterr().out
    main.main([*options, "--patience", "2", "--resume"])
    assert "a larger --patience takes it further" in capsys.readouterr().out
    main.main([*options, "--patience", "4", "--resume"])
    assert epochs(folder)[-1] == 5
    folder = main.main([*small, "--trainer", "DeepAdversarialMetricLearning", "--n_epochs", "5",
                        "--metric_alone_epochs", "1", "--g_alone_epochs", "3", "--patience", "2",
                        "--savename", "waits"])  # while only the generator learns
    assert epochs(folder) == [0, 1, 5]


def test_a_plateau_lowers_every_rate(small):
    folder = main.main([*small, *FLAT, "--n_epochs", "5", "--scheduler", "plateau", "--gamma",
                        "0.5", "--plateau_patience", "2", "--decay", "0", "--lr", "1e-30"])
    rates = [row["next_lr"] for row in rows(folder, "log_train_Base.csv")]
    assert rates == pytest.approx([1e-30, 1e-30, 5e-31, 5e-31, 2.5e-31])
    saved = state(folder, "last.pth.tar")["optimizers"]
    assert saved["embedder_optimizer"]["param_groups"][0]["lr"] == pytest.approx(2.5e-31)


@pytest.mark.parametrize("extra", [["--scheduler", "plateau", "--plateau_patience", "1"],
                                   ["--patience", "2"]])
def test_going_on_after_a_last_epoch_off_the_schedule_is_the_unbroken_run(small, extra):
    options = [*small, *FLAT, "--lr", "1e-9", "--eval_every", "2", *extra]
    whole = main.main([*options, "--n_epochs", "8"])
    broken = [*options, "--savename", "broken"]
    main.main([*broken, "--n_epochs", "3"])
    folder = main.main([*broken, "--n_epochs", "8", "--resume"])
    assert rows(folder, "log_train_Base.csv") == rows(whole, "log_train_Base.csv")
    assert [row for row in rows(folder) if row["epoch"] != 3] == rows(whole)


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


@pytest.fixture
def tensorboard(monkeypatch):
    """A stand-in for the package, which need not be installed."""
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard",
                        types.SimpleNamespace(SummaryWriter=EventFolder))


def test_tensorboard_gets_every_loss_rate_and_metric(small, tensorboard):
    folder = main.main([*small, "--n_epochs", "2", "--tensorboard"])
    with open(Path(folder) / "tensorboard" / "events.csv") as file:
        events = list(csv.reader(file))
    values = [float(value) for tag, value, _ in events if tag == "loss/total_loss"]
    means = [row["total_loss"] for row in rows(folder, "log_train_Base.csv")]
    assert means == pytest.approx(np.reshape(values, (2, -1)).mean(1).tolist())
    recalls = {int(step): float(value) for tag, value, step in events if tag == "metric/recall@1"}
    assert recalls == {row["epoch"]: row["recall@1"] for row in rows(folder)}
    assert {"learning_rate/trunk", "learning_rate/embedder", "learning_rate/metric_loss"} <= {
        tag for tag, _, _ in events}


def test_without_the_package_tensorboard_the_flag_is_an_error(small, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    assert "pip install tensorboard" in error_of([*small, "--tensorboard"], capsys)
    assert not os.path.exists(small[small.index("--save_path") + 1])


def test_the_untrained_networks_pictures_stay_where_training_does_not_gain(small, monkeypatch):
    """The checkpoint is of the best epoch of training all the same."""
    evaluate_sets, recalls = evaluate.evaluate_sets, iter([0.5, 0.25, 0.5, 0.75, 0.625])

    def scripted(*args, **kwargs):
        metrics, embedded = evaluate_sets(*args, **kwargs)
        return metrics | {"recall@1": next(recalls)}, embedded

    drawn = []
    monkeypatch.setattr(evaluate, "evaluate_sets", scripted)
    monkeypatch.setattr(evaluate, "draw_recoveries",
                        lambda *args, title, **kwargs: drawn.append(title))
    folder = main.main([*small, "--n_epochs", "2"])
    assert drawn == ["epoch 0"] and state(folder)["epoch"] == 2
    main.main([*small, "--n_epochs", "4", "--resume"])
    assert drawn == ["epoch 0", "epoch 3"] and state(folder)["epoch"] == 3


# ---- resumption; test_resume.py has what disturbs a run


def test_a_finished_run_goes_further_by_its_name_where_its_data_has_moved(small, tree, tmp_path):
    """A run without a name is called by its start time."""
    unnamed = small[:small.index("--savename")]
    folder = main.main(unnamed)
    shutil.copytree(tree, tmp_path / "moved")
    again = main.main([*unnamed, "--savename", Path(folder).name, "--resume", "--n_epochs", "2",
                       "--source_path", str(tmp_path / "moved")])
    assert again == folder and epochs(folder) == [0, 1, 2] and set(os.listdir(folder)) == FILES
    assert "n_epochs: 2" in (Path(folder) / "Parameter_Info.txt").read_text().splitlines()


def test_resuming_is_refused_on_other_data_and_without_a_run(small, tmp_path, capsys):
    unnamed = small[:small.index("--savename")]
    assert "there is no run" in error_of([*small, "--resume"], capsys)
    assert "--savename" in error_of([*unnamed, "--resume"], capsys)
    last = Path(main.main(small)) / "last.pth.tar"
    other, before = make_tree(tmp_path / "other", (5,) * 8), last.read_bytes()
    assert "other data" in error_of([*small, "--resume", "--source_path", str(other)], capsys)
    assert last.read_bytes() == before


def test_a_run_folder_is_never_written_over(small, capsys):
    folder = Path(main.main(small))
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert "exists already" in error_of(small, capsys)
    assert before == {path.name: path.read_bytes() for path in folder.iterdir()}


def test_runs_that_start_in_the_same_second_have_folders_of_their_own(small, monkeypatch):
    clock = {**vars(results.time), "strftime": lambda _: "2026-01-02_03-04-05"}
    for module in (results, main):
        monkeypatch.setattr(module, "time", types.SimpleNamespace(**clock))
    unnamed = [*small[:small.index("--savename")], "--n_epochs", "0"]
    folders = [Path(main.main(unnamed)) for _ in range(3)]
    assert [folder.name for folder in folders] == [
        "2026-01-02_03-04-05", "2026-01-02_03-04-05_2", "2026-01-02_03-04-05_3"]
    seeds = main.parse_options(["--seeds", "1", "2"]).savename
    assert folders[0].name in seeds and str(os.getpid()) in seeds
    assert f"savename: {folders[2].name}\n" in (folders[2] / "Parameter_Info.txt").read_text()


def test_a_broken_image_stops_a_run_which_resumes_once_it_is_mended(small, tmp_path, capsys):
    """Though it had no checkpoint yet; what was half written goes."""
    image = make_tree(tmp_path / "broken") / "class_07" / "2.png"
    whole = image.read_bytes()
    options = [*small, "--source_path", str(tmp_path / "broken")]
    for resume, content, kernels in (([], b"", "0"), (["--resume"], b"no image at all", "1")):
        image.write_bytes(content)
        message = error_of([*options, *resume, "--kernels", kernels], capsys)
        assert str(image) in message and len(message.splitlines()) == 1
    image.write_bytes(whole)
    half = tmp_path / "runs" / "folder" / "run" / "last.pth.tar.tmp"
    half.write_bytes(b"half")
    assert epochs(main.main([*options, "--resume"])) == [0, 1] and not half.exists()


# ---- every flag does something

FLAGS = [action for action in main.build_parser()._actions if action.dest != "help"]
# What a flag needs around it to matter, and values where "one more" is not a legal one.
CONTEXT = {
    "not_pretrained": ["--arch", "resnet18", "--image_size", "32"],
    "arch": ["--not_pretrained", "--image_size", "32"],
    "plateau_patience": ["--scheduler", "plateau"],
    "momentum": ["--optim", "sgd"],
    "nesterov": ["--optim", "sgd"],
    "patience": ["--n_epochs", "3", "--lr", "0"],
    "eval_every": ["--n_epochs", "2"],
    "cluster_every": ["--n_epochs", "3"],
    "vehicle_protocol": ["--dataset", "vehicle_id"],
    **{flag: ["--trainer", name] for name, trainer in trainers.TRAINERS.items()
       for flag in trainer.takes if flag != "margin"},
}
VALUES = {"momentum": "0.5", "clip_norm": "1", "clip_value": "1", "freeze": "trunk",
          "crop_scale": "0.5", "eval_resize": "20",
          "checkpoint_every": "1", "bs": "12", "samples_per_class": "2", "k_vals": "3",
          "tau": "1", "arch": "resnet18", "val_split": "0.5", "seeds": "7",
          "recipe": "glyphs/margin", "distance_cutoff": "0.6", "gamma": "0.5", "dataset": "glyphs",
          "eval_memory": "0.5", "metrics": "recall mrr", "embedding_sizes": "5 3",
          "g_weights": "1 2 1 1", "patience": "1", "plateau_patience": "1",
          "rho_probability": "1", "multisimilarity_lambda": "0.5", "sphereface_lambda": "2000",
          "angular_alpha": "40", "recallatk_k": "1 2"}


def described(value, seen=()):
    """What an object is made of, as text: numbers, tensors, functions with what they enclose."""
    def inner(*values):
        return f"({', '.join(described(each, (*seen, id(value))) for each in values)})"

    if torch.is_tensor(value) or isinstance(value, np.ndarray):
        value = torch.as_tensor(value)
        return f"{tuple(value.shape)} {value.dtype} {value.double().sum().item()}"
    if isinstance(value, (dict, types.MappingProxyType)):
        return inner(*value.items())
    if isinstance(value, (list, tuple, set, frozenset)):
        return inner(*value)
    if isinstance(value, functools.partial):
        return inner(value.func, value.args, value.keywords)
    if inspect.ismethod(value):
        return inner(value.__func__, value.__self__)
    if inspect.isfunction(value):
        return value.__qualname__ + inner(*[cell.cell_contents
                                            for cell in value.__closure__ or ()])
    if id(value) in seen or not hasattr(value, "__dict__") or isinstance(value, type):
        return re.sub(" at 0x.*?>", "", repr(value))
    return type(value).__name__ + inner({name: part for name, part in vars(value).items()
                                         if not name.endswith("_hooks")})


class Built(Exception):
    """Ends a run once all of its parts are made."""


def built(options):
    """All that the select functions make of a command line, as text; nothing is trained."""
    parts = []

    def keeping(module, name, patch):
        select = getattr(module, name)

        def kept(*args):
            parts.append(select(*args))
            return parts[-1]
        patch.setattr(module, name, kept)

    def stop(opt, *_):
        parts.extend(evaluate.scoring_select(opt, epoch, torch.device("cpu"))
                     for epoch in range(4))
        raise Built

    with pytest.MonkeyPatch.context() as patch:
        keeping(trainers, "trainer_select", patch)
        keeping(datasets, "dataset_select", patch)
        patch.setattr(results, "open_log", stop)
        with pytest.raises(Built):
            main.main(options)
    torch.use_deterministic_algorithms(False)  # --deterministic is for the process
    return described(parts)


def trace(options, capsys):
    """What a run does, as text, without its own statement of the options and without times."""
    saved, save, resume = [], auxiliaries.save_checkpoint, results.Log.resume

    def saving(path, *args, **kwargs):
        saved.append(os.path.basename(path))
        save(path, *args, **kwargs)

    def resuming(log, trainer):
        saved.append(torch.are_deterministic_algorithms_enabled())
        torch.use_deterministic_algorithms(False)
        resume(log, trainer)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(auxiliaries, "save_checkpoint", saving)
        patch.setattr(results.Log, "resume", resuming)
        capsys.readouterr()
        folder = main.main(options)
    printed = re.sub(r"^(options|network) .*\n|\d+(s|m \d+s), \d+ images/s$", "",
                     capsys.readouterr().out, flags=re.M)  # which state options themselves
    folder = folder[0] if isinstance(folder, list) else folder
    files = sorted(os.listdir(folder)) + [rows(folder)] if folder else []
    return str((printed, saved, files))


def changed(action, current, tmp_path):
    """A command line's part that gives a flag another value than the current one."""
    option = action.option_strings[0]
    if action.nargs == 0:
        return [option]
    if action.dest == "source_path":
        return [option, str(make_tree(tmp_path / "other", seed=1))]
    if action.dest == "weights":
        torch.manual_seed(5)
        torch.save(netlib.ConvNet().state_dict(), tmp_path / "weights.pth")
        return [option, str(tmp_path / "weights.pth")]
    if action.dest in VALUES:
        return [option, *VALUES[action.dest].split()]
    if action.choices:
        return [option, next(choice for choice in action.choices if choice != current)]
    if isinstance(current, (int, float)):
        return [option, str(current + 1 if isinstance(current, int) else 2 * current + 0.1)]
    return [option, str(tmp_path / "elsewhere") if "path" in action.dest else "elsewhere"]


def assert_reaches_losses(action, small, tmp_path):
    """A flag of losses changes what loss_select makes, of each loss that has it."""
    for name in losses.LOSSES:
        base = [*small, "--loss", name]
        samplings = losses.LOSSES[name].samplings
        if action.dest not in losses.flags_of(name) or (action.dest == "sampling"
                                                        and len(samplings) < 2):
            continue
        change = (["--sampling", samplings[1]] if action.dest == "sampling" else
                  changed(action, getattr(main.parse_options(base), action.dest), tmp_path))
        made = []
        for options in (base, [*base, *change]):
            torch.manual_seed(0)
            made.append(described(losses.loss_select(main.parse_options(options), 4)))
        assert made[0] != made[1], name


@pytest.mark.parametrize("action", FLAGS, ids=lambda action: action.dest)
def test_every_flag_acts(action, small, tmp_path, capsys, monkeypatch, tensorboard):
    """Walks the parser itself: no flag that nothing reads can be added unnoticed.

    A loss's flag reaches the loss; another changes a part of the run, or what the run does.
    """
    import torchvision
    imagenet = torchvision.models.resnet18().state_dict()
    monkeypatch.setattr("torchvision.models._api.WeightsEnum.get_state_dict",
                        lambda weights, *args, **kwargs: imagenet)
    if any(action.dest in losses.flags_of(name) for name in losses.LOSSES):
        return assert_reaches_losses(action, small, tmp_path)
    base = [*small, "--samples_per_class", "4", *CONTEXT.get(action.dest, [])]
    if action.dest == "vehicle_protocol":
        base += make_vehicle_id(tmp_path)
    change = changed(action, getattr(main.parse_options(base), action.dest), tmp_path)
    if action.dest == "resume":
        folder = main.main(base)
        assert main.main([*base, *change]) == folder
        assert "1 epochs already" in capsys.readouterr().out
    elif action.dest in ("recipes", "dry_run") or built(base) == built(
            [*base, "--savename", "again", *change]):
        runs = [tmp_path / "first", tmp_path / "second"]
        first, second = (trace([*base, "--save_path", str(run), *more], capsys)
                         .replace(str(run), "PATH") for run, more in zip(runs, ([], change)))
        assert first != second


def test_what_is_made_and_done_twice_is_the_same(small, tmp_path, capsys):
    """The comparisons that the test above rests on: nothing but the options changes them."""
    again = [*small, "--savename", "again"]
    assert built(small) == built(again)
    assert trace(small, capsys) == trace(again, capsys).replace("folder/again", "folder/run")


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


@pytest.mark.parametrize("options,expected", [
    (["--arch", "googlenet"], dict(embed_dim=512, image_size=227)),
    (["--arch", "googlenet", "--embed_dim", "64"], dict(embed_dim=64)),
    (["--dataset", "online_products"], dict(k_vals=[1, 10, 100, 1000])),
    (["--dataset", "in-shop"], dict(k_vals=[1, 10, 20, 30, 50])),
    (["--dataset", "vehicle_id"], dict(k_vals=[1, 5])),
    (["--dataset", "vehicle_id", "--k_vals", "2"], dict(k_vals=[2])),
    (["--loss", "arcface"], dict(loss_lr=5e-4)),  # Roth et al. 2020: 50 times the network's
    (["--loss", "crossentropy"], dict(loss_lr=1e-5)),
    (["--loss", "proxynca"], dict(samples_per_class=1, sampling="none")),
    (["--loss", "proxynca", "--samples_per_class", "2"], dict(samples_per_class=2)),
    (["--loss", "npair"], dict(samples_per_class=4, sampling="npair")),
    (["--trainer", "CascadedEmbeddings"], dict(embedding_sizes=[44, 42, 42])),
    (["--trainer", "CascadedEmbeddings", "--embed_dim", "2"], dict(embedding_sizes=[2])),
    (["--not_pretrained"], dict(batchnorm="trained")),
    (["--dataset", "glyphs"], dict(arch="convnet", image_size=32, kernels=0, lr=1e-3)),
    (["--cache", "device"], dict(kernels=0)),
    (["--dataset", "glyphs", "--lr", "1e-5", "--arch", "resnet18"],
     dict(lr=1e-5, arch="resnet18")),
])
def test_dependent_defaults_give_way_to_the_user(options, expected):
    opt = vars(main.parse_options(options))
    assert {name: opt[name] for name in expected} == expected


def test_the_default_k_are_those_that_a_small_test_set_has(small, tmp_path, capsys):
    """A run goes on from where it stopped with the k that it had."""
    make_tree(tmp_path / "few", (3,) * 4)
    place = small.index("--k_vals")
    options = [*small[:place], *small[place + 3:], "--source_path", str(tmp_path / "few"), "--bs",
               "4", "--samples_per_class", "2"]
    shown, lines = header(options, capsys)
    assert shown["k_vals"] == "1 2 4"
    assert "note: no recall at 8, as each query has 5 images to be compared with" in lines
    assert "recall@4" in rows(main.main([*options, "--n_epochs", "2", "--resume"]))[-1]


def test_a_users_own_folder_is_expanded_in_paths(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    flags = ("source_path", "save_path", "weights")
    opt = main.parse_options(["--dataset", "glyphs", *(f"--{name}=~/{name}" for name in flags)])
    assert all(getattr(opt, name) == f"/home/me/{name}" for name in flags)


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


# ---- bad input


@pytest.mark.parametrize("options,words", [
    (["--arch", "nosuch"], ["nosuch", "resnet50"]),
    (["--seed", "123456789012345678901234567890"], ["--seed 1234", "below 4294967296"]),
    (["--bs", "10", "--samples_per_class", "4"], ["--bs 10", "--samples_per_class 4"]),
    (["--bs", "0"], ["--bs 0"]),
    (["--bs", "4", "--samples_per_class", "4"], ["--bs 4", "no negatives"]),
    (["--bs", "40", "--samples_per_class", "4"], ["10 classes", "has 4", "--bs"]),
    (["--loss", "triplet", "--sampling", "npair"], ["--sampling npair", "semihard"]),
    (["--loss", "proxynca", "--sampling", "random"], ["--sampling random", "proxynca"]),
    (["--loss", "triplet", "--samples_per_class", "1"], ["--samples_per_class 1", "2 or more"]),
    (["--loss", "arcface", "--sampling", "multisimilarity", "--samples_per_class", "1"],
     ["--samples_per_class 1"]),
    (["--loss", "contrastive", "--positives", "all"], ["--positives all", "--sampling none"]),
    (["--loss", "arcface", "--arcface_margin", "4"], ["--arcface_margin 4", "3.14"]),
    (["--margin", "-1"], ["margin", "-1"]),
    (["--distance_cutoff", "0.1"], ["--distance_cutoff", "0.1"]),
    (["--savename", "../elsewhere"], ["../elsewhere", "--save_path"]),
    (["--source_path", "no_such_folder"], ["no_such_folder", "<class>"]),
    (["--dataset", "cub200", "--source_path", "no_such_folder"], ["no_such_folder", "images.txt"]),
    (["--k_vals", "1", "400"], ["400", "23", "--k_vals"]),
    (["--weights", "no_such_file"], ["no_such_file"]),
    (["--weights", "x", "--not_pretrained"], ["--weights", "--not_pretrained"]),
    (["--arch", "vit_b_16", "--not_pretrained", "--image_size", "64"],
     ["vit_b_16", "--image_size 64"]),
    (["--embed_dim", "0"], ["--embed_dim 0"]),
    (["--cache", "device", "--kernels", "2"], ["--cache device", "--kernels 2"]),
    (["--metrics", "nmi", "f1"], ["--metrics nmi f1", "recall"]),
    (["--vehicle_protocol", "random_gallery"], ["--vehicle_protocol", "vehicle_id", "folder"]),
    (["--scheduler", "plateau", "--gamma", "1"], ["--gamma 1.0", "plateau"]),
    (["--amp", "fp16"], ["--amp fp16 needs a GPU"]),
    (["--g_weights", "1", "1", "-1", "1"], ["--g_weights -1: it must be a finite number"]),
    (["--trainer", "CascadedEmbeddings", "--embedding_sizes", "4", "3"],
     ["--embedding_sizes 4 3", "--embed_dim 8"]),
    (["--trainer", "DeepAdversarialMetricLearning", "--loss", "arcface", "--samples_per_class",
      "1"], ["--samples_per_class 1"]),
    (["--trainer", "DeepAdversarialMetricLearning", "--loss", "npair"], ["unit-norm", "npair"]),
    (["--trainer", "TwoStreamMetricLoss", "--loss", "contrastive"],
     ["--trainer TwoStream", "--loss contrastive", "marginloss, triplet, snr"]),
    (["--trainer", "TwoStreamMetricLoss", "--sampling", "rho"], ["TwoStream", "--sampling rho"]),
    (["--trainer", "UnsupervisedEmbeddingsUsingAugmentations", "--loss", "proxynca"],
     ["--trainer Unsupervised", "--loss proxynca"]),
    (["--trainer", "UnsupervisedEmbeddingsUsingAugmentations", "--samples_per_class", "4"],
     ["--trainer Unsupervised", "--samples_per_class 4", "1 only"]),
    (["--trainer", "UnsupervisedEmbeddingsUsingAugmentations", "--loss", "triplet",
      "--batch_draw", "replacement"], ["--batch_draw replacement", "its own negative"]),
])
def test_bad_options_end_with_one_message_and_no_folder(small, tmp_path, capsys, options, words):
    message = error_of([*small, *options], capsys)
    assert all(word in message for word in words), message
    assert not (tmp_path / "runs" / "folder" / "run").exists()


def test_no_flag_takes_a_number_that_is_none(small, tmp_path, capsys):
    """Another walk over the parser, whose flags name their bounds themselves."""
    numbers = [action for action in FLAGS if action.nargs != 0 and not action.choices
               and action.type not in (None, os.path.expanduser)]
    assert len(numbers) > 60
    for action in numbers:
        own = [name for name in losses.LOSSES if action.dest in losses.flags_of(name)]
        message = error_of([*small, *(["--loss", own[0]] if own else []),
                            action.option_strings[0],
                            *["nan"] * (action.nargs if isinstance(action.nargs, int) else 1)],
                           capsys)
        assert action.dest in message, (action.dest, message)
    assert not (tmp_path / "runs").exists()


def test_too_little_data_is_an_error_before_there_is_a_folder(small, tmp_path, capsys):
    for name, sizes, words in (("lone", (6, 6, 6, 6, 1, 1, 1, 1), "nothing to retrieve"),
                               ("few", (6, 6, 6), "two or more")):
        data = str(make_tree(tmp_path / name, sizes))
        assert words in error_of([*small, "--source_path", data], capsys)
        assert datasets.main(["--dataset", "folder", "--source_path", data]) == 1
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("name", ["d\udcff\udcfe", "\x1b[31mred\n"])
def test_a_path_that_is_no_text_works_to_the_end(name, small, tree, tmp_path, capsys):
    data = tmp_path / name
    try:
        shutil.copytree(tree, data)
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    (data / "class_00" / f"left{name}.x").touch()
    options = [*small, "--source_path", str(data), "--save_path", str(tmp_path / f"runs{name}"),
               "--plot_embeddings", "pca", "--save_embeddings"]
    folder = main.main(options)
    assert main.main([*options, "--resume", "--n_epochs", "2"]) == folder
    output, shown = capsys.readouterr().out, repr(name)[1:-1]
    lines = [line for line in output.splitlines() if line.startswith(("data ", "         note"))]
    assert len(lines) == 4 and all(shown in line for line in lines)
    assert "\x1b" not in output and f"files in {auxiliaries.printable(folder)}" in output


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


def test_a_slip_in_ones_own_code_shows_its_file_and_line(small, monkeypatch):
    """In a loss's constructor, and in a transform that runs in loading processes."""
    def slip(*_, **__):
        a, b, c = 1, 2

    with monkeypatch.context() as patch:
        patch.setattr(losses.MarginLoss, "__init__",
                      functools.wraps(losses.MarginLoss.__init__)(slip))
        with pytest.raises(ValueError, match="not enough values to unpack"):
            main.main(small)
    row = datasets.DATASETS["folder"]
    monkeypatch.setitem(datasets.DATASETS, "folder", row._replace(
        transforms=lambda *args, **options: (slip, row.transforms(*args, **options)[1])))
    with pytest.raises(SystemExit) as stop:
        main.main([*small, "--kernels", "2"])
    line = slip.__code__.co_firstlineno + 1
    assert f'File "{__file__}", line {line}, in slip\n    a, b, c = 1, 2\n' in stop.value.code
    assert stop.value.code.endswith("not enough values to unpack (expected 3, got 2)")


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


# ---- what stands beside the code


def test_every_name_of_a_table_stands_in_the_readme():
    text = (ROOT / "README.md").read_text()
    for name in (*losses.LOSSES, *samplers.METHODS, *datasets.DATASETS, *trainers.TRAINERS):
        assert name in text, name


def test_the_readmes_library_script_runs_as_printed(tmp_path):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    scripts = [text for text in blocks if "trainers.MetricLossOnly(" in text]
    assert len(scripts) == 1 and len(scripts[0].splitlines()) <= 25
    script = scripts[0].replace("num_epochs=3", "num_epochs=1")
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, text=True, timeout=600,
                          capture_output=True, env={**os.environ, "PYTHONPATH": str(ROOT),
                                                    "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    best = ast.literal_eval(done.stdout)
    assert best["recall@1"] > 0.4  # 0.33 untrained
    saved = state(tmp_path, "best.pth.tar")
    assert saved["epoch"] == best["epoch"] and {"trunk", "embedder"} == set(saved["models"])
