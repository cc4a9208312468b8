"""Mutation testing: which of the edits of :mod:`tests.mutants.edits` do the fast tests notice?

    python -m tests.mutants.run --sample 300 --seed 0

In two stages: the unit tests on every edit, and the rest of the fast suite on the edits that survive those. First the
tests of a stage run once and record which test executes which statement. Then each edit gets a process of its own,
forked from one in which all tests are collected already: the edited function gets its edited code, and the tests that
execute the edited statement run until one fails. (What runs when a module is imported is edited before the import.) A
test that fails by itself without any edit kills nothing.

Exit status 1 unless at least 95 % are killed and every survivor is listed in ``equivalent.toml`` with the reason why no
test can tell it from the original.
"""

from __future__ import annotations

import argparse
import faulthandler
import hashlib
import importlib
import importlib.machinery
import inspect
import json
import math
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from types import CodeType
from typing import Any

import coverage
import pytest
import tomllib

from tests.mutants.edits import FILES, ROOT, Edit, places_of, sample

CACHE = ROOT / "build" / "mutants"
EQUIVALENT = Path(__file__).with_name("equivalent.toml")
WANTED = 0.95
PRELOADED = ("torch", "torch._dynamo", "torch._inductor.compile_fx", "torch.export", "torchao.quantization")
PRELOADED += ("transformers", "hypothesis", "expecttest", "networkx", "jinja2", "tabulate", "click")
LEAST_SECONDS = 60
"""What a test may take at least before it counts as hung."""


# -- which test executes what ------------------------------------------------------------------------------------------


class Recorder:
    """A pytest plugin: notes what each test executes, whether it passed and how long it took."""

    def __init__(self, cov: coverage.Coverage) -> None:
        self._cov = cov
        self.tests: dict[str, float] = {}
        self.bad: set[str] = set()

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Any:
        self._cov.switch_context(item.nodeid)
        return (yield)

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef: Any, request: Any) -> Any:
        """What a fixture of a whole file executes belongs to all of the file's tests."""
        if fixturedef.scope == "function":
            return (yield)
        self._cov.switch_context(request.node.nodeid)
        try:
            return (yield)
        finally:
            self._cov.switch_context(request._pyfuncitem.nodeid)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.tests[report.nodeid] = self.tests.get(report.nodeid, 0.0) + report.duration
        if report.failed or report.skipped:
            self.bad.add(report.nodeid)


class Records:
    """What was recorded of the fast suite.

    Attributes:
        seconds: duration by test, of those that pass.
        touched: by file and function, the tests by the line counted from the function's ``def``.
    """

    def __init__(self, seconds: dict[str, float], touched: dict[str, dict[str, dict[str, list[str]]]]) -> None:
        self.seconds = seconds
        self.touched = touched
        self._by_file: dict[str, list[str]] = {}
        for test in seconds:
            self._by_file.setdefault(test.split("::")[0], []).append(test)

    def covering(self, edit: Edit) -> list[str]:
        """The tests that execute the edited statement, those that are likely to notice it soon first."""
        functions = self.touched.get(edit.file, {})
        found: set[str] = set()
        if edit.function == "<module>":
            found.update(t for lines in functions.values() for tests in lines.values() for t in tests)
        else:
            lines = functions.get(edit.function, {})
            for line in range(edit.lines[0] - edit.first, edit.lines[1] - edit.first + 1):
                found.update(lines.get(str(line), ()))
        tests = {t for name in found for t in ([name] if "::" in name else self._by_file.get(name, ()))}
        tests &= self.seconds.keys()
        by_file: dict[str, float] = {}
        for t in tests:
            by_file[t.split("::")[0]] = by_file.get(t.split("::")[0], 0.0) + self.seconds[t]

        def order(test: str) -> Any:
            file = test.split("::")[0]
            return by_file[file], file, self.seconds[test]

        return sorted(tests, key=order)


