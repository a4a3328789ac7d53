"""Runs in several processes, which must do what one does; they are forked here, on gloo."""

import gc
import importlib
import os
import pickle
import signal
import subprocess
import sys
import time
import traceback
import types
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch

import auxiliaries
import datasets
import evaluate
import images
import losses
import main
import netlib
import trainers
from conftest import ROOT, draw_quickly, make_tree, make_vehicle_id, options_of, rows, state

pytestmark = pytest.mark.skipif(not hasattr(os, "fork") or not torch.distributed.is_available(),
                                reason="needs fork and torch.distributed")


# ---- several processes


def together(function, number=2, folder="/tmp", seconds=90):
    """function() in so many forked processes as torchrun starts them, or in one plain one.

    Returns a list of (exit status, negative for a signal; result or None; what it printed).
    """
    # torchrun's store lives in torchrun, too.
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    files = [Path(folder) / f"process_{os.getpid()}_{store.port}_{i}" for i in range(number)]
    children = []
    for rank, file in enumerate(files):
        child = os.fork()
        if not child:
            if number > 1:
                os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port),
                               "WORLD_SIZE": str(number), "RANK": str(rank),
                               "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(number),
                               "TORCHELASTIC_USE_AGENT_STORE": "True",
                               "TORCHELASTIC_RESTART_COUNT": "0"}
            carry_out(function, str(file))
        children.append(child)
    status, end = {}, time.monotonic() + seconds
    while len(status) < number:
        for child in set(children) - set(status):
            done, code = os.waitpid(child, os.WNOHANG)
            if done:
                status[child] = os.waitstatus_to_exitcode(code)
        if time.monotonic() > end:
            for child in set(children) - set(status):
                os.kill(child, signal.SIGKILL)
            pytest.fail(f"still running after {seconds} seconds")
        time.sleep(0.01)
    results = []
    for child, file in zip(children, files):
        value = pickle.loads(file.read_bytes()) if file.exists() else None
        results.append((status[child], value, Path(f"{file}.txt").read_text()))
    return results


def carry_out(function, file):
    """Ends this forked process as Python ends: function()'s result goes to the file."""
    code = 1
    try:
        torch.set_num_threads(1)
        output = os.open(f"{file}.txt", os.O_CREAT | os.O_WRONLY)
        os.dup2(output, 1), os.dup2(output, 2)
        sys.stdout, sys.stderr = (open(i, "w", buffering=1, closefd=False) for i in (1, 2))
        Path(f"{file}.part").write_bytes(pickle.dumps(function()))
        os.rename(f"{file}.part", file)
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def joined(function):
    """function() of a process among others, for together."""
    def run():
        with auxiliaries.join_processes():
            return function()
    return run


def values_of(outcomes):
    """The processes' results; all must have ended well."""
    for status, _, text in outcomes:
        assert status == 0, text
    return [value for _, value, _ in outcomes]


def recorded_run(options, double=False, plain_steps=True, before_step=lambda trainer: None):
    """main.main(options) -> all that it computed, as numbers and arrays.

    double: networks and losses in float64. plain_steps: SGD takes Adam's place, whose first steps
    are the gradient's sign, in which a rounding can be as large as anything. before_step(trainer)
    is called before each training step.
    """
    found = {"losses": [], "gradients": {}, "embeddings": [], "metrics": []}
    step, evaluate_sets = trainers.BaseTrainer.training_step, evaluate.evaluate_sets
    select, select_loss = netlib.network_select, losses.loss_select

    def recorded_step(trainer):
        before_step(trainer)
        step(trainer)
        found["losses"].append({name: float(loss) for name, loss in trainer.losses.items()})
        weights = {f"{name}.{key}": weight for name, part in trainer.parts()
                   for key, weight in part.named_parameters()}
        if not found["gradients"]:
            found["gradients"] = {name: weight.grad.numpy().copy() for name, weight
                                  in weights.items() if weight.grad is not None}
        found["weights"] = {name: weight.detach().numpy().copy()
                            for name, weight in weights.items()}
        found["buffers"] = {name: buffer.numpy().copy() for name, buffer
                            in trainer.models["trunk"].named_buffers()}

    def recorded_sets(*args, **options):
        metrics, embedded = evaluate_sets(*args, **options)
        found["metrics"].append(metrics)
        found["embeddings"].append([rows.numpy() for pair in embedded for rows in pair
                                    if rows is not None])
        return metrics, embedded

    def double_loss(*args, **options):
        loss, groups = select_loss(*args, **options)
        return loss.double(), groups

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainers.BaseTrainer, "training_step", recorded_step)
        patch.setattr(evaluate, "evaluate_sets", recorded_sets)
        if plain_steps:
            patch.setattr(trainers, "optimizer_select", lambda opt, group: torch.optim.SGD(
                [dict(group)], weight_decay=opt.decay))
        if double:
            patch.setattr(netlib, "network_select",
                          lambda *args: tuple(part.double() for part in select(*args)))
            patch.setattr(losses, "loss_select", double_loss)
        found["folder"] = main.main(options)
    return found


