"""python datasets.py --download from a server on loopback: whole, broken off, unsafe, damaged."""

import hashlib
import io
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tarfile
import threading
import time
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest

import datasets
from test_datasets import cub200_release, write_image


class Handler(BaseHTTPRequestHandler):
    """Serves site.files; site says whether by ranges and after how many bytes it hangs up."""

    def do_GET(self):
        site = self.server.site
        site.asked.append(self.headers["Range"])
        if site.status or self.path not in site.files:
            return self.send_error(site.status or 404)
        body, first = site.files[self.path], 0
        if site.ranges and self.headers["Range"]:
            first = int(self.headers["Range"].removeprefix("bytes=").removesuffix("-"))
        if first and first >= len(body):
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(body)}")
            return self.end_headers()
        self.send_response(206 if first else 200)
        if first:
            self.send_header("Content-Range", f"bytes {first}-{len(body) - 1}/{len(body)}")
        self.send_header("Content-Length", str(len(body) - first))
        self.end_headers()
        sent = body[first:][:site.hang_up_after.pop(0) if site.hang_up_after else None]
        site.sent.append(len(sent))
        self.wfile.write(sent)

    def log_message(self, *_):
        pass


@pytest.fixture
def site(monkeypatch):
    """A server on loopback: files {path: bytes}; the Range and the bytes sent of each request."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(datasets, "PAUSES", (0, 0, 0))
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.site = SimpleNamespace(files={}, ranges=True, hang_up_after=[], status=None,
                                      asked=[], sent=[],
                                      url=f"http://127.0.0.1:{server.server_address[1]}")
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server.site
        server.shutdown()
        thread.join()


def tar_of(folder, extra=()):
    """The bytes of a .tgz of what a folder holds, after extra members (TarInfo, bytes)."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:gz") as archive:
        for info, content in extra:
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
        for name in sorted(os.listdir(folder)):
            archive.add(folder / name, name)
    return file.getvalue()


@pytest.fixture
def bird_archive(tmp_path):
    """The bytes of a small CUB_200_2011.tgz, with a file beside its folder as in the real one."""
    cub200_release(tmp_path / "made")
    (tmp_path / "made/attributes.txt").write_text("1 has_bill_shape::curved\n")
    noise = os.urandom(200_000)  # so that it does not come in one read
    (tmp_path / "made/CUB_200_2011/README").write_bytes(noise)
    return tar_of(tmp_path / "made")


@pytest.fixture
def offer(site, monkeypatch, tmp_path):
    """offer(bytes, name) puts an archive on the server -> where it is to be downloaded to."""
    def put(body, name="CUB_200_2011.tgz", dataset="cub200", md5=None):
        site.files[f"/{name}"] = body
        archive = f"{site.url}/{name}", md5 or hashlib.md5(body).hexdigest()
        monkeypatch.setitem(datasets.DATASETS, dataset,
                            datasets.DATASETS[dataset]._replace(archive=archive))
        return tmp_path / "Datasets" / name
    return put


@pytest.fixture
def run(tmp_path, capsys):
    """run() is python datasets.py --download -> (exit status, what it printed)."""
    def download(dataset="cub200", *flags):
        try:
            code = datasets.main(["--dataset", dataset, "--source_path",
                                  str(tmp_path / "Datasets"), "--download", *flags])
        except SystemExit as stop:
            return 1, capsys.readouterr().out + stop.code
        return code, capsys.readouterr().out
    return download


def left(path):
    """The names in the folder of a file."""
    return sorted(os.listdir(path.parent))


# ---- what arrives


def test_a_source_path_that_is_a_file_is_one_sentence(tmp_path, run):
    (tmp_path / "Datasets").write_text("")
    code, output = run()
    assert code == 1 and output.startswith("datasets.py: error: --source_path")
    assert "no folder can be made there" in output and len(output.splitlines()) == 1


def test_a_whole_download_is_unpacked_and_checked(site, offer, bird_archive, run):
    path = offer(bird_archive)
    code, output = run()
    assert code == 0 and output.endswith("usable\n") and "train: 2 classes/4 images" in output
    assert left(path) == ["CUB_200_2011.tgz", "cub200"]
    assert path.read_bytes() == bird_archive and site.sent == [len(bird_archive)]
    mode = stat.S_IMODE(os.stat(path.parent / "cub200").st_mode)
    assert mode & 0o500 == 0o500 and not (path.parent / "attributes.txt").exists()


