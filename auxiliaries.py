"""What a run leaves behind and says: folder, logs, checkpoints, plots, pictures, progress line.

Nothing here knows what an embedding, a loss or a dataset is. Every file is written under a
temporary name and renamed, so a run that is killed leaves whole files only. A new kind of output
is a writer here that goes through written_whole.
"""

import contextlib
import csv
import os
import pickle
import platform
import re
import subprocess
import sys
import time
from xml.sax import saxutils

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont


def add_arguments(parser):
    """Adds the group 'run' to an argparse parser."""
    group = parser.add_argument_group("run", "device, seed, and where the files go")
    group.add_argument("--gpu", type=int, default=0, metavar="ID",
                       help="number of the CUDA device, -1 for the CPU. Without CUDA the run says "
                            "so and takes the CPU. Default %(default)s (reference code)")
    group.add_argument("--seed", type=int, default=1, metavar="S",
                       help="0 or more; fixes weights, batches, crops, tuples and clusters. "
                            "Literature reports 1 to 5 seeds. Default %(default)s (reference "
                            "runs)")
    group.add_argument("--savename", default=None, metavar="NAME",
                       help="the run's folder is SAVE_PATH/DATASET/NAME; default is the start "
                            "time. A folder that exists is never written over")
    group.add_argument("--save_path", default="./Training_Results", metavar="DIR",
                       help="where run folders go. Default %(default)s")
    group.add_argument("--tensorboard", action="store_true",
                       help="also write losses, learning rates and metrics for TensorBoard into "
                            "the run's folder; needs the package tensorboard")
    group.add_argument("--resume", action="store_true",
                       help="go on with the run named by --savename after its last whole epoch; "
                            "give the same options as before (--n_epochs, --patience, --gpu, "
                            "--kernels, --tensorboard, --plot_embeddings and paths may change)")


# ---- files


@contextlib.contextmanager
def written_whole(path, mode="wb"):
    """Opens a file for writing that appears under its name only once it is complete.

    Raises OSError that names the path where the disk is full or cannot be written.
    """
    temporary = f"{path}.tmp{os.getpid()}"
    try:
        with open(temporary, mode, **({} if "b" in mode else
                                      {"encoding": "utf-8", "newline": ""})) as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            os.remove(temporary)
        # torch.save reports a full disk as RuntimeError.
        if isinstance(error, (OSError, RuntimeError)):
            raise OSError(f"{path} could not be written: {error}. Is the disk full or read-only? "
                          "--save_path names another place") from error
        raise


def make_run_folder(save_path, dataset, savename=None, resume=False):
    """The run's folder, made new: save_path/dataset/savename or, without a name, the start time.

    With resume it must be there already; what a killed run left half written is removed. Raises
    ValueError or OSError where that does not hold.
    """
    if resume and not savename:
        raise ValueError("--resume needs --savename, the name of the run to go on with")
    if savename and os.path.basename(savename) != savename or savename in (".", ".."):
        raise ValueError(f"--savename {savename}: it is the name of a folder, not a path; "
                         "--save_path says where")
    name = savename or time.strftime("%Y-%m-%d_%H-%M-%S")
    folder = os.path.join(save_path, dataset, name)
    if resume:
        if not os.path.isdir(folder):
            raise FileNotFoundError(f"--resume: there is no run in {folder}; --savename and "
                                    "--save_path say where to look")
        for entry in os.listdir(folder):
            if re.search(r"\.tmp\d+$", entry):
                os.remove(os.path.join(folder, entry))
        return folder
    if os.path.lexists(folder):
        raise ValueError(f"the run folder {folder} exists already: choose another --savename, or "
                         "continue it with --resume")
    try:
        os.makedirs(folder)
    except OSError as error:
        raise OSError(f"--save_path {save_path}: no folder can be made there ({error})") from error
    return folder


def save_checkpoint(path, state):
    """Writes a dict of tensors, numbers, strings and containers of these; see load_checkpoint."""
    with written_whole(path) as file:
        torch.save(state, file)


