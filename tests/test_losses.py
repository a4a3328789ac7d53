"""The losses against their equations, written as loops over tuples and classes in float64.

Values and gradients are compared on given tuples and on the loss's own sampling, whose draw is
repeated under the same seed. Then invariances, number types, degenerate batches, and the table
that --loss reads.
"""

import argparse
import inspect
import math

import pytest
import torch
import torch.nn.functional as F

import losses
import samplers
from losses import (LOSSES, ArcFaceLoss, CrossEntropyLoss, MarginLoss, NPairLoss, ProxyNCALoss,
                    TripletLoss, loss_select)

NUM_CLASSES, DIM = 4, 6


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """The tensors are tiny: waiting for a second thread would cost more than it brings."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# ---- oracles: one loop each, tuples as lists of ints

def triplet_oracle(loss, embeddings, labels, tuples):
    """1/T sum max(0, |a - p|^2 - |a - n|^2 + margin)"""
    terms = []
    for a, p, n in tuples:
        sq_ap = ((embeddings[a] - embeddings[p]) ** 2).sum()
        sq_an = ((embeddings[a] - embeddings[n]) ** 2).sum()
        terms.append((sq_ap - sq_an + loss.margin).clamp(min=0))
    return sum(terms) / len(terms)


def margin_oracle(loss, embeddings, labels, tuples):
    """(sum [|a - p| - beta + margin]+ + [beta - |a - n| + margin]+) / (terms > 0) + nu sum beta"""
    terms, betas = [], []
    for a, p, n in tuples:
        beta = loss.beta[int(labels[a])]
        terms.append(((embeddings[a] - embeddings[p]).norm() - beta + loss.margin).clamp(min=0))
        terms.append((beta - (embeddings[a] - embeddings[n]).norm() + loss.margin).clamp(min=0))
        betas.append(beta)
    active = sum(term.item() > 0 for term in terms)
    return sum(terms) / max(active, 1) + loss.nu * sum(betas)


def npair_oracle(loss, embeddings, labels, tuples):
    """1/T sum log(1 + sum_n exp(a.n - a.p)) + l2npair (|a|^2 + |p|^2)"""
    terms = []
    for a, p, *negatives in tuples:
        anchor, positive = embeddings[a], embeddings[p]
        inner = sum(torch.exp(anchor @ embeddings[n] - anchor @ positive) for n in negatives)
        terms.append(torch.log(1 + inner) + loss.l2npair * (anchor @ anchor + positive @ positive))
    return sum(terms) / len(terms)


def proxynca_oracle(loss, embeddings, labels, tuples=None):
    """mean of -log exp(-d(x, p_y)) / sum_z exp(-d(x, p_z)), d = |3 x/|x| - 3 p/|p||^2, z != y"""
    terms = []
    for i in range(len(labels)) if tuples is None else [row[0] for row in tuples]:
        exps = [torch.exp(-((3 * embeddings[i] / embeddings[i].norm()
                             - 3 * proxy / proxy.norm()) ** 2).sum()) for proxy in loss.proxies]
        own = int(labels[i])
        others = [e for z, e in enumerate(exps) if z != own or loss.positive_in_denominator]
        terms.append(-torch.log(exps[own] / sum(others)))
    return sum(terms) / len(terms)


def crossentropy_oracle(loss, embeddings, labels, tuples=None):
    """mean of -log exp(w_y.x + b_y) / sum_z exp(w_z.x + b_z)"""
    terms = []
    for i in range(len(labels)) if tuples is None else [row[0] for row in tuples]:
        exps = [torch.exp(weight @ embeddings[i] + bias) for weight, bias
                in zip(loss.classifier.weight, loss.classifier.bias)]
        terms.append(-torch.log(exps[int(labels[i])] / sum(exps)))
    return sum(terms) / len(terms)


def arcface_oracle(loss, embeddings, labels, tuples=None):
    """mean of -log e^(s cos(theta_y + m)) / (itself + sum of e^(s cos theta_z), z != y)

    theta: the angle to a class weight. Where theta_y + m > pi: s (cos theta_y - m sin m) instead.
    """
    terms, s, m = [], loss.scale, loss.margin
    for i in range(len(labels)) if tuples is None else [row[0] for row in tuples]:
        angles = [torch.acos(embeddings[i] @ weight / embeddings[i].norm() / weight.norm())
                  for weight in loss.weight]
        own = int(labels[i])
        beyond = angles[own].item() + m > math.pi
        logits = [s * torch.cos(angle) for angle in angles]
        logits[own] = (s * (torch.cos(angles[own]) - m * math.sin(m)) if beyond else
                       s * torch.cos(angles[own] + m))
        terms.append(torch.logsumexp(torch.stack(logits), 0) - logits[own])
    return sum(terms) / len(terms)


ORACLES = {TripletLoss: triplet_oracle, MarginLoss: margin_oracle, NPairLoss: npair_oracle,
           ProxyNCALoss: proxynca_oracle, CrossEntropyLoss: crossentropy_oracle,
           ArcFaceLoss: arcface_oracle}

# The losses that the tests go through: the name, the class and its options.
VARIANTS = {
    "triplet": (TripletLoss, {"margin": 0.5}),
    "triplet-random": (TripletLoss, {"margin": 0.9, "sampling": "random"}),
    "triplet-semihard": (TripletLoss, {"sampling": "semihard"}),
    "triplet-softhard": (TripletLoss, {"sampling": "softhard"}),
    "triplet-cutoff": (TripletLoss, {"distance_cutoff": 1.2}),
    "triplet-multisimilarity": (TripletLoss, {"sampling": "multisimilarity"}),
    "margin": (MarginLoss, {}),
    "margin-nu": (MarginLoss, {"nu": 0.3, "beta": 0.9, "margin": 0.4}),
    "margin-constant": (MarginLoss, {"beta_constant": True, "nu": 0.1, "sampling": "random"}),
    "margin-semihard": (MarginLoss, {"sampling": "semihard", "beta": 1.0}),
    "margin-softhard": (MarginLoss, {"sampling": "softhard"}),
    "margin-multisimilarity": (MarginLoss, {"sampling": "multisimilarity",
                                            "mining_epsilon": 0.3}),
    "npair": (NPairLoss, {}),
    "npair-l2": (NPairLoss, {"l2npair": 0.7}),
    "proxynca": (ProxyNCALoss, {}),
    "proxynca-positive": (ProxyNCALoss, {"proxynca_positive_in_denominator": True}),
    "crossentropy": (CrossEntropyLoss, {}),
    "arcface": (ArcFaceLoss, {}),
    "arcface-wide": (ArcFaceLoss, {"arcface_scale": 4.0, "arcface_margin": 2.0}),
    "arcface-distance": (ArcFaceLoss, {"arcface_scale": 8.0, "sampling": "distance"}),
    "arcface-multisimilarity": (ArcFaceLoss, {"sampling": "multisimilarity"}),
}
variants = pytest.mark.parametrize("variant", VARIANTS)
ONE_OF_EACH = ("triplet", "margin-nu", "npair", "proxynca", "proxynca-positive", "crossentropy",
               "arcface", "arcface-wide")
TUPLE_LOSSES = ("triplet", "margin-nu", "npair")
one_of_each = pytest.mark.parametrize("variant", ONE_OF_EACH)
tuple_losses = pytest.mark.parametrize("variant", TUPLE_LOSSES)


def build(variant, num_classes=NUM_CLASSES, dim=DIM, dtype=torch.float64):
    """The loss of VARIANTS with weights from a fixed seed; betas differ from class to class."""
    loss_class, options = VARIANTS[variant]
    sizes = {"num_classes": num_classes, "embed_dim": dim}
    names = inspect.signature(loss_class).parameters
    with torch.random.fork_rng():
        torch.manual_seed(1)
        loss = loss_class(**options, **{k: v for k, v in sizes.items() if k in names})
        if loss_class is MarginLoss:
            loss.beta.data += 0.2 * torch.rand(num_classes) - 0.1
    return loss.to(dtype)


def make_batch(variant="triplet", count=12, dim=DIM, num_classes=NUM_CLASSES, seed=0):
    """Embeddings [count, dim], float64 with a gradient, unit-norm where the loss wants it; labels.

    Every class comes count / num_classes times, in shuffled order.
    """
    generator = torch.Generator().manual_seed(seed)
    embeddings = torch.randn(count, dim, dtype=torch.float64, generator=generator)
    if VARIANTS[variant][0].unit_norm:
        embeddings = F.normalize(embeddings, dim=1)
    labels = torch.arange(count) % num_classes
    return embeddings.requires_grad_(), labels[torch.randperm(count, generator=generator)]


def all_triplets(labels):
    """Every (anchor, positive, negative) of the batch, as lists."""
    names = labels.tolist()
    return [[a, p, n] for a in range(len(names)) for p in range(len(names))
            for n in range(len(names)) if a != p and names[a] == names[p] != names[n]]


def some_triplets(labels, count=10, seed=0):
    """`count` of them at random: anchors repeat, or stay out."""
    triplets = all_triplets(labels)
    order = torch.randperm(len(triplets), generator=torch.Generator().manual_seed(seed))
    return [triplets[i] for i in order[:count].tolist()]


def gradients(value, loss, embeddings):
    """Gradients with respect to the embeddings and the loss's own weights; None as zero."""
    inputs = [embeddings, *loss.parameters()]
    found = torch.autograd.grad(value, inputs, allow_unused=True, retain_graph=True)
    return [torch.zeros_like(x) if g is None else g for x, g in zip(inputs, found)]


