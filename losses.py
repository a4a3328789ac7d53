"""The losses, one class each, and loss_select, the table that --loss reads.

Every loss is a Loss, a torch module, with one contract: forward(embeddings, labels,
indices_tuple=None) -> scalar. It works on any device and float type, does its arithmetic in
float32 at least, and gives a zero that stays in the graph, a regulariser of its own aside, where a
batch holds no valid tuple. indices_tuple replaces the loss's own sampler: a [T, 3] tensor, a list
of tuples, or a tuple of index vectors, (a, p, n) or (a1, p, a2, n), as the miners of other
libraries return them.

A loss in which tuples can be satisfied sets self.active in forward, the share of tuples that were
not, a 0-dimensional tensor for the log. To add a loss: write its class, with its flags, and its
line in LOSSES; python tests/check_loss.py NAME then looks for what is commonly wrong.
"""

import functools
import inspect
import math

import torch
import torch.nn.functional as F
import torch.utils.checkpoint

import samplers
from samplers import Sampler, check_form, check_range, draw_columns, pairwise_sq_distances

# The first is the default.
TRIPLET_SAMPLINGS = tuple(name for name in samplers.METHODS if name != "npair")
# none: all pairs of the batch. Without rho, some of whose anchors have a negative alone.
PAIR_SAMPLINGS = ("none", *(name for name in TRIPLET_SAMPLINGS if name != "rho"))


class Loss(torch.nn.Module):
    """Base of the losses, forward(embeddings [B, D], labels [B], indices_tuple=None) -> scalar.

    sampling: one of samplings, "none" for no sampler. form: one of samplers.FORMS; a docstring
    says what the reference form computes, where there is one. sampling_options: those of
    samplers.Sampler. repr shows the hyper-parameters and the sampler.
    """

    unit_norm = True                # it wants embeddings of length one
    samplings = ()                  # which --sampling it takes, the default first
    min_samples_per_class = 2       # how many images of a class a batch should hold at least
    default_samples_per_class = 4   # unless the user says
    lr_flag, lr_factor = None, 1    # of its own weights: the option of their rate, times --lr
    flags = {}                      # option: help, of parameters that no loss above has named
    num_classes = None              # with weights for classes, how many
    stops_gradients = False         # so that the numbers' slope is not the gradient
    rotation_invariant = True

    def __init__(self, sampling="none", form="paper", **sampling_options):
        super().__init__()
        self.form = check_form(form)
        if self.samplings and sampling not in self.samplings:
            raise ValueError(f"{type(self).__name__} cannot use --sampling {sampling}; it takes "
                             f"{', '.join(self.samplings)}")
        self.sampler = (Sampler(sampling, form=form, **sampling_options)
                        if self.samplings and sampling != "none" else None)

    def extra_repr(self):
        return ", ".join(f"{name}={value!r}" for name, value in vars(self).items()
                         if not name.startswith("_") and name not in ("training", "active"))


class ClassLoss(Loss):
    """Base of the losses that compare images with weights of classes; labels below num_classes.

    indices_tuple, and the sampling of those that have one, weigh the images: image_weights.
    """

    min_samples_per_class = 1
    lr_flag = "loss_lr"

    def __init__(self, num_classes, sampling="none", form="paper", **sampling_options):
        super().__init__(sampling, form, **sampling_options)
        self.num_classes = num_classes

    def mean_cross_entropy(self, logits, embeddings, labels, indices_tuple):
        """The mean over the images of image_weights times cross-entropy; logits [B, C]."""
        weights = image_weights(embeddings, labels, indices_tuple, self.sampler)  # [B]
        return (F.cross_entropy(logits, labels, reduction="none") * weights).mean()


def full_precision(forward):
    """Runs a loss's forward in float32 or float64, not autocast: half types cannot hold a loss.

    forward(self, embeddings [B, D], labels [B], indices_tuple) -> scalar, as a decorator; a zero
    in the graph for B = 0. It raises what check_batch does.
    """
    @functools.wraps(forward)
    def wrapped(self, embeddings, labels, indices_tuple=None):
        check_batch(self, embeddings, labels)
        labels = labels.long()
        embeddings = embeddings.float() if embeddings.dtype.itemsize < 4 else embeddings
        if not len(labels):
            return embeddings.sum()
        with torch.autocast(embeddings.device.type, enabled=False):
            return forward(self, embeddings, labels, indices_tuple)
    return wrapped


def check_batch(loss, embeddings, labels):
    """ValueError for embeddings [B, D] and labels [B] that do not fit each other or the loss.

    FloatingPointError, with the row, for embeddings that are not finite. What needs a look at the
    values is left out on a GPU, which would have to wait for it.
    """
    name = type(loss).__name__
    if embeddings.dim() != 2 or labels.shape != embeddings.shape[:1]:
        raise ValueError(f"{name}: embeddings of shape {list(embeddings.shape)} with labels of "
                         f"shape {list(labels.shape)}; it takes [B, D] and [B]")
    if labels.is_floating_point() or labels.dtype == torch.bool:
        raise ValueError(f"{name}: labels of type {labels.dtype}; they must be whole numbers")
    if embeddings.is_cuda or not len(labels):
        return
    finite = torch.isfinite(embeddings).all(1)
    if not finite.all():
        row = int(finite.int().argmin())
        raise FloatingPointError(f"{name}: {int((~finite).sum())} of {len(finite)} embeddings are "
                                 f"not finite, the first is row {row} of the batch, of class "
                                 f"{int(labels[row])}; often the learning rate (--lr) is too high")
    if loss.num_classes is not None and not 0 <= labels.min() <= labels.max() < loss.num_classes:
        raise ValueError(f"{name} has weights for {loss.num_classes} classes, 0 to "
                         f"{loss.num_classes - 1}; the labels are from {int(labels.min())} to "
                         f"{int(labels.max())}")


def index_vectors(indices_tuple, labels):
    """A tuple of index vectors as a list of tensors; None for another form of indices_tuple."""
    if not isinstance(indices_tuple, tuple) or not hasattr(
            next(iter(indices_tuple), None), "shape"):
        return None
    vectors = [torch.as_tensor(vector, dtype=torch.long, device=labels.device)
               for vector in indices_tuple]
    for vector in vectors:
        check_indices(vector, labels)
    return vectors


def check_indices(indices, labels):
    """ValueError for indices [T, ...] outside of the batch, labels [B]; not looked at on a GPU."""
    if not indices.is_cuda and indices.numel() and not (
            -1 <= indices.min() and indices.max() < len(labels)):
        raise ValueError(f"indices_tuple has indices from {int(indices.min())} to "
                         f"{int(indices.max())}; the batch has {len(labels)} embeddings")


def pair_mask(first, second, valid, labels):
    """The pairs (first[t], second[t]) of two images that are valid, [T] each: a mask [B, B]."""
    number = len(labels)
    # One element more than pairs: it takes what is not valid.
    pair = torch.where(valid & (first != second), first * number + second, number * number)
    mask = torch.zeros(number * number + 1, dtype=torch.bool, device=labels.device)
    return mask.index_fill_(0, pair, True)[:-1].view(number, number)


def given_pairs(indices_tuple, labels):
    """Index vectors (a1, p, a2, n) -> masks of the two kinds of pairs, [B, B]; None for others."""
    vectors = index_vectors(indices_tuple, labels)
    if vectors is None or len(vectors) != 4:
        return None
    return tuple(pair_mask(first, second, (first >= 0) & (second >= 0), labels)
                 for first, second in (vectors[:2], vectors[2:]))


def tuples_for(sampler, embeddings, labels, indices_tuple, width=None):
    """The tuples given in any form or, for None, the sampler's -> LongTensor [T, 3 or more].

    A tensor as it is; a list of tuples becomes rows; index vectors (a, p, n) become columns; (a1,
    p, a2, n), pairs as other libraries' miners give them, become all triplets whose two pairs
    share their anchor, as many as samplers.MOST_TRIPLETS. width: the one that is taken, None for
    any. A row with -1 among its first three is none: it is -1 as a whole.
    """
    if indices_tuple is None:
        return sampler.give(embeddings, labels, padded=True)
    pairs = given_pairs(indices_tuple, labels)
    if pairs is not None:
        return Sampler.every_triplet(*pairs)
    vectors = index_vectors(indices_tuple, labels)
    tuples = (torch.as_tensor(indices_tuple, dtype=torch.long, device=labels.device)
              if vectors is None else torch.stack(vectors, dim=1))
    tuples = tuples.reshape(-1, 3) if tuples.numel() == 0 else tuples
    if tuples.dim() != 2 or tuples.shape[1] < 3 or width not in (None, tuples.shape[1]):
        raise ValueError("indices_tuple is neither [T, 3], nor a list of (anchor, positive, "
                         "negative), nor index tensors of these: its shape is "
                         f"{list(tuples.shape)}")
    check_indices(tuples, labels)
    return tuples.masked_fill((tuples[:, :3] < 0).any(1, keepdim=True), -1)


def triplets_for(sampler, embeddings, labels, indices_tuple):
    """The triplets of tuples_for -> (valid, anchors, positives, negatives), [T] each.

    Indices are 0 where valid is False, so that looking them up does not wait for the device.
    """
    triplets = tuples_for(sampler, embeddings, labels, indices_tuple, width=3)
    return triplets[:, 0] >= 0, *triplets.clamp_min(0).unbind(1)


