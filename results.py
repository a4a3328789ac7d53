"""What a run leaves behind, read again: recipes with their published values, verdicts, tables of
runs, and curves of several in one picture.

python results.py table|compare looks back on runs.
"""

import csv
import difflib
import os
import re
import shlex
import signal
import sys
import typing

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while torch is being loaded

import numpy as np

import auxiliaries
import evaluate

RECIPES = os.path.join(os.path.dirname(os.path.abspath(__file__)), "recipes.csv")
# Options in which runs of one row of a table, or of one recipe, may differ.
NOT_OF_RECIPE = ("seed", "seeds", "recipe", "recipes", "dry_run", "departures", "given", "subset",
                 "savename",
                 "save_path", "source_path", "gpu", "kernels", "resume", "tensorboard", "weights",
                 "plot_embeddings", "save_embeddings", "checkpoint_every", "deterministic",
                 "eval_memory", "eval_bs")


class Recipe(typing.NamedTuple):
    """A published result: its options, a list of strings; {metric: (mean, std or None)} in
    percent; where it was published."""

    options: list
    published: dict
    source: str


def read_recipes(path=None):
    """The table of recipes -> {name: Recipe}; its values stand as "recall@1 63.1±0.5; nmi 68"."""
    recipes = {}
    with open(path or RECIPES, encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            published = {}
            for part in filter(None, row["published"].split("; ")):
                metric, value = part.rsplit(" ", 1)
                mean, _, std = value.partition("±")
                published[metric] = (float(mean), float(std) if std else None)
            recipes[row["recipe"]] = Recipe(shlex.split(row["options"]), published, row["source"])
    return recipes


def find_recipe(name):
    """The Recipe of a name; ValueError with the nearest names for another."""
    recipes = read_recipes()
    if name not in recipes:
        near = difflib.get_close_matches(name, recipes, n=4, cutoff=0.4)
        raise ValueError(f"--recipe {name}: there is none of that name"
                         + f"; near are {', '.join(near)}" * bool(near)
                         + ". --recipes lists all")
    return recipes[name]


class Result(typing.NamedTuple):
    """What a run folder says: options as text, rows of log_val_Base.csv as {metric: number}."""

    folder: str
    options: dict
    rows: list

    def state(self):
        """finished, or what else: in words."""
        if not self.rows:
            return "failed or unfinished before anything was measured"
        last, wanted = int(self.rows[-1]["epoch"]), int(self.options["n_epochs"])
        patience = self.options.get("patience", "None")
        if last >= wanted:
            return "finished"
        if len(self.rows) == 1:
            return f"failed or unfinished before the first of {wanted} epochs was measured"
        name = selecting_metric(self.rows)
        values = [row[name] for row in self.rows[1:] if name in row]
        if patience != "None" and len(values) - 1 - values.index(max(values)) >= int(patience):
            return "finished"
        return f"unfinished after epoch {last} of {wanted}"

    def best(self, metric):
        """The literature's value: the best over the epochs, of this metric alone."""
        values = [row[metric] for row in self.rows[1:] or self.rows if metric in row]
        return evaluate.best_of(metric)(values, default=float("nan"))

    def selected(self, metric):
        """The metric in the epoch that was chosen on held-out classes; nan if not measured."""
        name = selecting_metric(self.rows)
        rows = [row for row in self.rows[1:] or self.rows if name in row]
        return max(rows, key=lambda row: row[name], default={}).get(metric, float("nan"))

    def metrics(self):
        """The names of the metrics of the test classes."""
        return [name for name in self.rows[0] if name != "epoch" and not name.startswith("val ")]

    def holds_out(self):
        """Whether the run measured on held-out classes too, and chose its best epoch there."""
        return selecting_metric(self.rows).startswith("val ")


def selecting_metric(rows):
    """The metric that chooses the best epoch: the first of the held-out, else of the test."""
    names = [name for name in rows[0] if name != "epoch"]
    return next((name for name in names if name.startswith("val ")), names[0])


def read_result(folder):
    """A run folder -> Result; None for a folder that is not one of a run.

    ValueError where its files are damaged.
    """
    try:
        with open(os.path.join(folder, "Parameter_Info.txt"), encoding="utf-8") as file:
            lines = [line.rstrip("\n").split(": ", 1) for line in file]
        if any(len(line) != 2 for line in lines):
            return None
        options, rows = dict(lines), []
        if not {"dataset", "arch", "loss", "sampling", "n_epochs", "seed"} <= set(options):
            return None
        path = os.path.join(folder, "log_val_Base.csv")
        if os.path.exists(path):
            with open(path, encoding="utf-8", newline="") as file:
                rows = list(csv.DictReader(file))
            if any(None in row or None in row.values() for row in rows):
                raise ValueError("a row of log_val_Base.csv is cut short or too long")
            rows = [{name: float(value) for name, value in row.items() if value} for row in rows]
        int(options["n_epochs"]), int(options["seed"])
        if any("epoch" not in row or len(row) < 2 or selecting_metric(rows) not in row
               for row in rows):
            raise ValueError("a row of log_val_Base.csv lacks its epoch or its metrics")
        epochs = [row["epoch"] for row in rows]
        if epochs != sorted(set(epochs)) or not all(epoch.is_integer() for epoch in epochs):
            raise ValueError("the epochs of log_val_Base.csv are no whole numbers that rise")
        result = Result(folder, options, rows)
        result.state()  # reads the rest
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, AttributeError, csv.Error) as error:
        raise ValueError(f"{folder}: its logs cannot be read ({error})") from error
    return result