def assert_same(one, other, tolerance):
    """Two recorded_run agree in everything, to within a tolerance, relative for large values."""
    def close(a, b):
        assert a.keys() == b.keys()
        for name in a:
            np.testing.assert_allclose(a[name], b[name], tolerance, tolerance, err_msg=name)

    assert len(one["losses"]) == len(other["losses"]) > 0
    assert len(one["metrics"]) == len(other["metrics"]) > 1
    for name in ("losses", "metrics"):
        for a, b in zip(one[name], other[name]):
            close(a, b)
    for name in ("gradients", "weights", "buffers"):
        close(one[name], other[name])
    for a, b in zip(one["embeddings"], other["embeddings"]):
        assert [part.shape for part in a] == [part.shape for part in b]
        for x, y in zip(a, b):
            np.testing.assert_allclose(x, y, rtol=0, atol=tolerance)


@pytest.fixture(scope="module", autouse=True)
def imported():
    """What a run imports when it needs it, here once instead of in each forked process."""
    for name in ("torchvision.models", "sklearn.metrics", "xml.sax.saxutils"):
        importlib.import_module(name)


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """Class 3 has fewer images than --samples_per_class; 11 images test."""
    return make_tree(tmp_path_factory.mktemp("data") / "tree", (6, 6, 6, 2, 3, 3, 3, 2), spread=120)


@pytest.fixture
def small(tree, tmp_path, monkeypatch):
    """Options of a short run, two iterations an epoch; of a flag given twice the last counts."""
    monkeypatch.setattr(evaluate, "draw_recoveries", draw_quickly)
    return [*options_of(tree, tmp_path / "runs"), "--lr", "0.005", "--loss_lr", "0.005",
            "--proxy_lr", "0.005", "--metrics", "all"]


# ---- training

RUNS = {
    "margin": ["--loss", "marginloss", "--sampling", "distance"],
    "proxynca": ["--loss", "proxynca"],
    "classifier, frozen": ["--trainer", "TrainWithClassifier", "--loss", "triplet",
                           "--batchnorm", "frozen"],
    "cascaded": ["--trainer", "CascadedEmbeddings", "--embed_dim", "16",
                 "--embedding_sizes", "8", "8"],  # shorter ones make more of rounding
    "adversarial": ["--trainer", "DeepAdversarialMetricLearning", "--loss", "triplet",
                    "--g_triplets_per_anchor", "2", "--metric_alone_epochs", "1",
                    "--g_alone_epochs", "1", "--n_epochs", "3", "--g_lr", "0.005"],
    "unsupervised": ["--trainer", "UnsupervisedEmbeddingsUsingAugmentations", "--loss", "triplet"],
    "two streams": ["--trainer", "TwoStreamMetricLoss", "--loss", "triplet"],
}


@pytest.mark.parametrize("name", RUNS)
def test_two_processes_compute_what_one_does(name, small, tmp_path):
    """Losses, gradients, weights, statistics, metrics, embeddings, to 1e-5 in float32 with SGD."""
    options = [*small, *RUNS[name]]
    (one,) = values_of(together(lambda: recorded_run(options), 1, tmp_path))
    outcomes = together(lambda: recorded_run([*options, "--savename", "two"]), 2, tmp_path)
    first, second = values_of(outcomes)
    assert len(one["embeddings"][0][0]) == 11
    assert_same(one, first, 1e-5)
    for key in ("gradients", "weights"):  # bit for bit, proxies, betas and classifiers too
        assert all(np.array_equal(value, second[key][other]) for other, value
                   in first[key].items())
    assert first["metrics"] == second["metrics"] and first["losses"] == second["losses"]
    assert outcomes[1][2] == ""