def assert_same(loss, embeddings, actual, expected):
    """Values and gradients of two float64 scalars agree to ten digits."""
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)
    for ours, theirs in zip(gradients(actual, loss, embeddings),
                            gradients(expected, loss, embeddings)):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)


def samples(loss):
    """Whether the loss draws its own tuples."""
    return getattr(loss, "sampler", None) is not None


# ---- values and gradients

@variants
@pytest.mark.parametrize("seed", range(3))
def test_given_tuples_against_the_oracle(variant, seed):
    """Ten of the batch's triplets, value and gradients."""
    loss, (embeddings, labels) = build(variant), make_batch(variant, seed=seed)
    triplets = some_triplets(labels, seed=seed)
    expected = ORACLES[type(loss)](loss, embeddings, labels, triplets)
    assert expected.item() != 0
    assert_same(loss, embeddings, loss(embeddings, labels, torch.tensor(triplets)), expected)


@variants
@pytest.mark.parametrize("seed", range(3))
def test_own_sampling_against_the_oracle(variant, seed):
    """The tuples of the loss's sampler, drawn beforehand under the same seed, feed the oracle.

    Two images are made singles of a class, which the sampler leaves out.
    """
    loss, (embeddings, labels) = build(variant, num_classes=6), make_batch(variant, seed=seed)
    labels[:2] = torch.tensor([4, 5])
    tuples = None
    if samples(loss):
        torch.manual_seed(seed)
        tuples = loss.sampler.give(embeddings, labels).tolist()
        assert len(tuples) > 0 and not {0, 1} & {row[0] for row in tuples}
    expected = ORACLES[type(loss)](loss, embeddings, labels, tuples)
    torch.manual_seed(seed)
    assert_same(loss, embeddings, loss(embeddings, labels), expected)


@variants
@pytest.mark.parametrize("classes", [2, 4])
def test_many_tuples_against_the_oracle(variant, classes):
    """All triplets of a batch, more than four for each image: the matrix of all pairs is used."""
    loss, (embeddings, labels) = build(variant), make_batch(variant, num_classes=classes)
    triplets = all_triplets(labels)
    assert len(triplets) > 4 * len(labels)
    expected = ORACLES[type(loss)](loss, embeddings, labels, triplets)
    assert_same(loss, embeddings, loss(embeddings, labels, torch.tensor(triplets)), expected)


