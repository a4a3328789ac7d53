"""The datasets: where their images lie, which classes train and which test.

A reader turns a folder into splits (images, labels, class names). A new dataset is a reader and
its row in DATASETS. How an image is read and becomes a tensor: images.py; how batches are
composed: samplers.py. Run as a program it checks a dataset, and with --download fetches it:
python datasets.py --dataset cub200 --source_path ./Datasets.
"""

import collections
import contextlib
import glob
import hashlib
import http.client
import io
import itertools
import os
import re
import shutil
import signal
import struct
import sys
import tarfile
import tempfile
from typing import NamedTuple

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while torch is being loaded

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

import auxiliaries
import images


class Split(NamedTuple):
    """One part of a dataset: N images, the class of each, and the name of each class.

    images: list of N paths, or uint8 array [N, H, W] of grey or [N, H, W, 3] of RGB images;
    labels: list of N ints that index class_names.
    """

    images: object
    labels: list
    class_names: list


class Found(NamedTuple):
    """What a reader found: where, in words; the splits by name; remarks on what is odd.

    dataset_select adds the splits' fingerprint, and what remark_on_subset says.
    """

    layout: str
    splits: dict
    odd: list
    digest: str = ""
    subset: str = ""


class EvaluationSet(NamedTuple):
    """What is scored together: queries against a gallery, or against themselves (gallery None)."""

    name: str
    queries: torch.utils.data.Dataset
    gallery: object = None


def add_arguments(parser):
    """Adds the group 'data' to an argparse parser."""
    group = parser.add_argument_group("data (what is learned from and tested on)")
    group.add_argument("--dataset", choices=DATASETS, default="cub200",
                       metavar="NAME",
                       help=f"{', '.join(DATASETS)}. glyphs is drawn from a font, folder takes "
                            "any folder of class folders, the others come as the reference has "
                            "them or as released. Default %(default)s (reference code)")
    group.add_argument("--image_size", type=auxiliaries.number(int, least=8, most=2048),
                       default=None, metavar="PX",
                       help="height and width of the network's input in pixels. Training crops it "
                            "at random (--crop_scale, and a flip); testing resizes to "
                            "--eval_resize and takes the centre. Default that of --dataset or "
                            "--arch, mostly 224")
    group.add_argument("--crop_scale", type=auxiliaries.number(float, above=0, most=1), nargs="+",
                       default=[0.08, 1.0], metavar="SHARE",
                       help="least share of an image's area in a training crop, and the "
                            "greatest, else 1. Default 0.08 1 (reference code)")
    group.add_argument("--interpolation", choices=("bilinear", "bicubic"), default="bilinear",
                       metavar="NAME", help="bilinear or bicubic (vision transformers), of all "
                                            "pictures. Default %(default)s")
    group.add_argument("--eval_resize", type=auxiliaries.number(int, least=8, most=4096),
                       metavar="PX", help="shorter side of test images before their centre is "
                                          "cut out. Default 8/7 of --image_size; 256 for 224 and "
                                          "227")
    group.add_argument("--val_split", type=auxiliaries.number(float, least=0, below=1),
                       default=0.0, metavar="SHARE",
                       help="hold out this share of the training classes, always the same ones, "
                            "and choose the best epoch on them; the run then reports the last "
                            "epoch, that choice, and the literature's, on the test classes. "
                            "Useful 0.1 to 0.5. Default %(default)s: the best on the test classes")
    group.add_argument("--cache", choices=("none", "ram", "device"), default="none",
                       metavar="WHERE",
                       help="decode each image once, at --eval_resize, and keep it in main "
                            "memory (ram) or on the --gpu (device). Test pictures stay the same; "
                            "training crops are cut from the reduced image, so numbers differ a "
                            "little. Default %(default)s")


