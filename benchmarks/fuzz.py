"""Damaged list files, images, weights, checkpoints and embeddings for everything that reads them.

python benchmarks/fuzz.py --cases 10000 damages as many small files and reads each as a run would.
A case ends clean, with a result that agrees with itself, or refused, with a ValueError or OSError
of this project that names the file or its flag in one line. All else is a failure: other errors,
a warning of damage and no refusal, hangs, code that ran, files left behind, a gigabyte of memory.
A new target is a function folder -> (generator, folder -> Case) in TARGETS.
tests/test_benchmarks.py runs ten of each.
"""

import argparse
import collections
import contextlib
import faulthandler
import io
import itertools
import json
import os
import pickle
import re
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
import warnings
import zipfile
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import auxiliaries
import datasets
import evaluate
import images
import netlib
import test_datasets
import trainers

STRANGE_WORDS = ["-1", "0", "1" + "0" * 30, "1e999", "nan", "²", "١٢", "\0", "..", "/",
                 "/etc/hosts", "../" * 30 + "etc/hosts", "..\\..", "é", "e\u0301", "\ufeff",
                 "\u2028", "\x1c", "\xa0", "%s", "{0}", "\\", "'", "x" * 300, "a/" * 3000,
                 ".jpg", "~", "1 2", ""]
STRANGE_VALUES = [
    None, True, -1, 0, 10 ** 30, 1.5, float("nan"), float("inf"), "", "x", "x\ny", b"x", [], {},
    (), [[1]], {"a": 1}, [{}], {1: 2}, torch.zeros(0), torch.zeros(1), torch.zeros(2, 3, 4),
    torch.ones(3, 4, dtype=torch.complex64), torch.ones(4, dtype=torch.int64),
    torch.ones(4, dtype=torch.bool), torch.eye(4).to_sparse(), torch.zeros(4, device="meta"),
    torch.full((4,), float("nan")), torch.zeros(5056, dtype=torch.uint8), torch.Size([1]),
    torch.float16, collections.Counter("ab"), collections.OrderedDict(a=torch.zeros(2)),
    np.float64(1.5)]
# What PIL says of metadata or palettes that do not touch the pixels: real photographs have them.
HARMLESS = ("Palette images with Transparency", "Corrupt EXIF data", "Metadata Warning",
            "Invalid APP2 MPO", "Image appears to be a malformed MPO",
            "Validating sparse tensor invariants")  # torch's, of the time that it takes


class Case(NamedTuple):
    """One damaged input: the call that reads it, and names of which a refusal must have one."""

    read: object
    names: tuple


class Hang(BaseException):
    """The time is over; no "except Exception" on the way swallows it."""


