"""Lightning callbacks: the session that monitors share, the monitors' base, and the stopper."""
