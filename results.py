"""What a run writes, and what is read back from it.

Log writes it: logs, checkpoints, pictures, the printed lines, of which Progress rewrites one.
Result reads a run folder back, for verdicts on recipes (recipes.csv), tables of runs, and curves
of several in one picture: python results.py table|compare|recipes. How files are written whole, and
drawn: auxiliaries.py.
"""

import argparse
import contextlib
import csv
import difflib
import functools
import gc
import itertools
import os
import platform
import re
import shlex
import shutil
import signal
import sys
import time
import typing

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while torch is being loaded

import numpy as np
import torch

import auxiliaries
import evaluate
from auxiliaries import number, one_line

RECIPES = os.path.join(os.path.dirname(os.path.abspath(__file__)), "recipes.csv")
FOLLOW_DEVICE = {"amp", "channels_last"}  # unless they are given; --gpu may change


def add_arguments(parser):
    """Adds the groups 'recipe' and 'run' to an argparse parser."""
    group = parser.add_argument_group("recipe (published results, one command each)")
    group.add_argument("--recipe", metavar="NAME",
                       help="take the options of a published result from recipes.csv, such as "
                            "cub200/margin-distance, and end with measured beside published "
                            "values; other flags override it, and the verdict lists them. "
                            "Default: none")
    group.add_argument("--recipes", action="store_true", help="list the recipes and end")
    group.add_argument("--seeds", type=number(int, least=0, below=2 ** 32), nargs="+",
                       metavar="S",
                       help="one run for each of these seeds, in folders NAME_seedS; the verdict "
                            "has their mean and standard deviation. Default: --seed alone")
    group.add_argument("--dry_run", action="store_true",
                       help="print what would run, with all options, and end")
    group = parser.add_argument_group("run (but for the seed nothing here moves a number)")
    group.add_argument("--gpu", type=int, default=0, metavar="ID",
                       help="number of the CUDA device, -1 for the CPU, which also stands in "
                            "where there is none; under torchrun each process takes its own. "
                            "Default %(default)s (reference code)")
    group.add_argument("--kernels", type=number(int, least=0), metavar="N",
                       help="processes that load images; 0 loads in the main one. Default 8 "
                            "(reference runs) or a process's share of the cores, if that is "
                            "less; glyphs and --cache device 0")
    group.add_argument("--seed", type=number(int, least=0, below=2 ** 32), default=1,
                       metavar="S",
                       help="0 or more; fixes weights, batches, crops, tuples and clusters. "
                            "Literature reports 1 to 5 seeds. Default %(default)s (reference "
                            "runs)")
    group.add_argument("--savename", metavar="NAME",
                       help="the run's folder is SAVE_PATH/DATASET/NAME, which must be new; "
                            "default is the start time, with _2 behind it where another run has "
                            "that")
    group.add_argument("--source_path", type=os.path.expanduser, default="./Datasets",
                       metavar="DIR",
                       help="the folder that holds the dataset's folder (or that folder itself). "
                            "python datasets.py checks it. Default %(default)s")
    group.add_argument("--save_path", type=os.path.expanduser, default="./Training_Results",
                       metavar="DIR",
                       help="where run folders go. Default %(default)s")
    group.add_argument("--save_embeddings", action="store_true",
                       help="also save the best epoch's test embeddings for python evaluate.py")
    group.add_argument("--plot_embeddings", choices=("pca", "tsne"), metavar="HOW",
                       help="draw the test embeddings of each best evaluation so far in two "
                            "dimensions, as embeddings_NNNN.svg, by pca (quick) or tsne; 2,000 "
                            "images at most. Default: no plot")
    group.add_argument("--tensorboard", action="store_true",
                       help="also write for TensorBoard; needs the package tensorboard")
    group.add_argument("--resume", action="store_true",
                       help="go on from the last checkpoint of the run named by --savename; give "
                            "the same options as before (those of this group but the seed may "
                            "change, and --n_epochs, --patience)")
    group.add_argument("--checkpoint_every", type=number(int, least=1), metavar="N",
                       help="save the state every N iterations, too. Default: only after "
                            "training and evaluation")
    group.add_argument("--deterministic", action="store_true",
                       help="on a GPU: only algorithms that give the same bits each time, some "
                            "slower; a CPU does so anyway")
    group.add_argument("--eval_bs", type=number(int, least=1), metavar="B",
                       help="images embedded at once for the evaluation. Default 2 --bs")
    evaluate.add_memory_argument(group)
    group.add_argument("-h", "--help", nargs="?", const="chosen", choices=("chosen", "all"),
                       metavar="all",
                       help="show the flags of the chosen loss, trainer and dataset, or all")


@functools.cache
def free_options():
    """The names of the options of a run that move no number; of the groups above, but the seed."""
    parser = argparse.ArgumentParser(add_help=False)
    add_arguments(parser)
    return {*vars(parser.parse_args([])), "given", "departures", "subset"} - {"seed"}


@contextlib.contextmanager
def open_log(opt, found, device, signals):
    """The run's folder, made new or, with --resume, found again -> Log; see main.run.

    opt: the final options; found: datasets.Found; device: where; signals: auxiliaries.StopSignals.
    No other run can write into the folder meanwhile, and a signal waits for what would be lost.
    """
    named = "savename" in opt.given or opt.recipe or opt.seeds
    folder = auxiliaries.from_first(lambda: make_run_folder(
        opt.save_path, opt.dataset, opt.savename if named else None, opt.resume))
    opt.savename = os.path.basename(folder)
    writes = auxiliaries.rank() == 0
    with lock_folder(folder) if writes else contextlib.nullcontext():
        log = Log(opt, folder, found, device, signals)
        try:
            yield log
        except FloatingPointError as error:
            if not hasattr(error, "iteration"):
                raise
            raise FloatingPointError(f"{error}; the images of its batch are listed in "
                                     f"{log.list_batch(error)}") from error
        finally:
            log.progress.write("")  # what ends the run is said on a line of its own
            signals.at_once = True
    print(auxiliaries.printable(f"files in {folder}"))