def dataset_select(opt, device="cpu", views=1):
    """The options' training set, with so many views of an image, and their evaluation sets.

    device: where --cache device keeps images. Of each training batch a process gets its share.
    Returns (images.ImageDataset, [EvaluationSet, ...], Found). Raises FileNotFoundError or
    ValueError where the data is missing, damaged or too small, and where there is no room for the
    cache.
    """
    if len(opt.crop_scale) > 2 or opt.crop_scale != sorted(opt.crop_scale):
        raise ValueError(f"--crop_scale {' '.join(map(str, opt.crop_scale))}: it takes the least "
                         "share and, after it, the greatest")
    row, share = DATASETS[opt.dataset], (auxiliaries.rank(), auxiliaries.num_ranks())
    side = opt.eval_resize or images.shorter_side(opt.image_size)
    found = row.read(opt.source_path)
    if opt.val_split:
        found.splits.update(hold_out(found.splits["train"], opt.val_split))
    for problem in problems_of(found.splits):
        raise ValueError(f"--dataset {opt.dataset}: {problem} ({found.layout})")
    found = found._replace(digest=fingerprint(found.splits),
                           subset=remark_on_subset(opt.dataset, found.splits))
    stored = {}
    if opt.cache != "none":
        if isinstance(found.splits["train"].images, np.ndarray):
            raise ValueError(f"--cache {opt.cache}: the images of --dataset {opt.dataset} are in "
                             "memory already, leave it out")
        stored = images.cache_splits(opt.cache, found.splits, side, opt.interpolation, device)
    train_transform, test_transform = row.transforms(
        opt.image_size, views, crop_scale=(*opt.crop_scale, 1.0)[:2],
        interpolation=opt.interpolation, eval_resize=side)
    parts = {}
    for name, split in found.splits.items():
        given = ((train_transform, opt.seed, views, share, images.read_pixels)
                 if name == "train" else (test_transform,))
        parts[name] = images.ImageDataset(split, *given, stored=stored.get(name))
    return parts["train"], evaluation_sets(parts), found


def evaluation_sets(parts):
    """{split: dataset} -> [EvaluationSet, ...], that of the classes held out of training last.

    query is sought in gallery; any other split but train in itself, in sets numbered from 1.
    """
    if "gallery" in parts:
        sets = [EvaluationSet("", parts["query"], parts["gallery"])]
    else:
        tests = [part for name, part in parts.items() if name not in ("train", "val")]
        sets = [EvaluationSet(f"set {i}" * (len(tests) > 1), test)
                for i, test in enumerate(tests, start=1)]
    if "val" in parts:
        sets.append(EvaluationSet("val", parts["val"]))
    return sets


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
        kept = (split.images[chosen] if isinstance(split.images, np.ndarray) else
                [split.images[i] for i in chosen])
        parts[name] = Split(kept, [rank[split.labels[i]] for i in chosen],
                            [split.class_names[label] for label in rank])
    return parts


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
    """How many queries have no true match to find; queries, gallery: images.ImageDataset."""
    sizes = collections.Counter((gallery or queries).labels)
    return sum(sizes[label] < (2 if gallery is None else 1) for label in queries.labels)


def fingerprint(splits):
    """A digest of the splits' images and classes, wherever they lie; {name: Split} -> str."""
    digest = hashlib.sha256()
    for name, split in sorted(splits.items()):
        facts = (["/".join(path.split(os.sep)[-2:]) for path in split.images]
                 if isinstance(split.images, list) else [split.images.tobytes()])
        digest.update(repr((name, facts, split.labels, split.class_names)).encode(
            errors="surrogateescape"))
    return digest.hexdigest()


# ---- readers: source path -> Found


