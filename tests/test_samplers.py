"""Tuple samplers and batch samplers against their definitions, written as plain loops in float64.

The oracle lists every pair (positive, negative) that a method may return for an anchor: a drawn
tuple must be in that list, an anchor with a list must draw, and how often each entry comes up is
counted.
"""

import argparse
import inspect
import math
import pickle
import types
from collections import Counter

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import samplers
from samplers import (ClassBalancedBatchSampler, ReplacementBatchSampler, Sampler,
                      ShuffledBatchSampler)

VARIANTS = {
    "random": {"method": "random"},
    "semihard": {"method": "semihard"},
    "facenet-plain": {"method": "facenet", "margin": 0.3},
    "facenet-squared": {"method": "facenet", "margin": 0.3, "squared": True},
    "facenet-wide": {"method": "facenet", "margin": 2.0, "squared": True},
    "softhard": {"method": "softhard"},
    "distance": {"method": "distance"},
    "distance-cutoff": {"method": "distance", "distance_cutoff": 0.9},
    "hard": {"method": "hard"},
    "rho": {"method": "rho"},
    "rho-never": {"method": "rho", "rho_probability": 0},
    "rho-always-cutoff": {"method": "rho", "rho_probability": 1, "distance_cutoff": 1.4},
}
TAKE_ALL = ("hard", "all", "multisimilarity")  # methods that draw nothing


# ---- oracles


def allowed(d, positives, negatives, method, margin=0.2, distance_cutoff=None,
            rho_probability=0.3, anchor=None):
    """The (positive, negative) of one anchor, at distances d from all, that a method allows."""
    if method == "hard" and positives and negatives:
        farthest, nearest = max(d[p] for p in positives), min(d[n] for n in negatives)
        positives = [p for p in positives if d[p] == farthest]
        negatives = [n for n in negatives if d[n] == nearest]
    if method == "softhard" and positives and negatives:
        nearest, farthest = min(d[n] for n in negatives), max(d[p] for p in positives)
        positives = [p for p in positives if d[p] > nearest] or positives
        negatives = [n for n in negatives if d[n] < farthest] or negatives
    if method in ("distance", "rho") and distance_cutoff is not None:
        negatives = [n for n in negatives if d[n] < distance_cutoff] or negatives
    replaces = method == "rho" and rho_probability and negatives
    pairs = {(anchor, p) for p in positives} if replaces else set()
    if method == "rho" and rho_probability == 1:
        return pairs
    for p in positives:
        chosen = negatives
        if method in ("semihard", "facenet"):
            chosen = [n for n in negatives if d[p] < d[n] < d[p] + margin] or negatives
        pairs |= {(p, n) for n in chosen}
    return pairs


def places_of(labels, other_labels=None):
    """[(anchor, positives, negatives)], indices into the others, the labels' own for None."""
    columns = (labels if other_labels is None else other_labels).tolist()
    return [(a, [i for i, other in enumerate(columns)
                 if other == name and (other_labels is not None or i != a)],
             [i for i, other in enumerate(columns) if other != name])
            for a, name in enumerate(labels.tolist())]


def eligible_pairs(embeddings, labels, others=None, other_labels=None, *, method, squared=False,
                   **options):
    """For each anchor the set of (positive, negative) that the definition of the method allows."""
    columns = (embeddings if others is None else others).double().tolist()
    pairs = []
    for (a, *places), row in zip(places_of(labels, other_labels), embeddings.double().tolist()):
        d = [sum((x - y) ** 2 for x, y in zip(row, other)) for other in columns]
        d = d if squared else [math.sqrt(value) for value in d]
        pairs.append(allowed(d, *places, method, anchor=a, **options))
    return pairs


def hard_pairs(embeddings, labels, others=None, other_labels=None, epsilon=0.1):
    """Positives with s_ap < max s_an + epsilon (eq. 8), negatives s_an > min s_ap - epsilon (7).

    s: cosine similarity, 0 with a zero row -> the sets of (anchor, positive), (anchor, negative).
    """
    columns = (embeddings if others is None else others).double().tolist()
    hard = set(), set()
    for (a, positives, negatives), row in zip(places_of(labels, other_labels),
                                              embeddings.double().tolist()):
        s = [sum(x * y for x, y in zip(row, other))
             / (math.hypot(*row) * math.hypot(*other) or 1) for other in columns]
        if positives and negatives:
            least, most = min(s[p] for p in positives), max(s[n] for n in negatives)
            hard[0].update((a, p) for p in positives if s[p] < most + epsilon)
            hard[1].update((a, n) for n in negatives if s[n] > least - epsilon)
    return hard


def listed(pairs):
    """The oracle's pairs of each anchor as one set of triplets."""
    return {(a, p, n) for a, allowed in enumerate(pairs) for p, n in allowed}


def distance_probabilities(distances, n):
    """{negative: d} -> {negative: probability}, in proportion to 1 / q(d) with d >= 0.5.

    log q^-1 = (2 - n) log d - (n - 3)/2 log(1 - d^2/4)
    """
    logs = {}
    for negative, d in distances.items():
        d = max(d, 0.5)
        logs[negative] = (2 - n) * math.log(d) - (n - 3) / 2 * math.log(1 - d ** 2 / 4)
    top = max(logs.values())
    total = sum(math.exp(value - top) for value in logs.values())
    return {negative: math.exp(value - top) / total for negative, value in logs.items()}


def chi_square_ok(observed, probabilities, draws):
    """Pearson's statistic of the counts, within six standard deviations of its mean.

    observed: Counter of outcomes; probabilities: {outcome: probability}. Outcomes expected less
    than five times are pooled.
    """
    assert set(observed) <= set(probabilities), "an outcome of probability zero was drawn"
    cells, pooled_seen, pooled_expected = [], 0, 0.0
    for outcome, probability in probabilities.items():
        if probability * draws >= 5:
            cells.append((observed[outcome], probability * draws))
        else:
            pooled_seen += observed[outcome]
            pooled_expected += probability * draws
    if pooled_expected >= 5:
        cells.append((pooled_seen, pooled_expected))
    statistic = sum((seen - expected) ** 2 / expected for seen, expected in cells)
    freedom = len(cells) - 1
    assert freedom >= 1
    return statistic < freedom + 6 * math.sqrt(2 * freedom)