@pytest.mark.parametrize("variant", ["triplet", "npair", "proxynca", "crossentropy", "arcface"])
def test_many_tuples_are_the_mean_of_few(variant):
    """For the losses that are plain means, all triplets at once agree with blocks of twelve."""
    loss, (embeddings, labels) = build(variant), make_batch(variant)
    triplets = torch.tensor(all_triplets(labels))
    blocks = triplets.split(12)
    assert len(triplets) % 12 == 0 and len(blocks) > 4
    few = sum(loss(embeddings, labels, block) for block in blocks) / len(blocks)
    assert_same(loss, embeddings, loss(embeddings, labels, triplets), few)


@one_of_each
@pytest.mark.parametrize("many", [False, True])
def test_gradcheck(variant, many):
    """Numerical derivatives in float64, for the embeddings and the loss's own weights."""
    loss, (embeddings, labels) = build(variant), make_batch(variant, num_classes=3, count=9)
    triplets = torch.tensor(all_triplets(labels) if many else some_triplets(labels, 5))
    names = [name for name, _ in loss.named_parameters()]

    def function(rows, *weights):
        own = dict(zip(names, weights))
        return torch.func.functional_call(loss, own, (rows, labels, triplets))

    assert torch.autograd.gradcheck(function, (embeddings, *loss.parameters()))


# The points of the numbers by hand: unit vectors, with squared distances from the first
# 0.8 to the second, 2 to the third, 4 to the fourth.
HAND = torch.tensor([[1, 0], [0.6, 0.8], [0, 1], [-1, 0]], dtype=torch.float64)


def test_triplet_by_hand():
    """Triplets (0, 2, 3) and (0, 2, 1), margin 0.2.

    max(0, 2 - 4 + 0.2) = 0 and max(0, 2 - 0.8 + 0.2) = 1.4, of which the mean is 0.7.
    """
    value = TripletLoss(margin=0.2)(HAND, torch.tensor([0, 1, 0, 1]), [(0, 2, 3), (0, 2, 1)])
    assert value.item() == pytest.approx(0.7, abs=1e-12)


@pytest.mark.parametrize("nu", [0.0, 0.5])
def test_margin_by_hand(nu):
    """Triplets (0, 2, 3) and (0, 2, 1), margin 0.2, beta 1.2.

    Positives: sqrt 2 - 1.2 + 0.2 = 0.414214 twice. Negatives: 1.2 - 2 + 0.2 < 0, not active, and
    1.2 - sqrt 0.8 + 0.2 = 0.505573. Three active terms: (0.828427 + 0.505573) / 3 = 0.444667.
    Two tuples: nu (1.2 + 1.2).
    """
    loss = MarginLoss(2, margin=0.2, beta=1.2, nu=nu).double()
    value = loss(HAND, torch.tensor([0, 1, 0, 1]), [(0, 2, 3), (0, 2, 1)])
    assert value.item() == pytest.approx(0.4446667 + nu * 2.4, abs=1e-6)


def test_npair_by_hand():
    """Class 0: a = (1, 0), p = (2, 0); class 1: a = (0, 1), p = (0, 1); l2npair 0.02.

    Class 0: n = (0, 1), a.n - a.p = 0 - 2, log(1 + e^-2) = 0.126928, |a|^2 + |p|^2 = 5.
    Class 1: n = (2, 0), a.n - a.p = 0 - 1, log(1 + e^-1) = 0.313262, |a|^2 + |p|^2 = 2.
    Mean 0.220095 + 0.02 x 3.5 = 0.290095.
    """
    embeddings = torch.tensor([[1, 0], [2, 0], [0, 1], [0, 1]], dtype=torch.float64)
    value = NPairLoss(0.02)(embeddings, torch.tensor([0, 0, 1, 1]), [(0, 1, 3), (2, 3, 1)])
    assert value.item() == pytest.approx(0.290095, abs=1e-6)


@pytest.mark.parametrize("positive,expected", [(False, -18 + 1.5e-8), (True, 1.5e-8)])
def test_proxynca_by_hand(positive, expected):
    """x = (5, 0) becomes (3, 0); proxies (3, 0) its own, (-3, 0) and (0, 3): d = 0, 36 and 18.

    Without its own: -log(e^0 / (e^-36 + e^-18)) = -18 + log(1 + e^-18), a negative loss. With it:
    log(1 + e^-18 + e^-36) = 1.5e-8.
    """
    loss = ProxyNCALoss(3, 2, proxynca_positive_in_denominator=positive).double()
    loss.proxies.data = torch.tensor([[2, 0], [-1, 0], [0, 7]], dtype=torch.float64)
    value = loss(torch.tensor([[5, 0]], dtype=torch.float64), torch.tensor([0]))
    assert value.item() == pytest.approx(expected, abs=1e-9)


def test_crossentropy_by_hand():
    """Logits 1 and 1 + 0.5, first class: log(1 + e^0.5) = 0.974077."""
    loss = CrossEntropyLoss(2, 2).double()
    loss.classifier.weight.data = torch.eye(2, dtype=torch.float64)
    loss.classifier.bias.data = torch.tensor([0, 0.5], dtype=torch.float64)
    value = loss(torch.tensor([[1, 1]], dtype=torch.float64), torch.tensor([0]))
    assert value.item() == pytest.approx(0.974077, abs=1e-6)


