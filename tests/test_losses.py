"""The losses against their equations, written as loops over tuples and classes in float64.

Values and gradients are compared on given tuples and on the loss's own sampling, whose draw is
repeated under the same seed. Then invariances, number types, degenerate batches, what is known to
be wrong elsewhere, bad input, the table that --loss reads, and the checks of check_loss.py.
"""

import argparse
import inspect
import math
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import check_loss
import losses
import samplers
from losses import (LOSSES, AngularLoss, ArcFaceLoss, CircleLoss, ContrastiveLoss, CosFaceLoss,
                    CrossEntropyLoss, FastAPLoss, HistogramLoss, LiftedLoss, MarginLoss,
                    MultiSimilarityLoss, NormSoftmaxLoss, NPairLoss, NTXentLoss, ProxyAnchorLoss,
                    ProxyNCALoss, ProxyNCAPlusPlusLoss, QuadrupletLoss, RecallAtKLoss,
                    SmoothAPLoss, SNRLoss, SoftTripleLoss, SphereFaceLoss, SupConLoss, TripletLoss,
                    loss_select)

NUM_CLASSES, DIM = 4, 6


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """The tensors are tiny: waiting for a second thread would cost more than it brings."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# ---- oracles: one loop each, tuples as lists of ints

def weights_of(labels, tuples):
    """How often each image stands in the tuples, over the greatest number; 1 each without any."""
    if tuples is None:
        return [1] * len(labels)
    places = [i for row in tuples for i in row]
    most = max(places.count(i) for i in places)
    return [places.count(i) / most for i in range(len(labels))]


def triplet_oracle(loss, embeddings, labels, tuples):
    """1/T sum max(0, |a - p|^2 - |a - n|^2 + margin)"""
    terms = []
    for a, p, n in tuples:
        sq_ap = ((embeddings[a] - embeddings[p]) ** 2).sum()
        sq_an = ((embeddings[a] - embeddings[n]) ** 2).sum()
        terms.append((sq_ap - sq_an + loss.margin).clamp(min=0))
    return sum(terms) / len(terms)


def margin_oracle(loss, embeddings, labels, tuples):
    """(sum [|a - p| - beta + margin]+ + [beta - |a - n| + margin]+ + nu beta) / (terms > 0)

    0 where no term is above 0. The reference divides by the rows with a term > 0.
    """
    terms, betas = [], []
    for a, p, n in tuples:
        beta = loss.beta[int(labels[a])]
        terms.append(((embeddings[a] - embeddings[p]).norm() - beta + loss.margin).clamp(min=0))
        terms.append((beta - (embeddings[a] - embeddings[n]).norm() + loss.margin).clamp(min=0))
        betas.append(beta)
    active = sum(term.item() > 0 for term in terms)
    if loss.given["form"] == "reference":
        active = sum(first.item() > 0 or second.item() > 0
                     for first, second in zip(terms[::2], terms[1::2]))
    return (sum(terms) + loss.nu * sum(betas) * (active > 0)) / max(active, 1)


def npair_oracle(loss, embeddings, labels, tuples):
    """1/T sum log(1 + sum_n exp(a.n - a.p)) + l2npair (|a|^2 + |p|^2)"""
    terms = []
    for a, p, *negatives in tuples:
        anchor, positive = embeddings[a], embeddings[p]
        inner = sum(torch.exp(anchor @ embeddings[n] - anchor @ positive) for n in negatives)
        terms.append(torch.log(1 + inner) + loss.l2npair * penalty(loss, embeddings, a, p))
    return sum(terms) / len(terms)


def penalty(loss, embeddings, a, p):
    """|a|^2 + |p|^2; of the reference the mean length of all embeddings"""
    if loss.given["form"] == "reference":
        return sum(row.norm() for row in embeddings) / len(embeddings)
    return embeddings[a] @ embeddings[a] + embeddings[p] @ embeddings[p]


def proxynca_oracle(loss, embeddings, labels, tuples=None):
    """mean of -log exp(-d(x, p_y)) / sum_z exp(-d(x, p_z)), d = |3 x/|x| - 3 p/|p||^2, z != y"""
    terms = []
    for i, weight in enumerate(weights_of(labels, tuples)):
        exps = [torch.exp(-((3 * embeddings[i] / embeddings[i].norm()
                             - 3 * proxy / proxy.norm()) ** 2).sum()) for proxy in loss.proxies]
        own = int(labels[i])
        others = [e for z, e in enumerate(exps) if z != own or loss.positive_in_denominator]
        terms.append(weight * -torch.log(exps[own] / sum(others)))
    return sum(terms) / len(terms)


def crossentropy_oracle(loss, embeddings, labels, tuples=None):
    """mean of -log exp(w_y.x + b_y) / sum_z exp(w_z.x + b_z)"""
    terms = []
    for i, counts in enumerate(weights_of(labels, tuples)):
        exps = [torch.exp(weight @ embeddings[i] + bias) for weight, bias
                in zip(loss.classifier.weight, loss.classifier.bias)]
        terms.append(counts * -torch.log(exps[int(labels[i])] / sum(exps)))
    return sum(terms) / len(terms)


def arcface_oracle(loss, embeddings, labels, tuples=None):
    """mean of -log e^(s cos(theta_y + m)) / (itself + sum of e^(s cos theta_z), z != y)

    theta: the angle to a class weight. Where theta_y + m > pi: s (cos theta_y - m sin m) instead.
    The reference takes no theta above a right angle.
    """
    terms, s, m = [], loss.scale, loss.margin
    for i, counts in enumerate(weights_of(labels, tuples)):
        angles = [torch.acos(embeddings[i] @ weight / embeddings[i].norm() / weight.norm())
                  for weight in loss.weight]
        if loss.given["form"] == "reference":
            angles = [angle.clamp(max=math.acos(1e-10)) for angle in angles]
        own = int(labels[i])
        beyond = angles[own].item() + m > math.pi
        logits = [s * torch.cos(angle) for angle in angles]
        logits[own] = (s * (torch.cos(angles[own]) - m * math.sin(m)) if beyond else
                       s * torch.cos(angles[own] + m))
        terms.append(counts * (torch.logsumexp(torch.stack(logits), 0) - logits[own]))
    return sum(terms) / len(terms)


# The oracles below read the hyper-parameters by their flags from loss.given, what the loss was
# built with, and not what the loss made of them.

def mean_of(terms, embeddings):
    """The mean of a list; a zero in the graph for an empty one."""
    return sum(terms) / len(terms) if terms else embeddings.sum() * 0


def cosine(x, y):
    return x @ y / x.norm() / y.norm()


def logistic(x):
    return 1 / (1 + torch.exp(-x))


def pair_sets(labels, tuples):
    """For each image: its positives and its negatives, all of the batch or those of the tuples."""
    names = labels.tolist()
    images = range(len(names))
    if tuples is None:
        return [([p for p in images if p != a and names[p] == names[a]],
                 [n for n in images if names[n] != names[a]]) for a in images]
    return [(sorted({row[1] for row in tuples if row[0] == a != row[1]}),
             sorted({row[2] for row in tuples if row[0] == a})) for a in images]


def contrastive_oracle(loss, embeddings, labels, tuples=None, pairs=None):
    """mean of d_ap^q + mean of (m - d_an)^q where d_an < m; q 2, or 1 for the linear one

    With triplets mean of d_ap^q + mean of [m - d_an]+^q, over all of them. pairs: the triplets
    whose pairs count, once each; None for all pairs.
    """
    margin, power = loss.given["contrastive_margin"], 2 - loss.given["contrastive_linear"]
    pulls, pushes = [], []
    if tuples is not None:
        for a, p, n in tuples:
            pulls.append((embeddings[a] - embeddings[p]).norm() ** power)
            pushes.append((margin - (embeddings[a] - embeddings[n]).norm()).clamp(min=0) ** power)
        return mean_of(pulls, embeddings) + mean_of(pushes, embeddings)
    for a, (positives, negatives) in enumerate(pair_sets(labels, pairs)):
        pulls += [(embeddings[a] - embeddings[p]).norm() ** power for p in positives]
        distances = [(embeddings[a] - embeddings[n]).norm() for n in negatives]
        pushes += [(margin - d) ** power for d in distances if d.item() < margin]
    return mean_of(pulls, embeddings) + mean_of(pushes, embeddings)


def lifted_oracle(loss, embeddings, labels, tuples=None):
    """mean of [log sum_p e^d_ap + log sum_n e^(m - d_an)]+, anchors with both; + l2 mean |x|^2"""
    margin, terms = loss.given["lifted_margin"], []
    for a, (positives, negatives) in enumerate(pair_sets(labels, tuples)):
        if positives and negatives:
            pull = sum(torch.exp((embeddings[a] - embeddings[p]).norm()) for p in positives)
            push = sum(torch.exp(margin - (embeddings[a] - embeddings[n]).norm())
                       for n in negatives)
            terms.append((torch.log(pull) + torch.log(push)).clamp(min=0))
    return mean_of(terms, embeddings) + regulariser(loss, embeddings)


def multisimilarity_oracle(loss, embeddings, labels, tuples=None):
    """1/B sum log(1 + sum_p e^(-a (s - l))) / a + log(1 + sum_n e^(b (s - l))) / b

    The reference's mean is over the images that have a pair.
    """
    alpha, beta, threshold = (loss.given["multisimilarity_" + name]
                              for name in ("alpha", "beta", "lambda"))
    terms = []
    for a, (positives, negatives) in enumerate(pair_sets(labels, tuples)):
        if loss.given["form"] == "reference" and not positives and not negatives:
            continue
        pull = sum(torch.exp(-alpha * (cosine(embeddings[a], embeddings[p]) - threshold))
                   for p in positives)
        push = sum(torch.exp(beta * (cosine(embeddings[a], embeddings[n]) - threshold))
                   for n in negatives)
        one = 1 + 0 * embeddings.sum()
        terms.append(torch.log(one + pull) / alpha + torch.log(one + push) / beta)
    return mean_of(terms, embeddings)


def circle_oracle(loss, embeddings, labels, tuples=None):
    """mean of log(1 + sum_n e^(g [s + m]+ (s - m)) sum_p e^(-g [1 + m - s]+ (s - 1 + m)))

    The two weights in [ ]+ are plain numbers.
    """
    margin, gamma, terms = loss.given["circle_margin"], loss.given["circle_gamma"], []
    for a, (positives, negatives) in enumerate(pair_sets(labels, tuples)):
        if positives and negatives:
            push = pull = 0
            for n in negatives:
                s = cosine(embeddings[a], embeddings[n])
                push = push + torch.exp(gamma * max(0, s.item() + margin) * (s - margin))
            for p in positives:
                s = cosine(embeddings[a], embeddings[p])
                weight = max(0, 1 + margin - s.item())
                pull = pull + torch.exp(-gamma * weight * (s - (1 - margin)))
            terms.append(torch.log(1 + push * pull))
    return mean_of(terms, embeddings)


def ntxent_oracle(loss, embeddings, labels, tuples=None):
    """mean over positive pairs of -log e^(s_ap / T) / (e^(s_ap / T) + sum_n e^(s_an / T))"""
    terms = []
    for a, (positives, negatives) in enumerate(pair_sets(labels, tuples)):
        def exp(other):
            similarity = cosine(embeddings[a], embeddings[other])
            return torch.exp(similarity / loss.given["ntxent_temperature"])
        if negatives:
            terms += [-torch.log(exp(p) / (exp(p) + sum(map(exp, negatives)))) for p in positives]
    return mean_of(terms, embeddings)


def supcon_oracle(loss, embeddings, labels, tuples=None):
    """mean over anchors of -1/|P| sum_p log e^(s_ap / T) / sum_i e^(s_ai / T), i in P and N"""
    terms = []
    for a, (positives, negatives) in enumerate(pair_sets(labels, tuples)):
        def exp(other):
            similarity = cosine(embeddings[a], embeddings[other])
            return torch.exp(similarity / loss.given["supcon_temperature"])
        if positives:
            total = sum(exp(i) for i in {*positives, *negatives})
            terms.append(-sum(torch.log(exp(p) / total) for p in positives) / len(positives))
    return mean_of(terms, embeddings)


def angular_oracle(loss, embeddings, labels, tuples):
    """n-pair + weight * 1/T sum log(1 + sum_n exp(4 t (a + p).n - 2 (1 + t) a.p)), t = tan^2"""
    tangent, terms = math.tan(loss.given["angular_alpha"] * math.pi / 180), []
    pairs, l2npair = [], loss.given["l2npair"]
    for a, p, *negatives in tuples:
        anchor, positive = embeddings[a], embeddings[p]
        most = 50 if loss.given["form"] == "reference" else math.inf
        inner = sum(torch.exp((anchor @ embeddings[n] - anchor @ positive).clamp(-most, most))
                    for n in negatives)
        pairs.append(torch.log(1 + inner) + l2npair * penalty(loss, embeddings, a, p))
        anchor, positive = anchor / anchor.norm(), positive / positive.norm()
        inner = sum(torch.exp(4 * tangent ** 2 * (anchor + positive) @ embeddings[n]
                              / embeddings[n].norm()
                              - 2 * (1 + tangent ** 2) * anchor @ positive) for n in negatives)
        terms.append(torch.log(1 + inner))
    return mean_of(pairs, embeddings) + loss.given["angular_weight"] * mean_of(terms, embeddings)


def on_nodes(value, low, high, bins):
    """A histogram of one value on bins + 1 nodes: 1 - |value - node| / width, not below 0."""
    nodes = torch.linspace(low, high, bins + 1, dtype=torch.float64)
    return (1 - (value - nodes).abs() * bins / (high - low)).clamp(min=0)


def histogram_oracle(loss, embeddings, labels, tuples=None):
    """sum_r h-_r sum_(q <= r) h+_q, the shares of the pairs' cosines on the nodes of [-1, 1]

    The reference's upper nodes of the cells 2 to 7 of 10 get nothing.
    """
    bins, sums, counts = loss.given["histogram_bins"], [0, 0], [0, 0]
    for a, sets in enumerate(pair_sets(labels, tuples)):
        for kind, others in enumerate(sets):
            for other in others:
                s = cosine(embeddings[a], embeddings[other])
                shares, cell = on_nodes(s, -1, 1, bins), int((s.item() + 1) * bins / 2)
                if loss.given["form"] == "reference" and bins == 10 and 2 <= cell <= 7:
                    shares = shares * (torch.arange(bins + 1) != cell + 1)
                sums[kind] = sums[kind] + shares
                counts[kind] += 1
    if not all(counts):
        return embeddings.sum() * 0
    positive, negative = sums[0] / counts[0], sums[1] / counts[1]
    return sum(negative[r] * positive[:r + 1].sum() for r in range(bins + 1))


def fastap_oracle(loss, embeddings, labels, tuples=None):
    """mean over queries of 1 - 1/N+ sum_l h+_l H+_l / H_l, of squared distances on [0, 4]"""
    bins, terms = loss.given["fastap_bins"], []
    for a, (positives, negatives) in enumerate(pair_sets(labels, tuples)):
        if not positives:
            continue
        anchor = embeddings[a] / embeddings[a].norm()
        true, every = 0, 0
        for i in [*positives, *negatives]:
            row = embeddings[i] / embeddings[i].norm()
            nodes = on_nodes(((anchor - row) ** 2).sum(), 0, 4, bins)
            true, every = true + nodes * (i in positives), every + nodes
        precision = sum(true[l] * true[:l + 1].sum() / every[:l + 1].sum()
                        for l in range(bins + 1) if true[l].item() > 0)
        terms.append(1 - precision / len(positives))
    return mean_of(terms, embeddings)


def smooth_rank(similarities, i, others, temperature):
    """1 + sum over the others j but i of the logistic function of (s_j - s_i) / temperature"""
    return 1 + sum(logistic((similarities[j] - similarities[i]) / temperature)
                   for j in others if j != i)


def smoothap_oracle(loss, embeddings, labels, tuples=None):
    """mean over queries of 1 - 1/P sum_i rank among the positives / rank among all others"""
    terms, temperature = [], loss.given["smoothap_temperature"]
    for a, (positives, negatives) in enumerate(pair_sets(labels, tuples)):
        if positives:
            s = {i: cosine(embeddings[a], embeddings[i]) for i in [*positives, *negatives]}
            shares = [smooth_rank(s, i, positives, temperature) / smooth_rank(s, i, s, temperature)
                      for i in positives]
            terms.append(1 - sum(shares) / len(shares))
    return mean_of(terms, embeddings)


def recallatk_oracle(loss, embeddings, labels, tuples=None):
    """mean over queries and k of 1 - min(k, sum_p logistic((k - rank_p) / tau1)) / min(k, P)"""
    terms, given = [], loss.given
    for a, (positives, negatives) in enumerate(pair_sets(labels, tuples)):
        s = {i: cosine(embeddings[a], embeddings[i]) for i in [*positives, *negatives]}
        ranks = [smooth_rank(s, p, s, given["recallatk_tau2"]) for p in positives]
        for k in given["recallatk_k"] if positives else ():
            found = sum(logistic((k - rank) / given["recallatk_tau1"]) for rank in ranks)
            terms.append(1 - found.clamp(max=k) / min(k, len(positives)))
    return mean_of(terms, embeddings)


def snr_oracle(loss, embeddings, labels, tuples):
    """mean of the [d_ap - d_an + m]+ above 0, d = var(a - x) / var(a); + lambda mean |sum of x|"""
    terms = []
    for a, p, n in tuples:
        signal = embeddings[a].var()
        d_ap = (embeddings[a] - embeddings[p]).var() / signal
        d_an = (embeddings[a] - embeddings[n]).var() / signal
        terms.append(d_ap - d_an + loss.given["snr_margin"])
    above = [term for term in terms if term.item() > 0]
    return mean_of(above, embeddings) + regulariser(loss, embeddings)


def quadruplet_oracle(loss, embeddings, labels, tuples):
    """1/T sum [d_ap - d_an + m1]+ + [d_ap - d_nl + m2]+, squared distances; l -1 for none

    The reference: plain distances, and the second term for each row with each row's l.
    """
    def d(i, j):
        squared = ((embeddings[i] - embeddings[j]) ** 2).sum()
        return squared if paper else squared.clamp(min=1e-16).sqrt()  # no root of zero

    paper = loss.given["form"] == "paper"
    if not paper:
        first = [(d(a, p) - d(a, n) + loss.given["quadruplet_margin1"]).clamp(min=0)
                 for a, p, n, _ in tuples]
        second = [(d(a, p) - d(n, l) + loss.given["quadruplet_margin2"]).clamp(min=0)
                  for a, p, n, _ in tuples for *_, l in tuples if l >= 0]
        return mean_of(first, embeddings) + mean_of(second, embeddings)
    terms = []
    for a, p, n, l in tuples:
        term = (d(a, p) - d(a, n) + loss.given["quadruplet_margin1"]).clamp(min=0)
        if l >= 0:
            term = term + (d(a, p) - d(n, l) + loss.given["quadruplet_margin2"]).clamp(min=0)
        terms.append(term)
    return mean_of(terms, embeddings)


def proxyanchor_oracle(loss, embeddings, labels, tuples=None):
    """mean log(1 + sum e^(-a (s - d))), present proxies, + mean log(1 + sum e^(a (s + d))), all

    The exponents of an image that the tuples weigh w get w - 1 added.
    """
    alpha, delta = loss.given["proxyanchor_alpha"], loss.given["proxyanchor_delta"]
    pulls, pushes = [], []
    for c, proxy in enumerate(loss.proxies):
        own, others = [], []
        for i, w in enumerate(weights_of(labels, tuples)):
            (own if int(labels[i]) == c else others).append((cosine(embeddings[i], proxy), w - 1))
        if own:
            pulls.append(torch.log(1 + sum(torch.exp(-alpha * (s - delta) + w) for s, w in own)))
        if others:
            pushes.append(torch.log(1 + sum(torch.exp(alpha * (s + delta) + w)
                                            for s, w in others)))
    return mean_of(pulls, embeddings) + sum(pushes) / len(loss.proxies)


def softmax_oracle(logits_of):
    """mean of -log e^z_y / sum_c e^z_c, z = logits_of(loss, embedding, own class)"""
    def oracle(loss, embeddings, labels, tuples=None):
        terms = []
        for i, weight in enumerate(weights_of(labels, tuples)):
            logits = logits_of(loss, embeddings[i], int(labels[i]))
            terms.append(weight * (torch.logsumexp(torch.stack(logits), 0)
                                   - logits[int(labels[i])]))
        return mean_of(terms, embeddings) + regulariser(loss, embeddings)
    return oracle


def proxyncapp_logits(loss, x, own):
    """-|x - p|^2 / T of unit vectors"""
    return [-((x / x.norm() - proxy / proxy.norm()) ** 2).sum()
            / loss.given["proxyncapp_temperature"] for proxy in loss.proxies]


def normsoftmax_logits(loss, x, own):
    return [cosine(x, weight) / loss.given["normsoftmax_temperature"] for weight in loss.weight]


def cosface_logits(loss, x, own):
    """s cos, for the own class s (cos - m)"""
    scale, margin = loss.given["cosface_scale"], loss.given["cosface_margin"]
    return [scale * (cosine(x, weight) - margin * (c == own))
            for c, weight in enumerate(loss.weight)]


def sphereface_logits(loss, x, own):
    """s cos, for the own class s (l cos + psi) / (1 + l), psi = (-1)^k cos(m angle) - 2 k"""
    m, scale = loss.given["sphereface_margin"], loss.given["sphereface_scale"]
    plain = max(loss.given["sphereface_lambda"], 1500 / (1 + 0.1 * loss.steps.item()))
    logits = [scale * cosine(x, weight) for weight in loss.weight]
    angle = torch.acos(cosine(x, loss.weight[own]))
    k = next(k for k in range(m) if angle.item() <= (k + 1) * math.pi / m)
    psi = (-1) ** k * torch.cos(m * angle) - 2 * k
    logits[own] = scale * (plain * torch.cos(angle) + psi) / (1 + plain)
    return logits


def softtriple_logits(loss, x, own):
    """l S, for the own class l (S - d); S = sum_k s_k e^(s_k / g) / sum_k e^(s_k / g)

    The reference: S_c = sum_k s_ck e^(g s_ck) / sum_b e^(g s_bk), and s the products with centres
    whose values in each dimension have length one over all of them.
    """
    scale, gamma, delta = (loss.given["softtriple_" + name]
                           for name in ("lambda", "gamma", "delta"))
    logits = []
    if loss.given["form"] == "reference":
        centers, x = reference_centers(loss), x / x.norm()
        for c in range(len(centers)):
            similarity = 0
            for k in range(centers.shape[1]):
                exps = [torch.exp(gamma * (x @ other[k])) for other in centers]
                similarity = similarity + x @ centers[c, k] * exps[c] / sum(exps)
            logits.append(scale * (similarity - delta * (c == own)))
        return logits
    for c, centers in enumerate(loss.centers):
        cosines = [cosine(x, center) for center in centers]
        exps = [torch.exp(s / gamma) for s in cosines]
        similarity = sum(s * e for s, e in zip(cosines, exps)) / sum(exps)
        logits.append(scale * (similarity - delta * (c == own)))
    return logits


def reference_centers(loss):
    """[C, K, D], in each dimension over its length in all centres."""
    return loss.centers / torch.sqrt(sum(center ** 2 for center in loss.centers.flatten(0, 1)))


def regulariser(loss, embeddings):
    """What remains of a loss without tuples: 0 for most."""
    if isinstance(loss, LiftedLoss) and loss.given["form"] == "reference":
        return loss.given["lifted_l2"] * sum(row.norm() for row in embeddings) / len(embeddings)
    if isinstance(loss, LiftedLoss):
        return loss.given["lifted_l2"] * sum(row @ row for row in embeddings) / len(embeddings)
    if isinstance(loss, SNRLoss):
        return (loss.given["snr_lambda"] * sum(row.sum().abs() for row in embeddings)
                / len(embeddings))
    total = embeddings.sum() * 0
    if isinstance(loss, SoftTripleLoss):
        # tau / (C K (K - 1)) sum over the pairs of a class's centres of their distance, the 1e-5
        # as in the authors' code.
        classes, number, _ = loss.centers.shape
        for centers in (loss.centers / loss.centers.norm(dim=2, keepdim=True)
                        if loss.given["form"] == "paper" else reference_centers(loss)):
            for t in range(number):
                for s in range(t + 1, number):
                    total = total + torch.sqrt(2 + 1e-5 - 2 * centers[s] @ centers[t])
        total = total * loss.given["softtriple_tau"] / (classes * number * max(1, number - 1))
    return total


ORACLES = {TripletLoss: triplet_oracle, MarginLoss: margin_oracle, NPairLoss: npair_oracle,
           ProxyNCALoss: proxynca_oracle, CrossEntropyLoss: crossentropy_oracle,
           ArcFaceLoss: arcface_oracle, ContrastiveLoss: contrastive_oracle,
           LiftedLoss: lifted_oracle, MultiSimilarityLoss: multisimilarity_oracle,
           CircleLoss: circle_oracle, NTXentLoss: ntxent_oracle, SupConLoss: supcon_oracle,
           AngularLoss: angular_oracle, HistogramLoss: histogram_oracle,
           FastAPLoss: fastap_oracle, SmoothAPLoss: smoothap_oracle,
           RecallAtKLoss: recallatk_oracle, SNRLoss: snr_oracle,
           QuadrupletLoss: quadruplet_oracle, ProxyAnchorLoss: proxyanchor_oracle,
           ProxyNCAPlusPlusLoss: softmax_oracle(proxyncapp_logits),
           NormSoftmaxLoss: softmax_oracle(normsoftmax_logits),
           CosFaceLoss: softmax_oracle(cosface_logits),
           SphereFaceLoss: softmax_oracle(sphereface_logits),
           SoftTripleLoss: softmax_oracle(softtriple_logits)}

# The losses that the tests go through: the name, the class and its options.
VARIANTS = {
    "triplet": (TripletLoss, {"margin": 0.5}),
    "triplet-random": (TripletLoss, {"margin": 0.9, "sampling": "random"}),
    "triplet-random-reference": (TripletLoss, {"sampling": "random", "form": "reference"}),
    "triplet-semihard": (TripletLoss, {"sampling": "semihard"}),
    "triplet-facenet": (TripletLoss, {"sampling": "facenet"}),
    "triplet-rho": (TripletLoss, {"sampling": "rho", "rho_probability": 0.5, "margin": 0.9}),
    "triplet-all-positives": (TripletLoss, {"positives": "all", "margin": 0.9}),
    "triplet-softhard": (TripletLoss, {"sampling": "softhard"}),
    "triplet-cutoff": (TripletLoss, {"distance_cutoff": 1.2}),
    "triplet-multisimilarity": (TripletLoss, {"sampling": "multisimilarity"}),
    "margin": (MarginLoss, {}),
    "margin-reference": (MarginLoss, {"beta": 0.9, "margin": 0.4, "form": "reference"}),
    "margin-nu": (MarginLoss, {"nu": 0.3, "beta": 0.9, "margin": 0.4}),
    "margin-constant": (MarginLoss, {"beta_constant": True, "nu": 0.1, "sampling": "random"}),
    "margin-facenet": (MarginLoss, {"sampling": "facenet", "beta": 1.0}),
    "margin-softhard": (MarginLoss, {"sampling": "softhard"}),
    "margin-rho": (MarginLoss, {"sampling": "rho", "rho_probability": 0.5}),
    "margin-all-positives": (MarginLoss, {"sampling": "rho", "positives": "all", "nu": 0.1}),
    "margin-multisimilarity": (MarginLoss, {"sampling": "multisimilarity",
                                            "mining_epsilon": 0.3}),
    "npair": (NPairLoss, {}),
    "npair-l2": (NPairLoss, {"l2npair": 0.7}),
    "npair-reference": (NPairLoss, {"l2npair": 0.7, "form": "reference"}),
    "proxynca": (ProxyNCALoss, {}),
    "proxynca-positive": (ProxyNCALoss, {"proxynca_positive_in_denominator": True}),
    "crossentropy": (CrossEntropyLoss, {}),
    "arcface": (ArcFaceLoss, {}),
    "arcface-wide": (ArcFaceLoss, {"arcface_scale": 4.0, "arcface_margin": 2.0}),
    "arcface-distance": (ArcFaceLoss, {"arcface_scale": 8.0, "sampling": "distance"}),
    "arcface-multisimilarity": (ArcFaceLoss, {"sampling": "multisimilarity"}),
    "arcface-reference": (ArcFaceLoss, {"arcface_scale": 16.0, "form": "reference"}),
    "contrastive": (ContrastiveLoss, {}),
    "contrastive-linear": (ContrastiveLoss, {"contrastive_linear": True,
                                             "contrastive_margin": 1.3}),
    "contrastive-distance": (ContrastiveLoss, {"sampling": "distance",
                                               "contrastive_margin": 1.5}),
    "contrastive-rho": (ContrastiveLoss, {"sampling": "rho", "rho_probability": 0.5}),
    "lifted": (LiftedLoss, {}),
    "lifted-wide": (LiftedLoss, {"lifted_margin": 2.5, "lifted_l2": 0.05}),
    "lifted-softhard": (LiftedLoss, {"sampling": "softhard"}),
    "lifted-reference": (LiftedLoss, {"lifted_l2": 0.05, "form": "reference"}),
    "multisimilarity": (MultiSimilarityLoss, {}),
    "multisimilarity-reference": (MultiSimilarityLoss, {
        "mining_epsilon": 0.0, "form": "reference"}),
    "multisimilarity-none": (MultiSimilarityLoss, {
        "multisimilarity_alpha": 5.0, "multisimilarity_beta": 9.0, "multisimilarity_lambda": 0.4,
        "sampling": "none"}),
    "multisimilarity-random": (MultiSimilarityLoss, {"sampling": "random"}),
    "multisimilarity-rho": (MultiSimilarityLoss, {"sampling": "rho", "rho_probability": 0.5}),
    "circle": (CircleLoss, {}),
    "circle-soft": (CircleLoss, {"circle_margin": 0.25, "circle_gamma": 6.0}),
    "circle-distance": (CircleLoss, {"sampling": "distance", "circle_margin": 0.0}),
    "ntxent": (NTXentLoss, {}),
    "ntxent-warm": (NTXentLoss, {"ntxent_temperature": 0.7}),
    "ntxent-hard": (NTXentLoss, {"sampling": "hard"}),
    "supcon": (SupConLoss, {}),
    "supcon-warm": (SupConLoss, {"supcon_temperature": 0.7}),
    "supcon-distance": (SupConLoss, {"sampling": "distance"}),
    "angular": (AngularLoss, {}),
    "angular-narrow": (AngularLoss, {"angular_alpha": 30.0, "angular_weight": 0.6,
                                     "l2npair": 0.3}),
    "angular-reference": (AngularLoss, {"angular_alpha": 30.0, "l2npair": 0.3,
                                        "form": "reference"}),
    "histogram": (HistogramLoss, {}),
    "histogram-few": (HistogramLoss, {"histogram_bins": 7}),
    "histogram-reference": (HistogramLoss, {"histogram_bins": 10, "form": "reference"}),
    "fastap": (FastAPLoss, {}),
    "fastap-many": (FastAPLoss, {"fastap_bins": 23}),
    "smoothap": (SmoothAPLoss, {}),
    "smoothap-soft": (SmoothAPLoss, {"smoothap_temperature": 0.3}),
    "recallatk": (RecallAtKLoss, {}),
    "recallatk-soft": (RecallAtKLoss, {"recallatk_k": [1, 3], "recallatk_tau1": 0.7,
                                       "recallatk_tau2": 0.2}),
    # So wide that more than k are found of a class of five.
    "recallatk-wide": (RecallAtKLoss, {"recallatk_k": [1, 2], "recallatk_tau1": 5.0,
                                       "recallatk_tau2": 0.5}),
    "snr": (SNRLoss, {}),
    "snr-rho": (SNRLoss, {"snr_margin": 0.9, "sampling": "rho", "rho_probability": 0.5}),
    "snr-wide": (SNRLoss, {"snr_margin": 0.9, "snr_lambda": 0.3, "sampling": "random"}),
    "quadruplet": (QuadrupletLoss, {}),
    "quadruplet-rho": (QuadrupletLoss, {"sampling": "rho", "rho_probability": 0.5}),
    "quadruplet-all-positives": (QuadrupletLoss, {"sampling": "softhard", "positives": "all"}),
    "quadruplet-reference": (QuadrupletLoss, {"quadruplet_margin1": 0.6, "form": "reference"}),
    "quadruplet-reference-rho": (QuadrupletLoss, {
        "sampling": "rho", "rho_probability": 0.5, "form": "reference"}),
    "quadruplet-wide": (QuadrupletLoss, {"quadruplet_margin1": 1.1, "quadruplet_margin2": 0.4,
                                         "sampling": "random"}),
    "proxyanchor": (ProxyAnchorLoss, {}),
    "proxyanchor-soft": (ProxyAnchorLoss, {"proxyanchor_alpha": 4.0, "proxyanchor_delta": 0.3}),
    "proxynca++": (ProxyNCAPlusPlusLoss, {}),
    "proxynca++-warm": (ProxyNCAPlusPlusLoss, {"proxyncapp_temperature": 0.8}),
    "normsoftmax": (NormSoftmaxLoss, {}),
    "normsoftmax-warm": (NormSoftmaxLoss, {"normsoftmax_temperature": 0.6}),
    "cosface": (CosFaceLoss, {}),
    "cosface-soft": (CosFaceLoss, {"cosface_scale": 6.0, "cosface_margin": 0.2}),
    "sphereface": (SphereFaceLoss, {}),
    "sphereface-three": (SphereFaceLoss, {"sphereface_margin": 3, "sphereface_lambda": 0.0,
                                          "sphereface_scale": 7.0}),
    "softtriple": (SoftTripleLoss, {}),
    "softtriple-three": (SoftTripleLoss, {
        "softtriple_centers": 3, "softtriple_lambda": 8.0, "softtriple_gamma": 0.3,
        "softtriple_delta": 0.1, "softtriple_tau": 0.7}),
    "softtriple-reference": (SoftTripleLoss, {
        "softtriple_centers": 3, "softtriple_lambda": 8.0, "softtriple_gamma": 0.3,
        "softtriple_delta": 0.1, "softtriple_tau": 0.7, "form": "reference"}),
}
variants = pytest.mark.parametrize("variant", VARIANTS)
ONE_OF_EACH = ("triplet", "margin-nu", "npair", "proxynca", "proxynca-positive", "crossentropy",
               "arcface", "arcface-wide", "contrastive", "contrastive-linear", "lifted",
               "multisimilarity-none", "circle-soft", "ntxent-warm", "supcon-warm",
               "angular-narrow", "histogram-few", "fastap", "smoothap-soft", "recallatk-soft",
               "snr-wide", "quadruplet-wide", "proxyanchor-soft", "proxynca++-warm",
               "normsoftmax-warm", "cosface-soft", "sphereface-three", "softtriple-three")
DEFAULTS = tuple(name for name, (_, given) in VARIANTS.items() if not given or name == "triplet")
# Means over the anchors, one term each: blocks of tuples add up.
PLAIN_MEANS = ("triplet", "npair", "angular-narrow", "quadruplet-wide")
# Losses that know directions alone.
COSINE_LOSSES = ("proxynca", "proxynca-positive", "arcface", "arcface-wide", "multisimilarity",
                 "multisimilarity-none", "circle", "ntxent", "supcon", "histogram", "fastap",
                 "smoothap-soft", "recallatk-soft", "proxyanchor", "proxynca++", "normsoftmax",
                 "cosface", "sphereface", "sphereface-three", "softtriple")
one_of_each = pytest.mark.parametrize("variant", ONE_OF_EACH)


def make(loss_class, num_classes=NUM_CLASSES, dim=DIM, dtype=torch.float64, **given):
    """The loss with weights from a fixed seed; loss.given: the flags' values that it got."""
    sizes = {"num_classes": num_classes, "embed_dim": dim}
    names = inspect.signature(loss_class).parameters
    with torch.random.fork_rng():
        torch.manual_seed(1)
        loss = loss_class(**given, **{k: v for k, v in sizes.items() if k in names})
    loss.given = {name: parameter.default for name, parameter in names.items()} | given
    return loss.to(dtype)