# ---- batches of embeddings

def unit_rows(count, dim, generator):
    return F.normalize(torch.randn(count, dim, dtype=torch.float64, generator=generator), dim=1)


def random_batches():
    """Thirty unbalanced batches of unit rows: 2 to 14 images, 1 to 6 classes of any numbers."""
    generator = torch.Generator().manual_seed(7)
    numbers = np.random.default_rng(7)
    for _ in range(30):
        count, dim = int(numbers.integers(2, 15)), int(numbers.choice([2, 3, 8, 128]))
        names = numbers.choice(1000, size=numbers.integers(1, 7), replace=False)
        labels = torch.from_numpy(numbers.choice(names, size=count))
        centre = unit_rows(1, dim, generator) * float(numbers.choice([0, 2]))  # spread, or bunched
        yield F.normalize(unit_rows(count, dim, generator) + centre, dim=1), labels


def corner_batches():
    """Degenerate batches, and one with exact ties: an integer grid has d_an == d_ap often."""
    generator = torch.Generator().manual_seed(8)
    point, far = unit_rows(1, 16, generator), unit_rows(1, 2048, generator)
    grid = torch.tensor([[x, y, z] for x in (0, 1, 2) for y in (0, 1) for z in (0, 1)])
    axes = torch.cat([torch.eye(4), -torch.eye(4)]).double()
    return {
        "one class": (unit_rows(5, 8, generator), torch.zeros(5, dtype=torch.long)),
        "all singles": (unit_rows(5, 8, generator), torch.arange(5)),
        "one single": (unit_rows(1, 8, generator), torch.tensor([3])),
        "pairs and singles": (unit_rows(6, 8, generator), torch.tensor([0, 0, 1, 1, 2, 3])),
        "a class and a single": (unit_rows(4, 8, generator), torch.tensor([5, 5, 9, 5])),
        "identical": (point.expand(6, -1).clone(), torch.tensor([0, 0, 1, 1, 2, 2])),
        "antipodal": (torch.cat([point, point, -point, -point]), torch.tensor([0, 1, 0, 1])),
        "axes": (axes, torch.tensor([0, 1, 1, 0, 0, 1, 2, 2])),
        "grid": (grid.double(), torch.arange(12) % 4),
        "2048 dimensions": (unit_rows(10, 2048, generator), torch.arange(10) % 3),
        # Densities e^14000 apart in one batch: the third class has no antipodal negative.
        "2048, antipodal": (torch.cat([far, -far, unit_rows(4, 2048, generator)]),
                            torch.tensor([0, 1, 0, 1, 2, 2])),
    }


def two_sets():
    """Thirty pairs of unbalanced sets; some classes stand in one of them only."""
    generator, numbers = torch.Generator().manual_seed(4), np.random.default_rng(4)
    for _ in range(30):
        count, others, dim = (int(numbers.integers(1, 9)), int(numbers.integers(1, 13)),
                              int(numbers.choice([2, 3, 16])))
        names = numbers.choice(1000, size=numbers.integers(1, 5), replace=False)
        yield (unit_rows(count, dim, generator), torch.from_numpy(numbers.choice(names, count)),
               unit_rows(others, dim, generator), torch.from_numpy(numbers.choice(names, others)))


def check_triplets(triplets, pairs):
    """One allowed triplet for each anchor that has a pair, none for the others, as LongTensor."""
    assert triplets.dtype == torch.long and triplets.shape == (len(triplets), 3)
    drawn = {a: (p, n) for a, p, n in triplets.tolist()}
    assert len(drawn) == len(triplets), "an anchor came twice"
    assert set(drawn) == {a for a, allowed in enumerate(pairs) if allowed}
    for anchor, pair in drawn.items():
        assert pair in pairs[anchor]


# ---- triplets

@pytest.mark.parametrize("name", VARIANTS)
def test_triplets_satisfy_the_definition(name):
    """Random and degenerate batches; between two sets its own place is no self (rho takes one).

    padded=True: row i is anchor i's triplet, or all -1. Small integers are exact in every type, so
    equal distances must stay equal. All positives: each allowed (anchor, positive) once.
    """
    torch.manual_seed(0)
    variant = VARIANTS[name]
    sampler, corners = Sampler(**variant), corner_batches()
    for embeddings, labels in [*random_batches(), *corners.values()]:
        pairs = eligible_pairs(embeddings, labels, **variant)
        for seed in range(3):
            torch.manual_seed(seed)
            padded = sampler.give(embeddings, labels, padded=True)
            assert padded.dtype == torch.long and padded.shape == (len(labels), 3)
            for anchor, row in enumerate(padded.tolist()):
                assert row[0] == anchor if pairs[anchor] else row == [-1, -1, -1]
            torch.manual_seed(seed)
            triplets = sampler.give(embeddings, labels)
            assert triplets.tolist() == [row for row in padded.tolist() if row[0] >= 0]
            check_triplets(triplets, pairs)
    for embeddings, labels in (corners["axes"], corners["grid"]):
        pairs = eligible_pairs(embeddings, labels, **variant)
        for dtype in [torch.float16, torch.bfloat16, torch.float32] * 3:
            check_triplets(sampler.give(embeddings.to(dtype), labels), pairs)
    sets = [] if sampler.method == "rho" else list(two_sets())
    for given in sets:
        for _ in range(3):
            check_triplets(torch.stack(sampler(*given), 1), eligible_pairs(*given, **variant))
    for given in [*corners.values(), *sets] if sampler.method != "hard" else ():
        pairs = eligible_pairs(*given, **variant)
        drawn = list(zip(*map(torch.Tensor.tolist, Sampler(**variant, positives="all")(*given))))
        assert all((p, n) in pairs[a] for a, p, n in drawn)
        if sampler.method != "rho":
            assert sorted((a, p) for a, p, _ in drawn) == sorted(
                {(a, p) for a, of_anchor in enumerate(pairs) for p, _ in of_anchor})


