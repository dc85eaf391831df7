"""How processes start: the supervisor, several processes on one machine, Ray, managed platforms."""
