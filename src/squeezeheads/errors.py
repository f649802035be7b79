"""Mistakes that a user can mend: commands print their message alone, without a traceback."""


class RecipeError(ValueError):
    """A recipe that cannot be carried out: names the key, the value, what was expected and the way out."""