def make_run_folder(save_path, dataset, savename=None, resume=False):
    """The run's folder, made new: save_path/dataset/savename or, without a name, the start time.

    A second run of the same second has _2 behind it, and so on. With resume it must be there
    already. Raises ValueError or OSError where that does not hold.
    """
    if savename in ("", ".", "..") or savename and os.path.basename(savename) != savename:
        raise ValueError(f"--savename {savename}: it is the name of a folder, not a path; "
                         "--save_path says where")
    if resume:
        folder = os.path.join(save_path, dataset, savename)
        if not os.path.isdir(folder):
            raise FileNotFoundError(f"--resume: there is no run in {folder}; --savename and "
                                    "--save_path say where to look")
        return folder
    start = time.strftime("%Y-%m-%d_%H-%M-%S")
    for number in itertools.count(1):
        folder = os.path.join(save_path, dataset, savename or start + f"_{number}" * (number > 1))
        try:
            os.makedirs(folder)
            return folder
        except FileExistsError:
            if savename:
                raise ValueError(f"the run folder {folder} exists already: choose another "
                                 "--savename, or continue it with --resume") from None
        except OSError as error:
            raise OSError(f"--save_path {save_path}: no folder can be made there ({error})"
                          ) from error


def lock_folder(folder):
    """Locks a run folder against other runs -> the lock file; closing it ends the lock.

    The lock ends with the process. Prints a note where the file system has no locks; on Windows
    nothing is locked. ValueError where another run has the lock.
    """
    file = open(os.path.join(folder, ".lock"), "a+")
    try:
        import fcntl
        # Unlike flock's, not inherited by loading processes, which outlive a killed run.
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        with file:
            file.seek(0)
            raise ValueError(f"another run is writing to {folder} ({file.read().strip()}): wait "
                             "for it, or choose another --savename") from None
    except ImportError:  # Windows
        pass
    except OSError as error:
        print(auxiliaries.printable(f"note: {folder} could not be locked ({error}): let no other "
                                    "run write there"), flush=True)
    file.truncate(0)
    file.write(f"process {os.getpid()} on {platform.node()}")
    file.flush()
    return file


def save_options(folder, options):
    """Writes the options of a run, a dict of plain values, as hypa.pkl and Parameter_Info.txt."""
    auxiliaries.save_pickle(os.path.join(folder, "hypa.pkl"), options)
    with auxiliaries.written_whole(os.path.join(folder, "Parameter_Info.txt"), "w") as file:
        file.writelines(f"{name}: {value}\n" for name, value in sorted(options.items()))


