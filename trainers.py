"""The trainers: what happens in one training step, and in which order.

BaseTrainer owns the loop, the batches and everything around a step; a trainer class says how a
batch becomes losses (calculate_loss) and which models and losses it knows. Constructor and
dictionaries are those of the trainers of pytorch-metric-learning, so a script written for them
runs here. Hooks are where a caller evaluates, logs and saves; those
that most callers want, Validation and Diagnosis, stand at the end. trainer_select alone knows
options.
"""

import copy
import functools
import math
import operator
import types
import warnings

import numpy as np
import torch
import torch.nn.functional as F
from torch.optim import lr_scheduler

import auxiliaries
from auxiliaries import number
from samplers import Sampler, draw_columns, pairwise_sq_distances


def described(item):
    """A batch's type and, of a tuple or list, the types in it, for an error message."""
    parts = f" of {', '.join(type(part).__name__ for part in item)}" * isinstance(
        item, (tuple, list))
    return type(item).__name__ + parts


def identity(item):
    """The default data_and_label_getter and data_and_label_setter."""
    return item


class NonFiniteLoss(FloatingPointError):
    """A loss, gradient or weight that is not finite; epoch and iteration (from 0) say where."""

    def __init__(self, message, epoch, iteration):
        super().__init__(message)
        self.epoch, self.iteration = epoch, iteration


class NothingMined(Exception):
    """A miner returned no index for a batch; the trainer skips the step."""


def not_empty(indices):
    """Returns a miner's indices, a tensor or a tuple of tensors; NothingMined if none."""
    if indices is None:
        raise NothingMined
    parts = indices if isinstance(indices, (tuple, list)) else (indices,)
    if all(hasattr(part, "__len__") and not len(part) for part in parts):
        raise NothingMined
    return indices


def greatest(tensors):
    """The greatest absolute value in each of the tensors, NaN where one is in it -> scalars.

    Nothing waits for the device.
    """
    return torch._foreach_norm(tensors, math.inf) if tensors else ()


