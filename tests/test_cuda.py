"""A pretended GPU computes what the CPU computes, and the host does not wait for it.

A step in which it waits is slower. The functions where it does stand here; none may join them.
"""

import pytest
import torch
import torch.nn.functional as F

import datasets
import evaluate
import losses
import main
import netlib
import samplers
import trainers
from pretend_cuda import CudaTensor, pretend

CPU, CUDA = torch.device("cpu"), torch.device("cuda:0")


def waiting(loss, sampling):
    """The functions that are known to wait in a step of a loss."""
    triplets = losses.LOSSES[loss].samplings == losses.TRIPLET_SAMPLINGS
    if sampling == "all" or sampling == "multisimilarity" and triplets:
        return {"samplers.py every_triplet"}  # counts them
    return {"losses.py smooth_ranks"} if loss in ("smoothap", "recallatk") else set()


def waits_of(compute, rtol=1e-4, atol=1e-6):
    """The functions that wait in compute(device), whose tensors, or None, must be the CPU's."""
    wanted = compute(CPU)
    with pretend() as gpu:
        for one, other in zip(compute(CUDA), wanted, strict=True):
            assert one is other is None or isinstance(one, CudaTensor)
            assert one is None or torch.allclose(one.values, other, rtol, atol)
    return gpu.functions()


def test_pretends_what_a_gpu_refuses_and_what_it_waits_for():
    with pretend() as gpu:
        rows, cpu = torch.arange(6.0, device=CUDA).view(3, 2).requires_grad_(), torch.ones(3, 2)
        for mixed in (lambda: rows + cpu, lambda: rows[torch.tensor([0, 2])],
                      lambda: torch.rand(2, device=CUDA, generator=torch.Generator())):
            with pytest.raises(RuntimeError, match="on the CPU"):
                mixed()
        with pytest.raises(TypeError, match="numpy"):
            rows.detach().numpy()
        (rows[1:] * 2 + torch.tensor(1.0)).square().mean().backward()
        assert torch.equal(rows.grad.values, torch.tensor([[0.0, 0], [5, 7], [9, 11]]))
        cpu.to(CUDA, non_blocking=True)
        assert not gpu.waits
        for waits in (lambda: rows.sum().item(), lambda: rows[rows > 1], lambda: rows.cpu(),
                      lambda: cpu.to(CUDA), lambda: bool(rows[0, 0]), lambda: rows[0].tolist(),
                      lambda: rows.unique(), lambda: (rows > 0).nonzero()):
            gpu.waits.clear()
            waits()
            assert list(gpu.waits.values()) == [1] and "test_cuda.py:" in min(gpu.waits)


# ---- losses

OPTIONS = main.build_parser().parse_args(["--embed_dim", "8", "--proxy_lr", "1", "--loss_lr", "1"])