def build(variant, num_classes=NUM_CLASSES, dim=DIM, dtype=torch.float64):
    """The loss of VARIANTS, as after training: betas differ from class to class, steps passed.

    In evaluation mode, so that a value does not depend on how often it was computed.
    """
    loss_class, given = VARIANTS[variant]
    loss = make(loss_class, num_classes, dim, dtype, **given)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(2)
        if loss_class is MarginLoss:
            loss.beta += 0.2 * torch.rand(num_classes) - 0.1
        if loss_class is SphereFaceLoss:
            loss.steps += 30_000
    return loss.eval()


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
            if a != p and names[a] == names[p]
            for n in range(len(names)) if names[p] != names[n]]


def some_triplets(labels, count=10, seed=0):
    """`count` of them at random: anchors repeat, or stay out."""
    triplets = all_triplets(labels)
    order = torch.randperm(len(triplets), generator=torch.Generator().manual_seed(seed))
    return [triplets[i] for i in order[:count].tolist()]


def given(variant, labels, triplets):
    """The triplets; for the quadruplet loss each with an image of a third class, -1 for none."""
    if VARIANTS[variant][0] is not QuadrupletLoss:
        return triplets
    rows = []
    for number, (a, p, n) in enumerate(triplets):
        thirds = [i for i, name in enumerate(labels.tolist())
                  if name not in (int(labels[a]), int(labels[n]))] or [-1]
        rows.append([a, p, n, thirds[number % len(thirds)]])
    return rows


