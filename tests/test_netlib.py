"""The networks: which are built, what they compute, and how weights get into them."""

import hashlib
import os
import re
import urllib.error
from types import SimpleNamespace

import pytest
import torch
import torchvision.models as models

import netlib
from conftest import Malicious


def select(arch="convnet", embed_dim=16, not_pretrained=True, weights=None, unit_norm=True,
           image_size=64, amp="none", channels_last=False):
    """network_select with the options that it reads."""
    opt = SimpleNamespace(arch=arch, embed_dim=embed_dim, not_pretrained=not_pretrained,
                          weights=weights and str(weights), image_size=image_size, amp=amp,
                          channels_last=channels_last, compile=False)
    return netlib.network_select(opt, unit_norm)


def same(state, trunk):
    """Whether every tensor of the trunk that the state dict should fill has its values."""
    own = trunk.backbone.state_dict()
    counted = [name for name in own if not name.endswith("num_batches_tracked")]
    return bool(counted) and all(torch.equal(own[name], state[name]) for name in counted)


def remembered(network):
    """A state dict whose weights and running statistics are all other than a new network's."""
    return {name: v + 1 if v.is_floating_point() else v
            for name, v in network.state_dict().items()}


def byte_images(number=3, side=32):
    return torch.randint(0, 256, (number, 3, side, side), dtype=torch.uint8)


@torch.no_grad()
def check_embeddings(trunk, embedder, side):
    """That byte images become unit embeddings of 7 numbers, in training and in testing."""
    for training in (True, False):
        features = trunk.train(training)(byte_images(3, side))
        assert torch.is_tensor(features)  # auxiliary heads would make it a tuple
        assert features.shape == (3, trunk.num_features) and features.dtype == torch.float32
        embeddings = embedder(features)
        assert embeddings.shape == (3, 7)
        torch.testing.assert_close(embeddings.norm(dim=1), torch.ones(3))


# ---- what is built


def test_images_become_embeddings():
    for arch, side in (("convnet", 8), ("convnet", 21), ("resnet18", 32)):
        check_embeddings(*select(arch, embed_dim=7), side)


def test_the_convnet_halves_the_picture_three_times_and_averages():
    network, images = netlib.ConvNet().eval(), torch.randn(2, 3, 32, 32)
    found = network.layers(images)
    assert found.shape == (2, 256, 4, 4)
    torch.testing.assert_close(network(images), found.mean((2, 3)))
    convolutions = 9 * (3 * 32 + 32 * 64 + 64 * 128 + 128 * 256)  # without biases
    assert sum(p.numel() for p in network.parameters()) == convolutions + 2 * (32 + 64 + 128 + 256)


def test_every_weight_learns():
    trunk, embedder = select()
    assert trunk.backbone.training and embedder.training
    (embedder(trunk(byte_images(3, 16))) * torch.randn(3, 16)).sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in [*trunk.parameters(), *embedder.parameters()])


def test_embeddings_have_length_one_as_a_whole_by_section_or_not_at_all():
    features = torch.randn(5, 4)
    whole, raw, sections = (netlib.Embedder(4, 6, unit_norm, parts) for unit_norm, parts in (
        (True, None), (False, None), (True, [2, 4])))
    for embedder in (raw, sections):
        embedder.load_state_dict(whole.state_dict())
    torch.testing.assert_close(raw(features), raw.linear(features))
    torch.testing.assert_close(whole(features),
                               raw(features) / raw(features).norm(dim=1, keepdim=True))
    for columns in (slice(0, 2), slice(2, 6)):
        part = raw(features)[:, columns]
        torch.testing.assert_close(sections(features)[:, columns],
                                   part / part.norm(dim=1, keepdim=True))


def test_networks_of_every_family_lose_their_classifier():
    for arch in ("alexnet", "convnext_tiny", "shufflenet_v2_x0_5", "swin_t", "vit_b_16"):
        with torch.device("meta"):  # shapes only
            trunk, embedder = select(arch, image_size=224)
            features = trunk.eval()(torch.zeros(2, 3, 224, 224))
            assert features.shape == (2, trunk.num_features) and trunk.num_features != 1000
            assert embedder(features).shape == (2, 16)
            whole = models.get_model(arch).state_dict()
        gone = {name.partition(".")[0] for name in whole.keys() - trunk.backbone.state_dict()}
        assert gone <= set(netlib.network_of(arch).heads)


def test_bytes_are_normalised_as_torchvision_does():
    trunk, images = netlib.Trunk(torch.nn.Identity(), 3), byte_images()
    preset = models.ResNet18_Weights.IMAGENET1K_V1.transforms()
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (preset.mean, preset.std))
    normalised = (images / 255 - mean) / std
    torch.testing.assert_close(trunk(images), normalised, rtol=1e-5, atol=1e-6)
    assert torch.equal(trunk(normalised), normalised)  # float images are normalised already


