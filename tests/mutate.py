"""Deliberate one-line mistakes in the code: which of them does no test notice? Not a test, and CI
does not run it.

    pip install coverage && python tests/mutate.py [--files petl.py data.py] [--count 300] [--jobs
    2]

First the suite runs once as it is, to learn which tests reach which line and how long each takes.
Then each mistake (mutant) meets the tests that reach it and those that start programs, the cheapest
first, and a survivor all others. Every mutant has its own copy of the working tree and its own
process, forked from one that has imported the libraries. The folder --work keeps what is known, so
the same command goes on where it was interrupted.
"""

import argparse
import ast
import contextlib
import copy
import importlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zlib
from collections import defaultdict
from itertools import zip_longest
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]
LIBRARIES = """coverage matplotlib.pyplot numpy onnx onnxruntime peft safetensors.torch scipy.signal
sklearn.metrics soundfile soxr torch torch.onnx torch.utils.flop_counter tqdm transformers
torch.distributed
transformers.models.audio_spectrogram_transformer.modeling_audio_spectrogram_transformer"""
OPERATORS = {
    ast.Lt: (ast.LtE, ast.Gt),
    ast.LtE: (ast.Lt, ast.GtE),
    ast.Gt: (ast.GtE, ast.Lt),
    ast.GtE: (ast.Gt, ast.LtE),
    ast.Eq: (ast.NotEq,),
    ast.NotEq: (ast.Eq,),
    ast.Is: (ast.IsNot,),
    ast.IsNot: (ast.Is,),
    ast.In: (ast.NotIn,),
    ast.NotIn: (ast.In,),
    ast.Add: (ast.Sub,),
    ast.Sub: (ast.Add,),
    ast.Mult: (ast.Div,),
    ast.Div: (ast.Mult,),
    ast.FloorDiv: (ast.Div,),
    ast.Mod: (ast.FloorDiv,),
    ast.BitOr: (ast.BitAnd,),
    ast.BitAnd: (ast.BitOr,),
    ast.Pow: (ast.Mult,),
    ast.And: (ast.Or,),
    ast.Or: (ast.And,),
}
NAMES = {
    "min": "max",
    "max": "min",
    "any": "all",
    "all": "any",
    "floor": "ceil",
    "ceil": "floor",
    "sorted": "list",
}
FIXED = {"annotation", "returns", "decorator_list"}
SAYING = {"print", "say", "say_lines", "warn", "set_postfix"}  # what no result depends on

# -------------------------------------------------------------------------------------- the mutants


class Mutant(NamedTuple):
    file: str
    unit: str  # the function it is in
    line: int
    near: range  # a test that runs one of these lines reaches it
    change: str
    source: bytes

    def __str__(self):  # without the line number: a mutant is known again after edits elsewhere
        return f"{self.file} {self.unit}: {self.change}"


def changed(node, **fields):
    new = copy.copy(node)
    new.__dict__.update(fields)
    return new


def without(node, *fields):  # one item of its lists
    for i in range(len(getattr(node, fields[0]))):
        yield (
            node,
            changed(node, **{f: getattr(node, f)[:i] + getattr(node, f)[i + 1 :] for f in fields}),
        )


def swapped(node, field):  # two neighbours of a list
    items = getattr(node, field)
    for i in range(len(items) - 1):
        yield node, changed(node, **{field: [*items[:i], items[i + 1], items[i], *items[i + 2 :]]})


