"""Retrieval and clustering metrics on embeddings, and the pass that computes the embeddings.

The metrics are pure functions on tensors, on the tensors' own device, in blocks: no N x N matrix
is held. Distances are Euclidean. evaluate_embeddings is the one entry for all of them;
evaluate_sets runs it on a network and evaluation sets, and this file on saved embeddings:
python evaluate.py embeddings.npz. A new metric is a function and a row of METRICS. Choosing the
best epoch, saving and plotting its course is the caller's.
"""

import concurrent.futures
import contextlib
import functools
import json
import math
import signal
import sys
import threading
import typing

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while torch loads

import numpy as np
import torch

import auxiliaries

BLOCK_ELEMENTS = 2 ** 25  # numbers held at a time: 128 MiB in float32
ROUNDING = 2e-14  # squared distances that differ by less, relatively, are the same
NMI_AVERAGES = ("arithmetic", "geometric")  # the first is the default, here and below
PROTOCOLS = ("all_vs_all", "random_gallery")
DEFAULT_METRICS = ("recall", "map@r", "nmi", "f1")
DEFAULT_K_VALS = (1, 2, 4, 8)


def add_arguments(parser):
    """Adds the group 'evaluation' to an argparse parser; --k_vals is a list, the rest scalars."""
    group = parser.add_argument_group("evaluation (on the test classes)")
    whole = auxiliaries.number(int, least=1)
    group.add_argument("--k_vals", type=whole, nargs="+", metavar="K",
                       help="recall at k: the share of queries with a true match among their k "
                            "nearest. Default 1 2 4 8; online_products 1 10 100 1000; in-shop 1 "
                            "10 20 30 50; vehicle_id 1 5 (the literature's), as far as there are "
                            "so many images")
    add_metric_arguments(group)
    group.add_argument("--cluster_every", type=whole, default=1, metavar="N",
                       help="measure nmi, ami and f1 only in every N-th evaluated epoch and the "
                            "last one. Default %(default)s")
    group.add_argument("--dist_measure", action="store_true",
                       help="also log dist_ratio, distances within classes over those of their "
                            "centres")
    group.add_argument("--eval_every", type=whole, default=1, metavar="N",
                       help="evaluate after every N epochs, and after the last one. Default "
                            "%(default)s")
    group.add_argument("--grad_measure", action="store_true",
                       help="also save the mean absolute gradient at each feature of the trunk, "
                            "for every iteration, as one pickle file an epoch")


def add_memory_argument(group):
    """Adds --eval_memory, a scalar, which a run and this file alone share."""
    group.add_argument("--eval_memory", type=auxiliaries.number(float, above=0), metavar="GIB",
                       help="the most memory for blocks of distances, in GiB; little is slower. "
                            "Default 1 on the CPU, a quarter of what is free on a GPU")


def add_metric_arguments(group):
    """Adds the flags that a run and this file alone share: lists of names, and scalars."""
    group.add_argument("--metrics", nargs="+", choices=(*METRICS, "all"),
                       default=list(DEFAULT_METRICS), metavar="M",
                       help=f"what is measured, of {', '.join(METRICS)}, or all; README, Metrics, "
                            f"has the rules. Default {' '.join(DEFAULT_METRICS)}")
    group.add_argument("--nmi_average", choices=NMI_AVERAGES, default=NMI_AVERAGES[0],
                       metavar="MEAN",
                       help="NMI divides by this mean of the two entropies, arithmetic, or "
                            "geometric (reference results). Default %(default)s")
    group.add_argument("--vehicle_protocol", choices=PROTOCOLS, default=PROTOCOLS[0],
                       help="vehicle_id: all_vs_all compares each test list with itself (the "
                            "reference code); random_gallery takes one random image of each "
                            "vehicle as gallery, the rest as queries, and averages ten repeats "
                            f"(the dataset's own). Default {PROTOCOLS[0]}")


# ---- metrics


def recall(ranks, count, k_vals):
    """Whether a true match is among the k nearest, for each k: {"recall@k": [Q] bool}.

    ranks [Q, T], count [Q], here and in the next five: see Metric. The mean is the share of
    queries that find one, the literature's "R@k". Jegou et al., TPAMI 2011.
    """
    return {f"recall@{k}": ranks[:, 0] <= k for k in k_vals}


def precision_at_1(ranks, count):
    """Whether the nearest row is a true match: [Q] bool. The same as recall at 1."""
    return ranks[:, 0] <= 1


def reciprocal_rank(ranks, count):
    """One over the rank of the nearest true match: [Q]. Its mean is the MRR."""
    return 1 / ranks[:, 0]


def r_precision(ranks, count):
    """The share of true matches among the R nearest, where R is how many there are: [Q]."""
    return (ranks <= count.unsqueeze(1)).sum(1) / count


def average_precision_at_r(ranks, count):
    """The mean over the R nearest of the precision at each true match among them, over R: [Q].

    Musgrave et al., "A Metric Learning Reality Check", ECCV 2020: MAP@R.
    """
    return (precision(ranks) * (ranks <= count.unsqueeze(1))).sum(1) / count


def average_precision(ranks, count):
    """The mean over all true matches of the precision at the rank of each: [Q]."""
    return precision(ranks).sum(1) / count


def precision(ranks):
    """At the rank of each true match, the share of true matches up to there: [Q, T]."""
    return torch.arange(1, ranks.shape[1] + 1, device=ranks.device) / ranks


def nmi(assignments, labels, average="arithmetic"):
    """Normalised mutual information of clusters and classes, [N] and [N] ints -> float in [0, 1].

    Normalised by the arithmetic mean of the two entropies, scikit-learn's default since 0.22, or
    by the geometric one, with which the reference results were made. 1 if there is one cluster and
    one class. Manning et al., "Introduction to Information Retrieval", 2008, section 16.3.
    """
    def entropy(sizes):
        return float(-(sizes / len(labels) * (sizes / len(labels)).log()).sum())

    clusters, classes, cells = (entropy(sizes) for sizes in contingency(assignments, labels))
    if clusters + classes == 0:
        return 1.0
    mean = (clusters + classes) / 2 if average == "arithmetic" else (clusters * classes) ** 0.5
    # Mutual information is H(clusters) + H(classes) - H(both); rounding can lead just outside.
    return min(1.0, max(0.0, (clusters + classes - cells) / mean)) if mean else 0.0


def ami(assignments, labels):
    """Mutual information adjusted for chance, [N] and [N] ints -> scalar up to 1; by scikit-learn.

    0 is what random clusters get. Vinh, Epps, Bailey, JMLR 2010; arithmetic mean. On tens of
    thousands of rows in thousands of classes it takes many seconds.
    """
    from sklearn.metrics import adjusted_mutual_info_score  # here: a second to import
    return float(adjusted_mutual_info_score(labels.cpu().numpy(), assignments.cpu().numpy()))


def f1(assignments, labels):
    """Pairwise F1 of clusters and classes, [N] and [N] ints -> float in [0, 1].

    Of all pairs of rows, precision is the share of same-cluster pairs that are of one class,
    recall the share of same-class pairs in one cluster; F1 is their harmonic mean, 0 if there are
    no such pairs. Counted from the contingency table. Manning et al., "Introduction to Information
    Retrieval", 2008, section 16.3.
    """
    clusters, classes, cells = (float((sizes * (sizes - 1)).sum())  # twice the number of pairs
                                for sizes in contingency(assignments, labels))
    return 2 * cells / (clusters + classes) if clusters + classes else 0.0


