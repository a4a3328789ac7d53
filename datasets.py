"""The datasets: where their images lie, which classes train and which test, and how one is read.

Each reader turns a folder into splits (images, labels, class names) and is one line of READERS;
ImageDataset turns a split into (image, label) items. Run as a program it checks a dataset:
python datasets.py --dataset cub200 --source_path ./Datasets. A new dataset is a reader, its line
in READERS and, where there are any, its published counts. How batches are composed: samplers.py.
"""

import argparse
import collections
import concurrent.futures
import hashlib
import os
import sys
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp"}

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
    "cars196": "cars196/images/<class>/*.jpg, cars196/<class>/*.jpg, or cars196/cars_annos.mat "
               "with cars196/car_ims/*.jpg",
    "online_products": "online_products/images/<type>_final/*.JPG with online_products/Info_Files/"
                       "Ebay_train.txt and Ebay_test.txt, or the release as it unzips: "
                       "Stanford_Online_Products/Ebay_train.txt, Ebay_test.txt, "
                       "<type>_final/*.JPG",
    "in-shop": "in-shop/Eval/list_eval_partition.txt with in-shop/img/... or in-shop/Img/img/...",
    "vehicle_id": "vehicle_id/image/*.jpg with vehicle_id/train_test_split/train_list.txt and "
                  "test_list_800.txt, test_list_1600.txt, test_list_2400.txt",
    "tiny_imagenet": "tiny_imagenet/train/<class>/images/*.JPEG with tiny_imagenet/val/"
                     "val_annotations.txt and val/images/*.JPEG, or the release's "
                     "tiny-imagenet-200/",
    "folder": "<class>/*.jpg (the first half of the sorted classes trains, the second tests), or "
              "train/<class>/*.jpg and test/<class>/*.jpg, directly below --source_path",
}