def test_a_source_path_with_an_escape_is_shown_as_such(offer, bird_archive, tmp_path, capsys):
    offer(bird_archive)
    assert datasets.main(["--download", "--source_path", str(tmp_path / "\x1b[31m")]) == 0
    output = capsys.readouterr().out
    assert "\x1b" not in output and output.count(r"\x1b[31m/CUB_200_2011.tgz") == 3


def test_a_zip_is_unpacked_where_tiny_imagenet_is_read(offer, run, tmp_path):
    root = tmp_path / "tiny-imagenet-200"
    rows = []
    for name in ("n01", "n02"):
        write_image(root / f"train/{name}/images/{name}_0.JPEG")
        for i in range(2):
            write_image(root / f"val/images/{name}_{i}.JPEG")
            rows.append(f"{name}_{i}.JPEG\t{name}\t0\t0\t5\t5\n")
    (root / "val/val_annotations.txt").write_text("".join(rows))
    shutil.make_archive(str(tmp_path / "made"), "zip", tmp_path, "tiny-imagenet-200")
    path = offer((tmp_path / "made.zip").read_bytes(), "tiny-imagenet-200.zip", "tiny_imagenet")
    code, output = run("tiny_imagenet")
    assert code == 0 and "test: 2 classes/4 images" in output
    assert left(path) == ["tiny-imagenet-200.zip", "tiny_imagenet"]


def test_a_dropped_connection_is_resumed(site, offer, bird_archive, run):
    path = offer(bird_archive)
    site.hang_up_after = [70_001, 0, 50_000]
    code, output = run()
    assert code == 0 and path.read_bytes() == bird_archive
    assert site.asked == [None, "bytes=70001-", "bytes=70001-", "bytes=120001-"]
    assert sum(site.sent) == len(bird_archive)
    assert output.count("trying again") == 3 and "after 70,001 bytes" in output


def test_a_server_that_keeps_hanging_up_is_given_up_on(site, offer, bird_archive, run):
    path = offer(bird_archive)
    site.hang_up_after = [1000] + [0] * 10
    code, output = run()
    assert code == 1 and site.sent == [1000, 0, 0, 0]
    assert "cannot be downloaded" in output and "1,000 bytes are kept" in output
    assert left(path) == ["CUB_200_2011.tgz.part"]
    site.hang_up_after = []
    assert run()[0] == 0 and sum(site.sent) == len(bird_archive)


def test_a_part_is_gone_on_from(site, offer, bird_archive, run):
    path = offer(bird_archive)
    path.parent.mkdir()
    Path(f"{path}.part").write_bytes(bird_archive[:150_000])
    assert run()[0] == 0
    assert site.asked == ["bytes=150000-"] and site.sent == [len(bird_archive) - 150_000]


def test_a_part_that_is_whole_asks_for_nothing_more(site, offer, bird_archive, run):
    path = offer(bird_archive)
    path.parent.mkdir()
    Path(f"{path}.part").write_bytes(bird_archive)
    assert run()[0] == 0 and site.sent == []


@pytest.mark.parametrize("ranges", [True, False])
@pytest.mark.parametrize("old", ["other bytes", "longer"])
def test_a_part_of_another_file_is_started_again(ranges, old, site, offer, bird_archive, run):
    path = offer(bird_archive)
    path.parent.mkdir()
    size = 100 if old == "other bytes" else len(bird_archive) + 1
    Path(f"{path}.part").write_bytes(bytes(size))
    site.ranges = ranges
    code, output = run()
    assert code == 0 and path.read_bytes() == bird_archive
    assert ("starting again" in output) == (ranges and old == "other bytes")


def test_a_server_without_ranges_starts_again(site, offer, bird_archive, run):
    path = offer(bird_archive)
    site.ranges, site.hang_up_after = False, [100_000]
    assert run()[0] == 0 and path.read_bytes() == bird_archive
    assert site.sent == [100_000, len(bird_archive)]


def test_progress_is_shown_on_a_terminal_only(site, offer, bird_archive, monkeypatch, tmp_path):
    path = offer(bird_archive)
    for is_terminal in (True, False):
        output = io.StringIO()
        output.isatty = lambda: is_terminal
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", output)
            assert datasets.main(["--source_path", str(path.parent), "--download"]) == 0
        assert ("of 0.2 MB, " in output.getvalue()) == is_terminal
        assert (" MB/s, 0s left" in output.getvalue()) == is_terminal
        shutil.rmtree(path.parent)


# ---- what does not arrive


def test_a_wrong_checksum_is_deleted(site, offer, bird_archive, run):
    path = offer(bird_archive, md5="0" * 32)
    code, output = run()
    assert code == 1 and "MD5 checksum 000" in output and str(path) in output
    assert left(path) == [] and len(site.sent) == 1


