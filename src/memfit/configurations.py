"""Where a model's configuration comes from: a folder, a `config.json`, the table of known models, or the Hub.

transformers is imported where it is used. Code that a configuration brings along runs only where that is asked for.
"""

from __future__ import annotations

import copy
import json
import os
import socket
import urllib.parse
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING, Any

from memfit import known
from memfit.errors import ModelError, UnknownNameError, UsageError
from memfit.names import nearest

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

CONFIG_NAME = "config.json"
_MAX_FILE_BYTES = 16 << 20
_LAYER_COUNTS = ("num_hidden_layers", "num_layers", "num_decoder_layers", "encoder_layers", "decoder_layers")


def load(name_or_path: str | os.PathLike[str], *, trust_remote_code: bool = False) -> PreTrainedConfig:
    """The configuration of a model.

    What exists on disk comes first, then the table of known models, then the Hub, where there is a network.

    Args:
        name_or_path: A folder with a `config.json`, such a file, a name such as ``llama-3-8b``, or an id of the Hub.
        trust_remote_code: Run the code that a configuration names in its ``auto_map``.

    Returns:
        A configuration of its own: nobody else holds it.

    Raises:
        UnknownNameError: No such file, no such known model, and the Hub does not give it either.
        UsageError: The file is no configuration, or brings code along that nobody has agreed to.
        ModelError: transformers is missing, or refuses the configuration.
    """
    _require_transformers()
    name = os.fspath(name_or_path)
    place = os.path.expanduser(name)
    file = os.path.join(place, CONFIG_NAME) if os.path.isdir(place) else place
    if os.path.isfile(file):
        return _from_file(name, Path(file), trust_remote_code)
    try:
        model = known.find(name)
    except UnknownNameError:
        pass
    else:
        config = _build(name, copy.deepcopy(model.config))
        config.name_or_path = model.id
        return config
    if os.path.isdir(place):
        raise UsageError(f"There is no `{CONFIG_NAME}` in `{name}`.")
    if os.path.isabs(place) or name.startswith(".") or name.endswith(".json") or name.count("/") > 1:
        raise UsageError(f"There is no file or folder `{name}` in `{os.getcwd()}`.")
    return _from_hub(name, trust_remote_code)


def with_layers(config: PreTrainedConfig, count: int) -> PreTrainedConfig:
    """The same model with ``count`` layers, of each side where it has two.

    What the configuration lists layer by layer is cut, too.

    Raises:
        UsageError: It has fewer, or does not say how many it has.
    """
    config = copy.deepcopy(config)
    text = config.get_text_config()
    names = [name for name in _LAYER_COUNTS if isinstance(getattr(text, name, None), int)]
    before = {getattr(text, name) for name in names}
    if not names:
        raise UsageError(f"The configuration of this {text.model_type} does not say how many layers it has.")
    if not 1 <= count <= min(before):
        raise UsageError(f"`layers={count}`: this {text.model_type} has {min(before)}. Give 1 to {min(before)}.")
    for name, value in list(vars(text).items()):
        if isinstance(value, list) and len(value) in before:
            setattr(text, name, value[:count])
    for name in names:
        setattr(text, name, count)
    return config


def _require_transformers() -> None:
    try:
        import transformers  # noqa: F401
    except ImportError as error:
        raise ModelError("Configurations need transformers: install it with `pip install transformers`.") from error


def _from_file(name: str, file: Path, trust_remote_code: bool) -> PreTrainedConfig:
    fields = _read(file)
    if "auto_map" not in fields:
        return _build(name, fields)
    _agree(name, fields, trust_remote_code)
    # By its folder: the code lies beside the file.
    return _run_code(name, os.fspath(file.parent if file.name == CONFIG_NAME else file))


def _read(file: Path) -> dict[str, Any]:
    """The fields of a configuration file, checked to be one."""
    try:
        with open(file, "rb") as opened:
            content = opened.read(_MAX_FILE_BYTES + 1)
    except OSError as error:
        raise UsageError(f"Cannot read `{file}`: {error.strerror}.") from error
    if len(content) > _MAX_FILE_BYTES:
        raise UsageError(f"`{file}` has more than {_MAX_FILE_BYTES} bytes: it is no configuration.")
    try:
        fields = json.loads(content.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise UsageError(f"`{file}` is not JSON: {error}.") from None
    if not isinstance(fields, dict):
        raise UsageError(f"`{file}` holds a {type(fields).__name__}: a configuration is an object.")
    return fields


def _build(name: str, fields: dict[str, Any]) -> PreTrainedConfig:
    """The class of the ``model_type``, with these fields."""
    from transformers import CONFIG_MAPPING

    kind = fields.get("model_type")
    if not isinstance(kind, str):
        raise UsageError(f"The configuration `{name}` has no `model_type`: it says which model it is for.")
    if kind not in CONFIG_MAPPING:
        near = [f"`{other}`" for other in nearest(kind, CONFIG_MAPPING.keys())]
        hint = f" Nearest: {', '.join(near)}." if near else ""
        raise UsageError(
            f"The configuration `{name}` has the `model_type` `{kind[:80]}`, which transformers does not know.{hint}"
        )
    try:
        config: PreTrainedConfig = CONFIG_MAPPING[kind].from_dict(fields)
    except Exception as error:  # each class checks its fields in its own way
        raise ModelError(f"transformers refuses the configuration `{name}`: {error}") from error
    return config


def _agree(name: str, fields: dict[str, Any], trust_remote_code: bool) -> None:
    if trust_remote_code:
        return
    kind = str(fields.get("model_type"))[:80]
    raise UsageError(
        f"The configuration `{name}` brings its own code (`auto_map`). Read it, and then agree with "
        f"`trust_remote_code`; or take `auto_map` out of a copy, if transformers' own `{kind}` is the same model."
    )


def _run_code(name: str, source: str) -> PreTrainedConfig:
    from transformers import AutoConfig

    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(source, trust_remote_code=True)
    except Exception as error:  # it may raise anything
        raise ModelError(f"The code of the configuration `{name}` failed: {error}") from error
    return config


def _has_network() -> bool:
    """Whether the Hub's host has an address: asking it five times, as its client does, takes half a minute."""
    from huggingface_hub.constants import ENDPOINT

    if urllib.request.getproxies():
        return True  # a proxy looks names up itself
    try:
        socket.getaddrinfo(urllib.parse.urlsplit(ENDPOINT).hostname, None)
    except OSError:
        return False
    return True


def _from_hub(name: str, trust_remote_code: bool) -> PreTrainedConfig:
    from transformers import PreTrainedConfig

    try:
        # Nothing but the JSON, from the cache at least: no code runs.
        fields, _ = PreTrainedConfig.get_config_dict(name, local_files_only=not _has_network())
    except Exception as error:  # a network has many ways to fail, and so has a wrong name
        first, _, _ = str(error).strip().partition("\n")
        raise UnknownNameError(
            "model",
            name,
            known.nearest_names(name),
            f"It is no file or folder here either, and the Hub did not give it: {first[:300] or type(error).__name__}",
        ) from error
    if "auto_map" not in fields:
        return _build(name, fields)
    _agree(name, fields, trust_remote_code)
    return _run_code(name, name)
