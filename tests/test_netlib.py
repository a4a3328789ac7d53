"""The networks: which are built, what they compute, and how weights get into them."""

import contextlib
import hashlib
import http.server
import os
import pickle
import re
import threading
import urllib.error
from types import SimpleNamespace

import pytest
import torch
import torchvision.models as models

import netlib


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """On images as small as these a second thread costs more than it saves."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def select(arch="resnet18", embed_dim=16, not_pretrained=True, weights=None, unit_norm=True,
           image_size=64):
    """network_select with the options that it reads."""
    opt = SimpleNamespace(arch=arch, embed_dim=embed_dim, not_pretrained=not_pretrained,
                          weights=weights and str(weights), image_size=image_size, amp="none",
                          channels_last=False, compile=False)
    return netlib.network_select(opt, unit_norm)


def same(state, trunk):
    """Whether every tensor of the trunk that the state dict should fill has its values."""
    own = trunk.backbone.state_dict()
    counted = [name for name in own if not name.endswith("num_batches_tracked")]
    return bool(counted) and all(torch.equal(own[name], state[name]) for name in counted)


def remembered(state):
    """A state dict whose weights and running statistics are all other than a new network's."""
    return {name: v + 1 if v.is_floating_point() else v for name, v in state.items()}


@pytest.fixture(scope="module")
def resnet18_state():
    return remembered(models.resnet18().state_dict())


@pytest.fixture(scope="module")
def googlenet_state():
    return remembered(models.googlenet(aux_logits=True, init_weights=False).state_dict())


def unfilled(arch):
    """The state dict of a torchvision network, with arbitrary values."""
    with torch.device("meta"):
        network = models.get_model(arch)
    return network.to_empty(device="cpu").state_dict()


# ---- what is built


@torch.no_grad()
def check_embeddings(trunk, embedder, side):
    """That byte images become unit embeddings of 7 numbers, in training and in testing."""
    images = torch.randint(0, 256, (3, 3, side, side), dtype=torch.uint8)
    for training in (True, False):
        features = trunk.train(training)(images)
        assert torch.is_tensor(features)  # auxiliary heads would make it a tuple
        assert features.shape == (3, trunk.num_features) and features.dtype == torch.float32
        embeddings = embedder(features)
        assert embeddings.shape == (3, 7)
        torch.testing.assert_close(embeddings.norm(dim=1), torch.ones(3))


def check_googlenet(trunk):
    """That it has its input transform, and neither auxiliary heads nor a classifier."""
    backbone = trunk.backbone
    assert backbone.transform_input and not backbone.aux_logits
    assert backbone.aux1 is None and backbone.aux2 is None
    assert not [name for name in backbone.state_dict() if name.startswith(("aux", "fc"))]


@pytest.mark.parametrize("arch, side", [("convnet", 32), ("convnet", 8), ("convnet", 21),
                                        ("resnet18", 32), ("mobilenet_v3_small", 32)])
def test_images_become_embeddings(arch, side):
    check_embeddings(*select(arch, embed_dim=7), side)


def test_every_weight_learns():
    trunk, embedder = select("convnet")
    images = torch.randint(0, 256, (3, 3, 16, 16), dtype=torch.uint8)
    (embedder(trunk(images)) * torch.randn(3, 16)).sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in [*trunk.parameters(), *embedder.parameters()])


def test_raw_embeddings_keep_their_length():
    features = torch.randn(5, 256)
    unit, raw = (select("convnet", unit_norm=unit_norm)[1] for unit_norm in (True, False))
    raw.load_state_dict(unit.state_dict())
    torch.testing.assert_close(raw(features), raw.linear(features))
    torch.testing.assert_close(unit(features),
                               raw(features) / raw(features).norm(dim=1, keepdim=True))
    assert not torch.allclose(raw(features).norm(dim=1), torch.ones(5))


@pytest.mark.parametrize("arch", [
    "alexnet", "convnext_tiny", "densenet121", "efficientnet_b0", "maxvit_t", "mnasnet0_5",
    "mobilenet_v2", "resnet50", "resnext50_32x4d", "shufflenet_v2_x0_5", "swin_t", "vgg11",
    "vit_b_16"])
def test_networks_of_every_family_lose_their_classifier(arch):
    with torch.device("meta"):  # shapes only
        trunk, embedder = select(arch, image_size=224)
        features = trunk.eval()(torch.zeros(2, 3, 224, 224))
        assert features.shape == (2, trunk.num_features) and trunk.num_features != 1000
        assert embedder(features).shape == (2, 16)
        gone = models.get_model(arch).state_dict().keys() - trunk.backbone.state_dict().keys()
        assert {name.partition(".")[0] for name in gone} <= set(netlib.network_of(arch).heads)


