"""Where the time of a step goes: stamps, phases that sum to the wall time, and records of collectives."""
