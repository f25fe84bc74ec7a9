"""Validation: every key, type, bound and component signature, before anything is built."""

from __future__ import annotations

import contextlib
import functools
import inspect
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields, is_dataclass
from importlib import import_module
from pkgutil import iter_modules
from typing import Any, TypeVar, cast, get_args, get_type_hints, overload

from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.errors import PydanticSchemaGenerationError, PydanticUndefinedAnnotation

from metabatch_cli.config.compose import config_dir
from metabatch_cli.config.errors import ConfigError, UserError, nearest
from metabatch_cli.config.schema import COMPONENTS, Config

# what the builder passes by itself, and nobody has to write into YAML
FROM_SPEC = {"dim_x", "dim_y", "x_shape", "y_shape", "ways", "classes", "image_shape", "units"}
PROVIDED: dict[str, set[str]] = {
    "taskset": {"split", "eval"},
    "model": FROM_SPEC,
    "learner": FROM_SPEC | {"model"},
    "optimizer": {"params"},
    "scheduler": {"optimizer"},
}

Kind = TypeVar("Kind")
Whole = TypeVar("Whole", bound=Config)

_WORDING = {
    "greater than or equal to": "at least",
    "greater than": "more than",
    "less than or equal to": "at most",
    "a valid integer": "a whole number",
    "a valid number": "a number",
    "a valid boolean": "true or false",
    "a valid string": "text",
    "a valid dictionary": "a mapping",
    "a valid tuple": "a list",
    "a valid list": "a list",
    "Tuple should have": "a list that has",
    "List should have": "a list that has",
    " after validation": "",
    "Field required": "a list with more entries",
}
_HYDRA_KEYS = {"_target_", "_partial_", "_args_", "_convert_", "_recursive_"}


def check_fields(kind: type[Kind], config: Mapping[str, Any]) -> Kind:
    """The configuration as an object of its dataclass: names, types and bounds.

    Args:
        kind: the dataclass.
        config: plain and resolved.

    Raises:
        ConfigError: the first key that cannot be as it is.
    """
    try:
        checked = _adapter(cast(Any, kind)).validate_python(dict(config))
    except ValidationError as error:
        raise _first_mistake(error, config, kind) from None
    _refuse_truth_for_numbers(kind, config)
    return cast(Kind, checked)


@overload
def check(config: Mapping[str, Any]) -> Config: ...


@overload
def check(config: Mapping[str, Any], kind: type[Whole]) -> Whole: ...


def check(config: Mapping[str, Any], kind: type[Config] = Config) -> Config:
    """The configuration of a training as an object, every part of it checked.

    Args:
        config: plain and resolved.
        kind: `Config`, or what has further sections.

    Raises:
        ConfigError: the first key that cannot be as it is.
    """
    checked = check_fields(kind, config)
    for section in COMPONENTS:
        node = getattr(checked, section)
        if node or section != "scheduler":
            setattr(checked, section, check_component(section, node, PROVIDED[section]))
    shards, processes = checked.loader.shards, checked.trainer.processes
    if shards % processes:
        raise ConfigError(
            "trainer.processes",
            f"cannot share batches that are made in loader.shards={shards} parts",
            value=processes,
            allowed=f"{', '.join(str(k) for k in range(1, shards + 1) if shards % k == 0)}; more "
            f"with loader.shards={math.lcm(shards, processes)}, which gives other tasks",
        )
    for name, node in checked.logger.items():
        checked.logger[name] = check_component(f"logger.{name}", node, {"directory"})
    for split in ("val", "test"):
        for name, overrides in test_sets(
            getattr(checked.evaluation, split), checked.taskset
        ).items():
            key = f"evaluation.{split}" + (f".{name}" if name else "")
            check_overrides(key, checked.taskset, overrides)
    return checked


