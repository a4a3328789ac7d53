"""How much of the bare network's speed is left in main.py's epoch, and the loader's speed alone.

python benchmarks/throughput.py --source_path ../shared/data --dataset cub200 --arch resnet50
prints one table for the options given, which are those of main.py. Bare: forward, loss, backward
and step on one batch that stays on the device. Whole: main.py's own loop, with loader and hooks,
without evaluation. Loader: the trainer's batches, nothing else running, beside torchvision's
ImageFolder, transforms and DataLoader on the same files. All are of the steady state: an epoch's
wait for its first batch and the start of the loading processes are not in it. What is compared is
measured in turns. Weights are random, which does not change the speed, unless --weights is given.
"""

import argparse
import functools
import os
import statistics
import sys
import tempfile
import time

import torch

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))

import auxiliaries
import datasets
import losses
import main
import netlib
import results
import samplers
import trainers

CPU_BATCH = 32  # --bs where there is no GPU and none is given: 112 images take up to 20 seconds
LOADER_STEPS = 10  # steps of the loaders for one of the network, which is much slower


class Endless(torch.utils.data.BatchSampler):
    """A batch sampler's batches, pass after pass, so that no pass ends while time is taken."""

    def __init__(self, sampler):
        self.sampler = sampler

    def __iter__(self):
        while True:
            yield from self.sampler

    def __len__(self):
        return len(self.sampler)


def build(opt):
    """The trainer that main.run makes of the options, with its hook, silent; prints a header."""
    device = auxiliaries.select_device(opt.gpu)
    auxiliaries.seed_everything(opt.seed, opt.deterministic)
    trainer_class, loss_class = trainers.TRAINERS[opt.trainer], losses.LOSSES[opt.loss]
    train_set, _, found = datasets.dataset_select(opt, device, trainer_class.views)
    batches = samplers.batch_sampler_select(train_set.labels, opt)
    trunk, embedder = netlib.network_select(opt, loss_class.unit_norm, opt.embedding_sizes)
    make_loss = functools.partial(losses.loss_select, opt, len(train_set.class_names))
    trainer = trainers.trainer_select(opt, trunk, embedder, make_loss, train_set, batches, device)
    with results.open_log(opt, found, device, auxiliaries.StopSignals()) as log:
        log.resume(trainer)
        main.print_header(opt, log, [], trainer)
    log.progress.active = False
    trainer.end_of_iteration_hook = log.after_iteration
    trainer.sampler = Endless(trainer.sampler)
    trainer.epoch = 1
    renew_loader(trainer)
    return trainer


def renew_loader(trainer):
    """Ends the loading processes, so that they take no time from what is measured next."""
    trainer.batches = iter(())
    trainer.loader = trainer.make_loader()


def warm_up(loader):
    """Steps before time is taken: all batches loaded ahead while nothing was timed, and two."""
    return 2 + loader.num_workers * (loader.prefetch_factor or 0)


def clock(device):
    """Seconds, once the device has done all that it was told."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def seconds_of(step, warm, steps, device):
    """Seconds that so many calls of step take, after warm others."""
    for _ in range(warm):
        step()
    start = clock(device)
    for _ in range(steps):
        step()
    return clock(device) - start


def bare(trainer, batch, steps):
    """Seconds of forward, loss, backward and step on one batch, (data, labels) on the device."""
    trainer.set_to_train()
    loss_funcs = trainer.loss_funcs

    def step():
        for optimizer in trainer.optimizers.values():
            optimizer.zero_grad()
        sum(trainer.calculate_loss(*batch).values()).backward()
        for optimizer in trainer.optimizers.values():
            optimizer.step()

    # Calling forward leaves out the run's Diagnosis, which is a hook of the loss.
    trainer.loss_funcs = {name: loss.forward for name, loss in loss_funcs.items()}
    try:
        return seconds_of(step, 2, steps, trainer.data_device)
    finally:
        trainer.loss_funcs = loss_funcs


def whole(trainer, steps):
    """Seconds of so many iterations of trainer.train, with the hooks of main.py."""
    warm, stamps, hook = warm_up(trainer.loader), [], trainer.end_of_iteration_hook

    def stamp(trainer):
        if trainer.iteration + 1 in (warm, warm + steps):
            stamps.append(clock(trainer.data_device))

    trainer.end_of_iteration_hook = trainers.in_turn(hook, stamp)
    trainer.iterations_per_epoch = warm + steps
    trainer.train()
    trainer.end_of_iteration_hook = hook
    renew_loader(trainer)
    return stamps[1] - stamps[0]


def loader_alone(trainer, steps):
    """Seconds that the trainer takes to have so many batches on the device."""
    seconds = seconds_of(trainer.next_batch, warm_up(trainer.loader), steps, trainer.data_device)
    renew_loader(trainer)
    return seconds


def link_images(split, folder):
    """Lays out a datasets.Split of files as torchvision's ImageFolder wants them, with links."""
    for label in set(split.labels):
        os.mkdir(os.path.join(folder, f"{label:06d}"))
    for i, (path, label) in enumerate(zip(split.images, split.labels)):
        os.symlink(os.path.abspath(path), os.path.join(folder, f"{label:06d}", f"{i:07d}"))


