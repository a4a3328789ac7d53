"""The datasets: readers on tiny generated trees, whole and damaged; glyphs; the dataset check."""

import io
import os
import random
import shutil
import subprocess
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


def write_classes(root, names, suffix=".jpg"):
    """Class folders with two images each -> {class: [paths below root]}."""
    made = {}
    for name in names:
        made[name] = [f"{name}/{name[-3:]}_{i}{suffix}" for i in (1, 2)]
        for path in made[name]:
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


def cub200_folders(source):
    return expect_halves("cub200/images/", write_classes(source / "cub200/images", BIRDS))


def cub200_release(source):
    root = source / "CUB_200_2011"
    made = write_classes(root / "images", BIRDS)
    paths = [path for name in BIRDS for path in made[name]]
    classes = [i + 1 for i, name in enumerate(BIRDS) for _ in made[name]]
    for file, values in (("images", paths), ("image_class_labels", classes),
                         ("train_test_split", [0] * len(paths))):
        lines = [f"{i} {value}\n" for i, value in enumerate(values, start=1)]
        (root / f"{file}.txt").write_text("".join(lines))
    (root / "classes.txt").write_text("".join(f"{i} {n}\n" for i, n in enumerate(BIRDS, start=1)))
    write_image(root / "images" / BIRDS[0] / "not_listed.jpg")
    return expect_halves("CUB_200_2011/images/", made)


def cars196_images(source):
    return expect_halves("cars196/images/", write_classes(source / "cars196/images", CARS))


def cars196_folders(source):
    return expect_halves("cars196/", write_classes(source / "cars196", CARS))


def write_annotations(path, rows, fields):
    """A struct array of CARS196's release, compressed as MATLAB writes it; rows: of the fields."""
    table = np.zeros((1, len(rows)), dtype=[(field, object) for field in fields])
    for i, row in enumerate(rows):
        table[0, i] = tuple(value if isinstance(value, str) else np.uint8(value) for value in row)
    path.parent.mkdir(parents=True, exist_ok=True)
    scipy.io.savemat(path, {"annotations": table, "class_names": cell(CARS)}, do_compression=True)


def cell(names):
    """A cell array of texts."""
    cells = np.empty((1, len(names)), dtype=object)
    cells[0, :] = names
    return cells


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
    made = {name: [file for file, number in zip(files, numbers) if CARS[number - 1] == name]
            for name in CARS}
    return expect_halves("cars196/", made)


def write_devkit(root, labels="devkit"):
    """The release for classification, all classes in both halves -> {class: [paths]}."""
    made = {name: [] for name in CARS}
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
    return made


def cars196_devkit(source):
    return expect_halves("cars196/", write_devkit(source / "cars196"))


def cars196_torchvision(source):
    return expect_halves("stanford_cars/", write_devkit(source / "stanford_cars", labels="."))


def cars196_by_class(source):
    root, made = source / "car_data/car_data", {name: [] for name in CARS}
    for half in ("train", "test"):
        for name, paths in write_classes(root / half, CARS).items():
            made[name] += [f"{half}/{path}" for path in paths]
    return expect_halves("car_data/car_data/", made)


def write_products(images, lists):
    """Images by product type and the two lists, whose class ids have one and two digits."""
    expected = {}
    for split, ids in (("train", (8, 9, 10)), ("test", (11, 12))):
        lines = ["image_id class_id super_class_id path\n"]
        expected[split] = []
        for number in ids:
            for i in range(2):
                path = f"bicycle_final/{1110 + number}_{i}.JPG"
                write_image(images / path)
                lines.append(f"{len(lines)} {number} 1 {path}\n")
                expected[split].append((path, str(number)))
        lists.mkdir(parents=True, exist_ok=True)
        (lists / f"Ebay_{split}.txt").write_text("".join(lines))
    return expected


def prefixed(prefix, expected):
    return {split: [(f"{prefix}{path}", name) for path, name in items]
            for split, items in expected.items()}


def online_products_reference(source):
    root = source / "online_products"
    expected = write_products(root / "images", root / "Info_Files")
    (root / "Info_Files/bicycle.txt").write_text("1 2 3\n")
    return prefixed("online_products/images/", expected)


def online_products_release(source):
    root = source / "Stanford_Online_Products"
    return prefixed("Stanford_Online_Products/", write_products(root, root))


def online_products_info_files(source):
    root = source / "online_products/Stanford_Online_Products"
    return prefixed("online_products/Stanford_Online_Products/",
                    write_products(root, root / "Info_Files"))


def write_in_shop(source, folder):
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


def in_shop_img(source):
    return write_in_shop(source, "img")


def in_shop_img_img(source):
    return write_in_shop(source, "Img/img")


def in_shop_highres(source):
    return write_in_shop(source, "Img/img_highres")


def vehicle_id_lists(source):
    root = source / "vehicle_id"
    (root / "train_test_split").mkdir(parents=True)
    expected, count = {}, 0
    for split, name, vehicles in (("train", "train_list", (1, 2)),
                                  ("test_800", "test_list_800", (3, 4)),
                                  ("test_1600", "test_list_1600", (3, 4, 5)),
                                  ("test_2400", "test_list_2400", (3, 4, 5, 6))):
        lines, expected[split] = [], []
        for vehicle in vehicles:
            for _ in range(2):
                count += 1
                write_image(root / f"image/{count:07d}.jpg")
                lines.append(f"{count:07d} {vehicle}\n")
                expected[split].append((f"vehicle_id/image/{count:07d}.jpg", str(vehicle)))
        (root / f"train_test_split/{name}.txt").write_text("".join(lines))
    return expected


def write_tiny_imagenet(source, name):
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
    (root / "words.txt").write_text("".join(f"{wnid}\ta, b\n" for wnid in ids))
    write_image(root / "test/images/test_0.JPEG")
    return expected


def tiny_imagenet_named(source):
    return write_tiny_imagenet(source, "tiny_imagenet")


