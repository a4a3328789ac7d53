"""Image files, items and their draws, transforms, the cache of decoded images."""

import io
import itertools
import os
import random
import sys
from pathlib import Path
from resource import RUSAGE_SELF, getrusage

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

import datasets
import evaluate
import images
import main
from conftest import make_tree
from test_datasets import (break_image, folder_train_test, noise, options, source,  # noqa: F401
                           write_image)


# ---- items


@pytest.fixture
def photographs(tmp_path):
    """A split of six images; the last two show the same."""
    paths = [tmp_path / f"{i}.png" for i in range(6)]
    for i, path in enumerate(paths):
        noise(path, seed=min(i, 4))
    return datasets.Split([str(path) for path in paths], [0, 0, 1, 1, 2, 2], ["a", "b", "c"])


def split_of(*paths):
    return datasets.Split([str(path) for path in paths], [0] * len(paths), ["a"])


def torchvision_crops(size):
    """The training transform of PIL images as torchvision has always had it."""
    from torchvision import transforms as T
    return T.Compose([T.RandomResizedCrop(size), T.RandomHorizontalFlip(), T.PILToTensor()])


def training_set(split, seed=3, epoch=0, views=1):
    dataset = images.ImageDataset(split, images.crop_transforms(16, views)[0], seed, views)
    dataset.set_epoch(epoch)
    return dataset


def drawn(dataset):
    """All views of all items, in one tensor."""
    return torch.cat([torch.stack(dataset[i][:-1]) for i in range(len(dataset))])


def test_test_images_are_resized_and_cropped_at_the_centre(tmp_path):
    def item(image_size, number=1, seed=None):
        transform = images.crop_transforms(image_size)[number]
        return images.ImageDataset(split_of(tmp_path / "a.png"), transform, seed)[0]

    for size, side in ((224, 256), (227, 256), (28, 32)):
        pixels = noise(tmp_path / "a.png", (side, side))
        image, label = item(size)
        assert image.dtype == torch.uint8 and image.shape == (3, size, size) and label == 0
        edge = round((side - size) / 2)
        centre = pixels[edge:edge + size, edge:edge + size].transpose(2, 0, 1)
        assert np.array_equal(image.numpy(), centre)
    for shape in ((1, 1), (1, 300), (300, 1), (33, 17)):
        write_image(tmp_path / "a.png", size=shape)
        for image, _ in (item(16), item(16, number=0, seed=0)):
            assert image.shape == (3, 16, 16) and image.dtype == torch.uint8
            assert (image == torch.tensor([200, 60, 20]).view(3, 1, 1)).all()


def test_crops_have_the_scale_the_interpolation_and_the_resize_that_were_asked_for(tmp_path):
    from torchvision import transforms as T
    from torchvision.transforms import InterpolationMode
    pixels = noise(tmp_path / "a.png", (60, 80))
    picture = Image.fromarray(pixels)
    train, test = images.crop_transforms(32, crop_scale=(0.5, 0.6), interpolation="bicubic",
                                         eval_resize=40)
    oracle = T.Compose([T.Resize(40, InterpolationMode.BICUBIC), T.CenterCrop(32),
                        T.PILToTensor()])
    assert torch.equal(test(picture), oracle(picture))
    crop, = [step for step in train.transforms if hasattr(step, "scale")]
    assert crop.scale == (0.5, 0.6) and crop.interpolation == InterpolationMode.BICUBIC
    split = split_of(tmp_path / "a.png")
    kept = images.cache_splits("ram", {"test": split}, 40, "bicubic")["test"]
    stored = images.ImageDataset(split, test, stored=kept)[0][0]
    assert torch.equal(stored, test(picture))


def test_a_crop_scale_is_an_interval(tmp_path):
    tree = make_tree(tmp_path / "tree", (4,) * 4)
    for scale in (["0.9", "0.2"], ["0.1", "0.2", "0.3"]):
        with pytest.raises(ValueError, match="--crop_scale 0.. 0.2"):
            datasets.dataset_select(main.parse_options(
                ["--dataset", "folder", "--source_path", str(tree), "--crop_scale", *scale]))


