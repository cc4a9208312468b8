"""Mutation testing: which of the edits of :mod:`tests.mutants.edits` do the fast tests notice?

    python -m tests.mutants.run --sample 300 --seed 0

First the fast suite runs once and records which test executes which statement. Then each edit gets a process of its
own, forked from one that has imported PyTorch already, in which quantpass is imported with the edited file and the
tests that execute the edited statement run, the unit tests first, until one fails. A test that fails by itself
without any edit kills nothing.

Exit status 1 unless at least 95 % are killed and every survivor is listed in ``equivalent.toml`` with the reason why no
test can tell it from the original.
"""

from __future__ import annotations

import argparse
import faulthandler
import hashlib
import importlib
import importlib.machinery
import json
import os
import signal
import sys
import time
import tomllib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import coverage
import pytest

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
            return not file.startswith("tests/unit/"), by_file[file], file, self.seconds[test]

        return sorted(tests, key=order)


def state_of_the_tree() -> str:
    """A fingerprint of the product and its tests."""
    digest = hashlib.sha256()
    for folder in ("quantpass", "patterns", "lowering", "tests"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()


def recorded(*, stale: bool) -> Records:
    """What the tests execute, recorded anew where the tree changed since; ``stale`` makes do with what is there."""
    path = CACHE / "records.json"
    stored = json.loads(path.read_text()) if path.is_file() else None
    if stored is None or (stored["state"] != state_of_the_tree() and not stale):
        CACHE.mkdir(parents=True, exist_ok=True)
        print("recording which test executes what ...", flush=True)
        Forked(_record, (str(path), ["tests"], ["-m", "not slow"]), seconds=3600).result()
        stored = json.loads(path.read_text())
    elif stored["state"] != state_of_the_tree():
        # The unit tests change most and take no time.
        print("recording the unit tests anew ...", flush=True)
        units = CACHE / "units.json"
        Forked(_record, (str(units), ["tests/unit"], []), seconds=3600).result()
        stored = _without_units(stored, json.loads(units.read_text()))
    return Records(stored["seconds"], stored["touched"])


def _without_units(stored: Any, units: Any) -> Any:
    """``stored`` with what it says of the unit tests replaced by ``units``."""
    seconds = {t: s for t, s in stored["seconds"].items() if not t.startswith("tests/unit/")} | units["seconds"]
    for file, functions in units["touched"].items():
        for function, lines in functions.items():
            into = stored["touched"].setdefault(file, {}).setdefault(function, {})
            for line, tests in lines.items():
                into[line] = sorted({*into.get(line, ()), *tests})
    return {"seconds": seconds, "touched": stored["touched"]}


def _record(path: str, where: list[str], options: list[str]) -> int:
    cov = coverage.Coverage(data_file=None, config_file=False, include=[str(ROOT / f) for f in FILES])
    recorder = Recorder(cov)
    state = state_of_the_tree()
    cov.start()
    pytest.main([*where, *options, *QUIET], plugins=[recorder])
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
    Path(path).write_text(json.dumps({"state": state, "seconds": seconds, "touched": touched}))
    return 0


# -- processes ---------------------------------------------------------------------------------------------------------

QUIET = ("-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-p", "no:faulthandler", "--tb=line")


class Forked:
    """A function run in a process of its own; its result is an exit status, -1 where it took too long."""

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
            status = 70
            try:
                status = function(*arguments)
            except BaseException as error:
                print(f"{type(error).__name__}: {error}")
            finally:
                sys.stdout.flush()
                os._exit(status)

    def poll(self) -> int | None:
        if self._status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self._status = os.waitstatus_to_exitcode(status)
            elif time.monotonic() > self._until:
                self._status = -1
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


class Selected:
    """A pytest plugin: runs the given tests in the given order, stops a hung one, writes down the first failure."""

    def __init__(self, tests: Sequence[str], seconds: dict[str, float], killer: str) -> None:
        self._order = {t: i for i, t in enumerate(tests)}
        self._seconds = seconds
        self._killer = killer

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items[:] = sorted((i for i in items if i.nodeid in self._order), key=lambda i: self._order[i.nodeid])

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Any:
        # Without an end in sight the process ends, with status 1.
        Path(self._killer).write_text(f"{item.nodeid} (hung)")
        seconds = max(LEAST_SECONDS, 20 * self._seconds.get(item.nodeid, 0.0))
        faulthandler.dump_traceback_later(seconds, exit=True, file=sys.__stderr__)
        try:
            return (yield)
        finally:
            faulthandler.cancel_dump_traceback_later()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            Path(self._killer).write_text(report.nodeid)

    def pytest_sessionfinish(self, exitstatus: int) -> None:
        if exitstatus == 0:
            Path(self._killer).unlink(missing_ok=True)


def _try(edit: Edit | None, tests: list[str], seconds: dict[str, float], killer: str) -> int:
    if edit is not None:
        load_edited(edit.file, edit.source)
    # The unit tests by themselves first: that spares most edits the collection of all the others.
    units = [t for t in tests if t.startswith("tests/unit/")]
    for part in (units, [t for t in tests if not t.startswith("tests/unit/")]):
        if part:
            files = list(dict.fromkeys(t.split("::")[0] for t in part))
            Path(killer).write_text("while it was collected")
            status = pytest.main([*files, "-x", *QUIET], plugins=[Selected(part, seconds, killer)])
            if status != 0:
                return int(status)
    return 0


# -- the run -----------------------------------------------------------------------------------------------------------


@dataclass
class Tried:
    """An edit and what became of it; ``killer`` is the test that noticed it, empty where none did."""

    edit: Edit
    killer: str
    tests: int


def run_all(edits: list[Edit], records: Records, jobs: int, broken: set[str]) -> Iterator[Tried]:
    """Try every edit, ``jobs`` at a time; ``broken`` tests are left out."""
    todo = list(enumerate(edits))[::-1]
    running: dict[int, tuple[Forked, Edit, int]] = {}
    while todo or running:
        while todo and len(running) < jobs:
            i, edit = todo.pop()
            tests = [t for t in records.covering(edit) if t not in broken]
            budget = LEAST_SECONDS + 10 * sum(records.seconds[t] for t in tests)
            killer, log = (str(CACHE / f"{i}.{kind}") for kind in ("killer", "log"))
            Path(killer).unlink(missing_ok=True)
            running[i] = Forked(_try, (edit, tests, records.seconds, killer), budget, log), edit, len(tests)
        for i, (process, edit, tests) in list(running.items()):
            status = process.poll()
            if status is not None:
                del running[i]
                yield Tried(edit, _killer(i) if status != 0 else "", tests)
        time.sleep(0.02)


def _killer(i: int) -> str:
    path = CACHE / f"{i}.killer"
    return path.read_text() if path.is_file() else "the import"


def sound(killers: set[str], records: Records) -> set[str]:
    """Those of ``killers`` that fail by themselves without any edit, and so prove nothing."""
    tests = sorted(killers & records.seconds.keys())
    broken = set()
    for test in tests:
        log = str(CACHE / "sound.log")
        if Forked(_try, (None, [test], records.seconds, str(CACHE / "sound.killer")), 600, log).result() != 0:
            broken.add(test)
    return broken


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
    parser.add_argument("--again", action="store_true", help="only the edits that survived the last time")
    given = parser.parse_args()
    os.chdir(ROOT)
    preload()
    records = recorded(stale=given.stale)
    drawn = sample(given.sample, given.seed, tuple(given.files))
    last = CACHE / "survivors.json"
    if given.again:
        survived = {tuple(key) for key in json.loads(last.read_text())}
        drawn = [e for e in drawn if (e.file, e.operator, e.before, e.after) in survived]
    listed = tomllib.loads(EQUIVALENT.read_text())["edit"] if EQUIVALENT.is_file() else []
    tried = _run(drawn, records, given.jobs)
    survivors = [t.edit for t in tried if not t.killer]
    last.write_text(json.dumps([(e.file, e.operator, e.before, e.after) for e in survivors]))
    return _report(tried, listed, given.sample, given.seed)


def _run(drawn: list[Edit], records: Records, jobs: int) -> list[Tried]:
    print(f"{len(drawn)} edits, {len(records.seconds)} tests", flush=True)
    tried: list[Tried] = []
    broken: set[str] = set()
    todo = drawn
    while todo:
        now = []
        for t in run_all(todo, records, jobs, broken):
            now.append(t)
            if not t.killer:
                print(f"survived ({t.tests} tests)  {t.edit}", flush=True)
        # Kills by tests that fail anyway are no kills: those edits are tried again without them.
        killers = {t.killer.removesuffix(" (hung)") for t in now}
        new = sound(killers, records) - broken
        tried.extend(t for t in now if t.killer.removesuffix(" (hung)") not in new)
        todo = [t.edit for t in now if t.killer.removesuffix(" (hung)") in new]
        broken |= new
    return tried


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