def test_a_wrong_checksum_after_a_resumed_part_is_tried_once_more(site, offer, bird_archive, run):
    path = offer(bird_archive, md5="0" * 32)
    path.parent.mkdir()
    Path(f"{path}.part").write_bytes(bird_archive[:5])
    assert run()[0] == 1 and left(path) == []
    assert site.asked == ["bytes=5-", None]


@pytest.mark.parametrize("status", [404, 403, 503])
def test_a_refusal_says_what_to_do(status, site, offer, bird_archive, run):
    path = offer(bird_archive)
    site.status = status
    code, output = run()
    assert code == 1 and f"HTTP Error {status}" in output and len(site.asked) == 1
    assert f"{site.url}/CUB_200_2011.tgz" in output and f"put it at {path}" in output


def test_a_refused_connection_says_what_to_do(monkeypatch, tmp_path, run):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with socket.socket() as taken:  # bound, but nobody listens
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}/CUB_200_2011.tgz"
        monkeypatch.setitem(datasets.DATASETS, "cub200",
                            datasets.DATASETS["cub200"]._replace(archive=(url, "0" * 32)))
        code, output = run()
    assert code == 1 and url in output and "refused" in output
    assert f"put it at {tmp_path / 'Datasets/CUB_200_2011.tgz'}" in output


def test_an_archive_larger_than_the_disk_is_not_downloaded(offer, bird_archive, run, monkeypatch):
    path = offer(bird_archive)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    code, output = run()
    assert code == 1 and f"{len(bird_archive):,} bytes are to come" in output
    assert "1,000 free" in output and "--source_path" in output and left(path) == []


def test_an_archive_that_grows_beyond_the_disk_is_not_unpacked(offer, bird_archive, run,
                                                               monkeypatch):
    path = offer(bird_archive)
    path.parent.mkdir()
    path.write_bytes(bird_archive)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=150_000))
    code, output = run()
    assert code == 1 and "unpacks to more than the 150,000 bytes" in output
    assert left(path) == ["CUB_200_2011.tgz"]


def test_a_disk_that_fills_up_is_no_dropped_connection(site, offer, bird_archive, run,
                                                       monkeypatch):
    offer(bird_archive)
    copy_response = datasets.copy_response

    class Full(io.FileIO):
        def write(self, _):
            raise OSError(28, "No space left on device")

    def copy_to_full(response, file, total):
        with Full(file.name, "a") as full:
            return copy_response(response, full, total)

    monkeypatch.setattr(datasets, "copy_response", copy_to_full)
    code, output = run()
    assert code == 1 and "No space left" in output and "trying again" not in output
    assert len(site.asked) == 1


# ---- what lies there already


def test_an_archive_that_lies_there_is_used(site, offer, bird_archive, run):
    path = offer(bird_archive)
    path.parent.mkdir()
    path.write_bytes(bird_archive)
    assert run()[0] == 0 and site.asked == []


def test_a_wrong_archive_that_lies_there_is_kept(site, offer, bird_archive, run):
    path = offer(bird_archive)
    path.parent.mkdir()
    path.write_bytes(bird_archive[:-1])
    code, output = run()
    assert code == 1 and "MD5" in output and site.asked == []
    assert path.read_bytes() == bird_archive[:-1]


@pytest.mark.parametrize("dataset", ["cub200", "glyphs"])
def test_a_dataset_that_is_there_is_left_alone(dataset, site, offer, bird_archive, run):
    path = offer(bird_archive)
    cub200_release(path.parent)
    code, output = run(dataset, "--quick")
    assert code == 0 and "is there already" in output and output.endswith("usable\n")
    assert left(path) == ["CUB_200_2011"] and site.asked == []


def test_a_folder_that_is_no_dataset_is_not_replaced(site, offer, bird_archive, run):
    path = offer(bird_archive)
    (path.parent / "cub200").mkdir(parents=True)
    (path.parent / "cub200/mine.txt").write_text("mine")
    code, output = run()
    assert code == 1 and "move it away" in output and site.asked == []
    assert left(path) == ["cub200"]
    (path.parent / "cub200/mine.txt").unlink()
    assert run()[0] == 0


@pytest.mark.parametrize("dataset", sorted(set(datasets.DATASETS) - {"glyphs"}))
def test_every_dataset_is_downloaded_or_says_where_to_ask(dataset, run, tmp_path):
    row = datasets.DATASETS[dataset]
    if row.archive:
        url, md5 = row.archive
        assert url.startswith("http") and len(bytes.fromhex(md5)) == 16
        assert not row.ask
        return
    code, output = run(dataset)
    assert code == 1 and row.layout in output
    where = {"folder": "your own", "vehicle_id": "unzip it in --source_path"}
    assert where.get(dataset, str(tmp_path / "Datasets" / dataset)) in output
    assert not (tmp_path / "Datasets").exists()