def listed_pairs(sampler, embeddings, labels, indices_tuple):
    """The pairs that count where no triplets do -> (positive, negative) masks [B, B], or None.

    All pairs without a sampler, the hard ones of the sampler multisimilarity, and a miner's.
    """
    if indices_tuple is None and sampler is None:
        same, positive = Sampler.pair_masks(labels)
        return positive, ~same
    if indices_tuple is None and sampler.method == "multisimilarity":
        return sampler.hard_pairs(embeddings, labels)
    return given_pairs(indices_tuple, labels)


def pairs_for(sampler, embeddings, labels, indices_tuple):
    """The positive and the negative pairs that count -> (positive [B, B], negative [B, B]) masks.

    Row i holds the pairs of anchor i: listed_pairs, or those of the triplets.
    """
    pairs = listed_pairs(sampler, embeddings, labels, indices_tuple)
    if pairs is None:
        valid, anchors, *others = triplets_for(sampler, embeddings, labels, indices_tuple)
        pairs = tuple(pair_mask(anchors, other, valid, labels) for other in others)
    return pairs


def image_weights(embeddings, labels, indices_tuple, sampler=None):
    """How much each image counts in a loss with class weights, by its place in the tuples: [B].

    How often it occurs in them or in listed_pairs over the greatest such count of the batch, as
    in pytorch-metric-learning (whose ProxyNCA counts anchors alone); 1 each where nothing chooses.
    """
    if indices_tuple is None and sampler is None:
        return embeddings.new_ones(len(labels))
    pairs = listed_pairs(sampler, embeddings, labels, indices_tuple)
    if pairs is not None:
        counts = sum(mask.sum(0) + mask.sum(1) for mask in pairs)
    else:
        places = tuples_for(sampler, embeddings, labels, indices_tuple).flatten() + 1
        counts = labels.new_zeros(len(labels) + 1)  # the first takes what is no tuple
        counts = counts.index_add_(0, places, torch.ones_like(places))[1:]
    counts = counts.to(embeddings.dtype)
    return counts / counts.amax().clamp_min(1)


def pair_sq_distances(embeddings, first, *others):
    """Squared distances of the pairs (first[t], other[t]) for each of others: [B, D] -> [O, T].

    Few are computed row by row, exactly; many (a miner can return B^3) are looked up in the matrix
    of all pairs, which then costs less memory. An image is 0 from itself, without a gradient.
    """
    if len(first) <= 4 * len(embeddings):
        shape = len(others), *first.shape, embeddings.shape[1]
        rows = embeddings.index_select(0, torch.cat(others)).view(shape)         # [O, T, D]
        return (embeddings.index_select(0, first) - rows).square().sum(2)
    return pairwise_sq_distances(embeddings).fill_diagonal_(0)[first, torch.stack(others)]


def distance_from_square(sq_distances):
    """Square root whose gradient at zero is zero instead of infinite; any shape, shape kept."""
    return sq_distances.clamp_min(1e-16).sqrt()


def cosine_matrix(rows, columns=None):
    """Cosines of rows [R, D] and columns [C, D], of any float type (None: the rows) -> [R, C]."""
    rows = F.normalize(rows, dim=1)
    return rows @ (rows if columns is None else unit_weights(columns, rows)).t()


def unit_weights(weights, embeddings):
    """Weights [C, D] as unit vectors, in the float type of the embeddings [B, D]: [C, D]."""
    return F.normalize(weights.to(embeddings.dtype), dim=1)


def class_weights(num_classes, embed_dim, length=3 ** -0.5):
    """Class weights [C, D], uniform around 0, of this length in the root mean square.

    What is learned is their direction, which a step of Adam turns by about lr sqrt(D) / length. By
    default they start as torch.nn.Linear's, as in the code of Zhai and Wu and of Roth et al. 2020.
    """
    bound = length * (3 / embed_dim) ** 0.5
    return torch.nn.Parameter(torch.empty(num_classes, embed_dim).uniform_(-bound, bound))


def masked_logsumexp(values, mask):
    """log of the sum of exp over a row of values [R, C] where mask is True -> [R]; or -inf."""
    return torch.logsumexp(values.masked_fill(~mask, -torch.inf), 1)


def log1p_exp(values):
    """log(1 + exp(values)), any shape, shape kept."""
    return torch.logaddexp(values, values.new_zeros(()))


def mean_where(values, mask):
    """The mean of values where mask is True, both of one shape -> scalar; 0 if it is nowhere."""
    return torch.where(mask, values, 0).sum() / mask.sum().clamp_min(1)


class NPairTuples:
    """A batch's tuples (anchor, positive, negatives), given or drawn by the sampler npair.

    anchors, positives, valid: [T]; is_negative [T, N]. Indices are 0 where valid is False.
    """

    def __init__(self, sampler, embeddings, labels, indices_tuple):
        self.form = sampler.form
        if indices_tuple is None and self.form == "paper":  # negatives: all others' positives
            positives = sampler.npair_positives(labels)                          # [B]
            anchors, valid = torch.arange(len(labels), device=labels.device), positives >= 0
            if not embeddings.is_cuda:  # a GPU would have to wait for the number of classes
                anchors, positives, valid = anchors[valid], positives[valid], valid[valid]
            self.negatives = positives = positives.clamp_min(0)
            self.is_negative = valid & ~torch.eye(len(valid), dtype=torch.bool,
                                                  device=labels.device)
        else:
            tuples = tuples_for(sampler, embeddings, labels, indices_tuple)      # [T, 2 + N]
            valid, self.is_negative = tuples[:, 0] >= 0, tuples[:, 2:] >= 0
            tuples = tuples.clamp_min(0)
            anchors, positives, self.negatives = tuples[:, 0], tuples[:, 1], tuples[:, 2:]
        self.anchors, self.positives, self.valid = anchors, positives, valid

    def products(self, rows, embeddings):
        """Inner products of a row [T, D] for each tuple and its negatives' embeddings: [T, N]."""
        if self.negatives.dim() == 1:
            return rows @ embeddings.index_select(0, self.negatives).t()
        return (rows @ embeddings.t()).gather(1, self.negatives)

    def npair_losses(self, embeddings, l2npair, most=math.inf):
        """Each tuple's n-pair loss with its penalty: [B, D] -> [T]; most: size of an exponent."""
        a, p = (embeddings.index_select(0, part) for part in (self.anchors, self.positives))
        logits = self.products(a, embeddings) - (a * p).sum(1, keepdim=True)     # [T, N]
        penalty = ((a.square() + p.square()).sum(1) if self.form == "paper" else
                   embeddings.norm(dim=1).mean())
        return (log1p_exp(masked_logsumexp(logits.clamp(-most, most), self.is_negative))
                + l2npair * penalty)


class TripletLoss(Loss):
    """Triplet loss: the mean over triplets of max(0, d(a, p)^2 - d(a, n)^2 + margin).

    Schroff et al., "FaceNet", CVPR 2015, eq. 2. embeddings [B, D] unit-norm rows. Departs from the
    paper: the mean over the sampled triplets, inactive ones included, stands for the sum, as in
    the reference code.
    """

    samplings = TRIPLET_SAMPLINGS
    flags = {"margin": "margin between squared distances; of marginloss half-width around beta, "
                       "a plain distance; both on the unit sphere (distances 0 to 2); facenet "
                       "sampling uses the same margin; useful 0.05 to 1 (both papers: 0.2)"}

    def __init__(self, margin=0.2, sampling="distance", **sampling_options):
        super().__init__(sampling, margin=margin, squared=True, **sampling_options)
        self.margin = check_range(least=0, margin=margin)

    @full_precision
    def forward(self, embeddings, labels, indices_tuple=None):
        valid, *triplets = triplets_for(self.sampler, embeddings, labels, indices_tuple)  # [T]
        sq_ap, sq_an = pair_sq_distances(embeddings, *triplets)
        losses = F.relu(sq_ap - sq_an + self.margin) * valid
        number = valid.sum().clamp_min(1)
        self.active = (losses > 0).sum() / number
        return losses.sum() / number


