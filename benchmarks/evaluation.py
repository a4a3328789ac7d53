"""Time and memory of the evaluation beside faiss, scikit-learn, pytorch-metric-learning.

python benchmarks/evaluation.py scores synthetic embeddings of the sizes of CUB200, In-Shop and
Stanford Online Products (D = 128, seeded) with evaluate.py and with whichever peers are
installed, and prints times as ratios to the bare product of matrices in blocks, into memory that
is kept or that is new for each block, and to the peer. Each measurement runs in a
process of its own, so that its peak memory is its own. --sizes: rows for which the growth of time
is shown, too.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import time

import numpy as np
import torch

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))

import evaluate

# queries, gallery (0: the queries), classes, noise: R@1 is then 0.5 to 0.9, as in real runs
SETS = {"CUB-like": (5924, 0, 100, 0.16), "In-Shop-like": (14218, 12612, 3985, 0.14),
        "SOP-like": (60502, 0, 11316, 0.14)}
K_VALS = {"CUB-like": (1, 2, 4, 8), "In-Shop-like": (1, 10, 20, 30, 50),
          "SOP-like": (1, 10, 100, 1000)}


def embeddings(queries, gallery, classes, noise, dimensions=128):
    """Unit-norm embeddings around random class centres -> (queries, labels, gallery, labels)."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.nn.functional.normalize(torch.randn(classes, dimensions,
                                                        generator=generator), dim=1)
    parts = []
    for count in (queries, gallery):
        labels = torch.arange(count) % classes
        rows = centres[labels] + noise * torch.randn(count, dimensions, generator=generator)
        parts += [torch.nn.functional.normalize(rows, dim=1), labels]
    return parts if gallery else (*parts[:2], None, None)


def product(queries, _, gallery, __, k_vals):
    """The limit: the bare float32 product of matrices over blocks, into memory kept warm."""
    columns = (queries if gallery is None else gallery).t()
    parts = evaluate.blocks(len(queries), 2 * columns.shape[1])
    kept = torch.empty(parts[0].stop, columns.shape[1])
    for rows in parts:
        torch.mm(queries[rows], columns, out=kept[:rows.stop - rows.start])


def product_fresh(queries, _, gallery, __, k_vals):
    """The same into new memory for each block, as one line of torch does it."""
    columns = (queries if gallery is None else gallery).t()
    for rows in evaluate.blocks(len(queries), 2 * columns.shape[1]):
        queries[rows] @ columns


def recall(*data, k_vals):
    return evaluate.rank_metrics(*data, k_vals, metrics=("recall",))


def ranks(*data, k_vals):
    return evaluate.rank_metrics(*data, k_vals)


def clusters(queries, labels, gallery, gallery_labels, k_vals):
    rows, labels = evaluate.pooled(queries, labels, gallery, gallery_labels)
    assignments, centroids = evaluate.kmeans(rows, len(labels.unique()))
    return {"objective": float((rows - centroids[assignments]).square().sum())}


def scores(queries, labels, gallery, gallery_labels, k_vals):
    """NMI and F1 of given clusters."""
    labels = labels if gallery is None else torch.cat([labels, gallery_labels])
    assignments = labels.roll(1)
    return {"nmi": evaluate.nmi(assignments, labels), "f1": evaluate.f1(assignments, labels)}


def whole(*data, k_vals):
    return evaluate.evaluate_embeddings(*data, k_vals, metrics=("recall", "nmi", "f1"))


def pml_metrics(*data, k_vals):
    return evaluate.evaluate_embeddings(*data, k_vals, metrics=(
        "precision@1", "mrr", "r_precision", "map@r", "map", "nmi", "ami"))


