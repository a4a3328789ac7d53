"""trainers.py on tiny linear models: every argument is shown to act, one test each.

The data of most tests are sixteen numbered rows, labelled by their number, so that what arrived
at the loss says which rows were drawn and in which order. The trainers of more than one loss are
held to loops written by hand.
"""

import collections
import copy
import functools
import inspect
import pickle
import random
import re
import sys
import warnings
import weakref
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import BatchSampler, DataLoader, Dataset, Sampler, TensorDataset

import auxiliaries
import samplers
from losses import MarginLoss, TripletLoss
from results import TensorBoardLog
from trainers import (TRAINERS, BaseTrainer, CascadedEmbeddings, DeepAdversarialMetricLearning,
                      Diagnosis, MetricLossOnly, NonFiniteLoss,
                      TrainWithClassifier, TwoStreamMetricLoss,
                      UnsupervisedEmbeddingsUsingAugmentations, Validation, in_turn)

ROWS, BATCH, BATCHES = 16, 4, 4


def numbered(count=ROWS):
    """Rows (i, i, i) / 10 with label i."""
    numbers = torch.arange(count)
    return TensorDataset(numbers.unsqueeze(1).expand(-1, 3) / 10, numbers)


def rows_labelled(labels):
    """A dataset of rows (i, i, i) / 10 with any labels, one item each."""
    return [(torch.full((3,), i / 10), label) for i, label in enumerate(labels)]


class MeanSquare(torch.nn.Module):
    """Mean square of the embeddings, times a weight of its own; keeps what it was called with."""

    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(()))
        self.seen = []

    def forward(self, embeddings, labels, indices_tuple=None):
        self.seen.append((embeddings.detach().clone(), labels.clone(), indices_tuple))
        return self.scale * embeddings.square().mean()

    def labels(self):
        return [labels.tolist() for _, labels, _ in self.seen]


class InOrder(Sampler):
    """The given indices in their order; keeps the numbers given to set_epoch."""

    def __init__(self, indices=range(ROWS)):
        self.indices, self.epochs = list(indices), []

    def set_epoch(self, epoch):
        self.epochs.append(epoch)

    def __iter__(self):
        return iter(self.indices)

    def __len__(self):
        return len(self.indices)


def linear(inputs=3, outputs=2, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return torch.nn.Linear(inputs, outputs)


def sgd(module, lr=0.1):
    return torch.optim.SGD(module.parameters(), lr)


def make_trainer(trainer=MetricLossOnly, **changes):
    """A trainer of a linear trunk on the numbered rows in order; changes replace its arguments."""
    trunk = linear()
    arguments = dict(models={"trunk": trunk}, optimizers={"trunk_optimizer": sgd(trunk)},
                     batch_size=BATCH, loss_funcs={"metric_loss": MeanSquare()},
                     dataset=numbered(), data_device="cpu", sampler=InOrder(),
                     dataloader_num_workers=0)
    return trainer(**(arguments | changes))


def all_parts(**changes):
    """make_trainer with trunk, embedder and loss, each with an optimizer."""
    parts = {"trunk": linear(), "embedder": linear(2, 2, seed=1), "metric_loss": MeanSquare()}
    return make_trainer(**(dict(
        models={"trunk": parts["trunk"], "embedder": parts["embedder"]},
        loss_funcs={"metric_loss": parts["metric_loss"]},
        optimizers={f"{name}_optimizer": sgd(part) for name, part in parts.items()}) | changes))


def part(trainer, name):
    return dict(trainer.parts())[name]


def weights(module):
    return [value.detach().clone() for value in module.parameters()]


def same(first, second):
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def seen(trainer):
    return trainer.loss_funcs["metric_loss"].labels()


IN_ORDER = [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11], [12, 13, 14, 15]]


# ---- the whole


@pytest.mark.parametrize("trainer", [BaseTrainer, MetricLossOnly])
def test_constructor_is_that_of_the_library(trainer):
    required = inspect.Parameter.empty
    expected = [
        ("models", required),
        ("optimizers", required),
        ("batch_size", required),
        ("loss_funcs", required),
        ("dataset", required),
        ("mining_funcs", None),
        ("iterations_per_epoch", None),
        ("data_device", None),
        ("dtype", None),
        ("loss_weights", None),
        ("sampler", None),
        ("collate_fn", None),
        ("lr_schedulers", None),
        ("gradient_clippers", None),
        ("freeze_these", ()),
        ("freeze_trunk_batchnorm", False),
        ("label_hierarchy_level", 0),
        ("dataloader_num_workers", 2),
        ("data_and_label_getter", None),
        ("dataset_labels", None),
        ("set_min_label_to_zero", False),
        ("end_of_iteration_hook", None),
        ("end_of_epoch_hook", None),
        ("between_iterations_hook", None),  # from here on: this project's own
        ("grad_scaler", None),
    ]
    parameters = inspect.signature(trainer).parameters.values()
    assert [(parameter.name, parameter.default) for parameter in parameters] == expected
    assert {parameter.kind for parameter in parameters} == {
        inspect.Parameter.POSITIONAL_OR_KEYWORD}
    train = inspect.signature(trainer.train).parameters
    assert [(p.name, p.default) for p in train.values()][1:] == [("start_epoch", 1),
                                                                 ("num_epochs", 1)]


def test_arguments_may_be_given_by_position():
    trunk, loss = linear(), MeanSquare()
    trainer = MetricLossOnly({"trunk": trunk}, {}, 8, {"metric_loss": loss}, numbered(), {}, 3,
                             "cpu")
    assert trainer.iterations_per_epoch == 3 and trainer.batch_size == 8
    assert trainer.dataloader_num_workers == 2


class Noisy(torch.nn.Module):
    """A loss that draws from torch's global generator, as losses that sample tuples do."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor([1., 2.]))

    def forward(self, embeddings, labels, indices_tuple):
        anchors, others = indices_tuple
        noise = torch.rand(len(anchors))
        distances = (embeddings[anchors] - embeddings[others]).square() @ self.weight
        return (distances * noise).mean() - embeddings.norm(dim=1).mean()


def test_three_steps_equal_a_loop_written_by_hand():
    def parts():
        trunk = torch.nn.Sequential(linear(3, 4), torch.nn.Dropout(0.3), torch.nn.Tanh())
        embedder, loss = linear(4, 2, seed=1), Noisy()
        return trunk, embedder, loss, {
            "trunk_optimizer": torch.optim.Adam(trunk.parameters(), 0.01, weight_decay=0.1),
            "embedder_optimizer": torch.optim.SGD(embedder.parameters(), 0.1, momentum=0.9),
            "metric_loss_optimizer": torch.optim.SGD(loss.parameters(), 0.05)}

    def miner(embeddings, labels):
        return torch.tensor([0, 1, 2]), torch.tensor([3, 4, 0])

    dataset, losses = numbered(17), []
    trunk, embedder, loss, optimizers = parts()
    trainer = MetricLossOnly(
        {"trunk": trunk, "embedder": embedder}, optimizers, 5, {"metric_loss": loss}, dataset,
        {"tuple_miner": miner}, data_device="cpu", loss_weights={"metric_loss": 0.5},
        dataloader_num_workers=0,
        end_of_iteration_hook=lambda trainer: losses.append(trainer.losses["total_loss"].item()))
    torch.manual_seed(3)
    trainer.train()

    trunk_2, embedder_2, loss_2, optimizers_2 = parts()
    torch.manual_seed(3)
    expected = []
    for data, labels in DataLoader(dataset, batch_size=5, shuffle=True, drop_last=True):
        embeddings = embedder_2(trunk_2(data))
        value = 0.5 * loss_2(embeddings, labels, miner(embeddings, labels))
        for optimizer in optimizers_2.values():
            optimizer.zero_grad()
        value.backward()
        for optimizer in optimizers_2.values():
            optimizer.step()
        expected.append(value.item())

    assert len(losses) == 3 and losses == expected
    for first, second in ((trunk, trunk_2), (embedder, embedder_2), (loss, loss_2)):
        assert same(weights(first), weights(second))


class Shuffled(InOrder):
    """A batch order of its own for every pass, drawn from no global generator."""

    def __iter__(self):
        generator = torch.Generator().manual_seed(self.epochs[-1])
        return iter(torch.randperm(ROWS, generator=generator).tolist())


@pytest.mark.parametrize("sampler", [None, Shuffled], ids=["shuffled by torch", "sampler"])
@pytest.mark.parametrize("iterations", [None, 3, 6])
def test_loader_processes_do_not_change_the_numbers(sampler, iterations):
    runs = []
    for workers in (0, 2):
        trunk = torch.nn.Sequential(linear(), torch.nn.Dropout(0.5))
        trainer = make_trainer(models={"trunk": trunk}, optimizers={"trunk_optimizer": sgd(trunk)},
                               sampler=sampler and sampler(), dataloader_num_workers=workers,
                               iterations_per_epoch=iterations)
        torch.manual_seed(7)
        trainer.train(num_epochs=3)
        runs.append((seen(trainer), weights(trunk)))
    assert runs[0][0] == runs[1][0]
    assert same(runs[0][1], runs[1][1])


# ---- models, optimizers, losses


@pytest.mark.parametrize("with_embedder", [False, True])
def test_models(with_embedder):
    trunk, embedder = linear(), linear(2, 5, seed=1)
    models = {"trunk": trunk} | ({"embedder": embedder} if with_embedder else {})
    trainer = make_trainer(models=models, optimizers={})
    trainer.train()
    data = numbered()[:BATCH][0]
    expected = embedder(trunk(data)) if with_embedder else trunk(data)
    torch.testing.assert_close(trainer.loss_funcs["metric_loss"].seen[0][0], expected)
    torch.testing.assert_close(trainer.compute_embeddings(data), expected)


@pytest.mark.parametrize("stepped", [(), ("trunk",), ("embedder",), ("metric_loss",),
                                     ("trunk", "embedder", "metric_loss")])
def test_optimizers_step_what_they_hold_and_nothing_else(stepped):
    trainer = all_parts()
    trainer = all_parts(models=trainer.models, loss_funcs=trainer.loss_funcs,
                        optimizers={f"{name}_optimizer": trainer.optimizers[f"{name}_optimizer"]
                                    for name in stepped})
    before = {name: weights(module) for name, module in trainer.parts()}
    trainer.train()
    for name, module in trainer.parts():
        assert same(before[name], weights(module)) == (name not in stepped), name


@pytest.mark.parametrize("with_optimizer", [True, False])
def test_gradients_are_those_of_one_batch(with_optimizer):
    # Without an optimizer too: a clipper by the norm of all gradients would see them grow.
    gradients, trunk = [], linear()
    trainer = make_trainer(
        models={"trunk": trunk},
        optimizers={"trunk_optimizer": sgd(trunk, lr=0)} if with_optimizer else {},
        end_of_iteration_hook=lambda trainer: gradients.append(trunk.weight.grad.clone()))
    trainer.train()
    for batch, gradient in zip(IN_ORDER, gradients, strict=True):
        loss = trunk(numbered()[batch][0]).square().mean()
        expected, = torch.autograd.grad(loss, [trunk.weight])
        torch.testing.assert_close(gradient, expected)


def test_gradients_of_a_loss_that_is_no_module_are_those_of_one_batch():
    # A loss may be any callable; what its optimizer holds is then known from the optimizer alone.
    loss, gradients = MeanSquare(), []
    trainer = make_trainer(
        loss_funcs={"metric_loss": lambda *arguments: loss(*arguments)},
        optimizers={"metric_loss_optimizer": sgd(loss, lr=0)},
        end_of_iteration_hook=lambda trainer: gradients.append(
            (loss.scale.grad.item(), trainer.losses["metric_loss"].item())))
    trainer.train()
    for gradient, value in gradients:
        assert gradient == pytest.approx(value)  # the scale is 1, so the loss is its own gradient


@pytest.mark.parametrize("batch_size, batches", [(1, 16), (4, 4), (5, 3), (16, 1)])
def test_batch_size(batch_size, batches):
    trainer = make_trainer(batch_size=batch_size)
    trainer.train()
    assert [len(labels) for labels in seen(trainer)] == [batch_size] * batches


def test_loss_funcs_are_called_with_embeddings_labels_and_tuples():
    calls = []

    def loss(*arguments):
        calls.append(arguments)
        return arguments[0].sum()

    make_trainer(loss_funcs={"metric_loss": loss}).train()
    embeddings, labels, indices_tuple = calls[0]
    assert embeddings.shape == (BATCH, 2) and embeddings.requires_grad
    assert labels.tolist() == IN_ORDER[0] and labels.dtype == torch.int64
    assert indices_tuple is None


class TwoLosses(BaseTrainer):
    """A trainer of two losses, as a subclass writes one."""

    loss_names = ("metric_loss", "second_loss")

    def calculate_loss(self, data, labels):
        embeddings = self.compute_embeddings(data)
        return {name: loss(embeddings, labels) for name, loss in self.loss_funcs.items()}


def two_losses(**changes):
    return make_trainer(TwoLosses, **(dict(
        loss_funcs={"metric_loss": lambda embeddings, labels: embeddings.square().mean(),
                    "second_loss": lambda embeddings, labels: embeddings.abs().mean()}) | changes))


@pytest.mark.parametrize("factors", [None, (1, 1), (3, 0.5), (0, 2)])
def test_loss_weights(factors):
    trunk = linear()
    trainer = two_losses(
        models={"trunk": trunk}, optimizers={"trunk_optimizer": sgd(trunk)},
        iterations_per_epoch=1,
        loss_weights=factors and dict(zip(("metric_loss", "second_loss"), factors)))
    first, second = factors or (1, 1)
    expected = copy.deepcopy(trunk)
    embeddings = expected(numbered()[:BATCH][0])
    total = first * embeddings.square().mean() + second * embeddings.abs().mean()
    total.backward()
    sgd(expected).step()
    trainer.train()
    torch.testing.assert_close(trainer.losses["total_loss"], total.detach())
    torch.testing.assert_close(weights(trunk), weights(expected))


def test_losses_are_numbers_without_a_graph():
    kept = []
    two_losses(end_of_iteration_hook=lambda trainer: kept.append(trainer.losses)).train()
    assert len(kept) == BATCHES and kept[0] is not kept[1]
    for losses in kept:
        assert set(losses) == {"metric_loss", "second_loss", "total_loss"}
        assert all(loss.shape == () and not loss.requires_grad for loss in losses.values())
        assert losses["total_loss"] == losses["metric_loss"] + losses["second_loss"]


def test_hooks_see_weighted_losses():
    plain, weighted = [], []
    for kept, factors in ((plain, (1, 1)), (weighted, (3, 0.5))):
        two_losses(loss_weights=dict(zip(("metric_loss", "second_loss"), factors)), optimizers={},
                   end_of_iteration_hook=lambda trainer: kept.append(trainer.losses)).train()
    for one, other in zip(plain, weighted, strict=True):
        assert other == {"metric_loss": 3 * one["metric_loss"],
                         "second_loss": 0.5 * one["second_loss"],
                         "total_loss": other["metric_loss"] + other["second_loss"]}


# ---- miners


def test_what_the_tuple_miner_returns_reaches_the_loss():
    mined = []

    def miner(embeddings, labels):
        mined.append((embeddings.detach().clone(), labels, object()))
        return mined[-1][2]

    trainer = make_trainer(mining_funcs={"tuple_miner": miner})
    trainer.train()
    assert len(mined) == BATCHES
    for (embeddings, labels, given), (expected, expected_labels, got) in zip(
            mined, trainer.loss_funcs["metric_loss"].seen, strict=True):
        assert given is got
        assert torch.equal(embeddings, expected) and torch.equal(labels, expected_labels)


@pytest.mark.parametrize("indices", [torch.tensor([3, 1]), [0, 2],
                                     torch.tensor([True, False, False, True])])
def test_subset_batch_miner_thins_the_batch(indices):
    trainer = make_trainer(mining_funcs={"subset_batch_miner": lambda embeddings, labels: indices})
    trainer.train()
    assert seen(trainer) == [torch.tensor(batch)[indices].tolist() for batch in IN_ORDER]
    embeddings, labels, _ = trainer.loss_funcs["metric_loss"].seen[0]
    assert len(embeddings) == len(labels) == 2


def test_subset_batch_miner_sees_eval_mode_without_gradients_and_modes_come_back():
    trunk = torch.nn.Sequential(linear(), torch.nn.BatchNorm1d(2), torch.nn.Dropout(0.5))
    embedder, modes = linear(2, 2), []
    parts = {"trunk": trunk, "embedder": embedder}

    def miner(embeddings, labels):
        modes.append([module.training for module in parts.values()])
        assert not embeddings.requires_grad and not torch.is_grad_enabled()
        expected = trunk(numbered()[labels.tolist()][0])  # the mode is eval, so this is repeatable
        torch.testing.assert_close(embeddings, embedder(expected))
        return torch.arange(3)

    class Loss(MeanSquare):
        def forward(self, embeddings, labels, indices_tuple=None):
            modes.append([module.training for module in (*parts.values(), trunk[1])])
            assert embeddings.requires_grad
            return super().forward(embeddings, labels)

    parts["metric_loss"] = Loss()
    trainer = make_trainer(models={"trunk": trunk, "embedder": embedder}, optimizers={},
                           loss_funcs={"metric_loss": parts["metric_loss"]},
                           freeze_these=("embedder",), freeze_trunk_batchnorm=True,
                           mining_funcs={"subset_batch_miner": miner})
    trainer.train()
    # trunk, embedder (frozen), loss, and the trunk's batch normalisation (frozen)
    assert modes == [[False] * 3, [True, False, True, False]] * BATCHES


# ---- batches and epochs


@pytest.mark.parametrize("iterations, passes", [(None, 3), (4, 3), (3, 3), (6, 5), (1, 1)])
def test_iterations_per_epoch(iterations, passes):
    sampler, counts = InOrder(), []
    trainer = make_trainer(sampler=sampler, iterations_per_epoch=iterations,
                           end_of_epoch_hook=lambda trainer: counts.append(len(seen(trainer))))
    trainer.train(num_epochs=3)
    length = iterations or BATCHES
    assert trainer.iterations_per_epoch == length
    assert counts == [length, 2 * length, 3 * length]
    # The data go on across epochs: no batch is left out or drawn twice before its turn.
    assert seen(trainer) == [IN_ORDER[i % BATCHES] for i in range(3 * length)]
    assert sampler.epochs == list(range(1, passes + 1))


@pytest.mark.parametrize("workers", [0, 2])
def test_each_call_of_train_begins_with_a_new_pass(workers):
    trainer = make_trainer(iterations_per_epoch=3, dataloader_num_workers=workers)
    trainer.train()
    trainer.train(2, 2)
    assert seen(trainer) == IN_ORDER[:3] * 2


def test_data_device():
    data, labels = make_trainer(data_device="meta").next_batch()  # a device that every torch has
    assert data.device.type == labels.device.type == "meta"
    data, labels = make_trainer(data_device=torch.device("cpu")).next_batch()
    assert data.device.type == labels.device.type == "cpu"


@pytest.mark.parametrize("available, device", [(True, "cuda"), (False, "cpu")])
def test_data_device_is_a_gpu_where_there_is_one(monkeypatch, available, device):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    assert torch.device(make_trainer(data_device=None).data_device).type == device


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtype(dtype):
    trunk = linear().to(dtype)
    trainer = make_trainer(models={"trunk": trunk}, optimizers={"trunk_optimizer": sgd(trunk)},
                           loss_funcs={"metric_loss": MeanSquare().to(dtype)}, dtype=dtype)
    before = weights(trunk)
    data, labels = trainer.next_batch()
    assert data.dtype == dtype and labels.dtype == torch.int64
    trainer.train()
    assert {embeddings.dtype for embeddings, _, _ in trainer.loss_funcs["metric_loss"].seen} == {
        dtype}
    assert trunk.weight.dtype == dtype and not same(before, weights(trunk))


@pytest.mark.parametrize("dtype, expected", [(None, torch.uint8), (torch.float32, torch.float32)])
def test_dtype_of_images_in_bytes(dtype, expected):
    dataset = TensorDataset(torch.ones(8, 3, dtype=torch.uint8), torch.arange(8))
    data, _ = make_trainer(dataset=dataset, sampler=None, dtype=dtype).next_batch()
    assert data.dtype == expected


def test_without_a_sampler_every_pass_is_shuffled_anew():
    trainer = make_trainer(sampler=None)
    torch.manual_seed(0)
    trainer.train(num_epochs=2)
    first, second = (sum(seen(trainer)[i:i + BATCHES], []) for i in (0, BATCHES))
    assert sorted(first) == sorted(second) == list(range(ROWS))
    assert first != second and first != list(range(ROWS))


def test_sampler_chooses_the_rows_and_is_told_the_pass():
    sampler = InOrder([9, 3, 3, 1, 0, 15, 2, 7, 8])
    trainer = make_trainer(sampler=sampler)
    trainer.train(num_epochs=2)
    assert seen(trainer) == [[9, 3, 3, 1], [0, 15, 2, 7]] * 2
    assert sampler.epochs == [1, 2]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("sampler", [None, InOrder()], ids=["shuffled by torch", "sampler"])
def test_passes_draw_from_the_global_generator_what_plain_loaders_draw(sampler, workers):
    torch.manual_seed(11)
    trainer = make_trainer(sampler=sampler, dataloader_num_workers=workers)
    trainer.train(num_epochs=3)
    state = torch.get_rng_state()
    torch.manual_seed(11)
    expected = [labels.tolist() for _ in range(3) for _, labels in DataLoader(
        numbered(), BATCH, shuffle=sampler is None, sampler=sampler)]
    assert seen(trainer) == expected
    assert torch.equal(torch.get_rng_state(), state)


class Batches(BatchSampler):
    """Two batches of the sampler's own size, other rows in every pass."""

    def __init__(self):
        self.epoch = None

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __iter__(self):
        yield [self.epoch, 0, 1]
        yield [self.epoch, 2, 3, 4, 5]

    def __len__(self):
        return 2


