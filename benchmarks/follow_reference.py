"""The authors' runs followed step by step: their loss, samplers, network, metrics beside ours.

python benchmarks/follow_reference.py --baselines DIR --revisiting DIR takes two clones, of
github.com/Confusezius/Deep-Metric-Learning-Baselines and of
github.com/Confusezius/Revisiting_Deep_Metric_Learning_PyTorch. Their side is built from the lines
of their own scripts by their own parsers, ours from recipes.csv by main.parse_options; both start
from the same weights and see the same batches, and where tuples are drawn theirs are given to
ours. It needs no GPU and none of the packages that the clones import beyond numpy, scipy and
scikit-learn: small stand-ins are made below.
"""

import argparse
import collections
import contextlib
import functools
import importlib
import io
import itertools
import os
import random
import re
import shlex
import sys
import types
from pathlib import Path
from unittest import mock

import numpy as np
import scipy.stats
import sklearn.metrics
import torch
import torchvision.models  # noqa: F401, looks for pandas: before there is a stand-in

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))

import auxiliaries
import evaluate
import losses
import main as program
import netlib
import results
import samplers
import trainers

CLASSES, IMAGES, PIXELS = 100, 10, 16  # as many classes as CUB200-2011 trains on
SIZES = ("n_epochs", "bs", "samples_per_class", "embed_dim")
CUB_LOSSES = ("margin-distance", "triplet-softhard", "npair", "proxynca")

# What their code says in the words of the machine or the torch that it was written for.
CHANGES = {
    "losses": (("torch.cuda.FloatTensor", "batch.dtype"), ("torch.cuda.LongTensor", "torch.int64"),
               # torch 1.0.1, which they name, adds comparisons as numbers.
               ("(pos_loss>0.)+(neg_loss>0.)", "(pos_loss>0.).int()+(neg_loss>0.).int()")),
    # float64 here
    "criteria.margin": ((".to(torch.float)", ".to(batch.dtype)"),),
    # Until torch 1.11 PairwiseDistance summed over the second dimension, not the last.
    "criteria.lifted": (("nn.PairwiseDistance(p=2)",
                         "(lambda x, y: (x - y + 1e-6).norm(dim=1))"),),
}


# ---- stand-ins, and what is read of the clones


def small_trunk():
    """A ResNet50 in small, with its layers' names: images [B, 3, H, W] -> [B, 1000]."""
    def layer(before, after):
        return torch.nn.Sequential(torch.nn.Conv2d(before, after, 3, padding=1),
                                   torch.nn.BatchNorm2d(after), torch.nn.ReLU())

    first, norm, relu = layer(3, 8)
    return torch.nn.Sequential(collections.OrderedDict(
        conv1=first, bn1=norm, relu=relu, maxpool=torch.nn.MaxPool2d(2), layer1=layer(8, 16),
        layer2=layer(16, 32), layer3=layer(32, 64), layer4=layer(64, 64),
        avgpool=torch.nn.AdaptiveAvgPool2d(1), flatten=torch.nn.Flatten(),
        last_linear=torch.nn.Linear(64, 1000)))


class Index:
    """faiss's exact index: the rows' nearest, by Euclidean distance."""

    def __init__(self, dimensions):
        self.rows = np.empty((0, dimensions), "float32")

    def add(self, rows):
        self.rows = np.concatenate([self.rows, rows])

    def search(self, queries, k):
        distances = torch.cdist(*(torch.from_numpy(rows).double()[None]
                                  for rows in (queries, self.rows)),
                                compute_mode="donot_use_mm_for_euclid_dist")[0]
        found = distances.topk(k, largest=False)
        return tuple(part.numpy() for part in found)


class Clustering:
    """faiss's k-means, which starts at random: here by this project's, so that both are one."""

    def __init__(self, dimensions, clusters):
        self.clusters = clusters

    def train(self, rows, index):
        rows = torch.from_numpy(rows)
        self.centroids = evaluate.kmeans(rows, self.clusters)[1].numpy()