def distance_ratio(embeddings, labels):
    """Mean distance within classes over mean distance between classes -> float; small is compact.

    embeddings [N, D], labels [N]. Within: the mean over classes of two rows or more of the mean
    distance of their pairs. Between: the mean distance of the classes' centres of mass. 0 if no
    class has a pair, infinite if all centres coincide. The reference code's --dist_measure is of
    cosine distances and normalised centres, on the training images.
    """
    embeddings, labels = centred(embeddings)[1], labels.unique(return_inverse=True)[1]
    (embeddings,), _ = near_one(embeddings)
    counts = torch.bincount(labels)                                              # [C]
    sums = sums_of_groups(sums_to_own_class(embeddings, labels).unsqueeze(1), labels, len(counts))
    pairs = counts * (counts - 1)
    within = sums.squeeze(1)[pairs > 0] / pairs[pairs > 0]
    centres = sums_of_groups(embeddings, labels, len(counts)) / counts.unsqueeze(1)
    between = (sum_across_classes(centres, torch.arange(len(centres), device=centres.device))
               / max(1, len(centres) * (len(centres) - 1)))
    if not len(within):
        return 0.0
    return float(within.mean()) / between if between > 0 else float("inf")


def spectral_decay(embeddings, labels=None):
    """rho: how far the singular values are from equal, embeddings [N, D] -> float from 0 to inf.

    The Kullback-Leibler divergence of the singular values, divided by their sum, from the uniform
    distribution: -log D - mean(log s). 0: every direction is used alike; inf: one is not used at
    all. Labels play no part. Roth et al., "Revisiting Training Strategies and Generalization
    Performance in Deep Metric Learning", ICML 2020, section 5.
    """
    # Those of the triangular factor are those of the whole, to full precision.
    values = torch.linalg.svdvals(torch.linalg.qr(embeddings.double(), mode="r").R)
    least = values.max() * max(embeddings.shape) * torch.finfo(torch.float64).eps  # rounding
    if len(values) < embeddings.shape[1] or values.min() <= least:
        return float("inf")
    shares = values / values.sum()
    return max(0.0, -math.log(len(shares)) - shares.log().mean().item())


def mean_distances(embeddings, labels):
    """Mean distance of pairs of one class, and of two: {"d_ap": float, "d_an": float}.

    embeddings [N, D], labels [N]. NaN where there is no such pair. All pairs are counted; those of
    two classes, of more than 4,096 rows, from products in float32.
    """
    embeddings, labels = centred(embeddings)[1], labels.unique(return_inverse=True)[1]
    (embeddings,), scale = near_one(embeddings)
    counts = torch.bincount(labels)
    same = int((counts * (counts - 1)).sum())
    different = len(labels) * (len(labels) - 1) - same
    return {"d_ap": scale * float(sums_to_own_class(embeddings, labels).sum()) / same if same
            else float("nan"),
            "d_an": scale * sum_across_classes(embeddings, labels) / different if different
            else float("nan")}


class Metric(typing.NamedTuple):
    """A row of METRICS. function gives a value, a float but for ranks, or {column: value}.

    kind says what function gets, and when it is called:
    "ranks": ranks [Q, T] of each query's true matches, ascending, infinite where it has fewer than
    T; count [Q], how many it has, at least 1; both float64. It gives a value for each query, [Q];
    the mean of those with a true match is logged.
    "nearest": the same, but it needs only ranks[:, 0]. Where no metric needs more, that is faster.
    "clusters": clusters [N] and classes [N] of all images, int64.
    "set": embeddings [N, D] and classes [N] of all images.
    better: max or min, whichever is the best value; {column: max or min} where they differ.
    """

    function: typing.Callable
    kind: str
    better: typing.Any


METRICS = {
    "recall": Metric(recall, "nearest", max),
    "precision@1": Metric(precision_at_1, "nearest", max),
    "mrr": Metric(reciprocal_rank, "nearest", max),
    "r_precision": Metric(r_precision, "ranks", max),
    "map@r": Metric(average_precision_at_r, "ranks", max),
    "map": Metric(average_precision, "ranks", max),
    "nmi": Metric(nmi, "clusters", max),
    "ami": Metric(ami, "clusters", max),
    "f1": Metric(f1, "clusters", max),
    "dist_ratio": Metric(distance_ratio, "set", min),
    "rho": Metric(spectral_decay, "set", min),
    "distances": Metric(mean_distances, "set", {"d_ap": min, "d_an": max}),
}
RANK_METRICS = tuple(name for name in METRICS if METRICS[name].kind in ("ranks", "nearest"))
CLUSTER_METRICS = tuple(name for name in METRICS if METRICS[name].kind == "clusters")


def metric_of(column):
    """The row of METRICS of a log's column, such as "set 1 recall@4" or "d_ap"; None for others."""
    column = column.rpartition(" ")[2]
    return next((metric for name, metric in METRICS.items()
                 if name in (column, column.partition("@")[0])
                 or isinstance(metric.better, dict) and column in metric.better), None)


def best_of(column):
    """min or max, whichever is the best of a log's column, such as "set 1 recall@4" or "rho"."""
    better = getattr(metric_of(column), "better", max)
    return better[column.rpartition(" ")[2]] if isinstance(better, dict) else better


def percent_of(column):
    """What a log's column is multiplied by in tables: 100, but 1 where it is of embeddings."""
    return 1 if getattr(metric_of(column), "kind", "") == "set" else 100


def measured(kinds, metrics, inputs, **options):
    """{column: value} of those of metrics, names, that are of these kinds; all get the inputs.

    options: further arguments of some metrics, {metric: {argument: value}}.
    """
    found = {}
    for name, metric in METRICS.items():
        if name in metrics and metric.kind in kinds:
            value = metric.function(*inputs, **options.get(name, {}))
            found |= value if isinstance(value, dict) else {name: value}
    return found


def recall_at_k(queries, query_labels, gallery=None, gallery_labels=None, k_vals=DEFAULT_K_VALS,
                own=None):
    """The share of queries with a true match among their k nearest -> {"recall@k": float}.

    queries [Q, D], query_labels [Q]; gallery [G, D] and gallery_labels [G], or None to compare the
    queries with each other; own [Q] as in own_rows. Values in [0, 1]; errors as rank_metrics.
    """
    return rank_metrics(queries, query_labels, gallery, gallery_labels, k_vals, own, ("recall",))


def rank_metrics(queries, query_labels, gallery=None, gallery_labels=None, k_vals=DEFAULT_K_VALS,
                 own=None, metrics=RANK_METRICS, memory=None, same=None):
    """The rank metrics, means over the queries with a true match -> {column: float in [0, 1]}.

    queries [Q, D], query_labels [Q], gallery, gallery_labels, own, memory, same: as in
    rank_scores. metrics: some of RANK_METRICS. Queries whose class is nowhere in the gallery are
    left out of every mean. ValueError if that leaves none, or for a k outside 1 to the number of
    neighbours.
    """
    check_embeddings(queries, query_labels, gallery, gallery_labels)
    if "recall" in metrics:
        check_k_vals(k_vals, number_compared(queries, gallery, own))
    rank = rank_scores if auxiliaries.num_ranks() == 1 else shared_rank_scores
    scores = rank(queries, query_labels, gallery, gallery_labels, own, metrics, k_vals, memory,
                  same)
    found = scores["matches"] > 0
    if not found.any():
        raise ValueError("no query has a true match to find: each class needs two images, or one "
                         "among the queries and one in the gallery")
    return {name: values[found].mean().item() for name, values in scores.items()
            if name not in ("matches", "first_rank")}


# ---- sets