class Log:
    """Collects what a run measures, and writes its files.

    train_rows and val_rows are the rows of log_train_Base.csv and log_val_Base.csv; the best epoch
    and early stopping (--patience) are computed from them.
    """

    STATE_KEYS = ("epoch", "iteration", "place", "options", "data", "random_state", "train_rows",
                  "val_rows", "unfinished", "versions")

    def __init__(self, opt, folder, found, device, signals):
        self.opt = opt
        self.folder = folder
        self.found = found
        self.device = device
        self.signals = signals
        self.writes, self.processes = auxiliaries.rank() == 0, auxiliaries.num_ranks()
        self.versions = auxiliaries.versions(device)
        self.progress = Progress(opt.n_epochs, opt.bs, epochs_per_pause=opt.eval_every)
        self.train_rows, self.val_rows = [], []
        self.loss_sums, self.gradients = {}, []  # of the current epoch
        self.seconds = 0  # that its training took
        self.trainer = self.tensorboard = None

    # Where the run stands

    def resume(self, trainer):
        """Loads the run's last checkpoint, if there is one, and writes the options."""
        self.trainer = trainer
        state = auxiliaries.from_first(lambda: auxiliaries.load_last_checkpoint(
            self.path("last.pth.tar"), (*trainer.STATE_GROUPS, *self.STATE_KEYS)))
        if state:
            self.restore(state)
        if self.writes:  # tables, too, say what the data is a part of
            save_options(self.folder, {**vars(self.opt), "subset": self.found.subset})
            if self.opt.tensorboard:
                self.tensorboard = TensorBoardLog(self.path("tensorboard"), self.val_rows)

    def next_epoch(self):
        """The epoch that comes next: 0 in a new run, beyond the last in one that has ended."""
        if not self.val_rows:
            return 0
        trainer, self.signals.at_once = self.trainer, False
        self.progress.restart()
        if trainer.epoch >= self.opt.n_epochs:
            print(f"the run has {trainer.epoch} epochs already; --n_epochs takes it further")
        elif self.is_over():
            print(f"the run ended after epoch {trainer.epoch}; a larger --patience takes it "
                  "further")
            return self.opt.n_epochs + 1
        else:
            part = f" and {trainer.iterations_done} iterations" * bool(trainer.iterations_done)
            print(f"resumed after epoch {trainer.epoch}{part}")
        return trainer.epoch + 1

    @property
    def metric(self):
        """The name of the metric that chooses the best epoch."""
        return selecting_metric(self.val_rows)

    def best(self):
        """The row of the best epoch."""
        return auxiliaries.best_row(self.val_rows, self.metric)

    def is_due(self, epoch):
        """Whether an epoch is evaluated: each --eval_every-th if the trunk learns, the last."""
        return (epoch == self.opt.n_epochs
                or epoch % self.opt.eval_every == 0 and "trunk" not in self.trainer.idle)

    def is_over(self):
        """Whether training stops early (--patience)."""
        return auxiliaries.is_over(self.val_rows, self.metric, self.opt.eval_every,
                                   self.opt.patience)

    # The trainer's hooks

    def after_iteration(self, trainer):
        """Adds up the losses, collects gradients if asked for, moves the progress line."""
        for name, loss in trainer.losses.items():
            self.loss_sums[name] = self.loss_sums.get(name, 0) + loss
        gradient = trainer.models["embedder"].linear.weight.grad                 # [D, F]
        if self.opt.grad_measure and gradient is not None:
            self.gradients.append(gradient.abs().mean(0))
        if self.tensorboard:
            self.tensorboard.after_iteration(trainer)
        self.progress.update(trainer.epoch, trainer.iteration, trainer.iterations_per_epoch,
                             trainer.losses["total_loss"])

    def between_iterations(self, trainer):
        """Saves the state where it is time to, so that no more is lost if the run is killed.

        Raises auxiliaries.Stopped after a signal to stop, of which all processes hear.
        """
        done = trainer.iterations_done
        stop = self.is_told_to_stop()
        if (stop or done == trainer.iterations_per_epoch
                or self.opt.checkpoint_every and done % self.opt.checkpoint_every == 0):
            trainer.check_weights()  # never saved over finite ones where they are not
            self.save_last()
        # What the evaluation computes is computed again from what was saved above.
        self.signals.at_once = done == trainer.iterations_per_epoch
        if stop or self.signals.at_once and self.is_told_to_stop():  # one may have come meanwhile
            self.stop()

    def is_told_to_stop(self):
        """Whether a signal to stop has reached a process of the run; all must ask."""
        caught = self.signals.caught is not None
        return auxiliaries.any_rank(caught) if self.processes > 1 else caught

    def stop(self):
        """Raises auxiliaries.Stopped once all processes are here, so that the first has saved."""
        auxiliaries.any_rank(True)
        raise auxiliaries.Stopped(self.signals.caught or signal.SIGTERM)

    # The end of an epoch

    def pause(self, epoch):
        """Called after an epoch's training: stops its clock; a signal now ends the run at once."""
        self.signals.at_once = True
        due = self.is_due(epoch)
        self.seconds = self.progress.pause(
            f"epoch {epoch}: " + ("evaluating" if due else "saving"), counts=due)

    def after_epoch(self, metrics, test_sets, embedded):
        """Logs, draws and saves the epoch, and prints it in one line.

        metrics: {name: number}, {} where it was not evaluated; test_sets and embedded: as
        evaluate.evaluate_sets takes and gives them.
        """
        epoch = self.trainer.epoch
        if epoch:
            self.train_rows.append(self.train_row())
        if metrics:  # plain numbers: a checkpoint with numpy's could not be read without its code
            self.val_rows.append({"epoch": epoch, **{name: float(value)
                                                     for name, value in metrics.items()}})
        gradients, self.gradients, self.loss_sums = self.gradients, [], {}
        if self.writes:
            if gradients:
                auxiliaries.save_pickle(self.path(f"gradients_{epoch:04d}.pkl"),
                                        torch.stack(gradients).cpu().numpy())     # [iterations, F]
            self.save(test_sets, embedded)
            self.save_last()
        self.progress.write("")
        self.report()
        self.progress.restart()
        self.signals.at_once = False
        if self.is_told_to_stop():
            self.stop()

    def train_row(self):
        """The epoch's row of log_train_Base.csv: mean losses, what the batches were like."""
        means = {name: float(total) / self.trainer.iterations_per_epoch
                 for name, total in self.loss_sums.items()}
        seen = {name + suffix: value for suffix, diagnosis in self.trainer.diagnoses.items()
                for name, value in diagnosis.row().items()}
        trunk = self.trainer.optimizers["trunk_optimizer"].param_groups[0]
        return {"epoch": self.trainer.epoch, **means, **seen, "next_lr": trunk["lr"]}

    def report(self):
        """Prints the epoch in one line, and a warning where the embeddings have collapsed."""
        trainer, row = self.trainer, self.val_rows[-1]
        shown = "".join(f"  {name} {value:.4f}" for name, value in row.items()
                        if name != "epoch" and row["epoch"] == trainer.epoch)
        if not trainer.epoch:
            print(f"untrained{shown}", flush=True)
            return
        rate = (f", {self.progress.done * trainer.batch_size / self.seconds:.0f} images/s"
                if self.seconds else "")  # a coarse clock may stand still
        skipped = f", {trainer.skipped_steps} steps skipped" if trainer.skipped_steps else ""
        trained = self.train_rows[-1]
        seen = ", ".join(f"{name}{suffix} {trained[name + suffix]:.3f}"
                         for suffix, diagnosis in trainer.diagnoses.items()
                         for name in diagnosis.NAMES
                         if name + suffix in trained and name != "length")
        print(f"epoch {trainer.epoch}/{self.opt.n_epochs}  loss {trained['total_loss']:.4f}"
              f"{f' ({seen})' * bool(seen)}{shown}  "
              f"{duration(self.seconds)}{rate}{skipped}", flush=True)
        for suffix, diagnosis in trainer.diagnoses.items():
            row = {name.removesuffix(suffix): value for name, value in trained.items()}
            if diagnosis.has_collapsed(row):
                print(f"warning: the embeddings have collapsed: their spread std{suffix} is "
                      f"{row['std']:.2g}, their length {row['length']:.2g}. A lower --lr, a "
                      "larger --bs, or --sampling distance or random help", flush=True)

    def finish(self):
        """The run is whole: prints its result; last.pth.tar alone takes it further."""
        if self.writes:
            with contextlib.suppress(FileNotFoundError):
                os.remove(auxiliaries.previous(self.path("last.pth.tar")))
        print(self.summary())
        if self.opt.val_split:
            print("\n".join(self.selections()))

    def summary(self):
        """The run's result in one line, and why it ended early if it did."""
        best, name, first, last = self.best(), self.metric, self.val_rows[0], self.val_rows[-1]
        early = (f"; ended after epoch {last['epoch']}, --patience {self.opt.patience}"
                 if self.is_over() and last["epoch"] < self.opt.n_epochs else "")
        return (f"best {name} {best[name]:.4f} in epoch {best['epoch']} (untrained "
                f"{first[name]:.4f}){early}")

    def selections(self):
        """With --val_split: the test classes' first recall as three rules choose it, in lines."""
        rows = self.val_rows[1:] or self.val_rows
        name = next(key for key in rows[0] if key != "epoch" and not key.startswith("val "))
        chosen, most = self.best(), auxiliaries.best_row(rows, name)
        return [f"{rule:34} {name} {row[name]:.4f} (epoch {row['epoch']})" for rule, row in (
            ("last epoch:", rows[-1]), ("best epoch on held-out classes:", chosen),
            ("best epoch on the test classes:", most))] + [
            "choosing on the test classes, as the literature does, gains "
            f"{most[name] - chosen[name]:+.4f}"]

    # Files

    def path(self, name):
        """The path of a file in the run folder."""
        return os.path.join(self.folder, name)

    def save(self, test_sets, embedded):
        """Writes the files of the run folder; those of the best epoch only if it is this one."""
        epoch = self.trainer.epoch
        is_best = self.best()["epoch"] == epoch
        if is_best:  # what its reader needs: weights and options, not the optimisers'
            state = self.state()
            auxiliaries.save_checkpoint(self.path("checkpoint.pth.tar"), {
                key: state[key] for key in ("epoch", "models", "loss_funcs", "options", "versions",
                                            "val_rows")})
        auxiliaries.save_csv(self.path("log_train_Base.csv"), self.train_rows)
        auxiliaries.save_csv(self.path("log_val_Base.csv"), self.val_rows)
        self.draw()
        if self.opt.save_embeddings and is_best:
            self.save_embeddings(test_sets, embedded)
        if auxiliaries.greatest_row(self.val_rows, self.metric)["epoch"] == epoch:
            self.draw_evaluation(test_sets[0], embedded[0], self.val_rows[-1])
        if self.tensorboard:
            self.tensorboard.after_epoch(self.trainer)

    def state(self):
        """All that the run needs to go on, for a checkpoint."""
        diagnoses = self.trainer.diagnoses.items()
        return {**self.trainer.state_dict(), "options": vars(self.opt), "data": self.found.digest,
                "random_state": auxiliaries.random_state(), "train_rows": self.train_rows,
                "val_rows": self.val_rows, "versions": self.versions,
                "unfinished": {"loss_sums": self.loss_sums, "gradients": self.gradients,
                              "diagnoses": {suffix: diagnosis.sums
                                            for suffix, diagnosis in diagnoses}}}

    def save_last(self):
        """Writes the checkpoint that --resume goes on from, and keeps the one before."""
        if self.writes:
            auxiliaries.save_checkpoint(self.path("last.pth.tar"), self.state(),
                                        keep_previous=True)

    def restore(self, state):
        """Loads a checkpoint's state.

        Raises ValueError where the options, the data or the code are not those of the checkpoint.
        """
        try:
            options = state["options"]
            given = {*self.opt.given, *options["given"]}
            free = {"patience", *free_options(), *FOLLOW_DEVICE.difference(given)}
            if self.opt.scheduler != "cosine":  # which is laid out over all epochs
                free.add("n_epochs")
            # A flag that the code has got since has the default that it had then.
            was = {name: options.get(name, None if name in given else value)
                   for name, value in vars(self.opt).items() if name not in free}
            changed = [f"--{name} (was {one_line(was[name])}, is {getattr(self.opt, name)})"
                       for name in was if was[name] != getattr(self.opt, name)]
            if not changed and state["data"] == self.found.digest:
                self.trainer.load_state_dict(state)
                auxiliaries.restore_random_state(state["random_state"])
                self.train_rows, self.val_rows = state["train_rows"], state["val_rows"]
                self.restore_epoch(state["unfinished"])
        except Exception as error:  # as many kinds as a checkpoint has parts
            raise ValueError(f"--resume: {self.path('last.pth.tar')} does not fit this code "
                             f"({type(error).__name__}: {one_line(error)}): was it "
                             "changed since?") from error
        if changed:
            raise ValueError(f"--resume with other options than the run in {self.folder}: "
                             f"{', '.join(changed)}")
        if state["data"] != self.found.digest:
            raise ValueError(f"--resume with other data than the run in {self.folder}: the images "
                             "or classes below --source_path are not the same")
        if state["versions"] != self.versions:
            print(f"note: the run was begun with {state['versions']}; it goes on with "
                  f"{self.versions}")

    def restore_epoch(self, unfinished):
        """Restores the sums of the unfinished epoch."""
        def moved(sums):
            return {name: total.to(self.device) for name, total in sums.items()}

        self.loss_sums = moved(unfinished["loss_sums"])
        self.gradients = [gradient.to(self.device) for gradient in unfinished["gradients"]]
        for suffix, sums in unfinished["diagnoses"].items():
            self.trainer.diagnoses[suffix].sums = moved(sums)

    def list_batch(self, error):
        """Writes the images of a NonFiniteLoss's batch to nonfinite.txt -> its path."""
        sampler, images = self.trainer.sampler, self.trainer.dataset.images
        sampler.set_epoch(error.epoch)
        batch = next(itertools.islice(iter(sampler), error.iteration, None))
        lines = [f"{error}; images:", *(
            f"  {images[i] if isinstance(images, list) else f'image {i}'}" for i in batch)]
        if self.writes:
            with auxiliaries.written_whole(self.path("nonfinite.txt")) as file:
                file.write("\n".join([*lines, ""]).encode("utf-8", "surrogateescape"))
        return self.path("nonfinite.txt")

    def save_embeddings(self, test_sets, embedded):
        """Writes each test set's embeddings for python evaluate.py."""
        opt = self.opt
        for (name, *sets), rows in zip(test_sets, embedded):
            files = [f"{kind}_{name}".replace(" ", "_").rstrip("_") + ".npz"
                     for kind in ("embeddings", "gallery")]
            for file, dataset, part in zip(files, sets, rows):
                if dataset is not None:
                    evaluate.save_embeddings(
                        self.path(file), part, dataset.labels, k_vals=opt.k_vals, seed=opt.seed,
                        metrics=opt.metrics, nmi_average=opt.nmi_average,
                        vehicle_protocol=opt.vehicle_protocol, device=self.device.type,
                        gallery_file="" if sets[1] is None else files[1])

    def draw_evaluation(self, test_set, rows, measured):
        """Draws neighbours and embeddings of the evaluation that gave a row of the log.

        Of the best so far: the untrained network's stay where training has not gained on it.
        """
        opt, (_, queries, gallery), epoch = self.opt, test_set, measured["epoch"]
        evaluate.draw_recoveries(self.path("sample_recoveries.png"), queries, gallery, *rows,
                                 seed=opt.seed, title=f"epoch {epoch}")
        if opt.plot_embeddings:
            title = f"{opt.savename}, epoch {epoch}: {self.metric} {measured[self.metric]:.4f}"
            evaluate.draw_embeddings(self.path(f"embeddings_{epoch:04d}.svg"), queries, rows[0],
                                     opt.plot_embeddings, opt.seed, title=[title])

    def draw(self):
        """Writes InfoPlot_Base.svg: losses and metrics over the epochs, the best values on top."""
        def curves(rows):
            names = dict.fromkeys(key for row in rows for key in row
                                  if key not in ("epoch", "next_lr"))
            return {name: [(row["epoch"], row[name]) for row in rows if name in row]
                    for name in names}

        losses_shown, metrics = curves(self.train_rows), curves(self.val_rows)
        # Lengths, which may be far above the rest, are in the csv alone.
        seen = {name + suffix: losses_shown.pop(name + suffix, [])
                for suffix, diagnosis in self.trainer.diagnoses.items()
                for name in diagnosis.NAMES}
        seen = {name: curve for name, curve in seen.items()
                if curve and not name.startswith("length")}
        if len(losses_shown) == 2:
            losses_shown.pop("metric_loss", None)  # alone, it is the total loss
        result = Result(self.folder, vars(self.opt), self.val_rows)
        best = {name: result.best(name) for name in metrics
                if any(name in row for row in self.val_rows[1:] or self.val_rows)}
        title = [f"{self.opt.dataset}, {self.opt.arch}, {self.opt.loss} / {self.opt.sampling}: "
                 f"{self.summary()}",
                 "best of each metric over the epochs: "
                 + ", ".join(f"{name} {value:.4f}" for name, value in best.items())]
        auxiliaries.save_plot(self.path("InfoPlot_Base.svg"), title,
                              [("training loss", losses_shown), ("training batches", seen),
                               ("test classes", metrics)])


