"""Trains a network for retrieval of unseen classes, evaluates it after each epoch, saves and
draws.

The run reads from top to bottom in main(): options, data, network, loss, optimisers, trainer. What
each part does is in its own file; this one only wires them, and its Run says what happens after an
iteration and after an epoch. Without arguments: ResNet50 on CUB200-2011, margin loss, distance
sampling. python main.py --dataset glyphs needs no data and no GPU.
"""

import argparse
import math
import os
import sys
import time

import torch

import auxiliaries
import datasets
import evaluate
import losses
import netlib
import samplers
import trainers

# Options that may differ between a run and its resumption: they do not change what is computed
# (that the data is the same is checked by its fingerprint).
MAY_CHANGE = {"resume", "n_epochs", "gpu", "kernels", "source_path", "save_path", "savename"}
TWO_VIEWS = ("UnsupervisedEmbeddingsUsingAugmentations", "TwoStreamMetricLoss")


def build_parser():
    """The parser with every file's flags, in the order data, batch, network, ... run."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0] + " Options without a fixed default are filled in "
        "from --dataset, --arch and --loss; the run prints all of them. Distances are Euclidean; "
        "unit-norm embeddings lie 0 to 2 apart.")
    for module in (datasets, samplers, netlib, losses, trainers, evaluate, auxiliaries):
        module.add_arguments(parser)
    return parser


def parse_options(argv=None):
    """The final options: what the user gave, and the defaults that depend on it filled in once.

    Ends the program with argparse's message where values contradict each other or make no sense.
    """
    parser = build_parser()
    opt = parser.parse_args(argv)
    message = contradiction(opt)
    if not message:
        fill_defaults(opt)
        message = wrong_value(opt)
    if message:
        parser.error(message)
    return opt


def samples_per_class_bounds(opt):
    """The least and the greatest --samples_per_class that the loss and the trainer can use."""
    if opt.trainer == "UnsupervisedEmbeddingsUsingAugmentations":
        return 1, 1  # its positives are the two views of an image, its batches are shuffled
    loss_class = losses.LOSSES[opt.loss][0]
    return loss_class.min_samples_per_class, loss_class.max_samples_per_class


def contradiction(opt):
    """What the user's options contradict each other in, as a sentence; None if they agree."""
    loss_class = losses.LOSSES[opt.loss][0]
    if opt.not_pretrained and opt.weights:
        return "--not_pretrained and --weights contradict each other: give one of them"
    if opt.resume and opt.savename is None:
        return "--resume needs --savename, the name of the run to go on with"
    if opt.sampling not in (None, *loss_class.samplings):
        takes = " or ".join(loss_class.samplings) or "none: leave it out"
        return f"--loss {opt.loss} cannot use --sampling {opt.sampling}; it takes {takes}"
    if (opt.trainer == "UnsupervisedEmbeddingsUsingAugmentations"
            and loss_class.min_samples_per_class < 2):
        return (f"--trainer {opt.trainer} does not use classes, which --loss {opt.loss} needs; "
                "take a loss of pairs or triplets")
    if opt.trainer == "TwoStreamMetricLoss" and opt.loss not in ("triplet", "marginloss"):
        return (f"--trainer {opt.trainer} needs a loss of triplets, triplet or marginloss; --loss "
                f"{opt.loss} is not")
    if opt.trainer == "DeepAdversarialMetricLearning" and not loss_class.unit_norm:
        return (f"--trainer {opt.trainer} needs unit-norm embeddings for its triplet losses; "
                f"--loss {opt.loss} wants raw ones")
    return None


