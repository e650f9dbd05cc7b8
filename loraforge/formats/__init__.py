"""Files to adapters and back."""
