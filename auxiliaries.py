"""What any program of this kind needs: command lines and their errors, files written whole,
checkpoints, plots, random states, and how processes, one or several, find each other and are
stopped.

Nothing here knows what an embedding, a loss, a dataset or a run is. Every file is written under a
temporary name and renamed, so a program that is killed leaves whole files only. A new kind of
output is a writer here that goes through written_whole.
"""

import argparse
import colorsys
import contextlib
import csv
import datetime
import difflib
import errno
import functools
import gc
import linecache
import math
import multiprocessing
import operator
import os
import pickle
import platform
import random
import re
import signal
import subprocess
import sys
import threading
import time
import traceback
import zipfile
from xml.sax import saxutils

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont


# ---- command lines and their errors


class Parser(argparse.ArgumentParser):
    """Takes whole names of flags only; ends on a mistyped one with a line that has the nearest."""

    def __init__(self, *args, **options):
        wide = functools.partial(argparse.HelpFormatter, max_help_position=26, width=100)
        super().__init__(*args, allow_abbrev=False, formatter_class=wide, **options)

    def parse_given(self, argv):
        """The options of a command line, and given: the names of those that stand in it."""
        opt = self.parse_args(argv)
        unset = argparse.Namespace(**dict.fromkeys(vars(opt)))  # no default fills in what is there
        opt.given = [name for name, value in vars(self.parse_args(argv, unset)).items()
                     if value is not None]
        return opt

    def parse_known_args(self, args=None, namespace=None):
        namespace, unknown = super().parse_known_args(args, namespace)
        if unknown:  # a subcommand's parser knows the nearest of its flags
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        return namespace, unknown

    def error(self, message):
        message = re.sub(r"^argument (?:\S+/)?(--\w+): (\S+): it must be ", r"\1 \2: it must be ",
                         message)  # of number, in the words of other errors
        wrong = re.search(r"(?:invalid choice|unrecognized arguments): '?([^\s'=]+)", message)
        choices = re.findall(r"[^\s,')]+", message.partition("(choose from ")[2])
        near = difflib.get_close_matches(wrong[1], choices or self._option_string_actions,
                                         n=1) if wrong else []
        self.exit(2, f"{self.prog}: error: {message}; "
                     + "".join(f"did you mean {name}? " for name in near) + "--help lists all\n")


def number(kind, least=None, above=None, most=None, below=None):
    """An argparse type: a finite number of a kind, int or float, within bounds."""
    bounds = [(f"{words} {bound}", holds, bound) for words, holds, bound in (
        ("at least", operator.ge, least), ("above", operator.gt, above),
        ("at most", operator.le, most), ("below", operator.lt, below)) if bound is not None]
    wanted = ("a whole number " if kind is int else "a finite number ") + " and ".join(
        text for text, _, _ in bounds)

    def parse(text):
        try:
            value = kind(text)
        except (ValueError, OverflowError):
            value = math.nan
        if not math.isfinite(value) or not all(holds(value, bound) for _, holds, bound in bounds):
            raise argparse.ArgumentTypeError(f"{text}: it must be {wanted.rstrip()}")
        return value
    return parse


@contextlib.contextmanager
def one_message(program):
    """Ends a program with one line on stderr where it raises an error on purpose or is stopped.

    Any other error keeps its traceback; one of a loading process shows that process's. Nothing is
    said where the reader of the output has gone, as in `| head`.
    """
    if hasattr(sys.stdout, "reconfigure"):  # paths need not be valid text
        sys.stdout.reconfigure(errors="backslashreplace")
    if signal.getsignal(signal.SIGINT) == signal.SIG_DFL:  # as the programs have it at first
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    except KeyboardInterrupt as stopped:
        traceback.clear_frames(stopped.__traceback__)  # loading processes end with their loaders
        number = signal.Signals(stopped.args[0] if stopped.args else signal.SIGINT)
        print(f"{program}: stopped by {number.name}{getattr(stopped, 'advice', '')}",
              file=sys.stderr)
        raise SystemExit(128 + number) from None
    except BrokenPipeError:
        raise SystemExit(128 + 13) from None  # as SIGPIPE, which Windows has not
    except Exception as error:
        sentence, original = sentence_of(error), of_another_process(error)
        if sentence:
            raise SystemExit(f"{program}: error: {printable(sentence)}") from error
        if original:
            raise SystemExit(f"{program}: error in another process\n{original}") from error
        raise
    finally:
        try:
            sys.stdout.flush()
        except BrokenPipeError:  # Python would try again at its end
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def of_another_process(error):
    """The traceback and message of an error that another process hands over as text; or ""."""
    text = re.match(r"Caught \w+ in [\w ]+\.\nOriginal (.*)", str(error), re.DOTALL)
    return text[1].rstrip() if text else ""


