"""Whether all that can run on a GPU does, with the right numbers, and how fast.

python benchmarks/gpu.py needs one GPU and no data, takes some ten minutes and prints a table, a
row for each case of CHECKS: pass or FAIL, what was measured, and the seconds that it took. An
error's traceback stands below its row; the rest goes on, and the exit status is 1. --device cpu
tries the same code at small sizes; --only some of the checks.
"""

import argparse
import contextlib
import copy
import functools
import io
import os
import subprocess
import sys
import tempfile
import time
import traceback
import warnings

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(HERE))
sys.path.append(HERE)

import numpy as np
import torch
from PIL import Image

import auxiliaries
import evaluate
import evaluation
import losses
import main
import netlib
import throughput
import trainers


class Bench:
    """device; small: whether sizes are a test's; folder: an empty one, for images and runs."""

    def __init__(self, device, folder):
        self.device, self.small, self.folder = device, device.type == "cpu", folder
        self.runs = 0

    def options(self, *flags):
        """Arguments of main.py: a short run of a network on a few images, but for the flags."""
        self.runs += 1
        images = make_images(f"{self.folder}/few", 8, 8, (40, 30))
        return ["--dataset", "folder", "--source_path", images, "--arch", "convnet",
                "--not_pretrained", "--image_size", "32", "--embed_dim", "16", "--bs", "16",
                "--lr", "1e-3", "--kernels", "0", "--k_vals", "1", "--n_epochs", "2",
                "--gpu", str(-1 if self.small else 0), "--amp", "none", "--no-channels_last",
                "--save_path", self.folder, "--savename", f"run{self.runs}", *flags]

    def build(self, *flags):
        """The trainer of such a run, whose first weights are the same each time, in train mode."""
        trainer = throughput.build(main.parse_options(self.options(*flags)))
        trainer.set_to_train()
        return trainer


