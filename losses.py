"""The losses, one class each, and loss_select, the table that --loss reads.

Every loss is a torch.nn.Module with one contract: forward(embeddings, labels, indices_tuple=None)
-> scalar. It works on any device and float type, does its arithmetic in float32 at least, and
gives a zero that stays in the graph where a batch holds no valid tuple. indices_tuple replaces the
loss's own sampler: a [T, 3] tensor, a list of tuples, or index tensors (a, p, n) or (a1, p, a2, n)
as the miners of other libraries return them. unit_norm says whether the loss wants embeddings of
length one, samplings which --sampling it takes (the default first), and the two samples_per_class
bounds how many images of a class a batch should hold. A loss in which tuples can be satisfied sets
self.active in forward, the share of tuples that were not, a 0-dimensional tensor for the log. To
add a loss: write the class here, its flags in add_arguments, its line in LOSSES.
"""

import functools
import inspect
import math
import sys

import torch
import torch.nn.functional as F

from samplers import Sampler, pairwise_sq_distances

# The first is the default.
TRIPLET_SAMPLINGS = ("distance", "semihard", "softhard", "random", "multisimilarity")


def add_arguments(parser):
    """Adds the group 'loss' to an argparse parser; its hyper-parameters are scalars."""
    group = parser.add_argument_group("loss", "what is minimised, and its hyper-parameters")
    group.add_argument("--loss", choices=LOSSES, default="marginloss",
                       help="marginloss (Wu et al. 2017), triplet (Schroff et al. 2015), npair "
                            "(Sohn 2016), proxynca (Movshovitz-Attias et al. 2017), crossentropy: "
                            "a linear classifier on the embedding, arcface (Deng et al. 2019). "
                            "Default %(default)s, as in the "
                            "reference runs")
    group.add_argument("--margin", type=float, default=0.2, metavar="M",
                       help="triplet: margin between squared distances; marginloss: half-width "
                            "around beta in plain distance, both on the unit sphere (distances 0 "
                            "to 2); semihard sampling uses the same margin. Useful 0.05 to 1. "
                            "Default %(default)s (both papers)")
    group.add_argument("--beta", type=float, default=1.2, metavar="B",
                       help="marginloss: first value of the boundary between positive and "
                            "negative pairs, a plain distance; useful 0.5 to 1.4. Default "
                            "%(default)s (paper)")
    group.add_argument("--beta_lr", type=float, default=5e-4, metavar="LR",
                       help="marginloss: learning rate of the boundaries, one for each class; "
                            "useful 1e-4 to 1e-1. Default %(default)s (reference runs)")
    group.add_argument("--beta_constant", action="store_true",
                       help="marginloss: keep beta where it starts instead of learning it")
    group.add_argument("--nu", type=float, default=0.0, metavar="NU",
                       help="marginloss: weight of the sum of the tuples' boundaries, which pulls "
                            "beta down; useful 0 to 0.01. Default %(default)s (off)")
    group.add_argument("--proxy_lr", type=float, default=None, metavar="LR",
                       help="proxynca: learning rate of the proxies; useful 1 to 1000 times --lr. "
                            "Default 1e-5 (reference runs); glyphs 1e-2")
    group.add_argument("--proxynca_positive_in_denominator", action="store_true",
                       help="proxynca: sum the denominator over all proxies (a softmax) instead "
                            "of all but the image's own (paper and reference runs)")
    group.add_argument("--l2npair", type=float, default=0.02, metavar="L",
                       help="npair: weight of the mean squared length of anchor and positive; too "
                            "small and embeddings grow without bound; useful 0.001 to 0.1. "
                            "Default %(default)s (reference runs)")
    group.add_argument("--arcface_scale", type=float, default=64.0, metavar="S",
                       help="arcface: factor of the cosines, above 0; useful 16 to 128. Default "
                            "%(default)s (paper)")
    group.add_argument("--arcface_margin", type=float, default=0.5, metavar="M",
                       help="arcface: margin in radians, 0 to pi; useful 0.1 to 0.6. Default "
                            "%(default)s (paper)")
    group.add_argument("--loss_lr", type=float, default=None, metavar="LR",
                       help="learning rate of a loss's own weights where no flag above names it "
                            "(crossentropy and arcface). Default: --lr, as in the reference "
                            "code; glyphs 1e-2")


