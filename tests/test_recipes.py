"""Recipes and their verdicts, seeds, tables and comparisons of runs, held-out classes.

What a test expects is worked out here from the runs' csv files, or from files made by hand.
"""

import csv
import io
import os
import re
import shlex
import weakref
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from PIL import Image

import datasets
import evaluate
import images
import main
import results
import trainers
from conftest import (ROOT, error_of, make_in_shop, make_tree, make_vehicle_id, rows,
                      state)

NAMES = list(results.read_recipes())
# NMI, F1, recall at the k of each dataset: the tables of the reference's README.
REFERENCE = """
cub200/margin-distance 68.2 38.7 63.4 74.9 86.0 90.4
cub200/triplet-softhard 66.2 35.5 61.2 73.2 82.4 89.5
cub200/npair 65.4 33.8 59.0 71.3 81.1 88.8
cub200/proxynca 68.1 38.1 64.0 75.4 84.2 90.5
cars196/margin-distance 67.2 37.6 79.3 87.1 92.1 95.4
cars196/triplet-softhard 64.4 32.4 75.4 84.2 90.1 94.1
cars196/npair 62.3 30.1 69.5 80.2 87.3 92.1
cars196/proxynca 66.3 35.8 80.0 87.2 91.8 95.1
online_products/margin-distance 89.6 34.9 76.1 88.7 95.1 98.3
online_products/triplet-softhard 89.1 33.7 74.3 87.6 94.9 98.5
online_products/npair 88.8 31.1 70.9 85.2 93.8 98.2
in-shop/margin-distance 88.2 27.7 84.5 96.1 97.4 97.9 98.5
in-shop/triplet-semihard 89.0 30.8 83.9 96.3 97.6 98.4 98.8
in-shop/npair 88.0 27.6 80.9 95.0 96.6 97.5 98.2
"""
K_VALS = {"cub200": (1, 2, 4, 8), "cars196": (1, 2, 4, 8), "online_products": (1, 10, 100, 1000),
          "in-shop": (1, 10, 20, 30, 50)}


@pytest.fixture(scope="session")
def tree(tmp_path_factory):
    """Twelve classes, of which six train."""
    return make_tree(tmp_path_factory.mktemp("data") / "tree", (6,) * 12)


@pytest.fixture
def small(small):
    """Options of a run without a name."""
    place = small.index("--save_path")
    return [*small[:place], "--n_epochs", "2", *small[place:place + 2]]


@pytest.fixture
def tiny(small, tmp_path, monkeypatch):
    """A table with a recipe of a tiny run in the place of the tree's -> its command."""
    with open(tmp_path / "recipes.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([
            ("recipe", "options", "published", "source"),
            ("tiny/margin", shlex.join(small[:-2]), "nmi 50; recall@1 60.0±0.5; recall@2 70",
             "by hand")])
    monkeypatch.setattr(results, "RECIPES", file.name)
    return ["--recipe", "tiny/margin", *small[-2:]]


def best(folders, metric):
    """Each run's greatest value over the trained epochs, in percent."""
    return [100 * max(row[metric] for row in rows(folder)[1:]) for folder in folders]


# ---- the table of recipes


@pytest.fixture(scope="module")
def parsed():
    """{name of a recipe: its final options}."""
    with pytest.MonkeyPatch.context() as patch:  # the table is read once, instead of each time
        patch.setattr(results, "read_recipes", results.read_recipes().copy)
        return {name: main.parse_options(["--recipe", name]) for name in NAMES}


def test_every_line_of_the_table_parses_to_a_run_of_its_own(parsed):
    for name, recipe in results.read_recipes().items():
        opt = parsed[name]
        assert name == f"{opt.dataset}/{opt.savename}" and opt.departures == [] and recipe.source
        assert opt.seeds is None and opt.source_path == "./Datasets"
        assert set(recipe.published) <= {"nmi", "f1", *(f"recall@{k}" for k in opt.k_vals)}
        assert {"--loss", "--arch", "--embed_dim", "--image_size", "--bs", "--lr", "--decay",
                "--batchnorm", "--amp", "--samples_per_class", "--n_epochs", "--scheduler",
                "--k_vals"} <= set(recipe.options), name
        most = 5 if opt.dataset == "glyphs" else 1
        for mean, std in recipe.published.values():
            assert 20 < mean < 100 and (std is None or 0 < std < most)
        assert ("--tau" in recipe.options) == (opt.scheduler == "step")
    assert len(parsed) == len(NAMES) > 100


def test_the_table_has_the_references_rows():
    recipes = results.read_recipes()
    lines = [line.split() for line in REFERENCE.strip().splitlines()]
    for name, nmi, f1, *recalls in lines:
        keys = ["nmi", "f1", *(f"recall@{k}" for k in K_VALS[name.split("/")[0]])]
        values = [(float(value), None) for value in (nmi, f1, *recalls)]
        assert recipes[name].published == dict(zip(keys, values, strict=True))
    published = {name for name, recipe in recipes.items() if recipe.published}
    names = {name for name, *_ in lines}
    published.remove("glyphs/margin")  # a record of this project's own
    assert {name for name in published if "/rev-" not in name} == names and len(names) == 14
    later = [name.split("/rev-") for name in published if "/rev-" in name]
    assert {dataset: sum(other == dataset for other, _ in later) for dataset, _ in later} == {
        "cub200": 23, "cars196": 23, "online_products": 21}
    assert {"online_products/proxynca", "in-shop/proxynca"} <= set(NAMES) - published


