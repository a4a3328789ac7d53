"""Trains a network for retrieval of unseen classes, evaluates it after each epoch, saves and
draws.

The run reads from top to bottom in main(): options, data, network, loss, optimisers, trainer. What
each part does is in its own file; this one only wires them, and its Run says what happens after an
iteration and after an epoch. Without arguments: ResNet50 on CUB200-2011, margin loss, distance
sampling. python main.py --dataset glyphs needs no data and no GPU.
"""

import argparse
import contextlib
import gc
import itertools
import math
import operator
import os
import signal
import sys
import time

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while torch is being loaded

import torch
from torch.optim import lr_scheduler

import auxiliaries
import datasets
import evaluate
import losses
import netlib
import results
import samplers
import trainers

# Options that may differ between a run and its resumption: they do not change what is computed
# (that the data is the same is checked by its fingerprint).
MAY_CHANGE = {"resume", "n_epochs", "patience", "gpu", "kernels", "source_path", "save_path",
              "savename", "tensorboard", "plot_embeddings", "save_embeddings", "checkpoint_every",
              "deterministic", "eval_memory", "seeds", "recipe", "departures",
              "dry_run", "recipes", "given"}
FOLLOW_DEVICE = {"amp", "channels_last"}  # unless they are given; --gpu may change
TWO_VIEWS = ("UnsupervisedEmbeddingsUsingAugmentations", "TwoStreamMetricLoss")


def build_parser():
    """The parser with every file's flags, in the order data, batch, network, ... run."""
    parser = auxiliaries.Parser(
        prog="main.py", description=__doc__.split("\n\n")[0] + " Options without a fixed "
        "default are filled in from --dataset, --arch and --loss; all stand in Parameter_Info.txt. "
        "Distances are Euclidean; unit-norm embeddings lie 0 to 2 apart.")
    for module in (datasets, samplers, netlib, losses, trainers, evaluate, auxiliaries):
        module.add_arguments(parser)
    return parser


def parse_options(argv=None):
    """The final options: what the user gave, and the defaults that depend on it filled in once.

    With --recipe, what it gives comes before. given lists the names of what is no default.
    ValueError where values contradict each other or make no sense.
    """
    parser = build_parser()
    argv = sys.argv[1:] if argv is None else list(argv)
    opt = parser.parse_args(argv)
    opt.departures = []
    recipe = results.find_recipe(opt.recipe) if opt.recipe is not None else None
    argv = recipe.options + argv if recipe else argv
    opt = parser.parse_args(argv)
    given = vars(opt).copy()
    unset = argparse.Namespace(**dict.fromkeys(given))  # no default fills in what is there
    opt.given = [name for name, value in vars(parser.parse_args(argv, unset)).items()
                 if value is not None]
    message = contradiction(opt)
    if not message:
        fill_defaults(opt)
        message = wrong_value(opt)
    if message:
        raise ValueError(message)
    opt.departures = []
    if recipe:
        opt.departures = departures(parser.parse_args(recipe.options), given, opt)
    return opt


def departures(plain, given, opt):
    """The flags that make a run another than its recipe, as a list of texts.

    plain: the recipe's options as parsed; given: those and the user's, {name: value}; opt: the
    same, final. What follows from a flag, as --g_lr from --lr, is not listed.
    """
    changed = [name for name, value in given.items()
               if name not in results.NOT_OF_RECIPE and vars(plain)[name] != value]
    fill_defaults(plain)
    return [f"--{name} {words(vars(opt)[name])} (the recipe has {words(vars(plain)[name])})"
            for name in changed if vars(plain)[name] != vars(opt)[name]]


def words(value):
    """An option's value as it is given on the command line."""
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def samples_per_class_bounds(opt):
    """The least and the greatest --samples_per_class that the loss and the trainer can use."""
    if opt.trainer == "UnsupervisedEmbeddingsUsingAugmentations":
        return 1, 1  # its positives are the two views of an image, its batches are shuffled
    loss_class = losses.LOSSES[opt.loss]
    positives = (opt.trainer == "DeepAdversarialMetricLearning"
                 or opt.sampling not in (None, "none"))  # both draw positives from the batch
    return max(loss_class.min_samples_per_class, 2 if positives else 1), math.inf