def tiny_imagenet_release(source):
    return write_tiny_imagenet(source, "tiny-imagenet-200")


def folder_halves(source):
    names = ["apple", "banana", "cherry", "date", "elder"]
    return expect_halves("", write_classes(source, names))


def folder_train_test(source, train="train", test="test"):
    expected = {}
    for split, folder, names in (("train", train, ["cat", "dog"]),
                                 ("test", test, ["ant", "bee", "elk"])):
        made = write_classes(source / folder, names)
        expected[split] = [(f"{folder}/{path}", name) for name in names for path in made[name]]
    return expected


# name: (dataset, its own folder below the source path, builder)
TREES = {
    "cub200-folders": ("cub200", "cub200", cub200_folders),
    "cub200-release": ("cub200", "CUB_200_2011", cub200_release),
    "cars196-images": ("cars196", "cars196", cars196_images),
    "cars196-folders": ("cars196", "cars196", cars196_folders),
    "cars196-release": ("cars196", "cars196", cars196_release),
    "cars196-devkit": ("cars196", "cars196", cars196_devkit),
    "cars196-torchvision": ("cars196", "stanford_cars", cars196_torchvision),
    "cars196-split-folders": ("cars196", "car_data", cars196_by_class),
    "products-reference": ("online_products", "online_products", online_products_reference),
    "products-release": ("online_products", "Stanford_Online_Products", online_products_release),
    "products-info": ("online_products", "online_products", online_products_info_files),
    "in-shop-img": ("in-shop", "in-shop", in_shop_img),
    "in-shop-img-img": ("in-shop", "in-shop", in_shop_img_img),
    "in-shop-highres": ("in-shop", "in-shop", in_shop_highres),
    "vehicle_id": ("vehicle_id", "vehicle_id", vehicle_id_lists),
    "tiny_imagenet": ("tiny_imagenet", "tiny_imagenet", tiny_imagenet_named),
    "tiny_imagenet-release": ("tiny_imagenet", "tiny-imagenet-200", tiny_imagenet_release),
    "folder-halves": ("folder", "", folder_halves),
    "folder-train-test": ("folder", "", folder_train_test),
}
LISTS = {  # the list files of the trees that have some
    "cub200-release": ("CUB_200_2011/images.txt", "CUB_200_2011/image_class_labels.txt"),
    "products-reference": ("online_products/Info_Files/Ebay_train.txt",
                           "online_products/Info_Files/Ebay_test.txt"),
    "products-release": ("Stanford_Online_Products/Ebay_test.txt",),
    "in-shop-img": ("in-shop/Eval/list_eval_partition.txt",),
    "vehicle_id": ("vehicle_id/train_test_split/train_list.txt",
                   "vehicle_id/train_test_split/test_list_1600.txt"),
    "tiny_imagenet": ("tiny_imagenet/val/val_annotations.txt",),
}
ALL_LISTS = [(tree, path) for tree, paths in LISTS.items() for path in paths]


@pytest.fixture
def source(tmp_path):
    """An empty folder for trees; its name has a space and a letter beyond ASCII."""
    folder = tmp_path / "my data é"
    folder.mkdir()
    return folder


def read(dataset, source):
    return datasets.DATASETS[dataset].read(str(source))


def contents(found, source):
    """What was found, in the form of the builders: {split: [(path below source, class), ...]}."""
    return {split: [(os.path.relpath(path, source), part.class_names[label])
                    for path, label in zip(part.images, part.labels)]
            for split, part in found.splits.items()}


def options(dataset, source, image_size=16, seed=0):
    return SimpleNamespace(dataset=dataset, source_path=str(source), image_size=image_size,
                           seed=seed, val_split=0, cache="none")


def use(dataset, source):
    """Selects a dataset and reads every item -> the ValueError or OSError that it ends with.

    None where it ends well. Other errors, and those of decoding a text, mean nothing to a user:
    they fail the test.
    """
    try:
        train, sets, _ = datasets.dataset_select(options(dataset, source))
        for part in (train, *[part for each in sets for part in each[1:] if part is not None]):
            for i in range(len(part)):
                part[i]
    except (ValueError, OSError) as error:
        assert not isinstance(error, UnicodeError), repr(error)
        assert str(source) in str(error), f"the message names no path: {error!r}"
        return error
    return None


# ---- readers on whole trees


@pytest.mark.parametrize("tree", TREES)
def test_every_layout_is_read_whole(tree, source):
    dataset, _, build = TREES[tree]
    expected = build(source)
    found = read(dataset, source)
    assert {s: sorted(items) for s, items in contents(found, source).items()} == {
        s: sorted(items) for s, items in expected.items()}
    assert found.odd == ([] if dataset != "tiny_imagenet" else
                         [f"left out in {source}/{TREES[tree][1]}/train: 3 .txt"])
    assert use(dataset, source) is None


@pytest.mark.parametrize("tree", TREES)
def test_labels_index_the_class_names(tree, source):
    dataset, _, build = TREES[tree]
    build(source)
    for split in read(dataset, source).splits.values():
        assert len(split.images) == len(split.labels)
        assert all(type(label) is int for label in split.labels)
        assert sorted(set(split.labels)) == list(range(len(split.class_names)))
        assert len(set(split.class_names)) == len(split.class_names)
        numbers = all(name.isdigit() for name in split.class_names)
        assert split.class_names == sorted(split.class_names, key=int if numbers else str)


@pytest.mark.parametrize("tree", [tree for tree, (_, own, _) in TREES.items() if own])
def test_the_own_folder_may_be_given(tree, source):
    dataset, own, build = TREES[tree]
    expected = build(source)
    for given in (source / own, f"{source / own}/"):
        found = read(dataset, given)
        assert {s: sorted(items) for s, items in contents(found, source).items()} == {
            s: sorted(items) for s, items in expected.items()}


