"""Every loss with its default sampling on glyphs, several seeds: a table of mean and deviation.

python benchmarks/glyphs.py --n_epochs 8 prints the table that stands in README.md. It takes about
a minute for each loss and seed on two CPU cores. For --dataset glyphs alone: a check that all
losses learn, no ranking of losses for photographs.
"""

import argparse
import csv
import os
import statistics
import sys
import tempfile

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))

import losses
import main


def benchmark(seeds, names, epochs):
    """Trains each loss with each seed and prints one row of the table for each loss."""
    print(f"\n| loss | sampling | R@1 untrained | R@1, best of {epochs} epochs "
          "| NMI | F1 |")
    print("|---|---|---|---|---|---|", flush=True)
    for name in names:
        columns = {"untrained": [], "recall@1": [], "nmi": [], "f1": []}
        for seed in seeds:
            with tempfile.TemporaryDirectory() as folder:
                sys.stdout, terminal = open(os.devnull, "w"), sys.stdout
                try:
                    run = main.main(["--dataset", "glyphs", "--loss", name, "--seed", str(seed),
                                     "--n_epochs", str(epochs), "--gpu", "-1",
                                     "--save_path", folder])
                finally:
                    sys.stdout = terminal
                with open(os.path.join(run, "log_val_Base.csv")) as file:
                    rows = list(csv.DictReader(file))
            columns["untrained"].append(float(rows[0]["recall@1"]))
            for metric in ("recall@1", "nmi", "f1"):
                columns[metric].append(max(float(row[metric]) for row in rows[1:]))
        cells = [f"{statistics.mean(values):.3f} ± {statistics.pstdev(values):.3f}"
                 for values in columns.values()]
        sampling = (losses.LOSSES[name].samplings or ("none",))[0]
        print(f"| {name} | {sampling} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--losses", nargs="+", choices=losses.LOSSES, default=list(losses.LOSSES))
    parser.add_argument("--n_epochs", type=int, default=20)
    args = parser.parse_args()
    benchmark(args.seeds, args.losses, args.n_epochs)
