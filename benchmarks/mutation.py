"""Which wrong edits would the tests notice? Mutation testing of the numerical core, with mutmut's operators.

    make mutants                                             # all of it: hours on two cores
    python benchmarks/mutation.py cover [TESTS]              # which test runs which line
    python benchmarks/mutation.py run --sample 400 --seed 0  # a random sample of wrong edits, one at a time
    python benchmarks/mutation.py again [TESTS]              # the survivors, in the present code
    python benchmarks/mutation.py report

Needs the extra `mutation`. mutmut makes the wrong edits; they are run here, because mutmut's own runner
rewrites every module, which tests and fingerprints that read source code would see. All modules and tests are
imported once; each mutant is then a forked process in which one function's code is replaced. Tests that run
the edited line follow, those of the module's own test file and the fastest first, until one fails.

Log lines, assertions and raised messages are not edited. A test may take five times its usual time, and five
seconds, of CPU. Results are lines of JSON: `killed` (by which test), `timeout`, `survived`, `no test`.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import gc
import importlib
import io
import json
import os
import random
import resource
import signal
import sys
import time
import traceback
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any

import libcst as cst
import libcst.matchers as m
import pytest

ROOT = Path(os.environ.get("MUTATION_ROOT", Path(__file__).resolve().parent.parent))
FOLDER = ROOT / "outputs" / "mutation"
PACKAGES = ("engine", "further_training", "curvature", "linear_response", "methods", "evaluation", "tasks")
MODULES = ("app/scoring.py", "store/files.py", "store/fingerprint.py")
LOGGING = m.Call(func=m.Attribute(value=m.Name("log")))
MEMORY = 6 * 2**30
"""Bytes that a mutant may take."""

NOTICED = ("killed", "timeout", "wall", "crash")


# the wrong edits


@dataclass(frozen=True, eq=False)
class Mutant:
    """One wrong edit of a function: ``before`` becomes ``after``, at its ``k``-th occurrence."""

    path: str
    function: str
    line: int
    before: str
    after: str
    k: int
    edit: Any  # mutmut's two nodes of the module's syntax tree
    module: cst.Module

    @property
    def name(self) -> str:
        return f"{self.path} {self.function}: {self.before} -> {self.after} #{self.k}"

    @property
    def source(self) -> str:
        """The edited module."""
        return self.module.deep_replace(self.edit.original_node, self.edit.mutated_node).code


def sources() -> list[Path]:
    package = ROOT / "src" / "fimo"
    return sorted([*(p for name in PACKAGES for p in (package / name).rglob("*.py")),
                   *(package / name for name in MODULES)])  # fmt: skip


def mutants(path: Path) -> list[Mutant]:
    """Return all wrong edits of a module's functions."""
    from mutmut.mutation.file_mutation import MutationVisitor
    from mutmut.mutation.mutators import mutation_operators
    from mutmut.mutation.pragma_handling import IgnoredCode

    class Visitor(MutationVisitor):
        def _skip_node_and_children(self, node: cst.CSTNode) -> bool:
            if isinstance(node, cst.FunctionDef) and node.decorators:
                return False  # mutmut's trampolines can't follow a decorator; replaced code can
            if isinstance(node, cst.Raise | cst.Assert) or m.matches(node, LOGGING):
                return True
            return super()._skip_node_and_children(node)

    wrapper = cst.MetadataWrapper(cst.parse_module(path.read_text()))
    visitor = Visitor(mutation_operators, IgnoredCode(set(), set(), set()))
    module = wrapper.visit(visitor)
    positions = wrapper.resolve(cst.metadata.PositionProvider)
    found, names, seen = [], _qualified(module), Counter()
    for edit in visitor.mutations:
        function = names.get(id(edit.contained_by_top_level_function))
        if function is None:
            continue
        before, after = (
            module.code_for_node(node).strip() for node in (edit.original_node, edit.mutated_node)
        )
        if before != after:
            line = positions[edit.original_node].start.line
            k = seen[function, before, after]
            seen[function, before, after] += 1
            relative = str(path.relative_to(ROOT))
            found.append(Mutant(relative, function, line, before, after, k, edit, module))
    return found