CLASS_ROOTS = [("cub200", "cub200/images"), ("cars196", "cars196"), ("cars196", "cars196/images"),
               ("folder", "")]


@pytest.mark.parametrize("dataset, folder", CLASS_ROOTS)
def test_what_is_no_image_of_a_class_is_left_out_and_counted(dataset, folder, source):
    root = source / folder
    made = {}
    for name in BIRDS:
        made[name] = [f"{name}/image{suffix}" for suffix in
                      (".JPG", ".Png", ".jpeg", ".webp", ".jfif", ".ppm", ".pgm")]
        for path in made[name][:4]:
            write_image(root / path)
        Image.new("RGB", (6, 6)).save(root / made[name][4], "JPEG")
        Image.new("RGB", (6, 6)).save(root / made[name][5], "PPM")
        Image.new("L", (6, 6)).save(root / made[name][6], "PPM")
    write_image(root / BIRDS[1] / "deeper/image.jpg")
    made[BIRDS[1]].append(f"{BIRDS[1]}/deeper/image.jpg")
    write_image(root / BIRDS[0] / ".hidden.jpg")
    write_image(root / "outside.jpg")
    write_image(root / ".thumbnails/small.jpg")
    write_image(root / BIRDS[1] / "deeper/still/image.jpg")
    (root / BIRDS[2] / "notes.txt").write_text("no image")
    (root / BIRDS[2] / "Thumbs.db").write_bytes(b"\0\1")
    (root / BIRDS[3] / "jpg").write_text("no suffix")
    (root / BIRDS[3] / "more.TXT").write_text("no image")
    found = read(dataset, source)
    prefix = f"{folder}/" if folder else ""
    expected = expect_halves(prefix, made)
    assert {s: sorted(items) for s, items in contents(found, source).items()} == {
        s: sorted(items) for s, items in expected.items()}
    remark, = found.odd
    where, counts = remark.rsplit(": ", 1)
    assert where == f"left out in {os.path.join(source, folder)}".rstrip("/")
    assert sorted(counts.split(", ")) == [
        "1 .db", "1 folders too deep", "1 images beside the class folders", "1 without a suffix",
        "2 .txt", "2 hidden"]
    assert use(dataset, source) is None


@pytest.mark.parametrize("count, in_train", [(2, 1), (3, 1), (5, 2), (6, 3)])
def test_the_first_half_of_the_sorted_classes_trains(count, in_train, source):
    names = [f"{i:03d}" for i in range(count)]
    write_classes(source, reversed(names))
    splits = read("folder", source).splits
    assert splits["train"].class_names == names[:in_train]
    assert splits["test"].class_names == names[in_train:]


def test_an_empty_class_folder_is_remarked_on(source):
    write_classes(source, BIRDS + ["005.Dodo", "006.Eagle"])
    for path in (source / "005.Dodo").iterdir():
        path.unlink()
    (source / "005.Dodo/nested").mkdir()
    found = read("folder", source)
    assert found.splits["train"].class_names == BIRDS[:2]  # the half of the classes with images
    assert found.splits["test"].class_names == [*BIRDS[2:], "006.Eagle"]
    assert found.splits["test"].labels == [0, 0, 1, 1, 2, 2]
    assert len(found.odd) == 1 and "005.Dodo" in found.odd[0]


def test_query_and_gallery_share_their_labels(source):
    in_shop_img(source)
    splits = read("in-shop", source).splits
    assert splits["query"].class_names == splits["gallery"].class_names
    assert splits["query"].labels == [0, 1] and splits["gallery"].labels == [0, 1, 1]


def test_queries_without_a_gallery_image_are_remarked_on(source):
    in_shop_img(source)
    path = source / "in-shop/Eval/list_eval_partition.txt"
    path.write_text(path.read_text().replace("id_00000003 gallery", "id_00000003 query"))
    found = read("in-shop", source)
    assert len(found.odd) == 1 and found.odd[0].startswith("1 query class")


@pytest.mark.parametrize("tree", LISTS)
def test_list_files_with_windows_line_ends_and_blank_last_lines(tree, source):
    dataset, _, build = TREES[tree]
    build(source)
    expected = contents(read(dataset, source), source)
    for path in LISTS[tree]:
        text = (source / path).read_text()
        (source / path).write_bytes(text.replace("\n", "\r\n").encode() + b"\r\n  \r\n\r\n")
    assert contents(read(dataset, source), source) == expected


@pytest.mark.parametrize("tree", [*LISTS, "cars196-release"])
def test_the_suffix_case_of_a_listed_image_does_not_matter(tree, source):
    dataset, _, build = TREES[tree]
    build(source)
    before = contents(read(dataset, source), source)
    for path in list(source.rglob("*.*")):
        if path.suffix.lower() in (".jpg", ".jpeg"):
            path.rename(path.with_suffix(path.suffix.swapcase()))
    after = contents(read(dataset, source), source)
    assert {s: [(p.lower(), n) for p, n in items] for s, items in after.items()} == {
        s: [(p.lower(), n) for p, n in items] for s, items in before.items()}
    assert use(dataset, source) is None


def test_two_images_that_differ_in_suffix_case_only_are_two(source):
    online_products_release(source)
    root = source / "Stanford_Online_Products"
    write_image(root / "bicycle_final/1118_0.jpg")
    with open(root / "Ebay_train.txt", "a") as file:
        file.write("7 8 1 bicycle_final/1118_0.jpg\n")
    images = read("online_products", source).splits["train"].images
    assert images[0].endswith("1118_0.JPG") and images[-1].endswith("1118_0.jpg")


def test_symlinks_are_followed(source, tmp_path):
    store = tmp_path / "store"
    made = write_classes(store / "real", BIRDS)
    root = source / "cub200/images"
    root.mkdir(parents=True)
    for name in BIRDS[:3]:
        (root / name).symlink_to(store / "real" / name)
    for path in made[BIRDS[3]]:
        (root / path).parent.mkdir(exist_ok=True)
        (root / path).symlink_to(store / "real" / path)
    link = tmp_path / "link"
    link.symlink_to(source)
    assert contents(read("cub200", link), link) == expect_halves("cub200/images/", made)
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


