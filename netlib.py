"""The networks: a trunk turns images into features, an embedder features into embeddings.

Trunk wraps any torchvision classification network, or the small ConvNet, without its last layer;
Embedder is the linear layer in its place. Neither knows losses or options; network_select does. A
network of your own is a class beside ConvNet and a line in network_select.
"""

import argparse
import collections
import os
import re
import sys

import torch
import torch.nn.functional as F

IMAGENET_MEAN = (0.485, 0.456, 0.406)  # of ImageNet's training images, RGB in [0, 1]: what
IMAGENET_STD = (0.229, 0.224, 0.225)   # torchvision's pretrained weights expect

AMP_TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "none": None}


def add_arguments(parser):
    """Adds the group 'network' to an argparse parser."""
    group = parser.add_argument_group("network", "the network that is trained")
    group.add_argument("--arch", default=None, metavar="NAME",
                       help="resnet50 and googlenet (the reference runs), any other torchvision "
                            "classification network by its name (resnet18, mobilenet_v3_small, "
                            "vit_b_16, ...), or convnet: four small convolutions for small "
                            "images. Default resnet50; glyphs convnet")
    group.add_argument("--embed_dim", type=int, default=None, metavar="D",
                       help="numbers in an embedding; useful 32 to 2048. Default 128, googlenet "
                            "512 (reference runs)")
    group.add_argument("--not_pretrained", action="store_true",
                       help="start from random weights instead of torchvision's IMAGENET1K_V1, "
                            "which are downloaded once. Always so for convnet, which has none")
    group.add_argument("--weights", type=os.path.expanduser, default=None, metavar="FILE",
                       help="start the trunk from this local state dict instead of a download, "
                            "e.g. torchvision's resnet50-0676ba61.pth; its classifier is ignored")
    group.add_argument("--batchnorm", choices=("frozen", "trained"), default=None,
                       help="frozen keeps the running means and variances of batch normalisation "
                            "(its scales and shifts still learn), as the reference runs do. "
                            "Default frozen for pretrained trunks and trained for random ones, "
                            "which have no statistics to keep")
    group.add_argument("--amp", choices=("bf16", "fp16", "none"), default=None,
                       help="the trunk's arithmetic: bf16 or fp16 (GPU only, with a gradient "
                            "scaler) by torch's autocast, or none, float32. Embedding layer, "
                            "losses and distances are in float32 always. Default bf16 on a CPU "
                            "with bfloat16 matrix units (amx_bf16), where it is several times "
                            "faster, but for convnet; else none")
    group.add_argument("--channels_last", action=argparse.BooleanOptionalAction, default=None,
                       help="keep images as [B, H, W, 3] in memory, which convolutions are often "
                            "faster on; the results differ by rounding. Default: yes on a CPU, "
                            "and with --amp, but for convnet")
    group.add_argument("--compile", action="store_true",
                       help="compile the trunk with torch.compile: some minutes at the start, "
                            "faster steps after; needs a C++ compiler on the CPU, Triton on a GPU")


class ConvNet(torch.nn.Module):
    """A small convolutional trunk for small images: images [B, 3, H, W] -> features [B, 256].

    Four 3 x 3 convolutions (32, 64, 128, 256 channels) with batch normalisation, each but the last
    followed by 2 x 2 max pooling, then the mean over positions. H and W from 8 up.
    """

    def __init__(self):
        super().__init__()
        layers, inputs = [], 3
        for outputs in (32, 64, 128, 256):
            layers += [torch.nn.Conv2d(inputs, outputs, 3, padding=1, bias=False),
                       torch.nn.BatchNorm2d(outputs), torch.nn.ReLU(inplace=True),
                       torch.nn.MaxPool2d(2)]
            inputs = outputs
        self.layers = torch.nn.Sequential(*layers[:-1])
        self.num_features = inputs

    def forward(self, images):
        return self.layers(images).mean((2, 3))


