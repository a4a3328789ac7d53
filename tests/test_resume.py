"""A run cannot be lost: kills, signals, damaged files, full disks, bad losses, second runs."""

import csv
import io
import itertools
import multiprocessing
import os
import pickle
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image

import auxiliaries
import evaluate
import losses
import main
import netlib
import results
import trainers
from conftest import ROOT, draw_quickly, error_of, make_tree, options_of
from images import ImageDataset

EPOCHS, ITERATIONS = 3, 4  # of the runs below
LAST, PREVIOUS, BEST = "last.pth.tar", "last_previous.pth.tar", "checkpoint.pth.tar"


@pytest.fixture(scope="module", autouse=True)
def quick_pictures():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, "draw_recoveries", draw_quickly)
        yield


@pytest.fixture(scope="session")
def options(tmp_path_factory):
    """Options of a run of three epochs of four iterations, in about a second, without a place."""
    images = make_tree(tmp_path_factory.mktemp("resume") / "images", (8,) * 8, spread=200)
    return [*options_of(images, "")[:-4], "--n_epochs", str(EPOCHS), "--metrics", "recall",
            "--checkpoint_every", "3"]


@pytest.fixture(scope="session")
def unbroken(options, tmp_path_factory):
    """A function: extra options -> the folder of a run with them that nothing disturbed."""
    folders = {}

    def run(*extra):
        if extra not in folders:
            path = str(tmp_path_factory.mktemp("unbroken"))
            folders[extra] = Path(main.main([*options, *extra, "--save_path", path, "--savename",
                                             "run"]))
        return folders[extra]
    return run


@pytest.fixture
def broken(options, tmp_path):
    """The options of a run in tmp_path / folder / run; folder is that of the dataset's name."""
    return [*options, "--save_path", str(tmp_path), "--savename", "run"]


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "folder" / "run"


def load(path):
    return torch.load(path, weights_only=True)


def assert_same(first, second, where="state"):
    """Equal to the last bit, tensors in containers too."""
    assert type(first) is type(second), where
    if torch.is_tensor(first):
        assert first.dtype == second.dtype and torch.equal(first, second), where
    elif isinstance(first, dict):
        assert list(first) == list(second), where
        for key in first:
            assert_same(first[key], second[key], f"{where}.{key}")
    elif isinstance(first, (list, tuple)):
        assert len(first) == len(second), where
        for i, pair in enumerate(zip(first, second)):
            assert_same(*pair, f"{where}[{i}]")
    else:
        assert first == second, where


def assert_same_run(first, second, but=()):
    """Two folders hold the same run: all that is in the checkpoints, and the files' bytes."""
    for name in (LAST, BEST):
        states = [load(folder / name) for folder in (first, second)]
        for state in states:
            for option in results.free_options() | {"n_epochs", "patience"}:
                state["options"].pop(option, None)
            state.get("random_state", {}).pop("cuda", None)
        assert_same(*states, name)
    names = [{path.name for path in folder.iterdir()} - set(but) for folder in (first, second)]
    assert names[0] == names[1]
    for name in names[0]:
        if name.endswith((".csv", ".svg")) or name.startswith("gradients"):
            assert (first / name).read_bytes() == (second / name).read_bytes(), name


# ---- processes that are killed


def named(pattern):
    """Whether an open file, given second, or a path, given second, is called like that."""
    return lambda *args: re.search(pattern, str(getattr(args[1], "name", args[1])))


def always(*_):
    return True


