"""The core with torch and numpy alone: `make test-core` runs this in an environment that has nothing else.

It takes the two-function road of the README once, on two modules written by hand, and checks that a gradient arrives.
"""

import importlib.util

OPTIONAL = ("transformers", "accelerate", "datasets", "jsonargparse", "rich", "matplotlib", "sklearn", "scipy", "yaml")
present = [name for name in OPTIONAL if importlib.util.find_spec(name)]
if present:
    raise SystemExit(
        f"this environment is to hold torch and numpy alone, but has {', '.join(present)}: use make test-core"
    )

import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402

import squeezeheads as sh  # noqa: E402


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=-1))
        y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return x + self.out(y.transpose(1, 2).flatten(2))


class Model(nn.Module):
    def __init__(self, width: int, heads: int, layers: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, width)
        self.layers = nn.ModuleList(Attention(width, heads) for _ in range(layers))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x)
        return x


torch.manual_seed(0)
teacher, student = Model(48, 6, layers=4), Model(24, 3, layers=2)
tokens = torch.randint(11, (2, 17))
with torch.no_grad(), sh.record_attention(teacher) as taught:
    teacher(tokens)
with sh.record_attention(student) as learned:
    student(tokens)
loss = sh.squeezed_attention_loss(learned, taught, rows=torch.ones(2, 17, dtype=torch.bool))
loss.backward()

assert len(taught) == 4 and len(learned) == 2, (len(taught), len(learned))
assert loss.item() > 0, loss
assert all(layer.qkv.weight.grad.abs().sum() > 0 for layer in student.layers), (
    "no gradient at the student's queries and keys"
)
assert all(p.grad is None for p in teacher.parameters()), "a gradient at the teacher"
print(f"core: two functions on torch {torch.__version__} alone, loss {loss.item():.4f} nats per row and head")