def test_sets(
    overrides: Mapping[str, Any] | None, taskset: Mapping[str, Any]
) -> dict[str, dict[str, Any]]:
    """The named task sets of `evaluation.val` or `.test`; one without a name is named "".

    Several sets are named by what tells them apart, as it shall stand in the result:
    `{"shots=1": {…}, "shots=5": {…}}`. Anything else is the overrides of a single set.
    """
    if is_several(overrides, taskset):
        return {str(name): dict(part or {}) for name, part in (overrides or {}).items()}
    return {"": dict(overrides or {})}


def is_several(overrides: Mapping[str, Any] | None, taskset: Mapping[str, Any]) -> bool:
    """Whether these are several sets by name, not the overrides of one."""
    return bool(overrides) and all(
        "=" in str(name) or (isinstance(part, Mapping) and name not in taskset)
        for name, part in (overrides or {}).items()
    )


def merged(component: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """A component with some keys changed, at any depth; another `_target_` replaces its part."""
    result = dict(component)
    for key, value in overrides.items():
        old = result.get(key)
        if isinstance(old, Mapping) and isinstance(value, Mapping) and "_target_" not in value:
            value = merged(old, value)
        result[key] = value
    return result


def check_overrides(key: str, component: Mapping[str, Any], overrides: Mapping[str, Any]) -> None:
    """Check a component that differs in a few keys, naming those where one is wrong."""
    try:
        check_component(key, merged(component, overrides), PROVIDED["taskset"])
    except ConfigError as error:
        if any(error.key.startswith(f"{key}.{name}") for name in overrides):
            raise


def check_component(key: str, node: Any, provided: Iterable[str] = ()) -> dict[str, Any]:
    """A component whose target exists and whose arguments fit its signature.

    Args:
        key: where it stands, for the message.
        node: `_target_` and keyword arguments.
        provided: arguments that the builder will add.

    Returns:
        The component with its values converted to the types that the signature asks for.

    Raises:
        ConfigError: no such target; an unknown, missing or ill-typed argument.
    """
    if not isinstance(node, Mapping) or not node.get("_target_"):
        raise ConfigError(f"{key}._target_", "is missing: it names the class to build")
    target = locate(f"{key}._target_", str(node["_target_"]))
    parameters = _parameters(target)
    if is_taskset(target):
        provided = PROVIDED["taskset"].union(provided)
    given = {name: value for name, value in node.items() if name not in _HYDRA_KEYS}
    names = _check_names(key, target, given, provided)
    for name in names:
        required = parameters[name].default is inspect.Parameter.empty
        if required and name not in given and name not in provided:
            raise ConfigError(f"{key}.{name}", f"is missing: {target.__name__} needs it")
    hints = _hints(target)
    checked = {name: node[name] for name in node if name in _HYDRA_KEYS}
    for name, value in given.items():
        checked[name] = _check_value(f"{key}.{name}", value, hints.get(name, Any))
    return checked


def check_all_names(config: Mapping[str, Any]) -> None:
    """Check that the components of a configuration, resolved or not, have the arguments given.

    Raises:
        ConfigError: an unknown argument.
    """
    for section in COMPONENTS:
        node = config.get(section)
        if isinstance(node, Mapping) and node.get("_target_"):
            target = locate(f"{section}._target_", str(node["_target_"]))
            given = [name for name in node if name not in _HYDRA_KEYS]
            _check_names(section, target, given, PROVIDED[section])


_ANY = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)


def _check_names(
    key: str, target: Callable[..., Any], given: Iterable[str], provided: Iterable[str]
) -> list[str]:
    """The names of a target's arguments, after a look at whether what is given is among them."""
    parameters = _parameters(target).items()
    names = [name for name, p in parameters if p.kind not in _ANY]
    takes_any = any(p.kind is p.VAR_KEYWORD for _, p in parameters)
    known = names
    if takes_any:  # as a base may do, which knows what it takes
        every = [p for function in constructors(target) for p in _parameters(function).values()]
        named = dict.fromkeys(p.name for p in every if p.kind not in _ANY)
        known = [name for name in named if name != "self"]
    for unknown in given:
        if unknown not in known and (not takes_any or nearest(unknown, known)):
            raise ConfigError(
                f"{key}.{unknown}",
                f"{target.__name__} has no such argument",
                allowed=[name for name in known if name not in provided or name in FROM_SPEC],
                wrong_name=unknown,
            )
    return names