@contextlib.contextmanager
def stand_ins():
    """Within it the packages that the clones import are small stand-ins."""
    parts = {
        "faiss": {"IndexFlatL2": Index, "Clustering": Clustering, "omp_set_num_threads": int,
                  "vector_float_to_array": np.ravel},
        "pretrainedmodels": {"resnet50": lambda **_: small_trunk(), "__path__": []},
        "pretrainedmodels.utils": {}, "pandas": {}, "graphviz": {}, "skimage": {},
        "matplotlib": {"__path__": [], "use": str}, "matplotlib.pyplot": {},
        "tqdm": {"tqdm": lambda rows, **_: rows}}
    for name, members in parts.items():
        sys.modules[name] = types.ModuleType(name)
        vars(sys.modules[name]).update(members)
    yield
    for name in parts:  # others ask for pandas, too
        del sys.modules[name]


def read(module, path):
    """Runs a file of theirs, with CHANGES, as this module, which it returns."""
    text = Path(path).read_text()
    for old, new in CHANGES.get(module.__name__.removeprefix("baselines."), ()):
        if old not in text:
            raise SystemExit(f"{path} does not say {old!r}: is it another version?")
        text = text.replace(old, new)
    exec(compile(text, str(path), "exec"), vars(module))
    return module


class Baselines:
    """Deep-Metric-Learning-Baselines: its modules, and the options of its scripts' lines."""

    def __init__(self, folder):
        # googlenet is the one module of its own that netlib imports.
        sys.modules["googlenet"] = read(types.ModuleType("googlenet"), folder / "googlenet.py")
        for name in ("losses", "netlib", "auxiliaries", "datasets"):
            setattr(self, name, read(types.ModuleType(f"baselines.{name}"), folder / f"{name}.py"))
        lines = (folder / "Standard_Training.py").read_text().splitlines()
        scope = {"argparse": argparse, "os": os}
        exec("\n".join(line for line in lines if line.startswith("parser")), scope)
        self.options = {}
        for line in (folder / "sample_training_runs.sh").read_text().splitlines():
            words = shlex.split(line.lstrip("# "))
            # The last two lines ask for measures, one by a flag that there is not.
            if words[1:2] == ["Standard_Training.py"] and not words[-1].endswith("_measure"):
                self.add(scope["parser"].parse_args(words[2:]))

    def add(self, opt):
        """Keeps a line's options under our recipe's name."""
        if opt.loss == "proxynca":  # as the script does after parsing
            opt.samples_per_class = 1
        network = "googlenet-" * (opt.arch == "googlenet")
        name = opt.loss.removesuffix("loss")
        sampling = f"-{opt.sampling}" * (opt.loss in ("triplet", "marginloss"))
        self.options[f"{opt.dataset}/{network}{name}{sampling}"] = opt
        # Their tables have softhard where their script has semihard.
        if opt.sampling == "semihard" and opt.arch == "resnet50":
            opt = argparse.Namespace(**{**vars(opt), "sampling": "softhard"})
            self.options[f"{opt.dataset}/{name}-softhard"] = opt

    def build(self, opt):
        """(network, criterion, parameter groups) as Standard_Training.py makes them."""
        opt.num_classes, opt.device = CLASSES, torch.device("cpu")
        opt.arch = "resnet50"  # the small trunk for GoogLeNet too
        network = self.netlib.networkselect(opt)
        groups = [{"params": network.parameters(), "lr": opt.lr, "weight_decay": opt.decay}]
        criterion, groups = self.losses.loss_select(opt.loss, opt, groups)
        if hasattr(criterion, "sampler"):
            criterion.sampler.give = Recorded(criterion.sampler.give)
        return network, criterion, groups