def read_results(root):
    """All run folders below root, sorted -> (list of Result, what cannot be read, in words).

    Folders that are not of a run are passed over. ValueError where there is none of a run.
    """
    if not os.path.isdir(root):
        raise FileNotFoundError(f"{root} is not a folder of results")
    folders = sorted(path for path, _, files in os.walk(root) if "Parameter_Info.txt" in files)
    results, damaged = [], []
    for folder in folders:
        try:
            result = read_result(folder)
        except ValueError as error:
            damaged.append(str(error))
        else:
            results += [result] if result else []
    if not results and not damaged:
        raise ValueError(f"{root} holds no run; main.py --save_path says where they are")
    return results, damaged


def mean_and_std(values):
    """Numbers -> their mean and population standard deviation, as the literature gives them."""
    return float(np.mean(values)), float(np.std(values))


def with_std(mean, std=None, digits=2):
    """Numbers -> "63.09 ± 0.46", or the mean alone."""
    return f"{mean:.{digits}f}" + ("" if std is None else f" ± {std:.{digits}f}")


def verdict(recipe, results, departures=()):
    """Measured beside published values, as lines of text; the last one says what they amount to.

    recipe: Recipe; results: list of Result, one a seed. A value is inside where it differs by no
    more than the published standard deviation, or by 1.0 point of recall@1 where none is given.
    """
    lines = [f"{'metric':12} {'measured':>15} {'published':>15} {'difference':>10}"]
    inside = {}
    for metric in dict.fromkeys((*recipe.published, *results[0].metrics())):
        ours, spread = mean_and_std([100 * result.best(metric) for result in results])
        line = f"{metric:12} {with_std(ours, spread if len(results) > 1 else None):>15}"
        if metric in recipe.published:
            mean, std = recipe.published[metric]
            allowed = std if std is not None else 1.0 if metric == "recall@1" else None
            line += f" {with_std(mean, std):>15} {ours - mean:>+10.2f}"
            if allowed is not None:  # less than rounding apart counts as inside
                inside[metric] = bool(abs(ours - mean) <= allowed + 1e-9)
                line += f"  {'inside' if inside[metric] else 'outside'} ± {allowed:g}"
        lines.append(line)
    lines.append(f"best epoch of each metric on the test classes, {len(results)} seed"
                 + "s" * (len(results) > 1) + ", mean ± population standard deviation, percent")
    if departures:
        lines.append(f"departs from the recipe: {'; '.join(departures)}")
    judged = ("no published value" if not inside else
              "reproduced" if inside.get("recall@1", all(inside.values())) else "not reproduced")
    lines.append(f"verdict: {judged}" + " (not the recipe as it is)" * bool(departures))
    return lines