class BaseTrainer:
    """The loop around a training step; subclasses say what a step computes.

    models: {"trunk": module, "embedder": module (optional)}. optimizers:
    {"<model or loss>_optimizer": optimizer}. loss_funcs: {"metric_loss": callable(embeddings,
    labels, indices_tuple)}. dataset: items (data, labels). mining_funcs: {"subset_batch_miner":
    (embeddings [B, D], labels [B]) -> indices to keep, "tuple_miner": the same -> indices_tuple
    for the loss}. iterations_per_epoch: an epoch is that many iterations, the data going on across
    epochs; None: one pass over the data loader. data_device: where batches go; None: a GPU if
    there is one. dtype: floating type that the data is converted to. loss_weights: {loss: factor};
    without it all are 1. sampler: a torch Sampler or BatchSampler (then batch_size is its own);
    one with set_epoch is told the number of each pass over it, as is the dataset. collate_fn,
    dataloader_num_workers: of torch's DataLoader.
    lr_schedulers: {"<model or loss>_scheduler_by_iteration|by_epoch|by_plateau": scheduler}.
    gradient_clippers: {"<model or loss>_grad_clipper": callable()}, called before the optimizers
    step. freeze_these: models or losses without gradients, in eval mode, never stepped.
    freeze_trunk_batchnorm: the trunk's batch normalisation stays in eval mode, so its running
    statistics stay. label_hierarchy_level: the column of labels [N, levels] that counts.
    data_and_label_getter: item of the loader -> (data, labels). dataset_labels with
    set_min_label_to_zero: labels, ints or strings, become their rank among dataset_labels.
    end_of_iteration_hook, end_of_epoch_hook: callable(trainer); training ends early when the
    latter returns exactly False. between_iterations_hook: callable(trainer), called where
    state_dict() is a state to go on from, after all that belongs to an iteration; exactly False
    ends the training there. grad_scaler: torch.amp.GradScaler, for float16 networks.

    Where torch.distributed is initialised each process gives its share of every batch (the dataset
    or sampler sees to it): the trunk runs on the share, in DistributedDataParallel, and its
    features and the labels are gathered, so that embedder, miners and losses see the whole batch
    in every process.

    Hooks can read losses (numbers as 0-dimensional tensors, by name, each times its weight, and
    "total_loss"), epoch, iteration (from 0), get_global_iteration() and every argument under its
    name; models without an embedder have the identity as one. Raises ValueError for dictionary
    keys that are missing or unknown.
    """

    model_names = ("trunk", "embedder")
    required_models = ("trunk",)
    loss_names = ("metric_loss",)
    required_losses = ("metric_loss",)
    # The trainer's own options; how many views of an image it needs; whether it learns from
    # classes, draws positives itself, takes losses of triplets alone, of unit norm alone.
    takes = ()
    views = 1
    uses_classes, draws_positives, of_triplets, of_unit_norm = True, False, False, False
    regularisers = ()  # losses without a function in loss_funcs
    miner_names = ("subset_batch_miner", "tuple_miner")

    STATE_GROUPS = ("models", "loss_funcs", "optimizers", "lr_schedulers")

    def __init__(self, models, optimizers, batch_size, loss_funcs, dataset, mining_funcs=None,
                 iterations_per_epoch=None, data_device=None, dtype=None, loss_weights=None,
                 sampler=None, collate_fn=None, lr_schedulers=None, gradient_clippers=None,
                 freeze_these=(), freeze_trunk_batchnorm=False, label_hierarchy_level=0,
                 dataloader_num_workers=2, data_and_label_getter=None, dataset_labels=None,
                 set_min_label_to_zero=False, end_of_iteration_hook=None, end_of_epoch_hook=None,
                 between_iterations_hook=None, grad_scaler=None):
        self.check_dicts(models=models, optimizers=optimizers, loss_funcs=loss_funcs,
                         mining_funcs=mining_funcs, loss_weights=loss_weights,
                         lr_schedulers=lr_schedulers, gradient_clippers=gradient_clippers)
        # Without an embedder hooks find the identity, as in that library.
        self.models = {**models, "embedder": models.get("embedder", torch.nn.Identity())}
        self.optimizers = optimizers
        self.batch_size = batch_size
        self.loss_funcs = loss_funcs
        self.dataset = dataset
        self.mining_funcs = mining_funcs or {}
        self.iterations_per_epoch = iterations_per_epoch or None
        self.data_device = data_device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.dtype = dtype
        self.loss_weights = self.complete_loss_weights(loss_weights)
        self.sampler = sampler
        self.lr_schedulers = lr_schedulers or {}
        self.gradient_clippers = gradient_clippers or {}
        self.freeze_these = freeze_these
        self.freeze_trunk_batchnorm = freeze_trunk_batchnorm
        self.label_hierarchy_level = label_hierarchy_level
        self.dataloader_num_workers = dataloader_num_workers
        self.data_and_label_getter = data_and_label_getter or identity
        self.collate_fn = collate_fn or self.default_collate()
        self.dataset_labels = dataset_labels
        self.set_min_label_to_zero = set_min_label_to_zero
        self.end_of_iteration_hook = end_of_iteration_hook or (lambda trainer: None)
        self.end_of_epoch_hook = end_of_epoch_hook or (lambda trainer: None)
        self.between_iterations_hook = between_iterations_hook or (lambda trainer: None)
        self.grad_scaler = grad_scaler or torch.amp.GradScaler(enabled=False)
        self.losses = {}
        self.stepped_schedulers, self.all_weights = set(), None
        self.unchecked = []  # see look
        self.skipped_steps = 0
        self.idle = ()  # models that do not learn at present
        self.epoch = self.iteration = self.last_epoch = 0
        self.epochs_done = self.iterations_done = 0  # whole epochs, and iterations of the next one
        self.check_keys()
        self.label_ranks = self.rank_labels()
        self.loader = self.make_loader()
        if "subset_batch_miner" in self.mining_funcs and auxiliaries.num_ranks() > 1:
            raise ValueError("a subset_batch_miner works in one process only, not under torchrun")
        self.find_lengths()
        self.batches, self.goes_on = None, False
        self.place = {"pass": 0, "taken": 0, "seeds": []}  # see state_dict
        self.shared_trunk = self.share_trunk()

    def train(self, start_epoch=1, num_epochs=1):
        """Trains from epoch start_epoch to epoch num_epochs, both included and counted from 1.

        After load_state_dict it goes on within the epoch and the pass over the data of that state.
        """
        if not self.goes_on:
            self.batches, self.iterations_done = None, 0
            self.place = {"pass": start_epoch - 1, "taken": 0, "seeds": []}
        self.last_epoch = num_epochs
        for epoch in range(start_epoch, num_epochs + 1):
            if self.train_epoch(epoch) is False or self.end_of_epoch_hook(self) is False:
                break

    def train_epoch(self, epoch):
        """Trains for the epoch of this number, or for what is left of it after load_state_dict.

        Returns False where between_iterations_hook did, which ends the training there.
        """
        self.epoch = epoch
        if self.goes_on:
            self.go_on_with_pass(self.place)
        self.goes_on = False
        self.set_to_train()
        for self.iteration in range(self.iterations_done, self.iterations_per_epoch):
            self.training_step()
            self.end_of_iteration_hook(self)
            self.step_schedulers("_scheduler_by_iteration")
            self.iterations_done = self.iteration + 1
            if self.between_iterations_hook(self) is False:
                self.goes_on = True
                return False
        self.check_weights()
        self.step_schedulers("_scheduler_by_epoch")
        self.epochs_done, self.iterations_done = epoch, 0
        return None

    def training_step(self):
        """One batch: forward, backward, clip, step.

        Where a miner returns nothing, or a loss nothing to learn from, the step is skipped and
        counted in skipped_steps. Raises NonFiniteLoss where loss or gradient is not finite.
        """
        self.zero_gradients()
        try:
            data, labels = self.next_batch()                      # on the device
            losses = self.calculate_loss(data, labels)            # {name: scalar}
        except NothingMined:
            return self.skip_step()
        except FloatingPointError as error:                       # embeddings are not finite
            self.refuse(f"{error} in", self.iteration, error)
        total = sum(self.loss_weights[name] * loss for name, loss in losses.items())
        self.remember(losses, total)
        if not total.requires_grad:
            return self.skip_step(total)
        self.grad_scaler.scale(total).backward()
        self.average_gradients()                                  # over processes
        self.look(total)                                          # for NaN, now and then
        learning = self.learning_optimizers()
        self.unscale(learning)
        for clip in self.gradient_clippers.values():
            clip()
        for optimizer in learning:
            self.grad_scaler.step(optimizer)
        if learning:
            self.grad_scaler.update()

    def next_batch(self):
        """The next batch, on the device, thinned by the subset_batch_miner -> (data, labels)."""
        item = next(self.batches, None) if self.batches is not None else None
        self.place["taken"] += item is not None
        if item is None:
            self.start_pass()
            item = next(self.batches, None)
            if item is None:
                raise ValueError("the data loader gives no batch: the sampler is empty or shorter "
                                 f"than batch_size {self.batch_size}")
            self.place["taken"] = 1
        data, labels = self.unpack(item)
        labels = self.process_labels(labels).to(self.data_device, non_blocking=True)
        labels = auxiliaries.gather_rows(labels)
        if "subset_batch_miner" in self.mining_funcs:
            data, labels = self.thin_batch(data, labels)
        return data, labels

    def calculate_loss(self, data, labels):
        """data [B, ...], labels [B] -> {loss name: scalar}; each trainer's own."""
        raise NotImplementedError

    def compute_embeddings(self, data):
        """data [B, ...] -> embeddings [B, D]: the trunk, then the embedder."""
        return self.embed_features(self.compute_features(data))

    # What a step calls

    def compute_features(self, data):
        """data [B, ...] -> features [B, F] of the trunk.

        In a training step of several processes: their shares of data -> the batch's features.
        """
        if auxiliaries.num_ranks() == 1 or not torch.is_grad_enabled():
            return self.models["trunk"](data)
        return GatherFeatures.apply(self.shared_trunk(data))

    def embed_features(self, features):
        """Features of the trunk [B, F] -> embeddings [B, D]."""
        return self.models["embedder"](features)

    def mine_tuples(self, embeddings, labels, miner="tuple_miner"):
        """The miner's index tuples for this batch, or None without that miner."""
        if miner not in self.mining_funcs:
            return None
        return not_empty(self.mining_funcs[miner](embeddings, labels))

    @torch.no_grad()
    def thin_batch(self, data, labels):
        """Keeps what the subset_batch_miner chooses, looking at embeddings of eval mode."""
        self.set_to_eval()
        indices = self.mining_funcs["subset_batch_miner"](self.compute_embeddings(data), labels)
        self.set_to_train()
        if not len(labels[not_empty(indices)]):  # none where a mask is False everywhere
            raise NothingMined
        return data[indices], labels[indices]

    def unpack(self, item):
        """An item of the loader -> (data on the device, labels as they are).

        data: a tensor, or what gives one by the same to(device, dtype, non_blocking).
        """
        item = self.data_and_label_getter(item)
        if not isinstance(item, (tuple, list)) or len(item) != 2 or not hasattr(item[0], "to"):
            raise ValueError("a batch must be (data, labels), data a tensor; it is "
                             f"{described(item)}. A data_and_label_getter can take it apart")
        data, labels = item
        return data.to(self.data_device, self.dtype, non_blocking=True), labels

    def zero_gradients(self):
        """No weight has a gradient."""
        for weight in self.weights():
            weight.grad = None

    def weights(self):
        """All parameters: of models and losses, and whatever else the optimizers hold."""
        if self.all_weights is None:
            modules = [part for _, part in self.parts() if isinstance(part, torch.nn.Module)]
            held = [group["params"] for optimizer in self.optimizers.values()
                    for group in optimizer.param_groups]
            self.all_weights = list(dict.fromkeys(
                weight for weights in (*(module.parameters() for module in modules), *held)
                for weight in weights))
        return self.all_weights

    def skip_step(self, total=None):
        """Counts a step without anything to learn; ValueError if it never will be.

        total: the loss, where there is one; zero is some losses' answer to a batch without tuples.
        """
        if total is None:
            self.losses = dict.fromkeys((*self.loss_weights, "total_loss"),
                                        torch.zeros((), device=self.data_device))
        elif total != 0 or not any(weight.requires_grad for weight in self.weights()):
            raise ValueError(f"there is nothing to learn: the loss, {float(total)}, depends on no "
                             "weight that is not frozen (freeze_these: "
                             f"{', '.join(self.freeze_these) or 'none'})")
        self.skipped_steps += 1

    def remember(self, losses, total):
        """Keeps the losses, weighted, and their sum for hooks; nothing waits for the device."""
        self.losses = {name: self.loss_weights[name] * loss.detach()
                       for name, loss in losses.items()}
        self.losses["total_loss"] = total.detach()

    def average_gradients(self):
        """Makes the gradients of all but the trunk, which are equal up to rounding, equal."""
        if auxiliaries.num_ranks() == 1:
            return
        of_trunk = {id(weight) for weight in self.models["trunk"].parameters()}
        gradients = [weight.grad for weight in self.weights()
                     if weight.grad is not None and id(weight) not in of_trunk]
        if gradients:
            flat = torch.cat([gradient.flatten() for gradient in gradients])
            torch.distributed.all_reduce(flat)
            parts = flat.div_(auxiliaries.num_ranks()).split([g.numel() for g in gradients])
            for gradient, part in zip(gradients, parts):
                gradient.copy_(part.view_as(gradient))

    def learning_optimizers(self):
        """The optimizers of what is neither frozen nor at rest."""
        learning = [optimizer for name, optimizer in self.optimizers.items()
                    if name.removesuffix("_optimizer") not in (*self.freeze_these, *self.idle)]
        if self.grad_scaler.is_enabled():  # which refuses to step where there is no gradient
            learning = [optimizer for optimizer in learning if any(
                weight.grad is not None for group in optimizer.param_groups
                for weight in group["params"])]
        return learning

    def unscale(self, learning):
        """Under fp16 the gradients' scale is taken back; one that overflowed lets all rest.

        Without it each optimizer would look at the weights of its own alone. No wait.
        """
        if not self.grad_scaler.is_enabled():
            return
        for optimizer in learning:
            self.grad_scaler.unscale_(optimizer)
        found = [flag for optimizer in learning for flag in
                 self.grad_scaler._per_optimizer_states[id(optimizer)]["found_inf_per_device"]
                 .values()]
        for flag in found:
            flag.copy_(torch.stack(found).amax(0))

    def look(self, total):
        """Keeps a step's loss, a scalar, and greatest gradients for check_losses.

        Which it calls at once, on a GPU, where a look makes the host wait, every 20 iterations.
        """
        weights = [weight for weight in self.weights() if weight.grad is not None]
        self.unchecked.append((self.iteration, weights, torch.stack([
            total.detach(), *greatest([weight.grad for weight in weights])])))   # [1 + weights]
        if len(self.unchecked) >= (20 if total.is_cuda else 1):
            self.check_losses()

    def check_losses(self):
        """Raises NonFiniteLoss if a loss or gradient since the last check is not finite."""
        unchecked, self.unchecked = self.unchecked, []
        for iteration, weights, values in unchecked:
            loss, *gradients = values.tolist()
            if not math.isfinite(loss):
                self.refuse(f"the loss is {loss} in", iteration)
            name = self.not_finite(weights, gradients)
            # A grad_scaler leaves such steps out, and halves its scale until there are none.
            if name and not (self.grad_scaler.is_enabled() and self.grad_scaler.get_scale() >= 1):
                self.refuse(f"the gradient of {name} is not finite in", iteration)

    def check_weights(self):
        """As check_losses, and of the weights, which it may take a last step to spoil."""
        self.check_losses()
        weights = self.weights()
        values = torch.stack(greatest([weight.detach() for weight in weights])).tolist()
        name = self.not_finite(weights, values)
        if name:
            self.refuse(f"the weight {name} is not finite after", self.iteration)

    def refuse(self, what, iteration, cause=None):
        """Raises NonFiniteLoss of an iteration, from 0, of this epoch."""
        if cause is not None:
            self.check_losses()  # a step before may be what went wrong
        raise NonFiniteLoss(f"{what} epoch {self.epoch}, iteration {iteration + 1}; often the "
                            "learning rate (--lr) is too high, or a loss takes a root of 0",
                            self.epoch, iteration) from cause

    def not_finite(self, weights, values):
        """The name of the last of the weights whose value is not finite; None if all are.

        The last, since what is wrong in the loss spoils all gradients that come from it.
        """
        wrong = [weight for weight, value in zip(weights, values) if not math.isfinite(value)]
        names = {weight: f"{name}.{own}" for name, part in self.parts()
                 if isinstance(part, torch.nn.Module) for own, weight in part.named_parameters()}
        return names.get(wrong[-1], "a weight of an optimizer") if wrong else None

    def step_schedulers(self, suffix, *value):
        """Steps the schedulers whose key ends in the suffix, those of networks at rest too."""
        for name, scheduler in self.lr_schedulers.items():
            if not name.endswith(suffix):
                continue
            if name in self.stepped_schedulers:
                scheduler.step(*value)
                continue
            self.stepped_schedulers.add(name)
            # At its first step torch warns of an optimizer that has not stepped: its network
            # rests, or the first batches were skipped. The schedule counts them all the same.
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step")
                scheduler.step(*value)

    def step_lr_plateau_schedulers(self, value):
        """Hands a validation metric to the schedulers by plateau; for an end_of_epoch_hook."""
        self.step_schedulers("_scheduler_by_plateau", value)

    def get_global_iteration(self):
        """Iterations since the first epoch."""
        return self.iteration + self.iterations_per_epoch * (self.epoch - 1)

    @property
    def loss_tracker(self):
        """losses, 0 for those that rest, and loss_weights, for pytorch-metric-learning's hooks."""
        weights = {**self.loss_weights, "total_loss": 1}
        return types.SimpleNamespace(losses={**dict.fromkeys(weights, 0), **self.losses},
                                     loss_weights=weights)

    # Modes

    def parts(self):
        """Every model and loss by name."""
        return {**self.models, **self.loss_funcs}.items()

    def set_to_train(self):
        """Train mode for all that learns; eval mode and no gradients for what is frozen."""
        self.all_weights = None  # looked for anew: a hook may have changed the networks
        for name, part in self.parts():
            if not isinstance(part, torch.nn.Module):
                continue
            part.train(name not in self.freeze_these)
            if name in self.freeze_these:
                part.requires_grad_(False)
        self.freeze_batchnorm()

    def freeze_batchnorm(self):
        """With freeze_trunk_batchnorm: eval mode for the trunk's batch normalisation."""
        if self.freeze_trunk_batchnorm:
            for layer in self.models["trunk"].modules():
                if isinstance(layer, torch.nn.modules.batchnorm._BatchNorm):
                    layer.eval()

    def set_to_eval(self):
        """Eval mode for all models and losses."""
        for _, part in self.parts():
            if isinstance(part, torch.nn.Module):
                part.eval()

    # State

    def state_dict(self):
        """The states of all models, losses, optimizers and schedulers, for a file; and where.

        "epoch": whole epochs; "iteration": iterations of the next one; "place": the number of the
        pass over the data, how many of its batches were taken, and the seeds of its order.
        """
        return {"epoch": self.epochs_done, "iteration": self.iterations_done,
                "place": copy.deepcopy(self.place), "skipped_steps": self.skipped_steps,
                "grad_scaler": self.grad_scaler.state_dict(),
                **{group: {name: part.state_dict() for name, part in getattr(self, group).items()
                           if hasattr(part, "state_dict")} for group in self.STATE_GROUPS}}

    def load_state_dict(self, state):
        """Takes back what state_dict gave; ValueError names a part that is missing or misfits.

        After an error the trainer is in part the old one and in part the new one.
        """
        for group in self.STATE_GROUPS:
            parts = {name: part for name, part in getattr(self, group).items()
                     if hasattr(part, "state_dict")}
            if state[group].keys() != parts.keys():
                raise ValueError(f"the saved {group} are {', '.join(state[group]) or 'none'}, the "
                                 f"trainer's {', '.join(parts) or 'none'}")
            for name, part in parts.items():
                try:
                    part.load_state_dict(state[group][name])
                except Exception as error:  # each kind of part has its own errors
                    raise ValueError(f"the saved {name} of {group} does not fit: "
                                     f"{auxiliaries.one_line(error)}") from error
        if self.grad_scaler.is_enabled():
            self.grad_scaler.load_state_dict(state["grad_scaler"])
        self.epoch = self.epochs_done = state["epoch"]
        self.iterations_done, self.goes_on = state["iteration"], True
        self.place = copy.deepcopy(state["place"])
        self.skipped_steps = state["skipped_steps"]

    # The data

    def find_lengths(self):
        """Sets pass_length, in batches, None if it is not known, and iterations_per_epoch."""
        if (self.iterations_per_epoch or 0) < 0:
            raise ValueError(f"iterations_per_epoch {self.iterations_per_epoch}: the least value "
                             "is 1")
        try:
            self.pass_length = len(self.loader)
        except TypeError as error:
            self.pass_length = None
            if self.iterations_per_epoch is None:
                raise ValueError("the sampler or dataset has no length; iterations_per_epoch says "
                                 f"how long an epoch is ({error})") from error
        self.iterations_per_epoch = self.iterations_per_epoch or self.pass_length
        if not self.iterations_per_epoch:
            raise ValueError(f"there is no whole batch: a batch of {self.batch_size} from a "
                             f"dataset of {len(self.dataset)}, or from a sampler that gives less")

    def default_collate(self):
        """What makes a batch of items without a collate_fn; None: torch's own way."""
        return None

    def make_loader(self):
        """torch's DataLoader over the dataset.

        Its processes stay alive from epoch to epoch, unless the dataset's set_epoch would not
        reach them (they hold copies; an epoch in shared memory does).
        """
        epoch = getattr(self.dataset, "epoch", None)
        lasting = not hasattr(self.dataset, "set_epoch") or (torch.is_tensor(epoch)
                                                             and epoch.is_shared())
        options = dict(num_workers=self.dataloader_num_workers, collate_fn=self.collate_fn,
                       worker_init_fn=auxiliaries.heed_parent_alone,
                       persistent_workers=lasting and self.dataloader_num_workers > 0,
                       generator=torch.Generator(),
                       pin_memory=torch.device(self.data_device).type == "cuda"
                       and not getattr(self.dataset, "on_device", False))
        if isinstance(self.sampler, torch.utils.data.BatchSampler):
            return torch.utils.data.DataLoader(self.dataset, batch_sampler=self.sampler, **options)
        sampler = self.sampler
        if sampler is None:
            sampler = torch.utils.data.RandomSampler(self.dataset, generator=torch.Generator())
        return torch.utils.data.DataLoader(self.dataset, batch_size=self.batch_size,
                                           drop_last=True, sampler=sampler, **options)

    def start_pass(self):
        """Begins a pass over the data: sampler and dataset hear its number, generators are seeded.

        The seeds are what a plain DataLoader would draw from torch's global generator; drawing
        them here makes the numbers the same for any number of loading processes.
        """
        seeds = [int(torch.empty((), dtype=torch.int64).random_())
                 for _ in range(2 if self.sampler is None else 1)]
        self.go_on_with_pass({"pass": self.place["pass"] + 1, "taken": 0, "seeds": seeds})

    def go_on_with_pass(self, place):
        """Begins a pass over the data behind the batches that were taken from it; see state_dict.

        A sampler with an attribute `skip` leaves them out; else they are loaded and dropped, which
        leaves the random generators as they are.
        """
        self.place = place
        if not place["seeds"] or 0 < place["taken"] == self.pass_length:  # not begun, or over
            return
        for part in (self.sampler, self.dataset):
            if hasattr(part, "set_epoch"):
                part.set_epoch(place["pass"])
        shufflers = [self.loader.sampler] if self.sampler is None else []
        for part, seed in zip((self.loader, *shufflers), place["seeds"]):
            part.generator.manual_seed(seed)
        if hasattr(self.sampler, "skip"):
            self.sampler.skip = place["taken"]
        self.batches = iter(self.loader)
        if place["taken"] and not hasattr(self.sampler, "skip"):
            state = auxiliaries.random_state()
            for _ in range(place["taken"]):
                next(self.batches, None)
            auxiliaries.restore_random_state(state)

    # Several processes

    def share_trunk(self):
        """The trunk in DistributedDataParallel, which a frozen one needs not; None if alone."""
        trunk = self.models["trunk"]
        if auxiliaries.num_ranks() == 1:
            return None
        if not any(weight.requires_grad for weight in trunk.parameters()):
            return trunk
        with warnings.catch_warnings():  # torch 2.15 has another name for it, 2.6 not yet
            warnings.filterwarnings("ignore", ".*broadcast_buffers", FutureWarning)
            return torch.nn.parallel.DistributedDataParallel(trunk, broadcast_buffers=False)

    # Labels and keys

    def process_labels(self, labels):
        """Labels of the loader -> LongTensor [B]: one hierarchy level, ranks if asked for."""
        level = self.label_hierarchy_level
        try:
            if isinstance(labels, (list, tuple)) and np.ndim(labels[0]) > 0:
                labels = labels[level]  # collated level by level
            labels = labels if torch.is_tensor(labels) else np.asarray(labels)
            if labels.ndim == 2:
                labels = labels[:, level]
        except IndexError as error:
            raise ValueError(f"label_hierarchy_level {level}: the labels have no such level; they "
                             "are counted from 0") from error
        if self.label_ranks is not None:
            labels = np.asarray(labels.cpu() if torch.is_tensor(labels) else labels)
            ranks = np.searchsorted(self.label_ranks, labels).clip(max=len(self.label_ranks) - 1)
            unknown = labels[self.label_ranks[ranks] != labels]
            if len(unknown):
                raise ValueError(f"label {unknown[0].item()!r} is not among dataset_labels")
            labels = ranks
        elif (labels.is_floating_point() if torch.is_tensor(labels)
              else labels.dtype.kind not in "iub"):
            raise ValueError(f"labels such as {labels[0].item()!r} are not integers; "
                             "set_min_label_to_zero with dataset_labels turns strings into "
                             "numbers")
        return torch.as_tensor(labels).long()

    def rank_labels(self):
        """The sorted distinct dataset_labels of the hierarchy level, or None without ranking."""
        if not self.set_min_label_to_zero:
            return None
        if self.dataset_labels is None:
            raise ValueError("set_min_label_to_zero needs dataset_labels, the labels of the "
                             "dataset")
        labels = np.asarray(self.dataset_labels)
        return np.unique(labels[:, self.label_hierarchy_level] if labels.ndim == 2 else labels)

    @staticmethod
    def check_dicts(**arguments):
        """ValueError for an argument that is no dict, as the dataset in the place of the miners.

        Early versions of pytorch-metric-learning had mining_funcs before dataset.
        """
        for name, given in arguments.items():
            if given is not None and not isinstance(given, dict):
                raise ValueError(f"{name} is a {type(given).__name__}; it must be a dict. By "
                                 "position the arguments are models, optimizers, batch_size, "
                                 "loss_funcs, dataset, mining_funcs, then those by name")

    def complete_loss_weights(self, weights):
        """The given weights, or 1 for every loss."""
        return weights or dict.fromkeys(self.loss_funcs, 1)

    def check_keys(self):
        """Raises ValueError for a missing or unknown key of a dictionary, with those allowed."""
        names = (*self.model_names, *self.loss_names)
        schedulers = [f"{name}_scheduler_by_{when}" for name in names
                      for when in ("iteration", "epoch", "plateau")]
        if isinstance(self.freeze_these, str):
            raise ValueError(f"freeze_these {self.freeze_these!r} is one string; it must be a "
                             "list of names")
        for argument, given, allowed, required in (
                ("models", self.models, self.model_names, self.required_models),
                ("loss_funcs", self.loss_funcs, self.loss_names, self.required_losses),
                ("mining_funcs", self.mining_funcs, self.miner_names, ()),
                ("loss_weights", self.loss_weights, (*self.loss_names, *self.regularisers),
                 (*self.loss_funcs, *self.regularisers)),
                ("optimizers", self.optimizers, [f"{name}_optimizer" for name in names], ()),
                ("lr_schedulers", self.lr_schedulers, schedulers, ()),
                ("gradient_clippers", self.gradient_clippers,
                 [f"{name}_grad_clipper" for name in names], ()),
                ("freeze_these", self.freeze_these, names, ())):
            unknown = [key for key in given if key not in allowed]
            missing = [key for key in required if key not in given]
            if unknown or missing:
                what = f"unknown key {unknown[0]!r}" if unknown else f"no key {missing[0]!r}"
                raise ValueError(f"{type(self).__name__}: {what} in {argument}; allowed are "
                                 f"{', '.join(allowed)}")
        for argument in ("models", "loss_funcs", "mining_funcs", "gradient_clippers"):
            for name, value in getattr(self, argument).items():
                if not callable(value):
                    raise ValueError(f"{type(self).__name__}: {name} in {argument} is "
                                     f"{value!r}; it must be callable")
        for name, scheduler in self.lr_schedulers.items():
            by_plateau = isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau)
            if by_plateau and not name.endswith("_by_plateau"):
                raise ValueError(f"{type(self).__name__}: {name} in lr_schedulers is a "
                                 "ReduceLROnPlateau; its key must end in _scheduler_by_plateau")
        for name in self.freeze_these:
            if f"{name}_optimizer" in self.optimizers:
                warnings.warn(f"{name} is frozen: its optimizer will not be stepped", stacklevel=3)