class MarginLoss(Loss):
    """Margin loss: pairs are pushed to the right side of a learned boundary beta, by a margin.

    Wu et al., "Sampling Matters in Deep Embedding Learning", ICCV 2017, eq. 6 to 9, on triplets:
    the sum of max(0, d_ap - beta + margin) and max(0, beta - d_an + margin), d the plain Euclidean
    distance and beta that of the anchor's class, plus nu times the sum of the tuples' betas, all
    divided by the number of terms above zero, as in the authors' code; 0 without one. embeddings
    [B, D] unit-norm rows. form reference: divided by the number of triplets with a term above
    zero, as in the code of Roth et al. 2020. Departs from the paper: beta is of the class alone,
    without a global part or an image's own, as in the reference code.
    """

    samplings = TRIPLET_SAMPLINGS
    lr_flag = "beta_lr"
    flags = {"beta": "first value of the boundary between positive and negative pairs, a plain "
                     "distance; useful 0.5 to 1.4 (paper: 1.2)",
             "beta_constant": "keep beta where it starts instead of learning it",
             "nu": "weight of the sum of the tuples' boundaries, which pulls beta down; useful 0 "
                   "to 0.01, 0 is off"}

    def __init__(self, num_classes, margin=0.2, beta=1.2, beta_constant=False, nu=0.0,
                 sampling="distance", form="paper", **sampling_options):
        super().__init__(sampling, form, margin=margin, squared=False, **sampling_options)
        self.num_classes = num_classes
        self.margin = check_range(least=0, margin=margin)
        self.nu = check_range(least=0, nu=nu)
        betas = torch.full((num_classes,), float(check_range(least=0, beta=beta)))
        if beta_constant:
            self.register_buffer("beta", betas)
        else:
            self.beta = torch.nn.Parameter(betas)

    @full_precision
    def forward(self, embeddings, labels, indices_tuple=None):
        valid, anchors, positives, negatives = triplets_for(self.sampler, embeddings, labels,
                                                            indices_tuple)       # [T] each
        sq_distances = pair_sq_distances(embeddings, anchors, positives, negatives)
        d_ap, d_an = distance_from_square(sq_distances)                          # [T] each
        beta = self.beta.index_select(0, labels.index_select(0, anchors)).to(d_ap.dtype)
        beyond = torch.stack([d_ap - beta, beta - d_an])                         # [2, T]
        terms = F.relu(beyond + self.margin) * valid
        active = (terms > 0).sum()
        # Where the positive is the anchor, as in rho's rows, the first term is a constant.
        constant = ((terms[0] > 0) & (anchors == positives)).sum()
        self.active = (active - constant) / (2 * valid.sum()).clamp_min(1)
        loss = terms.sum()
        if self.nu:
            loss = loss + self.nu * (beta * (valid & (active > 0))).sum()
        number = active if self.form == "paper" else (terms > 0).any(0).sum()
        return loss / number.clamp_min(1)


class NPairLoss(Loss):
    """N-pair loss: the mean over anchors of log(1 + sum_n exp(a.n - a.p)) plus an L2 penalty.

    Sohn, "Improved Deep Metric Learning with Multi-class N-pair Loss Objective", NIPS 2016, eq. 5
    and section 3.2.2. The negatives of an anchor are the positives of the batch's other classes.
    l2npair weighs mean(|a|^2 + |p|^2). embeddings [B, D] not normalised. form reference, as in the
    code of Roth et al. 2020: every image with a positive is an anchor, with all images of other
    classes as negatives, and l2npair weighs the mean length of all images; that of Roth and
    Brattoli 2019 is the paper's.
    """

    unit_norm = False
    samplings = ("npair",)
    flags = {"l2npair": "weight of the mean squared length of anchor and positive; too small and "
                        "embeddings grow without bound; useful 0.001 to 0.1 (reference: 0.02)"}

    def __init__(self, l2npair=0.02, form="paper"):
        super().__init__("npair", form)
        self.l2npair = check_range(least=0, l2npair=l2npair)

    @full_precision
    def forward(self, embeddings, labels, indices_tuple=None):
        tuples = NPairTuples(self.sampler, embeddings, labels, indices_tuple)
        return mean_where(tuples.npair_losses(embeddings, self.l2npair), tuples.valid)


class ProxyNCALoss(ClassLoss):
    """ProxyNCA: -log of exp(-d(x, p_y)) over the sum of exp(-d(x, p_z)) for the other proxies z.

    Movshovitz-Attias et al., "No Fuss Distance Metric Learning using Proxies", ICCV 2017, eq. 4
    and algorithm 1: d is the squared Euclidean distance between unit vectors, one learned proxy
    for each class, the image's own left out of the sum (the loss can be negative). embeddings [B,
    D] (normalised here). Departs from the paper: embeddings and proxies are unit vectors scaled by
    3, as in the reference code, so d ranges to 36.
    """

    default_samples_per_class = 1  # reference runs
    lr_flag = "proxy_lr"
    scale = 3.0
    flags = {"proxynca_positive_in_denominator": "sum the denominator over all proxies (a "
                                                 "softmax) instead of all but the image's own "
                                                 "(paper, reference runs)"}

    def __init__(self, num_classes, embed_dim, proxynca_positive_in_denominator=False):
        super().__init__(num_classes)
        self.positive_in_denominator = proxynca_positive_in_denominator
        self.proxies = torch.nn.Parameter(torch.randn(num_classes, embed_dim) / 8)

    @full_precision
    def forward(self, embeddings, labels, indices_tuple=None):
        # -d = 2 * 9 * cosine - 18; the constant cancels between numerator and denominator.
        scaled = F.normalize(embeddings, dim=1) * (2 * self.scale ** 2)
        logits = scaled @ unit_weights(self.proxies, scaled).t()                 # [B, C]
        own = logits.gather(1, labels.unsqueeze(1))                              # [B, 1]
        if not self.positive_in_denominator:
            logits = logits.scatter(1, labels.unsqueeze(1), -torch.inf)
        losses = torch.logsumexp(logits, 1) - own.squeeze(1)                     # [B]
        return (losses * image_weights(embeddings, labels, indices_tuple)).mean()


class CrossEntropyLoss(ClassLoss):
    """Softmax cross-entropy of a linear classifier on the embedding, both learned together.

    embeddings [B, D]. Its classifier starts as torch.nn.Linear does and has a bias.
    """

    def __init__(self, num_classes, embed_dim):
        super().__init__(num_classes)
        self.classifier = torch.nn.Linear(embed_dim, num_classes)

    @full_precision
    def forward(self, embeddings, labels, indices_tuple=None):
        weight, bias = (p.to(embeddings.dtype) for p in self.classifier.parameters())
        logits = F.linear(embeddings, weight, bias)                              # [B, C]
        return self.mean_cross_entropy(logits, embeddings, labels, indices_tuple)


class ArcFaceLoss(ClassLoss):
    """ArcFace: softmax over cosines to class weights, the own class's angle enlarged by a margin.

    Deng et al., "ArcFace: Additive Angular Margin Loss for Deep Face Recognition", CVPR 2019, eq.
    3: the cross-entropy of logits s cos(theta_j), for the own class s cos(theta_y + m). Where
    theta_y + m would pass pi the own logit is s (cos(theta_y) - m sin(m)), as in the authors'
    code, so that it goes on falling with the angle. embeddings [B, D] (normalised here). form
    reference: cosines below 0 are 0, without a gradient, as in the code of Roth et al. 2020.
    """

    samplings = ("none", *TRIPLET_SAMPLINGS)
    lr_factor = 50  # Roth et al. 2020, 5e-4 beside 1e-5
    flags = {"arcface_scale": "factor s of the cosines, above 0; useful 16 to 128 (paper: 64)",
             "arcface_margin": "margin m in radians, 0 to pi; useful 0.1 to 0.6 (paper: 0.5)"}

    def __init__(self, num_classes, embed_dim, arcface_scale=64.0, arcface_margin=0.5,
                 sampling="none", form="paper", **sampling_options):
        super().__init__(num_classes, sampling, form, **sampling_options)
        self.scale = check_range(above=0, arcface_scale=arcface_scale)
        self.margin = check_range(least=0, most=math.pi, arcface_margin=arcface_margin)
        self.weight = class_weights(num_classes, embed_dim)

    @full_precision
    def forward(self, embeddings, labels, indices_tuple=None):
        cosines = cosine_matrix(embeddings, self.weight)                         # [B, C]
        cosines = cosines.clamp_min(1e-10) if self.form == "reference" else cosines
        own = cosines.gather(1, labels.unsqueeze(1))                             # [B, 1]
        # The gradient of the sine is infinite where the cosine is 1 or -1.
        sine = (1 - own.square()).clamp_min(1e-12).sqrt()
        enlarged = own * math.cos(self.margin) - sine * math.sin(self.margin)
        beyond = own - self.margin * math.sin(self.margin)
        enlarged = torch.where(own > math.cos(math.pi - self.margin), enlarged, beyond)
        logits = self.scale * cosines.scatter(1, labels.unsqueeze(1), enlarged)
        return self.mean_cross_entropy(logits, embeddings, labels, indices_tuple)


class ContrastiveLoss(Loss):
    """Contrastive loss: pairs of one class by d^2, others by max(0, margin - d)^2.

    Hadsell, Chopra, LeCun, "Dimensionality Reduction by Learning an Invariant Mapping", CVPR 2006,
    eq. 4; d is the Euclidean distance. embeddings [B, D] unit-norm rows. Departs from the paper:
    the mean over positive pairs plus the mean over the negative pairs nearer than the margin,
    without the factors 1/2, stands for the sum; with triplets, sampled or given, both means are
    over all of them, zeros included, as in the code of Roth et al. 2020.
    """

    samplings = ("none", *TRIPLET_SAMPLINGS)
    flags = {"contrastive_margin": "distance that pairs of two classes keep; unit-norm rows are "
                                   "0 to 2 apart; useful 0.3 to 1.4 (Roth et al. 2020: 1)",
             "contrastive_linear": "plain distances instead of squared ones, as in all known "
                                   "libraries; the paper squares"}

    def __init__(self, contrastive_margin=1.0, contrastive_linear=False, sampling="none",
                 **sampling_options):
        super().__init__(sampling, **sampling_options)
        self.margin = check_range(above=0, contrastive_margin=contrastive_margin)
        self.squared = not contrastive_linear

    @full_precision
    def forward(self, embeddings, labels, indices_tuple=None):
        pairs = listed_pairs(self.sampler, embeddings, labels, indices_tuple)
        if pairs is None:
            positive, *rows = triplets_for(self.sampler, embeddings, labels, indices_tuple)
            to_positive, to_negative = distance_from_square(pair_sq_distances(embeddings, *rows))
            negative = positive                                                  # all [T]
        else:
            positive, negative = pairs
            to_positive = to_negative = distance_from_square(pairwise_sq_distances(embeddings))
        apart = to_positive.masked_fill(~positive, 0)                            # [B, B] or [T]
        missing = F.relu((self.margin - to_negative).masked_fill_(~negative, 0))
        number, near_number = positive.sum(), missing.count_nonzero()
        # Nearer than rounding allows to tell, a positive pair is where it should be.
        active = (apart.detach() > 1e-3).sum() + near_number
        self.active = active / (number + negative.sum()).clamp_min(1)
        if self.squared:
            apart, missing = apart.square(), missing.square()
        near_number = number if pairs is None else near_number
        return apart.sum() / number.clamp_min(1) + missing.sum() / near_number.clamp_min(1)


