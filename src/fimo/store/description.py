"""A hash of everything that an object can bring into a result, the same in every process.

Values count by their bytes, containers by their contents, objects by their class and all of their attributes,
functions by their bytecode, closure, defaults and the globals that their code reads (``cfg.GAMMA`` too),
classes by their attributes and bases, modules of the user's own by their source and what they import.
Addresses, devices and line numbers do not count. Objects that occur again count as such: tied weights are not
equal weights.
"""

from __future__ import annotations

import builtins
import collections
import copyreg
import dis
import enum
import functools
import hashlib
import inspect
import logging
import os
import sys
import threading
import types
import weakref
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fimo.store.sources import origin, package_code, user_code, version

if TYPE_CHECKING:  # a sweep's jobs have a fingerprint before torch is imported
    from torch import Tensor


class Indescribable(Exception):  # noqa: N818, as no mistake of anybody's
    """Something that a result may depend on has no description; what depends on it must not be kept.

    Args:
        path: where it is, such as ``network.block.helper``.
        reason: why it can't be described.
    """

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(f"{path} {reason}")
        self.path, self.reason = path, reason


def describe(value: Any, name: str) -> str:
    """Return a hash of all that using an object can depend on.

    Args:
        name: of the object, for messages.

    Raises:
        Indescribable: naming the part.
    """
    walk = _Walk()
    try:
        walk.value(value, name)
        walk.refuse_hidden_reads()
    except Indescribable:
        raise
    except RecursionError:
        raise Indescribable(name, "is nested too deeply to be described") from None
    except Exception as error:  # of a property or a library's own: no reason for a run to end
        raise Indescribable(name, f"can't be described ({type(error).__name__}: {error})") from error
    return walk.digest.hexdigest()[:32]


def content_of(tensor: Tensor) -> memoryview:
    """Return the bytes of a strided tensor in the CPU's memory, in the order of its elements."""
    import torch

    # also a contiguous tensor can have any stride along an axis of length 1, as NumPy's columns have
    flat = tensor.contiguous().as_strided((tensor.numel(),), (1,))
    return flat.view(torch.uint8).numpy().data if len(flat) else memoryview(b"")


DESCRIPTORS = (
    types.WrapperDescriptorType, types.MethodDescriptorType, types.ClassMethodDescriptorType,
    types.GetSetDescriptorType, types.MemberDescriptorType,
)  # fmt: skip
CONSTANTS = (type(None), type(...), type(NotImplemented))
LOCKS = (type(threading.Lock()), type(threading.RLock()))
MODULE_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
MODULE_OTHER = {  # hooks of saving and loading, and flags by a hook's number, which counts a process's hooks
    *MODULE_HOOKS, "_parameters", "_buffers", "_modules", "_non_persistent_buffers_set",
    "_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks_with_kwargs",
    "_state_dict_hooks", "_state_dict_pre_hooks", "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks",
    "_trainer", "_fabric", "_fabric_optimizers", "_device", "_current_fx_name",  # of a LightningModule
}  # fmt: skip
CLASS_OTHER = {
    "__dict__", "__weakref__", "__doc__", "__module__", "__qualname__", "__annotations__", "__annotate__",
    "__annotate_func__", "__annotations_cache__", "__firstlineno__", "__static_attributes__", "_abc_impl",
    "__abstractmethods__", "__orig_bases__", "__parameters__", "__dataclass_fields__", "__dataclass_params__",
    "__match_args__", "__slots__", "__slotnames__", "__type_params__",
}  # fmt: skip


HIDDEN = {
    "builtins": ("open", "eval", "exec", "__import__"), "os": ("open", "listdir", "scandir", "stat"),
    "sys": ("modules",), "importlib": ("import_module", "reload"), "pickle": ("load",), "joblib": ("load",),
    "torch": ("load",), "torch.jit": ("load",),
    "numpy": ("load", "loadtxt", "genfromtxt", "fromfile", "memmap"),
    "pandas": ("read_csv", "read_table", "read_parquet", "read_feather", "read_json", "read_pickle"),
    "safetensors": ("safe_open",), "safetensors.torch": ("load_file",),
}  # fmt: skip
"""By module, what reads files, modules or names that a description doesn't hold."""