def torchvision_alone(folder, opt, steps, device):
    """Seconds that torchvision's way takes to have so many batches on the device."""
    from torchvision import datasets as peer, transforms as T

    transform = T.Compose([T.RandomResizedCrop(opt.image_size), T.RandomHorizontalFlip(),
                           T.ToTensor(), T.Normalize([0.485, 0.456, 0.406],
                                                     [0.229, 0.224, 0.225])])
    images = peer.ImageFolder(folder, transform, is_valid_file=os.path.isfile)
    shuffled = torch.utils.data.RandomSampler(images)
    loader = torch.utils.data.DataLoader(
        images, num_workers=opt.kernels, pin_memory=torch.device(device).type == "cuda",
        batch_sampler=Endless(torch.utils.data.BatchSampler(shuffled, opt.bs, drop_last=True)))
    batches = iter(loader)

    def step():
        for part in next(batches):
            part.to(device, non_blocking=True)

    return seconds_of(step, warm_up(loader), steps, device)


def in_turns(jobs, images, repeats):
    """{name: callable -> seconds for so many images} -> {name: images/s of each repeat}.

    Every second repeat goes through the jobs backwards. Prints each repeat as it ends.
    """
    rates = {name: [] for name in jobs}
    for repeat in range(repeats):
        for name in list(jobs)[::-1 if repeat % 2 else 1]:
            rates[name].append(images / jobs[name]())
        print(f"repeat {repeat + 1}: " + ", ".join(f"{name} {values[-1]:.4g}"
                                                   for name, values in rates.items()), flush=True)
    return rates


def table(rates, pairs):
    """Prints rates, {name: images/s of each repeat}; pairs: {name: (its peer, target or None)}."""
    print("\n| what | images/s | least to greatest | beside | ratio | median ratio of a repeat | "
          "target |\n|---|---|---|---|---|---|---|")
    for name, values in rates.items():
        cells = [name, f"{statistics.median(values):.4g}", f"{min(values):.4g} to "
                 f"{max(values):.4g}"]
        peer, target = pairs.get(name, ("", None))
        if peer in rates:
            ratio = statistics.median(values) / statistics.median(rates[peer])
            paired = statistics.median(a / b for a, b in zip(values, rates[peer]))
            cells += [peer, f"{ratio:.3f}", f"{paired:.3f}", f"{target or ''}"]
        print(f"| {' | '.join(cells + [''] * (7 - len(cells)))} |")


def measure(opt, steps, repeats, folder):
    """Measures and prints all; folder: an empty one, for the run's files and torchvision's."""
    opt.save_path = os.path.join(folder, "runs")
    opt.not_pretrained = not opt.weights  # --batchnorm stays as the run would have it
    trainer = build(opt)
    batch, device = trainer.next_batch(), torch.device(trainer.data_device)
    renew_loader(trainer)
    print(f"measured {steps} iterations of {opt.bs} images, {LOADER_STEPS * steps} for the "
          f"loaders, {repeats} times; medians. Targets: resnet50, 224 px, two CPU cores or a GPU",
          flush=True)
    rates = in_turns({"bare network": lambda: bare(trainer, batch, steps),
                      "whole epoch": lambda: whole(trainer, steps)}, steps * opt.bs, repeats)
    loaders = {"loader alone": lambda: loader_alone(trainer, LOADER_STEPS * steps)}
    split = datasets.DATASETS[opt.dataset].read(opt.source_path).splits["train"]
    if isinstance(split.images, list):  # glyphs are no files
        links = os.path.join(folder, "links")
        os.mkdir(links)
        link_images(split, links)
        loaders["torchvision's loader"] = lambda: torchvision_alone(
            links, opt, LOADER_STEPS * steps, device)
    rates |= in_turns(loaders, LOADER_STEPS * steps * opt.bs, repeats)
    on_gpu = 0.95 if getattr(opt, "cache", None) == "device" else 0.85
    table(rates, {"whole epoch": ("bare network", on_gpu if device.type == "cuda" else 0.93),
                  "loader alone": ("torchvision's loader",
                                   None if device.type == "cuda" else 1.5)})


def benchmark(argv=None):
    """Parses the command line, main.py's flags among it, and prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], allow_abbrev=False,
        epilog="All other flags are those of main.py. Without a GPU --bs is "
               f"{CPU_BATCH} if it is not given.")
    parser.add_argument("--iterations", type=int, default=8, metavar="N",
                        help="timed training steps of a measurement; default %(default)s")
    parser.add_argument("--repeats", type=int, default=3, metavar="N",
                        help="measurements of each, in turns; default %(default)s")
    args, others = parser.parse_known_args(argv)
    if min(args.iterations, args.repeats) < 1:
        parser.error(f"--iterations {args.iterations} --repeats {args.repeats}: both are 1 or "
                     "more")
    small = [] if torch.cuda.is_available() else ["--bs", str(CPU_BATCH)]
    with auxiliaries.one_message("throughput.py"), tempfile.TemporaryDirectory() as folder:
        measure(main.parse_options(small + others), args.iterations, args.repeats, folder)


if __name__ == "__main__":
    benchmark()