def drawn(loss, embeddings, labels, seed):
    """What the loss samples under this seed, as lists; None where it takes everything."""
    if not samples(loss):
        return None
    torch.manual_seed(seed)
    if isinstance(loss, ArcFaceLoss) and loss.sampler.method == "multisimilarity":
        return [pair for mask in loss.sampler.hard_pairs(embeddings, labels)
                for pair in mask.nonzero().tolist()]
    if not isinstance(loss, QuadrupletLoss):
        return [[i for i in row if i >= 0]
                for row in loss.sampler.give(embeddings, labels).tolist()]
    tuples = loss.complete(loss.sampler.give(embeddings, labels, padded=True), labels)
    return [row for row in tuples.tolist() if row[0] >= 0]


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
    triplets = given(variant, labels, some_triplets(labels, seed=seed))
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
    tuples = drawn(loss, embeddings, labels, seed)
    assert tuples is None or tuples and not {0, 1} & {row[0] for row in tuples}
    expected = ORACLES[type(loss)](loss, embeddings, labels, tuples)
    torch.manual_seed(seed)
    assert_same(loss, embeddings, loss(embeddings, labels), expected)


@variants
@pytest.mark.parametrize("seed", range(2))
def test_classes_of_all_sizes_against_the_oracle(variant, seed):
    """5, 3, 2, 1 and 1 images of a class, in any order, and a class that is not in the batch."""
    loss, (embeddings, _) = build(variant, num_classes=6), make_batch(variant, seed=seed + 7)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(seed))
    labels = torch.tensor([0] * 5 + [1] * 3 + [3] * 2 + [4, 5])[order]
    expected = ORACLES[type(loss)](loss, embeddings, labels,
                                   drawn(loss, embeddings, labels, seed))
    torch.manual_seed(seed)
    assert_same(loss, embeddings, loss(embeddings, labels), expected)


@variants
@pytest.mark.parametrize("classes", [2, 4])
def test_many_tuples_against_the_oracle(variant, classes):
    """All triplets of a batch, more than four for each image: the matrix of all pairs is used."""
    loss, (embeddings, labels) = build(variant), make_batch(variant, 8, num_classes=classes)
    triplets = given(variant, labels, all_triplets(labels))
    assert len(triplets) > 4 * len(labels)
    expected = ORACLES[type(loss)](loss, embeddings, labels, triplets)
    assert_same(loss, embeddings, loss(embeddings, labels, torch.tensor(triplets)), expected)


@pytest.mark.parametrize("variant", PLAIN_MEANS)
def test_many_tuples_are_the_mean_of_few(variant):
    """For the losses that are plain means, all triplets at once agree with blocks of twelve."""
    loss, (embeddings, labels) = build(variant), make_batch(variant)
    triplets = torch.tensor(given(variant, labels, all_triplets(labels)))
    blocks = triplets.split(12)
    assert len(triplets) % 12 == 0 and len(blocks) > 4
    few = sum(loss(embeddings, labels, block) for block in blocks) / len(blocks)
    assert_same(loss, embeddings, loss(embeddings, labels, triplets), few)