HIDDEN_ATTRIBUTES = frozenset({"open", "read_text", "read_bytes"})
"""The same as attributes, of paths above all."""

NOT_CALLED = frozenset({
    "__repr__", "__str__", "__del__", "__copy__", "__deepcopy__", "__reduce__", "__reduce_ex__",
    "__getstate__", "__setstate__", "__init_subclass__", "__class_getitem__", "__set_name__",
})  # fmt: skip
"""Methods with names of Python's own that no use of an object for a result calls."""


@dataclass(frozen=True)
class _Used:
    """A function of the user's own, as far as it matters whether it is called.

    Args:
        name: under which a class has it; None where it is used by itself.
        names: that its code reads.
        hidden: what it reads that is not described; None: nothing.
    """

    name: str | None
    names: frozenset[str]
    hidden: str | None
    path: str


class _Walk:
    """One pass over an object; the digest takes in what is met, in an order that no process decides."""

    def __init__(self) -> None:
        self.digest = hashlib.sha256()
        self.seen: dict[int, int] = {}
        self.alive: list[Any] = []  # an address must not be used again while it stands for an object
        self.sources: set[str] = set()
        self.members: dict[int, str] = {}  # names of classes' functions
        self.used: list[_Used] = []
        self.called = {"forward"}  # names of methods that may be

    def emit(self, *parts: str | bytes | int) -> None:
        for part in parts:
            data = part if isinstance(part, bytes) else str(part).encode("utf-8", "surrogatepass")
            self.digest.update(b"%d:" % len(data))
            self.digest.update(data)

    def refuse_hidden_reads(self) -> None:
        """Raise where a function that may be called reads what is in no description.

        A class has methods that no result depends on, such as one that loads its weights from a file: those
        count whose names are read by code that counts.
        """
        waiting = self.used
        while counting := [u for u in waiting if u.name is None or u.name in self.called]:
            for function in counting:
                if function.hidden is not None:
                    raise Indescribable(function.path, f"reads {function.hidden}, which may change unseen")
                self.called |= function.names
            waiting = [u for u in waiting if u not in counting]

    def value(self, value: Any, path: str) -> None:
        """Take in any object."""
        kind = type(value)
        if kind in CONSTANTS:
            self.emit("constant", repr(value))
        elif kind in (bool, int, str, bytes, float, complex):
            self._plain(value)
        elif kind is types.CodeType:
            self._code(value, path)
        elif isinstance(value, types.ModuleType):
            self._module(value, path)
        elif id(value) in self.seen:
            self.emit("again", self.seen[id(value)])
        else:
            if kind not in (tuple, frozenset):  # which Python may or may not share
                self.seen[id(value)] = len(self.seen)
            self.alive.append(value)
            self._object(value, kind, path)

    def _plain(self, value: Any) -> None:
        if isinstance(value, float):
            text: str | bytes = value.hex()
        elif isinstance(value, complex):
            text = f"{value.real.hex()} {value.imag.hex()}"
        elif isinstance(value, bytes):
            text = value
        else:
            text = hex(value) if isinstance(value, int) else value
        self.emit(type(value).__name__, text)

    def _object(self, value: Any, kind: type, path: str) -> None:
        if isinstance(value, type):
            self._class(value, path)
        elif kind in (list, tuple):
            self._sequence(value, path)
        elif kind in (set, frozenset):
            self._set(value, path)
        elif kind is dict or kind is types.MappingProxyType:
            self._mapping(value, path)
        elif isinstance(value, types.FunctionType):
            self._function(value, path)
        elif isinstance(value, types.MethodType):
            self.emit("method")
            self.called.add(value.__func__.__name__)
            self.value(value.__func__, path)
            self.value(value.__self__, f"{path}.__self__")
        elif isinstance(value, functools.partial):
            self.emit("partial")
            self.value(value.func, f"{path}.func")
            self._sequence(value.args, f"{path}.args")
            self._by_name(value.keywords, path)
            self._by_name(vars(value), path)
        elif isinstance(value, property):
            self.emit("property")
            for part in (value.fget, value.fset, value.fdel):
                self.value(part, path)
        elif isinstance(value, staticmethod | classmethod):
            self.emit(kind.__name__)
            self.value(value.__func__, path)
        elif isinstance(value, enum.Enum):
            self.emit("enum", value.name)
            self.value(kind, path)
            self.value(value.value, path)
        elif isinstance(value, logging.Logger) or kind in LOCKS:
            self.emit(kind.__name__)
        elif isinstance(value, weakref.ReferenceType):
            self.emit("reference")
            self.value(value(), path)
        elif isinstance(value, types.BuiltinFunctionType | types.MethodWrapperType):
            self._builtin(value, path)
        elif callable(value) and origin(_module_of(value)) == "installed" and _importable(value):
            self.emit("callable", _module_of(value), value.__qualname__)  # of a compiled module
            self._source(_module_of(value))
        elif isinstance(value, DESCRIPTORS):
            self.emit("descriptor", value.__qualname__)
        elif not self._of_a_library(value, kind, path):
            self._instance(value, kind, path)

    def _of_a_library(self, value: Any, kind: type, path: str) -> bool:
        """Take in a value of torch, NumPy or OmegaConf (where they are imported); False if it is none."""
        torch, numpy, omegaconf = map(sys.modules.get, ("torch", "numpy", "omegaconf"))
        if torch is not None:
            if isinstance(value, torch.Tensor):
                self._tensor(value, path)
                return True
            if isinstance(value, torch.nn.Module):
                self._network(value, path)
                return True
            if isinstance(value, torch.dtype | torch.layout | torch.memory_format):
                self.emit("torch", str(value))
                return True
            if isinstance(value, torch.device):
                self.emit("device")  # results do not depend on it
                return True
            if isinstance(value, torch.Generator):
                self.emit("generator")
                self._tensor(value.get_state(), path)
                return True
        if numpy is not None:
            if isinstance(value, numpy.ndarray | numpy.generic):
                self._array(value, path)
                return True
            if isinstance(value, numpy.dtype):
                self.emit("dtype", value.str)
                return True
            if isinstance(value, numpy.ufunc):
                self.emit("ufunc", value.__name__)
                return True
        if omegaconf is not None and isinstance(value, omegaconf.Container):
            self.emit("config")
            self.value(omegaconf.OmegaConf.to_container(value, resolve=True), path)
            return True
        return False

    def _sequence(self, values: Iterable[Any], path: str) -> None:
        entries = list(values)
        self.emit(type(values).__name__, len(entries))
        for k, entry in enumerate(entries):
            self.value(entry, f"{path}[{k}]")

    def _set(self, values: Iterable[Any], path: str) -> None:
        found = sorted(describe(entry, path) for entry in values)  # the order of a set is the process's
        self.emit("set", len(found), *found)

    def _mapping(self, values: Mapping[Any, Any], path: str) -> None:
        """Take in a mapping in its order, which a forward pass may follow."""
        self.emit("mapping", len(values))
        for key, entry in values.items():
            self.value(key, path)
            self.value(entry, f"{path}[{key!r}]" if isinstance(key, str | int) else path)

    def _by_name(self, values: Mapping[str, Any], path: str) -> None:
        """Take in attributes or keywords, whose order means nothing."""
        self.emit("named", len(values))
        for name in sorted(values, key=str):
            self.value(name, path)
            self.value(values[name], f"{path}.{name}")

    def _tensor(self, value: Any, path: str) -> None:
        import torch

        if value.is_meta or value.is_nested or torch.nn.parameter.is_lazy(value):
            raise Indescribable(path, "is a tensor without values of its own")
        self.emit(
            "tensor", type(value).__qualname__, str(value.dtype), str(value.layout), value.requires_grad
        )
        self._sequence(tuple(value.shape), path)
        plain = value.detach()
        if plain.layout != torch.strided:
            parts = plain.to_sparse_coo().coalesce()
            self._tensor(parts.indices(), path)
            plain = parts.values()
        if plain.is_quantized:
            raise Indescribable(path, "is a quantised tensor")
        self.digest.update(content_of(plain.cpu().resolve_conj().resolve_neg()))
        for name in ("_backward_hooks", "_post_accumulate_grad_hooks"):
            for hook in (getattr(value, name, None) or {}).values():
                self.value(hook, f"{path}.{name}")
        self._by_name(getattr(value, "__dict__", {}), path)

    def _array(self, value: Any, path: str) -> None:
        self.emit(type(value).__name__, value.dtype.str)
        self._sequence(value.shape, path)
        if value.dtype.hasobject:
            self.value(value.tolist(), path)
        else:
            self.emit(value.tobytes())

    def _network(self, module: Any, path: str) -> None:
        self.emit("network")
        self.value(type(module), path)
        state = dict(vars(module))
        for kind in ("_parameters", "_buffers", "_modules"):  # in their order, as sequences call them
            self.emit(kind, len(state[kind]))
            for name, entry in state[kind].items():
                self.emit(name, name in state["_non_persistent_buffers_set"])
                self.value(entry, f"{path}.{name}")
        for kind in MODULE_HOOKS:
            hooks = state.get(kind) or {}
            self.emit(kind, len(hooks))
            for number, hook in hooks.items():
                self.emit(number in state.get(f"{kind}_with_kwargs", {}))
                self.emit(number in state.get(f"{kind}_always_called", {}))
                self.value(hook, f"{path}.{kind}")
        self._by_name({k: v for k, v in state.items() if k not in MODULE_OTHER}, path)

    def _instance(self, value: Any, kind: type, path: str) -> None:
        """Take in an object of any class: its contents, and its attributes or what it calls its state."""
        self.emit("instance")
        self.value(kind, path)
        if isinstance(value, types.GeneratorType | types.CoroutineType | types.AsyncGeneratorType):
            raise Indescribable(path, "is a running function, which has no state that can be read")
        if kind is type(functools.cache(len)):
            self.value(value.__wrapped__, path)
            return
        if isinstance(value, list | tuple):
            self._sequence(tuple(value), path)
        elif isinstance(value, set | frozenset):
            self._set(value, path)
        elif isinstance(value, dict):
            self._mapping(dict(value), path)
            if isinstance(value, collections.defaultdict):
                self.value(value.default_factory, path)
        elif isinstance(value, int | float | complex | str | bytes):
            base: Any = next(b for b in kind.__mro__ if b in (int, float, complex, str, bytes))
            self._plain(base.__new__(base, value))
        elif origin(_module_of(kind)) == "installed" or not (hasattr(value, "__dict__") or _slots(kind)):
            self._reduced(value, kind, path)  # which says its state; its attributes may be caches
            return
        self._by_name(getattr(value, "__dict__", {}), path)
        self._by_name({s: getattr(value, s) for s in _slots(kind) if hasattr(value, s)}, path)

    def _reduced(self, value: Any, kind: type, path: str) -> None:
        """Take in what pickling would keep of an object of an installed package."""
        try:
            known = copyreg.dispatch_table.get(kind)
            state = known(value) if known else value.__reduce_ex__(4)
        except Exception as error:  # whatever a library raises
            raise Indescribable(path, f"is a {_name(kind)}, whose state can't be read ({error})") from None
        if isinstance(state, str):
            self.emit("named", state)
            return
        for part in state:
            self.value(list(part) if isinstance(part, Iterator) else part, path)

    def _builtin(self, value: Any, path: str) -> None:
        self.emit("builtin", value.__qualname__)
        bound = value.__self__
        if isinstance(bound, types.ModuleType):
            self.emit(bound.__name__)
            self._source(bound.__name__)
        else:
            self.value(bound, path)

    def _function(self, function: types.FunctionType, path: str) -> None:
        module = str(function.__globals__.get("__name__"))
        self.emit("function", _plain_module(module), function.__qualname__)
        self._source(module)
        if origin(module) != "installed":
            self._code(function.__code__, path)
            self.value(function.__defaults__, f"{path}.__defaults__")
            self._by_name(function.__kwdefaults__ or {}, path)
        for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
            try:
                contents = cell.cell_contents
            except ValueError:  # not assigned yet
                self.emit("empty")
                continue
            if isinstance(contents, types.FunctionType) and id(function) in self.members:  # that it decorates
                self.members.setdefault(id(contents), self.members[id(function)])
            self.value(contents, f"{path}.{name}")
        if origin(module) in ("main", "user"):
            code, names = function.__code__, frozenset(_all_names(function.__code__))
            hidden = _hidden(code, function.__globals__)
            self.used.append(_Used(self.members.get(id(function)), names, hidden, path))
            self._by_name(function.__dict__, path)
            texts = sorted({*_texts(code), *_texts_read(function)})
            for chain in sorted(set(_reads(function.__code__))):
                self._read(chain, function.__globals__, texts, path)
            imported = {
                chain
                for chain in _imports(function.__code__, function.__globals__)
                if origin(chain[0]) in ("main", "user")
            }
            for chain in sorted(imported):
                name, *rest = chain
                self.emit("imports", *chain)
                self._source(name)
                further = any(c != chain and c[: len(chain)] == chain for c in imported)
                if rest and not further and name in sys.modules:
                    self._follow(sys.modules[name], rest, f"{path}, which imports {name}")

    def _code(self, code: types.CodeType, path: str) -> None:
        self.emit("code", code.co_code, code.co_exceptiontable, code.co_flags, code.co_argcount)
        self.emit(code.co_posonlyargcount, code.co_kwonlyargcount)
        for names in (code.co_names, code.co_varnames, code.co_freevars, code.co_cellvars):
            self.emit(len(names), *names)
        self._sequence(code.co_consts, path)

    def _read(
        self, chain: tuple[str, ...], names: Mapping[str, Any], texts: Iterable[str], path: str
    ) -> None:
        """Take in what a function's code reads: a global, or an attribute of a module that is one.

        Args:
            texts: in the code or read by it, which say what of the environment, or by ``globals()``, is read.
        """
        name, *rest = chain
        self.emit("reads", *chain)
        if name not in names:
            self.emit("builtin" if hasattr(builtins, name) else "undefined")
            if name == "globals":
                self._by_name({t: names[t] for t in texts if t in names}, path)
            return
        value, path = names[name], f"{path}, which reads {name}"
        read = getattr(value, rest[0], None) if value is os and rest else value
        if read is os.environ or read is os.getenv:
            self._by_name({t: os.environ.get(t) for t in texts}, path)
            return
        self._follow(value, rest, path)

    def _follow(self, value: Any, rest: list[str], path: str) -> None:
        """Take in an attribute of an attribute … of a module, or the value itself, if it is none."""
        while rest and isinstance(value, types.ModuleType):
            if origin(value.__name__) == "installed":
                break
            self._source(value.__name__)
            path = f"{path}.{rest[0]}"
            if not hasattr(value, rest[0]):
                self.emit("undefined")
                return
            value = getattr(value, rest.pop(0))
        self.value(value, path)

    def _class(self, kind: type, path: str) -> None:
        module = _module_of(kind)
        self.emit("class", _plain_module(module), kind.__qualname__)
        self._source(module)
        whose = origin(module)
        made = whose == "installed" and not _importable(kind)  # at run time, such as a parametrised layer
        for base in kind.__mro__[1:]:
            if made or whose in ("main", "user") or origin(_module_of(base)) != "installed":
                self.value(base, path)
        if whose in ("main", "user") or made:
            if origin(_module_of(type(kind))) != "installed":
                self.value(type(kind), path)
            members = {k: v for k, v in vars(kind).items() if k not in CLASS_OTHER}
            if issubclass(kind, enum.Enum):  # whose other members are its values, by several ways
                members = {k: v for k, v in members.items() if not k.startswith("_")}
            self._note_members(kind, members)
            self._by_name(members, path)

    def _note_members(self, kind: type, members: Mapping[str, Any]) -> None:
        """Note the functions of a class with the names by which they are called."""
        bases = [b for b in kind.__mro__[1:] if origin(_module_of(b)) == "package"]
        for name, member in members.items():
            if name in ("__init__", "__new__", "__post_init__"):
                called = kind.__name__
            else:
                called = name
                by_python = name.startswith("__") and name.endswith("__") and name not in NOT_CALLED
                if by_python or any(name in vars(base) for base in bases):
                    self.called.add(name)
            for function in _functions_of(member):
                self.members.setdefault(id(function), called)

    def _module(self, module: types.ModuleType, path: str) -> None:
        """Take in a module that is handed on as a whole: its source, and the values in it."""
        self.emit("module", _plain_module(module.__name__))
        self._source(module.__name__)
        if origin(module.__name__) in ("main", "user") and id(module) not in self.seen:
            self.seen[id(module)] = len(self.seen)
            values = {k: v for k, v in vars(module).items() if not k.startswith("__")}
            self._by_name(
                {k: v for k, v in values.items() if not isinstance(v, types.ModuleType)},
                path,
            )

    def _source(self, module: str) -> None:
        """Take in the source of a module and what it imports; the version of an installed one."""
        if module in self.sources:
            return
        self.sources.add(module)
        whose = origin(module)
        if whose == "package":
            self.emit("source", package_code(module))
        elif whose == "user":
            self.emit("source", user_code(module))
        elif whose == "installed" and module.partition(".")[0] not in sys.stdlib_module_names:
            self.emit("version", version(module))


