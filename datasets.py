"""The datasets: where their images lie, which classes train and which test, and how one is read.

Each reader turns a folder into splits (images, labels, class names) and is one line of READERS;
ImageDataset turns a split into (image, label) items, CachedDataset one whose images were decoded
before. Run as a program it checks a dataset, and with --download fetches it: python datasets.py
--dataset cub200 --source_path ./Datasets. A new dataset is a reader, its line in READERS and,
where there are any, its published counts and where it is had from (ARCHIVES or ON_REQUEST). How
batches are composed: samplers.py.
"""

import collections
import concurrent.futures
import contextlib
import glob
import hashlib
import http.client
import io
import itertools
import json
import math
import os
import platform
import re
import shutil
import signal
import stat
import struct
import sys
import tarfile
import tempfile
import threading
import time
import traceback
import urllib.request
import warnings
import zipfile
import zlib
from typing import NamedTuple

if __name__ == "__main__":  # Ctrl-C while torch is being loaded, which bears no exception
    signal.signal(signal.SIGINT, lambda *_: os._exit(
        print("datasets.py: stopped by SIGINT", file=sys.stderr) or 130))

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

import auxiliaries

# What a file with such a suffix may hold; the suffix may be another's, as in ImageNet. PIL would
# also run programs for files of other formats. The suffixes are torchvision's, .jfif and .gif.
IMAGE_FORMATS = ("JPEG", "PNG", "BMP", "GIF", "TIFF", "WEBP", "PPM")
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".jfif", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp",
                  ".ppm", ".pgm"}

# (classes, images) of each split as published with the datasets or their retrieval protocols.
PUBLISHED = {
    "cub200": {"train": (100, 5864), "test": (100, 5924)},
    "cars196": {"train": (98, 8054), "test": (98, 8131)},
    "online_products": {"train": (11318, 59551), "test": (11316, 60502)},
    "in-shop": {"train": (3997, 25882), "query": (3985, 14218), "gallery": (3985, 12612)},
    "vehicle_id": {"train": (13134, 110178), "test_800": (800, None), "test_1600": (1600, None),
                   "test_2400": (2400, None)},
    "tiny_imagenet": {"train": (200, 100000), "test": (200, 10000)},
}

LAYOUTS = {
    "cub200": "cub200/images/<class>/*.jpg, or the release as it unzips: CUB_200_2011/images.txt, "
              "image_class_labels.txt and images/<class>/*.jpg",
    "cars196": "cars196/images/<class>/*.jpg, cars196/<class>/*.jpg, cars196/train/<class>/*.jpg "
               "with test/<class>/*.jpg, cars196/cars_annos.mat with car_ims/*.jpg, or (also in "
               "stanford_cars/) cars_train/*.jpg, cars_test/*.jpg and devkit/ with cars_meta.mat, "
               "cars_train_annos.mat and cars_test_annos_withlabels.mat",
    "online_products": "online_products/images/<type>_final/*.JPG with online_products/Info_Files/"
                       "Ebay_train.txt and Ebay_test.txt, or the release as it unzips: "
                       "Stanford_Online_Products/Ebay_train.txt, Ebay_test.txt, "
                       "<type>_final/*.JPG",
    "in-shop": "in-shop/Eval/list_eval_partition.txt with in-shop/img/..., in-shop/Img/img/... or "
               "in-shop/Img/img_highres/...",
    "vehicle_id": "vehicle_id/image/*.jpg with vehicle_id/train_test_split/train_list.txt and "
                  "test_list_800.txt, test_list_1600.txt, test_list_2400.txt",
    "tiny_imagenet": "tiny_imagenet/train/<class>/images/*.JPEG with tiny_imagenet/val/"
                     "val_annotations.txt and val/images/*.JPEG, or the release's "
                     "tiny-imagenet-200/",
    "folder": "<class>/*.jpg (the first half of the sorted classes trains, the second tests), or "
              "train/<class>/*.jpg and test/<class>/*.jpg (or val/), directly below --source_path",
}


class Split(NamedTuple):
    """One part of a dataset: N images, the class of each, and the name of each class.

    images: list of N paths, or uint8 array [N, H, W] of grey or [N, H, W, 3] of RGB images;
    labels: list of N ints that index class_names.
    """

    images: object
    labels: list
    class_names: list


class Found(NamedTuple):
    """What a reader found: where, in words; the splits by name; remarks on what is odd."""

    layout: str
    splits: dict
    odd: list


class EvaluationSet(NamedTuple):
    """What is scored together: queries against a gallery, or against themselves (gallery None)."""

    name: str
    queries: torch.utils.data.Dataset
    gallery: object = None


def add_arguments(parser):
    """Adds the group 'data' to an argparse parser."""
    group = parser.add_argument_group("data", "which images are learned from and tested on")
    group.add_argument("--dataset", choices=READERS, default="cub200",
                       help="glyphs needs no files: it is drawn from a font. folder takes any "
                            "folder of class folders. The others are the field's datasets, in the "
                            "layout of the reference or of their release. Default %(default)s, as "
                            "in the reference code")
    group.add_argument("--source_path", type=os.path.expanduser, default="./Datasets",
                       metavar="DIR",
                       help="the folder that holds the dataset's folder (or that folder itself). "
                            "python datasets.py checks it. Default %(default)s")
    group.add_argument("--image_size", type=int, default=None, metavar="PX",
                       help="height and width of the network's input in pixels. Training crops it "
                            "at random (RandomResizedCrop, and a flip); testing resizes the "
                            "shorter side to 8/7 of it (256 for 224 and 227) and takes the "
                            "centre. Default 224, googlenet 227 (reference runs); glyphs 32")
    group.add_argument("--val_split", type=float, default=0.0, metavar="SHARE",
                       help="hold out this share of the training classes, always the same ones, "
                            "measure on them too and choose the best epoch there; the run then "
                            "reports the last epoch, that choice, and the literature's, on the "
                            "test classes. Useful 0.1 to 0.5. Default %(default)s: the best epoch "
                            "on the test classes, as in the literature")
    group.add_argument("--kernels", type=int, default=None, metavar="N",
                       help="processes that load images; 0 loads in the main process. Never "
                            "changes the numbers. Default 8 (reference runs) or the number of "
                            "cores, shared by the processes of torchrun, if that is less; glyphs "
                            "and --cache device 0")
    group.add_argument("--cache", choices=("none", "ram", "disk", "device"), default="none",
                       help="decode each image once, reduced to the shorter side that testing "
                            "takes it to, and keep it in main memory, in a file or on the --gpu; "
                            "crops are cut and resized on the device. Test pictures stay the "
                            "same; training crops are cut from the reduced image, so numbers "
                            "differ a little. 256 x 341 pixels are 256 KiB. Default %(default)s: "
                            "read files in each epoch")
    group.add_argument("--cache_path", type=os.path.expanduser, default="./Image_Cache",
                       metavar="DIR",
                       help="where --cache disk keeps its files; a later run uses them again. "
                            "Default %(default)s")


class ImageDataset(torch.utils.data.Dataset):
    """Items (image, label) of a split: image uint8 [3, H, W] in RGB, label an int.

    dataset[i] is a pure function of i and the transform. A random transform is given by seed: its
    draws then depend on (seed, epoch, i) alone, so they are the same for any number of loading
    processes, and each repeat of an image within one batch gets draws of its own. With views = 2
    items are (first view, second view, label), each view drawn by itself. read makes of a path
    what the transform takes: read_image or, for a transform of tensors, the faster
    read_pixels. Normalisation is the network's business (netlib.Trunk), so images travel as bytes.
    share (n, of): a batch gives the n-th of so many equal parts, for training in several
    processes. An image that cannot be read raises ValueError with its path.
    """

    def __init__(self, split, transform, seed=None, views=1, share=(0, 1), read=None):
        self.images, self.labels, self.class_names = split
        self.share = share
        self.transform = transform
        self.seed = seed
        self.views = views
        self.read = read or read_image
        self.epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # seen by the workers too

    def set_epoch(self, epoch):
        """Random transforms draw anew in each epoch (any non-negative int)."""
        self.epoch.fill_(epoch)

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, i):
        return self.item(i, repeat=0)

    def __getitems__(self, indices):
        """A batch's items, this process's share of them; torch's DataLoader calls this one."""
        repeats, drawn = collections.Counter(), []
        for i in indices:
            drawn.append((i, repeats[i]))
            repeats[i] += 1
        number, processes = self.share
        length = len(drawn) // processes
        return [self.item(i, repeat) for i, repeat in drawn[number * length:][:length]]

    def item(self, i, repeat):
        """Item i, drawn for the repeat-th time in one batch -> (image, label)."""
        image = self.read(self.images[i]) if isinstance(self.images, list) else self.load(i)
        with self.draws(i, repeat):
            return *(self.transform(image) for _ in range(self.views)), self.labels[i]

    @contextlib.contextmanager
    def draws(self, i, repeat):
        """Inside, torch draws what belongs to item i; afterwards it goes on as if nothing was."""
        if self.seed is None:
            yield
            return
        sequence = np.random.SeedSequence([self.seed, int(self.epoch), i, repeat])
        state = torch.get_rng_state()
        torch.default_generator.manual_seed(int(sequence.generate_state(1, np.uint64)[0]))
        try:
            yield
        finally:
            torch.set_rng_state(state)

    def load(self, i):
        """The untransformed image i -> PIL image in RGB."""
        if isinstance(self.images, np.ndarray):
            return Image.fromarray(self.images[i]).convert("RGB")
        return read_image(self.images[i])