def raised_on_purpose(error):
    """Whether a raise statement of a file beside this one, or in benchmarks/, raised the error."""
    frames = (re.findall(r'^  File "(.+)", line (\d+), in ', of_another_process(error), re.M)
              or [frame[:2] for frame in traceback.extract_tb(error.__traceback__)])
    path, line = frames[-1]
    here, there = (os.path.dirname(os.path.realpath(file)) for file in (__file__, path))
    return (there in (here, os.path.join(here, "benchmarks"))
            and linecache.getline(path, int(line)).split()[:1] == ["raise"])


def sentence_of(error):
    """What to say of an error that is no slip in the code, with what helps; None of any other."""
    text = (of_another_process(error).rpartition("\n")[2].partition(": ")[2]
            or str(error) or type(error).__name__)
    if raised_on_purpose(error):
        return text
    if isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EPERM, errno.EROFS,
                                                      errno.ENOSPC, errno.EIO):
        return text
    for holds, remedy in (
            (isinstance(error, torch.OutOfMemoryError), "try a smaller --bs"),
            (type(error).__module__.startswith(("torch._dynamo", "torch._inductor")),
             "leave out --compile, or give it the compiler that it needs"),
            (re.match(r"[\w:.]+ does not have a deterministic implementation", text),
             "leave out --deterministic, or take another --arch or --loss"),
            (re.match(r"DataLoader worker \(pid", text),
             "often memory, or shared memory, is short: fewer --kernels need less")):
        if holds and isinstance(error, RuntimeError):
            return f"{one_line(text, 1000)}: {remedy}"
    return None