# ---- readers on damaged trees


@pytest.mark.parametrize("dataset", [name for name in datasets.DATASETS if name != "glyphs"])
@pytest.mark.parametrize("what", ["missing", "file", "empty folder"])
def test_a_missing_dataset_names_the_accepted_layouts(dataset, what, source):
    given = source / "nothing"
    if what == "file":
        given.write_text("a file")
    if what == "empty folder":
        given.mkdir()
    error = use(dataset, given)
    assert isinstance(error, FileNotFoundError)
    if (dataset, what) != ("folder", "empty folder"):
        assert datasets.DATASETS[dataset].layout in str(error) and "--source_path" in str(error)
    else:
        assert "class folders" in str(error)


def damage_file(path, kind):
    """Replaces a file by something else; kind says by what."""
    path.unlink()
    if kind == "folder":
        path.mkdir()
    elif kind == "dangling link":
        path.symlink_to(path.parent / "nowhere")
    elif kind == "link to itself":
        path.symlink_to(path)
    elif kind != "nothing":
        junk = bytes(random.Random(0).randrange(256) for _ in range(300))
        path.write_bytes({"empty": b"", "junk": junk, "text": b"three little words\n" * 3,
                          "zeros": bytes(200), "one line": b"1"}[kind])


@pytest.mark.parametrize("tree", TREES)
def test_any_file_of_a_tree_may_be_damaged(tree, source):
    dataset, _, build = TREES[tree]
    build(source)
    unread = {"train_test_split.txt", "classes.txt", "bicycle.txt", "not_listed.jpg", "wnids.txt",
              "words.txt", "test_0.JPEG", *(f"{path.parent.name}_boxes.txt"
                                            for path in source.rglob("*_boxes.txt"))}
    for path in sorted(path for path in source.rglob("*") if path.is_file()):
        original = path.read_bytes()
        for kind in ("nothing", "folder", "dangling link", "link to itself", "empty", "junk",
                     "text", "zeros", "one line"):
            damage_file(path, kind)
            error = use(dataset, source)
            if path.name not in unread and "folders" not in tree and "images" not in tree:
                absent = kind == "nothing" or "link" in kind
                assert error or absent, f"{path} replaced by {kind} went unnoticed"
            path.rmdir() if kind == "folder" else path.unlink(missing_ok=True)
            path.write_bytes(original)
    assert use(dataset, source) is None


@pytest.mark.parametrize("tree", TREES)
def test_any_folder_of_a_tree_may_be_damaged(tree, source):
    dataset, _, build = TREES[tree]
    build(source)
    for path in sorted(path for path in source.rglob("*") if path.is_dir()):
        aside = source.parent / "aside"
        path.rename(aside)
        for kind in ("nothing", "file", "empty folder", "link to itself"):
            if kind == "file":
                path.write_text("a file where a folder should be")
            elif kind == "empty folder":
                path.mkdir()
            elif kind == "link to itself":
                path.symlink_to(path)
            use(dataset, source)
            path.rmdir() if kind == "empty folder" else path.unlink(missing_ok=True)
        aside.rename(path)
    assert use(dataset, source) is None


@pytest.mark.parametrize("tree, path", ALL_LISTS)
def test_a_list_that_is_cut_in_a_line_is_refused(tree, path, source):
    dataset, _, build = TREES[tree]
    build(source)
    content = (source / path).read_bytes()
    for size in range(len(content) - 1):
        (source / path).write_bytes(content[:size])
        error = use(dataset, source)
        whole = content[size:size + 1] == b"\n" or content[size - 1:size] == b"\n"
        # Of VehicleID's last number nobody can know whether it has all its digits.
        whole |= dataset == "vehicle_id" and content[size - 2:size - 1] == b" "
        assert error or whole, f"cut after {size} bytes: {content[:size][-40:]}"


@pytest.mark.parametrize("tree, path", [(tree, path) for tree, path in ALL_LISTS
                                        if tree in ("cub200-release", "in-shop-img")])
def test_a_list_that_is_cut_between_lines_is_refused_where_it_can_be_known(tree, path, source):
    dataset, _, build = TREES[tree]
    build(source)
    lines = (source / path).read_text().splitlines(keepends=True)
    for count in range(len(lines)):
        (source / path).write_text("".join(lines[:count]))
        assert use(dataset, source)


@pytest.mark.parametrize("tree, path", ALL_LISTS)
@pytest.mark.parametrize("content", [b"", b"\n\n \n"])
def test_an_empty_list_is_refused(tree, path, content, source):
    dataset, _, build = TREES[tree]
    build(source)
    (source / path).write_bytes(content)
    error = use(dataset, source)
    assert isinstance(error, ValueError) and str(source / path) in str(error)
    assert "empty" in str(error)


@pytest.mark.parametrize("tree, path", ALL_LISTS)
def test_the_line_that_is_not_whole_is_named(tree, path, source):
    dataset, _, build = TREES[tree]
    build(source)
    lines = (source / path).read_text().splitlines(keepends=True)
    for line in ("\n", "word\n", lines[-1].strip() + " more\n"):
        (source / path).write_text("".join(lines[:3] + [line] + lines[3:]))
        error = use(dataset, source)
        assert isinstance(error, ValueError)
        assert str(source / path) in str(error) and "line 4" in str(error)


@pytest.mark.parametrize("tree, path", ALL_LISTS)
def test_a_list_of_another_kind_is_named_as_such(tree, path, source):
    dataset, _, build = TREES[tree]
    build(source)
    text = (source / path).read_text()
    commas = "\n".join(",".join(line.split()) for line in text.splitlines())
    for content, words in ((text.encode("utf-16"), "UTF-8"), (commas.encode(), "spaces"),
                           (text.encode().replace(b"1", b"\xe9"), "")):
        (source / path).write_bytes(content)
        error = str(use(dataset, source))
        assert str(source / path) in error and words in error