@contextlib.contextmanager
def open_image(path):
    """An image file with its header read; what PIL or the file does wrong inside is ValueError.

    It names the path. A slip in the lines of this file keeps its own error.
    """
    try:
        with checked_open(path) as image:
            yield image
    except FileNotFoundError:
        raise FileNotFoundError(f"{auxiliaries.printable(path)}: the image is not there") from None
    except Exception as error:  # PIL's decoders raise OSError, SyntaxError, struct.error, others
        if (traceback.extract_tb(error.__traceback__)[-1].filename == __file__
                and not isinstance(error, OSError) and not auxiliaries.raised_on_purpose(error)):
            raise
        raise ValueError(auxiliaries.printable(f"{path}: not an image, or a broken one ({error})")
                         ) from None


OPENING = threading.Lock()  # Python records warnings for all threads at once


def checked_open(path):
    """PIL's Image.open; what it only warns of is an error where it concerns a TIFF's pixels.

    PIL refuses images of more than 179 megapixels, and warns of those of more than 89.
    """
    with OPENING, warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        image = Image.open(path, formats=IMAGE_FORMATS)
    for warning in said:
        # Tags of a TIFF say how its pixels are stored; those of other formats are metadata.
        if image.format == "TIFF" and str(warning.message).startswith(("Tag data larger",
                                                                       "Truncated File")):
            image.close()
            raise ValueError(str(warning.message))
    return image


def read_image(path):
    """An image file -> PIL image in RGB; ValueError with the path if it is broken or no image.

    Grey values that do not fit a byte are divided by what is white: 1 or 255 for floats, else the
    least of 255, 1023, 4095, 16383 and 65535 (8 to 16 bits) that no value of the file exceeds;
    for larger values the largest. Of colours with 16 bits PIL takes the upper eight.
    """
    with open_image(path) as image:
        if image.mode.startswith("I") or image.mode == "F":
            values = np.array(image, dtype=np.float32)
            least, most = float(values.min()), float(values.max())
            if not 0 <= least <= most < math.inf:
                raise ValueError(f"its values run from {least:g} to {most:g}; 0 should be black")
            whites = [1] * (image.mode == "F") + [2 ** bits - 1 for bits in (8, 10, 12, 14, 16)]
            values *= 255 / next((white for white in whites if most <= white), most)
            image = Image.fromarray(np.rint(values, out=values).astype(np.uint8))
        return image.convert("RGB")


def read_pixels(path):
    """An image file as read_image reads it -> uint8 [3, H, W]; grey and RGB JPEGs by torchvision.

    Its decoder gives the pixels of PIL's in two thirds of the time. What it refuses is left to
    PIL, and so is everything once torchvision drops it, as version 0.29 announces.
    """
    try:
        from torchvision.io import ImageReadMode, decode_jpeg
    except ImportError:
        decode_jpeg = None
    with open_image(path) as image:
        if image.format == "JPEG" and image.mode in ("L", "RGB") and decode_jpeg:
            image.fp.seek(0)
            data = torch.frombuffer(bytearray(image.fp.read()), dtype=torch.uint8)
            with contextlib.suppress(RuntimeError):
                return decode_jpeg(data, mode=ImageReadMode.RGB)
    return torch.from_numpy(np.array(read_image(path))).permute(2, 0, 1)


def problems_of(splits):
    """What makes a dataset unusable, as a list of sentences; splits: {name: Split}."""
    problems = []
    for name, split in splits.items():
        classes = len(set(split.labels))
        if classes < 2:
            problems.append(f"the {name} split has {classes} class{'es' * (classes != 1)}; it "
                            "needs two or more")
        elif name == "query":
            if not set(split.labels) & set(splits["gallery"].labels):
                problems.append("no class of the query split is in the gallery")
        elif (name.startswith(("test", "val"))
              and max(collections.Counter(split.labels).values()) < 2):
            problems.append(f"no class of the {name} split has two images, so there is nothing to "
                            "retrieve")
    return problems


def queries_without_match(queries, gallery=None):
    """How many queries have no true match to find; queries, gallery: ImageDataset."""
    sizes = collections.Counter((gallery or queries).labels)
    return sum(sizes[label] < (2 if gallery is None else 1) for label in queries.labels)


def fingerprint(splits):
    """A digest of the splits' images and classes, wherever they lie; {name: Split} -> str."""
    digest = hashlib.sha256()
    for name, split in sorted(splits.items()):
        images = (["/".join(path.split(os.sep)[-2:]) for path in split.images]
                  if isinstance(split.images, list) else [split.images.tobytes()])
        digest.update(repr((name, images, split.labels, split.class_names)).encode(
            errors="surrogateescape"))
    return digest.hexdigest()


def dataset_select(opt, views=1, share=(0, 1), device="cpu"):
    """The training set, with so many views of an image, and the evaluation sets of the options.

    share: of each training batch, as in ImageDataset. device: where --cache device keeps images.
    Returns (ImageDataset, [EvaluationSet, ...], Found). Raises FileNotFoundError or ValueError
    where the data is missing, damaged or too small, and where there is no room for the cache.
    """
    found = READERS[opt.dataset](opt.source_path)
    val_split = getattr(opt, "val_split", 0)
    if val_split:
        found.splits.update(hold_out(found.splits["train"], val_split))
    for problem in problems_of(found.splits):
        raise ValueError(f"--dataset {opt.dataset}: {problem} ({found.layout})")
    cache = getattr(opt, "cache", "none")
    if cache == "none":
        train_transform, test_transform = transforms(opt.dataset, opt.image_size, views)
        train = ImageDataset(found.splits["train"], train_transform, opt.seed, views, share,
                             read_pixels)
        tests = {name: ImageDataset(split, test_transform)
                 for name, split in found.splits.items() if name != "train"}
    else:
        wanted = (cache, found.splits, shorter_side(opt.image_size), device,
                  os.path.join(opt.cache_path, opt.dataset))
        if cache == "disk" and share[1] > 1:  # the first process decodes for all
            auxiliaries.from_first(lambda: len(cache_splits(*wanted)))
        stored = cache_splits(*wanted)
        tests = {name: CachedDataset(split, stored[name], opt.image_size,
                                     *((opt.seed, cache == "device", share) if name == "train" else
                                       (None, cache == "device")))
                 for name, split in found.splits.items()}
        train = tests.pop("train")
    held_out = [EvaluationSet("val", tests.pop("val"))] if val_split else []
    if opt.dataset == "in-shop":
        return train, [EvaluationSet("", tests["query"], tests["gallery"]), *held_out], found
    names = [""] if len(tests) == 1 else [f"set {i + 1}" for i in range(len(tests))]
    sets = [EvaluationSet(name, test) for name, test in zip(names, tests.values())]
    return train, sets + held_out, found


def hold_out(split, share):
    """A Split cut by classes -> {"train": Split, "val": Split}, val with a share of the classes.

    The same classes whatever the seed of the run. ValueError where either has fewer than two.
    """
    number = len(split.class_names)
    held = np.random.default_rng(0).permutation(number)[:round(share * number)]
    if not 2 <= len(held) <= number - 2:
        raise ValueError(f"--val_split {share} of {number} training classes leaves {len(held)} to "
                         f"choose on and {number - len(held)} to train on; both need two or more")
    parts = {}
    for name, classes in (("train", np.setdiff1d(np.arange(number), held)), ("val", held)):
        rank = {label: i for i, label in enumerate(sorted(classes.tolist()))}
        chosen = [i for i, label in enumerate(split.labels) if label in rank]
        images = (split.images[chosen] if isinstance(split.images, np.ndarray) else
                  [split.images[i] for i in chosen])
        parts[name] = Split(images, [rank[split.labels[i]] for i in chosen],
                            [split.class_names[label] for label in rank])
    return parts


def transforms(dataset, image_size, views=1):
    """(training transform, test transform) from a PIL image to uint8 [3, image_size, image_size].

    The training transform of photographs takes uint8 [3, H, W] too; there torch resizes, faster
    than PIL and like it but for rounding: of a hundred values one or two are a level off, of ten
    million one is two levels off. Glyphs are drawn at random places and sizes already, and a
    mirrored b is a d: no crop, no flip. Where two views of one glyph are wanted they are turned,
    moved, scaled and sheared a little more.
    """
    from torchvision import transforms as T  # here, so that --help need not wait for it
    from torchvision.transforms import v2

    if dataset == "glyphs":
        fit = T.Compose([T.Resize((image_size, image_size)), T.PILToTensor()])
        moved = T.RandomAffine(15, translate=(0.1, 0.1), scale=(0.8, 1.2), shear=15,
                               interpolation=T.InterpolationMode.BILINEAR)
        return (fit if views == 1 else T.Compose([moved, fit])), fit
    return (v2.Compose([v2.RandomResizedCrop(image_size), v2.RandomHorizontalFlip(),
                        v2.PILToTensor()]),
            T.Compose([central_band, T.Resize(shorter_side(image_size)), T.CenterCrop(image_size),
                       T.PILToTensor()]))


