"""check_loss.py: sound losses pass its checks, each broken one fails that which is about it."""

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

import check_loss
import losses
from losses import LOSSES

def checked(capsys, *names):
    """check_loss.main([NAME, ...]) -> what it returns, {loss: {check: message}}."""
    failed, table = check_loss.main(list(names)), {}
    *lines, last = capsys.readouterr().out.splitlines()
    for line in lines:
        table.setdefault(line[:16].strip(), {})[line[17:35].strip()] = line[36:]
    assert last == (f"failed: {', '.join(failed)}" if failed else "all checks passed")
    return failed, table


class SoundLoss(losses.Loss):
    """Positives towards cosine 1, negatives down: passes the checks; broken ones below."""

    @losses.full_precision
    def forward(self, embeddings, labels, indices_tuple=None):
        positive, negative = losses.pairs_for(None, embeddings, labels, indices_tuple)
        return self.value(losses.cosine_matrix(embeddings), embeddings, labels, positive, negative)

    def value(self, s, x, labels, positive, negative):
        return losses.mean_where(1 - s, positive) + losses.mean_where(s.exp(), negative)


class WeightsByColumn(losses.ClassLoss):
    """A normalised softmax whose weights are [D, C]: sound, too."""

    def __init__(self, num_classes, embed_dim):
        super().__init__(num_classes)
        self.weight = torch.nn.Parameter(torch.randn(embed_dim, num_classes))

    @losses.full_precision
    def forward(self, embeddings, labels, indices_tuple=None):
        cosines = F.normalize(embeddings, dim=1) @ F.normalize(self.weight, dim=0).to(
            embeddings.dtype)
        return self.mean_cross_entropy(10 * cosines, embeddings, labels, indices_tuple)


class HalfPrecision(SoundLoss):
    """e^12 is more than float16 holds."""

    def forward(self, embeddings, labels, indices_tuple=None):
        losses.check_batch(self, embeddings, labels)
        same, positive = losses.Sampler.pair_masks(labels)
        terms = (12 * losses.cosine_matrix(embeddings)).exp()
        return losses.mean_where(terms, ~same) - losses.mean_where(terms, positive)


class TakesNaN(SoundLoss):
    def forward(self, embeddings, labels, indices_tuple=None):
        embeddings = embeddings if embeddings.dtype.itemsize > 2 else embeddings.float()
        return SoundLoss.forward.__wrapped__(self, embeddings, labels, indices_tuple)


# A loss, or what stands for SoundLoss.value of s, the cosines, x, the embeddings, labels, p and n,
# the masks of pairs; the check that fails; a part of its message.
BROKEN = {
    "sound": (SoundLoss, None, ""), "by column": (WeightsByColumn, None, ""),
    "labels as numbers": (lambda self, s, x, labels, p, n: ((labels[:, None] - labels).abs()
                                                            * s).mean(),
                          "names of classes", "labels are used as numbers"),
    "detached": (lambda self, s, x, labels, p, n: losses.mean_where(s.detach() * s, n),
                 "gradient", "differs from the slope"),
    "root at zero": (lambda self, s, x, labels, p, n: s[n].sum() + (
        (x[:, None] - x).square().sum(2)[p].sqrt().sum()), "degenerate",
                     "a gradient is not finite"),
    "mean of nothing": (lambda self, s, x, labels, p, n: (1 - s)[p].mean(), "degenerate",
                        "single images: the loss is nan"),
    "out of the graph": (lambda self, s, x, labels, p, n: (1 - s)[p].mean() if p.any() else
                         torch.zeros(()), "degenerate", "not in the graph"),
    "half precision": (HalfPrecision, "types and sizes",
                       "torch.float16, batch of 2: a gradient is not finite"),
    "not of three": (lambda self, s, *rest: SoundLoss.value(self, s, *rest) if len(s) != 3
                     else 1 / 0, "types and sizes",
                     f"ZeroDivisionError: division by zero, {__file__} line "),
    "neighbour": (lambda self, s, *rest: SoundLoss.value(self, s.roll(1, 1), *rest), "order",
                  "another order of the batch changes the loss"),
    "takes NaN": (TakesNaN, "bad input", "an embedding that is NaN is accepted"),
    "axes matter": (lambda self, s, x, *rest: SoundLoss.value(self, s, x, *rest)
                    + x.abs().sum(1).mean() / 100, "rotation",
                    "a rotation of the embedding space changes the loss"),
    "wrong sign": (lambda *given: -SoundLoss.value(*given), "learning", "negatives were"),
    "all triplets": (lambda self, s, x, labels, p, n: losses.mean_where(
        F.softplus(s[:, None] - s[:, :, None]), p[:, :, None] & n[:, None]), "memory",
                     "a tensor of 262,144 elements")}


@pytest.mark.parametrize("broken", BROKEN)
def test_broken_losses_fail_the_check_that_is_about_it(monkeypatch, capsys, broken):
    """That check alone, and its line says what is wrong; the other losses are checked too."""
    loss_class, fails, says = BROKEN[broken]
    if not isinstance(loss_class, type):
        loss_class = type("Broken", (SoundLoss,), {"value": loss_class})
    monkeypatch.setitem(LOSSES, "broken", loss_class)
    failed, table = checked(capsys, "broken", "crossentropy")
    assert failed == (["broken"] if fails else []) and list(table) == ["broken", "crossentropy"]
    lines = table["broken"]
    assert [check for check in lines if lines[check] != "pass"] == ([fails] if fails else [])
    assert not fails or lines[fails].startswith("FAIL  ") and says in lines[fails]


def test_a_value_that_is_no_scalar(monkeypatch, capsys):
    no_scalar = type("NoScalar", (SoundLoss,), {"value": lambda self, s, *_: s.mean(1)})
    monkeypatch.setitem(LOSSES, "broken", no_scalar)
    assert "not a scalar" in checked(capsys, "broken")[1]["broken"]["contract"]


def test_the_checker_runs_as_a_command():
    """python tests/check_loss.py NAME, from any folder."""
    done = subprocess.run([sys.executable, check_loss.__file__, "npair"], capture_output=True,
                          text=True, cwd="/")
    assert done.returncode == 0 and "all checks passed" in done.stdout