@pytest.mark.parametrize("tree, path", ALL_LISTS)
def test_a_list_may_lack_its_last_newline_and_have_backslashes(tree, path, source):
    dataset, _, build = TREES[tree]
    build(source)
    expected = contents(read(dataset, source), source)
    text = (source / path).read_text()
    (source / path).write_text(text.rstrip("\n").replace("/", "\\"))
    assert contents(read(dataset, source), source) == expected


def test_an_unsorted_list_without_its_last_newline_is_whole(source):
    vehicle_id_lists(source)
    path = source / "vehicle_id/train_test_split/train_list.txt"
    lines = ["0000002 23781", "0000003 4407", "0000004 23781", "0000001 4407"]
    path.write_text("\n".join(lines))
    assert read("vehicle_id", source).splits["train"].class_names == ["4407", "23781"]


@pytest.mark.parametrize("tree", [*LISTS, "cars196-release"])
def test_listed_images_that_are_not_there_are_counted_and_named(tree, source):
    dataset, _, build = TREES[tree]
    expected = build(source)
    listed = "test" if tree == "tiny_imagenet" else "train"
    gone = [path for path, _ in expected[listed][:2]]
    for path in gone:
        (source / path).unlink()
    error = use(dataset, source)
    assert isinstance(error, FileNotFoundError)
    assert "2 images" in str(error)
    assert Path(gone[0]).name in str(error) or Path(gone[1]).name in str(error)


def test_cub200_lists_that_disagree_are_refused(source):
    cub200_release(source)
    path = source / "CUB_200_2011/image_class_labels.txt"
    path.write_text(path.read_text().replace("5 ", "9 ", 1))
    assert "image_class_labels.txt" in str(use("cub200", source))


@pytest.mark.parametrize("promised", ["8", "10", "nine", "", "-9"])
def test_in_shop_counts_that_differ_are_refused(promised, source):
    in_shop_img(source)
    path = source / "in-shop/Eval/list_eval_partition.txt"
    lines = path.read_text().splitlines()
    assert lines[0] == "9"
    path.write_text("\n".join([promised] + lines[1:]))
    error = use("in-shop", source)
    assert isinstance(error, ValueError) and str(path) in str(error) and "9" in str(error)


def test_an_unknown_in_shop_status_is_refused(source):
    in_shop_img(source)
    path = source / "in-shop/Eval/list_eval_partition.txt"
    path.write_text(path.read_text().replace("query", "validation", 1))
    error = use("in-shop", source)
    assert isinstance(error, ValueError) and "validation" in str(error)
    assert "train, query, gallery" in str(error)


@pytest.mark.parametrize("dataset, folder", [("cub200", "cub200/images"), ("cars196", "cars196"),
                                             ("cars196", "cars196/images"), ("folder", "")])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_fewer_than_two_classes_in_a_split_are_refused(dataset, folder, count, source):
    write_classes(source / folder, BIRDS[:count])
    error = use(dataset, source)
    assert isinstance(error, ValueError)
    assert "two or more" in str(error) and f"--dataset {dataset}" in str(error)


def test_fewer_than_two_classes_in_a_list_are_refused(source):
    vehicle_id_lists(source)
    path = source / "vehicle_id/train_test_split/test_list_800.txt"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:2]))
    assert "test_800 split has 1 class;" in str(use("vehicle_id", source))


@pytest.mark.parametrize("tree", ["tiny_imagenet", "tiny_imagenet-release"])
def test_tiny_imagenet_has_the_same_classes_in_both_splits(tree, source):
    TREES[tree][2](source)
    splits = read("tiny_imagenet", source).splits
    assert splits["train"].class_names == splits["test"].class_names
    assert splits["test"].labels == [2, 1, 0, 0, 1, 2]


def test_tiny_imagenet_labels_are_ranks_in_train_even_where_val_lacks_a_class(source):
    tiny_imagenet_named(source)
    path = source / "tiny_imagenet/val/val_annotations.txt"
    path.write_text("".join(line for line in path.read_text().splitlines(keepends=True)
                            if "n01443537" not in line))
    test = read("tiny_imagenet", source).splits["test"]
    assert test.labels == [2, 1, 1, 2] and len(test.class_names) == 3
    assert use("tiny_imagenet", source) is None


def test_tiny_imagenet_refuses_classes_of_val_that_do_not_train(source):
    tiny_imagenet_named(source)
    path = source / "tiny_imagenet/val/val_annotations.txt"
    path.write_text(path.read_text().replace("n02124075", "n99999999"))
    error = use("tiny_imagenet", source)
    assert isinstance(error, ValueError)
    assert str(path) in str(error) and "n99999999" in str(error) and "1 class" in str(error)


def test_tiny_imagenet_remarks_on_a_class_without_images(source):
    tiny_imagenet_named(source)
    (source / "tiny_imagenet/train/n99999999/images").mkdir(parents=True)
    (source / "tiny_imagenet/train/n99999998").mkdir()
    found = read("tiny_imagenet", source)
    assert len(found.odd) == 2 and "hold no image, e.g. n99999998" in found.odd[0]
    assert "2 class folders" in found.odd[0] and len(found.splits["train"].class_names) == 3


@pytest.mark.parametrize("lacking", ["train", "train/*", "val/images", "val/val_annotations.txt"])
def test_tiny_imagenet_that_is_not_whole_names_what_is_missing(lacking, source):
    tiny_imagenet_named(source)
    for path in (source / "tiny_imagenet").glob(lacking):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    error = use("tiny_imagenet", source)
    assert error and ("tiny_imagenet/" + lacking.split("/*")[0]) in str(error)


