"""Do the tests notice mistakes? Plants one-line mistakes in the code, one at a time, and lists those that no test sees.

    pip install coverage && python tests/mutate.py --count 300 --jobs 2     # an hour or two; not part of the tests

A first run of all tests under coverage learns which tests reach which line. Then each mistake is planted in a copy of
the repository, in a process forked from one that has already imported the large libraries, and meets the tests that
reach its line, quickest first, until one fails. Results are JSON lines in --out; the same command goes on where it was.
"""

import argparse
import ast
import copy
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parent.parent
FILES = ["ast_model.py", "petl.py", "data.py", "load_weights.py", "train.py", "sounds/*.py", "support/*.py",
         "tools/predict.py", "tools/export.py"]  # fmt: skip
SWAPS = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult, ast.Pow: ast.Mult,
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.And: ast.Or, ast.Or: ast.And,
    ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd,
}  # fmt: skip
NAMES = {"min": "max", "max": "min", "zeros_": "ones_", "train": "val", "val": "test", "mean": "sum", "q": "k", "norm1":
         "norm2", "fc1": "fc2", "first": "last", "sorted": "list", "floor": "round", "sin": "cos"}  # fmt: skip

HEAVY = "torch transformers peft soundfile soxr onnxruntime onnx pytest matplotlib.pyplot sklearn.manifold"


def mutations(node: ast.AST) -> Iterator[tuple[str, ast.AST]]:
    """Every way to get one node wrong: what was done, and the wrong node."""

    def changed(**fields):
        wrong = copy.deepcopy(node)
        for name, value in fields.items():
            setattr(wrong, name, value)
        return wrong

    match node:
        case ast.Constant(value=bool() as value):
            yield f"{value} flipped", changed(value=not value)
        case ast.Constant(value=int() | float() as value):
            for other in (value + 1, value / 2 if isinstance(value, float) else value - 1):
                yield f"{value} to {other}", changed(value=other)
        case ast.Constant(value=str() as value) if value and len(value) < 40:
            yield f"{value!r} changed", changed(value=f"{value}X")
        case ast.BinOp() | ast.BoolOp() if type(node.op) in SWAPS:
            yield "operator", changed(op=SWAPS[type(node.op)]())
        case ast.AugAssign() if type(node.op) in SWAPS:
            yield "operator", changed(op=SWAPS[type(node.op)]())
        case ast.Compare(ops=[op]) if type(op) in SWAPS:
            yield "comparison", changed(ops=[SWAPS[type(op)]()])
        case ast.If() | ast.IfExp() | ast.While():
            yield "condition negated", changed(test=ast.UnaryOp(ast.Not(), node.test))
        case ast.UnaryOp(op=ast.Not() | ast.USub()):
            yield "sign or not dropped", node.operand
        case ast.Call():
            for keyword in node.keywords:
                yield f"{keyword.arg}= dropped", changed(keywords=[k for k in node.keywords if k is not keyword])
            if len(node.args) == 2 and not any(isinstance(a, ast.Starred) for a in node.args):
                yield "arguments swapped", changed(args=node.args[::-1])
            if isinstance(node.func, ast.Name | ast.Attribute) and len(node.args) == 1 and not node.keywords:
                yield "call dropped", node.args[0]
        case ast.Name(id=name, ctx=ast.Load()) if name in NAMES:
            yield f"{name} to {NAMES[name]}", changed(id=NAMES[name])
        case ast.Attribute(attr=name, ctx=ast.Load()) if name in NAMES:
            yield f".{name} to .{NAMES[name]}", changed(attr=NAMES[name])
        case ast.Expr(value=ast.Call()) | ast.Raise() | ast.Assign() | ast.AugAssign():
            yield "statement dropped", ast.Pass()
        case ast.Return(value=value) if value is not None:
            yield "returns nothing", changed(value=ast.Constant(None))
        case ast.Slice(lower=None, upper=None):
            pass
        case ast.Slice(lower=lower) if lower is not None:
            yield "slice starts later", changed(lower=ast.BinOp(lower, ast.Add(), ast.Constant(1)))
        case ast.Dict(keys=keys, values=values) if len(keys) > 1:
            yield "two values swapped", changed(values=[values[1], values[0], *values[2:]])