class Revisiting:
    """Revisiting_Deep_Metric_Learning_PyTorch: its modules, and its scripts' lines' options."""

    def __init__(self, folder):
        sys.path.append(str(folder))  # after this project's modules
        for name in ("criteria", "batchminer", "datasampler", "architectures", "metrics",
                     "parameters"):
            setattr(self, name, importlib.import_module(name))
        for name in CHANGES:
            if name.startswith("criteria."):
                read(sys.modules[name], sys.modules[name].__file__)
        parser = argparse.ArgumentParser()
        for part in ("basic_training", "batch_creation", "batchmining_specific", "loss_specific",
                     "wandb"):
            parser = getattr(self.parameters, f"{part}_parameters")(parser)
        self.options = {}
        for line in next(folder.glob("Sample_Runs/*.sh")).read_text().splitlines():
            words = shlex.split(line) if line.startswith("python main.py") else []
            if "--group" in words:  # the others are trials
                opt, _ = parser.parse_known_args(words[2:])
                self.options[self.name(opt)] = opt

    @staticmethod
    def name(opt):
        """Our recipe's name for a line's options."""
        regularised = "r-" * (opt.batch_mining == "rho_distance")
        mining = f"-{opt.batch_mining.removeprefix('rho_')}" * (opt.loss in (
            "contrastive", "margin", "triplet", "snr", "quadruplet"))
        beta = f"-beta{opt.loss_margin_beta}" * (opt.loss == "margin")
        name = {"softtriplet": "softtriple"}.get(opt.loss, opt.loss)
        return f"{opt.dataset}/rev-{regularised}{name}{mining}{beta}"

    def build(self, opt):
        """(network, criterion, parameter groups) as main.py makes them."""
        opt.n_classes, opt.device = CLASSES, torch.device("cpu")
        network = self.architectures.select(opt.arch, opt)
        groups = [{"params": network.parameters(), "lr": opt.lr, "weight_decay": opt.decay}]
        miner = Recorded(self.batchminer.select(opt.batch_mining, opt))
        criterion, groups = self.criteria.select(opt.loss, opt, groups, miner)
        return network, criterion, groups


class Recorded:
    """A sampler of theirs that keeps what it gave last."""

    def __init__(self, sampler):
        self.sampler, self.name = sampler, getattr(sampler, "name", None)

    def __call__(self, *batch):
        self.given = self.sampler(*batch)
        return self.given


# ---- twenty steps


class Theirs:
    """Their run of a recipe, from the weights of ours."""

    def __init__(self, repository, opt, ours):
        self.remark, opt = "", argparse.Namespace(**vars(opt))
        try:
            self.network, self.criterion, groups = repository.build(opt)
        except AttributeError as error:  # an option that their parser does not give
            name = re.search(r"attribute '(\w+)'", str(error))[1]
            self.remark = f"as it is: no attribute {name}, here {name}multi"
            setattr(opt, name, getattr(opt, f"{name}multi"))
            self.network, self.criterion, groups = repository.build(opt)
        self.optimizer = torch.optim.Adam(groups)
        self.scheduler = torch.optim.lr_scheduler.MultiStepLR(self.optimizer, opt.tau, opt.gamma)
        self.own = list(self.criterion.parameters())
        self.weights = [*self.network.model.parameters(), *self.own]
        self.lengths = [row_length(weight) for weight in self.own]
        embedder = ours.models["embedder"].linear
        with torch.no_grad():
            for weight, value in zip(self.weights, [
                    *ours.models["trunk"].backbone.parameters(), *embedder.parameters(),
                    *ours.own], strict=True):
                weight.copy_(as_theirs(value, weight))

    def step(self, images, labels):
        embeddings = self.network(images)
        embeddings = embeddings[0] if isinstance(embeddings, tuple) else embeddings
        drawn, choice = [], np.random.choice

        def recorded(*options, **more):
            drawn.append(choice(*options, **more))
            return drawn[-1]

        with mock.patch.object(np.random, "choice", recorded):
            loss = self.criterion(embeddings, labels)
        self.optimizer.zero_grad()
        loss.backward()
        gradients = [weight.grad.clone() for weight in self.weights]
        self.optimizer.step()
        return loss.detach(), gradients, self.tuples(drawn, len(labels))

    def tuples(self, drawn, batch):
        """What their sampler gave in the last step, as indices_tuple; None where it gave none."""
        sampler = getattr(self.criterion, "batchminer", getattr(
            getattr(self.criterion, "sampler", None), "give", None))
        given = sampler and sampler.given
        if given is None or isinstance(given, tuple) and np.ndim(given[1][0]):
            return None  # sets of positives: all pairs
        if isinstance(given, tuple):  # anchors, positives, sets of negatives
            widest = max(map(len, given[2]))
            given = [[a, p, *n, *[-1] * (widest - len(n))] for a, p, n in zip(*given)]
        if getattr(self.criterion, "name", None) == "quadruplet":
            given = [[*row, fourth] for row, fourth in zip(given, drawn[-batch:], strict=True)]
        return torch.tensor([[int(index) for index in row] for row in given])


