"""Time and memory of a step of each loss beside pytorch-metric-learning, and a limit for it.

python benchmarks/losses.py times forward, with sampling, and backward on unit-norm embeddings, 4
of each class or more, and prints medians as one table. The limit is a bare matrix of the Euclidean
distances of all pairs (of embeddings and weights, for a loss with class weights), its backward, a
cumulative sum along its rows, which only sampling losses need. "loops" is the same problem in
plain Python, an anchor at a time. Both libraries get the same margins and temperatures; but that
library's miners return all semi-hard triplets, and 4 an anchor by distance, where ours draw one;
its AngularLoss lacks the n-pair term, its SNR loss is of pairs. Times are taken in turns in one
process (OMP_NUM_THREADS=1 on a busy machine), each peak of memory in a process of its own.
"""

import argparse
import contextlib
import importlib.util
import inspect
import itertools
import json
import os
import resource
import statistics
import subprocess
import sys
import time

import numpy as np
import torch
from torch.nn.functional import normalize, relu

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))

import losses

# These get all sizes and dimensions. Of ours: the options that are not the default.
MAIN = ("marginloss", "triplet", "npair", "proxynca", "multisimilarity", "proxyanchor")
OURS = {"triplet": {"sampling": "facenet"}, "contrastive": {"contrastive_linear": True}}
PAIR, MOST_SECONDS = ("ours", "theirs"), 10
# Of pytorch-metric-learning: the names that differ, and the options that are not its default.
NAMES = {"triplet": "TripletMarginLoss", "npair": "NPairsLoss", "proxynca++": "ProxyNCALoss",
         "lifted": "GeneralizedLiftedStructureLoss", "normsoftmax": "NormalizedSoftmaxLoss",
         "snr": "SignalToNoiseRatioContrastiveLoss"}
OPTIONS = {"proxynca": {"softmax_scale": 9}, "proxynca++": {"softmax_scale": 9},
           "multisimilarity": {"base": 1.0}, "ntxent": {"temperature": 0.1},
           "angular": {"alpha": 45}, "sphereface": {"scale": 64}}


def has_proxies(name):
    """Whether the loss compares embeddings with weights of classes."""
    return "embed_dim" in inspect.signature(losses.LOSSES[name]).parameters


def ours(name, classes, dimensions):
    """A step, embeddings [B, D] and labels [B] -> loss, and its weights."""
    loss_class = losses.LOSSES[name]
    given = {"num_classes": classes, "embed_dim": dimensions} | OURS.get(name, {})
    loss = loss_class(**{key: value for key, value in given.items()
                         if key in inspect.signature(loss_class).parameters})
    return loss, list(loss.parameters())


def theirs(name, classes, dimensions):
    """The same of that library; AttributeError where it has no counterpart."""
    from pytorch_metric_learning import distances, losses as pml, miners, regularizers
    options, miner = OPTIONS.get(name, {}), None
    if name == "marginloss":
        options = {"num_classes": classes, "learn_beta": True}
        miner = miners.DistanceWeightedMiner(nonzero_loss_cutoff=2.1)  # none, as in ours
    elif name == "triplet":
        options = {"margin": 0.2, "distance": distances.LpDistance(power=2)}
        miner = miners.TripletMarginMiner(type_of_triplets="semihard", **options)
    elif name == "multisimilarity":
        miner = miners.MultiSimilarityMiner()
    elif name == "npair":
        options = {"embedding_regularizer": regularizers.LpRegularizer(power=2),
                   "embedding_reg_weight": 0.04,
                   "distance": distances.DotProductSimilarity(normalize_embeddings=False)}
    sizes = (classes, dimensions) if has_proxies(name) else ()
    class_name = NAMES.get(name, losses.LOSSES[name].__name__)
    loss = getattr(pml, class_name)(*sizes, **options)
    step = loss if miner is None else lambda rows, labels: loss(rows, labels, miner(rows, labels))
    return step, list(loss.parameters())


