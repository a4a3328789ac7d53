"""The programs in benchmarks/ still work, at their smallest; their own arithmetic by hand."""

import csv
import importlib.util
import math

import numpy as np
import pytest
import torch

import losses
import main
import results
import trainers
from conftest import ROOT


def program(name):
    """The module benchmarks/NAME.py; the folder is not on the path: it has a losses.py, too."""
    spec = importlib.util.spec_from_file_location(f"benchmarks_{name}",
                                                  ROOT / f"benchmarks/{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


cpu_study, fuzz, gpu, mutants, throughput = map(
    program, ("cpu_study", "fuzz", "gpu", "mutants", "throughput"))


def rows_of(text):
    """The cells of the printed table, line by line, its head first."""
    return [[cell.strip() for cell in line[1:-1].split("|")]
            for line in text.splitlines() if line.startswith("| ")]


# ---- fuzz.py


def test_a_few_damaged_files_end_clean_or_refused(tmp_path):
    torch.use_deterministic_algorithms(False)  # imports for seconds, of the ten that a case has
    counts, failures = fuzz.fuzz(10 * len(fuzz.TARGETS), seed=2, keep=tmp_path)
    assert failures == [] and not list(tmp_path.iterdir())
    assert all(count["cases"] == 10 == count["clean"] + count["refused"]
               for count in counts.values())


def test_the_fuzzer_knows_a_failure(tmp_path):
    def complain(error):
        raise error

    path = str(tmp_path / "file")
    for error, kind, why in ((ValueError(f"{path}: cut"), "refused", ""),
                             (KeyError(path), "failure", "KeyError"),
                             (ValueError("cut"), "failure", "names neither"),
                             (ValueError(f"{path}\ncut"), "failure", "not one line")):
        found = fuzz.outcome(fuzz.Case(lambda: complain(error), (path,)), tmp_path)
        assert found[0] == kind and why in (found[1] or "")
    found = fuzz.outcome(fuzz.Case(lambda: [0 for _ in iter(int, 1)], (path,)), tmp_path,
                         seconds=0.1)
    assert found == ("failure", "not done after 0.1 s")


# ---- cpu_study.py


@pytest.fixture(name="file")
def features_file(tmp_path):
    """Float16 features [120, 16] of 12 classes around random centres, the rows in any order."""
    generator = np.random.default_rng(0)
    labels = generator.permutation(np.arange(12).repeat(10))
    rows = generator.normal(size=(12, 16))[labels] + 0.8 * generator.normal(size=(120, 16))
    np.savez(tmp_path / "features.npz", embeddings=rows.astype(np.float16), labels=labels)
    return str(tmp_path / "features.npz")


def test_the_study_has_a_row_for_each_loss_at_the_best_rate_on_held_out_classes(file, tmp_path,
                                                                                capsys):
    found = cpu_study.main(["--features", file, "--losses", "proxynca", "--seeds", "1", "2",
                            "--lr", "1e-6", "1e-2", "--csv", str(tmp_path / "found.csv"),
                            "--n_epochs", "2", "--bs", "16", "--embed_dim", "8",
                            "--processes", "1"])
    head, *rows = rows_of(capsys.readouterr().out)
    assert head[:4] == ["loss", "sampling", "lr", "R@1"]
    assert {tuple(row[:2]) for row in rows} == {("marginloss", "distance"), ("proxynca", "none"),
                                                *cpu_study.UNTRAINED}
    recalls = [float(row[3].split()[0]) for row in rows]
    assert recalls == sorted(recalls, reverse=True)
    with open(tmp_path / "found.csv") as lines:
        assert len(list(csv.DictReader(lines))) == len(found)
    of_loss = [values for values in found if values["loss"] == "proxynca"]
    score = {values["lr"]: values["map@r"] for values in of_loss if values["classes"] != "test"}
    assert list(score) == [1e-6, 1e-2]
    last = [values for values in of_loss if values["classes"] == "test" and values["epoch"] == 2]
    assert [(values["seed"], values["lr"]) for values in last] == [
        (seed, max(score, key=score.get)) for seed in (1, 2)]
    r = [values["recall@1"] for values in last]
    row = next(row for row in rows if row[0] == "proxynca")
    assert row[3] == f"{np.mean(r):.3f} ± {np.std(r, ddof=1):.3f}"


def test_all_losses_are_compared_by_default():
    rows = cpu_study.chosen_rows(cpu_study.COMPARED)
    assert {loss for loss, _ in rows} == set(losses.LOSSES)
    assert cpu_study.chosen_rows(["npair", "npair/npair"]) == [("npair", "npair")]


def test_intervals_are_students_and_pair_the_seeds():
    # Differences 1, 2, 3: mean 2, deviation 1; t of 2 degrees at 0.975 is 4.30265.
    mean, half = cpu_study.interval([1.0, 2.0, 3.0])
    assert mean == 2 and half == pytest.approx(4.302652730 / 3 ** 0.5)
    assert math.isnan(cpu_study.interval([0.5])[1])

    def row(loss, values, sampling="none"):
        return [{"loss": loss, "sampling": sampling, "classes": "test", "lr": 1e-4, "seed": seed,
                 "epoch": 1, "recall@1": value, "map@r": 0.5, "nmi": 0.5}
                for seed, value in enumerate(values)]
    found = [*row("a", [0.10, 0.30, 0.50]), *row("b", [0.11, 0.32, 0.53])]
    for name, sampling in cpu_study.UNTRAINED:
        found += row(name, [0.1, 0.1, 0.1], sampling)
    line = next(line for line in cpu_study.summary(found, ("a", "none")) if "| b " in line)
    assert "| +0.020 [-0.005, +0.045] |" in line  # 4.30265 * 0.01 / sqrt(3) = 0.0248


def test_the_first_half_of_the_classes_trains(tmp_path):
    labels = np.array(["b", "a", "d", "c", "e", "d", "a"])
    rows = np.arange(14.0).reshape(7, 2)
    np.savez(tmp_path / "names.npz", embeddings=rows, labels=labels)
    train, test = cpu_study.read_features(tmp_path / "names.npz")
    assert train.rows.tolist() == rows[[0, 1, 6]].tolist() and train.labels.tolist() == [1, 0, 0]
    assert test.rows.tolist() == rows[[2, 3, 4, 5]].tolist()
    assert test.labels.tolist() == [1, 0, 2, 1] and train.rows.dtype == np.float32


def test_the_study_says_what_is_wrong(file):
    for flags, message in ((["--losses", "tripel"], "there is no loss tripel; there are"),
                           (["--losses", "npair/hard"], "npair takes the samplings npair"),
                           (["--seeds", "1", "1"], "each seed counts once"),
                           (["--arch", "resnet18"], "--arch resnet18: the study has no use")):
        with pytest.raises(SystemExit, match=message):
            cpu_study.main(["--features", file, *flags])


# ---- mutants.py


def test_a_boundary_that_no_test_looks_at_survives(tmp_path, monkeypatch, capsys):
    (tmp_path / "losses.py").write_text(
        'def small(x: 2 > 1):\n    """1 < 2"""\n    return f"{x + 1}" if not x < 3 else ""\n')
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests/test_losses.py").write_text(
        "from losses import small\n\ndef test_small():\n    assert small(5) and not small(0)\n")
    monkeypatch.setattr(mutants, "ROOT", tmp_path)
    monkeypatch.setattr(mutants, "TESTS", {"losses": ("test_losses.py",)})
    assert mutants.main(["--tests", str(tmp_path / "tests"), "--which"]) == 1
    report = capsys.readouterr().out
    assert "| all | 6 | 3 | 0 | 3 |" in report and "if not x <= 3" in report
    for line in ("condition | 2 | 2", "sign, not | 1 | 1", "comparison | 1 | 0",
                 "constant | 2 | 0"):
        assert f"| {line} |" in report
    assert report.endswith("mutants they catch:\n")  # the only test is not idle


