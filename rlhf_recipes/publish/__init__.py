"""A run on the Hub, proven to be what was trained; `publish` is the way from the first check to the last word."""
