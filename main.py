"""Trains a network for retrieval of unseen classes; evaluates, saves and draws after each epoch.

run() is a training from top to bottom: data, network, trainer, and the loop over the epochs. What
each part does is in its own file; below run() are the parsing, the defaults and the checks of the
options. Default run: ResNet50 on CUB200-2011, margin loss, distance sampling. python main.py
--dataset glyphs needs no data and no GPU.
"""

import argparse
import functools
import os
import signal
import sys
import time

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while torch is being loaded

import torch

import auxiliaries
import datasets
import evaluate
import losses
import netlib
import results
import samplers
import trainers
from results import words


def run(opt, signals):
    """One training with final options -> its folder; signals: auxiliaries.StopSignals."""
    device = auxiliaries.select_device(opt.gpu)
    auxiliaries.seed_everything(opt.seed, opt.deterministic)
    loss_class, trainer_class = losses.LOSSES[opt.loss], trainers.TRAINERS[opt.trainer]

    # Data: the training images, and the sets that are tested on.
    train_set, test_sets, found = datasets.dataset_select(opt, device, trainer_class.views)
    opt.k_vals = evaluate.k_vals_select(opt, test_sets)
    batches = samplers.batch_sampler_select(train_set.labels, opt)

    # Network: the trunk gives features, the embedder embeddings. make_loss builds the loss.
    trunk, embedder = netlib.network_select(opt, loss_class.unit_norm, opt.embedding_sizes)
    if auxiliaries.num_ranks() > 1 and opt.batchnorm == "trained":
        trunk = netlib.share_batchnorm(trunk, device)
    # Without labels each image of the batch is a class of its own.
    num_classes = len(train_set.class_names) if trainer_class.uses_classes else opt.bs
    make_loss = functools.partial(losses.loss_select, opt, num_classes)

    # Trainer: how a batch becomes losses; an optimiser and a schedule for each part.
    trainer = trainers.trainer_select(opt, trunk, embedder, make_loss, train_set, batches, device)

    # Log: csv files, plots, checkpoints; with --resume it restores the last state.
    with results.open_log(opt, found, device, signals) as log:
        trainer.end_of_iteration_hook = log.after_iteration       # progress line, --grad_measure
        trainer.between_iterations_hook = log.between_iterations  # --checkpoint_every, Ctrl-C
        log.resume(trainer)                                       # does nothing for a new run
        print_header(opt, log, test_sets, trainer)

        for epoch in range(log.next_epoch(), opt.n_epochs + 1):
            if epoch > 0:                                         # epoch 0: the untrained network
                trainer.train_epoch(epoch)
            log.pause(epoch)                                      # the training's clock stops
            metrics, embedded = {}, None
            if log.is_due(epoch):
                trainer.set_to_eval()
                metrics, embedded = evaluate.evaluate_sets(
                    trainer.compute_embeddings, test_sets, device, progress=log.progress.count,
                    **evaluate.scoring_select(opt, epoch, device))
                if epoch and epoch % opt.eval_every == 0:         # not of a last epoch in between
                    trainer.step_lr_plateau_schedulers(metrics[log.metric])
            log.after_epoch(metrics, test_sets, embedded)         # a printed line; files
            if log.is_over():                                     # --patience
                break
        log.finish()                                              # the result in a line
    return log.folder


def print_header(opt, log, test_sets, trainer):
    """Prints the telling_options, the versions, the data and the number of weights."""
    results.print_options(opt, telling_options(opt))
    print("options  the others are in Parameter_Info.txt")
    print(f"versions {log.versions}")
    print(f"network  {opt.arch}, trunk in {opt.amp.replace('none', 'float32')}"
          + ", channels_last" * opt.channels_last + ", compiled" * opt.compile
          + f", {auxiliaries.num_ranks()} processes" * (auxiliaries.num_ranks() > 1))
    found = log.found
    counts = ", ".join(f"{name} {len(set(split.labels)):,} classes/{len(split.labels):,} images"
                       for name, split in found.splits.items())
    print(auxiliaries.printable(f"data     {counts} ({found.layout})"))
    for remark in (*found.odd, *[found.subset] * bool(found.subset)):
        print(auxiliaries.printable(f"         note: {remark}"))
    unused = [f"--{name}" for name in sorted(own_and_foreign(opt)[1].intersection(opt.given))]
    if unused:
        print(f"         note: {', '.join(unused)} have no effect with these options")
    for name, queries, gallery in test_sets:
        lone = datasets.queries_without_match(queries, gallery)
        print(f"test     {name or 'recall'} over {len(queries) - lone:,} queries ({lone:,} "
              "are left out, which are alone in their class)"
              + f"; NMI with the {opt.nmi_average} mean" * ("nmi" in opt.metrics))
    weights = {name: sum(p.numel() for p in part.parameters()) for name, part in trainer.parts()}
    print("weights  " + ", ".join(f"{name} {count:,}" for name, count in weights.items()),
          flush=True)