class Split(NamedTuple):
    """One part of a dataset: N images, the class of each, and the name of each class.

    images: list of N paths, or uint8 array [N, H, W] of grey images; labels: list of N ints that
    index class_names.
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
    group.add_argument("--source_path", default="./Datasets", metavar="DIR",
                       help="the folder that holds the dataset's folder (or that folder itself). "
                            "python datasets.py checks it. Default %(default)s")
    group.add_argument("--image_size", type=int, default=None, metavar="PX",
                       help="height and width of the network's input in pixels. Training crops it "
                            "at random (RandomResizedCrop, and a flip); testing resizes the "
                            "shorter side to 8/7 of it (256 for 224 and 227) and takes the "
                            "centre. Default 224, googlenet 227 (reference runs); glyphs 32")
    group.add_argument("--kernels", type=int, default=None, metavar="N",
                       help="processes that load images; 0 loads in the main process. Never "
                            "changes the numbers. Default 8 (reference runs) or the number of "
                            "cores if that is less; glyphs 0")


class ImageDataset(torch.utils.data.Dataset):
    """Items (image, label) of a split: image uint8 [3, H, W] in RGB, label an int.

    dataset[i] is a pure function of i and the transform. A random transform is given by seed: its
    draws then depend on (seed, epoch, i) alone, so they are the same for any number of loading
    processes, and each repeat of an image within one batch gets draws of its own. With views = 2
    items are (first view, second view, label), each view drawn by itself. Normalisation
    is the network's business (netlib.Trunk), so images travel as bytes. An image that cannot be
    read raises ValueError with its path.
    """

    def __init__(self, split, transform, seed=None, views=1):
        self.images, self.labels, self.class_names = split
        self.transform = transform
        self.seed = seed
        self.views = views
        self.epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # seen by the workers too

    def set_epoch(self, epoch):
        """Random transforms draw anew in each epoch (any non-negative int)."""
        self.epoch.fill_(epoch)

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, i):
        return self.item(i, repeat=0)

    def __getitems__(self, indices):
        """A batch's items; torch's DataLoader calls this one."""
        repeats = collections.Counter()
        items = []
        for i in indices:
            items.append(self.item(i, repeats[i]))
            repeats[i] += 1
        return items

    def item(self, i, repeat):
        """Item i, drawn for the repeat-th time in one batch -> (image, label)."""
        image = self.load(i)
        if self.seed is None:
            return *(self.transform(image) for _ in range(self.views)), self.labels[i]
        draws = np.random.SeedSequence([self.seed, int(self.epoch), i, repeat])
        state = torch.get_rng_state()
        torch.default_generator.manual_seed(int(draws.generate_state(1, np.uint64)[0]))
        try:
            return *(self.transform(image) for _ in range(self.views)), self.labels[i]
        finally:
            torch.set_rng_state(state)

    def load(self, i):
        """The untransformed image i -> PIL image in RGB."""
        if isinstance(self.images, np.ndarray):
            return Image.fromarray(self.images[i]).convert("RGB")
        return read_image(self.images[i])


def read_image(path):
    """An image file -> PIL image in RGB; ValueError with the path if it is broken or no image."""
    try:
        with Image.open(path) as image:
            if image.mode.startswith("I"):  # 16 bits a pixel, which PIL would clip to white
                pixels = np.asarray(image)
                pixels = pixels >> 8 if pixels.max(initial=0) > 255 else pixels
                image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
            return image.convert("RGB")
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: the image is not there") from None
    except Exception as error:  # PIL's decoders raise OSError, SyntaxError, struct.error, others
        raise ValueError(f"{path}: not an image, or a broken one ({error})") from None


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
        elif name.startswith("test") and max(collections.Counter(split.labels).values()) < 2:
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


def dataset_select(opt, views=1):
    """The training set, with so many views of an image, and the evaluation sets of the options.

    Returns (ImageDataset, [EvaluationSet, ...], Found). Raises FileNotFoundError or ValueError
    where the data is missing, damaged or too small.
    """
    found = READERS[opt.dataset](opt.source_path)
    for problem in problems_of(found.splits):
        raise ValueError(f"--dataset {opt.dataset}: {problem} ({found.layout})")
    train_transform, test_transform = transforms(opt.dataset, opt.image_size, views)
    train = ImageDataset(found.splits["train"], train_transform, seed=opt.seed, views=views)
    tests = {name: ImageDataset(split, test_transform)
             for name, split in found.splits.items() if name != "train"}
    if opt.dataset == "in-shop":
        return train, [EvaluationSet("", tests["query"], tests["gallery"])], found
    names = [""] if len(tests) == 1 else [f"set {i + 1}" for i in range(len(tests))]
    sets = [EvaluationSet(name, test) for name, test in zip(names, tests.values())]
    return train, sets, found


def transforms(dataset, image_size, views=1):
    """(training transform, test transform) from a PIL image to uint8 [3, image_size, image_size].

    Glyphs are drawn at random places and sizes already, and a mirrored b is a d: no crop, no flip.
    Where two views of one glyph are wanted they are turned, moved, scaled and sheared a little
    more.
    """
    from torchvision import transforms as T  # here, so that --help need not wait for it

    if dataset == "glyphs":
        fit = T.Compose([T.Resize((image_size, image_size)), T.PILToTensor()])
        moved = T.RandomAffine(15, translate=(0.1, 0.1), scale=(0.8, 1.2), shear=15,
                               interpolation=T.InterpolationMode.BILINEAR)
        return (fit if views == 1 else T.Compose([moved, fit])), fit
    shorter_side = 256 if image_size in (224, 227) else round(image_size * 8 / 7)
    return (T.Compose([T.RandomResizedCrop(image_size), T.RandomHorizontalFlip(),
                       T.PILToTensor()]),
            T.Compose([central_band, T.Resize(shorter_side), T.CenterCrop(image_size),
                       T.PILToTensor()]))


def central_band(image, ratio=8):
    """A PIL image cut to its middle where one side is over `ratio` times the other.

    The centre crop looks at no more than that, and resizing the whole would take gigabytes.
    """
    width, height = image.size
    short = min(width, height)
    if max(width, height) <= ratio * short:
        return image
    new_width, new_height = min(width, ratio * short), min(height, ratio * short)
    left, top = (width - new_width) // 2, (height - new_height) // 2
    return image.crop((left, top, left + new_width, top + new_height))


# ---- readers: source path -> Found


def read_cub200(source):
    """CUB200-2011: classes in the order of their folders' names, the first half trains."""
    root = find_root(source, "cub200", ("cub200", "CUB_200_2011", "cub200/CUB_200_2011", ""),
                     lambda root: os.path.isdir(f"{root}/images"))
    if not os.path.exists(f"{root}/images.txt"):
        return halves(f"class folders in {root}/images", class_folders(f"{root}/images"))
    rows = read_rows(f"{root}/images.txt", columns=2)
    classes = read_rows(f"{root}/image_class_labels.txt", columns=2)
    if [row[0] for row in rows] != [row[0] for row in classes]:
        raise ValueError(f"{root}/images.txt and image_class_labels.txt do not list the same "
                         f"images ({len(rows)} and {len(classes)}): one of them is cut or was "
                         "changed")
    paths = find_images(f"{root}/images", [row[1] for row in rows], f"{root}/images.txt")
    by_class = collections.defaultdict(list)
    for (_, name), path in zip(rows, paths):
        by_class[name.split("/")[0]].append(path)
    return halves(f"the official release in {root}", by_class)