def read_cub200(source):
    """CUB200-2011: classes in the order of their folders' names, the first half trains."""
    root = find_root(source, ("cub200", "CUB_200_2011"),
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
                or any(os.path.splitext(path)[1].lower() in images.IMAGE_SUFFIXES
                       for path in glob.iglob(f"{glob.escape(root)}/*/*")))

    root = find_root(source, ("cars196", "stanford_cars", "car_data"), usable)
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
    halved = split_folders(root)
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
    """A file of CARS196's annotations -> [(class, image's path)].

    field: which of its fields has the image's path below the folder; names: of the classes.
    """
    names = dict(enumerate(names, start=1))
    try:
        cars = [(names[row["class"]], row[field]) for row in read_mat(path, "annotations")]
    except (KeyError, TypeError, IndexError):
        raise ValueError(f"{path}: not every image has a {field} and a class from 1 to "
                         f"{len(names)}; the test half's classes are in "
                         "cars_test_annos_withlabels.mat") from None
    paths = find_images(folder, [name for _, name in cars], path)
    return [(name, path) for (name, _), path in zip(cars, paths)]


def read_online_products(source):
    """Stanford Online Products: Ebay_train.txt and Ebay_test.txt say which class is where."""
    root = find_root(source, ("online_products", "Stanford_Online_Products"),
                     lambda root: any(os.path.exists(f"{folder}/Ebay_train.txt")
                                      for folder in (f"{root}/Info_Files", root)))
    lists = f"{root}/Info_Files" if os.path.exists(f"{root}/Info_Files/Ebay_train.txt") else root
    folder = f"{root}/images" if os.path.isdir(f"{root}/images") else root
    splits = {}
    for split in ("train", "test"):
        path = f"{lists}/Ebay_{split}.txt"
        rows = read_rows(path, columns=4, skip=1)  # the first line names the columns
        paths = find_images(folder, [row[3] for row in rows], path)
        splits[split] = labelled(paths, [row[1] for row in rows])
    return Found(f"{lists}/Ebay_*.txt with images in {folder}", splits, [])


