"""A recipe planned before it is run: every mistake at once, what each part learns from which, what it will cost."""

from squeezeheads.planning.plan import Plan, plan_recipe
from squeezeheads.planning.problems import Problem

__all__ = ["Plan", "Problem", "plan_recipe"]