# Epochs, tau, of the reference's script for GoogLeNet.
GOOGLENET = """
cub200/googlenet-margin-distance 60 10 20 30 40 50
cub200/googlenet-triplet-semihard 70 15 40 60
cub200/googlenet-npair 150 100
cub200/googlenet-proxynca 25 7 17
cars196/googlenet-margin-distance 70 30 50
cars196/googlenet-triplet-semihard 70 30 50
cars196/googlenet-npair 85 40 65
cars196/googlenet-proxynca 40 20 30
online_products/googlenet-margin-distance 20 2 6
online_products/googlenet-triplet-semihard 40 10
online_products/googlenet-npair 20 2 6
"""


def test_googlenets_recipes_are_the_lines_of_the_references_script(parsed):
    lines = {name: [int(number) for number in numbers] for name, *numbers in (
        line.split() for line in GOOGLENET.strip().splitlines())}
    lines |= {f"{dataset}/googlenet-{loss}": [40, 25] for dataset in ("in-shop", "vehicle_id")
              for loss in ("margin-distance", "triplet-semihard", "npair")}
    assert set(lines) == {name for name in NAMES if "googlenet" in name}
    for name, (n_epochs, *tau) in lines.items():
        opt = parsed[name]
        assert (opt.n_epochs, opt.tau, opt.lr, opt.embed_dim) == (n_epochs, tau, 1e-4, 512)


def test_sources_name_a_file_of_the_authors_for_each_option_and_assume_nothing(parsed):
    for name, recipe in results.read_recipes().items():
        opt = parsed[name]
        dataset, _, run = name.partition("/")
        assert "assumed" not in recipe.source, name
        if dataset in ("glyphs", "tiny_imagenet"):
            continue
        later = run.startswith("rev-")
        repository, rest = (("Revisiting_Deep_Metric_Learning_PyTorch", "parameters.py") if later
                            else ("Deep-Metric-Learning-Baselines", "Standard_Training.py"))
        files = recipe.source.split(f"Confusezius/{repository}: ")[1].split(". Differs: ")[0]
        *files, others = files.split("; ")
        assert others == f"the rest {rest}"
        named = [word for part in files for word in part.split() if word.startswith("--")]
        assert set(named) <= set(recipe.options) and len(named) == len(set(named)), name
        assert all(re.search(r" \S+\.(py|sh|md|txt)", part) for part in files), name
        assert {"--loss", "--n_epochs", "--image_size", "--batchnorm"} <= set(named)
        assert ("--form" in named) == (opt.form == "reference")
        assert opt.batch_draw == ("replacement" if later else "distinct" if opt.loss == "proxynca"
                                  else "spaced_replacement")
        assert opt.samples_per_class == (2 if later else 1 if opt.loss == "proxynca" else 4)


def test_the_check_without_data_is_the_programs_defaults_written_out(parsed):
    for name, flags in (("margin", []), ("crossentropy", ["--loss", "crossentropy"])):
        plain = vars(main.parse_options(["--dataset", "glyphs", *flags]))
        recipe = vars(parsed[f"glyphs/{name}"])
        assert {key for key, value in recipe.items() if plain[key] != value} == {
            "recipe", "savename", "given"}


def test_the_script_and_the_readme_have_the_tables_values():
    recipes = results.read_recipes()
    lines = [line.partition("#") for line in (ROOT / "Standard_Training.sh").read_text()
             .splitlines() if line and line[0] != "#"][2:]
    listed = {}
    for command, _, values in lines:
        name, seeds = re.fullmatch(r"python main.py --recipe (\S+)(?: --seeds (\S.*\S))? *",
                                   command).groups()
        listed[name] = values.split()
        assert seeds == ("0 1 2 3 4" if "/rev-" in name else
                         "0 1 2" if name == "glyphs/margin" else None)
    assert sorted(listed) == sorted(NAMES) and len(lines) == len(NAMES)
    for name, recipe in recipes.items():
        shown = [f"{mean}" if std is None else f"{mean:.2f}±{std:.2f}"
                 for mean, std in recipe.published.values()]
        assert listed[name] == shown


# ---- the command line


def departures(*options):
    return main.parse_options(["--recipe", "cub200/margin-distance", *options]).departures


def test_a_flag_that_departs_is_listed_and_only_that():
    assert departures() == []
    assert departures("--lr", "1e-4") == ["--lr 0.0001 (the recipe has 1e-05)"]
    assert departures("--k_vals", "1", "10") == ["--k_vals 1 10 (the recipe has 1 2 4 8)"]
    assert departures("--val_split", "0.2", "--n_epochs", "2") == [
        "--val_split 0.2 (the recipe has 0.0)", "--n_epochs 2 (the recipe has 50)"]
    assert departures("--not_pretrained") == ["--not_pretrained True (the recipe has False)"]
    assert departures("--margin", "0.20", "--k_vals", "8", "4", "2", "1", "--tau", "30") == []
    assert departures("--gpu", "-1", "--seed", "3", "--savename", "x", "--source_path", "y",
                      "--kernels", "1", "--save_embeddings", "--resume") == []