@pytest.mark.parametrize("workers", [0, 2])
def test_a_batch_sampler_sets_the_batches_itself(workers):
    trainer = make_trainer(sampler=Batches(), batch_size=1, dataloader_num_workers=workers)
    trainer.train(5, 6)
    assert seen(trainer) == [[5, 0, 1], [5, 2, 3, 4, 5], [6, 0, 1], [6, 2, 3, 4, 5]]


def test_a_batch_sampler_of_torch():
    trainer = make_trainer(sampler=BatchSampler(InOrder(), 6, drop_last=False))
    trainer.train()
    assert [len(labels) for labels in seen(trainer)] == [6, 6, 4]


def test_a_sampler_without_an_end():
    class Endless(Sampler):
        def __iter__(self):
            while True:
                yield from range(ROWS)

    trainer = make_trainer(sampler=Endless(), iterations_per_epoch=3)
    trainer.train(num_epochs=2)
    assert seen(trainer) == (IN_ORDER * 2)[:6]


class Epochs(Dataset):
    """Rows that say which pass the dataset was told of, in a plain attribute."""

    epoch = 0

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __len__(self):
        return ROWS

    def __getitem__(self, i):
        return torch.zeros(3), self.epoch


@pytest.mark.parametrize("workers", [0, 2])
def test_the_dataset_is_told_the_pass(workers):
    trainer = make_trainer(dataset=Epochs(), dataloader_num_workers=workers)
    trainer.train(3, 5)
    assert [labels[0] for labels in seen(trainer)] == [3] * BATCHES + [4] * BATCHES + [5] * BATCHES


def test_collate_fn():
    def collate(items):
        return torch.stack([data for data, _ in items]) + 100, torch.tensor([-label for _, label
                                                                             in items])

    data, labels = make_trainer(collate_fn=collate).next_batch()
    assert data.min() >= 100 and labels.tolist() == [0, -1, -2, -3]


@pytest.mark.parametrize("kind", [int, np.int64, torch.tensor, str], ids=lambda k: k.__name__)
@pytest.mark.parametrize("container", [list, tuple])
def test_collate_fn_may_give_labels_as_a_list(kind, container):
    def collate(items):
        return (torch.stack([data for data, _ in items]),
                container(kind(label) for _, label in items))

    ranked = dict(dataset_labels=[str(i) for i in range(4)], set_min_label_to_zero=True)
    trainer = make_trainer(dataset=rows_labelled(range(4)), sampler=None, collate_fn=collate,
                           **(ranked if kind is str else {}))
    data, labels = trainer.next_batch()
    assert labels.dtype == torch.int64
    assert labels.tolist() == (data[:, 0] * 10).round().int().tolist()


class Where(Epochs):
    """Labels that name the process that loaded the row, -1 for the main one."""

    def __getitem__(self, i):
        worker = torch.utils.data.get_worker_info()
        return torch.zeros(3), -1 if worker is None else worker.id


@pytest.mark.parametrize("workers, expected", [(0, {-1}), (1, {0}), (2, {0, 1})])
def test_dataloader_num_workers(workers, expected):
    trainer = make_trainer(dataset=Where(), dataloader_num_workers=workers)
    trainer.train()
    assert {label for labels in seen(trainer) for label in labels} == expected


# ---- labels


@pytest.mark.parametrize("level", [0, 1, 2])
def test_label_hierarchy_level_of_tensors(level):
    table = torch.arange(8 * 3).reshape(8, 3)
    trainer = make_trainer(dataset=TensorDataset(torch.zeros(8, 3), table),
                           sampler=InOrder(range(8)), label_hierarchy_level=level)
    assert trainer.next_batch()[1].tolist() == table[:4, level].tolist()


@pytest.mark.parametrize("level", [0, 1])
@pytest.mark.parametrize("row", [list, tuple, np.array], ids=["list", "tuple", "array"])
def test_label_hierarchy_level_of_rows_of_ints(level, row):
    trainer = make_trainer(dataset=rows_labelled(row([i, 10 * i]) for i in range(8)),
                           sampler=InOrder(range(8)), label_hierarchy_level=level)
    assert trainer.next_batch()[1].tolist() == ([0, 1, 2, 3], [0, 10, 20, 30])[level]


@pytest.mark.parametrize("level, expected", [(0, [1, 1, 0, 0]), (1, [1, 0, 3, 2])])
@pytest.mark.parametrize("kind", [list, np.array], ids=["list", "array"])
def test_label_hierarchy_level_of_strings(level, expected, kind):
    names = [["dog", "poodle"], ["dog", "husky"], ["cat", "tabby"], ["cat", "siamese"]]
    trainer = make_trainer(dataset=rows_labelled(names), sampler=InOrder(range(4)),
                           label_hierarchy_level=level, dataset_labels=kind(names),
                           set_min_label_to_zero=True)
    assert trainer.next_batch()[1].tolist() == expected


def test_label_hierarchy_level_of_ranked_tensors():
    table = torch.tensor([[5, 100], [5, 90], [7, 80], [7, 70]])
    for level, expected in ((0, [0, 0, 1, 1]), (1, [3, 2, 1, 0])):
        trainer = make_trainer(dataset=TensorDataset(torch.zeros(4, 3), table),
                               sampler=InOrder(range(4)), label_hierarchy_level=level,
                               dataset_labels=table, set_min_label_to_zero=True)
        assert trainer.next_batch()[1].tolist() == expected


def test_data_and_label_getter():
    class Named(Epochs):
        def __getitem__(self, i):
            return {"image": torch.full((3,), i / 10), "class": i + 100, "path": f"{i}.png"}

    trainer = make_trainer(dataset=Named(),
                           data_and_label_getter=lambda item: (item["image"] + 1, item["class"]))
    data, labels = trainer.next_batch()
    assert labels.tolist() == [100, 101, 102, 103]
    torch.testing.assert_close(data[:, 0], torch.tensor([1., 1.1, 1.2, 1.3]))


@pytest.mark.parametrize("labels, ranks", [
    ([5, 10, 13, 12], [0, 1, 3, 2]), ([-4, 10 ** 12, 0, -4], [0, 2, 1, 0]),
    (["dog", "cat", "monkey", "dog"], [1, 0, 2, 1])])
@pytest.mark.parametrize("container", [list, np.array])
def test_set_min_label_to_zero_gives_ranks_among_dataset_labels(labels, ranks, container):
    trainer = make_trainer(dataset=rows_labelled(labels), sampler=InOrder(range(4)),
                           dataset_labels=container(labels), set_min_label_to_zero=True)
    result = trainer.next_batch()[1]
    assert result.tolist() == ranks and result.dtype == torch.int64


def test_ranks_are_those_of_the_whole_dataset_and_only_if_asked_for():
    few = dict(dataset=rows_labelled([12, 5, 12, 5]), sampler=InOrder(range(4)),
               dataset_labels=[5, 10, 12, 13])
    assert make_trainer(**few, set_min_label_to_zero=True).next_batch()[1].tolist() == [2, 0, 2, 0]
    assert make_trainer(**few).next_batch()[1].tolist() == [12, 5, 12, 5]


@pytest.mark.parametrize("labels, known", [([1, 2, 9, 1], [1, 2, 3]), ([1, 2, 0, 1], [1, 2, 3]),
                                           ([1, 3, 2, 1], [1, 3, 4]),
                                           (["a", "b", "zebra", "a"], ["a", "b", "c"])])
def test_a_label_that_is_not_among_dataset_labels(labels, known):
    trainer = make_trainer(dataset=rows_labelled(labels), sampler=InOrder(range(4)),
                           dataset_labels=known, set_min_label_to_zero=True)
    with pytest.raises(ValueError, match=f"label .*{labels[2]}.* not among dataset_labels"):
        trainer.train()


def test_ranks_need_dataset_labels_and_strings_need_ranks():
    with pytest.raises(ValueError, match="needs dataset_labels"):
        make_trainer(set_min_label_to_zero=True)
    trainer = make_trainer(dataset=rows_labelled("abcd"), sampler=InOrder(range(4)))
    with pytest.raises(ValueError, match="set_min_label_to_zero"):
        trainer.train()


# ---- schedulers, clippers, freezing


def test_lr_schedulers_by_iteration_and_by_epoch():
    trainer = all_parts()
    schedulers = {f"{name}_scheduler_by_{when}": torch.optim.lr_scheduler.StepLR(
        trainer.optimizers[f"{name}_optimizer"], step_size=1, gamma=0.5)
        for name, when in (("trunk", "iteration"), ("embedder", "epoch"),
                           ("metric_loss", "iteration"))}
    rates = []
    trainer = all_parts(models=trainer.models, loss_funcs=trainer.loss_funcs,
                        optimizers=trainer.optimizers, lr_schedulers=schedulers,
                        end_of_epoch_hook=lambda trainer: rates.append([
                            optimizer.param_groups[0]["lr"]
                            for optimizer in trainer.optimizers.values()]))
    trainer.train(num_epochs=2)
    # 0.1 halved after each of 4 iterations, or after each epoch; the hook sees the new rates
    assert rates == [pytest.approx([0.1 / 2 ** 4, 0.1 / 2, 0.1 / 2 ** 4]),
                     pytest.approx([0.1 / 2 ** 8, 0.1 / 4, 0.1 / 2 ** 8])]


def test_lr_schedulers_by_plateau():
    trunk = linear()
    optimizer = sgd(trunk)
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, "max", factor=0.1, patience=0)
    accuracies, rates = iter([0.5, 0.6, 0.6, 0.7]), []

    def hook(trainer):
        rates.append(optimizer.param_groups[0]["lr"])
        trainer.step_lr_plateau_schedulers(next(accuracies))

    make_trainer(models={"trunk": trunk}, optimizers={"trunk_optimizer": optimizer},
                 lr_schedulers={"trunk_scheduler_by_plateau": plateau},
                 end_of_epoch_hook=hook).train(num_epochs=4)
    assert rates == pytest.approx([0.1, 0.1, 0.1, 0.01])  # 0.6 twice: no gain after epoch 3


def test_plateau_schedulers_alone_take_the_metric():
    trunk = linear()
    optimizer = sgd(trunk)
    by_epoch = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    trainer = make_trainer(models={"trunk": trunk}, optimizers={"trunk_optimizer": optimizer},
                           lr_schedulers={"trunk_scheduler_by_epoch": by_epoch})
    trainer.step_lr_plateau_schedulers(0.5)
    assert by_epoch.last_epoch == 0


class Steps:
    """A scheduler that keeps what it was stepped with, and warns if asked to."""

    def __init__(self, warning=None):
        self.values, self.warning = [], warning

    def step(self, *value):
        self.values.append(value)
        if self.warning:
            warnings.warn(self.warning, stacklevel=2)


def test_other_warnings_of_schedulers_are_heard():
    trainer = make_trainer(lr_schedulers={"trunk_scheduler_by_epoch": Steps("rate is zero")})
    with pytest.warns(UserWarning, match="rate is zero") as caught:
        trainer.train(num_epochs=2)
    assert len(caught) == 2


@pytest.mark.parametrize("when, steps", [("iteration", 8), ("epoch", 2)])
def test_schedules_begin_before_the_first_step_without_a_warning(when, steps):
    trunk = linear()
    optimizer = sgd(trunk)
    trainer = make_trainer(
        models={"trunk": trunk}, optimizers={"trunk_optimizer": optimizer},
        mining_funcs={"tuple_miner": lambda embeddings, labels: []},  # every step is skipped
        lr_schedulers={f"trunk_scheduler_by_{when}": torch.optim.lr_scheduler.StepLR(
            optimizer, 1, gamma=0.5)})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trainer.train(num_epochs=2)
    assert trainer.skipped_steps == 8
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1 / 2 ** steps)