def mutants_of(file: Path) -> Iterator[dict]:
    """All mistakes in one file, as {file, function, line, what, source}; docstrings and messages stay as they are."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    quiet = set()  # docstrings, messages, annotations, formats
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            quiet |= set(map(id, ast.walk(node)))
        if isinstance(node, ast.JoinedStr | ast.Raise) or (
            isinstance(node, ast.Call)
            and getattr(node.func, "id", getattr(node.func, "attr", "")) in ("say", "print", "warn")
        ):
            quiet |= set(map(id, list(ast.walk(node))[1:]))
        for field in ("annotation", "returns"):
            if getattr(node, field, None) is not None:
                quiet |= set(map(id, ast.walk(getattr(node, field))))
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    for parent in ast.walk(tree):
        for name, value in ast.iter_fields(parent):
            for i, node in enumerate(value if isinstance(value, list) else [value]):
                if not isinstance(node, ast.AST) or id(node) in quiet or not hasattr(node, "lineno"):
                    continue
                for what, wrong in mutations(node):
                    if isinstance(value, list):
                        value[i] = wrong
                    else:
                        setattr(parent, name, wrong)
                    source = ast.unparse(ast.fix_missing_locations(tree))
                    if isinstance(value, list):
                        value[i] = node
                    else:
                        setattr(parent, name, node)
                    inside = [f.name for f in functions if f.lineno <= node.lineno <= f.end_lineno]
                    yield {
                        "file": str(file.relative_to(ROOT)), "function": inside[-1] if inside else "", "what": what,
                        "line": node.lineno, "last": getattr(node, "end_lineno", node.lineno), "source": source,
                    }  # fmt: skip


def sample(files: list[str], count: int, seed: int) -> list[dict]:
    """`count` mistakes, spread over all functions: one of each in turn, in a random order."""
    groups = defaultdict(list)
    for pattern in files:
        for file in sorted(ROOT.glob(pattern)):
            for mutant in mutants_of(file):
                groups[mutant["file"], mutant["function"]].append(mutant)
    rng = random.Random(seed)
    for group in groups.values():
        rng.shuffle(group)
    order = sorted(groups)
    rng.shuffle(order)
    chosen = []
    while len(chosen) < count and any(groups.values()):
        chosen += [groups[key].pop() for key in order if groups[key]]
    return chosen[:count]


def learn(folder: Path) -> dict:
    """Which tests reach which line, and their seconds: {"tests": {name: seconds}, "lines": {file: {line: names}}}."""
    found = folder / "reach.json"
    if not found.exists():
        data = folder / "coverage.data"
        (folder / "rc").write_text(f"[run]\ndynamic_context = test_function\ndata_file = {data}\nsource = {ROOT}\n")
        report = folder / "durations.xml"
        words = ["-m", "coverage", "run", f"--rcfile={folder / 'rc'}", "-m", "pytest", "-q", f"--junitxml={report}"]
        subprocess.run([sys.executable, *words], cwd=ROOT, check=True)
        import coverage

        seconds = defaultdict(float)
        for case in ElementTree.parse(report).iter("testcase"):
            name = f"{case.get('classname').removeprefix('tests.')}.{case.get('name').split('[')[0]}"
            seconds[name] += float(case.get("time"))
        lines = {}
        measured = coverage.CoverageData(str(data))
        measured.read()
        for file in measured.measured_files():
            contexts = measured.contexts_by_lineno(file)
            tests = {str(n): sorted({c.removeprefix("tests.") for c in cs if c}) for n, cs in contexts.items()}
            lines[str(Path(file).relative_to(ROOT))] = tests
        found.write_text(json.dumps({"tests": seconds, "lines": lines}))
    return json.loads(found.read_text())


def tests_for(mutant: dict, reach: dict) -> list[str]:
    """The tests that reach a mistake, quickest first; for lines that run on import, all tests that reach the file."""
    lines = reach["lines"].get(mutant["file"], {})
    names = {t for n in range(mutant["line"], mutant["last"] + 1) for t in lines.get(str(n), [])}
    if not names:
        names = {test for tests in lines.values() for test in tests}
    names &= reach["tests"].keys()
    return sorted(names, key=lambda name: reach["tests"][name])


def survives(mutant: dict, reach: dict, limit: float) -> bool:
    """Whether all the tests pass with the mistake, within `limit` seconds. Runs in a copy, in a forked process."""
    tests = [f"tests/{name.split('.')[0]}.py::{name.split('.')[1]}" for name in tests_for(mutant, reach)]
    with tempfile.TemporaryDirectory() as folder:
        tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
        for name in filter(None, tracked.split("\0")):
            if (ROOT / name).is_file():
                (Path(folder) / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, Path(folder) / name)
        (Path(folder) / mutant["file"]).write_text(mutant["source"], encoding="utf-8")
        child = os.fork()
        if child == 0:
            os.setsid()
            os.chdir(folder)
            sys.path[:] = [
                folder,
                *(path for path in sys.path if Path(path or ".").resolve() not in (ROOT, ROOT / "tests")),
            ]
            null = os.open(os.devnull, os.O_RDWR)
            for stream in (0, 1, 2):
                os.dup2(null, stream)
            import pytest

            for some in (tests[:8], tests[8:40], tests[40:]):  # to collect many takes longer than to run a few
                if some and pytest.main(["-x", "-q", "-p", "no:cacheprovider", f"--basetemp={folder}/tmp", *some]):
                    os._exit(1)
            os._exit(0)
        started = time.monotonic()
        while time.monotonic() - started < limit:
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                return status == 0
            time.sleep(0.05)
        os.killpg(child, signal.SIGKILL)
        os.waitpid(child, 0)
        return False


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--files", nargs="+", default=FILES)
    parser.add_argument("--limit", type=float, default=240, help="seconds for the tests of one mistake")
    parser.add_argument("--again", action="store_true", help="only those that survived before")
    parser.add_argument("--out", type=Path, default=Path(tempfile.gettempdir()) / "mutants")
    args = parser.parse_args()
    os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", PYTHONDONTWRITEBYTECODE="1")
    args.out.mkdir(parents=True, exist_ok=True)
    reach = learn(args.out)
    file = args.out / "results.jsonl"
    known = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    chosen = sample(args.files, args.count, args.seed)
    seen = {(k["file"], k["line"], k["what"], k["source"]) for k in known if not (args.again and k["survived"])}
    chosen = [m for m in chosen if (m["file"], m["line"], m["what"], m["source"]) not in seen]
    for name in HEAVY.split():
        __import__(name)
    from transformers import ASTFeatureExtractor, ASTForAudioClassification  # noqa: F401 - resolves its lazy imports

    for job in range(args.jobs):
        if os.fork() == 0:
            for mutant in chosen[job :: args.jobs]:
                survived = survives(mutant, reach, args.limit)
                with open(file, "a") as out:
                    out.write(json.dumps({**mutant, "survived": survived}) + "\n")
                print(
                    "SURVIVED" if survived else "killed  ",
                    f"{mutant['file']}:{mutant['line']}",
                    mutant["what"],
                    flush=True,
                )
            os._exit(0)
    for _ in range(args.jobs):
        os.wait()
    last = {(k["file"], k["line"], k["what"], k["source"]): k for k in map(json.loads, file.read_text().splitlines())}
    left = [k for k in last.values() if k["survived"]]
    print(f"{len(last)} mistakes, {len(last) - len(left)} noticed, {len(left)} not:")
    for k in sorted(left, key=lambda k: (k["file"], k["line"])):
        print(f"  {k['file']}:{k['line']} in {k['function'] or 'the module'}: {k['what']}")


if __name__ == "__main__":
    main()