def test_arcface_by_hand():
    """s = 2, m = pi / 6; x at 60 degrees from its own weight and at 30 from the other.

    Own logit 2 cos 90 = 0, the other 2 cos 30 = sqrt 3: log(1 + e^1.732051) = 1.894953.
    Class 1 instead: own logit 2 cos 60 = 1, the other 2 cos 60 = 1: log 2.
    """
    loss = ArcFaceLoss(2, 2, arcface_scale=2.0, arcface_margin=math.pi / 6).double()
    loss.weight.data = torch.tensor([[3, 0], [0, 0.5]], dtype=torch.float64)
    embeddings = torch.tensor([[0.5, math.sqrt(0.75)]], dtype=torch.float64)
    assert loss(embeddings, torch.tensor([0])).item() == pytest.approx(1.894953, abs=1e-6)
    assert loss(embeddings, torch.tensor([1])).item() == pytest.approx(math.log(2), abs=1e-9)


def test_arcface_beyond_pi_by_hand():
    """s = 1, m = 1; x opposite to its own weight, at right angles to the other.

    theta + m = pi + 1, so the own logit is cos pi - 1 sin 1 = -1.841471, the other 0:
    log(1 + e^1.841471) = 1.988670.
    """
    loss = ArcFaceLoss(2, 2, arcface_scale=1.0, arcface_margin=1.0).double()
    loss.weight.data = torch.eye(2, dtype=torch.float64)
    value = loss(torch.tensor([[-1, 0]], dtype=torch.float64), torch.tensor([0]))
    assert value.item() == pytest.approx(1.988670, abs=1e-6)


# ---- invariances

@one_of_each
def test_order_of_the_batch_does_not_matter(variant):
    """Images, labels and tuple indices permuted together: same value, gradients permuted alike."""
    loss, (embeddings, labels) = build(variant), make_batch(variant)
    triplets = torch.tensor(some_triplets(labels))
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(3))
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order))               # where each image went
    moved = loss(embeddings[order], labels[order], place[triplets])
    assert_same(loss, embeddings, moved, loss(embeddings, labels, triplets))


@one_of_each
def test_names_of_the_classes_do_not_matter(variant):
    """Classes renumbered, own weights moved along: the own sampling gives the same value."""
    loss, (embeddings, labels) = build(variant), make_batch(variant)
    renamed, new = build(variant), torch.tensor([2, 0, 3, 1])
    for old_weight, weight in zip(loss.parameters(), renamed.parameters()):
        weight.data[new] = old_weight.data
    values = []
    for module, names in ((loss, labels), (renamed, new[labels])):
        torch.manual_seed(4)
        values.append(module(embeddings, names))
    torch.testing.assert_close(values[0], values[1], rtol=1e-12, atol=0)


@one_of_each
def test_rotation_does_not_matter(variant):
    """Embeddings, and proxies or classifier rows with them, turned by an orthogonal matrix."""
    loss, (embeddings, labels) = build(variant), make_batch(variant)
    triplets = torch.tensor(some_triplets(labels))
    generator = torch.Generator().manual_seed(5)
    rotation = torch.linalg.qr(torch.randn(DIM, DIM, dtype=torch.float64, generator=generator))[0]
    before = loss(embeddings, labels, triplets)
    for weight in loss.parameters():
        if weight.dim() == 2:
            weight.data = weight.data @ rotation
    torch.testing.assert_close(loss(embeddings @ rotation, labels, triplets), before)


@pytest.mark.parametrize("variant", ["proxynca", "proxynca-positive", "arcface", "arcface-wide"])
def test_directions_alone_matter(variant):
    """Lengths of embeddings, proxies and class weights do not: the loss normalises them."""
    loss, (embeddings, labels) = build(variant), make_batch(variant)
    before = loss(embeddings, labels)
    for weight in loss.parameters():
        weight.data *= 17
    torch.testing.assert_close(loss(embeddings * 0.01, labels), before)


# ---- the forms of indices_tuple

@one_of_each
@pytest.mark.parametrize("count", [1, 3, 10])
def test_three_forms_of_indices_tuple_give_the_same(variant, count):
    """A [T, 3] tensor, a list of tuples, three index tensors; of any integer type."""
    loss, (embeddings, labels) = build(variant), make_batch(variant)
    rows = some_triplets(labels, count)
    triplets = torch.tensor(rows)
    expected = ORACLES[type(loss)](loss, embeddings, labels, rows)
    for form in (triplets, triplets.int(), [tuple(row) for row in rows], rows,
                 triplets.unbind(1), triplets.int().unbind(1)):
        assert_same(loss, embeddings, loss(embeddings, labels, form), expected)


@one_of_each
def test_given_tuples_replace_the_sampler(variant):
    """With indices_tuple nothing is drawn: the random state stays."""
    loss, (embeddings, labels) = build(variant), make_batch(variant)
    state = torch.get_rng_state()
    loss(embeddings, labels, some_triplets(labels))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("width", [3, 4, 6])
def test_npair_takes_tuples_of_any_width(width):
    """[T, 2 + N]: N negatives for each anchor; -1 in a negative's column stands for none."""
    loss, (embeddings, labels) = build("npair"), make_batch("npair")
    rows = [[0, 1, *range(2, width)], [5, 4, *range(6, 4 + width)], [8, 3, *range(9 - width, 7)]]
    expected = npair_oracle(loss, embeddings, labels, rows)
    assert_same(loss, embeddings, loss(embeddings, labels, torch.tensor(rows)), expected)
    with_gaps = torch.tensor([[*row, -1] for row in rows])
    assert_same(loss, embeddings, loss(embeddings, labels, with_gaps), expected)


@one_of_each
@pytest.mark.parametrize("wrong", [
    torch.tensor([0, 1, 2]), torch.tensor([[0, 1], [2, 3]]), [(0, 1), (2, 3)], [0, 1, 2],
    (torch.tensor([0, 1]), torch.tensor([1, 0])),
], ids=["vector", "pairs tensor", "pairs", "flat list", "two index tensors"])
def test_wrong_shapes_of_indices_tuple_say_what_is_allowed(variant, wrong):
    embeddings, labels = make_batch(variant)
    with pytest.raises(ValueError, match="indices_tuple"):
        build(variant)(embeddings, labels, wrong)


