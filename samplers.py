"""Which images form a batch, and which tuples of a batch form the loss.

The batch samplers at the end choose the images of each batch; Sampler chooses tuples (anchor,
positive, negative) inside a batch of embeddings. Nothing here knows a network, a loss or a command
line beyond its own flags. A new tuple sampler is one method of Sampler, whose docstring's first
line is its help, and its name in METHODS; a new way to compose batches is a subclass of
BatchSampler.
"""

import collections
import itertools
import math

import numpy as np
import torch

# Of Sampler, the default first; npair is of its own two losses.
METHODS = ("distance", "semihard", "facenet", "softhard", "random", "hard", "multisimilarity",
           "all", "rho", "npair")
FORMS = ("paper", "reference")  # of losses and samplings that their authors' code has otherwise
DRAW_NEGATIVES = ("random", "semihard", "facenet", "softhard", "distance", "rho")
# How many groups of a batch, by --batch_draw, must lie between two of the same class.
SPACINGS = {"replacement": 0, "spaced_replacement": 2}
MOST_TRIPLETS = 2 ** 24  # that "all" and "multisimilarity" list: 900 MiB while they are made


def add_arguments(parser):
    """Adds the groups 'batch' and 'sampling', scalars and names, to an argparse parser."""
    batch = parser.add_argument_group("batch (how its images are chosen)")
    batch.add_argument("--bs", "--batch_size", type=int, default=112, metavar="B",
                       help="images per batch; a multiple of --samples_per_class. Larger ones "
                            "give harder negatives; useful 32 to 512. Default %(default)s "
                            "(reference runs)")
    batch.add_argument("--samples_per_class", type=int, default=None, metavar="M",
                       help="images of each class in a batch; useful 2 to 8. 1 is plain shuffled "
                            "batches, each image once an epoch, if --batch_draw is distinct. "
                            "Default 4, and 1 for proxynca (reference runs)")
    batch.add_argument("--batch_draw", choices=("distinct", *SPACINGS), default="distinct",
                       metavar="HOW",
                       help="distinct: a class is once in a batch, an image about once in an "
                            "epoch. replacement: groups of M images, each of a class drawn from "
                            "all, its images from all of the class (Roth et al. 2020). "
                            "spaced_replacement: the same, but never one of the last two classes "
                            "again (reference runs). Default %(default)s")
    sampling = parser.add_argument_group("sampling (how tuples of a batch are chosen)")
    methods = ". ".join(f"{name}: {getattr(Sampler, name).__doc__}".partition(" -> ")[0]
                        for name in METHODS)
    sampling.add_argument("--sampling", choices=(*METHODS, "none"), metavar="NAME",
                          help=f"{methods}. none: every image or pair counts. Default: the first "
                               "that the README's table gives for the loss")
    sampling.add_argument("--positives", choices=("one", "all"), default="one",
                          metavar="HOW",
                          help=f"one positive of each anchor, drawn at random, or all that it "
                               f"could draw, each with a negative of its own (Wu et al.'s code); "
                               f"for {', '.join(DRAW_NEGATIVES)}. Default %(default)s")
    sampling.add_argument("--mining_epsilon", type=float, default=0.1, metavar="E",
                          help="multisimilarity sampling: how much, in cosine, a pair may be "
                               "easier than the anchor's hardest of the other kind. Default "
                               "%(default)s (paper)")
    sampling.add_argument("--rho_probability", type=float, default=0.3, metavar="P",
                          help="rho sampling: share of the tuples that push an image of the "
                               "anchor's class, 0 to 1; useful 0.1 to 0.4. Default %(default)s "
                               "(the paper has 0.15 to 0.4)")
    sampling.add_argument("--distance_cutoff", type=float, default=None, metavar="D",
                          help="distance sampling: drop negatives this far or farther; the paper "
                               "has 1.4. Default: keep all (reference runs)")