def read_in_shop(source):
    """In-Shop Clothes: list_eval_partition.txt says which image trains, queries or is gallery.

    Its paths begin with img/ for both resolutions, img and img_highres; img is taken if both are
    there, as in the reference.
    """
    root = find_root(source, ("in-shop", "In-shop Clothes Retrieval Benchmark"),
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
    for unknown in {row[2] for row in rows} - {"train", "query", "gallery"}:
        raise ValueError(f"{path}: evaluation status {auxiliaries.one_line(unknown)}; it is one "
                         "of train, query, gallery")
    paths = find_images(folder, [row[0].removeprefix("img/") for row in rows], path)
    tested = [row[1] for row in rows if row[2] != "train"]
    splits = {}
    for split in ("train", "query", "gallery"):
        chosen = [i for i, row in enumerate(rows) if row[2] == split]
        splits[split] = labelled([paths[i] for i in chosen], [rows[i][1] for i in chosen],
                                 None if split == "train" else tested)
    lonely = len(set(splits["query"].labels) - set(splits["gallery"].labels))
    odd = [f"{lonely} query classes have no image in the gallery"] if lonely else []
    odd += [f"{other} is there too: {folder} is taken" for other in others]
    return Found(f"{path} with images in {folder}", splits, odd)


def read_vehicle_id(source):
    """PKU VehicleID: train_list.txt trains; the test lists of 800, 1600 and 2400 vehicles test."""
    root = find_root(source, ("vehicle_id", "VehicleID_V1.0", "VehicleID"),
                     lambda root: os.path.isdir(f"{root}/train_test_split"))
    splits = {}
    for split, name in (("train", "train_list"), ("test_800", "test_list_800"),
                        ("test_1600", "test_list_1600"), ("test_2400", "test_list_2400")):
        path = f"{root}/train_test_split/{name}.txt"
        rows = read_rows(path, columns=2)
        paths = find_images(f"{root}/image", [f"{row[0]}.jpg" for row in rows], path)
        splits[split] = labelled(paths, [row[1] for row in rows])
    return Found(f"{root}/train_test_split with images in {root}/image", splits, [])


def read_folder(source):
    """Any folder of class folders, or train/ and test/ (or val/) with class folders in each."""
    expected = f"--dataset folder expects {DATASETS['folder'].layout}"
    if not os.path.isdir(source):
        raise FileNotFoundError(f"--source_path {source} is not a folder; {expected}")
    halved, folders = split_folders(source), listing(source, collections.Counter())[1]
    train, test = halved.get("train"), halved.get("test", halved.get("val"))
    if train and test:
        (of_train, odd), (of_test, more) = class_folders(train), class_folders(test)
        beside = [f"{path}, beside {train} and {test}, is left out"
                  for path in folders if path not in (train, test)]
        return Found(f"class folders in {train} and {test}",
                     {"train": from_classes(of_train), "test": from_classes(of_test)},
                     odd + more + beside)
    if halved and len(folders) == 1:
        raise FileNotFoundError(f"{source} holds {os.path.basename(folders[0])} alone; {expected}")
    return halves(f"class folders in {source}", *class_folders(source))


def read_tiny_imagenet(source):
    """Tiny ImageNet: train/ trains and val/ tests, with the same 200 classes in both."""
    root = find_root(source, ("tiny_imagenet", "tiny-imagenet-200"),
                     lambda root: os.path.exists(f"{root}/val/val_annotations.txt"))
    by_class, odd = class_folders(f"{root}/train")
    path = f"{root}/val/val_annotations.txt"
    rows = read_rows(path, columns=6)
    paths = find_images(f"{root}/val/images", [row[0] for row in rows], path)
    train, names = from_classes(by_class), [row[1] for row in rows]
    foreign = sorted(set(names) - set(train.class_names))
    if foreign:
        raise ValueError(f"{path} names {len(foreign)} classes that have no images in "
                         f"{root}/train, the first of them {auxiliaries.one_line(foreign[0])}")
    test = labelled(paths, names, train.class_names)
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


def draw_glyphs(character, count, generator, size=32):
    """count drawings of a character, distorted at random -> uint8 [count, size, size].

    White on black. Rotation up to 20 degrees, scale 0.7 to 1.05, shear up to 0.25, shift up to 3
    pixels, noise.
    """
    canvas = Image.new("L", (96, 96))
    ImageDraw.Draw(canvas).text((48, 48), character, fill=255, anchor="mm",
                                font=ImageFont.load_default(64))
    drawings = np.empty((count, size, size), dtype=np.uint8)
    for image in drawings:
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
    return drawings


# ---- the table


PICTURE_FLAGS = ("crop_scale", "interpolation", "eval_resize")  # of images.crop_transforms


class Dataset(NamedTuple):
    """What is known of a dataset beside its images.

    read: a folder's path -> Found; layout: the trees that it accepts, in words; published: {split:
    (classes, images, None where it is not said)}, as with the data or its retrieval protocol;
    defaults: {option: value} where main's would not suit; archive: (address, MD5) of a public one
    with a folder of its own name; ask: where else the data is had from, {} being its folder;
    transforms: as images.crop_transforms; flags: options that not every dataset has.
    """

    read: object
    layout: str
    published: dict = {}
    defaults: dict = {}
    archive: tuple = ()
    ask: str = ""
    transforms: object = images.crop_transforms
    flags: tuple = PICTURE_FLAGS


# The checksums are as in Avalanche 0.6.
DATASETS = {
    "cub200": Dataset(
        read_cub200,
        layout="cub200/images/<class>/*.jpg, or the release as it unzips: "
               "CUB_200_2011/images.txt, image_class_labels.txt and images/<class>/*.jpg",
        published={"train": (100, 5864), "test": (100, 5924)},
        archive=("https://data.caltech.edu/records/65de6-vp158/files/CUB_200_2011.tgz",
                 "97eceeb196236b17998738112f37df78")),
    "cars196": Dataset(
        read_cars196,
        layout="cars196/images/<class>/*.jpg, cars196/<class>/*.jpg, cars196/train/<class>/*.jpg "
               "with test/<class>/*.jpg, cars196/cars_annos.mat with car_ims/*.jpg, or (also in "
               "stanford_cars/) cars_train/*.jpg, cars_test/*.jpg and devkit/ with "
               "cars_meta.mat, cars_train_annos.mat and cars_test_annos_withlabels.mat",
        published={"train": (98, 8054), "test": (98, 8131)},
        ask="the links of https://ai.stanford.edu/~jkrause/cars/car_dataset.html are gone; "
            "https://github.com/pytorch/vision/issues/7545 says who has copies; unpack them in "
            "{}"),
    "online_products": Dataset(
        read_online_products,
        layout="online_products/images/<type>_final/*.JPG with online_products/Info_Files/"
               "Ebay_train.txt and Ebay_test.txt, or the release as it unzips: "
               "Stanford_Online_Products/Ebay_train.txt, Ebay_test.txt, <type>_final/*.JPG",
        published={"train": (11318, 59551), "test": (11316, 60502)},
        defaults={"k_vals": [1, 10, 100, 1000]},
        ask="fetch ftp://cs.stanford.edu/cs/cvgl/Stanford_Online_Products.zip, or see "
            "https://github.com/rksltnl/Deep-Metric-Learning-CVPR16; unzip it in {}"),
    "in-shop": Dataset(
        read_in_shop,
        layout="in-shop/Eval/list_eval_partition.txt with in-shop/img/..., in-shop/Img/img/... or "
               "in-shop/Img/img_highres/...",
        published={"train": (3997, 25882), "query": (3985, 14218), "gallery": (3985, 12612)},
        defaults={"k_vals": [1, 10, 20, 30, 50]},
        ask="ask at https://mmlab.ie.cuhk.edu.hk/projects/DeepFashion.html for the In-shop "
            "Clothes Retrieval Benchmark; unzip its Img/img.zip and put its Eval/ in {}"),
    "vehicle_id": Dataset(
        read_vehicle_id,
        layout="vehicle_id/image/*.jpg with vehicle_id/train_test_split/train_list.txt and "
               "test_list_800.txt, test_list_1600.txt, test_list_2400.txt",
        published={"train": (13134, 110178), "test_800": (800, None), "test_1600": (1600, None),
                   "test_2400": (2400, None)},
        defaults={"k_vals": [1, 5]},
        ask="ask at https://www.pkuml.org/resources/pku-vehicleid.html; unzip it in "
            "--source_path",
        flags=("vehicle_protocol", *PICTURE_FLAGS)),
    "tiny_imagenet": Dataset(
        read_tiny_imagenet,
        layout="tiny_imagenet/train/<class>/images/*.JPEG with tiny_imagenet/val/"
               "val_annotations.txt and val/images/*.JPEG, or the release's tiny-imagenet-200/",
        published={"train": (200, 100000), "test": (200, 10000)},
        archive=("http://cs231n.stanford.edu/tiny-imagenet-200.zip",
                 "90528d7ca1a48142e341f4ef8d21d0de")),
    "folder": Dataset(
        read_folder,
        layout="<class>/*.jpg (the first half of the sorted classes trains, the second tests), or "
               "train/<class>/*.jpg and test/<class>/*.jpg (or val/), directly below "
               "--source_path",
        ask="these are your own images, in class folders in --source_path"),
    "glyphs": Dataset(
        read_glyphs,
        layout="drawn, no files are needed",
        defaults={"arch": "convnet", "image_size": 32, "n_epochs": 20, "tau": [15], "lr": 1e-3,
                  "proxy_lr": 1e-2, "loss_lr": 1e-2, "kernels": 0},
        transforms=images.fit_transforms, flags=()),
}


# ---- what the readers share


def find_root(source, names, usable):
    """The folder of a dataset that is usable: source/name, or source itself.

    names: the dataset's, then its archive's, which may lie unpacked in a folder of either name.
    FileNotFoundError with the layouts, and how the data is had, if there is none.
    """
    dataset = names[0]
    row, given = DATASETS[dataset], f" --source_path {source}" * (source != "./Datasets")
    expected = f"accepted below it: {row.layout}"
    if row.archive or row.ask:
        expected += (f". python datasets.py --dataset {dataset} --download{given} "
                     + ("fetches it" if row.archive else "says where it is to be had"))
    if not os.path.isdir(source):
        raise FileNotFoundError(f"--source_path {source} is not a folder; {expected}")
    nested = itertools.starmap(os.path.join, itertools.product(names, names))
    for root in (*(os.path.join(source, name) for name in (*names, *nested)), source):
        if usable(root):
            return root
    raise FileNotFoundError(f"--source_path {source} holds no {dataset}; {expected}. The "
                            "dataset's own folder may be given as well")


def unpacked(folder):
    """A folder, or the one of the same name inside it, which unpacking an archive may leave."""
    inner = os.path.join(folder, os.path.basename(folder))
    return inner if os.path.isdir(inner) else folder


def listing(folder, left):
    """(images, folders) of a folder, sorted paths; all else is counted in left by suffix."""
    paths, folders = [], []
    for name in sorted(os.listdir(folder)):
        path, suffix = os.path.join(folder, name), os.path.splitext(name)[1].lower()
        if name.startswith("."):
            left["hidden"] += 1
        elif suffix in images.IMAGE_SUFFIXES:
            paths.append(path)
        elif os.path.isdir(path):
            folders.append(path)
        else:
            left[suffix or "without a suffix"] += 1
    return paths, folders


def split_folders(root):
    """{"train", "test" or "val": the folder of that name, in any case, also as training}."""
    found = {}
    for name in sorted(os.listdir(root)):
        split = re.sub("ing$|id$|idation$", "", name.lower())
        if split in ("train", "test", "val") and os.path.isdir(f"{root}/{name}"):
            found.setdefault(split, f"{root}/{name}")
    return found


def class_folders(root):
    """({class folder's name: [paths of its images]}, [remarks on what is left out]), sorted.

    A class's images lie in its folder, or one folder deeper. ValueError for folders of class
    folders: none has images of its own, and most names of what lies deeper come but once.
    """
    left, odd, classes, direct, inner = collections.Counter(), [], {}, False, []
    beside, folders = listing(root, left)
    left["images beside the class folders"] = len(beside)
    for folder in folders:
        paths, deeper = listing(folder, left)
        direct |= bool(paths)
        for view in deeper:
            found, lost = listing(view, left)
            left["folders too deep"] += len(lost)
            paths += found
            inner += [view] * bool(found)
        classes[os.path.basename(folder)] = paths
    filled = {name: paths for name, paths in classes.items() if paths}
    names = {os.path.basename(path) for path in inner}
    if not direct and len(inner) > len(filled) and 2 * len(names) > len(inner):
        above, name = os.path.split(inner[0])
        raise ValueError(f"{root} holds super-classes and not classes: {above} has no images, but "
                         f"{name} in it has. Give {above} as --source_path, or move or link the "
                         "class folders of all into one folder")
    empty = [name for name in classes if name not in filled]
    if empty:
        odd.append(f"{len(empty)} class folders in {root} hold no image, e.g. {empty[0]}")
    if left := +left:
        counts = [f"{count:,} {kind}" for kind, count in left.most_common(10)]
        odd.append(f"left out in {root}: {', '.join(counts)}" + ", ..." * (len(left) > 10))
    return filled, odd


def from_classes(by_class):
    """{class: [paths]} -> Split, labels in the dict's order."""
    return Split([path for paths in by_class.values() for path in paths],
                 [label for label, paths in enumerate(by_class.values()) for _ in paths],
                 list(by_class))


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
    cut = len(names) // 2
    splits = {split: from_classes({name: by_class[name] for name in half})
              for split, half in (("train", names[:cut]), ("test", names[cut:]))}
    return Found(f"{layout}, {len(names)} classes in all", splits, list(odd))


def labelled(paths, ids, all_ids=None):
    """Images and the class id of each -> Split; labels: the ids' ranks (in all_ids if given)."""
    unique = set(ids if all_ids is None else all_ids)
    names = sorted(unique, key=lambda name: (len(name), name) if name.isdigit() else (0, name))
    rank = {name: i for i, name in enumerate(names)}
    return Split(paths, [rank[name] for name in ids], names)


def read_rows(path, columns, skip=0):
    """The rows of a list file as lists of strings; ValueError names the line that is not whole."""
    try:
        with open(path, encoding="utf-8-sig") as file:
            lines = file.read().replace("\\", "/").rstrip().split("\n")[skip:]
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: the list file is not there") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not a list file in UTF-8 ({error})") from None
    if not any(lines):
        raise ValueError(f"{path}: the list file is empty")
    rows = [line.split() for line in lines]
    for number, row in enumerate(rows, start=skip + 1):
        if len(row) != columns:
            raise ValueError(f"{path}, line {number}: {len(row)} columns where there should be "
                             f"{columns}, separated by spaces: {' '.join(row)[:80]!r}; is the "
                             "file cut?")
    return rows