@functools.cache
def make_images(folder, classes, each, size):
    """JPEGs of a width and height, smooth noise, in class folders -> the folder."""
    generator = np.random.default_rng(0)
    for label in range(classes):
        os.makedirs(f"{folder}/class_{label:03d}")
        for i in range(each):
            coarse = generator.integers(0, 256, (size[1] // 8, size[0] // 8, 3), dtype=np.uint8)
            image = Image.fromarray(coarse).resize(size, Image.BICUBIC)
            image.save(f"{folder}/class_{label:03d}/{i}.jpg", quality=90)
    return folder


@contextlib.contextmanager
def waits(device):
    """Within it each wait of the host for a GPU is noted -> [] and at its end ["file.py:12"]."""
    found, on_gpu = [], device.type == "cuda"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn") if on_gpu else None
        try:
            yield found
        finally:
            torch.cuda.set_sync_debug_mode("default") if on_gpu else None
    found += [f"{os.path.basename(one.filename)}:{one.lineno}" for one in caught
              if "synchronizing CUDA" in str(one.message)]


def in_words(found):
    """What waits has found, as text."""
    return f"{len(found)} waits" + f" ({', '.join(dict.fromkeys(found))})" * bool(found)


def off(got, wanted):
    """The length of the difference of two tensors, of one shape, over that of the second."""
    got, wanted = got.detach().double().cpu(), wanted.detach().double().cpu()
    return float((got - wanted).norm() / wanted.norm().clamp_min(1e-12))


def require(holds, what):
    """Raises AssertionError, with a text, unless it holds."""
    if not holds:
        raise AssertionError(what)


# ---- checks: each takes a Bench and its case, and returns what it measured, as text


def loss_step(bench, name, sampling):
    """A step of a loss beside the CPU's in float64, on the same tuples; the waits of a step."""
    number, classes, size = (16, 4, 8) if bench.small else (112, 28, 128)
    opt = main.build_parser().parse_args(["--loss_lr", "1", "--proxy_lr", "1"])
    torch.manual_seed(0)
    rows = torch.nn.functional.normalize(torch.randn(number, size), dim=1)
    there, labels = rows.to(bench.device), torch.arange(number, device=bench.device) % classes
    exact, _ = losses.loss_select(opt, classes, loss=name, sampling=sampling, embed_dim=size)
    loss = copy.deepcopy(exact).to(bench.device).eval()  # eval: no counter of steps moves

    def step(loss, rows, labels, tuples=None):
        rows = rows.clone().requires_grad_()
        value = loss(rows, labels, tuples)
        return value, *torch.autograd.grad(value, [rows, *loss.parameters()])

    step(loss, there, labels)  # what is set up once does not count
    with waits(bench.device) as found:
        step(loss, there, labels)
    tuples = None if loss.sampler is None else loss.sampler.give(there, labels)
    if name == "quadruplet":
        tuples = loss.complete(tuples, labels)
    wanted = step(exact.double().eval(), rows.double(), labels.cpu(),
                  None if tuples is None else tuples.cpu())
    value, *gradients = map(off, step(loss, there, labels, tuples), wanted)
    require(wanted[0] != 0, "the loss is 0: no tuple counts")
    require(value < 1e-4 and max(gradients) < 2e-3, f"{value} and {gradients} off")
    counts = name in ("smoothap", "recallatk") or sampling == "all" or (
        sampling == "multisimilarity" and loss.samplings == losses.TRIPLET_SAMPLINGS)
    require(counts or not found, in_words(found))
    return f"value {value:.0e}, gradients {max(gradients):.0e} off, {in_words(found)}"


def trainer_steps(bench, name):
    """Two steps of a trainer; the waits of the second."""
    trainer = bench.build("--trainer", name, "--loss", "triplet")
    before = [weight.detach().clone() for weight in trainer.weights]
    trainer.training_step()
    with waits(bench.device) as found:
        trainer.training_step()
    trainer.check_weights()
    total = trainer.losses["total_loss"]
    require(total.device == bench.device and not trainer.skipped_steps
            and max(map(off, trainer.weights, before)) > 0, "nothing was learned")
    return f"loss {float(total):.3f}, {in_words(found)}"


def half_steps(bench, amp):
    """Embeddings in bf16 or fp16 beside float32, and ten steps."""
    if bench.small and amp == "fp16":
        return "for GPUs alone"
    exact, trainer = bench.build(), bench.build("--amp", amp)
    data, _ = exact.next_batch()
    with torch.no_grad():
        error = off(trainer.compute_embeddings(data), exact.compute_embeddings(data))
    require(0 < error < 0.05, f"embeddings {error} off")
    for _ in range(10):
        trainer.training_step()
    trainer.check_weights()
    return f"embeddings {error:.0e} off, loss {float(trainer.losses['total_loss']):.3f}"


def overflow(bench):
    """fp16 whose gradients overflow: no weight moves before the scale has fallen enough."""
    if bench.small:
        return "for GPUs alone"
    trainer = bench.build("--amp", "fp16")
    trainer.grad_scaler = torch.amp.GradScaler("cuda", init_scale=2.0 ** 40)
    before = [weight.detach().clone() for weight in trainer.weights]
    trainer.training_step()
    require(all(map(torch.equal, trainer.weights, before)), "a weight has moved")
    for _ in range(40):
        trainer.training_step()
    scale = trainer.grad_scaler.get_scale()
    require(scale < 2 ** 40 and max(map(off, trainer.weights, before)) > 0, "no weight has moved")
    return f"the scale fell from 2^40 to 2^{np.log2(scale):.0f}"


def beside_plain(bench, *changes):
    """Embeddings and speed of the network with other flags beside the plain one's."""
    flags = () if bench.small else ("--arch", "resnet50", "--image_size", "224", "--bs", "32")
    plain, other = bench.build(*flags), bench.build(*flags, *changes)
    batch, steps, start = plain.next_batch(), 2 if bench.small else 20, time.perf_counter()
    for trainer in (plain, other):
        trainer.set_to_eval()
    with torch.no_grad():
        error = off(other.compute_embeddings(batch[0]), plain.compute_embeddings(batch[0]))
    first = time.perf_counter() - start
    require(error < 0.05, f"embeddings {error} off")  # a GPU convolves in TF32
    rate, plain_rate = (steps * len(batch[1]) / throughput.bare(trainer, batch, steps)
                        for trainer in (other, plain))
    return (f"embeddings {error:.0e} off, {rate:.0f} images/s, {rate / plain_rate:.2f} of the "
            f"plain network's, the first pass {first:.1f} s")


def killed_and_resumed(bench):
    """A run that is killed at its third checkpoint and resumed, beside an unbroken one."""
    flags = ["--deterministic", "--checkpoint_every", "2", "--kernels", "1"] + [
        "--dataset", "glyphs", "--bs", "112", "--n_epochs", "4"] * (not bench.small)
    results = []
    for kill in (False, True):
        command = [sys.executable, main.__file__, *bench.options(*flags)]
        folder = f"{bench.folder}/{'folder' if bench.small else 'glyphs'}/run{bench.runs}"
        if kill:
            run, times = subprocess.Popen(command, stdout=subprocess.DEVNULL), set()
            while len(times) < 3:
                require(run.poll() is None, "the run ended before it could be killed")
                with contextlib.suppress(FileNotFoundError):
                    times.add(os.stat(f"{folder}/last.pth.tar").st_mtime_ns)
                time.sleep(0.002)
            run.kill()
            run.wait()
        subprocess.run([*command, *["--resume"] * kill], check=True, stdout=subprocess.DEVNULL)
        state = auxiliaries.load_checkpoint(f"{folder}/last.pth.tar", ["models"])["models"]
        with open(f"{folder}/log_val_Base.csv") as file:
            results.append((file.read(), [*state["trunk"].values(), *state["embedder"].values()]))
    (rows, weights), (rows_again, weights_again) = results
    require(rows == rows_again, f"log_val_Base.csv differs:\n{rows}\n{rows_again}")
    require(all(map(torch.equal, weights, weights_again)), "weights differ")
    return "the same bits"


def cache_rate(bench, cache):
    """A --cache, and files with 8 processes, beside the bare network."""
    classes, each, size = (8, 8, (50, 38)) if bench.small else (40, 100, (500, 375))
    images = make_images(f"{bench.folder}/many", classes, each, size)
    flags = () if bench.small else ("--arch", "resnet50", "--image_size", "224", "--bs", "112",
                                    "--amp", "bf16", "--channels_last")
    start, steps = time.perf_counter(), 2 if bench.small else 30
    trainer = bench.build("--source_path", images, "--cache", cache, *flags, "--kernels",
                          "0" if cache == "device" else "1" if bench.small else "8")
    ready = time.perf_counter() - start
    batch = trainer.next_batch()
    throughput.renew_loader(trainer)
    bare, whole, loader = (steps * len(batch[1]) / seconds for seconds in (
        throughput.bare(trainer, batch, steps), throughput.whole(trainer, steps),
        throughput.loader_alone(trainer, steps)))
    return (f"{whole:.0f} images/s, {whole / bare:.2f} of the bare network's {bare:.0f}; the "
            f"loader alone {loader:.0f}; ready in {ready:.1f} s")


def same_metrics(bench):
    """Every metric beside the CPU's."""
    rows, labels, *_ = evaluation.embeddings(300 if bench.small else 5924, 0, 100, 0.16)
    wanted, got = (evaluate.evaluate_embeddings(rows.to(device), labels.to(device),
                                                metrics=evaluate.METRICS)
                   for device in (torch.device("cpu"), bench.device))
    errors = {name: abs(got[name] / value - 1) for name, value in wanted.items()}
    for name, error in errors.items():  # rounding may give a row or two to another cluster
        most = 0.02 if name in evaluate.CLUSTER_METRICS else 1e-5
        require(error < most, f"{name} {error} off")
    return f"at most {max(errors.values()):.0e} off, {max(errors, key=errors.get)}"


def whole_evaluation(bench, dimensions):
    """Seconds and memory of the evaluation of as many images as Stanford Online Products tests."""
    number = 600 if bench.small else 60502
    rows, labels, *_ = evaluation.embeddings(number, 0, number * 11316 // 60502, 0.14, dimensions)
    rows, labels, figures = rows.to(bench.device), labels.to(bench.device), []
    if not bench.small:
        torch.cuda.reset_peak_memory_stats(bench.device)
    for metrics in (("recall",), ("recall",), evaluate.RANK_METRICS, evaluate.DEFAULT_METRICS):
        start = throughput.clock(bench.device)
        found = evaluate.evaluate_embeddings(
            rows, labels, k_vals=(1, 10, 100), metrics=metrics,
            memory=evaluate.memory_bytes(None, bench.device))
        figures.append(f"{', '.join(metrics)}: {throughput.clock(bench.device) - start:.2f} s")
    if not bench.small:
        most = torch.cuda.max_memory_allocated(bench.device) / 2 ** 20
        figures.append(f"{most:,.0f} MiB at most")
    return f"{number:,} images; {'; '.join(figures[1:])}; R@1 {found['recall@1']:.3f}"


def one_process(bench):
    """shared_step under torchrun."""
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone",
                           "--nproc_per_node", "1", __file__, "--device", bench.device.type,
                           "--shared"], capture_output=True, text=True)
    require(done.returncode == 0, done.stderr)
    return done.stdout.splitlines()[-1]


def shared_step(device):
    """In torchrun's process: gradients in a group, by NCCL on a GPU, beside those without one."""
    auxiliaries.wanted_processes = lambda: 2  # of one process no group would be made
    images, gradients = torch.rand(8, 3, 32, 32, device=device), []
    with auxiliaries.join_processes():
        for shared in (False, True):
            torch.manual_seed(0)
            trunk = netlib.Trunk(netlib.ConvNet(), 256).to(device)
            if shared:
                trunk = torch.nn.parallel.DistributedDataParallel(
                    netlib.share_batchnorm(trunk, device))
            trunk(images).square().mean().backward()
            gradients.append(torch.cat([weight.grad.flatten() for weight in trunk.parameters()]))
        backend, error = torch.distributed.get_backend_config(), off(*gradients)
        require(error < 0.01, f"gradients {error} off")  # a GPU convolves in TF32
    print(f"{backend}: gradients {error:.0e} off")


CHECKS = {
    "losses": (loss_step, [(name, sampling) for name, one in losses.LOSSES.items()
                           for sampling in one.samplings or ("none",)]),
    "trainers": (trainer_steps, [(name,) for name in trainers.TRAINERS]),
    "amp": (half_steps, [("bf16",), ("fp16",)]),
    "overflow": (overflow, [()]),
    "network": (beside_plain, [("--channels_last",), ("--channels_last", "--amp", "bf16"),
                               ("--compile",)]),
    "resume": (killed_and_resumed, [()]),
    "cache": (cache_rate, [("none",), ("ram",), ("device",)]),
    "metrics": (same_metrics, [()]),
    "evaluation": (whole_evaluation, [(128,), (512,)]),
    "processes": (one_process, [()]),
}


def row(bench, name, check, case):
    """Runs a case of a check and prints its row -> whether it passed."""
    said, trace, start = io.StringIO(), "", time.perf_counter()
    try:
        with contextlib.redirect_stdout(said):
            figure = check(bench, *case)
    except Exception as error:
        figure, trace = auxiliaries.one_line(f"{type(error).__name__}: {error}"), (
            said.getvalue() + traceback.format_exc())
    print(f"| {' '.join((name, *map(str, case)))} | {'FAIL' if trace else 'pass'} | {figure} | "
          f"{time.perf_counter() - start:.1f} |\n{trace}", end="", flush=True)
    return not trace


def benchmark(argv=None):
    """Prints the table -> how many rows failed."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--only", nargs="+", choices=CHECKS, default=list(CHECKS))
    parser.add_argument("--shared", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    device = auxiliaries.select_device(0 if args.device == "cuda" else -1)
    if device.type != args.device:
        parser.error("--device cpu tries the same code at small sizes")
    if args.shared:
        return shared_step(device)
    print(f"{auxiliaries.versions(device)}\n\n| what | | figure | s |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(device, folder)
        failed = sum(not row(bench, name, CHECKS[name][0], case)
                     for name in args.only for case in CHECKS[name][1])
    print(f"\n{failed} failed")
    return failed


if __name__ == "__main__":
    sys.exit(bool(benchmark()))