def test_in_float64_they_differ_by_rounding_only(small, tmp_path):
    """With Adam, over 12 steps: what is seen in float32 is rounding."""
    options = [*small, "--n_epochs", "6", "--lr", "1e-3", "--metrics", "recall",
               "--eval_every", "6"]

    def run(name):
        return lambda: recorded_run([*options, "--savename", name], True, False)

    (one,) = values_of(together(run("one"), 1, tmp_path))
    two, _ = values_of(together(run("two"), 2, tmp_path))
    assert one["weights"]["trunk.backbone.layers.0.weight"].dtype == np.float64
    one["embeddings"] = two["embeddings"] = []  # which are float32 in any case
    assert len(one["losses"]) == 12
    assert_same(one, two, 1e-9)


def test_batchnorm_over_processes_is_that_of_one():
    torch.manual_seed(0)
    images = torch.randn(6, 3, 5, 4, dtype=torch.float64) * 3 + 1
    weights = torch.randn(6, 4, 5, 4, dtype=torch.float64)

    def network():
        torch.manual_seed(1)
        layers = torch.nn.Sequential(
            torch.nn.Conv2d(3, 4, 3, padding=1, bias=False), torch.nn.BatchNorm2d(4, momentum=0.3),
            torch.nn.ReLU(), torch.nn.Conv2d(4, 4, 1), torch.nn.BatchNorm2d(4)).double()
        torch.nn.init.normal_(layers[1].weight)
        return layers

    def step(layers, images, weights):
        images = images.clone().requires_grad_()
        for _ in range(2):
            out = layers(images)
            (out * weights).sum().backward()
        found = {"out": out, "images": images.grad}
        found |= {f"gradient {name}": p.grad for name, p in layers.named_parameters()}
        found |= dict(layers.named_buffers())
        found["eval"] = layers.eval()(images)
        return {name: value.detach().numpy().copy() for name, value in found.items()}

    expected = step(network(), images, weights)

    def share():
        part = slice(3 * auxiliaries.rank(), 3 * auxiliaries.rank() + 3)
        layers = netlib.share_batchnorm(network(), torch.device("cpu"))
        found = step(layers, images[part], weights[part])
        half = layers.train()(images[part])
        layers.float()
        with torch.autocast("cpu", torch.bfloat16):
            low = layers(images[part].float())
        assert low.dtype == torch.bfloat16
        np.testing.assert_allclose(low.detach().float(), half.detach(), atol=0.1)
        return found

    found = values_of(together(joined(share)))
    for name, value in expected.items():
        parts = [part[name] for part in found]
        if name in ("out", "images", "eval"):
            parts = [np.concatenate(parts)]
        elif name.startswith("gradient"):
            parts = [sum(parts)]
        for part in parts:
            np.testing.assert_allclose(part, value, rtol=0, atol=1e-12, err_msg=name)


# ---- evaluation


class Rows(torch.utils.data.Dataset):
    """Vectors as images, with labels."""

    def __init__(self, rows, labels):
        self.rows, self.labels = rows, labels

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        return self.rows[i], int(self.labels[i])


def scores():
    """All metrics of sets of many sizes, with gallery, with own rows, and of VehicleID."""
    torch.manual_seed(0)
    found = []
    for queries, others in ((7, None), (5, None), (13, 4), (1, 9), (2, 9)):
        labels = torch.arange(queries) % 3
        rows = torch.randn(queries, 6).double().round(decimals=1).float()  # ties
        sets = [("", Rows(rows, labels), others and
                 Rows(torch.randn(others, 6).round(decimals=1), torch.arange(others) % 3))]
        found.append(evaluate.evaluate_sets(lambda rows: rows * 2, sets, "cpu", (1, 2), 3,
                                            metrics=evaluate.METRICS))
    (name, queries, gallery), = sets
    joint = [("all", queries, [gallery, queries])]
    found.append(evaluate.evaluate_sets(lambda rows: rows, joint, "cpu", (1, 4)))
    found.append(evaluate.evaluate_sets(lambda rows: rows, [("", gallery, None)], "cpu", (1, 2), 4,
                                        vehicle_protocol="random_gallery",
                                        metrics=("recall", "map", "nmi")))
    return found