def limit(name, classes, dimensions):
    """Nothing but the distances, as a step, and the proxies."""
    proxies = [torch.randn(weight.numel() // dimensions, dimensions).requires_grad_()
               for weight in ours(name, classes, dimensions)[1] if has_proxies(name)][:1]

    def step(embeddings, labels):
        columns = proxies[0] if proxies else embeddings
        sq_norms = embeddings.square().sum(1, keepdim=True) + columns.square().sum(1)
        sq_distances = torch.addmm(sq_norms, embeddings, columns.t(), alpha=-2)
        distances = sq_distances.clamp_min(1e-16).sqrt()
        return distances.mean() + 0 * distances.detach().cumsum(1)[0, 0]
    return step, proxies


def loops(name, classes, dimensions):
    """Reference style: a loop over anchors, rows gathered one by one; KeyError for most losses."""
    semihard = {"marginloss": False, "triplet": True}[name]
    beta = torch.nn.Parameter(torch.full((classes,), 1.2))

    def step(embeddings, labels):
        names, terms = labels.numpy(), []
        for a, d in enumerate(torch.cdist(embeddings, embeddings).detach().double().numpy()):
            same = names == names[a]
            p = np.random.choice(np.setdiff1d(np.flatnonzero(same), a))
            if semihard:
                weights = 1.0 * ((d ** 2 > d[p] ** 2) & (d ** 2 < d[p] ** 2 + 0.2) & ~same)
                weights += ~same * (not weights.any())
            else:
                d = np.where(same, 1, d.clip(0.5))
                logs = (2 - dimensions) * np.log(d) - (dimensions - 3) / 2 * np.log1p(-d ** 2 / 4)
                weights = np.exp(logs - logs[~same].max()) * ~same
            n = np.random.choice(len(d), p=weights / weights.sum())
            sq_ap, sq_an = ((embeddings[a] - embeddings[i]).square().sum() for i in (p, n))
            terms += ([relu(sq_ap - sq_an + 0.2)] if semihard else
                      [relu(sq_ap.sqrt() - beta[names[a]] + 0.2),
                       relu(beta[names[a]] - sq_an.sqrt() + 0.2)])
        terms = torch.stack(terms)
        return terms.sum() / (len(terms) if semihard else (terms > 0).sum())
    return step, [beta]


SIDES = {side.__name__: side for side in (ours, theirs, limit, loops)}


def prepare(side, name, size, dimensions, classes):
    """A function that takes one step, forward and backward, and returns the loss."""
    generator = torch.Generator().manual_seed(1)
    labels = torch.arange(size) // 4 % classes
    noise = torch.randn(size, dimensions, generator=generator) * 2 / dimensions ** 0.5
    centres = normalize(torch.randn(classes, dimensions, generator=generator), dim=1)
    embeddings = normalize(centres[labels] + noise, dim=1).requires_grad_()
    torch.manual_seed(0)
    step, weights = SIDES[side](name, classes, dimensions)

    def run():
        value = step(embeddings, labels)
        torch.autograd.grad(value, (embeddings, *weights), allow_unused=True)
        return value.item()
    return run


def peak(side, *cell):
    """Peak memory in MiB of two steps beyond the data and the weights."""
    prepare(side, cell[0], 16, 8, 4)()  # loads what the first step loads
    run = prepare(side, *cell)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with open("/proc/self/statm") as file:  # what was freed again is filled, to be counted anew
        resident = int(file.read().split()[1]) * resource.getpagesize()
    filling = b"1" * max(0, 1024 * before - resident)
    run(), run(), len(filling)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


def times(repeats, *cell):
    """{side: [median milliseconds of a step, the loss]}, the sides that there are in turns."""
    runs = {}
    for side in SIDES:
        with contextlib.suppress(ImportError, KeyError, AttributeError):
            runs[side] = prepare(side, *cell)
    seconds, values = {side: [] for side in runs}, {side: run() for side, run in runs.items()}
    for _ in range(repeats):
        for side, run in runs.items():
            if sum(seconds[side]) < MOST_SECONDS:  # the slowest are not repeated for ever
                start = time.perf_counter()
                values[side] = run()
                seconds[side].append(time.perf_counter() - start)
    return {side: [1000 * statistics.median(seconds[side]), values[side]] for side in runs}


def in_process(*job):
    """A measurement in a new process; None where it fails, as for want of memory."""
    done = subprocess.run([sys.executable, "-W", "ignore", __file__, "--job", json.dumps(job)],
                          stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else None


def row(repeats, *cell):
    """Measures one cell and prints its line."""
    found = in_process("times", repeats, *cell) or {}
    ms, values = ({side: found[side][i] for side in found} for i in (0, 1))
    ratios = [ms[over] / ms[under] if over in ms and under in ms else None for over, under in
              (("theirs", "ours"), ("loops", "ours"), ("ours", "limit"))]
    memory = [in_process("peak", side, *cell) if side in found else None for side in PAIR]
    numbers = [*map(ms.get, SIDES), *ratios, *memory, *map(values.get, (*PAIR, "loops"))]
    print("| " + " | ".join(map(str, cell)) + " | " + " | ".join(
        "none" if number is None else f"{number:.3g}" for number in numbers) + " |", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--sizes", nargs="+", type=int, default=(112, 512, 2048))
    parser.add_argument("--dimensions", nargs="+", type=int, default=(128, 512))
    parser.add_argument("--repeats", type=int, default=15, help="timed steps of each side")
    parser.add_argument("--losses", nargs="+", choices=losses.LOSSES, default=list(losses.LOSSES))
    parser.add_argument("--job", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.job:
        print(json.dumps({"times": times, "peak": peak}[args.job[0]](*args.job[1:])))
        return
    installed = importlib.util.find_spec("pytorch_metric_learning")
    their = "theirs" if installed else "theirs (not installed)"
    columns = ["loss", "B", "D", "classes", "ours, ms", f"{their}, ms", "limit, ms", "loops, ms",
               "theirs / ours", "loops / ours", "ours / limit", "ours, MiB", f"{their}, MiB",
               "value of ours", "of theirs", "of loops"]
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads\n\n| "
          + " | ".join(columns) + " |\n" + "|---" * len(columns) + "|")
    for name in [name for name in dict.fromkeys((*MAIN, *losses.LOSSES)) if name in args.losses]:
        sizes, dimensions, classes = args.sizes, args.dimensions, (100, 11318)
        if name not in MAIN:
            sizes, dimensions, classes = [s for s in sizes if s <= 512], (128,), (100,)
        classes = classes if has_proxies(name) else (None,)  # as many as there are images for
        for size, dimension, number in itertools.product(sizes, dimensions, classes):
            row(args.repeats, name, size, dimension, number or size // 4)


if __name__ == "__main__":
    main()