def state_of_the_tree() -> str:
    """A fingerprint of the product and its tests."""
    digest = hashlib.sha256()
    for folder in ("quantpass", "patterns", "lowering", "tests"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()


@dataclass(frozen=True, slots=True)
class Stage:
    """Tests that are tried on edits: paths of test files, under a name."""

    name: str
    files: list[str]

    def records(self, jobs: int, *, stale: bool) -> Records:
        """What the tests execute, recorded anew where the tree changed since; ``stale`` makes do with what is there."""
        path = CACHE / f"{self.name}.json"
        stored = json.loads(path.read_text()) if path.is_file() else {"files": None}
        now = {"files": self.files} | ({} if stale else {"state": state_of_the_tree()})
        if any(stored[name] != value for name, value in now.items()):
            print(f"recording which of the {self.name} executes what ...", flush=True)
            jobs = min(jobs, len(self.files))
            parts = [CACHE / f"{self.name}.{i}.json" for i in range(jobs)]
            runs = [Forked(_record, (str(p), self.files[i::jobs]), seconds=7200) for i, p in enumerate(parts)]
            if {run.result() for run in runs} != {0}:
                raise RuntimeError("the tests could not be recorded, see above")
            stored = _joined([json.loads(p.read_text()) for p in parts])
            path.write_text(json.dumps(stored | {"files": self.files, "state": state_of_the_tree()}))
        return Records(stored["seconds"], stored["touched"])


def stages(given: argparse.Namespace) -> list[Stage]:
    """The stages that are asked for."""
    of_units, of_others = ["tests/unit/**/test_*.py"], given.tests or ["tests/test_*.py"]
    files = [sorted({str(p.relative_to(ROOT)) for g in globs for p in ROOT.glob(g)}) for globs in (of_units, of_others)]
    units, others = Stage("unit tests", files[0]), Stage("other tests", files[1])
    return [units] if given.units else [units, others]


def _joined(parts: list[Any]) -> dict[str, Any]:
    """What several processes have recorded of different tests."""
    joined: dict[str, Any] = {"seconds": {}, "touched": {}}
    for part in parts:
        joined["seconds"] |= part["seconds"]
        for file, functions in part["touched"].items():
            for function, lines in functions.items():
                into = joined["touched"].setdefault(file, {}).setdefault(function, {})
                for line, tests in lines.items():
                    into[line] = sorted({*into.get(line, ()), *tests})
    return joined


def _record(path: str, files: list[str]) -> int:
    cov = coverage.Coverage(data_file=None, config_file=False, include=[str(ROOT / f) for f in FILES])
    recorder = Recorder(cov)
    cov.start()
    status = pytest.main([*files, *FAST, *QUIET], plugins=[recorder])
    cov.stop()
    touched: dict[str, Any] = {}
    for file in FILES:
        places = places_of((ROOT / file).read_text())
        for line, contexts in cov.get_data().contexts_by_lineno(str(ROOT / file)).items():
            function, first, _ = places[line]
            tests = [c for c in contexts if c]
            touched.setdefault(file, {}).setdefault(function, {})[str(line - first)] = sorted(tests)
    if recorder.bad:
        print(f"{len(recorder.bad)} tests were skipped or fail without any edit; they kill nothing:")
        print("\n".join(f"  {t}" for t in sorted(recorder.bad)))
    seconds = {t: round(s, 3) for t, s in recorder.tests.items() if t not in recorder.bad}
    Path(path).write_text(json.dumps({"seconds": seconds, "touched": touched}))
    return 0 if status in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED) else BROKEN


# -- processes ---------------------------------------------------------------------------------------------------------

FAST = ("-m", "not slow")
QUIET = ("-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-p", "no:faulthandler", "--tb=line")


KILLED = 1
BROKEN = 70
"""Exit statuses of a try: a test failed, and the try itself failed."""


class Forked:
    """A function run in a process of its own; its result is an exit status, -9 where it took too long."""

    def __init__(self, function: Callable[..., int], arguments: tuple[Any, ...], seconds: float, log: str = "") -> None:
        self._until = time.monotonic() + seconds
        self._status: int | None = None
        sys.stdout.flush()
        self.pid = os.fork()
        if self.pid == 0:
            os.setpgid(0, 0)
            if log:
                out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
                os.dup2(out, 1)
                os.dup2(out, 2)
            status = BROKEN
            try:
                status = function(*arguments)
            except BaseException:
                traceback.print_exc(file=sys.stdout)
            finally:
                sys.stdout.flush()
                os._exit(status)

    def poll(self) -> int | None:
        if self._status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self._status = os.waitstatus_to_exitcode(status)
            elif time.monotonic() > self._until:
                self._status = -signal.SIGKILL
                os.killpg(self.pid, signal.SIGKILL)
                os.waitpid(self.pid, 0)
        return self._status

    def result(self) -> int:
        while self.poll() is None:
            time.sleep(0.05)
        return self.poll() or 0


def preload() -> None:
    """Import what is slow to import and is not the project's own."""
    for name in PRELOADED:
        importlib.import_module(name)
    from hypothesis import settings

    settings.register_profile("mutants", derandomize=True, database=None, deadline=None)
    settings.load_profile("mutants")
    assert "quantpass" not in sys.modules


def load_edited(file: str, source: str) -> None:
    """Let the import of ``file`` find ``source``."""
    path, original = str(ROOT / file), importlib.machinery.SourceFileLoader.get_code

    def get_code(self: Any, fullname: str) -> Any:
        if os.path.realpath(self.path) == path:
            return compile(source, path, "exec")
        return original(self, fullname)

    importlib.machinery.SourceFileLoader.get_code = get_code