def full_precision(forward):
    """Runs a loss's forward in float32 or float64, not autocast: half types cannot hold a loss.

    forward(self, embeddings [B, D], labels [B], indices_tuple) -> scalar, as a decorator.
    """
    @functools.wraps(forward)
    def wrapped(self, embeddings, labels, indices_tuple=None):
        embeddings = embeddings.float() if embeddings.dtype.itemsize < 4 else embeddings
        with torch.autocast(embeddings.device.type, enabled=False):
            return forward(self, embeddings, labels, indices_tuple)
    return wrapped


def as_index_tuples(indices_tuple, device, width=None):
    """Any accepted form of indices_tuple -> LongTensor [T, width] on the device.

    A tensor [T, width] as it is; a list of tuples becomes rows; three index vectors (a, p, n)
    become columns; four (a1, p, a2, n), pairs as other libraries' miners give them, become all
    triplets whose two pairs share their anchor. width: what is wanted, None for 3 or more. Raises
    ValueError for anything else.
    """
    if isinstance(indices_tuple, tuple) and hasattr(next(iter(indices_tuple), None), "shape"):
        indices_tuple = tuple(torch.as_tensor(vector) for vector in indices_tuple)
        lengths = [len(vector) for vector in indices_tuple]
        if len(lengths) == 4 and lengths[0] == lengths[1] and lengths[2] == lengths[3]:
            anchors, positives, other_anchors, negatives = indices_tuple
            first, second = (anchors.unsqueeze(1) == other_anchors).nonzero(as_tuple=True)
            indices_tuple = anchors[first], positives[first], negatives[second]
        elif len(lengths) != 3 or len(set(lengths)) != 1:
            raise ValueError(f"indices_tuple has {len(lengths)} index tensors of lengths "
                             f"{lengths}; it takes three (a, p, n) or two pairs (a1, p, a2, n) of "
                             "equal lengths")
        indices_tuple = torch.stack(indices_tuple, dim=1)
    tuples = torch.as_tensor(indices_tuple, dtype=torch.long, device=device)
    tuples = tuples.reshape(-1, 3) if tuples.numel() == 0 else tuples
    if tuples.dim() != 2 or tuples.shape[1] < 3 or width not in (None, tuples.shape[1]):
        raise ValueError("indices_tuple is neither [T, 3], nor a list of (anchor, positive, "
                         "negative), nor index tensors of these: its shape is "
                         f"{list(tuples.shape)}")
    return tuples


def triplets_for(sampler, embeddings, labels, indices_tuple):
    """The given triplets or, for None, the sampler's -> (valid, anchors, positives, negatives).

    embeddings [B, D], labels [B]; results [T] each. Where valid is False there is no triplet, and
    the indices are 0 so that they can be looked up without a wait for the device.
    """
    if indices_tuple is None:
        triplets = sampler.give(embeddings, labels, padded=True)
    else:
        triplets = as_index_tuples(indices_tuple, embeddings.device, width=3)
    return triplets[:, 0] >= 0, *triplets.clamp_min(0).unbind(1)


def pair_sq_distances(embeddings, first, second):
    """Squared distances of the pairs (first[t], second[t]): embeddings [B, D] -> [T].

    Few pairs are computed row by row, exactly; many (a miner can return B^3 triplets) are looked
    up in the matrix of all pairs, which then costs less memory than the gathered rows.
    """
    if len(first) <= 4 * len(embeddings):
        difference = embeddings.index_select(0, first) - embeddings.index_select(0, second)
        return difference.square().sum(1)
    return pairwise_sq_distances(embeddings)[first, second]


def distance_from_square(sq_distances):
    """Square root whose gradient at zero is zero instead of infinite; any shape, shape kept."""
    return sq_distances.clamp_min(1e-16).sqrt()


