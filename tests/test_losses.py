"""The losses against their equations, written as loops over tuples and classes in float64.

pytest tests/test_losses.py -k NAME runs what concerns one loss. A new one needs its equation in
ORACLES, other flags in VARIANTS, a number worked by hand in BY_HAND and its flags' DOMAINS and
DEFAULTS; all else, the checks of check_loss.py with it, goes through losses.LOSSES.
"""

import argparse
import inspect
import itertools
import math
import types
from math import exp, log, sqrt

import pytest
import torch
import torch.nn.functional as F

import check_loss
import losses
import samplers
from losses import (LOSSES, AngularLoss, ArcFaceLoss, CircleLoss, ClassLoss, ContrastiveLoss,
                    CosFaceLoss, CrossEntropyLoss, FastAPLoss, HistogramLoss, LiftedLoss,
                    MarginLoss, MultiSimilarityLoss, NormSoftmaxLoss, NPairLoss, NTXentLoss,
                    ProxyAnchorLoss, ProxyNCALoss, ProxyNCAPlusPlusLoss, QuadrupletLoss,
                    RecallAtKLoss, SmoothAPLoss, SNRLoss, SoftTripleLoss, SphereFaceLoss,
                    SupConLoss, TripletLoss, loss_select)
from samplers import Sampler

NUM_CLASSES, DIM = 4, 6
NONE = torch.empty(0, 3, dtype=torch.long)  # what a miner gives that finds nothing

# ---- oracles: x [B, D] are the embeddings, tuples lists of ints, g the flags' values


def mean(terms, x):
    """Of a list; a zero in the graph for an empty one."""
    return sum(terms) / len(terms) if terms else x.sum() * 0


def sq(x, y):
    return ((x - y) ** 2).sum()


def cosine(x, y):
    return x @ y / x.norm() / y.norm()


def weights_of(labels, tuples):
    """How often each image stands in the tuples, over the greatest number; 1 each without any."""
    places = range(len(labels)) if tuples is None else [i for row in tuples for i in row]
    counts = [list(places).count(i) for i in range(len(labels))]
    return [count / max(1, *counts) for count in counts]


def pairs_of(labels, tuples):
    """[(image, its positives, its negatives)]: all of the batch or those of the tuples."""
    names = labels.tolist()
    if tuples is None:
        return [(a, [p for p, other in enumerate(names) if p != a and other == name],
                 [n for n, other in enumerate(names) if other != name])
                for a, name in enumerate(names)]
    return [(a, sorted({row[1] for row in tuples if row[0] == a != row[1]}),
             sorted({row[2] for row in tuples if row[0] == a})) for a in range(len(names))]


def triplet_oracle(loss, x, labels, tuples):
    """1/T sum [|a - p|^2 - |a - n|^2 + margin]+"""
    return mean([F.relu(sq(x[a], x[p]) - sq(x[a], x[n]) + loss.given.margin)
                 for a, p, n in tuples], x)


def margin_oracle(loss, x, labels, tuples):
    """(sum [|a - p| - beta + margin]+ + [beta - |a - n| + margin]+ + nu beta) / (terms > 0)

    0 where no term is above 0. The reference divides by the rows with a term > 0.
    """
    g, rows, betas = loss.given, [], []
    for a, p, n in tuples:
        betas.append(loss.beta[int(labels[a])])
        rows.append([F.relu((x[a] - x[p]).norm() - betas[-1] + g.margin),
                     F.relu(betas[-1] - (x[a] - x[n]).norm() + g.margin)])
    active = sum(term.item() > 0 for row in rows for term in row)
    rows_active = sum(max(row).item() > 0 for row in rows)
    total = x.sum() * 0 + sum(map(sum, rows)) + g.nu * sum(betas) * (active > 0)
    return total / max(active if g.form == "paper" else rows_active, 1)


def npair_oracle(loss, x, labels, tuples, most=math.inf):
    """1/T sum log(1 + sum_n exp(a.n - a.p)) + l2npair (|a|^2 + |p|^2)

    The reference has the mean length of all embeddings there. most: size of an exponent.
    """
    terms = []
    for a, p, *negatives in tuples:
        inner = sum(torch.exp((x[a] @ x[n] - x[a] @ x[p]).clamp(-most, most))
                    for n in negatives if n >= 0)
        length = (x[a] @ x[a] + x[p] @ x[p] if loss.given.form == "paper"
                  else mean([row.norm() for row in x], x))
        terms.append(torch.log(1 + inner) + loss.given.l2npair * length)
    return mean(terms, x)


def angular_oracle(loss, x, labels, tuples):
    """n-pair + weight * 1/T sum log(1 + sum_n exp(4 t (a + p).n - 2 (1 + t) a.p)), t = tan^2"""
    g, rows = loss.given, [row / row.norm() for row in x]
    t = math.tan(g.angular_alpha * math.pi / 180) ** 2
    terms = [torch.log(1 + sum(torch.exp(4 * t * (rows[a] + rows[p]) @ rows[n]
                                         - 2 * (1 + t) * rows[a] @ rows[p])
                               for n in negatives if n >= 0))
             for a, p, *negatives in tuples]
    npairs = npair_oracle(loss, x, labels, tuples, math.inf if g.form == "paper" else 50)
    return npairs + g.angular_weight * mean(terms, x)


def contrastive_oracle(loss, x, labels, tuples=None, pairs=None):
    """mean of d_ap^q + mean of (m - d_an)^q where d_an < m; q 2, or 1 for the linear one

    With triplets mean of d_ap^q + mean of [m - d_an]+^q, over all of them. pairs: the triplets
    whose pairs count, once each; None for all pairs.
    """
    g, pulls, pushes = loss.given, [], []
    power = 1 if g.contrastive_linear else 2
    for a, p, n in tuples or ():
        pulls.append((x[a] - x[p]).norm() ** power)
        pushes.append(F.relu(g.contrastive_margin - (x[a] - x[n]).norm()) ** power)
    for a, positives, negatives in pairs_of(labels, pairs) if tuples is None else ():
        pulls += [(x[a] - x[p]).norm() ** power for p in positives]
        distances = [(x[a] - x[n]).norm() for n in negatives]
        pushes += [(g.contrastive_margin - d) ** power for d in distances
                   if d.item() < g.contrastive_margin]
    return mean(pulls, x) + mean(pushes, x)


def over_anchors(terms_of):
    """The mean of all anchors' terms, terms_of(flags, x, anchor, positives, negatives)"""
    def oracle(loss, x, labels, tuples=None):
        terms = [term for anchor in pairs_of(labels, tuples)
                 for term in terms_of(loss.given, x, *anchor)]
        return mean(terms, x) + regulariser(loss, x)
    return oracle


@over_anchors
def lifted_oracle(g, x, a, positives, negatives):
    """[log sum_p e^d_ap + log sum_n e^(m - d_an)]+, anchors with both; + l2 mean |x|^2"""
    if positives and negatives:
        pull = sum(torch.exp((x[a] - x[p]).norm()) for p in positives)
        push = sum(torch.exp(g.lifted_margin - (x[a] - x[n]).norm()) for n in negatives)
        yield F.relu(torch.log(pull) + torch.log(push))


@over_anchors
def multisimilarity_oracle(g, x, a, positives, negatives):
    """log(1 + sum_p e^(-a (s - l))) / a + log(1 + sum_n e^(b (s - l))) / b

    The reference's mean is over the images that have a pair.
    """
    alpha, beta, bound = (g.multisimilarity_alpha, g.multisimilarity_beta,
                          g.multisimilarity_lambda)
    if g.form == "paper" or positives or negatives:
        one = 1 + 0 * x.sum()
        pull = sum(torch.exp(-alpha * (cosine(x[a], x[p]) - bound)) for p in positives)
        push = sum(torch.exp(beta * (cosine(x[a], x[n]) - bound)) for n in negatives)
        yield torch.log(one + pull) / alpha + torch.log(one + push) / beta


@over_anchors
def circle_oracle(g, x, a, positives, negatives):
    """log(1 + sum_n e^(g [s + m]+ (s - m)) sum_p e^(-g [1 + m - s]+ (s - 1 + m)))

    The two weights in [ ]+ are plain numbers.
    """
    m, gamma = g.circle_margin, g.circle_gamma
    if positives and negatives:
        to_p, to_n = ([cosine(x[a], x[i]) for i in part] for part in (positives, negatives))
        push = sum(torch.exp(gamma * max(0, s.item() + m) * (s - m)) for s in to_n)
        pull = sum(torch.exp(-gamma * max(0, 1 + m - s.item()) * (s - 1 + m)) for s in to_p)
        yield torch.log(1 + push * pull)


@over_anchors
def ntxent_oracle(g, x, a, *others):
    """-log e^(s_ap / T) / (e^(s_ap / T) + sum_n e^(s_an / T)), a term for each positive pair"""
    to_p, to_n = ([torch.exp(cosine(x[a], x[i]) / g.ntxent_temperature) for i in part]
                  for part in others)
    yield from (-torch.log(e / (e + sum(to_n))) for e in to_p if to_n)