@one_of_each
@pytest.mark.parametrize("many", [False, True])
def test_gradcheck(variant, many):
    """Numerical derivatives in float64, for the embeddings and the loss's own weights.

    Not for the circle loss, whose weights pass no gradient: its oracle has that.
    """
    loss, (embeddings, labels) = build(variant), make_batch(variant, num_classes=3, count=9)
    if isinstance(loss, CircleLoss):
        assert loss.stops_gradients
        return
    triplets = all_triplets(labels) if many else some_triplets(labels, 5)
    triplets = torch.tensor(given(variant, labels, triplets))
    names = [name for name, _ in loss.named_parameters()]

    def function(rows, *weights):
        own = dict(zip(names, weights))
        return torch.func.functional_call(loss, own, (rows, labels, triplets))

    # All columns of the Jacobian for few tuples, one random direction for many.
    assert torch.autograd.gradcheck(function, (embeddings, *loss.parameters()), fast_mode=many)


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
    Two tuples: nu (1.2 + 1.2) / 3.
    """
    loss = MarginLoss(2, margin=0.2, beta=1.2, nu=nu).double()
    value = loss(HAND, torch.tensor([0, 1, 0, 1]), [(0, 2, 3), (0, 2, 1)])
    assert value.item() == pytest.approx(0.4446667 + nu * 2.4 / 3, abs=1e-6)


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


# Of HAND: cosines .6 (0, 1), 0 (0, 2), -1 (0, 3), .8 (1, 2), -.6 (1, 3), 0 (2, 3); squared
# distances .8, 2, 4, .4, 3.2, 2. ALTERNATING makes (0, 2) and (1, 3) the positive pairs.
ALTERNATING = torch.tensor([0, 1, 0, 1])
exp, log, sqrt = math.exp, math.log, math.sqrt


def by_hand(loss, labels=ALTERNATING, indices_tuple=None, embeddings=HAND):
    return loss.double()(embeddings, labels, indices_tuple).item()


@pytest.mark.parametrize("linear", [False, True])
def test_contrastive_by_hand(linear):
    """Positives sqrt 2 and sqrt 3.2; nearer than 1: sqrt .8 and sqrt .4. Each pair counts twice.

    Squares: (2 + 3.2) / 2 + ((1 - sqrt .8)^2 + (1 - sqrt .4)^2) / 2 = 2.6 + 0.073117.
    Active: all 4 positive and 4 of the 8 negative pairs, 8 of 12.
    """
    loss = ContrastiveLoss(contrastive_linear=linear)
    power = 1 if linear else 2
    expected = ((sqrt(2) ** power + sqrt(3.2) ** power) / 2
                + ((1 - sqrt(.8)) ** power + (1 - sqrt(.4)) ** power) / 2)
    assert by_hand(loss) == pytest.approx(expected, abs=1e-9)
    assert linear or expected == pytest.approx(2.673117, abs=1e-6)
    assert loss.active.item() == pytest.approx(8 / 12)
    assert by_hand(loss, indices_tuple=[(0, 2, 3)]) == pytest.approx(sqrt(2) ** power, abs=1e-9)
    assert loss.active.item() == pytest.approx(1 / 2)


def test_lifted_by_hand():
    """Tuples (0, 1, 3) and (2, 3, 0), margin 1, l2 0.01, all lengths 1.

    sqrt .8 + 1 - 2 < 0, not active; sqrt 2 + 1 - sqrt 2 = 1. Mean 0.5, plus 0.01.
    Of all pairs anchor 0 alone: log e^sqrt 2 + log(e^(1 - sqrt .8) + e^(1 - 2)).
    """
    loss = LiftedLoss(lifted_l2=0.01)
    value = by_hand(loss, torch.tensor([0, 0, 1, 1]), [(0, 1, 3), (2, 3, 0)])
    assert value == pytest.approx(0.51, abs=1e-9) and loss.active.item() == 0.5
    value = by_hand(loss, ALTERNATING, [(0, 2, 1), (0, 2, 3)])
    expected = sqrt(2) + log(exp(1 - sqrt(.8)) + exp(-1))
    assert value == pytest.approx(expected + 0.01, abs=1e-9) and loss.active.item() == 1


def test_multisimilarity_by_hand():
    """alpha 2, beta 5, lambda .5, all pairs; of each anchor the positive, the two negatives."""
    loss = MultiSimilarityLoss(2.0, 5.0, 0.5, sampling="none")
    expected = sum(log(1 + exp(-2 * (p - .5))) / 2 + log(1 + exp(5 * (n - .5)) + exp(5 * (m - .5)))
                   / 5 for p, n, m in ((0, .6, -1), (-.6, .6, .8), (0, .8, 0), (-.6, -1, 0))) / 4
    assert by_hand(loss) == pytest.approx(expected, abs=1e-9)


def test_circle_by_hand():
    """Tuple (0, 2, 1), m .4, g 2: s_p = 0 and s_n = .6.

    Negative: weight .6 + .4 = 1, 1 (.6 - .4) = .2. Positive: weight 1 + .4 - 0 = 1.4,
    -1.4 (0 - .6) = .84. log(1 + e^(2 (.2 + .84))) = 2.197721.
    """
    value = by_hand(CircleLoss(circle_gamma=2.0), indices_tuple=[(0, 2, 1)])
    assert value == pytest.approx(log(1 + exp(2.08)), abs=1e-9)
    assert value == pytest.approx(2.197721, abs=1e-6)


def test_ntxent_by_hand():
    """T .5, classes (0, 1, 2) and (3): -log e^2s_ap / (e^2s_ap + e^2s_a3) for six pairs.

    The anchor's other positive is in no denominator; anchor 3 has no positive.
    """
    expected = sum(log(1 + exp(2 * (n - p))) for p, n in (
        (.6, -1), (0, -1), (.6, -.6), (.8, -.6), (0, 0), (.8, 0))) / 6
    value = by_hand(NTXentLoss(0.5), torch.tensor([0, 0, 0, 1]))
    assert value == pytest.approx(expected, abs=1e-9)


def test_supcon_by_hand():
    """T .5, classes (0, 1, 2) and (3): both positives and image 3 in the denominator.

    -1/2 (2 s_1 + 2 s_2) + log(e^2s_1 + e^2s_2 + e^2s_3), mean over the three anchors.
    """
    expected = sum(log(exp(2 * p) + exp(2 * q) + exp(2 * n)) - p - q for p, q, n in (
        (.6, 0, -1), (.6, .8, -.6), (0, .8, 0))) / 3
    value = by_hand(SupConLoss(0.5), torch.tensor([0, 0, 0, 1]))
    assert value == pytest.approx(expected, abs=1e-9)


def test_angular_by_hand():
    """Tuple (0, 2, 1) with the anchor twice as long; 45 degrees, so t = 1; weight 3, l2 .02.

    n-pair: a.n - a.p = 1.2 - 0, log(1 + e^1.2) + .02 (4 + 1). Angular, on unit vectors:
    4 (1, 1).(.6, .8) - 4 x 0 = 5.6, log(1 + e^5.6). With 30 degrees t = 1/3.
    """
    embeddings = HAND * torch.tensor([2.0, 1, 1, 1], dtype=torch.float64).unsqueeze(1)
    npair = log(1 + exp(1.2)) + 0.1
    value = by_hand(AngularLoss(angular_weight=3.0), ALTERNATING, [(0, 2, 1)], embeddings)
    assert value == pytest.approx(npair + 3 * log(1 + exp(5.6)), abs=1e-9)
    value = by_hand(AngularLoss(30.0), ALTERNATING, [(0, 2, 1)], embeddings)
    assert value == pytest.approx(npair + 2 * log(1 + exp(4 / 3 * 1.4)), abs=1e-9)
    # (0, 1, 3): 4 (1.6, .8).(-1, 0) - 4 x .6 = -8.8.
    value = by_hand(AngularLoss(l2npair=0.0), ALTERNATING, [(0, 1, 3)])
    assert value == pytest.approx(log(1 + exp(-1.6)) + 2 * log(1 + exp(-8.8)), abs=1e-9)


def test_histogram_by_hand():
    """Two intervals, so three nodes -1, 0 and 1.

    Positives 0 and -.6: h+ = (0 + .6, 1 + .4, 0) / 2 = (.3, .7, 0), cumulated (.3, 1, 1).
    Negatives .6, -1, .8, 0: h- = (1, .4 + .2 + 1, .6 + .8) / 4 = (.25, .4, .35).
    .25 x .3 + .4 + .35 = .825.
    """
    assert by_hand(HistogramLoss(2)) == pytest.approx(.825, abs=1e-9)


def test_fastap_by_hand():
    """Two intervals, so nodes 0, 2 and 4; each query has one positive; H includes it.

    Query 0: h+ = (0, 1, 0), H = (.6, 2, 3): 1 / 2. Query 1: h+ = (0, .4, .6), H = (1.4, 2.4, 3):
    .4 x .4 / 2.4 + .6 / 3. Query 2: h+ = (0, 1, 0), H = (.8, 3, 3): 1 / 3. Query 3: h+ = (0, .4,
    .6), H = (0, 1.4, 3): .4 x .4 / 1.4 + .6 / 3.
    """
    precisions = (1 / 2, .16 / 2.4 + .2, 1 / 3, .16 / 1.4 + .2)
    assert by_hand(FastAPLoss(2)) == pytest.approx(1 - sum(precisions) / 4, abs=1e-9)
    assert by_hand(FastAPLoss(2)) == pytest.approx(.646429, abs=1e-6)


def g(x):
    return 1 / (1 + exp(-x))


def test_smoothap_by_hand():
    """T 1, classes (0, 1, 2) and (3); each of three queries has two positives and a negative.

    Query 0: of image 1, s = .6, with image 2, s = 0, and image 3, s = -1: (1 + g(-.6)) / (1 +
    g(-.6) + g(-1.6)); of image 2 (1 + g(.6)) / (1 + g(.6) + g(-1)).
    """
    def share(own, other, negative):
        return (1 + g(other - own)) / (1 + g(other - own) + g(negative - own))

    precisions = [(share(p, q, n) + share(q, p, n)) / 2
                  for p, q, n in ((.6, 0, -1), (.6, .8, -.6), (0, .8, 0))]
    value = by_hand(SmoothAPLoss(1.0), torch.tensor([0, 0, 0, 1]))
    assert value == pytest.approx(1 - sum(precisions) / 3, abs=1e-9)


def test_recallatk_by_hand():
    """tau1 .5, tau2 1, k 1 and 3, classes (0, 1, 2) and (3).

    A positive of similarity p beside the other q and the negative n: rank 1 + g(q - p) + g(n - p).
    Recall at k: the sum of g((k - rank) / .5), at most k, over min(k, 2).
    """
    losses_of = []
    for p, q, n in ((.6, 0, -1), (.6, .8, -.6), (0, .8, 0)):
        ranks = 1 + g(q - p) + g(n - p), 1 + g(p - q) + g(n - q)
        found = {k: sum(g((k - rank) / .5) for rank in ranks) for k in (1, 3)}
        losses_of.append(1 - (min(1, found[1]) / 1 + min(3, found[3]) / 2) / 2)
    value = by_hand(RecallAtKLoss([1, 3], 0.5, 1.0), torch.tensor([0, 0, 0, 1]))
    assert value == pytest.approx(sum(losses_of) / 3, abs=1e-9)


def test_snr_by_hand():
    """a = (1, -1, 0, 0): four times its variance is 2. Sums of elements 0, 0, 0 and .4.

    a - p = (0, -1, 1, 0): 2 / 2 = 1. a - n = (2, -2, 0, 0): 8 / 2 = 4, 1 - 4 + .2 < 0.
    a - n' = (0, 0, -.4, 0), its mean -.1: (.16 - 4 x .01) / 2 = .06, 1 - .06 + .2 = 1.14.
    One of two is active: 1.14 / 1 + .5 x .4 / 4 = 1.19.
    """
    embeddings = torch.tensor([[1, -1, 0, 0], [1, 0, -1, 0], [-1, 1, 0, 0], [1, -1, .4, 0]],
                              dtype=torch.float64)
    loss = SNRLoss(snr_lambda=0.5)
    value = by_hand(loss, torch.tensor([0, 0, 1, 1]), [(0, 1, 2), (0, 1, 3)], embeddings)
    assert value == pytest.approx(1.19, abs=1e-9) and loss.active.item() == 0.5


def test_quadruplet_by_hand():
    """Margins 2.5 and 1.5, classes (0, 2), (1), (3).

    (0, 2, 3, 1): max(0, 2 - 4 + 2.5) + max(0, 2 - 3.2 + 1.5) = .5 + .3. (0, 2, 1, -1), without an
    image of a third class: max(0, 2 - .8 + 2.5) = 3.7. Mean 2.25; with margins 0 the first, 2 - 4
    and 2 - 3.2, is not active. Of classes (0, 1), (2), (3), margins 1.3, (0, 1, 3, 2) has the
    second term alone: max(0, .8 - 4 + 1.3) + max(0, .8 - 2 + 1.3) = .1.
    """
    labels, tuples = torch.tensor([0, 1, 0, 2]), torch.tensor([[0, 2, 3, 1], [0, 2, 1, -1]])
    loss = QuadrupletLoss(2.5, 1.5)
    assert by_hand(loss, labels, tuples) == pytest.approx(2.25, abs=1e-9)
    assert by_hand(loss, labels, tuples.tolist()) == pytest.approx(2.25, abs=1e-9)
    assert loss.active.item() == 1
    loss = QuadrupletLoss(0.0, 0.0)
    assert by_hand(loss, labels, tuples) == pytest.approx(0.6, abs=1e-9)
    assert loss.active.item() == 0.5
    loss = QuadrupletLoss(1.3, 1.3)
    value = by_hand(loss, torch.tensor([0, 0, 1, 2]), [(0, 1, 3, 2)])
    assert value == pytest.approx(0.1, abs=1e-9) and loss.active.item() == 1


def with_weights(loss, name, rows):
    """The loss in float64 and its own weights, at an attribute, replaced by these."""
    getattr(loss, name).data = torch.tensor(rows, dtype=torch.float64)
    return loss.double()


AXES = [[3.0, 0.0], [0.0, 0.5]]                           # as class weights: two directions
ONE = torch.tensor([[0.6, 0.8]], dtype=torch.float64)     # cosines .6 and .8 with them


def test_proxyanchor_by_hand():
    """alpha 2, delta .1; images (.6, .8) and (0, 1), both of class 0; three proxies.

    The one proxy with images: log(1 + e^(-2 (.6 - .1)) + e^(-2 (0 - .1))). Against others, over
    three: 0, log(1 + e^(2 (.8 + .1)) + e^(2 (1 + .1))), log(1 + e^(2 (-.6 + .1)) + e^(2 (0 +
    .1))).
    """
    loss = with_weights(ProxyAnchorLoss(3, 2, proxyanchor_alpha=2.0), "proxies",
                        [*AXES, [-2.0, 0.0]])
    expected = (log(1 + exp(-1) + exp(.2)) + (log(1 + exp(1.8) + exp(2.2))
                                              + log(1 + exp(-1) + exp(.2))) / 3)
    assert by_hand(loss, torch.tensor([0, 0]), None, HAND[1:3]) == pytest.approx(expected,
                                                                                 abs=1e-9)


def test_proxyncapp_by_hand():
    """T .5: squared distances .8 to the own proxy and .4: log(1 + e^((.8 - .4) / .5))."""
    loss = with_weights(ProxyNCAPlusPlusLoss(2, 2, proxyncapp_temperature=0.5), "proxies", AXES)
    value = by_hand(loss, torch.tensor([0]), None, ONE * 7)
    assert value == pytest.approx(log(1 + exp(.8)), abs=1e-9)


def test_normsoftmax_by_hand():
    """T .5: log(1 + e^((.8 - .6) / .5))."""
    loss = with_weights(NormSoftmaxLoss(2, 2, normsoftmax_temperature=0.5), "weight", AXES)
    value = by_hand(loss, torch.tensor([0]), None, ONE * 7)
    assert value == pytest.approx(log(1 + exp(.4)), abs=1e-9)


def test_cosface_by_hand():
    """s 5, m .35: log(1 + e^(5 (.8 - (.6 - .35))))."""
    loss = with_weights(CosFaceLoss(2, 2, cosface_scale=5.0), "weight", AXES)
    value = by_hand(loss, torch.tensor([0]), None, ONE * 7)
    assert value == pytest.approx(log(1 + exp(2.75)), abs=1e-9)


def test_sphereface_by_hand():
    """m 2, s 2, an image at 120 degrees from its own weight and at 30 from the other.

    120 lies in the second half turn: psi = -cos 240 - 2 = -1.5. With l = 1 the own logit is 2
    (-.5 - 1.5) / 2 = -2, the other 2 cos 30 = sqrt 3.
    """
    loss = with_weights(SphereFaceLoss(2, 2, 2, 1.0, 2.0), "weight", AXES).eval()
    loss.steps.fill_(1e6)
    embeddings = torch.tensor([[-.5, sqrt(.75)]], dtype=torch.float64)
    value = by_hand(loss, torch.tensor([0]), None, embeddings)
    assert value == pytest.approx(log(1 + exp(sqrt(3) + 2)), abs=1e-9)


def test_softtriple_by_hand():
    """Centres (1, 0) and (0, 1) of the own class, (-1, 0) and (0, -1) of the other; gamma .5.

    S = (.6 e^1.2 + .8 e^1.6) / (e^1.2 + e^1.6), S' = -(.6 e^-1.2 + .8 e^-1.6) / (e^-1.2 + e^-1.6);
    log(1 + e^(4 (S' - S + .1))) + tau (sqrt 2 + sqrt 2) / (2 x 2 x 1).
    """
    loss = with_weights(SoftTripleLoss(2, 2, 2, 4.0, 0.5, 0.1, 0.3), "centers",
                        [AXES, [[-2.0, 0.0], [0.0, -3.0]]])
    own = (.6 * exp(1.2) + .8 * exp(1.6)) / (exp(1.2) + exp(1.6))
    other = -(.6 * exp(-1.2) + .8 * exp(-1.6)) / (exp(-1.2) + exp(-1.6))
    expected = log(1 + exp(4 * (other - own + .1))) + .3 * 2 * sqrt(2) / 4
    value = by_hand(loss, torch.tensor([0]), None, ONE)
    assert value == pytest.approx(expected, abs=1e-5)     # the distances have 1e-5 added


def test_triplet_and_margin_losses_say_how_many_tuples_are_active():
    """Of the triplets by hand above: 1 of 2; of the margin loss's four terms 3."""
    tuples = [(0, 2, 3), (0, 2, 1)]
    for loss, active in ((TripletLoss(margin=0.2), 1 / 2), (MarginLoss(2), 3 / 4)):
        loss.double()(HAND, ALTERNATING, tuples)
        assert loss.active.dim() == 0 and loss.active.item() == pytest.approx(active)


# ---- invariances

@pytest.mark.parametrize("variant", COSINE_LOSSES)
def test_directions_alone_matter(variant):
    """Lengths of embeddings, proxies and class weights do not: the loss normalises them."""
    loss, (embeddings, labels) = build(variant), make_batch(variant)
    before = loss(embeddings, labels)
    for weight in loss.parameters():
        weight.data *= torch.linspace(1, 17, len(weight[..., 0].flatten()),
                                      dtype=torch.float64).view(*weight.shape[:-1], 1)
    torch.testing.assert_close(loss(embeddings * 0.01, labels), before)


# ---- the forms of indices_tuple

@one_of_each
@pytest.mark.parametrize("count", [1, 3, 10])
def test_three_forms_of_indices_tuple_give_the_same(variant, count):
    """A [T, 3] tensor, a list of tuples, three index tensors; of any integer type."""
    loss, (embeddings, labels) = build(variant), make_batch(variant)
    rows = some_triplets(labels, count)
    triplets, wanted = torch.tensor(rows), rows
    if isinstance(loss, QuadrupletLoss):                  # it draws a third class's images
        torch.manual_seed(0)
        wanted = loss.complete(triplets, labels).tolist()
    expected = ORACLES[type(loss)](loss, embeddings, labels, wanted)
    for form in (triplets, triplets.int(), [tuple(row) for row in rows], rows,
                 triplets.unbind(1), triplets.int().unbind(1)):
        torch.manual_seed(0)
        assert_same(loss, embeddings, loss(embeddings, labels, form), expected)


@one_of_each
def test_given_tuples_replace_the_sampler(variant):
    """With indices_tuple nothing is drawn: the random state stays."""
    loss, (embeddings, labels) = build(variant), make_batch(variant)
    state = torch.get_rng_state()
    loss(embeddings, labels, given(variant, labels, some_triplets(labels)))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("width", [3, 4, 6])
@pytest.mark.parametrize("variant", ["npair", "angular-narrow"])
def test_npair_takes_tuples_of_any_width(variant, width):
    """[T, 2 + N]: N negatives for each anchor; -1 in a negative's column stands for none."""
    loss, (embeddings, labels) = build(variant), make_batch(variant)
    rows = [[0, 1, *range(2, width)], [5, 4, *range(6, 4 + width)], [8, 3, *range(9 - width, 7)]]
    expected = ORACLES[type(loss)](loss, embeddings, labels, rows)
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


@pytest.mark.parametrize("variant", [variant for variant in ONE_OF_EACH
                                     if VARIANTS[variant][0] is not ContrastiveLoss])
def test_pairs_become_the_triplets_that_share_an_anchor(variant):
    """Miners of pairs return (a1, p, a2, n): positive pairs, negative pairs.

    Not of the contrastive loss, whose means over pairs and over triplets differ.
    """
    embeddings, labels = make_batch(variant)
    triplets = all_triplets(labels)
    positive_pairs = sorted({(a, p) for a, p, _ in triplets})
    negative_pairs = sorted({(a, n) for a, _, n in triplets})
    pairs = (*torch.tensor(positive_pairs).unbind(1), *torch.tensor(negative_pairs).unbind(1))
    loss, values = build(variant), []
    for form in (pairs, triplets):
        torch.manual_seed(0)                              # of the quadruplets' last images
        values.append(loss(embeddings, labels, form))
    torch.testing.assert_close(*values)


@one_of_each
def test_padded_rows_and_numpy_vectors_are_understood(variant):
    """A row of -1 is no tuple; (a, p, n) may be numpy arrays."""
    embeddings, labels = make_batch(variant)
    loss, triplets = build(variant), torch.tensor(some_triplets(labels))
    tuples = torch.tensor(given(variant, labels, triplets.tolist()))
    expected = loss(embeddings, labels, tuples)
    padded = torch.cat([tuples, torch.full((2, tuples.shape[1]), -1)])
    assert_same(loss, embeddings, loss(embeddings, labels, padded), expected)
    values = []
    for form in (tuple(triplets[:3].t().numpy()), triplets[:3]):
        torch.manual_seed(0)
        values.append(loss(embeddings, labels, form))
    torch.testing.assert_close(*values)


@pytest.mark.parametrize("variant", [
    "triplet", "margin", "contrastive", "lifted", "multisimilarity", "circle", "ntxent", "supcon",
    "histogram", "fastap", "smoothap", "recallatk", "snr", "quadruplet"])
def test_triplet_losses_refuse_wider_tuples(variant):
    """A second negative, as the n-pair sampler gives, is not dropped in silence."""
    embeddings, labels = make_batch(variant)
    tuples = torch.tensor([[0, 1, 2, 3, 8], [4, 5, 6, 7, 9]])
    if variant != "quadruplet":
        tuples = tuples[:, :4]
    with pytest.raises(ValueError, match="indices_tuple|expected 4"):
        build(variant)(embeddings, labels, tuples)


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
    class 1, so (-1 - 1 + 1) / 3, plus nu / 3 for each of the two tuples.
    """
    loss = MarginLoss(4, nu=0.25).double()
    loss(HAND, torch.tensor([1, 3, 1, 3]), [(0, 2, 3), (0, 2, 1)]).backward()
    assert loss.beta.grad.tolist() == pytest.approx([0, -1 / 3 + 0.5 / 3, 0, 0])


def test_margin_without_an_active_term_is_zero():
    """A tuple on the right sides of beta: d_ap 0.9 + 0.2 < 1.2 < 2 - 0.2. nu has no divisor."""
    loss = MarginLoss(2, nu=0.1, beta=1.2).double()
    value = loss(HAND, torch.tensor([0, 0, 1, 1]), [(0, 1, 3)])
    value.backward()
    assert value.item() == 0 and not loss.beta.grad.any()


@pytest.mark.parametrize("margin,active", [(0.2, 3), (0.0, 3), (0.9, 4), (0.25, 3)])
def test_divisor_counts_the_terms_above_zero(margin, active):
    """The loss times the number of active terms is the plain sum of the terms; 1 if none."""
    loss, labels = MarginLoss(2, margin=margin).double(), torch.tensor([0, 1, 0, 1])
    terms = [max(0, math.sqrt(2) - 1.2 + margin)] * 2
    terms += [max(0, 1.2 - 2 + margin), max(0, 1.2 - math.sqrt(0.8) + margin)]
    value = loss(HAND, labels, [(0, 2, 3), (0, 2, 1)]).item()
    assert value * active == pytest.approx(sum(terms), abs=1e-6)


def test_margin_of_a_rho_row_is_a_constant_that_is_not_active():
    """(0, 0, 1): d_aa = 0 and margin 0.7 leave 0.2 above beta, of no image; d_an = sqrt(0.8).

    The other term, 0.5 - 0.894 + 0.7 = 0.306, is the one active of two; beta's gradient is of
    both, (-1 + 1) / 2.
    """
    rows, loss = HAND.clone().requires_grad_(), MarginLoss(2, 0.7, beta=0.5).double()
    value = loss(rows, ALTERNATING, [(0, 0, 1)])
    assert value.item() == pytest.approx((0.2 + 1.2 - math.sqrt(0.8)) / 2)
    assert loss.active.item() == 1 / 2
    value.backward()
    away = (HAND[0] - HAND[1]) / math.sqrt(0.8) / 2
    torch.testing.assert_close(rows.grad[:2], torch.stack([-away, away]))
    assert not rows.grad[2:].any() and loss.beta.grad.tolist() == [0, 0]


def test_contrastive_takes_hard_pairs_once_each():
    """Sampling multisimilarity gives pairs: the mean of the push is over those that are near."""
    embeddings, labels = make_batch("contrastive")
    loss = make(ContrastiveLoss, sampling="multisimilarity")
    triplets = loss.sampler.give(embeddings, labels).tolist()
    expected = contrastive_oracle(loss, embeddings, labels, pairs=triplets)
    assert len(triplets) > 12
    assert_same(loss, embeddings, loss(embeddings, labels), expected)


def test_reference_fourth_image_is_the_anchor_of_a_row_with_another_negative():
    """Rows (0, 1, 2), (1, 0, 2), (2, 3, 0), (3, 2, 1): 2 or 3 for the first two, 1,000 draws."""
    torch.manual_seed(0)
    loss, labels = QuadrupletLoss(form="reference"), torch.tensor([0, 0, 1, 1, 2])
    triplets = torch.tensor([[0, 1, 2], [1, 0, 2], [2, 3, 0], [3, 2, 1], [-1] * 3])
    fourths = torch.stack([loss.complete(triplets, labels)[:, 3] for _ in range(1000)])
    for t, possible in enumerate(([2, 3], [2, 3], [0, 1, 3], [0, 1, 2], [-1])):
        drawn, counts = fourths[:, t].unique(return_counts=True)
        assert drawn.tolist() == possible
        assert (counts - 1000 / len(possible)).abs().max() < 70


RHO_LOSSES = (TripletLoss(), MarginLoss(5, beta=0.1), SNRLoss(), QuadrupletLoss(),
              ContrastiveLoss(), MultiSimilarityLoss(), QuadrupletLoss(form="reference"))


@pytest.mark.parametrize("loss", RHO_LOSSES, ids=lambda loss: type(loss).__name__)
@pytest.mark.parametrize("repeats", [1, 40])
def test_rho_rows_move_anchors_and_their_negatives_alone(loss, repeats):
    """With positive == anchor, few rows or many: gradients are finite, none from the pull.

    Row (0, 0, 1) leaves images 2 to 9 alone but the quadruplet's fourth, and pushes 0 and 1.
    """
    torch.manual_seed(0)
    rows = F.normalize(torch.randn(10, 3), dim=1)
    rows[1] = F.normalize(rows[0] + 0.1 * rows[1], dim=0)
    rows.requires_grad_()
    tuples = torch.tensor([[0, 0, 1]] * repeats)
    if isinstance(loss, QuadrupletLoss):
        tuples = F.pad(tuples, (0, 1), value=-1)
    loss.zero_grad()
    loss(rows, torch.arange(10) // 2, tuples).backward()
    assert torch.isfinite(rows.grad).all()
    assert (rows[0] - rows[1]) @ (rows.grad[0] - rows.grad[1]) < 0  # down the slope is apart
    if not isinstance(loss, SNRLoss):  # whose regulariser is of all images
        assert not rows.grad[2:].any()


def test_rho_pull_has_no_gradient_in_the_matrix_of_all_pairs():
    """500 dimensions in float32: |a|^2 + |a|^2 - 2 a.a is rounding, whose root has a slope."""
    rows = (100 * torch.randn(4, 500)).requires_grad_()
    anchors = torch.arange(4).repeat(10)
    sq_aa, _ = losses.pair_sq_distances(rows, anchors, anchors, anchors.flip(0))
    losses.distance_from_square(sq_aa).sum().backward()
    assert not sq_aa.any() and not rows.grad.any()


@pytest.mark.parametrize("loss,squared", [(TripletLoss(0.7, "facenet"), True),
                                          (MarginLoss(2, 0.7, sampling="facenet"), False)])
def test_facenet_uses_the_margin_and_the_distance_of_the_loss(loss, squared):
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


# ---- ArcFace: all angles

def at_angles(degrees, dtype=torch.float64):
    """Unit rows at these angles from the first axis, with a gradient."""
    radians = torch.as_tensor(degrees, dtype=torch.float64).deg2rad()
    return torch.stack([radians.cos(), radians.sin()], 1).to(dtype).requires_grad_()


def two_axes(dtype=torch.float64, **given):
    loss = make(ArcFaceLoss, 2, 2, dtype, **given)
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
def test_arcface_sampling_weighs_the_images(sampling):
    """none: every image once. Otherwise by how often each stands in the tuples."""
    embeddings, labels = make_batch("arcface")
    loss = ArcFaceLoss(NUM_CLASSES, DIM, sampling=sampling).double()
    assert (loss.sampler is None) == (sampling == "none")
    assert sampling == "none" or loss.sampler.method == sampling
    one_by_one = torch.stack([loss(row.unsqueeze(0), label.unsqueeze(0), [(0, 0, 0)])
                              for row, label in zip(embeddings, labels)])
    weights = torch.tensor(weights_of(labels, drawn(loss, embeddings, labels, 0)))
    torch.manual_seed(0)
    torch.testing.assert_close(loss(embeddings, labels), (one_by_one * weights).mean())


CLASS_WEIGHTS = ("arcface", "cosface", "sphereface", "normsoftmax", "softtriple", "proxynca",
                 "proxynca++", "proxyanchor", "crossentropy")


@pytest.mark.parametrize("variant", CLASS_WEIGHTS)
def test_a_miner_weighs_the_images_of_losses_with_class_weights(variant):
    """Pairs as a miner gives them: image 0 stands in four places, 1 in two, 2 and 3 in one."""
    loss, (embeddings, labels) = build(variant), make_batch(variant)
    pairs = tuple(map(torch.tensor, ([0, 0], [1, 2], [0, 3, -1], [1, 0, 2])))
    rows = [[0, 1], [0, 2], [0, 1], [3, 0]]
    assert weights_of(labels, rows)[:4] == [1, 0.5, 0.25, 0.25]
    expected = ORACLES[type(loss)](loss, embeddings, labels, rows)
    assert_same(loss, embeddings, loss(embeddings, labels, pairs), expected)


class Waits(torch.utils._python_dispatch.TorchDispatchMode):
    """Lists the operations whose result a GPU's host would have to wait for."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name in ("_local_scalar_dense", "nonzero", "bincount", "masked_select") or (
                name.startswith("index") and isinstance(args[1], (list, tuple)) and any(
                    part is not None and part.dtype == torch.bool for part in args[1])):
            self.found.append(name)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("sampling", [s for s in losses.TRIPLET_SAMPLINGS if s != "all"])
def test_weighing_the_images_waits_for_nothing(sampling, monkeypatch):
    embeddings, labels = make_batch("arcface")
    monkeypatch.setattr(losses, "check_indices", lambda *_: None)  # which looks on a CPU alone
    with Waits() as waits:
        losses.image_weights(embeddings.detach(), labels, None, samplers.Sampler(sampling))
    assert not waits.found
    with waits:
        samplers.Sampler(sampling)(embeddings.detach(), labels)
    assert waits.found  # as this one does


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

@pytest.mark.parametrize("variant", dict.fromkeys((*ONE_OF_EACH, *DEFAULTS)))
@pytest.mark.parametrize("dtype, count", [
    *((dtype, count) for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64)
      for count in (2, 3, 16)), *((dtype, count) for dtype in (torch.float16, torch.float32)
                                  for count in (128, 512))])
def test_every_float_type_and_batch_size(variant, dtype, count):
    """Finite values and gradients, the result float32 or more; near the float64 value."""
    torch.manual_seed(0)
    embeddings, labels = make_batch(variant, count, dim=32, num_classes=(count + 1) // 2)
    if not VARIANTS[variant][0].unit_norm:
        embeddings = embeddings.detach() * 5              # raw embeddings grow in training
    embeddings = embeddings.detach().to(dtype).requires_grad_()
    loss = build(variant, num_classes=256, dim=32, dtype=torch.float32)
    value = loss(embeddings, labels)
    assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert value.shape == () and value.isfinite() and value.requires_grad
    value.backward()
    assert embeddings.grad.dtype == dtype and embeddings.grad.isfinite().all()
    assert all(weight.grad.isfinite().all() for weight in loss.parameters())
    cases = [] if samples(loss) or count == 512 else [None]
    if 2 < count < 512:
        triplets = some_triplets(labels, 4 * count if count == 16 else 1)
        cases.append(torch.tensor(given(variant, labels, triplets)))
    exact = build(variant, num_classes=256, dim=32)
    # A cosine's rounding in float32, 1e-7, over a temperature of 0.01.
    tolerance = 2e-4 if variant in ("smoothap", "recallatk") else 1e-5
    for case in cases:
        near = loss(embeddings, labels, case).double()
        torch.testing.assert_close(near, exact(embeddings.double(), labels, case),
                                   rtol=1e-5, atol=tolerance)


@one_of_each
@pytest.mark.parametrize("many", [False, True])
def test_autocast_keeps_the_arithmetic_in_float32(variant, many):
    """Inside torch.autocast too the loss is the float32 one: half types cannot hold a loss."""
    loss, (embeddings, labels) = build(variant, dtype=torch.float32), make_batch(variant)
    embeddings = embeddings.detach().float().requires_grad_()
    triplets = all_triplets(labels) if many else some_triplets(labels)
    triplets = torch.tensor(given(variant, labels, triplets))
    expected = loss(embeddings, labels, triplets)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = loss(embeddings, labels, triplets)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


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
def test_degenerate_batches_give_finite_values_and_gradients(variant, dtype):
    """A batch without a tuple gives an exact zero, still in the graph, and zero gradients.

    That is, nothing but what regularises the loss; losses of all pairs are as their equation says.
    """
    for case, (rows, labels, has_tuples) in degenerate_batches().items():
        torch.manual_seed(0)
        embeddings = rows.to(dtype, copy=True).requires_grad_()
        loss = build(variant, num_classes=6, dtype=torch.float32)
        value = loss(embeddings, labels)
        assert value.isfinite() and value.requires_grad, case
        value.backward()
        grads = [embeddings.grad, *(weight.grad for weight in loss.parameters())]
        assert all(grad.isfinite().all() for grad in grads), case
        if samples(loss) and not has_tuples:
            rest = regulariser(loss, embeddings)
            torch.testing.assert_close(value.double(), rest.double(), rtol=1e-3, atol=1e-6)
            if not rest.item():
                assert value.item() == 0 and not any(grad.any() for grad in grads), case
        if dtype == torch.float64 and not samples(loss):
            expected = ORACLES[type(loss)](loss.double(), embeddings, labels)
            torch.testing.assert_close(loss(embeddings, labels), expected, rtol=1e-6, atol=1e-6)


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
    """A miner that found nothing: zero, with zero gradients for embeddings and own weights.

    Of what regularises a loss, value and gradients stay.
    """
    loss, (embeddings, labels) = build(variant), make_batch(variant)
    value, rest = loss(embeddings, labels, empty), regulariser(loss, embeddings)
    assert value.requires_grad
    assert_same(loss, embeddings, value, rest)
    if not rest.item():
        assert value.item() == 0
        value.backward()
        assert not embeddings.grad.any()
        assert not any(weight.grad.any() for weight in loss.parameters())


@pytest.mark.parametrize("variant", ["triplet", "margin", "contrastive", "contrastive-linear",
                                     "lifted", "snr", "quadruplet"])
def test_no_active_tuple_gives_zero(variant):
    """Positives that coincide and antipodal negatives: every term is below zero."""
    loss = build(variant)
    point = torch.eye(DIM, dtype=torch.float64)[:1]
    embeddings = torch.cat([point, point, -point, -point]).requires_grad_()
    labels = torch.tensor([0, 0, 1, 1])
    for indices_tuple in (None, all_triplets(labels), all_triplets(labels) * 5):
        embeddings.grad = None
        value, rest = loss(embeddings, labels, indices_tuple), regulariser(loss, embeddings)
        # A distance of 0 counts as 1e-8, for its gradient's sake.
        assert value.item() == pytest.approx(rest.item(), abs=2e-8) and value.requires_grad
        assert loss.active.item() == 0
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(
            gradients(value, loss, embeddings), gradients(rest, loss, embeddings)))


# ---- what is known to be wrong in public code, and is not here

@pytest.mark.parametrize("temperature", [1e-5, 1e-3])
def test_smoothap_is_average_precision_for_classes_of_any_size_in_any_order(temperature):
    """5, 3, 2 and 1 images of a class, shuffled; the sharp sigmoid counts ranks.

    The average precision from a sorted list, the query left out.
    """
    generator = torch.Generator().manual_seed(3)
    labels = torch.tensor([0] * 5 + [1] * 3 + [2] * 2 + [3])[torch.randperm(
        11, generator=generator)]
    rows = F.normalize(torch.randn(11, 4, dtype=torch.float64, generator=generator), dim=1)
    precisions = []
    for query in range(11):
        others = sorted((i for i in range(11) if i != query), key=lambda i: -rows[query] @ rows[i])
        hits = [bool(labels[i] == labels[query]) for i in others]
        if any(hits):
            precisions.append(sum(sum(hits[:rank + 1]) / (rank + 1) for rank, hit
                                  in enumerate(hits) if hit) / sum(hits))
    value = SmoothAPLoss(temperature)(rows, labels).item()
    assert len(precisions) == 10 and 0.1 < value < 0.9
    expected = 1 - sum(precisions) / 10
    assert value == pytest.approx(expected, abs=1e-9 if temperature == 1e-5 else 0.1)


def test_a_query_is_not_in_its_own_gallery():
    """Queries at 0 and 60 degrees, one class, and an image of another class between them.

    Each query's positive has rank 2: average precision 1/2, recall at 1 g(-1), at 2 g(0). As its
    own first hit a query would have average precision 5/6 and a rank one larger.
    """
    rows, labels = at_angles([0, 60, 30]), torch.tensor([0, 0, 1])
    assert SmoothAPLoss()(rows, labels).item() == pytest.approx(1 / 2, abs=1e-9)
    for k, expected in ((1, 1 - g(-1)), (2, 1 - g(0)), (3, 1 - g(1))):
        assert RecallAtKLoss([k])(rows, labels).item() == pytest.approx(expected, abs=1e-9)


def test_perfect_rankings():
    """Positives nearest to each query: smooth AP 0; ranks 1 and 2, so found at 1 are g(0) + g(-1).

    At 4 they are g(3) + g(2), of 2.
    """
    rows, labels = at_angles([0, 10, 25, 180, 190, 205]), torch.tensor([0, 0, 0, 1, 1, 1])
    assert SmoothAPLoss(1e-3)(rows, labels).item() == pytest.approx(0, abs=1e-9)
    for k, expected in ((1, 1 - g(0) - g(-1)), (4, 1 - (g(3) + g(2)) / 2)):
        value = RecallAtKLoss([k], recallatk_tau2=1e-4)(rows, labels).item()
        assert value == pytest.approx(expected, abs=1e-6)
    assert RecallAtKLoss([4], 0.01, 1e-4)(rows, labels).item() == pytest.approx(0, abs=1e-6)


def test_ranks_do_not_see_the_similarity_to_the_query_itself():
    embeddings, labels = make_batch(count=9, num_classes=3)
    similarities = losses.cosine_matrix(embeddings.detach())
    masks = losses.pairs_for(None, embeddings, labels, None)
    before, after = (losses.smooth_ranks(similarities + own * torch.eye(9), *masks, 0.1)
                     for own in (0, -5))
    assert all(torch.equal(x, y) for x, y in zip(before, after))


class Largest(torch.utils._python_dispatch.TorchDispatchMode):
    """Notes how many elements the largest tensor has that an operation makes."""
    elements = 0

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        made = function(*arguments, **(named or {}))
        for tensor in made if isinstance(made, (tuple, list)) else [made]:
            if torch.is_tensor(tensor):
                self.elements = max(self.elements, tensor.numel())
        return made


@pytest.mark.parametrize("variant", DEFAULTS)
def test_no_tensor_of_a_step_grows_with_the_cube_of_the_batch(variant):
    """64 images of two classes, so 31 positives each: a few [B, B], no [B, B, B]."""
    loss = build(variant, dtype=torch.float32)
    embeddings, labels = make_batch(variant, 64, num_classes=2)
    embeddings = embeddings.detach().float().requires_grad_()
    with Largest() as largest:
        loss(embeddings, labels).backward()
    assert 0 < largest.elements <= 4 * 64 * 64


@pytest.mark.parametrize("variant", ["smoothap", "recallatk"])
def test_ranks_keep_no_matrix_for_each_positive(variant):
    """What backward keeps is a few [B, B], not one for each of 31 positives."""
    kept, (embeddings, labels) = {}, make_batch(variant, 64, num_classes=2)

    def note(tensor):
        kept[tensor.data_ptr()] = tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        value = build(variant)(embeddings, labels)
    assert 0 < sum(kept.values()) <= 16 * 64 * 64
    value.backward()
    assert embeddings.grad.any()


@pytest.mark.parametrize("name", ["arcface", "cosface", "normsoftmax", "sphereface", "proxynca++",
                                  "proxyanchor", "softtriple"])
@pytest.mark.parametrize("degrees", [91, 120, 150, 175])
def test_negative_cosines_are_not_clamped(name, degrees):
    """Beyond the right angle to its own weight an image goes on being pulled back.

    The other class's weight is at right angles to both.
    """
    loss = make(LOSSES[name], 2, 3).eval()
    weight = next(loss.parameters())
    axes = torch.tensor([[1, 0, 0], [0, 0, 1]], dtype=torch.float64)
    weight.data = axes.repeat_interleave(weight.numel() // 6, 0).reshape(weight.shape)
    rows = F.pad(at_angles([degrees, degrees + 2]), (0, 1)).split(1)
    values = [loss(row, torch.tensor([0])) for row in rows]
    assert values[1] - values[0] > 1e-3
    gradients = torch.autograd.grad(values[0], [rows[0], weight])
    assert gradients[0].norm() > 0.01 and gradients[1][0].norm() > 0.01


def softtriple_similarity(gamma, centers, x):
    """S of class 0, read off a loss with one other class whose centres are at right angles to x.

    loss = log(1 + e^-S), without margin and regulariser.
    """
    loss = SoftTripleLoss(2, 3, len(centers), 1.0, gamma, 0.0, 0.0)
    loss = with_weights(loss, "centers", [centers, [[0.0, 0.0, 1.0]] * len(centers)])
    value = loss(torch.tensor([x], dtype=torch.float64), torch.tensor([0])).item()
    return -log(exp(value) - 1)


def test_softtriple_weighs_the_centres_of_a_class():
    """The softmax is over centres, its exponents divided by gamma; centres are unit vectors.

    x = (1, 0, 0), cosines .6, .8 and 0. A large gamma gives their mean 1.4 / 3, a small one the
    largest, .8; gamma 1 the weights e^.6, e^.8 and 1. Scaling one centre, not one axis, is free.
    """
    centers, x = [[.6, .8, 0.0], [.8, -.6, 0.0], [0.0, 1.0, 0.0]], [1.0, 0.0, 0.0]
    weights = exp(.6), exp(.8), 1
    for gamma, expected in ((1e6, 1.4 / 3), (1e-3, .8),
                            (1.0, (.6 * weights[0] + .8 * weights[1]) / sum(weights))):
        assert softtriple_similarity(gamma, centers, x) == pytest.approx(expected, abs=1e-6)
        scaled = [[7 * value for value in centers[0]], *centers[1:]]
        assert softtriple_similarity(gamma, scaled, x) == pytest.approx(expected, abs=1e-6)


def test_softtriple_merges_centres():
    """Coinciding centres have the least penalty, with a finite gradient; one centre has none."""
    apart, together, one = (make(SoftTripleLoss, softtriple_centers=k) for k in (3, 3, 1))
    together.centers.data[:, 1:] = together.centers.data[:, :1]
    empty = *make_batch("softtriple"), torch.empty(0, 3, dtype=torch.long)  # no tuple counts
    assert one(*empty).item() == 0
    assert together(*empty).item() < 0.01 < apart(*empty).item()
    together(*empty).backward()
    assert together.centers.grad.isfinite().all() and together.centers.grad.abs().max() < 100


@pytest.mark.parametrize("weight", [0.0, 0.1])
def test_snr_without_an_active_triplet_is_its_regulariser(weight):
    """Positives coincide, negatives are opposite: 0 - 4 + .2 < 0. Sums 1.4: no NaN of 0 / 0."""
    loss = SNRLoss(snr_lambda=weight).double()
    point = torch.tensor([[.6, .8, 0]], dtype=torch.float64)
    embeddings = torch.cat([point, point, -point, -point]).requires_grad_()
    labels = torch.tensor([0, 0, 1, 1])
    for tuples in (None, all_triplets(labels)):
        value = loss(embeddings, labels, tuples)
        assert value.item() == pytest.approx(1.4 * weight, abs=1e-12) and loss.active == 0
        gradient, = torch.autograd.grad(value, embeddings)
        signs = torch.tensor([1, 1, -1, -1.]).double().unsqueeze(1)
        torch.testing.assert_close(gradient, signs.expand(4, 3) * weight / 4)


@pytest.mark.parametrize("sampling", ["none", "multisimilarity"])
def test_multisimilarity_keeps_positives_of_similarity_one(sampling):
    """A positive that coincides with its anchor counts, where a negative is as similar.

    Two images of class 0 and one of class 1 at one point: anchors 0 and 1 have s_p = s_n = 1,
    lambda .5: log(1 + e^-1) / 2 + log(1 + e^25) / 50; image 2 has no positive.
    """
    loss = MultiSimilarityLoss(multisimilarity_lambda=0.5, sampling=sampling).double()
    rows = torch.tensor([[1, 0], [1, 0], [1, 0]], dtype=torch.float64)
    own = log(1 + exp(-1)) / 2 + log(1 + exp(25)) / 50
    third = log(1 + 2 * exp(25)) / 50 if sampling == "none" else 0
    value = loss(rows, torch.tensor([0, 0, 1])).item()
    assert value == pytest.approx((2 * own + third) / 3, abs=1e-9)


@pytest.mark.parametrize("epsilon", [0.0, 0.1, 0.2])
@pytest.mark.parametrize("seed", range(3))
def test_multisimilarity_mines_as_in_the_paper(epsilon, seed):
    """Eq. 7 and 8 as loops: a negative with s + e > the least positive, a positive with s - e <
    the largest negative; images without pairs still count in the mean.
    """
    embeddings, labels = make_batch(count=14, seed=seed)
    labels[:2] = torch.tensor([4, 5])
    unit, tuples = F.normalize(embeddings.detach(), dim=1), []
    for a, (positives, negatives) in enumerate(pair_sets(labels, None)):
        if positives:
            least = min(unit[a] @ unit[p] for p in positives)
            most = max(unit[a] @ unit[n] for n in negatives)
            tuples += [[a, p, n] for p in positives if unit[a] @ unit[p] - epsilon < most
                       for n in negatives if unit[a] @ unit[n] + epsilon > least]
    loss = make(MultiSimilarityLoss, mining_epsilon=epsilon)
    expected = multisimilarity_oracle(loss, embeddings, labels, tuples)
    assert 0 < len(tuples) < len(all_triplets(labels))
    assert_same(loss, embeddings, loss(embeddings, labels), expected)


@pytest.mark.parametrize("bins", [1, 2, 5, 100])
def test_bins_are_intervals(bins):
    """One more node than bins, the outermost at the ends of the range; a value is shared."""
    places = torch.tensor([[0.0, bins / 2, bins, 0.25]], dtype=torch.float64)
    nodes = losses.soft_histogram(places, torch.ones(1, 4, dtype=torch.bool), bins)
    assert nodes.shape == (1, bins + 1) and nodes.sum().item() == pytest.approx(4)
    assert (nodes[0] * torch.arange(bins + 1)).sum().item() == pytest.approx(places.sum().item())
    # One interval: every pair stands on -1 with (1 - s) / 2 and on 1 with (1 + s) / 2.
    if bins == 1:
        positive, negative = (1 + -.6 / 2) / 2, (1 + .1) / 2    # means of (0, -.6); of .6 -1 .8 0
        expected = (1 - negative) * (1 - positive) + negative
        assert by_hand(HistogramLoss(1)) == pytest.approx(expected, abs=1e-9)


def test_quadruplets_end_in_an_image_of_a_third_class():
    """Any such image, each as often; -1 where there is none, also for a row that is no tuple."""
    torch.manual_seed(0)
    labels = torch.tensor([0, 0, 1, 2, 2, 3])
    triplets = torch.tensor([[0, 1, 2]]).repeat(3000, 1)
    quadruplets = QuadrupletLoss().complete(triplets, labels)
    assert torch.equal(quadruplets[:, :3], triplets)
    counts = torch.bincount(quadruplets[:, 3], minlength=6).tolist()
    assert counts[:3] == [0, 0, 0] and all(abs(count - 1000) < 100 for count in counts[3:])
    only_two = QuadrupletLoss().complete(torch.tensor([[0, 1, 2], [3, 4, 0]]),
                                       torch.tensor([0, 0, 1, 1, 1, 0]))
    assert only_two[:, 3].tolist() == [-1, -1]
    assert len(QuadrupletLoss().complete(torch.empty(0, 3, dtype=torch.long), labels)) == 0


# ---- SphereFace: the margin comes in step by step

def test_sphereface_anneals_with_the_training_steps():
    """l = max(5, 1500 / (1 + t / 10)) at step t = 0, 1, ...; evaluation neither counts nor steps.

    t = 0: 1500; t = 10: 750; from t = 2990 on 5.
    """
    loss, (embeddings, labels) = make(SphereFaceLoss), make_batch("sphereface")
    twin = make(SphereFaceLoss).eval()
    for step in range(12):
        twin.steps.fill_(step)
        expected = ORACLES[SphereFaceLoss](twin, embeddings, labels)
        for training in (False, True):
            value = loss.train(training)(embeddings, labels)
            torch.testing.assert_close(value, expected, rtol=1e-10, atol=0)
        assert loss.steps.item() == step + 1
    assert "steps" not in dict(loss.named_parameters())
    assert twin(embeddings, labels) == twin(embeddings, labels) and twin.steps.item() == 11
    for step, plain in ((0, 1500), (10, 750), (2989, 1500 / 299.9), (2990, 5), (9e6, 5)):
        twin.steps.fill_(step)
        expected = ORACLES[SphereFaceLoss](twin, embeddings, labels)
        assert max(5, 1500 / (1 + step / 10)) == pytest.approx(plain)
        torch.testing.assert_close(twin(embeddings, labels), expected)


def test_sphereface_steps_are_in_the_checkpoint():
    loss, (embeddings, labels) = make(SphereFaceLoss), make_batch("sphereface")
    for _ in range(7):
        loss(embeddings, labels)
    assert loss.state_dict()["steps"].item() == 7
    restored = SphereFaceLoss(NUM_CLASSES, DIM).double()
    restored.load_state_dict(loss.state_dict())
    torch.testing.assert_close(restored(embeddings, labels), loss(embeddings, labels))
    assert restored.steps.item() == 8


@pytest.mark.parametrize("margin", [1, 2, 3, 4, 5])
def test_sphereface_own_logit_falls_with_the_angle_without_jumps(margin):
    """psi falls from 1 at 0 degrees to 1 - 2 m at 180, continuous between the half turns."""
    loss = SphereFaceLoss(2, 3, margin, 0.0, 1.0).double().eval()
    loss.steps.fill_(1e12)                                # l = 0 but for 1.5e-8
    loss.weight.data = torch.tensor([[1, 0, 0], [0, 0, 1]], dtype=torch.float64)
    values = [-log(exp(loss(F.pad(row, (0, 1)).unsqueeze(0), torch.tensor([0])).item()) - 1)
              for row in at_angles(torch.linspace(0, 180, 181)).detach()]
    assert values[0] == pytest.approx(1, abs=1e-6)
    assert values[-1] == pytest.approx(1 - 2 * margin, abs=1e-6)
    drops = [before - after for before, after in zip(values, values[1:])]
    assert all(-1e-7 < drop < margin * math.pi / 180 + 1e-6 for drop in drops)


# ---- bad input

@variants
def test_embeddings_that_are_not_finite_are_named(variant):
    """FloatingPointError with the first row and its class, whether tuples are given or not."""
    loss, (embeddings, labels) = build(variant), make_batch(variant)
    where = f"2 of 12 .*row 7 of the batch, of class {int(labels[7])};"
    for bad in (math.nan, math.inf, -math.inf):
        broken = embeddings.detach().clone()
        broken[[7, 9], 1] = bad
        for rows, indices_tuple in ((broken, None), (broken.float(), some_triplets(labels)),
                                    (broken.half(), [])):
            with pytest.raises(FloatingPointError, match=where):
                loss(rows, labels, indices_tuple)


def test_infinities_that_cancel_and_sums_that_overflow_are_told_apart():
    """inf and -inf in a row are not finite; large numbers of a half type are."""
    labels = torch.tensor([1, 0])
    rows = torch.zeros(2, 4)
    rows[1] = torch.tensor([math.inf, -math.inf, 0, 0])
    with pytest.raises(FloatingPointError, match="1 of 2 .* row 1 of the batch, of class 0"):
        losses.check_batch(TripletLoss(), rows, labels)
    losses.check_batch(TripletLoss(), torch.full((2, 16), 6e4, dtype=torch.float16), labels)
    losses.check_batch(TripletLoss(), torch.full((2, 16), 3e38), labels)


@one_of_each
def test_labels_of_another_length_are_refused(variant):
    loss, (embeddings, labels) = build(variant), make_batch(variant)
    for rows, names in ((embeddings, labels[:-1]), (embeddings[:-1], labels),
                        (embeddings, labels.unsqueeze(1)), (embeddings[0], labels[0]),
                        (embeddings.unsqueeze(0), labels.unsqueeze(0))):
        shapes = f"{re.escape(str(list(rows.shape)))}.*{re.escape(str(list(names.shape)))}"
        with pytest.raises(ValueError, match=shapes):
            loss(rows, names)


@pytest.mark.parametrize("variant", ["margin", "margin-constant", "proxynca", "crossentropy",
                                     "arcface", "proxyanchor", "proxynca++", "normsoftmax",
                                     "cosface", "sphereface", "softtriple"])
@pytest.mark.parametrize("wrong", [NUM_CLASSES, -1, 10 ** 6])
def test_labels_beyond_the_weights_are_refused(variant, wrong):
    """One row of weights for each class: a ValueError with both ranges, not an index error."""
    loss, (embeddings, labels) = build(variant), make_batch(variant)
    labels[3] = wrong
    low, high = min(0, wrong), max(NUM_CLASSES - 1, wrong)
    with pytest.raises(ValueError, match=f"4 classes, 0 to 3; .*from {low} to {high}"):
        loss(embeddings, labels)


def test_every_loss_with_weights_is_in_the_test_above():
    """A loss with weights knows how many classes it has."""
    marks = test_labels_beyond_the_weights_are_refused.pytestmark
    classes = {VARIANTS[variant][0] for variant in marks[1].args[1]}
    assert classes == {loss_class for loss_class in LOSSES.values() if loss_class.lr_flag}


@pytest.mark.parametrize("name", [name for name, loss_class in LOSSES.items()
                                  if "sampling" in inspect.signature(loss_class).parameters])
def test_samplings_that_a_loss_cannot_use_are_refused(name):
    """The message says the loss, the sampling and those that it takes."""
    loss_class = LOSSES[name]
    others = {*samplers.METHODS, "none", "nonsense"} - {*loss_class.samplings}
    assert {"npair", "nonsense"} <= others
    for sampling in others:
        with pytest.raises(ValueError, match=f"{loss_class.__name__} .*--sampling {sampling}; it "
                                             f"takes {', '.join(loss_class.samplings)}"):
            make(loss_class, sampling=sampling)


# Values outside of each flag's domain; NaN and infinity are outside of every float's.
OUTSIDE = {
    "margin": [-0.1], "beta": [-0.1], "nu": [-1e-3], "l2npair": [-0.02],
    "arcface_scale": [0.0, -1.0],
    "arcface_margin": [-0.01, 3.15], "contrastive_margin": [0.0, -1.0], "lifted_margin": [-0.1],
    "lifted_l2": [-0.1], "multisimilarity_alpha": [0.0, -2.0],
    "multisimilarity_beta": [0.0, -50.0], "multisimilarity_lambda": [-1.1, 1.1],
    "proxyanchor_alpha": [0.0, -32.0], "proxyanchor_delta": [-1.1, 1.1],
    "proxyncapp_temperature": [0.0, -0.1], "cosface_scale": [0.0, -64.0],
    "cosface_margin": [-0.1, 2.1], "sphereface_margin": [0, -4], "sphereface_lambda": [-1.0],
    "sphereface_scale": [0.0, -64.0], "normsoftmax_temperature": [0.0, -0.05],
    "softtriple_centers": [0, -1], "softtriple_lambda": [0.0, -20.0],
    "softtriple_gamma": [0.0, -0.1], "softtriple_delta": [-0.01], "softtriple_tau": [-0.2],
    "circle_margin": [-1.0, 1.0], "circle_gamma": [0.0, -80.0], "ntxent_temperature": [0.0, -0.1],
    "supcon_temperature": [0.0, -0.1], "angular_alpha": [0.0, -45.0, 90.0, 135.0],
    "angular_weight": [-2.0], "histogram_bins": [0, -100], "snr_margin": [-0.2],
    "snr_lambda": [-0.005], "fastap_bins": [0, -10], "smoothap_temperature": [0.0, -0.01],
    "recallatk_k": [[0], [1, -2]], "recallatk_tau1": [0.0, -1.0],
    "recallatk_tau2": [0.0, -0.01], "quadruplet_margin1": [-0.2], "quadruplet_margin2": [-0.2],
    "mining_epsilon": [-0.1], "rho_probability": [-0.1, 1.1], "distance_cutoff": [0.4, -1.0]}
NOT_NUMBERS = [math.nan, math.inf, -math.inf]


SAMPLER_OPTIONS = inspect.signature(samplers.Sampler).parameters


def number_flags():
    """The flags of the losses and of their samplers that take numbers, learning rates aside."""
    return [action for action in flags()._actions if action.type in (int, float)
            and (action.container.title == "loss" or action.dest in SAMPLER_OPTIONS)
            and not action.dest.endswith("_lr")]


def test_every_flag_has_its_domain_tested():
    assert {action.dest for action in number_flags()} == set(OUTSIDE)


def sampling_of(name):
    """A sampling that builds a sampler where the loss takes one."""
    return next((sampling for sampling in ("distance", "semihard", "npair")
                 if sampling in LOSSES[name].samplings), "none")


@pytest.mark.parametrize("flag", OUTSIDE)
def test_values_outside_of_a_flags_domain_are_refused(flag):
    """ValueError with the flag and the value, from every loss that reads the flag."""
    action = next(action for action in number_flags() if action.dest == flag)
    readers = [name for name in LOSSES if flag in FLAGS_OF[name]]
    not_numbers = NOT_NUMBERS if action.type is float else []
    assert readers
    for name in readers:
        for value in OUTSIDE[flag] + not_numbers:
            opt = options()
            opt.sampling = sampling_of(name)
            setattr(opt, flag, value)
            with pytest.raises(ValueError) as error:
                select(name, opt, NUM_CLASSES)
            worst = min(value) if isinstance(value, list) else value
            assert f"--{flag} {worst}: " in str(error.value)


def test_values_at_the_ends_of_a_domain_are_taken():
    """Those that the help texts allow."""
    for loss_class, given_values in (
            (TripletLoss, {"margin": 0.0}), (ArcFaceLoss, {"arcface_margin": math.pi}),
            (MultiSimilarityLoss, {"multisimilarity_lambda": -1.0}),
            (CircleLoss, {"circle_margin": 0.0}), (HistogramLoss, {"histogram_bins": 1}),
            (FastAPLoss, {"fastap_bins": 1}), (SphereFaceLoss, {"sphereface_margin": 1}),
            (SphereFaceLoss, {"sphereface_lambda": 0.0}),
            (SoftTripleLoss, {"softtriple_tau": 0.0}),
            (SoftTripleLoss, {"softtriple_centers": 1}), (RecallAtKLoss, {"recallatk_k": [1]}),
            (CosFaceLoss, {"cosface_margin": 0.0}), (AngularLoss, {"angular_weight": 0.0}),
            (LiftedLoss, {"lifted_margin": 0.0, "lifted_l2": 0.0}),
            (SNRLoss, {"snr_margin": 0.0, "snr_lambda": 0.0}),
            (QuadrupletLoss, {"quadruplet_margin1": 0.0, "quadruplet_margin2": 0.0})):
        loss = make(loss_class, **given_values)
        embeddings, labels = make_batch()
        value = loss(embeddings, labels)
        assert value.isfinite()
        value.backward()
        assert embeddings.grad.isfinite().all()


# ---- the table that --loss reads

def flags():
    parser = argparse.ArgumentParser()
    losses.add_arguments(parser)
    samplers.add_arguments(parser)
    return parser


def options(*argv, sampling="distance"):
    """The parsed flags of the two modules, those filled in later set to values of their own."""
    parser = flags()
    parser.set_defaults(embed_dim=DIM, sampling=sampling, proxy_lr=3e-3, loss_lr=4e-3, lr=1e-5)
    return parser.parse_args(argv)


def select(name, opt, num_classes):
    """loss_select of the named loss, whatever opt has."""
    opt.loss = name
    return loss_select(opt, num_classes)


@pytest.mark.parametrize("name,learning_rate", [
    ("marginloss", 5e-4), ("triplet", None), ("npair", None), ("proxynca", 3e-3),
    ("crossentropy", 4e-3), ("arcface", 4e-3), ("contrastive", None), ("lifted", None),
    ("multisimilarity", None), ("circle", None), ("ntxent", None), ("supcon", None),
    ("angular", None), ("histogram", None), ("fastap", None), ("smoothap", None),
    ("recallatk", None), ("snr", None), ("quadruplet", None), ("proxyanchor", 4e-3),
    ("proxynca++", 4e-3), ("normsoftmax", 4e-3), ("cosface", 4e-3), ("sphereface", 4e-3),
    ("softtriple", 4e-3)])
def test_loss_select_builds_the_loss_and_its_group(name, learning_rate):
    """One group for all weights of the loss, without decay."""
    loss, group = select(name, options(sampling=sampling_of(name)), NUM_CLASSES)
    assert type(loss) is LOSSES[name]
    if learning_rate is None:
        assert group is None and not list(loss.parameters())
    else:
        assert group == {"params": list(loss.parameters()), "lr": learning_rate,
                         "weight_decay": 0}
    embeddings, labels = make_batch("triplet" if loss.unit_norm else "npair")
    assert loss(embeddings, labels).isfinite()


def test_the_table_above_has_every_loss():
    """Every key of LOSSES has its oracle, its variants here and its line in the test above."""
    assert set(LOSSES.values()) == set(ORACLES)
    assert {loss_class for loss_class, _ in VARIANTS.values()} == set(ORACLES)
    marks = test_loss_select_builds_the_loss_and_its_group.pytestmark
    assert {name for name, _ in marks[0].args[1]} == set(LOSSES)
    assert all(flags().parse_args(["--loss", name]).loss == name for name in LOSSES)


def test_constant_beta_adds_no_group():
    loss, group = select("marginloss", options("--beta_constant"), NUM_CLASSES)
    assert group is None and not list(loss.parameters())


def test_loss_select_passes_every_option():
    """Non-default flags reach the modules that are built."""
    loss, group = select("marginloss", options(
        "--margin", "0.3", "--beta", "0.8", "--beta_lr", "0.01", "--nu", "0.2", "--sampling",
        "facenet"), 9)
    assert (loss.margin, loss.nu, loss.sampler.margin) == (0.3, 0.2, 0.3)
    assert loss.beta.tolist() == pytest.approx([0.8] * 9) and group["lr"] == 0.01
    assert (loss.sampler.method, loss.sampler.squared) == ("facenet", False)
    loss, _ = select("triplet", options("--margin", "0.4", "--distance_cutoff", "1.4"), 9)
    assert (loss.margin, loss.sampler.margin, loss.sampler.distance_cutoff) == (0.4, 0.4, 1.4)
    assert (loss.sampler.method, loss.sampler.squared) == ("distance", True)
    loss, _ = select("npair", options("--l2npair", "0.5"), 9)
    assert loss.l2npair == 0.5 and loss.sampler.method == "npair"
    loss, group = select("proxynca", options(
        "--proxynca_positive_in_denominator", "--proxy_lr", "0.7"), 9)
    assert loss.positive_in_denominator and group["lr"] == 0.7
    assert loss.proxies.shape == (9, DIM)
    loss, group = select("crossentropy", options("--loss_lr", "0.6"), 9)
    assert loss.classifier.weight.shape == (9, DIM) and group["lr"] == 0.6
    loss, group = select("arcface", options(
        "--arcface_scale", "30", "--arcface_margin", "0.3", "--sampling", "multisimilarity",
        "--mining_epsilon", "0.2", "--loss_lr", "0.6"), 9)
    assert (loss.scale, loss.margin, loss.weight.shape) == (30, 0.3, (9, DIM))
    assert (loss.sampler.method, loss.sampler.mining_epsilon) == ("multisimilarity", 0.2)
    assert group["lr"] == 0.6
    for name in ("triplet", "marginloss"):
        loss, _ = select(name, options("--mining_epsilon", "0.3"), 9)
        assert loss.sampler.mining_epsilon == 0.3


# Which flags each loss reads, learning rates and the sampler's included.
FLAGS_OF = {
    "marginloss": ["margin", "beta", "beta_constant", "nu", "beta_lr"], "triplet": ["margin"],
    "npair": ["l2npair"], "angular": ["angular_alpha", "angular_weight", "l2npair"],
    "proxynca": ["proxy_lr", "proxynca_positive_in_denominator"], "crossentropy": ["loss_lr"],
    "arcface": ["arcface_scale", "arcface_margin", "loss_lr"],
    "contrastive": ["contrastive_margin", "contrastive_linear"],
    "lifted": ["lifted_margin", "lifted_l2"],
    "multisimilarity": ["multisimilarity_alpha", "multisimilarity_beta",
                        "multisimilarity_lambda"],
    "circle": ["circle_margin", "circle_gamma"], "ntxent": ["ntxent_temperature"],
    "supcon": ["supcon_temperature"], "histogram": ["histogram_bins"], "fastap": ["fastap_bins"],
    "smoothap": ["smoothap_temperature"],
    "recallatk": ["recallatk_k", "recallatk_tau1", "recallatk_tau2"],
    "snr": ["snr_margin", "snr_lambda"],
    "quadruplet": ["quadruplet_margin1", "quadruplet_margin2"],
    "proxyanchor": ["proxyanchor_alpha", "proxyanchor_delta", "loss_lr"],
    "proxynca++": ["proxyncapp_temperature", "loss_lr"],
    "normsoftmax": ["normsoftmax_temperature", "loss_lr"],
    "cosface": ["cosface_scale", "cosface_margin", "loss_lr"],
    "sphereface": ["sphereface_margin", "sphereface_lambda", "sphereface_scale", "loss_lr"],
    "softtriple": ["softtriple_centers", "softtriple_lambda", "softtriple_gamma",
                   "softtriple_delta", "softtriple_tau", "loss_lr"]}
for _name in ("marginloss", "triplet", "arcface", "contrastive", "lifted", "multisimilarity",
              "circle", "ntxent", "supcon", "snr", "quadruplet"):
    FLAGS_OF[_name] += ["distance_cutoff", "mining_epsilon", "rho_probability", "positives",
                        "form"]
    if "margin" not in FLAGS_OF[_name] and _name != "quadruplet":  # which has its own two
        FLAGS_OF[_name].append("margin")  # of facenet sampling
for _name in ("npair", "angular", "histogram", "softtriple"):
    FLAGS_OF[_name].append("form")


def contents(name, opt):
    """What loss_select builds, as comparable values: attributes, weights and learning rates."""
    torch.manual_seed(0)
    loss, group = select(name, opt, NUM_CLASSES)
    found = {"rate": group and group["lr"],
             "parameters": [key for key, _ in loss.named_parameters()],
             "state": {key: value.tolist() for key, value in loss.state_dict().items()}}
    for place, module in loss.named_modules():
        for holder in (module, getattr(module, "sampler", None)):
            for key, value in vars(holder).items() if holder else ():
                if isinstance(value, (bool, int, float, str, tuple, list, type(None))):
                    found[place, type(holder).__name__, key] = value
    return found


def another(action):
    """A value other than the flag's default, in its domain and of its type."""
    if action.nargs == 0:
        return not action.default
    if action.choices:
        return next(choice for choice in action.choices if choice != action.default)
    if action.default is None or action.dest.endswith("_lr"):
        return 1.3
    if action.nargs == "+":
        return [1, 3]
    return action.default + 1 if action.type is int else action.default / 2 or 0.01


@pytest.mark.parametrize("name", LOSSES)
def test_every_flag_reaches_the_losses_that_read_it_and_no_other(name):
    """Each flag changed on its own changes what is built, for a loss of FLAGS_OF, or nothing."""
    walked = [action for action in flags()._actions if action.dest not in ("help", "loss")
              and (action.container.title == "loss" or action.dest in SAMPLER_OPTIONS)]
    opt = options(sampling=sampling_of(name))
    before = contents(name, opt)
    for action in walked:
        changed = options(sampling=sampling_of(name))
        setattr(changed, action.dest, another(action))
        assert getattr(changed, action.dest) != getattr(opt, action.dest)
        reads = action.dest in FLAGS_OF[name]
        assert (contents(name, changed) != before) == reads, action.dest
    assert set(FLAGS_OF[name]) <= {action.dest for action in walked}
    for sampling in LOSSES[name].samplings:
        opt.sampling = sampling
        sampler = getattr(select(name, opt, NUM_CLASSES)[0], "sampler", None)
        assert (sampler.method if sampler else "none") == sampling


def test_which_losses_want_raw_embeddings_or_faster_weights():
    """Those of the papers with a penalty of the lengths; the authors' factor of the proxies."""
    raw = {name for name, loss_class in LOSSES.items() if not loss_class.unit_norm}
    assert raw == {"npair", "lifted", "angular"}
    fast = {name: loss_class.lr_factor for name, loss_class in LOSSES.items()
            if loss_class.lr_factor != 1}
    assert fast == {"proxyanchor": 100, "proxynca++": 100, "softtriple": 100, "arcface": 50,
                    "cosface": 50, "sphereface": 50, "normsoftmax": 50}


@pytest.mark.parametrize("name, length", [("arcface", 3 ** -0.5), ("cosface", 3 ** -0.5),
                                          ("normsoftmax", 3 ** -0.5), ("sphereface", 1),
                                          ("softtriple", (128 / 3000) ** 0.5)])
def test_own_weights_start_at_the_lengths_of_the_authors_code(name, length):
    """In the root mean square, 100 classes in 128 dimensions: from -b to b it is b sqrt(D / 3).

    b is 1 / sqrt(D) of torch.nn.Linear; sqrt(3 / D) of Caffe's xavier, which SphereFace has; and
    1 / sqrt(C K) for SoftTriple's ten centres.
    """
    weight, = make(LOSSES[name], 100, 128).parameters()
    assert weight.square().sum(-1).mean().sqrt().item() == pytest.approx(length, rel=0.02)


def test_samplers_get_the_margin_and_the_distance_of_the_loss():
    """facenet's negatives for the quadruplet loss: squared distances and its first margin."""
    loss, _ = select("quadruplet", options("--sampling", "facenet", "--margin", "0.7",
                                                "--quadruplet_margin1", "0.3"), NUM_CLASSES)
    assert (loss.sampler.margin, loss.sampler.squared) == (0.3, True)


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_declares_what_it_wants(name):
    """The attributes that the rest of the pipeline reads, and defaults equal to the flags'."""
    loss_class, parser = LOSSES[name], flags()
    assert isinstance(loss_class.unit_norm, bool)
    assert set(loss_class.samplings) <= {*samplers.METHODS, "none"}
    assert loss_class.min_samples_per_class in (1, 2)
    defaults = vars(parser.parse_args([]))
    assert loss_class.lr_flag in (None, *defaults)
    parameters = inspect.signature(loss_class).parameters
    for parameter in parameters.values():
        if defaults.get(parameter.name) is not None:
            default = parameter.default
            default = list(default) if isinstance(default, tuple) else default
            assert default == defaults[parameter.name], parameter.name
    if "sampling" in parameters:
        assert parameters["sampling"].default == loss_class.samplings[0]
    assert list(inspect.signature(loss_class.forward).parameters) == [
        "self", "embeddings", "labels", "indices_tuple"]


@pytest.mark.parametrize("name, sampling", [
    (name, sampling) for name, loss_class in LOSSES.items()
    for sampling in loss_class.samplings or ("none",)])
def test_every_sampling_trains(name, sampling):
    """Ten steps of gradient descent on the embeddings lower the loss over all triplets."""
    torch.manual_seed(0)
    loss, _ = select(name, options("--sampling", sampling), NUM_CLASSES)
    raw, labels = make_batch(count=16)
    triplets = all_triplets(labels)
    raw = raw.detach().requires_grad_()
    before = loss.eval()(raw, labels, triplets).item()
    optimizer = torch.optim.SGD([raw], lr=0.5)
    for _ in range(10):
        optimizer.zero_grad()
        loss(F.normalize(raw, dim=1), labels).backward()
        optimizer.step()
    assert loss(F.normalize(raw, dim=1), labels, triplets).item() < before


# ---- the checks of check_loss.py

CHECKS = {"contract", "types and sizes", "degenerate", "gradient", "order", "names of classes",
          "rotation", "bad input", "learning", "memory"}


def checked(capsys, *names):
    """check_loss.main([NAME, ...]) -> what it returns, {loss: {check: message}}."""
    capsys.readouterr()
    failed = check_loss.main(list(names))
    table = {}
    *lines, last = capsys.readouterr().out.splitlines()
    for line in lines:
        table.setdefault(line[:16].strip(), {})[line[17:35].strip()] = line[36:]
    assert last == (f"failed: {', '.join(failed)}" if failed else "all checks passed")
    return failed, table


def test_all_losses_pass_the_checks(capsys):
    """A line for each check and, after those that pass, the time of a step."""
    failed, table = checked(capsys, "all")
    assert failed == [] and list(table) == list(LOSSES)
    for lines in table.values():
        assert set(lines) == {*CHECKS, "a step, B 112"}
        assert all(lines[check] == "pass" for check in CHECKS)
        assert re.fullmatch(r"\d+\.\d ms", lines["a step, B 112"])


class SoundLoss(losses.Loss):
    """Positives towards cosine 1, negatives below 0.2: passes the checks; broken ones below."""

    @losses.full_precision
    def forward(self, embeddings, labels, indices_tuple=None):
        positive, negative = losses.pairs_for(None, embeddings, labels, indices_tuple)
        return self.value(losses.cosine_matrix(embeddings), embeddings, labels, positive, negative)

    def value(self, cosines, embeddings, labels, positive, negative):
        return (losses.mean_where(1 - cosines, positive)
                + losses.mean_where(cosines.exp(), negative))


class LabelsAsNumbers(SoundLoss):
    def value(self, cosines, embeddings, labels, positive, negative):
        return ((labels.unsqueeze(1) - labels).abs() * cosines).mean()


class Detached(SoundLoss):
    def value(self, cosines, embeddings, labels, positive, negative):
        return losses.mean_where(cosines.detach() * cosines, negative)


class RootAtZero(SoundLoss):
    def value(self, cosines, embeddings, labels, positive, negative):
        sq_distances = (embeddings.unsqueeze(1) - embeddings).square().sum(2)
        return sq_distances[positive].sqrt().sum() + cosines[negative].sum()


class MeanOfNothing(SoundLoss):
    def value(self, cosines, embeddings, labels, positive, negative):
        return (1 - cosines)[positive].mean()


class OutOfTheGraph(SoundLoss):
    def value(self, cosines, embeddings, labels, positive, negative):
        return (1 - cosines)[positive].mean() if positive.any() else torch.zeros(())


class MeanOfTheActive(SoundLoss):
    def value(self, cosines, embeddings, labels, positive, negative):
        terms = torch.where(positive, 1 - cosines, F.relu(cosines)) * (positive | negative)
        return terms.sum() / (terms > 1e-4).sum()


class OverTheSpread(SoundLoss):
    def value(self, cosines, embeddings, labels, positive, negative):
        return super().value(cosines, embeddings, labels, positive, negative) / cosines.std()


class HalfPrecision(SoundLoss):
    """e^12 is more than float16 holds."""

    def forward(self, embeddings, labels, indices_tuple=None):
        losses.check_batch(self, embeddings, labels)
        same, positive = losses.Sampler.pair_masks(labels)
        terms = (12 * losses.cosine_matrix(embeddings)).exp()
        return losses.mean_where(terms, ~same) - losses.mean_where(terms, positive)


class NeighbourInTheBatch(SoundLoss):
    def value(self, cosines, embeddings, labels, positive, negative):
        return super().value(cosines.roll(1, 1), embeddings, labels, positive, negative)


class TakesNaN(SoundLoss):
    def forward(self, embeddings, labels, indices_tuple=None):
        return SoundLoss.forward.__wrapped__(self, embeddings.float()
                                             if embeddings.dtype.itemsize < 4 else embeddings,
                                             labels, indices_tuple)


class AxesMatter(SoundLoss):
    def value(self, cosines, embeddings, labels, positive, negative):
        return (super().value(cosines, embeddings, labels, positive, negative)
                + embeddings.abs().sum(1).mean() / 100)


class WrongSign(SoundLoss):
    def value(self, cosines, embeddings, labels, positive, negative):
        return -super().value(cosines, embeddings, labels, positive, negative)


class AllTriplets(SoundLoss):
    def value(self, cosines, embeddings, labels, positive, negative):
        terms = F.softplus(cosines.unsqueeze(1) - cosines.unsqueeze(2))  # [B, B, B]
        return losses.mean_where(terms, positive.unsqueeze(2) & negative.unsqueeze(1))


class WeightsByColumn(losses.ClassLoss):
    """A normalised softmax whose weights are [D, C]: sound, too."""

    def __init__(self, num_classes, embed_dim):
        super().__init__(num_classes)
        self.weight = torch.nn.Parameter(torch.randn(embed_dim, num_classes))

    @losses.full_precision
    def forward(self, embeddings, labels, indices_tuple=None):
        cosines = F.normalize(embeddings, dim=1) @ F.normalize(self.weight, dim=0).to(
            embeddings.dtype)
        return self.mean_cross_entropy(10 * cosines, embeddings, labels, indices_tuple)


class EvenBatches(SoundLoss):
    def value(self, cosines, embeddings, labels, positive, negative):
        if len(embeddings) % 2:
            raise IndexError("half a pair")
        return super().value(cosines, embeddings, labels, positive, negative)


class ValuePerImage(SoundLoss):
    def value(self, cosines, embeddings, labels, positive, negative):
        return cosines.mean(1)


@pytest.mark.parametrize("broken, fails, says", [
    (SoundLoss, set(), ""),
    (LabelsAsNumbers, {"names of classes"}, "labels are used as numbers"),
    (Detached, {"gradient"}, "differs from the slope"),
    (RootAtZero, {"degenerate"}, "a gradient is not finite"),
    (MeanOfNothing, {"degenerate"}, "single images: the loss is nan"),
    (OutOfTheGraph, {"degenerate"}, "not in the graph"),
    (MeanOfTheActive, {"degenerate"}, "nothing left to learn: the loss is nan"),
    (OverTheSpread, {"degenerate"}, "identical embeddings: "),
    (HalfPrecision, {"types and sizes"}, "torch.float16, batch of 2: a gradient is not finite"),
    (NeighbourInTheBatch, {"order"}, "another order of the batch changes the loss"),
    (TakesNaN, {"bad input"}, "an embedding that is NaN is accepted"),
    (AxesMatter, {"rotation"}, "a rotation of the embedding space changes the loss"),
    (WrongSign, {"learning"}, "negatives were"),
    (AllTriplets, {"memory"}, "a tensor of 262,144 elements"),
    (EvenBatches, {"types and sizes"}, f"IndexError: half a pair, {__file__} line ")])
def test_broken_losses_fail_the_check_that_is_about_it(monkeypatch, capsys, broken, fails, says):
    """That check alone, its line says what is wrong, and the list names the loss."""
    monkeypatch.setitem(LOSSES, "broken", broken)
    failed, table = checked(capsys, "broken")
    assert failed == (["broken"] if fails else [])
    messages = table["broken"]
    assert {check for check in CHECKS if messages[check] != "pass"} == fails
    assert all(messages[check].startswith("FAIL  ") and says in messages[check]
               for check in fails)
    assert ("a step, B 112" in messages) == (not fails)


def test_weights_of_another_layout_pass(monkeypatch, capsys):
    monkeypatch.setitem(LOSSES, "by column", WeightsByColumn)
    assert checked(capsys, "by column")[0] == []


def test_a_forgotten_flag_or_learning_rate_is_said(monkeypatch):
    class NewLoss(SoundLoss):
        def __init__(self, new_margin=0.1):
            super().__init__()

    monkeypatch.setitem(LOSSES, "new", NewLoss)
    with pytest.raises(ValueError, match="NewLoss takes new_margin, which no flag gives"):
        select("new", options(), NUM_CLASSES)
    monkeypatch.setitem(LOSSES, "new", WeightsByColumn)
    monkeypatch.setattr(WeightsByColumn, "lr_flag", None)
    with pytest.raises(ValueError, match="WeightsByColumn has weights.*not None"):
        select("new", options(), NUM_CLASSES)


PAIR_LOSSES = ["contrastive", "lifted", "multisimilarity", "circle", "ntxent", "supcon",
               "histogram", "fastap", "smoothap", "recallatk"]


@pytest.mark.parametrize("name", PAIR_LOSSES)
def test_pairs_of_a_miner_count_as_they_are(name):
    """Anchors with positives alone or negatives alone keep them; all pairs are the default."""
    loss = select(name, options(sampling=(LOSSES[name].samplings or ("none",))[0]),
                  NUM_CLASSES)[0].double()
    if hasattr(loss, "sampler"):
        loss.sampler = None  # all pairs of the batch
    embeddings, labels = make_batch("triplet" if loss.unit_norm else "npair")
    same = labels.unsqueeze(1) == labels
    positive = same & ~torch.eye(len(labels), dtype=torch.bool)
    pairs = (*positive.nonzero(as_tuple=True), *(~same).nonzero(as_tuple=True))
    torch.testing.assert_close(loss(embeddings, labels, pairs), loss(embeddings, labels))


def test_contrastive_of_single_pairs_by_hand():
    """(0, 1) is positive at distance 1, (2, 3) negative at 0.25: 1 + 0.75^2, though no triplet."""
    rows = torch.tensor([[0.0], [1.0], [5.0], [5.25]])
    pairs = tuple(torch.tensor([i]) for i in (0, 1, 2, 3))
    value = losses.ContrastiveLoss(1.0)(rows, torch.tensor([0, 0, 1, 2]), pairs)
    assert float(value) == pytest.approx(1 + 0.75 ** 2, abs=1e-6)
    assert float(TripletLoss()(rows, torch.tensor([0, 0, 1, 2]), pairs)) == 0


@pytest.mark.parametrize("tuples", [
    [[0, 1, 4]], torch.tensor([[0, 1, -2]]), tuple(torch.tensor([i]) for i in (0, 1, 2, 9))])
@pytest.mark.parametrize("name", ["triplet", "contrastive", "npair", "arcface"])
def test_an_index_outside_of_the_batch_is_refused(name, tuples):
    loss = select(name, options(sampling=(LOSSES[name].samplings)[0]), NUM_CLASSES)[0]
    with pytest.raises(ValueError, match="indices_tuple has indices from .* 4 embeddings"):
        loss(torch.randn(4, DIM), torch.tensor([0, 0, 1, 1]), tuples)


def test_a_row_with_a_missing_part_is_no_tuple():
    rows, labels = make_batch("triplet")
    whole = TripletLoss()(rows, labels, [[0, 1, 5]])
    tuples = [[0, 1, 5], [0, -1, 5], [0, 1, -1]]
    assert TripletLoss()(rows, labels, tuples).item() == whole.item()


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8, torch.float32, torch.bool])
def test_labels_of_every_whole_type(name, dtype):
    loss = select(name, options(sampling=(LOSSES[name].samplings or ("none",))[0]),
                  NUM_CLASSES)[0]
    rows, labels = torch.randn(4, DIM), torch.tensor([0, 0, 1, 1])
    if dtype in (torch.float32, torch.bool):
        with pytest.raises(ValueError, match="must be whole numbers"):
            loss(rows, labels.to(dtype))
        return
    torch.manual_seed(0)
    expected = loss.eval()(rows, labels)
    torch.manual_seed(0)
    assert float(loss(rows, labels.to(dtype))) == float(expected)