class Progress:
    """One line that is rewritten: epoch, iteration, loss, images per second, time left.

    Where the output is not a terminal it is a line of its own, once a minute, so logs stay short.
    update and count may be called at every iteration: they print at most twice a second, or once a
    minute, and only then is the loss read from the device. The rate is measured since restart; the
    time left includes the evaluations to come, one in every epochs_per_pause epochs.
    """

    def __init__(self, num_epochs, images_per_iteration, stream=None, epochs_per_pause=1):
        self.num_epochs = num_epochs
        self.images_per_iteration = images_per_iteration
        self.epochs_per_pause = epochs_per_pause
        self.stream = stream or sys.stdout
        self.active = self.stream.isatty()
        self.interval = 0.5 if self.active else 60  # seconds from one print to the next, at least
        self.width, self.text = 0, ""
        self.paused, self.pause_seconds = None, 0.0
        self.restart()

    def restart(self):
        """Training starts or continues; later pauses are expected to take as long as the last."""
        now = time.monotonic()
        if self.paused is not None:
            self.pause_seconds = now - self.paused
        self.started = self.printed = now
        self.done, self.paused = 0, None

    def pause(self, text, counts=True):
        """Training pauses and the text is shown; returns the seconds since restart.

        counts: whether it is one of the pauses to come, rather than a shorter one.
        """
        now = time.monotonic()
        self.paused, self.text = now if counts else None, text
        self.write(text)
        return now - self.started

    def count(self, done, total):
        """During a pause: shows how many of the images are done."""
        now = time.monotonic()
        if now - self.printed >= self.interval:
            self.say(f"{self.text} {done:,} of {total:,}", now)

    def update(self, epoch, iteration, iterations, loss):
        """After iteration (from 0) of so many in this epoch; loss: a number or 0-dim tensor."""
        self.done += 1
        now = time.monotonic()
        if now - self.printed < self.interval:
            return
        rate = self.done / (now - self.started)
        iterations_left = (self.num_epochs - epoch + 1) * iterations - iteration - 1
        every = self.epochs_per_pause  # and one after the last epoch
        pauses_left = -(-self.num_epochs // every) - (epoch - 1) // every
        left = iterations_left / rate + pauses_left * self.pause_seconds
        self.say(f"epoch {epoch}/{self.num_epochs}  iteration {iteration + 1}/{iterations}  "
                 f"loss {float(loss):.4f}  {rate * self.images_per_iteration:.0f} images/s  "
                 f"{duration(left)} left", now)

    def say(self, text, now):
        """Replaces the line by the text; where there is no terminal, prints it. now: seconds."""
        self.printed = now
        self.write(text) if self.active else print(text, file=self.stream, flush=True)

    def write(self, text):
        """Replaces the line by what of the text fits on a terminal; an empty text clears it."""
        if self.active:
            text = text[:shutil.get_terminal_size().columns - 1]
            self.stream.write("\r" + text.ljust(self.width) + "\r" * (not text))
            self.stream.flush()
            self.width = len(text)


def duration(seconds):
    """Seconds as 7s, 3m 20s or 2h 05m."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return (f"{hours}h {minutes:02d}m" if hours else f"{minutes}m {seconds:02d}s" if minutes else
            f"{seconds}s")


class TensorBoardLog:
    """Hooks that write losses, learning rates and measured metrics for TensorBoard.

    folder: where the event file goes. rows: a list, to which somebody adds what is measured,
    {"epoch": number, metric: number}, as Log does and trainers.Validation in its rows.
    Losses stand at every iteration, the rest at epochs; they are written once an epoch, so no
    iteration waits for them. ValueError where the package tensorboard is not installed.
    """

    def __init__(self, folder, rows=()):
        self.writer = self.event_writer()(folder)
        self.rows = rows
        self.losses = []

    @staticmethod
    def event_writer():
        """The class that writes event files; ValueError where its package is not installed."""
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ValueError("--tensorboard needs a package that is not installed: pip install "
                             "tensorboard, or leave the flag out") from error
        return SummaryWriter

    def after_iteration(self, trainer):
        """An end_of_iteration_hook: keeps the losses until the epoch's end."""
        self.losses.append((trainer.get_global_iteration(), trainer.losses))

    def after_epoch(self, trainer):
        """An end_of_epoch_hook, to be called once rows has the epoch: writes everything."""
        for iteration, losses in self.losses:
            for name, loss in losses.items():
                self.writer.add_scalar(f"loss/{name}", float(loss), iteration)
        self.losses = []
        for name, optimizer in trainer.optimizers.items():
            self.writer.add_scalar(f"learning_rate/{name.removesuffix('_optimizer')}",
                                   optimizer.param_groups[0]["lr"], trainer.epoch)
        measured = self.rows[-1] if self.rows else {}
        if measured.get("epoch") == trainer.epoch:
            for name, value in measured.items():
                if name != "epoch":
                    self.writer.add_scalar(f"metric/{name}", value, trainer.epoch)
        self.writer.flush()


# ---- recipes


class Recipe(typing.NamedTuple):
    """A published result: its options, a list of strings; {metric: (mean, std or None)} in
    percent; where it was published.
    """

    options: list
    published: dict
    source: str


def read_recipes(path=None):
    """The table of recipes -> {name: Recipe}; its values stand as "recall@1 63.1±0.5; nmi 68"."""
    recipes = {}
    with open(path or RECIPES, encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            published = {}
            for part in filter(None, row["published"].split("; ")):
                metric, value = part.rsplit(" ", 1)
                mean, _, std = value.partition("±")
                published[metric] = (float(mean), float(std) if std else None)
            recipes[row["recipe"]] = Recipe(shlex.split(row["options"]), published, row["source"])
    return recipes


def find_recipe(name):
    """The Recipe of a name; ValueError with the nearest names for another."""
    recipes = read_recipes()
    if name not in recipes:
        near = difflib.get_close_matches(name, recipes, n=4, cutoff=0.4)
        raise ValueError(f"--recipe {name}: there is none of that name"
                         + f"; near are {', '.join(near)}" * bool(near)
                         + ". --recipes lists all")
    return recipes[name]


# ---- runs of one command


def words(value):
    """An option's value as it is given on the command line."""
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def print_options(opt, names):
    """Prints the named options, one a line."""
    for name in sorted(names):
        print(auxiliaries.printable(f"options  {name}: {words(getattr(opt, name))}"))


def run_names(opt):
    """{seed: name of its run's folder}."""
    return ({seed: f"{opt.savename}_seed{seed}" for seed in opt.seeds} if opt.seeds else
            {opt.seed: opt.savename})


def one_per_seed(opt):
    """Yields the options of each run of --seeds, or of the single run without it.

    With --resume a seed that has no folder yet begins. Before anything is trained:
    FileNotFoundError with --resume where none has a folder, ValueError without it where one has.
    """
    if not opt.seeds:
        yield opt
        return
    names = run_names(opt)
    paths = {seed: os.path.join(opt.save_path, opt.dataset, name) for seed, name in names.items()}
    there = auxiliaries.from_first(
        lambda: [seed for seed, path in paths.items() if os.path.lexists(path)])
    if opt.resume and not there:
        raise FileNotFoundError(f"--resume: there is no run in {', '.join(paths.values())}; "
                                "--savename and --save_path say where to look")
    if there and not opt.resume:
        raise ValueError(f"the run folder {paths[there[0]]} exists already: choose another "
                         "--savename, or continue all seeds with --resume")
    for seed, name in names.items():
        print(f"seed {seed}", flush=True)
        gc.collect()  # of the last run's reference cycles, which may hold a cache of images
        yield argparse.Namespace(**{**vars(opt), "seed": seed, "savename": name,
                                    "resume": seed in there})


@contextlib.contextmanager
def advice_to_resume(opt):
    """Adds to a KeyboardInterrupt how to resume, if a run has a folder already."""
    try:
        yield
    except KeyboardInterrupt as stopped:
        if any(os.path.isdir(os.path.join(opt.save_path, opt.dataset, name))
               for name in run_names(opt).values()):
            stopped.advice = (f". The same command with --savename {opt.savename} --resume goes "
                              "on from the last checkpoint")
        raise


def print_recipes():
    """Lists the recipes: name, published values in percent, source."""
    for name, recipe in read_recipes().items():
        values = ", ".join(f"{metric} {with_std(*value)}"
                           for metric, value in recipe.published.items())
        print(f"{name:45} {values or 'no published values'}  ({recipe.source})")


def print_plan(opt):
    """Prints what would run: all options, the folders, and a recipe's published values."""
    print_options(opt, vars(opt))
    for seed, name in run_names(opt).items():
        folder = auxiliaries.printable(os.path.join(opt.save_path, opt.dataset, name))
        print(f"run      seed {seed} in {folder}")
    if opt.recipe:
        recipe = find_recipe(opt.recipe)
        print(f"source   {recipe.source}")
        for metric, value in recipe.published.items():
            print(f"published {metric} {with_std(*value)}")
        if opt.departures:
            print(f"departs from the recipe: {'; '.join(opt.departures)}")


def print_verdict(opt, folders):
    """Prints the verdict on a recipe's runs, and writes it beside their folders."""
    recipe = find_recipe(opt.recipe)
    runs = [read_result(folder) for folder in folders]
    subset = runs[0].options["subset"]
    lines = [f"recipe {opt.recipe}: {recipe.source}",
             *verdict(recipe, runs, [*opt.departures, *[subset] * bool(subset)])]
    print("\n".join(lines))
    if auxiliaries.rank() == 0:
        path = os.path.join(opt.save_path, opt.dataset, f"{opt.savename}_verdict.txt")
        with auxiliaries.written_whole(path, "w") as file:
            file.write("\n".join(lines) + "\n")


# ---- run folders, read again


class Result(typing.NamedTuple):
    """What a run folder says: options as text, rows of log_val_Base.csv as {metric: number}."""

    folder: str
    options: dict
    rows: list

    def state(self):
        """The word finished, or why the run is not, in words."""
        if not self.rows:
            return "failed or unfinished before anything was measured"
        last, wanted = int(self.rows[-1]["epoch"]), int(self.options["n_epochs"])
        patience = self.options.get("patience", "None")
        if last >= wanted:
            return "finished"
        if len(self.rows) == 1:
            return f"failed or unfinished before the first of {wanted} epochs was measured"
        if patience != "None" and auxiliaries.is_over(
                self.rows, selecting_metric(self.rows), int(self.options.get("eval_every", 1)),
                int(patience)):
            return "finished"
        return f"unfinished after epoch {last} of {wanted}"

    def best(self, metric):
        """The best value over the epochs, of each metric on its own, as the literature has it."""
        values = [row[metric] for row in self.rows[1:] or self.rows if metric in row]
        return evaluate.best_of(metric)(values, default=float("nan"))

    def selected(self, metric):
        """The metric in the epoch that was chosen on held-out classes; nan if not measured."""
        row = auxiliaries.best_row(self.rows, selecting_metric(self.rows))
        return row.get(metric, float("nan"))

    def metrics(self):
        """The names of the metrics of the test classes."""
        return [name for name in self.rows[0] if name != "epoch" and not name.startswith("val ")]

    def holds_out(self):
        """Whether the run measured on held-out classes too, and chose its best epoch there."""
        return selecting_metric(self.rows).startswith("val ")


def selecting_metric(rows):
    """The metric that chooses the best epoch: the first of the held-out, else of the test."""
    names = [name for name in rows[0] if name != "epoch"]
    return next((name for name in names if name.startswith("val ")), names[0])


def read_result(folder):
    """A run folder -> Result; None for a folder that is not one of a run.

    ValueError where its files cannot be read.
    """
    try:
        with open(os.path.join(folder, "Parameter_Info.txt"), encoding="utf-8") as file:
            options = dict(line.rstrip("\n").split(": ", 1) for line in file)
    except (FileNotFoundError, ValueError):  # another program's
        return None
    if not {"dataset", "arch", "loss", "sampling", "n_epochs", "seed"} <= options.keys():
        return None
    path = os.path.join(folder, "log_val_Base.csv")
    result = Result(folder, options, [])
    try:
        if os.path.exists(path):
            with open(path, encoding="utf-8", newline="") as file:
                result.rows.extend({name: float(value) for name, value in row.items() if value}
                                   for row in csv.DictReader(file))
        result.state()  # reads the rest
    except (ValueError, TypeError, LookupError) as error:
        raise ValueError(f"{folder}: its logs cannot be read ({error})") from error
    return result


def read_results(root):
    """All run folders below root, sorted -> (list of Result, what cannot be read, in words).

    Other folders are skipped. ValueError where there is none of a run.
    """
    if not os.path.isdir(root):
        raise FileNotFoundError(f"{root} is not a folder of results")
    results, damaged = [], []
    for folder in sorted(path for path, _, files in os.walk(root)
                         if "Parameter_Info.txt" in files):
        try:
            results += filter(None, [read_result(folder)])
        except ValueError as error:
            damaged.append(str(error))
    if not results and not damaged:
        raise ValueError(f"{root} holds no run; main.py --save_path says where they are")
    return results, damaged


def mean_and_std(values):
    """Numbers -> their mean and population standard deviation, as the literature gives them."""
    return float(np.mean(values)), float(np.std(values))


def with_std(mean, std=None, digits=2):
    """Numbers -> "63.09 ± 0.46", or the mean alone."""
    return f"{mean:.{digits}f}" + ("" if std is None else f" ± {std:.{digits}f}")


def verdict(recipe, results, departures=()):
    """Measured beside published values, as lines of text; the last one says what they amount to.

    recipe: Recipe; results: list of Result, one a seed. A value is inside where it differs by no
    more than the published standard deviation, or by 1.0 point of recall@1 where none is given.
    """
    lines = [f"{'metric':12} {'measured':>15} {'published':>15} {'difference':>10}"]
    inside = {}
    for metric in dict.fromkeys((*recipe.published, *results[0].metrics())):
        ours, spread = mean_and_std([evaluate.percent_of(metric) * result.best(metric)
                                      for result in results])
        line = f"{metric:12} {with_std(ours, spread if len(results) > 1 else None):>15}"
        if metric in recipe.published:
            mean, std = recipe.published[metric]
            allowed = std if std is not None else 1.0 if metric == "recall@1" else None
            line += f" {with_std(mean, std):>15} {ours - mean:>+10.2f}"
            if allowed is not None:  # less than rounding apart counts as inside
                inside[metric] = bool(abs(ours - mean) <= allowed + 1e-9)
                line += f"  {'inside' if inside[metric] else 'outside'} ± {allowed:g}"
        lines.append(line)
    lines.append(f"best epoch of each metric on the test classes, {len(results)} seed"
                 + "s" * (len(results) > 1) + ", mean ± population standard deviation, percent")
    if departures:
        lines.append(f"departs from the recipe: {'; '.join(departures)}")
    judged = ("no published value" if not inside else
              "reproduced" if inside.get("recall@1", all(inside.values())) else "not reproduced")
    lines.append(f"verdict: {judged}" + " (not the recipe as it is)" * bool(departures))
    return lines


def grouped(results):
    """Finished runs by their options -> ({options: [Result]}, what is left out, in words).

    Runs that differ in the seed and free_options alone are of one group; those of a recipe, which
    stand beside its published values, are a group of their own. Of the runs of one seed in a group
    the first counts.
    """
    groups, others = {}, []
    for result in results:
        if result.state() != "finished":
            others.append(f"{one_line(result.folder)}: {result.state()}")
            continue
        key = tuple(sorted((name, value) for name, value in result.options.items()
                           if name not in {"seed", "weights", *free_options()}))
        key += (("weights", os.path.basename(result.options.get("weights", "None"))),
                ("recipe", result.options.get("recipe", "None")))
        group = groups.setdefault(key, [])
        seed = result.options["seed"]
        first = next((other.folder for other in group if other.options["seed"] == seed), None)
        if first is None:
            group.append(result)
        else:
            others.append(f"{one_line(result.folder)}: left out, it repeats seed {seed} of "
                          f"{one_line(first)}")
    return groups, others


def label_of(result):
    """A group's name in a table: loss, sampling, what is held out, a trainer but the plain one."""
    options = result.options
    parts = [options["loss"], options["sampling"]]
    if options.get("trainer", "MetricLossOnly") != "MetricLossOnly":
        parts.append(options["trainer"])
    share = options.get("val_split", "0.0")
    return "/".join(parts) + f" val_split={share}" * (share != "0.0")


def table_of(dataset, groups, choose):
    """One dataset's table -> (header, rows of cells), the best of each column in **.

    groups: {key: [Result]}; choose: Result.best or Result.selected. A published value and the
    difference from it stand behind the measured one where all runs are of one unchanged recipe.
    """
    names = list(dict.fromkeys(name for results in groups.values() for name in
                               results[0].metrics()))
    names.sort(key=lambda name: name.rpartition(" ")[2] not in ("nmi", "f1"))
    labels = [(results[0].options["arch"], label_of(results[0])) for results in groups.values()]
    recipes = read_recipes()
    rows, best = [], {}
    for (key, results), (arch, label) in zip(groups.items(), labels):
        if labels.count((arch, label)) > 1:  # what sets it apart from its namesakes
            differing = {name for other, namesake in zip(groups, labels) if namesake ==
                         (arch, label) for name, value in other if dict(key).get(name) != value}
            apart = [f"{name}={dict(key).get(name)}" for name in sorted(differing)]
            label = " ".join([label, *(part for part in apart if part != "recipe=None")])
        names_of_recipes = {result.options.get("recipe") for result in results}
        unchanged = all(result.options.get("departures", "[]") == "[]"
                        and not result.options.get("subset") for result in results)
        recipe = recipes.get(names_of_recipes.pop()) if len(names_of_recipes) == 1 else None
        cells = {}
        for name in names:
            values = [evaluate.percent_of(name) * choose(result, name) for result in results
                      if name in result.rows[0]]
            if not values:
                continue
            mean, std = mean_and_std(values)
            cells[name] = [mean, with_std(mean, std if len(values) > 1 else None)]
            if recipe and unchanged and name in recipe.published:
                published = recipe.published[name]
                cells[name][1] += (f" ({with_std(*published)}, {mean - published[0]:+.2f})")
            if mean == mean:
                best[name] = evaluate.best_of(name)(mean, best.get(name, mean))
        seeds = sorted(int(result.options["seed"]) for result in results)
        rows.append((arch, label, " ".join(map(str, seeds)), cells))
    header = ["architecture", "loss/sampling", "seeds", *names]
    return header, [[arch, label, seeds, *(
        f"**{cells[name][1]}**" if name in cells and cells[name][0] == best.get(name) else
        cells[name][1] if name in cells else "" for name in names)]
        for arch, label, seeds, cells in rows]


def dataset_of(result):
    """What one table shows: a dataset, or a part of one; with --dataset folder, one folder."""
    options = result.options
    folder = f" {options.get('source_path')}" if options["dataset"] == "folder" else ""
    subset = options.get("subset")
    return options["dataset"] + folder + f", of which {subset}" * bool(subset)


def print_tables(root, style="md", stream=None):
    """The tables of all runs below root, one a dataset, as md, tex or csv, to a stream."""
    stream = stream or sys.stdout
    results, damaged = read_results(root)
    rules = {"best epoch of each metric on the test classes": Result.best,
             "epoch chosen on held-out training classes": Result.selected}
    prefix = {"md": "- ", "tex": "% ", "csv": "# "}[style]
    for dataset in dict.fromkeys(map(dataset_of, results)):
        groups, others = grouped([result for result in results if dataset_of(result) == dataset])
        for rule, choose in rules.items() if groups else ():
            chosen = {key: group for key, group in groups.items()
                      if choose is Result.best or group[0].holds_out()}
            if not chosen:
                continue
            title = (f"{one_line(dataset)}: percent, {rule}; mean ± population standard "
                     "deviation over seeds; in brackets published values and the difference")
            write_table(title, *table_of(dataset, chosen, choose), style, stream)
        stream.writelines(f"{prefix}{other}\n" for other in others)
    stream.writelines(f"{prefix}{one_line(problem, 400)}\n" for problem in damaged)


def write_table(title, header, rows, style, stream):
    """Writes one table of table_of to a stream; the best values are bold, in CSV in ** too."""
    if style == "csv":
        stream.write(f"# {title}\n")
        csv.writer(stream, lineterminator="\n").writerows([header, *rows])
    elif style == "tex":
        signs = {"±": r"$\pm$", "\\": r"\textbackslash{}", "~": r"\textasciitilde{}",
                 "^": r"\textasciicircum{}", **{sign: f"\\{sign}" for sign in "_%&#${}"}}

        def tex(cell):
            cell = "".join(signs.get(sign, sign) for sign in cell)
            return re.sub(r"\*\*(.*)\*\*", r"\\textbf{\1}", cell)
        stream.write(f"% {title}\n\\begin{{tabular}}{{ll{'r' * (len(header) - 2)}}}\n")
        stream.writelines(" & ".join(map(tex, row)) + r" \\" + "\n" for row in [header, *rows])
        stream.write("\\end{tabular}\n")
    else:
        stream.write(f"{title}\n\n| {' | '.join(header)} |\n{'|---' * len(header)}|\n")
        stream.writelines("| " + " | ".join(cell.replace("|", r"\|") for cell in row) + " |\n"
                          for row in rows)
    stream.write("\n")


def compare(folders, path):
    """Draws the runs' curves over each other as an SVG; returns the options in which they differ.

    One panel for each metric that all have. Returns {option: [value of each run]}. ValueError for
    a folder that holds no run.
    """
    results = []
    for folder in folders:
        result = read_result(folder) if os.path.isdir(folder) else None
        if result is None or not result.rows:
            raise ValueError(f"{folder} is not the folder of a run with measurements")
        results.append(result)
    names = [name for name in results[0].rows[0] if name != "epoch"
             and all(name in result.rows[0] for result in results)]
    if not names:
        raise ValueError("the runs have no metric in common")
    numbers = [str(number) for number in range(1, len(folders) + 1)]
    panels = [(name, {number: [(row["epoch"], row[name]) for row in result.rows if name in row]
                      for number, result in zip(numbers, results)}) for name in names]
    runs = [f"{number}  {os.path.join(*os.path.normpath(folder).split(os.sep)[-2:])}"
            for number, folder in zip(numbers, folders)]
    auxiliaries.save_plot(path, [f"{len(runs)} runs over their epochs", *runs], panels)
    options = dict.fromkeys(name for result in results for name in result.options
                            if name != "given")
    values = {name: [result.options.get(name, "") for result in results] for name in options}
    return {name: row for name, row in values.items() if len(set(row)) > 1}


def main(argv=None):
    """python results.py: tables of finished runs, and curves of several in one picture."""
    parser = auxiliaries.Parser(prog="results.py", description="Looks back on runs.")
    commands = parser.add_subparsers(dest="command", required=True)
    table = commands.add_parser("table", help="tables of all runs below a folder, one a dataset, "
                                              "with published values beside the measured ones")
    table.add_argument("root", nargs="?", default="./Training_Results",
                       help="as --save_path of main.py; default %(default)s")
    table.add_argument("--format", choices=("md", "tex", "csv"), default="md",
                       help="Markdown, LaTeX or CSV; default %(default)s")
    curves = commands.add_parser("compare", help="the curves of several runs in one SVG, and the "
                                                 "options in which they differ")
    curves.add_argument("runs", nargs="+", help="run folders")
    curves.add_argument("--out", default="compare.svg", help="default %(default)s")
    commands.add_parser("recipes", help="the published results that main.py --recipe runs")
    with auxiliaries.one_message("results.py"):
        args = parser.parse_args(argv)
        if args.command == "recipes":
            print_recipes()
            return
        if args.command == "table":
            print_tables(args.root, args.format)
            return
        for name, values in compare(args.runs, args.out).items():
            print(auxiliaries.printable(f"{name}: {' | '.join(values)}"))
        print(auxiliaries.printable(f"curves in {args.out}"))


if __name__ == "__main__":
    main()