def _plain_module(name: str) -> str:
    return "__main__" if name == "__mp_main__" else name


def _name(kind: type) -> str:
    module = _module_of(kind)
    return kind.__qualname__ if module == "builtins" else f"{module}.{kind.__qualname__}"


def _slots(kind: type) -> list[str]:
    """Return the names of all slots of a class, sorted."""
    found: set[str] = set()
    for base in kind.__mro__:
        slots = vars(base).get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            private = name.startswith("__") and not name.endswith("__")
            found.add(f"_{base.__name__.lstrip('_')}{name}" if private else name)
    return sorted(found - {"__dict__", "__weakref__"})


def _module_of(thing: Any) -> str:
    """Return the module in which a class or function was defined."""
    name = getattr(thing, "__module__", None)
    return name if isinstance(name, str) else "builtins"  # compiled classes may hold a descriptor there


def _importable(thing: Any) -> bool:
    """Return whether a class or function is what its module holds under its name, not made at run time."""
    found: Any = sys.modules.get(_module_of(thing))
    for name in getattr(thing, "__qualname__", "?").split("."):
        found = getattr(found, name, None)
    return found is thing


def _texts(code: types.CodeType) -> Iterator[str]:
    """Yield the texts in code."""
    for constant in code.co_consts:
        if isinstance(constant, str):
            yield constant
        elif isinstance(constant, types.CodeType):
            yield from _texts(constant)