def mistakes(node, siblings):
    """What can be done wrong in one node of the syntax tree: (the node to replace, what stands
    there instead).

    `siblings` has the names of a function's variables under "", and under an expression its
    attributes there.
    """
    match node:
        case ast.Constant(value=bool(value)):
            yield node, ast.Constant(not value)
        case ast.Constant(value=int(value) | float(value)):
            yield from (
                (node, ast.Constant(new)) for new in (value + 1, 2 * value, type(value)(value / 2))
            )
        # with a space it is a message
        case ast.Constant(value=str(value)) if value and " " not in value:
            yield node, ast.Constant(value + "x")
        case ast.Compare(ops=[op, *others]):
            yield from ((node, changed(node, ops=[new(), *others])) for new in OPERATORS[type(op)])
        case ast.BinOp(op=op) | ast.BoolOp(op=op) | ast.AugAssign(op=op):
            yield from ((node, changed(node, op=new())) for new in OPERATORS.get(type(op), ()))
            yield from ((node, value) for value in getattr(node, "values", ()))
        case ast.UnaryOp(operand=operand):
            yield node, operand
        case ast.Name(id=name, ctx=ast.Load()) | ast.Attribute(attr=name):
            field, of = (
                ("id", "") if isinstance(node, ast.Name) else ("attr", ast.unparse(node.value))
            )
            others = sorted(siblings[of] - {name}) if name in siblings[of] else []
            others = others[zlib.crc32(name.encode()) % len(others) :][:1] if others else []
            yield from (
                (node, changed(node, **{field: other}))
                for other in ([NAMES[name]] if name in NAMES else others)
            )
        case ast.Call():
            yield from (*without(node, "keywords"), *swapped(node, "args"))
        case ast.Slice(lower=lower, upper=upper):
            one = ast.Constant(1)
            yield node, changed(node, lower=ast.BinOp(lower, ast.Add(), one) if lower else one)
            yield (
                node,
                changed(
                    node, upper=ast.BinOp(upper, ast.Sub(), one) if upper else ast.Constant(-1)
                ),
            )
        case ast.Dict():
            yield from (*without(node, "keys", "values"), *swapped(node, "values"))
        case ast.List(elts=[_, _, *_]) | ast.Tuple(elts=[_, _, *_]) | ast.Set(elts=[_, _, *_]):
            yield from (*without(node, "elts"), *swapped(node, "elts"))
        case ast.Return(value=ast.expr() as value):
            yield value, ast.Constant(None)
        case ast.Continue() | ast.Break():
            yield node, ast.Break() if isinstance(node, ast.Continue) else ast.Continue()
        case ast.If(test=test) | ast.While(test=test) | ast.comprehension(ifs=[test, *_]):
            yield test, ast.UnaryOp(ast.Not(), test)
        case ast.IfExp(body=body, orelse=orelse):
            yield node, changed(node, body=orelse, orelse=body)
        case ast.Expr(value=ast.Call(func=ast.Name(id=name) | ast.Attribute(attr=name))) if (
            name in SAYING
        ):
            pass
        case (
            ast.Expr()
            | ast.Raise()
            | ast.Delete()
            | ast.Assign(targets=[ast.Attribute() | ast.Subscript()])
        ):
            yield node, ast.Pass()


def places(node, around=None):
    """All nodes but docstrings, annotations and decorators: (node, the whole expression around
    it).
    """
    around = (
        None
        if isinstance(node, ast.stmt)
        else around or (node if isinstance(node, ast.expr) else None)
    )
    yield node, around
    for field, value in ast.iter_fields(node):
        for child in value if isinstance(value, list) else [value]:
            docstring = isinstance(child, ast.Expr) and isinstance(child.value, ast.Constant)
            if isinstance(child, ast.AST) and field not in FIXED and not docstring:
                yield from places(child, around)


class Replace(ast.NodeTransformer):
    def __init__(self, old, new):
        self.old, self.new = old, new

    def visit(self, node):
        return self.new if node is self.old else self.generic_visit(node)


def shortened(node, other) -> str:
    """The source text of a node; of a long one, from shortly before it differs from `other`."""
    text, other = ast.unparse(node), ast.unparse(other)
    same = next(
        (i for i, pair in enumerate(zip(text, other, strict=False)) if pair[0] != pair[1]),
        len(text),
    )
    return text[max(0, same - 20) : same + 50]


