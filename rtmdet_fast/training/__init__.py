"""Training runs: settings, loop, schedule, state and log."""