def write_half(value, file):
    content = io.BytesIO()
    save(value, content)
    file.write(content.getvalue()[:len(content.getvalue()) // 2])
    file.flush()


save = torch.save
# Where a run is disturbed: (object, its function, which calls, what is done before SIGKILL). The
# disturbance comes before the call, or after it where the first word is "after".
MOMENTS = {
    "in a step": (torch.optim.Adam, "step", always, None),
    "in a backward pass": (torch.Tensor, "backward", always, None),
    "in an evaluation": (evaluate, "embed", always, None),
    "in the last evaluation": (
        results.Log, "pause", lambda log, epoch: epoch == log.opt.n_epochs, None),
    "within last": (torch, "save", named(r"last\.pth\.tar"), write_half),
    "within the best": (torch, "save", named(r"checkpoint\.pth\.tar"), write_half),
    "before the predecessor": (os, "replace", named(r"last_previous\.pth\.tar$"), None),
    "after the predecessor": (os, "replace", named(r"last_previous\.pth\.tar$"), None),
    "before last": (os, "replace", named(r"last\.pth\.tar$"), None),
    "after last": (os, "replace", named(r"last\.pth\.tar$"), None),
    "after the best": (os, "replace", named(r"checkpoint\.pth\.tar$"), None),
    "within a csv": (csv.DictWriter, "writerows", always, None),
    "between the csv": (os, "replace", named(r"log_val_Base\.csv$"), None),
    "in a picture": (evaluate, "draw_recoveries", always, None),
    "after the end": (results.Log, "summary", always, None),
}


def disturb(moment, count, signals):
    """The count-th time at a moment this process gets signals; it hangs where there are none."""
    owner, name, matches, first = MOMENTS[moment]
    original = getattr(owner, name)
    calls = itertools.count(1)

    def wrapped(*args, **named_args):
        due = matches(*args) and next(calls) == count
        if due and not moment.startswith("after"):
            if first and signals == (signal.SIGKILL,):
                first(*args)
            send(signals)
        result = original(*args, **named_args)
        if due and moment.startswith("after"):
            send(signals)
        return result

    setattr(owner, name, wrapped)


def send(signals):
    """Sends this process signals; waits for one where there are none."""
    for number in signals:
        os.kill(os.getpid(), number)
    if not signals:
        print("hangs", flush=True)
        signal.pause()


def child(options, output, moment, count, signals):
    """The body of a process that is to be disturbed; its output goes into a file."""
    os.setsid()
    multiprocessing.set_start_method("fork", force=True)  # of loading processes, as in a program
    with open(output, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdout = os.fdopen(1, "w")
    torch.set_num_threads(1)
    evaluate.draw_recoveries = draw_quickly
    if moment:
        disturb(moment, count, signals)
    main.main(options)


@pytest.fixture(scope="session")
def server():
    """Forks processes in which everything is imported, and no thread or GPU was ever used."""
    context = multiprocessing.get_context("forkserver")
    # What torch imports at a first use takes longer than a run.
    context.set_forkserver_preload(["torch._dynamo", "torchvision", __name__])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "tests")]))
        from multiprocessing import forkserver
        forkserver.ensure_running()
    return context


@pytest.fixture
def start(server, tmp_path):
    """A function that starts a run in a process of its own -> (process, file of its output)."""
    processes = []

    def start(options, moment=None, count=1, signals=(signal.SIGKILL,)):
        output = tmp_path / f"output{len(processes)}.txt"
        process = server.Process(target=child, args=(options, output, moment, count, signals))
        process.start()
        processes.append(process)
        return process, output

    yield start
    for process in processes:
        process.kill()
        process.join(10)


@pytest.fixture
def killed(start):
    """A function as start, for a run that must end by SIGKILL -> its output."""
    def killed(*args, **named_args):
        process, output = start(*args, **named_args)
        process.join(60)
        assert process.exitcode == -signal.SIGKILL, output.read_text()
        return output.read_text()
    return killed


def wait_for(output, text, seconds=30):
    """Until a file has a text."""
    end = time.monotonic() + seconds
    while not output.exists() or text not in output.read_text():
        assert time.monotonic() < end, output.read_text()
        time.sleep(0.01)


KILLS = [("in an evaluation", 1), ("within the best", 1), ("within last", 1), ("before last", 1),
         ("in a step", 2), ("before the predecessor", 1), ("in a backward pass", 1),
         ("after the predecessor", 1), ("after the best", 1), ("within a csv", 2),
         ("in a picture", 1), ("between the csv", 1), ("in the last evaluation", 1),
         ("after last", 1), ("after the end", 1)]


def test_a_run_killed_at_every_kind_of_moment_ends_as_the_unbroken_one(
        broken, folder, unbroken, killed, capsys):
    extra = ["--grad_measure", "--scheduler", "plateau", "--plateau_patience", "1"]
    whole = unbroken(*extra)
    assert {moment for moment, _ in KILLS} == set(MOMENTS)
    rates = {row["next_lr"] for row in load(whole / LAST)["train_rows"]}
    assert len(rates) > 1  # the plateau had its say
    for i, (moment, count) in enumerate(KILLS):
        killed([*broken, *extra, *["--resume"] * (i > 0)], moment, count)
        for name in (LAST, PREVIOUS, BEST):
            assert not (folder / name).exists() or load(folder / name)
    assert load(folder / LAST)["epoch"] == EPOCHS
    main.main([*broken, *extra, "--resume"])
    assert f"the run has {EPOCHS} epochs already" in capsys.readouterr().out
    assert_same_run(whole, folder)


