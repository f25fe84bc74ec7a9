"""Meta-learning algorithms: each holds a network and gives the loop a loss."""