def mutants_of(file: str):
    source = (ROOT / file).read_bytes()
    lines, tree = source.splitlines(keepends=True), ast.parse(source)
    starts = [sum(map(len, lines[:number])) for number in range(len(lines))]  # of lines, in bytes
    modules = {
        a.asname or a.name
        for node in ast.walk(tree)
        if isinstance(node, ast.Import)
        for a in node.names
    }
    methods = [
        (node.name, unit)
        for node in tree.body
        if isinstance(node, ast.ClassDef)
        for unit in node.body
    ]
    for owner, unit in [*methods, *(("", unit) for unit in tree.body)]:
        program = isinstance(unit, ast.If) and "__main__" in ast.unparse(unit.test)
        if program or isinstance(unit, ast.Expr | ast.ClassDef | ast.Import | ast.ImportFrom):
            continue
        function, siblings = isinstance(unit, ast.FunctionDef), defaultdict(set)
        for node in ast.walk(unit):
            match node:
                case ast.arg(arg=name) if name != "self":
                    siblings[""].add(name)
                case ast.Name(id=name, ctx=ctx) if (
                    isinstance(ctx, ast.Store) if function else name.isupper()
                ):
                    siblings[""].add(name)
                case ast.Attribute(value=value, attr=name) if ast.unparse(value) not in modules:
                    siblings[ast.unparse(value)].add(name)
        name = ".".join(filter(None, (owner, getattr(unit, "name", "")))) or "module"
        for node, around in places(unit):
            for old, new in mistakes(node, siblings):
                anchor = around or old
                before, after = ast.unparse(anchor), ast.unparse(Replace(old, new).visit(anchor))
                if anchor is not old:
                    Replace(new, old).visit(anchor)  # back
                if after == before:
                    continue
                after = f"({after})" if isinstance(anchor, ast.expr) else after
                start = starts[anchor.lineno - 1] + anchor.col_offset
                end = starts[anchor.end_lineno - 1] + anchor.end_col_offset
                near = (
                    range(anchor.lineno, anchor.end_lineno + 1)
                    if function and anchor.lineno > unit.lineno
                    else ()
                )
                change = (
                    f"{shortened(old, new)} -> {shortened(new, old)} in"
                    f" {lines[old.lineno - 1].decode().strip()}"
                )
                yield Mutant(
                    file,
                    name,
                    old.lineno,
                    near,
                    change,
                    source[:start] + after.encode() + source[end:],
                )


def choose(files: list[str], count: int | None, seed: int) -> list[Mutant]:
    """`count` mutants, from all functions in turn."""
    mutants = {str(mutant): mutant for file in files for mutant in mutants_of(file)}
    groups, rng = defaultdict(list), random.Random(seed)
    for mutant in rng.sample(list(mutants.values()), len(mutants)):
        groups[mutant.file, mutant.unit].append(mutant)
    return [mutant for row in zip_longest(*groups.values()) for mutant in row if mutant][:count]


# ----------------------------------------------------------------------------------------- the runs


class Plugin:
    """In pytest: choose the tests, give each a limit, note which one runs; with `coverage`, measure
    instead.
    """

    def __init__(self, folder: Path, seconds: dict, chosen=lambda test: True, coverage=None):
        self.folder, self.seconds, self.chosen, self.coverage = folder, seconds, chosen, coverage
        self.report = {"seconds": {}, "starters": [], "broken": []}

    def pytest_collection_modifyitems(self, items):
        items[:] = filter(lambda item: self.chosen(item.nodeid), items)
        if not self.coverage:
            items.sort(key=lambda item: self.seconds.get(item.nodeid, 0))

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item):
        start, children = time.perf_counter(), os.times().children_user
        (self.folder / "test").write_text(item.nodeid)
        in_file = (
            self.seconds[test]
            for test in self.seconds
            if test.startswith(item.nodeid.split("::")[0])
        )
        # ends the process; fixtures may be shared
        signal.alarm(30 + 5 * round(max(in_file, default=100)))
        if self.coverage:
            self.coverage.switch_context(item.nodeid)
        result = yield
        self.report["seconds"][item.nodeid] = round(time.perf_counter() - start, 3)
        self.report["starters"] += [item.nodeid] * (os.times().children_user > children)
        return result

    def pytest_runtest_logreport(self, report):
        self.report["broken"] += [report.nodeid] * report.failed


