"""python datasets.py --download from a server on loopback, and from a file that lies there."""

import hashlib
import os
import shutil
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest

import datasets
from test_datasets import cub200_release, tiny_imagenet


@pytest.fixture
def server(tmp_path, monkeypatch):
    """The address of a server on loopback that serves the folder tmp_path/served."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    (tmp_path / "served").mkdir()
    handler = partial(SimpleHTTPRequestHandler, directory=str(tmp_path / "served"))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


@pytest.fixture
def birds(server, tmp_path, monkeypatch):
    """A .tgz of the release and of a file beside it, on the server -> its path there."""
    cub200_release(tmp_path / "made")
    (tmp_path / "made/attributes.txt").write_text("1 has_bill_shape")
    made = shutil.make_archive(tmp_path / "made", "gztar", tmp_path / "made")
    return offer(monkeypatch, "cub200", made, tmp_path / "served/CUB_200_2011.tgz", server)


def offer(monkeypatch, dataset, made, path, server):
    """Puts an archive on the server, as that of the dataset -> its path there."""
    os.replace(made, path)
    archive = f"{server}/{path.name}", hashlib.md5(path.read_bytes()).hexdigest()
    row = datasets.DATASETS[dataset]._replace(archive=archive)
    monkeypatch.setitem(datasets.DATASETS, dataset, row)
    return path


@pytest.fixture
def run(tmp_path, capsys):
    """run() is python datasets.py --download -> (exit status, what it printed)."""
    def download(dataset="cub200"):
        try:
            code = datasets.main(["--dataset", dataset, "--source_path",
                                  str(tmp_path / "Datasets"), "--download"])
        except SystemExit as stop:
            return 1, capsys.readouterr().out + stop.code
        return code, capsys.readouterr().out
    return download


def left(tmp_path):
    return sorted(os.listdir(tmp_path / "Datasets"))


def test_a_download_is_unpacked_and_checked(birds, run, tmp_path):
    code, output = run()
    assert code == 0 and output.endswith("usable\n") and "train: 2 classes/4 images" in output
    assert left(tmp_path) == ["CUB_200_2011.tgz", "cub200"]
    birds.unlink()
    code, output = run()
    assert code == 0 and "is there already" in output


def test_a_zip_is_unpacked_where_tiny_imagenet_is_read(server, run, tmp_path, monkeypatch):
    tiny_imagenet(tmp_path / "made", "tiny-imagenet-200")
    made = shutil.make_archive(tmp_path / "made", "zip", tmp_path / "made")
    offer(monkeypatch, "tiny_imagenet", made, tmp_path / "served/tiny-imagenet-200.zip", server)
    code, output = run("tiny_imagenet")
    assert code == 0 and "test: 3 classes/6 images" in output
    assert left(tmp_path) == ["tiny-imagenet-200.zip", "tiny_imagenet"]


@pytest.mark.parametrize("whole", [True, False])
def test_a_whole_archive_that_lies_there_is_used_and_a_cut_one_fetched(whole, birds, run,
                                                                       tmp_path):
    (tmp_path / "Datasets").mkdir()
    content = birds.read_bytes()
    if whole:
        birds.unlink()  # the server has nothing
    (tmp_path / "Datasets" / birds.name).write_bytes(content if whole else content[:1000])
    assert run()[0] == 0 and left(tmp_path) == [birds.name, "cub200"]


@pytest.mark.parametrize("problem, words", [("other bytes", "corrupted"), ("no file", "404")])
def test_what_cannot_be_had_says_what_to_do(problem, words, birds, run, tmp_path):
    birds.write_bytes(b"another file") if problem == "other bytes" else birds.unlink()
    code, output = run()
    url, md5 = datasets.DATASETS["cub200"].archive
    assert code == 1 and words in output and url in output and md5 in output
    assert f"put it at {tmp_path / 'Datasets' / birds.name}" in output
    assert "cub200" not in left(tmp_path) and len(output.splitlines()) == 2


def test_a_folder_that_is_no_dataset_is_not_replaced(birds, run, tmp_path):
    (tmp_path / "Datasets/cub200").mkdir(parents=True)
    code, output = run()
    assert code == 1 and "move it away" in output and left(tmp_path) == ["cub200"]


def test_every_dataset_is_downloaded_or_says_where_to_ask(run, tmp_path):
    for dataset in sorted(set(datasets.DATASETS) - {"glyphs"}):
        row = datasets.DATASETS[dataset]
        if row.archive:
            url, md5 = row.archive
            assert url.startswith("http") and len(bytes.fromhex(md5)) == 16 and not row.ask
            continue
        code, output = run(dataset)
        assert code == 1 and row.layout in output
        where = {"folder": "your own", "vehicle_id": "unzip it in --source_path"}
        assert where.get(dataset, str(tmp_path / "Datasets" / dataset)) in output
        assert not (tmp_path / "Datasets").exists()