def locate(key: str, path: str) -> Any:
    """The object that an import path names.

    Raises:
        ConfigError: it cannot be imported; says which part of the path is wrong.
    """
    parts = path.split(".")
    if not all(part.isidentifier() for part in parts) or len(parts) < 2:
        raise ConfigError(key, "is no import path", value=path, allowed="package.module.ClassName")
    for end in range(len(parts) - 1, 0, -1):
        module_name = ".".join(parts[:end])
        try:
            found: Any = import_module(module_name)
        except ModuleNotFoundError as error:
            if error.name and (
                module_name == error.name or module_name.startswith(error.name + ".")
            ):
                continue
            raise ConfigError(
                key, f"importing {module_name} failed: {error}", value=path
            ) from error
        except Exception as error:
            problem = f"importing {module_name} failed: {type(error).__name__}: {error}"
            raise ConfigError(key, problem, value=path) from error
        for part in parts[end:]:
            if not hasattr(found, part):
                names = [name for name in vars(found) if not name.startswith("_")]
                names += [entry.name for entry in iter_modules(getattr(found, "__path__", []))]
                classes = [name for name in names if inspect.isclass(getattr(found, name, None))]
                near = nearest(part, classes) or nearest(part, names)
                hint = f"\n  did you mean '{module_name}.{near}'?" if near else ""
                raise ConfigError(key, f"{module_name} has no {part!r}{hint}", value=path)
            found = getattr(found, part)
        if not callable(found):
            raise ConfigError(key, f"is a {type(found).__name__}, not a class", value=path)
        return found
    raise ConfigError(
        key,
        f"there is no module {parts[0]!r}",
        value=path,
        allowed="a module that is installed, or one in the current directory",
    )


def is_taskset(target: Any) -> bool:
    """Whether a target is a class of task sets, which are told their split, wherever they are."""
    from metabatch_cli.batching.taskset import TaskSet

    return inspect.isclass(target) and issubclass(target, TaskSet)