@pytest.mark.parametrize("name", ["random", "facenet-squared", "facenet-wide", "softhard",
                                  "distance-cutoff", "rho-never", "rho-always-cutoff"])
def test_every_eligible_triplet_can_be_drawn(name):
    """Of a batch and of two sets; in three dimensions no triplet is very rare."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(3)
    sets = (unit_rows(4, 3, generator), torch.tensor([4, 1, 0, 9]),
            unit_rows(6, 3, generator), torch.tensor([4, 1, 4, 0, 1, 2]))
    batch = (unit_rows(9, 3, torch.Generator().manual_seed(3)),
             torch.tensor([4, 1, 4, 0, 1, 2, 4, 1, 0]))
    sampler = Sampler(**VARIANTS[name])
    for given in (batch, sets) if sampler.method != "rho" else (batch,):
        seen = set()
        for _ in range(300):
            seen |= set(map(tuple, torch.stack(sampler(*given), 1).tolist()))
        assert seen == listed(eligible_pairs(*given, **VARIANTS[name]))


def test_semihard_and_facenet_band_by_hand():
    """On a line: anchor 0 at 0, its positive at 1, negatives at 0.9, 1, 1.1, 1.18, 1.25, 1.5.

    facenet with margin 0.3: plain distances in (1, 1.3) are those of 1.1, 1.18 and 1.25; of square
    distances, with the positive at 1, 1.1^2 = 1.21 alone is in (1, 1.3), since 1.18^2 = 1.3924.
    semihard: plain distances in (1, 1.2), whatever the loss's margin and distance are.
    """
    torch.manual_seed(0)
    embeddings = torch.tensor([0, 1, 0.9, 1, 1.1, 1.18, 1.25, 1.5], dtype=torch.float64)[:, None]
    labels = torch.tensor([0, 0, 1, 2, 3, 4, 5, 6])
    for method, squared, expected in (("facenet", False, {4, 5, 6}), ("facenet", True, {4}),
                                      ("semihard", False, {4, 5}), ("semihard", True, {4, 5})):
        sampler = Sampler(method, margin=0.3, squared=squared)
        drawn = {int(sampler.give(embeddings, labels)[0, 2]) for _ in range(60)}
        assert drawn == expected


def test_softhard_and_hard_by_hand():
    """On a line: anchor 0 at 0, positives at 1 and 3, negatives at 2, 2.5 and 4.

    The nearest negative is at 2, so only the positive at 3 is hard; the farthest positive is at 3,
    so the negatives at 2 and 2.5 are hard. hard takes 3 and 2; 2.5 is nearer to 3 than 2.
    """
    torch.manual_seed(0)
    embeddings = torch.tensor([0, 1, 3, 2, 2.5, 4], dtype=torch.float64)[:, None]
    labels = torch.tensor([0, 0, 0, 1, 2, 3])
    drawn = {tuple(Sampler("softhard").give(embeddings, labels)[0].tolist()) for _ in range(60)}
    assert drawn == {(0, 2, 3), (0, 2, 4)}
    triplets = Sampler("hard").give(embeddings, labels)
    assert triplets.tolist() == [[0, 2, 3], [1, 2, 3], [2, 0, 4]]


def test_distance_treats_near_negatives_alike_and_those_beyond_the_cutoff():
    """Below the lower cut-off 0.5 all are at 0.5; where none is nearer than the other, any.

    In 16 dimensions the unclipped weight of the one at 0.1 would be 4^14 that of the one at 0.4.
    """
    torch.manual_seed(0)
    labels = torch.tensor([0, 0, 1, 2, 3])
    for distances, cutoff in (((0.0, 0.1, 0.4), None), ((1.9, 1.95, 2), 1.0)):
        angles = torch.tensor([0, 0, *(2 * math.asin(d / 2) for d in distances)]).double()
        embeddings = F.pad(torch.stack([angles.cos(), angles.sin()], 1), (0, 14))
        sampler = Sampler("distance", distance_cutoff=cutoff)
        drawn = Counter(int(sampler.give(embeddings, labels)[0, 2]) for _ in range(300))
        assert chi_square_ok(drawn, {2: 1 / 3, 3: 1 / 3, 4: 1 / 3}, 300)


@pytest.mark.parametrize("method", samplers.METHODS)
def test_a_sampler_is_a_miner_and_a_module_without_state(method):
    """torch.manual_seed is all the state; the embeddings are not changed.

    Arrays and lists are taken; other libraries' hooks can save it.
    """
    embeddings = unit_rows(24, 8, torch.Generator().manual_seed(0)).requires_grad_()
    before, labels = embeddings.detach().clone(), torch.arange(24) // 4
    sampler = Sampler(method, mining_epsilon=0.3)
    assert not sampler.state_dict() and not list(sampler.parameters())
    assert f"method={method!r}" in repr(sampler) and "mining_epsilon=0.3" in repr(sampler)
    arrays = embeddings.detach().numpy().astype(np.float32), labels.numpy()
    lists = embeddings.tolist(), labels.tolist()  # of float32

    def draw(seed=1, given=(embeddings, labels), sampler=sampler):
        torch.manual_seed(seed)
        return sampler.give(*given)

    triplets = draw()
    assert len(triplets) and not triplets.requires_grad
    assert torch.equal(draw(given=arrays), draw(given=lists))
    assert torch.equal(draw(sampler=pickle.loads(pickle.dumps(sampler))), triplets)
    assert (draw(2).tolist() == triplets.tolist()) == (method in TAKE_ALL)
    assert torch.equal(embeddings, before)
    if method not in ("npair", "rho"):
        assert len(sampler(*lists, *arrays)) == len(sampler(*arrays, *lists)) == 3


def test_non_finite_embeddings_give_indices_of_the_batch():
    """A diverged network must reach the check for a non-finite loss, not an index error."""
    labels = torch.arange(8) // 2
    for rows in (slice(0, 1), slice(None)):
        for bad in (math.nan, math.inf):
            embeddings = unit_rows(8, 4, torch.Generator().manual_seed(0))
            embeddings[rows] = bad
            for variant in VARIANTS.values():
                triplets = Sampler(**variant).give(embeddings, labels, padded=True)
                assert int(triplets.max()) < 8 and int(triplets.min()) >= -1
            # No triplet would be a loss of 0.
            assert (Sampler("multisimilarity").give(embeddings, labels) == 0).any()


# ---- all and multisimilarity: lists

def check_list(triplets, expected):
    """Just the expected set of triplets, each once, as LongTensor [T, 3]."""
    assert triplets.dtype == torch.long and triplets.shape == (len(expected), 3)
    assert set(map(tuple, triplets.tolist())) == expected


def test_all_is_every_triplet_of_the_loop():
    """Random and degenerate batches, padded or not, and two sets; some batches have none."""
    sampler, numbers = Sampler("all"), []
    for given in [*random_batches(), *corner_batches().values(), *two_sets()]:
        expected = listed(eligible_pairs(*given, method="all"))
        check_list(torch.stack(sampler(*given), 1), expected)
        if len(given) == 2:
            check_list(sampler.give(*given, padded=True), expected)
        numbers.append(len(expected))
    assert 0 in numbers and sum(number > 20 for number in numbers) > 20


@pytest.mark.parametrize("epsilon", [0.0, 0.1, 0.7, 2.5])
def test_multisimilarity_takes_just_the_hard_pairs(epsilon):
    """Those of the loop, rows of any length; an easiest pair may tie with its bound ("axes")."""
    sampler, some = Sampler("multisimilarity", mining_epsilon=epsilon), 0
    for embeddings, labels, *others in [*random_batches(), *corner_batches().values(),
                                        *two_sets()]:
        expected = hard_pairs(embeddings, labels, *others, epsilon=epsilon)
        masks = sampler.hard_pairs(3 * embeddings.requires_grad_(), labels, *others)
        for mask, pairs in zip(masks, expected):
            assert mask.dtype == torch.bool and set(map(tuple, mask.nonzero().tolist())) == pairs
        triplets = {(a, p, n) for a, p in expected[0] for b, n in expected[1] if a == b}
        check_list(torch.stack(sampler(embeddings * 7, labels, *others), 1), triplets)
        some += bool(triplets)
    assert some > 20
    embeddings, labels = corner_batches()["axes"]
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        assert (sampler.give(embeddings.to(dtype), labels).tolist()
                == sampler.give(embeddings, labels).tolist())


def test_multisimilarity_by_hand():
    """Anchor 0 at 0 degrees, positives at 30 and 80, negatives at 20, 60 and 85; epsilon 0.1.

    Cosines 0.866 and 0.174; 0.940, 0.5 and 0.087. Negatives above 0.174 - 0.1 = 0.074: all three.
    Positives below 0.940 + 0.1: both. With epsilon 0 the last negative, 0.087, is easy.
    """
    angles = torch.tensor([0, 30, 80, 20, 60, 85], dtype=torch.float64).deg2rad()
    embeddings = torch.stack([angles.cos(), angles.sin()], 1)
    labels = torch.tensor([0, 0, 0, 1, 2, 3])
    for epsilon, negatives in ((0.1, (3, 4, 5)), (0.0, (3, 4))):
        triplets = Sampler("multisimilarity", mining_epsilon=epsilon).give(embeddings, labels)
        own = {(p, n) for a, p, n in triplets.tolist() if a == 0}
        assert own == {(p, n) for p in (1, 2) for n in negatives}


@pytest.mark.parametrize("method", ["all", "multisimilarity"])
def test_a_list_of_triplets_has_a_bound(method, monkeypatch):
    """24 * 3 * 20 triplets, one more than allowed. Of 4,096 rows it is met before 384 GiB."""
    embeddings, labels = torch.zeros(24, 2), torch.arange(24) // 4  # all pairs are hard
    monkeypatch.setattr(samplers, "MOST_TRIPLETS", 1440)
    assert len(Sampler(method).give(embeddings, labels)) == 1440
    monkeypatch.setattr(samplers, "MOST_TRIPLETS", 1439)
    with pytest.raises(ValueError, match="1,440 triplets in a batch of 24.*--bs.*--sampling"):
        Sampler(method).give(embeddings, labels)
    with pytest.raises(ValueError, match="17,171,480,576 triplets"):
        Sampler(method).give(torch.zeros(4096, 2), torch.arange(4096) % 2)


# ---- how often

def chances_by_positive(embeddings, labels, sampler):
    """For each anchor {positive: {(p, n): chance}} of its rows, p the anchor in rho's rows."""
    rows, chances = embeddings.tolist(), []
    pairs = eligible_pairs(embeddings, labels, method=sampler.method, squared=sampler.squared,
                           margin=sampler.margin)
    for a, row in enumerate(rows):
        chances.append({p: {pair: 1 for pair in pairs[a] if pair[0] == p}
                        for p, _ in pairs[a] if p != a})
        for p, drawn in chances[a].items():
            if sampler.method in ("distance", "rho"):
                drawn.update({(p, n): chance for n, chance in distance_probabilities(
                    {n: math.dist(row, rows[n]) for _, n in drawn}, len(row)).items()})
            total = sum(drawn.values())
            share = sampler.rho_probability if sampler.method == "rho" else 0
            chances[a][p] = {pair: chance / total * (1 - share) for pair, chance in drawn.items()}
            chances[a][p].update({(a, p): share} if share else {})
    return chances


