"""Every loss on the features of a fixed trunk: the comparison without a GPU, in minutes.

python benchmarks/cpu_study.py --features FILE.npz reads features (embeddings [N, D], labels [N];
the first half of the sorted classes trains); without --features they are computed once, for the
--dataset, --arch and --weights of main.py. On them each loss trains netlib.Embedder, one linear
layer, under trainers.MetricLossOnly: same steps, and of a seed the same batches and first layer.
Of several --lr each row takes the one that, with the first seed, has the best MAP@R on the last
third of the training classes after training on the others; R@1 of so few classes hardly moves.
Test classes choose nothing but the column that says so. What the table can tell, and what not:
README.md, Results.
"""

import argparse
import concurrent.futures
import functools
import math
import multiprocessing
import os
import statistics
import sys
import time

import numpy as np
import torch
from scipy.special import stdtrit

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))

import auxiliaries
import datasets
import evaluate
import images
import losses
import main as program
import netlib
import results
import samplers
import trainers

COMPARED = [*losses.LOSSES, *(f"{loss}/{sampling}" for loss in ("marginloss", "triplet")
                              for sampling in ("distance", "semihard", "softhard", "random"))]
UNTRAINED = (("raw features", "untrained"), ("random layer", "untrained"))
METRICS = {"recall": "recall@1", "map@r": "map@r", "nmi": "nmi"}  # and their keys
DEFAULTS = ["--n_epochs", "10", "--eval_every", "2", "--embed_dim", "128", "--scheduler", "none",
            "--loss_lr", "0.01", "--proxy_lr", "0.01", "--beta_lr", "0.01", "--gpu", "-1"]
TAKEN = {"fc_lr_mul", "decay", "n_epochs", "scheduler", "gamma", "tau", "eval_every", "embed_dim",
         "nmi_average"}  # of main.py, beside all flags of batches, samplings and losses


class Rows(torch.utils.data.Dataset):
    """Features, float32 [N, F], and labels, int64 [N], that come as batches, [B, F] and [B]."""

    def __init__(self, rows, labels):
        self.rows, self.labels = rows, labels

    def __len__(self):
        return len(self.labels)

    def __getitems__(self, indices):
        return torch.from_numpy(self.rows[indices]), torch.from_numpy(self.labels[indices])


def split(rows, labels, num_train):
    """Arrays [N, F] and [N] -> (train, test) Rows: the first num_train sorted classes train."""
    classes, labels = np.unique(labels, return_inverse=True)
    if not 2 <= num_train <= len(classes) - 2:
        raise ValueError(f"{len(classes)} classes, of which {num_train} would train: at least 2 "
                         "must train and 2 others test (with several --lr on half of them)")
    train = labels < num_train
    return Rows(rows[train], labels[train]), Rows(rows[~train], labels[~train] - num_train)


