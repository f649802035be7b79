"""Class-conditional diffusion: losses, draws, models as the rest of the package sees them, sampling. Needs the extra
``diffusion``; imported where a task asks for it."""
