"""How a picture becomes a tensor: image files, transforms, the cache of decoded images.

ImageDataset turns images and labels into (image, label) items. Which images a dataset has and
where they lie: datasets.py. A transform of one's own stands beside crop_transforms and is named in
its dataset's row.
"""

import collections
import concurrent.futures
import contextlib
import math
import os
import re
import shutil
import sys
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

import auxiliaries

# What a file with such a suffix may hold; the suffix may be another's, as in ImageNet. PIL would
# also run programs for files of other formats. The suffixes are torchvision's, .jfif and .gif.
IMAGE_FORMATS = ("JPEG", "PNG", "BMP", "GIF", "TIFF", "WEBP", "PPM")
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".jfif", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp",
                  ".ppm", ".pgm"}


class ImageDataset(torch.utils.data.Dataset):
    """Items (image, label) of a split: image uint8 [3, H, W] in RGB, label an int.

    dataset[i] is a pure function of i and the transform. A random transform is given by seed: its
    draws then depend on (seed, epoch, i) alone, so they are the same for any number of loading
    processes, and each repeat of an image within one batch gets draws of its own. With views = 2
    items are (first view, second view, label), each view drawn by itself. share (n, of): a batch
    gives the n-th of so many equal parts, for training in several processes. read makes of a path
    what the transform takes: read_image or, for a transform of tensors, the faster read_pixels.
    stored, where it is given, has the images decoded. Normalisation is the network's business
    (netlib.Trunk), so images travel as bytes. An image that cannot be read raises ValueError with
    its path.
    """

    def __init__(self, split, transform, seed=None, views=1, share=(0, 1), read=None, stored=None):
        self.images, self.labels, self.class_names = split
        self.transform = transform
        self.seed = seed
        self.views = views
        self.share = share
        self.read = read or read_image
        self.stored = stored
        self.epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # seen by the workers too

    @property
    def on_device(self):
        """Whether items lie on a GPU already, from which no DataLoader need copy them."""
        return self.stored is not None and self.stored.pixels.is_cuda

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
        if self.stored is not None:
            image = self.stored.image(i)
        else:
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
        if self.stored is not None:
            return Image.fromarray(self.stored.image(i).permute(1, 2, 0).cpu().numpy())
        if isinstance(self.images, np.ndarray):
            return Image.fromarray(self.images[i]).convert("RGB")
        return read_image(self.images[i])


@contextlib.contextmanager
def open_image(path):
    """An image file with its header read; what PIL or the file does wrong inside is ValueError."""
    try:
        with Image.open(path, formats=IMAGE_FORMATS) as image:
            yield image
    except FileNotFoundError:
        raise FileNotFoundError(f"{auxiliaries.printable(path)}: the image is not there") from None
    except Exception as error:  # PIL's decoders raise OSError, SyntaxError, struct.error, others
        raise ValueError(auxiliaries.printable(f"{path}: not an image, or a broken one ({error})")
                         ) from None


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


def crop_transforms(image_size, views=1, crop_scale=(0.08, 1.0), interpolation="bilinear",
                    eval_resize=None):
    """(training, test transform) of photographs to uint8 [3, image_size, image_size].

    crop_scale: least and greatest share of an image's area that a training crop has.
    interpolation: bilinear or bicubic. eval_resize: the shorter side of test images, in pixels,
    before the centre is cut out; None: as shorter_side has it. Both take a PIL image or uint8
    [3, H, W]. Tensors are resized by torch, faster than PIL and like it but for rounding: of a
    hundred values one or two are a level off, of ten million one is two levels off. Any number of
    views are drawn by the same transform.
    """
    from torchvision.transforms import v2  # here, so that --help need not wait for it

    mode = v2.InterpolationMode(interpolation)
    return (v2.Compose([v2.RandomResizedCrop(image_size, crop_scale, interpolation=mode),
                        v2.RandomHorizontalFlip(), v2.PILToTensor()]),
            v2.Compose([v2.Resize(eval_resize or shorter_side(image_size), mode),
                        v2.CenterCrop(image_size), v2.PILToTensor()]))


def fit_transforms(image_size, views=1, **_):
    """crop_transforms of drawings, which are shown whole in training, too, and never mirrored.

    Glyphs are drawn at random places and sizes already, and a mirrored b is a d. Where two views
    of one are wanted they are turned, moved, scaled and sheared a little more.
    """
    from torchvision import transforms as T

    fit = T.Compose([T.Resize((image_size, image_size)), T.PILToTensor()])
    moved = T.RandomAffine(15, translate=(0.1, 0.1), scale=(0.8, 1.2), shear=15,
                           interpolation=T.InterpolationMode.BILINEAR)
    return (fit if views == 1 else T.Compose([moved, fit])), fit


