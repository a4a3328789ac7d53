"""The datasets: readers on tiny generated trees, whole and damaged; glyphs; the dataset check."""

import io
import os
import random
import runpy
import shutil
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.io
import torch
from PIL import Image

import datasets

# ---- trees: each builder makes one layout below a folder -> {split: [(path below it, class)]}


def write_image(path, colour=(200, 60, 20), size=(6, 6)):
    """A small image of one colour, in the format that the path's suffix names."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)


def noise(path, size=(40, 30), seed=0):
    """An image in which every crop can be told from every other."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return pixels


def break_image(path, kind):
    """An image file that cannot be read."""
    good = path.with_suffix(".good.jpg")
    noise(good)
    whole = good.read_bytes()
    good.unlink()
    path.write_bytes({"truncated": whole[:len(whole) // 2], "text": b"this is no image\n",
                      "empty": b"", "header only": whole[:20],
                      "png header only": b"\x89PNG\r\n\x1a\n"}[kind])


def write_classes(root, names):
    """Class folders with two images each -> {class: [paths below root]}."""
    made = {name: [f"{name}/{name[-3:]}_{i}.jpg" for i in (1, 2)] for name in names}
    for path in sum(made.values(), []):
        write_image(root / path)
    return made


def expect_halves(prefix, made):
    """What the halves of the sorted classes hold."""
    names = sorted(made)
    parts = {"train": names[:len(names) // 2], "test": names[len(names) // 2:]}
    return {split: [(f"{prefix}{path}", name) for name in part for path in made[name]]
            for split, part in parts.items()}


BIRDS = ["001.Albatross", "002.Auklet", "003.Bunting", "004.Cardinal"]
CARS = ["AM General Hummer SUV 2000", "Acura RL Sedan 2012", "BMW M3 Coupe 2012",
        "Ram C-V Cargo Van 2012"]


def class_folders(folder, names):
    return lambda source: expect_halves(folder, write_classes(source / folder, names))


def cub200_release(source):
    root = source / "CUB_200_2011"
    made = write_classes(root / "images", BIRDS)
    paths = sum(made.values(), [])
    classes = [i + 1 for i, name in enumerate(BIRDS) for _ in made[name]]
    for file, values in (("images", paths), ("image_class_labels", classes), ("classes", BIRDS),
                         ("train_test_split", [0] * len(paths))):
        lines = [f"{i} {value}\n" for i, value in enumerate(values, start=1)]
        (root / f"{file}.txt").write_text("".join(lines))
    write_image(root / "images" / BIRDS[0] / "not_listed.jpg")
    return expect_halves("CUB_200_2011/images/", made)


def write_annotations(path, fields, rows):
    """A struct array and the class names, compressed as MATLAB writes it; rows: of the fields."""
    table = np.zeros((1, len(rows)), dtype=[(field, object) for field in fields])
    for i, row in enumerate(rows):
        table[0, i] = tuple(value if isinstance(value, str) else np.uint8(value) for value in row)
    path.parent.mkdir(parents=True, exist_ok=True)
    scipy.io.savemat(path, {"annotations": table, "class_names": np.array([CARS], object)},
                     do_compression=True)


def cars196_release(source):
    root, made = source / "cars196", {name: [] for name in CARS}
    numbers = [3, 1, 2, 4, 1, 2, 3, 4]  # the release's images are not sorted by class
    files = [f"car_ims/{i:06d}.jpg" for i in range(1, 9)]
    for file, number in zip(files, numbers):
        write_image(root / file)
        made[CARS[number - 1]].append(file)
    write_annotations(root / "cars_annos.mat", ("relative_im_path", "bbox_x1", "class"),
                      [(file, 1, number) for file, number in zip(files, numbers)])
    return expect_halves("cars196/", made)


def cars196_devkit(source, folder="cars196", labels="devkit"):
    """The release for classification, all classes in both halves."""
    root, made = source / folder, {name: [] for name in CARS}
    for half, numbers, place in (("train", [2, 1, 4, 3], "devkit/cars_train_annos"),
                                 ("test", [4, 4, 1, 2, 3],
                                  f"{labels}/cars_test_annos_withlabels")):
        files = [f"{i:05d}.jpg" for i in range(1, len(numbers) + 1)]  # the same in both halves
        for file, number in zip(files, numbers):
            write_image(root / f"cars_{half}/{file}")
            made[CARS[number - 1]].append(f"cars_{half}/{file}")
        write_annotations(root / f"{place}.mat", ("bbox_x1", "class", "fname"),
                          [(1, number, file) for file, number in zip(files, numbers)])
    write_annotations(root / "devkit/cars_meta.mat", ("none",), [])
    return expect_halves(f"{folder}/", made)


def cars196_by_class(source):
    root, made = source / "car_data/car_data", {name: [] for name in CARS}
    for half in ("train", "test"):
        for name, paths in write_classes(root / half, CARS).items():
            made[name] += [f"{half}/{path}" for path in paths]
    return expect_halves("car_data/car_data/", made)


def online_products(source, images, lists):
    """Images by product type and the two lists, whose class ids have one and two digits."""
    expected = {}
    (source / lists).mkdir(parents=True)
    (source / lists / "bicycle.txt").write_text("1 2 3\n")
    for split, ids in (("train", (8, 9, 10)), ("test", (11, 12))):
        lines, expected[split] = ["image_id class_id super_class_id path\n"], []
        for number in (*ids, *ids):
            path = f"bicycle_final/{1110 + number}_{len(lines)}.JPG"
            write_image(source / images / path)
            lines.append(f"{len(lines)} {number} 1 {path}\n")
            expected[split].append((f"{images}/{path}", str(number)))
        (source / lists / f"Ebay_{split}.txt").write_text("".join(lines))
    return expected


def in_shop(source, folder="img"):
    """Two training items and two that are both queries and gallery; the first row trains.

    folder: where the images lie; the list has img/ there, for each resolution.
    """
    root = source / "in-shop"
    rows, expected = [], {"train": [], "query": [], "gallery": []}
    for number, statuses in ((1, ("train", "train")), (2, ("train", "train")),
                             (3, ("query", "gallery")), (12, ("gallery", "query", "gallery"))):
        for i, status in enumerate(statuses):
            path = f"WOMEN/Dresses/id_{number:08d}/0{i}_1_front.jpg"
            write_image(root / folder / path)
            rows.append(f"{f'img/{path}':<60} id_{number:08d} {status}\n")
            expected[status].append((f"in-shop/{folder}/{path}", f"id_{number:08d}"))
    (root / "Eval").mkdir(exist_ok=True)
    (root / "Eval/list_eval_partition.txt").write_text(
        f"{len(rows)}\nimage_name item_id evaluation_status\n" + "".join(rows))
    return expected


def vehicle_id(source):
    root, expected, count = source / "vehicle_id", {}, 0
    (root / "train_test_split").mkdir(parents=True)
    for split, name, vehicles in (("train", "train_list", 2), ("test_800", "test_list_800", 2),
                                  ("test_1600", "test_list_1600", 3),
                                  ("test_2400", "test_list_2400", 4)):
        lines, expected[split] = [], []
        for vehicle in (*range(8, 8 + vehicles), *range(8, 8 + vehicles)):
            count += 1
            write_image(root / f"image/{count:07d}.jpg")
            lines.append(f"{count:07d} {vehicle}\n")
            expected[split].append((f"vehicle_id/image/{count:07d}.jpg", str(vehicle)))
        (root / f"train_test_split/{name}.txt").write_text("".join(lines))
    return expected


def tiny_imagenet(source, name="tiny_imagenet"):
    """Two training images and two listed ones of each class, beside files that are not read."""
    root, ids = source / name, ["n01443537", "n01629819", "n02124075"]
    expected = {"train": [], "test": []}
    for wnid in ids:
        for i in range(2):
            write_image(root / f"train/{wnid}/images/{wnid}_{i}.JPEG")
            expected["train"].append((f"{name}/train/{wnid}/images/{wnid}_{i}.JPEG", wnid))
        (root / f"train/{wnid}/{wnid}_boxes.txt").write_text(f"{wnid}_0.JPEG\t0\t0\t5\t5\n")
    lines = []
    for i, wnid in enumerate(ids[::-1] + ids):  # the release's list is not sorted by class
        write_image(root / f"val/images/val_{i}.JPEG")
        lines.append(f"val_{i}.JPEG\t{wnid}\t0\t1\t5\t5\n")
        expected["test"].append((f"{name}/val/images/val_{i}.JPEG", wnid))
    (root / "val/val_annotations.txt").write_text("".join(lines))
    (root / "wnids.txt").write_text("".join(f"{wnid}\n" for wnid in ids))
    write_image(root / "test/images/test_0.JPEG")
    return expected


def folder_train_test(source, train="train", test="test"):
    expected = {}
    for split, folder, names in (("train", train, ["cat", "dog"]),
                                 ("test", test, ["ant", "bee", "elk"])):
        made = write_classes(source / folder, names)
        expected[split] = [(f"{folder}/{path}", name) for name in names for path in made[name]]
    return expected


# name: (dataset, its own folder below the source path, builder)
SHOP, RELEASE = "online_products", "Stanford_Online_Products"
TREES = {
    "cub200-folders": ("cub200", "cub200", class_folders("cub200/images/", BIRDS)),
    "cub200-release": ("cub200", "CUB_200_2011", cub200_release),
    "cars196-images": ("cars196", "cars196", class_folders("cars196/images/", CARS)),
    "cars196-folders": ("cars196", "cars196", class_folders("cars196/", CARS)),
    "cars196-release": ("cars196", "cars196", cars196_release),
    "cars196-devkit": ("cars196", "cars196", cars196_devkit),
    "cars196-torchvision": ("cars196", "stanford_cars",
                            lambda source: cars196_devkit(source, "stanford_cars", ".")),
    "cars196-split-folders": ("cars196", "car_data", cars196_by_class),
    "products-reference": (SHOP, SHOP, lambda source: online_products(
        source, f"{SHOP}/images", f"{SHOP}/Info_Files")),
    "products-release": (SHOP, RELEASE, lambda source: online_products(source, RELEASE, RELEASE)),
    "products-info": (SHOP, SHOP, lambda source: online_products(
        source, f"{SHOP}/{RELEASE}", f"{SHOP}/{RELEASE}/Info_Files")),
    "in-shop-img": ("in-shop", "in-shop", in_shop),
    "in-shop-img-img": ("in-shop", "in-shop", lambda source: in_shop(source, "Img/img")),
    "in-shop-highres": ("in-shop", "in-shop", lambda source: in_shop(source, "Img/img_highres")),
    "vehicle_id": ("vehicle_id", "vehicle_id", vehicle_id),
    "tiny_imagenet": ("tiny_imagenet", "tiny_imagenet", tiny_imagenet),
    "tiny_imagenet-release": ("tiny_imagenet", "tiny-imagenet-200",
                              lambda source: tiny_imagenet(source, "tiny-imagenet-200")),
    "folder-halves": ("folder", "", class_folders("", ["apple", "banana", "cherry", "date", "e"])),
    "folder-train-test": ("folder", "", folder_train_test),
}
LISTS = {  # the list files of the trees that have some
    "cub200-release": ("CUB_200_2011/images.txt", "CUB_200_2011/image_class_labels.txt"),
    "products-reference": (f"{SHOP}/Info_Files/Ebay_train.txt",
                           f"{SHOP}/Info_Files/Ebay_test.txt"),
    "in-shop-img": ("in-shop/Eval/list_eval_partition.txt",),
    "vehicle_id": ("vehicle_id/train_test_split/train_list.txt",
                   "vehicle_id/train_test_split/test_list_1600.txt"),
    "tiny_imagenet": ("tiny_imagenet/val/val_annotations.txt",),
}
PUBLISHED = {
    "cub200": ["100/5,864", "100/5,924"], "cars196": ["98/8,054", "98/8,131"],
    "online_products": ["11,318/59,551", "11,316/60,502"],
    "in-shop": ["3,997/25,882", "3,985/14,218", "3,985/12,612"],
    "vehicle_id": ["13,134/110,178", "800 classes", "1,600 classes", "2,400 classes"],
    "tiny_imagenet": ["200/100,000", "200/10,000"]}


@pytest.fixture
def source(tmp_path):
    """An empty folder for trees; its name has a space and a letter beyond ASCII."""
    (tmp_path / "my data é").mkdir()
    return tmp_path / "my data é"


def made(tree, source):
    """Makes a tree -> (its dataset, what it holds as contents has it)."""
    return TREES[tree][0], {split: sorted(items)
                            for split, items in TREES[tree][2](source).items()}


def read(dataset, source):
    return datasets.DATASETS[dataset].read(str(source))


def contents(dataset, source, given=None):
    """What is found, in the form of the builders: {split: [(path below source, class), ...]}.

    given: the --source_path where it is not source.
    """
    return {split: sorted((os.path.relpath(path, source), part.class_names[label])
                          for path, label in zip(part.images, part.labels, strict=True))
            for split, part in read(dataset, given or source).splits.items()}


def options(dataset, source, image_size=16, seed=0, **others):
    return SimpleNamespace(**{"crop_scale": [0.08, 1.0], "interpolation": "bilinear",
                              "eval_resize": None,
                              "dataset": dataset, "source_path": str(source), "seed": seed,
                              "image_size": image_size, "val_split": 0, "cache": "none", **others})


def use(dataset, source, items=True):
    """Selects a dataset and reads every item -> the ValueError or OSError that it ends with.

    None where it ends well. Other errors, and those of decoding a text, mean nothing to a user:
    they fail the test. items: whether images are read.
    """
    try:
        train, sets, _ = datasets.dataset_select(options(dataset, source))
        for part in (train, *[part for each in sets for part in each[1:] if part is not None]):
            for i in range(len(part) * items):
                part[i]
    except (ValueError, OSError) as error:
        assert not isinstance(error, UnicodeError), repr(error)
        assert str(source) in str(error), f"the message names no path: {error!r}"
        return error
    return None


def checked(capsys, dataset, source, *flags):
    """The return code and the output of python datasets.py."""
    try:
        code = datasets.main(["--dataset", dataset, "--source_path", str(source), *flags])
    except SystemExit as stop:
        return 1, stop.code
    return code, capsys.readouterr().out


# ---- readers on whole trees


@pytest.mark.parametrize("tree", TREES)
def test_every_layout_is_read_whole(tree, source, capsys):
    dataset, expected = made(tree, source)
    found, own = read(dataset, source), source / TREES[tree][1]
    for given in (source, own, f"{own}/"):
        assert contents(dataset, source, given) == expected
    assert found.odd == ([] if dataset != "tiny_imagenet" else
                         [f"left out in {own}/train: 3 .txt"])
    for split in found.splits.values():
        assert {type(label) for label in split.labels} == {int}
        assert sorted(set(split.labels)) == list(range(len(set(split.class_names))))
        key = int if all(name.isdigit() for name in split.class_names) else str
        assert split.class_names == sorted(split.class_names, key=key)
    assert use(dataset, source) is None
    for flags in ([], ["--quick"]):
        code, output = checked(capsys, dataset, source, *flags)
        assert code == 0 and output.endswith("\nusable\n")
        for split, items in expected.items():
            classes = len({name for _, name in items})
            assert f"{split}: {classes} classes/{len(items)} images" in output
        assert ("published numbers do not apply" in output) == (dataset in PUBLISHED)
        assert all(f"(published {count})" in output for count in PUBLISHED.get(dataset, ()))


@pytest.mark.parametrize("dataset, folder", [("cub200", "cub200/images"), ("cars196", "cars196"),
                                             ("folder", "")])
def test_what_is_no_image_of_a_class_is_left_out_and_counted(dataset, folder, source):
    root, made = source / folder, {}
    for name in BIRDS:
        made[name] = [f"{name}/image{suffix}" for suffix in
                      (".JPG", ".Png", ".jpeg", ".webp", ".jfif", ".ppm", ".pgm")]
        for path, form in zip(made[name], (None, None, None, None, "JPEG", "PPM", "PPM")):
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            Image.new("L" if path.endswith("pgm") else "RGB", (6, 6)).save(root / path, form)
    made[BIRDS[1]].append(f"{BIRDS[1]}/deeper/image.jpg")
    for path in (f"{BIRDS[1]}/deeper/image.jpg", f"{BIRDS[0]}/.hidden.jpg", "outside.jpg",
                 ".thumbnails/small.jpg", f"{BIRDS[1]}/deeper/still/image.jpg"):
        write_image(root / path)
    for path in (f"{BIRDS[2]}/notes.txt", f"{BIRDS[2]}/Thumbs.db", f"{BIRDS[3]}/jpg",
                 f"{BIRDS[3]}/more.TXT"):
        (root / path).write_text("no image")
    (root / "000/nested").mkdir(parents=True)  # the half of the classes is of those with images
    assert contents(dataset, source) == {split: sorted(items) for split, items in
                                         expect_halves(f"{folder}/".lstrip("/"), made).items()}
    empty, remark = read(dataset, source).odd
    assert empty.startswith("1 class folders") and empty.endswith("e.g. 000")
    where, counts = remark.rsplit(": ", 1)
    assert where == f"left out in {os.path.join(source, folder)}".rstrip("/")
    assert sorted(counts.split(", ")) == [
        "1 .db", "1 folders too deep", "1 images beside the class folders", "1 without a suffix",
        "2 .txt", "2 hidden"]
    assert use(dataset, source) is None


@pytest.mark.parametrize("tree", [*LISTS, "cars196-release"])
def test_what_a_list_and_the_names_of_its_images_may_differ_in(tree, source):
    dataset, expected = made(tree, source)
    for path in LISTS.get(tree, ()):
        text = (source / path).read_text()
        for other in (text.replace("\n", "\r\n") + "\r\n  \r\n\r\n",
                      text.rstrip("\n").replace("/", "\\")):
            (source / path).write_bytes(other.encode())
            assert contents(dataset, source) == expected
    for path in [path for path in source.rglob("*.*") if path.suffix.lower() in (".jpg", ".jpeg")]:
        path.rename(path.with_suffix(path.suffix.swapcase()))

    def lower(splits):
        return {split: [(path.lower(), name) for path, name in items]
                for split, items in splits.items()}

    assert lower(contents(dataset, source)) == lower(expected)
    assert use(dataset, source) is None


def test_two_images_that_differ_in_suffix_case_only_are_two(source):
    made("products-release", source)
    write_image(source / RELEASE / "bicycle_final/1118_1.jpg")
    with open(source / RELEASE / "Ebay_train.txt", "a") as file:
        file.write("7 8 1 bicycle_final/1118_1.jpg\n")
    images = read("online_products", source).splits["train"].images
    assert images[0].endswith("1118_1.JPG") and images[-1].endswith("1118_1.jpg")





# ---- folders as they are unpacked, named and nested by others


@pytest.mark.parametrize("tree, name", [
    ("cub200-release", "CUB_200_2011"), ("products-release", RELEASE),
    ("vehicle_id", "vehicle_id"), ("tiny_imagenet-release", "tiny-imagenet-200"),
    ("cars196-torchvision", "stanford_cars"), ("cars196-release", "cars196/car_ims"),
    ("cars196-devkit", "cars196/devkit"), ("cars196-devkit", "cars196/cars_train"),
    ("in-shop-img", "in-shop"), ("in-shop-img", "in-shop/img"),
    ("in-shop-highres", "in-shop/Img/img_highres")])
def test_an_archive_unpacked_in_a_folder_of_its_name_is_found(tree, name, source):
    dataset, expected = made(tree, source)
    inner = f"{name}/{name.split('/')[-1]}"
    (source / name).rename(source / "aside")
    (source / name).mkdir()
    (source / "aside").rename(source / inner)
    moved = {split: sorted((path.replace(f"{name}/", f"{inner}/", 1), label)
                           for path, label in items) for split, items in expected.items()}
    for given in (source, source / TREES[tree][1]):
        assert contents(dataset, source, given) == moved
        assert "cars" in tree or inner in read(dataset, given).layout


def test_names_of_the_folders_that_train_and_test(source):
    for train, test in (("train", "val"), ("Training", "Testing"), ("TRAIN", "validation"),
                        ("train", "valid")):
        root = source / test
        expected = folder_train_test(root, train, test)
        assert contents("folder", root) == expected and read("folder", root).odd == []
    write_classes(root / "test", ["cat", "dog"])
    assert read("folder", root).odd == [
        f"{root}/valid, beside {root}/train and {root}/test, is left out"]
    for name in ("test", "valid"):
        shutil.rmtree(root / name)
    assert "holds train alone" in str(use("folder", root))


@pytest.mark.parametrize("below", ["", "train"])
def test_super_classes_are_named_as_such_and_views_of_a_class_belong_to_it(below, source):
    for name, inner in (("birds", ["crow", "duck", "other"]), ("cats", ["lion", "other"])):
        write_classes(source / below / name, inner)
    if below:
        write_classes(source / "test", BIRDS)
    error = use("folder", source)
    assert isinstance(error, ValueError) and "super-classes" in str(error)
    assert f"Give {source / below / 'birds'} as --source_path" in str(error)
    for name in BIRDS:
        write_classes(source / "views" / name, ["front", "side"])
    splits = read("folder", source / "views").splits
    assert splits["train"].class_names == BIRDS[:2] and len(splits["train"].images) == 8


# ---- readers on damaged trees


@pytest.mark.parametrize("dataset", [name for name in datasets.DATASETS if name != "glyphs"])
def test_a_missing_dataset_names_the_layouts_and_the_next_step(dataset, source, monkeypatch):
    row = datasets.DATASETS[dataset]
    step = (f"python datasets.py --dataset {dataset} --download",
            "fetches it" if row.archive else "says where it is to be had")
    (source / "file").write_text("a file")
    (source / "empty").mkdir()
    for name in ("nothing", "file", "empty"):
        error = use(dataset, source / name)
        assert isinstance(error, FileNotFoundError)
        assert row.layout in str(error) or (dataset, name) == ("folder", "empty")
        assert dataset == "folder" or f" --source_path {source / name} ".join(step) in str(error)
    if dataset != "folder":
        monkeypatch.chdir(source)
        with pytest.raises(FileNotFoundError, match=" ".join(step)):
            row.read("./Datasets")


def damage(path, kind):
    """Puts something else where nothing is any more; kind says what."""
    if kind == "folder":
        path.mkdir()
    elif kind == "link to itself":
        path.symlink_to(path)
    elif kind != "nothing":
        path.write_bytes({"empty": b"", "junk": random.Random(0).randbytes(300),
                          "text": b"three little words\n" * 3, "one line": b"1"}[kind])


@pytest.mark.parametrize("tree", TREES)
def test_whatever_lies_in_a_tree_may_be_damaged(tree, source):
    dataset, _ = made(tree, source)
    paths = sorted(source.rglob("*"))
    images = [path for path in paths if path.suffix.lower() in (".jpg", ".jpeg")]
    unread = ("train_test_split", "classes", "bicycle", "not_listed", "wnids", "words", "test_0")
    for path in (path for path in paths if path not in images[1:-1]):
        listed = path.is_file() and not path.stem.startswith(unread) and "boxes" not in path.stem
        aside = path.rename(source.parent / "aside")
        for kind in ("nothing", "folder", "link to itself", "empty", "junk", "text",
                     "one line")[:None if listed else 3]:
            damage(path, kind)
            error = use(dataset, source)
            if listed and "folders" not in tree and "images" not in tree:
                assert error or kind in ("nothing", "link to itself"), f"{path}: {kind}"
            path.rmdir() if kind == "folder" else path.unlink(missing_ok=True)
        aside.rename(path)
    assert use(dataset, source) is None


@pytest.mark.parametrize("tree, path", [(tree, path) for tree in LISTS for path in LISTS[tree]])
def test_a_damaged_list_is_refused_and_named(tree, path, source):
    dataset, _ = made(tree, source)
    content = (source / path).read_text()
    lines = content.splitlines(keepends=True)
    for damaged, words in (("\n\n \n", "empty"), (content.encode("utf-16"), "UTF-8"),
                           ("".join(lines[:3] + ["\n"] + lines[3:]), "line 4"),
                           ("".join(lines[:3] + ["0 " * 9 + "\n"] + lines[3:]), "line 4")):
        (source / path).write_bytes(damaged if isinstance(damaged, bytes) else damaged.encode())
        error = use(dataset, source, items=False)
        assert isinstance(error, ValueError) and str(source / path) in str(error)
        assert words in str(error), error
    for size in range(len(content) - 1):  # cut in a line
        if 80 < size < len(content) - 80:
            continue
        (source / path).write_text(content[:size])
        whole = "\n" in content[size - 1:size + 1]
        # Of VehicleID's last number nobody can know whether it has all its digits.
        whole |= dataset == "vehicle_id" and content[size - 2:size - 1] == " "
        assert use(dataset, source) or whole, content[:size][-40:]
    for count in range(len(lines) * (dataset in ("cub200", "in-shop"))):  # where it can be known
        (source / path).write_text("".join(lines[:count]))
        assert use(dataset, source, items=False), f"the first {count} lines"


def test_listed_images_that_are_not_there_are_counted_and_named(source):
    dataset, expected = made("vehicle_id", source)
    gone = [source / path for path, _ in expected["train"][:2]]
    for path in gone:
        path.unlink()
    error = use(dataset, source)
    assert isinstance(error, FileNotFoundError) and "2 images of 4" in str(error)
    assert gone[0].name in str(error)
    shutil.rmtree(gone[0].parent)
    assert "that are not in" in str(use(dataset, source))


def test_fewer_than_two_classes_in_a_split_are_refused(source):
    for count in (1, 3):
        write_classes(source / f"{count}", BIRDS[:count])
        error = use("folder", source / f"{count}")
        assert isinstance(error, ValueError) and "--dataset folder" in str(error)
        assert f"train split has {count // 2} class" in str(error) and "two or more" in str(error)
    vehicle_id(source)
    path = source / "vehicle_id/train_test_split/test_list_800.txt"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text(lines[0] + lines[2])
    assert "test_800 split has 1 class;" in str(use("vehicle_id", source))
    path.write_text(lines[0] + lines[1])
    assert "no class of the test_800 split has two images" in str(use("vehicle_id", source))


def change(path, *replaced):
    path.write_text(path.read_text().replace(*replaced))
    return path


def test_lists_that_contradict_themselves_are_refused(source):
    cub200_release(source)
    change(source / "CUB_200_2011/image_class_labels.txt", "5 ", "9 ", 1)
    assert "image_class_labels.txt" in str(use("cub200", source))
    in_shop(source)
    path = source / "in-shop/Eval/list_eval_partition.txt"
    whole = path.read_text()
    for promised in ("8", "10", "nine", ""):
        path.write_text(whole.replace("9", promised, 1))
        error = use("in-shop", source)
        assert isinstance(error, ValueError) and str(path) in str(error) and "9" in str(error)
    path.write_text(whole.replace("query", "validation", 1))
    assert "status validation; it is one of train, query, gallery" in str(use("in-shop", source))


def test_query_and_gallery_of_in_shop(source):
    expected = {split: sorted(items) for split, items in in_shop(source, "Img/img").items()}
    splits = read("in-shop", source).splits
    assert splits["query"].class_names == splits["gallery"].class_names
    assert splits["query"].labels == [0, 1] and splits["gallery"].labels == [0, 1, 1]
    in_shop(source, "Img/img_highres")
    remark, = read("in-shop", source).odd
    assert "img_highres is there too" in remark and f"{source}/in-shop/Img/img is taken" in remark
    assert contents("in-shop", source) == expected
    path = source / "in-shop/Eval/list_eval_partition.txt"
    change(path, "id_00000003 gallery", "id_00000003 query")
    assert read("in-shop", source).odd[0].startswith("1 query class")
    change(path, "gallery", "query")
    assert "no class of the query split is in the gallery" in str(use("in-shop", source))


def test_tiny_imagenet_has_the_classes_of_train_in_both_splits(source):
    tiny_imagenet(source)
    splits = read("tiny_imagenet", source).splits
    assert splits["train"].class_names == splits["test"].class_names
    assert splits["test"].labels == [2, 1, 0, 0, 1, 2]
    path = source / "tiny_imagenet/val/val_annotations.txt"
    whole = path.read_text()
    path.write_text("".join(line for line in whole.splitlines(keepends=True)
                            if "n01443537" not in line))
    test = read("tiny_imagenet", source).splits["test"]
    assert test.labels == [2, 1, 1, 2] and len(test.class_names) == 3
    path.write_text(whole.replace("n02124075", "n99999999"))
    error = str(use("tiny_imagenet", source))
    assert str(path) in error and "1 classes" in error and "n99999999" in error


def test_a_mat_file_that_is_damaged_or_of_something_else_is_refused(source):
    cars196_release(source)
    path = source / "cars196/cars_annos.mat"
    content, table = path.read_bytes(), scipy.io.loadmat(path)
    names, rows = table["class_names"], table["annotations"]
    of_no_class = rows.copy()
    of_no_class["class"][0, 3] = 5
    damaged = [(content[:size], "cannot be read") for size in range(0, len(content), 59)]
    # scipy may crash on a damaged file that is not compressed.
    for arrays, words, compressed in (
            (dict(annotations=of_no_class, class_names=names), "not every image", True),
            (dict(annotations=np.zeros((2, 2)), class_names=names), "not every image", True),
            ({}, "", True), (dict(annotations=1.0, class_names="a"), "", True),
            (dict(annotations=rows, class_names=names), "not compressed", False)):
        scipy.io.savemat(path, arrays, do_compression=compressed)
        damaged.append((path.read_bytes(), words))
    for content, words in damaged:
        path.write_bytes(content)
        error = use("cars196", source)
        assert isinstance(error, ValueError) and str(path) in str(error)
        assert words in str(error), error


def test_the_test_annotations_without_classes_are_refused(source):
    cars196_devkit(source)
    path = source / "cars196/devkit/cars_test_annos_withlabels.mat"
    write_annotations(path, ("bbox_x1", "fname"), [(1, f"{i:05d}.jpg") for i in range(1, 6)])
    assert "not every image has a fname" in str(use("cars196", source))
    path.rename(path.with_name("cars_test_annos.mat"))
    error = use("cars196", source)
    assert isinstance(error, FileNotFoundError)
    assert "cars_test_annos_withlabels.mat" in str(error)
    assert "cars_test_annos.mat has none" in str(error)


# ---- glyphs


def test_glyphs_are_about_a_hundred_characters_of_which_half_train():
    glyphs = datasets.read_glyphs()
    train, test = glyphs.splits["train"], glyphs.splits["test"]
    characters = train.class_names + test.class_names
    assert abs(len(train.class_names) - len(test.class_names)) <= 1
    assert 85 <= len(characters) == len(set(characters)) <= 115
    for split in (train, test):
        assert split.images.dtype == np.uint8
        assert split.images.shape == (len(split.labels), 32, 32)
        assert split.labels == sorted(split.labels)
        assert np.bincount(split.labels).tolist() == [40] * len(split.class_names)
        for kind in (str.isupper, str.islower, str.isdigit):
            assert sum(map(kind, split.class_names)) >= 4
        assert len({image.tobytes() for image in split.images}) == len(split.images)
        assert split.images.max((1, 2)).min() > 100  # the font has all of them
    torch.manual_seed(8)
    np.random.seed(8)
    again = datasets.read_glyphs("a folder that is not there")
    assert datasets.fingerprint(again.splits) == datasets.fingerprint(glyphs.splits)
    ranges = set()
    steady = SimpleNamespace(normal=lambda mean, deviation, size: np.zeros(size),
                             uniform=lambda low, high, size=(): ranges.add((low, high)) or
                             np.full(size, (low + high) / 2))
    drawn = {datasets.draw_glyphs(character, 1, steady).tobytes() for character in characters}
    assert len(drawn) == len(characters)  # none looks like another
    # Degrees, shear, scale, pixels, brightness.
    assert ranges == {(-20, 20), (-0.25, 0.25), (0.7, 1.05), (-3, 3), (0.6, 1)}


def test_glyphs_give_grey_items_without_random_crops(capsys):
    train, sets, _ = datasets.dataset_select(options("glyphs", "nowhere", image_size=16))
    for part in (train, sets[0].queries):
        image, label = part[41]
        assert image.shape == (3, 16, 16) and image.dtype == torch.uint8 and label == 1
        assert torch.equal(image[0], image[1]) and torch.equal(image[0], image[2])
        part.set_epoch(3)
        assert torch.equal(part[41][0], image)
    code, output = checked(capsys, "glyphs", "nowhere")
    assert code == 0 and "published" not in output


# ---- what main gets


@pytest.mark.parametrize("tree, names", [("cub200-folders", [""]), ("in-shop-img", [""]),
                                         ("vehicle_id", ["set 1", "set 2", "set 3"])])
def test_evaluation_sets(tree, names, source):
    dataset, expected = made(tree, source)
    train, sets, found = datasets.dataset_select(options(dataset, source, seed=11))
    assert train.seed == 11 and len(train) == len(expected["train"])
    assert [each.name for each in sets] == names and list(found.splits) == list(expected)
    for each in sets:
        assert each.queries.seed is None
        assert (each.gallery is not None) == (dataset == "in-shop")
    sizes = [len(part) for each in sets for part in each[1:] if part is not None]
    assert sizes == [len(items) for split, items in expected.items() if split != "train"]
    assert "published numbers do not apply" in found.subset and len(found.digest) == 64
    queries, gallery = SimpleNamespace(labels=[0, 0, 1, 2]), SimpleNamespace(labels=[1, 1, 0])
    assert datasets.queries_without_match(queries) == 2
    assert datasets.queries_without_match(queries, gallery) == 1


@pytest.mark.parametrize("images", [np.arange(20), [f"a/b/c/{i}" for i in range(20)]],
                         ids=["array", "paths"])
def test_classes_held_out_of_training(images):
    labels = [i % 10 for i in range(20)]
    split = datasets.Split(images, labels, list("abcdefghij"))
    parts = datasets.hold_out(split, 0.3)
    assert [len(parts[name].class_names) for name in ("train", "val")] == [7, 3]
    assert sorted(parts["train"].class_names + parts["val"].class_names) == split.class_names
    for part in parts.values():
        assert sorted(part.class_names) == part.class_names
        assert [part.class_names[label] for label in part.labels] == [
            split.class_names[labels[int(str(image).split("/")[-1])]] for image in part.images]
    for share in (0.1, 0.9):
        with pytest.raises(ValueError, match=f"--val_split {share} of 10 training classes"):
            datasets.hold_out(split, share)
    digests = {datasets.fingerprint(part) for part in (
        {"train": split}, {"val": split}, parts, {"train": split._replace(labels=labels[::-1])})}
    assert len(digests) == 4
    if isinstance(images, list):  # the same wherever they lie
        moved = split._replace(images=[f"elsewhere/{path[4:]}" for path in images])
        assert datasets.fingerprint({"train": moved}) in digests


# ---- the dataset check


def test_check_names_the_smallest_and_the_largest_class_and_a_subset(source, capsys, monkeypatch):
    write_classes(source / "cub200/images", ["a", "b", "c", "d", "e", "f"])
    write_image(source / "cub200/images/b/third.jpg")
    (source / "cub200/images/c/c_1.jpg").unlink()
    for images in (6, 5):
        monkeypatch.setitem(datasets.DATASETS, "cub200", datasets.DATASETS["cub200"]._replace(
            published={"train": (3, 6), "test": (3, images)}))
        code, output = checked(capsys, "cub200", source)
        assert code == 0 and "(published 3/6); smallest class c with 1, largest b with 3" in output
        assert "1 classes of the train split have one image only" in output
        assert ("published numbers" in output) == (images == 5)
    assert "the test split has 3 classes/6 images, not cub200's 3/5" in output


def test_check_names_broken_images(source, capsys, monkeypatch):
    write_classes(source, BIRDS)
    for kind in ("truncated", "text"):
        break_image(source / BIRDS[0] / f"{kind}.jpg", kind)
    assert checked(capsys, "folder", source, "--quick")[0] == 0  # it looks at sizes only
    break_image(source / BIRDS[3] / "empty.jpg", "empty")
    (source / BIRDS[3] / "gone.jpg").symlink_to(source / "nowhere")
    for flags, names in ((["--quick"], ["empty", "gone"]),
                         ([], ["truncated", "text", "empty", "gone"])):
        code, output = checked(capsys, "folder", source, *flags)
        assert code == 1 and output.endswith("\nnot usable\n")
        assert output.count("problem") == len(names)
        assert all(f"/{name}.jpg: not a" in output for name in names)
    for i in range(25):
        (source / BIRDS[0] / f"more_{i:02d}.jpg").write_bytes(b"")
    output = checked(capsys, "folder", source)[1]
    assert output.count("problem") == 23 and "and 7 more" in output
    monkeypatch.setattr(sys, "argv", ["", "--dataset=folder", f"--source_path={source}"])
    monkeypatch.setattr("signal.signal", lambda *_: None)  # Ctrl-C stays pytest's
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(datasets.__file__, run_name="__main__")
    assert stop.value.code == 1


def test_check_prints_names_that_the_output_cannot_show(source, monkeypatch):
    write_classes(source / "data", ["été", "喜鹊", *BIRDS[:2]])
    try:
        write_classes(source / "data", [os.fsdecode(b"\xff\xfe")])
    except OSError:
        pass  # this file system takes UTF-8 names only
    monkeypatch.setenv("HOME", str(source))
    for encoding in ("ascii", "cp1252"):
        stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", stream)
            assert datasets.main(["--dataset", "folder", "--source_path=~/data"]) == 0
        stream.flush()
        output = stream.buffer.getvalue().decode(encoding)
        assert "train: 2 classes/4 images" in output and "codec" not in output





def test_names_never_reach_the_terminal_raw(source, capsys):
    raw, shown = "\x1b[31mred\n\x07", "\\x1b[31mred\\n\\x07"  # it would colour, break and ring
    write_classes(source, [raw, "b", "c", f"{raw}z"])
    (source / f"{raw}empty").mkdir()
    (source / raw / f"broken{raw}.jpg").write_text("no image")
    (source / raw / f"text.{raw}").write_text("no image")
    code, output = checked(capsys, "folder", source)
    assert code == 1 and "\x1b" not in output and "\x07" not in output
    for words in (f"broken{shown}.jpg: not an image", f"e.g. {shown}empty", f"1 .{shown}"):
        assert sum(words in line for line in output.splitlines()) == 1
    given = str(source / f"{raw}empty")
    for dataset, *flags in (["folder"], ["cars196", "--download"]):
        code, output = checked(capsys, dataset, given, *flags)
        assert code == 1 and "\x1b" not in output and shown in output.splitlines()[0]