class LiftedLoss(Loss):
    """Generalised lifted structure: max(0, log sum_p exp(d_ap) + log sum_n exp(margin - d_an)).

    Hermans, Beyer, Leibe, "In Defense of the Triplet Loss for Person Re-Identification", 2017, eq.
    8, after Oh Song et al., CVPR 2016: the mean over the anchors that have a positive and a
    negative, d the plain Euclidean distance. embeddings [B, D] not normalised. Departs from the
    paper: lifted_l2 times the mean squared length of the embeddings keeps them from growing; form
    reference: their mean length, as in the code of Roth et al. 2020.
    """

    unit_norm = False
    # That by distance is for unit-norm rows.
    samplings = tuple(name for name in PAIR_SAMPLINGS if name != "distance")
    flags = {"lifted_margin": "margin, a plain distance; useful 0.5 to 2 (paper: 1)",
             "lifted_l2": "weight of the mean squared length of embeddings; useful 0.001 to 0.1"}

    def __init__(self, lifted_margin=1.0, lifted_l2=0.005, sampling="none", form="paper",
                 **sampling_options):
        super().__init__(sampling, form, **sampling_options)
        self.margin = check_range(least=0, lifted_margin=lifted_margin)
        self.l2 = check_range(least=0, lifted_l2=lifted_l2)

    @full_precision
    def forward(self, embeddings, labels, indices_tuple=None):
        positive, negative = pairs_for(self.sampler, embeddings, labels, indices_tuple)
        rows = embeddings - embeddings.mean(0)  # near the origin the products keep most digits
        distances = distance_from_square(pairwise_sq_distances(rows))            # [B, B]
        anchors = positive.any(1) & negative.any(1)                              # [B]
        losses = F.relu(masked_logsumexp(distances, positive)
                        + masked_logsumexp(self.margin - distances, negative))   # [B]
        self.active = (anchors & (losses > 0)).sum() / anchors.sum().clamp_min(1)
        sizes = (embeddings.square().sum(1) if self.form == "paper" else embeddings.norm(dim=1))
        return mean_where(losses, anchors) + self.l2 * sizes.mean()


class MultiSimilarityLoss(Loss):
    """Multi-similarity: log(1 + sum_p e^(-a (s_p - l))) / a + log(1 + sum_n e^(b (s_n - l))) / b.

    Wang et al., "Multi-Similarity Loss with General Pair Weighting for Deep Metric Learning", CVPR
    2019, eq. 15: the mean over all images of the batch, s cosine similarities, sums over the pairs
    that the sampling multisimilarity (eq. 7 and 8) leaves. embeddings [B, D] (normalised here).
    form reference: the mean over the images with pairs left, as in the code of Roth et al. 2020.
    """

    samplings = ("multisimilarity", *(name for name in PAIR_SAMPLINGS
                                      if name != "multisimilarity"), "rho")
    flags = {"multisimilarity_alpha": "sharpness a of positives, > 0; useful 1 to 20 (paper: 2)",
             "multisimilarity_beta": "sharpness b of negatives, > 0; useful 10 to 80 (paper: 50)",
             "multisimilarity_lambda": "cosine l from which a pair counts much; useful 0.3 to 1 "
                                       "(paper: 1; the authors' code: 0.5)"}

    def __init__(self, multisimilarity_alpha=2.0, multisimilarity_beta=50.0,
                 multisimilarity_lambda=1.0, sampling="multisimilarity", form="paper",
                 **sampling_options):
        super().__init__(sampling, form, **sampling_options)
        self.alpha = check_range(above=0, multisimilarity_alpha=multisimilarity_alpha)
        self.beta = check_range(above=0, multisimilarity_beta=multisimilarity_beta)
        self.threshold = check_range(least=-1, most=1,
                                     multisimilarity_lambda=multisimilarity_lambda)

    @full_precision
    def forward(self, embeddings, labels, indices_tuple=None):
        positive, negative = pairs_for(self.sampler, embeddings, labels, indices_tuple)
        beyond = cosine_matrix(embeddings) - self.threshold                      # [B, B]
        losses = (log1p_exp(masked_logsumexp(-self.alpha * beyond, positive)) / self.alpha
                  + log1p_exp(masked_logsumexp(self.beta * beyond, negative)) / self.beta)   # [B]
        if self.form == "reference":
            return mean_where(losses, (positive | negative).any(1))
        return losses.sum() / max(1, len(losses))


class CircleLoss(Loss):
    """Circle loss: log(1 + sum_n exp(g w_n (s_n - m)) sum_p exp(-g w_p (s_p - 1 + m))).

    Sun et al., "Circle Loss: A Unified Perspective of Pair Similarity Optimization", CVPR 2020,
    eq. 6 with the paper's one parameter m: weights w_n = max(0, s_n + m) and w_p = max(0, 1 + m -
    s_p), which pass no gradient, s cosine similarities. For each anchor with a positive and a
    negative; their mean. embeddings [B, D] (normalised here).
    """

    samplings = PAIR_SAMPLINGS
    stops_gradients = True
    flags = {"circle_margin": "relaxation m, a cosine, -1 to 1; useful 0.2 to 0.5 (paper: 0.4)",
             "circle_gamma": "sharpness g, above 0; useful 32 to 256 (paper, retrieval: 80)"}

    def __init__(self, circle_margin=0.4, circle_gamma=80.0, sampling="none", **sampling_options):
        super().__init__(sampling, **sampling_options)
        self.margin = check_range(above=-1, below=1, circle_margin=circle_margin)
        self.gamma = check_range(above=0, circle_gamma=circle_gamma)

    @full_precision
    def forward(self, embeddings, labels, indices_tuple=None):
        positive, negative = pairs_for(self.sampler, embeddings, labels, indices_tuple)
        cosines = cosine_matrix(embeddings)                                      # [B, B]
        constant = cosines.detach()
        negative_logits = F.relu(constant + self.margin) * (cosines - self.margin)
        positive_logits = F.relu(1 + self.margin - constant) * (1 - self.margin - cosines)
        losses = (masked_logsumexp(self.gamma * negative_logits, negative)
                  + masked_logsumexp(self.gamma * positive_logits, positive))    # [B]
        anchors = positive.any(1) & negative.any(1)
        return mean_where(log1p_exp(losses), anchors)


class NTXentLoss(Loss):
    """NT-Xent: for each positive pair, -log of e^(s_ap/T) over itself and sum_n e^(s_an/T).

    Chen et al., "A Simple Framework for Contrastive Learning of Visual Representations", ICML
    2020, eq. 1: the mean over the positive pairs of the batch, s cosine similarities, n the images
    of other classes. embeddings [B, D] (normalised here). Departs from the paper, where each image
    has one positive: with more, an anchor's other positives are not in the denominator.
    """

    samplings = PAIR_SAMPLINGS
    flags = {"ntxent_temperature": "temperature T of the cosines, above 0; useful 0.01 to 0.5 "
                                   "(paper, ImageNet: 0.1)"}

    def __init__(self, ntxent_temperature=0.1, sampling="none", **sampling_options):
        super().__init__(sampling, **sampling_options)
        self.temperature = check_range(above=0, ntxent_temperature=ntxent_temperature)

    @full_precision
    def forward(self, embeddings, labels, indices_tuple=None):
        positive, negative = pairs_for(self.sampler, embeddings, labels, indices_tuple)
        logits = cosine_matrix(embeddings) / self.temperature                    # [B, B]
        negatives = masked_logsumexp(logits, negative).unsqueeze(1)              # [B, 1]
        losses = torch.logaddexp(logits, negatives) - logits                     # [B, B]
        return mean_where(losses, positive & negative.any(1, keepdim=True))