def test_given_flags_win_over_the_recipe_wherever_they_stand():
    opt = main.parse_options(["--lr", "1e-4", "--recipe", "cub200/margin-distance", "--loss",
                              "triplet"])
    assert (opt.lr, opt.loss, opt.sampling, opt.n_epochs, opt.tau) == (
        1e-4, "triplet", "distance", 50, [30])
    assert opt.savename == "margin-distance"
    assert main.parse_options(["--recipe", "cub200/npair", "--savename", "a"]).savename == "a"


@pytest.mark.parametrize("options,said", [
    (["--recipe", "cub200/margin"], ["cub200/margin", "cub200/margin-distance", "--recipes"]),
    (["--recipe", "zzzzzzzzzzzz"], ["zzzzzzzzzzzz: there is none of that name. --recipes"]),
    (["--seeds", "0", "1", "0"], ["--seeds 0 1 0", "twice"]),
    (["--seeds", "0", "-1"], ["--seeds -1: it must be", "below 4294967296"]),
    (["--recipe", "cub200/margin-distance", "--loss", "npair"], ["cannot use --sampling"]),
    (["--val_split", "1"], ["--val_split 1"]),
    (["--val_split", "0.2"],  # of six classes
     ["--val_split 0.2 of 6 training classes leaves 1 to choose on and 5"]),
    (["--val_split", "0.4", "--k_vals", "12"],
     ["--k_vals 12", "to 11 (of the classes held out by --val_split"]),
])
def test_bad_input_is_refused_before_there_is_a_folder(small, options, said, capsys):
    message = error_of([*small, *options], capsys)
    assert all(part in message for part in said), message
    assert not os.path.exists(small[-1])


def test_a_dry_run_prints_the_plan_and_leaves_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main.main(["--recipe", "cub200/margin-distance", "--dry_run", "--seeds", "0", "3",
                      "--n_epochs", "7"]) is None
    out = capsys.readouterr().out
    options = dict(line[9:].split(": ", 1) for line in out.splitlines()
                   if line.startswith("options  "))
    parsed = vars(main.parse_options(["--recipe", "cub200/margin-distance", "--n_epochs", "7"]))
    assert set(options) == set(parsed)
    assert (options["n_epochs"], options["tau"], options["beta_lr"]) == ("7", "30", "0.0005")
    for seed in (0, 3):
        assert f"seed {seed} in " + os.path.join(
            "./Training_Results", "cub200", f"margin-distance_seed{seed}") in out
    for value in ("nmi 68.20", "f1 38.70", "recall@1 63.40", "recall@8 90.40"):
        assert f"published {value}\n" in out
    assert "departs from the recipe: --n_epochs 7 (the recipe has 50)\n" in out
    assert os.listdir(tmp_path) == []


def test_the_list_has_every_recipe_with_its_values(capsys):
    assert main.main(["--recipes"]) is None
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == NAMES
    line = lines[NAMES.index("cars196/rev-arcface")]
    assert "recall@1 79.16 ± 0.97" in line and "ICML 2020" in line
    assert "no published values" in lines[NAMES.index("in-shop/proxynca")]


# ---- runs and verdicts


def test_a_seed_leaves_nothing_behind_when_the_next_begins(tiny, monkeypatch):
    """Neither run nor data, whose cache may fill the memory."""
    known, select = [], trainers.trainer_select

    def watched(*args):
        assert not any(reference() for reference in known)
        trainer = select(*args)
        known.extend(weakref.ref(part) for part in (trainer, trainer.dataset))
        return trainer

    monkeypatch.setattr(trainers, "trainer_select", watched)
    main.main([*tiny, "--seeds", "0", "1", "--n_epochs", "0"])
    assert len(known) == 4