def fill_defaults(opt):
    """Fills in what the user left open and what depends on dataset, network, loss and trainer."""
    def default(name, value):
        if getattr(opt, name) is None:
            setattr(opt, name, value)

    glyphs = opt.dataset == "glyphs"
    default("arch", "convnet" if glyphs else "resnet50")
    googlenet = opt.arch == "googlenet"
    opt.not_pretrained = opt.not_pretrained or (opt.arch == "convnet" and not opt.weights)
    default("batchnorm", "trained" if opt.not_pretrained else "frozen")
    default("embed_dim", 512 if googlenet else 128)
    default("image_size", 32 if glyphs else 227 if googlenet else 224)
    default("k_vals", {"online_products": [1, 10, 100, 1000], "in-shop": [1, 10, 20, 30, 50],
                       "vehicle_id": [1, 5]}.get(opt.dataset, [1, 2, 4, 8]))
    opt.k_vals = sorted(set(opt.k_vals))
    default("samples_per_class", min(4, samples_per_class_bounds(opt)[1]))
    default("sampling", next(iter(losses.LOSSES[opt.loss][0].samplings), "none"))
    default("n_epochs", 20 if glyphs else 70)
    default("tau", [15] if glyphs else [30, 55])
    default("lr", 1e-3 if glyphs else 1e-5)
    default("proxy_lr", 1e-2 if glyphs else 1e-5)
    default("loss_lr", 1e-2 if glyphs else opt.lr)
    default("classifier_lr", 10 * opt.lr)
    default("g_lr", opt.lr)
    third = opt.embed_dim // 3
    default("embedding_sizes", [opt.embed_dim - 2 * third, third, third])
    default("kernels", 0 if glyphs else min(8, os.cpu_count() or 1))
    default("savename", time.strftime("%Y-%m-%d_%H-%M-%S"))


def wrong_value(opt):
    """Which of the final options is outside of what makes sense, as a sentence; or None."""
    for name, value in vars(opt).items():
        numbers = value if isinstance(value, list) else [value]
        if any(isinstance(number, float) and not math.isfinite(number) for number in numbers):
            return f"--{name} {value}: a finite number is needed"
    for name, least in (("n_epochs", 0), ("kernels", 0), ("seed", 0), ("image_size", 8),
                        ("embed_dim", 1), ("lr", 0), ("fc_lr_mul", 0), ("decay", 0),
                        ("beta_lr", 0), ("proxy_lr", 0), ("loss_lr", 0),
                        ("classifier_weight", 0), ("classifier_lr", 0), ("g_lr", 0),
                        ("metric_alone_epochs", 0), ("g_alone_epochs", 0),
                        ("g_triplets_per_anchor", 1)):
        if getattr(opt, name) < least:
            return f"--{name} {getattr(opt, name)}: the least value is {least}"
    if opt.image_size > 2048:
        return f"--image_size {opt.image_size}: 2048 pixels is the most"
    if min(opt.tau) < 1:
        return f"--tau {min(opt.tau)}: epochs are counted from 1"
    if not 0 < opt.gamma <= 1:
        return f"--gamma {opt.gamma}: the scheduler's factor is above 0 and at most 1"
    fewest, most = samples_per_class_bounds(opt)
    if not fewest <= opt.samples_per_class <= most:
        allowed = f"{fewest} only" if most == fewest else f"{fewest} or more"
        return (f"--trainer {opt.trainer} with --loss {opt.loss} cannot use --samples_per_class "
                f"{opt.samples_per_class}; it takes {allowed}")
    if opt.bs < 2 or opt.bs % opt.samples_per_class:
        return (f"--bs {opt.bs} must be at least 2 and a multiple of --samples_per_class "
                f"{opt.samples_per_class}")
    if fewest > 1 and opt.bs == opt.samples_per_class:
        return (f"--bs {opt.bs} with --samples_per_class {opt.samples_per_class} is one class a "
                f"batch: --loss {opt.loss} would find no negatives; take a larger --bs")
    if opt.trainer == "CascadedEmbeddings" and (sum(opt.embedding_sizes) != opt.embed_dim
                                                or min(opt.embedding_sizes) < 1):
        return (f"--embedding_sizes {' '.join(map(str, opt.embedding_sizes))} must be above 0 and "
                f"sum to --embed_dim {opt.embed_dim}")
    return None


