"""pytest plugin for timm's own tests: with it timm lists our networks alone, `TIMM_SUITE_MODELS` of them."""

import fnmatch
import os

import timm

import slimclr_hub  # noqa: F401

NAMES = os.environ['TIMM_SUITE_MODELS'].split(',')


def _strings(value):
    return [value] if isinstance(value, str) else list(value)


def list_ours(filter='', module='', pretrained=False, exclude_filters='', name_matches_cfg=False, include_tags=None):
    # `module` is not looked at: timm's tests name its own modules there, and ours are ResNets under another name.
    if pretrained:
        return []
    included = [pattern for pattern in _strings(filter) if pattern] or ['*']
    excluded = _strings(exclude_filters)
    return [
        name
        for name in NAMES
        if any(fnmatch.fnmatch(name, p) for p in included) and not any(fnmatch.fnmatch(name, p) for p in excluded)
    ]


# Before collection: the tests import the function by name and call it in their decorators.
timm.list_models = list_ours