# ---- gpu.py


def test_what_a_gpu_is_tried_with_works_on_a_cpu(capsys):
    assert gpu.benchmark(["--device", "cpu", "--only", "losses", "trainers", "overflow"]) == 0
    rows = rows_of(capsys.readouterr().out)[1:]
    assert len(rows) == sum(len(gpu.CHECKS[name][1]) for name in ("losses", "trainers")) + 1
    assert {verdict for _, verdict, _, _ in rows} == {"pass"}


def test_a_check_that_fails_is_a_row_with_its_traceback_and_the_rest_goes_on(monkeypatch, capsys):
    monkeypatch.setitem(gpu.CHECKS, "amp", (lambda bench, amp: gpu.require(amp, "none"), [("",)]))
    assert gpu.benchmark(["--device", "cpu", "--only", "amp", "overflow"]) == 1
    printed = capsys.readouterr().out
    assert "| FAIL | AssertionError: none |" in printed and "Traceback" in printed
    assert "| overflow | pass |" in printed and printed.endswith("1 failed\n")


# ---- throughput.py


def test_the_rates_fit_together(small, capsys):
    throughput.benchmark([*small[:-4], "--kernels", "0", "--iterations", "2", "--repeats", "1"])
    printed = capsys.readouterr().out
    assert "bs: 8" in printed and "untrained" not in printed  # nothing is evaluated
    rows = {name: cells for name, *cells in rows_of(printed)[1:]}
    assert list(rows) == ["bare network", "whole epoch", "loader alone", "torchvision's loader"]
    for name, (rate, spread, beside, ratio, paired, _) in rows.items():
        least, greatest = map(float, spread.split(" to "))
        assert 0 < least <= float(rate) <= greatest, name
        assert not beside or float(ratio) == pytest.approx(
            float(rate) / float(rows[beside][0]), rel=2e-3, abs=1e-3)


def test_bare_is_the_network_without_hooks_and_whole_is_the_run(small, monkeypatch):
    looks, updates = [], []
    monkeypatch.setattr(trainers.Diagnosis, "add", lambda *_: looks.append(1))
    monkeypatch.setattr(results.Log, "after_iteration", lambda *_: updates.append(1))
    trainer = throughput.build(main.parse_options(small))
    batch = trainer.next_batch()
    assert batch[0].dtype == torch.uint8
    weight = trainer.models["trunk"].backbone.layers[0].weight
    before = weight.detach().clone()
    assert throughput.bare(trainer, batch, 3) > 0
    assert not looks and not updates and not torch.equal(weight, before)
    assert throughput.whole(trainer, 5) > 0  # goes on over the passes
    assert len(looks) == len(updates) == 7   # two to warm up