class TripletLoss(torch.nn.Module):
    """Triplet loss: the mean over triplets of max(0, d(a, p)^2 - d(a, n)^2 + margin).

    Schroff et al., "FaceNet", CVPR 2015, eq. 2. margin: a squared distance. sampling: a method of
    samplers.Sampler, distance_cutoff, mining_epsilon: see there. embeddings [B, D] unit-norm
    rows, labels [B]. Departs from the paper: the mean over the sampled triplets, inactive ones
    included, stands for the sum, as in the reference code.
    """

    unit_norm = True
    samplings = TRIPLET_SAMPLINGS
    min_samples_per_class, max_samples_per_class = 2, sys.maxsize

    def __init__(self, margin=0.2, sampling="distance", distance_cutoff=None,
                 mining_epsilon=0.1):
        super().__init__()
        self.margin = margin
        self.sampler = Sampler(sampling, margin=margin, squared=True,
                               distance_cutoff=distance_cutoff, mining_epsilon=mining_epsilon)

    @full_precision
    def forward(self, embeddings, labels, indices_tuple=None):
        valid, anchors, positives, negatives = triplets_for(self.sampler, embeddings, labels,
                                                            indices_tuple)       # [T] each
        sq_ap = pair_sq_distances(embeddings, anchors, positives)                # [T]
        sq_an = pair_sq_distances(embeddings, anchors, negatives)
        losses = F.relu(sq_ap - sq_an + self.margin) * valid
        number = valid.sum().clamp_min(1)
        self.active = (losses > 0).sum() / number
        return losses.sum() / number


class MarginLoss(torch.nn.Module):
    """Margin loss: pairs are pushed to the right side of a learned boundary beta, by a margin.

    Wu et al., "Sampling Matters in Deep Embedding Learning", ICCV 2017, eq. 6 to 9, on triplets:
    the sum of max(0, d_ap - beta + margin) and max(0, beta - d_an + margin), d the plain Euclidean
    distance and beta that of the anchor's class, divided by the number of terms above zero, plus
    nu times the sum of the tuples' betas. num_classes: how many betas; beta: their first value;
    beta_constant: they are not learned. embeddings [B, D] unit-norm rows, labels [B] below
    num_classes. Departs from the paper: beta has a part for the class alone, neither a global nor
    an image's own, as in the reference code.
    """

    unit_norm = True
    samplings = TRIPLET_SAMPLINGS
    min_samples_per_class, max_samples_per_class = 2, sys.maxsize

    def __init__(self, num_classes, margin=0.2, beta=1.2, beta_constant=False, nu=0.0,
                 sampling="distance", distance_cutoff=None,
                 mining_epsilon=0.1):
        super().__init__()
        if not nu >= 0:
            raise ValueError(f"--nu {nu}: the weight of the boundaries is not negative")
        self.margin = margin
        self.nu = nu
        self.sampler = Sampler(sampling, margin=margin, squared=False,
                               distance_cutoff=distance_cutoff, mining_epsilon=mining_epsilon)
        betas = torch.full((num_classes,), float(beta))
        if beta_constant:
            self.register_buffer("beta", betas)
        else:
            self.beta = torch.nn.Parameter(betas)

    @full_precision
    def forward(self, embeddings, labels, indices_tuple=None):
        valid, anchors, positives, negatives = triplets_for(self.sampler, embeddings, labels,
                                                            indices_tuple)       # [T] each
        d_ap = distance_from_square(pair_sq_distances(embeddings, anchors, positives))
        d_an = distance_from_square(pair_sq_distances(embeddings, anchors, negatives))
        beta = self.beta[labels[anchors]].to(d_ap.dtype)                         # [T]
        positive_terms = F.relu(d_ap - beta + self.margin) * valid
        negative_terms = F.relu(beta - d_an + self.margin) * valid
        active = (positive_terms > 0).sum() + (negative_terms > 0).sum()
        self.active = active / (2 * valid.sum()).clamp_min(1)
        loss = (positive_terms + negative_terms).sum() / active.clamp_min(1)
        return loss + self.nu * (beta * valid).sum()


