"""What a student is worth: task metrics, and how faithful its attention is to the teacher's."""

from squeezeheads.evaluation.fidelity import attention_fidelity
from squeezeheads.evaluation.squeezing import measure_squeezing

__all__ = ["attention_fidelity", "measure_squeezing"]
