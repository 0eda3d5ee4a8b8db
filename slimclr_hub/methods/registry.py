"""Registry of pre-training methods, whose settings are the keyword-only parameters of their constructors.

A default and a check of a setting stand in the signature: `temperature: Positive = 0.2`. Recipes and the command line
read them from there.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from inspect import Parameter, signature
from typing import Any, Final, TypeVar, get_args, get_type_hints

from torch import nn

from slimclr_hub.errors import InputError
from slimclr_hub.methods.objective import Objective
from slimclr_hub.settings import Check, Count, Fraction, at_least, one_of

MOMENTUM_SCHEDULES = ('constant', 'cosine')

METHODS: Final[dict[str, type[nn.Module]]] = {}
"""Name -> class of each registered method."""

MethodT = TypeVar('MethodT', bound=type[nn.Module])


@dataclass(frozen=True)
class Training:
    """Defaults of the settings that the training loop applies to a method, and what the loop has to know of it.

    Args:
        views: Views of each image that the method takes, 1 or 2.
        views_cached: Views of each image where the teacher's features are known; as many unless given.
        momentum: Momentum of the key encoder at the first step; None for a method without one.
        momentum_schedule: `constant`, or `cosine` to one.
        sync_bn: Normalise over all processes.
        slow_start_epochs: Epochs that train the full width alone; half of all epochs unless given.
        classifier: `slimmable` or `switchable` for a backbone with such a classifier, whose number of classes is a
            setting; None for one without.
        negatives_in_batch: Negatives are the other images of a microbatch.
        teacher: The constructor takes a `Teacher` after the backbone, and `forward` its features as `cached` where
            they are known.
        neighbours: Default number of nearest images, as the teacher sees them, of which one comes with each image; its
            views follow. None for a method without.
    """

    views: int = 2
    views_cached: int | None = None
    momentum: float | None = None
    momentum_schedule: str = 'constant'
    sync_bn: bool = False
    slow_start_epochs: float | None = None
    classifier: str | None = None
    negatives_in_batch: bool = False
    teacher: bool = False
    neighbours: int | None = None


@dataclass(frozen=True)
class Setting:
    """One setting of a method.

    Args:
        type: Its type.
        default: Its value where a recipe gives none.
        check: Raises an InputError for a value out of range.
        required: True if a value has to be given.
        help: Its description, where no docstring has one.
    """

    type: Any
    default: Any
    check: Check = lambda name, value: None
    required: bool = False
    help: str = ''


def register_method(name: str, **training: Any) -> Callable[[MethodT], MethodT]:
    """Register a class as the method `name`.

    Its constructor takes the backbone, with `teacher=True` the teacher after it, and keyword-only settings;
    `**options` that it hands to `Objective` are settings as well. It has attributes `backbone` and `widths`, and
    `forward(views, widths, momentum, labels) -> {'loss', ...}`. Where it has `set_epoch(epoch)`, that is called
    before a step with the number of its epoch, from 0 on.

    Args:
        name: As in `method.name`.
        training: Arguments of `Training`.

    Raises:
        InputError: There is a method of that name.
    """

    def register(method: MethodT) -> MethodT:
        if name in METHODS:
            raise InputError(f'there is a method {name!r} already; register yours under another name')
        method.training_defaults = Training(**training)  # type: ignore[attr-defined]
        METHODS[name] = method
        return method

    return register


def training_of(name: str) -> Training:
    """`Training` of a registered method."""
    return METHODS[name].training_defaults  # type: ignore[attr-defined]


def settings_of(name: str) -> dict[str, Setting]:
    """All settings of a method: those of its constructor, of `Objective` behind it, and of the training loop.

    Raises:
        InputError: There is no such method.
    """
    one_of('method.name', name, METHODS)
    training = training_of(name)
    settings = constructor_settings(METHODS[name])
    if training.momentum is not None:
        settings['momentum'] = Setting(float, training.momentum, _check_of(Fraction))
        choice = partial(one_of, choices=MOMENTUM_SCHEDULES)
        settings['momentum_schedule'] = Setting(str, training.momentum_schedule, choice)
    settings['sync_bn'] = Setting(bool, training.sync_bn)
    settings['slow_start_epochs'] = Setting(float, training.slow_start_epochs, partial(at_least, least=0))
    if training.neighbours is not None:
        settings['neighbours'] = Setting(int, training.neighbours, _check_of(Count))
    if training.classifier is not None:
        settings['num_classes'] = Setting(
            int, None, partial(at_least, least=2), required=True, help='Number of classes'
        )
    return settings


def constructor_settings(cls: Callable[..., Any]) -> dict[str, Setting]:
    """Keyword-only parameters of a class, and those of `Objective` where the class passes further options on."""
    init = cls.__init__
    types, annotated = get_type_hints(init), get_type_hints(init, include_extras=True)
    parameters: Mapping[str, Parameter] = signature(init).parameters
    settings = {
        name: Setting(types.get(name, Any), parameter.default, _check_of(annotated.get(name)))
        for name, parameter in parameters.items()
        if parameter.kind is Parameter.KEYWORD_ONLY
    }
    if any(parameter.kind is Parameter.VAR_KEYWORD for parameter in parameters.values()) and cls is not Objective:
        settings = {**constructor_settings(Objective), **settings}
    return settings


def _check_of(annotation: Any) -> Check:
    for each in (annotation, *get_args(annotation)):
        for check in getattr(each, '__metadata__', ()):
            return check
    return lambda name, value: None