class Ours:
    """This project's run of a recipe, as main.py builds it."""

    def __init__(self, opt, images):
        trunk, embedder = netlib.network_select(opt, losses.LOSSES[opt.loss].unit_norm)
        trainer = trainers.trainer_select(
            opt, trunk, embedder, functools.partial(losses.loss_select, opt, CLASSES), images,
            torch.utils.data.BatchSampler(range(len(images)), 1, False), torch.device("cpu"))
        self.models, self.loss_funcs = trainer.models, trainer.loss_funcs
        self.optimizers, self.schedulers = trainer.optimizers, trainer.lr_schedulers
        self.own = list(self.loss_funcs["metric_loss"].parameters())
        self.weights = [*self.models["trunk"].backbone.parameters(),
                        *self.models["embedder"].parameters(), *self.own]
        for layer in self.models["trunk"].modules():
            if isinstance(layer, torch.nn.BatchNorm2d) and opt.batchnorm == "frozen":
                layer.eval()
        # Embeddings around the origin lie as far apart as those of a trained network.
        with torch.no_grad():
            layer, features = self.models["embedder"].linear, self.models["trunk"](images)
            spread = ((features - features.mean(0)) @ layer.weight.t()).norm(dim=1).mean()
            layer.weight /= spread
            layer.bias.copy_(-layer.weight @ features.mean(0))
        self.lengths = [row_length(weight) for weight in self.own]

    def step(self, images, labels, tuples):
        embeddings = self.models["embedder"](self.models["trunk"](images))
        loss = self.loss_funcs["metric_loss"](embeddings, labels, tuples)
        for optimizer in self.optimizers.values():
            optimizer.zero_grad()
        loss.backward()
        gradients = [weight.grad.clone() for weight in self.weights]
        for optimizer in self.optimizers.values():
            optimizer.step()
        return loss.detach(), gradients


def as_theirs(weight, like):
    """Our weight [...] in the shape of theirs, which may be [C, D], or [D, C K] for [C, K, D]."""
    return weight.flatten(0, 1).t() if weight.dim() == 3 and like.dim() == 2 else weight


def row_length(weight):
    """The root of an own weight's mean square length over the classes."""
    return float(weight.detach().norm() / CLASSES ** 0.5)


def largest(pairs):
    """The largest absolute difference over pairs of tensors of theirs and ours."""
    return max(float((theirs - as_theirs(ours, theirs)).detach().abs().max())
               for theirs, ours in pairs)


def rates(theirs, ours, epochs=120):
    """The largest difference of rates and decays of the three parts, relative to theirs."""
    worst = 0
    for _ in range(epochs):
        for i, optimizer in enumerate(ours.optimizers.values()):
            first, = optimizer.param_groups
            other = theirs.optimizer.param_groups[max(0, i - 1)]  # trunk, embedder, own weights
            worst = max(worst, *(abs(first[key] - other[key]) / max(other[key], 1e-12)
                                 for key in ("lr", "weight_decay")))
        for scheduler in (theirs.scheduler, *ours.schedulers.values()):
            scheduler.optimizer.step()
            scheduler.step()
    return worst


