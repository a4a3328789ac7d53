"""Image files, items and their draws, transforms, the cache of decoded images."""

import io
import os
import random
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

import datasets
import evaluate
import images
from test_datasets import (break_image, folder_train_test, noise, options, source,  # noqa: F401
                           write_image)

# ---- items


# ---- items


@pytest.fixture
def photographs(tmp_path):
    """A split of six images; the last two show the same."""
    paths = [tmp_path / f"{i}.png" for i in range(6)]
    for i, path in enumerate(paths):
        noise(path, seed=min(i, 4))
    return datasets.Split([str(path) for path in paths], [0, 0, 1, 1, 2, 2], ["a", "b", "c"])


def training_set(split, seed=3, epoch=0):
    dataset = images.ImageDataset(split, images.crop_transforms(16)[0], seed)
    dataset.set_epoch(epoch)
    return dataset


def images_of(batches):
    return torch.cat([pictures for pictures, _ in batches])


@pytest.mark.parametrize("size, side", [(224, 256), (227, 256), (28, 32), (112, 128)])
def test_test_images_are_resized_and_cropped_at_the_centre(size, side, tmp_path):
    pixels = noise(tmp_path / "a.png", (side, side))
    split = datasets.Split([str(tmp_path / "a.png")], [0], ["a"])
    dataset = images.ImageDataset(split, images.crop_transforms(size)[1])
    image, label = dataset[0]
    assert image.dtype == torch.uint8 and image.shape == (3, size, size) and label == 0
    edge = round((side - size) / 2)
    centre = pixels[edge:edge + size, edge:edge + size].transpose(2, 0, 1)
    assert np.array_equal(image.numpy(), centre)


@pytest.mark.parametrize("shape", [(1, 1), (1, 300), (300, 1), (500, 3), (33, 17)])
def test_images_of_any_shape_give_items(shape, tmp_path):
    write_image(tmp_path / "a.png", size=shape)
    split = datasets.Split([str(tmp_path / "a.png")], [0], ["a"])
    for transform, seed in zip(images.crop_transforms(16), (0, None)):
        image, _ = images.ImageDataset(split, transform, seed)[0]
        assert image.shape == (3, 16, 16) and image.dtype == torch.uint8
        assert (image == torch.tensor([200, 60, 20]).view(3, 1, 1)).all()


@pytest.mark.parametrize("shape", [(32, 32), (32, 32, 3)])
def test_a_split_may_be_an_array_of_images(shape):
    array = np.random.default_rng(0).integers(0, 256, (6, *shape), dtype=np.uint8)
    split = datasets.Split(array, [0, 0, 1, 1, 2, 2], ["a", "b", "c"])
    expected = torch.from_numpy(array if len(shape) == 3 else array[..., None].repeat(3, 3))
    test = images.ImageDataset(split, images.crop_transforms(28)[1])
    for image, pixels in zip((image for image, _ in test), expected):
        assert torch.equal(image, pixels[2:30, 2:30].permute(2, 0, 1))
    train = images.ImageDataset(split, images.crop_transforms(28)[0], seed=0)
    assert train[3][0].shape == (3, 28, 28) and train[3][1] == 1


def test_test_items_are_the_same_each_time(photographs):
    dataset = images.ImageDataset(photographs, images.crop_transforms(16)[1])
    assert len(dataset) == 6 and [label for _, label in dataset] == photographs.labels
    first = [dataset[i][0] for i in range(6)]
    torch.manual_seed(5)
    dataset.set_epoch(4)
    assert all(torch.equal(dataset[i][0], first[i]) for i in (5, 2, 0, 1, 4, 3))


def test_training_items_are_a_function_of_seed_epoch_and_index(photographs):
    dataset = training_set(photographs)
    first = [dataset[i][0] for i in range(6)]
    torch.manual_seed(99)
    dataset.set_epoch(7)
    dataset[0]
    dataset.set_epoch(0)
    assert all(torch.equal(dataset[i][0], first[i]) for i in (5, 2, 0, 1, 4, 3))
    again = training_set(photographs)
    assert all(torch.equal(image, other) for (image, _), other in zip(again, first))
    assert not torch.equal(first[4], first[5])  # the same photograph, drawn for two indices