@over_anchors
def supcon_oracle(g, x, a, positives, negatives):
    """-1/|P| sum_p log e^(s_ap / T) / sum_i e^(s_ai / T), i in P and N"""
    if positives:
        e = {i: torch.exp(cosine(x[a], x[i]) / g.supcon_temperature)
             for i in [*positives, *negatives]}
        yield -mean([torch.log(e[p] / sum(e.values())) for p in positives], x)


def on_nodes(value, low, high, bins):
    """A histogram of one value on bins + 1 nodes: 1 - |value - node| / width, not below 0."""
    nodes = torch.linspace(low, high, bins + 1, dtype=torch.float64)
    return F.relu(1 - (value - nodes).abs() * bins / (high - low))


def histogram_oracle(loss, x, labels, tuples=None):
    """sum_r h-_r sum_(q <= r) h+_q, the shares of the pairs' cosines on the nodes of [-1, 1]

    The reference's upper nodes of the cells 2 to 7 of 10 get nothing.
    """
    bins, sums, counts = loss.given.histogram_bins, [0, 0], [0, 0]
    for a, *others in pairs_of(labels, tuples):
        for kind, other in [(kind, i) for kind, part in enumerate(others) for i in part]:
            s = cosine(x[a], x[other])
            shares, cell = on_nodes(s, -1, 1, bins), int((s.item() + 1) * bins / 2)
            if loss.given.form == "reference" and bins == 10 and 2 <= cell <= 7:
                shares = shares * (torch.arange(bins + 1) != cell + 1)
            sums[kind] = sums[kind] + shares
            counts[kind] += 1
    if not all(counts):
        return x.sum() * 0
    positive, negative = sums[0] / counts[0], sums[1] / counts[1]
    return sum(negative[r] * positive[:r + 1].sum() for r in range(bins + 1))


@over_anchors
def fastap_oracle(g, x, a, positives, negatives):
    """1 - 1/N+ sum_l h+_l H+_l / H_l, of squared distances on [0, 4]"""
    if positives:
        nodes = {i: on_nodes(sq(x[a] / x[a].norm(), x[i] / x[i].norm()), 0, 4, g.fastap_bins)
                 for i in [*positives, *negatives]}
        true, every = sum(nodes[p] for p in positives), sum(nodes.values())
        precision = sum(true[l] * true[:l + 1].sum() / every[:l + 1].sum()
                        for l in range(g.fastap_bins + 1) if true[l].item() > 0)
        yield 1 - precision / len(positives)


def smooth_rank(s, i, others, temperature):
    """1 + sum over the others j but i of the logistic function of (s_j - s_i) / temperature"""
    return 1 + sum(torch.sigmoid((s[j] - s[i]) / temperature) for j in others if j != i)


@over_anchors
def smoothap_oracle(g, x, a, positives, negatives):
    """1 - 1/P sum_i rank among the positives / rank among all others"""
    t, s = g.smoothap_temperature, {i: cosine(x[a], x[i]) for i in [*positives, *negatives]}
    if positives:
        yield 1 - sum(smooth_rank(s, i, positives, t) / smooth_rank(s, i, s, t)
                      for i in positives) / len(positives)


@over_anchors
def recallatk_oracle(g, x, a, positives, negatives):
    """1 - min(k, sum_p torch.sigmoid((k - rank_p) / tau1)) / min(k, P), a term for each k"""
    s = {i: cosine(x[a], x[i]) for i in [*positives, *negatives]}
    ranks = [smooth_rank(s, p, s, g.recallatk_tau2) for p in positives]
    for k in g.recallatk_k if positives else ():
        found = sum(torch.sigmoid((k - rank) / g.recallatk_tau1) for rank in ranks)
        yield 1 - found.clamp(max=k) / min(k, len(positives))


def snr_oracle(loss, x, labels, tuples):
    """mean of the [d_ap - d_an + m]+ above 0, d = var(a - x) / var(a); + lambda mean |sum of x|"""
    terms = [((x[a] - x[p]).var() - (x[a] - x[n]).var()) / x[a].var() + loss.given.snr_margin
             for a, p, n in tuples]
    return mean([term for term in terms if term.item() > 0], x) + regulariser(loss, x)


def quadruplet_oracle(loss, x, labels, tuples):
    """1/T sum [d_ap - d_an + m1]+ + [d_ap - d_nl + m2]+, squared distances; l -1 for none

    The reference: plain distances, and the second term for each row with each row's l.
    """
    g = loss.given
    d = (x[:, None] - x).square().sum(2)
    d = d if g.form == "paper" else d.clamp(min=1e-16).sqrt()
    first = [F.relu(d[a, p] - d[a, n] + g.quadruplet_margin1) for a, p, n, _ in tuples]
    if g.form == "paper":
        first += [F.relu(d[a, p] - d[n, l] + g.quadruplet_margin2)
                  for a, p, n, l in tuples if l >= 0]
        return sum(first) / len(tuples) if tuples else mean([], x)
    fourths = [l for *_, l in tuples if l >= 0]
    second = [F.relu(d[a, p] - d[n, fourths] + g.quadruplet_margin2).mean()
              for a, p, n, _ in tuples if fourths]
    return mean(first, x) + mean(second, x)


def proxyanchor_oracle(loss, x, labels, tuples=None):
    """mean log(1 + sum e^(-a (s - d))), present proxies, + mean log(1 + sum e^(a (s + d))), all

    The exponents of an image that the tuples weigh w get w - 1 added.
    """
    alpha, delta = loss.given.proxyanchor_alpha, loss.given.proxyanchor_delta
    pulls, pushes = [], []
    for c, proxy in enumerate(loss.proxies):
        own, others = [], []
        for i, w in enumerate(weights_of(labels, tuples)):
            (own if int(labels[i]) == c else others).append((cosine(x[i], proxy), w - 1))
        if own:
            pulls.append(torch.log(1 + sum(torch.exp(-alpha * (s - delta) + w) for s, w in own)))
        push = x.sum() * 0 + sum(torch.exp(alpha * (s + delta) + w) for s, w in others)
        pushes.append(torch.log(1 + push))
    return mean(pulls, x) + mean(pushes, x)


def over_softmax(logits_of):
    """The mean of -log e^z_y / sum_c e^z_c, z = logits_of(loss, embedding, own class)

    Each image by its weight. ProxyNCA leaves the own class out of the sum.
    """
    def oracle(loss, x, labels, tuples=None):
        terms = []
        for row, own, weight in zip(x, labels.tolist(), weights_of(labels, tuples)):
            z = logits_of(loss, row, own)
            summed = [value for c, value in enumerate(z) if c != own
                      or getattr(loss.given, "proxynca_positive_in_denominator", True)]
            terms.append(weight * (torch.logsumexp(torch.stack(summed), 0) - z[own]))
        return mean(terms, x) + regulariser(loss, x)
    return oracle


@over_softmax
def proxynca_oracle(loss, x, own):
    """-|3 x / |x| - 3 p / |p||^2"""
    return [-sq(3 * x / x.norm(), 3 * proxy / proxy.norm()) for proxy in loss.proxies]


@over_softmax
def crossentropy_oracle(loss, x, own):
    return [w @ x + b for w, b in zip(loss.classifier.weight, loss.classifier.bias)]


@over_softmax
def arcface_oracle(loss, x, own):
    """s cos(theta), for the own class s cos(theta + m), theta the angle to a class weight

    Where theta + m > pi: s (cos theta - m sin m) instead. The reference takes no theta above a
    right angle.
    """
    s, m = loss.given.arcface_scale, loss.given.arcface_margin
    angles = [torch.acos(cosine(x, weight)) for weight in loss.weight]
    if loss.given.form == "reference":
        angles = [angle.clamp(max=math.acos(1e-10)) for angle in angles]
    z = [s * torch.cos(angle) for angle in angles]
    z[own] = (s * torch.cos(angles[own] + m) if angles[own].item() + m <= math.pi else
              s * (torch.cos(angles[own]) - m * math.sin(m)))
    return z


@over_softmax
def proxyncapp_oracle(loss, x, own):
    """-|x - p|^2 / T of unit vectors"""
    return [-sq(x / x.norm(), proxy / proxy.norm()) / loss.given.proxyncapp_temperature
            for proxy in loss.proxies]


@over_softmax
def normsoftmax_oracle(loss, x, own):
    return [cosine(x, weight) / loss.given.normsoftmax_temperature for weight in loss.weight]


@over_softmax
def cosface_oracle(loss, x, own):
    """s cos, for the own class s (cos - m)"""
    return [loss.given.cosface_scale * (cosine(x, weight) - loss.given.cosface_margin * (c == own))
            for c, weight in enumerate(loss.weight)]


@over_softmax
def sphereface_oracle(loss, x, own):
    """s cos, for the own class s (l cos + psi) / (1 + l), psi = (-1)^k cos(m angle) - 2 k"""
    m, s = loss.given.sphereface_margin, loss.given.sphereface_scale
    plain = max(loss.given.sphereface_lambda, 1500 / (1 + 0.1 * loss.steps.item()))
    z = [s * cosine(x, weight) for weight in loss.weight]
    angle = torch.acos(cosine(x, loss.weight[own]))
    k = next(k for k in range(m) if angle.item() <= (k + 1) * math.pi / m)
    psi = (-1) ** k * torch.cos(m * angle) - 2 * k
    z[own] = s * (plain * torch.cos(angle) + psi) / (1 + plain)
    return z


