"""What every training shares: callbacks, the doctor, curves, card, metrics, and its end."""
