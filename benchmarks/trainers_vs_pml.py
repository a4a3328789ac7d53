"""The same training under this project's trainers and under pytorch-metric-learning's.

python benchmarks/trainers_vs_pml.py trains one tiny network from one seed under both, with that
library's losses, miners, hooks and tester, as its example notebooks do: nothing but the module of
the trainer differs, and who draws the adversarial trainer's random triplets. It prints both loss
sequences, both accuracy histories and how far they differ, then the time of an iteration under
each with losses that take no time. Needs that library with record-keeper and faiss-cpu, which the
project itself does not use.
"""

import argparse
import logging
import os
import statistics
import sys
import tempfile
import time

import torch

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))

import trainers as ours

try:
    import record_keeper
    from pytorch_metric_learning import losses, miners, testers
    from pytorch_metric_learning import trainers as theirs
    from pytorch_metric_learning.utils import (accuracy_calculator, common_functions,
                                               logging_presets, loss_and_miner_utils)
except ImportError:
    sys.exit("this benchmark needs: pip install pytorch-metric-learning record-keeper faiss-cpu")

FEATURES, DIMENSIONS, CLASSES, BATCH = 16, 12, 8, 32


class Rows(torch.utils.data.Dataset):
    """Random rows around class centres; with two streams, (anchor, positive, label)."""

    def __init__(self, streams=1, seed=0):
        generator = torch.Generator().manual_seed(seed)
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


def build(module, name, trivial=False, **hooks):
    """The trainer of one of the two libraries, with the hooks."""
    trainer = getattr(module, name)(**parts(name, trivial), **hooks)
    if name == "DeepAdversarialMetricLearning" and module is ours:
        # The same random triplets on both sides, those of that library.
        trainer.draw_triplets = lambda labels: torch.stack(
            loss_and_miner_utils.convert_to_triplets(None, labels, t_per_anchor=3), 1)
    return trainer


def timed(module, name, epochs):
    """Trains with losses that take no time -> the seconds of each iteration."""
    stamps = []
    trainer = build(module, name, trivial=True,
                    end_of_iteration_hook=lambda _: stamps.append(time.perf_counter()))
    trainer.train(num_epochs=epochs)
    return [after - before for before, after in zip(stamps, stamps[1:])]


def train(module, name, epochs):
    """Trains with that library's hooks and tester -> (total losses, accuracy history by metric).

    The last best state is loaded back at the end, by that library's function.
    """
    with tempfile.TemporaryDirectory() as folder:
        # As get_record_keeper makes it, but without TensorBoard.
        keeper = record_keeper.RecordKeeper(
            None, record_keeper.RecordWriter(os.path.join(folder, "logs")),
            common_functions.list_of_recordable_attributes_list_names())
        hooks = logging_presets.get_hook_container(keeper, log_freq=1)
        two_streams = name == "TwoStreamMetricLoss"
        tester = getattr(testers, "GlobalTwoStreamEmbeddingSpaceTester" if two_streams else
                         "GlobalEmbeddingSpaceTester")(
            end_of_testing_hook=hooks.end_of_testing_hook, dataloader_num_workers=0,
            data_device=torch.device("cpu"),
            accuracy_calculator=accuracy_calculator.AccuracyCalculator(k="max_bin_count"))
        models = os.path.join(folder, "models")
        trainer = build(module, name, end_of_iteration_hook=hooks.end_of_iteration_hook,
                        end_of_epoch_hook=hooks.end_of_epoch_hook(
                            tester, {"val": Rows(1 + two_streams, seed=9)}, models, patience=2))
        torch.manual_seed(2)
        trainer.train(num_epochs=epochs)
        history = hooks.get_accuracy_history(tester, "val", return_all_metrics=True)
        hooks.load_latest_saved_models(trainer, models, best=True)
        return hooks.get_loss_history(["total_loss"])["total_loss"], history


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
        (first, our_history), (second, their_history) = (train(module, name, args.n_epochs)
                                                         for module in (ours, theirs))
        print(f"{name}: total loss of the first 8 of {len(first)} iterations")
        print("  ours   " + " ".join(f"{value:.6f}" for value in first[:8]))
        print("  theirs " + " ".join(f"{value:.6f}" for value in second[:8]))
        difference = max(abs(a - b) for a, b in zip(first, second, strict=True))
        print(f"  MAP@R of {len(our_history['epoch'])} epochs, {len(our_history) - 1} series kept")
        key = next(key for key in our_history if key.startswith("mean_average_precision_at_r"))
        print("  ours   " + " ".join(f"{value:.6f}" for value in our_history[key]))
        print("  theirs " + " ".join(f"{value:.6f}" for value in their_history[key]))
        assert our_history.keys() == their_history.keys()
        accuracy = max(abs(a - b) for key, values in our_history.items()
                       for a, b in zip(values, their_history[key], strict=True))
        times = {module: [] for module in (ours, theirs)}
        for _ in range(args.repeats):
            for module in times:
                times[module] += timed(module, name, args.n_epochs)
        milliseconds = [1e3 * statistics.median(times[module]) for module in times]
        rows.append((name, difference, accuracy, *milliseconds))
    print("\n| trainer | largest difference of a loss | of an accuracy | ours, ms an iteration | "
          "theirs | ratio |")
    print("|---|---|---|---|---|---|")
    for name, difference, accuracy, mine, other in rows:
        print(f"| {name} | {difference:.1e} | {accuracy:.1e} | {mine:.2f} | {other:.2f} | "
              f"{mine / other:.2f} |")


if __name__ == "__main__":
    main()