def shorter_side(image_size):
    """The shorter side, in pixels, that test images have before their centre is cut out."""
    return 256 if image_size in (224, 227) else round(image_size * 8 / 7)


def central_band(image, ratio=8):
    """A PIL image cut to its middle where one side is over `ratio` times the other.

    The centre crop looks at no more than that, and resizing the whole would take gigabytes.
    """
    width, height = image.size
    new_width, new_height = band_size(width, height, ratio)
    if (new_width, new_height) == (width, height):
        return image
    left, top = (width - new_width) // 2, (height - new_height) // 2
    return image.crop((left, top, left + new_width, top + new_height))


def band_size(width, height, ratio=8):
    """What central_band leaves of an image of this size -> (width, height)."""
    short = min(width, height)
    return min(width, ratio * short), min(height, ratio * short)


# ---- the cache: images decoded once


class Stored(NamedTuple):
    """The images of a split, reduced to one shorter side, in RGB.

    pixels: uint8 [P, 3], image after image and row by row, a tensor or np.memmap; sizes: int64
    [N, 2], height and width of each image, an array; starts: int64 [N], where each begins.
    """

    pixels: object
    sizes: np.ndarray
    starts: np.ndarray


class CachedDataset(ImageDataset):
    """Items of a split whose images are Stored: where to cut, and the label; collate cuts.

    dataset[i] is (place, label), place the seven integers of Crops. With a seed the box and the
    flip are those that RandomResizedCrop and RandomHorizontalFlip draw for (seed, epoch, i), in
    the stored image instead of the one in the file, so the training pictures differ a little from
    those without a cache; without a seed it is the centre, and the picture exactly the same.
    Batches need collate, which every DataLoader takes as collate_fn. on_device: the pixels lie
    where the batches go, which then carry none.
    """

    def __init__(self, split, stored, image_size, seed=None, on_device=False, share=(0, 1)):
        super().__init__(split, None, seed, share=share)
        self.stored = stored
        self.image_size = image_size
        self.on_device = on_device

    def item(self, i, repeat):
        height, width = self.stored.sizes[i].tolist()
        if self.seed is None:
            side = self.image_size
            box, flip = (round((height - side) / 2), round((width - side) / 2), side, side), 0
        else:
            with self.draws(i, repeat):
                box, flip = draw_crop(height, width)
        return (int(self.stored.starts[i]), width, *box, flip), self.labels[i]

    def collate(self, items):
        """Items -> (Crops, labels int64 [B])."""
        places, labels = (torch.tensor(part) for part in zip(*items))
        if not self.on_device:
            return Crops(*cut_out(self.stored.pixels, places), self.image_size), labels
        if torch.utils.data.get_worker_info():
            raise ValueError("--cache device loads without processes: --kernels 0")
        return Crops(self.stored.pixels, places, self.image_size), labels

    def load(self, i):
        """The stored image i -> PIL image in RGB."""
        pixels, sizes, starts = self.stored
        pixels = pixels[int(starts[i]):int(starts[i] + sizes[i].prod())]
        pixels = pixels.cpu().numpy() if torch.is_tensor(pixels) else pixels
        return Image.fromarray(pixels.reshape(*sizes[i], 3))

    def __getstate__(self):
        """For a process that is started afresh; a file is opened there again, not sent."""
        pixels = self.stored.pixels
        if isinstance(pixels, np.memmap):
            return self.__dict__ | {"stored": self.stored._replace(pixels=pixels.filename)}
        return self.__dict__

    def __setstate__(self, state):
        self.__dict__.update(state)
        if not torch.is_tensor(self.stored.pixels):
            self.stored = self.stored._replace(pixels=map_pixels(self.stored.pixels))


def draw_crop(height, width):
    """torchvision's RandomResizedCrop and RandomHorizontalFlip for an image of this size.

    Draws what they draw -> ((top, left, height, width), flip), flip 1 for a mirrored crop.
    """
    from torchvision import transforms as T

    image = torch.empty(1).expand(1, height, width)  # its size is all that is looked at
    box = T.RandomResizedCrop.get_params(image, (0.08, 1.0), (3 / 4, 4 / 3))  # its defaults
    return box, int(torch.rand(1) < 0.5)


def cut_out(pixels, places):
    """The boxes alone, one after another: pixels [P, 3], places [B, 7] -> the same of the copy.

    pixels: a tensor or an array; the copy is a tensor, in shared memory in a loading process.
    """
    areas = places[:, 4] * places[:, 5]
    boxes = torch.empty(int(areas.sum()), 3, dtype=torch.uint8)
    if torch.utils.data.get_worker_info():
        boxes.share_memory_()
    source, target = np.asarray(pixels), boxes.numpy()
    places = places.clone()
    starts = areas.cumsum(0) - areas
    for start, (first, stride, top, left, height, width, _) in zip(starts.tolist(),
                                                                   places.tolist()):
        rows = source[first + top * stride:first + (top + height) * stride]
        target[start:start + height * width].reshape(height, width, 3)[:] = (
            rows.reshape(height, stride, 3)[:, left:left + width])
    places[:, 0], places[:, 1], places[:, 2:4] = starts, places[:, 5], 0
    return boxes, places


class Crops:
    """A batch of pictures that are cut out and resized where they are wanted, by to.

    pixels: uint8 [P, 3], images row by row; places: int64 [B, 7], for each picture where its image
    begins in pixels, the image's width, the box's top, left, height and width, and 1 to mirror it;
    size: height and width of the pictures.
    """

    def __init__(self, pixels, places, size):
        self.pixels = pixels
        self.places = places
        self.size = size

    def __len__(self):
        return len(self.places)

    def pin_memory(self):
        """A copy from which a GPU reads by itself; pixels that are there already stay."""
        pixels = self.pixels.pin_memory() if self.pixels.device.type == "cpu" else self.pixels
        return Crops(pixels, self.places.pin_memory(), self.size)

    def to(self, device, dtype=None, non_blocking=False):
        """The pictures on the device -> uint8 [B, 3, size, size], or of the dtype."""
        pixels = self.pixels.to(device, non_blocking=non_blocking)
        return crop_batch(pixels, self.places, self.size).to(dtype or torch.uint8)


# Bytes of float32 that crop_batch pads to at a time, by the device's type: a GPU likes few large
# blocks, a CPU those that stay in its cache.
CROP_BYTES = {"cuda": 2 ** 28, "cpu": 2 ** 22}