def faiss_search(queries, labels, gallery, gallery_labels, k_vals):
    """Recall at k as the reference code does it: the max(k) + 1 nearest neighbours of faiss."""
    import faiss
    faiss.omp_set_num_threads(torch.get_num_threads())
    others, other_labels = ((queries, labels) if gallery is None else (gallery, gallery_labels))
    index = faiss.IndexFlatL2(queries.shape[1])
    index.add(others.numpy())
    first = int(gallery is None)
    nearest = index.search(queries.numpy(), max(k_vals) + first)[1][:, first:]
    hits = other_labels.numpy()[nearest] == labels.numpy()[:, None]
    return {f"recall@{k}": float(hits[:, :k].any(1).mean()) for k in k_vals}


def faiss_clusters(queries, labels, gallery, gallery_labels, k_vals):
    import faiss
    faiss.omp_set_num_threads(torch.get_num_threads())
    rows, labels = evaluate.pooled(queries, labels, gallery, gallery_labels)
    number = len(labels.unique())
    kmeans = faiss.Kmeans(rows.shape[1], number, niter=20, max_points_per_centroid=10 ** 9,
                          min_points_per_centroid=1)
    # The rows that evaluate.kmeans starts from, so that the objectives can be compared.
    start = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))[:number]
    kmeans.train(rows.numpy(), init_centroids=rows[start].numpy())
    return {"objective": float(kmeans.index.search(rows.numpy(), 1)[0].sum())}


def reference_style(queries, labels, gallery, gallery_labels, k_vals):
    """The whole evaluation as the reference code goes about it, written anew from its description.

    Nearest neighbours and clusters by faiss, NMI by scikit-learn, and F1 from loops over classes
    and clusters.
    """
    import faiss
    from sklearn.metrics import normalized_mutual_info_score
    found = faiss_search(queries, labels, gallery, gallery_labels, k_vals)
    rows, labels = evaluate.pooled(queries, labels, gallery, gallery_labels)
    number = len(labels.unique())
    kmeans = faiss.Kmeans(rows.shape[1], number, niter=20, max_points_per_centroid=10 ** 9,
                          min_points_per_centroid=1)
    kmeans.train(rows.numpy())
    assignments = kmeans.index.search(rows.numpy(), 1)[1][:, 0]
    labels = labels.numpy()
    pairs_of_clusters = sum(n * (n - 1) for n in np.bincount(assignments).tolist())
    pairs_of_classes = sum(n * (n - 1) for n in np.bincount(labels).tolist())
    pairs_of_both = 0
    for label in np.unique(labels):
        of_class = assignments[labels == label]
        for cluster in np.unique(of_class):
            both = int((of_class == cluster).sum())
            pairs_of_both += both * (both - 1)
    return {**found, "nmi": float(normalized_mutual_info_score(labels, assignments)),
            "f1": 2 * pairs_of_both / (pairs_of_clusters + pairs_of_classes)}


def pml_scores(queries, labels, gallery, gallery_labels, k_vals):
    """That library's P@1, R-precision, MAP@R, MAP, MRR, NMI and AMI."""
    from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator
    calculator = AccuracyCalculator(k="max_bin_count", device=torch.device("cpu"))
    given = () if gallery is None else (gallery, gallery_labels)
    return calculator.get_accuracy(queries, labels, *given)


def sklearn_scores(queries, labels, gallery, gallery_labels, k_vals):
    from sklearn.metrics import normalized_mutual_info_score
    labels = labels if gallery is None else torch.cat([labels, gallery_labels])
    return {"nmi": float(normalized_mutual_info_score(labels, labels.roll(1)))}


JOBS = {job.__name__: job for job in (
    product, product_fresh, recall, ranks, clusters, scores, whole, pml_metrics, faiss_search,
    faiss_clusters, reference_style, pml_scores, sklearn_scores)}