def _texts_read(function: types.FunctionType) -> Iterator[str]:
    """Yield the texts that a function's code reads: of globals, attributes of these, closure and defaults."""
    for name, *rest in _reads(function.__code__):
        value = function.__globals__.get(name)
        for attribute in rest:
            value = inspect.getattr_static(value, attribute, None)
        yield from [value] if isinstance(value, str) else []
    cells = [c.cell_contents for c in function.__closure__ or () if c != types.CellType()]
    defaults = [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]
    yield from (value for value in (*cells, *defaults) if isinstance(value, str))


def _all_names(code: types.CodeType) -> Iterator[str]:
    """Yield the names of globals and attributes in code."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _all_names(constant)


def _functions_of(member: Any) -> Iterator[types.FunctionType]:
    """Yield the functions that a class's member is made of."""
    for part in (member, *(getattr(member, name, None) for name in ("__func__", "fget", "fset", "func"))):
        if isinstance(part, types.FunctionType):
            yield part


def _hidden(code: types.CodeType, names: Mapping[str, Any]) -> str | None:
    """Return what code reads of :data:`HIDDEN`; None: nothing.

    Args:
        names: the globals of the function.
    """
    if attributes := sorted(HIDDEN_ATTRIBUTES & set(_attributes(code))):
        return f"files ({attributes[0]})"
    loaded = {module: vars(sys.modules[module]) for module in HIDDEN if module in sys.modules}
    hidden = {
        id(loaded[module][name]): f"{module}.{name}".removeprefix("builtins.")
        for module in loaded
        for name in HIDDEN[module]
        if name in loaded[module]
    }
    chains = [
        *((names.get(name, vars(builtins).get(name)), rest) for name, *rest in _reads(code)),
        *((sys.modules.get(name), rest) for name, *rest in _imports(code, names)),
    ]
    for value, rest in chains:
        for attribute in (*rest, ""):
            if id(value) in hidden:
                return hidden[id(value)]
            if not isinstance(value, types.ModuleType):
                break
            value = getattr(value, attribute, None)
    return None