def printable(text):
    """A text for the terminal; escapes, line ends and what is not UTF-8 show as \\x1b, \\n."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(text))


def one_line(value, most=200):
    """Anything that a file may hold, as one line of text for a message; cut where it is longer."""
    text = printable(" ".join(str(value).split()))
    return text if len(text) <= most else f"{text[:most]}..."


# ---- files


@contextlib.contextmanager
def written_whole(path, mode="wb"):
    """Opens a file for writing that appears under its name only once it is complete.

    Raises OSError that names the path where the disk is full or cannot be written.
    """
    temporary = f"{path}.tmp"
    try:
        with open(temporary, mode, **({} if "b" in mode else {
                "encoding": "utf-8", "errors": "backslashreplace", "newline": ""})) as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            os.remove(temporary)
        # torch.save reports a full disk as RuntimeError.
        if isinstance(error, (OSError, RuntimeError)):
            raise OSError(f"{path} could not be written: {error}; what it held is kept. Is the "
                          "disk full or read-only? --save_path names another place") from error
        raise


def previous(path):
    """Where the checkpoint before the one in a file is kept."""
    return path.removesuffix(".pth.tar") + "_previous.pth.tar"


def save_checkpoint(path, state, keep_previous=False):
    """Writes a dict of tensors, numbers, strings and containers of these; see load_checkpoint.

    keep_previous: the file that was there is kept as previous(path).
    """
    with written_whole(path) as file:
        torch.save(state, file)
        if keep_previous and os.path.exists(path):
            file.flush()
            os.fsync(file.fileno())  # a full disk may show only here
            os.replace(path, previous(path))


def load_last_checkpoint(path, keys):
    """The checkpoint of a file, or, where it is damaged or lacking, the one before it.

    keys: as in load_checkpoint. Says so when it is the one before; a damaged file is renamed, lest
    it become the one before. None where there is neither file, ValueError where neither is whole.
    """
    there, before = os.path.exists(path), os.path.exists(previous(path))
    if not there and not before:
        return None
    try:
        return load_checkpoint(path, keys)
    except (ValueError, FileNotFoundError) as error:
        if not before:
            raise
        state = load_checkpoint(previous(path), keys)
        if there:
            os.replace(path, path.removesuffix(".pth.tar") + "_damaged.pth.tar")
        print(printable(f"warning: {error}; going on from the one before, {previous(path)}"),
              flush=True)
        return state


def load_checkpoint(path, keys):
    """Reads what save_checkpoint wrote, to the CPU, without running any code from the file.

    keys: what the dict in it must have. FileNotFoundError where there is no such file, ValueError
    where it is damaged or of another kind.
    """
    try:
        with zipfile.ZipFile(path) as archive:  # torch.load does not look at the checksums
            if archive.testzip():
                raise zipfile.BadZipFile
        state = torch.load(path, map_location="cpu", weights_only=True)
        if not state.keys() >= set(keys):
            raise KeyError
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no checkpoint {path}") from None
    except Exception as error:  # torch.load raises a dozen types for damaged or foreign files
        # Its own message advises to read the file without this protection: it is not shown.
        raise ValueError(f"the checkpoint {path} is damaged, or not one of this program: it "
                         "cannot be read safely, as tensors and plain values alone, or lacks a "
                         f"part ({type(error).__name__})") from error
    return state


def save_pickle(path, value):
    """Writes one value as a pickle file; this program itself never reads one."""
    with written_whole(path) as file:
        pickle.dump(value, file)


def save_csv(path, rows):
    """Writes a list of dicts as CSV; the columns are all keys in order of first appearance."""
    columns = list(dict.fromkeys(key for row in rows for key in row)) or ["epoch"]
    with written_whole(path, "w") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)


# ---- rows of measurements, {"epoch": number, metric: number}; greater is better


def greatest_row(rows, metric):
    """The row with the greatest metric, the first of equals; one that is no number is the least."""
    return max(rows, key=lambda row: row[metric] if row[metric] == row[metric] else -math.inf)


def best_row(rows, metric):
    """The greatest_row of a training; that of epoch 0, before it, only while alone."""
    return greatest_row([row for row in rows if row["epoch"]] or rows, metric)


def is_over(rows, metric, every, patience):
    """Whether the metric was no better in the last `patience` rows, of each every-th epoch.

    patience: a number, or None for never.
    """
    rows = [row for row in rows if row["epoch"] % every == 0]
    if patience is None or not rows:
        return False
    return len(rows) - 1 - rows.index(best_row(rows, metric)) >= patience


# ---- seeds and versions


def seed_everything(seed, deterministic=False):
    """Seeds torch (all devices), numpy and Python.

    deterministic: from here on torch computes the same bits each time, or raises RuntimeError.
    """
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False


def random_state():
    """The state of all generators, as tensors and plain values that a checkpoint can hold.

    Of GPUs only the current one's: each process of a run has one.
    """
    name, keys, *rest = np.random.get_state()
    return {"cpu": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
            "numpy": [name, keys.tolist(), *rest], "python": random.getstate()}


def restore_random_state(state):
    """Sets the generators to a state of random_state; a GPU's only where there is one."""
    torch.set_rng_state(state["cpu"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))
    version, numbers, rest = state["python"]
    random.setstate((version, tuple(numbers), rest))


def select_device(gpu):
    """--gpu as a torch device; says in one line when the CPU stands in for a missing GPU.

    Under torchrun a process takes the GPU of its own number, unless gpu is negative.
    """
    if gpu < 0:
        return torch.device("cpu")
    gpu = int(os.environ.get("LOCAL_RANK", gpu)) if wanted_processes() > 1 else gpu
    if not torch.cuda.is_available():
        print(f"No CUDA device is available for --gpu {gpu}: running on the CPU.")
        return torch.device("cpu")
    if gpu >= torch.cuda.device_count():
        raise ValueError(f"--gpu {gpu}: this machine has {torch.cuda.device_count()} CUDA "
                         "devices, numbered from 0; -1 is the CPU")
    torch.cuda.set_device(gpu)
    return torch.device("cuda", gpu)