class NPairLoss(torch.nn.Module):
    """N-pair loss: the mean over anchors of log(1 + sum_n exp(a.n - a.p)) plus an L2 penalty.

    Sohn, "Improved Deep Metric Learning with Multi-class N-pair Loss Objective", NIPS 2016, eq. 5
    and section 3.2.2. The negatives of an anchor are the positives of the batch's other classes.
    l2npair weighs mean(|a|^2 + |p|^2). embeddings [B, D] not normalised, labels [B].
    """

    unit_norm = False
    samplings = ("npair",)
    min_samples_per_class, max_samples_per_class = 2, sys.maxsize

    def __init__(self, l2npair=0.02):
        super().__init__()
        if not l2npair >= 0:
            raise ValueError(f"--l2npair {l2npair}: the weight of the length is not negative")
        self.l2npair = l2npair
        self.sampler = Sampler("npair")

    @full_precision
    def forward(self, embeddings, labels, indices_tuple=None):
        if indices_tuple is None:
            tuples = self.sampler.give(embeddings, labels, padded=True)
        else:
            tuples = as_index_tuples(indices_tuple, embeddings.device)
        valid = tuples[:, 0] >= 0                                                # [T]
        anchors, positives = tuples[:, :2].clamp_min(0).unbind(1)
        others = tuples[:, 1:]                                                   # [T, 1 + N]
        similarities = embeddings.index_select(0, anchors) @ embeddings.t()      # [T, B]
        logits = similarities.gather(1, others.clamp_min(0))                     # [T, 1 + N]
        # -1 stands for no negative, except in the first column, which is the positive itself.
        missing = others < 0
        missing[:, 0] = False
        logits = logits.masked_fill(missing, -torch.inf)
        losses = torch.logsumexp(logits, 1) - logits[:, 0]                       # [T]
        sq_norms = embeddings.square().sum(1)                                    # [B]
        losses = losses + self.l2npair * (sq_norms[anchors] + sq_norms[positives])
        return (losses * valid).sum() / valid.sum().clamp_min(1)


class ProxyNCALoss(torch.nn.Module):
    """ProxyNCA: -log of exp(-d(x, p_y)) over the sum of exp(-d(x, p_z)) for the other proxies z.

    Movshovitz-Attias et al., "No Fuss Distance Metric Learning using Proxies", ICCV 2017, eq. 4
    and algorithm 1: d is the squared Euclidean distance between unit vectors, one learned proxy
    for each class, the image's own left out of the sum (the loss can be negative).
    proxynca_positive_in_denominator sums over all proxies, a softmax. embeddings [B, D]
    (normalised here), labels [B] below num_classes. indices_tuple picks the anchors that count.
    Departs from the paper: embeddings and proxies are unit vectors scaled by 3, as in the
    reference code, so d ranges to 36.
    """

    unit_norm = True
    samplings = ()
    min_samples_per_class, max_samples_per_class = 1, 1
    scale = 3.0

    def __init__(self, num_classes, embed_dim, proxynca_positive_in_denominator=False):
        super().__init__()
        if num_classes < 2 and not proxynca_positive_in_denominator:
            raise ValueError(f"ProxyNCA with {num_classes} class: the sum over the other proxies "
                             "is empty; it needs two classes or "
                             "--proxynca_positive_in_denominator")
        self.positive_in_denominator = proxynca_positive_in_denominator
        self.proxies = torch.nn.Parameter(torch.randn(num_classes, embed_dim) / 8)

    @full_precision
    def forward(self, embeddings, labels, indices_tuple=None):
        embeddings, labels = anchors_only(embeddings, labels, indices_tuple)
        # -d = 2 * 9 * cosine - 18; the constant cancels between numerator and denominator.
        scaled = F.normalize(embeddings, dim=1) * (2 * self.scale ** 2)
        logits = scaled @ F.normalize(self.proxies.to(embeddings.dtype), dim=1).t()   # [B, C]
        own = logits.gather(1, labels.unsqueeze(1))                              # [B, 1]
        if not self.positive_in_denominator:
            logits = logits.scatter(1, labels.unsqueeze(1), -torch.inf)
        return (torch.logsumexp(logits, 1) - own.squeeze(1)).sum() / max(1, len(labels))


class CrossEntropyLoss(torch.nn.Module):
    """Softmax cross-entropy of a linear classifier on the embedding, both learned together.

    embeddings [B, D], labels [B] below num_classes. indices_tuple picks the anchors that count.
    Its classifier starts as torch.nn.Linear does and has a bias.
    """

    unit_norm = True
    samplings = ()
    min_samples_per_class, max_samples_per_class = 1, sys.maxsize

    def __init__(self, num_classes, embed_dim):
        super().__init__()
        self.classifier = torch.nn.Linear(embed_dim, num_classes)

    @full_precision
    def forward(self, embeddings, labels, indices_tuple=None):
        embeddings, labels = anchors_only(embeddings, labels, indices_tuple)
        weight, bias = (p.to(embeddings.dtype) for p in self.classifier.parameters())
        logits = F.linear(embeddings, weight, bias)                              # [B, C]
        return F.cross_entropy(logits, labels, reduction="sum") / max(1, len(labels))


