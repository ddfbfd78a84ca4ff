"""Which methods there are: their files of settings, by name."""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import importlib.util
import inspect
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf

from fimo.errors import InputError, nearest, reason
from fimo.validation.annotations import described, fits

if TYPE_CHECKING:
    import pandas as pd

    from fimo.methods.base import AttributionMethod

    Method = str | AttributionMethod | type[AttributionMethod]

PLUGINS = "fimo.conf"
"""Entry points of packages that add methods, data sets, networks, presets and so on."""

OTHERS = "fimo.methods.others."
"""Where other libraries' implementations are."""


def packaged_conf() -> Path:
    """Return the folder of configuration groups: an installed wheel's, else the repository's."""
    packaged = Path(__file__).parents[1] / "conf"
    return packaged if packaged.is_dir() else Path(__file__).parents[3] / "conf"


def plugin_folders() -> dict[str, Path]:
    """Return the folders of configuration groups that installed packages add, by the entry point's name.

    A package names the module of its folder, which holds ``method/NAME.yaml``, ``dataset/NAME.yaml`` and so
    on, under the entry points of ``fimo.conf``. It is not imported.

    Raises:
        InputError: no such folder.
    """
    found = {}
    for point in importlib.metadata.entry_points(group=PLUGINS):
        package, *inside = point.module.split(".")
        spec = importlib.util.find_spec(package)
        places = [] if spec is None else list(spec.submodule_search_locations or [])
        folders = [folder for place in places if (folder := Path(place, *inside)).is_dir()]
        if not folders:
            raise InputError(f"{PLUGINS}.{point.name}", f"{point.value} is no folder of an installed package")
        found[point.name] = folders[0]
    return found


def all_methods(files: Iterable[Path]) -> DictConfig:
    """Return the settings of every method that has a file, by name."""
    merged = OmegaConf.merge({}, *map(OmegaConf.load, files))
    assert isinstance(merged, DictConfig)
    return merged


def own_methods(methods: DictConfig) -> DictConfig:
    """Return the settings of methods but other libraries' implementations, which run when they are named."""
    chosen = {name: one for name, one in methods.items() if not str(one._target_).startswith(OTHERS)}
    return OmegaConf.create(chosen)


def method_files(folders: Iterable[Path]) -> dict[str, Path]:
    """Return the methods' files by name; of equal names, the first folder's."""
    found: dict[str, Path] = {}
    for folder in folders:
        for file in sorted((folder / "method").glob("*.yaml")):
            found.setdefault(file.stem, file)
    return dict(sorted(found.items()))


def method_of(method: Method, settings: Mapping[str, Any]) -> tuple[str, AttributionMethod]:
    """Return a method's name, and the method.

    Args:
        method: a name, a class, or an object.
        settings: arguments of a name's class or of a class.

    Raises:
        InputError: no such method, or a setting that it does not have.
    """
    from fimo.methods.base import AttributionMethod

    if isinstance(method, AttributionMethod):
        if settings:
            raise InputError(next(iter(settings)), "settings go with a method's name or class, not an object")
        return type(method).__name__, method
    if isinstance(method, str):
        known = _settings()
        if method not in known:
            raise InputError("method", f"there is no {method!r}; {nearest(method, list(known))}")
        name, kind, given = method, _class_of(known[method]), {**known[method], **settings}
        given.pop("_target_")
    elif isinstance(method, type) and issubclass(method, AttributionMethod):
        name, kind, given = method.__name__, method, dict(settings)
    else:
        raise InputError("method", f"expected a name, a class or an object but got {method!r}")
    own = kind.__module__.startswith("fimo.")  # elsewhere annotations may say what the author likes
    parameters = inspect.signature(kind, eval_str=own).parameters
    for key, value in given.items():
        if key not in parameters:
            raise InputError(key, f"{name} has no such setting; {nearest(key, list(parameters))}")
        hint = parameters[key].annotation
        if own and not fits(value, hint):
            raise InputError(key, f"expected {described(hint)} but got {value!r}")
    try:
        return name, kind(**given)
    except TypeError as error:
        raise InputError("method", f"{name}: {reason(error)}") from error


def table() -> pd.DataFrame:
    """Return what methods there are: their names, what they are, need and cost, and when to use them.

    Returns:
        ``summary, access, needs, cost, use`` by name.
    """
    import pandas as pd  # half a second, which the command line does without

    rows = []
    for name, settings in _settings().items():
        kind = _class_of(settings)
        access = str(method_of(name, {})[1].access)
        rows.append((name, first_sentence(kind), access, kind.needs, kind.cost, kind.use))
    frame = pd.DataFrame(rows, columns=["name", "summary", "access", "needs", "cost", "use"])
    return frame.set_index("name")


def first_sentence(kind: type[AttributionMethod]) -> str:
    """Return the first line of a method's docstring, without markup."""
    return without_markup((inspect.getdoc(kind) or kind.__name__).splitlines()[0])


def without_markup(line: str) -> str:
    """Return a line of a docstring as people read it."""
    return re.sub(r":\w+:`~?(?:[\w.]*\.)?(\w+)`", r"\1", line).replace("``", "")


@functools.cache
def _settings() -> dict[str, dict[str, Any]]:
    """Return each method's settings, by name, as the command line has them."""
    files = method_files([packaged_conf(), *plugin_folders().values()])
    found = OmegaConf.to_container(all_methods(files.values()))
    assert isinstance(found, dict)
    return {str(name): dict(settings) for name, settings in found.items()}


def _class_of(settings: Mapping[str, Any]) -> type[AttributionMethod]:
    module, _, name = str(settings["_target_"]).rpartition(".")
    found: type[AttributionMethod] = getattr(importlib.import_module(module), name)
    return found