class GatherFeatures(torch.autograd.Function):
    """Each process's features [b, F] -> all of them [B, F], in the order of the processes.

    Backward gives each process the gradient of its own rows, times the number of processes, since
    every process computes the same loss and DistributedDataParallel divides the sum by it.
    """

    @staticmethod
    def forward(ctx, features):
        ctx.number = len(features)
        return auxiliaries.gather_rows(features)

    @staticmethod
    def backward(ctx, gradient):
        own = gradient.narrow(0, auxiliaries.rank() * ctx.number, ctx.number)
        return own * auxiliaries.num_ranks()


class MetricLossOnly(BaseTrainer):
    """One metric loss on the embeddings: trunk, embedder if given, tuple miner if given, loss.

    models: {"trunk": ..., "embedder": ... (optional)}; loss_funcs: {"metric_loss": ...}.
    """

    def calculate_loss(self, data, labels):
        embeddings = self.compute_embeddings(data)                               # [B, D]
        indices_tuple = self.mine_tuples(embeddings, labels)
        return {"metric_loss": self.loss_funcs["metric_loss"](embeddings, labels, indices_tuple)}


class TrainWithClassifier(BaseTrainer):
    """A metric loss on the embeddings and a classification loss on a classifier behind them.

    models: {"trunk": ..., "classifier": ..., "embedder": ... (optional)}; loss_funcs:
    {"metric_loss": ..., "classifier_loss": callable(logits [B, C], labels [B])}. Without a
    classifier or its loss the metric loss is alone, and the other way round. No one paper's
    method: a common way to keep a metric loss from collapsing.
    """

    model_names = ("trunk", "embedder", "classifier")
    loss_names = ("metric_loss", "classifier_loss")
    required_losses = ()
    takes = ("classifier_weight", "classifier_lr")

    def check_keys(self):
        super().check_keys()
        has = [name in part for name, part in (("classifier", self.models),
                                               ("classifier_loss", self.loss_funcs))]
        self.classifies = all(has)
        if not self.classifies and "metric_loss" not in self.loss_funcs:
            raise ValueError("TrainWithClassifier has no loss: it needs metric_loss in "
                             "loss_funcs, or a classifier in models with its classifier_loss")
        if any(has) and not self.classifies:
            warnings.warn("TrainWithClassifier: a classifier in models without classifier_loss in "
                          "loss_funcs, or the other way round, is not used", stacklevel=4)

    def calculate_loss(self, data, labels):
        embeddings, losses = self.compute_embeddings(data), {}                   # [B, D]
        if self.classifies:
            logits = self.models["classifier"](embeddings)                       # [B, C]
        if "metric_loss" in self.loss_funcs:
            indices_tuple = self.mine_tuples(embeddings, labels)
            losses["metric_loss"] = self.loss_funcs["metric_loss"](
                embeddings, labels, indices_tuple)
        if self.classifies:
            losses["classifier_loss"] = self.loss_funcs["classifier_loss"](logits, labels)
        return losses