def make_parts(opt, num_classes):
    """What the chosen trainer trains -> (models, loss_funcs, parameter groups, its own arguments).

    Dicts as the trainers take them; the groups are named like the models and losses they belong
    to.
    """
    loss_class = losses.LOSSES[opt.loss][0]
    cascaded = opt.trainer == "CascadedEmbeddings"
    trunk, embedder = netlib.network_select(opt, loss_class.unit_norm,
                                            opt.embedding_sizes if cascaded else None)
    models, loss_funcs, arguments = {"trunk": trunk, "embedder": embedder}, {}, {}
    groups = {"trunk": {"params": list(trunk.parameters()), "lr": opt.lr},
              "embedder": {"params": list(embedder.parameters()),
                           "lr": opt.lr * (opt.fc_lr_mul or 1)}}

    def add_loss(name, **changes):
        options = argparse.Namespace(**{**vars(opt), **changes})
        loss_funcs[name], added = losses.loss_select(opt.loss, options, [], num_classes)
        groups.update({name: group for group in added})

    if cascaded:
        for i, size in enumerate(opt.embedding_sizes):
            add_loss(f"metric_loss_{i}", embed_dim=size)
        return models, loss_funcs, groups, {"embedding_sizes": opt.embedding_sizes}
    add_loss("metric_loss")
    if opt.trainer == "TrainWithClassifier":
        models["classifier"] = torch.nn.Linear(opt.embed_dim, num_classes)
        loss_funcs["classifier_loss"] = torch.nn.CrossEntropyLoss()
        groups["classifier"] = {"params": list(models["classifier"].parameters()),
                                "lr": opt.classifier_lr}
        arguments["loss_weights"] = {"metric_loss": 1, "classifier_loss": opt.classifier_weight}
    elif opt.trainer == "DeepAdversarialMetricLearning":
        models["generator"] = netlib.Generator(trunk.num_features)
        groups["generator"] = {"params": list(models["generator"].parameters()), "lr": opt.g_lr}
        for name in ("g_adv_loss", "synth_loss"):
            loss_funcs[name] = losses.TripletLoss(opt.margin)
        weights = zip(("g_adv_loss", "g_hard_loss", "g_reg_loss", "synth_loss"), opt.g_weights)
        arguments = {"loss_weights": {"metric_loss": 1, **dict(weights)},
                     "metric_alone_epochs": opt.metric_alone_epochs,
                     "g_alone_epochs": opt.g_alone_epochs,
                     "g_triplets_per_anchor": opt.g_triplets_per_anchor}
    elif opt.trainer == "UnsupervisedEmbeddingsUsingAugmentations":
        # The dataset gives both views; the trainer's transforms pick one each.
        arguments = {"transforms": [lambda views: views[0], lambda views: views[1]],
                     "data_and_label_getter": two_views}
    elif opt.trainer == "TwoStreamMetricLoss":
        arguments["mining_funcs"] = {"tuple_miner": loss_funcs["metric_loss"].sampler}
    return models, loss_funcs, groups, arguments


def two_views(item):
    """(first view, second view, label) -> ((first, second), label); a collated batch as it is."""
    return item if len(item) == 2 else (item[:2], item[2])


def make_optimizers(groups, opt):
    """Adam for each parameter group, with its scheduler by epoch.

    Returns (optimizers, lr_schedulers), dicts as the trainers take them.
    """
    optimizers = {f"{name}_optimizer": torch.optim.Adam([group], weight_decay=opt.decay)
                  for name, group in groups.items()}
    schedulers = {}
    for name, optimizer in zip(groups, optimizers.values()):
        if opt.scheduler == "step":
            scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, opt.tau, opt.gamma)
        elif opt.scheduler == "exp":
            scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, opt.gamma)
        else:
            continue
        schedulers[f"{name}_scheduler_by_epoch"] = scheduler
    return optimizers, schedulers