def fork(folder: Path, plugin: Plugin, *words: str) -> int:
    """Start pytest in folder/tree in a process of its own. Returns the number of the process."""
    options = [
        "-q",
        "--tb=short",
        "-p",
        "no:cacheprovider",
        f"--basetemp={folder / 'temporary'}",
        *words,
    ]
    options += ["-W", "ignore::pytest.PytestAssertRewriteWarning"]  # of what is imported already
    if pid := os.fork():
        return pid
    code = 99
    try:
        os.setsid()
        log = os.open(folder / "log", os.O_WRONLY | os.O_CREAT)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0), os.dup2(log, 1), os.dup2(log, 2)
        os.chdir(folder / "tree")
        os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
        sys.path[:] = [
            str(folder / "tree"),
            *(path for path in sys.path if not Path(path).is_relative_to(ROOT)),
        ]
        signal.alarm(300)  # to the first test
        if plugin.coverage:
            plugin.coverage.start()
        code = pytest.main(options, plugins=[plugin])
        if plugin.coverage:
            plugin.coverage.stop()
            lines = plugin.coverage.get_data()
            files = {
                Path(file).relative_to(folder / "tree").as_posix(): file
                for file in lines.measured_files()
            }
            report = {
                **plugin.report,
                "lines": {name: lines.contexts_by_lineno(file) for name, file in files.items()},
            }
            (folder / "report").write_text(json.dumps(report))
    finally:
        os._exit(code)


def learn(tree: Path, folder: Path) -> dict:
    """Which tests run which lines, how long each takes, which start programs, and which fail as it
    is.
    """
    from coverage import Coverage

    shutil.copytree(tree, folder / "tree")
    recorder = Coverage(folder / "coverage", source=[str(folder / "tree")], omit=["*/tests/*"])
    os.waitpid(fork(folder, Plugin(folder, {}, coverage=recorder)), 0)
    report = json.loads((folder / "report").read_text())
    for test in report["broken"]:
        print(f"fails as it is, and is left out: {test}", flush=True)
    return report


def who_reaches(mutant: Mutant, report: dict) -> set[str]:
    """Tests that run the mutant's line, else all that run some line of its file; and all that start
    programs.
    """
    lines = {
        int(line): set(tests) - {""} for line, tests in report["lines"].get(mutant.file, {}).items()
    }
    near = set().union(*(lines.get(line, ()) for line in mutant.near))
    return (near or set().union(*lines.values())) | set(report["starters"])


def meet(mutant: Mutant, report: dict, tree: Path, folder: Path, others: bool) -> int:
    """Start the tests that reach the mutant, or all `others`. Returns the number of the process."""
    reach = who_reaches(mutant, report)
    shutil.copytree(tree, folder / "tree")
    (folder / "tree" / mutant.file).write_bytes(mutant.source)
    plugin = Plugin(
        folder,
        report["seconds"],
        lambda test: (test in reach) != others and test not in report["broken"],
    )
    return fork(
        folder, plugin, "-x", *([] if others else sorted({test.split("::")[0] for test in reach}))
    )