@torch.no_grad()
def crop_batch(pixels, places, size):
    """Cuts a box out of each image and resizes it -> uint8 [B, 3, size, size] on pixels' device.

    pixels [P, 3] and places [B, 7] as in Crops, places on the CPU. Resizes as PIL's BILINEAR does,
    with a triangle that widens where the picture shrinks; PIL rounds between columns and rows as
    well, so values differ from its by one level at most. Boxes of size x size come out as they
    are. Those of like area are padded to the largest, as many at a time as CROP_BYTES holds.
    """
    images = torch.empty(len(places), 3, size, size, dtype=torch.uint8, device=pixels.device)
    limit = CROP_BYTES.get(pixels.device.type, CROP_BYTES["cuda"])
    order = (places[:, 4] * places[:, 5]).argsort(stable=True)
    count = max(1, limit // (12 * int(places[:, 4].max()) * int(places[:, 5].max())))
    with torch.autocast(pixels.device.type, enabled=False):
        for chosen in order.split(count):
            images[chosen.to(images.device, non_blocking=True)] = crop_padded(
                pixels, places[chosen], size)
    return images


def crop_padded(pixels, places, size):
    """crop_batch, all boxes at once -> uint8 [B, 3, size, size]."""
    highest, widest = places[:, 4:6].amax(0).tolist()
    as_they_are = bool((places[:, 4:] == torch.tensor([size, size, 0])).all())
    places = places.to(pixels.device, non_blocking=True)
    starts, strides, tops, lefts, heights, widths, flips = places.T.unsqueeze(2)    # [B, 1] each
    along = torch.arange(max(highest, widest), device=pixels.device)
    rows = starts + (tops + torch.minimum(along[:highest], heights - 1)) * strides  # [B, H]
    columns = lefts + torch.minimum(along[:widest], widths - 1)                     # [B, W]
    indices = (rows.unsqueeze(2) + columns.unsqueeze(1)).flatten()                  # [B x H x W]
    boxes = pixels.index_select(0, indices).view(len(places), highest, widest, 3)
    if as_they_are:
        return boxes.permute(0, 3, 1, 2)
    boxes = boxes.transpose(2, 3).contiguous().float().view(len(places), -1, widest)
    across = resize_weights(widths, widest, size)                                   # [B, S, W]
    across = torch.where(flips.unsqueeze(2) > 0, across.flip(1), across)
    boxes = torch.bmm(boxes, across.mT).view(len(places), highest, -1)              # [B, H, 3S]
    boxes = torch.bmm(resize_weights(heights, highest, size), boxes)                # [B, S, 3S]
    # Weights are not negative and sum to 1, so no value leaves 0 to 255.
    return boxes.add_(0.5).to(torch.uint8).view(-1, size, 3, size).transpose(1, 2)


def resize_weights(lengths, longest, size):
    """What source pixels weigh in each target pixel -> float32 [B, size, longest], sums are 1.

    lengths: int64 [B, 1], how many of the longest source pixels there are.
    """
    scale = (lengths / size).unsqueeze(2)                                           # [B, 1, 1]
    places = torch.arange(max(size, longest), device=lengths.device) + 0.5
    distances = places[:longest] - places[:size].unsqueeze(1) * scale               # [B, S, L]
    weights = (1 - distances.abs_().div_(scale.clamp(min=1))).clamp_(min=0)
    weights *= (places[:longest] < lengths).unsqueeze(1)
    return weights.div_(weights.sum(2, keepdim=True))


def cache_splits(kind, splits, side, device="cpu", path=None):
    """{name: Split} -> {name: Stored}, of images reduced to a shorter side; kind as --cache.

    path: of --cache disk, what its files' names begin with. Prints what is needed and what is
    there; ValueError where that is not enough, OSError where files cannot be written.
    """
    digests, stored = {}, {}
    if kind == "disk":
        make_folder(os.path.dirname(path))
        digests = {name: digest_of(split.images, side) for name, split in splits.items()}
        stored = {name: read_stored(f"{path}_{name}", digests[name], side) for name in splits}
    missing = [name for name in splits if stored.get(name) is None]
    sizes = {name: stored_sizes(splits[name].images, side, name) for name in missing}
    check_room(kind, sizes, side, device, path)
    if kind != "disk":  # which the first process fills alone
        auxiliaries.any_rank(False)  # waits: until all have looked nobody takes anything
    for name in missing:
        images = decoded(splits[name].images, sizes[name], side, name)
        if kind == "disk":
            write_stored(f"{path}_{name}", digests[name], side, sizes[name], images)
            stored[name] = read_stored(f"{path}_{name}", digests[name], side)
            continue
        areas = sizes[name].prod(1)
        starts = areas.cumsum() - areas
        pixels = torch.empty(int(areas.sum()), 3, dtype=torch.uint8,
                             device=device if kind == "device" else "cpu")
        if kind == "ram":
            pixels.share_memory_()
        for image, start in zip(images, starts.tolist()):
            pixels[start:start + len(image)] = torch.from_numpy(image)
        stored[name] = Stored(pixels, sizes[name], starts)
    return stored


def stored_sizes(paths, side, name):
    """Height and width of each image once it is reduced -> int64 [N, 2]; reads headers only."""
    def size(path):
        with open_image(path) as image:
            width, height = band_size(*image.size)
        long = int(side * max(width, height) / min(width, height))  # as torchvision's Resize
        return (long, side) if width <= height else (side, long)

    with concurrent.futures.ThreadPoolExecutor() as pool:
        sizes = list(shown(pool.map(size, paths), len(paths), f"measuring {name}"))
    return np.array(sizes, dtype=np.int64)


def decoded(paths, sizes, side, name):
    """Each image in turn, read and reduced as for testing -> uint8 [height x width, 3]."""
    from torchvision import transforms as T

    resize = T.Resize(side)

    def reduced(path):
        return np.array(resize(central_band(read_image(path))))

    def in_blocks():  # so that no more than a block waits in memory
        with concurrent.futures.ThreadPoolExecutor() as pool:
            for first in range(0, len(paths), 256):
                yield from pool.map(reduced, paths[first:first + 256])

    images = shown(in_blocks(), len(paths), f"decoding {name}")
    for image, path, size in zip(images, paths, sizes.tolist()):
        if list(image.shape[:2]) != size:
            raise ValueError(f"{path}: its size is not what its header says, or it was changed")
        yield image.reshape(-1, 3)


def check_room(kind, sizes, side, device, path):
    """Prints what a cache of images of these sizes, {name: [N, 2]}, needs and what is there.

    Of main memory it is what all processes of a machine need. ValueError where it would fill more
    than nine tenths of that.
    """
    if not sizes:
        print(f"cache    {kind} in {os.path.dirname(path)}: whole, used again", flush=True)
        return
    needed = 3 * sum(int(size.prod(1).sum()) for size in sizes.values())
    if kind == "ram" or kind == "device" and torch.device(device).type == "cpu":
        needed *= int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # each process keeps its own
    there = free_bytes(kind, device, path)
    free = "unknown" if there is None else f"{there / 2 ** 20:,.0f} MiB"
    where = f" in {os.path.dirname(path)}" if kind == "disk" else ""
    print(f"cache    {kind}{where}: {sum(map(len, sizes.values())):,} images to decode, shorter "
          f"side {side}: {needed / 2 ** 20:,.1f} MiB needed, {free} free", flush=True)
    if there is not None and needed > 0.9 * there:
        raise ValueError(f"--cache {kind} needs {needed / 2 ** 20:,.1f} MiB{where} and leaves a "
                         f"tenth of what is free, {free}, alone: another --cache, or none")


def free_bytes(kind, device, path):
    """How much is free where a cache of this kind lies; None where the system does not say."""
    if kind == "disk":
        return shutil.disk_usage(os.path.dirname(path)).free
    if kind == "device" and torch.device(device).type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        with open("/proc/meminfo", encoding="utf-8") as file:
            kibibytes = re.search(r"MemAvailable: *(\d+)", file.read())
        available = int(kibibytes.group(1)) * 1024
    except (OSError, AttributeError):
        return None
    with contextlib.suppress(OSError, ValueError):  # a container's own limit, "max" for none
        limit, used = (int(open(f"/sys/fs/cgroup/memory.{name}").read())
                       for name in ("max", "current"))
        available = min(available, limit - used)
    if kind == "ram" and os.path.isdir("/dev/shm"):  # there it lies; containers have little of it
        available = min(available, shutil.disk_usage("/dev/shm").free)
    return available


# The files of --cache disk: PATH_SPLIT.json says whose images PATH_SPLIT_DIGEST.pixels holds. It
# is written last, and each file under another name first, so nothing is taken for whole that is
# not.


def make_folder(folder):
    """Makes the folder of --cache_path and removes what killed runs left half written in it.

    That is what a process of this machine began that is no more, and what no other machine touched
    for a day.
    """
    try:
        os.makedirs(folder, exist_ok=True)
        entries = os.listdir(folder)
    except OSError as error:
        raise OSError(f"--cache_path {folder}: no folder can be made or read there ({error})"
                      ) from error
    for entry in entries:
        begun = re.search(r"\.tmp-(.*)-(\d+)$", entry)
        with contextlib.suppress(OSError):  # another run removed it
            if begun and (is_over(int(begun[2])) if begun[1] == platform.node() else
                          time.time() - os.path.getmtime(os.path.join(folder, entry)) > 86400):
                os.remove(os.path.join(folder, entry))


def is_over(process):
    """Whether a process of this machine, by its number, is no more; this one counts as such."""
    if process == os.getpid():
        return True
    if os.name != "posix":  # elsewhere the question itself may end it
        return False
    try:
        os.kill(process, 0)
    except OSError as error:
        return isinstance(error, ProcessLookupError)  # not where it is somebody else's
    return False


def digest_of(paths, side):
    """A digest of the images' names, their lengths in bytes and the side, wherever they lie."""
    digest = hashlib.sha256(str(side).encode())
    for path in paths:
        try:
            facts = "/".join(path.split(os.sep)[-2:]), os.path.getsize(path)
        except FileNotFoundError:
            raise FileNotFoundError(f"{path}: the image is not there") from None
        digest.update(repr(facts).encode(errors="surrogateescape"))
    return digest.hexdigest()


def read_stored(path, digest, side):
    """A split's images from its files -> Stored; None where there are none that are whole.

    ValueError where they are of other images or another side, or damaged.
    """
    remedy = "remove it, or name another folder with --cache_path"
    try:
        with open(f"{path}.json", encoding="utf-8") as file:
            facts = json.load(file)
        sizes = np.array(facts["sizes"], dtype=np.int64).reshape(-1, 2)
        found = facts["digest"], facts["shorter_side"]
    except FileNotFoundError:
        return None
    except OSError as error:
        raise OSError(f"--cache_path: {path}.json cannot be read ({error})") from error
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}.json is damaged ({error}): {remedy}") from error
    if found != (digest, side):
        raise ValueError(f"{path}.json is of other images" + f", of shorter side {found[1]} and "
                         f"not {side}" * (found[1] != side) + f": {remedy}")
    pixels, areas = f"{path}_{digest[:16]}.pixels", sizes.prod(1)
    try:
        length = os.path.getsize(pixels)
    except FileNotFoundError:
        return None
    if length != 3 * areas.sum():
        raise ValueError(f"{pixels} has {length:,} bytes instead of {3 * areas.sum():,}: {remedy}")
    return Stored(map_pixels(pixels), sizes, areas.cumsum() - areas)