@pytest.mark.parametrize("method, positives, dim, dtype", [
    *[(method, positives, 4, torch.float64) for method in samplers.DRAW_NEGATIVES
      for positives in ("one", "all")],
    ("distance", "one", 2, torch.float64), ("distance", "one", 128, torch.float32),
    ("distance", "one", 2048, torch.float16)])
def test_each_positive_draws_its_negative(method, positives, dim, dtype):
    """600 draws: one of the eligible positives, or each once; its negatives by chi-square.

    The negatives of two positives are independent. Classes of 4, 3, 2 and 1 images.
    """
    torch.manual_seed(0)
    labels, draws = torch.tensor([0, 0, 0, 0, 1, 1, 1, 2, 2, 3]), 600
    embeddings = unit_rows(10, dim, torch.Generator().manual_seed(6)).to(dtype)
    sampler = Sampler(method, positives=positives)
    chances = chances_by_positive(embeddings, labels, sampler)
    seen, first_two = [Counter() for _ in labels], Counter()
    for _ in range(draws):
        triplets = sampler.give(embeddings, labels, padded=True).tolist()
        assert positives == "one" or sorted((a, n if p == a else p) for a, p, n in triplets) == [
            (a, p) for a, of_anchor in enumerate(chances) for p in sorted(of_anchor)]
        for a, p, n in triplets:
            if a >= 0:
                seen[a][p, n] += 1
        first_two[tuple(triplets[0][1:] + triplets[1][1:])] += 1
    for counts, of_anchor in zip(seen, chances):
        chance = 1 / len(of_anchor) if positives == "one" and of_anchor else 1
        expected = [{pair: chance * value for pair, value in drawn.items()}
                    for drawn in of_anchor.values()]
        if positives == "one":
            expected = [{pair: value for drawn in expected for pair, value in drawn.items()}]
        assert set(counts) <= {pair for drawn in expected for pair in drawn}
        for drawn in expected:
            if len(drawn) > 1:
                assert chi_square_ok(Counter({pair: counts[pair] for pair in drawn}), drawn, draws)
    one, other = [chances[0][p] for p in sorted(chances[0])][:2]
    if positives == "all" and len(one) * len(other) > 1:
        assert chi_square_ok(first_two, {(*x, *y): one[x] * other[y] for x in one for y in other},
                             draws)


