"""The trainers: what happens in one training step, and in which order.

BaseTrainer owns the loop, the batches and everything around a step; a trainer class says how a
batch becomes losses (calculate_loss) and which models and losses it knows. Constructor and
dictionaries are those of the trainers of pytorch-metric-learning, so a script written for them
runs here. A new trainer: a class, its name in TRAINERS, its branch in trainer_select, which alone
knows options. Validation and Diagnosis, the hooks that most callers want, stand at the end.
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


class NonFiniteLoss(FloatingPointError):
    """A loss, gradient or weight that is not finite; epoch and iteration (from 0) say where."""

    def __init__(self, what, epoch, iteration):
        super().__init__(f"{what} epoch {epoch}, iteration {iteration + 1}; often the learning "
                         "rate (--lr) is too high, or a loss takes a root of 0")
        self.epoch, self.iteration = epoch, iteration


class NothingMined(Exception):
    """A miner returned no index for a batch; the trainer skips the step."""


def not_empty(indices):
    """Returns a miner's indices, a tensor or a tuple of tensors; NothingMined if none."""
    parts = indices if isinstance(indices, (tuple, list)) else (indices,)
    if all(part is None or np.ndim(part) and not len(part) for part in parts):
        raise NothingMined
    return indices


class BaseTrainer:
    """The loop around a training step; subclasses say what a step computes.

    models: {"trunk": module, "embedder": module (optional)}. optimizers:
    {"<model or loss>_optimizer": optimizer}. loss_funcs: {"metric_loss": callable(embeddings,
    labels, indices_tuple)}. dataset: items (data, label). mining_funcs: {"subset_batch_miner":
    (embeddings [B, D], labels [B]) -> indices to keep, "tuple_miner": the same -> indices_tuple
    for the loss}. iterations_per_epoch: the data go on across epochs; None: one pass over the
    data. data_device: None is a GPU if there is one. dtype: floating type that data are converted
    to. loss_weights: {loss: factor}, 1 without it. sampler: a torch Sampler or BatchSampler; its
    set_epoch, and the dataset's, are told the number of each pass. lr_schedulers:
    {"<model or loss>_scheduler_by_iteration|by_epoch|by_plateau": scheduler}. gradient_clippers:
    {"<model or loss>_grad_clipper": callable()}. freeze_these: models or losses without
    gradients, in eval mode, never stepped. freeze_trunk_batchnorm: the running statistics of the
    trunk stay. label_hierarchy_level: the column of labels [N, levels] that counts.
    data_and_label_getter: item of the loader -> (data, labels). dataset_labels with
    set_min_label_to_zero: labels, ints or strings, become their rank among dataset_labels.
    end_of_iteration_hook, end_of_epoch_hook: callable(trainer); training ends early when the
    latter returns exactly False. between_iterations_hook: the same, called where state_dict() is a
    state to go on from; exactly False ends the training there. grad_scaler: torch.amp.GradScaler,
    for float16 networks.

    Where torch.distributed is initialised each process gives its share of every batch (the dataset
    or sampler sees to it): the trunk runs on the share, in DistributedDataParallel, and its
    features and the labels are gathered, so that embedder, miners and losses see the whole batch
    in every process.

    Hooks can read losses (numbers as 0-dimensional tensors, by name, each times its weight, and
    "total_loss"), epoch, iteration (from 0), get_global_iteration() and every argument under its
    name. Raises ValueError for dictionary keys that are missing or unknown.
    """

    model_names = ("trunk", "embedder")
    required_models = ("trunk",)
    loss_names = ("metric_loss",)
    required_losses = ("metric_loss",)
    regularisers = ()  # losses without a function in loss_funcs
    miner_names = ("subset_batch_miner", "tuple_miner")
    item = ("data", "label")  # what an item of the dataset is
    # The trainer's own options; how many views of an image it needs; whether it learns from
    # classes, draws positives itself, takes losses of triplets alone, of unit norm alone.
    takes = ()
    views = 1
    warm_up_epochs = 0  # first epochs in which the trunk rests
    uses_classes, draws_positives, of_triplets, of_unit_norm = True, False, False, False

    STATE_GROUPS = ("models", "loss_funcs", "optimizers", "lr_schedulers")

    def __init__(self, models, optimizers, batch_size, loss_funcs, dataset, mining_funcs=None,
                 iterations_per_epoch=None, data_device=None, dtype=None, loss_weights=None,
                 sampler=None, collate_fn=None, lr_schedulers=None, gradient_clippers=None,
                 freeze_these=(), freeze_trunk_batchnorm=False, label_hierarchy_level=0,
                 dataloader_num_workers=2, data_and_label_getter=None, dataset_labels=None,
                 set_min_label_to_zero=False, end_of_iteration_hook=None, end_of_epoch_hook=None,
                 between_iterations_hook=None, grad_scaler=None):
        # Without an embedder hooks find the identity, as in that library.
        self.models = {**models, "embedder": models.get("embedder", torch.nn.Identity())}
        self.optimizers = optimizers
        self.batch_size = batch_size
        self.loss_funcs = loss_funcs
        self.dataset = dataset
        self.mining_funcs = mining_funcs or {}
        self.data_device = data_device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.dtype = dtype
        self.loss_weights = loss_weights or dict.fromkeys((*loss_funcs, *self.regularisers), 1)
        self.sampler = sampler
        self.collate_fn = collate_fn
        self.lr_schedulers = lr_schedulers or {}
        self.gradient_clippers = gradient_clippers or {}
        self.freeze_these = freeze_these
        self.freeze_trunk_batchnorm = freeze_trunk_batchnorm
        self.label_hierarchy_level = label_hierarchy_level
        self.dataloader_num_workers = dataloader_num_workers
        self.data_and_label_getter = data_and_label_getter or tuple
        self.dataset_labels = dataset_labels
        self.set_min_label_to_zero = set_min_label_to_zero
        self.end_of_iteration_hook = end_of_iteration_hook or (lambda trainer: None)
        self.end_of_epoch_hook = end_of_epoch_hook or (lambda trainer: None)
        self.between_iterations_hook = between_iterations_hook or (lambda trainer: None)
        self.grad_scaler = grad_scaler or torch.amp.GradScaler(enabled=False)
        self.losses = {}
        self.weights, self.active_optimizers = [], []  # see set_to_train
        self.unchecked = []  # see check_losses
        self.skipped_steps = 0
        self.idle = self.resting = ()  # what does not learn in this epoch; see set_to_train
        self.epoch = self.iteration = self.last_epoch = 0
        self.epochs_done = self.iterations_done = 0  # whole epochs, and iterations of the next one
        self.check_keys()
        self.label_ranks = self.rank_labels()
        self.loader = self.make_loader()
        self.set_lengths(iterations_per_epoch)
        self.batches, self.goes_on = iter(()), False
        self.place = {"pass": 0, "taken": 0, "seeds": []}  # see state_dict
        self.processes = auxiliaries.num_ranks()
        self.shared_trunk = self.share_trunk()

    def train(self, start_epoch=1, num_epochs=1):
        """Trains from epoch start_epoch to epoch num_epochs, both included and counted from 1.

        After load_state_dict it goes on within the epoch and the pass over the data of that state.
        """
        if not self.goes_on:
            self.batches, self.iterations_done = iter(()), 0
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
            self.start_pass(self.place)
        self.goes_on = False
        self.set_to_train()
        for self.iteration in range(self.iterations_done, self.iterations_per_epoch):
            self.training_step()
            self.end_of_iteration_hook(self)
            for name, scheduler in self.lr_schedulers.items():
                if name.endswith("_by_iteration"):
                    scheduler.step()
            self.iterations_done = self.iteration + 1
            if self.between_iterations_hook(self) is False:
                self.goes_on = True
                return False
        self.check_weights()
        self.step_schedulers("_by_epoch")
        self.epochs_done, self.iterations_done = epoch, 0
        return None

    def training_step(self):
        """One batch: forward, backward, clip, step.

        Skipped, and counted, where a miner returns nothing or a loss has nothing to learn from.
        """
        for weight in self.weights:
            weight.grad = None
        try:
            data, labels = self.next_batch()                      # on the device
            losses = self.weighted(self.calculate_loss(data, labels))  # {name: scalar}
        except NothingMined:
            return self.skip_step()
        except FloatingPointError as error:                       # embeddings are not finite
            self.check_losses()                                   # or were wrong a step before
            raise NonFiniteLoss(f"{error} in", self.epoch, self.iteration) from error
        losses["total_loss"] = total = sum(losses.values())
        self.losses = {name: loss.detach() for name, loss in losses.items()}  # for hooks
        if not total.requires_grad:
            return self.skip_step(total)
        self.grad_scaler.scale(total).backward()
        if self.processes > 1:
            self.average_gradients()
        self.check_losses(total)                                  # for NaN, now and then
        optimizers = self.active_optimizers
        if self.grad_scaler.is_enabled():
            optimizers = self.unscale(optimizers)
        for clip in self.gradient_clippers.values():
            clip()
        for optimizer in optimizers:
            self.grad_scaler.step(optimizer)
        self.grad_scaler.update()

    def next_batch(self):
        """The next batch, on the device, thinned by the subset_batch_miner -> (data, labels [B]).

        data: a tensor, or what gives one by the same to(device, dtype, non_blocking); the streams
        of a trainer of two in a list. Of several processes: this one's share of data, all labels.
        """
        item = next(self.batches, None)
        if item is None:                                          # the pass is over
            self.start_pass()
            item = next(self.batches, None)
        if item is None:
            raise ValueError("the data loader gives no batch: the sampler is empty or shorter "
                             f"than batch_size {self.batch_size}")
        self.place["taken"] += 1
        *streams, labels = self.data_and_label_getter(item)
        if len(streams) != len(self.item) - 1 or not all(hasattr(data, "to") for data in streams):
            raise ValueError(f"{type(self).__name__}: the dataset gives a {type(item).__name__} "
                             f"of {len(item)}; it must give ({', '.join(self.item)}), tensors "
                             "before the label. A data_and_label_getter can take it apart")
        streams = [data.to(self.data_device, self.dtype, non_blocking=True) for data in streams]
        labels = self.process_labels(labels).to(self.data_device, non_blocking=True)
        if self.processes > 1:
            labels = auxiliaries.gather_rows(labels)
        data = streams[0] if len(streams) == 1 else streams
        if "subset_batch_miner" in self.mining_funcs:
            data, labels = self.thin_batch(data, labels)
        return data, labels

    def calculate_loss(self, data, labels):
        """data [B, ...], labels [B] -> {loss name: scalar}; each trainer's own."""
        raise NotImplementedError

    def compute_embeddings(self, data):
        """data [B, ...] -> embeddings [B, D]; in a training step those of all processes."""
        learns = torch.is_grad_enabled()
        trunk = self.shared_trunk if learns else self.models["trunk"]
        with torch.set_grad_enabled(learns and "trunk" not in self.resting):
            features = trunk(data)
        return self.models["embedder"](features)

    # What a step calls

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
        not_empty(labels[not_empty(indices)])  # of a mask that is False everywhere
        return data[indices], labels[indices]

    def weighted(self, losses):
        """{name: loss} -> the same, scalars times their weights; ValueError for a loss that is no
        scalar.
        """
        for name, loss in losses.items():
            if not torch.is_tensor(loss) or loss.numel() != 1:
                gave = list(loss.shape) if torch.is_tensor(loss) else type(loss).__name__
                raise ValueError(f"{name} must give a scalar tensor; it gave {gave}")
        return {name: self.loss_weights.get(name, 1) * loss.reshape(())
                for name, loss in losses.items()}

    def skip_step(self, total=None):
        """Counts a step without anything to learn.

        total: the loss, where there is one; zero is some losses' answer to a batch without tuples.
        """
        if total is None:
            self.losses = dict.fromkeys((*self.loss_weights, "total_loss"),
                                        torch.zeros((), device=self.data_device))
        elif total != 0 or not any(weight.requires_grad for weight in self.weights):
            raise ValueError(f"there is nothing to learn: the loss, {float(total)}, depends on no "
                             "weight that is not frozen (freeze_these: "
                             f"{', '.join(self.freeze_these) or 'none'})")
        self.skipped_steps += 1

    def average_gradients(self):
        """Makes the gradients of all but the trunk, which are equal up to rounding, equal."""
        of_trunk = {id(weight) for weight in self.models["trunk"].parameters()}
        for weight in self.weights:
            if weight.grad is not None and id(weight) not in of_trunk:
                torch.distributed.all_reduce(weight.grad)
                weight.grad /= self.processes

    def unscale(self, optimizers):
        """Under fp16 takes the gradients' scale back -> the optimizers that have gradients.

        A gradient that overflowed lets all of them rest; alone each would look at the weights of
        its own. Nothing waits for the device.
        """
        optimizers = [optimizer for optimizer in optimizers if any(
            weight.grad is not None for group in optimizer.param_groups
            for weight in group["params"])]
        for optimizer in optimizers:
            self.grad_scaler.unscale_(optimizer)
        found = [flag for optimizer in optimizers for flag in
                 self.grad_scaler._per_optimizer_states[id(optimizer)]["found_inf_per_device"]
                 .values()]
        for flag in found:
            flag.copy_(torch.stack(found).amax(0))
        return optimizers

    def check_losses(self, total=None):
        """Raises NonFiniteLoss where the loss or a gradient of a step is not finite.

        total: the step's loss. It is kept with the greatest gradients and checked at once; on a
        GPU, where a check makes the host wait, every 20 steps. None: checks what is left.
        """
        if total is not None:
            weights = [weight for weight in self.weights if weight.grad is not None]
            gradients = [weight.grad for weight in weights]
            greatest = torch._foreach_norm(gradients, math.inf) if gradients else ()
            self.unchecked.append((self.iteration, weights,
                                   torch.stack([total.detach(), *greatest])))    # [1 + weights]
            if total.is_cuda and len(self.unchecked) < 20:
                return
        unchecked, self.unchecked = self.unchecked, []
        for iteration, weights, values in unchecked:
            loss, *gradients = values.tolist()
            if not math.isfinite(loss):
                raise NonFiniteLoss(f"the loss is {loss} in", self.epoch, iteration)
            wrong = [weight for weight, value in zip(weights, gradients)
                     if not math.isfinite(value)]
            # A grad_scaler leaves such steps out, and halves its scale until there are none.
            if wrong and not (self.grad_scaler.is_enabled() and self.grad_scaler.get_scale() >= 1):
                raise NonFiniteLoss(f"the gradient of {self.name_of(wrong)} is not finite in",
                                    self.epoch, iteration)

    def check_weights(self):
        """As check_losses, and checks the weights, which the last step may have spoilt."""
        self.check_losses()
        wrong = [weight for weight in self.weights if not weight.isfinite().all()]
        if wrong:
            raise NonFiniteLoss(f"the weight {self.name_of(wrong)} is not finite after",
                                self.epoch, self.iteration)

    def name_of(self, weights):
        """The name of the last of the weights: what is wrong in the loss spoils those before."""
        names = {weight: f"{name}.{own}" for name, part in self.modules()
                 for own, weight in part.named_parameters()}
        return names.get(weights[-1], "a weight of an optimizer")

    def step_schedulers(self, when, *value):
        """Steps the schedulers whose key ends in `when`, also of networks that do not learn now.
        """
        for name, scheduler in self.lr_schedulers.items():
            if name.endswith(when):
                scheduler.step(*value)

    def step_lr_plateau_schedulers(self, value):
        """Hands a validation metric to the schedulers by plateau; for an end_of_epoch_hook."""
        self.step_schedulers("_by_plateau", value)

    def get_global_iteration(self):
        """Iterations since the first epoch."""
        return self.iteration + self.iterations_per_epoch * (self.epoch - 1)

    @property
    def loss_tracker(self):
        """losses, 0 for those not computed, and loss_weights: for pytorch-metric-learning's hooks.
        """
        weights = {**self.loss_weights, "total_loss": 1}
        return types.SimpleNamespace(losses={**dict.fromkeys(weights, 0), **self.losses},
                                     loss_weights=weights)

    # Modes

    def parts(self):
        """Every model and loss by name."""
        return {**self.models, **self.loss_funcs}.items()

    def modules(self):
        """The parts that are modules, as (name, module)."""
        return [(name, part) for name, part in self.parts() if isinstance(part, torch.nn.Module)]

    def set_to_train(self):
        """Train mode for all that learns; eval mode and no gradients for what is frozen."""
        self.resting = (*self.freeze_these, *self.idle,
                        *["trunk"] * (self.epoch <= self.warm_up_epochs))
        for name, part in self.modules():
            part.train(name not in self.resting)
            if name in self.freeze_these:
                part.requires_grad_(False)
        for layer in self.models["trunk"].modules() if self.freeze_trunk_batchnorm else ():
            if isinstance(layer, torch.nn.modules.batchnorm._BatchNorm):
                layer.eval()
        self.active_optimizers = [optimizer for name, optimizer in self.optimizers.items()
                                  if name.removesuffix("_optimizer") not in self.resting]
        # All of models and losses, and whatever else the optimizers hold, each once.
        held = [group["params"] for optimizer in self.optimizers.values()
                for group in optimizer.param_groups]
        self.weights = list(dict.fromkeys(
            weight for weights in (*(part.parameters() for _, part in self.modules()), *held)
            for weight in weights))
        for optimizer in self.optimizers.values():
            optimizer._opt_called = True  # no warning of a schedule that begins while it rests

    def set_to_eval(self):
        """Eval mode for all models and losses."""
        for _, part in self.modules():
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
                **{group: {name: part.state_dict() for name, part in self.stateful(group)}
                   for group in self.STATE_GROUPS}}

    def stateful(self, group):
        """The parts of one of STATE_GROUPS that have a state, as (name, part)."""
        return [(name, part) for name, part in getattr(self, group).items()
                if hasattr(part, "state_dict")]

    def load_state_dict(self, state):
        """Loads what state_dict gave; after an error the trainer may be partly restored."""
        for group in self.STATE_GROUPS:
            parts = dict(self.stateful(group))
            if state[group].keys() != parts.keys():
                raise ValueError(f"the saved {group} are {', '.join(state[group]) or 'none'}, the "
                                 f"trainer's {', '.join(parts) or 'none'}")
            for name, part in parts.items():
                part.load_state_dict(state[group][name])
        if self.grad_scaler.is_enabled():
            self.grad_scaler.load_state_dict(state["grad_scaler"])
        self.epoch = self.epochs_done = state["epoch"]
        self.iterations_done, self.goes_on = state["iteration"], True
        self.place = copy.deepcopy(state["place"])
        self.skipped_steps = state["skipped_steps"]

    # The data

    def make_loader(self):
        """torch's DataLoader over the dataset.

        Its processes stay alive from epoch to epoch, unless the dataset's set_epoch would not
        reach them (they hold copies; an epoch in shared memory does).
        """
        epoch = getattr(self.dataset, "epoch", None)
        lasting = not hasattr(self.dataset, "set_epoch") or (torch.is_tensor(epoch)
                                                             and epoch.is_shared())
        order = {"batch_size": self.batch_size, "drop_last": True, "sampler": self.sampler}
        if isinstance(self.sampler, torch.utils.data.BatchSampler):
            order = {"batch_sampler": self.sampler}
        elif self.sampler is None:
            order["sampler"] = torch.utils.data.RandomSampler(self.dataset,
                                                              generator=torch.Generator())
        return torch.utils.data.DataLoader(
            self.dataset, **order, num_workers=self.dataloader_num_workers,
            collate_fn=self.collate_fn, worker_init_fn=auxiliaries.heed_parent_alone,
            persistent_workers=lasting and self.dataloader_num_workers > 0,
            generator=torch.Generator(),
            pin_memory=torch.device(self.data_device).type == "cuda"
            and not getattr(self.dataset, "on_device", False))

    def set_lengths(self, iterations_per_epoch):
        """Sets pass_length, in batches, None if it is not known, and iterations_per_epoch."""
        try:
            self.pass_length = len(self.loader)
        except TypeError:
            self.pass_length = None
            if not iterations_per_epoch:
                raise ValueError("the sampler has no length; iterations_per_epoch says how long "
                                 "an epoch is") from None
        self.iterations_per_epoch = iterations_per_epoch or self.pass_length
        if not (self.iterations_per_epoch or 0) > 0:
            raise ValueError(f"there is no whole batch: a batch of {self.batch_size} from a "
                             f"dataset of {len(self.dataset)}, or from a sampler that gives less")

    def start_pass(self, place=None):
        """Starts the next pass over the data, or continues one after the batches already taken.

        place: see state_dict. The seeds are what a plain DataLoader would draw from torch's global
        generator; drawing them here makes the numbers the same for any number of loading
        processes. A sampler with an attribute `skip` leaves the batches out that were taken; else
        they are loaded and dropped, which leaves the random generators as they are.
        """
        if place is None:
            seeds = [int(torch.empty((), dtype=torch.int64).random_())
                     for _ in range(2 if self.sampler is None else 1)]
            place = {"pass": self.place["pass"] + 1, "taken": 0, "seeds": seeds}
        self.place, self.batches = place, iter(())
        if not place["seeds"] or 0 < place["taken"] == self.pass_length:  # not begun, or over
            return
        for part in (self.sampler, self.dataset):
            if hasattr(part, "set_epoch"):
                part.set_epoch(place["pass"])
        for part, seed in zip((self.loader, self.loader.sampler), place["seeds"]):
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
        """The trunk as a training step calls it: data -> features [B, F] of the whole batch.

        Of several processes each has a share of the data. A frozen trunk needs no
        DistributedDataParallel.
        """
        trunk = self.models["trunk"]
        if self.processes == 1:
            return trunk
        if any(weight.requires_grad for weight in trunk.parameters()):
            with warnings.catch_warnings():  # torch 2.15 has another name for it, 2.6 not yet
                warnings.filterwarnings("ignore", ".*broadcast_buffers", FutureWarning)
                trunk = torch.nn.parallel.DistributedDataParallel(trunk, broadcast_buffers=False)
        return lambda data: GatherFeatures.apply(trunk(data))

    # Labels and keys

    def process_labels(self, labels):
        """Labels of the loader -> LongTensor [B]: one hierarchy level, ranks if asked for."""
        level = self.label_hierarchy_level
        if isinstance(labels, (list, tuple)) and np.ndim(labels[0]) > 0:
            labels = labels[level]                                # collated level by level
        labels = labels if torch.is_tensor(labels) else np.asarray(labels)
        if labels.ndim == 2:
            labels = labels[:, level]
        if self.label_ranks is not None:
            try:
                labels = torch.tensor([self.label_ranks[label] for label in labels.tolist()])
            except KeyError as error:
                raise ValueError(f"label {error} is not among dataset_labels") from error
        elif (labels.is_floating_point() if torch.is_tensor(labels)
              else labels.dtype.kind not in "iub"):
            raise ValueError(f"labels such as {labels[0].item()!r} are not integers; "
                             "set_min_label_to_zero with dataset_labels turns strings into "
                             "numbers")
        return torch.as_tensor(labels).long()

    def rank_labels(self):
        """{label: its rank among dataset_labels, of the hierarchy level}; None without ranks."""
        if not self.set_min_label_to_zero:
            return None
        if self.dataset_labels is None:
            raise ValueError("set_min_label_to_zero needs dataset_labels, the labels of the "
                             "dataset")
        labels = np.asarray(self.dataset_labels)
        labels = labels[:, self.label_hierarchy_level] if labels.ndim == 2 else labels
        return {label: rank for rank, label in enumerate(np.unique(labels).tolist())}

    def check_keys(self):
        """Raises ValueError for a missing or unknown key of a dictionary, with those allowed."""
        names = (*self.model_names, *self.loss_names)
        schedulers = [f"{name}_scheduler_by_{when}" for name in names
                      for when in ("iteration", "epoch", "plateau")]
        for argument, allowed, required in (
                ("models", self.model_names, self.required_models),
                ("loss_funcs", self.loss_names, self.required_losses),
                ("mining_funcs", self.miner_names, ()),
                ("loss_weights", (*self.loss_names, *self.regularisers),
                 (*self.loss_funcs, *self.regularisers)),
                ("optimizers", [f"{name}_optimizer" for name in names], ()),
                ("lr_schedulers", schedulers, ()),
                ("gradient_clippers", [f"{name}_grad_clipper" for name in names], ()),
                ("freeze_these", names, ())):
            given = getattr(self, argument)
            wrong = [f"unknown key {key!r}" for key in given if key not in allowed] + [
                f"no key {key!r}" for key in required if key not in given]
            if wrong:
                raise ValueError(f"{type(self).__name__}: {wrong[0]} in {argument}; allowed are "
                                 f"{', '.join(allowed)}")
        for name in self.model_names:
            loss = name.replace("classifier", "classifier_loss")
            if loss != name and (name in self.models) != (loss in self.loss_funcs):
                raise ValueError(f"{type(self).__name__}: {name} in models and {loss} in "
                                 "loss_funcs go together; one of them is missing")
        if "subset_batch_miner" in self.mining_funcs and auxiliaries.num_ranks() > 1:
            raise ValueError("a subset_batch_miner works in one process only, not under torchrun")


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
    {"metric_loss": ..., "classifier_loss": callable(logits [B, C], labels [B])}. Either loss may
    be alone. No one paper's method: a common way to keep a metric loss from collapsing.
    """

    model_names = ("trunk", "embedder", "classifier")
    loss_names = ("metric_loss", "classifier_loss")
    required_losses = ()
    takes = ("classifier_weight", "classifier_lr")

    def check_keys(self):
        super().check_keys()
        if not self.loss_funcs:
            raise ValueError("TrainWithClassifier has no loss: it needs metric_loss in "
                             "loss_funcs, or a classifier in models with its classifier_loss")

    def calculate_loss(self, data, labels):
        embeddings, losses = self.compute_embeddings(data), {}                   # [B, D]
        if "classifier" in self.models:
            logits = self.models["classifier"](embeddings)                       # [B, C]
        if "metric_loss" in self.loss_funcs:
            indices_tuple = self.mine_tuples(embeddings, labels)
            losses["metric_loss"] = self.loss_funcs["metric_loss"](
                embeddings, labels, indices_tuple)
        if "classifier" in self.models:
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
    section whose miner returns nothing is left out of that step; if all are, the step is skipped.
    Departs from the paper: all sections share one trunk's features.
    """

    takes = ("embedding_sizes",)

    def __init__(self, embedding_sizes, *args, **kwargs):
        self.embedding_sizes = list(embedding_sizes)
        sections = range(len(self.embedding_sizes))
        self.model_names = ("trunk", "embedder", *(f"classifier_{i}" for i in sections))
        self.required_losses = tuple(f"metric_loss_{i}" for i in sections)
        self.loss_names = self.required_losses + tuple(f"classifier_loss_{i}" for i in sections)
        self.miner_names = ("subset_batch_miner", *(f"tuple_miner_{i}" for i in sections))
        super().__init__(*args, **kwargs)

    def calculate_loss(self, data, labels):
        embeddings = self.compute_embeddings(data)                               # [B, D]
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

    def check_keys(self):
        self.loss_weights = {name.replace("g_hard_lss", "g_hard_loss"): weight
                             for name, weight in self.loss_weights.items()}
        super().check_keys()

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
            for weight in weights:
                weight.requires_grad_(name not in (*self.idle, *self.freeze_these))

    def calculate_loss(self, data, labels):
        losses = {}
        features = self.shared_trunk(data)                                       # [B, F]
        if self.does_metric:
            embeddings = self.models["embedder"](features)                       # [B, D]
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
        synthetic = self.models["generator"](
            torch.cat([anchors, positives, negatives], 1))                       # [T, F]
        rows = torch.stack([anchors, positives, synthetic], 1).flatten(0, 1)       # [3 T, F]
        embeddings = self.models["embedder"](rows)                               # [3 T, D]
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
        self.transforms = list(transforms)
        # Not a method of the trainer: the loader would hold the trainer, which holds the loader.
        super().__init__(*args, **kwargs, collate_fn=functools.partial(
            collate_views, transforms=self.transforms, setter=data_and_label_setter or tuple,
            getter=kwargs.get("data_and_label_getter") or tuple, process=auxiliaries.rank()))