def _attributes(code: types.CodeType) -> Iterator[str]:
    """Yield the names of attributes in code."""
    for step in dis.get_instructions(code):
        if step.opname in ("LOAD_ATTR", "LOAD_METHOD"):
            yield step.argval
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _attributes(constant)


Chain = tuple[str, ...]


def _imports(
    code: types.CodeType, names: Mapping[str, Any], bound: Mapping[str, Chain] = types.MappingProxyType({})
) -> Iterator[Chain]:
    """Yield the modules that code imports when it runs, each with the attributes that it takes of it.

    Args:
        names: the globals of the function.
        bound: what the code around it has imported, by the names that it gave it.
    """
    bound = dict(bound)
    chain: Chain = ()
    pending: Chain = ()  # what an import statement is about to give a name
    steps = list(dis.get_instructions(code))
    for k, step in enumerate(steps):
        if chain and step.opname in ("LOAD_ATTR", "LOAD_METHOD"):
            chain = (*chain, step.argval)
            continue
        if chain:
            yield chain
        chain = ()
        if step.opname == "IMPORT_NAME":
            level = next((s.argval for s in steps[max(0, k - 2) : k] if isinstance(s.argval, int)), 0)
            above = str(names.get("__package__") or "").rsplit(".", level - 1)[0] if level else ""
            module = ".".join(part for part in (above, step.argval) if part)
            of_it = steps[k - 1].argval is not None  # from … import …
            pending = (module,) if of_it else (module.partition(".")[0],)
            yield (module,)
        elif pending and step.opname == "IMPORT_FROM":
            pending = (module, step.argval) if of_it else (*pending, step.argval)  # import a.b as c
            yield pending
        elif pending and step.opname.startswith("STORE_"):
            bound[_names(step)[0]] = pending
        elif step.opname not in ("POP_TOP", "SWAP"):
            pending = ()
        if "LOAD_" in step.opname:
            chain = bound.get(_names(step)[-1], ())
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _imports(constant, names, bound)


def _names(step: dis.Instruction) -> tuple[Any, ...]:
    """Return what a step loads or stores: of Python 3.13's steps for two at a time, both."""
    return step.argval if isinstance(step.argval, tuple) else (step.argval,)


def _reads(code: types.CodeType) -> Iterator[tuple[str, ...]]:
    """Yield the globals that code reads, each with the attributes that are taken of it in turn."""
    chain: list[str] = []
    for step in dis.get_instructions(code):
        if chain and step.opname in ("LOAD_ATTR", "LOAD_METHOD"):
            chain.append(step.argval)
            continue
        if chain:
            yield tuple(chain)
            chain = []
        if step.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
            chain = [step.argval]
    if chain:
        yield tuple(chain)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _reads(constant)