def grouped(results):
    """Results -> {what their runs have in common: [the finished ones]}, and the others, in words.

    Runs that differ in nothing but NOT_OF_RECIPE, the seed among it, are of one group; those of a
    recipe, which stand beside its published values, are a group of their own. Of the runs of one
    seed in a group the first counts.
    """
    groups, others = {}, []
    for result in results:
        if result.state() != "finished":
            others.append(f"{auxiliaries.one_line(result.folder)}: {result.state()}")
            continue
        key = tuple(sorted((name, value) for name, value in result.options.items()
                           if name not in NOT_OF_RECIPE))
        key += (("weights", os.path.basename(result.options.get("weights", "None"))),
                ("recipe", result.options.get("recipe", "None")))
        group = groups.setdefault(key, [])
        seed = result.options["seed"]
        first = next((other.folder for other in group if other.options["seed"] == seed), None)
        if first is None:
            group.append(result)
        else:
            others.append(f"{auxiliaries.one_line(result.folder)}: left out, it repeats seed {seed} of "
                          f"{auxiliaries.one_line(first)}")
    return groups, others


def label_of(result):
    """A group's name in a table: loss, sampling, what is held out, a trainer but the plain one."""
    options = result.options
    parts = [options["loss"], options["sampling"]]
    if options.get("trainer", "MetricLossOnly") != "MetricLossOnly":
        parts.append(options["trainer"])
    share = options.get("val_split", "0.0")
    return "/".join(parts) + f" val_split={share}" * (share != "0.0")


def table_of(dataset, groups, choose):
    """One dataset's table -> (header, rows of cells), the best of each column in **.

    groups: {key: [Result]}; choose: Result.best or Result.selected. A published value and the
    difference from it stand behind the measured one where all runs are of one unchanged recipe.
    """
    names = list(dict.fromkeys(name for results in groups.values() for name in
                               results[0].metrics()))
    names.sort(key=lambda name: name.rpartition(" ")[2] not in ("nmi", "f1"))
    labels = [(results[0].options["arch"], label_of(results[0])) for results in groups.values()]
    recipes = read_recipes()
    rows, best = [], {}
    for (key, results), (arch, label) in zip(groups.items(), labels):
        if labels.count((arch, label)) > 1:  # what sets it apart from its namesakes
            differing = {name for other, namesake in zip(groups, labels) if namesake ==
                         (arch, label) for name, value in other if dict(key).get(name) != value}
            apart = [f"{name}={dict(key).get(name)}" for name in sorted(differing)]
            label = " ".join([label, *(part for part in apart if part != "recipe=None")])
        names_of_recipes = {result.options.get("recipe") for result in results}
        unchanged = all(result.options.get("departures", "[]") == "[]"
                        and not result.options.get("subset") for result in results)
        recipe = recipes.get(names_of_recipes.pop()) if len(names_of_recipes) == 1 else None
        cells = {}
        for name in names:
            values = [100 * choose(result, name) for result in results if name in result.rows[0]]
            if not values:
                continue
            mean, std = mean_and_std(values)
            cells[name] = [mean, with_std(mean, std if len(values) > 1 else None)]
            if recipe and unchanged and name in recipe.published:
                published = recipe.published[name]
                cells[name][1] += (f" ({with_std(*published)}, {mean - published[0]:+.2f})")
            if mean == mean:
                best[name] = evaluate.best_of(name)(mean, best.get(name, mean))
        seeds = sorted(int(result.options["seed"]) for result in results)
        rows.append((arch, label, " ".join(map(str, seeds)), cells))
    header = ["architecture", "loss/sampling", "seeds", *names]
    return header, [[arch, label, seeds, *(
        f"**{cells[name][1]}**" if name in cells and cells[name][0] == best.get(name) else
        cells[name][1] if name in cells else "" for name in names)]
        for arch, label, seeds, cells in rows]


def dataset_of(result):
    """What one table is of: a dataset, or a part of one; for --dataset folder each folder is one.
    """
    options = result.options
    folder = f" {options.get('source_path')}" if options["dataset"] == "folder" else ""
    subset = options.get("subset")
    return options["dataset"] + folder + f", of which {subset}" * bool(subset)


def print_tables(root, style="md", stream=None):
    """The tables of all runs below root, one a dataset, as md, tex or csv, to a stream."""
    stream = stream or sys.stdout
    results, damaged = read_results(root)
    rules = {"best epoch of each metric on the test classes": Result.best,
             "epoch chosen on held-out training classes": Result.selected}
    prefix = {"md": "- ", "tex": "% ", "csv": "# "}[style]
    for dataset in dict.fromkeys(map(dataset_of, results)):
        groups, others = grouped([result for result in results if dataset_of(result) == dataset])
        for rule, choose in rules.items() if groups else ():
            chosen = {key: group for key, group in groups.items()
                      if choose is Result.best or group[0].holds_out()}
            if not chosen:
                continue
            title = (f"{auxiliaries.one_line(dataset)}: percent, {rule}; mean ± population standard deviation "
                     "over seeds; in brackets published values and the difference")
            write_table(title, *table_of(dataset, chosen, choose), style, stream)
        stream.writelines(f"{prefix}{other}\n" for other in others)
    stream.writelines(f"{prefix}{auxiliaries.one_line(problem, 400)}\n" for problem in damaged)