def test_reference_random_draws_every_triplet_equally_often():
    """400 draws of 9 rows: uniform over all triplets of the batch, by chi-square."""
    torch.manual_seed(0)
    labels, seen, draws = torch.tensor([0, 0, 0, 0, 1, 1, 1, 2, 3]), Counter(), 400
    for _ in range(draws):
        triplets = Sampler("random", form="reference").give(torch.zeros(9, 2), labels)
        assert len(triplets) == 9
        seen.update(map(tuple, triplets.tolist()))
    triplets = listed(eligible_pairs(torch.zeros(9, 2), labels, method="random"))
    assert chi_square_ok(seen, {triplet: 1 / len(triplets) for triplet in triplets}, 9 * draws)
    for lone in (torch.zeros(4), torch.arange(4)):  # no negative, no positive
        assert Sampler("random", form="reference").give(torch.zeros(4, 2), lone).shape == (0, 3)


def test_rho_decides_for_each_anchor_by_itself():
    """600 draws: how many of a batch's 8 triplets are replaced is binomial, by chi-square."""
    torch.manual_seed(0)
    labels, draws, share = torch.arange(8) // 4, 600, 0.4
    embeddings = unit_rows(8, 4, torch.Generator().manual_seed(6))
    sampler, numbers = Sampler("rho", rho_probability=share), Counter()
    for _ in range(draws):
        anchors, _, negatives = sampler(embeddings, labels)
        numbers[int((labels[anchors] == labels[negatives]).sum())] += 1
    assert chi_square_ok(numbers, {k: math.comb(8, k) * share ** k * (1 - share) ** (8 - k)
                                   for k in range(9)}, draws)


# ---- n-pair

def test_npair_satisfies_the_definition():
    """One (anchor, positive) of each class with two images, the others' positives as negatives.

    Padded: as many rows as images, all -1 where the image is no anchor of its class.
    """
    for embeddings, labels in [*random_batches(), *corner_batches().values()]:
        torch.manual_seed(0)
        tuples = Sampler("npair").give(embeddings, labels)
        names, rows = labels.tolist(), tuples.tolist()
        paired = [name for name, size in Counter(names).items() if size >= 2]
        paired = paired if len(paired) >= 2 else []           # a lone pair has no negative
        assert tuples.dtype == torch.long
        assert sorted(names[row[0]] for row in rows) == sorted(paired)
        for t, (anchor, positive, *negatives) in enumerate(rows):
            assert anchor != positive and names[anchor] == names[positive]
            assert sorted(negatives) == sorted(row[1] for row in rows[:t] + rows[t + 1:])
        torch.manual_seed(0)
        padded = Sampler("npair").give(embeddings, labels, padded=True).tolist()
        assert [[i for i in row if i >= 0] for row in padded if row[0] >= 0] == rows
        assert len(padded) == len(labels)
        assert {i for row in padded if row[0] < 0 for i in row} <= {-1}


@pytest.mark.parametrize("form, draws", [("paper", 1000), ("reference", 300)])
def test_npair_draws_every_pair_of_a_class_equally_often(form, draws):
    """Each ordered pair of distinct images, by chi-square.

    The reference makes every image an anchor, all images of other classes its negatives.
    """
    torch.manual_seed(0)
    names, seen = [0, 1, 0, 1, 0, 2, 1, 1, 3, 3], [Counter(), Counter(), Counter(), Counter()]
    for _ in range(draws):
        rows = Sampler("npair", form=form).give(torch.zeros(10, 2), torch.tensor(names)).tolist()
        assert form == "paper" or [row[0] for row in rows] == [0, 1, 2, 3, 4, 6, 7, 8, 9]
        for a, p, *negatives in rows:
            seen[names[a]][a, p] += 1
            assert form == "paper" or sorted(set(negatives) - {-1}) == [
                n for n in range(10) if names[n] != names[a]]
    for name in (0, 1, 3):
        images = [i for i in range(10) if names[i] == name]
        pairs = [(a, p) for a in images for p in images if a != p]
        assert chi_square_ok(seen[name], {pair: 1 / len(pairs) for pair in pairs},
                             draws * (1 if form == "paper" else len(images)))
    lone = Sampler("npair", form=form).give(torch.zeros(4, 2), torch.zeros(4))  # no negatives
    assert len(lone) == 0


