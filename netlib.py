"""The networks: a trunk turns images into features, an embedder features into embeddings.

NETWORKS has a row for each network that torchvision's rule does not cover (network_of); Trunk puts
the normalisation before any of them, Embedder the linear layer behind. Neither knows losses or
options; network_select does. A network of your own is a class beside ConvNet and a row.
"""

import argparse
import functools
import os
import pathlib
import re
import sys
import typing

import torch
import torch.nn.functional as F

IMAGENET_MEAN = (0.485, 0.456, 0.406)  # of ImageNet's training images, RGB in [0, 1]: what
IMAGENET_STD = (0.229, 0.224, 0.225)   # torchvision's pretrained weights expect

AMP_TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "none": None}


def add_arguments(parser):
    """Adds the group 'network' to an argparse parser."""
    group = parser.add_argument_group("network")
    group.add_argument("--arch", default=None, metavar="NAME",
                       help=f"a torchvision classification network by its name (resnet50 in the "
                            "reference runs, mobilenet_v3_small, vit_b_16, ...), or of "
                            f"netlib.NETWORKS ({', '.join(NETWORKS)}). Default that of --dataset")
    group.add_argument("--embed_dim", type=int, default=None, metavar="D",
                       help="numbers in an embedding, at least 1; useful 32 to 2048. Default that "
                            "of --arch, mostly 128")
    group.add_argument("--not_pretrained", action="store_true", default=None,
                       help="start from random weights, not torchvision's IMAGENET1K_V1, which "
                            "are downloaded once. Always so for other networks")
    group.add_argument("--weights", type=os.path.expanduser, default=None, metavar="FILE",
                       help="start the trunk from this state dict: torchvision's "
                            "(resnet50-0676ba61.pth), your own, or a checkpoint of this program; "
                            "its classifier is ignored")
    group.add_argument("--batchnorm", choices=("frozen", "trained"), metavar="HOW",
                       help="frozen keeps the running means and variances of batch normalisation "
                            "(its scales and shifts still learn), as the reference runs do; or "
                            "trained. Default frozen for pretrained trunks, trained for others")
    group.add_argument("--amp", choices=("bf16", "fp16", "none"), metavar="TYPE",
                       help="the trunk's arithmetic: bf16, fp16 (GPU only) or none, float32. "
                            "Default that of --arch, else bf16 on a CPU with units for it "
                            "(amx_bf16), where it is several times faster, and none elsewhere")
    group.add_argument("--channels_last", action=argparse.BooleanOptionalAction, default=None,
                       help="keep images as [B, H, W, 3] in memory, often faster; results differ "
                            "by rounding. Default that of --arch, else yes on a CPU and with "
                            "--amp")
    group.add_argument("--compile", action="store_true",
                       help="compile the trunk with torch.compile: some minutes at the start, "
                            "faster steps after; needs a C++ compiler or, on a GPU, Triton")


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

    def forward(self, images):
        return self.layers(images).mean((2, 3))


def torchvision_network(arch, **options):
    """A torchvision classification network without its last linear layer, with random weights."""
    import torchvision.models as models  # here, so that --help need not wait for it

    network = models.get_model(arch, weights=None, **options)
    linear = [(name, layer) for name, layer in network.named_modules()
              if isinstance(layer, torch.nn.Linear)]
    if not linear or linear[-1][1].out_features != 1000:
        raise ValueError(f"--arch {arch} does not end in a linear classifier, so it cannot be "
                         "turned into an embedding; take another network")
    parent, _, child = linear[-1][0].rpartition(".")
    setattr(network.get_submodule(parent), child, torch.nn.Identity())
    return network


class Network(typing.NamedTuple):
    """A row of NETWORKS: a backbone, images [B, 3, H, W] -> features [B, F], of any size F."""

    make: typing.Callable         # () -> the backbone, with random weights
    mean: tuple = IMAGENET_MEAN   # of the training images' red, green and blue, in [0, 1]: what
    std: tuple = IMAGENET_STD     # the backbone sees is (image - mean) / std
    heads: tuple = ()             # layers in a file of weights that the backbone is without
    defaults: dict = {}           # {option: value}: --image_size, --embed_dim, --amp, ...