def test_gradient_clippers_are_called_between_backward_and_step():
    trainer = all_parts()
    trunk, embedder = trainer.models.values()
    calls, before = [], [weights(trunk)]

    def clip_trunk():
        assert trunk.weight.grad.abs().sum() > 0
        assert same(before[-1], weights(trunk))  # not stepped yet
        calls.append("trunk")
        torch.nn.utils.clip_grad_norm_(trunk.parameters(), 1e-3)

    def clip_embedder():
        calls.append("embedder")
        for parameter in embedder.parameters():
            parameter.grad.zero_()

    untouched = weights(embedder)
    all_parts(models=trainer.models, optimizers=trainer.optimizers, loss_funcs=trainer.loss_funcs,
              gradient_clippers={"trunk_grad_clipper": clip_trunk,
                                 "embedder_grad_clipper": clip_embedder},
              end_of_iteration_hook=lambda trainer: before.append(weights(trunk))).train()
    assert calls == ["trunk", "embedder"] * BATCHES
    assert same(untouched, weights(embedder))
    for old, new in zip(before, before[1:]):
        change = torch.cat([(a - b).flatten() for a, b in zip(old, new)]).norm()
        assert change == pytest.approx(0.1 * 1e-3, rel=1e-2)  # rate times the clipped norm


@pytest.mark.parametrize("frozen", [("trunk",), ["embedder"], ("metric_loss",),
                                    ["trunk", "metric_loss"]])
def test_freeze_these(frozen):
    parts = {"trunk": linear(), "embedder": linear(2, 2), "metric_loss": MeanSquare()}
    optimizers = {f"{name}_optimizer": torch.optim.SGD(module.parameters(), 0.1, weight_decay=0.5)
                  for name, module in parts.items()}
    before = {name: weights(module) for name, module in parts.items()}
    modes, stepped = [], set()
    for name, optimizer in optimizers.items():
        optimizer.register_step_post_hook(lambda *_, name=name: stepped.add(name))
    trainer = all_parts(
        models={"trunk": parts["trunk"], "embedder": parts["embedder"]},
        loss_funcs={"metric_loss": parts["metric_loss"]}, optimizers=optimizers,
        freeze_these=frozen, end_of_iteration_hook=lambda trainer: modes.append(
            {name: module.training for name, module in trainer.parts()}))
    trainer.train(num_epochs=2)
    for name, module in parts.items():
        assert same(before[name], weights(module)) == (name in frozen), name
        assert all(p.requires_grad == (name not in frozen) for p in module.parameters())
        assert all((p.grad is None) == (name in frozen) for p in module.parameters())
    assert modes == [{name: name not in frozen for name in parts}] * 2 * BATCHES
    assert stepped == {f"{name}_optimizer" for name in parts if name not in frozen}


@pytest.mark.parametrize("frozen", [False, True])
def test_freeze_trunk_batchnorm(frozen):
    def layers():
        return torch.nn.Sequential(linear(), torch.nn.BatchNorm1d(2), linear(2, 2, seed=1))

    trunk, embedder = layers(), torch.nn.Sequential(torch.nn.BatchNorm1d(2), linear(2, 2))
    trainer = make_trainer(models={"trunk": trunk, "embedder": embedder},
                           optimizers={"trunk_optimizer": sgd(trunk)},
                           freeze_trunk_batchnorm=frozen)
    affine = weights(trunk[1])
    trainer.train(num_epochs=2)
    assert (trunk[1].num_batches_tracked == 0) == frozen
    assert torch.equal(trunk[1].running_mean, torch.zeros(2)) == frozen
    assert torch.equal(trunk[1].running_var, torch.ones(2)) == frozen
    assert not same(affine, weights(trunk[1]))  # scale and shift learn all the same
    assert trunk.training and trunk[1].training != frozen
    assert embedder[0].num_batches_tracked == 2 * BATCHES  # of the trunk alone


# ---- hooks and counting


def test_end_of_iteration_hook_is_called_after_each_step():
    trunk = linear()
    kept, calls = [weights(trunk)], []

    def hook(trainer):
        calls.append((trainer.epoch, trainer.iteration, trainer.get_global_iteration(),
                      trainer.losses["total_loss"].item()))
        assert not same(kept[-1], weights(trunk))
        kept.append(weights(trunk))
        return False  # means nothing here

    make_trainer(models={"trunk": trunk}, optimizers={"trunk_optimizer": sgd(trunk)},
                 end_of_iteration_hook=hook).train(num_epochs=2)
    assert [call[:3] for call in calls] == [(epoch, i, (epoch - 1) * BATCHES + i)
                                            for epoch in (1, 2) for i in range(BATCHES)]
    assert len({call[3] for call in calls}) == 2 * BATCHES  # each iteration's own loss


@pytest.mark.parametrize("value, epochs", [(False, 1), (None, 3), (0, 3), ([], 3), (True, 3),
                                           (np.False_, 3), (torch.tensor(False), 3)])
def test_training_ends_early_when_the_epoch_hook_returns_exactly_false(value, epochs):
    calls = []

    def hook(trainer):
        calls.append((trainer.epoch, trainer.iteration))
        return value

    trainer = make_trainer(end_of_epoch_hook=hook)
    trainer.train(num_epochs=3)
    assert calls == [(epoch, BATCHES - 1) for epoch in range(1, epochs + 1)]
    assert len(seen(trainer)) == epochs * BATCHES


def test_hooks_can_read_every_argument():
    names = [name for name in inspect.signature(BaseTrainer).parameters]
    read = {}

    def hook(trainer):
        read.update({name: getattr(trainer, name) for name in names})

    trainer = make_trainer(end_of_epoch_hook=hook)
    trainer.train()
    assert list(read) == names
    assert read["mining_funcs"] == read["lr_schedulers"] == read["gradient_clippers"] == {}
    assert read["loss_weights"] == {"metric_loss": 1}
    assert read["iterations_per_epoch"] == BATCHES and read["end_of_epoch_hook"] is hook


@pytest.mark.parametrize("start, last, epochs", [(1, 1, [1]), (1, 3, [1, 2, 3]), (3, 4, [3, 4]),
                                                 (4, 4, [4]), (5, 4, []), (1, 0, [])])
def test_train_goes_from_one_epoch_to_another(start, last, epochs):
    sampler, calls, iterations = InOrder(), [], []
    trainer = make_trainer(
        sampler=sampler, end_of_epoch_hook=lambda trainer: calls.append(trainer.epoch),
        end_of_iteration_hook=lambda trainer: iterations.append(trainer.get_global_iteration()))
    trainer.train(start_epoch=start, num_epochs=last)
    assert calls == sampler.epochs == epochs
    assert iterations == [(epoch - 1) * BATCHES + i for epoch in epochs for i in range(BATCHES)]


def test_training_in_two_parts_is_training_in_one():
    results = []
    for parts in ([(1, 4)], [(1, 2), (3, 4)]):
        trainer = make_trainer(sampler=Shuffled())
        for start, last in parts:
            trainer.train(start, last)
        results.append((seen(trainer), weights(trainer.models["trunk"])))
    assert results[0][0] == results[1][0] and same(results[0][1], results[1][1])


def test_every_epoch_begins_in_train_mode():
    trainer = make_trainer()
    modes = []

    def evaluate(trainer):
        modes.append(trainer.models["trunk"].training)
        trainer.set_to_eval()
        assert not any(module.training for _, module in trainer.parts())

    trainer.end_of_epoch_hook = evaluate
    trainer.train(num_epochs=2)
    assert modes == [True, True]


class LibraryHooks:
    """What pytorch-metric-learning's hook container does with a trainer, and its tester.

    accuracies: what the tester would find, epoch after epoch.
    """

    def __init__(self, folder, accuracies, patience):
        self.folder, self.accuracies, self.patience = folder, list(accuracies), patience
        self.losses, self.weights, self.history = [], [], {}

    def after_iteration(self, trainer):
        self.losses.append({name: float(loss)
                            for name, loss in trainer.loss_tracker.losses.items()})
        self.weights.append(dict(trainer.loss_tracker.loss_weights))
        for part in (trainer.loss_funcs, trainer.mining_funcs, trainer.models):
            assert all(vars(value) for value in part.values())

    def after_epoch(self, trainer):
        embedding = trainer.models["embedder"](trainer.models["trunk"](four_classes()[:2][0]))
        assert embedding.shape[0] == 2
        self.history[trainer.epoch] = self.accuracies[trainer.epoch - 1]
        trainer.step_lr_plateau_schedulers(self.history[trainer.epoch])
        for group in ("models", "optimizers", "lr_schedulers", "loss_funcs", "mining_funcs"):
            for name, part in getattr(trainer, group).items():
                torch.save(part.state_dict(), self.folder / f"{name}_{trainer.epoch}.pth")
        best = max(self.history, key=self.history.get)
        return trainer.epoch - best <= self.patience

    def load(self, trainer, epoch):
        for group in ("models", "optimizers", "lr_schedulers", "loss_funcs", "mining_funcs"):
            for name, part in getattr(trainer, group).items():
                part.load_state_dict(torch.load(self.folder / f"{name}_{epoch}.pth"))


@pytest.mark.parametrize("with_embedder", [False, True])
@pytest.mark.parametrize("name", ["MetricLossOnly", "TrainWithClassifier", "CascadedEmbeddings",
                                  "DeepAdversarialMetricLearning", "TwoStreamMetricLoss"])
def test_hooks_of_the_library(name, with_embedder, tmp_path):
    """Losses with weights, identity for the embedder, saving, patience and accuracy history."""
    hooks = LibraryHooks(tmp_path, [0.1, 0.3, 0.2, 0.25, 0.9], patience=1)
    make = {"MetricLossOnly": lambda **changes: assemble(MetricLossOnly, **(dict(
        models={"trunk": linear(3, 5), "embedder": linear(5, 2)},
        loss_funcs={"metric_loss": Hinge()}) | changes)), **EVERY_TRAINER}[name]
    models = dict(make().models)
    size = models["embedder"].weight.shape[0]
    if not with_embedder:
        del models["embedder"]
        models["trunk"] = linear(3, size)
    if "generator" in models:
        models["generator"] = linear(*(3 * size, size) if not with_embedder else (15, 5))
    miner = "tuple_miner_1" if name == "CascadedEmbeddings" else "tuple_miner"
    trainer = make(models=models, mining_funcs={miner: samplers.Sampler("random")},
                   optimizers={f"{part}_optimizer": sgd(model) for part, model in models.items()},
                   end_of_iteration_hook=hooks.after_iteration,
                   end_of_epoch_hook=hooks.after_epoch)
    trainer.train(num_epochs=5)
    assert hooks.history == {1: 0.1, 2: 0.3, 3: 0.2, 4: 0.25}  # two epochs without a better one
    assert len(hooks.losses) == 8
    for losses, given in zip(hooks.losses, hooks.weights):
        assert given == {**trainer.loss_weights, "total_loss": 1}
        assert losses.keys() == given.keys()
        assert losses.pop("total_loss") == pytest.approx(sum(losses.values()))
    trained = weights(models["trunk"])
    models["trunk"].weight.data.zero_()
    hooks.load(trainer, epoch=4)
    assert same(weights(models["trunk"]), trained)


# ---- bad input


@pytest.mark.parametrize("argument, given, key, allowed", [
    ("models", {"trunk": linear(), "trunc": linear()}, "trunc", "trunk, embedder"),
    ("models", {"embedder": linear()}, "trunk", "trunk, embedder"),
    ("models", {}, "trunk", "trunk, embedder"),
    ("loss_funcs", {"metric_loss": MeanSquare(), "loss": MeanSquare()}, "loss", "metric_loss"),
    ("loss_funcs", {}, "metric_loss", "metric_loss"),
    ("mining_funcs", {"miner": print}, "miner", "subset_batch_miner, tuple_miner"),
    ("loss_weights", {"loss": 2}, "loss", "metric_loss"),
    ("optimizers", {"trunk": None}, "trunk", "trunk_optimizer, embedder_optimizer"),
    ("optimizers", {"trunk_optim": None}, "trunk_optim", "metric_loss_optimizer"),
    ("lr_schedulers", {"trunk_scheduler": None}, "trunk_scheduler", "trunk_scheduler_by_epoch"),
    ("lr_schedulers", {"head_scheduler_by_epoch": None}, "head_scheduler_by_epoch",
     "metric_loss_scheduler_by_plateau"),
    ("gradient_clippers", {"trunk_clipper": None}, "trunk_clipper", "trunk_grad_clipper"),
    ("freeze_these", ("body",), "body", "trunk, embedder, metric_loss"),
])
def test_unknown_and_missing_keys_are_named_with_the_allowed_ones(argument, given, key, allowed):
    with pytest.raises(ValueError) as error:
        make_trainer(**{"optimizers": {}, argument: given})
    message = str(error.value)
    assert f"key {key!r} in {argument}" in message and "MetricLossOnly" in message
    assert allowed in message.partition("allowed are")[2]


def test_every_loss_needs_a_weight_where_weights_are_given():
    with pytest.raises(ValueError, match="TwoLosses: no key 'second_loss' in loss_weights"):
        two_losses(loss_weights={"metric_loss": 1})


def test_a_dataset_smaller_than_a_batch():
    with pytest.raises(ValueError, match="batch of 4 from a dataset of 3"):
        make_trainer(dataset=numbered(3), sampler=None)


@pytest.mark.parametrize("indices", [[], [0, 1, 2]])
@pytest.mark.parametrize("iterations", [None, 2])
def test_a_sampler_shorter_than_a_batch(indices, iterations):
    with pytest.raises(ValueError, match="batch_size 4|batch of 4"):
        make_trainer(sampler=InOrder(indices), iterations_per_epoch=iterations).train()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_loss_that_is_not_finite_stops_before_the_step(value):
    class Breaks(MeanSquare):
        def forward(self, embeddings, labels, indices_tuple=None):
            loss = super().forward(embeddings, labels)
            return loss + value if len(self.seen) == BATCHES + 3 else loss

    kept, epochs = [], []
    trainer = make_trainer(
        loss_funcs={"metric_loss": Breaks()},
        end_of_iteration_hook=lambda trainer: kept.append(weights(trainer.models["trunk"])),
        end_of_epoch_hook=lambda trainer: epochs.append(trainer.epoch))
    with pytest.raises(FloatingPointError, match=rf"loss is {value} in epoch 2, iteration 3\b"):
        trainer.train(num_epochs=3)
    assert len(kept) == BATCHES + 2 and epochs == [1]
    assert same(kept[-1], weights(trainer.models["trunk"]))
    assert all(torch.isfinite(value).all() for value in kept[-1])


class OnGPU(torch.Tensor):
    """A tensor that says that it is on a GPU, where losses are looked at every 20 iterations."""

    is_cuda = True


@pytest.mark.parametrize("what, said", [
    ("loss", "the loss is inf in epoch 6, iteration 3;"),
    ("gradient", "the gradient of metric_loss.scale is not finite in epoch 6, iteration 3;")])
def test_what_is_looked_at_later_is_named_by_its_own_iteration(what, said):
    class Breaks(MeanSquare):
        def forward(self, embeddings, labels, indices_tuple=None):
            loss = super().forward(embeddings, labels)
            if len(self.seen) == 23:
                loss = (loss * float("inf") if what == "loss" else
                        loss + (loss - loss.detach()).sqrt())
            return loss.as_subclass(OnGPU)

    done, epochs = [], []
    trainer = make_trainer(
        loss_funcs={"metric_loss": Breaks()},
        models={"trunk": linear(3, 4), "embedder": linear(4, 2)},
        iterations_per_epoch=4, end_of_iteration_hook=lambda trainer: done.append(1),
        end_of_epoch_hook=lambda trainer: epochs.append(trainer.epoch))
    with pytest.raises(NonFiniteLoss, match=said) as error:
        trainer.train(num_epochs=9)
    assert (error.value.epoch, error.value.iteration) == (6, 2)
    assert len(done) == 24 and epochs == [1, 2, 3, 4, 5]  # before the hook can save anything


def test_a_gradient_that_is_not_finite_leaves_the_weights_as_they_were():
    """The root of 0, whose derivative is infinite: the loss itself is finite."""
    trainer = make_trainer(loss_funcs={"metric_loss": lambda embeddings, *_: (
        0 * embeddings).sqrt().sum()})
    before = [weights(part) for part in trainer.models.values()]
    with pytest.raises(NonFiniteLoss, match="the gradient of .* is not finite in epoch 1, "
                                                     "iteration 1; .*--lr"):
        trainer.train()
    assert all(same(*pair) for pair in zip(before, map(weights, trainer.models.values())))


def test_weights_that_a_last_step_spoils_are_refused_before_the_epoch_hook():
    saved = []
    trainer = make_trainer(iterations_per_epoch=1, end_of_epoch_hook=saved.append)
    trainer.optimizers["trunk_optimizer"].param_groups[0]["lr"] = float("inf")
    with pytest.raises(NonFiniteLoss, match="weight trunk.* is not finite after epoch 1, "
                                                     "iteration 1"):
        trainer.train()
    assert not saved


