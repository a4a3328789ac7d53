"""Do the tests catch faults? Puts one fault at a time into the source and runs the module's tests.

python benchmarks/mutants.py changes one thing (a sign, < for <=, an axis, a constant, a dropped
line: see changes) in a copy of the tree, a mutant, and lists those that no test caught. The tree
itself is left alone. A survivor is a fault that the tests miss, or a change that nobody can see:
that is for the reader to judge. The same seed and source give the same mutants, so that two
suites can be compared (--tests).
"""

import argparse
import ast
import collections
import concurrent.futures
import contextlib
import csv
import glob
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
# The tests of each module; of those files that a suite has.
TESTS = {"losses": ("test_losses.py",), "samplers": ("test_samplers.py",),
         "evaluate": ("test_evaluate.py",), "trainers": ("test_trainers.py",),
         "netlib": ("test_netlib.py",),
         "datasets": ("test_datasets.py", "test_images.py", "test_download.py")}
OPERATORS = {"+": "-", "-": "+", "*": "/", "/": "*", "//": "%", "%": "//", "**": "*", "&": "|",
             "|": "&", "<": "<=", "<=": "<", ">": ">=", ">=": ">", "==": "!=", "!=": "==",
             "is": "is not", "is not": "is", "in": "not in", "not in": "in", "and": "or",
             "or": "and"}
KINDS = {ast.Compare: "comparison", ast.BoolOp: "and, or"}
OPERATOR = re.compile(r"not in|is not|[<>!=]=|\*\*|//|[-+*/%&|<>]|\b(?:is|in|and|or)\b")
NAMES = [("min", "max"), ("amin", "amax"), ("argmin", "argmax"), ("minimum", "maximum"),
         ("clamp_min", "clamp_max"), ("any", "all"), ("floor", "ceil"), ("sum", "mean"),
         ("zeros", "ones"), ("new_zeros", "new_ones"), ("zeros_like", "ones_like"),
         ("cos", "sin"), ("log", "exp")]
NAMES = {**dict(NAMES), **{second: first for first, second in NAMES}}
# Methods whose first number is an axis (after the tensor, for functions).
ALONG_AXIS = set("all amax amin any argmax argmin argsort cat cumsum flatten gather index_add_ "
                 "index_fill_ index_select log_softmax logsumexp max mean min norm size softmax "
                 "sort split squeeze stack sum unbind unsqueeze".split())
# A test process may ask for so many bytes of address space: a fault can ask for more.
PYTEST = ("import resource, sys, pytest; resource.setrlimit(resource.RLIMIT_AS, (12 << 30,) * 2); "
          "sys.exit(pytest.main(sys.argv[1:]))")


class Fault(NamedTuple):
    """One change: source[start:end] becomes new. function: where, with its class."""

    kind: str
    function: str
    start: int
    end: int
    new: bytes

    def put_into(self, source):
        return source[:self.start] + self.new + source[self.end:]


# ---- the faults of a file