def test_training_items_change_with_epoch_and_seed(photographs):
    seen = [torch.stack([image for image, _ in training_set(photographs, seed, epoch)])
            for seed in (0, 1, 2 ** 32 - 1) for epoch in (0, 1, 2)]
    for i, images in enumerate(seen):
        assert not any(torch.equal(images, other) for other in seen[:i])


def test_training_items_are_cropped_and_flipped_at_random(tmp_path):
    pixels = np.zeros((32, 32, 3), dtype=np.uint8)
    pixels[:, :, 0] = np.arange(32) * 8  # red grows to the right
    Image.fromarray(pixels).save(tmp_path / "a.png")
    dataset = training_set(datasets.Split([str(tmp_path / "a.png")], [0], ["a"]))
    flipped, widths = 0, set()
    for epoch in range(60):
        dataset.set_epoch(epoch)
        red = dataset[0][0][0].double()
        flipped += bool(red[:, 0].mean() > red[:, -1].mean())
        widths.add(round(float(abs(red[:, 0].mean() - red[:, -1].mean())) / 8))
    assert 15 <= flipped <= 45
    assert len(widths) >= 6


def test_other_random_numbers_are_left_alone(photographs):
    broken = datasets.Split(["nothing.jpg"], [0], ["a"])
    states = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    training_set(photographs)[0]
    training_set(photographs).__getitems__([0, 0, 1])
    with pytest.raises(FileNotFoundError):
        training_set(broken)[0]
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.random.get_state()[1].tolist() == states[1] and random.getstate() == states[2]


def test_repeats_within_a_batch_differ(photographs):
    dataset = training_set(photographs)
    items = dataset.__getitems__([0, 3, 0, 0])
    assert torch.equal(items[0][0], dataset[0][0]) and torch.equal(items[1][0], dataset[3][0])
    drawn = [items[i][0] for i in (0, 2, 3)]
    assert not any(torch.equal(a, b) for a, b in ((drawn[0], drawn[1]), (drawn[0], drawn[2]),
                                                  (drawn[1], drawn[2])))
    assert [label for _, label in items] == [0, 1, 0, 0]
    loader = DataLoader(dataset, batch_sampler=[[0, 3, 0, 0]])
    assert torch.equal(images_of(loader), torch.stack([image for image, _ in items]))


def test_loading_processes_change_nothing(photographs):
    batches = [[0, 1, 1], [5, 4, 0], [2, 2, 2], [3]]
    dataset = training_set(photographs)
    loader = DataLoader(dataset, batch_sampler=batches, num_workers=2, persistent_workers=True)
    seen = []
    for epoch in (0, 1, 0, 5):
        dataset.set_epoch(epoch)
        seen.append(images_of(loader))
        assert torch.equal(seen[-1], images_of(DataLoader(dataset, batch_sampler=batches)))
    assert torch.equal(seen[0], seen[2]) and not torch.equal(seen[0], seen[1])


# ---- two views of an image


def two_views(split, seed=3, epoch=0):
    part = images.ImageDataset(split, images.crop_transforms(16, 2)[0], seed, views=2)
    part.set_epoch(epoch)
    return part


def test_two_views_are_two_draws_and_the_label(photographs):
    dataset = two_views(photographs)
    for i, label in enumerate(photographs.labels):
        first, second, own = dataset[i]
        assert first.shape == second.shape == (3, 16, 16) and own == label
        assert first.dtype == second.dtype == torch.uint8 and not torch.equal(first, second)
        assert torch.equal(first, training_set(photographs)[i][0])  # the one view of a plain run


def test_two_views_are_a_function_of_seed_epoch_and_index(photographs):
    def views(**given):
        return torch.stack([torch.stack(item[:2]) for item in two_views(photographs, **given)])

    expected = views()
    torch.manual_seed(8)
    state = torch.get_rng_state()
    assert torch.equal(views(), expected) and torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(views(epoch=1), expected) and not torch.equal(views(seed=4), expected)
    items = two_views(photographs).__getitems__([2, 2])
    assert len({view.numpy().tobytes() for item in items for view in item[:2]}) == 4