def test_a_grad_scaler_may_leave_out_steps_until_its_scale_is_below_one():
    class Scaler(torch.amp.GradScaler):
        """float16's, on the CPU."""

        def __init__(self):
            super().__init__("cpu", init_scale=4., growth_interval=1000)

    trainer = make_trainer(grad_scaler=Scaler(), loss_funcs={
        "metric_loss": lambda embeddings, *_: (0 * embeddings).sqrt().sum()})
    before = weights(trainer.models["trunk"])
    with pytest.raises(NonFiniteLoss, match="the gradient of .* iteration 4;"):
        trainer.train()
    assert same(before, weights(trainer.models["trunk"]))


def test_under_fp16_all_step_or_none():
    """Though the trunk's gradient alone overflows, the others rest with it; once only."""
    overflows = [True, False]

    def spoil(trainer):
        def hook(gradient):
            return gradient * float("inf") if overflows and overflows.pop(0) else gradient
        next(trainer.models["trunk"].parameters()).register_hook(hook)

    seen = []
    trainer = all_parts(
        grad_scaler=torch.amp.GradScaler("cpu", init_scale=4., growth_interval=1000),
        end_of_iteration_hook=lambda trainer: seen.append(
            {name: weights(part) for name, part in trainer.parts()}))
    start = {name: weights(part) for name, part in trainer.parts()}
    spoil(trainer)
    trainer.train()
    assert all(same(start[name], seen[0][name]) for name in start)
    assert not any(same(start[name], seen[1][name]) for name in start if start[name])
    assert trainer.grad_scaler.get_scale() == 2


def test_a_base_trainer_has_no_loss_of_its_own():
    with pytest.raises(NotImplementedError):
        make_trainer(BaseTrainer).train()


def test_freezing_all_that_could_learn_is_an_error():
    with pytest.raises(ValueError, match="nothing to learn.*trunk"):
        make_trainer(freeze_these=("trunk", "embedder", "metric_loss")).train()


# ---- the trainers of more than one loss


class Hinge(torch.nn.Module):
    """Mean over triplets of max(0, |a - p|^2 - |a - n|^2 + margin); keeps what it was given."""

    def __init__(self, margin=0.5):
        super().__init__()
        self.margin = margin
        self.seen = []

    def forward(self, embeddings, labels, indices_tuple=None):
        self.seen.append((embeddings.detach().clone(), labels.clone(), indices_tuple))
        if indices_tuple is None:
            indices_tuple = torch.tensor(triplets_of(labels.tolist())).unbind(1)
        a, p, n = (embeddings[indices] for indices in indices_tuple)
        return F.relu((a - p).square().sum(1) - (a - n).square().sum(1) + self.margin).mean()


def triplets_of(labels):
    """Every (anchor, positive, negative) of a list of labels."""
    places = range(len(labels))
    return [(a, p, n) for a in places for p in places for n in places
            if a != p and labels[a] == labels[p] != labels[n]]


def four_classes(streams=1, labels=True):
    """Sixteen random rows of three numbers, labelled 0, 1, 2, 3, 0, ... (streams of them)."""
    generator = torch.Generator().manual_seed(9)
    rows = [torch.randn(ROWS, 3, generator=generator) for _ in range(streams)]
    return TensorDataset(*rows, *([torch.arange(ROWS) % 4] if labels else []))


def assemble(trainer, models, loss_funcs, **changes):
    """A trainer of the four classes in order, eight rows a batch, SGD for all that has weights."""
    optimizers = {f"{name}_optimizer": sgd(part) for name, part in (models | loss_funcs).items()
                  if isinstance(part, torch.nn.Module) and list(part.parameters())}
    return trainer(**(dict(models=models, optimizers=optimizers, batch_size=8, data_device="cpu",
                           loss_funcs=loss_funcs, dataset=four_classes(), sampler=InOrder(),
                           dataloader_num_workers=0) | changes))


def with_classifier(**changes):
    models = {"trunk": linear(3, 5), "embedder": linear(5, 2, seed=1),
              "classifier": linear(2, 4, seed=2)}
    loss_funcs = {"metric_loss": Hinge(), "classifier_loss": torch.nn.CrossEntropyLoss()}
    return assemble(TrainWithClassifier, **(dict(models=models, loss_funcs=loss_funcs) | changes))


def cascaded(classifiers=(1,), sizes=(2, 3), **changes):
    """Sections of the given sizes; a classifier for some of them."""
    models = {"trunk": linear(3, 5), "embedder": linear(5, sum(sizes), seed=1)}
    loss_funcs = {f"metric_loss_{i}": Hinge(0.3 + i) for i in range(len(sizes))}
    for i in classifiers:
        models[f"classifier_{i}"] = linear(sizes[i], 4, seed=2 + i)
        loss_funcs[f"classifier_loss_{i}"] = torch.nn.CrossEntropyLoss()
    return assemble(functools.partial(CascadedEmbeddings, sizes),
                    **(dict(models=models, loss_funcs=loss_funcs) | changes))


def adversarial(phases=(1, 1), each=3, classifier=True, **changes):
    """Epochs of the metric alone and of the generator alone; so many triplets of each row."""
    models = {"trunk": linear(3, 5), "embedder": linear(5, 2, seed=1),
              "generator": torch.nn.Sequential(linear(15, 6, seed=2), torch.nn.Tanh(),
                                               linear(6, 5, seed=3))}
    models["generator"][2].weight.data *= 5  # so that synthetic negatives begin far away
    loss_funcs = {"metric_loss": Hinge(), "g_adv_loss": Hinge(0.1), "synth_loss": Hinge(0.7)}
    if classifier:
        models["classifier"] = linear(2, 4, seed=4)
        loss_funcs["classifier_loss"] = torch.nn.CrossEntropyLoss()
    return assemble(functools.partial(DeepAdversarialMetricLearning, *phases, each),
                    **(dict(models=models, loss_funcs=loss_funcs) | changes))


def views(**changes):
    """Three views of each row: itself, moved by one, and turned over."""
    return assemble(functools.partial(UnsupervisedEmbeddingsUsingAugmentations,
                                      [lambda x: x, lambda x: x + 1, lambda x: -x]),
                    **(dict(models={"trunk": linear(3, 5), "embedder": linear(5, 2, seed=1)},
                            loss_funcs={"metric_loss": Hinge()}) | changes))


def two_streams(**changes):
    return assemble(TwoStreamMetricLoss, **(dict(
        models={"trunk": linear(3, 5), "embedder": linear(5, 2, seed=1)},
        loss_funcs={"metric_loss": Hinge()}, dataset=four_classes(streams=2)) | changes))


EVERY_TRAINER = {"TrainWithClassifier": with_classifier, "CascadedEmbeddings": cascaded,
                 "DeepAdversarialMetricLearning": adversarial,
                 "UnsupervisedEmbeddingsUsingAugmentations": views,
                 "TwoStreamMetricLoss": two_streams}
every_trainer = pytest.mark.parametrize("make", EVERY_TRAINER.values(), ids=EVERY_TRAINER.keys())


def check_against_loop(make, step, epochs=2, stepped=lambda name, epoch: True):
    """Trains by the trainer and by a plain loop on copies of its parts: all numbers must agree.

    step(parts, data, labels, epoch) -> {name: scalar}; stepped: which parts learn in which epoch.
    """
    losses = []
    trainer = make(end_of_iteration_hook=lambda trainer: losses.append(
        {name: loss.item() for name, loss in trainer.losses.items()}))
    parts = copy.deepcopy(dict(trainer.parts()))
    optimizers = {name: sgd(part) for name, part in parts.items() if list(part.parameters())}
    torch.manual_seed(5)
    trainer.train(num_epochs=epochs)

    torch.manual_seed(5)
    expected = []
    for epoch in range(1, epochs + 1):
        for *data, labels in DataLoader(trainer.dataset, 8, sampler=InOrder()):
            values = {name: trainer.loss_weights[name] * value
                      for name, value in step(parts, *data, labels, epoch).items()}
            values["total_loss"] = sum(values.values())
            for optimizer in optimizers.values():
                optimizer.zero_grad()
            values["total_loss"].backward()
            for name, optimizer in optimizers.items():
                if stepped(name, epoch):
                    optimizer.step()
            expected.append({name: value.item() for name, value in values.items()})

    assert len(losses) == len(expected) == 2 * epochs
    for ours, theirs in zip(losses, expected):
        assert ours == pytest.approx(theirs, abs=1e-6)
        assert all(theirs.values())
    for name, part in trainer.parts():
        torch.testing.assert_close(weights(part), weights(parts[name]), rtol=0, atol=1e-6)
    return trainer, parts


def test_trainers_are_found_by_their_names():
    assert list(TRAINERS) == ["MetricLossOnly", *EVERY_TRAINER]
    assert all(trainer.__name__ == name for name, trainer in TRAINERS.items())


@pytest.mark.parametrize("trainer, first", [
    (TrainWithClassifier, []), (TwoStreamMetricLoss, []),
    (CascadedEmbeddings, [("embedding_sizes", inspect.Parameter.empty)]),
    (DeepAdversarialMetricLearning, [("metric_alone_epochs", 0), ("g_alone_epochs", 0),
                                     ("g_triplets_per_anchor", 100)]),
    (UnsupervisedEmbeddingsUsingAugmentations, [("transforms", inspect.Parameter.empty),
                                                ("data_and_label_setter", None)])])
def test_constructors_begin_with_their_own_arguments(trainer, first):
    parameters = list(inspect.signature(trainer).parameters.values())
    if first:
        assert [(p.name, p.default) for p in parameters[:-2]] == first
        assert [p.kind for p in parameters[-2:]] == [inspect.Parameter.VAR_POSITIONAL,
                                                     inspect.Parameter.VAR_KEYWORD]
    else:
        assert parameters == list(inspect.signature(BaseTrainer).parameters.values())


@pytest.mark.parametrize("make", [make_trainer, two_losses, *EVERY_TRAINER.values()])
def test_no_loss_weights_at_all_are_weights_of_one(make):
    trainer = make(loss_weights={})
    assert trainer.loss_weights == make().loss_weights
    assert trainer.loss_weights == dict.fromkeys((*trainer.loss_funcs, *trainer.regularisers), 1)
    trainer.train()
    assert trainer.losses["total_loss"] == sum(
        loss for name, loss in trainer.losses.items() if name != "total_loss") != 0


# ---- a classifier behind the embedding


@pytest.mark.parametrize("factors", [None, {"metric_loss": 0.5, "classifier_loss": 2}])
@pytest.mark.parametrize("mined", [False, True])
def test_train_with_classifier_is_the_loop(factors, mined):
    triplets = torch.tensor([[0, 4, 1], [5, 1, 7], [2, 6, 0]])

    def step(parts, data, labels, epoch):
        embeddings = parts["embedder"](parts["trunk"](data))
        chosen = triplets.tolist() if mined else triplets_of(labels.tolist())
        terms = [F.relu((embeddings[a] - embeddings[p]).square().sum()
                        - (embeddings[a] - embeddings[n]).square().sum() + 0.5)
                 for a, p, n in chosen]
        logs = parts["classifier"](embeddings).log_softmax(1)
        return {"metric_loss": sum(terms) / len(terms),
                "classifier_loss": -sum(row[label] for row, label in zip(logs, labels)) / 8}

    miners = {"tuple_miner": lambda embeddings, labels: triplets.unbind(1)} if mined else {}
    check_against_loop(lambda **changes: with_classifier(
        loss_weights=factors, mining_funcs=miners, **changes), step)


def test_train_with_classifier_without_an_embedder():
    trainer = with_classifier(models={"trunk": linear(3, 2), "classifier": linear(2, 4, seed=2)})
    before = weights(trainer.models["classifier"])
    trainer.train()
    assert not same(before, weights(trainer.models["classifier"]))


@pytest.mark.parametrize("models, loss_funcs", [
    (["trunk", "embedder"], ["metric_loss"]),
    (["trunk", "embedder", "classifier"], ["classifier_loss"])])
def test_train_with_classifier_without_a_classifier_or_a_metric_loss(models, loss_funcs):
    whole = with_classifier()
    parts = {name: whole.models[name] for name in models}
    losses = {name: whole.loss_funcs[name] for name in loss_funcs}
    kept = []
    trainer = with_classifier(
        models=copy.deepcopy(parts), loss_funcs=losses, optimizers={},
        end_of_iteration_hook=lambda trainer: kept.append(trainer.losses))
    trainer.train()
    data, labels = four_classes()[:8]
    embeddings = parts["embedder"](parts["trunk"](data))
    expected = {}
    if "metric_loss" in losses:
        expected["metric_loss"] = losses["metric_loss"](embeddings, labels)
    if "classifier" in parts:
        expected["classifier_loss"] = F.cross_entropy(parts["classifier"](embeddings), labels)
    assert kept[0].pop("total_loss") == sum(expected.values())
    assert kept[0] == expected


def test_train_with_classifier_without_any_loss():
    with pytest.raises(ValueError, match="TrainWithClassifier has no loss"):
        with_classifier(models={"trunk": linear(3, 2)}, optimizers={}, loss_funcs={})


# ---- sections of the embedding


@pytest.mark.parametrize("classifiers", [(), (1,), (0, 1)])
@pytest.mark.parametrize("mined", [(), (1,), (0, 1)])
def test_cascaded_embeddings_is_the_loop(classifiers, mined):
    tuples = [torch.tensor([[0, 4, 1], [5, 1, 7]]),
              torch.tensor([[2, 6, 0], [3, 7, 6], [1, 5, 0]])]
    sections = [slice(0, 2), slice(2, 5)]

    def step(parts, data, labels, epoch):
        embeddings, losses = parts["embedder"](parts["trunk"](data)), {}
        for i, section in enumerate(sections):
            rows = embeddings[:, section]
            chosen = tuples[i].tolist() if i in mined else triplets_of(labels.tolist())
            terms = [F.relu((rows[a] - rows[p]).square().sum() - (rows[a] - rows[n]).square().sum()
                            + 0.3 + i) for a, p, n in chosen]
            losses[f"metric_loss_{i}"] = sum(terms) / len(terms)
            if i in classifiers:
                losses[f"classifier_loss_{i}"] = F.cross_entropy(parts[f"classifier_{i}"](rows),
                                                                 labels)
        return losses

    check_against_loop(lambda **changes: cascaded(classifiers, mining_funcs={
        f"tuple_miner_{i}": lambda embeddings, labels, i=i: tuples[i].unbind(1) for i in mined
    }, **changes), step)


def test_cascaded_miners_see_their_own_section():
    shapes = {}

    def miner(i):
        def mine(embeddings, labels):
            shapes[i] = embeddings.shape
            return torch.tensor([0]), torch.tensor([4]), torch.tensor([1])
        return mine

    trainer = cascaded(sizes=(2, 3, 1), classifiers=(), mining_funcs={
        "tuple_miner_0": miner(0), "tuple_miner_2": miner(2),
        "subset_batch_miner": lambda embeddings, labels: shapes.setdefault(
            "subset", embeddings.shape) and torch.arange(7)})
    trainer.train()
    assert shapes == {"subset": (8, 6), 0: (7, 2), 2: (7, 1)}
    assert trainer.loss_funcs["metric_loss_1"].seen[0][2] is None


def test_cascaded_sections_get_the_gradients_of_their_own_loss():
    trainer = cascaded(classifiers=(), loss_weights={"metric_loss_0": 1, "metric_loss_1": 0})
    before = trainer.models["embedder"].weight.detach().clone()
    trainer.train()
    changed = (trainer.models["embedder"].weight != before).any(1)
    assert changed.tolist() == [True, True, False, False, False]


@pytest.mark.parametrize("sizes", [(2, 2), (5, 1), (5,), (1, 1, 1, 1)])
def test_sections_that_do_not_sum_to_the_embedding(sizes):
    trainer = cascaded(classifiers=(), sizes=sizes, models={
        "trunk": linear(3, 5), "embedder": linear(5, 5 if sizes != (5,) else 4, seed=1)})
    with pytest.raises(RuntimeError, match=re.escape(f"split_sizes={list(sizes)}")):
        trainer.train()


@pytest.mark.parametrize("make, lacking", [(cascaded, "classifier_loss_1"),
                                           (with_classifier, "classifier_loss"),
                                           (adversarial, "classifier_loss")])
def test_a_classifier_without_its_loss_and_the_other_way_round(make, lacking):
    whole = make()
    losses = {name: loss for name, loss in whole.loss_funcs.items() if name != lacking}
    models = {name: model for name, model in whole.models.items() if not name.startswith("class")}
    for changes in (dict(loss_funcs=losses, models=whole.models),
                    dict(models=models, loss_funcs=whole.loss_funcs)):
        with pytest.raises(ValueError, match=f"{lacking}.*missing"):
            make(**changes, optimizers={})


# ---- a generator of hard negatives

REGULARISERS = {"g_hard_loss": 1, "g_reg_loss": 1}
PHASES = [
    {"metric_loss", "classifier_loss"},
    {"g_adv_loss", "g_hard_loss", "g_reg_loss"},
    {"metric_loss", "classifier_loss", "g_adv_loss", "synth_loss", "g_hard_loss", "g_reg_loss"}]