class Finder:
    """Collects in faults what can be changed in a source file, given as bytes."""

    def __init__(self, source):
        self.source, self.faults, self.axes = source, [], set()
        self.starts = [0]
        for line in source.splitlines(keepends=True):
            self.starts.append(self.starts[-1] + len(line))
        self.visit(ast.parse(source), "module", set())

    def span(self, node):
        return (self.starts[node.lineno - 1] + node.col_offset,
                self.starts[node.end_lineno - 1] + node.end_col_offset)

    def visit(self, node, function, known):
        """Adds the faults in a node; known: names that its function has given a value before."""
        name = getattr(node, "name", None) or ""
        if (isinstance(node, ast.JoinedStr) or re.match("add_.*arguments?$", name)
                or isinstance(node, ast.If) and "__name__" in ast.unparse(node.test)):
            return  # text, flags, the program's start
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            function = name if function == "module" else f"{function}.{name}"
            arguments = getattr(node, "args", ast.arguments())
            known = {part.arg for part in ast.walk(arguments) if isinstance(part, ast.arg)}
        for kind, start, end, new in self.changes(node, function, known):
            self.faults.append(Fault(kind, function, start, end, new.encode()))
        for target in getattr(node, "targets", ()):
            known |= {part.id for part in ast.walk(target) if isinstance(part, ast.Name)}
        for field, value in ast.iter_fields(node):
            if field not in ("annotation", "returns", "decorator_list", "exc"):
                for child in value if isinstance(value, list) else [value]:
                    if isinstance(child, ast.AST):
                        self.visit(child, function, known)

    def changes(self, node, function, known):
        """What can be changed in a node itself -> (kind, start, end, new text) of each."""
        operands = []
        if droppable(node, function, known):
            yield "dropped line", *self.span(node), "pass"
        if isinstance(node, (ast.If, ast.IfExp)):
            for always in ("True", "False"):
                yield "condition", *self.span(node.test), always
        elif isinstance(node, ast.UnaryOp) and node not in self.axes:
            start = self.span(node)[0]
            yield "sign, not", start, start + (4 if isinstance(node.op, ast.Not) else 1), ""
        elif isinstance(node, ast.Constant) and node not in self.axes:
            for value in other_constants(node.value):
                yield "constant", *self.span(node), repr(value)
        elif isinstance(node, ast.Call):
            yield from self.call_changes(node)
        elif isinstance(node, (ast.BinOp, ast.AugAssign)):
            operands = [getattr(node, "left", None) or node.target,
                        getattr(node, "right", None) or node.value]
        elif isinstance(node, (ast.BoolOp, ast.Compare)):
            operands = getattr(node, "values", None) or [node.left, *node.comparators]
        for left, right in zip(operands, operands[1:]):
            start, end = self.span(left)[1], self.span(right)[0]
            found = OPERATOR.search(self.source[start:end].decode())
            texts = (ast.Tuple, ast.List, ast.Constant, ast.JoinedStr)  # whose + has no -
            if found and found[0] in OPERATORS and not (
                    found[0] == "+" and isinstance(left, texts) and isinstance(right, texts)):
                yield (KINDS.get(type(node), "arithmetic"), start + found.start(),
                       start + found.end(), OPERATORS[found[0]])

    def call_changes(self, node):
        """Another axis, and the name of the method or function that is the opposite."""
        name = getattr(node.func, "attr", getattr(node.func, "id", ""))
        if name in NAMES:
            end = self.span(node.func)[1]
            yield "min, max ...", end - len(name), end, NAMES[name]
        axes = [keyword.value for keyword in node.keywords if keyword.arg in ("dim", "axis")]
        if name in ALONG_AXIS and isinstance(node.func, ast.Attribute):
            axes += node.args[:2]
        for axis in axes:
            with contextlib.suppress(ValueError):
                value = ast.literal_eval(axis)
                if type(value) is int:
                    self.axes |= {axis, getattr(axis, "operand", axis)}
                    new = {1: 0, -1: 0, 2: 1}.get(value, value + 1)
                    yield "axis", *self.span(axis), repr(new)


def droppable(node, function, known):
    """Whether a statement can be left out without a name or attribute being missing after it."""
    if isinstance(node, ast.Assign):
        return not function.endswith(("module", "__init__")) and all(
            getattr(target, "id", None) in known or isinstance(target, (ast.Attribute,
                                                                        ast.Subscript))
            for target in node.targets)
    if isinstance(node, ast.Expr):
        return isinstance(node.value, ast.Call) and "__init__" not in ast.unparse(node)
    return isinstance(node, (ast.AugAssign, ast.Raise, ast.Continue, ast.Break))


def other_constants(value):
    """The constants that stand for another one in its faults; none for what is no number."""
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int):
        return [value + 1, abs(value - 1)] if value != 1 else [2, 0]
    return [value * 2, value / 2] if isinstance(value, float) and value else []


def faults_of(source, number, seed):
    """So many faults of a source file, over its functions, then over the kinds, as even as can be.

    Each compiles and is another program. Which ones depends on the seed and the source alone.
    """
    groups, picked, kinds = collections.defaultdict(list), [], collections.Counter()
    for fault in sorted(set(Finder(source).faults)):
        groups[fault.function].append(fault)
    order = sorted(groups, key=lambda name: random.Random(f"{seed} {name}").random())
    for name in order:
        random.Random(f"{seed} {name}").shuffle(groups[name])
    whole = ast.dump(ast.parse(source))
    while len(picked) < number and any(groups.values()):
        for name in [name for name in order if groups[name]][:number - len(picked)]:
            fault = min(groups[name], key=lambda fault: kinds[fault.kind])
            groups[name].remove(fault)
            with contextlib.suppress(SyntaxError):
                compile(changed := fault.put_into(source), name, "exec")
                if ast.dump(ast.parse(changed)) != whole:
                    picked.append(fault)
                    kinds[fault.kind] += 1
    return picked