def apply(edit: Edit) -> None:
    """Give the function that ``edit`` changes its edited code, wherever else it is referred to."""
    name = edit.file.removesuffix(".py").replace("/", ".")
    owner: Any = sys.modules[name if name.startswith("quantpass.") else f"quantpass.{name}"]
    for part in edit.function.split("."):
        owner = vars(owner)[part]
    for inner in ("fget", "func", "__func__"):
        owner = getattr(owner, inner, owner)
    todo = [compile(edit.source, str(ROOT / edit.file), "exec")]
    while todo:
        code = todo.pop()
        if code.co_qualname == edit.function:
            inspect.unwrap(owner).__code__ = code
            return
        todo.extend(c for c in code.co_consts if isinstance(c, CodeType))
    raise LookupError(edit.function)


class Tests:
    """A pytest plugin: once the tests are collected, tries every edit on them, each in a process forked from this one.

    ``tried`` is what became of the edits.
    """

    def __init__(self, edits: list[Edit], records: Records, jobs: int) -> None:
        self._edits = edits
        self._records = records
        self._jobs = jobs
        self._items: dict[str, pytest.Item] = {}
        self.tried: list[Tried] = []

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        self._items = {i.nodeid: i for i in session.items}
        self.tried = tried_soundly(self._edits, self._records, self._jobs, self._try)
        return True

    def _try(self, edit: Edit | None, tests: list[str], killer: Path) -> int:
        if edit is not None:
            apply(edit)
        items = [self._items[t] for t in tests if t in self._items]
        for item, following in zip_longest(items, items[1:]):
            # Where a test hangs, the process ends, with status 1.
            killer.write_text(item.nodeid)
            seconds = max(LEAST_SECONDS, 20 * self._records.seconds.get(item.nodeid, 0.0))
            faulthandler.dump_traceback_later(seconds, exit=True, file=sys.__stderr__)
            item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
            faulthandler.cancel_dump_traceback_later()
            if item.session.testsfailed:
                return KILLED
        return 0


def try_anew(edit: Edit | None, tests: list[str], killer: Path) -> int:
    """Try an edit of what runs when a module is imported, in a process that has not imported quantpass yet."""
    assert "quantpass" not in sys.modules
    if not tests:
        return 0
    if edit is not None:
        load_edited(edit.file, edit.source)
    wanted = {t: i for i, t in enumerate(tests)}

    class Selected:
        def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
            items[:] = sorted((i for i in items if i.nodeid in wanted), key=lambda i: wanted[i.nodeid])

        def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
            if report.failed:
                killer.write_text(report.nodeid)

    killer.write_text("the import")
    status = pytest.main([*dict.fromkeys(t.split("::")[0] for t in tests), "-x", *QUIET], plugins=[Selected()])
    if status in (pytest.ExitCode.INTERNAL_ERROR, pytest.ExitCode.NO_TESTS_COLLECTED):
        return BROKEN
    return 0 if status == pytest.ExitCode.OK else KILLED  # an import that fails is a usage error or an interruption


# -- the run -----------------------------------------------------------------------------------------------------------

Try = Callable[[Edit | None, list[str], Path], int]


@dataclass
class Tried:
    """An edit and what became of it; ``killer`` is the test that noticed it, empty where none did."""

    edit: Edit
    killer: str
    tests: int


def tried_once(edits: list[Edit], records: Records, jobs: int, broken: set[str], how: Try) -> Iterator[Tried]:
    """Try every edit, ``jobs`` at a time; ``broken`` tests are left out."""
    todo = list(enumerate(edits))[::-1]
    running: dict[int, tuple[Forked, Tried, Path]] = {}
    while todo or running:
        while todo and len(running) < jobs:
            i, edit = todo.pop()
            tests = [t for t in records.covering(edit) if t not in broken]
            budget = LEAST_SECONDS + 10 * sum(records.seconds[t] for t in tests)
            killer, log = CACHE / f"{i}.killer", str(CACHE / f"{i}.log")
            killer.unlink(missing_ok=True)
            running[i] = Forked(how, (edit, tests, killer), budget, log), Tried(edit, "", len(tests)), killer
        for i, (process, tried, killer) in list(running.items()):
            status = process.poll()
            if status is not None:
                del running[i]
                if status == BROKEN:
                    raise RuntimeError(f"{tried.edit}\ncould not be tried, see {CACHE / f'{i}.log'}")
                if status != 0:
                    tried.killer = killer.read_text() if killer.is_file() else "the edit itself"
                yield tried
        time.sleep(0.01)


