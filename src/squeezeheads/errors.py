"""Mistakes that a user can mend: commands print their message alone, without a traceback."""


class RecipeError(ValueError):
    """A recipe that cannot be carried out: names the key, the value, what was expected and the way out."""


def in_short(message: object, limit: int = 300) -> str:
    """What another library says, on one line of at most ``limit`` characters: some list every model they know."""
    line = " ".join(str(message).split())
    return line if len(line) <= limit else f"{line[:limit].rstrip()} …"