def versions(device):
    """What the run ran on, in one line: versions, device, git revision of the code if known."""
    import torchvision
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else (
        f"CPU, {torch.get_num_threads()} threads")
    revision = ""
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):  # without git
        revision = subprocess.run(
            ["git", "describe", "--always", "--dirty"], text=True, capture_output=True, timeout=10,
            cwd=os.path.dirname(os.path.abspath(__file__))).stdout.strip()
    return (f"Python {platform.python_version()}, torch {torch.__version__}, "
            f"torchvision {torchvision.__version__}, {name}"
            + f", revision {revision}" * bool(revision))


# ---- processes


def wanted_processes():
    """How many processes torchrun has started for this run; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", 1))


def rank():
    """The number of this process among those of the run, from 0; the first one writes."""
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0


def num_ranks():
    """How many processes the run has; 1 without join_processes."""
    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1


@contextlib.contextmanager
def join_processes():
    """Connects the processes that torchrun has started; alone, does nothing.

    Tensors on the CPU travel by gloo, on GPUs by NCCL. All but the first process fall silent. A
    process that fails tells the others, which then end too; one waits an hour at most for another
    that evaluates or writes.
    """
    if wanted_processes() == 1:
        yield
        return
    store, number, count = next(torch.distributed.rendezvous("env://"))
    if not hasattr(torch.distributed.Backend, "GLOO_IN_ORDER"):
        torch.distributed.Backend.register_backend("gloo_in_order", gloo_in_order, devices=["cpu"])
    backend = "cpu:gloo_in_order" + ",cuda:nccl" * torch.cuda.is_available()
    torch.distributed.init_process_group(backend, store=store, rank=number, world_size=count,
                                         timeout=datetime.timedelta(hours=1))
    with open(os.devnull, "w") as nowhere:
        silent = contextlib.redirect_stdout(nowhere) if number else contextlib.nullcontext()
        try:
            with silent:
                yield
        except BaseException as error:
            # The first to fail says why; the rest fail because of it, and say nothing.
            speaks = True
            with contextlib.suppress(RuntimeError):  # the store may be gone as well
                speaks = store.add("failures", 1) == 1
            if not speaks:
                sys.stderr = open(os.devnull, "w")
                time.sleep(1)  # when one ends, torchrun ends the rest, which have to speak first
            # gloo's errors have no type, but begin with the place in its source.
            if isinstance(error, torch.distributed.DistError) or (
                    isinstance(error, RuntimeError) and re.match(r"\[[^]]*gloo", str(error))):
                raise ConnectionError(
                    f"process {number} of {count} has lost another process of this run, which is "
                    f"dead or out of reach ({one_line(error)}); --resume goes on from the last "
                    "checkpoint") from error
            raise
    # Not after an error: NCCL waits here for collectives that the others will never join, but
    # gives them up when the program ends.
    gc.collect()  # what knows the group, such as a run's network, would keep its threads
    last = torch.zeros(1)
    torch.distributed.all_reduce(last)  # after it gloo's thread holds no tensor but this one
    torch.distributed.destroy_process_group()
    del last  # not earlier


def gloo_in_order(store, number, count, timeout):
    """torch's gloo group with one thread, which carries out one operation after the other.

    A thread of gloo lets go of an operation's tensors a moment after the operation has ended. If
    nothing in Python knows them any more, it needs Python's lock for that: while the group is
    destroyed, which holds the lock and waits for the thread (torch 2.6), that is a wait for ever,
    and while Python ends, where something still knows the group, an abort. Of several threads none
    would know that the others are done.
    """
    options = torch.distributed.ProcessGroupGloo._Options()
    options._devices = [torch.distributed.ProcessGroupGloo.create_default_device()]
    options._threads, options._timeout = 1, timeout
    return torch.distributed.ProcessGroupGloo(store, number, count, options)


def gather_rows(rows):
    """Tensors of one shape [b, ...], one of each process -> all of them [ranks b, ...], in order.

    No gradient passes. Alone: the rows themselves.
    """
    if num_ranks() == 1:
        return rows
    parts = [torch.empty_like(rows) for _ in range(num_ranks())]
    torch.distributed.all_gather(parts, rows.contiguous())
    return torch.cat(parts)


def share_of(number):
    """This process's share of `number` rows, a list of indices; gather_rows(...)[:number] has all.

    Shares are consecutive and of one length; the last ones begin again from row 0 to fill up.
    """
    length = -(-number // num_ranks())
    return [i % number for i in range(rank() * length, (rank() + 1) * length)]


def from_first(function):
    """What function() returns in the first process, in all of them; its error as well.

    The result must be picklable. The others wait.
    """
    if num_ranks() == 1:
        return function()
    box, failed = [None, None], None
    if rank() == 0:
        try:
            box[0] = function()
        except Exception as error:
            failed = error
            box[1] = error if raised_on_purpose(error) else RuntimeError(
                f"Caught {type(error).__name__} in the first process.\n"
                f"Original {traceback.format_exc()}")  # as loading processes say it
    torch.distributed.broadcast_object_list(box, src=0)
    if box[1] is not None:
        raise failed or box[1]
    return box[0]


def any_rank(flag):
    """Whether flag is true in a process of the run; all must ask."""
    if num_ranks() == 1:
        return flag
    box = torch.tensor([int(flag)])
    torch.distributed.all_reduce(box, torch.distributed.ReduceOp.MAX)
    return bool(box)


class Stopped(KeyboardInterrupt):
    """SIGTERM or Ctrl-C ended the run; args[0] is the signal's number."""