@over_softmax
def softtriple_oracle(loss, x, own):
    """l S, for the own class l (S - d); S = sum_k s_k e^(s_k / g) / sum_k e^(s_k / g)

    The reference: S_c = sum_k s_ck e^(g s_ck) / sum_b e^(g s_bk), s the products with its centres.
    """
    g, s = loss.given, unit_centers(loss) @ (x / x.norm())  # [C, K]
    e = torch.exp(s / g.softtriple_gamma if g.form == "paper" else s * g.softtriple_gamma)
    similarities = (s * e / e.sum(1 if g.form == "paper" else 0, keepdim=True)).sum(1)
    return [g.softtriple_lambda * (similarity - g.softtriple_delta * (c == own))
            for c, similarity in enumerate(similarities)]


def unit_centers(loss):
    """[C, K, D], each of length one; of the reference each dimension over all of them."""
    over = (0, 1) if loss.given.form == "reference" else 2
    return loss.centers / loss.centers.square().sum(over, keepdim=True).sqrt()


def regulariser(loss, x):
    """What remains of a loss without tuples: 0 for most."""
    g = loss.given
    if isinstance(loss, LiftedLoss):
        return g.lifted_l2 * mean([row.norm() ** (2 if g.form == "paper" else 1) for row in x], x)
    if isinstance(loss, SNRLoss):
        return g.snr_lambda * mean([row.sum().abs() for row in x], x)
    total = x.sum() * 0
    if isinstance(loss, SoftTripleLoss):
        # tau / (C K (K - 1)) sum over the pairs of a class's centres of their distance, the 1e-5
        # as in the authors' code.
        classes, number, _ = loss.centers.shape
        for centers in unit_centers(loss):
            total = total + torch.sqrt(2 + 1e-5 - 2 * centers @ centers.t()).triu(1).sum()
        total = total * g.softtriple_tau / (classes * number * max(1, number - 1))
    return total


ORACLES = {
    "triplet": triplet_oracle, "marginloss": margin_oracle, "npair": npair_oracle,
    "proxynca": proxynca_oracle, "crossentropy": crossentropy_oracle, "arcface": arcface_oracle,
    "contrastive": contrastive_oracle, "lifted": lifted_oracle, "circle": circle_oracle,
    "multisimilarity": multisimilarity_oracle, "ntxent": ntxent_oracle, "supcon": supcon_oracle,
    "angular": angular_oracle, "histogram": histogram_oracle, "fastap": fastap_oracle,
    "smoothap": smoothap_oracle, "recallatk": recallatk_oracle, "snr": snr_oracle,
    "quadruplet": quadruplet_oracle, "proxyanchor": proxyanchor_oracle,
    "proxynca++": proxyncapp_oracle, "normsoftmax": normsoftmax_oracle,
    "cosface": cosface_oracle, "sphereface": sphereface_oracle, "softtriple": softtriple_oracle}

# ---- losses and batches

UNEVEN = torch.tensor([0] * 5 + [1] * 3 + [3] * 2 + [4, 5])
RHO = {"sampling": "rho", "rho_probability": 0.5}
REFERENCE = {"form": "reference"}
CENTERS = {"softtriple_centers": 3, "softtriple_lambda": 8.0, "softtriple_gamma": 0.3,
           "softtriple_delta": 0.1, "softtriple_tau": 0.7}
# NAME-what: the flags. The first of a loss changes all numbers; NAME alone has the defaults.
VARIANTS = dict.fromkeys(LOSSES, {}) | {
    "triplet-wide": {"margin": 0.9, "sampling": "random"},
    "triplet-rho": {"margin": 0.9, **RHO},
    "marginloss-nu": {"nu": 0.3, "beta": 0.9, "margin": 0.4},
    "marginloss-constant": {"beta_constant": True, "nu": 0.1, "sampling": "random"},
    "marginloss-reference": {"beta": 0.9, "margin": 0.4, **REFERENCE},
    "marginloss-rho": RHO,
    "npair-l2": {"l2npair": 0.7},
    "npair-reference": {"l2npair": 0.7, **REFERENCE},
    "proxynca-positive": {"proxynca_positive_in_denominator": True},
    "arcface-wide": {"arcface_scale": 4.0, "arcface_margin": 2.0},
    "arcface-multisimilarity": {"sampling": "multisimilarity"},
    "arcface-reference": {"arcface_scale": 16.0, **REFERENCE},
    "contrastive-linear": {"contrastive_linear": True, "contrastive_margin": 1.3},
    "contrastive-rho": RHO,
    "lifted-wide": {"lifted_margin": 2.5, "lifted_l2": 0.05},
    "lifted-reference": {"lifted_l2": 0.05, **REFERENCE},
    "multisimilarity-none": {"multisimilarity_alpha": 5.0, "multisimilarity_beta": 9.0,
                             "multisimilarity_lambda": 0.4, "sampling": "none"},
    "multisimilarity-reference": {"mining_epsilon": 0.0, **REFERENCE},
    "multisimilarity-rho": RHO,
    "circle-soft": {"circle_margin": 0.25, "circle_gamma": 6.0},
    "ntxent-warm": {"ntxent_temperature": 0.7},
    "supcon-warm": {"supcon_temperature": 0.7},
    "angular-narrow": {"angular_alpha": 30.0, "angular_weight": 0.6, "l2npair": 0.3},
    "angular-reference": {"angular_alpha": 30.0, "l2npair": 0.3, **REFERENCE},
    "histogram-few": {"histogram_bins": 7},
    "histogram-reference": {"histogram_bins": 10, **REFERENCE},
    "fastap-many": {"fastap_bins": 23},
    "smoothap-soft": {"smoothap_temperature": 0.3},
    "recallatk-soft": {"recallatk_k": [1, 3], "recallatk_tau1": 0.7, "recallatk_tau2": 0.2},
    # So wide that more than k are found of a class of five.
    "recallatk-wide": {"recallatk_k": [1, 2], "recallatk_tau1": 5.0, "recallatk_tau2": 0.5},
    "snr-wide": {"snr_margin": 0.9, "snr_lambda": 0.3, "sampling": "random"},
    "snr-rho": {"snr_margin": 0.9, **RHO},
    "quadruplet-wide": {"quadruplet_margin1": 1.1, "quadruplet_margin2": 0.4,
                        "sampling": "random"},
    "quadruplet-rho": RHO,
    "quadruplet-reference": {"quadruplet_margin1": 0.6, **REFERENCE},
    "quadruplet-reference-rho": {**RHO, **REFERENCE},
    "proxyanchor-soft": {"proxyanchor_alpha": 4.0, "proxyanchor_delta": 0.3},
    "proxynca++-warm": {"proxyncapp_temperature": 0.8},
    "normsoftmax-warm": {"normsoftmax_temperature": 0.6},
    "cosface-soft": {"cosface_scale": 6.0, "cosface_margin": 0.2},
    "sphereface-three": {"sphereface_margin": 3, "sphereface_lambda": 0.0,
                         "sphereface_scale": 7.0},
    "softtriple-three": CENTERS,
    "softtriple-reference": {**CENTERS, **REFERENCE},
}
every_loss = pytest.mark.parametrize("name", LOSSES)
every_variant = pytest.mark.parametrize("variant", VARIANTS)


def variants_of(name):
    return [variant for variant in VARIANTS if variant.partition("-")[0] == name]


def build(variant, num_classes=NUM_CLASSES, dim=DIM, dtype=torch.float64, **flags):
    """The loss of VARIANTS, weights seeded, as after training; loss.given: what it was built with.

    Betas differ from class to class, steps have passed; in evaluation mode.
    """
    loss_class = LOSSES[variant.partition("-")[0]]
    defaults = losses.defaults_of(loss_class)
    sizes = {"num_classes": num_classes, "embed_dim": dim}
    flags = {**VARIANTS[variant], **flags, **{k: v for k, v in sizes.items() if k in defaults}}
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(1)
        loss = loss_class(**flags)
        if loss_class is MarginLoss:
            loss.beta += 0.2 * torch.rand(num_classes) - 0.1
        if loss_class is SphereFaceLoss:
            loss.steps += 30_000
    loss.given = types.SimpleNamespace(**{"form": "paper", **defaults, **flags})
    return loss.to(dtype).eval()


def make_batch(loss, count=12, num_classes=NUM_CLASSES, dim=DIM, seed=0, raw=False):
    """Embeddings [count, dim], float64 leaves, unit-norm where the loss wants it; labels [count].

    Every class comes count / num_classes times, in shuffled order. raw: of any length.
    """
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(count, dim, dtype=torch.float64, generator=generator)
    rows = F.normalize(rows, dim=1) if loss.unit_norm and not raw else rows
    labels = torch.arange(count) % num_classes
    return rows.requires_grad_(), labels[torch.randperm(count, generator=generator)]


