"""How processes start: the supervising parent, several processes on a machine, Ray, managed platforms."""