@pytest.mark.parametrize("shape", [(32, 32), (32, 32, 3)])
def test_a_split_may_be_an_array_of_images(shape):
    array = np.random.default_rng(0).integers(0, 256, (6, *shape), dtype=np.uint8)
    split = datasets.Split(array, [0, 0, 1, 1, 2, 2], ["a", "b", "c"])
    expected = torch.from_numpy(array if len(shape) == 3 else array[..., None].repeat(3, 3))
    train, test = images.crop_transforms(28)
    for (image, _), pixels in zip(images.ImageDataset(split, test), expected):
        assert torch.equal(image, pixels[2:30, 2:30].permute(2, 0, 1))
    image, label = images.ImageDataset(split, train, seed=0)[3]
    assert image.shape == (3, 28, 28) and label == 1


def test_test_items_are_the_same_each_time(photographs):
    dataset = images.ImageDataset(photographs, images.crop_transforms(16)[1], views=2)
    assert len(dataset) == 6 and [label for *_, label in dataset] == photographs.labels
    first = drawn(dataset)
    assert torch.equal(first[::2], first[1::2])
    dataset.set_epoch(4)
    assert torch.equal(drawn(dataset), first)


@pytest.mark.parametrize("views", [1, 2])
def test_training_items_are_a_function_of_seed_epoch_and_index(photographs, views):
    dataset = training_set(photographs, views=views)
    first = drawn(dataset)
    assert first.dtype == torch.uint8 and len({image.numpy().tobytes() for image in first}) == (
        6 * views)  # also of the same photograph, drawn for two indices
    assert [item[-1] for item in dataset] == photographs.labels
    torch.manual_seed(99)
    dataset.set_epoch(7)
    dataset[0]
    dataset.set_epoch(0)
    backwards = [torch.stack(dataset[i][:-1]) for i in (5, 4, 3, 2, 1, 0)]
    assert torch.equal(torch.cat(backwards[::-1]), first)
    assert torch.equal(first[::views], drawn(training_set(photographs)))  # the first view
    seen = [drawn(training_set(photographs, seed, epoch, views))
            for seed in (0, 3, 2 ** 32 - 1) for epoch in (0, 1, 2)]
    assert len({pictures.numpy().tobytes() for pictures in seen}) == 9
    assert torch.equal(seen[3], first)


def test_other_random_numbers_are_left_alone(photographs):
    states = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    training_set(photographs, views=2)[0]
    training_set(photographs).__getitems__([0, 0, 1])
    with pytest.raises(FileNotFoundError):
        training_set(split_of("nothing.jpg"))[0]
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.random.get_state()[1].tolist() == states[1] and random.getstate() == states[2]


@pytest.mark.parametrize("views", [1, 2])
def test_batches_by_any_number_of_processes_with_repeats_that_differ(photographs, views):
    dataset = training_set(photographs, views=views)
    items = dataset.__getitems__([0, 3, 0, 0])
    assert torch.equal(items[0][0], dataset[0][0]) and torch.equal(items[1][0], dataset[3][0])
    pictures = {view.numpy().tobytes() for item in items for view in item[:-1]}
    assert len(pictures) == 4 * views and [item[-1] for item in items] == [0, 1, 0, 0]
    batches, seen = [[0, 1, 1], [5, 4, 0], [2, 2, 2], [3]], []
    loaders = [DataLoader(dataset, batch_sampler=batches, num_workers=workers,
                          persistent_workers=workers > 0) for workers in (0, 2)]
    for epoch in (0, 1, 0):
        dataset.set_epoch(epoch)
        here, there = (torch.cat([view for *pictures, _ in loader for view in pictures])
                       for loader in loaders)
        assert torch.equal(here, there)
        seen.append(here)
    assert torch.equal(seen[0], seen[2]) and not torch.equal(seen[0], seen[1])
    dataset.share = (1, 2)  # the second of two processes
    assert torch.equal(dataset.__getitems__([5, 3, 0, 0])[1][0], dataset.item(0, 1)[0])