LEARN = [{"trunk", "embedder", "classifier"}, {"generator"},
         {"trunk", "embedder", "classifier", "generator"}]


def test_adversarial_training_is_the_loop_in_all_three_phases():
    trainer = None

    def make(**changes):
        nonlocal trainer
        trainer = adversarial(loss_weights={
            "metric_loss": 1, "classifier_loss": 0.5, "g_adv_loss": 2, "synth_loss": 0.7,
            "g_reg_loss": 3, "g_hard_lss": 1.5}, **changes)
        return trainer

    def step(parts, data, labels, epoch):
        features, losses = parts["trunk"](data), {}
        if epoch != 2:
            embeddings = parts["embedder"](features)
            losses["metric_loss"] = Hinge(0.5)(embeddings, labels)
            losses["classifier_loss"] = F.cross_entropy(parts["classifier"](embeddings), labels)
        if epoch == 1:
            return losses
        terms = collections.defaultdict(list)
        for a, p, n in features[trainer.draw_triplets(labels)]:
            synthetic = parts["generator"](torch.cat([a, p, n]))
            near, far = ((parts["embedder"](a) - parts["embedder"](other)).square().sum()
                         for other in (p, synthetic))
            terms["g_adv_loss"].append(F.relu(far - near - 0.1))
            terms["synth_loss"].append(F.relu(near - far + 0.7))
            for name, other in (("g_hard_loss", a), ("g_reg_loss", n)):
                terms[name].append((synthetic / synthetic.norm() - other / other.norm())
                                   .square().mean())
        losses |= {name: sum(values) / len(values) for name, values in terms.items()
                   if epoch == 3 or name != "synth_loss"}
        return losses

    check_against_loop(make, step, epochs=3, stepped=lambda name, epoch: name in LEARN[epoch - 1])


@pytest.mark.parametrize("phases, plan", [((1, 1), [0, 1, 2, 2]), ((0, 0), [2, 2, 2, 2]),
                                          ((2, 0), [0, 0, 2, 2]), ((0, 3), [1, 1, 1, 2]),
                                          ((9, 9), [0, 0, 0, 0])])
def test_phases_say_which_losses_count_and_which_networks_learn(phases, plan):
    seen, stepped = [], set()

    def hook(trainer):
        names = trainer.models.keys()
        seen.append((set(trainer.losses) - {"total_loss"}, set(stepped),
                     {name for name in names if trainer.models[name].training},
                     {name for name in names if next(trainer.models[name].parameters()).grad
                      is not None}))
        stepped.clear()

    trainer = adversarial(phases, end_of_epoch_hook=hook)
    for name, optimizer in trainer.optimizers.items():
        optimizer.register_step_post_hook(lambda *_, name=name: stepped.add(name[:-10]))
    trainer.train(num_epochs=4)
    assert seen == [(PHASES[phase], *[LEARN[phase]] * 3) for phase in plan]
    # A run that begins in the middle is in the phase of its epoch.
    for epoch, phase in enumerate(plan, start=1):
        trainer.train(epoch, epoch)
        assert seen[-1] == (PHASES[phase], *[LEARN[phase]] * 3)


@pytest.mark.parametrize("phases", [(9, 0), (0, 9), (1, 1)])
def test_schedules_of_networks_at_rest_go_on_without_a_warning(phases):
    trainer = adversarial(phases)
    trainer.lr_schedulers = {
        f"{name.removesuffix('optimizer')}scheduler_by_epoch": torch.optim.lr_scheduler.StepLR(
            optimizer, 1, gamma=0.5) for name, optimizer in trainer.optimizers.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trainer.train(num_epochs=3)
    assert len(trainer.optimizers) == 4
    for optimizer in trainer.optimizers.values():
        assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1 / 2 ** 3)


@pytest.mark.parametrize("frozen", ["trunk", "embedder", "generator", "classifier"])
def test_what_is_frozen_stays_frozen_in_every_phase(frozen):
    modes = []
    trainer = adversarial((1, 0), freeze_these=(frozen,), end_of_iteration_hook=lambda trainer:
                          modes.append(trainer.models[frozen].training))
    before = {name: weights(model) for name, model in trainer.models.items()}
    trainer.train(num_epochs=3)
    for name, model in trainer.models.items():
        assert same(before[name], weights(model)) == (name == frozen), name
    assert not any(modes) and not any(p.requires_grad for p in part(trainer, frozen).parameters())


def test_weights_that_need_no_gradient_at_the_start_get_none_later():
    trainer = adversarial()
    trunk = torch.nn.Sequential(linear(3, 4), linear(4, 5, seed=1))
    trunk[0].requires_grad_(False)
    before = weights(trunk[0])
    trainer = adversarial(models=trainer.models | {"trunk": trunk}, optimizers={
        "trunk_optimizer": torch.optim.SGD(trunk.parameters(), 0.1, weight_decay=0.1)})
    trainer.train(num_epochs=4)
    assert same(before, weights(trunk[0])) and not trunk[0].weight.requires_grad
    assert trunk[1].weight.requires_grad


def test_batch_normalisation_of_idle_networks_stands_still():
    trunk = torch.nn.Sequential(linear(3, 5), torch.nn.BatchNorm1d(5))
    whole, counts = adversarial(), []
    trainer = adversarial((1, 2), models=whole.models | {"trunk": trunk}, optimizers={},
                          end_of_epoch_hook=lambda trainer: counts.append(
                              int(trunk[1].num_batches_tracked)))
    trainer.train(num_epochs=4)
    assert counts == [2, 2, 2, 4]
    frozen = adversarial(models=whole.models | {"trunk": trunk}, optimizers={},
                         freeze_trunk_batchnorm=True, end_of_iteration_hook=lambda trainer:
                         counts.append(trunk[1].training))
    frozen.train(num_epochs=3)
    assert not any(counts[4:]) and trunk[1].num_batches_tracked == 4


def test_the_adversarial_margin_is_negated_on_a_copy():
    original = Hinge(0.25)
    losses = adversarial().loss_funcs | {"g_adv_loss": original}
    given = dict(losses)
    for _ in range(2):  # a second trainer with the same dict: the margin is not negated twice
        trainer = adversarial(loss_funcs=losses)
        assert trainer.loss_funcs["g_adv_loss"].margin == -0.25
        trainer.train(2, 2)
    assert original.margin == 0.25 and original.seen == [] and losses == given


def test_the_adversarial_loss_of_this_project():
    loss = TripletLoss(0.25)
    trainer = adversarial((0, 1), loss_funcs={"metric_loss": loss, "g_adv_loss": loss,
                                              "synth_loss": loss}, classifier=False)
    trainer.train()
    assert loss.margin == 0.25 and trainer.losses["g_adv_loss"] > 0


@pytest.mark.parametrize("labels", [[0, 1, 0, 1], [0, 0, 0, 1], [5, 5, 7, 7, 9, 3]])
def test_every_drawn_triplet_is_valid_and_every_valid_one_is_drawn(labels):
    trainer, possible = adversarial(each=50), set(triplets_of(labels))
    drawn = [tuple(row) for row in trainer.draw_triplets(torch.tensor(labels)).tolist()]
    assert set(drawn) == possible
    counts = collections.Counter(a for a, _, _ in drawn)
    assert set(counts.values()) == {50}  # so many of each anchor that has any


def test_the_losses_of_synthetic_triplets_get_consecutive_rows():
    trainer = adversarial((0, 0), each=2)
    trainer.train()
    embeddings, labels, (a, p, n) = trainer.loss_funcs["synth_loss"].seen[0]
    swapped = trainer.loss_funcs["g_adv_loss"].seen[0][2]
    assert len(embeddings) == 3 * len(a) == 3 * 2 * 8
    assert all(torch.equal(x, y) for x, y in zip(swapped, (a, n, p)))
    assert torch.equal(torch.stack([a, p, n], 1).flatten(), torch.arange(48))
    assert torch.equal(labels[a], labels[p]) and (labels[a] != labels[n]).all()


@pytest.mark.parametrize("spelling", ["g_hard_loss", "g_hard_lss"])
def test_both_spellings_of_the_hard_losss_weight(spelling):
    factors = dict.fromkeys(("metric_loss", "classifier_loss", "g_adv_loss", "synth_loss",
                             "g_reg_loss"), 0) | {spelling: 2.5}
    given = dict(factors)
    trainer = adversarial((0, 0), loss_weights=factors)
    trainer.train()
    assert trainer.loss_weights["g_hard_loss"] == 2.5
    assert trainer.losses["total_loss"] == trainer.losses["g_hard_loss"] > 0
    assert factors == given


@pytest.mark.parametrize("lacking", ["metric_loss", "classifier_loss", "g_adv_loss", "synth_loss"])
def test_adversarial_weights_need_every_loss(lacking):
    factors = dict.fromkeys(PHASES[2] - {lacking}, 1)
    with pytest.raises(ValueError, match=f"no key '{lacking}' in loss_weights"):
        adversarial(loss_weights=factors)


@pytest.mark.parametrize("lacking", ["g_hard_loss", "g_reg_loss"])
def test_adversarial_weights_need_the_regularisers_at_construction(lacking):
    factors = dict.fromkeys(PHASES[2] - {lacking}, 1)
    with pytest.raises(ValueError, match=lacking):
        adversarial(loss_weights=factors)


def test_an_adversarial_loss_without_a_margin():
    losses = adversarial().loss_funcs | {"g_adv_loss": MeanSquare()}
    with pytest.raises(ValueError, match="g_adv_loss must be a triplet loss"):
        adversarial(loss_funcs=losses)


# ---- views of one image