def mutants_of(number, seed):
    """So many mutants over all modules -> [(row of the table, content of the file), ...]."""
    found, (share, rest) = [], divmod(number, len(TESTS))
    for i, module in enumerate(TESTS):
        source = (ROOT / f"{module}.py").read_bytes()
        for fault in faults_of(source, share + (i < rest), seed):
            first, last = source.rfind(b"\n", 0, fault.start) + 1, source.find(b"\n", fault.end)
            old = source[first:last]
            new = source[first:fault.start] + fault.new + source[fault.end:last]
            row = {"number": len(found), "file": f"{module}.py",
                   "line": source.count(b"\n", 0, fault.start) + 1,
                   "function": fault.function, "kind": fault.kind,
                   "old": " ".join(old.decode().split()), "new": " ".join(new.decode().split())}
            found.append((row, fault.put_into(source)))
    return found


# ---- running the tests


def kill_marked(mark):
    """Kills all processes that have this text in their environment, wherever their parents are."""
    found = True
    while found:
        found = False
        for path in glob.glob("/proc/[0-9]*/environ"):
            with contextlib.suppress(OSError):
                if mark.encode() in Path(path).read_bytes():
                    os.kill(int(path.split("/")[2]), signal.SIGKILL)
                    found = True


def copy_tree(tests, folder):
    """Copies the source, these tests and what they read, without data and runs that lie about."""
    (folder / "tmp").mkdir(parents=True)
    for path in ROOT.iterdir():
        if path.is_file():
            shutil.copy2(path, folder)
        elif path.name in ("benchmarks", "pictures", ".ci"):
            shutil.copytree(path, folder / path.name)
    shutil.copytree(tests, folder / "tests", ignore=shutil.ignore_patterns("__pycache__"))


