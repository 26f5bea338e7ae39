"""Second readings of published descriptions, to hold the presets against; nothing here uses model/, optim/ or data/."""
