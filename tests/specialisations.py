"""What Triton would compile on a GPU, seen from launches under its interpreter."""

import inspect
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from triton.backends.compiler import BaseBackend
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import native_specialize_impl

Specialisation = tuple[str, ...]  # a kernel and what of its arguments it is compiled for


def specialisation(function: InterpretedFunction, args: tuple, kwargs: dict) -> Specialisation:
    """Of a launch, as Triton reckons it: types of arguments, and whether they are 1 or multiples of 16."""
    parameters = inspect.signature(function.fn).parameters
    bound = dict(zip(parameters, args))
    fixed = set(function.kwargs["do_not_specialize"] or ())
    unaligned = fixed | set(function.kwargs["do_not_specialize_on_alignment"] or ())
    found = [function.fn.__name__]
    for name, value in {**bound, **kwargs}.items():
        if value is None or name not in parameters or parameters[name].annotation is not inspect.Parameter.empty:
            found.append(f"{name}={value}")
        else:
            found.append(
                f"{name}:{native_specialize_impl(BaseBackend, value, False, name not in fixed, name not in unaligned)}"
            )
    return tuple(found)


@contextmanager
def recorded(of_module: str = "vllm_qfilters.") -> Iterator[set[Specialisation]]:
    """A set that gets those of all launches of kernels of a package, while the block runs."""
    found: set[Specialisation] = set()

    def see(function: InterpretedFunction, args: tuple, kwargs: dict) -> None:
        if function.fn.__module__.startswith(of_module):
            found.add(specialisation(function, args, kwargs))

    with _seen_by(see):
        yield found


@contextmanager
def counted() -> Iterator[Counter[str]]:
    """Counts the launches of all kernels, by module and name, while the block runs."""
    counts: Counter[str] = Counter()
    with _seen_by(lambda function, *_: counts.update([f"{function.fn.__module__}.{function.fn.__name__}"])):
        yield counts


@contextmanager
def _seen_by(see: Callable[[InterpretedFunction, tuple, dict], None]) -> Iterator[None]:
    run = InterpretedFunction.run

    def seeing(self, *args, grid, warmup, **kwargs):
        see(self, args, kwargs)
        return run(self, *args, grid=grid, warmup=warmup, **kwargs)

    InterpretedFunction.run = seeing
    try:
        yield
    finally:
        InterpretedFunction.run = run