def write_table(title, header, rows, style, stream):
    """Writes one table of table_of to a stream; the best values are bold, in CSV in ** too."""
    if style == "csv":
        stream.write(f"# {title}\n")
        csv.writer(stream, lineterminator="\n").writerows([header, *rows])
    elif style == "tex":
        signs = {"±": r"$\pm$", "\\": r"\textbackslash{}", "~": r"\textasciitilde{}",
                 "^": r"\textasciicircum{}", **{sign: f"\\{sign}" for sign in "_%&#${}"}}

        def tex(cell):
            cell = "".join(signs.get(sign, sign) for sign in cell)
            return re.sub(r"\*\*(.*)\*\*", r"\\textbf{\1}", cell)
        stream.write(f"% {title}\n\\begin{{tabular}}{{ll{'r' * (len(header) - 2)}}}\n")
        stream.writelines(" & ".join(map(tex, row)) + r" \\" + "\n" for row in [header, *rows])
        stream.write("\\end{tabular}\n")
    else:
        stream.write(f"{title}\n\n| {' | '.join(header)} |\n{'|---' * len(header)}|\n")
        stream.writelines("| " + " | ".join(cell.replace("|", r"\|") for cell in row) + " |\n"
                          for row in rows)
    stream.write("\n")


def compare(folders, path):
    """Draws the runs' curves over each other as an SVG; returns the options in which they differ.

    One panel for each metric that all have. Returns {option: [value of each run]}. ValueError for
    a folder that holds no run.
    """
    results = []
    for folder in folders:
        result = read_result(folder) if os.path.isdir(folder) else None
        if result is None or not result.rows:
            raise ValueError(f"{folder} is not the folder of a run with measurements")
        results.append(result)
    names = [name for name in results[0].rows[0] if name != "epoch"
             and all(name in result.rows[0] for result in results)]
    if not names:
        raise ValueError("the runs have no metric in common")
    numbers = [str(number) for number in range(1, len(folders) + 1)]
    panels = [(name, {number: [(row["epoch"], row[name]) for row in result.rows if name in row]
                      for number, result in zip(numbers, results)}) for name in names]
    runs = [f"{number}  {os.path.join(*os.path.normpath(folder).split(os.sep)[-2:])}"
            for number, folder in zip(numbers, folders)]
    auxiliaries.save_plot(path, [f"{len(runs)} runs over their epochs", *runs], panels)
    options = dict.fromkeys(name for result in results for name in result.options
                            if name != "given")
    values = {name: [result.options.get(name, "") for result in results] for name in options}
    return {name: row for name, row in values.items() if len(set(row)) > 1}


def main(argv=None):
    """python results.py: tables of finished runs, and curves of several in one picture."""
    parser = auxiliaries.Parser(prog="results.py", description="Looks back on runs.")
    commands = parser.add_subparsers(dest="command", required=True)
    table = commands.add_parser("table", help="tables of all runs below a folder, one a dataset, "
                                              "with published values beside the measured ones")
    table.add_argument("root", nargs="?", default="./Training_Results",
                       help="as --save_path of main.py; default %(default)s")
    table.add_argument("--format", choices=("md", "tex", "csv"), default="md",
                       help="Markdown, LaTeX or CSV; default %(default)s")
    curves = commands.add_parser("compare", help="the curves of several runs in one SVG, and the "
                                                 "options in which they differ")
    curves.add_argument("runs", nargs="+", help="run folders")
    curves.add_argument("--out", default="compare.svg", help="default %(default)s")
    with auxiliaries.one_message("results.py"):
        args = parser.parse_args(argv)
        if args.command == "table":
            print_tables(args.root, args.format)
            return
        for name, values in compare(args.runs, args.out).items():
            print(auxiliaries.printable(f"{name}: {' | '.join(values)}"))
        print(auxiliaries.printable(f"curves in {args.out}"))


if __name__ == "__main__":
    main()