def batches(opt, images, number, distinct):
    """Batches of classes and images drawn with replacement, or of distinct classes."""
    generator = np.random.default_rng(0)
    for _ in range(number):
        labels = generator.choice(CLASSES, opt.bs // opt.samples_per_class, not distinct)
        labels = np.repeat(labels, opt.samples_per_class)
        places = labels * IMAGES + generator.integers(0, IMAGES, opt.bs)
        yield images[torch.from_numpy(places)], torch.from_numpy(labels)


def both(name, repository, images):
    """A recipe's final options and its two runs -> (opt, Theirs, Ours)."""
    torch.manual_seed(0)
    np.random.seed(0)
    opt = program.parse_options(["--recipe", name, "--gpu", "-1", "--not_pretrained"])
    with contextlib.redirect_stdout(io.StringIO()):
        ours = Ours(opt, images)
        return opt, Theirs(repository, repository.options[name], ours), ours


def follow(name, repository, images, steps, distinct=False):
    """Both runs of a recipe, side by side: the cells of its row."""
    opt, theirs, ours = both(name, repository, images)
    worst_loss = worst_gradient = 0
    for pixels, labels in batches(opt, images, steps, distinct):
        try:
            their_loss, their_gradients, tuples = theirs.step(pixels, labels)
        except ValueError as error:
            if distinct:
                raise
            cells = follow(name, repository, images, steps, distinct=True)
            return [*cells[:-1], "theirs cannot run where a class comes twice in a batch "
                    f"({error}); distinct classes here"]
        if not torch.isfinite(their_loss):
            theirs.remark += f"their loss is {float(their_loss)}"
            break
        our_loss, our_gradients = ours.step(pixels, labels, tuples)
        worst_loss = max(worst_loss, abs(float(their_loss - our_loss)))
        most = max(float(gradient.abs().max()) for gradient in their_gradients)
        worst_gradient = max(worst_gradient,
                             largest(zip(their_gradients, our_gradients)) / most)
    numbers = (worst_loss, worst_gradient, largest(zip(theirs.weights, ours.weights)),
               rates(theirs, ours))
    lengths = "; ".join(f"{first:.2f} / {second:.2f}"
                        for first, second in zip(theirs.lengths, ours.lengths))
    return [name, *(f"{number:.1e}" for number in numbers), lengths, theirs.remark]


def steps_table(names, repository_of, number):
    """Prints what differs, at most, over so many steps of each recipe."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(CLASSES, 3, PIXELS, PIXELS, generator=generator)
    images = centres.repeat_interleave(IMAGES, 0)
    images = images + torch.randn(images.shape, generator=generator)
    print(f"\n| recipe | loss | gradient, of its largest | weights after {number} steps | "
          "rates, 120 epochs | length of own weights, theirs / ours | remark |\n"
          "|---|---|---|---|---|---|---|")
    for name in names:
        print(f"| {' | '.join(follow(name, repository_of[name], images, number))} |", flush=True)


def compare_lines(repository_of):
    """Prints whether all recipes with a line in the authors' scripts have its sizes and rates."""
    images, differing = torch.zeros(2, 3, PIXELS, PIXELS), []
    names = [name for name in results.read_recipes() if name in repository_of]
    for name in names:
        opt, theirs, ours = both(name, repository_of[name], images)
        line, worst = repository_of[name].options[name], rates(theirs, ours)
        differing += [f"{name} {flag}" for flag in SIZES if vars(opt)[flag] != vars(line)[flag]]
        differing += [f"{name} rates ({worst:.1e})"] * (worst > 1e-12)
    print(f"\n{len(names)} recipes have a line in the authors' scripts; {', '.join(SIZES)}, decay "
          f"and rates over 120 epochs differ in: {', '.join(differing) or 'none'}")


def compare_googlenet(baselines):
    """Prints the difference of embeddings by their GoogLeNet and ours, of the same weights."""
    name = "cub200/googlenet-npair"
    torch.manual_seed(0)
    np.random.seed(0)
    opt = program.parse_options(["--recipe", name, "--gpu", "-1", "--not_pretrained"])
    theirs = baselines.netlib.GoogLeNet(argparse.Namespace(
        **{**vars(baselines.options[name]), "not_pretrained": True})).eval()
    trunk, embedder = (part.eval() for part in netlib.network_select(opt, unit_norm=False))
    state = theirs.model.state_dict()
    trunk.backbone.load_state_dict({key: state[key] for key in trunk.backbone.state_dict()})
    embedder.linear.load_state_dict(theirs.model.last_linear.state_dict())
    images = torch.randn(2, 3, opt.image_size, opt.image_size)
    found = {}
    with torch.no_grad():
        first, second = theirs(images)
        for trunk.backbone.transform_input in (True, False):
            found[trunk.backbone.transform_input] = largest(
                zip((first, second), embedder(trunk(images)))) / largest([(first, second)])
    print(f"their GoogLeNet's embeddings differ from ours by {found[True]:.1e} times what two "
          f"images' differ by, and by {found[False]:.1e} without transform_input")


# ---- the metrics


class Rows(list):
    """Their loader of a test set whose network is the identity: [(labels, rows, places)]."""

    def __init__(self, rows, labels, width):
        super().__init__([(labels, rows, torch.arange(len(rows)))[:width]])
        paths = [("", int(label)) for label in labels]
        self.dataset = types.SimpleNamespace(avail_classes=labels.unique().tolist(),
                                             image_list=paths, image_paths=paths)


def metrics_table(baselines, revisiting):
    """Prints each metric of one set of embeddings by their two codes and by ours."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(60).repeat_interleave(40)
    rows = torch.randn(60, 128, generator=generator)[labels]
    rows = rows + 2 * torch.randn(rows.shape, generator=generator)
    rows = torch.nn.functional.normalize(rows).float()
    opt = types.SimpleNamespace(n_classes=60, kernels=1, evaluate_on_gpu=False, device="cpu",
                                rho_spectrum_embed_dim=128)
    k_vals = [1, 2, 4, 8]
    names = {**{f"recall@{k}": f"e_recall@{k}" for k in k_vals}, "nmi": "nmi", "f1": "f1",
             "dist_ratio": "dists@intra_over_inter", "rho": "rho_spectrum@1"}
    score = sklearn.metrics.cluster.normalized_mutual_info_score
    sklearn.metrics.cluster.normalized_mutual_info_score = (  # its default until 0.21
        lambda *pair: score(*pair, average_method="geometric"))
    f1, nmi, recalls, _ = baselines.auxiliaries.eval_metrics_one_dataset(
        torch.nn.Identity(), Rows(rows, labels, 2), "cpu", k_vals, opt)
    first = {**{f"recall@{k}": value for k, value in zip(k_vals, recalls)}, "nmi": nmi, "f1": f1}
    second = revisiting.metrics.MetricComputer(list(names.values()), opt).compute_standard(
        opt, torch.nn.Identity(), Rows(rows, labels, 3), ["discriminative"], "cpu")[0]
    ours = evaluate.evaluate_embeddings(rows, labels, k_vals=k_vals, nmi_average="geometric",
                                        metrics=("recall", "nmi", "f1", "dist_ratio", "rho"))
    print("\n| metric | Baselines | Revisiting | ours |\n|---|---|---|---|")
    for name, theirs in names.items():
        cells = (first.get(name), second["discriminative"][theirs], ours[name])
        print(f"| {name} | " + " | ".join("" if cell is None else f"{cell:.6f}" for cell in cells)
              + " |")


# ---- how often a sampler draws what


def count(draw, number):
    """{place: Counter of what stood there} over so many draws, each a list of (place, what)."""
    counts = collections.defaultdict(collections.Counter)
    for _ in range(number):
        for place, what in draw():
            counts[place][what] += 1
    return counts


def chi_square(first, second):
    """Whether two counts are of one distribution at each place -> (chi-square, freedom, p).

    What both together drew less than ten times is one cell.
    """
    statistic = freedom = 0
    for place in first.keys() | second.keys():
        table = np.array([[counts[place][what] for what in first[place] | second[place]]
                          for counts in (first, second)])
        rare = table.sum(0) < 10
        table = np.column_stack([table[:, ~rare], table[:, rare].sum(1)])
        found = scipy.stats.chi2_contingency(table[:, table.sum(0) > 0], correction=False)
        statistic, freedom = statistic + found.statistic, freedom + found.dof
    return statistic, freedom, scipy.stats.chi2.sf(statistic, freedom)


def places(tuples, labels):
    """Rows (a, p, n), or of n-pairs (a, p, n, n, ...), or vectors of these, as (place, what)."""
    if isinstance(tuples, tuple):
        tuples = [[a, p, *n] for a, p, n in zip(*tuples)]
    rows = [[int(index) for index in row] for row in tuples]
    if len(rows[0]) == 3:
        return [(a, (p, n)) for a, p, n in rows]
    return [pair for a, p, *_ in rows for pair in ((a, p), (f"class {labels[a]}", a))]


def groups_of(images, labels, size):
    """A batch [B] of images: its classes and the groups with one twice, and the last class."""
    groups = np.reshape(images, (-1, size))
    return [("classes", len(np.unique(labels[groups]))), ("class", labels[groups[-1, 0]]),
            ("twice", sum(len(set(group)) < size for group in groups.tolist()))]


def figures(counts):
    """The mean number of a batch's classes, and of its groups with one image twice, if any."""
    return ", ".join(f"{np.mean(list(counts[place].elements())):.2f}"
                     for place in ("classes", "twice") if place in counts)


def baselines_batches(repository, labels, batch_size, size):
    """Their batches, as lists of images, without end."""
    images = {int(name): np.flatnonzero(labels == name).tolist() for name in np.unique(labels)}
    dataset = repository.datasets.BaseTripletDataset(
        images, argparse.Namespace(arch="resnet50"), samples_per_class=size)
    repository.datasets.Image = types.SimpleNamespace(open=int)  # an image is its number
    dataset.ensure_3dim = dataset.transform = int
    while True:
        order = np.random.permutation(len(dataset))
        for start in range(0, len(order) - batch_size + 1, batch_size):
            yield [dataset[i][1] for i in order[start:start + batch_size]]


def revisiting_batches(repository, labels, batch_size, size):
    """Their batches, as lists of images, without end."""
    images = {int(name): [("", int(place)) for place in np.flatnonzero(labels == name)]
              for name in np.unique(labels)}
    opt = argparse.Namespace(bs=batch_size, samples_per_class=size)
    sampler = repository.datasampler.select("class_random", opt, images, labels)
    return itertools.chain.from_iterable(itertools.repeat(sampler))


def frequencies_table(baselines, revisiting, number):
    """Prints chi-square tests of their samplers' draws and ours, of 12 images or of birds."""
    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)
    labels = torch.tensor([0, 0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3])
    rows = torch.randn(4, 8)[labels] + 1.5 * torch.randn(12, 8)
    rows = torch.nn.functional.normalize(rows)
    miners = argparse.Namespace(
        loss="triplet", loss_triplet_margin=0.2, miner_distance_lower_cutoff=0.5,
        miner_distance_upper_cutoff=1.4, miner_rho_distance_lower_cutoff=0.5,
        miner_rho_distance_upper_cutoff=1.4, miner_rho_distance_cp=0.3)
    pairs = [("Baselines", method, baselines.losses.TupleSampler(method).give)
             for method in ("random", "semihard", "softhard", "distance", "npair")]
    pairs += [("Revisiting", method, revisiting.batchminer.select(
        {"rho": "rho_distance"}.get(method, method), miners))
        for method in ("random", "semihard", "softhard", "distance", "rho", "npair")]
    draws = [(code, method, lambda their=their: places(their(rows, labels), labels),
              lambda our=samplers.Sampler(method): places(our.give(rows, labels), labels))
             for code, method, their in pairs]
    birds = np.repeat(np.arange(100), [41, 44, 45, 48, 50] + [59] * 64 + [60] * 31)  # as CUB200's
    for code, size, spacing, theirs in (
            ("Baselines", 4, 2, baselines_batches(baselines, birds, 112, 4)),
            ("Revisiting", 2, 0, revisiting_batches(revisiting, birds, 112, 2))):
        ours = samplers.ReplacementBatchSampler(birds, 112, size, spacing=spacing)
        ours = itertools.chain.from_iterable(itertools.repeat(ours))
        draws.append((code, f"batches of {size} a class", *(
            lambda batches=batches, size=size: groups_of(next(batches), birds, size)
            for batches in (theirs, ours))))
    print(f"\n| authors' code | sampler | chi-square of {number:,} draws each | freedom | p | "
          "classes, groups with an image twice: theirs | ours |\n|---|---|---|---|---|---|---|")
    for code, method, *both in draws:
        theirs, ours = (count(draw, number) for draw in both)
        statistic, freedom, p = chi_square(theirs, ours)
        print(f"| {code} | {method} | {statistic:.1f} | {freedom} | {p:.3f} | "
              f"{figures(theirs)} | {figures(ours)} |", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--baselines", type=Path, required=True, help="the first clone")
    parser.add_argument("--revisiting", type=Path, required=True, help="the second clone")
    parser.add_argument("--recipes", nargs="+", default=None, help="default: all losses")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--draws", type=int, default=10000, help="of each sampler")
    parser.add_argument("--dtype", choices=("float64", "float32"), default="float64")
    args = parser.parse_args()
    torch.set_default_dtype(getattr(torch, args.dtype))
    torch.set_num_threads(1)
    with stand_ins():
        repositories = Baselines(args.baselines), Revisiting(args.revisiting)
    compare_googlenet(repositories[0])
    netlib.network_of = lambda arch: netlib.Network(lambda: small_trunk()[:-1])
    repository_of = {name: part for part in repositories for name in part.options}
    compare_lines(repository_of)
    names = args.recipes or [
        *(f"cub200/{name}" for name in CUB_LOSSES), "in-shop/triplet-semihard",
        "online_products/rev-histogram", "online_products/rev-softmax",  # other flags
        *(name for name in results.read_recipes() if name.startswith("cub200/rev-"))]
    steps_table(names, repository_of, args.steps)
    metrics_table(*repositories)
    frequencies_table(*repositories, args.draws)


if __name__ == "__main__":
    main()