def load_checkpoint(path, keys):
    """Reads what save_checkpoint wrote, to the CPU, without running any code from the file.

    keys: what the dict in it must have. FileNotFoundError where there is no such file, ValueError
    where it is damaged or of another kind.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no checkpoint {path}") from None
    except Exception as error:  # torch.load raises a dozen types for damaged or foreign files
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(f"the checkpoint {path} is damaged or not one of this program: "
                         f"{reason}") from error
    missing = [key for key in keys if not isinstance(state, dict) or key not in state]
    if missing:
        raise ValueError(f"the checkpoint {path} is not one of this program: it has no "
                         f"{missing[0]}")
    return state


def save_options(folder, options):
    """Writes the options of a run, a dict of plain values, as hypa.pkl and Parameter_Info.txt."""
    save_pickle(os.path.join(folder, "hypa.pkl"), options)
    with written_whole(os.path.join(folder, "Parameter_Info.txt"), "w") as file:
        file.writelines(f"{name}: {value}\n" for name, value in sorted(options.items()))


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


# ---- seeds and versions


def seed_everything(seed):
    """Seeds torch (all devices) and numpy."""
    if not 0 <= seed < 2 ** 32:
        raise ValueError(f"--seed {seed}: a seed is from 0 to {2 ** 32 - 1}")
    torch.manual_seed(seed)
    np.random.seed(seed)


def random_state():
    """The state of torch's generators, as tensors that a checkpoint can hold."""
    return {"cpu": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []}


def restore_random_state(state):
    """Sets torch's generators to a state of random_state; other numbers of GPUs are left alone."""
    torch.set_rng_state(state["cpu"])
    if len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])


def select_device(gpu):
    """--gpu as a torch device; says in one line when the CPU stands in for a missing GPU."""
    if gpu < 0:
        return torch.device("cpu")
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
    try:
        here = os.path.dirname(os.path.abspath(__file__))
        revision = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=here, text=True,
                                  capture_output=True, timeout=10).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        revision = ""
    return (f"Python {platform.python_version()}, torch {torch.__version__}, "
            f"torchvision {torchvision.__version__}, {name}"
            + f", revision {revision}" * bool(revision))


# ---- progress


class Progress:
    """One line that is rewritten: epoch, iteration, loss, images per second, time left.

    Silent when the output is not a terminal, so logs stay short. update may be called as often as
    one likes: it prints, and reads the loss from the device, twice a second at most. The rate is
    that of the training since restart; the time left counts the pauses to come, such as
    evaluations, one in every epochs_per_pause.
    """

    def __init__(self, num_epochs, images_per_iteration, stream=None, epochs_per_pause=1):
        self.epochs_per_pause = epochs_per_pause
        self.num_epochs = num_epochs
        self.images_per_iteration = images_per_iteration
        self.stream = stream or sys.stdout
        self.active = self.stream.isatty()
        self.width = 0
        self.paused = None
        self.pause_seconds = 0.0
        self.restart()

    def restart(self):
        """Training begins or goes on; what a pause before took is expected of later ones."""
        now = time.monotonic()
        if self.paused is not None:
            self.pause_seconds = now - self.paused
        self.started = self.printed = now
        self.done, self.paused = 0, None

    def pause(self, text, counts=True):
        """Training stops for a while, the text is shown; returns the seconds since restart.

        counts: whether it is one of the pauses to come, rather than a shorter one.
        """
        now = time.monotonic()
        self.paused = now if counts else None
        self.write(text)
        return now - self.started

    def update(self, epoch, iteration, iterations, loss):
        """After iteration (from 0) of so many in this epoch; loss: a number or 0-dim tensor."""
        self.done += 1
        now = time.monotonic()
        if not self.active or now - self.printed < 0.5:
            return
        self.printed = now
        rate = self.done / (now - self.started)
        epochs_left = self.num_epochs - epoch + 1
        every = self.epochs_per_pause  # and one after the last epoch
        pauses = (self.num_epochs // every - (epoch - 1) // every
                  + (self.num_epochs % every > 0))
        left = (epochs_left * iterations - iteration - 1) / rate + pauses * self.pause_seconds
        self.write(f"epoch {epoch}/{self.num_epochs}  iteration {iteration + 1}/{iterations}  "
                   f"loss {float(loss):.4f}  {rate * self.images_per_iteration:.0f} images/s  "
                   f"{duration(left)} left")

    def write(self, text):
        """Replaces the line by the text; an empty text clears it."""
        if self.active:
            self.stream.write("\r" + text.ljust(self.width))
            self.stream.write("\r" * (not text))
            self.stream.flush()
            self.width = len(text)


def duration(seconds):
    """Seconds as 7s, 3m 20s or 2h 05m."""
    seconds = int(round(seconds))
    if seconds < 60:
        return f"{seconds}s"
    if seconds < 3600:
        return f"{seconds // 60}m {seconds % 60:02d}s"
    return f"{seconds // 3600}h {seconds % 3600 // 60:02d}m"