class CascadedEmbeddings(BaseTrainer):
    """Losses of their own for consecutive sections of the embedding.

    Yuan, Yang, Zhang, "Hard-Aware Deeply Cascaded Embedding", ICCV 2017. embedding_sizes: the
    length of each section; they sum to the embedding's. models: {"trunk": ..., "embedder": ...
    (optional), "classifier_0": ... and so on (optional)}; loss_funcs: {"metric_loss_0": ..., for
    each section, "classifier_loss_0": ... for each classifier}; mining_funcs: {"tuple_miner_0":
    ... (optional)}. A miner with set_idx_externally(tuples, labels) and reset_idx(), as
    pytorch-metric-learning's HDCMiner, is handed the tuples of the section before and so sees the
    harder ones of them: the paper's cascade. Any other miner decides for its section alone. A
    section whose miner returns nothing rests for that step; the step is skipped where all do.
    Departs from the paper: all sections share one trunk's features.
    """

    takes = ("embedding_sizes",)

    def __init__(self, embedding_sizes, *args, **kwargs):
        self.embedding_sizes = list(embedding_sizes)
        if not self.embedding_sizes or min(self.embedding_sizes) < 1:
            raise ValueError(f"embedding_sizes {self.embedding_sizes}: each must be 1 or more")
        sections = range(len(self.embedding_sizes))
        self.model_names = ("trunk", "embedder", *(f"classifier_{i}" for i in sections))
        self.required_losses = tuple(f"metric_loss_{i}" for i in sections)
        self.loss_names = self.required_losses + tuple(f"classifier_loss_{i}" for i in sections)
        self.miner_names = ("subset_batch_miner", *(f"tuple_miner_{i}" for i in sections))
        super().__init__(*args, **kwargs)
        for i in sections:
            if (f"classifier_{i}" in self.models) != (f"classifier_loss_{i}" in self.loss_funcs):
                raise ValueError(f"CascadedEmbeddings: classifier_{i} in models and "
                                 f"classifier_loss_{i} in loss_funcs go together; one of them is "
                                 "missing")

    def calculate_loss(self, data, labels):
        embeddings = self.compute_embeddings(data)                               # [B, D]
        if embeddings.shape[1] != sum(self.embedding_sizes):
            raise ValueError(f"embedding_sizes {self.embedding_sizes} sum to "
                             f"{sum(self.embedding_sizes)}, the embedding has "
                             f"{embeddings.shape[1]}")
        losses, resting, indices_tuple = {}, 0, None
        for i, section in enumerate(embeddings.split(self.embedding_sizes, dim=1)):
            miner = self.mining_funcs.get(f"tuple_miner_{i}")
            if hasattr(miner, "set_idx_externally"):
                miner.set_idx_externally(indices_tuple, labels)
            try:
                indices_tuple = self.mine_tuples(section, labels, f"tuple_miner_{i}")
                losses[f"metric_loss_{i}"] = self.loss_funcs[f"metric_loss_{i}"](
                    section, labels, indices_tuple)
            except NothingMined:
                losses[f"metric_loss_{i}"] = section[:0].sum()  # zero, in the graph
                resting += 1
            if hasattr(miner, "reset_idx"):
                miner.reset_idx()
            if f"classifier_{i}" in self.models:
                logits = self.models[f"classifier_{i}"](section)
                losses[f"classifier_loss_{i}"] = self.loss_funcs[f"classifier_loss_{i}"](
                    logits, labels)
        if resting == len(self.embedding_sizes):
            raise NothingMined
        return losses


