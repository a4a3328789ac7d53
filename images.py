"""How a picture becomes a tensor: image files, transforms, the cache, crops cut on the device.

ImageDataset turns images and labels into (image, label) items, CachedDataset those that were
decoded before. Which images a dataset has and where they lie: datasets.py. A transform of one's
own stands beside crop_transforms.
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


def crop_transforms(image_size, views=1):
    """(training, test transform) of photographs to uint8 [3, image_size, image_size].

    Both take a PIL image. The training transform, a random crop and flip, takes uint8 [3, H, W]
    too; there torch resizes, faster than PIL and like it but for rounding: of a hundred values one
    or two are a level off, of ten million one is two levels off. Any number of views are drawn by
    the same transform.
    """
    from torchvision import transforms as T  # here, so that --help need not wait for it
    from torchvision.transforms import v2

    return (v2.Compose([v2.RandomResizedCrop(image_size), v2.RandomHorizontalFlip(),
                        v2.PILToTensor()]),
            T.Compose([T.Resize(shorter_side(image_size)), T.CenterCrop(image_size),
                       T.PILToTensor()]))


def fit_transforms(image_size, views=1):
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
        return Crops(self.stored.pixels, places, self.image_size), labels

    def load(self, i):
        """The stored image i -> PIL image in RGB."""
        height, width = self.stored.sizes[i].tolist()
        start = int(self.stored.starts[i])
        pixels = self.stored.pixels[start:start + height * width].cpu().numpy()
        return Image.fromarray(pixels.reshape(height, width, 3))


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

    The copy lies in shared memory in a loading process.
    """
    areas = places[:, 4] * places[:, 5]
    boxes = torch.empty(int(areas.sum()), 3, dtype=torch.uint8)
    if torch.utils.data.get_worker_info():
        boxes.share_memory_()
    source, target = pixels.numpy(), boxes.numpy()
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


def cache_splits(kind, splits, side, device="cpu"):
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
        images = decoded(split.images, sizes[name], side, name)
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


def decoded(paths, sizes, side, name):
    """Each image in turn, read and reduced as for testing -> uint8 [height x width, 3]."""
    from torchvision import transforms as T

    resize = T.Resize(side)

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