def some_triplets(labels, count=None, loss=None, seed=0):
    """All triplets of the batch as lists, or so many at random.

    For the quadruplet loss each with an image of a third class, for the n-pair losses with the
    negative of another: -1 for none.
    """
    names = labels.tolist()
    rows = [[a, p, n] for a, positives, negatives in pairs_of(labels, None) for p in positives
            for n in negatives]
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
    rows = [rows[i] for i in order[:count].tolist()] if count else rows
    for number, row in enumerate(rows):
        classes = [names[row[0]]] + [names[row[2]]] * isinstance(loss, QuadrupletLoss)
        others = [i for i, name in enumerate(names) if name not in classes and i != row[2]]
        if isinstance(loss, (QuadrupletLoss, NPairLoss, AngularLoss)):
            row.append([*others, -1][number % (len(others) + 1)])
    return rows


def drawn(loss, x, labels):
    """What the loss samples under seed 0, as lists; None where it takes everything."""
    if loss.sampler is None:
        return None
    torch.manual_seed(0)
    if isinstance(loss, ArcFaceLoss) and loss.sampler.method == "multisimilarity":
        return [pair for mask in loss.sampler.hard_pairs(x, labels)
                for pair in mask.nonzero().tolist()]
    tuples = loss.sampler.give(x, labels, padded=True)
    if isinstance(loss, QuadrupletLoss):
        return [row for row in loss.complete(tuples, labels).tolist() if row[0] >= 0]
    return [[i for i in row if i >= 0] for row in tuples.tolist() if row[0] >= 0]


def seeded(loss, *arguments):
    """The loss of the arguments, with everything random under seed 0."""
    torch.manual_seed(0)
    return loss(*arguments)


def assert_same(loss, x, actual, expected):
    """Values agree to ten digits; gradients of the embeddings and own weights, None as zero."""
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)
    inputs = [x, *loss.parameters()]
    for ours, theirs in zip(*(torch.autograd.grad(value, inputs, allow_unused=True,
                                                  materialize_grads=True, retain_graph=True)
                              for value in (actual, expected))):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)


# ---- values and gradients

@every_variant
def test_value_and_gradients_are_those_of_the_equation(variant):
    """Given tuples: few, and so many that the matrix of all pairs is used. Own sampling.

    It is drawn beforehand under the same seed, from 5, 3, 2, 1 and 1 images of a class, in any
    order, where class 2 is absent; and from images of one class, which have no tuple.
    """
    loss, oracle = build(variant, num_classes=6), ORACLES[variant.partition("-")[0]]
    for count, classes, number in ((12, 4, 10), (8, 2, None), (8, 4, None)):
        x, labels = make_batch(loss, count, classes, seed=count, raw=True)
        triplets = some_triplets(labels, number, loss)
        assert number or len(triplets) > 4 * count
        expected = oracle(loss, x, labels, triplets)
        assert expected.item() != 0
        assert_same(loss, x, loss(x, labels, torch.tensor(triplets)), expected)
    torch.manual_seed(3)
    for seed, labels in enumerate((UNEVEN[torch.randperm(12)], UNEVEN[torch.randperm(12)],
                                   torch.zeros(5, dtype=torch.long))):
        x, _ = make_batch(loss, len(labels), seed=seed)
        expected = oracle(loss, x, labels, drawn(loss, x, labels))
        assert_same(loss, x, seeded(loss, x, labels), expected)


@every_loss
def test_checks_of_check_loss(name):
    """All of them, gradcheck too, with the default flags; degenerate batches with others."""
    assert check_loss.main([name]) == []
    check = check_loss.LossCheck(name)
    defaults = vars(check.opt)
    for variant in variants_of(name)[1:]:
        check.opt = argparse.Namespace(**{**defaults, **VARIANTS[variant]})
        check.check_degenerate()


@pytest.mark.parametrize("name", [name for name in LOSSES if LOSSES[name].samplings])
def test_every_sampling_gives_the_loss_its_tuples(name):
    """As if they were given; not where pairs or their images are counted, not triplets."""
    for sampling in LOSSES[name].samplings:
        loss = build(name, **{} if sampling == "npair" else {"sampling": sampling})
        assert (loss.sampler.method if loss.sampler else "none") == sampling
        x, labels = make_batch(loss)
        pairs = sampling == "multisimilarity" and name in ("contrastive", "arcface")
        if loss.sampler and not pairs:
            assert_same(loss, x, seeded(loss, x, labels), loss(x, labels, drawn(loss, x, labels)))


def test_contrastive_takes_hard_pairs_once_each():
    """Sampling multisimilarity gives pairs: the mean of the push is over those that are near."""
    loss = build("contrastive", sampling="multisimilarity")
    x, labels = make_batch(loss)
    triplets = loss.sampler.give(x, labels).tolist()
    assert_same(loss, x, loss(x, labels), contrastive_oracle(loss, x, labels, pairs=triplets))


# ---- numbers worked by hand

# Unit vectors: cosines .6 (0, 1), 0 (0, 2), -1 (0, 3), .8 (1, 2), -.6 (1, 3), 0 (2, 3); squared
# distances .8, 2, 4, .4, 3.2, 2. ALTERNATING makes (0, 2) and (1, 3) the positive pairs.
HAND = torch.tensor([[1, 0], [0.6, 0.8], [0, 1], [-1, 0]], dtype=torch.float64)
ALTERNATING, THREE_AND_ONE = torch.tensor([0, 1, 0, 1]), torch.tensor([0, 0, 0, 1])
TWO = [(0, 2, 3), (0, 2, 1)]
AXES = [[3.0, 0.0], [0.0, 0.5]]  # as class weights: two directions
ONE = [[0.6, 0.8]]               # cosines .6 and .8 with them


def hand(name, loss, expected, tuples=None, labels=ALTERNATING, rows=HAND, active=None,
         within=1e-9):
    return pytest.param(loss, expected, tuples, labels, rows, active, within, id=name)


def with_weights(loss, rows):
    """The loss in float64 and in evaluation mode, its own weights replaced by these."""
    next(loss.parameters()).data = torch.tensor(rows, dtype=torch.float64)
    return loss.double().eval()


def one_image(name, loss, weights, expected, row=ONE, within=1e-9):
    """A loss with these class weights, of one image of class 0."""
    return hand(name, with_weights(loss, weights), expected, None, torch.tensor([0]), row,
                within=within)


def g(x):
    return 1 / (1 + exp(-x))


def share(own, other, negative):
    """smoothap: a positive's rank among the positives over its rank among all."""
    return (1 + g(other - own)) / (1 + g(other - own) + g(negative - own))


def missed(own, other, negative):
    """recallatk: tau1 .5, tau2 1, k 1 and 3; two positives, whose ranks are r."""
    r = (1 + g(other - own) + g(negative - own), 1 + g(own - other) + g(negative - other))
    found = {k: sum(g((k - rank) / .5) for rank in r) for k in (1, 3)}
    return 1 - (min(1, found[1]) / 1 + min(3, found[3]) / 2) / 2


# THREE_AND_ONE: of each anchor the cosines with its two positives and the negative.
ANCHORS = [(.6, 0, -1), (.6, .8, -.6), (0, .8, 0)]
# softtriple, ONE at gamma .5: the similarity to AXES as centres; to the opposite ones it is MINUS.
PLUS = (.6 * exp(1.2) + .8 * exp(1.6)) / (exp(1.2) + exp(1.6))
MINUS = -(.6 * exp(-1.2) + .8 * exp(-1.6)) / (exp(-1.2) + exp(-1.6))
SNR_ROWS = [[1, -1, 0, 0], [1, 0, -1, 0], [-1, 1, 0, 0], [1, -1, .4, 0]]

