"""The datasets: readers on tiny generated trees, whole and damaged; glyphs; the dataset check."""

import io
import os
import random
import runpy
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.io
import torch
from PIL import Image

import datasets

# ---- trees: each builder makes one layout below a folder -> {split: [(path below it, class)]}


def write_image(path, colour=(200, 60, 20), size=(6, 6), mode="RGB"):
    """A small image of one colour, in the format that the path's suffix names."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, colour).save(path)


def noise(path, size=(40, 30), seed=0):
    """An image in which every crop can be told from every other."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return pixels


def break_image(path, kind):
    """An image file that cannot be read."""
    noise(path.with_suffix(".good.jpg"))
    whole = path.with_suffix(".good.jpg").read_bytes()
    path.write_bytes({"truncated": whole[:len(whole) // 2], "text": b"this is no image\n",
                      "empty": b"", "header only": whole[:20],
                      "png header only": b"\x89PNG\r\n\x1a\n"}[kind])
    path.with_suffix(".good.jpg").unlink()


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


def class_folders(source, folder, names):
    return expect_halves(folder, write_classes(source / folder, names))


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


def cell(names):
    """A cell array of texts."""
    cells = np.empty((1, len(names)), dtype=object)
    cells[0, :] = names
    return cells


def write_annotations(path, rows, fields):
    """A struct array of CARS196's release, compressed as MATLAB writes it; rows: of the fields."""
    table = np.zeros((1, len(rows)), dtype=[(field, object) for field in fields])
    for i, row in enumerate(rows):
        table[0, i] = tuple(value if isinstance(value, str) else np.uint8(value) for value in row)
    path.parent.mkdir(parents=True, exist_ok=True)
    scipy.io.savemat(path, {"annotations": table, "class_names": cell(CARS)}, do_compression=True)


BOX = ("bbox_x1", "bbox_y1", "bbox_x2", "bbox_y2")


def cars196_release(source):
    root = source / "cars196"
    numbers = [3, 1, 2, 4, 1, 2, 3, 4]  # the release's images are not sorted by class
    files = [f"car_ims/{i:06d}.jpg" for i in range(1, 9)]
    for file in files:
        write_image(root / file)
    write_annotations(root / "cars_annos.mat",
                      [(file, 1, 1, 5, 5, number, 0) for file, number in zip(files, numbers)],
                      ("relative_im_path", *BOX, "class", "test"))
    return expect_halves("cars196/", {
        name: [file for file, number in zip(files, numbers) if CARS[number - 1] == name]
        for name in CARS})


def cars196_devkit(source, folder="cars196", labels="devkit"):
    """The release for classification, all classes in both halves."""
    root, made = source / folder, {name: [] for name in CARS}
    for half, numbers in (("train", [2, 1, 4, 3]), ("test", [4, 4, 1, 2, 3])):
        files = [f"{i:05d}.jpg" for i in range(1, len(numbers) + 1)]  # the same in both halves
        for file, number in zip(files, numbers):
            write_image(root / f"cars_{half}/{file}")
            made[CARS[number - 1]].append(f"cars_{half}/{file}")
        rows = [(1, 1, 5, 5, number, file) for file, number in zip(files, numbers)]
        path = root / (f"{labels}/cars_test_annos_withlabels.mat" if half == "test" else
                       "devkit/cars_train_annos.mat")
        write_annotations(path, rows, (*BOX, "class", "fname"))
    scipy.io.savemat(root / "devkit/cars_meta.mat", {"class_names": cell(CARS)},
                     do_compression=True)
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
    for split, ids in (("train", (8, 9, 10)), ("test", (11, 12))):
        lines = ["image_id class_id super_class_id path\n"]
        expected[split] = []
        for number in ids:
            for i in range(2):
                path = f"bicycle_final/{1110 + number}_{i}.JPG"
                write_image(source / images / path)
                lines.append(f"{len(lines)} {number} 1 {path}\n")
                expected[split].append((f"{images}/{path}", str(number)))
        (source / lists / f"Ebay_{split}.txt").write_text("".join(lines))
    (source / lists / "bicycle.txt").write_text("1 2 3\n")
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
    root = source / "vehicle_id"
    (root / "train_test_split").mkdir(parents=True)
    expected, count = {}, 0
    for split, name, vehicles in (("train", "train_list", (1, 2)),
                                  ("test_800", "test_list_800", (3, 4)),
                                  ("test_1600", "test_list_1600", (3, 4, 5)),
                                  ("test_2400", "test_list_2400", (3, 4, 5, 6))):
        lines, expected[split] = [], []
        for vehicle in (*vehicles, *vehicles):
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
TREES = {
    "cub200-folders": ("cub200", "cub200",
                       lambda source: class_folders(source, "cub200/images/", BIRDS)),
    "cub200-release": ("cub200", "CUB_200_2011", cub200_release),
    "cars196-images": ("cars196", "cars196",
                       lambda source: class_folders(source, "cars196/images/", CARS)),
    "cars196-folders": ("cars196", "cars196",
                        lambda source: class_folders(source, "cars196/", CARS)),
    "cars196-release": ("cars196", "cars196", cars196_release),
    "cars196-devkit": ("cars196", "cars196", cars196_devkit),
    "cars196-torchvision": ("cars196", "stanford_cars",
                            lambda source: cars196_devkit(source, "stanford_cars", ".")),
    "cars196-split-folders": ("cars196", "car_data", cars196_by_class),
    "products-reference": ("online_products", "online_products", lambda source: online_products(
        source, "online_products/images", "online_products/Info_Files")),
    "products-release": ("online_products", "Stanford_Online_Products", lambda source:
                         online_products(source, *["Stanford_Online_Products"] * 2)),
    "products-info": ("online_products", "online_products", lambda source: online_products(
        source, "online_products/Stanford_Online_Products",
        "online_products/Stanford_Online_Products/Info_Files")),
    "in-shop-img": ("in-shop", "in-shop", in_shop),
    "in-shop-img-img": ("in-shop", "in-shop", lambda source: in_shop(source, "Img/img")),
    "in-shop-highres": ("in-shop", "in-shop", lambda source: in_shop(source, "Img/img_highres")),
    "vehicle_id": ("vehicle_id", "vehicle_id", vehicle_id),
    "tiny_imagenet": ("tiny_imagenet", "tiny_imagenet", tiny_imagenet),
    "tiny_imagenet-release": ("tiny_imagenet", "tiny-imagenet-200",
                              lambda source: tiny_imagenet(source, "tiny-imagenet-200")),
    "folder-halves": ("folder", "", lambda source: class_folders(
        source, "", ["apple", "banana", "cherry", "date", "elder"])),
    "folder-train-test": ("folder", "", folder_train_test),
}
LISTS = {  # the list files of the trees that have some
    "cub200-release": ("CUB_200_2011/images.txt", "CUB_200_2011/image_class_labels.txt"),
    "products-reference": ("online_products/Info_Files/Ebay_train.txt",
                           "online_products/Info_Files/Ebay_test.txt"),
    "in-shop-img": ("in-shop/Eval/list_eval_partition.txt",),
    "vehicle_id": ("vehicle_id/train_test_split/train_list.txt",
                   "vehicle_id/train_test_split/test_list_1600.txt"),
    "tiny_imagenet": ("tiny_imagenet/val/val_annotations.txt",),
}


@pytest.fixture
def source(tmp_path):
    """An empty folder for trees; its name has a space and a letter beyond ASCII."""
    folder = tmp_path / "my data é"
    folder.mkdir()
    return folder


def made(tree, source):
    """Makes a tree -> (its dataset, what it holds as contents has it)."""
    dataset, _, build = TREES[tree]
    return dataset, {split: sorted(items) for split, items in build(source).items()}


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
    return SimpleNamespace(**{"dataset": dataset, "source_path": str(source), "seed": seed,
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
        assert ("published numbers do not apply" in output) == bool(
            datasets.DATASETS[dataset].published)


@pytest.mark.parametrize("dataset, folder", [("cub200", "cub200/images"), ("cars196", "cars196"),
                                             ("cars196", "cars196/images"), ("folder", "")])
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
    assert contents(dataset, source) == {
        split: sorted(items) for split, items in
        expect_halves(f"{folder}/" if folder else "", made).items()}
    remark, = read(dataset, source).odd
    where, counts = remark.rsplit(": ", 1)
    assert where == f"left out in {os.path.join(source, folder)}".rstrip("/")
    assert sorted(counts.split(", ")) == [
        "1 .db", "1 folders too deep", "1 images beside the class folders", "1 without a suffix",
        "2 .txt", "2 hidden"]
    assert use(dataset, source) is None


def test_the_first_half_of_the_sorted_classes_that_have_images_trains(source):
    for count, in_train in ((2, 1), (3, 1), (5, 2), (6, 3)):
        names = [f"{i:03d}" for i in range(count)]
        write_classes(source / str(count), reversed(names))
        (source / f"{count}/empty/nested").mkdir(parents=True)
        found = read("folder", source / str(count))
        assert found.splits["train"].class_names == names[:in_train]
        assert found.splits["test"].class_names == names[in_train:]
        assert found.splits["test"].labels[-2:] == [count - in_train - 1] * 2
        assert len(found.odd) == 1 and found.odd[0].startswith("1 class folders")
        assert found.odd[0].endswith("e.g. empty")


@pytest.mark.parametrize("tree", [*LISTS, "cars196-release"])
def test_what_a_list_and_the_names_of_its_images_may_differ_in(tree, source):
    dataset, expected = made(tree, source)
    for path in LISTS.get(tree, ()):
        text = (source / path).read_text()
        for other in (text.replace("\n", "\r\n") + "\r\n  \r\n\r\n",
                      text.rstrip("\n").replace("/", "\\")):
            (source / path).write_bytes(other.encode())
            assert contents(dataset, source) == expected
    for path in list(source.rglob("*.*")):
        if path.suffix.lower() in (".jpg", ".jpeg"):
            path.rename(path.with_suffix(path.suffix.swapcase()))
    assert {split: [(path.lower(), name) for path, name in items]
            for split, items in contents(dataset, source).items()} == {
        split: [(path.lower(), name) for path, name in items] for split, items in expected.items()}
    assert use(dataset, source) is None


def test_two_images_that_differ_in_suffix_case_only_are_two(source):
    made("products-release", source)
    root = source / "Stanford_Online_Products"
    write_image(root / "bicycle_final/1118_0.jpg")
    with open(root / "Ebay_train.txt", "a") as file:
        file.write("7 8 1 bicycle_final/1118_0.jpg\n")
    images = read("online_products", source).splits["train"].images
    assert images[0].endswith("1118_0.JPG") and images[-1].endswith("1118_0.jpg")


def test_symlinks_are_followed(source, tmp_path):
    store, root, link = tmp_path / "store/real", source / "cub200/images", tmp_path / "link"
    made = write_classes(store, BIRDS)
    (root / BIRDS[3]).mkdir(parents=True)
    for path in (*BIRDS[:3], *made[BIRDS[3]]):  # folders and files
        (root / path).symlink_to(store / path)
    link.symlink_to(source)
    assert contents("cub200", link) == expect_halves("cub200/images/", made)
    assert use("cub200", link) is None


def test_a_name_that_is_not_utf8_is_read_and_checked(source, capsys):
    write_classes(source, BIRDS)
    odd = os.path.join(os.fsencode(source), b"\xff\xfe")
    try:
        os.mkdir(odd)
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    Image.new("RGB", (6, 6)).save(os.fsdecode(os.path.join(odd, b"\xe9.jpg")))
    assert use("folder", source) is None
    assert checked(capsys, "folder", source)[0] == 0
    code, output = checked(capsys, "folder", os.path.join(os.fsdecode(odd), "nothing"))
    assert code == 1 and "nothing" in output and "codec" not in output


# ---- folders as they are unpacked, named and nested by others


@pytest.mark.parametrize("tree, name", [
    ("cub200-release", "CUB_200_2011"), ("cub200-folders", "cub200"),
    ("products-release", "Stanford_Online_Products"), ("vehicle_id", "vehicle_id"),
    ("tiny_imagenet-release", "tiny-imagenet-200"), ("cars196-torchvision", "stanford_cars"),
    ("cars196-devkit", "cars196/devkit"), ("cars196-devkit", "cars196/cars_train"),
    ("in-shop-img", "in-shop"), ("in-shop-img", "in-shop/img"),
    ("in-shop-img-img", "in-shop/Img/img"), ("in-shop-highres", "in-shop/Img/img_highres")])
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
    for number, (train, test) in enumerate((("train", "val"), ("Training", "Testing"),
                                            ("TRAIN", "validation"), ("train", "valid"))):
        root = source / str(number)
        expected = folder_train_test(root, train, test)
        found = read("folder", root)
        assert contents("folder", root) == expected and found.odd == []
        assert f"{root}/{train} and {root}/{test}" in found.layout
    expected = folder_train_test(source / "4")
    write_classes(source / "4/val", ["cat", "dog"])
    assert contents("folder", source / "4") == expected
    assert read("folder", source / "4").odd == [
        "{0}/val, beside {0}/train and {0}/test, is left out".format(source / "4")]
    shutil.rmtree(source / "0/val")
    assert "holds train alone" in str(use("folder", source / "0"))


@pytest.mark.parametrize("below", ["", "train"])
def test_a_tree_of_super_classes_is_named_as_such(below, source):
    for name, inner in (("birds", ["crow", "duck", "other"]), ("cats", ["lion", "other"])):
        write_classes(source / below / name, inner)
    if below:
        write_classes(source / "test", BIRDS)
    error = use("folder", source)
    assert isinstance(error, ValueError) and "super-classes" in str(error)
    assert f"Give {source / below / 'birds'} as --source_path" in str(error)


def test_views_one_folder_deeper_belong_to_the_class(source):
    for name in BIRDS:
        write_classes(source / name, ["front", "side"])
    splits = read("folder", source).splits
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
        if (dataset, name) == ("folder", "empty"):
            assert "class folders" in str(error)
            continue
        assert row.layout in str(error) and "--source_path" in str(error)
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
        junk = bytes(random.Random(0).randrange(256) for _ in range(300))
        path.write_bytes({"empty": b"", "junk": junk, "text": b"three little words\n" * 3,
                          "zeros": bytes(200), "one line": b"1"}[kind])


@pytest.mark.parametrize("tree", TREES)
def test_whatever_lies_in_a_tree_may_be_damaged(tree, source):
    dataset, _ = made(tree, source)
    paths = sorted(source.rglob("*"))
    images = [path for path in paths if path.suffix.lower() in (".jpg", ".jpeg")]
    unread = ("train_test_split", "classes", "bicycle", "not_listed", "wnids", "words", "test_0")
    for path in (path for path in paths if path not in images[1:-1]):
        listed = path.is_file() and not path.stem.startswith(unread) and "boxes" not in path.stem
        aside = path.rename(source.parent / "aside")
        for kind in ("nothing", "folder", "link to itself", "empty", "junk", "text", "zeros",
                     "one line")[:None if listed else 4]:
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
    content = (source / path).read_bytes()
    lines = content.decode().splitlines(keepends=True)

    def refused(content, *words):
        (source / path).write_bytes(content if isinstance(content, bytes) else content.encode())
        error = use(dataset, source, items=False)
        assert isinstance(error, ValueError) and str(source / path) in str(error)
        assert all(word in str(error) for word in words), error

    for empty in (b"", b"\n\n \n"):
        refused(empty, "empty")
    for line in ("\n", "word\n", lines[-1].strip() + " more\n"):
        refused("".join(lines[:3] + [line] + lines[3:]), "line 4")
    refused("".join(lines).encode("utf-16"), "UTF-8")
    refused(content.replace(b"1", b"\xe9"), "UTF-8")
    refused("\n".join(",".join(line.split()) for line in lines), "spaces")
    for size in range(len(content) - 1):  # cut in a line
        if 80 < size < len(content) - 80:
            continue
        (source / path).write_bytes(content[:size])
        whole = content[size:size + 1] == b"\n" or content[size - 1:size] == b"\n"
        # Of VehicleID's last number nobody can know whether it has all its digits.
        whole |= dataset == "vehicle_id" and content[size - 2:size - 1] == b" "
        assert use(dataset, source) or whole, content[:size][-40:]
    for count in range(len(lines) * (dataset in ("cub200", "in-shop"))):  # where it can be known
        (source / path).write_text("".join(lines[:count]))
        assert use(dataset, source, items=False), f"the first {count} lines"


def test_listed_images_that_are_not_there_are_counted_and_named(source):
    for tree in (*LISTS, "cars196-release"):
        dataset, expected = made(tree, source / tree)
        gone = [path for path, _ in expected["test" if tree == "tiny_imagenet" else "train"][:2]]
        for path in gone:
            (source / tree / path).unlink()
        error = use(dataset, source / tree)
        assert isinstance(error, FileNotFoundError) and "2 images" in str(error)
        assert any(Path(path).name in str(error) for path in gone)
        shutil.rmtree((source / tree / gone[0]).parent)
        assert "that are not in" in str(use(dataset, source / tree))


def test_fewer_than_two_classes_in_a_split_are_refused(source):
    for count in (1, 2, 3):
        for dataset, folder in (("cub200", "cub200/images"), ("cars196", "cars196"),
                                ("folder", "")):
            root = source / f"{dataset}{count}"
            write_classes(root / folder, BIRDS[:count])
            error = use(dataset, root)
            assert isinstance(error, ValueError)
            assert "two or more" in str(error) and f"--dataset {dataset}" in str(error)
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
    for promised in ("8", "10", "nine", "", "-9"):
        in_shop(source / f"shop{promised}")
        path = source / f"shop{promised}/in-shop/Eval/list_eval_partition.txt"
        change(path, "9", promised, 1)
        error = use("in-shop", source / f"shop{promised}")
        assert isinstance(error, ValueError) and str(path) in str(error) and "9" in str(error)
    in_shop(source)
    change(source / "in-shop/Eval/list_eval_partition.txt", "query", "validation", 1)
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
    path.write_text(path.read_text().replace("id_00000002 train", "id_00000002 gallery"))
    assert "needs two or more" in str(use("in-shop", source))


def test_an_unsorted_list_of_numbers_without_its_last_newline(source):
    vehicle_id(source)
    path = source / "vehicle_id/train_test_split/train_list.txt"
    path.write_text("0000002 23781\n0000003 4407\n0000004 23781\n0000001 4407")
    assert read("vehicle_id", source).splits["train"].class_names == ["4407", "23781"]


def test_tiny_imagenet_has_the_classes_of_train_in_both_splits(source):
    tiny_imagenet(source)
    root = source / "tiny_imagenet"
    splits = read("tiny_imagenet", source).splits
    assert splits["train"].class_names == splits["test"].class_names
    assert splits["test"].labels == [2, 1, 0, 0, 1, 2]
    (root / "train/n99999999/images").mkdir(parents=True)
    (root / "train/n99999998").mkdir()
    found = read("tiny_imagenet", source)
    assert len(found.splits["train"].class_names) == 3
    assert "2 class folders" in found.odd[0] and "no image, e.g. n99999998" in found.odd[0]
    path = root / "val/val_annotations.txt"
    whole = path.read_text()
    path.write_text("".join(line for line in whole.splitlines(keepends=True)
                            if "n01443537" not in line))
    test = read("tiny_imagenet", source).splits["test"]
    assert test.labels == [2, 1, 1, 2] and len(test.class_names) == 3
    path.write_text(whole.replace("n02124075", "n99999999"))
    error = str(use("tiny_imagenet", source))
    assert str(path) in error and "1 classes" in error and "n99999999" in error
    for lacking in ("val/images", "train", "val/val_annotations.txt"):
        (root / lacking).rename(source / "aside")
        assert f"tiny_imagenet/{lacking}" in str(use("tiny_imagenet", source))
        (source / "aside").rename(root / lacking)


def test_a_mat_file_that_is_damaged_or_of_something_else_is_refused(source):
    cars196_release(source)
    path = source / "cars196/cars_annos.mat"
    content, table = path.read_bytes(), scipy.io.loadmat(path)

    def refused(*words):
        error = use("cars196", source)
        assert isinstance(error, ValueError) and str(path) in str(error)
        assert all(word in str(error) for word in words), error

    for size in range(0, len(content), 29):
        path.write_bytes(content[:size])
        refused("cannot be read")
    for number in (0, 5, 255):
        rows = [(f"car_ims/{i:06d}.jpg", 1 + i % 4) for i in range(1, 8)]
        write_annotations(path, [*rows, ("car_ims/000008.jpg", number)],
                          ("relative_im_path", "class"))
        refused(f"{path}: not every image")
    for other in ({}, {"annotations": 1.0, "class_names": "a"},
                  {"annotations": np.zeros((2, 2)), "class_names": cell(CARS)},
                  {"annotations": {"class": 1}, "class_names": cell(CARS)}):
        scipy.io.savemat(path, other, do_compression=True)
        refused()
    # scipy may crash on a damaged one of these.
    scipy.io.savemat(path, {name: table[name] for name in ("annotations", "class_names")})
    refused("not compressed")


@pytest.mark.parametrize("tree", ["cars196-devkit", "cars196-torchvision"])
def test_the_test_annotations_without_classes_are_refused(tree, source):
    made(tree, source)
    path, = (source / TREES[tree][1]).rglob("cars_test_annos_withlabels.mat")
    rows = [(1, 1, 5, 5, f"{i:05d}.jpg") for i in range(1, 6)]
    write_annotations(path, rows, (*BOX, "fname"))
    error = use("cars196", source)
    assert isinstance(error, ValueError) and "not every image has a fname" in str(error)
    path.rename(path.with_name("cars_test_annos.mat"))
    error = use("cars196", source)
    assert isinstance(error, FileNotFoundError)
    assert "cars_test_annos_withlabels.mat" in str(error)
    assert "cars_test_annos.mat has none" in str(error)


# ---- glyphs


@pytest.fixture(scope="module")
def glyphs():
    return datasets.read_glyphs()


def test_glyphs_are_about_a_hundred_characters_of_which_half_train(glyphs):
    train, test = glyphs.splits["train"], glyphs.splits["test"]
    assert abs(len(train.class_names) - len(test.class_names)) <= 1
    assert not set(train.class_names) & set(test.class_names)
    assert 85 <= len(set(train.class_names + test.class_names)) <= 115
    for split in (train, test):
        assert split.images.dtype == np.uint8
        assert split.images.shape == (len(split.labels), 32, 32)
        assert split.labels == sorted(split.labels)
        assert np.bincount(split.labels).tolist() == [40] * len(split.class_names)
        for kind in (str.isupper, str.islower, str.isdigit):
            assert sum(map(kind, split.class_names)) >= 4
        assert len({image.tobytes() for image in split.images}) == len(split.images)
        assert split.images.max((1, 2)).min() > 100  # the font has all of them


def test_glyphs_are_the_same_each_time_and_look_like_no_other(glyphs):
    torch.manual_seed(8)
    np.random.seed(8)
    again = datasets.read_glyphs("a folder that is not there")
    assert datasets.fingerprint(again.splits) == datasets.fingerprint(glyphs.splits)
    ranges = set()
    steady = SimpleNamespace(normal=lambda mean, deviation, size: np.zeros(size),
                             uniform=lambda low, high, size=(): ranges.add((low, high)) or
                             np.full(size, (low + high) / 2))
    characters = [name for split in glyphs.splits.values() for name in split.class_names]
    drawn = {datasets.draw_glyphs(character, 1, steady).tobytes() for character in characters}
    assert len(drawn) == len(characters)
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
    assert datasets.queries_without_match(*sets[0][1:]) == 0
    assert "published numbers do not apply" in found.subset and len(found.digest) == 64


def test_queries_without_a_match_are_counted():
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


@pytest.mark.parametrize("tree, counts", [
    ("cub200-folders", ["100/5,864", "100/5,924"]),
    ("cars196-images", ["98/8,054", "98/8,131"]),
    ("products-release", ["11,318/59,551", "11,316/60,502"]),
    ("in-shop-img", ["3,997/25,882", "3,985/14,218", "3,985/12,612"]),
    ("tiny_imagenet", ["200/100,000", "200/10,000"]),
    ("vehicle_id", ["13,134/110,178", "800 classes", "1,600 classes", "2,400 classes"])])
def test_check_prints_the_published_counts(tree, counts, source, capsys):
    output = checked(capsys, made(tree, source)[0], source)[1]
    assert [count for count in counts if f"(published {count})" not in output] == []


def test_check_calls_no_whole_dataset_a_subset(source, capsys, monkeypatch):
    made("cub200-folders", source)
    for images in (4, 3):
        monkeypatch.setitem(datasets.DATASETS, "cub200", datasets.DATASETS["cub200"]._replace(
            published={"train": (2, 4), "test": (2, images)}))
        code, output = checked(capsys, "cub200", source)
        assert code == 0 and "(published 2/4)" in output
        assert ("note" in output) == (images == 3)
    assert "the test split has 2 classes/4 images, not cub200's 2/3" in output


def test_check_names_the_smallest_and_the_largest_class(source, capsys):
    write_classes(source, ["a", "b", "c", "d", "e", "f"])
    write_image(source / "b/third.jpg")
    (source / "c/c_1.jpg").unlink()
    code, output = checked(capsys, "folder", source)
    line = next(line for line in output.splitlines() if "train:" in line)
    assert code == 0
    assert "smallest class c with 1" in line and "largest b with 3" in line
    assert "1 class" in output and "one image only" in output


def test_check_names_broken_images(source, capsys, monkeypatch):
    write_classes(source, BIRDS)
    for kind in ("truncated", "text"):
        break_image(source / BIRDS[0] / f"{kind}.jpg", kind)
    assert checked(capsys, "folder", source, "--quick")[0] == 0  # it looks at sizes only
    break_image(source / BIRDS[3] / "empty.jpg", "empty")
    (source / BIRDS[3] / "gone.jpg").symlink_to(source / "nowhere")
    code, output = checked(capsys, "folder", source)
    assert code == 1 and output.endswith("\nnot usable\n") and output.count("problem") == 4
    for path in (f"{BIRDS[0]}/truncated", f"{BIRDS[0]}/text", f"{BIRDS[3]}/empty",
                 f"{BIRDS[3]}/gone"):
        assert f"{source / path}.jpg" in output
    code, output = checked(capsys, "folder", source, "--quick")
    assert code == 1 and "empty.jpg" in output and "gone.jpg" in output
    assert "text.jpg" not in output
    for i in range(25):
        (source / BIRDS[0] / f"more_{i:02d}.jpg").write_bytes(b"")
    output = checked(capsys, "folder", source)[1]
    assert output.count("problem") == 23 and "and 7 more" in output
    monkeypatch.setattr(sys, "argv", ["datasets.py", "--dataset", "folder", "--source_path",
                                      str(source)])
    monkeypatch.setattr("signal.signal", lambda *_: None)  # Ctrl-C stays pytest's
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(datasets.__file__, run_name="__main__")
    assert stop.value.code == 1


def test_check_shows_its_progress_on_a_terminal_only(source, monkeypatch):
    write_classes(source / "data", BIRDS)
    monkeypatch.setenv("HOME", str(source))
    for is_terminal in (True, False):
        output = io.StringIO()
        output.isatty = lambda: is_terminal
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", output)
            assert datasets.main(["--dataset", "folder", "--source_path=~/data"]) == 0
        assert ("reading train: 4 of 4" in output.getvalue()) == is_terminal
        assert f"class folders in {source}/data" in output.getvalue()


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])
def test_check_prints_names_that_the_output_cannot_show(encoding, source, monkeypatch):
    write_classes(source, ["été", "喜鹊", *BIRDS[:2]])
    with monkeypatch.context() as patch:
        stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
        patch.setattr(sys, "stdout", stream)
        assert datasets.main(["--dataset", "folder", "--source_path", str(source)]) == 0
        with pytest.raises(SystemExit, match="é is not a folder"):
            datasets.main(["--dataset", "folder", "--source_path", str(source / "é")])
    stream.flush()
    output = stream.buffer.getvalue().decode(encoding)
    assert "test: 2 classes/4 images" in output and "codec" not in output


RAW = "\x1b[31mred\n\x07"  # a name that would colour, break and ring
SHOWN = "\\x1b[31mred\\n\\x07"


def test_names_never_reach_the_terminal_raw(source, capsys):
    write_classes(source, [RAW, "b", "c", f"{RAW}z"])
    (source / f"{RAW}empty").mkdir()
    (source / RAW / f"broken{RAW}.jpg").write_text("no image")
    (source / RAW / f"text.{RAW}").write_text("no image")
    code, output = checked(capsys, "folder", source)
    assert code == 1 and "\x1b" not in output and "\x07" not in output
    for words in (f"broken{SHOWN}.jpg: not an image", f"e.g. {SHOWN}empty", f"1 .{SHOWN}"):
        assert sum(words in line for line in output.splitlines()) == 1
    given = str(source / f"{RAW}empty")
    for dataset, *flags in (["folder"], ["cars196", "--download"]):
        code, output = checked(capsys, dataset, given, *flags)
        assert code == 1 and "\x1b" not in output and SHOWN in output.splitlines()[0]
