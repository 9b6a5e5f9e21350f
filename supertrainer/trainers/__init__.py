"""Training on the loops of transformers and TRL, with checks of our own and a model that comes back clean."""