def torchvision_row(arch, defaults=None, **options):
    """The row of a torchvision network; options: of its constructor."""
    return Network(functools.partial(torchvision_network, arch, **options),
                   heads=("fc", "classifier", "head", "heads", "aux1", "aux2", "AuxLogits"),
                   defaults={"not_pretrained": False, **(defaults or {})})


# No auxiliary classifiers; transform_input rescales ImageNet's normalisation to the one that the
# weights of these two were trained with. The reference code has it, but calls the layers behind it:
# its GoogLeNet sees contrasts 2.2 times as large.
INCEPTION = {"aux_logits": False, "transform_input": True, "init_weights": True}

NETWORKS = {
    "convnet": Network(ConvNet, defaults={"amp": "none", "channels_last": False}),
    "googlenet": torchvision_row("googlenet", {"embed_dim": 512, "image_size": 227}, **INCEPTION),
    "inception_v3": torchvision_row("inception_v3", **INCEPTION),
}


def network_of(arch):
    """The row of a network, of NETWORKS or torchvision's; ValueError for an unknown name."""
    if arch in NETWORKS:
        return NETWORKS[arch]
    import torchvision.models as models

    names = models.list_models(module=models)
    if arch not in names:
        raise ValueError(f"--arch {arch} is neither of netlib.NETWORKS ({', '.join(NETWORKS)}) nor "
                         f"a torchvision classification network; those are {', '.join(names)}")
    return torchvision_row(arch)


class Trunk(torch.nn.Module):
    """A backbone behind the normalisation of images: [B, 3, H, W] -> features [B, F].

    uint8 images (0 to 255, as the datasets give them) are scaled and normalised here, on the
    device, by mean and std of red, green and blue in [0, 1]; float images are taken as already
    normalised. num_features is F. amp: torch.bfloat16 or torch.float16, the type that the backbone
    computes in, by autocast; features are float32 all the same. channels_last: the memory format
    of images and weights.
    """

    def __init__(self, backbone, num_features, amp=None, channels_last=False, mean=IMAGENET_MEAN,
                 std=IMAGENET_STD):
        super().__init__()
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self.backbone = backbone.to(memory_format=self.memory_format)
        self.num_features = num_features
        self.amp = amp
        mean, std = (torch.tensor(v).view(3, 1, 1) for v in (mean, std))
        self.register_buffer("scale", 1 / (255 * std), persistent=False)
        self.register_buffer("shift", -mean / std, persistent=False)

    def freeze(self, names):
        """Ends the learning of the backbone's layers of these names.

        patch_embed, stem: the first convolution and its batch normalisation, whatever their names
        are. ValueError for a name that the backbone has not.
        """
        layers = dict(self.backbone.named_modules())
        first = [layer for layer in layers.values() if isinstance(
            layer, (torch.nn.Conv2d, torch.nn.Linear, torch.nn.modules.batchnorm._BatchNorm))]
        first = first[:1 + isinstance(first[min(1, len(first) - 1)],
                                      torch.nn.modules.batchnorm._BatchNorm)]
        for name in names:
            if name not in (*layers, "patch_embed", "stem"):
                raise ValueError(f"--freeze {name}: this network has no such layer; it takes "
                                 "trunk, stem, patch_embed, "
                                 + ", ".join(name for name, _ in self.backbone.named_children()))
            for layer in [layers[name]] if name in layers else first:
                layer.requires_grad_(False)

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


def network_select(opt, unit_norm, sections=None):
    """The trunk and embedder that the options ask for -> (Trunk, Embedder), on the CPU.

    Raises ValueError for an unknown or unusable --arch, weights that do not fit or cannot be
    fetched, FileNotFoundError for a --weights file that is not there.
    """
    network = network_of(opt.arch)
    backbone = network.make()
    if opt.weights or not opt.not_pretrained:
        state, source = read_weights(opt.weights) if opt.weights else fetch_weights(opt.arch)
        load_weights(backbone, state, network.heads, source, opt.arch)
    num_features = count_features(backbone, opt.arch, opt.image_size)
    trunk = Trunk(backbone, num_features, AMP_TYPES[opt.amp], opt.channels_last, network.mean,
                  network.std)
    if opt.compile:
        trunk.compile()
    return trunk, Embedder(num_features, opt.embed_dim, unit_norm, sections)