@torch.no_grad()
def evaluate_embeddings(queries, query_labels, gallery=None, gallery_labels=None, k_vals=None,
                        seed=0, own=None, metrics=DEFAULT_METRICS, nmi_average=NMI_AVERAGES[0],
                        memory=None, vehicle_protocol=PROTOCOLS[0]):
    """The metrics of one evaluation set -> {column: float}, in the order of METRICS.

    queries [Q, D] and query_labels [Q], compared with gallery [G, D], gallery_labels [G] or,
    without one, with each other; own [Q] as in own_rows. Tensors, arrays or lists; labels that are
    no tensors may be texts. k_vals: by default those of DEFAULT_K_VALS that the gallery allows.
    metrics: names of METRICS. All but the rank metrics are of queries and gallery together, of
    which k-means, starting from the seed, makes as many clusters as there are classes.
    vehicle_protocol: "random_gallery" takes the rank metrics of a set without a gallery from
    random_gallery. memory: bytes for blocks of distances.
    """
    queries, gallery, own = (part if part is None else torch.as_tensor(part)
                             for part in (queries, gallery, own))
    labels = [part for part in (query_labels, gallery_labels) if part is not None]
    if not all(map(torch.is_tensor, labels)):
        labels = [part.to(queries.device) for part in number_labels(*labels)]
    query_labels, gallery_labels = labels[0], None if gallery is None else labels[1]
    check_embeddings(queries, query_labels, gallery, gallery_labels)
    random = gallery is None and vehicle_protocol == "random_gallery"
    if k_vals is None and "recall" in metrics:
        k_vals = allowed_k_vals(DEFAULT_K_VALS, len(query_labels.unique()) if random else
                                number_compared(queries, gallery, own))
    found = {}
    if any(METRICS[name].kind in ("ranks", "nearest") for name in metrics):
        found = (random_gallery(queries, query_labels, k_vals, metrics, seed, memory=memory)
                 if random else rank_metrics(queries, query_labels, gallery, gallery_labels,
                                             k_vals, own, metrics, memory))
    pool = pooled(queries, query_labels, gallery, gallery_labels, own)
    return found | auxiliaries.from_first(lambda: set_metrics(*pool, seed, metrics, nmi_average))


def set_metrics(embeddings, labels, seed, metrics, nmi_average):
    """The metrics that are not ranks, of one set: embeddings [N, D], labels [N] -> dict."""
    found = {}
    if any(METRICS[name].kind == "clusters" for name in metrics):
        clusters, _ = kmeans(embeddings, len(labels.unique()), seed=seed)
        found = measured(("clusters",), metrics, (clusters, labels), nmi={"average": nmi_average})
    return found | measured(("set",), metrics, (embeddings, labels))


def random_gallery(rows, labels, k_vals=(1, 5), metrics=("recall", "map@r"), seed=0, repeats=10,
                   memory=None):
    """Rank metrics with one random row of each class as gallery, the mean of repeats -> dict.

    rows [N, D], labels [N]; metrics, memory: as in rank_metrics. The protocol of VehicleID (Liu et
    al., CVPR 2016): the other rows are the queries. Classes of one row are in the gallery alone.
    """
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(repeats):
        shuffled = torch.randperm(len(labels), generator=generator).to(labels.device)
        classes, order = labels[shuffled].sort(stable=True)
        first = order[classes.diff(prepend=classes[:1] - 1) != 0]
        in_gallery = torch.zeros(len(labels), dtype=torch.bool, device=labels.device)
        in_gallery[shuffled[first]] = True
        if in_gallery.all():
            raise ValueError("no query has a true match to find: each class has one image")
        found.append(rank_metrics(
            rows[~in_gallery], labels[~in_gallery], rows[in_gallery], labels[in_gallery], k_vals,
            metrics=metrics, memory=memory))
    return {name: sum(scores[name] for scores in found) / repeats for name in found[0]}


@torch.inference_mode()
def embed(network, dataset, device, batch_size=112, num_workers=0, progress=None):
    """The embeddings of a dataset, in its order -> (embeddings [N, D] float32, labels [N] int64).

    network: anything that turns images [B, 3, H, W] on the device into embeddings [B, D]; it
    should be in eval mode. Both results are on the device. Of several processes each embeds its
    share, batch_size images at once, and all have the whole result. progress: callable(images
    done, of how many in the share), called after each batch.
    """
    share = auxiliaries.share_of(len(dataset))
    loader = torch.utils.data.DataLoader(dataset, batch_size=batch_size, num_workers=num_workers,
                                         sampler=share,
                                         worker_init_fn=auxiliaries.heed_parent_alone,
                                         generator=torch.Generator(),  # draws nothing globally
                                         pin_memory=torch.device(device).type == "cuda"
                                         and not getattr(dataset, "on_device", False))
    parts = []
    for images, labels in loader:
        parts.append((network(images.to(device, non_blocking=True)).float(), labels))
        if progress:
            progress(min(len(parts) * batch_size, len(share)), len(share))
    embeddings, labels = map(torch.cat, zip(*parts))
    return tuple(auxiliaries.gather_rows(part)[:len(dataset)]
                 for part in (embeddings, labels.to(device)))


def evaluate_sets(network, sets, device, k_vals=DEFAULT_K_VALS, batch_size=112, num_workers=0,
                  progress=None, **scoring):
    """Embeds each set and scores it -> (metrics, [(queries, gallery or None), ...]).

    sets: tuples (name, queries, gallery) as datasets.EvaluationSet: a dataset of queries, and the
    dataset, or list of datasets, that they are compared with; None: with each other. A list may
    hold the queries too, as in ("val", val, [train, val]): each is left out of its own neighbours.
    Labels of one set's datasets are of one numbering. Each dataset is embedded once. metrics: one
    dict, its keys preceded by the set's name where it has one. The second result holds the sets'
    embeddings, [Q, D] and [G, D]. progress: as in embed. scoring: seed, metrics, nmi_average,
    memory, vehicle_protocol, as in evaluate_embeddings; scoring_select gives all of a run's.
    """
    metrics, embedded = {}, []
    embed_once = functools.cache(lambda dataset: embed(network, dataset, device, batch_size,
                                                       num_workers, progress))
    for name, queries, gallery in sets:
        query_rows, query_labels = embed_once(queries)
        gallery_rows = gallery_labels = own = None
        if gallery is not None:
            parts = list(gallery) if isinstance(gallery, (list, tuple)) else [gallery]
            gallery_rows, gallery_labels = map(torch.cat, zip(*map(embed_once, parts)))
            if queries in parts:
                start = sum(map(len, parts[:parts.index(queries)]))
                own = torch.arange(start, start + len(queries), device=query_rows.device)
        scores = evaluate_embeddings(query_rows, query_labels, gallery_rows, gallery_labels,
                                     k_vals, own=own, **scoring)
        metrics |= {f"{name} {column}".strip(): value for column, value in scores.items()}
        embedded.append((query_rows, gallery_rows))
    return metrics, embedded


def k_vals_select(opt, sets):
    """--k_vals, sorted, as far as each of the sets has so many images; ValueError if it was given.

    sets: as evaluate_sets takes them.
    """
    k_vals = sorted(set(opt.k_vals))
    for name, queries, gallery in sets:
        available = (len(set(queries.labels)) if opt.vehicle_protocol == "random_gallery" else
                     number_compared(queries, gallery))
        if "k_vals" not in opt.given:
            k_vals = allowed_k_vals(k_vals, available)
        held = f" (of the classes held out by --val_split {opt.val_split})" * (name == "val")
        check_k_vals(k_vals, available, held)
    return k_vals


