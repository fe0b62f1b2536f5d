"""The search for settings that fit a device and train fast."""
