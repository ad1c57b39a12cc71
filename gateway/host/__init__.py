"""What keeps the house running: start and stop, child processes, folders, certificates, recovery, loops."""
