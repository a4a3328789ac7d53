"""evaluate.py against slow oracles: float64 loops, scikit-learn, and numbers worked by hand.

Many of the oracle tests use small whole numbers as embeddings: their squared distances are exact
in every precision, and ties and duplicates, on which metrics differ, turn up all the time.
"""

import itertools
import json
import math
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.cluster import KMeans
from sklearn.metrics import adjusted_mutual_info_score, average_precision_score
from sklearn.metrics import normalized_mutual_info_score
from sklearn.metrics.cluster import pair_confusion_matrix
from threadpoolctl import threadpool_limits
from torch.utils._python_dispatch import TorchDispatchMode

import auxiliaries
import evaluate

BLOCK_SIZES = (1, 7, 64, 2 ** 25)  # distances in a block: less than one row, some rows, all
WITH_RATIO = (*evaluate.DEFAULT_METRICS, "dist_ratio")


def unit_rows(count, dimensions, seed=0):
    rows = torch.randn(count, dimensions, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.normalize(rows, dim=1)


def nearly_collapsed(count, dimensions, seed=0, spread=1e-4):
    """Unit-norm rows that lie in one small spot, as those of a network that has collapsed."""
    rows = unit_rows(1, dimensions, seed) + spread * unit_rows(count, dimensions, seed + 1)
    return torch.nn.functional.normalize(rows, dim=1)


def whole_numbers(count, dimensions, generator):
    return torch.randint(-2, 3, (count, dimensions), generator=generator).float()


def first_ranks(*problem, **options):
    return evaluate.rank_scores(*problem, metrics=(), **options)["first_rank"]


def distances_of_pairs(rows, labels):
    return tuple(evaluate.mean_distances(rows, labels).values())


def random_ints(high, count, generator):
    return torch.randint(0, high, (count,), generator=generator)


def float64_distances(queries, others):
    difference = queries.double().numpy()[:, None] - others.double().numpy()[None]
    return np.sqrt((difference ** 2).sum(-1))


# ---- blocks


@pytest.mark.parametrize("elements", BLOCK_SIZES)
@pytest.mark.parametrize("rows, columns", [(1, 1), (5, 1), (7, 3), (13, 7), (64, 64), (3, 0)])
def test_blocks_cover_every_row_once_and_stay_small(monkeypatch, elements, rows, columns):
    monkeypatch.setattr(evaluate, "BLOCK_ELEMENTS", elements)
    cut = evaluate.blocks(rows, columns)
    assert [i for block in cut for i in range(rows)[block]] == list(range(rows))
    for block in cut:
        assert (block.stop - block.start) * columns <= elements or block.stop - block.start == 1


# ---- knn


def test_knn_by_hand():
    # On a line at 0, 1, 3, 7. From 1: 0 is 1 away, 3 is 2 away, 7 is 6 away.
    distances, indices = evaluate.knn(torch.tensor([[0.], [1.], [3.], [7.]]), k=2)
    assert distances.tolist() == [[1, 3], [1, 2], [2, 3], [4, 6]]
    assert indices.tolist() == [[1, 2], [0, 2], [1, 0], [2, 1]]
    assert indices.dtype == torch.int64


@pytest.mark.parametrize("elements", BLOCK_SIZES)
@pytest.mark.parametrize("with_gallery", [False, True])
@pytest.mark.parametrize("count, dimensions, k", [(2, 1, 1), (9, 3, 8), (40, 8, 5), (70, 64, 10)])
def test_knn_equals_brute_force(monkeypatch, elements, with_gallery, count, dimensions, k):
    monkeypatch.setattr(evaluate, "BLOCK_ELEMENTS", elements)
    queries = unit_rows(count, dimensions) if dimensions > 1 else torch.tensor([[0.], [1.]])
    gallery = torch.randn(count + 3, dimensions, generator=torch.Generator().manual_seed(1))
    expected = float64_distances(queries, gallery if with_gallery else queries)
    if not with_gallery:
        np.fill_diagonal(expected, np.inf)
    order = expected.argsort(1)[:, :k]
    distances, indices = evaluate.knn(queries, gallery if with_gallery else None, k)
    assert distances.dtype == queries.dtype and indices.dtype == torch.int64
    assert indices.tolist() == order.tolist()
    np.testing.assert_allclose(distances, np.take_along_axis(expected, order, 1), atol=1e-5)


@pytest.mark.parametrize("with_gallery", [False, True])
@pytest.mark.parametrize("seed", range(20))
def test_knn_with_ties_and_duplicates(seed, with_gallery):
    generator = torch.Generator().manual_seed(seed)
    queries = whole_numbers(30, 2, generator)
    gallery = whole_numbers(21, 2, generator) if with_gallery else None
    expected = float64_distances(queries, gallery if with_gallery else queries)
    if not with_gallery:
        np.fill_diagonal(expected, np.inf)
    distances, indices = evaluate.knn(queries, gallery, k=12)
    # Which of several equally near rows comes first is free; the distances are not.
    np.testing.assert_allclose(distances, np.sort(expected, 1)[:, :12], atol=2e-3)
    np.testing.assert_allclose(np.take_along_axis(expected, indices.numpy(), 1),
                               np.sort(expected, 1)[:, :12], atol=2e-3)
    assert all(len(set(row)) == 12 for row in indices.tolist())


@pytest.mark.parametrize("elements", BLOCK_SIZES)
def test_knn_leaves_self_out_by_index_among_duplicates(monkeypatch, elements):
    monkeypatch.setattr(evaluate, "BLOCK_ELEMENTS", elements)
    queries = unit_rows(20, 16).repeat(3, 1)  # row i is also row i + 20 and i + 40
    distances, indices = evaluate.knn(queries, k=2)
    for i, row in enumerate(indices.tolist()):
        assert set(row) == {i % 20, i % 20 + 20, i % 20 + 40} - {i}
    assert distances.max() < 2e-3


def test_knn_takes_a_copy_of_the_queries_as_a_gallery_like_any_other():
    queries = unit_rows(20, 16)
    _, indices = evaluate.knn(queries, queries.clone(), k=1)
    assert indices.flatten().tolist() == list(range(20))


def test_knn_of_every_row_is_a_permutation():
    _, indices = evaluate.knn(unit_rows(12, 4), unit_rows(9, 4, seed=1), k=9)
    assert all(sorted(row) == list(range(9)) for row in indices.tolist())


def test_knn_is_exact_for_nearly_collapsed_embeddings():
    rows = nearly_collapsed(200, 64)
    expected = float64_distances(rows, rows)
    np.fill_diagonal(expected, np.inf)
    distances, _ = evaluate.knn(rows, k=3)
    np.testing.assert_allclose(distances, np.sort(expected, 1)[:, :3], rtol=1e-2)


@pytest.mark.parametrize("k, with_gallery, most", [(0, False, 4), (5, False, 4), (-1, True, 3),
                                                   (4, True, 3)])
def test_knn_refuses_k_out_of_range(k, with_gallery, most):
    with pytest.raises(ValueError, match=rf"k = {k} .* 1 to {most}"):
        evaluate.knn(unit_rows(5, 2), unit_rows(3, 2) if with_gallery else None, k)


# ---- recall at k


def brute_force_ranks(queries, query_labels, gallery=None, gallery_labels=None, own=None):
    """For each query 1 + the number of wrong rows no farther than its nearest true match, or 0.

    own: for each query the gallery row that is left out of its neighbours.
    """
    others, other_labels = ((queries, query_labels) if gallery is None
                            else (gallery, gallery_labels))
    queries, others = queries.double().tolist(), others.double().tolist()
    query_labels, other_labels = query_labels.tolist(), other_labels.tolist()
    ranks = []
    for i, query in enumerate(queries):
        right, wrong = [], []
        for j, other in enumerate(others):
            if j == (i if gallery is None else None if own is None else own[i]):
                continue
            sq_distance = sum((a - b) ** 2 for a, b in zip(query, other))
            (right if other_labels[j] == query_labels[i] else wrong).append(sq_distance)
        ranks.append(1 + sum(d <= min(right) for d in wrong) if right else 0)
    return ranks


def brute_force_recall(queries, query_labels, gallery=None, gallery_labels=None, k_vals=(1, 2, 4),
                       own=None):
    ranks = brute_force_ranks(queries, query_labels, gallery, gallery_labels, own)
    found = [rank for rank in ranks if rank]
    return {f"recall@{k}": sum(rank <= k for rank in found) / len(found) for k in k_vals}


def whole_number_problem(seed, with_gallery):
    """Arguments of recall_at_k: few dimensions, many ties; classes of all sizes."""
    generator = torch.Generator().manual_seed(seed)
    count = 5 + random_ints(28, 1, generator).item()
    dimensions = 1 + random_ints(4, 1, generator).item()
    classes = 2 + random_ints(12, 1, generator).item()
    problem = []
    for size in (count, count + classes) if with_gallery else (count,):
        labels = random_ints(classes, size, generator)
        if seed % 2:
            labels *= random_ints(2, size, generator)  # class 0 is by far the largest
        labels[:2] = 0  # one true match at least
        problem += [whole_numbers(size, dimensions, generator), labels]
    return problem


def test_recall_by_hand():
    # On a line: A at 0 and 3, B at 1 and 10, C at 2 alone.
    # A 0: B 1 and C 2 are nearer than A 3 -> rank 3. A 3: C, B nearer than A 0 -> rank 3.
    # B 1: A 0 and C 2 (both 1 away) and A 3 are nearer than B 10 -> rank 4. B 10: A 3 and C 2 are
    # nearer than B 1 -> rank 3. C has no true match and is left out: ranks 3, 3, 4, 3.
    embeddings = torch.tensor([[0.], [3.], [1.], [10.], [2.]])
    labels = torch.tensor([0, 0, 1, 1, 2])
    assert evaluate.recall_at_k(embeddings, labels, k_vals=(1, 2, 3, 4)) == {
        "recall@1": 0.0, "recall@2": 0.0, "recall@3": 0.75, "recall@4": 1.0}


def test_recall_with_a_gallery_by_hand():
    # Query A at 0: gallery A at 2 is nearer than B at -3 -> rank 1. Query B at 0: A at 2 is nearer
    # than B at -3 -> rank 2. Query C: no C in the gallery, left out. Recall at 1 is 1 of 2.
    scores = evaluate.recall_at_k(torch.zeros(3, 1), torch.tensor([0, 1, 2]),
                                  torch.tensor([[2.], [-3.]]), torch.tensor([0, 1]), (1, 2))
    assert scores == {"recall@1": 0.5, "recall@2": 1.0}


def test_a_wrong_row_exactly_as_near_counts_as_nearer():
    # Query A at 0, between A at 1 and B at -1, both 1 away: the tie goes to B, rank 2.
    scores = evaluate.recall_at_k(torch.zeros(1, 1), torch.tensor([0]),
                                  torch.tensor([[1.], [-1.]]), torch.tensor([0, 1]), (1, 2))
    assert scores == {"recall@1": 0.0, "recall@2": 1.0}


@pytest.mark.parametrize("with_gallery", [False, True])
@pytest.mark.parametrize("first_seed", [0, 100, 200])
def test_recall_equals_brute_force_with_ties_and_duplicates(with_gallery, first_seed):
    wrong = []
    for seed in range(first_seed, first_seed + 100):
        problem = whole_number_problem(seed, with_gallery)
        if evaluate.recall_at_k(*problem, k_vals=(1, 2, 4)) != brute_force_recall(*problem):
            wrong.append(seed)
    assert not wrong, f"{len(wrong)} of 100 seeds differ"


@pytest.mark.parametrize("seed", range(40))
def test_recall_equals_brute_force_without_ties(seed):
    generator = torch.Generator().manual_seed(seed)
    queries, gallery = unit_rows(30, 8, seed), unit_rows(25, 8, seed + 1000)
    labels = random_ints(6, 30, generator)
    assert evaluate.recall_at_k(queries, labels, k_vals=(1, 2, 4)) == (
        brute_force_recall(queries, labels))
    problem = (queries, labels, gallery, random_ints(5, 25, generator))
    assert evaluate.recall_at_k(*problem, k_vals=(1, 2, 4)) == brute_force_recall(*problem)


@pytest.mark.parametrize("count, dimensions", [(5, 3), (37, 17), (64, 64), (150, 128)])
def test_recall_with_exact_copies_of_real_valued_rows(count, dimensions):
    # Each row exists three times, twice in its class and once in another: rank 2 for the former,
    # and the third copies are lone.
    rows = unit_rows(count, dimensions).repeat(3, 1)
    labels = torch.cat([torch.arange(count), torch.arange(count), torch.arange(count) + count])
    assert evaluate.recall_at_k(rows, labels, k_vals=(1, 2)) == {"recall@1": 0.0, "recall@2": 1.0}


def test_recall_of_collapsed_embeddings_is_the_worst():
    # All rows equal: each of the 6 rows of other classes counts as nearer, so rank 7 of 8.
    rows = unit_rows(1, 16).repeat(9, 1)
    scores = evaluate.recall_at_k(rows, torch.arange(9) // 3, k_vals=(1, 6, 7, 8))
    assert scores == {"recall@1": 0.0, "recall@6": 0.0, "recall@7": 1.0, "recall@8": 1.0}


def test_recall_is_exact_for_nearly_collapsed_embeddings():
    rows, labels = nearly_collapsed(120, 32), torch.arange(120) % 12
    assert evaluate.recall_at_k(rows, labels, k_vals=(1, 2, 4)) == brute_force_recall(rows, labels)


def test_lone_queries_are_left_out_of_the_mean():
    rows, labels = unit_rows(40, 8), torch.arange(40) % 8
    lone = 100 + torch.arange(10)
    ranks = [r for r in brute_force_ranks(torch.cat([rows, unit_rows(10, 8, seed=1)]),
                                          torch.cat([labels, lone])) if r]
    assert len(ranks) == 40
    scores = evaluate.recall_at_k(torch.cat([rows, unit_rows(10, 8, seed=1)]),
                                  torch.cat([labels, lone]), k_vals=(3,))
    assert scores == {"recall@3": sum(rank <= 3 for rank in ranks) / 40}


@pytest.mark.parametrize("elements", BLOCK_SIZES)
def test_most_queries_may_be_lone(monkeypatch, elements):
    monkeypatch.setattr(evaluate, "BLOCK_ELEMENTS", elements)
    queries, labels = torch.arange(600.).unsqueeze(1), torch.arange(600)
    gallery = torch.tensor([[5.], [7.]]), torch.tensor([5, 7])  # queries 5 and 7 find their match
    ranks = first_ranks(queries, labels, *gallery)
    assert ranks.tolist() == [i in (5, 7) for i in range(600)]
    assert evaluate.rank_metrics(queries, labels, *gallery, k_vals=(1,)) == {
        "recall@1": 1, "precision@1": 1, "mrr": 1, "r_precision": 1, "map@r": 1, "map": 1}


@pytest.mark.parametrize("elements", BLOCK_SIZES)
@pytest.mark.parametrize("with_gallery", [False, True])
def test_recall_does_not_depend_on_the_blocks(monkeypatch, elements, with_gallery):
    queries, labels = unit_rows(50, 16), torch.arange(50) % 7
    problem = [queries, labels] + [unit_rows(31, 16, seed=1), torch.arange(31) % 7] * with_gallery
    monkeypatch.setattr(evaluate, "BLOCK_ELEMENTS", elements)
    assert evaluate.recall_at_k(*problem, k_vals=(1, 2, 4)) == brute_force_recall(*problem)


@pytest.mark.parametrize("seed", range(3))
def test_recall_is_the_same_in_float32_and_float64(seed):
    rows, labels = unit_rows(400, 32, seed), torch.arange(400) % 40
    assert evaluate.recall_at_k(rows, labels) == evaluate.recall_at_k(rows.double(), labels)


@pytest.mark.parametrize("names", [[5, 900, -3, 17],
                                   [2 ** 62, 2 ** 62 + 1, 2 ** 62 + 2, -2 ** 62]])
def test_labels_may_be_any_integers(names):
    rows, labels = unit_rows(60, 8), torch.arange(60) % 4
    renamed = torch.tensor(names)[labels]
    assert evaluate.evaluate_embeddings(rows, renamed) == pytest.approx(
        evaluate.evaluate_embeddings(rows, labels))
    assert evaluate.distance_ratio(rows, renamed) == pytest.approx(
        evaluate.distance_ratio(rows, labels))


def test_the_order_of_the_rows_does_not_matter():
    rows, labels = unit_rows(60, 8), torch.arange(60) % 9
    order = torch.randperm(60, generator=torch.Generator().manual_seed(0))
    assert evaluate.recall_at_k(rows[order], labels[order]) == evaluate.recall_at_k(rows, labels)


def test_recall_rises_with_k_to_one():
    scores = evaluate.recall_at_k(unit_rows(30, 4), torch.arange(30) % 10, k_vals=range(1, 30))
    values = list(scores.values())
    assert list(scores) == [f"recall@{k}" for k in range(1, 30)]
    assert values == sorted(values) and values[-1] == 1.0
    assert all(type(value) is float for value in values)


@pytest.mark.parametrize("k, with_gallery, most", [(0, False, 5), (6, False, 5), (4, True, 3)])
def test_recall_refuses_k_out_of_range(k, with_gallery, most):
    problem = [unit_rows(6, 2), torch.arange(6) % 2]
    problem += [unit_rows(3, 2), torch.arange(3) % 2] * with_gallery
    with pytest.raises(ValueError, match=rf"--k_vals {k}: .*1 to {most}"):
        evaluate.recall_at_k(*problem, k_vals=(1, k))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("part", ["query", "gallery"])
def test_rows_that_are_not_finite_are_named(value, part):
    problem = {"query": unit_rows(6, 4), "gallery": unit_rows(5, 4, seed=1)}
    problem[part][3, 2] = problem[part][4, 0] = value
    with pytest.raises(ValueError, match=rf"2 of \d {part} embeddings are not finite.* row 3"):
        evaluate.recall_at_k(problem["query"], torch.arange(6) % 2, problem["gallery"],
                             torch.arange(5) % 2, k_vals=(1,))


@pytest.mark.parametrize("scale", [1e-3, 1e3, 1e15, 1e20, 1e30])
def test_recall_of_large_rows_is_right_or_refused(scale):
    # 1e20 squared is above float32's largest number; such rows must not come out as perfect.
    rows, labels = unit_rows(20, 4), torch.arange(20) // 2
    try:
        scores = evaluate.recall_at_k(rows * scale, labels, k_vals=(1, 2, 4))
    except ValueError as error:
        assert scale >= 1e20 and "true match" not in str(error)
    else:
        assert scores == brute_force_recall(rows, labels)


@pytest.mark.parametrize("queries, labels, gallery, gallery_labels, message", [
    ((6, 4), 5, None, None, r"query embeddings of shape \[6, 4\] with 5 labels"),
    ((6, 4), 6, (5, 4), 4, r"gallery embeddings of shape \[5, 4\] with 4 labels"),
    ((6, 4), 6, (5, 3), 5, "query embeddings have 4 dimensions, gallery embeddings 3"),
    ((6,), 6, None, None, r"expected \[N, D\]"),
    ((0, 4), 0, None, None, "N above 0"),
    ((6, 4), 6, (0, 4), 0, "gallery embeddings"),
])
def test_inputs_that_do_not_belong_together(queries, labels, gallery, gallery_labels, message):
    with pytest.raises(ValueError, match=message):
        evaluate.recall_at_k(torch.ones(queries), torch.zeros(labels, dtype=torch.long),
                             None if gallery is None else torch.ones(gallery),
                             None if gallery is None else torch.zeros(gallery_labels).long(),
                             k_vals=(1,))


@pytest.mark.parametrize("labels, gallery_labels", [(range(6), None), ([0, 0, 1, 1], [2, 3, 4])])
def test_no_query_with_a_true_match(labels, gallery_labels):
    labels = torch.tensor(labels)
    gallery = None if gallery_labels is None else unit_rows(len(gallery_labels), 3)
    gallery_labels = None if gallery_labels is None else torch.tensor(gallery_labels)
    with pytest.raises(ValueError, match="no query has a true match"):
        evaluate.recall_at_k(unit_rows(len(labels), 3), labels, gallery, gallery_labels, (1,))


# ---- a gallery that holds the queries


def own_problem(problem, seed=0):
    """(queries, labels, gallery, gallery labels) -> the same with the queries in the gallery, own.

    The gallery's rows are shuffled; own says where each query lies among them.
    """
    queries, labels, gallery, gallery_labels = problem
    count = len(queries) + len(gallery)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    return (queries, labels, torch.cat([queries, gallery])[order],
            torch.cat([labels, gallery_labels])[order], order.argsort()[:len(queries)])


def test_own_by_hand():
    # On a line: queries A at 0 and B at 1 are rows 2 and 0 of the gallery, beside A at 5 and B at
    # 1. From A 0 both B are nearer than A 5: rank 3. From B 1 its copy is nearest: rank 1.
    gallery, labels = torch.tensor([[1.], [5.], [0.], [1.]]), torch.tensor([1, 0, 0, 1])
    problem = torch.tensor([[0.], [1.]]), torch.tensor([0, 1]), gallery, labels
    own = torch.tensor([2, 0])
    assert first_ranks(*problem, own).tolist() == [3, 1]
    assert evaluate.recall_at_k(*problem, (1, 2, 3), own) == {
        "recall@1": 0.5, "recall@2": 0.5, "recall@3": 1.0}
    assert evaluate.recall_at_k(*problem, (1, 4)) == {"recall@1": 1.0, "recall@4": 1.0}
    distances, indices = evaluate.knn(problem[0], gallery, 3, own)
    assert distances.tolist() == [[1, 1, 5], [0, 1, 4]]
    assert set(indices[0, :2].tolist()) == {0, 3} and indices[1].tolist() == [3, 2, 1]


@pytest.mark.parametrize("elements", BLOCK_SIZES)
@pytest.mark.parametrize("count, others, k", [(1, 1, 1), (9, 4, 12), (40, 30, 5)])
def test_knn_without_the_queries_themselves_equals_brute_force(monkeypatch, elements, count,
                                                               others, k):
    monkeypatch.setattr(evaluate, "BLOCK_ELEMENTS", elements)
    labels = torch.zeros(count).long(), torch.zeros(others).long()
    queries, _, gallery, _, own = own_problem(
        (unit_rows(count, 6), labels[0], unit_rows(others, 6, seed=1), labels[1]))
    expected = float64_distances(queries, gallery)
    assert (expected[range(count), own] == 0).all()
    expected[range(count), own] = np.inf
    order = expected.argsort(1)[:, :k]
    distances, indices = evaluate.knn(queries, gallery, k, own)
    assert indices.tolist() == order.tolist()
    np.testing.assert_allclose(distances, np.take_along_axis(expected, order, 1), atol=1e-5)


@pytest.mark.parametrize("elements", BLOCK_SIZES)
def test_copies_of_a_query_in_other_rows_are_neighbours(monkeypatch, elements):
    monkeypatch.setattr(evaluate, "BLOCK_ELEMENTS", elements)
    queries = unit_rows(20, 16)
    gallery = queries.repeat(3, 1)  # query i is row i + 20; i and i + 40 are copies
    own = torch.arange(20, 40)
    distances, indices = evaluate.knn(queries, gallery, 2, own)
    assert [set(row) for row in indices.tolist()] == [{i, i + 40} for i in range(20)]
    assert distances.max() < 2e-3
    labels = torch.cat([torch.arange(20) + 100, torch.arange(20), torch.arange(20)])
    ranks = first_ranks(queries, torch.arange(20), gallery, labels, own)
    assert ranks.tolist() == [2] * 20  # the wrong copy is as near as the right one


@pytest.mark.parametrize("first_seed", [0, 100, 200])
def test_recall_without_the_queries_themselves_equals_brute_force(first_seed):
    wrong = []
    for seed in range(first_seed, first_seed + 100):
        *problem, own = own_problem(whole_number_problem(seed, True), seed)
        expected = brute_force_ranks(*problem, own=own.tolist())
        recall = brute_force_recall(*problem, own=own.tolist())
        if (first_ranks(*problem, own).tolist() != expected
                or evaluate.recall_at_k(*problem, k_vals=(1, 2, 4), own=own) != recall):
            wrong.append(seed)
    assert not wrong, f"{len(wrong)} of 100 seeds differ"


@pytest.mark.parametrize("elements", BLOCK_SIZES)
@pytest.mark.parametrize("seed", range(5))
def test_recall_without_the_queries_themselves_without_ties(monkeypatch, elements, seed):
    monkeypatch.setattr(evaluate, "BLOCK_ELEMENTS", elements)
    generator = torch.Generator().manual_seed(seed)
    *problem, own = own_problem((unit_rows(30, 8, seed), random_ints(6, 30, generator),
                                 unit_rows(25, 8, seed + 1000), random_ints(5, 25, generator)))
    assert evaluate.recall_at_k(*problem, k_vals=(1, 2, 4), own=own) == (
        brute_force_recall(*problem, own=own.tolist()))


def test_a_query_whose_only_true_match_is_itself_is_left_out():
    rows, labels = unit_rows(5, 3), torch.tensor([0, 0, 1, 2, 3])
    ranks = first_ranks(rows[2:3], labels[2:3], rows, labels, torch.tensor([2]))
    assert ranks.tolist() == [0]
    with pytest.raises(ValueError, match="no query has a true match"):
        evaluate.recall_at_k(rows[2:], labels[2:], rows, labels, (1,), torch.arange(2, 5))


@pytest.mark.parametrize("seed", range(20))
def test_the_queries_as_their_own_gallery_are_the_queries_alone(seed):
    queries, labels = whole_number_problem(seed, False)
    own = torch.arange(len(queries))
    gallery = queries.clone(), labels.clone()
    expected = evaluate.evaluate_embeddings(queries, labels, k_vals=(1, 3), seed=seed)
    assert evaluate.evaluate_embeddings(queries, labels, *gallery, (1, 3), seed, own) == expected
    for ours, theirs in zip(evaluate.knn(queries, gallery[0], 3, own),
                            evaluate.knn(queries, None, 3)):
        assert torch.equal(ours, theirs)


def test_own_takes_one_from_the_number_compared():
    rows, labels = unit_rows(6, 2), torch.arange(6) % 2
    own = torch.arange(6)
    numbers = [evaluate.number_compared(*arguments) for arguments in (
        (rows,), (rows, rows[:4]), (rows, rows, own))]
    assert numbers == [5, 4, 5]
    assert evaluate.recall_at_k(rows, labels, rows, labels, (5,), own) == {"recall@5": 1.0}
    with pytest.raises(ValueError, match="--k_vals 6: .*1 to 5"):
        evaluate.recall_at_k(rows, labels, rows, labels, (6,), own)
    with pytest.raises(ValueError, match="k = 6 .* 1 to 5"):
        evaluate.knn(rows, rows, 6, own)
    evaluate.knn(rows, rows, 6)  # without own the query is a neighbour like any other


def test_own_rows():
    rows, own = unit_rows(4, 2), torch.tensor([3, 1, 0, 2])
    assert evaluate.own_rows(rows).tolist() == [0, 1, 2, 3]
    assert evaluate.own_rows(rows, rows) is None and evaluate.own_rows(rows, rows, own) is own


# ---- every rank metric


def slow_scores(queries, labels, gallery=None, gallery_labels=None, own=None):
    """The vectors of rank_scores, from each query's sorted list of all others, in float64.

    A wrong row comes before a true match exactly as near.
    """
    others, other_labels = ((queries, labels) if gallery is None else (gallery, gallery_labels))
    others, other_labels = others.double().numpy(), other_labels.numpy()
    found = {name: [] for name in ("matches", "first_rank", "r_precision", "map@r", "map")}
    for i, (query, label) in enumerate(zip(queries.double().numpy(), labels.tolist())):
        right = other_labels == label
        distances = ((others - query) ** 2).sum(1)
        order = np.lexsort((right, distances)).tolist()  # by distance, wrong ones first
        left_out = i if gallery is None else None if own is None else own[i]
        hits = [bool(right[j]) for j in order if j != left_out]
        count, so_far, precisions = sum(hits), 0, []
        for rank, hit in enumerate(hits, 1):
            so_far += hit
            if hit:
                precisions.append((rank, so_far / rank))
        found["matches"].append(count)
        found["first_rank"].append(precisions[0][0] if count else 0)
        found["r_precision"].append(sum(hits[:count]) / max(1, count))
        found["map@r"].append(sum(p for rank, p in precisions if rank <= count) / max(1, count))
        found["map"].append(sum(p for _, p in precisions) / max(1, count))
    return {name: np.array(values) for name, values in found.items()}


def slow_rank_metrics(*problem, k_vals=(1, 2, 4), scores=None):
    """The dict of rank_metrics, as means of slow_scores over the queries with a true match."""
    scores = scores or slow_scores(*problem)
    scores = {name: values[scores["matches"] > 0] for name, values in scores.items()}
    ranks = scores["first_rank"]
    return {**{f"recall@{k}": np.mean(ranks <= k) for k in k_vals},
            "precision@1": np.mean(ranks == 1), "mrr": np.mean(1 / ranks),
            **{name: np.mean(scores[name]) for name in ("r_precision", "map@r", "map")}}


def assert_scores(found, expected):
    """rank_scores' vectors are the expected ones: the counts exactly, the means to rounding."""
    assert set(found) >= set(expected)
    for name, values in expected.items():
        assert found[name].dtype == (torch.int64 if values.dtype == np.int64 else torch.float64)
        np.testing.assert_allclose(found[name].numpy(), values, rtol=0,
                                   atol=0 if values.dtype == np.int64 else 1e-12, err_msg=name)


def spied(monkeypatch, owner, name):
    """A list that gets (arguments, result) of each call of owner.name from now on."""
    calls, real = [], getattr(owner, name)

    def spy(*arguments, **named):
        result = real(*arguments, **named)
        calls.append((arguments, result))
        return result

    monkeypatch.setattr(owner, name, spy)
    return calls


# On a line: from the query of class 0 at 0 the gallery's classes read 0 1 0 2 0 outwards, so its
# true matches rank 1, 3, 5. Of the query of class 1 at 0.9 the one match, at 2, is 1.1 away, after
# 0 at 1 and before the others: rank 2. Class 7 is nowhere in the gallery: left out.
LINE = (torch.tensor([[0.], [0.9], [3.]]), torch.tensor([0, 1, 7]),
        torch.tensor([[1.], [2.], [3.], [4.], [5.]]), torch.tensor([0, 1, 0, 2, 0]))


@pytest.mark.parametrize("metric, first, second", [
    ("recall@1", 1, 0), ("recall@2", 1, 1),  # ranks of the nearest match 1 and 2
    ("precision@1", 1, 0), ("mrr", 1, 1 / 2),
    ("r_precision", 2 / 3, 0),  # 0 1 0 | 2 0: two of the first three; none of the first one
    ("map@r", (1 + 2 / 3) / 3, 0),  # precisions 1 and 2/3 at the hits in the first three, by 3
    ("map", (1 + 2 / 3 + 3 / 5) / 3, 1 / 2)])
def test_rank_metrics_by_hand(metric, first, second):
    scores = evaluate.rank_metrics(*LINE, k_vals=(1, 2))
    assert scores[metric] == pytest.approx((first + second) / 2, abs=1e-15)
    assert slow_rank_metrics(*LINE, k_vals=(1, 2))[metric] == pytest.approx(scores[metric])


def test_rank_scores_by_hand():
    scores = {name: values.tolist() for name, values in evaluate.rank_scores(*LINE).items()}
    assert scores["matches"] == [3, 1, 0] and scores["first_rank"] == [1, 2, 0]
    assert scores["r_precision"] == [2 / 3, 0, 0] and scores["map@r"] == pytest.approx(
        [5 / 9, 0, 0])
    assert scores["map"] == pytest.approx([34 / 45, 1 / 2, 0])
    alone = evaluate.rank_scores(*LINE, metrics=("mrr", "recall"), k_vals=(1, 5))
    assert {name: values.tolist() for name, values in alone.items()} == {
        "matches": [3, 1, 0], "first_rank": [1, 2, 0], "recall@1": [1, 0, 0],
        "recall@5": [1, 1, 0], "mrr": [1, 1 / 2, 0]}


def test_a_tie_goes_to_the_wrong_row_in_every_rank_metric():
    # From the query at 0: classes 0 and 1 both 1 away, then 0 and 1 both 2 away: reads 1 0 1 0.
    problem = (torch.zeros(1, 1), torch.tensor([0]), torch.tensor([[1.], [-1.], [2.], [-2.]]),
               torch.tensor([0, 1, 0, 1]))
    assert evaluate.rank_metrics(*problem, k_vals=(1, 2)) == {
        "recall@1": 0, "recall@2": 1, "precision@1": 0, "mrr": 1 / 2, "r_precision": 1 / 2,
        "map@r": 1 / 4, "map": 1 / 2}


@pytest.mark.parametrize("with_gallery, with_own", [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize("first_seed", [0, 80])
def test_rank_metrics_equal_brute_force_with_ties_and_duplicates(with_gallery, with_own,
                                                                 first_seed):
    wrong = []
    for seed in range(first_seed, first_seed + 80):
        problem, own = whole_number_problem(seed, with_gallery), None
        if with_own:
            *problem, own = own_problem(problem, seed)
        scores = evaluate.rank_metrics(*problem, k_vals=(1, 2, 4), own=own)
        vectors = slow_scores(*problem, own=None if own is None else own.tolist())
        assert_scores(evaluate.rank_scores(*problem, own=own), vectors)
        expected = slow_rank_metrics(scores=vectors)
        if list(scores) != list(expected) or scores != pytest.approx(expected, abs=1e-12):
            wrong.append(seed)
    assert not wrong, f"{len(wrong)} of 80 seeds differ"


@pytest.mark.parametrize("first_seed", range(0, 120, 40))
def test_map_equals_scikit_learn_without_ties(first_seed):
    for seed in range(first_seed, first_seed + 40):
        generator = torch.Generator().manual_seed(seed)
        queries, gallery = unit_rows(6, 5, seed), unit_rows(30, 5, seed + 1000)
        labels, others = random_ints(4, 6, generator), random_ints(4, 30, generator)
        near = -float64_distances(queries, gallery)
        expected = [average_precision_score(others.numpy() == label, row)
                    for label, row in zip(labels.tolist(), near) if label in others]
        assert evaluate.rank_metrics(queries, labels, gallery, others)["map"] == (
            pytest.approx(np.mean(expected), abs=1e-12))


@pytest.mark.parametrize("sizes", [[300, 1, 1, 2], [150, 150], [1] * 20 + [2], [60, 9, 8, 4, 3, 1],
                                   [400]], ids=str)
def test_rank_scores_of_classes_of_very_different_sizes(sizes):
    rows, labels = blobs(sizes, 3, 1.0)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(1))
    rows, labels = rows[order], labels[order]
    assert_scores(evaluate.rank_scores(rows, labels), slow_scores(rows, labels))
    rows = (rows * 2).round()  # with ties
    assert_scores(evaluate.rank_scores(rows, labels), slow_scores(rows, labels))


@pytest.mark.parametrize("metrics", [
    ("map",), ("mrr",), ("recall",), ("map@r", "precision@1"), ("recall", "r_precision"), ()],
    ids=str)
def test_rank_metrics_gives_those_asked_for(metrics):
    rows, labels = unit_rows(40, 4), torch.arange(40) % 7
    everything = evaluate.rank_metrics(rows, labels, k_vals=(1, 3))
    assert evaluate.rank_metrics(rows, labels, k_vals=(1, 3), metrics=metrics) == {
        key: value for key, value in everything.items() if key.split("@k")[0] in metrics
        or key.startswith("recall@") and "recall" in metrics}


@pytest.mark.parametrize("kind, function, value", [
    ("nearest", lambda ranks, count: ranks[:, 0], 3 / 2),  # ranks of the nearest match 1 and 2
    ("ranks", lambda ranks, count: ranks.nan_to_num(posinf=0).amax(1), (5 + 2) / 2),
    ("ranks", lambda ranks, count: {"few": count < 2, "most": ranks.isfinite().sum(1)},
     {"few": 1 / 2, "most": 2}),
    ("clusters", lambda clusters, labels: float(len(clusters)), 8.0),
    ("set", lambda embeddings, labels: float(embeddings.max()), 5.0)])
def test_a_metric_is_a_function_and_a_row(monkeypatch, kind, function, value):
    monkeypatch.setitem(evaluate.METRICS, "own", evaluate.Metric(function, kind, min))
    found = evaluate.evaluate_embeddings(*LINE, k_vals=[1], metrics=["own"])
    assert found == (value if isinstance(value, dict) else {"own": value})
    assert {"recall@1", "rho", *found} == set(evaluate.evaluate_embeddings(
        *LINE, k_vals=[1], metrics=["own", "recall", "rho"]))
    assert evaluate.best_of("set 1 own") is min


@pytest.mark.parametrize("best, columns", [
    (max, ["recall@1", "set 1 recall@30", "precision@1", "val map@r", "nmi", "d_an", "unknown"]),
    (min, ["dist_ratio", "val rho", "small d_ap"])])
def test_which_value_of_a_column_is_the_best(best, columns):
    assert [column for column in columns if evaluate.best_of(column) is not best] == []


def test_k_is_checked_only_where_recall_is_asked_for():
    rows, labels = unit_rows(6, 3), torch.arange(6) % 2  # fewer rows than the default k of 8
    assert list(evaluate.evaluate_embeddings(rows, labels, metrics=["map"])) == ["map"]


# ---- float32 blocks, decided in float64


def assert_exact(*problem, own=None):
    """rank_scores, of all ranks and of the first alone, is what brute force in float64 gives."""
    expected = slow_scores(*problem, own=own)
    own = None if own is None else torch.tensor(own)
    assert_scores(evaluate.rank_scores(*problem, own=own), expected)
    assert first_ranks(*problem, own=own).tolist() == (
        expected["first_rank"].tolist())


@pytest.mark.parametrize("count, classes, dimensions", [
    (300, 100, 8), (300, 5, 600), (500, 12, 8), (500, 12, 128), (400, 200, 600), (800, 250, 128)])
def test_rank_scores_equal_float64_brute_force(count, classes, dimensions):
    generator = torch.Generator().manual_seed(count)
    rows, labels = unit_rows(count, dimensions), random_ints(classes, count, generator)
    assert_scores(evaluate.rank_scores(rows, labels), slow_scores(rows, labels))
    queries, query_labels = unit_rows(40, dimensions, 5), random_ints(classes, 40, generator)
    problem = queries, query_labels, rows, labels
    assert_scores(evaluate.rank_scores(*problem), slow_scores(*problem))


def spots(count, dimensions, spread, seed=0):
    """Unit-norm rows in a tenth as many spots of a size, and labels that the spots cut across."""
    generator = torch.Generator().manual_seed(seed)
    centres = unit_rows(max(2, count // 10), dimensions, seed)
    rows = centres[random_ints(len(centres), count, generator)]
    rows = rows + spread * unit_rows(count, dimensions, seed + 1)
    return rows, random_ints(count // 8, count, generator)


@pytest.mark.parametrize("spread", [1e-1, 1e-3, 1e-4, 1e-5, 1e-6, 1e-7])
@pytest.mark.parametrize("dimensions", [8, 128, 600])
def test_rank_scores_of_tight_clusters(monkeypatch, dimensions, spread):
    doubtful = spied(monkeypatch, evaluate.Ranker, "nearer_of_doubtful")
    rows, labels = spots(240, dimensions, spread)
    assert_exact(rows, labels)
    assert spread > 1e-3 or doubtful
    *problem, own = own_problem((rows[:30], labels[:30], rows[30:], labels[30:]))
    assert_exact(*problem, own=own.tolist())


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e-4, 1e6, 1e15, 1e30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rank_scores_do_not_depend_on_the_scale(scale, dtype):
    rows, labels = unit_rows(300, 16), torch.arange(300) % 50
    expected = slow_scores(rows, labels)
    assert_scores(evaluate.rank_scores(rows.to(dtype) * scale, labels), expected)


@pytest.mark.parametrize("scale", [1e-250, 1e250])
def test_rank_scores_of_float64_rows_beyond_float32(scale):
    rows, labels = unit_rows(120, 16).double(), torch.arange(120) % 20
    assert_scores(evaluate.rank_scores(rows * scale, labels), slow_scores(rows, labels))


@pytest.mark.parametrize("difference", [1e-9, 1e-12])
def test_float64_rows_are_told_apart_beyond_float32(difference):
    # In float32 both gallery rows are 1 away, which would count against the query.
    gallery = torch.tensor([[1.0], [-1.0 - difference]], dtype=torch.float64)
    scores = evaluate.rank_scores(torch.zeros(1, 1).double(), torch.tensor([0]), gallery,
                                  torch.tensor([0, 1]))
    assert scores["first_rank"].tolist() == [1]


@pytest.mark.parametrize("offset", [10, 1e3, 1e5])
def test_rank_scores_far_from_the_origin(offset):
    rows, labels = unit_rows(200, 16) + offset, torch.arange(200) % 30
    assert_exact(rows, labels)


@pytest.mark.parametrize("outlier", [1e2, 1e4, 1e6, 1e8])
def test_one_far_row_does_not_blur_the_others(outlier):
    rows, labels = unit_rows(60, 8), torch.arange(60) % 6
    rows[-1] *= outlier
    assert_scores(evaluate.rank_scores(rows, labels), slow_scores(rows, labels))


@pytest.mark.parametrize("sizes", [[2] * 100, [3] * 80, [9] * 20, [40] * 6], ids=str)
@pytest.mark.parametrize("tight", [False, True])
def test_few_limits_are_compared_and_many_looked_up(monkeypatch, sizes, tight):
    calls = spied(monkeypatch, evaluate, "count_up_to")
    rows, labels = blobs(sizes, 32, 2.0)
    if tight:
        rows = rows.round() + 1e-7 * unit_rows(len(rows), 32)
    assert_exact(rows, labels)
    limits = {arguments[1].shape[1] for arguments, _ in calls
              if arguments[0].dtype == torch.float32}
    assert limits == {2, 2 * sizes[0]}  # of the nearest true match, and of all


@pytest.mark.parametrize("sizes", [[2] * 60, [5] * 24, [40] * 6], ids=str)
@pytest.mark.parametrize("spread", [0, 1e-9, 1e-5, 1e-4])
def test_collapsed_embeddings_are_ranked_in_float64(monkeypatch, sizes, spread):
    calls = spied(monkeypatch, evaluate, "wrong_in_float64")
    labels = blobs(sizes, 2, 1.0)[1]
    rows = torch.cat([torch.ones(len(labels), 16),
                      spread * unit_rows(len(labels), 16)], 1).double()
    rows = torch.cat([rows, torch.full((1, 32), 9.0)])  # or they would fill the whole range
    labels = torch.cat([labels, torch.tensor([1000])])
    assert_exact(rows, labels)
    assert calls


@pytest.mark.parametrize("count", [2, 9, 70])
@pytest.mark.parametrize("value", [0.0, 0.1, 1e20])
def test_rank_scores_of_identical_rows_are_the_worst(count, value):
    rows, labels = torch.full((count, 24), value), torch.arange(count) % 2
    scores = evaluate.rank_scores(rows, labels)
    others = torch.bincount(labels)[1 - labels]
    has_match = torch.bincount(labels)[labels] > 1
    assert scores["first_rank"].tolist() == ((1 + others) * has_match).tolist()
    assert_scores(scores, slow_scores(rows * 0, labels))


# ---- what the ranks do not depend on


def hard_problem():
    """Rows of every kind at once: spots, copies, a far row, a large class, lone rows."""
    rows, labels = spots(240, 24, 1e-5)
    rows = torch.cat([rows, rows[:30], torch.ones(12, 24), 3 * unit_rows(40, 24, 9)])
    labels = torch.cat([labels, labels[:15], 500 + torch.arange(15), torch.arange(12) % 5,
                        torch.zeros(40).long()])
    return rows, labels


def hard_scores(**options):
    rows, labels = hard_problem()
    return [evaluate.rank_scores(rows, labels, **options),
            evaluate.rank_scores(rows[:90], labels[:90], rows[60:], labels[60:], **options),
            evaluate.rank_scores(rows, labels, metrics=(), **options)]


def assert_same(found, expected):
    for one, other in zip(found, expected):
        assert_scores(one, {name: values.numpy() for name, values in other.items()})


@pytest.mark.parametrize("elements", [1, 7, 1000, 60_000])
def test_rank_scores_do_not_depend_on_the_blocks(monkeypatch, elements):
    expected = hard_scores()
    monkeypatch.setattr(evaluate, "BLOCK_ELEMENTS", elements)
    assert_same(hard_scores(), expected)


@pytest.mark.parametrize("memory", [1, 4096, 50_000, 2 ** 20])
def test_rank_scores_do_not_depend_on_the_memory(memory):
    assert_same(hard_scores(memory=memory), hard_scores())


@pytest.mark.parametrize("spread", [1e-6, 1e-7])
def test_nearly_tied_ranks_do_not_depend_on_how_they_are_found(spread):
    rows, labels = spots(240, 128, spread)
    expected = first_ranks(rows, labels)
    assert torch.equal(evaluate.rank_scores(rows, labels)["first_rank"], expected)
    assert torch.equal(first_ranks(rows, labels, memory=4096), expected)


def test_rank_scores_do_not_depend_on_the_threads():
    expected = hard_scores()
    torch.set_num_threads(3)
    try:
        assert_same(hard_scores(), expected)
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("seed", range(5))
def test_rank_scores_follow_the_order_of_the_rows(seed):
    rows, labels = hard_problem()
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
    expected = evaluate.rank_scores(rows, labels)
    assert_same([evaluate.rank_scores(rows[order], labels[order])],
                [{name: values[order] for name, values in expected.items()}])


def random_scores():
    """All metrics of rows on which products in bfloat16 would show."""
    rows, labels = unit_rows(600, 64), torch.arange(600) % 60
    return evaluate.evaluate_embeddings(rows, labels, metrics=evaluate.METRICS)


@pytest.mark.parametrize("precision", ["medium", "high"])
def test_metrics_do_not_depend_on_the_precision_set_for_products(precision):
    expected, hard = random_scores(), hard_scores()
    torch.set_float32_matmul_precision(precision)
    try:
        assert random_scores() == expected
        assert_same(hard_scores(), hard)
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_metrics_do_not_depend_on_autocast(dtype):
    expected, hard = random_scores(), hard_scores()
    with torch.autocast("cpu", dtype=dtype):
        assert random_scores() == expected
        assert_same(hard_scores(), hard)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_metrics_do_not_depend_on_the_gradient_mode(mode):
    expected = random_scores()
    with mode():
        assert random_scores() == expected


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_rank_scores_of_other_types_are_those_of_their_values(dtype):
    rows, labels = unit_rows(90, 16).to(dtype), torch.arange(90) % 14
    assert_scores(evaluate.rank_scores(rows, labels), slow_scores(rows, labels))


class Largest(TorchDispatchMode):
    """Keeps the bytes of the largest result of any operation."""

    bytes = 0

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        result = function(*arguments, **(named or {}))
        for part in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(part, torch.Tensor):
                self.bytes = max(self.bytes, part.numel() * part.element_size())
        return result


@pytest.mark.parametrize("spread, tight", [(0, 0), (1e-4, 60)])
def test_ranks_keep_to_the_memory(monkeypatch, spread, tight):
    # A spot of one class, with one row of another class in it: all of its distances are doubtful.
    rows, labels = unit_rows(1500, 64), torch.arange(1500) // 5 + 1
    rows[:tight + 1] = rows[:1] + spread * unit_rows(tight + 1, 64, 1)[:1500]
    labels[:tight] = 0
    monkeypatch.setattr(evaluate, "in_threads",  # Largest sees one thread alone
                        lambda function, parts, device: [function(part) for part in parts])
    with Largest() as largest:
        evaluate.rank_scores(rows, labels, memory=2 ** 20)
    assert largest.bytes <= 4 * 2 ** 20  # the embeddings alone are 0.8 MB in float64


def test_arguments_are_left_as_they_were():
    rows, labels = hard_problem()
    before = rows.clone(), labels.clone()
    evaluate.evaluate_embeddings(rows, labels, rows[:40], labels[:40], metrics=evaluate.METRICS)
    assert torch.equal(rows, before[0]) and torch.equal(labels, before[1])


def test_rows_without_dimensions_are_refused():
    with pytest.raises(ValueError, match=r"\[6, 0\]"):
        evaluate.rank_metrics(torch.zeros(6, 0), torch.arange(6) % 2, k_vals=(1,))


# ---- k-means


def objective(embeddings, assignments, centroids):
    return (embeddings.double() - centroids.double()[assignments]).square().sum().item()


def blobs(sizes, dimensions, spread, seed=0):
    """Rows around len(sizes) centres, and the centre of each row."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(len(sizes), dimensions, generator=generator)
    labels = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    rows = centres[labels] + spread * torch.randn(len(labels), dimensions, generator=generator)
    return rows, labels


@pytest.mark.parametrize("seed", range(8))
def test_kmeans_by_hand(seed):
    # Wherever two centroids start among 0, 1, 9, 10, the clusters end as {0, 1} and {9, 10}.
    assignments, centroids = evaluate.kmeans(torch.tensor([[0.], [1.], [9.], [10.]]), 2, seed=seed)
    assert sorted(centroids.flatten().tolist()) == [0.5, 9.5]
    assert centroids[assignments].flatten().tolist() == [0.5, 0.5, 9.5, 9.5]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("sizes, spread", [([40] * 6, 0.1), ([90, 5, 30, 12, 3], 0.6),
                                           ([200], 1.0)])
def test_kmeans_is_as_good_as_scikit_learn_from_the_same_start(seed, sizes, spread):
    rows, _ = blobs(sizes, 8, spread, seed)
    _, start = evaluate.kmeans(rows, 7, iterations=0, seed=seed)
    reference = KMeans(7, init=start.double().numpy(), n_init=1, max_iter=20, tol=0)
    reference.fit(rows.double().numpy())
    assert objective(rows, *evaluate.kmeans(rows, 7, seed=seed)) <= reference.inertia_ * 1.001


def test_kmeans_of_nearly_collapsed_embeddings():
    rows = nearly_collapsed(200, 16)
    _, start = evaluate.kmeans(rows, 5, iterations=0)
    shifted = rows.double() - rows.double().mean(0)  # the same clusters, without the large offset
    reference = KMeans(5, init=(start.double() - rows.double().mean(0)).numpy(), n_init=1,
                       max_iter=20, tol=0).fit(shifted.numpy())
    assert objective(rows, *evaluate.kmeans(rows, 5)) <= reference.inertia_ * 1.02


@pytest.mark.parametrize("seed", range(3))
def test_kmeans_starts_at_distinct_rows_drawn_with_the_seed(seed):
    rows = unit_rows(30, 4)
    _, start = evaluate.kmeans(rows, 10, iterations=0, seed=seed)
    index = float64_distances(start, rows).argmin(1)
    assert len(set(index.tolist())) == 10
    torch.testing.assert_close(start, rows[index])
    _, other = evaluate.kmeans(rows, 10, iterations=0, seed=seed + 1)
    assert not torch.equal(start, other)


def test_kmeans_is_a_function_of_the_seed_alone():
    rows = unit_rows(80, 4)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = evaluate.kmeans(rows, 9, seed=3)
    assert torch.equal(torch.get_rng_state(), state)  # nothing is drawn globally
    torch.manual_seed(2)
    second = evaluate.kmeans(rows, 9, seed=3)
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])


@pytest.mark.parametrize("iterations", [0, 1, 3, 20])
def test_kmeans_assigns_each_row_to_its_nearest_centroid(iterations):
    rows = unit_rows(70, 5)
    assignments, centroids = evaluate.kmeans(rows, 6, iterations)
    assert assignments.dtype == torch.int64
    assert assignments.tolist() == float64_distances(rows, centroids).argmin(1).tolist()


def test_kmeans_improves_with_every_iteration():
    rows = unit_rows(300, 8)
    values = [objective(rows, *evaluate.kmeans(rows, 12, iterations)) for iterations in range(8)]
    assert all(after <= before * (1 + 1e-6) for before, after in itertools.pairwise(values))
    assert values[-1] < values[0]


@pytest.mark.parametrize("seed", range(10))
def test_empty_clusters_are_seeded_anew(seed):
    # Four points in 25 copies each: four starts among them usually coincide, which leaves clusters
    # empty; only with all four in use is the objective zero.
    points = torch.tensor([[0., 0.], [0., 5.], [7., 0.], [20., 20.]])
    rows = points.repeat(25, 1)
    assignments, centroids = evaluate.kmeans(rows, 4, seed=seed)
    assert Counter(assignments.tolist()) == {cluster: 25 for cluster in range(4)}
    assert objective(rows, assignments, centroids) == 0


def test_some_starts_of_the_previous_test_do_coincide():
    rows = torch.tensor([[0., 0.], [0., 5.], [7., 0.], [20., 20.]]).repeat(25, 1)
    starts = [evaluate.kmeans(rows, 4, iterations=0, seed=seed)[1] for seed in range(10)]
    assert min(len(start.unique(dim=0)) for start in starts) < 4


def test_kmeans_with_fewer_distinct_rows_than_clusters():
    assignments, centroids = evaluate.kmeans(torch.ones(10, 3), 4)
    assert torch.isfinite(centroids).all()
    assert objective(torch.ones(10, 3), assignments, centroids) == 0


def test_kmeans_stops_early_at_a_fixed_point(monkeypatch):
    calls = []
    nearest = evaluate.nearest_centroids
    monkeypatch.setattr(evaluate, "nearest_centroids",
                        lambda *arguments: calls.append(1) or nearest(*arguments))
    rows, _ = blobs([20] * 3, 4, 0.01)
    assignments, centroids = evaluate.kmeans(rows, 3, iterations=1000)
    assert len(calls) < 20
    for cluster in range(3):
        torch.testing.assert_close(centroids[cluster], rows[assignments == cluster].mean(0))


def test_kmeans_makes_at_most_the_given_iterations(monkeypatch):
    calls = []
    nearest = evaluate.nearest_centroids
    monkeypatch.setattr(evaluate, "nearest_centroids",
                        lambda *arguments: calls.append(1) or nearest(*arguments))
    evaluate.kmeans(unit_rows(400, 8), 20, iterations=3)
    assert len(calls) == 1 + 3  # the start, and one assignment after each update


def test_one_cluster_is_the_mean_and_as_many_as_rows_are_the_rows():
    rows = unit_rows(15, 4)
    assignments, centroids = evaluate.kmeans(rows, 1)
    assert assignments.tolist() == [0] * 15
    torch.testing.assert_close(centroids[0], rows.mean(0))
    assignments, centroids = evaluate.kmeans(rows, 15)
    assert sorted(assignments.tolist()) == list(range(15))
    torch.testing.assert_close(centroids[assignments], rows)


@pytest.mark.parametrize("clusters", [0, -1, 16])
def test_kmeans_refuses_more_clusters_than_rows(clusters):
    with pytest.raises(ValueError, match=f"{clusters} clusters of 15 embeddings.* 1 to 15"):
        evaluate.kmeans(unit_rows(15, 4), clusters)


@pytest.mark.parametrize("elements", BLOCK_SIZES)
def test_kmeans_does_not_depend_on_the_blocks(monkeypatch, elements):
    rows, _ = blobs([20] * 4, 6, 0.05)
    whole = evaluate.kmeans(rows, 4)[0]
    monkeypatch.setattr(evaluate, "BLOCK_ELEMENTS", elements)
    assert torch.equal(evaluate.kmeans(rows, 4)[0], whole)


def lloyd(embeddings, clusters, iterations, seed):
    """Assignments by plain Lloyd in float64: every distance anew in each iteration."""
    rows = embeddings.double().numpy()
    generator = torch.Generator().manual_seed(seed)
    start = torch.randperm(len(rows), generator=generator)[:clusters].numpy()
    centroids = rows[start].copy()

    def nearest():
        sq_distances = ((rows[:, None] - centroids[None]) ** 2).sum(-1)
        return sq_distances.argmin(1), sq_distances.min(1)

    assignments, sq_distances = nearest()
    for _ in range(iterations):
        farthest = iter(np.argsort(-sq_distances))
        for cluster in range(clusters):
            members = rows[assignments == cluster]
            centroids[cluster] = members.mean(0) if len(members) else rows[next(farthest)]
        before = assignments
        assignments, sq_distances = nearest()
        if (assignments == before).all():
            break
    return assignments


@pytest.mark.parametrize("first_seed", range(0, 300, 100))
def test_kmeans_equals_plain_lloyd(first_seed):
    wrong = []
    for seed in range(first_seed, first_seed + 100):
        generator = torch.Generator().manual_seed(seed)
        count, dimensions = 20 + seed % 61, 1 + seed % 9
        clusters, iterations = 1 + seed % (count // 2), seed % 21
        rows = torch.randn(count, dimensions, generator=generator)
        if seed % 3 == 0:
            rows += 5 * torch.randn(4, dimensions, generator=generator)[
                random_ints(4, count, generator)]
        assignments, _ = evaluate.kmeans(rows, clusters, iterations, seed)
        if assignments.tolist() != lloyd(rows, clusters, iterations, seed).tolist():
            wrong.append(seed)
    assert not wrong, f"{len(wrong)} of 100 seeds differ"


@pytest.mark.parametrize("first_seed", [0, 100])
def test_kmeans_with_ties_leaves_each_row_at_a_nearest_centroid(first_seed):
    for seed in range(first_seed, first_seed + 100):
        generator = torch.Generator().manual_seed(seed)
        rows = whole_numbers(20 + seed % 60, 1 + seed % 4, generator)
        assignments, centroids = evaluate.kmeans(rows, 1 + seed % 19, seed=seed)
        distances = float64_distances(rows, centroids)
        np.testing.assert_allclose(distances[range(len(rows)), assignments], distances.min(1),
                                   atol=1e-5)


@pytest.mark.parametrize("first_seed", [0, 20])
def test_kmeans_is_no_worse_than_scikit_learn_from_many_starts(first_seed):
    for seed in range(first_seed, first_seed + 20):
        rows, _ = blobs([30, 4, 11, 25, 7] * (1 + seed % 3), 2 + seed % 12, 0.1 + seed % 5 / 5,
                        seed)
        clusters = 2 + seed % 24
        _, start = evaluate.kmeans(rows, clusters, iterations=0, seed=seed)
        reference = KMeans(clusters, init=start.double().numpy(), n_init=1, max_iter=20, tol=0)
        with threadpool_limits(1):
            reference.fit(rows.double().numpy())
        assert objective(rows, *evaluate.kmeans(rows, clusters, seed=seed)) <= (
            reference.inertia_ * (1 + 1e-4))


def test_mean_distances_of_more_rows_than_are_taken_in_float64():
    """From products in float32, in tiles: the mean over all pairs is the float64 one."""
    generator = torch.Generator().manual_seed(0)
    rows = 3 + torch.randn(9000, 4, generator=generator)
    labels = torch.randint(1500, (9000,), generator=generator)
    labels[:700] = 1500  # a large class, too
    d_ap, d_an = distances_of_pairs(rows, labels)
    sums = {True: 0.0, False: 0.0}
    for part in torch.arange(9000).split(1000):
        apart = torch.cdist(rows[part].double(), rows.double(),
                            compute_mode="donot_use_mm_for_euclid_dist")
        same = labels[part].unsqueeze(1) == labels
        sums[True] += float(apart[same].sum())
        sums[False] += float(apart[~same].sum())
    counts = torch.bincount(labels)
    pairs = int((counts * (counts - 1)).sum())
    assert d_ap == pytest.approx(sums[True] / pairs, rel=1e-12)
    assert d_an == pytest.approx(sums[False] / (9000 * 8999 - pairs), rel=1e-6)


def test_mean_distances_of_tight_classes_of_many_rows():
    """Rounding of pairs that nearly coincide stays out of the mean over two classes."""
    generator = torch.Generator().manual_seed(0)
    clumps = torch.nn.functional.normalize(torch.randn(3, 16, generator=generator), dim=1)
    rows = clumps[[0, 1]].repeat(3000, 1) + 1e-4 * torch.randn(6000, 16, generator=generator)
    rows = torch.cat([rows, clumps[2:]])
    d_ap, d_an = distances_of_pairs(rows, torch.tensor([0] * 6000 + [1]))
    exact = (rows[:-1] - rows[-1]).double().norm(dim=1).mean()
    assert d_an == pytest.approx(float(exact), rel=1e-6)
    some = torch.cdist(rows[:6000:3].double(), rows[:6000].double(),
                       compute_mode="donot_use_mm_for_euclid_dist")
    assert d_ap == pytest.approx(float(some.sum()) / (2000 * 5999), rel=1e-3)


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1.0, 1e19, 1e30])
def test_cluster_and_distance_metrics_do_not_depend_on_the_scale(scale):
    rows, labels = blobs([20, 15, 9], 8, 0.5)
    rows = rows * 2.0 ** round(math.log2(scale))
    plain, _ = blobs([20, 15, 9], 8, 0.5)
    assert evaluate.kmeans(rows, 3)[0].tolist() == evaluate.kmeans(plain, 3)[0].tolist()
    assert evaluate.distance_ratio(rows, labels) == evaluate.distance_ratio(plain, labels)
    assert distances_of_pairs(rows, labels) == pytest.approx(
        [2.0 ** round(math.log2(scale)) * value for value in
         distances_of_pairs(plain, labels)], rel=1e-12)


def test_many_true_matches_take_the_float64_pass(monkeypatch):
    """With half of the gallery to each class a look at a row for each close call would not end."""
    calls = spied(monkeypatch, evaluate, "wrong_in_float64")
    generator = torch.Generator().manual_seed(0)
    rows = torch.nn.functional.normalize(torch.randn(1, 16, generator=generator), dim=1)
    rows = rows + 0.03 * torch.randn(8000, 16, generator=generator)
    labels = torch.arange(8000) % 2
    own = torch.arange(0, 8000, 400)
    assert_exact(rows[::400], labels[::400], rows, labels, own=own.tolist())
    assert calls


def test_ranks_by_a_comparison_of_ones_own():
    """Equality as a comparison gives what labels give; a rule on pairs of labels what loops do."""
    rows, labels = blobs([9, 7, 4, 1], 5, 1.0)
    for own in (None, "gallery"):
        problem = ((rows, labels) if own is None else
                   (rows[:8], labels[:8], torch.cat([rows, rows[:3]]),
                    torch.cat([labels, labels[:3]])))
        place = None if own is None else torch.arange(8)
        expected = evaluate.rank_scores(*problem, own=place)
        found = evaluate.rank_scores(*problem, own=place, same=lambda a, b: a == b)
        assert expected.keys() == found.keys()
        for name in expected:
            assert found[name].tolist() == pytest.approx(expected[name].tolist(), rel=1e-12), name
    levels = torch.stack([labels, labels % 2], 1)  # same super-class, another class
    same = lambda a, b: (a[..., 1] == b[..., 1]) & (a[..., 0] != b[..., 0])  # noqa: E731
    first = evaluate.rank_scores(rows, levels, same=same)["first_rank"].tolist()
    for i in range(len(rows)):
        order = sorted((float((rows[i] - rows[j]).double().norm()), j) for j in range(len(rows))
                       if j != i)
        hits = [rank for rank, (_, j) in enumerate(order, 1)
                if levels[i, 1] == levels[j, 1] and levels[i, 0] != levels[j, 0]]
        assert first[i] == (hits[0] if hits else 0)
    assert "recall@2" in evaluate.rank_metrics(rows, levels, k_vals=[2], same=same)
    with pytest.raises(ValueError, match="bool tensor of shape"):
        evaluate.rank_scores(rows, labels, same=lambda a, b: a)


@pytest.mark.parametrize("metrics", [evaluate.RANK_METRICS, ("recall",)])
def test_a_comparison_by_which_a_block_of_queries_has_no_match(metrics, monkeypatch):
    """Only the last two of twelve queries have a true match; blocks of one to twelve queries."""
    rows, labels = unit_rows(12, 4), torch.cat([torch.arange(10), torch.tensor([10, 10])])
    expected = evaluate.rank_metrics(rows, labels, k_vals=[1, 2], metrics=metrics)
    for step in (1, 4, 12):
        monkeypatch.setattr(evaluate, "blocks", lambda count, columns: [
            slice(start, start + step) for start in range(0, count, step)])
        assert evaluate.rank_metrics(rows, labels, k_vals=[1, 2], metrics=metrics,
                                     same=torch.eq) == pytest.approx(expected)
    with pytest.raises(ValueError, match="no query has a true match"):
        evaluate.rank_metrics(rows[:10], labels[:10], k_vals=[1], metrics=metrics, same=torch.eq)


def test_own_rows_have_the_queries_labels():
    with pytest.raises(ValueError, match="their labels differ"):
        evaluate.rank_scores(unit_rows(2, 3), torch.tensor([0, 1]), unit_rows(4, 3),
                             torch.tensor([1, 1, 0, 1]), own=torch.tensor([0, 1]))


# ---- clusters against classes


def clusterings(first_seed, count):
    """Pairs (assignments, labels) of few to many clusters and classes; every third pair agrees."""
    for seed in range(first_seed, first_seed + count):
        generator = torch.Generator().manual_seed(seed)
        size, clusters, classes = (1 + random_ints(high, 1, generator).item()
                                   for high in (60, 20, 20))
        labels = random_ints(classes, size, generator)
        yield (labels * 3 + 7 if seed % 3 == 0 else random_ints(clusters, size, generator)), labels


def entropy(keys):
    counts = Counter(keys).values()
    return -sum(n / len(keys) * math.log(n / len(keys)) for n in counts)


def test_nmi_by_hand():
    # Entropy of the classes 2 + 2: ln 2 = 0.693147; of the clusters 3 + 1: 0.75 ln(4/3) +
    # 0.25 ln 4 = 0.562335. Mutual information: 0.5 ln(0.5 / 0.375) + 0.25 ln(0.25 / 0.375) +
    # 0.25 ln(0.25 / 0.125) = 0.143841 - 0.101366 + 0.173287 = 0.215762.
    # 0.215762 / ((0.693147 + 0.562335) / 2) = 0.343711.
    clusters, labels = torch.tensor([0, 0, 0, 1]), torch.tensor([5, 5, 9, 9])
    assert evaluate.nmi(clusters, labels) == pytest.approx(0.343711, abs=1e-6)


def test_nmi_equals_the_entropies_and_scikit_learn():
    for clusters, labels in clusterings(0, 300):
        pairs = list(zip(clusters.tolist(), labels.tolist()))
        entropies = entropy(clusters.tolist()), entropy(labels.tolist())
        shared = sum(entropies) - entropy(pairs)
        score = evaluate.nmi(clusters, labels)
        assert score == pytest.approx(normalized_mutual_info_score(labels, clusters), abs=1e-12)
        if sum(entropies):
            assert score == pytest.approx(2 * shared / sum(entropies), abs=1e-9)


@pytest.mark.parametrize("average", ["arithmetic", "geometric"])
def test_nmi_of_either_mean_and_ami_equal_scikit_learn(average):
    for clusters, labels in clusterings(500, 80):
        assert evaluate.nmi(clusters, labels, average) == pytest.approx(
            normalized_mutual_info_score(labels, clusters, average_method=average), abs=1e-12)
        ami = evaluate.ami(clusters, labels)
        assert type(ami) is float and ami == pytest.approx(
            adjusted_mutual_info_score(labels, clusters), abs=1e-12)


def test_nmi_with_the_geometric_mean_by_hand():
    # As above, 0.215762 of mutual information, over sqrt(0.693147 x 0.562335) = 0.624323.
    clusters, labels = torch.tensor([0, 0, 0, 1]), torch.tensor([5, 5, 9, 9])
    assert evaluate.nmi(clusters, labels, "geometric") == pytest.approx(0.345593, abs=2e-6)
    assert evaluate.nmi(torch.zeros(4).long(), labels, "geometric") == 0  # no entropy at all


def test_ami_of_equal_and_of_random_partitions():
    generator = torch.Generator().manual_seed(0)
    labels = random_ints(10, 500, generator)
    assert evaluate.ami(labels * 7 - 3, labels) == pytest.approx(1)
    assert abs(evaluate.ami(random_ints(50, 500, generator), labels)) < 0.05
    assert evaluate.nmi(random_ints(50, 500, generator), labels) > 0.1  # what ami corrects


@pytest.mark.parametrize("metric", [evaluate.nmi, evaluate.f1], ids=["nmi", "f1"])
def test_nmi_and_f1_stay_between_0_and_1(metric):
    scores = [metric(*pair) for pair in clusterings(0, 500)]
    assert all(type(score) is float for score in scores)
    assert min(scores) >= 0
    assert max(scores) <= 1, f"{sum(score > 1 for score in scores)} of 500 are above 1"


def test_nmi_of_equal_and_of_independent_partitions():
    labels = torch.arange(40) % 4
    assert evaluate.nmi(10 - labels, labels) == pytest.approx(1)
    assert evaluate.nmi(torch.arange(40) // 20, labels) == pytest.approx(0, abs=1e-12)


def test_f1_by_hand():
    # Clusters {0, 1, 2}, {3}; classes {0, 1}, {2, 3}. Pairs in one cluster: 01, 02, 12; in one
    # class: 01, 23; in both: 01. Precision 1/3, recall 1/2, F1 = 2 (1/3)(1/2) / (1/3 + 1/2) = 0.4.
    clusters, labels = torch.tensor([0, 0, 0, 1]), torch.tensor([5, 5, 9, 9])
    assert evaluate.f1(clusters, labels) == pytest.approx(0.4)


def test_f1_equals_a_loop_over_pairs_and_scikit_learn():
    for clusters, labels in clusterings(1000, 300):
        both = in_cluster = in_class = 0
        rows = zip(clusters.tolist(), labels.tolist())
        for (cluster, label), (other_cluster, other_label) in itertools.combinations(rows, 2):
            in_cluster += cluster == other_cluster
            in_class += label == other_label
            both += cluster == other_cluster and label == other_label
        precision, recall = both / max(1, in_cluster), both / max(1, in_class)
        expected = 2 * precision * recall / (precision + recall) if both else 0
        assert evaluate.f1(clusters, labels) == pytest.approx(expected, abs=1e-12)
        (_, fp), (fn, tp) = pair_confusion_matrix(labels.numpy(), clusters.numpy())
        assert evaluate.f1(clusters, labels) == pytest.approx(2 * tp / max(1, 2 * tp + fp + fn))


def test_f1_of_equal_partitions_of_lone_rows_and_of_many_rows():
    labels = torch.arange(40) % 4
    assert evaluate.f1(10 - labels, labels) == 1
    assert evaluate.f1(torch.arange(5), torch.arange(5)) == 0  # no pair at all
    # 200,000 rows have 2e10 pairs, more than 32 bits hold: one cluster of all, two equal classes.
    labels = torch.arange(200_000) % 2
    n = 100_000
    expected = 2 * (n * (n - 1)) / (2 * n * (2 * n - 1) / 2 + n * (n - 1))
    assert evaluate.f1(torch.zeros(2 * n).long(), labels) == pytest.approx(expected)


# ---- distance ratio


def slow_distance_ratio(embeddings, labels):
    """Mean over classes of the mean distance of their pairs, over that of the classes' centres."""
    rows, labels = embeddings.double().numpy(), labels.tolist()
    classes = {label: [row for row, own in zip(rows, labels) if own == label] for label in labels}
    within = [np.mean([np.linalg.norm(a - b) for a, b in itertools.combinations(members, 2)])
              for members in classes.values() if len(members) > 1]
    centres = [np.mean(members, 0) for members in classes.values()]
    between = [np.linalg.norm(a - b) for a, b in itertools.combinations(centres, 2)]
    if not within:
        return 0.0
    return np.mean(within) / np.mean(between) if between and np.mean(between) else np.inf


def test_distance_ratio_by_hand():
    # Class 0 at 0, 2: mean pair distance 2, centre 1. Class 1 at 4, 6, 8: pairs 2, 2, 4, mean 8/3,
    # centre 6. Class 2 at 11 alone: no pair, centre 11. Within (2 + 8/3) / 2 = 7/3; between the
    # centres 5, 10 and 5, mean 20/3. 7/3 over 20/3 = 0.35.
    rows = torch.tensor([[0.], [4.], [6.], [2.], [11.], [8.]])
    assert evaluate.distance_ratio(rows, torch.tensor([0, 1, 1, 0, 2, 1])) == pytest.approx(0.35)


@pytest.mark.parametrize("classes", [1, 2, 7, 40])
@pytest.mark.parametrize("count", [41, 90])
def test_distance_ratio_equals_loops(monkeypatch, classes, count):
    generator = torch.Generator().manual_seed(classes)
    labels = random_ints(classes, count, generator) * 10  # of all sizes, single members too
    rows = unit_rows(count, 16)
    expected = slow_distance_ratio(rows, labels)
    assert evaluate.distance_ratio(rows, labels) == pytest.approx(expected, rel=1e-4)
    monkeypatch.setattr(evaluate, "BLOCK_ELEMENTS", 50)
    assert evaluate.distance_ratio(rows, labels) == pytest.approx(expected, rel=1e-4)


def test_distance_ratio_of_nearly_collapsed_embeddings():
    rows, labels = nearly_collapsed(120, 16), torch.arange(120) % 40
    assert evaluate.distance_ratio(rows, labels) == pytest.approx(
        slow_distance_ratio(rows, labels), rel=1e-2)


@pytest.mark.parametrize("classes", [2, 30])
def test_distance_ratio_without_pairs_or_with_coinciding_centres(classes):
    rows = unit_rows(classes, 4)
    assert evaluate.distance_ratio(rows, torch.arange(classes)) == 0
    # Around one centre, each class a row and its mirror image, in whole numbers: centres equal.
    rows = torch.arange(1, classes + 1).float().unsqueeze(1) * torch.ones(1, 3)
    assert evaluate.distance_ratio(torch.cat([4 + rows, 4 - rows]),
                                   torch.arange(classes).repeat(2)) == float("inf")


# ---- spectral decay, mean distances


@pytest.mark.parametrize("count, dimensions", [(1, 1), (5, 5), (40, 3), (300, 64), (33, 32)])
def test_spectral_decay_equals_numpy(count, dimensions):
    for seed in range(10):
        rows = stretched(count, dimensions, seed)
        values = np.linalg.svd(rows.double().numpy(), compute_uv=False)
        shares = values / values.sum()
        expected = sum(1 / dimensions * np.log(1 / dimensions / share) for share in shares)
        assert evaluate.spectral_decay(rows) == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_spectral_decay_by_hand():
    # Singular values 3 and 1, shares 3/4 and 1/4: -ln 2 - (ln 3/4 + ln 1/4) / 2 = 0.143841.
    rows = torch.tensor([[3., 0.], [0., 1.]])
    assert evaluate.spectral_decay(rows) == pytest.approx(0.143841, abs=1e-6)
    assert evaluate.spectral_decay(-7 * rows[:, [1, 0]]) == pytest.approx(0.143841, abs=1e-6)


@pytest.mark.parametrize("dimensions", [1, 4, 30])
def test_spectral_decay_of_orthonormal_rows_is_zero(dimensions):
    rows = torch.linalg.qr(unit_rows(dimensions, dimensions).double())[0]
    assert evaluate.spectral_decay(rows) == pytest.approx(0, abs=1e-12)
    assert evaluate.spectral_decay(rows.repeat(3, 1)) == pytest.approx(0, abs=1e-12)


RANK_DEFICIENT = {"fewer rows than dimensions": unit_rows(3, 5), "zero": torch.zeros(9, 4),
                  "a dimension not used": unit_rows(20, 4) * torch.tensor([1., 1., 0., 1.]),
                  "a dimension twice": unit_rows(20, 4)[:, [0, 1, 2, 3, 3]],
                  "equal rows": torch.full((9, 4), 0.1),
                  "a plane": unit_rows(40, 2) @ unit_rows(2, 6)}


@pytest.mark.parametrize("rows", [rows.double() for rows in RANK_DEFICIENT.values()],
                         ids=RANK_DEFICIENT.keys())
def test_spectral_decay_of_too_few_directions_is_infinite(rows):
    if len(rows) == 40:
        rows = unit_rows(40, 2).double() @ unit_rows(2, 6).double()  # one product, in float64
    assert evaluate.spectral_decay(rows) == float("inf")


@pytest.mark.parametrize("elements", BLOCK_SIZES)
@pytest.mark.parametrize("count, classes", [(2, 1), (2, 2), (40, 7), (60, 59), (50, 2)])
def test_mean_distances_equal_loops(monkeypatch, elements, count, classes):
    rows, labels = unit_rows(count, 5), torch.arange(count) % classes
    monkeypatch.setattr(evaluate, "BLOCK_ELEMENTS", elements)
    distances, same, other = float64_distances(rows, rows), [], []
    for i, j in itertools.combinations(range(count), 2):
        (same if labels[i] == labels[j] else other).append(distances[i, j])
    expected = [np.mean(part) if part else np.nan for part in (same, other)]
    found = distances_of_pairs(rows, labels)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert [type(value) for value in found] == [float, float]


def test_mean_distances_by_hand():
    # Class 0 at 0, 1, 4: 1, 4 and 3 apart; class 1 at 10: 10, 9 and 6 away.
    rows = torch.tensor([[0.], [1.], [4.], [10.]])
    assert distances_of_pairs(rows, torch.tensor([0, 0, 0, 1])) == pytest.approx(
        (8 / 3, 25 / 3))


@pytest.mark.parametrize("scale", [1e-25, 1e-6, 1e6, 1e25])
def test_distances_and_decay_follow_the_scale(scale):
    rows, labels = unit_rows(50, 6).double(), torch.arange(50) % 7
    expected = distances_of_pairs(rows, labels)
    found = distances_of_pairs(rows * scale, labels)
    assert [value / scale for value in found] == pytest.approx(expected, rel=1e-6)
    assert evaluate.spectral_decay(rows * scale) == pytest.approx(evaluate.spectral_decay(rows))


def test_mean_distances_of_tight_classes():
    rows, labels = nearly_collapsed(60, 16, spread=1e-5), torch.arange(60) % 20
    distances = float64_distances(rows, rows)
    same = labels.numpy()[:, None] == labels.numpy()
    expected = distances[same].sum() / (same.sum() - 60), distances[~same].mean()
    assert distances_of_pairs(rows, labels) == pytest.approx(expected, rel=1e-3)


# ---- all metrics at once


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("with_gallery", [False, True])
def test_evaluate_embeddings_keys_and_range(seed, with_gallery):
    problem = whole_number_problem(seed, with_gallery)
    scores = evaluate.evaluate_embeddings(*problem, k_vals=(1, 3), seed=seed)
    assert list(scores) == ["recall@1", "recall@3", "map@r", "nmi", "f1"]
    assert all(type(score) is float and 0 <= score <= 1 for score in scores.values())


def test_evaluate_embeddings_of_well_separated_classes_are_perfect():
    rows, labels = blobs([12, 20], 8, 1e-3)
    assert evaluate.evaluate_embeddings(rows, labels) == pytest.approx(
        {"recall@1": 1, "recall@2": 1, "recall@4": 1, "recall@8": 1, "map@r": 1, "nmi": 1,
         "f1": 1})


def test_evaluate_embeddings_is_each_metric():
    rows, labels = blobs([9, 30, 4, 14], 8, 0.7)
    assignments, _ = evaluate.kmeans(rows, 4, seed=5)
    expected = {
        **evaluate.rank_metrics(rows, labels), "nmi": evaluate.nmi(assignments, labels),
        "ami": evaluate.ami(assignments, labels), "f1": evaluate.f1(assignments, labels),
        "dist_ratio": evaluate.distance_ratio(rows, labels),
        "rho": evaluate.spectral_decay(rows)}
    expected["d_ap"], expected["d_an"] = distances_of_pairs(rows, labels)
    assert evaluate.evaluate_embeddings(rows, labels, seed=5, metrics=evaluate.METRICS) == expected
    for name in evaluate.METRICS:
        alone = evaluate.evaluate_embeddings(rows, labels, seed=5, metrics=[name])
        keys = {"recall": ["recall@1", "recall@2", "recall@4", "recall@8"],
                "distances": ["d_ap", "d_an"]}.get(name, [name])
        assert alone == {key: expected[key] for key in keys}
    geometric = evaluate.evaluate_embeddings(rows, labels, seed=5, metrics=["nmi"],
                                             nmi_average="geometric")
    assert geometric == {"nmi": evaluate.nmi(assignments, labels, "geometric")}


@pytest.mark.parametrize("metrics", [evaluate.DEFAULT_METRICS, evaluate.METRICS], ids=len)
def test_evaluate_embeddings_gives_plain_numbers(metrics):
    rows, labels = blobs([9, 30, 4, 14], 8, 0.7)
    scores = evaluate.evaluate_embeddings(rows, labels, metrics=metrics)
    assert {type(value) for value in scores.values()} == {float}


def test_queries_and_gallery_are_clustered_together(monkeypatch):
    seen = {}

    def kmeans(embeddings, num_clusters, iterations=20, seed=0):
        seen.update(embeddings=embeddings, num_clusters=num_clusters, seed=seed)
        return torch.arange(len(embeddings)) % 2, None

    monkeypatch.setattr(evaluate, "kmeans", kmeans)
    queries, gallery = unit_rows(6, 4), unit_rows(5, 4, seed=1)
    query_labels, gallery_labels = torch.tensor([0, 0, 1, 1, 2, 2]), torch.tensor([0, 1, 2, 7, 7])
    scores = evaluate.evaluate_embeddings(queries, query_labels, gallery, gallery_labels, (1,), 3)
    assert torch.equal(seen["embeddings"], torch.cat([queries, gallery]))
    assert (seen["num_clusters"], seen["seed"]) == (4, 3)  # classes 0, 1, 2 and 7
    labels = torch.cat([query_labels, gallery_labels])
    assert scores["f1"] == evaluate.f1(torch.arange(11) % 2, labels)
    assert scores["nmi"] == evaluate.nmi(torch.arange(11) % 2, labels)


def test_a_gallery_that_holds_the_queries_is_clustered_without_them_twice(monkeypatch):
    seen = []
    monkeypatch.setattr(evaluate, "kmeans", lambda embeddings, num_clusters, **_: (
        seen.append((embeddings, num_clusters)), (torch.arange(len(embeddings)) % 2, None))[1])
    gallery, labels = unit_rows(7, 4), torch.tensor([0, 0, 1, 1, 2, 7, 7])
    scores = evaluate.evaluate_embeddings(gallery[2:5], labels[2:5], gallery, labels, (1,),
                                          own=torch.arange(2, 5))
    (embeddings, clusters), = seen
    assert torch.equal(embeddings, gallery) and clusters == 4
    assert scores["f1"] == evaluate.f1(torch.arange(7) % 2, labels)
    assert scores["nmi"] == evaluate.nmi(torch.arange(7) % 2, labels)


# ---- one random row of each class as gallery


def slow_random_gallery(rows, labels, k_vals, seed, repeats):
    """As random_gallery: the first row of each class in a drawn order is the gallery."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(repeats):
        first = {}
        for i in torch.randperm(len(labels), generator=generator).tolist():
            first.setdefault(labels[i].item(), i)
        gallery = sorted(first.values())
        queries = [i for i in range(len(labels)) if i not in gallery]
        found.append(slow_rank_metrics(rows[queries], labels[queries], rows[gallery],
                                       labels[gallery], k_vals=k_vals))
    return {name: np.mean([scores[name] for scores in found]) for name in found[0]}


@pytest.mark.parametrize("first_seed", [0, 20])
def test_random_gallery_equals_a_loop(first_seed):
    for seed in range(first_seed, first_seed + 20):
        rows, labels = whole_number_problem(seed, False)
        labels[2:4] = 1
        labels = labels * 9 - 4
        expected = slow_random_gallery(rows, labels, (1, 2), seed, 4)
        assert evaluate.random_gallery(rows, labels, (1, 2), evaluate.RANK_METRICS, seed, 4) == (
            pytest.approx(expected, abs=1e-12))


def test_random_gallery_by_hand():
    # Two equal rows in each of three far corners: whichever is the gallery, the other finds it.
    corners = torch.eye(3).repeat_interleave(2, 0)
    assert evaluate.random_gallery(corners, torch.arange(6) // 2, (1, 3)) == {
        "recall@1": 1, "recall@3": 1, "map@r": 1}
    # All rows equal: a query's one match comes after the two other classes, at rank 3.
    assert evaluate.random_gallery(torch.ones(6, 2), torch.arange(6) // 2, (1, 2, 3), (
        "recall", "mrr", "map")) == pytest.approx(
            {"recall@1": 0, "recall@2": 0, "recall@3": 1, "mrr": 1 / 3, "map": 1 / 3})


def test_each_random_gallery_has_one_row_of_each_class(monkeypatch):
    calls = spied(monkeypatch, evaluate, "rank_metrics")
    rows, labels = torch.arange(40.).unsqueeze(1), (torch.arange(40) * 7) % 6
    labels[0] = 99  # a class of one row: in the gallery alone
    evaluate.random_gallery(rows, labels, (1,), seed=3)
    assert len(calls) == 10
    drawn = set()
    for (queries, query_labels, gallery, gallery_labels, *_), _ in calls:
        assert sorted(gallery_labels.tolist()) == [0, 1, 2, 3, 4, 5, 99]
        assert sorted(torch.cat([queries, gallery]).flatten().tolist()) == list(range(40))
        assert torch.equal(labels[gallery.flatten().long()], gallery_labels)
        assert torch.equal(labels[queries.flatten().long()], query_labels)
        drawn.add(tuple(sorted(gallery.flatten().tolist())))
    assert len(drawn) == 10
    count = Counter(i for one in drawn for i in one)
    assert count.pop(0) == 10 and max(count.values()) < 10


def test_random_gallery_is_a_function_of_the_seed_alone():
    rows, labels = unit_rows(50, 4), torch.arange(50) % 9
    state = torch.get_rng_state()
    scores = [evaluate.random_gallery(rows, labels, (1, 5), seed=seed, memory=memory)
              for seed, memory in ((1, None), (1, 5000), (2, None))]
    assert torch.equal(torch.get_rng_state(), state)
    assert scores[0] == pytest.approx(scores[1], abs=1e-12) and scores[0] != scores[2]


def test_random_gallery_needs_a_class_of_two_rows_and_a_k_within_the_classes():
    with pytest.raises(ValueError, match="no query has a true match|two images"):
        evaluate.random_gallery(unit_rows(4, 2), torch.arange(4), (1,))
    with pytest.raises(ValueError, match="--k_vals 4: .*1 to 3"):
        evaluate.random_gallery(unit_rows(9, 2), torch.arange(9) % 3, (1, 4))


@pytest.mark.parametrize("metrics", [evaluate.METRICS, evaluate.DEFAULT_METRICS, ("nmi",),
                                     ("map", "recall")], ids=len)
def test_metrics_by_random_gallery_are_its_ranks_and_the_clusters_of_all_rows(metrics):
    rows, labels = blobs([9, 3, 14, 5], 5, 0.8)
    ranked = [name for name in metrics if name in evaluate.RANK_METRICS]
    expected = evaluate.evaluate_embeddings(rows, labels, k_vals=(1, 2), seed=4, metrics=metrics)
    if ranked:
        expected |= evaluate.random_gallery(rows, labels, (1, 2), ranked, seed=4)
    assert expected == evaluate.evaluate_embeddings(
        rows, labels, k_vals=(1, 2), seed=4, metrics=metrics, vehicle_protocol="random_gallery")


# ---- embeddings of a network


class Numbered(torch.utils.data.Dataset):
    """Items (image i filled with i, label) as image datasets give them; load is for pictures."""

    def __init__(self, labels, class_names=None, offset=0):
        self.labels = list(labels)
        self.class_names = class_names or [f"class {i}" for i in range(max(self.labels) + 1)]
        self.offset = offset

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, i):
        return torch.full((3, 2, 2), float(self.offset + i)), self.labels[i]

    def load(self, i):
        return Image.new("RGB", (8, 6), (self.offset + i, 0, 0))

    def images(self):
        return torch.stack([self[i][0] for i in range(len(self))])


def small_network(seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 5), torch.nn.Tanh(),
                                   torch.nn.BatchNorm1d(5)).eval()


@pytest.mark.parametrize("count, batch_size", [(10, 5), (10, 4), (10, 100), (1, 3)])
@pytest.mark.parametrize("workers", [0, 2])
def test_embed_is_the_forward_pass_in_order(count, batch_size, workers):
    dataset = Numbered([(7 * i) % 5 for i in range(count)])
    network = small_network()
    embeddings, labels = evaluate.embed(network, dataset, "cpu", batch_size, workers)
    assert embeddings.dtype == torch.float32 and labels.dtype == torch.int64
    assert labels.tolist() == dataset.labels
    with torch.no_grad():
        torch.testing.assert_close(embeddings, network(dataset.images()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_embed_gives_float32_whatever_the_network_computes_in(dtype):
    dataset = Numbered(range(6))
    embeddings, _ = evaluate.embed(lambda images: images.flatten(1).to(dtype), dataset, "cpu", 4)
    assert embeddings.dtype == torch.float32
    torch.testing.assert_close(embeddings, dataset.images().flatten(1))


def test_embed_runs_in_inference_mode_in_batches_and_leaves_the_network_alone():
    seen = []

    def network(images):
        seen.append((torch.is_inference_mode_enabled(), len(images)))
        return images.flatten(1)

    embeddings, _ = evaluate.embed(network, Numbered(range(10)), torch.device("cpu"), 4)
    assert seen == [(True, 4), (True, 4), (True, 2)]
    assert not embeddings.requires_grad
    trained = small_network()
    before = {name: value.clone() for name, value in trained.state_dict().items()}
    evaluate.embed(trained, Numbered(range(10)), "cpu", 4)
    assert not trained.training
    assert all(torch.equal(value, before[name]) for name, value in trained.state_dict().items())


@pytest.mark.parametrize("workers", [0, 2])
def test_embed_draws_nothing_from_the_global_generator(workers):
    state = torch.get_rng_state()
    evaluate.embed(small_network(), Numbered(range(6)), "cpu", 4, workers)
    assert torch.equal(torch.get_rng_state(), state)


# ---- evaluation sets


def test_evaluate_sets_with_one_set_without_a_name():
    dataset = Numbered([i % 3 for i in range(12)])
    network = small_network()
    metrics, embedded = evaluate.evaluate_sets(network, [("", dataset, None)], "cpu", (1, 2), 5)
    rows, labels = evaluate.embed(network, dataset, "cpu")
    assert metrics == pytest.approx(evaluate.evaluate_embeddings(rows, labels, k_vals=(1, 2)))
    assert list(metrics) == ["recall@1", "recall@2", "map@r", "nmi", "f1"]
    (queries, gallery), = embedded
    torch.testing.assert_close(queries, rows)
    assert gallery is None


def test_evaluate_sets_puts_the_names_first_and_embeds_each_set_once():
    sets = [("small", Numbered([0, 0, 1, 1, 2, 2]), None),
            ("shop", Numbered([0, 1, 2, 0], offset=50), Numbered([2, 1, 0, 0, 1], offset=90))]
    seen = []

    def network(images):
        seen.extend(images[:, 0, 0, 0].tolist())
        return torch.stack([images[:, 0, 0, 0].sin(), images[:, 0, 0, 0].cos()], 1)

    metrics, embedded = evaluate.evaluate_sets(network, sets, "cpu", (1, 3), 4, seed=1,
                                               metrics=WITH_RATIO)
    keys = ["recall@1", "recall@3", "map@r", "nmi", "f1", "dist_ratio"]
    assert list(metrics) == [f"{name} {key}" for name in ("small", "shop") for key in keys]
    assert seen == [*range(6), *range(50, 54), *range(90, 95)]
    _, (queries, gallery) = embedded
    assert queries.shape == (4, 2) and gallery.shape == (5, 2)
    labels = torch.tensor([0, 1, 2, 0, 2, 1, 0, 0, 1])
    assert metrics["shop dist_ratio"] == pytest.approx(
        slow_distance_ratio(torch.cat([queries, gallery]), labels), rel=1e-4)
    expected = evaluate.evaluate_embeddings(queries, labels[:4], gallery, labels[4:], (1, 3), 1)
    assert {key: metrics[f"shop {key}"] for key in expected} == expected


class Places:
    """A network that puts images at one of twelve places, so that many coincide; keeps count."""

    def __init__(self):
        self.seen = []

    def __call__(self, images):
        numbers = images[:, 0, 0, 0].long()
        self.seen += numbers.tolist()
        return torch.stack([numbers * 7 % 4, numbers * 5 % 3], 1).double()


@pytest.mark.parametrize("gallery", [("train", "val"), ("val", "train"), ("val",),
                                     ("train", "val", "more"), ("train", "more")], ids=str)
@pytest.mark.parametrize("batch_size", [3, 100])
def test_a_set_against_several_datasets_is_brute_force_over_all_of_them(gallery, batch_size):
    generator = torch.Generator().manual_seed(0)
    parts = {name: Numbered(random_ints(4, count, generator).tolist(), list("abcd"), offset)
             for name, count, offset in (("train", 20, 100), ("val", 11, 0), ("more", 6, 200))}
    network = Places()
    metrics, embedded = evaluate.evaluate_sets(
        network, [("val", parts["val"], [parts[name] for name in gallery])], "cpu", (1, 2, 4),
        batch_size, metrics=WITH_RATIO)
    # Each dataset once, the queries first.
    names = list(dict.fromkeys(("val", *gallery)))
    assert network.seen == [parts[name].offset + i for name in names
                            for i in range(len(parts[name]))]

    others = torch.cat([Places()(parts[name].images()) for name in gallery])
    labels = torch.tensor(sum((parts[name].labels for name in gallery), []))
    queries, query_labels = Places()(parts["val"].images()), torch.tensor(parts["val"].labels)
    own = None
    if "val" in gallery:
        start = sum(len(parts[name]) for name in gallery[:gallery.index("val")])
        own = list(range(start, start + 11))
    expected = brute_force_recall(queries, query_labels, others, labels, own=own)
    assert {key: metrics[f"val {key}"] for key in expected} == expected
    if own:  # with themselves among their neighbours they would do better
        assert expected["recall@4"] < brute_force_recall(queries, query_labels, others, labels)[
            "recall@4"]
    pool = (others, labels) if own else (torch.cat([queries, others]),
                                         torch.cat([query_labels, labels]))
    assert metrics["val dist_ratio"] == pytest.approx(slow_distance_ratio(*pool), rel=1e-4)
    assignments, _ = evaluate.kmeans(pool[0].float(), 4)
    assert metrics["val f1"] == evaluate.f1(assignments, pool[1])
    (query_rows, gallery_rows), = embedded
    assert torch.equal(query_rows.double(), queries) and torch.equal(gallery_rows.double(), others)


def test_datasets_of_several_sets_are_embedded_once():
    train = Numbered([i % 3 for i in range(9)], offset=100)
    val = Numbered([i % 3 for i in range(7)])
    sets = [("train", train, None), ("val", val, [train, val]), ("alone", val, None),
            ("apart", val, train)]
    network = Places()
    metrics, embedded = evaluate.evaluate_sets(network, sets, "cpu", (1, 2), 4)
    assert sorted(network.seen) == [*range(7), *range(100, 109)]
    assert len(embedded) == 4 and embedded[1][1].shape == (16, 2)
    for one in sets:
        alone, _ = evaluate.evaluate_sets(Places(), [one], "cpu", (1, 2), 4)
        assert alone == {key: value for key, value in metrics.items() if key in alone}
        assert len(alone) == 5


def test_the_queries_as_their_own_gallery_are_a_set_without_one():
    dataset = Numbered([i % 3 for i in range(12)])
    scores = [evaluate.evaluate_sets(small_network(), [("", dataset, gallery)], "cpu", (1, 2),
                                     metrics=WITH_RATIO)[0] for gallery in (None, dataset,
                                                                            [dataset])]
    assert scores[0] == scores[1] == scores[2]


def test_another_dataset_of_the_same_images_is_a_gallery_like_any_other():
    val, copy = (Numbered([i % 3 for i in range(12)]) for _ in range(2))
    train = Numbered([i % 3 for i in range(9)], offset=100)
    metrics, embedded = evaluate.evaluate_sets(small_network(), [("", val, [train, copy])], "cpu",
                                               (1,))
    assert metrics["recall@1"] == 1  # every query finds its copy
    assert embedded[0][1].shape == (21, 5)


@pytest.mark.parametrize("protocol", ["all_vs_all", "random_gallery"])
def test_the_vehicle_protocol_is_that_of_sets_without_a_gallery(protocol):
    alone = Numbered([i % 5 for i in range(30)])
    gallery = Numbered([i % 5 for i in range(20)], offset=100)
    sets = [("small", alone, None), ("shop", alone, gallery)]
    scoring = {"seed": 3, "metrics": ("recall", "map", "nmi"), "nmi_average": "geometric",
               "memory": 10_000}
    metrics, embedded = evaluate.evaluate_sets(small_network(), sets, "cpu", (1, 2),
                                               vehicle_protocol=protocol, **scoring)
    (rows, _), (_, gallery_rows) = embedded
    labels = torch.tensor(alone.labels), torch.tensor(gallery.labels)
    small = evaluate.evaluate_embeddings(rows, labels[0], k_vals=(1, 2),
                                         vehicle_protocol=protocol, **scoring)
    shop = evaluate.evaluate_embeddings(rows, labels[0], gallery_rows, labels[1], (1, 2),
                                        **scoring)
    assert metrics == {f"{name} {key}": value for name, scores in (("small", small),
                                                                   ("shop", shop))
                       for key, value in scores.items()}


@pytest.mark.parametrize("protocol", ["all_vs_all", "random_gallery"])
def test_sets_are_scored_without_clusters_where_none_are_asked_for(monkeypatch, protocol):
    monkeypatch.setattr(evaluate, "kmeans", None)
    sets = [("", Numbered([i % 5 for i in range(30)]), None)]
    metrics, _ = evaluate.evaluate_sets(small_network(), sets, "cpu", (1,), metrics=("recall",),
                                        vehicle_protocol=protocol)
    assert list(metrics) == ["recall@1"]


# ---- sample recoveries


@pytest.fixture
def drawn(monkeypatch):
    """The rows that draw_recoveries hands to the picture, as lists of (image number, role)."""
    captured = []

    def save_image_grid(path, rows, **_):
        captured.append([[(image.getpixel((0, 0))[0], role) for image, role in row]
                         for row in rows])

    monkeypatch.setattr(auxiliaries, "save_image_grid", save_image_grid)
    return captured


def expected_recoveries(query, queries, others, distances, offset, neighbours):
    """The row of a query by brute force; distances: of the query to every row it may find."""
    query_class = queries.class_names[queries.labels[query]]
    row = [(query, "query")]
    for i in np.argsort(distances)[:neighbours]:
        if np.isfinite(distances[i]):
            hit = others.class_names[others.labels[i]] == query_class
            row.append((offset + i, "hit" if hit else "miss"))
    return row


@pytest.mark.parametrize("with_gallery", [False, True])
@pytest.mark.parametrize("rows, neighbours", [(10, 5), (3, 2), (100, 1)])
def test_recoveries_are_the_nearest_by_brute_force(drawn, with_gallery, rows, neighbours):
    queries = Numbered([i % 4 for i in range(20)], ["cat", "dog", "emu", "fox"])
    # The gallery numbers the classes in another order; its names decide.
    gallery = Numbered([i % 3 for i in range(15)], ["fox", "cat", "owl"], offset=100)
    query_rows, gallery_rows = unit_rows(20, 6), unit_rows(15, 6, seed=1)
    evaluate.draw_recoveries("unused", queries, gallery if with_gallery else None, query_rows,
                             gallery_rows if with_gallery else None, 0, rows, neighbours)
    distances = float64_distances(query_rows, gallery_rows if with_gallery else query_rows)
    if not with_gallery:
        np.fill_diagonal(distances, np.inf)
    grid, = drawn
    chosen = [row[0][0] for row in grid]
    assert len(set(chosen)) == len(grid) == min(rows, 20)
    for row in grid:
        query = row[0][0]
        assert row == expected_recoveries(query, queries, gallery if with_gallery else queries,
                                          distances[query], 100 * with_gallery, neighbours)


def test_recoveries_depend_on_the_seed_alone(drawn):
    dataset, rows = Numbered([i % 4 for i in range(30)]), unit_rows(30, 6)
    state = torch.get_rng_state()
    for seed in (1, 1, 2):
        evaluate.draw_recoveries("unused", dataset, None, rows, None, seed)
    assert drawn[0] == drawn[1] != drawn[2]
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("count", [2, 4])
def test_recoveries_of_fewer_images_than_neighbours(drawn, count):
    dataset = Numbered([0] * count)
    evaluate.draw_recoveries("unused", dataset, None, unit_rows(count, 3), None, neighbours=5)
    grid, = drawn
    for row in grid:
        assert row[0][1] == "query" and [role for _, role in row[1:]] == ["hit"] * (count - 1)
        assert sorted(number for number, _ in row) == list(range(count))


def test_recoveries_from_a_gallery_smaller_than_neighbours(drawn):
    evaluate.draw_recoveries("unused", Numbered([0, 1]), Numbered([0, 1], offset=50),
                             torch.eye(2), torch.eye(2), neighbours=5)
    grid, = drawn
    assert sorted(grid) == [[(0, "query"), (50, "hit"), (51, "miss")],
                            [(1, "query"), (51, "hit"), (50, "miss")]]


def test_recoveries_never_show_the_query_among_its_copies(drawn):
    dataset = Numbered([0] * 12)
    evaluate.draw_recoveries("unused", dataset, None, torch.ones(12, 3), None, neighbours=5)
    for row in drawn[0]:
        numbers = [number for number, _ in row]
        assert len(numbers) == len(set(numbers)) == 6


def test_recoveries_are_written_as_a_picture(tmp_path):
    path = tmp_path / "recoveries.png"
    dataset = Numbered([i % 2 for i in range(8)])
    evaluate.draw_recoveries(path, dataset, None, unit_rows(8, 3), None, rows=4)
    with Image.open(path) as picture:
        assert picture.format == "PNG" and min(picture.size) > 4 * 8
    assert [file.name for file in tmp_path.iterdir()] == ["recoveries.png"]


# ---- embeddings in two dimensions

METHODS = ("pca", "tsne")


@pytest.fixture
def scattered(monkeypatch):
    """What draw_embeddings hands to the picture: title, points [N, 2], names.

    On one thread: t-SNE's threads wait for each other, which takes minutes on a busy machine.
    """
    captured = []

    def save_scatter(path, title, points, names):
        captured.append(SimpleNamespace(title=title, points=np.asarray(points), names=list(names)))

    monkeypatch.setattr(auxiliaries, "save_scatter", save_scatter)
    with threadpool_limits(1):
        yield captured


def stretched(count, dimensions, seed=0):
    """Rows whose spread differs from dimension to dimension, in no order, around no origin."""
    rows = torch.randn(count, dimensions, generator=torch.Generator().manual_seed(seed))
    return rows * ((torch.arange(dimensions) * 3 + 1) % dimensions + 0.5) + 10


@pytest.mark.parametrize("count, dimensions", [(5, 2), (40, 5), (4, 9), (60, 128)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_pca_shows_the_two_directions_of_greatest_spread(scattered, count, dimensions, dtype):
    rows = stretched(count, dimensions).to(dtype)
    before = rows.clone()
    dataset = Numbered([i % 4 for i in range(count)])
    evaluate.draw_embeddings("unused", dataset, rows, "pca")
    centred = rows.double().numpy() - rows.double().numpy().mean(0)
    _, directions = np.linalg.eigh(centred.T @ centred)  # the greatest last
    drawn, = scattered
    assert drawn.points.shape == (count, 2) and torch.equal(rows, before)
    for axis in (0, 1):
        expected = centred @ directions[:, -1 - axis]
        sign = np.sign((expected * drawn.points[:, axis]).sum())  # a direction has no sign
        np.testing.assert_allclose(drawn.points[:, axis], sign * expected, atol=1e-8)
    assert drawn.names == [f"class {i % 4}" for i in range(count)]
    assert drawn.title == [f"{count} test embeddings, PCA, coloured by class"]


def test_tsne_keeps_neighbours_together(scattered):
    rows, labels = blobs([12, 9, 15], 10, 0.02)
    order = torch.randperm(36, generator=torch.Generator().manual_seed(1))
    dataset = Numbered(labels[order].tolist(), ["cat", "dog", "emu"])
    evaluate.draw_embeddings("unused", dataset, rows[order], "tsne")
    drawn, = scattered
    assert drawn.names == [["cat", "dog", "emu"][label] for label in labels[order]]
    assert drawn.title == ["36 test embeddings, t-SNE, coloured by class"]
    distances = np.linalg.norm(drawn.points[:, None] - drawn.points[None], axis=2)
    np.fill_diagonal(distances, np.inf)
    assert [drawn.names[i] for i in distances.argmin(1)] == drawn.names
    flat = centred_pca(rows[order])
    assert np.abs(drawn.points - flat).max() > 1  # it is not the other method


def centred_pca(rows):
    rows = rows.double().numpy() - rows.double().numpy().mean(0)
    return rows @ np.linalg.svd(rows)[2][:2].T


@pytest.mark.parametrize("method", METHODS)
def test_drawn_embeddings_depend_on_the_seed_alone(scattered, method):
    dataset, rows = Numbered([i % 4 for i in range(30)]), unit_rows(30, 6)
    states = torch.get_rng_state(), np.random.get_state()[1].tolist()
    for seed in (1, 1, 2):
        evaluate.draw_embeddings("unused", dataset, rows, method, seed, most=20)
    first, again, other = scattered
    assert first.title == again.title and first.names == again.names
    assert np.array_equal(first.points, again.points)
    assert not np.array_equal(first.points, other.points)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.random.get_state()[1].tolist() == states[1]


@pytest.mark.parametrize("count, most, shown, title", [
    (30, 20, 20, "20 of 30"), (30, 30, 30, "30"), (30, 31, 30, "30"), (30, 1, 1, "1 of 30"),
    (2600, 1500, 1500, "1,500 of 2,600"), (2600, 2000, 2000, "2,000 of 2,600")])
def test_of_many_embeddings_a_sample_is_drawn(scattered, count, most, shown, title):
    # In one dimension, so the points say which rows were drawn; each is a class of its own.
    rows, names = torch.arange(count).float().unsqueeze(1), [f"row {i}" for i in range(count)]
    dataset = Numbered(range(count), names)
    for seed in (3, 3, 4):
        evaluate.draw_embeddings("unused", dataset, rows, "pca", seed, most)
    first, again, other = scattered
    drawn = "PCA" if shown > 1 else "all in one place"
    assert first.title == [f"{title} test embeddings, {drawn}, coloured by class"]
    numbers = np.array([int(name.split()[1]) for name in first.names])
    assert len(numbers) == len(set(numbers)) == shown and max(numbers) < count
    assert first.names == again.names
    assert (first.names == other.names) == (shown == count)
    places = first.points[:, 0] * (-1 if first.points[0, 0] > first.points[-1, 0] else 1)
    np.testing.assert_allclose(places, numbers - numbers.mean(), atol=1e-6)


def test_no_more_than_two_thousand_are_drawn_unless_asked_for(scattered):
    dataset = Numbered([i % 5 for i in range(2001)])
    evaluate.draw_embeddings("unused", dataset, unit_rows(2001, 2))
    line, = scattered[0].title
    assert line.startswith("2,000 of 2,001 ") and "PCA" in line


FEW = {"one": unit_rows(1, 3), "two": unit_rows(2, 3), "four": unit_rows(4, 3),
       "five": unit_rows(5, 3), "two in one dimension": torch.tensor([[1.], [2.]]),
       "nine in one dimension": torch.arange(9.).unsqueeze(1),
       "equal": torch.full((9, 4), 0.1), "zero": torch.zeros(7, 4),
       "equal in one dimension": torch.full((6, 1), 0.3),
       "two places": torch.tensor([[0., 1.], [1., 0.]]).repeat(9, 1),
       "all but one equal": torch.cat([torch.full((19, 3), 0.1), torch.zeros(1, 3)]),
       "nearly equal": nearly_collapsed(20, 8, spread=1e-6)}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("rows", FEW.values(), ids=FEW.keys())
@pytest.mark.filterwarnings("error")
def test_few_or_equal_embeddings_are_drawn(scattered, method, rows):
    evaluate.draw_embeddings("unused", Numbered([i % 2 for i in range(len(rows))]), rows, method)
    drawn, = scattered
    assert drawn.points.shape == (len(rows), 2) and np.isfinite(drawn.points).all()
    if len(rows.unique(dim=0)) == 1:
        assert (drawn.points == 0).all()
    elif method == "pca" or len(rows) < 5:  # then the greatest distance is kept
        assert np.ptp(drawn.points[:, 0]) == pytest.approx(
            np.ptp(centred_pca(rows)[:, 0]), rel=1e-6)
    else:
        assert np.ptp(drawn.points[:, 0]) > 0


@pytest.mark.parametrize("method", METHODS)
def test_drawn_embeddings_are_written_as_a_picture(method, tmp_path):
    rows, labels = blobs([4, 6, 2], 5, 0.1)
    dataset = Numbered(labels.tolist(), ["cat & dog", "<emu>", "fox"])
    with threadpool_limits(1):
        evaluate.draw_embeddings(tmp_path / "embeddings.svg", dataset, rows, method)
    assert [file.name for file in tmp_path.iterdir()] == ["embeddings.svg"]
    svg = "{http://www.w3.org/2000/svg}"
    root = ElementTree.parse(tmp_path / "embeddings.svg").getroot()
    groups = {group.find(f"{svg}title").text: len(group.findall(f"{svg}circle"))
              for group in root.iter(f"{svg}g") if group.find(f"{svg}title") is not None}
    assert groups == {"cat & dog": 4, "<emu>": 6, "fox": 2}


@pytest.mark.parametrize("rows", [
    torch.full((9, 4), 0.1, dtype=torch.float64), 1e-30 * unit_rows(30, 5),
    torch.cat([torch.zeros(30, 3), torch.full((1, 3), 1e-30)])])
def test_the_least_spread_is_drawn(scattered, rows):
    evaluate.draw_embeddings("unused", Numbered([i % 2 for i in range(len(rows))]), rows, "tsne")
    assert np.isfinite(scattered[0].points).all()


def test_embedding_says_how_far_it_is():
    said = []
    dataset = torch.utils.data.TensorDataset(unit_rows(10, 3), torch.arange(10) % 2)
    evaluate.evaluate_sets(lambda rows: rows, [("", dataset, None)], "cpu", [1], batch_size=4,
                           progress=lambda *numbers: said.append(numbers))
    assert said == [(4, 10), (8, 10), (10, 10)]


def test_sets_may_come_from_a_generator():
    first, second = unit_rows(6, 3), unit_rows(6, 4)[:, :3]
    labels = torch.arange(6) % 2
    sets = [(str(i), torch.utils.data.TensorDataset(rows, labels), None)
            for i, rows in enumerate((first, second))]
    listed = evaluate.evaluate_sets(lambda rows: rows, sets, "cpu", [1])
    made = evaluate.evaluate_sets(lambda rows: rows, (
        (name, torch.utils.data.TensorDataset(*dataset.tensors), None)
        for name, dataset, _ in sets), "cpu", [1])
    assert made[0] == listed[0]


# ---- alone, on saved embeddings


def file_of(path, **arrays):
    np.savez(path, **arrays)
    return str(path)


def small_file(path, count=40, drawn=0, settings=None, **arrays):
    """An npz file of embeddings [count, 6] and labels of 5 classes, or the arrays given."""
    if settings:
        arrays["settings"] = json.dumps(settings)
    return file_of(path, **{"embeddings": unit_rows(count, 6, drawn).numpy(),
                            "labels": np.arange(count) % 5, **arrays})


def printed(capsys, *arguments):
    """What main prints -> (the lines before the table, {name: value} of the table)."""
    scores = evaluate.main([str(argument) for argument in arguments])
    lines = capsys.readouterr().out.splitlines()
    values = {name: float(value) for name, value in map(str.split, lines[-len(scores):])}
    assert list(values.items()) == list(scores.items())
    assert lines[-len(scores) - 1].split() == ["metric", "value"]
    return lines[:-len(scores) - 1], values


@pytest.mark.parametrize("metrics", [evaluate.METRICS, evaluate.DEFAULT_METRICS, ("nmi", "map")],
                         ids=len)
def test_a_saved_file_gives_the_same_numbers_to_the_last_digit(tmp_path, capsys, metrics):
    rows, labels = blobs([30, 12, 5, 21], 16, 0.9)
    evaluate.save_embeddings(tmp_path / "e.npz", rows, labels.tolist(), k_vals=[1, 3], seed=7)
    assert [file.name for file in tmp_path.iterdir()] == ["e.npz"]
    expected = evaluate.evaluate_embeddings(rows, labels, k_vals=[1, 3], seed=7, metrics=metrics)
    lines, scores = printed(capsys, tmp_path / "e.npz", "--metrics", *metrics)
    assert list(scores) == list(expected) and scores == expected
    assert len(lines) == 1 and "68 queries of 4 classes, all_vs_all" in lines[0]
    assert "seed 7" in lines[0] and "; 0 without" in lines[0]
    assert ("arithmetic" in lines[0]) == ("nmi" in metrics)


def test_the_arrays_of_a_file_come_back_as_they_were(tmp_path):
    rows, labels = unit_rows(9, 4), torch.arange(9) % 3
    evaluate.save_embeddings(tmp_path / "e.npz", rows, labels, k_vals=[1, 2], seed=5)
    embeddings, numbers, settings = evaluate.read_embeddings(tmp_path / "e.npz")
    assert embeddings.tolist() == rows.tolist() and embeddings.dtype == np.float32
    assert numbers.tolist() == labels.tolist() and settings == {"k_vals": [1, 2], "seed": 5}


@pytest.mark.parametrize("dtype", ["<f4", ">f4", "<f8", ">f8", "<f2", "<i4", "u1"])
def test_embeddings_of_every_real_type_are_read(tmp_path, dtype):
    rows = (unit_rows(30, 4).numpy() * 100).astype(dtype)
    path = small_file(tmp_path / "e.npz", 30, embeddings=rows)
    values = evaluate.read_embeddings(path)[0]
    assert values.tolist() == rows.tolist()  # none is rounded
    assert evaluate.main([path]) == evaluate.evaluate_embeddings(
        torch.from_numpy(values), torch.arange(30) % 5, seed=1)


def test_options_come_before_what_the_file_says(tmp_path, capsys):
    path = small_file(tmp_path / "e.npz", settings={"k_vals": [2, 5], "seed": 3})
    rows, labels = unit_rows(40, 6), torch.arange(40) % 5
    _, scores = printed(capsys, path)
    assert scores == evaluate.evaluate_embeddings(rows, labels, k_vals=[2, 5], seed=3)
    lines, scores = printed(capsys, path, "--k_vals", 1, 39, "--seed", 4, "--nmi_average",
                            "geometric", "--eval_memory", "0.00001")
    assert scores == evaluate.evaluate_embeddings(rows, labels, k_vals=[1, 39], seed=4,
                                                  nmi_average="geometric")
    assert "seed 4" in lines[0] and "geometric" in lines[0]
    _, scores = printed(capsys, small_file(tmp_path / "f.npz"))
    assert scores == evaluate.evaluate_embeddings(rows, labels, k_vals=(1, 2, 4, 8), seed=1)


def test_all_metrics_of_a_file(tmp_path, capsys):
    _, scores = printed(capsys, small_file(tmp_path / "e.npz"), "--metrics", "all")
    assert list(scores) == ["recall@1", "recall@2", "recall@4", "recall@8", "precision@1", "mrr",
                            "r_precision", "map@r", "map", "nmi", "ami", "f1", "dist_ratio", "rho",
                            "d_ap", "d_an"]


@pytest.mark.parametrize("metrics", [["all"], ["recall"]])
@pytest.mark.parametrize("count", [40, 6])  # six rows in six dimensions, rank 5 or 6
def test_json_holds_the_same_numbers(tmp_path, capsys, metrics, count):
    path = small_file(tmp_path / "e.npz", count)
    scores = evaluate.main([path, "--json", "--k_vals", "1", "--metrics", *metrics])
    output = capsys.readouterr().out
    found = json.loads(output, parse_constant=pytest.fail)
    assert {name: found[name] for name in scores} == scores and "without_match" in found
    assert len(output.splitlines()) == 1


def test_json_is_strict_where_a_metric_is_infinite(tmp_path, capsys):
    path = small_file(tmp_path / "e.npz", embeddings=np.eye(40)[:, :6])  # most rows are zero
    evaluate.main([small_file(tmp_path / "f.npz", 5, labels=np.zeros(5)), "--json", "--metrics",
                   "rho", "distances"])
    evaluate.main([path, "--json", "--metrics", "all"])
    for line in capsys.readouterr().out.splitlines():
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
        assert line.startswith("{")


def test_json_is_all_that_is_printed(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    scores = evaluate.main([small_file(tmp_path / "e.npz"), "--json", "--gpu", "0"])
    found = json.loads(capsys.readouterr().out)
    assert found == scores | {"queries": 40, "classes": 5, "compared_with": "all_vs_all",
                              "without_match": 0, "zero_vectors": 0,
                              "queries_in_gallery": 0, "seed": 1,
                              "nmi_average": "arithmetic", "not_given": ""}


def test_a_file_against_a_gallery(tmp_path, capsys):
    queries = small_file(tmp_path / "q.npz", 20, labels=np.arange(20) % 7)
    gallery = small_file(tmp_path / "g.npz", 30, drawn=1)
    lines, scores = printed(capsys, queries, "--gallery", gallery, "--metrics", "all")
    assert scores == evaluate.evaluate_embeddings(
        unit_rows(20, 6), torch.arange(20) % 7, unit_rows(30, 6, 1), torch.arange(30) % 5, seed=1,
        metrics=evaluate.METRICS)
    # Classes 5 and 6, twice five of the 20 queries, are not in the gallery.
    assert "20 queries of 7 classes, a gallery of 30; 5 without" in lines[0]


def test_lone_queries_of_a_file_are_counted(tmp_path, capsys):
    path = small_file(tmp_path / "e.npz", labels=np.array([0] * 20 + [1] * 15 + [2, 3, 4, 5, 6]))
    lines, _ = printed(capsys, path)
    assert "40 queries of 7 classes, all_vs_all; 5 without" in lines[0]


def test_the_default_k_are_those_that_a_small_file_has(tmp_path, capsys):
    """They are trimmed, and that is said; the user's are an error. In Python as well."""
    arrays = dict(embeddings=np.eye(6), labels=np.arange(6) % 2)
    path = small_file(tmp_path / "e.npz", **arrays)
    lines, scores = printed(capsys, path)
    assert [name for name in scores if "recall" in name] == ["recall@1", "recall@2", "recall@4"]
    note = "note: no recall at 8, as each query has 5 images to be compared with"
    assert note in lines
    assert_refused(capsys, "--k_vals 8: .*1 to 5", path, "--k_vals", 1, 8)
    saved = small_file(tmp_path / "s.npz", settings={"k_vals": [1, 8]}, **arrays)  # by a run
    assert_refused(capsys, "--k_vals 8: .*1 to 5", saved)
    found = evaluate.evaluate_embeddings(torch.eye(6), torch.arange(6) % 2, metrics=["recall"])
    assert list(found) == ["recall@1", "recall@2", "recall@4"]
    assert capsys.readouterr().out.strip() == note
    with pytest.raises(ValueError, match="--k_vals 8"):
        evaluate.evaluate_embeddings(torch.eye(6), torch.arange(6) % 2, k_vals=[8])


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_queries_that_are_rows_of_the_gallery_are_noted(tmp_path, capsys, dtype):
    rows = unit_rows(60, 6).numpy()
    rows[3, 2] = 0
    queries = small_file(tmp_path / "q.npz", embeddings=rows[:40])
    gallery = rows[37:].astype(dtype)
    path = small_file(tmp_path / "g.npz", embeddings=gallery, labels=np.arange(23) % 5)
    note = "note: 3 queries are rows of the gallery, at distance 0"
    assert note in printed(capsys, queries, "--gallery", path)[0]
    gallery[5] = rows[3]
    gallery[5, 2] = -0.0  # which is 0
    path = small_file(tmp_path / "g.npz", embeddings=gallery, labels=np.arange(23) % 5)
    assert note.replace("3", "4") in printed(capsys, queries, "--gallery", path)[0]
    assert "rows of the gallery" not in " ".join(printed(capsys, queries)[0])


@pytest.mark.parametrize("kind", [np.asarray, list], ids=["array", "list"])
@pytest.mark.parametrize("gallery", [False, True])
def test_arrays_and_lists_are_scored_as_tensors_are(kind, gallery):
    (rows, labels), (others, other_labels) = blobs([9, 8, 7], 4, 0.9), blobs([5, 6, 7], 4, 0.9, 1)
    parts = [rows, labels, others, other_labels] if gallery else [rows, labels]
    options = dict(k_vals=[1, 3], metrics=evaluate.METRICS)
    expected = evaluate.evaluate_embeddings(*parts, **options)
    given = [kind(part.numpy().tolist()) for part in parts]
    assert evaluate.evaluate_embeddings(*given, **options) == pytest.approx(expected)
    given[1::2] = [kind([f"class {label}" for label in part]) for part in given[1::2]]
    assert evaluate.evaluate_embeddings(*given, **options) == pytest.approx(expected)


def test_lists_of_whole_numbers_are_scored():
    rows = [[0, 1], [0, 2], [5, 5], [6, 5], [9, 0]]
    assert evaluate.evaluate_embeddings(rows, ["a", "a", "b", "b", "b"], k_vals=[1]) == (
        evaluate.evaluate_embeddings(torch.tensor(rows).float(), torch.tensor([0, 0, 1, 1, 1]),
                                     k_vals=[1]))


def test_zero_vectors_are_counted(tmp_path, capsys):
    rows = unit_rows(40, 6)
    rows[[3, 17]] = 0
    assert "; 2 zero vectors" in printed(capsys, small_file(tmp_path / "e.npz",
                                                            embeddings=rows.numpy()))[0][0]
    assert "zero vectors" not in printed(capsys, small_file(tmp_path / "f.npz"))[0][0]


def test_a_file_is_scored_as_its_run_was(tmp_path, capsys):
    """Metrics, NMI's mean, the protocol: what the command line leaves open is the run's."""
    rows, labels = blobs([9, 8, 7, 6], 8, 0.9)
    settings = dict(k_vals=[2], seed=5, metrics=["recall", "mrr", "nmi"], nmi_average="geometric",
                    vehicle_protocol="random_gallery", device="cpu", gallery_file="")
    evaluate.save_embeddings(tmp_path / "e.npz", rows, labels, **settings)
    lines, scores = printed(capsys, tmp_path / "e.npz")
    assert scores == evaluate.evaluate_embeddings(
        rows, labels, k_vals=[2], seed=5, metrics=settings["metrics"], nmi_average="geometric",
        vehicle_protocol="random_gallery")
    assert "random_gallery" in lines[0] and "geometric" in lines[0]
    _, scores = printed(capsys, tmp_path / "e.npz", "--vehicle_protocol", "all_vs_all",
                        "--metrics", "nmi", "--nmi_average", "arithmetic")
    assert scores == evaluate.evaluate_embeddings(rows, labels, seed=5, metrics=["nmi"])
    evaluate.save_embeddings(tmp_path / "q.npz", rows, labels, **{
        **settings, "vehicle_protocol": "all_vs_all", "gallery_file": "\x1bgallery.npz"})
    assert r"compared these with \x1bgallery.npz" in printed(capsys, tmp_path / "q.npz")[0][1]
    with pytest.raises(SystemExit, match="draws its own gallery"):
        evaluate.main([str(tmp_path / "e.npz"), "--gallery", str(tmp_path / "q.npz")])


@pytest.mark.parametrize("seed", range(10))
def test_labels_in_any_order_give_the_runs_numbers(tmp_path, capsys, seed):
    """Sums over classes run in the order of the labels, so a file must keep that order."""
    labels = torch.randint(23, (300,), generator=torch.Generator().manual_seed(seed))
    rows = unit_rows(300, 6, seed)
    evaluate.save_embeddings(tmp_path / "e.npz", rows, labels, k_vals=[1], seed=1)
    _, scores = printed(capsys, tmp_path / "e.npz", "--metrics", "all")
    assert scores == evaluate.evaluate_embeddings(rows, labels, k_vals=[1], seed=1,
                                                  metrics=evaluate.METRICS)


NAMES = np.array(["cat", "dog", "emu", "a long name", "ö"])


@pytest.mark.parametrize("labels, gallery_labels", [
    (NAMES, NAMES), (NAMES, NAMES.astype("<U99")), (NAMES[:4].astype("S"), NAMES[:4]),
    (np.arange(5), np.arange(5).astype(str)), (np.arange(5).astype("u1"), np.arange(5) + 0),
    (np.arange(5) * 1.5, np.arange(5) * 1.5), (np.arange(5) * 1.0, np.arange(5)),
    (np.array([False, True]), np.array([False, True]))],
    ids=["strings", "wide", "bytes", "numbers and strings", "ints", "floats", "float and int",
         "bools"])
def test_labels_of_any_type_mean_the_same_in_both_files(tmp_path, labels, gallery_labels):
    number = len(labels)
    queries = small_file(tmp_path / "q.npz", 20, labels=labels[np.arange(20) % number])
    gallery = small_file(tmp_path / "g.npz", 30, 1, labels=gallery_labels[np.arange(30) % number])
    scores = evaluate.main([queries, "--gallery", gallery])
    assert scores == pytest.approx(evaluate.evaluate_embeddings(
        unit_rows(20, 6), torch.arange(20) % number, unit_rows(30, 6, 1),
        torch.arange(30) % number, seed=1), abs=1e-12)
    alone = evaluate.main([queries])
    assert alone == pytest.approx(evaluate.evaluate_embeddings(
        unit_rows(20, 6), torch.arange(20) % number, seed=1), abs=1e-12)


def spoilt(value, rows=(3, 7)):
    embeddings = unit_rows(40, 6).numpy().copy()
    embeddings[list(rows), 2] = value
    return embeddings


BAD_ARRAYS = {
    "nan": ({"embeddings": spoilt(np.nan)}, "2 of 40 query embeddings are not finite.* row 3"),
    "inf": ({"embeddings": spoilt(np.inf, [39])}, "1 of 40 query .*not finite.* row 39"),
    "short labels": ({"labels": np.arange(39) % 5}, r"\[40, 6\] with 39 labels"),
    "no labels": ({"labels": np.arange(0)}, r"\[40, 6\] with 0 labels"),
    "labels in two dimensions": ({"labels": np.zeros((40, 1))}, r"labels \[40, 1\]"),
    "no match": ({"labels": np.arange(40)}, "no query has a true match"),
    "one row": ({"embeddings": np.eye(6)[:1], "labels": np.zeros(1)}, "image|match|class"),
    "no row": ({"embeddings": np.eye(6)[:0], "labels": np.zeros(0)}, r"\[0, 6\]"),
    "no dimension": ({"embeddings": np.zeros((40, 0))}, r"\[40, 0\]"),
    "one dimension too many": ({"embeddings": np.zeros((40, 2, 3))}, r"\[40, 2, 3\]"),
    "one dimension too few": ({"embeddings": np.zeros(40)}, r"embeddings \[40\]"),
    "strings": ({"embeddings": np.full((40, 6), "1.0")}, "expected numbers"),
    "complex numbers": ({"embeddings": np.ones((40, 6), complex)}, "expected numbers"),
    "objects": ({"embeddings": np.full((40, 6), None)}, "[Oo]bject|pickle"),
    "a metric of another time": ({"settings": {"metrics": ["recall", "accuracy"]}},
                                 "its run measured .*accuracy.*--metrics"),
    "settings that are none": ({"settings": [1, 2]}, "cannot be read"),
    "labels as objects": ({"labels": np.array(["a", "b"] * 20, object)}, "[Oo]bject|pickle"),
}


def assert_refused(capsys, message, *arguments):
    """main ends with one line that matches, and prints nothing else."""
    with pytest.raises(SystemExit, match=message) as stopped:
        evaluate.main([str(argument) for argument in arguments])
    assert str(stopped.value).startswith("evaluate.py: error: ")
    assert "\n" not in str(stopped.value) and capsys.readouterr().out == ""


@pytest.mark.parametrize("arrays, message", BAD_ARRAYS.values(), ids=BAD_ARRAYS.keys())
def test_a_bad_file_is_refused_in_one_line(tmp_path, capsys, arrays, message):
    assert_refused(capsys, message, small_file(tmp_path / "e.npz", **arrays))


@pytest.mark.parametrize("arrays, message", [
    ({"embeddings": spoilt(-np.inf)}, "2 of 40 gallery embeddings are not finite.* row 3"),
    ({"labels": np.arange(39)}, r"gallery .*\[40, 6\] with 39 labels"),
    ({"embeddings": unit_rows(40, 5).numpy()}, "query.* 6 dimensions, gallery.* 5"),
    ({"labels": np.arange(40) + 5}, "no query has a true match"),
    ({"embeddings": np.eye(6)[:0], "labels": np.arange(0)}, r"gallery .*\[0, 6\]")])
def test_a_bad_gallery_is_refused_in_one_line(tmp_path, capsys, arrays, message):
    assert_refused(capsys, message, small_file(tmp_path / "e.npz"), "--gallery",
                   small_file(tmp_path / "g.npz", **arrays))


@pytest.mark.parametrize("arrays, message", [
    ({}, "embeddings is not"), ({"embeddings": np.eye(3)}, "labels is not"),
    ({"features": np.eye(3)}, "embeddings is not")])
def test_a_file_without_the_arrays_is_refused(tmp_path, capsys, arrays, message):
    assert_refused(capsys, rf"e\.npz .*\[N, D\].*{message}", file_of(tmp_path / "e.npz", **arrays))


class Harmful:
    """Creates a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("name", ["embeddings", "labels", "settings"])
def test_pickled_objects_are_refused_and_not_executed(tmp_path, capsys, name):
    objects = np.array([Harmful(tmp_path / "touched")], object)
    path = file_of(tmp_path / "e.npz", **{"embeddings": unit_rows(40, 6).numpy(),
                                          "labels": np.arange(40) % 5, name: objects})
    assert_refused(capsys, "[Oo]bject|pickle", path)
    assert not (tmp_path / "touched").exists()
    np.load(path, allow_pickle=True)[name]
    assert (tmp_path / "touched").exists()  # it would have been


@pytest.mark.parametrize("content", [b"", b"hello", b"PK\x03\x04", bytes(range(256)) * 9,
                                     b"\x80\x04]."], ids=len)
def test_a_file_that_is_no_npz_is_refused(tmp_path, capsys, content):
    (tmp_path / "e.npz").write_bytes(content)
    assert_refused(capsys, r"e\.npz cannot be read as an npz file", tmp_path / "e.npz")


@pytest.mark.parametrize("damage", ["half", "flipped"])
def test_a_damaged_file_is_refused(tmp_path, capsys, damage):
    content = bytearray(Path(small_file(tmp_path / "e.npz")).read_bytes())
    content[300] ^= 255
    (tmp_path / "e.npz").write_bytes(content[:len(content) // 2] if damage == "half" else content)
    assert_refused(capsys, r"e\.npz", tmp_path / "e.npz")


@pytest.mark.parametrize("dtype, kept", [(">f8", np.float64), (np.longdouble, np.float64),
                                         ("<f8", np.float64), (">f4", np.float32),
                                         (np.float16, np.float32)])
def test_no_digit_of_embeddings_is_lost(tmp_path, dtype, kept):
    rows = np.array([[1 / 3, 2 / 3]]).astype(dtype)
    np.savez(tmp_path / "e.npz", embeddings=rows, labels=[0])
    found = evaluate.read_embeddings(str(tmp_path / "e.npz"))[0]
    assert found.dtype == kept and found.dtype.isnative
    assert (found == rows.astype(kept)).all()


def test_an_npy_file_is_refused_in_words(tmp_path, capsys):
    np.save(tmp_path / "e.npy", np.eye(3))
    assert_refused(capsys, r"e\.npy cannot be read as an npz file",
                   tmp_path / "e.npy")


def test_a_missing_file_and_a_folder_are_refused(tmp_path, capsys):
    assert_refused(capsys, r"there is no file .*none\.npz", tmp_path / "none.npz")
    assert_refused(capsys, "there is no file", small_file(tmp_path / "e.npz"), "--gallery",
                   tmp_path / "none.npz")
    assert_refused(capsys, "[Dd]irectory|cannot be read", tmp_path)


@pytest.mark.parametrize("options", [
    ["--metrics", "recal"], ["--k_vals", "x"], ["--k_vals", "0"], ["--nmi_average", "mean"],
    ["--seed", "9" * 30], ["--eval_memory", "inf"], ["--eval_memory", "0"], []], ids=str)
def test_options_without_sense_are_refused(tmp_path, capsys, options):
    arguments = [small_file(tmp_path / "e.npz"), *options] if options else []
    with pytest.raises(SystemExit):
        evaluate.main(arguments)
    assert "error: " in capsys.readouterr().err


def test_the_help_says_the_defaults(capsys):
    with pytest.raises(SystemExit):
        evaluate.main(["--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "None" not in shown
    for default in ("recall map@r nmi f1 (", "arithmetic (", "all_vs_all", "1 2 4 8", "the CPU"):
        assert default in shown.partition("Default ")[2]
    assert "as in the run that saved the file" in shown


def test_the_memory_for_blocks():
    assert evaluate.memory_bytes(None, torch.device("cpu")) == 2 ** 30
    assert evaluate.memory_bytes(0.5, torch.device("cpu")) == 2 ** 29


def test_save_embeddings_to_a_place_that_cannot_be_written(tmp_path):
    with pytest.raises(OSError, match="could not be written"):
        evaluate.save_embeddings(tmp_path / "none" / "e.npz", torch.eye(3), [0, 1, 2])
    assert list(tmp_path.iterdir()) == []


def test_full_precision_whichever_names_somebody_has_used():
    """torch refuses to read the older setting after the newer one."""
    settings = getattr(torch.backends.cuda.matmul, "fp32_precision", None) and (
        torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)
    if not settings:
        pytest.skip("torch has one name for it")
    before = [setting.fp32_precision for setting in settings]
    try:
        settings[0].fp32_precision = "tf32"
        during = evaluate.full_precision()(
            lambda: [setting.fp32_precision for setting in settings])()
        assert during == ["ieee", "ieee"] and settings[0].fp32_precision == "tf32"
    finally:
        for setting, value in zip(settings, before):
            setting.fp32_precision = value


def test_memory_that_torch_holds_free_counts(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2 ** 20, 2 ** 34))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 5 * 2 ** 30)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 2 ** 30)
    assert evaluate.memory_bytes(None, torch.device("cuda", 0)) == 2 ** 30 + 2 ** 18