class ArcFaceLoss(torch.nn.Module):
    """ArcFace: softmax over cosines to class weights, the own class's angle enlarged by a margin.

    Deng et al., "ArcFace: Additive Angular Margin Loss for Deep Face Recognition", CVPR 2019, eq.
    3: the cross-entropy of logits s cos(theta_j), for the own class s cos(theta_y + m).
    arcface_scale: s; arcface_margin: m in radians. Where theta_y + m would pass pi the own logit
    is s (cos(theta_y) - m sin(m)), as in the authors' code, so that it goes on falling with the
    angle. embeddings [B, D] (normalised here), labels [B] below num_classes. sampling: none, or a
    method of samplers.Sampler whose anchors then count, once for each tuple.
    """

    unit_norm = True
    samplings = ("none", *TRIPLET_SAMPLINGS)
    min_samples_per_class, max_samples_per_class = 1, sys.maxsize

    def __init__(self, num_classes, embed_dim, arcface_scale=64.0, arcface_margin=0.5,
                 sampling="none", distance_cutoff=None, mining_epsilon=0.1):
        super().__init__()
        if not arcface_scale > 0 or not 0 <= arcface_margin <= math.pi:
            raise ValueError(f"ArcFace: --arcface_scale {arcface_scale} must be above 0 and "
                             f"--arcface_margin {arcface_margin} between 0 and pi (radians)")
        self.scale = arcface_scale
        self.margin = arcface_margin
        self.sampler = None if sampling == "none" else Sampler(
            sampling, distance_cutoff=distance_cutoff, mining_epsilon=mining_epsilon)
        self.weight = torch.nn.Parameter(torch.nn.init.xavier_uniform_(
            torch.empty(num_classes, embed_dim)))

    @full_precision
    def forward(self, embeddings, labels, indices_tuple=None):
        if indices_tuple is None and self.sampler is not None:
            indices_tuple = self.sampler.give(embeddings, labels)
        embeddings, labels = anchors_only(embeddings, labels, indices_tuple)
        weight = F.normalize(self.weight.to(embeddings.dtype), dim=1)
        cosines = F.normalize(embeddings, dim=1) @ weight.t()                    # [B, C]
        own = cosines.gather(1, labels.unsqueeze(1))                             # [B, 1]
        # The gradient of the sine is infinite where the cosine is 1 or -1.
        sine = (1 - own.square()).clamp_min(1e-12).sqrt()
        enlarged = own * math.cos(self.margin) - sine * math.sin(self.margin)
        beyond = own - self.margin * math.sin(self.margin)
        enlarged = torch.where(own > math.cos(math.pi - self.margin), enlarged, beyond)
        logits = self.scale * cosines.scatter(1, labels.unsqueeze(1), enlarged)
        return F.cross_entropy(logits, labels, reduction="sum") / max(1, len(labels))


def anchors_only(embeddings, labels, indices_tuple):
    """embeddings [B, D], labels [B] -> those of the tuples' anchors [T, D], [T]; all for None.

    An anchor counts once for each tuple that it starts.
    """
    if indices_tuple is None:
        return embeddings, labels
    anchors = as_index_tuples(indices_tuple, embeddings.device)[:, 0]
    anchors = anchors[anchors >= 0]  # -1 stands for no tuple
    return embeddings[anchors], labels[anchors]


# name: (class, the flag with the learning rate of its own weights). A constructor parameter takes
# the value of the flag of the same name; num_classes is the number of training classes.
LOSSES = {
    "marginloss": (MarginLoss, "beta_lr"),
    "triplet": (TripletLoss, None),
    "npair": (NPairLoss, None),
    "proxynca": (ProxyNCALoss, "proxy_lr"),
    "crossentropy": (CrossEntropyLoss, "loss_lr"),
    "arcface": (ArcFaceLoss, "loss_lr"),
}


def loss_select(loss, opt, to_optim, num_classes):
    """Builds the loss named by a key of LOSSES from the options.

    opt: an object with the options as attributes. to_optim: list of optimiser parameter groups; a
    loss with weights of its own adds one, without weight decay. Returns (loss module, to_optim).
    """
    loss_class, lr_option = LOSSES[loss]
    values = dict(vars(opt), num_classes=num_classes)
    names = inspect.signature(loss_class).parameters
    criterion = loss_class(**{name: values[name] for name in names})
    weights = list(criterion.parameters())
    if weights:
        to_optim = to_optim + [{"params": weights, "lr": values[lr_option], "weight_decay": 0}]
    return criterion, to_optim