def test_half_precision_and_memory_format_are_those_of_the_backbone():
    for amp, dtype, channels_last in (("bf16", torch.bfloat16, False),
                                      ("none", torch.float32, True)):
        trunk, _ = select(amp=amp, channels_last=channels_last)
        seen = []
        trunk.backbone.layers[0].register_forward_hook(lambda layer, given, out: seen.append(
            (out.dtype, given[0].is_contiguous(memory_format=torch.channels_last))))
        assert trunk(byte_images()).dtype == torch.float32
        assert seen == [(dtype, channels_last)]
        weight = trunk.backbone.layers[4].weight
        assert weight.is_contiguous(memory_format=torch.channels_last) == channels_last


def test_the_default_is_bf16_on_a_cpu_with_units_for_it(monkeypatch, tmp_path):
    monkeypatch.setattr(netlib, "pathlib", SimpleNamespace(
        Path=lambda path: tmp_path / path.rpartition("/")[2]))
    for flags, device, expected in (("fma amx_bf16 avx", "cpu", "bf16"), ("fma avx", "cpu", "none"),
                                    ("amx_bf16", "cuda", "none")):
        (tmp_path / "cpuinfo").write_text(f"flags: {flags}\n")
        assert netlib.default_amp(device) == expected


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
    state = remembered(Lite())
    torch.save({**state, "fc.weight": torch.zeros(9, 5)}, tmp_path / "a.pth")
    trunk, embedder = select("lite", embed_dim=7, weights=tmp_path / "a.pth")
    check_embeddings(trunk, embedder, side=8)
    assert same(state, trunk) and trunk.num_features == 5
    white = torch.full((1, 3, 8, 8), 255, dtype=torch.uint8)
    seen = torch.tensor([2, 2, 1.]).view(3, 1, 1).expand(1, 3, 8, 8)
    torch.testing.assert_close(trunk(white), trunk.backbone(seen))


def test_a_network_that_cannot_be_built_is_refused(monkeypatch):
    monkeypatch.setitem(netlib.NETWORKS, "flat", netlib.Network(lambda: torch.nn.Conv2d(3, 5, 3)))
    for options, words in (
            (dict(arch="resnet51"), "--arch resnet51.*convnet.*resnet50"),
            (dict(arch="raft_small"), "--arch raft_small"),  # of torchvision, but no classifier
            (dict(arch="squeezenet1_0"), "squeezenet1_0 does not end in a linear classifier"),
            (dict(embed_dim=0), "--embed_dim 0"), (dict(image_size=4), "--image_size 4"),
            (dict(arch="flat", image_size=8), r"--arch flat .* image into \[1, 5, 6, 6\]")):
        with pytest.raises(ValueError, match=words):
            select(**options)


# ---- --weights

CONVNET = remembered(netlib.ConvNet())


def test_a_file_fills_the_trunk(tmp_path):
    for content in (
            {"state_dict": CONVNET, "epoch": 3},
            {"models": {"trunk": {f"backbone.{name}": value for name, value in CONVNET.items()}}},
            {name: value for name, value in CONVNET.items() if "tracked" not in name},
            {f"module.{name}": value.double() for name, value in CONVNET.items()}):
        torch.save(content, tmp_path / "a.pth")
        trunk, _ = select(weights=tmp_path / "a.pth", not_pretrained=False)
        assert same(CONVNET, trunk) and {p.dtype for p in trunk.parameters()} == {torch.float32}


def test_a_mnasnet_file_fills_the_trunk_if_it_has_a_version(tmp_path):
    state = models.mnasnet0_5().state_dict()  # its version travels beside the tensors
    torch.save(state, tmp_path / "a.pth")
    assert same(state, select("mnasnet0_5", weights=tmp_path / "a.pth")[0])
    torch.save(dict(state), tmp_path / "b.pth")
    with pytest.raises(ValueError, match="--weights .*b.pth"):
        select("mnasnet0_5", weights=tmp_path / "b.pth")


def test_a_file_with_the_older_names_of_densenet_fills_the_trunk(tmp_path, monkeypatch):
    small = models.DenseNet(4, (1, 2), num_init_features=8)
    state = remembered(small)
    old = {re.sub(r"(denselayer\d\.(norm|conv))(\d)", r"\1.\3", name): value
           for name, value in state.items() if "tracked" not in name}
    assert len(old.keys() - state) > 3
    torch.save(old, tmp_path / "a.pth")
    monkeypatch.setattr(models, "get_model", lambda name, **options: small)
    assert same(state, select("densenet121", weights=tmp_path / "a.pth", image_size=32)[0])