def collate_views(items, transforms, getter, setter, process):
    """Items of a dataset -> all their views [B x N, ...] and the items' places [B x N].

    The places are those in the whole batch, of which this process has the items.
    """
    data = [getter(item)[0] for item in items]
    samples = torch.stack([transform(x) for x in data for transform in transforms])
    places = torch.arange(len(data)) + process * len(data)
    return setter((samples, places.repeat_interleave(len(transforms))))


class TwoStreamMetricLoss(BaseTrainer):
    """Anchors from one stream, positives and negatives from the other: sketch and photograph.

    dataset: items (anchor, positive, label). models, loss_funcs: as MetricLossOnly. mining_funcs:
    {"tuple_miner": callable(anchors [B, D], labels [B], others [B, D], labels [B]) -> (a, p, n) or
    (a1, p, a2, n), a an index of anchors, p and n of others, or the same as [T, 3] or [T, 4]};
    without one, all triplets.
    """

    miner_names = ("tuple_miner",)
    item = ("anchor", "positive", "label")
    views, of_triplets = 2, True

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
        tuples = [torch.as_tensor(part, device=labels.device) for part in tuples]
        for i in (1, 2) if len(tuples) == 3 else (1, 3):
            tuples[i] = tuples[i] + len(anchors)  # others stand behind the anchors below
        return {"metric_loss": self.loss_funcs["metric_loss"](
            torch.cat([anchors, others]), torch.cat([labels, labels]), tuple(tuples))}