BY_HAND = [
    # max(0, 2 - 4 + .2) = 0 and max(0, 2 - .8 + .2) = 1.4.
    hand("triplet", TripletLoss(margin=0.2), 0.7, TWO, active=1 / 2),
    # Positives sqrt 2 - 1.2 + .2 twice; negatives 1.2 - 2 + .2 < 0, and 1.2 - sqrt .8 + .2; nu
    # (1.2 + 1.2) / 3.
    hand("marginloss", MarginLoss(2, nu=0.5), (2 * (sqrt(2) - 1) + 1.4 - sqrt(.8) + 1.2) / 3, TWO,
         active=3 / 4, within=1e-7),
    # d_aa = 0 and .7 leave .2 above beta .5: of no image, so not active. .5 - sqrt .8 + .7.
    hand("marginloss of a rho row", MarginLoss(2, 0.7, beta=0.5), (.2 + 1.2 - sqrt(.8)) / 2,
         [(0, 0, 1)], active=1 / 2, within=1e-7),
    # Class 0: a = (1, 0), p = (2, 0), n = (0, 1): a.n - a.p = -2, |a|^2 + |p|^2 = 5. Class 1:
    # a = p = (0, 1), n = (2, 0): -1 and 2.
    hand("npair", NPairLoss(0.02), (log(1 + exp(-2)) + log(1 + exp(-1))) / 2 + .02 * 3.5,
         [(0, 1, 3), (2, 3, 1)], torch.tensor([0, 0, 1, 1]), [[1, 0], [2, 0], [0, 1], [0, 1]]),
    # x becomes (3, 0), the proxies (3, 0), its own, (-3, 0) and (0, 3): d = 0, 36 and 18. Without
    # its own -log(1 / (e^-36 + e^-18)), a negative loss.
    one_image("proxynca", ProxyNCALoss(3, 2), [[2, 0], [-1, 0], [0, 7]], -18 + exp(-18), [[5, 0]]),
    # s 2, m pi / 6: 60 degrees from its own weight and 30 from the other: 2 cos 90, 2 cos 30.
    one_image("arcface", ArcFaceLoss(2, 2, 2.0, math.pi / 6), AXES, log(1 + exp(sqrt(3))),
              [[.5, sqrt(.75)]]),
    # s 1, m 1, opposite to its own weight: theta + m = pi + 1, so the logit is cos pi - 1 sin 1.
    one_image("arcface beyond pi", ArcFaceLoss(2, 2, 1.0, 1.0), AXES,
              log(1 + exp(1 + math.sin(1))), [[-1, 0]]),
    # Positives sqrt 2, sqrt 3.2; nearer than 1: sqrt .8, sqrt .4. Each pair counts twice: 4
    # positive and 4 of the 8 negative pairs are active.
    hand("contrastive", ContrastiveLoss(), 2.6 + ((1 - sqrt(.8)) ** 2 + (1 - sqrt(.4)) ** 2) / 2,
         active=8 / 12),
    # The negative is 2 away.
    hand("contrastive of a triplet", ContrastiveLoss(), 2, [(0, 2, 3)], active=1 / 2),
    # l2 .01, lengths 1; sqrt .8 + 1 - 2 < 0, not active; sqrt 2 + 1 - sqrt 2 = 1.
    hand("lifted", LiftedLoss(lifted_l2=0.01), .51, [(0, 1, 3), (2, 3, 0)],
         torch.tensor([0, 0, 1, 1]), active=1 / 2),
    # alpha 2, beta 5, lambda .5, all pairs; of each anchor the positive, the two negatives.
    hand("multisimilarity", MultiSimilarityLoss(2.0, 5.0, 0.5, sampling="none"),
         sum(log(1 + exp(-2 * (p - .5))) / 2 + log(1 + exp(5 * (n - .5)) + exp(5 * (m - .5))) / 5
             for p, n, m in ((0, .6, -1), (-.6, .6, .8), (0, .8, 0), (-.6, -1, 0))) / 4),
    # A positive that coincides with its anchor counts where a negative is as similar: three images
    # at one point, lambda .5, anchors 0 and 1 have s_p = s_n = 1; image 2 has no positive.
    hand("multisimilarity identical", MultiSimilarityLoss(multisimilarity_lambda=0.5),
         2 / 3 * (log(1 + exp(-1)) / 2 + log(1 + exp(25)) / 50), None, torch.tensor([0, 0, 1]),
         [[1, 0]] * 3),
    # m .4, g 2, s_p 0, s_n .6. Negative: weight .6 + .4, 1 (.6 - .4). Positive: 1.4 (.6 - 0).
    hand("circle", CircleLoss(circle_gamma=2.0), log(1 + exp(2 * (.2 + .84))), [(0, 2, 1)]),
    # T .5: an anchor's other positive is in no denominator; anchor 3 has no positive.
    hand("ntxent", NTXentLoss(0.5), sum(log(1 + exp(2 * (n - p))) + log(1 + exp(2 * (n - q)))
                                        for p, q, n in ANCHORS) / 6, None, THREE_AND_ONE),
    # T .5: -1/2 (2 p + 2 q) + log(e^2p + e^2q + e^2n).
    hand("supcon", SupConLoss(0.5), sum(log(exp(2 * p) + exp(2 * q) + exp(2 * n)) - p - q
                                        for p, q, n in ANCHORS) / 3, None, THREE_AND_ONE),
    # The anchor twice as long; 45 degrees, so t = 1; weight 3, l2 .02. n-pair: a.n - a.p = 1.2 and
    # .02 (4 + 1). On unit vectors: 4 (1, 1).(.6, .8) - 4 x 0 = 5.6.
    hand("angular", AngularLoss(angular_weight=3.0),
         log(1 + exp(1.2)) + .1 + 3 * log(1 + exp(5.6)), [(0, 2, 1)],
         rows=[[2, 0], *HAND[1:].tolist()]),
    # Nodes -1, 0, 1. Positives 0 and -.6: h+ = (.6, 1 + .4, 0) / 2, cumulated (.3, 1, 1).
    # Negatives .6, -1, .8, 0: h- = (1, .4 + .2 + 1, .6 + .8) / 4.
    hand("histogram", HistogramLoss(2), .25 * .3 + .4 + .35),
    # Nodes 0, 2, 4; each query has one positive; H includes it. Query 0: h+ = (0, 1, 0), H = (.6,
    # 2, 3); 1: h+ = (0, .4, .6), H = (1.4, 2.4, 3); 2: h+ = (0, 1, 0), H = (.8, 3, 3); 3: h+ =
    # (0, .4, .6), H = (0, 1.4, 3).
    hand("fastap", FastAPLoss(2), 1 - (1 / 2 + .16 / 2.4 + .2 + 1 / 3 + .16 / 1.4 + .2) / 4),
    hand("smoothap", SmoothAPLoss(1.0), 1 - sum(share(p, q, n) + share(q, p, n)
                                                for p, q, n in ANCHORS) / 6, None, THREE_AND_ONE),
    hand("recallatk", RecallAtKLoss([1, 3], 0.5, 1.0), sum(missed(*row) for row in ANCHORS) / 3,
         None, THREE_AND_ONE),
    # a = (1, -1, 0, 0): four times its variance is 2. a - p = (0, -1, 1, 0): 2 / 2. a - n = (2,
    # -2, 0, 0): 8 / 2, 1 - 4 + .2 < 0. a - n' = (0, 0, -.4, 0), its mean -.1: (.16 - 4 x .01) / 2
    # = .06. One of two is active: 1 - .06 + .2, and .5 x .4 / 4 for the sums 0, 0, 0, .4.
    hand("snr", SNRLoss(snr_lambda=0.5), 1.19, [(0, 1, 2), (0, 1, 3)],
         torch.tensor([0, 0, 1, 1]), SNR_ROWS, active=1 / 2),
    # (0, 2, 3, 1): max(0, 2 - 4 + 2.5) + max(0, 2 - 3.2 + 1.5) = .5 + .3. (0, 2, 1), no third
    # class: max(0, 2 - .8 + 2.5) = 3.7.
    hand("quadruplet", QuadrupletLoss(2.5, 1.5), 2.25, [(0, 2, 3, 1), (0, 2, 1, -1)],
         torch.tensor([0, 1, 0, 2]), active=1),
    # alpha 2, delta .1, images (.6, .8) and (0, 1), both of class 0, three proxies. The one with
    # images: -2 (.6 - .1), -2 (0 - .1). Against others: none, 2 (.8 + .1) and 2 (1 + .1), 2 (-.6 +
    # .1) and 2 (0 + .1).
    hand("proxyanchor", with_weights(ProxyAnchorLoss(3, 2, 2.0), [*AXES, [-2.0, 0.0]]),
         log(1 + exp(-1) + exp(.2))
         + (log(1 + exp(1.8) + exp(2.2)) + log(1 + exp(-1) + exp(.2))) / 3,
         None, torch.tensor([0, 0]), HAND[1:3]),
    # T .5: squared distances .8 to the own proxy and .4.
    one_image("proxynca++", ProxyNCAPlusPlusLoss(2, 2, 0.5), AXES, log(1 + exp(.4 / .5))),
    # Logits 1 and 1 + .5.
    one_image("crossentropy", CrossEntropyLoss(2, 2), [[1, 0], [0, 1]], log(1 + exp(.5)),
              [[1, 1]]),
    # T .5.
    one_image("normsoftmax", NormSoftmaxLoss(2, 2, 0.5), AXES, log(1 + exp((.8 - .6) / .5))),
    # s 5, m .35.
    one_image("cosface", CosFaceLoss(2, 2, 5.0), AXES, log(1 + exp(5 * (.8 - (.6 - .35))))),
    # m 2, s 2, 120 degrees from its own weight and 30 from the other: the second half turn, psi =
    # -cos 240 - 2 = -1.5. With l = 1 the own logit is 2 (-.5 - 1.5) / 2, the other 2 cos 30.
    one_image("sphereface", SphereFaceLoss(2, 2, 2, 1.0, 2.0), AXES, log(1 + exp(sqrt(3) + 2)),
              [[-.5, sqrt(.75)]]),
    # 4 (S' - S + .1), and tau (sqrt 2 + sqrt 2) / (2 x 2 x 1); 1e-5 is added to the distances.
    one_image("softtriple", SoftTripleLoss(2, 2, 2, 4.0, 0.5, 0.1, 0.3),
              [AXES, [[-2.0, 0.0], [0.0, -3.0]]],
              log(1 + exp(4 * (MINUS - PLUS + .1))) + .3 * 2 * sqrt(2) / 4, within=1e-5)]


@pytest.mark.parametrize("loss, expected, tuples, labels, rows, active, within", BY_HAND)
def test_by_hand(loss, expected, tuples, labels, rows, active, within):
    """Lengths of vectors do not matter to losses of one image; active, where it says so."""
    rows = torch.as_tensor(rows, dtype=torch.float64)
    if isinstance(loss, CrossEntropyLoss):
        loss.classifier.bias.data = torch.tensor([0, 0.5], dtype=torch.float64)
    if isinstance(loss, SphereFaceLoss):
        loss.steps.fill_(10 ** 6)  # l is the least
    assert loss.double()(rows, labels, tuples).item() == pytest.approx(expected, abs=within)
    if active is not None:
        assert loss.active.dim() == 0 and loss.active.item() == pytest.approx(active)