@one_of_each
def test_pairs_become_the_triplets_that_share_an_anchor(variant):
    """Miners of pairs return (a1, p, a2, n): positive pairs, negative pairs."""
    embeddings, labels = make_batch(variant)
    triplets = all_triplets(labels)
    positive_pairs = sorted({(a, p) for a, p, _ in triplets})
    negative_pairs = sorted({(a, n) for a, _, n in triplets})
    pairs = (*torch.tensor(positive_pairs).unbind(1), *torch.tensor(negative_pairs).unbind(1))
    loss = build(variant)
    torch.testing.assert_close(loss(embeddings, labels, pairs), loss(embeddings, labels, triplets))


@one_of_each
def test_padded_rows_and_numpy_vectors_are_understood(variant):
    """A row of -1 is no tuple; (a, p, n) may be numpy arrays."""
    embeddings, labels = make_batch(variant)
    loss, triplets = build(variant), torch.tensor(some_triplets(labels))
    expected = loss(embeddings, labels, triplets)
    padded = torch.cat([triplets, torch.full((2, 3), -1)])
    torch.testing.assert_close(loss(embeddings, labels, padded), expected)
    vectors = tuple(triplets[:3].t().numpy())
    torch.testing.assert_close(loss(embeddings, labels, vectors),
                               loss(embeddings, labels, triplets[:3]))


@one_of_each
@pytest.mark.parametrize("lengths", [(2, 3, 2, 2), (3, 3, 2, 1), (2, 2, 3), (2, 2, 2, 2, 2)])
def test_index_tensors_of_wrong_number_or_length_are_refused(variant, lengths):
    embeddings, labels = make_batch(variant)
    vectors = tuple(torch.arange(length) for length in lengths)
    with pytest.raises(ValueError, match="indices_tuple"):
        build(variant)(embeddings, labels, vectors)


@pytest.mark.parametrize("variant", ["triplet", "margin"])
def test_triplet_losses_refuse_wider_tuples(variant):
    """A second negative, as the n-pair sampler gives, is not dropped in silence."""
    embeddings, labels = make_batch(variant)
    with pytest.raises(ValueError, match="indices_tuple"):
        build(variant)(embeddings, labels, torch.tensor([[0, 1, 2, 3], [4, 5, 6, 7]]))


# ---- margin loss: the boundaries

def test_beta_is_learned_or_constant():
    """A parameter or a buffer; in the checkpoint and with the given first value either way."""
    learned, constant = MarginLoss(7, beta=0.9), MarginLoss(7, beta=0.9, beta_constant=True)
    assert [name for name, _ in learned.named_parameters()] == ["beta"]
    assert list(constant.parameters()) == []
    for loss in (learned, constant):
        assert loss.state_dict()["beta"].tolist() == pytest.approx([0.9] * 7)


def test_beta_of_absent_classes_gets_no_gradient():
    """Gradient by hand: -1 for an active positive, +1 for an active negative, over the divisor.

    Triplets (0, 2, 3) and (0, 2, 1) of HAND: two positives and one negative are active, all of
    class 1, so (-1 - 1 + 1) / 3, plus nu for each of the two tuples.
    """
    loss = MarginLoss(4, nu=0.25).double()
    loss(HAND, torch.tensor([1, 3, 1, 3]), [(0, 2, 3), (0, 2, 1)]).backward()
    assert loss.beta.grad.tolist() == pytest.approx([0, -1 / 3 + 0.5, 0, 0])


@pytest.mark.parametrize("margin,active", [(0.2, 3), (0.0, 3), (0.9, 4), (0.25, 3)])
def test_divisor_counts_the_terms_above_zero(margin, active):
    """The loss times the number of active terms is the plain sum of the terms; 1 if none."""
    loss, labels = MarginLoss(2, margin=margin).double(), torch.tensor([0, 1, 0, 1])
    terms = [max(0, math.sqrt(2) - 1.2 + margin)] * 2
    terms += [max(0, 1.2 - 2 + margin), max(0, 1.2 - math.sqrt(0.8) + margin)]
    value = loss(HAND, labels, [(0, 2, 3), (0, 2, 1)]).item()
    assert value * active == pytest.approx(sum(terms), abs=1e-6)


@pytest.mark.parametrize("loss,squared", [(TripletLoss(0.7, "semihard"), True),
                                          (MarginLoss(2, 0.7, sampling="semihard"), False)])
def test_semihard_uses_the_margin_and_the_distance_of_the_loss(loss, squared):
    assert (loss.sampler.margin, loss.sampler.squared) == (0.7, squared)


# ---- ProxyNCA: many proxies, one class

def test_proxynca_with_11318_proxies_is_an_ordinary_step():
    """Online Products at batch size 112: nothing that backward keeps is larger than [C, D].

    A copy [B, C - 1, D] would hold 160 million numbers.
    """
    torch.manual_seed(0)
    loss, kept = ProxyNCALoss(11318, 128), []
    embeddings = F.normalize(torch.randn(112, 128), dim=1).requires_grad_()

    def note(tensor):
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        value = loss(embeddings, torch.randint(11318, (112,)))
    value.backward()
    assert max(kept) <= 11318 * 128
    assert value.isfinite() and embeddings.grad.isfinite().all()
    assert loss.proxies.grad.isfinite().all() and loss.proxies.grad.any()


def test_proxynca_of_one_class_needs_the_positive_in_the_denominator():
    """One class leaves no other proxy; with its own in the sum the loss is log 1 = 0."""
    with pytest.raises(ValueError, match="--proxynca_positive_in_denominator"):
        ProxyNCALoss(1, 4)
    loss = ProxyNCALoss(1, 4, proxynca_positive_in_denominator=True)
    value = loss(torch.eye(4), torch.zeros(4, dtype=torch.long))
    assert value.item() == pytest.approx(0, abs=1e-6)


# ---- ArcFace: all angles