def test_metrics_and_embeddings_are_those_of_one_process(tmp_path):
    expected = scores()
    for found in values_of(together(joined(scores), 3, tmp_path)):
        for (metrics, embedded), (right, right_embedded) in zip(found, expected, strict=True):
            np.testing.assert_equal(metrics, right)  # NaN where one class has no two
            for pair, right_pair in zip(embedded, right_embedded, strict=True):
                for rows, right_rows in zip(pair, right_pair, strict=True):
                    assert rows is right_rows is None or torch.equal(rows, right_rows)


def test_vehicle_sets_in_two_processes(small, tmp_path):
    options = [*small, *make_vehicle_id(tmp_path), "--k_vals", "1", "--vehicle_protocol",
               "random_gallery", "--save_embeddings", "--metrics", "recall", "map@r", "nmi"]
    (one,) = values_of(together(lambda: recorded_run(options), 1, tmp_path))
    two, _ = values_of(together(lambda: recorded_run([*options, "--savename", "two"]), 2, tmp_path))
    assert_same(one, two, 1e-5)
    assert sorted(os.listdir(one["folder"])) == sorted(os.listdir(two["folder"]))


# ---- what the processes say to each other


def conversation():
    """Each helper's answer in this process."""
    rank, number = auxiliaries.rank(), auxiliaries.num_ranks()
    shares = {}
    for rows in (1, 2, 5, 6, 7):
        share = auxiliaries.share_of(rows)
        shares[rows] = (share, auxiliaries.gather_rows(torch.tensor(share) * 10)[:rows].tolist())
    with pytest.raises(FileNotFoundError, match="^only the first looks: the image is not there$"):
        auxiliaries.from_first(lambda: rank and 1 / 0 or images.read_image(
            "only the first looks"))
    return {"rank": rank, "number": number, "shares": shares,
            "rows": auxiliaries.gather_rows(torch.full((2, 1), rank)).tolist(),
            "flags": auxiliaries.gather_rows(torch.tensor([rank == 1])).tolist(),
            "first": auxiliaries.from_first(lambda: {"from": rank}),
            "any": [auxiliaries.any_rank(rank == i) for i in range(4)]}


def test_helpers_give_every_process_the_same(tmp_path):
    for rank, found in enumerate(values_of(together(joined(conversation), 3, tmp_path))):
        assert (found["rank"], found["number"], found["first"]) == (rank, 3, {"from": 0})
        assert found["rows"] == [[0], [0], [1], [1], [2], [2]]
        assert found["flags"] == [False, True, False]
        assert found["any"] == [True, True, True, False]
        for rows, (share, gathered) in found["shares"].items():
            assert len(share) == -(-rows // 3)
            assert gathered == [10 * i for i in range(rows)]
    alone = joined(conversation)()
    assert alone["rank"] == 0 and alone["shares"][5] == ([0, 1, 2, 3, 4], [0, 10, 20, 30, 40])


def test_no_tensor_of_an_operation_outlives_the_next():
    """Else a thread of gloo may want Python's lock while the group, or Python, comes to its end."""
    def let_go():
        for _ in range(200):
            rows = torch.ones(1)
            known = weakref.ref(rows)
            torch.distributed.all_reduce(rows)
            del rows
            torch.distributed.all_reduce(torch.ones(1))
            assert known() is None
    values_of(together(joined(let_go)))


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="needs Linux")
def test_a_group_ends_with_its_threads_though_a_cycle_knows_it():
    def cycle():
        known = types.SimpleNamespace(group=torch.distributed.group.WORLD)
        known.itself = known
        assert auxiliaries.from_first(lambda: 3) == 3

    def threads_left():
        gc.disable()
        before = set(os.listdir("/proc/self/task"))
        joined(cycle)()
        return len(set(os.listdir("/proc/self/task")) - before)

    assert values_of(together(threads_left)) == [0, 0]


