"""Retrieval and clustering metrics on embeddings, and the pass that computes the embeddings.

The metrics are pure functions on tensors, on the tensors' own device, in blocks: no N x N matrix
is held. Distances are Euclidean. evaluate_embeddings is the one entry for all of them;
evaluate_sets runs it on a network and evaluation sets. A new metric is a function and a line in
evaluate_embeddings. Saving, printing and choosing the best epoch is the caller's business.
"""

import numpy as np
import torch

import auxiliaries

BLOCK_ELEMENTS = 2 ** 24  # distances held at a time: 128 MiB in float64


def add_arguments(parser):
    """Adds the group 'evaluation' to an argparse parser; --k_vals is a list, the rest scalars."""
    group = parser.add_argument_group("evaluation", "what is measured on the test classes after "
                                                    "each epoch")
    group.add_argument("--k_vals", type=int, nargs="+", default=None, metavar="K",
                       help="recall at k is the share of queries with a true match among their k "
                            "nearest; at most the number of images compared with. Default 1 2 4 "
                            "8; online_products 1 10 100 1000; in-shop 1 10 20 30 50; vehicle_id "
                            "1 5 (the literature's)")
    group.add_argument("--dist_measure", action="store_true",
                       help="also log and plot the mean distance within classes over the mean "
                            "distance between the classes' centres: small is compact")
    group.add_argument("--eval_every", type=int, default=1, metavar="N",
                       help="evaluate after every N epochs, and after the last one. Default "
                            "%(default)s (reference code)")
    group.add_argument("--plot_embeddings", choices=("pca", "tsne"), default=None,
                       help="after each evaluation that is the best so far, draw the embeddings "
                            "of the test classes in two dimensions as embeddings_NNNN.svg: pca is "
                            "quick and shows the directions of greatest spread, tsne takes some "
                            "seconds and keeps neighbours together. At most 2,000 images, drawn "
                            "with the seed. Default: no such plot")
    group.add_argument("--grad_measure", action="store_true",
                       help="also save the mean absolute gradient that the embedding layer sends "
                            "to each feature of the trunk, for every iteration, as one pickle "
                            "file an epoch")


def blocks(rows, columns):
    """Slices of the rows that cut a [rows, columns] matrix into blocks of BLOCK_ELEMENTS."""
    step = max(1, BLOCK_ELEMENTS // max(1, columns))
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]


def check_embeddings(queries, query_labels, gallery, gallery_labels):
    """Raises ValueError unless queries [N, D] and labels [N] (and the gallery's) fit together."""
    for embeddings, labels, name in ((queries, query_labels, "query"),
                                     (gallery, gallery_labels, "gallery")):
        if embeddings is None:
            continue
        if embeddings.dim() != 2 or len(embeddings) != len(labels) or not len(labels):
            raise ValueError(f"{name} embeddings of shape {list(embeddings.shape)} with "
                             f"{len(labels)} labels; expected [N, D] with N labels, N above 0")
        bad = ~torch.isfinite(embeddings).all(1)
        if bad.any():
            raise ValueError(f"{int(bad.sum())} of {len(bad)} {name} embeddings are not finite, "
                             f"the first is row {int(bad.int().argmax())}")
    if gallery is not None and queries.shape[1] != gallery.shape[1]:
        raise ValueError(f"query embeddings have {queries.shape[1]} dimensions, gallery "
                         f"embeddings {gallery.shape[1]}")


def number_compared(queries, gallery=None, own=None):
    """How many gallery rows each query is compared with; see own_rows. [Q, D], [G, D], [Q]."""
    if gallery is None:
        return len(queries) - 1
    return len(gallery) - (own is not None)


def own_rows(queries, gallery=None, own=None):
    """The gallery row [Q] that is the query itself and never its neighbour; None if none is.

    Without a gallery the queries [Q, D] are compared with each other. own [Q] int64 says it for a
    gallery [G, D] that holds the queries. An exact duplicate in another row is a neighbour.
    """
    return torch.arange(len(queries), device=queries.device) if gallery is None else own


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