TRAINERS = {trainer.__name__: trainer for trainer in (
    MetricLossOnly, TrainWithClassifier, CascadedEmbeddings, DeepAdversarialMetricLearning,
    UnsupervisedEmbeddingsUsingAugmentations, TwoStreamMetricLoss)}


# The flags that only some optimisers, and some schedules, read.
OPTIMIZERS = {"adam": ("adam_eps",), "adamw": ("adam_eps",), "sgd": ("momentum", "nesterov")}
SCHEDULES = {"step": ("tau", "gamma"), "exp": ("gamma",), "plateau": ("plateau_patience", "gamma"),
             "cosine": (), "none": ()}


def add_arguments(parser):
    """Adds the group 'optimisation' to an argparse parser."""
    group = parser.add_argument_group("optimisation")
    group.add_argument("--lr", type=number(float, least=0, most=1e6), metavar="LR",
                       help="learning rate of the network; useful 1e-6 to 1e-4 for pretrained "
                            "networks, 1e-4 to 1e-2 from scratch. Default 1e-5 (reference runs); "
                            "glyphs 1e-3")
    group.add_argument("--fc_lr_mul", type=number(float, least=0, most=1e6), default=0.0,
                       metavar="X",
                       help="learning rate of the embedding layer as a multiple of --lr, often "
                            "10; 0 means the same as --lr. Default %(default)s (reference runs)")
    group.add_argument("--decay", type=number(float, least=0), default=4e-4, metavar="W",
                       help="weight decay (L2) of the network, not of a loss's own weights; "
                            "useful 0 to 1e-3. Default %(default)s (reference runs)")
    group.add_argument("--no_decay_1d", action="store_true",
                       help="no weight decay of biases and normalisations")
    group.add_argument("--optim", choices=OPTIMIZERS, default="adam", metavar="NAME",
                       help="adam, adamw or sgd. Default %(default)s (reference runs)")
    group.add_argument("--adam_eps", type=number(float, above=0), default=1e-8, metavar="EPS",
                       help="adam, adamw: added to the denominator. Default %(default)s")
    group.add_argument("--momentum", type=number(float, least=0, below=1), default=0.9,
                       metavar="M", help="sgd: momentum. Default %(default)s")
    group.add_argument("--nesterov", action="store_true", help="sgd: Nesterov's momentum")
    group.add_argument("--clip_norm", type=number(float, above=0), metavar="X",
                       help="limit of the norm of all networks' gradients; useful 1 to 10. "
                            "Default: none")
    group.add_argument("--clip_value", type=number(float, above=0), metavar="X",
                       help="limit of each number of all gradients; Proxy-Anchor has 10. "
                            "Default: none")
    group.add_argument("--warm_up", type=number(int, least=0), default=0, metavar="N",
                       help="first epochs in which the trunk rests, its batch statistics too, "
                            "while the embedding layer and the loss's own weights learn. Default "
                            "%(default)s")
    group.add_argument("--lr_rise", type=number(int, least=0), default=0, metavar="N",
                       help="first epochs over which all rates rise linearly. Default "
                            "%(default)s")
    group.add_argument("--freeze", nargs="+", default=[], metavar="NAME",
                       help="what never learns: trunk, stem, patch_embed, or layers by their "
                            "names. Default: nothing")
    group.add_argument("--n_epochs", type=number(int, least=0), metavar="N",
                       help="passes over the training images. Default 70 (reference runs); glyphs "
                            "20")
    group.add_argument("--scheduler", choices=SCHEDULES, default="step",
                       metavar="WHEN",
                       help="step: every learning rate times --gamma after each epoch of --tau. "
                            "exp: after every epoch. plateau: when the first recall was no "
                            "better in --plateau_patience evaluations. cosine: to 0 along half "
                            "a wave, over --n_epochs. none: never. Default %(default)s "
                            "(reference runs)")
    group.add_argument("--plateau_patience", type=number(int, least=1), default=5, metavar="N",
                       help="evaluations that --scheduler plateau waits for; useful 2 to 10. "
                            "Default %(default)s")
    group.add_argument("--patience", type=number(int, least=1), metavar="N",
                       help="end the run after N evaluations in a row without a better first "
                            "recall; useful 5 to 20. Default: all of --n_epochs (reference code)")
    group.add_argument("--gamma", type=number(float, above=0, most=1), default=0.3, metavar="G",
                       help="factor of the scheduler. Default %(default)s (reference runs)")
    group.add_argument("--tau", type=number(int, least=1), nargs="+", metavar="E",
                       help="epochs after which --scheduler step lowers the rates. Default 30 55 "
                            "(reference runs); glyphs 15")
    trainer = parser.add_argument_group("trainer (how a batch becomes losses)")
    trainer.add_argument("--trainer", choices=TRAINERS, default="MetricLossOnly",
                         metavar="NAME",
                         help=f"{', '.join(TRAINERS)}; README, Trainers, says what each does. "
                              "Default %(default)s (reference code)")
    trainer.add_argument("--classifier_weight", type=number(float, least=0), default=1.0,
                         metavar="W",
                         help="TrainWithClassifier: weight of the classifier's cross-entropy, the "
                              "metric loss having 1; useful 0.1 to 2. Default %(default)s")
    trainer.add_argument("--classifier_lr", type=number(float, least=0, most=1e6), metavar="LR",
                         help="TrainWithClassifier: learning rate of the classifier. Default 10 "
                              "times --lr")
    trainer.add_argument("--embedding_sizes", type=number(int, least=1), nargs="+", metavar="D",
                         help="CascadedEmbeddings: lengths of the sections, which sum to "
                              "--embed_dim. Default three about equal ones (the paper has three)")
    trainer = parser.add_argument_group("trainer (DeepAdversarialMetricLearning)")
    trainer.add_argument("--metric_alone_epochs", type=number(int, least=0), default=0,
                         metavar="N", help="first epochs with the metric loss alone. Default "
                                           "%(default)s")
    trainer.add_argument("--g_alone_epochs", type=number(int, least=0), default=0, metavar="N",
                         help="epochs after those with the generator alone. Default %(default)s")
    trainer.add_argument("--g_triplets_per_anchor", type=number(int, least=1), default=10,
                         metavar="N",
                         help="triplets of each image that go through the generator; useful 1 to "
                              "100. Default %(default)s (the library these trainers follow has "
                              "100)")
    trainer.add_argument("--g_lr", type=number(float, least=0, most=1e6), metavar="LR",
                         help="learning rate of the generator. Default --lr")
    trainer.add_argument("--g_weights", type=number(float, least=0), nargs=4, default=[1.0] * 4,
                         metavar=("ADV", "HARD", "REG", "SYNTH"),
                         help="weights of its adversarial, hard, regularisation and synthetic "
                              "losses, the metric loss having 1. Default 1 each")