def scoring_select(opt, epoch, device):
    """The options of the evaluation after an epoch -> keyword arguments of evaluate_sets."""
    clusters = epoch == opt.n_epochs or epoch % (opt.cluster_every * opt.eval_every) == 0
    return {"k_vals": opt.k_vals, "num_workers": opt.kernels, "seed": opt.seed,
            "batch_size": -(-opt.eval_bs // auxiliaries.num_ranks()),
            "metrics": [name for name in opt.metrics if clusters or name not in CLUSTER_METRICS],
            "nmi_average": opt.nmi_average, "vehicle_protocol": opt.vehicle_protocol,
            "memory": memory_bytes(opt.eval_memory, device)}


def own_rows(queries, gallery=None, own=None):
    """The gallery row [Q] that is the query itself and never its neighbour; None if none is.

    Without a gallery the queries [Q, D] are compared with each other. own [Q] int64 says it for a
    gallery [G, D] that holds the queries. An exact duplicate in another row is a neighbour.
    """
    return torch.arange(len(queries), device=queries.device) if gallery is None else own


def number_compared(queries, gallery=None, own=None):
    """How many gallery rows each query is compared with; see own_rows. [Q, D], [G, D], [Q]."""
    if gallery is None:
        return len(queries) - 1
    return len(gallery) - (own is not None)


def allowed_k_vals(k_vals, available):
    """Of default k_vals those that available, the number of neighbours, a scalar, allows."""
    kept = [k for k in k_vals if k <= available]
    if 0 < len(kept) < len(k_vals):
        print(f"note: no recall at {' '.join(str(k) for k in k_vals if k not in kept)}, as each "
              f"query has {available} images to be compared with")
    return kept or k_vals


def check_k_vals(k_vals, available, note=""):
    """ValueError for a k (scalars) that is not from 1 to the number of available neighbours."""
    wrong = [k for k in k_vals if not 1 <= k <= available]
    if wrong:
        raise ValueError(f"--k_vals {' '.join(map(str, wrong))}: each query has {available} "
                         f"images to be compared with, so k is from 1 to {available}{note}")


def check_embeddings(queries, query_labels, gallery, gallery_labels):
    """Raises ValueError unless queries [N, D] and labels [N] (and the gallery's) fit together."""
    for embeddings, labels, name in ((queries, query_labels, "query"),
                                     (gallery, gallery_labels, "gallery")):
        if embeddings is None:
            continue
        if (embeddings.dim() != 2 or len(embeddings) != len(labels) or not len(labels)
                or not embeddings.shape[1]):
            raise ValueError(f"{name} embeddings of shape {list(embeddings.shape)} with "
                             f"{len(labels)} labels; expected [N, D] with N labels, N above 0 "
                             "and D above 0")
        bad = ~torch.isfinite(embeddings).all(1)
        if bad.any():
            raise ValueError(f"{int(bad.sum())} of {len(bad)} {name} embeddings are not finite, "
                             f"the first is row {int(bad.int().argmax())}")
    if gallery is not None and queries.shape[1] != gallery.shape[1]:
        raise ValueError(f"query embeddings have {queries.shape[1]} dimensions, gallery "
                         f"embeddings {gallery.shape[1]}")


def pooled(queries, query_labels, gallery=None, gallery_labels=None, own=None):
    """Every image of a set once -> (embeddings [N, D], labels [N]); arguments as above."""
    if gallery is None:
        return queries, query_labels
    if own is not None:  # the gallery holds the queries
        return gallery, gallery_labels
    return torch.cat([queries, gallery]), torch.cat([query_labels, gallery_labels])


def memory_bytes(gib, device):
    """--eval_memory, a scalar, in bytes; by default 1 GiB, on a GPU a quarter of what is free."""
    if gib is not None:
        return int(gib * 2 ** 30)
    if device.type != "cuda":
        return 2 ** 30
    held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # by torch
    return (torch.cuda.mem_get_info(device)[0] + held) // 4


# ---- pictures


def draw_recoveries(path, queries, gallery, query_rows, gallery_rows, seed=0, rows=10,
                    neighbours=5, title=""):
    """Writes a picture of some queries and their nearest neighbours to a PNG file.

    queries, gallery: ImageDataset (gallery None: the queries themselves); query_rows [Q, D] and
    gallery_rows [G, D] their embeddings. Queries, drawn at random with the seed, are framed red,
    neighbours of the same class green, others grey and crossed out. title: a few words on top.
    """
    chosen, own = np.random.default_rng(seed).permutation(len(queries))[:rows].tolist(), None
    others = gallery
    if gallery is None:
        others, gallery_rows = queries, query_rows
        own = torch.tensor(chosen, device=query_rows.device)
    available = number_compared(query_rows, gallery_rows, own)
    _, nearest = knn(query_rows[chosen], gallery_rows, min(neighbours, available), own)
    grid = []
    for query, indices in zip(chosen, nearest.tolist()):
        row = [(queries.load(query), "query")]
        for i in indices:
            hit = (queries.class_names[queries.labels[query]]
                   == others.class_names[others.labels[i]])
            row.append((others.load(i), "hit" if hit else "miss"))
        grid.append(row)
    auxiliaries.save_image_grid(path, grid, title=title)


def draw_embeddings(path, dataset, embeddings, method="pca", seed=0, most=2000, title=()):
    """Draws embeddings [N, D] in two dimensions, coloured by class, to an SVG file.

    dataset: ImageDataset, whose labels and class names they have. method: "pca", the two
    directions of greatest variance, or "tsne" (van der Maaten and Hinton, JMLR 2008; perplexity
    30), which keeps neighbours together. Of more than `most` embeddings a sample drawn with the
    seed is shown; t-SNE takes seconds for 2,000. title: header lines above the one that says this.
    """
    import threadpoolctl  # scikit-learn brings it along
    from sklearn.decomposition import PCA  # here, since they take a second to import
    from sklearn.manifold import TSNE

    chosen = np.sort(np.random.default_rng(seed).permutation(len(embeddings))[:most])
    points = embeddings[torch.from_numpy(chosen).to(embeddings.device)].double().cpu().numpy()
    size = np.abs(points).max()
    points = np.pad(points - points.mean(0), ((0, 0), (0, max(0, 2 - points.shape[1]))))
    spread = np.abs(points).max()
    if spread <= 1e-7 * size:  # all in one place, up to rounding
        points, drawn = np.zeros((len(points), 2)), "all in one place"
    elif method == "tsne" and len(points) > 4:
        # One thread: beside another program its threads wait for each other for minutes.
        with threadpoolctl.threadpool_limits(1):
            points = TSNE(perplexity=min(30, (len(points) - 1) / 3),
                          random_state=seed).fit_transform(points / spread)
        drawn = "t-SNE"
    else:
        points, drawn = PCA(2, svd_solver="full").fit_transform(points), "PCA"
    names = [dataset.class_names[dataset.labels[i]] for i in chosen]
    count = f"{len(chosen):,}" + f" of {len(embeddings):,}" * (len(chosen) < len(embeddings))
    auxiliaries.save_scatter(
        path, [*title, f"{count} test embeddings, {drawn}, coloured by class"], points, names)


# ---- files, and the command line


def save_embeddings(path, embeddings, labels, **settings):
    """Writes embeddings [N, D], labels [N] and the run's settings, which JSON can hold, to a file.

    main takes as settings what its flags leave open, and device and gallery_file.
    """
    with auxiliaries.written_whole(path) as file:
        np.savez(file, embeddings=embeddings.cpu().numpy(), labels=np.asarray(labels),
                 settings=json.dumps(settings))


def read_embeddings(path):
    """An npz file -> (embeddings [N, D] float, labels [N] of any type, the run's settings).

    A file from elsewhere has no settings. FileNotFoundError, or ValueError where the file is not
    such a one; nothing in it is executed.
    """
    try:
        with open(path, "rb") as opened, np.load(opened, allow_pickle=False) as file:
            embeddings, labels = np.asarray(file["embeddings"]), np.asarray(file["labels"])
            settings = dict(json.loads(str(file["settings"]))) if "settings" in file else {}
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no file {path}") from None
    except Exception as error:  # numpy raises half a dozen types for damaged or pickled files
        raise ValueError(f"{path} cannot be read as an npz file of arrays embeddings [N, D] and "
                         f"labels [N]: {auxiliaries.one_line(error) or type(error).__name__}"
                         ) from error
    if (embeddings.ndim != 2 or embeddings.dtype.kind not in "fiu" or labels.ndim != 1
            or labels.dtype.kind not in "fiubUS"):
        raise ValueError(f"{path}: embeddings {list(embeddings.shape)} of {embeddings.dtype} and "
                         f"labels {list(labels.shape)} of {labels.dtype}; expected numbers [N, D] "
                         "and labels [N], numbers or texts")
    exact = np.float32 if np.can_cast(embeddings.dtype, np.float32) else np.float64
    return embeddings.astype(exact), labels, settings


def number_labels(*labels):
    """Arrays or lists of labels, [N] each -> as many int64 tensors, numbered together, in order.

    Numbers of different types are equal as numbers; where some labels are texts, all are.
    """
    numbers = np.unique(np.concatenate(labels), return_inverse=True)[1]
    return torch.from_numpy(numbers).split([len(part) for part in labels])


def main(argv=None):
    """Scores files of embeddings [N, D]; prints a table, or JSON; one message on bad input."""
    parser = auxiliaries.Parser(
        prog="evaluate.py",
        description="Scores embeddings from any model, saved as arrays embeddings [N, D] and "
                    "labels [N] (numbers or texts) in an npz file. What is not given is as in the "
                    "run that saved the file; where none did, as the defaults below say.")
    parser.add_argument("embeddings", help="npz file of the queries")
    parser.add_argument("--gallery", metavar="FILE", help="npz file that the queries are compared "
                        "with. Default: with each other, each left out of its own neighbours")
    add_metric_arguments(parser)
    add_memory_argument(parser)
    parser.add_argument("--k_vals", type=auxiliaries.number(int, least=1), nargs="+", metavar="K",
                        help="recall at k. Default 1 2 4 8, as far as there are images to be "
                             "compared with")
    parser.add_argument("--seed", type=auxiliaries.number(int, least=0, below=2 ** 32), default=1,
                        metavar="S", help="of the clusters. Default %(default)s")
    parser.add_argument("--gpu", type=int, metavar="ID",
                        help="CUDA device, -1 for the CPU. Default: as the run that saved the "
                             "file, else the CPU")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.set_defaults(device="cpu", gallery_file="")  # which no flag says
    with auxiliaries.one_message("evaluate.py"):
        args = parser.parse_args(argv)
        rows, labels, settings = zip(*map(read_embeddings,
                                          filter(None, (args.embeddings, args.gallery))))
        parser.set_defaults(**settings[0])
        args = parser.parse_args(argv)
        # What is noted or warned of must not stand among the JSON.
        with contextlib.redirect_stdout(sys.stderr if args.json else sys.stdout):
            scores, about = score(rows, labels, args)
        print_scores(scores, about, args.json)
    return scores


def score(rows, labels, args):
    """The metrics of saved embeddings -> (scores, what was compared), dicts of scalars and texts.

    rows: arrays [Q, D] or [Q, D] and [G, D], with their labels, arrays [Q] and [G].
    """
    if args.gallery and args.vehicle_protocol == "random_gallery":
        raise ValueError("--vehicle_protocol random_gallery draws its own gallery; leave out "
                         "--gallery")
    unknown = set(args.metrics) - {*METRICS, "all"}
    if unknown:
        raise ValueError(f"{args.embeddings}: its run measured {auxiliaries.one_line(unknown)}, "
                         "which is no metric here; --metrics chooses others")
    on_gpu = args.device == "cuda" and torch.cuda.is_available()
    device = auxiliaries.select_device((0 if on_gpu else -1) if args.gpu is None else args.gpu)
    labels = number_labels(*labels)
    parts = [part.to(device) for pair in zip(map(torch.from_numpy, rows), labels) for part in pair]
    scores = evaluate_embeddings(
        *parts, k_vals=args.k_vals, seed=args.seed, nmi_average=args.nmi_average,
        metrics=METRICS if "all" in args.metrics else args.metrics,
        memory=memory_bytes(args.eval_memory, device), vehicle_protocol=args.vehicle_protocol)
    sizes = torch.bincount(labels[-1], minlength=int(labels[0].max()) + 1)
    rows = [part.astype(np.result_type(*rows)) + 0 for part in rows]  # -0 is 0
    others = {row.tobytes() for row in rows[1]} if args.gallery else ()
    return scores, {
        "queries": len(rows[0]), "classes": len(labels[0].unique()),
        "compared_with": f"a gallery of {len(rows[1]):,}" if args.gallery else
                         args.vehicle_protocol,
        "without_match": int((sizes[labels[0]] == (0 if args.gallery else 1)).sum()),
        "zero_vectors": sum(int((part == 0).all(1).sum()) for part in rows),
        "queries_in_gallery": sum(row.tobytes() in others for row in rows[0]),
        "seed": args.seed, "nmi_average": args.nmi_average,
        "not_given": "" if args.gallery else args.gallery_file}


def print_scores(scores, about, as_json):
    """Prints the dicts that score gives as a table, or as JSON."""
    if as_json:
        print(json.dumps({name: value if math.isfinite(value) else None
                          for name, value in scores.items()} | about))
        return
    print("{queries:,} queries of {classes:,} classes, {compared_with}; {without_match:,} without "
          "a true match are left out; seed {seed}".format(**about)
          + f", NMI with the {about['nmi_average']} mean" * ("nmi" in scores)
          + f"; {about['zero_vectors']:,} zero vectors" * bool(about["zero_vectors"]))
    if about["queries_in_gallery"]:
        print(f"note: {about['queries_in_gallery']:,} queries are rows of the gallery, at "
              "distance 0")
    if about["not_given"]:
        print(f"note: the run compared these with {auxiliaries.printable(about['not_given'])}, "
              "which --gallery takes")
    for name, value in {"metric": "value", **scores}.items():
        print(f"{name:12} {value}")


# ---- fast exact ranks and clusters: nothing below needs reading


@contextlib.contextmanager
def full_precision():
    """Within it, or in a function that it decorates, no gradients, and products in float32.

    Elsewhere those of matrices [N, D] x [D, M] may be in TF32 or bfloat16, by autocast or by what
    was set, in either of the names that torch has for it; that comes back afterwards.
    """
    newer = hasattr(torch.backends.cuda.matmul, "fp32_precision")  # from torch 2.9 on
    settings = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul) if newer else ()
    before = ([setting.fp32_precision for setting in settings] if newer else
              torch.get_float32_matmul_precision())
    try:
        for setting in settings:
            setting.fp32_precision = "ieee"
        if not newer:  # where there are both names, the older one may raise
            torch.set_float32_matmul_precision("highest")
        # Threads do not inherit inference mode, and must not write to its tensors.
        with torch.inference_mode(False), torch.no_grad(), torch.autocast(
                "cpu", enabled=False), torch.autocast(
                "cuda" if torch.cuda.is_available() else "cpu", enabled=False):
            yield
    finally:
        if not newer:
            torch.set_float32_matmul_precision(before)
        for setting, precision in zip(settings, before):
            setting.fp32_precision = precision