def first_match_ranks(queries, query_labels, gallery=None, gallery_labels=None, own=None):
    """Rank of each query's nearest true match, [Q] int64; 0 where the gallery holds none.

    queries [Q, D], query_labels [Q]; gallery [G, D] and gallery_labels [G], or None; own [Q] as in
    own_rows. The rank is one plus the number of wrong gallery rows that are nearer; a wrong row
    exactly as near (to within float64 rounding) counts as nearer, so ties never favour the model.
    One pass over blocks of distances gives recall at every k: no neighbour list is made.
    """
    other_labels = query_labels if gallery is None else gallery_labels
    own = own_rows(queries, gallery, own)
    queries, others = centred(queries, gallery)
    sq_norms = others.square().sum(1)
    rounding = 1e-14 * (sq_norms.max() + queries.square().sum(1, keepdim=True))  # [Q, 1]
    ranks = torch.empty(len(queries), dtype=torch.int64, device=queries.device)
    for rows in blocks(len(queries), len(others)):
        # |q - g|^2 without |q|^2, which is the same for a whole row.
        block = torch.addmm(sq_norms, queries[rows], others.t(), alpha=-2)       # [rows, G]
        same = query_labels[rows].unsqueeze(1) == other_labels
        if own is not None:
            block.scatter_(1, own[rows].unsqueeze(1), torch.inf)
            same.scatter_(1, own[rows].unsqueeze(1), False)
        nearest = block.masked_fill(~same, torch.inf).amin(1, keepdim=True)
        nearer_wrong = ((block <= nearest + rounding[rows]) & ~same).sum(1)
        ranks[rows] = (nearer_wrong + 1).masked_fill(nearest.squeeze(1) == torch.inf, 0)
    return ranks


def recall_at_k(queries, query_labels, gallery=None, gallery_labels=None, k_vals=(1, 2, 4, 8),
                own=None):
    """The share of queries with a true match among their k nearest -> {"recall@k": float}.

    queries [Q, D], query_labels [Q]; gallery [G, D] and gallery_labels [G], or None to compare the
    queries with each other; a query is left out by index, see own_rows for own [Q]. Values in
    [0, 1]. Queries whose class is nowhere in the gallery are left out of the mean. ValueError if
    that leaves none, or for a k outside 1 to the number of neighbours. Jegou et al., TPAMI 2011;
    the literature's "R@k".
    """
    check_embeddings(queries, query_labels, gallery, gallery_labels)
    check_k_vals(k_vals, number_compared(queries, gallery, own))
    ranks = first_match_ranks(queries, query_labels, gallery, gallery_labels, own)
    ranks = ranks[ranks > 0].double()
    if not len(ranks):
        raise ValueError("no query has a true match to find: each class needs two images, or one "
                         "among the queries and one in the gallery")
    return {f"recall@{k}": (ranks <= k).double().mean().item() for k in k_vals}


def check_k_vals(k_vals, available):
    """ValueError for a k (scalars) that is not from 1 to the number of available neighbours."""
    wrong = [k for k in k_vals if not 1 <= k <= available]
    if wrong:
        raise ValueError(f"--k_vals {' '.join(map(str, wrong))}: each query has {available} "
                         f"images to be compared with, so k is from 1 to {available}")


def kmeans(embeddings, num_clusters, iterations=20, seed=0):
    """Lloyd's k-means -> (assignments [N] int64, centroids [num_clusters, D]).

    embeddings [N, D]. Centroids start at distinct rows drawn with the seed; a cluster that loses
    all its rows restarts at the row farthest from its centroid. At most `iterations` updates (20,
    as in the reference code), fewer once no row changes cluster. ValueError for more clusters than
    rows.
    """
    if not 1 <= num_clusters <= len(embeddings):
        raise ValueError(f"{num_clusters} clusters of {len(embeddings)} embeddings; k-means needs "
                         f"1 to {len(embeddings)}")
    generator = torch.Generator().manual_seed(seed)
    start = torch.randperm(len(embeddings), generator=generator)[:num_clusters]
    centre = embeddings.mean(0)
    embeddings = embeddings - centre  # keeps the digits that tell rows apart
    centroids = embeddings[start.to(embeddings.device)]
    assignments, sq_distances = nearest_centroids(embeddings, centroids)
    for _ in range(iterations):
        counts = torch.bincount(assignments, minlength=num_clusters)             # [K]
        sums = torch.zeros_like(centroids).index_add_(0, assignments, embeddings)
        centroids = sums / counts.clamp_min(1).unsqueeze(1)
        empty = (counts == 0).nonzero().squeeze(1)
        centroids[empty] = embeddings[sq_distances.topk(len(empty)).indices]
        previous = assignments
        assignments, sq_distances = nearest_centroids(embeddings, centroids)
        if torch.equal(assignments, previous):
            break
    return assignments, centroids + centre


def nearest_centroids(embeddings, centroids):
    """embeddings [N, D], centroids [K, D] -> (nearest index [N], its squared distance [N])."""
    assignments = torch.empty(len(embeddings), dtype=torch.int64, device=embeddings.device)
    sq_distances = embeddings.new_empty(len(embeddings))
    sq_norms = centroids.square().sum(1)
    for rows in blocks(len(embeddings), len(centroids)):
        block = torch.addmm(sq_norms, embeddings[rows], centroids.t(), alpha=-2)
        sq_distances[rows], assignments[rows] = block.min(1)
    return assignments, (sq_distances + embeddings.square().sum(1)).clamp_min_(0)