def read_features(path):
    """An npz file with embeddings [N, D] and labels [N] -> (train, test) Rows.

    train_classes, a number that --save_features adds, says how many of the sorted classes train;
    half of them without it. ValueError for another file, or fewer than 4 classes.
    """
    rows, labels, settings = evaluate.read_embeddings(path)
    rows = rows.astype(np.float32)
    if len(rows) != len(labels) or not np.isfinite(rows).all():
        raise ValueError(f"--features {path}: {len(rows)} embeddings and {len(labels)} labels; "
                         "there must be as many, and no NaN or infinity")
    labels = np.unique(labels, return_inverse=True)[1]
    return split(rows, labels, settings.get("train_classes", len(set(labels)) // 2))


def compute_features(opt, path):
    """A trunk's features of a dataset, not augmented -> (train, test) Rows; the path keeps them.

    Raises ValueError or FileNotFoundError for data, networks and weights that cannot be used.
    """
    device = auxiliaries.select_device(opt.gpu)
    auxiliaries.seed_everything(opt.seed)  # for random weights
    _, sets, found = datasets.dataset_select(opt)
    if len(sets) > 1 or sets[0].gallery is not None:
        raise ValueError(f"--dataset {opt.dataset} has a gallery or several test sets; the study "
                         "takes one whose test images are compared with each other")
    test = sets[0].queries
    train = images.ImageDataset(found.splits["train"], test.transform)
    trunk = netlib.network_select(opt, unit_norm=True)[0].eval().to(device)
    rows, labels = zip(*(evaluate.embed(trunk, part, device, opt.eval_bs, opt.kernels)
                         for part in (train, test)))
    rows = torch.cat(rows).cpu()
    labels = torch.cat([labels[0], labels[1] + labels[0].max() + 1]).cpu()
    if path:
        evaluate.save_embeddings(path, rows, labels, train_classes=len(set(train.labels)))
    return split(rows.numpy(), labels.numpy(), len(set(train.labels)))


def options(rest, row, lr, seed):
    """main.py's options for a training of row, (loss, sampling), behind this file's defaults."""
    return program.parse_options([*DEFAULTS, *rest, "--loss", row[0], "--sampling", row[1],
                                  "--lr", str(lr), "--seed", str(seed)])


def refuse_unused(rest, with_images):
    """ValueError for a flag of main.py, in the list rest, that would change nothing here."""
    parser = argparse.ArgumentParser()
    for module in (samplers, losses, *((datasets, netlib) if with_images else ())):
        module.add_arguments(parser)
    of_images = ("gpu", "eval_bs", "source_path", "kernels")
    taken = {*vars(parser.parse_args([])), *TAKEN, *(of_images * with_images)}
    default = vars(program.build_parser().parse_args([]))
    for name, value in vars(program.build_parser().parse_args(rest)).items():
        if value != default[name] and (name not in taken - {"loss", "sampling"}
                                       or value == "plateau"):
            raise ValueError(f"--{name} {value}: the study has no use for it"
                             + " beside --features" * (not with_images)
                             + "; --losses NAME/SAMPLING and --seeds say what is compared")


def measure(embeddings, labels, opt, metrics=tuple(METRICS)):
    """The metrics of embeddings [N, D] with labels, an array [N]."""
    return evaluate.evaluate_embeddings(embeddings, torch.from_numpy(labels), k_vals=(1,),
                                        seed=opt.seed, metrics=metrics,
                                        nmi_average=opt.nmi_average)


def train(opt, parts, every, metrics):
    """Trains an embedding layer on (train, test) Rows -> what was measured, a dict for each time.

    every: epochs from one measurement to the next. A loss that is not finite gives NaN.
    """
    (train_part, test_part), rows = parts, torch.from_numpy(parts[1].rows)
    auxiliaries.seed_everything(opt.seed)
    embedder = netlib.Embedder(rows.shape[1], opt.embed_dim, losses.LOSSES[opt.loss].unit_norm)
    loss, group = losses.loss_select(opt, int(train_part.labels.max()) + 1)
    groups = {"embedder": {"params": list(embedder.parameters()),
                           "lr": opt.lr * (opt.fc_lr_mul or 1)}, "metric_loss": group}
    optimizers = {f"{name}_optimizer": trainers.optimizer_select(opt, group)
                  for name, group in groups.items() if group}
    validation = trainers.Validation(
        lambda trainer: measure(trainer.compute_embeddings(rows), test_part.labels, opt, metrics),
        every=every)
    batches = samplers.batch_sampler_select(train_part.labels, opt)
    trainer = trainers.MetricLossOnly(
        models={"trunk": torch.nn.Identity(), "embedder": embedder}, optimizers=optimizers,
        batch_size=opt.bs, loss_funcs={"metric_loss": loss}, dataset=train_part,
        sampler=batches, collate_fn=tuple, data_device="cpu",
        lr_schedulers=trainers.schedulers_select(opt, optimizers, len(batches)),
        dataloader_num_workers=0, end_of_epoch_hook=validation)
    try:
        trainer.train(1, opt.n_epochs)
    except trainers.NonFiniteLoss as error:
        print(f"{opt.loss}, lr {opt.lr:g}: {error}", file=sys.stderr)
        return [{"epoch": opt.n_epochs} | dict.fromkeys(METRICS.values(), math.nan)]
    return validation.rows


def study(parts, args, rest, row):
    """Chooses the learning rate of a row, (loss, sampling), and trains with each seed.

    parts: (train, test) Rows. Returns each measurement, a list of dicts as --csv writes them.
    """
    torch.set_num_threads(1)
    found, rates = [], sorted(set(args.lr))

    def run(classes, parts, lr, seed, every, metrics):
        measured = train(options(rest, row, lr, seed), parts, every, metrics)
        found.extend({"loss": row[0], "sampling": row[1], "classes": classes, "lr": lr,
                      "seed": seed, **values} for values in measured)
        return measured[-1]["map@r"]

    opt = options(rest, row, rates[0], 1)
    if len(rates) > 1:
        inner = split(parts[0].rows, parts[0].labels, len(set(parts[0].labels)) * 2 // 3)
        scores = [run("held out", inner, lr, args.seeds[0], opt.n_epochs, ("map@r",))
                  for lr in rates]
        rates = [rates[int(np.argmax(np.nan_to_num(scores)))]]
    for seed in args.seeds:
        run("test", parts, rates[0], seed, opt.eval_every, tuple(METRICS))
    return found


def untrained(test_part, args, rest):
    """The test features as they are, and through a layer that did not learn, as study has it."""
    found, rows = [], torch.from_numpy(test_part.rows)
    for seed in args.seeds:
        opt = options(rest, ("triplet", "distance"), 0, seed)
        auxiliaries.seed_everything(seed)
        layer = netlib.Embedder(rows.shape[1], opt.embed_dim).requires_grad_(False)
        for row, embeddings in zip(UNTRAINED, (torch.nn.functional.normalize(rows, dim=1),
                                               layer(rows))):
            found.append({"loss": row[0], "sampling": row[1], "classes": "test", "lr": 0,
                          "seed": seed, "epoch": 0, **measure(embeddings, test_part.labels, opt)})
    return found


def studies(parts, args, rest, rows):
    """study of each row, in their order, in several processes -> an iterator."""
    job = functools.partial(study, parts, args, rest)
    if args.processes == 1:
        yield from map(job, rows)
        return
    with concurrent.futures.ProcessPoolExecutor(
            args.processes, multiprocessing.get_context("spawn")) as pool:
        try:
            yield from pool.map(job, rows)
        finally:
            pool.shutdown(cancel_futures=True)


def interval(differences):
    """Mean of a list [S] and the half-width of its 95 % Student t interval; NaN for one number."""
    mean, number = statistics.mean(differences), len(differences)
    if number < 2:
        return mean, math.nan
    quantile = float(stdtrit(number - 1, 0.975))  # Student's
    return mean, quantile * statistics.stdev(differences) / number ** 0.5


def summary(found, reference):
    """The table's lines, the best mean R@1 first; found: what study and untrained returned.

    reference: the (loss, sampling) that the others are compared with, seed by seed. Deviations
    are a sample's; intervals are of R@1 after the last epoch.
    """
    runs = {}  # row -> seed -> the measurements of its run
    for values in found:
        if values["classes"] == "test":
            by_seed = runs.setdefault((values["loss"], values["sampling"]), {})
            by_seed.setdefault(values["seed"], []).append(values)
    last = {row: {key: [run[-1][key] for run in by_seed.values()] for key in METRICS.values()}
            for row, by_seed in runs.items()}
    recalls = {row: metrics["recall@1"] for row, metrics in last.items()}

    def mean_std(values):
        return f"{statistics.mean(values):.3f}" + (f" ± {statistics.stdev(values):.3f}"
                                                   if len(values) > 1 else "")

    def difference(row, other):
        mean, half = interval([a - b for a, b in zip(recalls[row], recalls[other])])
        ends = f" [{mean - half:+.3f}, {mean + half:+.3f}]" if half == half else ""
        return f"{mean:+.3f}{ends}" if row != other else ""

    others = reference, *UNTRAINED
    columns = ["loss", "sampling", "lr", "R@1", "MAP@R", "NMI", "R@1, best epoch by test",
               f"R@1 - {'/'.join(reference)}", *(f"R@1 - {name}" for name, _ in UNTRAINED)]
    yield f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|"
    for row in sorted(runs, key=lambda row: -np.nan_to_num(np.mean(recalls[row]))):
        measured = list(runs[row].values())
        best = [max(values["recall@1"] for values in run) for run in measured]
        cells = [*row, f"{measured[0][0]['lr']:g}" if row not in UNTRAINED else "",
                 *map(mean_std, last[row].values()), mean_std(best),
                 *(difference(row, other) for other in others)]
        yield f"| {' | '.join(cells)} |"


def chosen_rows(names):
    """NAME or NAME/SAMPLING -> (loss, sampling) pairs, each once; ValueError for unknown ones."""
    rows = []
    for name in names:
        loss, _, sampling = name.partition("/")
        if loss not in losses.LOSSES:
            raise ValueError(f"--losses {name}: there is no loss {loss}; there are "
                             f"{', '.join(losses.LOSSES)}")
        samplings = losses.LOSSES[loss].samplings or ("none",)
        if sampling and sampling not in samplings:
            raise ValueError(f"--losses {name}: {loss} takes the samplings {', '.join(samplings)}")
        rows.append((loss, sampling or samplings[0]))
    return list(dict.fromkeys(rows))


def build_parser():
    """This study's own flags; the others are main.py's."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], allow_abbrev=False,
        epilog="Flags of main.py on batches, samplings, losses, optimisation and, without "
               f"--features, data and network are taken too; here they begin as "
               f"{' '.join(DEFAULTS)}")
    add = parser.add_argument
    add("--features", metavar="FILE", help="npz file with embeddings [N, D] and labels [N]. "
        "Default: they are computed for --dataset, --arch, --weights")
    add("--save_features", metavar="FILE", help="keep the computed features for --features")
    add("--losses", nargs="+", default=COMPARED, metavar="NAME[/SAMPLING]", help="what is "
        "compared. Default: all with their default sampling, marginloss and triplet with four")
    add("--reference", default="marginloss/distance", metavar="NAME[/SAMPLING]", help="the row, "
        "trained as well, that others are compared with. Default %(default)s")
    add("--seeds", type=int, nargs="+", default=[1, 2, 3], metavar="S", help="Default 1 2 3")
    add("--lr", type=float, nargs="+", default=[1e-5, 3e-5, 1e-4, 3e-4, 1e-3],
        metavar="LR", help="rates of the layer that each row chooses from on "
        "held-out training classes; one: no choice. Default 1e-5 3e-5 1e-4 3e-4 1e-3")
    add("--processes", type=int, default=min(2, os.cpu_count() or 1), metavar="N", help="rows "
        "trained at once, each on one core; changes no number. Default %(default)s")
    add("--csv", metavar="FILE", help="write every measurement to this file")
    return parser


def compare(args, rest):
    """The study -> its measurements, a list of dicts; prints the table, progress to stderr."""
    start = time.monotonic()
    rows = chosen_rows([args.reference, *args.losses])
    if len(set(args.seeds)) < len(args.seeds) or args.processes < 1:
        raise ValueError(f"--seeds {' '.join(map(str, args.seeds))} --processes {args.processes}: "
                         "each seed counts once, and one process is the least")
    if args.features and args.save_features:
        raise ValueError("--save_features keeps computed features; --features reads them")
    refuse_unused(rest, with_images=not args.features)
    tried = [*((row, args.lr[0]) for row in rows), *((rows[0], lr) for lr in args.lr)]
    opt = [options(rest, *row_lr, min(args.seeds)) for row_lr in tried][0]  # wrong ones end here
    if opt.n_epochs < 1:
        raise ValueError(f"--n_epochs {opt.n_epochs}: there is nothing to compare without one")
    parts = (read_features(args.features) if args.features else
             compute_features(opt, args.save_features))
    print("; ".join(f"{name} {len(part):,} images of {len(set(part.labels))} classes"
                    for name, part in zip(("train", "test"), parts))
          + f"; {parts[0].rows.shape[1]} features, {opt.n_epochs} epochs, seeds "
          f"{' '.join(map(str, args.seeds))}\n", flush=True)
    found = untrained(parts[1], args, rest)
    for i, (row, measured) in enumerate(zip(rows, studies(parts, args, rest, rows))):
        found += measured
        print(f"{i + 1}/{len(rows)} {'/'.join(row)}: R@1 {measured[-1]['recall@1']:.3f}, lr "
              f"{measured[-1]['lr']:g}; {results.duration(time.monotonic() - start)}",
              file=sys.stderr, flush=True)
    if args.csv:
        auxiliaries.save_csv(args.csv, found)
    print("\n".join(summary(found, rows[0])), f"\n\n{args.processes} processes, "
          f"{results.duration(time.monotonic() - start)}", sep="")
    return found


def main(argv=None):
    """Parses the command line and runs the study -> its measurements; one message on bad input."""
    with auxiliaries.one_message("cpu_study.py"):
        return compare(*build_parser().parse_known_args(argv))


if __name__ == "__main__":
    main()