def test_loading_processes_change_no_view(photographs):
    dataset, batches = two_views(photographs), [[0, 1, 1], [5, 4, 0], [2, 2, 2], [3]]
    seen = [list(DataLoader(dataset, batch_sampler=batches, num_workers=workers))
            for workers in (0, 2)]
    for first, second in zip(*seen, strict=True):
        assert len(first) == 3 and all(torch.equal(a, b) for a, b in zip(first, second))


def test_two_views_without_a_seed_are_the_same_picture(photographs):
    dataset = images.ImageDataset(photographs, images.crop_transforms(16)[1], views=2)
    first, second, label = dataset[3]
    assert torch.equal(first, second) and label == 1


def test_views_that_main_asks_for(source):
    folder_train_test(source)
    train, sets, _ = datasets.dataset_select(options("folder", source), views=2)
    assert len(train[0]) == 3 and len(sets[0].queries[0]) == 2
    train, _, _ = datasets.dataset_select(options("folder", source))
    assert len(train[0]) == 2


def test_two_views_of_a_glyph_differ_a_little():
    train, sets, _ = datasets.dataset_select(options("glyphs", "nowhere", image_size=32), views=2)
    for i in (0, 41, 500):
        first, second, label = train[i]
        assert first.shape == (3, 32, 32) and first.dtype == torch.uint8 and label == i // 40
        assert not torch.equal(first, second) and torch.equal(first[0], first[2])
    _, plain, _ = datasets.dataset_select(options("glyphs", "nowhere", image_size=32))
    assert torch.equal(sets[0].queries[5][0], plain[0].queries[5][0])


def grey(value, suffix, dtype=np.uint16, white=None):
    """An image of one value, but for a pixel that is white, where that is given."""
    pixels = np.full((20, 20), value, dtype=dtype)
    pixels[0, 0] = value if white is None else white
    return Image.fromarray(pixels), suffix, {}


def palette(**saving):
    return Image.new("RGB", (20, 20), (10, 200, 30)).quantize(), ".png", saving


FORMATS = {  # name: ((image, suffix, how to save it), the colour that its pixels should have)
    "grey": ((Image.new("L", (20, 20), 90), ".png", {}), (90, 90, 90)),
    "grey jpeg": ((Image.new("L", (20, 20), 90), ".jpg", {}), (90, 90, 90)),
    "grey with alpha": ((Image.new("LA", (20, 20), (90, 255)), ".png", {}), (90, 90, 90)),
    "black and white": ((Image.new("1", (20, 20), 1), ".png", {}), (255, 255, 255)),
    "palette": (palette(), (10, 200, 30)),
    "palette with transparency": (palette(transparency=b"\x80" * 256), (10, 200, 30)),
    "gif": ((Image.new("RGB", (20, 20), (10, 200, 30)).quantize(), ".gif", {}), (10, 200, 30)),
    "alpha": ((Image.new("RGBA", (20, 20), (10, 200, 30, 255)), ".png", {}), (10, 200, 30)),
    "cmyk": ((Image.new("CMYK", (20, 20), (0, 255, 255, 0)), ".jpg", {}), (255, 0, 0)),
    "16 bits, black": (grey(0, ".png"), (0, 0, 0)),
    "16 bits, mid-grey": (grey(0x8000, ".png"), (128, 128, 128)),
    "16 bits, white": (grey(0xFFFF, ".png"), (255, 255, 255)),
    "16 bits, tiff": (grey(0x4000, ".tif"), (64, 64, 64)),
    "8 bits in 16": (grey(100, ".tif", white=255), (100, 100, 100)),
    "10 bits in 16": (grey(512, ".tif", white=1000), (128, 128, 128)),
    "12 bits in 16": (grey(2048, ".png", white=4095), (128, 128, 128)),
    "14 bits in 32": (grey(8192, ".tif", np.int32, 16383), (128, 128, 128)),
    "32 bits": (grey(2 ** 29, ".tif", np.int32, 2 ** 30), (128, 128, 128)),
    "floats to 1": (grey(0.5, ".tif", np.float32, 1), (128, 128, 128)),
    "floats to 255": (grey(200, ".tif", np.float32), (200, 200, 200)),
    "floats of 16 bits": (grey(32768, ".tif", np.float32, 65535), (128, 128, 128)),
    "a portable grey map": (grey(0x8000, ".pgm", np.int32, 0xFFFF), (128, 128, 128)),
}


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.filterwarnings("ignore:Palette images with Transparency")
def test_images_of_every_mode_become_rgb(name, tmp_path):
    (image, suffix, saving), colour = FORMATS[name]
    path = f"{tmp_path}/image{suffix}"
    image.save(path, **saving)
    assert images.read_image(path).mode == "RGB"
    split = datasets.Split([path], [0], ["a"])
    for transform, seed in zip(images.crop_transforms(16), (0, None)):
        item, _ = images.ImageDataset(split, transform, seed)[0]
        assert item.shape == (3, 16, 16) and item.dtype == torch.uint8
        assert (item.int() - torch.tensor(colour).view(3, 1, 1)).abs().max() <= 2