# ---- pictures

COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#17becf", "#8c564b", "#e377c2",
           "#7f7f7f", "#bcbd22")


def escape(text):
    """Text for an SVG: markup quoted, characters that XML does not know replaced by ?."""
    return saxutils.escape(re.sub("[^\t\n\r -\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]", "?",
                                  text))


def save_plot(path, title, panels):
    """Draws curves over epochs, one panel beside the other, as an SVG that a browser opens.

    title: list of header lines. panels: list of (name, {curve: [(epoch, value), ...]}); values
    that are not finite are left out. Each panel has axes with ticks and a legend with each last
    value.
    """
    width, height, head = 620, 380, 24 + 20 * len(title)
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" width="{width * len(panels)}" '
             f'height="{height + head}" font-family="Helvetica, Arial, sans-serif" '
             'font-size="13">',
             '<rect width="100%" height="100%" fill="white"/>']
    for i, line in enumerate(title):
        weight = "bold" if i == 0 else "normal"
        parts.append(f'<text x="20" y="{26 + 20 * i}" font-weight="{weight}">'
                     f'{escape(line)}</text>')
    for i, (name, curves) in enumerate(panels):
        parts.append(f'<g transform="translate({width * i} {head})">')
        parts += panel(name, curves, width, height)
        parts.append("</g>")
    parts.append("</svg>")
    with written_whole(path, "w") as file:
        file.write("\n".join(parts) + "\n")


def panel(name, curves, width, height):
    """The SVG elements of one panel of save_plot."""
    left, right, top, bottom = 62, width - 170, 24, height - 46
    curves = {label: [(x, y) for x, y in points if np.isfinite(y)]
              for label, points in curves.items()}
    points = [point for curve in curves.values() for point in curve] or [(0, 0)]
    x_ticks = ticks(min(x for x, _ in points), max(x for x, _ in points), whole=True)
    y_ticks = ticks(min(y for _, y in points), max(y for _, y in points))

    def at_x(x):
        return left + (x - x_ticks[0]) / (x_ticks[-1] - x_ticks[0]) * (right - left)

    def at_y(y):
        return bottom - (y - y_ticks[0]) / (y_ticks[-1] - y_ticks[0]) * (bottom - top)

    parts = [f'<text x="{left}" y="{top - 10}" font-weight="bold">{escape(name)}</text>']
    for x in x_ticks:
        parts.append(f'<line x1="{at_x(x):.1f}" y1="{top}" x2="{at_x(x):.1f}" y2="{bottom}" '
                     'stroke="#e5e5e5"/>')
        parts.append(f'<text x="{at_x(x):.1f}" y="{bottom + 18}" text-anchor="middle">'
                     f'{x:g}</text>')
    for y in y_ticks:
        parts.append(f'<line x1="{left}" y1="{at_y(y):.1f}" x2="{right}" y2="{at_y(y):.1f}" '
                     'stroke="#e5e5e5"/>')
        parts.append(f'<text x="{left - 8}" y="{at_y(y) + 4:.1f}" text-anchor="end">{y:g}</text>')
    parts.append(f'<path d="M{left} {top} V{bottom} H{right}" stroke="black" fill="none"/>')
    parts.append(f'<text x="{(left + right) / 2}" y="{bottom + 38}" text-anchor="middle">'
                 'epoch</text>')
    for i, (label, curve) in enumerate(curves.items()):
        colour = COLOURS[i % len(COLOURS)]
        line = " ".join(f"{at_x(x):.1f},{at_y(y):.1f}" for x, y in curve)
        parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts += [f'<circle cx="{at_x(x):.1f}" cy="{at_y(y):.1f}" r="2.5" fill="{colour}"/>'
                  for x, y in curve]
        last = f" {curve[-1][1]:.4g}" if curve else ""
        y = top + 8 + 20 * i
        parts.append(f'<line x1="{right + 12}" y1="{y - 4}" x2="{right + 32}" y2="{y - 4}" '
                     f'stroke="{colour}" stroke-width="3"/>')
        parts.append(f'<text x="{right + 38}" y="{y}">{escape(label + last)}</text>')
    return parts