def _qualified(module: cst.Module) -> dict[int, str]:
    """Return the qualified names of functions and methods, by the identity of their nodes."""
    found = {}
    for node in module.body:
        if isinstance(node, cst.FunctionDef):
            found[id(node)] = node.name.value
        elif isinstance(node, cst.ClassDef) and isinstance(node.body, cst.IndentedBlock):
            for inner in node.body.body:
                if isinstance(inner, cst.FunctionDef):
                    found[id(inner)] = f"{node.name.value}.{inner.name.value}"
    return found


def sample(count: int, seed: int, only: list[str]) -> list[Mutant]:
    """Return a random sample of all mutants, and of it those whose path has one of the parts."""
    kept = FOLDER / f"sample-{count}-{seed}.json"
    if not kept.exists():
        everything = [
            (str(path.relative_to(ROOT)), k) for path in sources() for k in range(len(mutants(path)))
        ]
        print(f"{len(everything)} mutants in {len({path for path, _ in everything})} modules")
        kept.write_text(json.dumps(random.Random(seed).sample(everything, min(count, len(everything)))))
    drawn = [(path, k) for path, k in json.loads(kept.read_text()) if any(part in path for part in only)]
    known = {path: mutants(ROOT / path) for path in sorted({path for path, _ in drawn})}
    return [known[path][k] for path, k in drawn]


def survivors(out: Path, only: list[str]) -> list[Mutant]:
    """Return the mutants that survived before, where the present code still has them."""
    names = {n: r["path"] for n, r in results(out).items() if r["status"] not in NOTICED}
    paths = {p for p in names.values() if any(part in p for part in only) and (ROOT / p).exists()}
    return [mutant for path in sorted(paths) for mutant in mutants(ROOT / path) if mutant.name in names]


# which test runs which line


class Cover:
    """A pytest plugin: the lines that each test runs, and its time."""

    def __init__(self) -> None:
        import coverage

        self.coverage = coverage.Coverage(
            data_file=None, source=[str(ROOT / "src" / "fimo")], config_file=False
        )
        self.seconds: dict[str, float] = {}
        self.failed: set[str] = set()

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        self.coverage.switch_context(item.nodeid)
        start = time.process_time()
        try:
            return (yield)
        finally:
            self.seconds[item.nodeid] = time.process_time() - start

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if not report.passed:
            self.failed.add(report.nodeid)


def cover(tests: list[str], out: Path) -> None:
    plugin = Cover()
    plugin.coverage.start()
    pytest.main(["-q", "-p", "no:cacheprovider", "-m", "not launcher", *tests], plugins=[plugin])
    plugin.coverage.stop()
    data = plugin.coverage.get_data()
    lines = {
        str(Path(file).relative_to(ROOT)): {
            line: [name for name in names if name and name not in plugin.failed]
            for line, names in data.contexts_by_lineno(file).items()
        }
        for file in data.measured_files()
    }
    out.write_text(json.dumps({"lines": lines, "seconds": plugin.seconds}))


class Tests:
    """Which tests run a line, in the order in which they are tried."""

    def __init__(self, maps: list[Path]) -> None:
        self.seconds: dict[str, float] = {}
        self.lines: dict[str, dict[int, set[str]]] = defaultdict(lambda: defaultdict(set))
        for path in maps:
            known = json.loads(path.read_text())
            self.seconds |= known["seconds"]
            for file, by_line in known["lines"].items():
                for line, names in by_line.items():
                    self.lines[file][int(line)].update(names)
        self.spans: dict[tuple[str, str], range] = {}
        for path in sources():
            wrapper = cst.MetadataWrapper(cst.parse_module(path.read_text()))
            names, positions = _qualified(wrapper.module), wrapper.resolve(cst.metadata.PositionProvider)
            for node, where in positions.items():
                if id(node) in names:
                    span = range(where.start.line, where.end.line + 1)
                    self.spans[str(path.relative_to(ROOT)), names[id(node)]] = span

    def of(self, mutant: Mutant) -> list[str]:
        """Return the tests of the line, or of its function where no test is known to run the line itself."""
        by_line = self.lines[mutant.path]
        names = by_line.get(mutant.line, set())
        if not names:
            span = self.spans.get((mutant.path, mutant.function), range(0))
            names = set().union(*(by_line.get(line, set()) for line in span))
        package, module = Path(mutant.path).parent.name, Path(mutant.path).stem

        def order(name: str) -> tuple[float, str]:
            file = name.split("::")[0]
            near = 1.0 if file.endswith(f"test_{module}.py") else 2.0 if f"/{package}/" in file else 4.0
            return near * (0.1 + self.seconds.get(name, 1.0)), name

        return sorted(names, key=order)