def test_a_cut_mat_file_is_refused(source):
    cars196_release(source)
    path = source / "cars196/cars_annos.mat"
    content = path.read_bytes()
    for size in range(0, len(content), 29):
        path.write_bytes(content[:size])
        error = use("cars196", source)
        assert isinstance(error, ValueError) and str(path) in str(error)


@pytest.mark.parametrize("number", [0, 5, 255])
def test_a_car_of_no_class_is_refused(number, source):
    cars196_release(source)
    path = source / "cars196/cars_annos.mat"
    rows = [(f"car_ims/{i:06d}.jpg", 1 + i % 4) for i in range(1, 8)]
    write_annotations(path, [*rows, ("car_ims/000008.jpg", number)], ("relative_im_path", "class"))
    error = use("cars196", source)
    assert isinstance(error, ValueError) and f"{path}: not every image" in str(error)


@pytest.mark.parametrize("table", [
    {}, {"annotations": 1.0, "class_names": "a"}, {"annotations": np.zeros((2, 2))},
    {"annotations": {"class": 1}, "class_names": cell(CARS)}], ids=str)
def test_a_mat_file_of_something_else_is_refused(table, source):
    cars196_release(source)
    path = source / "cars196/cars_annos.mat"
    scipy.io.savemat(path, table, do_compression=True)
    assert isinstance(use("cars196", source), ValueError)


def test_a_mat_file_that_scipy_may_crash_on_is_refused(source):
    cars196_release(source)
    path = source / "cars196/cars_annos.mat"
    table = scipy.io.loadmat(path)
    scipy.io.savemat(path, {name: table[name] for name in ("annotations", "class_names")})
    assert "not compressed" in str(use("cars196", source))


@pytest.mark.parametrize("tree", ["cars196-devkit", "cars196-torchvision"])
def test_the_test_annotations_without_classes_are_refused(tree, source):
    _, own, build = TREES[tree]
    build(source)
    path, = (source / own).rglob("cars_test_annos_withlabels.mat")
    rows = [(1, 1, 5, 5, f"{i:05d}.jpg") for i in range(1, 6)]
    write_annotations(path, rows, (*BOX, "fname"))
    error = use("cars196", source)
    assert isinstance(error, ValueError) and "not every image has a fname" in str(error)
    path.rename(path.with_name("cars_test_annos.mat"))
    error = use("cars196", source)
    assert isinstance(error, FileNotFoundError)
    assert "cars_test_annos_withlabels.mat" in str(error)
    assert "cars_test_annos.mat has none" in str(error)


def test_halves_of_cars196_may_lie_in_folders_of_their_own_names(source):
    made = write_devkit(source / "cars196")
    for name in ("cars_train", "cars_test", "devkit"):
        (source / "cars196" / name).rename(source / "aside")
        (source / "cars196" / name).mkdir()
        (source / "aside").rename(source / "cars196" / name / name)
    found = read("cars196", source)
    nested = {name: [f"{path.split('/')[0]}/{path}" for path in paths]
              for name, paths in made.items()}
    assert {s: sorted(items) for s, items in contents(found, source).items()} == {
        s: sorted(items) for s, items in expect_halves("cars196/", nested).items()}


# ---- folders as they are unpacked, named and nested by others


@pytest.mark.parametrize("tree, name", [
    ("cub200-release", "CUB_200_2011"), ("cub200-folders", "cub200"),
    ("products-release", "Stanford_Online_Products"), ("vehicle_id", "vehicle_id"),
    ("tiny_imagenet-release", "tiny-imagenet-200"), ("cars196-torchvision", "stanford_cars"),
    ("in-shop-img", "in-shop"), ("in-shop-img", "in-shop/img"),
    ("in-shop-img-img", "in-shop/Img/img"), ("in-shop-highres", "in-shop/Img/img_highres")])
def test_an_archive_unpacked_in_a_folder_of_its_name_is_found(tree, name, source):
    dataset, own, build = TREES[tree]
    expected = build(source)
    inner = f"{name}/{name.split('/')[-1]}"
    (source / name).rename(source / "aside")
    (source / name).mkdir()
    (source / "aside").rename(source / inner)
    moved = {split: sorted((path.replace(name, inner, 1), label) for path, label in items)
             for split, items in expected.items()}
    for given in (source, source / own):
        found = read(dataset, given)
        assert {s: sorted(items) for s, items in contents(found, source).items()} == moved
        assert inner in found.layout


def test_both_resolutions_of_in_shop(source):
    expected = in_shop_img_img(source)
    in_shop_highres(source)
    found = read("in-shop", source)
    assert {s: sorted(items) for s, items in contents(found, source).items()} == {
        s: sorted(items) for s, items in expected.items()}
    remark, = found.odd
    assert "img_highres is there too" in remark and f"{source}/in-shop/Img/img is taken" in remark


@pytest.mark.parametrize("train, test", [("train", "val"), ("Training", "Testing"),
                                         ("TRAIN", "validation"), ("train", "Test"),
                                         ("train", "valid")])
def test_names_of_the_folders_that_train_and_test(train, test, source):
    expected = folder_train_test(source, train, test)
    found = read("folder", source)
    assert contents(found, source) == expected and found.odd == []
    assert f"{source}/{train} and {source}/{test}" in found.layout


def test_folders_beside_train_and_test_are_noted(source):
    expected = folder_train_test(source)
    write_classes(source / "val", ["cat", "dog"])
    found = read("folder", source)
    assert contents(found, source) == expected
    assert found.odd == [f"{source}/val, beside {source}/train and {source}/test, is left out"]


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


@pytest.mark.parametrize("dataset", [name for name in datasets.DATASETS
                                     if name not in ("folder", "glyphs")])
