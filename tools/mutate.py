"""Mutation testing: a seeded sample of small mistakes in the sources, and whether the tests beside them fail.

    pip install cosmic-ray  # its operators; not a dependency of the project
    python tools/mutate.py megagnn/optim/schedule.py --tests tests/optim/test_schedule.py --sample 15

A mutant is one place of a file with an operator, number, comparison or condition replaced, or a call whose
result nobody uses left out. Places are drawn without repetition, then one replacement of each. A mutant lives
in memory: a process forked after the libraries are imported sees the changed text in place of the module;
tests that start further processes do not. Annotations and messages are left alone.
"""

import argparse
import ast
import contextlib
import importlib.machinery
import importlib.util
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

LIBRARIES = ("torch.utils.tensorboard", "scipy.optimize", "ase.io", "pydantic", "matplotlib.pyplot", "pytest")
LEFT_ALONE = ("NoOp", "Decorator", "Exception", "Variable", "_RShift", "_LShift", "_BitXor", "_Mod", "_IsNot")


def places(source: str) -> dict[tuple[int, int], list[tuple[str, int]]]:
    """{position: [(operator, its occurrence)]}; the operator "remove" stands for a statement left out."""
    from cosmic_ray.ast import get_ast
    from cosmic_ray.plugins import get_operator, operator_names

    names = [n for n in operator_names() if not any(part in n for part in LEFT_ALONE)]
    names = [n for n in names if n.count("_Bit") != 1 or "Operator_Bit" in n]  # of numbers it is a TypeError
    operators, counts = {name: get_operator(name)() for name in names}, dict.fromkeys(names, 0)
    tree, spans = ast.parse(source), []
    for node in ast.walk(tree):
        parts = [getattr(node, name, None) for name in ("annotation", "returns")]
        parts += [node] * isinstance(node, ast.JoinedStr | ast.Raise)
        spans += [((p.lineno, p.col_offset), (p.end_lineno, p.end_col_offset)) for p in parts if p]
    found: dict[tuple[int, int], list[tuple[str, int]]] = {}

    def collect(node: Any) -> None:
        for name, operator in operators.items():
            for start, _ in operator.mutation_positions(node):
                if not any(a <= start < b for a, b in spans):
                    found.setdefault(start, []).append((name, counts[name]))
                counts[name] += 1
        for child in getattr(node, "children", ()):
            collect(child)

    collect(get_ast(source))
    for node in ast.walk(tree):
        called = isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)
        if called or isinstance(node, ast.AugAssign):
            found[node.lineno, -1] = [("remove", node.lineno)]
    return found


def removed(source: str, line: int) -> str:
    """The source with `pass` in place of the statement that begins on a line."""
    node = next(n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.stmt) and n.lineno == line)
    lines = source.splitlines(keepends=True)
    return "".join([*lines[: line - 1], " " * node.col_offset + "pass\n", *lines[node.end_lineno :]])


def mutants(source: str, number: int, seed: str) -> Iterator[tuple[dict[str, object], str]]:
    """(What was changed, the changed text), at most so many, each of another place."""
    from cosmic_ray.mutating import mutate_code
    from cosmic_ray.plugins import get_operator

    found, rng = places(source), random.Random(seed)
    for start in rng.sample(sorted(found), min(number, len(found))):
        name, k = rng.choice(found[start])
        text = removed(source, k) if name == "remove" else mutate_code(source, get_operator(name)(), k)
        both = enumerate(zip(source.splitlines(), text.splitlines(), strict=False), 1)
        line, (old, new) = next((line, pair) for line, pair in both if pair[0] != pair[1])
        operator = name.rpartition("/")[2]
        yield {"line": line, "operator": operator, "before": old.strip(), "after": new.strip()}, text


class Changed(importlib.machinery.SourceFileLoader):
    """A finder, and loader, that gives one module another text."""

    def __init__(self, path: str, text: str) -> None:
        super().__init__(path.removesuffix(".py").replace("/", "."), str(Path(path).resolve()))
        self.text = text

    def find_spec(self, name: str, *_: Any) -> Any:
        return importlib.util.spec_from_file_location(name, loader=self) if name == self.name else None

    def get_code(self, fullname: str) -> Any:
        return compile(self.text, self.path, "exec")


def outcome(path: str, text: str, tests: list[str], limit: float, log: Path) -> tuple[str, float]:
    """'caught', 'survived' or 'timeout', and the seconds that the tests took in a process of their own."""
    begin, child, status = time.monotonic(), os.fork(), ""
    if child == 0:
        os.setpgid(0, 0)
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 1)
        os.dup2(1, 2)
        sys.meta_path.insert(0, Changed(path, text))  # type: ignore[arg-type]
        code = 1
        with contextlib.suppress(BaseException):
            options = ["-x", "-q", "-p", "no:cacheprovider", f"--basetemp={log}.files"]
            code = int(sys.modules["pytest"].main(options + tests))
        os._exit(code)
    while not status:
        done, code = os.waitpid(child, os.WNOHANG)
        status = "" if not done else "caught" if code else "survived"
        if not done and time.monotonic() - begin > limit:
            os.killpg(child, signal.SIGKILL)
            status = "timeout" if os.waitpid(child, 0) else ""
        time.sleep(0.05)
    shutil.rmtree(f"{log}.files", ignore_errors=True)
    return status, time.monotonic() - begin


def main() -> None:
    """One line of JSON for each mutant, and the totals."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("path", help="a source under the working folder")
    parser.add_argument("--tests", nargs="+", required=True, help="test files or tests that should fail")
    parser.add_argument("--sample", type=int, default=20, help="number of mutants (20)")
    parser.add_argument("--seed", default="0", help="of the sample (0)")
    arguments, log = parser.parse_args(), Path(tempfile.mkdtemp()) / "log"
    path, tests = arguments.path, arguments.tests
    source = Path(path).read_text()
    for name in LIBRARIES:
        importlib.import_module(name)
    sys.path[:0] = [os.getcwd(), str(Path(__file__).parent)]
    tried = dict.fromkeys(("caught", "timeout", "survived"), 0)
    said, seconds = outcome(path, source, tests, 600, log)
    if said != "survived":
        sys.exit(f"the tests of {path} must pass before anything is changed:\n{log.read_text()}")
    for words, text in mutants(source, arguments.sample, f"{arguments.seed} {path}"):
        said, _ = outcome(path, text, tests, 3 * seconds + 10, log)
        tried[said] += 1
        print(json.dumps({"file": path, **words, "outcome": said}), flush=True)
    print(tried)


if __name__ == "__main__":
    main()