@full_precision()
def rank_scores(queries, query_labels, gallery=None, gallery_labels=None, own=None,
                metrics=RANK_METRICS, k_vals=DEFAULT_K_VALS, memory=None, same=None):
    """The rank metrics of each query -> {column: [Q] float64}, and two int64 columns more.

    queries [Q, D], query_labels [Q]; gallery [G, D] and gallery_labels [G], or None; own [Q] as in
    own_rows. The rank of a query's j-th nearest true match is j plus the number of wrong gallery
    rows that are nearer; a wrong row exactly as near (to within float64 rounding) counts as
    nearer, so ties never favour the model. "matches": how many true matches the gallery holds;
    queries with 0 have 0 everywhere and belong in no mean. "first_rank": that of the nearest.

    One pass over blocks of distances, in float32; where two are too close to be told apart in it
    (nearer than four times the greatest error measured) they are compared again in float64, so
    the result is that of float64. memory: bytes for the blocks. same: what a true match is, if not
    an equal label: callable(query labels [B, 1, ...], gallery labels [1, G, ...]) -> bool [B, G];
    labels are then tensors of any kind whose first dimension is Q or G. It is slower.
    """
    every = any(METRICS[name].kind == "ranks" for name in metrics)
    other_labels = query_labels if gallery is None else gallery_labels
    own = own_rows(queries, gallery, own)
    others = queries if gallery is None else gallery
    if same is not None:
        return together([scores_of_ranks(*wrong_by_comparison(
            queries[rows], query_labels[rows], others, other_labels,
            None if own is None else own[rows], same), metrics, k_vals)
            for rows in blocks(len(queries), 8 * len(others))])
    if own is not None and not torch.equal(other_labels[own], query_labels):
        raise ValueError("own must be the gallery's rows of the queries; their labels differ")
    # Gallery and queries sorted by class, classes by size: the true matches of a query are then
    # consecutive columns, and the queries of a block have about equally many.
    labels = torch.cat([query_labels, other_labels]).unique(return_inverse=True)[1]
    query_classes, classes = labels.split([len(queries), len(others)])
    sizes = torch.bincount(classes, minlength=int(labels.max()) + 1)             # [C]
    by_size = sizes.argsort(stable=True)
    position = by_size.argsort()                                                 # [C]
    starts = (sizes[by_size].cumsum(0) - sizes[by_size])[position]               # [C]
    columns = position[classes].argsort(stable=True)                             # [G]
    order = position[query_classes].argsort(stable=True)                         # [Q]
    queries, others, query_classes = queries[order], others[columns], query_classes[order]
    own = None if own is None else columns.argsort()[own[order]]
    ranker = Ranker(queries, others, own, starts[query_classes], sizes[query_classes], every)
    width = int(sizes[query_classes].max())
    parts = torch.arange(len(queries), device=queries.device).split(
        rows_at_once(2 * len(others) + 16 * width, memory, queries.device))
    scores = together(in_threads(lambda rows: scores_of_ranks(
        ranker.wrong_nearer(rows), ranker.count[rows], metrics, k_vals), parts, queries.device))
    return {name: values[order.argsort()] for name, values in scores.items()}