class Run:
    """A run's memory and its files: what the trainer's hooks do after an iteration and an epoch.

    folder: where the files go. title: the plot's first words. options: dict, saved with every
    checkpoint. data: the data's fingerprint. measure: callable(trainer) -> (metrics, embeddings).
    draw_neighbours: callable(path, embeddings). progress: an auxiliaries.Progress. keep_gradients:
    save the embedding layer's mean absolute gradients.
    """

    STATE_KEYS = ("epoch", "options", "data", "models", "losses", "optimizers", "lr_schedulers",
                  "random_state", "train_rows", "val_rows")

    def __init__(self, folder, title, options, data, measure, draw_neighbours, progress,
                 keep_gradients=False):
        self.folder = folder
        self.title = title
        self.options = options
        self.data = data
        self.measure = measure
        self.draw_neighbours = draw_neighbours
        self.progress = progress
        self.keep_gradients = keep_gradients
        self.train_rows, self.val_rows = [], []  # the rows of the two CSV files
        self.loss_sums, self.gradients = {}, []  # of the epoch that is under way

    def after_iteration(self, trainer):
        """Adds up the losses, collects gradients if asked for, moves the progress line."""
        for name, loss in trainer.losses.items():
            self.loss_sums[name] = self.loss_sums.get(name, 0) + loss
        gradient = trainer.models["embedder"].linear.weight.grad                 # [D, F]
        if self.keep_gradients and gradient is not None:
            self.gradients.append(gradient.abs().mean(0))
        self.progress.update(trainer.epoch, trainer.iteration, trainer.iterations_per_epoch,
                             trainer.losses["total_loss"])

    def after_epoch(self, trainer):
        """Evaluates, logs, draws, saves; epoch 0 is the untrained network."""
        seconds = self.progress.pause(f"epoch {trainer.epoch}: evaluating")
        trainer.set_to_eval()
        metrics, embedded = self.measure(trainer)
        self.val_rows.append({"epoch": trainer.epoch, **metrics})
        if trainer.epoch:
            iterations = trainer.iterations_per_epoch
            means = {name: float(total) / iterations for name, total in self.loss_sums.items()}
            rate = trainer.optimizers["trunk_optimizer"].param_groups[0]["lr"]
            self.train_rows.append({"epoch": trainer.epoch, **means, "next_lr": rate})
        self.save(trainer, embedded)
        self.progress.write("")
        self.report(trainer, metrics, seconds)
        self.loss_sums, self.gradients = {}, []
        self.progress.restart()

    def report(self, trainer, metrics, seconds):
        """Prints the epoch in one line; seconds: what the training took."""
        shown = "  ".join(f"{name} {value:.4f}" for name, value in metrics.items())
        if not trainer.epoch:
            print(f"untrained  {shown}", flush=True)
            return
        images = trainer.iterations_per_epoch * trainer.batch_size
        skipped = f", {trainer.skipped_steps} steps skipped" if trainer.skipped_steps else ""
        print(f"epoch {trainer.epoch}/{self.options['n_epochs']}  loss "
              f"{self.train_rows[-1]['total_loss']:.4f}  {shown}  "
              f"{auxiliaries.duration(seconds)}, {images / seconds:.0f} images/s{skipped}",
              flush=True)

    def selection(self):
        """(epoch, value, name) of the best epoch by the first recall; epoch 0 only if alone."""
        name = next(key for key in self.val_rows[0] if key != "epoch")
        rows = self.val_rows[1:] or self.val_rows
        best = max(rows, key=lambda row: row[name])
        return best["epoch"], best[name], name

    def save(self, trainer, embedded):
        """Writes every file of the run folder; those of the best epoch only if it is this one."""
        if self.gradients:
            auxiliaries.save_pickle(self.path(f"gradients_{trainer.epoch:04d}.pkl"),
                                    torch.stack(self.gradients).cpu().numpy())
        auxiliaries.save_csv(self.path("log_train_Base.csv"), self.train_rows)
        auxiliaries.save_csv(self.path("log_val_Base.csv"), self.val_rows)
        self.draw()
        state = {"epoch": trainer.epoch, "options": self.options, "data": self.data,
                 "models": states(trainer.models), "losses": states(trainer.loss_funcs),
                 "optimizers": states(trainer.optimizers),
                 "lr_schedulers": states(trainer.lr_schedulers),
                 "random_state": auxiliaries.random_state(),
                 "train_rows": self.train_rows, "val_rows": self.val_rows}
        if self.selection()[0] == trainer.epoch:
            auxiliaries.save_checkpoint(self.path("checkpoint.pth.tar"), state)
            self.draw_neighbours(self.path("sample_recoveries.png"), embedded)
        auxiliaries.save_checkpoint(self.path("last.pth.tar"), state)

    def draw(self):
        """Writes InfoPlot_Base.svg: losses and metrics over the epochs, the best values on top."""
        def curves(rows):
            names = dict.fromkeys(key for row in rows for key in row
                                  if key not in ("epoch", "next_lr"))
            return {name: [(row["epoch"], row[name]) for row in rows if name in row]
                    for name in names}

        losses_shown, metrics = curves(self.train_rows), curves(self.val_rows)
        if len(losses_shown) == 2:
            losses_shown.pop("metric_loss", None)  # alone, it is the total loss
        epoch, value, name = self.selection()
        rows = self.val_rows[1:] or self.val_rows
        best = {name: (min if name.endswith("dist_ratio") else max)(row[name] for row in rows)
                for name in metrics}
        title = [f"{self.title}: best {name} {value:.4f} in epoch {epoch}",
                 "best of each metric over the epochs: "
                 + ", ".join(f"{name} {value:.4f}" for name, value in best.items())]
        auxiliaries.save_plot(self.path("InfoPlot_Base.svg"), title,
                              [("training loss", losses_shown), ("test classes", metrics)])

    def path(self, name):
        """The path of a file in the run folder."""
        return os.path.join(self.folder, name)

    def restore(self, trainer, state):
        """Puts a checkpoint's state back into the trainer and this run; returns the next epoch.

        Raises ValueError where the options, the data or the code are not those of the checkpoint.
        """
        changed = [f"--{name} (was {state['options'].get(name)}, is {value})"
                   for name, value in self.options.items()
                   if name not in MAY_CHANGE and state["options"].get(name) != value]
        if changed:
            raise ValueError(f"--resume with other options than the run in {self.folder}: "
                             f"{', '.join(changed)}")
        if state["data"] != self.data:
            raise ValueError(f"--resume with other data than the run in {self.folder}: the images "
                             "or classes below --source_path are not the same")
        for group, parts in (("models", trainer.models), ("losses", trainer.loss_funcs),
                             ("optimizers", trainer.optimizers),
                             ("lr_schedulers", trainer.lr_schedulers)):
            for name, part in parts.items():
                try:
                    part.load_state_dict(state[group][name])
                except (RuntimeError, KeyError, ValueError) as error:
                    raise ValueError(f"--resume: the checkpoint's {name} does not fit ({error}); "
                                     "was the code changed?") from error
        self.train_rows, self.val_rows = state["train_rows"], state["val_rows"]
        auxiliaries.restore_random_state(state["random_state"])
        return state["epoch"] + 1