def save_scatter(path, title, points, names, size=760):
    """Draws points [N, 2], coloured by their names, as an SVG that a browser opens.

    names: a string for each point. Up to 24 names stand in a legend; a browser shows the name of
    the point under the mouse. The axes have one scale and no numbers.
    """
    points = np.asarray(points, dtype=float)
    low, high = points.min(0), points.max(0)
    scale = (size - 40) / max((high - low).max(), 1e-12)
    places = size / 2 + (points - (low + high) / 2) * scale * (1, -1)            # y upwards
    groups = {}
    for name, (x, y) in zip(names, places):
        groups.setdefault(name, []).append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.2"/>')
    with_legend = len(groups) <= 24
    head = 34
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" width="{size + 220 * with_legend}" '
             f'height="{size + head}" font-family="Helvetica, Arial, sans-serif" font-size="13">',
             '<rect width="100%" height="100%" fill="white"/>',
             f'<text x="20" y="22" font-weight="bold">{escape(title)}</text>',
             f'<g transform="translate(0 {head})" fill-opacity="0.75">',
             f'<rect x="8" y="0" width="{size - 16}" height="{size - 8}" fill="none" '
             'stroke="#cccccc"/>']
    for i, (name, circles) in enumerate(sorted(groups.items())):
        # Steps of the golden angle keep neighbouring names apart in hue.
        colour = (COLOURS[i] if len(groups) <= len(COLOURS) else
                  f"hsl({i * 137.508 % 360:.0f}, {85 - i % 3 * 20}%, {35 + i % 4 * 9}%)")
        parts += [f'<g fill="{colour}"><title>{escape(name)}</title>', *circles, "</g>"]
        if with_legend:
            parts += [f'<circle cx="{size + 16}" cy="{24 + 22 * i}" r="5" fill="{colour}"/>',
                      f'<text x="{size + 28}" y="{28 + 22 * i}">{escape(name)}</text>']
    parts += ["</g>", "</svg>"]
    with written_whole(path, "w") as file:
        file.write("\n".join(parts) + "\n")


def ticks(low, high, whole=False, count=6):
    """Round numbers that enclose [low, high], about `count` of them, evenly spaced."""
    span = max(high - low, 1 if whole else 1e-6 * max(1, abs(low), abs(high)))
    step = 10 ** np.floor(np.log10(span / count))
    step *= next(factor for factor in (1, 2, 5, 10) if span / (step * factor) <= count)
    step = max(1, step) if whole else step
    first, last = np.floor(low / step + 1e-9), np.ceil(high / step - 1e-9)
    return [round(float(i * step), 12) for i in np.arange(first, max(last, first + 1) + 1)]


def save_image_grid(path, rows, size=112):
    """Writes rows of (PIL image, role) as a PNG; role "query", "hit" or "miss" sets the frame.

    Queries stand on the left, framed red; hits are framed green; misses grey, with a cross.
    """
    frame, gap, margin, legend = 5, 6, 18, 24
    step = size + 2 * frame + gap
    columns = max(len(row) for row in rows)
    grid = Image.new("RGB", (columns * step + margin + gap, len(rows) * step + gap + legend),
                     "white")
    draw = ImageDraw.Draw(grid)
    draw.text((gap, 4),
              "query (red)   neighbours: same class (green), other class (grey, crossed)",
              fill="black", font=ImageFont.load_default(13))
    for i, row in enumerate(rows):
        for j, (image, role) in enumerate(row):
            x = gap + j * step + margin * (j > 0)
            y = gap + i * step + legend
            colour = {"query": (214, 39, 40), "hit": (44, 160, 44), "miss": (120, 120, 120)}[role]
            draw.rectangle((x, y, x + size + 2 * frame - 1, y + size + 2 * frame - 1), fill=colour)
            image = image.copy()
            image.thumbnail((size, size)) if max(image.size) > size else None
            image = image.resize([round(side * size / max(image.size)) for side in image.size])
            corner = (x + frame + (size - image.width) // 2,
                      y + frame + (size - image.height) // 2)
            grid.paste(image, corner)
            if role == "miss":
                end = (x + frame + 16, y + frame + 16)
                draw.rectangle((x, y, *end), fill=colour)
                draw.line((x + 4, y + 4, end[0] - 4, end[1] - 4), fill="white", width=3)
                draw.line((x + 4, end[1] - 4, end[0] - 4, y + 4), fill="white", width=3)
    with written_whole(path) as file:
        grid.save(file, "PNG")


def last_line(error):
    """An error's message in one line; a loading process wraps ours in its own traceback."""
    text = str(error).strip()
    if "Original Traceback" in text:
        text = re.sub(r"^[\w.]*(Error|Exception): ", "", text.splitlines()[-1])
    return text or type(error).__name__
