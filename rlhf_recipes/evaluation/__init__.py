"""Did it help? Measurements of systems, what they say about each other, and the page that shows it."""