# ---- a user's own method, wrong options, flags

class OwnSampler(Sampler):
    """Each positive with the image `step` further on, as a plain list."""

    def neighbour(self, embeddings, labels, step=1):
        assert not torch.is_grad_enabled()
        names = labels.tolist()
        return [(a, p, n) for a in range(len(names)) for p in range(len(names))
                for n in [(a + step) % len(names)]
                if a != p and names[a] == names[p] and names[n] != names[a]]


def test_own_method_may_return_a_list_of_tuples(monkeypatch):
    """A method and its name in METHODS suffice; its arguments pass."""
    monkeypatch.setattr(samplers, "METHODS", (*samplers.METHODS, "neighbour"))
    sampler, given = OwnSampler("neighbour"), (torch.zeros(4, 2), torch.tensor([0, 0, 1, 1]))
    assert sampler.give(*given).tolist() == [[1, 0, 2], [3, 2, 0]]
    assert sampler.give(*given, padded=True, step=2).shape == (4, 3)
    empty = sampler.give(torch.zeros(4, 2), torch.zeros(4))
    assert empty.dtype == torch.long and empty.shape == (0, 3)


@pytest.mark.parametrize("options, says", [
    ({"method": "give"}, "--sampling"),
    ({"method": "semihard", "margin": -0.1}, "--margin -0.1"),
    ({"form": "code"}, "--form code: it takes paper or reference"),
    ({"method": "random", "positives": "all", "form": "reference"}, "--positives all"),
    ({"method": "distance", "distance_cutoff": 0.5}, "--distance_cutoff 0.5"),
    ({"method": "rho", "rho_probability": 1.1}, "--rho_probability 1.1"),
    ({"method": "rho", "rho_probability": math.nan}, "--rho_probability nan"),
    ({"method": "distance", "positives": "two"}, "--positives two"),
    ({"method": "hard", "positives": "all"}, "--positives all with --sampling hard"),
    ({"method": "multisimilarity", "mining_epsilon": -0.1}, "--mining_epsilon -0.1")])
def test_wrong_sampler_options_name_the_flag(options, says):
    with pytest.raises(ValueError, match=says):
        Sampler(**options)


def test_npair_and_rho_are_no_miners_of_all_kinds():
    rows, labels = torch.randn(8, 3), torch.arange(8) % 4
    with pytest.raises(ValueError, match="rho takes anchors as positives"):
        Sampler("rho")(rows, labels, rows, labels)
    with pytest.raises(ValueError, match="npair is no miner"):
        Sampler("npair")(rows, labels)


def test_flags_and_constructors_share_their_defaults():
    parser = argparse.ArgumentParser()
    samplers.add_arguments(parser)
    batch = inspect.signature(ClassBalancedBatchSampler).parameters
    assert parser.get_default("bs") == batch["batch_size"].default == 112
    assert parser.parse_args(["--batch_size", "8"]).bs == 8
    defaults = {"margin": 0.2, "distance_cutoff": None, "mining_epsilon": 0.1,
                "rho_probability": 0.3, "positives": "one", "form": "paper"}
    given = dict(margin=0.5, distance_cutoff=1.0, mining_epsilon=0.2, rho_probability=0.4,
                 positives="all", form="reference")
    default, changed = vars(Sampler("distance")), vars(Sampler("distance", **given))
    for name, value in defaults.items():
        assert default[name] == value and changed[name] == given[name]
        if name not in ("margin", "form"):  # flags of losses.py
            assert parser.get_default(name) == value


# ---- the two helpers

def test_pairwise_sq_distances():
    """Against a loop; long vectors' from themselves, which round to either side of zero."""
    generator = torch.Generator().manual_seed(0)
    for rows, columns in ((5, None), (4, 7)):
        left = torch.randn(rows, 6, dtype=torch.float64, generator=generator)
        right = columns and torch.randn(columns, 6, dtype=torch.float64, generator=generator)
        expected = [[math.dist(x, y) ** 2 for y in (left if right is None else right).tolist()]
                    for x in left.tolist()]
        torch.testing.assert_close(samplers.pairwise_sq_distances(left, right),
                                   torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-12)
    rows = torch.randn(200, 512, generator=generator) * 10
    assert samplers.pairwise_sq_distances(rows).min().item() >= 0


def test_draw_columns_never_takes_a_zero_weight(monkeypatch):
    """Zeros in front, behind and between, weights from 1e-30 to 1e30, a row of zeros.

    The smallest and the largest float32 that torch.rand gives pick the outermost weights.
    """
    torch.manual_seed(0)
    weights = torch.tensor([[0, 0, 1, 0, 2, 0], [1e-30, 0, 0, 0, 0, 0], [0] * 6,
                            [0, 1e30, 0, 1e30, 0, 0], [0, 0, 0, 0, 0, 1], [1e-30, 0, 1, 0, 0, 0]])
    for dtype in (torch.float32, torch.float64):
        drawn = torch.stack([samplers.draw_columns(weights.to(dtype)) for _ in range(300)], 1)
        assert [set(row) for row in drawn.tolist()] == [{2, 4}, {0}, {-1}, {1, 3}, {5}, {2}]
    weights = torch.tensor([[0, 0, 1, 0, 2, 0], [0.3, 0.7, 0, 0, 0, 0], [0] * 6])
    for uniform, expected in ((0, [2, 0, -1]), (1 - 2 ** -24, [4, 1, -1])):
        monkeypatch.setattr(torch, "rand",
                            lambda *size, **kind: torch.full(size, uniform, **kind))
        assert samplers.draw_columns(weights).tolist() == expected