class SupConLoss(Loss):
    """Supervised contrastive: the mean over positives of -log(e^(s_ap/T) / sum_i e^(s_ai/T)).

    Khosla et al., "Supervised Contrastive Learning", NeurIPS 2020, eq. 2 (L_out, the mean outside
    of the logarithm): i runs over all other images of the batch, positives included; the mean over
    the anchors with a positive. s: cosines. embeddings [B, D] (normalised here).
    """

    samplings = PAIR_SAMPLINGS
    flags = {"supcon_temperature": "temperature T of cosines, above 0; useful 0.01 to 0.5 "
                                   "(paper: 0.1)"}

    def __init__(self, supcon_temperature=0.1, sampling="none", **sampling_options):
        super().__init__(sampling, **sampling_options)
        self.temperature = check_range(above=0, supcon_temperature=supcon_temperature)

    @full_precision
    def forward(self, embeddings, labels, indices_tuple=None):
        positive, negative = pairs_for(self.sampler, embeddings, labels, indices_tuple)
        logits = cosine_matrix(embeddings) / self.temperature                    # [B, B]
        everything = masked_logsumexp(logits, positive | negative)               # [B]
        count = positive.sum(1)
        mean = torch.where(positive, logits, 0).sum(1) / count.clamp_min(1)      # [B]
        return mean_where(everything - mean, count > 0)


class AngularLoss(Loss):
    """N-pair loss plus an angular one: log(1 + sum_n exp(4 t (a + p).n - 2 (1 + t) a.p)).

    Wang et al., "Deep Metric Learning with Angular Loss", ICCV 2017, eq. 8 and 9: t = tan^2 of
    angular_alpha; the mean over anchors. The n-pair loss on the embeddings as they are has weight
    1, the angular one, on unit vectors, angular_weight. embeddings [B, D] not normalised. Departs
    from the paper: the anchors of other classes are no negatives, as in the n-pair loss. form
    reference: tuples and penalty as in NPairLoss, and the n-pair exponents end at -50 and 50.
    """

    unit_norm = False
    samplings = ("npair",)
    flags = {"angular_alpha": "bound of the angle at the negative, in degrees, above 0 and below "
                              "90; useful 30 to 55 (paper: 45)",
             "angular_weight": "weight of the angular term; n-pair's is 1; 0 or more (paper: 2)"}

    def __init__(self, angular_alpha=45.0, angular_weight=2.0, l2npair=0.02, form="paper"):
        super().__init__("npair", form)
        check_range(above=0, below=90, angular_alpha=angular_alpha)
        self.sq_tangent = math.tan(math.radians(angular_alpha)) ** 2
        self.weight = check_range(least=0, angular_weight=angular_weight)
        self.l2npair = check_range(least=0, l2npair=l2npair)

    @full_precision
    def forward(self, embeddings, labels, indices_tuple=None):
        tuples = NPairTuples(self.sampler, embeddings, labels, indices_tuple)
        rows = F.normalize(embeddings, dim=1)
        a, p = (rows.index_select(0, part) for part in (tuples.anchors, tuples.positives))
        logits = (4 * self.sq_tangent * tuples.products(a + p, rows)
                  - 2 * (1 + self.sq_tangent) * (a * p).sum(1, keepdim=True))    # [T, N]
        losses = self.weight * log1p_exp(masked_logsumexp(logits, tuples.is_negative))    # [T]
        most = math.inf if self.form == "paper" else 50
        return mean_where(losses + tuples.npair_losses(embeddings, self.l2npair, most),
                          tuples.valid)


class HistogramLoss(Loss):
    """Histogram loss: the chance that a random negative pair is more similar than a positive one.

    Ustinova and Lempitsky, "Learning Deep Embeddings with Histogram Loss", NIPS 2016, eq. 2 to 4:
    the cosines of the batch's positive and negative pairs are put, linearly, on the nodes of two
    histograms h+ and h- over [-1, 1]; the loss is the sum over nodes r of h-(r) times the sum of
    h+ up to r. embeddings [B, D] (normalised here). 0 without a positive or a negative pair. form
    reference: as in the code of Roth et al. 2020, a cell's upper node gets its share only where
    two floating-point sums agree: with 64 bins everywhere, with 10 not in six of the cells.
    """

    flags = {"histogram_bins": "intervals between cosines -1 and 1, 1 or more; fewer for fewer "
                               "pairs; useful 10 to 200 (paper: width 0.02)"}

    def __init__(self, histogram_bins=100, form="paper"):
        super().__init__(form=form)
        self.bins = check_range(least=1, histogram_bins=histogram_bins)
        width = 2 / histogram_bins
        nodes = [k * width - 1 for k in range(histogram_bins)] + [1]
        agree = torch.tensor([lower == upper - width for lower, upper in zip(nodes, nodes[1:])])
        self.register_buffer("kept", agree if form == "reference" else None, persistent=False)

    @full_precision
    def forward(self, embeddings, labels, indices_tuple=None):
        # Each pair stands twice in the masks, which changes no share.
        pairs = pairs_for(self.sampler, embeddings, labels, indices_tuple)
        places = (cosine_matrix(embeddings).clamp(-1, 1) + 1) * (self.bins / 2)  # [B, B]
        positive, negative = (
            soft_histogram(places.view(1, -1), mask.reshape(1, -1), self.bins, self.kept)
            / mask.sum().clamp_min(1) for mask in pairs)                         # [1, bins + 1]
        return (negative * positive.cumsum(1)).sum()


def soft_histogram(places, mask, bins, kept=None):
    """places [R, N] from 0 to bins, where mask is True, shared by their two nodes: [R, bins + 1].

    A place x gives 1 - |x - r| to the nodes r next to it. kept [bins]: the cells whose upper node
    gets its share, None for all.
    """
    node = places.detach().floor().clamp(0, bins - 1)
    mask = mask.to(places.dtype)
    share = (places - node) * mask
    node = node.long()
    nodes = places.new_zeros(len(places), bins + 1).scatter_add(1, node, mask - share)
    return nodes.scatter_add(1, node + 1, share if kept is None else share * kept[node])


class FastAPLoss(Loss):
    """FastAP: 1 minus average precision, from histograms of the squared distances to a query.

    Cakir et al., "Deep Metric Learning to Rank", CVPR 2019, eq. 8 and 11: the mean over the images
    with a positive of 1 - (1 / N+) sum_l h+_l H+_l / H_l. h+_l and h_l: histograms over [0, 4] of
    the positives and of all others, each shared by the two nearest of fastap_bins + 1 nodes; H+,
    H: their cumulative sums. The query itself is in none. embeddings [B, D] (normalised here).
    """

    flags = {"fastap_bins": "intervals of squared distances 0 to 4; useful 10 to 25 (paper: 10)"}

    def __init__(self, fastap_bins=10):
        super().__init__()
        self.bins = check_range(least=1, fastap_bins=fastap_bins)

    @full_precision
    def forward(self, embeddings, labels, indices_tuple=None):
        positive, negative = pairs_for(self.sampler, embeddings, labels, indices_tuple)
        # On the unit sphere the squared distance is 2 - 2 s, from 0 to 4.
        places = (1 - cosine_matrix(embeddings).clamp(-1, 1)) * (self.bins / 2)  # [B, B]
        true = soft_histogram(places, positive, self.bins)                       # [B, bins + 1]
        wrong = soft_histogram(places, negative, self.bins)
        above = true.cumsum(1)
        precision = above / (above + wrong.cumsum(1)).clamp_min(1e-12)
        count = positive.sum(1)
        return mean_where(1 - (true * precision).sum(1) / count.clamp_min(1), count > 0)


class SmoothAPLoss(Loss):
    """Smooth-AP: 1 minus average precision, with sigmoids for the comparisons that make a rank.

    Brown et al., "Smooth-AP: Smoothing the Path Towards Large-Scale Image Retrieval", ECCV 2020,
    eq. 7: the mean over the queries with a positive of 1 - (1 / P) sum_i (1 + sum of g(s_j - s_i)
    over the other positives j) / (1 + the same over all other images j). g(x) is the sigmoid of x
    / smoothap_temperature, s cosine similarities to the query, which is itself in no sum.
    embeddings [B, D] (normalised here). The number of positives is looked up: a GPU waits.
    """

    flags = {"smoothap_temperature": "width of the sigmoid that compares cosines, above 0; "
                                     "useful 0.001 to 0.1 (paper: 0.01)"}

    def __init__(self, smoothap_temperature=0.01):
        super().__init__()
        self.temperature = check_range(above=0, smoothap_temperature=smoothap_temperature)

    @full_precision
    def forward(self, embeddings, labels, indices_tuple=None):
        positive, negative = pairs_for(self.sampler, embeddings, labels, indices_tuple)
        valid, among_positives, among_all = smooth_ranks(cosine_matrix(embeddings), positive,
                                                         negative, self.temperature)  # [B, W]
        count = valid.sum(1)
        precision = (among_positives / among_all * valid).sum(1) / count.clamp_min(1)
        return mean_where(1 - precision, count > 0)


def smooth_ranks(similarities, positive, negative, temperature):
    """The ranks of each query's positives, by sigmoids -> (valid, among positives, among all).

    similarities, positive, negative: [B, B]; results [B, W], W the most positives of a query, in
    no order. A rank is 1 plus the sum over the other images of sigmoid((s_j - s_i) / temperature).
    """
    width = max(1, int(positive.sum(1).max()))
    valid, columns = positive.float().topk(width, 1)                             # [B, W]

    def ranks_of(similarities, column):
        own = similarities.gather(1, column)                                     # [B, 1]
        nearer = torch.sigmoid((similarities - own) / temperature)               # [B, B]
        nearer = nearer.scatter(1, column, 0)
        true = (nearer * positive).sum(1)
        return torch.stack([1 + true, 1 + true + (nearer * negative).sum(1)], 1)  # [B, 2]

    # Each column's [B, B] is made again in the backward pass instead of being kept.
    ranks = torch.stack([torch.utils.checkpoint.checkpoint(
        ranks_of, similarities, column, use_reentrant=False, preserve_rng_state=False)
        for column in columns.split(1, 1)], 2)                                   # [B, 2, W]
    return valid > 0, *ranks.unbind(1)