class StopSignals:
    """Takes SIGTERM and Ctrl-C, so that a run can finish what it does.

    As a context: within it the first signal only sets `caught`, its number, unless `at_once` is
    True, where nothing would be lost; then, and at the second signal, Stopped is raised.
    """

    def __init__(self):
        self.caught, self.at_once, self.process = None, True, os.getpid()

    def __enter__(self):
        self.before = {}
        with contextlib.suppress(ValueError):  # not the main thread: signals go elsewhere
            for number in (signal.SIGINT, signal.SIGTERM):
                self.before[number] = signal.signal(number, self.handle)
        return self

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def handle(self, number, _):
        """The handler of both signals; loading processes, which inherit it, leave it to this."""
        if os.getpid() != self.process:
            return
        again, self.caught = self.caught is not None, number
        if self.at_once or again:
            raise Stopped(number)


def heed_parent_alone(_):
    """worker_init_fn of a DataLoader: what ends its processes.

    SIGTERM ends the process if its parent, the run, sends it: a job scheduler's goes to all
    processes of a run, and is for the run to handle. Where the run has been killed, the process
    ends within seconds, or at any SIGTERM. Does nothing where the system does not say who sends a
    signal (macOS, Windows).
    """
    if not hasattr(signal, "sigtimedwait"):
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # for all threads from here on
    parent = multiprocessing.parent_process().pid  # as of before the fork

    def wait():
        while os.getppid() == parent:
            heard = signal.sigtimedwait({signal.SIGTERM}, 2)
            if heard and heard.si_pid == parent:
                break
        os._exit(0)

    threading.Thread(target=wait, daemon=True).start()


# ---- pictures

COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#17becf", "#8c564b", "#e377c2",
           "#7f7f7f", "#bcbd22")


def label(x, y, text, **style):
    """An SVG element with a text; style: its attributes, such as font_weight."""
    style = "".join(f' {name.replace("_", "-")}="{value}"' for name, value in style.items())
    return f'<text x="{x}" y="{y}"{style}>{saxutils.escape(text)}</text>'