def test_seeds_killed_and_resumed_end_with_a_verdict_that_the_csv_files_bear_out(
        tiny, tmp_path, capsys, monkeypatch):
    options = [*tiny, "--seeds", "0", "1"]
    after_iteration, place = results.Log.after_iteration, tmp_path / "runs" / "folder"

    def stopping(log, trainer):
        after_iteration(log, trainer)
        if log.opt.seed == 1 and trainer.epoch == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(results.Log, "after_iteration", stopping)
        with pytest.raises(SystemExit):
            main.main(options)
    assert "--savename margin --resume" in capsys.readouterr().err
    assert len(rows(place / "margin_seed1")) == 2 and not (place / "margin_verdict.txt").exists()
    with pytest.raises(SystemExit, match="margin_seed0 exists already.*--resume"):
        main.main(options)
    folders = main.main([*options, "--resume"])
    assert folders == [str(place / f"margin_seed{seed}") for seed in (0, 1)]
    assert rows(folders[0]) != rows(folders[1])
    assert rows(main.main([*tiny, "--seed", "1", "--savename", "alone"])) == rows(folders[1])
    lines = (place / "margin_verdict.txt").read_text().splitlines()
    assert lines[0] == "recipe tiny/margin: by hand"
    published = {"nmi": (50, None), "recall@1": (60, 0.5), "recall@2": (70, None)}
    for metric in ("nmi", "recall@1", "recall@2", "f1", "map@r"):
        values = best(folders, metric)
        found = next(line.split()[1:] for line in lines if line.startswith(f"{metric} "))
        assert found[:3] == [f"{np.mean(values):.2f}", "±", f"{np.std(values):.2f}"]
        mean, std = published.get(metric, (None, None))
        assert mean is not None or len(found) == 3
        assert mean is None or f"{np.mean(values) - mean:+.2f}" in found
        assert std is None or found[3:6] == [f"{mean:.2f}", "±", f"{std}0"]
    inside = abs(np.mean(best(folders, "recall@1")) - 60) <= 0.5
    assert any(line.startswith("recall@1 ") and line.endswith(
        f"{'inside' if inside else 'outside'} ± 0.5") for line in lines)
    assert lines[-1] == f"verdict: {'reproduced' if inside else 'not reproduced'}"
    assert state(folders[0])["options"]["recipe"] == "tiny/margin"


def result_of(*values, **more):
    """A finished results.Result with a recall@1 for each epoch, the first untrained."""
    options = {"dataset": "d", "arch": "a", "loss": "l", "sampling": "s", "seed": "0",
               "n_epochs": str(len(values) - 1), **more}
    return results.Result("f", options, [{"epoch": float(epoch), "recall@1": value}
                                             for epoch, value in enumerate(values)])


@pytest.mark.parametrize("published,values,said", [
    ((60.0, None), (0.61,), "reproduced"), ((60.0, None), (0.6101,), "not reproduced"),
    ((60.0, None), (0.59,), "reproduced"), ((63.4, None), (0.644,), "reproduced"),
    ((60.0, 0.27), (0.6027,), "reproduced"), ((60.0, 0.27), (0.6028,), "not reproduced"),
    ((60.0, 2.0), (0.58, 0.62, 0.6), "reproduced"), (None, (0.6,), "no published value"),
])
def test_inside_is_the_published_spread_or_one_point(published, values, said):
    recipe = results.Recipe([], {"recall@1": published} if published else {}, "source")
    found = [result_of(0.99, value, value / 2) for value in values]
    lines = results.verdict(recipe, found)
    assert lines[-1] == f"verdict: {said}"
    assert ("±" in lines[1].split()[1:3]) == (len(values) > 1)  # one seed has no spread
    assert f"{100 * np.mean(values):.2f}" in lines[1]  # measured values without a reference too
    departed = results.verdict(recipe, found, ["--lr 1 (the recipe has 2)"])
    assert departed[-2:] == ["departs from the recipe: --lr 1 (the recipe has 2)",
                             f"verdict: {said} (not the recipe as it is)"]


def test_seeds_are_refused_before_the_first_one_trains(small, tmp_path):
    place = tmp_path / "runs" / "folder"
    (place / "run_seed1").mkdir(parents=True)
    options = [*small, "--savename", "run", "--seeds", "0", "1"]
    with pytest.raises(SystemExit, match="run_seed1 exists already"):
        main.main(options)
    assert os.listdir(place) == ["run_seed1"]
    with pytest.raises(SystemExit, match="there is no run in .*other_seed0, .*other_seed1"):
        main.main([*options, "--savename", "other", "--resume"])
    assert os.listdir(place) == ["run_seed1"]


def test_a_part_of_a_dataset_reproduces_nothing(tiny, small, tmp_path, capsys):
    source = tmp_path / "data"
    make_tree(source / "cub200" / "images", (4,) * 8)
    main.main([*tiny, "--dataset", "cub200", "--source_path", str(source)])
    out = capsys.readouterr().out
    assert "train split has 4 classes/16 images, not cub200's 100/5,864" in out
    assert out.endswith("(not the recipe as it is)\n")
    main.main([*tiny, "--savename", "whole"])
    results.main(["table", small[-1]])
    part, whole = capsys.readouterr().out.split("\nfolder ")
    assert "(60.00 ± 0.50, " in whole and "(60.00" not in part


# ---- tables


OPTIONS = {"dataset": "cub200", "arch": "resnet50", "loss": "marginloss", "sampling": "distance",
           "n_epochs": "2", "patience": "None", "seed": "0", "recipe": "None", "departures": "[]",
           "lr": "1e-05", "val_split": "0.0", "trainer": "MetricLossOnly", "weights": "None",
           "source_path": "data", "savename": "x"}
METRICS = ("recall@1", "recall@2", "map@r", "nmi", "f1")


def write_run(root, name, *measured, metrics=METRICS, **options):
    """A run folder by hand; measured: each epoch's values of the metrics, or one for all."""
    options = {**OPTIONS, "savename": name, **options}
    folder = Path(root) / options["dataset"] / name
    folder.mkdir(parents=True)
    (folder / "Parameter_Info.txt").write_text(
        "".join(f"{key}: {value}\n" for key, value in options.items()))
    lines = [f"epoch,{','.join(metrics)}"]
    for epoch, values in enumerate(measured):
        values = values if isinstance(values, tuple) else (values,) * len(metrics)
        lines.append(",".join(map(str, (epoch, *values))))
    (folder / "log_val_Base.csv").write_text("\n".join(lines) + "\n")
    return folder