def read_cars196(source):
    """CARS196: classes in the order of their names, the first half trains."""
    def usable(root):
        return (os.path.exists(f"{root}/cars_annos.mat") or os.path.isdir(f"{root}/images")
                or os.path.isdir(root) and any(class_folders(root).values()))

    root = find_root(source, "cars196", ("cars196", "stanford_cars", ""), usable)
    if not os.path.exists(f"{root}/cars_annos.mat"):
        if os.path.isdir(f"{root}/car_ims"):
            raise FileNotFoundError(f"{root}/car_ims is there, but not {root}/cars_annos.mat, "
                                    "which says the images' classes")
        folder = f"{root}/images" if os.path.isdir(f"{root}/images") else root
        return halves(f"class folders in {folder}", class_folders(folder))
    import scipy.io  # scikit-learn brings scipy along
    try:
        table = scipy.io.loadmat(f"{root}/cars_annos.mat", squeeze_me=True)
        annotations, names = (np.atleast_1d(table["annotations"]),
                              np.atleast_1d(table["class_names"]))
        files = [str(name) for name in annotations["relative_im_path"]]
        numbers = [int(number) for number in annotations["class"]]
        if not 1 <= min(numbers) <= max(numbers) <= len(names):
            raise ValueError(f"classes {min(numbers)} to {max(numbers)} with {len(names)} names")
        classes = [str(names[number - 1]) for number in numbers]
    except Exception as error:  # scipy raises many types for files that are cut or of another kind
        raise ValueError(f"{root}/cars_annos.mat cannot be read as CARS196's annotations "
                         f"({type(error).__name__}: {error})") from error
    by_class = collections.defaultdict(list)
    for name, path in zip(classes, find_images(root, files, f"{root}/cars_annos.mat")):
        by_class[name].append(path)
    return halves(f"cars_annos.mat and car_ims in {root}", by_class)


