"""The same training under this project's trainers and under pytorch-metric-learning's.

python benchmarks/trainers_vs_pml.py trains one tiny network from one seed under both, with that
library's losses and miners, prints both loss sequences and how far they differ, then the time of
an iteration under each with losses that take no time. Needs pytorch-metric-learning, which the
project itself does not use.
"""

import argparse
import logging
import os
import statistics
import sys
import time

import torch

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))

import trainers as ours

try:
    from pytorch_metric_learning import losses, miners
    from pytorch_metric_learning import trainers as theirs
    from pytorch_metric_learning.utils import loss_and_miner_utils
except ImportError:
    sys.exit("this benchmark needs pytorch-metric-learning: pip install pytorch-metric-learning")

FEATURES, DIMENSIONS, CLASSES, BATCH = 16, 12, 8, 32


class Rows(torch.utils.data.Dataset):
    """Random rows around class centres; with two streams, (anchor, positive, label)."""

    def __init__(self, streams=1):
        generator = torch.Generator().manual_seed(0)
        self.labels = torch.arange(160) % CLASSES
        centres = torch.randn(CLASSES, 10, generator=generator)[self.labels]
        self.rows = [centres + torch.randn(160, 10, generator=generator) for _ in range(streams)]

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, i):
        return (*(rows[i] for rows in self.rows), self.labels[i])


class Trivial(torch.nn.Module):
    """A loss that takes next to no time, so that the trainer's own time is what is left."""

    margin = 0.1

    def forward(self, embeddings, labels, indices_tuple=None):
        return embeddings.square().mean()


def parts(name, trivial=False):
    """Models, losses, miners, dataset and constructor arguments of one trainer, from one seed.

    trivial: with losses that take no time, and without miners where the trainer can.
    """
    torch.manual_seed(1)
    models = {"trunk": torch.nn.Sequential(torch.nn.Linear(10, FEATURES), torch.nn.ReLU()),
              "embedder": torch.nn.Linear(FEATURES, DIMENSIONS)}
    loss_funcs = {"metric_loss": losses.TripletMarginLoss(margin=0.2)}
    mining = {"tuple_miner": miners.MultiSimilarityMiner(epsilon=0.1)}
    extra, streams = {}, 1
    if name == "TrainWithClassifier":
        models["classifier"] = torch.nn.Linear(DIMENSIONS, CLASSES)
        loss_funcs["classifier_loss"] = torch.nn.CrossEntropyLoss()
        extra["loss_weights"] = {"metric_loss": 1, "classifier_loss": 0.5}
    elif name == "CascadedEmbeddings":
        extra["embedding_sizes"] = [4, 8]
        models["classifier_1"] = torch.nn.Linear(8, CLASSES)
        loss_funcs = {"metric_loss_0": losses.ContrastiveLoss(), "metric_loss_1":
                      losses.ContrastiveLoss(), "classifier_loss_1": torch.nn.CrossEntropyLoss()}
        mining = {"tuple_miner_0": miners.HDCMiner(0.5), "tuple_miner_1": miners.HDCMiner(0.25)}
    elif name == "TwoStreamMetricLoss":
        mining, streams = {"tuple_miner": miners.TripletMarginMiner(margin=0.2)}, 2
    elif name == "DeepAdversarialMetricLearning":
        extra |= {"metric_alone_epochs": 1, "g_alone_epochs": 1, "g_triplets_per_anchor": 3}
        models["generator"] = torch.nn.Linear(3 * FEATURES, FEATURES)
        models["classifier"] = torch.nn.Linear(DIMENSIONS, CLASSES)
        loss_funcs |= {"g_adv_loss": losses.TripletMarginLoss(margin=0.1), "synth_loss":
                       losses.TripletMarginLoss(), "classifier_loss": torch.nn.CrossEntropyLoss()}
    if trivial:
        # The adversarial loss must be a triplet loss.
        kept = ("classifier_loss", "classifier_loss_1", "g_adv_loss")
        loss_funcs = {key: loss if key in kept else Trivial() for key, loss in loss_funcs.items()}
        mining = mining if name == "TwoStreamMetricLoss" else {}
    optimizers = {f"{key}_optimizer": torch.optim.Adam(model.parameters(), 0.01)
                  for key, model in models.items()}
    return dict(models=models, optimizers=optimizers, batch_size=BATCH, loss_funcs=loss_funcs,
                mining_funcs=mining, dataset=Rows(streams), dataloader_num_workers=0,
                data_device=torch.device("cpu"), **extra)


def run(module, name, epochs, trivial=False):
    """Trains with one of the two libraries -> total loss of each iteration, seconds of each."""
    values, stamps = [], []

    def record(trainer):
        values.append(float(trainer.losses["total_loss"]))
        stamps.append(time.perf_counter())

    arguments = parts(name, trivial)
    trainer = getattr(module, name)(end_of_iteration_hook=record, **arguments)
    if name == "DeepAdversarialMetricLearning" and module is ours:
        # The same random triplets on both sides: that library's draw.
        trainer.draw_triplets = lambda labels: torch.stack(
            loss_and_miner_utils.convert_to_triplets(None, labels, t_per_anchor=3), 1)
    torch.manual_seed(2)
    trainer.train(num_epochs=epochs)
    return values, [after - before for before, after in zip(stamps, stamps[1:])]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--n_epochs", type=int, default=6, help="epochs of 5 iterations each")
    parser.add_argument("--repeats", type=int, default=5, help="timed runs of each trainer")
    args = parser.parse_args()
    logging.getLogger("PML").setLevel(logging.ERROR)
    # Each iteration of that library redraws a progress bar; on a null device it costs little.
    sys.stderr = open(os.devnull, "w")
    torch.set_num_threads(1)
    rows = []
    for name in ("MetricLossOnly", "TrainWithClassifier", "CascadedEmbeddings",
                 "TwoStreamMetricLoss", "DeepAdversarialMetricLearning"):
        first, _ = run(ours, name, args.n_epochs)
        second, _ = run(theirs, name, args.n_epochs)
        print(f"{name}: total loss of the first 8 of {len(first)} iterations")
        print("  ours   " + " ".join(f"{value:.6f}" for value in first[:8]))
        print("  theirs " + " ".join(f"{value:.6f}" for value in second[:8]))
        difference = max(abs(a - b) for a, b in zip(first, second, strict=True))
        times = {module: [] for module in (ours, theirs)}
        for _ in range(args.repeats):
            for module in times:
                times[module] += run(module, name, args.n_epochs, trivial=True)[1]
        milliseconds = [1e3 * statistics.median(times[module]) for module in times]
        rows.append((name, difference, *milliseconds))
    print("\n| trainer | largest difference | ours, ms an iteration | theirs | ratio |")
    print("|---|---|---|---|---|")
    for name, difference, mine, other in rows:
        print(f"| {name} | {difference:.1e} | {mine:.2f} | {other:.2f} | {mine / other:.2f} |")


if __name__ == "__main__":
    main()
