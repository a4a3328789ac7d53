"""Images/s that reach the device, training crops, beside torchvision's usual chain.

python benchmarks/loader.py --dataset cub200 --source_path ./Datasets prints a table: the chain of
ImageFolder (PIL, RandomResizedCrop, flip, ToTensor, Normalize), this project's loader, and each
--cache, with --workers processes each. Medians over --rounds rounds in turn, the same files in the
same order. Making the caches is not counted.
"""

import argparse
import os
import statistics
import sys
import time

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))

import torch
from torchvision import transforms as T
from torchvision.datasets.folder import default_loader

import auxiliaries
import datasets


class Usual(torch.utils.data.Dataset):
    """Items (image float32 [3, size, size], label) as torchvision's examples make them."""

    def __init__(self, split, size):
        self.split = split
        self.transform = T.Compose([
            T.RandomResizedCrop(size), T.RandomHorizontalFlip(), T.ToTensor(),
            T.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])])

    def __len__(self):
        return len(self.split.images)

    def __getitem__(self, i):
        return self.transform(default_loader(self.split.images[i])), self.split.labels[i]


def rate(dataset, order, args, workers, device):
    """Images/s from the second batch on; order: lists of indices."""
    pin = device.type == "cuda" and not getattr(dataset, "on_device", False)
    loader = torch.utils.data.DataLoader(dataset, batch_sampler=order, num_workers=workers,
                                         pin_memory=pin)
    for number, (images, _) in enumerate(loader):
        images.to(device, non_blocking=True)
        if number == 0:
            if device.type == "cuda":
                torch.cuda.synchronize()
            start = time.perf_counter()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return (len(order) - 1) * args.bs / (time.perf_counter() - start)


def benchmark(args, device):
    """Prints the table."""
    options = argparse.Namespace(**vars(args), seed=1, val_split=0, crop_scale=[0.08],
                                 interpolation="bilinear", eval_resize=None)
    sets = {}
    for cache in ("none", "ram", "device"):
        options.cache = cache
        train, _, found = datasets.dataset_select(options, device=device)
        sets["files" if cache == "none" else f"--cache {cache}"] = train
    sets = {"torchvision's chain": Usual(found.splits["train"], args.image_size)} | sets
    generator = torch.Generator().manual_seed(0)
    count = min(args.batches, len(train) // args.bs)
    order = torch.randperm(len(train), generator=generator)[:count * args.bs]
    order = order.view(-1, args.bs).tolist()
    print("| images/s |" + "".join(f" {workers} workers |" for workers in args.workers))
    print("|---|" + "---|" * len(args.workers))
    rates = {}
    for _ in range(args.rounds):
        for name, dataset in sets.items():
            for workers in args.workers:
                if not (workers and "device" in name):
                    rates.setdefault((name, workers), []).append(
                        rate(dataset, order, args, workers, device))
    for name in sets:
        cells = [f"{statistics.median(rates[name, workers]):.0f}"
                 if (name, workers) in rates else "" for workers in args.workers]
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--dataset", choices=datasets.DATASETS, default="cub200")
    parser.add_argument("--source_path", default="./Datasets")
    parser.add_argument("--image_size", type=int, default=224)
    parser.add_argument("--bs", type=int, default=112)
    parser.add_argument("--batches", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 2])
    parser.add_argument("--gpu", type=int, default=-1)
    arguments = parser.parse_args()
    benchmark(arguments, auxiliaries.select_device(arguments.gpu))
