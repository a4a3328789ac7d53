"""The README's new loss and new network, added as it stands there to a copy of the tree.

Each is blocks of code, first a class and last a row of a table; names are read from them.
"""

import filecmp
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import make_tree

ROOT = Path(__file__).resolve().parent.parent
# Below a title of the README's: the file that changes, and its table.
RECIPES = {"### Add a loss": ("losses.py", "LOSSES"), "### Add a network": ("netlib.py", "NETWORKS")}

TRAIN = """
import sys
import torch
import main, netlib
loss, flag, value, network, tree = sys.argv[1:]
small = ["--dataset", "folder", "--source_path", tree, "--gpu", "-1", "--kernels", "0", "--bs", "8",
         "--k_vals", "1", "--n_epochs", "1"]
fast = [*small, "--arch", "convnet", "--image_size", "16", "--embed_dim", "8"]
main.main([*fast, "--loss", loss, "--savename", "loss"])
main.main([*fast, "--loss", loss, f"--{flag}", value, "--savename", "flag"])

row = netlib.NETWORKS[network]
state = {name: value / 2 for name, value in row.make().state_dict().items()}
torch.save({**state, f"{row.heads[0]}.weight": torch.zeros(9, 9)}, "weights.pth")
folder = main.main([*small, "--arch", network, "--weights", "weights.pth", "--lr", "0",
                    "--savename", "network"])
trunk = torch.load(f"{folder}/checkpoint.pth.tar")["models"]["trunk"]
assert all(torch.equal(trunk[f"backbone.{name}"], value) for name, value in state.items())
options = torch.load(f"{folder}/checkpoint.pth.tar")["options"]
assert row.defaults.items() <= options.items() and row.mean != netlib.IMAGENET_MEAN
"""


def recipe(title):
    """The README's recipe -> (its text, the class's code, the row)."""
    section = (ROOT / "README.md").read_text().split(title)[1]
    section = re.split(r"^##", section, maxsplit=1, flags=re.M)[0]
    code, row = re.findall(r"```python\n(.*?)```", section, re.S)
    return section, code, row


def name_of(row):
    return re.match(r' {4}"(\w+)": ', row)[1]


def python(folder, *command):
    """What a command prints in the folder; it must end well."""
    done = subprocess.run([sys.executable, *command], cwd=folder, text=True, timeout=300,
                          capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """A copy of the tree with the parts of each recipe in their files."""
    folder = tmp_path_factory.mktemp("copy")
    files = [path.name for path in ROOT.glob("*.py")]
    for file in files:
        shutil.copy(ROOT / file, folder)
    shutil.copytree(ROOT / "tests", folder / "tests")
    for title, (file, table) in RECIPES.items():
        _, code, row = recipe(title)
        text = (folder / file).read_text()
        assert name_of(row) not in text, f"{file} has what the README adds"
        text, count = re.subn(rf"^{table} = {{\n(.*?)^}}", lambda found: (
            f"{code}\n\n{table} = {{\n{found[1]}{row}}}"), text, flags=re.M | re.S)
        assert count == 1
        (folder / file).write_text(text)
    changed = filecmp.cmpfiles(ROOT, folder, files, shallow=False)[1]
    assert sorted(changed) == ["losses.py", "netlib.py"]
    return folder


def test_the_readmes_loss_passes_its_checks(copy):
    section, _, row = recipe("### Add a loss")
    assert f"python main.py --dataset glyphs --loss {name_of(row)}" in section
    command = re.search(rf"python (\S+ {name_of(row)})", section)[1]
    assert "all checks passed" in python(copy, *command.split())


def test_the_readmes_loss_and_network_train(copy, tmp_path):
    """The loss's flag has an effect; the network takes a file, its row's defaults and scale."""
    _, code, row = recipe("### Add a loss")
    flag, value = re.search(r"def __init__\(self, (\w+)=([\d.]+)", code).groups()
    section, _, network = recipe("### Add a network")
    assert f"python main.py --dataset glyphs --arch {name_of(network)}" in section
    tree = make_tree(tmp_path / "tree", (4,) * 4)
    python(copy, "-c", TRAIN, name_of(row), flag, str(float(value) / 2), name_of(network), str(tree))
    logs = [(copy / f"Training_Results/folder/{name}/log_train_Base.csv").read_text()
            for name in ("loss", "flag", "network")]
    assert len(set(logs)) == 3