# ---- what is not safe to unpack


def member(name, kind=tarfile.REGTYPE, link=""):
    """A tar member of a kind, without content."""
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    return info, b""


@pytest.mark.parametrize("bad", [
    member("../outside"), member("CUB_200_2011/../../outside"), member("/outside"),
    member("..\\outside"), member("C:\\outside"), member("CUB_200_2011/..", tarfile.DIRTYPE),
    member("link", tarfile.SYMTYPE, "/etc/passwd"), member("link", tarfile.SYMTYPE, "../.."),
    member("CUB_200_2011/link", tarfile.LNKTYPE, "../../outside"),
    member("device", tarfile.CHRTYPE), member("pipe", tarfile.FIFOTYPE),
], ids=lambda bad: f"{bad[0].name} {bad[0].linkname}".strip())
def test_a_tar_that_reaches_outside_is_refused(bad, offer, bird_archive, run, tmp_path):
    path = offer(tar_of(tmp_path / "made", [bad]))
    before = sorted(os.listdir(tmp_path))
    code, output = run()
    assert code == 1 and "is not unpacked" in output and repr(bad[0].name) in output
    assert left(path) == ["CUB_200_2011.tgz"]
    assert sorted(os.listdir(tmp_path)) == sorted(before + ["Datasets"])
    assert not os.path.exists("/outside")


@pytest.mark.parametrize("name", ["../outside", "/outside", "tiny-imagenet-200/../../outside",
                                  "link"])
def test_a_zip_that_reaches_outside_is_refused(name, offer, run, tmp_path):
    file, info = io.BytesIO(), zipfile.ZipInfo(name)
    if name == "link":
        info.external_attr = (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("tiny-imagenet-200/wnids.txt", "n01\n")
        archive.writestr(info, "/etc")
    path = offer(file.getvalue(), "tiny-imagenet-200.zip", "tiny_imagenet")
    code, output = run("tiny_imagenet")
    assert code == 1 and "is not unpacked" in output
    assert left(path) == ["tiny-imagenet-200.zip"] and os.listdir(tmp_path) == ["Datasets"]


@pytest.mark.parametrize("name", ["CUB_200_2011.tgz", "tiny-imagenet-200.zip"])
@pytest.mark.parametrize("damage", ["cut", "text", "other"])
def test_a_damaged_archive_leaves_nothing(name, damage, offer, bird_archive, run, tmp_path):
    dataset = "cub200" if name.endswith("tgz") else "tiny_imagenet"
    shutil.make_archive(str(tmp_path / "whole"), "zip", tmp_path / "made", "CUB_200_2011/images")
    body = bird_archive if dataset == "cub200" else (tmp_path / "whole.zip").read_bytes()
    if damage == "other":  # a whole archive, but of another folder
        (tmp_path / "else").mkdir()
        (tmp_path / "else/file").write_text("")
        body = tar_of(tmp_path / "else") if dataset == "cub200" else body
    path = offer({"cut": body[:-len(body) // 2], "text": b"not found\n", "other": body}[damage],
                 name, dataset)
    code, output = run(dataset)
    assert code == 1 and ("holds no folder" if damage == "other" else "cannot be unp") in output
    assert left(path) == [name]


def test_a_killed_unpacking_leaves_nothing_that_is_read(offer, bird_archive, run, tmp_path):
    path = offer(bird_archive)
    path.parent.mkdir()
    path.write_bytes(bird_archive)
    program = (f"import datasets, time\nrow = datasets.DATASETS['cub200']._replace(archive="
               f"{datasets.DATASETS['cub200'].archive!r})\ndatasets.DATASETS['cub200'] = row\n"
               "datasets.os.rename = lambda *_: time.sleep(60)\n"
               f"datasets.download('cub200', {str(path.parent)!r})")
    process = subprocess.Popen([sys.executable, "-c", program],
                               cwd=Path(datasets.__file__).parent)
    try:
        deadline = time.monotonic() + 60
        while not list(path.parent.glob("*/CUB_200_2011/train_test_split.txt")):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert [name.partition(".unpacking.")[0] for name in left(path)] == ["CUB_200_2011.tgz",
                                                                        "cub200"]
    with pytest.raises(FileNotFoundError, match="holds no cub200"):
        datasets.read_cub200(str(path.parent))
    assert run()[0] == 0 and left(path) == ["CUB_200_2011.tgz", "cub200"]
