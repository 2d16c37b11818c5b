"""What one worker does inside a stage: networks, losses, data, checkpoints, the loop. No Ray here."""