def trainer_select(opt, trunk, embedder, make_loss, train_set, batches, device):
    """The trainer of the options, an optimiser and a schedule for each part that learns.

    make_loss: callable(**changes of options) -> (loss, its parameter group or None); train_set:
    the dataset; batches: its batch sampler. All is on the device afterwards.
    """
    models, loss_funcs, groups, own = {}, {}, {}, {}

    def add_model(name, model, lr):
        models[name] = model
        groups[name] = {"params": list(model.parameters()), "lr": lr}

    def add_loss(name, **changes):
        loss_funcs[name], group = make_loss(**changes)
        groups.update({name: group} if group else {})

    add_model("trunk", trunk, opt.lr)
    add_model("embedder", embedder, opt.lr * (opt.fc_lr_mul or 1))
    if opt.trainer != "CascadedEmbeddings":  # whose sections have one each
        add_loss("metric_loss")
    if opt.trainer == "TrainWithClassifier":
        add_model("classifier", torch.nn.Linear(opt.embed_dim, len(train_set.class_names)),
                  opt.classifier_lr)
        loss_funcs["classifier_loss"] = torch.nn.CrossEntropyLoss()
        own["loss_weights"] = {"metric_loss": 1, "classifier_loss": opt.classifier_weight}
    elif opt.trainer == "CascadedEmbeddings":
        own["embedding_sizes"] = opt.embedding_sizes
        for i, size in enumerate(opt.embedding_sizes):
            add_loss(f"metric_loss_{i}", embed_dim=size)
    elif opt.trainer == "DeepAdversarialMetricLearning":
        for name in ("g_adv_loss", "synth_loss"):
            add_loss(name, loss="triplet", sampling="distance")
        add_model("generator", make_generator(trunk.num_features), opt.g_lr)
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
    own["freeze_these"] = [name for name in opt.freeze if name == "trunk"]
    trunk.freeze([name for name in opt.freeze if name != "trunk"])
    optimizers = {f"{name}_optimizer": optimizer_select(opt, group)
                  for name, group in groups.items()}
    trainer = TRAINERS[opt.trainer](
        models=models, optimizers=optimizers, batch_size=opt.bs, loss_funcs=loss_funcs,
        dataset=train_set, data_device=device, sampler=batches,
        lr_schedulers=schedulers_select(opt, optimizers, len(batches)),
        gradient_clippers=clippers_select(opt, models, loss_funcs),
        freeze_trunk_batchnorm=opt.batchnorm == "frozen", dataloader_num_workers=opt.kernels,
        grad_scaler=torch.amp.GradScaler(device.type) if opt.amp == "fp16" else None, **own)
    trainer.warm_up_epochs = opt.warm_up
    trainer.diagnoses = {name.removeprefix("metric_loss"): Diagnosis(loss)
                         for name, loss in loss_funcs.items() if name.startswith("metric_loss")}
    return trainer


