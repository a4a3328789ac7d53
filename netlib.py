"""The networks: a trunk that turns images into features, an embedder that turns features into embeddings.

Trunk wraps any torchvision classification network, or the small ConvNet, without its last layer;
Embedder is the linear layer in its place. Neither knows losses or options; network_select does. A
network of your own is a class beside ConvNet and a line in network_select.
"""

import urllib.error

import torch
import torch.nn.functional as F

IMAGENET_MEAN = (0.485, 0.456, 0.406)  # of ImageNet's training images, RGB in [0, 1]: what
IMAGENET_STD = (0.229, 0.224, 0.225)   # torchvision's pretrained weights expect


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
    group.add_argument("--weights", default=None, metavar="FILE",
                       help="start the trunk from this local state dict instead of a download, "
                            "e.g. torchvision's resnet50-0676ba61.pth; its classifier is ignored")
    group.add_argument("--batchnorm", choices=("frozen", "trained"), default=None,
                       help="frozen keeps the running means and variances of batch normalisation "
                            "(its scales and shifts still learn), as the reference runs do. "
                            "Default frozen for pretrained trunks and trained for random ones, "
                            "which have no statistics to keep")


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

    uint8 images (0 to 255, as the datasets give them) are scaled and normalised here, on the device;
    float images are taken as already normalised. num_features is F.
    """

    def __init__(self, backbone, num_features):
        super().__init__()
        self.backbone = backbone
        self.num_features = num_features
        mean, std = (torch.tensor(v).view(3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
        self.register_buffer("scale", 1 / (255 * std), persistent=False)
        self.register_buffer("shift", -mean / std, persistent=False)

    def forward(self, images):
        if images.dtype == torch.uint8:
            images = images * self.scale + self.shift                            # [B, 3, H, W]
        return self.backbone(images)


class Embedder(torch.nn.Module):
    """The embedding layer: features [B, F] -> embeddings [B, D], of length one if unit_norm."""

    def __init__(self, num_features, embed_dim, unit_norm=True):
        super().__init__()
        if embed_dim < 1:
            raise ValueError(f"--embed_dim {embed_dim}: an embedding has at least one number")
        self.linear = torch.nn.Linear(num_features, embed_dim)
        self.unit_norm = unit_norm

    def forward(self, features):
        embeddings = self.linear(features)
        return F.normalize(embeddings, dim=1) if self.unit_norm else embeddings


def network_select(opt, unit_norm):
    """The trunk and embedder that the options ask for -> (Trunk, Embedder), on the CPU.

    Raises ValueError for an unknown or unusable --arch, weights that do not fit or cannot be
    fetched, FileNotFoundError for a --weights file that is not there.
    """
    if opt.arch == "convnet":
        backbone = ConvNet()
        num_features, heads = backbone.num_features, ()
    else:
        backbone = torchvision_network(opt.arch, pretrained=not (opt.not_pretrained or opt.weights))
        num_features, last_layer = remove_last_layer(backbone, opt.arch)
        heads = (last_layer, "aux1", "aux2", "AuxLogits")
    if opt.weights:
        load_weights(backbone, opt.weights, opt.arch, heads)
    trunk = Trunk(backbone, num_features)
    return trunk, Embedder(num_features, opt.embed_dim, unit_norm)


def torchvision_network(arch, pretrained):
    """A torchvision classification network by name, with ImageNet weights if pretrained."""
    import torchvision.models as models  # here, so that --help need not wait for it

    names = models.list_models(module=models)
    if arch not in names:
        raise ValueError(f"--arch {arch} is neither convnet nor a torchvision classification network; "
                         f"those are {', '.join(names)}")
    weights, options = None, {}
    if pretrained:
        choices = models.get_model_weights(arch).__members__
        if "IMAGENET1K_V1" not in choices:
            raise ValueError(f"torchvision has no IMAGENET1K_V1 weights for --arch {arch}; give a "
                             "file with --weights or start with --not_pretrained")
        weights = choices["IMAGENET1K_V1"]
    if arch in ("googlenet", "inception_v3"):
        # These two rescale ImageNet's normalisation to the one that their weights were trained with,
        # and have auxiliary classifiers, which torchvision only builds where no weights are given.
        options = {"transform_input": True}
        if not pretrained:
            options |= {"aux_logits": False, "init_weights": True}
    try:
        network = models.get_model(arch, weights=weights, **options)
    except (urllib.error.URLError, OSError, RuntimeError) as error:
        if not pretrained:
            raise
        raise ValueError(
            f"the pretrained weights of --arch {arch} could not be fetched from {weights.url} "
            f"({error}). Without a network: put that file into {torch.hub.get_dir()}/checkpoints, or "
            "name a copy with --weights FILE, or start from random weights with --not_pretrained"
        ) from error
    if arch in ("googlenet", "inception_v3"):
        network.aux_logits = False
        network.aux1 = network.aux2 = network.AuxLogits = None
    return network


def remove_last_layer(network, arch):
    """Replaces the last linear layer by the identity, in place; returns (its input size, its name)."""
    linear = [(name, layer) for name, layer in network.named_modules()
              if isinstance(layer, torch.nn.Linear)]
    if not linear or linear[-1][1].out_features != 1000:
        raise ValueError(f"--arch {arch} does not end in a linear classifier, so it cannot be turned "
                         "into an embedding; take another network")
    name, layer = linear[-1]
    parent, _, child = name.rpartition(".")
    setattr(network.get_submodule(parent), child, torch.nn.Identity())
    return layer.in_features, name


def load_weights(backbone, path, arch, ignored_heads=()):
    """Loads a state dict from a file into the backbone, leaving out the layers named as ignored.

    Only tensors are read (weights_only=True): a file cannot run code. Raises ValueError where the
    file is damaged or of another network, FileNotFoundError where it is not there.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise FileNotFoundError(f"--weights {path}: there is no such file") from None
    except Exception as error:  # torch.load raises a dozen types for damaged or foreign files
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(f"--weights {path} is not a state dict that torch can read safely: "
                         f"{reason}") from error
    if not isinstance(state, dict) or not all(torch.is_tensor(v) for v in state.values()):
        raise ValueError(f"--weights {path} holds no state dict (names and tensors)")
    heads = tuple(f"{name}." for name in ignored_heads)
    state = {name: value for name, value in state.items() if not name.startswith(heads)}
    expected = backbone.state_dict()
    # Files from before 2018 do not count the batches that batch normalisation saw; torch fills it in.
    missing = [name for name in expected
               if name not in state and not name.endswith("num_batches_tracked")]
    foreign = [name for name in state if name not in expected]
    reshaped = [name for name in expected
                if name in state and state[name].shape != expected[name].shape]
    if missing or foreign or reshaped:
        examples = [f"{len(names)} tensors {what} (as {names[0]})" for names, what in
                    ((missing, "are missing"), (foreign, "are not of this network"),
                     (reshaped, "have another shape")) if names]
        raise ValueError(f"--weights {path} is not of --arch {arch}: {', '.join(examples)}")
    backbone.load_state_dict(state, strict=False)