class RecallAtKLoss(Loss):
    """Recall@k surrogate: 1 minus a smooth recall at k, the mean over several k.

    Patel, Tolias, Matas, "Recall@k Surrogate Loss with Large Batches and Similarity Mixup", CVPR
    2022, eq. 5 to 8: for each query the positives' ranks r come from sigmoids of width
    recallatk_tau2, as in SmoothAPLoss; the recall at k is min(k, sum of sigmoid((k - r) /
    recallatk_tau1)) / min(k, P). The query itself is in no sum. embeddings [B, D] (normalised
    here). As there, a GPU waits.
    """

    flags = {"recallatk_k": "the k whose recall is averaged, 1 or more (paper: 1 2 4 8 16)",
             "recallatk_tau1": "width of the sigmoid that compares a rank with k, above 0; "
                               "useful 0.5 to 5 (paper: 1)",
             "recallatk_tau2": "width of the sigmoid that compares cosines, above 0; useful "
                               "0.005 to 0.1 (paper: 0.01)"}

    def __init__(self, recallatk_k=(1, 2, 4, 8, 16), recallatk_tau1=1.0, recallatk_tau2=0.01):
        super().__init__()
        self.k_vals = tuple(check_range(least=1, recallatk_k=k) for k in recallatk_k)
        self.tau1 = check_range(above=0, recallatk_tau1=recallatk_tau1)
        self.tau2 = check_range(above=0, recallatk_tau2=recallatk_tau2)

    @full_precision
    def forward(self, embeddings, labels, indices_tuple=None):
        positive, negative = pairs_for(self.sampler, embeddings, labels, indices_tuple)
        valid, _, ranks = smooth_ranks(cosine_matrix(embeddings), positive, negative, self.tau2)
        count = valid.sum(1)                                                     # [B]
        recall = 0
        for k in self.k_vals:
            found = (torch.sigmoid((k - ranks) / self.tau1) * valid).sum(1).clamp_max(k)
            recall = recall + found / count.clamp(1, k) / len(self.k_vals)
        return mean_where(1 - recall, count > 0)


class SNRLoss(Loss):
    """Triplet loss on noise-to-signal ratios d(a, x) = var(a - x) / var(a) of the embeddings.

    Yuan et al., "Signal-to-Noise Ratio: A Robust Distance Metric for Deep Metric Learning", CVPR
    2019, section 3.3: max(0, d_ap - d_an + snr_margin), plus snr_lambda times the mean absolute
    sum of an embedding's elements, which keeps their mean near zero. Variances are over the D
    elements. embeddings [B, D] unit-norm rows. Departs from the paper: the mean over the triplets
    above zero stands for the sum, as in the code of Roth et al. 2020; 0 without one.
    """

    samplings = TRIPLET_SAMPLINGS
    rotation_invariant = False  # a variance depends on the axes
    flags = {"snr_margin": "margin between noise-to-signal ratios, 0 or more; useful 0.05 to 1",
             "snr_lambda": "weight of the mean absolute sum of an embedding's values, 0 or more"}

    def __init__(self, snr_margin=0.2, snr_lambda=0.005, sampling="distance", **sampling_options):
        super().__init__(sampling, **sampling_options)
        self.margin = check_range(least=0, snr_margin=snr_margin)
        self.weight = check_range(least=0, snr_lambda=snr_lambda)

    @full_precision
    def forward(self, embeddings, labels, indices_tuple=None):
        valid, *triplets = triplets_for(self.sampler, embeddings, labels, indices_tuple)  # [T]
        # The variance of a difference is the squared distance of the centred rows, over D.
        rows = embeddings - embeddings.mean(1, keepdim=True)
        signal = rows.square().sum(1).clamp_min(1e-12)[triplets[0]]              # [T]
        d_ap, d_an = pair_sq_distances(rows, *triplets) / signal
        losses = F.relu(d_ap - d_an + self.margin) * valid
        above_zero = (losses > 0).sum()
        self.active = above_zero / valid.sum().clamp_min(1)
        return (losses.sum() / above_zero.clamp_min(1)
                + self.weight * embeddings.sum(1).abs().mean())


class QuadrupletLoss(Loss):
    """Quadruplet loss: a triplet term and one against a pair of two other classes.

    Chen et al., "Beyond Triplet Loss: a Deep Quadruplet Network for Person Re-identification",
    CVPR 2017, eq. 7: max(0, d_ap - d_an + quadruplet_margin1) + max(0, d_ap - d_nl +
    quadruplet_margin2), d squared Euclidean distances, l a random image of a third class.
    embeddings [B, D] unit-norm rows. indices_tuple may be (a, p, n, l), [T, 4], too. Departs from
    the paper: the margins are constants, the mean over the sampled tuples stands for the sum; a
    triplet without a third class counts by its first term alone. form reference, as in the code of
    Roth et al. 2020: d are plain distances; the fourth image is the anchor of a random triplet
    with another negative, whatever its class; and the second term is the mean over all pairs of a
    triplet and a fourth image.
    """

    samplings = TRIPLET_SAMPLINGS
    flags = {"quadruplet_margin1": "margin against the anchor's negative, a squared distance, 0 "
                                   "or more; useful 0.05 to 1",
             "quadruplet_margin2": "margin against a pair of two other classes, a squared "
                                   "distance, 0 or more; the paper has it below the first one"}

    def __init__(self, quadruplet_margin1=0.2, quadruplet_margin2=0.2, sampling="distance",
                 form="paper", **sampling_options):
        super().__init__(sampling, form, **{
            **sampling_options, "squared": form == "paper",
            "margin": check_range(least=0, quadruplet_margin1=quadruplet_margin1)})
        self.margin1 = quadruplet_margin1
        self.margin2 = check_range(least=0, quadruplet_margin2=quadruplet_margin2)

    @full_precision
    def forward(self, embeddings, labels, indices_tuple=None):
        tuples = tuples_for(self.sampler, embeddings, labels, indices_tuple)     # [T, 3 or 4]
        if tuples.shape[1] == 3:
            tuples = self.complete(tuples, labels)
        valid, third = tuples[:, 0] >= 0, tuples[:, 3] >= 0                      # [T]
        anchors, positives, negatives, others = tuples.clamp_min(0).unbind(1)
        d_ap, d_an = pair_sq_distances(embeddings, anchors, positives, negatives)
        if self.form == "paper":
            d_nl, = pair_sq_distances(embeddings, negatives, others)             # [T]
            second = F.relu(d_ap - d_nl + self.margin2) * third
        else:
            d_ap, d_an = distance_from_square(torch.stack([d_ap, d_an]))
            d_nl = pairwise_sq_distances(embeddings).fill_diagonal_(0)
            d_nl = distance_from_square(d_nl).index_select(0, negatives)         # [T, B]
            share = d_nl.new_zeros(len(labels)).index_add(0, others, third.to(d_nl.dtype))
            share = share / share.sum().clamp_min(1)   # [B], how often an image is a fourth one
            second = F.relu(d_ap.unsqueeze(1) - d_nl + self.margin2) @ share
        losses = (F.relu(d_ap - d_an + self.margin1) + second) * valid
        number = valid.sum().clamp_min(1)
        self.active = (losses > 0).sum() / number
        return losses.sum() / number

    def complete(self, triplets, labels):
        """triplets [T, 3], labels [B] -> [T, 4]: and a random image of a third class, or -1."""
        if self.form == "reference":
            anchors, _, negatives = triplets.clamp_min(0).unbind(1)
            number = len(labels)
            # How many triplets have this anchor and this negative: [B, B].
            rows = torch.zeros(number ** 2, device=labels.device).index_add(
                0, anchors * number + negatives, (triplets[:, 0] >= 0).float()).view(number, -1)
            fourths = draw_columns((rows.sum(1) - rows.t())[negatives])
            fourths = fourths.masked_fill(triplets[:, 0] < 0, -1)
            return torch.cat([triplets, fourths.unsqueeze(1)], 1)
        anchors, _, negatives = labels[triplets.clamp_min(0)].unbind(1)
        pieces = [draw_columns(((labels != a.unsqueeze(1)) & (labels != n.unsqueeze(1))).float())
                  for a, n in zip(*(part.split(max(1, 4 * len(labels)))
                                    for part in (anchors, negatives)))]
        return torch.cat([triplets, torch.cat(pieces).unsqueeze(1)], 1)