def at_angles(degrees, dtype=torch.float64):
    """Unit rows at these angles from the first axis, with a gradient."""
    radians = torch.as_tensor(degrees, dtype=torch.float64).deg2rad()
    return torch.stack([radians.cos(), radians.sin()], 1).to(dtype).requires_grad_()


def two_axes(dtype=torch.float64, **given):
    loss = ArcFaceLoss(2, 2, **given).to(dtype)
    loss.weight.data = torch.eye(2, dtype=dtype)
    return loss


@pytest.mark.parametrize("margin", [0.0, 0.1, 0.5, 1.0, 2.0, 3.0, math.pi])
def test_arcface_at_every_angle_against_the_oracle(margin):
    """From 1 to 179 degrees: on both sides of pi - m, value and gradients."""
    loss = two_axes(arcface_scale=3.0, arcface_margin=margin)
    for degrees in range(1, 180, 7):
        embeddings, labels = at_angles([degrees]), torch.tensor([0])
        if abs(math.radians(degrees) + margin - math.pi) > 1e-3:
            assert_same(loss, embeddings, loss(embeddings, labels),
                        arcface_oracle(loss, embeddings, labels))


@pytest.mark.parametrize("margin", [0.0, 0.1, 0.5, 1.5])
def test_arcface_own_logit_falls_with_the_angle(margin):
    """The own class's logit, read off a loss with one other class at a fixed cosine.

    A weight along a third axis keeps the other logit at 0: loss = log(1 + e^-own).
    """
    loss = ArcFaceLoss(2, 3, arcface_scale=2.0, arcface_margin=margin).double()
    loss.weight.data = torch.tensor([[1, 0, 0], [0, 0, 1]], dtype=torch.float64)
    values = []
    for row in at_angles(torch.linspace(0.5, 179.5, 180)):
        value = loss(F.pad(row, (0, 1)).unsqueeze(0), torch.tensor([0]))
        values.append(value.item())
        turned, = torch.autograd.grad(value, [row])
        away = torch.stack([-row[1], row[0]]).detach()  # towards a larger angle
        assert turned @ away > 0
    assert all(after > before for before, after in zip(values, values[1:]))


@pytest.mark.parametrize("degrees", [91, 120, 150, 155, 179])
@pytest.mark.parametrize("scale", [8.0, 64.0])
def test_arcface_negative_cosines_keep_a_gradient(degrees, scale):
    """No dead zone behind the right angle: embedding and class weights are pulled together."""
    loss, embeddings = two_axes(arcface_scale=scale), at_angles([degrees])
    loss(embeddings, torch.tensor([0])).backward()
    assert embeddings.grad.norm() > 0.01 and loss.weight.grad[0].norm() > 0.01


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("margin", [0.0, 0.5, 2.0, math.pi])
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("nudge", [0.0, 1e-7, 1e-6, 1e-4])
def test_arcface_at_its_weight_and_opposite_to_it(dtype, margin, sign, nudge):
    """Where the sine's derivative is infinite, and close to there: finite, and not huge."""
    generator = torch.Generator().manual_seed(2)
    loss = ArcFaceLoss(3, 16, arcface_margin=margin)
    loss.weight.data = torch.randn(3, 16, generator=generator)
    rows = sign * F.normalize(loss.weight.detach(), dim=1)
    rows = rows + nudge * torch.randn(3, 16, generator=generator)
    embeddings = rows.to(dtype).requires_grad_()
    value = loss(embeddings, torch.arange(3))
    value.backward()
    assert value.isfinite()
    for gradient in (embeddings.grad, loss.weight.grad):
        assert gradient.isfinite().all() and gradient.abs().max() < 1e3


@pytest.mark.parametrize("sampling", ["none", *losses.TRIPLET_SAMPLINGS])
def test_arcface_sampling_says_which_anchors_count(sampling):
    """none: every image once. Otherwise each anchor once for each of its tuples."""
    embeddings, labels = make_batch("arcface")
    loss = ArcFaceLoss(NUM_CLASSES, DIM, sampling=sampling).double()
    assert (loss.sampler is None) == (sampling == "none")
    one_by_one = torch.stack([loss(row.unsqueeze(0), label.unsqueeze(0), [(0, 0, 0)])
                              for row, label in zip(embeddings, labels)])
    expected = one_by_one.mean()
    if loss.sampler:
        assert loss.sampler.method == sampling
        torch.manual_seed(0)
        expected = one_by_one[loss.sampler.give(embeddings, labels)[:, 0]].mean()
    torch.manual_seed(0)
    torch.testing.assert_close(loss(embeddings, labels), expected)


@pytest.mark.parametrize("given, flag", [
    ({"arcface_scale": 0.0}, "--arcface_scale 0.0"), ({"arcface_scale": -1.0}, "--arcface_scale"),
    ({"arcface_margin": -0.01}, "--arcface_margin -0.01"),
    ({"arcface_margin": 3.15}, "--arcface_margin 3.15"),
    ({"arcface_margin": math.nan}, "--arcface_margin nan"),
    ({"sampling": "npair2"}, "npair2")])
def test_arcface_refuses_wrong_options(given, flag):
    with pytest.raises(ValueError, match=flag):
        ArcFaceLoss(3, 4, **given)


# ---- number types