def contingency(assignments, labels):
    """Sizes of clusters [K], of classes [C] and of their intersections, float64.

    assignments, labels: [N] ints each, with any values. The intersections are the cells of the
    [K, C] table that are not empty, as one vector.
    """
    clusters, assignments = assignments.unique(return_inverse=True)
    classes, labels = labels.unique(return_inverse=True)
    cells = (assignments * len(classes) + labels).unique(return_counts=True)[1]
    return (torch.bincount(assignments).double(), torch.bincount(labels).double(), cells.double())


def nmi(assignments, labels):
    """Normalised mutual information of clusters and classes, [N] and [N] ints -> float in [0, 1].

    Normalised by the arithmetic mean of the two entropies, scikit-learn's default since 0.22; the
    reference results were made with the geometric mean, which is slightly larger. 1 if there is
    one cluster and one class. Manning et al., "Introduction to Information Retrieval", 2008,
    section 16.3.
    """
    def entropy(sizes):
        return float(-(sizes / len(labels) * (sizes / len(labels)).log()).sum())

    clusters, classes, cells = (entropy(sizes) for sizes in contingency(assignments, labels))
    if clusters + classes == 0:
        return 1.0
    # Mutual information is H(clusters) + H(classes) - H(both); rounding can lead just outside.
    return min(1.0, max(0.0, 2 * (clusters + classes - cells) / (clusters + classes)))


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
    class has a pair, infinite if all centres coincide. The reference code's --dist_measure.
    """
    order = labels.argsort(stable=True)
    embeddings = centred(embeddings)[1][order]
    labels = labels[order].unique(return_inverse=True)[1]
    counts = torch.bincount(labels)                                              # [C]
    within = embeddings.new_zeros(len(counts))
    # Rows are sorted by class, so pairs of a class lie 1, 2, ... up to its size apart.
    for offset in range(1, int(counts.max())):
        same = labels[offset:] == labels[:-offset]
        distances = (embeddings[offset:][same] - embeddings[:-offset][same]).norm(dim=1)
        within.index_add_(0, labels[offset:][same], distances)
    pairs = counts * (counts - 1) / 2
    within = within[pairs > 0] / pairs[pairs > 0]
    centres = embeddings.new_zeros(len(counts), embeddings.shape[1])
    centres = centres.index_add_(0, labels, embeddings) / counts.unsqueeze(1)
    total = sum(torch.cdist(centres[rows], centres).sum()
                for rows in blocks(len(centres), len(centres)))
    between = float(total) / max(1, len(centres) * (len(centres) - 1))
    if not len(within):
        return 0.0
    return float(within.mean()) / between if between > 0 else float("inf")


def evaluate_embeddings(queries, query_labels, gallery=None, gallery_labels=None,
                        k_vals=(1, 2, 4, 8), seed=0, own=None):
    """All metrics of one evaluation set -> dict "recall@k" for each k, "nmi", "f1", in [0, 1].

    queries [Q, D] and query_labels [Q], compared with gallery [G, D], gallery_labels [G] or,
    without one, with each other; own [Q] as in own_rows. k-means clusters queries and gallery
    together, into as many clusters as they have classes, starting from the seed.
    """
    metrics = recall_at_k(queries, query_labels, gallery, gallery_labels, k_vals, own)
    embeddings, labels = pooled(queries, query_labels, gallery, gallery_labels, own)
    assignments, _ = kmeans(embeddings, len(labels.unique()), seed=seed)
    metrics["nmi"] = nmi(assignments, labels)
    metrics["f1"] = f1(assignments, labels)
    return metrics


def pooled(queries, query_labels, gallery=None, gallery_labels=None, own=None):
    """Every image of a set once -> (embeddings [N, D], labels [N]); arguments as above."""
    if gallery is None:
        return queries, query_labels
    if own is not None:  # the gallery holds the queries
        return gallery, gallery_labels
    return torch.cat([queries, gallery]), torch.cat([query_labels, gallery_labels])


# ---- on a network


@torch.inference_mode()
def embed(network, dataset, device, batch_size=112, num_workers=0):
    """The embeddings of a dataset, in its order -> (embeddings [N, D] float32, labels [N] int64).

    network: anything that turns images [B, 3, H, W] on the device into embeddings [B, D]; it
    should be in eval mode. Both results are on the device.
    """
    loader = torch.utils.data.DataLoader(dataset, batch_size=batch_size, num_workers=num_workers,
                                         generator=torch.Generator(),  # draws nothing globally
                                         pin_memory=torch.device(device).type == "cuda")
    embeddings, labels, start = None, torch.empty(len(dataset), dtype=torch.int64), 0
    for images, batch_labels in loader:
        rows = network(images.to(device, non_blocking=True)).float()
        if embeddings is None:
            embeddings = torch.empty(len(dataset), rows.shape[1], device=device)
        embeddings[start:start + len(rows)] = rows
        labels[start:start + len(rows)] = batch_labels
        start += len(rows)
    return embeddings, labels.to(device)


def evaluate_sets(network, sets, device, k_vals, batch_size=112, num_workers=0, seed=0,
                  dist_measure=False):
    """Embeds each set and scores it -> (metrics, [(queries, gallery or None), ...]).

    sets: tuples (name, queries, gallery) as datasets.EvaluationSet: a dataset of queries, and the
    dataset, or list of datasets, that they are compared with; None: with each other. A list may
    hold the queries too, as in ("val", val, [train, val]): each is left out of its own neighbours.
    Labels of one set's datasets are of one numbering. Each dataset is embedded once. metrics: one
    dict, its keys preceded by the set's name where it has one. With dist_measure also
    "dist_ratio". The second result holds the sets' embeddings, [Q, D] and [G, D].
    """
    rows, metrics, embedded, sets = {}, {}, [], list(sets)

    def embed_once(dataset):
        if id(dataset) not in rows:
            rows[id(dataset)] = embed(network, dataset, device, batch_size, num_workers)
        return rows[id(dataset)]

    for name, queries, gallery in sets:
        query_rows, query_labels = embed_once(queries)
        gallery_rows = gallery_labels = own = None
        if gallery is not None:
            parts = gallery if isinstance(gallery, (list, tuple)) else [gallery]
            if not parts or sum(part is queries for part in parts) > 1:
                raise ValueError(f"the set {name!r} has a gallery of {len(parts)} datasets; it "
                                 "must have one or more, the queries among them once at most")
            gallery_rows, gallery_labels = map(torch.cat, zip(*map(embed_once, parts)))
            place = 0
            for part in parts:
                if part is queries:
                    own = torch.arange(place, place + len(queries), device=query_rows.device)
                place += len(part)
        compared = query_rows, query_labels, gallery_rows, gallery_labels
        scores = evaluate_embeddings(*compared, k_vals, seed, own)
        if dist_measure:
            scores["dist_ratio"] = distance_ratio(*pooled(*compared, own))
        metrics |= {f"{name} {key}".strip(): value for key, value in scores.items()}
        embedded.append((query_rows, gallery_rows))
    return metrics, embedded


def draw_recoveries(path, queries, gallery, query_rows, gallery_rows, seed=0, rows=10,
                    neighbours=5):
    """Writes a picture of some queries and their nearest neighbours to a PNG file.

    queries, gallery: ImageDataset (gallery None: the queries themselves); query_rows [Q, D] and
    gallery_rows [G, D] their embeddings. Queries, drawn at random with the seed, are framed red,
    neighbours of the same class green, others grey and crossed out.
    """
    others = queries if gallery is None else gallery
    available = len(others) - (gallery is None)
    chosen = np.random.default_rng(seed).permutation(len(queries))[:rows].tolist()
    # Without a gallery the query itself comes back among its neighbours; it is left out by index.
    _, nearest = knn(query_rows[chosen], query_rows if gallery is None else gallery_rows,
                     min(neighbours, available) + (gallery is None))
    grid = []
    for query, indices in zip(chosen, nearest.tolist()):
        indices = [i for i in indices if gallery is not None or i != query][:neighbours]
        row = [(queries.load(query), "query")]
        for i in indices:
            hit = (queries.class_names[queries.labels[query]]
                   == others.class_names[others.labels[i]])
            row.append((others.load(i), "hit" if hit else "miss"))
        grid.append(row)
    auxiliaries.save_image_grid(path, grid)


def draw_embeddings(path, dataset, embeddings, method="pca", seed=0, most=2000):
    """Draws embeddings [N, D] in two dimensions, coloured by class, to an SVG file.

    dataset: ImageDataset, whose labels and class names they have. method: "pca", the two
    directions of greatest variance, or "tsne" (van der Maaten and Hinton, JMLR 2008; perplexity
    30), which keeps neighbours together. Of more than `most` embeddings a sample drawn with the
    seed is shown; t-SNE takes seconds for 2,000.
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
    auxiliaries.save_scatter(path, f"{count} test embeddings, {drawn}, coloured by class", points,
                             names)