@pytest.mark.parametrize("name", LOSSES)
def test_an_empty_batch_gives_a_zero_in_the_graph(name):
    for sampling in LOSSES[name].samplings or ("none",):
        loss = select(name, options(sampling=sampling), NUM_CLASSES)[0]
        for tuples in (None, torch.empty(0, 3, dtype=torch.long)):
            rows = torch.empty(0, DIM, requires_grad=True)
            value = loss(rows, torch.empty(0, dtype=torch.long), tuples)
            value.backward()
            assert value.item() == 0 and rows.grad.shape == (0, DIM)


def test_repr_shows_hyper_parameters_and_sampling():
    loss = MarginLoss(9, margin=0.35, nu=0.01, sampling="rho", rho_probability=0.15)
    loss(torch.randn(4, DIM), torch.tensor([0, 0, 1, 1]))
    for part in ("num_classes=9", "margin=0.35", "nu=0.01", "'rho'", "rho_probability=0.15"):
        assert part in repr(loss)
    assert "active" not in repr(loss)
    assert "scale=30.0" in repr(ArcFaceLoss(3, 4, arcface_scale=30.0))
    assert "sampler=None" in repr(ArcFaceLoss(3, 4))


def test_losses_of_triplets_take_every_method_of_the_sampler():
    assert {*losses.TRIPLET_SAMPLINGS, "npair"} == set(samplers.METHODS)