def test_bytes_are_normalised_as_torchvision_does():
    trunk = netlib.Trunk(torch.nn.Identity(), 3)
    images = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)
    mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    normalised = (images / 255 - mean) / std
    torch.testing.assert_close(trunk(images), normalised, rtol=1e-5, atol=1e-6)
    assert torch.equal(trunk(normalised), normalised)  # float images are normalised already
    preset = models.ResNet18_Weights.IMAGENET1K_V1.transforms()
    assert tuple(preset.mean) == netlib.IMAGENET_MEAN and tuple(preset.std) == netlib.IMAGENET_STD


def test_the_seed_fixes_the_weights():
    states = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        states.append([weights for part in select("convnet") for weights in part.parameters()])
    assert all(map(torch.equal, states[0], states[1]))
    assert not all(map(torch.equal, states[0], states[2]))


@pytest.mark.parametrize("arch", ["resnet51", "ResNet18", "", "convnet2", "raft_small"])
@pytest.mark.parametrize("not_pretrained", [True, False])
def test_an_unknown_network_is_refused(arch, not_pretrained):
    with pytest.raises(ValueError, match="convnet") as caught:
        select(arch, not_pretrained=not_pretrained)
    assert "resnet50" in str(caught.value) and f"--arch {arch}" in str(caught.value)


def test_a_network_without_a_linear_classifier_is_refused():
    with pytest.raises(ValueError, match="squeezenet1_0"):
        select("squeezenet1_0")


@pytest.mark.parametrize("embed_dim", [0, -3])
def test_an_embedding_has_a_number_at_least(embed_dim):
    with pytest.raises(ValueError, match="--embed_dim"):
        select("convnet", embed_dim=embed_dim)


class Lite(torch.nn.Module):
    """A network of one's own: images [B, 3, H, W] -> features [B, 5]."""

    def __init__(self):
        super().__init__()
        self.layers = torch.nn.Conv2d(3, 5, 3)

    def forward(self, images):
        return self.layers(images).mean((2, 3))


def test_a_network_of_ones_own_is_a_row(tmp_path, monkeypatch):
    row = netlib.Network(Lite, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.5), heads=("fc",))
    monkeypatch.setitem(netlib.NETWORKS, "lite", row)
    state = remembered(Lite().state_dict())
    torch.save({**state, "fc.weight": torch.zeros(9, 5)}, tmp_path / "a.pth")
    trunk, embedder = select("lite", embed_dim=7, weights=tmp_path / "a.pth")
    check_embeddings(trunk, embedder, side=8)
    assert same(state, trunk) and trunk.num_features == 5
    white = torch.full((1, 3, 8, 8), 255, dtype=torch.uint8)
    seen = torch.tensor([2, 2, 1.]).view(3, 1, 1).expand(1, 3, 8, 8)
    torch.testing.assert_close(trunk(white), trunk.backbone(seen))


def test_a_network_without_features_of_an_image_is_refused(monkeypatch):
    monkeypatch.setitem(netlib.NETWORKS, "lite", netlib.Network(lambda: torch.nn.Conv2d(3, 5, 3)))
    with pytest.raises(ValueError, match=r"--arch lite turns an image into \[1, 5, 6, 6\]"):
        select("lite", image_size=8)


# ---- --weights


@pytest.mark.parametrize("counted", [True, False])
def test_a_resnet18_file_fills_the_trunk(counted, resnet18_state, tmp_path):
    state = {name: value for name, value in resnet18_state.items()
             if counted or not name.endswith("num_batches_tracked")}
    assert "fc.weight" in state
    torch.save(state, tmp_path / "resnet18.pth")
    trunk, embedder = select("resnet18", weights=tmp_path / "resnet18.pth", not_pretrained=False)
    assert same(state, trunk)
    assert embedder.linear.weight.shape == (16, 512)


def test_a_file_without_the_classifier_fills_the_trunk(resnet18_state, tmp_path):
    state = {name: v for name, v in resnet18_state.items() if not name.startswith("fc.")}
    torch.save(state, tmp_path / "a.pth")
    assert same(state, select("resnet18", weights=tmp_path / "a.pth")[0])


def test_a_file_in_the_old_format_and_in_half_precision_fills_the_trunk(resnet18_state, tmp_path):
    state = {name: v.half() if v.is_floating_point() else v for name, v in resnet18_state.items()}
    torch.save(state, tmp_path / "a.pth", _use_new_zipfile_serialization=False)
    trunk, _ = select("resnet18", weights=tmp_path / "a.pth")
    assert same({name: value.float() for name, value in state.items()}, trunk)
    assert {p.dtype for p in trunk.parameters()} == {torch.float32}