class DeepAdversarialMetricLearning(BaseTrainer):
    """A generator makes hard negatives out of real triplets; the metric learns from both.

    Duan et al., "Deep Adversarial Metric Learning", CVPR 2018. metric_alone_epochs: that many
    first epochs train on metric_loss (and classifier_loss) alone; g_alone_epochs: that many after
    them train the generator alone; then all learn. g_triplets_per_anchor: real triplets of each
    sample that go through the generator. models: {"trunk": features [B, F], "generator":
    [T, 3 F] -> [T, F], "embedder", "classifier" (optional)}. loss_funcs: {"metric_loss",
    "synth_loss": on triplets with a synthetic negative, "g_adv_loss": a triplet loss with an
    attribute margin, "classifier_loss" (with a classifier)}. loss_weights: of these and of
    "g_hard_loss" (synthetic negative near the anchor) and "g_reg_loss" (near the real negative);
    "g_hard_lss" is understood too. g_adv_loss is copied, its margin negated: with positive and
    negative exchanged, max(0, d_an - d_ap - margin) pulls the synthetic negative to the anchor.

    Departs from the paper, as the library that these trainers follow does: metric_loss on the
    batch's own tuples is kept beside synth_loss; where all learn, one backward pass serves all
    losses, so the generator's losses reach trunk and embedder as well;
    g_hard_loss and g_reg_loss are mean squared differences of normalised features.
    """

    model_names = ("trunk", "embedder", "generator", "classifier")
    required_models = ("trunk", "generator")
    takes = ("margin", "metric_alone_epochs", "g_alone_epochs", "g_triplets_per_anchor", "g_lr",
             "g_weights")
    draws_positives = of_unit_norm = True
    loss_names = ("metric_loss", "g_adv_loss", "synth_loss", "classifier_loss")
    required_losses = ("metric_loss", "g_adv_loss", "synth_loss")
    regularisers = ("g_hard_loss", "g_reg_loss")

    def __init__(self, metric_alone_epochs=0, g_alone_epochs=0, g_triplets_per_anchor=100, *args,
                 **kwargs):
        self.metric_alone_epochs = metric_alone_epochs
        self.g_alone_epochs = g_alone_epochs
        self.g_triplets_per_anchor = g_triplets_per_anchor
        super().__init__(*args, **kwargs)
        if ("classifier" in self.models) != ("classifier_loss" in self.loss_funcs):
            raise ValueError("DeepAdversarialMetricLearning: a classifier in models and a "
                             "classifier_loss in loss_funcs go together; one of them is missing")
        adversarial = self.loss_funcs["g_adv_loss"]
        weights = adversarial.parameters() if isinstance(adversarial, torch.nn.Module) else []
        if not hasattr(adversarial, "margin") or list(weights):
            raise ValueError("DeepAdversarialMetricLearning: g_adv_loss must be a triplet loss, "
                             "with an attribute margin and no weights of its own")
        adversarial = copy.deepcopy(adversarial)
        adversarial.margin = -adversarial.margin
        self.loss_funcs = {**self.loss_funcs, "g_adv_loss": adversarial}
        self.learning = {name: [p for p in model.parameters() if p.requires_grad]
                         for name, model in self.models.items()}

    def complete_loss_weights(self, weights):
        if not weights:
            return dict.fromkeys((*self.loss_funcs, *self.regularisers), 1)
        return {name.replace("g_hard_lss", "g_hard_loss"): weight
                for name, weight in weights.items()}

    def train(self, start_epoch=1, num_epochs=1):
        """As BaseTrainer.train; afterwards all that could learn before can learn again."""
        try:
            super().train(start_epoch, num_epochs)
        finally:
            for name, weights in self.learning.items():
                for weight in weights:
                    weight.requires_grad_(name not in self.freeze_these)

    def set_to_train(self):
        """Also: which networks learn, and which losses count, in this epoch's phase."""
        metric_alone = self.epoch <= self.metric_alone_epochs
        generator_alone = not metric_alone and (
            self.epoch <= self.metric_alone_epochs + self.g_alone_epochs)
        self.does_metric, self.does_generator = not generator_alone, not metric_alone
        self.idle = (("generator",) if metric_alone else
                     ("trunk", "embedder", "classifier", "metric_loss") if generator_alone else ())
        super().set_to_train()
        for name, weights in self.learning.items():
            learns = name not in (*self.idle, *self.freeze_these)
            self.models[name].train(learns)
            for weight in weights:
                weight.requires_grad_(learns)
        self.freeze_batchnorm()

    def calculate_loss(self, data, labels):
        losses = {}
        features = self.compute_features(data)                                   # [B, F]
        if self.does_metric:
            embeddings = self.embed_features(features)                           # [B, D]
            indices_tuple = self.mine_tuples(embeddings, labels)
            losses["metric_loss"] = self.loss_funcs["metric_loss"](
                embeddings, labels, indices_tuple)
            if "classifier" in self.models:
                logits = self.models["classifier"](embeddings)
                losses["classifier_loss"] = self.loss_funcs["classifier_loss"](logits, labels)
        if self.does_generator:
            losses |= self.generator_losses(features, labels)
        return losses

    def generator_losses(self, features, labels):
        """features [B, F], labels [B] -> the losses on triplets with a synthetic negative."""
        triplets = not_empty(self.draw_triplets(labels))                         # [T, 3]
        anchors, positives, negatives = (features[i] for i in triplets.unbind(1))  # [T, F] each
        synthetic = self.generate(torch.cat([anchors, positives, negatives], 1))   # [T, F]
        rows = torch.stack([anchors, positives, synthetic], 1).flatten(0, 1)       # [3 T, F]
        embeddings = self.embed_features(rows)                                   # [3 T, D]
        labels = labels[triplets].flatten()                                      # [3 T]
        a, p, n = torch.arange(len(rows), device=rows.device).view(-1, 3).unbind(1)
        losses = {"g_adv_loss": self.loss_funcs["g_adv_loss"](embeddings, labels, (a, n, p))}
        if self.does_metric:
            losses["synth_loss"] = self.loss_funcs["synth_loss"](embeddings, labels, (a, p, n))
        direction = F.normalize(synthetic, dim=1)
        losses["g_hard_loss"] = F.mse_loss(direction, F.normalize(anchors, dim=1))
        losses["g_reg_loss"] = F.mse_loss(direction, F.normalize(negatives, dim=1))
        return losses

    def draw_triplets(self, labels):
        """g_triplets_per_anchor random triplets of each anchor that has any: [B] -> [T, 3]."""
        same, positive = Sampler.pair_masks(labels)
        each = self.g_triplets_per_anchor
        anchors = torch.arange(len(labels), device=labels.device).repeat_interleave(each)
        triplets = torch.stack([anchors, draw_columns(positive.float()[anchors]),
                                draw_columns((~same).float()[anchors])], 1)
        return triplets[(triplets >= 0).all(1)]

    def generate(self, triplets):
        """Features of real triplets [T, 3 F] -> synthetic negatives [T, F]."""
        size = triplets.shape[1] // 3
        synthetic = self.models["generator"](triplets)
        if synthetic.shape != (len(triplets), size):
            raise ValueError(f"the generator gives {list(synthetic.shape)}; it must give "
                             f"{[len(triplets), size]}, the trunk's features")
        return synthetic


