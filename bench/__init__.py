"""Every number we quote, one command each: `python -m bench NAME`. Never shipped."""