# ---- class-balanced batches

def check_balanced_epoch(batches, labels, batch_size, samples_per_class):
    """Distinct classes, equal shares, distinct images or repeats as even as possible."""
    sizes = Counter(labels)
    for batch in batches:
        assert len(batch) == batch_size and all(type(i) is int for i in batch)
        members = {}
        for i in batch:
            members.setdefault(labels[i], []).append(i)
        assert len(members) == batch_size // samples_per_class
        for name, images in members.items():
            least, rest = divmod(samples_per_class, min(sizes[name], samples_per_class))
            uses = Counter(images).values()
            assert len(uses) == min(sizes[name], samples_per_class)
            assert sorted(uses, reverse=True) == [least + (k < rest) for k in range(len(uses))]


def random_datasets():
    """100 datasets: (labels, batch_size, samples_per_class); some have one dominating class."""
    numbers = np.random.default_rng(11)
    for trial in range(100):
        num_classes = int(numbers.integers(1, 25))
        sizes = numbers.integers(1, int(numbers.choice([3, 6, 40])), size=num_classes)
        if trial % 4 == 0:
            sizes[numbers.integers(num_classes)] += int(numbers.choice([50, 400]))
        labels = numbers.permutation(np.repeat(numbers.permutation(num_classes) * 3 + 5, sizes))
        samples_per_class = int(numbers.integers(1, 7))
        classes = int(numbers.integers(1, num_classes + 1))
        yield labels.tolist(), classes * samples_per_class, samples_per_class


