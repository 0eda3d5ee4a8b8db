"""What every long job shares: command line, settings, checkpoints, signals, meter, progress, tables and figures."""