def contradiction(opt):
    """What the user's options contradict each other in, as a sentence; None if they agree."""
    loss_class = losses.LOSSES[opt.loss]
    if opt.not_pretrained and opt.weights:
        return "--not_pretrained and --weights contradict each other: give one of them"
    if opt.seeds and len(set(opt.seeds)) < len(opt.seeds):
        return f"--seeds {words(opt.seeds)}: one of them is given twice"
    if opt.seeds and not 0 <= min(opt.seeds) <= max(opt.seeds) < 2 ** 32:
        return f"--seeds {words(opt.seeds)}: a seed is from 0 to {2 ** 32 - 1}"
    if opt.resume and opt.savename is None and opt.recipe is None:
        return "--resume needs --savename, the name of the run to go on with"
    if opt.cache != "none" and opt.trainer in TWO_VIEWS:
        return f"--cache {opt.cache} holds one view of an image; --trainer {opt.trainer} needs two"
    if opt.cache == "device" and opt.kernels:
        return f"--cache device loads without processes; leave out --kernels {opt.kernels}"
    if opt.vehicle_protocol != "all_vs_all" and opt.dataset != "vehicle_id":
        return (f"--vehicle_protocol {opt.vehicle_protocol} is for --dataset vehicle_id; "
                f"--dataset is {opt.dataset}")
    if opt.sampling not in (None, *(loss_class.samplings or ["none"])):
        takes = " or ".join(loss_class.samplings) or "none: leave it out"
        return f"--loss {opt.loss} cannot use --sampling {opt.sampling}; it takes {takes}"
    if (opt.trainer == "UnsupervisedEmbeddingsUsingAugmentations"
            and loss_class.min_samples_per_class < 2):
        return (f"--trainer {opt.trainer} does not use classes, which --loss {opt.loss} needs; "
                "take a loss of pairs or triplets")
    of_triplets = [name for name, loss in losses.LOSSES.items()
                   if loss.samplings == losses.TRIPLET_SAMPLINGS]
    if opt.trainer == "TwoStreamMetricLoss" and opt.loss not in of_triplets:
        return (f"--trainer {opt.trainer} needs a loss of triplets, {', '.join(of_triplets)}; "
                f"--loss {opt.loss} is not")
    if opt.trainer == "TwoStreamMetricLoss" and opt.sampling == "rho":
        return (f"--trainer {opt.trainer} cannot use --sampling rho, whose anchors are positives: "
                "its two streams share no image")
    if opt.trainer == "UnsupervisedEmbeddingsUsingAugmentations" and opt.batch_draw != "distinct":
        return (f"--trainer {opt.trainer} with --batch_draw {opt.batch_draw}: an image that comes "
                "twice in a batch would be its own negative; leave it out")
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
    if glyphs:
        default("image_size", 32)
    for name, value in netlib.network_of(opt.arch).defaults.items():
        default(name, value)
    cuda = opt.gpu >= 0 and torch.cuda.is_available()
    default("amp", netlib.default_amp("cuda" if cuda else "cpu"))
    default("channels_last", not cuda or opt.amp != "none")
    default("not_pretrained", not opt.weights)  # a network that has no pretrained weights
    default("batchnorm", "trained" if opt.not_pretrained else "frozen")
    default("embed_dim", 128)
    default("image_size", 224)
    default("k_vals", {"online_products": [1, 10, 100, 1000], "in-shop": [1, 10, 20, 30, 50],
                       "vehicle_id": [1, 5]}.get(opt.dataset, [1, 2, 4, 8]))
    opt.k_vals = sorted(set(opt.k_vals))
    chosen = evaluate.METRICS if "all" in opt.metrics else opt.metrics
    opt.metrics = [name for name in evaluate.METRICS
                   if name in chosen or name == "dist_ratio" and opt.dist_measure]
    fewest, most = samples_per_class_bounds(opt)
    wanted = losses.LOSSES[opt.loss].default_samples_per_class
    default("samples_per_class", min(most, max(fewest, wanted)))
    default("sampling", next(iter(losses.LOSSES[opt.loss].samplings), "none"))
    default("n_epochs", 20 if glyphs else 70)
    default("tau", [15] if glyphs else [30, 55])
    default("lr", 1e-3 if glyphs else 1e-5)
    default("proxy_lr", 1e-2 if glyphs else 1e-5)
    default("loss_lr", 1e-2 if glyphs else
            opt.lr * losses.LOSSES[opt.loss].lr_factor)
    default("classifier_lr", 10 * opt.lr)
    default("g_lr", opt.lr)
    third = opt.embed_dim // 3
    default("embedding_sizes", [opt.embed_dim - 2 * third, third, third][:3 if third else 1])
    local_processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    default("kernels", 0 if glyphs or opt.cache == "device" else
            max(1, min(8, (os.cpu_count() or 1) // local_processes)))
    default("eval_bs", max(1, 2 * opt.bs))
    if opt.recipe:
        default("savename", opt.recipe.rpartition("/")[2])
    start = time.strftime("%Y-%m-%d_%H-%M-%S")  # another run with --seeds may have the same
    default("savename", f"{start}_{os.getpid()}" if opt.seeds else start)


def wrong_value(opt):
    """Which of the final options is outside of what makes sense, as a sentence; or None."""
    for name in (*opt.given, *vars(opt)):  # of what follows from another flag, that flag first
        value = getattr(opt, name)
        numbers = value if isinstance(value, list) else [value]
        if any(isinstance(number, float) and not math.isfinite(number) for number in numbers):
            return f"--{name} {value}: a finite number is needed"
    for name, least in (("n_epochs", 0), ("seed", 0), ("embed_dim", 1), ("lr", 0), ("fc_lr_mul", 0), ("decay", 0),
                        ("beta_lr", 0), ("proxy_lr", 0), ("loss_lr", 0),
                        ("classifier_weight", 0), ("classifier_lr", 0), ("g_lr", 0),
                        ("metric_alone_epochs", 0), ("g_alone_epochs", 0),
                        ("g_triplets_per_anchor", 1), ("patience", 1),
                        ("plateau_patience", 1),
                        ("checkpoint_every", 1)):
        if getattr(opt, name) is not None and getattr(opt, name) < least:
            return f"--{name} {getattr(opt, name)}: the least value is {least}"
    if min(opt.g_weights) < 0:
        return f"--g_weights {' '.join(map(str, opt.g_weights))}: the least value is 0"
    if "recall" not in opt.metrics:
        return (f"--metrics {' '.join(opt.metrics)}: recall is missing, which chooses the best "
                "epoch")
    if min(opt.tau) < 1:
        return f"--tau {min(opt.tau)}: epochs are counted from 1"
    if not 0 < opt.gamma <= 1:
        return f"--gamma {opt.gamma}: the scheduler's factor is above 0 and at most 1"
    if opt.gamma == 1 and opt.scheduler == "plateau":
        return "--gamma 1.0: --scheduler plateau needs a factor below 1"
    fewest, most = samples_per_class_bounds(opt)
    if not fewest <= opt.samples_per_class <= most:
        allowed = f"{fewest} only" if most == fewest else f"{fewest} or more"
        return (f"--trainer {opt.trainer} with --loss {opt.loss} cannot use --samples_per_class "
                f"{opt.samples_per_class}; it takes {allowed}")
    if opt.bs < 2 or opt.bs % opt.samples_per_class:
        return (f"--bs {opt.bs} must be at least 2 and a multiple of --samples_per_class "
                f"{opt.samples_per_class}")
    processes = auxiliaries.wanted_processes()
    if opt.bs % processes:
        return (f"--bs {opt.bs} is the batch of all processes together: torchrun has started "
                f"{processes}, which do not divide it")
    if opt.amp == "fp16" and (opt.gpu < 0 or not torch.cuda.is_available()):
        return "--amp fp16 needs a GPU; on a CPU --amp takes bf16 or none"
    if fewest > 1 and opt.bs == opt.samples_per_class:
        return (f"--bs {opt.bs} with --samples_per_class {opt.samples_per_class} is one class a "
                f"batch: --loss {opt.loss} would find no negatives; take a larger --bs")
    if opt.positives == "all" and opt.sampling not in samplers.DRAW_NEGATIVES:
        return (f"--positives all with --sampling {opt.sampling}: it is for --sampling "
                f"{', '.join(samplers.DRAW_NEGATIVES)}")
    losses.loss_select(opt, num_classes=2)  # before the data is read
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
    loss_class = losses.LOSSES[opt.loss]
    cascaded = opt.trainer == "CascadedEmbeddings"
    trunk, embedder = netlib.network_select(opt, loss_class.unit_norm,
                                            opt.embedding_sizes if cascaded else None)
    models, loss_funcs, arguments = {"trunk": trunk, "embedder": embedder}, {}, {}
    groups = {"trunk": {"params": list(trunk.parameters()), "lr": opt.lr},
              "embedder": {"params": list(embedder.parameters()),
                           "lr": opt.lr * (opt.fc_lr_mul or 1)}}

    def add_loss(name, embed_dim=None):
        loss_funcs[name], group = losses.loss_select(opt, num_classes, embed_dim)
        if group:
            groups[name] = group

    if cascaded:
        for i, size in enumerate(opt.embedding_sizes):
            add_loss(f"metric_loss_{i}", size)
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
        arguments = {"transforms": [operator.itemgetter(0), operator.itemgetter(1)],
                     "data_and_label_getter": two_views}
    elif opt.trainer == "TwoStreamMetricLoss":
        arguments["mining_funcs"] = {"tuple_miner": loss_funcs["metric_loss"].sampler}
    return models, loss_funcs, groups, arguments


def two_views(item):
    """(first view, second view, label) -> ((first, second), label); a collated batch as it is."""
    return item if len(item) == 2 else (item[:2], item[2])


def make_optimizers(groups, opt):
    """Adam for each parameter group, with its scheduler.

    Returns (optimizers, lr_schedulers), dicts as the trainers take them.
    """
    optimizers = {f"{name}_optimizer": torch.optim.Adam([group], weight_decay=opt.decay)
                  for name, group in groups.items()}
    schedulers = {}
    for name, optimizer in zip(groups, optimizers.values()):
        key = f"{name}_scheduler_by_{'plateau' if opt.scheduler == 'plateau' else 'epoch'}"
        if opt.scheduler == "step":
            schedulers[key] = lr_scheduler.MultiStepLR(optimizer, opt.tau, opt.gamma)
        elif opt.scheduler == "exp":
            schedulers[key] = lr_scheduler.ExponentialLR(optimizer, opt.gamma)
        elif opt.scheduler == "plateau":  # its patience is how many it lets pass
            schedulers[key] = lr_scheduler.ReduceLROnPlateau(
                optimizer, "max", opt.gamma, opt.plateau_patience - 1, threshold=0)
    return optimizers, schedulers


class Run:
    """A run's memory and its files: what the trainer's hooks do after an iteration and an epoch.

    opt: the final options, saved with every checkpoint. folder: where the files go. data: the
    data's fingerprint. evaluation_sets: what is measured, datasets.EvaluationSet. device: where.
    """

    STATE_KEYS = (*trainers.BaseTrainer.STATE_GROUPS, "epoch", "iteration", "place", "options",
                  "data", "random_state", "train_rows", "validation_rows", "under_way", "versions")

    def __init__(self, opt, folder, data, evaluation_sets, device, signals):
        self.opt = opt
        self.folder = folder
        self.data = data
        self.evaluation_sets = evaluation_sets
        self.device = device
        self.signals = signals
        self.writes = auxiliaries.rank() == 0
        self.validation = trainers.Validation(
            self.measure, every=opt.eval_every, patience=opt.patience, state=self.best_state,
            metric=f"val recall@{opt.k_vals[0]}" if opt.val_split else None,
            checkpoint=self.path("checkpoint.pth.tar") if self.writes else None)
        self.log = None  # trainers.TensorBoardLog, once no other run can write here
        self.versions = auxiliaries.versions(device)
        self.progress = auxiliaries.Progress(opt.n_epochs, opt.bs, epochs_per_pause=opt.eval_every)
        self.diagnoses = {}  # by what is appended to their columns' names
        self.train_rows = []  # of log_train_Base.csv; those of log_val_Base.csv are validation's
        self.loss_sums, self.gradients = {}, []  # of the epoch that is under way
        self.embedded = None  # the evaluation sets' embeddings, of the last evaluation

    def carry_out(self, trainer, found):
        """The run from its beginning, or from where it was, to its end; found: datasets.Found."""
        if self.opt.tensorboard and self.writes:
            self.log = trainers.TensorBoardLog(self.path("tensorboard"), self.validation)
        state = auxiliaries.from_first(lambda: auxiliaries.load_last_checkpoint(
            self.path("last.pth.tar"), self.STATE_KEYS))
        if state:
            self.restore(trainer, state)
        print_header(self.opt, self.versions, found, self.evaluation_sets, trainer)
        if self.writes:  # tables, too, say what the data is a part of
            subset = datasets.remark_on_subset(self.opt.dataset, found.splits)
            auxiliaries.save_options(self.folder, {**vars(self.opt), "subset": subset})
        if not state:
            self.after_epoch(trainer)
        elif trainer.epoch >= self.opt.n_epochs:
            print(f"the run has {trainer.epoch} epochs already; --n_epochs takes it further")
        elif self.validation.is_over():
            print(f"the run ended after epoch {trainer.epoch}; a larger --patience takes it "
                  "further")
        else:
            part = f" and {state['iteration']} iterations" if state["iteration"] else ""
            print(f"resumed after epoch {trainer.epoch}{part}")
        self.progress.restart()
        self.signals.at_once = False
        if not self.validation.is_over():
            try:
                trainer.train(trainer.epoch + 1, self.opt.n_epochs)
            except trainers.NonFiniteLoss as error:
                raise FloatingPointError(f"{error}; the images of its batch are listed in "
                                         f"{self.list_batch(trainer, error)}") from error
        if self.writes:  # the run is whole: last.pth.tar alone takes it further
            with contextlib.suppress(FileNotFoundError):
                os.remove(auxiliaries.previous(self.path("last.pth.tar")))
        print(self.summary())
        if self.opt.val_split:
            print("\n".join(self.selections()))

    def watch(self, loss_funcs):
        """Looks at the batches that reach the metric losses from here on."""
        self.diagnoses = {name.removeprefix("metric_loss"): trainers.Diagnosis(loss)
                          for name, loss in loss_funcs.items() if name.startswith("metric_loss")}

    def measure(self, trainer):
        """The metrics of the network as it is."""
        scoring = evaluate.scoring_select(self.opt, trainer.epoch, self.device)
        metrics, self.embedded = evaluate.evaluate_sets(
            trainer.compute_embeddings, self.evaluation_sets, self.device,
            progress=self.progress.count, **scoring)
        return metrics

    def after_iteration(self, trainer):
        """Adds up the losses, collects gradients if asked for, moves the progress line."""
        for name, loss in trainer.losses.items():
            self.loss_sums[name] = self.loss_sums.get(name, 0) + loss
        gradient = trainer.models["embedder"].linear.weight.grad                 # [D, F]
        if self.opt.grad_measure and gradient is not None:
            self.gradients.append(gradient.abs().mean(0))
        if self.log:
            self.log.after_iteration(trainer)
        self.progress.update(trainer.epoch, trainer.iteration, trainer.iterations_per_epoch,
                             trainer.losses["total_loss"])

    def between_iterations(self, trainer):
        """Saves the state where it is time to, so that no more is lost if the run is killed.

        Raises auxiliaries.Stopped after a signal to stop, of which all processes hear.
        """
        done = trainer.iterations_done
        stop = auxiliaries.any_rank(self.signals.caught is not None)
        if (stop or done == trainer.iterations_per_epoch
                or self.opt.checkpoint_every and done % self.opt.checkpoint_every == 0):
            trainer.check_weights()  # never saved over finite ones where they are not
            self.save_last(trainer)
        # What the evaluation computes is computed again from what was saved above.
        self.signals.at_once = done == trainer.iterations_per_epoch
        if self.signals.at_once and not stop:  # a signal may have come meanwhile
            stop = auxiliaries.any_rank(self.signals.caught is not None)
        if stop:
            auxiliaries.any_rank(True)  # waits for the first to have saved
            raise auxiliaries.Stopped(self.signals.caught or signal.SIGTERM)

    def list_batch(self, trainer, error):
        """Writes the images of a NonFiniteLoss's batch to nonfinite.txt -> its path."""
        trainer.sampler.set_epoch(error.epoch)
        batch = next(itertools.islice(iter(trainer.sampler), error.iteration, None))
        images = trainer.dataset.images
        lines = [f"{error}; images:", *(
            f"  {images[i] if isinstance(images, list) else f'image {i}'}" for i in batch)]
        if self.writes:
            with auxiliaries.written_whole(self.path("nonfinite.txt")) as file:
                file.write("\n".join([*lines, ""]).encode("utf-8", "surrogateescape"))
        return self.path("nonfinite.txt")

    def after_epoch(self, trainer):
        """Evaluates, logs, draws, saves; epoch 0 is the untrained network.

        Returns False, which ends the training, when --patience is over.
        """
        self.signals.at_once = True
        due = self.validation.is_due(trainer)
        seconds = self.progress.pause(f"epoch {trainer.epoch}: " + ("evaluating" if due else
                                                                    "saving"), counts=due)
        if trainer.epoch:
            iterations = trainer.iterations_per_epoch
            means = {name: float(total) / iterations for name, total in self.loss_sums.items()}
            seen = {name + suffix: value for suffix, diagnosis in self.diagnoses.items()
                    for name, value in diagnosis.row().items()}
            self.train_rows.append({"epoch": trainer.epoch, **means, **seen,
                                    "next_lr": next_lr(trainer)})
        more = self.validation(trainer)
        if trainer.epoch:  # a scheduler by plateau has had its say
            self.train_rows[-1]["next_lr"] = next_lr(trainer)
        gradients, self.gradients, self.loss_sums = self.gradients, [], {}
        if self.writes:
            self.save(trainer, gradients)
        self.save_last(trainer)
        self.progress.write("")
        self.report(trainer, seconds)
        self.progress.restart()
        self.signals.at_once = False
        if auxiliaries.any_rank(self.signals.caught is not None):
            raise auxiliaries.Stopped(self.signals.caught or signal.SIGTERM)
        return more

    def report(self, trainer, seconds):
        """Prints the epoch in one line; seconds: what the training took."""
        row = self.validation.rows[-1]
        shown = "".join(f"  {name} {value:.4f}" for name, value in row.items()
                        if name != "epoch" and row["epoch"] == trainer.epoch)
        if not trainer.epoch:
            print(f"untrained{shown}", flush=True)
            return
        rate = (f", {self.progress.done * trainer.batch_size / seconds:.0f} images/s"
                if seconds else "")  # a coarse clock may stand still
        skipped = f", {trainer.skipped_steps} steps skipped" if trainer.skipped_steps else ""
        trained = self.train_rows[-1]
        seen = ", ".join(f"{name}{suffix} {trained[name + suffix]:.3f}"
                         for suffix in self.diagnoses for name in trainers.Diagnosis.NAMES
                         if name + suffix in trained and name != "length")
        print(f"epoch {trainer.epoch}/{self.opt.n_epochs}  loss {trained['total_loss']:.4f}"
              f"{f' ({seen})' * bool(seen)}{shown}  "
              f"{auxiliaries.duration(seconds)}{rate}{skipped}", flush=True)
        for suffix in self.diagnoses:
            row = {name.removesuffix(suffix): value for name, value in trained.items()}
            if trainers.Diagnosis.has_collapsed(row):
                print(f"warning: the embeddings have collapsed: their spread std{suffix} is "
                      f"{row['std']:.2g}, their length {row['length']:.2g}. A lower --lr, a "
                      "larger --bs, or --sampling distance or random help", flush=True)

    def summary(self):
        """The run's result in one line, and why it ended early if it did."""
        best, name = self.validation.best(), self.validation.name()
        first, last = self.validation.rows[0], self.validation.rows[-1]
        early = (f"; ended after epoch {last['epoch']}, --patience {self.opt.patience}"
                 if self.validation.is_over() and last["epoch"] < self.opt.n_epochs else "")
        return (f"best {name} {best[name]:.4f} in epoch {best['epoch']} (untrained "
                f"{first[name]:.4f}){early}")

    def selections(self):
        """With --val_split: the test classes' first recall as three rules choose it, in lines."""
        rows = self.validation.rows[1:] or self.validation.rows
        name = next(key for key in rows[0] if key != "epoch" and not key.startswith("val "))
        chosen, most = self.validation.best(), max(rows, key=lambda row: row[name])
        return [f"{rule:34} {name} {row[name]:.4f} (epoch {row['epoch']})" for rule, row in (
            ("last epoch:", rows[-1]), ("best epoch on held-out classes:", chosen),
            ("best epoch on the test classes:", most))] + [
            "choosing on the test classes, as the literature does, gains "
            f"{most[name] - chosen[name]:+.4f}"]

    def state(self, trainer):
        """All that the run needs to go on, for a checkpoint."""
        return {**trainer.state_dict(), "options": vars(self.opt), "data": self.data,
                "random_state": auxiliaries.random_state(), "train_rows": self.train_rows,
                "validation_rows": self.validation.rows, "versions": self.versions,
                "under_way": {"loss_sums": self.loss_sums, "gradients": self.gradients,
                              "diagnoses": {suffix: diagnosis.sums for suffix, diagnosis
                                            in self.diagnoses.items()}}}

    def best_state(self, trainer):
        """What a reader of the best epoch needs: weights and options, not the optimisers'."""
        state = self.state(trainer)
        return {key: state[key] for key in ("epoch", "models", "loss_funcs", "options", "versions")}

    def save_last(self, trainer):
        """Writes the checkpoint that --resume goes on from, and keeps the one before."""
        if self.writes:
            auxiliaries.save_checkpoint(self.path("last.pth.tar"), self.state(trainer),
                                        keep_previous=True)

    def save(self, trainer, gradients):
        """Writes the files of the run folder; those of the best epoch only if it is this one.

        gradients: of the epoch, [D, F] means [F] each. Checkpoints are written elsewhere.
        """
        if gradients:
            auxiliaries.save_pickle(self.path(f"gradients_{trainer.epoch:04d}.pkl"),
                                    torch.stack(gradients).cpu().numpy())
        rows = self.validation.rows
        auxiliaries.save_csv(self.path("log_train_Base.csv"), self.train_rows)
        auxiliaries.save_csv(self.path("log_val_Base.csv"), rows)
        self.draw()
        if self.opt.save_embeddings and self.validation.best()["epoch"] == trainer.epoch:
            self.save_embeddings()
        if max(rows, key=self.validation.value)["epoch"] == trainer.epoch:
            self.draw_evaluation(rows[-1])
        if self.log:
            self.log.after_epoch(trainer)

    def save_embeddings(self):
        """Writes each evaluation set's embeddings for python evaluate.py."""
        opt = self.opt
        for (name, *sets), rows in zip(self.evaluation_sets, self.embedded):
            files = [f"{kind}_{name}".replace(" ", "_").rstrip("_") + ".npz"
                     for kind in ("embeddings", "gallery")]
            for file, dataset, part in zip(files, sets, rows):
                if dataset is not None:
                    evaluate.save_embeddings(
                        self.path(file), part, dataset.labels, k_vals=opt.k_vals, seed=opt.seed,
                        metrics=opt.metrics, nmi_average=opt.nmi_average,
                        vehicle_protocol=opt.vehicle_protocol, device=self.device.type,
                        gallery_file="" if sets[1] is None else files[1])

    def draw_evaluation(self, row):
        """Draws neighbours and embeddings of the evaluation that gave a row of the log.

        Of the best so far: the untrained network's stay where training has not gained on it.
        """
        opt, (_, queries, gallery), rows = self.opt, self.evaluation_sets[0], self.embedded[0]
        epoch, name = row["epoch"], self.validation.name()
        evaluate.draw_recoveries(self.path("sample_recoveries.png"), queries, gallery, *rows,
                                 seed=opt.seed, title=f"epoch {epoch}")
        if opt.plot_embeddings:
            title = f"{opt.savename}, epoch {epoch}: {name} {row[name]:.4f}"
            evaluate.draw_embeddings(self.path(f"embeddings_{epoch:04d}.svg"), queries, rows[0],
                                     opt.plot_embeddings, opt.seed, title=[title])

    def draw(self):
        """Writes InfoPlot_Base.svg: losses and metrics over the epochs, the best values on top."""
        def curves(rows):
            names = dict.fromkeys(key for row in rows for key in row
                                  if key not in ("epoch", "next_lr"))
            return {name: [(row["epoch"], row[name]) for row in rows if name in row]
                    for name in names}

        val_rows = self.validation.rows
        losses_shown, metrics = curves(self.train_rows), curves(val_rows)
        # Lengths, which may be far above the rest, are in the csv alone.
        seen = {name + suffix: losses_shown.pop(name + suffix, [])
                for suffix in self.diagnoses for name in trainers.Diagnosis.NAMES}
        seen = {name: curve for name, curve in seen.items()
                if curve and not name.startswith("length")}
        if len(losses_shown) == 2:
            losses_shown.pop("metric_loss", None)  # alone, it is the total loss
        result = results.Result(self.folder, vars(self.opt), val_rows)
        best = {name: result.best(name) for name in metrics
                if any(name in row for row in val_rows[1:] or val_rows)}
        title = [f"{self.opt.dataset}, {self.opt.arch}, {self.opt.loss} / {self.opt.sampling}: "
                 f"{self.summary()}",
                 "best of each metric over the epochs: "
                 + ", ".join(f"{name} {value:.4f}" for name, value in best.items())]
        auxiliaries.save_plot(self.path("InfoPlot_Base.svg"), title,
                              [("training loss", losses_shown), ("training batches", seen),
                               ("test classes", metrics)])

    def path(self, name):
        """The path of a file in the run folder."""
        return os.path.join(self.folder, name)

    def restore(self, trainer, state):
        """Puts a checkpoint's state back into the trainer and this run.

        Raises ValueError where the options, the data or the code are not those of the checkpoint.
        """
        try:
            options = state["options"]
            may_change = MAY_CHANGE.union(FOLLOW_DEVICE.difference(self.opt.given,
                                                                   options.get("given", ())))
            changed = [f"--{name} (was {auxiliaries.one_line(options.get(name))}, is {value})"
                       for name, value in vars(self.opt).items()
                       if name not in may_change and options.get(name) != value]
            if not changed and state["data"] == self.data:
                trainer.load_state_dict(state)
                auxiliaries.restore_random_state(state["random_state"])
                self.train_rows = state["train_rows"]
                self.validation.rows = state["validation_rows"]
                self.restore_epoch(state["under_way"])
        except Exception as error:  # as many kinds as a checkpoint has parts
            raise ValueError(f"--resume: {self.path('last.pth.tar')} does not fit this code "
                             f"({type(error).__name__}: {auxiliaries.one_line(error)}): was it "
                             "changed since?") from error
        if changed:
            raise ValueError(f"--resume with other options than the run in {self.folder}: "
                             f"{', '.join(changed)}")
        if state["data"] != self.data:
            raise ValueError(f"--resume with other data than the run in {self.folder}: the images "
                             "or classes below --source_path are not the same")
        if state["versions"] != self.versions:
            print(f"note: the run was begun with {state['versions']}; it goes on with "
                  f"{self.versions}")

    def restore_epoch(self, under_way):
        """Takes back what was summed up of the epoch that is under way."""
        self.loss_sums, self.gradients = (
            {name: total.to(self.device) for name, total in under_way["loss_sums"].items()},
            [gradient.to(self.device) for gradient in under_way["gradients"]])
        for suffix, sums in under_way["diagnoses"].items():
            self.diagnoses[suffix].sums = {name: value.to(self.device)
                                           for name, value in sums.items()}


def next_lr(trainer):
    """The trunk's learning rate from here on."""
    return trainer.optimizers["trunk_optimizer"].param_groups[0]["lr"]


def build(opt, signals):
    """Makes all parts of a run and its folder -> (Run, trainer, datasets.Found).

    opt: the final options; signals: auxiliaries.StopSignals.
    """
    if opt.tensorboard:
        trainers.TensorBoardLog.event_writer()  # missing? say so before there is a folder
    device = auxiliaries.select_device(opt.gpu)
    if opt.deterministic:
        auxiliaries.use_deterministic_algorithms()
    auxiliaries.seed_everything(opt.seed)

    views = 2 if opt.trainer in TWO_VIEWS else 1
    train_set, evaluation_sets, found = datasets.dataset_select(opt, device, views)
    for name, queries, gallery in evaluation_sets:
        available = (len(set(queries.labels)) if opt.vehicle_protocol == "random_gallery" else
                     evaluate.number_compared(queries, gallery))
        if "k_vals" not in opt.given:
            opt.k_vals = evaluate.allowed_k_vals(opt.k_vals, available)
        try:
            evaluate.check_k_vals(opt.k_vals, available)
        except ValueError as error:
            held = f" (of the classes held out by --val_split {opt.val_split})" * (name == "val")
            raise ValueError(f"{error}{held}") from error
    batch_sampler = samplers.batch_sampler_select(train_set.labels, opt)

    # Without labels a class is a place in the batch.
    pseudo = opt.trainer == "UnsupervisedEmbeddingsUsingAugmentations"
    num_classes = opt.bs if pseudo else len(train_set.class_names)
    models, loss_funcs, groups, arguments = make_parts(opt, num_classes)
    if auxiliaries.num_ranks() > 1 and opt.batchnorm == "trained":
        models["trunk"] = netlib.share_batchnorm(models["trunk"], device)
    for part in (*models.values(), *loss_funcs.values()):
        part.to(device)
    optimizers, lr_schedulers = make_optimizers(groups, opt)

    named = "savename" in opt.given or opt.recipe or opt.seeds
    folder = auxiliaries.from_first(lambda: auxiliaries.make_run_folder(
        opt.save_path, opt.dataset, opt.savename if named else None, opt.resume))
    opt.savename = os.path.basename(folder)
    run = Run(opt, folder, datasets.fingerprint(found.splits), evaluation_sets, device, signals)
    trainer = trainers.TRAINERS[opt.trainer](
        models=models, optimizers=optimizers, batch_size=opt.bs, loss_funcs=loss_funcs,
        dataset=train_set, data_device=device, sampler=batch_sampler, lr_schedulers=lr_schedulers,
        collate_fn=getattr(train_set, "collate", None),
        freeze_trunk_batchnorm=opt.batchnorm == "frozen", dataloader_num_workers=opt.kernels,
        end_of_iteration_hook=run.after_iteration, end_of_epoch_hook=run.after_epoch,
        between_iterations_hook=run.between_iterations,
        grad_scaler=torch.amp.GradScaler(device.type) if opt.amp == "fp16" else None, **arguments)
    run.watch(loss_funcs)
    return run, trainer, found


def train(opt, signals):
    """One run with final options -> its folder; signals: auxiliaries.StopSignals."""
    run, trainer, found = build(opt, signals)
    with auxiliaries.lock_folder(run.folder) if run.writes else contextlib.nullcontext():
        try:
            run.carry_out(trainer, found)
        finally:
            run.progress.write("")  # what ends the run is said on a line of its own
    print(auxiliaries.printable(f"files in {run.folder}"))
    return run.folder


def print_options(opt, names):
    """Prints the named options, one a line."""
    for name in sorted(names):
        print(auxiliaries.printable(f"options  {name}: {words(getattr(opt, name))}"))


def telling_options(opt):
    """The names of the options that a header shows.

    They were given, or are the chosen loss's or trainer's own, or differ from the defaults without
    being another loss's or trainer's.
    """
    parser, of_losses = build_parser(), argparse.ArgumentParser()
    losses.add_arguments(of_losses)
    fill_defaults(usual := parser.parse_args([]))
    own = {"loss", *losses.flags_of(opt.loss), "trainer",
           *trainers.TRAINERS[opt.trainer].takes, *opt.given}
    others = {*vars(of_losses.parse_args([])), *(name for trainer in trainers.TRAINERS.values()
                                                 for name in trainer.takes)}
    return [name for name, value in vars(usual).items()
            if name in own or name not in others and getattr(opt, name) != value]


def print_header(opt, versions, found, evaluation_sets, trainer):
    """Prints the options that tell, the versions, the data and the number of weights."""
    print_options(opt, telling_options(opt))
    print("options  all others are in Parameter_Info.txt")
    print(f"versions {versions}")
    print(f"network  {opt.arch}, trunk in {opt.amp.replace('none', 'float32')}"
          + ", channels_last" * opt.channels_last + ", compiled" * opt.compile
          + f", {auxiliaries.num_ranks()} processes" * (auxiliaries.num_ranks() > 1))
    counts = ", ".join(f"{name} {len(set(split.labels)):,} classes/{len(split.labels):,} images"
                       for name, split in found.splits.items())
    print(auxiliaries.printable(f"data     {counts} ({found.layout})"))
    subset = datasets.remark_on_subset(opt.dataset, found.splits)
    for remark in (*found.odd, *[subset] * bool(subset)):
        print(auxiliaries.printable(f"         note: {remark}"))
    for name, queries, gallery in evaluation_sets:
        lone = datasets.queries_without_match(queries, gallery)
        print(f"test     {name or 'recall'} over {len(queries) - lone:,} queries ({lone:,} "
              "without a true match are left out)"
              + f"; NMI with the {opt.nmi_average} mean" * ("nmi" in opt.metrics))
    weights = {name: sum(p.numel() for p in part.parameters()) for name, part in trainer.parts()}
    print("weights  " + ", ".join(f"{name} {count:,}" for name, count in weights.items()),
          flush=True)


def run_names(opt):
    """{seed: name of its run's folder}."""
    return ({seed: f"{opt.savename}_seed{seed}" for seed in opt.seeds} if opt.seeds else
            {opt.seed: opt.savename})


def train_seeds(opt, signals):
    """A run for each of --seeds, in folders of their own -> the list of folders.

    With --resume a seed that has no folder yet begins. Before anything is trained:
    FileNotFoundError with --resume where none has a folder, ValueError without it where one has.
    """
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
    folders = []
    for seed, name in names.items():
        one = argparse.Namespace(**{**vars(opt), "seed": seed, "savename": name,
                                    "resume": seed in there})
        print(f"seed {seed}", flush=True)
        gc.collect()  # Run and its Validation know each other: with them the data's cache goes
        folders.append(train(one, signals))
    return folders


def print_verdict(opt, folders):
    """Prints, and writes beside the folders, what the runs of a recipe amount to."""
    recipe = results.find_recipe(opt.recipe)
    found = [results.read_result(folder) for folder in folders]
    subset = found[0].options["subset"]
    departures = [*opt.departures, *[subset] * bool(subset)]
    lines = [f"recipe {opt.recipe}: {recipe.source}",
             *results.verdict(recipe, found, departures)]
    print("\n".join(lines))
    if auxiliaries.rank() == 0:
        path = os.path.join(opt.save_path, opt.dataset, f"{opt.savename}_verdict.txt")
        with auxiliaries.written_whole(path, "w") as file:
            file.write("\n".join(lines) + "\n")


def print_recipes():
    """Lists the recipes: name, published values in percent, source."""
    for name, recipe in results.read_recipes().items():
        values = ", ".join(f"{metric} {results.with_std(*value)}"
                           for metric, value in recipe.published.items())
        print(f"{name:45} {values or 'no published values'}  ({recipe.source})")


def print_plan(opt):
    """Prints what would run: all options, the folders, and a recipe's published values."""
    print_options(opt, vars(opt))
    for seed, name in run_names(opt).items():
        folder = auxiliaries.printable(os.path.join(opt.save_path, opt.dataset, name))
        print(f"run      seed {seed} in {folder}")
    if opt.recipe:
        recipe = results.find_recipe(opt.recipe)
        print(f"source   {recipe.source}")
        for metric, value in recipe.published.items():
            print(f"published {metric} {results.with_std(*value)}")
        if opt.departures:
            print(f"departs from the recipe: {'; '.join(opt.departures)}")


def main(argv=None):
    """Parses the command line and runs it -> the run's folder; one message on bad input.

    With --seeds the list of the runs' folders, with --recipes or --dry_run None.
    """
    with (auxiliaries.one_message("main.py"), auxiliaries.StopSignals() as signals,
          auxiliaries.join_processes()):
        opt = auxiliaries.from_first(lambda: parse_options(argv))
        if opt.recipes or opt.dry_run:
            return print_recipes() if opt.recipes else print_plan(opt)
        try:
            folders = train_seeds(opt, signals) if opt.seeds else [train(opt, signals)]
        except KeyboardInterrupt as stopped:
            if any(os.path.isdir(os.path.join(opt.save_path, opt.dataset, name))
                   for name in run_names(opt).values()):
                stopped.advice = (f". The same command with --savename {opt.savename} --resume "
                                  "goes on from the last checkpoint")
            raise
        if opt.recipe:
            print_verdict(opt, folders)
        return folders if opt.seeds else folders[0]


if __name__ == "__main__":
    main()
