"""What a configuration's training step costs, on this machine or on a card that is not there."""