class UnsupervisedEmbeddingsUsingAugmentations(MetricLossOnly):
    """Views of one image are positives, views of different images negatives; labels are not used.

    Ye et al., "Unsupervised Embedding Learning via Invariant and Spreading Instance Feature", CVPR
    2019. transforms: list of N callables, each applied to every item of a batch: B items become
    B x N samples, whose label is the item's place in the batch. data_and_label_setter: callable(
    (samples, labels)) -> what data_and_label_getter expects of the loader. models, loss_funcs: as
    MetricLossOnly. data_and_label_getter is applied to each item of the dataset as well.
    Departs from the paper: any metric loss on any number of views takes the place of its softmax
    over the batch's instances.
    """

    views, uses_classes = 2, False

    def __init__(self, transforms, data_and_label_setter=None, *args, **kwargs):
        if kwargs.get("collate_fn") is not None:
            raise ValueError("UnsupervisedEmbeddingsUsingAugmentations collates the views itself; "
                             "leave out collate_fn")
        self.transforms = list(transforms)
        self.data_and_label_setter = data_and_label_setter or identity
        if not self.transforms:
            raise ValueError("UnsupervisedEmbeddingsUsingAugmentations needs a transform or more")
        super().__init__(*args, **kwargs)
        if self.set_min_label_to_zero:
            raise ValueError("UnsupervisedEmbeddingsUsingAugmentations makes its own labels; "
                             "leave out set_min_label_to_zero")

    def process_labels(self, labels):
        """The items' places in the whole batch, of which this process has a part."""
        labels = super().process_labels(labels)
        return labels + auxiliaries.rank() * (len(labels) // len(self.transforms))

    def default_collate(self):
        # Not a method of the trainer: the loader would hold the trainer, which holds the loader.
        return functools.partial(collate_views, transforms=self.transforms,
                                 getter=self.data_and_label_getter,
                                 setter=self.data_and_label_setter)


def collate_views(items, transforms, getter, setter):
    """Items of a dataset -> all their views [B x N, ...] and the items' places [B x N]."""
    data = [getter(item)[0] for item in items]
    samples = torch.stack([transform(x) for x in data for transform in transforms])
    return setter((samples, torch.arange(len(data)).repeat_interleave(len(transforms))))


class TwoStreamMetricLoss(BaseTrainer):
    """Anchors from one stream, positives and negatives from the other: sketch and photograph.

    dataset: items (anchor, positive, label). models, loss_funcs: as MetricLossOnly. mining_funcs:
    {"tuple_miner": callable(anchors [B, D], labels [B], others [B, D], labels [B]) -> (a, p, n) or
    (a1, p, a2, n), a an index of anchors, p and n of others, or the same as [T, 3] or [T, 4]};
    without one, all triplets.
    """

    miner_names = ("tuple_miner",)
    views, of_triplets = 2, True

    def unpack(self, item):
        item = self.data_and_label_getter(item)
        if len(item) != 3:
            raise ValueError(f"TwoStreamMetricLoss: the dataset gives {len(item)} values; it must "
                             "give (anchor, positive, label)")
        *streams, labels = item
        return [stream.to(self.data_device, self.dtype, non_blocking=True)
                for stream in streams], labels

    def calculate_loss(self, data, labels):
        anchors, others = (self.compute_embeddings(stream) for stream in data)   # [B, D] each
        if "tuple_miner" in self.mining_funcs:
            # A copy of the labels: miners take one object twice as one set compared with itself.
            tuples = self.mining_funcs["tuple_miner"](anchors, labels, others, labels.clone())
        else:
            same = labels.unsqueeze(1) == labels
            tuples = (same.unsqueeze(2) & ~same.unsqueeze(1)).nonzero(as_tuple=True)
        if isinstance(not_empty(tuples), (torch.Tensor, np.ndarray)):
            tuples = torch.as_tensor(tuples).unbind(1)
        if len(tuples) not in (3, 4):
            raise ValueError("TwoStreamMetricLoss: the tuple_miner must return (a, p, n), (a1, p, "
                             f"a2, n), [T, 3] or [T, 4]; it gave {len(tuples)} parts")
        tuples = [torch.as_tensor(part, device=labels.device) for part in tuples]
        for i in (1, 2) if len(tuples) == 3 else (1, 3):
            tuples[i] = tuples[i] + len(anchors)  # others stand behind the anchors below
        return {"metric_loss": self.loss_funcs["metric_loss"](
            torch.cat([anchors, others]), torch.cat([labels, labels]), tuple(tuples))}


TRAINERS = {trainer.__name__: trainer for trainer in (
    MetricLossOnly, TrainWithClassifier, CascadedEmbeddings, DeepAdversarialMetricLearning,
    UnsupervisedEmbeddingsUsingAugmentations, TwoStreamMetricLoss)}


def add_arguments(parser):
    """Adds the group 'optimisation' to an argparse parser."""
    group = parser.add_argument_group("optimisation (Adam)")
    group.add_argument("--lr", type=number(float, least=0, most=1e6), metavar="LR",
                       help="learning rate of the network; useful 1e-6 to 1e-4 for pretrained "
                            "networks, 1e-4 to 1e-2 from scratch. Default 1e-5 (reference runs); "
                            "glyphs 1e-3")
    group.add_argument("--fc_lr_mul", type=number(float, least=0), default=0.0, metavar="X",
                       help="learning rate of the embedding layer as a multiple of --lr, often "
                            "10; 0 means the same as --lr. Default %(default)s (reference runs)")
    group.add_argument("--decay", type=number(float, least=0), default=4e-4, metavar="W",
                       help="weight decay (L2) of the network, not of a loss's own weights; "
                            "useful 0 to 1e-3. Default %(default)s (reference runs)")
    group.add_argument("--n_epochs", type=number(int, least=0), metavar="N",
                       help="passes over the training images. Default 70 (reference runs); glyphs "
                            "20")
    group.add_argument("--scheduler", choices=("step", "exp", "plateau", "none"), default="step",
                       help="step: every learning rate times --gamma after each epoch of --tau. "
                            "exp: times --gamma after every epoch. plateau: times --gamma when "
                            "the first recall was no better in --plateau_patience evaluations. "
                            "Default %(default)s (reference runs)")
    group.add_argument("--plateau_patience", type=number(int, least=1), default=5, metavar="N",
                       help="evaluations in a row without a better recall that --scheduler "
                            "plateau waits for; useful 2 to 10. Default %(default)s")
    group.add_argument("--patience", type=number(int, least=1), metavar="N",
                       help="end the run after N evaluations in a row without a better first "
                            "recall; useful 5 to 20. Default: all of --n_epochs (reference code)")
    group.add_argument("--gamma", type=number(float, above=0, most=1), default=0.3, metavar="G",
                       help="factor of the scheduler, above 0, at most 1. Default %(default)s "
                            "(reference runs)")
    group.add_argument("--tau", type=number(int, least=1), nargs="+", metavar="E",
                       help="epochs after which --scheduler step lowers the rates. Default 30 55 "
                            "(reference runs); glyphs 15")
    trainer = parser.add_argument_group("trainer (how a batch becomes losses)")
    trainer.add_argument("--trainer", choices=TRAINERS, default="MetricLossOnly",
                         help="MetricLossOnly: the loss alone. TrainWithClassifier: and a linear "
                              "classifier behind the embedding. CascadedEmbeddings: a loss for "
                              "each of --embedding_sizes. DeepAdversarialMetricLearning: and a "
                              "generator of hard negatives. UnsupervisedEmbeddingsUsing"
                              "Augmentations: two views of an image are the positives, labels are "
                              "not used. TwoStreamMetricLoss: anchors from one view, positives "
                              "and negatives from a second. Default %(default)s, as the reference "
                              "code")
    trainer.add_argument("--classifier_weight", type=number(float, least=0), default=1.0,
                         metavar="W",
                         help="TrainWithClassifier: weight of the classifier's cross-entropy, the "
                              "metric loss having 1; useful 0.1 to 2. Default %(default)s")
    trainer.add_argument("--classifier_lr", type=number(float, least=0), metavar="LR",
                         help="TrainWithClassifier: learning rate of the classifier. Default 10 "
                              "times --lr")
    trainer.add_argument("--embedding_sizes", type=number(int, least=1), nargs="+", metavar="D",
                         help="CascadedEmbeddings: lengths of the sections, which sum to "
                              "--embed_dim. Default three about equal ones (the paper has three)")
    trainer.add_argument("--metric_alone_epochs", type=number(int, least=0), default=0,
                         metavar="N",
                         help="DeepAdversarialMetricLearning: first epochs with the metric loss "
                              "alone. Default %(default)s")
    trainer.add_argument("--g_alone_epochs", type=number(int, least=0), default=0, metavar="N",
                         help="DeepAdversarialMetricLearning: epochs after those with the "
                              "generator alone. Default %(default)s")
    trainer.add_argument("--g_triplets_per_anchor", type=number(int, least=1), default=10,
                         metavar="N",
                         help="DeepAdversarialMetricLearning: triplets of each image that go "
                              "through the generator; useful 1 to 100. Default %(default)s (the "
                              "library these trainers follow has 100)")
    trainer.add_argument("--g_lr", type=number(float, least=0), metavar="LR",
                         help="DeepAdversarialMetricLearning: learning rate of the generator. "
                              "Default --lr")

    trainer.add_argument("--g_weights", type=number(float, least=0), nargs=4, default=[1.0] * 4,
                         metavar=("ADV", "HARD", "REG", "SYNTH"),
                         help="DeepAdversarialMetricLearning: weights of its adversarial, hard, "
                              "regularisation and synthetic losses, the metric loss having 1. "
                              "Default 1 each")


def trainer_select(opt, trunk, embedder, make_loss, train_set, batches, device):
    """The trainer of the options, an optimiser and a schedule for each part that learns.

    make_loss: callable(**changes of options) -> (loss, its parameter group or None); train_set:
    the dataset; batches: its batch sampler. All is on the device afterwards.
    """
    models = {"trunk": trunk, "embedder": embedder}
    groups = {"trunk": {"params": list(trunk.parameters()), "lr": opt.lr},
              "embedder": {"params": list(embedder.parameters()),
                           "lr": opt.lr * (opt.fc_lr_mul or 1)}}
    changes = {"metric_loss": {}}
    if opt.trainer == "CascadedEmbeddings":
        changes = {f"metric_loss_{i}": {"embed_dim": size}
                   for i, size in enumerate(opt.embedding_sizes)}
    elif opt.trainer == "DeepAdversarialMetricLearning":
        changes |= dict.fromkeys(("g_adv_loss", "synth_loss"),
                                 {"loss": "triplet", "sampling": "distance"})
    made = {name: make_loss(**changed) for name, changed in changes.items()}
    loss_funcs = {name: loss for name, (loss, _) in made.items()}
    groups |= {name: group for name, (_, group) in made.items() if group}
    own = {}
    if opt.trainer == "TrainWithClassifier":
        models["classifier"] = torch.nn.Linear(opt.embed_dim, len(train_set.class_names))
        loss_funcs["classifier_loss"] = torch.nn.CrossEntropyLoss()
        groups["classifier"] = {"params": list(models["classifier"].parameters()),
                                "lr": opt.classifier_lr}
        own["loss_weights"] = {"metric_loss": 1, "classifier_loss": opt.classifier_weight}
    elif opt.trainer == "CascadedEmbeddings":
        own["embedding_sizes"] = opt.embedding_sizes
    elif opt.trainer == "DeepAdversarialMetricLearning":
        models["generator"] = Generator(trunk.num_features)
        groups["generator"] = {"params": list(models["generator"].parameters()), "lr": opt.g_lr}
        weights = zip(("g_adv_loss", "g_hard_loss", "g_reg_loss", "synth_loss"), opt.g_weights)
        own = {"loss_weights": {"metric_loss": 1, **dict(weights)},
               "metric_alone_epochs": opt.metric_alone_epochs,
               "g_alone_epochs": opt.g_alone_epochs,
               "g_triplets_per_anchor": opt.g_triplets_per_anchor}
    elif opt.trainer == "UnsupervisedEmbeddingsUsingAugmentations":
        # The dataset gives both views; the trainer's transforms pick one each.
        own = {"transforms": [operator.itemgetter(0), operator.itemgetter(1)],
               "data_and_label_getter": two_views}
    elif opt.trainer == "TwoStreamMetricLoss":
        own["mining_funcs"] = {"tuple_miner": loss_funcs["metric_loss"].sampler}
    for part in (*models.values(), *loss_funcs.values()):
        part.to(device)
    optimizers = {f"{name}_optimizer": torch.optim.Adam([group], weight_decay=opt.decay)
                  for name, group in groups.items()}
    trainer = TRAINERS[opt.trainer](
        models=models, optimizers=optimizers, batch_size=opt.bs, loss_funcs=loss_funcs,
        dataset=train_set, data_device=device, sampler=batches,
        lr_schedulers=schedulers_select(opt, optimizers),
        freeze_trunk_batchnorm=opt.batchnorm == "frozen", dataloader_num_workers=opt.kernels,
        grad_scaler=torch.amp.GradScaler(device.type) if opt.amp == "fp16" else None, **own)
    trainer.diagnoses = {name.removeprefix("metric_loss"): Diagnosis(loss)
                         for name, loss in loss_funcs.items() if name.startswith("metric_loss")}
    return trainer


def schedulers_select(opt, optimizers):
    """The schedule of each of the optimizers, {"<part>_optimizer": ...}, by --scheduler."""
    schedulers = {}
    for name, optimizer in optimizers.items():
        key = name.removesuffix("_optimizer") + "_scheduler_by_epoch"
        if opt.scheduler == "step":
            schedulers[key] = lr_scheduler.MultiStepLR(optimizer, opt.tau, opt.gamma)
        elif opt.scheduler == "exp":
            schedulers[key] = lr_scheduler.ExponentialLR(optimizer, opt.gamma)
        elif opt.scheduler == "plateau":  # its patience is how many it lets pass
            schedulers[key.replace("epoch", "plateau")] = lr_scheduler.ReduceLROnPlateau(
                optimizer, "max", opt.gamma, opt.plateau_patience - 1, threshold=0)
    return schedulers


class Generator(torch.nn.Module):
    """Makes a synthetic negative of a triplet's features: [T, 3 F] -> [T, F].

    Two linear layers with a ReLU between; Duan et al., "Deep Adversarial Metric Learning", CVPR
    2018.
    """

    def __init__(self, num_features):
        super().__init__()
        self.layers = torch.nn.Sequential(torch.nn.Linear(3 * num_features, num_features),
                                          torch.nn.ReLU(),
                                          torch.nn.Linear(num_features, num_features))

    def forward(self, triplets):
        return self.layers(triplets)


def two_views(item):
    """(first view, second view, label) -> ((first, second), label); a collated batch as it is."""
    return item if len(item) == 2 else (item[:2], item[2])


class Validation:
    """An end_of_epoch_hook that measures, keeps the best weights and ends training in time.

    measure: callable(trainer) -> {metric: number}; it finds models and losses in eval mode, and
    without gradients. metric: the one that counts, the first if None; greater is better. every:
    epochs from one measurement to the next. The last epoch is measured in any case; where it is
    not one of every, it counts neither for patience nor for the schedulers, so that a training
    that goes on from there goes on as if it had not stopped. Epochs in which the trunk rests are
    left out. patience: measurements in a row without a better value after which training ends;
    None: never. The schedulers by plateau are stepped with the metric. checkpoint: file that holds
    state(trainer), a dict, of the best epoch, and the rows as "validation_rows".

    rows lists what was measured, {"epoch": ..., metric: ...}; all that this hook decides follows
    from them, so a Validation that goes on where another ended takes its rows. Epoch 0, the
    untrained network if a caller measures it, is best only while alone.
    """

    def __init__(self, measure, metric=None, every=1, patience=None, checkpoint=None,
                 state=lambda trainer: trainer.state_dict(), rows=()):
        if every < 1 or patience is not None and patience < 1:
            raise ValueError(f"every {every}, patience {patience}: both are 1 or more")
        self.measure = measure
        self.metric = metric
        self.every = every
        self.patience = patience
        self.checkpoint = checkpoint
        self.state = state
        self.rows = list(rows)

    def __call__(self, trainer):
        """Measures if it is time; returns False, which ends the training, if patience is over."""
        if not self.is_due(trainer):
            return None
        trainer.set_to_eval()
        with torch.no_grad():
            metrics = self.measure(trainer)
        if not isinstance(metrics, dict):
            raise ValueError("Validation: measure must give a dict {metric: number}; it gives a "
                             f"{type(metrics).__name__}")
        name = self.name() if self.rows else self.metric or next(iter(metrics), None)
        if name not in metrics or "epoch" in metrics:
            raise ValueError(f"Validation: measure must give {name or 'a metric'}, and none named "
                             f"epoch; it gives {', '.join(metrics) or 'nothing'}")
        # Plain numbers: a checkpoint with numpy's could not be read without running code.
        self.rows.append({"epoch": trainer.epoch,
                          **{name: float(value) for name, value in metrics.items()}})
        if trainer.epoch and trainer.epoch % self.every == 0:
            trainer.step_lr_plateau_schedulers(metrics[name])
        if self.checkpoint and self.best() is self.rows[-1]:
            auxiliaries.save_checkpoint(self.checkpoint, {**self.state(trainer),
                                                          "validation_rows": self.rows})
        return False if self.is_over() else None

    def is_due(self, trainer):
        """Whether this epoch is one to measure."""
        if trainer.epoch == getattr(trainer, "last_epoch", None):
            return True
        return trainer.epoch % self.every == 0 and "trunk" not in getattr(trainer, "idle", ())

    def name(self):
        """The name of the metric that counts; there must be a row."""
        return self.metric or next(key for key in self.rows[0] if key != "epoch")

    def best(self):
        """The row with the greatest metric, the first of equals."""
        return auxiliaries.best_row(self.rows, self.name())

    def is_over(self):
        """Whether the last `patience` measurements are no better than one before them."""
        return bool(self.rows) and auxiliaries.is_over(self.rows, self.name(), self.every,
                                                       self.patience)


def in_turn(*hooks):
    """One hook that calls several: hook(trainer); False, which ends the training, if any was."""
    def hook(trainer):
        returned = [each(trainer) for each in hooks]
        return False if any(value is False for value in returned) else None
    return hook


class Diagnosis:
    """What the training batches say of the embedding, averaged until it is asked for.

    loss: the metric loss, a module, that is called with embeddings [B, D] and labels [B]; each
    call in train mode counts. Nothing waits for the device before row().
    """

    NAMES = ("active", "d_ap", "d_an", "std", "length")
    COLLAPSED = 0.1  # spread over length below which the embeddings are nearly one point

    def __init__(self, loss):
        self.sums = {}
        loss.register_forward_hook(self.add)

    @torch.no_grad()
    def add(self, loss, inputs, _):
        """The loss's forward hook: takes in one batch."""
        if not loss.training:
            return
        embeddings, labels = inputs[0].detach().float(), inputs[1]
        distances = pairwise_sq_distances(embeddings - embeddings.mean(0)).sqrt_()   # [B, B]
        same, positive = Sampler.pair_masks(labels)
        found = {"batches": torch.ones((), device=embeddings.device),
                 "d_ap": (distances * positive).sum(), "positive pairs": positive.sum(),
                 "d_an": (distances * ~same).sum(), "negative pairs": (~same).sum(),
                 "variance": embeddings.var(0, correction=0).sum(),
                 "sq_length": embeddings.square().sum(1).mean()}
        if hasattr(loss, "active"):
            found["active"] = loss.active.detach()
        for name, value in found.items():
            self.sums[name] = self.sums.get(name, 0) + value

    def row(self):
        """The averages since the last call -> dict of floats; empty if there was no batch.

        "active": share of the tuples that the loss had still to satisfy, of losses that say so.
        "d_ap", "d_an": mean Euclidean distance of the pairs of one class, and of two, in a batch.
        "std": root mean square distance of the embeddings from their batch's mean; for unit-norm
        embeddings 1 where they are spread all over the sphere, 0 where they are one point.
        "length": their root mean square length. A name is missing where nothing says its value.
        """
        sums = {name: float(value) for name, value in self.sums.items()}
        self.sums = {}
        if not sums:
            return {}
        row = {"active": sums["active"] / sums["batches"]} if "active" in sums else {}
        for name, pairs in (("d_ap", "positive pairs"), ("d_an", "negative pairs")):
            if sums[pairs]:
                row[name] = sums[name] / sums[pairs]
        for name, square in (("std", "variance"), ("length", "sq_length")):
            row[name] = (sums[square] / sums["batches"]) ** 0.5
        return row

    @classmethod
    def has_collapsed(cls, row):
        """Whether the embeddings of a row were all in one place."""
        return "std" in row and not row["std"] > cls.COLLAPSED * row["length"]