def telling_options(opt):
    """The names of the options that the header shows.

    Those that were given, that belong to the chosen loss, trainer or dataset, or that differ from
    the defaults and do not belong to another loss, trainer or dataset.
    """
    fill_defaults(usual := build_parser().parse_args([]))
    own, foreign = own_and_foreign(opt)
    return [name for name, value in vars(usual).items()
            if name in {"loss", "trainer", *own, *opt.given}
            or name not in foreign and vars(opt).get(name, value) != value]


def build_parser():
    """The parser with every file's flags, in the order data, batch, network, ... run."""
    parser = auxiliaries.Parser(
        prog="main.py", add_help=False, description=__doc__.split("\n\n")[0] + " Options without "
        "a fixed default are filled in from --dataset, --arch and --loss; all stand in "
        "Parameter_Info.txt. Distances are Euclidean; unit-norm embeddings lie 0 to 2 apart.")
    for module in (datasets, samplers, netlib, losses, trainers, evaluate, results):
        module.add_arguments(parser)
    return parser


def own_and_foreign(opt):
    """The options of the chosen loss, trainer and so on, and those that only others have."""
    flags = {**{("optim", name): flags for name, flags in trainers.OPTIMIZERS.items()},
             **{("scheduler", name): flags for name, flags in trainers.SCHEDULES.items()},
             **{("loss", name): losses.flags_of(name) for name in losses.LOSSES},
             **{("trainer", name): one.takes for name, one in trainers.TRAINERS.items()},
             **{("dataset", name): row.flags for name, row in datasets.DATASETS.items()}}
    own = set().union(*(flags[kind, name] for kind, name in flags if name == getattr(opt, kind)))
    return own, set().union(*flags.values()) - own


def print_help(parser, opt):
    """Prints the flags without those of other losses, trainers and datasets, or all of them."""
    hidden = own_and_foreign(opt)[1] if opt.help == "chosen" else ()
    for action in parser._actions:
        if action.dest in hidden:
            action.help = argparse.SUPPRESS
    parser.usage = "%(prog)s [--flag value ...], here every flag" if opt.help == "all" else (
        f"%(prog)s [--flag value ...], of --loss {opt.loss} --trainer {opt.trainer} --dataset "
        f"{opt.dataset} --optim {opt.optim} --scheduler {opt.scheduler}; --help all: all")
    parser.print_help()


def parse_options(argv=None):
    """The final options: what the user gave, and the defaults that depend on it filled in once.

    A recipe's options come first, so that the user's win. opt.given names the options of both.
    ValueError where values contradict each other or make no sense. --help ends the program.
    """
    parser = build_parser()
    argv = sys.argv[1:] if argv is None else argv
    name = parser.parse_args(argv).recipe
    recipe = results.find_recipe(name) if name is not None else None
    argv = [*(recipe.options if recipe else []), *argv]
    opt = parser.parse_given(argv)
    if opt.help:
        print_help(parser, opt)
        raise SystemExit
    del opt.help
    given = vars(opt).copy()
    fill_defaults(opt)
    check(opt)
    opt.departures = departures(parser.parse_given(recipe.options), given, opt) if recipe else []
    return opt


def departures(plain, given, opt):
    """The flags by which a run departs from its recipe, as a list of texts.

    plain: the recipe's options as parsed; given: those and the user's, {name: value}; opt: the
    same, final. What follows from a flag, as --g_lr from --lr, is not listed.
    """
    changed = [name for name, value in given.items()
               if name not in {"seed", "weights", *results.free_options()}
               and vars(plain)[name] != value]
    fill_defaults(plain)
    return [f"--{name} {words(vars(opt)[name])} (the recipe has {words(vars(plain)[name])})"
            for name in changed if vars(plain)[name] != vars(opt)[name]]


