"""The lists of `benchmarks/mutation.py`: files that exist, and faults whose text is in the code."""

import ast
import re
from pathlib import Path

from benchmarks import mutation
from benchmarks.realistic_faults import FAULTS

ROOT = Path(__file__).parents[1]


def test_every_module_and_its_tests_exist() -> None:
    files = [name for module, tests in mutation.MODULES.values() for name in (module, *tests.split())]
    assert [name for name in files if not (ROOT / name).is_file()] == []


def test_every_skipped_test_exists() -> None:
    """Its pattern is part of the name of one test in the files of the groups, and of no other."""
    files = {name for _, tests in mutation.MODULES.values() for name in tests.split()}
    names = re.findall(r"def (test_\w+)", "".join((ROOT / name).read_text() for name in sorted(files)))
    for pattern in mutation.SKIPPED_TESTS:
        assert len([name for name in names if pattern.split()[0] in name]) == 1, pattern


def test_every_realistic_fault_can_be_planted() -> None:
    """Its old text occurs once in a module of a group, and the new text gives another program."""
    modules = {path for path, _ in mutation.MODULES.values()}
    for fault in FAULTS:
        assert fault.path in modules, fault.path
        source = (ROOT / fault.path).read_text()
        assert source.count(fault.old) == 1, fault.breaks
        changed = source.replace(fault.old, fault.new)
        if fault.path.endswith(".py"):
            assert ast.dump(ast.parse(changed)) != ast.dump(ast.parse(source)), fault.breaks