def pairwise_sq_distances(rows, columns=None):
    """Squared Euclidean distances of all pairs, by |x|^2 - 2 x.y + |y|^2, never below zero.

    rows [R, D], columns [C, D] (None: the rows) -> sq_distances [R, C]. The expansion is a matrix
    product, so a distance near zero carries a rounding error of about 1e-7 |x|^2 in float32.
    """
    row_norms = rows.square().sum(1, keepdim=True)                               # [R, 1]
    if columns is None:
        columns, column_norms = rows, row_norms.t()
    else:
        column_norms = columns.square().sum(1)
    return torch.addmm(row_norms + column_norms, rows, columns.t(), alpha=-2).clamp_min(0)


def draw_columns(weights, number=None):
    """Draws a column of each row, or a number of them, with probability as its weight.

    weights [R, C], non-negative -> columns [R] int64, with a number [R, number]; -1 for a row that
    is all zero. A column of weight zero is never drawn, any other may be drawn again. One uniform
    number each and one cumulative sum per row.
    """
    cumulative = weights.cumsum(1)
    total = cumulative[:, -1:]
    draws = 1 if number is None else number
    uniform = total * torch.rand(len(weights), draws, device=weights.device,
                                 dtype=cumulative.dtype)
    # u < total keeps the search inside the row: the product above can round up to the total.
    uniform = torch.minimum(uniform, torch.nextafter(total, torch.zeros_like(total)))
    columns = torch.searchsorted(cumulative, uniform, right=True)
    columns = columns.clamp_max(weights.shape[1] - 1)  # a row with NaN sorts behind its end
    columns = columns.masked_fill(total <= 0, -1)
    return columns.squeeze(1) if number is None else columns


def check_range(above=-math.inf, least=-math.inf, most=math.inf, below=math.inf, **flag):
    """A scalar, given under its flag's name, as it is; ValueError outside of what makes sense."""
    (name, value), = flag.items()
    if not (above < value < below and least <= value <= most):
        allowed = " and ".join(f"{word} {bound:g}" for word, bound in (
            ("above", above), ("at least", least), ("at most", most), ("below", below))
            if math.isfinite(bound))
        raise ValueError(f"--{name} {value}: it must be {allowed}")
    return value


def check_form(form):
    """form, a scalar of FORMS, as it is; ValueError for any other."""
    if form not in FORMS:
        raise ValueError(f"--form {form}: it takes {' or '.join(FORMS)}")
    return form