def test_a_missing_dataset_names_the_next_step(dataset, source, monkeypatch):
    step = f"python datasets.py --dataset {dataset} --download"
    ends = "fetches it" if datasets.DATASETS[dataset].archive else "says where it is to be had"
    assert f"{step} --source_path {source} {ends}" in str(use(dataset, source))
    monkeypatch.chdir(source)
    for _ in range(2):
        with pytest.raises(FileNotFoundError, match=f"{step} {ends}"):
            datasets.DATASETS[dataset].read("./Datasets")
        (source / "Datasets").mkdir(exist_ok=True)


# ---- glyphs


@pytest.fixture(scope="module")
def glyphs():
    return datasets.read_glyphs()


def test_glyphs_are_the_same_each_time(glyphs):
    torch.manual_seed(8)
    np.random.seed(8)
    again = datasets.read_glyphs("a folder that is not there")
    for split in ("train", "test"):
        assert np.array_equal(again.splits[split].images, glyphs.splits[split].images)
        assert again.splits[split][1:] == glyphs.splits[split][1:]


def test_half_of_about_a_hundred_characters_trains(glyphs):
    train, test = glyphs.splits["train"], glyphs.splits["test"]
    assert abs(len(train.class_names) - len(test.class_names)) <= 1
    assert not set(train.class_names) & set(test.class_names)
    assert 85 <= len(set(train.class_names + test.class_names)) <= 115
    for split in (train, test):
        assert split.images.dtype == np.uint8 and split.images.ndim == 3
        assert len(split.images) == len(split.labels)
        assert set(split.labels) == set(range(len(split.class_names)))
        assert np.bincount(split.labels).min() >= 24
        for kind in (str.isupper, str.islower, str.isdigit):
            assert sum(map(kind, split.class_names)) >= 4


def test_glyphs_are_drawn_and_differ(glyphs):
    for split in glyphs.splits.values():
        assert len({image.tobytes() for image in split.images}) == len(split.images)
        bright = split.images.max((1, 2))
        assert bright.min() > 100  # a character that the font lacks would leave noise alone


def test_every_glyph_looks_like_no_other(glyphs):
    steady = SimpleNamespace(normal=lambda mean, deviation, size: np.zeros(size),
                             uniform=lambda low, high, size=(): np.full(size, (low + high) / 2))
    characters = [name for split in glyphs.splits.values() for name in split.class_names]
    drawn = {datasets.draw_glyphs(character, 1, steady).tobytes() for character in characters}
    assert len(drawn) == len(characters)


@pytest.mark.parametrize("size", [32, 16])
def test_glyphs_give_grey_items_without_random_crops(size):
    train, sets, _ = datasets.dataset_select(options("glyphs", "nowhere", image_size=size))
    for part in (train, sets[0].queries):
        image, label = part[41]
        assert image.shape == (3, size, size) and image.dtype == torch.uint8 and label == 1
        assert torch.equal(image[0], image[1]) and torch.equal(image[0], image[2])
        part.set_epoch(3)
        assert torch.equal(part[41][0], image)


# ---- what main gets


@pytest.mark.parametrize("tree, names", [("cub200-folders", [""]), ("in-shop-img", [""]),
                                         ("vehicle_id", ["set 1", "set 2", "set 3"])])
def test_evaluation_sets(tree, names, source):
    dataset, _, build = TREES[tree]
    expected = build(source)
    train, sets, found = datasets.dataset_select(options(dataset, source, seed=11))
    assert train.seed == 11 and len(train) == len(expected["train"])
    assert [each.name for each in sets] == names
    assert list(found.splits) == list(expected)
    for each in sets:
        assert each.queries.seed is None
        assert (each.gallery is not None) == (dataset == "in-shop")
    sizes = [len(part) for each in sets for part in each[1:] if part is not None]
    assert sizes == [len(items) for split, items in expected.items() if split != "train"]


# ---- the dataset check


def checked(capsys, dataset, source, *flags):
    """The return code and the output of python datasets.py."""
    try:
        code = datasets.main(["--dataset", dataset, "--source_path", str(source), *flags])
    except SystemExit as stop:
        return 1, stop.code
    return code, capsys.readouterr().out


@pytest.mark.parametrize("tree", TREES)
@pytest.mark.parametrize("flags", [[], ["--quick"]])
def test_check_counts_every_split(tree, flags, source, capsys):
    dataset, _, build = TREES[tree]
    expected = build(source)
    code, output = checked(capsys, dataset, source, *flags)
    assert code == 0 and "\nusable" in output
    for split, items in expected.items():
        classes = len({name for _, name in items})
        assert f"{split}: {classes} classes/{len(items)} images" in output
    subset = "published numbers do not apply" in output
    assert subset == bool(datasets.DATASETS[dataset].published)


@pytest.mark.parametrize("tree, counts", [
    ("cub200-folders", ["100/5,864", "100/5,924"]),
    ("cars196-images", ["98/8,054", "98/8,131"]),
    ("products-release", ["11,318/59,551", "11,316/60,502"]),
    ("in-shop-img", ["3,997/25,882", "3,985/14,218", "3,985/12,612"]),
    ("tiny_imagenet", ["200/100,000", "200/10,000"]),
    ("vehicle_id", ["13,134/110,178", "800 classes", "1,600 classes", "2,400 classes"])])
def test_check_prints_the_published_counts(tree, counts, source, capsys):
    dataset, _, build = TREES[tree]
    build(source)
    output = checked(capsys, dataset, source)[1]
    for count in counts:
        assert f"(published {count})" in output


def publish(monkeypatch, counts):
    row = datasets.DATASETS["cub200"]._replace(published=counts)
    monkeypatch.setitem(datasets.DATASETS, "cub200", row)


def test_check_of_a_whole_dataset_calls_it_no_subset(source, capsys, monkeypatch):
    cub200_folders(source)
    publish(monkeypatch, {"train": (2, 4), "test": (2, 4)})
    code, output = checked(capsys, "cub200", source)
    assert code == 0 and "(published 2/4)" in output and "note" not in output