def table(root, capsys, style="md"):
    capsys.readouterr()
    results.main(["table", str(root), "--format", style])
    return capsys.readouterr().out


def test_a_table_has_mean_and_std_over_seeds_published_values_and_the_best(tmp_path, capsys):
    same = {"recipe": "cub200/margin-distance"}
    write_run(tmp_path, "a0", 0.9, 0.62, 0.61, **same)
    write_run(tmp_path, "a1", 0.9, 0.60, 0.64, seed="1", **same)
    write_run(tmp_path, "n", 0.9, 0.5, 0.3, loss="npair", sampling="npair", recipe="cub200/npair",
              departures="['--lr 1 (the recipe has 2)']")
    write_run(tmp_path, "p", 0.9, (0.7, 0.1, 0.1, 0.1, 0.1), 0.1, loss="proxynca", sampling="none")
    write_run(tmp_path, "g", 0.9, 0.2, 0.2, arch="googlenet")
    write_run(tmp_path, "c", 0.9, 0.25, 0.2, dataset="cars196")
    out = table(tmp_path, capsys)
    titles = [line for line in out.splitlines() if "percent" in line]
    assert [title.split(":")[0] for title in titles] == ["cars196", "cub200"]
    assert all("best epoch of each metric on the test classes" in title for title in titles)
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in out.splitlines()
             if line.startswith("|") and "---" not in line]
    assert lines[0] == lines[2] == ["architecture", "loss/sampling", "seeds", "nmi", "f1",
                                    "recall@1", "recall@2", "map@r"]
    found = {(line[0], line[1]): line[2:] for line in lines[3:]}
    mean, std = np.mean([62, 64]), np.std([62, 64])
    assert (mean, std) == (63, 1)
    assert found["resnet50", "marginloss/distance"] == [
        "0 1", "**63.00 ± 1.00 (68.20, -5.20)**", "**63.00 ± 1.00 (38.70, +24.30)**",
        "63.00 ± 1.00 (63.40, -0.40)", "**63.00 ± 1.00 (74.90, -11.90)**", "**63.00 ± 1.00**"]
    assert found["resnet50", "npair/npair"] == ["0", *["50.00"] * 5]
    assert found["resnet50", "proxynca/none"] == ["0", "10.00", "10.00", "**70.00**", "10.00",
                                                  "10.00"]
    assert found["googlenet", "marginloss/distance"] == ["0", *["20.00"] * 5]
    assert lines[1] == ["resnet50", "marginloss/distance", "0", *["**25.00**"] * 5]


def test_the_three_formats_say_the_same(tmp_path, capsys):
    write_run(tmp_path, "a", 0.9, 0.62, 0.61, recipe="cub200/rev-margin-distance-beta0.6")
    write_run(tmp_path, "b", 0.9, 0.5, 0.3, lr="50%_&#${}~^\\")
    write_run(tmp_path, "c", 0.9)
    plain = [[cell.strip() for cell in line.strip("|").split(" | ")]
             for line in table(tmp_path, capsys).splitlines() if re.match(r"\| ?[ar]", line)]
    text = table(tmp_path, capsys, "csv")
    assert [row for row in csv.reader(io.StringIO(text)) if row and row[0][0] != "#"] == plain
    assert len(plain) == 3 and "**62.00 (62.50 ± 0.24, -0.50)**" in plain[1]
    assert plain[2][1] == "marginloss/distance lr=50%_&#${}~^\\"  # what sets it apart
    text = table(tmp_path, capsys, "tex")
    lines = text.splitlines()
    assert lines[0].startswith("% cub200: percent, best epoch of each metric on the test classes")
    assert lines[1] == r"\begin{tabular}{llrrrrrr}" and r"\end{tabular}" in lines
    assert r"\textbf{62.00 (62.50 $\pm$ 0.24, -0.50)}" in text and "**" not in text
    assert (r"lr=50\%\_\&\#\$\{\}\textasciitilde{}\textasciicircum{}\textbackslash{} & 0"
            in text)
    for line in lines[2:lines.index(r"\end{tabular}")]:
        assert line.endswith(r" \\") and len(re.findall(r"(?<!\\)&", line)) == 7
    for style, prefix in (("md", "- "), ("csv", "# "), ("tex", "% ")):
        line = f"\n{prefix}{tmp_path / 'cub200' / 'c'}: failed or unfinished before the first of 2"
        assert line in table(tmp_path, capsys, style)


