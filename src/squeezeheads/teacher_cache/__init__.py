"""An offline teacher: its logits written once, keyed on the exact input, and used in its place."""

from squeezeheads.teacher_cache.identity import teacher_fingerprint
from squeezeheads.teacher_cache.reading import CachedTeacher
from squeezeheads.teacher_cache.writing import write_teacher_cache

__all__ = ["CachedTeacher", "teacher_fingerprint", "write_teacher_cache"]