def map_pixels(path):
    """The pixels of a file, uint8 [P, 3], which stay on the disk until they are looked at."""
    return np.memmap(path, np.uint8, mode="r", shape=(os.path.getsize(path) // 3, 3))


def write_stored(path, digest, side, sizes, images):
    """Writes images, uint8 [P, 3] each, and what read_stored wants to know of them."""
    facts = {"digest": digest, "shorter_side": side, "sizes": sizes.tolist()}
    for final, parts in ((f"{path}_{digest[:16]}.pixels", images),
                         (f"{path}.json", [json.dumps(facts).encode()])):
        temporary = f"{final}.tmp-{platform.node()}-{os.getpid()}"
        try:
            with open(temporary, "wb") as file:
                for part in parts:
                    file.write(part)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, final)
        except FileNotFoundError:  # an image, not the file
            raise
        except OSError as error:
            raise OSError(f"--cache_path: {final} cannot be written: {error}") from error
        finally:
            with contextlib.suppress(OSError):
                os.remove(temporary)


# ---- readers: source path -> Found


def read_cub200(source):
    """CUB200-2011: classes in the order of their folders' names, the first half trains."""
    root = find_root(source, "cub200", ("cub200", "CUB_200_2011"),
                     lambda root: os.path.isdir(f"{root}/images"))
    if not os.path.exists(f"{root}/images.txt"):
        return halves(f"class folders in {root}/images", *class_folders(f"{root}/images"))
    rows = read_rows(f"{root}/images.txt", columns=2)
    classes = read_rows(f"{root}/image_class_labels.txt", columns=2)
    if [row[0] for row in rows] != [row[0] for row in classes]:
        raise ValueError(f"{root}/images.txt and image_class_labels.txt do not list the same "
                         f"images ({len(rows)} and {len(classes)}): one of them is cut or was "
                         "changed")
    paths = find_images(f"{root}/images", [row[1] for row in rows], f"{root}/images.txt")
    return halves(f"the official release in {root}",
                  grouped((row[1].split("/")[0] for row in rows), paths))


def read_cars196(source):
    """CARS196: classes in the order of their names, the first half trains.

    Its halves for classification, which have all classes each, are taken together.
    """
    def usable(root):
        return (any(os.path.exists(f"{root}/{name}") for name in
                    ("cars_train", "car_ims", "cars_annos.mat", "images", "train"))
                or any(os.path.splitext(path)[1].lower() in IMAGE_SUFFIXES
                       for path in glob.iglob(f"{glob.escape(root)}/*/*")))

    root = find_root(source, "cars196", ("cars196", "stanford_cars", "car_data"), usable)
    halved = split_folders(root)
    if os.path.isdir(f"{root}/cars_train") and not os.path.isdir(f"{root}/car_ims"):
        names = read_mat(find_beside(root, "cars_meta.mat"), "class_names")
        cars = [car for half, file in (("train", "cars_train_annos.mat"),
                                       ("test", "cars_test_annos_withlabels.mat"))
                for car in read_cars(find_beside(root, file), "fname", names,
                                     unpacked(f"{root}/cars_{half}"))]
        return halves(f"cars_train, cars_test and devkit in {root}", grouped(*zip(*cars)))
    if os.path.isdir(f"{root}/car_ims") or os.path.exists(f"{root}/cars_annos.mat"):
        path = find_beside(root, "cars_annos.mat")
        cars = read_cars(path, "relative_im_path", read_mat(path, "class_names"),
                         os.path.dirname(unpacked(f"{root}/car_ims")))
        return halves(f"cars_annos.mat and car_ims in {root}", grouped(*zip(*cars)))
    if {"train", "test"} <= halved.keys():
        (train, odd), (test, more) = (class_folders(halved[half]) for half in ("train", "test"))
        return halves(f"class folders in {halved['train']} and {halved['test']}, taken together",
                      {name: train.get(name, []) + test.get(name, []) for name in train | test},
                      odd + more)
    folder = f"{root}/images" if os.path.isdir(f"{root}/images") else root
    return halves(f"class folders in {folder}", *class_folders(folder))


def find_beside(root, name):
    """A file of CARS196's annotations, in its folder or in devkit/; else FileNotFoundError."""
    for folder in (root, f"{root}/devkit", f"{root}/devkit/devkit", f"{root}/car_devkit/devkit"):
        if os.path.exists(f"{folder}/{name}"):
            return f"{folder}/{name}"
    raise FileNotFoundError(f"{root} has images of CARS196, but neither there nor in devkit/ is "
                            f"{name}, which has their classes" + " (cars_test_annos.mat has none)"
                            * name.startswith("cars_test"))


def read_cars(path, field, names, folder):
    """A file of CARS196's annotations -> [(class, image's path)], one or more.

    field: which of its fields has the image's path below the folder; names: of the classes.
    """
    rows, names = read_mat(path, "annotations"), dict(enumerate(names, start=1))
    facts = [(row.get("class"), row.get(field)) if isinstance(row, dict) else (None, None)
             for row in (rows if isinstance(rows, list) else [])]
    if any(number is None for number, _ in facts):
        raise ValueError(f"{path} has images without a class; for the test half they are in "
                         "cars_test_annos_withlabels.mat")
    if not facts or not all(np.isscalar(number) and names.get(number) and isinstance(name, str)
                            for number, name in facts):
        raise ValueError(f"{path}: not every image has a {field} and a class from 1 to "
                         f"{len(names)}, the number of names")
    paths = find_images(folder, [name for _, name in facts], path)
    return [(names[number], path) for (number, _), path in zip(facts, paths)]


def read_online_products(source):
    """Stanford Online Products: Ebay_train.txt and Ebay_test.txt say which class is where."""
    root = find_root(source, "online_products",
                     ("online_products", "Stanford_Online_Products"),
                     lambda root: any(os.path.exists(f"{folder}/Ebay_train.txt")
                                      for folder in (f"{root}/Info_Files", root)))
    lists = f"{root}/Info_Files" if os.path.exists(f"{root}/Info_Files/Ebay_train.txt") else root
    folder = f"{root}/images" if os.path.isdir(f"{root}/images") else root
    splits = {}
    for split in ("train", "test"):
        path = f"{lists}/Ebay_{split}.txt"
        rows = read_rows(path, columns=4)
        if rows.pop(0)[0].isdigit():
            raise ValueError(f"{path}: its first line should name the columns (image_id class_id "
                             "super_class_id path), but it is an image")
        if not rows:
            raise ValueError(f"{path}: the list file is empty")
        images = find_images(folder, [row[3] for row in rows], path)
        splits[split] = labelled(images, [row[1] for row in rows])
    return Found(f"{lists}/Ebay_*.txt with images in {folder}", splits, [])


def read_in_shop(source):
    """In-Shop Clothes: list_eval_partition.txt says which image trains, queries or is gallery.

    Its paths begin with img/ for both resolutions, img and img_highres; img is taken if both are
    there, as in the reference.
    """
    root = find_root(source, "in-shop", ("in-shop", "In-shop Clothes Retrieval Benchmark"),
                     lambda root: os.path.exists(f"{root}/Eval/list_eval_partition.txt"))
    path = f"{root}/Eval/list_eval_partition.txt"
    folders = [unpacked(f"{parent}/{name}") for name in ("img", "img_highres")
               for parent in (root, f"{root}/Img") if os.path.isdir(f"{parent}/{name}")]
    folder, *others = folders or [f"{root}/Img/img"]
    rows = read_rows(path, columns=3, skip=2)
    with open(path, encoding="utf-8-sig") as file:
        promised = file.readline().strip()
    if promised != str(len(rows)):
        raise ValueError(f"{path}: its first line promises "
                         f"{auxiliaries.one_line(promised, 40)} images, it lists {len(rows)}: the "
                         "file is cut or was changed")
    images = find_images(folder, [row[0].removeprefix("img/") for row in rows], path)
    splits = {}
    for split in ("train", "query", "gallery"):
        chosen = [i for i, row in enumerate(rows) if row[2] == split]
        splits[split] = ([images[i] for i in chosen], [rows[i][1] for i in chosen])
    if sum(len(images) for images, _ in splits.values()) != len(rows):
        statuses = sorted({row[2] for row in rows} - set(splits))
        raise ValueError(f"{path}: evaluation status {auxiliaries.one_line(', '.join(statuses))}; "
                         "it is one of train, query, gallery")
    tested = splits["query"][1] + splits["gallery"][1]
    splits = {"train": labelled(*splits["train"]), "query": labelled(*splits["query"], tested),
              "gallery": labelled(*splits["gallery"], tested)}
    lonely = len(set(splits["query"].labels) - set(splits["gallery"].labels))
    odd = [f"{lonely} query classes have no image in the gallery"] if lonely else []
    odd += [f"{other} is there too: {folder} is taken" for other in others]
    return Found(f"{path} with images in {folder}", splits, odd)


def read_vehicle_id(source):
    """PKU VehicleID: train_list.txt trains; the test lists of 800, 1600 and 2400 vehicles test."""
    root = find_root(source, "vehicle_id", ("vehicle_id", "VehicleID_V1.0", "VehicleID"),
                     lambda root: os.path.isdir(f"{root}/train_test_split"))
    splits = {}
    for split, name in (("train", "train_list"), ("test_800", "test_list_800"),
                        ("test_1600", "test_list_1600"), ("test_2400", "test_list_2400")):
        path = f"{root}/train_test_split/{name}.txt"
        rows = read_rows(path, columns=2)
        images = find_images(f"{root}/image", [f"{row[0]}.jpg" for row in rows], path)
        splits[split] = labelled(images, [row[1] for row in rows])
    return Found(f"{root}/train_test_split with images in {root}/image", splits, [])


def read_folder(source):
    """Any folder of class folders, or train/ and test/ (or val/) with class folders in each."""
    if not os.path.isdir(source):
        raise FileNotFoundError(f"--source_path {source} is not a folder; --dataset folder "
                                f"expects {LAYOUTS['folder']}")
    halved, folders = split_folders(source), listing(source)[1]
    train, test = halved.get("train"), halved.get("test", halved.get("val"))
    if train and test:
        parts = {"train": class_folders(train), "test": class_folders(test)}
        odd = [f"{path}, beside {train} and {test}, is left out"
               for path in folders if path not in (train, test)]
        return Found(f"class folders in {train} and {test}",
                     {split: from_classes(by_class) for split, (by_class, _) in parts.items()},
                     [remark for _, odd in parts.values() for remark in odd] + odd)
    if halved and len(folders) == 1:
        raise FileNotFoundError(f"{source} holds {os.path.basename(folders[0])} alone; --dataset "
                                f"folder expects {LAYOUTS['folder']}")
    return halves(f"class folders in {source}", *class_folders(source))


def read_tiny_imagenet(source):
    """Tiny ImageNet: train/ trains and val/ tests, with the same 200 classes in both."""
    root = find_root(source, "tiny_imagenet", ("tiny_imagenet", "tiny-imagenet-200"),
                     lambda root: os.path.exists(f"{root}/val/val_annotations.txt"))
    by_class, odd = class_folders(f"{root}/train")
    path = f"{root}/val/val_annotations.txt"
    rows = read_rows(path, columns=6)
    images = find_images(f"{root}/val/images", [row[0] for row in rows], path)
    train, names = from_classes(by_class), [row[1] for row in rows]
    foreign = sorted(set(names) - set(train.class_names))
    if foreign:
        raise ValueError(f"{path} names {len(foreign)} classes that have no images in "
                         f"{root}/train, the first of them {auxiliaries.one_line(foreign[0])}")
    test = labelled(images, names, train.class_names)
    return Found(f"{root}/train and {path}", {"train": train, "test": test}, odd)


def read_glyphs(source=None):
    """Characters of the font that Pillow bundles, 40 distorted drawings of each; needs no files.

    Every second character trains and the others test, so both halves hold letters, digits and
    signs. Characters that differ only in size or place (c C, . ·, , ’) are left out. Always the
    same images, whatever the seed of the run.
    """
    characters = ("!#$%&'()*+,-/0123456789:;<=>?@ABCDEFGHIJKLMNPQRTUVWXYZ[\\]^_"
                  "abdefghijkmnpqrtuy{}~©«±»“”…™")
    generator = np.random.default_rng(0)
    drawings = [draw_glyphs(character, 40, generator) for character in characters]
    splits = {}
    for split, first in (("train", 0), ("test", 1)):
        chosen = range(first, len(characters), 2)
        splits[split] = Split(np.concatenate([drawings[i] for i in chosen]),
                              [label for label in range(len(chosen)) for _ in range(40)],
                              [characters[i] for i in chosen])
    return Found("drawn from Pillow's font, no files needed", splits, [])


READERS = {
    "cub200": read_cub200,
    "cars196": read_cars196,
    "online_products": read_online_products,
    "in-shop": read_in_shop,
    "vehicle_id": read_vehicle_id,
    "tiny_imagenet": read_tiny_imagenet,
    "folder": read_folder,
    "glyphs": read_glyphs,
}


def draw_glyphs(character, count, generator, size=32):
    """count drawings of a character, distorted at random -> uint8 [count, size, size].

    White on black. Rotation up to 20 degrees, scale 0.7 to 1.05, shear up to 0.25, shift up to 3
    pixels, noise.
    """
    canvas = Image.new("L", (96, 96))
    ImageDraw.Draw(canvas).text((48, 48), character, fill=255, anchor="mm",
                                font=ImageFont.load_default(64))
    images = np.empty((count, size, size), dtype=np.uint8)
    for image in images:
        angle = np.deg2rad(generator.uniform(-20, 20))
        shear = generator.uniform(-0.25, 0.25)
        scale = 96 / size / generator.uniform(0.7, 1.05)  # canvas pixels in one image pixel
        turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
        matrix = scale * turn @ np.array([[1, shear], [0, 1]])
        # PIL maps each output pixel to its source: the middle of the image to the shifted glyph.
        offset = 48 - matrix @ (size / 2 + generator.uniform(-3, 3, 2))
        drawn = canvas.transform((size, size), Image.Transform.AFFINE,
                                 np.column_stack([matrix, offset]).ravel().tolist(),
                                 resample=Image.Resampling.BILINEAR)
        noisy = (np.asarray(drawn) * generator.uniform(0.6, 1.0)
                 + generator.normal(0, 25, (size, size)))
        image[:] = noisy.clip(0, 255)
    return images


# ---- what the readers share


def find_root(source, dataset, names, usable):
    """The folder of a dataset that is usable: source/name, or source itself.

    An archive may lie unpacked in a folder of any of its names. FileNotFoundError with the
    layouts, and how the data is had, if there is none.
    """
    expected = (f"accepted below it: {LAYOUTS[dataset]}. python datasets.py --dataset {dataset} "
                "--download" + f" --source_path {source}" * (source != "./Datasets")
                + (" fetches it" if dataset in ARCHIVES else " says where it is to be had"))
    if not os.path.isdir(source):
        raise FileNotFoundError(f"--source_path {source} is not a folder; {expected}")
    for name in (*names, *itertools.starmap(os.path.join, itertools.product(names, names)), ""):
        root = os.path.join(source, name) if name else source
        if usable(root):
            return root
    raise FileNotFoundError(f"--source_path {source} holds no {dataset}; {expected}. The "
                            "dataset's own folder may be given as well")


def unpacked(folder):
    """A folder, or the one of the same name inside it, which unpacking an archive may leave."""
    inner = os.path.join(folder, os.path.basename(folder))
    return inner if os.path.isdir(inner) else folder


def names_in(folder):
    """The sorted names in a folder; OSError with its path where it cannot be read."""
    try:
        return sorted(os.listdir(folder))
    except OSError as error:
        raise OSError(f"{folder} cannot be read ({error.strerror})") from None


def listing(folder, left=None):
    """(images, folders) of a folder, sorted paths; all else is counted in left by suffix."""
    images, folders, left = [], [], collections.Counter() if left is None else left
    for name in names_in(folder):
        path, suffix = os.path.join(folder, name), os.path.splitext(name)[1].lower()
        if name.startswith("."):
            left["hidden"] += 1
        elif suffix in IMAGE_SUFFIXES:
            images.append(path)
        elif os.path.isdir(path):
            folders.append(path)
        else:
            left[suffix or "without a suffix"] += 1
    return images, folders


def split_folders(root):
    """{"train", "test" or "val": the folder of that name, in any case, also as training}."""
    found = {}
    for path in listing(root)[1]:
        split = re.sub("ing$|id$|idation$", "", os.path.basename(path).lower())
        if split in ("train", "test", "val"):
            found.setdefault(split, path)
    return found


def class_folders(root):
    """({class folder's name: [paths of its images]}, [remarks on what is left out]), sorted.

    A class's images lie in its folder, or one folder deeper. ValueError for folders of class
    folders: none has images of its own, and most names of what lies deeper come but once.
    """
    def look(folder):
        try:
            return listing(folder, left)
        except OSError as error:
            odd.append(f"{error} and is left out")
            return [], []

    left, odd, classes, direct, names, several = collections.Counter(), [], {}, False, [], None
    beside, folders = listing(root, left)
    left["images beside the class folders"] = len(beside)
    for folder in folders:
        images, deeper = look(folder)
        direct |= bool(images)
        filled = []
        for inner in deeper:
            found, lost = look(inner)
            left["folders too deep"] += len(lost)
            images += found
            filled += [os.path.basename(inner)] * bool(found)
        names += filled
        several = several or (folder if len(filled) > 1 else None)
        classes[os.path.basename(folder)] = images
    if several and not direct and 2 * len(set(names)) > len(names):
        raise ValueError(f"{root} holds super-classes and not classes: {several} has no images, "
                         f"but {names[0]} and others in it have. Give {several} as --source_path, "
                         "or move or link the class folders of all into one folder")
    empty = [name for name, paths in classes.items() if not paths]
    if empty:
        odd.append(f"{len(empty)} class folders in {root} hold no image, e.g. {empty[0]}")
    if left := +left:
        counts = [f"{count:,} {kind}" for kind, count in left.most_common(10)]
        odd.append(f"left out in {root}: {', '.join(counts)}" + ", ..." * (len(left) > 10))
    return {name: paths for name, paths in classes.items() if paths}, odd


def from_classes(by_class):
    """{class: [paths]} -> Split, labels in the dict's order."""
    images = [path for paths in by_class.values() for path in paths]
    labels = [label for label, paths in enumerate(by_class.values()) for _ in paths]
    return Split(images, labels, list(by_class))


def grouped(names, paths):
    """The class of each path, and the paths -> {class: [paths]}."""
    by_class = collections.defaultdict(list)
    for name, path in zip(names, paths):
        by_class[name].append(path)
    return by_class


def halves(layout, by_class, odd=()):
    """{class: [paths]} -> Found: the first half of the sorted classes trains, the second tests."""
    if not by_class:
        raise FileNotFoundError(f"there are no {layout} (one folder of images for each class)")
    names = sorted(by_class)
    first, second = names[:len(names) // 2], names[len(names) // 2:]
    splits = {"train": from_classes({name: by_class[name] for name in first}),
              "test": from_classes({name: by_class[name] for name in second})}
    return Found(f"{layout}, {len(names)} classes in all", splits, list(odd))


def labelled(images, ids, all_ids=None):
    """Images and the class id of each -> Split; labels: the ids' ranks (in all_ids if given)."""
    unique = set(ids if all_ids is None else all_ids)
    names = sorted(unique, key=lambda name: (len(name), name) if name.isdigit() else (0, name))
    rank = {name: i for i, name in enumerate(names)}
    return Split(images, [rank[name] for name in ids], names)


def read_rows(path, columns, skip=0):
    """The rows of a list file as lists of strings; ValueError names the line that is not whole."""
    try:
        with open(path, "rb") as file:
            content = file.read()
        if content.startswith((b"\xff\xfe", b"\xfe\xff")) or b"\0" in content[:2]:
            raise ValueError("it is in UTF-16: save it as UTF-8")
        lines = content.decode("utf-8-sig").replace("\\", "/").splitlines()[skip:]
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: the list file is not there") from None
    except (ValueError, OSError) as error:
        raise ValueError(f"{path}: not a readable list file ({error})") from None
    rows = [line.split() for line in lines]
    while rows and not rows[-1]:
        rows.pop()
    if not rows:
        raise ValueError(f"{path}: the list file is empty")
    for number, (line, row) in enumerate(zip(lines, rows), start=skip + 1):
        if line.count(",") == columns - 1 and (len(row) != columns or row[0].endswith(",")):
            raise ValueError(f"{path}, line {number}: the columns are separated by commas; they "
                             "should be by spaces")
        if len(row) != columns:
            raise ValueError(f"{path}, line {number}: {len(row)} columns where there should be "
                             f"{columns}: {' '.join(row)[:80]!r}; is the file cut?")
    return rows


def read_mat(path, variable):
    """A variable of a MATLAB 5 file, compressed as MATLAB writes it -> lists, dicts and scalars.

    ValueError for anything else. The checksums are looked at first, since scipy's reader takes
    the process down where such a file is damaged.
    """
    import scipy.io  # here, so that others need not wait for it

    try:
        with open(path, "rb") as file:
            content = file.read()
        if content[124:128] != b"\0\1IM":
            raise ValueError("it is no MATLAB 5 file")
        at = 128
        while at < len(content):
            kind, size = struct.unpack_from("<II", content, at)
            if kind != 15:
                raise ValueError("it is not compressed, as save -v7 does it")
            zlib.decompress(content[at + 8:at + 8 + size])
            at += 8 + size
        return scipy.io.loadmat(io.BytesIO(content), simplify_cells=True)[variable]
    except Exception as error:  # a file that is cut or of another kind fails in many places
        raise ValueError(f"{path}: the variable {variable} cannot be read "
                         f"({type(error).__name__}: {auxiliaries.one_line(error)})") from error


def find_images(folder, names, source):
    """The paths of the named images below a folder, suffix case ignored; each directory read once.

    FileNotFoundError with the first missing one and how many there are. source: the list's path.
    """
    listings, paths, missing = {}, [], []
    for name in names:
        directory, file = os.path.split(os.path.join(folder, name))
        outside = os.path.isabs(name) or os.pardir in name.split("/")
        if directory not in listings:
            entries = names_in(directory) if os.path.isdir(directory) else []
            # The exact name comes first, then one that differs in the suffix's case.
            listings[directory] = ({suffix_folded(entry): entry for entry in entries}
                                   | {entry: entry for entry in entries})
        listing = listings[directory]
        actual = listing.get(file, listing.get(suffix_folded(file)))
        if actual is None or outside:
            missing.append(name)
        else:
            paths.append(os.path.join(directory, actual))
    if missing:
        raise FileNotFoundError(f"{source} lists {len(missing)} images of {len(names)} that are "
                                f"not in {folder}, the first of them "
                                f"{auxiliaries.one_line(missing[0])}")
    return paths


def suffix_folded(file):
    """A file name with its suffix in lower case."""
    stem, suffix = os.path.splitext(file)
    return stem + suffix.lower()


def shown(results, count, text):
    """Hands results on; on a terminal one line says how many of them there were."""
    show = sys.stdout.isatty()
    for done, result in enumerate(results, start=1):
        yield result
        if show and (done % 500 == 0 or done == count):
            print(f"\r  {text}: {done:,} of {count:,}", end="", flush=True)
    if show:
        print("\r" + " " * 60 + "\r", end="")


# ---- the dataset check


def check(dataset, source_path, quick=False):
    """Prints what was found beside what is published; returns whether the data is usable."""
    found = READERS[dataset](source_path)
    print(auxiliaries.printable(f"{dataset}: {found.layout}"))
    published = PUBLISHED.get(dataset, {})
    problems, odd, differs, more = problems_of(found.splits), list(found.odd), False, False
    for name, split in found.splits.items():
        sizes = collections.Counter(split.labels)
        counts = (len(sizes), len(split.labels))
        line = f"  {name}: {counts[0]:,} classes/{counts[1]:,} images"
        if name in published:
            expected = published[name]
            line += f" (published {expected[0]:,}"
            line += f"/{expected[1]:,})" if expected[1] else " classes)"
            differs |= any(e is not None and c != e for c, e in zip(counts, expected))
            more |= any(e is not None and c > e for c, e in zip(counts, expected))
        if sizes:
            (large, most), (small, fewest) = sizes.most_common()[0], sizes.most_common()[-1]
            line += (f"; smallest class {split.class_names[small]} with {fewest}, largest "
                     f"{split.class_names[large]} with {most}")
        print(auxiliaries.printable(line))
        single = sum(size == 1 for size in sizes.values())
        if single and name not in ("query", "gallery"):
            odd.append(f"{single} classes of the {name} split have one image only")
        if isinstance(split.images, list):
            problems += broken_images(split.images, name, quick)
    if differs:
        odd.append("more than the published data: is it another version?" if more else
                   f"a subset of {dataset.upper()}: published numbers do not apply")
    for remark in odd:
        print(auxiliaries.printable(f"  note: {remark}"))
    for problem in problems:
        print(auxiliaries.printable(f"  problem: {problem}"))
    print("usable" if not problems else "not usable")
    return not problems


def remark_on_subset(dataset, splits):
    """What a dataset's size says of published numbers, as a sentence; "" where it is whole.

    splits: {name: Split}; val, where there is one, is held out of train.
    """
    for name, (classes, images) in PUBLISHED.get(dataset, {}).items():
        parts = [splits[part] for part in (name, "val") if part == name or
                 name == "train" and part in splits]
        found = [sum(len(labels) for labels in kinds) for kinds in
                 ([set(part.labels) for part in parts], [part.labels for part in parts])]
        if found[0] != classes or images not in (None, found[1]):
            return (f"the {name} split has {found[0]:,} classes/{found[1]:,} images, not "
                    f"{dataset}'s {classes:,}" + f"/{images:,}" * bool(images)
                    + ": published numbers do not apply")
    return ""


def broken_images(paths, split, quick):
    """Reads every image (quick: is it a file, not empty?); describes at most 20 that fail."""
    def failure(path):
        try:
            if not os.path.isfile(path) or os.path.getsize(path) == 0:
                return f"{path}: not a file, or an empty one"
            if not quick:
                read_image(path)
        except (OSError, ValueError) as error:
            return str(error)

    with concurrent.futures.ThreadPoolExecutor() as pool:  # PIL decodes outside of Python's lock
        messages = shown(pool.map(failure, paths), len(paths), f"reading {split}")
        failures = [message for message in messages if message]
    if len(failures) > 20:
        failures = failures[:20] + [f"and {len(failures) - 20} more broken images"]
    return failures


# ---- download


# Address and MD5 checksum of the public archives, the checksums as in Avalanche 0.6. Each archive
# holds a folder of its own name, the release; what lies beside that folder no reader needs.
ARCHIVES = {
    "cub200": ("https://data.caltech.edu/records/65de6-vp158/files/CUB_200_2011.tgz",
               "97eceeb196236b17998738112f37df78"),
    "tiny_imagenet": ("http://cs231n.stanford.edu/tiny-imagenet-200.zip",
                      "90528d7ca1a48142e341f4ef8d21d0de"),
}

ON_REQUEST = {
    "cars196": "the links of https://ai.stanford.edu/~jkrause/cars/car_dataset.html are gone; "
               "https://github.com/pytorch/vision/issues/7545 says who has copies; unpack them "
               "in {}",
    "online_products": "fetch ftp://cs.stanford.edu/cs/cvgl/Stanford_Online_Products.zip, or see "
                       "https://github.com/rksltnl/Deep-Metric-Learning-CVPR16; unzip it in {}",
    "in-shop": "ask at https://mmlab.ie.cuhk.edu.hk/projects/DeepFashion.html for the In-shop "
               "Clothes Retrieval Benchmark; unzip its Img/img.zip and put its Eval/ in {}",
    "vehicle_id": "ask at https://www.pkuml.org/resources/pku-vehicleid.html; unzip it in "
                  "--source_path",
    "folder": "these are your own images, in class folders in --source_path",
}

PAUSES = (1, 5, 20)  # seconds before each new try after a connection was dropped


def download(dataset, source):
    """Puts a dataset from its public archive where its reader looks; nothing if it is there.

    An archive that lies in the folder source already is used as it is. Raises FileNotFoundError
    with where to ask for a dataset without a public archive; ValueError for an archive that is
    not the published one or not safe to unpack; OSError where it cannot be had.
    """
    try:
        READERS[dataset](source)
        print(f"{dataset} is there already: nothing is downloaded (move it away to get it anew)")
        return
    except (ValueError, OSError) as error:
        if not auxiliaries.raised_on_purpose(error):
            raise
        missing = error
    target = os.path.join(source, dataset)
    if dataset not in ARCHIVES:
        raise FileNotFoundError(f"--download has no public archive of {dataset}: "
                                f"{ON_REQUEST[dataset].format(target)}. Accepted below {source}: "
                                f"{LAYOUTS[dataset]}")
    if os.path.lexists(target):
        try:
            os.rmdir(target)  # an empty folder only
        except OSError:
            raise FileExistsError(f"{target} is there, but no usable {dataset} ({missing}): move "
                                  "it away for --download to put the dataset there") from None
    try:
        os.makedirs(source, exist_ok=True)
    except OSError as error:
        raise OSError(f"--source_path {source}: no folder can be made there ({error})") from error
    url, md5 = ARCHIVES[dataset]
    path = os.path.join(source, url.rsplit("/", 1)[1])
    if not os.path.exists(path):
        fetch(url, md5, path)
    elif md5_of(path) != md5:
        raise ValueError(f"{path} does not have the MD5 checksum {md5}: it is cut, or another "
                         "file. Move it away for --download to fetch it")
    unpack(path, target)
    print(auxiliaries.printable(f"unpacked in {target}; {path} is not needed any more"))


def fetch(url, md5, path):
    """Downloads url to path by way of path.part, from which a later call goes on.

    Bytes without the checksum md5 are deleted (ValueError); OSError where they do not come.
    """
    part = f"{path}.part"
    longest = os.path.getsize(part) if os.path.exists(part) else 0
    resumed, pauses = longest > 0, []  # a server that sends nothing at first is not asked again
    print(f"downloading {url} to {auxiliaries.printable(path)}"
          + f", going on from {longest:,} bytes" * resumed)
    while reason := receive(url, part):
        size = os.path.getsize(part) if os.path.exists(part) else 0
        if size > longest:
            longest, pauses = size, list(PAUSES)
        if not pauses:
            raise OSError(f"{url} cannot be downloaded ({reason}). Try again later"
                          + f" ({size:,} bytes are kept in {part})" * (size > 0)
                          + f", or fetch it elsewhere, put it at {path} and run this again")
        print(f"  {reason} after {size:,} bytes; trying again in {pauses[0]} s")
        time.sleep(pauses.pop(0))
    if md5_of(part) == md5:
        return os.replace(part, path)
    os.remove(part)
    if not resumed:
        raise ValueError(f"{url} does not have the MD5 checksum {md5} and was deleted: it changed "
                         f"on its way or at its source. Try again, or put a good copy at {path}")
    print("  what was there and what came do not make the archive: starting again")
    fetch(url, md5, path)


def receive(url, part):
    """Appends to the file part what it lacks of url -> None, or in words why it is not whole.

    Where the server cannot go on from the end of part, part starts again. OSError if the disk has
    no room for the rest.
    """
    have = os.path.getsize(part) if os.path.exists(part) else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        response = urllib.request.urlopen(request, timeout=60)
    except (OSError, http.client.HTTPException) as error:
        if not have or getattr(error, "code", None) != 416:
            return str(error).strip("<>") or repr(error)
        if error.headers["Content-Range"] == f"bytes */{have}":
            return None
        os.remove(part)  # it is longer than what the server has
        return receive(url, part)
    with response:
        goes_on = response.status == 206
        if goes_on and not response.headers.get("Content-Range", "").startswith(f"bytes {have}-"):
            return "the server sent another part than the one that was asked for"
        total = None if response.length is None else response.length + have * goes_on
        free = shutil.disk_usage(os.path.dirname(part) or ".").free
        if total is not None and total - have > free:
            raise OSError(f"{part}: {total - have:,} bytes are to come and the disk has {free:,} "
                          "free. Make room, or give another --source_path")
        with open(part, "ab" if goes_on else "wb") as file:
            return copy_response(response, file, total)


def copy_response(response, file, total):
    """Writes what a response sends -> None, or in words why it ended before the total bytes."""
    start, begun, shown, reason = file.tell(), time.monotonic(), 0, None
    while True:
        try:
            chunk = response.read(1 << 16)
        except (OSError, http.client.HTTPException) as error:
            chunk, reason = b"", f"the connection broke ({error})"
        if not chunk:
            break
        file.write(chunk)
        now, done = time.monotonic(), file.tell()
        if total and sys.stdout.isatty() and (now - shown > 0.5 or done == total):
            rate, shown = (done - start) / max(now - begun, 1e-3), now
            line = (f"  {done / 1e6:,.1f} of {total / 1e6:,.1f} MB, {rate / 1e6:,.1f} MB/s, "
                    f"{auxiliaries.duration((total - done) / rate)} left")
            print(f"\r{line:60}", end="", flush=True)
    if shown:
        print()
    early = "the connection ended early" if total and file.tell() < total else None
    return reason or early


def md5_of(path):
    """The MD5 checksum of a file's bytes, in hex."""
    digest = hashlib.md5(usedforsecurity=False)
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def unpack(path, target):
    """Unpacks the folder that an archive holds, named as the archive is, to be the folder target.

    It lies in a folder beside target until it is whole. Raises ValueError for a damaged archive
    and one that has more than plain files and folders below the place of unpacking; OSError for
    one larger than the free space of the disk. Nothing is left of either.
    """
    print(f"unpacking {auxiliaries.printable(path)}")
    place = tempfile.mkdtemp(prefix=f"{os.path.basename(target)}.unpacking.",
                             dir=os.path.dirname(target))
    try:
        free = left = shutil.disk_usage(place).free
        for name, size, kind, opened in members(path):
            steps = name.replace("\\", "/").split("/")
            if kind is None or ".." in steps or not steps[0] or ":" in steps[0]:
                raise ValueError(f"{path} is not unpacked: {name!r} in it is "
                                 + ("outside of the folder" if kind else "a link or a device"))
            left -= size
            if left < 0:
                raise OSError(f"{path} unpacks to more than the {free:,} bytes that the disk of "
                              f"{target} has free. Make room, or give another --source_path")
            file = os.path.join(place, *steps)
            os.makedirs(file if kind == "folder" else os.path.dirname(file), exist_ok=True)
            if kind == "file":
                with opened() as member, open(file, "wb") as out:
                    shutil.copyfileobj(member, out)
        release = os.path.join(place, os.path.splitext(os.path.basename(path))[0])
        if not os.path.isdir(release):
            raise ValueError(f"{path} holds no folder {os.path.basename(release)}")
        os.rename(release, target)
        for killed in glob.glob(f"{glob.escape(target)}.unpacking.*"):
            shutil.rmtree(killed, ignore_errors=True)
    except (tarfile.TarError, zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise ValueError(f"{path} cannot be unpacked ({error})") from error
    finally:
        shutil.rmtree(place, ignore_errors=True)


def members(path):
    """(name, size in bytes, "file", "folder" or None for others, opener) of all in an archive."""
    if path.endswith(".zip"):
        with zipfile.ZipFile(path) as archive:
            for info in archive.infolist():
                plain = stat.S_IFMT(info.external_attr >> 16) in (0, stat.S_IFREG, stat.S_IFDIR)
                kind = ("folder" if info.is_dir() else "file") if plain else None
                yield info.filename, info.file_size, kind, lambda: archive.open(info)
    else:
        with tarfile.open(path) as archive:
            for info in archive:
                kind = "folder" if info.isdir() else "file" if info.isreg() else None
                yield info.name, info.size, kind, lambda: archive.extractfile(info)


def main(argv=None):
    """python datasets.py: download and check; exits with 0 only when the data is usable."""
    parser = auxiliaries.Parser(
        prog="datasets.py",
        description="Says what a dataset folder holds, beside the published counts, and what is "
                    "missing or odd. Exit status 0 only when the data can be trained on.")
    parser.add_argument("--dataset", choices=READERS, default="cub200", help="which reader to use")
    parser.add_argument("--source_path", type=os.path.expanduser, default="./Datasets",
                        metavar="DIR",
                        help="as for main.py; default %(default)s")
    parser.add_argument("--quick", action="store_true",
                        help="do not read every image, only look that its file is there")
    parser.add_argument("--download", action="store_true",
                        help=f"first fetch and unpack the data if it is not there: "
                             f"{', '.join(ARCHIVES)}; for the others it says where to ask. A "
                             "download that was stopped goes on, and an archive that lies in "
                             "--source_path is used")
    with auxiliaries.one_message("datasets.py"):
        args = parser.parse_args(argv)
        if args.download:
            download(args.dataset, args.source_path)
        return 0 if check(args.dataset, args.source_path, args.quick) else 1


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.exit(main())