def test_views_that_main_asks_for(source):
    folder_train_test(source)
    for opt in (options("folder", source), options("glyphs", "nowhere", image_size=32)):
        queries = []
        for views in (1, 2):
            train, sets, _ = datasets.dataset_select(opt, views=views)
            assert len(train[0]) == views + 1 and len(sets[0].queries[0]) == 2
            queries.append(sets[0].queries[1][0])
        assert torch.equal(*queries)
    for i in (0, 41, 500):  # two views of a glyph differ a little
        first, second, label = train[i]
        assert first.shape == (3, 32, 32) and first.dtype == torch.uint8 and label == i // 40
        assert not torch.equal(first, second) and torch.equal(first[0], first[2])


# ---- image files


def grey(value, suffix, dtype=np.uint16, white=None):
    """An image of one value, but for a pixel that is white, where that is given."""
    pixels = np.full((20, 20), value, dtype=dtype)
    pixels[0, 0] = value if white is None else white
    return Image.fromarray(pixels), suffix, {}


def palette(suffix=".png", **saving):
    return Image.new("RGB", (20, 20), (10, 200, 30)).quantize(), suffix, saving


FORMATS = {  # name: ((image, suffix, how to save it), the colour that its pixels should have)
    "grey": ((Image.new("L", (20, 20), 90), ".png", {}), (90, 90, 90)),
    "grey jpeg": ((Image.new("L", (20, 20), 90), ".jpg", {}), (90, 90, 90)),
    "grey with alpha": ((Image.new("LA", (20, 20), (90, 255)), ".png", {}), (90, 90, 90)),
    "black and white": ((Image.new("1", (20, 20), 1), ".png", {}), (255, 255, 255)),
    "palette with transparency": (palette(transparency=b"\x80" * 256), (10, 200, 30)),
    "gif": (palette(".gif"), (10, 200, 30)),
    "alpha": ((Image.new("RGBA", (20, 20), (10, 200, 30, 255)), ".png", {}), (10, 200, 30)),
    "cmyk": ((Image.new("CMYK", (20, 20), (0, 255, 255, 0)), ".jpg", {}), (255, 0, 0)),
    "16 bits, black": (grey(0, ".png"), (0, 0, 0)),
    "16 bits, white": (grey(0xFFFF, ".png"), (255, 255, 255)),
    "16 bits, tiff": (grey(0x4000, ".tif"), (64, 64, 64)),
    "8 bits in 16": (grey(100, ".tif", white=255), (100, 100, 100)),
    "10 bits in 16": (grey(512, ".tif", white=1000), (128, 128, 128)),
    "12 bits in 16": (grey(2048, ".png", white=4095), (128, 128, 128)),
    "14 bits in 32": (grey(8192, ".tif", np.int32, 16383), (128, 128, 128)),
    "32 bits": (grey(2 ** 29, ".tif", np.int32, 2 ** 30), (128, 128, 128)),
    "floats to 1": (grey(0.5, ".tif", np.float32, 1), (128, 128, 128)),
    "floats to 255": (grey(200, ".tif", np.float32), (200, 200, 200)),
    "a portable grey map": (grey(0x8000, ".pgm", np.int32, 0xFFFF), (128, 128, 128)),
}


@pytest.mark.filterwarnings("ignore:Palette images with Transparency")
def test_images_of_every_mode_become_rgb(tmp_path):
    for name, ((image, suffix, saving), colour) in FORMATS.items():
        path = f"{tmp_path}/image{suffix}"
        image.save(path, **saving)
        read = images.read_image(path)
        assert read.mode == "RGB", name
        assert np.array_equal(images.read_pixels(path).permute(1, 2, 0), np.asarray(read)), name
        for transform, seed in zip(images.crop_transforms(16), (0, None)):
            item, _ = images.ImageDataset(split_of(path), transform, seed)[0]
            assert item.shape == (3, 16, 16) and item.dtype == torch.uint8, name
            assert (item.int() - torch.tensor(colour).view(3, 1, 1)).abs().max() <= 2, name