def test_a_file_of_another_network_is_refused(tmp_path):
    for changes, reason in (
            ({"more.weight": torch.zeros(2)}, "0 tensors are missing and 1 are not of"),
            ({"layers.0.weight": None}, "1 tensors are missing and 0 .*layers.0.weight"),
            ({"layers.0.weight": torch.zeros(2)}, "shape"), ({0: torch.zeros(2)}, "")):
        state = {name: value for name, value in {**CONVNET, **changes}.items() if value is not None}
        torch.save(state, tmp_path / "a.pth")
        with pytest.raises(ValueError, match="^--weights .*a.pth is not of --arch convnet.*"
                                             f"{reason}[^\n]*$"):
            select(weights=tmp_path / "a.pth")


def test_code_in_a_file_does_not_run(tmp_path):
    proof, path = tmp_path / "it_ran", tmp_path / "a.pth"
    torch.save({"layers.0.weight": torch.zeros(2), "other": Malicious(proof)}, path)
    with pytest.raises(ValueError, match="a.pth") as caught:
        select(weights=path)
    assert not proof.exists()
    assert "weights_only" not in str(caught.value)  # torch advises to read it without protection
    torch.load(path, weights_only=False)["other"].close()
    assert proof.exists()  # a reader that trusts the file would have run it


def test_damaged_and_foreign_files_and_one_that_is_not_there_are_refused(tmp_path):
    path = tmp_path / "a.pth"
    torch.save(CONVNET, path)
    contents = [path.read_bytes()[:-1], b"", b"no weights\n"]
    for content in ([torch.zeros(2)], {"epoch": 3}, {}, torch.nn.Linear(2, 3)):
        torch.save(content, path)
        contents.append(path.read_bytes())
    for content in contents:
        path.write_bytes(content)
        with pytest.raises(ValueError, match="^--weights .*a.pth[^\n]*$"):
            select(weights=path)
    with pytest.raises(FileNotFoundError, match="--weights .*gone.pth"):
        select(weights=tmp_path / "gone.pth")


# ---- pretrained weights


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty folder for torch's downloads."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch home"))
    folder = tmp_path / "torch home/hub/checkpoints"
    folder.mkdir(parents=True)
    return folder


def test_pretrained_weights_are_downloaded_once(cache, tmp_path, monkeypatch):
    state = remembered(models.resnet18())
    torch.save(state, tmp_path / "state.pth")
    digest = hashlib.sha256((tmp_path / "state.pth").read_bytes()).hexdigest()
    served = (tmp_path / "state.pth").rename(tmp_path / f"resnet18-{digest[:8]}.pth")
    monkeypatch.setattr(models.ResNet18_Weights.IMAGENET1K_V1.value, "url", served.as_uri())
    assert same(state, select("resnet18", not_pretrained=False)[0])
    assert os.listdir(cache) == [served.name]
    served.unlink()
    assert same(state, select("resnet18", not_pretrained=False)[0])


def test_without_a_network_weights_are_random_or_the_ways_out_are_named(cache, monkeypatch):
    def refuse(*arguments, **keywords):
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr(torch.hub, "urlopen", refuse)
    select("resnet18")
    with pytest.raises(ValueError, match="no route to host") as caught:
        select("resnet18", not_pretrained=False)
    for way in ("--weights", "--not_pretrained", str(cache), "https://download.pytorch.org"):
        assert way in str(caught.value)
    assert os.listdir(cache) == []
    with pytest.raises(ValueError, match="vit_h_14.*--weights.*--not_pretrained"):
        netlib.fetch_weights("vit_h_14")  # which has no weights of this kind


def test_a_download_of_something_else_is_refused(cache, tmp_path, monkeypatch):
    served = tmp_path / "resnet18-f37072fd.pth"
    served.write_bytes(b"<html>log in to this network</html>")
    monkeypatch.setattr(models.ResNet18_Weights.IMAGENET1K_V1.value, "url", served.as_uri())
    with pytest.raises(ValueError, match="--not_pretrained"):
        select("resnet18", not_pretrained=False)
    assert os.listdir(cache) == []
    served.rename(cache / served.name)  # nor is it taken from the cache
    with pytest.raises(ValueError, match="--not_pretrained.*"):
        select("resnet18", not_pretrained=False)


def test_googlenet_takes_pretrained_weights_without_its_auxiliary_heads(cache):
    state = remembered(models.googlenet(aux_logits=True, init_weights=False))
    assert any(name.startswith("aux1.") for name in state)
    torch.save(state, cache / "googlenet-1378be20.pth")
    trunk, embedder = select("googlenet", embed_dim=7, not_pretrained=False)
    assert same(state, trunk)
    check_embeddings(trunk, embedder, side=32)
    assert trunk.backbone.transform_input and trunk.backbone.aux1 is None
    assert not [name for name in trunk.backbone.state_dict() if name.startswith(("aux", "fc"))]