class ProxyAnchorLoss(ClassLoss):
    """Proxy-anchor: each proxy pulls its class's images and pushes others, the hard ones more.

    Kim et al., "Proxy Anchor Loss for Deep Metric Learning", CVPR 2020, eq. 4: the mean over the
    proxies with an image in the batch of log(1 + sum over their images of exp(-a (s - delta))),
    plus the mean over all proxies of log(1 + sum over other images of exp(a (s + delta))), s
    cosine similarities. embeddings [B, D] (normalised here).
    """

    lr_factor = 100  # authors' code
    flags = {"proxyanchor_alpha": "sharpness a, above 0; useful 16 to 64 (paper: 32)",
             "proxyanchor_delta": "margin delta, a cosine; useful 0 to 0.4 (paper: 0.1)"}

    def __init__(self, num_classes, embed_dim, proxyanchor_alpha=32.0, proxyanchor_delta=0.1):
        super().__init__(num_classes)
        self.alpha = check_range(above=0, proxyanchor_alpha=proxyanchor_alpha)
        self.delta = check_range(least=-1, most=1, proxyanchor_delta=proxyanchor_delta)
        self.proxies = torch.nn.Parameter(torch.empty(num_classes, embed_dim))
        torch.nn.init.kaiming_normal_(self.proxies, mode="fan_out")

    @full_precision
    def forward(self, embeddings, labels, indices_tuple=None):
        weights = image_weights(embeddings, labels, indices_tuple)               # [B]
        cosines = cosine_matrix(embeddings, self.proxies)                        # [B, C]
        own = labels.unsqueeze(1)
        pull = self.alpha * (self.delta - cosines.gather(1, own).squeeze(1)) + weights - 1  # [B]
        # log(1 + sum of exp) of each class's images; the 1 is an image of value 0.
        # Not by scatter_reduce, which --deterministic refuses on a GPU.
        classes = torch.arange(self.num_classes, device=labels.device)
        most = pull.detach().unsqueeze(1).masked_fill(own != classes, 0).amax(0).clamp_min(0)
        total = (-most).exp().index_add(0, labels, (pull - most[labels]).exp())  # [C]
        present = torch.zeros_like(most).index_fill_(0, labels, 1)
        positive_terms = (most + total.log()) * present
        push = self.alpha * (cosines + self.delta) + (weights - 1).unsqueeze(1)
        push = push.scatter(1, own, -torch.inf)
        negative_terms = log1p_exp(torch.logsumexp(push, 0))                     # [C]
        # Times 0 where no tuple is valid.
        return weights.amax() * (positive_terms.sum() / present.sum() + negative_terms.mean())


class ProxyNCAPlusPlusLoss(ClassLoss):
    """ProxyNCA++: cross-entropy of softmax(-d(x, p) / T) over all proxies, d squared distances.

    Teh, DeVries, Taylor, "ProxyNCA++: Revisiting and Revitalizing Proxy Neighborhood Component
    Analysis", ECCV 2020, eq. 5 and section 3.4: of unit vectors, the image's own proxy in the sum,
    at the temperature T. embeddings [B, D] (normalised here). The paper's pooling, layer
    normalisation and Adam with an epsilon of 1 are not part of a loss and not built here.
    """

    lr_factor = 100  # the authors' is 1e5, with that epsilon
    flags = {"proxyncapp_temperature": "temperature T of the squared distances, above 0; useful "
                                       "0.03 to 1 (paper: 1/9)"}

    def __init__(self, num_classes, embed_dim, proxyncapp_temperature=1 / 9):
        super().__init__(num_classes)
        self.temperature = check_range(above=0, proxyncapp_temperature=proxyncapp_temperature)
        self.proxies = torch.nn.Parameter(torch.randn(num_classes, embed_dim) / 8)

    @full_precision
    def forward(self, embeddings, labels, indices_tuple=None):
        # -d = 2 s - 2; the constant cancels in the softmax.
        scaled = F.normalize(embeddings, dim=1) * (2 / self.temperature)
        logits = scaled @ unit_weights(self.proxies, scaled).t()                 # [B, C]
        return self.mean_cross_entropy(logits, embeddings, labels, indices_tuple)


class NormSoftmaxLoss(ClassLoss):
    """Normalised softmax: the cross-entropy of cosines to class weights over a temperature.

    Zhai and Wu, "Classification is a Strong Baseline for Deep Metric Learning", BMVC 2019, eq. 3.
    embeddings [B, D] (normalised here). The paper's layer normalisation is the network's and not
    built here.
    """

    lr_factor = 50  # Roth et al. 2020 have 1 on CUB and Cars, 200 on Online Products
    flags = {"normsoftmax_temperature": "temperature of the cosines, above 0; useful 0.02 to 0.2 "
                                        "(paper: 0.05)"}

    def __init__(self, num_classes, embed_dim, normsoftmax_temperature=0.05):
        super().__init__(num_classes)
        self.temperature = check_range(above=0, normsoftmax_temperature=normsoftmax_temperature)
        self.weight = class_weights(num_classes, embed_dim)

    @full_precision
    def forward(self, embeddings, labels, indices_tuple=None):
        scaled = F.normalize(embeddings, dim=1) / self.temperature
        logits = scaled @ unit_weights(self.weight, scaled).t()                  # [B, C]
        return self.mean_cross_entropy(logits, embeddings, labels, indices_tuple)


class CosFaceLoss(ClassLoss):
    """CosFace: softmax over cosines to class weights, the own class's lowered by a margin.

    Wang et al., "CosFace: Large Margin Cosine Loss for Deep Face Recognition", CVPR 2018, eq. 4:
    the cross-entropy of logits s cos(theta_j), for the own class s (cos(theta_y) - m). embeddings
    [B, D] (normalised here).
    """

    lr_factor = 50  # as ArcFace's
    flags = {"cosface_scale": "factor s of the cosines, above 0; useful 16 to 128 (paper: 64)",
             "cosface_margin": "margin m, a cosine, 0 to 2; useful 0.1 to 0.5 (paper: 0.35)"}

    def __init__(self, num_classes, embed_dim, cosface_scale=64.0, cosface_margin=0.35):
        super().__init__(num_classes)
        self.scale = check_range(above=0, cosface_scale=cosface_scale)
        self.margin = check_range(least=0, most=2, cosface_margin=cosface_margin)
        self.weight = class_weights(num_classes, embed_dim)

    @full_precision
    def forward(self, embeddings, labels, indices_tuple=None):
        scaled = F.normalize(embeddings, dim=1) * self.scale
        logits = scaled @ unit_weights(self.weight, scaled).t()                  # [B, C]
        margins = logits.new_full((len(labels), 1), -self.scale * self.margin)
        logits = logits.scatter_add(1, labels.unsqueeze(1), margins)
        return self.mean_cross_entropy(logits, embeddings, labels, indices_tuple)


class SphereFaceLoss(ClassLoss):
    """SphereFace: softmax over cosines to class weights, the own class's angle multiplied.

    Liu et al., "SphereFace: Deep Hypersphere Embedding for Face Recognition", CVPR 2017, eq. 7 and
    8: the own class's logit is s psi(theta), psi(theta) = (-1)^k cos(m theta) - 2 k for theta from
    k pi / m to (k + 1) pi / m. The margin is phased in, as in the paper: the logit is (l
    cos(theta) + psi(theta)) / (1 + l), where l falls with the number t of training steps as 1500 /
    (1 + t / 10), a common choice, down to sphereface_lambda. embeddings [B, D] (normalised here).
    Departs from the paper: s is the constant sphereface_scale, not the length of the embedding,
    since retrieval is by distances of unit vectors.
    """

    lr_factor = 50  # as ArcFace's
    flags = {"sphereface_margin": "whole factor m of the angle, from 1; useful 2 to 4 (paper: 4)",
             "sphereface_lambda": "least weight of the plain cosine beside the one with the "
                                  "margin, which starts at 1,500 and falls; 0 or more",
             "sphereface_scale": "factor of the cosines, above 0; useful 16 to 128"}

    def __init__(self, num_classes, embed_dim, sphereface_margin=4, sphereface_lambda=5.0,
                 sphereface_scale=64.0):
        super().__init__(num_classes)
        self.margin = check_range(least=1, sphereface_margin=sphereface_margin)
        self.least = check_range(least=0, sphereface_lambda=sphereface_lambda)
        self.scale = check_range(above=0, sphereface_scale=sphereface_scale)
        self.weight = class_weights(num_classes, embed_dim, length=1)  # authors' code
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))

    @full_precision
    def forward(self, embeddings, labels, indices_tuple=None):
        steps = self.steps.to(embeddings.dtype)
        plain = (1500 / (1 + steps / 10)).clamp_min(self.least)                  # l
        if self.training:
            self.steps += 1
        cosines = cosine_matrix(embeddings, self.weight)                         # [B, C]
        own = cosines.gather(1, labels.unsqueeze(1)).clamp(-1, 1)                # [B, 1]
        # cos(m theta) is Chebyshev's polynomial of cos(theta), whose slope is finite everywhere.
        before, multiple = torch.ones_like(own), own
        for _ in range(self.margin - 1):
            before, multiple = multiple, 2 * own * multiple - before
        turns = (own.detach().acos() * (self.margin / math.pi)).floor().clamp_max(self.margin - 1)
        psi = (1 - 2 * (turns % 2)) * multiple - 2 * turns
        enlarged = (plain * own + psi) / (1 + plain)
        logits = self.scale * cosines.scatter(1, labels.unsqueeze(1), enlarged.to(own.dtype))
        return self.mean_cross_entropy(logits, embeddings, labels, indices_tuple)


