"""README's "Add a loss in four steps", done as it stands there to a copy of the tree.

The names are read from the README: the class from its code, the table's name from the line for
LOSSES, the flags from the constructor's parameters.
"""

import filecmp
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import losses

ROOT = Path(__file__).resolve().parent.parent
TITLE = "### Add a loss in four steps"
RUN = ("main.py", "--dataset", "glyphs", "--n_epochs", "1", "--gpu", "-1", "--kernels", "0",
       "--image_size", "8", "--savename", "run")


def recipe(text):
    """The README's recipe -> (class's name, table's name, its code, its flags, its table line)."""
    section = re.split(r"^##", text.split(TITLE)[1], maxsplit=1, flags=re.M)[0]
    blocks = [re.sub(r"^   ", "", block, flags=re.M)  # the indent of a list's item
              for block in re.findall(r"```python\n(.*?)```", section, re.S)]
    code, flags = blocks
    class_name = re.search(r"class (\w+)", code)[1]
    line = re.search(rf'`("([^"`]+)": \({class_name}, [^`]*\),)`', section)
    assert line, f"no line for LOSSES with {class_name} in README.md"
    new = line[2] not in losses.LOSSES and not hasattr(losses, class_name)
    assert new, f"README.md's recipe adds {class_name}, {line[2]!r}, which losses.py has already"
    for command in (f"python tests/check_loss.py {line[2]}",
                    f"python main.py --dataset glyphs --loss {line[2]}"):
        assert command in section, f"README.md's recipe does not say {command}"
    return class_name, line[2], code, flags, line[1]


def flags_of(code):
    """{flag: default} of the class's numbers: the constructor's parameters."""
    signature = re.search(r"def __init__\(self, (.*?)\):", code, re.S)[1]
    return {flag: float(value) for flag, value in re.findall(r"(\w+)=(-?\d[\d.e-]*)", signature)}


def follow(code, flags, line, folder):
    """Does the three steps of the recipe to losses.py in the folder."""
    text = (folder / "losses.py").read_text()
    for mark, added in ((r"^# name: \(class", code.rstrip() + "\n\n\n"),
                        (r"^LOSSES = \{\n(?:    .*\n)*(?=\})", f"    {line}\n"),
                        (r"^def add_arguments\(.*\n(?:(?:    .*)?\n)*(?=\n\n)", flags)):
        places = list(re.finditer(mark, text, re.M))
        assert len(places) == 1, f"{mark} stands {len(places)} times in losses.py"
        place = places[0].start() if mark.startswith("^#") else places[0].end()
        text = text[:place] + added + text[place:]
    (folder / "losses.py").write_text(text)


def python(folder, *command):
    """What a command prints in the folder; it must end well."""
    done = subprocess.run([sys.executable, *command], cwd=folder, text=True, timeout=300,
                          capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def test_the_readmes_recipe_adds_a_loss(tmp_path):
    """One file changes; the loss passes its checks and trains; each of its flags has an effect."""
    class_name, name, code, flags, line = recipe((ROOT / "README.md").read_text())
    files = sorted(path.name for path in ROOT.glob("*.py"))
    for file in files:
        shutil.copy(ROOT / file, tmp_path)
    (tmp_path / "tests").mkdir()
    shutil.copy(ROOT / "tests" / "check_loss.py", tmp_path / "tests")
    follow(code, flags, line, tmp_path)
    assert filecmp.cmpfiles(ROOT, tmp_path, files, shallow=False)[1:] == (["losses.py"], [])

    assert "all checks passed" in python(tmp_path, "tests/check_loss.py", name)

    run = [*RUN, "--loss", name, "--save_path"]
    logs = {}
    for flag in ("none", "none again", *flags_of(code)):
        changed = [f"--{flag}", str(flags_of(code)[flag] / 2)] if flag in flags_of(code) else []
        python(tmp_path, *run, flag, *changed)
        logs[flag] = (tmp_path / flag / "glyphs" / "run" / "log_train_Base.csv").read_text()
    assert len(logs) > 2, f"{class_name} has no flag of its own to show"
    assert logs.pop("none again") == logs["none"]
    assert len(set(logs.values())) == len(logs), f"one of {list(logs)} changes nothing"