def waits_of_loss(**options):
    """waits_of a loss and its gradients on 16 images of four classes."""
    def step(device):
        torch.manual_seed(0)
        loss = losses.loss_select(OPTIONS, num_classes=4, **options)[0].to(device)
        embeddings = F.normalize(torch.randn(16, 8), dim=1).to(device).requires_grad_()
        value = loss(embeddings, (torch.arange(16) // 4).to(device))
        return value, *torch.autograd.grad(value, [embeddings, *loss.parameters()],
                                           allow_unused=True)
    return waits_of(step)


@pytest.mark.parametrize("name", losses.LOSSES)
def test_each_loss_and_sampling_is_as_on_the_cpu_and_does_not_wait(name):
    for sampling in losses.LOSSES[name].samplings or ("none",):
        assert waits_of_loss(loss=name, sampling=sampling) == waiting(name, sampling), sampling


def test_forms_and_all_positives_are_as_on_the_cpu_and_do_not_wait():
    for name, loss_class in losses.LOSSES.items():
        if "form" in losses.flags_of(name):
            sampling = next(iter(loss_class.samplings), "none")
            assert not waits_of_loss(loss=name, sampling=sampling, form="reference"), name
    for sampling in set(samplers.DRAW_NEGATIVES) - {"rho"}:  # which draws for rows left out, too
        assert not waits_of_loss(loss="triplet", sampling=sampling, positives="all"), sampling
    assert not waits_of_loss(loss="triplet", sampling="random", form="reference")
    assert not waits_of_loss(loss="marginloss", sampling="distance", distance_cutoff=1.0, nu=0.1)


# ---- networks, trainers and images


@pytest.mark.parametrize("arch", ["convnet", "resnet18"])
def test_trunk_and_embedder_are_as_on_the_cpu_and_do_not_wait(arch):
    opt = main.parse_options(["--arch", arch, "--not_pretrained", "--image_size", "32", "--gpu",
                              "-1", "--amp", "none", "--embed_dim", "8"])
    images = torch.randint(256, (4, 3, 32, 32), dtype=torch.uint8)

    def embed(device):
        torch.manual_seed(0)
        trunk, embedder = (part.to(device) for part in netlib.network_select(opt, unit_norm=True))
        embeddings = embedder(trunk(images.to(device)))
        return embeddings, *torch.autograd.grad(embeddings[:, 0].sum(), embedder.linear.weight)

    assert not waits_of(embed)


@pytest.mark.filterwarnings("ignore:'pin_memory'")
@pytest.mark.parametrize("name", trainers.TRAINERS)
def test_two_steps_of_each_trainer_are_as_on_the_cpu_and_do_not_wait(name, small):
    opt = main.parse_options([*small, "--trainer", name, "--loss", "triplet"])

    def train(device):
        torch.manual_seed(0)
        train_set, _, _ = datasets.dataset_select(opt, device, trainers.TRAINERS[name].views)
        trainer = trainers.trainer_select(
            opt, *netlib.network_select(opt, True, opt.embedding_sizes),
            lambda **changes: losses.loss_select(opt, len(train_set.class_names), **changes),
            train_set, samplers.batch_sampler_select(train_set.labels, opt), device)
        trainer.epoch = 1
        trainer.set_to_train()
        trainer.training_step()
        trainer.training_step()
        return [*trainer.losses.values(), *trainer.weights]

    assert waits_of(train, 1e-3, 1e-4) == {"trainers.py trainer_select"} | {  # moves all there
        "DeepAdversarialMetricLearning": {"trainers.py draw_triplets"},
        "TwoStreamMetricLoss": {"samplers.py give"}}.get(name, set())


def test_images_kept_on_the_device_are_cropped_there_without_a_wait(small, monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2 ** 30, 2 ** 30))
    opt, items = main.parse_options(small), []
    with pretend() as gpu:
        for opt.cache in ("device", "ram"):
            train, (test, *_), _ = datasets.dataset_select(opt, CUDA)
            assert train.on_device == (opt.cache == "device")
            items.append(train.__getitems__([3, 0, 3]) + test.queries.__getitems__([1, 2]))
    assert gpu.functions() == {"images.py cache_splits"}  # once, before the run
    for (image, label), (wanted, wanted_label) in zip(*items, strict=True):
        assert label == wanted_label and image.dtype == torch.uint8
        assert (image.values.int() - wanted).abs().max() <= 2  # a GPU rounds otherwise


# ---- evaluation


def clustered(number, seed=0):
    """Rows [N, 8] around the centres of 12 classes, some of them twice, and labels [N]."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(number) % 12
    rows = torch.randn(12, 8, generator=generator)[labels]
    rows += 0.7 * torch.randn(number, 8, generator=generator)
    rows[1::7] = rows[::7][:len(rows[1::7])]  # ties, which are compared again in float64
    return rows, labels


def test_every_metric_is_as_on_the_cpu():
    queries, gallery = clustered(90), clustered(60, seed=1)
    both = [torch.cat(parts) for parts in zip(gallery, queries)]
    for tensors, options in (([*queries], {}), ([*queries, *gallery], {}),
                             ([*queries, *both], {"own": torch.arange(60, 150)}),
                             ([*queries], {"vehicle_protocol": "random_gallery"})):
        wanted = evaluate.evaluate_embeddings(*tensors, metrics=evaluate.METRICS, **options)
        with pretend():
            moved = {name: value.to(CUDA) if torch.is_tensor(value) else value
                     for name, value in options.items()}
            assert evaluate.evaluate_embeddings(
                *(part.to(CUDA) for part in tensors), metrics=evaluate.METRICS,
                **moved) == pytest.approx(wanted, rel=1e-5)


def test_clusters_neighbours_and_ranks_are_as_on_the_cpu(monkeypatch):
    monkeypatch.setattr(evaluate, "BLOCK_ELEMENTS", 2 ** 11)  # several blocks

    def measure(device):
        rows, labels = (part.to(device) for part in clustered(200))
        return (*evaluate.kmeans(rows, 30), *evaluate.knn(rows, k=5),
                *evaluate.rank_scores(rows, labels, memory=2 ** 18).values())

    waits_of(measure)