class Sampler(torch.nn.Module):
    """Chooses index tuples inside a batch of embeddings [B, D]; a method for each of METHODS.

    method: a name of METHODS. margin: the loss's margin, in the loss's own distance (facenet
    only). squared: whether that distance is the squared Euclidean one. lower_cutoff: distance
    sampling treats nearer negatives as if at this distance (0.5 in the paper). distance_cutoff: it
    drops negatives that far or farther (1.4 in the paper; None keeps all). mining_epsilon:
    multisimilarity's margin, a difference of cosine similarities. rho_probability: the share of
    tuples that rho replaces. positives: "one" positive of each anchor, at random, or "all" that
    the method may draw, each with a negative of its own (DRAW_NEGATIVES only), so that their [B,
    3] is longer. form: random and npair have two, see there.

    Everything is drawn from torch's global generator of the embeddings' device.
    """

    def __init__(self, method="random", margin=0.2, squared=False, distance_cutoff=None,
                 lower_cutoff=0.5, mining_epsilon=0.1, rho_probability=0.3, positives="one",
                 form="paper"):
        super().__init__()
        if method not in METHODS:
            raise ValueError(f"no sampling method {method!r}; --sampling takes "
                             f"{', '.join(METHODS)}")
        if distance_cutoff is not None:
            check_range(above=lower_cutoff, distance_cutoff=distance_cutoff)
        if positives != "one" and (positives != "all" or method not in DRAW_NEGATIVES):
            raise ValueError(f"--positives {positives} with --sampling {method}: it is one, or "
                             f"all for {', '.join(DRAW_NEGATIVES)}")
        self.method = method
        self.margin = check_range(least=0, margin=margin)
        self.squared = squared
        self.distance_cutoff = distance_cutoff
        self.lower_cutoff = check_range(above=0, lower_cutoff=lower_cutoff)
        self.mining_epsilon = check_range(least=0, mining_epsilon=mining_epsilon)
        self.rho_probability = check_range(least=0, most=1, rho_probability=rho_probability)
        self.positives = positives
        self.form = check_form(form)
        if (method, positives, form) == ("random", "all", "reference"):
            raise ValueError("--form reference of random sampling draws all triplets alike; it "
                             "has no --positives all")
        self.sample = getattr(self, method)

    @torch.no_grad()
    def give(self, embeddings, labels, padded=False, **parameters):
        """embeddings [B, D], labels [B] -> LongTensor [T, 3] (npair: [T, 1 + 1 + negatives]).

        Tensors, arrays or lists. Each row is (anchor, positive, negative, ...), indices into the
        batch; an anchor without a positive or a negative gives no row, so T may be 0. The methods
        mark such a row with -1; with all positives they have, on a GPU, a row for each two images,
        and npair's reference form marks places left over in a row so.
        Counting the good rows makes the host wait for the device, so the losses ask for
        padded=True: all rows, the -1 ones included. A method may also return a list of tuples.
        parameters go to the method.
        """
        embeddings = torch.as_tensor(embeddings)
        embeddings = embeddings if embeddings.dtype.itemsize > 2 else embeddings.float()
        labels = torch.as_tensor(labels, device=embeddings.device)
        with torch.autocast(embeddings.device.type, enabled=False):
            tuples = self.sample(embeddings, labels, **parameters)
        if not torch.is_tensor(tuples):
            width = len(tuples[0]) if len(tuples) else 3
            tuples = torch.tensor(tuples, dtype=torch.long, device=embeddings.device)
            tuples = tuples.reshape(-1, width)
        if padded:
            return tuples
        tuples = tuples[tuples[:, 0] >= 0]
        width = (tuples >= 0).sum(1)
        if len(tuples) and (width == width[0]).all():
            tuples = tuples[tuples >= 0].view(len(tuples), -1)
        return tuples

    def forward(self, embeddings, labels, others=None, other_labels=None):
        """Index tensors (anchors, positives, negatives), [T] each: a miner for any trainer.

        With others [G, D] and other_labels [G], anchors index the embeddings, positives and
        negatives the others. ValueError for npair, whose tuples are longer, and for rho with
        others, since its anchors are positives too.
        """
        if self.method == "npair":
            raise ValueError("npair is no miner: NPairLoss and AngularLoss draw its tuples "
                             "themselves; as a miner take another method of samplers.METHODS")
        if self.method == "rho" and others is not None:
            raise ValueError("rho takes anchors as positives, so it mines in one set; between two "
                             "take another method of samplers.METHODS")
        given = {} if others is None else {"others": torch.as_tensor(others),
                                           "other_labels": torch.as_tensor(other_labels)}
        return self.give(embeddings, labels, **given).unbind(1)

    def extra_repr(self):
        """What repr shows: the method, then the scalars of the methods that have any."""
        return ", ".join(f"{name}={value!r}" for name, value in vars(self).items()
                         if not name.startswith("_") and name not in ("training", "sample"))

    def random(self, embeddings, labels, others=None, other_labels=None):
        """For each anchor a random positive and a random negative -> [B, 3].

        form reference: each row is one of all triplets of the batch, so that an anchor may come
        often or never, as in the code of Roth et al. 2020; there no triplet comes twice.
        """
        same, positive = self.pair_masks(labels, other_labels)
        if self.form == "paper":
            return self.triplets(self.draw_positives(positive), self.draw_negatives(~same))
        number = (positive.sum(1) * (~same).sum(1)).float()                      # of an anchor
        anchors = draw_columns(number.expand(len(labels), -1)).clamp_min(0)
        rows = torch.stack([anchors, *(draw_columns(mask[anchors].float())
                                       for mask in (positive, ~same))], 1)
        return rows.masked_fill((rows < 0).any(1, keepdim=True), -1)

    def semihard(self, embeddings, labels, others=None, other_labels=None):
        """Random positive; negative with d_ap < d_an < d_ap + 0.2, else a random one -> [B, 3].

        d is the plain Euclidean distance and 0.2 fixed, whatever the loss's own are, as in the
        code of Roth and Brattoli 2019 and of Roth et al. 2020. facenet is the paper's.
        """
        return self.just_behind(0.2, False, embeddings, labels, others, other_labels)

    def facenet(self, embeddings, labels, others=None, other_labels=None):
        """Random positive; negative with d_ap < d_an < d_ap + margin, else a random one -> [B, 3].

        Schroff et al., "FaceNet", CVPR 2015, section 3.2, in the loss's own distance and margin.
        Departs from the paper: where no negative is semi-hard a random one stands in, so that
        every anchor counts, as in semihard.
        """
        return self.just_behind(self.margin, self.squared, embeddings, labels, others,
                                other_labels)

    def just_behind(self, margin, squared, embeddings, labels, others, other_labels):
        """semihard and facenet -> [B, 3]; squared: whether margin is a squared distance."""
        same, positive = self.pair_masks(labels, other_labels)
        distances = pairwise_sq_distances(embeddings, others)
        if not squared:
            distances = distances.sqrt_()
        positives = self.draw_positives(positive)                                # [B, P]
        d_ap = distances.gather(1, positives.clamp_min(0))
        # In the order of distance the negatives behind a positive are neighbours.
        distances, order = distances.masked_fill(same, torch.inf).sort(1)
        first = torch.searchsorted(distances, d_ap, right=True)
        number = torch.searchsorted(distances, d_ap + margin) - first
        any_negative = (~same).sum(1, keepdim=True).expand_as(number)
        first, number = (first.masked_fill(number <= 0, 0),
                         torch.where(number > 0, number, any_negative))
        places = first + (torch.rand(d_ap.shape, device=d_ap.device) * number).long()
        negatives = order.gather(1, places.clamp_max(order.shape[1] - 1))
        return self.triplets(positives, negatives.masked_fill(number == 0, -1))

    def softhard(self, embeddings, labels, others=None, other_labels=None):
        """Positive beyond the nearest negative, negative within the farthest positive -> [B, 3].

        Both random among those that qualify, and random among all where none does. Roth and
        Brattoli's reference code, 2019 ("softhard").
        """
        same, positive = self.pair_masks(labels, other_labels)
        distances = pairwise_sq_distances(embeddings, others)
        nearest_negative = distances.masked_fill(same, torch.inf).amin(1, keepdim=True)
        farthest_positive = distances.masked_fill(~positive, -torch.inf).amax(1, keepdim=True)
        hard_positive = positive & (distances > nearest_negative)
        hard_negative = ~same & (distances < farthest_positive)
        return self.triplets(self.draw_positives(self.prefer(hard_positive, positive)),
                             self.draw_negatives(self.prefer(hard_negative, ~same)))

    def hard(self, embeddings, labels, others=None, other_labels=None):
        """Farthest positive and nearest negative of each anchor -> [B, 3].

        Hermans, Beyer, Leibe, "In Defense of the Triplet Loss for Person Re-Identification", 2017,
        eq. 5 (batch hard).
        """
        same, positive = self.pair_masks(labels, other_labels)
        distances = pairwise_sq_distances(embeddings, others)
        farthest, positives = distances.masked_fill(~positive, -torch.inf).max(1, keepdim=True)
        nearest, negatives = distances.masked_fill(same, torch.inf).min(1, keepdim=True)
        return self.triplets(positives.masked_fill(farthest == -torch.inf, -1),
                             negatives.masked_fill(nearest == torch.inf, -1))

    def distance(self, embeddings, labels, others=None, other_labels=None):
        """Random positive; negatives drawn with the inverse density of their distance -> [B, 3].

        Wu et al., "Sampling Matters in Deep Embedding Learning", ICCV 2017, section 4.1: on the
        unit sphere in n dimensions, log q(d)^-1 = (2 - n) log d - (n - 3)/2 log(1 - d^2/4), d
        clipped from below at lower_cutoff. Wants unit-norm rows. Departs from the paper: the upper
        cut-off is off unless given, as in the reference code (which keeps far negatives); where it
        leaves an anchor no negative, a random one stands in.
        """
        same, positive = self.pair_masks(labels, other_labels)
        n = embeddings.shape[1]
        sq_distances = pairwise_sq_distances(embeddings, others).clamp_min_(self.lower_cutoff ** 2)
        excluded = (same if self.distance_cutoff is None
                    else same | (sq_distances >= self.distance_cutoff ** 2))
        # 1 - d^2/4 is 0 at antipodal points, where the density vanishes; 1e-6 keeps it finite.
        rest = torch.rsub(sq_distances, 1, alpha=0.25).clamp_min_(1e-6).log_()
        log_weights = sq_distances.log_().mul_((2 - n) / 2).sub_(rest, alpha=(n - 3) / 2)
        # A softmax over what is left: the row's likeliest negative never vanishes by rounding.
        lowest = torch.finfo(log_weights.dtype).min
        weights = log_weights.masked_fill_(excluded, lowest).softmax(1).masked_fill_(excluded, 0)
        negatives, positives = self.draw_negatives(weights), self.draw_positives(positive)
        if self.distance_cutoff is not None:
            negatives = torch.where(negatives < 0, self.draw_negatives(~same), negatives)
        return self.triplets(positives, negatives)

    def rho(self, embeddings, labels):
        """As distance, but a share of the rows is (anchor, itself, a positive) -> [B, 3].

        Roth et al., "Revisiting Training Strategies and Generalization Performance in Deep Metric
        Learning", ICML 2020, section 5: with rho_probability a triplet only pushes the anchor from
        a random image of its own class, which keeps the embedding from discarding directions. The
        positive of such a row is the anchor, as in the authors' code: its distance is constant.
        """
        triplets = self.distance(embeddings, labels)
        replaced = torch.rand(len(triplets), 1, device=labels.device) < self.rho_probability
        return torch.where(replaced, torch.cat([triplets[:, :1], triplets[:, :2]], 1), triplets)

    def all(self, embeddings, labels, others=None, other_labels=None):
        """Every valid triplet of the batch -> [T, 3]; ValueError for more than MOST_TRIPLETS.

        With M images of each class, B (M - 1) (B - M) of them: for small batches. How many there
        are is looked up, so this method makes a GPU wait.
        """
        same, positive = self.pair_masks(labels, other_labels)
        return self.every_triplet(positive, ~same)

    def multisimilarity(self, embeddings, labels, others=None, other_labels=None):
        """All triplets of an anchor's hard positives and hard negatives -> [T, 3].

        How many there are is looked up, so this method makes a GPU wait. ValueError for more than
        MOST_TRIPLETS.
        """
        return self.every_triplet(*self.hard_pairs(embeddings, labels, others, other_labels))

    @torch.no_grad()
    def hard_pairs(self, embeddings, labels, others=None, other_labels=None):
        """The pairs that are hard for their anchor -> (positive [B, B], negative [B, B]) masks.

        Wang et al., "Multi-Similarity Loss with General Pair Weighting", CVPR 2019, eq. 7 and 8: a
        negative is hard if it is more similar than the least similar positive minus
        mining_epsilon, a positive if it is less similar than the most similar negative plus
        mining_epsilon.
        """
        same, positive = self.pair_masks(labels, other_labels)
        rows = torch.nn.functional.normalize(embeddings, dim=1)
        columns = rows if others is None else torch.nn.functional.normalize(others, dim=1)
        similarities = rows @ columns.t()                                        # [B, G]
        least = similarities.masked_fill(~positive, torch.inf).amin(1, keepdim=True)
        most = similarities.masked_fill(same, -torch.inf).amax(1, keepdim=True)
        # Said by what is not hard, so that embeddings that are not finite reach the loss.
        return (positive & ~(similarities >= most + self.mining_epsilon),
                ~same & ~(similarities <= least - self.mining_epsilon))

    def npair(self, embeddings, labels):
        """A random pair of each class of two or more, others' positives negatives -> [B, 2 + B].

        Row i is (anchor, positive, negatives) where image i is its class's
        anchor and all -1 elsewhere; column 2 + j holds class j's positive, -1 where there is none.
        Sohn, "Improved Deep Metric Learning with Multi-class N-pair Loss Objective", NIPS 2016.
        form reference: every image with a positive is an anchor, all images of other classes its
        negatives, as in the code of Roth et al. 2020; column 2 + j holds image j or -1.
        """
        if self.form == "reference":
            same, positive = self.pair_masks(labels)
            positives = draw_columns(positive.float(), 1).masked_fill(same.all(1, True), -1)
            place = torch.arange(len(labels), device=labels.device)
            rows = torch.cat([place.unsqueeze(1), positives, place.where(~same, -1)], 1)
            return rows.masked_fill(positives < 0, -1)
        positives = self.npair_positives(labels)
        place = torch.arange(len(labels), device=labels.device)
        classes = positives >= 0
        negatives = positives.expand(len(labels), -1)
        negatives = negatives.masked_fill(torch.eye(len(labels), dtype=torch.bool,
                                                    device=labels.device), -1)
        rows = torch.cat([place.unsqueeze(1), positives.unsqueeze(1), negatives], dim=1)
        return rows.masked_fill(~classes.unsqueeze(1), -1)

    @staticmethod
    def npair_positives(labels):
        """A random positive for one random anchor of each class: [B] -> [B], -1 for all others.

        Classes of one image have none; -1 everywhere if there are fewer than two other classes.
        """
        order = torch.rand(len(labels), device=labels.device).argsort(stable=True)
        order = order[labels[order].argsort(stable=True)]  # by class, at random inside
        names = labels[order]
        anchor = (names != names.roll(1)) & (names == names.roll(-1))  # a class's first of several
        anchor &= anchor.sum() > 1
        positives = torch.where(anchor, order.roll(-1), -1)
        return torch.empty_like(order).scatter_(0, order, positives)

    @staticmethod
    def pair_masks(labels, other_labels=None):
        """labels [B] -> same class [B, B] and positive pair (same class, another image) [B, B].

        With other_labels [G]: both [B, G] and equal, since all others are other images.
        """
        if other_labels is not None:
            same = labels.unsqueeze(1) == other_labels
            return same, same
        same = labels.unsqueeze(1) == labels
        return same, same.clone().fill_diagonal_(False)

    @staticmethod
    def every_triplet(positive, negative):
        """Masks [B, G] of pairs -> the triplets of each anchor's pairs [T, 3]."""
        number = int((positive.sum(1) * negative.sum(1)).sum())
        if number > MOST_TRIPLETS:
            raise ValueError(f"{number:,} triplets in a batch of {len(positive)}, more than "
                             f"{MOST_TRIPLETS:,}: take a smaller --bs or another --sampling")
        anchors, positives = positive.nonzero(as_tuple=True)
        pairs, negatives = negative[anchors].nonzero(as_tuple=True)
        return torch.stack([anchors[pairs], positives[pairs], negatives], 1)

    @staticmethod
    def prefer(preferred, eligible):
        """Masks [B, G] -> of each row the preferred columns where there are any, else eligible."""
        return torch.where(preferred.any(1, keepdim=True), preferred, eligible)

    def draw_positives(self, mask):
        """Mask [B, G] -> a random column of each row, or all: [B, 1] or [B, G], -1 for none."""
        if self.positives == "one":
            return draw_columns(mask.float(), 1)
        return torch.where(mask, torch.arange(mask.shape[1], device=mask.device), -1)

    def draw_negatives(self, weights):
        """weights [B, G] -> columns for draw_positives's, drawn with them, of the same shape."""
        return draw_columns(weights.float() if weights.dtype == torch.bool else weights,
                            1 if self.positives == "one" else weights.shape[1])

    def triplets(self, positives, negatives):
        """positives, negatives [B, P], -1 for none -> [B P, 3], -1 rows for incomplete ones.

        On a CPU, which need not wait to count them, a list of all positives has no such rows.
        """
        anchors = torch.arange(len(positives), device=positives.device).unsqueeze(1)
        rows = torch.stack([anchors.expand_as(positives), positives, negatives], 2).flatten(0, 1)
        incomplete = (rows < 0).any(1)
        if self.positives == "all" and rows.device.type == "cpu":
            return rows[~incomplete]
        return rows.masked_fill(incomplete.unsqueeze(1), -1)