def fill_defaults(opt):
    """Fills in what was not given, from the rows of dataset and network, then from the rest."""
    def fill(**defaults):
        for name, value in defaults.items():
            if getattr(opt, name) is None:
                setattr(opt, name, value)

    loss_class, trainer_class = losses.LOSSES[opt.loss], trainers.TRAINERS[opt.trainer]
    cuda = opt.gpu >= 0 and torch.cuda.is_available()
    row = datasets.DATASETS[opt.dataset].defaults
    fill(arch=row.get("arch", "resnet50"))
    for name, value in {**netlib.network_of(opt.arch).defaults, **row}.items():
        if name not in vars(opt).get("given", ()):  # before a flag's own default, too
            setattr(opt, name, value)
    fill(amp=netlib.default_amp("cuda" if cuda else "cpu"), embed_dim=128, image_size=224,
         k_vals=[1, 2, 4, 8], n_epochs=70, tau=[30, 55], lr=1e-5, proxy_lr=1e-5,
         sampling=next(iter(loss_class.samplings), "none"),
         not_pretrained=not opt.weights)  # of a network that has no pretrained weights
    third = opt.embed_dim // 3
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    fill(channels_last=not cuda or opt.amp != "none", eval_bs=2 * opt.bs,
         batchnorm="trained" if opt.not_pretrained else "frozen",
         loss_lr=opt.lr * loss_class.lr_factor, classifier_lr=10 * opt.lr, g_lr=opt.lr,
         embedding_sizes=[opt.embed_dim - 2 * third, third, third][:3 if third else 1],
         samples_per_class=max(least_per_class(opt), loss_class.default_samples_per_class)
         if trainer_class.uses_classes else 1,
         kernels=0 if opt.cache == "device" else
         max(1, min(8, (os.cpu_count() or 1) // processes)))
    opt.k_vals = sorted(set(opt.k_vals))
    opt.metrics = [name for name in evaluate.METRICS if name in opt.metrics or "all" in opt.metrics
                   or name == "dist_ratio" and opt.dist_measure]
    if "embedding_sizes" not in trainer_class.takes:
        opt.embedding_sizes = None
    if opt.recipe:
        fill(savename=opt.recipe.rpartition("/")[2])
    start = time.strftime("%Y-%m-%d_%H-%M-%S")  # another run with --seeds may have the same
    fill(savename=f"{start}_{os.getpid()}" if opt.seeds else start)


def least_per_class(opt):
    """The least --samples_per_class that the loss and the trainer can use."""
    draws_positives = (trainers.TRAINERS[opt.trainer].draws_positives
                       or opt.sampling not in (None, "none"))
    return max(losses.LOSSES[opt.loss].min_samples_per_class, 2 if draws_positives else 1)


def check(opt):
    """Raises ValueError where the final options contradict each other."""
    loss, trainer = losses.LOSSES[opt.loss], trainers.TRAINERS[opt.trainer]
    foreign = [(flag, name) for name, row in datasets.DATASETS.items() for flag in row.flags
               if flag in opt.given and flag not in datasets.DATASETS[opt.dataset].flags]
    least, processes = least_per_class(opt), auxiliaries.wanted_processes()
    relations = (
        (opt.weights and opt.not_pretrained and "not_pretrained" in opt.given,
         "--not_pretrained and --weights contradict each other: give one of them"),
        (opt.seeds and len(set(opt.seeds)) < len(opt.seeds),
         f"--seeds {words(opt.seeds)}: one of them is given twice"),
        (opt.resume and "savename" not in opt.given and not opt.recipe,
         "--resume needs --savename, the name of the run to go on with"),
        (opt.cache == "device" and opt.kernels,
         f"--cache device loads without processes; leave out --kernels {opt.kernels}"),
        (foreign, "".join(f"--{flag} is for --dataset {name} and the like, not {opt.dataset}"
                          for flag, name in foreign[:1])),
        (opt.sampling not in (loss.samplings or ("none",)),
         f"--loss {opt.loss} cannot use --sampling {opt.sampling}; it takes "
         f"{' or '.join(loss.samplings) or 'none: leave it out'}"),
        ("recall" not in opt.metrics,
         f"--metrics {words(opt.metrics)}: add recall, which chooses the best epoch"),
        (opt.gamma == 1 and opt.scheduler == "plateau",
         "--gamma 1.0: --scheduler plateau needs a --gamma below 1"),
        (opt.amp == "fp16" and (opt.gpu < 0 or not torch.cuda.is_available()),
         "--amp fp16 needs a GPU; on a CPU --amp takes bf16 or none"),
        (opt.positives == "all" and opt.sampling not in samplers.DRAW_NEGATIVES,
         f"--positives all with --sampling {opt.sampling}: it works only with --sampling "
         f"{', '.join(samplers.DRAW_NEGATIVES)}"),
        (trainer.uses_classes and opt.samples_per_class < least,
         f"--trainer {opt.trainer} with --loss {opt.loss} cannot use --samples_per_class "
         f"{opt.samples_per_class}; it takes {least} or more"),
        (opt.bs < 2 or opt.bs % max(1, opt.samples_per_class),
         f"--bs {opt.bs} must be at least 2 and a multiple of --samples_per_class "
         f"{opt.samples_per_class}"),
        (opt.bs % processes, f"--bs {opt.bs} is the batch of all processes together: torchrun has "
         f"started {processes}, which do not divide it"),
        (trainer.uses_classes and 1 < least <= opt.bs == opt.samples_per_class,
         f"--bs {opt.bs} with --samples_per_class {opt.samples_per_class} is one class a batch: "
         f"--loss {opt.loss} would find no negatives; take a larger --bs"))
    for wrong, sentence in (*relations_of_trainer(opt, loss, trainer), *relations):
        if wrong:
            raise ValueError(sentence)
    losses.loss_select(opt, num_classes=2)  # its constructor checks its flags
    if opt.tensorboard:
        results.TensorBoardLog.event_writer()  # ValueError now if it is not installed


def relations_of_trainer(opt, loss, trainer):
    """What a trainer's class needs of the loss's -> ((whether it is wrong, sentence), ...)."""
    of_triplets = [name for name, one in losses.LOSSES.items()
                   if one.samplings == losses.TRIPLET_SAMPLINGS]
    said = f"--trainer {opt.trainer}"
    return (
        (not trainer.uses_classes and loss.min_samples_per_class < 2,
         f"{said} does not use classes, which --loss {opt.loss} needs; choose a loss of pairs or "
         "triplets"),
        (not trainer.uses_classes and opt.batch_draw != "distinct",
         f"{said} with --batch_draw {opt.batch_draw}: an image that comes twice in a batch would "
         "be its own negative; leave out --batch_draw"),
        (not trainer.uses_classes and opt.samples_per_class != 1,
         f"{said} cannot use --samples_per_class {opt.samples_per_class}; it takes 1 only"),
        (trainer.of_triplets and opt.loss not in of_triplets,
         f"{said} needs a loss of triplets, {', '.join(of_triplets)}; --loss {opt.loss} is not"),
        (trainer.of_triplets and opt.sampling == "rho",
         f"{said} cannot use --sampling rho, whose anchors are positives: its two streams share "
         "no image"),
        (trainer.of_unit_norm and not loss.unit_norm,
         f"{said} needs unit-norm embeddings for its triplet losses; --loss {opt.loss} wants raw "
         "ones"),
        (opt.embedding_sizes and sum(opt.embedding_sizes) != opt.embed_dim,
         f"--embedding_sizes {words(opt.embedding_sizes)} must sum to --embed_dim "
         f"{opt.embed_dim}"))


def main(argv=None):
    """Parses the command line and runs it -> the run's folder; one message on bad input.

    With --seeds the list of the runs' folders, with --recipes or --dry_run None.
    """
    with (auxiliaries.one_message("main.py"), auxiliaries.StopSignals() as signals,
          auxiliaries.join_processes()):
        opt = auxiliaries.from_first(lambda: parse_options(argv))
        if opt.recipes or opt.dry_run:
            return results.print_recipes() if opt.recipes else results.print_plan(opt)
        with results.advice_to_resume(opt):
            folders = [run(one, signals) for one in results.one_per_seed(opt)]
        if opt.recipe:
            results.print_verdict(opt, folders)
        return folders if opt.seeds else folders[0]


if __name__ == "__main__":
    main()
