"""How stored images become what an image model takes: size, channels, normalisation."""