def read_online_products(source):
    """Stanford Online Products: Ebay_train.txt and Ebay_test.txt say which class is where."""
    root = find_root(source, "online_products",
                     ("online_products", "Stanford_Online_Products",
                      "online_products/Stanford_Online_Products", ""),
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
    """In-Shop Clothes: list_eval_partition.txt says which image trains, queries or is gallery."""
    root = find_root(source, "in-shop", ("in-shop", "In-shop Clothes Retrieval Benchmark", ""),
                     lambda root: os.path.exists(f"{root}/Eval/list_eval_partition.txt"))
    path = f"{root}/Eval/list_eval_partition.txt"
    folder = root if os.path.isdir(f"{root}/img") else f"{root}/Img"
    rows = read_rows(path, columns=3, skip=2)
    with open(path, encoding="utf-8-sig") as file:
        promised = file.readline().strip()
    if promised != str(len(rows)):
        raise ValueError(f"{path}: its first line promises {promised} images, it lists "
                         f"{len(rows)}: the file is cut or was changed")
    images = find_images(folder, [row[0] for row in rows], path)
    splits = {}
    for split in ("train", "query", "gallery"):
        chosen = [i for i, row in enumerate(rows) if row[2] == split]
        splits[split] = ([images[i] for i in chosen], [rows[i][1] for i in chosen])
    if sum(len(images) for images, _ in splits.values()) != len(rows):
        statuses = sorted({row[2] for row in rows} - set(splits))
        raise ValueError(f"{path}: evaluation status {', '.join(statuses)}; it is one of train, "
                         "query, gallery")
    tested = splits["query"][1] + splits["gallery"][1]
    splits = {"train": labelled(*splits["train"]), "query": labelled(*splits["query"], tested),
              "gallery": labelled(*splits["gallery"], tested)}
    lonely = len(set(splits["query"].labels) - set(splits["gallery"].labels))
    odd = [f"{lonely} query classes have no image in the gallery"] if lonely else []
    return Found(f"{path} with images in {folder}/img", splits, odd)


def read_vehicle_id(source):
    """PKU VehicleID: train_list.txt trains; the test lists of 800, 1600 and 2400 vehicles test."""
    root = find_root(source, "vehicle_id", ("vehicle_id", "VehicleID_V1.0", "VehicleID", ""),
                     lambda root: os.path.isdir(f"{root}/train_test_split"))
    splits = {}
    for split, name in (("train", "train_list"), ("test_800", "test_list_800"),
                        ("test_1600", "test_list_1600"), ("test_2400", "test_list_2400")):
        path = f"{root}/train_test_split/{name}.txt"
        rows = read_rows(path, columns=2)
        refuse_cut_number(path, rows)
        images = find_images(f"{root}/image", [f"{row[0]}.jpg" for row in rows], path)
        splits[split] = labelled(images, [row[1] for row in rows])
    return Found(f"{root}/train_test_split with images in {root}/image", splits, [])


def read_folder(source):
    """Any folder of class folders, or train/ and test/ with class folders in each."""
    if not os.path.isdir(source):
        raise FileNotFoundError(f"--source_path {source} is not a folder; --dataset folder "
                                f"expects {LAYOUTS['folder']}")
    if os.path.isdir(f"{source}/train") and os.path.isdir(f"{source}/test"):
        splits, odd = {}, []
        for split in ("train", "test"):
            by_class = class_folders(f"{source}/{split}")
            splits[split] = from_classes(by_class)
            odd += remark_on_empty(by_class)
        return Found(f"class folders in {source}/train and {source}/test", splits, odd)
    for split, other in (("train", "test"), ("test", "train")):
        if os.path.isdir(f"{source}/{split}") and len(class_folders(source)) == 1:
            raise FileNotFoundError(f"{source} holds {split} but not {other}; --dataset folder "
                                    f"expects {LAYOUTS['folder']}")
    return halves(f"class folders in {source}", class_folders(source))


def read_tiny_imagenet(source):
    """Tiny ImageNet: train/ trains and val/ tests, with the same 200 classes in both."""
    root = find_root(source, "tiny_imagenet", ("tiny_imagenet", "tiny-imagenet-200", ""),
                     lambda root: os.path.exists(f"{root}/val/val_annotations.txt"))
    by_class = {name: class_folders(f"{root}/train/{name}").get("images", [])
                for name in class_folders(f"{root}/train")}
    path = f"{root}/val/val_annotations.txt"
    rows = read_rows(path, columns=6)
    images = find_images(f"{root}/val/images", [row[0] for row in rows], path)
    train, names = from_classes(by_class), [row[1] for row in rows]
    foreign = sorted(set(names) - set(train.class_names))
    if foreign:
        raise ValueError(f"{path} names {len(foreign)} classes that have no images in "
                         f"{root}/train, the first of them {foreign[0]}")
    test = labelled(images, names, train.class_names)
    return Found(f"{root}/train and {path}", {"train": train, "test": test},
                 remark_on_empty(by_class))


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
    """The first of source/name that is usable; FileNotFoundError with the layouts if none is."""
    if not os.path.isdir(source):
        raise FileNotFoundError(f"--source_path {source} is not a folder; --dataset {dataset} "
                                f"expects there {LAYOUTS[dataset]}")
    for name in names:
        root = os.path.join(source, name) if name else source
        if usable(root):
            return root
    raise FileNotFoundError(f"--source_path {source} holds no {dataset}; accepted below it: "
                            f"{LAYOUTS[dataset]}. The dataset's own folder may be given as well")


def class_folders(root):
    """{class folder's name: [paths of its images]}, both sorted; other files are passed over."""
    classes = {}
    for entry in sorted(os.scandir(root), key=lambda entry: entry.name):
        if entry.is_dir() and not entry.name.startswith("."):
            names = sorted(name for name in os.listdir(entry.path)
                           if os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES
                           and not name.startswith("."))
            classes[entry.name] = [os.path.join(entry.path, name) for name in names]
    return classes


def from_classes(by_class):
    """{class: [paths]} -> Split, labels in the dict's order; empty classes are left out."""
    names = [name for name in by_class if by_class[name]]
    images = [path for name in names for path in by_class[name]]
    labels = [label for label, name in enumerate(names) for _ in by_class[name]]
    return Split(images, labels, names)


def remark_on_empty(by_class):
    """[a remark] on class folders without images, or []."""
    empty = sorted(name for name, paths in by_class.items() if not paths)
    return [f"{len(empty)} class folders hold no image, e.g. {empty[0]}"] if empty else []


def halves(layout, by_class):
    """{class: [paths]} -> Found: the first half of the sorted classes trains, the second tests."""
    if not by_class:
        raise FileNotFoundError(f"there are no {layout} (one folder of images for each class)")
    names = sorted(name for name, paths in by_class.items() if paths)
    layout += f", {len(names)} classes in all"
    first, second = names[:len(names) // 2], names[len(names) // 2:]
    splits = {"train": from_classes({name: by_class[name] for name in first}),
              "test": from_classes({name: by_class[name] for name in second})}
    return Found(layout, splits, remark_on_empty(by_class))


def labelled(images, ids, all_ids=None):
    """Images and the class id of each -> Split; labels: the ids' ranks (in all_ids if given)."""
    unique = set(ids if all_ids is None else all_ids)
    names = sorted(unique, key=lambda name: (len(name), name) if name.isdigit() else (0, name))
    rank = {name: i for i, name in enumerate(names)}
    return Split(images, [rank[name] for name in ids], names)


def read_rows(path, columns, skip=0):
    """The rows of a list file as lists of strings; ValueError names the line that is not whole."""
    try:
        with open(path, encoding="utf-8-sig") as file:
            lines = file.read().splitlines()[skip:]
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: the list file is not there") from None
    except (UnicodeDecodeError, OSError) as error:
        raise ValueError(f"{path}: not a readable list file ({error})") from None
    rows = [line.split() for line in lines]
    while rows and not rows[-1]:
        rows.pop()
    if not rows:
        raise ValueError(f"{path}: the list file is empty")
    for number, row in enumerate(rows, start=skip + 1):
        if len(row) != columns:
            raise ValueError(f"{path}, line {number}: {len(row)} columns where there should be "
                             f"{columns}: {' '.join(row)[:80]!r}; is the file cut?")
    return rows


def refuse_cut_number(path, rows):
    """ValueError if the last row's last number seems cut: no newline, and shorter than before."""
    with open(path, "rb") as file:
        file.seek(-1, os.SEEK_END)
        ends = file.read() in (b"\n", b"\r")
    if not ends and len(rows) > 1 and len(rows[-1][-1]) < len(rows[-2][-1]):
        raise ValueError(f"{path}, last line: {' '.join(rows[-1])!r} ends without a newline in a "
                         f"number shorter than the one before, {rows[-2][-1]!r}; is the file cut?")


def find_images(folder, names, source):
    """The paths of the named images below a folder, suffix case ignored; each directory read once.

    FileNotFoundError with the first missing one and how many there are. source: the list's path.
    """
    listings, paths, missing = {}, [], []
    for name in names:
        directory, file = os.path.split(os.path.join(folder, name))
        if directory not in listings:
            entries = os.listdir(directory) if os.path.isdir(directory) else []
            # The exact name comes first, then one that differs in the suffix's case.
            listings[directory] = ({suffix_folded(entry): entry for entry in entries}
                                   | {entry: entry for entry in entries})
        listing = listings[directory]
        actual = listing.get(file, listing.get(suffix_folded(file)))
        if actual is None:
            missing.append(name)
        else:
            paths.append(os.path.join(directory, actual))
    if missing:
        raise FileNotFoundError(f"{source} lists {len(missing)} images of {len(names)} that are "
                                f"not in {folder}, the first of them {missing[0]}")
    return paths


def suffix_folded(file):
    """A file name with its suffix in lower case."""
    stem, suffix = os.path.splitext(file)
    return stem + suffix.lower()


# ---- the dataset check


def check(dataset, source_path, quick=False):
    """Prints what was found beside what is published; returns whether the data is usable."""
    found = READERS[dataset](source_path)
    print(f"{dataset}: {found.layout}")
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
        print(line)
        single = sum(size == 1 for size in sizes.values())
        if single and name not in ("query", "gallery"):
            odd.append(f"{single} classes of the {name} split have one image only")
        if isinstance(split.images, list):
            problems += broken_images(split.images, name, quick)
    if differs:
        odd.append("more than the published data: is it another version?" if more else
                   f"a subset of {dataset.upper()}: published numbers do not apply")
    for remark in odd:
        print(f"  note: {remark}")
    for problem in problems:
        print(f"  problem: {problem}")
    print("usable" if not problems else "not usable")
    return not problems


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

    show = sys.stdout.isatty()
    failures = []
    with concurrent.futures.ThreadPoolExecutor() as pool:  # PIL decodes outside of Python's lock
        for done, message in enumerate(pool.map(failure, paths), start=1):
            if message:
                failures.append(message)
            if show and (done % 500 == 0 or done == len(paths)):
                print(f"\r  reading {split}: {done:,} of {len(paths):,}", end="", flush=True)
    if show:
        print("\r" + " " * 60 + "\r", end="")
    if len(failures) > 20:
        failures = failures[:20] + [f"and {len(failures) - 20} more broken images"]
    return failures


def main(argv=None):
    """python datasets.py: the dataset check; exits with 0 only when the data is usable."""
    parser = argparse.ArgumentParser(
        description="Says what a dataset folder holds, beside the published counts, and what is "
                    "missing or odd. Exit status 0 only when the data can be trained on.")
    parser.add_argument("--dataset", choices=READERS, default="cub200", help="which reader to use")
    parser.add_argument("--source_path", default="./Datasets", metavar="DIR",
                        help="as for main.py; default %(default)s")
    parser.add_argument("--quick", action="store_true",
                        help="do not read every image, only look that its file is there")
    args = parser.parse_args(argv)
    if hasattr(sys.stdout, "reconfigure"):  # file names need not be valid text
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        usable = check(args.dataset, args.source_path, args.quick)
    except (ValueError, OSError) as error:
        print(f"not usable: {error}")
        usable = False
    return 0 if usable else 1


if __name__ == "__main__":
    sys.exit(main())