def test_values_that_have_no_black_are_refused(tmp_path):
    path = f"{tmp_path}/image.tif"
    for value, dtype in ((-1, np.float32), (np.nan, np.float32), (np.inf, np.float32)):
        grey(0, path, dtype, value)[0].save(path)
        with pytest.raises(ValueError, match=f"image.tif.*its values run from.*{value:g}"):
            images.read_image(path)


@pytest.mark.filterwarnings("ignore:Image size")
def test_images_are_read_up_to_the_size_that_pil_refuses(tmp_path, monkeypatch):
    path = tmp_path / "a.jpg"
    Image.new("RGB", (14, 14)).save(path)
    content = path.read_bytes()
    start, before = content.index(b"\xff\xc0") + 5, getrusage(RUSAGE_SELF).ru_maxrss
    path.write_bytes(content[:start] + (40_000).to_bytes(2, "big") * 2 + content[start + 4:])
    for read in (images.read_image, images.read_pixels):
        with pytest.raises(ValueError, match="a.jpg.*decompression bomb"):
            read(str(path))
    assert getrusage(RUSAGE_SELF).ru_maxrss < before + 2 ** 16  # KiB
    path.write_bytes(content)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)  # PIL warns there, and refuses at twice
    assert images.read_image(str(path)).size == (14, 14)


@pytest.mark.parametrize("read", [images.read_image, images.read_pixels])
def test_a_broken_or_missing_image_is_named(read, tmp_path):
    path = tmp_path / "bird.jpg"
    for kind in ("truncated", "text", "empty", "header only", "png header only"):
        break_image(path, kind)
        with pytest.raises(ValueError, match="bird.jpg: not an image, or a broken one") as caught:
            read(str(path))
        assert "\n" not in str(caught.value)
    Image.new("RGB", (9, 9)).save(path, "EPS")  # for which PIL would run a program
    with pytest.raises(ValueError, match="bird.jpg: not an image.*cannot identify"):
        read(str(path))
    with pytest.raises(FileNotFoundError, match="none.jpg"):
        read(str(tmp_path / "none.jpg"))


@pytest.mark.parametrize("workers", [0, 1])
def test_the_last_line_of_a_loading_error_has_the_path(workers, photographs):
    break_image(Path(photographs.images[3]), "truncated")
    loader = DataLoader(training_set(photographs), batch_size=2, num_workers=workers)
    with pytest.raises(ValueError) as caught:
        list(loader)
    assert photographs.images[3] in str(caught.value).splitlines()[-1]