def test_runs_of_one_row_differ_in_the_seed_alone(tmp_path, capsys):
    write_run(tmp_path, "a", 0.9, 0.5, 0.5, seed="3", gpu="0")
    write_run(tmp_path, "b", 0.9, 0.7, 0.5, seed="1", gpu="-1", source_path="elsewhere")
    write_run(tmp_path, "c", 0.9, 0.3, 0.5, n_epochs="2", lr="0.1")
    write_run(tmp_path, "d", 0.9, 0.3, 0.5, trainer="CascadedEmbeddings")
    write_run(tmp_path, "e", 0.9, 0.4, 0.2, weights="x/one.pth")
    write_run(tmp_path, "f", 0.9, 0.2, 0.2, weights="y/one.pth", seed="1")
    text = table(tmp_path, capsys)
    assert "| marginloss/distance lr=1e-05 weights=None | 1 3 | **60.00 ± 10.00** |" in text
    assert "| marginloss/distance lr=0.1 weights=None | 0 | 50.00 |" in text
    assert "| marginloss/distance lr=1e-05 weights=one.pth | 0 1 | 30.00 ± 10.00 |" in text
    assert "| marginloss/distance/CascadedEmbeddings | 0 | 50.00 |" in text


def test_runs_that_repeat_a_seed_count_once_and_are_named(tmp_path, capsys):
    first = write_run(tmp_path, "a", 0.1, 0.5, 0.5, seed="3")
    again = write_run(tmp_path, "b", 0.1, 0.9, 0.5, seed="3", gpu="-1")
    write_run(tmp_path, "c", 0.1, 0.7, 0.5, seed="1")
    text = table(tmp_path, capsys)
    assert "| marginloss/distance | 1 3 | **60.00 ± 10.00** |" in text
    assert f"\n- {again}: left out, it repeats seed 3 of {first}\n" in text


def test_each_folder_of_images_has_its_own_table(tmp_path, capsys):
    write_run(tmp_path, "a", 0.9, 0.5, 0.5, dataset="folder", source_path="dogs")
    write_run(tmp_path, "b", 0.9, 0.7, 0.5, dataset="folder", source_path="cats", seed="1")
    text = table(tmp_path, capsys)
    assert "folder dogs: percent" in text and "folder cats: percent" in text
    assert "**50.00**" in text and "**70.00**" in text and "±" not in text.split("\n\n")[1]


def test_small_is_best_of_some_metrics(tmp_path, capsys):
    metrics = ("recall@1", "dist_ratio", "rho", "d_ap", "d_an")
    write_run(tmp_path, "a", 0.1, (0.5, 0.5, 0.3, 0.6, 0.5), (0.4, 0.4, 0.4, 0.5, 0.4),
              metrics=metrics)
    write_run(tmp_path, "b", 0.1, 0.9, 0.8, metrics=metrics, lr="1")
    text = table(tmp_path, capsys)
    assert "| 50.00 | **0.40** | **0.30** | **0.50** | 0.50 |" in text  # shares alone in percent
    assert "| **90.00** | 0.80 | 0.80 | 0.80 | **0.90** |" in text


def test_runs_without_a_result_are_listed_and_foreign_files_passed_over(tmp_path, capsys):
    write_run(tmp_path, "done", 0.9, 0.5, 0.5)
    write_run(tmp_path, "early", 0.9, 0.8, 0.5, 0.5, n_epochs="9", patience="2")
    write_run(tmp_path, "late", 0.9, 0.5, 0.8, 0.5, n_epochs="9", patience="2")
    write_run(tmp_path, "untrained", 0.25, n_epochs="0")
    os.remove(write_run(tmp_path, "bare", 0.9) / "log_val_Base.csv")
    letters = write_run(tmp_path, "letters", 0.9) / "log_val_Base.csv"
    letters.write_text("epoch,recall@1\n0,abc\n")
    write_run(tmp_path, "odd number", 0.9, 0.5, n_epochs="many")
    for name, text in (("reference", "dataset\ncub200\n"), ("other", "lr: 1\n"), ("blank", "")):
        (tmp_path / "other" / name).mkdir(parents=True)
        (tmp_path / "other" / name / "Parameter_Info.txt").write_text(text)
    text = table(tmp_path, capsys)
    place = tmp_path / "cub200"
    for line in (f"- {place / 'late'}: unfinished after epoch 3 of 9\n",
                 f"- {place / 'bare'}: failed or unfinished before anything was measured\n",
                 f"- {place / 'letters'}: its logs cannot be read (",
                 f"- {place / 'odd number'}: its logs cannot be read ("):
        assert line in text
    assert text.count("\n- ") == 4 and "other" not in text
    assert {line.split(" | ")[1] for line in text.splitlines() if "| 0 |" in line} == {
        f"marginloss/distance n_epochs={epochs} patience={patience}"
        for epochs, patience in ((2, None), (9, 2), (0, None))}
    assert "| **80.00** |" in text and "| 25.00 |" in text


@pytest.mark.parametrize("make,said", [
    (lambda root: None, "is not a folder of results"),
    (lambda root: root.mkdir(), "holds no run"),
    (lambda root: (root.mkdir(), (root / "x.txt").write_text("x")), "holds no run"),
])
def test_a_folder_without_runs_is_refused(tmp_path, make, said):
    make(tmp_path / "results")
    with pytest.raises(SystemExit, match=f"results.py: error: .*results {said}"):
        results.main(["table", str(tmp_path / "results")])