def test_shares_of_a_batch_are_the_batch(tree, monkeypatch):
    """Repeats of an image within a batch are the same whichever process loads them."""
    def items(share):
        opt = main.parse_options(["--dataset", "folder", "--source_path", str(tree),
                                  "--image_size", "16", "--seed", "3"])
        monkeypatch.setattr(auxiliaries, "rank", lambda: share[0])
        monkeypatch.setattr(auxiliaries, "num_ranks", lambda: share[1])
        train, _, _ = datasets.dataset_select(opt)
        train.set_epoch(2)
        return train.__getitems__([4, 4, 1, 4, 0, 1, 4, 2])

    whole = items((0, 1))
    parts = [item for number in range(4) for item in items((number, 4))]
    assert len(whole) == len(parts) == 8
    for (image, label), (other, other_label) in zip(whole, parts):
        assert torch.equal(image, other) and label == other_label
    assert not torch.equal(whole[0][0], whole[1][0])


def test_a_miner_of_images_is_refused():
    def make():
        trunk, rows = torch.nn.Linear(2, 2), Rows(torch.ones(4, 2), torch.ones(4))
        with pytest.raises(ValueError, match="subset_batch_miner works in one process only"):
            trainers.MetricLossOnly(
                models={"trunk": trunk}, optimizers={}, batch_size=2, dataset=rows,
                loss_funcs={"metric_loss": torch.nn.Identity()}, data_device="cpu",
                mining_funcs={"subset_batch_miner": lambda *_: None})
    values_of(together(joined(make)))


# ---- files, resuming


def test_only_the_first_writes_and_prints(small, tmp_path):
    options = [*small, "--n_epochs", "1", "--save_embeddings", "--plot_embeddings", "pca",
               "--grad_measure"]
    (one,) = together(lambda: main.main(options), 1, tmp_path)
    first, second = together(lambda: main.main([*options, "--savename", "two"]), 2, tmp_path)
    assert (first[0], second[0]) == (0, 0), first[2] + second[2]
    assert first[1] == second[1] and Path(first[1]).name == "two"
    assert sorted(os.listdir(one[1])) == sorted(os.listdir(first[1]))
    assert second[2] == ""
    lines = first[2].splitlines()
    assert [line.split()[0] for line in lines] == [line.split()[0] for line
                                                   in one[2].splitlines()]
    assert "2 processes" in first[2] and "processes" not in one[2]


def test_a_run_goes_on_in_another_number_of_processes(small, tmp_path):
    """Two processes, then one, then two, stopped in mid-epoch: the same as one all the time."""
    options = [*small, "--n_epochs", "3", "--bs", "4", "--samples_per_class", "2",  # 5 iterations
               "--loss", "npair"]

    def part(number, stop_at=None):
        def stop(trainer):
            # Each hears of it at another time, or never; they stop together.
            steps.append(None)
            if stop_at and auxiliaries.rank() == number - 1 and len(steps) == stop_at:
                os.kill(os.getpid(), signal.SIGTERM)
        steps = []
        return together(lambda: recorded_run([*options, *resume], before_step=stop), number,
                        tmp_path)

    resume = ["--savename", "whole"]
    (whole,) = values_of(part(1))
    resume = ["--savename", "parts"]
    for number, stop_at, epoch, iteration in ((2, 3, 0, 3), (1, 4, 1, 2), (2, 5, 2, 2)):
        outcomes = part(number, stop_at)
        assert [status for status, _, _ in outcomes] == [128 + signal.SIGTERM] * number
        text = "".join(text for _, _, text in outcomes)
        assert text.count("stopped by SIGTERM. The same command with --savename parts --resume "
                          "goes on") == 1
        assert "Traceback" not in text
        last = state(tmp_path / "runs/folder/parts", "last.pth.tar")
        assert (last["epoch"], last["iteration"]) == (epoch, iteration)
        resume = ["--savename", "parts", "--resume"]
    end, _ = values_of(part(2))
    assert [row["total_loss"] for row in whole["losses"][-3:]] == pytest.approx(
        [row["total_loss"] for row in end["losses"]], abs=1e-5)
    assert whole["losses"][-1]["total_loss"] > 0.01
    assert whole["metrics"][-1] == pytest.approx(end["metrics"][-1], abs=1e-5)
    for name, weight in whole["weights"].items():
        np.testing.assert_allclose(weight, end["weights"][name], rtol=0, atol=1e-5)