@pytest.mark.parametrize("value, dtype", [(-1, np.float32), (np.nan, np.float32),
                                          (np.inf, np.float32), (-5, np.int32)])
def test_values_that_have_no_black_are_refused(value, dtype, tmp_path):
    path = f"{tmp_path}/image.tif"
    grey(0, path, dtype, value)[0].save(path)
    with pytest.raises(ValueError, match="image.tif.*its values run from") as caught:
        images.read_image(path)
    assert f"{value:g}" in str(caught.value)


@pytest.mark.filterwarnings("ignore:Image size")
def test_images_are_read_up_to_the_size_that_pil_refuses(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)  # PIL warns there, and refuses at twice
    for side in (14, 15):
        Image.new("RGB", (side, side)).save(tmp_path / f"{side}.png")
    assert images.read_image(str(tmp_path / "14.png")).size == (14, 14)
    assert images.read_pixels(str(tmp_path / "14.png")).shape == (3, 14, 14)
    with pytest.raises(ValueError, match="15.png.*decompression bomb"):
        images.read_image(str(tmp_path / "15.png"))


@pytest.mark.parametrize("kind", ["truncated", "text", "empty", "header only", "png header only"])
def test_a_broken_image_is_named(kind, tmp_path):
    break_image(tmp_path / "bird.jpg", kind)
    with pytest.raises(ValueError) as caught:
        images.read_image(str(tmp_path / "bird.jpg"))
    message = str(caught.value)
    assert str(tmp_path / "bird.jpg") in message and "\n" not in message


def test_a_missing_image_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="bird.jpg"):
        images.read_image(str(tmp_path / "bird.jpg"))


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".gif", ".bmp", ".tif", ".webp"])
@pytest.mark.filterwarnings("ignore")
def test_damaged_bytes_give_an_image_or_a_value_error(suffix, tmp_path):
    path = tmp_path / f"image{suffix}"
    noise(path, (16, 16))
    whole, generator = path.read_bytes(), random.Random(1)
    for _ in range(60):
        content = bytearray(whole)
        for _ in range(generator.choice((1, 4, 20))):
            content[generator.randrange(len(content))] = generator.randrange(256)
        size = generator.choice((len(content), generator.randrange(len(content))))
        path.write_bytes(content[:size])
        try:
            assert images.read_image(str(path)).mode == "RGB"
        except ValueError as error:
            assert str(path) in str(error)


@pytest.mark.parametrize("workers", [0, 1])
def test_the_last_line_of_a_loading_error_has_the_path(workers, photographs, tmp_path):
    break_image(Path(photographs.images[3]), "truncated")
    loader = DataLoader(training_set(photographs), batch_size=2, num_workers=workers)
    with pytest.raises(ValueError) as caught:
        list(loader)
    assert photographs.images[3] in str(caught.value).splitlines()[-1]


# ---- JPEGs, which torchvision decodes and torch resizes


def orientation(number):
    """Exif that says how a camera was held, which no reader here heeds."""
    exif = Image.Exif()
    exif[0x112] = number
    return exif


JPEGS = {"plain": {}, "progressive": dict(progressive=True), "fine": dict(subsampling=0),
         "coarse": dict(quality=5, subsampling=2), "turned": dict(exif=orientation(6))}