def _parameters(target: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    try:
        return dict(inspect.signature(target).parameters)
    except (TypeError, ValueError):  # some C types have none to show
        return {"kwargs": inspect.Parameter("kwargs", inspect.Parameter.VAR_KEYWORD)}


def default_of(target: Callable[..., Any], name: str, otherwise: Any) -> Any:
    """The default of an argument, as a configuration would have it; `otherwise` without one."""
    for function in constructors(target):
        parameter = _parameters(function).get(name)
        if parameter is not None and parameter.default is not inspect.Parameter.empty:
            found = parameter.default
            return list(found) if isinstance(found, tuple) else found
    return otherwise


def constructors(target: Any) -> list[Callable[..., Any]]:
    """The functions that take a target's arguments: while one has **kwargs, its base's too."""
    if not inspect.isclass(target):
        return [target]
    found = []
    for own in (vars(kind)["__init__"] for kind in target.__mro__ if "__init__" in vars(kind)):
        if own is object.__init__:
            break
        found.append(own)
        if not any(p.kind is p.VAR_KEYWORD for p in _parameters(own).values()):
            break
    return found


def _hints(target: Any) -> dict[str, Any]:
    hints: dict[str, Any] = {}
    for function in reversed(constructors(target)):
        # names that exist for type checkers only: names are checked all the same
        with contextlib.suppress(Exception):
            hints |= get_type_hints(function, include_extras=True)
    return hints


def _check_value(key: str, value: Any, hint: Any) -> Any:
    if isinstance(value, Mapping) and "_target_" in value:
        return check_component(key, value)
    if isinstance(value, Mapping) and any(map(_is_component, value.values())):
        return {name: _check_value(f"{key}.{name}", v, Any) for name, v in value.items()}
    if isinstance(value, list) and any(map(_is_component, value)):
        return [_check_value(f"{key}.{number}", v, Any) for number, v in enumerate(value)]
    adapter = _adapter_or_none(hint)
    if adapter is None:
        return value
    try:
        # strictly, true and false are no numbers
        return adapter.validate_python(value, strict=isinstance(value, bool))
    except ValidationError as error:
        raise _wrong_value(key, value, error) from None


def _is_component(value: Any) -> bool:
    return isinstance(value, Mapping) and "_target_" in value


def _refuse_truth_for_numbers(kind: Any, config: Mapping[str, Any], prefix: str = "") -> None:
    for name, hint in get_type_hints(kind, include_extras=True).items():
        value = config.get(name)
        if isinstance(value, bool):
            _check_value(f"{prefix}{name}", value, hint)
        elif is_dataclass(section := _required(hint)) and isinstance(value, Mapping):
            _refuse_truth_for_numbers(section, value, f"{prefix}{name}.")


def _required(hint: Any) -> Any:
    """What a hint asks for where the value is not None."""
    others = [kind for kind in get_args(hint) if kind is not type(None)]
    return others[0] if len(others) == 1 and type(None) in get_args(hint) else hint


def _adapter_or_none(hint: Any) -> TypeAdapter[Any] | None:
    try:
        return _adapter(hint)
    except (PydanticSchemaGenerationError, PydanticUndefinedAnnotation, TypeError):
        return None


@functools.cache
def _adapter(hint: Any) -> TypeAdapter[Any]:
    try:
        return TypeAdapter(hint, config=ConfigDict(arbitrary_types_allowed=True))
    except Exception as error:
        if "config" not in str(error):
            raise
        return TypeAdapter(hint)  # a dataclass brings its own


def _first_mistake(error: ValidationError, config: Mapping[str, Any], kind: Any) -> UserError:
    mistakes = error.errors()
    first = mistakes[0]
    location = [str(part) for part in first["loc"]]
    if first["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        key, known = ".".join(location), _keys_beside(kind, location)
        return ConfigError(key, "there is no such key", allowed=known, wrong_name=location[-1])
    if first["type"].startswith("missing"):
        return ConfigError(
            ".".join(location),
            "nothing is chosen; +experiment=NAME chooses everything",
            allowed=[
                f"{location[0]}={file.stem}" for file in (config_dir() / location[0]).glob("*")
            ],
        )
    # a union reports every branch under the key that it stands for
    depth = _depth_in(config, location)
    key = ".".join(location[:depth])
    return _wrong_value(
        key, first["input"], error, [m for m in mistakes if _under(m, location, depth)]
    )


def _under(mistake: Any, location: list[str], depth: int) -> bool:
    return [str(part) for part in mistake["loc"][:depth]] == location[:depth]


def _depth_in(config: Any, location: list[str]) -> int:
    for depth, part in enumerate(location):
        if not isinstance(config, Mapping) or part not in config:
            return max(depth, 1)
        config = config[part]
    return len(location)


def _keys_beside(kind: Any, location: list[str]) -> list[str]:
    hints = get_type_hints(kind)
    for part in location[:-1]:
        kind = _required(hints.get(part, kind))
        hints = get_type_hints(kind)
    return [field.name for field in fields(kind)]


def _wrong_value(
    key: str, value: Any, error: ValidationError, mistakes: list[Any] | None = None
) -> ConfigError:
    wanted: list[str] = []
    mistakes = error.errors() if mistakes is None else mistakes
    for mistake in mistakes:
        text = mistake["msg"].removeprefix("Input should be ").removeprefix("Value error, ")
        text = text.split(", unable to ")[0].split(", got a number")[0]
        text = text.split(", not ")[0]
        text = re.sub(r"a dictionary or an instance of \w+", "a mapping", text)
        for theirs, ours in _WORDING.items():
            text = text.replace(theirs, ours)
        if text not in wanted:
            wanted.append(text)
    names = re.findall(r"'([^']*)'", " ".join(wanted)) if isinstance(value, str) else []
    near = nearest(str(value), names)
    hint = f"\n  did you mean {near!r}?" if near else ""
    return ConfigError(key, "is not allowed", value=value, allowed=" or ".join(wanted) + hint)