def read_mat(path, variable):
    """A variable of a MATLAB 5 file, compressed as MATLAB writes it -> lists, dicts and scalars.

    scipy's reader may take the process down where a damaged file is not compressed; such files
    are refused, as are damaged ones, with a ValueError.
    """
    import scipy.io  # here, so that others need not wait for it

    try:
        with open(path, "rb") as file:
            content = file.read()
        at = 128
        while at < len(content):
            kind, size = struct.unpack_from("<II", content, at)
            if kind != 15 or content[124:128] != b"\0\1IM":
                raise ValueError("not compressed as save -v7 does it")
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
        if directory not in listings:
            entries = os.listdir(directory) if os.path.isdir(directory) else []
            # The exact name comes first, then one that differs in the suffix's case.
            listings[directory] = ({suffix_folded(entry): entry for entry in entries}
                                   | {entry: entry for entry in entries})
        listed = listings[directory]
        actual = listed.get(file, listed.get(suffix_folded(file)))
        if actual is None:
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


# ---- the dataset check


def check(dataset, source_path, quick=False):
    """Prints what was found beside what is published; returns whether the data is usable."""
    found, published = DATASETS[dataset].read(source_path), DATASETS[dataset].published
    lines, odd = [f"{dataset}: {found.layout}"], list(found.odd)
    problems = problems_of(found.splits)
    for name, split in found.splits.items():
        sizes = collections.Counter(split.labels)
        line = f"  {name}: {len(sizes):,} classes/{len(split.labels):,} images"
        if name in published:
            classes, count = published[name]
            line += f" (published {classes:,}" + (f"/{count:,})" if count else " classes)")
        if sizes:
            (large, most), (small, fewest) = sizes.most_common()[0], sizes.most_common()[-1]
            line += (f"; smallest class {split.class_names[small]} with {fewest}, largest "
                     f"{split.class_names[large]} with {most}")
        lines.append(line)
        single = sum(size == 1 for size in sizes.values())
        if single and name not in ("query", "gallery"):
            odd.append(f"{single} classes of the {name} split have one image only")
        if isinstance(split.images, list):
            problems += images.broken_images(split.images, name, quick)
    subset = remark_on_subset(dataset, found.splits)
    lines += [f"  note: {remark}" for remark in (*odd, *[subset] * bool(subset))]
    lines += [f"  problem: {problem}" for problem in problems]
    for line in (*lines, "not usable" if problems else "usable"):
        print(auxiliaries.printable(line))
    return not problems