def test_the_header_says_which_rule_chose(tmp_path, capsys):
    metrics = ("recall@2", "nmi", "val recall@2", "val nmi")
    write_run(tmp_path, "plain", (0.9, 0.9), (0.5, 0.1), (0.4, 0.3), metrics=metrics[:2])
    write_run(tmp_path, "held", 0.99, (0.2, 0.6, 0.7, 0.1), (0.3, "", 0.8, 0.2), metrics=metrics,
              val_split="0.2")
    both = table(tmp_path, capsys).split("\n\n")
    assert "percent, best epoch of each metric on the test classes" in both[0]
    assert "percent, epoch chosen on held-out training classes" in both[2]
    assert "| marginloss/distance | 0 | 30.00 | **50.00** |" in both[1]
    assert "| marginloss/distance val_split=0.2 | 0 | **60.00** | 30.00 |" in both[1]
    # The epoch that was chosen has no NMI; another's does not stand in for it.
    assert both[3].splitlines()[2:] == [
        "| resnet50 | marginloss/distance val_split=0.2 | 0 | nan | **30.00** |"]
    assert "val " not in both[3].splitlines()[0]


# ---- comparison


def test_runs_are_compared_in_one_picture_and_by_their_options(tmp_path, capsys):
    first = write_run(tmp_path, "a<&", 0.1, 0.5, 0.6, lr="0.1")
    second = write_run(tmp_path, "b", 0.1, 0.4, 0.3, 0.2, lr="0.2", seed="4", extra="1",
                       metrics=METRICS[:3])
    picture = tmp_path / "x.svg"
    results.main(["compare", str(first), f"{second}/", "--out", str(picture)])
    lines = capsys.readouterr().out.splitlines()
    assert lines == ["seed: 0 | 4", "lr: 0.1 | 0.2", "savename: a<& | b", "extra:  | 1",
                     f"curves in {picture}"]
    root = ElementTree.parse(picture).getroot()
    space = "{http://www.w3.org/2000/svg}"
    texts = [text.text for text in root.iter(f"{space}text")]
    assert all(name in texts for name in METRICS[:3]) and "nmi" not in texts
    curves = list(root.iter(f"{space}polyline"))
    assert [len(curve.get("points").split()) for curve in curves] == [3, 4] * 3
    assert f"1  cub200{os.sep}a<&" in texts and f"2  cub200{os.sep}b" in texts
    assert "1 0.6" in texts and "2 0.2" in texts  # legends, by number
    results.main(["compare", str(first), str(first), "--out", str(picture)])
    texts = [text.text for text in ElementTree.parse(picture).getroot().iter(f"{space}text")]
    assert f"2  cub200{os.sep}a<&" in texts and "1 0.6" in texts and "2 0.6" in texts


def test_what_cannot_be_compared_is_refused(tmp_path):
    good = write_run(tmp_path, "good", 0.1, 0.5)
    bare = write_run(tmp_path, "bare", 0.1)
    os.remove(bare / "log_val_Base.csv")
    out = tmp_path / "x.svg"
    for folder, said in ((tmp_path / "none", "is not the folder of a run"),
                         (bare, "is not the folder of a run with measurements"),
                         (write_run(tmp_path, "o", 0.1, metrics=("mrr",)), "no metric in common")):
        with pytest.raises(SystemExit, match=f"results.py: error: .*{said}"):
            results.main(["compare", str(good), str(folder), "--out", str(out)])
    assert not out.exists()


# ---- selection on held-out classes


def test_held_out_classes_are_no_training_classes():
    for number, share in ((100, 0.2), (7, 0.5), (4, 0.5), (50, 0.95)):
        labels = np.random.default_rng(1).permutation(np.repeat(np.arange(number), 3)).tolist()
        names = [f"class {label}" for label in range(number)]
        paths = [f"{label}/{i}.jpg" for i, label in enumerate(labels)]
        parts = datasets.hold_out(datasets.Split(paths, labels, names), share)
        pixels = np.array(labels, np.uint8)[:, None, None]
        same = datasets.hold_out(datasets.Split(pixels, labels, names), share)
        assert len(parts["val"].class_names) == round(share * number)
        assert sorted(parts["train"].class_names + parts["val"].class_names) == sorted(names)
        assert sorted(parts["train"].images + parts["val"].images) == sorted(paths)
        for name, part in parts.items():
            assert sorted(set(part.labels)) == list(range(len(part.class_names)))
            assert [f"class {path.split('/')[0]}" for path in part.images] == [
                part.class_names[label] for label in part.labels]
            assert same[name].labels == part.labels
            assert same[name].images.ravel().tolist() == [int(path.split("/")[0])
                                                          for path in part.images]


def test_too_few_classes_on_either_side_are_refused():
    for number, share in ((4, 0.25), (4, 0.75), (3, 0.5), (100, 0.995)):
        split = datasets.Split([""] * number, list(range(number)), [""] * number)
        with pytest.raises(ValueError, match=f"--val_split {share} of {number} training classes"):
            datasets.hold_out(split, share)


def selected(small, *options):
    """datasets.dataset_select for a command line."""
    return datasets.dataset_select(main.parse_options([*small, *options]))