def test_check_of_more_than_was_published(source, capsys, monkeypatch):
    cub200_folders(source)
    publish(monkeypatch, {"train": (2, 4), "test": (2, 3)})
    code, output = checked(capsys, "cub200", source)
    assert code == 0 and "the test split has 2 classes/4 images, not cub200's 2/3" in output


def test_check_names_the_smallest_and_the_largest_class(source, capsys):
    write_classes(source, ["a", "b", "c", "d", "e", "f"])
    write_image(source / "b/third.jpg")
    (source / "c/c_1.jpg").unlink()
    code, output = checked(capsys, "folder", source)
    line = next(line for line in output.splitlines() if "train:" in line)
    assert code == 0
    assert "smallest class c with 1" in line and "largest b with 3" in line
    assert "1 class" in output and "one image only" in output


def test_check_names_broken_images(source, capsys):
    write_classes(source, BIRDS)
    break_image(source / BIRDS[0] / "truncated.jpg", "truncated")
    break_image(source / BIRDS[3] / "text.jpg", "text")
    break_image(source / BIRDS[3] / "empty.jpg", "empty")
    code, output = checked(capsys, "folder", source)
    assert code == 1 and "not usable" in output
    for path in (f"{BIRDS[0]}/truncated.jpg", f"{BIRDS[3]}/text.jpg", f"{BIRDS[3]}/empty.jpg"):
        assert str(source / path) in output
    assert "good" not in output


def test_quick_check_looks_at_sizes_only(source, capsys):
    write_classes(source, BIRDS)
    break_image(source / BIRDS[0] / "text.jpg", "text")
    assert checked(capsys, "folder", source, "--quick")[0] == 0
    break_image(source / BIRDS[3] / "empty.jpg", "empty")
    (source / BIRDS[3] / "gone.jpg").symlink_to(source / "nowhere")
    code, output = checked(capsys, "folder", source, "--quick")
    assert code == 1 and "empty.jpg" in output and "gone.jpg" in output
    assert "text.jpg" not in output


def test_check_names_twenty_broken_images_at_most(source, capsys):
    write_classes(source, BIRDS)
    for i in range(25):
        (source / BIRDS[0] / f"empty_{i:02d}.jpg").write_bytes(b"")
    code, output = checked(capsys, "folder", source)
    assert code == 1 and output.count("empty_") == 20 and "5 more" in output


def test_check_of_one_class_or_of_nothing_fails(source, capsys):
    code, output = checked(capsys, "cub200", source)
    assert code == 1 and datasets.DATASETS["cub200"].layout in output
    write_classes(source, ["a", "b"])
    code, output = checked(capsys, "folder", source)
    assert code == 1 and "needs two or more" in output


def test_check_as_a_program(source):
    write_classes(source, BIRDS)
    break_image(source / BIRDS[0] / "text.jpg", "text")
    program = [sys.executable, datasets.__file__, "--dataset", "folder", "--source_path"]
    result = subprocess.run([*program, str(source)], capture_output=True, encoding="utf-8",
                            env=os.environ | {"PYTHONIOENCODING": "utf-8"})
    assert result.returncode == 1
    assert "text.jpg" in result.stdout and "Traceback" not in result.stderr


def test_check_shows_its_progress_on_a_terminal_only(source, monkeypatch):
    write_classes(source, BIRDS)
    for is_terminal in (True, False):
        output = io.StringIO()
        output.isatty = lambda: is_terminal
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", output)
            assert datasets.main(["--dataset", "folder", "--source_path", str(source)]) == 0
        assert ("reading train: 4 of 4" in output.getvalue()) == is_terminal


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])
def test_check_prints_names_that_the_output_cannot_show(encoding, source, monkeypatch):
    write_classes(source, ["été", "喜鹊"])
    write_classes(source, BIRDS[:2])
    with monkeypatch.context() as patch:
        stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
        patch.setattr(sys, "stdout", stream)
        assert datasets.main(["--dataset", "folder", "--source_path", str(source)]) == 0
        with pytest.raises(SystemExit, match="é is not a folder"):
            datasets.main(["--dataset", "folder", "--source_path", str(source / "é")])
    stream.flush()
    output = stream.buffer.getvalue().decode(encoding)
    assert "test: 2 classes/4 images" in output and "codec" not in output


def test_check_of_glyphs(capsys):
    code, output = checked(capsys, "glyphs", "nowhere")
    assert code == 0 and "published" not in output


RAW = "\x1b[31mred\n\x07"  # a name that would colour, break and ring
SHOWN = "\\x1b[31mred\\n\\x07"


def test_names_never_reach_the_terminal_raw(source, capsys):
    write_classes(source, [RAW, "b", "c", f"{RAW}z"])
    (source / f"{RAW}empty").mkdir()
    (source / RAW / f"broken{RAW}.jpg").write_text("no image")
    (source / RAW / f"text.{RAW}").write_text("no image")
    code, output = checked(capsys, "folder", source)
    assert code == 1 and "\x1b" not in output and "\x07" not in output
    lines = output.splitlines()
    assert sum("smallest class" in line and SHOWN in line for line in lines) == 1
    for words in (f"broken{SHOWN}.jpg: not an image", f"e.g. {SHOWN}empty", f"1 .{SHOWN}"):
        assert sum(words in line for line in lines) == 1
    given = str(source / f"{RAW}empty")
    code, output = checked(capsys, "folder", given)
    assert code == 1 and "\x1b" not in output and SHOWN in output.splitlines()[0]
    code, output = checked(capsys, "cars196", given, "--download")
    assert "\x1b" not in output and SHOWN in output


def test_the_source_path_is_expanded(source, capsys, monkeypatch):
    write_classes(source / "data", BIRDS)
    monkeypatch.setenv("HOME", str(source))
    assert datasets.main(["--dataset", "folder", "--source_path=~/data"]) == 0
    assert f"class folders in {source}/data" in capsys.readouterr().out
