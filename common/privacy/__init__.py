"""What releases cost, the noise that they carry, and the plan of a run."""