def test_the_held_out_images_are_uncut_and_the_same_for_every_seed_and_cache(small):
    kept = []
    for seed, cache in (("1", "none"), ("2", "ram")):
        train, sets, _ = selected(small, "--val_split", "0.4", "--seed", seed, "--cache", cache)
        assert [name for name, *_ in sets] == ["", "val"] and sets[1].gallery is None
        assert not set(train.class_names) & set(sets[1].queries.class_names)
        assert set(train.class_names) | set(sets[1].queries.class_names) == {
            f"class_{label:02d}" for label in range(6)}
        assert set(sets[0].queries.class_names) == {f"class_{label:02d}" for label in range(6, 12)}
        kept.append(sets[1].queries)
    _, test = images.crop_transforms(16)
    for i, path in enumerate(kept[0].images):
        with Image.open(path) as image:
            expected = test(image.convert("RGB"))
        assert all(torch.equal(queries[i][0], expected) for queries in kept)
    train, sets, _ = selected(small)
    assert len(train.class_names) == 6 and [name for name, *_ in sets] == [""]


@pytest.mark.parametrize("make,names,galleries", [
    (make_in_shop, ["", "val"], [True, False]),
    (make_vehicle_id, ["set 1", "set 2", "set 3", "val"], [False] * 4)])
def test_other_layouts_hold_out_classes_too(small, tmp_path, make, names, galleries, capsys):
    options = [*make(tmp_path / "data"), "--samples_per_class", "4"]
    train, sets, _ = selected(small, *options, "--val_split", "0.4")
    assert [name for name, *_ in sets] == names
    assert [one.gallery is not None for one in sets] == galleries
    assert not set(train.class_names) & set(sets[-1].queries.class_names)
    assert len(sets[-1].queries.class_names) == 2
    folder = main.main([*small, *options, "--val_split", "0.4", "--save_embeddings"])
    assert "\nlast epoch:" in capsys.readouterr().out
    kept = np.load(Path(folder) / "embeddings_val.npz", allow_pickle=False)
    assert kept["embeddings"].shape == (8, 8)
    checked = state(folder)
    value = [row["val recall@1"] for row in rows(folder)]
    assert checked["epoch"] == 1 + int(np.argmax(value[1:]))


SCRIPTED = {"val": (0.9, 0.5, 0.7, 0.7, 0.6, 0.1), "test": (0.1, 0.2, 0.3, 0.8, 0.5, 0.4)}


@pytest.fixture
def scripted(monkeypatch):
    """Every run measures SCRIPTED, of both kinds what was written there for its epoch."""
    evaluate_sets = evaluate.evaluate_sets

    def scripted_sets(network, *args, **options):
        metrics, embedded = evaluate_sets(network, *args, **options)
        for name in metrics:
            kind = "val" if name.startswith("val ") else "test"
            metrics[name] = SCRIPTED[kind][network.__self__.epoch]
        return metrics, embedded

    monkeypatch.setattr(evaluate, "evaluate_sets", scripted_sets)


def test_the_held_out_classes_alone_choose(small, scripted, capsys):
    options = [*small, "--n_epochs", "5"]
    held = main.main([*options, "--savename", "held", "--val_split", "0.4"])
    lines = capsys.readouterr().out.splitlines()
    assert state(held)["epoch"] == 2  # the first of equals
    columns = list(rows(held)[0])
    assert columns == ["epoch", "recall@1", "recall@2", "map@r", "nmi", "f1", "val recall@1",
                       "val recall@2", "val map@r", "val nmi", "val f1"]
    values = [row["recall@1"] for row in rows(held)]
    assert values == list(SCRIPTED["test"])
    shown = [line.split() for line in lines if re.match(r"last epoch:|best epoch on", line)]
    assert [line[-4:] for line in shown] == [["recall@1", f"{values[epoch]:.4f}", "(epoch",
                                              f"{epoch})"] for epoch in (5, 2, 3)]
    assert "choosing on the test classes, as the literature does, gains +0.5000" in lines
    assert "best val recall@1 0.7000 in epoch 2 (untrained 0.9000)" in lines
    plain = main.main([*options, "--savename", "plain"])
    assert state(plain)["epoch"] == 3 and "val recall@1" not in rows(plain)[0]
    out = capsys.readouterr().out
    assert "held-out" not in out and "last epoch:" not in out
    text = table(small[-1], capsys)
    assert "val_split=0.4 | 1 | **80.00**" in text.split("held-out training classes")[0]
    assert "| 30.00 | " in text.split("held-out training classes")[1].replace("**", "")


def test_patience_and_the_plateau_follow_the_held_out_metric(small, scripted):
    options = [*small, "--n_epochs", "5", "--val_split", "0.4"]
    ended = main.main([*options, "--savename", "ended", "--patience", "2"])
    assert [row["epoch"] for row in rows(ended)] == [0, 1, 2, 3, 4]
    assert results.read_result(ended).state() == "finished"
    lowered = main.main([*options, "--savename", "lowered", "--scheduler", "plateau",
                         "--plateau_patience", "1", "--gamma", "0.5"])
    assert np.allclose([row["next_lr"] for row in rows(lowered, "log_train_Base.csv")],
                       [1e-3, 1e-3, 5e-4, 2.5e-4, 1.25e-4])