def test_balanced_batches_keep_their_promises_on_100_random_datasets():
    """Lengths, classes and images of two epochs; the second epoch differs where it can."""
    for labels, batch_size, samples_per_class in random_datasets():
        sampler = ClassBalancedBatchSampler(labels, batch_size, samples_per_class, seed=3)
        epochs = []
        for epoch in (0, 1):
            sampler.set_epoch(epoch)
            epochs.append(list(sampler))
            assert len(epochs[-1]) == len(sampler) == max(1, len(labels) // batch_size)
            check_balanced_epoch(epochs[-1], labels, batch_size, samples_per_class)
        if len(labels) >= 20 and len(set(labels)) > 1:
            assert epochs[0] != epochs[1]


def test_balanced_epoch_draws_each_image_once_when_all_fits():
    """Classes of 8, 12 and 4 images, 4 a class, batches of 12: an epoch is a permutation."""
    labels = np.repeat(np.arange(6), [8, 8, 12, 4, 8, 8])
    sampler = ClassBalancedBatchSampler(labels, 12, 4)
    for epoch in range(20):
        sampler.set_epoch(epoch)
        assert sorted(i for batch in sampler for i in batch) == list(range(48))


def fair_draws(sizes, batch_size, samples_per_class):
    """Draws per image and epoch in each class, as even as "once in a batch" lets them be.

    A class can give samples_per_class images to each batch at most. Those for which this binds
    give just that; the rest of the places is shared by the images of the other classes alike.
    """
    batches = max(1, sum(sizes) // batch_size)
    most, places = batches * samples_per_class, batches * batch_size
    draws, free = {}, set(range(len(sizes)))
    while True:
        share = places / sum(sizes[c] for c in free) if free else 0
        full = {c for c in free if share * sizes[c] > most}
        if not full:
            return [draws.get(c, share) for c in range(len(sizes))]
        for c in full:
            draws[c] = most / sizes[c]
            places -= most
        free -= full


@pytest.mark.parametrize("sizes,batch_size,samples_per_class,epochs", [
    ([1, 2, 3, 5, 7, 9, 11, 30, 40], 12, 4, 800),
    ([300, 300, 20, 5], 12, 4, 60),
    ([50, 2, 2, 2, 2], 10, 2, 800),
], ids=str)
def test_images_are_drawn_equally_often(sizes, batch_size, samples_per_class, epochs):
    """Mean draws per image over many epochs against the fairest shares: 10 % and the noise."""
    labels = np.repeat(np.arange(len(sizes)), sizes)
    sampler = ClassBalancedBatchSampler(labels, batch_size, samples_per_class)
    draws = np.zeros((epochs, len(labels)))
    for epoch in range(epochs):
        sampler.set_epoch(epoch)
        draws[epoch] = np.bincount(np.concatenate(list(sampler)), minlength=len(labels))
    fair = np.repeat(fair_draws(sizes, batch_size, samples_per_class), sizes)
    noise = draws.std(0) / math.sqrt(epochs)
    off = np.abs(draws.mean(0) - fair) - 6 * noise - 0.1 * fair
    assert off.max() <= 0, {c: (draws.mean(0)[labels == c].mean(), fair[labels == c][0])
                            for c in range(len(sizes))}


@pytest.mark.parametrize("make, says", [
    (lambda: ClassBalancedBatchSampler([0, 0, 1, 1, 2, 2], 10, 4),
     "--bs 10 .*--samples_per_class 4"),
    (lambda: ClassBalancedBatchSampler([0, 0, 1, 1, 2, 2], 0, 4), "--bs 0"),
    (lambda: ClassBalancedBatchSampler([0, 0, 1, 1, 2, 2], 4, 0), "--samples_per_class 0"),
    (lambda: ClassBalancedBatchSampler([0, 0, 1, 1, 2, 2], 16, 4),
     "needs 4 classes; .* has 3: use --bs 12 .*--samples_per_class"),
    (lambda: ReplacementBatchSampler([0, 1, 2], 8, 4, spacing=3), "3 classes; --batch_draw"),
    (lambda: ShuffledBatchSampler(10, 0), "--bs 0"),
    (lambda: ShuffledBatchSampler(10, 11), "--bs 11")])
def test_batch_samplers_refuse_sizes_and_name_the_flags(make, says):
    with pytest.raises(ValueError, match=says):
        make()


# ---- batches with replacement

@pytest.mark.parametrize("samples_per_class,spacing,distinct", [
    (4, 2, 25.0),  # the reference code's: 25.01 +- 0.04 in 1,040 batches of its own
    (2, 0, 43.0),  # 100 (1 - 0.99^56); the code of Roth et al. 2020: 43.12 +- 0.08
])
def test_replacement_has_the_figures_of_the_published_runs(samples_per_class, spacing, distinct):
    """Distinct classes in a batch of 112, of CUB200-2011's 100 training classes."""
    labels = np.repeat(np.arange(100), [41, 44, 45, 48, 50] + [59] * 64 + [60] * 31)
    sampler = ReplacementBatchSampler(labels, 112, samples_per_class, spacing=spacing)
    classes = [len(set(labels[batch])) for _ in range(10) for batch in sampler]
    assert len(classes) == 10 * 52 and np.mean(classes) == pytest.approx(distinct, abs=0.25)


@pytest.mark.parametrize("spacing", [0, 2])
def test_replacement_draws_classes_and_images_alike(spacing):
    """2,000 batches of 6 groups of the 5 classes: counts, and a group's successor.

    Chi-square: the first class of a batch, each class after each other (after itself as often as
    after another, or never), the ordered pairs of images of a group.
    """
    sizes, batches = [1, 2, 3, 4, 30], 2000
    labels = np.repeat(np.arange(5), sizes)
    sampler = ReplacementBatchSampler(labels, 12, 2, seed=4, spacing=spacing)
    sampler.num_batches = batches
    first, following, pairs = Counter(), Counter(), Counter()
    for batch in sampler:
        classes = labels[batch[::2]].tolist()
        assert spacing == 0 or all(a not in classes[i + 1:i + 3] for i, a in enumerate(classes))
        first[classes[0]] += 1
        following[tuple(classes[:2])] += 1
        pairs.update((a, b) for a, b in zip(batch[::2], batch[1::2]) if labels[a] == 3)
    assert chi_square_ok(first, {c: 1 / 5 for c in range(5)}, batches)
    chances = {(a, b): 1 for a in range(5) for b in range(5) if a != b or not spacing}
    assert chi_square_ok(following, {pair: 1 / len(chances) for pair in chances}, batches)
    assert chi_square_ok(pairs, {(a, b): 1 / 16 for a in range(6, 10) for b in range(6, 10)},
                         pairs.total())


# ---- all batch samplers

every_batch_sampler = pytest.mark.parametrize("make", [
    lambda seed=4: ClassBalancedBatchSampler(np.arange(40) // 5, 8, 2, seed=seed),
    lambda seed=4: ReplacementBatchSampler(np.arange(40) // 5, 8, 2, seed=seed, spacing=2),
    lambda seed=4: ShuffledBatchSampler(40, 8, seed=seed),
], ids=["balanced", "replacement", "shuffled"])


@every_batch_sampler
def test_batches_depend_on_seed_and_epoch_alone(make):
    """After other epochs and under other global seeds too; skip leaves out the first ones."""
    expected = []
    for epoch in range(3):
        sampler = make()
        sampler.set_epoch(epoch)
        expected.append(list(sampler))
    torch.manual_seed(9)
    np.random.seed(9)
    sampler = make()
    assert [list(sampler) for _ in range(3)] == expected  # without set_epoch
    assert len({str(epoch) for epoch in expected}) == 3 and list(make(seed=5)) != expected[0]
    for epoch, skip in ((2, 3), (0, 1), (1, 5)):
        sampler.set_epoch(epoch)
        sampler.skip = skip
        assert list(sampler) == expected[epoch][skip:]
        assert all(type(i) is int for batch in expected[epoch] for i in batch)
        assert len(sampler) == len(list(sampler)) == 5  # once only


# ---- shuffled batches

def test_shuffled_batches_keep_their_promises():
    """Each image at most once an epoch, full batches only, whatever the sizes."""
    numbers = np.random.default_rng(2)
    for _ in range(100):
        num_images = int(numbers.integers(1, 200))
        batch_size = int(numbers.integers(1, num_images + 1))
        sampler = ShuffledBatchSampler(num_images, batch_size)
        batches = list(sampler)
        assert len(batches) == len(sampler) == num_images // batch_size
        assert all(len(batch) == batch_size for batch in batches)
        drawn = [i for batch in batches for i in batch]
        assert len(set(drawn)) == len(drawn) and set(drawn) <= set(range(num_images))


def test_shuffled_batches_leave_no_image_out_for_long():
    """The images dropped at the end of an epoch differ, so 400 epochs draw each about alike."""
    sampler, draws = ShuffledBatchSampler(11, 4), np.zeros(11)
    for epoch in range(400):
        sampler.set_epoch(epoch)
        draws += np.bincount(np.concatenate(list(sampler)), minlength=11)
    # Binomial with 400 trials of probability 8/11: standard deviation 8.9.
    assert np.abs(draws - 400 * 8 / 11).max() < 6 * 8.9


def test_batch_sampler_select_follows_the_options():
    options = types.SimpleNamespace(bs=4, samples_per_class=2, seed=9, batch_draw="distinct")
    for kind, draw, per_class, own in (
            (ClassBalancedBatchSampler, "distinct", 2, {"samples_per_class": 2}),
            (ShuffledBatchSampler, "distinct", 1, {"num_images": 6}),
            (ReplacementBatchSampler, "replacement", 1, {"samples_per_class": 1, "spacing": 0}),
            (ReplacementBatchSampler, "spaced_replacement", 2, {"spacing": 2})):
        options.batch_draw, options.samples_per_class = draw, per_class
        sampler = samplers.batch_sampler_select([0, 0, 1, 1, 2, 2], options)
        assert type(sampler) is kind
        assert vars(sampler).items() >= {"batch_size": 4, "seed": 9, **own}.items()
