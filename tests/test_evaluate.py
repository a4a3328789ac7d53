"""evaluate.py against slow oracles: float64 loops, scikit-learn, and numbers worked by hand.

Many of the oracle tests use small whole numbers as embeddings: their squared distances are exact
in every precision, and ties and duplicates, on which metrics differ, turn up all the time.
"""

import contextlib
import itertools
import json
import math
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import adjusted_mutual_info_score, normalized_mutual_info_score
from sklearn.metrics.cluster import pair_confusion_matrix
from torch.utils._python_dispatch import TorchDispatchMode

import auxiliaries
import evaluate

BLOCK_SIZES = (1, 7, 64, 2 ** 25)  # distances in a block: less than one row, some rows, all
KINDS = ("alone", "gallery", "own")  # what queries are compared with
WITH_RATIO = (*evaluate.DEFAULT_METRICS, "dist_ratio")


def unit_rows(count, dimensions, seed=0):
    rows = torch.randn(count, dimensions, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.normalize(rows, dim=1)


def nearly_collapsed(count, dimensions, seed=0, spread=1e-4):
    """Unit-norm rows that lie in one small spot, as those of a network that has collapsed."""
    rows = unit_rows(1, dimensions, seed) + spread * unit_rows(count, dimensions, seed + 1)
    return torch.nn.functional.normalize(rows, dim=1)


def blobs(sizes, dimensions, spread, seed=0):
    """Rows around len(sizes) centres, and the centre of each row."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(len(sizes), dimensions, generator=generator)
    labels = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    rows = centres[labels] + spread * torch.randn(len(labels), dimensions, generator=generator)
    return rows, labels


def spots(count, dimensions, spread, seed=0):
    """Rows in a tenth as many spots of a size, and labels that the spots cut across."""
    generator = torch.Generator().manual_seed(seed)
    centres = unit_rows(max(2, count // 10), dimensions, seed)
    rows = centres[random_ints(len(centres), count, generator)]
    rows = rows + spread * unit_rows(count, dimensions, seed + 1)
    return rows, random_ints(count // 8, count, generator)


def stretched(count, dimensions, seed=0):
    """Rows whose spread differs from dimension to dimension, in no order, around no origin."""
    rows = torch.randn(count, dimensions, generator=torch.Generator().manual_seed(seed))
    return rows * ((torch.arange(dimensions) * 3 + 1) % dimensions + 0.5) + 10


def random_ints(high, count, generator):
    return torch.randint(0, high, (count,), generator=generator)


def whole_numbers(count, dimensions, generator):
    return torch.randint(-2, 3, (count, dimensions), generator=generator).float()


def float64_distances(queries, others):
    difference = queries.double().numpy()[:, None] - others.double().numpy()[None]
    return np.sqrt((difference ** 2).sum(-1))


def problem(*parts):
    """Keyword arguments of rank_scores, rank_metrics, recall_at_k and evaluate_embeddings."""
    return dict(zip(("queries", "query_labels", "gallery", "gallery_labels", "own"), parts))


def own_problem(queries, labels, gallery, gallery_labels, seed=0):
    """A problem whose gallery, shuffled, has the queries' rows too."""
    order = torch.randperm(len(queries) + len(gallery),
                           generator=torch.Generator().manual_seed(seed))
    return problem(queries, labels, torch.cat([queries, gallery])[order],
                   torch.cat([labels, gallery_labels])[order], order.argsort()[:len(queries)])


def whole_number_problem(seed, kind, most=33):
    """Few dimensions, many ties; classes of all sizes; below most queries."""
    generator = torch.Generator().manual_seed(seed)
    count = 5 + random_ints(most - 5, 1, generator).item()
    dimensions = 1 + random_ints(4, 1, generator).item()
    classes = 2 + random_ints(12, 1, generator).item()
    parts = []
    for size in (count,) if kind == "alone" else (count, count + classes):
        labels = random_ints(classes, size, generator)
        if seed % 2:
            labels *= random_ints(2, size, generator)  # class 0 is by far the largest
        labels[:2] = 0  # one true match at least
        parts += [whole_numbers(size, dimensions, generator), labels]
    return own_problem(*parts, seed) if kind == "own" else problem(*parts)


# ---- blocks, the nearest neighbours


def test_blocks_cover_every_row_once_and_stay_small(monkeypatch):
    for elements in BLOCK_SIZES:
        monkeypatch.setattr(evaluate, "BLOCK_ELEMENTS", elements)
        for rows, columns in ((1, 1), (5, 1), (7, 3), (13, 7), (64, 64), (3, 0)):
            cut = evaluate.blocks(rows, columns)
            assert [i for block in cut for i in range(rows)[block]] == list(range(rows))
            heights = [block.stop - block.start for block in cut]
            assert all(height * columns <= elements or height == 1 for height in heights)


def test_knn_by_hand():
    # On a line at 0, 1, 3, 7. From 1: 0 is 1 away, 3 is 2 away, 7 is 6 away.
    rows = torch.tensor([[0.], [1.], [3.], [7.]])
    distances, indices = evaluate.knn(rows, k=2)
    assert distances.tolist() == [[1, 3], [1, 2], [2, 3], [4, 6]]
    assert indices.tolist() == [[1, 2], [0, 2], [1, 0], [2, 1]]
    # A copy of the queries is a gallery like any other, unless own says what lies where.
    assert evaluate.knn(rows, rows.clone())[1].flatten().tolist() == [0, 1, 2, 3]
    own = evaluate.knn(rows[1:3], rows.flip(0), 2, torch.tensor([2, 1]))
    assert own[0].tolist() == [[1, 2], [2, 3]] and own[1].tolist() == [[3, 1], [2, 3]]
    for gallery, own, most in ((None, None, 3), (rows, torch.arange(4), 3), (rows, None, 4)):
        assert evaluate.knn(rows, gallery, most, own)[0].shape == (4, most)
        for k in (-1, 0, most + 1):
            with pytest.raises(ValueError, match=rf"k = {k} .*--k_vals .*1 to {most}"):
                evaluate.knn(rows, gallery, k, own)


@pytest.mark.parametrize("elements", BLOCK_SIZES)
def test_knn_equals_brute_force(monkeypatch, elements):
    monkeypatch.setattr(evaluate, "BLOCK_ELEMENTS", elements)
    generator = torch.Generator().manual_seed(0)
    pairs = ((1, unit_rows(2, 3), unit_rows(4, 3, 1)),
             (10, unit_rows(70, 64).double(), unit_rows(40, 64, 1).double()),
             (3, nearly_collapsed(90, 64), nearly_collapsed(90, 64)[5:]),
             (12, whole_numbers(30, 2, generator), whole_numbers(21, 2, generator)),
             (2, unit_rows(20, 16).repeat(3, 1), unit_rows(20, 16)))
    for (k, rows, others), kind in itertools.product(pairs, KINDS):
        labels = torch.zeros(len(rows)).long(), torch.zeros(len(others)).long()
        given = {"alone": problem(rows), "gallery": problem(rows, labels[0], others),
                 "own": own_problem(rows, labels[0], others, labels[1])}[kind]
        gallery, own = given.get("gallery"), given.get("own")
        expected = float64_distances(rows, rows if gallery is None else gallery)
        if kind != "gallery":
            expected[range(len(rows)), own if kind == "own" else range(len(rows))] = np.inf
        nearest = np.sort(expected, 1)[:, :k]
        distances, indices = evaluate.knn(rows, gallery, k, own)
        assert distances.dtype == rows.dtype and indices.dtype == torch.int64
        np.testing.assert_allclose(distances, nearest, rtol=1e-5, atol=1e-7)
        # Which of several equally near rows comes first is free.
        np.testing.assert_allclose(np.take_along_axis(expected, indices.numpy(), 1), nearest,
                                   rtol=1e-5, atol=1e-7)
        assert all(len(set(row)) == k for row in indices.tolist())


# ---- ranks


def looped_ranks(queries, query_labels, gallery=None, gallery_labels=None, own=None):
    """The ranks of each query's true matches: a wrong row no farther comes before one."""
    others = (queries if gallery is None else gallery).double().tolist()
    other_labels = (query_labels if gallery is None else gallery_labels).tolist()
    for i, (query, label) in enumerate(zip(queries.double().tolist(), query_labels.tolist())):
        right, wrong = [], []
        for j, other in enumerate(others):
            if j != (i if gallery is None else None if own is None else own[i]):
                sq_distance = sum((a - b) ** 2 for a, b in zip(query, other))
                (right if other_labels[j] == label else wrong).append(sq_distance)
        yield [j + sum(distance <= match for distance in wrong)
               for j, match in enumerate(sorted(right), start=1)]


def sorted_ranks(queries, query_labels, gallery=None, gallery_labels=None, own=None):
    """As looped_ranks, from each query's sorted list of all others, wrong ones first."""
    if gallery is None:
        gallery, gallery_labels, own = queries, query_labels, range(len(queries))
    others = gallery.double().numpy()
    sq_distances = np.stack([((others - query) ** 2).sum(1) for query in queries.double().numpy()])
    right = query_labels.numpy()[:, None] == gallery_labels.numpy()              # [Q, G]
    if own is not None:
        sq_distances[range(len(queries)), own] = np.inf
        right[range(len(queries)), own] = False
    hits = np.take_along_axis(right, np.lexsort((right, sq_distances)), 1)
    return [np.flatnonzero(row) + 1 for row in hits]


def slow_scores(*parts, ranks_of=sorted_ranks, **named):
    """The vectors of rank_scores, in float64."""
    rows = []
    for ranks in map(np.array, ranks_of(*parts, **named)):
        count = len(ranks)
        precisions, within = np.arange(1, count + 1) / ranks, ranks <= count
        rows.append((count, ranks[0], within.mean(), (precisions * within).mean(),
                     precisions.mean()) if count else (0,) * 5)
    names = ("matches", "first_rank", "r_precision", "map@r", "map")
    return {name: np.array(values, dtype=np.int64 if name in names[:2] else np.float64)
            for name, values in zip(names, zip(*rows))}


def means(scores, k_vals):
    """The dict of rank_metrics from an oracle's vectors: of the queries with a true match."""
    scores = {name: values[scores["matches"] > 0] for name, values in scores.items()}
    ranks = scores["first_rank"]
    return {**{f"recall@{k}": np.mean(ranks <= k) for k in k_vals},
            "precision@1": np.mean(ranks == 1), "mrr": np.mean(1 / ranks),
            **{name: np.mean(scores[name]) for name in ("r_precision", "map@r", "map")}}


def assert_scores(found, expected, note=""):
    """rank_scores' vectors are the expected ones: the counts exactly, the others to rounding."""
    assert set(found) >= set(expected)
    for name, values in expected.items():
        whole = values.dtype == np.int64
        assert found[name].dtype == (torch.int64 if whole else torch.float64)
        np.testing.assert_allclose(found[name].numpy(), values, rtol=0, atol=0 if whole else 1e-12,
                                   err_msg=f"{name} {note}")


def nearest_ranks(**given):
    """The ranks of the nearest true match, found without those of the others."""
    return evaluate.rank_scores(**given, metrics=())["first_rank"]


def assert_exact(note="", ranks_of=sorted_ranks, memory=None, **given):
    """rank_scores, of all ranks and of the nearest alone, gives what the oracle gives."""
    before = {name: part.clone() for name, part in given.items()}
    expected = slow_scores(**given, ranks_of=ranks_of)
    assert_scores(evaluate.rank_scores(**given, memory=memory), expected, note)
    assert nearest_ranks(**given, memory=memory).tolist() == expected["first_rank"].tolist(), note
    assert all(torch.equal(given[name], part) for name, part in before.items())
    return expected


def test_recall_by_hand():
    # On a line: A at 0 and 3, B at 1 and 10, C at 2 alone.
    # A 0: B 1 and C 2 are nearer than A 3 -> rank 3. A 3: C, B nearer than A 0 -> rank 3.
    # B 1: A 0 and C 2 (both 1 away) and A 3 are nearer than B 10 -> rank 4. B 10: A 3 and C 2 are
    # nearer than B 1 -> rank 3. C has no true match and is left out: ranks 3, 3, 4, 3.
    embeddings = torch.tensor([[0.], [3.], [1.], [10.], [2.]])
    labels = torch.tensor([0, 0, 1, 1, 2])
    scores = evaluate.recall_at_k(embeddings, labels, k_vals=(1, 2, 3, 4))
    assert scores == {"recall@1": 0.0, "recall@2": 0.0, "recall@3": 0.75, "recall@4": 1.0}
    assert {type(value) for value in scores.values()} == {float}


# On a line: from the query of class 0 at 0 the gallery's classes read 0 1 0 2 0 outwards, so its
# true matches rank 1, 3, 5. Of the query of class 1 at 0.9 the one match, at 2, is 1.1 away, after
# 0 at 1 and before the others: rank 2. Class 7 is nowhere in the gallery: left out.
LINE = problem(torch.tensor([[0.], [0.9], [3.]]), torch.tensor([0, 1, 7]),
               torch.tensor([[1.], [2.], [3.], [4.], [5.]]), torch.tensor([0, 1, 0, 2, 0]))


def test_rank_metrics_by_hand():
    vectors = {
        "matches": [3, 1, 0], "first_rank": [1, 2, 0],
        "recall@1": [1, 0, 0], "recall@2": [1, 1, 0], "precision@1": [1, 0, 0],
        "mrr": [1, 1 / 2, 0],
        "r_precision": [2 / 3, 0, 0],  # 0 1 0 | 2 0: two of the first three; none of the first
        "map@r": [(1 + 2 / 3) / 3, 0, 0],  # precisions at the hits in the first three, by 3
        "map": [(1 + 2 / 3 + 3 / 5) / 3, 1 / 2, 0]}
    scores = evaluate.rank_scores(**LINE, k_vals=(1, 2))
    assert list(scores) == list(vectors)
    for name, values in vectors.items():
        assert scores[name].tolist() == pytest.approx(values, abs=1e-15)
    assert evaluate.rank_metrics(**LINE, k_vals=(1, 2)) == pytest.approx(
        {name: sum(values) / 2 for name, values in list(vectors.items())[2:]}, abs=1e-15)


def test_a_tie_goes_to_the_wrong_row_in_every_rank_metric():
    # From the query at 0: classes 0 and 1 both 1 away, then 0 and 1 both 2 away: reads 1 0 1 0.
    tied = problem(torch.zeros(1, 1), torch.tensor([0]), torch.tensor([[1.], [-1.], [2.], [-2.]]),
                   torch.tensor([0, 1, 0, 1]))
    assert evaluate.rank_metrics(**tied, k_vals=(1, 2)) == {
        "recall@1": 0, "recall@2": 1, "precision@1": 0, "mrr": 1 / 2, "r_precision": 1 / 2,
        "map@r": 1 / 4, "map": 1 / 2}


def test_own_by_hand():
    # On a line: queries A at 0 and B at 1 are rows 2 and 0 of the gallery, beside A at 5 and B at
    # 1. From A 0 both B are nearer than A 5: rank 3. From B 1 its copy is nearest: rank 1.
    given = problem(torch.tensor([[0.], [1.]]), torch.tensor([0, 1]),
                    torch.tensor([[1.], [5.], [0.], [1.]]), torch.tensor([1, 0, 0, 1]))
    own = torch.tensor([2, 0])
    assert nearest_ranks(**given, own=own).tolist() == [3, 1]
    assert evaluate.recall_at_k(**given, k_vals=(1, 2, 3), own=own) == {
        "recall@1": 0.5, "recall@2": 0.5, "recall@3": 1.0}
    assert evaluate.recall_at_k(**given, k_vals=(1, 4)) == {"recall@1": 1.0, "recall@4": 1.0}


@pytest.mark.parametrize("kind", KINDS)
def test_ranks_equal_the_oracles_with_ties_and_duplicates(kind):
    for seed in range(20):  # about eight rows
        given = whole_number_problem(seed, kind, most=9)
        expected, other = (assert_exact(f"of seed {seed}", ranks_of, **given)
                           for ranks_of in (looped_ranks, sorted_ranks))
        assert all((expected[name] == other[name]).all() for name in expected)
    for seed in range(100):
        given = whole_number_problem(seed, kind)
        expected = means(assert_exact(f"of seed {seed}", **given), (1, 2, 4))
        found = evaluate.rank_metrics(**given, k_vals=(1, 2, 4))
        assert list(found) == list(expected) and found == pytest.approx(expected, abs=1e-12)


# A few limits are compared with every key, many are looked up in sorted rows.
SIZES = [[2] * 100, [9] * 20, [40] * 6, [300, 1, 1, 2], [1] * 20 + [2], [60, 9, 8, 4, 3, 1], [400]]


def without_ties():
    for count, classes, dimensions in ((300, 5, 600), (400, 200, 600), (800, 250, 128)):
        generator = torch.Generator().manual_seed(count)
        yield unit_rows(count, dimensions), random_ints(classes, count, generator)


def classes_of_any_size():
    for sizes in SIZES:
        order = torch.randperm(sum(sizes), generator=torch.Generator().manual_seed(1))
        rows, labels = blobs(sizes, 3, 2.0)
        yield rows[order], labels[order]
        yield (2 * rows).round()[order], labels[order]  # with ties


def tight_clusters():
    for spread, dimensions in itertools.product((1e-1, 1e-3, 1e-5, 1e-7), (8, 128, 600)):
        yield spots(240, dimensions, spread)


def collapsed():
    for each, spread in itertools.product((2, 5, 40), (0, 1e-9, 1e-5, 1e-4)):
        labels = torch.arange(120) // each
        rows = torch.cat([torch.ones(120, 16), spread * unit_rows(120, 16)], 1).double()
        yield rows, labels
        rows = torch.cat([rows, torch.full((1, 32), 9.0)])  # or they fill the whole range
        yield rows, torch.cat([labels, torch.tensor([99])])
    for value in (0.0, 0.1, 1e20):
        yield torch.full((70, 24), value), torch.arange(70) % 2


def far_from_the_origin():
    rows, labels = unit_rows(200, 16), torch.arange(200) % 30
    for offset in (10, 1e3, 1e5):
        yield rows + offset, labels
    for outlier in (1e2, 1e4, 1e6, 1e8):
        blurred = rows.clone()
        blurred[-1] *= outlier
        yield blurred, labels


def other_types():
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        yield unit_rows(90, 16).to(dtype), torch.arange(90) % 14
    for difference in (1e-9, 1e-12):  # in float32 rows 1 and 2 are equally far from row 0
        yield torch.tensor([[0.], [1.], [-1 - difference]]).double(), torch.tensor([0, 0, 1])


@pytest.mark.parametrize("rows_of", [without_ties, classes_of_any_size, tight_clusters, collapsed,
                                     far_from_the_origin, other_types])
def test_ranks_equal_the_oracle(rows_of):
    for number, (rows, labels) in enumerate(rows_of()):
        assert_exact(number, queries=rows, query_labels=labels)
        if rows_of in (without_ties, tight_clusters):
            assert_exact(number, **problem(rows[:30], labels[:30], rows[30:], labels[30:]))
            assert_exact(number, **own_problem(rows[:30], labels[:30], rows[30:], labels[30:]))


def test_many_true_matches_in_little_room():
    """With half of the gallery to each class a look at a row for each close call would not end."""
    generator = torch.Generator().manual_seed(0)
    rows = unit_rows(1, 16) + 0.03 * torch.randn(8000, 16, generator=generator)
    labels, own = torch.arange(8000) % 2, torch.arange(0, 8000, 400)
    assert_exact(**problem(rows[::400], labels[::400], rows, labels, own))


def test_ranks_do_not_depend_on_the_scale():
    rows, labels = unit_rows(300, 16), torch.arange(300) % 50
    expected = slow_scores(rows, labels)
    assert evaluate.near_one(torch.full((2, 2), 1e-40))[0][0].isfinite().all()
    for scale in (1e-250, 1e-30, 1e-4, 1e15, 1e30, 1e250):
        assert_scores(evaluate.rank_scores(rows.double() * scale, labels), expected, scale)
        if 1e-30 <= scale <= 1e30:
            assert_scores(evaluate.rank_scores(rows * scale, labels), expected, scale)


@pytest.mark.parametrize("same", [None, torch.eq])
def test_queries_without_a_match_are_left_out(monkeypatch, same):
    rows, labels = torch.arange(200.).unsqueeze(1), torch.arange(200)
    gallery = torch.tensor([[5.], [7.]]), torch.tensor([5, 7])  # queries 5 and 7 find their match
    for elements in BLOCK_SIZES:
        monkeypatch.setattr(evaluate, "BLOCK_ELEMENTS", elements)
        assert nearest_ranks(**problem(rows, labels, *gallery), same=same).tolist() == [
            i in (5, 7) for i in range(200)]
        assert evaluate.rank_metrics(rows, labels, *gallery, k_vals=(1,), same=same) == {
            "recall@1": 1, "precision@1": 1, "mrr": 1, "r_precision": 1, "map@r": 1, "map": 1}


def test_ranks_by_a_comparison_of_ones_own():
    """Equality as a comparison gives what labels give; a rule on pairs of labels what loops do."""
    rows, labels = blobs([9, 7, 4, 1], 5, 1.0)
    for given in (problem(rows, labels), own_problem(rows[:8], labels[:8], rows[5:], labels[5:])):
        assert_scores(evaluate.rank_scores(**given, same=torch.eq), slow_scores(**given))
    levels = torch.stack([labels, labels % 2], 1)  # same super-class, another class
    same = lambda a, b: (a[..., 1] == b[..., 1]) & (a[..., 0] != b[..., 0])  # noqa: E731
    first = evaluate.rank_scores(rows, levels, same=same)["first_rank"].tolist()
    for i, near in enumerate(float64_distances(rows, rows).argsort(1)):
        hits = [rank for rank, j in enumerate(near[1:], start=1) if same(levels[i], levels[j])]
        assert first[i] == (hits[0] if hits else 0)
    for other in (lambda a, b: a == a, lambda a, b: (a == b).long()):
        with pytest.raises(ValueError, match="bool tensor of shape"):
            evaluate.rank_scores(rows, labels, same=other)


# ---- what the ranks do not depend on


def assert_hard_ranks_exact(**options):
    """Rows of every kind at once: spots, copies, a far row, a large class, lone rows."""
    rows, labels = spots(240, 24, 1e-5)
    rows = torch.cat([rows, rows[:30], torch.ones(12, 24), 3 * unit_rows(40, 24, 9)])
    labels = torch.cat([labels, labels[:15], 500 + torch.arange(15), torch.arange(12) % 5,
                        torch.zeros(40).long()])
    assert_exact(**problem(rows, labels), **options)
    assert_exact(**problem(rows[:90], labels[:90], rows[60:], labels[60:]), **options)


@contextlib.contextmanager
def put_to(setter, value, usual):
    setter(value)
    try:
        yield
    finally:
        setter(usual)


def test_ranks_do_not_depend_on_blocks_memory_and_threads(monkeypatch):
    for elements, memory, threads in ((1, None, 1), (1000, None, 1), (60_000, None, 1),
                                      (2 ** 25, 1, 1), (2 ** 25, 50_000, 1), (2 ** 25, None, 3)):
        monkeypatch.setattr(evaluate, "BLOCK_ELEMENTS", elements)
        with put_to(torch.set_num_threads, threads, 1):
            assert_hard_ranks_exact(memory=memory)
            assert torch.get_num_threads() == threads


@pytest.mark.parametrize("setting", [
    lambda: put_to(torch.set_float32_matmul_precision, "medium", "highest"),
    lambda: torch.autocast("cpu", dtype=torch.bfloat16), torch.inference_mode, torch.enable_grad],
    ids=["medium", "bfloat16", "inference", "gradients"])
def test_metrics_do_not_depend_on_what_torch_is_set_to(setting):
    def scores():  # of rows on which products in bfloat16 would show
        return evaluate.evaluate_embeddings(unit_rows(600, 64), torch.arange(600) % 60,
                                            metrics=evaluate.METRICS)

    plain = scores()
    with setting():
        assert scores() == plain
        assert_hard_ranks_exact()


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
    rows[:tight + 1] = rows[:1] + spread * unit_rows(tight + 1, 64, 1)
    labels[:tight] = 0
    monkeypatch.setattr(evaluate, "in_threads",  # Largest sees one thread alone
                        lambda function, parts, device: [function(part) for part in parts])
    with Largest() as largest:
        evaluate.rank_scores(rows, labels, memory=2 ** 20)
    assert largest.bytes <= 4 * 2 ** 20  # the embeddings alone are 0.8 MB in float64


# ---- which metrics, and what is refused


@pytest.mark.parametrize("kind, function, value", [
    ("nearest", lambda ranks, count: ranks[:, 0], 3 / 2),  # ranks of the nearest match 1 and 2
    ("ranks", lambda ranks, count: ranks.nan_to_num(posinf=0).amax(1), (5 + 2) / 2),
    ("ranks", lambda ranks, count: {"few": count < 2, "most": ranks.isfinite().sum(1)},
     {"few": 1 / 2, "most": 2}),
    ("clusters", lambda clusters, labels: float(len(clusters)), 8.0),
    ("set", lambda embeddings, labels: float(embeddings.max()), 5.0)])
def test_a_metric_is_a_function_and_a_row(monkeypatch, kind, function, value):
    monkeypatch.setitem(evaluate.METRICS, "own", evaluate.Metric(function, kind, min))
    found = evaluate.evaluate_embeddings(**LINE, k_vals=[1], metrics=["own"])
    assert found == (value if isinstance(value, dict) else {"own": value})
    assert {"recall@1", "rho", *found} == set(evaluate.evaluate_embeddings(
        **LINE, k_vals=[1], metrics=["own", "recall", "rho"]))
    assert evaluate.best_of("set 1 own") is min and evaluate.best_of("unknown") is max
    assert [evaluate.best_of(column) for column in ("val map@r", "set 1 recall@30", "d_an",
                                                    "val rho", "d_ap")] == [max] * 3 + [min] * 2
    assert [evaluate.percent_of(name) for name in ("val map@r", "d_ap", "loss")] == [100, 1, 100]


LABELS = torch.arange(6) % 2
REFUSED = [
    ((torch.ones(6), LABELS), r"expected \[N, D\]"),
    ((torch.zeros(6, 0), LABELS), r"\[6, 0\]"),
    ((torch.ones(0, 4), LABELS[:0]), "N above 0"),
    ((unit_rows(6, 4), LABELS, unit_rows(6, 4), LABELS[:5]), r"gallery .*\[6, 4\] with 5 labels"),
    ((unit_rows(6, 4), LABELS, unit_rows(6, 3), LABELS), "query .* 4 dimensions, gallery .* 3"),
    ((unit_rows(2, 4), LABELS[:2], unit_rows(3, 4), torch.arange(3), (1,), torch.arange(2)),
     "no query has a true match"),  # but itself
    ((unit_rows(6, 4), LABELS, unit_rows(6, 4), 1 - LABELS, (1,), torch.arange(6)),
     "their labels differ"),
    ((unit_rows(6, 4), LABELS, None, None, (1, 0)), "--k_vals 0: .*1 to 5"),
    ((unit_rows(6, 4), LABELS, None, None, (6,)), "--k_vals 6: .*1 to 5")]


def test_what_recall_refuses():
    for arguments, message in REFUSED:
        given = [*arguments, *(None, None, (1,))[len(arguments) - 2:]]
        with pytest.raises(ValueError, match=message):
            evaluate.recall_at_k(*given)


# ---- k-means


def objective(embeddings, assignments, centroids):
    return (embeddings.double() - centroids.double()[assignments]).square().sum().item()


def lloyd(embeddings, clusters, iterations, seed):
    """k-means by plain Lloyd in float64: every distance anew in each iteration."""
    rows = embeddings.double().numpy()
    generator = torch.Generator().manual_seed(seed)
    centroids = rows[torch.randperm(len(rows), generator=generator)[:clusters].numpy()].copy()
    assignments = None
    for iteration in range(iterations + 1):
        sq_distances = ((rows[:, None] - centroids[None]) ** 2).sum(-1)
        before, assignments = assignments, sq_distances.argmin(1)
        if iteration == iterations or before is not None and (assignments == before).all():
            return assignments, centroids
        farthest = iter(np.argsort(-sq_distances.min(1)))
        for cluster in range(clusters):
            members = rows[assignments == cluster]
            centroids[cluster] = members.mean(0) if len(members) else rows[next(farthest)]


@pytest.mark.parametrize("elements", [1, 64, 2 ** 25])
def test_kmeans_equals_plain_lloyd(monkeypatch, elements):
    monkeypatch.setattr(evaluate, "BLOCK_ELEMENTS", elements)
    for seed in range(60):
        generator = torch.Generator().manual_seed(seed)
        count, dimensions = 20 + seed % 61, 1 + seed % 9
        clusters, iterations = 1 + seed % (count // 2), seed % 21
        rows = torch.randn(count, dimensions, generator=generator)
        if seed % 3 == 0:
            rows += 5 * torch.randn(4, dimensions, generator=generator)[
                random_ints(4, count, generator)]
        assignments, centroids = evaluate.kmeans(rows, clusters, iterations, seed)
        expected = lloyd(rows, clusters, iterations, seed)
        assert assignments.tolist() == expected[0].tolist(), f"seed {seed}"
        np.testing.assert_allclose(centroids, expected[1], atol=1e-5)
        assert assignments.dtype == torch.int64


def test_kmeans_of_nearly_collapsed_embeddings_and_in_threads():
    rows = nearly_collapsed(200, 16)
    best = objective(rows, *map(torch.from_numpy, lloyd(rows, 5, 20, 0)))
    assert objective(rows, *evaluate.kmeans(rows, 5)) <= 1.02 * best
    rows = torch.randn(2200, 3, generator=torch.Generator().manual_seed(0)).double()
    with put_to(torch.set_num_threads, 2, 1):
        assert evaluate.kmeans(rows, 500, 2)[0].tolist() == lloyd(rows, 500, 2, 0)[0].tolist()


def test_kmeans_with_ties_leaves_each_row_at_a_nearest_centroid():
    for seed in range(100):
        rows = whole_numbers(20 + seed % 60, 1 + seed % 4, torch.Generator().manual_seed(seed))
        assignments, centroids = evaluate.kmeans(rows, 1 + seed % 19, seed=seed)
        distances = float64_distances(rows, centroids)
        np.testing.assert_allclose(distances[range(len(rows)), assignments], distances.min(1),
                                   atol=1e-5)


def test_kmeans_starts_at_distinct_rows_and_is_a_function_of_the_seed_alone():
    # Wherever two centroids start among 0, 1, 9, 10, the clusters end as {0, 1} and {9, 10}.
    for seed in range(8):
        line = torch.tensor([[0.], [1.], [9.], [10.]])
        assignments, centroids = evaluate.kmeans(line, 2, seed=seed)
        assert sorted(centroids.flatten().tolist()) == [0.5, 9.5]
        assert centroids[assignments].flatten().tolist() == [0.5, 0.5, 9.5, 9.5]
    rows, state = unit_rows(80, 4), torch.get_rng_state()
    starts = [evaluate.kmeans(rows, 10, iterations=0, seed=seed)[1] for seed in (3, 3, 4)]
    assert torch.equal(torch.get_rng_state(), state)  # nothing is drawn globally
    index = float64_distances(starts[0], rows).argmin(1)
    assert len(set(index.tolist())) == 10
    torch.testing.assert_close(starts[0], rows[index])
    assert torch.equal(starts[0], starts[1]) and not torch.equal(starts[0], starts[2])
    assert sorted(evaluate.kmeans(rows, 80)[0].tolist()) == list(range(80))
    for clusters in (0, 81):
        with pytest.raises(ValueError, match=f"{clusters} clusters of 80 embeddings.* 1 to 80"):
            evaluate.kmeans(rows, clusters)


def test_empty_clusters_are_seeded_anew():
    # Four points in 25 copies each: four starts among them usually coincide, which leaves clusters
    # empty; only with all four in use is the objective zero.
    rows = torch.tensor([[0., 0.], [0., 5.], [7., 0.], [20., 20.]]).repeat(25, 1)
    for seed in range(10):
        assignments, centroids = evaluate.kmeans(rows, 4, seed=seed)
        assert Counter(assignments.tolist()) == {cluster: 25 for cluster in range(4)}
        assert objective(rows, assignments, centroids) == 0
    assignments, centroids = evaluate.kmeans(torch.ones(10, 3), 4)  # fewer rows than clusters
    assert centroids.isfinite().all() and objective(torch.ones(10, 3), assignments, centroids) == 0


def test_kmeans_makes_at_most_the_given_iterations_and_stops_at_a_fixed_point(monkeypatch):
    calls, nearest = [], evaluate.nearest_centroids
    monkeypatch.setattr(evaluate, "nearest_centroids",
                        lambda *arguments: calls.append(1) or nearest(*arguments))
    evaluate.kmeans(unit_rows(400, 8), 20, iterations=3)
    assert len(calls) == 1 + 3  # the start, and one assignment after each update
    calls.clear()
    rows, _ = blobs([20] * 3, 4, 0.01)
    assignments, _ = evaluate.kmeans(rows, 3, iterations=1000)
    assert len(calls) < 40
    assert assignments.tolist() == lloyd(rows, 3, 1000, 0)[0].tolist()


# ---- clusters against classes


def test_nmi_and_f1_by_hand():
    # Entropy of the classes 2 + 2: ln 2 = 0.693147; of the clusters 3 + 1: 0.75 ln(4/3) +
    # 0.25 ln 4 = 0.562335. Mutual information: 0.5 ln(0.5 / 0.375) + 0.25 ln(0.25 / 0.375) +
    # 0.25 ln(0.25 / 0.125) = 0.143841 - 0.101366 + 0.173287 = 0.215762.
    # 0.215762 / ((0.693147 + 0.562335) / 2) = 0.343711; over sqrt(0.693147 x 0.562335) 0.345593.
    clusters, labels = torch.tensor([0, 0, 0, 1]), torch.tensor([5, 5, 9, 9])
    assert evaluate.nmi(clusters, labels) == pytest.approx(0.343711, abs=1e-6)
    assert evaluate.nmi(clusters, labels, "geometric") == pytest.approx(0.345593, abs=2e-6)
    assert evaluate.nmi(torch.zeros(4).long(), labels, "geometric") == 0  # no entropy at all
    # Pairs in one cluster: 01, 02, 12; in one class: 01, 23; in both: 01. Precision 1/3, recall
    # 1/2, F1 = 2 (1/3)(1/2) / (1/3 + 1/2) = 0.4.
    assert evaluate.f1(clusters, labels) == pytest.approx(0.4)
    assert evaluate.f1(torch.arange(5), torch.arange(5)) == 0  # no pair at all
    # 200,000 rows have 2e10 pairs, more than 32 bits hold: one cluster of all, two equal classes.
    both = evaluate.f1(torch.zeros(200_000).long(), torch.arange(200_000) % 2)
    assert both == pytest.approx(2 / 3, abs=1e-5)


def test_cluster_metrics_equal_scikit_learn_and_stay_between_0_and_1():
    for seed in range(80):
        generator = torch.Generator().manual_seed(seed)
        size, clusters, classes = (1 + random_ints(high, 1, generator).item()
                                   for high in (60, 20, 20))
        labels = random_ints(classes, size, generator)
        clusters = labels * 3 + 7 if seed % 3 == 0 else random_ints(clusters, size, generator)
        (_, fp), (fn, tp) = pair_confusion_matrix(labels.numpy(), clusters.numpy())
        found = {"f1": evaluate.f1(clusters, labels), "ami": evaluate.ami(clusters, labels)}
        expected = {"f1": 2 * tp / max(1, 2 * tp + fp + fn),
                    "ami": adjusted_mutual_info_score(labels, clusters)}
        for average in evaluate.NMI_AVERAGES:
            found[average] = evaluate.nmi(clusters, labels, average)
            expected[average] = normalized_mutual_info_score(labels, clusters,
                                                             average_method=average)
        assert found == pytest.approx(expected, abs=1e-12)
        assert {type(value) for value in found.values()} == {float}
        assert all(0 <= value <= 1 for name, value in found.items() if name != "ami")


# ---- distances and spectral decay


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


def distances_of_pairs(rows, labels):
    return tuple(evaluate.mean_distances(rows, labels).values())


def test_distances_by_hand():
    # Class 0 at 0, 2: mean pair distance 2, centre 1. Class 1 at 4, 6, 8: pairs 2, 2, 4, mean 8/3,
    # centre 6. Class 2 at 11 alone: no pair, centre 11. Within (2 + 8/3) / 2 = 7/3; between the
    # centres 5, 10 and 5, mean 20/3. 7/3 over 20/3 = 0.35.
    rows = torch.tensor([[0.], [4.], [6.], [2.], [11.], [8.]])
    assert evaluate.distance_ratio(rows, torch.tensor([0, 1, 1, 0, 2, 1])) == pytest.approx(0.35)
    assert evaluate.distance_ratio(rows, torch.arange(6)) == 0  # no pair within a class
    # Around one centre, each class a row and its mirror image.
    rows = torch.arange(1, 31).float().unsqueeze(1) * torch.ones(1, 3)
    assert evaluate.distance_ratio(torch.cat([4 + rows, 4 - rows]),
                                   torch.arange(30).repeat(2)) == math.inf
    # Class 0 at 0, 1, 4: 1, 4 and 3 apart; class 1 at 10: 10, 9 and 6 away.
    rows = torch.tensor([[0.], [1.], [4.], [10.]])
    assert evaluate.mean_distances(rows, torch.tensor([0, 0, 0, 1])) == pytest.approx(
        {"d_ap": 8 / 3, "d_an": 25 / 3})


@pytest.mark.parametrize("elements", [1, 50, 2 ** 25])
def test_distances_equal_loops(monkeypatch, elements):
    monkeypatch.setattr(evaluate, "BLOCK_ELEMENTS", elements)
    for count, classes in ((2, 1), (2, 2), (41, 7), (60, 59), (90, 40)):
        labels = random_ints(classes, count, torch.Generator().manual_seed(classes)) * 10
        same, off = labels.numpy()[:, None] == labels.numpy(), ~np.eye(count, dtype=bool)
        for rows in (unit_rows(count, 16), nearly_collapsed(count, 16)):
            distances = float64_distances(rows, rows)
            expected = [distances[part].mean() if part.any() else np.nan
                        for part in (same & off, ~same)]
            np.testing.assert_allclose(distances_of_pairs(rows, labels), expected, rtol=1e-6)
            assert evaluate.distance_ratio(rows, labels) == pytest.approx(
                slow_distance_ratio(rows, labels), rel=1e-6)


def test_mean_distances_of_more_rows_than_are_taken_in_float64():
    generator = torch.Generator().manual_seed(0)
    rows = 3 + torch.randn(9000, 4, generator=generator).double()
    labels = random_ints(1500, 9000, generator)
    labels[:700] = 1500  # a large class, too
    within = total = pairs = 0
    for some, own in zip(rows.split(100), labels.split(100)):
        distances, same = torch.cdist(some, rows), own.unsqueeze(1) == labels
        within, total = within + distances[same].sum(), total + distances.sum()
        pairs += int(same.sum())
    d_ap, d_an = distances_of_pairs(rows, labels)
    assert d_ap == pytest.approx(float(within) / (pairs - 9000), rel=1e-6)
    assert d_an == pytest.approx(float(total - within) / (9000 * 9000 - pairs), rel=1e-6)


def test_the_other_metrics_follow_the_scale():
    plain, labels = blobs([20, 15, 9], 8, 0.5)
    for exponent, rows in itertools.product((-100, -13, 20, 100), (plain, plain.double())):
        scaled = rows * 2.0 ** exponent
        assert torch.equal(evaluate.kmeans(scaled, 3)[0], evaluate.kmeans(rows, 3)[0])
        assert evaluate.distance_ratio(scaled, labels) == evaluate.distance_ratio(rows, labels)
        assert distances_of_pairs(scaled, labels) == pytest.approx(
            [2.0 ** exponent * value for value in distances_of_pairs(rows, labels)], rel=1e-12)
        assert evaluate.spectral_decay(scaled) == pytest.approx(evaluate.spectral_decay(rows))


def test_spectral_decay():
    # Singular values 3 and 1, shares 3/4 and 1/4: -ln 2 - (ln 3/4 + ln 1/4) / 2 = 0.143841.
    rows = torch.tensor([[3., 0.], [0., 1.]])
    assert evaluate.spectral_decay(rows) == pytest.approx(0.143841, abs=1e-6)
    rows = torch.linalg.qr(unit_rows(30, 30).double())[0].repeat(3, 1)  # orthonormal directions
    assert 0 <= evaluate.spectral_decay(rows) < 1e-12
    for count, dimensions in ((1, 1), (5, 5), (40, 3), (300, 64), (33, 32)):
        rows = stretched(count, dimensions)
        values = np.linalg.svd(rows.double().numpy(), compute_uv=False)
        expected = -np.log(dimensions) - np.log(values / values.sum()).mean()
        assert evaluate.spectral_decay(rows) == pytest.approx(expected, rel=1e-9, abs=1e-12)
    for rows in (unit_rows(3, 5), torch.zeros(9, 4), unit_rows(20, 4)[:, [0, 1, 2, 3, 3]],
                 unit_rows(40, 2).double() @ unit_rows(2, 6).double()):  # too few directions
        assert evaluate.spectral_decay(rows.double()) == float("inf")


# ---- all metrics at once


@pytest.mark.parametrize("kind", KINDS)
def test_evaluate_embeddings_is_each_metric(kind):
    one, two = blobs([9, 5], 8, 0.7), blobs([9, 30, 4, 14], 8, 0.7, 1)
    given = {"alone": problem(*two), "gallery": problem(*one, *two),
             "own": own_problem(*one, *two)}[kind]
    # All but the ranks are of queries and gallery together, each image once.
    rows, labels = two
    if kind == "gallery":
        rows, labels = torch.cat([one[0], rows]), torch.cat([one[1], labels])
    elif kind == "own":
        rows, labels = given["gallery"], given["gallery_labels"]
    clusters, _ = evaluate.kmeans(rows, 4, seed=5)
    expected = {
        **evaluate.rank_metrics(**given), "nmi": evaluate.nmi(clusters, labels),
        "ami": evaluate.ami(clusters, labels), "f1": evaluate.f1(clusters, labels),
        "dist_ratio": evaluate.distance_ratio(rows, labels),
        "rho": evaluate.spectral_decay(rows), **evaluate.mean_distances(rows, labels)}
    found = evaluate.evaluate_embeddings(**given, seed=5, metrics=evaluate.METRICS)
    assert found == expected and {type(value) for value in found.values()} == {float}
    assert list(found) == list(expected)
    recalls = ["recall@1", "recall@2", "recall@4", "recall@8"]
    for name in evaluate.METRICS:
        alone = evaluate.evaluate_embeddings(**given, seed=5, metrics=[name])
        keys = {"recall": recalls, "distances": ["d_ap", "d_an"]}.get(name, [name])
        assert alone == {key: expected[key] for key in keys}
    assert list(evaluate.evaluate_embeddings(**given)) == [*recalls, "map@r", "nmi", "f1"]
    assert evaluate.evaluate_embeddings(**given, seed=5, metrics=["nmi"], nmi_average="geometric"
                                        ) == {"nmi": evaluate.nmi(clusters, labels, "geometric")}


def test_arrays_and_lists_are_scored_as_tensors_are_and_labels_may_be_anything():
    parts = *blobs([9, 8, 7], 4, 0.9), *blobs([5, 6, 7], 4, 0.9, 1)
    options = dict(k_vals=[1, 3], metrics=evaluate.METRICS)
    for parts in (parts, parts[:2]):
        expected = evaluate.evaluate_embeddings(*parts, **options)
        for kind, named in ((torch.tensor, lambda label: -5 * label), (np.array, int), (list, int),
                            (np.array, lambda label: 2 ** 62 - label),
                            (list, lambda label: f"class {label}")):
            given = [kind(part.tolist()) for part in parts]
            given[1::2] = [kind([named(label) for label in part.tolist()]) for part in parts[1::2]]
            assert evaluate.evaluate_embeddings(*given, **options) == pytest.approx(expected)
    rows = [[0, 1], [0, 2], [5, 5], [6, 5], [9, 0]]  # whole numbers
    assert evaluate.evaluate_embeddings(rows, list("aabbb"), k_vals=[1]) == (
        evaluate.evaluate_embeddings(torch.tensor(rows).float(), [0, 0, 1, 1, 1], k_vals=[1]))


# ---- one random row of each class as gallery


def slow_random_gallery(rows, labels, k_vals, seed, repeats=10):
    """As random_gallery: the first row of each class in a drawn order is the gallery."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(repeats):
        first = {}
        for i in torch.randperm(len(labels), generator=generator).tolist():
            first.setdefault(labels[i].item(), i)
        gallery = sorted(first.values())
        queries = [i for i in range(len(labels)) if i not in gallery]
        found.append(means(slow_scores(rows[queries], labels[queries], rows[gallery],
                                       labels[gallery]), k_vals))
    return {name: np.mean([scores[name] for scores in found]) for name in found[0]}


def test_random_gallery_equals_a_loop():
    state = torch.get_rng_state()
    for seed in range(15):
        rows, labels = whole_number_problem(seed, "alone").values()
        labels[2:4] = 1
        labels = labels * 9 - 4
        expected = slow_random_gallery(rows, labels, (1, 2), seed)
        assert evaluate.random_gallery(rows, labels, (1, 2), evaluate.RANK_METRICS, seed,
                                       memory=5000) == pytest.approx(expected, abs=1e-12)
        # The other metrics are those of all rows.
        for metrics in (["nmi", "rho"], [*evaluate.RANK_METRICS, "f1"]):
            options = dict(k_vals=(1, 2), seed=seed, metrics=metrics)
            every = evaluate.evaluate_embeddings(rows, labels, **options)
            assert evaluate.evaluate_embeddings(
                rows, labels, **options, vehicle_protocol="random_gallery") == pytest.approx(
                    {name: expected.get(name, value) for name, value in every.items()})
    assert torch.equal(torch.get_rng_state(), state)


def test_random_gallery_by_hand():
    # Two equal rows in each of three far corners: whichever is the gallery, the other finds it.
    corners = torch.eye(3).repeat_interleave(2, 0)
    assert evaluate.random_gallery(corners, torch.arange(6) // 2, (1, 3)) == {
        "recall@1": 1, "recall@3": 1, "map@r": 1}
    # All rows equal: a query's one match comes after the two other classes, at rank 3.
    assert evaluate.random_gallery(torch.ones(6, 2), torch.arange(6) // 2, (1, 2, 3), (
        "recall", "mrr", "map")) == pytest.approx(
            {"recall@1": 0, "recall@2": 0, "recall@3": 1, "mrr": 1 / 3, "map": 1 / 3})
    with pytest.raises(ValueError, match="no query has a true match"):
        evaluate.random_gallery(unit_rows(4, 2), torch.arange(4), (1,))
    with pytest.raises(ValueError, match="--k_vals 4: .*1 to 3"):
        evaluate.random_gallery(unit_rows(9, 2), torch.arange(9) % 3, (1, 4))


# ---- embeddings of a network, evaluation sets


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


class Places:
    """A network that puts images at one of twelve places, so that many coincide.

    Keeps which images it has seen, in batches of which size, and whether gradients were off.
    """

    def __init__(self):
        self.seen, self.sizes, self.modes = [], [], set()

    def __call__(self, images):
        numbers = images[:, 0, 0, 0].long()
        self.seen += numbers.tolist()
        self.sizes.append(len(images))
        self.modes.add(torch.is_inference_mode_enabled())
        return torch.stack([numbers * 7 % 4, numbers * 5 % 3], 1).double()


@pytest.mark.parametrize("workers", [0, 2])
def test_embed_is_the_forward_pass_in_order(workers):
    state = torch.get_rng_state()
    dataset = Numbered([(7 * i) % 5 for i in range(10)])
    for batch_size, sizes in ((5, [5, 5]), (4, [4, 4, 2]), (100, [10])):
        network, said = Places(), []
        embeddings, labels = evaluate.embed(network, dataset, "cpu", batch_size, workers,
                                            lambda *numbers: said.append(numbers))
        assert embeddings.dtype == torch.float32 and labels.dtype == torch.int64
        assert embeddings.tolist() == Places()(dataset.images()).tolist()
        assert labels.tolist() == dataset.labels and not embeddings.requires_grad
        assert network.sizes == sizes and network.modes == {True}
        assert said == [(sum(sizes[:i + 1]), 10) for i in range(len(sizes))]
    assert torch.equal(torch.get_rng_state(), state)  # nothing is drawn globally


@pytest.mark.parametrize("protocol", evaluate.PROTOCOLS)
def test_evaluate_sets_puts_the_names_first_and_embeds_each_dataset_once(protocol):
    train, val, more = (Numbered([i % 3 for i in range(count)], list("abc"), offset)
                        for count, offset in ((9, 100), (6, 0), (4, 200)))
    sets = [("train", train, None), ("val", val, [train, val]), ("", val, None),
            ("apart", val, train), ("first", val, [val, train]), ("alone", val, [val]),
            ("three", val, [train, val, more]), ("others", val, [train, more])]
    network = Places()
    options = dict(k_vals=(1, 3), seed=1, metrics=WITH_RATIO, nmi_average="geometric",
                   memory=10_000, vehicle_protocol=protocol)
    # Sets may come from a generator.
    metrics, embedded = evaluate.evaluate_sets(network, (one for one in sets), "cpu",
                                               batch_size=4, **options)
    assert network.seen == [*range(100, 109), *range(6), *range(200, 204)]
    keys = ["recall@1", "recall@3", "map@r", "nmi", "f1", "dist_ratio"]
    assert list(metrics) == [f"{name} {key}".strip() for name, _, _ in sets for key in keys]
    rows = {part: Places()(part.images()).float() for part in (train, val, more)}
    for (name, queries, gallery), (query_rows, gallery_rows) in zip(sets, embedded):
        given = [rows[queries], torch.tensor(queries.labels)]
        assert torch.equal(query_rows, rows[queries]) and (gallery_rows is None) == (not gallery)
        if gallery:
            parts = gallery if isinstance(gallery, list) else [gallery]
            given += [torch.cat([rows[part] for part in parts]),
                      torch.tensor(sum((part.labels for part in parts), []))]
            assert torch.equal(gallery_rows, given[2])
        own = {"val": range(9, 15), "three": range(9, 15), "first": range(6), "alone": range(6)}
        expected = evaluate.evaluate_embeddings(
            *given, **options, own=torch.tensor(own[name]) if name in own else None)
        assert {key: metrics[f"{name} {key}".strip()] for key in keys} == expected
    # Another dataset of the same images is a gallery like any other: each query finds its copy.
    metrics, _ = evaluate.evaluate_sets(lambda images: images.flatten(1), [
        ("", val, [train, Numbered(val.labels, list("abc"))])], "cpu", (1,), metrics=["recall"])
    assert metrics == {"recall@1": 1}


def test_what_a_run_asks_of_each_evaluation():
    opt = SimpleNamespace(k_vals=[4, 1, 8, 4], given=[], vehicle_protocol="all_vs_all",
                          val_split=0.5, n_epochs=7, cluster_every=2, eval_every=2, kernels=3,
                          seed=5, eval_bs=7, metrics=["recall", "nmi"], nmi_average="geometric",
                          eval_memory=0.5)
    small = Numbered([0, 0, 1, 1, 2])
    assert evaluate.k_vals_select(opt, [("", small, None)]) == [1, 4]
    assert evaluate.k_vals_select(opt, [("", small, Numbered(range(8)))]) == [1, 4, 8]
    opt.given = ["k_vals"]
    with pytest.raises(ValueError, match=r"--k_vals 8: .*1 to 4 \(of .*--val_split 0.5\)"):
        evaluate.k_vals_select(opt, [("val", small, None)])
    opt.vehicle_protocol = "random_gallery"
    with pytest.raises(ValueError, match="--k_vals 4 8: .*1 to 3$"):
        evaluate.k_vals_select(opt, [("", small, None)])
    for epoch, metrics in ((2, ["recall"]), (4, ["recall", "nmi"]), (7, ["recall", "nmi"])):
        assert evaluate.scoring_select(opt, epoch, torch.device("cpu")) == {
            "k_vals": opt.k_vals, "num_workers": 3, "seed": 5, "batch_size": 7,
            "metrics": metrics, "nmi_average": "geometric",
            "vehicle_protocol": "random_gallery", "memory": 2 ** 29}
    assert evaluate.memory_bytes(None, torch.device("cpu")) == 2 ** 30


# ---- pictures


@pytest.fixture
def drawn(monkeypatch):
    """The rows that draw_recoveries hands to the picture, as lists of (image number, role)."""
    captured = []

    def save(path, rows, title):
        assert (path, title) == ("there", "above")
        captured.append([[(image.getpixel((0, 0))[0], role) for image, role in row]
                         for row in rows])

    monkeypatch.setattr(auxiliaries, "save_image_grid", save)
    return captured


@pytest.mark.parametrize("with_gallery", [False, True])
def test_recoveries_are_the_nearest_by_brute_force(drawn, with_gallery):
    queries, rows = Numbered([i % 4 for i in range(20)], list("abcd")), unit_rows(20, 6)
    others, other_rows = queries, rows
    if with_gallery:  # which numbers the classes in another order; its names decide
        others, other_rows = Numbered([i % 3 for i in range(15)], ["d", "a", "e"], 100), unit_rows(
            15, 6, 1)
    distances = float64_distances(rows, other_rows)
    if not with_gallery:
        np.fill_diagonal(distances, np.inf)
    given = (queries, others, rows, other_rows) if with_gallery else (queries, None, rows, None)
    state = torch.get_rng_state()
    for number, neighbours in ((3, 2), (100, 1), (2, 50)):
        grid, again, other = (
            evaluate.draw_recoveries("there", *given, seed, number, neighbours, title="above")
            or drawn.pop() for seed in (0, 0, 1))
        assert grid == again != other
        assert len({row[0][0] for row in grid}) == len(grid) == min(number, 20)
        for (query, role), *hits in grid:
            found = distances[query].argsort()[:min(neighbours, 15 if with_gallery else 19)]
            name = queries.class_names[queries.labels[query]]
            assert role == "query" and hits == [
                (others.offset + i, "hit" if others.class_names[others.labels[i]] == name
                 else "miss") for i in found]
    assert torch.equal(torch.get_rng_state(), state)
    evaluate.draw_recoveries("there", queries, None, torch.ones(20, 3), None, title="above")
    assert all(len({number for number, _ in row}) == 6 for row in drawn[0])  # never the query


@pytest.fixture
def scattered(monkeypatch):
    """What draw_embeddings hands to the picture: title, points [N, 2], names."""
    captured = []
    monkeypatch.setattr(auxiliaries, "save_scatter", lambda path, title, points, names: (
        captured.append(SimpleNamespace(title=title, points=np.asarray(points), names=names))))
    return captured


def centred_pca(rows):
    rows = rows.double().numpy() - rows.double().numpy().mean(0)
    return rows @ np.linalg.svd(rows)[2][:2].T


def test_pca_shows_the_two_directions_of_greatest_spread(scattered):
    for count, dimensions, dtype in ((5, 2, torch.float16), (4, 9, torch.float64),
                                     (60, 128, torch.float32)):
        rows = stretched(count, dimensions).to(dtype)
        evaluate.draw_embeddings("unused", Numbered([i % 4 for i in range(count)]), rows,
                                 title=["above"])
        drawn, expected = scattered.pop(), centred_pca(rows)
        signs = np.sign((expected * drawn.points).sum(0))  # a direction has no sign
        np.testing.assert_allclose(drawn.points, signs * expected, atol=1e-8)
        assert drawn.names == [f"class {i % 4}" for i in range(count)]
        assert drawn.title == ["above", f"{count} test embeddings, PCA, coloured by class"]


def test_tsne_keeps_neighbours_together(scattered):
    rows, labels = blobs([12, 9, 15], 10, 0.02)
    dataset = Numbered(labels.tolist(), ["cat", "dog", "emu"])
    for _ in range(2):
        evaluate.draw_embeddings("unused", dataset, rows, "tsne")
    drawn, again = scattered
    assert drawn.title == ["36 test embeddings, t-SNE, coloured by class"]
    assert (drawn.points == again.points).all()
    distances = np.linalg.norm(drawn.points[:, None] - drawn.points[None], axis=2)
    np.fill_diagonal(distances, np.inf)
    assert [drawn.names[i] for i in distances.argmin(1)] == drawn.names
    assert np.abs(drawn.points - centred_pca(rows)).max() > 1  # it is not the other method


def test_of_many_embeddings_a_sample_is_drawn_with_the_seed(scattered):
    states = torch.get_rng_state(), np.random.get_state()[1].tolist()
    # In one dimension, so the points say which rows were drawn; each is a class of its own.
    for count, most, title in ((30, {"most": 20}, "20 of 30"), (30, {"most": 30}, "30"),
                               (2600, {}, "2,000 of 2,600")):
        rows = torch.arange(float(count)).unsqueeze(1)
        for seed in (3, 3, 4):
            evaluate.draw_embeddings("unused", Numbered(range(count)), rows, "pca", seed, **most)
        drawn, again, other = scattered[-3:]
        assert drawn.title == [f"{title} test embeddings, PCA, coloured by class"]
        assert drawn.names == again.names and (drawn.names == other.names) == (title == "30")
        numbers = np.array([int(name.split()[1]) for name in drawn.names])
        assert len(set(numbers)) == len(drawn.names) == int(title.split()[0].replace(",", ""))
        places = drawn.points[:, 0] * (-1 if drawn.points[0, 0] > drawn.points[-1, 0] else 1)
        np.testing.assert_allclose(places, numbers - numbers.mean(), atol=1e-6)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.random.get_state()[1].tolist() == states[1]


FEW = [*(unit_rows(count, 3) for count in (1, 2, 4, 5)), torch.tensor([[1.], [2.]]),
       torch.full((9, 4), 0.1), torch.zeros(7, 4), torch.tensor([[0., 1.], [1., 0.]]).repeat(9, 1),
       torch.cat([torch.full((19, 3), 0.1), torch.zeros(1, 3)]),
       nearly_collapsed(20, 8, spread=1e-6), 1e-30 * unit_rows(30, 5)]


@pytest.mark.parametrize("method", ["pca", "tsne"])
@pytest.mark.filterwarnings("error")
def test_few_or_equal_embeddings_are_drawn(scattered, method):
    for rows in FEW:
        evaluate.draw_embeddings("unused", Numbered([i % 2 for i in range(len(rows))]), rows,
                                 method)
        points = scattered.pop().points
        assert points.shape == (len(rows), 2) and np.isfinite(points).all()
        if len(rows.unique(dim=0)) == 1:
            assert (points == 0).all()
        elif method == "pca" or len(rows) < 5:  # then the greatest distance is kept
            assert np.ptp(points[:, 0]) == pytest.approx(np.ptp(centred_pca(rows)[:, 0]),
                                                         rel=1e-6)
        else:
            assert np.ptp(points[:, 0]) > 0


# ---- alone, on saved embeddings


@pytest.fixture
def npz(tmp_path):
    """A function that writes embeddings [count, 6] and labels of 5 classes, or arrays given."""
    def write(name="e.npz", count=40, settings=None, **arrays):
        if settings:
            arrays["settings"] = json.dumps(settings)
        np.savez(tmp_path / name, **{"embeddings": unit_rows(count, 6).numpy(),
                                     "labels": np.arange(count) % 5, **arrays})
        return str(tmp_path / name)
    return write


@pytest.fixture
def printed(capsys):
    """A function that runs main -> (the lines before the table, the metrics)."""
    def run(*arguments):
        scores = evaluate.main([str(argument) for argument in arguments])
        lines = capsys.readouterr().out.splitlines()
        table = {"metric": "value", **{name: str(value) for name, value in scores.items()}}
        assert [line.split() for line in lines[-len(table):]] == [*map(list, table.items())]
        return lines[:-len(table)], scores
    return run


@pytest.fixture
def refused(capsys):
    """A function that runs main, which ends with one line that matches and prints nothing."""
    def run(message, *arguments):
        with pytest.raises(SystemExit, match=message) as stopped:
            evaluate.main([str(argument) for argument in arguments])
        assert str(stopped.value).startswith("evaluate.py: error: ")
        assert "\n" not in str(stopped.value) and capsys.readouterr().out == ""
    return run


def test_a_saved_file_gives_the_same_numbers_to_the_last_digit(tmp_path, printed):
    # Sums over classes run in the order of the labels, so a file must keep that order.
    rows, labels = unit_rows(300, 6), random_ints(23, 300, torch.Generator())
    evaluate.save_embeddings(tmp_path / "e.npz", rows, labels.tolist(), k_vals=[1, 3], seed=7)
    assert [file.name for file in tmp_path.iterdir()] == ["e.npz"]
    for metrics in (evaluate.METRICS, ("map",)):
        lines, scores = printed(tmp_path / "e.npz", "--metrics", *metrics)
        expected = evaluate.evaluate_embeddings(rows, labels, k_vals=[1, 3], seed=7,
                                                metrics=metrics)
        assert list(scores) == list(expected) and scores == expected
        assert len(lines) == 1 and "300 queries of 23 classes, all_vs_all; 0 without" in lines[0]
        assert "seed 7" in lines[0] and ("arithmetic" in lines[0]) == ("nmi" in metrics)


def test_no_digit_and_no_kind_of_label_of_a_file_is_lost(npz):
    for dtype, kept in (("<f2", np.float32), (">f4", np.float32), ("u1", np.float32),
                        (">f8", np.float64), ("<i4", np.float64), (np.longdouble, np.float64)):
        rows = (unit_rows(40, 4).double().numpy() * 100 / 3).astype(dtype)
        found, labels, settings = evaluate.read_embeddings(
            npz(embeddings=rows, settings={"k_vals": [1, 2], "seed": 5}))
        assert found.dtype == kept and found.dtype.isnative
        assert (found == rows.astype(kept)).all() and labels.tolist() == [*range(5)] * 8
        assert settings == {"k_vals": [1, 2], "seed": 5}
    names, numbers = np.array(["cat", "dog", "emu", "a long name", "ö"]), np.arange(5)
    for pair in ((names, names.astype("<U99")), (names[:4].astype("S"), names[:4]),
                 (numbers, numbers.astype(str)), (numbers * 1.0, numbers), (numbers[:2] > 0,) * 2):
        read = [evaluate.read_embeddings(npz(embeddings=np.eye(len(labels)), labels=labels))[1]
                for labels in pair]
        one, two = evaluate.number_labels(*read)
        assert one.tolist() == two.tolist() and sorted(one.tolist()) == list(range(len(pair[0])))


def test_options_come_before_what_the_file_says_and_that_before_defaults(npz, printed, refused):
    settings = dict(k_vals=[2], seed=5, metrics=["recall", "mrr", "nmi"], nmi_average="geometric",
                    vehicle_protocol="random_gallery", device="cpu", gallery_file="")
    rows, labels = unit_rows(40, 6), torch.arange(40) % 5
    lines, scores = printed(npz(settings=settings))
    scoring = {name: settings[name] for name in ("k_vals", "seed", "metrics", "nmi_average",
                                                 "vehicle_protocol")}
    assert scores == evaluate.evaluate_embeddings(rows, labels, **scoring)
    assert "random_gallery" in lines[0] and "seed 5, NMI with the geometric" in lines[0]
    lines, scores = printed(npz(settings=settings), "--k_vals", 1, 39, "--seed", 4, "--metrics",
                            "recall", "nmi", "--nmi_average", "arithmetic", "--vehicle_protocol",
                            "all_vs_all", "--eval_memory", "0.00001")
    assert scores == evaluate.evaluate_embeddings(rows, labels, k_vals=[1, 39], seed=4,
                                                  metrics=["recall", "nmi"])
    assert printed(npz())[1] == evaluate.evaluate_embeddings(rows, labels, seed=1)
    settings |= {"vehicle_protocol": "all_vs_all", "gallery_file": "\x1bgallery.npz"}
    assert r"compared these with \x1bgallery.npz" in printed(npz(settings=settings))[0][1]
    settings["vehicle_protocol"] = "random_gallery"
    refused("draws its own gallery", npz(settings=settings), "--gallery", npz("g.npz"))


def test_all_metrics_as_a_table_and_as_json(npz, printed, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    names = ["recall@1", "recall@2", "recall@4", "recall@8", "precision@1", "mrr", "r_precision",
             "map@r", "map", "nmi", "ami", "f1", "dist_ratio", "rho", "d_ap", "d_an"]
    assert list(printed(npz(), "--metrics", "all")[1]) == names
    scores = evaluate.main([npz(), "--json", "--gpu", "0", "--metrics", "all"])
    assert json.loads(capsys.readouterr().out) == scores | {
        "queries": 40, "classes": 5, "compared_with": "all_vs_all", "without_match": 0,
        "zero_vectors": 0, "queries_in_gallery": 0, "seed": 1, "nmi_average": "arithmetic",
        "not_given": ""}
    evaluate.main([npz(count=5, labels=np.zeros(5)), "--json", "--metrics", "rho", "distances"])
    found = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)  # no NaN: strict
    assert found["rho"] is None and found["d_an"] is None and found["d_ap"] > 0


def test_a_file_against_a_gallery(npz, printed):
    rows = unit_rows(60, 6).numpy()
    rows[3, 2] = 0
    for dtype in (np.float32, np.float64):
        gallery = rows[37:].astype(dtype)
        gallery[5] = rows[3]
        gallery[5, 2] = -0.0  # which is 0
        path = npz("g.npz", embeddings=gallery, labels=np.arange(23) % 5)
        lines, scores = printed(npz(embeddings=rows[:40], labels=np.arange(40) % 7), "--gallery",
                                path, "--metrics", "all")
        expected = evaluate.evaluate_embeddings(
            rows[:40].astype(dtype), np.arange(40) % 7, gallery, np.arange(23) % 5, seed=1,
            metrics=evaluate.METRICS)
        assert scores == pytest.approx(expected, rel=1e-6)
        # Classes 5 and 6, ten of the 40 queries, are not in the gallery.
        assert "40 queries of 7 classes, a gallery of 23; 10 without" in lines[0]
        assert lines[1] == "note: 4 queries are rows of the gallery, at distance 0"


def test_what_is_odd_about_a_file_is_said(npz, printed, refused, capsys):
    rows = unit_rows(40, 6).numpy()
    rows[[3, 17]] = 0
    lines, _ = printed(npz(embeddings=rows, labels=[0] * 20 + [1] * 15 + [2, 3, 4, 5, 6]))
    assert lines == ["40 queries of 7 classes, all_vs_all; 5 without a true match are left out; "
                     "seed 1, NMI with the arithmetic mean; 2 zero vectors"]
    # Default k that are too many are left out, the user's are an error. In Python as well.
    arrays = dict(embeddings=np.eye(6), labels=np.arange(6) % 2)
    lines, scores = printed(npz(**arrays))
    assert [name for name in scores if "recall" in name] == ["recall@1", "recall@2", "recall@4"]
    note = "note: no recall at 8, as each query has 5 images to be compared with"
    assert note in lines
    refused("--k_vals 8: .*1 to 5", npz(**arrays), "--k_vals", 1, 8)
    refused("--k_vals 8: .*1 to 5", npz(settings={"k_vals": [1, 8]}, **arrays))  # a run's
    assert "recall@8" not in evaluate.evaluate_embeddings(*arrays.values(), metrics=["recall"])
    assert capsys.readouterr().out.strip() == note


NOT_FINITE = unit_rows(40, 6)
NOT_FINITE[3, 2] = math.nan
NOT_FINITE[7, 0] = -math.inf
BAD = [({"embeddings": NOT_FINITE}, "2 of 40 {} embeddings are not finite.* row 3"),
       ({"labels": np.arange(39) % 5}, r"{}.*\[40, 6\] with 39 labels"),
       ({"labels": np.zeros((40, 1))}, r"labels \[40, 1\]"),
       ({"labels": np.arange(40) + 9}, "no query has a true match"),
       ({"embeddings": np.zeros((40, 2, 3))}, r"embeddings \[40, 2, 3\]"),
       ({"embeddings": np.full((40, 6), "1.0")}, "expected numbers"),
       ({"embeddings": np.array([{}], object)}, "allow_pickle=False"),
       ({"labels": np.array([{}], object)}, "allow_pickle=False"),
       ({"settings": [1, 2]}, "cannot be read")]


def test_a_bad_file_is_refused_in_one_line(npz, refused):
    for arrays, message in BAD:
        refused(message.format("query"), npz(**arrays))
        refused(message.format("gallery"), npz(), "--gallery", npz("g.npz", **arrays))


def test_what_is_no_file_of_embeddings_is_refused(npz, refused, tmp_path):
    path = npz()
    refused("query.* 6 dimensions, gallery.* 5", path, "--gallery",
            npz("g.npz", embeddings=unit_rows(40, 5).numpy()))
    refused("its run measured .*accuracy.*--metrics", npz("s.npz", settings={
        "metrics": ["recall", "accuracy"]}))
    whole = bytearray(Path(path).read_bytes())
    flipped = whole.copy()
    flipped[300] ^= 255
    for content in (b"", b"hello", whole[:len(whole) // 2], flipped):
        Path(path).write_bytes(content)
        refused(r"e\.npz cannot be read as an npz file", path)
    np.savez(path, embeddings=np.eye(3))
    refused(r"e\.npz .*\[N, D\].*labels is not", path)
    refused(r"there is no file .*none\.npz", tmp_path / "none.npz")
    refused("[Dd]irectory|cannot be read", tmp_path)
    with pytest.raises(OSError, match="could not be written"):
        evaluate.save_embeddings(tmp_path / "none" / "e.npz", torch.eye(3), [0, 1, 2])


def test_options_without_sense_are_refused_and_the_help_says_the_defaults(npz, capsys):
    for options in (["--metrics", "recal"], ["--k_vals", "0"], ["--nmi_average", "mean"],
                    ["--seed", "9" * 30], ["--eval_memory", "0"], ["--help"]):
        with pytest.raises(SystemExit):
            evaluate.main([npz(), *options])
        shown = capsys.readouterr()
        assert options == ["--help"] or options[0] in shown.err.partition("error: ")[2]
    shown = " ".join(shown.out.split())
    for default in ("recall map@r nmi f1", "arithmetic", "all_vs_all", "1 2 4 8", "the CPU"):
        assert default in shown.partition("Default ")[2] and "None" not in shown


# ---- torch


def test_full_precision_whichever_names_somebody_has_used():
    """torch refuses to read the older setting after the newer one."""
    if not hasattr(torch.backends.cuda.matmul, "fp32_precision"):
        pytest.skip("torch has one name for it")
    settings = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul
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