# ---- what goes wrong


def message_of(outcomes):
    """The one message of processes that all failed, without their progress."""
    assert all(status != 0 for status, _, _ in outcomes)
    text = "".join(text for _, _, text in outcomes)
    assert "Traceback" not in text
    assert text.count(".py: error:") == 1, text
    return text[text.index(".py: error:"):]


@pytest.mark.parametrize("extra,words", [
    (["--bs", "9", "--samples_per_class", "3"], "--bs 9 is the batch of all processes together"),
    (["--source_path", "/nowhere"], "/nowhere"),
])
def test_bad_input_is_told_once(extra, words, small, tmp_path):
    assert words in message_of(together(lambda: main.main([*small, *extra]), 2, tmp_path))


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_process_ends_the_run(victim, small, tmp_path):
    def die(trainer):
        if auxiliaries.rank() == victim and trainer.epoch == 1:
            os.kill(os.getpid(), signal.SIGKILL)

    outcomes = together(lambda: recorded_run(small, before_step=die), 2, tmp_path, seconds=30)
    assert outcomes.pop(victim)[0] == -signal.SIGKILL
    message = message_of(outcomes)
    assert f"process {1 - victim} of 2 has lost another process of this run" in message
    assert "--resume goes on from the last checkpoint" in message and message.count("\n") == 1


def test_a_broken_image_of_one_process_ends_the_run(small, tmp_path):
    """Its message is that of the process that met it, not that of those who then lost it."""
    tree = make_tree(tmp_path / "tree")
    broken = tree / "class_07" / "2.png"
    broken.write_bytes(broken.read_bytes()[:200])
    outcomes = together(lambda: main.main([*small, "--source_path", str(tree)]), 2, tmp_path,
                        seconds=30)
    message = message_of(outcomes)
    assert str(broken) in message and message.count("\n") == 1


def test_a_full_disk_of_the_first_ends_the_run(small, tmp_path):
    def run():
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch, "save", lambda *_: (_ for _ in ()).throw(OSError(28, "full")))
            main.main(small)
    assert "full" in message_of(together(run, 2, tmp_path, seconds=30))


def test_a_signal_during_the_evaluation_ends_the_run_at_once(small, tmp_path):
    """All processes get it, or the first alone."""
    for heard in ((0, 1), (0,)):
        def run():
            def evaluate_sets(network, *args, **options):
                if network.__self__.epoch == 1 and auxiliaries.rank() in heard:
                    os.kill(os.getpid(), signal.SIGTERM)
                return own(network, *args, **options)
            own, evaluate.evaluate_sets = evaluate.evaluate_sets, evaluate_sets
            main.main([*small, "--savename", str(len(heard))])
        outcomes = together(run, 2, tmp_path, seconds=30)
        text = "".join(text for _, _, text in outcomes)
        assert text.count("main.py:") == 1 and "stopped by SIGTERM" in text
        last = state(tmp_path / f"runs/folder/{len(heard)}", "last.pth.tar")
        assert (last["epoch"], last["iteration"]) == (0, 2)  # all that was trained


# ---- torchrun itself


def test_torchrun_runs_the_program(small, tmp_path):
    """Two steps; with Adam, whose first ones make much of what is rounded otherwise."""
    options = [*small, "--lr", "1e-4"]
    for number in range(3):  # gloo aborts a process now and then as it ends, after all is written
        process = subprocess.run(
            [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2",
             "--standalone", "main.py", *options, "--savename", f"two{number}"], cwd=ROOT,
            text=True, capture_output=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"})
        if "Signal 6 (SIGABRT)" not in process.stderr:
            break
    assert process.returncode == 0, process.stderr
    assert process.stdout.count("untrained  recall@1") == 1
    one = main.main(options)
    for name in ("log_val_Base.csv", "log_train_Base.csv"):
        first, second = rows(one, name), rows(tmp_path / f"runs/folder/two{number}", name)
        assert first[0] == pytest.approx(second[0], rel=0.01, abs=1e-5)
