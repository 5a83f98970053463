"""The loop and what surrounds it: objectives as the loop sees them, optimizer, metrics, logs, guards, reports. Trainers assemble; nothing here reads YAML."""
