"""trainers.py on tiny linear models: every argument is shown to act, every loss held to a loop.

The data of most tests are sixteen numbered rows, labelled by their number, so that what arrived
at the loss says which rows were drawn and in which order.
"""

import collections
import copy
import functools
import inspect
import itertools
import math
import pickle
import random
import re
import unittest.mock
import warnings
import weakref
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.optim import lr_scheduler
from torch.utils.data import BatchSampler, DataLoader, Dataset, Sampler, TensorDataset

import auxiliaries
import datasets
import images
import losses
import main
import netlib
import samplers
from losses import TripletLoss
from trainers import (TRAINERS, BaseTrainer, CascadedEmbeddings, DeepAdversarialMetricLearning,
                      Diagnosis, MetricLossOnly, NonFiniteLoss, TrainWithClassifier,
                      TwoStreamMetricLoss, UnsupervisedEmbeddingsUsingAugmentations, Validation,
                      collate_views, in_turn, schedulers_select, trainer_select)

ROWS, BATCH, BATCHES = 16, 4, 4
IN_ORDER = [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11], [12, 13, 14, 15]]


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


class InOrder(list):
    """A sampler of the given indices in their order; keeps the numbers given to set_epoch."""

    def __init__(self, indices=range(ROWS)):
        super().__init__(indices)
        self.epochs = []

    def set_epoch(self, epoch):
        self.epochs.append(epoch)


class Shuffled(InOrder):
    """An order of its own for every pass, drawn from no global generator."""

    def __iter__(self):
        generator = torch.Generator().manual_seed(self.epochs[-1])
        return iter(torch.randperm(ROWS, generator=generator).tolist())