def states(parts):
    """{name: object with state_dict()} -> {name: its state}."""
    return {name: part.state_dict() for name, part in parts.items()}


def train(opt):
    """One run with final options -> its folder."""
    netlib.check_arch(opt.arch)
    device = auxiliaries.select_device(opt.gpu)
    auxiliaries.seed_everything(opt.seed)

    views = 2 if opt.trainer in TWO_VIEWS else 1
    train_set, evaluation_sets, found = datasets.dataset_select(opt, views)
    for _, queries, gallery in evaluation_sets:
        evaluate.check_k_vals(opt.k_vals, len(queries) - 1 if gallery is None else len(gallery))
    batch_sampler = samplers.batch_sampler_select(train_set.labels, opt)

    # Without labels a class is a place in the batch.
    pseudo = opt.trainer == "UnsupervisedEmbeddingsUsingAugmentations"
    num_classes = opt.bs if pseudo else len(train_set.class_names)
    models, loss_funcs, groups, arguments = make_parts(opt, num_classes)
    for part in (*models.values(), *loss_funcs.values()):
        part.to(device)
    optimizers, lr_schedulers = make_optimizers(groups, opt)

    folder = auxiliaries.make_run_folder(opt.save_path, opt.dataset, opt.savename, opt.resume)
    last = os.path.join(folder, "last.pth.tar")
    state = auxiliaries.load_checkpoint(last, Run.STATE_KEYS) if os.path.exists(last) else None
    queries, gallery = evaluation_sets[0][1:]
    run = Run(folder, title=f"{opt.dataset}, {opt.arch}, {opt.loss} / {opt.sampling}",
              options=vars(opt), data=datasets.fingerprint(found.splits),
              measure=lambda trainer: evaluate.evaluate_sets(
                  trainer.compute_embeddings, evaluation_sets, device, opt.k_vals, opt.bs,
                  opt.kernels, opt.seed, opt.dist_measure),
              draw_neighbours=lambda path, embedded: evaluate.draw_recoveries(
                  path, queries, gallery, *embedded[0], seed=opt.seed),
              progress=auxiliaries.Progress(opt.n_epochs, opt.bs), keep_gradients=opt.grad_measure)
    trainer = trainers.TRAINERS[opt.trainer](
        models=models, optimizers=optimizers, batch_size=opt.bs, loss_funcs=loss_funcs,
        dataset=train_set, data_device=device, sampler=batch_sampler, lr_schedulers=lr_schedulers,
        freeze_trunk_batchnorm=opt.batchnorm == "frozen", dataloader_num_workers=opt.kernels,
        end_of_iteration_hook=run.after_iteration, end_of_epoch_hook=run.after_epoch, **arguments)
    first_epoch = run.restore(trainer, state) if state else 1
    print_header(opt, device, found, evaluation_sets, trainer)
    auxiliaries.save_options(folder, vars(opt))
    if not state:
        run.after_epoch(trainer)
    elif first_epoch > opt.n_epochs:
        print(f"the run has {first_epoch - 1} epochs already; --n_epochs takes it further")
    else:
        print(f"resumed after epoch {first_epoch - 1}")
    run.progress.restart()
    trainer.train(first_epoch, opt.n_epochs)

    epoch, value, name = run.selection()
    print(f"best {name} {value:.4f} in epoch {epoch} (untrained {run.val_rows[0][name]:.4f})")
    print(f"files in {folder}")
    return folder