class SoftTripleLoss(ClassLoss):
    """SoftTriple: softmax over classes of similarities to several centres a class, with a margin.

    Qian et al., "SoftTriple Loss: Deep Metric Learning Without Triplet Sampling", ICCV 2019, eq. 7
    to 10: the similarity to a class is the mean of the cosines s_k to its centres, weighted by
    softmax(s_k / gamma); the loss is the cross-entropy of lambda times it, softtriple_delta
    subtracted for the own class, plus tau times half the mean over the pairs of a class's centres
    of their distance, which merges centres. embeddings [B, D] (normalised here). form reference:
    the code of Roth et al. 2020, which differs in three places: the softmax is of gamma s_k, not
    s_k / gamma; it runs over the classes, for each place of a centre, not over a class's centres;
    and each dimension of all centres has length one, not each centre.
    """

    lr_factor = 100  # authors' code
    flags = {"softtriple_centers": "centres of each class, 1 or more; useful 2 to 10 (paper: 10)",
             "softtriple_lambda": "factor of similarities, above 0; useful 5 to 40 (paper: 20)",
             "softtriple_gamma": "temperature of the choice of a centre, above 0; useful 0.05 to "
                                 "0.5 (paper: 0.1)",
             "softtriple_delta": "margin, a cosine, 0 or more; useful 0 to 0.1 (paper: 0.01)",
             "softtriple_tau": "weight of what merges a class's centres, 0 or more (paper: 0.2)"}

    def __init__(self, num_classes, embed_dim, softtriple_centers=10, softtriple_lambda=20.0,
                 softtriple_gamma=0.1, softtriple_delta=0.01, softtriple_tau=0.2, form="paper"):
        super().__init__(num_classes, form=form)
        self.scale = check_range(above=0, softtriple_lambda=softtriple_lambda)
        self.gamma = check_range(above=0, softtriple_gamma=softtriple_gamma)
        self.margin = check_range(least=0, softtriple_delta=softtriple_delta)
        self.tau = check_range(least=0, softtriple_tau=softtriple_tau)
        number = check_range(least=1, softtriple_centers=softtriple_centers)
        self.centers = torch.nn.Parameter(torch.empty(num_classes, number, embed_dim))
        bound = (num_classes * number) ** -0.5  # authors' code
        torch.nn.init.uniform_(self.centers, -bound, bound)

    @full_precision
    def forward(self, embeddings, labels, indices_tuple=None):
        centers = self.centers.to(embeddings.dtype)                              # [C, K, D]
        paper = self.form == "paper"
        centers = F.normalize(centers, dim=2 if paper else (0, 1))
        by_place = centers.transpose(0, 1)     # [K, C, D], sums over K then run along the classes
        cosines = F.normalize(embeddings, dim=1) @ by_place.flatten(0, 1).t()    # [B, K C]
        cosines = cosines.unflatten(1, by_place.shape[:2])
        weights = (cosines / self.gamma).softmax(1) if paper else (cosines * self.gamma).softmax(2)
        similarities = (weights * cosines).sum(1)                                # [B, C]
        margins = similarities.new_full((len(labels), 1), -self.margin)
        logits = self.scale * similarities.scatter_add(1, labels.unsqueeze(1), margins)
        loss = self.mean_cross_entropy(logits, embeddings, labels, indices_tuple)
        number = centers.shape[1]
        if self.tau == 0 or number == 1:
            return loss
        pairs = torch.triu_indices(number, number, 1, device=centers.device)
        between = (centers @ centers.transpose(1, 2))[:, pairs[0], pairs[1]]     # [C, pairs]
        # sqrt(2 - 2 s) is their distance; a little more keeps its gradient finite.
        apart = (2 + 1e-5 - 2 * between).clamp_min(1e-6).sqrt()
        # Each pair counts once in the sum, twice in the number, as in eq. 10.
        return loss + self.tau * apart.sum() / (len(centers) * number * (number - 1))


LOSSES = {
    "marginloss": MarginLoss,
    "triplet": TripletLoss,
    "npair": NPairLoss,
    "proxynca": ProxyNCALoss,
    "crossentropy": CrossEntropyLoss,
    "arcface": ArcFaceLoss,
    "contrastive": ContrastiveLoss,
    "lifted": LiftedLoss,
    "multisimilarity": MultiSimilarityLoss,
    "circle": CircleLoss,
    "ntxent": NTXentLoss,
    "supcon": SupConLoss,
    "angular": AngularLoss,
    "histogram": HistogramLoss,
    "fastap": FastAPLoss,
    "smoothap": SmoothAPLoss,
    "recallatk": RecallAtKLoss,
    "snr": SNRLoss,
    "quadruplet": QuadrupletLoss,
    "proxyanchor": ProxyAnchorLoss,
    "proxynca++": ProxyNCAPlusPlusLoss,
    "normsoftmax": NormSoftmaxLoss,
    "cosface": CosFaceLoss,
    "sphereface": SphereFaceLoss,
    "softtriple": SoftTripleLoss,
}


@functools.cache
def defaults_of(named):
    """{name: default} of the parameters that a class's constructor names."""
    return {name: parameter.default
            for name, parameter in inspect.signature(named).parameters.items()
            if parameter.kind is parameter.POSITIONAL_OR_KEYWORD}


def flags_of(name):
    """The options that the loss of this name, a key of LOSSES, is built with: a list of names."""
    own = [flag for flag in defaults_of(LOSSES[name]) if flag not in ("num_classes", "embed_dim")]
    return own + [LOSSES[name].lr_flag] * bool(LOSSES[name].lr_flag)


def add_arguments(parser):
    """Adds the group 'loss' to an argparse parser: what follows, and the flags of each class."""
    group = parser.add_argument_group("loss")
    group.add_argument("--loss", choices=LOSSES, default="marginloss",
                       metavar="NAME",
                       help=f"{', '.join(LOSSES)}. The README says whose they are. Default "
                            "%(default)s (reference runs)")
    flags = {name: flags_of(name) for name in LOSSES}
    group.add_argument("--form", choices=samplers.FORMS, default="paper",
                       metavar="FORM",
                       help="reference: what the code of Roth et al. 2020 computes, where a "
                            "loss's or a sampling's docstring says that it differs. Default "
                            "%(default)s; the rev- recipes set it")
    for flag, default, text in (
            ("beta_lr", 5e-4, "marginloss: learning rate of the boundaries, one for each class; "
             "useful 1e-4 to 1e-1. Default %(default)s (reference runs)"),
            ("proxy_lr", None, "proxynca: learning rate of the proxies; useful 1 to 1000 times "
             "--lr. Default 1e-5 (reference runs); glyphs 1e-2"),
            ("loss_lr", None, "learning rate of a loss's own weights, classifier or proxies, "
             "where no flag above names it; too low and they stay at random places; useful 1 to "
             "1000 times --lr. Default --lr for crossentropy (Roth and Brattoli 2019), 50 times "
             "that for arcface (Roth et al. 2020), cosface, sphereface and normsoftmax, 100 times "
             "for proxyanchor and softtriple (their authors' code) and proxynca++; glyphs 1e-2")):
        group.add_argument(f"--{flag}", type=float, default=default, metavar="LR", help=text)
    for flag, text in [row for loss in LOSSES.values() for row in loss.flags.items()]:
        readers = [name for name, own in flags.items() if flag in own]
        default = defaults_of(LOSSES[readers[0]])[flag]
        text = f"{', '.join(readers)}: {text}"
        if isinstance(default, bool):
            group.add_argument(f"--{flag}", default=default, help=text, action="store_true" if
                               not default else argparse.BooleanOptionalAction)
            continue
        values = list(default) if isinstance(default, tuple) else [default]
        group.add_argument(f"--{flag}", type=type(values[0]), metavar=flag.split("_")[-1].upper(),
                           nargs="+" if isinstance(default, tuple) else None,
                           default=values if isinstance(default, tuple) else default,
                           help=f"{text}. Default {' '.join(map(str, values))}")


def loss_select(opt, num_classes, **changes):
    """Builds the loss that opt.loss names -> (loss module, parameter group or None).

    Its constructor's parameters take the options of the same names; changes: values in place of
    the options'. The group is of a loss with weights of its own, without weight decay.
    """
    values = {**vars(opt), "num_classes": num_classes, **changes}
    loss_class = LOSSES[values["loss"]]
    names = list(defaults_of(loss_class))
    if "sampling_options" in inspect.signature(loss_class).parameters:
        names += [name for name in defaults_of(Sampler) if name in values and name not in names]
    missing = [name for name in names if name not in values]
    if missing:
        raise ValueError(f"{loss_class.__name__} takes {missing[0]}, which no flag gives: name it "
                         "in the class's flags")
    loss = loss_class(**{name: values[name] for name in names})
    weights = list(loss.parameters())
    if not weights:
        return loss, None
    if loss.lr_flag not in values:
        raise ValueError(f"{loss_class.__name__} has weights of its own: its lr_flag must name "
                         f"their learning rate's option, such as loss_lr, not {loss.lr_flag}")
    check_range(least=0, most=1e6, **{loss.lr_flag: values[loss.lr_flag]})
    return loss, {"params": weights, "lr": values[loss.lr_flag], "weight_decay": 0}