def remark_on_subset(dataset, splits):
    """What a dataset's size says of published numbers, as a sentence; "" where it is whole.

    splits: {name: Split}; val, where there is one, is held out of train.
    """
    for name, (classes, count) in DATASETS[dataset].published.items():
        parts = [splits[part] for part in (name, "val") if part == name or
                 name == "train" and part in splits]
        found = (sum(len(set(part.labels)) for part in parts),
                 sum(len(part.labels) for part in parts))
        if found[0] != classes or count not in (None, found[1]):
            return (f"the {name} split has {found[0]:,} classes/{found[1]:,} images, not "
                    f"{dataset}'s {classes:,}" + f"/{count:,}" * bool(count)
                    + ": published numbers do not apply")
    return ""


# ---- download


def download(dataset, source):
    """Puts a dataset from its public archive where its reader looks; nothing if it is there.

    A whole archive that lies in the folder source already is used, one that is cut fetched anew.
    Raises FileNotFoundError with where to ask for a dataset without a public archive; OSError
    where it cannot be had.
    """
    from torchvision.datasets.utils import download_url  # here, so that --help need not wait

    row, target = DATASETS[dataset], os.path.join(source, dataset)
    with contextlib.suppress(ValueError, OSError):
        row.read(source)
        print(f"{dataset} is there already: nothing is downloaded (move it away to get it anew)")
        return
    if not row.archive:
        raise FileNotFoundError(f"--download has no public archive of {dataset}: "
                                f"{row.ask.format(target)}. Accepted below {source}: {row.layout}")
    if os.path.lexists(target):
        raise FileExistsError(f"{target} is there, but no usable {dataset}: move it away for "
                              "--download to put the dataset there")
    url, md5 = row.archive
    name = url.rpartition("/")[2]
    path = os.path.join(source, name)
    print(auxiliaries.printable(f"downloading {url} to {path}"))
    try:
        download_url(url, source, name, md5)
    except (OSError, RuntimeError, http.client.HTTPException) as error:
        raise OSError(f"{url} cannot be downloaded ({error}). Fetch it elsewhere, put it at "
                      f"{path} (its MD5 checksum is {md5}) and run this again") from error
    print(auxiliaries.printable(f"unpacking {path}"))
    safe = {"filter": "data"} if path.endswith(".tgz") and hasattr(tarfile, "data_filter") else {}
    with tempfile.TemporaryDirectory(dir=source) as place:  # beside target until it is whole
        shutil.unpack_archive(path, place, **safe)
        os.replace(os.path.join(place, os.path.splitext(name)[0]), target)
    print(auxiliaries.printable(f"unpacked in {target}; {path} is not needed any more"))


def main(argv=None):
    """python datasets.py: download and check; exits with 0 only when the data is usable."""
    parser = auxiliaries.Parser(
        prog="datasets.py",
        description="Says what a dataset folder holds, beside the published counts, and what is "
                    "missing or odd. Exit status 0 only when the data can be trained on.")
    parser.add_argument("--dataset", choices=DATASETS, default="cub200",
                        help="which reader to use")
    parser.add_argument("--source_path", type=os.path.expanduser, default="./Datasets",
                        metavar="DIR",
                        help="as for main.py; default %(default)s")
    parser.add_argument("--quick", action="store_true",
                        help="do not read every image, only look that its file is there")
    parser.add_argument("--download", action="store_true",
                        help=f"first fetch and unpack the data if it is not there: "
                             f"{', '.join(name for name in DATASETS if DATASETS[name].archive)}; "
                             "for the others it says where to ask. An archive that lies in "
                             "--source_path is used")
    with auxiliaries.one_message("datasets.py"):
        args = parser.parse_args(argv)
        if args.download:
            download(args.dataset, args.source_path)
        return 0 if check(args.dataset, args.source_path, args.quick) else 1


if __name__ == "__main__":
    sys.exit(main())