def measure(job, data, k_vals, repeats):
    """Least seconds of so many runs, the peak memory beyond the data in MiB, and the result."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        result = JOBS[job](*data, k_vals=k_vals)
        seconds.append(time.perf_counter() - start)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return {"seconds": min(seconds), "MiB": peak / 1024, "result": result}


def in_process(job, name, repeats):
    """measure in a new process; None where it fails, as without the peer."""
    done = subprocess.run([sys.executable, __file__, "--job", job, "--set", name, "--repeats",
                           str(repeats)], capture_output=True, text=True)
    if done.returncode:
        print(f"{job}: {(done.stderr.strip() or 'killed').splitlines()[-1]}", file=sys.stderr)
        return None
    return json.loads(done.stdout.splitlines()[-1])


def table(name, repeats):
    """Measures one set and prints its rows."""
    found = {job: in_process(job, name, repeats) for job in JOBS}
    limits = [found[job]["seconds"] for job in ("product", "product_fresh")]

    def row(what, job, *peers):
        if found[job] is None:
            print(f"| {what} | not measured | | | | |")
            return
        seconds = found[job]["seconds"]
        ratios = ", ".join(f"{seconds / found[peer]['seconds']:.2f} of {peer}" for peer in peers
                           if found[peer] is not None)
        print(f"| {what} | {seconds:.3f} | "
              + " | ".join(f"{seconds / limit:.2f}" for limit in limits)
              + f" | {found[job]['MiB']:.0f} | {ratios} |", flush=True)

    print(f"\n{name}: {SETS[name][0]:,} queries"
          + (f" against {SETS[name][1]:,}" if SETS[name][1] else "")
          + f", {SETS[name][2]:,} classes; k = {' '.join(map(str, K_VALS[name]))}\n")
    print("| what | seconds | of the bare product | of it into new memory | MiB | beside peers |")
    print("|---|---|---|---|---|---|")
    row("bare product of matrices, into kept memory", "product")
    row("the same, into new memory for each block", "product_fresh")
    row("recall at all k", "recall", "faiss_search")
    row("faiss IndexFlatL2", "faiss_search")
    row("recall, MRR, R-precision, MAP@R, MAP", "ranks")
    row("k-means, 20 iterations", "clusters", "faiss_clusters")
    row("faiss k-means, 20 iterations", "faiss_clusters")
    row("NMI and F1 of given clusters", "scores", "sklearn_scores")
    row("recall, k-means, NMI, F1", "whole", "reference_style")
    row("the same as the reference does it: faiss, scikit-learn, loops", "reference_style")
    row("P@1, MRR, R-precision, MAP@R, MAP, NMI, AMI", "pml_metrics", "pml_scores")
    row("pytorch-metric-learning's AccuracyCalculator", "pml_scores")
    for job in ("clusters", "faiss_clusters", "recall", "faiss_search", "ranks"):
        if found[job] is not None:
            print(f"{job}: " + ", ".join(f"{key} {value:.6g}"
                                         for key, value in found[job]["result"].items()))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--sets", nargs="+", choices=SETS, default=list(SETS))
    parser.add_argument("--repeats", type=int, default=3, help="runs, of which the fastest counts")
    parser.add_argument("--sizes", type=int, nargs="*", default=[10000, 30000, 60000, 120000],
                        help="numbers of rows for the growth of time; none: leave it out")
    parser.add_argument("--job", choices=JOBS, help=argparse.SUPPRESS)
    parser.add_argument("--set", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.job:
        print(json.dumps(measure(args.job, embeddings(*SETS[args.set]), K_VALS[args.set],
                                 args.repeats)))
        return
    print(f"torch {torch.__version__}, numpy {np.__version__}, {torch.get_num_threads()} threads")
    for name in args.sets:
        table(name, args.repeats)
    if args.sizes:
        print("\n| rows | bare product, s | recall | all rank metrics |\n|---|---|---|---|")
    for size in args.sizes:
        data = embeddings(size, 0, max(2, size // 5), 0.14)
        seconds = [measure(job, data, (1, 10, 100, 1000), 1)["seconds"]
                   for job in ("product", "recall", "ranks")]
        print(f"| {size:,} | " + " | ".join(f"{value:.2f}" for value in seconds) + " |",
              flush=True)


if __name__ == "__main__":
    main()