# one mutant in one process


class TooLong(BaseException):
    """A test took far longer than usual."""


class Limit:
    """A pytest plugin that limits each test's time; the first failure's name is kept."""

    def __init__(self, seconds: dict[str, float]) -> None:
        self.seconds, self.first, self.timeout, self.run = seconds, "", False, 0
        signal.signal(signal.SIGPROF, self._stop)

    def _stop(self, *_: Any) -> None:
        self.timeout = True
        raise TooLong

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        self.run += 1
        signal.setitimer(signal.ITIMER_PROF, 5 + 5 * self.seconds.get(item.nodeid, 5.0))
        try:
            return (yield)
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed and not self.first:
            self.first = report.nodeid


Functions = dict[tuple[str, str], list[FunctionType]]
"""The functions of each file and qualified name that are alive in this process."""


def living() -> Functions:
    found: Functions = defaultdict(list)
    for thing in gc.get_objects():
        if type(thing) is FunctionType:
            found[thing.__code__.co_filename, thing.__code__.co_qualname].append(thing)
    return found


def apply(mutant: Mutant, functions: Functions) -> str:
    """Replace the code of the mutant's function in this process; return what hinders it."""
    file, source = str(ROOT / mutant.path), mutant.source
    new, old = _find(compile(source, file, "exec"), mutant.function), functions[file, mutant.function]
    if new is None or not old:
        return f"{len(old)} functions of this name"
    for function in old:
        if function.__code__.co_freevars != new.co_freevars:
            return "other free variables"
        function.__code__ = new
        _set_defaults(function, mutant.function, source)
    return ""


def _find(code: CodeType, qualname: str) -> CodeType | None:
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            found = constant if constant.co_qualname == qualname else _find(constant, qualname)
            if found is not None:
                return found
    return None


def _set_defaults(function: FunctionType, qualname: str, source: str) -> None:
    """Give a function the edited values of its arguments' defaults, where they are constants."""
    *owner, name = qualname.split(".")
    body: list[ast.stmt] = ast.parse(source).body
    for part in owner:
        body = next(n for n in body if isinstance(n, ast.ClassDef) and n.name == part).body
    node = next(n for n in body if isinstance(n, ast.FunctionDef) and n.name == name)
    values = [v.value for v in node.args.defaults if isinstance(v, ast.Constant)]
    if values and len(values) == len(node.args.defaults):
        function.__defaults__ = tuple(values)
    for argument, value in zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True):
        if isinstance(value, ast.Constant):
            function.__kwdefaults__[argument.arg] = value.value


def attempt(
    mutant: Mutant, functions: Functions, tests: list[str], seconds: dict[str, float], wall: float
) -> dict[str, Any]:
    """Run tests on a mutant in a forked process, for at most ``wall`` seconds."""
    read, write = os.pipe()
    start, child = time.time(), os.fork()
    if child == 0:
        os.setpgid(0, 0)
        sink = os.open(os.devnull, os.O_WRONLY)
        os.dup2(sink, 1)
        os.dup2(sink, 2)
        os.write(write, json.dumps(_in_child(mutant, functions, tests, seconds)).encode())
        os._exit(0)
    os.close(write)
    os.set_blocking(read, False)
    content, done = b"", False
    while not done and time.time() - start < wall:
        done = os.waitpid(child, os.WNOHANG)[0] == child
        with contextlib.suppress(BlockingIOError):
            content += os.read(read, 2**16)
        time.sleep(0.02)
    if not done:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)
        os.waitpid(child, 0)
    os.close(read)
    result = json.loads(content) if content else {"status": "crash" if done else "wall"}
    return result | {"seconds": round(time.time() - start, 2)}