def test_a_googlenet_file_with_auxiliary_heads_fills_the_trunk(googlenet_state, tmp_path):
    assert any(name.startswith("aux1.") for name in googlenet_state)
    torch.save(googlenet_state, tmp_path / "googlenet.pth")
    trunk, embedder = select("googlenet", embed_dim=7, weights=tmp_path / "googlenet.pth")
    assert same(googlenet_state, trunk)
    check_googlenet(trunk)
    check_embeddings(trunk, embedder, side=32)


def test_a_convnet_file_fills_the_trunk(tmp_path):
    state = remembered(netlib.ConvNet().state_dict())
    torch.save(state, tmp_path / "a.pth")
    assert same(state, select("convnet", weights=tmp_path / "a.pth", not_pretrained=False)[0])


def test_a_mnasnet_file_fills_the_trunk_if_it_has_a_version(tmp_path):
    state = models.mnasnet0_5().state_dict()  # its version travels beside the tensors
    torch.save(state, tmp_path / "a.pth")
    assert same(state, select("mnasnet0_5", weights=tmp_path / "a.pth")[0])
    torch.save(dict(state), tmp_path / "b.pth")
    with pytest.raises(ValueError, match="--weights .*b.pth"):
        select("mnasnet0_5", weights=tmp_path / "b.pth")


OLDER_NAMES = {  # networks whose files at torchvision name some layers as they were once called
    "vit_b_16": (lambda: models.VisionTransformer(32, 16, num_layers=2, num_heads=2, hidden_dim=8,
                                                  mlp_dim=16),
                 [(r"\.mlp\.0\.", ".mlp.linear_1."), (r"\.mlp\.3\.", ".mlp.linear_2.")]),
    "densenet121": (lambda: models.DenseNet(4, (1, 2), num_init_features=8),
                    [(r"(denselayer\d\.(norm|conv))(\d)", r"\1.\3")]),
}


@pytest.mark.parametrize("arch", OLDER_NAMES)
def test_a_file_with_the_older_names_of_torchvision_fills_the_trunk(arch, tmp_path, monkeypatch):
    make, renamings = OLDER_NAMES[arch]
    state = {name: value for name, value in make().state_dict().items()
             if not name.endswith("num_batches_tracked")}
    old = dict(state)
    for pattern, replacement in renamings:
        old = {re.sub(pattern, replacement, name): value for name, value in old.items()}
    assert len(set(state) - set(old)) > 3
    torch.save(old, tmp_path / "a.pth")
    monkeypatch.setattr(models, "get_model", lambda name, **options: make())  # a smaller one
    assert same(state, select(arch, weights=tmp_path / "a.pth", image_size=32)[0])


@pytest.mark.parametrize("file, arch, reason", [
    ("resnet34", "resnet18", "are not of this network"), ("resnet18", "resnet34", "are missing"),
    ("resnet18", "convnet", "are missing"), ("squeezenet1_0", "resnet18", "are missing"),
    ("resnext50_32x4d", "resnet50", "shape")])
def test_a_file_of_another_network_is_refused(file, arch, reason, tmp_path):
    torch.save(unfilled(file), tmp_path / "a.pth")
    with pytest.raises(ValueError) as caught:
        select(arch, weights=tmp_path / "a.pth")
    message = str(caught.value)
    assert reason in message and "\n" not in message
    assert f"--weights {tmp_path / 'a.pth'} is not of --arch {arch}" in message