def test_a_run_killed_at_random_times_ends_as_the_unbroken_one(
        broken, folder, unbroken, start):
    whole = unbroken()
    generator = random.Random()
    places = []
    for _ in range(4):
        process, output = start([*broken, *["--resume"] * folder.exists()])
        wait_for(output, "weights ")  # it has begun
        process.join(generator.uniform(0, 0.25))
        process.kill()
        process.join()
        if (folder / LAST).exists():
            places.append((load(folder / LAST)["epoch"], load(folder / LAST)["iteration"]))
    assert places == sorted(places)
    main.main([*broken, "--resume"])
    assert_same_run(whole, folder)


@pytest.mark.parametrize("extra,kills", [
    (("--trainer", "CascadedEmbeddings", "--checkpoint_every", "1", "--scheduler", "exp", "--gamma",
      "0.5"), [("in a step", 8), ("after last", 2)]),
    (("--trainer", "DeepAdversarialMetricLearning", "--metric_alone_epochs", "1",
      "--g_alone_epochs", "1", "--grad_measure"),
     [("in a backward pass", 6), ("in a backward pass", 5)]),
    (("--optim", "adamw", "--no_decay_1d", "--warm_up", "1", "--lr_rise", "2", "--clip_norm", "1",
      "--clip_value", "0.1", "--scheduler", "cosine", "--checkpoint_every", "1"),
     [("in a step", 3), ("in a backward pass", 4)]),
    (("--trainer", "TwoStreamMetricLoss", "--loss", "triplet"), [("in a backward pass", 7)]),
    (("--trainer", "UnsupervisedEmbeddingsUsingAugmentations", "--val_split", "0.5"),
     [("in a backward pass", 3)]),
    (("--loss", "lifted", "--samples_per_class", "2", "--batchnorm", "trained", "--batch_draw",
      "replacement", "--patience", "1", "--n_epochs", "9"),
     [("in a step", 4), ("in an evaluation", 2)]),
])
def test_what_has_a_state_goes_on_with_it(extra, kills, broken, folder, unbroken, killed):
    whole = unbroken(*extra)
    for i, (moment, count) in enumerate(kills):
        killed([*broken, *extra, *["--resume"] * (i > 0)], moment, count)
    main.main([*broken, *extra, "--resume"])
    assert_same_run(whole, folder)


def test_loading_processes_change_nothing_however_often_a_run_is_killed(
        broken, folder, unbroken, killed):
    for kernels, moment, count, place in (("2", "in a backward pass", 4, (0, 3)),
                                          ("0", "in a backward pass", 3, (1, 0)),
                                          ("2", "in the last evaluation", 1, (2, 4))):
        killed([*broken, "--kernels", kernels, *["--resume"] * folder.exists()], moment, count)
        state = load(folder / LAST)
        assert (state["epoch"], state["iteration"]) == place
    main.main([*broken, "--kernels", "0", "--resume"])
    assert_same_run(unbroken(), folder)


# ---- signals


def test_sigterm_and_ctrl_c_end_a_program_with_a_message_and_nothing_is_lost(
        options, tmp_path, unbroken):
    programs = {}
    for number in (signal.SIGTERM, signal.SIGINT):
        programs[number] = subprocess.Popen(
            [sys.executable, "main.py", *options, "--save_path", tmp_path, "--savename",
             number.name], cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            env={**os.environ, "OMP_NUM_THREADS": "1"})
    for number, program in programs.items():
        assert any(line.startswith("untrained") for line in program.stdout)
        program.send_signal(number)
    for number, program in programs.items():
        _, message = program.communicate(timeout=60)
        assert program.returncode == 128 + number
        assert message == (
            f"main.py: stopped by {number.name}. The same command with --savename {number.name} "
            "--resume goes on from the last checkpoint\n")
        stopped = tmp_path / "folder" / number.name
        assert load(stopped / LAST)["epoch"] < EPOCHS
        main.main([*options, "--save_path", str(tmp_path), "--savename", number.name, "--resume"])
        assert_same_run(unbroken(), stopped)