def test_augmentations_are_the_loop():
    def step(parts, data, labels, epoch):
        samples = torch.stack([view for row in data for view in (row, row + 1, -row)])
        embeddings = parts["embedder"](parts["trunk"](samples))
        return {"metric_loss": Hinge(0.5)(embeddings, torch.arange(24) // 3)}

    trainer, _ = check_against_loop(views, step)
    embeddings, labels, indices_tuple = trainer.loss_funcs["metric_loss"].seen[0]
    assert embeddings.shape == (24, 2) and labels.tolist() == [i // 3 for i in range(24)]
    assert indices_tuple is None


@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize("workers", [0, 2])
def test_as_many_samples_as_items_times_transforms(count, workers):
    trainer = views(dataset=numbered(), dataloader_num_workers=workers)
    trainer = assemble(functools.partial(
        UnsupervisedEmbeddingsUsingAugmentations,
        tuple((lambda x, i=i: x + 100 * i) for i in range(count))), trainer.models,
        trainer.loss_funcs, dataset=numbered(), dataloader_num_workers=workers)
    data, labels = trainer.next_batch()
    assert labels.tolist() == [i for i in range(8) for _ in range(count)]
    expected = [row / 10 + 100 * view for row in range(8) for view in range(count)]
    assert data[:, 0].tolist() == pytest.approx(expected)


def test_data_and_label_setter_gives_what_the_getter_expects():
    class Named(Dataset):
        def __len__(self):
            return ROWS

        def __getitem__(self, i):
            return {"image": torch.full((3,), float(i)), "label": "not used"}

    trainer = assemble(functools.partial(
        UnsupervisedEmbeddingsUsingAugmentations, [lambda x: x, lambda x: -x],
        lambda batch: {"image": batch[0], "label": batch[1]}), {"trunk": linear()},
        {"metric_loss": MeanSquare()}, dataset=Named(),
        data_and_label_getter=lambda item: (item["image"], item["label"]))
    data, labels = trainer.next_batch()
    assert data[:4, 0].tolist() == [0, -0, 1, -1] and labels.tolist()[:4] == [0, 0, 1, 1]
    trainer.train()


def test_augmentations_collate_themselves():
    with pytest.raises(TypeError, match="collate_fn"):
        views(collate_fn=lambda items: items)


# ---- two streams


def stream_triplets(labels):
    """(anchor, positive, negative) with the anchor in one stream, the others in the second."""
    places = range(len(labels))
    return [(a, p, n) for a in places for p in places for n in places
            if labels[a] == labels[p] != labels[n]]


def test_two_streams_are_the_loop_over_all_triplets():
    def step(parts, first, second, labels, epoch):
        anchors, others = (parts["embedder"](parts["trunk"](rows)) for rows in (first, second))
        terms = [F.relu((anchors[a] - others[p]).square().sum()
                        - (anchors[a] - others[n]).square().sum() + 0.5)
                 for a, p, n in stream_triplets(labels.tolist())]
        return {"metric_loss": sum(terms) / len(terms)}

    trainer, _ = check_against_loop(two_streams, step)
    embeddings, labels, tuples = trainer.loss_funcs["metric_loss"].seen[0]
    assert embeddings.shape == (16, 2) and torch.equal(labels[:8], labels[8:])
    found = {tuple(row) for row in torch.stack(tuples, 1).tolist()}
    assert found == {(a, p + 8, n + 8) for a, p, n in stream_triplets(labels[:8].tolist())}


@pytest.mark.parametrize("method", ["random", "semihard", "softhard", "distance",
                                    "multisimilarity"])
def test_two_streams_with_a_sampler_of_this_project(method):
    trainer = two_streams(mining_funcs={"tuple_miner": samplers.Sampler(method)})
    torch.manual_seed(0)
    trainer.train(num_epochs=3)
    assert len(trainer.loss_funcs["metric_loss"].seen) == 6
    for _, labels, (a, p, n) in trainer.loss_funcs["metric_loss"].seen:
        assert (a < 8).all() and (p >= 8).all() and (n >= 8).all() and len(a) > 0
        assert torch.equal(labels[a], labels[p]) and (labels[a] != labels[n]).all()


@pytest.mark.parametrize("pairs", [False, True])
def test_two_streams_shift_what_a_miner_returns(pairs):
    tuples = torch.tensor([[0, 4, 1], [3, 3, 0]]).unbind(1)
    mined = (*tuples[:2], tuples[0], tuples[2]) if pairs else tuples
    calls, losses = [], []

    def miner(anchors, labels, others, other_labels):
        calls.append((anchors.detach(), labels, others.detach(), other_labels))
        return mined

    def loss(embeddings, labels, indices_tuple):
        losses.append((embeddings.detach(), indices_tuple))
        return embeddings.sum()

    two_streams(mining_funcs={"tuple_miner": miner}, loss_funcs={"metric_loss": loss}).train()
    anchors, labels, others, other_labels = calls[0]
    assert torch.equal(torch.cat([anchors, others]), losses[0][0])
    assert torch.equal(labels, other_labels) and labels is not other_labels
    moved = [[0, 3], [12, 11]] + ([[0, 3]] if pairs else []) + [[9, 8]]
    assert [vector.tolist() for vector in losses[0][1]] == moved


@pytest.mark.parametrize("columns", [3, 4])
@pytest.mark.parametrize("count", [1, 2, 3, 4, 5])
def test_two_streams_take_a_tensor_with_a_row_for_each_tuple(columns, count):
    mined = torch.randint(0, 8, (count, columns), generator=torch.Generator().manual_seed(count))
    given = []

    def loss(embeddings, labels, indices_tuple):
        given.append(indices_tuple)
        return embeddings.sum()

    two_streams(mining_funcs={"tuple_miner": lambda *arguments: mined},
                loss_funcs={"metric_loss": loss}).train()
    others = (1, 2) if columns == 3 else (1, 3)  # these columns lie in the second stream
    assert len(given) == 2
    for indices_tuple in given:
        assert [vector.tolist() for vector in indices_tuple] == [
            [row[i] + 8 * (i in others) for row in mined.tolist()] for i in range(columns)]


@pytest.mark.parametrize("dataset, count", [(four_classes(), 2), (four_classes(3), 4)])
def test_two_streams_need_a_dataset_of_three_values(dataset, count):
    with pytest.raises(ValueError, match=rf"list of {count};.*\(anchor, positive, label\)"):
        two_streams(dataset=dataset).train()


def test_two_streams_take_tuple_miners_only():
    with pytest.raises(ValueError, match="unknown key 'subset_batch_miner' in mining_funcs"):
        two_streams(mining_funcs={"subset_batch_miner": lambda embeddings, labels: [0]})


# ---- bad input of these trainers


@pytest.mark.parametrize("name, argument, keys, expected", [
    ("TrainWithClassifier", "models", ["head"], "unknown key 'head'"),
    ("TrainWithClassifier", "loss_weights", ["metric_loss"], "no key 'classifier_loss'"),
    ("TrainWithClassifier", "optimizers", ["generator_optimizer"],
     "unknown key 'generator_optimizer'"),
    ("CascadedEmbeddings", "models", ["classifier_2"], "unknown key 'classifier_2'"),
    ("CascadedEmbeddings", "models", ["classifier"], "unknown key 'classifier'"),
    ("CascadedEmbeddings", "loss_funcs", ["-metric_loss_1"], "no key 'metric_loss_1'"),
    ("CascadedEmbeddings", "loss_funcs", ["metric_loss"], "unknown key 'metric_loss'"),
    ("CascadedEmbeddings", "loss_funcs", ["metric_loss_2"], "unknown key 'metric_loss_2'"),
    ("CascadedEmbeddings", "mining_funcs", ["tuple_miner"], "unknown key 'tuple_miner'"),
    ("CascadedEmbeddings", "mining_funcs", ["tuple_miner_2"], "unknown key 'tuple_miner_2'"),
    ("CascadedEmbeddings", "optimizers", ["classifier_9_optimizer"],
     "unknown key 'classifier_9_optimizer'"),
    ("CascadedEmbeddings", "lr_schedulers", ["metric_loss_scheduler_by_epoch"],
     "unknown key 'metric_loss_scheduler_by_epoch'"),
    ("CascadedEmbeddings", "freeze_these", ["metric_loss"], "unknown key 'metric_loss'"),
    ("DeepAdversarialMetricLearning", "models", ["-generator"], "no key 'generator'"),
    ("DeepAdversarialMetricLearning", "models", ["discriminator"], "unknown key 'discriminator'"),
    ("DeepAdversarialMetricLearning", "loss_funcs", ["-synth_loss"], "no key 'synth_loss'"),
    ("DeepAdversarialMetricLearning", "loss_funcs", ["-g_adv_loss"], "no key 'g_adv_loss'"),
    ("DeepAdversarialMetricLearning", "loss_funcs", ["g_hard_loss"], "unknown key 'g_hard_loss'"),
    ("DeepAdversarialMetricLearning", "loss_weights", ["g_soft_loss"],
     "unknown key 'g_soft_loss'"),
    ("DeepAdversarialMetricLearning", "gradient_clippers", ["generator_clipper"],
     "unknown key 'generator_clipper'"),
    ("UnsupervisedEmbeddingsUsingAugmentations", "models", ["classifier"],
     "unknown key 'classifier'"),
    ("UnsupervisedEmbeddingsUsingAugmentations", "loss_funcs", ["-metric_loss"],
     "no key 'metric_loss'"),
    ("TwoStreamMetricLoss", "models", ["-trunk"], "no key 'trunk'"),
    ("TwoStreamMetricLoss", "loss_funcs", ["synth_loss"], "unknown key 'synth_loss'"),
])
def test_keys_that_these_trainers_do_not_know_or_lack(name, argument, keys, expected):
    given = getattr(EVERY_TRAINER[name](), argument)
    if argument == "loss_weights":
        given = dict.fromkeys(keys, 1)
    elif argument == "freeze_these":
        given = keys
    else:
        given = {key: value for key, value in given.items() if f"-{key}" not in keys} | {
            key: linear() for key in keys if not key.startswith("-")}
    with pytest.raises(ValueError) as error:
        EVERY_TRAINER[name](**{"optimizers": {}, argument: given})
    assert f"{name}: {expected} in {argument}; allowed are " in str(error.value)


# ---- miners that return nothing, hooks that raise

NOTHING = {
    "three tensors": (torch.empty(0, dtype=torch.long),) * 3,
    "four tensors": (torch.empty(0, dtype=torch.long),) * 4,
    "a tensor": torch.empty(0, 3, dtype=torch.long),
    "a list": [],
    "None": None,
}


def now_and_then(nothing, something, empty=(1, 2)):
    """A miner that returns nothing in some of its calls, counted from 0."""
    calls = []

    def miner(*arguments):
        calls.append(1)
        return nothing if len(calls) - 1 in empty else something

    return miner


TRIPLET = (torch.tensor([0]), torch.tensor([4]), torch.tensor([1]))
MINERS = {"MetricLossOnly": (lambda **changes: assemble(MetricLossOnly, **(dict(
              models={"trunk": linear()}, loss_funcs={"metric_loss": MeanSquare()}) | changes)),
              "tuple_miner"),
          **{name: (make, "tuple_miner") for name, make in EVERY_TRAINER.items()},
          "CascadedEmbeddings": (lambda **changes: cascaded((), (5,), **changes), "tuple_miner_0")}


@pytest.mark.parametrize("name, kind", [
    (name, kind) for name in MINERS for kind in NOTHING])
def test_a_tuple_miner_that_returns_nothing_skips_the_step(name, kind):
    make, miner = MINERS[name]
    kept, losses, clipped = [], [], []

    def hook(trainer):
        kept.append([value for _, part in trainer.parts() for value in weights(part)])
        losses.append(dict(trainer.losses))

    phases = {"phases": (9, 0)} if name.startswith("Deep") else {}
    trainer = make(mining_funcs={miner: now_and_then(NOTHING[kind], TRIPLET)},
                   end_of_iteration_hook=hook, **phases,
                   gradient_clippers={"trunk_grad_clipper": lambda: clipped.append(1)})
    trainer.train(num_epochs=2)  # two iterations each, of which the second and the third are empty
    assert trainer.skipped_steps == 2 and len(kept) == 4 and len(clipped) == 2
    assert same(kept[0], kept[1]) and same(kept[1], kept[2]) and not same(kept[2], kept[3])
    assert set(losses[0]) <= set(losses[1]) == {*trainer.loss_weights, "total_loss"}
    assert not any(losses[1].values()) and losses[0]["total_loss"] and losses[3]["total_loss"]


@pytest.mark.parametrize("name", [name for name in MINERS if name != "TwoStreamMetricLoss"])
@pytest.mark.parametrize("nothing", [torch.empty(0, dtype=torch.long), [],
                                     torch.zeros(8, dtype=torch.bool)],
                         ids=["tensor", "list", "mask"])
def test_a_subset_batch_miner_that_returns_nothing_skips_the_step(name, nothing):
    make, _ = MINERS[name]
    kept = []
    trainer = make(
        mining_funcs={"subset_batch_miner": now_and_then(
            nothing if len(nothing) != 8 or not name.startswith("Uns")
            else torch.zeros(24, dtype=torch.bool), torch.arange(8))},
        end_of_iteration_hook=lambda trainer: kept.append(
            [value for _, part in trainer.parts() for value in weights(part)]))
    trainer.train(num_epochs=2)
    assert trainer.skipped_steps == 2 and len(kept) == 4
    assert same(kept[0], kept[1]) and same(kept[1], kept[2]) and not same(kept[2], kept[3])
    assert all(model.training for model in trainer.models.values()) or "Deep" in name


@pytest.mark.parametrize("kind", NOTHING)
@pytest.mark.parametrize("resting", [0, 1])
@pytest.mark.parametrize("classifiers", [(), (0, 1)])
def test_a_section_whose_miner_returns_nothing_rests_alone(kind, resting, classifiers):
    mined, losses = torch.tensor([[0, 4, 1], [5, 1, 7]]), []
    miners = {f"tuple_miner_{resting}": now_and_then(NOTHING[kind], mined.unbind(1)),
              f"tuple_miner_{1 - resting}": lambda embeddings, labels: mined.unbind(1)}
    trainer = cascaded(classifiers, mining_funcs=miners,
                       end_of_iteration_hook=lambda trainer: losses.append(
                           {name: loss.item() for name, loss in trainer.losses.items()}))
    parts = copy.deepcopy(dict(trainer.parts()))
    optimizers = [sgd(part) for part in parts.values() if list(part.parameters())]
    trainer.train(num_epochs=2)
    assert trainer.skipped_steps == 0 and len(losses) == 4

    batches = list(DataLoader(four_classes(), 8)) * 2
    for step, (data, labels) in enumerate(batches):  # the second and the third are empty
        embeddings, values = parts["embedder"](parts["trunk"](data)), {}
        for i, rows in enumerate((embeddings[:, :2], embeddings[:, 2:])):
            terms = [F.relu((rows[a] - rows[p]).square().sum() - (rows[a] - rows[n]).square().sum()
                            + 0.3 + i) for a, p, n in mined.tolist()]
            rests = i == resting and step in (1, 2)
            values[f"metric_loss_{i}"] = torch.zeros(()) if rests else sum(terms) / len(terms)
            if i in classifiers:
                values[f"classifier_loss_{i}"] = F.cross_entropy(parts[f"classifier_{i}"](rows),
                                                                 labels)
        values["total_loss"] = sum(values.values())
        for optimizer in optimizers:
            optimizer.zero_grad()
        values["total_loss"].backward()
        for optimizer in optimizers:
            optimizer.step()
        expected = {name: value.item() for name, value in values.items()}
        assert losses[step] == pytest.approx(expected, abs=1e-6)
    for name, part in trainer.parts():
        torch.testing.assert_close(weights(part), weights(parts[name]), rtol=0, atol=1e-6)


def test_the_weights_of_a_resting_sections_loss_rest_too():
    losses = {"metric_loss_0": Hinge(5), "metric_loss_1": MeanSquare()}
    optimizer = torch.optim.Adam(losses["metric_loss_1"].parameters(), 0.1, weight_decay=0.5)
    scales = []
    trainer = cascaded((), loss_funcs=losses,
                       optimizers={"metric_loss_1_optimizer": optimizer},
                       mining_funcs={"tuple_miner_1": now_and_then([], TRIPLET)},
                       end_of_iteration_hook=lambda trainer: scales.append(
                           losses["metric_loss_1"].scale.item()))
    trainer.train(num_epochs=2)
    assert scales[0] == scales[1] == scales[2] != scales[3]
    assert {int(state["step"]) for state in optimizer.state.values()} == {2}


@pytest.mark.parametrize("classifiers", [(), (0, 1)])
def test_a_step_is_skipped_where_all_sections_rest(classifiers):
    kept, losses = [], []

    def hook(trainer):
        kept.append([value for _, part in trainer.parts() for value in weights(part)])
        losses.append(trainer.losses)

    trainer = cascaded(classifiers, end_of_iteration_hook=hook, mining_funcs={
        "tuple_miner_0": now_and_then(None, TRIPLET, empty=(1, 2)),
        "tuple_miner_1": now_and_then([], TRIPLET, empty=(2, 3))})
    trainer.train(num_epochs=2)
    assert trainer.skipped_steps == 1
    assert [same(a, b) for a, b in zip(kept, kept[1:])] == [False, True, False]
    assert not any(losses[2].values()) and set(losses[2]) == set(losses[0])


def test_momentum_and_decay_rest_in_a_skipped_step():
    trunk = linear()
    optimizer = torch.optim.Adam(trunk.parameters(), 0.1, weight_decay=0.5)
    trainer = assemble(MetricLossOnly, {"trunk": trunk}, {"metric_loss": Hinge(5)},
                       optimizers={"trunk_optimizer": optimizer},
                       mining_funcs={"tuple_miner": now_and_then([], TRIPLET)})
    trainer.train(num_epochs=2)
    assert {int(state["step"]) for state in optimizer.state.values()} == {2}


@pytest.mark.parametrize("make, batch", [(adversarial, 8), (two_streams, 8)])
def test_a_batch_of_one_class_has_no_triplets_and_is_skipped(make, batch):
    streams = 2 if make is two_streams else 1
    one_class = TensorDataset(*torch.randn(streams, ROWS, 3), torch.zeros(ROWS, dtype=torch.long))
    options = {"phases": (0, 9)} if make is adversarial else {}
    trainer = make(dataset=one_class, **options)
    trainer.train()
    assert trainer.skipped_steps == 2 and trainer.losses["total_loss"] == 0


@pytest.mark.parametrize("name, workers", [
    *((name, 0) for name in MINERS), ("MetricLossOnly", 2),
    ("UnsupervisedEmbeddingsUsingAugmentations", 2)])
@pytest.mark.parametrize("which", ["end_of_iteration_hook", "end_of_epoch_hook"])
def test_a_hook_that_raises_leaves_the_trainer_usable(name, which, workers):
    make, _ = MINERS[name]

    def hook(trainer):
        if trainer.epoch == 2:
            trainer.set_to_eval()
            raise RuntimeError("from the hook")

    broken = make(dataloader_num_workers=workers, **{which: hook})
    torch.manual_seed(1)
    with pytest.raises(RuntimeError, match="from the hook"):
        broken.train(num_epochs=3)
    setattr(broken, which, lambda trainer: None)
    before = copy.deepcopy(dict(broken.parts()))
    torch.manual_seed(2)
    broken.train(3, 4)
    assert broken.epoch == 4 and all(model.training for model in broken.models.values())

    fresh = make(dataloader_num_workers=workers)  # goes on from the same weights
    for key, part in fresh.parts():
        part.load_state_dict(before[key].state_dict())
    torch.manual_seed(2)
    fresh.train(3, 4)
    for key, part in fresh.parts():
        assert same(weights(part), weights(broken.models.get(key) or broken.loss_funcs[key]))


# ---- saving and going on

MAKE = EVERY_TRAINER | {"MetricLossOnly": MINERS["MetricLossOnly"][0]}


def scheduled(make):
    """A trainer with Adam, a schedule by epoch and, for the trunk, one by plateau."""
    trainer = make(end_of_epoch_hook=lambda trainer: trainer.step_lr_plateau_schedulers(
        -trainer.epoch))
    schedulers = torch.optim.lr_scheduler
    trainer.optimizers = {f"{name}_optimizer": torch.optim.Adam(part.parameters(), 0.01)
                          for name, part in trainer.parts() if list(part.parameters())}
    trainer.lr_schedulers = {
        f"{name.removesuffix('optimizer')}scheduler_by_epoch": schedulers.ExponentialLR(
            optimizer, 0.9) for name, optimizer in trainer.optimizers.items()}
    trainer.lr_schedulers["trunk_scheduler_by_plateau"] = schedulers.ReduceLROnPlateau(
        trainer.optimizers["trunk_optimizer"], "max", 0.5, patience=1)
    return trainer


@pytest.mark.parametrize("name", MAKE)
def test_a_trainer_goes_on_from_a_file_as_if_it_had_never_stopped(name, tmp_path):
    whole = scheduled(MAKE[name])
    torch.manual_seed(1)
    whole.train(1, 2)
    auxiliaries.save_checkpoint(tmp_path / "state", whole.state_dict())
    torch.manual_seed(2)
    whole.train(3, 4)

    fresh = scheduled(MAKE[name])
    with torch.no_grad():
        for _, part in fresh.parts():
            for weight in part.parameters():
                weight.add_(torch.randn_like(weight))
    keys = ["epoch", "iteration", "place", "skipped_steps", "grad_scaler", "models", "loss_funcs",
            "optimizers", "lr_schedulers"]
    state = auxiliaries.load_checkpoint(tmp_path / "state", keys)  # weights only, no code
    assert list(state) == keys
    fresh.load_state_dict(state)
    assert fresh.epoch == 2
    torch.manual_seed(2)
    fresh.train(fresh.epoch + 1, 4)
    assert fresh.losses == whole.losses
    for name, part in whole.parts():
        assert same(weights(part), weights(dict(fresh.parts())[name]))
    rates = [[optimizer.param_groups[0]["lr"] for optimizer in trainer.optimizers.values()]
             for trainer in (whole, fresh)]
    # every epoch times 0.9; the metric falls from epoch 2 on, so epoch 3 halves the trunk's rate
    assert rates[0] == rates[1]
    assert rates[0][0] == pytest.approx(0.01 * 0.9 ** 4 / 2) and rates[0][0] < rates[0][1]


def test_the_state_is_that_of_every_part_that_has_one():
    trainer = all_parts()
    trainer.train(num_epochs=2)
    state = trainer.state_dict()
    assert state["epoch"] == 2 and state["lr_schedulers"] == {}
    assert list(state["models"]) == ["trunk", "embedder"]
    assert list(state["loss_funcs"]) == ["metric_loss"]
    assert state["loss_funcs"]["metric_loss"]["scale"] == trainer.loss_funcs["metric_loss"].scale
    assert list(state["optimizers"]) == list(trainer.optimizers)
    plain = make_trainer(loss_funcs={"metric_loss": lambda embeddings, *_: embeddings.sum()})
    assert plain.state_dict()["loss_funcs"] == {}
    plain.load_state_dict(plain.state_dict())
    assert plain.epoch == 0


@pytest.mark.parametrize("group, name, foreign", [
    ("models", "trunk", linear(3, 7).state_dict()),
    ("models", "embedder", {}),
    ("models", "embedder", linear(2, 2).state_dict() | {"third": torch.zeros(1)}),
    ("loss_funcs", "metric_loss", linear().state_dict()),
    ("optimizers", "embedder_optimizer", {"state": {}, "param_groups": []}),
    ("optimizers", "trunk_optimizer", sgd(torch.nn.Sequential(linear(), linear())).state_dict()),
    ("models", "trunk", None), ("optimizers", "metric_loss_optimizer", None),
    ("lr_schedulers", "trunk_scheduler_by_epoch", None)])
def test_a_foreign_state_is_refused(group, name, foreign):
    trainer = all_parts()
    trainer.lr_schedulers["trunk_scheduler_by_epoch"] = torch.optim.lr_scheduler.StepLR(
        trainer.optimizers["trunk_optimizer"], 1)
    state = trainer.state_dict()
    trainer.load_state_dict(state)
    if foreign is None:  # the part is not in the state
        del state[group][name]
    else:
        state[group][name] = foreign
    words = (f"the saved {group} are (?!.*{name}.*, the trainer's).*{name}" if foreign is None
             else None)
    with pytest.raises((ValueError, RuntimeError), match=words):
        trainer.load_state_dict(state)


def test_hooks_can_tell_the_last_epoch():
    lasts = []
    trainer = make_trainer(end_of_epoch_hook=lambda trainer: lasts.append(trainer.last_epoch))
    assert trainer.last_epoch == 0
    trainer.train(num_epochs=2)
    trainer.train(3, 5)
    assert lasts == [2, 2, 5, 5, 5]


# ---- validation


def measuring(values, **options):
    """A Validation that measures the given values in turn, as its first metric."""
    values = iter(values)
    return Validation(lambda trainer: {"recall@1": next(values), "nmi": 0.5}, **options)


def stand_in(epoch=0, last_epoch=0):
    """As much of a trainer as a Validation needs."""
    return SimpleNamespace(epoch=epoch, last_epoch=last_epoch, idle=(), set_to_eval=lambda: None,
                           step_lr_plateau_schedulers=lambda value: None)


@pytest.mark.parametrize("every", [1, 2, 3, 7])
@pytest.mark.parametrize("first, last", [(1, 1), (1, 6), (1, 7), (4, 9), (3, 2)])
def test_validation_measures_every_so_many_epochs_and_after_the_last(every, first, last):
    validation = measuring([0.5] * 9, every=every)
    trainer = make_trainer(end_of_epoch_hook=validation, iterations_per_epoch=1)
    trainer.train(first, last)
    expected = [epoch for epoch in range(first, last + 1) if epoch % every == 0 or epoch == last]
    assert [row["epoch"] for row in validation.rows] == expected
    assert trainer.epoch == (last if first <= last else 0)


def test_validation_of_a_run_that_is_taken_further():
    validation = measuring([0.1] * 9, every=3)
    trainer = make_trainer(end_of_epoch_hook=validation, iterations_per_epoch=1)
    trainer.train(1, 4)
    trainer.train(5, 8)
    assert [row["epoch"] for row in validation.rows] == [3, 4, 6, 8]


def test_validation_finds_eval_mode_and_no_gradients_and_train_mode_comes_back():
    trunk = torch.nn.Sequential(linear(3, 4), torch.nn.BatchNorm1d(4), torch.nn.Dropout(0.5),
                                linear(4, 2))
    embedder, modes = linear(2, 2), []

    class Loss(MeanSquare):
        def forward(self, embeddings, labels, indices_tuple=None):
            modes.append([torch.is_grad_enabled(), *(module.training for module in
                                                     (trunk, trunk[1], trunk[2], embedder, self))])
            return super().forward(embeddings, labels)

    def measure(trainer):
        modes.append([torch.is_grad_enabled(),
                      *(module.training for _, part in trainer.parts() for module in
                        part.modules())])
        embeddings = trainer.compute_embeddings(trainer.dataset[:4][0])
        assert not embeddings.requires_grad
        torch.testing.assert_close(embeddings, trainer.compute_embeddings(
            trainer.dataset[:4][0]))  # no dropout
        return {"nmi": 0.5}

    trainer = make_trainer(models={"trunk": trunk, "embedder": embedder},
                           optimizers={"trunk_optimizer": sgd(trunk)}, iterations_per_epoch=1,
                           loss_funcs={"metric_loss": Loss()}, freeze_these=("embedder",),
                           end_of_epoch_hook=Validation(measure))
    trainer.train(num_epochs=3)
    training = [True, True, True, True, False, True]  # the embedder is frozen
    assert modes == [training, [False] * 8] * 3
    assert torch.is_grad_enabled()


def test_validation_does_not_change_the_training():
    results = []
    for hook in (None, Validation(lambda trainer: {
            "mean": trainer.compute_embeddings(trainer.dataset[:][0]).mean().item()})):
        trunk = torch.nn.Sequential(linear(3, 4), torch.nn.BatchNorm1d(4), torch.nn.Dropout(0.5))
        trainer = make_trainer(models={"trunk": trunk}, sampler=None, end_of_epoch_hook=hook,
                               optimizers={"trunk_optimizer": sgd(trunk)})
        torch.manual_seed(3)
        trainer.train(num_epochs=3)
        results.append((seen(trainer), weights(trunk), list(trunk.buffers())))
    assert results[0][0] == results[1][0]
    assert same(results[0][1], results[1][1]) and same(results[0][2], results[1][2])


@pytest.mark.parametrize("metric, name, epoch", [
    (None, "recall@1", 2), ("recall@1", "recall@1", 2), ("nmi", "nmi", 3)])
def test_validation_keeps_rows_and_knows_the_metric_that_counts(metric, name, epoch):
    measured = [{"recall@1": 0.1, "nmi": 0.4}, {"recall@1": 0.9, "nmi": 0.2},
                {"recall@1": 0.3, "nmi": 0.6}]
    given = iter(measured)
    validation = Validation(lambda trainer: next(given), metric)
    make_trainer(end_of_epoch_hook=validation).train(num_epochs=3)
    assert validation.rows == [{"epoch": i, **metrics} for i, metrics in enumerate(measured, 1)]
    assert validation.name() == name and validation.best()["epoch"] == epoch


@pytest.mark.parametrize("values, best", [
    ({1: 0.3}, 1), ({1: 0.3, 2: 0.5, 3: 0.4}, 2), ({1: 0.1, 2: 0.5, 3: 0.5}, 2),
    ({2: 0.5, 4: 0.5, 5: 0.5}, 2), ({1: -3, 2: -2, 3: -5}, 2), ({1: 0, 2: 0}, 1),
    ({0: 0.9}, 0), ({0: 0.9, 1: 0.1}, 1), ({0: 0.9, 1: 0.1, 2: 0.2, 3: 0.2}, 2),
    ({0: 0.2, 3: 0.2}, 3)], ids=str)
def test_the_best_row_is_the_first_of_equals_and_epoch_0_only_alone(values, best):
    validation = measuring([])
    validation.rows = [{"epoch": epoch, "recall@1": value} for epoch, value in values.items()]
    assert validation.best() == {"epoch": best, "recall@1": values[best]}


def end_by_hand(values, patience):
    """The number of values after which so many in a row were no gain; None if they never are."""
    best, waited = float("-inf"), 0
    for count, value in enumerate(values, 1):
        best, waited = (value, 0) if value > best else (best, waited + 1)
        if waited == patience:
            return count
    return None


@pytest.mark.parametrize("untrained", [False, True])
@pytest.mark.parametrize("patience", [None, 1, 2, 3, 5])
def test_patience_ends_exactly_on_time(patience, untrained):
    generator = random.Random(patience or 0)
    early = 0
    for _ in range(300):
        values = [generator.randrange(6) for _ in range(12)]
        end = end_by_hand(values, patience)
        validation = measuring(([9] if untrained else []) + values, patience=patience)
        if untrained:  # however good the untrained network is, it does not count
            assert validation(stand_in()) is None and not validation.is_over()
        cut = generator.randrange(1, 13)
        for epoch in range(1, (end or 12) + 1):
            if epoch == cut:  # a run that goes on with the rows of another decides the same
                rows = validation.rows
                validation = measuring(values[epoch - 1:], patience=patience)
                validation.rows = rows
            returned = False if epoch == end else None
            assert validation(stand_in(epoch, 12)) is returned, (values, epoch)
            assert validation.is_over() == (epoch == end)
        early += end is not None
    assert (early > 0) == (patience is not None)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("every, patience", [(1, 2), (2, 1), (3, 2)])
def test_patience_ends_the_training(seed, every, patience):
    generator = random.Random(seed)
    epochs = [epoch for epoch in range(1, 21) if epoch % every == 0 or epoch == 20]
    values = [generator.random() for _ in epochs]
    last = epochs[(end_by_hand(values, patience) or len(epochs)) - 1]
    validation = measuring(values, every=every, patience=patience)
    trainer = make_trainer(end_of_epoch_hook=validation, iterations_per_epoch=1)
    trainer.train(num_epochs=20)
    assert trainer.epoch == last == validation.rows[-1]["epoch"]
    assert len(seen(trainer)) == last


def test_validation_steps_plateau_schedulers_once_with_the_metric_that_counts():
    schedulers = {f"trunk_scheduler_by_{when}": Steps() for when in ("epoch", "plateau")}
    values = [0.7, 0.2, 0.4, 0.3]
    validation = measuring(values, every=2)
    trainer = make_trainer(lr_schedulers=schedulers, end_of_epoch_hook=validation)
    validation(trainer)  # epoch 0, the untrained network: nothing has been learned yet
    assert [row["epoch"] for row in validation.rows] == [0]
    assert schedulers["trunk_scheduler_by_plateau"].values == []
    trainer.train(num_epochs=5)
    # The last epoch is measured, but off the schedule: it is not for the schedulers.
    assert [row["epoch"] for row in validation.rows] == [0, 2, 4, 5]
    assert schedulers["trunk_scheduler_by_plateau"].values == [(value,) for value in values[1:3]]
    assert schedulers["trunk_scheduler_by_epoch"].values == [()] * 5


def test_a_plateau_of_the_metric_lowers_the_rate():
    trunk, rates = linear(), []
    optimizer = sgd(trunk)
    validation = measuring([0.5, 0.6, 0.6, 0.7, 0.1])
    trainer = make_trainer(
        models={"trunk": trunk}, optimizers={"trunk_optimizer": optimizer},
        lr_schedulers={"trunk_scheduler_by_plateau": torch.optim.lr_scheduler.ReduceLROnPlateau(
            optimizer, "max", 0.1, patience=0)},
        end_of_epoch_hook=in_turn(validation, lambda trainer: rates.append(
            optimizer.param_groups[0]["lr"])))
    trainer.train(num_epochs=5)
    assert rates == pytest.approx([0.1, 0.1, 0.01, 0.01, 0.001])


def test_the_checkpoint_holds_the_best_epoch_and_training_goes_on_from_there(tmp_path):
    kept, path, values = [], tmp_path / "best", [0.2, 0.7, 0.7, 0.3]

    def make(values, **options):
        trainer = scheduled(MAKE["MetricLossOnly"])
        trainer.end_of_epoch_hook = in_turn(
            measuring(values, **options),
            lambda trainer: kept.append(copy.deepcopy(trainer.state_dict())))
        return trainer

    torch.manual_seed(0)
    make(values, checkpoint=path).train(num_epochs=4)
    state = torch.load(path, weights_only=True)
    assert state["epoch"] == 2
    assert state["lr_schedulers"]["trunk_scheduler_by_plateau"]["best"] == 0.7  # stepped already
    fresh = make(values[2:])
    fresh.load_state_dict(state)
    assert same(weights(fresh.models["trunk"]), kept[1]["models"]["trunk"].values())
    assert not same(weights(fresh.models["trunk"]), kept[2]["models"]["trunk"].values())
    fresh.train(fresh.epoch + 1, 4)
    assert [state["epoch"] for state in kept] == [1, 2, 3, 4, 3, 4]
    for first, second in zip(kept[2:4], kept[4:]):
        assert same(first["models"]["trunk"].values(), second["models"]["trunk"].values())
        assert first["optimizers"]["trunk_optimizer"]["param_groups"] == (
            second["optimizers"]["trunk_optimizer"]["param_groups"])
    assert [file.name for file in tmp_path.iterdir()] == ["best"]


@pytest.mark.parametrize("untrained", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_at_any_time_the_checkpoint_is_that_of_the_best_epoch_so_far(seed, untrained, tmp_path):
    generator, path = random.Random(seed), tmp_path / "best"
    values = [generator.randrange(5) for _ in range(9)]
    epochs = range(0 if untrained else 1, 9)
    validation = measuring(values, checkpoint=path,
                           state=lambda trainer: {"epoch": trainer.epoch, "mine": "kept"})
    for count, epoch in enumerate(epochs, 1):
        validation(stand_in(epoch))
        so_far = list(zip(epochs, values[:count]))
        best = max(so_far[untrained:] or so_far, key=lambda pair: (pair[1], -pair[0]))[0]
        saved = torch.load(path, weights_only=True)
        rows = saved.pop("validation_rows")
        assert saved == {"epoch": best, "mine": "kept"}
        assert [row["epoch"] for row in rows] == list(epochs[:epochs.index(best) + 1])


def test_without_a_checkpoint_no_state_is_taken(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    validation = measuring([0.1, 0.2], state=None)
    make_trainer(end_of_epoch_hook=validation).train(num_epochs=2)
    assert len(validation.rows) == 2 and not list(tmp_path.iterdir())


def test_a_measure_that_raises_leaves_the_last_checkpoint(tmp_path):
    path, contents = tmp_path / "best", []

    def measure(trainer):
        if trainer.epoch == 3:
            raise RuntimeError("from measure")
        return {"nmi": trainer.epoch}

    validation = Validation(measure, checkpoint=path)
    trainer = make_trainer(end_of_epoch_hook=in_turn(
        validation, lambda trainer: contents.append(path.read_bytes())))
    with pytest.raises(RuntimeError, match="from measure"):
        trainer.train(num_epochs=4)
    assert path.read_bytes() == contents[1] != contents[0]
    assert torch.load(path, weights_only=True)["epoch"] == 2
    assert [row["epoch"] for row in validation.rows] == [1, 2] and torch.is_grad_enabled()
    assert [file.name for file in tmp_path.iterdir()] == ["best"]


@pytest.mark.parametrize("metrics, metric, words", [
    ({"nmi": 0.5, "f1": 0.2}, "recall@1", "must give recall@1; .* gives nmi, f1$"),
    ({}, "nmi", "must give nmi")])
def test_a_metric_that_is_not_measured(metrics, metric, words, tmp_path):
    validation = Validation(lambda trainer: metrics, metric, checkpoint=tmp_path / "best")
    with pytest.raises(ValueError, match=words):
        make_trainer(end_of_epoch_hook=validation).train()
    assert validation.rows == [] and not list(tmp_path.iterdir())


# ---- several hooks, TensorBoard


@pytest.mark.parametrize("values, returned", [
    ([], None), ([None, None], None), ([False], False), ([None, False, None], False),
    ([False, None], False), ([0, np.False_, "", torch.tensor(False)], None), ([True, 0], None),
    ([False, False], False)])
def test_hooks_in_turn_are_all_called_and_end_training_if_one_does(values, returned):
    calls = []

    def hook(i):
        def call(trainer):
            calls.append((i, trainer))
            return values[i]
        return call

    assert in_turn(*map(hook, range(len(values))))("trainer") is returned
    assert calls == [(i, "trainer") for i in range(len(values))]


def test_hooks_in_turn_of_a_trainer():
    calls = []
    both = in_turn(lambda trainer: trainer.epoch < 2, lambda trainer: calls.append(trainer.epoch))
    make_trainer(end_of_epoch_hook=both).train(num_epochs=5)
    assert calls == [1, 2]


class Writer:
    """Stands in for torch's SummaryWriter: keeps what is written."""

    def __init__(self, folder):
        self.folder, self.scalars, self.flushed = folder, [], 0

    def add_scalar(self, tag, value, step):
        self.scalars.append((tag, value, step))

    def flush(self):
        self.flushed = len(self.scalars)


@pytest.fixture
def writer(monkeypatch):
    """torch.utils.tensorboard with the stand-in, whether tensorboard is installed or not."""
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard",
                        SimpleNamespace(SummaryWriter=Writer))


def logged(folder, trainer, validation=None, **train):
    """Trains with a TensorBoardLog -> (the log, the losses of each iteration by name)."""
    log, losses = TensorBoardLog(folder, validation.rows if validation else ()), []
    trainer.end_of_iteration_hook = in_turn(
        log.after_iteration, lambda trainer: losses.append(
            {name: loss.item() for name, loss in trainer.losses.items()}))
    trainer.end_of_epoch_hook = in_turn(*[validation] * bool(validation), log.after_epoch)
    trainer.train(**train)
    return log, losses


@pytest.mark.usefixtures("writer")
def test_tensorboard_gets_losses_by_iteration_and_the_rest_by_epoch():
    trainer = all_parts()
    trainer.lr_schedulers["embedder_scheduler_by_epoch"] = torch.optim.lr_scheduler.StepLR(
        trainer.optimizers["embedder_optimizer"], 1, gamma=0.5)
    log, losses = logged("a folder", trainer, measuring([0.25, 0.75], every=2), num_epochs=4)
    expected = []
    for epoch in (1, 2, 3, 4):
        first = (epoch - 1) * BATCHES
        expected += [(f"loss/{name}", value, i) for i in range(first, first + BATCHES)
                     for name, value in losses[i].items()]
        expected += [(f"learning_rate/{name}", rate, epoch) for name, rate in
                     (("trunk", 0.1), ("embedder", 0.1 / 2 ** epoch), ("metric_loss", 0.1))]
        if epoch in (2, 4):
            expected += [("metric/recall@1", 0.25 if epoch == 2 else 0.75, epoch),
                         ("metric/nmi", 0.5, epoch)]
    assert log.writer.folder == "a folder" and len(losses) == 4 * BATCHES
    assert log.writer.scalars == expected
    assert {type(value) for _, value, _ in log.writer.scalars} == {float}
    assert set(losses[0]) == {"metric_loss", "total_loss"}


@pytest.mark.usefixtures("writer")
def test_tensorboard_is_written_once_an_epoch():
    log, counts = TensorBoardLog("a folder"), []
    trainer = make_trainer(
        end_of_iteration_hook=in_turn(log.after_iteration, lambda trainer: counts.append(
            len(log.writer.scalars))),
        end_of_epoch_hook=in_turn(log.after_epoch, lambda trainer: counts.append(
            (len(log.writer.scalars), log.writer.flushed))))
    trainer.train(num_epochs=2)
    epoch = 2 * BATCHES + 1  # two losses an iteration, one learning rate
    assert counts == [0] * 4 + [(epoch, epoch)] + [epoch] * 4 + [(2 * epoch, 2 * epoch)]


@pytest.mark.usefixtures("writer")
def test_tensorboard_before_training_and_of_skipped_steps():
    validation = measuring([0.5, 0.75])
    log = TensorBoardLog("a folder", validation.rows)
    trainer = make_trainer(mining_funcs={"tuple_miner": now_and_then([], None, range(9))},
                           end_of_iteration_hook=log.after_iteration,
                           end_of_epoch_hook=in_turn(validation, log.after_epoch))
    log.after_epoch(trainer)  # nothing has been measured
    trainer.end_of_epoch_hook(trainer)
    before = [("learning_rate/trunk", 0.1, 0)] * 2
    assert log.writer.scalars == [*before, ("metric/recall@1", 0.5, 0), ("metric/nmi", 0.5, 0)]
    trainer.train()
    assert log.writer.scalars[4:] == [
        *((f"loss/{name}", 0.0, i) for i in range(BATCHES) for name in ("metric_loss",
                                                                        "total_loss")),
        ("learning_rate/trunk", 0.1, 1), ("metric/recall@1", 0.75, 1), ("metric/nmi", 0.5, 1)]


@pytest.mark.parametrize("missing", ["tensorboard", "torch.utils.tensorboard"])
def test_tensorboard_that_is_not_installed_is_named(missing, monkeypatch, tmp_path):
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    monkeypatch.setitem(sys.modules, missing, None)  # imports as if it were not there
    with pytest.raises(ValueError, match="pip install tensorboard"):
        TensorBoardLog(tmp_path / "log")
    assert not list(tmp_path.iterdir())


def test_what_tensorboard_reads_is_what_happened(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    _, losses = logged(str(tmp_path), make_trainer(), measuring([0.25, 0.75]), num_epochs=2)
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    expected = {
        "loss/metric_loss": [(i, values["metric_loss"]) for i, values in enumerate(losses)],
        "loss/total_loss": [(i, values["total_loss"]) for i, values in enumerate(losses)],
        "learning_rate/trunk": [(1, 0.1), (2, 0.1)],
        "metric/recall@1": [(1, 0.25), (2, 0.75)], "metric/nmi": [(1, 0.5), (2, 0.5)]}
    assert set(events.Tags()["scalars"]) == set(expected)
    for tag, points in expected.items():
        read = [(event.step, event.value) for event in events.Scalars(tag)]
        assert read == [(step, pytest.approx(value, rel=1e-6)) for step, value in points], tag


def test_a_first_metric_that_is_not_a_number_is_not_the_best(tmp_path):
    values = iter([float("nan"), 0.5, 0.9, float("nan")])
    validation = Validation(lambda trainer: {"nmi": next(values)}, patience=2,
                            checkpoint=tmp_path / "best")
    make_trainer(end_of_epoch_hook=validation).train(num_epochs=4)
    assert len(validation.rows) == 4 and validation.best()["nmi"] == 0.9
    assert torch.load(tmp_path / "best", weights_only=True)["epoch"] == 3


def test_a_second_training_does_not_write_over_a_better_checkpoint(tmp_path):
    values = iter([0.1, 0.9, 0.1, 0.2])
    saved = []
    validation = Validation(lambda trainer: {"nmi": next(values)}, checkpoint=tmp_path / "best",
                            state=lambda trainer: saved.append(len(validation.rows)) or {})
    trainer = make_trainer(end_of_epoch_hook=validation)
    trainer.train(num_epochs=2)
    trainer.train(num_epochs=2)
    assert saved == [1, 2]


def test_validation_saves_what_a_subclass_says_its_state_is(tmp_path):
    class Counting(MetricLossOnly):
        def state_dict(self):
            return super().state_dict() | {"counted": 7}

    validation = Validation(lambda trainer: {"nmi": 1.0}, checkpoint=tmp_path / "best")
    make_trainer(Counting, end_of_epoch_hook=validation).train()
    assert torch.load(tmp_path / "best", weights_only=True)["counted"] == 7


def test_schedulers_do_not_repeat_the_warnings_of_others():
    class Warning(MeanSquare):
        def forward(self, *arguments):
            warnings.warn("once is enough")
            return super().forward(*arguments)

    trainer = make_trainer(loss_funcs={"metric_loss": Warning()})
    trainer.lr_schedulers["trunk_scheduler_by_iteration"] = torch.optim.lr_scheduler.StepLR(
        trainer.optimizers["trunk_optimizer"], 1)
    with warnings.catch_warnings(record=True) as heard:
        warnings.resetwarnings()
        warnings.simplefilter("default")
        trainer.train(num_epochs=3)
    assert 1 <= len([w for w in heard if "once is enough" in str(w.message)]) <= 2


def test_a_subset_batch_miner_that_returns_none_skips_the_step():
    trainer = make_trainer(mining_funcs={"subset_batch_miner": now_and_then(None, [0, 1])})
    trainer.train(num_epochs=2)
    assert trainer.skipped_steps == 2


def test_a_resting_section_is_zero_in_half_precision():
    huge = torch.nn.Linear(3, 5)
    huge.weight.data.fill_(6e4)
    trainer = assemble(functools.partial(CascadedEmbeddings, (2, 3)), {"trunk": huge},
                       {"metric_loss_0": MeanSquare(), "metric_loss_1": MeanSquare()},
                       mining_funcs={"tuple_miner_1": lambda *_: None})
    losses = trainer.calculate_loss(torch.full((8, 3), 3e38), torch.arange(8) % 4)
    assert losses["metric_loss_1"] == 0 and losses["metric_loss_1"].requires_grad


@pytest.mark.parametrize("tuples", [np.array([[0, 1, 2], [3, 0, 1]]), ([0, 3], [1, 0], [2, 1])])
def test_what_a_two_stream_miner_may_return(tuples):
    seen = []

    class Recording(MeanSquare):
        def forward(self, embeddings, labels, indices_tuple):
            seen.append([part.tolist() for part in indices_tuple])
            return super().forward(embeddings, labels, indices_tuple)

    trainer = two_streams(loss_funcs={"metric_loss": Recording()}, iterations_per_epoch=1,
                          mining_funcs={"tuple_miner": lambda *_: tuples})
    trainer.train()
    assert seen == [[[0, 3], [1 + 8, 0 + 8], [2 + 8, 1 + 8]]]


def test_an_augmenting_trainer_with_loading_processes_ends_at_once():
    trainer = views(dataloader_num_workers=1)
    trainer.train()
    gone = weakref.ref(trainer)
    del trainer
    assert gone() is None  # no cycle that waits for the garbage collector


def test_a_last_epoch_off_the_schedule_does_not_count_for_patience():
    values = [0.5, 0.4, 0.3, 0.2, 0.1]
    broken = measuring(values[:2], every=2, patience=2)
    make_trainer(end_of_epoch_hook=broken).train(num_epochs=3)
    assert [row["epoch"] for row in broken.rows] == [2, 3] and not broken.is_over()
    on = measuring(values[2:], every=2, patience=2, rows=broken.rows)
    trainer = make_trainer(end_of_epoch_hook=on)
    trainer.train(4, 20)
    assert [row["epoch"] for row in on.rows] == [2, 3, 4, 6] and trainer.epoch == 6


def test_rows_of_a_checkpoint_keep_it_from_being_written_over(tmp_path):
    first = measuring([0.9], checkpoint=tmp_path / "best")
    make_trainer(end_of_epoch_hook=first).train()
    rows = torch.load(tmp_path / "best", weights_only=True)["validation_rows"]
    on = measuring([0.1], checkpoint=tmp_path / "best", rows=rows)
    make_trainer(end_of_epoch_hook=on).train(2, 2)
    assert torch.load(tmp_path / "best", weights_only=True)["epoch"] == 1
    assert len(on.rows) == 2 and len(rows) == 1


def test_epochs_in_which_the_trunk_rests_are_not_measured():
    validation = measuring([0.1, 0.1, 0.2, 0.3], patience=2)
    trainer = adversarial((1, 3), end_of_epoch_hook=validation)
    trainer.train(num_epochs=6)
    assert [row["epoch"] for row in validation.rows] == [1, 5, 6]


class Handed:
    """A miner that keeps to the tuples that it is handed, and halves them."""

    def __init__(self, names, name):
        self.names, self.name, self.handed = names, name, None

    def set_idx_externally(self, tuples, labels):
        self.handed = tuples

    def reset_idx(self):
        self.names.append((self.name, self.handed is not None))
        self.handed = None

    def __call__(self, embeddings, labels):
        tuples = triplets_of(labels) if self.handed is None else list(zip(*self.handed))
        return tuple(torch.tensor(part) for part in zip(*tuples[:len(tuples) // 2]))


def test_a_miner_of_cascades_is_handed_the_tuples_of_the_section_before():
    names, counts = [], []

    class Counting(MeanSquare):
        def forward(self, embeddings, labels, indices_tuple):
            counts.append(len(indices_tuple[0]))
            return super().forward(embeddings, labels, indices_tuple)

    trainer = assemble(functools.partial(CascadedEmbeddings, (1, 2, 2)),
                       {"trunk": linear(3, 5)}, {f"metric_loss_{i}": Counting() for i in range(3)},
                       mining_funcs={f"tuple_miner_{i}": Handed(names, i) for i in range(3)},
                       iterations_per_epoch=1)
    trainer.train()
    assert names == [(0, False), (1, True), (2, True)]
    assert counts[1] == counts[0] // 2 and counts[2] == counts[1] // 2 > 0


def test_a_zero_without_a_graph_skips_the_step_and_other_numbers_are_errors():
    values = iter([torch.zeros(()), torch.ones(())])
    trainer = make_trainer(loss_funcs={"metric_loss": lambda *_: next(values)})
    with pytest.raises(ValueError, match="nothing to learn"):
        trainer.train()
    assert trainer.skipped_steps == 1


def test_no_iterations_per_epoch_is_one_pass():
    assert make_trainer(iterations_per_epoch=0).iterations_per_epoch == len(make_trainer().loader)


@pytest.mark.parametrize("rows, words", [
    ([{"data": torch.zeros(3), "label": 1}] * 8, r"a dict of 2; it must give \(data, label\)"),
    ([(torch.zeros(3), torch.zeros(3), 1)] * 8, r"a list of 3; it must give \(data, label\)")])
def test_batches_that_are_not_data_and_labels(rows, words):
    with pytest.raises(ValueError, match=words):
        make_trainer(dataset=rows, batch_size=4, sampler=None).train()


def test_labels_with_fractions():
    with pytest.raises(ValueError, match="not integers"):
        make_trainer(dataset=TensorDataset(torch.randn(ROWS, 3), torch.arange(ROWS) / 3)).train()


def test_an_adversarial_loss_with_weights_of_its_own():
    loss = Hinge()
    loss.beta = torch.nn.Parameter(torch.ones(()))
    with pytest.raises(ValueError, match="no weights of its own"):
        adversarial(loss_funcs={"metric_loss": Hinge(), "g_adv_loss": loss, "synth_loss": Hinge(),
                                "classifier_loss": torch.nn.CrossEntropyLoss()})


def test_what_loading_processes_get_can_be_pickled():
    trainer = assemble(functools.partial(UnsupervisedEmbeddingsUsingAugmentations,
                                         [torch.nn.Identity()]),
                       {"trunk": linear()}, {"metric_loss": MeanSquare()})
    assert pickle.loads(pickle.dumps(trainer.collate_fn)).func is trainer.collate_fn.func


# ---- the diagnosis of the training batches


def test_diagnosis_against_loops_over_the_batches():
    """d_ap and d_an over all pairs of all batches, the other numbers means over batches."""
    loss = TripletLoss(sampling="random")
    diagnosis = Diagnosis(loss)
    generator = torch.Generator().manual_seed(0)
    batches = [(torch.randn(len(labels), 3, generator=generator, requires_grad=True),
                torch.tensor(labels)) for labels in ([0, 0, 1, 2], [0, 1, 1, 1, 0])]
    apart = {True: [], False: []}
    active, variances, sq_lengths = [], [], []
    for rows, labels in batches:
        value = loss(rows, labels)
        assert value.requires_grad and not loss.active.requires_grad
        active.append(float(loss.active))
        rows = rows.detach().double()
        for i in range(len(rows)):
            for j in range(len(rows)):
                if i != j:
                    apart[bool(labels[i] == labels[j])].append(float((rows[i] - rows[j]).norm()))
        variances.append(float((rows - rows.mean(0)).square().sum(1).mean()))
        sq_lengths.append(float(rows.square().sum(1).mean()))
    loss.eval()
    loss(*batches[0])  # an evaluation does not count
    loss.train()
    expected = {"active": np.mean(active), "d_ap": np.mean(apart[True]),
                "d_an": np.mean(apart[False]), "std": np.mean(variances) ** 0.5,
                "length": np.mean(sq_lengths) ** 0.5}
    row = diagnosis.row()
    assert list(row) == list(Diagnosis.NAMES) and row == pytest.approx(expected, rel=1e-5)
    assert diagnosis.row() == {}  # it starts anew


def test_diagnosis_of_batches_that_say_little():
    loss = torch.nn.CosineEmbeddingLoss()
    loss.forward = lambda embeddings, labels, indices_tuple=None: embeddings.sum()
    diagnosis = Diagnosis(loss)
    loss(torch.ones(3, 2), torch.tensor([0, 1, 2]))
    row = diagnosis.row()
    assert row == {"d_an": 0.0, "std": 0.0, "length": pytest.approx(2 ** 0.5)}
    assert Diagnosis.has_collapsed(row) and not Diagnosis.has_collapsed({})
    assert Diagnosis.has_collapsed({"std": float("nan"), "length": float("nan")})
    assert not Diagnosis.has_collapsed({"std": 0.2, "length": 1.0})
    loss(torch.ones(3, 2), torch.tensor([1, 1, 1]))
    assert "d_an" not in diagnosis.row()


@pytest.mark.parametrize("loss, expected", [(TripletLoss(margin=0.5), 0.5),
                                            (MarginLoss(2, margin=0.2, beta=1.2), 0.25)])
def test_active_share_by_hand(loss, expected):
    """Two triplets at 0: the first one's negative is 2 away, the second one's 0.5.

    Triplet: 0 - 4 + 0.5 is met, 0 - 0.25 + 0.5 is not. Margin: both pairs at 0 are met, of the
    negatives 2 is and 0.5 is not: one of four, the positive terms at 0 being below beta.
    """
    rows = torch.tensor([[0.0, 0], [0, 0], [2, 0], [0.5, 0]])
    loss(rows, torch.tensor([0, 0, 1, 1]), torch.tensor([[0, 1, 2], [0, 1, 3]]))
    assert float(loss.active) == expected
    loss(rows, torch.tensor([0, 0, 1, 1]), torch.empty(0, 3, dtype=torch.long))
    assert float(loss.active) == 0


def test_a_term_added_to_a_step_counts_once_and_is_logged_by_its_name():
    class WithTerm(MetricLossOnly):
        def calculate_loss(self, data, labels):
            return {**super().calculate_loss(data, labels), "extra_loss": data.new_tensor(2.0)}

    trainer = make_trainer(WithTerm)
    trainer.train()
    assert list(trainer.losses) == ["metric_loss", "extra_loss", "total_loss"]
    assert trainer.losses["total_loss"] == trainer.losses["metric_loss"] + 2


@pytest.mark.parametrize("loss, words", [
    (lambda *_: 0.5, "metric_loss must give a scalar tensor; it gave float"),
    (lambda embeddings, *_: embeddings.sum(1), r"it gave \[4\]")])
def test_a_loss_must_give_a_scalar_tensor(loss, words):
    with pytest.raises(ValueError, match=words):
        make_trainer(loss_funcs={"metric_loss": loss}).train()


def test_a_loss_of_one_element_is_a_scalar():
    make_trainer(loss_funcs={"metric_loss": lambda rows, *_: rows.square().mean()[None]}).train()


def test_all_frozen_is_an_error_where_the_loss_is_zero():
    trainer = make_trainer(loss_funcs={"metric_loss": lambda *_: torch.zeros(())},
                           freeze_these=["trunk"])
    with pytest.raises(ValueError, match="nothing to learn"):
        trainer.train()