def campaign(mutants: list[Mutant], report: dict, tree: Path, results: Path, jobs: int):
    """Yield a record for each mutant when its fate is known, and append it to `results`."""
    waiting, running = [(mutant, False) for mutant in reversed(mutants)], {}
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                (mutant, others), folder = waiting.pop(), Path(tempfile.mkdtemp(dir=tree.parent))
                pid = meet(mutant, report, tree, folder, others)
                running[pid] = mutant, others, folder, time.time()
            pid, status = os.wait()
            mutant, others, folder, start = running.pop(pid)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)  # programs that its tests have left
            code, test = os.waitstatus_to_exitcode(status), folder / "test"
            if code in (0, 5) and not others:  # all passed, or there are none
                waiting.append((mutant, True))
            else:
                record = {
                    "mutant": str(mutant),
                    "line": mutant.line,
                    "survived": code in (0, 5),
                    "code": code,
                }
                record |= {
                    "test": test.read_text() if test.exists() else "",
                    "seconds": round(time.time() - start, 1),
                }
                with open(results, "a") as file:
                    file.write(json.dumps(record) + "\n")
                yield record
            shutil.rmtree(folder, ignore_errors=True)
    finally:
        for pid in running:
            os.killpg(pid, signal.SIGKILL)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--files", nargs="+", help="to make mistakes in; default: all outside of tests/"
    )
    parser.add_argument(
        "--count", type=int, default=300, help="of mutants, spread over all functions (%(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of their choice")
    parser.add_argument("--jobs", type=int, default=2, help="mutants at a time (%(default)s)")
    parser.add_argument(
        "--only-survivors",
        type=Path,
        metavar="RESULTS",
        help="only those that survived there, again",
    )
    parser.add_argument(
        "--work", type=Path, default=Path(tempfile.gettempdir(), "mutants"), help="%(default)s"
    )
    args = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(
        command, cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout.splitlines()
    code = {
        name: (ROOT / name).read_bytes()
        for name in names
        if name.endswith(".py") and not name.startswith("tests/")
    }
    for library in LIBRARIES.split():
        with contextlib.suppress(ImportError):
            importlib.import_module(library)
    args.work.mkdir(parents=True, exist_ok=True)
    results, learned = (
        args.work / "results.jsonl",
        args.work / f"{zlib.crc32(repr(code).encode()):08x}.json",
    )
    known = read(results)
    mutants = choose(
        args.files or list(code), None if args.only_survivors else args.count, args.seed
    )
    if args.only_survivors:
        mutants = [
            mutant
            for mutant in mutants
            if read(args.only_survivors).get(str(mutant), {}).get("survived")
        ]
        known = {}
    with tempfile.TemporaryDirectory(dir=args.work) as folder:
        tree = Path(folder, "tree")
        for name in filter(lambda name: (ROOT / name).is_file(), names):
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, tree / name)
        if not learned.exists():
            learned.write_text(json.dumps(learn(tree, Path(tempfile.mkdtemp(dir=folder)))))
        report = json.loads(learned.read_text())
        todo = [mutant for mutant in mutants if str(mutant) not in known]
        print(f"{len(mutants)} mutants, {len(mutants) - len(todo)} of them known", flush=True)
        for record in campaign(todo, report, tree, results, args.jobs):
            known[record["mutant"]] = record
            fate = (
                "SURVIVED"
                if record["survived"]
                else "too slow"
                if record["code"] == -signal.SIGALRM
                else "killed"
            )
            print(f"{fate:<9}{record['seconds']:>6} s  {record['mutant']}", flush=True)
    survivors = [known[str(mutant)] for mutant in mutants if known[str(mutant)]["survived"]]
    print(
        f"\n{len(mutants)} mutants, {len(mutants) - len(survivors)} killed, {len(survivors)}"
        " survived"
    )
    for record in survivors:
        file, _, change = record["mutant"].partition(" ")
        print(f"{file}:{record['line']} {change}")


def read(results: Path) -> dict[str, dict]:
    """The last record of each mutant."""
    records = map(json.loads, results.read_text().splitlines()) if results.exists() else ()
    return {record["mutant"]: record for record in records}


if __name__ == "__main__":
    main()