class BatchSampler(torch.utils.data.BatchSampler):
    """Base of the batch samplers: iterating gives lists of indices, shape [batch_size].

    A subclass has batches(epoch), which yields them; they depend on the labels, the seed and the
    epoch alone. skip, if set, is how many batches the next pass leaves out at its beginning, to go
    on where one was broken off.
    """

    def __init__(self, num_batches, batch_size, seed):
        self.num_batches = num_batches
        self.batch_size = batch_size
        self.seed = seed
        self.epoch = self.skip = 0

    def set_epoch(self, epoch):
        """The next pass gives the batches of this epoch (any non-negative int)."""
        self.epoch = epoch

    def __len__(self):
        return self.num_batches

    def __iter__(self):
        epoch, skip = self.epoch, self.skip
        self.epoch, self.skip = epoch + 1, 0  # for a loop that never calls set_epoch
        yield from itertools.islice(self.batches(epoch), skip, None)


class ClassBalancedBatchSampler(BatchSampler):
    """Batches of batch_size / samples_per_class classes, samples_per_class images of each.

    labels: the class of each image, [N] ints. Classes, and images of a class, are distinct in one
    batch; a class with fewer than samples_per_class images repeats them as evenly as it can. An
    epoch has N // batch_size batches (at least one) and draws each image about once, whatever the
    size of its class: a class's images are shuffled and cut into groups, and how many groups a
    class gives is in proportion to its images, as far as one group a batch allows. Raises
    ValueError where the sizes do not fit.
    """

    distinct = True

    def __init__(self, labels, batch_size=112, samples_per_class=4, seed=1):
        if samples_per_class < 1 or batch_size < 1 or batch_size % samples_per_class:
            raise ValueError(f"--bs {batch_size} is not a multiple of --samples_per_class "
                             f"{samples_per_class}")
        super().__init__(max(1, len(labels) // batch_size), batch_size, seed)
        self.samples_per_class = samples_per_class
        self.classes_per_batch = batch_size // samples_per_class
        _, self.labels, self.counts = np.unique(labels, return_inverse=True, return_counts=True)
        if self.distinct and self.classes_per_batch > len(self.counts):
            raise ValueError(
                f"a batch of {batch_size} with {samples_per_class} images a class needs "
                f"{self.classes_per_batch} classes; the training split has {len(self.counts)}: "
                f"use --bs {len(self.counts) * samples_per_class} or less, or a larger "
                "--samples_per_class")

    def groups_per_class(self, generator):
        """How many groups each class gives in this epoch, [C] ints that sum to K x batches.

        In proportion to the class's images, but never more than there are batches, since a class
        may stand in a batch once; the fractions are rounded at random (systematic sampling).
        """
        wanted = float(self.num_batches * self.classes_per_batch)
        full = np.zeros(len(self.counts), dtype=bool)  # classes that stand in every batch
        while True:
            share = (wanted - self.num_batches * full.sum()) / max(1, self.counts[~full].sum())
            shares = np.where(full, self.num_batches, self.counts * share)
            if not (shares > self.num_batches).any():
                break
            full |= shares >= self.num_batches
        steps = np.floor(np.cumsum(shares) + generator.random() * (1 - 1e-6) + 1e-9)
        return np.diff(steps, prepend=0).astype(int)

    def batches(self, epoch):
        generator = np.random.default_rng([self.seed, epoch])
        # The images, class after class, shuffled within each class.
        order = np.lexsort((generator.random(len(self.labels)), self.labels))
        first = np.cumsum(self.counts) - self.counts
        left = self.groups_per_class(generator)
        taken = np.zeros_like(left)
        for batches_left in range(self.num_batches, 0, -1):
            # Weighted draw without replacement (Gumbel top-K) by groups left; a class that has as
            # many groups as there are batches must come now, or it could not be used up.
            with np.errstate(divide="ignore"):
                keys = np.log(left) + generator.gumbel(size=len(left))
            keys[left == batches_left] = np.inf
            classes = np.argpartition(-keys, self.classes_per_batch - 1)[:self.classes_per_batch]
            classes = generator.permutation(classes)
            place = (taken[classes, None] * self.samples_per_class
                     + np.arange(self.samples_per_class))
            yield order[first[classes, None] + place % self.counts[classes, None]].ravel().tolist()
            left[classes] -= 1
            taken[classes] += 1


class ReplacementBatchSampler(ClassBalancedBatchSampler):
    """Batches of groups of samples_per_class images, each group of a class drawn anew.

    Every class is equally likely, whatever its size, and so is every image of it: a class may come
    several times in a batch, an image several times in a group. spacing: a group is of none of the
    classes of so many groups before it in the batch. Roth et al., "Revisiting Training Strategies
    and Generalization Performance in Deep Metric Learning", ICML 2020, have 0 in their code, Roth
    and Brattoli's reference code, 2019, has 2 (and carries them from batch to batch). Departs from
    their code: an image that comes in two batches of an epoch is cropped alike, since
    images.ImageDataset draws by seed, epoch and image.
    """

    distinct = False

    def __init__(self, labels, batch_size=112, samples_per_class=4, seed=1, spacing=0):
        super().__init__(labels, batch_size, samples_per_class, seed)
        if spacing >= len(self.counts):
            raise ValueError(f"the training split has {len(self.counts)} classes; --batch_draw "
                             f"spaced_replacement needs more than {spacing}")
        self.spacing = spacing

    def batches(self, epoch):
        order = np.argsort(self.labels, kind="stable")  # the images, class after class
        first = np.cumsum(self.counts) - self.counts
        for number in range(self.num_batches):
            generator = np.random.default_rng([self.seed, epoch, number])
            classes, recent = [], collections.deque(maxlen=self.spacing)
            while len(classes) < self.classes_per_batch:
                drawn = generator.integers(len(self.counts))
                if drawn not in recent:
                    classes.append(drawn)
                    recent.append(drawn)
            places = generator.integers(self.counts[classes, None],
                                        size=(self.classes_per_batch, self.samples_per_class))
            yield order[first[classes, None] + places].ravel().tolist()


class ShuffledBatchSampler(BatchSampler):
    """Plain shuffled batches: each image at most once an epoch, the incomplete last batch dropped.

    For losses without positive pairs (--samples_per_class 1). Raises ValueError for a batch larger
    than the dataset.
    """

    def __init__(self, num_images, batch_size=112, seed=1):
        if not 1 <= batch_size <= num_images:
            raise ValueError(f"--bs {batch_size} with {num_images} training images: a batch takes "
                             f"1 to {num_images} of them")
        super().__init__(num_images // batch_size, batch_size, seed)
        self.num_images = num_images

    def batches(self, epoch):
        order = np.random.default_rng([self.seed, epoch]).permutation(self.num_images)
        for number in range(self.num_batches):
            yield order[number * self.batch_size:][:self.batch_size].tolist()


def batch_sampler_select(labels, opt):
    """The batch sampler of the options: with replacement, balanced, or shuffled for 1 a class.

    labels: shape [N], the training images' classes.
    """
    if opt.batch_draw != "distinct":
        return ReplacementBatchSampler(labels, opt.bs, opt.samples_per_class, opt.seed,
                                       SPACINGS[opt.batch_draw])
    if opt.samples_per_class == 1:
        return ShuffledBatchSampler(len(labels), opt.bs, opt.seed)
    return ClassBalancedBatchSampler(labels, opt.bs, opt.samples_per_class, opt.seed)