def shorter_side(image_size):
    """The shorter side, in pixels, that test images have before their centre is cut out."""
    return 256 if image_size in (224, 227) else round(image_size * 8 / 7)


# ---- the cache: images decoded once


class Stored(NamedTuple):
    """The images of a split, reduced to one shorter side, in RGB.

    pixels: uint8 tensor [P, 3], image after image and row by row; sizes: int64 array [N, 2],
    height and width of each image; starts: int64 array [N], where each begins.
    """

    pixels: torch.Tensor
    sizes: np.ndarray
    starts: np.ndarray

    def image(self, i):
        """Image i -> uint8 [3, H, W], which is not copied."""
        height, width = self.sizes[i].tolist()
        start = int(self.starts[i])
        return self.pixels[start:start + height * width].view(height, width, 3).permute(2, 0, 1)


def cache_splits(kind, splits, side, interpolation="bilinear", device="cpu"):
    """{name: Split} -> {name: Stored}, of images reduced to a shorter side; kind as --cache.

    Prints what is needed and what is there; ValueError where that is not enough.
    """
    sizes = {name: stored_sizes(split.images, side, name) for name, split in splits.items()}
    check_room(kind, sizes, side, device)
    auxiliaries.any_rank(False)  # waits: until all have looked nobody takes anything
    stored = {}
    for name, split in splits.items():
        areas = sizes[name].prod(1)
        starts = areas.cumsum() - areas
        pixels = torch.empty(int(areas.sum()), 3, dtype=torch.uint8,
                             device=device if kind == "device" else "cpu")
        if kind == "ram":
            pixels.share_memory_()
        images = decoded(split.images, sizes[name], side, interpolation, name)
        for image, start in zip(images, starts.tolist()):
            pixels[start:start + len(image)] = torch.from_numpy(image)
        stored[name] = Stored(pixels, sizes[name], starts)
    return stored


def stored_sizes(paths, side, name):
    """Height and width of each image once it is reduced -> int64 [N, 2]; reads headers only."""
    def size(path):
        with open_image(path) as image:
            width, height = image.size
        long = int(side * max(width, height) / min(width, height))  # as torchvision's Resize
        return (long, side) if width <= height else (side, long)

    with concurrent.futures.ThreadPoolExecutor() as pool:
        sizes = list(shown(pool.map(size, paths), len(paths), f"measuring {name}"))
    return np.array(sizes, dtype=np.int64)


def decoded(paths, sizes, side, interpolation, name):
    """Each image in turn, read and reduced as for testing -> uint8 [height x width, 3]."""
    from torchvision import transforms as T

    resize = T.Resize(side, T.InterpolationMode(interpolation))

    def in_blocks():  # so that no more than a block waits in memory
        with concurrent.futures.ThreadPoolExecutor() as pool:
            for first in range(0, len(paths), 256):
                yield from pool.map(lambda path: np.array(resize(read_image(path))),
                                    paths[first:first + 256])

    images = shown(in_blocks(), len(paths), f"decoding {name}")
    for image, path, size in zip(images, paths, sizes.tolist()):
        if list(image.shape[:2]) != size:
            raise ValueError(f"{path}: its size is not what its header says, or it was changed")
        yield image.reshape(-1, 3)


def check_room(kind, sizes, side, device):
    """Prints what a cache of images of these sizes, {name: [N, 2]}, needs and what is there.

    Of main memory it is what all processes of a machine need. ValueError where it would fill more
    than nine tenths of that.
    """
    needed = 3 * sum(int(size.prod(1).sum()) for size in sizes.values())
    if kind == "ram" or torch.device(device).type == "cpu":
        needed *= int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # each process keeps its own
    there = free_bytes(kind, device)
    free = "unknown" if there is None else f"{there / 2 ** 20:,.0f} MiB"
    print(f"cache    {kind}: {sum(map(len, sizes.values())):,} images to decode, shorter side "
          f"{side}: {needed / 2 ** 20:,.1f} MiB needed, {free} free", flush=True)
    if there is not None and needed > 0.9 * there:
        raise ValueError(f"--cache {kind} needs {needed / 2 ** 20:,.1f} MiB and leaves a tenth of "
                         f"what is free, {free}, alone: another --cache, or none")


def free_bytes(kind, device):
    """How much is free where a cache of this kind lies; None where the system does not say."""
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


# ---- looking at many files


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


def shown(results, count, text):
    """Hands results on; on a terminal one line says how many of them there were."""
    show = sys.stdout.isatty()
    for done, result in enumerate(results, start=1):
        yield result
        if show and (done % 500 == 0 or done == count):
            print(f"\r  {text}: {done:,} of {count:,}", end="", flush=True)
    if show:
        print("\r" + " " * 60 + "\r", end="")