def test_lifted_far_from_the_origin_keeps_its_digits():
    generator = torch.Generator().manual_seed(0)
    rows, labels = 0.2 * torch.randn(16, 8, generator=generator), torch.arange(16) // 4
    loss = losses.LiftedLoss(lifted_l2=0.0)
    assert float(loss(rows + 100, labels)) == pytest.approx(float(loss(rows, labels)), rel=1e-4)


def test_a_loss_without_a_constructor_can_be_selected(monkeypatch):
    """A new loss without hyper-parameters need not write an empty __init__."""
    monkeypatch.setitem(LOSSES, "bare", SoundLoss)
    assert type(select("bare", options(), NUM_CLASSES)[0]) is SoundLoss


def test_one_loss_that_fails_does_not_end_the_checks(monkeypatch, capsys):
    """The others are checked too, and the list has the failing ones alone."""
    monkeypatch.setitem(LOSSES, "broken", ValuePerImage)
    monkeypatch.setitem(LOSSES, "also", Detached)
    failed, table = checked(capsys, "broken", "triplet", "also")
    assert failed == ["broken", "also"] and list(table) == ["broken", "triplet", "also"]
    assert "not a scalar" in table["broken"]["contract"]
    with pytest.raises(SystemExit):
        check_loss.main(["nonsense"])
    assert "nonsense" in capsys.readouterr().err


def test_the_checker_runs_as_a_command():
    """python tests/check_loss.py NAME, from any folder."""
    done = subprocess.run([sys.executable, check_loss.__file__, "npair"], capture_output=True,
                          text=True, cwd="/")
    assert done.returncode == 0 and "all checks passed" in done.stdout
