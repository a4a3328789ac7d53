"""Damaged and hostile files: a short form of benchmarks/fuzz.py, and that it finds what it should.
"""

import importlib.util
import os
import pickle
import resource
import struct
import time
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import auxiliaries
import evaluate
import images
import netlib

# benchmarks/ is not on the path: its losses.py would hide the project's.
SPEC = importlib.util.spec_from_file_location(
    "fuzz", Path(__file__).resolve().parent.parent / "benchmarks/fuzz.py")
fuzz = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(fuzz)


@pytest.mark.parametrize("target", fuzz.TARGETS)
def test_damaged_files_end_clean_or_refused(target, tmp_path):
    counts, failures = fuzz.fuzz(100, seed=2, targets=[target], keep=tmp_path)
    assert failures == [] and os.listdir(tmp_path) == []
    assert counts[target]["cases"] == 100 == counts[target]["clean"] + counts[target]["refused"]
    assert min(counts[target]["clean"], counts[target]["refused"]) > 5


# ---- that a failure is seen


def complain(error):
    def read():
        raise error
    return read


def leave(path):
    return lambda: path.write_text("half")


READS = {
    "nothing": (lambda path: lambda: None, "clean"),
    "a clear error": (lambda path: complain(ValueError(f"{path}: cut")), "refused"),
    "another error": (lambda path: complain(KeyError(str(path))), "KeyError"),
    "an error of decoding": (lambda path: lambda: b"\xff".decode(), "UnicodeDecodeError"),
    "an error inside a library": (lambda path: lambda: Image.open(path), "FileNotFoundError"),
    "an error without a name": (lambda path: complain(ValueError("cut")), "names neither"),
    "an error of two lines": (lambda path: complain(ValueError(f"{path}\ncut")), "not one line"),
    "a wrong result": (lambda path: complain(AssertionError()), "AssertionError"),
    "a file left behind": (leave, "left behind"),
    "a warning": (lambda path: lambda: warnings.warn("the file is cut", stacklevel=1), "cut"),
    "much memory": (lambda path: lambda: np.ones(2 ** 31, np.uint8).any(), "GiB"),
    "the end of the program": (lambda path: complain(SystemExit(1)), "SystemExit"),
}


@pytest.mark.parametrize("name", READS)
def test_the_fuzzer_knows_a_failure(name, tmp_path):
    make, expected = READS[name]
    path = tmp_path / "file"
    kind, why = fuzz.outcome(fuzz.Case(make(path), (str(path),)), tmp_path)
    assert kind == expected or kind == "failure" and expected in why


def test_a_hang_is_ended_even_where_errors_are_swallowed(tmp_path):
    def read():
        while True:
            try:
                time.sleep(0.01)
            except Exception:
                continue

    started = time.monotonic()
    found = fuzz.outcome(fuzz.Case(read, ("",)), tmp_path, seconds=0.2)
    assert found == ("failure", "not done after 0.2 s") and time.monotonic() - started < 5
    time.sleep(0.3)  # no alarm is left to go off


def test_a_failing_input_is_kept(tmp_path, monkeypatch):
    def target(folder):
        def case(generator, work):
            (work / "input").write_bytes(generator.bytes(4))
            return fuzz.Case(complain(KeyError("x")), ("x",))
        return case

    monkeypatch.setitem(fuzz.TARGETS, "broken", target)
    counts, failures = fuzz.fuzz(2, targets=["broken"], keep=tmp_path)
    assert counts["broken"]["failure"] == len(failures) == 2
    assert sorted(os.listdir(tmp_path)) == ["broken-0", "broken-1"]
    assert len((tmp_path / "broken-1" / "input").read_bytes()) == 4


# ---- code in a file


def select_weights(path):
    opt = SimpleNamespace(arch="convnet", weights=path, not_pretrained=False, embed_dim=4,
                          image_size=16)
    return netlib.network_select(opt, unit_norm=True)


LOADERS = {
    "load_checkpoint": lambda path: auxiliaries.load_checkpoint(path, ["models"]),
    "read_weights": netlib.read_weights, "network_select": select_weights,
    "read_embeddings": evaluate.read_embeddings,
    "evaluate.main": lambda path: evaluate.main([path]),
}


@pytest.mark.parametrize("how", ["pickle", "zip", "old", "npz", "npy"])
@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_no_loader_runs_code_from_a_file(loader, how, tmp_path):
    path, proof = tmp_path / "file", tmp_path / "it_ran"
    state = {"models": {"trunk": fuzz.Malicious(proof)}, "weight": torch.zeros(2)}
    with open(path, "wb") as file:
        if how == "pickle":
            pickle.dump(state, file)
        elif how == "npz":
            np.savez(file, embeddings=np.zeros((1, 2)), labels=np.array([fuzz.Malicious(proof)]))
        elif how == "npy":
            np.save(file, np.array([fuzz.Malicious(proof)]), allow_pickle=True)
        else:
            torch.save(state, file, _use_new_zipfile_serialization=how == "zip")
    with pytest.raises((ValueError, SystemExit), match=str(path)) as caught:
        LOADERS[loader](str(path))
    assert not proof.exists()
    assert "weights_only" not in str(caught.value), "the message advises to run the code"
    if how == "zip":  # a reader that trusts the file would have run it
        torch.load(path, weights_only=False)["models"]["trunk"].close()
        assert proof.exists()


# ---- images that promise too much


@pytest.mark.parametrize("size", [(14000, 14000), (40000, 40000), (60000, 60000)])
@pytest.mark.parametrize("suffix", ["png", "tif", "bmp", "gif"])
def test_a_decompression_bomb_is_refused(suffix, size, tmp_path):
    path = tmp_path / f"bomb.{suffix}"
    Image.new("RGB", (17, 16)).save(path)
    content = path.read_bytes()
    form = {"png": ">II", "bmp": "<II", "gif": "<HH"}.get(suffix)
    if form:
        content = content.replace(struct.pack(form, 17, 16), struct.pack(form, *size), 1)
    for tag, old, new in ((256, 17, size[0]), (257, 16, size[1])):  # of TIFF
        for kind in (3, 4):
            content = content.replace(struct.pack("<HHII", tag, kind, 1, old),
                                      struct.pack("<HHII", tag, 4, 1, new))
    if suffix == "png":
        content = content[:29] + struct.pack(">I", fuzz.zlib.crc32(content[12:29])) + content[33:]
    path.write_bytes(content)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with warnings.catch_warnings(), pytest.raises(ValueError, match=f"{path}.*decompression bomb"):
        warnings.simplefilter("error")
        images.read_image(str(path))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2 ** 18  # KiB


def test_a_whole_image_of_too_many_pixels_is_refused(tmp_path):
    path = str(tmp_path / "bomb.png")
    Image.new("1", (14000, 14000)).save(path)
    with pytest.raises(ValueError, match="bomb.png.*decompression bomb"):
        images.read_image(path)


def test_a_format_that_needs_another_program_is_no_image(tmp_path):
    path = tmp_path / "bird.jpg"
    Image.new("RGB", (9, 9)).save(path, "EPS")
    with pytest.raises(ValueError, match="bird.jpg: not an image"):
        images.read_image(str(path))