def save_svg(path, width, height, title, parts):
    """Writes a picture of so many pixels: its header lines above, below them SVG elements."""
    lines = [f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
             'font-family="Helvetica, Arial, sans-serif" font-size="13">',
             '<rect width="100%" height="100%" fill="white"/>',
             *(label(20, 26 + 20 * i, line, font_weight="normal" if i else "bold")
               for i, line in enumerate(title)), *parts, "</svg>\n"]
    with written_whole(path, "w") as file:
        file.write("\n".join(lines))


def save_plot(path, title, panels):
    """Draws curves over epochs, one panel beside the other, as an SVG that a browser opens.

    title: list of header lines. panels: list of (name, {curve: [(epoch, value), ...]}); values
    that are not finite are left out. Each panel has axes with ticks and a legend with each last
    value; three stand in a row.
    """
    width, height, head = 620, 380, 24 + 20 * len(title)
    parts = []
    for i, (name, curves) in enumerate(panels):
        parts += [f'<g transform="translate({width * (i % 3)} {height * (i // 3) + head})">',
                  *panel(name, curves, width, height), "</g>"]
    save_svg(path, width * min(3, len(panels)), height * -(-len(panels) // 3) + head, title, parts)


def panel(name, curves, width, height):
    """The SVG elements of one panel of save_plot."""
    left, right, top, bottom = 62, width - 170, 24, height - 46
    curves = {curve_name: [(x, y) for x, y in points if np.isfinite(y)]
              for curve_name, points in curves.items()}
    points = [point for curve in curves.values() for point in curve] or [(0, 0)]
    x_ticks = ticks(min(x for x, _ in points), max(x for x, _ in points), whole=True)
    y_ticks = ticks(min(y for _, y in points), max(y for _, y in points))

    def at_x(x):
        return f"{left + (x - x_ticks[0]) / (x_ticks[-1] - x_ticks[0]) * (right - left):.1f}"

    def at_y(y, below=0):
        share = (y - y_ticks[0]) / (y_ticks[-1] - y_ticks[0])
        return f"{bottom - share * (bottom - top) + below:.1f}"

    parts = [label(left, top - 10, name, font_weight="bold")]
    for x in x_ticks:
        parts += [f'<line x1="{at_x(x)}" y1="{top}" x2="{at_x(x)}" y2="{bottom}" '
                  'stroke="#e5e5e5"/>',
                  label(at_x(x), bottom + 18, f"{x:g}", text_anchor="middle")]
    for y in y_ticks:
        parts += [f'<line x1="{left}" y1="{at_y(y)}" x2="{right}" y2="{at_y(y)}" '
                  'stroke="#e5e5e5"/>',
                  label(left - 8, at_y(y, 4), f"{y:g}", text_anchor="end")]
    parts += [f'<path d="M{left} {top} V{bottom} H{right}" stroke="black" fill="none"/>',
              label((left + right) / 2, bottom + 38, "epoch", text_anchor="middle")]
    if any(curves.values()):
        parts.append(label(right + 12, top - 10, "last epoch:"))
    for i, (curve_name, curve) in enumerate(curves.items()):
        colour = COLOURS[i % len(COLOURS)]
        line = " ".join(f"{at_x(x)},{at_y(y)}" for x, y in curve)
        last = f" {curve[-1][1]:.4g}" if curve else ""
        y = top + 8 + 20 * i
        parts += [f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="2"/>',
                  *(f'<circle cx="{at_x(x)}" cy="{at_y(y)}" r="2.5" fill="{colour}"/>'
                    for x, y in curve),
                  f'<line x1="{right + 12}" y1="{y - 4}" x2="{right + 32}" y2="{y - 4}" '
                  f'stroke="{colour}" stroke-width="3"/>', label(right + 38, y, curve_name + last)]
    return parts


def save_scatter(path, title, points, names, size=760):
    """Draws points [N, 2], coloured by their names, as an SVG that a browser opens.

    title: list of header lines. names: a string for each point. Up to 20 names stand in a legend;
    a browser shows the name of the point under the mouse. The axes have one scale and no numbers.
    """
    points = np.asarray(points, dtype=float)
    low, high = points.min(0), points.max(0)
    scale = (size - 40) / max((high - low).max(), 1e-12)
    places = size / 2 + (points - (low + high) / 2) * scale * (1, -1)            # y upwards
    groups = {}
    for name, (x, y) in zip(names, places):
        groups.setdefault(name, []).append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.2"/>')
    with_legend = len(groups) <= 20
    head = 14 + 20 * len(title)
    parts = [f'<g transform="translate(0 {head})" fill-opacity="0.75">',
             f'<rect x="8" y="0" width="{size - 16}" height="{size - 8}" fill="none" '
             'stroke="#cccccc"/>']
    for i, (name, circles) in enumerate(sorted(groups.items())):
        colour = COLOURS[i] if len(groups) <= len(COLOURS) else colour_of(i)
        parts += [f'<g fill="{colour}"><title>{saxutils.escape(name)}</title>', *circles, "</g>"]
        if with_legend:
            parts += [f'<circle cx="{size + 16}" cy="{24 + 22 * i}" r="5" fill="{colour}"/>',
                      label(size + 28, 28 + 22 * i, name)]
    save_svg(path, size + 220 * with_legend, size + head, title, [*parts, "</g>"])


def colour_of(i):
    """The i-th of any number of colours, as #rrggbb, the form that every SVG viewer knows."""
    # Steps of the golden angle keep neighbouring numbers apart in hue.
    colour = colorsys.hls_to_rgb(i * 137.508 / 360 % 1, 0.35 + i % 4 * 0.09, 0.85 - i % 3 * 0.2)
    return "#" + "".join(f"{round(255 * part):02x}" for part in colour)


def ticks(low, high, whole=False, count=6):
    """Round numbers that enclose [low, high], about `count` of them, evenly spaced.

    Where low and high are nearly one, they enclose the numbers around it.
    """
    most = max(abs(low), abs(high))
    if not whole and high - low <= 1e-4 * most:  # nearer than labels of six digits tell apart
        low, high = low - (most / 20 or 0.5), high + (most / 20 or 0.5)
    span = max(high - low, 1) if whole else high - low
    step = 10 ** np.floor(np.log10(span / count))
    step *= next(factor for factor in (1, 2, 5, 10) if span / (step * factor) <= count)
    step = max(1, step) if whole else step
    first, last = np.floor(low / step + 1e-9), np.ceil(high / step - 1e-9)
    return [round(float(i * step), 12) for i in np.arange(first, max(last, first + 1) + 1)]


def save_image_grid(path, rows, size=112, title=""):
    """Writes rows of (PIL image, role) as a PNG; role "query", "hit" or "miss" sets the frame.

    Queries stand on the left, framed red; hits are framed green; misses grey, with a cross.
    """
    gap, margin, legend = 6, 18, 24
    side = size + 10  # with its frame
    columns = max(len(row) for row in rows)
    grid = Image.new("RGB", (columns * (side + gap) + margin + gap,
                             len(rows) * (side + gap) + gap + legend), "white")
    ImageDraw.Draw(grid).text(
        (gap, 4), f"{title}   query (red)   neighbours: same class (green), other (grey, crossed)",
        fill="black", font=ImageFont.load_default(13))
    for i, row in enumerate(rows):
        for j, (image, role) in enumerate(row):
            colour = {"query": (214, 39, 40), "hit": (44, 160, 44), "miss": (120, 120, 120)}[role]
            tile = Image.new("RGB", (side, side), colour)
            image = image.copy()
            image.thumbnail((size, size))
            image = image.resize([round(edge * size / max(image.size)) for edge in image.size])
            tile.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
            if role == "miss":
                draw = ImageDraw.Draw(tile)
                draw.rectangle((0, 0, 21, 21), fill=colour)
                draw.line((4, 4, 17, 17), fill="white", width=3)
                draw.line((4, 17, 17, 4), fill="white", width=3)
            grid.paste(tile, (gap + j * (side + gap) + margin * (j > 0),
                              gap + i * (side + gap) + legend))
    with written_whole(path) as file:
        grid.save(file, "PNG")
