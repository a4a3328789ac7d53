"""Looks for what is commonly wrong with a loss: python tests/check_loss.py NAME [NAME ...|all].

NAME is a key of losses.LOSSES; a new loss needs nothing here. What its equation says is for
tests/test_losses.py, which runs these checks on every loss. stops_gradients = True and
rotation_invariant = False in the class of a loss say what cannot be expected of it.
"""

import argparse
import functools
import os
import sys
import traceback

import torch
import torch.nn.functional as F

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))

import losses
import samplers

CHECK_CLASSES = 8


class LossCheck:
    """The checks of one loss of LOSSES, with the default flags, as methods check_*.

    Each raises AssertionError where the loss fails; its docstring says what a failure means.
    Embeddings are random, [B, D], unit-norm where the loss wants them so; all else is seeded.
    """

    def __init__(self, name):
        self.name = name
        self.loss_class = losses.LOSSES[name]

    @functools.cached_property
    def opt(self):
        """The flags, at their defaults."""
        parser = argparse.ArgumentParser()
        for module in (samplers, losses):
            module.add_arguments(parser)
        parser.set_defaults(proxy_lr=1e-2, loss_lr=1e-2,
                            sampling=next(iter(self.loss_class.samplings), "none"))
        return parser.parse_args(["--loss", self.name])

    def build(self, dtype=torch.float32, embed_dim=16):
        """The loss with the default flags, weights seeded."""
        torch.manual_seed(0)
        return losses.loss_select(self.opt, CHECK_CLASSES, embed_dim=embed_dim)[0].to(dtype)

    def rows(self, number, dtype=torch.float32, embed_dim=16, seed=0):
        """Random embeddings [number, D] of the kind that the loss wants, a leaf of the graph."""
        generator = torch.Generator().manual_seed(seed)
        rows = torch.randn(number, embed_dim, generator=generator, dtype=torch.float64)
        if self.loss_class.unit_norm:
            rows = F.normalize(rows, dim=1)
        return rows.to(dtype).requires_grad_()

    def labels(self, number):
        """Labels [number], images of a class apart in the batch."""
        return torch.arange(number) % max(1, min(CHECK_CLASSES, number // 2))

    def value(self, loss, rows, labels, tuples=None):
        """The loss, with everything random seeded."""
        torch.manual_seed(0)
        return loss(rows, labels, tuples)

    def tuples(self, loss, rows, labels):
        """The tuples that the loss samples for this batch, or None where it samples none."""
        if loss.sampler is None:
            return None
        torch.manual_seed(0)
        tuples = loss.sampler.give(rows.detach(), labels)
        return loss.complete(tuples, labels) if hasattr(loss, "complete") else tuples

    def is_finite(self, loss, rows, labels, what, tuples=None):
        """Asserts a finite value, a scalar, and finite gradients -> that of the embeddings."""
        value = self.value(loss, rows, labels, tuples)
        assert torch.is_tensor(value) and value.dim() == 0, f"{what}: not a scalar tensor"
        assert torch.isfinite(value), f"{what}: the loss is {value.item()}"
        assert value.requires_grad, f"{what}: the loss is not in the graph; multiply by 0 instead"
        gradients = torch.autograd.grad(value, [rows, *loss.parameters()], allow_unused=True)
        assert gradients[0] is not None, f"{what}: the embeddings get no gradient"
        for gradient in gradients:
            assert gradient is None or torch.isfinite(gradient).all(), \
                f"{what}: a gradient is not finite"
        return gradients[0]

    def check_contract(self):
        """a value that is no scalar, or without a gradient for the embeddings"""
        gradient = self.is_finite(self.build(), self.rows(16), self.labels(16), "batch of 16")
        assert gradient.any(), "the embeddings get no gradient"

    def check_types_and_sizes(self):
        """half precision overflows, or some batch size gives NaN: use @full_precision, clamp"""
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            for number in (2, 3, 64, 256) if dtype == torch.float16 else (2, 3, 64):
                self.is_finite(self.build(), self.rows(number, dtype), self.labels(number),
                               f"{dtype}, batch of {number}")

    def check_degenerate(self):
        """a batch without tuples must give a zero in the graph, roots need a clamp"""
        same = self.rows(1).expand(8, -1)
        batches = {
            "one class": (self.rows(8), torch.zeros(8)),
            "single images": (self.rows(8), torch.arange(8)),
            "one image": (self.rows(1), torch.tensor([2])),
            "no image": (self.rows(0), torch.arange(0)),
            "identical embeddings of one class": (same, torch.zeros(8)),
            "identical embeddings": (same, self.labels(8)),
            "an antipodal pair": (torch.cat([same[:4], -same[:4]]), torch.arange(8) % 4),
            "nothing left to learn": (torch.eye(16)[torch.arange(8) // 2], torch.arange(8) // 2)}
        for what, (rows, labels) in batches.items():
            self.is_finite(self.build(), rows.detach().clone().requires_grad_(), labels.long(),
                           what)
        self.is_finite(self.build(), self.rows(8), self.labels(8), "indices_tuple without a tuple",
                       torch.empty(0, 3, dtype=torch.long))

    def check_gradient(self):
        """the gradient is not the slope: a detach(), .data, round or argmax on the way"""
        loss = self.build(torch.float64, embed_dim=5).eval()
        if loss.stops_gradients:
            return
        rows, labels = self.rows(12, torch.float64, 5), self.labels(12)
        tuples = self.tuples(loss, rows, labels)
        # Sampled or mined anew, the tuples would jump where the embeddings move a little.
        right = torch.autograd.gradcheck(
            lambda rows, *_: self.value(loss, rows, labels, tuples), (rows, *loss.parameters()),
            fast_mode=True, raise_exception=False)
        assert right, "the gradient differs from the slope"

    def changed(self, change, what):
        """Asserts that change(loss, rows, labels, tuples) -> the same leaves the value alone."""
        loss = self.build(torch.float64).eval()
        rows, labels = self.rows(24, torch.float64), self.labels(24)
        tuples = self.tuples(loss, rows, labels)
        before = self.value(loss, rows, labels, tuples).detach()
        with torch.no_grad():
            after = self.value(*change(loss, rows, labels, tuples))
        assert torch.allclose(before, after, rtol=1e-9, atol=1e-12), \
            f"{what} changes the loss from {float(before):.10g} to {float(after):.10g}"

    def check_order(self):
        """the order of the images matters: an index is of the wrong vector"""
        def change(loss, rows, labels, tuples):
            order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(1))
            if tuples is not None:
                tuples = torch.where(tuples < 0, tuples, order.argsort()[tuples.clamp_min(0)])
            return loss, rows[order], labels[order], tuples
        self.changed(change, "another order of the batch")

    def check_names_of_classes(self):
        """what a class is called matters: labels are used as numbers"""
        def change(loss, rows, labels, tuples):
            names = torch.randperm(CHECK_CLASSES, generator=torch.Generator().manual_seed(1))
            for weight in (*loss.parameters(), *loss.buffers()):
                for dim, size in enumerate(weight.shape):
                    if size == CHECK_CLASSES:  # a slice for each class
                        weight.copy_(weight.index_select(dim, names.argsort()))
            return loss, rows, names[labels], tuples
        self.changed(change, "other numbers for the classes")

    def check_rotation(self):
        """the axes matter; if the equation wants that, say rotation_invariant = False"""
        def change(loss, rows, labels, tuples):
            rotation = torch.linalg.qr(self.rows(16, torch.float64, seed=1).detach())[0]
            for weight in loss.parameters():
                for dim, size in enumerate(weight.shape):
                    if weight.dim() > 1 and size == 16:
                        weight.copy_((weight.transpose(dim, -1) @ rotation).transpose(dim, -1))
            return loss, rows @ rotation, labels, tuples
        if self.loss_class.rotation_invariant:
            self.changed(change, "a rotation of the embedding space")

    def check_learning(self):
        """thirty steps down the loss bring classes no closer: a sign, or the wrong pairs"""
        loss, labels = self.build(), self.labels(32)
        rows = self.rows(32).detach() + 2 * self.rows(1, seed=1).detach()  # far from where they go
        same, positive = samplers.Sampler.pair_masks(labels)

        def apart(rows):  # how much nearer positives are than negatives
            distances = samplers.pairwise_sq_distances(F.normalize(rows, dim=1))
            return distances[~same].mean() - distances[positive].mean()

        before = apart(rows)
        weights = [rows.requires_grad_(), *loss.parameters()]
        means = [torch.zeros_like(weight) for weight in weights]  # of the gradients
        torch.manual_seed(0)
        for _ in range(30):
            value = loss(F.normalize(rows, dim=1) if loss.unit_norm else rows, labels)
            gradients = torch.autograd.grad(value, weights)
            with torch.no_grad():  # by hand, since an optimiser of torch takes seconds to import
                for weight, mean, gradient in zip(weights, means, gradients):
                    mean.mul_(0.9).add_(gradient)
                    weight -= (0.02 if weight is rows else 0.1) * mean.sign()
        after = apart(rows.detach())
        assert after > before + 0.1, (f"negatives were {float(before):.2f} farther than positives "
                                      f"in squared distance, then {float(after):.2f}")

    def check_memory(self):
        """a tensor of all triplets, B x B x B, which no GPU holds at a large batch"""
        number, largest = 64, [0]

        class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
            def __torch_dispatch__(self, function, types, args=(), kwargs=None):
                found = function(*args, **(kwargs or {}))
                for part in found if isinstance(found, (tuple, list)) else [found]:
                    if torch.is_tensor(part):
                        largest[0] = max(largest[0], part.numel())
                return found

        loss, rows, labels = self.build(), self.rows(number), torch.arange(number) % 2
        with Sizes():
            self.value(loss, rows, labels).backward()
        assert largest[0] <= 16 * number ** 2, (f"a tensor of {largest[0]:,} elements at a batch "
                                                f"of {number}")

    def check_bad_input(self):
        """NaN, or labels of another length, must be an error: use @full_precision"""
        rows, labels = self.rows(8), self.labels(8)
        with_nan = torch.where(torch.arange(8)[:, None] == 3, torch.nan, rows)
        for what, *given in (("an embedding that is NaN", with_nan, labels),
                             ("labels of another length", rows, labels[:-1])):
            try:
                self.value(self.build(), *given)
            except (ValueError, FloatingPointError):
                continue
            raise AssertionError(f"{what} is accepted")

    def run(self):
        """All checks, printed as lines of a table -> whether all passed."""
        good = True
        for check in [name for name in dir(self) if name.startswith("check_")]:
            method, message = getattr(self, check), "pass"
            try:
                method()
            except Exception as error:  # a new loss may raise anything
                message = str(error)
                if not isinstance(error, AssertionError):
                    place = [frame for frame in traceback.extract_tb(error.__traceback__)
                             if "site-packages" not in frame.filename][-1]
                    message = (f"{type(error).__name__}: {error}, {place.filename} line "
                               f"{place.lineno}")
                message, good = f"FAIL  {message} ({method.__doc__})", False
            name = check.removeprefix("check_").replace("_", " ")
            print(f"{self.name:16} {name:18} {message}", flush=True)
        return good


def main(argv=None):
    """Checks the losses named on the command line -> a list of those that fail, of shape [F]."""
    parser = argparse.ArgumentParser(
        description="Looks for what is commonly wrong with a loss: types, degenerate batches, "
                    "gradient, order and names of the classes, bad input. Any loss of the table "
                    "losses.LOSSES, with its default flags and sampling.")
    parser.add_argument("names", nargs="+", choices=(*losses.LOSSES, "all"), metavar="NAME",
                        help=f"{', '.join(losses.LOSSES)}, or all")
    names = parser.parse_args(argv).names
    failed = [name for name in (losses.LOSSES if "all" in names else names)
              if not LossCheck(name).run()]
    print(f"failed: {', '.join(failed)}" if failed else "all checks passed")
    return failed


if __name__ == "__main__":
    torch.set_num_threads(1)  # fastest for tiny tensors
    sys.exit(bool(main()))
