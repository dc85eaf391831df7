"""What learns, and how fast: the lectures' matrix, laid over the stages of any backbone."""
