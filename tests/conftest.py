"""What every test shares: paths of the data, and a machine that stays offline and lightly loaded."""

from __future__ import annotations

import functools
import gc
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from types import FunctionType
from typing import Any, get_args

# Set before torch or tokenizers are imported: one thread each, because tests start further processes.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # otherwise two processes that import torch, each time
# Otherwise each process that a test starts would compile our modules anew.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

import jaxtyping
import jaxtyping._decorator as jaxtyping_decorator
import jaxtyping._import_hook as jaxtyping_hook
import pytest
from beartype import BeartypeConf, beartype

pytest_plugins = ["tokenizer_fixtures"]

REPO_ROOT = Path(__file__).resolve().parent.parent
PACKAGE = str(REPO_ROOT / "composer_path")


def keep_bytecode_of_other_packages() -> None:
    """Let jaxtyping's hook mark the bytecode of our modules only.

    While one of them is imported it asks for marked bytecode of all that is imported within, torch and Composer among
    them, and compiles four thousand files anew: 15 s of CPU at the start of every run.
    """
    marked, plain = jaxtyping_hook._optimized_cache_from_source, jaxtyping_hook.cache_from_source

    def cache_from_source(
        typechecker_hash: str, /, path: str, debug_override: bool | None = None, **kwargs: str
    ) -> str:
        if os.fspath(path).startswith(PACKAGE):
            return marked(typechecker_hash, path, debug_override)
        return plain(path, debug_override, **kwargs)

    jaxtyping_hook._optimized_cache_from_source = cache_from_source


def check_plain_types_by_beartype_alone() -> None:
    """Let jaxtyping check only signatures with shapes; types without any are left to the checker that it calls.

    jaxtyping binds the arguments of every call and checks them twice, which is most of what a test of plain Python
    costs; the checker alone takes a twentieth of that and finds the same.
    """
    with_shapes = jaxtyping_decorator.jaxtyped
    checked = beartype(conf=BeartypeConf(violation_type=jaxtyping.TypeCheckError))

    def has_shapes(annotation: Any) -> bool:
        if isinstance(annotation, type) and issubclass(annotation, jaxtyping.AbstractArray):
            return True
        return any(
            has_shapes(part) for part in [*get_args(annotation), *(annotation if type(annotation) is list else [])]
        )

    def jaxtyped(function: Any = None, *, typechecker: Any) -> Any:
        if function is None:
            return functools.partial(jaxtyped, typechecker=typechecker)
        if not isinstance(function, FunctionType):
            return with_shapes(function, typechecker=typechecker)
        read = jaxtyping_decorator._destring_annotation
        types = {name: read(one, function.__globals__) for name, one in function.__annotations__.items()}
        if any(map(has_shapes, types.values())):
            return with_shapes(function, typechecker=typechecker)
        copy = FunctionType(
            function.__code__, function.__globals__, function.__name__, function.__defaults__, function.__closure__
        )
        functools.update_wrapper(copy, function)
        copy.__kwdefaults__, copy.__annotations__ = function.__kwdefaults__, types
        del copy.__wrapped__
        plain = checked(copy)

        @functools.wraps(function)
        def call(*arguments: Any, **keywords: Any) -> Any:
            return (function if jaxtyping.config.jaxtyping_disable else plain)(*arguments, **keywords)

        return call

    jaxtyping.jaxtyped = jaxtyping_decorator.jaxtyped = jaxtyped


gc.set_threshold(20_000, 20, 20)  # there are a million objects of libraries to look through each time
keep_bytecode_of_other_packages()
check_plain_types_by_beartype_alone()


@pytest.fixture(scope="session")
def repo_root() -> Path:
    """The folder that holds train.py, yamls/ and test_data/."""
    return REPO_ROOT


@pytest.fixture(scope="session")
def golden() -> Path:
    """What the reference system computed: tokens, images and a tiny model."""
    return REPO_ROOT / "tests" / "golden"


@pytest.fixture(scope="session")
def llama2_tokenizer_path() -> Path:
    """A folder with the LLaMA-2 vocabulary, which may not be committed here."""
    path = os.environ.get("COMPOSER_PATH_LLAMA2_TOKENIZER")
    if not path:
        pytest.skip("set COMPOSER_PATH_LLAMA2_TOKENIZER to a folder with LLaMA-2's tokenizer.model")
    return Path(path)


@pytest.fixture(scope="session")
def tiny_llama_tokenizer_path(golden: Path) -> Path:
    """800 pieces trained on test_data's own text with LLaMA-2's settings; `make.py` beside it wrote it."""
    return golden / "tiny_llama"


@pytest.fixture(scope="session")
def llama_tokenizer_path(request: pytest.FixtureRequest) -> Path:
    """LLaMA-2's vocabulary where there is one, otherwise the small one with its settings."""
    has_llama2 = os.environ.get("COMPOSER_PATH_LLAMA2_TOKENIZER")
    return request.getfixturevalue("llama2_tokenizer_path" if has_llama2 else "tiny_llama_tokenizer_path")


@pytest.fixture(scope="session")
def mistral_tokenizer_path() -> Path:
    """The Apache-2.0 vocabulary of the demo, a sentencepiece model of 32,000 pieces."""
    return REPO_ROOT / "test_data" / "tokenizer"


@pytest.fixture(autouse=True)
def signals_as_found() -> Iterator[None]:
    """A test that left SIGTERM ignored would let a later one wait for its children for ever."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    if signal.getsignal(signal.SIGTERM) == signal.SIG_IGN:
        signal.signal(signal.SIGTERM, before)


@pytest.fixture
def without_type_checks() -> Iterator[None]:
    """A user's Python, in which a word that no `Literal` allows reaches our own check of it."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def pytest_collection_finish() -> None:
    """What was imported until now stays: no later collection of garbage, of which tests ask for many, looks at it."""
    gc.collect()
    gc.freeze()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs a GPU where there is none; torch is imported only if such a test was collected."""
    gpu_items = [item for item in items if item.get_closest_marker("gpu")]
    if not gpu_items:
        return
    import torch

    if not torch.cuda.is_available():
        for item in gpu_items:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