class Malicious:
    """An object whose unpickling makes a file."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


# ---- what a case comes to


@contextlib.contextmanager
def time_limit(seconds):
    """Raises Hang in the main thread after so many seconds."""
    def stop(*_):
        raise Hang

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    # Python cannot stop a library's own loop, so that ends the program, with a traceback.
    faulthandler.dump_traceback_later(seconds + 60, exit=True, file=sys.__stderr__)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def listing(folder):
    """All that lies below a folder."""
    return {os.path.join(root, name) for root, folders, files in os.walk(folder)
            for name in folders + files}


def outcome(case, folder, seconds=10):
    """Reads a case -> ("clean", "refused" or "failure", why)."""
    def memory():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    before, used = listing(folder), memory()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            with time_limit(seconds):
                case.read()
            found = "clean", ""
        except Hang:
            found = "failure", f"not done after {seconds} s"
        except BaseException as error:
            found = judged(error, case.names)
    said = [f"{warning.category.__name__}: {warning.message}" for warning in said
            if not str(warning.message).startswith(HARMLESS)
            and (found[0] == "clean" or warning.category is ResourceWarning)]
    if found[0] == "failure":
        return found
    if listing(folder) != before:
        return "failure", f"left behind: {sorted(listing(folder) ^ before)}"
    if memory() > used + 2 ** 30:
        return "failure", f"took {(memory() - used) / 2 ** 30:.1f} GiB"
    return ("failure", f"{found}, with a warning: {said[0]}") if said else found


def judged(error, names):
    """Whether an error is a refusal as it should be -> ("refused" or "failure", why)."""
    last, message = traceback.extract_tb(error.__traceback__)[-1], str(error)
    where = f"{type(error).__name__} at {Path(last.filename).name}:{last.lineno}: {message}"
    ours = Path(last.filename).is_relative_to(ROOT) and type(error) in (
        ValueError, FileNotFoundError, OSError, FloatingPointError, trainers.NonFiniteLoss)
    if not ours:
        return "failure", where
    if not any(name in message for name in names):
        return "failure", f"names neither file nor flag: {where}"
    if re.search("[\0-\x1f\x7f-\x9f]", message) or len(message) > 1000:
        return "failure", f"not one line of text: {where!r}"
    return "refused", message


# ---- damage


def damaged_bytes(content, generator):
    """Content cut, flipped, with bytes put in, taken out, doubled, or replaced by extremes."""
    pick = generator.integers
    at, size = int(pick(len(content) + 1)), int(pick(1, 20))
    kind = pick(9)
    if kind == 0:
        return content[:at]
    if kind == 1:
        return content[:at] + generator.bytes(size) + content[at:]
    if kind == 2:
        return content[:at] + content[at + size:]
    if kind == 3:
        return content[:at] + content[max(0, at - 100):]
    if kind == 4:
        extreme = [b"\xff" * 4, b"\0" * 8, b"\x7f\xff\xff\xff", b"\xff\xff\xff\x7f"][pick(4)]
        return content[:at] + extreme + content[at + len(extreme):]
    if kind == 5 and pick(4) == 0:
        return [b"", b"\0" * 300, generator.bytes(300), b"three words here\n"][pick(4)]
    changed = bytearray(content)
    for _ in range([1, 2, 8, 30][pick(4)]):
        if changed:
            changed[pick(len(changed))] ^= 1 << int(pick(8))
    return bytes(changed)


def damaged_text(content, generator):
    """A list file with lines lost, doubled, swapped or strange, a BOM, other ends, bad bytes."""
    pick = generator.integers
    if pick(3) == 0:
        return damaged_bytes(content, generator)
    lines = content.split(b"\n")
    a, b = (int(pick(len(lines))) for _ in range(2))
    words = lines[a].split() or [b""]
    place, word = int(pick(len(words))), STRANGE_WORDS[pick(len(STRANGE_WORDS))].encode()
    lines[a], lines[b] = [
        (lines[b], lines[a]), (lines[a] + b"\n" + lines[a], lines[b]), (b"", lines[b]),
        (b" ".join(words[:place] + [word] + words[place + 1:]), lines[b]),
        (b" ".join(words[:place] + [word] + words[place:]), lines[b]),
        (b" ".join(words[:place] + words[place + 1:]), lines[b]), (lines[b], lines[b]),
        (lines[a] + b" " + b"long" * 100000, lines[b]), (lines[a], lines[b]),
        (b" ".join(words[:place] + [words[place] + word] + words[place + 1:]), lines[b]),
    ][pick(10)] if a != b else (word, word)
    if pick(6) == 0:
        del lines[a]
    ends = [b"\n", b"\n", b"\n", b"\r\n", b"\r", b"\n\n"][pick(6)]
    content = ends.join(lines)
    return [content, content, content, b"\xef\xbb\xbf" + content, content + b"\xff\xfe",
            content.decode(errors="replace").encode("utf-16")][pick(6)]


def damaged_zip(content, generator, proof):
    """A zip archive with an entry damaged, lost, doubled, renamed, deflated or made of code.

    The archive itself stays whole, so that the damage gets past the checksums; one time in three
    its own bytes are damaged instead.
    """
    pick = generator.integers
    if pick(3) == 0:
        return damaged_bytes(content, generator)
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        entries = [(name, archive.read(name)) for name in archive.namelist()]
    at = int(pick(len(entries)))
    name, data = entries[at]
    kind, packed = pick(8), [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED][pick(2)]
    if kind == 0:
        del entries[at]
    elif kind == 1:
        entries.append((name, entries[pick(len(entries))][1]))
    elif kind == 2:
        entries[at] = (name + "x" if pick(2) else "../" + name, data)
    elif kind == 3:
        entries[at] = (name, pickle.dumps({"a": Malicious(proof)}, protocol=int(pick(6))))
    else:
        entries[at] = (name, damaged_bytes(data, generator))
    with warnings.catch_warnings(), zipfile.ZipFile(made := io.BytesIO(), "w", packed) as archive:
        warnings.simplefilter("ignore")  # of doubled names
        for entry in entries:
            archive.writestr(*entry)
    return made.getvalue()


def damaged_value(value, generator, depth=0):
    """A copy of nested containers in which one value, key or length is another."""
    pick = generator.integers
    if not isinstance(value, (dict, list, tuple)) or not value or depth and pick(6) == 0:
        if torch.is_tensor(value) and pick(2):
            return [value[None], value.double(), value.flatten(), value.half(), value.long(),
                    value * float("nan"), value.to(torch.complex64), value.to_sparse()][pick(8)]
        return STRANGE_VALUES[pick(len(STRANGE_VALUES))]
    items = list(value.items() if isinstance(value, dict) else enumerate(value))
    at = int(pick(len(items)))
    key, inner = items[at]
    if pick(5):
        items[at] = (key, damaged_value(inner, generator, depth + 1))
    else:
        strange = [5, "x", None, "", "a.b", (1, 2), 1.5][pick(7)]
        items[at:at + 1] = [[], [(strange, inner)], [(key, inner), (strange, inner)]][pick(3)]
    if isinstance(value, dict):
        return type(value)() | dict(items)
    return [inner for _, inner in items]


def saved(value, generator, proof):
    """What torch.save or pickle makes of a value, at times with code in it, at times damaged."""
    pick = generator.integers
    if pick(12) == 0:
        value = [Malicious(proof), {"models": Malicious(proof), **value}][pick(2)]
    if pick(12) == 0:
        return pickle.dumps(value, protocol=int(pick(6)))
    torch.save(value, file := io.BytesIO(), _use_new_zipfile_serialization=bool(pick(6)))
    content = file.getvalue()
    if pick(2):
        return content
    if content[:2] == b"PK":
        return damaged_zip(content, generator, proof)
    return damaged_bytes(content, generator)


def damaged_tree(folder, generator):
    """One file or folder below a folder lost, renamed, replaced, or another one put beside it."""
    pick = generator.integers
    path = sorted(folder.rglob("*"))[pick(len(list(folder.rglob("*"))))]
    aside = folder.parent / "aside"
    kind = pick(10)
    name = ["é.jpg", "a b.jpg", "x.JPG", ".hidden.jpg", "no_suffix", "\udcff.jpg", "%s{}.png",
            "x" * 200 + ".gif", "train", "images"][pick(10)]
    if kind < 4:
        path.rename(path.with_name(name) if kind < 3 and not path.with_name(name).exists()
                    else aside)
    if kind == 3:
        [path.mkdir, path.touch, lambda: path.symlink_to("nowhere"),
         lambda: path.symlink_to(path), lambda: path.write_bytes(generator.bytes(99))][pick(5)]()
    elif kind > 3 and path.is_file():
        path.write_bytes(damaged_bytes(path.read_bytes(), generator))
    elif kind > 3 and not os.path.lexists(path / name):
        (path / name).mkdir() if pick(2) else (path / name).symlink_to("/")
    if aside.is_dir():
        shutil.rmtree(aside)
    aside.unlink(missing_ok=True)


# ---- targets


def dataset_target(folder):
    """Every reader on every layout, then its images; list files, .mat and folders are damaged."""
    for tree, (_, _, build) in test_datasets.TREES.items():
        (folder / tree).mkdir()
        build(folder / tree)
    kinds = {tree: dataset for tree, (dataset, _, _) in test_datasets.TREES.items()}

    def case(generator, work):
        tree = list(kinds)[generator.integers(len(kinds))]
        source = work / "source"
        shutil.copytree(folder / tree, source)
        lists = [path for path in sorted(source.rglob("*")) if path.suffix in (".txt", ".mat")]
        if lists and generator.integers(4):
            path = lists[generator.integers(len(lists))]
            damage = damaged_text if path.suffix == ".txt" else damaged_bytes
            path.write_bytes(damage(path.read_bytes(), generator))
        else:
            damaged_tree(source, generator)
        return Case(lambda: read_dataset(kinds[tree], source), (str(source), "--source_path"))
    return case


def read_dataset(dataset, source):
    """Reads a dataset and all of its images, and asserts that what was found fits together."""
    found = datasets.DATASETS[dataset].read(str(source))
    assert len(datasets.fingerprint(found.splits)) == 64
    problems = datasets.problems_of(found.splits)
    assert all(isinstance(problem, str) and problem for problem in problems)
    for paths, labels, names in found.splits.values():
        assert len(paths) == len(labels) and len(set(names)) == len(names)
        assert all(type(label) is int and 0 <= label < len(names) for label in labels)
        for path in paths:
            assert images.read_image(path).mode == "RGB"
    if problems:
        raise ValueError(f"--source_path: {problems[0]}")


def image_target(folder):
    """read_image on images of every format, their headers and chunks."""
    noise = np.random.default_rng(0).integers(0, 256, (16, 17, 4), dtype=np.uint8)
    modes = {mode: Image.fromarray(noise).convert(mode) for mode in ("RGB", "RGBA", "L", "P", "1")}
    modes["I;16"] = Image.fromarray(noise[..., 0].astype(np.uint16) * 200)
    modes["I"] = Image.fromarray(noise[..., 0].astype(np.int32) * 200)
    modes["CMYK"], modes["F"] = modes["RGB"].convert("CMYK"), modes["L"].convert("F")
    whole = []
    for suffix, wanted, options in (
            ("jpg", "RGB L CMYK", {}), ("jpg", "RGB", {"progressive": True}),
            ("bmp", "RGB P 1", {}), ("png", "RGB RGBA L P 1 I;16", {}), ("gif", "RGB P L", {}),
            ("webp", "RGB RGBA", {}), ("ppm", "RGB L 1 I", {}),
            ("gif", "P", {"save_all": True, "append_images": [modes["P"]] * 2}),
            ("webp", "RGB", {"save_all": True, "append_images": [modes["L"]] * 2}),
            *(("tif", "RGB L 1 F I;16" if name in (None, "tiff_lzw") else "RGB",
               {"compression": name}) for name in (None, "tiff_lzw", "tiff_deflate", "jpeg")),
            *((name, "RGB", {}) for name in ("tga", "ico", "pcx", "eps", "pdf"))):
        for mode in wanted.split():
            modes[mode].save(path := folder / f"image.{suffix}", **options)
            whole.append((suffix, path.read_bytes()))

    def case(generator, work):
        suffix, content = whole[generator.integers(len(whole))]
        kind = generator.integers(5)
        if kind == 0:
            content = promised(content, generator)
        elif kind == 1 and suffix == "png":
            content = rechunked(content, generator)
        elif kind > 1:
            content = damaged_bytes(content, generator)
        path = work / f"image.{suffix}"
        path.write_bytes(content)

        def read():
            image = images.read_image(str(path))
            assert image.mode == "RGB" and np.asarray(image).shape[2] == 3
            assert image.width * image.height <= 2 * Image.MAX_IMAGE_PIXELS
        return Case(read, (str(path),))
    return case


def promised(content, generator):
    """An image of 17 x 16 pixels whose header promises another size, checksums made right."""
    sizes = (0, 1, 300, 9400, 20000, 65535, 2 ** 31 - 1, 2 ** 32 - 1)
    width, height = (sizes[i] for i in generator.integers(len(sizes), size=2))
    for form in (">II", "<II", ">HH", "<HH"):
        mask = 2 ** (8 * struct.calcsize(form[:2])) - 1
        turn = -1 if form == ">HH" else 1  # JPEG names the height first
        before, after = (17, 16)[::turn], (width & mask, height & mask)[::turn]
        content = content.replace(struct.pack(form, *before), struct.pack(form, *after), 1)
    for tag, size, side in ((256, 17, width), (257, 16, height)):  # of TIFF, as it was written
        for kind in (3, 4):
            content = content.replace(struct.pack("<HHII", tag, kind, 1, size),
                                      struct.pack("<HHII", tag, 4, 1, side))
    if content.startswith(b"\x89PNG"):
        content = content[:29] + struct.pack(">I", zlib.crc32(content[12:29])) + content[33:]
    return content


def rechunked(content, generator):
    """A PNG with a chunk lost, doubled, swapped, damaged or new, each with its right checksum."""
    pick = generator.integers
    chunks, at = [], 8
    while at < len(content):
        size = int.from_bytes(content[at:at + 4], "big")
        chunks.append((content[at + 4:at + 8], content[at + 8:at + 8 + size]))
        at += size + 12
    a, b = (int(pick(len(chunks))) for _ in range(2))
    bomb = zlib.compress(bytes(2 ** 24), 9)
    new = [(b"zTXt", b"a\0\0" + bomb), (b"iCCP", b"a\0\0" + bomb), (b"tEXt", b"no end"),
           (b"IDAT", bomb), (b"IHDR", bytes(13)), (b"fcTL", bytes(26)), (b"acTL", b"\xff" * 8),
           (b"PLTE", bytes(5)), (b"tRNS", bytes(999)), (b"eXIf", b"Exif"), (b"abcd", b"")]
    chunks[a:a + 1] = [[], [chunks[a]] * 2, [chunks[b]], [new[pick(len(new))], chunks[a]],
                       [(chunks[a][0], damaged_bytes(chunks[a][1], generator))]][pick(5)]
    return content[:8] + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in chunks)


def checkpoint_target(folder):
    """load_checkpoint on files and archives that are damaged, foreign, or made to run code."""
    state = {"epoch": 3, "models": {"trunk": {"weight": torch.arange(6.).view(2, 3)}},
             "rows": [{"epoch": 1, "recall@1": 0.5}], "options": {"tau": [30, 55], "name": None},
             "optimizers": {"state": {0: {"step": torch.tensor(4.)}}, "betas": (0.9, 0.999)}}

    def case(generator, work):
        path = work / "last.pth.tar"
        value = damaged_value(state, generator) if generator.integers(2) else state
        path.write_bytes(saved(value, generator, work / "proof"))

        def read():
            loaded = auxiliaries.load_checkpoint(str(path), list(state))
            assert isinstance(loaded, dict) and state.keys() <= loaded.keys()
        return Case(read, (str(path),))
    return case


def weights_target(folder):
    """read_weights and load_weights on state dicts with wrong names, shapes and types."""
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))
    state = network.state_dict()
    trunk = {f"backbone.{name}": value for name, value in state.items()}

    def case(generator, work):
        whole = [state, {"state_dict": state}, {"models": {"trunk": trunk}}][generator.integers(3)]
        if generator.integers(4):
            whole = damaged_value(whole, generator)
        if isinstance(whole, collections.OrderedDict) and generator.integers(4) == 0:
            whole = collections.OrderedDict(whole)
            whole._metadata = damaged_value(state._metadata, generator)
        path = work / "weights.pth"
        path.write_bytes(saved(whole, generator, work / "proof"))

        def read():
            weights, source = netlib.read_weights(str(path))
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of complex numbers cast to real
                netlib.load_weights(network, weights, (), source, "convnet")
            for name, value in network.state_dict().items():
                assert value.shape == state[name].shape and value.dtype == state[name].dtype
        return Case(read, (f"--weights {path}",))
    return case


def embeddings_target(folder):
    """read_embeddings and evaluate.main on npz files: headers, types, settings, objects."""
    rows, labels = np.random.default_rng(0).normal(size=(12, 4)), np.arange(12) // 3
    whole = {"embeddings": rows.astype(np.float32), "labels": labels, "settings": json.dumps(
        {"k_vals": [1, 2], "seed": 3, "metrics": ["recall", "nmi", "map"], "device": "cpu",
         "nmi_average": "geometric", "vehicle_protocol": "all_vs_all", "gallery_file": ""})}
    strange = [np.zeros(0), np.array(None), np.array([None] * 12), np.full((12, 4), np.nan),
               rows.astype(">f8"), rows.astype(np.longdouble) * 1e300, rows * 1e300, rows * 1e-300,
               rows.astype(complex), labels.astype("S"), labels.astype(str), labels * 1.5,
               np.array(["a\0b", "é", "\ud800"] * 4), np.array([b"\xff", b"a"] * 6), rows[:0],
               labels[:, None], labels > 5, labels * 0, labels[:5], labels.astype("M8[s]"),
               *map(np.array, (-1, 2 ** 64 - 1, 1.5, "x\ny", True, [[1, 2]], ["recall", "x"],
                               "all", [10 ** 9], "random_gallery")), np.zeros(3, "i4,f4"), rows.T,
               np.asfortranarray(rows), rows.astype(np.float16), (rows * 9).astype(np.int8)]

    def case(generator, work):
        pick = generator.integers
        path, arrays = work / "embeddings.npz", dict(whole)
        for _ in range(pick(3)):
            name = list(whole)[pick(2)]
            arrays[name] = strange[pick(len(strange))]
            if pick(4) == 0:
                del arrays[name]
        if pick(20) == 0:
            arrays["labels"] = np.array([Malicious(work / "proof")] * 12)
        np.savez(file := io.BytesIO(), **arrays)
        content = file.getvalue()
        path.write_bytes(damaged_zip(content, generator, work / "proof") if pick(2) else content)
        given = ["--metrics", "all"] * int(pick(4) == 0) + ["--json"] * int(pick(2))
        if pick(4) == 0:
            np.savez(work / "gallery.npz", **whole)
            given += ["--gallery", str(work / "gallery.npz")]
        return Case(lambda: score(path, given), (str(path), "--", " embeddings ", "true match"))
    return case


def score(path, given):
    """Reads and scores a file of embeddings, and asserts that the scores are possible."""
    embeddings, labels, _ = evaluate.read_embeddings(str(path))
    assert embeddings.ndim == 2 and labels.ndim == 1
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            scores = evaluate.main([str(path), *given])
    except SystemExit as stop:
        raise ValueError(stop.code) from None
    assert all(type(value) is float for value in scores.values())
    for name, value in scores.items():
        assert not name.startswith(("recall", "map", "mrr")) or not (value < 0 or value > 1)


TARGETS = {"datasets": dataset_target, "images": image_target, "checkpoints": checkpoint_target,
           "weights": weights_target, "embeddings": embeddings_target}


def fuzz(cases, seed=0, targets=tuple(TARGETS), keep=None):
    """Runs so many cases, the targets in turn -> ({target: Counter of outcomes}, [failure, ...]).

    Each case depends on the seed and its number alone. A failing input goes to keep/TARGET-NUMBER.
    """
    torch.set_warn_always(True)
    counts = {target: collections.Counter() for target in targets}
    failures = []
    with tempfile.TemporaryDirectory() as folder:
        makers = {}
        for target in targets:
            os.mkdir(whole := Path(folder, target))
            makers[target] = TARGETS[target](whole)
        for number, target in zip(range(cases), itertools.cycle(targets)):
            os.mkdir(work := Path(folder, "case"))
            case = makers[target](np.random.default_rng([seed, number]), work)
            started = time.perf_counter()
            kind, why = outcome(case, work)
            counts[target] += {"cases": 1, kind: 1, "seconds": time.perf_counter() - started}
            if kind == "failure":
                failures.append(f"{target}-{number}: {why}")
                if keep:
                    shutil.copytree(work, Path(keep, f"{target}-{number}"), symlinks=True,
                                    dirs_exist_ok=True)
            shutil.rmtree(work)
    return counts, failures


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--cases", type=int, default=10000, help="in all. Default %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="of the damage. Default %(default)s")
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=tuple(TARGETS))
    parser.add_argument("--keep", metavar="DIR", help="where failing inputs are copied to")
    args = parser.parse_args()
    torch.set_num_threads(1)
    faulthandler.enable()  # a library that crashes leaves its input in the temporary folder
    counts, failures = fuzz(args.cases, args.seed, args.targets, args.keep)
    print("| target | cases | clean | refused | failures | seconds |\n|---|---|---|---|---|---|")
    for target, count in counts.items():
        print(f"| {target} | {count['cases']:,} | {count['clean']:,} | {count['refused']:,} | "
              f"{count['failure']:,} | {count['seconds']:.1f} |")
    print("\n".join(failures))
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
