"""The layers and what each may touch, read from the syntax trees.

Each rule is a function from one parsed module to complaints, and each has a twin test that feeds
it a bad snippet: a rule that cannot fail is not a rule. What the rules are for is in
docs/architecture.md.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = {
    "swarmtrain_protocols": ROOT / "protocols" / "swarmtrain_protocols",
    "swarmtrain_peer": ROOT / "peer" / "swarmtrain_peer",
    "swarmtrain": ROOT / "swarmtrain",
}
LAYERS = list(PACKAGES)  # lowest first; a module may import its own layer and those below

# Modules of swarmtrain_protocols that may do arithmetic on arrays.
NUMPY_ALLOWED = re.compile(
    r"swarmtrain_protocols/(codecs/.*|testing/.*|state|overlap|outer|stageopt|rules|dataplane|order"
    r"|pipeline/(candidates|sampling))\.py$"
)
TORCH_ALLOWED = re.compile(r"^swarmtrain/training/")
CORE_FORBIDDEN = frozenset(
    "asyncio concurrent datetime multiprocessing os pathlib queue secrets select selectors signal "
    "socket ssl subprocess threading time torch uuid uvloop".split()
)
UNSAFE_MODULES = frozenset(
    "pickle cPickle _pickle marshal shelve dill cloudpickle joblib jsonpickle yaml copyreg runpy "
    "zipimport xmlrpc multiprocessing".split()
)
"""Whoever reads with them runs what was written, or they pickle what crosses a process."""
UNSAFE_CALLS = frozenset(
    "eval exec compile __import__ torch.load torch.jit.load torch.package.PackageImporter "
    "torch.hub.load pandas.read_pickle pd.read_pickle yaml.load yaml.unsafe_load yaml.full_load "
    "os.system os.popen subprocess.getoutput subprocess.getstatusoutput "
    "asyncio.create_subprocess_shell shutil.unpack_archive".split()
)
UNSAFE_METHODS = frozenset(["extractall", "read_pickle", "create_subprocess_shell"])
SWITCHES = {"allow_pickle": False, "shell": False, "trust_remote_code": False, "weights_only": True}
"""Keyword: the only value it may be given."""
# The only places that read a clock or entropy themselves; each line says why host.py will not do.
CLOCK_ALLOWED = {
    "swarmtrain_peer/host.py": "it is the reader of the machine",
    "swarmtrain_peer/keys.py": "private keys come straight from the operating system",
}

Rule = Callable[[str, ast.Module], Iterator[str]]


def modules() -> Iterator[tuple[str, ast.Module]]:
    """Every module of the three packages as (path from its source root, tree)."""
    for package in PACKAGES.values():
        for path in sorted(package.rglob("*.py")):
            yield path.relative_to(package.parent).as_posix(), ast.parse(path.read_bytes())


def imported(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of every absolute import, also those inside functions."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.lineno, node.module
            for alias in node.names:
                yield node.lineno, f"{node.module}.{alias.name}"


def dotted(node: ast.expr) -> str:
    """`a.b.c` of an attribute chain, or "" if it is anything else."""
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    if not isinstance(node, ast.Name):
        return ""
    return ".".join([node.id, *reversed(parts)])


def in_protocols(path: str) -> bool:
    return path.startswith("swarmtrain_protocols/")


# --- the rules ---------------------------------------------------------------------------------


def rule_imports_point_down(path: str, tree: ast.Module) -> Iterator[str]:
    own = LAYERS.index(path.split("/", 1)[0])
    for line, name in imported(tree):
        root = name.split(".", 1)[0]
        if root in LAYERS and LAYERS.index(root) > own:
            yield f"{path}:{line}: {name} is a layer above"
        if root in ("peer", "protocols", "tests", "benchmarks", "examples"):
            yield f"{path}:{line}: {root}/ is a folder, not an installed package"


def rule_cores_are_sans_io(path: str, tree: ast.Module) -> Iterator[str]:
    if not in_protocols(path):
        return
    for line, name in imported(tree):
        if name.split(".")[0] in CORE_FORBIDDEN:
            yield f"{path}:{line}: a core imports {name}"
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and dotted(node.func) in ("open", "print", "input"):
            yield f"{path}:{node.lineno}: a core calls {dotted(node.func)}()"


def rule_randomness_is_injected(path: str, tree: ast.Module) -> Iterator[str]:
    if not in_protocols(path):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module == "random":
            for alias in node.names:
                if alias.name != "Random":
                    yield f"{path}:{node.lineno}: from random import {alias.name}"
        elif isinstance(node, ast.Attribute):
            name = dotted(node)
            if name.startswith("random.") and name.split(".")[1] != "Random":
                yield f"{path}:{node.lineno}: {name} is the process-wide generator"
            if re.match(r"(np|numpy)\.random\.(?!Generator|PCG64|Philox|default_rng)", name):
                yield f"{path}:{node.lineno}: {name} is the process-wide generator"
        elif (
            isinstance(node, ast.Call)
            and not node.args
            and dotted(node.func) in ("random.Random", "Random", "np.random.default_rng")
        ):
            yield f"{path}:{node.lineno}: a generator without a seed cannot be replayed"


def rule_numpy_only_where_numbers_pass(path: str, tree: ast.Module) -> Iterator[str]:
    if not in_protocols(path) or NUMPY_ALLOWED.search(path):
        return
    for line, name in imported(tree):
        if name.split(".")[0] in ("numpy", "numba"):
            yield f"{path}:{line}: a core that imports {name} sees tensor values"


def rule_torch_only_in_training(path: str, tree: ast.Module) -> Iterator[str]:
    if TORCH_ALLOWED.search(path):
        return
    for line, name in imported(tree):
        if name.split(".")[0] in ("torch", "triton", "transformers", "lightning"):
            yield f"{path}:{line}: {name} outside swarmtrain/training"


def rule_nothing_received_is_executed(path: str, tree: ast.Module) -> Iterator[str]:
    for line, name in imported(tree):
        if name.split(".")[0] in UNSAFE_MODULES or name in UNSAFE_CALLS:
            yield f"{path}:{line}: imports {name}"
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name = dotted(node.func)
        method = node.func.attr if isinstance(node.func, ast.Attribute) else ""
        if name in UNSAFE_CALLS or method in UNSAFE_METHODS:
            yield f"{path}:{node.lineno}: calls {name or method}()"
        for keyword in node.keywords:
            if keyword.arg not in SWITCHES:
                continue
            value = keyword.value.value if isinstance(keyword.value, ast.Constant) else None
            if value is not SWITCHES[keyword.arg]:
                yield f"{path}:{node.lineno}: {name}({keyword.arg}=...)"


CLOCKS = re.compile(
    r"^(time\.\w+|os\.urandom|os\.getrandom|uuid\.uuid\d|secrets\.\w+|random\.SystemRandom"
    r"|(datetime\.)?(datetime|date)\.(now|utcnow|today))$"
)


def rule_clock_and_entropy_only_in_host(path: str, tree: ast.Module) -> Iterator[str]:
    if path in CLOCK_ALLOWED:
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and CLOCKS.match(dotted(node)):
            yield f"{path}:{node.lineno}: {dotted(node)}; ask swarmtrain_peer.host"
        if isinstance(node, ast.ImportFrom) and node.module in ("time", "secrets", "uuid"):
            yield f"{path}:{node.lineno}: from {node.module} import; ask swarmtrain_peer.host"


def _is_set(node: ast.expr, names: frozenset[str]) -> bool:
    if isinstance(node, (ast.Set, ast.SetComp)):
        return True
    if isinstance(node, ast.Call) and dotted(node.func) in ("set", "frozenset"):
        return True
    if isinstance(node, ast.Call) and dotted(node.func) in ("list", "tuple", "enumerate", "iter"):
        return any(_is_set(argument, names) for argument in node.args)
    if isinstance(node, ast.BinOp) and isinstance(
        node.op, (ast.BitOr, ast.BitAnd, ast.Sub, ast.BitXor)
    ):
        return _is_set(node.left, names) or _is_set(node.right, names)
    return dotted(node) in names


SET_TYPES = re.compile(r"^(set|frozenset|Set|AbstractSet|MutableSet)\b")


def _set_names(tree: ast.Module) -> frozenset[str]:
    """Names that this module annotates as sets, or assigns a set to and nothing else."""
    sets: list[str] = []
    others: list[str] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.AnnAssign):
            is_set = bool(SET_TYPES.match(ast.unparse(node.annotation)))
            (sets if is_set else others).append(dotted(node.target))
        elif isinstance(node, ast.arg) and node.annotation is not None:
            is_set = bool(SET_TYPES.match(ast.unparse(node.annotation)))
            (sets if is_set else others).append(node.arg)
        elif isinstance(node, ast.Assign):
            for target in node.targets:
                is_set = _is_set(node.value, frozenset())
                (sets if is_set else others).append(dotted(target))
    return frozenset(sets) - frozenset(others) - {""}


def rule_order_never_depends_on_hashing(path: str, tree: ast.Module) -> Iterator[str]:
    if not in_protocols(path):
        return
    names = _set_names(tree)
    for node in ast.walk(tree):
        loops: list[ast.expr] = []
        if isinstance(node, (ast.For, ast.AsyncFor)):
            loops = [node.iter]
        elif isinstance(node, (ast.ListComp, ast.GeneratorExp, ast.DictComp)):
            loops = [generator.iter for generator in node.generators]
        elif isinstance(node, ast.Call) and dotted(node.func) in ("list", "tuple", "next", "sum"):
            loops = list(node.args)
        elif isinstance(node, ast.Call) and dotted(node.func) == "hash":
            yield f"{path}:{node.lineno}: builtin hash() differs between processes"
        if any(_is_set(loop, names) for loop in loops) and not _order_free(tree, node):
            yield f"{path}:{node.lineno}: iterates over a set; sort it"


ORDER_FREE = frozenset(["sorted", "set", "frozenset", "any", "all", "min", "max", "len"])


def _order_free(tree: ast.Module, node: ast.AST) -> bool:
    """True if `node` is handed straight to a call whose result does not depend on order."""
    for parent in ast.walk(tree):
        if isinstance(parent, ast.Call) and node in parent.args:
            return dotted(parent.func) in ORDER_FREE
    return False


# --- each rule holds for the code, and each rule can fail ----------------------------------------

RULES: list[Rule] = [
    rule_imports_point_down,
    rule_cores_are_sans_io,
    rule_randomness_is_injected,
    rule_numpy_only_where_numbers_pass,
    rule_torch_only_in_training,
    rule_nothing_received_is_executed,
    rule_clock_and_entropy_only_in_host,
    rule_order_never_depends_on_hashing,
]
CORE = "swarmtrain_protocols/x.py"
SHELL = "swarmtrain_peer/x.py"
TOP = "swarmtrain/x.py"
BAD: list[tuple[Rule, str, str]] = [
    (rule_imports_point_down, CORE, "import swarmtrain_peer.host"),
    (rule_imports_point_down, CORE, "def f():\n    from swarmtrain import training"),
    (rule_imports_point_down, SHELL, "from swarmtrain.cli import main"),
    (rule_imports_point_down, SHELL, "import protocols.swarmtrain_protocols"),
    (rule_cores_are_sans_io, CORE, "import asyncio"),
    (rule_cores_are_sans_io, CORE, "import concurrent.futures"),
    (rule_cores_are_sans_io, CORE, "def f():\n    import time"),
    (rule_cores_are_sans_io, CORE, "from os import path"),
    (rule_cores_are_sans_io, CORE, "open('x')"),
    (rule_randomness_is_injected, CORE, "import random\nrandom.choice([1])"),
    (rule_randomness_is_injected, CORE, "from random import shuffle"),
    (rule_randomness_is_injected, CORE, "import random\nrandom.Random()"),
    (rule_randomness_is_injected, CORE, "import numpy as np\nnp.random.rand(3)"),
    (rule_numpy_only_where_numbers_pass, CORE, "import numpy as np"),
    (rule_numpy_only_where_numbers_pass, "swarmtrain_protocols/log/raft.py", "import numba"),
    (rule_torch_only_in_training, SHELL, "import torch"),
    (rule_torch_only_in_training, "swarmtrain/cli/main.py", "def f():\n    import torch.nn"),
    (rule_nothing_received_is_executed, TOP, "import pickle"),
    (rule_nothing_received_is_executed, TOP, "torch.load('x')"),
    (rule_nothing_received_is_executed, TOP, "from torch import load"),
    (rule_nothing_received_is_executed, TOP, "torch.load('x', weights_only=True)"),
    (rule_nothing_received_is_executed, SHELL, "def f():\n    import marshal"),
    (rule_nothing_received_is_executed, SHELL, "from multiprocessing import Queue"),
    (rule_nothing_received_is_executed, SHELL, "import yaml"),
    (rule_nothing_received_is_executed, SHELL, "y.load(x, weights_only=False)"),
    (rule_nothing_received_is_executed, SHELL, "os.system('x')"),
    (rule_nothing_received_is_executed, SHELL, "tarfile.open('x').extractall()"),
    (rule_nothing_received_is_executed, SHELL, "asyncio.create_subprocess_shell('x')"),
    (rule_nothing_received_is_executed, TOP, "AutoModel.from_pretrained(x, trust_remote_code=y)"),
    (rule_nothing_received_is_executed, TOP, "eval('1')"),
    (rule_nothing_received_is_executed, TOP, "exec('1')"),
    (rule_nothing_received_is_executed, TOP, "compile('1', 'x', 'eval')"),
    (rule_nothing_received_is_executed, TOP, "__import__(name)"),
    (rule_nothing_received_is_executed, TOP, "np.load('x', allow_pickle=True)"),
    (rule_nothing_received_is_executed, TOP, "subprocess.run('x', shell=True)"),
    (rule_clock_and_entropy_only_in_host, SHELL, "import time\ntime.monotonic()"),
    (rule_clock_and_entropy_only_in_host, SHELL, "from time import perf_counter"),
    (rule_clock_and_entropy_only_in_host, SHELL, "import os\nos.urandom(3)"),
    (rule_clock_and_entropy_only_in_host, TOP, "datetime.datetime.now()"),
    (rule_order_never_depends_on_hashing, CORE, "for x in {1, 2}: pass"),
    (rule_order_never_depends_on_hashing, CORE, "for x in set(y): pass"),
    (rule_order_never_depends_on_hashing, CORE, "z = [x for x in set(y) - w]"),
    (rule_order_never_depends_on_hashing, CORE, "z = list(set(y))"),
    (rule_order_never_depends_on_hashing, CORE, "s: set[int] = set()\nfor x in s: pass"),
    (
        rule_order_never_depends_on_hashing,
        CORE,
        "class C:\n    def f(self):\n        self.s = set()\n        for x in self.s: pass",
    ),
    (rule_order_never_depends_on_hashing, CORE, "hash('x')"),
]
GOOD: list[tuple[Rule, str, str]] = [
    (rule_imports_point_down, TOP, "import swarmtrain_peer, swarmtrain_protocols.core"),
    (rule_cores_are_sans_io, SHELL, "import asyncio, socket, time"),
    (rule_randomness_is_injected, CORE, "import random\ndef f(r: random.Random): r.random()"),
    (rule_randomness_is_injected, CORE, "from random import Random\nRandom(7)"),
    (rule_numpy_only_where_numbers_pass, "swarmtrain_protocols/codecs/a.py", "import numpy"),
    (rule_torch_only_in_training, "swarmtrain/training/hook.py", "import torch"),
    (rule_nothing_received_is_executed, TOP, "np.load('x', allow_pickle=False)"),
    (rule_nothing_received_is_executed, TOP, "re.compile('x')\nsubprocess.run(['x'], shell=False)"),
    (rule_nothing_received_is_executed, TOP, "safetensors.torch.load(data)"),
    (rule_clock_and_entropy_only_in_host, "swarmtrain_peer/host.py", "import time\ntime.time()"),
    (rule_order_never_depends_on_hashing, CORE, "for x in sorted({1, 2}): pass"),
    (rule_order_never_depends_on_hashing, CORE, "ok = any(x > 1 for x in {1, 2})"),
    (rule_order_never_depends_on_hashing, CORE, "ok = 1 in {1, 2}"),
]


def _ids(cases: list[tuple[Rule, str, str]]) -> list[str]:
    return [f"{rule.__name__}-{number}" for number, (rule, _, _) in enumerate(cases)]


def test_the_rules_look_at_all_of_the_code() -> None:
    """Or they would be kept by nothing at all."""
    looked = [path for path, _ in modules()]
    for module in ("swarmtrain_protocols.node", "swarmtrain_peer.driver", "swarmtrain.cli.main"):
        assert module.replace(".", "/") + ".py" in looked
    for package in PACKAGES:
        assert sum(path.startswith(package + "/") for path in looked) > 40, package


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_code_keeps_the_rule(rule: Rule) -> None:
    complaints = [complaint for path, tree in modules() for complaint in rule(path, tree)]
    assert not complaints, "\n".join(complaints)


@pytest.mark.parametrize(("rule", "path", "source"), BAD, ids=_ids(BAD))
def test_the_rule_rejects_a_bad_module(rule: Rule, path: str, source: str) -> None:
    assert list(rule(path, ast.parse(source)))


@pytest.mark.parametrize(("rule", "path", "source"), GOOD, ids=_ids(GOOD))
def test_the_rule_accepts_a_good_module(rule: Rule, path: str, source: str) -> None:
    assert not list(rule(path, ast.parse(source)))


def test_every_rule_is_shown_to_fail() -> None:
    assert {rule.__name__ for rule, _, _ in BAD} == {rule.__name__ for rule in RULES}
    defined = {name for name in globals() if name.startswith("rule_")}
    assert defined == {rule.__name__ for rule in RULES}


def test_every_allow_listed_file_exists() -> None:
    known = {path for path, _ in modules()}
    assert set(CLOCK_ALLOWED) <= known


def _loaded_by(statement: str) -> set[str]:
    """Top-level modules that a fresh interpreter holds after `statement`."""
    code = f"{statement}; import sys; print(*sorted({{n.split('.')[0] for n in sys.modules}}))"
    path = ":".join(str(ROOT / folder) for folder in (".", "peer", "protocols"))
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
        env={"PYTHONPATH": path, "PATH": ""},
    )
    return set(done.stdout.split())


def test_importing_swarmtrain_loads_no_torch() -> None:
    loaded = _loaded_by("import swarmtrain")
    assert "swarmtrain" in loaded
    assert "torch" not in loaded


def test_the_peer_and_the_command_line_load_no_torch() -> None:
    names = [
        path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        for path, _ in modules()
        if not TORCH_ALLOWED.search(path) and not path.endswith("__main__.py")
    ]
    loaded = _loaded_by("import " + ", ".join(names))
    assert {"swarmtrain_peer", "swarmtrain_protocols"} <= loaded
    assert "torch" not in loaded