class Trunk(torch.nn.Module):
    """A backbone behind ImageNet's normalisation: images [B, 3, H, W] -> features [B, F].

    uint8 images (0 to 255, as the datasets give them) are scaled and normalised here, on the
    device; float images are taken as already normalised. num_features is F. amp: torch.bfloat16 or
    torch.float16, the type that the backbone computes in, by autocast; features are float32 all
    the same. channels_last: the memory format of images and weights.
    """

    def __init__(self, backbone, num_features, amp=None, channels_last=False):
        super().__init__()
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self.backbone = backbone.to(memory_format=self.memory_format)
        self.num_features = num_features
        self.amp = amp
        mean, std = (torch.tensor(v).view(3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
        self.register_buffer("scale", 1 / (255 * std), persistent=False)
        self.register_buffer("shift", -mean / std, persistent=False)

    def forward(self, images):
        if images.dtype == torch.uint8:
            images = images * self.scale + self.shift                            # [B, 3, H, W]
        images = images.contiguous(memory_format=self.memory_format)
        if self.amp is None:
            return self.backbone(images)
        with torch.autocast(images.device.type, self.amp):
            return self.backbone(images).float()


class Embedder(torch.nn.Module):
    """The embedding layer: features [B, F] -> embeddings [B, D], of length one if unit_norm.

    sections: lengths that sum to D; each section is then of length one by itself.
    """

    def __init__(self, num_features, embed_dim, unit_norm=True, sections=None):
        super().__init__()
        if embed_dim < 1:
            raise ValueError(f"--embed_dim {embed_dim}: an embedding has at least one number")
        self.linear = torch.nn.Linear(num_features, embed_dim)
        self.unit_norm = unit_norm
        self.sections = sections or [embed_dim]

    def forward(self, features):
        embeddings = self.linear(features)
        if not self.unit_norm:
            return embeddings
        return torch.cat([F.normalize(section, dim=1)
                          for section in embeddings.split(self.sections, dim=1)], dim=1)


class SumOverProcesses(torch.autograd.Function):
    """The sum of the processes' tensors, in each of them; any shape. Its gradient is one too."""

    @staticmethod
    def forward(ctx, values):
        values = values.clone()
        torch.distributed.all_reduce(values)
        return values

    @staticmethod
    def backward(ctx, gradient):
        return SumOverProcesses.apply(gradient.contiguous())


class SharedBatchNorm2d(torch.nn.BatchNorm2d):
    """Batch normalisation over the shares [b, C, H, W] of all processes, equally large, on CPUs.

    torch.nn.SyncBatchNorm does the same on GPUs alone.
    """

    def forward(self, images):
        if not self.training:
            return super().forward(images)
        processes = torch.distributed.get_world_size()
        precise = images.to(torch.promote_types(images.dtype, torch.float32))
        var, mean = torch.var_mean(precise, (0, 2, 3), correction=0)             # [C] each
        shared_mean = SumOverProcesses.apply(mean) / processes
        shared_var = SumOverProcesses.apply(var + (mean - shared_mean).square()) / processes
        with torch.no_grad():
            number = processes * images.numel() // images.shape[1]
            rate = self.momentum
            self.num_batches_tracked += 1
            self.running_mean.lerp_(shared_mean, rate)
            self.running_var.lerp_(shared_var * number / max(1, number - 1), rate)
        scale = self.weight * (shared_var + self.eps).rsqrt()
        shift = self.bias - shared_mean * scale
        return (images * scale.view(-1, 1, 1) + shift.view(-1, 1, 1)).to(images.dtype)


def share_batchnorm(trunk, device):
    """The trunk with batch normalisation over the batches of all processes, for [B, 3, H, W]."""
    if device.type == "cuda":
        return torch.nn.SyncBatchNorm.convert_sync_batchnorm(trunk)
    for layer in trunk.modules():
        if type(layer) is torch.nn.BatchNorm2d:
            layer.__class__ = SharedBatchNorm2d
    return trunk


class Generator(torch.nn.Module):
    """Makes a synthetic negative of a triplet's features: [T, 3 F] -> [T, F].

    Two linear layers with a ReLU between; Duan et al., "Deep Adversarial Metric Learning", CVPR
    2018.
    """

    def __init__(self, num_features):
        super().__init__()
        self.layers = torch.nn.Sequential(torch.nn.Linear(3 * num_features, num_features),
                                          torch.nn.ReLU(),
                                          torch.nn.Linear(num_features, num_features))

    def forward(self, triplets):
        return self.layers(triplets)


def network_select(opt, unit_norm, sections=None):
    """The trunk and embedder that the options ask for -> (Trunk, Embedder), on the CPU.

    Raises ValueError for an unknown or unusable --arch, weights that do not fit or cannot be
    fetched, FileNotFoundError for a --weights file that is not there.
    """
    if opt.arch == "convnet":
        backbone = ConvNet()
        num_features, heads = backbone.num_features, ()
    else:
        backbone = torchvision_network(opt.arch)
        num_features, last_layer = remove_last_layer(backbone, opt.arch)
        heads = (last_layer, "aux1", "aux2", "AuxLogits")
    if opt.weights:
        load_weights(backbone, read_weights(opt.weights), f"--weights {opt.weights}", opt.arch,
                     heads)
    elif not opt.not_pretrained and opt.arch != "convnet":  # which has none
        state, url = fetch_weights(opt.arch)
        load_weights(backbone, state, url, opt.arch, heads)
    trunk = Trunk(backbone, num_features, channels_last=opt.channels_last)
    probe(trunk, opt.arch, opt.image_size)
    trunk.amp = AMP_TYPES[opt.amp]  # after the probe: CPUs need not know float16
    if opt.compile:
        trunk.compile()
    return trunk, Embedder(num_features, opt.embed_dim, unit_norm, sections)


def default_precision(arch, device):
    """(--amp, --channels_last) where the user leaves them open.

    bfloat16 where it was measured to be faster: on processors with matrix units for it, and on
    networks larger than convnet.
    """
    if arch == "convnet":
        return "none", False
    return "bf16" if device == "cpu" and has_bf16_units() else "none", device == "cpu"


def has_bf16_units():
    """Whether this processor multiplies bfloat16 matrices in hardware (AMX), as Linux tells."""
    try:
        with open("/proc/cpuinfo") as file:
            return "amx_bf16" in file.read()
    except OSError:
        return False


def check_arch(arch):
    """Raises ValueError unless arch is convnet or a torchvision classification network."""
    import torchvision.models as models  # here, so that --help need not wait for it

    names = models.list_models(module=models)
    if arch != "convnet" and arch not in names:
        raise ValueError(f"--arch {arch} is neither convnet nor a torchvision classification "
                         f"network; those are {', '.join(names)}")


@torch.inference_mode()
def probe(trunk, arch, image_size):
    """Sends one black image through the trunk; ValueError if it cannot take that size."""
    training = trunk.training
    try:
        trunk.eval()(torch.zeros(1, 3, image_size, image_size, dtype=torch.uint8))
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--arch {arch} cannot take images of --image_size {image_size}: "
                         f"{first_line(error)}") from error
    finally:
        trunk.train(training)


def torchvision_network(arch):
    """A torchvision classification network by name, with random weights and one output."""
    import torchvision.models as models

    check_arch(arch)
    if arch in ("googlenet", "inception_v3"):
        # No auxiliary classifiers; transform_input rescales ImageNet's normalisation to the one
        # that the weights of these two were trained with. The reference code has it, but calls the
        # layers behind it: its GoogLeNet sees contrasts 2.2 times as large.
        return models.get_model(arch, weights=None, aux_logits=False, transform_input=True,
                                init_weights=True)
    return models.get_model(arch, weights=None)


def fetch_weights(arch):
    """torchvision's IMAGENET1K_V1 weights, downloaded or from its cache -> (state dict, URL).

    Read without running code from the file. ValueError with the remedies where that fails.
    """
    import torchvision.models as models

    choices = models.get_model_weights(arch).__members__
    if "IMAGENET1K_V1" not in choices:
        raise ValueError(f"there are no IMAGENET1K_V1 weights for --arch {arch}; give a file with "
                         "--weights or start with --not_pretrained")
    weights = choices["IMAGENET1K_V1"]
    try:
        state = checked_state(weights.get_state_dict(progress=sys.stderr.isatty(),
                                                     check_hash=True, weights_only=True))
    except Exception as error:  # network, disk, hash, damaged file in the cache: all end here
        raise ValueError(
            f"the pretrained weights of --arch {arch} could not be had from {weights.url} "
            f"({first_line(error)}). Without a network: put that file into {torch.hub.get_dir()}"
            "/checkpoints (and remove a damaged one there), or name a copy with --weights FILE, "
            "or start from random weights with --not_pretrained") from error
    return state, weights.url


def remove_last_layer(network, arch):
    """Replaces the last linear layer by the identity, in place -> (its input size, its name)."""
    linear = [(name, layer) for name, layer in network.named_modules()
              if isinstance(layer, torch.nn.Linear)]
    if not linear or linear[-1][1].out_features != 1000:
        raise ValueError(f"--arch {arch} does not end in a linear classifier, so it cannot be "
                         "turned into an embedding; take another network")
    name, layer = linear[-1]
    parent, _, child = name.rpartition(".")
    setattr(network.get_submodule(parent), child, torch.nn.Identity())
    return layer.in_features, name


def read_weights(path):
    """A state dict from a file, without running code from it (weights_only=True).

    Also the trunk's part of a checkpoint of this program, and {"state_dict": ...}. ValueError
    where the file is damaged or something else, FileNotFoundError where it is not there.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise FileNotFoundError(f"--weights {path}: there is no such file") from None
    except Exception as error:  # torch.load raises a dozen types for damaged or foreign files
        raise ValueError(f"--weights {path} is not a state dict that torch can read safely: it is "
                         "damaged, no torch file, or holds more than names and tensors (save "
                         f"model.state_dict(), not the model); {type(error).__name__}") from error
    try:
        if isinstance(state, dict) and isinstance(state.get("models"), dict):
            state = {name.removeprefix("backbone."): value
                     for name, value in state["models"]["trunk"].items()}
        elif isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
            state = state["state_dict"]
        return checked_state(state)
    except (KeyError, AttributeError, ValueError) as error:
        raise ValueError(f"--weights {path}: it holds no state dict "
                         "(names and tensors)") from error


def checked_state(state):
    """Returns the state if it is a state dict, names and tensors; else ValueError."""
    if not isinstance(state, dict) or not all(isinstance(name, str) and torch.is_tensor(value)
                                              for name, value in state.items()):
        raise ValueError("it holds no state dict (names and tensors)")
    return state


def load_weights(backbone, state, source, arch, ignored_heads=()):
    """Loads a state dict into the backbone, leaving out the layers named as ignored.

    state: {name: tensor}. ValueError, naming source and arch, where they do not fit each other.
    """
    heads = tuple(f"{name}." for name in ignored_heads)
    kept = {name: value for name, value in state.items() if not name.startswith(heads)}
    # torchvision's files of densenet have the names of before 2017: norm.1 ...
    if arch.startswith("densenet"):
        kept = {re.sub(r"(denselayer\d+\.(?:norm|relu|conv))\.([12])", r"\1\2", name): value
                for name, value in kept.items()}
    kept = collections.OrderedDict(kept)
    kept._metadata = getattr(state, "_metadata", {})  # layer versions: some layers rename by them
    if not isinstance(kept._metadata, dict) or not all(
            isinstance(layer, dict) and isinstance(layer.get("version"), (int, type(None)))
            for layer in kept._metadata.values()):
        raise ValueError(f"{source} is damaged: its layers' versions are not whole numbers")
    own = backbone.state_dict()
    for name in own.keys() & kept.keys():
        if (kept[name].is_complex() or own[name].is_floating_point()
                and not kept[name].is_floating_point()):
            raise ValueError(f"{source} is not of --arch {arch}: {name} is of "
                             f"{kept[name].dtype}, where {own[name].dtype} is needed")
    try:
        missing, foreign = backbone.load_state_dict(kept, strict=False)
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"{source} is not of --arch {arch}: "
                         f"{str(error).splitlines()[-1].strip()}") from error
    # Files from before 2018 do not count the batches that batch normalisation saw; that is no
    # loss.
    missing = [name for name in missing if not name.endswith("num_batches_tracked")]
    if missing or foreign:
        examples = [f"{len(names)} tensors {what} (as {names[0]})" for names, what in
                    ((missing, "are missing"), (foreign, "are not of this network")) if names]
        raise ValueError(f"{source} is not of --arch {arch}: {', '.join(examples)}")


def first_line(error):
    """The first line of an error's message, or its type's name if it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