@one_of_each
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("count", [2, 3, 16, 128])
def test_every_float_type_and_batch_size(variant, dtype, count):
    """Finite values and gradients, the result float32 or more; near the float64 value."""
    torch.manual_seed(0)
    embeddings, labels = make_batch(variant, count, dim=32, num_classes=(count + 1) // 2)
    if not VARIANTS[variant][0].unit_norm:
        embeddings = embeddings.detach() * 5              # raw embeddings grow in training
    embeddings = embeddings.detach().to(dtype).requires_grad_()
    loss = build(variant, num_classes=64, dim=32, dtype=torch.float32)
    value = loss(embeddings, labels)
    assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert value.shape == () and value.isfinite() and value.requires_grad
    value.backward()
    assert embeddings.grad.dtype == dtype and embeddings.grad.isfinite().all()
    assert all(weight.grad.isfinite().all() for weight in loss.parameters())
    if count > 2:
        triplets = torch.tensor(some_triplets(labels, 4 * count if count == 16 else 1))
        exact = build(variant, num_classes=64, dim=32)(embeddings.double(), labels, triplets)
        near = loss(embeddings, labels, triplets).double()
        torch.testing.assert_close(near, exact, rtol=1e-5, atol=1e-5)


@one_of_each
@pytest.mark.parametrize("many", [False, True])
def test_autocast_keeps_the_arithmetic_in_float32(variant, many):
    """Inside torch.autocast too the loss is the float32 one: half types cannot hold a loss."""
    loss, (embeddings, labels) = build(variant, dtype=torch.float32), make_batch(variant)
    embeddings = embeddings.detach().float().requires_grad_()
    triplets = torch.tensor(all_triplets(labels) if many else some_triplets(labels))
    expected = loss(embeddings, labels, triplets)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = loss(embeddings, labels, triplets)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@variants
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_non_finite_embeddings_give_a_non_finite_loss(variant, bad):
    """A diverged network reaches the trainer's check as a NaN or infinite loss, not an error."""
    loss, (embeddings, labels) = build(variant), make_batch(variant)
    rows = some_triplets(labels)
    broken = embeddings.detach().clone()
    broken[rows[0][0]] = bad
    assert not loss(broken, labels, rows).isfinite()
    assert not loss(torch.full_like(broken, bad), labels).isfinite()


# ---- degenerate batches

def degenerate_batches():
    """name: (embeddings [B, DIM], labels, whether a triplet or an n-pair tuple exists)."""
    generator = torch.Generator().manual_seed(0)
    rows = F.normalize(torch.randn(6, DIM, generator=generator), dim=1)
    return {
        "one class": (rows, torch.zeros(6, dtype=torch.long), False),
        "all singles": (rows, torch.arange(6), False),
        "one image": (rows[:1], torch.tensor([2]), False),
        "identical": (rows[:1].repeat(6, 1), torch.tensor([0, 0, 1, 1, 2, 2]), True),
        "identical, one class": (rows[:1].repeat(6, 1), torch.zeros(6, dtype=torch.long), False),
        "antipodal": (torch.cat([rows[:1], -rows[:1], rows[:1], -rows[:1]]),
                      torch.tensor([0, 0, 1, 1]), True),
    }


@variants
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("case", degenerate_batches())
def test_degenerate_batches_give_finite_values_and_gradients(variant, case, dtype):
    """A batch without a tuple gives an exact zero, still in the graph, and zero gradients."""
    torch.manual_seed(0)
    rows, labels, has_tuples = degenerate_batches()[case]
    embeddings = rows.to(dtype, copy=True).requires_grad_()
    loss = build(variant, num_classes=6, dtype=torch.float32)
    value = loss(embeddings, labels)
    assert value.isfinite() and value.requires_grad
    value.backward()
    grads = [embeddings.grad, *(weight.grad for weight in loss.parameters())]
    assert all(grad.isfinite().all() for grad in grads)
    if samples(loss) and not has_tuples:
        assert value.item() == 0 and not any(grad.any() for grad in grads)


@variants
@pytest.mark.parametrize("case", ["identical", "antipodal"])
def test_many_tuples_of_coinciding_points_are_finite(variant, case):
    """The same where the matrix of all pairs is used, in float32, where it rounds."""
    rows, labels, _ = degenerate_batches()[case]
    embeddings = rows.clone().requires_grad_()
    triplets = torch.tensor(all_triplets(labels) * 4)
    assert len(triplets) > 4 * len(labels)
    loss = build(variant, num_classes=6, dtype=torch.float32)
    value = loss(embeddings, labels, triplets)
    value.backward()
    assert value.isfinite() and embeddings.grad.isfinite().all()
    assert embeddings.grad.abs().max() < 1e3


@variants
@pytest.mark.parametrize("empty", [
    [], torch.empty(0, 3, dtype=torch.long), torch.empty(0, 5, dtype=torch.long),
    (torch.empty(0, dtype=torch.long),) * 3, (torch.empty(0),) * 3,
], ids=["list", "tensor", "wide tensor", "three tensors", "three float tensors"])
def test_empty_indices_tuple_gives_a_zero_in_the_graph(variant, empty):
    """A miner that found nothing: zero, with zero gradients for embeddings and own weights."""
    loss, (embeddings, labels) = build(variant), make_batch(variant)
    value = loss(embeddings, labels, empty)
    assert value.requires_grad and value.item() == 0
    value.backward()
    assert not embeddings.grad.any()
    assert not any(weight.grad.any() for weight in loss.parameters())


@pytest.mark.parametrize("variant", ["triplet", "margin"])
def test_no_active_tuple_gives_zero(variant):
    """Positives that coincide and antipodal negatives: every term is below zero."""
    loss = build(variant)
    point = torch.eye(DIM, dtype=torch.float64)[:1]
    embeddings = torch.cat([point, point, -point, -point]).requires_grad_()
    labels = torch.tensor([0, 0, 1, 1])
    for indices_tuple in (None, all_triplets(labels), all_triplets(labels) * 5):
        embeddings.grad = None
        value = loss(embeddings, labels, indices_tuple)
        assert value.item() == 0 and value.requires_grad
        value.backward()
        assert not embeddings.grad.any()
        assert not any(weight.grad.any() for weight in loss.parameters())


# ---- the table that --loss reads

def flags():
    parser = argparse.ArgumentParser()
    losses.add_arguments(parser)
    samplers.add_arguments(parser)
    return parser


def options(*argv):
    """The parsed flags of the two modules, those filled in later set to values of their own."""
    parser = flags()
    parser.set_defaults(embed_dim=DIM, sampling="distance", proxy_lr=3e-3, loss_lr=4e-3, lr=1e-5)
    return parser.parse_args(argv)


@pytest.mark.parametrize("name,learning_rate", [
    ("marginloss", 5e-4), ("triplet", None), ("npair", None), ("proxynca", 3e-3),
    ("crossentropy", 4e-3), ("arcface", 4e-3)])
def test_loss_select_builds_the_loss_and_its_group(name, learning_rate):
    """One group for all weights of the loss, without decay; the given list is kept as it is."""
    network = [{"params": [], "lr": 1e-5}]
    loss, groups = loss_select(name, options(), network, NUM_CLASSES)
    assert type(loss) is LOSSES[name][0]
    assert len(network) == 1 and groups[0] is network[0]
    if learning_rate is None:
        assert len(groups) == 1 and not list(loss.parameters())
    else:
        assert groups[1] == {"params": list(loss.parameters()), "lr": learning_rate,
                             "weight_decay": 0}
    embeddings, labels = make_batch("npair" if name == "npair" else "triplet")
    assert loss(embeddings, labels).isfinite()


def test_the_table_above_has_every_loss():
    """Every key of LOSSES has its oracle, its variants here and its line in the test above."""
    assert {loss_class for loss_class, _ in LOSSES.values()} == set(ORACLES)
    assert {loss_class for loss_class, _ in VARIANTS.values()} == set(ORACLES)
    marks = test_loss_select_builds_the_loss_and_its_group.pytestmark
    assert {name for name, _ in marks[0].args[1]} == set(LOSSES)
    assert all(flags().parse_args(["--loss", name]).loss == name for name in LOSSES)


def test_constant_beta_adds_no_group():
    loss, groups = loss_select("marginloss", options("--beta_constant"), [], NUM_CLASSES)
    assert groups == [] and not list(loss.parameters())


def test_loss_select_passes_every_option():
    """Non-default flags reach the modules that are built."""
    loss, groups = loss_select("marginloss", options(
        "--margin", "0.3", "--beta", "0.8", "--beta_lr", "0.01", "--nu", "0.2", "--sampling",
        "semihard"), [], 9)
    assert (loss.margin, loss.nu, loss.sampler.margin) == (0.3, 0.2, 0.3)
    assert loss.beta.tolist() == pytest.approx([0.8] * 9) and groups[0]["lr"] == 0.01
    assert (loss.sampler.method, loss.sampler.squared) == ("semihard", False)
    loss, _ = loss_select("triplet", options("--margin", "0.4", "--distance_cutoff", "1.4"), [], 9)
    assert (loss.margin, loss.sampler.margin, loss.sampler.distance_cutoff) == (0.4, 0.4, 1.4)
    assert (loss.sampler.method, loss.sampler.squared) == ("distance", True)
    loss, _ = loss_select("npair", options("--l2npair", "0.5"), [], 9)
    assert loss.l2npair == 0.5 and loss.sampler.method == "npair"
    loss, groups = loss_select("proxynca", options(
        "--proxynca_positive_in_denominator", "--proxy_lr", "0.7"), [], 9)
    assert loss.positive_in_denominator and groups[0]["lr"] == 0.7
    assert loss.proxies.shape == (9, DIM)
    loss, groups = loss_select("crossentropy", options("--loss_lr", "0.6"), [], 9)
    assert loss.classifier.weight.shape == (9, DIM) and groups[0]["lr"] == 0.6
    loss, groups = loss_select("arcface", options(
        "--arcface_scale", "30", "--arcface_margin", "0.3", "--sampling", "multisimilarity",
        "--mining_epsilon", "0.2", "--loss_lr", "0.6"), [], 9)
    assert (loss.scale, loss.margin, loss.weight.shape) == (30, 0.3, (9, DIM))
    assert (loss.sampler.method, loss.sampler.mining_epsilon) == ("multisimilarity", 0.2)
    assert groups[0]["lr"] == 0.6
    for name in ("triplet", "marginloss"):
        loss, _ = loss_select(name, options("--mining_epsilon", "0.3"), [], 9)
        assert loss.sampler.mining_epsilon == 0.3


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_declares_what_it_wants(name):
    """The attributes that the rest of the pipeline reads, and defaults equal to the flags'."""
    loss_class, lr_option = LOSSES[name]
    parser = flags()
    assert isinstance(loss_class.unit_norm, bool)
    assert set(loss_class.samplings) <= {*samplers.METHODS, "none"}
    assert 1 <= loss_class.min_samples_per_class <= loss_class.max_samples_per_class
    defaults = vars(parser.parse_args([]))
    assert lr_option is None or lr_option in defaults
    parameters = inspect.signature(loss_class).parameters
    for parameter in parameters.values():
        if defaults.get(parameter.name) is not None:
            assert parameter.default == defaults[parameter.name], parameter.name
    if "sampling" in parameters:
        assert parameters["sampling"].default == loss_class.samplings[0]
    assert list(inspect.signature(loss_class.forward).parameters) == [
        "self", "embeddings", "labels", "indices_tuple"]


@pytest.mark.parametrize("sampling", losses.TRIPLET_SAMPLINGS)
@pytest.mark.parametrize("name", ["triplet", "marginloss", "arcface"])
def test_every_triplet_sampling_trains(name, sampling):
    """Ten steps of gradient descent on the embeddings lower the loss over all triplets."""
    torch.manual_seed(0)
    loss, _ = loss_select(name, options("--sampling", sampling), [], NUM_CLASSES)
    raw, labels = make_batch(count=16)
    triplets = all_triplets(labels)
    raw = raw.detach().requires_grad_()
    before = loss(raw, labels, triplets).item()
    optimizer = torch.optim.SGD([raw], lr=0.5)
    for _ in range(10):
        optimizer.zero_grad()
        loss(F.normalize(raw, dim=1), labels).backward()
        optimizer.step()
    assert loss(F.normalize(raw, dim=1), labels, triplets).item() < before