# ---- what indices_tuple may be

def test_forms_of_indices_tuple():
    """A tensor of any whole type, lists, index vectors, numpy arrays; -1 anywhere: no tuple."""
    labels, rows = torch.arange(8) // 2, [[0, 1, 2], [4, 5, 1]]
    tensor = torch.tensor(rows)
    for form in (tensor, tensor.int(), rows, [tuple(row) for row in rows], tensor.unbind(1),
                 tensor.int().unbind(1), tuple(tensor.t().numpy())):
        assert losses.tuples_for(None, None, labels, form, 3).tolist() == rows
    missing = [[0, 1, 2], [0, -1, 2], [0, 1, -1], [-1, 1, 2]]
    assert losses.tuples_for(None, None, labels, missing).tolist() == rows[:1] + [[-1] * 3] * 3
    wide = [[0, 1, 2, -1, 4]]
    assert losses.tuples_for(None, None, labels, wide).tolist() == wide
    for form in ([], NONE, torch.empty(0, 5), (torch.empty(0),) * 3, (NONE[:, 0],) * 4):
        assert losses.tuples_for(None, None, labels, form, 3).shape == (0, 3)
    # Pairs (a1, p, a2, n): the triplets of those that share their anchor.
    pairs = tuple(map(torch.tensor, ([0, 0, 2, 4], [1, 1, 3, -1], [0, 0, 4, 2], [2, 5, 0, -1])))
    assert losses.tuples_for(None, None, labels, pairs, 3).tolist() == [[0, 1, 2], [0, 1, 5]]
    positive, negative = losses.given_pairs(pairs, labels)
    assert positive.nonzero().tolist() == [[0, 1], [2, 3]]
    assert negative.nonzero().tolist() == [[0, 2], [0, 5], [4, 0]]
    for wrong, says in (
            (torch.tensor([[0, 1], [2, 3]]), "neither"), ([0, 1, 2], "neither"),
            (wide, "neither"), (tensor.unbind(1)[:2], "neither"),
            ([[0, 1, 8]], "from 0 to 8; the batch has 8"), ([[0, 1, -2]], "from -2 to 1"),
            (tuple(torch.tensor([i]) for i in (0, 1, 2, 9)), "from 9 to 9")):
        with pytest.raises(ValueError, match=f"indices_tuple .*{says}"):
            losses.tuples_for(None, None, labels, wrong, 3)


@every_loss
def test_given_tuples(name):
    """They replace the sampler: nothing is drawn. A miner's pairs are triplets of one anchor.

    They weigh the images of a loss with class weights: 0 stands in four places, 1 in two, 2 and 3
    in one. None at all: a zero in the graph, or what regularises the loss, with its gradients.
    """
    loss = build(name)
    x, labels = make_batch(loss)
    rows, tuples = some_triplets(labels), torch.tensor(some_triplets(labels, 10, loss))
    state = torch.get_rng_state()
    value = loss(x, labels, tuples)
    assert torch.equal(torch.get_rng_state(), state)
    padded = torch.cat([tuples, torch.full((2, tuples.shape[1]), -1)])
    assert_same(loss, x, loss(x, labels, padded.tolist()), value)
    if isinstance(loss, ClassLoss):
        pairs, rows = ([0, 0], [1, 2], [0, 3, -1], [1, 0, 2]), [[0, 1], [0, 2], [0, 1], [3, 0]]
        assert weights_of(labels, rows)[:4] == [1, 0.5, 0.25, 0.25]
        assert_same(loss, x, loss(x, labels, tuple(map(torch.tensor, pairs))),
                    ORACLES[name](loss, x, labels, rows))
    elif name != "contrastive":  # whose means over pairs and over triplets differ
        pairs = (*torch.tensor(sorted({(a, p) for a, p, _ in rows})).unbind(1),
                 *torch.tensor(sorted({(a, n) for a, _, n in rows})).unbind(1))
        torch.testing.assert_close(seeded(loss, x, labels, pairs), seeded(loss, x, labels, rows))
    for none in (NONE, [], (NONE[:, 0],) * 4, [[-1] * 3]):
        assert_same(loss, x, loss(x, labels, none), regulariser(loss, x))
    if not isinstance(loss, (NPairLoss, AngularLoss, ClassLoss)):
        with pytest.raises(ValueError):  # a second negative
            loss(x, labels, [[0, 1, 2, 3, 8]])


@pytest.mark.parametrize("name", ["contrastive", "lifted", "multisimilarity", "circle", "ntxent",
                                  "supcon", "histogram", "fastap", "smoothap", "recallatk"])
def test_pairs_of_a_miner_count_as_they_are(name):
    """Those of images without a positive too: all pairs are the default."""
    loss = build(name, **{"sampling": "none"} if LOSSES[name].samplings else {})
    x, _ = make_batch(loss)
    same, positive = Sampler.pair_masks(UNEVEN)
    pairs = (*positive.nonzero(as_tuple=True), *(~same).nonzero(as_tuple=True))
    torch.testing.assert_close(loss(x, UNEVEN, pairs), loss(x, UNEVEN))


def test_rho_pull_has_no_gradient_in_the_matrix_of_all_pairs():
    """500 dimensions in float32: |a|^2 + |a|^2 - 2 a.a is rounding, whose root has a slope."""
    rows = (100 * torch.randn(4, 500)).requires_grad_()
    anchors = torch.arange(4).repeat(10)
    sq_aa, _ = losses.pair_sq_distances(rows, anchors, anchors, anchors.flip(0))
    losses.distance_from_square(sq_aa).sum().backward()
    assert not sq_aa.any() and not rows.grad.any()


# ---- number types