@pytest.mark.parametrize("moment,count,signals,place", [
    ("in a backward pass", 2, [signal.SIGTERM], (0, 2)),  # the second iteration is finished
    ("in a backward pass", 3, [signal.SIGINT] * 2, (0, 0)),  # twice: at once
    ("in an evaluation", 2, [signal.SIGTERM], (0, 4)),  # at once, since all is saved
    ("within last", 3, [signal.SIGTERM], (0, 4)),
])
def test_a_signal_ends_a_run_where_nothing_is_lost(moment, count, signals, place, broken, folder,
                                                   unbroken, start):
    process, output = start(broken, moment, count, signals)
    process.join(60)
    assert process.exitcode == 128 + signals[-1], output.read_text()
    assert output.read_text().endswith("--resume goes on from the last checkpoint\n")
    state = load(folder / LAST)
    assert (state["epoch"], state["iteration"]) == place
    assert not [name for name in os.listdir(folder) if ".tmp" in name]
    main.main([*broken, "--resume"])
    assert_same_run(unbroken(), folder)


def test_a_signal_to_the_loading_processes_too_is_no_other(broken, folder, unbroken, start):
    """As from a job scheduler, timeout, or a terminal."""
    for i, number in enumerate((signal.SIGTERM, signal.SIGINT)):
        process, output = start([*broken, "--kernels", "2", *["--resume"] * i], "in a step", 2,
                                [])
        wait_for(output, "hangs")
        os.killpg(process.pid, number)
        process.join(60)
        assert process.exitcode == 128 + number, output.read_text()
        assert "Traceback" not in output.read_text()
    main.main([*broken, "--kernels", "2", "--resume"])
    assert_same_run(unbroken(), folder)


# ---- damaged checkpoints


