"""What a recipe's file, which may come from a stranger, must not decide."""

from __future__ import annotations

from typing import Any

COMMAND_LINE_ALONE = {
    "lm_eval_folder": "lm-eval runs code that the tasks of a folder name",
    "report_to": "losses and options would be sent to another service, with your account",
    "trackio_space_id": "losses would be sent to another service, with your account",
    "trackio_static_space_id": "losses would be sent to another service, with your account",
    "trackio_bucket_id": "losses would be sent to another service, with your account",
    "trust_remote_code": "and no command gives it: a model's own code is never run, convert it to one of transformers'",
}
"""Keys, wherever they stand, that a file may not give; with the reason."""
_HARMLESS = {"report_to": ("none", [], ["none"], "tensorboard", ["tensorboard"]), "trust_remote_code": (False,)}
"""Values of these keys, beside null, that run nothing and send nothing."""


def check_trusted(tree: Any, key: str, given: set[str]) -> None:
    """Whether a recipe's file leaves to the command line what is the command line's.

    Args:
        tree: a part of what the file says.
        key: where it stands.
        given: keys on the command line, which take the place of the file's.

    Raises:
        ValueError: something to import; a key that the command line alone may give.
    """
    if isinstance(tree, list):
        for index, part in enumerate(tree):
            check_trusted(part, f"{key}[{index}]", given)
    if not isinstance(tree, dict):
        return
    if "class_path" in tree:  # jsonargparse imports it, in options of any type too
        raise ValueError(
            f"{key or 'recipe'}: class_path={tree['class_path']!r}: a recipe imports nothing. Leave it out."
        )
    for name, value in tree.items():
        where = f"{key}.{name}" if key else str(name)
        told = name in COMMAND_LINE_ALONE and value is not None and not isinstance(value, dict)
        if told and where not in given and value not in _HARMLESS.get(name, ()):
            way_out = "" if name == "trust_remote_code" else f" Give it on the command line: --{where} {value!r}."
            raise ValueError(f"{where}={value!r} cannot stand in a file: {COMMAND_LINE_ALONE[name]}.{way_out}")
        check_trusted(value, where, given)