def photograph(mode="RGB", size=(61, 43), seed=0):
    """An image with smooth and rough parts."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    image.paste(image.resize((7, 5)).resize((size[0] // 2 + 1, size[1])), (0, 0))
    return image.convert(mode)


def test_both_decoders_read_the_same_pixels(tmp_path, monkeypatch):
    turned = Image.Exif()  # how a camera was held, which no reader here heeds
    turned[0x112] = 6
    path = f"{tmp_path}/é.jpg"
    for mode in ("RGB", "L", "CMYK"):
        for saving in ({}, dict(progressive=True), dict(quality=5, subsampling=2, exif=turned)):
            photograph(mode).save(path, **saving)
            pixels = images.read_pixels(path)
            assert pixels.dtype == torch.uint8 and pixels.shape == (3, 43, 61)
            assert np.array_equal(pixels.permute(1, 2, 0), np.asarray(images.read_image(path)))

    def refuse(*args, **kwargs):
        raise RuntimeError("torchvision was built without libjpeg")

    photograph().save(path)
    pixels = images.read_pixels(path)
    monkeypatch.setattr("torchvision.io.decode_jpeg", refuse)
    assert torch.equal(images.read_pixels(path), pixels)
    monkeypatch.delattr("torchvision.io.decode_jpeg")
    assert torch.equal(images.read_pixels(path), pixels)


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".gif", ".tif"])
@pytest.mark.filterwarnings("ignore")
def test_damaged_bytes_are_the_same_to_both_decoders(suffix, tmp_path):
    def outcome(read):
        try:
            return np.asarray(read(path))
        except ValueError as error:
            assert path in str(error)
            return str(error)

    path = f"{tmp_path}/image{suffix}"
    photograph().save(path)
    whole, generator, kinds = Path(path).read_bytes(), random.Random(1), set()
    for _ in range(150 if suffix == ".jpg" else 30):
        content = bytearray(whole)
        for _ in range(generator.choice((0, 1, 5, 20))):
            content[generator.randrange(len(content))] = generator.randrange(256)
        Path(path).write_bytes(content[:generator.choice((None, -2, generator.randrange(999)))])
        by_pil = outcome(images.read_image)
        other = outcome(lambda path: images.read_pixels(path).permute(1, 2, 0))
        assert type(by_pil) is type(other) and np.array_equal(by_pil, other)
        kinds.add(type(by_pil))
    assert kinds == {str, np.ndarray}


def test_training_crops_are_those_of_torchvision_on_pil(tmp_path):
    """The crops and flips that a seed has always drawn; the fast way is off by rounding alone."""
    oracle, transform = torchvision_crops(32), images.crop_transforms(32)[0]
    for size in ((61, 43), (9, 200), (1, 1)):
        photograph(size=size).save(tmp_path / "a.jpg")
        sets = [images.ImageDataset(split_of(tmp_path / "a.jpg"), *given) for given in (
            (oracle, 5), (transform, 5), (transform, 5, 1, (0, 1), images.read_pixels))]
        for epoch in range(20):
            for part in sets:
                part.set_epoch(epoch)
            expected, same, fast = (part[0][0] for part in sets)
            assert torch.equal(expected, same)
            assert fast.dtype == torch.uint8 and fast.shape == expected.shape
            assert (fast.int() - expected.int()).abs().max() <= 2


# ---- the cache

SHAPES = [(40, 30), (1, 30), (30, 1), (5, 4), (3, 80), (16, 16), (90, 20), (200, 11)]


@pytest.fixture
def gallery(source):
    """A folder dataset of images of many shapes, JPEGs and PNGs; four classes."""
    for label, (i, size) in itertools.product(range(4), enumerate(SHAPES)):
        path = source / f"class_{label}/{i}{'.png' if i % 2 else '.jpg'}"
        path.parent.mkdir(exist_ok=True)
        photograph(size=size, seed=10 * label + i).save(path)
    return source


def cached(gallery, kind, image_size=16, **given):
    """The training set and the test set of --cache kind."""
    train, sets, _ = datasets.dataset_select(options("folder", gallery, image_size, cache=kind),
                                             **given)
    return train, sets[0].queries


def batches_of(dataset, batches, workers=0):
    """The pictures of batches of indices and their labels."""
    loader = DataLoader(dataset, batch_sampler=batches, num_workers=workers)
    pictures, labels = zip(*loader)
    return torch.cat(pictures), torch.cat(labels)


def test_which_images_are_read_how(gallery):
    train, test = cached(gallery, "none")
    assert train.read is images.read_pixels and test.read is images.read_image
    with pytest.raises(ValueError, match="--cache ram.*glyphs are in memory already"):
        datasets.dataset_select(options("glyphs", "nowhere", cache="ram"))


@pytest.mark.parametrize("kind", ["ram", "device"])
def test_cached_test_pictures_are_bit_for_bit_those_without(kind, gallery, tmp_path):
    for image_size in (16, 8, 224):
        plain, test = (cached(gallery, each, image_size)[1] for each in ("none", kind))
        pictures, labels = batches_of(test, [[0, 1, 2, 3, 4], list(range(5, 16)), [3]])
        order = [*range(16), 3]
        assert torch.equal(pictures, torch.stack([plain[i][0] for i in order]))
        assert labels.tolist() == [plain.labels[i] for i in order]
        assert len(test) == 16 and test.class_names == plain.class_names
        assert min(test.load(0).size) == images.shorter_side(image_size)
    evaluate.draw_recoveries(tmp_path / "a.png", test, None, torch.randn(16, 3), None)


def test_cached_training_crops_are_those_of_the_stored_images(gallery, tmp_path):
    train = cached(gallery, "ram")[0]
    for i in range(len(train)):
        train.load(i).save(tmp_path / f"{i:02d}.png")
    stored = split_of(*sorted(tmp_path.glob("*.png")))._replace(labels=train.labels)
    oracle = images.ImageDataset(stored, torchvision_crops(16), train.seed)
    batch = [3, 0, 5, 5, 7, 15, 5, 11]
    for epoch in (0, 1):
        train.set_epoch(epoch)
        oracle.set_epoch(epoch)
        pictures, labels = batches_of(train, [batch])
        expected, expected_labels = zip(*oracle.__getitems__(batch))
        assert (pictures.int() - torch.stack(expected).int()).abs().max() <= 2
        assert tuple(labels.tolist()) == expected_labels
    assert not torch.equal(pictures[2], pictures[3])  # an image twice in a batch: its own draws


def test_cached_numbers_are_those_of_any_cache_and_any_number_of_processes(gallery):
    batches, seen = [[0, 9, 9, 4], [5, 7, 2, 15], [2]], []
    for kind, workers in (("ram", 0), ("ram", 2), ("device", 0)):
        train = cached(gallery, kind)[0]
        seen.append(batches_of(train, batches, workers)[0])
        assert torch.equal(seen[-1], seen[0])
    first, second, _ = cached(gallery, "ram", views=2)[0][0]
    assert first.shape == second.shape == (3, 16, 16) and not torch.equal(first, second)


def test_a_broken_image_is_named_before_training(gallery):
    path = gallery / "class_3/6.jpg"
    whole = path.read_bytes()
    for content in (whole[:len(whole) // 2], b"text"):  # the header of the first is whole
        path.write_bytes(content)
        with pytest.raises(ValueError, match="6.jpg: not an image, or a broken one"):
            cached(gallery, "ram")


@pytest.mark.parametrize("kind", ["ram", "device"])
def test_a_cache_without_room_is_refused_before_decoding(kind, gallery, capsys, monkeypatch):
    needed = sum(part.stored.pixels.nbytes for part in cached(gallery, "ram"))
    for processes in (1, 3):  # of a machine, which need room for all their caches
        capsys.readouterr()
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
        room = int(processes * needed / 0.9)
        with monkeypatch.context() as patch:
            patch.setattr(images, "read_image", None)
            patch.setattr(images, "free_bytes", lambda *args: room - 1)
            with pytest.raises(ValueError, match=f"--cache {kind} needs .* MiB"):
                cached(gallery, kind)
        assert f"cache    {kind}: 32 images to decode, shorter side 18" in capsys.readouterr().out
        monkeypatch.setattr(images, "free_bytes", lambda *args: room + 2)
        cached(gallery, kind)


def test_free_bytes(monkeypatch):
    sizes = [images.free_bytes(kind, "cpu") for kind in ("ram", "device")]
    if os.path.exists("/proc/meminfo"):
        assert 0 < sizes[0] <= 1.1 * sizes[1] < 2 ** 50
    monkeypatch.setattr("builtins.open", lambda *args, **kwargs: io.StringIO("MemTotal: 5 kB\n"))
    assert images.free_bytes("ram", "cpu") is None


def test_decoding_into_a_cache_is_shown_on_a_terminal_only(gallery, monkeypatch):
    for is_terminal in (True, False):
        output = io.StringIO()
        output.isatty = lambda: is_terminal
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", output)
            cached(gallery, "ram")
        assert ("decoding test: 16 of 16" in output.getvalue()) == is_terminal
        assert ("measuring train: 16 of 16" in output.getvalue()) == is_terminal