def _in_child(
    mutant: Mutant, functions: Functions, tests: list[str], seconds: dict[str, float]
) -> dict[str, Any]:
    try:
        resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
        limit = Limit(seconds)
        reason = apply(mutant, functions)
        if reason:
            return {"status": "unfit", "reason": reason}
        options = ["-x", "-q", "-p", "no:cacheprovider", "--no-header", "--tb=no", "-m", "not launcher"]
        code = int(pytest.main([*options, *tests], plugins=[limit]))
        status = "timeout" if limit.timeout else "survived" if code == 0 else "killed"
        return {"status": status, "by": limit.first, "run": limit.run, "exit": code}
    except TooLong:
        return {"status": "timeout"}
    except BaseException as error:
        return {"status": "crash", "reason": "".join(traceback.format_exception(error))[-500:]}


# all of them


def run(chosen: list[Mutant], done: dict[str, Any], arguments: argparse.Namespace) -> None:
    print(f"{len(chosen)} chosen, {len(done)} known", flush=True)
    tests = Tests(arguments.maps)
    os.chdir(ROOT)
    sys.path[:0] = [str(ROOT / "src"), str(ROOT)]
    import torch

    torch.set_num_threads(1)
    files = sorted({name.split("::")[0] for name in tests.seconds} | set(arguments.tests))
    with contextlib.redirect_stdout(io.StringIO()):
        pytest.main(["--collect-only", "-q", "-p", "no:cacheprovider", *files])
    for path in sources():  # methods are imported where a configuration names them
        parts = path.relative_to(ROOT / "src").with_suffix("").parts
        importlib.import_module(".".join(parts).removesuffix(".__init__"))
    functions = living()
    gc.freeze()  # a collection in a forked process would copy all of it
    with arguments.out.open("a") as out:
        for mutant in chosen:
            if done.get(mutant.name, {"status": "unfit"})["status"] != "unfit":
                continue
            known, kept = tests.of(mutant), []
            for name in known:
                if kept and sum(tests.seconds[n] for n in kept) > arguments.budget:
                    break
                kept.append(name)
            tried = [*kept, *arguments.tests]
            result = (
                attempt(mutant, functions, tried, tests.seconds, arguments.wall)
                if tried
                else {"status": "no test"}
            )
            record = {k: getattr(mutant, k) for k in ("name", "path", "function", "line", "before", "after")}
            out.write(json.dumps(record | {"known": len(known), "tried": len(tried)} | result) + "\n")
            out.flush()


def results(out: Path) -> dict[str, Any]:
    """Return the last result of each mutant, by its name."""
    lines = out.read_text().splitlines() if out.exists() else []
    return {record["name"]: record for record in map(json.loads, lines)}


def report(out: Path) -> None:
    """Print a table by module, and the survivors."""
    by_module: dict[str, Counter[str]] = defaultdict(Counter)
    for r in results(out).values():
        by_module[r["path"]][r["status"]] += 1
    total: Counter[str] = sum(by_module.values(), Counter())
    for name, counts in [*sorted(by_module.items()), ("all", total)]:
        n, noticed = counts.total(), sum(counts[s] for s in NOTICED)
        print(f"{name:50s} {noticed:4d} of {n:4d}  {noticed / max(n, 1):.2f}  {dict(counts)}")
    for r in results(out).values():
        if r["status"] not in NOTICED:
            print(f"{r['status']}: line {r['line']} of {r['name']}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=["cover", "run", "again", "report"])
    parser.add_argument("tests", nargs="*", help="files of tests; with run and again, tried for every mutant")
    parser.add_argument("--sample", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="*", default=[""], help="parts of modules' paths")
    parser.add_argument("--budget", type=float, default=60, help="usual seconds of a mutant's tests")
    parser.add_argument("--wall", type=float, default=400, help="seconds of a mutant")
    parser.add_argument("--maps", type=Path, nargs="*", default=[FOLDER / "lines.json"])
    parser.add_argument("--out", type=Path, default=FOLDER / "results.jsonl")
    arguments = parser.parse_args()
    FOLDER.mkdir(parents=True, exist_ok=True)
    if arguments.command == "cover":
        folders = [f"tests/{name}" for name in PACKAGES] + [
            "tests/test_scoring.py",
            "tests/test_fingerprint.py",
        ]
        cover(arguments.tests or folders, arguments.maps[0])
    elif arguments.command == "run":
        run(sample(arguments.sample, arguments.seed, arguments.only), results(arguments.out), arguments)
    elif arguments.command == "again":
        run(survivors(arguments.out, arguments.only), {}, arguments)
    else:
        report(arguments.out)


if __name__ == "__main__":
    main()