def make_generator(size):
    """Features of a triplet [T, 3 F] -> a negative's [T, F]; two layers, as in the paper."""
    return torch.nn.Sequential(torch.nn.Linear(3 * size, size), torch.nn.ReLU(),
                               torch.nn.Linear(size, size))


def optimizer_select(opt, group):
    """The optimiser, by --optim, of the weights of one part: {"params": [weight, ...], "lr": ...}.

    What the group itself says, such as "weight_decay", wins.
    """
    groups = [dict(group)]
    if opt.no_decay_1d:
        thin, wide = ([weight for weight in group["params"] if (weight.dim() < 2) == is_thin]
                      for is_thin in (True, False))
        groups = [{**group, "params": wide}, {**group, "params": thin, "weight_decay": 0}]
    if opt.optim == "sgd":
        return torch.optim.SGD(groups, weight_decay=opt.decay, momentum=opt.momentum,
                               nesterov=opt.nesterov)
    return {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[opt.optim](
        groups, weight_decay=opt.decay, eps=opt.adam_eps)


def clippers_select(opt, models, loss_funcs):
    """The gradients' clippers, {"<part>_grad_clipper": callable()}, by --clip_norm, --clip_value.

    The norm is that of all networks together, as in the authors' code that clips it.
    """
    weights = [weight for model in models.values() for weight in model.parameters()]
    clippers = {}
    if opt.clip_norm:
        clippers["embedder_grad_clipper"] = functools.partial(
            torch.nn.utils.clip_grad_norm_, weights, opt.clip_norm)
    if opt.clip_value:
        own = [weight for loss in loss_funcs.values() for weight in loss.parameters()]
        clippers["trunk_grad_clipper"] = functools.partial(
            torch.nn.utils.clip_grad_value_, weights + own, opt.clip_value)
    return clippers


def schedulers_select(opt, optimizers, iterations):
    """The schedules of the optimizers, {"<part>_optimizer": ...}, by --scheduler and --lr_rise.

    iterations: of an epoch.
    """
    schedulers = {}
    for name, optimizer in optimizers.items():
        key = name.removesuffix("_optimizer") + "_scheduler_by_epoch"
        if opt.lr_rise:
            schedulers[key.replace("epoch", "iteration")] = lr_scheduler.LinearLR(
                optimizer, 1e-3, total_iters=opt.lr_rise * iterations)
        if opt.scheduler == "step":
            schedulers[key] = lr_scheduler.MultiStepLR(optimizer, opt.tau, opt.gamma)
        elif opt.scheduler == "exp":
            schedulers[key] = lr_scheduler.ExponentialLR(optimizer, opt.gamma)
        elif opt.scheduler == "cosine":
            schedulers[key] = lr_scheduler.CosineAnnealingLR(optimizer, max(1, opt.n_epochs))
        elif opt.scheduler == "plateau":  # its patience is how many it lets pass
            schedulers[key.replace("epoch", "plateau")] = lr_scheduler.ReduceLROnPlateau(
                optimizer, "max", opt.gamma, opt.plateau_patience - 1, threshold=0)
    return schedulers


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
    untrained network if a caller measures it, is the best only if no other is measured.
    """

    def __init__(self, measure, metric=None, every=1, patience=None, checkpoint=None,
                 state=lambda trainer: trainer.state_dict(), rows=()):
        self.measure = measure
        self.metric = metric
        self.every = every
        self.patience = patience
        self.checkpoint = checkpoint
        self.state = state
        self.rows = list(rows)

    def __call__(self, trainer):
        """Measures if it is time; returns False, which ends the training, if patience is over."""
        if trainer.epoch != trainer.last_epoch and (trainer.epoch % self.every
                                                    or "trunk" in trainer.idle):
            return None
        trainer.set_to_eval()
        with torch.no_grad():
            metrics = self.measure(trainer)
        # Plain numbers: a checkpoint with numpy's could not be read without running code.
        row = {"epoch": trainer.epoch, **{name: float(value) for name, value in metrics.items()}}
        if self.metric and self.metric not in row:
            raise ValueError(f"Validation: measure must give {self.metric}; it gives "
                             f"{', '.join(metrics)}")
        self.rows.append(row)
        if trainer.epoch and trainer.epoch % self.every == 0:
            trainer.step_lr_plateau_schedulers(row[self.name()])
        if self.checkpoint and self.best() is row:
            auxiliaries.save_checkpoint(self.checkpoint, {**self.state(trainer),
                                                          "validation_rows": self.rows})
        return False if self.is_over() else None

    def name(self):
        """The name of the metric that counts; there must be a row."""
        return self.metric or next(key for key in self.rows[0] if key != "epoch")

    def best(self):
        """The row with the greatest metric, the first of equals."""
        return auxiliaries.best_row(self.rows, self.name())

    def is_over(self):
        """Whether the last `patience` measurements are no better than one before them."""
        return auxiliaries.is_over(self.rows, self.name(), self.every, self.patience)


def in_turn(*hooks):
    """One hook that calls several: hook(trainer); False, which ends the training, if any was."""
    def hook(trainer):
        returned = [each(trainer) for each in hooks]
        return False if any(value is False for value in returned) else None
    return hook


class Diagnosis:
    """Statistics of the embeddings of training batches, averaged until row() is called.

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

        "active": share of the tuples whose loss is not zero, of losses that count them.
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