def default_amp(device):
    """The default of --amp: bf16 on a CPU that multiplies bfloat16 matrices in hardware (AMX)."""
    cpuinfo = pathlib.Path("/proc/cpuinfo")  # on Linux
    has_units = cpuinfo.exists() and "amx_bf16" in cpuinfo.read_text()
    return "bf16" if device == "cpu" and has_units else "none"


@torch.inference_mode()
def count_features(backbone, arch, image_size):
    """F of a new backbone's features [1, F] of a black image; ValueError if it cannot take it."""
    backbone.eval()
    try:
        features = backbone(torch.zeros(1, 3, image_size, image_size))
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--arch {arch} cannot take images of --image_size {image_size}: "
                         f"{first_line(error)}") from error
    if features.dim() != 2:
        raise ValueError(f"--arch {arch} turns an image into {list(features.shape)} where features "
                         "[1, F] are needed")
    backbone.train()
    return features.shape[1]


def read_weights(path):
    """A state dict from a --weights file -> ({name: tensor}, what messages call the file).

    Read without running code from it (weights_only=True). Also the trunk's part of a checkpoint of
    this program, and {"state_dict": ...}.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        if "models" in state:
            state = {name.removeprefix("backbone."): value
                     for name, value in state["models"]["trunk"].items()}
        return state.get("state_dict", state), f"--weights {path}"
    except FileNotFoundError:
        raise FileNotFoundError(f"--weights {path}: there is no such file") from None
    except Exception as error:  # of a dozen types for damaged or foreign files
        raise ValueError(f"--weights {path} is not a state dict that torch can read safely: it is "
                         "damaged, no torch file, or holds more than names and tensors (save "
                         f"model.state_dict(), not the model); {type(error).__name__}") from error


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
        return weights.get_state_dict(progress=sys.stderr.isatty(), check_hash=True,
                                      weights_only=True), weights.url
    except Exception as error:  # network, disk, hash, damaged file in the cache: all end here
        raise ValueError(
            f"the pretrained weights of --arch {arch} could not be had from {weights.url} "
            f"({first_line(error)}). Without a network: put that file into {torch.hub.get_dir()}"
            "/checkpoints (and remove a damaged one there), or name a copy with --weights FILE, "
            "or start from random weights with --not_pretrained") from error


def load_weights(backbone, state, heads, source, arch):
    """Loads a state dict into the backbone, without the layers of heads that it has not.

    state: {name: tensor}, edited in place, since its layers' versions, by which some layers rename,
    travel with it. ValueError, naming source and arch, where they do not fit each other.
    """
    try:
        own = backbone.state_dict()
        for name in list(state):
            value = state.pop(name)
            name = name.removeprefix("module.").removeprefix("_orig_mod.")  # of wrapped networks
            if name in own or not name.startswith(tuple(f"{head}." for head in heads)):
                # torchvision's files of densenet have the names of before 2017: norm.1 ...
                state[re.sub(r"(denselayer\d+\.(?:norm|relu|conv))\.", r"\1", name)] = value
        missing, foreign = backbone.load_state_dict(state, strict=False)
    except Exception as error:  # as many kinds as there are things other than a state dict
        raise ValueError(f"{source} is not of --arch {arch}: "
                         + str(error).split("\n")[-1].strip()) from error
    if missing or foreign:
        raise ValueError(f"{source} is not of --arch {arch}: {len(missing)} tensors are missing and "
                         f"{len(foreign)} are not of this network (as "
                         f"{', '.join([*missing[:1], *foreign[:1]])})")


def first_line(error):
    """The first line of an error's message, or its type's name if it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