def tried_soundly(edits: list[Edit], records: Records, jobs: int, how: Try) -> list[Tried]:
    """Try every edit; what a test kills that fails by itself as well, without any edit, is tried again without it."""
    tried: list[Tried] = []
    broken: set[str] = set()
    checked: set[str] = set()
    while edits:
        now = []
        for t in tried_once(edits, records, jobs, broken, how):
            now.append(t)
            if not t.killer:
                print(f"survived ({t.tests} tests)  {t.edit}", flush=True)
        for test in sorted({t.killer for t in now} & records.seconds.keys() - checked):
            if Forked(how, (None, [test], CACHE / "sound.killer"), 600, str(CACHE / "sound.log")).result() != 0:
                broken.add(test)
            checked.add(test)
        tried.extend(t for t in now if t.killer not in broken)
        edits = [t.edit for t in now if t.killer in broken]
    return tried


def reason_of(edit: Edit, listed: list[dict[str, str]]) -> str | None:
    """Why ``edit`` can't be noticed, where that is listed."""
    for entry in listed:
        if all(entry[name] == getattr(edit, name) for name in ("file", "function", "before", "after")):
            return entry["reason"]
    return None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--sample", type=int, default=300, help="how many edits")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--files", nargs="*", default=FILES, help="only edits of these files")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--stale", action="store_true", help="make do with what was recorded before the last changes")
    parser.add_argument("--units", action="store_true", help="only the first stage, the unit tests")
    parser.add_argument("--tests", nargs="*", help="test files of the second stage, if not all the others")
    parser.add_argument("--again", action="store_true", help="only the edits that survived the last time")
    given = parser.parse_args()
    os.chdir(ROOT)
    CACHE.mkdir(parents=True, exist_ok=True)
    preload()
    drawn = sample(given.sample, given.seed, tuple(given.files))
    last = CACHE / "survivors.json"
    if given.again:
        survived = {tuple(key) for key in json.loads(last.read_text())}
        drawn = [e for e in drawn if (e.file, e.operator, e.before, e.after) in survived]
    listed = tomllib.loads(EQUIVALENT.read_text())["edit"] if EQUIVALENT.is_file() else []
    tried: dict[Edit, Tried] = {}
    for stage in stages(given):
        left = [e for e in drawn if e not in tried or not tried[e].killer]
        if left:
            tried |= _tried_by(stage, left, given.jobs, stale=given.stale)
    survivors = [e for e in drawn if not tried[e].killer]
    last.write_text(json.dumps([(e.file, e.operator, e.before, e.after) for e in survivors]))
    return _report(list(tried.values()), listed, given.sample, given.seed)


def _tried_by(stage: Stage, edits: list[Edit], jobs: int, *, stale: bool) -> dict[Edit, Tried]:
    """Every edit tried by the tests of a stage, which is a process of its own: what it imports, the next one imports."""
    path = CACHE / "tried.json"
    if Forked(_try_all, (stage, edits, jobs, stale, path), seconds=math.inf).result() != 0:
        raise RuntimeError("not every edit could be tried, see above")
    return {edits[i]: Tried(edits[i], killer, tests) for i, killer, tests in json.loads(path.read_text())}


def _try_all(stage: Stage, edits: list[Edit], jobs: int, stale: bool, path: Path) -> int:
    records = stage.records(jobs, stale=stale)
    print(f"{len(edits)} edits, {len(records.seconds)} {stage.name}", flush=True)
    tried = tried_soundly([e for e in edits if e.function == "<module>"], records, jobs, try_anew)
    tests = Tests([e for e in edits if e.function != "<module>"], records, jobs)
    pytest.main([*stage.files, *FAST, "-s", *QUIET], plugins=[tests])
    tried += tests.tried
    print(f"{sum(bool(t.killer) for t in tried)} of {len(edits)} killed by the {stage.name}", flush=True)
    path.write_text(json.dumps([(edits.index(t.edit), t.killer, t.tests) for t in tried]))
    return int(len(tried) != len(edits))


def _report(tried: list[Tried], listed: list[dict[str, str]], count: int, seed: int) -> int:
    survivors = [t.edit for t in tried if not t.killer]
    reasons = {id(e): reason_of(e, listed) for e in survivors}
    unexplained = [e for e in survivors if reasons[id(e)] is None]
    killed = len(tried) - len(survivors)
    print(f"\nsample {count}, seed {seed}: {len(tried)} edits, {killed} killed ({killed / max(len(tried), 1):.1%})")
    for e in survivors:
        print(f"{e}\n    {'NOT EXPLAINED' if reasons[id(e)] is None else 'equivalent: ' + str(reasons[id(e)])}")
    return int(killed < WANTED * len(tried) or bool(unexplained))


if __name__ == "__main__":
    sys.exit(main())