def linear(inputs=3, outputs=2, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return torch.nn.Linear(inputs, outputs)


def sgd(module, lr=0.1, **options):
    return torch.optim.SGD(module.parameters(), lr, **options)


def adam(module):
    return torch.optim.Adam(module.parameters(), 0.01, weight_decay=0.1)


def make_trainer(trainer=MetricLossOnly, optimizer=sgd, **changes):
    """A trainer of a linear trunk on the numbered rows in order; changes replace its arguments.

    All that has weights gets an optimizer.
    """
    arguments = dict(models={"trunk": linear()}, loss_funcs={"metric_loss": MeanSquare()},
                     batch_size=BATCH, dataset=numbered(), data_device="cpu", sampler=InOrder(),
                     dataloader_num_workers=0) | changes
    parts = arguments["models"] | arguments["loss_funcs"]
    optimizers = {f"{name}_optimizer": optimizer(part) for name, part in parts.items()
                  if isinstance(part, torch.nn.Module) and list(part.parameters())}
    return trainer(**({"optimizers": optimizers} | arguments))


def with_embedder(**changes):
    models = {"trunk": linear(), "embedder": linear(2, 2, seed=1)}
    return make_trainer(**({"models": models} | changes))


def weights(module):
    return [value.detach().clone() for value in module.parameters()]


def all_weights(trainer):
    return [value for _, part in trainer.modules() for value in weights(part)]


def same(first, second):
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def seen(trainer):
    """The labels of each batch that the loss was called with."""
    return [labels.tolist() for _, labels, _ in trainer.loss_funcs["metric_loss"].seen]


def test_the_constructors_are_those_of_pytorch_metric_learning():
    required = inspect.Parameter.empty
    expected = dict(
        models=required, optimizers=required, batch_size=required, loss_funcs=required,
        dataset=required, mining_funcs=None, iterations_per_epoch=None, data_device=None,
        dtype=None, loss_weights=None, sampler=None, collate_fn=None, lr_schedulers=None,
        gradient_clippers=None, freeze_these=(), freeze_trunk_batchnorm=False,
        label_hierarchy_level=0, dataloader_num_workers=2, data_and_label_getter=None,
        dataset_labels=None, set_min_label_to_zero=False, end_of_iteration_hook=None,
        end_of_epoch_hook=None,
        between_iterations_hook=None, grad_scaler=None)  # these two are this project's own
    rest = {"args": required, "kwargs": required}
    own = {CascadedEmbeddings: {"embedding_sizes": required, **rest},
           DeepAdversarialMetricLearning: {"metric_alone_epochs": 0, "g_alone_epochs": 0,
                                           "g_triplets_per_anchor": 100, **rest},
           UnsupervisedEmbeddingsUsingAugmentations: {
               "transforms": required, "data_and_label_setter": None, **rest}}
    for trainer in TRAINERS.values():
        parameters = inspect.signature(trainer).parameters.values()
        assert [(p.name, p.default) for p in parameters] == list(own.get(trainer, expected).items())
        assert not any(p.kind == inspect.Parameter.KEYWORD_ONLY for p in parameters)
    train = inspect.signature(BaseTrainer.train).parameters.values()
    assert [(p.name, p.default) for p in train][1:] == [("start_epoch", 1), ("num_epochs", 1)]


def test_three_steps_equal_a_loop_written_by_hand():
    def parts():
        trunk = torch.nn.Sequential(linear(3, 4), torch.nn.Dropout(0.3), torch.nn.Tanh())
        embedder, loss = linear(4, 2, seed=1), MeanSquare()
        return trunk, embedder, loss, {
            "trunk_optimizer": adam(trunk), "embedder_optimizer": sgd(embedder, momentum=0.9),
            "metric_loss_optimizer": sgd(loss, 0.05)}

    def miner(embeddings, labels):
        return embeddings.norm(dim=1).argsort()[:3], labels.argsort()[1:4]

    dataset, losses = numbered(17), []
    trunk, embedder, loss, optimizers = parts()
    trainer = MetricLossOnly(
        {"trunk": trunk, "embedder": embedder}, optimizers, 5, {"metric_loss": loss}, dataset,
        {"tuple_miner": miner}, None, "cpu", loss_weights={"metric_loss": 0.5},
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
    for first, second in zip(loss.seen, loss_2.seen):
        assert same(first[:2] + first[2], second[:2] + second[2])


# ---- losses and miners


def test_gradients_are_those_of_one_batch_whether_or_not_something_steps():
    """Of a trunk without an optimizer, and of a loss that only its optimizer knows."""
    trunk, loss, gradients = linear(), MeanSquare(), []
    make_trainer(models={"trunk": trunk}, loss_funcs={"metric_loss": lambda *args: loss(*args)},
                 optimizers={"metric_loss_optimizer": sgd(loss, lr=0)},
                 end_of_iteration_hook=lambda trainer: gradients.append(
                     (trunk.weight.grad.clone(), loss.scale.grad.clone()))).train()
    for batch, gradient in zip(IN_ORDER, gradients, strict=True):
        value = loss(trunk(numbered()[batch][0]), torch.tensor(batch))
        torch.testing.assert_close(gradient, torch.autograd.grad(value, [trunk.weight, loss.scale]))


def test_a_term_added_to_a_step_counts_once_and_is_logged_by_its_name():
    class WithTerm(MetricLossOnly):
        def calculate_loss(self, data, labels):
            return {**super().calculate_loss(data, labels), "extra_loss": data.new_tensor([2.])}

    trainer = make_trainer(WithTerm)
    trainer.train()
    assert list(trainer.losses) == ["metric_loss", "extra_loss", "total_loss"]
    assert trainer.losses["total_loss"] == trainer.losses["metric_loss"] + 2


def test_a_subset_batch_miner_thins_the_batch():
    for indices in (torch.tensor([3, 1]), [0, 2], torch.tensor([True, False, False, True])):
        trainer = make_trainer(mining_funcs={"subset_batch_miner": lambda *_: indices})
        trainer.train()
        assert seen(trainer) == [torch.tensor(batch)[indices].tolist() for batch in IN_ORDER]
        assert len(trainer.loss_funcs["metric_loss"].seen[0][0]) == 2


def test_a_miner_of_batches_and_validation_find_eval_mode_and_no_gradients():
    trunk = torch.nn.Sequential(linear(), torch.nn.BatchNorm1d(2), torch.nn.Dropout(0.5))
    embedder, loss, modes = linear(2, 2), MeanSquare(), []

    def keep_modes(*_):
        parts = (trunk, trunk[1], trunk[2], embedder, loss)
        modes.append([torch.is_grad_enabled(), *(part.training for part in parts)])

    def miner(embeddings, labels):
        keep_modes()
        expected = trunk(numbered()[labels.tolist()][0])  # the mode is eval, so this is repeatable
        torch.testing.assert_close(embeddings, embedder(expected))
        return torch.arange(3)

    loss.register_forward_pre_hook(keep_modes)
    make_trainer(models={"trunk": trunk, "embedder": embedder}, loss_funcs={"metric_loss": loss},
                 iterations_per_epoch=2, freeze_these=("embedder",), freeze_trunk_batchnorm=True,
                 mining_funcs={"subset_batch_miner": miner}, end_of_epoch_hook=Validation(
                     lambda trainer: keep_modes() or {"nmi": 0.5})).train(num_epochs=2)
    rests, learns = [False] * 6, [True, True, False, True, False, True]
    assert modes == ([rests, learns] * 2 + [rests]) * 2
    assert torch.is_grad_enabled()


# ---- batches and epochs


def test_the_data_go_on_across_epochs_of_any_length():
    for iterations, length, passes in ((None, 4, 3), (0, 4, 3), (3, 3, 3), (6, 6, 5)):
        sampler, counts = InOrder(), []
        trainer = make_trainer(sampler=sampler, iterations_per_epoch=iterations,
                               end_of_epoch_hook=lambda trainer: counts.append(len(seen(trainer))))
        trainer.train(num_epochs=3)
        assert trainer.iterations_per_epoch == length
        assert counts == [length, 2 * length, 3 * length]
        assert seen(trainer) == [IN_ORDER[i % BATCHES] for i in range(3 * length)]
        assert sampler.epochs == list(range(1, passes + 1))


def test_passes_draw_from_the_global_generator_what_plain_loaders_draw():
    for sampler in (None, InOrder()):
        torch.manual_seed(11)
        trainer = make_trainer(sampler=sampler)
        trainer.train(num_epochs=3)
        state = torch.get_rng_state()
        torch.manual_seed(11)
        loader = DataLoader(numbered(), BATCH, shuffle=sampler is None, sampler=sampler)
        assert seen(trainer) == [labels.tolist() for _ in range(3) for _, labels in loader]
        assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("sampler", [None, Shuffled], ids=["shuffled by torch", "sampler"])
def test_loading_processes_do_not_change_the_numbers(sampler):
    runs = []
    for workers in (0, 2):
        trunk = torch.nn.Sequential(linear(), torch.nn.Dropout(0.5))
        trainer = make_trainer(models={"trunk": trunk}, sampler=sampler and sampler(),
                               dataloader_num_workers=workers, iterations_per_epoch=3)
        assert trainer.loader.num_workers == workers
        torch.manual_seed(7)
        trainer.train(num_epochs=2)
        trainer.train(3, 3)  # begins a new pass, within one that is not over
        runs.append((seen(trainer), weights(trunk)))
    assert runs[0][0] == runs[1][0] and same(runs[0][1], runs[1][1])
    assert len({row for batch in runs[0][0][6:] for row in batch}) == 3 * BATCH


def test_data_go_to_the_device_and_become_of_the_dtype(monkeypatch):
    data, labels = make_trainer(data_device="meta").next_batch()  # a device that every torch has
    assert data.device.type == labels.device.type == "meta"
    for available, device in ((True, "cuda"), (False, "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
        assert torch.device(make_trainer(data_device=None).data_device).type == device
    images = TensorDataset(torch.ones(8, 3, dtype=torch.uint8), torch.arange(8))
    for dtype, expected in ((None, torch.uint8), (torch.float16, torch.float16)):
        data, labels = make_trainer(dataset=images, sampler=None, dtype=dtype).next_batch()
        assert data.dtype == expected and labels.dtype == torch.int64


def test_samplers_may_give_batches_or_have_no_end():
    class Endless(Sampler):
        def __iter__(self):
            return itertools.cycle(range(ROWS))

    trainer = make_trainer(sampler=BatchSampler(InOrder(), 6, drop_last=False))
    trainer.train()
    assert [len(labels) for labels in seen(trainer)] == [6, 6, 4]
    trainer = make_trainer(sampler=Endless(), iterations_per_epoch=3)
    trainer.train(num_epochs=2)
    assert seen(trainer) == (IN_ORDER * 2)[:6]
    with pytest.raises(ValueError, match="iterations_per_epoch"):
        make_trainer(sampler=Endless())


class Epochs(Dataset):
    """Rows that say which pass the dataset was told of, in a plain attribute."""

    epoch = 0

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __len__(self):
        return ROWS

    def __getitem__(self, i):
        return torch.zeros(3), self.epoch


def test_the_dataset_is_told_the_pass_in_loading_processes_too():
    trainer = make_trainer(dataset=Epochs(), dataloader_num_workers=1)
    trainer.train(3, 4)
    assert [labels[0] for labels in seen(trainer)] == [3] * BATCHES + [4] * BATCHES
    shared = Epochs()
    shared.epoch = torch.zeros((), dtype=torch.long).share_memory_()
    for dataset, workers, lasting in ((numbered(), 1, True), (numbered(), 0, False),
                                      (Epochs(), 1, False), (shared, 1, True)):
        trainer = make_trainer(dataset=dataset, dataloader_num_workers=workers)
        assert trainer.loader.persistent_workers == lasting


def test_a_trainer_with_loading_processes_ends_at_once():
    trainer = views(dataloader_num_workers=1)
    trainer.train()
    gone = weakref.ref(trainer)
    del trainer
    assert gone() is None  # no cycle that waits for the garbage collector


# ---- labels


TABLE = torch.tensor([[5, 100], [5, 90], [7, 80], [7, 70]])
NAMES = [["dog", "poodle"], ["dog", "husky"], ["cat", "tabby"], ["cat", "siamese"]]


def test_labels_become_numbers_of_one_level_or_ranks_of_the_whole_dataset():
    for labels, ranked_among, level, expected in (
            ([12, 5, 12, 5], None, 0, [12, 5, 12, 5]), (TABLE, None, 0, [5, 5, 7, 7]),
            (TABLE.tolist(), None, 1, [100, 90, 80, 70]), (TABLE, TABLE, 1, [3, 2, 1, 0]),
            (NAMES, NAMES, 0, [1, 1, 0, 0]), (NAMES, np.array(NAMES), 1, [1, 0, 3, 2]),
            ([12, 5, 12, 5], [5, 10, 12, 13], 0, [2, 0, 2, 0]),
            (["dog", "cat", "monkey", "dog"], ["dog", "cat", "monkey"], 0, [1, 0, 2, 1])):
        trainer = make_trainer(dataset=rows_labelled(labels), sampler=InOrder(range(4)),
                               label_hierarchy_level=level, dataset_labels=ranked_among,
                               set_min_label_to_zero=ranked_among is not None)
        result = trainer.next_batch()[1]
        assert result.tolist() == expected and result.dtype == torch.int64


def test_collate_fn_may_give_labels_as_a_list():
    for kind in (int, torch.as_tensor):
        def collate(items):
            data, labels = zip(*items)
            return torch.stack(data) + 100, [kind(label.item()) for label in labels]

        data, labels = make_trainer(collate_fn=collate).next_batch()
        assert data.min() >= 100 and labels.tolist() == IN_ORDER[0] and labels.dtype == torch.int64


def test_labels_that_are_refused():
    for labels, options, words in (
            (["a", "b", "z", "a"], dict(dataset_labels=["a", "b"]), "label 'z' is not among"),
            ([0, 1, 2, 3], dict(), "needs dataset_labels"),
            (["a", "b", "c", "d"], dict(set_min_label_to_zero=False), "set_min_label_to_zero"),
            ([0.5, 1., 2., 3.], dict(set_min_label_to_zero=False), "not integers")):
        with pytest.raises(ValueError, match=words):
            make_trainer(dataset=rows_labelled(labels), sampler=InOrder(range(4)),
                         **({"set_min_label_to_zero": True} | options)).train()


# ---- schedulers, clippers, freezing


def rates_of(trainer):
    return [optimizer.param_groups[0]["lr"] for optimizer in trainer.optimizers.values()]


def test_schedules_go_by_iteration_or_by_epoch():
    rates = []
    trainer = with_embedder(end_of_epoch_hook=lambda trainer: rates.append(rates_of(trainer)))
    trainer.lr_schedulers = {f"{name}_scheduler_by_{when}": lr_scheduler.StepLR(
        trainer.optimizers[f"{name}_optimizer"], step_size=1, gamma=0.5)
        for name, when in (("trunk", "iteration"), ("embedder", "epoch"))}
    trainer.train(num_epochs=2)
    # 0.1 halved after each of 4 iterations, or after each epoch; the hook sees the new rates
    assert rates == [pytest.approx([0.1 / 2 ** 4, 0.1 / 2, 0.1]),
                     pytest.approx([0.1 / 2 ** 8, 0.1 / 4, 0.1])]


@pytest.mark.parametrize("scheduler, factors", [
    ("step", [1, 0.5, 0.5, 0.25, 0.25]), ("exp", [0.5, 0.25, 0.125, 0.0625, 0.03125]),
    ("plateau", [1, 1, 0.5, 0.5, 0.25]), ("none", [1] * 5)])
def test_schedules_by_their_names(scheduler, factors):
    """plateau_patience 2: two measurements in a row without a better one."""
    opt = SimpleNamespace(scheduler=scheduler, tau=[2, 4], gamma=0.5, plateau_patience=2,
                          lr_rise=0)
    trainer, rates = make_trainer(), []
    trainer.lr_schedulers = schedulers_select(opt, trainer.optimizers, BATCHES)
    for _ in range(5):
        trainer.train()
        trainer.step_lr_plateau_schedulers(0.7)
        rates += set(rates_of(trainer))
    assert rates == pytest.approx([0.1 * factor for factor in factors])


def test_schedules_begin_before_the_first_step_without_a_warning():
    trainer = scheduled(adversarial, phases=(0, 9), mining_funcs={"tuple_miner": lambda *_: []})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trainer.train(num_epochs=3)  # the generator alone learns
    assert rates_of(trainer) == pytest.approx([0.01 * 0.9 ** 3] * 4)


def test_gradient_clippers_are_called_between_backward_and_step():
    trunk, calls = linear(), []
    before = weights(trunk)

    def clip():
        calls.append(float(trunk.weight.grad.abs().sum()))
        trunk.weight.grad.zero_()

    make_trainer(models={"trunk": trunk}, gradient_clippers={"trunk_grad_clipper": clip}).train()
    assert len(calls) == BATCHES and all(calls)
    assert torch.equal(before[0], trunk.weight) and not torch.equal(before[1], trunk.bias)


def test_what_is_frozen_has_no_gradient_is_in_eval_mode_and_never_stepped():
    for frozen in (("trunk",), ["embedder", "metric_loss"]):
        modes, stepped = [], set()
        trainer = with_embedder(freeze_these=frozen,
                                end_of_iteration_hook=lambda trainer: modes.append(
                                    {name: part.training for name, part in trainer.parts()}))
        parts = dict(trainer.parts())
        before = {name: weights(part) for name, part in parts.items()}
        for name, optimizer in trainer.optimizers.items():
            optimizer.register_step_post_hook(lambda *_, name=name: stepped.add(name))
        trainer.train(num_epochs=2)
        for name, part in parts.items():
            assert same(before[name], weights(part)) == (name in frozen), name
            assert all(p.requires_grad == (name not in frozen) for p in part.parameters())
            assert all((p.grad is None) == (name in frozen) for p in part.parameters())
        assert modes == [{name: name not in frozen for name in parts}] * 2 * BATCHES
        assert stepped == {f"{name}_optimizer" for name in parts if name not in frozen}


def test_freeze_trunk_batchnorm():
    for frozen in (False, True):
        trunk = torch.nn.Sequential(linear(), torch.nn.BatchNorm1d(2), linear(2, 2, seed=1))
        embedder = torch.nn.Sequential(torch.nn.BatchNorm1d(2), linear(2, 2))
        affine = weights(trunk[1])
        make_trainer(models={"trunk": trunk, "embedder": embedder},
                     freeze_trunk_batchnorm=frozen).train(num_epochs=2)
        assert torch.equal(trunk[1].running_var, torch.ones(2)) == frozen
        assert not same(affine, weights(trunk[1]))  # scale and shift learn all the same
        assert trunk.training and trunk[1].training != frozen
        assert embedder[0].num_batches_tracked == 2 * BATCHES  # of the trunk alone


def test_a_loss_without_a_graph_is_an_error_unless_it_is_zero_and_something_could_learn():
    values = iter([torch.zeros(()), torch.ones(())])
    trainer = make_trainer(loss_funcs={"metric_loss": lambda *_: next(values)})
    with pytest.raises(ValueError, match="nothing to learn"):
        trainer.train()
    assert trainer.skipped_steps == 1
    for loss in (MeanSquare(), lambda *_: torch.zeros(())):
        with pytest.raises(ValueError, match="nothing to learn.*trunk"):
            make_trainer(loss_funcs={"metric_loss": loss},
                         freeze_these=("trunk", "embedder", "metric_loss")).train()


# ---- hooks and counting


def test_training_ends_early_when_the_epoch_hook_returns_exactly_false():
    for value, epochs in ((False, 1), (0, 3), (np.False_, 3)):
        trainer = make_trainer(end_of_epoch_hook=lambda trainer: value)
        trainer.train(num_epochs=3)
        assert trainer.epoch == epochs and len(seen(trainer)) == epochs * BATCHES


def test_train_goes_from_one_epoch_to_another():
    for start, last, epochs in ((1, 3, [1, 2, 3]), (3, 4, [3, 4]), (5, 4, []), (1, 0, [])):
        sampler, iterations, ends = InOrder(), [], []

        def after_iteration(trainer):
            iterations.append((trainer.epoch, trainer.iteration, trainer.get_global_iteration()))
            return False  # means nothing here

        make_trainer(sampler=sampler, end_of_iteration_hook=after_iteration,
                     end_of_epoch_hook=lambda trainer: ends.append(
                         (trainer.epoch, trainer.last_epoch))).train(start, last)
        assert ends == [(epoch, last) for epoch in epochs] and sampler.epochs == epochs
        assert iterations == [(epoch, i, (epoch - 1) * BATCHES + i)
                              for epoch in epochs for i in range(BATCHES)]


def test_hooks_read_every_argument_and_what_those_of_pytorch_metric_learning_do():
    """They log loss_tracker's losses and weights, and save every part by its state_dict."""
    tracked = []
    trainer = adversarial(mining_funcs={"tuple_miner": samplers.Sampler("random")},
                          end_of_iteration_hook=lambda trainer: tracked.append(
                              (trainer.loss_tracker.losses, trainer.loss_tracker.loss_weights)))
    trainer.train(num_epochs=3)
    for losses, factors in tracked:
        assert factors == {**trainer.loss_weights, "total_loss": 1}
        assert losses.keys() == factors.keys()  # with 0 for those that rest
        assert losses["total_loss"] == pytest.approx(sum(losses.values()) / 2)
    for group in ("models", "optimizers", "loss_funcs", "mining_funcs"):
        assert all(part.state_dict() is not None for part in getattr(trainer, group).values())
    assert all(hasattr(trainer, name) for name in inspect.signature(BaseTrainer).parameters)
    assert trainer.lr_schedulers == trainer.gradient_clippers == {}


# ---- bad input


def test_unknown_and_missing_keys_are_named_with_the_allowed_ones():
    for name, argument, given, expected in (
            ("MetricLossOnly", "models", {"trunc": None}, "unknown key 'trunc'"),
            ("MetricLossOnly", "lr_schedulers", {"trunk_scheduler": None},
             "unknown key 'trunk_scheduler'"),
            ("MetricLossOnly", "gradient_clippers", {"trunk_clipper": None},
             "unknown key 'trunk_clipper'"),
            ("MetricLossOnly", "freeze_these", ["body"], "unknown key 'body'"),
            ("TrainWithClassifier", "optimizers", {"trunk": None}, "unknown key 'trunk'"),
            ("CascadedEmbeddings", "loss_funcs", {"metric_loss_0": None}, "no key 'metric_loss_1'"),
            ("CascadedEmbeddings", "mining_funcs", {"tuple_miner": None},
             "unknown key 'tuple_miner'"),
            ("DeepAdversarialMetricLearning", "models", {"trunk": None}, "no key 'generator'"),
            ("DeepAdversarialMetricLearning", "loss_weights", dict.fromkeys(
                ["metric_loss", "g_adv_loss", "synth_loss", "classifier_loss", "g_reg_loss"], 1),
             "no key 'g_hard_loss'"),
            ("TwoStreamMetricLoss", "mining_funcs", {"subset_batch_miner": None},
             "unknown key 'subset_batch_miner'")):
        words = re.escape(f"{name}: {expected} in {argument}; allowed are ")
        with pytest.raises(ValueError, match=words):
            EVERY_TRAINER[name](**{argument: given})


def test_batches_and_losses_that_are_refused():
    for changes, words in (
            (dict(dataset=numbered(3), sampler=None), "batch of 4 from a dataset of 3"),
            (dict(sampler=InOrder([0, 1, 2]), iterations_per_epoch=2), "batch_size 4"),
            (dict(dataset=[{"data": torch.zeros(3), "label": 1}] * 16), "a dict of 2; .*data, l"),
            (dict(dataset=[(torch.zeros(3), torch.zeros(3), 1)] * 16), "a list of 3; .*data, l"),
            (dict(loss_funcs={"metric_loss": lambda *_: 0.5}), "metric_loss must .* gave float"),
            (dict(loss_funcs={"metric_loss": lambda rows, *_: rows.sum(1)}), r"it gave \[4\]")):
        with pytest.raises(ValueError, match=words):
            make_trainer(**changes).train()
    with pytest.raises(NotImplementedError):
        make_trainer(BaseTrainer).train()  # which does not say its losses


# ---- numbers that are not finite


class OnGPU(torch.Tensor):
    """A tensor that says that it is on a GPU, where losses are looked at every 20 iterations."""

    is_cuda = True


@pytest.mark.parametrize("tensor, length, steps", [
    (torch.Tensor, 4, 22), (OnGPU, 4, 24), (OnGPU, 50, 39)])
@pytest.mark.parametrize("what, said", [("loss", "the loss is inf in"), (
    "gradient", "the gradient of metric_loss.scale is not finite in")])
def test_what_is_not_finite_stops_the_training_and_is_named_by_its_iteration(what, said, tensor,
                                                                             length, steps):
    """At once on a CPU; on a GPU after at most 20 steps, and before the hook of an epoch's end."""
    class Breaks(MeanSquare):
        def forward(self, embeddings, labels, indices_tuple=None):
            loss = super().forward(embeddings, labels)
            if len(self.seen) == 23:
                loss = (loss * math.inf if what == "loss" else
                        loss + (loss - loss.detach()).sqrt())
            return loss.as_subclass(tensor)

    kept, epochs = [], []
    trainer = with_embedder(
        loss_funcs={"metric_loss": Breaks()}, iterations_per_epoch=length,
        end_of_iteration_hook=lambda trainer: kept.append(all_weights(trainer)),
        end_of_epoch_hook=lambda trainer: epochs.append(trainer.epoch))
    epoch, iteration = 22 // length + 1, 22 % length
    with pytest.raises(NonFiniteLoss, match=f"{said} epoch {epoch}, iteration {iteration + 1}; "
                                            ".*--lr") as error:
        trainer.train(num_epochs=9)
    assert (error.value.epoch, error.value.iteration) == (epoch, iteration)
    assert len(kept) == steps and epochs == list(range(1, epoch))
    assert tensor is OnGPU or same(kept[-1], all_weights(trainer))


def root_of_zero(embeddings, *_):
    """A loss that is finite, with a derivative that is not."""
    return (0 * embeddings).sqrt().sum()


def half_scaler():
    """float16's scaler, on the CPU."""
    return torch.amp.GradScaler("cpu", init_scale=4., growth_interval=1000)


def test_a_gradient_that_is_not_finite_leaves_the_weights_as_they_were():
    # A scaler may leave out steps until its scale, 4, 2, 1, is below one.
    for scaler, iteration in ((None, 1), (half_scaler(), 4)):
        trainer = make_trainer(loss_funcs={"metric_loss": root_of_zero}, grad_scaler=scaler)
        before = all_weights(trainer)
        with pytest.raises(NonFiniteLoss, match="the gradient of trunk.* is not finite in epoch 1,"
                                                f" iteration {iteration}; .*--lr"):
            trainer.train()
        assert same(before, all_weights(trainer))


def test_weights_that_a_last_step_spoils_are_refused_before_the_epoch_hook():
    def spoil(trainer):
        trainer.models["trunk"].weight.data[1, 2] = math.nan

    trainer = make_trainer(iterations_per_epoch=1, end_of_iteration_hook=spoil,
                           end_of_epoch_hook=lambda trainer: pytest.fail("it comes too late"))
    with pytest.raises(NonFiniteLoss, match="weight trunk.weight is not finite after epoch 1, i"):
        trainer.train()


def test_under_fp16_all_step_or_none():
    """Though the trunk's gradient alone overflows, the others rest with it; once only."""
    overflows, kept = [True, False], []
    trainer = with_embedder(grad_scaler=half_scaler(), end_of_iteration_hook=lambda trainer:
                            kept.append(all_weights(trainer)))
    trainer.models["trunk"].weight.register_hook(lambda gradient: (
        gradient * math.inf if overflows and overflows.pop(0) else gradient))
    start = all_weights(trainer)
    trainer.train()
    assert same(start, kept[0])
    assert not any(torch.equal(a, b) for a, b in zip(start, kept[1]))
    assert trainer.grad_scaler.get_scale() == 2


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


def hinge_by_hand(rows, others, triplets, margin):
    """The loss of Hinge, one triplet after the other."""
    terms = [F.relu((rows[a] - others[p]).square().sum() - (rows[a] - others[n]).square().sum()
                    + margin) for a, p, n in triplets]
    return sum(terms) / len(terms)


def four_classes(streams=1):
    """Sixteen random rows of three numbers, labelled 0, 1, 2, 3, 0, ... (streams of them)."""
    generator = torch.Generator().manual_seed(9)
    rows = [torch.randn(ROWS, 3, generator=generator) for _ in range(streams)]
    return TensorDataset(*rows, torch.arange(ROWS) % 4)


def assemble(trainer, losses, embed_dim=2, own=None, **changes):
    """A trainer of the four classes, eight rows a batch; own: models beside trunk and embedder."""
    models = {"trunk": linear(3, 5), "embedder": linear(5, embed_dim, seed=1), **(own or {})}
    return make_trainer(trainer, **({"models": models, "loss_funcs": losses, "batch_size": 8,
                                     "dataset": four_classes()} | changes))


def metric_alone(**changes):
    return assemble(MetricLossOnly, {"metric_loss": Hinge()}, **changes)


def with_classifier(**changes):
    return assemble(TrainWithClassifier, {"metric_loss": Hinge(),
                                          "classifier_loss": torch.nn.CrossEntropyLoss()},
                    own={"classifier": linear(2, 4, seed=2)}, **changes)


def cascaded(classifiers=(1,), sizes=(2, 3), **changes):
    """Sections of the given sizes; a classifier for some of them."""
    loss_funcs = {f"metric_loss_{i}": Hinge(0.3 + i) for i in range(len(sizes))}
    loss_funcs |= {f"classifier_loss_{i}": torch.nn.CrossEntropyLoss() for i in classifiers}
    own = {f"classifier_{i}": linear(sizes[i], 4, seed=2 + i) for i in classifiers}
    return assemble(functools.partial(CascadedEmbeddings, sizes), loss_funcs, sum(sizes), own,
                    **changes)


def adversarial(phases=(1, 1), each=3, **changes):
    """Epochs of the metric alone and of the generator alone; so many triplets of each row."""
    generator = torch.nn.Sequential(linear(15, 6, seed=2), torch.nn.Tanh(), linear(6, 5, seed=3))
    generator[2].weight.data *= 5  # so that synthetic negatives begin far away
    return assemble(functools.partial(DeepAdversarialMetricLearning, *phases, each),
                    {"metric_loss": Hinge(), "g_adv_loss": Hinge(0.1), "synth_loss": Hinge(0.7),
                     "classifier_loss": torch.nn.CrossEntropyLoss()},
                    own={"generator": generator, "classifier": linear(2, 4, seed=4)}, **changes)


def views(**changes):
    """Three views of each row: itself, moved by one, and turned over."""
    return assemble(functools.partial(UnsupervisedEmbeddingsUsingAugmentations,
                                      [lambda x: x, lambda x: x + 1, lambda x: -x]),
                    {"metric_loss": Hinge()}, **changes)


def two_streams(**changes):
    return assemble(TwoStreamMetricLoss, {"metric_loss": Hinge()},
                    **({"dataset": four_classes(streams=2)} | changes))


EVERY_TRAINER = {"MetricLossOnly": metric_alone, "TrainWithClassifier": with_classifier,
                 "CascadedEmbeddings": cascaded, "DeepAdversarialMetricLearning": adversarial,
                 "UnsupervisedEmbeddingsUsingAugmentations": views,
                 "TwoStreamMetricLoss": two_streams}


def check_against_loop(make, step, epochs=2, stepped=lambda name, epoch: True):
    """Trains by the trainer and by a plain loop on copies of its parts: all numbers must agree.

    step(parts, data, labels, epoch) -> {name: scalar}; stepped: which parts learn in which epoch.
    """
    losses = []
    trainer = make(end_of_iteration_hook=lambda trainer: losses.append(trainer.losses))
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

    assert len(losses) == len(expected) == 2 * epochs and all(expected[0].values())
    for ours, theirs in zip(losses, expected):
        assert not any(loss.requires_grad for loss in ours.values())
        assert {name: loss.item() for name, loss in ours.items()} == pytest.approx(theirs, abs=1e-6)
    for name, part in trainer.parts():
        torch.testing.assert_close(weights(part), weights(parts[name]), rtol=0, atol=1e-6)
    return trainer


RATES = {"trunk": 0.01, "embedder": 0.02, "classifier": 0.03, "generator": 0.04}


@pytest.mark.parametrize("name", TRAINERS)
def test_options_make_a_trainer_of_which_every_part_learns_at_its_rate(name):
    opt = SimpleNamespace(
        trainer=name, lr=0.01, fc_lr_mul=2, classifier_lr=0.03, g_lr=0.04, decay=0.1, bs=8,
        embed_dim=3, embedding_sizes=[1, 2], classifier_weight=0.5, g_weights=[2, 3, 4, 5],
        metric_alone_epochs=0, g_alone_epochs=0, g_triplets_per_anchor=3, scheduler="none",
        batchnorm="trained", kernels=0, amp="none", optim="adam", adam_eps=1e-8, freeze=[],
        no_decay_1d=False, warm_up=0, lr_rise=0, clip_norm=None, clip_value=None)
    trunk = linear(3, 5)
    trunk.num_features, trunk.freeze = 5, lambda names: None
    dataset = four_classes(streams=TRAINERS[name].views)
    dataset.class_names = list("abcd")
    made = []

    def make_loss(**changes):
        made.append(changes)
        return TripletLoss(sampling="random"), None

    trainer = trainer_select(opt, trunk, linear(5, 3), make_loss, dataset,
                             BatchSampler(InOrder(), 8, True), torch.device("cpu"))
    before, passed = all_weights(trainer), []
    trunk.register_forward_pre_hook(lambda trunk, given: passed.append(given[0]))
    trainer.train()
    assert not any(torch.equal(*pair) for pair in zip(before, all_weights(trainer)))
    assert trainer.skipped_steps == 0 and trainer.diagnoses
    for key, optimizer in trainer.optimizers.items():
        group, = optimizer.param_groups
        assert (group["lr"], group["weight_decay"]) == (RATES[key.removesuffix("_optimizer")], 0.1)
    if name.startswith("Unsupervised"):  # both views, beside each other
        assert torch.equal(passed[0], torch.stack(dataset[:8][:2], 1).flatten(0, 1))
        assert len(trainer.transforms) == trainer.views == 2
    assert made == {"CascadedEmbeddings": [{"embed_dim": 1}, {"embed_dim": 2}],
                    "DeepAdversarialMetricLearning": [{}] + [
                        {"loss": "triplet", "sampling": "distance"}] * 2}.get(name, [{}])
    assert trainer.loss_weights == {
        "TrainWithClassifier": {"metric_loss": 1, "classifier_loss": 0.5},
        "DeepAdversarialMetricLearning": {
            "metric_loss": 1, "g_adv_loss": 2, "g_hard_loss": 3, "g_reg_loss": 4, "synth_loss": 5},
    }.get(name, dict.fromkeys(trainer.loss_funcs, 1))


def test_no_loss_weights_at_all_are_weights_of_one():
    for make in EVERY_TRAINER.values():
        trainer = make(loss_weights={})
        assert trainer.loss_weights == dict.fromkeys(
            (*trainer.loss_funcs, *trainer.regularisers), 1) == make().loss_weights
        trainer.train()
        assert trainer.losses.pop("total_loss") == sum(trainer.losses.values()) != 0


# ---- a classifier behind the embedding


TRIPLETS = [torch.tensor([[0, 4, 1], [5, 1, 7]]), torch.tensor([[2, 6, 0], [3, 7, 6], [1, 5, 0]])]


@pytest.mark.parametrize("mined, factors", [
    (False, None), (True, {"metric_loss": 0.5, "classifier_loss": 2})])
def test_train_with_classifier_is_the_loop(mined, factors):
    def step(parts, data, labels, epoch):
        embeddings = parts["embedder"](parts["trunk"](data))
        triplets = TRIPLETS[1].tolist() if mined else triplets_of(labels.tolist())
        logs = parts["classifier"](embeddings).log_softmax(1)
        return {"metric_loss": hinge_by_hand(embeddings, embeddings, triplets, 0.5),
                "classifier_loss": -sum(row[label] for row, label in zip(logs, labels)) / 8}

    miners = {"tuple_miner": lambda *_: TRIPLETS[1].unbind(1)} if mined else {}
    check_against_loop(lambda **changes: with_classifier(
        loss_weights=factors, mining_funcs=miners, **changes), step)


def test_either_loss_may_be_alone_but_a_classifier_and_its_loss_go_together():
    for make, loss in ((with_classifier, "classifier_loss"), (cascaded, "classifier_loss_1")):
        whole = make()
        losses = {name: part for name, part in whole.loss_funcs.items() if name != loss}
        models = {name: part for name, part in whole.models.items() if "classifier" not in name}
        trainer = make(models=models, loss_funcs=losses)
        trainer.train()
        assert trainer.losses.keys() == {*losses, "total_loss"}
        for changes in ({"loss_funcs": losses}, {"models": models}):
            with pytest.raises(ValueError, match=f"{loss}.*missing"):
                make(**changes)
    trainer = with_classifier(loss_funcs={"classifier_loss": torch.nn.CrossEntropyLoss()})
    trainer.train()
    assert trainer.losses.keys() == {"classifier_loss", "total_loss"}
    with pytest.raises(ValueError, match="TrainWithClassifier has no loss"):
        with_classifier(models={"trunk": linear(3, 2)}, loss_funcs={})


# ---- sections of the embedding


@pytest.mark.parametrize("classifiers, mined, resting", [
    ((), (), None), ((1,), (1,), None), ((0, 1), (0, 1), 0), ((), (0, 1), 1)])
def test_cascaded_embeddings_is_the_loop(classifiers, mined, resting):
    """The miner of a resting section returns nothing in the second epoch."""
    def step(parts, data, labels, epoch):
        embeddings, losses = parts["embedder"](parts["trunk"](data)), {}
        for i, rows in enumerate((embeddings[:, :2], embeddings[:, 2:])):
            triplets = TRIPLETS[i].tolist() if i in mined else triplets_of(labels.tolist())
            rests = i == resting and epoch == 2
            losses[f"metric_loss_{i}"] = torch.zeros(()) if rests else (
                hinge_by_hand(rows, rows, triplets, 0.3 + i))
            if i in classifiers:
                losses[f"classifier_loss_{i}"] = F.cross_entropy(parts[f"classifier_{i}"](rows),
                                                                 labels)
        return losses

    miners = {f"tuple_miner_{i}": now_and_then(None, TRIPLETS[i].unbind(1),
                                               (2, 3) if i == resting else ()) for i in mined}
    trainer = check_against_loop(
        lambda **changes: cascaded(classifiers, mining_funcs=miners, **changes), step)
    assert trainer.skipped_steps == 0


def test_a_resting_section_rests_with_its_losss_weights_and_is_zero_of_whatever_embeddings():
    losses, scales = {"metric_loss_0": Hinge(5), "metric_loss_1": MeanSquare()}, []
    optimizer = torch.optim.Adam(losses["metric_loss_1"].parameters(), 0.1, weight_decay=0.5)
    trainer = cascaded((), loss_funcs=losses, optimizers={"metric_loss_1_optimizer": optimizer},
                       mining_funcs={"tuple_miner_1": now_and_then([], TRIPLET, (1, 2, 4))},
                       end_of_iteration_hook=lambda trainer: scales.append(
                           losses["metric_loss_1"].scale.item()))
    trainer.train(num_epochs=2)
    assert scales[0] == scales[1] == scales[2] != scales[3]
    found = trainer.calculate_loss(torch.full((8, 3), math.inf), torch.arange(8) % 4)
    assert found["metric_loss_1"] == 0 and found["metric_loss_1"].requires_grad


class Handed:
    """A miner that keeps half of the tuples that it is handed, or of all."""

    def set_idx_externally(self, tuples, labels):
        self.handed = tuples

    def reset_idx(self):
        self.handed = "reset"

    def __call__(self, embeddings, labels):
        tuples = triplets_of(labels) if self.handed is None else list(zip(*self.handed))
        return tuple(torch.tensor(part) for part in zip(*tuples[:len(tuples) // 2]))


def test_a_miner_of_cascades_is_handed_the_tuples_of_the_section_before():
    miners = {f"tuple_miner_{i}": Handed() for i in range(3)}
    trainer = cascaded((), (1, 2, 3), mining_funcs=miners)
    trainer.train()
    assert all(miner.handed == "reset" for miner in miners.values())
    number = len(triplets_of([0, 1, 2, 3] * 2))
    for i, loss in enumerate(trainer.loss_funcs.values()):
        assert [len(tuples[0]) for *_, tuples in loss.seen] == [number // 2 ** (i + 1)] * 2


# ---- a generator of hard negatives

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
        trainer = adversarial(loss_weights={  # g_hard_lss: that library's spelling
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
    _, labels, (a, p, n) = trainer.loss_funcs["synth_loss"].seen[0]
    assert torch.equal(labels[a], labels[p]) and (labels[a] != labels[n]).all()


def test_phases_say_which_losses_count_and_which_networks_learn():
    def hook(trainer):
        models = trainer.models.items()
        kept.append((set(trainer.losses) - {"total_loss"}, set(stepped),
                     {name for name, model in models if model.training},
                     {name for name, model in models if next(model.parameters()).grad is not None}))
        stepped.clear()

    for phases, plan in (((1, 1), [0, 1, 2, 2]), ((0, 0), [2, 2, 2, 2]), ((2, 0), [0, 0, 2, 2]),
                         ((0, 3), [1, 1, 1, 2])):
        kept, stepped = [], set()
        trainer = adversarial(phases, end_of_epoch_hook=hook)
        for name, optimizer in trainer.optimizers.items():
            optimizer.register_step_post_hook(lambda *_, name=name: stepped.add(name[:-10]))
        trainer.train(num_epochs=4)
        trainer.train(2, 2)  # a run that begins in the middle is in the phase of its epoch
        assert kept == [(PHASES[phase], *[LEARN[phase]] * 3) for phase in [*plan, plan[1]]]


def test_what_needs_no_gradient_at_the_start_gets_none_in_later_phases():
    trunk = torch.nn.Sequential(linear(3, 4), linear(4, 5, seed=1))
    trunk[0].requires_grad_(False)
    trainer = adversarial(models=adversarial().models | {"trunk": trunk}, optimizer=adam,
                          freeze_these=("classifier",))  # adam's decay would move weights as well
    rests = [trunk[0], trainer.models["classifier"]]
    before = [weights(part) for part in rests]
    trainer.train(num_epochs=4)
    assert all(map(same, before, map(weights, rests)))
    assert not any(weight.requires_grad for part in rests for weight in part.parameters())
    assert trunk[1].weight.requires_grad and not trainer.models["classifier"].training


def test_batch_normalisation_of_idle_networks_stands_still():
    trunk, counts = torch.nn.Sequential(linear(3, 5), torch.nn.BatchNorm1d(5)), []
    models = adversarial().models | {"trunk": trunk}
    for frozen in (False, True):
        adversarial((1, 1), models=models, freeze_trunk_batchnorm=frozen,
                    end_of_epoch_hook=lambda trainer: counts.append(
                        int(trunk[1].num_batches_tracked))).train(num_epochs=3)
    assert counts == [2, 2, 4, 4, 4, 4]


def test_the_adversarial_loss_is_a_copy_with_its_margin_negated():
    original, with_weights = Hinge(0.25), Hinge()
    losses = adversarial().loss_funcs | {"g_adv_loss": original}
    for _ in range(2):  # a second trainer with the same dict: the margin is not negated twice
        trainer = adversarial(loss_funcs=losses)
        assert trainer.loss_funcs["g_adv_loss"].margin == -0.25
        trainer.train(2, 2)
    assert losses["g_adv_loss"] is original and original.margin == 0.25 and not original.seen
    with_weights.beta = torch.nn.Parameter(torch.ones(()))
    for loss in (lambda *_: 0, with_weights):
        with pytest.raises(ValueError, match="g_adv_loss must be a triplet loss.*no weights"):
            adversarial(loss_funcs=losses | {"g_adv_loss": loss})


def test_every_drawn_triplet_is_valid_and_every_valid_one_is_drawn():
    for labels in ([0, 1, 0, 1], [0, 0, 0, 1], [5, 5, 7, 7, 9, 3]):
        drawn = adversarial(each=50).draw_triplets(torch.tensor(labels)).tolist()
        assert set(map(tuple, drawn)) == set(triplets_of(labels))
        counts = collections.Counter(a for a, _, _ in drawn)
        assert set(counts.values()) == {50}  # so many of each anchor that has any


# ---- views of one image


def test_augmentations_are_the_loop():
    def step(parts, data, labels, epoch):
        samples = torch.stack([view for row in data for view in (row, row + 1, -row)])
        embeddings = parts["embedder"](parts["trunk"](samples))
        return {"metric_loss": Hinge(0.5)(embeddings, torch.arange(24) // 3)}

    check_against_loop(views, step)


def test_data_and_label_setter_gives_what_the_getter_expects():
    items = [{"image": torch.full((3,), float(i)), "label": "not used"} for i in range(ROWS)]
    trainer = assemble(functools.partial(
        UnsupervisedEmbeddingsUsingAugmentations, [torch.nn.Identity(), torch.neg],
        lambda batch: {"image": batch[0], "label": batch[1]}), {"metric_loss": MeanSquare()},
        dataset=items, data_and_label_getter=lambda item: (item["image"], item["label"]))
    data, labels = trainer.next_batch()
    assert data[:4, 0].tolist() == [0, 0, 1, -1] and labels.tolist()[:4] == [0, 0, 1, 1]
    places = collate_views([(torch.ones(1), 0)] * 2, [torch.neg] * 2, tuple, tuple, 1)[1]
    assert places.tolist() == [2, 2, 3, 3]  # of the second process's items


def test_what_loading_processes_get_can_be_pickled():
    trainer = assemble(functools.partial(UnsupervisedEmbeddingsUsingAugmentations,
                                         [torch.nn.Identity()]), {"metric_loss": MeanSquare()})
    assert pickle.loads(pickle.dumps(trainer.collate_fn)).func is trainer.collate_fn.func


# ---- two streams


def test_two_streams_are_the_loop_over_all_triplets():
    triplets = [(a, p, n) for a in range(8) for p in range(8) for n in range(8)
                if a % 4 == p % 4 != n % 4]  # the anchor in one stream, the others in the second

    def step(parts, first, second, labels, epoch):
        anchors, others = (parts["embedder"](parts["trunk"](rows)) for rows in (first, second))
        return {"metric_loss": hinge_by_hand(anchors, others, triplets, 0.5)}

    trainer = check_against_loop(two_streams, step)
    _, labels, _ = trainer.loss_funcs["metric_loss"].seen[0]
    assert labels.tolist() == [0, 1, 2, 3] * 4


def test_two_streams_shift_what_a_miner_returns():
    def miner(anchors, labels, others, other_labels):
        assert torch.equal(labels, other_labels) and labels is not other_labels
        kept.append(torch.cat([anchors, others]))
        return mined

    for mined, moved in (
            (tuple(torch.tensor([[0, 3], [4, 3], [1, 0]])), [[0, 3], [12, 11], [9, 8]]),
            (([0, 3], [4, 3], [0, 2], [1, 0]), [[0, 3], [12, 11], [0, 2], [9, 8]]),
            (torch.tensor([[1, 2, 3], [4, 5, 6], [7, 0, 1]]),
             [[1, 4, 7], [10, 13, 8], [11, 14, 9]]),
            (np.array([[0, 4, 0, 1], [3, 3, 2, 0]]), [[0, 3], [12, 11], [0, 2], [9, 8]])):
        trainer, kept = two_streams(mining_funcs={"tuple_miner": miner},
                                    loss_funcs={"metric_loss": MeanSquare()}), []
        trainer.train()
        embeddings, _, tuples = trainer.loss_funcs["metric_loss"].seen[0]
        assert torch.equal(kept[0], embeddings) and [part.tolist() for part in tuples] == moved


# ---- miners that return nothing

TRIPLET = (torch.tensor([0]), torch.tensor([4]), torch.tensor([1]))
NOTHING = {"tensors": (torch.empty(0, dtype=torch.long),) * 3, "a list": [], "None": None,
           "a tensor": torch.empty(0, 3, dtype=torch.long),
           "a mask": torch.zeros(8, dtype=torch.bool)}


def now_and_then(nothing, something, empty=(1, 2)):
    """A miner that returns nothing in some of its calls, counted from 0."""
    values = iter([nothing if i in empty else something for i in range(9)])
    return lambda *_: next(values)


@pytest.mark.parametrize("name, miner, kind, own", [
    *(("MetricLossOnly", "tuple_miner", kind, {}) for kind in NOTHING if kind != "a mask"),
    *(("MetricLossOnly", "subset_batch_miner", kind, {}) for kind in ("None", "a mask")),
    ("TrainWithClassifier", "tuple_miner", "tensors", {}),
    ("CascadedEmbeddings", "tuple_miner_0", "a list",
     {"classifiers": (), "sizes": (2,), "loss_funcs": {"metric_loss_0": Hinge(9)}}),
    ("TwoStreamMetricLoss", "tuple_miner", "None", {}),
    ("DeepAdversarialMetricLearning", "tuple_miner", "a tensor", {"phases": (9, 0)})])
def test_a_miner_that_returns_nothing_skips_the_step(name, miner, kind, own):
    kept, losses, clipped = [], [], []

    def hook(trainer):
        kept.append(all_weights(trainer))
        losses.append(dict(trainer.losses))

    something = torch.arange(8) if miner == "subset_batch_miner" else TRIPLET
    trainer = EVERY_TRAINER[name](  # adam's momentum and decay rest as well
        mining_funcs={miner: now_and_then(NOTHING[kind], something)}, end_of_iteration_hook=hook,
        gradient_clippers={"trunk_grad_clipper": lambda: clipped.append(1)}, optimizer=adam, **own)
    trainer.train(num_epochs=2)  # two iterations each, of which the second and the third are empty
    assert trainer.skipped_steps == 2 and len(kept) == 4 and len(clipped) == 2
    assert same(kept[0], kept[1]) and same(kept[1], kept[2]) and not same(kept[2], kept[3])
    assert set(losses[0]) <= set(losses[1]) == {*trainer.loss_weights, "total_loss"}
    assert not any(losses[1].values()) and losses[0]["total_loss"] and losses[3]["total_loss"]


def test_a_batch_of_one_class_has_no_triplets_and_is_skipped():
    one_class = torch.zeros(ROWS, dtype=torch.long)
    for make, streams in ((functools.partial(adversarial, (0, 9)), 1), (two_streams, 2)):
        trainer = make(dataset=TensorDataset(*four_classes(streams).tensors[:-1], one_class))
        trainer.train()
        assert trainer.skipped_steps == 2 and trainer.losses["total_loss"] == 0


# ---- saving and going on


def scheduled(make, **changes):
    """A trainer with Adam, a schedule by epoch and, for the trunk, one by plateau."""
    trainer = make(optimizer=adam, **changes)
    trainer.lr_schedulers = {
        f"{name.removesuffix('optimizer')}scheduler_by_epoch": lr_scheduler.ExponentialLR(
            optimizer, 0.9) for name, optimizer in trainer.optimizers.items()}
    trainer.lr_schedulers["trunk_scheduler_by_plateau"] = lr_scheduler.ReduceLROnPlateau(
        trainer.optimizers["trunk_optimizer"], "max", 0.5, patience=1)
    return trainer


@pytest.mark.parametrize("name", EVERY_TRAINER)
def test_a_trainer_goes_on_from_a_file_as_if_it_had_never_stopped(name, tmp_path):
    def hook(trainer):
        trainer.step_lr_plateau_schedulers(-trainer.epoch)

    whole = scheduled(EVERY_TRAINER[name], end_of_epoch_hook=hook)
    torch.manual_seed(1)
    whole.train(1, 2)
    auxiliaries.save_checkpoint(tmp_path / "state", whole.state_dict())
    torch.manual_seed(2)
    whole.train(3, 4)

    fresh = scheduled(EVERY_TRAINER[name], end_of_epoch_hook=hook)
    with torch.no_grad():
        for weight in itertools.chain(*(part.parameters() for _, part in fresh.modules())):
            weight.add_(torch.randn_like(weight))
    fresh.load_state_dict(auxiliaries.load_checkpoint(tmp_path / "state", ["epoch"]))
    assert fresh.epoch == 2
    torch.manual_seed(2)
    fresh.train(fresh.epoch + 1, 4)
    assert fresh.losses == whole.losses and same(all_weights(fresh), all_weights(whole))
    # every epoch times 0.9; the metric falls from epoch 2 on, so epoch 3 halves the trunk's rate
    rates = rates_of(fresh)
    assert rates == rates_of(whole) and rates[0] == pytest.approx(0.01 * 0.9 ** 4 / 2)
    assert rates[1] > rates[0]


class Skipping(Shuffled):
    """Shuffled, and leaves out itself the batches that were taken, of four rows each."""

    skip = 0

    def __iter__(self):
        taken, self.skip = self.skip, 0
        return iter(list(super().__iter__())[BATCH * taken:])


class Drawn(Epochs):
    """Rows drawn from torch's global generator, as random crops are."""

    def __getitem__(self, i):
        return torch.rand(3), i


@pytest.mark.parametrize("sampler", [lambda: None, Shuffled, Skipping])
def test_a_trainer_goes_on_after_any_iteration(sampler):
    """Three iterations an epoch, four batches a pass: within both, and at the end of either."""
    def make():
        trunk = torch.nn.Sequential(linear(), torch.nn.Dropout(0.5))
        return make_trainer(models={"trunk": trunk}, sampler=sampler(), iterations_per_epoch=3,
                            dataset=Drawn())

    whole = make()
    torch.manual_seed(3)
    whole.train(num_epochs=3)
    for number in range(1, 9):
        first, calls = make(), []
        first.between_iterations_hook = lambda trainer: calls.append(1) or len(calls) < number
        torch.manual_seed(3)
        first.train(num_epochs=3)
        second, generators = make(), auxiliaries.random_state()
        second.load_state_dict(copy.deepcopy(first.state_dict()))
        auxiliaries.restore_random_state(generators)
        second.train(second.epoch + 1, 3)
        assert len(seen(first)) == number and seen(first) + seen(second) == seen(whole)
        assert same(all_weights(second), all_weights(whole)), number


def test_scale_of_fp16_and_skipped_steps_come_back_and_a_loss_without_a_state_is_left_out():
    trainer, other = (make_trainer(
        grad_scaler=half_scaler(), mining_funcs={"tuple_miner": now_and_then([], TRIPLET, (0,))},
        loss_funcs={"metric_loss": lambda rows, *_: rows.sum()}) for _ in range(2))
    trainer.train()
    trainer.grad_scaler.update(2.)
    state = trainer.state_dict()
    assert list(state["models"]) == ["trunk", "embedder"] and state["loss_funcs"] == {}
    other.load_state_dict(state)
    assert other.skipped_steps == 1 and other.grad_scaler.get_scale() == 2


def test_a_foreign_state_is_refused():
    trainer = scheduled(with_embedder)
    trainer.load_state_dict(trainer.state_dict())
    for group, name, foreign in (
            ("models", "trunk", linear(3, 7).state_dict()), ("models", "trunk", None),
            ("optimizers", "trunk_optimizer", {"state": {}, "param_groups": []}),
            ("lr_schedulers", "trunk_scheduler_by_epoch", None)):
        state = trainer.state_dict()
        if foreign is None:  # the part is not in the state
            del state[group][name]
        else:
            state[group][name] = foreign
        words = f"the saved {group} are (?!.*{name}.*, the trainer's).*{name}"
        with pytest.raises((ValueError, RuntimeError), match=words if foreign is None else None):
            trainer.load_state_dict(state)


# ---- validation


def measuring(values, **options):
    """A Validation that measures the given values in turn, as its first metric."""
    values = iter(values)
    return Validation(lambda trainer: {"recall@1": next(values), "nmi": 0.5}, **options)


def stand_in(epoch=0, last_epoch=0):
    """As much of a trainer as a Validation needs."""
    return SimpleNamespace(epoch=epoch, last_epoch=last_epoch, idle=(), set_to_eval=lambda: None,
                           step_lr_plateau_schedulers=lambda value: None)


def test_validation_measures_every_so_many_epochs_and_after_the_last():
    for every, first, last, expected in ((1, 1, 3, [1, 2, 3]), (2, 1, 5, [2, 4, 5]),
                                         (3, 4, 9, [6, 9]), (7, 1, 2, [2]), (1, 3, 2, [])):
        validation = measuring([0.5] * 9, every=every)
        make_trainer(end_of_epoch_hook=validation, iterations_per_epoch=1).train(first, last)
        assert [row["epoch"] for row in validation.rows] == expected


def test_epochs_in_which_the_trunk_rests_are_not_measured():
    validation = measuring([0.1, 0.1, 0.2, 0.3], patience=2)
    adversarial((1, 3), end_of_epoch_hook=validation).train(num_epochs=6)
    assert [row["epoch"] for row in validation.rows] == [1, 5, 6]


def test_validation_keeps_rows_and_knows_the_metric_that_counts():
    measured = [{"recall@1": 0.1, "nmi": 0.4}, {"recall@1": 0.9, "nmi": 0.2},
                {"recall@1": 0.3, "nmi": 0.6}]
    for metric, name, epoch in ((None, "recall@1", 2), ("nmi", "nmi", 3)):
        validation = Validation(lambda trainer: measured[trainer.epoch - 1], metric)
        make_trainer(end_of_epoch_hook=validation).train(num_epochs=3)
        assert validation.rows == [{"epoch": i, **metrics} for i, metrics in enumerate(measured, 1)]
        assert validation.name() == name and validation.best()["epoch"] == epoch


def test_the_best_row_is_the_first_of_equals_and_epoch_0_only_alone():
    for values, best in (({2: -3, 4: -2, 5: -2}, 4), ({0: 0.9}, 0), ({0: 0.9, 1: 0.1, 2: 0.2}, 2),
                         ({1: math.nan, 2: -5, 3: math.nan}, 2)):
        rows = [{"epoch": epoch, "recall@1": value} for epoch, value in values.items()]
        assert measuring([], rows=rows).best() == {"epoch": best, "recall@1": values[best]}


def end_by_hand(values, patience):
    """The number of values after which so many in a row were no gain; None if they never are."""
    best, waited = -math.inf, 0
    for count, value in enumerate(values, 1):
        best, waited = (value, 0) if value > best else (best, waited + 1)
        if waited == patience:
            return count
    return None


@pytest.mark.parametrize("patience", [None, 1, 3])
def test_patience_ends_exactly_on_time(patience):
    generator, early = random.Random(patience or 0), 0
    for untrained in [False, True] * 50:
        values = [generator.randrange(6) for _ in range(12)]
        end = end_by_hand(values, patience)
        validation = measuring(([9] if untrained else []) + values, patience=patience)
        if untrained:  # however good the untrained network is, it does not count
            assert validation(stand_in()) is None and not validation.is_over()
        cut = generator.randrange(1, 13)
        for epoch in range(1, (end or 12) + 1):
            if epoch == cut:  # a run that goes on with the rows of another decides the same
                validation = measuring(values[epoch - 1:], patience=patience, rows=validation.rows)
            returned = False if epoch == end else None
            assert validation(stand_in(epoch, 12)) is returned, (values, epoch)
            assert validation.is_over() == (epoch == end)
        early += end is not None
    assert (early > 0) == (patience is not None)


def test_a_last_epoch_off_the_schedule_does_not_count_for_patience():
    values = [0.5, 0.4, 0.3, 0.2, 0.1]
    broken = measuring(values[:2], every=2, patience=2)
    make_trainer(end_of_epoch_hook=broken).train(num_epochs=3)
    assert [row["epoch"] for row in broken.rows] == [2, 3] and not broken.is_over()
    on = measuring(values[2:], every=2, patience=2, rows=broken.rows)
    trainer = make_trainer(end_of_epoch_hook=on)
    trainer.train(4, 20)
    assert [row["epoch"] for row in on.rows] == [2, 3, 4, 6] and trainer.epoch == 6


def test_validation_steps_plateau_schedulers_with_the_metric_that_counts():
    """Neither for the untrained network nor for a last epoch that is off the schedule."""
    validation, stepped = measuring([0.7, 0.2, 0.4, 0.3], every=2), []
    for epoch in range(6):
        trainer = stand_in(epoch, last_epoch=5)
        trainer.step_lr_plateau_schedulers = stepped.append
        validation(trainer)
    assert [row["epoch"] for row in validation.rows] == [0, 2, 4, 5] and stepped == [0.2, 0.4]


def test_the_checkpoint_holds_the_best_epoch_and_training_goes_on_from_there(tmp_path):
    path, values, kept = tmp_path / "best", [0.2, 0.7, 0.7, 0.3], []

    def make(values, **options):
        return scheduled(metric_alone, end_of_epoch_hook=in_turn(
            measuring(values, **options), lambda trainer: kept.append(all_weights(trainer))))

    torch.manual_seed(0)
    make(values, checkpoint=path).train(num_epochs=4)
    state = torch.load(path, weights_only=True)
    assert state["epoch"] == 2
    assert [row["recall@1"] for row in state["validation_rows"]] == [0.2, 0.7]
    assert state["lr_schedulers"]["trunk_scheduler_by_plateau"]["best"] == 0.7  # stepped already
    fresh = make(values[2:], checkpoint=path, rows=state["validation_rows"])
    fresh.load_state_dict(state)
    assert same(all_weights(fresh), kept[1]) and not same(kept[1], kept[2])
    fresh.train(fresh.epoch + 1, 4)
    assert same(kept[2], kept[4]) and same(kept[3], kept[5])
    assert torch.load(path, weights_only=True)["epoch"] == 2  # the best still
    assert [file.name for file in tmp_path.iterdir()] == ["best"]


def test_a_metric_that_is_not_measured(tmp_path):
    validation = Validation(lambda trainer: {"nmi": 0.5, "f1": 0.2}, "recall@1",
                            checkpoint=tmp_path / "best")
    with pytest.raises(ValueError, match="must give recall@1; .* gives nmi, f1$"):
        make_trainer(end_of_epoch_hook=validation).train()
    assert validation.rows == [] and not list(tmp_path.iterdir())


def test_hooks_in_turn_are_all_called_and_end_training_if_one_does():
    for values, returned in (([None, None], None), ([False, None], False), ([None, False], False),
                             ([0, np.False_, ""], None)):
        hooks = [unittest.mock.Mock(return_value=value) for value in values]
        assert in_turn(*hooks)("trainer") is returned
        for hook in hooks:
            hook.assert_called_once_with("trainer")


# ---- the diagnosis of the training batches


def test_diagnosis_against_loops_over_the_batches():
    """d_ap and d_an over all pairs of all batches, the other numbers means over batches."""
    loss = TripletLoss(sampling="random")
    diagnosis = Diagnosis(loss)
    generator = torch.Generator().manual_seed(0)
    batches = [(torch.randn(len(labels), 3, generator=generator, requires_grad=True),
                torch.tensor(labels)) for labels in ([0, 0, 1, 2], [0, 1, 1, 1, 0])]
    apart, active, variances, sq_lengths = {True: [], False: []}, [], [], []
    for rows, labels in batches:
        value = loss(rows, labels)
        assert value.requires_grad and not loss.active.requires_grad
        active.append(float(loss.active))
        rows = rows.detach().double()
        for i, j in itertools.permutations(range(len(rows)), 2):
            apart[bool(labels[i] == labels[j])].append(float((rows[i] - rows[j]).norm()))
        variances.append(float((rows - rows.mean(0)).square().sum(1).mean()))
        sq_lengths.append(float(rows.square().sum(1).mean()))
    loss.eval()(*batches[0])  # an evaluation does not count
    row = diagnosis.row()
    assert list(row) == list(Diagnosis.NAMES) and row == pytest.approx(
        {"active": np.mean(active), "d_ap": np.mean(apart[True]), "d_an": np.mean(apart[False]),
         "std": np.mean(variances) ** 0.5, "length": np.mean(sq_lengths) ** 0.5}, rel=1e-5)
    assert diagnosis.row() == {}  # it starts anew


def test_diagnosis_of_batches_that_say_little():
    loss = MeanSquare()  # which does not say how many tuples are active
    diagnosis = Diagnosis(loss)
    loss(torch.ones(3, 2), torch.tensor([0, 1, 2]))
    row = diagnosis.row()
    assert row == {"d_an": 0.0, "std": 0.0, "length": pytest.approx(2 ** 0.5)}
    loss(torch.ones(3, 2), torch.tensor([1, 1, 1]))
    assert "d_an" not in diagnosis.row()
    for given, collapsed in ((row, True), ({}, False), ({"std": math.nan, "length": 1.0}, True),
                             ({"std": 0.11, "length": 1.0}, False),
                             ({"std": 0.09, "length": 1.0}, True)):
        assert Diagnosis.has_collapsed(given) == collapsed


# ---- the options of the optimisation


def selected(*options, classes=4, arch="convnet"):
    """The trainer that main builds for a few random images with these options."""
    opt = main.parse_options(["--dataset", "glyphs", "--gpu", "-1", "--kernels", "0", "--bs", "8",
                              "--image_size", "16", "--embed_dim", "8", "--loss", "proxyanchor",
                              "--arch", arch, "--not_pretrained", *options])
    labels = [i // 4 for i in range(4 * classes)]
    pixels = np.random.default_rng(0).integers(0, 255, (len(labels), 16, 16), dtype=np.uint8)
    split = datasets.Split(pixels, labels, [str(label) for label in range(classes)])
    train_set = images.ImageDataset(split, images.fit_transforms(16)[0])
    trunk, embedder = netlib.network_select(opt, True)
    return trainer_select(opt, trunk, embedder, functools.partial(
        losses.loss_select, opt, classes), train_set, samplers.batch_sampler_select(labels, opt),
        torch.device("cpu"))


def changed_parts(trainer, epoch):
    """The parts, with their running statistics, that an epoch changes."""
    before = {name: copy.deepcopy(part.state_dict()) for name, part in trainer.modules()}
    trainer.train_epoch(epoch)
    return {name for name, part in trainer.modules() for key, value in part.state_dict().items()
            if not torch.equal(value, before[name][key])}


def test_the_trunk_rests_while_the_rest_warms_up_and_where_it_is_frozen():
    trainer = selected("--warm_up", "1")
    assert changed_parts(trainer, 1) == {"embedder", "metric_loss"}
    assert all(weight.grad is None for weight in trainer.models["trunk"].parameters())
    assert changed_parts(trainer, 2) == {"trunk", "embedder", "metric_loss"}
    assert changed_parts(selected("--freeze", "trunk"), 1) == {"embedder", "metric_loss"}


@pytest.mark.parametrize("arch,frozen", [("convnet", ["layers.0", "layers.1"]),
                                         ("resnet18", ["conv1", "bn1"])])
def test_layers_are_frozen_by_name(arch, frozen):
    trunk = selected("--freeze", "stem", arch=arch, *["--image_size", "32"]).models["trunk"]
    for name, weight in trunk.backbone.named_parameters():
        assert weight.requires_grad == (name.rpartition(".")[0] not in frozen)
    with pytest.raises(ValueError, match="--freeze layer9: .*trunk, stem, patch_embed"):
        selected("--freeze", "layer9", arch=arch)


def test_optimisers_are_those_of_the_options():
    for options, kind, values in (
            (("--optim", "adamw", "--adam_eps", "0.1"), torch.optim.AdamW, {"eps": 0.1}),
            (("--optim", "sgd", "--nesterov"), torch.optim.SGD,
             {"momentum": 0.9, "nesterov": True}),
            ((), torch.optim.Adam, {"eps": 1e-8})):
        for name, optimizer in selected(*options).optimizers.items():
            group = optimizer.param_groups[0]
            decay = 0 if name == "metric_loss_optimizer" else 4e-4
            assert type(optimizer) is kind and group["weight_decay"] == decay
            assert values.items() <= group.items()
    decays = {weight.dim() < 2: group["weight_decay"]
              for group in selected("--no_decay_1d").optimizers["trunk_optimizer"].param_groups
              for weight in group["params"]}
    assert decays == {True: 0, False: 4e-4}


def test_gradients_are_clipped_by_the_norm_of_all_networks_or_by_value():
    trainer = selected("--clip_norm", "0.5", "--clip_value", "0.01")
    networks = [weight for model in trainer.models.values() for weight in model.parameters()]
    own = list(trainer.loss_funcs["metric_loss"].parameters())
    for weight in networks + own:
        weight.grad = torch.ones_like(weight)
    trainer.gradient_clippers["embedder_grad_clipper"]()
    norm = torch.cat([weight.grad.double().flatten() for weight in networks]).norm()
    assert float(norm) == pytest.approx(0.5, rel=1e-3)
    trainer.gradient_clippers["trunk_grad_clipper"]()
    assert max(float(weight.grad.abs().max()) for weight in networks + own) == pytest.approx(0.01)


def test_rates_rise_over_iterations_and_fall_along_a_cosine():
    trainer = selected("--lr_rise", "1", "--scheduler", "cosine", "--n_epochs", "3", "--lr", "1")
    rates, optimizer = [], trainer.optimizers["embedder_optimizer"]
    trainer.end_of_iteration_hook = lambda _: rates.append(optimizer.param_groups[0]["lr"])
    assert trainer.iterations_per_epoch == 2
    trainer.train(num_epochs=3)
    assert rates == pytest.approx([0.001, 0.5005, 0.75, 0.75, 0.25, 0.25])
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0, abs=1e-9)