class Evil:
    """Unpickled, it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch '{self.path}'",)


@pytest.fixture
def stopped(broken, folder, killed):
    """The options that resume a run that was killed in its second epoch."""
    killed(broken, "in a backward pass", 6)
    return [*broken, "--resume"]


def evil(marker):
    """A checkpoint that would make a file, were its code run."""
    file = io.BytesIO()
    torch.save({"epoch": Evil(marker)}, file)
    return file.getvalue()


def test_a_damaged_last_checkpoint_gives_way_to_its_predecessor(stopped, folder, unbroken, killed,
                                                                tmp_path, capsys):
    """What the file holds is not run, and never becomes the predecessor."""
    marker = tmp_path / "marker"
    half = (folder / LAST).read_bytes()[:-100]
    shutil.copytree(folder, tmp_path / "kept")
    for content in (evil(marker), None, half):
        shutil.rmtree(folder)
        shutil.copytree(tmp_path / "kept", folder)
        (folder / LAST).unlink()
        if content:
            (folder / LAST).write_bytes(content)
        state = auxiliaries.load_last_checkpoint(str(folder / LAST), results.Log.STATE_KEYS)
        assert_same(load(tmp_path / "kept" / PREVIOUS), state)
        said = capsys.readouterr().out
        assert LAST in said and f"going on from the one before, {folder / PREVIOUS}" in said
    (folder / LAST).write_bytes(half)
    killed(stopped, "before last", 1)
    main.main(stopped)
    assert (folder / "last_damaged.pth.tar").read_bytes() == half and not marker.exists()
    assert_same_run(unbroken(), folder, but=["last_damaged.pth.tar"])


def test_two_damaged_checkpoints_or_nonsense_are_an_error(stopped, folder, tmp_path, capsys):
    state = load(folder / LAST)
    (folder / PREVIOUS).write_bytes(b"not a checkpoint")
    (folder / LAST).write_bytes(evil(tmp_path / "marker"))
    message = error_of(stopped, capsys)
    assert "pth.tar is damaged, or not one of this program" in message
    assert len(message.splitlines()) == 1 and not (tmp_path / "marker").exists()
    for change in ({"options": {}}, {"unfinished": {}}, {"random_state": {}}, {"models": []}):
        torch.save({**state, **change}, folder / LAST)
        assert "--resume" in error_of(stopped, capsys), change
        assert_same({**state, **change}, load(folder / LAST))


# ---- full disks


@pytest.fixture
def disk(monkeypatch):
    """A disk that is full for files of the pattern disk.full: where they are opened, or synced."""
    class Disk:
        full = how = None
        names = {}

        def breaks(self, path):
            if self.full and re.search(self.full, str(path)):
                raise OSError(28, "No space left on device")

        def open(self, path, mode="r", *args, **named_args):
            if self.how == "open" and mode[0] in "wa":
                self.breaks(path)
            file = open(path, mode, *args, **named_args)
            self.names[file.fileno()] = path
            return file

        def fsync(self, number):
            self.breaks(self.names.get(number, ""))
            real(number)

    real, disk = os.fsync, Disk()
    monkeypatch.setattr(auxiliaries, "open", disk.open, raising=False)
    monkeypatch.setattr(os, "fsync", disk.fsync)
    return disk


def assert_whole(folder):
    """Each file can be read to its end, and nothing is left half written."""
    for path in folder.iterdir():
        assert ".tmp" not in path.name
        if path.name.endswith(".pth.tar"):
            assert load(path)
        elif path.suffix == ".pkl":
            pickle.loads(path.read_bytes())
        elif path.suffix == ".png":
            Image.open(path).load()
        elif path.suffix in (".csv", ".svg"):
            assert path.read_text().endswith(("\n", "</svg>"))


@pytest.mark.parametrize("how,pattern", [("fsync", r"last\.pth"), ("open", r"log_val")])
def test_a_full_disk_stops_a_run_that_goes_on_when_there_is_space(
        how, pattern, broken, folder, unbroken, disk, monkeypatch, capsys):
    step = trainers.BaseTrainer.training_step

    def training_step(trainer):
        disk.full = pattern if trainer.epoch > 1 else None
        step(trainer)

    disk.how = how
    with monkeypatch.context() as patch:
        patch.setattr(trainers.BaseTrainer, "training_step", training_step)
        message = error_of(broken, capsys)
    assert "No space left on device" in message and "what it held is kept" in message
    assert len(message.splitlines()) == 1 and re.search(pattern, message)
    assert_whole(folder)
    assert not os.path.samefile(folder / LAST, folder / PREVIOUS)
    disk.full = None
    main.main([*broken, "--resume"])
    assert_same_run(unbroken(), folder)


# ---- losses, gradients and weights that are not finite


@pytest.fixture
def batches(monkeypatch):
    """The images of each training batch that is read in this process."""
    read = []
    original = ImageDataset.__getitems__

    def getitems(dataset, indices):
        if dataset.seed is not None:  # the training set
            read.append([dataset.images[i] for i in indices])
        return original(dataset, indices)

    monkeypatch.setattr(ImageDataset, "__getitems__", getitems)
    return read


class OnGPU(torch.Tensor):
    """A tensor that says that it is on a GPU, where losses are looked at now and then."""

    is_cuda = True


def assert_finite(folder):
    """The files of the folder are whole, the weights in its checkpoints finite."""
    assert_whole(folder)
    for path in folder.glob("*.pth.tar"):
        assert all(torch.isfinite(value).all() for model in load(path)["models"].values()
                   for value in model.values()), path


def spoil(what, device, monkeypatch):
    """In epoch 1, iteration 3, the loss or its gradient is NaN, or the step makes weights inf."""
    def here(trainer):
        return (trainer.epoch, trainer.iteration) == (1, 2)

    original = trainers.MetricLossOnly.calculate_loss, trainers.BaseTrainer.check_losses

    def calculate_loss(trainer, data, labels):
        loss = original[0](trainer, data, labels)["metric_loss"]
        if what == "loss" and here(trainer):
            loss = loss * float("nan")
        if what == "gradient" and here(trainer):
            loss = loss + (loss - loss.detach()).sqrt()  # 0, its gradient inf
        return {"metric_loss": loss}

    def check_losses(trainer, total=None):
        original[1](trainer, total.as_subclass(OnGPU) if total is not None and device == "gpu"
                    else total)
        spoiled = total is not None and what == "weight" and here(trainer)
        for optimizer in trainer.optimizers.values() if spoiled else ():
            optimizer.param_groups[0]["lr"] = float("inf")

    monkeypatch.setattr(trainers.MetricLossOnly, "calculate_loss", calculate_loss)
    monkeypatch.setattr(trainers.BaseTrainer, "check_losses", check_losses)


@pytest.mark.parametrize("what, said, device, every", [
    ("loss", "the loss is nan in", "cpu", 1),
    ("gradient", "the gradient of metric_loss.beta is not finite in", "gpu", 3),
    ("weight", r"the weight \S+ is not finite after", "gpu", 3),
    ("weight", "not finite.* in epoch 1, iteration 4;", "gpu", 4)])  # the next batch shows it
def test_what_is_not_finite_ends_a_run_with_its_images_and_is_never_saved(
        what, said, device, every, broken, folder, batches, unbroken, monkeypatch, capsys):
    """On a GPU the run looks every 20 iterations, and before a checkpoint: of three at the third,
    of four, the whole epoch, at the fourth."""
    with monkeypatch.context() as patch:
        spoil(what, device, patch)
        message = error_of([*broken, "--checkpoint_every", str(every)], capsys)
    assert every == 4 or "epoch 1, iteration 3;" in message
    images = batches[3 if every == 4 else 2]
    assert re.search(said, message) and len(message.splitlines()) == 1
    assert str(folder / "nonfinite.txt") in message and "--lr" in message
    first, *listed = (folder / "nonfinite.txt").read_text().splitlines()
    assert re.search(said, first) and listed == [f"  {image}" for image in images]
    assert load(folder / LAST)["iteration"] == 2 * (every == 1)
    assert_finite(folder)
    main.main([*broken, "--resume"])
    assert_same_run(unbroken(), folder, but=["nonfinite.txt"])


# ---- one run in a folder


def test_a_second_run_in_a_folder_is_refused_while_the_first_lives(broken, folder, start, capsys,
                                                                   unbroken):
    process, output = start([*broken, "--kernels", "2"], "in a step", 2, [])
    wait_for(output, "hangs")
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    message = error_of([*broken, "--resume"], capsys)
    assert "another run is writing to" in message and str(folder) in message
    assert f"process {process.pid} " in message and "--savename" in message
    assert "exists already" in error_of(broken, capsys)
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == before
    process.kill()
    process.join()
    main.main([*broken, "--resume"])  # at once, whether or not its loading processes live
    assert_same_run(unbroken(), folder)


def test_resuming_with_other_options_names_each(stopped, folder, capsys):
    before = (folder / LAST).read_bytes()
    message = error_of([*stopped, "--margin", "0.3", "--bs", "16", "--n_epochs", "9"], capsys)
    assert "--margin (was 0.2, is 0.3)" in message and "--bs (was 8, is 16)" in message
    assert "n_epochs" not in message and (folder / LAST).read_bytes() == before


# ---- losses keep nothing beside their state


@pytest.mark.parametrize("name", losses.LOSSES)
def test_every_loss_has_all_of_its_state_in_its_state_dict(name, options):
    """The same batches give the same losses after a trip through a file."""
    opt = main.parse_options([*options, "--loss", name])
    made = [losses.loss_select(opt, num_classes=4)[0].train() for _ in range(2)]
    torch.manual_seed(1)
    labels = torch.arange(4).repeat_interleave(opt.samples_per_class)
    batch = torch.nn.functional.normalize(torch.randn(5, len(labels), opt.embed_dim), dim=2)
    for rows in batch[:3]:
        made[0](rows, labels)
    made[1].load_state_dict(made[0].state_dict())
    for rows in batch[3:]:
        values = []
        for loss in made:
            torch.manual_seed(2)
            values.append(loss(rows, labels).item())
        assert values[0] == values[1]


def test_a_run_goes_on_on_another_device(broken, capsys):
    """Whose defaults of --amp and --channels_last are others; those that are given stay."""
    with pytest.MonkeyPatch.context() as patch:
        elsewhere = netlib.Network(netlib.ConvNet, defaults={"amp": "none", "channels_last": True})
        patch.setitem(netlib.NETWORKS, "convnet", elsewhere)
        main.main([*broken, "--n_epochs", "1"])
    resumed = [*broken, "--n_epochs", "2", "--resume"]
    assert "--amp (was none, is bf16)" in error_of([*resumed, "--amp", "bf16"], capsys)
    main.main(resumed)
    assert "resumed after epoch 1" in capsys.readouterr().out