class Malicious:
    """An object whose unpickling makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("how", ["pickle", "zip", "old"])
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_code_in_a_file_does_not_run(how, resnet18_state, tmp_path):
    proof, path = tmp_path / "it_ran", tmp_path / "a.pth"
    state = {"conv1.weight": resnet18_state["conv1.weight"], "other": Malicious(proof)}
    if how == "pickle":
        path.write_bytes(pickle.dumps(state))
    else:
        torch.save(state, path, _use_new_zipfile_serialization=how == "zip")
    with pytest.raises(ValueError, match="a.pth"):
        select("resnet18", weights=path)
    assert not proof.exists()
    if how == "zip":  # a reader that trusts the file would have run it
        torch.load(path, weights_only=False)["other"].close()
        assert proof.exists()


FOREIGN = {
    "a list": [torch.zeros(2)], "a tensor": torch.zeros(2), "no tensors": {"epoch": 3},
    "a nested state": {"state_dict": {"conv1.weight": torch.zeros(2)}}, "nothing": {},
    "numbered tensors": {0: torch.zeros(2), 1: torch.zeros(3)},
    "a network": torch.nn.Linear(2, 3), "none": None,
}


@pytest.mark.parametrize("content", FOREIGN)
def test_a_file_of_something_else_is_refused(content, tmp_path):
    torch.save(FOREIGN[content], tmp_path / "a.pth")
    with pytest.raises(ValueError, match="--weights .*a.pth"):
        select("convnet", weights=tmp_path / "a.pth")


@pytest.mark.parametrize("damage", ["cut short", "empty", "text", "folder"])
def test_a_damaged_file_is_refused(damage, tmp_path):
    path = tmp_path / "a.pth"
    torch.save(netlib.ConvNet().state_dict(), path)
    whole = path.read_bytes()
    path.unlink()
    if damage == "folder":
        path.mkdir()
    else:
        path.write_bytes({"cut short": whole[:-1], "empty": b"", "text": b"no weights\n"}[damage])
    with pytest.raises(ValueError, match="--weights .*a.pth") as caught:
        select("convnet", weights=path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("arch", ["convnet", "resnet18"])
def test_a_file_that_is_not_there_is_named(arch, tmp_path):
    with pytest.raises(FileNotFoundError, match="--weights .*gone.pth"):
        select(arch, weights=tmp_path / "gone.pth")


# ---- pretrained weights


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty folder for torch's downloads, and proxies out of the way."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch home"))
    monkeypatch.setenv("no_proxy", "*")
    folder = tmp_path / "torch home/hub/checkpoints"
    folder.mkdir(parents=True)
    return folder


@contextlib.contextmanager
def served(content):
    """Serves the bytes for every path on loopback; yields the address."""
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *arguments):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.mark.parametrize("error", [urllib.error.URLError("no route to host"), TimeoutError()],
                         ids=lambda error: type(error).__name__)
def test_without_a_network_the_ways_out_are_named(error, cache, monkeypatch):
    def refuse(*arguments, **keywords):
        raise error

    monkeypatch.setattr(torch.hub, "urlopen", refuse)
    with pytest.raises(ValueError) as caught:
        select("resnet18", not_pretrained=False)
    for way in ("--weights", "--not_pretrained", str(cache), "https://download.pytorch.org"):
        assert way in str(caught.value)
    assert os.listdir(cache) == []


def test_random_weights_need_no_network(monkeypatch):
    monkeypatch.setattr(torch.hub, "urlopen", lambda *a, **k: pytest.fail("it wants a download"))
    select("convnet")
    select("mobilenet_v3_small", not_pretrained=True)


def test_pretrained_weights_are_downloaded_once(cache, resnet18_state, tmp_path, monkeypatch):
    torch.save(resnet18_state, tmp_path / "state.pth")
    content = (tmp_path / "state.pth").read_bytes()
    name = f"resnet18-{hashlib.sha256(content).hexdigest()[:8]}.pth"
    weights = models.ResNet18_Weights.IMAGENET1K_V1.value
    with served(content) as address:
        monkeypatch.setattr(weights, "url", f"{address}/{name}")
        trunk, embedder = select("resnet18", not_pretrained=False)
    assert same(resnet18_state, trunk) and embedder.linear.out_features == 16
    assert os.listdir(cache) == [name]
    assert same(resnet18_state, select("resnet18", not_pretrained=False)[0])  # the server is gone


@pytest.mark.parametrize("content", [b"<html>log in to this network</html>", b""])
def test_a_download_of_something_else_is_refused(content, cache, monkeypatch):
    weights = models.ResNet18_Weights.IMAGENET1K_V1.value
    with served(content) as address:
        monkeypatch.setattr(weights, "url", f"{address}/resnet18-f37072fd.pth")
        with pytest.raises(ValueError, match="--not_pretrained"):
            select("resnet18", not_pretrained=False)
    assert os.listdir(cache) == []


def test_googlenet_takes_pretrained_weights_from_the_cache(cache, googlenet_state):
    torch.save(googlenet_state, cache / "googlenet-1378be20.pth")
    trunk, embedder = select("googlenet", embed_dim=7, not_pretrained=False)
    assert same(googlenet_state, trunk)
    check_googlenet(trunk)
    check_embeddings(trunk, embedder, side=32)


@pytest.mark.parametrize("content", [b"", b"<html>no weights</html>", b"PK\5\6" + bytes(18)])
def test_a_damaged_file_in_the_cache_is_refused(content, cache):
    (cache / "resnet18-f37072fd.pth").write_bytes(content)
    with pytest.raises(ValueError, match="--not_pretrained") as caught:
        select("resnet18", not_pretrained=False)
    assert str(cache) in str(caught.value)


def test_a_network_without_these_weights_says_so(cache):
    with pytest.raises(ValueError, match="vit_h_14") as caught:
        select("vit_h_14", not_pretrained=False)
    assert "--weights" in str(caught.value) and "--not_pretrained" in str(caught.value)