def print_header(opt, device, found, evaluation_sets, trainer):
    """Prints the options, the versions, the data and the number of weights."""
    print("options  " + "  ".join(f"{name}={value}" for name, value in sorted(vars(opt).items())))
    print("versions " + auxiliaries.versions(device))
    counts = ", ".join(f"{name} {len(set(split.labels)):,} classes/{len(split.labels):,} images"
                       for name, split in found.splits.items())
    print(f"data     {counts} ({found.layout})")
    for remark in found.odd:
        print(f"         note: {remark}")
    for name, queries, gallery in evaluation_sets:
        lone = datasets.queries_without_match(queries, gallery)
        print(f"test     {name or 'recall'} over {len(queries) - lone:,} queries ({lone:,} "
              "without a true match are left out); NMI with the arithmetic mean")
    weights = {name: sum(p.numel() for p in part.parameters()) for name, part in trainer.parts()}
    print("weights  " + ", ".join(f"{name} {count:,}" for name, count in weights.items()),
          flush=True)


def main(argv=None):
    """Parses the command line and runs it -> the run's folder; one message on bad input."""
    opt = parse_options(argv)
    if hasattr(sys.stdout, "reconfigure"):  # paths need not be valid text
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        return train(opt)
    except (ValueError, OSError, FloatingPointError) as error:
        raise SystemExit(f"main.py: error: {auxiliaries.last_line(error)}") from error
    except torch.OutOfMemoryError as error:
        raise SystemExit(f"main.py: error: the device is out of memory ({error}): try a smaller "
                         "--bs") from error
    except KeyboardInterrupt:
        raise SystemExit("main.py: stopped. The same command with --savename "
                         f"{opt.savename} --resume goes on after the last whole epoch") from None


if __name__ == "__main__":
    main()