@every_loss
def test_every_float_type_is_near_float64(name):
    """Half types too: the arithmetic is float32 at least, also under autocast."""
    for dtype, count in ((torch.float16, 16), (torch.bfloat16, 3), (torch.float32, 128),
                         (torch.float64, 16)):
        loss, exact = (build(name, 256, 32, kind) for kind in (torch.float32, torch.float64))
        x, labels = make_batch(loss, count, (count + 1) // 2, 32)
        # Raw embeddings grow in training.
        x = (x.detach() * (1 if loss.unit_norm else 5)).to(dtype).requires_grad_()
        given = torch.tensor(some_triplets(labels, 4 * count if count == 16 else 1, loss))
        for tuples in [given] + [None] * (loss.sampler is None):
            value = loss(x, labels, tuples)
            assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                assert loss(x, labels, tuples) == value
            # A cosine's rounding in float32, 1e-7, over a temperature of 0.01.
            torch.testing.assert_close(
                value.double(), exact(x.double(), labels, tuples), rtol=1e-5,
                atol=2e-4 if name in ("smoothap", "recallatk") else 1e-5)
            value.backward()
            assert x.grad.dtype == dtype and x.grad.isfinite().all()


# ---- bad input, and the table that --loss reads

@pytest.mark.parametrize("name", ["triplet", "marginloss", "crossentropy"])
def test_bad_embeddings_and_labels_are_named(name):
    """Not finite: how many, the first row and its class. Shapes, types and the classes' range."""
    loss = build(name)
    x, labels = make_batch(loss)
    broken = x.detach().clone()
    broken[[7, 9], 1] = torch.tensor([math.nan, math.inf]).double()
    for rows in (broken, broken.half()):
        with pytest.raises(FloatingPointError, match="2 of 12 .* row 7 of the batch, of class "
                                                     f"{int(labels[7])};"):
            loss(rows, labels)
    for rows, names in ((x, labels[:-1]), (x, labels[:, None]), (x[None], labels[None])):
        with pytest.raises(ValueError) as error:
            loss(rows, names)
        assert f"{list(rows.shape)} with" in str(error.value)
        assert f"{list(names.shape)};" in str(error.value)
    for dtype in (torch.int32, torch.uint8):
        assert seeded(loss, x, labels.to(dtype)) == seeded(loss, x, labels)
    for dtype in (torch.float32, torch.bool):
        with pytest.raises(ValueError, match="must be whole numbers"):
            loss(x, labels.to(dtype))
    for wrong in (NUM_CLASSES, -1) if loss.num_classes else ():
        labels[3] = wrong
        with pytest.raises(ValueError, match=f"for 4 classes, 0 to 3; .*from {min(0, wrong)} to "
                                             f"{max(3, wrong)}"):
            loss(x, labels)


PARSER = argparse.ArgumentParser()
losses.add_arguments(PARSER)
samplers.add_arguments(PARSER)
# Those filled in later are set to values of their own.
PARSER.set_defaults(embed_dim=DIM, proxy_lr=3e-3, loss_lr=4e-3, lr=1e-5)
SAMPLER_FLAGS = {action.dest: action for action in PARSER._actions
                 if action.dest in losses.defaults_of(Sampler)}
FLAGS = SAMPLER_FLAGS | {action.dest: action for action in PARSER._actions
                         if action.container.title == "loss" and action.dest != "loss"}

# Each flag that takes a number: what is outside of its domain, and what is at its ends.
DOMAINS = dict.fromkeys((
    "arcface_scale", "contrastive_margin", "multisimilarity_alpha", "multisimilarity_beta",
    "circle_gamma", "ntxent_temperature", "supcon_temperature", "smoothap_temperature",
    "recallatk_tau1", "recallatk_tau2", "proxyanchor_alpha", "proxyncapp_temperature",
    "normsoftmax_temperature", "cosface_scale", "sphereface_scale", "softtriple_lambda",
    "softtriple_gamma"), ([0.0, -1.0], []))
DOMAINS |= dict.fromkeys((
    "margin", "beta", "nu", "l2npair", "lifted_margin", "lifted_l2", "angular_weight",
    "snr_margin", "snr_lambda", "quadruplet_margin1", "quadruplet_margin2", "sphereface_lambda",
    "softtriple_delta", "softtriple_tau", "mining_epsilon"), ([-1e-3], [0.0]))
DOMAINS |= dict.fromkeys(("histogram_bins", "fastap_bins", "sphereface_margin",
                          "softtriple_centers"), ([0, -4], [1]))
DOMAINS |= {
    "arcface_margin": ([-0.01, 3.15], [0.0, math.pi]), "circle_margin": ([-1.0, 1.0], [0.0]),
    "multisimilarity_lambda": ([-1.1, 1.1], [-1.0, 1.0]), "angular_alpha": ([0.0, 90.0], []),
    "recallatk_k": ([[0], [1, -2]], [[1]]), "proxyanchor_delta": ([-1.1, 1.1], [-1.0, 1.0]),
    "cosface_margin": ([-0.1, 2.1], [0.0, 2.0]), "rho_probability": ([-0.1, 1.1], [0.0, 1.0]),
    "distance_cutoff": ([0.4, -1.0], [])}
# What the papers or the reference runs have; a changed one moves every result with it.
DEFAULTS = {
    "margin": 0.2, "beta": 1.2, "beta_constant": False, "nu": 0.0, "l2npair": 0.02,
    "proxynca_positive_in_denominator": False, "arcface_scale": 64.0, "arcface_margin": 0.5,
    "contrastive_margin": 1.0, "contrastive_linear": False, "lifted_margin": 1.0,
    "lifted_l2": 0.005, "multisimilarity_alpha": 2.0, "multisimilarity_beta": 50.0,
    "multisimilarity_lambda": 1.0, "circle_margin": 0.4, "circle_gamma": 80.0,
    "ntxent_temperature": 0.1, "supcon_temperature": 0.1, "angular_alpha": 45.0,
    "angular_weight": 2.0, "histogram_bins": 100, "fastap_bins": 10,
    "smoothap_temperature": 0.01, "recallatk_k": (1, 2, 4, 8, 16), "recallatk_tau1": 1.0,
    "recallatk_tau2": 0.01, "snr_margin": 0.2, "snr_lambda": 0.005, "quadruplet_margin1": 0.2,
    "quadruplet_margin2": 0.2, "proxyanchor_alpha": 32.0, "proxyanchor_delta": 0.1,
    "proxyncapp_temperature": 1 / 9, "normsoftmax_temperature": 0.05, "cosface_scale": 64.0,
    "cosface_margin": 0.35, "sphereface_margin": 4, "sphereface_lambda": 5.0,
    "sphereface_scale": 64.0, "softtriple_centers": 10, "softtriple_lambda": 20.0,
    "softtriple_gamma": 0.1, "softtriple_delta": 0.01, "softtriple_tau": 0.2}


def read_by(name):
    """The flags, learning rate aside, that the loss and its sampler read."""
    own = set(losses.defaults_of(LOSSES[name])) & set(FLAGS)
    if "sampling_options" not in inspect.signature(LOSSES[name]).parameters:
        return own
    return (own | set(SAMPLER_FLAGS) | {"form"}) - (
        {"margin"} if name == "quadruplet" else set())  # facenet's, of which that has its own


def options(name, *argv, sampling=None):
    """The parsed flags, with a sampling that makes a sampler where the loss has any."""
    sampling = sampling or next((sampling for sampling in ("distance", "semihard", "npair")
                                 if sampling in LOSSES[name].samplings), "none")
    return PARSER.parse_args(["--loss", name, "--sampling", sampling, *argv])


def contents(opt):
    """What loss_select builds, as comparable values: attributes, weights and learning rates."""
    torch.manual_seed(0)
    loss, group = loss_select(opt, NUM_CLASSES)
    found = {"rate": group and group["lr"],
             "parameters": [key for key, _ in loss.named_parameters()],
             "state": {key: value.tolist() for key, value in loss.state_dict().items()}}
    for holder in loss.modules():
        found |= {(type(holder), key): value for key, value in vars(holder).items()
                  if isinstance(value, (bool, int, float, str, tuple, list, type(None)))}
    return found


def another(action):
    """A value other than the flag's default, in its domain and of its type."""
    if action.nargs == 0 or action.choices:
        return next(value for value in action.choices or (True,) if value != action.default)
    if action.default is None or action.dest.endswith("_lr"):
        return 1.3
    if action.nargs == "+":
        return [1, 3]
    return action.default + 1 if action.type is int else action.default / 2 or 0.01


@every_loss
def test_flags(name):
    """Each flag changed on its own changes what is built, for a loss that reads it, or nothing.

    Flags' and constructors' defaults are equal; a group of weights has the rate of its flag.
    """
    loss_class, opt = LOSSES[name], options(name)
    loss, group = loss_select(opt, NUM_CLASSES)
    assert type(loss) is loss_class
    weights = list(loss.parameters())
    assert group == ({"params": weights, "lr": vars(opt)[loss_class.lr_flag], "weight_decay": 0}
                     if weights else None)
    assert bool(weights) == bool(loss_class.lr_flag)
    before, reads = contents(opt), read_by(name) | {loss_class.lr_flag}
    for flag, action in FLAGS.items():
        changed = options(name)
        setattr(changed, flag, another(action))
        assert (contents(changed) != before) == (flag in reads), flag
    defaults = losses.defaults_of(loss_class)
    for flag in set(defaults) & set(FLAGS) - {"form"}:
        default = FLAGS[flag].default
        default = tuple(default) if isinstance(default, list) else default
        assert defaults[flag] == default == DEFAULTS[flag], flag
    assert defaults.get("sampling", "npair") == (*loss_class.samplings, "npair")[0]
    assert list(inspect.signature(loss_class.forward).parameters) == [
        "self", "embeddings", "labels", "indices_tuple"]


@every_loss
def test_domains_of_the_flags(name):
    """ValueError with flag and value outside, NaN and infinity too; the ends are in.

    A sampling that the loss cannot use is refused with those that it can.
    """
    for flag in read_by(name) & set(DOMAINS):
        outside, ends = DOMAINS[flag]
        not_numbers = [math.nan, math.inf, -math.inf] if FLAGS[flag].type is float else []
        for value in outside + not_numbers:
            opt = options(name)
            setattr(opt, flag, value)
            with pytest.raises(ValueError) as error:
                loss_select(opt, NUM_CLASSES)
            worst = min(value) if isinstance(value, list) else value
            assert f"--{flag} {worst}: " in str(error.value)
        for value in ends:
            loss = loss_select(options(name), NUM_CLASSES, **{flag: value})[0]
            check_loss.LossCheck(name).is_finite(loss, *make_batch(loss), f"{flag} {value}")
    for sampling in {*samplers.METHODS, "none", "nonsense"} - {*LOSSES[name].samplings}:
        if "sampling" in losses.defaults_of(LOSSES[name]):
            with pytest.raises(ValueError, match=f"--sampling {sampling}; it takes "
                                                 f"{', '.join(LOSSES[name].samplings)}"):
                build(name, sampling=sampling)


def test_the_tables_have_every_loss_and_flag():
    by_hand = {case.id.split()[0] for case in BY_HAND}
    assert set(ORACLES) == by_hand == set(LOSSES)
    assert set(DOMAINS) == {flag for flag, action in FLAGS.items()
                            if action.type in (int, float) and not flag.endswith("_lr")}
    assert {*losses.TRIPLET_SAMPLINGS, "npair"} == set(samplers.METHODS)


def test_what_sets_a_loss_apart():
    """Raw embeddings: those with a penalty of the lengths. Rates: the authors' factors."""
    def said(what, usual):
        return {name: getattr(loss, what) for name, loss in LOSSES.items()
                if getattr(loss, what) != usual}

    assert set(said("unit_norm", True)) == {"npair", "lifted", "angular"}
    assert "distance" not in LOSSES["lifted"].samplings  # which is for unit-norm rows
    assert said("lr_factor", 1) == {
        **dict.fromkeys(("proxyanchor", "proxynca++", "softtriple"), 100),
        **dict.fromkeys(("arcface", "cosface", "sphereface", "normsoftmax"), 50)}
    assert said("default_samples_per_class", 4) == {"proxynca": 1}
    assert set(said("min_samples_per_class", 2)) == set(said("lr_flag", None)) - {"marginloss"}
    assert {name for name, flag in said("lr_flag", None).items() if flag != "loss_lr"} == {
        "marginloss", "proxynca"}
    assert set(said("stops_gradients", False)) == {"circle"}
    assert set(said("rotation_invariant", True)) == {"snr"}


@pytest.mark.parametrize("name, length", [
    ("arcface", 3 ** -0.5), ("cosface", 3 ** -0.5), ("normsoftmax", 3 ** -0.5), ("sphereface", 1),
    ("softtriple", (128 / 3000) ** 0.5), ("proxynca", 128 ** 0.5 / 8),
    ("proxynca++", 128 ** 0.5 / 8), ("proxyanchor", (128 * 2 / 100) ** 0.5)])
def test_own_weights_start_at_the_lengths_of_the_authors_code(name, length):
    """In the root mean square, 100 classes in 128 dimensions: from -b to b it is b sqrt(D / 3).

    b is 1 / sqrt(D) of torch.nn.Linear; sqrt(3 / D) of Caffe's xavier, which SphereFace has; and
    1 / sqrt(C K) for SoftTriple's ten centres.
    """
    weight, = build(name, 100, 128).parameters()
    assert weight.square().sum(-1).mean().sqrt().item() == pytest.approx(length, rel=0.02)


def test_facenet_uses_the_margin_and_the_distance_of_the_loss():
    for loss, margin, squared in (
            (TripletLoss(0.7, "facenet"), 0.7, True),
            (MarginLoss(2, 0.7, sampling="facenet"), 0.7, False),
            (loss_select(options("quadruplet", "--margin", "0.7", "--quadruplet_margin1", "0.3",
                                 sampling="facenet"), 4)[0], 0.3, True)):
        assert (loss.sampler.margin, loss.sampler.squared) == (margin, squared)


def test_repr_and_checkpoint_of_marginloss():
    loss = MarginLoss(3, beta=0.5, beta_constant=True, sampling="rho", rho_probability=0.15)
    loss(torch.randn(4, DIM), torch.tensor([0, 0, 1, 1]))
    for part in ("num_classes=3", "margin=0.2", "'rho'", "rho_probability=0.15"):
        assert part in repr(loss)
    assert "active" not in repr(loss) and "sampler=None" in repr(ArcFaceLoss(3, 4))
    assert loss.state_dict()["beta"].tolist() == [0.5] * 3 and not list(loss.parameters())


# ---- single losses

@pytest.mark.parametrize("form, labels, triplets, possible", [
    ("paper", [0, 0, 1, 2, 2, 3], [[0, 1, 2], [3, 4, 0], [-1] * 3], ([3, 4, 5], [2, 5], [-1])),
    ("paper", [0, 0, 1, 1, 1, 0], [[0, 1, 2], [3, 4, 0]], ([-1], [-1])),
    ("reference", [0, 0, 1, 1, 2], [[0, 1, 2], [1, 0, 2], [2, 3, 0], [3, 2, 1], [-1] * 3],
     ([2, 3], [2, 3], [0, 1, 3], [0, 1, 2], [-1]))])
def test_fourth_images_of_a_quadruplet(form, labels, triplets, possible):
    """Any image of a third class, each as often; -1 where there is none, or no tuple.

    Of the reference's, the anchor of a row with another negative: 500 draws.
    """
    torch.manual_seed(0)
    labels, triplets = torch.tensor(labels), torch.tensor(triplets)
    loss = QuadrupletLoss(form=form)
    fours = torch.stack([loss.complete(triplets, labels) for _ in range(500)])
    assert (fours[:, :, :3] == triplets).all()
    for t, images in enumerate(possible):
        found, counts = fours[:, t, 3].unique(return_counts=True)
        if triplets[t, 0] >= 0 or form == "reference":
            assert found.tolist() == images and (counts - 500 / len(images)).abs().max() < 50
    assert loss.complete(NONE, labels).shape == (0, 4)


@pytest.mark.parametrize("name, flag, values", [
    ("arcface", "arcface_margin", (0.0, 0.1, 1.0, 2.0, math.pi)),
    ("sphereface", "sphereface_margin", (1, 2, 3, 5))])
def test_every_angle_to_the_own_weight(name, flag, values):
    """From 1 to 179 degrees, on both sides of the jumps of arcface and sphereface."""
    for value in values:
        loss = with_weights(build(name, 2, 2, **{flag: value}), [[1.0, 0], [0, 1.0]])
        for degrees in range(1, 180, 7):
            angle, labels = math.radians(degrees), torch.tensor([0])
            x = torch.tensor([[math.cos(angle), math.sin(angle)]]).double().requires_grad_()
            assert_same(loss, x, loss(x, labels), ORACLES[name](loss, x, labels))


def test_arcface_at_its_weight_and_opposite_to_it():
    """Where the sine's derivative is infinite, and close to there: finite, and not huge."""
    weight, noise = torch.randn(2, 3, 16, generator=torch.Generator().manual_seed(2))
    for dtype, margin, sign, nudge in itertools.product(
            (torch.float16, torch.float32, torch.float64), (0.0, 0.5, 2.0, math.pi), (1, -1),
            (0, 1e-7, 1e-6, 1e-4)):
        loss = ArcFaceLoss(3, 16, arcface_margin=margin)
        loss.weight.data = weight.clone()
        x = (sign * F.normalize(weight, dim=1) + nudge * noise).to(dtype).requires_grad_()
        value = loss(x, torch.arange(3))
        value.backward()
        assert value.isfinite()
        assert x.grad.abs().max() < 1e3 and loss.weight.grad.abs().max() < 1e3


def test_sphereface_anneals_with_the_training_steps():
    """l = max(5, 1500 / (1 + t / 10)) at step t, which the checkpoint has; evaluation counts none.

    t = 10: 750; from t = 2990 on 5.
    """
    loss, restored = build("sphereface"), build("sphereface")
    x, labels = make_batch(loss)
    for step in (0, 10, 2989, 2990, 9_000_000):
        loss.steps.fill_(step)
        expected = ORACLES["sphereface"](loss, x, labels)
        for training in (False, True):
            assert_same(loss, x, loss.train(training)(x, labels), expected)
        assert loss.steps.item() == step + 1
    restored.load_state_dict(loss.state_dict())
    assert restored.steps.item() == step + 1


def test_softtriple_merges_centres():
    """Coinciding centres have the least penalty, with a finite gradient; one centre has none."""
    apart, together, one = (build("softtriple", softtriple_centers=k) for k in (3, 3, 1))
    together.centers.data[:, 1:] = together.centers.data[:, :1]
    empty = *make_batch(one), NONE
    assert one(*empty) == 0 and together(*empty) < 0.01 < apart(*empty)
    together(*empty).backward()
    assert together.centers.grad.abs().max() < 100


@pytest.mark.parametrize("variant", ["triplet", "marginloss-nu", "contrastive", "lifted", "snr",
                                     "contrastive-linear", "quadruplet"])
def test_no_active_tuple_gives_zero(variant):
    """Positives that coincide and antipodal negatives: every term is below zero."""
    loss, labels = build(variant), torch.tensor([0, 0, 1, 1])
    x = torch.tensor([[1.0], [1], [-1], [-1]]).double() * torch.eye(DIM)[0]
    for tuples in (None, some_triplets(labels), some_triplets(labels) * 5):
        value, rest = loss(x.requires_grad_(), labels, tuples), regulariser(loss, x)
        # A distance of 0 counts as 1e-8, for its gradient's sake.
        assert value.item() == pytest.approx(rest.item(), abs=2e-8) and loss.active == 0
        assert_same(loss, x, value - value.detach(), rest - rest.detach())


def test_what_smoothap_recallatk_and_proxynca_keep():
    """A few [B, B], not one for each of 31 positives; proxies [C, D], no copy [B, C - 1, D]."""
    for name, count, classes, dim, most in (("smoothap", 64, 2, DIM, 16 * 64 ** 2),
                                            ("recallatk", 64, 2, DIM, 16 * 64 ** 2),
                                            ("proxynca", 16, 300, 16, 6 * 300 * 16)):
        loss, kept = build(name, classes, dim), {}
        x, labels = make_batch(loss, count, classes, dim)

        def note(tensor):
            kept[tensor.data_ptr()] = tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            value = loss(x, labels)
        value.backward()
        assert sum(kept.values()) <= most and x.grad.isfinite().all() and x.grad.any()


def test_lifted_far_from_the_origin_keeps_its_digits():
    generator = torch.Generator().manual_seed(0)
    rows, labels = 0.2 * torch.randn(16, 8, generator=generator), torch.arange(16) // 4
    loss = LiftedLoss(lifted_l2=0.0)
    assert float(loss(rows + 100, labels)) == pytest.approx(float(loss(rows, labels)), rel=1e-4)


def test_a_forgotten_flag_or_learning_rate_is_said(monkeypatch):
    class NewLoss(CrossEntropyLoss):
        lr_flag = None

        def __init__(self, num_classes, embed_dim, new_margin=0.1):
            super().__init__(num_classes, embed_dim)

    monkeypatch.setitem(LOSSES, "triplet", NewLoss)
    with pytest.raises(ValueError, match="NewLoss takes new_margin, which no flag gives"):
        loss_select(options("triplet"), NUM_CLASSES)
    with pytest.raises(ValueError, match="NewLoss has weights.*not None"):
        loss_select(options("triplet"), NUM_CLASSES, new_margin=0.1)