def photograph(mode="RGB", size=(61, 43), seed=0):
    """An image with smooth and rough parts."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    image.paste(image.resize((7, 5)).resize((size[0] // 2 + 1, size[1])), (0, 0))
    return image.convert(mode)


@pytest.mark.parametrize("saving", JPEGS)
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_both_decoders_read_the_same_pixels(saving, mode, tmp_path):
    path = f"{tmp_path}/é.jpg"
    photograph(mode).save(path, **JPEGS[saving])
    pixels = images.read_pixels(path)
    assert pixels.dtype == torch.uint8 and pixels.shape == (3, 43, 61)
    assert np.array_equal(pixels.permute(1, 2, 0), np.asarray(images.read_image(path)))


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.filterwarnings("ignore:Palette images with Transparency")
def test_pixels_of_every_mode(name, tmp_path):
    (image, suffix, saving), _ = FORMATS[name]
    path = f"{tmp_path}/image{suffix}"
    image.save(path, **saving)
    assert np.array_equal(images.read_pixels(path).permute(1, 2, 0),
                          np.asarray(images.read_image(path)))


@pytest.mark.parametrize("lost", ["the decoder", "its library"])
def test_pixels_without_a_decoder_in_torchvision(lost, tmp_path, monkeypatch):
    photograph().save(tmp_path / "a.jpg")
    expected = images.read_pixels(str(tmp_path / "a.jpg"))

    def refuse(*args, **kwargs):
        raise RuntimeError("torchvision was built without libjpeg")

    if lost == "the decoder":
        monkeypatch.delattr("torchvision.io.decode_jpeg")
    else:
        monkeypatch.setattr("torchvision.io.decode_jpeg", refuse)
    assert torch.equal(images.read_pixels(str(tmp_path / "a.jpg")), expected)


def test_damaged_jpegs_are_the_same_to_both_decoders(tmp_path):
    def outcome(read):
        try:
            return np.asarray(read(str(path)))
        except ValueError as error:
            return str(error)

    path = tmp_path / "a.jpg"
    photograph().save(path)
    whole, generator = path.read_bytes(), random.Random(2)
    refused = 0
    for _ in range(150):
        content = bytearray(whole)
        for _ in range(generator.choice((0, 1, 5))):
            content[generator.randrange(len(content))] = generator.randrange(256)
        path.write_bytes(content[:generator.choice((len(content), len(content) - 2,
                                                    generator.randrange(len(content))))])
        by_pil = outcome(images.read_image)
        other = outcome(lambda path: images.read_pixels(path).permute(1, 2, 0))
        assert type(by_pil) is type(other) and np.array_equal(by_pil, other)
        refused += isinstance(by_pil, str)
    assert 30 < refused < 120


@pytest.mark.parametrize("kind", ["truncated", "text", "empty", "header only", "png header only"])
def test_pixels_of_a_broken_image_name_it(kind, tmp_path):
    break_image(tmp_path / "bird.jpg", kind)
    with pytest.raises(ValueError, match="bird.jpg: not an image, or a broken one"):
        images.read_pixels(str(tmp_path / "bird.jpg"))
    with pytest.raises(FileNotFoundError, match="none.jpg"):
        images.read_pixels(str(tmp_path / "none.jpg"))


@pytest.mark.parametrize("size", [(61, 43), (300, 200), (9, 200), (1, 1)])
def test_training_crops_are_those_of_torchvision_on_pil(size, tmp_path):
    """The crops and flips that a seed has always drawn; the fast way is off by rounding alone."""
    from torchvision import transforms as T
    photograph(size=size).save(tmp_path / "a.jpg")
    split = datasets.Split([str(tmp_path / "a.jpg")], [0], ["a"])
    oracle = T.Compose([T.RandomResizedCrop(32), T.RandomHorizontalFlip(), T.PILToTensor()])
    transform = images.crop_transforms(32)[0]
    sets = [images.ImageDataset(split, *given) for given in (
        (oracle, 5), (transform, 5), (transform, 5, 1, images.read_pixels))]
    for epoch in range(20):
        for part in sets:
            part.set_epoch(epoch)
        expected, same, fast = (part[0][0] for part in sets)
        assert torch.equal(expected, same)
        assert fast.dtype == torch.uint8 and fast.shape == expected.shape
        assert (fast.int() - expected.int()).abs().max() <= 2


def test_photographs_are_trained_on_by_the_fast_way(source):
    folder_train_test(source)
    train, sets, _ = datasets.dataset_select(options("folder", source))
    assert train.read is images.read_pixels
    assert sets[0].queries.read is images.read_image


# ---- the cache


def test_images_that_are_in_memory_need_no_cache():
    opt = options("glyphs", "nowhere")
    opt.cache = "ram"
    with pytest.raises(ValueError, match="--cache ram.*glyphs are in memory already"):
        datasets.dataset_select(opt)


SHAPES = [(40, 30), (1, 30), (30, 1), (5, 4), (3, 80), (16, 16), (90, 20), (200, 11)]


@pytest.fixture
def gallery(source):
    """A folder dataset of images of many shapes, JPEGs and PNGs; four classes."""
    for label in range(4):
        for i, size in enumerate(SHAPES):
            path = source / f"class_{label}/{i}{'.png' if i % 2 else '.jpg'}"
            path.parent.mkdir(exist_ok=True)
            photograph(size=size, seed=10 * label + i).save(path)
    return source


def cached(gallery, kind, image_size=16):
    """The training set and the test set of --cache kind."""
    opt = options("folder", gallery, image_size)
    opt.cache = kind
    train, sets, _ = datasets.dataset_select(opt)
    return train, sets[0].queries


def batches_of(dataset, batches, workers=0):
    """The pictures of batches of indices and their labels."""
    loader = DataLoader(dataset, batch_sampler=batches, num_workers=workers)
    pictures, labels = zip(*loader)
    return torch.cat(pictures), torch.cat(labels)


@pytest.mark.parametrize("kind", ["ram", "device"])
@pytest.mark.parametrize("image_size", [16, 8, 224])
def test_cached_test_pictures_are_bit_for_bit_those_without(kind, image_size, gallery):
    plain = cached(gallery, "none", image_size)[1]
    test = cached(gallery, kind, image_size)[1]
    pictures, labels = batches_of(test, [[0, 1, 2, 3, 4], list(range(5, 16)), [3]])
    order = [*range(16), 3]
    assert torch.equal(pictures, torch.stack([plain[i][0] for i in order]))
    assert labels.tolist() == [plain.labels[i] for i in order] and labels.dtype == torch.int64
    assert len(test) == 16 and test.class_names == plain.class_names


def stored_as_files(dataset, folder):
    """A split whose files hold exactly what a cached dataset has stored."""
    folder.mkdir()
    for i in range(len(dataset)):
        dataset.load(i).save(folder / f"{i:02d}.png")
    return datasets.Split(sorted(map(str, folder.iterdir())), dataset.labels, dataset.class_names)


def test_cached_training_crops_are_those_of_the_stored_images(gallery, tmp_path):
    from torchvision import transforms as T
    train = cached(gallery, "ram")[0]
    transform = T.Compose([T.RandomResizedCrop(16), T.RandomHorizontalFlip(), T.PILToTensor()])
    oracle = images.ImageDataset(stored_as_files(train, tmp_path / "stored"), transform,
                                 train.seed)
    batch = [3, 0, 5, 5, 7, 15, 5, 11]
    for epoch in (0, 1, 6):
        train.set_epoch(epoch)
        oracle.set_epoch(epoch)
        pictures, labels = batches_of(train, [batch])
        expected = oracle.__getitems__(batch)
        difference = pictures.int() - torch.stack([image for image, _ in expected]).int()
        assert difference.abs().max() <= 2
        assert labels.tolist() == [label for _, label in expected]
    assert not torch.equal(pictures[2], pictures[3])  # an image twice in a batch: its own draws


def test_cached_numbers_are_those_of_any_cache_and_any_number_of_processes(gallery):
    batches = [[0, 9, 9, 4], [5, 7, 2, 15], [2]]
    seen = []
    for kind in ("ram", "device"):
        train = cached(gallery, kind)[0]
        for epoch in (2, 0):
            train.set_epoch(epoch)
        seen += [batches_of(train, batches, workers)[0]
                 for workers in ((0,) if kind == "device" else (0, 2))]
    assert all(torch.equal(pictures, seen[0]) for pictures in seen)
    train.set_epoch(1)
    assert not torch.equal(batches_of(train, batches)[0], seen[0])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_cache_on_a_gpu(gallery):
    expected = batches_of(cached(gallery, "ram")[0], [[0, 1, 2, 3]])[0]
    opt = options("folder", gallery)
    opt.cache = "device"
    train = datasets.dataset_select(opt, device="cuda")[0]
    pictures, _ = batches_of(train, [[0, 1, 2, 3]])
    assert train.on_device and pictures.is_cuda
    assert (pictures.cpu().int() - expected.int()).abs().max() <= 2


def test_two_views_from_a_cache_are_two_draws(gallery):
    opt = options("folder", gallery)
    opt.cache = "ram"
    first, second, _ = datasets.dataset_select(opt, views=2)[0][0]
    assert first.shape == second.shape == (3, 16, 16) and not torch.equal(first, second)


@pytest.mark.parametrize("kind", ["ram", "device"])
def test_metrics_and_pictures_with_a_cache(kind, gallery, tmp_path):
    def network(pictures):
        return pictures[:, :, ::3, ::3].flatten(1).float()

    results = []
    for each in ("none", kind):
        test = cached(gallery, each)[1]
        metrics, [(rows, _)] = evaluate.evaluate_sets(network, [("", test, None)], "cpu", (1, 2),
                                                      batch_size=5)
        results.append((metrics, rows))
        evaluate.draw_recoveries(tmp_path / f"{each}.png", test, None, rows, None)
    assert results[0][0] == results[1][0] and torch.equal(results[0][1], results[1][1])
    assert (tmp_path / f"{kind}.png").stat().st_size > 0
    assert test.load(0).mode == "RGB" and min(test.load(0).size) == 18


@pytest.mark.parametrize("kind", ["ram", "device"])
def test_a_broken_image_is_named_before_training(kind, gallery):
    whole = (gallery / "class_3/6.jpg").read_bytes()
    (gallery / "class_3/6.jpg").write_bytes(whole[:len(whole) // 2])  # its header is whole
    with pytest.raises(ValueError, match="6.jpg: not an image, or a broken one"):
        cached(gallery, kind)
    (gallery / "class_3/6.jpg").unlink()
    (gallery / "class_3/6.jpg").write_bytes(b"text")
    with pytest.raises(ValueError, match="6.jpg"):
        cached(gallery, kind)


@pytest.mark.parametrize("kind", ["ram", "device"])
def test_a_cache_without_room_is_refused_before_decoding(kind, gallery, capsys, monkeypatch):
    needed = sum(pixels.nbytes for pixels in (part.stored.pixels for part in
                                              cached(gallery, "ram")))
    capsys.readouterr()
    monkeypatch.setattr(images, "read_image", None)
    monkeypatch.setattr(images, "free_bytes", lambda *args: int(needed / 0.9) - 1)
    with pytest.raises(ValueError, match=f"--cache {kind} needs") as caught:
        cached(gallery, kind)
    assert "MiB" in str(caught.value) and f"cache    {kind}" in capsys.readouterr().out
    monkeypatch.undo()
    monkeypatch.setattr(images, "free_bytes", lambda *args: int(needed / 0.9) + 2)
    cached(gallery, kind)


@pytest.mark.parametrize("kind, processes", [("ram", 3), ("device", 3)])
def test_the_processes_of_a_machine_need_room_for_all_their_caches(kind, processes, gallery,
                                                                   monkeypatch):
    needed = sum(part.stored.pixels.nbytes for part in cached(gallery, "ram"))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    monkeypatch.setattr(images, "free_bytes", lambda *args: int(processes * needed / 0.9) - 1)
    with pytest.raises(ValueError, match=f"--cache {kind} needs"):
        cached(gallery, kind)
    monkeypatch.setattr(images, "free_bytes", lambda *args: int(processes * needed / 0.9) + 2)
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