def run_tests(place, tests, file, content, limit, *options):
    """Runs tests on other content of a file -> (status, None over the limit; output; seconds)."""
    folder = Path(tempfile.mkdtemp(dir=place))
    shutil.copytree(Path(place, "tree"), folder, dirs_exist_ok=True)
    (folder / file).write_bytes(content)
    tests = [path for name in tests if (folder / (path := f"tests/{name}")).exists()] or tests
    started = time.perf_counter()
    with open(f"{folder}.txt", "w+", errors="replace") as output:
        process = subprocess.Popen(
            [sys.executable, "-c", PYTEST, "-q", "-p", "no:cacheprovider", "--tb=no", *options,
             *tests], cwd=folder, stdin=subprocess.DEVNULL, stdout=output,
            stderr=subprocess.STDOUT, start_new_session=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": f"{folder}/tmp"})
        try:
            status = process.wait(limit)
        except subprocess.TimeoutExpired:
            status = None
        seconds = time.perf_counter() - started
        kill_marked(f"{folder}/tmp")
        process.wait()
        output.seek(0)
        text = output.read()
    shutil.rmtree(folder, ignore_errors=True)
    return status, text, seconds


@contextlib.contextmanager
def pool(workers):
    """(call of a function on items in threads, results as they end; a folder). Ctrl-C ends all."""
    with tempfile.TemporaryDirectory(prefix="mutants") as place:
        threads = concurrent.futures.ThreadPoolExecutor(workers)
        futures = []

        def each(call, items):
            futures.extend(threads.submit(call, item) for item in items)
            for future in concurrent.futures.as_completed(futures[-len(items):]):
                yield future.result()
        try:
            yield each, place
        finally:
            threads.shutdown(wait=False, cancel_futures=True)
            while not all(future.done() for future in futures):
                kill_marked(place)
                time.sleep(0.1)


def tests_of(file, opt):
    """The names of the test files for a file of the source; "" is the folder."""
    return ("",) if opt.whole else TESTS[file.removesuffix(".py")]


def baseline(opt, place, each, files):
    """Runs the tests as they are -> ({names of tests_of: time limit}, tests that pass), or exits.

    files: of the source, those to be changed.
    """
    limits, passed = {}, []

    def run(tests):
        return tests, *run_tests(place, tests, files[0], (ROOT / files[0]).read_bytes(), None,
                                 *["-rpfE"] * opt.which)

    for tests, status, text, seconds in each(
            run, dict.fromkeys(tests_of(file, opt) for file in files)):
        names = " ".join(tests) or "all tests"
        print(f"{names}: {seconds:.1f} s as they are", flush=True)
        if status != 0:
            print(f"{names}: they fail as they are:\n{text[-3000:]}", file=sys.stderr)
            sys.exit(2)
        limits[tests] = opt.limit * seconds + 30
        passed += re.findall("^PASSED (.+)$", text, re.MULTILINE)
    return limits, passed


def judge(opt, place, each, mutants, limits):
    """Runs the tests on each mutant, writes its row to --out -> the rows, with the outcome."""
    def run(mutant):
        row, content = mutant
        tests = tests_of(row["file"], opt)
        status, text, seconds = run_tests(place, tests, row["file"], content, limits[tests],
                                          *["-x"] * (not opt.which))
        failed = re.findall(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", text, re.MULTILINE)
        return {**row, "outcome": {0: "survived", None: "time"}.get(status, "caught"),
                "seconds": round(seconds, 1),
                "tests": "; ".join(failed or [f"status {status}"] * bool(status))}

    rows = []
    with open(opt.out, "w", newline="") as file:
        for row in each(run, mutants):
            writer = csv.DictWriter(file, row)
            if not rows:
                writer.writeheader()
            writer.writerow(row)
            file.flush()
            rows.append(row)
            print(f"{len(rows)} of {len(mutants)}: {row['number']} {row['file']}:{row['line']} "
                  f"{row['outcome']}, {row['seconds']} s {row['tests'][:100]}", flush=True)
    return sorted(rows, key=lambda row: row["number"])


# ---- the report


def table(rows, column):
    """A table in markdown: how many mutants of each file or kind were caught."""
    print(f"\n| {column} | mutants | caught | by the time limit | survived |")
    print("|---|---|---|---|---|")
    groups = collections.defaultdict(collections.Counter)
    for row in rows:
        for name in (row[column], "all"):
            groups[name][row["outcome"]] += 1
    for name in [name for name in groups if name != "all"] + ["all"]:
        count = groups[name]
        print(f"| {name} | {count.total()} | {count.total() - count['survived']} | "
              f"{count['time']} | {count['survived']} |")


def idle_tests(rows, passed):
    """Prints the test functions that catch no mutant that all others miss, the idlest first."""
    caught = {test.partition("[")[0]: set() for test in passed}
    for row in rows:
        for test in filter(None, row["tests"].split("; ")):
            caught.setdefault(test.partition("[")[0], set()).add(row["number"])
    times = collections.Counter(number for numbers in caught.values() for number in numbers)
    print("\nTests that catch nothing that others do not, and how many mutants they catch:")
    for test, numbers in sorted(caught.items(), key=lambda item: len(item[1])):
        if all(times[number] > 1 for number in numbers):
            print(f"{len(numbers):4} {test}")


def options(arguments):
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0],
        epilog="Exit status: 0 if all mutants are caught, 1 if any survived, 2 if the tests fail "
               "as they are. A mutant over the time limit counts as caught and is listed apart.")
    add = parser.add_argument
    add("--number", type=int, default=120, help="mutants over all modules. Default %(default)s")
    add("--seed", type=int, default=0, help="of the choice. Default %(default)s")
    add("--modules", nargs="+", choices=TESTS, default=list(TESTS), metavar="NAME",
        help=f"which ones to change: {', '.join(TESTS)}. Default all")
    add("--every", type=int, default=1, metavar="N", help="only each N-th of the mutants")
    add("--only", type=int, nargs="+", metavar="NUMBER", help="only the mutants of these numbers")
    add("--whole", action="store_true",
        help="run the whole suite, not the module's tests alone: for survivors, with --only")
    add("--tests", type=Path, default=ROOT / "tests", metavar="DIR",
        help="another folder of tests, to compare suites on the same mutants")
    add("--workers", type=int, default=os.cpu_count(), metavar="N",
        help="mutants at a time, one thread each. Default: the number of cores")
    add("--limit", type=float, default=3, metavar="X",
        help="time limit: 30 s more than X times what the tests take as they are. Default "
             "%(default)s")
    add("--which", action="store_true",
        help="run all tests on each mutant (slow), not only up to the first that fails; says at "
             "the end which tests catch nothing that others do not")
    add("--out", metavar="FILE.csv", default=os.devnull, help="a line for each mutant")
    return parser.parse_args(arguments)


def main(arguments=None):
    opt = options(arguments)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    mutants = [(row, content) for row, content in mutants_of(opt.number, opt.seed)
               if row["number"] % opt.every == 0 and row["file"][:-3] in opt.modules
               and (opt.only is None or row["number"] in opt.only)]
    with pool(opt.workers) as (each, place):
        copy_tree(opt.tests, Path(place, "tree"))
        files = list(dict.fromkeys(row["file"] for row, _ in mutants))
        limits, passed = baseline(opt, place, each, files)
        rows = judge(opt, place, each, mutants, limits)
    for column in ("file", "kind"):
        table(rows, column)
    survivors = [row for row in rows if row["outcome"] == "survived"]
    print(f"\nSurvivors: {len(survivors)}")
    for row in survivors:
        print("{number} {file}:{line} {function}, {kind}:\n    {old}\n -> {new}".format(**row))
    if opt.which:
        idle_tests(rows, passed)
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