def together(parts):
    """Dicts of vectors [B], of some queries each -> one of vectors [Q]."""
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def shared_rank_scores(queries, query_labels, gallery, gallery_labels, own, *options):
    """As rank_scores of the same arguments, [Q, D] and so on; each process ranks its share."""
    own = own_rows(queries, gallery, own)
    gallery, gallery_labels = ((queries, query_labels) if gallery is None else
                               (gallery, gallery_labels))
    share = torch.tensor(auxiliaries.share_of(len(queries)), device=queries.device)
    scores = rank_scores(queries[share], query_labels[share], gallery, gallery_labels,
                         None if own is None else own[share], *options)
    return {name: auxiliaries.gather_rows(values)[:len(queries)]
            for name, values in scores.items()}


def rows_at_once(width, memory, device):
    """How many queries, of so many numbers each, to rank at once; memory: bytes or None; scalars.
    """
    numbers = BLOCK_ELEMENTS if memory is None else memory // (4 if device.type == "cpu" else 16)
    if device.type == "cpu":  # each thread has a block
        numbers = min(numbers, BLOCK_ELEMENTS) // torch.get_num_threads()
        return max(1, min(256, numbers // width))
    return max(1, numbers // width)


class Ranker:
    """The ranks of true matches, for rank_scores, a slice of the queries at a time.

    queries [Q, D], others [G, D]. own [Q]: the column that is the query itself, or None.
    starts, sizes [Q]: a query's class has the columns from start to start + size. count [Q]: how
    many are true matches.
    every: all true matches, or the nearest alone. Distances are compared by their keys,
    |g|^2 / 2 - q.g, which order the gallery rows g of a query q as the distances do.
    """

    def __init__(self, queries, others, own, starts, sizes, every):
        self.queries, self.others, self.own = queries, others, own
        self.starts, self.sizes, self.every = starts, sizes, every
        self.count = sizes - int(own is not None)                                # [Q]
        # Near the origin float32 keeps most digits of a product.
        wide = torch.promote_types(queries.dtype, torch.float32)
        (queries, others), _ = near_one(queries.to(wide), others.to(wide))
        centre = others.mean(0, dtype=torch.float64).to(wide)
        queries, others = queries.sub_(centre).float(), others.sub_(centre).float()
        half = others.square().sum(1) / 2                                        # [G]
        # Keys in float32 differ from those in float64 by less than half of this; the greatest
        # difference measured is a quarter of it, at 8 to 2,048 dimensions.
        self.tolerance = 2e-6 * (half.max() + queries.square().sum(1) / 2)       # [Q]
        # The norms as one more dimension: then a key is one product of matrices.
        self.rows32 = queries.new_ones(len(queries), queries.shape[1] + 1)
        torch.neg(queries, out=self.rows32[:, :-1])
        self.columns32 = torch.cat([others, half.unsqueeze(1)], 1).t()
        self.kept = threading.local()

    def own_class(self, rows):
        """Which columns are of some queries' [B] own class -> (the first column, [B, N] bool)."""
        start, stop = self.starts[rows, None], (self.starts + self.sizes)[rows, None]
        low, high = int(start.min()), int(stop.max())
        place = torch.arange(low, high, device=start.device)
        return low, (place >= start) & (place < stop)

    def wrong_nearer(self, rows):
        """How many wrong columns are as near as the j-th nearest true match, or nearer: [B, W].

        rows [B]: the places of some queries. W: 1, or with every the most true matches of one.
        """
        low, own_class = self.own_class(rows)                                    # [B, N]
        if not own_class.shape[1]:
            return rows.new_zeros(len(rows), 1)
        width = int(self.sizes[rows].max()) if self.every else 1
        shape = len(rows), len(self.others)
        # Each thread writes to the same memory again and again: fresh memory is slow.
        if getattr(self.kept, "keys", rows[:0]).numel() < math.prod(shape):
            self.kept.keys = self.rows32.new_empty(math.prod(shape))
        wrong_keys = self.kept.keys[:math.prod(shape)].view(shape)
        torch.mm(self.rows32[rows], self.columns32, out=wrong_keys)              # [B, G]
        near = wrong_keys[:, low:low + own_class.shape[1]]
        keys = near.masked_fill(~own_class, torch.inf)
        near.masked_fill_(own_class, torch.inf)
        if self.own is not None:
            keys.scatter_(1, self.own[rows, None] - low, torch.inf)
        # The least alone is found without a sort.
        true = keys.sort(1)[0][:, :width] if width > 1 else keys.amin(1, keepdim=True)
        tolerance = self.tolerance[rows, None]
        limits = torch.cat([true - tolerance, true + tolerance], 1)
        limits = limits.masked_fill_(limits == torch.inf, -torch.inf)            # [B, 2 W]
        wrong, perhaps = count_up_to(wrong_keys, limits).chunk(2, 1)
        doubtful = perhaps - wrong                                               # [B, W]
        columns, pairs = int(doubtful.sum()), int((doubtful > 0).sum())
        step = max(1, len(rows) // 2)
        # Identical or collapsed embeddings, or many true matches: each pair means a look at a row.
        if columns > len(rows) * len(self.others) // 16 or pairs > 64 * len(rows):
            own_class = torch.nn.functional.pad(own_class, (low, len(self.others) - low
                                                            - own_class.shape[1]))
            return torch.cat([wrong_in_float64(
                self.queries[some], self.others, true, None if self.own is None else
                self.own[some], width) for some, true in zip(rows.split(step),
                                                             own_class.split(step))])
        i, j = doubtful.nonzero(as_tuple=True)
        for a, b in zip(i.split(step), j.split(step)) if pairs else ():
            wrong[a, b] += self.nearer_of_doubtful(rows[a], a, b, keys[a], low, true[a, b],
                                                   wrong_keys)
        return wrong

    def nearer_of_doubtful(self, queries, a, b, keys, low, true, wrong_keys):
        """Of the wrong columns in doubt how many are as near as a match, or nearer: [P].

        For the b-th match, b [P], of the queries [P]. keys [P, N]: of the columns from low on,
        infinite but for true matches; true [P]: the b-th of them. wrong_keys [B, G], of which
        rows a [P] are the queries'.
        """
        below, above = true - self.tolerance[queries], true + self.tolerance[queries]
        pair, column = between(wrong_keys, a, below, above)
        exact = self.sq_distances(queries[pair], column)
        # Of the true matches within tolerance the one wanted is found by its place in their order.
        before = (keys <= below.unsqueeze(1)).sum(1)
        match_pair, place = ((keys > below.unsqueeze(1)) & (keys <= above.unsqueeze(1))
                             ).nonzero(as_tuple=True)
        match_exact = self.sq_distances(queries[match_pair], low + place)
        order = match_exact.argsort()
        order = order[match_pair[order].argsort(stable=True)]
        number = torch.bincount(match_pair, minlength=len(queries))
        wanted = match_exact[order][number.cumsum(0) - number + b - before]      # [P]
        nearer = exact <= (wanted * (1 + ROUNDING))[pair]
        return torch.bincount(pair[nearer], minlength=len(queries))

    def sq_distances(self, rows, columns):
        """Squared distances in float64 of pairs of rows [N] and columns [N]: [N]."""
        return (self.queries[rows].double() - self.others[columns].double()).square().sum(1)


def scores_of_ranks(wrong, count, metrics, k_vals):
    """The vectors of rank_scores [B] from the wrong rows before each true match.

    wrong [B, W]: how many are as near as the j-th nearest true match, or nearer, for j from 1 to
    W, W above 0; count [B]: how many true matches there are.
    """
    j = torch.arange(1, wrong.shape[1] + 1, device=wrong.device)
    ranks = (j + wrong).double().masked_fill(j > count.unsqueeze(1), torch.inf)  # [B, W]
    scores = measured(("nearest", "ranks"), metrics, (ranks, count.clamp_min(1).double()),
                      recall={"k_vals": k_vals})
    return {"matches": count, "first_rank": (1 + wrong[:, 0]).masked_fill(count == 0, 0),
            **{name: values.double() for name, values in scores.items()}}


def wrong_by_comparison(queries, query_labels, others, other_labels, own, same):
    """What scores_of_ranks takes, by a comparison of labels of one's own; as in rank_scores."""
    true = same(query_labels.unsqueeze(1), other_labels.unsqueeze(0))            # [B, G]
    shape = [len(queries), len(others)]
    if list(true.shape) != shape or true.dtype != torch.bool:
        raise ValueError(f"same must give a bool tensor of shape {shape}; it gives {true.dtype} "
                         f"of shape {list(true.shape)}")
    count = (true if own is None else true.scatter(1, own.unsqueeze(1), False)).sum(1)
    return wrong_in_float64(queries, others, true, own, max(1, int(count.max()))), count


def wrong_in_float64(queries, others, true, own, width):
    """As Ranker.wrong_nearer, from distances in float64: [B, width].

    queries [B, D], others [G, D]. true [B, G] bool: which are true matches, or own [B], if any,
    the query itself.
    """
    sq_distances = torch.cdist(queries.double(), others.double(),
                               compute_mode="donot_use_mm_for_euclid_dist").square_()
    matches = sq_distances.masked_fill(~true, torch.inf)
    if own is not None:
        matches.scatter_(1, own.unsqueeze(1), torch.inf)
        sq_distances.scatter_(1, own.unsqueeze(1), torch.inf)
    limits = matches.sort(1)[0][:, :width]
    limits = limits.masked_fill(limits == torch.inf, -torch.inf) * (1 + ROUNDING)
    return count_up_to(sq_distances.masked_fill_(true, torch.inf), limits)


def count_up_to(keys, limits):
    """How many keys [B, G] of each row are at most each of the row's limits [B, T]: [B, T] int64.

    A few limits are compared with every key; many are looked up in the sorted rows. numpy, whose
    comparisons and sorts are several times faster on a CPU, works on some rows at a time, which
    stay in its cache; keys above all limits are made equal, which sorts faster.
    """
    if keys.is_cuda:
        return torch.searchsorted(keys.sort(1)[0], limits, right=True)
    counts = torch.empty(limits.shape, dtype=torch.int64)
    keys, above = keys.numpy(), torch.nextafter(limits.amax(1, keepdim=True),
                                                limits.new_tensor(torch.inf)).numpy()
    if limits.shape[1] <= 2:
        for j, limit in enumerate(limits.unbind(1)):
            bits = np.packbits(keys <= limit.unsqueeze(1).numpy(), axis=1)
            counts[:, j] = torch.from_numpy(np.bitwise_count(bits).sum(1, dtype=np.int64))
        return counts
    step = max(1, 2 ** 18 // keys.shape[1])
    for first in range(0, len(keys), step):
        part = slice(first, first + step)
        ordered = torch.from_numpy(np.sort(np.minimum(keys[part], above[part]), axis=1))
        counts[part] = torch.searchsorted(ordered, limits[part], right=True)
    return counts


def between(keys, places, below, above):
    """The keys of a row that are above below, and above at most: (place in places, column) [N].

    keys [R, G], places [P]: which of its rows each below [P] and above [P] is for. In the order of
    places; both int64.
    """
    below, above = below.unsqueeze(1), above.unsqueeze(1)
    if keys.is_cuda:
        some = keys[places]
        return ((some > below) & (some <= above)).nonzero(as_tuple=True)
    # numpy does this several times faster, on some rows at a time that stay in a cache.
    keys, places, below, above = (part.numpy() for part in (keys, places, below, above))
    step, found = max(1, 2 ** 18 // keys.shape[1]), []
    for first in range(0, len(places), step):
        part = slice(first, first + step)
        some = keys[places[part]]
        inside = np.flatnonzero((some > below[part]) & (some <= above[part]))
        found.append(inside + first * keys.shape[1])
    return map(torch.from_numpy, np.divmod(np.concatenate(found), keys.shape[1]))


def knn(queries, gallery=None, k=1, own=None):
    """The k nearest gallery rows of each query, exactly, nearest first.

    queries [Q, D], gallery [G, D] -> (distances [Q, k], indices [Q, k] int64). gallery, own: as in
    own_rows. Raises ValueError for k above the number of neighbours.
    """
    available = number_compared(queries, gallery, own)
    if not 1 <= k <= available:
        raise ValueError(f"k = {k} neighbours of {available}; --k_vals takes 1 to {available}")
    own = own_rows(queries, gallery, own)
    rows64, others = centred(queries, gallery)
    distances = queries.new_empty((len(queries), k))
    indices = torch.empty((len(queries), k), dtype=torch.int64, device=queries.device)
    for rows in blocks(len(queries), len(others)):
        block = torch.cdist(rows64[rows], others)                                # [rows, G]
        if own is not None:
            block.scatter_(1, own[rows].unsqueeze(1), torch.inf)
        nearest, indices[rows] = block.topk(k, largest=False)
        distances[rows] = nearest.to(distances.dtype)
    return distances, indices


def centred(queries, gallery=None):
    """Queries [Q, D] and gallery [G, D] (None: the queries) in float64, around the gallery's mean.

    Distances do not change under a shift, and near the origin the expansion |q|^2 - 2 q.g + |g|^2
    loses fewest digits; in float64 it is exact enough to order any float32 embeddings.
    """
    others = (queries if gallery is None else gallery).double()
    centre = others.mean(0)
    others = others - centre
    return (others if gallery is None else queries.double() - centre), others


def near_one(*parts):
    """Tensors times a power of two that brings them near 1 -> (tensors, the power's inverse).

    Any shapes. No digit changes, and squares of what comes out fit into float32.
    """
    largest = max(float(bound.abs()) for part in parts for bound in part.aminmax())
    most = 120 if parts[0].dtype == torch.float32 else 1000
    exponent = min(most, max(-most, math.frexp(largest)[1]))
    return [part * 2.0 ** -exponent for part in parts], 2.0 ** exponent


def blocks(rows, columns):
    """Slices of the rows that cut a [rows, columns] matrix into blocks of BLOCK_ELEMENTS at most.

    Of small matrices a block is an eighth of that, or 256 rows if those are more: it stays nearer
    to the processor.
    """
    most, columns = BLOCK_ELEMENTS, max(1, columns)
    step = max(1, min(most // columns, max(256, most // 8 // columns)))
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]


def in_threads(function, parts, device):
    """[function(part) for each part], on a CPU in as many threads as torch uses.

    A product of matrices that fits a cache is as fast in one thread, and what is done with it is
    then done by all threads; shapes as function's.
    """
    if device.type != "cpu":
        return [function(part) for part in parts]
    number = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with concurrent.futures.ThreadPoolExecutor(number) as threads:
            return list(threads.map(function, parts))
    finally:
        torch.set_num_threads(number)


def contingency(assignments, labels):
    """Sizes of clusters [K], of classes [C] and of their intersections, float64.

    assignments, labels: [N] ints each, with any values. The intersections are the cells of the
    [K, C] table that are not empty, as one vector.
    """
    clusters, assignments = assignments.unique(return_inverse=True)
    classes, labels = labels.unique(return_inverse=True)
    cells = (assignments * len(classes) + labels).unique(return_counts=True)[1]
    return (torch.bincount(assignments).double(), torch.bincount(labels).double(), cells.double())


@full_precision()
def kmeans(embeddings, num_clusters, iterations=20, seed=0):
    """Lloyd's k-means -> (assignments [N] int64, centroids [num_clusters, D]).

    embeddings [N, D]. Centroids start at distinct rows drawn with the seed; a cluster that loses
    all its rows restarts at the row farthest from its centroid. At most `iterations` updates (20,
    as in the reference code), fewer once no row changes cluster. ValueError for more clusters than
    rows. A centroid that did not move cannot lose a row except to one that did, so only distances
    that can have changed are computed.
    """
    if not 1 <= num_clusters <= len(embeddings):
        raise ValueError(f"{num_clusters} clusters of {len(embeddings)} embeddings; k-means needs "
                         f"1 to {len(embeddings)}")
    if embeddings.dtype != torch.float64:
        embeddings = embeddings.float()
    generator = torch.Generator().manual_seed(seed)
    start = torch.randperm(len(embeddings), generator=generator)[:num_clusters]
    (embeddings,), scale = near_one(embeddings)
    centre = embeddings.mean(0)
    embeddings = embeddings - centre  # keeps the digits that tell rows apart
    centroids = embeddings[start.to(embeddings.device)]
    sq_norms = embeddings.square().sum(1)                                        # [N]
    assignments, sq_distances = nearest_centroids(embeddings, sq_norms, centroids)
    for _ in range(iterations):
        counts = torch.bincount(assignments, minlength=num_clusters)             # [K]
        sums = sums_of_groups(embeddings, assignments, num_clusters)
        previous, centroids = centroids, sums / counts.clamp_min(1).unsqueeze(1)  # [K, D]
        empty = (counts == 0).nonzero().squeeze(1)
        centroids[empty] = embeddings[sq_distances.topk(len(empty)).indices]
        moved = (centroids != previous).any(1)                                   # [K]
        before = assignments
        assignments, sq_distances = moved_centroids(embeddings, sq_norms, centroids, moved,
                                                    assignments, sq_distances)
        if torch.equal(assignments, before):
            break
    return assignments, (centroids + centre) * scale


def moved_centroids(embeddings, sq_norms, centroids, moved, assignments, sq_distances):
    """As nearest_centroids of embeddings [N, D], when only the centroids in moved [K] are new.

    assignments, sq_distances [N]: what nearest_centroids gave before. Rows whose own centroid
    stayed where it was are compared with those that moved alone.
    """
    own_moved = moved[assignments]                                               # [N]
    if moved.float().mean() + own_moved.float().mean() > 1.5:
        return nearest_centroids(embeddings, sq_norms, centroids)
    assignments, sq_distances = assignments.clone(), sq_distances.clone()
    rows, columns = own_moved.nonzero().squeeze(1), moved.nonzero().squeeze(1)
    assignments[rows], sq_distances[rows] = nearest_centroids(embeddings[rows], sq_norms[rows],
                                                              centroids)
    rows = (~own_moved).nonzero().squeeze(1)
    if len(columns) and len(rows):
        nearest, distances = nearest_centroids(embeddings[rows], sq_norms[rows],
                                               centroids[columns])
        nearer = distances < sq_distances[rows]
        assignments[rows[nearer]] = columns[nearest[nearer]]
        sq_distances[rows[nearer]] = distances[nearer]
    return assignments, sq_distances


def nearest_centroids(embeddings, sq_norms, centroids):
    """The nearest of centroids [K, D] for each row -> (index [N], its squared distance [N]).

    embeddings [N, D], sq_norms [N]: their squared lengths.
    """
    index, least = torch.empty_like(sq_norms, dtype=torch.int64), torch.empty_like(sq_norms)
    half_norms, columns = centroids.square().sum(1) / 2, centroids.t()

    def assign(rows):
        # |c|^2 / 2 - x.c orders the centroids c of a row x as the distances do.
        keys = torch.addmm(half_norms, embeddings[rows], columns, alpha=-1)      # [B, K]
        # numpy's argmin is several times faster on a CPU.
        index[rows] = keys.argmin(1) if keys.is_cuda else torch.from_numpy(keys.numpy().argmin(1))
        least[rows] = keys.gather(1, index[rows].unsqueeze(1)).squeeze(1)

    if embeddings.is_cuda or len(embeddings) * len(centroids) <= 2 ** 20:
        for rows in blocks(len(embeddings), len(centroids)):  # as much as threads take to start
            assign(rows)
    else:
        step = max(128, 2 ** 18 // len(centroids))  # a cache holds so much, and it is used again
        in_threads(assign, [slice(start, start + step) for start in
                            range(0, len(embeddings), step)], embeddings.device)
    return index, (2 * least + sq_norms).clamp_min_(0)


def sums_of_groups(rows, groups, number):
    """The sum of the rows [N, D] of each group, groups [N] below number -> [number, D].

    The same on each call, also on a GPU, whose additions otherwise come in any order.
    """
    sums = rows.new_zeros(number, rows.shape[1])
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(before or rows.is_cuda)
    try:
        return sums.index_add_(0, groups, rows)
    finally:
        torch.use_deterministic_algorithms(before)


def sums_to_own_class(rows, labels):
    """The sum of each row's distances to the rows of its class: [N, D] float64, [N] -> [N].

    labels: from 0 to the number of classes - 1.
    """
    order = labels.argsort(stable=True)
    rows, labels = rows[order], labels[order]
    stops = torch.bincount(labels).cumsum(0)                                     # [C]
    largest = int(torch.bincount(labels).max())
    step = max(1, min(max(32, largest), BLOCK_ELEMENTS // (4 * largest)))
    sums = torch.empty_like(rows[:, 0])
    for start in range(0, len(rows), step):
        # Sorted by class, the columns of the classes of some rows are consecutive.
        part = slice(start, min(start + step, len(rows)))
        first, stop = int(torch.searchsorted(labels, labels[start])), int(
            stops[labels[part.stop - 1]])
        distances = torch.cdist(rows[part], rows[first:stop],
                                compute_mode="donot_use_mm_for_euclid_dist")
        same = labels[part].unsqueeze(1) == labels[first:stop]
        sums[order[part]] = (distances * same).sum(1)
    return sums


@full_precision()
def sum_across_classes(rows, labels):
    """The sum of the distances of all ordered pairs of rows of two classes -> float.

    rows [N, D] float64 of size about 1, labels [N] from 0 on. In tiles; from products in float32
    for more than 4,096 rows.
    """
    order = labels.argsort(stable=True)
    rows, labels = rows[order], labels[order]
    stops = torch.bincount(labels).cumsum(0)[labels]                             # [N]
    rows = rows.to(torch.float64 if len(rows) <= 4096 else torch.float32)
    sq_norms, ones = rows.square().sum(1, keepdim=True), torch.ones_like(rows[:, :1])
    left, right = torch.cat([-2 * rows, sq_norms, ones], 1), torch.cat([rows, ones, sq_norms], 1)

    def sum_from(start):  # of the pairs of a block of rows with themselves and with later rows
        block, total = slice(start, start + 256), 0.0
        # Sorted by class, the columns of the block's classes come first.
        same_stop = int(stops[block][-1])
        for first in range(start, len(rows), 8192):
            distances = torch.mm(left[block], right[first:first + 8192].t()).clamp_min_(0).sqrt_()
            if first < same_stop:
                same = labels[block].unsqueeze(1) == labels[first:min(first + 8192, same_stop)]
                distances[:, :same.shape[1]].masked_fill_(same, 0)
            if first == start:
                distances[:, :len(distances)] /= 2  # pairs within the block stand there twice
            total += float(distances.sum(dtype=torch.float64))
        return 2 * total

    return sum(in_threads(sum_from, range(0, len(rows), 256), rows.device))


if __name__ == "__main__":
    main()
