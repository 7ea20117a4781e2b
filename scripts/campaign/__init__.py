"""The parts of `scripts/crash_campaign.py`."""
