"""How fast: tasks a second of several loaders, and what a training step waits for."""
